"""What a policy wrote, read without running it.

A policy finds every hole in its verifier, so an answer is text to be checked and never code. Three parts:

1. notation: is this text ONE number, and which? (GSM8K, and every task whose gold answer is a number)
2. extraction: the one answer a completion gives, and the lenient reading that is only reported;
3. checks: what must hold before a Reasoning Gym scorer may see an answer, and which scorers never may. What
   they do with hostile answers was measured: some execute them, hang, raise, or pay for nonsense.

Everything here takes time linear in the text, and int() never sees more than 200 digits.
"""

import ast
import itertools
import json
import operator
import re
import string
from fractions import Fraction

# 1. Notation

THIN = "\u2009\u202f"  # thin space, narrow no-break space: they group thousands, as the comma does
MAX_NUMBER = 200  # characters
PAIRS = (("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("\\(", "\\)"), ("\\boxed{", "}"))
SIGNS = ("\\$", "$", "€", "\\%", "%")
NOT_UNITS = frozenset(  # words that would change the number they follow: "18 thousand", "18 or nineteen"
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds "
    "thousand thousands million millions billion billions trillion trillions dozen dozens half halves k "
    "or to not plus minus times over point squared cubed e x".split())


def _plain(text):
    """Nothing but ASCII digits, and at least one? ("²".isdigit() and "１".isdigit() are true.)"""
    return text.isascii() and text.isdigit()


def _whole(text):
    """'1,000' -> '1000': digits, in thousands groups of one kind or in none; None if it is anything else."""
    mark = next((mark for mark in "," + THIN if mark in text), None)
    if mark:
        head, *groups = text.split(mark)
        if not 1 <= len(head) <= 3 or head[0] == "0" or any(len(group) != 3 for group in groups):
            return None
        text = head + "".join(groups)
    return text if _plain(text) else None


def _decimal(text):
    """'18', '1,000.50', '.5', '1e3' -> Fraction, without a sign; None if it is not one of these."""
    mantissa, e, exponent = text.replace("E", "e").partition("e")
    whole, point, decimals = mantissa.partition(".")
    whole = _whole(whole) if whole or not point else "0"
    power = exponent[1:] if exponent[:1] in ("+", "-") else exponent
    if whole is None or (point and not _plain(decimals)) or (e and not (_plain(power) and len(power) <= 2)):
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return value * Fraction(10) ** (int(power or 0) * (-1 if exponent[:1] == "-" else 1))


def rational(text):
    """A decimal or a fraction of two whole numbers, with or without a sign; None if it is neither."""
    sign, text = (-1 if text[:1] == "-" else 1), text[1:] if text[:1] in ("-", "+") else text
    for mark in SIGNS:  # -$5
        text = text.removeprefix(mark).lstrip() if text.startswith(mark) else text
    top, slash, bottom = text.partition("/")
    if not slash:
        value = _decimal(text)
    else:
        top, bottom = _whole(top.rstrip()), _whole(bottom.lstrip())
        value = Fraction(int(top), int(bottom)) if top and bottom and int(bottom) else None
    return None if value is None else sign * value


def _without_units(text):
    """'18 apples per day' -> '18': at most three trailing words of ASCII letters."""
    for _ in range(3):
        rest = text.rstrip(string.ascii_letters)
        if rest == text or not rest or not rest[-1].isspace() or text[len(rest):].lower() in NOT_UNITS:
            break
        text = rest.rstrip()
    return text


def number(text, units=True):
    """The one number `text` is, as a Fraction, or None: '$1,000.', '**18**', '\\boxed{36/2}', '18 dollars'.

    Taken off: white space, $ € %, bold and italic marks, \\boxed{}, \\( \\), $ $, one full stop and, with
    `units`, up to three words that follow. Several numbers, a range and an expression are no number.
    """
    if len(text) > MAX_NUMBER:
        return None
    text, stop, before = text.replace("\u2212", "-").strip(), True, None
    while text != before:  # every round takes something off, or is the last
        before = text
        for left, right in PAIRS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
                text = text[len(left):-len(right)].strip()
        for mark in SIGNS:
            text = text.removeprefix(mark).removesuffix(mark).strip()
        if stop and text.endswith("."):
            text, stop = text[:-1].rstrip(), False
        if units and (shorter := _without_units(text)) != text:
            text, units = shorter, False
    return rational(text)


# 2. Extraction

OPEN, CLOSE, THOUGHT = "<answer>", "</answer>", "</think>"
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>")


def extract(text, form, truncated):
    """(answer as written, None), or ("", the reason why there is none)."""
    if form == "plain":
        line, newline, _ = text.partition("\n")
        for stop in STOPS:
            line = line.removesuffix(stop)
        if truncated and not newline:
            return "", "truncated"  # "1" may be the head of "12"
        return (line, None) if line.strip() else ("", "no_answer")
    text = text[text.rfind(THOUGHT) + len(THOUGHT):] if THOUGHT in text else text
    opens, closes = text.count(OPEN), text.count(CLOSE)
    start, end = text.find(OPEN) + len(OPEN), text.find(CLOSE)
    if opens == closes == 1 and start <= end:
        return (text[start:end], None) if text[start:end].strip() else ("", "no_answer")
    if opens and closes and opens + closes > 2:
        return "", "several"
    return "", "truncated" if truncated else "unclosed" if opens else "no_answer"


def lenient(tail, gold):
    """Would a generous reader find the gold answer in the end of a completion? Reported, never trained on.

    A number: the last \\boxed, else what follows the first ####, else the last number of the last line that
    has one. Anything else: the text of the last line or answer block.
    """
    value = number(gold)
    if value is None:
        lines = tail.replace(OPEN, "\n").replace(CLOSE, "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return bool(last) and last.casefold() == gold.strip().casefold()
    if "\\boxed{" in tail:
        return number(_until_closed(tail[tail.rfind("\\boxed{") + len("\\boxed{"):])) == value
    if "####" in tail:
        line = tail[tail.find("####") + 4:].split("\n")[0]
        return value in (number(line), _last_number(line))
    found = (_last_number(line) for line in reversed(tail.split("\n")))
    return next((one for one in found if one is not None), None) == value


def _until_closed(text):
    """The text before the bracket that closes an open one; "" if none does."""
    depths = itertools.accumulate(((char == "{") - (char == "}") for char in text), initial=1)
    return next((text[:at - 1] for at, depth in enumerate(depths) if depth == 0), "")


def _last_number(line):
    """The last number written in a line, or None."""
    pattern = f"(?:(?<![0-9])[-+])?[0-9.][0-9.,/{THIN}]*"
    tokens = re.findall(pattern, line.replace("\u2212", "-"))
    values = (rational(token.rstrip(".,/" + THIN)) for token in reversed(tokens) if len(token) <= MAX_NUMBER)
    return next((value for value in values if value is not None), None)


# 3. Checks. Each takes (text, gold, metadata) and returns a verdict's reason, or None: the dataset's scorer
# may see the text. The first line of its docstring tells the fitness table which hole it closes.

HASHED = "its items change with PYTHONHASHSEED"
EXECUTES = "its scorer would execute the answer (sympy's parse_expr)"
REFUSED = {
    **dict.fromkeys(
        ("simple_integration", "intermediate_integration", "polynomial_multiplication"), EXECUTES),
    **dict.fromkeys(("codeio", "isomorphic_strings", "knight_swap", "list_functions", "ransom_note",
                     "word_ladder"), HASHED),
    "number_sequence": "some of its items take a minute to make (squares of squares)",
    "composite": "it hides which dataset's scorer sees the answer; join datasets with + instead",
    "propositional_logic": "its scorer pays for the same '(P ∨ Q)' on most items",
}


def exact(text, gold, metadata):
    """The scorer would execute the answer, or pay for a near miss; it is not asked."""
    return "right" if text in metadata.get("valid_answers", ()) else "wrong"  # gold itself was paid before


def same(text, gold, metadata):
    """Nothing but the gold answer: the scorer would pay for a near miss or for text around it."""
    one, other = ("".join(each.casefold().split()) for each in (text, gold))
    return None if one == other or (number(gold) is not None and number(text) == number(gold)) else "wrong"


def figures(text, gold, metadata):
    """The gold answer's figures and format: the scorer would pay for a time that is minutes off."""
    one, other = ([int(run) for run in re.findall("[0-9]+", each)] for each in (text, gold))
    shapes = (re.sub("[0-9]+", "0", each) for each in (text, gold))
    return None if one == other and len(set(shapes)) == 1 else "wrong"


def close(text, gold, metadata):
    """Within 1% too: the scorer's tolerance is wider than its small probabilities."""
    return None if abs(number(text) - number(gold)) <= abs(number(gold)) / 100 else "wrong"


def words(text, gold, metadata):
    """No other words than the gold answer's: the scorer would skip them."""
    one, other = (set(re.findall(r"\w+", each.casefold())) for each in (text, gold))
    return None if one <= other | {"and", "is", "a", "an"} else "wrong"


def parts(text, gold, metadata):
    """As many comma-separated parts as the gold answer: the scorer would skip the others."""
    return None if text.count(",") == gold.count(",") else "wrong"


def numbers(text, gold, metadata):
    """As many comma-separated numbers as the gold answer: the scorer would skip what is none, or take nan."""
    values = [rational(part.strip(" ()").rstrip("°")) for part in text.split(",")]
    return parts(text, gold, metadata) if None not in values else "refused"


def pattern(allowed):
    """A check that the whole text, white space aside, has a form."""
    form = re.compile(allowed)

    def check(text, gold, metadata):
        return None if form.fullmatch("".join(text.split())) else "refused"
    check.__doc__ = f"Only `{allowed}`: the scorer would skip, hang on, or be fooled by other text."
    return check


def parsed(holds):
    """A check that holds(answer, gold) is true of both as JSON."""
    def check(text, gold, metadata):
        """JSON of the right shape: the scorer would take NaN for a number, or pay for a near miss."""
        try:  # number_sorting writes its lists with Python's quotes
            one, other = (json.loads(each.replace("'", '"')) for each in (text, gold or "null"))
            return None if holds(one, other) else "wrong"
        except (ValueError, TypeError, AttributeError, RecursionError):
            return "refused"
    return check


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _evaluate(node, used):
    """The exact value of a parsed expression of whole numbers and + - * /; `used` collects the numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, used)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    raise ValueError("not arithmetic")


def expression(text, gold, metadata):
    """Evaluated here, exactly, with every given number used once; the scorer would execute it."""
    used = []
    try:
        if not set(text) <= set("0123456789+-*/() "):
            return "refused"
        value = _evaluate(ast.parse(text, mode="eval").body, used)  # parsed, never run
    except ZeroDivisionError:
        return "wrong"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "refused"
    target = metadata.get("target", 24)
    return "right" if value == target and sorted(used) == sorted(metadata["numbers"]) else "wrong"


def _colors(coloring, _):
    return all(type(color) is int for color in coloring.values())


CHECKS = {
    **dict.fromkeys(
        ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "emoji_mystery"), exact),
    **dict.fromkeys(("calendar_arithmetic", "game_of_life_halting", "figlet_font", "letter_jumble",
                     "gsm_symbolic", "spell_backward", "manipulate_matrix", "sentence_reordering"), same),
    "countdown": expression, "puzzle24": expression, "time_intervals": figures, "coin_flip": close,
    "word_sorting": parts, "knights_knaves": words,
    "polynomial_equations": numbers, "advanced_geometry": numbers,
    "complex_arithmetic": pattern("[0-9.+ij()-]+"), "pool_matrix": pattern("[0-9.-]+"),
    "kakurasu": pattern("[01]+"), "survo": pattern("[0-9-]+"), "sokoban": pattern("[LRUD]+"),
    "quantum_lock": pattern("[ABC→]+"), "rush_hour": pattern("(?:[A-Z][+-][0-9])+"),
    "tower_of_hanoi": pattern("(?:Movedisk[0-9]+fromPeg[0-9]+toPeg[0-9]+)+"),
    "rubiks_cube": pattern("(?:[A-Z][a-z]?[0-9]?'?)+"),
    "fraction_simplification": pattern(r"\$?(?:\\d?frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+)\$?"),
    "game_of_life": parsed(operator.eq), "graph_color": parsed(_colors),
    "number_sorting": parsed(lambda one, other: list(map(float, one)) == list(map(float, other))),
}
HOSTILE = re.compile(  # NUL and surrogates; 40 digits; exponents of three digits; powers; nan, inf
    r"[\x00\ud800-\udfff]|\d[\d_]{39}|[\d.]e[+-]?[\d_]{3}|\*\*|\^\s*[\d(]|\b(?:nan|inf|infinity)\b",
    re.IGNORECASE)
MAX_DEPTH = 16  # of brackets


def check(text, gold, dataset, metadata):
    """The reason of a verdict on this answer of a Reasoning Gym dataset, or None: its scorer may see it."""
    if dataset in REFUSED:
        return "refused"
    if gold and text == gold:
        return "right"
    if len(text) > (4 * len(gold) + 64 if gold else 2000):
        return "too_long"
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    if HOSTILE.search(text) or max(depths, default=0) > MAX_DEPTH:
        return "refused"
    if number(gold, units=False) is not None and number(text) is None:
        return "not_a_number"
    return CHECKS[dataset](text, gold, metadata) if dataset in CHECKS else None
