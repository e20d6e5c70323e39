"""
Which claims hold: verdicts and their intervals, from the rows and curves of results/ alone.

    python -m lab.claims                     the tables and verdicts of results/study.jsonl and curves.jsonl
    python -m lab.claims --history 3d87713   those of results/history: the program as it was at that commit

A row is a line of study.jsonl, put together with the line of curves.jsonl that has the same id (study.py).
What would refute a claim stands in `judge`, in MARGIN and in CLAIMS. Differences are paired: both sides have
the same problems and seeds, so that what makes a problem easy or hard cancels out. Each interval is a 95%
interval by itself: of twenty differences that are nothing, about one will look like something.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

from eval import wilson
from rlvr import read_records, run_cli

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "results"

SPECIALIST = {"chain_sum": "arithmetic", "family_relationships": "logic", "count_primes": "algorithmic"}
EMBEDDED = ("mix", "sums", "sums hard", "family", "primes")  # tasks of the tiny models
MARGIN = {"points": 5.0, "nats": 0.05, "rho": 0.1}  # a smaller difference counts as none


# -- Statistics

def interval(D, draws=10_000):
    """95% interval of the mean of D (n,) or (seeds, n): paired differences, one for each item.

    Items are drawn again with replacement (bootstrap, with a fixed generator). The means of k seeds enter by
    Student's t with k - 1 degrees of freedom, because a bootstrap over few seeds is far too narrow: of two
    seeds it covers 61%, of five 88%. With one seed the interval is about that run alone. What items and seeds
    share is counted twice, so the interval is a little wide.
    """
    D = np.atleast_2d(np.asarray(D, float))
    generator = np.random.default_rng(0)
    n_seeds, n = D.shape

    # Items with equal means are drawn together, to save time.
    values, count = np.unique(D.mean(0), return_counts=True)
    means = generator.multinomial(n, count / n, draws) @ values / n

    if n_seeds > 1:
        standard_error = D.mean(1).std(ddof=1) / math.sqrt(n_seeds)
        means = means + generator.standard_t(n_seeds - 1, draws) * standard_error
    return np.quantile(means, (0.025, 0.975)).tolist()


def ranks(values):
    """The rank of each value; equal values share the mean of their ranks: [5, 7, 7] -> [1, 2.5, 2.5]."""
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def spearman(x, y):
    """The correlation of ranks; None where one of the series never changes."""
    a, b = ranks(x), ranks(y)
    if min(a.std(), b.std()) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def without_trend(steps, x, degree=1):
    """x less its best polynomial over the steps. Two series that both drift correlate for no reason."""
    steps = np.asarray(steps, float) - np.mean(steps)
    rest = np.asarray(x, float) - np.polyval(np.polyfit(steps, x, degree), steps)
    rounding = 1e-9 * (1 + np.abs(x).max())
    return np.where(np.abs(rest) < rounding, 0.0, rest)


def spearman_without_trend(steps, x, y, degree):
    """As `spearman`, of x and y without their trends; None for a series too short to have another part."""
    if len(x) <= degree + 1:
        return None
    return spearman(without_trend(steps, x, degree), without_trend(steps, y, degree))


# -- Rows

def read_rows(path=RESULTS / "study.jsonl"):
    """The rows of study.jsonl; of those with the same id the last one."""
    return list({row["id"]: row for row in read_records(path)}.values())


def finished(results=RESULTS, history=""):
    """Finished runs, each row together with its curve.

    history: the commit of an earlier program, whose rows lie in results/history.
    """
    rows, curves = results / "study.jsonl", results / "curves.jsonl"
    if history:
        rows = results / "history" / f"study-{history}.jsonl"
        curves = results / "history" / f"curves-{history}.jsonl"
        if not rows.exists():
            raise ValueError(f"{rows} is not there: choose a commit that {rows.parent} names")

    curve_of = {curve["id"]: curve for curve in read_records(curves)}
    return [curve_of[row["id"]] | row for row in read_rows(rows) if row["after"] is not None]


def runs_of(rows, task, way):
    return [row for row in rows if (row["task"], row["way"]) == (task, way)]


def right(row):
    """100 for a right and 0 for a wrong answer, for each item, so that a mean is in points."""
    return 100.0 * np.array(row["right"])


def paired(rows, one, other, measure=right):
    """measure(row) of the runs of two (task, way), on the seeds that both have: two lists."""
    a = {row["seed"]: row for row in runs_of(rows, *one)}
    b = {row["seed"]: row for row in runs_of(rows, *other)}
    seeds = sorted(a.keys() & b.keys())
    return [measure(a[seed]) for seed in seeds], [measure(b[seed]) for seed in seeds]


def names_of(row):
    """The names of a run's experts."""
    return [expert["name"] for expert in row["experts"]]


