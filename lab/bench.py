"""
How fast it is: against the alternatives, and against the least that the device needs for the products alone.

    python lab/bench.py                  on a random model of SmolLM2-135M's shape: half an hour on two cores
    python lab/bench.py --quick          half the prompts and tokens, no growth tables: minutes
    python lab/bench.py --device cuda    the same on a GPU, with launches a token; a larger --shape pays there
    python lab/bench.py --peers          and a step of TRL's GRPOTrainer, in an environment of its own (24 GB)
    python lab/bench.py --only rollout   some of it; with --json FILE the other figures are kept
    python lab/bench.py --only           nothing is measured: results/SPEED.md is written again

A figure is a ratio of two things measured in turn, so that it holds where the machine's speed drifts: median,
least and greatest of the rounds. Memory is the peak above what was resident before, each side in a process of
its own. results/SPEED.md is written from the figures, each with its floor. No test depends on them.
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
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import plan  # first: it lets Python find the files one folder up
from model import Policy, TokenLogprob
from rewards import Problem, cache_dir, verify
from rlvr import Batch, advantages, grpo_loss, make_optimizer, rollout
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
    "start_s": ("≤ 8", "seconds of `python train.py --align 0` to its first step, states cached"),
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
BASE = dict(prompts=4, group=8, prompt=128, new=64, experts=3)  # the step from which one thing is varied
GROWTH = dict(group=(4, 16), new=(32, 128), prompt=(64, 256), experts=(1, 8))  # in between: BASE
PARTS = ("rollout", "reference", "gradient")

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
    """Seconds of each function in each round, [function][round]. The round before them is not counted."""
    times = [[seconds(function, device) for function in functions] for _ in range(rounds + 1)]
    return list(zip(*times[1:]))

def summary(values):
    """(median, least, greatest)."""
    return statistics.median(values), min(values), max(values)

def ratio(a, b):
    return summary([x / y for x, y in zip(a, b)])

def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024

def peak(run, device):
    """MB at the peak of run() above those before it. On a CPU it is Linux that keeps the peak; writing 5 to
    clear_refs sets it back to what is resident now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before

