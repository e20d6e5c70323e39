"""
A page to look into runs: what was learned, who is attended to, problem by problem. One file, no network.

    python lab/page.py runs/NAME            runs/NAME/run.html
    python lab/page.py runs/NAME --watch    made again at each validation, until the run ends
    python lab/page.py runs/A runs/B        and side by side: runs/A/run.html

Curves, attention and samples are read from the run's files. What is shown of single problems is answered by
the newest checkpoint, now: the policy alone, as trained, with each expert masked out, and with the states of
another problem. The page is page.html with its data as JSON; charts are Vega-Lite's (vl-convert brings its
JavaScript).
"""
import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import vl_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import evaluate, one_sentence, open_run, read_config, read_lines  # noqa: E402
from experts import write_atomic  # noqa: E402
from rewards import next_of_dataset  # noqa: E402
from rlvr import Dataset, advantages, load_problems  # noqa: E402
from router import masked_router  # noqa: E402
from train import PRESETS, Args  # noqa: E402

SNAPSHOTS = 100  # moments of training that the slider has, at most
NOT_SHOWN = ("out", "resume", "preset", "device", "val", "eval_every", "save_every")

def of_files(folder):
    """All about a run that its files tell: a dictionary for JSON."""
    args = read_config(folder)["args"]
    metrics, alignment = read_lines(folder / "metrics.jsonl"), read_lines(folder / "align.jsonl")
    rewards = [row["reward"] for row in metrics]  # shown: of each the mean with the nine before it
    curve = [dict(step=row["step"], reward=float(np.mean(rewards[max(0, i - 9):i + 1])), val=row.get("val"))
             for i, row in enumerate(metrics)]
    attended = [row for row in metrics if "attention_map" in row]
    kept = np.unique(np.linspace(0, len(attended) - 1, SNAPSHOTS).round().astype(int)) if attended else ()
    maps = [dict(step=row["step"], entropy=row["attention_entropy"], by_dataset=row["attention_by_dataset"],
                 heads=np.round(row["attention_map"], 3).tolist()) for row in (attended[i] for i in kept)]
    report = json.loads((folder / "eval.json").read_text()) if (folder / "eval.json").exists() else None
    final = report and dict(n=report["n"], before=report["before"]["strict"], after=report["after"]["strict"],
                            by_dataset=report["by_dataset"])
    experts = list(attended[0]["attention"]) if attended else [
        Path(name.partition("@")[0]).name for name in args["experts"]]
    return dict(name=folder.resolve().name, kind=kind_of(args), command=command_of(args),
                policy=Path(args["policy"].partition("@")[0]).name, experts=experts, n_val=args["val"],
                settings={name: value for name, value in args.items() if name not in NOT_SHOWN},
                datasets=sorted({name for row in metrics for name in row["reward_by_dataset"]}),
                done=metrics[-1]["step"] if metrics else 0, final=final, curve=curve, maps=maps,
                align=[dict(step=row["align"], part=row["part"], loss=row["loss"])
                       for row in alignment if "part" in row],
                read_back=[row for row in alignment if "read_back" in row],
                samples=groups(read_lines(folder / "samples.jsonl")))

def command_of(args):
    """The command line that makes such a run: all that differs from its preset."""
    usual = asdict(Args(**PRESETS[args["preset"]]))
    if args["collab"] in ("single", "text"):  # these have no stage 0 unless it is asked for
        usual["align"] = 0
    words = ["python", "train.py", "--preset", args["preset"]]
    for name, value in args.items():
        if value not in (usual.get(name), []) and name not in ("preset", "device", "resume", "out"):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)

def kind_of(args):
    """What a run is called but for its seed."""
    words = [args["collab"]] + [args["control"]] * (args["control"] != "none")
    words += [f"read {args['read']}"] * (args["read"] != "last")
    return ", ".join(words + ["stage 0" if args["align"] else "without stage 0"])

