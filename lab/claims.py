"""
Which claims hold: verdicts and their intervals, from the rows and curves of results/ alone.

A row is a line of results/study.jsonl together with its file in results/curves (see study.py). What would
refute a claim stands in `judge`, MARGIN and CLAIMS. Differences are paired: the same problems and seeds on
both sides, so that what makes a problem easy or hard cancels out. Each interval is a 95% one by itself: of
twenty differences that are nothing, about one will look like something.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from eval import read_lines, wilson  # noqa: E402

RESULTS = HERE / "results"
SPECIALIST = {"chain_sum": "arithmetic", "family_relationships": "logic", "count_primes": "algorithmic"}
MARGIN = {"points": 5.0, "nats": 0.05, "rho": 0.1}  # a smaller difference counts as none

# -- Statistics

def interval(D, draws=10_000):
    """95% interval of the mean of D (n,) or (seeds, n), paired differences by item.

    Items are drawn anew with replacement (bootstrap, a fixed generator). The means of k seeds enter by
    Student's t with k - 1 degrees of freedom: a bootstrap over few seeds is far too narrow (of two it covers
    61%, of five 88%). With one seed the interval is about that run alone. What items and seeds share is
    counted twice: a little wide.
    """
    D = np.atleast_2d(np.asarray(D, float))
    generator = np.random.default_rng(0)
    seeds, n = D.shape
    values, count = np.unique(D.mean(0), return_counts=True)  # equal items are drawn together, to save time
    means = generator.multinomial(n, count / n, draws) @ values / n
    if seeds > 1:
        standard_error = D.mean(1).std(ddof=1) / math.sqrt(seeds)
        means = means + generator.standard_t(seeds - 1, draws) * standard_error
    return np.quantile(means, (0.025, 0.975)).tolist()

def ranks(values):
    """The rank of each value, ties sharing theirs."""
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]

def spearman(x, y):
    """Correlation of ranks; None where one of the series never changes."""
    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 0 else None

def without_trend(steps, x, degree=1):
    """x less its best polynomial over the steps. Two series that both drift correlate for nothing."""
    steps = np.asarray(steps, float) - np.mean(steps)
    rest = np.asarray(x, float) - np.polyval(np.polyfit(steps, x, degree), steps)
    return np.where(np.abs(rest) < 1e-9 * (1 + np.abs(x).max()), 0.0, rest)

def spearman_without_trend(steps, x, y, degree):
    if len(x) <= degree + 1:
        return None
    return spearman(without_trend(steps, x, degree), without_trend(steps, y, degree))

# -- Rows

def read_rows(path=RESULTS / "study.jsonl"):
    """The rows of study.jsonl, the last one of every id."""
    return list({row["id"]: row for row in read_lines(path)}.values())

def finished(results=RESULTS):
    """Finished runs, each row with its curve."""
    return [json.loads((results / "curves" / f"{row['id']}.json").read_text()) | row
            for row in read_rows(results / "study.jsonl") if row["after"] is not None]

def runs_of(rows, task, way):
    return [row for row in rows if (row["task"], row["way"]) == (task, way)]

def right(row):
    """Right or wrong by item, in points."""
    return 100.0 * np.array(row["right"])

def paired(rows, one, other, measure=right):
    """measure(row) of the runs of two (task, way) on the seeds that both have: two lists."""
    a, b = ({row["seed"]: row for row in runs_of(rows, *key)} for key in (one, other))
    seeds = sorted(a.keys() & b.keys())
    return [measure(a[seed]) for seed in seeds], [measure(b[seed]) for seed in seeds]

# -- Verdicts

def judge(low, high, margin, kind="more"):
    """The verdict on a difference by its interval. Claimed is that it is

    more     above 0, however little: else refuted by an interval below 0 or within the margin
    same     within the margin: refuted by an interval on one side of 0 that is not
    no less  above -margin: refuted by an interval below 0 that is not
    """
    within = max(-low, high) <= margin
    holds, fails = {"more": (low > 0, high < 0 or within),
                    "same": (within, low > 0 or high < 0),
                    "no less": (low >= -margin, high < 0)}[kind]
    return "confirmed" if holds else "refuted" if fails else "open"

def compare(label, a, b=0.0, unit="points", kind="more"):
    """(verdict, sentence) on a - b, each (seeds, items) or (seeds,). It takes two runs to say anything."""
    if len(a) < 2:
        return "open", f"{label}: not measured on two runs"
    D = (np.asarray(a, float) - np.asarray(b, float)).reshape(len(a), -1)
    return judge(*interval(D), MARGIN[unit], kind), f"{label}: {shown(D, unit)}, {len(D)} runs"

def shown(D, unit="points"):
    digits = "+.1f" if unit == "points" else "+.2f"
    low, high = interval(D)
    return f"{np.mean(D):{digits}} [{low:{digits}}, {high:{digits}}] {unit}"

def difference(rows, way, other, *tasks, kind="more"):
    """The parts of a claim on one way against another, a part a task."""
    return [compare(f"{task}, {way} - {other}", *paired(rows, (task, way), (task, other)), kind=kind)
            for task in tasks]

def saturated(rows):
    """Single against soft on every task where single is right in 90% or more."""
    means = {task: np.mean([row["after"] for row in runs_of(rows, task, "single")] or [0.0])
             for task in sorted({row["task"] for row in rows})}
    tasks = [task for task, mean in means.items() if mean >= 0.9]
    if tasks:
        return difference(rows, "single", "soft", *tasks)
    return [("open", f"single saturates nowhere, at most {max(means.values(), default=0):.0%}")]

def rho(row, degree=0):
    """Spearman's rho of attention's entropy and reward over a run's curve, both without their trend."""
    steps, *both = ([point[key] for point in row["curve"]] for key in ("step", "attention_entropy", "reward"))
    return spearman_without_trend(steps, *both, degree) or 0.0