def child(function, *args, **options):
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
    tokens = torch.randint(2, 200, (n, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(device), torch.full((n,), length, device=device)

@torch.no_grad()
def products(parts):
    """Matrix products alone. parts: (rows, times, weights), every weight with so many rows, so often."""
    for rows, times, weights in parts:
        x = {w.shape[1]: torch.zeros(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
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

    def theirs(attention):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,
                                                     attn_implementation=attention).eval().to(device)
        ids = tokens.repeat_interleave(8, 0)
        options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                       min_new_tokens=new, pad_token_id=0, attention_mask=torch.ones_like(ids))
        return lambda: model.generate(ids, **options)

    body = [layer.weight for layer in policy.adapters()]
    parts = [(size["prompts"] * 128, 1, body), (rows, new, [*body, policy.head])]
    # The limit in more rounds and right beside ours: generate takes long, and meanwhile a machine drifts.
    mine, limit = alternate(device, ours, lambda: products(parts), rounds=9)
    beside, eager, sdpa = alternate(device, ours, theirs("eager"), theirs("sdpa"))
    faster = min((eager, sdpa), key=statistics.median)
    times = {"ours": mine, "generate, eager": eager, "generate, sdpa": sdpa, "products alone": limit}
    figures = dict(rollout_ratio=ratio(faster, beside), rollout_limit_share=ratio(limit, mine))
    figures["tokens_a_second"] = {name: rows * new / statistics.median(t) for name, t in times.items()}
    figures |= profiled(ours, new, device)
    return figures

KINDS = {"products with the weights": ("aten::mm", "aten::addmm"),
         "products of attention": ("aten::bmm",),
         "softmax": ("aten::_softmax",),
         "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::masked_fill_"),
         "norms, rotation, SwiGLU, sums": ("aten::mul", "aten::add", "aten::sub", "aten::neg", "aten::silu",
                                           "aten::_fused_rms_norm", "aten::sum", "aten::div", "aten::cumsum")}

def profiled(run, new, device):
    """On a GPU the kernels that a token launches. On a CPU the share of run()'s operator time by kind; the
    profiler itself makes the many small ones look longer."""
    on_gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        seconds(run, device)
    events = profiler.key_averages()
    if on_gpu:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        return dict(launches_a_token=sum(e.count for e in kernels) / new)
    spent = {event.key: event.self_cpu_time_total for event in events}
    shares = {kind: sum(spent.pop(name, 0) for name in names) for kind, names in KINDS.items()}
    shares["the rest: dispatch, views, indices"] = sum(spent.values())
    return dict(rollout_profile={kind: t / sum(shares.values()) for kind, t in shares.items()})

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
    shared, copied = (child(peak_of, scoring, **options, copies=copies) for copies in (False, True))
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
    chunks, entire = (child(peak_of, head, at_once=at_once, device=device) for at_once in (False, True))
    return dict(logprob_time_share=ratio(*times), logprob_memory_share=summary([chunks / entire]))

def bench_router(folder, size, device):
    narrow, wide = [64, 72, 80, 88, 96, 104, 112, 128], [384, 576, 640, 768, 896, 1024, 1536, 2048]
    return dict(router_ratio_n8=ratio(*alternate(device, *projections(narrow, 64, device), rounds=15)),
                router_ratio_wide=ratio(*alternate(device, *projections(wide, 512, device), rounds=15)))

def projections(widths, dim, device):
    """Two functions: the projection of eight experts, forward and backward, in a loop and by one einsum; the
    attention after it is the same for both."""
    router = Router(widths, 576, dim=dim).to(device)
    states = [torch.randn(32, width, device=device) for width in widths]
    H = torch.stack([F.pad(h, (0, max(widths) - h.shape[1])) for h in states], 1)
    weights = [nn.Parameter(W[:width].detach().clone()) for width, W in zip(widths, router.W)]
    gradient = torch.randn(32, 8, dim, device=device)

    def loop():
        rows = []
        for e, (h, W) in enumerate(zip(states, weights)):
            width = h.shape[1]
            x = ((h - router.mean[e, :width]) * router.inv_std[e, :width]).clamp(-10, 10)
            rows.append(x @ W + router.expert_embed[e])
        return router.norm_experts(torch.stack(rows, 1))

    def einsum():
        return router.project(router.standardize(H))

    def many(project, trained):
        for _ in range(20):
            torch.autograd.grad(project(), (*trained, router.expert_embed), gradient)

    return lambda: many(loop, weights), lambda: many(einsum, [router.W])

def bench_verify(folder, size, device):
    problem = Problem("How many?", "18")
    answers = [f"<think>{'so ' * 40}{i} and {2 * i}</think>It is <answer>{i}</answer>" for i in range(64)]
    (times,) = alternate("cpu", lambda: [verify(answer, problem) for answer in answers], rounds=20)
    return dict(verify_ms_64=summary([1000 * t for t in times]))

# -- A whole step

def trainer(folder, device, prompts, group, prompt, new, experts, tiny=False, micro=None):
    """A function: one step of train.py's loop; it returns the seconds of its PARTS. No completion ends early,
    and the experts' states are at hand. The rewards are random, so that every group teaches something. A pass
    has `micro` prompts, or all."""
    policy = load(folder, device, torch.float32 if tiny else torch.bfloat16)
    policy.tokenizer = AutoTokenizer.from_pretrained(folder)
    width, dim = (160, 64) if tiny else (1024, 512)
    router = Router([width] * experts, policy.config.hidden_size, dim=dim).to(device)
    optimizer = make_optimizer(policy, router, 1e-4, 1e-4)
    parameters = [p for part in optimizer.param_groups for p in part["params"]]
    tokens, lengths = texts(prompts, prompt, device)
    batch = Batch([Problem("How many?", "18")] * prompts, tokens, lengths,
                  torch.randn(prompts, experts, width, device=device))
    args = Args(max_new=new, form="plain")
    generator = torch.Generator(device).manual_seed(0)
    passes = [slice(i, i + (micro or prompts)) for i in range(0, prompts, micro or prompts)]

    def score(sampled, part, context=None):
        cache = policy.prefill(tokens[part], lengths[part], context)
        return policy.logprobs(cache, sampled.tokens[part], sampled.mask[part])[0]

    def step():
        times = [clock(device)]
        sampled = rollout(policy, router, batch, args, group, 1.0, generator)
        times.append(clock(device))
        with torch.no_grad(), policy.lora_disabled():
            ref = torch.cat([score(sampled, part) for part in passes])
        times.append(clock(device))
        rewards = torch.randint(0, 2, (prompts, group), generator=generator, device=device).float()
        advantage, n_tokens = advantages(rewards), sampled.mask.sum()
        for part in passes:
            logp = score(sampled, part, router(batch.H[part])[0])
            loss = grpo_loss(logp, logp.detach(), ref[part], advantage[part], sampled.mask[part], args)
            (loss / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock(device))
        return {part: end - start for part, start, end in zip(PARTS, times, times[1:])}

    return step

def measure_step(device, rounds=2, **options):
    """Seconds of a step by part, median of the rounds after one, and MB at the peak above the libraries."""
    rows = []

    def run():
        step = trainer(device=device, **options)
        rows.extend(step() for _ in range(rounds + 1))

    mb = peak(run, device)
    return {part: statistics.median(row[part] for row in rows[1:]) for part in PARTS} | dict(mb=mb)

def planned(model, device, prompts, group, prompt, new, experts, tiny):
    """What plan.py says of the step that `trainer` makes: seconds, and MB above the libraries."""
    width, dim = (160, 64) if tiny else (1024, 512)
    args = Args(batch=prompts, micro_batch=prompts, group=group, max_new=new, router_dim=dim, device=device)
    policy, S = plan.Sizes(str(model)), prompt + args.latents
    pool = [SimpleNamespace(d=width, params=0, dtype=policy.dtype)] * experts
    memory = plan.peak(plan.memory(args, policy, pool, S)) - plan.IMPORTED
    return dict(plan_seconds=sum(plan.step_seconds(args, policy, S, new)), plan_mb=memory / 2**20)

def bench_growth(folder, size, device):
    """How a step grows, one thing varied at a time, and with the model; beside each what plan.py says. Quick:
    the embedded policy alone."""
    def step(varied, value, model=folder, tiny=False, **changed):
        options = BASE | changed
        measured = child(measure_step, folder=model, device=device, tiny=tiny, **options)
        forecast = planned(model, device, tiny=tiny, **options)
        rows.append(dict(varied=varied, value=value) | measured | forecast)
        print(rows[-1], flush=True)

    rows = []
    step("model", "tiny", TINY, tiny=True)
    if size["grow"]:
        step("model", "135M")
        with tempfile.TemporaryDirectory() as larger:
            random_model(larger, "0.5B")
            step("model", "0.5B", larger)
        for name, values in GROWTH.items():
            for value in values:
                step(name, value, **{name: value})
    return dict(growth=rows)

def bench_start(folder, size, device):
    """A step with eight experts against one; and `python train.py` to its first row of metrics."""
    steps = [trainer(TINY, device, 36, 8, 32, 8, experts, tiny=True) for experts in (8, 1)]
    times = alternate(device, *steps, rounds=12)
    waited = []
    for _ in range(1 + 3):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(ROOT / "train.py"), "--align", "0", "--val", "1", "--test", "1",
                       "--steps", "100", "--device", device, "--out", out]
            start, metrics = time.perf_counter(), Path(out, "metrics.jsonl")
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while not metrics.exists() and process.poll() is None:
                    time.sleep(0.02)
                waited.append(time.perf_counter() - start)
                process.kill()
            if not metrics.exists():
                raise ValueError(f"{' '.join(command)} ended before its first step: call it to see why")
    return dict(start_s=summary(waited[1:]), experts_8_over_1_step=ratio(*times))

