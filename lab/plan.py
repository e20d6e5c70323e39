"""
What a run would need, before it is started: memory by part, prompts to read, seconds a step and in all.

    python train.py --preset paper --plan                       memory and steps
    python -m lab.plan --preset paper                           and seconds; the arguments are train.py's
    python -m lab.plan --preset small --length 4                if answers have 4 tokens, not --max_new
    python -m lab.plan --preset paper --gpu 400 3000            a GPU that is not here: TFLOP/s in use, GB/s
    python -m lab.plan --rows                                   the README's table: what fits on which GPU

No weights are loaded or fetched. Bytes and operations are counted from the settings (train.py, "Memory"); how
many operations a second this machine does is measured, in a few seconds, with products and additions of the
policy's own shapes. How near the time comes to what was measured is in results/SPEED.md.

How the bytes were checked: the policy of model.py was run on PyTorch's device "meta", which has shapes but no
numbers, at the widths of Qwen2.5-3B and 0.5B and with 2 and 4 layers, while every tensor that was alive was
counted. CUDA's fused norms and attention were replaced by functions that keep the same tensors. Carried on to
all layers, a gradient pass is within 4 percent of the estimate. No GPU has confirmed it.
"""
import argparse
import sys

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from rlvr import run_cli
from router import has_context
from train import (GAPS, GPU_ROWS, args_of_row, estimate_of, frozen_dtype, longest_prompt, model_size,
                   parse_args, peak_memory, print_plan, rows_and_group)

# Beside the products a layer does what costs as much as so many additions: of its hidden states for a token
# of the rollout, of hidden states and of attention scores in a gradient pass. Fitted to the steps of
# results/SPEED.md at commit 2d49382; other processors differ, GPUs more so.
ADDITIONS = dict(rollout=370, hidden=85, scores=260)


def seconds(run):
    """Seconds of a call of run(), a mean over half a second; a GPU has finished before and after."""
    timer = Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).mean


def rate(policy, dtype, rows, device):
    """Operations a second in products of `rows` tokens with weights of the policy's shapes.

    There are as many weights as exceed a processor's cache.
    """
    d, ff = policy.width, policy.ff
    copies = max(1, min(policy.layers, 2**26 // (d * (2 * ff + d))))
    shapes = [(ff, d), (d, ff), (d, d)] * copies
    pairs = []
    for out, width in shapes:
        x = torch.randn(rows, width, device=device).to(dtype)
        weight = torch.randn(out, width, device=device).to(dtype)
        pairs.append((x, weight))

    def products():
        for x, weight in pairs:
            F.linear(x, weight)

    operations = 2 * rows * sum(out * width for out, width in shapes)
    return operations / seconds(products)


def addition(policy, dtype, rows, device):
    """Seconds of adding two hidden states of `rows` tokens."""
    x = torch.randn(rows, policy.width, device=device).to(dtype)

    def add():
        return x + x

    return seconds(add)


def step_seconds(args, policy, S, T, gpu=None):
    """(rollout, gradient pass) of a step, in seconds, if prompts have S tokens and answers T.

    policy: a ModelSize. gpu: (TFLOP/s, GB/s) of one that is not here; None: this machine is measured.
    """
    rows, group = rows_and_group(args, [model_size(source) for source in args.experts])
    answers = rows * group

    # A gradient costs one more pass, as the weights are frozen, and the reference another one.
    passes = 3 if args.beta else 2
    head = policy.vocab * policy.width
    scored = rows * (S + group * T) * policy.blocks + answers * T * head
    dtype = frozen_dtype(args, policy)

    # A GPU writes a token in the time of its products, or of reading all weights, whichever is longer.
    if gpu:
        flops, bandwidth = gpu[0] * 1e12, gpu[1] * 1e9
        token = max(2 * answers / flops, dtype.itemsize / bandwidth) * (policy.blocks + head)
        return 2 * rows * S * policy.blocks / flops + T * token, 2 * passes * scored / flops

    # This machine: products of many rows (prompts, gradient pass) and of few (a token of each answer).
    micro = min(args.micro_batch, rows)
    micro_tokens = micro * (S + group * T)
    many = rate(policy, dtype, min(micro_tokens, 2048), args.device)
    few = rate(policy, dtype, answers, args.device)

    # The small operations between the products, as so many additions.
    token = 2 * answers * (policy.blocks + head) / few
    token += policy.layers * ADDITIONS["rollout"] * addition(policy, dtype, answers, args.device)
    scores = micro * group * T * (S + T) * policy.heads / (micro_tokens * policy.width)  # a hidden number
    small = policy.layers * addition(policy, dtype, micro_tokens, args.device)
    small *= ADDITIONS["hidden"] + ADDITIONS["scores"] * scores

    rollout = 2 * rows * S * policy.blocks / many + T * token
    gradient = 2 * passes * scored / many + passes / 3 * rows / micro * small
    return rollout, gradient


def plan(args, length=None, gpu=None):
    """Print what a run needs. Returns (table of memory, (seconds of a rollout, of a gradient pass))."""
    table = print_plan(args)
    policy = model_size(args.policy)
    tokens, T = longest_prompt(args), length or args.max_new
    S = tokens + args.latents * has_context(args.router)
    rollout, gradient = step_seconds(args, policy, S, T, gpu)
    step = rollout + gradient
    print(f"a step of GRPO, prompts of {tokens} tokens and answers of {T}: {step:.2g} s (rollout "
          f"{rollout:.2g}, gradient pass {gradient:.2g}); {args.steps} steps: "
          f"{args.steps * step / 60:.1f} minutes")
    return table, (rollout, gradient)


def print_rows():
    """Print the models for each GPU. Returns [(preset, gigabytes of the card, bytes that must be free)]."""
    needed = []
    print("| GPU | preset | policy | experts | prompts in a gradient pass | must be free, about |")
    print("|---|---|---|---|---|---|")
    for row in GPU_ROWS:
        args = args_of_row(row, dict(device="cuda", dtype="bfloat16"))
        size = GAPS * peak_memory(estimate_of(args))
        needed.append((row["preset"], row["gpu"], size))
        experts = ", ".join(short(name) for name in args.experts)
        print(f"| {row['gpu']} GB | {row['preset']} | {short(args.policy)} | {experts} | "
              f"{args.micro_batch} | {size / 1e9:.1f} GB |")
    return needed


def short(source):
    """Qwen/Qwen2.5-3B-Instruct -> Qwen2.5-3B-Instruct"""
    return source.rpartition("/")[2]


def run(argv=None):
    """argv: options of this program, and settings of train.py."""
    own = argparse.ArgumentParser(prog="lab.plan", description=__doc__,
                                  formatter_class=argparse.RawTextHelpFormatter)
    own.add_argument("--gpu", nargs=2, type=float, help="TFLOP/s and GB/s of a GPU that is not here")
    own.add_argument("--length", type=int, help="tokens of an answer")
    own.add_argument("--rows", action="store_true", help="print what fits on which GPU, and end")
    options, rest = own.parse_known_args(argv)
    if options.rows:
        return print_rows()
    if min(options.gpu or [1]) <= 0 or (options.length is not None and options.length < 1):
        raise ValueError("--gpu takes two numbers above 0, TFLOP/s and GB/s, and --length a number above 0")

    args = parse_args(rest)
    if options.gpu:  # it is not here, so memory is counted as for a GPU that has bfloat16
        args.device = "cuda"
        if args.dtype == "auto":
            args.dtype = "bfloat16"
    return plan(args, options.length, options.gpu)


if __name__ == "__main__":
    sys.exit(run_cli("lab.plan", run))
