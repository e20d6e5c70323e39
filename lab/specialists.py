"""
Make specialists: small language models that each know one family of problems, as experts for the pool.

    python -m lab.specialists --policy FOLDER --out DIR
    python -m lab.specialists --policy FOLDER --out DIR --families arithmetic logic
    python -m lab.specialists --policy FOLDER --out DIR --task chain_sum count_primes

A specialist is the model in FOLDER after more training. It reads a problem as an expert reads it
(`Expert.prompt`, with the cue "The answer is:") and learns to write the answer and then to stop:

    prompt of the problem, The answer is:   ->   492240 <stop>

Only questions of the training split are taught, so validation and test problems stay new to it. All weights
are trained with AdamW, in float32 under bfloat16 autocast, with a rate that falls to 0. The loss is the
cross-entropy of the tokens of the answer and of the stop token. An answer of more than --write tokens is not
taught, because an expert that may write no more than that could never finish it.

Each specialist becomes an ordinary Hugging Face folder in bfloat16, such as DIR/arithmetic, with the policy's
own tokenizer. At the end a table tells what each specialist in DIR knows, and the policy as it is beside
them. The same numbers are written to DIR/specialists.json. Train with the specialists by

    python train.py --experts DIR/arithmetic DIR/logic --cue "The answer is:" --write 20 ...

Stop it at any time and give the same command again: a finished specialist is kept, and an interrupted one
starts again from its first step. Several commands may fill one DIR, for example with another --policy for one
of the families.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py, before torch is imported

import torch
import torch.nn.functional as F
import transformers

from experts import (TEXTS, Expert, computes_in_bfloat16, first_line, pick_device, progress_bar,
                     tokenizer_and_config_files, write_atomic, write_texts)
from lab.claims import markdown
from rewards import FAMILIES, get_problems, verify
from rlvr import micro_batches, run_cli, stage0_rate

CUE = "The answer is:"  # at the end of every prompt; train.py needs the same --cue
BATCH = 16              # problems in a step
PASS = 8                # problems in a gradient pass; those of a pass are about equally long
LEARNING_RATE = 1e-4    # after 30 steps better than 3e-4 and 1e-3 on validation
WARMUP = 5              # steps in which the learning rate rises to LEARNING_RATE; then it falls to nearly 0
MAX_GRAD_NORM = 1.0
N_VALIDATION = 96       # problems of a row of the table


# -- What is taught

def lessons_of(expert, task, level, n):
    """At most n training problems of a task that the expert can be taught. Returns (lessons, left_out).

    left_out: {dataset: number of problems whose answer takes more than expert.max_new tokens}.
    Raises ValueError if nothing is left to teach, if an answer cannot be written in one line with the model's
    tokens, or if a prompt is too long for the model.
    """
    # Draw more than n problems, because some are left out.
    lessons, left_out = [], {}
    for problem in get_problems(task, "train", 2 * n, level=level):
        answer = answer_ids(expert, problem)
        if len(answer) - 1 > expert.max_new:  # - 1: the stop token is not part of the answer
            left_out[problem.dataset] = left_out.get(problem.dataset, 0) + 1
            continue
        check_answer(expert, problem, answer)
        lessons.append(problem)

    if not lessons:
        raise ValueError(f"every answer of {task} takes more than {expert.max_new} tokens of {expert.name}: "
                         "raise --write, or choose another --task")

    # Find a prompt that is too long now, and not after minutes of training. The problems of the table count.
    lessons = lessons[:n]
    for problems in (lessons, validation_problems(task, level)):
        expert.tokenize([expert.prompt(problem) for problem in problems], room=expert.max_new)
    return lessons, left_out


def answer_ids(expert, problem):
    """What the model has to write: the tokens of " <answer>", and a stop token."""
    ids = expert.tokenizer(f" {problem.answer}", add_special_tokens=False)["input_ids"]
    return ids + expert.stop_ids[:1]


def check_answer(expert, problem, answer):
    """Raise ValueError if the verifier would not accept what the model is taught to write.

    Only the first line of an expert's text counts, and a tokenizer may lack some of the characters.
    """
    text = expert.tokenizer.decode(answer, skip_special_tokens=True).partition("\n")[0]
    line = " ".join(text.split())
    if verify(line, problem, "plain").reward != 1.0:
        raise ValueError(f"{expert.name} cannot be taught {problem.dataset}, because of the right answer "
                         f"{problem.answer!r} only {line!r} would be left: choose another --task or --policy")


# -- How it is taught

def teach(expert, lessons, steps, name):
    """Train all weights of the expert's model on the lessons. Returns (model, loss of each step).

    The lessons come in their order, BATCH of them in each step; after the last one the first one follows.
    Raises ValueError if the model cannot be trained like this.
    """
    # Load the weights in float32: most updates are too small to change a weight in bfloat16. There is no
    # dropout, as the model is in evaluation mode.
    expert.dtype = torch.float32
    model = expert.load(TEXTS)
    if expert.reads_padding(model):
        raise ValueError(f"{expert.name} reads padding although it is masked, so it cannot be taught in "
                         "batches: choose another --policy")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)

    losses = []
    with progress_bar(steps, name, "step") as bar:
        for step in range(steps):
            # Take the next lessons.
            first = step * BATCH
            batch = [lessons[i % len(lessons)] for i in range(first, first + BATCH)]

            # Compute the loss and its gradient.
            loss = add_gradients(model, expert, batch)
            if not math.isfinite(loss):
                raise ValueError(f"the loss of {name} is not finite in step {step + 1}: choose another "
                                 "--policy")
            losses.append(loss)

            # Change the weights, a little at first: AdamW knows the size of the gradients only later. From
            # the first step on the rate falls linearly, so that the last steps only refine.
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
            optimizer.param_groups[0]["lr"] = rate * stage0_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()

            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return model, losses


def add_gradients(model, expert, problems):
    """Add the gradient of the mean loss of a token to the weights' .grad. Returns this loss.

    The problems are divided into gradient passes of similar length: the long prompts of a step would
    otherwise double the padding of the others.
    """
    prompts = expert.tokenize([expert.prompt(problem) for problem in problems], room=expert.max_new)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    n_tokens = sum(len(answer_ids(expert, problem)) for problem in problems)

    total = 0.0
    for rows in micro_batches(lengths, PASS):
        loss = answer_loss(model, expert, [problems[row] for row in rows]) / n_tokens
        loss.backward()
        total += loss.item()
    return total


def answer_loss(model, expert, problems):
    """The cross-entropy, in nats, of the problems' answers, each with its stop token: a sum over all tokens.

    The texts are padded on the left, so that all answers end in the last column. Example, with the prompts
    [5, 6, 7] and [8], the answers [3, 2] and [4, 9, 2], and 2 as the stop token:

        tokens   5 6 7 3 2        mask   1 1 1 1 1        targets   -100    3    2
                 2 8 4 9 2               0 1 1 1 1                     4    9    2

    -100 is where F.cross_entropy counts nothing. Raises ValueError for a prompt that is too long.
    """
    # Tokenize the prompts and the answers.
    prompts = expert.tokenize([expert.prompt(problem) for problem in problems], room=expert.max_new)
    answers = [answer_ids(expert, problem) for problem in problems]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers)]

    # Pad them. A position is the number of real tokens before it.
    device = expert.device
    tokens = padded(texts, expert.stop_ids[0]).to(device)               # (B, P)
    mask = padded([[1] * len(text) for text in texts], 0).to(device)    # (B, P)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)                   # (B, P)
    targets = padded(answers, -100).to(device)                          # (B, T)

    # Run the model. The logits at a token predict the next one, so those of the last token are not needed,
    # but those of the token before the answer are.
    T = targets.shape[1]
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device)):
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False,
                       logits_to_keep=T + 1)
    logits = output.logits[:, -T - 1:-1].float()                        # (B, T, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def padded(rows, value):
    """Lists of integers as one tensor (B, longest), filled with `value` on the left."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[value] * (longest - len(row)) + row for row in rows])


