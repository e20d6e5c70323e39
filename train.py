"""
n-Musketeers, end to end: a policy learns by reinforcement to use the hidden states of frozen experts.

$ python train.py                                    # three tiny experts in this repository; no network
$ python train.py --task gsm8k                       # experts that reason before they answer, on one GPU
$ python train.py --router none                      # the same policy without experts: the first control
$ torchrun --nproc_per_node=8 train.py --task gsm8k  # the second line on eight GPUs

Read `Args` and `main`: the whole method, in the order in which things happen. The functions of the method
that `main` calls are in rlvr.py. What comes after "What a run prints and records" can be skipped.

Sizes: B problems in a step, G answers to each, E experts, N states of all experts together, L context tokens,
D the width of the widest expert (the states of narrower ones are padded with zeros). H (B, N, D) are the
states; `visible` says which of the N the router may attend to. A `Dataset` holds the problems of a split,
with states and texts; the `dataset` of a problem is the name of its kind, such as chain_sum.
"""
import os
import signal

# Let idle OpenMP threads sleep. On a shared machine, threads that wait by spinning slow everybody down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import argparse
import contextlib
import ctypes
import dataclasses
import math
import re
import shlex
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

import rlvr
from eval import (EVAL_ROWS, accuracy, by_dataset, evaluate, right_of, show_report, test_report,
                  unbreakable, wrap)
from experts import (BATCH_TOKENS, REPOSITORY, SMALL, THOUGHT_BATCH_TOKENS, batch_tokens,
                     computes_in_bfloat16, generates_text, loading, local_folder, pick_device, to_fetch,
                     which_states, write_texts)
from model import bucket, pick_dtype
from rewards import (SPLITS, TINY_LEVEL, check_answer_format, expand_home, get_problems, known_task,
                     next_in_dataset, official_files_to_fetch, render_prompt)
from rlvr import (CONTROLS, DRAWN_FOR_ALL, RANK, READING_BATCH, WORDS_BATCH, WORLD, Dataset, advantages,
                  all_gather, all_reduce_sum, append, ask_experts, bad_config, build, candidates, check_data,
                  check_models, check_names, choice_loss, clip_gradients, draw_pair, drop_records, grpo_loss,
                  import_extension, informative, keep_names, kl_estimate, learn_to_read, learn_words,
                  load_newest, load_problems, make_optimizer, micro_batches, my_part, n_training_problems,
                  one_process, out_of_memory, pair_probabilities, parameters_of, prompt_format_of, ranks,
                  read_config, reading_gradients, rollout, run_cli, save_checkpoint, words_and_reading,
                  words_step, words_vocabulary, write_config)
from router import ROUTERS, NoRouter, by_expert, compares, has_context, reads_states, shows_texts


# -- The settings. The defaults are the run that `python train.py` makes; PRESETS below override them.

def option(default, help, choices=None, minimum=None, above=None, maximum=None):
    """A setting: its default, a sentence about it, and the values that it may have."""
    metadata = dict(help=help, choices=choices, minimum=minimum, above=above, maximum=maximum)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Args:
    # the run
    preset: str = option("",
        "Settings to begin with. Without it: tiny; or, with --task, what suits the task and this machine.",
        choices=["", "tiny", "small", "paper"])
    out: str = option("", "Folder of the run. Without it: runs/<task>-<time>.")
    resume: str = option("",
        "Folder of a run to continue. With it only --steps, --micro_batch, --device, --extension, "
        "--policy, --experts and --data may be given.")
    extension: str = option("",
        "A Python file of yours that is imported first. It may add a router or a control, or "
        "replace functions.")
    plan: bool = option(False, "Print the memory that this run would need, and end.")
    seed: int = option(0,
        "Seed of fresh weights, of the order of problems and of sampling.", minimum=0, maximum=2**31)
    device: str = option("auto", "cpu, cuda, cuda:1 or mps; auto takes the best there is.")
    dtype: str = option("auto",
        "Number format of the policy's frozen weights. auto: float32 below 50 million parameters, above "
        "that bfloat16 or what the device has instead.", choices=["auto", "float32", "bfloat16", "float16"])

    # the task
    task: str = option("arithmetic+logic+algorithmic",
        "What to learn: gsm8k, arithmetic, logic, algorithmic, a Reasoning Gym dataset, or several joined"
        " by +.")
    level: str = option("tiny",
        "Difficulty of generated problems: tiny, easy, default, hard, or parameters such as "
        "min_terms=2,max_terms=3. Easy is the first step of a dataset's own curriculum; for a few, such as "
        "number_sorting, it is harder than default.")
    data: str = option("",
        "Problems of your own for --task gsm8k: a .jsonl file, or a folder with train.jsonl and "
        "test.jsonl. Without it GSM8K is downloaded once.")
    answer_format: str = option("plain",
        "tagged: the answer stands between <answer> and </answer> in a chat. plain: it is the first line."
        " auto: tagged for a policy with a chat template.", choices=["auto", "tagged", "plain"])
    val: int = option(120, "Number of validation problems.", minimum=1)
    test: int = option(256, "Number of test problems.", minimum=1)
    test_skip: int = option(0, "Number of test problems to skip at the start.", minimum=0)
    eval_every: int = option(5, "Steps of GRPO between two validations.", minimum=1)

    # the models
    policy: str = option("tiny/policy",
        "The policy: a folder or a name on the Hugging Face hub; Llama, SmolLM2, Qwen2, Qwen2.5 or Qwen3.")
    experts: list[str] = option(["tiny/arithmetic", "tiny/logic", "tiny/algorithmic"],
        "The frozen experts: folders or names on the hub, of any architecture.")
    router: str = option("attention",
        "What stands between experts and policy. attention: the method. mixed: the same without comparing "
        "experts, as in the paper. hard, linear, constant, text, none: control experiments, see router.py.")
    control: str = option("none",
        "Replace the experts' states by those of other problems (shuffled), by noise (noise), or by those"
        " of models with random weights (untrained).")

    # what is read of an expert
    states: str = option("last",
        "Which hidden states are read. last, first, mean: of the prompt's tokens; last:4: of its last 4 "
        "tokens; answer:6: those from which the expert chose the first 6 tokens of its own answer.")
    layers: list[int] = option([-1],
        "Which layers' states are read; 0 is the embedding, -1 the last layer.")
    think: int = option(0,
        "Maximum number of tokens in which an expert may reason before --cue and its answer; 0: it does not.",
        minimum=0, maximum=16384)
    cue: str = option("", "Text that stands before every expert's answer, such as 'The answer is:'.")
    write: int = option(1,
        "Maximum number of tokens of an expert's answer, for stage 0, --states answer:6 and --router text.",
        minimum=1, maximum=4096)

    # router and LoRA
    latents: int = option(8, "Number of context tokens.", minimum=1, maximum=512)
    router_dim: int = option(64, "Width of the router's attention, a multiple of 16.", minimum=16,
        maximum=16384)
    prefix_origin: str = option("mean",
        "The vector to which context tokens are added: zero (paper), or the mean embedding, which suits "
        "the tiny policy.", choices=["zero", "mean"])
    lora_rank: int = option(8, "Rank of LoRA on the policy; 0 leaves the policy frozen.", minimum=0,
        maximum=1024)

    # stage 0
    stage0_problems: int = option(2000,
        "The experts read at least this many training problems for stage 0.", minimum=4)
    words_steps: int = option(250,
        "Steps of stage 0 in which the router learns words. Ignored if --reading_steps is 0.", minimum=0)
    words_lr: float = option(4e-3, "Learning rate of the router while it learns words.", above=0)
    reading_steps: int = option(50,
        "Steps of stage 0 in which the policy learns to read; 0: no stage 0 at all.", minimum=0)
    reading_lr: float = option(3e-3,
        "Learning rate of LoRA while the policy learns to read; the router has a tenth of it.", above=0)

    # GRPO
    steps: int = option(10, "Steps of GRPO.", minimum=1)
    batch: int = option(36, "Problems in a step.", minimum=1)
    group: int = option(8, "Answers to each problem.", minimum=2, maximum=4096)
    max_new: int = option(8, "Maximum number of tokens of the policy's answer.", minimum=1)
    temperature: float = option(1.0, "Temperature of sampling, and of the loss.", above=0)
    beta: float = option(0.0,
        "Weight of the KL to the frozen policy. It must be 0 in a run with stage 0, which it would undo.",
        minimum=0)
    lr: float = option(1e-4, "Learning rate of LoRA.", above=0)
    router_lr: float = option(1e-4, "Learning rate of the router.", above=0)
    trust_lr: float = option(0.2,
        "Learning rate of trust, which says how much each expert is believed; 0: no trust. Ignored by "
        "--router attention if fewer than two experts can be compared.", minimum=0)
    micro_batch: int = option(72,
        "Prompts in one gradient pass; with comparing, each problem is two prompts. It bounds memory and "
        "changes nothing that is learned. It is halved until a pass fits into memory.", minimum=1)


PRESETS = {
    "tiny": {},
    "small": dict(  # real models for one consumer GPU, or for a patient CPU
        task="chain_sum", level="easy", policy="HuggingFaceTB/SmolLM2-135M-Instruct",
        experts=["Qwen/Qwen2.5-Coder-0.5B-Instruct", "EleutherAI/pythia-410m", "BAAI/bge-base-en-v1.5"],
        states="answer:6", cue="The answer is:", write=6, router_dim=512, prefix_origin="zero",
        words_steps=400, words_lr=1e-3, reading_steps=60, reading_lr=4e-4,
        steps=20, batch=8, micro_batch=16, max_new=16, lr=1e-5, router_lr=1e-6, trust_lr=0.3),
    "paper": dict(  # the paper's method and numbers, where it gives them; it does not name its experts
        task="gsm8k", level="default", answer_format="auto", policy="Qwen/Qwen2.5-3B-Instruct",
        experts=["Qwen/Qwen2.5-Math-1.5B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct",
                 "allenai/OLMo-2-0425-1B-Instruct", "microsoft/phi-1_5"],
        router="mixed", write=16, router_dim=512, prefix_origin="zero",
        words_steps=400, words_lr=1e-3, reading_lr=4e-4,
        reading_steps=0,  # no stage 0; --reading_steps 60 switches it on
        steps=233, batch=32, micro_batch=4, max_new=128, lr=1e-4, router_lr=1e-4, trust_lr=0.0,
        beta=0.04, eval_every=25),
}

