"""What must stay true. On the CPU, without downloads:   python -m pytest -q test_all.py"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import copy
import inspect
import json
import math
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import analysis
import checkpoint
import claims
import collab
import experts
import export
import figures
import folders
import lora
import ranks
import rewards
import rlvr
import settings
import stats
import study
import train
from answers import number
from eval import load as load_run
from eval import main as eval_main
from eval import majority, pass_at, table
from experts import Expert, cached, read
from model import Policy, TokenLogprob, attend_group, sample
from rewards import REASONS, Problem, TooFew, problems, prompt, verify
from rlvr import (Batch, Rollout, advantages, gradients, grpo_loss, k3, listen, make_optimizer, prefix_effect,
                  reference_logprobs, rollout, set_rate, update)
from router import Router
from run import evaluate, ordered
from stats import wilson

torch.set_num_threads(1)  # for models this small two threads only wait for each other
os.chdir(Path(__file__).parent)


# -- rewards
THIN, NARROW, NO_BREAK, MINUS = "\u2009", "\u202f", "\u00a0", "\u2212"

ONE_NUMBER = [  # (an answer's text, the number it is)
    ("18", 18), (" 18 ", 18), ("$18", 18), ("18$", 18), ("$ 18", 18), ("18.", 18), ("18.00", 18),
    ("0018", 18),
    ("+18", 18), ("-18", -18), (MINUS + "18", -18), ("-$18", -18), ("$-18", -18), (f"{MINUS}$18", -18),
    ("1,000", 1000), ("1,234,567.50", 1234567.5), (f"1{THIN}000", 1000), (f"1{NARROW}000{NARROW}000", 10**6),
    ("**18**", 18), ("*18*", 18), ("__18__", 18), ("***18***", 18), ("**18.**", 18), ("**$18**", 18),
    ("$**18**", 18),
    ("\\boxed{18}", 18), ("$\\boxed{18}$", 18), ("\\boxed{\\boxed{18}}", 18), ("\\boxed{$18}", 18),
    ("\\boxed{18}.", 18),
    ("\\boxed{\\$18}", 18), ("\\(18\\)", 18), ("\\( 18 \\)", 18), ("$18$", 18), ("$$18$$", 18),
    ("**\\(18\\)**", 18),
    ("18%", 18), ("18 %", 18), ("18\\%", 18), ("€18", 18), ("18 €", 18), ("18 dollars", 18),
    ("18 dollars.", 18),
    ("18 apples per day", 18), ("**18 apples**", 18), ("**18** apples", 18), ("$18 dollars", 18),
    ("18% discount", 18),
    (f"1{THIN}000 dollars", 1000), (f"{NO_BREAK}18{NO_BREAK}", 18), (f"{THIN}18{THIN}", 18),
    (f"18{NO_BREAK}km", 18),
    ("36/2", 18), ("36 / 2", 18), ("-36/2", -18), ("1,000/10", 100), ("1e3", 1000), ("1E+3", 1000),
    ("15e-1", 1.5),
    (".5", 0.5), ("-.5", -0.5), ("5.", 5), ("0", 0), ("-0", 0), ("\n18\n", 18), ("1e99", 10**99),
    ("9" * 200, int("9" * 200)),
]
NO_NUMBER = [
    "", " ", ".", "-", "+", "$", "%", ",", "/", "e", "e3", "1e", "1e+", "**", "****", "\\boxed{}", "\\(\\)",
    "18 19", "18, 19",
    "18,19", "9+9", "3-5", "3 - 5", "10-2", "2*9", "2**3", "2^3", "1,2", "1,00", "1,0000", "1000,000",
    "0,018", ",100",
    "1,,000", f"1,000{THIN}000", "1 000", "1.000,5", "1.8.0", "18..", "--18", "+-18", "-+18", "- 18", "18-",
    "1/0", "1/2/3",
    "1/", "/2", "1.5/2", "36/-2", "1 1/2", "½", "１８", "٣",
    "18²", "Ⅷ", "1e999999", "1e100", "1e1e1", "0x12",
    "1_000", "inf",
    "nan", "-inf", "Infinity", "True", "eighteen", "18 apples per day here", "18 apples per day here now",
    "18 m2", "18km",
    "18 thousand", "2 million", "3 dozen", "18 hundred", "18 or nineteen", "18 k", "18 plus two", "about 18",
    "x = 18", "=18",
    "£18", "¥18", "USD 18", "18:00", "(18)", "[18]", "{18}", "18;", "18!", "'18'", "`18`", "#18", "18\x00",
    "\ud80018",
    "\\frac{36}{2}", "\\boxed{18", "boxed{18}", "\\boxed{1}\\boxed{8}", "**1** **8**", "18\n19", "1\n8",
    "1$8", "9" * 201,
    "<b>18</b>", "18 apples-day", "18 4th", "\\[18\\]", "18)", "–18", "5 6 apples", "1e3/2", "36⁄2",
]


@pytest.mark.parametrize("text, value", ONE_NUMBER)
def test_one_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", NO_NUMBER)
def test_no_number(text):
    assert number(text) is None


GOLD18 = Problem("How many?", "18")
TAGGED = [  # (completion, truncated, reason, lenient)
    ("<answer>18</answer>", False, "right", True),
    ("<think><answer>17</answer></think>It is\n<answer> **18** </answer><|im_end|>", False, "right", True),
    ("**<answer>18</answer>**", False, "right", True), ("<answer>18</answer>, not 19", False, "right", True),
    ("<answer>18</answer> and so", True, "right", True), ("<answer>18.1</answer>", False, "wrong", False),
    ("<answer>36/2</answer>", False, "right", True), ("<answer>17 18</answer>", False, "not_a_number", True),
    ("<answer>9+9</answer>", False, "not_a_number", False), ("18", False, "no_answer", True),
    ("", False, "no_answer", False), ("<answer></answer>", False, "no_answer", False),
    ("18</answer>", False, "no_answer", True),
    ("<answer> \u2009</answer>", False, "no_answer", False),
    ("<Answer>18</Answer>", False, "no_answer", True),
    ("<answer>18</answer></think>", False, "no_answer", True), ("<answer>18", False, "unclosed", True),
    ("<answer>18", True, "truncated", True), ("so it is 18", True, "truncated", True),
    ("</answer>18<answer>", False, "unclosed", True),
    ("<answer>18</answer><answer>18</answer>", False, "several", True),
    ("<answer>1</answer><answer>18</answer>", True, "several", True),
    ("<answer><answer>18</answer></answer>", False, "several", True),
    ("<answer>18</answer><answer>", False, "several", True),
    ("<answer>" + " " * 200 + "18</answer>", False, "too_long", True),
    ("<answer>#### 18 apples were left for them</answer>", False, "not_a_number", True),
    ("#### 18\nor is it 3?", False, "no_answer", True), ("#### 3\nno: 18", False, "no_answer", False),
    ("\\boxed{3} \\boxed{18} 4", False, "no_answer", True),
    ("3 + 15 = 18.\nThat is it.", False, "no_answer", True),
    ("it was \\boxed{\\text{18}}, I think", False, "no_answer", False), ("9-18", False, "no_answer", True),
    ("18" + " " * 2000, False, "no_answer", False),
]
PLAIN = [
    ("18", False, "right"), (" 18\n", False, "right"), ("18\nQuestion: 2 + 2 =", True, "right"),
    ("18</s>", False, "right"),
    ("18\r\n", False, "right"), ("$18.", False, "right"), ("18", True, "truncated"), ("", False, "no_answer"),
    ("\n18", False, "no_answer"), ("18 apples", False, "not_a_number"),
    ("18 is the answer", False, "not_a_number"),
    ("The answer is 18", False, "not_a_number"), ("= 18", False, "not_a_number"),
    ("<answer>18</answer>", False, "not_a_number"),
    ("18 19", False, "not_a_number"), ("17", False, "wrong"), ("9" * 999, False, "too_long")]


@pytest.mark.parametrize("text, truncated, reason, lenient", TAGGED)
def test_tagged(text, truncated, reason, lenient):
    verdict = verify(text, GOLD18, truncated=truncated)
    assert (verdict.reason, verdict.lenient) == (reason, lenient)
    assert verdict.strict == (verdict.reward == 1.0) == (reason == "right")


@pytest.mark.parametrize("text, truncated, reason", PLAIN)
def test_plain(text, truncated, reason):
    assert verify(text, GOLD18, "plain", truncated).reason == reason


def test_format_bonus_is_small_and_off():
    assert verify("<answer>17</answer>", GOLD18).reward == 0.0
    assert verify("<answer>17</answer>", GOLD18, format_bonus=0.1).reward == 0.1
    assert verify("<answer>x</answer>", GOLD18, format_bonus=0.1).reward == 0.0
    assert verify("<answer>18</answer>", GOLD18, format_bonus=0.1).reward == 1.0
    with pytest.raises(ValueError):
        verify("", GOLD18, format_bonus=0.2)


UNITS = ["9", "<answer>", "</answer>", "(", "[", "\\boxed{", "\\boxed{1}", "####", "</think>", "\n", " ",
         "1,", "1 ", "**", "$",
         THIN, "<answer>18</answer>", "1\n", "-", "\ud800", "\x00", "1e9", "not "]


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_earns_nothing(unit):
    """Of anything. A reader that is not linear would sit here for minutes; bench.py has the milliseconds."""
    text, generated = unit * (10**6 // len(unit)), problems("chain_sum", "train", 1)[0]
    for problem, form, whole in ((GOLD18, "plain", text), (GOLD18, "tagged", f"<answer>{text}</answer>"),
                                 (generated, "tagged", f"<answer>{text}</answer>"),
                                 (generated, "tagged", text)):
        assert not verify(whole, problem, form).strict


def attacks(canary):
    """What a policy might write to run code, hang a scorer, or be paid for nothing."""
    code = f"__import__('os').system('touch {canary}')"
    return [code, f"[{code}]", f"({code}, 1)", f"[x for x in [{code}]]", f"1 if {code} else 2",
            f"open('{canary}','w')",
            f"(lambda: {code})()", "9**9**9", "9**9**9**9", "(x+1)**1000", "x**9**9", "factorial(10**9)",
            "1e999999999",
            "1e-999999999", "-1e999", "9" * 5000, "9" * 64, "-" * 60 + "1", "not " * 2000 + "P",
            "~" * 2000 + "P", "¬" * 60 + "A",
            "(" * 2000 + "1" + ")" * 2000, "[" * 64, "{\"a\":" * 5000, "[" + "9" * 5000 + "]", "F+999999999",
            "R999999999",
            "nan", "NaN", "inf", "-inf", "[NaN]", "nan+nanj", "nanj", "Infinity", "\x00", "\ud800",
            "\udfff\ud800", "None", "null",
            "true", "[]", "{}", "[[]]", '{"a": 1}', '"text"', "[1, 2]", "[[1]]", "hello world", "0",
            "(P ∨ Q)", "-1", ""]


@pytest.fixture(scope="module")
def usable():
    """A few items of every dataset that is not refused and quick to make."""
    slow = {"jugs", "futoshiki", "sokoban", "zebra_puzzles", "puzzle24", "rearc", "arc_agi", "acre"}
    return {name: problems(name, "train", 2) for name in rewards.tasks()[4:] if name not in slow}


def test_gold_is_right_and_attacks_are_not(usable, tmp_path):
    canary = tmp_path / "canary"
    for name, items in usable.items():
        for item in items:
            gold = item.answer.strip()
            assert not gold or verify(f"<answer>\n {item.answer}\n</answer>", item).strict, name
            for attack in attacks(canary):
                verdict = verify(f"<answer>{attack}</answer>", item)
                assert verdict.reason in rewards.REASONS
                is_gold = gold and (attack.casefold() == gold.casefold() or number(attack) == number(gold))
                assert not verdict.strict or is_gold, (name, attack, gold)
    assert not canary.exists()


HOLES = [  # (dataset, metadata, gold answer, an answer that the dataset's own scorer would pay for)
    ("time_intervals", {"task_type": "time"}, "03:22:03", "03:22:00"),
    ("word_sorting", {"sorted_words": ["a", "b"]}, "a, b", "a, b, c"),
    ("spell_backward", {}, "abcdefghij", "abcdefghijk"), ("letter_jumble", {}, "a b c", "a b c d"),
    ("game_of_life_halting", {}, "True", "False"),
    ("number_sorting", {"direction": "ascending"}, "[1, 3]", "[2, 2]"),
    ("number_sorting", {"direction": "ascending"}, "[1, 3]", '["nan", "nan"]'),
    ("coin_flip", {}, "0.00005", "0"),
    ("puzzle24", {"numbers": [1, 2, 3, 4]}, "4*3*2*1", "8*3*1*1"),
    ("puzzle24", {"numbers": [1, 2, 3, 4]}, "4*3*2*1", "6*4"),
    ("countdown", {"numbers": [5, 5], "target": 10}, "5 + 5", "5 + 5 + 0"),
    ("polynomial_equations", {}, "1.0", "x, 1.0"),
    ("complex_arithmetic", {"result": (1.0, 2.0)}, "1.0 + 2.0i", "nan"), ("chain_sum", {}, "156", "1,5,6"),
    ("gsm_symbolic", {}, "18", "18 19"), ("calendar_arithmetic", {"task": "count_days"}, "700", "701"),
    ("rush_hour", {"board_config": "o"}, "", "F+1000000000"), ("quantum_lock", {}, "A → B", "A quick cab"),
    ("knights_knaves", {}, "Zoey is a hero, and Al is a knave.", "Zoey is a hero, Al is a knave, junk"),
    ("tower_of_hanoi", {}, "Move disk 1 from Peg 1 to Peg 3", "$Move disk 1 from Peg 1 to Peg 3"),
    ("caesar_cipher", {}, "A" * 200, "A" * 201), ("emoji_mystery", {}, "a" * 200, "a" * 199 + "b"),
]


@pytest.mark.parametrize("dataset, metadata, gold, answer", HOLES)
def test_holes_are_closed(dataset, metadata, gold, answer):
    item = Problem("q", gold, dataset, dataset, entry={"question": "q", "answer": gold, "metadata": metadata})
    assert not verify(f"<answer>{answer}</answer>", item).strict


OTHER_RIGHT = [  # another answer than the gold one that is right too
    ("puzzle24", {"numbers": [1, 2, 3, 4]}, "4*3*2*1", "(1 + 2 + 3)*4"),
    ("puzzle24", {"numbers": [8, 8, 3, 3]}, "x", "8/(3-8/3)"),
    ("countdown", {"numbers": [5, 7], "target": 12}, "5 + 7", "7+5"),
    ("countdown", {"numbers": [5, 7], "target": 2}, "7 - 5", "-5 + 7"),
    ("n_queens", {"valid_answers": ["Q _", "_ Q"]}, "Q _", "_ Q"), ("chain_sum", {}, "1156", "+1,156.00"),
    ("family_relationships", {}, "aunt", "Aunt"),
    ("number_sorting", {"direction": "ascending"}, "['1', '3.0']", "[1, 3]"),
    ("number_sorting", {"direction": "ascending"}, "['1', '3.0']", '["1", "3"]'),
    ("complex_arithmetic", {"result": (1.0, 2.0)}, "1.0 + 2.0i", "1+2i"), ("gsm_symbolic", {}, "18", "$18"),
]


@pytest.mark.parametrize("dataset, metadata, gold, answer", OTHER_RIGHT)
def test_other_right_answers(dataset, metadata, gold, answer):
    item = Problem("q", gold, dataset, dataset, entry={"question": "q", "answer": gold, "metadata": metadata})
    assert verify(f"<answer>{answer}</answer>", item).strict


def test_every_reason_occurs():
    factor = Problem("q", "2 × 3", "prime_factorization", "prime_factorization",
                     entry={"answer": "2 × 3", "metadata": {}})
    seen = {row[2] for row in TAGGED} | {verify("<answer>9**9</answer>", factor).reason}
    assert seen | {verify("<answer>two</answer>", factor).reason} == set(rewards.REASONS)


SPLIT_SETS = ["chain_sum", "count_primes", "gcd", "leg_counting", "aiw", "basic_arithmetic", "products",
              "letter_counting",
              "spell_backward", "base_conversion", "count_bits", "family_relationships", "knights_knaves",
              "syllogism",
              "self_reference", "number_sorting", "time_intervals", "caesar_cipher", "binary_alternation",
              "maze",
              "lcm", "fraction_simplification", "coin_flip", "arithmetic", "arithmetic+algorithmic"]


@pytest.mark.parametrize("task", SPLIT_SETS)
def test_splits_are_disjoint(task):
    held, n = {}, 40
    for split in ("val", "test"):
        try:
            items = problems(task, split, n)
        except TooFew as error:
            items = problems(task, split, error.available)
        held[split] = {item.question for item in items}
        assert len(held[split]) == len(items) and all(rewards.split_of(q) == split for q in held[split])
    train = [item.question for item in problems(task, "train", 200)]
    assert not held["val"] & held["test"] and not (held["val"] | held["test"]) & set(train)
    assert train[:10] == [item.question for item in problems(task, "train", 10)]


def test_a_small_space_says_how_many_there_are():
    level = "min_terms=2,max_terms=2,min_digits=1,max_digits=1,allow_negation=false"
    with pytest.raises(TooFew, match="distinct val questions") as error:
        problems("chain_sum", "val", 10**6, level=level)
    assert len(problems("chain_sum", "val", error.value.available, level=level)) < 100
    items = [item.question for item in problems("chain_sum", "train", 500, level=level)]
    distinct = len(set(items))
    first, second = items[:distinct], items[distinct:2 * distinct]
    assert first != second and set(first) == set(second)


def test_a_mix_is_even_and_in_turn():
    items = problems("arithmetic+logic+algorithmic", "train", 9, level="tiny")
    assert [item.task for item in items] == ["arithmetic", "logic", "algorithmic"] * 3
    assert [item.index for item in items] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [item.dataset for item in items[:3]] == ["chain_sum", "family_relationships", "count_primes"]
    shared = problems("chain_sum+arithmetic", "val", 60)
    assert len({item.question for item in shared}) == 60


BAD = [  # (arguments of problems, what the message says)
    (("chain_summ", "train", 1), "chain_sum"), (("gsm8", "train", 1), "gsm8k"),
    (("", "train", 1), "unknown task"),
    (("arithmetic+nope", "train", 1), "nope"), (("simple_integration", "train", 1), "execute"),
    (("composite", "val", 1), "refused"),
    (("ransom_note", "val", 1), "PYTHONHASHSEED"), (("chain_sum", "dev", 1), "train, val, test"),
    (("chain_sum", "train", 1, None, "impossible"), "easy, default, hard"),
    (("chain_sum", "train", 1, None, "terms=2"), "min_terms"),
    (("chain_sum", "train", 1, None, "min_terms=two"), "int"),
    (("chain_sum", "train", 1, None, "min_terms=9"), "cannot be built"),
    (("chain_sum", "train", 1, None, "seed=3"), "min_terms"),
    (("arithmetic", "train", 1, None, "min_terms=2"), "tiny"),
    (("gsm8k", "train", 1, "/nowhere"), "--data"),
]


@pytest.mark.parametrize("arguments, says", BAD)
def test_bad_input_says_the_mend(arguments, says):
    with pytest.raises(ValueError, match=says) as error:
        problems(*arguments)
    assert "\n" not in str(error.value)


def write_gsm8k(folder, train=20, test=6):
    for name, n in (("train", train), ("test", test)):
        rows = ({"question": f"{name} {i}?", "answer": f"so\n#### {i + 1},000"} for i in range(n))
        lines = map(json.dumps, rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_gsm8k_files(tmp_path):
    write_gsm8k(tmp_path)
    train, _, test = (problems("gsm8k", *of, tmp_path) for of in (("train", 40), ("val", 5), ("test", 6)))
    asked = [p.question for p in train]
    assert asked[:15] == [f"train {i}?" for i in range(15)] and sorted(asked[15:30]) == sorted(asked[:15])
    assert test[2].answer == "3000" and verify("<answer>$3,000.00</answer>", test[2]).strict
    assert problems("gsm8k", "test", 6, tmp_path / "test.jsonl") == test  # beside its sister: the folder
    (tmp_path / "test.jsonl").rename(tmp_path / "mine.jsonl")
    one_each = [problems("gsm8k", split, 1, tmp_path / "mine.jsonl")[0] for split in rewards.SPLITS]
    assert len(set(one_each)) == 3
    with pytest.raises(TooFew):
        problems("gsm8k", "test", 7, tmp_path / "mine.jsonl")


@pytest.mark.parametrize("line",
                                  ["{", "3", '{"question": "q"}', '{"question": "q", "answer": "18"}', "null",
                                   "[]",
                                  '{"question": 3, "answer": "#### 1"}',
                                  '{"question": "q", "answer": "#### one"}'])
def test_a_wrong_line_is_named(tmp_path, line):
    write_gsm8k(tmp_path)
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError, match="test.jsonl, line 8"):
        problems("gsm8k", "train", 1, tmp_path)


class Templated:
    chat_template = "yes"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def test_prompts():
    sum_, count = Problem("2 + 3 =", "5"), Problem(" How many? ", "4")
    assert prompt(sum_) == "2 + 3 =" and prompt(count) == "How many?\nAnswer:"
    assert prompt(count, shots=[sum_]) == "2 + 3 = 5\n\nHow many?\nAnswer:"
    assert prompt(sum_, "auto") == "2 + 3 ="
    assert prompt(sum_, "chat", Templated(), ask=False) == "<user>2 + 3 =<assistant>"
    chat = prompt(count, "auto", Templated(), shots=[sum_])
    assert chat.count("<answer>...</answer>") == 2 and "<assistant><answer>5</answer><user>How many?" in chat
    with pytest.raises(ValueError, match="plain"):
        prompt(sum_, "chat")
    with pytest.raises(ValueError, match="train"):
        prompt(sum_, shots=[Problem("1 + 1 =", "2", split="val")])


def test_guessing_floor():
    assert rewards.guessing_floor([Problem("q", a) for a in ("yes", "no", "yes", "yes")]) == (0.75, "yes")
    assert rewards.guessing_floor([]) == (0.0, "")


# -- experts
WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 40] for j in range(3 + 5 * i % 11)) for i in range(9)]
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=32)
KINDS = dict(llama=transformers.LlamaConfig, qwen2=transformers.Qwen2Config, bert=transformers.BertConfig,
             neox=transformers.GPTNeoXConfig)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "cache"))


def make_expert(folder, kind="llama", seed=0, chat=False, **sizes):
    """A random model with a word-level tokenizer, saved as an ordinary Hugging Face folder; its path."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        words.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    if chat:
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(KINDS[kind](**SIZES | sizes))
    for p in model.parameters(): # larger than usual, so that every token matters to a state
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_the_text_alone(tmp_path, kind):
    expert = Expert(make_expert(tmp_path / "m", kind))
    model = transformers.AutoModel.from_pretrained(expert.folder).eval()
    for i in (0, 5):                                        # one text, no padding, by transformers alone
        ids = expert.tokenizer(TEXTS[i], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        for expert.layer, hidden in enumerate(out.hidden_states):
            wanted = {"last": hidden[:, -1], "first": hidden[:, 0], "mean": hidden.mean(1)}
            for expert.read, want in wanted.items():
                states = expert.states(TEXTS)[[i]]          # ragged and padded, in one batch
                torch.testing.assert_close(states, want, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(states, expert.states([TEXTS[i]]), atol=1e-5, rtol=1e-5)


def test_padding_widths_and_dtype(tmp_path):
    pair = [Expert(make_expert(tmp_path / "a")), Expert(make_expert(tmp_path / "b", "bert", hidden_size=24))]
    H = read(pair, [TEXTS, TEXTS[::-1]], progress=False)
    assert H.shape == (len(TEXTS), 2, 24) and H.dtype == torch.float32 and not H[:, 0, 16:].any()
    torch.testing.assert_close(H[:, 0, :16], pair[0].states(TEXTS))
    torch.testing.assert_close(H[:, 1], pair[1].states(TEXTS[::-1]))
    half = Expert(pair[0].source, dtype="bfloat16")
    assert read([half], [TEXTS], progress=False).dtype == torch.bfloat16 and half.row_bytes == 2 * 16 + 32


def test_cache_hit_reads_nothing(tmp_path, monkeypatch):
    expert = Expert(make_expert(tmp_path / "m"))
    first = read([expert], [TEXTS], progress=False)
    assert expert.model is None and cached(expert, TEXTS + ["w1 w2"]) == len(TEXTS)
    monkeypatch.setattr(Expert, "load", lambda self: pytest.fail("a cached text was read again"))
    again = Expert(expert.source)
    assert torch.equal(read([again], [TEXTS[::-1] * 2], progress=False), first.flip(0).repeat(2, 1, 1))
    assert "tokenizer" not in vars(again)                   # a warm start does not even load the tokenizer


@pytest.mark.parametrize("damage", ["cut", "empty", "bit in states", "bit in header"])
def test_damaged_shard_is_read_again(tmp_path, damage):
    expert = Expert(make_expert(tmp_path / "m"))
    first = read([expert], [TEXTS], progress=False)
    [shard] = (folders.cache_dir() / "states").glob("*/*.safetensors")
    data = bytearray(shard.read_bytes())
    if damage.startswith("bit"):
        data[-3 if "states" in damage else 12] ^= 4
    shard.write_bytes(dict(cut=data[:len(data) // 2], empty=b"").get(damage, data))
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(read([expert], [TEXTS], progress=False), first)
    assert cached(expert, TEXTS) == len(TEXTS)


def test_interrupted_read_continues(tmp_path, monkeypatch):
    expert, seen, whole = Expert(make_expert(tmp_path / "m")), [], Expert.forward

    def forward(self, ids):
        if len(seen) == 3 and not resumed:
            raise KeyboardInterrupt
        seen.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(Expert, "forward", forward)
    monkeypatch.setitem(experts.TOKENS, "cpu", 1)           # one text a batch
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        read([expert], [TEXTS], progress=False)
    assert expert.model is None and cached(expert, TEXTS) == 3
    resumed, seen[:] = True, []
    H = read([expert], [TEXTS], progress=False)
    assert sum(seen) == len(TEXTS) - 3
    torch.testing.assert_close(H[:, 0], expert.states(TEXTS))


def test_shards_as_it_goes_and_a_full_disk(tmp_path, monkeypatch):
    expert = Expert(make_expert(tmp_path / "m"))
    monkeypatch.setitem(experts.TOKENS, "cpu", 1)
    monkeypatch.setattr(experts, "SHARD_SECONDS", 0)
    first = read([expert], [TEXTS], tmp_path / "states", progress=False)
    assert len(list((tmp_path / "states").glob("*/*.safetensors"))) == len(TEXTS)
    (tmp_path / "file").write_text("no folder can be made in here")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert torch.equal(read([expert], [TEXTS], tmp_path / "file", progress=False), first)


def test_fingerprint_is_what_decides_a_state(tmp_path):
    folder = make_expert(tmp_path / "m", chat=True)
    kinds = [dict(), dict(read="first"), dict(layer=1), dict(dtype="bfloat16"), dict(template="plain")]
    prints = [Expert(folder, **kind).fingerprint for kind in kinds]
    assert prints[0] == Expert(folder, layer=3, template="chat").fingerprint      # the same, said otherwise
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["norm.weight"][0] += 1
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    prints.append(Expert(folder).fingerprint)
    (tmp_path / "m" / "chat_template.jinja").write_text("another")
    prints.append(Expert(folder).fingerprint)
    assert len(set(prints)) == len(prints) == 7


def test_hub_snapshot_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                         lambda repo, revision, **_: make_expert(
                             tmp_path / f"{repo.replace('/', '-')}-{revision}"))
    expert = Expert("org/name@abc")
    assert (expert.name, expert.revision) == ("name", "org-name-abc")
    assert len(expert.fingerprint) == 64 and expert.fingerprint != Expert(expert.folder).fingerprint


def edit(folder, name, change):
    path = os.path.join(folder, name)
    with open(path) as file:
        value = json.load(file)
    change(value)
    with open(path, "w") as file:
        json.dump(value, file)


def drop_layer(folder):
    path = os.path.join(folder, "model.safetensors")
    save_file({key: value for key, value in load_file(path).items() if "layers.1." not in key}, path)


@pytest.mark.parametrize("harm, message", [
    (lambda f: os.remove(f + "/model.safetensors"), "no safetensors weights"),
    (lambda f: os.truncate(f + "/model.safetensors", 900), "damaged"),
    (lambda f: os.remove(f + "/config.json"), "config.json"),
    (lambda f: os.truncate(f + "/config.json", 9), "damaged"),
    (lambda f: os.remove(f + "/tokenizer.json"), "tokenizer"),
    (lambda f: edit(f, "config.json", lambda c: c.update(hidden_size=10**9)), "width"),
    (lambda f: edit(f, "config.json", lambda c: c.update(vocab_size=10**12)), "cannot be loaded"),
    (lambda f: edit(f, "config.json", lambda c: c.update(model_type="unheard")), "unheard"),
    (lambda f: edit(f, "config.json", lambda c: c.update(is_encoder_decoder=True)), "encoder"),
    (lambda f: edit(f, "config.json", lambda c: c.update(model_type="x", auto_map=dict(AutoModel="x.Y"))),
     "load"),
    (drop_layer, "not in its files"),
])
def test_damaged_model_is_one_sentence(tmp_path, harm, message):
    folder = make_expert(tmp_path / "m")
    harm(folder)
    with pytest.raises(ValueError, match=message) as error:
        Expert(folder).states(TEXTS)
    assert "\n" not in str(error.value)


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    folder = make_expert(tmp_path / "m")
    for wrong, message in ((dict(layer=4), "layers 0 to 3"), (dict(template="chat"), "chat template"),
                           (dict(read="middle"), "middle"), (dict(dtype="int8"), "int8")):
        with pytest.raises(ValueError, match=message):
            Expert(folder, **wrong)
    with pytest.raises(ValueError, match="33 tokens .* 32"):
        read([Expert(folder)], [["w1 " * 33]], progress=False)
    with pytest.raises(ValueError, match="0 tokens"):
        Expert(folder).states([""])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no/such-model", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="is no folder"):
            Expert(name)


# -- the policy
def make_policy(folder, kind="llama", **settings):
    """A random Hugging Face model of the given family, saved to `folder`, and the model itself."""
    import transformers as tf
    name = dict(llama="Llama", qwen2="Qwen2", qwen3="Qwen3")[kind]
    config = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                  num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16 if kind == "qwen3" else 8, max_position_embeddings=128,
                  eos_token_id=1, bos_token_id=0) | settings
    torch.manual_seed(0)
    hf = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**config)).eval()
    for name, p in hf.named_parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(p, std=0.3)
    hf.save_pretrained(folder)
    return hf


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One random Llama with LoRA that does something, and its transformers twin."""
    folder = tmp_path_factory.mktemp("llama")
    hf = make_policy(folder)
    policy = Policy.load(folder)
    wake_lora(policy)
    return policy, hf


def wake_lora(policy):
    for m in policy.adapters():
        for b in m.B:
            torch.nn.init.normal_(b, std=0.2)


def example(prefix=True, seed=0):
    """Three prompts of different lengths, padded; two completions each, one of them short; a prefix or
    None."""
    g = torch.Generator().manual_seed(seed)
    tokens, lengths = torch.randint(2, 300, (3, 9), generator=g), torch.tensor([9, 5, 7])
    answer, mask = torch.randint(2, 300, (3, 2, 6), generator=g), torch.ones(3, 2, 6, dtype=torch.bool)
    mask[1, 0, 3:] = False
    return tokens, lengths, (torch.randn(3, 4, 32, generator=g) if prefix else None), answer, mask


def twin_logprobs(policy, hf, tokens, prefix, answer, temperature=1.0):
    """Log-probabilities (T,) of one answer to one unpadded prompt, by transformers, from embeddings."""
    embed = hf.get_input_embeddings()
    x = embed(torch.cat((tokens, answer)))
    if prefix is not None:
        x = torch.cat((policy.neutral + policy.spread * prefix, x))
    z = hf(inputs_embeds=x[None]).logits[0, -len(answer) - 1:-1] / temperature
    return z.log_softmax(-1).gather(1, answer[:, None])[:, 0]


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)


@pytest.mark.parametrize("kind, settings", [
    ("llama", {}), ("llama", dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    ("qwen2", {}), ("qwen3", {})])
@pytest.mark.parametrize("prefixed", [False, True])
def test_logprobs_equal_transformers(tmp_path, kind, settings, prefixed):
    """With padding, shared prompt and temperature, LoRA off; and with LoRA merged into the twin's weights."""
    hf, policy = make_policy(tmp_path, kind, **settings), Policy.load(tmp_path)
    tokens, lengths, prefix, answer, mask = example(prefixed)
    for awake in (False, True):
        if awake:
            wake_lora(policy)
            for block, layer in zip(policy.blocks, hf.model.layers):
                a, m = layer.self_attn, layer.mlp
                for ours, theirs in ((block.qkv, (a.q_proj, a.k_proj, a.v_proj)), (block.o, (a.o_proj,)),
                                     (block.gate_up, (m.gate_proj, m.up_proj)), (block.down, (m.down_proj,))):
                    for i, linear in enumerate(theirs):
                        A = ours.A[i * 8:i * 8 + 8]
                        linear.weight.data += ours.scale * (ours.B[i] @ A)
        with torch.no_grad():
            got, _ = policy.logprobs(policy.prefill(tokens, lengths, prefix), answer, mask, 0.7)
            for b in range(3):
                for g in range(2):
                    n = int(mask[b, g].sum())
                    before = None if prefix is None else prefix[b]
                    want = twin_logprobs(policy, hf, tokens[b, :lengths[b]], before, answer[b, g, :n], 0.7)
                    torch.testing.assert_close(got[b, g, :n], want, atol=1e-4, rtol=1e-4)


def test_cached_decoding_equals_the_full_forward(small):
    """Greedy tokens, chosen one at a time from the cache, are those of a full forward at every length."""
    policy, hf = small
    tokens, lengths, prefix, *_ = example()
    with policy.plain(), torch.no_grad():
        got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 2, 8, temperature=0)
        assert torch.equal(got[:, 0], got[:, 1])
        for b in range(3):
            prompt_embeddings = hf.get_input_embeddings()(tokens[b, :lengths[b]])
            x = torch.cat((policy.neutral + policy.spread * prefix[b], prompt_embeddings))
            for t in range(int(mask[b, 0].sum())):
                best = hf(inputs_embeds=x[None]).logits[0, -1].argmax()
                assert best == got[b, 0, t]
                x = torch.cat((x, hf.get_input_embeddings()(best[None])))


