"""
Which claims hold: the runs of the study, their rows, their verdicts.

    python study.py                       all of it on the embedded pool; stopped, it goes on where it was
    python study.py --quick               the headline in half an hour: four ways on the mix, two seeds
    python study.py --list                the plan, and what of it is done
    python study.py --block rate pilot    some blocks
    python study.py --real FOLDER         also real models: the folders named in REAL below
    python study.py --report              the tables and verdicts as Markdown; --readme puts them into README.md

A run is one train.py with a command line of its own. It leaves a row in results/study.jsonl (a failure too:
after is null, and --retry tries again) and results/curves/ID.json: learning curve, attention, and who was
heard and what was right on every test item. All that is claimed is computed from these two alone.
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

HERE = Path(__file__).resolve().parent
RESULTS, RUNS = HERE / "results", Path("runs/study")  # runs: below HERE, as commands name it
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"

# -- the plan
CHAIN = "--task chain_sum --level min_terms={},max_terms={},min_digits=1,max_digits={}"
TASKS = {  # 12 problems of a family a step, as in the mix, where they are few or easy (primes: 2,500 different)
    "mix": "--pool tiny --task arithmetic+logic+algorithmic --batch 36",
    "arithmetic": "--pool tiny --task arithmetic --batch 36",
    # 4 to 6 terms: every piece is in all vocabularies; the arithmetic expert, taught 4, is right in 37%
    "arithmetic hard": f"--pool tiny {CHAIN.format(4, 6, 1)} --batch 36",
    "logic": "--pool tiny --task logic --batch 12",
    "algorithmic": "--pool tiny --task algorithmic --batch 12",
    "real sums": f"{CHAIN.format(2, 2, 2)} --template plain --batch 8 --max-new 8 --val 64"}
REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2")  # policy, then experts
SPECIALIST = dict(chain_sum="arithmetic", family_relationships="logic", count_primes="algorithmic")
WAYS = {  # the first word is the mode, and whose rates are taken
    "soft": "--collab soft", "soft first": "--collab soft --read first",
    "soft shuffled": "--collab soft --control shuffled", "soft noise": "--collab soft --control noise",
    "soft untrained": "--collab soft --control untrained", "single": "--collab single",
    "prefix": "--collab prefix", "hard": "--collab hard", "text": "--collab text",
    "soft wide": f"--collab soft --experts {' '.join(f'tiny/{e}' for e in SPECIALIST.values())} {RUNS}/wide",
    "soft cue": "--collab soft --cue 'The answer is '"}
RATES, SCALES = (1e-3, 2e-3), (0.5, 1, 2)  # of LoRA and router: the embedded pool's
FULL, HALF, LONG = "--steps 200 --test 1024", "--steps 100 --val 360 --test 8", "--steps 150 --test 256"
Run = namedtuple("Run", "id block task way seed size scale")  # scale: of RATES; None: chosen; 0: the pool's


def blocks():
    """block -> its runs, as the README's table counts them; one that two blocks share has one ID."""
    def cross(block, tasks, ways, seeds, size=FULL, scale=None):
        name = {"quick": "quick-"}.get(block, "")
        return [Run(f"{name}{task}-{way}-{s}".replace(" ", "-"), block, task, way, s, size, scale)
                for s in range(seeds) for way in ways for task in tasks]
    both, some = ("arithmetic", "mix"), ("soft noise", "soft untrained", "hard", "text")
    return dict(
        rate=[Run(f"rate-{way}-x{x}", "rate", "mix", way, 100, HALF, x)  # a seed that the study does not use
              for way in ("soft", "single", "prefix", "hard", "text") for x in SCALES],
        pilot=cross("pilot", both, ("soft", "single"), 2),
        main=cross("main", both, ("soft", "single", "prefix", "soft shuffled", "soft first"), 5),
        controls=cross("controls", ["mix"], some, 3) + cross("controls", ["arithmetic"], some, 1),
        saturate=cross("saturate", ("arithmetic hard", "logic", "algorithmic"), ("soft", "single"), 3),
        wide=cross("wide", ["arithmetic"], ["soft wide"], 3),
        real=cross("real", ["real sums"], ("soft", "single", "prefix", "soft cue"), 3, LONG, 0),
        quick=cross("quick", ["mix"], ("soft", "single", "prefix", "soft shuffled"), 2, FULL, 1))


