"""
Reinforcement learning with verifiable rewards: GRPO, comparing experts, and stage 0.

GRPO in one formula. For each problem the policy samples a group of G answers, and the verifier gives each of
them the reward r_g, 1 for a right answer and 0 for any other. Every token of answer g is then made likelier
or less likely by how much better the answer was than its group (2402.03300, section 4.1):

    advantage  a_g  =  (r_g - mean(r)) / std(r)
    loss            =  - mean( a_g * pi(t) / pi_sampled(t) ),  over all tokens t of all answers g

pi(t) is the probability of token t under the policy that is trained, pi_sampled(t) its probability when it
was sampled.

How this differs from the textbook:
1. One optimizer step for each rollout. The policy that is trained is the policy that sampled, so the ratio
   pi / pi_sampled is 1 in value, and there is nothing to clip. What counts is its gradient, which equals the
   gradient of log pi where the ratio is 1 (see `grpo_loss`). So the loss of a token has the gradient
   -a_g * grad log pi(t).
2. The loss is a mean over all tokens of the step. The GRPO paper first takes the mean over each answer, so
   that a token of a long answer counts less.
3. Two experts are compared (ours). Half of a group is sampled while the policy sees one expert, the other
   half while it sees another expert. WITHIN a half, rewards teach the policy how to answer: that is GRPO.
   BETWEEN the halves, rewards teach the router whom to believe. A step of `train.main`:

       attention of B problems, with all experts visible, no gradient         (B, heads, L, N)
       draw_pair            two experts for each problem                      (B, 2)
       Batch.with_experts   each problem twice, with one expert visible       2 B problems
       rollout              G / 2 answers to each, their rewards, no gradient (2 B, G / 2)
       advantages           mean and std are those of the half                (2 B, G / 2)
       grpo_loss            trains LoRA and, through the context, how the router reads
       pair_probabilities   how the attention divides between the two (the
                            router runs again, now with gradient)             (B, 2)
       choice_loss          moves it to the expert whose half earned more: trains trust

   Here the GRPO loss does not move trust: where one expert is visible, all scores get the same trust, which
   cancels in the softmax. (In a run with stage 0, encoders, which give states but write no text, stay visible
   beside every expert, see `Dataset`; with them, trust moves a little.) The choice loss has a gradient
   for all that the attention depends on, also for queries and keys, but their learning rate is far lower
   than that of trust.
4. Stage 0 comes first (ours). Sparse rewards do not teach a policy to read vectors that it has never seen. So
   it first learns, without any reward, to say what the experts would say: `learn_words`, `learn_to_read`.
5. After stage 0 there is no KL term (--beta must be 0). It would pull the policy back to the frozen policy,
   which cannot read a context, and so it would undo stage 0. Without stage 0 (preset *paper*) it is there,
   with weight 0.04.

Why compare? After stage 0 the policy can read each expert, but only one at a time. If GRPO then shows it all
experts mixed by an attention that is still even, it has to learn from a mixture that it can hardly read.
Often it finds out whom to believe all the same, as on the tiny mix. But real models do so later, and all
less surely where one expert is a copy of another one that answers other problems (README.md). When each half
sees one expert alone, its context is one that the policy can read, and the two mean rewards say at once which
of the two experts knows more. Later the attention is sharp: then the context of all experts is almost that of
one expert, and can be read.

What is easy to get wrong:
- The stop token is part of the completion and is trained on. Otherwise the policy never learns to stop.
- Loss and sampler use the same temperature, and no top-k or top-p. Otherwise pi is not what was sampled from.
- The rollout has no gradient, so train.py runs the router again when it scores the answers.
- A group (or half) whose rewards are all equal has advantage 0 and teaches the policy nothing: watch
  `frac_reward_zero_std`. But if one half is all right and the other all wrong, trust learns most.
- The value of the GRPO loss says nothing: the ratio is 1, and the advantages of a group add up to 0, so for
  answers of one length it is 0 however well the policy answers. Watch the reward.
- Stage 0 sees no gold answer and no reward, and reads all experts that write equally often.

With several devices each process is a "rank" and has its part of the problems (`my_part`); sums go over all
ranks (`all_reduce_sum`). With one device these functions change nothing.
"""
import contextlib
import importlib.util
import json
import math
import os
import random
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.distributed.nn  # must be imported before init_process_group, or the process hangs at its end
import torch.nn.functional as F

from experts import (REPOSITORY, Expert, find_model, first_line, line_ends, pick_device, portable,
                     prompt_ids, read_states, read_tensors, weights_fingerprint, write_atomic, write_tensors,
                     write_texts)
from model import Policy, bucket, pick_dtype
from rewards import data_fingerprint, expand_home, get_problems, render_prompt, verify
from router import ROUTERS, by_expert, compares, reads_states, shows_texts

GRAD_CLIP = 1.0        # the largest norm of a gradient
READING_BATCH = 16     # pairs of a problem and an expert in a step of reading, all ranks together
WORDS_BATCH = 128      # the same in a step of words, which needs no forward pass of the policy
ROUTER_SLOWER = 10     # while the policy learns to read, the router learns at LoRA's rate divided by this


# -- GRPO: sample a group of answers, and compare each with its group

@dataclass
class Rollout:
    """G answers to each of B problems, T tokens at most."""
    problems: list             # B
    tokens: torch.Tensor       # (B, G, T) of the answers
    mask: torch.Tensor         # (B, G, T) True up to and including the stop token
    texts: list                # [B][G]
    verdicts: list             # [B][G]
    rewards: torch.Tensor      # (B, G)
    truncated: torch.Tensor    # (B, G) True where there is no stop token
    attention: torch.Tensor    # (B, heads, L, N), None for a router without attention
    seconds: float             # of sampling, without verifying


@torch.no_grad()
def rollout(policy, router, batch, args, group, temperature, generator=None):
    """Sample `group` answers to every problem of the batch, and verify each of them."""
    start = time.perf_counter()

    # Read: the router turns states into context tokens. Write: the policy samples the answers.
    context, attention = router(batch.H, batch.visible)
    tokens, mask = sample(policy, batch, context, group, args.max_new, temperature, generator)
    is_stop = policy.ends[tokens] & mask  # policy.ends: True for the stop tokens of the vocabulary
    truncated = ~is_stop.any(-1)  # (B, G)
    tokens_cpu = tokens.cpu()
    own_stops = torch.tensor(policy.config.stop, device=tokens.device)
    kept_cpu = (mask & ~torch.isin(tokens, own_stops)).cpu()
    seconds = time.perf_counter() - start

    # Decode every answer without the model's own stop token. Other special tokens stay: <answer> may be one.
    # In the plain format a token like "]\n" ends the answer, and its "]" belongs to the answer.
    texts, verdicts = [], []
    for b, problem in enumerate(batch.problems):
        ids = [tokens_cpu[b, g][kept_cpu[b, g]].tolist() for g in range(group)]
        answers = policy.tokenizer.batch_decode(ids, skip_special_tokens=False)
        if args.answer_format == "plain":
            answers = [answer.partition("\n")[0] for answer in answers]
        texts.append(answers)

        # Let the verifier compare every answer with the gold answer of its problem.
        was_cut = truncated[b].tolist()
        verdicts.append([verify(answer, problem, args.answer_format, cut)
                         for answer, cut in zip(answers, was_cut)])

    rewards = torch.tensor([[verdict.reward for verdict in row] for row in verdicts], device=tokens.device)
    return Rollout(problems=batch.problems, tokens=tokens, mask=mask, texts=texts, verdicts=verdicts,
                   rewards=rewards, truncated=truncated, attention=attention, seconds=seconds)


