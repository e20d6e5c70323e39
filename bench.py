"""
How fast it is, against the alternatives and against the limit of the processor.

    python bench.py                   everything on a random model of SmolLM2-135M's shape: 25 minutes on 2 cores
    python bench.py --quick           smaller sizes and no growth tables: 5 minutes
    python bench.py --peers           and TRL's GRPOTrainer, in an environment of its own (24 GB of memory)
    python bench.py --only rollout    some of it; the figures of the rest are kept in --json

Every figure is a ratio of two things measured in turn in one run, so that it holds where the machine's speed
drifts; medians of the rounds are given with their least and greatest. Memory is the peak above what was resident
before, each side in a process of its own. results/SPEED.md is written from the figures.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
BARS = dict(rollout_ratio="≥ 3", rollout_limit_share="≥ 0.6", gradient_time_ratio="≥ 1.7",
            gradient_memory_share="≤ 0.6", logprob_time_share="≤ 1.15", logprob_memory_share="≤ 0.25",
            router_ratio_n8="≥ 2", router_ratio_wide="≥ 0.9", start_s="≤ 8", experts_8_over_1_step="≤ 1.05",
            verify_ms_64="≤ 20", memory_estimate="0.8 to 1.2", trl_step_ratio="≥ 4", trl_memory_share="≤ 0.33")
SMOL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3)
QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2)  # Qwen2.5-0.5B's


def alternate(rounds, *functions):
    """Seconds of each function in each round, [function][round]; one round before is not counted."""
    times = [[] for _ in functions]
    for i in range(rounds + 1):
        for f, kept in zip(functions, times):
            start = time.perf_counter()
            f()
            if i:
                kept.append(time.perf_counter() - start)
    return times


def spread(values):
    """(median, least, greatest)."""
    return statistics.median(values), min(values), max(values)


def ratio(a, b):
    return spread([x / y for x, y in zip(a, b)])


def random_model(folder, shape):
    """A random model of this shape, with the embedded policy's tokenizer: its speed is the real one's."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None,
                         tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HERE / "tiny" / "policy").save_pretrained(folder)


def load(folder, dtype=torch.bfloat16, **how):
    from model import Policy

    policy = Policy.load(folder, dtype=dtype, **how)
    policy.stop = torch.tensor([-1])  # nothing stops early: both sides write every token
    return policy


def texts(n, length):
    tokens = torch.randint(2, 200, (n, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.full((n,), length)


# -- memory, each in a process of its own
def resident(field="VmHWM"):
    line = next(x for x in open("/proc/self/status") if x.startswith(field))
    return int(line.split()[1]) / 1024


def peak_here(run):
    """MB at the peak of run() above those resident before. Linux keeps the peak; writing 5 to clear_refs sets it
    back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    run()
    return resident() - before


def child(what, **how):
    """The result of CHILDREN[what](**how) in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps([what, how])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- the parts
def bench_rollout(folder, size):
    """Ours, generate with eager and with sdpa attention, and the matrix products alone, end to end."""
    from transformers import AutoModelForCausalLM

    policy, (tokens, lengths), new = load(folder), texts(size["prompts"], 128), size["new"]
    generator, rows = torch.Generator().manual_seed(0), size["prompts"] * 8

    def ours():
        with torch.no_grad():
            policy.generate(policy.prefill(tokens, lengths), 8, new, 1.0, generator)

    def theirs(attention):
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention).eval()
        ids = tokens.repeat_interleave(8, 0)
        how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                   min_new_tokens=new, pad_token_id=0, attention_mask=torch.ones_like(ids))
        return lambda: hf.generate(ids, **how)

    weights = [m.weight for m in policy.adapters()] + [policy.head]

    @torch.no_grad()
    def products():  # every token meets every weight; a prompt meets the head once, not everywhere
        for n, times, some in ((rows, new, weights), (size["prompts"] * 128, 1, weights[:-1])):
            x = {w.shape[1]: torch.zeros(n, w.shape[1], dtype=w.dtype) for w in weights}
            for _ in range(times):
                for w in some:
                    F.linear(x[w.shape[1]], w)

    mine, eager, sdpa, limit = alternate(size["rounds"], ours, theirs("eager"), theirs("sdpa"), products)
    faster = min((eager, sdpa), key=statistics.median)
    speed = {name: rows * new / statistics.median(t) for name, t in
             (("ours", mine), ("generate, eager", eager), ("generate, sdpa", sdpa), ("products", limit))}
    print("  tokens a second: " + ", ".join(f"{k} {v:,.0f}" for k, v in speed.items()))
    return dict(rollout_ratio=ratio(faster, mine), rollout_limit_share=ratio(limit, mine),
                tokens_a_second=speed)


