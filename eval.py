"""
What was learned: accuracy on held-out problems, who is attended to, and whether that matters.

$ python eval.py runs/NAME                               # test problems, masking, swap, the picture run.png
$ python eval.py runs/NAME --aligned                     # after stage 0, before GRPO
$ python eval.py runs/NAME --ask "How much is 3 + 4 ="   # one question; --ask alone opens a prompt

"Before" is the policy alone, LoRA off and prefix off. Attention is no proof that an expert matters: so each
is masked out (attention exactly 0), and in the swap test every question has the states of another.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import fcntl
import json
import math
import shlex
import sys
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

from experts import pick_device, write_atomic
from rewards import Problem, extract, next_of_dataset, verify
from rlvr import RANK, Dataset, build, gather, load_checkpoint, load_newest, load_problems, rollout, share
from router import by_expert, masked_router

def main(argv=None):
    options = parse(argv)
    args, policy, experts, router = open_run(options.run, options.device, options.aligned)
    if options.ask is not None:
        return ask(policy, router, experts, args, options.ask)
    found = load_problems(args, "test", options.n or (1319 if args.task == "gsm8k" else None))
    data = Dataset(found, policy, experts, args)
    report = test_report(policy, router, data, args, experts)
    if data.H.numel() and len(data) > len({problem.dataset for problem in found}):
        report["swap"] = swap_test(policy, router, data, args)
    name = "aligned" if options.aligned else "run"
    show(report, options.run / f"eval-{name}.json")
    print(f"picture: {picture(options.run, report, options.run / f'{name}.png')}")
    if options.json:
        print(json.dumps(report))

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, as train.py --out wrote it")
    parser.add_argument("--n", type=int, help="test problems (default: as trained with; GSM8K: all 1,319)")
    parser.add_argument("--aligned", action="store_true", help="the policy after stage 0, before GRPO")
    parser.add_argument("--ask", nargs="?", const="", metavar="QUESTION", help="a question of yours, or many")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON, the last")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    if options.n is not None and options.n < 1:
        raise ValueError("--n must be at least 1")
    if options.ask is not None and (options.n or options.json):
        raise ValueError("--ask answers questions and measures nothing: leave --n and --json out")
    return options

# -- Measured the same way in training and here

@torch.no_grad()
def evaluate(policy, router, data, args, rows=None, H=None):
    """Greedy answers to all problems, or those at `rows`: verdicts [n], texts [n], attention (n, heads, L,
    experts) or None. router: any function of H; None: no prefix. H (n, N, D): read in place of the data's."""
    mine = share(range(len(data)) if rows is None else rows)
    # more rows would need more memory than a rollout
    size = min(128 if policy.embed.is_cuda else 64, args.batch * args.group)
    verdicts, texts, attention = [], [], []
    for i in tqdm(range(0, len(mine), size), desc="answers", leave=False, disable=True if RANK else None):
        batch = data.batch(mine[i:i + size])
        if H is not None:
            batch.H = H[mine[i:i + size]].to(batch.H)
        out = rollout(policy, router, batch, args, 1, temperature=0)
        verdicts += [row[0] for row in out.verdicts]
        texts += [row[0] for row in out.texts]
        if out.attention is not None:
            attention.append(by_expert(out.attention, data.owner).cpu())
    verdicts, texts, attention = (sum(parts, []) for parts in zip(*gather((verdicts, texts, attention))))
    return verdicts, texts, torch.cat(attention) if attention else None

def strict(verdicts):
    return torch.tensor([float(verdict.strict) for verdict in verdicts])

def accuracy(verdicts):
    return strict(verdicts).mean().item()

def by_dataset(datasets, values, names=None):
    """{dataset: mean of its values}; values (n,), or (n, experts) for {dataset: {expert: mean}}."""
    means = {}
    for dataset in sorted(set(datasets)):
        mean = values[[i for i, other in enumerate(datasets) if other == dataset]].mean(0)
        means[dataset] = dict(zip(names, mean.tolist())) if names else mean.item()
    return means

@torch.no_grad()
def read_back(out, policy, router, data, args, experts, n=64):
    """What stage 0 is judged by, on new problems: the share of each expert's texts that is read back, and the
    same with the states of another problem. Greedy; to align.jsonl and the console."""
    for e, expert in enumerate(experts):
        rows = [i for i, text in enumerate(data.texts[e][:n]) if text]
        if not rows:
            continue
        mask = data.reading_mask(e)
        masked = (lambda H: router(H, mask)) if router else None
        expected = [policy.tokenizer.decode(data.targets[e][i], skip_special_tokens=True) for i in rows]
        row = dict(expert=expert.name)
        for key, H in (("read_back", data.H), ("shuffled", data.H.roll(1, 0))):
            answers = evaluate(policy, masked, data, args, rows, H)[1]
            row[key] = sum(a.strip() == b.strip() for a, b in zip(answers, expected)) / len(rows)
        append(out / "align.jsonl", row | dict(n=len(rows)))
        tqdm.write(f"stage 0: {expert.name}: {row['read_back']:.0%} of {len(rows)} new texts read back, "
                   f"{row['shuffled']:.0%} with other problems' states")

