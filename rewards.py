"""Where problems come from, and how an answer is verified.

The verifier is the teacher: whatever it pays for is what the policy learns. It pays for one exact,
well-formed answer; answers.py says how an answer is read, and when a dataset's own scorer may see it.

The sha256 of a generated question decides its split, so that train, val and test share no question, whatever
seeds and sizes are asked for. (Reasoning Gym's seeds do not separate: item i comes from Random(seed + i).)
Items are a pure function of (task, level, split, index): the same on every machine and in every process.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import urllib.request
from pathlib import Path

from answers import MAX_NUMBER, REFUSED, check, extract, lenient, number

REASONS = ("right", "wrong", "no_answer", "unclosed", "several", "too_long", "not_a_number", "truncated",
           "refused", "scorer_raised")
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question, its gold answer ("" where the dataset has no single one) and what its scorer needs."""

    question: str
    answer: str
    task: str = "gsm8k"  # the part of a mix it belongs to: "arithmetic" in "arithmetic+logic"
    dataset: str = "gsm8k"
    level: str = "default"
    split: str = "train"
    index: int = 0
    entry: dict | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`strict` and its `reward` are trained on; `lenient` is only reported; `reason` is one of REASONS."""

    strict: bool
    lenient: bool
    reward: float
    reason: str


def verify(completion, problem, form="tagged", truncated=False, format_bonus=0.0):
    """The Verdict on a completion: plain text, with the text of its stop token or without.

    form "tagged": after the last </think>, exactly one <answer>...</answer> holds nothing but the answer.
    form "plain": the first line is nothing but the answer. `truncated`: the completion hit the token limit;
    a complete block still counts, an unended first line does not. `format_bonus`, at most 0.1, is the reward
    of a well-formed wrong answer. Raises ValueError for an unknown form or a larger bonus.
    """
    if form not in ("tagged", "plain"):
        raise ValueError(f"unknown answer form {form!r}: choose tagged or plain")
    if not 0 <= format_bonus <= 0.1:
        raise ValueError(f"a format bonus of {format_bonus} would compete with the answer: choose 0 to 0.1")
    text, reason = extract(completion, form, truncated)
    if reason is None and problem.dataset == "gsm8k":
        reason = _grade_number(text, problem.answer, units=form == "tagged")
    elif reason is None:
        reason = _grade_generated(text.strip(), problem)
    strict = reason == "right"
    reward = 1.0 if strict else format_bonus if reason == "wrong" else 0.0
    return Verdict(strict, strict or lenient(completion[-2000:], problem.answer), reward, reason)


def _grade_number(text, gold, units):
    if len(text) > MAX_NUMBER:
        return "too_long"
    value = number(text, units)
    return "not_a_number" if value is None else "right" if value == number(gold) else "wrong"


def _grade_generated(text, problem):
    """Right if the dataset's own score is at least 0.99, once the checks let its scorer see the answer."""
    entry = problem.entry or {"answer": problem.answer, "metadata": {}}
    reason = check(text, problem.answer.strip(), problem.dataset, entry["metadata"])
    if reason:
        return reason
    source = _source(problem.dataset, _settings(problem.task, problem.dataset, problem.level))
    if "score_answer" not in vars(type(source)):  # the default one: exact, or paid for what contains it
        return "wrong"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some scorers print
            return "right" if source.score_answer(text, entry) >= 0.99 else "wrong"
    except Exception:  # whatever a scorer trips over is not paid, and counted
        return "scorer_raised"


# Tasks and their levels

TINY = {  # the embedded pool's level: what the experts in tiny/ were taught
    "arithmetic": {"chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}},
    "logic": {"family_relationships": {"min_family_size": 4, "max_family_size": 5}},
    "algorithmic": {"count_primes": {"min_n": 1, "max_n": 100}},
}
FAMILIES = {  # at every other level; a constant answer solves less than a third of any
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "lcm", "leg_counting"),
    "logic": ("family_relationships", "knights_knaves", "color_cube_rotation", "aiw"),
    "algorithmic": ("count_primes", "number_sorting", "spell_backward", "base_conversion", "caesar_cipher"),
}
LEVELS = {"easy": 0, "hard": 2}  # the step of the dataset's own curriculum; "default": its default parameters
SIZES = {"acre": 5000, "gsm_symbolic": 100_000}  # these draw all their items when they are built


