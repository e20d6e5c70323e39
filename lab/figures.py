"""
The pictures of the study, drawn by `python -m lab.study --report` from rows and curves alone (gsm8k:
from files in results/real). No model is loaded, and nothing is measured again.

A band is one population standard deviation over the seeds on either side of their mean, and so is an error
bar where nothing else is said. The colours are those of Okabe and Ito, which colour-blind people can tell
apart. A picture has five curves at most.
"""
import numpy as np
from matplotlib.figure import Figure

from eval import draw_matrix
from lab.claims import RESULTS, finished, interval, names_of, rho, runs_of
from rlvr import read_records

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito
HEADLINE = ("soft", "single", "prefix", "soft shuffled", "soft first")
COMPARING = ("soft", "soft without comparing", "soft without comparing at high rates", "soft without stage 0")
OTHERS = ("soft", "soft without stage 0", "hard", "linear", "text")
TASKS = ("mix", "sums", "sums hard", "family", "primes", "real sums")
REAL_TASKS = ("real family", "real copies", "real mix", "real terms")


# -- The pictures. Each takes the rows of finished runs, and returns a figure, or None without such runs.

def learning(rows, ways=HEADLINE, least=1):
    """Validation accuracy over the steps; squares: test. A panel for each task with `least` of the ways."""
    tasks = []
    for task in TASKS + REAL_TASKS:
        found = [way for way in ways if runs_of(rows, task, way)]
        if len(found) >= least:
            tasks.append(task)
    if not tasks:
        return None

    figure, panels = make_panels(len(tasks))
    for panel, task in zip(panels, tasks):
        counts = []
        for i, (way, colour) in enumerate(zip(ways, COLOURS)):
            runs = runs_of(rows, task, way)
            if runs:
                counts.append(len(runs))
                draw_band(panel, runs, ["val"], way, colour)
                draw_test_accuracy(panel, runs, i, colour)

        # Experts' texts are in the prompt of "text", so there the policy alone is another one.
        run = next(row for row in rows if row["task"] == task and row["way"] != "text")
        panel.axhline(run["before"], color="0.4", linestyle="--", label="policy alone (test)")
        panel.set(ylim=(0, 1.02), title=f"{task}, seeds: {from_to(counts)}")
        label_left(panel, "fraction right, greedy")
    legend_beside(figure, panels)
    return figure


def draw_test_accuracy(panel, runs, place, colour):
    """A square to the right of the curves; several of them stand side by side."""
    after = [run["after"] for run in runs]
    last_step = runs[0]["curve"][-1]["step"]
    panel.errorbar(last_step * (1.03 + 0.03 * place), np.mean(after), np.std(after), color=colour, marker="s",
                   markersize=5, capsize=3)


def comparing(rows):
    """As `learning`, of soft with and without comparing two experts."""
    return learning(rows, COMPARING, least=2)


def other_ways(rows):
    """As `learning`, of the other ways."""
    return learning(rows, OTHERS, least=2)


def attention(rows, task="mix", labels=None):
    """Attention by dataset over the steps, of soft. labels: of the experts, in place of their names."""
    runs = runs_of(rows, task, "soft")
    if not runs:
        return None
    datasets = list(runs[0]["attention_by_dataset"])
    names = list(runs[0]["attention_by_dataset"][datasets[0]])

    figure, panels = make_panels(len(datasets))
    for panel, dataset in zip(panels, datasets):
        for name, label, colour in zip(names, labels or names, COLOURS):
            keys = ["attention_by_dataset", dataset, name]
            draw_band(panel, runs, keys, f"expert {label}", colour, smooth=5)
        panel.axhline(1 / len(names), color="0.4", linestyle=":", label="even attention")
        panel.set(ylim=(0, 1.02), title=dataset)
        label_left(panel, "attention")
    legend_beside(figure, panels)
    return figure


