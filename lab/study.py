"""
The study: every run of it by one command, a row of results each.

    python lab/study.py                  the embedded pool: whatever has no row in results/study.jsonl yet
    python lab/study.py --quick          soft, single, prefix and shuffled on the mix, two seeds
    python lab/study.py --real FOLDER    real models: FOLDER holds those named in REAL_MODELS
    python lab/study.py --list           the plan, and what is done
    python lab/study.py --report         results/STUDY.md and results/figures anew, from rows and curves alone

A run is one train.py command line with its own seed, in runs/study/ID. Stopped in any way, the same command
goes on where it was. A run leaves a row in results/study.jsonl (one that failed, too: `after` is null; delete
the row to try again) and results/curves/ID.json. claims.py judges from these two alone.
"""
import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import claims  # first: it lets Python find the files one folder up
from eval import one_sentence, read_lines
from experts import write_atomic
from train import PRESETS

HERE, RESULTS = claims.HERE, claims.RESULTS
RUNS = HERE / "runs" / "study"

# -- The plan

LEVEL = "--level min_terms={},max_terms={},min_digits=1,max_digits={}"
UNSEEN = "--test 1024 --test_skip 1024"  # problems that nobody looked at while settings were chosen
REAL = "--test 256 --test_skip 256 --val 64 --max_new 8"
# whom to believe is to be learned (after 40 steps trust still rises), what stage 0 taught to read to be kept
BELIEVE = "--trust_lr 0.3 --lr 1e-5 --router_lr 1e-6 --warmup 5 --steps 120"
TASKS = {
    "mix": f"--preset tiny --task arithmetic+logic+algorithmic {UNSEEN}",
    "sums": f"--preset tiny --task arithmetic {UNSEEN}",
    # 12 problems a step, as of each dataset in the mix
    "family": f"--preset tiny --task logic --batch 12 {UNSEEN}",
    "primes": f"--preset tiny --task algorithmic --batch 12 {UNSEEN}",
    # every word is in all vocabularies; the arithmetic expert was taught 4 terms and is right in 37% of these
    "sums hard": f"--preset tiny --task chain_sum {LEVEL.format(4, 6, 1)} {UNSEEN}",
    "real sums": f"--preset small --task chain_sum {LEVEL.format(2, 2, 2)} {REAL}",
    # learning rates, by validation alone: nothing is tested
    "rates": "--preset tiny --task arithmetic+logic+algorithmic --val 240 --test 1",
    # Qwen2.5-Coder twice: where the first answers a sum, the second answers another one
    "real mix": f"--preset small --task chain_sum+basic_arithmetic {LEVEL.format(2, 2, 2)} {REAL} "
                f"--control partly {BELIEVE}",
}
TINY_MODELS = ["tiny/arithmetic", "tiny/logic", "tiny/algorithmic"]
WAYS = {  # single's stage 0 reads the same texts as soft's, {align} steps of it
    "soft": "--collab soft",
    "soft without stage 0": "--collab soft --align 0",
    "soft first": "--collab soft --read first",
    "soft shuffled": "--collab soft --control shuffled",
    "soft noise": "--collab soft --control noise",
    "soft untrained": "--collab soft --control untrained",
    "soft wrong": "--collab soft --control wrong",  # the first expert once more, which reads another problem
    "soft wide": "--collab soft",  # one more expert: large, of random weights, see make_wide
    "soft prompt": "--collab soft --own_text False --positions 1",  # the paper's one state, without the text
    "prefix": "--collab prefix",
    "single": "--collab single --align {align}",
    "single without stage 0": "--collab single --align 0",
    "hard": "--collab hard",
    "linear": "--collab linear",
    "text": "--collab text",
    "stage 0": "",  # no run: the test of soft's run after stage 0 alone
}
HEADLINE = ["soft", "single", "prefix", "soft shuffled"]
ON_MIX = [way for way in WAYS if way not in ("soft wrong", "soft wide", "soft prompt")]
RATED = {f"{way} x {factor}": f"{WAYS[way]} --lr {factor * PRESETS['tiny']['lr']} "
                              f"--router_lr {factor * PRESETS['tiny']['router_lr']}"
         for way in ("soft", "single", "prefix", "hard", "text") for factor in (0.5, 1, 2)}
