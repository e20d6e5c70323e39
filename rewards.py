"""Where problems come from, and how an answer is verified.

The verifier is the teacher: whatever it pays for is what the policy learns, so it pays only for one exact,
well-formed answer, never runs what it reads, and takes time linear in it. Three parts, in this order:

1. notation: is this text ONE number, and which (GSM8K, and every task whose gold answer is a number)?
2. verdicts: take the answer out of a completion, check it, only then show it to a Reasoning Gym scorer;
3. problems: the tasks, their levels, their splits, and the prompt made of one.

A generated problem's split is decided by its question's sha256, so that train, val and test cannot share a
question whatever seeds and sizes are asked for (Reasoning Gym's own seeds overlap: item i is Random(seed + i)).
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import random
import re
import string
import typing
import urllib.request
from fractions import Fraction
from pathlib import Path

REASONS = ("right", "wrong", "no_answer", "unclosed", "several", "too_long", "not_a_number", "truncated",
           "refused", "scorer_raised")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its gold answer ("" where the dataset has no single one), and what its scorer needs."""
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
    """`strict` is trained on; `lenient` is only reported; `reason` is one of REASONS."""
    strict: bool
    lenient: bool
    reward: float
    reason: str


# ---------------------------------------------------------------------------------------------------------
# 1. Notation: one number, exactly. String methods only: nothing here can backtrack, and int() sees 200 digits.