# -- What each one knows

def validation_problems(task, level):
    """The problems of a row of the table: N_VALIDATION of them, or all that there are."""
    return get_problems(task, "val", N_VALIDATION, level=level, least=1)


def what_each_knows(policy, folders, recipes, write, device):
    """Ask the policy and all specialists the same validation problems, as experts are asked in a run.

    folders, recipes: {specialist: its folder}, {specialist: its recipe}. Returns a list of rows, one for each
    task that one of the specialists was taught, and after it one for each of its datasets:

        task, level, dataset   dataset is "" for the whole task
        n                      number of problems
        right                  {"policy" or specialist: fraction of right answers}
    """
    # The policy comes first, as it is. Nothing is loaded yet.
    experts = {"policy": Expert(policy, cue=CUE, max_new=write, device=device)}
    for name, folder in folders.items():
        experts[name] = Expert(str(folder), cue=CUE, max_new=write, device=device)

    # List what was taught. Specialists that were taught the same share a row.
    taught = []
    for recipe in recipes.values():
        if (recipe["task"], recipe["level"]) not in taught:
            taught.append((recipe["task"], recipe["level"]))

    rows = []
    for task, level in taught:
        # Let all of them answer.
        problems = validation_problems(task, level)
        prompts = []
        for expert in experts.values():
            prompts.append([expert.prompt(problem) for problem in problems])
        texts = write_texts(list(experts.values()), prompts)

        # Judge the answers.
        rewards = {}
        for name, column in zip(experts, texts):
            rewards[name] = [verify(text, problem, "plain").reward for text, problem in zip(column, problems)]

        # Count the right ones among all problems, then among those of each dataset if there are several.
        datasets = sorted({problem.dataset for problem in problems})
        if len(datasets) == 1:
            datasets = []
        for dataset in ("", *datasets):
            indices = [i for i, problem in enumerate(problems) if dataset in ("", problem.dataset)]
            right = {}
            for name, column in rewards.items():
                right[name] = sum(column[i] for i in indices) / len(indices)
            rows.append(dict(task=task, level=level, dataset=dataset, n=len(indices), right=right))
    return rows