def scoring(folder, prompts, new, copies, group=8):
    """A function that scores `group` completions of each prompt with gradient: shared prompt, or plain copies."""
    policy, (tokens, lengths) = load(folder), texts(prompts, 128)
    answers = torch.randint(2, 200, (prompts, group, new), generator=torch.Generator().manual_seed(1))
    if copies:
        tokens, lengths = tokens.repeat_interleave(group, 0), lengths.repeat_interleave(group, 0)
        answers = answers.flatten(0, 1)[:, None]
    mask = torch.ones_like(answers, dtype=torch.bool)

    def run():
        logp, _ = policy.logprobs(policy.prefill(tokens, lengths), answers, mask)
        (logp.sum() / logp.numel()).backward()
        policy.zero_grad(set_to_none=True)

    return run


def head(whole, n=2048):
    """Log-probabilities of n tokens with gradient: in chunks, or from the whole (n, V)."""
    from model import TokenLogprob

    g = torch.Generator().manual_seed(0)
    w = (torch.randn(49152, 576, generator=g) * 0.05).bfloat16()
    h = torch.randn(n, 576, generator=g).bfloat16().requires_grad_()
    y = torch.randint(0, 49152, (n,), generator=g)

    def run():
        if whole:
            logp = (h @ w.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
        else:
            logp, _ = TokenLogprob.apply(h, w, y, 1.0, 256)  # as Policy.logprobs does
        logp.sum().backward()
        h.grad = None

    return run


def bench_gradient(folder, size):
    how = dict(folder=str(folder), prompts=size["prompts"], new=size["new"])
    times = alternate(max(2, size["rounds"] // 2), *(scoring(**how, copies=c) for c in (True, False)))
    shared, copies = (child("scoring", **how, copies=c) for c in (False, True))
    print(f"  peaks: shared {shared:,.0f} MB, copies {copies:,.0f} MB")
    return dict(gradient_time_ratio=ratio(*times), gradient_memory_share=spread([shared / copies]))


def bench_head(folder, size):
    times = alternate(size["rounds"], head(False), head(True))
    chunks, whole = child("head", whole=False), child("head", whole=True)
    print(f"  peaks: chunks {chunks:,.0f} MB, whole {whole:,.0f} MB")
    return dict(logprob_time_share=ratio(*times), logprob_memory_share=spread([chunks / whole]))


def loop_over_experts(router, parts, weights):
    """What `Router.standard` and `embed` do, expert by expert: parts[i] (B, D_i), weights[i] (D_i, dim)."""
    owned = [router.owner == i for i in range(len(parts))]
    gains, shifts = ([t[o].flatten()[:len(w)] for o, w in zip(owned, weights)]
                     for t in (router.gain, router.shift))
    return lambda: torch.stack([(h * g + s).clamp(-10, 10) @ w + e for h, g, s, w, e in
                                zip(parts, gains, shifts, weights, router.identity)], 1)


def bench_router(rounds=20):
    """The projection of eight experts of different widths, forward and backward; the attention after it is
    the same either way, and its share is shown."""
    from router import Router

    result = {}
    for key, widths, dim in (("router_ratio_n8", [64, 72, 80, 88, 96, 104, 112, 128], 64),
                             ("router_ratio_wide", [384, 576, 640, 768, 896, 1024, 1536, 2048], 512)):
        router, H = Router(widths, 576, dim=dim), torch.zeros(32, 8, max(widths))
        for i, w in enumerate(widths):
            H[:, i, :w] = torch.randn(32, w)
        weights = [nn.Parameter(torch.randn(w, dim)) for w in widths]
        loop = loop_over_experts(router, [H[:, i, :w].clone() for i, w in enumerate(widths)], weights)
        out = torch.randn(32, 8, dim)

        def many(project):
            for _ in range(20):
                for p in (*weights, *router.parameters()):
                    p.grad = None
                (project() * out).sum().backward()

        a, b = alternate(rounds, lambda: many(loop), lambda: many(lambda: router.embed(router.standard(H))))
        result[key] = ratio(a, b)
    return result


def bench_verify():
    from rewards import Problem, verify

    problem = Problem("How many?", "18")
    answers = [f"<think>{'so ' * 40}{i} and {2 * i}</think>It is <answer>{i}</answer>" for i in range(64)]
    (times,) = alternate(20, lambda: [verify(text, problem) for text in answers])
    return dict(verify_ms_64=spread([1000 * t for t in times]))




# -- whole steps
def trainer(folder, prompts, group=8, prompt=128, new=64, experts=3, tiny=False):
    """A function that does one step of the training loop and returns its seconds by part. No completion ends
    early; the states of `experts` experts of width 1,024 (tiny: 160) are in the cache."""
    import rlvr
    from experts import Expert
    from rewards import Problem, verify
    from router import Router

    policy = load(folder, torch.float32 if tiny else torch.bfloat16)
    width, tokenizer = 160 if tiny else 1024, Expert(folder).tokenizer
    router = Router([width] * experts, policy.embed.shape[1], dim=64 if tiny else 512)
    optimizer = rlvr.make_optimizer(policy, router, 1e-4, 1e-4, (0.9, 0.98), 0.0)
    states, (tokens, lengths) = torch.randn(4096, experts, width), texts(prompts, prompt)
    problem, generator = Problem("How many?", "18"), torch.Generator().manual_seed(0)
    how = dict(temperature=1.0, beta=0.04, clip=(0.2, 0.2), dr=False, micro=prompts, max_new=new)
    plain_reference, spent = rlvr.reference_logprobs, {}

    def reference(*args):
        start = time.perf_counter()
        result = plain_reference(*args)
        spent["reference"] = time.perf_counter() - start
        return result

    def step():
        marks = [time.perf_counter()]
        mark = lambda: marks.append(time.perf_counter())
        rows = torch.randint(0, 4096, (prompts,))
        batch = rlvr.Batch([problem] * prompts, tokens, lengths, states[rows])
        mark()
        sampled = rlvr.rollout(policy, router, batch, tokenizer,
                               lambda text, p, cut: verify(text, p, truncated=cut), group, new, 1.0, generator)
        mark()
        sampled.rewards = torch.randint(0, 2, (prompts, group), generator=generator).float()
        rlvr.reference_logprobs = reference
        try:
            rlvr.update(policy, router, batch, sampled, optimizer, **how)
        finally:
            rlvr.reference_logprobs = plain_reference
        mark()
        cache, rollout, update = (b - a for a, b in zip(marks, marks[1:]))
        return dict(cache=cache, rollout=sampled.seconds, verification=rollout - sampled.seconds,
                    reference=spent["reference"], gradient=update - spent["reference"])

    return step


def measure_steps(rounds=2, **how):
    """Seconds by part of a step (median of `rounds` after one), and MB at the peak above the libraries."""
    before = resident("VmRSS")
    step = trainer(**how)
    found = [step() for _ in range(rounds + 1)][1:]
    return {k: statistics.median(f[k] for f in found) for k in found[0]} | dict(mb=resident() - before)


BASE = dict(prompts=4, group=8, prompt=128, new=64, experts=3)
GROWTH = dict(group=(4, 8, 16), new=(32, 64, 128), prompt=(64, 128, 256), experts=(1, 3, 8))


def bench_growth(folder, size):
    """How a step grows, one thing varied at a time; and with the model."""
    rows, done = [], {}
    for name, values in GROWTH.items():
        for value in values if size["grow"] else ():
            how = BASE | {name: value}
            key = json.dumps(how)
            if key not in done:
                done[key] = child("steps", folder=str(folder), **how)
            rows.append(dict(varied=name, value=value) | done[key])
    rows += [dict(varied="model", value="tiny") | child("steps", folder=str(HERE / "tiny" / "policy"), tiny=True,
                                                        **BASE),
             dict(varied="model", value="135M") | (done.get(json.dumps(BASE)) or
                                                   child("steps", folder=str(folder), **BASE))]
    if size["grow"]:
        with tempfile.TemporaryDirectory() as large:
            random_model(large, QWEN)
            rows.append(dict(varied="model", value="0.5B") | child("steps", folder=large, **BASE))
    return dict(growth=rows)


def bench_memory(folder, size):
    """The peak of train.py above its libraries against what it estimated at its start."""
    common = ["--policy", str(folder), "--level", "tiny", "--task", "arithmetic", "--template", "plain",
              "--experts", *(str(HERE / "tiny" / e) for e in ("arithmetic", "logic"))]
    found = [child("train", argv=[*common, "--batch", b, "--max-new", n])
             for b, n in (("8", "64"), ("4", "128"), ("2", "32"))[:3 if size["grow"] else 1]]
    for estimate, peak in found:
        print(f"  estimate {estimate:,.0f} MB, peak {peak:,.0f} MB")
    return dict(memory_estimate=spread([peak / estimate for estimate, peak in found]))


def measure_train(argv):
    """(MB that train.py says it will need, MB at its peak above its libraries)."""
    import io

    import reasoning_gym  # noqa: F401, a library that train.py would load later
    import transformers  # noqa: F401

    import train

    before, said = resident("VmRSS"), io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said):
        code = train.main([*argv, "--out", f"{out}/run", "--cache", f"{out}/cache", "--steps", "2", "--val", "2",
                           "--test", "2", "--eval-every", "2"])
    if code:
        sys.exit(said.getvalue())
    line = next(x for x in said.getvalue().splitlines() if "MB  in all" in x)
    return float(line.split()[0].replace(",", "")), resident() - before


def bench_steps(folder, size):
    """Seconds of `python train.py` to its first step without the evaluation before it, cache warm; and a step
    with eight experts against one, the embedded policy."""
    tiny, found = str(HERE / "tiny" / "policy"), []
    one, eight = (trainer(tiny, 36, 8, 32, 8, n, tiny=True) for n in (1, 8))
    times = alternate(4 * size["rounds"], eight, one)
    with tempfile.TemporaryDirectory() as out:
        for i in range(1 + max(2, size["rounds"] // 2)):
            command = [sys.executable, str(HERE / "train.py"), "--out", f"{out}/{i}", "--val", "1", "--test", "1",
                       "--cache", f"{out}/cache"]
            start, rows = time.perf_counter(), Path(f"{out}/{i}/metrics.jsonl")
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE)
            while not rows.exists() and running.poll() is None:
                time.sleep(0.02)
            found.append(time.perf_counter() - start)
            running.kill()
            running.wait()
    return dict(start_s=spread(found[1:]), experts_8_over_1_step=ratio(*times))


def bench_peers(folder, size):
    """A step of TRL's GRPOTrainer against ours, and the peaks, on 8 prompts x 8 of 96 and 64 tokens."""
    from experts import cache_dir

    venv = cache_dir() / "trl"
    python = str(venv / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        needs = [f"torch=={version('torch').partition('+')[0]}", "trl==1.16.*", "peft", "datasets"]
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    ours = child("steps", folder=str(folder), prompts=8, prompt=96, rounds=3)
    said = subprocess.run([python, "-c", TRL, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(said.stdout.splitlines()[-1])
    step = sum(v for k, v in ours.items() if k != "mb")
    print(f"  TRL {theirs['version']}: {theirs['seconds']} s a step, {theirs['mb']:,.0f} MB; ours {step:.1f} s, "
          f"{ours['mb']:,.0f} MB")
    return dict(trl_step_ratio=spread([t / step for t in theirs["seconds"]]),
                trl_memory_share=spread([ours["mb"] / theirs["mb"]]))


TRL = """
import json, sys, time
import torch, trl, transformers
from datasets import Dataset
from peft import LoraConfig
folder = sys.argv[1]
resident = lambda field: int(next(x for x in open("/proc/self/status") if x.startswith(field)).split()[1]) / 1024
before, marks = resident("VmRSS"), []
class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *a, **k): marks.append(time.perf_counter())
    def on_step_end(self, *a, **k): marks.append(time.perf_counter())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
config = trl.GRPOConfig(output_dir=sys.argv[1] + "/trl", per_device_train_batch_size=64, num_generations=8,
    max_completion_length=64, max_steps=3, beta=0.04, learning_rate=1e-4, bf16=True, use_cpu=True, report_to=[],
    save_strategy="no", gradient_checkpointing=False, model_init_kwargs=dict(dtype=torch.bfloat16))
trainer = trl.GRPOTrainer(model=folder, args=config, processing_class=tokenizer,
    reward_funcs=lambda completions, **k: [float(i % 2) for i in range(len(completions))],
    train_dataset=Dataset.from_dict(dict(prompt=[" ".join("123456789"[(i + j) % 9] for j in range(96))
                                                 for i in range(64)])),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), callbacks=[Clock()])
trainer.train()
seconds = [b - a for a, b in zip(marks[::2], marks[1::2])][1:]
print(json.dumps(dict(version=trl.__version__, seconds=seconds, mb=resident("VmHWM") - before)))
"""


# -- an estimate
DEVICES = {"H200": (989e12, 4.8e12), "A100 80 GB": (312e12, 2.0e12), "RTX 4090": (165e12, 1.0e12)}


def roofline(compute=0.4, bandwidth=0.7):
    """Seconds of the paper's step (Qwen2.5-3B, 32 prompts of 300 tokens x 8 completions of 128) by part, from
    operation and byte counts: {device: (rollout, reference, gradient)}. Of a device's peak 40% of the
    operations and 70% of the bandwidth are assumed to be had."""
    layers, d, ff, H, K, D, V = 36, 2048, 11008, 16, 2, 128, 151936
    body = layers * (2 * d * (H + K) * D + 3 * d * ff)  # weights that every token meets
    prompt, new = 32 * 308, 32 * 8 * 128
    once = 2 * body * (prompt + new) + 2 * V * d * new  # operations of one forward pass over everything
    seen = layers * 2 * K * D * 2  # bytes of keys and values a position
    result = {}
    for name, (flops, bytes_s) in DEVICES.items():
        flops, bytes_s = compute * flops, bandwidth * bytes_s
        read = 2 * (body + V * d) + seen * 32 * (308 + 8 * 64)  # a decode step, completions half written
        decode = 128 * max(read / bytes_s, 2 * (body + V * d) * 256 / flops)
        result[name] = (2 * body * prompt / flops + decode, once / flops, 2 * once / flops)
    return result


# -- what is written
def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def report(figures):
    """results/SPEED.md as text."""
    where, number = figures["where"], lambda v: f"{v:.3g}"
    parts = ["cache", "rollout", "verification", "reference", "gradient"]
    text = ["# Speed\n", f"Written by `python bench.py` ({', '.join(f'{k} {v}' for k, v in where.items())}). "
            "What each figure is: `bench.py`. Median of the rounds, least and greatest.\n",
            table(("figure", "median", "least", "greatest", "bar"),
                  [(k, *map(number, figures[k]), bar) for k, bar in BARS.items() if k in figures])]
    if "tokens_a_second" in figures:
        text += ["Tokens a second in the rollout, prefill included: "
                 + ", ".join(f"{k} {v:,.0f}" for k, v in figures["tokens_a_second"].items())
                 + " (the matrix products alone: the limit).\n"]
    if "growth" in figures:
        base = ", ".join(f"{v} {k}" if k != "new" else f"{v} new tokens" for k, v in BASE.items())
        text += ["## Growth\n", "One step of the training loop, no completion ending early, one thing varied at a "
                 f"time from {base} (prompt: its tokens), 135M, bf16; tiny in fp32. Shares of the step; MB at "
                 "the peak above the libraries.\n"]
        rows = []
        for row in figures["growth"]:
            whole = sum(row[p] for p in parts)
            rows.append((row["varied"], row["value"], f"{whole:.2f}", f"{row['mb']:,.0f}",
                         *(f"{row[p] / whole:.1%}" for p in parts)))
        text += [table(("varied", "value", "seconds", "MB", *parts), rows)]
    text += ["## One GPU: an estimate\n", "Nobody has run this. " + " ".join(roofline.__doc__.split()) + "\n",
             table(("device", "rollout", "reference", "gradient", "step"),
                   [(k, *(f"{x:.1f} s" for x in (*v, sum(v)))) for k, v in roofline().items()])]
    return "\n".join(text)


BENCHES = dict(verify=lambda *_: bench_verify(), router=lambda *_: bench_router(), steps=bench_steps,
               head=bench_head, rollout=bench_rollout, gradient=bench_gradient, memory=bench_memory,
               growth=bench_growth, peers=bench_peers)
CHILDREN = dict(scoring=lambda **how: peak_here(scoring(**how)), head=lambda **how: peak_here(head(**how)),
                steps=measure_steps, train=measure_train)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder of a policy (a random one of SmolLM2-135M's shape)")
    p.add_argument("--json", type=Path, help="file of the figures; those not measured now are kept in it")
    p.add_argument("--quick", action="store_true", help="half the rows, fewer rounds, no growth")
    p.add_argument("--peers", action="store_true", help="also against TRL")
    p.add_argument("--only", nargs="+", choices=BENCHES, help="some of it")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.child:
        what, how = json.loads(a.child)
        print(json.dumps(CHILDREN[what](**how)))
        return 0
    size = dict(prompts=4, new=32, rounds=2, grow=False) if a.quick else dict(prompts=8, new=64, rounds=5, grow=True)
    figures = json.loads(a.json.read_text()) if a.json and a.json.exists() else {}
    figures["where"] = dict(command=" ".join(["python", *sys.argv]), python=platform.python_version(),
                            machine=platform.machine(), threads=torch.get_num_threads(), torch=version("torch"),
                            transformers=version("transformers"))
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            random_model(folder, SMOL)
        for name in a.only or [b for b in BENCHES if b != "peers" or a.peers]:
            print(f"{name} ...", flush=True)
            figures |= BENCHES[name](a.model or folder, size)
            if a.json:
                a.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(report(figures))
    if not (a.quick or a.model):
        (HERE / "results" / "SPEED.md").write_text(report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
