"""
The study: which runs, made by one command, a row of results each.

    python study.py                       all of it on the embedded pool; stopped, it goes on where it was
    python study.py --quick               the headline in half an hour: four ways on the mix, two seeds
    python study.py --list                the plan, and what of it is done
    python study.py --block rate pilot    some blocks
    python study.py --real FOLDER         real models: the folders named in REAL below
    python study.py --report              tables and verdicts as Markdown; --readme puts them into README.md,
                                          with results/walk.txt, and draws results/figures

A run is one train.py with a command line of its own. It leaves a row in results/study.jsonl (a failure too:
after is null, and --retry tries again) and results/curves/ID.json: learning curve, attention, and who was
heard and what was right on every test item. claims.py judges from these two alone.
"""
import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

from claims import SPECIALIST, report

HERE = Path(__file__).resolve().parent
RESULTS, RUNS, WIDE = HERE / "results", Path("runs/study"), "runs/study/wide"  # runs: as commands name them

# -- the plan
CHAIN = "--task chain_sum --level min_terms={},max_terms={},min_digits=1,max_digits={}"
TASKS = {  # logic and primes: 12 a step, as in the mix; of primes there are 2,500 different ones to train on
    "mix": "--pool tiny --task arithmetic+logic+algorithmic --batch 36",
    "arithmetic": "--pool tiny --task arithmetic --batch 36",
    # 4 to 6 terms: every piece is in all vocabularies; the arithmetic expert, taught 4, is right in 37%
    "arithmetic hard": f"--pool tiny {CHAIN.format(4, 6, 1)} --batch 36",
    "logic": "--pool tiny --task logic --batch 12",
    "algorithmic": "--pool tiny --task algorithmic --batch 12",
    # float32: on processors without matrix units bfloat16 is half as fast, and these runs are to compare
    "real sums": f"{CHAIN.format(2, 2, 2)} --template plain --batch 4 --max-new 8 --val 64 --dtype float32"}
REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2")  # policy, then experts
WAYS = {  # the first word is the mode, and whose rates are taken
    "soft": "--collab soft", "soft first": "--collab soft --read first",
    "soft shuffled": "--collab soft --control shuffled", "soft noise": "--collab soft --control noise",
    "soft untrained": "--collab soft --control untrained", "single": "--collab single",
    "prefix": "--collab prefix", "hard": "--collab hard", "text": "--collab text",
    "soft wide": f"--collab soft --experts {' '.join(f'tiny/{e}' for e in SPECIALIST.values())} {WIDE}",
    "soft cue": "--collab soft --cue 'The answer is '"}
RATES, SCALES = (1e-3, 2e-3), (0.5, 1, 2)  # of LoRA and router: the embedded pool's
FULL, HALF, LONG = "--steps 200 --test 1024", "--steps 100 --val 360 --test 8", "--steps 150 --test 256"
Run = namedtuple("Run", "id block task way seed size scale")  # scale: of RATES; None: chosen; 0: the pool's


def blocks(more=0):
    """block -> its runs, with so many more seeds; a run that two blocks share has one ID."""
    def cross(block, tasks, ways, seeds, size=FULL, scale=None):
        name, seeds = ("quick-", seeds) if block == "quick" else ("", seeds + more * (block != "pilot"))
        return [Run(f"{name}{task}-{way}-{s}".replace(" ", "-"), block, task, way, s, size, scale)
                for s in range(seeds) for way in ways for task in tasks]
    both, headline = ("arithmetic", "mix"), ("soft", "single", "prefix", "soft shuffled")
    modes = ("soft", "single", "prefix", "hard", "text")
    some = ("soft noise", "soft untrained", "hard", "text")
    return dict(
        rate=[Run(f"rate-{way}-x{x}", "rate", "mix", way, 100, HALF, x) for way in modes for x in SCALES],
        pilot=cross("pilot", both, ("soft", "single"), 2),
        main=cross("main", both, (*headline, "soft first"), 5),
        controls=cross("controls", ["mix"], some, 3) + cross("controls", ["arithmetic"], some, 1),
        saturate=cross("saturate", ("arithmetic hard", "logic", "algorithmic"), ("soft", "single"), 3),
        wide=cross("wide", ["arithmetic"], ["soft wide"], 3),
        real=cross("real", ["real sums"], ("soft", "single", "prefix", "soft cue"), 3, LONG, 0),
        quick=cross("quick", ["mix"], headline, 2, FULL, 1))