# -- Verdicts

def judge(low, high, margin, kind="more"):
    """The verdict on a difference, by its interval. What is claimed is that it is

    more     above 0, however little: refuted by an interval below 0 or within the margin
    same     within the margin: refuted by an interval on one side of 0 that is not within it
    no less  above -margin: refuted by an interval below 0 that is not above it
    """
    within = max(-low, high) <= margin
    if kind == "more":
        holds, fails = low > 0, high < 0 or within
    elif kind == "same":
        holds, fails = within, low > 0 or high < 0
    else:
        holds, fails = low >= -margin, high < 0

    if holds:
        return "confirmed"
    return "refuted" if fails else "open"


def compare(label, a, b=0.0, unit="points", kind="more"):
    """(verdict, sentence) on a - b, each (seeds, items) or (seeds,). It takes two runs to say anything."""
    if len(a) < 2:
        return "open", f"{label}: not measured on two runs"
    D = (np.asarray(a, float) - np.asarray(b, float)).reshape(len(a), -1)
    seeds_alone = ", seeds alone" if D.shape[1] == 1 else ""
    return judge(*interval(D), MARGIN[unit], kind), f"{label}: {shown(D, unit)}, {len(D)} runs{seeds_alone}"


def shown(D, unit="points"):
    """"+3.1 [+1.0, +5.2] points" """
    digits = "+.1f" if unit == "points" else "+.2f"
    mean, (low, high) = np.mean(D), interval(D)
    return f"{format(mean, digits)} [{format(low, digits)}, {format(high, digits)}] {unit}"


def difference(rows, way, other, *tasks, kind="more"):
    """The parts of a claim on one way against another, a part for each task."""
    parts = []
    for task in tasks:
        a, b = paired(rows, (task, way), (task, other))
        parts.append(compare(f"{task}, {way} - {other}", a, b, kind=kind))
    return parts


def verdict(parts):
    """(verdict, sentence) of a claim. All of its parts must hold, and one that is refuted refutes it."""
    verdicts = [word for word, _ in parts]
    sentences = "; ".join(sentence for _, sentence in parts)
    for word in ("refuted", "open"):
        if word in verdicts:
            return word, sentences
    return "confirmed", sentences


# -- The claims: what each of them measures. A function takes the rows and returns the parts of its claim.

def soft_beats_single_on_sums(rows):
    return difference(rows, "soft", "single", "sums")


def beats_a_constant_prefix(rows):
    return difference(rows, "soft", "prefix", "sums", "mix")


def beats_states_that_say_nothing(rows):
    return [*difference(rows, "soft", "soft shuffled", "sums", "mix"),
            *difference(rows, "soft", "soft noise", "mix"),
            *difference(rows, "soft", "soft untrained", "mix")]


def first_token_does_as_well(rows):
    return difference(rows, "soft first", "soft", "mix", kind="same")


def single_wins_where_saturated(rows):
    """Single against soft on every task where single is right in 90% or more."""
    means = {}
    for task in sorted({row["task"] for row in rows}):
        after = [row["after"] for row in runs_of(rows, task, "single")]
        means[task] = np.mean(after or [0.0])
    tasks = [task for task, mean in means.items() if mean >= 0.9]
    if tasks:
        return difference(rows, "single", "soft", *tasks)
    return [("open", f"single saturates nowhere, at most {max(means.values(), default=0):.0%}")]


def rho(row, degree=0):
    """Spearman's rho of attention's entropy and reward over a run's curve, both without their trend."""
    steps, entropy, reward = [], [], []
    for point in row["curve"]:
        steps.append(point["step"])
        entropy.append(point["attention_entropy"])
        reward.append(point["reward"])
    return spearman_without_trend(steps, entropy, reward, degree) or 0.0


