"""
What counts as a right answer, and where the problems come from.

The reward of reinforcement learning is made here: `verify` compares what a model wrote with the gold answer
of the problem and gives 1 or 0. The rest of the file turns problems into prompts and divides them into
training, validation and test problems. What is easy to get wrong:

- The verifier is the teacher: the policy learns whatever it rewards, and also what it rewards by mistake.
- An answer is text to compare, never code to run. Nine of Reasoning Gym's own scorers execute the answer, and
  one rewards any text, so we never call them. An answer is compared with the gold answer: as an exact number
  where the gold answer is one, like 18 or -2.5, and as normalized text elsewhere. A dataset with several
  right answers for a question is refused, because only one of them is known.
- A completion that hit the token limit may be incomplete: "1" may be the beginning of "12". And a list of
  several numbers is not an answer, even if the right one is among them.
- Different seeds do not separate training questions from test questions. Reasoning Gym draws item i from
  Random(seed + i), so two seeds give mostly the same items. Here the sha256 of a question decides its split.
  (GSM8K has splits of its own.)
- For a reward of your own set rlvr.verify, not rewards.verify (README.md, Fork it): rlvr.py has imported the
  function by its name, and would still call the old one.
"""
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import io
import itertools
import json
import os
import random
import re
import urllib.request
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Problem:
    question: str
    answer: str              # the gold answer
    task: str = "gsm8k"      # one part of --task: "arithmetic", if that is "arithmetic+logic"
    dataset: str = "gsm8k"   # "gsm8k", or the name of a Reasoning Gym dataset: "chain_sum"
    split: str = "train"     # "train", "val" or "test"


# -- The verifier: is this completion right?