def sample(policy, batch, context, group, max_new, temperature, generator):
    """Sample `group` answers to each problem. Returns their tokens and mask, both (B, G, T).

    context: (B, L, d), or None. The policy reads context and prompt of a problem once, and samples the whole
    group from this one reading. On a CPU, long and short prompts are sampled in separate parts, so that
    little time is lost on padding. A GPU takes all prompts at once, as its time hardly depends on how many
    there are.
    """
    B = len(batch)
    parts = [list(range(B))]
    if batch.tokens.device.type == "cpu":
        parts = parts_of_similar_length(batch.lengths.tolist())

    # Sample part by part. What comes after an answer is filled with a stop token, as by `Policy.generate`.
    tokens = torch.full((B, group, max_new), policy.config.stop[0], device=batch.tokens.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    longest = 0
    for rows in parts:
        part = batch[torch.tensor(rows)]
        part_context = None if context is None else context[rows]
        prefill = policy.prefill(part.tokens, part.lengths, part_context)
        part_tokens, part_mask = policy.generate(prefill, group, max_new, temperature, generator)
        T = part_tokens.shape[-1]
        tokens[rows, :, :T], mask[rows, :, :T] = part_tokens, part_mask
        longest = max(longest, T)
    return tokens[..., :longest], mask[..., :longest]


def parts_of_similar_length(lengths):
    """Divide prompts among parts of similar length. Returns the indices of each part.

    lengths: the number of tokens of each prompt. Where a prompt has more than 128 tokens, it is at most twice
    as long as the shortest one of its part: a few long prompts would otherwise pad all others to their own
    length. With lengths 300, 20, 90 and 700 the parts are [1, 2], [0], [3]. (`micro_batches` divides for
    memory: its passes have a size, and are filled up to it.)
    """
    parts = []
    shortest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not parts or lengths[i] > 2 * max(64, shortest):
            parts.append([])
            shortest = lengths[i]
        parts[-1].append(i)
    return [sorted(part) for part in parts]


def advantages(rewards):
    """(reward - mean) / std within each group. rewards (B, G) -> (B, G) (2402.03300, section 4.1.2)

        [[1, 0, 0, 1],   ->   [[1, -1, -1, 1],
         [0, 0, 0, 0]]         [0,  0,  0, 0]]
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True, correction=0)
    return torch.where(std > 1e-6, centered / std.clamp(min=1e-6), 0.0)


def informative(advantage, beta):
    """The rows of advantage (B, G) that have a gradient, as indices.

    A group of equal rewards has advantage 0, so without a KL term (beta 0) it can be left out of the loss.
    If all groups are like that, the first one is kept: the loss is computed at least once in each step, and
    so a NaN in the weights is noticed.
    """
    if beta:
        return torch.arange(len(advantage))
    rows = advantage.any(1).nonzero()[:, 0].cpu()
    return rows if len(rows) else torch.tensor([0])


def micro_batches(lengths, size):
    """Divide prompts among gradient passes of at most `size` prompts. Returns the indices of each pass.

    lengths: the number of tokens of each prompt, a tensor. Prompts of similar length share a pass, so that
    little is padded: with lengths 9, 60, 8, 62 and a size of 2 the passes are [2, 0] and [1, 3]. What fits
    into one pass keeps its order.
    """
    if len(lengths) <= size:
        return [torch.arange(len(lengths))]
    return lengths.cpu().argsort(stable=True).split(size)


def grpo_loss(logp, reference_logp, advantage, mask, beta):
    """The loss, summed over the tokens of a micro-batch. The caller divides by the tokens of the whole step.

    logp            (B, G, T)  log-probability of the sampled tokens, with gradient
    reference_logp  (B, G, T)  the same under the frozen policy; None for no KL term
    advantage       (B, G)     the same for every token of an answer
    mask            (B, G, T)  True up to and including the stop token

    The ratio pi / pi_sampled is 1 in value, as the policy has not changed since it sampled; what counts is
    its gradient. With an advantage of 2 and three tokens the loss is -6, and each logp has the gradient -2.
    """
    ratio = torch.exp(logp - logp.detach())
    loss = -ratio * advantage[..., None]
    if reference_logp is not None:
        loss = loss + beta * kl_estimate(logp, reference_logp)
    return loss.masked_fill(~mask, 0.0).sum()


def kl_estimate(logp, reference_logp):
    """KL(policy || reference) of each token, estimated from the sampled token alone.

    Schulman's estimator k3, exp(x) - x - 1 with x = reference - logp: unbiased and never negative
    (2402.03300, equation 4).
    """
    x = reference_logp - logp
    return torch.exp(x) - x - 1


# -- Comparing experts: half of a group sees one expert, half another one; the better half earns trust

EXPLORE = 0.2  # the part of the first draw that ignores the router's attention


def candidates(dataset, args):
    """The experts that can be compared, as a list of indices; [] when there is nothing to compare.

    With stage 0 these are the experts that write, as it taught the policy to read them; without it, all of
    them. The router must have an attention that comparing can train. With --router attention and nothing to
    compare, trust is not trained (train.py), as the noise of the rewards would move it up and down.
    """
    if not compares(args.router):
        return []
    experts = dataset.writers
    if not args.reading_steps:
        experts = list(range(len(dataset.visible_alone)))
    return experts if len(experts) >= 2 else []


def draw_pair(shares, indices, u):
    """Draw two different experts for each problem.

    shares (B, E): how much each problem attends to each expert. indices: those of the n candidates.
    u (B, 2): random numbers in [0, 1). Returns (B, 2), indices of experts.

    The first is drawn with the probabilities of the attention (80%) mixed with equal ones (20%), so that
    every expert is tried sometimes. The second is any of the others, with equal probability. With two
    candidates both are always drawn; their order does not matter.
    """
    indices = torch.tensor(indices, device=shares.device)
    n = len(indices)

    # First: the attention among the candidates, scaled to sum to 1 and mixed with an even draw.
    p = shares[:, indices]
    p = p / p.sum(1, keepdim=True).clamp(min=1e-9)
    p = (1 - EXPLORE) * p + EXPLORE / n

    # p = (0.2, 0.5, 0.3) has the edges 0.2 and 0.7. The number of edges that u has passed is the candidate:
    # 0 for u = 0.1, 1 for u = 0.4, 2 for u = 0.9.
    edges = p.cumsum(1)[:, :-1]  # (B, n - 1)
    first = (edges <= u[:, :1]).sum(1)  # (B,)

    # Second: one of the n - 1 others, 1 to n - 1 places further on; after the last comes the first.
    distance = 1 + (u[:, 1] * (n - 1)).long()
    second = (first + distance) % n
    return torch.stack((indices[first], indices[second]), dim=1)


def pair_probabilities(attention, expert_of_state, pair):
    """How a problem's attention divides between its two experts. Returns p (B, 2); p[b] sums to 1.

    attention (B, heads, L, N) is the full one, with all experts visible; pair (B, 2). If a problem attends
    to three experts with 0.6, 0.2 and 0.2, and the pair is (0, 1), p is (0.75, 0.25).
    """
    shares = by_expert(attention, expert_of_state).mean((1, 2))  # (B, E)
    p = shares.gather(1, pair)
    return p / p.sum(1, keepdim=True).clamp(min=1e-30)


def choice_loss(p, half_rewards):
    """How surprised the router is by the better half of each pair, summed over the problems.

    p (B, 2), with gradient, from `pair_probabilities`; half_rewards R (B, 2), the mean reward of the half
    that saw each expert. With w the better expert and l the other one of a problem:

        loss  =  sum over problems of   - (R_w - R_l) * log p_w

    This is logistic regression on "which expert was better" (the Bradley-Terry model), where each problem has
    the weight R_w - R_l. With p = (0.5, 0.5) and R = (1, 0) the loss is log 2 = 0.69, and a step down its
    gradient gives expert 0 a larger p. With R = (1, 1) or (0, 0) there is nothing to learn.

    Why not the expected reward, - sum of p R? p_w is roughly sigmoid(trust of w - trust of l), and its
    derivative with respect to this difference is p_w (1 - p_w). That is nearly 0 when p_w is nearly 0: if
    trust has once gone far in a wrong direction, it hardly comes back. The derivative of log p_w is 1 - p_w,
    which is then nearly 1. (Below p_w = 1e-30, a difference of 69, nothing comes back.)
    """
    lead = half_rewards - half_rewards.flip(1)  # (B, 2): R_0 - R_1 and R_1 - R_0
    weight = lead.clamp(min=0)  # R_w - R_l for the better expert, 0 for the other one
    log_p = p.clamp(min=1e-30).log()
    return -(weight * log_p).sum()


# -- Stage 0: learn to read the experts, one at a time, from what they themselves would say

def learn_words(policy, router, dataset, args):
    """Words, the router alone: context token i learns to be the policy's embedding of target token i.

    The target is the last token of the prompt, followed by what the one visible expert would say; only the
    first L of these tokens count. For the prompt "3 + 4 =" and an expert that says 7, it is "= 7 <stop>".
    Context tokens after the stop token have no target: reading and GRPO decide what they become.

    Why begin with "="? A language model tends to repeat: when a token appears again, it writes what followed
    this token the first time (induction heads, 2209.11895). The policy meets "=" in the context, followed by
    7, and at the end of the prompt a second time, where it tends to continue with 7.

    A generator: each turn of the caller's loop is one training step, and yields its loss per token.
    """
    optimizer = make_optimizer(policy, router, lr=0.0, router_lr=args.words_lr)  # LoRA stays as it is
    vocabulary = words_vocabulary(dataset)
    for step in range(args.words_steps):
        set_rates(optimizer, stage0_rate(step, args.words_steps))
        loss, n_tokens = words_step(policy, router, dataset, vocabulary, args, step)
        loss = loss / all_reduce_sum(n_tokens)
        loss.backward()
        update(optimizer)
        yield all_reduce_sum(loss.item())


def words_step(policy, router, dataset, vocabulary, args, step):
    """One step of `learn_words` on this rank's problems: (loss summed over tokens, number of tokens)."""
    # Draw problems, and for each of them one expert that is visible.
    seed = args.seed * 1_000_003 + step
    indices, shown = draw_stage0(dataset.words_by_text, dataset.writers, WORDS_BATCH, seed)
    visible = dataset.visible_alone[shown].to(dataset.device)
    context, _ = router(dataset.states(indices), visible)

    # The target: the last token of the prompt, then the expert's text.
    targets = []
    for i, e in zip(indices, shown):
        targets.append([dataset.ids[i][-1], *dataset.targets[e][i]])
    return words_loss(policy, context, targets, vocabulary)


def learn_to_read(policy, router, dataset, args):
    """Reading: context and prompt in, the expert's text out. It trains LoRA and, at a lower rate, the router.

    With a router that has no context the same texts are learned from the prompt alone: a control.
    A generator, like `learn_words`: each turn is one training step, and yields its loss per token.
    """
    optimizer = make_optimizer(policy, router, lr=args.reading_lr, router_lr=args.reading_lr / ROUTER_SLOWER)
    for step in range(args.reading_steps):
        set_rates(optimizer, stage0_rate(step, args.reading_steps))
        loss = reading_gradients(policy, router, dataset, args, step)
        update(optimizer)
        yield all_reduce_sum(loss)


def reading_gradients(policy, router, dataset, args, step):
    """Add up the gradients of one step of `learn_to_read` in the parameters' .grad.

    Returns this rank's summed loss, divided by the tokens of all ranks: the sum of it over the ranks is the
    loss per token.
    """
    # Draw problems, and for each of them one expert that is visible. What would this expert say?
    seed = args.seed * 1_000_003 + args.words_steps + step
    indices, shown = draw_stage0(dataset.reading_by_text, dataset.writers, READING_BATCH, seed)
    targets = [dataset.targets[e][i] for i, e in zip(indices, shown)]
    n_tokens = all_reduce_sum(sum(len(ids) for ids in targets))

    # How likely are these texts? A gradient pass has at most --micro_batch prompts: that bounds memory.
    lengths = torch.tensor([len(dataset.ids[i]) for i in indices])
    total = 0.0
    for rows in micro_batches(lengths, args.micro_batch):
        batch = dataset.batch([indices[row] for row in rows])
        batch.visible = dataset.visible_alone[[shown[row] for row in rows]].to(dataset.device)
        context, _ = router(batch.H, batch.visible)
        loss = reading_loss(policy, batch, context, [targets[row] for row in rows]) / n_tokens
        loss.backward()
        total += loss.item()
    return total


def words_and_reading(args):
    """(steps of words, steps of reading) of stage 0.

    Words need a router that reads states, and a policy that then learns to read: without steps of reading
    there is no stage 0 at all.
    """
    has_words = args.reading_steps and reads_states(args.router)
    return (args.words_steps if has_words else 0), args.reading_steps


def stage0_parts(problems):
    """The problems of stage 0: (those of reading, those of words), as two lists of indices.

        | GRPO begins here | reading | words             |
        0                 1/4       1/2                  1     of the problems

    Why do words and reading use different problems? In its steps of words the router memorizes states, so
    that its context for these problems is too good. The policy must learn to read the context of problems
    that are new to the router. GRPO takes the problems in order from the first one on; a long run also
    reaches the others.

    A small dataset repeats its questions when more problems are wanted than it has. Then the same question
    could stand in both parts. So its different questions are divided instead: the first third for reading,
    the others for words. (A single question serves for both.)
    """
    # Where does each question come first?
    first_places = {}
    n_problems = Counter()
    for i, problem in enumerate(problems):
        n_problems[problem.dataset] += 1
        questions = first_places.setdefault(problem.dataset, {})
        questions.setdefault(problem.question, i)

    half = len(problems) // 2
    quarter = half // 2
    reading, words = [], []
    for dataset, questions in first_places.items():
        indices = list(questions.values())
        repeats = len(indices) < n_problems[dataset]
        if repeats:
            third = max(1, len(indices) // 3)
            reading += indices[:third]
            words += indices[third:] or indices
        else:
            reading += [i for i in indices if quarter <= i < half]
            words += [i for i in indices if half <= i]
    return sorted(reading), sorted(words)


def group_by_text(texts, indices):
    """Indices of problems -> one list for each different text of the expert; problems without text left out.

    With the texts ["7", "3", "7", ""] the indices 0 to 3 become [[0, 2], [1]].
    """
    groups = {}
    for i in indices:
        if texts[i]:
            groups.setdefault(texts[i], []).append(i)
    return list(groups.values())


def draw_stage0(by_text, writers, size, seed):
    """This rank's part of `size` draws of stage 0: a list of problems, and a list of experts, as indices.

    by_text [experts][different texts][problems]: see `group_by_text`. Each draw takes an expert that writes,
    then one of its different texts, then a problem with this text. A text that comes n times is drawn with a
    weight of sqrt(n). If all problems had the same weight, a rare answer such as -13 would hardly be learned.
    If all texts had the same weight, an expert's many odd answers to questions that it does not understand
    would crowd out the others. The draw depends on the seed alone. Raises ValueError if no expert says
    anything.
    """
    writers = [e for e in writers if by_text[e]]
    if not writers:
        raise ValueError("no expert writes anything that stage 0 could teach to read: use --reading_steps 0, "
                         "a --cue, or a higher --write")
    generator = random.Random(seed)
    weights = {e: [math.sqrt(len(problems)) for problems in by_text[e]] for e in writers}
    indices, experts = [], []
    for _ in range(size):
        e = generator.choice(writers)
        same_text = generator.choices(by_text[e], weights[e])[0]  # the problems with one text
        indices.append(generator.choice(same_text))
        experts.append(e)
    return my_part(indices), my_part(experts)


def stage0_rate(step, steps):
    """The learning rate of a step of stage 0, as a fraction: it falls linearly from 1 to nearly 0."""
    return 1 - step / steps


def words_vocabulary(dataset):
    """The token ids that occur in what the experts say, or at the end of a prompt, in order."""
    used = {ids[-1] for ids in dataset.ids}
    for column in dataset.targets:
        for ids in column:
            used.update(ids)
    return sorted(used)


def words_loss(policy, context, targets, vocabulary):
    """How far the context tokens are from the embeddings of the target tokens.

    context (B, L, d), targets [B][tokens] (longer ones are cut at L), vocabulary: the possible target tokens.
    Returns the sum over all target tokens, and their number.

    Two terms for a context token c and its target's embedding e: the cross-entropy of the inner products
    c . e' / sqrt(d) with the embeddings e' of the vocabulary, so that the right one has the largest; and
    0.1 times the mean square of c - e, which also brings c to the right norm. For example, with two tokens in
    the vocabulary and inner products of 2 (right) and 0 (wrong) the cross-entropy is log(1 + exp(-2)) = 0.13.
    """
    B, L, d = context.shape

    # The embeddings of the vocabulary, n tokens. The policy will read prefix_origin + embed_std * context
    # (`Policy.prepend`; both are statistics of its embeddings). So the context token that stands for an
    # embedding is (embedding - prefix_origin) / embed_std.
    embeddings = (policy.embed[vocabulary].float() - policy.prefix_origin) / policy.embed_std  # (n, d)
    place = {token: i for i, token in enumerate(vocabulary)}

    # The target of each context token: a place in the vocabulary, -1 where there is none.
    rows = []
    for ids in targets:
        places = [place[token] for token in ids[:L]]
        rows.append(places + [-1] * (L - len(places)))
    target = torch.tensor(rows, device=context.device)  # (B, L)

    has_target = target >= 0
    c, wanted = context[has_target], target[has_target]  # (M, d), (M,): the M tokens that have a target
    e = embeddings[wanted]  # (M, d)
    inner_products = c @ embeddings.T / d**0.5  # (M, n)
    cross_entropy = F.cross_entropy(inner_products, wanted, reduction="sum")
    distance = (c - e).square().mean(-1).sum()
    return cross_entropy + 0.1 * distance, len(wanted)


def reading_loss(policy, batch, context, targets):
    """Minus the log-probability of the texts after their prompts, summed over all tokens.

    targets [B][tokens], stop token included.
    """
    # Put the texts into one tensor. `Policy.score` takes G completions of each prompt; here G is 1.
    B = len(targets)
    T = max(len(ids) for ids in targets)
    tokens = torch.zeros(B, 1, T, dtype=torch.long)
    mask = torch.zeros(B, 1, T, dtype=torch.bool)
    for b, ids in enumerate(targets):
        tokens[b, 0, :len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[b, 0, :len(ids)] = True

    # How likely are they? The log-probability of padding is 0.
    device = batch.H.device
    logp, _ = policy.score(batch, context, tokens.to(device), mask.to(device))
    return -logp.sum()


# -- The optimizer

def make_optimizer(policy, router, lr, router_lr, trust_lr=0.0, moments=None):
    """AdamW over LoRA, the router and the router's trust, each with a learning rate of its own.

    Trust has a rate of 0 in stage 0, in preset *paper* (--trust_lr 0), and where --router attention has no
    two experts to compare; it then stays as it is. With --router mixed the GRPO loss trains it. The betas are
    0.9 and 0.98: a memory shorter than the usual 0.999 suits runs of few hundred steps.
    moments: those of a checkpoint, {index of the parameter: {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}
    """
    trust, others = [], []
    for name, parameter in router.named_parameters():
        if name.startswith("trust"):
            parameter.requires_grad_(trust_lr > 0)
            trust.append(parameter)
        else:
            others.append(parameter)

    groups = [dict(params=list(policy.parameters()), lr=lr, full_lr=lr, name="lora"),
              dict(params=others, lr=router_lr, full_lr=router_lr, name="router"),
              dict(params=trust if trust_lr else [], lr=trust_lr, full_lr=trust_lr, name="trust")]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    if moments:
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))
    return optimizer


def set_rates(optimizer, fraction):
    """Set all learning rates to a fraction of the full ones."""
    for group in optimizer.param_groups:
        group["lr"] = fraction * group["full_lr"]


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def update(optimizer):
    """One step of stage 0, with the gradients of all ranks.

    Raises ValueError for a gradient that is not finite.
    """
    norm = clip_gradients(parameters_of(optimizer))
    if not math.isfinite(norm):
        raise ValueError("a gradient of stage 0 is not finite: start again with a lower --reading_lr "
                         "and --words_lr")
    optimizer.step()
    optimizer.zero_grad()


def clip_gradients(parameters):
    """Sum the gradients over the ranks, and clip their norm. Returns the norm before clipping."""
    all_reduce_gradients(parameters)
    return torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP).item()