def entropy_falls(rows):
    """That rho is below 0 is claimed, so its sign is turned."""
    runs = [row for row in rows
            if row["way"] == "soft" and not row["task"].startswith("real") and len(row["curve"]) > 2]
    plain, straight, cubic = ([rho(row, degree) for row in runs] for degree in (0, 1, 3))
    label = (f"Spearman's rho over a run {np.mean(plain or [0]):+.2f}, without its cubic trend "
             f"{np.mean(cubic or [0]):+.2f}; without its straight trend and the sign turned")
    return [compare(label, [-x for x in straight], unit="rho")]

def entropy_at_the_end(row):
    """Of attention, mean over the last tenth of training."""
    curve = row["curve"]
    return np.mean([point["attention_entropy"] for point in curve if point["step"] > 0.9 * curve[-1]["step"]])

def concentrates(rows):
    ends = paired(rows, ("sums", "soft"), ("sums hard", "soft"), entropy_at_the_end)
    return [compare("entropy at the end, sums - sums hard", *ends, unit="nats")]

def names_of(row):
    return [expert["name"] for expert in row["experts"]]

def above_even(label, values, experts):
    """Percent by seed and item against an even share of the experts."""
    return compare(f"{label} - {100 / experts:.0f}", values, 100 / experts)

def wide_attended(rows):
    """The attention share of the wide expert that knows nothing."""
    shares = [100 * np.array(row["attended"])[:, names_of(row).index("wide")]
              for row in runs_of(rows, "sums", "soft wide")]
    return [above_even("its share", shares, 4)]

def believed(rows, task, way):
    """On sums, the share of the first expert against that of its copy, the last, which is wrong there."""
    shares = [100 * np.array(row["attended"])[np.array(row["datasets"]) == "chain_sum"]
              for row in runs_of(rows, task, way)]
    first, copy = ([share[:, e] for share in shares] for e in (0, -1))
    return compare(f"{task}, share of the right one - of the wrong one", first, copy)

