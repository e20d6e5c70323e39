"""
Pictures of runs, drawn from their files alone: metrics.jsonl, eval.json and ablate.json of a run's folder, or
results/curves/ID.json (`analysis.records`). No model is loaded and nothing is measured again.

    figure   one run in one picture, at the end of its training
    draw     several runs: a picture a question, groups of runs told apart by colour, seeds put together

A band, and an error bar where nothing else is said, is one population deviation over the seeds on either side
of their mean.
"""

import statistics
import textwrap

import numpy as np

from analysis import grouped, records, way
from stats import interval, together

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "black", "#F0E442")  # Okabe, Ito


def pyplot():
    """matplotlib, drawing to files; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# -- parts
def heat(ax, rows, columns, values, title, shade, fmt):
    """A labelled matrix: values[row][column], written in its cells."""
    grid = np.array([[values[r][c] for c in columns] for r in rows])
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=shade, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    for i, row in enumerate(grid.tolist()):
        for j, v in enumerate(row):
            colour = "white" if v > 0.6 * shade else "black"
            ax.text(j, i, format(v, fmt), ha="center", va="center", color=colour)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("expert")


def smooth(values, width=10):
    """Trailing mean over at most `width` values."""
    return [statistics.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


def sheet(rows, columns, height=2.9, **how):
    return pyplot().subplots(rows, columns, squeeze=False, constrained_layout=True,
                             figsize=(5 if columns == 1 else 10, 0.3 + height * rows), **how)


def seeds(runs):
    """Seeds 0, 1, 2 and 4 of these runs as "seeds 0, 1, 2, 4", three in a row and more as "seeds 0–2"."""
    used = sorted(r["seed"] for r in runs)
    row = len(used) > 2 and used == [*range(used[0], used[-1] + 1)]
    return f"seed{'s' * (len(used) > 1)} {f'{used[0]}–{used[-1]}' if row else str(used)[1:-1]}"


def series(runs, *path):
    """{step: value} of every run: the rows of its curve that have a value at this path of keys."""
    def at(row):
        for key in path:
            row = (row or {}).get(key)
        return row
    return [{row["step"]: at(row) for row in r["curve"] if at(row) is not None} for r in runs]


def band(ax, series, label, colour, width=1):
    """Mean over seeds of {step: value}, smoothed over `width` steps, and one deviation to either side."""
    steps = sorted(set().union(*series))  # between two of its steps a run is on the line, beyond its end not
    grid = np.array([np.interp(steps, [*s], smooth([*s.values()], width), np.nan, np.nan)
                     for s in series if s])
    mean, spread = (np.nanmean(grid, 0), np.nanstd(grid, 0)) if steps else ([], np.zeros(0))
    ax.plot(steps, mean, color=colour, label=label, marker="o" if len(steps) < 20 else None, markersize=3)
    ax.fill_between(steps, np.subtract(mean, spread), mean + spread, color=colour, alpha=0.2, linewidth=0)
    ax.set_xlabel("training step")


def curves(ax, groups, ways):
    """The learning curves of one task's groups; a way's colour is its place in `ways`."""
    for (task, how), runs in groups.items():
        i = ways.index(how)
        band(ax, series(runs, "val"), f"{how}, {seeds(runs)}", COLOURS[i % 8])
        after, end = [r["after"]["strict"] for r in runs], max(r["curve"][-1]["step"] for r in runs)
        error = [[np.std(after)]] * 2 if len(runs) > 1 else np.abs(np.subtract(
            runs[0]["after"].get("ci95", after * 2), after))[:, None]
        place = end * (1.02 + 0.02 * i)
        ax.errorbar(place, np.mean(after), error, color=COLOURS[i % 8], marker="s", capsize=3)
    if len(groups) == len(runs) == 1:
        band(ax, series(runs, "reward"), "training reward, mean of 10 steps", "grey", 10)
    runs = next(iter(groups.values()))  # the first: with --collab text the policy alone has read something
    ax.axhline(runs[0]["before"]["strict"], color="grey", ls="--", label="policy alone (test)")
    room = 0.4 if len(groups) > 3 else 0  # for the legend, above the curves
    ax.set(ylabel="share right, greedy", ylim=(0, 1 + room), yticks=np.arange(0, 1.01, 0.2))
    ax.set_title(f"{task}\nvalidation; squares: test, n = {runs[0]['n']}", fontsize=9)
    ax.legend(fontsize=8, **dict(ncols=2, loc="upper left") if room else {})


def matrices(axes, group, runs):
    """Who is listened to on what, and what it costs to silence whom: the means over seeds."""
    heard, mean = runs[0]["attention_by"], lambda f: np.mean([f(r) for r in runs])
    names = list(next(iter(heard.values())))
    shares = {d: {e: mean(lambda r: r["attention_by"][d][e]) for e in names} for d in heard}
    title = f"{group[0]}\nattention (test), {group[1]}, {seeds(runs)}"
    heat(axes[0], list(heard), names, shares, title, 1, ".2f")
    if not runs[0].get("silenced"):
        return axes[1].axis("off")
    lost = {d: {e: mean(lambda r: 100 * (r["by_dataset"][d]["after"]["strict"] - r["silenced"][e][d]))
                for e in names} for d in heard}
    heat(axes[1], list(heard), names, lost, f"points lost when silenced, n = {runs[0]['n']}", 100, "z.0f")


# -- one run
def figure(rows, report, path):
    """One picture of a run: what it learned, whom it listened to, and what silencing each expert costs."""
    r, by = report | dict(curve=rows), report.get("attention_by", {})
    fig, axes = sheet(1 + bool(by), 1 + bool(by), 3.5)
    group = report["task"], way(report)
    curves(axes[0, 0], {group: [r]}, [group[1]])
    lines = [(d, e) for d, heard in by.items() for e in heard
             if len(by) == 1 or heard[e] == max(heard.values())]
    for colour, (d, e) in zip(COLOURS, lines):
        band(axes[0, 1], series([r], "attention_by", d, e), f"{d}: {e}", colour, 10)
    if by:
        axes[0, 1].set(ylabel="share of attention", ylim=(0, 1))
        axes[0, 1].set_title("who is listened to (training, mean of 10 steps)", fontsize=9)
        axes[0, 1].legend(fontsize=8)
        matrices(axes[1], group, [r])
    fig.savefig(path, dpi=110)
    pyplot().close(fig)


# -- several runs
def learning(groups):
    tasks, ways = (list(dict.fromkeys(g[i] for g in groups)) for i in (0, 1))
    fig, axes = sheet(-(-len(tasks) // 2), min(2, len(tasks)), 3.5)
    for ax, task in zip(axes.flat, tasks):
        curves(ax, {g: runs for g, runs in groups.items() if g[0] == task}, ways)
    return fig


def families(groups):
    """The datasets of these groups, and a sheet with a row for a group and a column for a dataset."""
    most = max((list(runs[0]["attention_by"]) for runs in groups.values()), key=len)
    fig, axes = sheet(len(groups), len(most), sharey=True)
    several = len({task for task, _ in groups}) > 1
    for row, ((task, how), runs) in zip(axes, groups.items()):
        for ax, dataset in zip(row, runs[0]["attention_by"]):
            where = f", trained on {task}" * several
            ax.set_title(f"{dataset}{where}\n{how}, {seeds(runs)}", fontsize=9)
        for ax in row[len(runs[0]["attention_by"]):]:
            ax.axis("off")
        row[0].set(ylabel="share of attention", ylim=(0, 1))
    return fig, axes


def attention(groups):
    fig, axes = families(groups)
    for row, runs in zip(axes, groups.values()):
        for ax, (dataset, heard) in zip(row, runs[0]["attention_by"].items()):
            for colour, e in zip(COLOURS, heard):
                band(ax, series(runs, "attention_by", dataset, e), e, colour, 5)
            ax.axhline(1 / len(heard), color="grey", ls=":")
        row[0].legend(fontsize=8)
    return fig


def entropy(groups):
    fig, (axes,) = sheet(1, 2, 3.6)
    for colour, ((task, how), runs) in zip(COLOURS, groups.items()):
        both = [[series([r], key)[0] for key in ("attention_entropy", "reward")] for r in runs]
        rho = [together(list(x), list(x.values()), list(y.values())) for x, y in both]
        mean = lambda key: np.mean([x[key] for x in rho if x[key] is not None] or [np.nan])
        label = (f"{task}: {how}, {seeds(runs)}\n"
                 f"ρ {mean('rho'):+.2f}, straight trend out {mean('detrended'):+.2f}")
        band(axes[0], series(runs, "attention_entropy"), label, colour, 5)
        band(axes[1], series(runs, "reward"), None, colour, 5)
    axes[0].set(ylabel="entropy of attention (nats)", ylim=(0, None))
    axes[1].set(ylabel="training reward", ylim=(0, 1))
    axes[0].set_title("attention's entropy; ρ: Spearman with reward, mean of seeds", fontsize=9)
    axes[1].set_title("reward (both: mean of 5 recorded steps)", fontsize=9)
    axes[0].legend(fontsize=7, loc="lower left")
    return fig


def specialisation(groups):
    fig, axes = sheet(len(groups), 2)
    for row, (group, runs) in zip(axes, groups.items()):
        matrices(row, group, runs)
    return fig


def example(groups):
    fig, axes = sheet(-(-len(groups) // 2), min(2, len(groups)), 3.8)
    for ax, (group, (r, *_)) in zip(axes.flat, groups.items()):
        x, names = r["example"], list(next(iter(r["attention_by"].values())))
        values = [dict(zip(names, row)) for row in x["attention"]]
        asked = textwrap.fill(f"...{x['question']}"[-150:] + f" ({x['answer']})", 60)
        asked += f"\n{group[1]} on {group[0]}, {seeds([r])}, mean over heads"
        heat(ax, range(len(values)), names, values, asked, 1, ".2f")
        ax.set_ylabel("latent")
    return fig


def right_and_wrong(groups):
    fig, axes = families(groups)
    for row, runs in zip(axes, groups.values()):
        for ax, (dataset, heard) in zip(row, runs[0]["attention_by"].items()):
            for k, (label, hatch) in enumerate((("wrong", "//"), ("right", ""))):
                some = [[h for h, *of in zip(r["heard"], r["right"], r["datasets"]) if of == [k, dataset]]
                        for r in runs]
                means = np.array([np.mean(s, 0) for s in some if s])  # of each seed
                if len(means):
                    ax.bar(np.arange(len(heard)) + 0.4 * k - 0.2, means.mean(0), 0.38, color=COLOURS[1 - k],
                           yerr=means.std(0), capsize=2, hatch=hatch, edgecolor="white",
                           label=f"{label}, n = {sum(map(len, some))}")
            ax.set_xticks(range(len(heard)), heard, fontsize=8)
            ax.set(xlabel="expert", ylim=(0, 1.3), yticks=np.arange(0, 1.01, 0.2))  # room for the legend
            ax.legend(fontsize=8, loc="upper left", ncols=2)
    return fig


def ablations(groups):
    kinds = list(dict.fromkeys(k for runs in groups.values() for r in runs for k in r["ablate"]["kinds"]))
    fig, ((ax,),) = sheet(1, 1, 4)
    fig.set_figwidth(8)
    for i, ((task, how), runs) in enumerate(groups.items()):
        named = False
        for j, kind in enumerate(kinds):
            D = [np.subtract(r["ablate"]["kinds"][kind]["right"], r["ablate"]["right"]) for r in runs
                 if kind in r["ablate"]["kinds"]]
            D = [d for d in D if len(d) == len(D[0])]
            if D:
                mean, ci = np.mean(D), np.array(interval(D))
                ax.bar(j + (i + 0.5) * 0.8 / len(groups) - 0.4, 100 * mean, 0.75 / len(groups),
                       yerr=100 * np.abs(ci - mean)[:, None], color=COLOURS[i % 8], capsize=3,
                       label=f"{how} on {task}, n = {len(D[0])}, {seeds(runs)}" if not named else None)
                named = True
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(kinds)), kinds, fontsize=9)
    ax.set(xlabel="put in place of attention or states at test time", ylabel="change in accuracy (points)")
    ax.set_title("the same problems, 95% (items by bootstrap, seeds by Student's t)", fontsize=9)
    ax.legend(fontsize=8)
    return fig


PICTURES = ((learning, "curve"), (attention, "attention_by"), (entropy, "attention_by"), (example, "example"),
            (specialisation, "attention_by"), (right_and_wrong, "heard"), (ablations, "ablate"))


def draw(paths, out, pictures=PICTURES):
    """The pictures that these runs allow, each as PNG and SVG in the folder `out`; returns the files."""
    found, files = records(paths), []
    out.mkdir(parents=True, exist_ok=True)
    for picture, needs in pictures:
        groups = grouped(r for r in found if r.get(needs))
        fig = picture(groups) if groups else None
        for kind in ("png", "svg") if fig else ():
            files.append(out / f"{picture.__name__}.{kind}")
            fig.savefig(files[-1], dpi=110)
        if fig:
            pyplot().close(fig)
    return files