@functools.lru_cache(maxsize=1)
def _registry():
    """{name: (class, configuration class)}; imported late: it takes 1.6 s, and GSM8K does without."""
    try:
        import reasoning_gym  # noqa: F401  (fills the registry)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"this task needs Reasoning Gym: pip install reasoning-gym ({error})") from error
    return DATASETS


def tasks():
    """The names `problems` knows: gsm8k, the three families, every usable Reasoning Gym dataset."""
    return ["gsm8k", *FAMILIES, *sorted(set(_registry()) - set(REFUSED))]


def near(name):
    """Up to three known tasks whose names look like `name`."""
    return difflib.get_close_matches(name.lower(), tasks(), n=3, cutoff=0.5)


def known(name):
    """The name, if it is a task's; else a ValueError that says what to choose."""
    if name in REFUSED:
        raise ValueError(f"the dataset {name} is refused because {REFUSED[name]}: choose another one")
    if name != "gsm8k" and name not in FAMILIES and name not in _registry():
        names = " or ".join(near(name)) or "gsm8k, " + ", ".join(FAMILIES)
        raise ValueError(f"unknown task {name!r}: choose {names}, or another Reasoning Gym dataset")
    return name


@functools.lru_cache(maxsize=None)
def _settings(task, dataset, level):
    """The dataset's parameters at this level of the task, as a tuple of (name, value) pairs."""
    if task in FAMILIES and level == "tiny":
        return tuple(TINY[task][dataset].items())
    if level == "default":
        return ()
    if level in LEVELS:
        return _curriculum(dataset, LEVELS[level])
    if task in FAMILIES:
        raise ValueError(f"unknown level {level!r} of {task}: choose easy, default, hard or tiny")
    kinds = {field.name: field.type for field in dataclasses.fields(_registry()[dataset][1])
             if field.type in (bool, int, float, str) and field.name not in ("seed", "size")}
    return tuple(sorted(_assignment(dataset, part, kinds) for part in level.split(",")))


def _assignment(dataset, text, kinds):
    """'max_terms=2' -> ("max_terms", 2), of the parameter's own type."""
    name, equals, value = (piece.strip() for piece in text.partition("="))
    if not equals or name not in kinds:
        names = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ValueError(f"unknown level {text.strip()!r} of {dataset}: choose easy, default, hard or "
                         f"parameter=value,... of {names or 'none'}")
    try:
        kind = kinds[name]
        return name, {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"{name} of {dataset} must be of type {kind.__name__}, not {value!r}") from None


def _curriculum(dataset, step):
    """The parameters at a step of the dataset's own curriculum that are not its defaults; () without one."""
    from reasoning_gym.factory import create_curriculum, has_curriculum
    if not has_curriculum(dataset):
        return ()
    curriculum, default = create_curriculum(dataset), _registry()[dataset][1]()
    for lower in range(step, -1, -1):  # a few curricula climb to what their own dataset forbids
        curriculum.set_global_level(lower)
        config = curriculum.generate_configuration()
        with contextlib.suppress(AssertionError, ValueError):
            getattr(config, "validate", bool)()
            break
    pairs = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    pairs = ((k, v) for k, v in pairs if k not in ("seed", "size") and v != getattr(default, k))
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs)


@functools.lru_cache(maxsize=128)
def _source(dataset, settings):
    """The Reasoning Gym dataset: makes items and scores answers. ValueError if it cannot be built."""
    make, config = _registry()[dataset]
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in settings}
    try:
        return make(config(seed=1, size=SIZES.get(dataset, 10**9), **values))
    except Exception as error:
        shown = ", ".join(f"{k}={v}" for k, v in settings) or "its defaults"
        raise ValueError(f"the dataset {dataset} cannot be built with {shown}: "
                         f"{error or type(error).__name__}") from error


# Splits

def split_of(question):
    """The split of a generated question: 1/2 train, 1/4 val, 1/4 test; final, as tiny/ is trained on it."""
    return ("train", "train", "val", "test")[int(hashlib.sha256(question.encode()).hexdigest(), 16) % 4]