REASONS = (
    "right",         # the only reason that `verify` rewards
    "wrong",         # another number or text than the gold answer
    "no_answer",     # no answer tags (those in a thought do not count), empty tags, or an empty first line
    "unclosed",      # <answer> without </answer> after it
    "several",       # answer tags more than once: "<answer>5</answer> or <answer>36</answer>"
    "too_long",      # far longer than an answer to this problem can be
    "not_a_number",  # the gold answer is a number, and this is none: "3 * 12", "17 18"
    "truncated",     # the token limit came before the end of the answer
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    reward: float  # the policy is trained on this. `verify` gives 1.0 for a right answer in the requested
                   # format, else 0.0
    reason: str    # one of REASONS
    lenient: bool  # whether a generous reader would find the right answer: this is only reported. Where 36 is
                   # right, it is True for the plain completion "12\n36", whose reason is "wrong"


def verify(completion, problem, answer_format="tagged", truncated=False):
    """Judge a completion: the text that a model wrote after its prompt. Returns a Verdict.

    answer_format  "tagged": the answer stands between <answer> and </answer>. Each of these tags must occur
                   once. A thought before it (<think> ... </think>) is left out first, with the tags in it.
                   "plain": the first line is the answer.
    truncated      the completion hit the token limit. Then a first line without an end does not count. An
                   answer between tags does.
    In the plain format, the text of a stop token (<|im_end|>) at the end of the line is left out.
    Raises ValueError for an unknown answer_format, and never for a completion, whatever it holds.

    >>> problem = Problem("A box holds 12 pencils. How many pencils do 3 boxes hold?", "36")
    >>> verify("3 * 12 = 36. <answer>$36.00</answer>", problem)        # the same number
    Verdict(reward=1.0, reason='right', lenient=True)
    >>> verify("<answer>36 pencils</answer>", problem)                 # between tags, a unit may follow
    Verdict(reward=1.0, reason='right', lenient=True)
    >>> verify("<answer>38</answer>", problem)
    Verdict(reward=0.0, reason='wrong', lenient=False)
    >>> verify("<answer>3 * 12</answer>", problem)                     # no number, but a way to get it
    Verdict(reward=0.0, reason='not_a_number', lenient=False)
    >>> verify("The answer is 36.", problem)                           # right, but not in the right format
    Verdict(reward=0.0, reason='no_answer', lenient=True)
    >>> verify("36\\nNext question:", problem, "plain")
    Verdict(reward=1.0, reason='right', lenient=True)
    >>> verify("36", problem, "plain", truncated=True)                 # may be the beginning of 365
    Verdict(reward=0.0, reason='truncated', lenient=True)
    """
    if answer_format not in ("tagged", "plain"):
        raise ValueError(f"unknown answer format {answer_format!r}: choose tagged or plain")

    # Find the answer in the completion, then compare it with the gold answer.
    answer, reason = extract(completion, answer_format, truncated)
    if reason is None:
        words_may_follow = answer_format == "tagged"  # in a plain line only the number may stand
        reason = grade(answer, problem, words_may_follow)

    # Only "right" is rewarded.
    right = reason == "right"

    # For the report, look for the right answer in any format, near the end of the completion.
    end = completion[-2000:]  # characters
    right_in_any_format = right or is_found_in(end, problem.answer)

    return Verdict(reward=float(right), reason=reason, lenient=right_in_any_format)


OPEN_TAG, CLOSE_TAG = "<answer>", "</answer>"
ANSWER_TAGS = re.compile(f"{OPEN_TAG}|{CLOSE_TAG}")
THOUGHT_TAGS = (  # what models that think before they answer put around the thought
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"))
STOP_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>")


def extract(completion, answer_format, truncated):
    """Find the answer. Returns (answer as it was written, None), or ("", the reason why there is none)."""
    if answer_format == "plain":
        answer, reason = extract_first_line(completion, truncated)
    else:
        answer, reason = extract_tagged(completion, truncated)

    if reason is None and not answer.strip():
        reason = "no_answer"
    if reason is not None:
        answer = ""
    return answer, reason


def extract_first_line(completion, truncated):
    """The plain format: the answer is the first line, without the text of a stop token."""
    line, line_end, _ = completion.partition("\n")
    if truncated and not line_end:
        return "", "truncated"

    line = line.rstrip()
    for stop in STOP_TEXTS:
        line = line.removesuffix(stop)
    return line, None


def extract_tagged(completion, truncated):
    """The tagged format: the answer stands between <answer> and </answer>, after the thought."""
    # Leave the thought out: all that stands before the last tag that closes one. The tag that opens it may be
    # missing, because some chat templates write it at the end of the prompt.
    text = completion
    for _, closing in THOUGHT_TAGS:
        text = text.rpartition(closing)[2]

    # Require <answer> and </answer> once each, in this order.
    tags = ANSWER_TAGS.findall(text)
    if len(tags) > 2 and OPEN_TAG in tags and CLOSE_TAG in tags:
        return "", "several"
    if tags != [OPEN_TAG, CLOSE_TAG]:
        if truncated:
            return "", "truncated"
        if OPEN_TAG in tags:
            return "", "unclosed"
        return "", "no_answer"

    # Refuse an answer inside a thought that was never closed: there the model may try several answers.
    before, _, rest = text.partition(OPEN_TAG)
    for opening, _ in THOUGHT_TAGS:
        if opening in before:
            if truncated:
                return "", "truncated"
            return "", "no_answer"

    return rest.partition(CLOSE_TAG)[0], None


# A gold answer of this form is compared as a number, any other as text:
#
#     gold   compared as   right               wrong
#     18     number        18, 18.0, $18       19
#     007    text          007                 7: the problem may ask for exactly these digits
#     1/2    text          1/2                 2/4: it may ask for lowest terms
#
# In GSM8K every gold answer is a number.
PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
# The answers of these datasets are grids. A grid with the same numbers in other rows is another answer.
GRIDS = ("arc_agi", "binary_matrix", "futoshiki", "manipulate_matrix", "mini_sudoku", "modulo_grid",
         "pool_matrix", "rearc", "rotate_matrix", "sudoku", "survo")


def grade(answer, problem, words_may_follow):
    """Compare an extracted answer with the gold answer. Returns one of REASONS.

    words_may_follow: "36 pencils" is read as 36.
    """
    gold, answer = problem.answer.strip(), answer.strip()
    if problem.dataset == "base_conversion":  # "12 ab" may be a hexadecimal number
        words_may_follow = False

    if problem.dataset == "gsm8k" or PLAIN_NUMBER.fullmatch(gold):
        return grade_number(answer, gold, problem.dataset, words_may_follow)
    return grade_text(answer, gold, problem.dataset)


def grade_number(answer, gold, dataset, words_may_follow):
    """Compare two numbers exactly: 36, 36.00 and $36 are the same."""
    if len(answer) > MAX_NUMBER:
        return "too_long"

    # Reject 8/4 and 1e2, except in GSM8K. Elsewhere "8/4" may be a copy of the question "What is 8/4?", and
    # 1e2 may be meant as a hexadecimal number.
    if dataset != "gsm8k" and re.search(r"/|[0-9][eE]", answer):
        return "not_a_number"

    value = number(answer, words_may_follow)
    if value is None:
        return "not_a_number"
    if value != number(gold):
        return "wrong"
    return "right"


def grade_text(answer, gold, dataset):
    """Compare two texts in their normalized form."""
    if len(answer) > 4 * len(gold) + 64:
        return "too_long"

    # Compare line by line where the gold answer has several lines, or is a grid, which may have a single row.
    # In any other text a line break is as good as a space.
    if "\n" in gold or dataset in GRIDS:
        same = normalize_lines(answer) == normalize_lines(gold)
    else:
        same = normalize_sentence(answer, dataset) == normalize_sentence(gold, dataset)

    if not same:
        return "wrong"
    return "right"


def normalize_sentence(text, dataset):
    """A text that is no grid in the form in which it is compared: "**Brother.**" -> "brother"."""
    # Remove what stands around it, and a full stop after a word. Gold answers have these, too.
    text = without_decorations(text, MARKUP)
    text = re.sub(r"(?<=\w)\.\Z", "", text)
    text = without_decorations(text, MARKUP)
    text = re.sub(r"\\d?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = normalize(text)

    # The question of knights_knaves shows the format "Al is a egoist, and Zoey is a egoist"; its gold answers
    # have "an egoist". And the comma says nothing.
    if dataset == "knights_knaves":
        text = re.sub(r"\ban\b", "a", text).replace(",and ", " and ")
    return text


def normalize(text):
    """A text in the form in which texts are compared, for example "[ '1', 2.50 ]" -> "[1,2.5]".

    Everything is in lower case. Line breaks and double spaces become one space. Quotes, spaces beside a mark,
    and zeros at the end of decimals are removed.
    """
    text = text.casefold().replace("\u2212", "-")  # \u2212 is the mathematical minus sign
    text = text.replace("'", "").replace('"', "")
    text = " ".join(text.split())
    text = re.sub(r" ?([^\w ]) ?", r"\1", text)
    return re.sub(r"[0-9]+\.[0-9]+", without_zeros, text)


def without_zeros(decimal):
    """2.50 -> 2.5 and 3.0 -> 3. `decimal` is a match of a regular expression."""
    return decimal[0].rstrip("0").rstrip(".")


def normalize_lines(text):
    """The lines of a text, each normalized, without the empty ones."""
    lines = [normalize(line) for line in text.splitlines()]
    return [line for line in lines if line]


# What a number looks like. \u2009 and \u202f are thin spaces, which group thousands as the comma does.
MAX_NUMBER = 200  # characters; int() needs time that grows with the square of the length
THIN_SPACES = "\u2009\u202f"


def thousands(mark):
    """The pattern of digits in groups of three with `mark` between them: 1,000,000."""
    return rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+"


DIGITS = "(?:" + "|".join(thousands(mark) for mark in "," + THIN_SPACES) + "|[0-9]+)"  # 18 or 1,000
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}})?"             # 18.50, .5 or 1e3
QUOTIENT = rf"{DIGITS}\s*/\s*(?=.*[1-9]){DIGITS}"  # 36/2; not 1/0: a digit other than 0 must follow
NUMBER = re.compile(rf"(?P<sign>[-+]?)(?:\\?[$€£¥₹%]\s*)?(?P<value>{DECIMAL}|{QUOTIENT})")  # -$5