def test_a_long_decode_with_lora_is_the_full_forward(small):
    """LoRA merged for the rollout and own keys that grow in steps of 16: each greedy token is that of the
    whole text run at once, LoRA unmerged."""
    policy, _ = small
    wake_lora(policy)
    tokens, _, _, *_ = example()
    tokens, stop = tokens[:, :4], policy.stop
    policy.stop = torch.tensor([-1])
    got, _ = policy.generate(policy.prefill(tokens, torch.tensor([4, 4, 4])), 1, 40, temperature=0)
    policy.stop = stop
    assert policy.blocks[0].qkv.merged is None
    with torch.no_grad():
        for t in (0, 1, 15, 16, 17, 33, 39):
            text = torch.cat((tokens, got[:, 0, :t]), 1)
            last = policy.prefill(text, torch.full((3,), text.shape[1])).last
            assert torch.equal(policy.logits(last, policy.head).argmax(-1), got[:, 0, t])


def test_a_compiled_rollout_is_the_plain_one(tmp_path):
    """The graphs that torch.compile takes of a block give the same tokens, merged LoRA in them, rollout after
    rollout with other weights; with a gradient they have no part."""
    make_policy(tmp_path)
    plain, fused = Policy.load(tmp_path), Policy.load(tmp_path)
    fused.load_state_dict(plain.state_dict())
    ran = []

    def backend(graph, _):
        return lambda *inputs: (ran.append(1), graph(*inputs))[1]

    fused.fuse(backend)
    tokens, lengths, prefix, answer, mask = example()
    for _ in range(2):
        wake_lora(plain)
        fused.load_state_dict(plain.state_dict())
        ran.clear()
        seed = lambda: torch.Generator().manual_seed(3)
        got, want = (p.generate(p.prefill(tokens, lengths, prefix), 2, 8, 1.0, seed())
                     for p in (fused, plain))
        assert torch.equal(got[0], want[0]) and len(ran) == 7 * 3 * 2  # tokens, blocks, graphs of a block
    ran.clear()
    fused.logprobs(fused.prefill(tokens, lengths, prefix), answer[..., :2], mask[..., :2])
    assert not ran


