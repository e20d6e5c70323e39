"""
What a finished run can still be asked.

    python lab/probe.py RUN --ablate KINDS    what replacing attention or states at test time costs
    python lab/probe.py RUN --walk            one problem from text to reward, in numbers
    python lab/probe.py RUN --spell           what a router alone reads of an expert's text, by what is read

KINDS are some of static, uniform, shuffle and zero, see `ablate`; also written to RUN/ablate.json.
"""
import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from claims import markdown, shown  # first: it lets Python find the files one folder up
from eval import evaluate, one_sentence, open_run
from experts import Expert, read_states, write_atomic, write_texts
from rewards import next_of_dataset, verify
from rlvr import Dataset, advantages, answer_ids, load_problems, rollout, words_loss
from router import Router, by_expert

KINDS = {"static": ("soft",), "uniform": ("soft",), "shuffle": ("soft", "hard", "linear"),
         "zero": ("soft", "hard", "linear", "prefix")}  # what they can be asked of, by --collab

# -- Replaced at test time

def ablate(policy, experts, router, args, kinds):
    """What each kind of replacement costs on the run's test problems.

    static   attention is its mean over training problems, by head and latent, whatever the problem
    uniform  every state is attended to alike
    shuffle  the states are those of another test problem of the same dataset
    zero     the context tokens are neutral: a prefix that says nothing
    Returns a dictionary for JSON: `right` by problem as trained, `kinds` with the same for each kind, and by
    problem the dataset, each expert's attention share, and whether its own text is right.
    """
    check_kinds(args, kinds)
    data = Dataset(load_problems(args, "test"), policy, experts, args)
    verdicts, _, attention = evaluate(policy, router, data, args)
    right = {}
    for kind in kinds:
        H, replaced = data.H, router
        if kind == "static":
            mean = mean_attention(policy, experts, router, args)
            replaced = lambda H: router(H, attention=mean)
        if kind == "uniform":
            replaced = lambda H: router(H, attention=torch.tensor(1 / H.shape[1], device=H.device))
        if kind == "shuffle":
            H = data.H[next_of_dataset(data.problems)]
        if kind == "zero":
            replaced = lambda H: (torch.zeros_like(router(H)[0]), None)
        answered, _, _ = evaluate(policy, replaced, data, args, H=H)
        right[kind] = dict(right=[int(verdict.strict) for verdict in answered])
    shares = [] if attention is None else attention.mean((1, 2)).tolist()
    return dict(right=[int(verdict.strict) for verdict in verdicts], kinds=right,
                datasets=[problem.dataset for problem in data.problems],
                attended=[[round(share, 3) for share in row] for row in shares], knows=knows(data))

def check_kinds(args, kinds):
    """Raises ValueError for what a run has nothing of."""
    for kind in kinds:
        if args.collab not in KINDS[kind]:
            raise ValueError(f"a run with --collab {args.collab} has nothing that --ablate {kind} could "
                             f"replace: ask it of {' or '.join(KINDS[kind])}")

@torch.no_grad()
def mean_attention(policy, experts, router, args):
    """(heads, L, N): the mean over at most 2,000 problems that the run was trained on."""
    data = Dataset(load_problems(args, "train", min(args.steps * args.batch, 2000)), policy, experts, args)
    total = 0.0
    for H in data.H.split(256):
        total = total + router(H.float().to(policy.embed.device))[1].sum(0)
    return total / len(data)

def knows(data):
    """[n][experts]: 1 where an expert's own text is right; [] for a run that asked for no texts."""
    columns = [[int(verify(text, problem, "plain").strict) for text, problem in zip(texts, data.problems)]
               for texts in data.texts]
    return [list(row) for row in zip(*columns)]

def ablation_table(result):
    """Markdown: as trained, replaced, and the paired difference with its 95% interval."""
    right, rows = result["right"], []
    for kind, row in result["kinds"].items():
        change = shown(100.0 * np.subtract(row["right"], right))
        rows.append([kind, len(right), f"{np.mean(right):.1%}", f"{np.mean(row['right']):.1%}", change])
    return "\n".join(markdown(["replaced", "n", "as trained", "replaced", "change, 95%"], rows))

# -- The first part of stage 0 alone, by what is read

def spell(policy, experts, args, steps=200, n_train=1750, n_val=250):
    """Yields rows: what share of new texts of the first expert that writes a fresh router spells right,
    whole, after `steps` of words (see rlvr.align): by layers read, without and with its own text behind the
    prompt; `spelled` is {number of last tokens read: share}.
    """
    expert = next((expert for expert in experts if expert.writes), None)
    if expert is None:
        raise ValueError("--spell needs an expert that writes: ask it of a run that has one")
    known, new = load_problems(args, "train", n_train), load_problems(args, "val", n_val)
    prompts = [expert.prompt(problem) for problem in known + new]
    targets = [answer_ids(policy, text, args.form) for text in write_texts([expert], [prompts])[0]]
    middle, last = round(2 / 3 * expert.n_layers), expert.n_layers
    for own_text in (False, True):
        reader = Expert(expert.source, "last", [middle, last], 4, own_text, tokens=args.write, cue=args.cue,
                        device=expert.device, untrained=expert.untrained)
        H = read_states([reader], [prompts]).float().to(policy.embed.device)  # (n, 2 * 4, width), by layer
        for layers in ((middle,), (last,), (middle, last)):
            row = dict(own_text=own_text, layers=layers, spelled={})
            for positions in (1, 2, 4):
                entries = [4 * (layer == last) + back for layer in layers for back in range(positions)]
                row["spelled"][positions] = spelled(policy, args, H[:, entries], targets, n_train, steps)
            yield row

