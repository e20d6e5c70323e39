"""
Where problems come from, and how an answer is verified without running anything. What is easy to get wrong:
- The verifier is the teacher: whatever it pays for is what the policy learns.
- An answer is text to be compared, never code: nine of Reasoning Gym's scorers execute it, one pays for any.
  So no scorer is asked. An answer is compared with the gold answer, as a fraction where that is a number,
  else as folded text; a dataset where other answers are right too is refused.
- Seeds do not separate train from test: Reasoning Gym draws item i from Random(seed + i). Here the sha256 of
  a question decides its split, so that no question is in two splits, whatever sizes are asked for.
- A truncated "1" may be the head of "12", and a list of several numbers is no answer.
"""
import contextlib
import dataclasses
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

SPLITS = ("train", "val", "test")
REASONS = ("right", "wrong", "no_answer", "unclosed", "several", "too_long", "not_a_number", "truncated")

@dataclasses.dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the gold answer
    task: str = "gsm8k"  # the part of a mix it belongs to: "arithmetic" in "arithmetic+logic"
    dataset: str = "gsm8k"
    split: str = "train"

@dataclasses.dataclass(frozen=True)
class Verdict:
    strict: bool  # one exact, well-formed answer: this is trained on
    lenient: bool  # a generous reader would find the answer: this is only reported
    reward: float  # 1.0 if strict, else 0.0
    reason: str  # one of REASONS

# Tasks and levels
TINY = {  # level "tiny": what the embedded experts in tiny/ were taught
    "arithmetic": {"chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}},
    "logic": {"family_relationships": {"min_family_size": 4, "max_family_size": 5}},
    "algorithmic": {"count_primes": {"min_n": 1, "max_n": 100}},
}
FAMILIES = {  # at every other level; a constant answer solves less than a third of any of these
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "lcm", "leg_counting"),
    "logic": ("family_relationships", "knights_knaves", "color_cube_rotation", "aiw"),
    "algorithmic": ("count_primes", "number_sorting", "spell_backward", "base_conversion", "caesar_cipher"),
}
STEPS = {"easy": 0, "hard": 2}  # of a dataset's own curriculum; level "default" is its default parameters
TOO_HARD = ("caesar_cipher", "survo")  # these forbid step 2 of their own curriculum: "hard" is step 1
SIZES = {"acre": 5000, "gsm_symbolic": 100_000}  # these draw all their items when they are built
UNFIT = {  # why: which datasets; what was measured of every one is in results/fitness.md
    "several answers are right, and only one of them is known":
        "countdown cryptarithm group_anagrams intermediate_integration jugs kakurasu n_queens "
        "palindrome_generation palindrome_partitioning polynomial_multiplication puzzle24 quantum_lock "
        "shortest_path simple_integration sokoban tower_of_hanoi",
    "its items have no gold answer, and its own scorer raises, hangs or pays for nonsense":
        "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its items change with PYTHONHASHSEED: no two runs would see the same questions":
        "codeio isomorphic_strings knight_swap list_functions ransom_note word_ladder",
    "its gold answers are not rounded as its questions ask": "coin_flip number_format power_function",
    "one of its items can take a minute to make": "number_sequence",
    "it is a mix of other datasets, which + makes too": "composite",
}
REFUSED = {name: reason for reason, names in UNFIT.items() for name in names.split()}

def registry():
    """{name: (dataset class, configuration class)}. Imported late: it takes 1.6 s, and GSM8K does without."""
    import reasoning_gym
    return reasoning_gym.factory.DATASETS

def known(name):
    """The name, if it is a task's; else ValueError, which says what to choose."""
    if name in REFUSED:
        raise ValueError(f"the dataset {name} is refused because {REFUSED[name]}: choose another one")
    if name != "gsm8k" and name not in FAMILIES and name not in registry():
        names = ["gsm8k", *FAMILIES, *sorted(registry().keys() - REFUSED.keys())]
        near = difflib.get_close_matches(name.lower(), names, cutoff=0.5) or names[:4]
        raise ValueError(f"unknown task {name!r}: choose {', '.join(near)} or another Reasoning Gym dataset")
    return name

