"""
How fast it is, against the alternatives and against the limit of the processor.

    python bench.py                       everything, a random model of SmolLM2-135M's shape: a quarter of an
    hour python bench.py --quick --json b.json smaller sizes, a few minutes; the figures as JSON
    python bench.py --model FOLDER        a real folder (the same speed)

Every figure is a ratio of two things measured in turn in one run, so that it holds where the machine's speed
drifts. Medians of the rounds are given with their least and greatest. Peaks of memory are above what was
resident before, each in a process of its own.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
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

BARS = dict(rollout_ratio=">= 3", rollout_limit_share=">= 0.6", gradient_time_ratio=">= 1.7",
            gradient_memory_share="<= 0.6", logprob_time_share="<= 1.15", logprob_memory_share="<= 0.25",
            router_ratio_n8=">= 2", router_ratio_wide=">= 0.9", start_s="<= 8",
            experts_8_over_1_step="<= 1.05", verify_ms_64="<= 20")


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


def ratio(a, b):
    """(median, least, greatest) of a / b, round by round."""
    each = [x / y for x, y in zip(a, b)]
    return statistics.median(each), min(each), max(each)


def smol(folder):
    """A random model of SmolLM2-135M's shape: its speed is the real one's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                         eos_token_id=0, bos_token_id=None, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=100000.0))
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder):
    from model import Policy

    policy = Policy.load(folder, dtype=torch.bfloat16)
    policy.stop = torch.tensor([-1])  # nothing stops early: both sides write every token
    return policy


