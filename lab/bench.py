"""
How fast it is: beside other programs, and beside the least that the device needs for the products alone.

    python -m lab.bench                  on a random model of SmolLM2-135M's shape: 15 minutes on two cores
    python -m lab.bench --quick          with half the prompts and tokens; its figures are not kept
    python -m lab.bench --device cuda    the same on a GPU; a larger --shape pays there
    python -m lab.bench --peers          also a step of TRL's GRPOTrainer, in its own environment (24 GB)
    python -m lab.bench --only rollout   some of it; with --json FILE the other figures in FILE stay
    python -m lab.bench --only           nothing is measured: results/SPEED.md is written again

A figure is a ratio of two things that are measured in turn, so that it holds where the machine's speed
drifts: its median, least and greatest of the rounds. Memory is the peak above what was resident before, each
side in a process of its own. results/SPEED.md is written from the figures, each beside its floor. No test
depends on them.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py, before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lab import claims
from model import Policy, TokenLogprob
from rewards import Problem, cache_dir, verify
from rlvr import (Batch, advantages, clip_gradients, grpo_loss, make_optimizer, parameters_of, rollout,
                  run_cli)
from router import Router
from train import Args

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny" / "policy"

FLOORS = {  # figure: the value that it should reach, and what it is
    "rollout_ratio": ("≥ 3", "seconds of transformers' generate / ours, the faster of eager and sdpa"),
    "rollout_limit_share": ("≥ 0.6", "seconds of the matrix products alone / the whole rollout"),
    "gradient_time_ratio": ("≥ 1.7", "gradient pass, prompt copied to each completion / prompt shared"),
    "gradient_memory_share": ("≤ 0.6", "its peak, shared / copied"),
    "logprob_time_share": ("≤ 1.15", "log-probabilities in chunks / from the whole (n, V)"),
    "logprob_memory_share": ("≤ 0.25", "their peak, in chunks / whole"),
    "router_ratio_n8": ("≥ 2", "projecting 8 narrow experts: a loop over them / one einsum"),
    "router_ratio_wide": ("≥ 0.9", "the same of 8 experts from 384 to 2,048 wide: half of it is padding"),
    "start_s": ("≤ 8", "seconds of `python train.py --reading_steps 0` to its first step, states cached"),
    "experts_8_over_1_step": ("≤ 1.05", "a step with eight experts / with one, the embedded policy"),
    "verify_ms_64": ("≤ 20", "milliseconds to verify 64 completions"),
    "trl_step_ratio": ("≥ 4", "a step of TRL's GRPOTrainer / ours"),
    "trl_memory_share": ("≤ 0.33", "its peak: ours / TRL's"),
}
SHAPES = {
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3),  # SmolLM2-135M's
    "0.5B": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2),  # Qwen2.5-0.5B's
    "3B": dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
               num_attention_heads=16, num_key_value_heads=2),  # Qwen2.5-3B's
}


# -- Measuring

def clock(device):
    """Seconds of the wall clock, when the device has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run, device):
    start = clock(device)
    run()
    return clock(device) - start


def alternate(device, *functions, rounds=3):
    """Seconds of each function in each round, [function][round]. One round before them is not counted."""
    times = []
    for _ in range(rounds + 1):
        times.append([seconds(function, device) for function in functions])
    return list(zip(*times[1:]))


def summary(values):
    """(median, least, greatest)"""
    return statistics.median(values), min(values), max(values)


def ratio(a, b):
    return summary([x / y for x, y in zip(a, b)])


def resident(field):
    """MB of memory of this process, by Linux's name for it: VmRSS now, VmHWM at the peak."""
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024


def peak(run, device):
    """MB at the peak of run() above those before it.

    On a CPU it is Linux that keeps the peak. Writing 5 to clear_refs sets it back to what is resident now.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def in_a_process(function, *args, **options):
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


def peak_of(make, **options):
    return peak(make(**options), options["device"])


# -- What is measured

def random_model(folder, shape):
    """A random model of this shape, with the embedded policy's tokenizer: its speed is the real one's."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, eos_token_id=0, bos_token_id=None,
                         tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def load(folder, device, dtype=torch.bfloat16):
    policy = Policy.from_pretrained(folder, dtype=dtype, device=device)
    policy.stop_at([len(policy.embed) - 1])  # hardly ever drawn: both sides write every token
    return policy


