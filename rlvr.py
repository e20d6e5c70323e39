"""
Reinforcement learning with verifiable rewards: the pieces of GRPO (2402.03300) and of stage 0, for train.py.

    Dataset       problems with all that never changes: the policy's prompts, the experts' states and texts
    align         stage 0: the router learns to write, and the policy to read, what an expert would say
    rollout       G completions of each prompt, sampled from the policy that has read the context tokens
    advantages    how much better each completion did than its own group
    grpo_loss     makes what did better likelier, token by token
    evaluate      greedy accuracy, the same way in training and in eval.py

What is easy to get wrong:
- The stop token is part of the completion and is trained on, else the policy never learns to stop.
- Loss and sampler share one temperature, and there is no top-k or top-p: else the ratio is not the policy's.
- The router runs again in the training forward (train.py): the context of the rollout has no gradient.
- The loss is normalised by the tokens of the whole step, so that micro-batches change nothing.
- The reference of the KL term is the policy as GRPO finds it. After stage 0 that is the aligned one: the
  frozen policy without a prefix would punish reading. Without stage 0: LoRA off and prefix off.
- A group whose rewards are all equal has advantage 0 and teaches nothing: watch `frac_reward_zero_std`.
- With one epoch per rollout the ratio is 1 and the loss about 0 by construction: watch the reward.
- Stage 0 sees no gold answer and no reward. It reads every expert equally, one at a time, the others masked
  out: whom to attend to is left for GRPO to learn.
"""
import contextlib
import importlib
import os
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from experts import read, write
from model import bucket
from rewards import prompt, verify
from router import reads_states

# -- Several devices: every rank runs the same program on its share of the prompts (torchrun sets these)

WORDS_BATCH = 256  # problems a step of stage 0 while the policy is not run
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def share(items):
    """This rank's part of a list; the parts in a row are the list, and differ in length by one at most."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]

def meet(collective, *args, **options):
    """Do what all ranks do together. Raises ConnectionError where one of them does not come."""
    try:
        if WORLD > 1:
            collective(*args, **options)
    except RuntimeError as error:  # gloo and nccl have no kind of their own for this
        message = str(error).splitlines()[0]
        raise ConnectionError(f"another rank is gone, see what it printed ({message})") from error

def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; tensors in it must be on the CPU."""
    values = [value] * WORLD
    meet(dist.all_gather_object, values, value)
    return values