EMBEDDED = [name for name in blocks() if name not in ("real", "quick")]


def plan(names, more=0):
    """The runs of these blocks, each once, those first whose loss an early stop would rue most: the rates,
    the pilot, two seeds of everything, further seeds."""
    runs = {}
    for r in [r for name in names for r in blocks(more)[name]]:
        runs.setdefault(r.id, r)
    return sorted(runs.values(), key=lambda r: (r.block != "rate", r.block != "pilot", r.seed // 2))


def chosen(way, rows):
    """(LoRA's rate, router's) that did best on val in the block rate; of equals, those nearest the pool's."""
    mode = way.split()[0]
    tried = [r for r in rows if r["block"] == "rate" and r["mode"] == mode and r["after"] is not None]
    if len(tried) < 2:
        raise ValueError(f"no rates to choose from for {mode}: run python study.py --block rate first")
    best = max(tried, key=lambda r: (r["val"], -abs(math.log(r["lr"] / RATES[0]))))
    return best["lr"], best["router_lr"]


def command(run, rows, folder=None, trial=False):
    """The run's train.py as a list of words."""
    words = shlex.split(f"python train.py {TASKS[run.task]} {WAYS[run.way]} --seed {run.seed} {run.size}")
    if run.scale != 0:
        known = run.scale or (1 if trial else None)
        lr, router = [known * rate for rate in RATES] if known else chosen(run.way, rows)
        words += ["--lr", f"{lr:g}", "--router-lr", f"{router:g}"]
    elif folder:
        policy, *experts = (str(Path(folder) / name) for name in REAL)
        words += ["--policy", policy, "--experts", *experts]
    words += shlex.split("--steps 5 --val 8 --test 16") if trial else []
    return [*words, "--out", str(RUNS / run.id)]


# -- doing it
def read_rows(path=None):
    """The rows of study.jsonl, the last of every ID."""
    path = path or RESULTS / "study.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return list({r["id"]: r for r in map(json.loads, lines)}.values())


def mean(values):
    """Of numbers, or of dicts of such, key by key; a key that some lack is the others' mean."""
    if isinstance(values[0], dict):
        return {k: mean([v[k] for v in values if k in v]) for k in {k: 0 for v in values for k in v}}
    return round(float(np.mean(values)), 4)


def curve(metrics, points=50):
    """The rows of metrics.jsonl as at most `points` rows: means over stretches, named by their last step."""
    keys = ("reward", "val", "entropy", "attention_entropy", "prefix_kl", "mi", "attention", "reward_by",
            "attention_by", "expert_grad")
    parts = [[metrics[i] for i in part] for part in np.array_split(range(len(metrics)), points) if len(part)]
    return [dict(step=part[-1]["step"]) | mean([{k: r[k] for k in keys if k in r} for r in part])
            for part in parts]


def about(run, words, folder):
    """The part of a row that is known of a run that failed, too."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    pool = "real" if run.block == "real" else "tiny and a wide one" if run.way == "soft wide" else "tiny"
    return dict(id=run.id, block=run.block, task=run.task, mode=run.way.split()[0], way=run.way,
                seed=run.seed, pool=pool, commit=git.stdout.strip() or None,
                command=shlex.join(words).replace(folder or "models", "models"))


def collect(run, row):
    """The row of a finished run, begun in `row`, and its curve."""
    out = HERE / RUNS / run.id
    report, config = (json.loads((out / f"{f}.json").read_text()) for f in ("eval", "config"))
    metrics = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    row |= {k: config["args"][k] for k in ("read", "control", "cue", "steps", "lr", "router_lr")} | dict(
        before=report["before"]["strict"], after=report["after"]["strict"], n=report["n"],
        lenient=report["after"]["lenient"], val=metrics[-1]["val"],
        trainable=sum(config["trainable"].values()),
        seconds=round(sum(r["gen_s"] + r["train_s"] for r in metrics), 1))  # of the steps, whatever the stops
    kept = ("attention_by", "silenced", "datasets", "right", "right_before", "heard", "example")
    experts = [{k: e[k] for k in ("name", "width", "parameters")} for e in config["experts"]]
    more = dict(ablate=json.loads(asked.read_text())) if (asked := out / "ablate.json").exists() else {}
    apart = f"{run.block}: " if run.block in ("rate", "quick") else ""  # never put together with the rest
    return row, {k: row[k] for k in ("id", "task", "mode", "control", "read", "seed")} | dict(
        way=apart + run.way,
        experts=experts, curve=curve(metrics), attention_map=metrics[-1]["attention_map"],
        **{k: report[k] for k in kept if k in report}, **more)


def wide():
    """An expert that is large and knows nothing: random weights behind the arithmetic expert's tokenizer."""
    folder, source = HERE / WIDE, HERE / "tiny" / "arithmetic"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import LlamaConfig, LlamaModel
        of = json.loads((source / "config.json").read_text())
        torch.manual_seed(0)
        LlamaModel(LlamaConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
                               intermediate_size=1024, vocab_size=of["vocab_size"])).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder)


