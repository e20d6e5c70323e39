"""
What a finished run can still be asked: does it matter who was listened to, what did the experts' states hold,
and is a difference more than chance?

    measured on the same problems   the run as trained, and with its attention or states replaced (`ablate`)
    asked of the experts            can a linear map read the answer off their states at all? (`probe`)
    computed from files alone       `records` of runs, their `table`, how two series go together (`spearman`)

Differences are paired: the same problems on both sides, so what makes a problem easy or hard cancels out.
"""

import json
import statistics
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from answers import number
from collab import ROUTED, others
from experts import Expert, read, read_json
from rewards import TooFew
from rlvr import advantages, listen, rollout
from run import evaluate, held_out
from stats import interval, paired, spearman, together

KINDS = ("static", "uniform", "shuffle", "zero")  # and drop:NAME


def relations(run, report, rows):
    """What attention goes together with: reward over the steps (`spearman`), the size of experts."""
    result = {}
    if report.get("heard"):
        mean = np.mean(report["heard"], 0).tolist()
        sizes = [e.params for e in run.experts]
        result["experts"] = {e.name: dict(parameters=n, attention=x)
                             for e, n, x in zip(run.experts, sizes, mean)}
        result["size_spearman"] = spearman(sizes, mean)
        if rows:
            of = lambda key: [r[key] for r in rows]
            result["spearman"] = together(of("step"), of("attention_entropy"), of("reward"))
    return result


def by_dataset(items, values):
    """dataset -> the values of its items, in the order of first appearance."""
    groups = {}
    for problem, value in zip(items, values):
        groups.setdefault(problem.dataset, []).append(value)
    return groups


# -- replaced at test time
def without(run, name):
    """The run's router with that expert absent. Raises ValueError where that leaves nobody."""
    names = [e.name for e in run.experts]
    if name not in names or len(names) < 2:
        raise ValueError(f"{name} cannot be dropped: name one of at least two experts ({', '.join(names)})")
    mask = torch.tensor([other != name for other in names], device=run.policy.embed.device)
    return lambda H: run.router(H, mask)


def silence(run, items):
    """expert -> verdicts on the same items with that expert absent. {} where there are not two experts."""
    names = [e.name for e in run.experts]
    return {n: evaluate(run, items, without(run, n))[0] for n in (names if len(names) > 1 else ())}


def shuffled(run, items):
    """The run, each of these problems with the states of another one of them."""
    some = list({p.question: p for p in items}.values())
    rows = [run.rows[p.question] for p in some]
    moved = {p.question: rows[i] for p, i in zip(some, others(some, run.args["seed"]))}
    return replace(run, rows=run.rows | moved)


@torch.no_grad()
def usual_attention(run):
    """Mean attention (heads, L, N) over the problems that the run was trained on."""
    seen, total = run.items["train"][:run.args["steps"] * run.args["batch"]], 0
    run.prepare(seen)
    for i in range(0, len(seen), 256):
        total = total + run.router(run.batch(seen[i:i + 256]).H)[1].sum(0)
    return total / len(seen)


def stand_in(run, kind):
    """(run, function of H) for `evaluate`, with `kind` in place of what the run would do; see README.
    Raises ValueError for what makes no sense for its way to collaborate."""
    way, named = run.args["collab"], kind.startswith("drop:")
    if kind not in KINDS and not named:
        raise ValueError(f"--ablate {kind} is unknown: choose {', '.join(KINDS)} or drop:NAME")
    if run.router is None or (way not in ROUTED and kind != "zero"):
        raise ValueError(f"--collab {way} has nothing that --ablate {kind} could replace: use a soft run")
    if way == "hard" and kind in ("static", "uniform"):
        raise ValueError(f"--collab hard hears one expert, --ablate {kind} has no attention to spread: use "
                         "shuffle, zero or drop:NAME")
    if named:
        return run, without(run, kind[5:])
    if kind == "zero":  # the neutral vector in every place: a prefix that says nothing
        return run, lambda H: (torch.zeros_like(run.router(H)[0]), None)
    if kind == "shuffle":
        return shuffled(run, run.items["test"]), run.router
    A = usual_attention(run) if kind == "static" else torch.tensor(1 / len(run.experts))
    return run, lambda H: run.router(H, attention=A)