def table(rows):
    """The rows of `what_each_knows` in Markdown."""
    lines = []
    for row in rows:
        label = row["task"]
        if row["level"]:
            label += f", {row['level']}"
        if row["dataset"]:
            label = f"- {row['dataset']}"
        percents = [f"{fraction:.1%}" for fraction in row["right"].values()]
        lines.append([label, row["n"], *percents])
    return "\n".join(markdown(["validation problems", "n", *rows[0]["right"]], lines))


# -- Plumbing. Nothing below is about the method; skip it at first reading.

RECIPE = "specialist.json"  # in a specialist's folder: how it was made
TABLE = "specialists.json"  # in DIR: what all of them know


def make(expert, folder, recipe, lessons):
    """Make one specialist, and say how it went. Its folder appears only when it is complete."""
    start = time.monotonic()
    model, losses = teach(expert, lessons, recipe["steps"], folder.name)

    # Write everything under another name first.
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, expert, part)
    write_atomic(part / RECIPE, to_json(recipe))
    part.rename(folder)
    print(f"{folder.name}: {recipe['steps']} steps in {time.monotonic() - start:.0f} s, loss "
          f"{losses[0]:.3f} at first and {losses[-1]:.3f} at last, written to {folder}", flush=True)


def save_model(model, expert, folder):
    """Write the model in bfloat16, with the tokenizer of the expert, as a Hugging Face folder."""
    # The specialist stops where the policy stops. The policy's settings for sampling are left out.
    model.generation_config = transformers.GenerationConfig(eos_token_id=expert.stop_ids)
    model.to(torch.bfloat16).save_pretrained(folder)

    # Copy the tokenizer's files. An index belongs to the policy's own files of weights.
    for path in tokenizer_and_config_files(expert.folder):
        is_new = not (folder / path.name).exists()
        if is_new and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def is_finished(folder, recipe):
    """True if the specialist is there already. Raises ValueError if another one is in its place."""
    if not folder.exists():
        return False

    made_with = read_recipe(folder)
    for key, value in recipe.items():
        if made_with.get(key) != value:
            raise ValueError(f"{folder} was made with {key} {made_with.get(key)!r}, and not with {value!r}: "
                             "choose another --out, or delete this folder")
    return True


