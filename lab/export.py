"""
Give a run away: its LoRA in PEFT's format, its router, and a model card. No model is copied.

    python lab/export.py RUN DIR

    adapter_config.json, adapter_model.safetensors  LoRA: PeftModel.from_pretrained(model, DIR) loads it
    router.json, router.safetensors                 how to build the router; its weights, its prefix's place
    export.json, README.md                          settings; the model card

PEFT alone gives the policy with its LoRA, which attends to nobody. The policy of the run reads
[neutral + std * C ; prompt], C = ROUTERS[collab](**router)(H)[0] of the experts' states H (B, N, D), with
collab and router of router.json; neutral and std are prefix.neutral and prefix.std in router.safetensors.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from safetensors.torch import save

from claims import HERE, markdown  # first: it lets Python find the files one folder up
from eval import one_sentence, open_run, wilson
from experts import find_model, write_atomic

LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUTER, ROUTER_CONFIG = "router.safetensors", "router.json"
PARTS = {  # our fused layers: the names of their parts, in the order in which model.py stacks them
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
TARGETS = sorted(name.split(".")[1] for names in PARTS.values() for name in names)

# -- Out

def lora_tensors(policy):
    """{PEFT's name: tensor}: A (r, in) and B (out, r) of every linear layer."""
    tensors = {}
    for i, block in enumerate(policy.blocks):
        for ours, names in PARTS.items():
            layer = getattr(block, ours)  # the A of its parts are stacked, (n r, in); each has a B of its own
            for name, A, B in zip(names, layer.A.chunk(len(names)), layer.B):
                key = f"base_model.model.model.layers.{i}.{name}"
                tensors[f"{key}.lora_A.weight"] = A
                tensors[f"{key}.lora_B.weight"] = B
    return tensors

def write_export(run, folder):
    """The run of the folder `run` as an export in `folder`. Raises ValueError if something lies there."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: choose another folder")
    args, policy, experts, router = open_run(run, "cpu")
    sources = [portable(source) for source in args.experts]
    settings = vars(args) | dict(policy=portable(args.policy), experts=sources, data="", out="", resume="")
    base, _, commit = settings["policy"].partition("@")
    files = {"export.json": to_json(dict(args=settings))}
    if args.lora_rank:
        files[LORA] = to_bytes(lora_tensors(policy))
        files[LORA_CONFIG] = to_json(dict(
            peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, revision=commit or None,
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=0.0, bias="none", inference_mode=True,
            target_modules=TARGETS))
    if router:
        files[ROUTER] = to_bytes(router.state_dict() | {"prefix.neutral": policy.neutral,
                                                        "prefix.std": policy.embed_std})
        files[ROUTER_CONFIG] = to_json(dict(
            collab=args.collab, router=dict(
                widths=[expert.width for expert in experts for _ in range(expert.entries)],
                d_policy=policy.config.hidden_size, latents=args.latents, heads=args.router_heads,
                dim=args.router_dim, temperature=args.router_temperature),
            experts=sources, read=args.read, layer=args.layer, positions=args.positions,
            own_text=args.own_text, write=args.write, cue=args.cue))
    path = Path(run) / "eval.json"  # train.py --resume deletes it, so it is never of fewer steps
    report = json.loads(path.read_text()) if path.is_file() else None
    files["README.md"] = model_card(settings, report).encode()
    for name, data in files.items():
        write_atomic(folder / name, data)

def to_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()

def to_bytes(tensors):
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(tensors, metadata={"format": "pt"})

def portable(source):
    """Where another machine finds a model: of the embedded pool its place in here, else as given."""
    path = Path(source).resolve()
    if path.is_dir() and path.is_relative_to(HERE / "tiny"):
        return path.relative_to(HERE).as_posix()
    return source

def model_card(settings, report):
    base = settings["policy"].partition("@")[0]
    lines = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "---",
             f"# {settings['task']}, {settings['collab']} collaboration (n-Musketeers, arXiv 2602.09173)", "",
             "What a run trained, without its models: LoRA in PEFT's format and, where there is one, the",
             "router. PEFT alone gives the policy with its LoRA, but without prefix and experts.", ""]
    if report:
        total = dict(n=report["n"], before=report["before"]["strict"], after=report["after"]["strict"])
        rows = []
        for name, x in ({"all": total} | report["by_dataset"]).items():
            low, high = wilson(round(x["after"] * x["n"]), x["n"])
            rows.append([name, x["n"], f"{x['before']:.1%}", f"{x['after']:.1%} [{low:.1%}, {high:.1%}]"])
        lines += markdown(["held-out problems, greedy", "n", "policy alone", "with this, 95%"], rows)
    else:
        lines.append("Not evaluated: the run is not finished.")
    lines += ["", f"One run, seed {settings['seed']}; all settings are in export.json. The models,",
              "the policy first, each under its own licence:", ""]
    lines += [f"- {source}: {licence(source)}" for source in (settings["policy"], *settings["experts"])]
    return "\n".join(lines) + "\n"

def licence(source):
    """What the head of a model's own README.md states."""
    if source.startswith("tiny/"):
        return "mit"
    readme = find_model(source)[0] / "README.md"
    head = readme.read_text(errors="replace").split("\n---")[0] if readme.is_file() else ""
    stated = re.search(r"^license:\s*([\w.+-]+)", head, re.MULTILINE)
    return stated[1] if stated else "not stated in its folder"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("folder", help="where the export goes")
    options = parser.parse_args(argv)
    write_export(options.run, options.folder)
    print(f"{options.folder} holds the export; its README.md is the model card")

if __name__ == "__main__":
    sys.exit(one_sentence("export.py", main))
