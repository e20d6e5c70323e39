"""
GRPO with verifiable rewards: sample a group of completions for each prompt, verify each, and make those that
did better than their own group more likely (DeepSeekMath, 2402.03300, section 4.1; settings of n-Musketeers,
2602.09173).

One step:   listen -> prefill -> rollout -> verify -> advantages -> the same prefill with gradient -> loss ->
update

What is easy to get wrong, and where it is kept right here:
- The stop token is part of the completion and receives gradient (`Policy.generate`'s mask, used by every sum
  below).
- Loss and sampler share one temperature, and the sampler has no top-k or top-p: the ratio is that of the true
  policy.
- The router is run again in the training forward (`listen` in `gradients`): with the rollout's context it
  never learns.
- One token normaliser for the whole step, known before micro-batches are cut: 1 and n of them give the same
  gradient.
- The reference of the KL term is the plain policy: LoRA off AND prefix off.
- A group whose rewards are all equal carries no information: advantage 0, and it is counted (`zero_spread`).
- With one inner epoch the ratio is 1 and the loss about 0 by construction: watch the reward, not the loss.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ranks

HOPELESS, DROUGHT = 5, 20  # steps in a row: not finite, and it stops; without spread, and it is said


@dataclass
class Batch:
    """B problems ready to run: prompt tokens (B, P) padded on the right, lengths (B,), states H (B, N, D) or
    None."""

    problems: list
    tokens: torch.Tensor
    lengths: torch.Tensor
    H: torch.Tensor | None

    def __getitem__(self, part):
        H = None if self.H is None else self.H[part]
        return Batch(self.problems[part], self.tokens[part], self.lengths[part], H)


@dataclass
class Rollout:
    """G completions of each of B problems: tokens and mask (B, G, T), texts and verdicts [B][G], rewards and
    truncated (B, G), attention (B, heads, L, N) or None, seconds spent sampling."""

    problems: list
    tokens: torch.Tensor
    mask: torch.Tensor
    texts: list
    verdicts: list
    rewards: torch.Tensor
    truncated: torch.Tensor
    attention: torch.Tensor | None
    seconds: float


def listen(router, H):
    """Context tokens (B, L, d) and attention (B, heads, L, N); (None, None) for a policy that works alone."""
    return (None, None) if router is None else router(H)


@torch.no_grad()
def rollout(policy, router, batch, tokenizer, verify, group, max_new, temperature, generator=None):
    """Sample `group` completions of every problem and verify them: verify(text, problem, truncated) ->
    verdict."""
    start = time.perf_counter()
    context, attention = listen(router, batch.H)
    cache = policy.prefill(batch.tokens, batch.lengths, context)
    tokens, mask = policy.generate(cache, group, max_new, temperature, generator)
    truncated = ~(torch.isin(tokens, policy.stop) & mask).any(-1)  # (B, G): never said that it was done
    seconds = time.perf_counter() - start
    rows = [t[m].tolist() for t, m in zip(tokens.flatten(0, 1).cpu(), mask.flatten(0, 1).cpu())]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    texts = [texts[i : i + group] for i in range(0, len(texts), group)]
    verdicts = [[verify(text, problem, bool(cut)) for text, cut in zip(row, cuts)]
                for row, problem, cuts in zip(texts, batch.problems, truncated.tolist())]
    rewards = torch.tensor([[v.reward for v in row] for row in verdicts], device=tokens.device)
    return Rollout(batch.problems, tokens, mask, texts, verdicts, rewards, truncated, attention, seconds)


def join(parts):
    """The Rollouts of all ranks (`parts`: this one's) as one, on the CPU, to be counted and shown:
    completions padded to the longest, `seconds` those of rank 0."""
    send = lambda v: v.cpu() if torch.is_tensor(v) else v
    parts = sum(ranks.gather([[send(v) for v in vars(p).values()] for p in parts]), [])

    def one(values):
        if torch.is_tensor(values[0]):
            width = max(v.shape[-1] for v in values)
            return torch.cat([F.pad(v, (0, width - v.shape[-1])) for v in values])
        return sum(values, []) if isinstance(values[0], list) else values[0]

    return Rollout(*map(one, zip(*parts)))


def advantages(rewards, scale=True):
    """How much better than its own group each completion did. rewards (B, G) -> (B, G), zero mean in every
    row.

    Divided by the group's population spread (GRPO), or not (scale=False: Dr. GRPO, 2503.20783). No spread, no
    advantage.
        rewards  [[1, 0, 0, 1],   ->   [[ 1, -1, -1,  1],
                  [0, 0, 0, 0]]         [ 0,  0,  0,  0]]
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0)
    if scale:
        centred = centred / spread.clamp(min=1e-6)
    return torch.where(spread > 1e-6, centred, 0.0)