def total(*numbers):
    """Each number summed over the ranks, a list of floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    meet(dist.all_reduce, sums)
    return sums.tolist()

def add_gradients(parameters):
    """Every gradient becomes the sum over the ranks: one flat tensor, one all-reduce."""
    if WORLD == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    meet(dist.all_reduce, flat)
    for p, new in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = new.view_as(p)

@contextlib.contextmanager
def ranks():
    """Meet the other ranks, and part at the end. Only rank 0 prints."""
    if WORLD == 1:
        yield
        return
    importlib.import_module("torch.distributed.nn")  # imported later, it would keep the group's threads alive
    patience = timedelta(minutes=float(os.environ.get("N_MUSKETEERS_TIMEOUT", 30)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
        yield
    dist.destroy_process_group()

# -- Problems, ready to run

@dataclass
class Batch:
    """B problems: prompt tokens (B, P) padded on the right, lengths (B,), expert states H (B, N, D)."""

    problems: list
    tokens: torch.Tensor
    lengths: torch.Tensor
    H: torch.Tensor

    def __getitem__(self, part):
        return Batch(self.problems[part], self.tokens[part], self.lengths[part], self.H[part])

class Dataset:
    """Problems and all about them that never changes during training, in lists of one order.

    problems  n of them          prompts  the text that the policy reads     ids  its tokens
    H         (n, N, D)          what the experts' states are ((n, 0, 0) where none are read)
    owner     (N,)               whose state each of the N is: an expert may give several
    texts     [experts][n]       what each expert would say ([] where nobody asks)
    targets   [experts][n]       the same as tokens of the policy's answer, stop token included; [] for no
              text
    Raises ValueError for a prompt that leaves no room in the policy's window.
    """

    def __init__(self, problems, policy, experts, args, progress=True):
        self.problems, self.policy, self.form = problems, policy, args.form
        expert_prompts = []
        for expert in experts:
            asked = [prompt(p, expert.template, expert.tokenizer, ask=False) for p in problems]
            expert_prompts.append([text + expert.cue for text in asked])
        mine = [share(prompts) for prompts in expert_prompts]
        self.texts = []
        if args.align or args.collab == "text":
            parts = gather(write(experts, mine, progress and RANK == 0))
            self.texts = [sum((part[e] for part in parts), []) for e in range(len(experts))]
        self.H = torch.zeros(len(problems), 0, 0)
        if reads_states(args.collab):
            self.H = torch.cat(gather(read(experts, mine, progress and RANK == 0)))
            generator = torch.Generator().manual_seed(args.seed)
            if args.control == "shuffled":  # the states of another problem
                order = torch.randperm(len(problems), generator=generator)
                self.H[order] = self.H[order.roll(1)]
            if args.control == "noise":  # of the same mean and std as the states, but nothing else
                std, mean = torch.std_mean(self.H.float(), dim=0, correction=0)
                self.H = (mean + std * torch.randn(self.H.shape, generator=generator)).to(self.H.dtype)
        self.owner = torch.tensor([e for e, expert in enumerate(experts) for _ in range(expert.entries)])
        self.targets = [[answer_ids(policy, text, args.form) for text in column] for column in self.texts]
        template = "plain" if args.form == "plain" else "chat"
        self.prompts = []
        for i, p in enumerate(problems):
            if args.collab == "text":
                pairs = [(e.name, texts[i]) for e, texts in zip(experts, self.texts) if e.writes]
                p = replace(p, question="".join(f"{name}: {text}\n" for name, text in pairs) + p.question)
            self.prompts.append(prompt(p, template, policy.tokenizer))
        self.ids = policy.tokenizer(self.prompts, add_special_tokens=args.form == "plain")["input_ids"]
        room = policy.window - args.max_new - args.latents
        longest = max(map(len, self.ids))
        if longest > room:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the policy's window of "
                             f"{policy.window}: use an easier --level, a lower --max_new or another --policy")

    def __len__(self):
        return len(self.problems)

    def reading_mask(self, chosen):
        """(N,), or (B, N) of chosen (B, 1): the states of that expert, and of those without texts."""
        silent = torch.tensor([not any(self.texts[e]) for e in self.owner.tolist()], dtype=torch.bool)
        return ((self.owner == chosen) | silent).to(self.policy.embed.device)

    def batch(self, rows):
        device = self.policy.embed.device
        ids = [torch.tensor(self.ids[i]) for i in rows]
        lengths = torch.tensor([len(x) for x in ids])
        tokens = torch.zeros(len(ids), bucket(int(lengths.max())), dtype=torch.long)
        for row, x in zip(tokens, ids):
            row[:len(x)] = x
        H = self.H[rows].float()
        if device.type == "cuda":
            tokens, lengths, H = tokens.pin_memory(), lengths.pin_memory(), H.pin_memory()
        tokens, lengths, H = (t.to(device, non_blocking=True) for t in (tokens, lengths, H))
        return Batch([self.problems[i] for i in rows], tokens, lengths, H)

def answer_ids(policy, text, form):
    """Tokens of a text as the policy would give it for an answer, stop token included; [] for no text."""
    if not text:
        return []
    answer = f"<answer>{text}</answer>" if form == "tagged" else f" {text}"
    return policy.tokenizer(answer, add_special_tokens=False)["input_ids"] + [policy.config.stop[0]]

# -- Stage 0: alignment. Sparse rewards do not teach a policy to read vectors that it has never seen. It
# learns that first, without rewards, from what the experts themselves would say.

def align(policy, router, data, args, start, moments, after_step):
    """Train router and LoRA on the experts' texts, from step `start`; `moments`: see `restore`. Two parts:

    words    The policy is not run. The context tokens are held to the policy's embeddings of the prompt's
             last token and an expert's text, as if the answer stood there already, behind the token that
             it will follow again: a language model copies such a text. For a router that reads states.
    reading  Problem and context in, the expert's text out: LoRA learns to read aloud, the router follows
             slowly. Without a router (`--collab single`) the same texts are learned from the problem alone.

    Words use the last half of the problems, reading the quarter before it, and GRPO begins with the first:
    states that the router knows by heart would teach the policy to trust every word. A step draws problems,
    by seed and step alone, and for each one expert that writes; other writers are masked out, an encoder
    stays, to be ignored. after_step(part, steps done, optimizer, loss) is called after each.
    """
    words, texts = align_steps(args, data)
    device = policy.embed.device
    writers = torch.tensor([e for e, column in enumerate(data.texts) if any(column)])
    half = len(data) // 2
    used = sorted({token for column in data.targets for ids in column for token in ids}
                  | {ids[-1] for ids in data.ids})
    for step in range(start, words + texts):
        if step in (start, words):
            rates = (0.0, args.align_words_lr) if step < words else (args.align_lr, args.align_router_lr)
            optimizer = make_optimizer(policy, router, *rates)
            if step != words:
                restore(optimizer, moments)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        size = WORDS_BATCH if step < words else args.align_batch
        first, last = (half, len(data)) if step < words else (half // 2, half)
        rows = share(torch.randint(first, last, (size,), generator=generator).tolist())
        chosen = share(writers[torch.randint(len(writers), (size,), generator=generator)].tolist())
        targets = [data.targets[e][i] for e, i in zip(chosen, rows)]
        mask = data.reading_mask(torch.tensor(chosen)[:, None])  # (B, N)
        if step < words:
            spelled = [[data.ids[i][-1], *ids] if ids else [] for i, ids in zip(rows, targets)]
            context, _ = router(data.H[rows].to(device).float(), mask)
            loss, count = words_loss(policy, context, spelled, used)
        else:
            batch = data.batch(rows)
            context = router(batch.H, mask)[0] if router else None
            loss, count = reading_loss(policy, batch, context, targets)
        loss = loss / total(count)[0]
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        add_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step("words" if step < words else "reading", step + 1, optimizer, total(loss.item())[0])

def align_steps(args, data):
    """(steps of words, steps of reading) of stage 0."""
    if not args.align:
        return 0, 0
    return (args.align_words if data.H.numel() else 0), args.align

def words_loss(policy, context, targets, used):
    """Context token i against token i of a text, among the tokens `used` in any: cross-entropy of inner
    products, plus a little of the squared distance, which also fixes the length. context (B, L, d), targets
    [B][tokens]. Returns the sum over the texts' tokens, as far as the L places reach, and their number."""
    B, L, d = context.shape
    embeddings = (policy.embed[used].float() - policy.neutral) / policy.embed_std  # (n, d), as a prefix
    index = {token: i for i, token in enumerate(used)}
    target = torch.tensor([[index[token] for token in ids[:L]] + [-1] * (L - len(ids)) for ids in targets])
    target = target.to(context.device)  # (B, L)
    context, target = context[target >= 0], target[target >= 0]  # (n, d), (n,)
    loss = F.cross_entropy(context @ embeddings.T / d**0.5, target, reduction="sum")
    distance = (context - embeddings[target]).square().mean(-1).sum()
    return loss + 0.1 * distance, len(target)