@pytest.mark.skipif(not lora.BLOCKS, reason="this processor has no bf16 products")
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("rows", (1, 3, 64))
def test_products_with_a_sorted_weight(rows, bias):
    """In bf16 a weight sorted for the processor gives F.linear's products, compiled or not; in fp32 nothing
    is sorted."""
    g = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(*shape, generator=g).bfloat16() for shape in ((rows, 48), (80, 48), (80,)))
    b, sorted_ = b if bias else None, lora.prepare(w, rows)
    assert sorted_.is_mkldnn and not lora.prepare(w.float(), rows).is_mkldnn
    want = F.linear(x, w, b)
    torch.testing.assert_close(lora.product(x, sorted_, b), want)
    compiled = torch.compile(lambda *args: lora.product(*args) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sorted_, b), want + 1)


def test_merged_sorted_weights_are_the_adapted_ones(tmp_path):
    """In bf16: hidden states with LoRA merged and sorted against those with the adapters apart; afterwards
    the layers are as before."""
    make_policy(tmp_path)
    policy = Policy.load(tmp_path, dtype=torch.bfloat16)
    wake_lora(policy)
    tokens, lengths, prefix, *_ = example()
    read_on = lambda: policy.prefill(tokens, lengths, prefix).last.float()
    with torch.no_grad():
        apart = read_on()
        with policy.merged(3):
            together = read_on()
            assert policy.blocks[0].down.merged.is_mkldnn == lora.BLOCKS
        with policy.plain():
            without = read_on()
            with policy.merged(3):
                torch.testing.assert_close(read_on(), without, atol=0.05, rtol=0.05)
        assert torch.equal(read_on(), apart)
    error = lambda h: (h - apart).norm() / apart.norm()
    assert error(together) < 0.03 < 0.1 < error(without)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_rollout_in_bf16(tmp_path, compiled):
    """Weights sorted where that pays, LoRA merged: each greedy token is the full forward's, or nearly."""
    make_policy(tmp_path)
    policy = Policy.load(tmp_path, dtype=torch.bfloat16)
    wake_lora(policy)
    policy.stop = torch.tensor([-1])
    if compiled:
        policy.fuse("eager")
    for rows in (3, 2):  # another number of rows is another weight
        tokens, lengths = example()[0][:rows, :4], torch.full((rows,), 4)
        got, _ = policy.generate(policy.prefill(tokens, lengths), 1, 6, temperature=0)
        for t in range(6):
            text = torch.cat((tokens, got[:, 0, :t]), 1)
            with torch.no_grad():
                last = policy.prefill(text, torch.full((rows,), text.shape[1])).last
                z = policy.logits(last, lora.prepare(policy.head, rows)).float()
            assert (z.gather(1, got[:, 0, t:t + 1])[:, 0] > z.amax(-1) - 0.05 * z.std(-1)).all()


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="install g"):
        settings.resolve(dict(pool="tiny", compile=True, out="runs/never"))


def test_attention_of_a_prompt_to_itself_equals_torch():
    """A row without a shared part under a causal mask is torch's own attention, gradients too."""
    q, k, v = (torch.randn(2, 7, h, 8, requires_grad=True) for h in (6, 2, 2))
    heads = lambda x: x.transpose(1, 2)
    later, empty = torch.ones(7, 7, dtype=torch.bool).triu(1), torch.zeros(2, 2, 0, 8)
    own = (heads(x)[:, :, None] for x in (k, v))
    ours = attend_group(q[:, None], *own, later, empty, empty, None)[:, 0]
    want = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True, enable_gqa=True)
    want = heads(want)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
    up = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), up), torch.autograd.grad(want, (q, k, v), up)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_completion_ends_with_its_stop_token(small):
    """mask covers the first stop token and nothing after it."""
    policy, _ = small
    tokens, lengths, prefix, *_ = example()
    stop, policy.stop = policy.stop, torch.arange(0, 300, 4)  # a quarter of all tokens: completions end early
    cache, generator = policy.prefill(tokens, lengths, prefix), torch.Generator().manual_seed(0)
    got, mask = policy.generate(cache, 16, 12, 1.0, generator)
    for row, m in zip(got.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):
        n = next((i + 1 for i, t in enumerate(row) if t % 4 == 0), len(row))
        assert m == [True] * n + [False] * (len(row) - n)
    policy.stop = stop


def grads(policy, router=None):
    found = [p.grad.clone() for m in (policy, router) if m for p in m.parameters()]
    for m in (policy, router):
        if m:
            m.zero_grad()
    return found


def test_shared_prefill_equals_plain_copies(small):
    """Loss and gradients of 3 prompts x 2 are those of 6 separate rows that each run the whole text."""
    policy, _ = small
    tokens, lengths, prefix, answer, mask = example()
    prefix.requires_grad_()
    weight = torch.randn(3, 2, 1)
    logp, _ = policy.logprobs(policy.prefill(tokens, lengths, prefix), answer, mask)
    (logp * weight).sum().backward()
    shared, d_shared = grads(policy), prefix.grad.clone()
    prefix.grad = None
    copy = lambda t: t.repeat_interleave(2, 0)
    cache = policy.prefill(copy(tokens), copy(lengths), copy(prefix))
    logp2, _ = policy.logprobs(cache, answer.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None])
    (logp2 * weight.flatten(0, 1)[:, None]).sum().backward()
    torch.testing.assert_close(logp2.view_as(logp), logp, atol=1e-5, rtol=1e-5)
    for a, b in zip(shared + [d_shared], grads(policy) + [prefix.grad]):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert d_shared.abs().max() > 1e-3  # the prefix is learned from, through the cached keys and values


def test_token_logprobs_equal_autograd():
    """The chunked log-probability, its gradient and the entropy against log_softmax over the whole
    vocabulary."""
    h = torch.randn(37, 16, dtype=torch.float32, requires_grad=True)
    w, y, up = torch.randn(70, 16), torch.randint(0, 70, (37,)), torch.randn(37)
    logp, entropy = TokenLogprob.apply(h, w, y, 0.6, 8)
    (logp * up).sum().backward()
    got, h.grad = h.grad.clone(), None
    whole = (h @ w.T / 0.6).log_softmax(-1)
    want = whole.gather(1, y[:, None])[:, 0]
    (want * up).sum().backward()
    torch.testing.assert_close(logp, want)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got, h.grad, atol=1e-5, rtol=1e-4)


def test_sampler_draws_from_the_softmax():
    """Frequencies of 200,000 draws; impossible tokens never; temperature 0 is argmax; equal seeds, equal
    draws."""
    z = torch.randn(300)
    z[::3] = -torch.inf
    draw = lambda seed: sample(z.expand(40_000, -1), 0.8, torch.Generator().manual_seed(seed))
    drawn = draw(0)
    share = torch.bincount(drawn, minlength=300) / len(drawn)
    want = (z / 0.8).softmax(-1)
    assert (share - want).abs().max() < 5 * (want.max() / len(drawn)) ** 0.5
    assert share[::3].sum() == 0 and torch.equal(drawn, draw(0)) and not torch.equal(drawn, draw(1))
    assert sample(z[None], 0) == z.argmax()


@pytest.mark.parametrize("change, word", [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "gelu"),
    (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "dynamic")])
def test_policy_refuses_what_it_cannot_run(tmp_path, change, word):
    make_policy(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=word):
        Policy.load(tmp_path)


# -- the router
WIDTHS = (5, 12, 8)


def states(n=4, seed=0, widths=WIDTHS):
    """States (n, N, D), zero beyond each expert's width."""
    H = torch.randn(n, len(widths), max(widths), generator=torch.Generator().manual_seed(seed))
    for i, w in enumerate(widths):
        H[:, i, w:] = 0
    return H


def make_router(widths=WIDTHS, **settings):
    torch.manual_seed(0)
    return Router(widths, 32, **dict(latents=4, heads=2, dim=16, start=1.0) | settings)


@pytest.mark.parametrize("widths", [WIDTHS, [8, 8], [130, 500, 257], [256, 512]])
def test_fused_projection_equals_a_loop_over_experts(widths):
    """All of the router, written once more with a loop, unpadded states and torch's own attention; narrow
    experts are a slice each, wide ones several, some with a rest."""
    router, H = make_router(widths), states(widths=widths)
    router.standardise(states(64, seed=1, widths=widths))
    C, A = router(H)
    of = lambda t, i, w: t[router.owner == i].flatten(0, 1)[:w]  # what slices hold of expert i
    x = [H[:, i, :w] * of(router.gain, i, w) + of(router.shift, i, w) for i, w in enumerate(widths)]
    E = [x[i].clamp(-10, 10) @ of(router.project, i, w) + router.identity[i] for i, w in enumerate(widths)]
    E = router.norm_in(torch.stack(E, 1))
    k, v = router.to_kv(E).chunk(2, -1)
    q = router.to_q(router.norm_latent(router.latents))
    heads = lambda x: x.unflatten(-1, (2, 8)).transpose(-3, -2)
    y = F.scaled_dot_product_attention(heads(q).expand(4, -1, -1, -1), heads(k), heads(v))
    z = router.latents + router.to_z(y.transpose(1, 2).flatten(-2))
    z = z + router.mlp(router.norm_mlp(z))
    torch.testing.assert_close(C, router.out(router.norm_out(z)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(A.sum(-1), torch.ones(4, 2, 4))


def test_padding_never_matters():
    """Whatever stands beyond an expert's width, the context is the same."""
    router, H = make_router(), states()
    dirty = H.clone()
    dirty[:, 0, 5:] = 7.0
    torch.testing.assert_close(router(dirty)[0], router(H)[0])


def test_masked_expert_has_no_influence_and_no_gradient():
    router, H = make_router(), states()
    mask = torch.tensor([True, False, True])
    C, A = router(H, mask)
    assert (A[..., 1] == 0).all()
    H2 = H.clone()
    H2[:, 1] = torch.nan
    torch.testing.assert_close(router(H2, mask)[0], C)
    C.square().sum().backward()
    assert (router.project.grad[1] == 0).all() and (router.identity.grad[1] == 0).all()
    assert router.project.grad[0].abs().max() > 0


def test_fresh_context_is_near_zero_and_every_part_learns():
    router = make_router(start=0.02)
    C, _ = router(states())
    assert C.shape == (4, 4, 32) and 0 < C.abs().max() < 0.2
    C.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())


def test_standardised_states_have_zero_mean_and_unit_spread():
    router, H = make_router(), states(500) * 3 + 5
    H[:, 0, 5:] = 0
    router.standardise(H)
    x = H * router.gain + router.shift
    assert x.mean(0).abs().max() < 1e-5 and (x[:, 1].std(0) - 1).abs().max() < 1e-4
    assert (x[:, 0, 5:] == 0).all()


def test_router_is_one_graph():
    """torch.compile finds nothing that it would have to leave to Python, with a mask and without."""
    router, H, mask = make_router(), states(), torch.tensor([True, False, True])
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for more in ((), (mask,)):
        torch.testing.assert_close(compiled(H, *more), router(H, *more))


def test_router_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        C, A = make_router()(states())
    assert torch.isfinite(C).all() and A.dtype == torch.float32


# -- GRPO
def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    got = advantages(r)
    torch.testing.assert_close(got[:2], torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]))
    torch.testing.assert_close(got[2], torch.tensor([3.0, -1, -1, -1]) / 3 ** 0.5)  # spread is sqrt(3)/4
    torch.testing.assert_close(advantages(r, scale=False)[2], torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_grpo_loss_by_hand():
    """Two tokens, one masked; ratio 1.5 clipped to 1.2 without gradient; then k3 = e^x - x - 1 at x = ln
    2."""
    ln = math.log
    logp = torch.tensor([[[ln(0.3), -9.0]]], requires_grad=True)
    old, mask = torch.tensor([[[ln(0.2), -1.0]]]), torch.tensor([[[True, False]]])
    up, down = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    loss = grpo_loss(logp, old, None, up, mask, 1)
    loss.backward()
    assert abs(loss.item() + 1.2) < 1e-6 and (logp.grad == 0).all()
    assert abs(grpo_loss(logp, old, None, down, mask, 1).item() - 1.5) < 1e-6  # not clipped
    assert abs(grpo_loss(logp, old, None, up, mask, 1, clip=(0.2, 0.6)).item() + 1.5) < 1e-6  # clip-higher
    ref = torch.tensor([[[ln(0.6), 0.0]]])
    got = grpo_loss(logp, logp.detach(), ref, up, mask, 2, beta=0.1)
    assert abs(got.item() - (-1 + 0.1 * (2 - ln(2) - 1)) / 2) < 1e-6


def step_example(small, lengths=None):
    policy, _ = small
    tokens, lengths, _, answer, mask = example(prefix=False)
    batch = Batch(["a", "b", "c"], tokens, lengths, states(3))
    rewards = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    sampled = Rollout(batch.problems, answer, mask, None, None, rewards, None, None, 1.0)
    return policy, make_router(), batch, sampled


HOW = dict(temperature=0.8, beta=0.04, clip=(0.2, 0.2), dr=False, max_new=6)


@pytest.mark.parametrize("dr", [False, True])
def test_micro_batches_change_nothing(small, dr):
    policy, router, batch, sampled = step_example(small)
    found = []
    for micro in (1, 2, 3):
        _, sums = gradients(policy, router, batch, sampled, micro=micro, **HOW | dict(dr=dr))
        found.append((grads(policy, router), sums))
    for g, sums in found[1:]:
        for a, b in zip(g, found[0][0]):
            assert (a - b).norm() < 1e-4 * b.norm() + 1e-8
        assert sums == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)


