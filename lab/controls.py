"""
Control experiments that only the study needs: experts that answer another problem than the one that is asked.

    python train.py --extension lab/controls.py --control last_wrong --experts A B A

Importing this file adds them to rlvr.CONTROLS. In each of them an expert has, for some problems, the states
and the text of the NEXT problem of the same dataset. It is as good a model as before, and what it says looks
like an answer, but to another question. So nothing but rewards can tell the policy whom to believe.

    last_wrong         the last expert, on all problems
    last_partly_wrong  the last expert, on the last dataset by name
    each_knows_one     two experts: the first one on the second dataset by name, the second one on the first

With two copies of one model, `each_knows_one` makes two experts that are equally good, each on a dataset of
its own. To be right on both, the router has to attend to a different one on each.
"""
from rewards import next_in_dataset
from rlvr import CONTROLS


def last_wrong(H, texts, problems, expert_of_state, seed):
    """The last expert answers the next problem, everywhere."""
    last = int(expert_of_state.max())
    datasets = datasets_of(problems)
    return answers_next_problem(H, texts, problems, expert_of_state, {last: datasets})


def last_partly_wrong(H, texts, problems, expert_of_state, seed):
    """The last expert answers the next problem, on the last dataset by name."""
    last = int(expert_of_state.max())
    datasets = datasets_of(problems)
    return answers_next_problem(H, texts, problems, expert_of_state, {last: datasets[-1:]})


def each_knows_one(H, texts, problems, expert_of_state, seed):
    """Expert 0 answers the next problem on the second dataset by name, expert 1 on the first.

    Raises ValueError for fewer than two experts.
    """
    if int(expert_of_state.max()) < 1:
        raise ValueError("--control each_knows_one needs two experts: name the same one twice, as in "
                         "--experts A A")
    datasets = datasets_of(problems)
    wrong_on = {0: datasets[1:2], 1: datasets[:1]}
    return answers_next_problem(H, texts, problems, expert_of_state, wrong_on)


def datasets_of(problems):
    """The names of the problems' datasets, in alphabetical order."""
    return sorted({problem.dataset for problem in problems})


def answers_next_problem(H, texts, problems, expert_of_state, wrong_on):
    """Replace states H (n, N, D) and texts [experts][n] of some experts on some datasets.

    wrong_on: {expert: datasets on which its states and texts are those of the next problem}. Returns a new H
    and new texts. `texts` is [] where nobody asks the experts for texts.
    """
    partner = next_in_dataset(problems)
    new_H, new_texts = H.clone(), [list(column) for column in texts]
    for expert, datasets in wrong_on.items():
        own_states = expert_of_state == expert  # (N,)
        for i, problem in enumerate(problems):
            if problem.dataset in datasets:
                new_H[i, own_states] = H[partner[i], own_states]
                if texts:
                    new_texts[expert][i] = texts[expert][partner[i]]
    return new_H, new_texts


CONTROLS |= {
    "last_wrong": last_wrong,
    "last_partly_wrong": last_partly_wrong,
    "each_knows_one": each_knows_one,
}