THIN = "\u2009\u202f"  # thin space, narrow no-break space: thousands, like the comma
MAX_NUMBER = 200  # characters
PAIRS = (("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("\\(", "\\)"), ("\\boxed{", "}"))
SIGNS = ("\\$", "$", "€", "\\%", "%")
# Words that would change the number they follow ("18 thousand", "18 or nineteen") are no units.
NOT_UNITS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand "
    "thousands million millions billion billions trillion trillions dozen dozens k half halves or to not plus "
    "minus times over point e x".split())


def _digits(text):
    """'1,000' -> '1000': ASCII digits, with thousands groups of one kind or none; None if it is anything else."""
    for mark in "," + THIN:
        if mark in text:
            head, *groups = text.split(mark)
            if not 1 <= len(head) <= 3 or head[0] == "0" or any(len(g) != 3 for g in groups):
                return None
            text = head + "".join(groups)
            break
    return text if text.isascii() and text.isdigit() else None


def _decimal(text):
    """'18', '1,000.50', '.5', '1e3' -> Fraction, unsigned; None if it is not one of these."""
    mantissa, e, exponent = text.replace("E", "e").partition("e")
    whole, point, decimals = mantissa.partition(".")
    if point and not (decimals.isascii() and decimals.isdigit()):
        return None
    whole = _digits(whole) if whole or not point else "0"
    if whole is None:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    if not e:
        return value
    size = exponent[1:] if exponent[:1] in ("+", "-") else exponent
    if not (size.isascii() and size.isdigit()) or len(size) > 3 or int(size) > 100:
        return None
    return value * Fraction(10) ** (-int(size) if exponent[0] == "-" else int(size))


def _rational(text):
    """A signed decimal or a fraction of two whole numbers; None if it is neither."""
    negative, text = text[:1] == "-", text[1:] if text[:1] in ("-", "+") else text
    for sign in SIGNS:  # -$5
        if text.startswith(sign):
            text = text[len(sign):].lstrip()
            break
    top, slash, bottom = text.partition("/")
    if slash:
        top, bottom = _digits(top.rstrip()), _digits(bottom.lstrip())
        value = Fraction(int(top), int(bottom)) if top and bottom and int(bottom) else None
    else:
        value = _decimal(text)
    return -value if negative and value is not None else value


def _without_units(text):
    """'18 apples per day' -> '18': at most three trailing words of ASCII letters."""
    for _ in range(3):
        rest = text.rstrip(string.ascii_letters)
        if rest == text or not rest or not rest[-1].isspace() or text[len(rest):].lower() in NOT_UNITS:
            break
        text = rest.rstrip()
    return text


def number(text, units=True):
    """The one number that `text` is, as a Fraction, or None: '$1,000.', '**18**', '\\boxed{36/2}', '18 dollars'.

    Taken off: white space, $ € %, bold and italic marks, \\boxed{}, \\( \\), $ $, one full stop and, with
    `units`, up to three words after it. Several numbers, ranges and expressions are no number.
    """
    if len(text) > MAX_NUMBER:
        return None
    text, stop, before = text.replace("\u2212", "-").strip(), True, None
    while text != before:  # each round takes something off or is the last
        before = text
        for left, right in PAIRS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                text = text[len(left):-len(right)].strip()
        for sign in SIGNS:
            text = text.removeprefix(sign).removesuffix(sign).strip()
        if stop and text.endswith("."):
            text, stop = text[:-1].rstrip(), False
        if units and (shorter := _without_units(text)) != text:
            text, units = shorter, False
    return _rational(text)


# ---------------------------------------------------------------------------------------------------------
# 2. Verdicts

OPEN, CLOSE, THOUGHT = "<answer>", "</answer>", "</think>"
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>")


def _extract(text, form, truncated):
    """(answer, reason): the answer as written and None, or "" and the reason why there is none."""
    if form == "plain":
        line, newline, _ = text.partition("\n")
        if truncated and not newline:
            return "", "truncated"  # "1" may be the head of "12"
        for stop in STOPS:
            line = line.removesuffix(stop)
        return (line, None) if line.strip() else ("", "no_answer")
    text = text[text.rfind(THOUGHT) + len(THOUGHT):] if THOUGHT in text else text
    opens, closes = text.count(OPEN), text.count(CLOSE)
    start, end = text.find(OPEN) + len(OPEN), text.find(CLOSE)
    if opens == closes == 1 and start <= end:
        return (text[start:end], None) if text[start:end].strip() else ("", "no_answer")
    if opens and closes and opens + closes > 2:
        return "", "several"
    return "", "truncated" if truncated else "unclosed" if opens else "no_answer"


def verify(completion, problem, form="tagged", truncated=False, format_bonus=0.0):
    """The verdict on a completion (plain text, its stop token removed or not); see Verdict and REASONS.

    form "tagged": after the last </think>, exactly one <answer>...</answer>, which must hold nothing but the
    answer. form "plain": the first line must be nothing but the answer. `truncated`: the completion hit the
    token limit; a complete block still counts, an unended first line does not. `format_bonus` (at most 0.1)
    is paid for a well-formed wrong answer. Raises ValueError for an unknown form or a larger bonus.
    """
    if form not in ("tagged", "plain"):
        raise ValueError(f"unknown answer form {form!r}: choose tagged or plain")
    if not 0 <= format_bonus <= 0.1:
        raise ValueError(f"a format bonus of {format_bonus} would outweigh the answer: choose 0 to 0.1")
    text, reason = _extract(completion, form, truncated)
    if reason is None:
        reason = (_grade_gsm8k if problem.dataset == "gsm8k" else _grade_generated)(text, problem, form)
    strict = reason == "right"
    reward = 1.0 if strict else format_bonus if reason == "wrong" else 0.0
    return Verdict(strict, strict or _lenient(completion[-2000:], problem), reward, reason)


def _grade_gsm8k(text, problem, form):
    if len(text) > MAX_NUMBER:
        return "too_long"
    value = number(text, units=form == "tagged")
    if value is None:
        return "not_a_number"
    return "right" if value == number(problem.answer) else "wrong"


def _lenient(tail, problem):
    """Would a generous reader find the answer in the last 2,000 characters? Reported, never trained on."""
    gold = number(problem.answer)
    if gold is None:
        lines = tail.replace(OPEN, "\n").replace(CLOSE, "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return bool(last) and last.casefold() == problem.answer.strip().casefold()
    if "\\boxed{" in tail:
        return number(_braced(tail[tail.rfind("\\boxed{") + len("\\boxed{"):])) == gold
    if "####" in tail:
        line = tail[tail.find("####") + 4:].split("\n")[0]
        return (value if (value := number(line)) is not None else _last_number(line)) == gold
    values = (_last_number(line) for line in reversed(tail.split("\n")))
    return next((value for value in values if value is not None), None) == gold


def _braced(text):
    """The text up to the bracket that closes an already open one."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:at]
    return ""


def _last_number(line):
    """The last number written in a line, or None."""
    pattern = f"(?:(?<![0-9])[-+])?[0-9.][0-9.,/{THIN}]*"
    tokens = re.findall(pattern, line.replace("\u2212", "-"))
    values = (_rational(token.rstrip(".,/" + THIN)) for token in reversed(tokens) if len(token) <= MAX_NUMBER)
    return next((value for value in values if value is not None), None)


# What Reasoning Gym's scorers do with hostile answers was measured: some execute them, hang, raise, or pay for
# nonsense. A dataset is refused, or its answers pass a check first that closes its hole in one line.

HASHED = "its items change with PYTHONHASHSEED"
SYMPY = "its scorer would execute the answer (sympy's parse_expr)"
REFUSED = {
    "simple_integration": SYMPY, "intermediate_integration": SYMPY, "polynomial_multiplication": SYMPY,
    "composite": "it hides which dataset's scorer sees the answer; join datasets with + instead",
    "propositional_logic": "its scorer pays for the same '(P ∨ Q)' on most items",
    "codeio": HASHED, "isomorphic_strings": HASHED, "knight_swap": HASHED, "list_functions": HASHED,
    "ransom_note": HASHED, "word_ladder": HASHED,
}


def _same(text, gold, metadata):
    """Nothing but the gold answer: letter case and spacing are the scorer's affair."""
    return None if text.casefold().split() == gold.casefold().split() else "wrong"


def _shape(text, gold, metadata):
    """Numbers where the gold answer has numbers, and the same text around them."""
    return None if re.sub("[0-9]+", "0", text) == re.sub("[0-9]+", "0", gold) else "wrong"


def _exact(text, gold, metadata):
    """The scorer would eval() a list, and never pay fully for one: it need not see any."""
    return "right" if text in metadata.get("valid_answers", (gold,)) else "wrong"


def _only(allowed):
    """Characters, beside white space, that an answer may hold: the scorer would skip the rest."""
    return lambda text, gold, metadata: None if set("".join(text.split())) <= set(allowed) else "wrong"


def _words(pattern):
    """Every word must match: a distance or a repetition of a billion hangs the scorer."""
    word = re.compile(pattern)
    return lambda text, gold, metadata: None if all(map(word.fullmatch, text.split())) else "refused"


def _json(check):
    """JSON for which check(answer, gold) holds; scorers trust its shape, and take NaN for a number."""
    def rule(text, gold, metadata):
        try:
            return None if check(json.loads(text), json.loads(gold or "null")) else "wrong"
        except (ValueError, TypeError, AttributeError, RecursionError):
            return "wrong"
    return rule


def _numbers(text, gold, metadata):
    """As many comma-separated numbers as the gold answer has: the scorer would skip whatever is none."""
    parts = text.split(",")
    good = len(parts) == len(gold.split(",")) and all(_rational(part.strip(" ()")) is not None for part in parts)
    return None if good else "wrong"


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _evaluate(node, used):
    """The exact value of a parsed expression of whole numbers and + - * / only; collects the numbers in `used`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, used)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    raise ValueError("not an arithmetic expression")


def _expression(text, gold, metadata):
    """Countdown and 24: every given number used once, and the target met exactly. Parsed, never run."""
    if not set(text) <= set("0123456789+-*/() "):
        return "refused"
    used = []
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "wrong"
    target = metadata.get("target", 24)
    return "right" if value == target and sorted(used) == sorted(metadata["numbers"]) else "wrong"


CHECKS = {  # dataset: a verdict before the scorer, or None: the scorer may see the answer
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "emoji_mystery"), _exact),
    **dict.fromkeys(("countdown", "puzzle24"), _expression),
    **dict.fromkeys(("calendar_arithmetic", "game_of_life_halting", "figlet_font", "letter_jumble", "gsm_symbolic",
                     "spell_backward", "manipulate_matrix", "needle_haystack", "sentence_reordering"), _same),
    **dict.fromkeys(("time_intervals", "futoshiki", "sudoku", "mini_sudoku", "tower_of_hanoi"), _shape),
    **dict.fromkeys(("polynomial_equations", "advanced_geometry"), _numbers),
    "complex_arithmetic": _only("0123456789.+-ij()"),
    "kakurasu": _only("01"), "survo": _only("0123456789-"), "sokoban": _only("LRUDlrud"),
    "pool_matrix": _only("0123456789.-"), "quantum_lock": _only("ABC→"), "prime_factorization": _only("0123456789×"),
    "rush_hour": _words("[A-Z][+-][0-9]"), "rubiks_cube": _words("[A-Za-z]{1,2}[0-9]?'?"),
    "game_of_life": _json(operator.eq), "number_sorting": _json(lambda a, b: list(map(float, a)) == list(map(float, b))),
    "graph_color": _json(lambda a, b: all(type(color) is int for color in a.values())),
}
# Control characters and surrogates, 40 digits, exponents of three, powers of powers, deep negation.
HOSTILE = re.compile(r"[\x00\ud800-\udfff]|\d[\d_]{39}|[\d.][eE][+-]?[\d_]{3}|\*\*|\^\s*[\d(]|nan|inf\b|infinity", re.I)
MAX_DEPTH = 16


def _depth(text):
    """How deep the brackets of a text are nested."""
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    return max(depths, default=0)


def _grade_generated(text, problem, form):
    """Reasoning Gym: 1 if the dataset's own score is at least 0.99, once the answer has passed the checks."""
    text, gold = text.strip(), problem.answer.strip()
    if problem.dataset in REFUSED:
        return "refused"
    if gold and text == gold:
        return "right"
    if len(text) > (2 * len(gold) + 64 if gold else 2000):
        return "too_long"
    if HOSTILE.search(text) or _depth(text) > MAX_DEPTH:
        return "refused"
    if number(gold, units=False) is not None and number(text) is None:
        return "not_a_number"
    rule = CHECKS.get(problem.dataset)
    reason = rule and rule(text, gold, problem.entry["metadata"])
    return reason or _score(text, problem)


def _score(text, problem):
    scorer = _source(problem.dataset, _settings(problem.task, problem.dataset, problem.level)).score_answer
    try:
        return "right" if scorer(text, problem.entry) >= 0.99 else "wrong"
    except Exception:  # whatever a scorer trips over, the answer is not paid
        return "scorer_raised"


# ---------------------------------------------------------------------------------------------------------
# 3. Problems: tasks, levels, splits, prompts

TINY = {  # what the experts in tiny/ were taught: the embedded pool's level
    "arithmetic": [("chain_sum", {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1})],
    "logic": [("family_relationships", {"min_family_size": 4, "max_family_size": 5})],
    "algorithmic": [("count_primes", {"min_n": 1, "max_n": 100})],
}
FAMILIES = {  # at every other level: these datasets, mixed evenly; none that a constant answer half solves
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "gcd", "leg_counting"),
    "logic": ("family_relationships", "knights_knaves", "zebra_puzzles", "aiw"),
    "algorithmic": ("count_primes", "letter_counting", "number_sorting", "spell_backward", "base_conversion"),
}
LEVELS = {"easy": 0, "hard": 2}  # the step of the dataset's own curriculum; default: its default parameters
UNSETTABLE = ("seed", "size")
SIZES = {"acre": 5000, "gsm_symbolic": 100_000}  # these two draw all their items when they are built


def _registry():
    """Reasoning Gym's datasets; imported late, because that takes 1.6 s and GSM8K does not need them."""
    try:
        import reasoning_gym  # noqa: F401  (fills the registry)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"generated tasks need Reasoning Gym: pip install reasoning-gym ({error})") from error
    return DATASETS


def tasks():
    """The names `problems` knows: gsm8k, the three families, and every usable Reasoning Gym dataset."""
    return ["gsm8k", *FAMILIES, *sorted(set(_registry()) - set(REFUSED))]


def near(name):
    """Up to three known task names that look like `name`."""
    return difflib.get_close_matches(name.lower(), tasks(), n=3, cutoff=0.5)


def _check_task(name):
    if name in REFUSED:
        raise ValueError(f"the dataset {name} is refused: {REFUSED[name]}; choose another one")
    if name != "gsm8k" and name not in FAMILIES and name not in _registry():
        close = near(name)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose gsm8k, {', '.join(FAMILIES)} or a dataset's name"
        raise ValueError(f"unknown task {name!r}: {hint}")


@functools.lru_cache(maxsize=None)
def _settings(task, dataset, level):
    """The dataset's parameters at this level of the task, as sorted (name, value) pairs."""
    if task in FAMILIES and level == "tiny":
        return tuple(sorted(dict(TINY[task])[dataset].items()))
    if level == "default":
        return ()
    if level in LEVELS:
        return _curriculum(dataset, LEVELS[level])
    if "=" in level and task not in FAMILIES:
        return _parse_level(dataset, level)
    choices = "easy, default, hard" + (" or tiny" if task in FAMILIES else f" or key=value with {_fields(dataset)}")
    raise ValueError(f"unknown level {level!r} of {task}: choose {choices}")


def _curriculum(dataset, step):
    """The parameters at a step of the dataset's own curriculum; () where it has none."""
    from reasoning_gym.factory import create_curriculum, has_curriculum
    if not has_curriculum(dataset):
        return ()
    curriculum, default = create_curriculum(dataset), _registry()[dataset][1]()
    for lower in range(step, -1, -1):  # a few curricula climb to parameters their own dataset forbids
        curriculum.set_global_level(lower)
        config = curriculum.generate_configuration()
        with contextlib.suppress(AssertionError, ValueError):
            config.validate()
            break
    pairs = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in UNSETTABLE)
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs if v != getattr(default, k))