def entropy_falls(rows):
    """That rho is below 0 is claimed, so its sign is turned."""
    runs = [row for row in rows
            if row["way"] == "soft" and row["task"] in EMBEDDED and len(row["curve"]) > 2]
    plain, straight, cubic = ([rho(row, degree) for row in runs] for degree in (0, 1, 3))
    label = (f"embedded pool, Spearman's rho over a run {np.mean(plain or [0]):+.2f}, without its cubic "
             f"trend {np.mean(cubic or [0]):+.2f}; without its straight trend and the sign turned")
    return [compare(label, [-x for x in straight], unit="rho")]


def entropy_at_the_end(row):
    """The entropy of attention, a mean over the last tenth of training."""
    curve = row["curve"]
    last_tenth = [point for point in curve if point["step"] > 0.9 * curve[-1]["step"]]
    return np.mean([point["attention_entropy"] for point in last_tenth])


def concentrates_on_harder_tasks(rows):
    easy, hard = paired(rows, ("sums", "soft"), ("sums hard", "soft"), entropy_at_the_end)
    return [compare("entropy at the end, sums - sums hard", easy, hard, unit="nats")]


def above_even(label, values, n_experts):
    """Percents (seeds, items) against an even share of the experts."""
    return compare(f"{label} - {100 / n_experts:.0f}", values, 100 / n_experts)


def probed(rows, task, way):
    """The runs of a way that lab/probe.py has looked into, problem by problem."""
    return [row for row in runs_of(rows, task, way) if row.get("attended")]


def wide_is_preferred(rows):
    """The attention to the wide expert that knows nothing."""
    shares = []
    for row in probed(rows, "sums", "soft wide"):
        wide = names_of(row).index("wide")
        shares.append(100 * np.array(row["attended"])[:, wide])
    return [above_even("its share", shares, 4)]


def most_attended(row):
    """(n,): for each item the index of the expert that is attended to most."""
    return np.array(row["attended"]).argmax(-1)


def specialist_places(row):
    """(n,): for each item the index of the expert that was made for its dataset."""
    names = names_of(row)
    return np.array([names.index(SPECIALIST[dataset]) for dataset in row["datasets"]])


def specialist_is_attended(rows):
    shares = []
    for row in probed(rows, "mix", "soft"):
        shares.append(100.0 * (most_attended(row) == specialist_places(row)))
    return [above_even("mix, it is attended to most", shares, 3)]


def test_time(rows, task, replaced, kind="more"):
    """A run as trained, against the same run with something replaced at test time (lab.probe --ablate)."""
    label = {"static": "static attention", "shuffle": "shuffled states at test"}[replaced]
    measured = [row["ablate"] for row in runs_of(rows, task, "soft") if "ablate" in row]
    trained = [right(ablate) for ablate in measured]
    other = [right(ablate["kinds"][replaced]) for ablate in measured]
    return [compare(f"{task}, as trained - {label}", trained, other, kind=kind)]


def static_attention_suffices_on_sums(rows):
    return [*test_time(rows, "sums", "static", "same"), *test_time(rows, "mix", "static")]


def specialist_share(row):
    """The attention to the specialist in percent, a mean over the datasets."""
    shares = row["attention_by_dataset"]
    return 100 * np.mean([shares[dataset][SPECIALIST[dataset]] for dataset in shares])


def grpo_tells_whom_to_attend_to(rows):
    before, after = paired(rows, ("mix", "stage 0"), ("mix", "soft"), specialist_share)
    return [compare("mix, the specialist's share after stage 0 - 33", before, 100 / 3, kind="same"),
            compare("the same after GRPO - after stage 0", after, before),
            *difference(rows, "soft", "stage 0", "mix")]


def right_without_its_states(row):
    """As `right`; of a run with an ablation, with the states of other problems at test time."""
    if row["way"] == "single":
        return right(row)
    return right(row["ablate"]["kinds"]["shuffle"])


def gain_is_gone(rows, task):
    """Soft with the states of other problems at test time must be no better than single."""
    measured = [row for row in rows if row["way"] == "single" or "ablate" in row]
    single, soft = paired(measured, (task, "single"), (task, "soft"), right_without_its_states)
    return [compare(f"{task}, single - soft with shuffled states at test", single, soft, kind="no less")]


