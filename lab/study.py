"""
The study: every run of it by one command, and a row of results for each.

    python -m lab.study                  the embedded pool: whatever has no row in results/study.jsonl yet
    python -m lab.study --real FOLDER    real models; FOLDER holds the models that --list names
    python -m lab.study --only mix sums  these blocks only, see BLOCKS
    python -m lab.study --only quick     soft, single, prefix and shuffled on the mix, two seeds
    python -m lab.study --list           the command line of every run, and which are done
    python -m lab.study --report         write results/STUDY.md and results/figures again, from the rows

A run is one command line of train.py with its own seed, in runs/study/ID. However it is stopped, the same
command continues where it was. A run leaves a row in results/study.jsonl and a curve in results/curves.jsonl.
A run that failed leaves a row, too, in which `after` is null; delete this row to try again. claims.py judges
from these two files alone. The rows of earlier programs are in results/history, under the program's commit.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experts import write_atomic
from lab import claims
from rlvr import checkpoints, read_config, read_records, run_cli, without_nan
from train import PRESETS, Args

HERE, RESULTS = claims.HERE, claims.RESULTS
RUNS = HERE / "runs" / "study"


# -- What is run

SUMS_OF = "--level min_terms={},max_terms={},min_digits=1,max_digits={}"
UNSEEN = "--test 1024 --test_skip 1024"  # problems that nobody looked at while settings were chosen
REAL = "--test 256 --test_skip 256 --val 64 --max_new 8"

TASKS = {
    "mix": f"--preset tiny --task arithmetic+logic+algorithmic {UNSEEN}",
    # One dataset: 20 steps, as 10 were found too few to tell an expert from its copy.
    "sums": f"--preset tiny --task arithmetic --steps 20 {UNSEEN}",

    # 12 problems in a step, as many as of each dataset in the mix.
    "family": f"--preset tiny --task logic --batch 12 --steps 20 {UNSEEN}",
    "primes": f"--preset tiny --task algorithmic --batch 12 --steps 20 {UNSEEN}",

    # All words are in all vocabularies. The arithmetic expert was taught 4 terms, and knows 44% of these.
    # After 40 steps the policy mostly says what this expert says; with more steps it learns to correct it.
    "sums hard": f"--preset tiny --task chain_sum {SUMS_OF.format(4, 6, 1)} --steps 240 --lr 3e-4 "
                 f"--eval_every 20 {UNSEEN}",

    # Learning rates, by validation alone: nothing is tested.
    "rates": "--preset tiny --task arithmetic+logic+algorithmic --val 240 --test 1",

    "real sums": f"--preset small --task chain_sum {SUMS_OF.format(2, 2, 2)} {REAL}",

    # Two experts that know different things. There are about 110 test problems, none of which was looked at.
    "real family": "--preset small --task chain_sum+family_relationships --level easy --test 256 --val 98 "
                   "--max_new 8 --steps 20",

    # One expert twice. Where the first copy answers a sum, the second copy answers the next one.
    "real mix": f"--preset small --task chain_sum+basic_arithmetic {SUMS_OF.format(2, 2, 2)} {REAL} "
                "--extension lab/controls.py --control last_partly_wrong",

    # One expert twice. Each copy answers another problem on one of the two datasets. 8,000 problems for
    # stage 0, as the router learns 2,000 by heart: 98% of their words, and 86% of those of new problems.
    # After this stage 0 the policy says 183 of the right copy's 184 right answers on validation, if it sees
    # this copy alone. Steps of 32 problems, their number and LoRA's rate were the best on validation.
    "real copies": f"--preset small --task chain_sum+basic_arithmetic {SUMS_OF.format(2, 2, 2)} {REAL} "
                   "--extension lab/controls.py --control each_knows_one --steps 60 --batch 32 --lr 3e-4 "
                   "--router_lr 1e-5 --trust_lr 1.0 --stage0_problems 8000 --words_steps 800 "
                   "--reading_steps 120",

    # Two experts that are each right about a part of one dataset. To tell them apart takes more problems than
    # to tell experts of different datasets. Steps and rates had the highest accuracy on validation.
    "real terms": f"--preset small --task chain_sum {SUMS_OF.format(2, 4, 2)} {REAL} --steps 60 --batch 32 "
                  "--lr 1e-4 --router_lr 1e-5 --stage0_problems 4000",

    # A specialist for each family. Nobody can finish the lists of number_sorting within 20 tokens. There are
    # 411 test problems. A few prompts are ten times as long as the others: small gradient passes pad less.
    # A step has one problem of each dataset: after 12 steps some datasets still attended to a wrong expert.
    # 4,000 problems for stage 0: the router then says 87% of the texts of validation, and 80% with 2,000.
    "real pool": "--preset small --task arithmetic+logic+algorithmic --level easy --test 288 --val 112 "
                 "--write 20 --max_new 20 --states answer:14 --latents 16 --steps 60 --batch 16 "
                 "--micro_batch 4 --trust_lr 1.0 --eval_every 12 --stage0_problems 4000",

    # An expert that reasons in up to 320 tokens before it answers; the policy answers at once.
    "gsm8k": "--preset small --task gsm8k --think 320 --cue 'Final answer, only a number:' --write 8 "
             "--max_new 8 --val 64 --test 512 --stage0_problems 1024 --steps 40 --micro_batch 4",
}
TASKS["real pool and Qwen"] = TASKS["real pool"]

# The same with a logic specialist of another family, and with twice the steps of stage 0: in the row above
# the policy says 71 to 88% of a specialist's new texts after stage 0, and the loss of reading was still
# falling.
TASKS["real families"] = TASKS["real pool"] + " --words_steps 600 --reading_steps 120"

# The rates and steps with which routers learned before experts were compared. They suit ways that compare
# nothing, for which the few steps and low rates of the presets would be too little. By preset, or by task.
LONGER = {"tiny": "--steps 80 --lr 1e-3 --router_lr 2e-3",
          "small": "--steps 40 --lr 4e-4 --router_lr 4e-5",
          "sums hard": "--steps 240 --lr 1e-3 --router_lr 2e-3",  # as many steps as soft, here and below
          "real pool": "--steps 60 --lr 4e-4 --router_lr 4e-5",
          "real families": "--steps 60 --lr 4e-4 --router_lr 4e-5"}

# To tell an expert from its copy takes more steps than to tell experts of different datasets.
MORE_STEPS = {"tiny": "--steps 20", "small": ""}

WAYS = {
    "soft": "--router attention",
    "soft first": "--router attention --states first",
    "soft shuffled": "--router attention --control shuffled",
    "soft noise": "--router attention --control noise",
    "soft untrained": "--router attention --control untrained",

    # One more expert: the first one again, which answers another problem; or a large one that knows nothing.
    "soft wrong": "--router attention --extension lab/controls.py --control last_wrong {more_steps}",
    "soft wide": "--router attention",

    # The paper's one state after the prompt, without the expert's own text.
    "soft prompt": "--router attention --states last",

    # What comparing adds: the same run without it, and the run as it was before there was comparing.
    "soft without comparing": "--router mixed",
    "soft without comparing at high rates": "--router mixed {longer} --trust_lr 0.3",
    "soft without stage 0": "--router attention --reading_steps 0 {longer}",
    "soft wrong without comparing": "--router mixed --extension lab/controls.py "
                                    "--control last_wrong {more_steps}",

    # Single and prefix have the same stage 0: they read the same texts, in as many steps.
    "single": "--router none --reading_steps {reading_steps} {longer}",
    "single without stage 0": "--router none --reading_steps 0 {longer}",
    "prefix": "--router constant {longer}",
    "hard": "--router hard {longer}",
    "linear": "--router linear {longer} --router_lr 5e-4",  # of 5e-4, 1e-3 and 2e-3 the best on validation
    "text": "--router text {longer}",

    # No run of its own: the weights of soft's run after stage 0, tested by eval.py.
    "stage 0": "",
}
HEADLINE = ["soft", "single", "prefix", "soft shuffled"]
CONTROLS_OF_MIX = ["single", "single without stage 0", "prefix", "soft shuffled", "soft noise",
                   "soft untrained", "soft first", "linear", "hard", "text", "stage 0"]
WITHOUT = ["soft without comparing", "soft without comparing at high rates", "soft without stage 0"]


def preset_value(preset, name):
    """A setting of a preset; what it leaves out has the default of train.py."""
    return PRESETS[preset].get(name, getattr(Args(), name))


def rated_ways():
    """{way: options}: some ways with the rates of LoRA and router times 0.5, 1 and 2."""
    found = {}
    for way in ("soft", "single", "prefix", "hard", "linear", "text"):
        lr, router_lr = 1e-3, 2e-3  # those of LONGER
        if way == "soft":
            lr, router_lr = preset_value("tiny", "lr"), preset_value("tiny", "router_lr")
        for factor in (0.5, 1, 2):
            rates = f"--lr {factor * lr:g} --router_lr {factor * router_lr:g}"
            found[f"{way} x {factor}"] = f"{WAYS[way]} {rates}"
    return found


RATED = rated_ways()

EMBEDDED = {  # block: [(tasks, ways, seeds)]
    "mix": [(["mix"], ["soft"], range(10))],
    "controls": [(["mix"], CONTROLS_OF_MIX, range(5))],
    "comparing": [(["mix"], WITHOUT, range(5)), (["sums"], ["soft wrong without comparing"], range(5))],
    "sums": [(["sums"], [*HEADLINE, "soft wrong", "soft wide"], range(5))],
    "others": [(["family", "primes", "sums hard"], HEADLINE, range(5))],
    "rates": [(["rates"], list(RATED), [100])],
}
REAL_BLOCKS = {
    "real family": [(["real family"], ["soft", "soft without comparing", "stage 0", "single"], range(3))],
    "real copies": [(["real copies"], ["soft", "soft without comparing", "stage 0"], range(3))],
    "real sums": [(["real sums"], HEADLINE, range(5)),
                  (["real sums"], ["single without stage 0", "soft noise", "soft untrained", "soft prompt",
                                   "soft wrong", "stage 0"], range(3))],
    "real mix": [(["real mix"], ["soft", "stage 0"], range(3))],
    "real terms": [(["real terms"], ["soft", "stage 0"], range(3))],
    "real pool": [(["real pool"], HEADLINE, range(3)), (["real pool and Qwen"], ["soft"], range(3))],
    "real families": [(["real families"], ["soft", "single"], range(3))],
    "gsm8k": [(["gsm8k"], [*HEADLINE, "text", "stage 0"], range(3))],
}
QUICK = {"quick": [(["mix"], HEADLINE, range(2))]}
BLOCKS = EMBEDDED | REAL_BLOCKS | QUICK

# The models: the policy of all real tasks, and the experts of each task. The real ones are folders in FOLDER.
TINY_EXPERTS = ["tiny/arithmetic", "tiny/logic", "tiny/algorithmic"]
REAL_POLICY = "smollm2-135m-instruct"
QWEN, MINILM = "qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2"
SPECIALISTS = ["specialists/arithmetic", "specialists/logic", "specialists/algorithmic"]
REAL_EXPERTS = {
    "real sums": [QWEN, MINILM],
    "real family": [QWEN, "smollm2-family"],  # SmolLM2 that was taught family_relationships
    "real mix": [QWEN, QWEN],
    "real copies": [QWEN, QWEN],
    "real terms": [QWEN, "smollm2-sums"],  # SmolLM2 that was taught chain_sum of 2 to 4 terms

    # Those of lab.specialists, all made from SmolLM2 in 200 steps each.
    # MiniLM is not among them: it has room for 512 tokens, and the longest problem needs 578.
    "real pool": SPECIALISTS,
    "real pool and Qwen": [*SPECIALISTS, QWEN],

    # The logic specialist is made from gemma3-270m in 100 steps: another family, width and tokenizer.
    "real families": ["specialists/arithmetic", "gemma/logic", "specialists/algorithmic"],

    # One that thinks, and an encoder, which only reads.
    "gsm8k": [QWEN, MINILM],
}

# Of these ways it is also measured what replacing attention or states costs, and what each expert knows.
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
    def is_stage0(self):
        return self.way == "stage 0"

    @property
    def is_real(self):
        return self.task in REAL_EXPERTS

    @property
    def folder(self):
        """Where train.py writes. Stage 0 is tested in the folder of soft's run."""
        if self.is_stage0:
            return RUNS / Run(self.block, self.task, "soft", self.seed).id
        return RUNS / self.id