def test_router_learns_through_the_training_forward(small):
    policy, router, batch, sampled = step_example(small)
    gradients(policy, router, batch, sampled, micro=3, **HOW)
    assert router.project.grad.abs().max() > 0 and policy.blocks[0].qkv.A.grad.abs().max() > 0
    grads(policy, router)


def test_reference_is_the_plain_policy(small):
    """LoRA off and prefix off: what transformers gives for the bare prompt; and `plain` leaves LoRA as it
    was."""
    policy, hf = small
    tokens, lengths, _, answer, mask = example(prefix=False)
    batch = Batch(["a", "b", "c"], tokens, lengths, None)
    got = reference_logprobs(policy, batch, answer, mask, 0.8)
    with torch.no_grad():
        for b in range(3):
            want = twin_logprobs(policy, hf, tokens[b, :lengths[b]], None, answer[b, 1], 0.8)
            torch.testing.assert_close(got[b, 1], want, atol=1e-4, rtol=1e-4)
    assert all(m.on for m in policy.adapters())


def test_stop_token_has_gradient(small):
    """Making only the last token of a completion (its stop token) more likely moves the weights."""
    policy, _, batch, sampled = step_example(small)
    logp, _ = policy.logprobs(policy.prefill(batch.tokens, batch.lengths), sampled.tokens, sampled.mask)
    last = torch.zeros_like(sampled.mask)
    last[1, 0, 2] = True  # this completion has three tokens
    logp[last & sampled.mask].sum().backward()
    assert max(g.abs().max() for g in grads(policy)) > 0


def test_not_finite_gradient_is_skipped_and_counted(small):
    policy, router, batch, sampled = step_example(small)
    optimizer = make_optimizer(policy, router, 1e-3, 1e-3, (0.9, 0.98), 0.0)
    before = [p.clone() for p in router.parameters()]
    batch.H[0, 0, 0] = torch.nan
    assert update(policy, router, batch, sampled, optimizer, micro=3, **HOW)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, router.parameters()))


def test_inner_epochs_keep_the_first_logprobs(small):
    """A second pass on the same samples has ratios other than 1: its loss is no longer the first pass's."""
    policy, router, batch, sampled = step_example(small)
    old, first = gradients(policy, router, batch, sampled, micro=2, **HOW | dict(beta=0.0))
    with torch.no_grad():
        for p in router.parameters():
            p += 0.05
    again, second = gradients(policy, router, batch, sampled, micro=2, old=old, **HOW | dict(beta=0.0))
    grads(policy, router)
    assert torch.equal(old, again) and abs(first["loss"]) < 0.2 and abs(first["loss"] - second["loss"]) > 1e-4


def test_warm_up_then_constant():
    group = dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=0.0, peak=2.0)
    optimizer = torch.optim.SGD([group])
    rates = []
    for step in range(6):
        set_rate(optimizer, step, 4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


class Says:
    """A tokenizer for the toy: a token is its number."""
    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)) for row in rows]


def test_listening_is_learned_when_it_is_the_only_way(tmp_path):
    """Every prompt is the same; the answer stands in the state of expert 1 of 3. Alone, one answer in four is
    right."""
    make_policy(tmp_path, vocab_size=12, num_hidden_layers=2)
    policy, router = Policy.load(tmp_path, neutral="mean"), make_router(start=0.1)
    optimizer = make_optimizer(policy, router, 5e-3, 1e-2, (0.9, 0.98), 0.0)
    generator = torch.Generator().manual_seed(0)
    Verdict = namedtuple("Verdict", "reward")
    verify = lambda text, problem, cut: Verdict(float(text.split()[0] == str(problem)))
    mean = 0.0
    for step in range(120):
        answers = torch.randint(2, 6, (16,), generator=generator)
        H = states(16, seed=step)
        H[:, 1] = F.one_hot(answers, 12).float() * 4
        batch = Batch(answers.tolist(), torch.full((16, 3), 7), torch.full((16,), 3), H)
        sampled = rollout(policy, router, batch, Says(), verify, 8, 1, 1.0, generator)
        update(policy, router, batch, sampled, optimizer, micro=16,
               **HOW | dict(temperature=1.0, max_new=1, beta=0.0))
        mean = 0.9 * mean + 0.1 * sampled.rewards.mean().item()
    assert mean > 0.8
    assert sampled.attention[..., 1].mean() > 0.4


# -- the ways to collaborate, their controls, what is measured
def test_a_prefix_is_constant_and_learns(small):
    policy, _, batch, sampled = step_example(small)
    batch.H = torch.empty(3, 0, 0)
    prefix = collab.Prefix(4, 32, start=0.02)
    context, attention = listen(prefix, batch.H)
    assert context.shape == (3, 4, 32) and attention is None and 0.01 < context.std() < 0.03
    assert torch.equal(context[0], context[1]) and torch.equal(context[0], context[2])
    gradients(policy, prefix, batch, sampled, micro=2, **HOW)
    assert (prefix.vectors.grad.norm(dim=1) > 0).all()
    grads(policy, prefix)


def make_hard(eye=3):
    """Three experts and, as a fourth column, the eye; and the Router with the same weights."""
    torch.manual_seed(0)
    how = (32, 4, 2, 16, 1.0, 1.0)
    hard, router = collab.Hard((*WIDTHS, 7), *how, eye=eye, N=3), Router(WIDTHS, *how)
    hard.standardise(seen(64, 1))
    shared = {k: v for k, v in hard.state_dict().items() if "head" not in k}
    router.load_state_dict(shared | {k: shared[k][:3] for k in ("shift", "gain")})
    return hard, router


def seen(n=4, seed=0):
    eye = F.pad(torch.randn(n, 1, 7, generator=torch.Generator().manual_seed(seed + 9)), (0, 5))
    return torch.cat((states(n, seed) * 2 + 1, eye), 1)


def test_hard_hears_one_and_as_the_router_would():
    hard, router = make_hard()
    H = seen(12)
    context, A = hard(H)
    assert A.shape == (12, 2, 4, 3) and set(A.unique().tolist()) == {0.0, 1.0} and (A.sum(-1) == 1).all()
    chosen = A[:, 0, 0].bool()
    assert chosen.any(0).sum() > 1  # it is the problem that decides
    want, attention = router(H[:, :3], chosen)
    torch.testing.assert_close(context, want)
    torch.testing.assert_close(A, attention)
    x = (H * hard.gain + hard.shift).clamp(-10, 10)[:, 3]
    assert torch.equal(hard.head(x).argmax(-1), chosen.float().argmax(-1))
    mask = torch.tensor([True, False, True])  # an absent expert is never chosen, whatever its states hold
    broken = H.clone()
    broken[:, 1] = torch.nan
    context, A = hard(broken, mask)
    assert (A[..., 1] == 0).all() and torch.isfinite(context).all()
    context.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in hard.parameters())