def attention_real_mix(rows):
    """The same of two real experts, of which the second answers another problem on one of the datasets."""
    return attention(rows, "real mix", ["Qwen2.5-Coder", "its copy, wrong on chain_sum"])


def attention_real_family(rows):
    """The same of two real experts that know different things."""
    return attention(rows, "real family")


def attention_real_copies(rows):
    """The same of two copies of a real expert, each of them wrong on one of two datasets."""
    return attention(rows, "real copies")


def entropy(rows):
    """The entropy of attention and the reward over the steps, of soft, a curve for each task."""
    tasks = [task for task in TASKS[:5] if runs_of(rows, task, "soft")]
    if not tasks:
        return None

    figure, panels = make_panels(2)
    for task, colour in zip(tasks, COLOURS):
        runs = runs_of(rows, task, "soft")
        plain = np.mean([rho(run, 0) for run in runs])
        detrended = np.mean([rho(run, 1) for run in runs])
        label = f"{task}, {count_seeds(runs)}\nρ {plain:+.2f}, detrended {detrended:+.2f}"
        draw_band(panels[0], runs, ["attention_entropy"], label, colour, smooth=5)
        draw_band(panels[1], runs, ["reward"], label, colour, smooth=5)
    panels[0].set(ylim=(0, None), ylabel="nats", title="Entropy of attention")
    panels[1].set(ylim=(0, 1.02), ylabel="mean reward", title="Reward in training")
    legend_beside(figure, panels[:1])
    return figure


def specialization(rows):
    """Attention on test problems, and the points lost when an expert is hidden: soft on the mix, means."""
    runs = [run for run in runs_of(rows, "mix", "soft") if run.get("masked")]
    if not runs:
        return None

    # Average over the seeds.
    shares, points = {}, {}
    for dataset in runs[0]["attention_by_dataset"]:
        shares[dataset], points[dataset] = {}, {}
        for name in names_of(runs[0]):
            of_runs = [run["attention_by_dataset"][dataset][name] for run in runs]
            lost = [run["by_dataset"][dataset]["after"] - run["masked"][name][dataset] for run in runs]
            shares[dataset][name] = np.mean(of_runs)
            points[dataset][name] = 100 * np.mean(lost)

    figure = Figure(layout="constrained", figsize=(11, 3.2))
    left, right = figure.subplots(1, 2)
    draw_matrix(left, shares, 1, "{:.2f}", f"Attention on test problems, {count_seeds(runs)}")
    draw_matrix(right, points, 100, "{:z.0f}", "Points lost when an expert is hidden")
    return figure


def ablations(rows):
    """What soft loses when attention or states are replaced at test time, with 95% intervals."""
    runs_by_task = {}
    for task in TASKS:
        runs = [run for run in runs_of(rows, task, "soft") if "ablate" in run]
        if runs:
            runs_by_task[task] = runs
    if not runs_by_task:
        return None

    figure = Figure(layout="constrained", figsize=(9, 3.8))
    panel = figure.subplots()
    places = {}  # of the kinds of replacement, on the x axis
    for i, (task, colour) in enumerate(zip(runs_by_task, COLOURS)):
        runs = runs_by_task[task]
        for kind in runs[0]["ablate"]["kinds"]:
            # One paired difference for each seed and problem.
            difference = []
            for run in runs:
                replaced, trained = run["ablate"]["kinds"][kind]["right"], run["ablate"]["right"]
                difference.append(np.subtract(replaced, trained))
            mean, (low, high) = np.mean(difference), interval(difference)

            place = places.setdefault(kind, len(places)) + (i + 0.5) * 0.8 / len(runs_by_task) - 0.4
            error = [[100 * (mean - low)], [100 * (high - mean)]]
            panel.bar(place, 100 * mean, 0.75 / len(runs_by_task), color=colour, capsize=3, yerr=error,
                      label=f"{task}, {count_seeds(runs)}")

    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(places)), places)
    panel.set(xlabel="put in place of attention or states at test time", ylabel="points of accuracy",
              title="Soft with one thing replaced, less soft as trained (95%)")
    legend_beside(figure, [panel])
    return figure


