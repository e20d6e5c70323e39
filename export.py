"""
Work that leaves the house (eval.py RUN --export DIR), and the way back (--from DIR), which trusts nothing.

    adapter_config.json, adapter_model.safetensors   the LoRA, in PEFT's format
    router.json, router.safetensors                  how to build the router; its weights, the prefix's place
    run.json, README.md                              settings, models and checksums; the model card

PEFT alone gives the policy with its LoRA, which listens to nobody. The whole reads [neutral + spread * C ; x]
where C = Router(**router.json["router"])(H), from the experts' states H of the problem.
"""

import json
import re
import shlex
from pathlib import Path, PureWindowsPath

import torch
from safetensors.torch import load as parse
from safetensors.torch import save

import checkpoint
from experts import LICENCES, TINY, Expert
from folders import write_whole
from run import build
from settings import SETTINGS, resolve

LORA, ROUTER = "adapter_model.safetensors", "router.safetensors"
FILES = ("README.md", LORA, "adapter_config.json", ROUTER, "router.json", "run.json")
MARK = "an export of n-Musketeers"
PARTS = dict(qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), o=("self_attn.o_proj",),
             gate_up=("mlp.gate_proj", "mlp.up_proj"), down=("mlp.down_proj",))  # ours: theirs, as in Block
SIZES = ("rank", "alpha", "latents", "router_width", "max_new", "shots")  # of an export: at most
MOST = 4096  # because they take memory before any tensor can contradict them


def weights(run):
    """file -> {name: tensor}, sharing the run's memory: to be written from, or copied into."""
    files = {LORA: {}} if run.args["rank"] else {}
    for i, block in enumerate(run.policy.blocks if files else ()):
        for ours, theirs in PARTS.items():
            layer = getattr(block, ours)  # its parts' A are stacked, (n r, in); each part has its own B
            for name, a, b in zip(theirs, layer.A.detach().chunk(len(theirs)), layer.B):
                key = f"base_model.model.model.layers.{i}.{name}.lora_"
                files[LORA] |= {f"{key}A.weight": a, f"{key}B.weight": b.detach()}
    if run.router is not None:
        place = {"prefix.neutral": run.policy.neutral, "prefix.spread": run.policy.spread}
        files[ROUTER] = dict(run.router.state_dict()) | place
    return files


def given(path):
    return str(Path(path).resolve()) if ".." in Path(path).parts else path


def portable(model):
    """Where another machine finds this Expert: its commit on the hub, a clone's tiny/..., else as given."""
    folder = model.folder.resolve()
    if model.revision:
        return f"{model.source.partition('@')[0]}@{model.revision}"
    return folder.relative_to(TINY.parent).as_posix() if folder.is_relative_to(TINY) else given(model.source)


def describe(run):
    """file -> what it says of this run's models: written, and held against them when it comes back."""
    args, policy = run.args, Expert(run.args["policy"], template=run.args["template"])
    who = lambda e: dict(name=e.name, source=portable(e), revision=e.revision, width=e.width,
                         parameters=e.params, template=e.template, fingerprint=e.fingerprint)
    experts, (base, _, commit) = [who(e) for e in run.experts], portable(policy).partition("@")
    files = {"run.json": dict(about=MARK, form=run.form, policy=who(policy), experts=experts)}
    if args["rank"]:
        files["adapter_config.json"] = dict(
            peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, revision=commit or None,
            r=args["rank"], lora_alpha=args["alpha"], bias="none", inference_mode=True,
            target_modules=[name.split(".")[1] for part in PARTS.values() for name in part])
    if run.router is not None:
        shape = dict(widths=[e.width for e in run.experts], d_policy=policy.width, latents=args["latents"],
                     heads=args["router_heads"], dim=args["router_width"],
                     temperature=args["router_temperature"])
        how = {k: args[k] for k in ("collab", "read", "layer", "cue", "template", "neutral")}
        files["router.json"] = dict(router=shape, experts=experts) | how
    return files


# -- out
def write(run, source, folder, evaluated):
    """The run of the folder `source` as an export. Raises ValueError if something else lies in its place."""
    source, folder, marker = Path(source), Path(folder), Path(folder) / "run.json"
    ours = marker.is_file() and MARK.encode() in marker.read_bytes()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and is no export: choose another folder for --export")
    texts, tensors, config = describe(run), weights(run), json.loads((source / "config.json").read_text())
    info, data = texts["run.json"], run.args["data"]
    info["versions"] = config["versions"]
    info["sha256"] = {file: checkpoint.digest(x, "") for file, x in tensors.items()}
    info["args"] = config["args"] | dict(policy=info["policy"]["source"], out=None, cache=None,
                                         experts=[e["source"] for e in info["experts"]],
                                         data=data and given(data))
    done = (source / "eval.json", source / f"step-{run.args['steps']:06d}.safetensors")
    report = json.loads(done[0].read_text()) if evaluated and all(path.exists() for path in done) else None
    licences = [licence(model) for model in (Expert(run.args["policy"]), *run.experts)]
    files = {file: (json.dumps(text, indent=1) + "\n").encode() for file, text in texts.items()}
    files["README.md"] = card(info, report, licences).encode()
    for file, x in tensors.items():
        files[file] = save({k: t.cpu().contiguous() for k, t in x.items()}, metadata=dict(format="pt"))
    for file in FILES:  # run.json and its checksums last: no half of an export is taken for the whole
        write_whole(folder / file, files[file]) if file in files else (folder / file).unlink(missing_ok=True)