def texts(n, length):
    tokens = torch.randint(2, 40000, (n, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.full((n,), length)


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

    def products():
        with torch.no_grad():
            for n, times in ((rows, new), (size["prompts"] * 128, 1)):
                x = {w.shape[1]: torch.zeros(n, w.shape[1], dtype=w.dtype) for w in weights}
                for _ in range(times):
                    for w in (
                        weights if times > 1 else weights[:-1]
                    ):  # a prompt meets the head once, not everywhere
                        F.linear(x[w.shape[1]], w)

    mine, eager, sdpa, limit = alternate(size["rounds"], ours, theirs("eager"), theirs("sdpa"), products)
    faster = min((eager, sdpa), key=statistics.median)
    print(
        f"  tokens a second: ours {rows * new / statistics.median(mine):,.0f}, generate (eager) "
        f"{rows * new / statistics.median(eager):,.0f}, (sdpa) {rows * new / statistics.median(sdpa):,.0f}, "
        f"matrix products alone {rows * new / statistics.median(limit):,.0f}")
    return dict(rollout_ratio=ratio(faster, mine), rollout_limit_share=ratio(limit, mine))


def scoring(folder, prompts, group, new, copies):
    """A function that scores `group` completions of each prompt with gradient: shared prompt, or plain
    copies."""
    policy, (tokens, lengths) = load(folder), texts(prompts, 128)
    answers = torch.randint(2, 40000, (prompts, group, new), generator=torch.Generator().manual_seed(1))
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
    h, y = (torch.randn(n, 576, generator=g).bfloat16().requires_grad_(),
            torch.randint(0, 49152, (n,), generator=g))

    def run():
        if whole:
            logp = (h @ w.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
        else:
            logp, _ = TokenLogprob.apply(h, w, y, 1.0, 128)
        logp.sum().backward()
        h.grad = None

    return run


MEASURED = {"shared": lambda a: scoring(a.model, a.prompts, 8, a.new, False),
            "copies": lambda a: scoring(a.model, a.prompts, 8, a.new, True), "chunks": lambda a: head(False),
            "whole": lambda a: head(True)}


def peak(what, folder, size):
    """MB that one run of MEASURED[what] takes above what was resident before it, in a process of its own."""
    command = [sys.executable, __file__, "--peak", what, "--model", str(folder), "--prompts",
               str(size["prompts"]), "--new", str(size["new"])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_here(run):
    """Linux keeps the peak; writing 5 to clear_refs sets it back to what is resident now."""
    field = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    before = field()
    run()
    return field() - before


def bench_gradient(folder, size):
    shared, copies = (scoring(folder, size["prompts"], 8, size["new"], c) for c in (False, True))
    a, b = alternate(max(2, size["rounds"] // 2), copies, shared)
    memory = peak("shared", folder, size) / peak("copies", folder, size)
    return dict(gradient_time_ratio=ratio(a, b), gradient_memory_share=(memory, memory, memory))


def bench_head(folder, size):
    chunks, whole = alternate(size["rounds"], head(False), head(True))
    memory = peak("chunks", folder, size) / peak("whole", folder, size)
    return dict(logprob_time_share=ratio(chunks, whole), logprob_memory_share=(memory, memory, memory))


def loop_over_experts(router, parts, weights):
    """What `Router.embed` does, expert by expert: parts[i] (B, D_i), weights[i] (D_i, dim)."""
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

        a, b = alternate(rounds, lambda: many(loop), lambda: many(lambda: router.embed(H)))
        result[key] = ratio(a, b)
    return result


def bench_verify():
    from rewards import Problem, verify

    problem = Problem("How many?", "18")
    answers = [f"<think>{'so ' * 40}{i} and {2 * i}</think>It is <answer>{i}</answer>" for i in range(64)]
    (times,) = alternate(20, lambda: [verify(text, problem) for text in answers])
    return dict(verify_ms_64=tuple(1000 * f(times) for f in (statistics.median, min, max)))


def bench_steps():
    """train.py on the embedded pool: seconds from its start to its first step, without the evaluation before
    it; and the time of a step with eight experts (each listened to several times over) against one."""
    here, found = Path(__file__).parent, {}
    with tempfile.TemporaryDirectory() as out:
        os.environ["N_MUSKETEERS_CACHE"] = out
        tiny = [str(here / "tiny" / e) for e in ("arithmetic", "logic", "algorithmic")]
        for name, experts in (("warm", tiny), ("start", tiny), ("one", tiny[:1]), ("eight", (tiny * 3)[:8])):
            command = [sys.executable, str(here / "train.py"), "--out", f"{out}/{name}", "--steps", "30",
                       "--val", "1", "--test", "1", "--eval-every", "30", "--experts", *experts]
            start = time.time()
            subprocess.run(command, check=True, capture_output=True, cwd=here)
            rows = [json.loads(x) for x in (Path(out) / name / "metrics.jsonl").read_text().splitlines()]
            step = [r["gen_s"] + r["train_s"] for r in rows]
            found[name] = statistics.median(step[5:])
            if name == "start":  # the whole run less its steps and its end is the start
                first = (Path(out) / name / "config.json").stat().st_mtime - start
    share = found["eight"] / found["one"]
    return dict(start_s=(first, first, first), experts_8_over_1_step=(share, share, share))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder of a policy (a random one of SmolLM2-135M's shape)")
    p.add_argument("--json", help="file for the figures")
    p.add_argument("--quick", action="store_true", help="half the rows, fewer rounds")
    p.add_argument("--only", nargs="*", help="some of: rollout gradient head router verify steps")
    for name, kind in (("peak", str), ("prompts", int), ("new", int)):
        p.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.peak:
        print(peak_here(MEASURED[a.peak](a)))
        return 0
    size = dict(prompts=4, new=32, rounds=2) if a.quick else dict(prompts=8, new=64, rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            smol(folder)
        model, figures = a.model or folder, {}
        benches = dict(verify=bench_verify, router=bench_router, steps=bench_steps,
                       head=lambda: bench_head(model, size), rollout=lambda: bench_rollout(model, size),
                       gradient=lambda: bench_gradient(model, size))
        for name in a.only or benches:
            figures |= benches[name]()
    where = dict(python=platform.python_version(), machine=platform.machine(),
                 threads=torch.get_num_threads(), torch=version("torch"),
                 transformers=version("transformers"), command=" ".join(sys.argv))
    print("\n| figure | median | least | greatest | bar |\n|---|---|---|---|---|")
    for key, (median, low, high) in figures.items():
        print(f"| {key} | {median:.3g} | {low:.3g} | {high:.3g} | {BARS[key]} |")
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    if a.json:
        Path(a.json).write_text(json.dumps({k: v[0] for k, v in figures.items()} | dict(where=where)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
