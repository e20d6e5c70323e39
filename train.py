"""
n-Musketeers, end to end: a policy learns by reinforcement to read the hidden states of frozen experts.

$ python train.py                                    # three tiny experts in this repository: no GPU
$ python train.py --task gsm8k                       # the paper's setting, on one GPU
$ python train.py --collab single                    # the same policy without experts: the first control
$ python train.py --resume runs/NAME --steps 400     # go on with a run
$ torchrun --nproc_per_node=8 train.py --task gsm8k  # the same on eight GPUs

Not here: a value network, top-p sampling, a replay buffer, a trainer class.
"""
import os

# Before torch is imported. Threads that wait without spinning are kind to busy neighbours; a little spinning
# is kept, as sleeping between the thousand small operations of a token would cost half of a decode step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import copy
import ctypes
import fcntl
import json
import math
import random
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from experts import Expert, line_ends, read_tensors, write_tensors, write_whole
from model import Policy
from rewards import SPLITS, TooFew, known, problems, verify
from rlvr import (RANK, WORLD, Dataset, accuracy, add_gradients, advantages, align, align_steps, by_dataset,
                  by_expert, evaluate, gather, grpo_loss, kl_estimate, make_optimizer, ranks, read_back,
                  reference_logprobs, restore, rollout, share, test_report, total)
from router import ROUTERS, reads_states

with contextlib.suppress(AttributeError):  # glibc only: use freed memory again; saves up to 7% of a step
    ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that it takes
    ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

TINY = str(Path(__file__).resolve().parent / "tiny")

def arg(default, why):
    return field(metadata={"help": why}, **(
        dict(default_factory=lambda: default) if isinstance(default, list) else dict(default=default)))