def _kinds(dataset):
    """{parameter: (container or None, type of a value)} of those that can be written as text."""
    kinds = {}
    for field in dataclasses.fields(_registry()[dataset][1]):
        inner = next((a for a in (field.type, *typing.get_args(field.type)) if a in (bool, int, float, str)), None)
        outer = tuple if field.type is tuple else typing.get_origin(field.type)
        inner = str if field.type is tuple else inner
        if inner and field.name not in UNSETTABLE:
            kinds[field.name] = (outer if outer in (tuple, list) else None, inner)
    return kinds


def _fields(dataset):
    return ", ".join(f"{name} ({inner.__name__})" for name, (_, inner) in _kinds(dataset).items())


def _parse_level(dataset, level):
    """'min_terms=2,max_terms=2' -> pairs; several values of one parameter are joined with |."""
    pairs, kinds = {}, _kinds(dataset)
    for part in level.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in kinds:
            raise ValueError(f"{dataset} has no parameter {name!r}: choose from {_fields(dataset)}")
        outer, inner = kinds[name]
        try:
            convert = {"true": True, "false": False}.__getitem__ if inner is bool else inner
            pairs[name] = tuple(map(convert, value.split("|"))) if outer else convert(value.lower() if inner is bool else value)
        except (ValueError, KeyError):
            raise ValueError(f"{dataset}: {name} must be {inner.__name__}, not {value!r}") from None
    return tuple(sorted(pairs.items()))


