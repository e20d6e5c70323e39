"""
Reinforcement learning with verifiable rewards: the pieces of GRPO (2402.03300) and of stage 0, for train.py.

    build         policy, experts and router from the settings
    Dataset       problems with all that never changes: the policy's prompts, the experts' states and texts
    align         stage 0: the router learns to write, and the policy to read, what an expert would say
    rollout       G completions of each prompt, sampled from the policy that has read the context tokens
    advantages    how much better each completion did than its own group
    grpo_loss     makes what did better likelier, token by token

What is easy to get wrong:
- The stop token is part of the completion and is trained on, else the policy never learns to stop.
- Loss and sampler share one temperature, without top-k or top-p: else the ratio is not the policy's.
- The router runs again in the training forward (train.py): the context of the rollout has no gradient.
- After stage 0 there is no KL term: its reference, the frozen policy, cannot read, and KL would undo it.
- A group whose rewards are all equal has advantage 0 and teaches nothing: watch `frac_reward_zero_std`.
- With one epoch per rollout the ratio is 1 and the loss about 0 by construction: watch the reward.
- Stage 0 sees no gold answer and no reward, and all writers equally often: GRPO learns whom to attend to.
"""
import contextlib
import json
import math
import os
import random
import sys
import time
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported after the ranks have met, it would keep their threads alive
import torch.nn.functional as F

from experts import Expert, brief, line_ends, read_states, read_tensors, write_tensors, write_texts
from model import Policy, bucket
from rewards import next_of_dataset, problems, prompt, verify
from router import ROUTERS, reads_states

# -- Several devices: every rank runs the same program on its share of the prompts (torchrun sets these)

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def share(items):
    """This rank's part of a list or tensor: contiguous, in rank order, lengths differ by one at most."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]

def meet(collective, *args, **options):
    """Do what all ranks do together. Raises ConnectionError where one of them does not come."""
    try:
        if WORLD > 1:
            collective(*args, **options)
    except RuntimeError as error:  # gloo's only kind; nccl's is a subclass of it
        raise ConnectionError(f"another rank is gone, see what it printed ({brief(error)})") from error

def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; tensors in it must be on the CPU."""
    values = [value] * WORLD
    meet(dist.all_gather_object, values, value)
    return values

