"""
The ways to collaborate, their controls, and what is measured of them.

    way      trained beside LoRA          what the policy sees before the question
    soft     Router                       what the router makes of all experts' states
    hard     Router and a linear head     what the router makes of ONE expert's state; the head chooses which
    prefix   constant vectors             those vectors, the same for every problem; no expert takes part
    text     nothing                      what the experts wrote, as text
    single   nothing                      nothing

To the rest of the project a way is `Run.router`: None, or a module called as router(H) -> (context tokens
(B, L, d), attention (B, heads, L, N) or None). A control replaces all of H, what the head sees too, and
nothing else: what a run still gains then, it did not gain by reading the experts.
"""
import hashlib
import math
import random
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

from experts import Expert, line_ends, rows_of
from folders import stop_tokens
from router import Router

WAYS = ("soft", "single", "prefix", "hard", "text")
CONTROLS = ("none", "shuffled", "noise", "untrained")
ROUTED, PEOPLED = ("soft", "hard"), ("soft", "hard", "text")  # the ways with attention; those with experts


class Prefix(nn.Module):
    """Learned constant vectors, at first of a fresh router's scale: what soft could learn of nobody."""

    def __init__(self, latents, d_policy, start):
        super().__init__()
        self.vectors = nn.Parameter(start * torch.randn(latents, d_policy))

    def forward(self, H):
        """H (B, 0, 0), B problems of which nothing is read -> context (B, L, d) and no attention."""
        return self.vectors.expand(len(H), -1, -1), None


class Hard(Router):
    """A router that hears one expert a problem: the first choice of a linear head, which sees the problem
    through a frozen reader, column `eye` of H (of the N experts, or the one behind them).

    The choice is straight-through (1308.3432): forward one expert's entry, backward the softmax's mixture of
    all. So the others learn to speak while they are not heard, and the head what they would have said; with
    the choice alone in the backward pass it stayed with the expert it began with.
    """

    def __init__(self, widths, *how, eye, N):
        super().__init__(widths, *how)
        seen, heard = self.owner == eye, int((self.owner < N).sum())  # slices of the eye, of the N experts
        self.register_buffer("seen", seen, persistent=False)
        self.head = nn.Linear(self.gain[seen].numel(), N)
        self.project, self.identity = nn.Parameter(self.project[:heard]), nn.Parameter(self.identity[:N])

    def forward(self, H, mask=None):
        """As Router's; the attention is the choice. An absent expert is not chosen, but it may be the eye."""
        x = self.standard(H)  # (B, M, w), the slices of a reader that is no expert last
        scores, said = self.head(x[:, self.seen].flatten(1)), x[:, :len(self.project)]  # (B, N)
        if mask is not None:
            mask = mask.expand(scores.shape)
            absent = ~mask[:, self.owner[:len(self.project)], None]
            scores, said = scores.masked_fill(~mask, -torch.inf), said.masked_fill(absent, 0.0)
        p = scores.float().softmax(-1)
        choice = F.one_hot(p.argmax(-1), p.shape[-1]).to(p)
        E = self.entries(said)
        mixture, chosen = ((w[..., None] * E).sum(1, keepdim=True) for w in (p, choice))  # (B, 1, dim)
        context, one = self.attend(mixture + (chosen - mixture).detach())
        return context, one * choice[:, None, None]  # (B, heads, L, 1) of ones -> (B, heads, L, N)


def assemble(args):
    """(experts, readers): who takes part, and whose states H holds. Hard chooses by the first encoder among
    its experts, else by the frozen policy's mean state, which is read as one more column."""
    if args["collab"] == "text":
        some = [Writer(e, args["write"], device=args["device"]) for e in args["experts"]]
        experts = [e for e in some if not e.encoder]
        for e in filter(lambda e: e.encoder, some):
            print(f"  left out  {e.name}: an encoder does not write")
        if not experts:
            raise ValueError("--collab text needs an expert that writes: name a causal model with --experts")
        return experts, experts
    how = dict(layer=args["layer"], device=args["device"], untrained=args["control"] == "untrained")
    experts = [Expert(e, read=args["read"], **how) for e in args["experts"]]
    if args["collab"] != "hard" or any(e.encoder for e in experts):
        return experts, experts
    eye = Expert(args["policy"], **how | dict(read="mean", layer=-1))
    eye.name += " (chooses)"
    return experts, [*experts, eye]


def make_router(args, experts, readers, d_policy):
    """The module that stands before the policy; None for a way that has none."""
    start = 0.02 if args["neutral"] == "mean" else 0.5  # see Policy: what a fresh prefix may be without harm
    if args["collab"] == "prefix":
        return Prefix(args["latents"], d_policy, start)
    shape = (args["latents"], args["router_heads"], args["router_width"])
    how = (d_policy, *shape, args["router_temperature"], start)
    if args["collab"] == "hard":
        eye = next((i for i, e in enumerate(experts) if e.encoder), len(experts))
        return Hard([e.width for e in readers], *how, eye=eye, N=len(experts))
    return Router([e.width for e in experts], *how) if args["collab"] == "soft" else None