def texts(n, length, device):
    """n prompts of `length` random tokens: tokens (n, length), lengths (n,)."""
    tokens = torch.randint(2, 200, (n, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(device), torch.full((n,), length, device=device)


@torch.no_grad()
def products(parts):
    """Matrix products alone. parts: (rows, times, weights), every weight with so many rows, so often."""
    for rows, times, weights in parts:
        x = {}
        for w in weights:
            x[w.shape[1]] = torch.zeros(rows, w.shape[1], dtype=w.dtype, device=w.device)
        for _ in range(times):
            for w in weights:
                F.linear(x[w.shape[1]], w)


def bench_rollout(folder, size, device):
    """Ours, transformers' generate with eager and with sdpa attention, and the matrix products alone."""
    policy = load(folder, device)
    tokens, lengths = texts(size["prompts"], 128, device)
    generator = torch.Generator(device).manual_seed(0)
    rows, new = size["prompts"] * 8, size["new"]

    @torch.no_grad()
    def ours():
        policy.generate(policy.prefill(tokens, lengths), 8, new, 1.0, generator)

    def generate_with(attention):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,
                                                     attn_implementation=attention)
        model = model.eval().to(device)
        ids = tokens.repeat_interleave(8, 0)

        def theirs():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                           temperature=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

        return theirs

    body = [layer.weight for layer in policy.adapters()]
    parts = [(size["prompts"] * 128, 1, body), (rows, new, [*body, policy.head])]

    def products_alone():
        products(parts)

    # The limit takes more rounds, right beside ours: generate takes long, and meanwhile a machine drifts.
    mine, limit = alternate(device, ours, products_alone, rounds=9)
    beside, eager, sdpa = alternate(device, ours, generate_with("eager"), generate_with("sdpa"))
    faster = min((eager, sdpa), key=statistics.median)
    times = {"ours": mine, "generate, eager": eager, "generate, sdpa": sdpa, "products alone": limit}
    per_second = {name: rows * new / statistics.median(values) for name, values in times.items()}
    return dict(rollout_ratio=ratio(faster, beside), rollout_limit_share=ratio(limit, mine),
                tokens_a_second=per_second)


def scoring(folder, prompts, new, copies, device, group=8):
    """A function: the gradient of `group` completions of each prompt, the prompt shared or copied."""
    policy = load(folder, device)
    tokens, lengths = texts(prompts, 128, device)
    answers = torch.randint(2, 200, (prompts, group, new), generator=torch.Generator().manual_seed(1))
    if copies:
        tokens, lengths = tokens.repeat_interleave(group, 0), lengths.repeat_interleave(group, 0)
        answers = answers.flatten(0, 1)[:, None]
    answers = answers.to(device)
    mask = torch.ones_like(answers, dtype=torch.bool)

    def run():
        logp, _ = policy.logprobs(policy.prefill(tokens, lengths), answers, mask)
        logp.mean().backward()
        policy.zero_grad(set_to_none=True)

    return run


def bench_gradient(folder, size, device):
    options = dict(folder=folder, prompts=size["prompts"], new=size["new"], device=device)
    times = alternate(device, scoring(**options, copies=True), scoring(**options, copies=False))
    shared = in_a_process(peak_of, scoring, **options, copies=False)
    copied = in_a_process(peak_of, scoring, **options, copies=True)
    return dict(gradient_time_ratio=ratio(*times), gradient_memory_share=summary([shared / copied]))


def head(at_once, device, n=2048):
    """A function: log-probabilities of n tokens with gradient, in chunks or from the whole (n, V)."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(49152, 576, generator=generator) * 0.05).bfloat16().to(device)
    h = torch.randn(n, 576, generator=generator).bfloat16().to(device).requires_grad_()
    targets = torch.randint(0, 49152, (n,), generator=generator).to(device)

    def run():
        if at_once:
            logp = (h @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        else:
            logp, _ = TokenLogprob.apply(h, weight, targets, 1.0, 256)
        logp.sum().backward()
        h.grad = None

    return run


def bench_head(folder, size, device):
    times = alternate(device, head(False, device), head(True, device))
    chunks = in_a_process(peak_of, head, at_once=False, device=device)
    all_at_once = in_a_process(peak_of, head, at_once=True, device=device)
    return dict(logprob_time_share=ratio(*times), logprob_memory_share=summary([chunks / all_at_once]))


def bench_router(folder, size, device):
    narrow = [64, 72, 80, 88, 96, 104, 112, 128]
    wide = [384, 576, 640, 768, 896, 1024, 1536, 2048]
    return dict(router_ratio_n8=ratio(*alternate(device, *projections(narrow, 64, device), rounds=15)),
                router_ratio_wide=ratio(*alternate(device, *projections(wide, 512, device), rounds=15)))


def projections(widths, dim, device):
    """Two functions: the projection of eight experts, forward and backward, in a loop and by one einsum.

    The attention after it is the same for both.
    """
    router = Router(widths, list(range(len(widths))), 576, dim=dim).to(device)
    states = [torch.randn(32, width, device=device) for width in widths]
    H = torch.stack([F.pad(h, (0, max(widths) - h.shape[1])) for h in states], 1)
    weights = [nn.Parameter(W[:width].detach().clone()) for width, W in zip(widths, router.W)]
    gradient = torch.randn(32, len(widths), dim, device=device)

    def loop():
        rows = []
        for e, (h, W) in enumerate(zip(states, weights)):
            width = h.shape[1]
            x = ((h - router.mean[e, :width]) * router.inv_std[e, :width]).clamp(-10, 10)
            rows.append(x @ W + router.state_embed[e])
        return router.norm_states(torch.stack(rows, 1))

    def einsum():
        x = router.standardize(H)
        return router.norm_states(torch.einsum("bnd,ndk->bnk", x, router.W) + router.state_embed)

    def many(project, trained):
        def run():
            for _ in range(20):
                torch.autograd.grad(project(), (*trained, router.state_embed), gradient)
        return run

    return many(loop, weights), many(einsum, [router.W])


def bench_verify(folder, size, device):
    problem = Problem("How many?", "18")
    answers = [f"<think>{'so ' * 40}{i} and {2 * i}</think>It is <answer>{i}</answer>" for i in range(64)]

    def verify_all():
        for answer in answers:
            verify(answer, problem)

    (times,) = alternate("cpu", verify_all, rounds=20)
    return dict(verify_ms_64=summary([1000 * t for t in times]))


# -- A whole step

BETA = 0.04  # the paper's weight of the KL to the frozen policy


def stepper(folder, device, prompts, group, prompt, new, experts, tiny=False, micro=None):
    """A function: one step of train.py's loop as in the preset *paper*, with KL and without comparing.

    No completion ends early, and the experts' states are at hand. The rewards are random, so that every group
    teaches something. A gradient pass has `micro` prompts, or all.
    """
    # Models, optimizer, and a batch.
    policy = load(folder, device, torch.float32 if tiny else torch.bfloat16)
    policy.tokenizer = AutoTokenizer.from_pretrained(folder)
    width, dim = (160, 64) if tiny else (1024, 512)
    expert_of_state = list(range(experts))
    router = Router([width] * experts, expert_of_state, policy.config.hidden_size, dim=dim).to(device)
    optimizer = make_optimizer(policy, router, 1e-4, 1e-4)
    parameters = parameters_of(optimizer)
    tokens, lengths = texts(prompts, prompt, device)
    visible = torch.ones(prompts, experts, dtype=torch.bool, device=device)
    alone = torch.eye(experts, dtype=torch.bool, device=device)
    batch = Batch([Problem("How many?", "18")] * prompts, tokens, lengths,
                  torch.randn(prompts, experts, width, device=device), visible, alone)
    args = Args(max_new=new, answer_format="plain")
    generator = torch.Generator(device).manual_seed(0)

    passes = torch.arange(prompts).split(micro or prompts)

    def step():
        sampled = rollout(policy, router, batch, args, group, 1.0, generator)
        rewards = torch.randint(0, 2, (prompts, group), generator=generator, device=device).float()
        advantage, n_tokens = advantages(rewards), sampled.mask.sum()
        for rows in passes:
            part, answers, mask = batch[rows], sampled.tokens[rows], sampled.mask[rows]
            with torch.no_grad(), policy.lora("off"):
                reference, _ = policy.score(part, None, answers, mask)
            context, _ = router(part.H, part.visible)
            logp, _ = policy.score(part, context, answers, mask)
            (grpo_loss(logp, reference, advantage[rows], mask, BETA) / n_tokens).backward()
        clip_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(device, rounds=2, **options):
    """([seconds of each round after one], MB at the peak above the libraries) of a step."""
    times = []

    def run():
        step = stepper(device=device, **options)
        for _ in range(rounds + 1):
            times.append(seconds(step, device))

    mb = peak(run, device)
    return times[1:], mb


def bench_start(folder, size, device):
    """Steps of the embedded policy, with eight experts and with one; and how long train.py takes to begin."""
    options = dict(folder=TINY, device=device, prompts=36, group=8, prompt=32, new=8, tiny=True)
    eight, one = (stepper(**options, experts=experts) for experts in (8, 1))
    many_over_one = ratio(*alternate(device, eight, one, rounds=12))

    waited = []
    for _ in range(1 + 3):
        with tempfile.TemporaryDirectory() as out:
            waited.append(seconds_to_first_step(out, device))
    return dict(start_s=summary(waited[1:]), experts_8_over_1_step=many_over_one)


def seconds_to_first_step(out, device):
    command = [sys.executable, str(ROOT / "train.py"), "--reading_steps", "0", "--val", "1", "--test", "1",
               "--steps", "100", "--device", device, "--out", out]
    metrics = Path(out, "metrics.jsonl")
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.02)
        waited = time.perf_counter() - start
        process.kill()
    if not metrics.exists():
        raise ValueError(f"{' '.join(command)} ended before its first step: call it to see why")
    return waited


# -- TRL

def bench_peers(folder, size, device):
    """A step of TRL's GRPOTrainer beside ours, on 8 prompts x 8 completions of 96 and 64 tokens.

    Both have 32 completions in a gradient pass. TRL lives in an environment of its own, as it wants other
    versions; it is installed there the first time.
    """
    venv = cache_dir() / "trl"
    python = str(venv / "bin" / "python")
    if not list(venv.glob("lib/*/site-packages/trl")):
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        needs = [f"torch=={version('torch').partition('+')[0]}", "trl==1.16.*", "peft", "datasets"]
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)

    # Ours before and after theirs, as the machine's speed drifts.
    options = dict(folder=folder, device=device, prompts=8, group=8, prompt=96, new=64, experts=3, micro=4)
    before, mb_before = in_a_process(measure_step, **options)
    done = subprocess.run([python, "-c", TRL, str(folder), device], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"TRL made no step, see above: {python} -c 'import trl' should work")
    theirs = json.loads(done.stdout.splitlines()[-1])
    after, mb_after = in_a_process(measure_step, **options)

    ours = [statistics.median(before), statistics.median(after)]
    print(f"  TRL {theirs['version']}: {theirs['seconds']} s, {theirs['mb']:,.0f} MB; ours {ours} s, "
          f"{[mb_before, mb_after]} MB")
    return dict(trl_step_ratio=ratio(theirs["seconds"], ours),
                trl_memory_share=summary([mb / theirs["mb"] for mb in (mb_before, mb_after)]))


TRL = """
import json, sys, time
import torch, trl, transformers
from datasets import Dataset
from peft import LoraConfig
folder, device = sys.argv[1:]
def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024
before, marks = resident("VmRSS"), []
class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *args, **options): marks.append(time.perf_counter())
    def on_step_end(self, *args, **options):
        if device != "cpu": torch.cuda.synchronize()
        marks.append(time.perf_counter())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
