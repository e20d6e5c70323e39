"""
Evaluation: how many test problems are answered right, which expert is attended to, and does that matter?

$ python eval.py runs/NAME            # measure everything below on the test problems, and draw a picture
$ python eval.py runs/NAME --stage0   # the same with the weights after stage 0, before GRPO
$ python eval.py runs/NAME --ask      # type questions of your own, and see which expert is attended to
$ python eval.py runs/NAME --ask "State the final answer to the following arithmetic problem: 1 - 5 + 2 + 4 ="

What is measured. All answers are greedy: at every token the policy takes the likeliest one.

1. Before and after. "Before" is the policy alone: LoRA is off and there is no context. (With --router text
   the experts' answers stand in its prompt, before and after. Then "before" is called the untrained policy.)
2. Attention. How much does the router attend to each expert, for each kind of problem? A large share is no
   proof that the expert matters, because the policy may ignore what is read from it. Hence two more tests.
3. Masking. The test is repeated with one expert hidden: its attention is exactly 0. The accuracy that is then
   lost is what only this expert contributes. (If two experts know the same, hiding one loses little.)
4. Swap. Each question gets the states of another question of its dataset. A policy that says what the expert
   says to the OTHER question has read it from the states. A policy that still answers its own question does
   not need the states: it knows the answer itself, or guesses it.

What is easy to get wrong:
- The reward in training is that of sampled answers. Greedy answers are usually right more often, so the two
  must not be compared. "Before" is greedy, too.
- Accuracy on 256 problems is uncertain by up to 6 points in each direction (`wilson`). Two runs that differ
  by less may be equally good.
- An accuracy of 30% may be worth nothing, if one and the same answer is right for 30% of the problems. The
  swap test shows it: such a policy loses nothing with the states of another question.

A report and its picture have a name that says what they show: eval-step80-n256.json and .png are about the
weights after step 80, on 256 problems; eval-stage0-n256.json is about the weights after stage 0. So a test on
fewer problems does not overwrite one on more, and after more steps no old report can be taken for a new one.
"""
import os

# Let idle OpenMP threads sleep. On a shared machine, threads that wait by spinning slow everybody down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import itertools
import json
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from experts import read_tensors, write_atomic
from rewards import MAX_PROBLEMS, Problem, extract, grade, next_in_dataset
from rlvr import (DRAWN_FOR_ALL, RANK, Dataset, all_gather, checkpoints, import_extension, load_problems,
                  my_part, open_run, read_config, read_records, rollout, run_cli, without_nan)
from router import NoRouter, WithoutExpert, by_expert


# -- What is measured

EVAL_ROWS = 64  # the most problems that are answered at once


@torch.no_grad()
def evaluate(policy, router, dataset, args, indices=None, H=None, visible=None):
    """Answer problems greedily, and verify the answers. All ranks call this, and share the work.

    indices   which problems of the dataset; None: all n of them
    H         (n, N, D), N states for each problem of the dataset: they replace the dataset's own
    visible   (N,) or, for all problems of the dataset, (n, N): False hides a state from the router
    Returns, in the order of the indices, the verdicts, the texts of the answers, and the attention (problems,
    heads, latents, experts); None in its place if the router has no attention.
    """
    if indices is None:
        indices = range(len(dataset))
    mine = list(my_part(indices))

    # Take prompts of similar length together, so that little is padded.
    order = sorted(range(len(mine)), key=lambda i: len(dataset.ids[mine[i]]))

    # A rollout of training has batch * group answers at once. Take no more, so that memory is enough.
    size = min(EVAL_ROWS, args.batch * args.group)
    hide_bar = True if RANK else None  # None: tqdm shows it on a terminal, and not in a file

    verdicts, texts, attention = [], [], []
    for start in tqdm(range(0, len(mine), size), desc="answers", leave=False, disable=hide_bar):
        part = [mine[i] for i in order[start:start + size]]
        batch = dataset.batch(part)

        # Replace what the router reads, or what it can see.
        if H is not None:
            batch.H = H[part].to(batch.H)
        if visible is not None:
            visible_to_each = visible.expand(len(dataset), -1)  # (n, N)
            batch.visible = visible_to_each[part].to(batch.visible)

        # A group of one: one greedy answer to each problem.
        answered = rollout(policy, router, batch, args, group=1, temperature=0)
        verdicts += [group[0] for group in answered.verdicts]
        texts += [group[0] for group in answered.texts]
        if answered.attention is not None:
            attention.append(by_expert(answered.attention, dataset.expert_of_state).cpu())

    # Undo the sorting, and put the parts of all ranks together.
    back = sorted(range(len(order)), key=order.__getitem__)
    verdicts = joined([verdicts[i] for i in back])
    texts = joined([texts[i] for i in back])
    attention = joined([torch.cat(attention)[back]] if attention else [])
    if not attention:
        return verdicts, texts, None
    return verdicts, texts, torch.cat(attention)