def parameters(dataset, level):
    """{parameter: value} of a dataset at a level; {} is its default level. ValueError if unknown."""
    from reasoning_gym.factory import create_curriculum, has_curriculum
    if level == "default" or (level in STEPS and not has_curriculum(dataset)):
        return {}
    if level == "tiny":
        found = [family[dataset] for family in TINY.values() if dataset in family]
        if not found:
            raise ValueError(f"level tiny exists only for {', '.join(TINY)}, not for {dataset}: "
                             "choose --level easy, or --preset small")
        return found[0]
    if level in STEPS:
        curriculum = create_curriculum(dataset)
        curriculum.set_global_level(1 if level == "hard" and dataset in TOO_HARD else STEPS[level])
        return vars(curriculum.generate_configuration())
    kinds = {field.name: field.type for field in dataclasses.fields(registry()[dataset][1])
             if field.type in (bool, int, float, str) and field.name not in ("seed", "size")}
    values = {}
    for part in level.split(","):
        name, _, value = part.replace(" ", "").partition("=")
        try:
            kind = kinds[name]
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            choices = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise ValueError(f"unknown level {part!r} of {dataset}: choose easy, default, hard or "
                             f"parameter=value,... of {choices or 'none'}") from None
    return values

def draws(dataset, level):
    """Yields (question, answer) of a Reasoning Gym dataset. ValueError if it, or an item, cannot be built."""
    make, config = registry()[dataset]
    values = parameters(dataset, level) | dict(seed=1, size=SIZES.get(dataset, 10**9))
    try:
        found = make(config(**values))
        for i in range(found.size):
            with contextlib.redirect_stdout(io.StringIO()):  # bf prints
                item = found[i]
            yield item["question"], str(item["answer"])
    except Exception as error:
        raise ValueError(f"{dataset} or an item of it cannot be built at level {level} ({error!r}): choose "
                         "another") from error

def split_of(question):
    """The split of a generated question: 1/2 train, 1/4 val, 1/4 test. Final: tiny/ is trained on it."""
    return ("train", "train", "val", "test")[int(hashlib.sha256(question.encode()).hexdigest(), 16) % 4]

def dataset_problems(task, dataset, split, level):
    """Yields the distinct problems of one dataset in one split, in the order in which they are drawn."""
    seen, last_new = set(), -1
    for drawn, (question, answer) in enumerate(draws(dataset, level)):
        if question not in seen and answer:  # an empty answer cannot be given
            seen.add(question)
            last_new = drawn
            if split_of(question) == split:
                yield Problem(question, answer, task, dataset, split)
        # so many draws without a new question of any split: what a split holds does not depend on the others
        if drawn - last_new >= max(200, 3 * len(seen)):
            return

def epochs(items, name):
    """Yields the items in order, then without end one reshuffled epoch of them after another."""
    kept = []
    for item in items:
        kept.append(item)
        yield item
    for epoch in itertools.count(1) if kept else ():
        order = list(kept)
        random.Random(f"{name} {epoch}").shuffle(order)  # seeded by text: the same on every machine
        yield from order

def take_turns(parts):
    """Yields an item of each part in turn until one ends; a held-out question of two parts comes once."""
    seen = set()
    for part in itertools.cycle(parts):
        item = next((item for item in part if item.split == "train" or item.question not in seen), None)
        if item is None:
            return
        seen.add(item.question)
        yield item