def test_report(policy, router, data, args, experts):
    """Accuracy before and after, attention, and accuracy with each expert masked out: a dict for JSON."""
    names, datasets = [expert.name for expert in experts], [problem.dataset for problem in data.problems]
    score = lambda verdicts: dict(
        strict=accuracy(verdicts), lenient=sum(verdict.lenient for verdict in verdicts) / len(verdicts),
        ci95=wilson(strict(verdicts).sum().item(), len(verdicts)))
    with policy.lora_disabled():
        before = evaluate(policy, None, data, args)[0]
    after, _, attention = evaluate(policy, router, data, args)
    alone, now = by_dataset(datasets, strict(before)), by_dataset(datasets, strict(after))
    rows = {d: dict(n=datasets.count(d), before=alone[d], after=now[d]) for d in now}
    report = dict(task=args.task, level=args.level, n=len(data), seed=args.seed, collab=args.collab,
                  control=args.control, align=args.align, before=score(before), after=score(after),
                  by_dataset=rows, right=strict(after).int().tolist(), masked={})
    if attention is not None:
        report["attention_by_dataset"] = by_dataset(datasets, attention.mean((1, 2)), names)
        for e, name in enumerate(names if len(names) > 1 else ()):
            masked = evaluate(policy, masked_router(router, data.owner, e), data, args)[0]
            report["masked"][name] = by_dataset(datasets, strict(masked))
    return report

def show(report, path):
    """Print the report, and keep it as JSON at `path`."""
    print(f"\n{report['n']} held-out problems, greedy, 95% intervals (Wilson)")
    for when in ("before", "after"):
        low, high = report[when]["ci95"]
        print(f"  {when:7} {report[when]['strict']:6.1%} [{low:.1%}, {high:.1%}], "
              f"lenient {report[when]['lenient']:.1%}")
    for dataset, rows in report["by_dataset"].items():
        line = f"  {dataset[:22]:22} {rows['before']:6.1%} -> {rows['after']:6.1%} of {rows['n']}"
        parts = []
        for name, attended in report.get("attention_by_dataset", {}).get(dataset, {}).items():
            parts.append(f"{name} {attended:.2f}")
            if name in report["masked"]:
                parts[-1] += f" ({100 * (report['masked'][name][dataset] - rows['after']):+.0f})"
        line += f"; attention (masked out): {', '.join(parts)}" if parts else ""
        print(textwrap.fill(line, 100, subsequent_indent=" " * 24))
    if "swap" in report:
        swap = report["swap"]
        print(f"  with another problem's states {swap['strict']:.1%} is right, and {swap['follows']:.1%} of "
              f"{swap['n']} answers are the other problem's")
    if RANK == 0:
        write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())

# -- What train.py shows and writes down

def bar(items, name, done, steps):
    return tqdm(items, desc=name, initial=done, total=steps, disable=True if RANK else None)

def log_alignment(out, step, part, loss):
    if step % 25 == 1:
        append(out / "align.jsonl", dict(align=step, part=part, loss=loss))
        tqdm.write(f"stage 0, step {step:4d}, {part:7} | loss {loss:.3f}")

def show_gate(policy, experts, data, args, n=64):
    """Before minutes are spent: how many will it be, and is there anything to attend to? What experts say to
    a few problems must be right more often than what the policy says alone, by 15 points on a dataset."""
    problems = data["val"].problems[:n]
    datasets = [problem.dataset for problem in problems]
    with policy.lora_disabled():
        verdicts = evaluate(policy, None, data["val"], args, range(len(problems)))[0]
    show_time(policy, data, args, len(experts))
    alone = by_dataset(datasets, strict(verdicts))
    print(f"  alone      the policy is right in {percents(alone)}")
    gains = []
    for expert, texts in zip(experts, data["val"].texts):
        verdicts = [verify(text, problem, "plain") for text, problem in zip(texts, problems)]
        own = by_dataset(datasets, strict(verdicts))
        gains += [own[dataset] - alone[dataset] for dataset in own]
        if expert.writes:
            print(f"  says       {expert.name} is right in {percents(own)}")
    for e, expert in enumerate(experts if data["val"].H.numel() else ()):
        H = data["val"].H[:, data["val"].owner == e].float()  # (n, K, D)
        if len(H) > 1 and (H - H[0]).abs().mean() < 0.01 * H.abs().mean():
            print(f"  warning    {expert.name}'s states are the same for all problems: nothing to read")
    if gains and max(gains) < 0.15:
        print("  warning    no expert's words beat the policy by 15 points anywhere: little to attend to")