def joined(items):
    """The lists of all ranks, one after the other, as one list on every rank."""
    return list(itertools.chain.from_iterable(all_gather(items)))


def right_of(verdicts):
    """(n,): 1.0 for an answer that is right, 0.0 for any other.

    The reason in a verdict tells which it is, and the reward does not: an extension may give a right answer
    the reward 0.5, or a wrong one -1.
    """
    right = [verdict.reason == "right" for verdict in verdicts]
    return torch.tensor(right, dtype=torch.float32)


def accuracy(verdicts):
    """The fraction of answers that are right: the right number or text, in the requested format."""
    return right_of(verdicts).mean().item()


def by_dataset(dataset_names, values, names=None):
    """Average values over the problems of each dataset.

    dataset_names: the name of each problem's dataset, n of them. values (n,) -> {dataset: mean}, or with the
    names of the experts, values (n, experts) -> {dataset: {expert: mean}}. For example the datasets a, b, a,
    b and the values 1, 2, 3, 6 give {"a": 2.0, "b": 4.0}.
    """
    means = {}
    for dataset in sorted(set(dataset_names)):
        indices = [i for i, other in enumerate(dataset_names) if other == dataset]
        mean = values[indices].mean(0)
        if names is None:
            means[dataset] = mean.item()
        else:
            means[dataset] = dict(zip(names, mean.tolist()))
    return means


def wilson(right, n, z=1.96):
    """The 95% interval of a fraction, right of n (Wilson 1927). For example 8 of 10: (0.49, 0.94).

    It can be trusted for small n and near 0 and 1 as well, where the usual p +- 1.96 * sqrt(p (1 - p) / n)
    cannot: that would say that 10 right answers of 10 leave no doubt.
    """
    p = right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def summary(verdicts):
    """What a report says about n verdicts.

    strict: the accuracy. ci95: its 95% interval. lenient: the fraction that is right in any format, for
    example without the <answer> tags that were asked for. A statistic of your own can be added here.
    """
    right = right_of(verdicts).sum().item()
    return dict(strict=accuracy(verdicts),
                lenient=sum(verdict.lenient for verdict in verdicts) / len(verdicts),
                ci95=wilson(right, len(verdicts)))