def read_recipe(folder):
    """The dict that `make` has written. Raises ValueError for a folder that is no specialist."""
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        return dict(recipe, task=recipe["task"], level=recipe["level"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no specialist made by lab.specialists, its {RECIPE} cannot be read: "
                         f"choose another --out ({first_line(error)})") from error


def to_json(value):
    return f"{json.dumps(value, indent=1)}\n".encode()


def unfinished(expert, options):
    """What is still to be made: a list of (folder, recipe, lessons). Says what is kept and what is left out.

    The lessons of all specialists are drawn here, so that a mistake in the last one shows before the first
    one is made. Raises ValueError as `lessons_of` and `is_finished` do.
    """
    missing = []
    for task in dict.fromkeys(options.task or options.families):  # each once
        level = options.level
        if level is None and task != "gsm8k":  # GSM8K has no levels
            level = "easy"
        recipe = dict(policy=expert.pinned, task=task, level=level, steps=options.steps, batch=BATCH,
                      learning_rate=LEARNING_RATE, cue=CUE, write=options.write)

        # Keep what is finished.
        folder = options.out / task
        if is_finished(folder, recipe):
            print(f"{task}: is finished and kept", flush=True)
            continue

        lessons, left_out = lessons_of(expert, task, level, options.steps * BATCH)
        missing.append((folder, recipe, lessons))
        for dataset, n in left_out.items():
            print(f"{task}: {n} problems of {dataset} are left out, because their answers take more than "
                  f"{options.write} tokens (--write)", flush=True)
    return missing


def finished(out):
    """({specialist: its folder}, {specialist: its recipe}) of all in `out`, also of earlier commands."""
    folders, recipes = {}, {}
    for path in sorted(out.glob(f"*/{RECIPE}")):
        folder = path.parent
        if not folder.name.startswith("."):  # else it was not written to its end
            folders[folder.name] = folder
            recipes[folder.name] = read_recipe(folder)
    return folders, recipes


def parse(argv):
    """The options of the command line. Raises ValueError for values that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m lab.specialists", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, metavar="FOLDER",
                        help="The small causal language model to begin with: a folder, or a name on the "
                             "Hugging Face hub.")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path,
                        help="The folder in which each specialist gets a folder of its own.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES),
                      help="Make one specialist for each of these families. Default: all three.")
    what.add_argument("--task", nargs="+",
                      help="Make one specialist for each of these tasks, which are named as for train.py.")
    parser.add_argument("--level", help="Level of the problems, as for train.py. Default: easy.")
    parser.add_argument("--steps", type=int, default=200,
                        help=f"Training steps for each specialist, of {BATCH} problems each. Default: 200.")
    parser.add_argument("--write", type=int, default=20,
                        help="The most tokens of an answer. Give train.py the same. Default: 20.")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1 or mps. Default: auto, the best there is.")
    options = parser.parse_args(argv)

    for name in ("steps", "write"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is too small: it must be at least 1")
    options.out = options.out.expanduser()
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is a file: choose a folder as --out")
    return options


def run(argv=None):
    """Make the specialists that are not there yet, and show what each one knows. Returns the table's rows."""
    options = parse(argv)
    device = pick_device(options.device)

    # Open the policy. Its weights are not in memory yet.
    expert = Expert(options.policy, cue=CUE, max_new=options.write, device=device)
    if not expert.writes:
        raise ValueError(f"{options.policy} cannot write text: name a causal language model as --policy")

    for folder, recipe, lessons in unfinished(expert, options):
        make(expert, folder, recipe, lessons)

    folders, recipes = finished(options.out)
    rows = what_each_knows(options.policy, folders, recipes, options.write, device)
    write_atomic(options.out / TABLE, to_json(dict(policy=expert.pinned, write=options.write, rows=rows)))
    print(table(rows))
    return rows


if __name__ == "__main__":
    sys.exit(run_cli("lab.specialists", run))
