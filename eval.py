"""
What was learned: accuracy before and after on held-out problems, who was listened to, and what each expert
was worth.

    python eval.py runs/NAME                            the test problems, before and after, with 95%
    intervals
    python eval.py runs/NAME --samples 8                and pass@k, majority@k
    python eval.py runs/NAME --ask "How much is 17 + 25?"   one question, and a bar for every expert
    python eval.py runs/A runs/B runs/C --table         finished runs side by side, seeds put together
    python eval.py runs/NAME --export DIR               what was trained, for others: PEFT's format, a card
    python eval.py --from DIR                           an export in place of a run

"Before" is the policy alone: LoRA off and prefix off (what experts write in --collab text it reads already).
Attention shows who was listened to; it is no proof that it mattered. So each expert is also silenced (its
attention set to exactly 0, the others' renormalised) and the accuracy that this costs is measured on the same
problems.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

import checkpoint
import export
import ranks
from answers import extract, number
from rewards import Problem, guessing_floor
from rlvr import listen, rollout
from run import build, evaluate, excuse, held_out
from settings import settings

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "black")  # Okabe, Ito


def wilson(right, n, z=1.96):
    """95% interval of a share (Wilson 1927), honest for small n and near 0 and 1.    8 of 10 -> [0.49,
    0.94]"""
    p, zn = right / n, z * z / n
    centre, half = (p + zn / 2) / (1 + zn), z * math.sqrt(p * (1 - p) / n + zn / (4 * n)) / (1 + zn)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def score(verdicts):
    n, right = len(verdicts), sum(v.strict for v in verdicts)
    return dict(strict=right / n, lenient=sum(v.lenient for v in verdicts) / n, ci95=wilson(right, n))


def by_dataset(items, values):
    """dataset -> the values of its items, in the order of first appearance."""
    groups = {}
    for problem, value in zip(items, values):
        groups.setdefault(problem.dataset, []).append(value)
    return groups


def pass_at(k, n, c):
    """Chance that one of k completions is right, from c right among n: 1 - C(n-c, k) / C(n, k) (2107.03374,
    eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def silence(run, items):
    """expert -> verdicts on the same items with that expert absent. {} where there are not two experts."""
    names = [e.name for e in run.experts]
    result = {}
    for i, name in enumerate(names if len(names) > 1 else ()):
        mask = torch.ones(len(names), dtype=torch.bool, device=run.policy.embed.device)
        mask[i] = False
        result[name] = evaluate(run, items, lambda H: run.router(H, mask))[0]
    return result


def measure(run, samples=0, each=None):
    """Everything eval reports on the run's test items, as one JSON-able dict. each: a dict to be
    filled with what there is of each item: right after and before, attention (the first's also by latent)."""
    items = run.items["test"]
    with run.policy.plain():
        before = evaluate(run, items, None)[0]
    after, _, attention = evaluate(run, items)
    names = [e.name for e in run.experts]
    report = dict(task=run.args["task"], n=len(items), seed=run.args["seed"], collab=run.args["collab"],
                  control=run.args["control"], read=run.args["read"],
                  floor=guessing_floor(items)[0], before=score(before), after=score(after))
    b, a = by_dataset(items, before), by_dataset(items, after)
    report["by_dataset"] = {d: dict(n=len(a[d]), before=score(b[d]), after=score(a[d])) for d in a}
    if attention is not None:
        heard = by_dataset(items, attention.mean((1, 2)))  # dataset -> [(N,)]
        report["attention_by"] = {
            d: dict(zip(names, torch.stack(x).mean(0).tolist())) for d, x in heard.items()}
        report["silenced"] = {e: {d: score(x)["strict"] for d, x in by_dataset(items, v).items()}
                              for e, v in silence(run, items).items()}
    if each is not None:
        rounded = lambda t: [[round(x, 2) for x in row] for row in t.tolist()]
        each |= dict(dataset=[p.dataset for p in items], right=[int(v.strict) for v in after],
                     right_before=[int(v.strict) for v in before])
        if attention is not None:
            each |= dict(heard=rounded(attention.mean((1, 2))), question=items[0].question,
                         latents=rounded(attention[0].mean(0)))
    if samples:
        report["pass_at"], report["majority_at"] = sample_pass(run, items, samples)
    return report


@torch.no_grad()
def sample_pass(run, items, samples):
    """k -> mean pass@k over the items, and k -> share of items with a right majority among the first k, from
    `samples` completions of each at the training temperature."""
    generator = torch.Generator(run.args["device"]).manual_seed(run.args["seed"])
    right, votes, step = [], [], max(1, 64 // samples)
    for i in range(0, len(items), step):
        out = rollout(run.policy, run.router, run.batch(items[i : i + step]), run.tokenizer, run.verify,
                      samples, run.args["max_new"], run.args["temperature"], generator)
        right += [sum(v.strict for v in row) for row in out.verdicts]
        votes += [[(extract(text, run.form, cut)[0], v.strict) for text, cut, v in zip(*row)]
                  for row in zip(out.texts, out.truncated.tolist(), out.verdicts)]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return ({k: sum(pass_at(k, samples, c) for c in right) / len(right) for k in ks},
            {k: sum(majority(row[:k]) for row in votes) / len(votes) for k in ks})


def majority(votes):
    """Is the commonest answer right (of equally common ones the first)? votes: [(answer as written, or "" for
    none, is it right)]; 18 and $18.00 are one answer."""
    said = [(number(text) or text.strip().casefold(), right) for text, right in votes if text.strip()]
    counts = Counter(answer for answer, _ in said)
    return bool(said) and dict(said)[max(counts, key=counts.get)]


def show(report):
    interval = lambda s: f"[{s['ci95'][0]:.1%}, {s['ci95'][1]:.1%}]"
    percent = lambda s: f"{s['strict']:6.1%} {interval(s)} lenient {s['lenient']:.1%}"
    print(f"{report['task']}: {report['n']} held-out problems, greedy, 95% intervals (Wilson); "
          f"a constant answer is right in {report['floor']:.0%}")
    print(f"  before {percent(report['before'])}\n  after  {percent(report['after'])}")
    for d, x in report["by_dataset"].items() if len(report["by_dataset"]) > 1 else ():
        print(f"    {d:24} n {x['n']:4d}  before {x['before']['strict']:6.1%}  after {percent(x['after'])}")
    for k, value in report.get("pass_at", {}).items():
        print(f"  pass@{k} {value:.1%}, majority@{k} {report['majority_at'][k]:.1%}")
    for d, heard in report.get("attention_by", {}).items():
        cost = {e: x[d] - report["by_dataset"][d]["after"]["strict"] for e, x in report["silenced"].items()}
        listens = ", ".join(f"{e} {a:.2f}" for e, a in heard.items())
        silenced = ", ".join(f"{e} {100 * c:+z.0f}" for e, c in cost.items())
        print(f"  {d}: listens to {listens}" + (f"; silenced, {silenced} points" if cost else ""))


# -- the picture
def heat(ax, rows, columns, values, title, shade, fmt):
    """A labelled matrix: values[row][column], written in its cells."""
    grid = torch.tensor([[values[r][c] for c in columns] for r in rows])
    ax.imshow(grid.numpy(), cmap="Blues", vmin=0, vmax=shade, aspect="auto")
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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


# -- commands
def finish(run, out):
    """The end of training: before and after on held-out problems, the picture, and what to try next."""
    report = measure(run, each=(each := {}))
    if ranks.RANK:
        return 0
    (out / "items.json").write_text(json.dumps(each, separators=(",", ":")) + "\n")
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    figure(rows, report, out / "run.png")
    checkpoint.write_json(out / "eval.json", report)  # last: it says that the run is finished
    print()
    show(report)
    print(f'figure: {out / "run.png"}; next: python eval.py {out} --ask "{run.items["test"][0].question}"')
    return 0


@torch.no_grad()
def ask(run, question):
    """One question of the user's own: the answer, and who was listened to."""
    problem = Problem(question=question, answer="", split="test")
    run.prepare([problem, *run.items["test"][:2]], progress=False)  # --control shuffled gives it another's
    batch = run.batch([problem])
    context, attention = listen(run.router, batch.H)
    tokens, mask = run.policy.generate(run.policy.prefill(batch.tokens, batch.lengths, context), 1,
                                       run.args["max_new"], temperature=0)
    print(run.tokenizer.decode(tokens[mask], skip_special_tokens=True).strip())
    for name, text, _ in run.written.get(question, ()):
        print(f"  {name} wrote: {text}")
    if attention is not None:
        width = max(len(e.name) for e in run.experts)
        for expert, share in zip(run.experts, attention.mean((0, 1, 2)).tolist()):
            print(f"  {expert.name:{width}} {'█' * round(40 * share)} {share:.2f}")


def table(folders):
    """Markdown, a row for every (task, collab, control, read): accuracies as mean ± population deviation
    over seeds."""
    groups = {}
    for folder in folders:
        if not (Path(folder) / "eval.json").exists():
            raise ValueError(f"{folder} holds no finished run (no eval.json): let it finish first")
        report = json.loads((Path(folder) / "eval.json").read_text())
        more = (report.get("control", "none"), report.get("read", "last"))
        way = [report["collab"], *(word for word in more if word not in ("none", "last"))]
        groups.setdefault((report["task"], ", ".join(way)), []).append(report)
    spread = lambda x: f"{100 * statistics.mean(x):.1f} ± {100 * statistics.pstdev(x):.1f}"
    lines = ["| task | collaboration | seeds | n | before | after | by dataset, after |", "|---" * 7 + "|"]
    for (task, collab), reports in groups.items():
        seeds = ", ".join(str(r["seed"]) for r in reports)
        before, after = (spread([r[when]["strict"] for r in reports]) for when in ("before", "after"))
        parts = [f"{d} {spread([r['by_dataset'][d]['after']['strict'] for r in reports])}"
                 for d in reports[0]["by_dataset"]]
        n = reports[0]["n"]
        lines.append(f"| {task} | {collab} | {seeds} | {n} | {before} | {after} | {', '.join(parts)} |")
    return "\n".join(lines)


def load(folder, best=False):
    """The run in `folder` with its last (or best) checkpoint in place; raises ValueError with the mend."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run (no config.json): name a folder that train.py --out wrote")
    args = settings(folder)
    if args["device"] != "cpu" and not torch.cuda.is_available():
        args["device"] = "cpu"
    run = build(args, training=False)
    if best:
        checkpoint.load(folder / "best.safetensors", run.policy, run.router)
    elif checkpoint.load_last(folder, run.policy, run.router) is None:
        raise ValueError(
            f"{folder} has no checkpoint yet: let it train on with python train.py --resume --out {folder}")
    return run


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="*", help="folder of a run, as train.py --out wrote it; several for --table")
    p.add_argument("--from", dest="source", metavar="DIR", help="an export instead of a run")
    p.add_argument("--export", metavar="DIR", help="write LoRA, router and a model card for others to use")
    p.add_argument("--table", action="store_true", help="a Markdown table of finished runs")
    p.add_argument("--n", type=int, help="test problems (256; gsm8k: all 1,319)")
    p.add_argument(
        "--best", action="store_true", help="the checkpoint that was best on validation, not the last")
    p.add_argument(
        "--samples", type=int, default=0, help="also sample this many completions a problem and report pass@k"
    )
    p.add_argument("--ask", metavar="QUESTION", help="answer one question and show who is listened to")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv=None):
    """Returns the exit code: 0, or 2 with one sentence when what was asked for cannot be done."""
    try:
        a = parser().parse_args(argv)
        if bool(a.run) == bool(a.source) or (a.source and (a.best or a.table or a.export)):
            raise ValueError("name a RUN, or --from DIR (which goes without --best, --table and --export)")
        if a.table:
            print(table(a.run))
            return 0
        if len(a.run) > 1 or (a.n is not None and a.n < 1) or a.samples < 0:
            raise ValueError("one run at a time without --table; --n is at least 1 and --samples at least 0")
        run = export.load(a.source) if a.source else load(a.run[0], a.best)
        if a.export:
            export.write(run, a.run[0], a.export, evaluated=not a.best)
            print(f"exported to {a.export}; next: python eval.py --from {a.export}")
            return 0
        if a.ask is not None:
            ask(run, a.ask)
            return 0
        run.items["test"] = held_out(run.args, "test", a.n, whole=True)
        run.prepare(run.items["test"])
        report = measure(run, a.samples)
        show(report)
        if a.json:
            print(json.dumps(report))
        return 0
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        return excuse("eval.py", e)
    except SystemExit as e:  # argparse has said what is wrong
        return e.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