def test_report(policy, router, dataset, args, experts, stage="GRPO", step=None):
    """Test the policy before and after, and with each expert hidden. All ranks call this.

    stage  which weights are tested: those after "GRPO", or those after "stage 0"
    step   the number of GRPO steps that led to these weights; None: all of args.steps
    Returns a dict for JSON: the settings, and

    before, after         see `summary`
    by_dataset            {dataset: {"n": problems, "before": accuracy, "after": accuracy}}
    right                 1 or 0 for each problem: was it answered right, after?
    attention_by_dataset  {dataset: {expert: attention}}, for a router with attention
    masked                {hidden expert: {dataset: accuracy}}; {} without attention, or with one expert
    """
    names = [expert.name for expert in experts]
    dataset_names = [problem.dataset for problem in dataset.problems]
    if step is None:
        step = args.steps

    # Before: the policy alone, without LoRA and without a context. After: with both.
    no_context = NoRouter([], [], 0)  # no states, no experts, width 0: it returns no context
    with policy.lora("off"):
        before, _, _ = evaluate(policy, no_context, dataset, args)
    after, _, attention = evaluate(policy, router, dataset, args)

    # Compute both accuracies for each kind of problem.
    accuracy_before = by_dataset(dataset_names, right_of(before))
    accuracy_after = by_dataset(dataset_names, right_of(after))
    accuracies = {}
    for name in accuracy_after:
        accuracies[name] = dict(n=dataset_names.count(name), before=accuracy_before[name],
                                after=accuracy_after[name])

    report = dict(task=args.task, level=args.level, n=len(dataset), seed=args.seed, router=args.router,
                  control=args.control, reading_steps=args.reading_steps, stage=stage, step=step,
                  before=summary(before), after=summary(after), by_dataset=accuracies,
                  right=right_of(after).int().tolist(), masked={})
    if attention is None:
        return report

    # Average the attention over heads and latents.
    report["attention_by_dataset"] = by_dataset(dataset_names, attention.mean((1, 2)), names)

    # If there are several experts, repeat the test without each of them.
    if len(experts) > 1:
        for e, name in enumerate(names):
            router_without_e = WithoutExpert(router, dataset.expert_of_state, e)
            verdicts, _, _ = evaluate(policy, router_without_e, dataset, args)
            report["masked"][name] = by_dataset(dataset_names, right_of(verdicts))
    return report


def swap_test(policy, router, dataset, args):
    """Give each question the states of another question. Whose answer does the policy give?

    `expected` is what the expert with the most attention says to the other question, right or wrong.

    For example, question i is 2 + 3. Its states are replaced by those of j, the next question of its dataset,
    4 + 5. If the policy answers 9, it has read that from the states: the answer counts for `follows`. If it
    answers 5, it does not need the states: that counts for `strict`. Returns a dict:

        strict   the fraction of all answers that are still right for their own question i
        n        the number of questions for which `expected` differs from the gold answer of i; only these
                 can show whom the policy follows
        follows  the fraction of these n that are answered with `expected`, or with what the verifier takes
                 for the same answer

    If the expert says nothing to j, the question does not count in n. If the router has no attention, or the
    experts were not asked for texts, `expected` is the gold answer of j. A question that is alone in its
    dataset is left out.
    """
    partner = next_in_dataset(dataset.problems)
    indices = [i for i, j in enumerate(partner) if i != j]
    verdicts, texts, attention = evaluate(policy, router, dataset, args, indices, H=dataset.H[partner])

    follows = []
    for row, i in enumerate(indices):
        j = partner[i]

        # What should the policy say if it believes the states?
        expected = dataset.problems[j].answer
        if dataset.texts and attention is not None:
            most_attended = int(attention[row].mean((0, 1)).argmax())
            expected = dataset.texts[most_attended][j]

        # Count only where that differs from the right answer. "1,000" and "1000" do not differ.
        if expected and grade(expected, dataset.problems[i], words_may_follow=True) != "right":
            given, _ = extract(texts[row], args.answer_format, truncated=False)
            other_problem = replace(dataset.problems[j], answer=expected)
            follows.append(given.strip() == expected.strip() or grade(given, other_problem, True) == "right")

    return dict(strict=accuracy(verdicts), follows=sum(follows) / max(1, len(follows)), n=len(follows))


def can_swap(dataset):
    """Does the router read states, and are there two questions of one dataset?"""
    n_datasets = len({problem.dataset for problem in dataset.problems})
    return dataset.H.numel() > 0 and len(dataset) > n_datasets


# -- Show a report

FEW = 200  # test problems; with fewer, an interval can be wider than 14 points


def stage_name(report):
    """In words, which weights a report is about."""
    if report["stage"] == "stage 0":
        return "after stage 0, before GRPO"
    return f"after {report['step']} steps of GRPO"


