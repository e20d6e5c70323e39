"""
The ways to collaborate, their controls, and what is measured of them.

    way      trained beside LoRA          what the policy sees before the question
    soft     Router                       what the router makes of all experts' states
    hard     Router and a linear head     what the router makes of ONE expert's state; the head chooses which
    prefix   constant vectors             those vectors, the same for every problem; no expert takes part
    text     nothing                      what the experts wrote, as text
    single   nothing                      nothing

To the rest of the project a way is `Run.router`: None, or a module called as router(H) -> (context tokens
(B, L, d), attention (B, heads, L, N)), either of them None where there is none. A control replaces H and
leaves everything else as it is: what a run still gains then, it did not gain by reading the experts.
"""

import hashlib
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

from experts import Expert, line_ends, rows_of
from router import Router

WAYS = ("soft", "single", "prefix", "hard", "text")
CONTROLS = ("none", "shuffled", "noise", "untrained")
ROUTED, READ = ("soft", "hard"), ("soft", "hard", "text")  # the ways with attention; those with experts


# -- the ways
class Prefix(nn.Module):
    """`latents` learned vectors before every prompt, of the scale that a fresh router's have. Were the experts
    worth nothing, soft could still learn this much."""

    def __init__(self, latents, d_policy, start):
        super().__init__()
        self.vectors = nn.Parameter(start * torch.randn(latents, d_policy))

    def forward(self, H, mask=None):
        """H (B, 0, 0): of B problems nothing is read. Context (B, L, d), no attention."""
        return self.vectors.expand(len(H), -1, -1), None


class Hard(Router):
    """A router that hears one expert a problem: the first choice of a linear head, which sees the problem
    through a frozen reader, the eye: column `eye` of H, `eye_width` wide, as likely as not an expert itself.

    The choice is straight-through (1308.3432): forward it is one-hot, backward it is the softmax's, so that
    the head learns from every expert, by what it would have said, and not from the chosen one alone.
    """

    def __init__(self, *how, eye, eye_width):
        super().__init__(*how)
        self.eye = eye
        self.register_buffer("eye_mean", torch.zeros(eye_width))
        self.register_buffer("eye_gain", torch.ones(eye_width))
        self.head = nn.Linear(eye_width, len(self.identity))

    def columns(self, H):
        """The experts' states (B, N, D) and the eye's (B, eye_width)."""
        N, D = self.real.shape
        return H[:, :N, :D], H[:, self.eye, :len(self.eye_mean)]

    @torch.no_grad()
    def standardise(self, H):
        H, seen = self.columns(H)
        super().standardise(H)
        spread = seen.std(0) if len(seen) > 1 else torch.ones_like(seen[0])
        self.eye_mean.copy_(seen.mean(0))
        self.eye_gain.copy_(1 / spread.clamp(min=1e-6 + 0.01 * spread.max()))

    def forward(self, H, mask=None):
        """As Router's; the attention is the choice. An absent expert is not chosen; the eye still sees."""
        H, seen = self.columns(H)
        mask = None if mask is None else mask.expand(H.shape[:2])
        scores = self.head(((seen - self.eye_mean) * self.eye_gain).clamp(-10, 10))  # (B, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        p = scores.float().softmax(-1)
        choice = F.one_hot(p.argmax(-1), p.shape[-1]).to(p)
        weight = choice + (p - p.detach())  # the choice itself, with the softmax's gradient
        context, one = self.attend((weight[..., None] * self.entries(H, mask)).sum(1, keepdim=True))
        return context, one * choice[:, None, None]  # (B, heads, L, 1) of ones -> (B, heads, L, N)


def assemble(args):
    """(experts, readers, eye): who takes part, whose states are the columns of H, and the column by which the
    hard way chooses: of the first encoder among the experts, else of the frozen policy's mean state."""
    how = dict(layer=args["layer"], device=args["device"], untrained=args["control"] == "untrained")
    if args["collab"] == "text":
        return *2 * (writers(args),), None
    readers = experts = [Expert(e, read=args["read"], **how) for e in args["experts"]]
    eye = next((i for i, e in enumerate(experts) if e.encoder), len(experts))
    if args["collab"] == "hard" and eye == len(experts):
        readers = [*experts, Expert(args["policy"], read="mean", **how)]
        readers[-1].name += " (chooses)"
    return experts, readers, eye


def make_router(args, readers, eye, d_policy):
    """The module that stands before the policy, None for a way that has none."""
    start = 0.02 if args["neutral"] == "mean" else 0.5  # see Policy: what a fresh prefix may be without harm
    if args["collab"] == "prefix":
        return Prefix(args["latents"], d_policy, start)
    if args["collab"] not in ROUTED:
        return None
    how = ([e.width for e in readers[:len(args["experts"])]], d_policy, args["latents"],
           args["router_heads"], args["router_width"], args["router_temperature"], start)
    return Router(*how) if args["collab"] == "soft" else Hard(*how, eye=eye, eye_width=readers[eye].width)


