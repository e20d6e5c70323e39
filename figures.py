"""
Pictures of runs, drawn from their files alone: metrics.jsonl, eval.json and ablate.json of a run's folder, or
results/curves/ID.json (`analysis.records`). No model is loaded and nothing is measured again.

    figure   one run in one picture, at the end of its training
    draw     several runs: a picture a question, groups of runs told apart by colour, seeds put together

A band is one population deviation over the seeds on either side of their mean; error bars are 95% intervals.
"""

import statistics
import textwrap

import numpy as np

from analysis import bootstrap, grouped, records, together

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "black")  # Okabe, Ito


def pyplot():
    """matplotlib, drawing to files; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# -- one run
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
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("expert")


def smooth(values, width=10):
    """Trailing mean over at most `width` values."""
    return [statistics.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


def listening(rows, names):
    """(label, share a step) to plot: for one dataset every expert; for several, of each the expert that it
    listened to most in the last ten steps (a step without that dataset repeats the share before)."""
    datasets = list(dict.fromkeys(d for r in rows for d in r["attention_by"]))
    if len(datasets) == 1:
        return [(name, [r["attention"][name] for r in rows]) for name in names]
    lines = []
    for d in datasets:
        mean = {n: sum(r["attention_by"].get(d, {}).get(n, 0) for r in rows[-10:]) for n in names}
        best, shares = max(mean, key=mean.get), []
        for r in rows:
            before = shares[-1] if shares else 1 / len(names)
            shares.append(r["attention_by"].get(d, {}).get(best, before))
        lines.append((f"{d}: {best}", shares))
    return lines


def figure(rows, report, path):
    """One picture of a run: what it learned, whom it listened to, by family, and what silencing each expert
    costs."""
    plt = pyplot()
    names = list(rows[-1]["attention"])
    matrices = bool(report.get("silenced"))
    fig, axes = plt.subplots(2 if matrices else 1, 2 if names else 1, squeeze=False, constrained_layout=True,
                             figsize=(10 if names else 6, 7 if matrices else 3.6))
    steps = [r["step"] for r in rows]
    ax = axes[0, 0]
    ax.plot(steps, smooth([r["reward"] for r in rows]), color=COLOURS[0],
            label="training reward, mean of 10 steps")
    val = [(r["step"], r["val"]) for r in rows if "val" in r]
    ax.plot(*zip(*val), "o-", color=COLOURS[5], markersize=4, label="accuracy on validation problems, greedy")
    ax.axhline(report["before"]["strict"], color="grey", ls="--", label="policy alone (test)")
    after, (low, high) = report["after"]["strict"], report["after"]["ci95"]
    ax.errorbar([steps[-1]], [after], yerr=[[after - low], [high - after]], color="black", marker="s",
                capsize=3, ls="none", label=f"after (test, n = {report['n']}, 95%)")
    ax.set(xlabel="step", ylabel="share right", ylim=(0, 1))
    ax.set_title(f"{report['collab']} on {report['task']}, seed {report['seed']}", fontsize=10)
    ax.legend(fontsize=8, loc="upper left")
    if names:
        ax = axes[0, 1]
        for i, (label, shares) in enumerate(listening(rows, names)):
            ax.plot(steps, smooth(shares), color=COLOURS[i % 8], label=label)
        ax.axhline(1 / len(names), color="grey", ls=":", label="even split")
        ax.set(xlabel="step", ylabel="share of attention", ylim=(0, 1))
        ax.set_title("who is listened to (training, mean of 10 steps)", fontsize=10)
        ax.legend(fontsize=8, loc="lower right")
    if matrices:
        families, after = list(report["attention_by"]), report["by_dataset"]
        heat(axes[1, 0], families, names, report["attention_by"], "attention by family (test)", 1.0, ".2f")
        lost = {d: {e: 100 * (after[d]["after"]["strict"] - report["silenced"][e][d]) for e in names}
                for d in families}
        heat(axes[1, 1], families, names, lost, "points lost when an expert is silenced (test)", 100, "z.0f")
    fig.savefig(path, dpi=110)
    plt.close(fig)


# -- several runs
def sheet(rows, columns, height=2.9, **how):
    return pyplot().subplots(rows, columns, squeeze=False, constrained_layout=True,
                             figsize=(5 if columns == 1 else 10, 0.3 + height * rows), **how)


def about(group, runs):
    """What a panel's title says of a group: task, way, n, seeds."""
    seeds = ", ".join(str(r["seed"]) for r in runs)
    return f"{group[1]} on {group[0]}\nn = {runs[0]['n']} held-out problems, seed{'s' * (len(runs) > 1)} {seeds}"