def real_models_read(rows):
    task = "real sums"
    parts = []
    for other in ("single", "prefix", "soft shuffled"):
        parts += difference(rows, "soft", other, task)
    return [*parts, *test_time(rows, task, "shuffle"), *gain_is_gone(rows, task)]


def knowing_attended(rows, task):
    """Of the items that exactly one expert answers right by itself: is it the one attended to most?"""
    runs = [row for row in runs_of(rows, task, "soft") if row.get("knows")]
    n_experts = len(runs[0]["experts"]) if runs else 2

    # The same items in every run: those that one expert alone knows in all of them.
    one_knows = np.all([np.sum(row["knows"], 1) == 1 for row in runs], 0)
    shares = []
    for row in runs:
        agrees = most_attended(row) == np.argmax(row["knows"], 1)
        shares.append(100.0 * agrees[one_knows])
    return above_even(f"{task}, the only expert that knows is attended to most", shares, n_experts)


def attention_agrees_with_who_knows(rows):
    return [knowing_attended(rows, "mix"), knowing_attended(rows, "real sums")]


def believed(rows, task, way):
    """On sums: the share of the first expert against that of its copy, the last one, which is wrong there."""
    first, copy = [], []
    for row in probed(rows, task, way):
        is_sum = np.array(row["datasets"]) == "chain_sum"
        shares = 100 * np.array(row["attended"])[is_sum]
        first.append(shares[:, 0])
        copy.append(shares[:, -1])
    return compare(f"{task}, share of the right one - of the wrong one", first, copy)


def right_copy_is_attended(rows):
    return [believed(rows, "sums", "soft wrong"), believed(rows, "real sums", "soft wrong")]


def right_copy_is_attended_on_one_dataset(rows):
    return [believed(rows, "real mix", "soft"), *difference(rows, "soft", "stage 0", "real mix")]


# Of claim (16): the share of attention that counts as found, and the number of seeds that it takes.
MOST, SEEDS = 0.5, 10


def finds_all_specialists(row):
    """Has the specialist more than half of the attention on each dataset?"""
    shares = row["attention_by_dataset"]
    return all(shares[dataset][SPECIALIST[dataset]] > MOST for dataset in shares)


def comparing_finds_every_specialist(rows):
    """One run that misses one refutes the claim. It takes ten runs to confirm it."""
    runs = [row for row in runs_of(rows, "mix", "soft") if row.get("attention_by_dataset")]
    n_found = sum(finds_all_specialists(row) for row in runs)
    sentence = (f"mix: in {n_found} of {len(runs)} runs each specialist has more than half of the attention "
                "on its dataset")
    for way in ("soft without comparing", "soft without comparing at high rates"):
        others = runs_of(rows, "mix", way)
        if others:
            sentence += f"; {way}: in {sum(map(finds_all_specialists, others))} of {len(others)}"

    if n_found < len(runs):
        return [("refuted", sentence)]
    return [("confirmed" if len(runs) >= SEEDS else "open", sentence)]


def soft_passes_everybody(rows):
    """On the same problems soft is right more often than each expert alone, and than the policy alone."""
    task = "real family"
    runs = [row for row in runs_of(rows, task, "soft") if row.get("knows")]
    soft = [right(row) for row in runs]
    before = [100 * row["before"] for row in runs]
    after = [100 * row["after"] for row in runs]
    parts = [compare(f"{task}, soft - the policy alone", after, before)]
    if runs:
        for e, name in enumerate(names_of(runs[0])):
            alone = [100.0 * np.array(row["knows"])[:, e] for row in runs]
            parts.append(compare(f"{task}, soft - {name} alone", soft, alone))
    return parts


def soft_beats_single_on_gsm8k(rows):
    return difference(rows, "soft", "single", "gsm8k")


