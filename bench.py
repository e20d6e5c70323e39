"""
How fast it is, against the alternatives and against the limit of the processor.

    python bench.py                   on a random model of SmolLM2-135M's shape: 25 minutes on two cores
    python bench.py --quick           smaller sizes and no growth tables: 5 minutes
    python bench.py --peers           and TRL's GRPOTrainer, in an environment of its own (24 GB of memory)
    python bench.py --only rollout    some of it; with --json FILE the other figures are kept

Every figure is a ratio of two things measured in turn in one run, so that it holds where the machine's speed
drifts; medians of the rounds are given with their least and greatest. Memory is the peak above what was
resident before, each side in a process of its own. results/SPEED.md is written from the figures.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import gc
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

from lora import prepare, product
from run import keep_memory, trim_memory

HERE = Path(__file__).resolve().parent
BARS = dict(rollout_ratio="≥ 3", rollout_limit_share="≥ 0.6", rollout_ratio_compiled="≥ 3",
            rollout_limit_share_compiled="≥ 0.6", gradient_time_ratio="≥ 1.7",
            gradient_memory_share="≤ 0.6", logprob_time_share="≤ 1.15", logprob_memory_share="≤ 0.25",
            router_ratio_n8="≥ 2", router_ratio_wide="≥ 0.9", start_s="≤ 8",
            experts_8_over_1_step="≤ 1.05", verify_ms_64="≤ 20", memory_estimate="0.8 to 1.2",
            trl_step_ratio="≥ 4", trl_memory_share="≤ 0.33")
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
    """MB at the peak of run() above those resident before. Linux keeps the peak; writing 5 to clear_refs sets
    it back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    run()
    return resident() - before


def child(what, **how):
    """What a part of the bench gives in a fresh process, which needs the memory that this one has done
    with."""
    gc.collect()
    trim_memory()
    command = [sys.executable, __file__, "--child", json.dumps([what, how])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- the parts
@torch.no_grad()
def products(plan):
    """Matrix products alone: of (rows, times, weights) every weight with so many rows, so often. The weights
    may be sorted (lora.py)."""
    for rows, times, weights in plan:
        x = {w.shape[1]: torch.zeros(rows, w.shape[1], dtype=w.dtype) for w in weights}
        for _ in range(times):
            for w in weights:
                (product if w.is_mkldnn else F.linear)(x[w.shape[1]], w)


def bench_rollout(folder, size):
    """Ours, plain and with --compile, generate with eager and with sdpa attention, and the matrix products
    alone, as F.linear does them and with weights sorted as ours are, end to end."""
    from transformers import AutoModelForCausalLM

    policy, fused, (tokens, lengths) = load(folder), load(folder), texts(size["prompts"], 128)
    generator, rows, new = torch.Generator().manual_seed(0), size["prompts"] * 8, size["new"]
    fused.fuse()

    @torch.no_grad()
    def ours(policy=policy):
        policy.generate(policy.prefill(tokens, lengths), 8, new, 1.0, generator)

    def theirs(attention):
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention).eval()
        ids = tokens.repeat_interleave(8, 0)
        how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                   min_new_tokens=new, pad_token_id=0, attention_mask=torch.ones_like(ids))
        return lambda: hf.generate(ids, **how)

    body = [m.weight for m in policy.adapters()]  # a prompt meets the head once, not everywhere
    prefill, decode = (size["prompts"] * 128, 1, body), [*body, policy.head]
    quick = [prepare(w, rows) for w in decode]
    # The limit in more rounds and right beside ours: generate takes minutes, in which a machine drifts.
    mine, limit, fast, least = alternate(
        3 * size["rounds"], ours, lambda: products([prefill, (rows, new, decode)]), lambda: ours(fused),
        lambda: products([prefill, (rows, new, quick)]))
    beside, compiled, eager, sdpa = alternate(
        size["rounds"], ours, lambda: ours(fused), theirs("eager"), theirs("sdpa"))
    faster = min((eager, sdpa), key=statistics.median)
    speed = {name: rows * new / statistics.median(t) for name, t in
             (("ours", mine), ("ours, compiled", fast), ("generate, eager", eager),
              ("generate, sdpa", sdpa), ("products", limit), ("products, weights sorted", least))}
    print("  tokens a second: " + ", ".join(f"{k} {v:,.0f}" for k, v in speed.items()))
    return dict(rollout_ratio=ratio(faster, beside), rollout_limit_share=ratio(limit, mine),
                rollout_ratio_compiled=ratio(faster, compiled),
                rollout_limit_share_compiled=ratio(limit, fast),
                tokens_a_second=speed, rollout_profile=profile(ours))


OPERATIONS = {"products with the weights": ("mm", "addmm", "_linear_pointwise"),
              "products of attention": ("bmm",), "softmax": ("_softmax",),
              "copies": ("copy_", "cat", "fill_", "masked_fill_", "_reorder_linear_weight"),
              "norms, rotation, SwiGLU, sums": ("mul", "add", "sub", "neg", "silu", "pow", "mean", "rsqrt",
                                                "_fused_rms_norm", "sum", "div", "max", "gather")}