# What may stand around an answer without changing it: (before it, after it). First the markup of Markdown and
# LaTeX, which may stand around any answer, then signs beside a number.
MARKUP = [("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"), ("$", "$"),
          ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("\\text{", "}")]
SIGNS = []
for sign in ("\\$", "$", "€", "£", "¥", "₹", "\\%", "%"):
    SIGNS += [(sign, ""), ("", sign)]

# Up to three words may follow a number ("18 apples per day"), but none of those that often change it or take
# it back ("18 thousand", "18 or nineteen", "18 is wrong").
NOT_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundreds? thousands? "
    "millions? billions? trillions? quadrillions? tens dozens? half halves thirds? quarter fourths? fifths? "
    "sixths? sevenths? eighths? ninths? tenths? hundredths? thousandths? k mn mil bn grand gross score "
    "lakhs? crores? and or to not is are was maybe wrong incorrect plus minus times doubled? twice tripled? "
    "divided over point squared cubed factorial sqrt e x pi")
MAGNITUDES = "MBT"  # "18 M" may be millions; "18 m" are metres
UNITS = re.compile(
    rf"(\s+(?!(?i:{'|'.join(NOT_UNITS.split())})\b|[{MAGNITUDES}]\b)"  # none of these words,
    r"[A-Za-z]+(/[a-z]+)?){1,3}\Z")                                     # but apples, or km/h
TEXT_IN_LATEX = re.compile(r"\\text\{([^{}]*)\}")


def number(text, units=True):
    """Read a text that is one number. Returns an exact Fraction, or None if the text is not one number.

    "$1,000.50" -> 2001/2, "**18** apples." -> 18, "36/2" -> 18.
    "eighteen", "18, 19", "10-20", "9 + 9" -> None. A text of more than 200 characters gives None too.
    units: whether up to three words may follow the number.
    """
    if len(text) > MAX_NUMBER:
        return None
    text = text.replace("\u2212", "-")
    text = TEXT_IN_LATEX.sub(r" \1 ", text).strip()  # "18\\text{ apples}" -> "18  apples"

    # Take off decorations, one full stop and the units, until nothing is left to take off. They come in any
    # order: "**18 apples.**", "$18$ apples."
    may_have_stop, may_have_units = True, units
    before = None
    while text != before:
        before = text
        text = without_decorations(text, MARKUP + SIGNS)

        if may_have_stop and text.endswith("."):
            text = text[:-1].rstrip()
            may_have_stop = False

        if may_have_units:
            text, n_taken_off = UNITS.subn("", text)
            may_have_units = n_taken_off == 0

    # Read what is left. Fraction reads signs, decimals, exponents and quotients. It does not read 1,000, so
    # remove the commas.
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    return Fraction(match["sign"] + re.sub(r"[\s,]", "", match["value"]))


def without_decorations(text, decorations):
    """A text without one pair of each kind of decoration around it: "$18" -> "18", "**18**" -> "18"."""
    for left, right in decorations:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left):len(text) - len(right)].strip()
    return text


# Where a number may be in a text: "from 3-4 it is -1,000." has 3, 4 and -1,000. with its full stop. The minus
# in 3-4 is not the sign of the 4, because a digit stands before it.
NUMBER_IN_TEXT = re.compile(rf"(?:(?<![0-9])[-+]\\?[$€£¥₹]?)?[0-9.][0-9.,/{THIN_SPACES}]*")


