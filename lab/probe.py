"""
What a finished run can still be asked.

    python -m lab.probe RUN --ablate KINDS    what it costs to replace attention or states at test time
    python -m lab.probe RUN --walk            one problem from text to reward, in numbers
    python -m lab.probe RUN --spell           what a router alone reads of an expert's text, by what is read

KINDS are some of static, uniform, shuffle and zero, see `ablate`. Their result is also written to
RUN/ablate.json.
"""
import argparse
import functools
import json
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from eval import evaluate
from experts import Expert, read_states, thought_ids, write_atomic, written_ids
from lab.claims import markdown, shown
from rewards import next_in_dataset, verify
from rlvr import (Dataset, advantages, import_extension, load_problems, open_run, read_config, rollout,
                  run_cli, without_nan, words_loss)
from router import ROUTERS, HardRouter, Router, by_expert, reads_states

KINDS = ("static", "uniform", "shuffle", "zero")


# -- Replace something at test time

class WithAttention(nn.Module):
    """A router whose attention is always the same: `attention`, broadcast to (B, heads, L, N)."""

    def __init__(self, router, attention):
        super().__init__()
        self.router = router
        self.fixed = attention

    def forward(self, H, visible=None, attention=None):
        return self.router(H, visible, self.fixed.to(H.device))


class WithNeutralContext(nn.Module):
    """A router whose context tokens are all zero: they say nothing."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, H, visible=None, attention=None):
        context, _ = self.router(H, visible)
        return torch.zeros_like(context), None


def ablate(policy, experts, router, args, kinds):
    """Test a run once as it was trained, and once for each kind of replacement.

    static   the attention is its mean over training problems, by head and latent, whatever the problem is
    uniform  the attention is the same for every state
    shuffle  the states are those of another test problem of the same dataset
    zero     the context tokens are zero, a prefix that says nothing

    Returns a dict for JSON. Lists have one item for each test problem:

        right     1 for a right answer of the run as it was trained, else 0
        kinds     {kind: {"right": the same with this replacement}}
        datasets  the problem's dataset
        attended  the attention to each expert; [] for a router without attention
        knows     see `knows`

    Raises ValueError for a kind that makes no sense for this run.
    """
    check_kinds(args, kinds)
    dataset = Dataset(load_problems(args, "test"), policy, experts, args)
    verdicts, _, attention = evaluate(policy, router, dataset, args)

    results = {}
    for kind in kinds:
        H, replaced = dataset.H, router
        if kind == "static":
            replaced = WithAttention(router, mean_attention(policy, experts, router, args))
        elif kind == "uniform":
            replaced = WithAttention(router, torch.tensor(1 / H.shape[1]))
        elif kind == "shuffle":
            H = dataset.H[next_in_dataset(dataset.problems)]
        elif kind == "zero":
            replaced = WithNeutralContext(router)
        replaced_verdicts, _, _ = evaluate(policy, replaced, dataset, args, H=H)
        results[kind] = dict(right=ones_where_right(replaced_verdicts))

    attended = []
    if attention is not None:
        for shares in attention.mean((1, 2)).tolist():
            attended.append([round(share, 3) for share in shares])
    return dict(right=ones_where_right(verdicts), kinds=results,
                datasets=[problem.dataset for problem in dataset.problems], attended=attended,
                knows=knows(dataset))


def check_kinds(args, kinds):
    """Raises ValueError for a kind of replacement that makes no sense for the run's router."""
    router_class = ROUTERS[args.router]
    has_soft_attention = issubclass(router_class, Router) and not issubclass(router_class, HardRouter)
    makes_sense = dict(static=has_soft_attention, uniform=has_soft_attention,
                       shuffle=reads_states(args.router), zero=args.router != "none")
    possible = [kind for kind in KINDS if makes_sense[kind]]
    for kind in kinds:
        if kind not in possible:
            raise ValueError(f"a run with --router {args.router} has nothing that --ablate {kind} could "
                             f"replace: for this run choose from {', '.join(possible) or 'none of them'}")


