"""
What a run is: its settings, its models, its problems, and what the experts made of each problem.

train.py and eval.py both begin here: `build(args)` puts a `Run` together in the order in which a mistake is
cheapest to find (problems, then configurations, then weights), `Run.batch` makes any of its problems ready
for the policy, and `evaluate` has them answered greedily.
"""

import contextlib
import ctypes
import os
import random
import sys
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import ranks
from collab import ROUTED, assemble, make_router, noise, others, write
from experts import Expert, line_ends, read
from folders import read_config
from lora import BLOCKS
from model import Policy, bucket
from rewards import TooFew, problems, prompt, verify
from rlvr import Batch, join, out_of_memory, rollout

STATISTICS = 256  # training prompts that fix each expert's mean and spread, however long the run is
USUAL = dict(val=120, test=256)  # held-out problems when nobody says how many


@dataclass
class Run:
    """Everything a run works with: settings, models, the problems of each split and what was prepared for
    each."""

    args: dict
    policy: Policy
    router: torch.nn.Module | None  # see collab.py
    tokenizer: object
    experts: list
    readers: list  # whose states H holds: the experts, and who else it takes to choose among them
    items: dict  # split -> list of Problem
    shots: list
    form: str  # "tagged" or "plain": how an answer must be written
    ids: dict = field(default_factory=dict)  # question -> prompt token ids of the policy
    rows: dict = field(default_factory=dict)  # question -> row of H
    H: torch.Tensor | None = None  # (unique questions, N, D) what every reader made of every question
    written: dict = field(default_factory=dict)  # question -> what every expert wrote, see collab.write
    window: deque = field(default_factory=lambda: deque(maxlen=25))  # collab.choices of the last steps
    moments: tuple | None = None  # mean and spread (N, D) of the states that noise stands in for

    def batch(self, some):
        """A Batch of these problems on the policy's device."""
        device = self.policy.embed.device
        ids = [self.ids[p.question] for p in some]
        lengths = torch.tensor([len(x) for x in ids])
        tokens = torch.zeros(len(ids), bucket(int(lengths.max())), dtype=torch.long)
        for row, x in zip(tokens, ids):
            row[: len(x)] = torch.tensor(x)
        H = torch.empty(len(ids), 0, 0) if self.H is None else self.H[[self.rows[p.question] for p in some]]
        send = lambda t: (
            t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device))
        return Batch(list(some), send(tokens), send(lengths), send(H).float())

    def verify(self, text, problem, truncated):
        return verify(text, problem, form=self.form, truncated=truncated)

    def policy_text(self, problem):
        template = "plain" if self.form == "plain" else "chat"
        notes = "".join(f"{name}: {text}\n" for name, text, _ in self.written.get(problem.question, ()))
        problem = replace(problem, question=notes + problem.question)
        return prompt(problem, template, self.tokenizer, shots=self.shots)

    def expert_text(self, problem, expert):
        return expert_prompt(problem, expert, self.args["cue"])

    def prepare(self, some, progress=True):
        """Tokenise and have the experts read these problems, as far as that has not been done."""
        fresh = list({p.question: p for p in some if p.question not in self.ids}.values())
        if not fresh:
            return
        texts = [[self.expert_text(p, e) for p in fresh] for e in self.readers]
        if self.args["collab"] == "text":
            said = write(self.readers, texts, self.args["cache"], progress)
            self.written |= {p.question: x for p, x in zip(fresh, said)}
        encoded = self.tokenizer(
            [self.policy_text(p) for p in fresh], add_special_tokens=self.form == "plain")
        for p, ids in zip(fresh, encoded["input_ids"]):
            room = self.policy.window - self.args["max_new"] - (self.args["latents"] if self.router else 0)
            if len(ids) > room:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens leaves no room in the policy's window of "
                    f"{self.policy.window}: use fewer --shots, --max-new or --write, or an easier --level")
            self.ids[p.question] = ids
        if self.args["collab"] in ROUTED:
            texts, progress = [ranks.share(of) for of in texts], progress and not ranks.RANK
            H = torch.cat(ranks.gather(read(self.readers, texts, self.args["cache"], progress)))
            H = self.controlled(H, fresh)
            self.rows |= {p.question: len(self.rows) + i for i, p in enumerate(fresh)}
            self.H = H if self.H is None else torch.cat((self.H, H))

    def controlled(self, H, some):
        """What --control makes of the states H (n, N, D) of these problems (untrained: the experts are)."""
        if self.args["control"] == "shuffled":
            return H[others(some, self.args["seed"])]
        if self.args["control"] == "noise":
            first = H[:len({p.question for p in self.items["train"][:STATISTICS]})].float()
            self.moments = self.moments or (first.mean(0), first.std(0))
            return noise(some, *self.moments, self.args["seed"]).to(H.dtype)
        return H


