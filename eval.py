"""
What was learned: accuracy before and after on held-out problems, who was listened to, and what each expert
was worth.

    python eval.py runs/NAME                            the test problems, before and after, with 95%
    intervals
    python eval.py runs/NAME --samples 8                and pass@k, majority@k
    python eval.py runs/NAME --ask "How much is 17 + 25?"   one question, and a bar for every expert
    python eval.py runs/A runs/B runs/C --table         finished runs side by side, seeds put together
    python eval.py runs/NAME --ablate static zero       what replacing attention or states at test time costs
    python eval.py runs/NAME --probe                    what a linear map reads off the experts' states
    python eval.py runs/NAME --walk                     one problem from text to reward, in numbers
    python eval.py runs/A runs/B results/curves/*.json --figures   every picture of these
    python eval.py runs/NAME --export DIR               what was trained, for others: PEFT's format, a card
    python eval.py --from DIR                           an export in place of a run

"Before" is the policy alone: LoRA off and prefix off (what experts write in --collab text it reads already).
Attention shows who was listened to; it is no proof that it mattered. So each expert is also silenced (its
attention set to exactly 0, the others' renormalised) and the accuracy that this costs is measured on the same
problems.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch

import analysis
import checkpoint
import export
import figures
import ranks
from analysis import by_dataset, silence, table
from answers import extract, number
from rewards import Problem, guessing_floor
from rlvr import listen, rollout
from run import build, evaluate, excuse, held_out
from settings import settings
from stats import wilson


def score(verdicts):
    n, right = len(verdicts), sum(v.strict for v in verdicts)
    return dict(strict=right / n, lenient=sum(v.lenient for v in verdicts) / n, ci95=wilson(right, n))


def pass_at(k, n, c):
    """Chance that one of k completions is right, from c right among n: 1 - C(n-c, k) / C(n, k) (2107.03374,
    eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def measure(run, samples=0):
    """Everything eval reports on the run's test items, as one JSON-able dict."""
    items = run.items["test"]
    with run.policy.plain():
        before = evaluate(run, items, None)[0]
    after, _, attention = evaluate(run, items)
    names = [e.name for e in run.experts]
    report = dict(task=run.args["task"], n=len(items), seed=run.args["seed"], collab=run.args["collab"],
                  control=run.args["control"], read=run.args["read"],
                  floor=guessing_floor(items)[0], before=score(before), after=score(after))
    b, a = by_dataset(items, before), by_dataset(items, after)
    report["datasets"] = [p.dataset for p in items]
    report["right_before"], report["right"] = ([int(v.strict) for v in some] for some in (before, after))
    report["by_dataset"] = {d: dict(n=len(a[d]), before=score(b[d]), after=score(a[d])) for d in a}
    if attention is not None:
        heard = by_dataset(items, attention.mean((1, 2)))  # dataset -> [(N,)]
        rounded = lambda rows: [[round(x, 3) for x in row] for row in rows.tolist()]
        report["heard"] = rounded(attention.mean((1, 2)))  # (n, N)
        report["example"] = dict(question=items[0].question, answer=items[0].answer,
                                 attention=rounded(attention[0].mean(0)))  # (L, N)
        report["attention_by"] = {
            d: dict(zip(names, torch.stack(x).mean(0).tolist())) for d, x in heard.items()}
        report["silenced"] = {e: {d: score(x)["strict"] for d, x in by_dataset(items, v).items()}
                              for e, v in silence(run, items).items()}
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
    if "experts" in report:
        said = ", ".join(f"{e} {x['parameters'] / 1e6:.2f} M: {x['attention']:.2f}"
                         for e, x in report["experts"].items())
        print(f"  size and attention: {said}; Spearman {signed(report['size_spearman'])}")
    if "spearman" in report:
        x = report["spearman"]
        print(f"  attention's entropy and reward over {x['n']} steps: Spearman {signed(x['rho'])}; with "
              f"straight trends taken out {signed(x['detrended'])}")


def signed(rho):
    return "not defined" if rho is None else f"{rho:+z.2f}"


# -- commands
def finish(run, out):
    """The end of training: before and after on held-out problems, the picture, and what to try next."""
    report, rows = measure(run), analysis.metrics(out)
    if ranks.RANK:
        return 0
    report |= analysis.relations(run, report, rows)
    figures.figure(rows, report, out / "run.png")
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


def look(run, a):
    """What was asked about the test problems: printed, and returned as one JSON-able dict."""
    folder = Path(a.source or a.run[0])
    if a.walk:
        report = dict(walk=analysis.walk(run))
        print(report["walk"])
    elif a.ablate:
        report = analysis.ablate(run, a.ablate)
        print(analysis.ablation_table(report))
        if a.run and not a.best:  # beside eval.json, which is of the last checkpoint
            checkpoint.write_json(folder / "ablate.json", report)
    else:
        report = measure(run, a.samples)
        report |= analysis.relations(run, report, analysis.metrics(folder))
        show(report)
    return report


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
    p.add_argument("--figures", action="store_true", help="pictures of finished runs, or of results/curves/*")
    p.add_argument("--out", metavar="DIR", default="runs/figures", help="where --figures go [%(default)s]")
    p.add_argument("--ablate", nargs="+", metavar="KIND", help="replace attention or states at test time: "
                   "static, uniform, shuffle, zero, drop:NAME")
    p.add_argument("--probe", action="store_true", help="what a linear map reads off each expert's states")
    p.add_argument("--walk", action="store_true", help="one problem from text to reward, in numbers")
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
        if bool(a.run) == bool(a.source) or (a.source and (a.best or a.table or a.figures or a.export)):
            raise ValueError("name a RUN, or --from DIR (which goes without --best, --table, --figures and "
                             "--export)")
        if a.table or a.figures:
            print(*([table(a.run)] if a.table else figures.draw(a.run, Path(a.out))), sep="\n")
            return 0
        if len(a.run) > 1 or (a.n is not None and a.n < 1) or a.samples < 0:
            raise ValueError("one run at a time without --table or --figures; --n is at least 1, --samples 0")
        run = export.load(a.source) if a.source else load(a.run[0], a.best)
        if a.export:
            export.write(run, a.run[0], a.export, evaluated=not a.best)
            print(f"exported to {a.export}; next: python eval.py --from {a.export}")
            return 0
        if a.ask is not None:
            ask(run, a.ask)
            return 0
        if a.probe:
            report = dict(probe=analysis.probe(run))
            print(analysis.probe_table(report["probe"]))
        else:
            run.items["test"] = held_out(run.args, "test", a.n, whole=True)
            run.prepare(run.items["test"])
            report = look(run, a)
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