def before_name(report):
    """What the accuracy before is called: with --router text the policy reads words, and is not alone."""
    return "untrained policy" if report["router"] == "text" else "policy alone"


def show_report(report, path):
    """Print a report, and write it to `path` as JSON."""
    # Accuracy, with 95% intervals.
    print(f"\n{report['n']} test problems, greedy answers [95% interval]")
    for when, name in (("before", before_name(report)), ("after", stage_name(report))):
        numbers = report[when]
        low, high = numbers["ci95"]
        line = f"  {name:26} {numbers['strict']:6.1%} [{low:.1%}, {high:.1%}]"
        if numbers["lenient"] > numbers["strict"]:
            line += f"; {numbers['lenient']:.1%} right in any format"
        print(line)
    if report["n"] < FEW:
        print(f"  warning: fewer than {FEW} problems make these intervals wide")
    if "swap" in report:
        swap = report["swap"]
        print(f"  {'states of another question':26} {swap['strict']:6.1%}; "
              f"{swap['follows']:.1%} of {swap['n']} answers are the expert's to the other question")

    # The same for each dataset, and below it the attention to each expert.
    attention = report.get("attention_by_dataset", {})
    masked = report["masked"]
    title = f"by dataset: {before_name(report)} -> now"
    if attention:
        title += "; attention to each expert"
    if masked:
        title += " (change in points without it)"
    print(title)
    for dataset, numbers in report["by_dataset"].items():
        print(f"  {dataset:26} {numbers['before']:6.1%} -> {numbers['after']:6.1%} of {numbers['n']}")
        pairs = []
        for name, share in attention.get(dataset, {}).items():
            pair = f"{name} {share:.2f}"
            if name in masked:
                change = 100 * (masked[name][dataset] - numbers["after"])  # negative: it is worse without it
                pair += f" ({change:+.0f})"
            pairs.append(unbreakable(pair))
        if pairs:
            print(wrap("      " + ", ".join(pairs), indent=6))

    write_report(report, path)


def write_report(report, path):
    """Write a report as JSON, with null in place of NaN, which JSON does not have. Only rank 0 writes it."""
    if RANK == 0:
        text = json.dumps(without_nan(report), indent=1, allow_nan=False)
        write_atomic(Path(path), f"{text}\n".encode())


NO_BREAK_SPACE = "\u00a0"  # textwrap breaks no line here


def unbreakable(text):
    """The same text, which `wrap` will keep on one line."""
    return text.replace(" ", NO_BREAK_SPACE)


def wrap(line, indent):
    """Break a line into lines of 100 characters; all but the first are indented."""
    lines = textwrap.fill(line, 100, subsequent_indent=" " * indent, break_long_words=False,
                          break_on_hyphens=False)
    return lines.replace(NO_BREAK_SPACE, " ")


# -- Ask: questions of your own

def ask(policy, router, experts, args, question):
    """Answer one question; or, without one, those that are typed, or that come from a pipe, one a line.

    In a question \\n stands for a line break, as some datasets have them. From a pipe, for example
    `python eval.py runs/NAME --ask < questions.txt`, each line is answered by one line.
    """
    if question:
        show_examples(args)
        show_answer(policy, router, experts, args, question)
    elif sys.stdin.isatty():
        show_examples(args)
        answer_typed_questions(policy, router, experts, args)
    else:
        answer_piped_questions(policy, router, experts, args)


def show_examples(args):
    """Say what the policy was trained on, and show three test questions that can be asked."""
    if args.control not in ("none", "untrained"):
        print(f"note: this run has --control {args.control}, but one question can only have its own states")
    print(wrap(f"The policy was trained on {args.task}. Ask in the same wording: about anything else its "
               "answers mean little.", indent=0))
    try:
        problems = load_problems(args, "test", 3)
    except (OSError, ValueError):  # for example, the file of --data is not there any more
        return
    print("Three test questions, which it has not seen in training:")
    for problem in problems:
        print(f"  {escape(problem.question)}")
    print()