def gsm8k(rows):
    """Rewards in training on GSM8K of an earlier program with the paper's method, one run each.

    They come from the runs' metrics.jsonl. The rows "gsm8k" of the study are other runs.
    """
    figure, (panel,) = make_panels(1)
    for way, colour in zip(("soft", "single"), COLOURS):
        curve = read_records(RESULTS / "real" / f"gsm8k-{way}-metrics.jsonl")
        draw_band(panel, [dict(curve=curve)], ["reward"], way, colour, smooth=10)
    panel.set(ylim=(0, None), ylabel="fraction of 64 answers right",
              title="GSM8K, an earlier program with the paper's method")
    legend_beside(figure, [panel])
    return figure


PICTURES = {  # by the name of the file
    "learning": learning,
    "comparing": comparing,
    "ways": other_ways,
    "attention": attention,
    "attention_real_family": attention_real_family,
    "attention_real_copies": attention_real_copies,
    "attention_real_mix": attention_real_mix,
    "entropy": entropy,
    "specialization": specialization,
    "ablations": ablations,
    "gsm8k": gsm8k,
}


def draw_all(results=RESULTS):
    """Draw all pictures that the rows allow into results/figures. Returns their files."""
    folder = results / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    rows = finished(results)

    files = []
    for name, picture in PICTURES.items():
        figure = picture(rows)
        if figure:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110)
            files.append(path)
    return files


# -- What the pictures are made of

def draw_band(panel, runs, keys, label, colour, smooth=1):
    """The mean over runs of a value on their curves, and one standard deviation on either side.

    keys: where the value stands in a point of a curve. smooth: a value is the mean of so many last points.
    """
    curves = [values_of(run, keys) for run in runs]
    curves = [curve for curve in curves if curve]
    if not curves:
        return

    # Bring all runs to the same steps. Before its first point and after its last one a run has no value.
    steps = sorted(set().union(*curves))
    rows = []
    for curve in curves:
        values = means_of_last(list(curve.values()), smooth)
        rows.append(np.interp(steps, list(curve), values, np.nan, np.nan))

    mean, std = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    marker = "o" if len(steps) < 20 else None
    panel.plot(steps, mean, color=colour, label=label, marker=marker, markersize=3)
    panel.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    panel.set_xlabel("GRPO step")


def values_of(run, keys):
    """{step: value} of a run's curve; a point without such a value, or with null, is left out."""
    values = {}
    for point in run["curve"]:
        value = point
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            values[point["step"]] = value
    return values


def means_of_last(values, n):
    """Each value becomes the mean of itself and the n - 1 before it: [2, 4, 6] -> [2, 3, 5] with n = 2."""
    return [np.mean(values[max(0, i - n):i]) for i in range(1, len(values) + 1)]


def make_panels(n):
    """A figure with n panels, three in a row. Returns (figure, panels)."""
    columns = min(3, n)
    rows = -(-n // columns)
    figure = Figure(layout="constrained", figsize=(4.2 * columns + 2, 3.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for unused in panels.flat[n:]:
        unused.axis("off")
    return figure, panels.flat[:n]


def label_left(panel, text):
    """Label the y axis, if the panel is the first one of its row."""
    if panel.get_subplotspec().is_first_col():
        panel.set_ylabel(text)


def legend_beside(figure, panels):
    """One legend for all panels, to the right of them."""
    labels = {}
    for panel in np.ravel(panels):
        for handle, label in zip(*panel.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=9, frameon=False)


def count_seeds(runs):
    """"1 seed", "3 seeds" """
    plural = "s" if len(runs) > 1 else ""
    return f"{len(runs)} seed{plural}"


def from_to(counts):
    """"3 to 5", or "3" where all are equal."""
    if min(counts) == max(counts):
        return str(max(counts))
    return f"{min(counts)} to {max(counts)}"