# -- Problems, with the experts' states and texts and the policy's tokens, all computed once

@dataclass
class Batch:
    """B problems, ready for the policy and the router."""
    problems: list                 # B
    tokens: torch.Tensor           # (B, P) the prompts, padded on the right
    lengths: torch.Tensor          # (B,) their real lengths
    H: torch.Tensor                # (B, N, D) the experts' states
    visible: torch.Tensor          # (B, N) False hides a state from the router
    visible_alone: torch.Tensor    # (E, N) what is visible when one expert is shown, see Dataset

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, rows):
        """Some of the problems: rows is a tensor of indices. Padding that none of them needs is cut off."""
        problems = [self.problems[i] for i in rows.tolist()]
        rows = rows.to(self.H.device)
        lengths = self.lengths[rows]
        tokens = self.tokens[rows, :bucket(lengths.max().item())]
        return Batch(problems, tokens, lengths, self.H[rows], self.visible[rows], self.visible_alone)

    def with_experts(self, pair):
        """Each problem twice, with the one and with the other expert of its pair (B, 2): 2 B problems."""
        twice = self[torch.arange(len(self)).repeat_interleave(2)]
        twice.visible = self.visible_alone[pair.flatten()]
        return twice


def ask_experts(problems, policy, experts, args):
    """Let every expert write and read all problems of a run, so that the results are in the cache on disk.

    The datasets of the three splits find them there. So each expert is loaded only once for each kind of
    result (thoughts, texts, states), and not once more for each split.
    """
    # Experts may need hours. So first check that the longest prompts fit into all windows, the policy's and
    # theirs: `check_window` and `tokenize` raise ValueError if not. (All prompts are checked later. With
    # --router text the policy's prompts hold texts that are not written yet.)
    longest = sorted(problems, key=lambda problem: len(problem.question))[-32:]
    if not shows_texts(args.router):
        _, ids = policy_prompts(longest, policy, args.answer_format)
        check_window(ids, 0, policy, args)
    for expert in experts:
        asked = needs_texts(args) and expert.writes
        if asked or reads_states(args.router):
            expert.tokenize([expert.prompt(problem) for problem in longest], expert.room_for_a_run(asked))

    # Ask them.
    prompts = expert_prompts(problems, experts)
    if needs_texts(args):
        write_texts(experts, prompts, RANK == 0)
    if reads_states(args.router):
        read_states(experts, prompts, RANK == 0)
    barrier()  # the results of all ranks are there