@functools.lru_cache(maxsize=64)
def _source(dataset, settings):
    """The Reasoning Gym dataset object: generates items, scores answers."""
    make, config = _registry()[dataset]
    size = SIZES.get(dataset, 10**9)
    try:
        return make(config(seed=1, size=size, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings}))
    except Exception as error:
        shown = ", ".join(f"{k}={v}" for k, v in settings) or "its default parameters"
        raise ValueError(f"the dataset {dataset} cannot be built with {shown}: {error or type(error).__name__}") from error


def _split(question):
    """The rule of every generated task, final because tiny/ is trained on it: 1/2 train, 1/4 val, 1/4 test."""
    return ("train", "train", "val", "test")[int(hashlib.sha256(question.encode()).hexdigest(), 16) % 4]


class _Stream:
    """The distinct items of one dataset at one level, dealt to the splits in the order they are drawn.

    The space counts as exhausted after max(200, 3 x distinct items) repeats in a row: this depends on nothing
    but the draws, so what a split holds does not depend on how many items anyone asks for.
    """

    def __init__(self, dataset, settings):
        self.source, self.items = _source(dataset, settings), {"train": [], "val": [], "test": []}
        self.dataset, self.seen, self.drawn, self.repeats = dataset, set(), 0, 0

    def _draw(self):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some generators print
                entry = self.source[self.drawn]
        except IndexError:
            self.repeats = float("inf")
            return
        except Exception as error:
            raise ValueError(f"the dataset {self.dataset} could not make its item {self.drawn} at this level: "
                             f"{error or type(error).__name__}; choose another level") from error
        self.drawn += 1
        question = entry["question"]
        if question in self.seen or entry["answer"] == "":  # what has an empty answer cannot be answered
            self.repeats += 1
            return
        self.repeats = 0
        self.seen.add(question)
        self.items[_split(question)].append(entry)

    def get(self, split, index):
        """The index-th distinct item of a split, or None if there are fewer."""
        items = self.items[split]
        while len(items) <= index and self.repeats < max(200, 3 * len(self.seen)):
            self._draw()
        return items[index] if index < len(items) else None