def spelled(policy, args, H, targets, n_train, steps):
    """Train a fresh router for `steps` on the first n_train of the states H (n, N, width); returns the share
    of the other texts that it spells right. targets: tokens of each text."""
    used = sorted({token for ids in targets for token in ids})
    embeddings = (policy.embed[used].float() - policy.neutral) / policy.embed_std  # (n, d), as a prefix
    torch.manual_seed(args.seed)
    router = Router([H.shape[2]] * H.shape[1], policy.config.hidden_size, args.latents, args.router_heads,
                    args.router_dim).to(policy.embed.device)
    router.fit_standardization(H[:256])
    optimizer = torch.optim.AdamW(router.parameters(), args.align_words_lr, weight_decay=0.0)
    for _ in tqdm(range(steps), desc="words", leave=False):
        at = torch.randint(n_train, (256,)).tolist()
        context, _ = router(H[at])
        loss, count = words_loss(policy, context, [targets[i] for i in at], used)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nearest = (router(H[n_train:])[0] @ embeddings.T).argmax(-1)  # (n_val, L)
    right = [[used[i] for i in row[:len(ids)]] == ids[:args.latents]
             for row, ids in zip(nearest.tolist(), targets[n_train:]) if ids]  # []: it said nothing
    return sum(right) / max(1, len(right))

SPELL_HEAD = "| read behind | layers | 1 token | 2 tokens | 4 tokens |\n" + "|---" * 5 + "|"

def spell_line(row):
    """A line of Markdown below SPELL_HEAD."""
    cells = ["its own text" if row["own_text"] else "the prompt", " and ".join(map(str, row["layers"]))]
    cells += [f"{share:.0%}" for share in row["spelled"].values()]
    return f"| {' | '.join(cells)} |"

# -- One problem from text to reward

@torch.no_grad()
def walk(policy, experts, router, args):
    """One test problem, the first of 32 on which the sampled group does not agree, with the run's own
    numbers: lines of text of at most 110 columns."""
    data = Dataset(load_problems(args, "test", 32), policy, experts, args, progress=False)
    for i in range(len(data)):
        batch = data.batch([i])
        generator = torch.Generator(policy.embed.device).manual_seed(args.seed)
        sampled = rollout(policy, router, batch, args, args.group, args.temperature, generator)
        if sampled.rewards.amax() > sampled.rewards.amin():
            break
    problem = data.problems[i]
    lines = [f"A {problem.dataset} problem, held out of training; its answer is {problem.answer!r}."]
    say = lambda text: lines.extend(textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    "))
    say(f"the policy reads {len(data.ids[i])} tokens: {data.prompts[i]!r}")
    for expert in experts:
        text = expert.prompt(problem)
        say(f"{expert.name} (width {expert.width}) reads {len(expert.tokenize([text])[0])} tokens: {text!r}")
    context, attention = router(batch.H) if router else (None, None)
    if attention is not None:
        say(f"states H {tuple(batch.H.shape)}: those of each expert, padded with zeros to the widest")
        say(f"attention A {tuple(attention.shape)}: heads, latents, states; mean over heads, by latent and "
            "in all:")
        for expert, row in zip(experts, by_expert(attention, data.owner)[0].mean(0).T.tolist()):
            share = sum(row) / len(row)
            latents = " ".join(f"{x:.2f}" for x in row[:12])
            say(f"{expert.name[:20]:20} {latents} all {share:.2f} {'█' * round(10 * share)}")
    if context is not None:
        sizes = " ".join(f"{x:.2f}" for x in context[0].float().square().mean(-1).sqrt().tolist())
        say(f"prefix C {tuple(context.shape)}: vectors before the prompt, each this far from neutral, in "
            f"standard deviations of the policy's embeddings: {sizes}")
    std, mean = torch.std_mean(sampled.rewards, correction=0)
    say(f"{args.group} answers sampled at temperature {args.temperature:g}; mean reward {mean:.3f}, std "
        f"{std:.3f}; advantage (reward - mean) / std:")
    gained = advantages(sampled.rewards)[0].tolist()
    for text, verdict, advantage in zip(sampled.texts[0], sampled.verdicts[0], gained):
        text = repr(text if len(text) <= 44 else "... " + text[-40:])[:50]
        lines.append(f"    {text:50} {verdict.reason:12} reward {verdict.reward:.1f}   "
                     f"advantage {advantage:+z.2f}")
    return "\n".join(lines)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ablate", nargs="+", choices=KINDS)
    what.add_argument("--walk", action="store_true")
    what.add_argument("--spell", action="store_true")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    args, policy, experts, router = open_run(options.run, options.device)
    if options.walk:
        print(walk(policy, experts, router, args))
    elif options.spell:
        print(SPELL_HEAD, flush=True)
        for row in spell(policy, experts, args):
            print(spell_line(row), flush=True)
    else:
        result = ablate(policy, experts, router, args, options.ablate)
        print(ablation_table(result))
        write_atomic(options.run / "ablate.json", (json.dumps(result) + "\n").encode())

if __name__ == "__main__":
    sys.exit(one_sentence("probe.py", main))