class _Stream:
    """The distinct items of one dataset at one level, dealt to the splits in the order they are drawn.

    The space counts as exhausted after max(200, 3 x distinct items) repeats in a row. That depends on nothing
    but the draws, so what a split holds does not depend on how many items anybody asks for.
    """

    def __init__(self, dataset, settings):
        self.source, self.items = _source(dataset, settings), {split: [] for split in SPLITS}
        self.dataset, self.seen, self.drawn, self.repeats = dataset, set(), 0, 0

    def draw(self):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some generators print
                entry = self.source[self.drawn]
        except IndexError:
            self.repeats = float("inf")
            return
        except Exception as error:
            raise ValueError(f"the dataset {self.dataset} fails at its item {self.drawn} "
                             f"({error or type(error).__name__}): choose another level") from error
        self.drawn += 1
        self.repeats += 1
        if entry["question"] not in self.seen and entry["answer"] != "":  # an empty answer cannot be given
            self.seen.add(entry["question"])
            self.items[split_of(entry["question"])].append(entry)
            self.repeats = 0

    def get(self, split, index):
        """The index-th distinct item of a split, or None if there are fewer."""
        while len(self.items[split]) <= index and self.repeats < max(200, 3 * len(self.seen)):
            self.draw()
        return self.items[split][index] if index < len(self.items[split]) else None


_stream = functools.lru_cache(maxsize=128)(_Stream)


def _generated(task, dataset, split, level):
    """An iterator over the distinct problems of one dataset in one split."""
    stream = _stream(dataset, _settings(task, dataset, level))
    for index in itertools.count():
        entry = stream.get(split, index)
        if entry is None:
            return
        answer = "" if entry["answer"] is None else str(entry["answer"])
        yield Problem(entry["question"], answer, task, dataset, level, split, index, entry)


def _epochs(items, name):
    """Training never ends: the distinct items in order, then epoch after epoch of them, each reshuffled."""
    kept = []
    for item in items:
        kept.append(item)
        yield item
    if not kept:
        raise ValueError(f"{name} has no training problem: choose another level, or a larger file")
    for epoch in itertools.count(1):
        order = list(kept)
        random.Random(f"{name} {epoch}").shuffle(order)  # seeded by text: the same on every machine
        yield from order


def _mix(parts):
    """One of each part in turn, until one ends; a held-out question that two parts share comes once."""
    seen = set()
    for part in itertools.cycle(parts):
        item = next((item for item in part if item.split == "train" or item.question not in seen), None)
        if item is None:
            return
        seen.add(item.question)
        yield item


def _part(task, split, data, level):
    """An iterator over the problems of one task that is no mix: endless for train, else distinct."""
    endless = _epochs if split == "train" else lambda items, name: items
    if task == "gsm8k":
        items = endless((Problem(*row, split=split) for row in gsm8k(data)[split]), task)
    else:
        names = [task] if task not in FAMILIES else TINY[task] if level == "tiny" else FAMILIES[task]
        items = _mix([endless(_generated(task, name, split, level), name) for name in names])
    return (dataclasses.replace(item, index=index) for index, item in enumerate(items))


class TooFew(ValueError):
    """A held-out split has fewer distinct questions than were asked for: `available` of them."""

    def __init__(self, message, available):
        super().__init__(message)
        self.available = available