def expert_prompts(problems, experts):
    """[experts][problems]: what each expert reads of this rank's part of the problems."""
    columns = []
    for expert in experts:
        columns.append([expert.prompt(problem) for problem in my_part(problems)])
    return columns


def policy_prompts(problems, policy, answer_format):
    """What the policy reads of each problem: n texts, and their token ids, n lists."""
    prompt_format = prompt_format_of(answer_format)
    prompts = [render_prompt(problem, prompt_format, policy.tokenizer) for problem in problems]
    return prompts, prompt_ids(policy.tokenizer, prompts, prompt_format, policy.config.stop)


def prompt_format_of(answer_format):
    """A plain answer follows a plain prompt, a tagged answer a chat."""
    return "plain" if answer_format == "plain" else "chat"


def layout_of_states(experts):
    """The width of each state, and the expert that it belongs to: two lists of N numbers."""
    widths, expert_of_state = [], []
    for e, expert in enumerate(experts):
        widths += [expert.width] * expert.states_per_problem
        expert_of_state += [e] * expert.states_per_problem
    return widths, expert_of_state


def needs_texts(args):
    """Does this run need what the experts say?"""
    return bool(args.reading_steps or shows_texts(args.router))


class Dataset:
    """Problems, with what the experts make of them and what the policy reads.

    problems         n of them
    prompts          n texts: what the policy reads
    ids              n lists: the tokens of these prompts
    H                (n, N, D): the experts' states; (n, 0, 0) where none are read
    expert_of_state  (N,): which expert each state belongs to
    texts            [experts][n]: what each expert would say; [] if the run does not need it
    targets          [experts][n]: these texts as the policy's tokens, stop token included; [] for no text
    writers          the indices of the experts that say anything
    words_by_text    [experts][different texts][problems]: what `learn_words` draws from, see `group_by_text`
    reading_by_text  the same for `learn_to_read`
    visible_alone    (E, N): which states are visible when expert e is shown. These are its own states and, if
                     the run uses texts, the states of all experts that write nothing, such as encoders,
                     because stage 0 cannot teach to read encoders one by one.
    Raises ValueError for a prompt that does not fit into the policy's window.
    """

    def __init__(self, problems, policy, experts, args, progress=True):
        self.problems = problems
        self.device = policy.embed.device
        shows_progress = progress and RANK == 0

        # Let each expert write what it would say, and read the states. Both come from a cache on disk.
        columns = expert_prompts(problems, experts)
        self.texts = []
        if needs_texts(args):
            parts = all_gather(write_texts(experts, columns, shows_progress))  # [ranks][experts][problems]
            self.texts = [[text for part in parts for text in part[e]] for e in range(len(experts))]
        self.H = torch.zeros(len(problems), 0, 0)
        if reads_states(args.router):
            self.H = torch.cat(all_gather(read_states(experts, columns, shows_progress)))
        _, expert_of_state = layout_of_states(experts)
        self.expert_of_state = torch.tensor(expert_of_state, dtype=torch.long)

        # A control experiment replaces states or texts.
        control = CONTROLS[args.control]
        self.H, self.texts = control(self.H, self.texts, problems, self.expert_of_state, args.seed)

        # Which experts write, and which problems stage 0 draws.
        self.writers = [e for e, column in enumerate(self.texts) if any(column)]
        reading_part, words_part = stage0_parts(problems)
        self.reading_by_text = [group_by_text(column, reading_part) for column in self.texts]
        self.words_by_text = [group_by_text(column, words_part) for column in self.texts]

        # What is visible when one expert is shown.
        only_reads = torch.zeros(len(experts), dtype=torch.bool)
        if self.texts:
            only_reads = torch.tensor([e not in self.writers for e in range(len(experts))], dtype=torch.bool)
        self.visible_alone = torch.zeros(0, len(self.expert_of_state), dtype=torch.bool)
        if experts:
            own = torch.arange(len(experts))[:, None] == self.expert_of_state
            self.visible_alone = own | only_reads[self.expert_of_state]

        # The policy's prompts. With --router text, what the experts say stands before the question.
        asked = problems
        if shows_texts(args.router):
            asked = []
            for i, problem in enumerate(problems):
                answers = ""
                for e, expert in enumerate(experts):
                    if expert.writes:
                        answers += f"{expert.name}: {self.texts[e][i]}\n"
                asked.append(replace(problem, question=answers + problem.question))
        self.prompts, self.ids = policy_prompts(asked, policy, args.answer_format)

        # The experts' texts as the policy would write them after its prompt.
        self.targets = [self.as_answers(column, policy, args.answer_format) for column in self.texts]
        longest_text = max((len(ids) for column in self.targets for ids in column), default=0)
        check_window(self.ids, longest_text, policy, args)

    def as_answers(self, texts, policy, answer_format):
        """Token ids of n texts as answers to the n prompts, stop token included; [] for no text.

        They are the tokens of prompt and answer, without those of the prompt: a tokenizer may split an answer
        differently when it stands alone.
        """
        answers = []
        for text in texts:
            answers.append(f"<answer>{text}</answer>" if answer_format == "tagged" else f" {text}")
        together = [prompt + answer for prompt, answer in zip(self.prompts, answers)]
        together_ids = prompt_ids(policy.tokenizer, together, prompt_format_of(answer_format),
                                  policy.config.stop)
        alone_ids = policy.tokenizer(answers, add_special_tokens=False)["input_ids"]

        targets = []
        for i, text in enumerate(texts):
            n = len(self.ids[i])
            # If prompt and answer merge into one token, the answer's own tokens are the best there is.
            merged = together_ids[i][:n] != self.ids[i]
            ids = alone_ids[i] if merged else together_ids[i][n:]
            targets.append([*ids, policy.config.stop[0]] if text else [])
        return targets

    def __len__(self):
        return len(self.problems)

    def states(self, indices):
        """H of some problems (B, N, D), in fp32 on the policy's device."""
        return self.H[indices].float().to(self.device)

    def batch(self, indices):
        """Some problems as a Batch in which all experts are visible."""
        indices = list(indices)

        # Pad the prompts on the right, to a round number of tokens.
        ids = [self.ids[i] for i in indices]
        lengths = [len(row) for row in ids]
        width = bucket(max(lengths))
        padded = [row + [0] * (width - len(row)) for row in ids]

        # Show all experts.
        n_states = self.H.shape[1]
        visible = torch.ones(len(indices), n_states, dtype=torch.bool, device=self.device)

        return Batch(problems=[self.problems[i] for i in indices],
                     tokens=torch.tensor(padded).to(self.device),
                     lengths=torch.tensor(lengths).to(self.device),
                     H=self.states(indices),
                     visible=visible,
                     visible_alone=self.visible_alone.to(self.device))