CLAIMS = (  # in this order, by number; each text was registered before the runs by which it is judged
    ("Soft beats single on sums", soft_beats_single_on_sums),
    ("It beats a learned constant prefix", beats_a_constant_prefix),
    ("It beats shuffled states, noise and untrained experts", beats_states_that_say_nothing),
    ("The first token's state does as well as the last's", first_token_does_as_well),
    ("Single wins where the task saturates (single at 90% or more)", single_wins_where_saturated),
    ("Attention's entropy falls as reward rises, a straight trend removed", entropy_falls),
    ("Attention concentrates more on harder tasks", concentrates_on_harder_tasks),
    ("Larger experts are preferred whatever they know (a wide one with random weights)", wide_is_preferred),
    ("On the mix the expert made for a dataset is attended to most", specialist_is_attended),
    ("Static attention suffices on sums and not on the mix", static_attention_suffices_on_sums),
    ("Stage 0 alone does not tell whom to attend to, GRPO does", grpo_tells_whom_to_attend_to),
    ("Real models read: soft beats single, prefix and shuffled; shuffling states at test removes the gain",
     real_models_read),
    ("Attention agrees with who knows", attention_agrees_with_who_knows),
    ("Of two experts, of which one answers another problem, the right one is attended to more",
     right_copy_is_attended),
    ("Real models, two experts, one of them wrong on one of two datasets: there the right one is attended to "
     "more, and GRPO gains on stage 0", right_copy_is_attended_on_one_dataset),
    ("Comparing finds every specialist of the mix, in all of ten seeds", comparing_finds_every_specialist),
    ("Real models that know different things: soft passes every single expert and the policy on their mix",
     soft_passes_everybody),
    ("GSM8K: soft beats single", soft_beats_single_on_gsm8k),
)


# -- The report

def report(rows):
    """Markdown: the tables, and the verdicts."""
    if not rows:
        return "No runs yet."
    lines = [*accuracy_table(rows), "",
             "Strict greedy accuracy in percent on the same held-out problems, mean ± population standard",
             "deviation over seeds (of one seed: Wilson's interval). *Before*: without training; with text",
             "the experts' answers already stand in the prompt. *Minus single* takes the seeds that both",
             "ways have. Differences are paired by seed and problem; 95% intervals: problems by bootstrap,",
             "seeds by Student's t. *Trained*: parameters of LoRA and router. *Seconds*: of all steps of",
             "GRPO, without stage 0, the experts' reading, and tests.", ""]

    together = together_table(rows)
    if together:
        lines += [*together, "",
                  "*Best expert*: the one that is right most often by itself; *any expert*: at least one is",
                  "right; *closed*: (after - best expert) / (any expert - best expert), where this divisor",
                  f"is at least {MARGIN['points']:.0f} points.", ""]
    experts = experts_table(rows)
    if experts:
        lines += [*experts, "",
                  "Percent. *Attention*: mean over the seeds, in parentheses the least and the greatest;",
                  "*hidden*: points lost when the expert is hidden. If a model is named twice, the name",
                  "of the copy ends in its place in --experts, counted from 0.", ""]
    if any(row["task"] == "rates" for row in rows):
        lines += [*rates_table(rows), "",
                  "Accuracy on 240 validation problems of the mix, seed 100, with the learning rates of LoRA",
                  "and router multiplied by 0.5, 1 and 2.", ""]

    judged = []
    for number, (claim, parts_of) in enumerate(CLAIMS, start=1):
        word, measured = verdict(parts_of(rows))
        judged.append([f"({number}) {claim}", f"**{word}**", measured])
    lines += markdown(["claim", "verdict", "measured"], judged)
    lines += ["", "*Seeds alone*: a run gives one number here, and the interval leaves out the choice of problems."]
    return "\n".join(lines)


BEGIN, END = "<!-- written by a program: begin -->\n", "\n<!-- written by a program: end -->"


def with_report(text, report):
    """The text of a page, STUDY.md or SPEED.md, with a new report between its two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page lacks {BEGIN.strip()} or {END.strip()}: put them back")
    return text[:text.index(BEGIN)] + BEGIN + report + text[text.index(END):]


def markdown(head, rows):
    """The lines of a table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def accuracy_table(rows):
    """A line for each task and way, seeds put together."""
    lines = []
    for task, way in sorted({(row["task"], row["way"]) for row in rows if row["task"] != "rates"}):
        runs = runs_of(rows, task, way)
        n, n_trained = runs[0]["n"], runs[0]["trainable"]
        before = [row["before"] for row in runs]
        after = [row["after"] for row in runs]

        gain = ""
        a, b = paired(rows, (task, way), (task, "single"))
        if way != "single" and len(a) > 1 and len(a[0]) == len(b[0]):
            gain = shown(np.subtract(a, b))

        seeds = ", ".join(str(row["seed"]) for row in sorted(runs, key=seed_of))
        commits = ", ".join(sorted({str(row["commit"]) for row in runs}))
        seconds = np.mean([row["seconds"] for row in runs])
        lines.append([task, way, seeds, n, mean_and_std(before), mean_and_std(after, n), gain,
                      f"{n_trained:,}", f"{seconds:.0f}", commits])
    head = ["task", "way", "seeds", "n", "before", "after", "minus single", "trained", "seconds", "commit"]
    return markdown(head, lines)