def problems(task, split, n, data=None, level=None):
    """A list of n problems of a task: gsm8k, a family, a Reasoning Gym dataset, or several joined with "+".

    Parts of a mix take turns. The first 10 of 1,000 are the 10. val and test hold no question twice; train
    starts another, reshuffled epoch when it ends. `data`: where GSM8K lies (see gsm8k). `level`: easy,
    default, hard, tiny (families), or "parameter=value,..." (datasets). Raises ValueError for an unknown
    task, split, level or parameter and a dataset that cannot be built, TooFew if val or test has fewer.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose {', '.join(SPLITS)}")
    names = [known(name.strip()) for name in task.split("+")]
    found = list(itertools.islice(_mix([_part(name, split, data, level or "default") for name in names]), n))
    if len(found) < n:
        raise TooFew(f"{task} has only {len(found)} distinct {split} questions at this level, not {n}: "
                     f"ask for at most {len(found)}, or choose another level", len(found))
    return found


def guessing_floor(items):
    """(share, answer): how often the commonest gold answer would be right; (0.0, "") if there are none."""
    counts = collections.Counter(item.answer.strip() for item in items if item.answer)
    answer, count = counts.most_common(1)[0] if counts else ("", 0)
    return count / max(1, len(items)), answer


# GSM8K

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
MEND = "pass --data FOLDER with train.jsonl and test.jsonl of github.com/openai/grade-school-math"


def cache_dir():
    """Where downloads go: $N_MUSKETEERS_CACHE, else ~/.cache/n-musketeers."""
    return Path(os.environ.get("N_MUSKETEERS_CACHE") or Path.home() / ".cache" / "n-musketeers")


def _download(name):
    """The path of the official file: fetched once, checked, and under its name only when whole."""
    path = cache_dir() / "gsm8k" / name
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(URL + name, timeout=30) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise OSError("its sha256 is not the official file's")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{name}.{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"GSM8K's {name} could not be downloaded ({error}): {MEND}") from error
    return path


def _rows(path):
    """[(question, gold number as text)] of a file, each question once; ValueError names a wrong line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}): {MEND}") from error
    rows = {}
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, (_, mark, gold) = row["question"].strip(), row["answer"].rpartition("####")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {at}: it needs JSON with texts "question" and "answer"') from None
        if not question or not mark or number(gold) is None:
            raise ValueError(f"{path}, line {at}: it needs a question, and an answer with #### and a number")
        rows.setdefault(question, gold.strip().replace(",", ""))
    if not rows:
        raise ValueError(f"{path} holds no problem: {MEND}")
    return list(rows.items())


def gsm8k(data=None):
    """{split: [(question, answer)]}: test is test.jsonl, val the last 256 of train.jsonl, train the others.

    `data` is a folder with both, or one file of problems: that is split as generated questions are, unless it
    is one of the two and lies beside the other. Without `data` the official files are downloaded once.
    """
    data = Path(data).expanduser() if data else None
    if data and data.name in SHA256 and all((data.parent / name).is_file() for name in SHA256):
        data = data.parent
    if data and data.is_file():
        rows = _rows(data)
        return {split: [row for row in rows if split_of(row[0]) == split] for split in SPLITS}
    train, test = (_rows(data / name if data else _download(name)) for name in SHA256)
    unseen = dict(test)
    train = [row for row in train if row[0] not in unseen]  # nothing to do in the official files
    held = min(256, len(train) // 4)
    return {"train": train[:len(train) - held], "val": train[len(train) - held:], "test": test}


# Prompts

INSTRUCTION = "\n\nThink briefly, then give only the final answer in <answer>...</answer>."


def prompt(problem, template="plain", tokenizer=None, shots=(), ask=True):
    """The text a model reads; `shots` are solved training problems that stand before it.

    plain: the question, and "\\nAnswer:" unless it ends in "=" (verified as "plain"). chat: the tokenizer's
    chat template, asking for answer tags (verified as "tagged") unless `ask` is False, as for experts. auto:
    chat where the tokenizer has a template. Raises ValueError for chat where it has none, and for a shot from
    a held-out split.
    """
    if template not in ("plain", "chat", "auto"):
        raise ValueError(f"unknown template {template!r}: choose plain, chat or auto")
    if any(shot.split != "train" for shot in shots):
        raise ValueError("solved examples must come from the train split: held-out ones would leak")
    chat = template != "plain" and getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not chat:
        raise ValueError("this tokenizer has no chat template: choose --template plain")
    if not chat:
        return "".join(f"{_plain(shot)} {shot.answer}\n\n" for shot in shots) + _plain(problem)
    turns = []
    for shot in shots:
        answer = f"<answer>{shot.answer}</answer>" if ask else shot.answer
        turns += [{"role": "user", "content": shot.question.strip() + INSTRUCTION * ask},
                  {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": problem.question.strip() + INSTRUCTION * ask})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _plain(problem):
    question = problem.question.strip()
    return question if question.endswith("=") else question + "\nAnswer:"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure which datasets are fit to train on.")
    parser.add_argument("--fitness", action="store_true", required=True, help="measure them all (minutes)")
    parser.add_argument("--out", default="results/fitness.md", help="the table to write")
    import fitness
    fitness.write(parser.parse_args().out)