def reading_loss(policy, batch, context, targets):
    """Negative log-likelihood of the texts' tokens behind the prompts, summed, and their number."""
    longest = max(1, max(map(len, targets)))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in targets])[:, None]  # (B, 1, T)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in targets])[:, None].bool()
    tokens, mask = tokens.to(policy.embed.device), mask.to(policy.embed.device)
    cache = policy.prefill(batch.tokens, batch.lengths, context)
    logp, _ = policy.logprobs(cache, tokens, mask)
    return -logp.sum(), int(mask.sum())

@torch.no_grad()
def read_back(policy, router, data, args, n=64):
    """What stage 0 is judged by, on new problems: [(expert, share of its texts that are read back, the
    same with the states of another problem, number of texts)]. Greedy."""
    result = []
    for e, texts in enumerate(data.texts):
        rows = [i for i in range(min(n, len(data))) if texts[i]]
        if not rows:
            continue
        mask = data.reading_mask(e)
        one = (lambda H: router(H, mask)) if router else None
        shares = []
        for H in (data.H, data.H.roll(1, 0)):
            answers = evaluate(policy, one, data, args, rows, H)[1]
            expected = [policy.tokenizer.decode(data.targets[e][i], skip_special_tokens=True) for i in rows]
            shares.append(sum(a.strip() == b.strip() for a, b in zip(answers, expected)) / len(rows))
        result.append((e, *shares, len(rows)))
    return result