# What preset small changes for --task gsm8k: the expert reasons before it answers, and the policy, which
# reads the states of this answer, answers at once. To reason takes most of the time, so one expert does it.
THINKING = dict(experts=["Qwen/Qwen2.5-Coder-0.5B-Instruct", "BAAI/bge-base-en-v1.5"],
                think=320, cue="Final answer, only a number:", write=8, max_new=8,
                stage0_problems=1024, steps=40, micro_batch=4)


def preset_settings(preset, task):
    """The settings of a preset for a task; None: the preset's own."""
    settings = dict(PRESETS[preset])
    if task_of(preset, task) == "gsm8k":
        settings["level"] = "default"  # its problems are given, not generated
        if preset == "small":
            settings |= THINKING
    return settings


def task_of(preset, task):
    """The task, without spaces around it; None: the preset's own."""
    return (task or PRESETS[preset].get("task", Args().task)).strip()


def main(args):
    """One run, from models to test. Returns the report of the test."""
    # Make the problems first: a mistake in --task, --level or --data is found before any model is loaded.
    out = Path(args.out)
    announce_downloads(args)
    problems = {split: load_problems(args, split) for split in SPLITS}
    check_problems(args, problems)

    # What never changes is made once: the prompts' tokens, and the states and texts of every expert.
    # `build` also fills in what args leaves open, such as --answer_format auto: check the problems again.
    policy, experts, router = build(args)
    if args.resume:
        keep_names(out, experts)  # their folders may have other names now
    check_problems(args, problems)
    ask_experts([problem for split in SPLITS for problem in problems[split]], policy, experts, args)
    datasets = {split: Dataset(problems[split], policy, experts, args) for split in SPLITS}
    train_set = datasets["train"]
    device = policy.embed.device

    # Measure mean and size of the experts' states, so that the router sees numbers of one scale.
    if reads_states(args.router):
        router.fit_standardization(train_set.H[:256].to(device))

    # Continue from the newest checkpoint, if there is one. `moments` are AdamW's running means.
    generator = torch.Generator(device).manual_seed(args.seed + 1_000_003 * RANK)
    progress, moments = load_newest(out, policy, router, generator)
    introduce(args, policy, router, experts, datasets, progress)

    # Before anything is trained: time a gradient pass, halve args.micro_batch if memory is short, and check
    # whether the experts know more than the policy.
    if progress["step"] == 0:
        rehearse(policy, router, experts, datasets, args, progress["stage0"])

    # Stage 0, without any reward: the router learns to write words, the policy learns to read them.
    # `learn_words` and `learn_to_read` are generators: each turn of a loop makes one training step, backward
    # and update included.
    if args.reading_steps and not progress["stage0"]:
        words_steps, reading_steps = words_and_reading(args)

        # Words: the first context token becomes the embedding of the prompt's last token, the next ones those
        # of the expert's text. The loss is mostly a cross-entropy, whose logits are the inner products of a
        # context token with the embeddings of the vocabulary. It trains the router alone.
        if words_steps:
            losses = learn_words(policy, router, train_set, args)
            for step, loss in numbered(losses, words_steps, "words"):
                log_stage0(out, "words", step, loss)

        # Reading: minus the log-probability of the text, given context and prompt. It trains LoRA, and, at a
        # lower rate, the router.
        losses = learn_to_read(policy, router, train_set, args)
        for step, loss in numbered(losses, reading_steps, "reading"):
            log_stage0(out, "reading", step, loss)
        read_back(out, policy, router, datasets["val"], args, experts)
        progress["stage0"] = True
        save_checkpoint(out / "stage0-", policy, router, progress, None, generator)

    # GRPO. From here on a run can be stopped at any step and continued.
    stop_at_next_step()
    candidate_experts = candidates(train_set, args)  # the experts that are compared; [] for none
    trust_lr = args.trust_lr
    if compares(args.router) and not candidate_experts:
        trust_lr = 0.0  # nobody to compare: the noise of the rewards alone would move trust, up and down
    optimizer = make_optimizer(policy, router, args.lr, args.router_lr, trust_lr, moments)
    parameters = parameters_of(optimizer)
    skipped_in_a_row = 0
    for step in bar(range(progress["step"] + 1, args.steps + 1), "GRPO", progress["step"], args.steps):
        # 1. Take the next problems (there are enough for all steps), and see which experts get the attention.
        batch = train_set.batch(my_part(range((step - 1) * args.batch, step * args.batch)))
        with torch.no_grad():
            _, attention = router(batch.H, batch.visible)  # (B, heads, L, N)

        # 2. To compare experts, show each problem twice: with one expert visible, and with another one.
        shown, pair = batch, None
        if candidate_experts:
            shares = by_expert(attention, train_set.expert_of_state).mean((1, 2))  # (B, E)
            pair = draw_pair(shares, candidate_experts, random_numbers(args, step, device))  # (B, 2)
            shown = batch.with_experts(pair)  # 2 B problems: rows 2 i and 2 i + 1 are problem i

        # 3. Sample: the policy reads context and prompt, and writes a group of answers. The verifier gives 1
        #    for a right answer and 0 for any other. If each problem is shown twice, each half has G / 2.
        group = args.group // 2 if candidate_experts else args.group
        sampled = rollout(policy, router, shown, args, group, args.temperature, generator)

        training_started = time.perf_counter()

        # 4. How much better was each answer than the mean of its half, in standard deviations?
        advantage = advantages(sampled.rewards)  # (2 B, G / 2), or (B, G)

        # 5. Score the same tokens again, now with gradient: to LoRA and, through the context, to the router.
        #    The loss is a sum over tokens. Divide it by all sampled tokens of the step: then the size of
        #    micro-batches and the number of ranks (processes, one for each GPU) change nothing.
        #
        #    When experts are compared, this loss hardly teaches whom to believe: among experts that write,
        #    the visible one has all of the attention, whatever the router learns. (Encoders stay visible, see
        #    rlvr.Dataset.) Step 6 teaches whom to believe.
        n_tokens = all_reduce_sum(sampled.mask.sum().item())
        sums = Counter()
        rows_that_teach = informative(advantage, args.beta)  # where an advantage is not 0; all if beta > 0
        for part in micro_batches(shown.lengths[rows_that_teach], args.micro_batch):
            rows = rows_that_teach[part]
            micro, tokens, mask = shown[rows], sampled.tokens[rows], sampled.mask[rows]
            context, _ = router(micro.H, micro.visible)
            logp, entropy = policy.score(micro, context, tokens, mask, args.temperature)
            reference_logp = None
            if args.beta:  # the reference is the frozen policy: without LoRA and without context
                with torch.no_grad(), policy.lora("off"):
                    reference_logp, _ = policy.score(micro, None, tokens, mask, args.temperature)

            # There is one update for each rollout, so PPO's ratio of the trained policy to the one that
            # sampled is 1 (up to rounding), and nothing is clipped.
            loss = grpo_loss(logp, reference_logp, advantage[rows], mask, args.beta) / n_tokens
            loss.backward()
            add_up(sums, loss, logp, reference_logp, entropy, mask)

        # 6. Which of the two experts was better? Give it more of the attention.
        if candidate_experts:
            # Compute the attention of step 1 once more, with gradient. p is how it divides between the two.
            _, attention_with_gradient = router(batch.H, batch.visible)
            p = pair_probabilities(attention_with_gradient, train_set.expert_of_state, pair)  # (B, 2)

            # R is the mean reward of the half that saw expert pair[:, k].
            half_rewards = sampled.rewards.mean(1).view(-1, 2)  # (B, 2)

            # The loss of a problem is - (R_better - R_other) * log p_better. Its gradient goes to trust, and
            # to queries and keys, but their learning rate is far lower.
            comparing_loss = choice_loss(p, half_rewards) / all_reduce_sum(len(batch))
            comparing_loss.backward()

        # 7. Add the gradients of all ranks, limit their norm, and step. If a gradient is not finite, skip the
        #    step: AdamW would keep NaN in its running means forever.
        grad_norm = clip_gradients(parameters)
        is_finite = math.isfinite(grad_norm) and math.isfinite(all_reduce_sum(sums["loss"]))
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()

        # 8. Record the reward, and the attention by dataset. Now and then validate.
        progress["step"] = step
        skipped_in_a_row = 0 if is_finite else skipped_in_a_row + 1
        record = dict(step=step, grad_norm=grad_norm, train_seconds=time.perf_counter() - training_started)
        record |= summarize(sampled, batch, attention, pair, train_set.expert_of_state, experts, sums)
        if step % args.eval_every == 0 or step == args.steps:
            record["val"] = accuracy(evaluate(policy, router, datasets["val"], args)[0])
        log(args, record, sampled, experts_seen(pair, experts), skipped_in_a_row)

        # 9. Save every tenth step and the last one. After Ctrl-C save, and end here.
        save_and_maybe_stop(out, step, args, policy, router, progress, optimizer, generator)

    # Test on problems that were used neither for training nor for validation.
    stop_at_once()
    report = test_report(policy, router, datasets["test"], args, experts)
    show_report(report, out / "eval.json")
    suggest_next(args)
    return report