@dataclass
class Args:  # the defaults are the paper's where it names them; PRESETS below has smaller settings
    preset: Literal["", "tiny", "small", "paper"] = arg("", "default: tiny, or with --task what fits")
    # task
    task: str = arg("gsm8k", "gsm8k, arithmetic, logic, algorithmic, a Reasoning Gym dataset; joined by +")
    level: str = arg("default", "of generated tasks: tiny, easy, default, hard, or min_terms=2,max_terms=3")
    data: str = arg("", "GSM8K: folder with train.jsonl and test.jsonl, or a file (default: downloaded once)")
    # models
    policy: str = arg("Qwen/Qwen2.5-3B-Instruct", "Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3; folder or hub name")
    experts: list[str] = arg(["Qwen/Qwen2.5-Math-1.5B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct",
                              "allenai/OLMo-2-0425-1B-Instruct", "microsoft/phi-1_5"],
                             "frozen, of any architecture (the paper does not name its own)")
    form: Literal["auto", "tagged", "plain"] = arg("auto", "tagged: a chat, answer in tags; plain: one line")
    collab: str = arg("soft", "soft: the router; hard, linear, prefix: its controls; text: experts' words in "
                              "the prompt; single: LoRA alone")
    control: Literal["none", "shuffled", "noise", "untrained"] = arg("none", "what stands in for the states")
    read: Literal["last", "first", "mean"] = arg("last", "which token's state is read (last: paper)")
    layer: list[int] = arg([-1], "which layers' states; 0 is the embedding (last: paper)")
    positions: int = arg(1, "states of this many last tokens (1: paper)")
    cue: str = arg("", "text behind the experts' prompts, such as 'The answer is ' (none: paper)")
    write: int = arg(16, "tokens an expert may write, for stage 0 and --collab text")
    # router and LoRA
    latents: int = arg(8, "context tokens (paper)")
    router_dim: int = arg(512, "width of the router (paper)")
    router_heads: int = arg(8, "its attention heads (paper)")
    router_temperature: float = arg(1.0, "of its attention; below 1 sharpens")
    neutral: Literal["zero", "mean"] = arg("zero", "an empty prefix: zero (paper) or the mean embedding")
    lora_rank: int = arg(8, "paper")
    lora_alpha: float = arg(16.0, "updates are scaled by alpha / rank; twice the rank is usual")
    # stage 0
    align: int = arg(0, "steps of reading experts' texts aloud (0: no stage 0, the paper's method)")
    align_batch: int = arg(16, "problems a step")
    align_lr: float = arg(4e-4, "of LoRA")
    align_router_lr: float = arg(1e-5, "of the router: it has learned its words already")
    align_words: int = arg(500, "steps before these: the router learns to write in the policy's vocabulary")
    align_words_lr: float = arg(1e-3, "of the router in these")
    # GRPO
    steps: int = arg(500, "optimizer steps (paper: 500 on Reasoning Gym, 233 on GSM8K)")
    batch: int = arg(32, "prompts a step (paper)")
    group: int = arg(8, "completions a prompt (paper)")
    max_new: int = arg(128, "tokens a completion (paper)")
    temperature: float = arg(1.0, "of sampling and loss alike: the policy's own distribution")
    beta: float = arg(0.04, "weight of the KL to the policy as GRPO finds it (paper); 0 saves its pass")
    clip: float = arg(0.2, "how far the ratio may fall; matters with --epochs above 1")
    clip_high: float = arg(0.2, "how far it may rise; above --clip it is DAPO's clip-higher")
    epochs: int = arg(1, "optimizer steps on each rollout (1: on-policy)")
    micro_batch: int = arg(4, "prompts in one backward pass: bounds memory, changes nothing else")
    lr: float = arg(1e-4, "of LoRA (paper)")
    router_lr: float = arg(1e-4, "of the router (paper)")
    warmup: int = arg(20, "steps to the full rate, then constant, so that a run can be prolonged")
    grad_clip: float = arg(1.0, "largest gradient norm (usual)")
    # run
    eval_every: int = arg(25, "steps between validations")
    save_every: int = arg(0, "steps between checkpoints (0: one a minute)")
    val: int = arg(120, "validation problems")
    test: int = arg(256, "held-out problems, most likely the paper's number")
    seed: int = arg(0, "of weights, order of problems and sampling")
    device: str = arg("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "of the policy; bfloat16 from 50 M on")
    out: str = arg("", "folder of the run (default: runs/<task>-<time>)")
    resume: str = arg("", "folder of a run to go on with; only --steps may be given beside it")

PRESETS = {
    "paper": {},
    "small": dict(  # one consumer GPU, or a patient CPU: a policy of 135 million parameters
        task="chain_sum", level="easy", form="plain", policy="HuggingFaceTB/SmolLM2-135M-Instruct",
        experts=["Qwen/Qwen2.5-Coder-0.5B-Instruct", "EleutherAI/pythia-410m", "BAAI/bge-base-en-v1.5"],
        cue="The answer is ", write=6, align=60, align_words=200, beta=0.0, lr=4e-4, router_lr=4e-5, batch=8,
        micro_batch=8, steps=60, max_new=16),
    "tiny": dict(  # made for the demonstration: one expert per family of problems, see tiny/README.md
        task="arithmetic+logic+algorithmic", level="tiny", form="plain", policy=f"{TINY}/policy", write=1,
        experts=[f"{TINY}/arithmetic", f"{TINY}/logic", f"{TINY}/algorithmic"], neutral="mean", align=30,
        align_batch=96, align_lr=3e-3, align_router_lr=3e-4, align_words=250, align_words_lr=3e-3, beta=0.0,
        lr=1e-3, router_lr=2e-3, batch=36, micro_batch=36, steps=80, max_new=8, router_dim=64, router_heads=4,
        router_temperature=0.5),
}

def main(args):
    """One run, from models to test."""
    out = Path(args.out)
    policy, experts, router = build(args)
    # What never changes is made once: the prompts' tokens, and what every expert makes of each problem.
    data = {split: Dataset(load_problems(args, split), policy, experts, args) for split in SPLITS}
    if router:
        router.fit_standardization(data["train"].H[:256].to(policy.embed.device))
    generator = torch.Generator(policy.embed.device).manual_seed(args.seed + 1_000_003 * RANK)
    state, moments = load_newest(out, policy, router, generator)  # how far the run is
    if state["step"] > args.steps:
        raise ValueError(f"--steps {args.steps} is below the {state['step']} that are done: give more")
    drop_rows(out, state)
    introduce(args, policy, router, experts, data, state)
    keeper = Keeper(args, policy, router, generator, state)

    # Stage 0, before any reward: the router learns to write, the policy to read, what the experts would say.
    if args.align and not list(out.glob("aligned-*")):
        show_gate(policy, experts, data["val"], args)
        align(policy, router, data["train"], args, state["align"], moments, keeper.after_align_step)
        show_read_back(out, experts, read_back(policy, router, data["val"], args))
        save_checkpoint(out / "aligned-", policy, router, state, None, generator)
        moments = {}
    # The KL term's reference is the policy as GRPO finds it; None: the frozen one, as there was no stage 0.
    reference = load_reference(out, policy, router) if args.beta and args.align else None

    optimizer = make_optimizer(policy, router, args.lr, args.router_lr)
    restore(optimizer, moments)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in tqdm(range(state["step"] + 1, args.steps + 1), desc="GRPO", disable=True if RANK else None):
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = group["base_lr"] * min(1.0, step / max(1, args.warmup))

        # 1. Sample: the policy reads [context; prompt] and gives a group of answers to each problem.
        #    The verifier pays 1 for a right answer and 0 for any other.
        batch = data["train"].batch(share(range((step - 1) * args.batch, step * args.batch)))
        sampled = rollout(policy, router, batch, args, args.group, args.temperature, generator)

        # 2. How much better was each answer than the others of its group?
        advantage = advantages(sampled.rewards)  # (B, G)

        # 3. Score the same tokens again, now with gradient: it reaches LoRA and, through the context, the
        # router.
        start = time.perf_counter()
        n_tokens = total(sampled.mask.sum())[0]  # of the whole step: micro-batches and ranks change nothing
        old = torch.empty(sampled.mask.shape, device=sampled.mask.device)  # under the policy that sampled
        for epoch in range(args.epochs):
            i, sums = 0, Counter()
            while i < len(batch.problems):
                part = slice(i, i + args.micro_batch)
                micro, tokens, mask = batch[part], sampled.tokens[part], sampled.mask[part]
                try:
                    context, _ = router(micro.H) if router else (None, None)
                    cache = policy.prefill(micro.tokens, micro.lengths, context)
                    logp, entropy = policy.logprobs(cache, tokens, mask, args.temperature)
                    if epoch == 0:
                        old[part] = logp.detach()
                    ref = None
                    if args.beta:
                        ref = reference_logprobs(policy, reference, micro, tokens, mask, args.temperature)
                    loss = grpo_loss(logp, old[part], ref, advantage[part], mask, args) / n_tokens
                    loss.backward()
                except (RuntimeError, MemoryError) as error:  # out of memory: again, fewer prompts at a time
                    args.micro_batch = half_of(args.micro_batch, error)
                    optimizer.zero_grad(set_to_none=True)
                    i, sums = 0, Counter()
                    continue
                sums["loss"] += loss.item()
                sums["entropy"] += entropy.sum().item() / n_tokens
                if ref is not None:
                    sums["kl"] += kl_estimate(logp.detach(), ref)[mask].sum().item() / n_tokens
                i += args.micro_batch

            # 4. Step.
            add_gradients(parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip).item()
            finite = math.isfinite(grad_norm) and math.isfinite(total(sums["loss"])[0])
            if finite:  # one NaN in a moment of AdamW would end the run
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # 5. Look at the reward, and at the attention by dataset.
        row = dict(step=step, grad_norm=grad_norm, train_seconds=time.perf_counter() - start)
        row |= summarize(sampled, data["train"].owner, experts, sums)
        if step % args.eval_every == 0 or step == args.steps:
            row["val"] = accuracy(evaluate(policy, router, data["val"], args)[0])
        log(out, row, sampled)
        keeper.after_step(step, finite, optimizer)

    report = test_report(policy, router, data["test"], args, experts)
    show_report(args, report)

# -- What a run is made of

def build(args):
    """Policy, experts and router. Also called by eval.py."""
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    torch.manual_seed(args.seed)
    experts = [Expert(source, args.read, args.layer, args.positions, args.write, args.cue, device=args.device,
                      untrained=args.control == "untrained") for source in args.experts]
    for i, expert in enumerate(experts):  # two folders may end alike; attention is reported by name
        expert.name += f"-{i}" if any(expert.name == other.name for other in experts[:i]) else ""
    if args.align and not any(expert.writes for expert in experts):
        raise ValueError("stage 0 has nothing to read, as no expert writes: use --align 0, or another expert")
    itself = Expert(args.policy)  # the policy's tokenizer and size, without weights
    if args.form == "auto":
        args.form = "tagged" if itself.template == "chat" else "plain"
    if args.form == "tagged" and itself.template == "plain":
        raise ValueError(f"{itself.name} has no chat template: use --form plain")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if itself.params >= 50e6 else "float32"
    policy = Policy.from_pretrained(args.policy, args.lora_rank, args.lora_alpha, getattr(torch, args.dtype),
                                    args.device, args.neutral)
    policy.tokenizer = itself.tokenizer
    if args.form == "plain":  # the answer is the first line
        policy.stop_at([*policy.config.stop, *line_ends(policy.tokenizer)])
    # a hub model is named with its commit, so that the run goes on with the same weights when the hub has
    # others
    args.policy = itself.pinned
    args.experts = [expert.pinned for expert in experts]
    if args.collab not in ROUTERS:
        return policy, experts, None
    # a fresh prefix does no harm: half as large as an embedding, or hardly different from the mean embedding
    init_scale = 0.02 if args.neutral == "mean" else 0.5
    router = ROUTERS[args.collab]([expert.width for expert in experts for _ in range(expert.entries)],
                                  policy.config.hidden_size, args.latents, args.router_heads, args.router_dim,
                                  args.router_temperature, init_scale)
    return policy, experts, router.to(args.device)

def load_problems(args, split, n=None):
    """The problems of a split. Training problems come in the seed's order, shuffled in blocks, so that a
    longer run begins alike; a small dataset gives as many held-out ones as it has."""
    if split != "train":
        try:
            return problems(args.task, split, n or getattr(args, split), args.data, args.level)
        except TooFew as few:
            return problems(args.task, split, few.available or 1, args.data, args.level)
    n = n or max(args.steps * args.batch, 2000 if args.align else 32)
    block = max(256, 8 * args.batch)
    found = problems(args.task, "train", math.ceil(n / block) * block, args.data, args.level)
    for start in range(0, len(found), block):
        part = found[start:start + block]
        random.Random(f"{args.seed} {start}").shuffle(part)
        found[start:start + block] = part
    return found[:n]

# -- What is said and written down

def introduce(args, policy, router, experts, data, state):
    """What the run is about to do; config.json is written now."""
    if RANK == 0:
        config = dict(args=asdict(args), ranks=WORLD, torch=torch.__version__)
        write_whole(Path(args.out) / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    count = lambda module: sum(p.numel() for p in module.parameters()) if module else 0
    words, texts = align_steps(args, data["train"])
    print(f"n-Musketeers: {args.collab}, control {args.control}, task {args.task}, seed {args.seed}")
    print(f"  problems   {len(data['train']):,} train, {len(data['val'])} val, {len(data['test'])} test")
    print(f"  policy     {Path(args.policy).name}, {args.dtype} on {args.device}, answers {args.form}")
    for expert in experts:
        print(f"  expert     {expert.name}: width {expert.width}, {expert.n_layers} layers, "
              f"{expert.params / 1e6:.2f} M, {expert.template}{'' if expert.writes else ', reads only'}")
    print(f"  trained    {count(policy):,} parameters of LoRA, {count(router):,} of the router")
    print(f"  stage 0    {words} steps of words (the router alone), {texts} of reading aloud; no reward")
    print(f"  GRPO       {args.steps} steps of {args.batch} prompts x {args.group} answers of at most "
          f"{args.max_new} tokens; KL weight {args.beta:g}")
    print(f"  a problem  {data['val'].prompts[0][-70:]!r}, answer {data['val'].problems[0].answer!r}")
    if args.resume:
        print(f"  resumed    after {state['align']} steps of stage 0 and {state['step']} of GRPO")

def show_gate(policy, experts, data, args, n=64):
    """Before minutes are spent: is there anything to attend to? What experts themselves say to a few problems
    must be right more often than what the policy says alone, by 15 points on a dataset at least."""
    rows = range(min(n, len(data)))
    datasets = [data.problems[i].dataset for i in rows]
    with policy.lora_disabled():
        verdicts = evaluate(policy, None, data, args, list(rows))[0]
    alone = by_dataset(datasets, torch.tensor([float(verdict.strict) for verdict in verdicts]))
    print(f"  alone      the policy is right in {percents(alone)}")
    gains = []
    for expert, texts in zip(experts, data.texts):
        right = [float(verify(texts[i], data.problems[i], "plain").strict) for i in rows]
        own = by_dataset(datasets, torch.tensor(right))
        gains += [own[dataset] - alone[dataset] for dataset in own]
        if expert.writes:
            print(f"  says       {expert.name} is right in {percents(own)}")
    if max(gains) < 0.15:
        print("  warning    no expert's own words beat the policy by 15 points on any dataset: there is "
              "little to attend to")

def percents(shares):
    return ", ".join(f"{dataset} {share:.0%}" for dataset, share in shares.items())

def show_read_back(out, experts, rows):
    for e, read, shuffled, n in rows:
        if RANK == 0:
            append(out / "align.jsonl", dict(expert=experts[e].name, read_back=read, shuffled=shuffled, n=n))
        tqdm.write(f"stage 0: of {n} new texts of {experts[e].name} the policy reads {read:.0%} back, with "
                   f"other problems' states {shuffled:.0%}")

def summarize(sampled, owner, experts, sums):
    """A row of metrics.jsonl, of all ranks: shares are 0 to 1, lengths in tokens, times in seconds."""
    mine = dict(rewards=sampled.rewards, length=sampled.mask.sum(-1), truncated=sampled.truncated)
    if sampled.attention is not None:
        mine["attention"] = by_expert(sampled.attention, owner)
    parts = gather(({key: t.cpu() for key, t in mine.items()}, sampled.problems, sampled.verdicts))
    step = {key: torch.cat([part[0][key] for part in parts]).float() for key in mine}
    datasets = [problem.dataset for part in parts for problem in part[1]]
    verdicts = [verdict for part in parts for group in part[2] for verdict in group]
    rewards = step["rewards"]  # (B, G)
    loss, kl, entropy = total(sums["loss"], sums["kl"], sums["entropy"])
    row = dict(reward=rewards.mean().item(), accuracy=accuracy(verdicts), length=step["length"].mean().item(),
               truncated=step["truncated"].mean().item(),
               frac_reward_zero_std=(rewards.amax(1) == rewards.amin(1)).float().mean().item(),
               loss=loss, kl=kl, entropy=entropy, rollout_seconds=sampled.seconds,
               tokens_per_second=step["length"].sum().item() / sampled.seconds,
               reward_by_dataset=by_dataset(datasets, rewards.mean(1)),
               reasons=dict(Counter(verdict.reason for verdict in verdicts).most_common()))
    if sampled.attention is not None:
        attention, names = step["attention"], [expert.name for expert in experts]  # (B, heads, L, experts)
        row["attention"] = dict(zip(names, attention.mean((0, 1, 2)).tolist()))
        row["attention_by_dataset"] = by_dataset(datasets, attention.mean((1, 2)), names)
        row["attention_entropy"] = torch.special.entr(attention).sum(-1).mean().item()
        row["attention_map"] = attention.mean(0).tolist()
    return row

def log(out, row, sampled):
    """A row to metrics.jsonl; now and then a line to read, and sampled answers to samples.jsonl."""
    if RANK:
        return
    append(out / "metrics.jsonl", row)
    if row["step"] % 10 == 1 or "val" in row:
        line = f"step {row['step']:4d} | reward {row['reward']:.3f}"
        line += f" | val {row['val']:.1%}" if "val" in row else ""
        for dataset, shares in row.get("attention_by_dataset", {}).items():
            most = max(shares, key=shares.get)
            line += f" | {dataset[:12]}: {most[:12]} {shares[most]:.2f}"
        tqdm.write(line)
        for problem, texts, verdicts in list(zip(sampled.problems, sampled.texts, sampled.verdicts))[:3]:
            for text, verdict in zip(texts, verdicts):
                append(out / "samples.jsonl", dict(
                    step=row["step"], question=problem.question, answer=problem.answer, completion=text,
                    reason=verdict.reason, reward=verdict.reward))
    if row["step"] == 3 and row["reward"] == 0:
        tqdm.write(f"no answer is right yet (most: {next(iter(row['reasons']))}); if that goes on, nothing "
                   "is learned: try an easier --level, --form plain or another --policy")

def show_report(args, report):
    """Before and after on held-out problems, what masking each expert costs, and what to try next."""
    if RANK:
        return
    write_whole(Path(args.out) / "eval.json", (json.dumps(report, indent=1) + "\n").encode())
    before, after = report["before"]["strict"], report["after"]["strict"]
    print(f"\n{report['n']} held-out problems, greedy: {before:.1%} right before training, {after:.1%} after")
    for dataset, rows in report["by_dataset"].items():
        line = f"  {dataset[:22]:22} {rows['before']:6.1%} -> {rows['after']:6.1%}"
        for name, masked in report["masked"].items():
            line += f" | without {name[:12]} {100 * (masked[dataset] - rows['after']):+.0f}"
        print(line)
    out, question = shlex.quote(args.out), shlex.quote(report["example"]["question"])
    print(f"next:\n  python eval.py {out}\n  python eval.py {out} --ask {question}\n"
          f"  python train.py --resume {out} --steps {2 * args.steps}")

def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")

# -- Stopping and going on. A checkpoint is one safetensors file, which cannot run code: weights, AdamW's
# moments, the ranks' random generators, and as JSON text how far the run is.

class Stopped(Exception):
    """Asked to stop; the work is saved."""

class Keeper:
    """Writes a checkpoint when one is due, keeps the last two, and raises Stopped after Ctrl-C or SIGTERM."""

    def __init__(self, args, policy, router, generator, state):
        self.args, self.out, self.state, self.saved = args, Path(args.out), state, time.monotonic()
        self.policy, self.router, self.generator = policy, router, generator
        self.signals, self.skipped = [], 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        if self.signals:  # the second time
            raise KeyboardInterrupt
        self.signals.append(number)

    def after_align_step(self, part, done, optimizer, loss):
        self.state["align"] = done
        if RANK == 0 and done % 25 == 1:
            append(self.out / "align.jsonl", dict(align=done, part=part, loss=loss))
            tqdm.write(f"stage 0, step {done:4d}, {part:7} | loss {loss:.3f}")
        self.keep(f"align-{done:06d}-", done, False, optimizer)

    def after_step(self, step, finite, optimizer):
        self.state["step"] = step
        self.skipped = 0 if finite else self.skipped + 1  # in a row
        self.keep(f"step-{step:06d}-", step, step == self.args.steps or self.skipped == 5, optimizer)
        if self.skipped:
            tqdm.write(f"step {step}: loss or gradient is not finite, the step is skipped")
        if self.skipped == 5:
            raise ValueError("5 steps in a row were skipped, as loss or gradient is not finite: start anew "
                             "with a lower --lr, --router_lr or --grad_clip")

    def keep(self, prefix, step, last, optimizer):
        due = step % self.args.save_every == 0 if self.args.save_every else time.monotonic() - self.saved > 60
        due, stop = map(bool, total(due, len(self.signals)))  # what one rank decides, all do
        if due or last or stop:
            save_checkpoint(self.out / prefix, self.policy, self.router, self.state, optimizer,
                            self.generator)
            for old in checkpoints(self.out)[2:] if RANK == 0 else ():
                if not old.name.startswith("aligned-"):  # the KL term's reference, and eval.py --aligned
                    old.unlink()
            self.saved = time.monotonic()
        if stop and not last:
            raise Stopped

def trainable(policy, router):
    """Name -> tensor of everything that training changes or fixes: LoRA and the router."""
    named = {f"policy.{name}": p for name, p in policy.named_parameters()}
    if router:
        named |= {f"router.{name}": t for name, t in router.state_dict(keep_vars=True).items()}
    return named

def save_checkpoint(path, policy, router, state, optimizer=None, generator=None):
    """All ranks call, rank 0 writes. The checksum is added to the name."""
    generators = gather(generator.get_state()) if generator else []
    tensors = trainable(policy, router) | {f"generator.{rank}": t for rank, t in enumerate(generators)}
    for i, moments in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    tensors["state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if RANK == 0:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_tensors(path.parent, tensors, path.name)
    total(0)  # the ranks meet: the file is there for all

def load_checkpoint(path, policy, router, generator=None):
    """Put weights and generator in place; returns (state, AdamW's moments). Raises ValueError, changing
    nothing, for a file that is damaged or was made for other models."""
    tensors, named = read_tensors(path), trainable(policy, router)
    for name, t in named.items():
        if name not in tensors or tensors[name].shape != t.shape:
            raise ValueError(f"{path} was made for other models: {name} is missing or of another shape")
    with torch.no_grad():
        for name, t in named.items():
            t.copy_(tensors[name])
    if generator:
        generator.set_state(tensors[f"generator.{RANK}"])
    moments = {}
    for name in tensors:
        if name.startswith("optimizer."):
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = tensors[name]
    return json.loads(bytes(tensors["state"].tolist())), moments

def checkpoints(out):
    """Those of a run, the newest first."""
    stages = ("step", "aligned", "align")
    return [path for stage in stages for path in sorted(out.glob(f"{stage}-*"), reverse=True)]

def load_newest(out, policy, router, generator=None):
    """Load the newest checkpoint that is complete; returns (state, AdamW's moments). One that is damaged is
    passed over with a warning. Raises ValueError if none can be loaded."""
    for path in checkpoints(out):
        try:
            return load_checkpoint(path, policy, router, generator)
        except ValueError as error:
            warnings.warn(f"{error}; the checkpoint before it is taken", stacklevel=2)
    if checkpoints(out):
        raise ValueError(f"no checkpoint in {out} can be loaded, see above: start anew with another --out")
    return dict(align=0, step=0), {}

def drop_rows(out, state):
    """Drop rows of the .jsonl files that are newer than the checkpoint: they are made again."""
    aligned = list(out.glob("aligned-*"))
    for path in out.glob("*.jsonl") if RANK == 0 else ():
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line may be torn
                row = json.loads(line)
                newer = row.get("step", 0) > state["step"] or row.get("align", 0) > state["align"]
                if not newer and (aligned or "expert" not in row):  # what was read back is said once
                    kept.append(f"{line}\n")
        write_whole(path, "".join(kept).encode())

def load_reference(out, policy, router):
    """(LoRA's tensors, router) as stage 0 left them; policy and router stay as they are."""
    now = {name: t.detach().clone() for name, t in trainable(policy, router).items()}
    load_checkpoint(next(out.glob("aligned-*")), policy, router)
    reference = [p.detach().clone() for p in policy.parameters()], copy.deepcopy(router)
    with torch.no_grad():
        for name, t in trainable(policy, router).items():
            t.copy_(now[name])
    return reference

@contextlib.contextmanager
def one_process(out):
    """Only one process trains in a folder. The kernel drops the lock with its process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in {out}: wait, or choose another --out") from None
        yield

def half_of(micro_batch, error):
    """The next smaller micro-batch after out-of-memory; any other error is raised again."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")  # every device has its own
    if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
        raise error
    if micro_batch == 1:
        raise ValueError("out of memory: start anew with a lower --group, --batch or --max_new, or smaller "
                         "models")
    tqdm.write(f"out of memory in the gradient pass: {micro_batch // 2} prompts at a time from now on")
    return micro_batch // 2

# -- The command line

def parse_args(argv):
    """The settings of a run: what is given, else the preset's. Raises ValueError, one sentence with the
    mend."""
    parser = HfArgumentParser(Args, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given is in the namespace
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        saved = vars(saved_args(given["resume"]))
        same = [name for name, value in given.items() if f"{saved[name]}@".startswith(f"{value}@")]
        changed = sorted(given.keys() - {*same, "resume", "out", "steps", "micro_batch", "device"})
        if changed:
            raise ValueError(f"--resume goes on with the same run; --{', --'.join(changed)} would change it")
        args = Args(**(saved | given | dict(out=given["resume"])))
    else:
        preset = given.get("preset") or pick_preset(given)
        if "policy" in given and "preset" not in given:  # small's settings, but none of its models
            given = dict(experts=[], cue="") | given
        args = Args(**(PRESETS[preset] | given | dict(preset=preset)))
        if preset == "paper" and args.task == "gsm8k" and "steps" not in given:
            args.steps = 233  # one epoch of 32 prompts a step (paper)
        if args.collab in ("single", "text") and "align" not in given:
            args.align = 0
        args.out = args.out or f"runs/{args.task.replace('+', '-')}-{time.strftime('%m%d-%H%M%S')}"
        args.out = gather(args.out)[0]  # clocks differ
        if list(Path(args.out).glob("*.json")):
            raise ValueError(f"{args.out} holds a run: choose another --out, or --resume {args.out}")
    args.device = pick_device(args.device)
    check(args)
    return args

def pick_preset(given):
    """Without --preset: small's settings for a policy of the user's; else what task and device ask for."""
    if "policy" in given:
        return "small"
    tasks = given.get("task", PRESETS["tiny"]["task"]).split("+")
    for task in tasks:
        known(task)
    cuda = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory
    if "task" in given and cuda > 22e9:
        return "paper"
    if set(tasks) <= {"arithmetic", "logic", "algorithmic"}:
        return "tiny"
    raise ValueError(f"{given['task']} is too much for the embedded pool, made for arithmetic, logic and "
                     "algorithmic: add --preset small or paper, or --policy X --experts A B C")

def check(args):
    """Raises ValueError for settings that no run can have, given by a user or by a damaged config.json."""
    may_be_zero = ("align", "align_words", "align_lr", "align_router_lr", "lora_rank", "beta", "clip",
                   "clip_high", "warmup", "save_every", "seed")
    for name, default in asdict(Args()).items():
        value = getattr(args, name)
        fine = isinstance(value, (int, float) if isinstance(default, float) else type(default))
        if fine and isinstance(value, list):
            fine = all(isinstance(item, type(default[0])) for item in value)
        if fine and isinstance(value, (int, float)):
            fine = 0 <= value < math.inf and (value > 0 or name in may_be_zero)
        if not fine:
            raise ValueError(f"--{name} is {value!r}: see train.py --help for what it may be")
    reads = reads_states(args.collab)
    for wrong, message in (
            (args.collab not in (*ROUTERS, "text", "single"),
             f"--collab {args.collab} is unknown: choose {', '.join(ROUTERS)}, text or single"),
            (args.group < 2, "--group 1 has nothing to compare an answer with: give it at least 2"),
            (args.batch < WORLD, f"--batch {args.batch} gives {WORLD} ranks not a prompt each: raise it"),
            (args.align and args.collab == "text",
             "--collab text reads words, there is nothing to align: leave --align out"),
            (args.control != "none" and not reads,
             f"--collab {args.collab} reads no states that --control could replace: use --collab soft"),
            (not args.lora_rank and args.collab in ("single", "text"),
             "--lora_rank 0 leaves nothing to train: give it a rank"),
            (not args.experts and (reads or args.collab == "text" or args.align),
             f"--collab {args.collab} --align {args.align} needs experts to read: name --experts, or use "
             "--collab single --align 0")):
        if wrong:
            raise ValueError(message)
    if not (reads or args.collab == "text" or args.align):
        args.experts = []

def saved_args(folder):
    """The settings of the run in `folder`, by its config.json. Also called by eval.py."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json): name a folder that train.py wrote")
    try:
        config = json.loads(path.read_text())
        args = Args(**config["args"])
        check(args)
        same_ranks = config["ranks"] == WORLD
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): start anew with another --out") from error
    if not same_ranks:
        raise ValueError(f"{folder} is a run of {config['ranks']} ranks: go on with as many, not {WORLD}")
    return args

def pick_device(name):
    there = [d for d, yes in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                              ("cpu", True)) if yes]
    kind, _, index = (there[0] if name == "auto" else name).partition(":")
    index = index or (os.environ.get("LOCAL_RANK", "") if kind == "cuda" else "")  # a GPU for each rank
    if kind not in there or (index and (not index.isdigit() or int(index) >= torch.cuda.device_count())):
        raise ValueError(f"there is no {kind} {index} here: use --device {' or '.join(there)}, and no more "
                         "ranks than GPUs")
    return f"{kind}:{index}" if index else kind

def one_sentence(program, run):
    """Call run(); returns the exit code. What a user can mend is said in one sentence, a bug is raised."""
    try:
        run()
        return 0
    except Stopped:
        print("stopped and saved; go on with --resume")
        return 0
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; the last checkpoint and what was read are kept", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse has said what is wrong
        return error.code
    except OSError as error:  # a full disk, a folder that may not be written, another rank that is gone
        message = f"{error}: mend that and go on with --resume, what was saved is complete"
    except ValueError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        try:
            half_of(1, error)
        except ValueError as out_of_memory:
            message = str(out_of_memory)
    print(f"{program}: {message}", file=sys.stderr)
    return 2

def run(argv=None):
    with ranks():
        args = parse_args(argv)
        with contextlib.nullcontext() if RANK else one_process(Path(args.out)):
            main(args)

if __name__ == "__main__":
    sys.exit(one_sentence("train.py", run))