def make_optimizer(policy, router, lr, router_lr):
    """AdamW over LoRA and router, each at its own rate: the router starts from nothing, LoRA from a trained
    model. Betas 0.9 and 0.98: a memory shorter than 0.999 suits runs of a few hundred steps."""
    groups = [dict(params=list(policy.parameters()), lr=lr, base_lr=lr)]
    if router:
        groups.append(dict(params=list(router.parameters()), lr=router_lr, base_lr=router_lr))
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

def restore(optimizer, moments):
    """Put AdamW's moments back: {index of the parameter: {"exp_avg": ..., "exp_avg_sq": ..., "step":
    ...}}."""
    optimizer.load_state_dict(dict(state=moments, param_groups=optimizer.state_dict()["param_groups"]))

# -- GRPO

@dataclass
class Rollout:
    """G completions of each of B problems: tokens (B, G, T); mask (B, G, T), True up to and including the
    stop token; texts and verdicts [B][G]; rewards and truncated (B, G); attention (B, heads, L, N) or None;
    seconds."""

    problems: list
    tokens: torch.Tensor
    mask: torch.Tensor
    texts: list
    verdicts: list
    rewards: torch.Tensor
    truncated: torch.Tensor
    attention: torch.Tensor | None
    seconds: float

@torch.no_grad()
def rollout(policy, router, batch, args, group, temperature, generator=None):
    """Sample `group` completions of every problem and verify each."""
    start = time.perf_counter()
    context, attention = router(batch.H) if router else (None, None)
    cache = policy.prefill(batch.tokens, batch.lengths, context)
    tokens, mask = policy.generate(cache, group, args.max_new, temperature, generator)
    truncated = ~(policy.ends[tokens] & mask).any(-1)  # (B, G): no stop token
    rows = [row[keep].tolist() for row, keep in zip(tokens.flatten(0, 1).cpu(), mask.flatten(0, 1).cpu())]
    seconds = time.perf_counter() - start
    decoded = policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
    texts, verdicts = [], []
    for b, (problem, cut) in enumerate(zip(batch.problems, truncated.tolist())):
        texts.append(decoded[b * group:(b + 1) * group])
        verdicts.append([verify(text, problem, args.form, truncated=c) for text, c in zip(texts[b], cut)])
    rewards = torch.tensor([[v.reward for v in row] for row in verdicts], device=tokens.device)
    return Rollout(batch.problems, tokens, mask, texts, verdicts, rewards, truncated, attention, seconds)

def advantages(rewards):
    """(reward - mean) / std within each group. rewards (B, G) -> (B, G) (2402.03300, section 4.1.2)

        [[1, 0, 0, 1],   ->   [[1, -1, -1, 1],
         [0, 0, 0, 0]]         [0,  0,  0, 0]]
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True, correction=0)
    return torch.where(std > 1e-6, centered / std.clamp(min=1e-6), 0.0)

def kl_estimate(logp, ref):
    """KL(policy || reference) of each token from the sampled token alone: unbiased, never negative
    (Schulman's k3; 2402.03300, equation 4)."""
    return torch.exp(ref - logp) - (ref - logp) - 1

def grpo_loss(logp, old, ref, advantage, mask, args):
    """Summed over the tokens of a micro-batch; the caller divides by the tokens of the whole step.

    logp, old, ref (B, G, T): log-probability of the sampled tokens under the policy now, the policy that
    sampled them, and the reference (None: no KL term). advantage (B, G), mask (B, G, T). The ratio may fall
    to 1 - clip and rise to 1 + clip_high before its gradient stops (clip_high above clip is DAPO's,
    2503.14476).
    """
    ratio = torch.exp(logp - old)
    advantage = advantage[..., None]  # the same for every token of a completion
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip_high) * advantage)
    if ref is not None:
        loss = loss + args.beta * kl_estimate(logp, ref)
    return loss.masked_fill(~mask, 0.0).sum()