def random_numbers(args, step, device):
    """u (B, 2) for this rank's problems of a step. They depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return my_part(torch.rand(args.batch, 2, generator=generator)).to(device)


def add_up(sums, loss, logp, reference_logp, entropy, mask):
    """Add the loss of a micro-batch, and the entropy and KL of its tokens, to the sums of the step."""
    values = dict(loss=loss.item(), tokens=mask.sum().item(), entropy=entropy.sum().item())
    if reference_logp is not None:
        values["kl"] = kl_estimate(logp, reference_logp)[mask].sum().item()
    for name, value in values.items():
        sums[name] += value


# -- What a run prints and records

def summarize(sampled, batch, attention, pair, expert_of_state, experts, sums):
    """The record of a step for metrics.jsonl, over all ranks.

    reward             where two experts are compared, the mean reward of the halves, each weighted by the
                       attention to its expert, see `weighted_mean`: about what the policy would earn if it
                       saw one expert, drawn by the attention. Else the mean reward
    sampled_reward     the plain mean reward of all sampled answers, also of those that saw a wrong expert
    reward_by_expert   {dataset: {expert: mean reward of the halves that saw it}}: who is right where
    attention          to each expert, with all of them visible; also by dataset, and by head and latent
    attention_entropy  in nats, mean over problems, heads and latents: log(E) for an even attention, 0 when
                       one expert has all of it. It falls when the router has found out whom to believe
    frac_reward_zero_std  the fraction of groups (of halves, with comparing) whose answers were all right or
                       all wrong: they teach nothing about how to answer
    entropy, kl        in nats for each token, over the groups that give a gradient
    length             tokens of an answer
    """
    # One row for each group: a problem, or a problem with one of its two experts.
    rewards = gather_rows(sampled.rewards)  # (rows, G)
    lengths = gather_rows(sampled.mask.sum(-1))
    truncated = gather_rows(sampled.truncated)
    means = rewards.mean(1)
    row_datasets = [problem.dataset for part in all_gather(sampled.problems) for problem in part]
    verdicts = [verdict for part in all_gather(sampled.verdicts) for row in part for verdict in row]

    # The weight of a half is the share of the attention that goes to its expert.
    weights = torch.ones(len(sampled.rewards))
    if pair is not None:
        weights = by_expert(attention, expert_of_state).mean((1, 2)).gather(1, pair).flatten()
    weights = gather_rows(weights)
    reward_by_dataset = {}
    for dataset in sorted(set(row_datasets)):
        of_dataset = torch.tensor([name == dataset for name in row_datasets])
        reward_by_dataset[dataset] = weighted_mean(means[of_dataset], weights[of_dataset])

    totals = {name: all_reduce_sum(sums[name]) for name in ("loss", "kl", "entropy", "tokens")}
    record = dict(
        reward=weighted_mean(means, weights),
        sampled_reward=means.mean().item(),
        length=lengths.mean().item(),
        truncated=truncated.mean().item(),
        frac_reward_zero_std=(rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        loss=totals["loss"],
        kl=totals["kl"] / totals["tokens"],
        entropy=totals["entropy"] / totals["tokens"],
        rollout_seconds=sampled.seconds,
        tokens_per_second=lengths.sum().item() / sampled.seconds,
        reward_by_dataset=reward_by_dataset,
        reasons=dict(Counter(verdict.reason for verdict in verdicts).most_common()))

    names = [expert.name for expert in experts]
    if pair is not None:
        seen = [name for part in all_gather(experts_seen(pair, experts)) for name in part]
        record["reward_by_expert"] = reward_by_expert(row_datasets, seen, means.tolist())
    if attention is not None:
        shares = gather_rows(by_expert(attention, expert_of_state))  # (B, heads, L, E)
        dataset_names = [problem.dataset for part in all_gather(batch.problems) for problem in part]
        record["attention"] = dict(zip(names, shares.mean((0, 1, 2)).tolist()))
        record["attention_by_dataset"] = by_dataset(dataset_names, shares.mean((1, 2)), names)
        record["attention_entropy"] = torch.special.entr(shares).sum(-1).mean().item()
        record["attention_map"] = shares.mean(0).tolist()
    return record


def experts_seen(pair, experts):
    """The name of the expert that each half saw, a list of 2 B names; [] where no experts are compared."""
    if pair is None:
        return []
    return [experts[e].name for e in pair.flatten().tolist()]


def weighted_mean(rewards, weights):
    """Mean rewards (rows,) of halves, and the attention to the expert that each of them saw -> one reward.

    Two problems attend to three experts with 0.9, 0.1 and 0. The first was shown with experts 0 and 1, which
    earned 1 and 0; the second with experts 1 and 2, which both earned 0. The result is
    (0.9 * 1 + 0.1 * 0 + 0.1 * 0 + 0 * 0) / (0.9 + 0.1 + 0.1 + 0) = 0.82. The second problem counts little, as
    the policy itself would hardly see these two experts.
    """
    return ((rewards * weights).sum() / weights.sum().clamp(min=1e-9)).item()


def gather_rows(values):
    """A tensor of this rank's rows -> the rows of all ranks, as floats on the CPU."""
    return torch.cat(all_gather(values.cpu())).float()


def reward_by_expert(dataset_names, experts, rewards):
    """Three lists, one item for each half -> {dataset: {expert: mean reward of its halves}}."""
    found = defaultdict(lambda: defaultdict(list))
    for dataset, expert, reward in zip(dataset_names, experts, rewards):
        found[dataset][expert].append(reward)
    means = {}
    for dataset in sorted(found):
        halves = sorted(found[dataset].items())
        means[dataset] = {expert: sum(values) / len(values) for expert, values in halves}
    return means


def log(args, record, sampled, seen, skipped_in_a_row):
    """Add the record to metrics.jsonl; now and then print a line, and add answers to samples.jsonl.

    seen: the expert that each group of answers saw, where experts are compared.
    Raises ValueError when five steps in a row were skipped, as their gradient was not finite.
    """
    out = Path(args.out)
    append(out / "metrics.jsonl", record)

    # Print steps 1, 11, 21, ..., and those with a validation.
    step = record["step"]
    if step % 10 == 1 or "val" in record:
        parts = [f"step {step:4d}", f"reward {record['reward']:.3f}"]
        if "val" in record:
            parts.append(f"val {record['val']:.1%}")
        for dataset, shares in record.get("attention_by_dataset", {}).items():
            most = max(shares, key=shares.get)
            parts.append(f"{dataset}: {most} {shares[most]:.2f}")
        tqdm.write(wrap(" | ".join(unbreakable(part) for part in parts), 10))

        # Keep the sampled answers of the first four groups of the step.
        for row, problem in enumerate(sampled.problems[:4]):
            common = dict(step=step, question=problem.question, answer=problem.answer)
            if seen:
                common["expert"] = seen[row]
            for text, verdict in zip(sampled.texts[row], sampled.verdicts[row]):
                answer = dict(completion=text, reason=verdict.reason, reward=verdict.reward)
                append(out / "samples.jsonl", common | answer)

    if step == 3 and record["sampled_reward"] == 0:
        reason = next(iter(record["reasons"]))
        advice = ["an easier --level", "another --policy"]
        if args.answer_format == "tagged":
            advice.insert(1, "--answer_format plain")
        tqdm.write(f"no answer of step 3 is right (most often: {reason}): try {' or '.join(advice)}")
    if skipped_in_a_row:
        tqdm.write(f"step {step}: loss or gradient is not finite, the step is skipped")
    if skipped_in_a_row >= 5:
        raise ValueError("5 steps in a row were skipped: start again with a lower --lr and --router_lr")


def announce_downloads(args):
    """Print what will be fetched from the network, with sizes, before anything is."""
    files = to_fetch([args.policy, *args.experts])
    if "gsm8k" in args.task and not args.data:
        files += official_files_to_fetch()
    if files:
        total = sum(size for _, size in files)
        print(f"to be fetched once, {total / 1e9:.3f} GB in all:")
        for name, size in files:
            print(f"  {name:45} {size / 1e9:8.3f} GB", flush=True)
    if args.experts:
        n_train = n_training_problems(args)
        thought = f"; those that write first think, at most {args.think} tokens" if args.think else ""
        print(f"to be read by each of {len(args.experts)} experts, once for all runs: {n_train:,} + "
              f"{args.val:,} + {args.test:,} problems{thought}", flush=True)


def check_problems(args, problems):
    """Raises ValueError if the verifier would not accept the gold answers in --answer_format."""
    if args.answer_format != "auto":
        for split in SPLITS:
            check_answer_format(problems[split], args.answer_format, rlvr.verify)


