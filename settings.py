"""
What a user may say, and what a run remembers of it.

Every setting stands once, in SETTINGS, with its default and the reason for it. `resolve` makes of what was
said a whole set of settings, which the run keeps in its config.json; --resume and eval.py find them there
(`settings`), and a damaged file is refused like a mistaken word.
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import ranks
from collab import CONTROLS, PEOPLED, ROUTED, WAYS
from experts import POOLS
from rewards import known

PAPER_BYTES = 22e9  # a GPU for the paper's pool: policy 6.2 GB, one expert at a time, the gradient pass
POOL = None  # the default is the pool's, which suits its size (experts.POOLS)
SETTINGS = {  # group: [(name, default, type or choices, help with the reason for the default)]
    "what to learn": [
        ("task", POOL, str, "gsm8k, a Reasoning Gym dataset, arithmetic, logic, algorithmic; joined by +"),
        ("level", POOL, str, "of generated tasks: tiny, easy, default, hard, or key=value,key=value"),
        ("data", None, str, "GSM8K: folder with train.jsonl and test.jsonl (default: downloaded once)"),
        ("template", POOL, ("auto", "chat", "plain"), "how the policy is asked; auto: chat if it can"),
        ("shots", 0, int, "solved training examples before each problem")],
    "who works together": [
        ("pool", None, tuple(POOLS), "a named choice of policy, experts and defaults"),
        ("policy", POOL, str, "folder or hub name: Llama, SmolLM2, Qwen2, Qwen2.5 or Qwen3"),
        ("experts", POOL, list, "folders or hub names of the frozen experts, of any architecture"),
        ("collab", "soft", WAYS, "soft: listen to all through the router; hard: to one, chosen for the "
         "problem; text: read what they write; prefix: constant vectors; single: LoRA only"),
        ("control", "none", CONTROLS, "what stands in for the experts' states: another problem's (shuffled), "
         "noise of their mean and spread, those of untrained experts"),
        ("write", POOL, int, "tokens an expert may write (--collab text)"),
        ("read", "last", ("last", "first", "mean"), "which token's state of an expert is read (last: paper)"),
        ("layer", -1, int, "which layer's state, 0 is the embedding (last: paper)"),
        ("cue", "", str, "text appended to the experts' prompts, such as 'The answer is ' (none: paper)")],
    "router and LoRA": [
        ("latents", 8, int, "context tokens (paper)"),
        ("router_width", POOL, int, "width of the router (512: paper)"),
        ("router_heads", POOL, int, "attention heads of the router (8: paper)"),
        ("router_temperature", POOL, float, "of its attention; below 1 sharpens"),
        ("neutral", POOL, ("zero", "mean"), "a prefix that says nothing: zero (paper) or the mean embedding"),
        ("rank", 8, int, "LoRA rank (paper)"),
        ("alpha", 16.0, float, "LoRA updates are scaled by alpha / rank (twice the rank is usual)")],
    "GRPO": [
        ("steps", POOL, int, "optimiser steps"),
        ("batch", POOL, int, "prompts a step (32: paper)"),
        ("group", POOL, int, "completions a prompt (8: paper)"),
        ("max_new", POOL, int, "tokens a completion may have (128: paper)"),
        ("temperature", POOL, float, "of sampling and loss alike (1: the policy's own distribution)"),
        ("beta", 0.04, float, "weight of the KL to the plain policy (paper); 0 saves its pass"),
        ("clip_low", 0.2, float, "how far the ratio may fall (PPO's); matters with --epochs above 1"),
        ("clip_high", 0.2, float, "how far the ratio may rise; more than --clip-low is DAPO's clip-higher"),
        ("dr", False, bool, "Dr. GRPO: no division by the group's spread, constant normaliser"),
        ("epochs", 1, int, "optimiser steps on each rollout (1: on-policy)"),
        ("micro", 0, int, "prompts a micro-batch of the gradient pass (0: as fit); bounds memory only")],
    "optimiser: AdamW, betas 0.9 and 0.98 (a shorter memory than 0.999 suits runs of some hundred steps)": [
        ("lr", POOL, float, "of LoRA (1e-4: paper)"),
        ("router_lr", POOL, float, "of the router (1e-4: paper)"),
        ("warmup", 20, int, "steps to the full rate, constant after (Adam's first estimates are noisy)"),
        ("weight_decay", 0.0, float, "none: few parameters, short runs"),
        ("max_norm", 1.0, float, "gradient clip (usual)")],
    "the run": [
        ("eval_every", 25, int, "steps between validations"),
        ("val", None, int, "validation problems (120, or as many as there are)"),
        ("test", None, int, "held-out problems (256, most likely the paper's, or as many as there are)"),
        ("out", None, str, "folder of the run (runs/<task>-<time>)"),
        ("resume", False, bool, "go on with the run in --out; its settings are remembered"),
        ("save_every", 0, int, "steps between checkpoints (0: one a minute)"),
        ("cache", None, str, "folder of expert states (~/.cache/n-musketeers/states)"),
        ("log", "none", ("none", "wandb", "tensorboard"), "metrics there too; wandb offline, see WANDB_MODE"),
        ("seed", 0, int, "of weights, order of problems and sampling"),
        ("device", "auto", str, "cpu, cuda, mps; auto: the best there is"),
        ("dtype", "auto", ("auto", "float32", "bfloat16"), "of the policy; auto: bfloat16 from 50M on"),
        ("compile", False, bool, "sample through torch.compile: a minute first, then faster; needs g++")]}
LEAST = dict(batch=1, group=2, steps=1, max_new=1, eval_every=1, val=1, test=1, latents=1, epochs=1, rank=0,
             shots=0, micro=0, save_every=0, warmup=0, seed=0, router_width=1, router_heads=1, beta=0,
             weight_decay=0, clip_low=0, clip_high=0, temperature=1e-3, router_temperature=1e-3, lr=1e-9,
             router_lr=1e-9, max_norm=1e-9, write=1)
OPTIONAL = ("data", "pool", "val", "test", "cache")  # all else has a value once it is resolved


def parser(about):
    """Only what was given is in the namespace, so that it can be told from a default."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, settings in SETTINGS.items():
        group = p.add_argument_group(title)
        for name, default, kind, text in settings:
            text += "" if default in (None, "", False) else f" [{default}]"
            how = (dict(choices=kind) if isinstance(kind, tuple) else dict(nargs="*") if kind is list
                   else dict(action="store_true") if kind is bool else dict(type=kind))
            group.add_argument("--" + name.replace("_", "-"), help=text, default=argparse.SUPPRESS, **how)
    return p