# -- TRL

def bench_peers(folder, size, device):
    """A step of TRL's GRPOTrainer against ours on 8 prompts x 8 completions of 96 and 64 tokens, both with 32
    completions in a gradient pass, train.py's default. TRL lives in an environment of its own, as it wants
    other versions; the first time that is installed."""
    venv = cache_dir() / "trl"
    python = str(venv / "bin" / "python")
    if not list(venv.glob("lib/*/site-packages/trl")):
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        needs = [f"torch=={version('torch').partition('+')[0]}", "trl==1.16.*", "peft", "datasets"]
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    options = dict(folder=folder, device=device, prompts=8, group=8, prompt=96, new=64, experts=3,
                   micro=4)
    ours = [child(measure_step, **options)]  # before and after theirs: the machine's speed drifts
    done = subprocess.run([python, "-c", TRL, str(folder), device], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"TRL did no step, see above: {python} -c 'import trl' should work")
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours.append(child(measure_step, **options))
    steps = [sum(one[part] for part in PARTS) for one in ours]
    print(f"  TRL {theirs['version']}: {theirs['seconds']} s, {theirs['mb']:,.0f} MB; ours {steps} s, "
          f"{[one['mb'] for one in ours]} MB")
    return dict(trl_step_ratio=ratio(theirs["seconds"], steps),
                trl_memory_share=summary([one["mb"] / theirs["mb"] for one in ours]))

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

def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"

def listed(values, form):
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())