def task_problems(task, split, data, level):
    """An iterator over one part of a mix: without end for train, each problem once for val and test."""
    if task in FAMILIES and level not in ("tiny", "default", *STEPS):
        raise ValueError(f"unknown level {level!r} of {task}: choose easy, default, hard or tiny")
    if task == "gsm8k":
        parts = {task: (Problem(*row, split=split) for row in gsm8k(data)[split])}
    else:
        names = TINY[task] if task in TINY and level == "tiny" else FAMILIES.get(task, [task])
        parts = {name: dataset_problems(task, name, split, level) for name in names}
    if split == "train":
        parts = {name: epochs(items, name) for name, items in parts.items()}
    return take_turns(parts.values())

def problems(task, split, n, data=None, level=None, least=None):
    """A list of n problems of a task: gsm8k, a family, a Reasoning Gym dataset, or several joined with "+".

    A shorter list begins a longer one. val and test hold no question twice; train begins again, reshuffled.
    `data`: see gsm8k. `level`: easy, default, hard, tiny, or "parameter=value,..."; gsm8k ignores it.
    ValueError for an unknown task, split or level, a refused dataset, and where there are fewer than `least`
    (default: n).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose {', '.join(SPLITS)}")
    names = [known(name.strip()) for name in task.split("+")]
    parts = [task_problems(name, split, data, level or "default") for name in names]
    found = list(itertools.islice(take_turns(parts), n))
    if len(found) < (n if least is None else least):
        mend = "pass a larger file as --data" if "gsm8k" in names else "choose another --level"
        raise ValueError(f"{task} has only {len(found)} distinct {split} questions: {mend}, or ask for fewer")
    return found

def next_of_dataset(problems):
    """For each problem the index of the next one of its dataset; for the last one, of the first."""
    partner = [0] * len(problems)
    for dataset in {problem.dataset for problem in problems}:
        places = [i for i, problem in enumerate(problems) if problem.dataset == dataset]
        for here, there in zip(places, places[1:] + places[:1]):
            partner[here] = there
    return partner

# GSM8K
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
MEND = "pass --data FOLDER with train.jsonl and test.jsonl of github.com/openai/grade-school-math"

def cache_dir():
    """The folder for downloads: $N_MUSKETEERS_CACHE, else ~/.cache/n-musketeers."""
    return Path(os.environ.get("N_MUSKETEERS_CACHE") or Path.home() / ".cache" / "n-musketeers")

def download(name):
    """The path of an official file: fetched once, checked, and given its name only when it is complete."""
    path = cache_dir() / "gsm8k" / name
    try:
        if not path.exists():
            content = urllib.request.urlopen(URL + name, timeout=30).read()
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise OSError("its sha256 is not the official file's")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{name}.{os.getpid()}.part")
            part.write_bytes(content)
            part.replace(path)
    except Exception as error:
        raise ValueError(f"GSM8K's {name} could not be downloaded ({error}): {MEND}") from error
    return path

def read_rows(path):
    """{question: gold number as text} of a file; ValueError names a wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}): {MEND}") from error
    rows = {}
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = row["question"].strip()
            _, gold = row["answer"].rsplit("####", 1)
            if not question or number(gold) is None:
                raise ValueError("an empty question, or no number")
        except Exception:  # this, or no JSON, or JSON of another shape
            raise ValueError(f'{path}, line {at}: it needs a "question", and an "answer" ending in #### 18')
        rows.setdefault(question, gold.strip().replace(",", ""))
    return rows