def resolve(given):
    """Every setting of the run as one dict: what was given, else the pool's. Raises ValueError."""
    args = {name: default for group in SETTINGS.values() for name, default, *_ in group} | given
    if args["resume"]:
        return remembered(args, given)
    args["device"] = pick_device(args["device"])
    if args["pool"] is None and args["policy"] is None:
        args["pool"] = pick_pool(args)
    defaults = asdict(POOLS[args["pool"] or "small"])  # small's suit one's own policy, not its experts
    if args["pool"] is None:
        defaults["experts"] = ()
    for name, value in defaults.items():
        args[name] = value if args[name] is None else args[name]
    if args["collab"] in PEOPLED and not args["experts"]:
        raise ValueError(f"--collab {args['collab']} needs someone to listen to: name --experts, or use "
                         "--collab single")
    if args["control"] != "none" and args["collab"] not in ROUTED:
        raise ValueError(f"--collab {args['collab']} reads no states that --control {args['control']} could "
                         "replace: use --collab soft or hard, or no control")
    if args["task"] == "gsm8k" and "steps" not in given and args["pool"] == "paper":
        args["steps"] = 233  # the paper's: one epoch at 32 prompts a step
    args["experts"] = list(args["experts"]) if args["collab"] in PEOPLED else []
    args["out"] = args["out"] or f"runs/{args['task'].replace('+', '-')}-{time.strftime('%m%d-%H%M%S')}"
    args["out"] = ranks.gather(args["out"])[0]  # clocks differ
    check(args)
    if args["rank"] == 0 and args["collab"] in ("single", "text"):
        raise ValueError(f"--rank 0 with --collab {args['collab']} leaves nothing to train: give LoRA a rank")
    if args["compile"] and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler: install g++, or name yours in CXX, or do without")
    if args["batch"] < ranks.WORLD:
        raise ValueError(f"--batch {args['batch']} gives {ranks.WORLD} ranks not a prompt each: raise it")
    args["ranks"] = ranks.WORLD
    out = Path(args["out"])
    if (out / "config.json").exists() or checkpoint.last(out):
        raise ValueError(f"{out} holds a run: choose another --out, or go on with --resume --out {out}")
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise ValueError(f"{out} cannot be a folder, there is a file of that name: choose another --out")
    return args