# -- text: experts that write
class Writer(Expert):
    """An expert that answers in words: greedily, at most `tokens` of them. Its row in the cache is the ids of
    what it wrote, -1 behind their end."""

    auto = "AutoModelForCausalLM"

    def __init__(self, name, tokens, **how):
        super().__init__(name, **how)
        self.tokens, self.kept, self.window = tokens, torch.int32, self.window - tokens
        self.marks += [f"writes {tokens}"]

    @torch.no_grad()
    def forward(self, ids):
        """Ids (B, tokens) that continue B lists of ids, padded on the left: all go on from the same column."""
        from transformers import GenerationConfig  # a fresh one: no repetition penalty, no sampling

        longest, stop = max(map(len, ids)), self.model.generation_config.eos_token_id
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        stop = line_ends(self.tokenizer, stop) if self.template == "plain" else stop
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.device)
        before = torch.tensor([longest - len(row) for row in ids], device=self.device)
        real = torch.arange(longest, device=self.device) >= before[:, None]
        how = GenerationConfig(max_new_tokens=self.tokens, do_sample=False, eos_token_id=stop or None,
                               pad_token_id=stop[0] if stop else 0)
        wrote = self.model.generate(input_ids=tokens, attention_mask=real.long(), generation_config=how)
        wrote = wrote[:, longest:].cpu()  # (B, at most `tokens`)
        ended = torch.isin(wrote, torch.tensor(stop, dtype=wrote.dtype)).cumsum(1) > 0
        return F.pad(wrote.masked_fill(ended, -1), (0, self.tokens - wrote.shape[1]), value=-1)


def writers(args):
    some = [Writer(e, args["write"], device=args["device"]) for e in args["experts"]]
    for e in some:
        if e.encoder:
            print(f"  left out  {e.name}: an encoder does not write")
    if all(e.encoder for e in some):
        raise ValueError("--collab text needs an expert that writes: name a causal model with --experts")
    return [e for e in some if not e.encoder]


def write(experts, texts, folder=None, progress=True):
    """For each problem [(expert's name, what it wrote, on one line, how many tokens)]. texts as for `read`."""
    columns = []
    for expert, asked in zip(experts, texts):
        rows = [row[row >= 0].tolist() for row in rows_of(expert, asked, folder, progress)]
        said = expert.tokenizer.batch_decode(rows, skip_special_tokens=True)
        columns.append([(expert.name, " ".join(text.split()), len(row)) for text, row in zip(said, rows)])
    return list(zip(*columns))


# -- the controls
def others(some, seed):
    """For each of n different problems the place of another one of its split, itself nobody's twice:
    neighbours in a random order swap, the last three of an odd number go round. (The training problems come
    in the seed's random order already; left as it is, it holds when the run is prolonged.)"""
    partner = [0] * len(some)
    for split in {p.split for p in some}:
        order = [i for i, p in enumerate(some) if p.split == split]
        if len(order) < 2:
            raise ValueError(f"--control shuffled needs two {split} problems at least: raise --val or --test")
        if split != "train":
            random.Random(f"{seed} {split}").shuffle(order)
        for i in range(0, len(order) - 1, 2):
            ring = order[i:] if i + 3 == len(order) else order[i:i + 2]
            for a, b in zip(ring, ring[1:] + ring[:1]):
                partner[a] = b
    return partner


def noise(some, mean, spread, seed):
    """Normal states (n, N, D) of the given mean and spread (N, D), for one problem always the same."""
    def draw(problem):
        digest = hashlib.sha256(f"{seed} {problem.question}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return mean + spread * torch.randn(mean.shape, generator=generator)
    return torch.stack([draw(p) for p in some])


# -- what is measured
def entropy(attention):
    """Mean entropy (nats) over prompts, heads and latents of attention (B, heads, L, N): 0 when each listens
    to one expert, ln N when all listen to all."""
    return torch.special.entr(attention.float()).sum(-1).mean().item()


def choices(datasets, attention, names):
    """{dataset: {expert: of how many prompts it is the one most listened to}}, from attention (B, ..., N)."""
    counts = {}
    for dataset, best in zip(datasets, attention.flatten(1, -2).mean(1).argmax(-1).tolist()):
        row = counts.setdefault(dataset, {})
        row[names[best]] = row.get(names[best], 0) + 1
    return counts


def mutual_information(tables):
    """What the expert listened to tells of the dataset, in nats, from the `choices` of some steps, summed: 0
    when every dataset is treated alike, at most the logarithm of their number."""
    joint = {}
    for table in tables:
        for dataset, row in table.items():
            for expert, n in row.items():
                joint[dataset, expert] = joint.get((dataset, expert), 0) + n
    total, sums = sum(joint.values()), {}
    for pair, n in joint.items():
        for side in enumerate(pair):
            sums[side] = sums.get(side, 0) + n
    return sum(n / total * math.log(n * total / (sums[0, d] * sums[1, e])) for (d, e), n in joint.items())


def tokens_spent(run, some):
    """Mean tokens that one problem costs: read by the policy, its prefix included (a completion comes on
    top), read by all the experts (by soft and hard alike, as the head learns from all), written by them."""
    mean = lambda counts: sum(counts) / len(some)
    prefix = run.args["latents"] if run.router is not None else 0
    read = [len(row) for e in run.readers for row in e.tokenize([run.expert_text(p, e) for p in some])]
    return dict(policy_reads=prefix + mean(len(run.ids[p.question]) for p in some), experts_read=mean(read),
                experts_write=mean(n for p in some for _, _, n in run.written.get(p.question, ())))