def gsm8k(data=None):
    """{split: [(question, answer)]}: test is test.jsonl, val the last 256 of train.jsonl, train the others.

    `data`: a folder with both files, or one file, whose questions split_of divides. train.jsonl or test.jsonl
    with the other beside it stands for the folder. Without `data` the official files are downloaded once.
    """
    data = Path(data).expanduser() if data else None
    if data and data.name in SHA256 and all((data.parent / name).is_file() for name in SHA256):
        data = data.parent
    if data and data.is_file():
        rows = read_rows(data)
        return {split: [row for row in rows.items() if split_of(row[0]) == split] for split in SPLITS}
    train, test = [read_rows(data / name if data else download(name)) for name in SHA256]
    train = [row for row in train.items() if row[0] not in test]  # nothing to do in the official files
    first_held = len(train) - min(256, len(train) // 4)
    return {"train": train[:first_held], "val": train[first_held:], "test": list(test.items())}

INSTRUCTION = ("\n\nFirst think in one or two short sentences. Then write the final answer, and nothing "
               "else, between <answer> and </answer>.")
# a solved problem, the chat's first turns: without it half a billion parameters seldom write the tags
EXAMPLE = ("A shelf has 3 boxes with 12 pencils each. If 10 pencils are taken out, how many are left?",
           "The boxes hold 3 * 12 = 36 pencils. Without 10 of them, 36 - 10 = 26 are left. "
           "<answer>26</answer>")

def prompt(problem, template="plain", tokenizer=None, ask=True):
    """The text a model reads.

    plain: the question, then "\\nAnswer:" unless it ends in "=". chat: the tokenizer's template around a
    solved example and the question, both asking for answer tags; if not `ask` (experts) the question alone.
    """
    question = problem.question.strip()
    if template == "plain":
        return question if question.endswith("=") else question + "\nAnswer:"
    texts = [EXAMPLE[0] + INSTRUCTION, EXAMPLE[1], question + INSTRUCTION] if ask else [question]
    turns = [dict(role=role, content=text) for role, text in zip(("user", "assistant", "user"), texts)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

# Verification
OPEN, CLOSE, THOUGHT = "<answer>", "</answer>", "</think>"
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>")

def verify(completion, problem, form="tagged", truncated=False):
    """The Verdict on a completion: text, with the text of its stop token or without. It never raises on text.

    form "tagged": after the last </think>, exactly one <answer>...</answer> holds nothing but the answer.
    form "plain": the first line is nothing but the answer. `truncated`: the completion hit the token limit;
    a complete block still counts, an unended first line does not.
    """
    if form not in ("tagged", "plain"):
        raise ValueError(f"unknown answer form {form!r}: choose tagged or plain")
    text, reason = extract(completion, form, truncated)
    reason = reason or grade(text, problem, units=form == "tagged")
    strict = reason == "right"
    return Verdict(strict, strict or lenient(completion[-2000:], problem.answer), float(strict), reason)

def extract(completion, form, truncated):
    """(answer as written, None), or ("", the reason why there is none)."""
    if form == "plain":
        answer, newline, _ = completion.partition("\n")
        for stop in STOPS:
            answer = answer.removesuffix(stop)
        if truncated and not newline:
            return "", "truncated"
    else:
        text = completion.rpartition(THOUGHT)[2]
        tags = re.findall(f"{OPEN}|{CLOSE}", text)
        if len(tags) > 2 and OPEN in tags and CLOSE in tags:
            return "", "several"
        if tags != [OPEN, CLOSE]:
            return "", "truncated" if truncated else "unclosed" if OPEN in tags else "no_answer"
        answer = text.partition(OPEN)[2].partition(CLOSE)[0]
    return (answer, None) if answer.strip() else ("", "no_answer")

PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")  # not 007; not 1/2: lowest terms may be the task

def grade(text, problem, units):
    """The reason of the verdict on an extracted answer; `units`: words may follow a number."""
    gold = problem.answer.strip()
    text = text if problem.dataset == "gsm8k" else text.strip()
    is_number = problem.dataset == "gsm8k" or PLAIN_NUMBER.fullmatch(gold)
    if len(text) > (MAX_NUMBER if is_number else 4 * len(gold) + 64):
        return "too_long"
    if not is_number:
        return "right" if fold(text) == fold(gold) else "wrong"
    value = number(text, units)
    # beyond GSM8K a division may be the question itself, and 1e2 a hexadecimal number
    if value is None or (problem.dataset != "gsm8k" and re.search(r"/|[0-9][eE]", text)):
        return "not_a_number"
    return "right" if value == number(gold) else "wrong"

def fold(text):
    """A text without case, quotes, spaces beside a mark, and zeros at the end of decimals."""
    text = " ".join(text.casefold().replace("\u2212", "-").replace("'", "").replace('"', "").split())
    text = re.sub(r" ?([^\w ]) ?", r"\1", text)
    return re.sub(r"[0-9]+\.[0-9]+", lambda decimal: decimal[0].rstrip("0").rstrip("."), text)

MAX_NUMBER = 200  # characters: int() is quadratic in them
THIN = "\u2009\u202f"  # thin space, narrow no-break space: they group thousands, as the comma does
DIGITS = "(?:" + "|".join(f"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+" for mark in "," + THIN) + "|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}})?"  # 18, 1,000.50, .5, 1e3
RATIO = rf"{DIGITS}\s*/\s*(?=.*[1-9]){DIGITS}"  # 36/2, but not 1/0
NUMBER = re.compile(rf"(?P<sign>[-+]?)(?:\\?[$€%]\s*)?(?P<value>{DECIMAL}|{RATIO})")  # -$5
NUMBER_TOKEN = re.compile(rf"(?:(?<![0-9])[-+])?[0-9.][0-9.,/{THIN}]*")
PAIRS = [("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("\\(", "\\)"), ("\\boxed{", "}")]
PAIRS += [pair for sign in ("\\$", "$", "€", "\\%", "%") for pair in ((sign, ""), ("", sign))]
NOT_UNITS = (  # words that would change the number they follow: "18 thousand", "18 or nineteen"
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundreds? thousands? "
    "millions? billions? trillions? dozens? half halves thirds? quarter fourths? fifths? sixths? eighths? "
    "tenths? hundredths? thousandths? k or to not plus minus times over point squared cubed e x")
UNITS = re.compile(rf"(\s+(?!(?i:{'|'.join(NOT_UNITS.split())})\b)[A-Za-z]+){{1,3}}\Z")  # 1 to 3 other words

def number(text, units=True):
    """The one number that `text` is, as a Fraction; None if it is no number, several, a range, an expression.

    Taken off: space, $ € %, bold and italic, \\boxed{}, \\( \\), a full stop, up to 3 words if `units`.
    """
    if len(text) > MAX_NUMBER:
        return None
    text, stop, before = text.replace("\u2212", "-").strip(), True, None
    while text != before:  # every round takes something off, or is the last
        before = text
        for left, right in PAIRS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
                text = text[len(left):len(text) - len(right)].strip()
        if stop and text.endswith("."):
            text, stop = text[:-1].rstrip(), False
        if units:
            text, taken = UNITS.subn("", text)
            units = not taken  # units come off in one round alone
    match = NUMBER.fullmatch(text)
    return Fraction(match["sign"] + re.sub(r"[\s,]", "", match["value"])) if match else None

def lenient(tail, gold):
    """Would a generous reader find the gold answer in the end of a completion? Reported, never trained on."""
    value = number(gold)
    if value is None:  # the text of the last line or answer block
        last = tail.replace(OPEN, "\n").replace(CLOSE, "\n").strip().rpartition("\n")[2].strip()
        return bool(last) and last.casefold() == gold.strip().casefold()
    if "\\boxed{" in tail:  # the last one
        inside, closed, _ = tail.rpartition("\\boxed{")[2].partition("}")
        return bool(closed) and number(inside) == value
    if "####" in tail:  # what follows the first one
        tail = tail.partition("####")[2].split("\n")[0]
        if number(tail) == value:
            return True
    tokens = reversed(NUMBER_TOKEN.findall(tail.replace("\u2212", "-")))  # else the last number
    values = (number(token.rstrip(".,/" + THIN), units=False) for token in tokens)
    return next((found for found in values if found is not None), None) == value