def most_attended(row):
    """(n,): the place of the expert attended to most for each item."""
    return np.array(row["attended"]).argmax(-1)

def specialist_places(row):
    """(n,): the place of the expert that was made for each item's dataset."""
    return np.array([names_of(row).index(SPECIALIST[dataset]) for dataset in row["datasets"]])

def specialist_attended(rows):
    runs = [row for row in runs_of(rows, "mix", "soft") if row.get("attended")]
    shares = [100.0 * (most_attended(row) == specialist_places(row)) for row in runs]
    return [above_even("mix, it is attended to most", shares, 3)]

def knowing_attended(rows, task):
    """Of the items that exactly one expert answers right by itself: is it the one attended to most?"""
    runs = [row for row in runs_of(rows, task, "soft") if row.get("knows")]
    one = np.all([np.sum(row["knows"], 1) == 1 for row in runs], 0)  # the same items in every run
    shares = [100.0 * (most_attended(row) == np.argmax(row["knows"], 1))[one] for row in runs]
    experts = len(runs[0]["experts"]) if runs else 2
    return [above_even(f"{task}, the only expert that knows is attended to most", shares, experts)]

def test_time(rows, task, replaced, kind="more"):
    """A run as trained against the same run with something replaced at test time (probe.py --ablate)."""
    label = {"static": "static attention", "shuffle": "shuffled states at test"}[replaced]
    found = [row["ablate"] for row in runs_of(rows, task, "soft") if "ablate" in row]
    trained = [right(ablate) for ablate in found]
    other = [right(ablate["kinds"][replaced]) for ablate in found]
    return [compare(f"{task}, as trained - {label}", trained, other, kind=kind)]

def gain_is_gone(rows, task):
    """Soft with the states of other problems at test time must be no better than single."""
    measured = [row for row in rows if row["way"] == "single" or "ablate" in row]
    measure = lambda row: right(row if row["way"] == "single" else row["ablate"]["kinds"]["shuffle"])
    pair = paired(measured, (task, "single"), (task, "soft"), measure)
    return [compare(f"{task}, single - soft with shuffled states at test", *pair, kind="no less")]

def specialist_share(row):
    """The specialist's share of attention in percent, mean over the datasets."""
    shares = row["attention_by_dataset"]
    return 100 * np.mean([shares[dataset][SPECIALIST[dataset]] for dataset in shares])

def stage_0_alone(rows):
    before, after = paired(rows, ("mix", "stage 0"), ("mix", "soft"), specialist_share)
    return [compare("mix, the specialist's share after stage 0 - 33", before, 100 / 3, kind="same"),
            compare("the same after GRPO - after stage 0", after, before),
            *difference(rows, "soft", "stage 0", "mix")]

def real_models_read(rows):
    task = "real sums"
    parts = [difference(rows, "soft", other, task)[0] for other in ("single", "prefix", "soft shuffled")]
    return [*parts, *test_time(rows, task, "shuffle"), *gain_is_gone(rows, task)]