def check_window(ids, longest_text, policy, args):
    """Raises ValueError if a prompt (token ids), context and answer do not fit into the policy's window."""
    room = policy.window - max(args.max_new, longest_text) - args.latents
    longest = max(map(len, ids))
    if longest > room:
        raise ValueError(f"a prompt of {longest} tokens, {args.latents} --latents and an answer do not fit "
                         f"into the policy's window of {policy.window} tokens: use an easier --level, a "
                         "lower --max_new, --write or --latents, or another --policy")


# Control experiments: functions that replace the states H (n, N, D) of a Dataset; they may also replace the
# texts [experts][n]. To add one, write a function like these and add it to CONTROLS.

def no_control(H, texts, problems, expert_of_state, seed):
    return H, texts


def shuffled_states(H, texts, problems, expert_of_state, seed):
    """Every problem has the states of another one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(H), generator=generator)
    shuffled = H.clone()
    shuffled[order] = H[order.roll(1)]
    return shuffled, texts


def noise_states(H, texts, problems, expert_of_state, seed):
    """Noise with the mean and the standard deviation of the states, and nothing else of them."""
    generator = torch.Generator().manual_seed(seed)
    std, mean = torch.std_mean(H.float(), dim=0, correction=0)
    return (mean + std * torch.randn(H.shape, generator=generator)).to(H.dtype), texts


CONTROLS = {  # by --control
    "none": no_control,
    "shuffled": shuffled_states,
    "noise": noise_states,
    "untrained": no_control,  # experts with random weights, see build
}

# The states that these two make depend on how many problems there are. So a run with one of them cannot be
# continued for more steps.
DRAWN_FOR_ALL = ("shuffled", "noise")


def n_training_problems(args):
    """How many training problems a run uses: all that GRPO needs, and enough for stage 0.

    At least 32, as the router measures mean and std of the states on them.
    """
    for_stage0 = args.stage0_problems if args.reading_steps else 0
    return max(32, args.steps * args.batch, for_stage0)


def load_problems(args, split, n=None):
    """The problems of a split: n of them, by default as many as the run needs.

    Training problems are shuffled within blocks of fixed size, so that a longer run begins with the same
    ones. A small dataset gives as many held-out problems as it has. Raises ValueError if there are fewer
    problems than ranks.
    """
    if split != "train":
        skipped = args.test_skip if split == "test" else 0
        n = skipped + (n or getattr(args, split))
        problems = get_problems(args.task, split, n, args.data, args.level, skipped + WORLD, RANK == 0)
        return problems[skipped:]

    n = n or n_training_problems(args)
    block = max(256, 8 * args.batch)
    n_blocks = math.ceil(n / block)
    problems = get_problems(args.task, "train", n_blocks * block, args.data, args.level, 1, RANK == 0)
    for start in range(0, len(problems), block):
        part = problems[start:start + block]
        random.Random(f"{args.seed} {start}").shuffle(part)
        problems[start:start + block] = part
    return problems[:n]


def build(args):
    """The policy, the experts and the router of a run, from its settings.

    Also fills in what the settings leave open: args.answer_format and args.dtype, and the revision of models
    from the hub, so that --resume finds the same weights.
    """
    torch.manual_seed(args.seed)

    # The experts: tokenizers and sizes. Their weights are loaded only while they read.
    experts = []
    for source in args.experts:
        expert = Expert(source, args.states, args.layers, max_new=args.write, cue=args.cue,
                        think=args.think, device=args.device, untrained=args.control == "untrained")
        if expert.name in [other.name for other in experts]:
            expert.name += f"-{len(experts)}"  # attention is reported by name, so names must differ
        experts.append(expert)
    if args.reading_steps and not any(expert.writes for expert in experts):
        raise ValueError("stage 0 needs an expert that writes, and these only read: use --reading_steps 0, "
                         "or add another expert")

    # The policy. We also make an Expert from its folder, only to find the tokenizer and the size.
    policy_files = Expert(args.policy)
    if args.answer_format == "auto":
        args.answer_format = "tagged" if policy_files.prompt_format == "chat" else "plain"
    if args.answer_format == "tagged" and policy_files.prompt_format == "plain":
        raise ValueError(f"{policy_files.name} has no chat template: use --answer_format plain, or a "
                         "--policy that has one")
    if args.dtype == "auto":
        args.dtype = str(pick_dtype(args.device, policy_files.params)).removeprefix("torch.")
    policy = Policy.from_pretrained(args.policy, args.lora_rank, getattr(torch, args.dtype), args.device,
                                    args.prefix_origin)
    policy.tokenizer = policy_files.tokenizer
    if args.answer_format == "plain":  # the answer is the first line
        policy.stop_at([*policy.config.stop, *line_ends(policy.tokenizer)])

    # The router. A fresh prefix is prefix_origin + std * C, and init_scale is the size of C: small around the
    # mean embedding, larger around zero.
    init_scale = 0.02 if args.prefix_origin == "mean" else 0.5
    widths, expert_of_state = layout_of_states(experts)
    router = ROUTERS[args.router](widths, expert_of_state, policy.config.hidden_size, args.latents,
                                  args.router_dim, init_scale)

    args.policy = policy_files.pinned
    args.experts = [expert.pinned for expert in experts]
    return policy, experts, router.to(args.device)


# -- Plumbing. Nothing below is about the method; skip it at first reading.

# Several devices: every rank runs the same program on its part of the problems. torchrun sets these two.

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def my_part(items):
    """This rank's part of a list or tensor. Parts are contiguous, and their lengths differ by one at most."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]


