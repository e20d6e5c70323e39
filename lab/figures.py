"""
The pictures of the study, drawn by `python lab/study.py --report` from rows and curves alone: no model is
loaded, nothing is measured again.

A band, and an error bar where nothing else is stated, is one population standard deviation over the seeds on
either side of their mean. Colours are Okabe and Ito's, at most five curves in one picture.
"""
import numpy as np
from matplotlib.figure import Figure

from claims import RESULTS, finished, interval, names_of, rho, runs_of
from eval import heat, read_lines

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito
HEADLINE = ("soft", "single", "prefix", "soft shuffled", "soft first")
OTHERS = ("soft", "soft without stage 0", "hard", "linear", "text")
TASKS = ("mix", "sums", "sums hard", "family", "primes", "real sums")

def series(run, keys):
    """{step: value} of the points of a run's curve that have a value under these keys."""
    values = {}
    for point in run["curve"]:
        value = point
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            values[point["step"]] = value
    return values

def band(axis, runs, keys, label, colour, smooth=1):
    """Mean over runs of what their curves hold under these keys, each the mean of its last `smooth` points,
    and one std on either side."""
    values = [found for found in (series(run, keys) for run in runs) if found]
    if not values:
        return
    steps = sorted(set().union(*values))
    rows = []
    for found in values:
        y = list(found.values())
        y = [np.mean(y[max(0, i + 1 - smooth):i + 1]) for i in range(len(y))]
        rows.append(np.interp(steps, list(found), y, np.nan, np.nan))  # beyond its end a run has no value
    mean, std = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    axis.plot(steps, mean, color=colour, label=label, marker="o" if len(steps) < 20 else None, markersize=3)
    axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel("GRPO step")

def legend_beside(figure, axes):
    """One legend for all panels, at the right of them."""
    labels = {}
    for axis in np.ravel(axes):
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=9, frameon=False)