def introduce(args, policy, router, experts, datasets, progress):
    """Print what the run is about to do; write config.json; drop records newer than the checkpoint.

    Raises ValueError if more steps are done than --steps asks for.
    """
    out = Path(args.out)
    if progress["step"] > args.steps:
        raise ValueError(f"--steps {args.steps} is below the {progress['step']} that are done: give more")
    if RANK == 0:
        for name in ("stage0.jsonl", "metrics.jsonl", "samples.jsonl"):
            if (out / name).exists():
                drop_records(out / name, progress)
        (out / "eval.json").unlink(missing_ok=True)  # of fewer steps
        write_config(out, args, experts)

    train, val, test = (datasets[split] for split in SPLITS)
    distinct = len({problem.question for problem in train.problems})
    repeated = f" ({distinct:,} different)" if distinct < len(train) else ""
    print(f"n-Musketeers: router {args.router}, control {args.control}, task {args.task}, seed {args.seed}")
    print(f"  problems   {len(train):,} train{repeated}, {len(val)} val, {len(test)} test")
    for asked, dataset, name in ((args.val, val, "validation"), (args.test, test, "test")):
        if len(dataset) < asked:
            print(f"  note       there are only {len(dataset)} {name} problems, not {asked}")
    if len(test) < 200:
        print(f"  warning    {len(test)} test problems are few: the interval of the result will be wide")
    if args.answer_format == "plain":
        for dataset, (n_too_long, n) in too_long(val.problems + test.problems, policy, args.max_new).items():
            print(f"  warning    {n_too_long} of {n} right answers of {dataset} have no room in --max_new "
                  f"{args.max_new} tokens: no answer to these problems can be right")
    print(f"  policy     {Path(args.policy).name}, {args.dtype} on {args.device}, answers "
          f"{args.answer_format}")
    for expert in experts:
        only_reads = "" if expert.writes else ", does not write"
        print(f"  expert     {expert.name}: width {expert.width}, {expert.n_layers} layers, "
              f"{expert.params / 1e6:.2f} M parameters, {expert.prompt_format} prompt{only_reads}")
    print(f"  trained    {count(policy):,} parameters of LoRA, {count(router):,} of the router")
    words, reading = words_and_reading(args)
    if reading:
        done = ", done" if progress["stage0"] else ""
        print(f"  stage 0    {words} steps of words, {reading} steps of reading{done}")
    compared = " (two experts are compared)" if candidates(train, args) else ""
    done = f", {progress['step']} are done" if progress["step"] else ""
    print(f"  GRPO       {args.steps} steps of {args.batch} problems x {args.group} answers{compared}, each "
          f"of at most {args.max_new} tokens{done}")
    print(f"  a problem  {val.prompts[0][-70:]!r}, answer {val.problems[0].answer!r}", flush=True)


def too_long(problems, policy, max_new):
    """{dataset: (number of right answers that have more than max_new tokens, number of problems)}

    The end of the line counts, as a plain answer ends with it. Datasets whose answers all fit are left out.
    """
    n_problems, n_too_long = Counter(), Counter()
    for problem in problems:
        # An answer may begin with a space, or without it: take what is shorter.
        answer = problem.answer.strip() + "\n"
        tokens = policy.tokenizer([answer, " " + answer], add_special_tokens=False)["input_ids"]
        n_problems[problem.dataset] += 1
        n_too_long[problem.dataset] += min(map(len, tokens)) > max_new
    return {dataset: (n, n_problems[dataset]) for dataset, n in n_too_long.items() if n}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def log_stage0(out, part, step, loss):
    """Record and print the loss of every 25th step. The losses of words and of reading are different ones."""
    if step % 25 == 1:
        append(out / "stage0.jsonl", dict(part=part, part_step=step, loss=loss))
        what = "minus log-probability of a token"
        if part == "words":
            what = "loss of a context token"
        tqdm.write(f"stage 0, {part:7} step {step:4d} | {what} {loss:.3f}")


@torch.no_grad()
def read_back(out, policy, router, dataset, args, experts, n=64):
    """Judge stage 0 on new problems: how often does the policy, shown one expert, say what this expert says?

    The same is counted with the states of another problem of the same dataset: so much can be guessed from
    the question alone.
    """
    partner = next_in_dataset(dataset.problems)
    of_other_problems = dataset.H[partner]
    for e in dataset.writers:
        indices = [i for i, text in enumerate(dataset.texts[e][:n]) if text]
        if not indices:
            continue
        visible = dataset.visible_alone[e]

        def fraction_said(H, indices):
            expected = [policy.tokenizer.decode(dataset.targets[e][i][:-1]).strip() for i in indices]
            _, texts, _ = evaluate(policy, router, dataset, args, indices, H, visible)
            same = [text.strip() == wanted for text, wanted in zip(texts, expected)]
            return sum(same) / len(same)

        record = dict(expert=experts[e].name, n=len(indices), read_back=fraction_said(dataset.H, indices))
        line = (f"stage 0: the policy says what {experts[e].name} would say in {record['read_back']:.0%} "
                f"of {len(indices)} new problems")

        # A problem that is alone in its dataset has no other one whose states it could be given.
        with_partner = [i for i in indices if partner[i] != i]
        if with_partner:
            record["shuffled"] = fraction_said(of_other_problems, with_partner)
            line += f"; with the states of another problem in {record['shuffled']:.0%}"
        append(out / "stage0.jsonl", record)
        tqdm.write(line)


def rehearse(policy, router, experts, datasets, args, stage0_is_done):
    """Before the first step: find a micro-batch that fits into memory, say how long the run will take, and
    check that there is something to learn from the experts."""
    seconds = gradient_pass_seconds(policy, router, datasets["train"], args)
    if RANK == 0:
        write_config(Path(args.out), args, experts)  # --resume begins with this micro-batch
    val = datasets["val"]
    few = range(min(64, len(val)))

    start = time.perf_counter()
    with policy.lora("off"):
        verdicts, _, _ = evaluate(policy, NoRouter([], [], 0), val, args, few)
    answer_seconds = (time.perf_counter() - start) / len(few)
    forecast(policy, router, datasets, args, len(experts), seconds, answer_seconds, stage0_is_done)
    compare_with_experts(experts, val, args, few, verdicts)


def gradient_pass_seconds(policy, router, dataset, args):
    """Seconds of a full-size gradient pass. args.micro_batch is halved until such a pass fits into memory."""
    longest = sorted(range(len(dataset)), key=lambda i: len(dataset.ids[i]))[-args.micro_batch:]
    compared = candidates(dataset, args)
    group = args.group // 2 if compared else args.group
    while True:
        batch = dataset.batch(longest[-args.micro_batch:])
        tokens = torch.zeros(len(batch), group, args.max_new, dtype=torch.long, device=dataset.device)
        all_tokens = torch.ones_like(tokens, dtype=torch.bool)

        def one_pass():
            context, _ = router(batch.H, batch.visible)
            logp, _ = policy.score(batch, context, tokens, all_tokens, args.temperature)
            if logp.requires_grad:
                logp.sum().backward()

        try:
            seconds = timed(one_pass, args.steps)
            break
        except (RuntimeError, MemoryError) as error:
            if args.micro_batch == 1 or not out_of_memory(error):
                raise
            args.micro_batch //= 2
            print(f"  memory     too little for this micro-batch, the next try is {args.micro_batch}")
        finally:
            clear_gradients(policy, router)
    return seconds * (1.5 if args.beta else 1)


def timed(function, n_calls, on_all_ranks=False):
    """Seconds of a call, of which the run will make n_calls or more.

    The first call prepares much that is used again. So a second one is timed, unless all calls together are
    so short that nobody cares (half a minute), or a second one would take so long that it is a waste.
    """
    seconds = seconds_of(function)

    # A function that waits for the other ranks must be called equally often by all of them.
    if on_all_ranks:
        seconds = max(all_gather(seconds))
    if seconds * n_calls > 30 and seconds < 20:
        seconds = seconds_of(function)
    return seconds


def seconds_of(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forecast(policy, router, datasets, args, n_experts, pass_seconds, answer_seconds, stage0_is_done=False):
    """Print how long the run will take, from one rollout, one gradient pass and a few answers."""
    train = datasets["train"]
    part = my_part(range(args.batch))
    compared = candidates(train, args)
    shown = train.batch([i for i in part for _ in range(2 if compared else 1)])
    group = args.group * len(part) // len(shown)
    rollout_seconds = timed(lambda: rollout(policy, router, shown, args, group, args.temperature),
                            args.steps)

    # The gradient pass that was timed had the longest prompts of all. How many such passes is a step, whose
    # passes have shorter prompts, padding included?
    longest = max(len(ids) for ids in train.ids)
    passes = 0
    for rows in micro_batches(shown.lengths, args.micro_batch):
        width = shown.lengths[rows].max().item()
        passes += len(rows) * (width + group * args.max_new)
    passes /= min(args.micro_batch, len(train)) * (longest + group * args.max_new)
    step_seconds = rollout_seconds + pass_seconds * passes

    words, reading = (0, 0) if stage0_is_done else words_and_reading(args)
    words_seconds = reading_seconds = 0
    if words:
        vocabulary = words_vocabulary(train)
        words_seconds = words * timed(
            lambda: words_step(policy, router, train, vocabulary, args, 0)[0].backward(), words,
            on_all_ranks=True)
    if reading:
        reading_seconds = reading * timed(
            lambda: reading_gradients(policy, router, train, args, 0), reading, on_all_ranks=True)
    clear_gradients(policy, router)

    grpo_seconds = args.steps * step_seconds
    n_answers = len(datasets["val"]) * math.ceil(args.steps / args.eval_every)
    n_answers += len(datasets["test"]) * (2 + n_experts)
    if reading:
        n_answers += 2 * min(64, len(datasets["val"])) * len(train.writers)  # read_back
    test_seconds = n_answers * answer_seconds
    total = words_seconds + reading_seconds + grpo_seconds + test_seconds
    minutes = dict(words=words_seconds, reading=reading_seconds, GRPO=grpo_seconds, tests=test_seconds)
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in minutes.items())
    print(f"  time       about {total / 60:.1f} minutes: {parts}", flush=True)


def clear_gradients(policy, router):
    for parameter in (*policy.parameters(), *router.parameters()):
        parameter.grad = None