def ablate(run, kinds):
    """What each kind costs on the run's test items, in all and by dataset: see `paired`; and `right` by item.

    static   the attention is the mean over the training prompts, by head and latent, whatever the problem
    uniform  every expert is listened to alike      shuffle  the states are another test problem's
    zero     the context tokens are neutral         drop:NAME  that expert is absent
    """
    items, ways = run.items["test"], {kind: stand_in(run, kind) for kind in kinds}
    strict = lambda run, router: [int(v.strict) for v in evaluate(run, items, router)[0]]
    trained, result = strict(run, run.router), {}
    for kind, way in ways.items():
        right = strict(*way)
        groups = by_dataset(items, zip(trained, right))
        result[kind] = paired(trained, right) | dict(
            right=right, by_dataset={d: paired(*zip(*pairs)) for d, pairs in groups.items()})
    return dict(right=trained, kinds=result)


def ablation_table(result):
    """Markdown, a row for every kind and dataset, in percent and points."""
    lines = ["| replaced | problems | n | as trained | ablated | change, 95% | McNemar p |", "|---" * 7 + "|"]
    for kind, whole in result["kinds"].items():
        parts = {"all": whole} | (whole["by_dataset"] if len(whole["by_dataset"]) > 1 else {})
        lines += [f"| {kind} | {d} | {x['n']} | {x['trained']:.1%} | {x['ablated']:.1%} | "
                  f"{points(x['difference'], x['ci95'])} | {x['p']:.2g} |" for d, x in parts.items()]
    return "\n".join(lines)


def points(difference, ci):
    return f"{100 * difference:+z.1f} [{100 * ci[0]:+z.1f}, {100 * ci[1]:+z.1f}]"