config = trl.GRPOConfig(output_dir=folder + "/trl", per_device_train_batch_size=32,
    gradient_accumulation_steps=2, num_generations=8, max_completion_length=64, max_steps=3,
    beta=0.04, learning_rate=1e-4, bf16=True, use_cpu=device == "cpu", report_to=[], save_strategy="no",
    gradient_checkpointing=False, model_init_kwargs=dict(dtype=torch.bfloat16))
prompts = [" ".join("123456789"[(i + j) % 9] for j in range(96)) for i in range(64)]
trainer = trl.GRPOTrainer(model=folder, args=config, processing_class=tokenizer,
    reward_funcs=lambda completions, **options: [float(i % 2) for i in range(len(completions))],
    train_dataset=Dataset.from_dict(dict(prompt=prompts)),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), callbacks=[Clock()])
trainer.train()
mb = resident("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
seconds = [b - a for a, b in zip(marks[::2], marks[1::2])][1:]
print(json.dumps(dict(version=trl.__version__, seconds=seconds, mb=mb)))
"""


# -- What is written

def report(figures):
    """The first table of results/SPEED.md, as text."""
    made_by = figures["made_by"]
    rows = [["figure", "what", "median", "least", "greatest", "floor", "met", "by"], ["---"] * 8]
    for key, (floor, meaning) in FLOORS.items():
        if key in figures:
            sign, bound = floor.split()
            median = figures[key][0]
            met = median >= float(bound) if sign == "≥" else median <= float(bound)
            numbers = [f"{value:.3g}" for value in figures[key]]
            rows.append([key, meaning, *numbers, floor, "yes" if met else "**no**", made_by[key]])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)

    where = ", ".join(f"{name} {value}" for name, value in figures.get("where", {}).items())
    text = ["Written by `python -m lab.bench`. Median, least and greatest of the rounds; *by*: the commit "
            f"that was measured. Last run: {where}.\n",
            table + "\n"]
    if "tokens_a_second" in figures:
        rates = ", ".join(f"{name} {value:,.0f}" for name, value in figures["tokens_a_second"].items())
        commit = made_by["tokens_a_second"]
        text.append(f"Tokens a second in the rollout, prefill included ({commit}): {rates}.\n")
    return "\n".join(text)


# -- Plumbing. Nothing below is about the method; skip it at first reading.

BENCHES = {  # peers first: TRL needs 11 GB, and later this process holds as much
    "peers": bench_peers,
    "verify": bench_verify,
    "router": bench_router,
    "start": bench_start,
    "head": bench_head,
    "rollout": bench_rollout,
    "gradient": bench_gradient,
}


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Half the prompts and tokens.")
    parser.add_argument("--peers", action="store_true", help="Also beside TRL.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda. Default: cpu.")
    parser.add_argument("--shape", default="135M", choices=SHAPES, help="Shape of the random model.")
    parser.add_argument("--only", nargs="*", choices=BENCHES, help="Some of it.")
    parser.add_argument("--json", type=Path,
                        help="File for the figures; those that are not measured now stay in it.")
    return parser.parse_args(argv)


def run(argv=None):
    options = parse(argv)
    names = options.only
    if names is None:
        names = [name for name in BENCHES if name != "peers" or options.peers]
    size = dict(prompts=4, new=32) if options.quick else dict(prompts=8, new=64)

    # Figures are kept if they are those of a full run on this CPU, or if a file is named.
    results = ROOT / "results" / "speed.json"
    file = options.json
    if file is None and not (options.quick or options.device != "cpu" or options.shape != "135M"):
        file = results
    figures = {"made_by": {}}
    if file and file.exists():
        figures = json.loads(file.read_text())

    with tempfile.TemporaryDirectory() as folder:
        if names:
            random_model(folder, options.shape)
            figures["where"] = dict(command=" ".join(["python -m lab.bench", *(argv or sys.argv[1:])]),
                                    machine=platform.machine(), threads=torch.get_num_threads(),
                                    python=platform.python_version(), torch=version("torch"),
                                    transformers=version("transformers"))
        for name in names:
            print(f"{name} ...", flush=True)
            measured = BENCHES[name](folder, size, options.device)
            figures |= measured
            figures["made_by"] |= {key: measured_by(options) for key in measured}
            if file:
                file.write_text(json.dumps(figures, indent=1) + "\n")

    print(report(figures))
    if file and file.resolve() == results:
        page = ROOT / "results" / "SPEED.md"
        page.write_text(claims.with_report(page.read_text(), report(figures)))


def measured_by(options):
    """The commit, and what is special about the measurement."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if options.quick:
        text += " --quick"
    if options.device != "cpu":
        text += f" {torch.cuda.get_device_name()}"
    return text


if __name__ == "__main__":
    sys.exit(run_cli("lab.bench", run))