def compare_with_experts(experts, dataset, args, indices, verdicts_alone):
    """Print what the policy alone, and what each expert says, gets right in a few problems.

    Warns unless, on some dataset, an expert is right more often than the policy by 15 points: without that
    there is little to learn from the experts. verdicts_alone: of the policy alone on the problems at
    `indices`.
    """
    problems = [dataset.problems[i] for i in indices]
    dataset_names = [problem.dataset for problem in problems]
    alone = by_dataset(dataset_names, right_of(verdicts_alone))
    if shows_texts(args.router):
        print(f"  untrained  the policy, which reads the experts' words, is right in {percents(alone)}")
    else:
        print(f"  alone      the policy is right in {percents(alone)}")
    if not experts:
        return

    # Let the experts answer. With stage 0 they have done so already.
    texts = dataset.texts
    if not texts:
        texts = write_texts(experts, [[expert.prompt(problem) for problem in problems] for expert in experts])
    gains = []
    for expert, column in zip(experts, texts):
        if not expert.writes:
            continue
        verdicts = [rlvr.verify(text, problem, "plain", False) for text, problem in zip(column, problems)]
        own = by_dataset(dataset_names, right_of(verdicts))
        gains += [own[name] - alone[name] for name in own]
        print(f"  expert     {expert.name} alone is right in {percents(own)}")
    if gains and max(gains) < 0.15:
        print("  warning    what the experts say is nowhere 15 points better than the policy: there is "
              "little to learn from them")

    # States that are the same for all problems hold nothing to read.
    if not dataset.H.numel():  # the router reads none
        return
    for e, expert in enumerate(experts):
        H = dataset.H[:64, dataset.expert_of_state == e].float()  # (n, K, D)
        if len(H) > 1 and (H - H[0]).abs().mean() < 0.01 * H.abs().mean():
            print(f"  warning    {expert.name}'s states are the same for all problems: there is nothing to "
                  "read")


def percents(fractions):
    return ", ".join(f"{dataset} {fraction:.0%}" for dataset, fraction in fractions.items())


def suggest_next(args):
    out = shlex.quote(args.out)
    print(f"next:\n  python eval.py {out}\n  python eval.py {out} --ask")
    if args.control not in DRAWN_FOR_ALL:
        print(f"  python train.py --resume {out} --steps {2 * args.steps}")


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def bar(items, name, done, steps):
    return tqdm(items, desc=name, initial=done, total=steps, disable=True if RANK else None)


def numbered(losses, steps, name):
    """(step, loss) of stage 0, counted from 1, with a progress bar."""
    return bar(enumerate(losses, start=1), f"stage 0, {name}", 0, steps)


# Stopping a run.

stop_signals = []  # Ctrl-C and SIGTERM, as they came


def handle_signals(handler):
    if threading.current_thread() is not threading.main_thread():
        return  # Python allows it in the main thread alone
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def stop_at_once():
    handle_signals(signal.default_int_handler)


def stop_at_next_step():
    """From here on Ctrl-C and SIGTERM let the step finish and save it. The second Ctrl-C stops at once."""
    def ask(number, frame):
        stop_signals.append(number)
        stop_at_once()

    stop_signals.clear()
    handle_signals(ask)


SAVE_EVERY = 10  # steps between two checkpoints


def save_and_maybe_stop(out, step, args, policy, router, progress, optimizer, generator):
    """Save a checkpoint every ten steps, after the last step, and when asked to stop; then the program ends.

    The newest two stay, and the one after stage 0, which eval.py --stage0 needs.
    """
    stop = all_reduce_sum(len(stop_signals)) > 0  # stop on all ranks if one of them was signalled
    if stop or step % SAVE_EVERY == 0 or step == args.steps:
        save_checkpoint(out / f"step-{step:06d}-", policy, router, progress, optimizer, generator)
        if RANK == 0:
            for old in sorted(out.glob("step-*.safetensors"), reverse=True)[2:]:
                old.unlink()
    if stop:
        tqdm.write(f"stopped and saved; continue with: python train.py --resume {shlex.quote(str(out))}")
        raise SystemExit(0)


# The command line.

def make_parser():
    """A parser for all settings. Its result has only those that are given, without defaults."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Args):
        how = dict(help=describe(field), metavar=field.name.upper())
        if field.type is bool:
            how |= dict(type=boolean, nargs="?", const=True)
        elif field.type in (list[str], list[int]):
            how |= dict(type=field.type.__args__[0], nargs="+")
        else:
            how |= dict(type=field.type)
        parser.add_argument(f"--{field.name}", **how)
    return parser


def boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def describe(field):
    """The help of a setting: its sentence, its default in each preset, its range."""
    default = default_of(field)
    values = {name: preset.get(field.name, default) for name, preset in PRESETS.items()}
    if field.name == "preset" or all(value == default for value in values.values()):
        defaults = f" Default: {show_value(default)}." if default not in ("", []) else ""
    else:
        shown = "; ".join(f"{name} {show_value(value)}" for name, value in values.items())
        defaults = f" Default: {shown}."
    choices = field.metadata["choices"]
    one_of = f" One of {', '.join(filter(None, choices))}." if choices else ""
    return f"{field.metadata['help']}{one_of}{range_of(field)}{defaults}".replace("%", "%%")


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def show_value(value):
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def range_of(field):
    """" At least 1, at most 64.", or "" for a setting without a range."""
    limits = dict(minimum="at least", above="above", maximum="at most")
    parts = [f"{words} {field.metadata[name]}" for name, words in limits.items()
             if field.metadata[name] is not None]
    text = ", ".join(parts)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def parse_args(argv=None):
    """The settings of a run: what is given, then the preset, then the defaults.

    Raises ValueError, a sentence that says how to fix it, for settings that no run can have.
    """
    given = vars(make_parser().parse_args(argv))
    if given.get("extension"):
        import_extension(given["extension"])

    # Check what is given before anything is chosen by it.
    for field in dataclasses.fields(Args):
        if field.name in given:
            check_value(field, given[field.name])
    check_router(given.get("router", Args().router))

    if given.get("resume"):
        args = resumed(given)
    else:
        args = fresh(given)
    args.device = choose_device(args)
    check(args)
    if not (reads_states(args.router) or shows_texts(args.router) or args.reading_steps):
        args.experts = []  # nothing of them is used
    fit_to_memory(args, given)
    return args


def choose_device(args):
    """The device of a run. On a Mac a small policy is faster on the CPU than on mps."""
    if args.device != "auto" or not torch.mps.is_available():
        return pick_device(args.device)
    return pick_device("auto", small=model_size(args.policy).params < SMALL)


def fresh(given):
    """The settings of a new run."""
    fits_a_gpu = "task" in given and has_gpu(given)
    if "policy" in given and not given.get("preset") and not fits_a_gpu:
        # --policy: preset small, without its experts if none are named
        if "experts" not in given:
            given = dict(experts=[], cue="", think=0) | given
        given = given | dict(preset="small")
    chosen = choose_preset(given)
    args = Args(**(preset_settings(chosen["preset"], given.get("task")) | chosen | given))

    # Without experts in the context, stage 0 has to be asked for.
    if args.router in ("none", "text") and "reading_steps" not in given:
        args.reading_steps = 0

    args.data = absolute(args.data)
    args.extension = absolute(args.extension)
    if args.extension.startswith(f"{REPOSITORY}{os.sep}"):  # the repository may be moved
        args.extension = os.path.relpath(args.extension, REPOSITORY)

    args.out = args.out or f"runs/{args.task.replace('+', '-')}-{time.strftime('%m%d-%H%M%S')}"
    args.out = all_gather(args.out)[0]  # the name that rank 0 chose, as clocks differ
    args.out = str(expand_home(args.out, "--out"))
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    if list(out.glob("*.json")):
        raise ValueError(f"{args.out} holds a run: choose another --out, or --resume {shlex.quote(args.out)}")
    return args


def absolute(path):
    """The path of a file that is there as one that leads to it from any folder; any other text as it is."""
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if path and os.path.exists(expanded) else path


def resumed(given):
    """The settings of a run that is continued."""
    folder = given["resume"]
    may_change = {"resume", "steps", "micro_batch", "device", "policy", "experts", "extension",
                  "data"}
    changed = sorted(given.keys() - may_change)
    if changed:
        raise ValueError(f"--resume continues the same run, and --{', --'.join(changed)} would change it: "
                         "leave it out, or start another run")
    config = read_config(folder)
    if config["ranks"] != WORLD:
        raise ValueError(f"{folder} is a run of {config['ranks']} ranks: continue with as many, not {WORLD}")
    extension = config["args"].get("extension")
    if isinstance(extension, str) and extension and "extension" not in given:
        import_extension(extension)
    try:
        saved = Args(**config["args"])
        check(saved)
        if dataclasses.asdict(saved) != config["args"]:
            raise ValueError("settings are missing")
    except (TypeError, ValueError) as error:
        check_names(folder, argparse.Namespace(**{"router": "none", "control": "none"} | config["args"]))
        raise bad_config(folder, error) from error

    args = dataclasses.replace(saved, **(given | dict(out=folder)))
    args.data = absolute(args.data)
    if args.control in DRAWN_FOR_ALL and args.steps != saved.steps:
        raise ValueError(f"--steps stays {saved.steps} with --control {args.control}, as its states are "
                         "drawn for all problems at once: start another run with more")
    check_models(folder, args, config["models"])
    check_data(folder, args, config["data"])
    return args


def check(args):
    """Raises ValueError for settings that no run can have, given by a user or by a damaged config.json."""
    for field in dataclasses.fields(Args):
        check_value(field, getattr(args, field.name))
    check_router(args.router)
    reads = reads_states(args.router)

    def refuse_if(wrong, message):
        if wrong:
            raise ValueError(message)

    refuse_if(args.control not in CONTROLS,
              f"--control {args.control} is unknown: choose {', '.join(CONTROLS)}, or import the file that "
              "adds it with --extension FILE")
    refuse_if(compares(args.router) and (args.group % 2 or args.group < 4),
              f"--group {args.group} cannot be divided between two experts so that each half has two answers "
              "to compare: use an even number from 4 on, or --router mixed")
    refuse_if(min(args.batch, args.val, args.test) < WORLD,
              f"{WORLD} ranks need a problem each: raise --batch, --val or --test")
    refuse_if(args.reading_steps and WORLD > READING_BATCH,
              f"a step of stage 0 has {READING_BATCH} problems, too few for {WORLD} ranks: use fewer ranks, "
              "or --reading_steps 0")
    refuse_if(args.reading_steps and args.beta,
              "after stage 0 the KL to the frozen policy would undo what was learned: use --beta 0, or "
              "--reading_steps 0")
    refuse_if(shows_texts(args.router) and args.reading_steps,
              "--router text needs no stage 0, as the policy can read words: use --reading_steps 0")
    refuse_if(args.control != "none" and not reads,
              f"--router {args.router} reads no states that --control could replace: use --router attention")
    refuse_if(not args.lora_rank and not has_context(args.router),
              "--lora_rank 0 leaves nothing to train: give it a rank")
    needs_experts = reads or shows_texts(args.router) or args.reading_steps
    refuse_if(needs_experts and not args.experts,
              f"--router {args.router} needs experts: name some with --experts, or use --router none")
    where, _ = which_states(args.states)
    refuse_if(args.think and where == "first",
              "with --think an expert writes after the first token, whose state that cannot change: use "
              "--states last")
    refuse_if(args.think and not args.cue,
              "--think needs words that lead from the thought to the answer: add --cue 'The answer is:'")


def check_router(name):
    """Raises ValueError for a router that there is not."""
    if name not in ROUTERS:
        raise ValueError(f"--router {name} is unknown: choose {', '.join(ROUTERS)}, or import the file that "
                         "adds it with --extension FILE")


def check_value(field, value):
    """Raises ValueError if a setting has the wrong type, or is out of its range."""
    name, limits, default = field.name, field.metadata, default_of(field)
    if type(value) is int and type(default) is float:
        value = float(value)
    fits = type(value) is type(default)
    if fits and isinstance(value, list):
        fits = all(type(item) is type(default[0]) for item in value)
    if not fits:
        raise ValueError(f"--{name} is {value!r}, which is not of type {type(default).__name__}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"--{name} is {value!r}: choose {', '.join(filter(None, limits['choices']))}")
    if type(value) not in (int, float):
        return

    too_low = limits["minimum"] is not None and value < limits["minimum"]
    too_low = too_low or (limits["above"] is not None and value <= limits["above"])
    too_high = limits["maximum"] is not None and value > limits["maximum"]
    if too_low or too_high or not math.isfinite(value):
        raise ValueError(f"--{name} is {value}, but must be a number{range_of(field).lower().rstrip('.')}")


# Memory: what fits on which machine.
#
# Everything here is counted from the settings and the sizes of the models, before anything is fetched.
# lab/plan.py says how the counts were checked.

@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What a model's memory and time depend on."""
    params: int     # all its numbers
    layers: int
    width: int      # d, of a hidden state
    heads: int      # query heads
    kv_heads: int   # heads of keys and values
    head_dim: int
    ff: int         # width inside the MLP
    vocab: int
    writes: bool = True  # False for an encoder, which only reads

    @property
    def kv(self):
        """Numbers that the KV cache holds for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def blocks(self):
        """Numbers in the matrices of all layers: query, key, value, output; gate, up, down."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.width * self.ff)