def plan(names):
    """The runs of these blocks, each once, those first whose loss an early stop would rue most: the rates,
    the pilot, two seeds of everything, further seeds."""
    runs = {}
    for r in [r for name in names for r in blocks()[name]]:
        runs.setdefault(r.id, r)
    return sorted(runs.values(), key=lambda r: (r.block != "rate", r.block != "pilot", r.seed // 2))


def chosen(way, rows):
    """(LoRA's rate, router's) that did best on val in the block "rate"; of equals, that nearest the pool's."""
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
        lr, router = (run.scale * r for r in RATES) if run.scale else RATES if trial else chosen(run.way, rows)
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
    """Of numbers, or of dicts of such, key by key; what is missing is left out."""
    if isinstance(values[0], dict):
        return {k: mean([v[k] for v in values if k in v]) for k in {k: 0 for v in values for k in v}}
    return round(float(np.mean(values)), 4)


def curve(metrics, points=50):
    """The rows of metrics.jsonl as at most `points` rows: means over equal stretches, named by their end."""
    keys = ("reward", "val", "entropy", "attention_entropy", "prefix_kl", "mi", "attention", "reward_by",
            "attention_by", "expert_grad")
    parts = [[metrics[i] for i in part] for part in np.array_split(range(len(metrics)), points) if len(part)]
    pick = lambda part, k: [r[k] for r in part if k in r]
    return [dict(step=part[-1]["step"]) | {k: mean(pick(part, k)) for k in keys if pick(part, k)}
            for part in parts]


def collect(run, words, folder=None):
    """(row, curve) of a finished run."""
    out = HERE / RUNS / run.id
    report, config, items = (json.loads((out / f"{f}.json").read_text()) for f in ("eval", "config", "items"))
    metrics = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    args = config["args"]
    row = about(run, words, folder) | dict(
        read=args["read"], control=args["control"], cue=args["cue"], steps=args["steps"],
        before=report["before"]["strict"], after=report["after"]["strict"], lenient=report["after"]["lenient"],
        val=metrics[-1]["val"], n=report["n"], lr=args["lr"], router_lr=args["router_lr"],
        trainable=sum(config["trainable"].values()),
        seconds=round(sum(r["gen_s"] + r["train_s"] for r in metrics), 1))  # sampling and gradient, stops apart
    after = {k: report[k] for k in ("by_dataset", "attention_by", "silenced") if k in report}
    return row, dict(id=run.id, experts=config["experts"], points=curve(metrics), **after,
                     attention_map=metrics[-1]["attention_map"], **items)


def about(run, words, folder):
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    line = shlex.join(words).replace(str(folder), "models") if folder else shlex.join(words)
    pool = "real" if run.block == "real" else "tiny" + " and a wide expert" * (run.way == "soft wide")
    return dict(id=run.id, block=run.block, task=run.task, mode=run.way.split()[0], way=run.way, seed=run.seed,
                pool=pool, command=line, commit=git.stdout.strip() or None)


def wide():
    """An expert that is large and knows nothing: random weights behind the arithmetic expert's tokenizer."""
    folder, source = HERE / RUNS / "wide", HERE / "tiny" / "arithmetic"
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
    if (out / "config.json").exists():
        words = ["python", "train.py", "--resume", "--out", str(RUNS / run.id)]
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "a") as log:  # a session of its own: Ctrl-C reaches it once, through us
        return subprocess.Popen([sys.executable, *words[1:]], cwd=HERE, env=env, stdout=log, stderr=log,
                                pass_fds=[lock.fileno()], start_new_session=True)


def record(run, words, code, folder):
    """Append the row of a run that ended, write its curve, and return a line about it. One that was stopped
    leaves no row: it will be gone on with."""
    if (HERE / RUNS / run.id / "eval.json").exists() and code == 0:
        row, points = collect(run, words, folder)
        said = f"{100 * row['before']:.1f} -> {100 * row['after']:.1f}%, {row['seconds']:.0f} s"
        (RESULTS / "curves").mkdir(parents=True, exist_ok=True)
        (RESULTS / "curves" / f"{run.id}.json").write_text(json.dumps(points, separators=(",", ":")) + "\n")
    elif code in (0, 130, -signal.SIGTERM, -signal.SIGINT):
        return "stopped; start again to go on with it"
    else:
        log = (HERE / f"{RUNS / run.id}.log").read_text().strip().splitlines() or ["it said nothing"]
        row = about(run, words, folder) | dict(after=None, reason=f"exit code {code}: {log[-1][:200]}")
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
                    if process.poll() is not None:
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


# -- statistics
def bootstrap_difference(a, b=0.0, draws=4000):
    """(mean, low, high) of a - b, paired, with a 95% interval. a, b (seeds, items), the same items for every
    seed: seeds and items are drawn anew, both (Owen 2007, 0712.1111), from a fixed generator. k seeds spread by
    sqrt((k - 1) / k) too little about their own mean, so they are widened by that."""
    d = np.asarray(a, float) - np.asarray(b, float)
    (k, n), centre = d.shape, d.mean()
    d = d + (d.mean(1, keepdims=True) - centre) * (math.sqrt(k / max(1, k - 1)) - 1)
    g = np.random.default_rng(0)
    seeds, items = (g.multinomial(m, np.full(m, 1 / m), draws) / m for m in (k, n))
    low, high = np.quantile(((seeds @ d) * items).sum(1), (0.025, 0.975))
    return float(centre), float(low), float(high)


def ranks(x):
    """1 for the least; equal values share the mean of their ranks."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x, y):
    """Rank correlation; 0.0 where one of them is constant."""
    x, y = ranks(x) - ranks(x).mean(), ranks(y) - ranks(y).mean()
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else 0.0


def detrended(steps, x):
    """What of x a straight line over the steps does not tell: two series that both drift correlate for
    nothing."""
    left = x - np.polyval(np.polyfit(steps, x, 1), steps)
    return np.where(np.abs(left) < 1e-9 * (1 + np.abs(x).max()), 0.0, left)


def detectable(sd, seeds=5):
    """The difference of two means over `seeds` seeds of this deviation that a two-sided test at 5% finds in
    80% of studies: 2.8 (1.96 + 0.84) standard errors."""
    return 2.8 * sd * math.sqrt(2 / seeds)


# -- claims
MARGIN = dict(points=5.0, nats=0.05, rho=0.1)  # smaller than this is no difference


def judge(low, high, margin, same):
    """What is claimed to be more than 0 is confirmed by an interval above 0, refuted by one below 0 or within
    the margin. What is claimed to be the `same` is confirmed within the margin, else refuted without 0."""
    within = max(-low, high) <= margin
    if same:
        return "confirmed" if within else "refuted" if low > 0 or high < 0 else "open"
    return "confirmed" if low > 0 else "refuted" if high < 0 or within else "open"


def measured(what, a, b=0.0, unit="points", same=False):
    """(verdict, sentence) on a - b, each (runs, items); it takes two runs to say anything about a way."""
    if len(a) < 2:
        return "open", f"{what}: not measured on two runs"
    d = bootstrap_difference(a, b)
    return judge(*d[1:], MARGIN[unit], same), f"{what}: {shown(d, unit)}, {len(a)} runs"


def shown(d, unit="points"):
    fmt = "+.1f" if unit == "points" else "+.2f"
    return f"{d[0]:{fmt}} [{d[1]:{fmt}}, {d[2]:{fmt}}] {unit}"


def runs_of(rows, task, way):
    return {r["seed"]: r for r in rows if (r["task"], r["way"]) == (task, way)}


def paired(rows, task, a, b):
    """Right or wrong, in points, of two ways on the seeds that both have: two of (seeds, items)."""
    a, b = runs_of(rows, task, a), runs_of(rows, task, b)
    return [100 * np.array([of[s]["right"] for s in sorted(a.keys() & b.keys())]) for of in (a, b)]


def minus(rows, a, b, *tasks, same=False):
    return [measured(f"{task}, {a} - {b}", *paired(rows, task, a, b), same=same) for task in tasks]


def saturated(rows):
    """Single against soft on every task where single is right in 90% or more after training."""
    after = {t: np.mean([r["after"] for r in runs_of(rows, t, "single").values()] or [0]) for t in TASKS}
    parts = minus(rows, "single", "soft", *(t for t in TASKS if after[t] >= 0.9))
    return parts or [("open", f"single saturates nowhere, at most {max(after.values()):.0%}")] + [
        ("open", said) for _, said in minus(rows, "single", "soft", "logic", "algorithmic")]


def falling(rows):
    """Less than no correlation, so its opposite is claimed to be above 0."""
    raw, rest = [], []
    for r in (r for r in rows if r["way"] == "soft" and r["pool"] == "tiny" and len(r["points"]) > 2):
        step, x, y = (np.array([p[k] for p in r["points"]], float) for k in ("step", "attention_entropy", "reward"))
        raw, rest = raw + [spearman(x, y)], rest + [[-spearman(detrended(step, x), detrended(step, y))]]
    return [measured(f"minus Spearman's rho (with the trend {-np.mean(raw or [0]):+.2f})", rest, unit="rho")]


def concentrated(rows):
    easy, hard = (runs_of(rows, t, "soft") for t in ("arithmetic", "arithmetic hard"))
    end = lambda r: [np.mean([p["attention_entropy"] for p in r["points"][-5:]])]  # the last tenth
    a, b = ([end(of[s]) for s in sorted(easy.keys() & hard.keys())] for of in (easy, hard))
    return [measured("entropy at the end, arithmetic - arithmetic hard", np.array(a), np.array(b), "nats")]


def heard(rows, task, way, what, pick):
    """pick(attention by item and expert, its run, names) against an even share of the experts."""
    some = list(runs_of(rows, task, way).values())
    names = [e["name"] for e in some[0]["experts"]] if some else [""]
    values = [100.0 * pick(np.array(r["heard"]), r, names) for r in some]
    return [measured(f"{what} - {100 / len(names):.0f}", values, 100 / len(names))]


def agrees(attention, run, names):
    return attention.argmax(-1) == [names.index(SPECIALIST[d]) for d in run["dataset"]]


def static(rows, task, same):
    """What the run loses with its mean attention: curves hold it once eval.py --ablate has been asked."""
    some = [r for r in runs_of(rows, task, "soft").values() if "static" in r.get("ablate", {})]
    a, b = (100 * np.array([pick(r) for r in some]) for pick in (lambda r: r["right"], lambda r: r["ablate"]["static"]))
    return [measured(f"{task}, as trained - static", a, b, same=same)]


CLAIMS = (  # all parts must hold, and one that is refuted refutes
    ("Soft beats single on arithmetic", lambda rows: minus(rows, "soft", "single", "arithmetic")),
    ("It beats a learned constant prefix", lambda rows: minus(rows, "soft", "prefix", "arithmetic", "mix")),
    ("It beats shuffled states, noise and untrained experts",
     lambda rows: minus(rows, "soft", "soft shuffled", "arithmetic", "mix")
     + minus(rows, "soft", "soft noise", "mix") + minus(rows, "soft", "soft untrained", "mix")),
    ("The first token's state does as well as the last's",
     lambda rows: minus(rows, "soft first", "soft", "arithmetic", "mix", same=True)),
    ("Single wins where the task saturates (single at 90% or more)", saturated),
    ("Attention's entropy falls as reward rises, trend removed", falling),
    ("Attention concentrates more on harder tasks", concentrated),
    ("Larger experts are preferred whatever they know", lambda rows: heard(
        rows, "arithmetic", "soft wide", "the wide one's share", lambda a, r, names: a[..., names.index("wide")])),
    ("The router's choice agrees with who could have solved it",  # tiny/README.md: own family 99%, others 0 to 2
     lambda rows: heard(rows, "mix", "soft", "the specialist is heard most", agrees)),
    ("Static attention suffices on easy arithmetic and not on the mix",
     lambda rows: static(rows, "arithmetic", True) + static(rows, "mix", False)))


def verdict(parts):
    verdicts = [v for v, _ in parts]
    return next((v for v in ("refuted", "open") if v in verdicts), "confirmed"), "; ".join(s for _, s in parts)


# -- what is reported
def pilot_sd(rows):
    """Deviation over seeds in points, pooled over the pilot's groups of two; None before it is done."""
    groups = [[100 * r["after"] for s, r in runs_of(rows, t, w).items() if s < 2]
              for t in ("arithmetic", "mix") for w in ("soft", "single")]
    return math.sqrt(np.mean([np.var(g, ddof=1) for g in groups])) if min(map(len, groups)) > 1 else None


def table(rows):
    yield "| task | collaboration | seeds | n | before | after | minus single | trained | seconds |"
    yield "|---" * 9 + "|"
    for task, way in ((t, w) for t in TASKS for w in WAYS):
        some = sorted(runs_of(rows, task, way).values(), key=lambda r: r["seed"])
        of = lambda k: 100 * np.array([r[k] for r in some])
        if some:
            a, b = paired(rows, task, way, "single")
            gain = shown(bootstrap_difference(a, b)) if way != "single" and len(a) > 1 else ""
            yield (f"| {task} | {way} | {', '.join(str(r['seed']) for r in some)} | {some[0]['n']} | "
                   f"{of('before').mean():.1f} ± {of('before').std():.1f} | {of('after').mean():.1f} ± "
                   f"{of('after').std():.1f} | {gain} | {some[0]['trainable']:,} | {of('seconds').mean() / 100:.0f} |")


def report(quick=False):
    """Markdown: table, pilot, verdicts. The rates' runs take no part; quick's stand by themselves."""
    rows = [r | json.loads((RESULTS / "curves" / f"{r['id']}.json").read_text()) for r in read_rows()
            if r["after"] is not None and r["block"] != "rate" and quick == (r["block"] == "quick")]
    sd = pilot_sd(rows)
    text = [*table(rows), "", "Strict greedy accuracy in percent on the same held-out problems, mean ± population "
            "standard deviation over seeds;", "differences paired by seed and item, bootstrap over both, 95%."]
    text += [f"The pilot's seeds deviate by {sd:.1f} points: five can show {detectable(sd):.1f}."] if sd else []
    text += ["", "| claim | verdict | figure |", "|---|---|---|"] * (not quick)
    for i, (claim, parts) in enumerate(CLAIMS * (not quick), 1):
        text.append("| ({}) {} | **{}** | {} |".format(i, claim, *verdict(parts(rows))))
    return "\n".join(text)


def readme(text, made):
    """README's text with what stands between the markers made anew. Raises ValueError without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md lacks the markers: put {BEGIN} and {END} where the study is to stand")
    return text[:text.index(BEGIN)] + f"{BEGIN}\n{made}\n" + text[text.index(END):]


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--block", nargs="+", choices=[b for b in blocks() if b not in ("real", "quick")])
    p.add_argument("--quick", action="store_true", help="the headline: soft, single, prefix, shuffled; 2 seeds")
    p.add_argument("--real", metavar="FOLDER", help="also the real models in this folder")
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at once, a thread each")
    p.add_argument("--retry", action="store_true", help="make failed runs again")
    p.add_argument("--trial", action="store_true", help="5 steps, 16 problems, into runs/trial: does it work?")
    for name, text in dict(list="the plan", report="tables and verdicts", readme="and put into README.md").items():
        p.add_argument("--" + name, action="store_true", help=text)
    return p


def main(argv=None):
    """Returns the exit code: 0, 1 if runs failed, or 2 with one sentence when it cannot be done."""
    global RESULTS, RUNS
    a = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, as Ctrl-C does
    try:
        if a.trial:
            RESULTS, RUNS = HERE / "runs" / "trial", Path("runs/trial")
        if a.readme:
            path = HERE / "README.md"
            path.write_text(readme(path.read_text(), report()))
        if a.report or a.readme:
            print(report(a.quick))
            return 0
        names = ["quick"] if a.quick else a.block or [] if a.real and a.block else a.block or [
            b for b in blocks() if b not in ("real", "quick")]
        runs = plan([*names, *["real"] * bool(a.real)])
        rows = {r["id"]: r for r in read_rows()}
        lost = lambda r: r.id in rows and rows[r.id]["after"] is None
        if a.list:
            for r in runs:
                print(f"{'failed' if lost(r) else 'done' if r.id in rows else '':6} {r.block:8} {r.id}")
            return 0
        for r in runs:
            if a.retry and lost(r):
                shutil.rmtree(HERE / RUNS / r.id, ignore_errors=True)
        todo = [r for r in runs if r.id not in rows or (a.retry and lost(r))]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done or failed before")
        for part in (True, False):  # all rates are chosen before anything is made with them
            carry_out([r for r in todo if (r.block == "rate") == part], a)
        print(report(a.quick))
        return int(any(r["after"] is None for r in read_rows()))
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