@torch.no_grad()
def mean_attention(policy, experts, router, args):
    """(heads, L, N): the mean over the problems that the run was trained on, 2,000 of them at most."""
    n = min(args.steps * args.batch, 2000)
    dataset = Dataset(load_problems(args, "train", n), policy, experts, args)
    total = 0.0
    for H in dataset.H.split(256):
        _, attention = router(H.float().to(policy.embed.device))
        total = total + attention.sum(0)
    return total / len(dataset)


def ones_where_right(verdicts):
    return [int(verdict.reason == "right") for verdict in verdicts]


def knows(dataset):
    """[n][experts]: 1 where what the expert says is right, else 0; [] if the run asked for no texts."""
    columns = []
    for texts in dataset.texts:
        verdicts = [verify(text, problem, "plain") for text, problem in zip(texts, dataset.problems)]
        columns.append(ones_where_right(verdicts))
    return [list(row) for row in zip(*columns)]


def ablation_table(result):
    """Markdown: accuracy as trained and with each replacement, and the paired difference."""
    right, rows = result["right"], []
    for kind, replaced in result["kinds"].items():
        change = shown(100.0 * np.subtract(replaced["right"], right))
        rows.append([kind, len(right), f"{np.mean(right):.1%}", f"{np.mean(replaced['right']):.1%}", change])
    return "\n".join(markdown(["replaced", "n", "as trained", "replaced", "change, 95%"], rows))


# -- The first part of stage 0 alone: how well can a router spell, and from which states?

POSITIONS = (1, 2, 4)  # of how many tokens the states are read


def spell(policy, experts, args, steps=200, n_train=1750, n_val=250):
    """Train fresh routers to spell what an expert says, each from other states of this expert.

    The expert is the first one that writes. The states are those of a middle layer, of the last layer, or of
    both: of the last 1, 2 or 4 tokens of the prompt, or with its own text of the prompt's last token and the
    0, 1 or 3 tokens of the text that follow it. Yields a dict for each choice of layers: `states` (what
    `Expert` is asked for), `layers`, and `spelled`, {number of tokens: fraction of new texts that are spelled
    without a mistake}.
    Raises ValueError if no expert writes.
    """
    expert = next((expert for expert in experts if expert.writes), None)
    if expert is None:
        raise ValueError("--spell needs an expert that writes: name a run that has one")

    # Let the expert write, and turn its texts into the policy's tokens. No states are read for that.
    problems = load_problems(args, "train", n_train) + load_problems(args, "val", n_val)
    only_texts = dict(router="none", control="none", reading_steps=1)
    dataset = Dataset(problems, policy, [expert], Namespace(**(vars(args) | only_texts)))
    targets = dataset.targets[0]

    prompts = [expert.prompt(problem) for problem in problems]
    middle, last = round(2 / 3 * expert.n_layers), expert.n_layers
    for states in (f"last:{max(POSITIONS)}", f"answer:{max(POSITIONS)}"):
        # Read all states that any of the routers needs: (n, 2 * 4, width), the middle layer's first.
        reader = Expert(expert.source, states, [middle, last], max_new=args.write, cue=args.cue,
                        think=args.think, device=expert.device, untrained=expert.untrained)
        H = read_states([reader], [prompts]).float().to(policy.embed.device)

        for layers in ((middle,), (last,), (middle, last)):
            row = dict(states=states, layers=layers, spelled={})
            for positions in POSITIONS:
                chosen = H[:, places_of_states(layers, last, positions)]
                row["spelled"][positions] = fraction_spelled(policy, args, chosen, targets, n_train, steps)
            yield row


def places_of_states(layers, last, positions):
    """Where the states of some layers stand among the 8 states of the reader in `spell`.

    With one position the two layers stand at 0 and 4, with two positions at 0, 1, 4 and 5.
    """
    places = []
    for layer in layers:
        first = max(POSITIONS) * (layer == last)
        places += range(first, first + positions)
    return places