def expert_prompt(problem, expert, cue=""):
    """What an expert is asked: the bare question in its own template, and the cue."""
    tokenizer = expert.tokenizer if expert.template == "chat" else None
    return prompt(problem, expert.template, tokenizer, ask=False) + cue


def ordered(args, n):
    """The first n training problems in this seed's order: shuffled in blocks, so that a longer run begins
    alike."""
    block = max(256, 8 * args["batch"])
    n_shots, whole = args["shots"], -(-n // block) * block
    pool = problems(args["task"], "train", n_shots + whole + block, args["data"], args["level"])
    shots = pool[:n_shots]
    shown = {p.question for p in shots}  # an epoch later they would come back, their answer in the prompt
    pool = [p for p in pool if p.question not in shown]
    for start in range(0, len(pool), block):
        part = pool[start:start + block]
        random.Random(f"{args['seed']} {start}").shuffle(part)
        pool[start:start + block] = part
    return pool[:n], shots


def held_out(args, split, n=None, whole=False):
    """n problems of val or test; n not said: the usual number, or as many as a small space has. whole: of a
    test file all, where there is one."""
    usual = 1319 if split == "test" and args["task"] == "gsm8k" and whole else USUAL[split]
    try:
        return problems(args["task"], split, n or usual, args["data"], args["level"])
    except TooFew as few:
        if n or not few.available:
            raise
        return problems(args["task"], split, few.available, args["data"], args["level"])


def build(args, announce=None, training=True):
    """Models, problems and expert states of a run, in the order in which a mistake is cheapest to find.
    training=False: no problem is read yet; what is wanted is named to `Run.prepare` later."""
    train_items, shots = ordered(args, max(args["steps"] * args["batch"], STATISTICS))
    items = dict(train=train_items, val=held_out(args, "val", args["val"]),
                 test=held_out(args, "test", args["test"]))
    experts, readers = assemble(args)
    for i, e in enumerate(experts):  # two folders may end alike; a name is what attention is reported under
        e.name += f"-{i}" if any(e.name == other.name for other in experts[:i]) else ""
    itself = Expert(args["policy"], template=args["template"])  # its tokenizer and size, no weights yet
    form = "tagged" if itself.template == "chat" else "plain"
    dtype = args["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if itself.params >= 50e6 else "float32"
    dtype = getattr(torch, dtype)
    if announce:
        announce(args, items, readers, itself, form, dtype, lambda p, e: expert_prompt(p, e, args["cue"]))

    if args["device"].startswith("cuda"):  # the policy is held in bf16, without autocast; the router in fp32
        torch.set_float32_matmul_precision("high")  # whose products tf32 is enough for
    keep_memory()
    torch.manual_seed(args["seed"])
    policy = Policy.load(args["policy"], args["rank"], args["alpha"], dtype, args["device"], args["neutral"])
    if args["compile"]:
        policy.fuse()
    router = make_router(args, experts, readers, policy.config["hidden_size"])
    if router is not None:
        router.to(args["device"])
    if form == "plain":
        policy.stop = torch.tensor(line_ends(itself.tokenizer, policy.stop.tolist()), device=args["device"])
    run = Run(args, policy, router, itself.tokenizer, experts, readers, items, shots, form)
    if training:
        run.prepare(items["train"] + items["val"] + items["test"])
        if args["collab"] in ROUTED:
            router.standardise(run.batch(items["train"][:STATISTICS]).H)
    elif args["control"] == "noise":
        run.prepare(items["train"][:STATISTICS])  # whose mean and spread the noise has
    return run


OWN = object()


@torch.no_grad()
def evaluate(run, some, router=OWN, rows=64):
    """Greedy answers: a verdict and a text for each problem, and the attention (n, heads, L, N) or None.
    router: another one (or any function of H), or None for no prefix. LoRA is as the caller left it."""
    router, mine = run.router if router is OWN else router, ranks.share(some)
    whole = join([rollout(run.policy, router, run.batch(mine[i:i + rows]), run.tokenizer, run.verify, 1,
                          run.args["max_new"], temperature=0) for i in range(0, len(mine), rows)])
    return [row[0] for row in whole.verdicts], [row[0] for row in whole.texts], whole.attention


def memory_table(args, policy, experts, dtype, prompt_tokens):
    """Estimated bytes by part, a list of (what, bytes). prompt_tokens: of the longest prompt."""
    c, size, w = read_config(policy.folder), dtype.itemsize, args["router_width"]
    d, ff, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    B, G, T = args["batch"], args["group"], args["max_new"]
    micro = min(args["micro"] or B, B)
    S = prompt_tokens + args["latents"] * (args["collab"] in (*ROUTED, "prefix"))
    lora = args["rank"] * layers * (7 * d + 2 * (H + K) * D + 3 * ff)
    router = sum(e.width for e in experts) * w + 11 * w * w + w * d if args["collab"] in ROUTED else 0
    kept = 10 * d + 2 * (H + 2 * K) * D + 5 * ff  # numbers that autograd keeps of one token in one block
    scores = 2 * G * H * T * (S + T)
    blocks = layers * (2 * d * (H + K) * D + 3 * d * ff)  # merged with LoRA while sampling, in a copy
    head = c["vocab_size"] * d * (args["device"] == "cpu" and size == 2 and BLOCKS)  # sorted
    return [("policy, frozen", policy.params * size),
            ("LoRA and router, their gradients and AdamW's moments", 16 * (lora + router)),
            ("rollout: weights merged with LoRA, keys and values, logits",
             (blocks + head + 2 * layers * K * D * B * (S + G * T) + B * G * c["vocab_size"]) * size),
            (f"gradient pass, {micro} prompts at a time (--micro)",
             layers * micro * ((S + G * T) * kept + scores) * size),
            ("log-probabilities, one chunk", 3 * 256 * c["vocab_size"] * 4),
            ("working memory of the libraries", 200 << 20),
            ("largest expert, only while reading",
             max((e.params * e.dtype.itemsize for e in experts), default=0))]


def memory_peak(table):
    """Bytes at the worst moment of `memory_table`: sampling, the gradient pass and reading take turns."""
    frozen, trained, sampling, gradient, chunk, libraries, reading = (size for _, size in table)
    return libraries + max(reading, frozen + trained + max(sampling, gradient + chunk))


def fitting_micro(args, policy, experts, dtype, prompt_tokens):
    """The most prompts a micro-batch, halving from all, whose estimate leaves a fifth of the memory free."""
    micro, room = args["batch"], 0.8 * free_memory(args["device"])
    rest = (policy, experts, dtype, prompt_tokens)
    while micro > 1 and memory_peak(memory_table(args | dict(micro=micro), *rest)) > room:
        micro = -(-micro // 2)
    return micro


def used_memory(device):
    """MB that the run holds now: of the GPU's memory, else resident; 0 where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.memory_reserved() / 2**20
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def libc(name, *args):
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        getattr(ctypes.CDLL(None), name)(*args)


def keep_memory():
    """Let glibc use freed blocks again, not give them back: a norm of 1,024 rows can spend nine tenths of its
    time on fresh pages."""
    libc("mallopt", -3, 32 << 20)  # M_MMAP_THRESHOLD, the most that it takes
    libc("mallopt", -1, 1 << 30)  # M_TRIM_THRESHOLD


def trim_memory():
    """Give freed memory back to the system: glibc keeps it in fragments, and a long run looks like a leak."""
    libc("malloc_trim", 0)


def free_memory(device):
    """Bytes free on the device; infinite where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    try:  # what Linux could free counts too
        line = next(x for x in open("/proc/meminfo") if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return float("inf")


def excuse(program, error):
    """Print the one sentence by which a user can mend an error, return exit code 2. A bug is raised again."""
    if isinstance(error, OSError):  # a disk that is full, a folder that may not be written
        error = f"{error}: mend that and go on with --resume, what was saved is whole"
    elif isinstance(error, (RuntimeError, MemoryError)):
        if not out_of_memory(error):
            raise error
        error = "out of memory: lower --batch, --group or --max-new, or choose smaller models"
    print(f"{program}: {error}", file=sys.stderr)
    return 2