def is_found_in(ending, gold):
    """Whether a generous reader would find the gold answer in the end of a completion.

    This is reported and not trained on. It shows what a policy knows but does not write in the right format.
    """
    value = number(gold)

    # A gold answer that is a text must be the last line. Answer tags end a line too.
    if value is None:
        lines = ending.replace(OPEN_TAG, "\n").replace(CLOSE_TAG, "\n").strip()
        last_line = lines.rpartition("\n")[2].strip()
        return last_line != "" and normalize_sentence(last_line, "") == normalize_sentence(gold.strip(), "")

    # If there is a \boxed{...}, the last one must hold the number.
    ending = TEXT_IN_LATEX.sub(r" \1 ", ending)
    if "\\boxed{" in ending:
        inside, closing, _ = ending.rpartition("\\boxed{")[2].partition("}")
        return closing == "}" and number(inside) == value

    # If a number stands behind the first ####, as in the solutions of GSM8K, it must be the one. (A model may
    # go on with a question of its own after it. And "#### Step 1" is a heading.)
    after_mark = ending.partition("####")[2].split("\n")[0]
    if number(after_mark) is not None:
        return number(after_mark) == value

    # The last number in what is read must be the gold answer.
    return last_number(ending) == value


def last_number(text):
    """The last number in a text, or None."""
    candidates = NUMBER_IN_TEXT.findall(text.replace("\u2212", "-"))
    for candidate in reversed(candidates):
        value = number(candidate.rstrip(".,/" + THIN_SPACES), units=False)
        if value is not None:
            return value
    return None


def check_answer_format(problems, answer_format, verify=verify):
    """Raise ValueError if the verifier would not accept the gold answers of `problems` in this format.

    verify: the verifier of the run, which an extension may have replaced. A policy would be trained on such
    problems without ever getting a reward. For example the answer to a sudoku has several lines, but in the
    plain format only the first line is read.
    """
    for problem in problems[:10_000]:  # the answers of a dataset look alike, so the first ones tell
        completion = problem.answer
        if answer_format == "tagged":
            completion = OPEN_TAG + problem.answer + CLOSE_TAG

        verdict = verify(completion, problem, answer_format, False)
        if verdict.reason == "right":
            continue

        advice = "choose another --task"
        if answer_format == "plain":
            advice = "use --answer_format tagged (the policy needs a chat template), or choose another --task"
        gold = problem.answer.strip()
        if len(gold) > 60:
            gold = gold[:60] + "..."
        raise ValueError(f"{problem.dataset} cannot be learned with --answer_format {answer_format}, because "
                         f"even the right answer {gold!r} would be judged {verdict.reason!r}: {advice}")


# -- Prompts: what a model reads

INSTRUCTION = ("\n\nFirst think in one or two short sentences. Then write the final answer, and nothing "
               "else, between <answer> and </answer>.")
# A solved problem as the first turns of the chat. Without it a model of half a billion parameters rarely
# writes the tags.
EXAMPLE = ("A shelf has 3 boxes with 12 pencils each. If 10 pencils are taken out, how many are left?",
           "The boxes hold 3 * 12 = 36 pencils. Without 10 of them, 36 - 10 = 26 are left. "
           "<answer>26</answer>")


def render_prompt(problem, prompt_format="plain", tokenizer=None, instruct=True):
    """The text that a model reads for a problem.

    prompt_format  "plain": the question, and "\\nAnswer:" after it unless it ends in "=".
                   "chat": a chat in the form of the tokenizer's chat template.
    instruct       for chat. True: the chat holds a solved example and the question, and asks for answer tags.
                   False, for experts: it holds the question alone.
    Raises ValueError if the chat template cannot render the chat.
    """
    question = problem.question.strip()
    if prompt_format == "plain":
        if question.endswith("="):
            return question
        return question + "\nAnswer:"

    if instruct:
        turns = [dict(role="user", content=EXAMPLE[0] + INSTRUCTION),
                 dict(role="assistant", content=EXAMPLE[1]),
                 dict(role="user", content=question + INSTRUCTION)]
    else:
        turns = [dict(role="user", content=question)]
    return render_chat(turns, tokenizer)


def render_chat(turns, tokenizer):
    """The text of a chat up to where the model's turn begins. A date in it is always the same one."""
    try:
        template = with_fixed_date(tokenizer.get_chat_template())
        # Switch thinking off: a policy hits the token limit long before such a thought ends. Templates
        # without this setting ignore it.
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # mostly jinja2.TemplateError, but a template may raise anything
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template of {name} cannot render the problem ({reason}): choose another "
                         "model, or --answer_format plain if it is the policy") from error

    # The templates of some models begin a thought in any case. Close it, so that the answer comes next.
    for opening, closing in THOUGHT_TAGS:
        if text.rstrip().endswith(opening):
            text = f"{text.rstrip()}\n\n{closing}\n\n"
    return text


FIXED_DATE = datetime.date(2024, 7, 26)  # what Llama 3's own template writes where it cannot know the date


def with_fixed_date(template):
    """A chat template that writes FIXED_DATE where it would write today's date.

    Some templates call strftime_now("%d %B %Y"). With today's date in a prompt, experts' states would be read
    again every day, and a resumed run would differ from one that was not stopped. We cannot give transformers
    another function of this name. So we write one into the template, a macro in the template's own
    language that replaces each %-code by a part of FIXED_DATE:

        {% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%B', 'July') ... }}{% ...
    """
    if "strftime_now" not in template:
        return template

    date = "format"
    for letter in "aAbBdHIjmMpSyY":
        code = "%" + letter
        date += f" | replace('{code}', '{FIXED_DATE.strftime(code)}')"
    return "{% macro strftime_now(format) %}{{ " + date + " }}{% endmacro %}\n" + template