def check(args):
    """Raises ValueError for a value that no run can have, said by a user or by a damaged config.json."""
    for name, _, kind, _ in (setting for group in SETTINGS.values() for setting in group):
        value, kinds = args[name], (int, float) if kind is float else kind
        right = value in kind if isinstance(kind, tuple) else isinstance(value, kinds)
        if right and kind in (int, float):
            right = LEAST.get(name, -math.inf) <= value < math.inf  # NaN is not
        if not right and not (value is None and name in OPTIONAL):
            must = f"at least {LEAST[name]}" if name in LEAST else "another (train.py --help)"
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, it must be {must}")


def settings(folder):
    """The settings of the run in `folder`, by its config.json. Raises ValueError if that is damaged."""
    path = Path(folder) / "config.json"
    try:
        args = {name: default for group in SETTINGS.values() for name, default, *_ in group}
        args |= dict(ranks=1, write=64)  # of runs from before either could be said
        args |= json.loads(path.read_text())["args"]
        check(args)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): start anew with another --out") from e
    return args


def remembered(args, given):
    """The settings of the run in --out, with other --steps if asked; changes to others are refused."""
    if not args["out"] or not (Path(args["out"]) / "config.json").exists():
        raise ValueError("--resume needs --out with the folder of a run that began to train; one stopped "
                         "before that is started again as it was, and finds the states it has read")
    saved = settings(args["out"])
    pick_device(saved["device"])
    if saved["ranks"] != ranks.WORLD:
        raise ValueError(f"{args['out']} is a run on {saved['ranks']} ranks, each with random numbers of its "
                         f"own: resume it on as many, not on {ranks.WORLD}")
    if saved["collab"] not in PEOPLED:
        given.pop("experts", None)  # nobody listens to them
    other = {k: v for k, v in given.items() if not repeats(k, v, saved[k])}
    changed = sorted(other.keys() - {"steps", "resume", "out", "log", "micro"})
    if changed:
        raise ValueError(f"--resume goes on with the same run; {', '.join(changed)} would make it another")
    check(saved | other)
    return saved | other


def repeats(name, value, was):
    """Does an argument say again what the run was started with? "auto" and 0 stood for what was found then,
    a hub model's name for its commit of that day (train.config)."""
    if isinstance(value, list):
        return len(value) == len(was) and all(repeats("policy", *pair) for pair in zip(value, was))
    return (value == was or (name, value) in (("device", "auto"), ("micro", 0))
            or name == "policy" and was.startswith(f"{value}@"))


def pick_device(name):
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d])
    kind, _, index = name.partition(":")
    valid = not index or (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count())
    if not there.get(kind) or not valid:
        raise ValueError(f"there is no {name} here: use --device {' or '.join(d for d in there if there[d])}")
    return name


def pick_pool(args):
    """No pool named: the paper's where it fits, tiny where tiny was made for the task, else ask."""
    made_for = POOLS["tiny"].task.split("+")
    if args["task"] is None:
        return "tiny"
    for name in args["task"].split("+"):
        known(name)
    if args["device"] == "cuda" and torch.cuda.get_device_properties(0).total_memory > PAPER_BYTES:
        return "paper"
    if set(args["task"].split("+")) <= set(made_for):
        return "tiny"
    raise ValueError(f"{args['task']} is too much for the embedded pool, made for {', '.join(made_for)}: add "
                     "--pool small, or --policy X --experts A B C")