def runs_in(blocks):
    """The runs of some blocks, seed by seed, so that an early stop leaves whole comparisons; stage 0 last."""
    runs = []
    for block in blocks:
        for tasks, ways, seeds in BLOCKS[block]:
            for task in tasks:
                runs += [Run(block, task, way, seed) for seed in seeds for way in ways]
    once = {run.id: run for run in runs}  # two blocks may have a run in common
    return sorted(once.values(), key=order_of)


def order_of(run):
    return run.is_stage0, run.seed


def command(run, models="models"):
    """The command line of a run, a list of words. models: the folder of the real models."""
    folder = os.path.relpath(run.folder, HERE)
    if run.is_stage0:  # on as many problems as soft's test: eval.py would take all of GSM8K
        words = shlex.split(TASKS[run.task])
        n_test = words[words.index("--test") + 1]
        return ["python", "eval.py", folder, "--stage0", "--n", n_test]

    preset = "small" if run.is_real else "tiny"

    # Single reads in as many steps as soft.
    task = shlex.split(TASKS[run.task])
    reading_steps = preset_value(preset, "reading_steps")
    if "--reading_steps" in task:
        reading_steps = task[task.index("--reading_steps") + 1]
    longer = LONGER.get(run.task, LONGER[preset])
    way = (WAYS | RATED)[run.way].format(reading_steps=reading_steps, longer=longer,
                                         more_steps=MORE_STEPS[preset])
    words = ["python", "train.py", *task, *shlex.split(way)]

    # The models.
    experts = TINY_EXPERTS
    if run.is_real:
        experts = [f"{models}/{name}" for name in REAL_EXPERTS[run.task]]
        words += ["--policy", f"{models}/{REAL_POLICY}"]
    if run.way.startswith("soft wrong"):
        experts = [*experts, experts[0]]
    if run.way == "soft wide":
        experts = [*experts, os.path.relpath(RUNS / "wide", HERE)]
    if experts != TINY_EXPERTS:
        words += ["--experts", *experts]
    return [*words, "--seed", str(run.seed), "--out", folder]