def answer_typed_questions(policy, router, experts, args):
    with contextlib.suppress(ImportError):  # some systems have none
        import readline  # noqa: F401  makes input() understand the arrow keys
    while True:
        try:
            question = input("question (Ctrl-D ends): ").strip()
        except EOFError:
            print()
            return
        try:
            if question:
                show_answer(policy, router, experts, args, question)
        except ValueError as error:  # it is too long; the next one may be shorter
            print(error)


def answer_piped_questions(policy, router, experts, args):
    n_questions = 0
    for line in sys.stdin:
        question = line.strip()
        if not question:
            continue
        n_questions += 1
        try:
            _, text, _ = answer(policy, router, experts, args, question)
        except ValueError as error:
            text = str(error)
        print(escape(text), flush=True)
    if not n_questions:
        raise ValueError("--ask has no question: write one after it, call it from a terminal, or pipe "
                         "questions to it, one a line")


def answer(policy, router, experts, args, question):
    """Answer one question. Returns what the experts say (a list, or [] where they are not asked), the
    policy's answer, and the attention to each expert (a list, or None)."""
    problem = Problem(question=unescape(question), answer="", split="test")
    dataset = Dataset([problem], policy, experts, args, progress=False)
    _, texts, attention = evaluate(policy, router, dataset, args)

    expert_answers = [column[0] for column in dataset.texts]
    text = texts[0].strip() or "(an empty answer)"
    if attention is None:
        return expert_answers, text, None
    return expert_answers, text, attention.mean((0, 1, 2)).tolist()


def show_answer(policy, router, experts, args, question):
    """Print the answer; below it, for each expert, a bar for its attention and what it would say itself."""
    said, text, attention = answer(policy, router, experts, args, question)
    print(text)
    for e, expert in enumerate(experts):
        line = f"  {expert.name:28}"
        if attention is not None:
            line += f" {'█' * round(40 * attention[e]):40} {attention[e]:.2f}"
        if said and said[e]:
            line += f"  says {said[e]!r}"
        print(line)


def escape(text):
    """Put a text on one line: \\n stands for each line break."""
    return text.replace("\n", "\\n")


def unescape(text):
    text = text.encode("utf-8", "replace").decode()  # bytes of another encoding become question marks
    return text.replace("\\n", "\n")


# -- The picture

def picture(run, report, path):
    """Draw a report in 2 x 2 panels, and return the path.

    top      the reward during GRPO; for each dataset the attention to the expert that gets most of it
    bottom   attention on the test problems; what is lost when an expert is hidden
    At the top of a picture of stage 0 there is instead the accuracy by dataset: GRPO has not begun there, and
    an attention that is nearly even favours nobody.
    """
    from matplotlib.figure import Figure  # only a picture needs it

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(f"{Path(run).resolve().name}: {stage_name(report)}, {report['n']} test problems")
    attention = report.get("attention_by_dataset", {})
    is_stage0 = report["stage"] == "stage 0"
    top = ["accuracy", "accuracy"] if is_stage0 else ["learning", "over time"]
    panels = figure.subplot_mosaic([top, ["attention", "masked"]])

    # The top row: what has been learned.
    if is_stage0:
        draw_accuracy(panels["accuracy"], report)
    else:
        records = [record for record in read_records(Path(run) / "metrics.jsonl")
                   if record["step"] <= report["step"]]
        draw_learning(panels["learning"], records, report)
        if attention:
            draw_attention_over_time(panels["over time"], records, attention)

    # The bottom row: who is attended to, and who matters.
    if attention:
        draw_matrix(panels["attention"], attention, 1, "{:.2f}", "Attention on test problems")
    if report["masked"]:
        title = "Points lost when an expert is hidden"
        draw_matrix(panels["masked"], points_lost(report), 100, "{:.0f}", title)

    # Hide the panels of a router without attention.
    for panel in figure.axes:
        panel.set_visible(panel.has_data())
    figure.savefig(path, dpi=110)
    return path