def fraction_spelled(policy, args, H, targets, n_train, steps):
    """Train a fresh router on the first n_train of the states H (n, N, width), and test it on the others.

    targets: the tokens of each text, n lists. Returns the fraction of the other texts that it spells right.
    """
    # The embeddings of all tokens of the texts, in the units of the context.
    vocabulary = sorted({token for ids in targets for token in ids})
    embeddings = (policy.embed[vocabulary].float() - policy.prefix_origin) / policy.embed_std  # (n, d)

    # Train.
    N, width = H.shape[1:]
    torch.manual_seed(args.seed)
    router = Router([width] * N, [0] * N, policy.config.hidden_size, args.latents,
                    args.router_dim).to(policy.embed.device)
    router.fit_standardization(H[:256])
    optimizer = torch.optim.AdamW(router.parameters(), args.words_lr, weight_decay=0.0)
    for _ in tqdm(range(steps), desc="words", leave=False, disable=None):  # None: no bar in a file
        indices = torch.randint(n_train, (256,)).tolist()
        context, _ = router(H[indices])
        loss, n_tokens = words_loss(policy, context, [targets[i] for i in indices], vocabulary)
        (loss / n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    # Test: a context token spells the token whose embedding has the largest inner product with it.
    with torch.no_grad():
        context, _ = router(H[n_train:])
        nearest = (context @ embeddings.T).argmax(-1).tolist()  # [n][L]
    n_right = n_texts = 0
    for places, ids in zip(nearest, targets[n_train:]):
        if ids:  # else the expert says nothing
            spelled = [vocabulary[place] for place in places[:len(ids)]]
            n_right += spelled == ids[:args.latents]
            n_texts += 1
    return n_right / max(1, n_texts)


SPELL_HEAD = "| read after | layers | 1 token | 2 tokens | 4 tokens |\n" + "|---" * 5 + "|"


def spell_line(row):
    """A line of Markdown below SPELL_HEAD."""
    read_after = "its own text" if row["states"].startswith("answer") else "the prompt"
    layers = " and ".join(map(str, row["layers"]))
    percents = [f"{fraction:.0%}" for fraction in row["spelled"].values()]
    return f"| {' | '.join([read_after, layers, *percents])} |"


# -- One problem from text to reward

WIDTH = 110  # the most characters in a line of the walk


@torch.no_grad()
def walk(policy, experts, router, args):
    """Tell what happens to one test problem, with the run's own numbers. Returns lines of text.

    It is the first of 32 problems whose sampled answers are not all right or all wrong. All experts are
    visible, as in a test.
    """
    dataset = Dataset(load_problems(args, "test", 32), policy, experts, args, progress=False)
    for i in range(len(dataset)):
        batch = dataset.batch([i])
        generator = torch.Generator(policy.embed.device).manual_seed(args.seed)
        sampled = rollout(policy, router, batch, args, args.group, args.temperature, generator)
        if sampled.rewards.amax() > sampled.rewards.amin():
            break

    problem = dataset.problems[i]
    lines = [f"A {problem.dataset} problem, which was not in training; its answer is {problem.answer!r}."]
    lines += tell_prompts(experts, dataset, i)
    lines += tell_context(experts, router, batch, dataset.expert_of_state)
    lines += tell_answers(sampled, args)
    return "\n".join(lines)


def tell_prompts(experts, dataset, i):
    """What the policy and each expert read of problem i."""
    lines = wrapped(f"the policy reads {len(dataset.ids[i])} tokens: {dataset.prompts[i]!r}")
    for expert in experts:
        text = expert.prompt(dataset.problems[i])
        n_tokens = len(expert.tokenize([text])[0])
        lines += wrapped(f"{expert.name} (width {expert.width}) reads {n_tokens} tokens: {text!r}")

        # What it writes itself before its states are taken.
        thought = thought_ids(expert, [text], progress=False)[0]
        if thought:
            lines += wrapped(f"  it thinks, and the cue follows: {expert.tokenizer.decode(thought)!r}")
        if expert.reads_own_answer:
            written = written_ids(expert, [text], progress=False)[0]
            lines += wrapped(f"  then it reads its own answer: {expert.tokenizer.decode(written)!r}")
    return lines


def tell_context(experts, router, batch, expert_of_state):
    """What the router makes of a batch of one problem: states, attention, context tokens."""
    lines = []
    context, attention = router(batch.H, batch.visible)
    if attention is not None:
        lines += wrapped(f"states H {tuple(batch.H.shape)}: those of each expert, filled with zeros up to "
                         "the largest width")
        lines += wrapped(f"attention A {tuple(attention.shape)}: problem, heads, latents, states; here its "
                         "mean over the heads, for each latent and in all:")
        shares = by_expert(attention, expert_of_state)[0].mean(0)  # (L, E)
        for expert, column in zip(experts, shares.T.tolist()):
            mean = sum(column) / len(column)
            latents = " ".join(f"{share:.2f}" for share in column[:12])
            lines += [f"  {expert.name[:20]:20} {latents} all {mean:.2f} {'█' * round(10 * mean)}"]
    if context is not None:
        sizes = context[0].float().square().mean(-1).sqrt().tolist()
        numbers = " ".join(f"{size:.2f}" for size in sizes)
        lines += wrapped(f"context C {tuple(context.shape)}: vectors before the prompt. Their root mean "
                         f"squares, in standard deviations of the policy's embeddings: {numbers}")
    return lines


def tell_answers(sampled, args):
    """The sampled group of one problem: answers, verdicts, rewards, advantages."""
    std, mean = torch.std_mean(sampled.rewards, correction=0)
    lines = wrapped(f"{args.group} answers sampled at temperature {args.temperature:g}; mean reward "
                    f"{mean:.3f}, std {std:.3f}; advantage (reward - mean) / std:")
    advantage_of_each = advantages(sampled.rewards)[0].tolist()
    for text, verdict, advantage in zip(sampled.texts[0], sampled.verdicts[0], advantage_of_each):
        if len(text) > 44:
            text = "... " + text[-40:]
        lines.append(f"    {repr(text)[:50]:50} {verdict.reason:12} reward {verdict.reward:.1f}   "
                     f"advantage {advantage:+z.2f}")
    return lines


def wrapped(text):
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def open_finished(folder, device="auto", extension=""):
    """(args, policy, experts, router) of a run, after importing the extension that defines its router.

    extension: a Python file; "" for the one that config.json names. Raises ValueError as rlvr.open_run does.
    """
    extension = extension or read_config(folder)["args"].get("extension")
    if extension:
        import_once(Path(extension).expanduser().resolve())
    return open_run(folder, device)


@functools.cache  # a second import of the same file would make its changes twice
def import_once(path):
    return import_extension(path)


def run(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lab.probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ablate", nargs="+", choices=KINDS, help="Replace attention or states at test time.")
    what.add_argument("--walk", action="store_true", help="Tell one problem from text to reward.")
    what.add_argument("--spell", action="store_true", help="Train fresh routers to spell an expert's texts.")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1 or mps. Default: auto, the best there is.")
    parser.add_argument("--extension", metavar="FILE", default="",
                        help="A Python file that is imported first. Default: the one that train.py used.")
    options = parser.parse_args(argv)

    args, policy, experts, router = open_finished(options.run, options.device, options.extension)
    if options.walk:
        print(walk(policy, experts, router, args))
    elif options.spell:
        print(SPELL_HEAD, flush=True)
        for row in spell(policy, experts, args):
            print(spell_line(row), flush=True)
    else:
        result = ablate(policy, experts, router, args, options.ablate)
        print(ablation_table(result))
        text = json.dumps(without_nan(result), allow_nan=False)
        write_atomic(options.run / "ablate.json", f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(run_cli("lab.probe", run))