def total(number):
    """A number summed over the ranks."""
    return sum(gather(number))

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
    patience = timedelta(minutes=float(os.environ.get("N_MUSKETEERS_TIMEOUT", 30)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    meet(dist.init_process_group, backend, timeout=patience)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
        yield
    meet(dist.destroy_process_group)

# -- What a run is made of

def build(args):
    """Policy, experts and router. In args "auto" becomes what was chosen, and hub names get their commits."""
    torch.manual_seed(args.seed)
    experts = [Expert(source, args.read, args.layer, args.positions, args.own_text, tokens=args.write,
                      cue=args.cue, device=args.device, untrained=args.control == "untrained")
               for source in args.experts]
    for i, expert in enumerate(experts):  # two folders may end alike; attention is reported by name
        expert.name += f"-{i}" if any(expert.name == other.name for other in experts[:i]) else ""
    if args.align and not any(expert.writes for expert in experts):
        raise ValueError("stage 0 has nothing to read, as no expert writes: use --align 0, or another expert")
    files = Expert(args.policy)  # the policy's tokenizer and size, without weights
    if args.form == "auto":
        args.form = "tagged" if files.template == "chat" else "plain"
    if args.form == "tagged" and files.template == "plain":
        raise ValueError(f"{files.name} has no chat template: use --form plain")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if files.params >= 50e6 else "float32"
    policy = Policy.from_pretrained(args.policy, args.lora_rank, args.lora_alpha, getattr(torch, args.dtype),
                                    args.device, args.neutral)
    policy.tokenizer = files.tokenizer
    if args.form == "plain":  # the answer is the first line
        policy.stop_at([*policy.config.stop, *line_ends(policy.tokenizer)])
    args.policy = files.pinned  # so that --resume finds the same weights
    args.experts = [expert.pinned for expert in experts]
    if args.collab not in ROUTERS:
        return policy, experts, None
    # a fresh prefix: close to the mean embedding, or, measured from zero, half as large as an embedding
    init_scale = 0.02 if args.neutral == "mean" else 0.5
    router = ROUTERS[args.collab]([expert.width for expert in experts for _ in range(expert.entries)],
                                  policy.config.hidden_size, args.latents, args.router_heads, args.router_dim,
                                  args.router_temperature, init_scale)
    return policy, experts, router.to(args.device)

def load_problems(args, split, n=None):
    """The problems of a split. Training problems are shuffled by seed within fixed blocks, so that a longer
    run begins with the same ones. A small dataset gives as many held-out ones as it has."""
    if split != "train":
        skipped = args.test_skip if split == "test" else 0
        n = skipped + (n or getattr(args, split))
        return problems(args.task, split, n, args.data, args.level, least=skipped + WORLD)[skipped:]
    n = n or max(args.steps * args.batch, 2000 if args.align else 32)
    block = max(256, 8 * args.batch)
    found = problems(args.task, "train", math.ceil(n / block) * block, args.data, args.level)
    for start in range(0, len(found), block):
        part = found[start:start + block]
        random.Random(f"{args.seed} {start}").shuffle(part)
        found[start:start + block] = part
    return found[:n]

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

    problems  n of them       prompts  the text that the policy reads       ids  its tokens
    H         (n, N, D)       the experts' states ((n, 0, 0) where none are read)
    owner     (N,)            whose state each of the N is: an expert may give several
    texts     [experts][n]    what each expert would say ([] where nobody asks)
    targets   [experts][n]    the same as tokens of an answer, stop token included; [] for no text
    Raises ValueError for a prompt that leaves no room in the policy's window.
    """

    def __init__(self, problems, policy, experts, args, progress=True):
        self.problems, self.device, plain = problems, policy.embed.device, args.form == "plain"
        asked = [problems] * len(experts)
        if args.control in ("wrong", "partly"):  # the last expert reads another problem
            last = max(p.dataset for p in problems)
            asked[-1] = [problems[other] if args.control == "wrong" or p.dataset == last else p
                         for p, other in zip(problems, next_of_dataset(problems))]
        mine = [share([expert.prompt(p) for p in column]) for expert, column in zip(experts, asked)]
        self.texts = []
        if args.align or args.collab == "text":
            parts = gather(write_texts(experts, mine, progress and RANK == 0))
            self.texts = [sum(column, []) for column in zip(*parts)]
        self.H = torch.zeros(len(problems), 0, 0)
        if reads_states(args.collab):
            self.H = torch.cat(gather(read_states(experts, mine, progress and RANK == 0)))
            generator = torch.Generator().manual_seed(args.seed)
            if args.control == "shuffled":  # the states of another problem
                order = torch.randperm(len(problems), generator=generator)
                self.H[order] = self.H[order.roll(1)]
            if args.control == "noise":  # of the same mean and std as the states, but nothing else
                std, mean = torch.std_mean(self.H.float(), dim=0, correction=0)
                self.H = (mean + std * torch.randn(self.H.shape, generator=generator)).to(self.H.dtype)
        self.owner = torch.tensor([e for e, expert in enumerate(experts) for _ in range(expert.entries)])
        self.targets = [[answer_ids(policy, text, args.form) for text in column] for column in self.texts]
        self.prompts = []
        for i, p in enumerate(problems):
            if args.collab == "text":
                lines = [f"{e.name}: {texts[i]}\n" for e, texts in zip(experts, self.texts) if e.writes]
                p = replace(p, question="".join(lines) + p.question)
            self.prompts.append(prompt(p, "plain" if plain else "chat", policy.tokenizer))
        self.ids = policy.tokenizer(self.prompts, add_special_tokens=plain)["input_ids"]
        written = max(map(len, sum(self.targets, [])), default=0)
        room = policy.window - max(args.max_new, written) - args.latents
        longest = max(map(len, self.ids))
        if longest > room:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in a window of {policy.window}: "
                             "use an easier --level, a lower --max_new (or --write), or another --policy")

    def __len__(self):
        return len(self.problems)

    def reading_mask(self, chosen):
        """True for a state of expert `chosen` or of one without texts: (N,); (B, N) for chosen (B, 1)."""
        silent = torch.tensor([not any(self.texts[e]) for e in self.owner.tolist()], dtype=torch.bool)
        return ((self.owner == chosen) | silent).to(self.device)

    def batch(self, rows):
        ids = [self.ids[i] for i in rows]
        width = bucket(max(map(len, ids)))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids]).to(self.device)
        lengths = torch.tensor([len(row) for row in ids]).to(self.device)
        return Batch([self.problems[i] for i in rows], tokens, lengths, self.H[rows].float().to(self.device))

def answer_ids(policy, text, form):
    """Tokens of a text as the policy would give it for an answer, stop token included; [] for no text."""
    if not text:
        return []
    answer = f"<answer>{text}</answer>" if form == "tagged" else f" {text}"
    return policy.tokenizer(answer, add_special_tokens=False)["input_ids"] + [policy.config.stop[0]]

# -- Stage 0: alignment. Sparse rewards do not teach a policy to read vectors that it has never seen. It
# learns that first, without rewards, from what the experts themselves would say.

WORDS_BATCH = 256  # problems a step of words: the policy is not run

def align(policy, router, data, args, start, moments):
    """Train router and LoRA on the experts' texts, from step `start` with `moments` (see `make_optimizer`):

    words    The policy is not run. The context tokens are trained to be the policy's embeddings of the
             prompt's last token and an expert's text. At the prompt's end that token comes again, and a
             language model tends to copy what followed it before. For a router that reads states.
    reading  Problem and context in, the expert's text out: LoRA learns to read aloud, the router follows
             slowly. Without a router (`--collab single`) the same texts are learned from the problem alone.

    Words use the second half of the problems, reading the second quarter; GRPO begins with the first.
    Why apart: on states that the router knows by heart, a policy learns to trust it blindly. A step draws
    problems, by seed and step alone, and for each an expert that writes; other writers are masked out,
    encoders stay, to be ignored. Yields (part, loss per token, optimizer) after each step.
    """
    words, reading = align_steps(args)
    writers = torch.tensor([e for e, column in enumerate(data.texts) if any(column)])
    if not len(writers):
        raise ValueError("no expert wrote a word for stage 0: use --align 0, a --cue or a higher --write")
    half = len(data) // 2
    used = sorted({token for column in data.targets for ids in column for token in ids}
                  | {ids[-1] for ids in data.ids})
    for step in range(start, words + reading):
        spelling = step < words
        size = WORDS_BATCH if spelling else args.align_batch
        first, last = (half, len(data)) if spelling else (half // 2, half)
        if step in (start, words):  # an optimizer for each part; moments are of a part that goes on
            rates = (0.0, args.align_words_lr) if spelling else (args.align_lr, args.align_router_lr)
            optimizer = make_optimizer(policy, router, *rates, moments=moments if step != words else None)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = share(torch.randint(first, last, (size,), generator=generator).tolist())
        chosen = share(writers[torch.randint(len(writers), (size,), generator=generator)])
        targets = [data.targets[e][i] for e, i in zip(chosen.tolist(), rows)]
        H = data.H[rows].float().to(policy.embed.device)
        mask = data.reading_mask(chosen[:, None])  # (B, N)
        context = router(H, mask)[0] if router else None
        if spelling:
            spelled = [[data.ids[i][-1], *ids] if ids else [] for i, ids in zip(rows, targets)]
            loss, count = words_loss(policy, context, spelled, used)
        else:
            loss, count = reading_loss(policy, data.batch(rows), context, targets)
        loss = loss / max(1.0, total(count))  # all texts of a batch may be empty
        loss.backward()
        add_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip).item()
        if not math.isfinite(norm):
            raise ValueError("stage 0 has a gradient that is not finite: start anew with a lower --align_lr, "
                             "--align_router_lr and --align_words_lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield "words" if spelling else "reading", total(loss.item()), optimizer

def align_steps(args):
    """(steps of words, steps of reading) of stage 0."""
    return (args.align_words if args.align and reads_states(args.collab) else 0), args.align

def words_loss(policy, context, targets, used):
    """Context token i against token i of a text, among the tokens `used` in any: cross-entropy of inner
    products, plus a little of the squared distance, which also fixes the norm. context (B, L, d), targets
    [B][tokens]. Returns the sum over the first L tokens of the texts, and their number."""
    B, L, d = context.shape
    embeddings = (policy.embed[used].float() - policy.neutral) / policy.embed_std  # (n, d), in prefix units
    index = {token: i for i, token in enumerate(used)}
    target = torch.tensor([[index[token] for token in ids[:L]] + [-1] * (L - len(ids)) for ids in targets])
    target = target.to(context.device)  # (B, L)
    context, target = context[target >= 0], target[target >= 0]  # (n, d), (n,)
    loss = F.cross_entropy(context @ embeddings.T / d**0.5, target, reduction="sum")
    distance = (context - embeddings[target]).square().mean(-1).sum()
    return loss + 0.1 * distance, len(target)

def reading_loss(policy, batch, context, targets):
    """Negative log-likelihood of the texts' tokens behind the prompts, summed, and their number."""
    T = max(1, *map(len, targets))
    tokens = torch.tensor([[ids + [-1] * (T - len(ids))] for ids in targets]).to(batch.H.device)  # (B, 1, T)
    cache = policy.prefill(batch.tokens, batch.lengths, context)
    logp, _ = policy.logprobs(cache, tokens.clamp(min=0), tokens >= 0)
    return -logp.sum(), sum(map(len, targets))

# -- GRPO

def make_optimizer(policy, router, lr, router_lr, trust_lr=0.0, moments=None):
    """AdamW over LoRA, router and the router's trust, each at its own rate: LoRA starts from a trained model,
    they from nothing. Betas 0.9 and 0.98: a memory shorter than 0.999 suits runs of few hundred steps.
    To go on, moments: {index of the parameter: {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}."""
    named = list(router.named_parameters()) if router else []
    trust = [p.requires_grad_(trust_lr > 0) for name, p in named if name.startswith("trust")]
    rest = [p for name, p in named if not name.startswith("trust")]
    groups = [dict(params=params, lr=rate, base_lr=rate) for params, rate in (
        (policy.parameters(), lr), (rest, router_lr), (trust if trust_lr else [], trust_lr))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments or {}))
    return optimizer

@dataclass
class Rollout:
    """G completions of each of B problems. mask: True up to and including the stop token."""
    problems: list
    tokens: torch.Tensor  # (B, G, T)
    mask: torch.Tensor  # (B, G, T)
    texts: list  # [B][G]
    verdicts: list  # [B][G]
    rewards: torch.Tensor  # (B, G)
    truncated: torch.Tensor  # (B, G)
    attention: torch.Tensor | None  # (B, heads, L, N)
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
    texts = [decoded[i:i + group] for i in range(0, len(decoded), group)]
    verdicts = [[verify(text, problem, args.form, truncated=cut) for text, cut in zip(answers, cuts)]
                for problem, answers, cuts in zip(batch.problems, texts, truncated.tolist())]
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
    to 1 - clip and rise to 1 + clip_high (above clip: DAPO, 2503.14476) before its gradient stops.
    """
    ratio = torch.exp(logp - old)
    advantage = advantage[..., None]  # the same for every token of a completion
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip_high) * advantage)
    if ref is not None:
        loss = loss + args.beta * kl_estimate(logp, ref)
    return loss.masked_fill(~mask, 0.0).sum()

# -- A checkpoint is one safetensors file, which cannot run code: weights, AdamW's moments, the ranks' random
# generators, and as JSON text how far the run is.

def trainable(policy, router):
    """{name: tensor} of everything that training changes or fixes: LoRA and the router."""
    lora = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    return lora | {f"router.{name}": t for name, t in (router.state_dict() if router else {}).items()}

def save_checkpoint(path, policy, router, state, optimizer, generator):
    """All ranks call, rank 0 writes. The checksum is added to the name. optimizer: None for no moments."""
    generators = gather(generator.get_state())
    tensors = trainable(policy, router) | {f"generator.{rank}": t for rank, t in enumerate(generators)}
    for i, moments in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    tensors["state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if RANK == 0:
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        write_tensors(path.parent, tensors, path.name)
    total(0)  # the ranks meet: the file is there for all

def load_checkpoint(path, policy, router, generator=None):
    """Put weights and generator in place; returns (state, AdamW's moments). Raises ValueError, changing
    nothing, for a file that is damaged or was made for other models."""
    tensors, named = read_tensors(path), trainable(policy, router)
    shapes = {name: t.shape for name, t in tensors.items() if name.startswith(("policy.", "router."))}
    if shapes != {name: t.shape for name, t in named.items()}:
        raise ValueError(f"{path} was made for other models: its tensors have other names or shapes")
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
    """The checkpoints of a run, newest first: step-..., then aligned-..., then align-..."""
    return sorted(out.glob("*.safetensors"), reverse=True)

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
    return dict(align=0, aligned=False, step=0), {}