CLAIMS = (  # all parts of a claim must hold, and one that is refuted refutes it
    ("Soft beats single on sums", lambda rows: difference(rows, "soft", "single", "sums")),
    ("It beats a learned constant prefix", lambda rows: difference(rows, "soft", "prefix", "sums", "mix")),
    ("It beats shuffled states, noise and untrained experts", lambda rows: (
        difference(rows, "soft", "soft shuffled", "sums", "mix")
        + difference(rows, "soft", "soft noise", "mix")
        + difference(rows, "soft", "soft untrained", "mix"))),
    ("The first token's state does as well as the last's", lambda rows: (
        difference(rows, "soft first", "soft", "mix", kind="same"))),
    ("Single wins where the task saturates (single at 90% or more)", saturated),
    ("Attention's entropy falls as reward rises, a straight trend removed", entropy_falls),
    ("Attention concentrates more on harder tasks", concentrates),
    ("Larger experts are preferred whatever they know (a wide one with random weights)", wide_attended),
    ("On the mix the expert made for a dataset is attended to most", specialist_attended),
    ("Static attention suffices on sums and not on the mix", lambda rows: (
        test_time(rows, "sums", "static", "same") + test_time(rows, "mix", "static"))),
    ("Stage 0 alone does not tell whom to attend to, GRPO does", stage_0_alone),
    ("Real models read: soft beats single, prefix and shuffled; shuffling states at test removes the gain",
     real_models_read),
    ("Attention agrees with who knows", lambda rows: (
        knowing_attended(rows, "mix") + knowing_attended(rows, "real sums"))),
    ("Of two experts, of which one answers another problem, the right one is attended to more", lambda rows: (
        [believed(rows, task, "soft wrong") for task in ("sums", "real sums")])),
    ("Real models, two experts, one of them wrong on one of two datasets: there the right one is attended to "
     "more, and GRPO gains on stage 0", lambda rows: (
         [believed(rows, "real mix", "soft"), *difference(rows, "soft", "stage 0", "real mix")])),
)

def verdict(parts):
    verdicts = [part[0] for part in parts]
    decided = next((word for word in ("refuted", "open") if word in verdicts), "confirmed")
    return decided, "; ".join(part[1] for part in parts)

# -- The report

def markdown(head, rows):
    """The lines of a table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]

def table(rows):
    """A line for every task and way, seeds put together."""
    lines = []
    for task, way in sorted({(row["task"], row["way"]) for row in rows if row["task"] != "rates"}):
        runs = runs_of(rows, task, way)
        seeds, before, after, seconds = (
            [row[key] for row in runs] for key in ("seed", "before", "after", "seconds"))
        n, trained = runs[0]["n"], runs[0]["trainable"]
        a, b = paired(rows, (task, way), (task, "single"))
        gain = shown(np.subtract(a, b)) if way != "single" and len(a) > 1 else ""
        lines.append([task, way, ", ".join(map(str, sorted(seeds))), n, mean_and_std(before),
                      mean_and_std(after, n), gain, f"{trained:,}", f"{np.mean(seconds):.0f}"])
    head = ["task", "way", "seeds", "n", "before", "after", "minus single", "trained", "seconds"]
    return markdown(head, lines)

def rates_table(rows):
    """Validation accuracy on the mix by the factor on the rates of LoRA and router."""
    found = {row["way"]: f"{100 * row['val']:.1f}" for row in rows if row["task"] == "rates"}
    ways = dict.fromkeys(way.split()[0] for way in found)
    factors = sorted({way.split()[-1] for way in found}, key=float)
    lines = [[way, *(found.get(f"{way} x {factor}", "") for factor in factors)] for way in ways]
    return markdown(["validation", *(f"rates x {factor}" for factor in factors)], lines)

def mean_and_std(values, n=None):
    """Percent: mean ± std over seeds; of one seed and n problems, Wilson's interval."""
    mean = f"{100 * np.mean(values):.1f}"
    if len(values) > 1:
        return f"{mean} ± {100 * np.std(values):.1f}"
    if n is None:
        return mean
    low, high = wilson(values[0] * n, n)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"

def report(rows):
    """Markdown: the table, and the verdicts."""
    if not rows:
        return "No runs yet."
    lines = [*table(rows), "",
             "Strict greedy accuracy in percent on the same held-out problems, mean ± population standard",
             "deviation over seeds (of one seed: Wilson's interval). Differences are paired by seed and",
             "problem; 95% intervals: problems by bootstrap, seeds by Student's t.", ""]
    if any(row["task"] == "rates" for row in rows):
        lines += [*rates_table(rows), ""]
    judged = []
    for number, (claim, parts) in enumerate(CLAIMS, start=1):
        word, measured = verdict(parts(rows))
        judged.append([f"({number}) {claim}", f"**{word}**", measured])
    return "\n".join([*lines, *markdown(["claim", "verdict", "measured"], judged)])