def licence(model):
    """What the head of its README.md says, else what is known of it."""
    readme = model.folder / "README.md"
    head = readme.read_text(errors="replace").split("\n---")[0] if readme.is_file() else ""
    said = re.search(r"^license:\s*([\w.+-]+)", head, re.M) if head.startswith("---") else None
    ours = model.folder.resolve().is_relative_to(TINY)
    known = "mit" if ours else LICENCES.get(model.source.partition("@")[0], "unknown: look it up")
    return said[1] if said else known


def command(args):
    """The train.py line of these settings, those of the pool spelt out."""
    words = ["python", "train.py"]
    for name, default in ((name, default) for group in SETTINGS.values() for name, default, *_ in group):
        value = args[name]
        if value not in (default, []) and name != "pool":
            value = value if isinstance(value, list) else [] if value is True else [str(value)]
            words += ["--" + name.replace("_", "-"), *value]
    return shlex.join(words)


def card(info, report, licences):
    """README.md: the model card."""
    args, models = info["args"], [info["policy"], *info["experts"]]
    share = lambda s: f"{s['strict']:.1%} [{s['ci95'][0]:.1%}, {s['ci95'][1]:.1%}]"
    parts = [("all", report), *report["by_dataset"].items()] if report else []
    rows = ["| held-out problems, greedy, [95%] | n | policy alone | with this |", "|---|---|---|---|"] + [
        f"| {d} | {x['n']} | {share(x['before'])} | {share(x['after'])} |" for d, x in parts]
    used = [f"- {m['source']}, {m['parameters'] / 1e6:.2f} M: {x}" for m, x in zip(models, licences)]
    return "\n".join([
        f"---\nbase_model: {json.dumps(models[0]['source'].partition('@')[0])}\nlibrary_name: peft\n---",
        f"# {args['task']}, {args['collab']} collaboration (n-Musketeers, arXiv 2602.09173)",
        "What a run trained, without its models. The whole: `python eval.py --from DIR`; the policy with its",
        "LoRA, but without prefix and experts: `PeftModel.from_pretrained(model, DIR)`.\n",
        *(rows if parts else ["Not evaluated: the run is not finished, or this is its --best."]),
        f"\nMade by one run, seed {args['seed']}:\n", f"    {command(args)}\n",
        "with " + ", ".join(f"{k} {v}" for k, v in info["versions"].items()),
        "\nThe models and their licences, the policy first:\n", *used, ""])


# -- and back
def load(folder):
    """The run in an export, ready to be evaluated. Raises ValueError, in one sentence, for whatever is
    missing or not what it claims to be. Nothing of it is run; of its paths only models and data are read."""
    folder = Path(folder)
    read = lambda file: json.loads((folder / file).read_text(encoding="utf-8"))
    kinds = lambda tensors: {k: (t.shape, t.dtype) for k, t in tensors.items()}
    try:
        said = read("run.json")
        run = build(settings(said["args"]), training=False)
        for file, true in describe(run).items():
            claimed = read(file)
            wrong = [k for k in true if claimed.get(k) != true[k]]
            if wrong:
                raise ValueError(f"{file} does not fit the models on this machine in {', '.join(wrong)}: "
                                 "one of them is another than it was made with, or it was altered")
        for file, target in weights(run).items():
            found = parse((folder / file).read_bytes())
            if kinds(found) != kinds(target):
                raise ValueError(f"{file} has a tensor too many, too few or of another shape")
            finite = all(t.isfinite().all() for t in found.values())
            if not finite or checkpoint.digest(found, "") != said["sha256"][file]:
                raise ValueError(f"{file} is damaged: get it again")
            with torch.no_grad():
                for k, t in target.items():
                    t.copy_(found[k])
        return run
    except Exception as e:  # a stranger's file can fail anywhere: as JSON, in safetensors, in transformers
        what = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise ValueError(f"the export {folder} cannot be used: {what}".partition("\n")[0]) from e


def settings(said):
    """The settings in a run.json, if they are what train.py takes, with all that reaches outside reset."""
    cuda = str(said.get("device")).startswith("cuda") and torch.cuda.is_available()
    args = resolve(said | dict(device="cuda" if cuda else "cpu", out=None, cache=None, resume=False,
                               compile=False, steps=1, batch=1, val=1, test=1))  # nothing is trained
    if not all(args[k] <= MOST for k in SIZES) or ".." in PureWindowsPath(args["data"] or "").parts:
        raise ValueError(f"run.json has data with '..', or more than {MOST} of {', '.join(SIZES)}")
    return args | dict(policy=locate(args["policy"]), experts=[locate(e) for e in args["experts"]])


def locate(source):
    """Where a model that an export names lies on this machine. Raises ValueError if it does not."""
    parts = PureWindowsPath(source).parts  # which knows both kinds of slashes
    if re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", source) and ".." not in parts:
        return source  # of the hub, and which commit; a folder's name alone might be anybody's there
    folder = TINY.parent / source if parts[:1] == ("tiny",) else Path(source)
    if ".." in parts or not folder.is_dir():
        raise ValueError(f"its model {source!r} is not on this machine, or '..' leads to it: put it there")
    return str(folder)