def groups(rows, steps=12):
    """Sampled answers by step and problem, with their advantages; of at most the first and last steps."""
    found = {}
    for row in rows:
        found.setdefault((row["step"], row["question"], row["answer"]), []).append(row)
    shown = sorted({step for step, _, _ in found})
    shown = set(shown[:steps // 2] + shown[-steps // 2:])
    result = []
    for (step, question, answer), answers in found.items():
        if step not in shown:
            continue
        advantage = advantages(torch.tensor([[row["reward"] for row in answers]]))[0].tolist()
        result.append(dict(step=step, question=question, answer=answer, answers=[
            dict(text=row["completion"], reason=row["reason"], reward=row["reward"],
                 advantage=round(a, 2)) for row, a in zip(answers, advantage)]))
    return result

def of_models(folder, n, device):
    """What the newest checkpoint answers to n held-out problems: {"note", "rows"}."""
    try:
        args, policy, experts, router = open_run(folder, device)
    except ValueError as error:
        return dict(note=f"There are no answers to show yet: {error}.", rows=[])
    data = Dataset(load_problems(args, "test", n), policy, experts, args)
    with policy.lora_disabled():
        alone, answers_alone, _ = evaluate(policy, None, data, args)
    verdicts, answers, attention = evaluate(policy, router, data, args)
    masked, swapped, partner = {}, None, next_of_dataset(data.problems)
    for e, expert in enumerate(experts if attention is not None and len(experts) > 1 else ()):
        masked[expert.name] = evaluate(policy, masked_router(router, data.owner, e), data, args)[1]
    if router and data.H.numel():
        swapped = evaluate(policy, router, data, args, H=data.H[partner])[1]
    maps = [None] * len(data)  # of each problem (L, experts)
    if attention is not None:
        maps = np.round(attention.mean(1).numpy(), 3).tolist()
    rows = [dict(dataset=problem.dataset, question=problem.question, gold=problem.answer,
                 before=answers_alone[i].strip(), right_before=alone[i].strict,
                 after=answers[i].strip(), right=verdicts[i].strict,
                 says={expert.name: texts[i] for expert, texts in zip(experts, data.texts) if texts[i]},
                 masked={name: texts[i].strip() for name, texts in masked.items()},
                 swapped=swapped[i].strip() if swapped and partner[i] != i else None, attention=maps[i])
            for i, problem in enumerate(data.problems)]
    right, before = sum(row["right"] for row in rows), sum(row["right_before"] for row in rows)
    return dict(rows=rows, note=f"Greedy answers of the newest checkpoint to {len(rows)} held-out problems: "
                                f"{right} are right, of the policy alone {before}.")

def side_by_side(runs):
    """Runs that differ in their seed alone are put together: (rows of the curve with its band, rows of the
    table)."""
    same = [json.dumps(run["settings"] | dict(seed=0, micro_batch=0), sort_keys=True) for run in runs]
    bands, kinds = [], []
    for settings in dict.fromkeys(same):
        group = [run for run, other in zip(runs, same) if other == settings]
        kind = group[0]["kind"]
        if any(row["kind"] == kind for row in kinds):  # other settings under the same words
            kind += f", as {group[0]['name']}"
        points = [(point["step"], point["val"]) for run in group for point in run["curve"]
                  if point["val"] is not None]
        for step in sorted({step for step, _ in points}):
            values = [val for other, val in points if other == step]
            mean, std = float(np.mean(values)), float(np.std(values))
            bands.append(dict(kind=kind, step=step, mean=mean, low=max(0.0, mean - std),
                              high=min(1.0, mean + std)))
        final = [run["final"] for run in group if run["final"]]
        after = [report["after"] for report in final]
        kinds.append(dict(kind=kind, runs=len(group), n=final[0]["n"] if final else None,
                          before=float(np.mean([report["before"] for report in final])) if final else None,
                          after=float(np.mean(after)) if final else None,
                          std=float(np.std(after)) if len(after) > 1 else None))
    return bands, kinds

def make(folders, n, device, watch):
    """Write run.html into the first folder; returns its path."""
    runs = [of_files(folder) | dict(problems=of_models(folder, n, device)) for folder in folders]
    bands, kinds = side_by_side(runs)
    data = dict(made=time.time(), watch=watch, runs=runs, bands=bands, kinds=kinds)
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no completion can end the script that the data stands in
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = (Path(__file__).parent / "page.html").read_text()
    page = page.replace("/*BUNDLE*/", vl_convert.javascript_bundle()).replace("/*DATA*/", text)
    path = folders[0] / "run.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path

def validations(folders):
    """How far the runs are: the page is made anew when this changes."""
    return [(sum("val" in row for row in read_lines(folder / "metrics.jsonl")),
             (folder / "eval.json").exists()) for folder in folders]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as train.py --out wrote them")
    parser.add_argument("--watch", action="store_true", help="make it again at each validation")
    parser.add_argument("--n", type=int, default=60, help="held-out problems that are answered anew")
    parser.add_argument("--device", default="cpu", help="where they are answered")
    options = parser.parse_args(argv)
    if options.n < 1:
        raise ValueError("--n must be at least 1")
    while True:
        seen = validations(options.runs)
        ended = all(tested for _, tested in seen)
        path = make(options.runs, options.n, options.device, options.watch and not ended)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser", flush=True)
        if not options.watch or ended:
            return
        while validations(options.runs) == seen:
            time.sleep(2)

if __name__ == "__main__":
    sys.exit(one_sentence("page.py", main))