BLOCKS = {  # block: [(tasks, ways, seeds)]
    "tiny": [(["mix"], ON_MIX, range(5)), (["sums"], [*HEADLINE, "soft wrong", "soft wide"], range(5)),
             (["family", "primes"], HEADLINE, range(5)), (["sums hard"], HEADLINE, range(3)),
             (["rates"], RATED, [100])],
    "real": [(["real sums"], [*HEADLINE, "single without stage 0", "soft noise", "soft untrained"], range(5)),
             (["real sums"], ["soft prompt", "soft wrong", "stage 0"], range(3)),
             (["real mix"], ["soft", "stage 0"], range(3))],
    "quick": [(["mix"], HEADLINE, range(2))],
}
# policy, then experts
REAL_MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2"]
# ways whose finished runs probe.py asks what replacing attention or states costs
ABLATED = ["soft", "soft wrong", "soft wide"]

@dataclass(frozen=True)
class Run:
    block: str
    task: str
    way: str
    seed: int

    @property
    def id(self):
        return f"{self.task}-{self.way}-s{self.seed}".replace(" ", "-")

    @property
    def folder(self):
        """Where train.py writes; stage 0 is tested in the folder of soft's run."""
        return RUNS / (Run(self.block, self.task, "soft", self.seed).id if self.way == "stage 0" else self.id)

def plan(block):
    """A block's runs, seed by seed, so that an early stop leaves whole comparisons; stage 0 after soft."""
    runs = [Run("real" if block == "real" else "tiny", task, way, seed)
            for tasks, ways, seeds in BLOCKS[block]
            for seed in seeds for task in tasks for way in ways]
    return sorted(runs, key=lambda run: (run.way == "stage 0", run.seed))

def command(run, models="models"):
    """The run's command line, a list of words; `models`: the folder with the real models."""
    folder = os.path.relpath(run.folder, HERE)
    if run.way == "stage 0":
        return shlex.split(f"python eval.py {folder} --aligned --json")
    real = run.task.startswith("real")
    preset, way = PRESETS["small" if real else "tiny"], (WAYS | RATED)[run.way]
    words = shlex.split(f"python train.py {TASKS[run.task]} {way.format(align=preset['align'])}")
    experts = TINY_MODELS
    if real:
        policy, *experts = [str(Path(models) / name) for name in REAL_MODELS]
        words += ["--policy", policy]
    if run.task == "real mix":
        experts = experts[:1] * 2
    if run.task == "real sums" and run.way == "soft wrong":
        words += shlex.split(BELIEVE)
    more = {"soft wrong": experts[:1], "soft wide": ["runs/study/wide"]}.get(run.way, [])
    if more or real:
        words += ["--experts", *experts, *more]
    return [*words, "--seed", str(run.seed), "--out", folder]

# -- Doing it

def steps_of(run, models):
    """[(the file that a command leaves, the command)] of all that a run still needs, in order."""
    out, folder = run.folder, os.path.relpath(run.folder, HERE)
    words, name = command(run, models), "eval-aligned.json" if run.way == "stage 0" else "eval.json"
    if run.way != "stage 0" and (out / "config.json").exists():
        words = ["python", "train.py", "--resume", folder]
    steps = [(out / name, words)]
    if run.way in ABLATED:
        ablate = ["python", "lab/probe.py", folder, "--ablate", "static", "uniform", "shuffle", "zero"]
        steps.append((out / "ablate.json", ablate))
    return [(path, words) for path, words in steps if not path.exists()]