def draw_learning(panel, records, report):
    """The reward at each step of GRPO, and the accuracy on validation problems."""
    # Draw the reward of every step.
    steps = [record["step"] for record in records]
    rewards = [or_nan(record.get("reward")) for record in records]
    panel.plot(steps, rewards, label="reward in training, sampled", color="0.6", linewidth=1)

    # Draw the accuracy of the steps that were validated.
    validated = [record for record in records if "val" in record]
    validated_steps = [record["step"] for record in validated]
    accuracies = [or_nan(record["val"]) for record in validated]
    panel.plot(validated_steps, accuracies, "o-", label="validation, greedy", color="#0072B2")

    # Draw the accuracy before training as a line.
    panel.axhline(report["before"]["strict"], ls="--", color="0.3", label=f"{before_name(report)}, greedy")

    # Show all rewards: a reward of one's own may be below 0 or above 1.
    lowest = min([0, *rewards])
    highest = max([1.02, *rewards])
    panel.set(xlabel="step of GRPO", ylabel="fraction right", title="What is learned")
    panel.set_ylim(lowest, highest)
    panel.legend(fontsize=8)


def draw_attention_over_time(panel, records, attention):
    """For each dataset one curve: the attention to the expert that gets most of it on the test problems.

    attention: {dataset: {expert: attention}}, on the test problems.
    """
    steps = [record["step"] for record in records]
    n_experts = len(next(iter(attention.values())))
    for dataset, shares in attention.items():
        most = max(shares, key=lambda name: or_nan(shares[name]))
        curve = []
        for record in records:
            at_this_step = record.get("attention_by_dataset", {}).get(dataset, {})
            curve.append(or_nan(at_this_step.get(most)))
        panel.plot(steps, curve, label=f"{dataset}: {most}")
    panel.axhline(1 / n_experts, ls=":", color="0.3", label="even")
    panel.set(xlabel="step of GRPO", ylabel="attention", ylim=(0, 1.02),
              title="The expert attended to most at the end")
    panel.legend(fontsize=8)


def draw_accuracy(panel, report):
    """Two bars for each dataset: the policy alone, and the policy that is tested."""
    datasets = list(report["by_dataset"])
    for shift, when, name, color in ((-0.2, "before", before_name(report), "0.6"),
                                     (0.2, "after", "after stage 0", "#0072B2")):
        places = [i + shift for i in range(len(datasets))]
        heights = [or_nan(report["by_dataset"][dataset][when]) for dataset in datasets]
        panel.bar(places, heights, width=0.4, label=name, color=color)
    panel.set_xticks(range(len(datasets)), datasets)
    panel.set(ylabel="fraction right, greedy", ylim=(0, 1.02), title="What stage 0 gives")
    panel.legend(fontsize=8)


def points_lost(report):
    """{dataset: {expert: percentage points of accuracy that are lost when it is hidden}}

    A positive number means that the expert is needed. `show_report` prints the same as a change, so its sign
    is the opposite: 88 points lost are a change of -88.
    """
    points = {}
    for dataset, numbers in report["by_dataset"].items():
        points[dataset] = {}
        for name, masked in report["masked"].items():
            points[dataset][name] = 100 * (or_nan(numbers["after"]) - or_nan(masked[dataset]))
    return points


def draw_matrix(panel, rows, top, style, title):
    """A matrix with its values written in it.

    rows: {dataset: {expert: value}}. top: the value that is darkest. style: how a value is written.
    """
    # Draw the colours.
    names = list(next(iter(rows.values())))
    values = []
    for row in rows.values():
        values.append([or_nan(value) for value in row.values()])
    panel.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")

    # Name rows and columns.
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set_title(title)

    # Write the values, white where the ground is dark.
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            color = "white" if value > 0.6 * top else "black"
            panel.text(j, i, style.format(value), ha="center", va="center", color=color)


