"""
Give a run to others: its LoRA in PEFT's format, its router, and a model card. No model is copied.

    python -m lab.export RUN DIR

    adapter_config.json, adapter_model.safetensors   LoRA: PeftModel.from_pretrained(model, DIR) loads it
    router.json, router.safetensors                  how to build the router, and its weights
    export.json, README.md                           the settings of the run, and the model card

With PEFT alone the policy has its LoRA, but reads no expert. In the run the policy reads [context ; prompt]:

    C        =  ROUTERS[router](**arguments)(H)[0]              H (B, N, D), the experts' states
    context  =  prefix.origin + prefix.std * C                  (B, L, d)

router and arguments stand in router.json, prefix.origin and prefix.std in router.safetensors.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from safetensors.torch import save

from eval import before_name, wilson
from experts import find_model, write_atomic
from lab.claims import markdown
from lab.probe import open_finished
from rlvr import layout_of_states, run_cli

LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUTER, ROUTER_CONFIG = "router.safetensors", "router.json"

# The parts of each stacked layer of model.py, in the order in which it stacks them, by their usual names.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def write_export(run, folder, extension=""):
    """Write the run in the folder `run` as an export into `folder`.

    extension: the Python file that defines the run's router, "" for the one that its config.json names.
    Raises ValueError if `folder` holds anything.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: choose another folder")
    args, policy, experts, router = open_finished(run, "cpu", extension)

    # The settings, without the places where things lie on this computer.
    sources = [args.policy, *args.experts]
    args.policy, *args.experts = map(public_name, sources)
    settings = vars(args) | dict(data="", out="", resume="", extension=Path(args.extension).name)
    files = {"export.json": to_json(dict(args=settings))}

    # LoRA and the router. A run may be without either of them.
    if args.lora_rank:
        files[LORA] = to_bytes(lora_tensors(policy))
        files[LORA_CONFIG] = to_json(lora_config(args))
    if router.state_dict():
        prefix = {"prefix.origin": policy.prefix_origin, "prefix.std": policy.embed_std}
        files[ROUTER] = to_bytes(router.state_dict() | prefix)
        files[ROUTER_CONFIG] = to_json(router_config(args, policy, experts))

    # The model card, with the result of the test. train.py deletes eval.json when a run is continued, so it
    # is never one of fewer steps.
    report = None
    path = Path(run) / "eval.json"
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
    files["README.md"] = model_card(settings, report, [licence(source) for source in sources]).encode()

    # Write only now, as nothing can fail any more.
    for name, data in files.items():
        write_atomic(folder / name, data)


def public_name(source):
    """A folder of this computer by its last name; models of the hub and of this repository as they are."""
    return Path(source).name if Path(source).is_absolute() else source


# -- LoRA and router

def lora_tensors(policy):
    """{PEFT's name: tensor}: A (r, in) and B (out, r) of every linear layer."""
    tensors = {}
    for i, block in enumerate(policy.blocks):
        for ours, names in PARTS.items():
            # The A of all parts are stacked, (n r, in). Each part has a B of its own.
            layer = getattr(block, ours)
            for name, A, B in zip(names, layer.A.chunk(len(names)), layer.B):
                key = f"base_model.model.model.layers.{i}.{name}"
                tensors[f"{key}.lora_A.weight"] = A
                tensors[f"{key}.lora_B.weight"] = B
    return tensors


def lora_config(args):
    """PEFT's adapter_config.json. alpha is always twice the rank."""
    targets = []
    for names in PARTS.values():
        targets += [name.split(".")[1] for name in names]
    base, _, commit = args.policy.partition("@")
    return dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base,
                revision=commit or None, r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0,
                bias="none", inference_mode=True, target_modules=sorted(targets))


def router_config(args, policy, experts):
    """How to build the router, and what it reads of the experts."""
    widths, expert_of_state = layout_of_states(experts)
    arguments = dict(widths=widths, expert_of_state=expert_of_state, d_policy=policy.config.hidden_size,
                     latents=args.latents, dim=args.router_dim)
    return dict(router=args.router, arguments=arguments, experts=args.experts, states=args.states,
                layers=args.layers, write=args.write, cue=args.cue, think=args.think)


# -- The model card

def model_card(settings, report, licences):
    """README.md of the export. report: that of the run's test, None for a run that is not finished.

    licences: those of the policy and of the experts, in this order.
    """
    base = settings["policy"].partition("@")[0]
    lines = [
        "---", f"base_model: {json.dumps(base)}", "library_name: peft", "---",
        f"# {settings['task']}, router {settings['router']} (n-Musketeers, arXiv 2602.09173)", "",
        "What a run trained, without its models: LoRA in PEFT's format and, where there is one, the router.",
        "With PEFT alone the policy has its LoRA, but reads no expert.", ""]

    if report:
        lines += result_table(report)
    else:
        lines.append("It has not been tested, as the run is not finished.")

    lines += ["", f"One run, seed {settings['seed']}. All settings are in export.json."]
    if settings["extension"]:
        lines.append(f"It was trained with the Python file {settings['extension']}, which is not in this "
                     "folder.")

    lines += ["", "The models, each under its own licence. The first one is the policy.", ""]
    for name, its_licence in zip([settings["policy"], *settings["experts"]], licences, strict=True):
        lines.append(f"- {name}: {its_licence}")
    return "\n".join(lines) + "\n"


def result_table(report):
    """The accuracy in all and by dataset, as lines of Markdown."""
    total = dict(n=report["n"], before=report["before"]["strict"], after=report["after"]["strict"])
    rows = []
    for name, numbers in ({"all": total} | report["by_dataset"]).items():
        n, before, after = numbers["n"], numbers["before"], numbers["after"]
        low, high = wilson(round(after * n), n)
        rows.append([name, n, f"{before:.1%}", f"{after:.1%} [{low:.1%}, {high:.1%}]"])
    return markdown(["test problems, greedy", "n", before_name(report), "with this, 95%"], rows)


def licence(source):
    """The licence that the head of a model's own README.md names."""
    if source.startswith("tiny/"):
        return "mit"
    folder, _ = find_model(source)
    readme = folder / "README.md"
    if not readme.is_file():
        return "not stated in its folder"
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---")[0]
    stated = re.search(r"^license:\s*([\w.+-]+)", head, re.MULTILINE)
    return stated[1] if stated else "not stated in its folder"


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def to_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def to_bytes(tensors):
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(tensors, metadata={"format": "pt"})


def run(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lab.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="Folder of a run.")
    parser.add_argument("folder", metavar="DIR", help="Folder for the export; it must be new or empty.")
    parser.add_argument("--extension", metavar="FILE", default="",
                        help="A Python file that is imported first. Default: the one that train.py used.")
    options = parser.parse_args(argv)
    write_export(options.run, options.folder, options.extension)
    print(f"{options.folder} holds the export; its README.md is the model card")


if __name__ == "__main__":
    sys.exit(run_cli("lab.export", run))
