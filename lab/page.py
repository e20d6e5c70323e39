"""
A page to look into runs: what was learned, which expert is right where, which one is attended to, and what
the policy answers, problem by problem. It is one HTML file that needs no network.

    python -m lab.page runs/NAME            writes runs/NAME/run.html
    python -m lab.page runs/NAME --watch    writes it again after each validation, until the run ends
    python -m lab.page runs/A runs/B        shows both, and compares them: runs/A/run.html

Curves, attention and sampled answers are read from the run's files. The answers to single problems are made
now, by the newest checkpoint: those of the policy alone, those of the trained policy, those with each expert
hidden, and those with the states of another problem.

The page is page.html, with a bundle of JavaScript and the data, as JSON, put in. Vega-Lite draws the charts;
its JavaScript comes with the package vl-convert-python.
"""
import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from eval import before_name, evaluate
from experts import first_line, write_atomic
from lab.probe import open_finished
from rewards import next_in_dataset
from rlvr import (Dataset, advantages, bad_config, load_problems, read_config, read_records, run_cli,
                  without_nan)
from router import NoRouter, WithoutExpert
from train import PRESETS, Args

SNAPSHOTS = 100  # the most steps at which the slider stops
SAMPLED_STEPS = 12  # the most steps whose sampled answers are shown: the first and the last ones
NOT_SHOWN = ("out", "resume", "preset", "plan", "device", "val", "eval_every")


# -- What the files of a run tell

def from_files(folder):
    """Everything that the files of a run tell about it, as a dict for JSON.

    Raises ValueError if the folder holds no run, or one of another version of the program.
    """
    args = settings_of(folder)
    records = read_records(folder / "metrics.jsonl")
    stage0 = read_records(folder / "stage0.jsonl")
    compared = any("reward_by_expert" in record for record in records)
    window = smoothing(len(records))

    settings = {name: value for name, value in args.items() if name not in NOT_SHOWN}
    datasets = set()
    for record in records:
        datasets.update(record["reward_by_dataset"])

    return dict(
        name=folder.resolve().name,
        before_name=before_name(args),
        kind=kind_of(args, compared),
        command=command_of(args),
        policy=short_name(args["policy"]),
        experts=names_of_experts(args, records),
        settings=settings,
        n_val=args["val"],
        datasets=sorted(datasets),
        done=records[-1]["step"] if records else 0,
        window=window,
        compared=compared,
        final=final_result(folder),
        curve=learning_curve(records, window),
        moments=moments_of(records, window),
        stage0=[record for record in stage0 if "part" in record],
        read_back=[record for record in stage0 if "read_back" in record],
        samples=sampled_groups(folder, args, compared))


def settings_of(folder):
    """The settings of a run, {name: value}. Raises ValueError if this version of train.py has others."""
    saved = read_config(folder)["args"]
    try:
        return dataclasses.asdict(Args(**saved))
    except TypeError as error:
        raise bad_config(folder, error) from error