# -- Problems and splits

SPLITS = ("train", "val", "test")
MAX_PROBLEMS = 1_000_000  # of a split; they are all made before the training begins
TINY_LEVEL = {  # level "tiny": what the experts in tiny/ were trained on
    "arithmetic": {"chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}},
    "logic": {"family_relationships": {"min_family_size": 4, "max_family_size": 5}},
    "algorithmic": {"count_primes": {"min_n": 1, "max_n": 100}},
}
# The datasets of a family at all other levels. In each of these, a policy that always gives the same
# answer is right for less than a third of the problems.
FAMILIES = {
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "lcm", "leg_counting"),
    "logic": ("family_relationships", "knights_knaves", "color_cube_rotation", "aiw"),
    "algorithmic": ("count_primes", "number_sorting", "spell_backward", "base_conversion", "caesar_cipher"),
}


def get_problems(task, split, n, data_path=None, level=None, least=None, progress=True):
    """A list of n problems.

    task       "gsm8k", a family ("arithmetic"), a Reasoning Gym dataset ("chain_sum"), or several of these,
               joined with "+", which then take turns
    split      "train", "val" or "test". No question is in two splits (though 2 + 3 may be in one of them,
               and 3 + 2 in another). val and test hold each question once. train repeats its questions in a
               new random order when there are no more.
    data_path  a file or folder with problems in place of the official GSM8K, see `gsm8k`
    level      "easy", "default" or "hard", for all tasks but gsm8k; "tiny" for the families and the datasets
               in TINY_LEVEL; for a single dataset also "parameter=value,..."
    least      raise ValueError if there are fewer problems than this (default: n)
    progress   show a bar if it takes more than a second
    The same arguments always give the same problems. A smaller n gives the beginning of the same list.

    Raises ValueError also for a task, split, level or file that cannot be used, and for an option without
    effect. It checks all parts of the task before it makes a problem, and needs no model.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose {', '.join(SPLITS)}")
    if n > MAX_PROBLEMS:
        options = {"train": "--steps or --batch, or --stage0_problems", "val": "--val",
                   "test": "--test, --test_skip, or --n of eval.py"}
        raise ValueError(f"{n:,} {split} problems are too many, {MAX_PROBLEMS:,} are the most: "
                         f"lower {options[split]}")

    # Open every part of the task. This finds the mistakes in all options, but draws no problem yet.
    names = [known_task(name.strip()) for name in task.split("+")]
    check_use_of_options(names, data_path, level)
    parts = [open_part(name, split, data_path, level or "default") for name in names]

    # Draw n problems, or all that there are, from the parts in turn.
    hide_bar = True
    if progress:
        hide_bar = None  # tqdm then shows the bar on a terminal, and not in a file
    problems = []
    with tqdm(total=n, desc=f"{split} problems", delay=1, leave=False, disable=hide_bar) as bar:
        for problem in itertools.islice(take_turns(parts), n):
            problems.append(problem)
            bar.update()

    if least is None:
        least = n
    if len(problems) < least:
        advice = "choose another --level, or a larger dataset if it is your own"
        if "gsm8k" in names:
            advice = "pass a larger file as --data"
        raise ValueError(f"{task} has only {len(problems)} distinct {split} questions, but {least} are "
                         f"needed: {advice}, or ask for fewer")
    return problems


def check_use_of_options(names, data_path, level):
    """Raise ValueError for an option that would be ignored. names: the parts of the task."""
    if set(names) == {"gsm8k"} and level not in (None, "", "default"):
        raise ValueError(f"--level {level} has no effect on gsm8k, which has no levels: leave --level out")
    if data_path and "gsm8k" not in names:
        raise ValueError(f"--data {data_path} has no effect on --task {'+'.join(names)}, only on gsm8k: "
                         "leave --data out, or use --task gsm8k")


def open_part(name, split, data_path, level):
    """An iterator over the problems of one part of a task. It has no end if the split is train.

    Raises ValueError for an unknown level, a bad file, or a dataset that cannot be built.
    """
    if name in FAMILIES and level not in ("tiny", "default", *CURRICULUM_STEPS):
        raise ValueError(f"unknown level {level!r} of {name}: choose easy, default, hard or tiny")

    # Open the datasets of the part.
    problems_of = {}  # {dataset: iterator over its problems}
    if name == "gsm8k":
        problems_of["gsm8k"] = gsm8k_problems(split, data_path)
    else:
        for dataset in datasets_of(name, level):
            items = draw_items(open_dataset(dataset, level), dataset, level)
            problems_of[dataset] = distinct_problems(items, name, dataset, split)

    # Training begins again, in a new order, when a dataset has no more questions.
    if split == "train":
        for dataset, problems in problems_of.items():
            problems_of[dataset] = repeat(problems, dataset)
    return take_turns(problems_of.values())


def datasets_of(name, level):
    """The Reasoning Gym datasets of one part of a task: those of a family, or the one that it names."""
    if name in TINY_LEVEL and level == "tiny":
        return list(TINY_LEVEL[name])
    if name in FAMILIES:
        return FAMILIES[name]
    return [name]


def gsm8k_problems(split, data_path):
    """An iterator over the problems of one split of GSM8K. Raises ValueError at once for a bad file."""
    problems = []
    for question, answer in gsm8k(data_path)[split]:
        problems.append(Problem(question, answer, split=split))
    return iter(problems)


def take_turns(iterators):
    """Yield a problem of each iterator in turn, until one of them ends: the shortest one limits the length.

    A question of val or test that two iterators have is given only once.
    """
    iterators = list(iterators)
    seen = set()
    while True:
        for problems in iterators:
            problem = next_new(problems, seen)
            if problem is None:
                return
            seen.add(problem.question)
            yield problem


def next_new(problems, seen):
    """The next problem of an iterator. For val and test its question is not in `seen`. None at the end."""
    for problem in problems:
        if problem.split == "train" or problem.question not in seen:
            return problem
    return None


def distinct_problems(items, task, dataset, split):
    """Yield the problems of one split of a dataset, each once, in the order in which they are drawn.

    items: an iterator over (question, gold answer), in which questions may come again.
    """
    seen = set()
    last_new_draw = -1
    for draw, (question, answer) in enumerate(items):
        if question not in seen and answer:  # nobody can give an empty answer
            seen.add(question)
            last_new_draw = draw
            if split_of(question) == split:
                yield Problem(question, answer, task, dataset, split)

        # Stop after many draws without a new question. Questions of all splits count, so the end is the same
        # draw whichever split is asked for.
        if draw - last_new_draw >= max(200, 3 * len(seen)):
            return


def split_of(question):
    """The split of a question that was drawn: half of all are train, a quarter is val, a quarter is test.

    Do not change this: the models in tiny/ were trained on this train split.
    """
    digest = hashlib.sha256(question.encode()).hexdigest()
    return ("train", "train", "val", "test")[int(digest, 16) % 4]


def repeat(problems, name):
    """Yield the problems in order, and then, without end, all of them again in a new random order."""
    drawn = []
    for problem in problems:
        drawn.append(problem)
        yield problem
    if not drawn:
        return

    for epoch in itertools.count(1):
        order = list(drawn)
        random.Random(f"{name} {epoch}").shuffle(order)  # a text as seed: the same order on every machine
        yield from order


def next_in_dataset(problems):
    """For each problem the index of the next problem of its dataset; for the last one, that of the first.

    For example the datasets a, b, a, a give [2, 1, 3, 0].
    """
    indices_of = {}
    for i, problem in enumerate(problems):
        indices_of.setdefault(problem.dataset, []).append(i)

    partner = [0] * len(problems)
    for indices in indices_of.values():
        for here, following in zip(indices, indices[1:] + indices[:1]):
            partner[here] = following
    return partner


# -- Plumbing. Nothing below is about the method; skip it at first reading.

# Reasoning Gym: which datasets can be used, and what a level means. A dataset of your own is added at
# `registry`.

# A level is a step of a dataset's own curriculum. "default" is its default parameters.
CURRICULUM_STEPS = {"easy": 0, "hard": 2}
NO_STEP_2 = ("caesar_cipher", "survo")  # "hard" is step 1 of these
SIZES = {"acre": 5000, "gsm_symbolic": 100_000}  # these draw all of their items when they are built
UNFIT = {  # why: which datasets. results/fitness.md says what was measured
    "several answers are right, and only one of them is known":
        "countdown cryptarithm group_anagrams intermediate_integration jugs kakurasu n_queens "
        "palindrome_generation palindrome_partitioning polynomial_equations polynomial_multiplication "
        "prime_factorization puzzle24 quantum_lock shortest_path simple_integration sokoban tower_of_hanoi",
    "its items have no gold answer, and its own scorer raises, hangs or rewards nonsense":
        "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its items change with PYTHONHASHSEED: no two runs would see the same questions":
        "codeio isomorphic_strings knight_swap list_functions ransom_note word_ladder",
    "its gold answers are not rounded as its questions ask": "coin_flip number_format power_function",
    "one of its items can take a minute to make": "number_sequence",
    "it is a mix of other datasets, which --task can make with +": "composite",
}
REFUSED = {}  # {dataset: why}
for why, unfit_datasets in UNFIT.items():
    REFUSED |= dict.fromkeys(unfit_datasets.split(), why)


def registry():
    """{name: (dataset class, configuration class)} of all datasets of Reasoning Gym.

    A dataset of your own goes into a Python file, and `--extension FILE --preset small --task doubles` then
    learns it:

        import dataclasses, reasoning_gym

        @dataclasses.dataclass
        class Settings:
            seed: int = 0
            size: int = 500

        class Doubles(reasoning_gym.dataset.ProceduralDataset):
            def __init__(self, settings):
                super().__init__(settings, settings.seed, settings.size)
            def __getitem__(self, i):  # the same item for the same i, in every run
                return dict(question=f"What is twice {i}?", answer=str(2 * i))

        reasoning_gym.factory.register_dataset("doubles", Doubles, Settings)

    The program asks for a size of 10**9, as this dataset makes its items on demand. A dataset that has a list
    of items sets `self.size` to their number after super().__init__. (Preset tiny cannot be used, because its
    level "tiny" exists only for its three datasets.)
    """
    import reasoning_gym  # here and not above, because it takes 1.6 s, and GSM8K does not need it
    return reasoning_gym.factory.DATASETS


def known_task(name):
    """Return the name if it is a known task, else raise ValueError with suggestions."""
    if name in REFUSED:
        raise ValueError(f"the dataset {name} is refused because {REFUSED[name]}: choose another --task")

    if name != "gsm8k" and name not in FAMILIES and name not in registry():
        names = ["gsm8k", *FAMILIES, *sorted(registry().keys() - REFUSED.keys())]
        suggestions = difflib.get_close_matches(name.lower(), names, cutoff=0.5) or names[:4]
        raise ValueError(f"unknown task {name!r}: choose {', '.join(suggestions)} or another Reasoning Gym "
                         "dataset, or add yours with --extension FILE")
    return name


def open_dataset(dataset, level):
    """A Reasoning Gym dataset at a level. Raises ValueError if it cannot be built."""
    dataset_class, config_class = registry()[dataset]
    parameters = level_parameters(dataset, level)
    parameters |= dict(seed=1, size=SIZES.get(dataset, 10**9))
    try:
        return dataset_class(config_class(**parameters))
    except Exception as error:
        raise cannot_build(dataset, level, error) from error


def draw_items(items, dataset, level):
    """Yield (question, gold answer) of an open dataset. Raises ValueError if an item cannot be made."""
    try:
        for i in range(items.size):
            with contextlib.redirect_stdout(io.StringIO()):  # the dataset "bf" prints while it makes an item
                item = items[i]
            yield item["question"], str(item["answer"])
    except Exception as error:
        raise cannot_build(dataset, level, error) from error


def cannot_build(dataset, level, error):
    return ValueError(f"{dataset} cannot be built at level {level} ({error!r}): choose another --level, or "
                      "correct the dataset if it is your own")


def level_parameters(dataset, level):
    """{parameter: value} that a level sets in a dataset. Raises ValueError for an unknown level."""
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if level == "default":
        return {}

    if level == "tiny":
        for family in TINY_LEVEL.values():
            if dataset in family:
                return dict(family[dataset])
        raise ValueError(f"level tiny exists only for {', '.join(TINY_LEVEL)}, not for {dataset}: "
                         "choose --level easy, or --preset small")

    if level in CURRICULUM_STEPS:
        if not has_curriculum(dataset):
            if level == "hard":
                raise ValueError(f"{dataset} has no levels: leave out --level hard")
            return {}
        step = CURRICULUM_STEPS[level]
        if dataset in NO_STEP_2:
            step = min(step, 1)
        curriculum = create_curriculum(dataset)
        curriculum.set_global_level(step)
        return dict(vars(curriculum.generate_configuration()))

    return written_parameters(dataset, level)


def written_parameters(dataset, level):
    """{parameter: value} of a level that is written as "min_terms=2,max_terms=3"."""
    # List the parameters that can be written so, with their types.
    types = {}
    for field in dataclasses.fields(registry()[dataset][1]):
        if field.type in (bool, int, float, str) and field.name not in ("seed", "size"):
            types[field.name] = field.type

    values = {}
    for part in level.split(","):
        name, _, value = part.replace(" ", "").partition("=")
        try:
            values[name] = read_value(value, types[name])
        except (KeyError, ValueError):
            choices = ", ".join(f"{name} ({type_.__name__})" for name, type_ in types.items()) or "none"
            raise ValueError(f"unknown level {part!r} of {dataset}: choose easy, default, hard or "
                             f"parameter=value,... of {choices}") from None
    return values


def read_value(text, type_):
    """A text as a value of a type. Raises KeyError or ValueError if it is none."""
    if type_ is bool:
        return {"true": True, "false": False}[text.lower()]
    return type_(text)


# GSM8K: its files, and those of one's own

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_FILES = {  # name: (bytes, sha256) of the official files
    "train.jsonl": (4_166_206, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "test.jsonl": (749_738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
}
GSM8K_ADVICE = "pass --data FOLDER with train.jsonl and test.jsonl of github.com/openai/grade-school-math"


def gsm8k(data_path=None):
    """{split: [(question, gold answer)]}. Raises ValueError for a file that is missing or has wrong lines.

    test is test.jsonl. val is val.jsonl, if there is one; else the last 256 problems of train.jsonl, or its
    last quarter if that is less. train is what is left of train.jsonl.
    data_path: a folder with these files, or one file, whose problems are divided by `split_of`. If it is
    train.jsonl or test.jsonl and the other file is next to it, both are used. Without a data_path the
    official files are used, which are downloaded once.
    """
    # Find the two files, or divide the problems of a single file by their questions.
    if data_path:
        path = find_data(data_path)
        if not path.is_dir():
            return divide_by_question(read_gsm8k_file(path))
        train_file, test_file = path / "train.jsonl", path / "test.jsonl"
    else:
        train_file, test_file = official_file("train.jsonl"), official_file("test.jsonl")

    # Leave out problems that also stand in a file that is tested later. (The official files have none.)
    test = read_gsm8k_file(test_file)
    train = without(read_gsm8k_file(train_file), test)
    val_file = train_file.with_name("val.jsonl")
    if data_path and val_file.is_file():
        val = without(read_gsm8k_file(val_file), test)
        train = without(train, val)
        return {"train": list(train.items()), "val": list(val.items()), "test": list(test.items())}

    n_train = len(train) - min(256, len(train) // 4)
    rows = list(train.items())
    return {"train": rows[:n_train], "val": rows[n_train:], "test": list(test.items())}


def without(rows, others):
    """{question: gold answer} without the questions that are also in `others`, see `same_question`."""
    known = {same_question(question) for question in others}
    return {question: answer for question, answer in rows.items() if same_question(question) not in known}


def same_question(question):
    """Equal for two questions that differ only in spaces, line breaks and capital letters."""
    return " ".join(question.split()).casefold()


def data_fingerprint(data_path):
    """sha256 (hex) of the problems that --data names; "" where nothing is named, or nothing is there."""
    if not data_path or not expand_home(data_path, "--data").exists():
        return ""
    path = find_data(data_path)
    files = [path]
    if path.is_dir():
        files = [path / name for name in ("train.jsonl", "val.jsonl", "test.jsonl")]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def find_data(data_path):
    """The path of the file or folder that --data names. Raises ValueError if it is not there."""
    path = expand_home(data_path, "--data")
    if not os.path.exists(path):
        raise ValueError(f"--data {data_path} is not there: check the path, or {GSM8K_ADVICE}")

    both_files_are_there = all((path.parent / name).is_file() for name in GSM8K_FILES)
    if path.name in GSM8K_FILES and both_files_are_there:
        return path.parent
    return path


def divide_by_question(rows):
    """{question: gold answer} -> {split: [(question, gold answer)]}"""
    splits = {split: [] for split in SPLITS}
    for question, answer in rows.items():
        splits[split_of(question)].append((question, answer))
    return splits


def read_gsm8k_file(path):
    """{question: gold answer} of a file with a JSON object in each line. A ValueError names a wrong line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark at the beginning of some files
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: {GSM8K_ADVICE}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}): {GSM8K_ADVICE}") from error

    rows = {}
    first_of = {}  # {the question as `same_question` has it: the question as it is}
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            question, answer = read_gsm8k_line(line)
        except Exception as error:  # no JSON, JSON of another shape, or an answer without a number
            raise ValueError(f'{path}, line {i}: each line must be one JSON object with a "question", and an '
                             '"answer" that is a text which ends in #### and one number, such as "#### 18"'
                             ) from error

        # The same line twice is one problem. But one question cannot have two answers.
        question = first_of.setdefault(same_question(question), question)
        if number(rows.setdefault(question, answer)) != number(answer):
            raise ValueError(f"{path}, line {i}: a line above has the same question with another answer: "
                             "leave one of them out")
    return rows