class Study:
    """Carries out runs, `workers` at once. However it ends, those that are at work are asked to save."""

    def __init__(self, runs, models, workers):
        self.runs, self.models, self.workers = runs, models, workers
        self.processes, self.stopping, self.failed = set(), False, 0

    def carry_out(self):
        RUNS.mkdir(parents=True, exist_ok=True)
        if any(run.way == "soft wide" for run in self.runs):
            make_wide(RUNS / "wide")
        with open(RUNS / "lock", "w") as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError("a study, or a run that it left behind, is still at work: wait for its "
                                 "end") from None
            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    list(pool.map(self.one_run, [run for run in self.runs if run.way != "stage 0"]))
                    # stage 0 is tested when all runs that begin with it are trained
                    list(pool.map(self.one_run, [run for run in self.runs if run.way == "stage 0"]))
                finally:
                    self.stopping = True
                    for process in list(self.processes):
                        process.terminate()
        if self.failed:
            raise ValueError(f"{self.failed} runs failed, see their rows in results/study.jsonl: mend them, "
                             "delete these rows and call the study again")

    def one_run(self, run):
        start, commit = time.monotonic(), head()
        for path, words in steps_of(run, self.models):
            if self.stopping:
                return
            code = self.call(run, words)
            if code > 0 and code != 130:
                self.failed += 1
                self.record(run, commit, dict(after=None, reason=f"exit code {code}: {self.last_line(run)}"))
                return
            if not path.exists():
                print(f"{run.id}: stopped, it goes on when the study is called again", flush=True)
                return
        row, curve = collect(run)
        text = json.dumps(curve, separators=(",", ":")) + "\n"
        write_atomic(RESULTS / "curves" / f"{run.id}.json", text.encode())
        self.record(run, commit, row)
        seconds = time.monotonic() - start
        print(f"{run.id}: {row['before']:.1%} -> {row['after']:.1%}, {seconds:.0f} s", flush=True)

    def call(self, run, words):
        """Run a command, its output behind the run's log; returns the exit code. It holds the study's lock as
        well: while it lives, even alone, no second study starts."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with open(f"{run.folder}.log", "a") as log:
            process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it once, through us
                [sys.executable, *words[1:]], cwd=HERE, env=environment, stdout=log, stderr=log,
                pass_fds=[self.lock.fileno()], start_new_session=True)
        self.processes.add(process)
        if self.stopping:  # it was asked in between
            process.terminate()
        code = process.wait()
        self.processes.discard(process)
        return code

    def last_line(self, run):
        lines = Path(f"{run.folder}.log").read_text().strip().splitlines() or ["no output"]
        return lines[-1][:300].replace(self.models, "models")

    def record(self, run, commit, more):
        row = dict(id=run.id, block=run.block, task=run.task, way=run.way, seed=run.seed, commit=commit,
                   command=shlex.join(command(run)))
        with open(RESULTS / "study.jsonl", "a") as file:
            file.write(json.dumps(row | more) + "\n")

def make_wide(folder):
    """An expert far larger than the others that knows nothing: random weights, arithmetic's tokenizer."""
    if (folder / "model.safetensors").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny" / "arithmetic")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024,
                         num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=256,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)

def head():
    """The commit of the code that a run is about to use; None outside a repository."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return git.stdout.strip() or None

# -- What a run leaves: a row and a curve

def collect(run):
    """(numbers of the row, curve) of a finished run, from its folder alone."""
    out = run.folder
    aligned = run.way == "stage 0"
    report = json.loads((out / ("eval-aligned.json" if aligned else "eval.json")).read_text())
    args = json.loads((out / "config.json").read_text())["args"]
    metrics = [] if aligned else read_lines(out / "metrics.jsonl")
    val = [step["val"] for step in metrics if "val" in step]
    seconds = sum(step["rollout_seconds"] + step["train_seconds"] for step in metrics)
    row = {key: args[key] for key in ("collab", "control", "read", "cue", "align", "lr", "router_lr")}
    row |= dict(steps=len(metrics), before=report["before"]["strict"], after=report["after"]["strict"],
                n=report["n"], lenient=report["after"]["lenient"], val=val[-1] if val else None,
                trainable=trainable(out, args), seconds=round(seconds))
    curve = dict(id=run.id, task=run.task, way=run.way, seed=run.seed,
                 experts=[dict(name=Path(name.partition("@")[0]).name) for name in args["experts"]],
                 curve=condense(metrics), read_back={
                     row.pop("expert"): row for row in read_lines(out / "align.jsonl") if "expert" in row})
    kept = ("attention_by_dataset", "by_dataset", "masked", "right", "swap")
    curve |= {key: report[key] for key in kept if key in report}
    if not aligned and (out / "ablate.json").exists():
        ablate = json.loads((out / "ablate.json").read_text())
        curve |= {key: ablate.pop(key) for key in ("datasets", "attended", "knows")} | dict(ablate=ablate)
    return row, curve

def trainable(out, args):
    """Trained parameters, counted in the newest checkpoint: not the router's statistics of the states, nor
    trust at rate 0."""
    fixed = ["router.mean", "router.inv_std"]
    if not args["trust_lr"]:
        fixed += ["router.trust", "router.trust_bias"]
    tensors = load_file(max(out.glob("*.safetensors")))
    return sum(tensor.numel() for name, tensor in tensors.items()
               if name.startswith(("policy.", "router.")) and name not in fixed)

CURVE_KEYS = ("reward", "val", "entropy", "kl", "frac_reward_zero_std", "length", "grad_norm",
              "attention_entropy", "attention", "attention_by_dataset", "reward_by_dataset")

def condense(metrics, points=50):
    """The rows of metrics.jsonl as at most `points`: means over stretches, each named by its last step."""
    rows = []
    for stretch in np.array_split(metrics, points):
        if len(stretch):
            kept = [{key: row[key] for key in CURVE_KEYS if key in row} for row in stretch]
            rows.append(dict(step=stretch[-1]["step"]) | mean(kept))
    return rows

def mean(values):
    """Mean of numbers, or of dictionaries key by key, over those that have the key."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean([value[key] for value in values if key in value]) for key in keys}
    return round(float(np.mean(values)), 4)

