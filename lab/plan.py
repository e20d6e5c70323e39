"""
What a run would need, before it is started: memory by part, prompts to read, seconds a step and in all.

    python train.py --task gsm8k --preset paper --plan         the same is printed by
    python lab/plan.py --task gsm8k --preset paper             the arguments are train.py's
    python lab/plan.py --preset small --length 4               if completions have 4 tokens, not --max_new
    python lab/plan.py --preset paper --gpu 400 3000           a GPU that is not here: TFLOP/s in use, GB/s

No weights are loaded or fetched: sizes come from each model's config.json, prompts from the task itself.
Bytes and operations are counted from the settings; how many operations a second this machine does is
measured, in a few seconds, with products and additions of the policy's own shapes. How near this comes to
what was measured is in results/SPEED.md.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import one_sentence  # noqa: E402
from experts import loading  # noqa: E402
from model import bucket  # noqa: E402
from rewards import problems, prompt  # noqa: E402
from rlvr import align_steps  # noqa: E402
from router import ROUTERS, reads_states  # noqa: E402
from train import parse_args  # noqa: E402

# Beside the products a layer does what costs as much as so many additions: of its hidden states for a token
# of the rollout, of hidden states and of attention scores in a gradient pass. Fitted to the steps of
# results/SPEED.md at commit 2d49382; other processors differ, GPUs more so.
ADDITIONS = dict(rollout=370, hidden=85, scores=260)
IMPORTED, LIBRARIES = 200 << 20, 280 << 20  # bytes, before the first step and with what it leaves

class Sizes:
    """Of a model, from its config.json alone."""

    def __init__(self, name):
        source, _, revision = name.partition("@")
        with loading("config", name), torch.device("meta"):  # no memory
            config = AutoConfig.from_pretrained(source, revision=revision or None)
            backbone = AutoModel.from_config(config)
        config = getattr(config, "text_config", config)
        self.source, self.vocab, self.layers = source, config.vocab_size, config.num_hidden_layers
        self.d, self.heads = config.hidden_size, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or self.d // self.heads
        self.ff = getattr(config, "intermediate_size", 4 * self.d)
        self.blocks = self.layers * (2 * self.d * (self.heads + self.kv_heads) * self.head_dim
                                     + 3 * self.d * self.ff)  # weights that every token meets
        tied = getattr(config, "tie_word_embeddings", True)
        self.params = sum(p.numel() for p in backbone.parameters()) + (0 if tied else self.vocab * self.d)
        self.dtype = torch.float32 if self.params < 50e6 else torch.bfloat16

def prompt_tokens(args, policy):
    """Of the longest among 64 training problems, as a batch pads it."""
    with loading("tokenizer", policy.source):
        tokenizer = AutoTokenizer.from_pretrained(policy.source)
    template = "plain" if args.form == "plain" or not tokenizer.chat_template else "chat"
    texts = [prompt(p, template, tokenizer) for p in problems(args.task, "train", 64, args.data, args.level)]
    return bucket(max(map(len, tokenizer(texts)["input_ids"])))

def memory(args, policy, experts, S):
    """{what: bytes}. Sampling, the gradient pass and reading take turns, see `peak`."""
    size = policy.dtype.itemsize
    B, G, T, micro = args.batch, args.group, args.max_new, min(args.micro_batch, args.batch)
    qkv = (policy.heads + 2 * policy.kv_heads) * policy.head_dim
    inner = 2 * (policy.heads + policy.kv_heads) * policy.head_dim
    lora = args.lora_rank * policy.layers * (7 * policy.d + inner + 3 * policy.ff)
    dim, router = args.router_dim, 0
    if reads_states(args.collab):
        entries = len(experts) * len(args.layer) * (args.positions if args.read == "last" else 1)
        width = max(e.d for e in experts)
        router = entries * width * dim + 12 * dim * dim + dim * policy.d
        if args.collab == "linear":
            router = entries * width * args.latents * policy.d
    kept = 10 * policy.d + 2 * qkv + 5 * policy.ff  # numbers that autograd keeps of a token in a block
    scores = 2 * G * policy.heads * T * (S + T)
    cache = 2 * policy.layers * policy.kv_heads * policy.head_dim * B * (S + G * T)
    return {"policy, frozen": policy.params * size,
            "LoRA and router, their gradients and AdamW's moments": 16 * (lora + router),
            "rollout: merged weights, keys and values, logits":
                (policy.blocks + cache + B * G * policy.vocab) * size,
            f"gradient pass, {micro} prompts at a time":
                policy.layers * micro * ((S + G * T) * kept + scores) * size,
            "log-probabilities, one chunk": 3 * 256 * policy.vocab * 4,
            "libraries": LIBRARIES,
            "largest expert, while it reads": max((e.params * e.dtype.itemsize for e in experts), default=0)}

def peak(table):
    """Bytes at the worst moment."""
    frozen, trained, sampling, gradient, chunk, libraries, reading = table.values()
    return libraries + frozen + max(reading, trained + max(sampling, gradient + chunk))

def seconds(run):
    """Of a call of run(), a mean over half a second; a GPU has finished before and after."""
    timer = Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).mean

def rate(policy, rows, device):
    """Operations a second in products of `rows` tokens with weights of the policy's shapes, of as many layers
    as exceed a processor's cache."""
    sides = [(policy.ff, policy.d), (policy.d, policy.ff), (policy.d, policy.d)]
    copies = max(1, min(policy.layers, 2**26 // (policy.d * (2 * policy.ff + policy.d))))
    pairs = [(torch.randn(rows, width, device=device).to(policy.dtype),
              torch.randn(out, width, device=device).to(policy.dtype)) for out, width in sides * copies]

    def products():
        for x, weight in pairs:
            F.linear(x, weight)

    return 2 * rows * sum(out * width for out, width in sides * copies) / seconds(products)

def addition(policy, rows, device):
    """Seconds of adding two hidden states of `rows` tokens."""
    x = torch.randn(rows, policy.d, device=device).to(policy.dtype)
    return seconds(lambda: x + x)

def step_seconds(args, policy, S, T, gpu=None):
    """(rollout, gradient pass) of a step whose completions have T tokens."""
    B, G = args.batch, args.group
    head = policy.vocab * policy.d
    passes = args.epochs * (3 if args.beta else 2)  # forward, backward, and the reference
    scored = B * ((S + G * T) * policy.blocks + G * T * head)
    if gpu:
        flops, bandwidth = gpu[0] * 1e12, gpu[1] * 1e9
        token = max(2 * B * G / flops, policy.dtype.itemsize / bandwidth) * (policy.blocks + head)
        return 2 * B * S * policy.blocks / flops + T * token, 2 * passes * scored / flops
    many = rate(policy, min(args.micro_batch * (S + G * T), 2048), args.device)
    token = 2 * B * G * (policy.blocks + head) / rate(policy, B * G, args.device)
    token += policy.layers * ADDITIONS["rollout"] * addition(policy, B * G, args.device)
    part = min(args.micro_batch, B)
    rows = part * (S + G * T)
    scores = part * G * T * (S + T) * policy.heads / (rows * policy.d)  # for each number of the hidden states
    one_pass = policy.layers * addition(policy, rows, args.device)
    one_pass *= ADDITIONS["hidden"] + ADDITIONS["scores"] * scores
    return (2 * B * S * policy.blocks / many + T * token,
            2 * passes * scored / many + passes / 3 * B / part * one_pass)

def plan(args, length=None, gpu=None):
    """Print it; returns (memory, (rollout, gradient))."""
    policy, experts = Sizes(args.policy), [Sizes(name) for name in args.experts]
    if args.dtype != "auto":
        policy.dtype = getattr(torch, args.dtype)
    tokens, T = prompt_tokens(args, policy), length or args.max_new
    S = tokens + args.latents * (args.collab in ROUTERS)
    table = memory(args, policy, experts, S)
    for what, size in [*table.items(), ("at the peak, as not all is there at once", peak(table))]:
        print(f"  {what:54} {size / 1e9:7.2f} GB")
    train = max(args.steps * args.batch, 2000 if args.align else 32)
    writes = f", and writes {args.write} tokens to each" if args.align or args.own_text else ""
    print(f"  each expert reads {train:,} + {args.val} + {args.test:,} prompts{writes}, once for all runs")
    rollout, gradient = step_seconds(args, policy, S, T, gpu)
    print(f"  a step of GRPO, prompts of {tokens} tokens and completions of {T}: {rollout + gradient:.2g} s "
          f"(rollout {rollout:.2g}, gradient pass {gradient:.2g}); {args.steps} steps: "
          f"{args.steps * (rollout + gradient) / 60:.0f} minutes")
    words, reading = align_steps(args)
    print(f"  stage 0: {words} steps of words, {reading} of reading ({args.align_batch} prompts each)")
    return table, (rollout, gradient)

def main(argv=None):
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    own.add_argument("--gpu", nargs=2, type=float, help="TFLOP/s and GB/s")
    own.add_argument("--length", type=int, help="tokens of a completion")
    options, rest = own.parse_known_args(argv)
    if min(options.gpu or [1]) <= 0 or (options.length is not None and options.length < 1):
        raise ValueError("--gpu takes two numbers above 0, TFLOP/s and GB/s, and --length a number above 0")
    return plan(parse_args(rest), options.length, options.gpu)

if __name__ == "__main__":
    sys.exit(one_sentence("plan.py", main))