# -- Do it

STAGE0_REPORT = "eval-stage0-n*.json"


def is_there(folder, name):
    """Is a file with this name, in which * stands for anything, in the folder?"""
    return bool(list(folder.glob(name)))


def missing_steps(run, models):
    """[(the file that a command leaves, the command)] of all that a run still needs, in order."""
    folder = os.path.relpath(run.folder, HERE)
    steps = []
    if run.is_stage0:
        steps.append((STAGE0_REPORT, command(run)))
    elif (run.folder / "config.json").exists():
        steps.append(("eval.json", ["python", "train.py", "--resume", folder]))
    else:
        steps.append(("eval.json", command(run, models)))
    if run.way in ABLATED:
        kinds = ["static", "uniform", "shuffle", "zero"]
        steps.append(("ablate.json", ["python", "-m", "lab.probe", folder, "--ablate", *kinds]))
    return [(name, words) for name, words in steps if not is_there(run.folder, name)]


class Study:
    """Carries out runs, `workers` at once. However it ends, those that are at work are asked to save."""

    def __init__(self, runs, models, workers):
        self.runs, self.models, self.workers = runs, models, workers
        self.processes = set()
        self.stopping = False
        self.n_failed = 0
        self.writing = threading.Lock()  # one row at a time

    def carry_out(self):
        """Raises ValueError if another study is at work, or if a run failed."""
        RUNS.mkdir(parents=True, exist_ok=True)
        if any(run.way == "soft wide" for run in self.runs):
            make_wide(RUNS / "wide")
        try:
            with filelock.FileLock(RUNS / "lock", timeout=0):
                self.carry_out_alone()
        except filelock.Timeout:
            raise ValueError("another study is at work: wait for its end") from None
        if self.n_failed:
            raise ValueError(f"{self.n_failed} runs failed, see their rows in results/study.jsonl: fix what "
                             "they say, delete these rows and call the study again")

    def carry_out_alone(self):
        # Stage 0 is tested when all runs that begin with it are trained.
        trained = [run for run in self.runs if not run.is_stage0]
        tested = [run for run in self.runs if run.is_stage0]
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                list(pool.map(self.one_run, trained))
                list(pool.map(self.one_run, tested))
            finally:
                self.stopping = True
                for process in list(self.processes):
                    process.terminate()

    def one_run(self, run):
        start, commit = time.monotonic(), commit_of_code()
        if self.stopping:
            return
        if run.is_stage0 and not is_there(run.folder, "eval.json"):
            print(f"{run.id}: the run that it belongs to is not finished", flush=True)
            return
        if is_locked(run.folder):
            print(f"{run.id}: a process that an earlier study left behind is still at work, call the study "
                  "again when it has ended", flush=True)
            return

        for name, words in missing_steps(run, self.models):
            if self.stopping:
                return
            code = self.call(run, words)
            if code > 0 and code != 130:  # 130: it was stopped by Ctrl-C; below 0: by a signal
                self.n_failed += 1
                reason = f"exit code {code}: {self.last_line(run)}"
                self.record(run, commit, dict(after=None, reason=reason))
                return
            if not is_there(run.folder, name):
                print(f"{run.id}: stopped, it continues when the study is called again", flush=True)
                return

        # The curve comes first: a row without a curve would not be complete.
        row, curve = collect(run)
        self.append(RESULTS / "curves.jsonl", curve)
        self.record(run, commit, row)
        seconds = time.monotonic() - start
        print(f"{run.id}: {row['before']:.1%} -> {row['after']:.1%}, {seconds:.0f} s", flush=True)

    def call(self, run, words):
        """Run a command, whose output goes to the end of the run's log. Returns the exit code."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with open(f"{run.folder}.log", "a") as log:
            # In a session of its own, Ctrl-C does not reach it directly, but once, by terminate() above.
            process = subprocess.Popen([sys.executable, *words[1:]], cwd=HERE, env=environment, stdout=log,
                                       stderr=log, start_new_session=True)
        self.processes.add(process)
        if self.stopping:  # the study was stopped in between
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
        self.append(RESULTS / "study.jsonl", row | more)

    def append(self, path, record):
        """Add a record to a .jsonl file, on a line of its own even if a kill has torn the last line."""
        line = json.dumps(without_nan(record), separators=(", ", ": "), allow_nan=False) + "\n"
        with self.writing:
            if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
                line = "\n" + line
            with open(path, "a") as file:
                file.write(line)


def is_locked(folder):
    """Does a process train in this folder?"""
    if not (folder / "lock").exists():
        return False
    try:
        with filelock.FileLock(folder / "lock", timeout=0):
            return False
    except filelock.Timeout:
        return True


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


def commit_of_code():
    """The commit of the code that a run is about to use, with a + if a Python file differs from it.

    None outside a repository.
    """
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    if not commit:
        return None
    if git("status", "--porcelain", "--", "*.py").stdout.strip():
        commit += "+"
    return commit


# -- What a run leaves: a row and a curve

def collect(run):
    """(numbers of the row, curve) of a finished run, from its folder alone."""
    out = run.folder
    args = read_config(out)["args"]
    if run.is_stage0:
        path = max(out.glob(STAGE0_REPORT), key=problems_in)
        metrics = []
    else:
        path = out / "eval.json"
        metrics = read_records(out / "metrics.jsonl")
    report = json.loads(path.read_text())

    # The row: the settings that differ between runs, and the numbers of the tables.
    row = {}
    for key in ("router", "control", "states", "cue", "reading_steps", "lr",
                "router_lr", "trust_lr"):
        row[key] = args[key]
    val = [record["val"] for record in metrics if "val" in record]
    seconds = sum(record["rollout_seconds"] + record["train_seconds"] for record in metrics)
    checkpoint = next(out.glob("stage0-*.safetensors")) if run.is_stage0 else checkpoints(out)[0]
    row |= dict(steps=len(metrics), before=report["before"]["strict"], after=report["after"]["strict"],
                n=report["n"], lenient=report["after"]["lenient"], val=val[-1] if val else None,
                trainable=count_trained(checkpoint), seconds=round(seconds))

    # The curve: everything else.
    curve = dict(id=run.id, task=run.task, way=run.way, seed=run.seed,
                 experts=[dict(name=name) for name in names_of_experts(report, args)],
                 curve=condense(metrics), read_back={})
    for record in read_records(out / "stage0.jsonl"):
        if "expert" in record:
            curve["read_back"][record.pop("expert")] = record
    for key in ("attention_by_dataset", "by_dataset", "masked", "right", "swap"):
        if key in report:
            curve[key] = report[key]
    if not run.is_stage0 and (out / "ablate.json").exists():
        ablate = json.loads((out / "ablate.json").read_text())
        for key in ("datasets", "attended", "knows"):
            curve[key] = ablate.pop(key)
        curve["ablate"] = ablate
    return row, curve


def problems_in(path):
    """The number of test problems of a report: 256 of eval-stage0-n256.json"""
    return int(path.stem.rpartition("-n")[2])


def names_of_experts(report, args):
    """The experts' names as the report has them, where two copies of a model differ; else their folders'."""
    for shares in report.get("attention_by_dataset", {}).values():
        return list(shares)
    return [Path(source.partition("@")[0]).name for source in args["experts"]]


def count_trained(checkpoint):
    """The number of trained parameters in a checkpoint.

    The router's statistics of the states are not trained, and neither is trust that is still zero everywhere:
    at rate 0, or because no two experts could be compared.
    """
    fixed = ["router.mean", "router.inv_std"]
    n_trained = 0
    for name, tensor in load_file(checkpoint).items():
        is_untouched_trust = name.startswith("router.trust") and not tensor.any()
        if name.startswith(("policy.", "router.")) and name not in fixed and not is_untouched_trust:
            n_trained += tensor.numel()
    return n_trained


CURVE_KEYS = ("reward", "sampled_reward", "val", "entropy", "kl", "frac_reward_zero_std", "length",
              "grad_norm", "attention_entropy", "attention", "attention_by_dataset", "reward_by_dataset",
              "reward_by_expert")


def condense(metrics, points=50):
    """The records of metrics.jsonl as at most `points` means over stretches, each named by its last step."""
    rows = []
    for stretch in np.array_split(metrics, points):
        if len(stretch):
            used = [{key: record[key] for key in CURVE_KEYS if key in record} for record in stretch]
            rows.append(dict(step=stretch[-1]["step"]) | mean(used))
    return rows


def mean(values):
    """The mean of numbers, or of dictionaries key by key, over those that have the key. None is left out."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if not isinstance(values[0], dict):
        return round(float(np.mean(values)), 4)
    means = {}
    for value in values:
        for key in value:
            if key not in means:
                means[key] = mean([other[key] for other in values if key in other])
    return means