def test_hard_learns_of_every_expert():
    """Head and projections have the gradient of a softmax mixture of all, at the place of the choice."""
    hard, _ = make_hard()
    H = seen(6)
    hard(H)[0].square().sum().backward()
    got = [hard.head.weight.grad.clone(), hard.project.grad.clone()]
    hard.zero_grad()
    x = hard.standard(H)
    p, E = hard.head(x[:, 3]).softmax(-1), hard.entries(x[:, :3])
    chosen = E[torch.arange(6), p.argmax(-1)][:, None].detach().requires_grad_()
    (slope,) = torch.autograd.grad(hard.attend(chosen)[0].square().sum(), chosen)  # (B, 1, dim)
    (slope * p[..., None] * E).sum().backward()
    for a, b in zip(got, (hard.head.weight.grad, hard.project.grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert (a.flatten(1).norm(dim=1) > 0).all()  # of every expert


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_shuffled_is_a_fixed_derangement_within_a_split(n):
    some = [Problem(f"{split} {i}", "", split=split) for i in range(n) for split in ("train", "val")]
    partner = collab.others(some, seed=0)
    assert sorted(partner) == list(range(2 * n)) and all(i != p for i, p in enumerate(partner))
    assert all(some[i].split == some[p].split for i, p in enumerate(partner))
    assert partner == collab.others(some, seed=0)
    longer = [Problem(f"train {i}", "") for i in range(n + 7)]  # prolonged: all but one stay as they are
    assert collab.others(longer, 0)[:n - 1] == collab.others(longer[:n], 0)[:n - 1]
    with pytest.raises(ValueError, match="--val"):
        collab.others(some[:3], 0)


def test_noise_has_the_given_moments_and_is_a_problems_own():
    some = [Problem(f"{i}", "") for i in range(4000)]
    mean, spread = torch.randn(3, 5) * 4, torch.rand(3, 5)
    spread[0, 3:], mean[0, 3:] = 0, 0  # beyond an expert's width
    H = collab.noise(some, mean, spread, seed=1)
    assert ((H.mean(0) - mean).abs() <= 5 * spread / 4000 ** 0.5).all()
    assert ((H.std(0) - spread).abs() <= 5 * spread / 8000 ** 0.5).all() and not H[:, 0, 3:].any()
    assert torch.equal(collab.noise(some[7:9], mean, spread, 1), H[7:9])
    assert not torch.equal(collab.noise(some[7:9], mean, spread, 2), H[7:9])


def test_untrained_experts_are_the_same_strangers_every_time(tmp_path):
    folder = make_expert(tmp_path / "m")
    torch.manual_seed(5)
    one, before = Expert(folder, untrained=True), torch.get_rng_state()
    H = one.states(TEXTS)
    assert torch.equal(torch.get_rng_state(), before)  # the run's own numbers are not touched
    assert torch.equal(H, Expert(folder, untrained=True).states(TEXTS))
    assert (H - Expert(folder).states(TEXTS)).abs().max() > 0.1
    assert one.fingerprint != Expert(folder).fingerprint and one.width == Expert(folder).width


def make_writer(folder, kind="llama", penalty=1.0):
    """A random causal model whose words are all sorts, some of them line ends; its path."""
    make_expert(folder, kind)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](**SIZES, eos_token_id=7))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.generation_config.repetition_penalty = penalty
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind, penalty", [("llama", 1.0), ("neox", 1.0), ("llama", 5.0)])
def test_what_an_expert_writes_is_its_own_alone(tmp_path, monkeypatch, kind, penalty):
    """Greedy, token by token from the bare model: whatever is padded beside it, whatever its own settings."""
    expert = collab.Writer(make_writer(tmp_path / "m", kind, penalty), 6)
    [got] = zip(*collab.write([expert], [TEXTS], progress=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(expert.folder).eval()
    for text, (name, said, n) in zip(TEXTS, got):
        ids = expert.tokenizer(text)["input_ids"]
        before = len(ids)
        with torch.no_grad():
            while len(ids) < before + 6:
                best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
                if best == 7:
                    break
                ids.append(best)
        assert (name, said, n) == ("m", expert.tokenizer.decode(ids[before:], True), len(ids) - before)
    assert expert.model is None and len({said for _, said, _ in got}) > 1
    monkeypatch.setattr(Expert, "load", lambda self: pytest.fail("a cached text was written again"))
    again = collab.Writer(expert.source, 6)
    assert [x for (x,) in collab.write([again], [TEXTS], progress=False)] == list(got)
    others = Expert(expert.source), collab.Writer(expert.source, 5)
    assert again.fingerprint not in {other.fingerprint for other in others}


def test_encoders_are_known_and_do_not_write(tmp_path, capsys):
    bert, llama = make_expert(tmp_path / "b", "bert"), make_writer(tmp_path / "l")
    assert Expert(bert).encoder and not Expert(llama).encoder and not Expert("tiny/logic").encoder
    args = dict(collab="text", write=2, device="cpu", experts=[bert, llama])
    assert [e.name for e in collab.assemble(args)[0]] == ["l"] and "b: an encoder" in capsys.readouterr().out
    with pytest.raises(ValueError, match="causal"):
        collab.assemble(args | dict(experts=[bert]))
    args |= dict(collab="hard", control="none", read="last", layer=-1, policy="tiny/policy")
    assert len(collab.assemble(args)[1]) == 2  # the encoder chooses, and is an expert too
    readers = collab.assemble(args | dict(experts=[llama]))[1]
    assert not any(e.untrained for e in readers)
    assert all(e.untrained for e in collab.assemble(args | dict(control="untrained"))[1])
    assert [e.read for e in readers] == ["last", "mean"]  # no encoder: the policy's own state chooses


def test_entropy_and_choices_by_hand():
    some = [Problem("", "", dataset=d) for d in "aab"]
    A = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75]])[:, None, None].expand(3, 2, 4, 3)
    got = collab.listening(some, A, ["x", "y", "z"])
    want = (0 + math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 3
    assert got["attention_entropy"] == pytest.approx(want)
    assert got["choices"] == {"a": {"x": 2}, "b": {"z": 1}}
    assert got["attention_map"] == [[[0.5, 0.25, 0.25]] * 4] * 2


def test_mutual_information_by_hand():
    mi = collab.mutual_information
    assert mi([]) == mi([{}]) == 0 and mi([{"a": {"x": 3, "y": 5}}]) == 0  # one dataset
    assert mi([{"a": {"x": 2}}, {"b": {"y": 1}}, {"b": {"y": 1}}]) == pytest.approx(math.log(2))
    assert mi([{"a": {"x": 2, "y": 4}, "b": {"x": 1, "y": 2}}]) == pytest.approx(0)  # independent
    want = 2 * (3 / 8 * math.log(3 / 2) + 1 / 8 * math.log(1 / 2))
    assert mi([{"a": {"x": 3, "y": 1}, "b": {"x": 1, "y": 3}}]) == pytest.approx(want)


def test_what_the_prefix_does_and_who_learns(small):
    """The effect by hand, for the first prompts alone; nothing without a prefix; the gradient norms before
    the clip."""
    policy, router, batch, sampled = step_example(small)
    with torch.no_grad():
        how = (sampled.tokens, sampled.mask, 0.8)
        logp, bare = (policy.logprobs(policy.prefill(batch.tokens, batch.lengths, c), *how)[0]
                      for c in (router(batch.H)[0], None))
    for share, first in ((1, 3), (2, 1)):
        want = k3(logp, bare)[:first][sampled.mask[:first]].mean().item()
        got = prefix_effect(policy, batch, sampled, logp, 0.8, 2, share)
        assert got == pytest.approx(want, rel=1e-3) and want > 0.01
    assert prefix_effect(policy, batch, sampled, bare, 0.8, 2) == pytest.approx(0, abs=1e-6)
    gradients(policy, router, batch, sampled, micro=3, **HOW)
    norms = [p.norm().item() for p in router.project.grad]
    grads(policy, router)
    nothing = torch.optim.SGD([*policy.parameters(), *router.parameters()], lr=0.0)
    now = prefix_effect(policy, batch, sampled, logp, 0.8, 3)  # not as it is when the step has been taken
    kept = copy.deepcopy((policy.state_dict(), router.state_dict()))
    big = torch.optim.SGD([*policy.parameters(), *router.parameters()], lr=1.0)
    sums = update(policy, router, batch, sampled, big, max_norm=1.0, micro=3, **HOW)
    assert sums["expert_grad"] == pytest.approx(norms, rel=1e-4)
    assert sums["prefix_kl"] == pytest.approx(now, rel=1e-3) and now > 0.01
    assert abs(prefix_effect(policy, batch, sampled, logp, 0.8, 3) / now - 1) > 0.01
    policy.load_state_dict(kept[0])
    router.load_state_dict(kept[1])
    sums = update(policy, None, batch, sampled, nothing, micro=3, **HOW)
    assert sums["expert_grad"] == [] and sums["prefix_kl"] == 0.0


def test_majority_by_hand():
    vote = lambda *texts: majority([(text, number(text) == 18) for text in texts])
    assert vote("17", "18", "$18.00") and not vote("17", "17", "18") and not vote("17", "18")
    assert vote("18", "17") and vote("", "", "18") and not vote("", "")


# -- checkpoints
def test_checkpoint_comes_back_whole_and_damage_is_found(tmp_path, small):
    policy, router, batch, sampled = step_example(small)
    optimizer = make_optimizer(policy, router, 1e-3, 1e-3, (0.9, 0.98), 0.0)
    generator = torch.Generator().manual_seed(3)
    update(policy, router, batch, sampled, optimizer, micro=3, **HOW)
    where = (policy, router, optimizer, generator)
    checkpoint.save(tmp_path / "step-000001.safetensors", *where, step=1)
    kept = [p.detach().clone() for p in router.parameters()]
    expected = torch.rand(3, generator=generator)
    update(policy, router, batch, sampled, optimizer, micro=3, **HOW)
    checkpoint.save(tmp_path / "step-000002.safetensors", *where, step=2)
    path = tmp_path / "step-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        state = checkpoint.load_last(tmp_path, *where)
    assert state["step"] == 1 and torch.equal(expected, torch.rand(3, generator=generator))
    assert all(torch.equal(a, b) for a, b in zip(kept, router.parameters()))
    with pytest.raises(ValueError, match="other models"):
        checkpoint.load(tmp_path / "step-000001.safetensors", policy, make_router(dim=32))


# -- the loop, on the embedded pool
QUICK = "--batch 6 --group 4 --val 12 --test 12 --eval-every 5 --save-every 5".split()
NAMES = {"reward", "accuracy", "length", "clipped", "zero_spread", "kl", "entropy", "grad_norm"}


def run_train(out, *more):
    return train.main([*QUICK, "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of ten steps of the default command, made small; the embedded pool, its own cache of
    states."""
    folder = tmp_path_factory.mktemp("run")
    os.environ["N_MUSKETEERS_CACHE"] = str(folder / "cache")
    assert run_train(folder / "ten", "--steps", 10) == 0
    yield folder / "ten"
    del os.environ["N_MUSKETEERS_CACHE"]


def rows(out, name="metrics.jsonl"):
    return [json.loads(x) for x in (out / name).read_text().splitlines()]


NAMED = {"arithmetic", "logic", "algorithmic"}
TIMES = ("gen_s", "train_s", "tokens_s", "memory_mb")


def test_a_run_writes_down_what_it_did(finished):
    """Every row has the fixed metric names, shares lie between 0 and 1, attention sums to 1."""
    assert {p.name for p in finished.iterdir()} >= {"config.json", "eval.json", "run.png", "best.safetensors"}
    assert [r["step"] for r in rows(finished)] == list(range(1, 11))
    for r in rows(finished):
        assert set(r) >= NAMES | set(TIMES)
        assert all(0 <= r[k] <= 1 for k in ("reward", "accuracy", "clipped", "zero_spread"))
        assert set(r["attention"]) == {"arithmetic", "logic", "algorithmic"}
        assert sum(r["attention"].values()) == pytest.approx(1, abs=1e-5) and sum(r["reasons"].values()) == 24
    assert all("val" in r for r in rows(finished) if r["step"] % 5 == 0)
    assert {s["reason"] for s in rows(finished, "samples.jsonl")} <= set(REASONS)
    config = json.loads((finished / "config.json").read_text())
    assert config["args"]["task"] == "arithmetic+logic+algorithmic" and config["versions"]["torch"]


def test_five_and_five_steps_equal_ten(finished, tmp_path):
    """Stopped at 5 and resumed to 10: the same weights, moments, generator and metrics, bit for bit."""
    assert run_train(tmp_path / "two", "--steps", 5) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "two"), "--steps", "10"]) == 0
    name = "step-000010.safetensors"
    one, two = (load_file(folder / name) for folder in (finished, tmp_path / "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    strip = lambda out: [{k: v for k, v in r.items() if k not in TIMES} for r in rows(out)]
    assert strip(finished) == strip(tmp_path / "two")


def test_a_stop_during_validation_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the worst moment: the step is saved, and the resumed run is the undisturbed one."""
    def interrupted(run, step, bar, validate=train.validate):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(run, step, bar)

    with monkeypatch.context() as m:
        m.setattr(train, "validate", interrupted)
        assert run_train(tmp_path / "run", "--steps", 10) == 0
    assert "go on with" in capsys.readouterr().out and len(rows(tmp_path / "run")) == 5
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    one, two = (load_file(folder / "step-000010.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_whose_checkpoints_are_damaged_is_not_started_over(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run").glob("step-*"):
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning):
        assert train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "12"]) == 2
    assert "--out" in capsys.readouterr().err and len(rows(tmp_path / "run")) == 10


def test_shots_are_not_trained_on():
    """Not even when a small dataset comes round again: the answer would stand in the prompt."""
    args = dict(task="algorithmic", level="tiny", data=None, shots=2, batch=36, seed=0)
    items, shots = ordered(args, 7200)
    assert len(items) == 7200 and len(shots) == 2
    assert not {p.question for p in items} & {p.question for p in shots}


def test_resuming_a_finished_run_leaves_it_alone(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train.main(["--resume", "--out", str(finished)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_eval_reports_the_run(finished, capsys):
    """The JSON is the last line, agrees with the report at the end of training, and pass@1 <= pass@2."""
    assert eval_main([str(finished), "--n", "12", "--samples", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((finished / "eval.json").read_text())
    assert report["after"] == kept["after"] and report["before"] == kept["before"] and report["n"] == 12
    low, high = report["after"]["ci95"]
    assert 0 <= low <= report["after"]["strict"] <= high <= 1
    assert report["pass_at"]["1"] <= report["pass_at"]["2"]
    assert set(report["silenced"]) == {"arithmetic", "logic", "algorithmic"}


def test_ask_shows_who_was_listened_to(finished, capsys):
    assert eval_main([str(finished), "--ask", "State the final answer: 1 + 2 + 3 + 4 ="]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("arithmetic", "logic", "algorithmic"))


def test_single_has_no_experts_and_the_same_lora(finished, tmp_path):
    """--collab single is the same run without router: same problems, same first LoRA weights."""
    assert run_train(tmp_path / "single", "--steps", 1, "--collab", "single") == 0
    assert rows(tmp_path / "single")[0]["attention"] == {}
    kept = load_file(tmp_path / "single" / "step-000001.safetensors")
    assert not any(k.startswith("router") for k in kept)
    questions = lambda out: {s["question"] for s in rows(out, "samples.jsonl") if s["step"] == 1}
    assert questions(tmp_path / "single") == questions(finished)


@pytest.mark.parametrize("way, control", [("hard", "shuffled"), ("soft", "noise"), ("prefix", "none"),
                                          ("text", "none")])
def test_every_way_trains_and_is_found_again(way, control, finished, tmp_path, capsys, monkeypatch):
    """Trained, written down with its cost, loaded and measured again with the same result, asked, tabled."""
    out = tmp_path / "run"
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(finished.parent / "cache"))
    assert run_train(out, "--steps", 2, "--collab", way, "--control", control) == 0
    config = json.loads((out / "config.json").read_text())
    tokens, routed = config["tokens"], way in ("soft", "hard")
    assert (config["trainable"]["router"] > 0) == (way != "text") and config["trainable"]["lora"] > 0
    assert (tokens["experts_read"] > 0) == (way != "prefix")
    assert tokens["experts_write"] == 3 * (way == "text")
    for row in rows(out):
        assert set(row["expert_grad"]) == set(row["attention"]) == set(NAMED if routed else ())
        assert len(row["attention_map"]) == 4 * routed and (row["prefix_kl"] > 0) == (way != "text")
    capsys.readouterr()
    assert eval_main([str(out), "--n", "12", "--samples", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((out / "eval.json").read_text())
    assert all(report[key] == kept[key] for key in kept) and ("silenced" in report) == routed
    assert report["majority_at"].keys() == report["pass_at"].keys() == {"1", "2"}
    assert eval_main([str(out), "--ask", "State the final answer: 1 + 2 + 3 + 4 ="]) == 0
    assert ("logic" in capsys.readouterr().out) == (routed or way == "text")
    label = f"| {way}, {control} |" if control != "none" else f"| {way} |"
    assert label in table([out, finished]) and "| soft |" in table([out, finished])


def test_statistics_by_hand():
    assert stats.mcnemar([1] * 5 + [0, 1], [0] * 5 + [0, 1]) == 0.0625
    assert stats.mcnemar([1, 0, 1], [1, 0, 1]) == 1 == stats.mcnemar([1, 0], [0, 1])
    assert stats.mcnemar([0, 0, 0, 1], [1, 1, 1, 0]) == pytest.approx(2 * 5 / 16)
    assert stats.interval([1, 1, 1]) == [1, 1]
    low, high = stats.interval([0, 1] * 200)  # of a share of one half: 0.5 -+ 1.96 * 0.5 / sqrt(400)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)
    seeds = [[0] * 50 + [1] * 50, [1] * 100, [0] * 100]  # it is they that differ
    wide = stats.interval(seeds)
    assert wide[0] < 0.1 and wide[1] > 0.9 and wide == stats.interval(seeds)
    assert stats.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert stats.spearman([1, 2, 3], [3, 3, 3]) is None
    assert stats.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ties share 2.5


def test_drift_alone_is_no_relation():
    """Two series that have nothing in common but that both move: without the trend it shows."""
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 300)
    x, y = t + 0.1 * torch.randn(300, generator=g), -t ** 0.5 + 0.1 * torch.randn(300, generator=g)
    got = stats.together(range(300), x.tolist(), y.tolist())
    assert got["rho"] < -0.7 and abs(got["detrended"]) < 0.15
    z = (y - 0.3 * torch.randn(300, generator=g)).tolist()
    assert stats.together(range(300), z, [-v for v in z])["detrended"] == pytest.approx(-1)


def test_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y, X = torch.randint(0, 10, (700,), generator=g), torch.randn(700, 24, generator=g)
    fit, held = analysis.linear(X[:500], y[:500], X[500:], y[500:])
    assert held < 0.2
    planted = X + F.one_hot(y).float() @ torch.randn(10, 24, generator=g) * 3 + 100
    fit, held = analysis.linear(planted[:500], y[:500], planted[500:], y[500:])
    assert fit > 0.98 and held > 0.97
    asked = analysis.classes(["-17", "8"])
    assert asked == {"ones digit": [7, 8], "tens digit": [1, 0], "sign": [True, False]}
    assert analysis.classes(["a", "b", "a"], common=1) == {"answer": ["a", None, "a"]}


@pytest.fixture(scope="module")
def loaded(finished):
    run = load_run(finished)
    run.prepare(run.items["test"])
    run.router.out.weight.data.mul_(20)  # so that attention is seen in the answers
    return run


def test_ablations_are_what_they_say(loaded):
    run, items = loaded, loaded.items["test"]
    H, own = run.batch(items).H, loaded.router
    _, static = analysis.stand_in(run, "static")
    some = run.items["train"][:run.args["steps"] * run.args["batch"]]
    with torch.no_grad():
        mean = own(run.batch(some).H)[1].mean(0)
        context, A = static(H)
        torch.testing.assert_close(A, mean.expand_as(A))
        E = own.entries(own.standard(H))
        v = own.to_kv(E).chunk(2, -1)[1].unflatten(-1, (own.heads, -1)).transpose(1, 2)
        z = own.latents + own.to_z((mean @ v).transpose(1, 2).flatten(-2))  # Router.attend, with that mean
        torch.testing.assert_close(context, own.out(own.norm_out(z + own.mlp(own.norm_mlp(z)))))
        assert not torch.allclose(context, own(H)[0], atol=1e-4)
        assert (analysis.stand_in(run, "uniform")[1](H)[1] == torch.tensor(1 / 3)).all()
        zero = analysis.stand_in(run, "zero")[1](H)[0]
        assert zero.shape == context.shape and not zero.any()
    batch = run.batch(items)  # and the policy reads the neutral vector in every place
    kept = run.policy.prefill(batch.tokens, batch.lengths, zero).keys[-1]
    word = run.policy.embed[0].clone()
    run.policy.embed[0] = run.policy.neutral
    eight = torch.zeros(12, 8, dtype=torch.long)
    told = run.policy.prefill(torch.cat((eight, batch.tokens), 1), batch.lengths + 8).keys[-1]
    run.policy.embed[0] = word
    real = int(batch.lengths.min()) + 8
    torch.testing.assert_close(kept[:, :, :real], told[:, :, :real])
    moved = analysis.shuffled(run, items).batch(items).H
    same = (moved[:, None] == H[None]).flatten(2).all(2)  # each has the states of one other problem
    assert (same.sum(1) == 1).all() and (same.sum(0) == 1).all() and not same.diagonal().any()


def test_dropping_is_silencing(loaded):
    kinds = [f"drop:{name}" for name in NAMED] + ["uniform", "shuffle"]
    got = analysis.ablate(loaded, kinds)
    for name, verdicts in analysis.silence(loaded, loaded.items["test"]).items():
        assert got["kinds"][f"drop:{name}"]["right"] == [v.strict for v in verdicts]
    whole = got["kinds"]["shuffle"]
    parts = whole["by_dataset"].values()
    assert sum(p["n"] for p in parts) == whole["n"] == 12
    assert whole["trained"] == pytest.approx(sum(got["right"]) / 12)


@pytest.mark.parametrize("way, kind, words", [
    ("soft", "nonsense", "drop:NAME"), ("soft", "drop:nobody", "arithmetic"), ("hard", "static", "shuffle"),
    ("prefix", "uniform", "soft"), ("single", "zero", "single"), ("text", "shuffle", "text")])
def test_a_senseless_ablation_is_refused(loaded, way, kind, words):
    router = None if way in ("single", "text") else loaded.router
    other = replace(loaded, args=loaded.args | dict(collab=way), router=router)
    with pytest.raises(ValueError, match=words):
        analysis.stand_in(other, kind)


def test_figures_walk_and_table_of_a_run(finished, tmp_path, capsys):
    """From the folder and from a file of results/curves alike, without a model; then with it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert eval_main([str(run), "--ablate", "zero", "drop:logic", "--n", "12", "--json"]) == 0
    out = capsys.readouterr().out
    assert "| zero | all | 12 |" in out
    assert json.loads(out.splitlines()[-1])["kinds"].keys() == {"zero", "drop:logic"}
    report = json.loads((run / "eval.json").read_text())
    keys = "task control read seed attention_by silenced right"
    assert set(report["experts"]) == NAMED and -1 <= report["spearman"]["rho"] <= 1
    curve = {k: report[k] for k in (*keys.split(), "right_before", "heard", "datasets")}
    curve |= dict(id="x", mode="soft", curve=rows(run), seed=1)
    (tmp_path / "soft.json").write_text(json.dumps(curve))
    single = curve | dict(mode="single", heard=[], attention_by={}, silenced={}, right=[0] * 12)
    (tmp_path / "single.json").write_text(json.dumps(single))
    paths = [str(run), str(tmp_path / "soft.json"), str(tmp_path / "single.json")]
    assert eval_main([*paths, "--figures", "--out", str(tmp_path / "figures")]) == 0
    made = {p.name for p in (tmp_path / "figures").iterdir() if p.stat().st_size > 5000}
    assert made == {f"{p.__name__}.{kind}" for p, _ in figures.PICTURES for kind in ("png", "svg")}
    capsys.readouterr()
    assert eval_main([*paths, "--table"]) == 0
    out = capsys.readouterr().out
    assert "| soft | 0, 1 | 12 |" in out and "1 seeds |" in out
    assert f"{100 * sum(curve['right']) / 12:+z.1f} [" in out
    assert eval_main([str(run), "--walk"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110 and "H (1, 3, 160)" in out
    assert out.count("   advantage ") == 4  # of the group


def test_wilson_and_pass_at_k_by_hand():
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4) and wilson(0, 5)[0] == 0.0
    assert [pass_at(k, 4, 1) for k in (1, 2, 4)] == [0.25, 0.5, 1.0] and pass_at(2, 4, 0) == 0.0


@pytest.mark.parametrize("arguments, words", [
    ("--task chain_sun", "chain_sum"), ("--task gsm8k", "--pool small"), ("--experts", "--experts"),
    ("--group 0", "--group"), ("--batch 0", "--batch"), ("--policy tiny/policy", "--experts"),
    ("--policy nowhere/at/all --collab single", "nowhere/at/all"), ("--level terms=3", "level"),
    ("--task gsm8k --data nowhere --pool tiny", "nowhere"), ("--temperature 0", "temperature"),
    ("--template chat", "--template"), ("--device cuda", "--device"), ("--resume", "--out"),
    ("--layer 9", "layers"), ("--collab prefix --control noise", "--control noise"),
    ("--collab text --policy tiny/policy", "--experts"), ("--collab text --rank 0", "--rank 0"),
    ("--collab text --write 600", "--write"), ("--collab text --max-new 480", "--write"),
    ("--control shuffled --val 1", "--val"),
    ("--max-new 600", "window"), ("--experts tiny/none", "tiny/none"), ("--group 100000000", "GB")])
def test_a_mistake_gets_one_sentence(arguments, words, tmp_path, capsys, monkeypatch):
    """Exit code 2, the mend named, no traceback, and nothing half-written."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    small = [] if "--batch" in arguments else ["--batch", "2"]
    assert train.main(["--steps", "1", "--val", "2", "--test", "2", *small, *out, *arguments.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and not (tmp_path / "run").exists()


def test_out_of_another_run_is_refused(finished, capsys):
    assert run_train(finished, "--steps", 3) == 2 and "--resume" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(finished), "--seed", "7"]) == 2
    assert "seed" in capsys.readouterr().err


# -- several ranks, and where metrics go
def fixed_update(folder, how):
    """Gradients and sums of one update on given samples, of which a rank has its share; and whether a NaN
    that only the last rank sees was skipped."""
    policy, router = Policy.load(folder), Router((5, 12, 8), 32, latents=4, heads=2, dim=16, start=1.0)
    checkpoint.load(f"{folder}/weights.safetensors", policy, router)
    x = {k: ranks.share(v) for k, v in load_file(f"{folder}/example.safetensors").items()}
    names = ranks.share(["a", "b", "c"])
    sampled = Rollout(names, x["tokens"], x["mask"], None, None, x["rewards"], None, None, 1.0)
    batch = Batch(names, x["prompts"], x["lengths"], x["H"])
    still = torch.optim.SGD([*policy.parameters(), *router.parameters()], 0.0)
    sums = update(policy, router, batch, sampled, still, max_norm=1e9, micro=1, **how)
    found = {k: p.grad.clone() for k, p in checkpoint.trainable(policy, router).items() if p.requires_grad}
    if ranks.RANK == ranks.WORLD - 1:
        batch.H[-1] = torch.nan
    return found, sums, update(policy, router, batch, sampled, still, micro=1, **how)["skipped"]


def ranked(folder, how, quick):
    """What each of two processes does in the test below."""
    seen, summary = [], train.summary

    def noted(run, whole, *rest):
        seen.extend(p.question for p in whole.problems)
        if ranks.RANK == 1 and "halves" in run.args["out"] and len(seen) == 6 * 5:  # its second step
            os.kill(os.getpid(), signal.SIGTERM)
        return summary(run, whole, *rest)

    def finish(run, out):
        tensors = checkpoint.trainable(run.policy, run.router)
        assert len(set(ranks.gather(checkpoint.digest(tensors, "")))) == 1  # the same weights on all
        some = run.items["train"]
        texts = [[run.expert_text(p, e) for p in some] for e in run.experts]
        assert torch.equal(run.batch(some).H, read(run.experts, texts, progress=False).float())
        return 0

    train.finish, train.summary = finish, noted
    with ranks.started():
        group = weakref.ref(torch.distributed.group.WORLD)
        for dr in (False, True):
            found, sums, skipped = fixed_update(folder, how | dict(dr=dr))
            save_file(found, f"{folder}/grads-{dr}-{ranks.RANK}.safetensors",
                      {"rest": json.dumps([sums, skipped])})
        run = train.main.__wrapped__
        assert run([*quick, "--out", f"{folder}/whole"]) == 0
        assert run([*quick, "--out", f"{folder}/halves"]) == 0
        assert run(["--resume", "--out", f"{folder}/halves"]) == 0
        assert run([*quick, "--batch", "1", "--out", f"{folder}/none"]) == 2
    assert group() is None  # else its threads live on, and may abort the process as it ends
    Path(f"{folder}/seen-{ranks.RANK}.json").write_text(json.dumps(seen))


def test_two_ranks_are_one_run(finished, tmp_path, small, capsys):
    """On the same samples two ranks have the gradients of one; they take the same problems in the same order;
    a signal to one stops both, and the resumed run is the undisturbed one."""
    policy, router, batch, sampled = step_example(small)
    make_policy(tmp_path)
    checkpoint.save(tmp_path / "weights.safetensors", policy, router)
    save_file(dict(prompts=batch.tokens, lengths=batch.lengths, H=batch.H, tokens=sampled.tokens,
                   mask=sampled.mask, rewards=sampled.rewards), tmp_path / "example.safetensors")
    quick = "--batch 5 --group 4 --val 3 --test 3 --steps 4 --eval-every 2 --device cpu".split()
    program = "\n".join((
        "import json, os, signal, sys, torch, weakref, checkpoint, ranks, train", "from pathlib import Path",
        "from safetensors.torch import load_file, save_file", "from model import Policy",
        "from experts import read", "from rlvr import Batch, Rollout, update", "from router import Router",
        "torch.set_num_threads(1)", inspect.getsource(fixed_update), inspect.getsource(ranked),
        f"ranked({str(tmp_path)!r}, {HOW}, {quick})"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
               N_MUSKETEERS_TIMEOUT="1", N_MUSKETEERS_CACHE=str(finished.parent / "cache"))
    both = [subprocess.Popen([sys.executable, "-c", program], env=env | dict(RANK=r, LOCAL_RANK=r),
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in "01"]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], "\n".join(sum(said, ()))
    assert said[1][0] == "" and "--batch" in said[0][1]

    for dr in (False, True):
        one, sums, skipped = fixed_update(tmp_path, HOW | dict(dr=dr))
        assert skipped == 1
        for r in (0, 1):
            path = tmp_path / f"grads-{dr}-{r}.safetensors"
            two = load_file(path)
            assert two.keys() == one.keys()
            for k in one:
                torch.testing.assert_close(two[k], one[k], atol=1e-5, rtol=1e-5)
        with folders.safe_open(path, "pt") as f:
            theirs, skipped = json.loads(f.metadata()["rest"])
        del sums["prefix_kl"], theirs["prefix_kl"]  # of each rank's own first prompts
        assert theirs.pop("expert_grad") == pytest.approx(sums.pop("expert_grad"), rel=1e-4)
        assert skipped == 1 and dr or theirs == pytest.approx(sums, rel=1e-4, abs=1e-6)

    seen = [json.loads((tmp_path / f"seen-{r}.json").read_text()) for r in (0, 1)]
    alone = dict(task="arithmetic+logic+algorithmic", level="tiny", data=None, shots=0, batch=5, seed=0)
    order = [p.question for p in ordered(alone, 20)[0]]
    assert seen[0] == seen[1] == order + order  # `whole`, then `halves`
    assert [r["step"] for r in rows(tmp_path / "whole")] == [1, 2, 3, 4]
    one, two = (load_file(tmp_path / name / "step-000004.safetensors") for name in ("whole", "halves"))
    assert (tmp_path / "halves" / "step-000002.safetensors").exists()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "none").exists()
    assert train.main(["--resume", "--out", str(tmp_path / "whole")]) == 2
    assert "2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("kind, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_log_sends_every_number(kind, module, tmp_path, monkeypatch):
    """Where the package is there, a row goes to it; where it is not, one sentence says so."""
    monkeypatch.setitem(sys.modules, module, None)
    args = dict(log=kind, out=str(tmp_path))
    with pytest.raises(ValueError, match=f"pip install {kind}"):
        train.tracker(args)
    sent = {}
    fake = types.ModuleType(module)
    fake.init = lambda **_: types.SimpleNamespace(log=lambda row, step: sent.update({step: row}))
    fake.SummaryWriter = lambda _: types.SimpleNamespace(
        add_scalar=lambda k, v, step: sent.setdefault(step, {}).update({k: v}), flush=lambda: None)
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setenv("WANDB_MODE", "")
    del os.environ["WANDB_MODE"]
    train.tracker(args)(dict(step=3, reward=0.5, attention=dict(a=0.25)))
    assert sent == {3: {"step": 3, "reward": 0.5, "attention/a": 0.25}}
    assert kind != "wandb" or os.environ["WANDB_MODE"] == "offline"


# -- export
@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run as an export, made by the command."""
    folder = tmp_path_factory.mktemp("export") / "soft"
    assert eval_main([str(finished), "--export", str(folder)]) == 0
    return folder


def test_exported_lora_in_transformers(finished, tmp_path):
    """W + alpha / r * B A by PEFT's names, in transformers' model: our logits with LoRA, without prefix."""
    run = load_run(finished)
    wake_lora(run.policy)
    export.write(run, finished, tmp_path / "out", evaluated=False)
    assert "Not evaluated" in (tmp_path / "out" / "README.md").read_text()
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    hf = transformers.AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    tokens = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, changed = hf(tokens).logits[:, -1], set()
        for name in adapter:
            if name.endswith("lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = adapter[name.replace("lora_A", "lora_B")]
                hf.get_submodule(module).weight += config["lora_alpha"] / config["r"] * B @ adapter[name]
                changed.add(module.split(".")[-1])
        ours = run.policy.logits(run.policy.prefill(tokens, torch.tensor([20, 20])).last, run.policy.head)
        torch.testing.assert_close(ours, hf(tokens).logits[:, -1], atol=1e-4, rtol=0)
        assert (ours - before).abs().max() > 0.1 and changed == set(config["target_modules"])


def test_exported_router_and_prefix_can_be_rebuilt(finished, exported):
    """From router.json and router.safetensors alone."""
    said, tensors = json.loads((exported / "router.json").read_text()), load_file(exported / ROUTER)
    neutral, spread = tensors.pop("prefix.neutral"), tensors.pop("prefix.spread")
    router, run = Router(**said["router"]), load_run(finished)
    router.load_state_dict(tensors)
    H = torch.randn(2, 3, 160)
    torch.testing.assert_close(router(H)[0], run.router(H)[0], atol=0, rtol=0)
    assert torch.equal(neutral, run.policy.neutral) and spread == run.policy.spread


def test_an_export_is_the_run(finished, exported, tmp_path, monkeypatch, capsys):
    """The same report and the same texts, without the run's folder, in a folder elsewhere."""
    reports = []
    shutil.copytree(exported, tmp_path / "elsewhere")
    for where in ([str(finished)], ["--from", "elsewhere"]):
        assert eval_main([*where, "--n", "18", "--samples", "2", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        monkeypatch.chdir(tmp_path)
    assert reports[0].pop("spearman") and reports[0] == reports[1]  # an export has no log of the training
    runs = load_run(finished), export.load("elsewhere")
    items = runs[0].items["test"]
    for run in runs:
        run.prepare(items, progress=False)
    assert evaluate(runs[0], items)[:2] == evaluate(runs[1], items)[:2]
    assert eval_main(["--from", "elsewhere", "--ask", "State the final answer: 1 + 2 + 3 + 4 ="]) == 0
    assert "algorithmic" in capsys.readouterr().out


def test_export_takes_no_other_folder_and_leaves_no_rest(finished, exported, tmp_path, capsys):
    """A folder of something else stays as it is; over an export, one without a router leaves none behind."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "README.md", finished):
        before = sorted(finished.iterdir())
        assert eval_main([str(finished), "--export", str(place)]) == 2
        assert "is no export" in capsys.readouterr().err and sorted(finished.iterdir()) == before
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    shutil.copytree(exported, tmp_path / "out")
    assert run_train(tmp_path / "single", "--steps", 1, "--collab", "single") == 0
    (tmp_path / "single" / "eval.json").unlink()
    assert eval_main([str(tmp_path / "single"), "--export", str(tmp_path / "out")]) == 0
    assert "Not evaluated" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob("router*"))
    run = export.load(tmp_path / "out")
    assert run.router is None and not run.experts
    kept = load_file(tmp_path / "single" / "step-000001.safetensors")
    assert all(torch.equal(p, kept[f"policy.{name}"]) for name, p in run.policy.named_parameters())


def said(**change):
    """Of run.json's settings."""
    return "run.json", lambda info: info["args"].update(change)


def resaved(change):
    """Other tensors, with the checksum that fits them."""
    def harm(folder):
        tensors = change(load_file(folder / ROUTER))
        save_file(tensors, folder / ROUTER)
        edit(folder, "run.json", lambda info: info["sha256"].update({ROUTER: checkpoint.digest(tensors, "")}))
    return harm


ROUTER = "router.safetensors"
HARM = [  # (what a stranger changes in an export, what the one sentence names)
    (said(policy="../../policy"), "'../../policy'"), (said(policy="tiny/..\\..\\policy"), ".."),
    (said(experts=["tiny/arithmetic", "../logic", "tiny/algorithmic"]), "'../logic'"),
    (said(policy="someone/policy"), "'someone/policy' is not on this machine"),
    (said(policy="/nowhere/policy"), "'/nowhere/policy'"), (said(data="../data"), ".."),
    (said(experts=["tiny/logic", "tiny/logic", "tiny/algorithmic"]), "experts"),
    (said(rank=10**9), "4096"), (said(latents=10**9), "4096"), (said(rank=4), "adapter_config.json"),
    (said(cue=None), "cue"), (said(seed="0"), "seed"), (said(temperature=-1), "temperature"),
    (said(alpha=math.nan), "alpha"), (said(experts={}), "experts"), (said(policy=3), "policy"),
    (("adapter_config.json", lambda info: info.update(base_model_name_or_path="../x")), "base_model_name"),
    (("run.json", lambda info: info["policy"].update(fingerprint="0")), "policy"),
    (("run.json", lambda info: info.pop("args")), "args"), (("router.json", dict.clear), "router.json"),
    (lambda folder: (folder / "run.json").write_text("[" * 10**5), "RecursionError"),
    (lambda folder: (folder / "run.json").write_bytes(b"\xff"), "cannot be used"),
    (lambda folder: (folder / "run.json").unlink(), "run.json"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model"),
    (lambda folder: (folder / ROUTER).write_bytes((folder / ROUTER).read_bytes()[:-8]), "Safetensor"),
    (lambda folder: (folder / ROUTER).write_bytes(b"\xff" * 8 + b"{}"), "Safetensor"),
    (lambda folder: save_file({k: t + 1 for k, t in load_file(folder / ROUTER).items()}, folder / ROUTER),
     "damaged"),
    (resaved(lambda x: {k: t for k, t in x.items() if k != "latents"}), "too few"),
    (resaved(lambda x: x | {"more": torch.ones(1)}), "too many"),
    (resaved(lambda x: x | {"latents": x["latents"][:1]}), "shape"),
    (resaved(lambda x: x | {"latents": x["latents"].long()}), "shape"),
    (resaved(lambda x: x | {"latents": x["latents"] * math.nan}), "damaged")]


@pytest.mark.parametrize("harm, words", HARM)
def test_an_export_that_lies_is_refused(exported, tmp_path, harm, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(exported, tmp_path / "out")
    edit(tmp_path / "out", *harm) if isinstance(harm, tuple) else harm(tmp_path / "out")
    assert eval_main(["--from", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]


def test_a_run_or_an_export(finished, exported, capsys):
    for words in ([], [str(finished), "--from", str(exported)], ["--from", str(exported), "--best"]):
        assert eval_main(words) == 2 and "--from" in capsys.readouterr().err


# -- faults: what was tried on it by hand is in results/FAULTS.md
def stopped_at_five(finished, out):
    """A copy of the finished run as if it had been stopped after step 5 of 10."""
    shutil.copytree(finished, out)
    (out / "step-000010.safetensors").unlink()
    return out


def refused(capsys, *argv):
    """The one sentence with which train.py refuses; what was printed before it is dropped."""
    assert train.main([*map(str, argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


@contextlib.contextmanager
def files_of_at_most(size):
    """As near to a full disk as a process without privileges gets: no file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_one_process_at_a_time_trains_in_a_folder(finished, tmp_path, capsys, monkeypatch):
    with checkpoint.locked(finished):
        assert "another process" in refused(capsys, "--resume", "--out", finished)
    with pytest.raises(KeyError), checkpoint.locked(tmp_path / "new"):
        assert "another process" in refused(capsys, *QUICK, "--out", tmp_path / "new")
        raise KeyError
    assert not (tmp_path / "new").exists()  # nothing came of it
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "lock").touch()  # of a process that was killed
    with checkpoint.locked(tmp_path / "stray"):
        (tmp_path / "stray" / "kept").touch()
    assert (tmp_path / "stray" / "kept").exists()
    assert settings.resolve(dict(out=str(tmp_path / "stray")))["steps"] == 200  # an empty folder is no run
    monkeypatch.setattr(checkpoint, "fcntl", None)
    with checkpoint.locked(finished), checkpoint.locked(finished):
        pass


def test_repeated_arguments_are_accepted_and_others_named(finished, tmp_path, capsys):
    again = dict(resume=True, out=f"{finished}/", device="auto", micro=0, batch=6, group=4, val=12, seed=0,
                 experts=list(experts.POOLS["tiny"].experts), policy=experts.POOLS["tiny"].policy, steps=12)
    args = settings.resolve(again)
    assert (args["steps"], args["device"], args["val"]) == (12, settings.pick_device("auto"), 12)
    other = ("--seed", 7, "--batch", 6, "--experts", "tiny/logic")
    assert "; experts, seed would" in refused(capsys, "--resume", "--out", finished, *other)
    assert "--steps" in refused(capsys, "--resume", "--out", finished, "--steps", 0)
    assert "without" not in refused(capsys, "--resume", "--out", tmp_path)
    shutil.copy(finished / "step-000010.safetensors", tmp_path)  # a run whose config.json was lost
    assert "holds a run" in refused(capsys, *QUICK, "--out", tmp_path)


def test_a_commit_of_the_hub_is_a_repetition_of_its_name():
    again = settings.repeats
    assert again("policy", "org/m", "org/m@abc") and again("experts", ["a/b"], ["a/b@c"])
    assert not again("policy", "org/m@abd", "org/m@abc") and not again("experts", ["a"], [])


@pytest.mark.parametrize("harm", [
    "", "[]", "{}", '{"args": 3}', '{"args": {"task": "gsm8k"', "\udcff",
    dict(batch=-1), dict(batch="6"), dict(lr=math.nan), dict(rank=1.5), dict(group=None), dict(seed=math.inf),
    dict(task=None), dict(experts="tiny/logic"), dict(collab="loud"), dict(max_new=10**30), dict(rank=10**9)])
def test_a_damaged_config_of_a_run_is_one_sentence(finished, tmp_path, harm, capsys):
    (tmp_path / "run").mkdir()
    text = (finished / "config.json").read_text()
    if isinstance(harm, dict):
        config = json.loads(text)
        config["args"] |= harm
        harm = json.dumps(config)
    (tmp_path / "run" / "config.json").write_bytes(harm.encode("utf-8", "surrogateescape"))
    said = refused(capsys, "--resume", "--out", tmp_path / "run", "--steps", 12)
    assert "damaged" in said or "GB" in said or "window" in said
    assert eval_main([str(tmp_path / "run")]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_every_bit_of_a_checkpoint_counts(tmp_path, small):
    """Header and tensors: whichever bit is flipped, and wherever it is cut, it is found; nothing changes."""
    policy, router = small[0], make_router()
    path = tmp_path / "step-000003.safetensors"
    checkpoint.save(path, policy, router, step=3)
    data, before = path.read_bytes(), [p.clone() for p in router.parameters()]
    state = data.index(b'\\"step\\": 3') + 10  # "step": 3 becomes 2
    header = int.from_bytes(data[:8], "little")
    for at in (0, 7, 9, state, data.index(b"sha256") + 12, header + 4, header // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        with pytest.raises(ValueError):
            checkpoint.load(path, policy, router)
    for size in (0, 7, 100, header + 8, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError):
            checkpoint.load(path, policy, router)
    assert all(torch.equal(a, b) for a, b in zip(before, router.parameters()))
    path.write_bytes(data)
    assert checkpoint.load(path, policy, router) == dict(step=3)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    """In the run's folder all of it, in the cache what is old, and nobody else's *.part."""
    half, other = "0123456789abcdef" * 2 + ".part", "film.part"
    for place in (tmp_path, tmp_path / "fingerprint"):
        place.mkdir(exist_ok=True)
        for name in (half, other):
            (place / name).touch()
    folders.sweep(tmp_path)
    assert len(list(tmp_path.rglob(half))) == 2
    os.utime(tmp_path / "fingerprint" / half, (0, 0))
    os.utime(tmp_path / other, (0, 0))
    folders.sweep(tmp_path)
    assert len(list(tmp_path.rglob(half))) == 1 and len(list(tmp_path.rglob(other))) == 2
    folders.sweep(tmp_path, age=0)
    assert not list(tmp_path.rglob(half)) and len(list(tmp_path.rglob(other))) == 2


def test_a_passed_over_checkpoint_makes_room(tmp_path):
    names = [f"step-{i:06d}.safetensors" for i in (2, 4, 6, 9)]
    for name in names:
        (tmp_path / name).touch()
    checkpoint.rotate(tmp_path, tmp_path / names[2])  # 9 was damaged, the run went on from 4 to 6
    assert [p.name for p in checkpoint.last(tmp_path)] == [names[2], names[1]]


def test_a_full_disk_loses_nothing(finished, tmp_path, capsys):
    """A checkpoint, a row and a shard that do not fit; with room again the run is the undisturbed one."""
    out = stopped_at_five(finished, tmp_path / "run")
    (out / ("0" * 32 + ".part")).touch()  # of a kill before
    with files_of_at_most(10**6):  # a checkpoint has two
        said = refused(capsys, "--resume", "--out", out)
    assert "File too large" in said and "--resume" in said and not list(out.glob("*.part"))
    assert not (out / "eval.json").exists()  # that of the run before it went on
    length = (out / "metrics.jsonl").stat().st_size
    with files_of_at_most(length + 100), pytest.raises(OSError):
        checkpoint.append(out / "metrics.jsonl", [dict(step=11, text="x" * 200)])
    assert (out / "metrics.jsonl").stat().st_size == length + 100  # torn
    assert train.main(["--resume", "--out", str(out)]) == 0
    one, two = (load_file(folder / "step-000010.safetensors") for folder in (finished, out))
    assert all(torch.equal(one[k], two[k]) for k in one)
    strip = lambda out: [{k: v for k, v in r.items() if k not in TIMES} for r in rows(out)]
    assert strip(finished) == strip(out)
    expert = Expert(make_expert(tmp_path / "m"))
    with files_of_at_most(300), pytest.warns(UserWarning, match="cannot be kept"):
        H = read([expert], [TEXTS], tmp_path / "states", progress=False)
    assert torch.equal(H, read([expert], [TEXTS], tmp_path / "states", progress=False))
    assert not list((tmp_path / "states").rglob("*.part"))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_skipped_step_touches_neither_weights_nor_moments(small, monkeypatch, fault):
    """Also when only the loss is not finite, and its gradient is."""
    policy, router, batch, sampled = step_example(small)
    optimizer = make_optimizer(policy, router, 1e-3, 1e-3, (0.9, 0.98), 0.1)
    update(policy, router, batch, sampled, optimizer, micro=3, **HOW)
    every = lambda: [t.clone() for p in optimizer.state for t in (p, *optimizer.state[p].values())]
    before = every()
    with monkeypatch.context() as m:
        m.setattr(rlvr, "grpo_loss", lambda *a, **k: grpo_loss(*a, **k) + fault)
        sums = update(policy, router, batch, sampled, optimizer, micro=3, **HOW)
    assert sums["skipped"] == 1 and math.isfinite(sums["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, every(), strict=True))
    assert update(policy, router, batch, sampled, optimizer, micro=3, **HOW)["skipped"] == 0


def test_five_skipped_steps_in_a_row_stop_the_run(finished, tmp_path, capsys, monkeypatch):
    """Each is written down with its questions; what is saved are the weights of step 5."""
    out = stopped_at_five(finished, tmp_path / "run")
    monkeypatch.setattr(rlvr, "grpo_loss", lambda *a, **k: grpo_loss(*a, **k) * math.nan)
    said = refused(capsys, "--resume", "--out", out, "--steps", 15)
    assert "--max-norm" in said and "--resume" in said and "skipped.jsonl" in said
    skipped = rows(out, "skipped.jsonl")
    assert [r["step"] for r in skipped] == [6, 7, 8, 9, 10]
    assert all(len(r["questions"]) == 6 and math.isnan(r["loss"]) for r in skipped)
    good, kept = (load_file(out / f"step-{n:06d}.safetensors") for n in (5, 10))
    assert good.keys() == kept.keys() and all(torch.equal(good[k], kept[k]) for k in good if k != "generator")


def test_logits_that_are_nan_do_not_end_the_sampler():
    z = torch.randn(4, 300)
    z[0, 3], z[1], z[2, 299] = math.nan, math.nan, math.inf
    assert all(0 <= token < 300 for token in sample(z, 1.0).tolist())


def test_a_drought_is_said_once():
    row = lambda spread, right=0.0: dict(zero_spread=spread, accuracy=right, skipped=0)
    streak, said = Counter(), []
    for r in [row(1)] * 45 + [row(0.9)] + [row(1, 0.8)] * 25 + [row(0)] + [row(1)] * 19:
        said += [rlvr.advise(streak, r)]
    assert [i + 1 for i, text in enumerate(said) if text] == [20, 66]
    assert "easier --level" in said[19] and "harder --level" in said[65]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_halves_the_micro_batch(small, monkeypatch, capsys, error):
    """The same samples, the same gradient, remembered; one prompt that does not fit is a sentence."""
    policy, router, batch, sampled = step_example(small)
    fit = lambda: rlvr.gradients_that_fit(policy, router, batch, sampled, micro=3, **HOW)[1]
    policy.zero_grad()
    want, expected = fit(), grads(policy, router)
    room, calls, whole = 2, [], policy.logprobs

    def logprobs(cache, tokens, *rest):
        calls.append(len(tokens))  # the fourth call comes after a micro-batch that has left its gradient
        if len(tokens) > room or len(calls) == 4:
            raise error
        return whole(cache, tokens, *rest)

    monkeypatch.setattr(policy, "logprobs", logprobs)
    got = fit()
    assert calls == [3, 2, 2, 1] + [1] * 6 and (want.pop("micro"), got.pop("micro")) == (3, 1)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    for a, b in zip(grads(policy, router), expected):
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-8
    assert capsys.readouterr().out.count("at a time from now on") == 2
    optimizer = make_optimizer(policy, router, 0.0, 0.0, (0.9, 0.98), 0.0)
    calls.clear()
    assert update(policy, router, batch, sampled, optimizer, epochs=2, micro=2, **HOW)["micro"] == 1
    assert calls == [2, 2, 1, 1] + [1] * 13  # what comes after begins with what fitted
    room = 0
    with pytest.raises(ValueError, match="--group"):
        fit()
    if type(error) is RuntimeError:  # a mistake of ours is not hidden
        error.args = ("shapes do not match",)
        with pytest.raises(RuntimeError, match="shapes"):
            fit()


ODD = [("hidden_size", 10**9), ("hidden_size", 16), ("hidden_size", math.nan), ("num_hidden_layers", 10**6),
       ("num_hidden_layers", 4), ("num_hidden_layers", -1), ("num_hidden_layers", "3"),
       ("num_attention_heads", 0), ("num_attention_heads", -4), ("num_key_value_heads", 0),
       ("num_key_value_heads", 3), ("num_key_value_heads", 10**9), ("intermediate_size", 10**12),
       ("intermediate_size", "48"), ("vocab_size", 10**12), ("vocab_size", 5), ("head_dim", 10**12),
       ("head_dim", -2), ("max_position_embeddings", 10**12), ("max_position_embeddings", math.inf),
       ("rms_norm_eps", math.nan), ("rms_norm_eps", -1.0), ("tie_word_embeddings", "false"),
       ("model_type", ["x"]), ("rope_parameters", dict(rope_type="default", rope_theta="x")),
       ("rope_parameters", dict(rope_theta=-1e4)),
       ("rope_parameters", dict(rope_type="linear", rope_theta=1e4, factor=0.0))]


@pytest.mark.parametrize("key, value", ODD)
def test_absurd_numbers_of_a_model_are_one_sentence(tmp_path, key, value):
    make_policy(tmp_path)
    edit(tmp_path, "config.json", lambda c: c.update({key: value}))
    with pytest.raises(ValueError) as error:
        Policy.load(tmp_path)
    assert "\n" not in str(error.value)


def tensors_say(change):
    """Rewrite the header of a safetensors file, leaving its bytes as they are."""
    def harm(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        change(header["model.norm.weight"])
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n:])
    return harm


@pytest.mark.parametrize("harm, message", [
    (tensors_say(lambda t: t.update(shape=[10**9, 10**9])), "damaged"),
    (tensors_say(lambda t: t.update(data_offsets=[0, 10**15])), "damaged"),
    (tensors_say(lambda t: t.update(shape=[-32])), "damaged"),
    (tensors_say(lambda t: t.update(shape=[16, 2])), "config.json says"),
    (tensors_say(lambda t: t.update(dtype="I32")), "I32"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "damaged"),
    (lambda f: (f / "generation_config.json").write_text("{"), "damaged"),
    (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 300}'), "eos_token_id"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json")])
def test_lies_about_a_policys_tensors_are_one_sentence(tmp_path, harm, message):
    make_policy(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Policy.load(tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_of_a_models_folder_is_ever_run(tmp_path):
    """Neither code that its config names nor a pickle; the canary of each would show it."""
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    for name, make in (("policy", make_policy), ("expert", make_expert)):
        make(tmp_path / name)
        (tmp_path / name / "x.py").write_text(code + "class Y: pass\n")
        remote = dict(auto_map=dict(AutoConfig="x.Y", AutoModel="x.Y", AutoModelForCausalLM="x.Y"))
        edit(tmp_path / name, "config.json", lambda c: c.update(remote))
    Policy.load(tmp_path / "policy")
    Expert(tmp_path / "expert").states(TEXTS)

    class Pickled:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    for name in ("policy", "expert"):
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
        with pytest.raises(ValueError, match="no safetensors"):
            (Policy.load if name == "policy" else Expert)(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_offline_hub_commits_a_second_start_and_sigterm(tmp_path, capsys):
    """A process of its own: models out of $HF_HOME without network, by the commit that `main` is; a second
    start is refused while it lives; SIGTERM saves."""
    commits = dict(policy="a" * 40, logic="b" * 40)
    for name, commit in commits.items():
        model = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(f"tiny/{name}", model / "snapshots" / commit)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
    out = tmp_path / "run"
    command = [sys.executable, "-u", "train.py", *QUICK, "--out", out, "--pool", "tiny", "--steps", 200,
               "--batch", 2, "--policy", "org/policy", "--experts", "org/logic"]
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    env.pop("HF_HUB_CACHE", None)
    with subprocess.Popen([*map(str, command)], env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        before = list(iter(lambda: process.stdout.readline()[:6], "step  "))  # to the first step
        assert process.poll() is None, before
        assert "another process" in refused(capsys, "--resume", "--out", out)
        process.terminate()
        said = process.stdout.read()
        assert process.wait() == 0 and "stopped and saved" in said
    config = json.loads((out / "config.json").read_text())
    assert config["policy"] == dict(source="org/policy", revision=commits["policy"])
    assert config["experts"][0]["revision"] == commits["logic"]
    assert config["args"]["policy"] == f"org/policy@{commits['policy']}"
    assert config["args"]["experts"] == [f"org/logic@{commits['logic']}"]
    assert checkpoint.last(out) and not list(out.glob("*.part"))


# -- by hand: python test_all.py --kill 20
SHORT = "--steps 12 --save-every 3 --eval-every 4 --val 8 --test 8 --batch 4 --max-new 4".split()


def start(out, *more, wait=subprocess.Popen.wait):
    """Run train.py, let `wait` wait for its end or for the moment to kill it. Returns (exit code, output)."""
    with open(out.with_suffix(".log"), "w+") as log:
        command = [sys.executable, "-u", "train.py", "--out", str(out), *map(str, more)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait(process)
        process.kill()  # SIGKILL; of no effect on one that has ended
        process.wait()
        log.seek(0)
        return process.returncode, log.read()


MARKS = ("", "", "n-Musketeers", "largest expert", "a problem", "step    4 | val", "step   12 | reward")


def moment(kind, share, late, out, states):
    """What to wait for: `late` seconds after a line of the output (start, reading, first look, validation,
    last evaluation), the same within a step, or a file that is being written, as far as a poll can see it."""
    seen, since = set(), []

    def reached():
        if kind == "line":
            return MARKS[int(share * len(MARKS))].encode() in out.with_suffix(".log").read_bytes()
        if kind == "step":
            metrics = out / "metrics.jsonl"
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= int(12 * share)
        seen.update(p for place in (out, states) for p in place.rglob("*.part"))
        return len(seen) > 10 * share

    def wait(process):
        while process.poll() is None and not (since and time.monotonic() >= since[0]):
            if not since and reached():
                since.append(time.monotonic() + (0 if kind == "write" else late))
            time.sleep(0.0005)
    return wait


def outcome(out):
    """All that must not depend on a kill: the tensors of every checkpoint kept, rows but for their times,
    samples and the final report."""
    files = sorted(out.glob("*.safetensors"))
    tensors = {f"{path.name} {k}": t for path in files for k, t in load_file(path).items()}
    kept = [{k: v for k, v in r.items() if k not in TIMES} for r in rows(out)]
    return tensors, kept, rows(out, "samples.jsonl"), json.loads((out / "eval.json").read_text())


def kill_and_resume(times, seed=0):
    """SIGKILL at `times` moments spread over a run that begins with an empty cache, each resumed to the end
    and compared with the undisturbed run. Returns how many ended otherwise."""
    folder, chance, other = Path(tempfile.mkdtemp()), random.Random(seed), 0
    os.environ["N_MUSKETEERS_CACHE"] = str(folder / "cache")  # hashes of files; the states lie elsewhere
    began = time.monotonic()
    assert start(folder / "whole", *SHORT, "--cache", folder / "whole-states")[0] == 0
    tensors, *told = outcome(folder / "whole")
    took = time.monotonic() - began
    print(f"undisturbed: {took:.1f} s, {len(tensors)} tensors in its checkpoints", flush=True)
    for i in range(times):
        out, states, kind = folder / f"run{i}", folder / f"states{i}", ("line", "step", "write")[i % 3]
        share, more = (i + chance.random()) / times, [*SHORT, "--cache", states]
        late = chance.random() * (0.1 if kind == "step" else 3 if share < 0.3 else 0.5)  # start: it is slow
        code, said = start(out, *more, wait=moment(kind, share, late, out, states))
        begun = (out / "config.json").exists()
        steps = len(rows(out)) if (out / "metrics.jsonl").exists() else 0
        halves = sum(1 for place in (out, states) for _ in place.rglob("*.part"))
        ended, again = start(out, *(["--resume"] if begun else more))
        mine, *mine_told = outcome(out) if ended == 0 else ({}, None)
        same = (mine.keys() == tensors.keys() and all(torch.equal(mine[k], tensors[k]) for k in mine)
                and mine_told == told and not list(out.rglob("*.part")))
        other += not same
        last = re.split(r"[\n\r]+", said.strip())[-1]
        went = re.search("resumed after step \\d+|no checkpoint|nothing is left", again)
        print(f"{i + 1:2d} {'same ' if same else 'OTHER'} killed {code == -9} by {kind}, {steps:2d} rows, "
              f"{halves} half files, at {last[:60]!r}; then {went.group() if went else 'started anew'}",
              flush=True)
        if not same:
            print(again[-1500:])
    print(f"{times - other} of {times} ended with the weights, moments, rows, samples and report of the "
          "undisturbed run")
    shutil.rmtree(folder)
    return other


# -- the study
def test_the_plan_is_the_readmes():
    """As many runs a block as it says, no ID twice, each command one that train.py takes."""
    kinds = {name: {r.id for r in runs} for name, runs in study.blocks().items()}
    assert {k: len(v) for k, v in kinds.items()} == dict(rate=15, pilot=8, main=50, controls=16, saturate=18,
                                                         wide=3, real=12, quick=8)
    assert kinds["pilot"] < kinds["main"] and len(study.plan(kinds)) == sum(map(len, kinds.values())) - 8
    assert len(study.plan(study.EMBEDDED)) == 102 and len(study.plan(["pilot", "main"], more=1)) == 60
    tried = [dict(block="rate", mode=way, after=0.5, val=val, lr=lr, router_lr=2 * lr) for lr, val in
             ((5e-4, 0.3), (1e-3, 0.4), (2e-3, 0.4)) for way in ("soft", "single", "prefix", "hard", "text")]
    for run in study.plan(kinds):
        args = settings.resolve(vars(settings.parser("").parse_args(study.command(run, tried, "models")[2:])))
        assert args["collab"] == run.way.split()[0] and args["seed"] == run.seed
        if run.block not in ("rate", "real"):
            assert (args["test"], args["lr"], args["router_lr"]) == (1024, 1e-3, 2e-3)
    assert study.chosen("soft noise", tried[:6]) == (1e-3, 2e-3)
    with pytest.raises(ValueError, match="--block rate"):
        study.chosen("hard", [])


def test_the_study_goes_on_where_it_was(finished, tmp_path, monkeypatch, capsys):
    """A finished run gets a row and a curve, a failed one a row that says why, a stopped one none; what has a
    row is not made again, but for --retry; a second study is refused while one is at work."""
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    made, ends = [], {"quick-mix-single-0": "sys.exit('the disk is full')"}
    ends["quick-mix-prefix-0"] = "sys.exit(130)"
    asked = dict(right=[1] * 12, kinds=dict(static=dict(right=[1] * 12)))

    def start(run, words, lock):
        out = tmp_path / study.RUNS / run.id
        if out.exists():  # asked, once it is trained, what its attention was worth
            (out / "ablate.json").write_text(json.dumps(asked))
        else:
            made.append(run.id)
        if run.id not in ends and not out.exists():
            shutil.copytree(finished, out)
        with open(tmp_path / study.RUNS / f"{run.id}.log", "w") as log:
            return subprocess.Popen([sys.executable, "-c", "import sys; " + ends.get(run.id, "")], stderr=log)

    monkeypatch.setattr(study, "start", start)
    assert study.main(["--quick"]) == 1 and len(made) == 8
    by = {r["id"]: r for r in study.read_rows()}
    assert len(by) == 7 and by["quick-mix-single-0"]["reason"] == "exit code 1: the disk is full"
    row, kept = by["quick-mix-soft-0"], json.loads((finished / "eval.json").read_text())
    assert (row["after"], row["n"], row["steps"]) == (kept["after"]["strict"], kept["n"], 10)
    curve = json.loads((tmp_path / "results" / "curves" / "quick-mix-soft-0.json").read_text())
    assert sum(curve["right"]) / row["n"] == pytest.approx(row["after"])
    assert sum(curve["right_before"]) / row["n"] == pytest.approx(row["before"])
    assert len(curve["curve"]) == 10 and {"reward", "attention_by"} <= set(curve["curve"][0])
    assert curve["ablate"] == asked
    assert torch.tensor(curve["heard"]).sum(-1).allclose(torch.tensor(1.0), atol=0.02)
    assert str(tmp_path) not in json.dumps([row, curve["experts"]])  # nothing of the machine is published
    assert "| mix | soft | 0, 1 |" in capsys.readouterr().out
    ends.clear()
    assert study.main(["--quick"]) == 1 and made[8:] == ["quick-mix-prefix-0"]
    assert study.main(["--quick", "--retry"]) == 0 and made[9:] == ["quick-mix-single-0"]
    assert study.main(["--quick"]) == 0 and len(made) == 10
    with open(tmp_path / study.RUNS / "lock", "w") as lock:
        study.fcntl.flock(lock, study.fcntl.LOCK_EX)
        assert study.main(["--quick"]) == 2 and "still at work" in capsys.readouterr().err


def test_a_run_stopped_after_its_evaluation_is_gone_on_with(tmp_path, monkeypatch):
    """Only soft is asked for ablations, which the others would refuse; they resume, and are at their end."""
    monkeypatch.setattr(study, "HERE", tmp_path)
    ran = []
    monkeypatch.setattr(study.subprocess, "Popen", lambda words, **how: ran.append(words[1:]))
    with open(tmp_path / "lock", "w") as lock:
        for run in study.blocks()["quick"][:3]:
            for name in ("config", "eval"):
                folders.write_whole(tmp_path / study.RUNS / run.id / f"{name}.json", b"{}")
            study.start(run, ["python", "train.py"], lock)
    assert [words[0] for words in ran] == ["eval.py", "train.py", "train.py"]
    assert all("--resume" in words for words in ran[1:])


def test_points_of_a_curve_are_means():
    metrics = [dict(step=i, reward=float(i), attention={"a": i / 8}) for i in range(1, 9)]
    metrics[3]["val"] = 0.25
    first, second = study.curve(metrics, 2)
    assert first == dict(step=4, reward=2.5, val=0.25, attention={"a": 0.3125}) and second["reward"] == 6.5


def test_intervals_and_ranks_by_hand():
    some = torch.arange(400).reshape(4, 100) % 2
    low, high = stats.interval(some)  # four seeds alike: a mean of 100 items with p = 1/2
    assert low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    x = [[0.0], [1.0], [2.0], [3.0]] * 25  # 100 seeds of variance 1.25
    low, high = stats.interval(x)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(1.25 / 99), rel=0.06)
    assert stats.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert stats.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert stats.spearman([1, 2], [5, 5]) is None
    assert stats.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # a tie, as scipy
    t = torch.arange(9.).numpy()
    assert abs(stats.detrended(t, 3 * t - 2)).max() == 0
    assert stats.detrended(t, 3 * t + (t == 4)).argmax() == 4
    assert stats.detectable(2.0) == pytest.approx(2.8 * 2 * math.sqrt(0.4)) == pytest.approx(3.541751)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_of_a_hundred_intervals_five_miss(seeds):
    """Few seeds that differ: the interval holds the truth as often as it says."""
    generator = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        D = generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=(1, 20))
        low, high = stats.interval(D, draws=2000)
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.99


def made_up(task, way, share, seeds=3, n=200, **more):
    """Rows of a way that is right in this share of the items."""
    right = [int(i < share * n) for i in range(n)]
    return [dict(task=task, way=way, seed=s, pool="tiny", after=share, before=0.1, n=n, trainable=1,
                 seconds=1.0, right=right, curve=[], **more) for s in range(seeds)]


def verdicts(rows):
    return {i: claims.verdict(parts(rows)) for i, (_, parts) in enumerate(claims.CLAIMS, 1)}


def test_claims_are_judged_by_their_intervals():
    names = [dict(name=name) for name in ("arithmetic", "logic", "algorithmic")]
    listens = dict(experts=names, datasets=["chain_sum"] * 200, heard=[[0.8, 0.1, 0.1]] * 200)
    elsewhere = listens | dict(heard=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]] * 100)
    rows = [*made_up("arithmetic", "soft", 0.6, **elsewhere), *made_up("arithmetic", "single", 0.3),
            *made_up("arithmetic", "prefix", 0.6), *made_up("mix", "soft", 0.6, **listens),
            *made_up("mix", "prefix", 0.3), *made_up("arithmetic", "soft shuffled", 0.6, seeds=1),
            *made_up("arithmetic", "soft first", 0.61), *made_up("mix", "soft first", 0.6),
            *made_up("logic", "single", 0.95), *made_up("logic", "soft", 0.99)]
    of = verdicts(rows)
    assert [of[i][0] for i in range(1, 6)] == ["confirmed", "refuted", "open", "confirmed", "refuted"]
    assert of[9] == ("confirmed", "it is heard most - 33: +66.7 [+66.7, +66.7] points, 3 runs")
    assert {of[i][0] for i in (6, 7, 8, 10)} == {"open"} and {v for v, _ in verdicts([]).values()} == {"open"}
    assert "+30.0" in of[1][1] and "| arithmetic | soft | 0, 1, 2 | 200 |" in claims.report(rows)
    first = next(claims.listening(rows))
    right = [r["right"] for r in rows[:3]]
    told, not_told = ([f"{100 * sum(x[i::2]) / 100:.0f}" for x in right] for i in (0, 1))
    assert "50, 50, 50% of the sums" in first
    assert f"these {', '.join(told)}% are right, of the others {', '.join(not_told)}%" in first


def test_claims_about_attention():
    """Entropy against reward with the trend out; hard tasks; the wide expert; static attention."""
    wave = [math.sin(i) for i in range(40)]
    point = lambda sign, end: [dict(step=i, reward=i + wave[i], attention_entropy=end + 0.1 * sign * wave[i])
                               for i in range(40)]
    wide = dict(experts=[dict(name="arithmetic"), dict(name="wide")], heard=[[0.8, 0.2]] * 200)
    asked = lambda n: dict(ablate=dict(right=[int(i < 120) for i in range(200)], kinds=dict(static=dict(
        right=[int(i < n) for i in range(200)]))))
    half, same = asked(60), asked(120)
    for sign, verdict in ((-1, "confirmed"), (1, "refuted")):  # of both signs the reward rises
        rows = [*made_up("arithmetic", "soft", 0.6, **same), *made_up("arithmetic hard", "soft", 0.6),
                *made_up("mix", "soft", 0.6, **half, experts=[], heard=[], datasets=[]),
                *made_up("arithmetic", "soft wide", 0.5, **wide)]
        for r in rows:
            r["curve"] = point(sign, 0.5 if r["task"] == "arithmetic" else 0.5 - 0.2 * sign)
        rows = [r for r in rows if r["task"] != "mix"]
        of = verdicts(rows)
        assert of[6][0] == verdict and of[8][0] == "refuted" and of[10][0] == "open"
        assert of[7][0] == ("refuted" if verdict == "confirmed" else "confirmed")
    rows += made_up("mix", "soft", 0.6, **half, experts=wide["experts"], heard=[[1, 0]] * 200,
                    datasets=["chain_sum"] * 200)
    assert verdicts(rows)[10][0] == "confirmed"


def test_readme_shows_what_the_study_found():
    """What stands between the markers is what the results give now."""
    text, rows = Path("README.md").read_text(), study.judged()
    assert study.readme(text, rows) == text, "run python study.py --readme"
    assert study.readme(text.replace("<!-- walk:begin -->", "<!-- walk:begin -->\nold"), rows) == text
    with pytest.raises(ValueError, match="walk:end"):
        study.readme(text.replace("<!-- walk:end -->", ""), rows)


if __name__ == "__main__":
    sys.exit(bool(kill_and_resume(int(sys.argv[sys.argv.index("--kill") + 1]))))