def or_nan(value):
    """A number of a record or report; NaN where JSON has null, so that a picture has a gap there."""
    return math.nan if value is None else value


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def run(argv=None):
    """The command line. Returns the report, or None after --ask."""
    options = parse(argv)

    # Open the run. An extension may define its router, so it is imported first.
    saved = read_config(options.run)["args"]
    extension = options.extension or saved.get("extension")
    if extension:
        import_extension(extension)
    args, policy, experts, router = open_run(options.run, options.device, options.stage0, options.policy,
                                             options.experts, options.data)
    if options.ask is not None:
        ask(policy, router, experts, args, options.ask)
        return None

    # Measure.
    problems = test_problems(args, options.n)
    dataset = Dataset(problems, policy, experts, args)
    if options.stage0:
        stage = "stage 0"
        step = 0
    else:
        stage = "GRPO"
        step = newest_step(options.run)
    report = test_report(policy, router, dataset, args, experts, stage, step)

    # With --control shuffled or noise the states say nothing about their question: there is nothing to swap.
    if can_swap(dataset) and args.control not in DRAWN_FOR_ALL:
        report["swap"] = swap_test(policy, router, dataset, args)

    # Show it.
    path = report_path(options.run, report)
    show_report(report, path)
    print(f"report: {path}")
    print(f"picture: {picture(options.run, report, path.with_suffix('.png'))}")
    if options.json:
        print(json.dumps(without_nan(report), allow_nan=False))
    return report


def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a run, the --out of train.py.")
    parser.add_argument("--n", type=int,
                        help="Number of test problems. Default: as in train.py, and for GSM8K all 1,319.")
    parser.add_argument("--stage0", action="store_true", help="Test the weights after stage 0, before GRPO.")
    parser.add_argument("--ask", nargs="?", const="", metavar="QUESTION",
                        help="Answer a question of yours. Without QUESTION: many, typed or from a pipe.")
    parser.add_argument("--json", action="store_true", help="Print the report as JSON in the last line.")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1 or mps. Default: auto, the best there is.")
    parser.add_argument("--policy", metavar="FOLDER", help="Where the policy lies now, if it has moved.")
    parser.add_argument("--experts", nargs="+", metavar="FOLDER",
                        help="Where the experts lie now, all of them in the same order, if they have moved.")
    parser.add_argument("--data", metavar="PATH",
                        help="Where the problems of your own lie now, if they have moved.")
    parser.add_argument("--extension", metavar="FILE",
                        help="A Python file that is imported first. Default: the one given to train.py.")
    options = parser.parse_args(argv)
    if options.n is not None and options.n < 1:
        raise ValueError("--n must be at least 1")
    if options.ask is not None and (options.n or options.json):
        raise ValueError("--ask answers questions and measures nothing: leave out --n and --json")
    return options


def test_problems(args, n=None):
    """n test problems of a run; by default as many as it was tested with, or all of GSM8K."""
    takes_all = args.task == "gsm8k" and n is None
    wanted = n or args.test
    if takes_all:
        wanted = MAX_PROBLEMS - args.test_skip
    problems = load_problems(args, "test", wanted)
    if len(problems) < wanted and not takes_all:
        print(f"note: there are only {len(problems)} test problems, not {wanted}")
    return problems


def newest_step(run):
    """The step of the newest checkpoint that can be read, the one that `open_run` loads.

    Returns None if no checkpoint can be read. A checkpoint holds tensors and nothing else, so what is not a
    tensor is stored as JSON, with each byte of its text as a number: {"step": 80} is [123, 34, 115, ...].
    """
    for path in checkpoints(run):
        with contextlib.suppress(ValueError):  # a damaged file: try the one before it
            progress = read_tensors(path)["progress"]
            return json.loads(bytes(progress.tolist()))["step"]
    return None


def report_path(run, report):
    """runs/NAME/eval-step80-n256.json, or runs/NAME/eval-stage0-n256.json"""
    stage = f"step{report['step']}"
    if report["stage"] == "stage 0":
        stage = "stage0"
    return run / f"eval-{stage}-n{report['n']}.json"


if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]  # `import eval` in an extension gets this program
    sys.exit(run_cli("eval.py", run))