# -- The report

def make_report():
    """Markdown, from rows and curves, for results/STUDY.md."""
    rows = claims.finished(RESULTS)
    parts = [claims.report(rows)]
    if rows:
        for path in sorted((RESULTS / "figures").glob("*.png")):
            if path.stem == "gsm8k":  # of an earlier program: the page shows it further below
                continue
            parts.append(f"![{path.stem.replace('_', ' ')}](figures/{path.name})")

    failed = []
    for row in claims.read_rows(RESULTS / "study.jsonl"):
        if row["after"] is None:
            failed.append(f"- {row['id']}: {row['reason']}")
    if failed:
        parts += ["Runs that failed:", "\n".join(failed)]
    return "\n\n".join(parts)


def write_report():
    from lab import figures  # matplotlib takes a second

    figures.draw_all(RESULTS)
    path = RESULTS / "STUDY.md"
    if not path.exists():
        raise ValueError(f"{path} is not there: fetch it from the repository, as only its tables are written")
    write_atomic(path, claims.with_report(path.read_text(), make_report()).encode())
    print(f"{path} and {RESULTS / 'figures'} are written again")


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m lab.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="FOLDER",
                        help="Run the blocks with real models, which are in this folder.")
    parser.add_argument("--only", nargs="+", metavar="BLOCK", choices=BLOCKS,
                        help=f"Run these blocks only: {', '.join(BLOCKS)}.")
    parser.add_argument("--list", action="store_true",
                        help="Print the runs and which are done, and run nothing.")
    parser.add_argument("--report", action="store_true",
                        help="Write results/STUDY.md and figures, and run nothing.")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1),
                        help="Number of runs at once, each with one thread. Default: %(default)s.")
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise ValueError("--workers must be at least 1")
    return options