_stream = functools.lru_cache(maxsize=64)(_Stream)


class TooFew(ValueError):
    """A val or test split holds fewer distinct questions than were asked for; `.available` says how many."""

    def __init__(self, message, available):
        super().__init__(message)
        self.available = available


def _repeat(get, name):
    """Endless training items: the distinct ones in order, then epoch after epoch of them, reshuffled."""
    items = []
    while (item := get(len(items))) is not None:
        items.append(item)
        yield item
    if not items:
        raise ValueError(f"{name} has no training items: choose a level with more questions, or a larger file")
    for epoch in itertools.count(1):
        order = list(items)
        random.Random(f"{name} {epoch}").shuffle(order)  # seeded by text: the same on every machine
        yield from order


def _part(task, split, data, level):
    """An iterator over the problems of one task that is no mix: endless for train, else its distinct items."""
    def finish(items):
        return (dataclasses.replace(item, index=index) for index, item in enumerate(items))
    if task == "gsm8k":
        rows = gsm8k(data)[split]
        made = [Problem(question, answer, split=split) for question, answer in rows]
        get = lambda index: made[index] if index < len(made) else None  # noqa: E731
        return finish(_repeat(get, task) if split == "train" else made)
    if task in FAMILIES:
        names = [name for name, _ in TINY[task]] if level == "tiny" else FAMILIES[task]
        return finish(_mix([_dataset(task, name, split, level) for name in names]))
    return finish(_dataset(task, task, split, level))


