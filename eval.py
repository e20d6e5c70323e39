"""
What was learned: accuracy on held-out problems, who is attended to, and whether that matters.

$ python eval.py runs/NAME                               # test problems, masking, swap, the picture run.png
$ python eval.py runs/NAME --samples 8                   # and pass@k, majority@k
$ python eval.py runs/NAME --aligned                     # after stage 0, before GRPO
$ python eval.py runs/NAME --ask "How much is 3 + 4 ="   # one question; --ask alone opens a prompt

"Before" is the policy alone, LoRA off and prefix off. Attention shows who is attended to; it is no proof that
it matters. So each expert is masked out (attention exactly 0) and the accuracy that this costs is measured;
and in the swap test every question comes with another one's states: which of the two does the answer follow?
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

from experts import write_whole
from rewards import Problem, extract, number
from rlvr import Dataset, by_expert, evaluate, rollout, test_report
from train import build, load_checkpoint, load_newest, load_problems, one_sentence, pick_device, saved_args

def main(argv=None):
    options = parse(argv)
    run = Path(options.run)
    args = saved_args(run)
    args.device = pick_device(options.device)
    policy, experts, router = build(args)
    if options.aligned:
        if not list(run.glob("aligned-*")):
            raise ValueError(f"{run} has no aligned weights: it had no stage 0, or is in it still")
        load_checkpoint(next(run.glob("aligned-*")), policy, router)
    else:
        state, _ = load_newest(run, policy, router)
        if not state["step"]:
            raise ValueError(f"{run} has no checkpoint of GRPO: go on with train.py --resume {run}, or see "
                             "--aligned")
    if options.ask is not None:
        return ask(policy, router, experts, args, options.ask)
    found = load_problems(args, "test", options.n or (1319 if args.task == "gsm8k" else None))
    data = Dataset(found, policy, experts, args)
    report = test_report(policy, router, data, args, experts)
    if router and data.H.numel() and len(data) > 1:
        report["swap"] = swap_test(policy, router, data, args)
    if options.samples:
        report["pass_at"], report["majority_at"] = sample_pass(policy, router, data, args, options.samples)
    show(report)
    name = "aligned" if options.aligned else "run"
    write_whole(run / f"eval-{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    print(f"picture: {picture(run, report, run / f'{name}.png')}")
    if options.json:
        print(json.dumps(report))

def parse(argv):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("run", help="folder of a run, as train.py --out wrote it")
    parser.add_argument("--n", type=int, help="test problems (default: as trained with; GSM8K: all 1,319)")
    parser.add_argument("--samples", type=int, default=0, help="completions a problem, for pass@k")
    parser.add_argument("--aligned", action="store_true", help="the policy after stage 0, before GRPO")
    parser.add_argument("--ask", nargs="?", const="", metavar="QUESTION", help="a question of yours, or many")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON, the last")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    if (options.n is not None and options.n < 1) or options.samples < 0:
        raise ValueError("--n must be at least 1, and --samples at least 0")
    if options.ask is not None and (options.n or options.samples or options.json):
        raise ValueError("--ask answers questions and measures nothing: leave --n, --samples and --json out")
    return options

def wilson(right, n, z=1.96):
    """95% interval of a share (Wilson 1927), honest for small n and near 0 and 1: 8 of 10 -> (0.49, 0.94)."""
    p = right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)

def swap_test(policy, router, data, args):
    """Every question with the states of the next one of its dataset: {"strict": share still right, "follows":
    share answered as the expert that is attended to most would answer the OTHER question, "n": of those where
    that is another answer than the right one}. A policy that reads follows the states."""
    partner = list(range(len(data)))
    for dataset in {problem.dataset for problem in data.problems}:
        places = [i for i, problem in enumerate(data.problems) if problem.dataset == dataset]
        for i, j in zip(places, places[1:] + places[:1]):
            partner[i] = j
    verdicts, texts, attention = evaluate(policy, router, data, args, H=data.H[partner])
    follows = []
    for i, j in enumerate(partner):
        told = data.problems[j].answer  # where there are no texts: what an expert that knows would say
        if data.texts and attention is not None:
            told = data.texts[int(by_expert(attention[i], data.owner).mean((0, 1)).argmax())][j]
        if told and told != data.problems[i].answer:
            answer = extract(texts[i], args.form, False)[0]
            follows.append(answer.strip() == told.strip())
    strict = sum(verdict.strict for verdict in verdicts) / len(verdicts)
    return dict(strict=strict, follows=sum(follows) / max(1, len(follows)), n=len(follows))

@torch.no_grad()
def sample_pass(policy, router, data, args, samples):
    """({k: mean pass@k}, {k: share with a right majority among the first k}) from `samples` completions of
    each problem at the training temperature. pass@k is 1 - C(n - c, k) / C(n, k) (2107.03374, equation 1)."""
    generator = torch.Generator(policy.embed.device).manual_seed(args.seed)
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    passed, majority = Counter(), Counter()
    size = max(1, 64 // samples)
    for start in range(0, len(data), size):
        batch = data.batch(range(start, min(start + size, len(data))))
        out = rollout(policy, router, batch, args, samples, args.temperature, generator)
        for texts, verdicts in zip(out.texts, out.verdicts):
            right = [verdict.strict for verdict in verdicts]
            answers = [extract(text, args.form, False)[0].strip() for text in texts]
            answers = [number(answer) or answer.casefold() for answer in answers]  # 18 and $18.00 are one
            for k in ks:
                passed[k] += 1 - math.comb(samples - sum(right), k) / math.comb(samples, k)
                counts = Counter(answer for answer in answers[:k] if answer != "")
                if counts:
                    majority[k] += right[answers.index(counts.most_common(1)[0][0])]
    return {k: passed[k] / len(data) for k in ks}, {k: majority[k] / len(data) for k in ks}

def show(report):
    print(f"{report['task']}: {report['n']} held-out problems, greedy, 95% intervals (Wilson)")
    for when in ("before", "after"):
        share = report[when]["strict"]
        low, high = report[when]["ci95"] = wilson(share * report["n"], report["n"])
        print(f"  {when:7} {share:6.1%} [{low:.1%}, {high:.1%}], lenient {report[when]['lenient']:.1%}")
    for dataset, rows in report["by_dataset"].items():
        print(f"  {dataset}, n {rows['n']}: {rows['before']:.1%} before, {rows['after']:.1%} after")
        shares = report.get("attention_by_dataset", {}).get(dataset, {})
        for name, share in shares.items():
            cost = ""
            if name in report["masked"]:
                cost = f"; masked out: {100 * (report['masked'][name][dataset] - rows['after']):+.1f} points"
            print(f"    attention to {name:24} {share:.2f}{cost}")
    if "swap" in report:
        swap = report["swap"]
        print(f"  with another problem's states {swap['strict']:.1%} is right, and {swap['follows']:.1%} of "
              f"{swap['n']} answers are what the expert attended to would say to the other problem")
    for k, share in report.get("pass_at", {}).items():
        print(f"  pass@{k} {share:.1%}, majority@{k} {report['majority_at'][k]:.1%}")

def ask(policy, router, experts, args, question):
    """One question, or a prompt that stays open until Ctrl-D: the answer, a bar for every expert, and what
    each expert itself would say."""
    if question == "" and not sys.stdin.isatty():
        raise ValueError("--ask has no question: write one behind it, or call it from a terminal")
    print(f"trained on {args.task}: about anything else it was never rewarded")
    while True:
        try:
            text = question or input("question (Ctrl-D ends): ").strip()
        except EOFError:
            return print()
        if text:
            answer_one(policy, router, experts, args, text)
        if question:
            return None

def answer_one(policy, router, experts, args, text):
    data = Dataset([Problem(question=text, answer="", split="test")], policy, experts, args, progress=False)
    _, texts, attention = evaluate(policy, router, data, args)
    print(texts[0].strip() or "(an empty answer)")
    if attention is None:
        return
    width = max(len(expert.name) for expert in experts)
    shares = by_expert(attention, data.owner).mean((0, 1, 2)).tolist()
    for e, (expert, share) in enumerate(zip(experts, shares)):
        words = f"  says {data.texts[e][0]!r}" if data.texts and data.texts[e][0] else ""
        print(f"  {expert.name:{width}} {'█' * round(40 * share):40} {share:.2f}{words}")

def picture(run, report, path):
    """run.png: the learning curve, attention by dataset over training, attention and masking at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    steps = [row["step"] for row in rows]
    smooth = [sum(r["reward"] for r in rows[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(rows))]
    axes[0, 0].plot(steps, smooth, label="reward in training, mean of 10 steps", color="0.6")
    val = [(row["step"], row["val"]) for row in rows if "val" in row]
    axes[0, 0].plot(*zip(*val), "o-", label="validation, greedy", color="#0072B2")
    axes[0, 0].axhline(report["before"]["strict"], ls="--", color="0.3", label="policy alone")
    axes[0, 0].set(xlabel="step of GRPO", ylabel="share right", ylim=(0, 1), title="What is learned")
    axes[0, 0].legend(fontsize=8)
    shares = report.get("attention_by_dataset")
    if not shares:
        for axis in axes.flat[1:]:
            axis.axis("off")
    else:
        names = list(next(iter(shares.values())))
        for dataset in shares:
            most = max(names, key=shares[dataset].get)
            curve = [row["attention_by_dataset"].get(dataset, {}).get(most) for row in rows]
            axes[0, 1].plot(steps, curve, label=f"{dataset}: {most}")
        axes[0, 1].axhline(1 / len(names), ls=":", color="0.3", label="even")
        axes[0, 1].set(xlabel="step of GRPO", ylabel="attention share", ylim=(0, 1.02),
                       title="The expert attended to most at the end")
        axes[0, 1].legend(fontsize=8)
        attention = [[shares[dataset][name] for name in names] for dataset in shares]
        heat(axes[1, 0], list(shares), names, attention, 1, "{:.2f}", "Attention on test problems")
        if report["masked"]:
            lost = [[100 * (report["by_dataset"][dataset]["after"] - report["masked"][name][dataset])
                     for name in names] for dataset in shares]
            heat(axes[1, 1], list(shares), names, lost, 100, "{:.0f}", "Points lost when it is masked out")
        else:
            axes[1, 1].axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

def heat(axis, datasets, names, values, top, style, title):
    """A labelled matrix, values[dataset][expert]."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set_yticks(range(len(datasets)), datasets)
    axis.set_title(title)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, style.format(value), ha="center", va="center",
                      color="white" if value > 0.6 * top else "black")

if __name__ == "__main__":
    sys.exit(one_sentence("eval.py", main))