KNOWN_MODELS = {  # those that a preset or a row below names, so that nothing is fetched to judge a machine
    "Qwen/Qwen2.5-7B-Instruct": ModelSize(7_615_616_512, 28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen/Qwen2.5-Math-7B-Instruct": ModelSize(7_615_616_512, 28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen/Qwen2.5-3B-Instruct": ModelSize(3_085_938_688, 36, 2048, 16, 2, 128, 11008, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelSize(1_543_714_304, 28, 1536, 12, 2, 128, 8960, 151936),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": ModelSize(1_543_714_304, 28, 1536, 12, 2, 128, 8960, 151936),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": ModelSize(1_543_714_304, 28, 1536, 12, 2, 128, 8960, 151936),
    "Qwen/Qwen2.5-0.5B-Instruct": ModelSize(494_032_768, 24, 896, 14, 2, 64, 4864, 151936),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": ModelSize(494_032_768, 24, 896, 14, 2, 64, 4864, 151936),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ModelSize(1_711_376_384, 24, 2048, 32, 32, 64, 8192, 49152),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ModelSize(361_821_120, 32, 960, 15, 5, 64, 2560, 49152),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelSize(134_515_008, 30, 576, 9, 3, 64, 1536, 49152),
    "allenai/OLMo-2-0425-1B-Instruct": ModelSize(1_484_916_736, 16, 2048, 16, 16, 128, 8192, 100352),
    "microsoft/phi-1_5": ModelSize(1_418_270_720, 24, 2048, 32, 32, 64, 8192, 51200),
    "EleutherAI/pythia-410m": ModelSize(405_334_016, 24, 1024, 16, 16, 64, 4096, 50304),
    "BAAI/bge-base-en-v1.5": ModelSize(109_482_240, 12, 768, 12, 12, 64, 3072, 30522,
                                       writes=False),
}

GPU_PRESET = "small"  # what --task alone runs on a GPU

# The models for a GPU, by preset and task, the largest first. gpu: gigabytes of the card that a row is meant
# for; the others are settings.
#
# Why a small policy and larger experts? An expert reads and writes once, before training. The policy is
# sampled and trained again and again. So a card has room for experts that know more than any policy that
# could be trained on it.
MATH_1B, CODER_1B = "Qwen/Qwen2.5-Math-1.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct"
SMOL_1B, SMOL_360M = "HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"
MATH_7B, QWEN_7B = "Qwen/Qwen2.5-Math-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
QWEN_1B, QWEN_500M = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"

GPU_ROWS = [
    dict(gpu=48, preset="small", task="gsm8k", batch=32, micro_batch=16, policy=QWEN_1B,
         experts=[MATH_7B, QWEN_7B, SMOL_1B]),
    dict(gpu=24, preset="small", task="gsm8k", batch=32, micro_batch=16, policy=QWEN_500M,
         experts=[MATH_1B, CODER_1B, SMOL_1B]),
    dict(gpu=12, preset="small", task="gsm8k", batch=32, micro_batch=16, policy=QWEN_500M,
         experts=[MATH_1B, CODER_1B, SMOL_360M]),
    dict(gpu=8, preset="small", task="gsm8k", batch=32, micro_batch=8,
         policy="HuggingFaceTB/SmolLM2-135M-Instruct",
         experts=["Qwen/Qwen2.5-Coder-0.5B-Instruct", QWEN_500M, SMOL_360M]),

    dict(gpu=80, preset="paper", micro_batch=8),
    dict(gpu=48, preset="paper", micro_batch=4),
    dict(gpu=24, preset="paper", micro_batch=2),
    dict(gpu=16, preset="paper", micro_batch=2, policy=QWEN_1B),
    dict(gpu=12, preset="paper", micro_batch=1, policy=QWEN_1B, experts=[MATH_1B, CODER_1B, SMOL_360M]),
    dict(gpu=8, preset="paper", micro_batch=2, policy=QWEN_500M, experts=[MATH_1B, CODER_1B, SMOL_360M]),
]
GAPS = 1.1  # PyTorch's allocator cannot use every byte: a tenth more than what is counted must be free


def model_size(source):
    """The ModelSize of a folder or a hub model. No weights are read or fetched, at most a config.json.

    Raises ValueError if there is no such config.
    """
    repo, _, revision = source.partition("@")
    folder = local_folder(source)
    if folder is None and repo in KNOWN_MODELS:
        return KNOWN_MODELS[repo]

    # Build the model on the device "meta", where tensors have shapes but take no memory, and count.
    with loading("config", source), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder or repo, revision=revision or None,
                                            trust_remote_code=False)
        text = config.get_text_config()
        params = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    writes = generates_text(config)
    if writes and not getattr(text, "tie_word_embeddings", True):
        params += text.vocab_size * text.hidden_size  # AutoModel has no head

    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    ff = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return ModelSize(params, text.num_hidden_layers, text.hidden_size, heads, kv_heads, head_dim, ff,
                     text.vocab_size, writes)


def memory_estimate(args, policy, experts, prompt_tokens):
    """{what: bytes} on the device of one rank. `peak_memory` says which of them are there at the same time.

    policy (a ModelSize), experts (several), prompt_tokens: of the longest prompt, padding included.
    """
    dtype = frozen_dtype(args, policy)
    S = prompt_tokens + args.latents * has_context(args.router)
    rows, group = rows_and_group(args, experts)
    micro = min(args.micro_batch, rows)

    # LoRA has two thin matrices at each of the seven matrices of a layer.
    inner = (policy.heads + 2 * policy.kv_heads) * policy.head_dim + policy.heads * policy.head_dim
    lora = args.lora_rank * policy.layers * (7 * policy.width + inner + 3 * policy.ff)
    router = router_parameters(args, policy, experts)

    # A validation answers so many problems at once, each of them greedily (eval.evaluate).
    answered = min(EVAL_ROWS, args.batch * args.group, max(args.val, args.test))

    table = {
        # 4 bytes a number, 2 in half precision.
        "policy, frozen": policy.params * dtype.itemsize,
        # Bytes a trained number: 4 itself, 4 its gradient, 8 AdamW's moments; for LoRA 4 more, for the copies
        # in the policy's dtype that a gradient pass keeps.
        "LoRA and router, gradients and moments": 20 * lora + 16 * router,
        # On a GPU: cuBLAS's workspace and loaded kernels (an assumption). On a CPU: the code of the libraries
        # and what they keep (measured).
        "libraries": 500 * 10**6 if is_cuda(args) else 480 * 10**6,
        "an expert while it reads": max((reading_memory(args, e, prompt_tokens) for e in experts), default=0),
        "rollout": sampling_memory(args, policy, rows, group, S),
        f"gradient pass, {micro} prompts": scoring_memory(args, policy, micro, group, S, args.max_new),
        "validation and test": sampling_memory(args, policy, answered, 1, S),
    }

    # Stage 0 learns one text for each problem.
    if args.reading_steps:
        read = min(math.ceil(READING_BATCH / WORLD), args.micro_batch)
        table["stage 0, reading"] = scoring_memory(args, policy, read, 1, S, args.write + 8)
    if words_and_reading(args)[0]:
        table["stage 0, words"] = words_memory(args, policy, experts)
    return table


def will_compare(args, experts):
    """Will two experts be compared? As rlvr.candidates, but before anything is read. experts: ModelSizes."""
    able = [expert for expert in experts if expert.writes or not args.reading_steps]
    return compares(args.router) and len(able) > 1


def rows_and_group(args, experts):
    """How many prompts a step has on this rank, and how many answers to each of them.

    Comparing shows every problem twice, each time with half of the answers.
    """
    rows = math.ceil(args.batch / WORLD)
    if will_compare(args, experts):
        return 2 * rows, args.group // 2
    return rows, args.group


def words_memory(args, policy, experts):
    """Bytes of a step of words: the router alone, in float32, with all that autograd keeps of it."""
    problems = math.ceil(WORDS_BATCH / WORLD)
    states = number_of_states(args, experts)
    widest = max(expert.width for expert in experts)
    of_states = states * (3 * widest + 8 * args.router_dim)  # standardized, projected, keys and values
    of_latents = args.latents * (16 * args.router_dim + 6 * policy.width)  # MLP and context tokens
    return problems * (of_states + of_latents) * 4


def peak_memory(table):
    """Bytes at the worst moment: experts read before training begins, and the parts of a step take turns."""
    parts = dict(table)
    always = parts.pop("policy, frozen") + parts.pop("libraries")
    reads = parts.pop("an expert while it reads")
    trained = parts.pop("LoRA and router, gradients and moments")
    return always + trained + max(reads, *parts.values())


def sampling_memory(args, policy, rows, group, S):
    """Bytes of a rollout: `group` answers to each of `rows` prompts of S tokens."""
    size = activation_bytes(args, policy)
    prompt_kv = rows * S * policy.kv * size

    # The prefill needs the KV cache and, of one layer at a time, gate, up, silu(gate), their product and some
    # hidden states; or its attention scores, where there is no fused kernel.
    in_mlp = rows * S * (mlp_copies(args, policy) * policy.ff + 6 * policy.width) * size
    prefill = max(in_mlp, 2 * prompt_scores(args, policy, rows, S))

    # Then each layer has a second copy of its weights, with LoRA in them, and answers have keys and values.
    merged = policy.blocks * frozen_dtype(args, policy).itemsize
    completion_kv = rows * group * args.max_new * policy.kv * size

    # For the next tokens: the logits, and on a GPU probabilities and their running sum in float32. A CPU
    # works on 16 rows at a time.
    drawing = rows * group * policy.vocab * (size + 8 * is_cuda(args))
    return prompt_kv + max(prefill, merged + completion_kv + drawing)


def scoring_memory(args, policy, rows, group, S, T):
    """Bytes of a gradient pass: `group` answers of T tokens to each of `rows` prompts of S tokens."""
    size = activation_bytes(args, policy)
    d, ff = policy.width, policy.ff
    tokens = rows * (S + group * T)

    # What autograd keeps of a token in a layer. 6 d: what both norms read and write, the query, the output of
    # attention. Key and value. 3 ff: gate, up, and what the last matrix reads. On a CPU, where norms are not
    # fused, also copies of hidden states in float32: 2.4 of them in bfloat16, 1.1 in float32 (measured).
    kept = tokens * (6 * d + policy.kv // policy.layers + 3 * ff) * size
    if not is_cuda(args):
        kept += tokens * d * (10 if size == 2 else 5)

    # The attention weights of the answers: each token looks at its prompt and at its own answer.
    kept += rows * group * policy.heads * T * (S + T) * size
    kept += prompt_scores(args, policy, rows, S)

    # Beside what is kept: the last hidden states and their gradients; the MLP of one layer, or the logits of
    # a chunk of 256 tokens with (on a GPU, which takes all rows at once) three float32 copies.
    last = 3 * rows * group * T * d * size
    in_mlp = rows * max(S, group * T) * (1 + mlp_copies(args, policy)) * ff * size
    chunk = min(256, rows * group * T) * policy.vocab * (size + 12 * is_cuda(args))

    # The frozen reference reads the prompts once more while everything is kept.
    reference_kv = rows * S * policy.kv * size if args.beta else 0
    return policy.layers * kept + last + max(in_mlp, chunk) + reference_kv


def reading_memory(args, expert, prompt_tokens):
    """Bytes of an expert while it reads: its weights, and a batch of BATCH_TOKENS tokens."""
    dtype = torch.float32
    if expert.params >= SMALL and computes_in_bfloat16(args.device):
        dtype = torch.bfloat16
    device_type = args.device.partition(":")[0]
    tokens = batch_tokens(device_type, BATCH_TOKENS)

    # What one layer works with; its keys and values, as `compare_with_experts` lets it write in every run;
    # and inner layers if one is read.
    in_layer = 4 * expert.ff + 4 * expert.width
    per_token = expert.kv + in_layer
    if any(layer != -1 for layer in args.layers):
        per_token += expert.layers * expert.width

    # Where it writes: the logits of the last tokens, once in its dtype and twice in float32.
    logits = expert.vocab * (dtype.itemsize + 8)
    batch = tokens * per_token * dtype.itemsize + tokens // prompt_tokens * logits

    # Where it thinks, a batch is larger: all its tokens have keys and values, its prompts are read at once.
    if args.think:
        tokens = batch_tokens(device_type, THOUGHT_BATCH_TOKENS)
        rows = max(1, tokens // (prompt_tokens + args.think))
        read_at_once = rows * prompt_tokens
        thoughts = (tokens * expert.kv + read_at_once * in_layer) * dtype.itemsize + rows * logits
        batch = max(batch, thoughts)
    return expert.params * dtype.itemsize + batch


def number_of_states(args, experts):
    """N, how many states of a problem the router reads."""
    _, states_per_layer = which_states(args.states)
    return len(experts) * len(args.layers) * states_per_layer


def router_parameters(args, policy, experts):
    """How many numbers the router has."""
    if not experts or not reads_states(args.router):
        return args.latents * policy.width
    states = number_of_states(args, experts)
    widest = max(expert.width for expert in experts)
    if args.router == "linear":
        return states * widest * args.latents * policy.width

    # One matrix a state; q, k, v, proj (4 dim^2) and an MLP (8 dim^2); the way out.
    dim = args.router_dim
    return states * widest * (dim + 1) + 12 * dim**2 + dim * policy.width


def is_cuda(args):
    return args.device.startswith("cuda")


def frozen_dtype(args, policy):
    """The dtype of the policy's frozen weights, as rlvr.build will choose it."""
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    return pick_dtype(args.device, policy.params)


def activation_bytes(args, policy):
    """Bytes of a number in a hidden state: 2 in bfloat16; 4 in float32, and where the weights are float16."""
    return 2 if frozen_dtype(args, policy) == torch.bfloat16 else 4


def mlp_copies(args, policy):
    """Numbers for each of the MLP's inner ones while it runs: 4, and with float16 products copies of two."""
    return 5 if frozen_dtype(args, policy) == torch.float16 else 4


def prompt_scores(args, policy, rows, S):
    """Bytes of one layer's attention within the prompts: 0 where a fused kernel does not write them down.

    In float32 PyTorch has none for grouped heads: it keeps S^2 weights a head, and repeated keys and values.
    """
    if activation_bytes(args, policy) == 2:
        return 0
    return rows * policy.heads * (S * S + 2 * S * policy.head_dim) * 4


LONGEST_GSM8K = dict(chat=384, plain=256)  # tokens of the longest prompts: 376 to 393, and 214 to 226


def longest_prompt(args):
    """About how many tokens the policy's longest prompt has, without a tokenizer and without a download."""
    prompt_format = prompt_format_of(args.answer_format)
    tasks = [task.strip() for task in args.task.split("+")]
    longest = 0
    if "gsm8k" in tasks and not args.data:
        longest = LONGEST_GSM8K[prompt_format]
        tasks.remove("gsm8k")

    # A token is a word of at most six letters, or one other character. A chat has 164 more of instructions.
    if tasks:
        for problem in get_problems("+".join(tasks), "train", 64, args.data, args.level, progress=False):
            tokens = len(re.findall(r"[^\W\d]{1,6}|\S", render_prompt(problem)))
            longest = max(longest, bucket(tokens + 164 * (prompt_format == "chat")))
    return longest


def estimate_of(args):
    """`memory_estimate` of a run, from its settings alone."""
    experts = [model_size(source) for source in args.experts]
    return memory_estimate(args, model_size(args.policy), experts, longest_prompt(args))


# Choosing by memory.

def free_memory(device):
    """Bytes that are free on a GPU, or that this computer has. 0 if that cannot be found out."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else 0
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return main_memory()


def main_memory():
    """Bytes of main memory. 0 if that cannot be found out."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass

    # Windows has no sysconf.
    try:
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value
    except (AttributeError, OSError):
        return 0


def has_gpu(given):
    """May this run use a CUDA GPU?"""
    return torch.cuda.is_available() and given.get("device", "auto").partition(":")[0] in ("auto", "cuda")


def choose_preset(given):
    """The preset, and what it changes for this machine, as settings; prints what was chosen on a GPU.

    given: the settings of the command line. Raises ValueError where nothing fits. Nothing is fetched.
    """
    preset = given.get("preset") or GPU_PRESET
    rows = rows_for(preset, given.get("task"))
    if has_gpu(given) and rows and ("task" in given or "preset" in given):
        chosen = choose_row(rows, given)
        if chosen:
            return chosen
    if given.get("preset"):
        return dict(preset=preset)

    tasks = [known_task(task.strip()) for task in given.get("task", Args().task).split("+")]
    if set(tasks) <= {"arithmetic", "logic", "algorithmic"}:
        return dict(preset="tiny")
    if has_gpu(given) and not rows:
        return dict(preset=preset)  # its own models are small enough
    raise ValueError(what_runs_here(given))


def rows_for(preset, task):
    """The rows of GPU_ROWS for a preset and a task (None: the preset's own)."""
    task = task_of(preset, task)
    return [row for row in GPU_ROWS if row["preset"] == preset and row.get("task", task) == task]


def args_of_row(row, changes):
    """The Args of a row of GPU_ROWS, changed by some settings."""
    settings = settings_of_row(row) | changes
    return Args(**(preset_settings(row["preset"], settings.get("task")) | settings))


def settings_of_row(row):
    """The settings in a row: all but the size of its card."""
    return {name: value for name, value in row.items() if name != "gpu"}


def choose_row(rows, given):
    """The settings of the largest row that fits into the GPU's free memory; None if there is none.

    --policy, --experts and --micro_batch are taken as given: if they fit with no row, the smallest row goes
    with them, and `fit_to_memory` warns.
    """
    device = pick_device(given.get("device", "auto"))
    free = min(all_gather(free_memory(device)))  # all ranks choose the same
    card = torch.cuda.get_device_properties(device).name
    too_large = ""  # about the last row that did not fit
    for row in rows:
        # How much would this row need?
        args = args_of_row(row, given | dict(device=device))
        needed = GAPS * peak_memory(estimate_of(args))

        # Say what is chosen, and what would have been better.
        names = ", ".join(Path(source).name for source in args.experts)
        what = f"{Path(args.policy).name} with {names}, {args.micro_batch} prompts in a gradient pass"
        choice = (f"  machine    {free / 1e9:.1f} GB are free on {card}: preset {row['preset']}, {what}, "
                  f"needs about {needed / 1e9:.1f} GB")
        if needed <= free:
            print(choice + too_large, flush=True)
            return settings_of_row(row)
        too_large = f"; the next larger choice, {what}, would need {needed / 1e9:.1f} GB"

    # No row fits. Settings that were given are tried all the same, with the smallest row.
    if not given.keys().isdisjoint({"policy", "experts", "micro_batch"}):
        print(choice, flush=True)
        return settings_of_row(row)
    return None


def fit_to_memory(args, given):
    """On a GPU: lower args.micro_batch until the run fits, unless it was given. Warn if it never does."""
    if args.device == "cpu":
        return
    free = min(all_gather(free_memory(args.device)))
    needed = GAPS * peak_memory(estimate_of(args))
    while needed > free and args.micro_batch > 1 and "micro_batch" not in given:
        args.micro_batch = args.micro_batch // 2
        needed = GAPS * peak_memory(estimate_of(args))
    if needed > free:
        print(f"  warning    this run needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on "
              f"{args.device}: if it fails, choose a smaller --policy, smaller --experts or a lower "
              "--micro_batch", flush=True)


# Without a GPU: what runs here, and how long that takes.

def what_runs_here(given):
    """A sentence for a task that needs a GPU, on a machine without one (or with too small a one)."""
    task = given["task"]
    memory = main_memory()
    has = f"{memory / 2**30:.0f} GB of memory" if memory else "an unknown amount of memory"
    where = "no CUDA GPU"
    if has_gpu(given):
        free = free_memory(pick_device(given.get("device", "auto")))
        where = f"a GPU with only {free / 1e9:.1f} GB free"
    elif torch.cuda.is_available():
        where = f"a GPU that --device {given['device']} leaves unused"

    # The time of the two runs.
    tiny, small = Args(), Args(**(preset_settings("small", task) | dict(task=task)))
    small.data, small.level = given.get("data", ""), given.get("level", small.level)
    tiny.device = pick_device("cpu")
    small.device = pick_device("cpu" if has_gpu(given) else given.get("device", "auto"))
    device = " --device cpu" if torch.cuda.is_available() else ""
    rows = rows_for(GPU_PRESET, task)
    run_here = f"python train.py{device}"
    problems = "".join(f" --{name} {shlex.quote(given[name])}" for name in ("task", "level", "data")
                       if given.get(name))
    asked = f"python train.py{problems}"

    # The tiny models know three datasets, but only at level tiny.
    known = {dataset for datasets in TINY_LEVEL.values() for dataset in datasets}
    if {name.strip() for name in task.split("+")} <= known:
        needs = f"{task} is given to larger models (to the tiny ones with --preset tiny)"
    else:
        needs = f"{task} needs more than the tiny models of this repository"
    return (f"{needs}, and this machine has {has} and {where}: "
            f"`{run_here}` takes {duration(run_seconds(tiny))} here, "
            f"`{run_here} --preset small{problems}` {duration(run_seconds(small))} "
            f"(from a short measurement), and `{asked}` needs a CUDA GPU"
            + (f" of {rows[-1]['gpu']} GB or more, and takes larger models the more it has" if rows else ""))


def duration(seconds):
    """90 -> "about 2 minutes"."""
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    hours = round(minutes / 60)
    return f"about {hours} hours" if hours < 100 else f"about {round(hours / 24)} days"


SLOWER = 2.3  # a run takes so many times as long as its products alone (measured on two cores of a Xeon)
WRITTEN = 4  # to write a token of a thought takes as long as to read 4 (Qwen2.5-Coder-0.5B on one core)


def run_seconds(args):
    """Roughly how long a whole run takes here if nothing else runs: 10 s to start, then its operations."""
    rate = product_rate(frozen_dtype(args, model_size(args.policy)), args.device)
    return 10 + SLOWER * run_operations(args) / rate


def run_operations(args):
    """How many operations (multiplications and additions) a run of train.py makes in products, roughly."""
    P = longest_prompt(args) / 2  # on average, prompts are half as long as the longest
    n_train = n_training_problems(args)
    n_problems = n_train + args.val + args.test

    # Every expert reads every problem. One that writes reads it once more to write its text for stage 0, and
    # before that it may write a thought. A token costs 2 operations for each parameter.
    read = 0
    experts = [model_size(source) for source in args.experts]
    for expert in experts:
        tokens = P
        if expert.writes:
            passes = 2 if args.reading_steps else 1
            tokens = passes * (P + args.think + args.write) + WRITTEN * args.think
        read += 2 * expert.params * n_problems * tokens

    # A step reads the prompts, writes the answers, and scores both. A gradient costs one more pass, as the
    # weights are frozen, and so does the reference.
    prompts = args.batch * (2 if will_compare(args, experts) else 1) * P
    answers = args.batch * args.group * args.max_new
    step = (prompts + answers) * (4 if args.beta else 3)
    stage0 = 2 * READING_BATCH * (P + args.write)
    n_validations = math.ceil(args.steps / args.eval_every)
    n_answers = n_validations * args.val + args.test * (2 + len(args.experts))
    tokens = args.steps * step + args.reading_steps * stage0 + n_answers * (P + args.max_new)
    return read + 2 * model_size(args.policy).params * tokens


def product_rate(dtype, device):
    """Operations a second in a matrix product, the best within a third of a second."""
    x = torch.randn(512, 1024).to(device, dtype)
    weight = torch.randn(2048, 1024).to(device, dtype)
    best = math.inf
    end = time.perf_counter() + 0.33
    while time.perf_counter() < end:
        start = time.perf_counter()
        (x @ weight.T)[0, 0].item()  # a GPU has finished when it gives a number
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 2048 / best


def print_plan(args):
    """Print what a run would need, for --plan; no weights are loaded. Returns the table of memory."""
    table = estimate_of(args)
    print(f"memory on {args.device}, an estimate; experts, rollout, gradient pass and tests take turns:")
    for what, size in table.items():
        print(f"  {what:40} {size / 1e9:8.2f} GB")
    print(f"  {'at the worst moment':40} {peak_memory(table) / 1e9:8.2f} GB")
    free = free_memory(args.device)
    if free:
        print(f"  {'free now' if args.device != 'cpu' else 'this computer has':40} {free / 1e9:8.2f} GB")

    n_train = n_training_problems(args)
    words, reading = words_and_reading(args)
    print(f"experts: each reads {n_train:,} + {args.val} + {args.test:,} prompts, once for all runs")
    print(f"stage 0: {words} steps of words of {WORDS_BATCH} problems, {reading} of reading of "
          f"{READING_BATCH}")
    print(f"GRPO: {args.steps} steps of {args.batch} problems x {args.group} answers of at most "
          f"{args.max_new} tokens, {args.micro_batch} prompts in a gradient pass")
    return table


def run(argv=None):
    """Train with a command line's settings. Returns the report of the test (None with --plan)."""
    handle_signals(signal.default_int_handler)
    with ranks():
        args = parse_args(argv)
        if args.plan:
            return print_plan(args)
        only_one = contextlib.nullcontext() if RANK else one_process(Path(args.out))
        with only_one:
            return main(args)


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # `import train` in an extension gets this program
    sys.exit(run_cli("train.py", run))