def read_gsm8k_line(line):
    """The line {"question": "How many?", "answer": "600 + 1,200 #### 1,800"} gives ("How many?", "1800")."""
    row = json.loads(line)
    question = row["question"].strip()
    question.encode()  # half of a surrogate pair is no text: a UnicodeEncodeError, which is a ValueError
    _, answer = row["answer"].rsplit("####", 1)

    # Keep the number alone: "18 apples" is 18. The policy may have to answer without any words.
    answer = UNITS.sub("", answer.strip().removesuffix("."))
    if not question or number(answer, units=False) is None:
        raise ValueError("an empty question, or no number")
    return question, answer.replace(",", "")


def official_files_to_fetch():
    """[(name, bytes)] of the official GSM8K files that are not yet in the cache."""
    missing = []
    for name, (size, _) in GSM8K_FILES.items():
        if not (cache_dir() / "gsm8k" / name).exists():
            missing.append((name, size))
    return missing


def official_file(name):
    """The path of an official GSM8K file in the cache. It is downloaded if it is not there.

    Raises ValueError if the download fails.
    """
    path = cache_dir() / "gsm8k" / name
    try:
        if not path.exists():
            content = download(name)
            path.parent.mkdir(parents=True, exist_ok=True)

            # Give the file its name only when it is complete.
            unfinished = path.with_name(f"{name}.{os.getpid()}.part")
            unfinished.write_bytes(content)
            unfinished.replace(path)
    except Exception as error:
        raise ValueError(f"GSM8K's {name} could not be downloaded ({error}): {GSM8K_ADVICE}") from error
    return path


def download(name):
    """The content of an official GSM8K file, checked. Raises OSError."""
    size, sha256 = GSM8K_FILES[name]
    content = b""
    bar = tqdm(total=size, desc=f"GSM8K {name}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, urllib.request.urlopen(GSM8K_URL + name, timeout=30) as response:
        while chunk := response.read(2**16):
            content += chunk
            bar.update(len(chunk))

    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError("its sha256 is not that of the official file")
    return content


def cache_dir():
    """The folder for downloads and experts' states: $N_MUSKETEERS_CACHE, else ~/.cache/n-musketeers."""
    folder = os.environ.get("N_MUSKETEERS_CACHE") or "~/.cache/n-musketeers"
    return expand_home(folder, "N_MUSKETEERS_CACHE")


def expand_home(path, name):
    """The path with ~ replaced by the home folder. Raises ValueError that names the option or variable."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home folder in {path} is not known: set {name} to a path without ~") from error
