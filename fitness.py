"""Which Reasoning Gym datasets are fit to train on: `python rewards.py --fitness` measures every one of them.

A dataset is safe (its scorer may see any answer of bounded size), guarded (a check comes before the scorer),
repaired (the scorer is not asked at all) or refused; answers.py holds the checks. The rest of the table says
what training on it means: how many questions there are, what a constant answer earns, how long the texts are.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import answers
import rewards

HERE = Path(__file__).resolve().parent
DRAWS, SECONDS, STABLE = 2000, 2.0, 5  # items drawn of each dataset, the time they may take; items a level
HEAD = """# Which Reasoning Gym datasets are fit to train on

Made by `python rewards.py --fitness` with reasoning-gym {version}, at each dataset's default level.

- Every answer is checked for size, digits, exponents and nesting before any scorer sees it, and pays from a
  score of 0.99 on. **safe**: no more is needed; **guarded**: another check comes first; **repaired**: our own
  check decides, the scorer is not asked; **refused**: `--task` says why in one sentence.
- hash: whether the first {stable} items of every level (of the refused: the default one) are the same under
  PYTHONHASHSEED 1 and 2.
- questions: distinct ones in {draws:,} draws (fewer draws, after "of", where these took over {seconds:g} s).
- floor: what the commonest gold answer alone earns, in bold above 30%: a curve starts there, not at 0.
- lengths: means in {unit}, over 100 items.

| dataset | fit | why | hash | questions | train / val / test | floor | question | answer | ms an item |
|---|---|---|---|---|---|---|---|---|---|
"""


def fit(name):
    """(safe, guarded, repaired or refused, and why)."""
    if name in answers.REFUSED:
        return "refused", answers.REFUSED[name]
    check = answers.CHECKS.get(name)
    if check is None:
        return "safe", ""
    kind = "repaired" if check in (answers.exact, answers.expression) else "guarded"
    return kind, check.__doc__.split("\n")[0]


def fingerprints():
    """{"dataset level": hash of its first items}, printed by a child process under its own PYTHONHASHSEED."""
    prints, registry = {}, rewards._registry()
    for name in sorted(set(registry) - {"composite"}):
        refused = name in answers.REFUSED
        for level in ("default",) if refused else ("easy", "default", "hard"):
            if refused:
                source = registry[name][0](registry[name][1](seed=1, size=100))
            else:
                source = rewards._source(name, rewards._settings(name, name, level))
            items = [(source[i]["question"], source[i]["answer"]) for i in range(STABLE)]
            prints[f"{name} {level}"] = hashlib.sha256(repr(items).encode()).hexdigest()
    return prints


def unstable():
    """{dataset: levels} whose items differ between two processes with another PYTHONHASHSEED."""
    code = "import json, fitness; print('\\n' + json.dumps(fitness.fingerprints()))"
    runs = []
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                              cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    levels = {}
    for key in runs[0]:
        if runs[0][key] != runs[1][key]:
            levels.setdefault(key.split()[0], []).append(key.split()[1])
    return levels


def measure():
    """(length of a text, its unit): tokens of the tiny policy where there is one, else words."""
    if not (HERE / "tiny" / "policy" / "config.json").exists():
        return lambda text: len(text.split()), "words"
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny" / "policy")
    return lambda text: len(tokenizer(text)["input_ids"]), "tokens of tiny/policy"


def row(name, length, levels):
    """One dataset's line of the table."""
    kind, why = fit(name)
    cells = [name, kind, why.replace("|", "\\|"), "differs: " + ", ".join(levels) if levels else "same"]
    if name == "composite":
        cells[3] = ""
    if kind == "refused":
        return "| " + " | ".join(cells + [""] * 6) + " |"
    stream, began = rewards._Stream(name, ()), time.perf_counter()
    while stream.drawn < DRAWS and stream.repeats < DRAWS and time.perf_counter() - began < SECONDS:
        stream.draw()
    seconds = (time.perf_counter() - began) / stream.drawn
    gold = [str(entry["answer"] or "") for split in rewards.SPLITS for entry in stream.items[split]]
    share, answer = rewards.guessing_floor([rewards.Problem("", text) for text in gold])
    shown = f"{share:.0%}" + (f" `{answer[:20]}`" if share > 0.1 else "") if answer else "no gold answer"
    some = [entry for split in rewards.SPLITS for entry in stream.items[split][:33]]
    means = [sum(length(str(entry[of] or "")) for entry in some) / len(some) for of in ("question", "answer")]
    cells += [f"{len(gold)}" + (f" of {stream.drawn}" if stream.drawn < DRAWS else ""),
              " / ".join(str(len(stream.items[split])) for split in rewards.SPLITS),
              f"**{shown}**" if share > 0.3 else shown, *(f"{mean:.0f}" for mean in means),
              f"{1000 * seconds:.2g}"]
    return "| " + " | ".join(cells) + " |"


def write(out):
    """Measure every dataset and write the table to the file `out`; takes about five minutes."""
    length, unit = measure()
    levels = unstable()
    rows = [row(name, length, levels.get(name)) for name in sorted(rewards._registry())]
    package = version("reasoning-gym")
    head = HEAD.format(version=package, unit=unit, draws=DRAWS, seconds=SECONDS, stable=STABLE)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{out}: {len(rows)} datasets")