def chosen_runs(options):
    """The runs that the options ask for. Raises ValueError if the models of one are not there."""
    blocks = options.only or list(REAL_BLOCKS if options.real else EMBEDDED)
    if options.list:
        return runs_in(options.only or [*EMBEDDED, *REAL_BLOCKS])
    runs = runs_in(blocks)

    needed = set()
    for run in runs:
        if run.is_real:
            needed |= {REAL_POLICY, *REAL_EXPERTS[run.task]}
    if needed and not options.real:
        raise ValueError("these blocks need real models: add --real FOLDER, the folder that holds "
                         f"{', '.join(sorted(needed))}")
    missing = sorted(name for name in needed if not (Path(options.real) / name).is_dir())
    if missing:
        raise ValueError(f"{options.real} lacks {', '.join(missing)}: put these model folders there, or "
                         "choose other blocks with --only")
    return runs


def show_list(runs, rows):
    for run in runs:
        state = ""
        if run.id in rows:
            state = "done" if rows[run.id]["after"] is not None else "failed"
        print(f"{state:6} {run.id:42} {shlex.join(command(run))}")


def run(argv=None):
    options = parse(argv)
    if options.report:
        return write_report()

    runs = chosen_runs(options)
    rows = {row["id"]: row for row in claims.read_rows(RESULTS / "study.jsonl")}
    if options.list:
        return show_list(runs, rows)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    models = os.path.abspath(options.real) if options.real else "models"
    to_do = [run for run in runs if run.id not in rows]
    Study(to_do, models, options.workers).carry_out()
    print(claims.report(claims.finished(RESULTS)))


if __name__ == "__main__":
    sys.exit(run_cli("lab.study", run))