def seed_of(row):
    return row["seed"]


def with_knowledge(rows):
    """{(task, way): runs} of those of which it is known what each expert is right in by itself."""
    found = {}
    for row in rows:
        if row.get("knows") and row.get("masked"):
            found.setdefault((row["task"], row["way"]), []).append(row)
    return dict(sorted(found.items()))


def together_table(rows):
    """A line for each task and way: the policy, the best expert, any expert, and soft. Else []."""
    lines = []
    for (task, way), runs in with_knowledge(rows).items():
        knows = 100 * np.mean([row["knows"] for row in runs], axis=0)  # (n, experts)
        best = knows.mean(0).max()
        any_of_them = 100 * np.mean([np.max(row["knows"], 1) for row in runs])
        after = 100 * np.mean([row["after"] for row in runs])
        closed = ""
        if any_of_them - best >= MARGIN["points"]:
            closed = f"{(after - best) / (any_of_them - best):.0%}"
        before = 100 * np.mean([row["before"] for row in runs])
        percents = [f"{value:.1f}" for value in (before, best, any_of_them, after)]
        lines.append([task, way, *percents, closed])
    head = ["task", "way", "policy alone", "best expert", "any expert", "after", "closed"]
    return markdown(head, lines) if lines else []


def experts_table(rows):
    """A line for each task, way, dataset and expert: does it know, is it attended to, is it missed?"""
    lines = []
    for (task, way), runs in with_knowledge(rows).items():
        for dataset, numbers in runs[0]["by_dataset"].items():
            for e, name in enumerate(runs[0]["attention_by_dataset"][dataset]):
                alone, shares, lost = [], [], []
                for row in runs:
                    of_dataset = np.array(row["datasets"]) == dataset
                    alone.append(np.array(row["knows"])[of_dataset, e].mean())
                    shares.append(row["attention_by_dataset"][dataset][name])
                    lost.append(row["by_dataset"][dataset]["after"] - row["masked"][name][dataset])
                attention = (f"{100 * np.mean(shares):.0f} ({100 * min(shares):.0f} to "
                             f"{100 * max(shares):.0f})")
                lines.append([task, way, dataset, numbers["n"], name, f"{100 * np.mean(alone):.0f}",
                              attention, f"{100 * np.mean(lost):z.0f}"])
    head = ["task", "way", "dataset", "n", "expert", "right alone", "attention", "hidden"]
    return markdown(head, lines) if lines else []


def rates_table(rows):
    """Validation accuracy on the mix, by the factor on the rates of LoRA and router."""
    found = {row["way"]: f"{100 * row['val']:.1f}" for row in rows if row["task"] == "rates"}
    ways = dict.fromkeys(way.split()[0] for way in found)
    factors = sorted({way.split()[-1] for way in found}, key=float)
    lines = []
    for way in ways:
        cells = [found.get(f"{way} x {factor}", "") for factor in factors]
        lines.append([way, *cells])
    return markdown(["validation", *(f"rates x {factor}" for factor in factors)], lines)


def mean_and_std(values, n=None):
    """Percent: mean ± standard deviation over seeds; of one seed and n problems, Wilson's interval."""
    mean = f"{100 * np.mean(values):.1f}"
    if len(values) > 1:
        return f"{mean} ± {100 * np.std(values):.1f}"
    if n is None:
        return mean
    low, high = wilson(values[0] * n, n)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def run(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lab.claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", metavar="COMMIT", default="",
                        help="Judge the rows of an earlier program, in results/history.")
    options = parser.parse_args(argv)
    print(report(finished(history=options.history)))


if __name__ == "__main__":
    sys.exit(run_cli("lab.claims", run))
