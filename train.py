"""
n-Musketeers, end to end: a policy learns by reinforcement to read the hidden states of frozen experts.

$ python train.py                                    # three tiny experts in this repository: no GPU
$ python train.py --task gsm8k                       # the paper's setting, on one GPU
$ python train.py --collab single                    # the same policy without experts: the first control
$ torchrun --nproc_per_node=8 train.py --task gsm8k  # the same on eight GPUs
"""
import os
import signal

# Before torch is imported: threads that hardly spin while they wait are kind to busy neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import argparse
import contextlib
import json
import math
import runpy
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from eval import (accuracy, append, bar, by_dataset, damaged, drop_rows, evaluate, log_alignment, one_process,
                  one_sentence, out_of_memory, read_back, read_config, show_gate, show_report, test_report)
from experts import pick_device, write_atomic
from rewards import SPLITS, known
from rlvr import (RANK, WORLD, Dataset, add_gradients, advantages, align, align_steps, build, checkpoints,
                  gather, grpo_loss, kl_estimate, load_newest, load_problems, make_optimizer, ranks, rollout,
                  save_checkpoint, share, total)
from router import ROUTERS, by_expert, reads_states

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
    control: Literal["none", "shuffled", "noise", "untrained", "wrong", "partly"] = arg(
        "none", "wrong: the last expert reads another problem; partly: so on the last dataset alone")
    read: Literal["last", "first", "mean"] = arg("last", "which token's state is read (last: paper)")
    layer: list[int] = arg([-1], "which layers' states; 0 is the embedding (last: paper)")
    positions: int = arg(1, "states of this many last tokens (1: paper)")
    own_text: bool = arg(False, "an expert reads its own text behind the prompt: states while it answers")
    cue: str = arg("", "text behind the experts' prompts, such as 'The answer is ' (none: paper)")
    write: int = arg(16, "tokens an expert may write, for stage 0 and --collab text")
    # router and LoRA
    latents: int = arg(8, "context tokens (paper)")
    router_dim: int = arg(512, "width of the router (paper)")
    router_heads: int = arg(8, "its attention heads (paper)")
    router_temperature: float = arg(1.0, "of its attention; below 1 sharpens")
    neutral: Literal["zero", "mean"] = arg("zero", "an empty prefix: zero (paper) or the mean embedding")
    lora_rank: int = arg(8, "of LoRA (paper)")
    lora_alpha: float = arg(16.0, "updates are scaled by alpha / rank; twice the rank is usual")
    # stage 0
    align: int = arg(0, "steps of reading experts' texts aloud (0: no stage 0, the paper's method)")
    align_batch: int = arg(16, "problems a step")
    align_lr: float = arg(4e-4, "of LoRA")
    align_router_lr: float = arg(1e-5, "of the router: it has learned its words already")
    align_words: int = arg(500, "steps before --align: the router learns to write in the policy's vocabulary")
    align_words_lr: float = arg(1e-3, "of the router in --align_words")
    # GRPO
    steps: int = arg(233, "optimizer steps (paper: 233 on GSM8K, an epoch; 500 on Reasoning Gym)")
    batch: int = arg(32, "prompts a step (paper)")
    group: int = arg(8, "completions a prompt (paper)")
    max_new: int = arg(128, "tokens a completion (paper)")
    temperature: float = arg(1.0, "of sampling and loss alike: the policy's own distribution")
    beta: float = arg(0.04, "weight of the KL to the frozen policy (paper); 0 skips it")
    clip: float = arg(0.2, "how far the ratio may fall; matters with --epochs above 1")
    clip_high: float = arg(0.2, "how far it may rise; above --clip it is DAPO's clip-higher")
    epochs: int = arg(1, "optimizer steps on each rollout (1: on-policy)")
    micro_batch: int = arg(4, "prompts in one backward pass: bounds memory, changes nothing that is learned")
    lr: float = arg(1e-4, "of LoRA (paper)")
    router_lr: float = arg(1e-4, "of the router (paper)")
    trust_lr: float = arg(0.0, "of its trust in each expert (0: it has none, the paper's method)")
    warmup: int = arg(20, "steps to the full rate, then constant, so that a run can be prolonged")
    grad_clip: float = arg(1.0, "largest gradient norm (usual)")
    # run
    eval_every: int = arg(25, "steps between validations")
    save_every: int = arg(10, "steps between checkpoints")
    val: int = arg(120, "validation problems")
    test: int = arg(256, "held-out problems (probably the paper's)")
    test_skip: int = arg(0, "held-out problems before these, left out")
    seed: int = arg(0, "of weights, order of problems and sampling")
    device: str = arg("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "of the policy; bfloat16 from 50 M on")
    out: str = arg("", "folder of the run (default: runs/<task>-<time>)")
    resume: str = arg("", "folder of a run to go on with; beside it: --steps, --micro_batch, --device")
    plan: bool = arg(False, "say what memory and time this run would need, and end")

def main(args):
    """One run, from models to test."""
    out = Path(args.out)
    policy, experts, router = build(args)
    # What never changes is made once: the prompts' tokens, and what every expert makes of each problem.
    data = {split: Dataset(load_problems(args, split), policy, experts, args) for split in SPLITS}
    if reads_states(args.collab):
        router.fit_standardization(data["train"].H[:256].to(policy.embed.device))
    generator = torch.Generator(policy.embed.device).manual_seed(args.seed + 1_000_003 * RANK)
    state, moments = load_newest(out, policy, router, generator)  # how far the run is
    introduce(args, policy, router, experts, data, state)
    stop_signals.clear()
    on_stop(ask_to_stop)

    if not state["step"]:
        show_gate(policy, experts, data, args)
    # Stage 0, before any reward: the router learns to write, the policy to read, what the experts would say.
    if args.align and not state["aligned"]:
        stage = align(policy, router, data["train"], args, state["align"], moments)
        for part, loss, optimizer in bar(stage, "stage 0", state["align"], sum(align_steps(args))):
            state["align"] += 1
            log_alignment(out, state["align"], part, loss)  # align has made the step
            keep(out, "align", state["align"], args, policy, router, state, optimizer, generator)
        read_back(out, policy, router, data["val"], args, experts)
        state["aligned"] = True
        save_checkpoint(out / "aligned-", policy, router, state, None, generator)
        moments = {}

    optimizer = make_optimizer(policy, router, args.lr, args.router_lr, args.trust_lr, moments)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    skipped = 0  # steps in a row
    for step in bar(range(state["step"] + 1, args.steps + 1), "GRPO", state["step"], args.steps):
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = group["base_lr"] * min(1.0, step / max(1, args.warmup))

        # 1. Sample: the policy reads [context; prompt] and gives a group of answers to each problem.
        #    The verifier pays 1 for a right answer and 0 for any other.
        batch = data["train"].batch(share(range((step - 1) * args.batch, step * args.batch)))
        sampled = rollout(policy, router, batch, args, args.group, args.temperature, generator)

        # 2. How much better was each answer than the others of its group?
        advantage = advantages(sampled.rewards)  # (B, G)

        # 3. Score the same tokens again, with gradient: to LoRA and, through the context, to the router.
        start = time.perf_counter()
        n_tokens = total(sampled.mask.sum().item())  # of the whole step: micro-batches, ranks change nothing
        old = torch.zeros(sampled.mask.shape, device=sampled.mask.device)  # log-probabilities in epoch 0
        for epoch in range(args.epochs):
            i, sums = 0, Counter()
            while i < len(batch.problems):
                part = slice(i, i + args.micro_batch)
                i += args.micro_batch
                if part.start > 0 and not (args.beta or advantage[part].any()):  # the first shows a NaN
                    continue  # equal rewards and no KL: its gradient is zero
                micro, tokens, mask = batch[part], sampled.tokens[part], sampled.mask[part]
                try:
                    context, _ = router(micro.H) if router else (None, None)
                    cache = policy.prefill(micro.tokens, micro.lengths, context)
                    logp, entropy = policy.logprobs(cache, tokens, mask, args.temperature)
                    if epoch == 0:
                        old[part] = logp.detach()
                    ref = None
                    if args.beta:  # the reference: LoRA off and prefix off
                        with torch.no_grad(), policy.lora_disabled():
                            cache = policy.prefill(micro.tokens, micro.lengths)
                            ref, _ = policy.logprobs(cache, tokens, mask, args.temperature)
                    loss = grpo_loss(logp, old[part], ref, advantage[part], mask, args) / n_tokens
                    loss.backward()
                    sums["loss"] += loss.item()
                    sums["tokens"] += mask.sum().item()
                    sums["entropy"] += entropy.sum().item()
                    sums["kl"] += 0 if ref is None else kl_estimate(logp, ref)[mask].sum().item()
                except (RuntimeError, MemoryError) as error:
                    if args.micro_batch == 1 or not out_of_memory(error):
                        raise
                    args.micro_batch //= 2
                    tqdm.write(f"out of memory: from now on {args.micro_batch} prompts in a gradient pass")
                    context = cache = logp = entropy = ref = loss = None  # makes room
                    optimizer.zero_grad()
                    i, sums = 0, Counter()

            # 4. Step.
            add_gradients(parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip).item()
            finite = math.isfinite(grad_norm) and math.isfinite(total(sums["loss"]))
            if finite:  # one NaN in AdamW's moments would ruin the run
                optimizer.step()
            optimizer.zero_grad()

        # 5. Look at the reward, and at the attention by dataset.
        state["step"] = step
        skipped = 0 if finite else skipped + 1
        row = dict(step=step, grad_norm=grad_norm, train_seconds=time.perf_counter() - start)
        row |= summarize(sampled, data["train"].owner, experts, sums)
        if step % args.eval_every == 0 or step == args.steps:
            row["val"] = accuracy(evaluate(policy, router, data["val"], args)[0])
        log(args, row, sampled, skipped)
        keep(out, "step", step, args, policy, router, state, optimizer, generator)

    on_stop(signal.default_int_handler)  # there is nothing left to save
    show_report(args, test_report(policy, router, data["test"], args, experts))

# -- What is said and written down

def introduce(args, policy, router, experts, data, state):
    """What the run is about to do. config.json is written; rows newer than the checkpoint are dropped."""
    if state["step"] > args.steps:
        raise ValueError(f"--steps {args.steps} is below the {state['step']} that are done: give more")
    if RANK == 0:
        for path in Path(args.out).glob("*.jsonl"):
            drop_rows(path, state)
        (Path(args.out) / "eval.json").unlink(missing_ok=True)  # of fewer steps
        config = dict(args=asdict(args), ranks=WORLD, torch=torch.__version__)
        write_atomic(Path(args.out) / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    count = lambda module: sum(p.numel() for p in module.parameters()) if module else 0
    print(f"n-Musketeers: {args.collab}, control {args.control}, task {args.task}, seed {args.seed}")
    print(f"  problems   {len(data['train']):,} train, {len(data['val'])} val, {len(data['test'])} test")
    print(f"  policy     {Path(args.policy).name}, {args.dtype} on {args.device}, answers {args.form}")
    for expert in experts:
        print(f"  expert     {expert.name}: width {expert.width}, {expert.n_layers} layers, "
              f"{expert.params / 1e6:.2f} M, {expert.template}{'' if expert.writes else ', reads only'}")
    print(f"  trained    {count(policy):,} parameters of LoRA, {count(router):,} of the router")
    print("  stage 0    {} steps of words (router alone), {} of reading; {} are done".format(
        *align_steps(args), state["align"]))
    print(f"  GRPO       {args.steps} steps of {args.batch} prompts x {args.group} answers of at most "
          f"{args.max_new} tokens; {state['step']} are done")
    print(f"  a problem  {data['val'].prompts[0][-70:]!r}, answer {data['val'].problems[0].answer!r}")

def summarize(sampled, owner, experts, sums):
    """A row of metrics.jsonl, of all ranks. Lengths are in tokens; entropy leaves skipped groups out."""
    all_ranks = lambda values: torch.cat(gather(values.cpu())).float()
    rewards = all_ranks(sampled.rewards)  # (B, G)
    length = all_ranks(sampled.mask.sum(-1))
    datasets = [problem.dataset for problems in gather(sampled.problems) for problem in problems]
    verdicts = [verdict for groups in gather(sampled.verdicts) for group in groups for verdict in group]
    loss, kl, entropy, tokens = (total(sums[name]) for name in ("loss", "kl", "entropy", "tokens"))
    row = dict(reward=rewards.mean().item(), accuracy=accuracy(verdicts), length=length.mean().item(),
               truncated=all_ranks(sampled.truncated).mean().item(),
               frac_reward_zero_std=(rewards.amax(1) == rewards.amin(1)).float().mean().item(),
               loss=loss, kl=kl / tokens, entropy=entropy / tokens, rollout_seconds=sampled.seconds,
               tokens_per_second=length.sum().item() / sampled.seconds,
               reward_by_dataset=by_dataset(datasets, rewards.mean(1)),
               reasons=dict(Counter(verdict.reason for verdict in verdicts).most_common()))
    if sampled.attention is not None:
        attention = all_ranks(by_expert(sampled.attention, owner))  # (B, heads, L, experts)
        names = [expert.name for expert in experts]
        row["attention"] = dict(zip(names, attention.mean((0, 1, 2)).tolist()))
        row["attention_by_dataset"] = by_dataset(datasets, attention.mean((1, 2)), names)
        row["attention_entropy"] = torch.special.entr(attention).sum(-1).mean().item()
        row["attention_map"] = attention.mean(0).tolist()
    return row

def log(args, row, sampled, skipped):
    """A row to metrics.jsonl; now and then a line to read, and sampled answers to samples.jsonl. `skipped`:
    steps in a row whose gradient was not finite. Raises ValueError at the fifth."""
    append(Path(args.out) / "metrics.jsonl", row)
    if row["step"] % 10 == 1 or "val" in row:
        parts = [f"step {row['step']:4d}", f"reward {row['reward']:.3f}"]
        if "val" in row:
            answer, gold = sampled.texts[0][0].strip()[:30], sampled.problems[0].answer
            parts += [f"val {row['val']:.1%}", f"says {answer!r}, right is {gold!r}"]
        for dataset, shares in row.get("attention_by_dataset", {}).items():
            most = max(shares, key=shares.get)
            parts.append(f"{dataset}: {most} {shares[most]:.2f}")
        tqdm.write(textwrap.fill(" | ".join(parts), 100, subsequent_indent=" " * 10 + "| "))
        for problem, texts, verdicts in list(zip(sampled.problems, sampled.texts, sampled.verdicts))[:3]:
            for text, verdict in zip(texts, verdicts):
                append(Path(args.out) / "samples.jsonl", dict(
                    step=row["step"], question=problem.question, answer=problem.answer, completion=text,
                    reason=verdict.reason, reward=verdict.reward))
    if row["step"] == 3 and row["reward"] == 0:
        tqdm.write(f"no answer of step 3 is right (most: {next(iter(row['reasons']))}): try an easier "
                   "--level, --form plain or another --policy")
    if skipped:
        tqdm.write(f"step {row['step']}: loss or gradient is not finite, the step is skipped")
    if skipped >= 5:
        raise ValueError("5 steps in a row were skipped: start anew with a lower --lr and --router_lr")

# -- Stopping and going on

stop_signals = []  # Ctrl-C and SIGTERM, as they came

def on_stop(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

def ask_to_stop(number, frame):
    stop_signals.append(number)
    on_stop(signal.default_int_handler)  # the second time, at once

def keep(out, name, done, args, *saved):
    """Write a checkpoint every --save_every steps, after the last one and when asked to stop; the newest two
    stay. In the last case the program ends. saved: see `save_checkpoint`."""
    stop = total(len(stop_signals)) > 0  # what one rank was asked, all do
    if stop or done % args.save_every == 0 or (name, done) == ("step", args.steps):
        save_checkpoint(out / f"{name}-{done:06d}-", *saved)
        for old in checkpoints(out)[2:] if RANK == 0 else ():
            if not old.name.startswith("aligned-"):  # of use to eval.py --aligned
                old.unlink()
    if stop:
        tqdm.write(f"stopped and saved; go on with --resume {out}")
        raise SystemExit(0)

# -- The command line

TINY = str(Path(__file__).resolve().parent / "tiny")
PRESETS = {
    "paper": {},
    "small": dict(  # one consumer GPU, or a patient CPU: a policy of 135 million parameters
        task="chain_sum", level="easy", form="plain", policy="HuggingFaceTB/SmolLM2-135M-Instruct",
        experts=["Qwen/Qwen2.5-Coder-0.5B-Instruct", "EleutherAI/pythia-410m", "BAAI/bge-base-en-v1.5"],
        cue="The answer is:", own_text=True, positions=4, write=6, align=60, align_words=200, beta=0.0,
        lr=4e-4, router_lr=4e-5, batch=8, micro_batch=8, steps=40, max_new=16),
    "tiny": dict(  # made for the demonstration: one expert per family of problems, see tiny/README.md
        task="arithmetic+logic+algorithmic", level="tiny", form="plain", policy=f"{TINY}/policy", write=1,
        experts=[f"{TINY}/arithmetic", f"{TINY}/logic", f"{TINY}/algorithmic"], neutral="mean", align=30,
        align_batch=96, align_lr=3e-3, align_router_lr=3e-4, align_words=250, align_words_lr=3e-3, beta=0.0,
        lr=1e-3, router_lr=2e-3, trust_lr=0.3, batch=36, micro_batch=36, steps=80, max_new=8, router_dim=64,
        router_heads=4, router_temperature=0.5),
}

def parse_args(argv):
    """The settings of a run: what is given, else the preset's. Raises ValueError with the mend."""
    parser = HfArgumentParser(Args, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given is in the namespace
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        args = saved_run(given["resume"])
        changed = sorted(given.keys() - {"resume", "steps", "micro_batch", "device"})
        if changed:
            raise ValueError(f"--resume goes on with the same run; --{', --'.join(changed)} would change it")
        aligning = args.align and not list(Path(given["resume"]).glob("aligned-*"))
        drawn_at_once = aligning or args.control in ("shuffled", "noise")  # more problems give other draws
        if drawn_at_once and given.get("steps", args.steps) != args.steps:
            raise ValueError(f"--steps stays {args.steps}, as the run draws for all: start anew with more")
        args = replace(args, **(given | dict(out=given["resume"])))
    else:
        if "policy" in given and not given.get("preset"):  # small's settings, but none of its models
            given = dict(experts=[], cue="") | given | dict(preset="small")
        preset = given.get("preset") or pick_preset(given)
        args = Args(**(PRESETS[preset] | given | dict(preset=preset)))
        if args.collab in ("single", "text") and "align" not in given:
            args.align = 0
        args.out = args.out or f"runs/{args.task.replace('+', '-')}-{time.strftime('%m%d-%H%M%S')}"
        args.out = gather(args.out)[0]  # rank 0's: clocks differ
        if list(Path(args.out).glob("*.json")):
            raise ValueError(f"{args.out} holds a run: choose another --out, or --resume {args.out}")
    args.device = pick_device(args.device)
    args.micro_batch = min(args.micro_batch, args.batch)
    check(args)
    if not (reads_states(args.collab) or args.collab == "text" or args.align):
        args.experts = []  # nobody would read them
    return args

def saved_run(folder):
    """The settings of the run in `folder`, checked."""
    config = read_config(folder)
    if config["ranks"] != WORLD:
        raise ValueError(f"{folder} is a run of {config['ranks']} ranks: go on with as many, not {WORLD}")
    try:
        args = Args(**config["args"])
        check(args)
        if asdict(args) != config["args"]:
            raise ValueError("settings are missing")
    except (ValueError, TypeError) as error:
        raise damaged(folder, error) from error
    return args

def pick_preset(given):
    """The preset that task and device ask for. Raises ValueError where there is none."""
    tasks = [known(task.strip()) for task in given.get("task", PRESETS["tiny"]["task"]).split("+")]
    gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    if "task" in given and gpu and torch.cuda.get_device_properties(0).total_memory > 22e9:
        return "paper"
    if set(tasks) <= {"arithmetic", "logic", "algorithmic"}:
        return "tiny"
    raise ValueError(f"{given['task']} is too much for the embedded pool, made for arithmetic, logic and "
                     "algorithmic: add --preset small or paper, or --policy X --experts A B C")

def check(args):
    """Raises ValueError for settings that no run can have, given by a user or by a damaged config.json."""
    may_be_zero = ("align", "align_words", "align_lr", "align_router_lr", "lora_rank", "beta", "clip",
                   "clip_high", "trust_lr", "warmup", "seed", "test_skip")
    for name, default in asdict(Args()).items():
        value = getattr(args, name)
        fine = type(value) is type(default)
        if fine and type(value) is list:
            fine = {type(item) for item in value} <= {type(default[0])}
        if fine and type(value) in (int, float):
            fine = 0 <= value < math.inf and (value > 0 or name in may_be_zero)
        if not fine:
            raise ValueError(f"--{name} is {value!r}: see train.py --help for what it may be")
    reads = reads_states(args.collab)
    for wrong, message in (
            (args.collab not in (*ROUTERS, "text", "single"),
             f"--collab {args.collab} is unknown: choose {', '.join(ROUTERS)}, text or single"),
            (args.group < 2, "--group 1 has nothing to compare an answer with: give it at least 2"),
            (min(args.batch, args.align_batch if args.align else WORLD, args.val, args.test) < WORLD,
             f"{WORLD} ranks need a problem each: raise --batch, --align_batch, --val or --test"),
            (args.align and args.beta,
             "after stage 0 the KL to the frozen policy would punish reading: use --beta 0, or --align 0"),
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

def run(argv=None):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ranks():
        args = parse_args(argv)
        if args.plan:
            return runpy.run_path(str(Path(TINY).with_name("lab") / "plan.py"))["plan"](args)
        with contextlib.nullcontext() if RANK else one_process(Path(args.out)):
            main(args)

if __name__ == "__main__":
    sys.exit(one_sentence("train.py", run))