# -- The report

BEGIN, END = "<!-- study:begin -->\n", "\n<!-- study:end -->"

def with_report(text, report):
    """STUDY.md with what stands between the two markers made anew."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"results/STUDY.md lacks {BEGIN.strip()} or {END.strip()}: put them back")
    return text[:text.index(BEGIN)] + BEGIN + report + text[text.index(END):]

def made_report():
    """Markdown, of rows and curves, for results/STUDY.md."""
    rows = claims.finished(results=RESULTS)
    pictures = [f"![{path.stem.replace('_', ' ')}](figures/{path.name})"
                for path in sorted((RESULTS / "figures").glob("*.png"))]
    failed = [f"- {row['id']}: {row['reason']}" for row in claims.read_rows(RESULTS / "study.jsonl")
              if row["after"] is None]
    parts = [claims.report(rows), *(pictures if rows else ())]
    if failed:
        parts += ["Runs that failed:", "\n".join(failed)]
    return "\n\n".join(parts)

def write_report():
    import figures  # matplotlib takes a second

    figures.draw_all(RESULTS)
    path = RESULTS / "STUDY.md"
    if not path.exists():
        raise ValueError(f"{path} is not there: fetch it from the repository, its tables are made in place")
    write_atomic(path, with_report(path.read_text(), made_report()).encode())
    print(f"{path} and {RESULTS / 'figures'} are made anew")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the headline: four ways on the mix, two seeds")
    parser.add_argument("--real", metavar="FOLDER", help="the block with the real models in this folder")
    parser.add_argument("--list", action="store_true", help="the plan, and what is done")
    parser.add_argument("--report", action="store_true", help="results/STUDY.md and figures, from rows alone")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise ValueError("--workers must be at least 1")
    if options.report:
        return write_report()
    missing = [name for name in REAL_MODELS if options.real and not (Path(options.real) / name).is_dir()]
    if missing:
        raise ValueError(f"{options.real} lacks {', '.join(missing)}: put these model folders there")
    runs = plan("real" if options.real else "quick" if options.quick else "tiny")
    rows = {row["id"]: row for row in claims.read_rows(RESULTS / "study.jsonl")}
    if options.list:
        for run in runs:
            state = "" if run.id not in rows else "failed" if rows[run.id]["after"] is None else "done"
            print(f"{state:6} {run.id:32} {shlex.join(command(run))}")
        return None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    models = os.path.abspath(options.real) if options.real else "models"
    Study([run for run in runs if run.id not in rows], models, options.workers).carry_out()
    return print(claims.report(claims.finished(results=RESULTS)))

if __name__ == "__main__":
    sys.exit(one_sentence("study.py", main))