def band(ax, series, label, colour, width=1):
    """Mean over seeds of some {step: value}, at the steps that all have, and one deviation to either side."""
    steps = sorted(set.intersection(*map(set, series)))
    grid = np.array([smooth([s[t] for t in steps], width) for s in series])
    mean, spread = grid.mean(0), grid.std(0)
    ax.plot(steps, mean, color=colour, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
    ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    ax.set_xlabel("training step")


def series(runs, *path, key="curve"):
    """{step: value} of every run, for the rows of its curve that have a value at this path of keys."""
    def at(row):
        for key in path:
            row = (row or {}).get(key)
        return row
    return [{row["step"]: at(row) for row in r[key] if at(row) is not None} for r in runs]


def width(runs):
    """Steps to smooth over: ten of a run that kept them all."""
    return max(1, min(10, len(runs[0]["curve"]) // 5))


def learning(groups):
    tasks = list(dict.fromkeys(task for task, _ in groups))
    ways = list(dict.fromkeys(how for _, how in groups))
    fig, axes = sheet(-(-len(tasks) // 2), min(2, len(tasks)), 3.4)
    for ax, task in zip(axes.flat, tasks):
        for (of, how), runs in groups.items():
            if of == task:
                colour = COLOURS[ways.index(how) % 8]
                band(ax, series(runs, "val"), how, colour)
                after = [r["after"]["strict"] for r in runs]
                ax.errorbar(max(r["curve"][-1]["step"] for r in runs) * 1.03, np.mean(after),
                            np.std(after), color=colour, marker="s", capsize=3)
        ax.axhline(runs[0]["before"]["strict"], color="grey", ls="--", label="policy alone (test)")
        ax.set(ylabel="share right, greedy", ylim=(0, 1))
        seeds = max(len(r) for (of, _), r in groups.items() if of == task)
        ax.set_title(f"{task}\nvalidation; squares: test, n = {runs[0]['n']}; up to {seeds} seeds", fontsize=9)
        ax.legend(fontsize=8)
    return fig


def families(groups):
    """The datasets of these groups, and a sheet with a row for a group and a column for a dataset."""
    most = max((list(runs[0]["attention_by"]) for runs in groups.values()), key=len)
    fig, axes = sheet(len(groups), len(most), sharey=True)
    for row, (group, runs) in zip(axes, groups.items()):
        for ax, dataset in zip(row, runs[0]["attention_by"]):
            ax.set_title(f"{dataset}\n{group[1]}, seeds {', '.join(str(r['seed']) for r in runs)}", fontsize=9)
        for ax in row[len(runs[0]["attention_by"]):]:
            ax.axis("off")
        row[0].set(ylabel="share of attention", ylim=(0, 1))
    return fig, axes


def attention(groups):
    fig, axes = families(groups)
    for row, runs in zip(axes, groups.values()):
        for ax, (dataset, heard) in zip(row, runs[0]["attention_by"].items()):
            for colour, e in zip(COLOURS, heard):
                band(ax, series(runs, "attention_by", dataset, e), e, colour, width(runs))
            ax.axhline(1 / len(heard), color="grey", ls=":")
        row[0].legend(fontsize=8)
    return fig


def entropy(groups):
    fig, (axes,) = sheet(1, 2, 3.6)
    for colour, (group, runs) in zip(COLOURS, groups.items()):
        rho = [together(*zip(*((row["attention_entropy"], row["reward"]) for row in r["curve"]))) for r in runs]
        mean = lambda key: np.mean([x[key] for x in rho if x[key] is not None] or [np.nan])
        label = f"{group[1]} on {group[0]}: ρ {mean('rho'):+.2f}, of changes {mean('changes'):+.2f}"
        band(axes[0], series(runs, "attention_entropy"), "\n".join(textwrap.wrap(label, 40)), colour, width(runs))
        band(axes[1], series(runs, "reward"), None, colour, width(runs))
    axes[0].set(ylabel="entropy of attention (nats)", ylim=(0, None))
    axes[1].set(ylabel="training reward", ylim=(0, 1))
    axes[0].set_title("attention's entropy; ρ: Spearman with reward, mean of seeds", fontsize=9)
    axes[1].set_title(f"reward, mean of {max(map(width, groups.values()))} recorded steps", fontsize=9)
    axes[0].legend(fontsize=7, loc="lower left")
    return fig


def specialisation(groups):
    fig, axes = sheet(len(groups), 2)
    for (left, right), (group, runs) in zip(axes, groups.items()):
        heard = runs[0]["attention_by"]
        names, mean = list(next(iter(heard.values()))), lambda f: np.mean([f(r) for r in runs])
        heat(left, list(heard), names, {d: {e: mean(lambda r: r["attention_by"][d][e]) for e in names}
                                        for d in heard}, f"share of attention: {about(group, runs)}", 1, ".2f")
        if not runs[0].get("silenced"):
            right.axis("off")
            continue
        lost = {d: {e: mean(lambda r: 100 * (r["by_dataset"][d]["after"]["strict"] - r["silenced"][e][d]))
                    for e in names} for d in heard}
        heat(right, list(heard), names, lost, "points lost when that expert is silenced", 100, "z.0f")
    return fig


def example(groups):
    known = {group: r for group, runs in groups.items() for r in runs[::-1] if r.get("example")}
    if not known:
        return None
    fig, axes = sheet(-(-len(known) // 2), min(2, len(known)), 3.6)
    for ax, (group, r) in zip(axes.flat, known.items()):
        x, names = r["example"], list(next(iter(r["attention_by"].values())))
        title = f"{x['question']} ({x['answer']})\n{group[1]}, seed {r['seed']}; mean over heads"
        values = [dict(zip(names, row)) for row in x["attention"]]
        heat(ax, range(len(values)), names, values, title if len(title) < 400 else title[-400:], 1, ".2f")
        ax.set_ylabel("latent")
    return fig


def right_and_wrong(groups):
    fig, axes = families(groups)
    for row, runs in zip(axes, groups.values()):
        for ax, (dataset, heard) in zip(row, runs[0]["attention_by"].items()):
            for k, (label, hatch) in enumerate((("wrong", "//"), ("right", ""))):
                some = np.array([h for r in runs for h, x, d in zip(r["heard"], r["right"], r["datasets"])
                                 if x == k and d == dataset])
                if len(some):
                    ax.bar(np.arange(len(heard)) + 0.4 * k - 0.2, some.mean(0), 0.38, color=COLOURS[2 - 2 * k],
                           yerr=1.96 * some.std(0) / len(some) ** 0.5, capsize=2, hatch=hatch,
                           edgecolor="white", label=f"{label}, n = {len(some)}")
            ax.set_xticks(range(len(heard)), heard, fontsize=8)
            ax.set_xlabel("expert")
            ax.legend(fontsize=8)
    return fig


def ablations(groups):
    known = {g: [r for r in runs if r.get("ablate")] for g, runs in groups.items()}
    known = {g: runs for g, runs in known.items() if runs}
    kinds = list(dict.fromkeys(k for runs in known.values() for r in runs for k in r["ablate"]["kinds"]))
    if not kinds:
        return None
    fig, ((ax,),) = sheet(1, 1, 3.8)
    fig.set_size_inches(8, 4)
    for i, (group, runs) in enumerate(known.items()):
        for j, kind in enumerate(kinds):
            D = [np.subtract(r["ablate"]["kinds"][kind]["right"], r["ablate"]["right"]) for r in runs
                 if kind in r["ablate"]["kinds"]]
            D = [d for d in D if len(d) == len(D[0])]
            if D:
                mean, (low, high) = np.mean(D), bootstrap(D)
                label = f"{about(group, runs)}".replace("\n", ", ") if j == 0 else None
                ax.bar(j + (i - (len(known) - 1) / 2) * 0.8 / len(known), 100 * mean, 0.75 / len(known),
                       yerr=[[100 * (mean - low)], [100 * (high - mean)]], color=COLOURS[i % 8], capsize=3,
                       label=label)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(kinds)), kinds, fontsize=9)
    ax.set(xlabel="put in place of attention or states at test time", ylabel="change in accuracy (points)")
    ax.set_title("accuracy lost, same problems, 95% (bootstrap over items and seeds)", fontsize=10)
    ax.legend(fontsize=8)
    return fig


def draw(paths, out):
    """Every picture that these runs allow, each as PNG and SVG in the folder `out`; returns the files."""
    groups, files = grouped(records(paths)), []
    heard = {g: runs for g, runs in groups.items() if runs[0].get("attention_by")}
    by_item = {g: runs for g, runs in heard.items() if all(r.get("heard") for r in runs)}
    out.mkdir(parents=True, exist_ok=True)
    for picture, some in ((learning, groups), (attention, heard), (entropy, heard), (specialisation, heard),
                          (example, heard), (right_and_wrong, by_item), (ablations, groups)):
        fig = picture(some) if some else None
        for kind in ("png", "svg") if fig else ():
            files.append(out / f"{picture.__name__}.{kind}")
            fig.savefig(files[-1], dpi=110)
        if fig:
            pyplot().close(fig)
    return files