def collective(operation, *args, **options):
    """Run an operation of torch.distributed. Raises ConnectionError if another rank has died."""
    if WORLD == 1:
        return
    try:
        operation(*args, **options)
    except RuntimeError as error:  # gloo's only kind of error; nccl's is a subclass of it
        raise ConnectionError("another rank has stopped, see what it printed "
                              f"({first_line(error)})") from error


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; tensors in it must be on the CPU."""
    values = [value] * WORLD
    collective(dist.all_gather_object, values, value)
    return values


def all_reduce_sum(number):
    """A number, summed over the ranks."""
    return sum(all_gather(number))


def barrier():
    """Wait for all ranks."""
    all_gather(None)


def all_reduce_gradients(parameters):
    """Replace every gradient by its sum over the ranks: one flat tensor, one all-reduce."""
    if WORLD == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    collective(dist.all_reduce, flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, summed in zip(parameters, flat.split(sizes)):
        parameter.grad = summed.view_as(parameter)


@contextlib.contextmanager
def ranks():
    """A process group for the duration of a run. Only rank 0 prints."""
    minutes = float(os.environ.get("N_MUSKETEERS_TIMEOUT", 30))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    collective(dist.init_process_group, backend, timeout=timedelta(minutes=minutes))
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
            yield
    collective(dist.destroy_process_group)


# A run's folder: config.json, records as .jsonl, checkpoints as .safetensors, and a lock.

def write_config(out, args, experts):
    """Write config.json: the settings, the experts' names, and the fingerprints of models and data."""
    settings = dict(vars(args))
    settings["policy"] = portable(args.policy)
    settings["experts"] = [portable(source) for source in args.experts]
    models = [model_fingerprint(source) for source in (args.policy, *args.experts)]
    config = dict(args=settings, names=[expert.name for expert in experts], models=models,
                  data=data_fingerprint(args.data), ranks=WORLD, torch=torch.__version__)
    write_atomic(out / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def read_config(folder):
    """What `write_config` wrote, as a dict of args, names, models, data and ranks.

    Raises ValueError if the folder holds no run, or its config.json cannot be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run yet (no config.json): name a folder that train.py wrote. If "
                         "a run there was stopped while its experts were reading, start the same command "
                         "again: what they have read is kept")
    try:
        config = json.loads(path.read_text())
        return dict(args=dict(config["args"]), models=list(config["models"]), ranks=int(config["ranks"]),
                    # Older programs did not write these two.
                    names=list(config.get("names", [])), data=config.get("data", ""))
    except (ValueError, KeyError, TypeError) as error:
        raise bad_config(folder, error) from error


def import_extension(path):
    """Import a Python file. A relative path starts in the current folder, or else in the repository.

    Raises ValueError if it is not there.
    """
    path = expand_home(path, "--extension")
    if not path.is_file() and (REPOSITORY / path).is_file():
        path = REPOSITORY / path
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"--extension {path} is not there, or is no .py file: name a Python file")
    # The file may be called router.py, or like a package. So give the module a name that nobody else has.
    spec = importlib.util.spec_from_file_location(f"extension_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bad_config(folder, error):
    return ValueError(f"{folder}/config.json is damaged, or of another version of this program: start the "
                      f"run again in another folder ({first_line(error)})")


def check_names(folder, args):
    """Raises ValueError if the run uses a router or a control that is not registered in this process."""
    for option, name, registry, place in (("router", args.router, ROUTERS, "router.ROUTERS"),
                                          ("control", args.control, CONTROLS, "rlvr.CONTROLS")):
        if name not in registry:
            raise ValueError(f"the {option} of {folder}, {name!r}, is not in {place}: import the file that "
                             "adds it, with --extension FILE")


def model_fingerprint(source):
    """What tells one model from another: the commit of a hub model, or a checksum of a folder's weights."""
    folder, revision = find_model(source)
    return revision or weights_fingerprint(folder)


def keep_names(folder, experts):
    """Give the experts the names that they had when the run began, also where their folders are called
    otherwise now: the curves of a run are drawn by these names."""
    for expert, name in zip(experts, read_config(folder)["names"]):
        expert.name = name


def check_models(folder, args, fingerprints):
    """Raises ValueError if the models of `args` do not have the weights that the run was made with."""
    n_experts = len(fingerprints) - 1
    if len(args.experts) != n_experts:
        raise ValueError(f"{folder} was trained with {n_experts} experts, and --experts names "
                         f"{len(args.experts)}: name all of them, in the same order")
    for source, expected in zip((args.policy, *args.experts), fingerprints):
        if model_fingerprint(source) != expected:
            raise ValueError(f"{source} does not hold the weights that {folder} was trained with: name the "
                             "folder that does, with --policy or --experts")


def check_data(folder, args, fingerprint):
    """Raises ValueError if the file or folder of --data is not there, or has changed since the run began.

    Another line in it would move problems from one split to another: the run would be tested on problems that
    it was trained on.
    """
    if not args.data or not fingerprint:
        return
    if not Path(args.data).expanduser().exists():
        raise ValueError(f"--data {args.data} of {folder} is not there: if it has moved, name its new place "
                         "with --data")
    if data_fingerprint(args.data) != fingerprint:
        raise ValueError(f"{args.data} is not what it was when {folder} was trained, so the run may have "
                         "been trained on what are test problems now: name a copy of the old file with "
                         "--data, or start another run")


def open_run(folder, device="auto", stage0=False, policy=None, experts=None, data=None):
    """(args, policy, experts, router) of a run at its newest checkpoint, or of its state after stage 0.

    policy, experts, data: where the same models and the same problems lie now, if they have moved. Raises
    ValueError for a folder that holds no run or no checkpoint, or whose models or problems have changed.
    """
    config = read_config(folder)
    args = Namespace(**config["args"])
    try:
        check_names(folder, args)
        args.policy = policy or args.policy
        args.experts = experts or args.experts
        args.data = data or args.data
        args.device = pick_device(device)
        check_models(folder, args, config["models"])
        check_data(folder, args, config["data"])
        policy, experts, router = build(args)
        keep_names(folder, experts)
    except (AttributeError, TypeError) as error:
        if getattr(args, "extension", ""):
            raise  # a mistake in the extension is more likely: show where
        raise bad_config(folder, error) from error

    if stage0:
        found = list(Path(folder).glob("stage0-*.safetensors"))
        if not found:
            raise ValueError(f"{folder} has no weights of stage 0: it had none, or has not finished it yet")
        load_checkpoint(found[0], policy, router)
    elif not load_newest(Path(folder), policy, router)[0]["step"]:
        raise ValueError(f"{folder} has no checkpoint of GRPO yet: continue it with train.py --resume "
                         f"{folder}")
    return args, policy, experts, router


def without_nan(value):
    """The same record with None in place of numbers that JSON does not know: NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append(path, record):
    """Add a record to a .jsonl file."""
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")


def read_records(path):
    """The records of a .jsonl file, [] if there is none. A torn last line of a killed process is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def drop_records(path, progress):
    """Drop the records that are newer than the checkpoint, as these steps will be made again."""
    stage0_is_done = progress["stage0"]
    kept = []
    for record in read_records(path):
        of_stage0 = path.name == "stage0.jsonl"
        if record.get("step", 0) <= progress["step"] and (stage0_is_done or not of_stage0):
            kept.append(record)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


@contextlib.contextmanager
def one_process(out):
    """Only one process trains in a folder. The lock is released when the process ends, however it ends.

    Raises ValueError if another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / "lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process trains in {out}: wait for it, or choose another --out") from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{out} cannot be locked, as its file system has no locks ({first_line(error)}): make "
                      "sure that only one process trains there", stacklevel=3)
    try:
        for torn in out.glob("*.part"):  # a file that was being written when a process was killed
            torn.unlink()
        yield
    finally:
        lock.release()


# A checkpoint is one safetensors file, which cannot run code: the weights, AdamW's moments, the random
# generators of the ranks, and how far the run is, as JSON text.

def trained_tensors(policy, router):
    """{name: tensor} of everything that training changes or measures: LoRA and the router."""
    tensors = {f"policy.{name}": parameter.detach() for name, parameter in policy.named_parameters()}
    for name, tensor in router.state_dict().items():
        tensors[f"router.{name}"] = tensor
    return tensors


def save_checkpoint(path, policy, router, progress, optimizer, generator):
    """All ranks call this, rank 0 writes <path><checksum>.safetensors. optimizer: None for no moments."""
    tensors = trained_tensors(policy, router)
    for rank, state in enumerate(all_gather(generator.get_state())):
        tensors[f"generator.{rank}"] = state
    if optimizer:
        for i, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                tensors[f"optimizer.{i}.{name}"] = moment
    tensors["progress"] = torch.tensor(list(json.dumps(progress).encode()), dtype=torch.uint8)
    if RANK == 0:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(path.parent, tensors, path.name)
    barrier()  # from here the file exists for all ranks


def load_checkpoint(path, policy, router, generator=None):
    """Load weights and generator from a checkpoint. Returns (progress, AdamW's moments).

    Raises ValueError, before anything is changed, for a file that is damaged or belongs to other models.
    """
    saved, current = read_tensors(path), trained_tensors(policy, router)
    shapes = {name: t.shape for name, t in saved.items() if name.startswith(("policy.", "router."))}
    if shapes != {name: t.shape for name, t in current.items()}:
        raise ValueError(f"{path} was made for other models: its tensors have other names or shapes")

    for name, tensor in current.items():
        tensor.copy_(saved[name])
    progress = json.loads(bytes(saved["progress"].tolist()))
    if generator:
        set_generator(generator, saved[f"generator.{RANK}"], progress)
    moments = {}
    for name in saved:
        if name.startswith("optimizer."):
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = saved[name]
    return progress, moments


def set_generator(generator, state, progress):
    """Let a generator go on from a saved state; from a new seed if the state is of another kind of device."""
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
    else:
        generator.manual_seed(generator.initial_seed() + 1 + progress["step"])


def checkpoints(out):
    """The checkpoints of a run, newest first; the one after stage 0 is the last."""
    steps = sorted(out.glob("step-*.safetensors"), reverse=True)
    return steps + list(out.glob("stage0-*.safetensors"))


def load_newest(out, policy, router, generator=None):
    """Load the newest checkpoint that is complete. Returns (progress, AdamW's moments).

    A damaged one is skipped with a warning. Raises ValueError if there are some, and none can be loaded.
    """
    found = checkpoints(out)
    for path in found:
        try:
            return load_checkpoint(path, policy, router, generator)
        except ValueError as error:
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
    if found:
        raise ValueError(f"no checkpoint in {out} can be loaded, see above: start again with another --out")
    return dict(stage0=False, step=0), {}


# What a program does when something is wrong.

def run_cli(program, run):
    """Call run(), and return the exit code. What a user can fix is one printed sentence; a bug is raised."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a terminal in latin-1 must not end a run
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    try:
        run()
        return 0
    except KeyboardInterrupt:
        how_to_continue = ""
        if program == "train.py":
            how_to_continue = ("; what the experts have read is kept, and so is the last checkpoint, if "
                               "there is one; continue with train.py --resume, or, if the experts were "
                               "still reading, with the same command")
        print(f"\n{program}: stopped{how_to_continue}", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse has already said what is wrong
        return error.code
    except OSError as error:  # a full disk, a folder without permission, another rank that has stopped
        message = f"{error}: fix this and continue (train.py: with --resume)"
    except ValueError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message = "out of memory: use a device with more memory, such as --device cpu"
        if program == "train.py":
            message = ("out of memory: choose a lower --micro_batch (it may be changed with --resume), "
                       "smaller models, or a lower --batch, --group, --max_new, --think, --router_dim or "
                       "--lora_rank")
    print(f"{program}: {message}", file=sys.stderr)
    return 2


def out_of_memory(error):
    """Is this error a lack of memory? Every kind of device words it differently."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