def report(figures):
    """results/SPEED.md as text."""
    made_by = figures["made_by"]
    rows = []
    for key, (floor, meaning) in FLOORS.items():
        if key in figures:
            median, sign, bound = figures[key][0], *floor.split()
            met = median >= float(bound) if sign == "≥" else median <= float(bound)
            numbers = [f"{value:.3g}" for value in figures[key]]
            rows.append((key, meaning, *numbers, floor, "yes" if met else "**no**", made_by[key]))
    text = ["# Speed\n",
            "Written by `python lab/bench.py`. Median, least and greatest of the rounds; *by*: the commit "
            f"that was measured. Last run: {listed(figures['where'], '')}.\n",
            table(("figure", "what", "median", "least", "greatest", "floor", "met", "by"), rows)]
    if "tokens_a_second" in figures:
        text.append(f"Tokens a second in the rollout, prefill included ({made_by['tokens_a_second']}): "
                    f"{listed(figures['tokens_a_second'], ',.0f')}.\n")
    if "launches_a_token" in figures:
        text.append(f"Kernels launched for a token ({made_by['launches_a_token']}): "
                    f"{figures['launches_a_token']:,.0f}.\n")
    if "rollout_profile" in figures:
        text.append(f"What the rollout's time is made of, by profiler ({made_by['rollout_profile']}): "
                    f"{listed(figures['rollout_profile'], '.0%')}.\n")
    if "simpler" in figures:
        simpler = figures["simpler"]
        text += ["## What being simpler costs\n", simpler["about"] + "\n",
                 table(simpler["head"], simpler["rows"]), simpler["why"] + "\n"]
    if "by_hand" in figures:
        text.append(figures["by_hand"] + "\n")
    if "growth" in figures:
        rows = []
        for row in figures["growth"]:
            total_seconds = sum(row[part] for part in PARTS)
            shares = [f"{row[part] / total_seconds:.0%}" for part in PARTS]
            rows.append((row["varied"], row["value"], f"{total_seconds:.2f}", f"{row['mb']:,.0f}", *shares,
                         f"{row['plan_seconds'] / total_seconds:.2f}", f"{row['plan_mb'] / row['mb']:.2f}"))
        text += ["## Growth\n",
                 f"One step, one thing varied at a time from {listed(BASE, '')} (prompt and new: tokens), "
                 "135M in bf16, tiny in fp32. MB above the libraries, then shares, then what `lab/plan.py` "
                 "says, divided by what was measured (three constants of its forecast of time are fitted to "
                 f"such rows of commit 2d49382, on another processor); {made_by['growth']}.\n",
                 table(("varied", "value", "seconds", "MB", *PARTS, "plan: seconds", "plan: MB"), rows)]
    return "\n".join(text)

# peers first: TRL needs 11 GB, and later this process holds as much
BENCHES = dict(peers=bench_peers, verify=bench_verify, router=bench_router, start=bench_start,
               head=bench_head, rollout=bench_rollout, gradient=bench_gradient, growth=bench_growth)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the prompts and tokens, no growth")
    parser.add_argument("--peers", action="store_true", help="also against TRL")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", default="135M", choices=SHAPES, help="of the random model")
    parser.add_argument("--only", nargs="*", choices=BENCHES, help="some of it")
    parser.add_argument("--json", type=Path, help="the figures, kept here; those not measured now stay in it")
    args = parser.parse_args()
    results = ROOT / "results" / "speed.json"  # of full runs, or named
    file = args.json or (None if args.quick or args.device != "cpu" or args.shape != "135M" else results)
    size = dict(prompts=4, new=32, grow=False) if args.quick else dict(prompts=8, new=64, grow=True)
    names = args.only
    if names is None:
        names = [name for name in BENCHES if name != "peers" or args.peers]
    figures = json.loads(file.read_text()) if file and file.exists() else {"made_by": {}}
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    by = subprocess.run(command, capture_output=True, text=True).stdout.strip() + " --quick" * args.quick
    if args.device != "cpu":
        by += f" {torch.cuda.get_device_name()}"
    with tempfile.TemporaryDirectory() as folder:
        if names:
            random_model(folder, args.shape)
            figures["where"] = dict(command=" ".join(["python", *sys.argv]), machine=platform.machine(),
                                    threads=torch.get_num_threads(), python=platform.python_version(),
                                    torch=version("torch"), transformers=version("transformers"))
        for name in names:
            print(f"{name} ...", flush=True)
            measured = BENCHES[name](folder, size, args.device)
            figures |= measured
            figures["made_by"] |= {key: by for key in measured}
            if file:
                file.write_text(json.dumps(figures, indent=1) + "\n")
    print(report(figures))
    if file and file.resolve() == results:
        (ROOT / "results" / "SPEED.md").write_text(report(figures))

if __name__ == "__main__":
    main()