# -- experts that write
class Writer(Expert):
    """An expert that answers in words, greedily. Its row in the cache is the ids of what it wrote, at most
    `tokens`, -1 behind their end."""

    auto = "AutoModelForCausalLM"

    def __init__(self, name, tokens, **how):
        super().__init__(name, **how)
        self.tokens, self.kept, self.window = tokens, torch.int32, self.window - tokens
        self.marks += [f"writes {tokens}"]
        if self.window < 1:
            raise ValueError(f"--write {tokens} leaves {self.name} no room for a prompt: choose fewer tokens")

    @torch.no_grad()
    def forward(self, ids):
        """What follows B lists of ids, (B, tokens). Padding stands on the left: all go on at one column."""
        from transformers import GenerationConfig
        longest, stop = max(map(len, ids)), stop_tokens(self.folder, self.model.config)
        stop = line_ends(self.tokenizer, stop) if self.template == "plain" else stop
        tokens = torch.tensor([[stop[0]] * (longest - len(row)) + row for row in ids])
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        how = GenerationConfig(max_new_tokens=self.tokens, do_sample=False, eos_token_id=stop,
                               pad_token_id=stop[0])
        self.model.generation_config = how  # or its own would say what this does not: penalties
        wrote = self.model.generate(input_ids=tokens.to(self.device), attention_mask=real.to(self.device),
                                    generation_config=how)[:, longest:].cpu()
        wrote = wrote.masked_fill(torch.isin(wrote, torch.tensor(stop)).cumsum(1) > 0, -1)
        return F.pad(wrote, (0, self.tokens - wrote.shape[1]), value=-1)


def write(experts, texts, folder=None, progress=True):
    """For each problem [(expert's name, what it wrote as one line, its tokens)]. texts as for `read`."""
    columns = []
    for expert, asked in zip(experts, texts):
        rows = [row[row >= 0].tolist() for row in rows_of(expert, asked, folder, progress)]
        said = expert.tokenizer.batch_decode(rows, skip_special_tokens=True)
        columns.append([(expert.name, " ".join(text.split()), len(row)) for text, row in zip(said, rows)])
    return list(zip(*columns))


# -- controls
def others(some, seed):
    """For each of these different problems the place of another one of its split, each given away once: the
    next in a random order, the first for the last. (Training problems come in the seed's random order; left
    in it, all but one keep their partner when a run is prolonged.)"""
    partner = [0] * len(some)
    for split in {p.split for p in some}:
        order = [i for i, p in enumerate(some) if p.split == split]
        if len(order) < 2:
            raise ValueError(f"--control shuffled needs two {split} problems at least: raise --val or --test")
        if split != "train":
            random.Random(f"{seed} {split}").shuffle(order)
        for i, other in zip(order, order[1:] + order[:1]):
            partner[i] = other
    return partner


def noise(some, mean, spread, seed):
    """Normal states (n, N, D) of this mean and spread (N, D); a problem has always the same."""
    def draw(question):
        digest = hashlib.sha256(f"{seed} {question}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return mean + spread * torch.randn(mean.shape, generator=generator)
    return torch.stack([draw(p.question) for p in some])


# -- what is measured
def listening(problems, attention, names):
    """Of a step's attention (B, heads, L, N): its mean by head and latent; its mean entropy in nats (0: each
    latent hears one expert, ln N: all alike); {dataset: {expert: of how many prompts it is heard most}}."""
    if attention is None:
        return dict(attention_map=[], attention_entropy=0.0, choices={})
    mean = [[[round(x, 3) for x in latent] for latent in head] for head in attention.mean(0).tolist()]
    most = attention.mean((1, 2)).argmax(-1).tolist()
    choices = {d: dict(Counter(names[i] for p, i in zip(problems, most) if p.dataset == d))
               for d in sorted({p.dataset for p in problems})}
    return dict(attention_map=mean, attention_entropy=torch.special.entr(attention).sum(-1).mean().item(),
                choices=choices)


def mutual_information(steps):
    """What the expert heard most tells of the dataset, in nats, over the `choices` of some steps: 0 where all
    datasets are treated alike, at most the logarithm of their number; a few hundredths too high on few."""
    n, of, to = Counter(), Counter(), Counter()  # prompts of each pair, of each dataset, to each expert
    for d, e, k in ((d, e, k) for choices in steps for d, row in choices.items() for e, k in row.items()):
        n[d, e], of[d], to[e] = n[d, e] + k, of[d] + k, to[e] + k
    return sum((n[d, e] / n.total() * math.log(n[d, e] * n.total() / of[d] / to[e]) for d, e in n), 0.0)


def tokens_spent(run, some):
    """Mean tokens that a problem costs: read by the policy, prefix included (its completions come on top),
    read by all experts (by hard as by soft: its head learns of all of them), written by them."""
    mean = lambda counts: sum(counts) / len(some)
    prefix = run.args["latents"] if run.router is not None else 0
    read = [len(row) for e in run.readers for row in e.tokenize([run.expert_text(p, e) for p in some])]
    return dict(policy_reads=prefix + mean(len(run.ids[p.question]) for p in some), experts_read=mean(read),
                experts_write=mean(n for p in some for _, _, n in run.written.get(p.question, ())))