# -- what a state tells
def classes(answers, common=10):
    """What is asked of an answer: of whole numbers two digits and the sign, else which of the `common` most
    frequent answers it is (None: another). name -> a class for each answer."""
    values = [number(a) for a in answers]
    if all(v is not None and v.denominator == 1 for v in values):
        result = {"ones digit": [abs(v) % 10 for v in values],
                  "tens digit": [abs(v) // 10 % 10 for v in values], "sign": [v < 0 for v in values]}
        return {name: x for name, x in result.items() if len(set(x)) > 1}
    usual = {a for a, _ in Counter(answers).most_common(common)}
    return {"answer": [a if a in usual else None for a in answers]}


def linear(X, y, held, truth):
    """Share right on X (n, D) of classes y (n,), and on `held` of classes `truth`, of a ridge regression on
    the classes' indicators fitted to X; its strength is chosen on the last fifth of X."""
    mean, spread = X.mean(0), X.std(0)
    scale = spread.clamp(min=1e-6 + 0.01 * spread.max())  # a dimension that hardly moves is not blown up
    X, held = (X - mean) / scale, (held - mean) / scale
    Y, cut, strengths = F.one_hot(y).float(), len(X) * 4 // 5, [10.0 ** k for k in range(-1, 6)]

    def fits(X, Y, strengths):
        U, S, V = torch.linalg.svd(X, full_matrices=False)  # one decomposition for every strength
        return [((V.T * (S / (S * S + k))) @ (U.T @ (Y - Y.mean(0))), Y.mean(0)) for k in strengths]

    score = lambda fit, X, y: ((X @ fit[0] + fit[1]).argmax(-1) == y).float().mean().item()
    tried = [score(fit, X[cut:], y[cut:]) for fit in fits(X[:cut], Y[:cut], strengths)]
    (fit,) = fits(X, Y, [strengths[tried.index(max(tried))]])
    return score(fit, X, y), score(fit, held, truth)


def probe(run, train=900, held=200):
    """What a linear map can read of the answer in each expert's state, by layer and read: rows of dataset,
    target, expert, layer, of (the expert's layers), read, train and held (shares right on training and
    validation problems), chance (on these, of the commonest training class), n (of these). At most `train`
    and `held` problems of a dataset. Raises ValueError for a run without states."""
    if run.args["collab"] not in ROUTED:
        raise ValueError(f"--collab {run.args['collab']} reads no expert's state: --probe a soft or hard run")
    known, result = by_dataset(run.items["train"], run.items["train"]), []
    try:
        val = held_out(run.args, "val", held * len(known))
    except TooFew as few:
        val = held_out(run.args, "val", few.available)
    for dataset, new in by_dataset(val, val).items():
        old, new = list({p.question: p for p in known[dataset]}.values())[:train], new[:held]
        targets = classes([p.answer for p in old + new])
        for e, k, how in [(e, k, how) for e in run.experts for k in depths(e) for how in
                          ("last", "first", "mean")]:
            e = Expert(e.source, read=how, layer=k, device=e.device, untrained=e.untrained)
            X = read([e], [[run.expert_text(p, e) for p in old + new]], run.args["cache"])[:, 0].float()
            for target, said in targets.items():
                y = torch.tensor([sorted(set(said) - {None}).index(s) if s is not None else -1 for s in said])
                mine, theirs = ([i for i in part if y[i] >= 0] for part in
                                (range(len(old)), range(len(old), len(y))))
                chance = (y[theirs] == y[mine].mode().values).float().mean().item()
                fit, right = linear(X[mine], y[mine], X[theirs], y[theirs])
                result.append(dict(dataset=dataset, target=target, expert=e.name, layer=k, of=e.layers,
                                   read=how, train=fit, held=right, chance=chance, n=len(theirs)))
    return result


def depths(expert):
    """The embedding, a quarter, half and three quarters of the way, the last layer."""
    return sorted({round(expert.layers * q / 4) for q in range(5)})


def probe_table(result):
    """Markdown: held-out accuracy, the training problems' in brackets."""
    cells, columns = {("most frequent class", "", ""): {}}, {}
    for r in result:
        column, row = f"{r['dataset']}, {r['target']}", (r["expert"], f"{r['layer']} of {r['of']}", r["read"])
        columns[column] = f"{r['chance']:.0%}, n = {r['n']}"
        cells.setdefault(row, {})[column] = f"{r['held']:.0%} ({r['train']:.0%})"
    cells["most frequent class", "", ""] = columns
    head = [["expert", "layer", "read", *columns], ["---"] * (3 + len(columns))]
    rows = [[*row, *(said[c] for c in columns)] for row, said in cells.items()]
    lines = ["| " + " | ".join(row) + " |" for row in head + rows]
    return "\n".join(lines) + "\n\nLinear probe: share right on held-out problems (on training problems)."


# -- from files alone
def way(record):
    """Which group a run belongs to, beside its task; a file of results/curves knows it."""
    if "way" in record:
        return record["way"]
    more = (record.get("control", "none"), record.get("read", "last"))
    return ", ".join([record["collab"], *(word for word in more if word not in ("none", "last"))])


def records(paths):
    """For each folder of a finished run or file of results/curves what eval.measure reports, and curve (rows
    by step) and ablate; of a file, what it holds."""
    found = []
    for path in map(Path, paths):
        r = read_json(path / "eval.json" if path.is_dir() else path)
        if not r:
            raise ValueError(f"{path} holds no finished run (no eval.json): let it finish first")
        if path.is_dir():
            r |= dict(curve=metrics(path), ablate=read_json(path / "ablate.json"))
        elif "after" not in r:
            parts = {d: [i for i, x in enumerate(r["datasets"]) if x == d] for d in r["datasets"]}
            share = lambda key, of: dict(strict=sum(r[key][i] for i in of) / len(of))
            both = lambda of: dict(n=len(of), before=share("right_before", of), after=share("right", of))
            r |= both(range(len(r["right"]))) | dict(by_dataset={d: both(of) for d, of in parts.items()})
        found.append(dict(collab=r.get("mode")) | r)
    return found


def metrics(folder):
    """The rows of a run's metrics.jsonl, [] where there is none."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def grouped(found):
    """(task, way) -> its runs."""
    groups = {}
    for r in found:
        groups.setdefault((r["task"], way(r)), []).append(r)
    return groups


def above(runs, singles):
    """The paired difference of runs from the single runs of the same seeds; "" where items are not known."""
    alone = {r["seed"]: r.get("right", []) for r in singles}
    D = [np.subtract(r["right"], alone[r["seed"]]) for r in runs
         if r.get("right") and len(r["right"]) == len(alone.get(r["seed"], []))]
    D = [d for d in D if len(d) == len(D[0])]
    return f"{points(np.mean(D), interval(D))}, {len(D)} seeds" if D else ""


def table(paths):
    """Markdown, a row for every (task, collab, control, read): accuracies in percent as mean ± population
    deviation over seeds; the paired difference from single in points with its 95% interval."""
    spread = lambda x: f"{100 * statistics.mean(x):.1f} ± {100 * statistics.pstdev(x):.1f}"
    lines = ["| task | collaboration | seeds | n | before | after | by dataset, after | above single, 95% |",
             "|---" * 8 + "|"]
    groups = grouped(records(paths))
    for (task, how), runs in groups.items():
        before, after = (spread([r[when]["strict"] for r in runs]) for when in ("before", "after"))
        parts = ", ".join(f"{d} {spread([r['by_dataset'][d]['after']['strict'] for r in runs])}"
                          for d in runs[0]["by_dataset"])
        more = above(runs, groups.get((task, "single"), [])) if how != "single" else ""
        seeds, n = ", ".join(str(r["seed"]) for r in runs), runs[0]["n"]
        lines.append(f"| {task} | {how} | {seeds} | {n} | {before} | {after} | {parts} | {more} |")
    return "\n".join([*lines, "", "Percent, mean ± population standard deviation over seeds; above single: "
                      "points, paired by problem; problems by bootstrap, seeds by Student's t."])


# -- one problem from text to reward
@torch.no_grad()
def walk(run):
    """One test problem, the first of 32 on which the sampled group does not agree, from text to reward with
    the run's own numbers; plain text of at most 110 columns."""
    for problem in run.items["test"][:32]:
        batch = run.batch([problem])
        generator = torch.Generator(run.args["device"]).manual_seed(run.args["seed"])
        out = rollout(run.policy, run.router, batch, run.tokenizer, run.verify, run.args["group"],
                      run.args["max_new"], run.args["temperature"], generator)
        if out.rewards.std(correction=0) > 0:
            break
    lines = [f"A {problem.dataset} problem, held out of training; its answer is {problem.answer!r}."]
    say = lambda text: lines.extend(textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    "))
    say(f"the policy reads {len(run.ids[problem.question])} tokens: {run.policy_text(problem)!r}")
    for e in run.readers:
        text = run.expert_text(problem, e)
        say(f"{e.name} (width {e.width}) reads {len(e.tokenize([text])[0])} tokens: {text!r}")
    context, A = listen(run.router, batch.H)
    if A is not None:
        say(f"states H {tuple(batch.H.shape)}: one vector of each, padded with zeros to the widest")
        say(f"attention A {tuple(A.shape)}: heads, latents, experts; mean over heads, by latent and in all:")
        for e, row in zip(run.experts, A[0].mean(0).T.tolist()):
            shown, share = " ".join(f"{x:.2f}" for x in row[:12]), sum(row) / len(row)
            say(f"{e.name[:20]:20} {shown} all {share:.2f} {'█' * round(10 * share)}")
    if context is not None:
        sizes = context[0].float().square().mean(-1).sqrt().tolist()
        say(f"prefix C {tuple(context.shape)}: vectors before the prompt, each this far from neutral, in "
            "spreads of the policy's embeddings: " + " ".join(f"{x:.2f}" for x in sizes))
    how = "reward - mean" if run.args["dr"] else "(reward - mean) / spread"
    mean, spread = out.rewards.mean().item(), out.rewards.std(correction=0).item()
    say(f"{len(out.texts[0])} completions sampled at temperature {run.args['temperature']:g}; mean reward "
        f"{mean:.3f}, spread {spread:.3f}; advantage {how}:")
    gained = advantages(out.rewards, not run.args["dr"])[0].tolist()
    rows = zip(out.texts[0], out.verdicts[0], out.rewards[0].tolist(), gained)
    for text, v, reward, advantage in rows:
        said = repr(text if len(text) <= 44 else "... " + text[-40:])[:50]
        lines.append(f"    {said:50} {v.reason:12} reward {reward:.1f}   advantage {advantage:+z.2f}")
    return "\n".join(lines)