def k3(logp, ref):
    """KL(policy || reference) of each token, estimated from the sampled token alone: unbiased and never
    negative (Schulman, "Approximating KL Divergence", k3; 2402.03300, equation 4)."""
    return torch.exp(ref - logp) - (ref - logp) - 1


def grpo_loss(logp, old, ref, advantage, mask, normaliser, beta=0.04, clip=(0.2, 0.2)):
    """The summed token loss over a (micro-)batch, divided by `normaliser`, the same for every micro-batch of
    the step.

    logp, old, ref (B, G, T): of the sampled tokens under the policy now, when sampled, and the reference
    (None: no KL term); advantage (B, G); mask (B, G, T). clip = (low, high): the ratio's room; high > low is
    clip-higher (DAPO).
        one token, old = logp - ln 1.5, advantage 1, clip 0.2:  -min(1.5 * 1, 1.2 * 1) = -1.2, and no gradient
    """
    ratio = torch.exp(logp - old)
    a = advantage[..., None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip[0], 1 + clip[1]) * a)
    if ref is not None:
        loss = loss + beta * k3(logp, ref)
    return loss.masked_fill(~mask, 0.0).sum() / normaliser


@torch.no_grad()
def reference_logprobs(policy, batch, tokens, mask, temperature):
    with policy.plain():
        return policy.logprobs(policy.prefill(batch.tokens, batch.lengths), tokens, mask, temperature)[0]