def show_time(policy, data, args, n_experts):
    """A forecast from one rollout. A gradient pass takes 2.5 times as long, 3.3 with the reference (less
    where equal rewards are skipped). Where no prompt is shared, a greedy answer takes 3 times a sampled one,
    reading 1.5 times the rollout's time."""
    batch = data["train"].batch(share(range(args.batch)))
    seconds = rollout(policy, None, batch, args, args.group, args.temperature).seconds
    reading = args.align * seconds * 1.5 * args.align_batch / args.batch
    grpo = args.steps * seconds * (1 + args.epochs * (3.3 if args.beta else 2.5))
    answers = args.test * (2 + n_experts) + args.val * (args.steps // args.eval_every)
    tests = answers * 3 * seconds / (args.batch * args.group)
    print(f"  time       about {(reading + grpo + tests) / 60:.1f} minutes: reading {reading / 60:.1f}, "
          f"GRPO {grpo / 60:.1f}, tests {tests / 60:.1f}")

def percents(shares):
    return ", ".join(f"{dataset} {share:.0%}" for dataset, share in shares.items())

def show_report(args, report):
    """What a run ends with: the report, and what to try next."""
    show(report, Path(args.out) / "eval.json")
    out = shlex.quote(args.out)
    print(f"next:\n  python eval.py {out}\n  python eval.py {out} --ask")
    if args.control not in ("shuffled", "noise"):  # with more steps these would draw other states
        print(f"  python train.py --resume {out} --steps {2 * args.steps}")

# -- What only this file measures

def wilson(right, n, z=1.96):
    """95% interval of a share (Wilson 1927), honest for small n and near 0 and 1: 8 of 10 -> (0.49, 0.94)."""
    p = right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)

def swap_test(policy, router, data, args):
    """Every question with the states of the next one of its dataset: {"strict": share still right, "n": how
    many questions have another gold answer than what the expert attended to most says to that next one,
    "follows": share of these n answered so}. One problem alone of its dataset is left out."""
    partner = next_of_dataset(data.problems)
    rows = [i for i, j in enumerate(partner) if i != j]
    verdicts, texts, attention = evaluate(policy, router, data, args, rows, H=data.H[partner])
    follows = []
    for row, i in enumerate(rows):
        j = partner[i]
        expected = data.problems[j].answer  # without texts or attention: what an expert that knows would say
        if data.texts and attention is not None:
            expected = data.texts[int(attention[row].mean((0, 1)).argmax())][j]
        if expected and expected != data.problems[i].answer:
            answer = extract(texts[row], args.form, False)[0]
            follows.append(answer.strip() == expected.strip())
    return dict(strict=accuracy(verdicts), follows=sum(follows) / max(1, len(follows)), n=len(follows))

def ask(policy, router, experts, args, question):
    """One question, or a prompt that stays open until Ctrl-D."""
    if question == "" and not sys.stdin.isatty():
        raise ValueError("--ask has no question: write one behind it, or call it from a terminal")
    if args.control not in ("none", "untrained"):
        print(f"--control {args.control} needs other problems; one question is given its own states")
    print(f"trained on {args.task}: about anything else it was never rewarded")
    if question:
        return answer_one(policy, router, experts, args, question)
    with contextlib.suppress(EOFError):
        while True:
            text = input("question (Ctrl-D ends): ").strip()
            try:
                if text:
                    answer_one(policy, router, experts, args, text)
            except ValueError as error:  # too long; the next one may be shorter
                print(error)

def answer_one(policy, router, experts, args, text):
    """The answer, a bar for every expert, and what each expert itself would say."""
    data = Dataset([Problem(question=text, answer="", split="test")], policy, experts, args, progress=False)
    _, texts, attention = evaluate(policy, router, data, args)
    print(texts[0].strip() or "(an empty answer)")
    shares = [] if attention is None else attention.mean((0, 1, 2)).tolist()
    for e, (expert, attended) in enumerate(zip(experts, shares)):
        words = f"  says {data.texts[e][0]!r}" if data.texts and data.texts[e][0] else ""
        print(f"  {expert.name:28} {'█' * round(40 * attended):40} {attended:.2f}{words}")

