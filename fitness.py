"""Which Reasoning Gym datasets are fit to train on: `python rewards.py --fitness` measures every one of them.

A dataset is safe (its scorer may see any answer of bounded size), guarded (a check comes before the scorer),
repaired (the scorer is not asked at all) or refused; answers.py holds the checks. The rest of the table says what
training on it means: how many questions there are, what a constant answer earns, how long the texts are.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import answers
import rewards

DRAWS, SECONDS = 2000, 2.0  # items drawn of each dataset, unless the seconds are over before
STABLE_ITEMS = 3
HEAD = """# Which Reasoning Gym datasets are fit to train on

Made by `python rewards.py --fitness` with reasoning-gym {version}; default parameters unless a level is named.
Every answer is checked for size, digits, exponents and nesting before any scorer sees it, and pays only from a score of
0.99 on. **safe**: nothing else is needed. **guarded**: another check comes first. **repaired**: the scorer is not asked.
Lengths are means in {unit}. Questions: distinct ones in {draws} draws; * marks fewer draws, because {seconds:g} s were over.
Floor: what the commonest answer alone earns. hash: the same items under another PYTHONHASHSEED, at {levels}.

| dataset | fit | why | hash | questions | train/val/test | floor | question | answer | ms an item |
|---|---|---|---|---|---|---|---|---|---|
"""


def fit(name):
    """(safe | guarded | repaired | refused, why)."""
    if name in answers.REFUSED:
        return "refused", answers.REFUSED[name]
    check = answers.CHECKS.get(name)
    if check is None:
        return "safe", ""
    return "repaired" if check in (answers.exact, answers.expression) else "guarded", check.__doc__.split("\n")[0]


def fingerprints():
    """{"dataset level": hash of its first items}; printed by a child process under a given PYTHONHASHSEED."""
    prints = {}
    for name in sorted(set(rewards._registry()) - {"composite"}):
        for level in ("easy", "default", "hard"):
            try:
                source = rewards._source(name, rewards._settings(name, name, level))
                items = [(source[i]["question"], source[i]["answer"]) for i in range(STABLE_ITEMS)]
            except ValueError as error:
                items = str(error)
            prints[f"{name} {level}"] = hashlib.sha256(repr(items).encode()).hexdigest()
    return prints


def unstable():
    """{dataset: levels} whose items differ between two processes with different PYTHONHASHSEED."""
    command = [sys.executable, "-c", "import fitness, json; print('\\n' + json.dumps(fitness.fingerprints()))"]
    one, other = (
        json.loads(subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, text=True,
                                  cwd=Path(__file__).parent, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        for seed in ("1", "2"))
    differ = [key.split() for key in one if one[key] != other[key]]
    return {name: ", ".join(level for n, level in differ if n == name) for name, _ in differ}


def measurer():
    """(how to measure a text's length, the unit): the tiny policy's tokens where there is one, else words."""
    folder = Path(__file__).parent / "tiny" / "policy"
    if not (folder / "config.json").exists():
        return lambda text: len(text.split()), "words"
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text)["input_ids"]), "tokens of tiny/policy"


def row(name, length, differs):
    """One dataset's line of the table."""
    fitness, why = fit(name)
    start = f"| {name} | {fitness} | {why.replace('|', chr(92) + '|')} | {'differs: ' + differs if differs else 'same'} |"
    if fitness == "refused":
        return start + " | | | | | |"
    stream, began = rewards._Stream(name, ()), time.perf_counter()
    while stream.drawn < DRAWS and stream.repeats < DRAWS and time.perf_counter() - began < SECONDS:
        stream.draw()
    each = (time.perf_counter() - began) / max(1, stream.drawn)
    counts = "/".join(str(len(stream.items[split])) for split in rewards.SPLITS)
    items = [entry for split in rewards.SPLITS for entry in stream.items[split]]
    made = [rewards.Problem(e["question"], "" if e["answer"] is None else str(e["answer"])) for e in items]
    share, answer = rewards.guessing_floor(made)
    floor = f"{share:.0%} {answer[:12]!r}" if share >= 0.1 else f"{share:.1%}" if answer else "no gold"
    means = [sum(length(getattr(p, of)) for p in made[:100]) / max(1, len(made[:100])) for of in ("question", "answer")]
    cut = "" if stream.drawn >= DRAWS or stream.repeats >= DRAWS else f" of {stream.drawn}*"
    return f"{start} {len(items)}{cut} | {counts} | {floor} | {means[0]:.0f} | {means[1]:.0f} | {1000 * each:.2g} |"


def write(out):
    """Measure every dataset and write the table to `out`; takes about five minutes."""
    from importlib.metadata import version
    length, unit = measurer()
    differs = unstable()
    rows = [row(name, length, differs.get(name)) for name in sorted(rewards._registry())]
    head = HEAD.format(version=version("reasoning-gym"), unit=unit, draws=f"{DRAWS:,}", seconds=SECONDS,
                       levels=f"all three levels ({STABLE_ITEMS} items each)")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{out}: {len(rows)} datasets")