@torch.no_grad()
def reference_logprobs(policy, reference, batch, tokens, mask, temperature):
    """Log-probabilities (B, G, T) under the KL term's reference: (LoRA's tensors, router), or None for the
    frozen policy, LoRA off and prefix off."""
    if reference is None:
        with policy.lora_disabled():
            return policy.logprobs(policy.prefill(batch.tokens, batch.lengths), tokens, mask, temperature)[0]
    lora, router = reference
    now = [p.data for p in policy.parameters()]
    try:
        for p, frozen in zip(policy.parameters(), lora):
            p.data = frozen
        context = router(batch.H)[0] if router else None
        cache = policy.prefill(batch.tokens, batch.lengths, context)
        return policy.logprobs(cache, tokens, mask, temperature)[0]
    finally:
        for p, data in zip(policy.parameters(), now):
            p.data = data

@torch.no_grad()
def evaluate(policy, router, data, args, rows=None, H=None, size=None):
    """Greedy answers to all problems, or to those at `rows`: verdicts [n], texts [n], attention (n, heads, L,
    N) or None. router: any function of H, or None for no prefix. H (n, N, D): read in place of the data's."""
    rows = list(range(len(data))) if rows is None else rows
    size = size or (256 if policy.embed.is_cuda else 64)
    mine = share(rows)
    parts = []
    for i in range(0, len(mine), size):
        batch = data.batch(mine[i:i + size])
        if H is not None:
            batch.H = H[mine[i:i + size]].to(batch.H)
        out = rollout(policy, router, batch, args, 1, temperature=0)
        attention = None if out.attention is None else out.attention.cpu()
        parts.append(([row[0] for row in out.verdicts], [row[0] for row in out.texts], attention))
    parts = sum(gather(parts), [])
    verdicts, texts = sum((part[0] for part in parts), []), sum((part[1] for part in parts), [])
    attention = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
    return verdicts, texts, attention

def accuracy(verdicts):
    return sum(verdict.strict for verdict in verdicts) / len(verdicts)

def by_expert(attention, owner):
    """Attention (..., N) to states -> to experts (..., experts); an expert's share is that of all its
    states."""
    shares = torch.zeros(*attention.shape[:-1], int(owner.max()) + 1, device=attention.device)
    return shares.index_add(-1, owner.to(attention.device), attention)

def by_dataset(datasets, values, names=None):
    """{dataset: mean of its values}; values (n,), or (n, experts) for {dataset: {expert: mean}}."""
    means = {}
    for dataset in sorted(set(datasets)):
        mean = values[[i for i, other in enumerate(datasets) if other == dataset]].mean(0)
        means[dataset] = dict(zip(names, mean.tolist())) if names else mean.item()
    return means

def masked_router(router, owner, e):
    """The router with expert e masked out."""
    return lambda H: router(H, (owner != e).to(H.device))

def test_report(policy, router, data, args, experts):
    """Held-out accuracy before (LoRA and prefix off) and after, attention, and accuracy with each expert
    masked out: attention shows who is attended to, only masking shows that it matters. A dict for JSON."""
    names, datasets = [expert.name for expert in experts], [problem.dataset for problem in data.problems]
    strict = lambda verdicts: torch.tensor([float(verdict.strict) for verdict in verdicts])
    with policy.lora_disabled():
        before = evaluate(policy, None, data, args)[0]
    after, texts, attention = evaluate(policy, router, data, args)
    rows = {"before": by_dataset(datasets, strict(before)), "after": by_dataset(datasets, strict(after))}
    rows = {dataset: dict(n=datasets.count(dataset), **{when: means[dataset] for when, means in rows.items()})
            for dataset in rows["after"]}
    report = dict(task=args.task, level=args.level, n=len(data), seed=args.seed, collab=args.collab,
                  control=args.control, align=args.align,
                  before=dict(strict=accuracy(before), lenient=sum(v.lenient for v in before) / len(before)),
                  after=dict(strict=accuracy(after), lenient=sum(v.lenient for v in after) / len(after)),
                  by_dataset=rows, right=strict(after).int().tolist(), masked={})
    first = data.problems[0]
    report["example"] = dict(question=first.question, answer=first.answer, text=texts[0])
    if attention is not None:
        attention = by_expert(attention, data.owner)  # (n, heads, L, experts)
        report["attention_by_dataset"] = by_dataset(datasets, attention.mean((1, 2)), names)
        report["example"]["attention"] = attention[0].mean(0).tolist()  # (L, experts)
        for e, name in enumerate(names if len(names) > 1 else ()):
            masked = evaluate(policy, masked_router(router, data.owner, e), data, args)[0]
            report["masked"][name] = by_dataset(datasets, strict(masked))
    return report