def panels(n):
    """A figure with n panels, three in a row."""
    columns = min(3, n)
    rows = -(-n // columns)
    figure = Figure(layout="constrained", figsize=(4.2 * columns + 2, 3.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[n:]:
        axis.axis("off")
    return figure, axes.flat[:n]

def seeds_of(runs):
    seeds = sorted(run["seed"] for run in runs)
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"

def learning(rows, ways, least=1):
    """Validation accuracy of these ways, a panel for each task that has `least` of them; squares: test."""
    tasks = [task for task in TASKS if sum(bool(runs_of(rows, task, way)) for way in ways) >= least]
    if not tasks:
        return None
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        counts = []
        for i, (way, colour) in enumerate(zip(ways, COLOURS)):
            runs = runs_of(rows, task, way)
            if runs:
                counts.append(len(runs))
                band(axis, runs, ["val"], way, colour)
                after, end = [run["after"] for run in runs], runs[0]["curve"][-1]["step"]
                axis.errorbar(end * (1.03 + 0.03 * i), np.mean(after), np.std(after), color=colour,
                              marker="s", markersize=5, capsize=3)
        run = next(row for row in rows if row["task"] == task and row["way"] != "text")
        axis.axhline(run["before"], color="0.4", linestyle="--", label="policy alone (test)")
        seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else max(counts)
        axis.set(ylim=(0, 1.02), title=f"{task}, seeds: {seeds}")
        axis.set_ylabel("share right, greedy" if axis.get_subplotspec().is_first_col() else "")
    legend_beside(figure, axes)
    return figure

def attention(rows, task="mix", labels=None):
    """Attention by dataset over training, soft; labels: of the experts, in order, where names say little."""
    runs = runs_of(rows, task, "soft")
    if not runs:
        return None
    datasets = list(runs[0]["attention_by_dataset"])
    names = list(runs[0]["attention_by_dataset"][datasets[0]])
    figure, axes = panels(len(datasets))
    for axis, dataset in zip(axes, datasets):
        for name, label, colour in zip(names, labels or names, COLOURS):
            keys = ["attention_by_dataset", dataset, name]
            band(axis, runs, keys, f"expert {label}", colour, smooth=5)
        axis.axhline(1 / len(names), color="0.4", linestyle=":", label="even share")
        axis.set(ylim=(0, 1.02), title=dataset)
        axis.set_ylabel("attention share" if axis.get_subplotspec().is_first_col() else "")
    legend_beside(figure, axes)
    return figure

def entropy(rows):
    """Attention's entropy and reward, soft, a curve a task."""
    tasks = [task for task in TASKS[:5] if runs_of(rows, task, "soft")]
    if not tasks:
        return None
    figure, axes = panels(2)
    for task, colour in zip(tasks, COLOURS):
        runs = runs_of(rows, task, "soft")
        plain, straight = (np.mean([rho(run, degree) for run in runs]) for degree in (0, 1))
        label = f"{task}, {seeds_of(runs)}\nρ {plain:+.2f}, detrended {straight:+.2f}"
        band(axes[0], runs, ["attention_entropy"], label, colour, smooth=5)
        band(axes[1], runs, ["reward"], label, colour, smooth=5)
    axes[0].set(ylim=(0, None), ylabel="nats", title="Entropy of attention")
    axes[1].set(ylim=(0, 1.02), ylabel="mean reward", title="Reward in training")
    legend_beside(figure, axes[:1])
    return figure

def specialization(rows):
    """Attention on test problems and what masking an expert out costs: soft on the mix, means over seeds."""
    runs = [run for run in runs_of(rows, "mix", "soft") if run.get("masked")]
    if not runs:
        return None
    datasets, names = list(runs[0]["attention_by_dataset"]), names_of(runs[0])
    shares = {dataset: {name: np.mean([run["attention_by_dataset"][dataset][name] for run in runs])
                        for name in names} for dataset in datasets}
    lost = {dataset: {name: 100 * np.mean([run["by_dataset"][dataset]["after"] - run["masked"][name][dataset]
                                           for run in runs]) for name in names} for dataset in datasets}
    figure = Figure(layout="constrained", figsize=(11, 3.2))
    axes = figure.subplots(1, 2)
    heat(axes[0], shares, 1, "{:.2f}", f"Attention on test problems, {seeds_of(runs)}")
    heat(axes[1], lost, 100, "{:z.0f}", "Points lost when an expert is masked out")
    return figure

def ablations(rows):
    """What replacing attention or states at test time costs soft: 95% intervals."""
    tasks = [task for task in TASKS if any("ablate" in run for run in runs_of(rows, task, "soft"))]
    if not tasks:
        return None
    figure = Figure(layout="constrained", figsize=(9, 3.8))
    axis = figure.subplots()
    kinds = {}
    for i, (task, colour) in enumerate(zip(tasks, COLOURS)):
        runs = [run for run in runs_of(rows, task, "soft") if "ablate" in run]
        label = f"{task}, {seeds_of(runs)}"
        for kind in runs[0]["ablate"]["kinds"]:
            D = [np.subtract(run["ablate"]["kinds"][kind]["right"], run["ablate"]["right"]) for run in runs]
            low, high = interval(D)
            place = kinds.setdefault(kind, len(kinds)) + (i + 0.5) * 0.8 / len(tasks) - 0.4
            axis.bar(place, 100 * np.mean(D), 0.75 / len(tasks), color=colour, label=label, capsize=3,
                     yerr=[[100 * (np.mean(D) - low)], [100 * (high - np.mean(D))]])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(xlabel="put in place of attention or states at test time", ylabel="points of accuracy",
             title="Soft with one thing replaced, less soft as trained (95%)")
    legend_beside(figure, [axis])
    return figure

def gsm8k(rows):
    """Rewards in training on GSM8K, one run each, from their metrics.jsonl: the study has no row of them."""
    figure, (axis,) = panels(1)
    for way, colour in zip(("soft", "single"), COLOURS):
        curve = read_lines(RESULTS / "real" / f"gsm8k-{way}-metrics.jsonl")
        band(axis, [dict(curve=curve)], ["reward"], way, colour, smooth=10)
    axis.set(ylim=(0, None), ylabel="share of 64 answers right", title="GSM8K, mean of 10 steps")
    legend_beside(figure, [axis])
    return figure

PICTURES = {
    "learning": lambda rows: learning(rows, HEADLINE),
    "ways": lambda rows: learning(rows, OTHERS, least=2),
    "attention": attention,
    "attention_real_mix": lambda rows: attention(
        rows, "real mix", ["Qwen2.5-Coder", "its copy, wrong on chain_sum"]),
    "entropy": entropy,
    "specialization": specialization,
    "ablations": ablations,
    "gsm8k": gsm8k,
}

def draw_all(results=RESULTS):
    """Draw all pictures that the rows allow; returns their files."""
    folder = results / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    rows, files = finished(results), []
    for name, picture in PICTURES.items():
        figure = picture(rows)
        if figure:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=110)
    return files