@torch.no_grad()
def prefix_effect(policy, batch, sampled, logp, temperature, micro, share=8):
    """KL (nats a token) of the policy with its prefix from the same policy without it, LoRA on in both, from
    the tokens sampled for the first of the step's prompts, one in `share` (k3). logp (B, G, T): with the
    prefix, which the step has anyway, so this costs a forward pass over these prompts, `micro` at a time."""
    first, kl = max(1, len(batch.problems) // share), []
    for i in range(0, first, micro):
        part = slice(i, min(i + micro, first))
        some, tokens, mask = batch[part], sampled.tokens[part], sampled.mask[part]
        without = policy.logprobs(policy.prefill(some.tokens, some.lengths), tokens, mask, temperature)[0]
        kl.append(k3(logp[part], without)[mask])
    return torch.cat(kl).mean().item()


def gradients(policy, router, batch, sampled, *, temperature, beta, clip, dr, micro, max_new, old=None):
    """Accumulate the gradient of one pass over the samples into the .grad of LoRA and router.

    micro: prompts in a micro-batch, which bounds memory and changes nothing else. old: log-probabilities when
    sampled; None in the first pass, where they are those of now. Returns (old, sums), sums: kl and entropy a
    token, loss.
    """
    advantage = advantages(sampled.rewards, scale=not dr)
    normaliser = sampled.mask.numel() // sampled.mask.shape[-1] * max_new if dr else int(sampled.mask.sum())
    firsts, count = [], int(sampled.mask.sum())
    sums = dict(kl=0.0, entropy=0.0, loss=0.0)
    for i in range(0, len(batch.problems), micro):
        part = slice(i, i + micro)
        tokens, mask, some = sampled.tokens[part], sampled.mask[part], batch[part]
        ref = reference_logprobs(policy, some, tokens, mask, temperature) if beta else None
        context, _ = listen(router, some.H)  # again, now with gradient
        cache = policy.prefill(some.tokens, some.lengths, context)
        logp, entropy = policy.logprobs(cache, tokens, mask, temperature)
        before = logp.detach() if old is None else old[part]
        loss = grpo_loss(logp, before, ref, advantage[part], mask, normaliser, beta, clip)
        loss.backward()
        firsts.append(before)
        sums["loss"] += loss.item()
        sums["entropy"] += entropy.sum().item() / count
        sums["kl"] += 0.0 if ref is None else k3(logp.detach(), ref)[mask].sum().item() / count
    return torch.cat(firsts), sums


def out_of_memory(error):
    """Every device says it in its own words; a CPU's are those of a plain RuntimeError."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def gradients_that_fit(policy, router, batch, sampled, *, micro, **how):
    """`gradients` of the same samples, with micro-batches halved until memory suffices. Returns what it
    returns, the sums with the micro that did. Raises ValueError if one prompt is too much."""
    while True:
        try:
            old, sums = gradients(policy, router, batch, sampled, micro=micro, **how)
            return old, sums | dict(micro=micro)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not out_of_memory(error):
                raise
        if micro == 1:
            raise ValueError("out of memory in the gradient pass of a single prompt: start anew with a lower "
                             "--group or --max-new, or with a smaller policy")
        for p in [*policy.parameters(), *(router.parameters() if router else ())]:
            p.grad = None  # what some of the micro-batches have left
        micro = -(-min(micro, len(batch.problems)) // 2)
        print(f"out of memory in the gradient pass: {micro} prompts at a time from now on (--micro {micro})")


def update(policy, router, batch, sampled, optimizer, epochs=1, max_norm=1.0, **how):
    """`epochs` optimiser steps on one rollout (1: on-policy). Returns the first pass's sums, with grad_norm,
    skipped, the micro that fitted, prefix_kl, and expert_grad: the norm of the gradient, before clipping, of
    every expert's projection in the router. `how` is what `gradients` takes.

    A step whose loss or gradient is not finite is skipped and counted, never applied: one NaN in a weight,
    or in a moment of AdamW, ends a run. Of several ranks each normalises by its own samples; weighted by its
    share of these, losses and gradients add up to those of the whole step. So all see the same and skip
    together, while each cuts micro-batches that fit its own memory.
    """
    old, first, skipped = None, None, 0
    own = len(batch.problems) if how["dr"] else int(sampled.mask.sum())  # what `gradients` divides by
    weight = own / ranks.total(own)[0]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for _ in range(epochs):
        optimizer.zero_grad(set_to_none=True)
        old, sums = gradients_that_fit(policy, router, batch, sampled, old=old, **how)
        how["micro"] = sums.pop("micro")
        sums = dict(zip(sums, ranks.total(*(weight * s for s in sums.values()))))
        ranks.add_up(parameters, weight)
        experts = router.expert_grad() if hasattr(router, "expert_grad") else []
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if first is None:  # under the weights that sampled
            effect = 0.0 if router is None else prefix_effect(policy, batch, sampled, old, how["temperature"],
                                                              how["micro"])
            first = sums | dict(grad_norm=norm.item(), prefix_kl=ranks.total(effect)[0] / ranks.WORLD,
                                expert_grad=experts)
        finite = bool(torch.isfinite(norm)) and math.isfinite(sums["loss"])
        if finite:
            optimizer.step()
        skipped += not finite
    return first | dict(skipped=skipped, micro=how["micro"])


def advise(streak, row):
    """Count in `streak` (a Counter) the steps in a row that taught nothing. Returns advice when it is due."""
    streak["dry"] = streak["dry"] + 1 if row["zero_spread"] == 1 else 0
    streak["skipped"] = streak["skipped"] + 1 if row["skipped"] else 0
    if streak["skipped"] == HOPELESS:
        return (f"{HOPELESS} steps in a row gave a loss or gradient that is not finite and were skipped (see "
                "skipped.jsonl): start anew with a lower --lr, --router-lr or --max-norm, or, if the device "
                "is to blame, go on from the last good weights with --resume")
    if streak["dry"] == DROUGHT:
        mend = ("right: train on a harder --level" if row["accuracy"] > 0.5 else
                "wrong: try an easier --level, a higher --temperature, --shots or another --template")
        return (f"for {DROUGHT} steps every group was all right or all wrong, which teaches nothing; most "
                f"are {mend}, in a new run")
    return None


def make_optimizer(policy, router, lr, router_lr, betas, weight_decay):
    """AdamW over LoRA and router, each at its own rate (the router starts from nothing, LoRA from a trained
    model)."""
    groups = [dict(params=[p for p in policy.parameters()], lr=lr, peak=lr)]
    if router is not None:
        groups.append(dict(params=list(router.parameters()), lr=router_lr, peak=router_lr))
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)


def set_rate(optimizer, step, warmup):
    """Linear warm-up over `warmup` steps, then constant: independent of how many steps there will be. step
    from 0."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, warmup))