def start(run, words, lock):
    """The run's process, gone on with where its folder is left of a stop. It holds the lock as we do: while
    it lives, even without us, no second study starts."""
    out = HERE / RUNS / run.id
    if run.way == "soft" and (out / "eval.json").exists():
        n = run.size.split()[-1]  # the run's own test problems
        words = f"python eval.py {RUNS / run.id} --ablate static shuffle zero --n {n}".split()
    elif (out / "config.json").exists():
        words = ["python", "train.py", "--resume", "--out", str(RUNS / run.id)]
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "a") as log:  # a session of its own: Ctrl-C reaches it once, through us
        return subprocess.Popen([sys.executable, *words[1:]], cwd=HERE, env=env, stdout=log, stderr=log,
                                pass_fds=[lock.fileno()], start_new_session=True)


def record(run, words, code, folder):
    """Append the row of a run that ended, write its curve, and return a line about it. One that was stopped
    leaves no row: it will be gone on with."""
    row = about(run, words, folder)
    if code == 0 and (HERE / RUNS / run.id / "eval.json").exists():
        row, points = collect(run, row)
        said = f"{row['before']:.1%} -> {row['after']:.1%}, {row['seconds']:.0f} s"
        (RESULTS / "curves").mkdir(exist_ok=True)
        (RESULTS / "curves" / f"{run.id}.json").write_text(json.dumps(points, separators=(",", ":")) + "\n")
    elif code in (0, 130, -signal.SIGTERM, -signal.SIGINT):
        return "stopped; the same command goes on with it"
    else:
        log = (HERE / f"{RUNS / run.id}.log").read_text().replace(folder or "models", "models").strip()
        row |= dict(after=None, reason=f"exit code {code}: {log.splitlines()[-1][:200] if log else 'silent'}")
        said = f"FAILED, {row['reason']}"
    with open(RESULTS / "study.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    return said


def carry_out(todo, a):
    """Make these runs, `a.workers` at once. However it ends, the running ones are asked to save."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (HERE / RUNS).mkdir(parents=True, exist_ok=True)
    waiting, busy, began, total = list(todo), {}, time.monotonic(), len(todo)
    with open(HERE / RUNS / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("a study, or a run it left behind, is still at work: wait for its end") from None
        try:
            while waiting or busy:
                while waiting and len(busy) < a.workers:
                    run = waiting.pop(0)
                    words = command(run, read_rows(), a.real, a.trial)
                    if run.way == "soft wide":
                        wide()
                    busy[run] = words, start(run, words, lock)
                time.sleep(0.2)
                for run, (words, process) in list(busy.items()):
                    tested, asked = (HERE / RUNS / run.id / f"{f}.json" for f in ("eval", "ablate"))
                    due = run.way == "soft" and tested.exists() and not asked.exists()
                    if process.poll() == 0 and due:
                        busy[run] = words, start(run, words, lock)  # and what its attention was worth
                    elif process.poll() is not None:
                        del busy[run]
                        said, left = record(run, words, process.returncode, a.real), len(waiting) + len(busy)
                        minutes = (time.monotonic() - began) / (total - left) * left / 60
                        print(f"[{total - left}/{total}] {run.id}: {said}; about {minutes:.0f} min left",
                              flush=True)
        finally:
            for _, process in busy.values():
                process.terminate()
            for _, process in busy.values():
                process.wait()


# -- what is reported
def judged(quick=False):
    """Finished runs, each row with its curve. The rates' take no part; quick's stand by themselves."""
    return [json.loads((RESULTS / "curves" / f"{r['id']}.json").read_text()) | r for r in read_rows()
            if r["after"] is not None and r["block"] != "rate" and quick == (r["block"] == "quick")]


def readme(text, rows):
    """README's text with what stands between its markers made anew. Raises ValueError without markers."""
    walk = "".join(f"    {line}\n" for line in (RESULTS / "walk.txt").read_text().splitlines())
    for name, made in (("study", report(rows)), ("walk", walk.rstrip())):
        begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md lacks {begin.strip()} or {end.strip()}: put them back")
        text = text[:text.index(begin)] + begin + made + text[text.index(end):]
    return text


def pictures(rows):
    """README's: how all ways learn, and where soft listens, on arithmetic and the mix."""
    import figures

    both = [r for r in rows if r["task"] in ("arithmetic", "mix")
            and r["way"] not in ("soft noise", "soft untrained", "soft wide")]  # legible; the table has them
    learning, *others = figures.PICTURES
    for chosen, some in (([learning], both), (others, [r for r in both if r["way"] == "soft"])):
        figures.draw([RESULTS / "curves" / f"{r['id']}.json" for r in some], RESULTS / "figures", chosen)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--block", nargs="+", choices=EMBEDDED, default=[])
    p.add_argument("--real", metavar="FOLDER", type=lambda name: str(Path(name)),
                   help="the block with the real models in this folder")
    p.add_argument("--more", type=int, default=0, help="so many seeds more, of every block asked for")
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    for name, text in dict(quick="four ways on the mix, two seeds", list="the plan, and what is done",
                           retry="make failed runs again", report="tables and verdicts as Markdown",
                           readme="and put them into README.md",
                           trial="5 steps, 16 problems, all into runs/trial: does it work?").items():
        p.add_argument("--" + name, action="store_true", help=text)
    return p


def make(a):
    """The runs that were asked for and are not there; the exit code: 1 if one has failed."""
    runs = plan((["quick"] * a.quick + a.block + ["real"] * bool(a.real)) or EMBEDDED, a.more)
    state = lambda: {r["id"]: "failed" if r["after"] is None else "done" for r in read_rows()}
    there = state()
    if a.list:
        print("\n".join(f"{there.get(r.id, ''):6} {r.block:8} {r.id}" for r in runs))
        return 0
    for r in runs if a.retry else ():
        if there.get(r.id) == "failed":
            del there[r.id]
            shutil.rmtree(HERE / RUNS / r.id, ignore_errors=True)
    for first in (True, False):  # all rates are chosen before anything is made with them
        carry_out([r for r in runs if r.id not in there and (r.block == "rate") == first], a)
    print(report(judged(a.quick)))
    there = state()
    return int(any(there.get(r.id) == "failed" for r in runs))


def main(argv=None):
    """Returns the exit code: 0, 1 if runs failed, or 2 with one sentence when it cannot be done."""
    global RESULTS, RUNS
    a = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, as Ctrl-C does
    try:
        if a.trial:
            RESULTS, RUNS = HERE / "runs" / "trial", Path("runs/trial")
        if not (a.report or a.readme):
            return make(a)
        print(report(judged(a.quick)))
        if a.readme:
            path = HERE / "README.md"
            rows = judged()
            path.write_text(readme(path.read_text(), rows))
            pictures(rows)
        return 0
    except (ValueError, OSError) as e:
        print(f"study.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstudy.py: stopped and saved; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