def profile(run):
    """Share of run()'s operator time by kind; the profiler itself makes the many small ones look longer."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU]) as p:
        run()
    spent = {e.key: e.self_cpu_time_total for e in p.key_averages()}
    take = lambda op: spent.pop(f"aten::{op}", 0) + spent.pop(f"mkldnn::{op}", 0)
    found = {kind: sum(map(take, ops)) for kind, ops in OPERATIONS.items()}
    found["the rest: dispatch, views, indices"] = sum(spent.values())
    return {kind: t / sum(found.values()) for kind, t in found.items()}


def scoring(folder, prompts, new, copies, group=8):
    """A function that scores `group` completions of each prompt with gradient: its prompt shared, or in plain
    copies."""
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


def bench_router(folder, size, rounds=20):
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

        def many(project, *trained):
            for _ in range(20):
                torch.autograd.grad(project(), (*trained, router.identity), out)

        a, b = alternate(rounds, lambda: many(loop, *weights),
                         lambda: many(lambda: router.embed(router.standard(H)), router.project))
        result[key] = ratio(a, b)
    return result


def bench_verify(folder, size):
    from rewards import Problem, verify

    problem = Problem("How many?", "18")
    answers = [f"<think>{'so ' * 40}{i} and {2 * i}</think>It is <answer>{i}</answer>" for i in range(64)]
    (times,) = alternate(20, lambda: [verify(text, problem) for text in answers])
    return dict(verify_ms_64=spread([1000 * t for t in times]))


# -- what is written
def table(head, rows):
    rows = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def met(value, bar):
    """Is a median within its bar: "≥ 3", "≤ 0.6" or "0.8 to 1.2"?"""
    low, _, high = bar.partition(" to ")
    if high:
        return float(low) <= value <= float(high)
    return value >= float(bar[2:]) if bar[0] == "≥" else value <= float(bar[2:])


def report(figures):
    """results/SPEED.md as text."""
    import growth  # which imports this file

    where, number = figures["where"], lambda v: f"{v:.3g}"
    parts = ["cache", "rollout", "verification", "reference", "gradient"]
    text = ["# Speed\n", f"Written by `python bench.py` ({', '.join(f'{k} {v}' for k, v in where.items())}). "
            "What each figure is: `bench.py`. Median of the rounds, least and greatest.\n",
            table(("figure", "median", "least", "greatest", "bar", "met"),
                  [(k, *map(number, figures[k]), bar, "yes" if met(figures[k][0], bar) else "**no**")
                   for k, bar in BARS.items() if k in figures])]
    if "tokens_a_second" in figures:
        text += ["Tokens a second in the rollout, prefill included: "
                 + ", ".join(f"{k} {v:,.0f}" for k, v in figures["tokens_a_second"].items())
                 + " (the products alone, by F.linear as the bar has it, and with weights sorted as ours).\n"]
    if "rollout_profile" in figures:
        text += ["What the rollout's time is made of, by profiler: "
                 + ", ".join(f"{k} {v:.0%}" for k, v in figures["rollout_profile"].items()) + ".\n"]
    if "step_products" in figures:
        share, most = figures["step_products"]
        text += [f"Of our step beside TRL's {share:.0%} are products with the weights, which all trainers "
                 f"have: were all the rest free, TRL's step would take {most:.1f} times as long.\n"]
    if "growth" in figures:
        base = ", ".join(f"{v} {k}" if k != "new" else f"{v} new tokens" for k, v in growth.BASE.items())
        text += ["## Growth\n", "One step of the training loop, no completion ending early, one thing "
                 f"varied at a time from {base} (prompt: its tokens), 135M, bf16; tiny in fp32. "
                 "MB at the peak above the libraries; then shares of the step.\n"]
        rows = []
        for row in figures["growth"]:
            whole = sum(row[p] for p in parts)
            rows.append((row["varied"], row["value"], f"{whole:.2f}", f"{row['mb']:,.0f}",
                         *(f"{row[p] / whole:.1%}" for p in parts)))
        text += [table(("varied", "value", "seconds", "MB", *parts), rows)]
    assumed = " ".join(growth.roofline.__doc__.split())
    text += ["## One GPU: an estimate\n", f"Nobody has run this. {assumed}\n",
             table(("device", "rollout", "reference", "gradient", "step"),
                   [(k, *(f"{x:.1f} s" for x in (*v, sum(v)))) for k, v in growth.roofline().items()])]
    return "\n".join(text)


def main(argv=None):
    import growth

    benches = dict(verify=bench_verify, router=bench_router, steps=growth.bench_steps, head=bench_head,
                   rollout=bench_rollout, gradient=bench_gradient, memory=growth.bench_memory,
                   growth=growth.bench_growth, peers=growth.bench_peers)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder of a policy (a random one of SmolLM2-135M's shape)")
    p.add_argument("--json", type=Path, help="file of the figures; those not measured now are kept in it")
    p.add_argument("--quick", action="store_true", help="half the rows, fewer rounds, no growth")
    p.add_argument("--peers", action="store_true", help="also against TRL")
    p.add_argument("--only", nargs="+", choices=benches, help="some of it")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    keep_memory()  # as every run does
    if a.child:
        what, how = json.loads(a.child)
        children = dict(scoring=lambda **how: peak_here(scoring(**how)), steps=growth.measure_steps,
                        head=lambda **how: peak_here(head(**how)), train=growth.measure_train,
                        products=growth.measure_products)
        print(json.dumps(children[what](**how)))
        return 0
    size = (dict(prompts=4, new=32, rounds=2, grow=False) if a.quick
            else dict(prompts=8, new=64, rounds=3, grow=True))
    figures = json.loads(a.json.read_text()) if a.json and a.json.exists() else {}
    earlier = ", the other parts earlier" * bool(figures and (a.only or not a.peers))
    figures["where"] = dict(command=" ".join(["python", *sys.argv]) + earlier,
                            threads=torch.get_num_threads(), python=platform.python_version(),
                            machine=platform.machine(), torch=version("torch"),
                            transformers=version("transformers"))
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            random_model(folder, SMOL)
        for name in a.only or [b for b in benches if b != "peers" or a.peers]:
            print(f"{name} ...", flush=True)
            figures |= benches[name](a.model or folder, size)
            if a.json:
                a.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(report(figures))
    if not (a.quick or a.model):
        (HERE / "results" / "SPEED.md").write_text(report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