def _dataset(task, name, split, level):
    stream = _stream(name, _settings(task, name, level))

    def get(index):
        entry = stream.get(split, index)
        return entry and Problem(entry["question"], "" if entry["answer"] is None else str(entry["answer"]), task,
                                 name, level, split, index, entry)
    if split == "train":
        return _repeat(get, name)
    return iter(lambda count=itertools.count(): get(next(count)), None)


def _mix(parts):
    """One of each part in turn, until one of them ends; a question two parts share comes once."""
    seen, single = set(), len(parts) == 1
    for part in itertools.cycle(parts):
        item = next((p for p in part if single or p.split == "train" or p.question not in seen), None)
        if item is None:
            return
        seen.add(item.question)
        yield item


def problems(task, split, n, data=None, level=None):
    """n problems of a task: "gsm8k", a family, a Reasoning Gym dataset, or several joined with "+", mixed evenly.

    A pure function of (task, level, split, index): the first 10 of 1,000 are the 10. "val" and "test" never hold a
    question twice; a "train" that ends starts another, reshuffled epoch. `data` is where GSM8K lies (see gsm8k),
    `level` is easy, default, hard, "tiny" (families) or "parameter=value,..." (datasets).
    Raises ValueError for an unknown task, split, level or parameter, TooFew if val or test holds fewer than n.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"unknown split {split!r}: choose train, val or test")
    names = [name.strip() for name in task.split("+")]
    for name in names:
        _check_task(name)
    found = list(itertools.islice(_mix([_part(name, split, data, level or "default") for name in names]), n))
    if len(found) < n:
        raise TooFew(f"{task} has only {len(found)} distinct {split} questions at this level, {n} were asked for: "
                     f"ask for at most {len(found)}, or choose another level", len(found))
    return found


# GSM8K

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
VAL = 256


def cache_dir():
    """Where downloads go: $N_MUSKETEERS_CACHE, else ~/.cache/n-musketeers."""
    return Path(os.environ.get("N_MUSKETEERS_CACHE") or Path.home() / ".cache" / "n-musketeers")


def _download(name):
    """The official file, fetched once and checked; the file appears under its name only when it is whole."""
    path = cache_dir() / "gsm8k" / name
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(URL + name, timeout=30) as answer:
            content = answer.read()
    except OSError as error:
        raise ValueError(f"GSM8K could not be downloaded ({error}): pass --data FOLDER with train.jsonl and "
                         "test.jsonl of github.com/openai/grade-school-math") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"the download of {name} is not the official GSM8K file: pass --data FOLDER instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
    return path


def _rows(path):
    """[(question, gold number as text)] of a GSM8K file; ValueError names the file and the line that is wrong."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}): pass --data FOLDER with train.jsonl and test.jsonl") from error
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, gold = row["question"].strip(), row["answer"].rpartition("####")[2].strip().replace(",", "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {at}: expected a JSON object with texts "question" and "answer"') from None
        if "####" not in row["answer"] or number(gold) is None or not question:
            raise ValueError(f"{path}, line {at}: the answer must end in #### and one number")
        rows.append((question, gold))
    if not rows:
        raise ValueError(f"{path} holds no problems: pass --data FOLDER with train.jsonl and test.jsonl")
    return rows


def gsm8k(data=None):
    """{"train", "val", "test"}: lists of (question, answer). val is the last 256 of train.jsonl, test all of test.jsonl.

    `data` is a folder with both files, or one file, which is split by the rule of the generated tasks (one of the
    two official files beside the other stands for their folder). Without it they are downloaded once.
    """
    data = Path(data).expanduser() if data else None
    if data and data.name in SHA256 and all((data.parent / name).is_file() for name in SHA256):
        data = data.parent
    if data and data.is_file():
        unique = dict(reversed(_rows(data)))
        return {split: [row for row in reversed(unique.items()) if _split(row[0]) == split]
                for split in ("train", "val", "test")}
    train, test = (_rows(data / name if data else _download(name)) for name in SHA256)
    held = min(VAL, len(train) // 4)
    return {"train": train[:len(train) - held], "val": train[len(train) - held:], "test": test}


# Prompts

INSTRUCTION = "\n\nThink step by step, then give only the final answer in <answer>...</answer>."


def prompt(problem, template="plain", tokenizer=None, shots=(), ask=True):
    """The text a model reads. `shots` are solved training problems that stand before it.

    "plain": the question, and "\nAnswer:" unless it ends in "=" (verify with form="plain"). "chat": the
    tokenizer's chat template, the answer asked for in tags unless `ask` is False, as for experts (form="tagged").
    "auto": chat if the tokenizer has a template. Raises ValueError if "chat" is asked of one that has none.
    """
    if template not in ("plain", "chat", "auto"):
        raise ValueError(f"unknown template {template!r}: choose plain, chat or auto")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise ValueError("this tokenizer has no chat template: choose --template plain")
    if template == "plain" or not has_template:
        return "".join(f"{_plain(shot)} {shot.answer}\n\n" for shot in shots) + _plain(problem)
    turns = []
    for shot in shots:
        turns += [{"role": "user", "content": shot.question.strip() + INSTRUCTION * ask},
                  {"role": "assistant", "content": f"<answer>{shot.answer}</answer>" if ask else shot.answer}]
    turns.append({"role": "user", "content": problem.question.strip() + INSTRUCTION * ask})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _plain(problem):
    question = problem.question.strip()
    return question if question.endswith("=") else question + "\nAnswer:"


def guessing_floor(items):
    """(share, answer): how often the commonest gold answer alone would be right; (0.0, "") without gold answers."""
    counts = collections.Counter(item.answer.strip() for item in items if item.answer)
    answer, count = counts.most_common(1)[0] if counts else ("", 0)
    return count / max(1, len(items)), answer