def picture(run, report, path):
    """run.png: the learning curve, attention by dataset over training, attention and masking at the end."""
    from matplotlib.figure import Figure
    rows = read_lines(run / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(10, 7), layout="constrained")
    (learning, over_time), (at_end, masked_out) = figure.subplots(2, 2)
    rewards = [row["reward"] for row in rows]
    learning.plot(steps, rewards, label="reward in training", color="0.6", linewidth=1)
    val = {row["step"]: row["val"] for row in rows if "val" in row}
    learning.plot(list(val), list(val.values()), "o-", label="validation, greedy", color="#0072B2")
    learning.axhline(report["before"]["strict"], ls="--", color="0.3", label="policy alone")
    learning.set(xlabel="step of GRPO", ylabel="share right", ylim=(0, 1), title="What is learned")
    learning.legend(fontsize=8)
    attention = report.get("attention_by_dataset", {})
    for dataset, shares in attention.items():
        most = max(shares, key=shares.get)
        curve = [row["attention_by_dataset"].get(dataset, {}).get(most) for row in rows]
        over_time.plot(steps, curve, label=f"{dataset}: {most}")
    if attention:
        over_time.axhline(1 / len(shares), ls=":", color="0.3", label="even")
        over_time.set(xlabel="step of GRPO", ylabel="attention share", ylim=(0, 1.02),
                     title="The expert attended to most at the end")
        over_time.legend(fontsize=8)
        heat(at_end, attention, 1, "{:.2f}", "Attention on test problems")
    if report["masked"]:
        points = {dataset: {name: 100 * (row["after"] - masked[dataset])
                            for name, masked in report["masked"].items()}
                  for dataset, row in report["by_dataset"].items()}
        heat(masked_out, points, 100, "{:.0f}", "Points lost when it is masked out")
    for axis in figure.axes:
        axis.set_visible(axis.has_data())
    figure.savefig(path, dpi=110)
    return path

def heat(axis, rows, top, style, title):
    """A labelled matrix; rows: {dataset: {expert: value}}."""
    axis.imshow([list(row.values()) for row in rows.values()], cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_title(title)
    for i, row in enumerate(rows.values()):
        axis.set_xticks(range(len(row)), list(row), rotation=20, ha="right")
        for j, value in enumerate(row.values()):
            axis.text(j, i, style.format(value), ha="center", va="center",
                      color="white" if value > 0.6 * top else "black")

# -- A run's folder, and what is said when something is wrong

def read_config(folder):
    """config.json of the run in `folder`: {"args": its settings, "ranks": ...}."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json): name a folder that train.py wrote")
    try:
        config = json.loads(path.read_text())
        return dict(args=dict(config["args"]), ranks=int(config["ranks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error

def damaged(folder, error):
    return ValueError(f"{folder}/config.json is damaged, or of another version, start anew ({error})")

def open_run(folder, device="auto", aligned=False):
    """(args, policy, experts, router) of a run as GRPO or, `aligned`, stage 0 left it."""
    args = argparse.Namespace(**read_config(folder)["args"])
    args.device = pick_device(device)
    try:
        policy, experts, router = build(args)
    except (AttributeError, TypeError) as error:
        raise damaged(folder, error) from error
    if aligned:
        found = list(Path(folder).glob("aligned-*"))
        if not found:
            raise ValueError(f"{folder} has no aligned weights: it had no stage 0, or is in it still")
        load_checkpoint(found[0], policy, router)
    elif not load_newest(Path(folder), policy, router)[0]["step"]:
        raise ValueError(f"{folder} has no checkpoint of GRPO yet: go on with train.py --resume {folder}")
    return args, policy, experts, router

def append(path, row):
    if RANK == 0:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

def read_lines(path):
    """The rows of a .jsonl file, [] if there is none; a torn one, that a killed process left, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows

def drop_rows(path, state):
    """Drop the rows that are newer than the checkpoint: they are made again."""
    kept = [row for row in read_lines(path)
            if row.get("step", 0) <= state["step"] and row.get("align", 0) <= state["align"]
            and (state["aligned"] or "read_back" not in row)]
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in kept).encode())

@contextlib.contextmanager
def one_process(out):
    """Only one process trains in a folder. The kernel drops the lock with its process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in {out}: wait, or choose another --out") from None
        for torn in out.glob("*.part"):  # a file that was being written when a process was killed
            torn.unlink()
        yield

def one_sentence(program, run):
    """Call run(); returns the exit code. What a user can mend is said in one sentence, a bug is raised."""
    try:
        run()
        return 0
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; what was read and the last checkpoint are kept", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse has said what is wrong
        return error.code
    except OSError as error:  # a full disk, a folder that may not be written, another rank that is gone
        message = f"{error}: mend that and start again (train.py: with --resume); what was saved is complete"
    except ValueError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message = "out of memory: take smaller models, or train with a lower --batch, --group or --max_new"
    print(f"{program}: {message}", file=sys.stderr)
    return 2

def out_of_memory(error):
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")  # every device has its own
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

if __name__ == "__main__":
    sys.exit(one_sentence("eval.py", main))