def smoothing(n_steps):
    """How many steps a point of a curve is the mean of: a tenth of the run, at most 10."""
    return max(1, min(10, n_steps // 10))


def mean(values):
    """The mean of those values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def learning_curve(records, window):
    """For each step: the reward, averaged over the last `window` steps, and the validation, if there is one.

    A step that was skipped because of a NaN may have None in place of a number.
    """
    rewards = [record["reward"] for record in records]
    curve = []
    for i, record in enumerate(records):
        recent = rewards[max(0, i + 1 - window):i + 1]
        curve.append(dict(step=record["step"], reward=mean(recent), val=record.get("val")))
    return curve


def moments_of(records, window):
    """At most 100 steps of training, with all that is shown of each of them; [] without attention.

    attention  {dataset: {expert: attention}} of the step
    rewards    {dataset: {expert: reward}}, see `rewards_by_expert`
    heads      [heads][L][experts], the attention of each head and latent
    entropy    of the attention
    """
    places = [i for i, record in enumerate(records) if "attention_map" in record]
    if len(places) > SNAPSHOTS:
        chosen = np.linspace(0, len(places) - 1, SNAPSHOTS).round().astype(int)
        places = [places[i] for i in chosen]

    moments = []
    for i in places:
        record = records[i]
        heads = np.array(record["attention_map"], float).round(3).tolist()  # None becomes NaN
        moments.append(dict(
            step=record["step"],
            entropy=record["attention_entropy"],
            attention=record["attention_by_dataset"],
            rewards=rewards_by_expert(records[max(0, i + 1 - window):i + 1]),
            heads=heads))
    return moments


def rewards_by_expert(records):
    """{dataset: {expert: reward}}: the mean reward of the halves that saw this expert, averaged over records.

    In a single step an expert may not have been drawn for a dataset. Then it is not in that step's record.
    """
    found = {}
    for record in records:
        for dataset, rewards in record.get("reward_by_expert", {}).items():
            for expert, reward in rewards.items():
                found.setdefault(dataset, {}).setdefault(expert, []).append(reward)

    means = {}
    for dataset, rewards in found.items():
        means[dataset] = {expert: mean(values) for expert, values in rewards.items()}
    return means


def final_result(folder):
    """The result of the run's test, None before it."""
    path = folder / "eval.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return dict(n=report["n"], before=report["before"]["strict"], after=report["after"]["strict"],
                by_dataset=report["by_dataset"])


def names_of_experts(args, records):
    """The names that the records use; before there are any, those of the models."""
    for record in records:
        if "attention" in record:
            return list(record["attention"])
    return [short_name(source) for source in args["experts"]]


def short_name(source):
    """"Qwen/Qwen2.5-0.5B@1a2b3c" -> "Qwen2.5-0.5B" """
    return Path(source.partition("@")[0]).name


def kind_of(args, compared):
    """What a run is called, whatever its seed: "attention, stage 0, compared"."""
    words = [args["router"]]
    if args["control"] != "none":
        words.append(args["control"])
    if args["states"] != "last":
        words.append(f"states {args['states']}")
    words.append("stage 0" if args["reading_steps"] else "without stage 0")
    if compared:
        words.append("compared")
    return ", ".join(words)


def command_of(args):
    """The command line that makes such a run: its preset, and all that differs from it."""
    usual = dataclasses.asdict(Args(**PRESETS.get(args["preset"], {})))
    if args["router"] in ("none", "text"):  # then there is no stage 0 unless it is asked for
        usual["reading_steps"] = 0
    if args["task"] == "gsm8k":
        usual["level"] = "default"

    words = ["python", "train.py", "--preset", args["preset"]]
    for name, value in args.items():
        is_asked_for = name not in ("preset", "out", "resume", "plan", "device")
        if is_asked_for and value != usual[name] and value != []:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def sampled_groups(folder, args, compared):
    """The sampled answers of samples.jsonl, group by group, with their advantages.

    Where two experts are compared, a group is a half: the answers that were sampled while one expert was
    visible. Only answers inside a group are compared with each other.
    """
    records = read_records(folder / "samples.jsonl")
    size = args["group"] // 2 if compared else args["group"]

    # Keep the first and the last steps.
    steps = sorted({record["step"] for record in records})
    shown = {*steps[:SAMPLED_STEPS // 2], *steps[-SAMPLED_STEPS // 2:]}

    # Answers to one problem stand one after the other. Begin a new group with each problem, and where the
    # group is full: the same problem may come again, with another expert.
    groups = []
    for record in records:
        if record["step"] not in shown:
            continue
        head = dict(step=record["step"], question=record["question"], answer=record["answer"],
                    expert=record.get("expert"))
        is_new = not groups or len(groups[-1]["answers"]) == size
        if is_new or any(groups[-1][name] != value for name, value in head.items()):
            groups.append(head | dict(answers=[]))
        groups[-1]["answers"].append(dict(text=record["completion"], reason=record["reason"],
                                          reward=record["reward"]))

    for group in groups:
        rewards = torch.tensor([[answer["reward"] for answer in group["answers"]]])
        for answer, advantage in zip(group["answers"], advantages(rewards)[0].tolist()):
            answer["advantage"] = round(advantage, 2)
    return groups


# -- What the newest checkpoint answers

def from_checkpoint(folder, n, device="cpu", extension=""):
    """Answers of the newest checkpoint to n test problems: {"note": a sentence, "rows": [n]}.

    Where the run cannot be opened, the note says why, and there are no rows.
    """
    try:
        args, policy, experts, router = open_finished(folder, device, extension)
        dataset = Dataset(load_problems(args, "test", n), policy, experts, args)
    except (OSError, ValueError) as error:
        return dict(note=f"No answers can be shown: {error}.", rows=[])

    # The policy alone, and as it was trained.
    with policy.lora("off"):
        verdicts_alone, texts_alone, _ = evaluate(policy, NoRouter([], [], 0), dataset, args)
    verdicts, texts, attention = evaluate(policy, router, dataset, args)

    # With each expert hidden, if there are several.
    hidden = {}
    if attention is not None and len(experts) > 1:
        for e, expert in enumerate(experts):
            others = WithoutExpert(router, dataset.expert_of_state, e)
            _, hidden[expert.name], _ = evaluate(policy, others, dataset, args)

    # With the states of another problem of the same dataset.
    partner = next_in_dataset(dataset.problems)
    swapped = None
    if dataset.H.numel():
        _, swapped, _ = evaluate(policy, router, dataset, args, H=dataset.H[partner])

    rows = []
    for i, problem in enumerate(dataset.problems):
        row = dict(dataset=problem.dataset, question=problem.question, gold=problem.answer,
                   before=texts_alone[i].strip(), right_before=is_right(verdicts_alone[i]),
                   after=texts[i].strip(), right=is_right(verdicts[i]), says={}, hidden={}, swapped=None,
                   attention=None)
        for expert, said in zip(experts, dataset.texts):
            if said[i]:
                row["says"][expert.name] = said[i]
        for name, answers in hidden.items():
            row["hidden"][name] = answers[i].strip()
        if swapped and partner[i] != i:  # else it is the only problem of its dataset
            row["swapped"] = swapped[i].strip()
        if attention is not None:
            row["attention"] = np.round(attention[i].mean(0).numpy(), 3).tolist()  # (L, experts)
        rows.append(row)

    n_right = sum(row["right"] for row in rows)
    n_before = sum(row["right_before"] for row in rows)
    note = (f"Greedy answers of the newest checkpoint to {len(rows)} test problems: {n_right} are right. Of "
            f"the answers of the {before_name(vars(args))} {n_before} are.")
    return dict(rows=rows, note=note)


def is_right(verdict):
    return verdict.reason == "right"


# -- Several runs side by side

def compare_runs(runs):
    """Put together the runs that differ only in their seed.

    Returns two lists of dicts: the points of the validation curve of each kind of run, with a band of one
    standard deviation, and one line for each kind with the results of the tests.
    """
    same_settings = {}
    for run in runs:
        settings = run["settings"] | dict(seed=0, micro_batch=0)
        same_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(run)

    bands, kinds = [], []
    for group in same_settings.values():
        kind = group[0]["kind"]
        if any(other["kind"] == kind for other in kinds):  # the same words, but other settings
            kind += f", as {group[0]['name']}"
        bands += validation_band(kind, group)
        kinds.append(test_results(kind, group))
    return bands, kinds


def validation_band(kind, runs):
    """The validation accuracy of some runs: mean and standard deviation at each step."""
    values = {}
    for run in runs:
        for point in run["curve"]:
            if point["val"] is not None:
                values.setdefault(point["step"], []).append(point["val"])

    band = []
    for step in sorted(values):
        center, std = float(np.mean(values[step])), float(np.std(values[step]))
        band.append(dict(kind=kind, step=step, mean=center, low=max(0.0, center - std),
                         high=min(1.0, center + std)))
    return band


def test_results(kind, runs):
    """The results of the tests of some runs: their means, and the standard deviation after training."""
    reports = [run["final"] for run in runs if run["final"]]
    before = [report["before"] for report in reports]
    after = [report["after"] for report in reports]
    n = reports[0]["n"] if reports else None
    std = float(np.std(after)) if len(after) > 1 else None
    return dict(kind=kind, runs=len(runs), n=n, before=mean(before), after=mean(after), std=std)


test_results.__test__ = False  # pytest must not take it for a test


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def write_page(folders, n, device="cpu", watch=False, extension=""):
    """Write run.html into the first folder. Returns its path."""
    runs = []
    for folder in folders:
        problems = from_checkpoint(folder, n, device, extension)
        runs.append(from_files(folder) | dict(problems=problems))
    bands, kinds = compare_runs(runs)

    # The page finds a run by its name: of runs with the same name show the whole path.
    names = [run["name"] for run in runs]
    for folder, run in zip(folders, runs):
        if names.count(run["name"]) > 1:
            run["name"] = str(folder.resolve())

    data = without_nan(dict(made=time.time(), watch=watch, runs=runs, bands=bands, kinds=kinds))
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    page = page.replace("/*BUNDLE*/", javascript_bundle())
    page = page.replace("/*DATA*/", json_for_script(data))
    path = folders[0] / "run.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def json_for_script(data):
    """JSON that can stand inside <script>: nothing that a model wrote can end the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def javascript_bundle():
    """Vega, Vega-Lite and Vega-Embed. Raises ValueError if the package that brings them is not installed."""
    try:
        import vl_convert
    except ImportError as error:
        raise ValueError("the page needs the packages of lab: pip install -r lab/requirements.txt "
                         f"({first_line(error)})") from error
    return vl_convert.javascript_bundle()


def how_far(folders):
    """For each run the number of its validations, and whether it is tested: --watch waits for a change."""
    states = []
    for folder in folders:
        records = read_records(folder / "metrics.jsonl")
        n_validations = sum("val" in record for record in records)
        states.append((n_validations, (folder / "eval.json").exists()))
    return states


def run(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lab.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="Folders of runs, the --out of train.py.")
    parser.add_argument("--watch", action="store_true",
                        help="Write the page again after each validation, until the runs end.")
    parser.add_argument("--n", type=int, default=60, help="Number of test problems to answer. Default: 60.")
    parser.add_argument("--device", default="cpu",
                        help="Where they are answered: cpu, cuda, cuda:1, mps or auto. Default: cpu.")
    parser.add_argument("--extension", metavar="FILE", default="",
                        help="A Python file that is imported first. Default: the one that train.py used.")
    options = parser.parse_args(argv)
    if options.n < 1:
        raise ValueError("--n must be at least 1")

    while True:
        seen = how_far(options.runs)
        ended = all(is_tested for _, is_tested in seen)
        goes_on = options.watch and not ended
        path = write_page(options.runs, options.n, options.device, goes_on, options.extension)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser", flush=True)
        if not goes_on:
            return
        while how_far(options.runs) == seen:
            time.sleep(2)


if __name__ == "__main__":
    sys.exit(run_cli("lab.page", run))
