"""What must stay true. On the CPU, without downloads:   python -m pytest -q test_all.py"""
import os
import tempfile

os.environ["N_MUSKETEERS_CACHE"] = tempfile.mkdtemp(prefix="n-musketeers-test-")  # what is read goes here
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import copy
import functools
import json
import math
import multiprocessing
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import eval as evaluation
import experts
import rewards
import rlvr
import train
from experts import Expert, read_states, write_texts
from model import Policy, SwiGLU, TokenLogprob, sample
from rewards import EXAMPLE, INSTRUCTION, Problem, number, problems, prompt, verify
from rlvr import Dataset, advantages, grpo_loss, kl_estimate
from router import ROUTERS, Router

torch.set_num_threads(1)  # for models this small two threads only wait for each other
os.chdir(Path(__file__).parent)
atexit.register(shutil.rmtree, os.environ["N_MUSKETEERS_CACHE"], True)

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

def edit(folder, name, **changes):
    """Change keys of a JSON file."""
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)

def full_disk(*args):
    raise OSError(28, "No space left on device")

# -- rewards.py
THIN, NARROW, NO_BREAK, MINUS = "\u2009", "\u202f", "\u00a0", "\u2212"
GOLD18 = Problem("How many?", "18")
NUMBERS = {  # the number: texts that are it
    18: ["18", " 18 ", "$18", "18$", "$ 18", "18.", "18.00", "0018", "+18", "**18**", "*18*", "__18__", "18%",
         "**$18**", "\\boxed{18}", "$\\boxed{18}$", "\\boxed{\\boxed{18}}", "\\(18\\)", "$$18$$", "18\\%",
         "€18", "18 dollars.", "18 apples per day", "**18.**", f"{NO_BREAK}18{NO_BREAK}", "36/2", "36 / 2"],
    -18: ["-18", MINUS + "18", "-$18", "$-18", "-36/2"], 1.5: ["15e-1"], 0.5: [".5"], 0: ["-0"],
    1000: ["1,000", f"1{THIN}000", f"1{THIN}000 dollars", "1e3"], 10**6: [f"1{NARROW}000{NARROW}000"],
    1234567.5: ["1,234,567.50"], 10**99: ["1e99"], int("9" * 200): ["9" * 200]}
NO_NUMBER = [
    "", ".", "-", "$", ",", "/", "e3", "\\boxed{}", "18 19", "18, 19", "18,19", "9+9", "10-2", "2**3", "1,00",
    "1000,000", "0,018", f"1,000{THIN}000", "1 000", "--18", "- 18", "1/0", "1/2/3", "1.5/2", "36/-2",
    "1 1/2", "½", "１８", "٣", "18²", "1e999999", "0x12", "1_000", "inf", "nan", "eighteen",
    "18 apples per day here", "18km", "18 thousand", "18 or nineteen", "about 18", "18:00", "[18]", "18\x00",
    "\ud80018", "\\frac{36}{2}", "\\boxed{18", "18\n19", "9" * 201, "–18", "3 fourths"]

def test_what_is_one_number_and_what_is_none():
    """Marks, units, groups of thousands and fractions of integers are read; a list or a sum is not."""
    for value, texts in NUMBERS.items():
        assert [number(text) for text in texts] == [value] * len(texts)
    assert not [text for text in NO_NUMBER if number(text) is not None]

TAGGED = [  # (completion, reason, lenient)
    ("<answer>18</answer>", "right", True), ("<answer>18</answer>, not 19", "right", True),
    ("<think><answer>17</answer></think>\n<answer> **18** </answer><|im_end|>", "right", True),
    ("<answer>18.1</answer>", "wrong", False), ("<answer>17 18</answer>", "not_a_number", True),
    ("18", "no_answer", True), ("<answer></answer>", "no_answer", False),
    ("<Answer>18</Answer>", "no_answer", True), ("<answer>18</answer></think>", "no_answer", True),
    ("<answer>18", "unclosed", True), ("<answer>18", "truncated", True),
    ("</answer>18<answer>", "unclosed", True), ("<answer>18</answer><answer>18</answer>", "several", True),
    ("<answer><answer>18</answer></answer>", "several", True),
    ("<answer>" + " " * 200 + "18</answer>", "too_long", True),
    ("\\boxed{3} \\boxed{18} 4", "no_answer", True), ("\\boxed{18", "no_answer", False),
    ("3 + 15 = 18.\nThat is it.", "no_answer", True)]
PLAIN = [  # (completion, truncated, reason)
    ("18", False, "right"), (" 18\n", False, "right"), ("18\nQuestion: 2 + 2 =", True, "right"),
    ("18</s>", False, "right"), ("$18.", False, "right"), ("18", True, "truncated"), ("", False, "no_answer"),
    ("\n18", False, "no_answer"), ("18 apples", False, "not_a_number"), ("18 19", False, "not_a_number"),
    ("<answer>18</answer>", False, "not_a_number"), ("17", False, "wrong"), ("9" * 999, False, "too_long")]

def test_an_answer_stands_between_tags_or_on_the_first_line():
    """The reason of each verdict; only "right" earns a reward; an unknown form is named."""
    for text, reason, lenient in TAGGED:
        verdict = verify(text, GOLD18, truncated=reason == "truncated")
        assert (verdict.reason, verdict.lenient) == (reason, lenient), text
        assert verdict.strict == (verdict.reward == 1.0) == (reason == "right")
    for text, truncated, reason in PLAIN:
        assert verify(text, GOLD18, "plain", truncated).reason == reason, text
    with pytest.raises(ValueError, match="tagged or plain"):
        verify("18", GOLD18, "json")

def test_gold_is_right_and_hostile_answers_are_not(tmp_path):
    """Of every dataset: nothing is executed, nothing raises, and a megabyte of anything earns nothing."""
    slow = {"futoshiki", "zebra_puzzles", "rearc", "arc_agi", "acre", "polynomial_equations"}  # to make
    code = f"__import__('os').system('touch {tmp_path / 'canary'}')"
    hostile = [code, f"[{code}]", f"open('{tmp_path / 'canary'}','w')", "9**9**9**9", "1e999999999", "-1",
               "9" * 5000, "9" * 64, "(" * 2000, "[" * 60, '{"a":' * 5000, "nan", "[NaN]", "inf", "\x00",
               "\ud800", "None", "[]", "{}", "[[1]]", '{"a": 1}', '["fill Z"]', "aa is a aa, " * 9,
               "A=1, " * 9, "R999999999", "hello world", "a" * 60, "Move disk 99 from Peg 99 to Peg 98",
               "not " * 2000 + "P", "(P ∨ Q)"]
    for name in set(rewards.registry()) - set(rewards.REFUSED) - slow:
        for item in problems(name, "train", 2):
            for text in (item.answer, f" {item.answer} ", f"\n{item.answer}\n"):
                assert verify(f"<answer>{text}</answer>", item).strict, name
            for text in hostile:
                verdict = verify(f"<answer>{text}</answer>", item)
                assert verdict.reason in rewards.REASONS, (name, text)
                assert not verdict.strict or number(text) == number(item.answer) is not None, (name, text)
    assert not (tmp_path / "canary").exists() and set(rewards.REFUSED) < set(rewards.registry())
    for unit in ("9", "<answer>", "</answer>", "(", "\\boxed{", "####", "</think>", "\n", "1,", "0.", " "):
        text = unit * (10**6 // len(unit))
        for form, completion in (("plain", text), ("tagged", text), ("tagged", f"<answer>{text}</answer>")):
            assert not verify(completion, GOLD18, form).strict

PAID = [  # (dataset, gold, another way to write it)
    ("chain_sum", "1156", "+1,156.00"), ("family_relationships", "aunt", "Aunt"),
    ("number_sorting", "['1', '3.0']", "[1, 3]"), ("complex_arithmetic", "-1.0 + 2.0i", MINUS + "1+2i"),
    ("gsm_symbolic", "18", "$18"), ("game_of_life", "[[0,1]]", "[[0, 1]]")]
UNPAID = [  # the same, but an answer that the dataset's own scorer would pay for, or run
    ("time_intervals", "03:22:03", "03:22:00"), ("word_sorting", "a, b", "a, b, c"),
    ("game_of_life_halting", "True", "False"), ("number_sorting", "[1, 3]", "[2, 2]"),
    ("gsm_symbolic", "18", "18 19"), ("chain_sum", "156", "1,5,6"), ("complex_arithmetic", "1.0", "nan"),
    ("basic_arithmetic", "2", "8 / 4"), ("base_conversion", "100", "1e2"),
    ("fraction_simplification", "1/2", "2/4"), ("quantum_lock", "A → B", "A quick cab"),
    ("knights_knaves", "Zoey is a hero, and Al is a knave.", "Zoey is a dog, Zoey is a hero, Al is a knave")]

def test_which_answers_are_paid():
    for paid, table in ((True, PAID), (False, UNPAID)):
        for dataset, gold, answer in table:
            item = Problem("q", gold, dataset, dataset)
            assert verify(f"<answer>{answer}</answer>", item).strict == paid, (dataset, answer)

@pytest.mark.parametrize("task", ["chain_sum", "gcd", "aiw", "lcm", "arithmetic+algorithmic"])
def test_splits_share_no_question(task):
    """Whatever sizes are asked for; and the first 10 of 1,000 are the 10."""
    held = {split: [item.question for item in problems(task, split, 40)] for split in ("val", "test")}
    training = [item.question for item in problems(task, "train", 1000)]
    assert training[:10] == [item.question for item in problems(task, "train", 10)]
    assert not set(held["val"]) & set(held["test"]) and not set(held["val"] + held["test"]) & set(training)
    assert all(len(set(questions)) == 40 for questions in held.values())
    assert all(rewards.split_of(question) == split for split in held for question in held[split])

def test_a_small_space_says_how_many_there_are():
    level = "min_terms=2,max_terms=2,min_digits=1,max_digits=1,allow_negation=false"
    found = problems("chain_sum", "val", 10**6, level=level, least=1)
    assert problems("chain_sum", "val", len(found), level=level) == found and len(found) < 100
    with pytest.raises(ValueError, match=f"only {len(found)} distinct"):
        problems("chain_sum", "val", len(found) + 1, level=level)

def test_a_mix_takes_turns():
    items = problems("arithmetic+logic+algorithmic", "train", 9, level="tiny")
    assert [item.task for item in items] == ["arithmetic", "logic", "algorithmic"] * 3
    assert len({item.question for item in problems("chain_sum+arithmetic", "val", 60)}) == 60

def test_items_do_not_depend_on_the_hash_seed():
    tasks = ("chain_sum", "family_relationships", "base_conversion")
    code = f"import rewards; print([p.question for t in {tasks} for p in rewards.problems(t, 'train', 5)])"
    here = [item.question for task in tasks for item in problems(task, "train", 5)]
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(PYTHONHASHSEED=other),
                           stdout=subprocess.PIPE, text=True)
    assert there.stdout.strip() == str(here)

def test_gsm8k_files(tmp_path):
    for name, n in (("train", 20), ("test", 6)):
        lines = [json.dumps(dict(question=f"{name} {i}?", answer=f"so\n#### {i + 1},000")) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    training = [item.question for item in problems("gsm8k", "train", 40, tmp_path)]
    test = problems("gsm8k", "test", 6, tmp_path)
    assert training[:15] == [f"train {i}?" for i in range(15)]
    assert sorted(training[15:30]) == sorted(training[:15])
    assert test[2].answer == "3000" and verify("<answer>$3,000.00</answer>", test[2]).strict
    assert problems("gsm8k", "test", 6, tmp_path / "test.jsonl") == test
    assert not {item.question for item in problems("gsm8k", "val", 5, tmp_path)} & set(training)
    good, mine = '{"question": "q", "answer": "#### 1"}', tmp_path / "mine.jsonl"
    for wrong in ("{", "null", '{"question": "q"}', '{"question": "q", "answer": "18"}',
                  '{"question": 3, "answer": "#### 1"}', '{"question": "q", "answer": "#### one"}'):
        mine.write_text(f"{good}\n\n{wrong}")
        with pytest.raises(ValueError, match="mine.jsonl, line 3"):
            problems("gsm8k", "train", 1, mine)

def test_what_stage_0_teaches_to_say_has_the_form_that_is_paid():
    policy = types.SimpleNamespace(tokenizer=lambda text, **_: dict(input_ids=[*text.encode()]),
                                   config=types.SimpleNamespace(stop=[0]))
    for form in ("tagged", "plain"):
        assert verify(bytes(rlvr.answer_ids(policy, "18", form)[:-1]).decode(), GOLD18, form).strict

def test_prompts():
    chat = types.SimpleNamespace(chat_template="yes", apply_chat_template=lambda turns, **rest: "".join(
        f"<{turn['role']}>{turn['content']}" for turn in turns))
    assert prompt(Problem("2 + 3 =", "5")) == "2 + 3 =" and prompt(Problem(" Who? ", "I")) == "Who?\nAnswer:"
    assert prompt(GOLD18) == prompt(GOLD18, "plain", chat) == "How many?\nAnswer:"
    assert prompt(GOLD18, "chat", chat, ask=False) == "<user>How many?"
    assert prompt(GOLD18, "chat", chat).endswith("<user>How many?" + INSTRUCTION)
    example = prompt(GOLD18, "chat", chat).partition("<assistant>")[2].partition("<user>")[0]
    assert verify(example, Problem(EXAMPLE[0], "26")).strict  # it shows what is paid

# -- experts.py
WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 40] for j in range(3 + 5 * i % 11)) for i in range(9)]
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)

def random_model(kind, seed=0, **sizes):
    """A random model of a kind; its weights are large, so that every token matters."""
    torch.manual_seed(seed)
    auto = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(getattr(transformers, f"{kind}Config")(**SIZES | sizes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()

def make_expert(folder, kind="Llama", seed=0, **sizes):
    """A random model with a word-level tokenizer, saved as an ordinary Hugging Face folder; its path."""
    vocabulary = ["[PAD]", "[EOS]", "[CLS]", "[SEP]", *WORDS, "\n", "[UNK]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "Bert":
        words.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    random_model(kind, seed, **sizes).save_pretrained(folder)
    return str(folder)

def read_all(expert, texts=TEXTS):
    return read_states([expert], [texts], progress=False)

@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPTNeoX", "Bert"])
def test_states_equal_transformers_on_the_text_alone(tmp_path, kind, own_cache):
    """Every layer, each way to read: what the model gives for the one text, without any padding."""
    folder = make_expert(tmp_path / "m", kind)
    model, tokenizer = transformers.AutoModel.from_pretrained(folder).eval(), Expert(folder).tokenizer
    H = {read_as: read_all(Expert(folder, read_as, range(4), 3)) for read_as in ("last", "first", "mean")}
    for i in (0, 5):
        with torch.no_grad():
            out = model(**tokenizer(TEXTS[i], return_tensors="pt"), output_hidden_states=True)
        hidden = torch.stack(out.hidden_states)[:, 0]  # (layers, T, width)
        last = hidden[:, [-1, -2, -3]].flatten(0, 1)  # layer by layer, and in each the last token first
        for read_as, expected in dict(last=last, first=hidden[:, 0], mean=hidden.mean(1)).items():
            torch.testing.assert_close(H[read_as][i], expected, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_state_is_that_of_its_text_to_the_bit(tmp_path, monkeypatch, kind):
    """However the cache was filled: in another order, with other texts, one by one, or partly before."""
    expert, texts = Expert(make_expert(tmp_path / "m", kind)), TEXTS * 20 + [f"w1 {text}" for text in TEXTS]
    found = []
    for name, parts in dict(all=[texts], reverse=[texts[::-1]], alone=[[text] for text in TEXTS],
                            partly=[TEXTS[2:5], texts]).items():
        monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / name))
        for part in parts:
            read_all(expert, part)
        with monkeypatch.context() as patch:  # what was read once is never read again
            patch.setattr(Expert, "load", lambda self, kind: pytest.fail("a cached text was read again"))
            found.append(read_all(expert))
    assert all(torch.equal(found[0], other) for other in found[1:])

def test_own_text_is_read_behind_the_prompt(tmp_path, own_cache):
    folder = make_expert(tmp_path / "m")
    expert = Expert(folder, layers=(1, -1), positions=2, own_text=True, tokens=3)
    written = experts.cached_rows(expert, "texts", TEXTS, progress=False)  # (n, 3), -1 behind the end
    assert len({int((row >= 0).sum()) for row in written}) > 1
    H = read_all(expert)
    for i, (ids, row) in enumerate(zip(expert.tokenize(TEXTS), written)):
        ids = ids + row[row >= 0].tolist()
        alone = expert.states_of(expert.load("states"), [ids], len(ids))
        torch.testing.assert_close(H[i], alone[0], atol=1e-5, rtol=1e-5)

def test_a_narrower_expert_is_padded_with_zeros(tmp_path, own_cache):
    a, b = Expert(make_expert(tmp_path / "a")), Expert(make_expert(tmp_path / "b", "Bert", hidden_size=24))
    H = read_states([a, b], [TEXTS, TEXTS[::-1]], progress=False)
    assert torch.equal(H[:, :1], F.pad(read_all(a), (0, 8)))
    assert torch.equal(H[:, 1:], read_all(b, TEXTS[::-1]))

def test_damaged_shard_is_read_again(tmp_path, own_cache):
    """It is found by its checksum, told, deleted and made again, with the same states."""
    expert = Expert(make_expert(tmp_path / "m"))
    first = read_all(expert)
    for at in (-3, 12):  # a bit of a state, and one of the header
        flip(next(own_cache.glob("states/*/*.safetensors")), at, 4)
        with pytest.warns(UserWarning, match="damaged"):
            assert torch.equal(read_all(expert), first)
    assert torch.equal(read_all(expert), first)  # and no warning: pytest would show it

def test_a_full_disk_costs_the_cache_and_not_the_states(tmp_path, own_cache, monkeypatch):
    expert = Expert(make_expert(tmp_path / "m"))
    with monkeypatch.context() as patch:
        patch.setattr(experts.os, "fsync", full_disk)
        with pytest.warns(UserWarning, match="cannot be kept.*N_MUSKETEERS_CACHE"):
            H = read_all(expert)
    assert not [*own_cache.rglob("*.safetensors")] and torch.equal(read_all(expert), H)

def test_interrupted_read_continues(tmp_path, own_cache, monkeypatch):
    """Ctrl-C in the fourth batch: three are kept and are not read again."""
    expert, compute, seen = Expert(make_expert(tmp_path / "m")), Expert.states_of, []
    texts = [" ".join(["w1"] * n) for n in (60, 40, 30, 10)]  # four lengths of batches

    def stopped(self, model, ids, length):
        seen.append(length)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return compute(self, model, ids, length)

    monkeypatch.setattr(Expert, "states_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        read_all(expert, texts)
    resumed = read_all(expert, texts)
    assert seen == [64, 48, 32, 16, 16]
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "another"))
    assert torch.equal(resumed, read_all(expert, texts))

def test_fingerprint_changes_with_all_that_decides_a_row(tmp_path):
    """Settings, weights, tokenizer, template: another row has another place in the cache."""
    folder = make_expert(tmp_path / "m")
    template = Path(folder, "chat_template.jinja")
    template.write_text("{{ messages[0]['content'] }}")
    kinds = [dict(), dict(read="first"), dict(layers=(1,)), dict(positions=2), dict(cue="w1"),
             dict(untrained=True), dict(own_text=True), dict(own_text=True, tokens=3)]
    prints = [Expert(folder, **kind).fingerprint("states") for kind in kinds]
    assert prints[0] == Expert(folder, layers=(3,)).fingerprint("states")  # the same
    prints += [Expert(folder).fingerprint("texts"), Expert(folder, tokens=3).fingerprint("texts")]
    edit_weights(folder, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + torch.eye(16)[0]})
    prints.append(Expert(folder).fingerprint("states"))
    for change in (lambda: template.write_text("another"), template.unlink):
        change()
        prints.append(Expert(folder).fingerprint("states"))
    assert len(set(prints)) == len(prints) == 13

def test_texts_are_what_generate_gives_for_the_text_alone(tmp_path, own_cache, monkeypatch):
    """Greedy, until a stop token or a line's end, whatever penalties the model's folder asks for."""
    folder = make_expert(tmp_path / "m", seed=1)
    edit(folder, "generation_config.json", repetition_penalty=5.0)
    expert, encoder = Expert(folder, tokens=12), Expert(make_expert(tmp_path / "bert", "Bert"))
    line_end = expert.tokenizer.convert_tokens_to_ids("\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [" ".join([f"w{i} w{i + 1}"] * (1 + i % 3)) for i in range(0, 30, 2)]
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=[1, line_end])
    expected = []
    for text in texts:
        ids = expert.tokenizer(text, return_tensors="pt")["input_ids"]
        row = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
        row = row[:-1] if row[-1] in (1, line_end) else row
        expected.append(" ".join(expert.tokenizer.decode(row, skip_special_tokens=True).split()))
    wrote, nothing = write_texts([expert, encoder], [texts, texts], progress=False)  # encoders do not write
    assert wrote == expected and len({len(text.split()) for text in wrote}) > 2
    assert encoder.writes is False and nothing == [""] * len(texts)
    monkeypatch.setattr(Expert, "load", lambda self, kind: pytest.fail("it was written before"))
    assert write_texts([expert], [texts[::-1]], progress=False) == [wrote[::-1]]

def edit_weights(folder, change):
    """Change the {name: tensor} of a model's folder."""
    path = Path(folder, "model.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})

@pytest.mark.parametrize("damage, message", [  # what is done to an expert's folder, a word of the sentence
    (lambda f: os.remove(f + "/model.safetensors"), "no safetensors weights"),
    (lambda f: os.truncate(f + "/model.safetensors", 900), "cannot be loaded"),
    (lambda f: os.remove(f + "/config.json"), "config.json"),
    (lambda f: os.truncate(f + "/config.json", 9), "cannot be loaded"),
    (lambda f: os.remove(f + "/tokenizer.json"), "tokenizer"),
    (lambda f: edit(f, "config.json", hidden_size=10**9), "width"),
    (lambda f: edit(f, "config.json", vocab_size=10**12), "cannot be loaded"),
    (lambda f: edit(f, "config.json", model_type="unheard"), "unheard"),
    (lambda f: edit(f, "config.json", model_type="x", auto_map=dict(AutoModel="x.Y")), "loaded"),
    (lambda f: edit_weights(f, lambda w: {name: w[name] for name in w if "layers.1." not in name}),
     "not in its files"),
    (lambda f: edit_weights(f, lambda w: w | {"model.norm.weight": torch.tensor([math.nan] + 15 * [1.0])}),
     "not finite")])
def test_a_damaged_expert_is_one_sentence(tmp_path, own_cache, damage, message):
    folder = make_expert(tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_all(Expert(folder))
    assert "\n" not in str(error.value)

def test_a_text_that_does_not_fit_is_refused(tmp_path, own_cache):
    expert = Expert(make_expert(tmp_path / "m"))
    for text, message in (("w1 " * 65, "65 tokens .* 64"), ("", "0 tokens")):
        with pytest.raises(ValueError, match=message):
            read_all(expert, [text])
    with pytest.raises(ValueError, match="room for 1 to 48"):
        write_texts([expert], [["w1 " * 50]], progress=False)

def test_nothing_of_a_models_folder_is_run(tmp_path, own_cache):
    """Neither code that its config names nor a pickle: the canary of each would show it."""
    make_policy(tmp_path / "policy")
    make_expert(tmp_path / "expert")
    pickled = f"cbuiltins\nopen\n(V{tmp_path / 'canary'}\nVw\ntR.".encode()  # open(canary, "w")
    for name, load in (("policy", Policy.from_pretrained), ("expert", lambda f: read_all(Expert(f)))):
        (tmp_path / name / "x.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Y: pass\n")
        edit(tmp_path / name, "config.json", auto_map=dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "x.Y"))
        load(str(tmp_path / name))
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "pytorch_model.bin").write_bytes(pickled)
        with pytest.raises(ValueError, match="no safetensors"):
            load(str(tmp_path / name))
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickled)
    assert (tmp_path / "canary").exists()  # it does bite

# -- router.py
WIDTHS = (5, 12, 8)

def states(n=4, seed=0, widths=WIDTHS):
    """States (n, N, D), zero beyond each width."""
    H = torch.randn(n, len(widths), max(widths), generator=torch.Generator().manual_seed(seed))
    for i, width in enumerate(widths):
        H[:, i, width:] = 0
    return H

def make_router(kind="soft", widths=WIDTHS, **settings):
    torch.manual_seed(0)
    router = ROUTERS[kind](widths, 32, **dict(latents=4, heads=2, dim=16, init_scale=1.0) | settings)
    router.fit_standardization(states(64, seed=1, widths=widths))
    if hasattr(router, "trust"):  # it is zero at the start
        nn.init.normal_(router.trust, std=4.0)
        nn.init.normal_(router.trust_bias, std=0.2)
    return router

def gradients(module):
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return found

def same_gradients(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-8, name

@pytest.mark.parametrize("widths", [WIDTHS, (8, 8), (130, 500, 257)])
def test_one_einsum_equals_a_loop_over_experts(widths):
    """Written once more with a loop, unpadded states and torch's attention: values and gradients."""
    router, H = make_router(widths=widths, temperature=0.5), states(widths=widths)
    up = torch.randn(4, 4, 32)
    std, mean = torch.std_mean(router.standardize(states(64, seed=1, widths=widths)), 0)
    real = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
    torch.testing.assert_close(mean, torch.zeros(real.shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, real.float(), atol=1e-4, rtol=0)
    C, A = router(H)
    (C * up).sum().backward()
    fast = gradients(router)
    x = [((H[:, i, :w] - router.mean[i, :w]) * router.inv_std[i, :w]).clamp(-10, 10)
         for i, w in enumerate(widths)]
    E = [x[i] @ router.W[i, :w] + router.expert_embed[i] for i, w in enumerate(widths)]
    k, v = router.to_kv(router.norm_experts(torch.stack(E, 1))).chunk(2, -1)
    q = router.to_q(router.norm_latents(router.latents))
    heads = lambda t: t.unflatten(-1, (2, 8)).transpose(-3, -2)
    trust = torch.stack([(x[i] * router.trust[i, :w]).mean(1) + router.trust_bias[i]
                         for i, w in enumerate(widths)], 1)[:, None, None].expand(-1, 2, 4, -1)
    y = F.scaled_dot_product_attention(heads(q).expand(4, -1, -1, -1), heads(k), heads(v), trust,
                                       scale=8**-0.5 / 0.5)
    z = router.latents + router.proj(y.transpose(1, 2).flatten(-2))
    z = z + router.mlp(router.norm_mlp(z))
    naive = router.out(router.norm_out(z))
    (naive * up).sum().backward()
    torch.testing.assert_close(C, naive, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(A.sum(-1), torch.ones(4, 2, 4))
    same_gradients(fast, gradients(router))

@pytest.mark.parametrize("kind", ["soft", "hard", "linear"])
def test_a_masked_expert_has_no_influence_and_no_gradient(kind):
    """NaN in its states is harmless; a mask may also differ from problem to problem."""
    router, H = make_router(kind), states()
    mask = torch.tensor([True, False, True])
    nan = H.clone()
    nan[:, 1] = math.nan
    C, A = router(nan, mask)
    assert torch.equal(C, router(H, mask)[0]) and not torch.equal(C, router(H)[0])
    C.square().sum().backward()
    weights = router.map.weight.grad.view(-1, 3, 12).transpose(0, 1) if kind == "linear" else router.W.grad
    assert not weights[1].any() and weights[0].any() and weights[2].any()
    assert all(g.isfinite().all() for g in gradients(router).values() if g is not None)
    if A is not None:
        assert not A[..., 1].any() and torch.allclose(A.sum(-1), torch.ones(4, 2, 4))
        A = router(H, torch.eye(3, dtype=torch.bool)[[0, 1, 2, 0]])[1]
        assert torch.equal(A.mean((1, 2)), torch.eye(3)[[0, 1, 2, 0]])

def test_hard_chooses_one_and_learns_of_all():
    """Forward: the context of the chosen state alone. Backward: the choice learns, for every state."""
    router, H = make_router("hard"), states(32)
    C, A = router(H)
    assert torch.equal(A.round(decimals=5).sort(-1).values[0, 0, 0], torch.tensor([0.0, 0, 1]))
    chosen = F.one_hot(A[:, 0, 0].argmax(-1), 3).bool()
    assert len(chosen.unique(dim=0)) > 1
    torch.testing.assert_close(C, Router.forward(router, H, chosen)[0], atol=1e-5, rtol=1e-5)
    C.square().sum().backward()
    assert router.choice.weight.grad.abs().sum(1).min() > 0

def test_trust_has_a_rate_of_its_own():
    """At rate 0 it has no gradient and changes nothing; else it learns whom to attend to, and with the other
    rates near zero nothing else moves. A problem's states say which of them is right."""
    policy, router = nn.Linear(1, 1), make_router(widths=(12, 12))
    nn.init.zeros_(router.trust)
    nn.init.zeros_(router.trust_bias)
    rlvr.make_optimizer(policy, router, 1e-3, 1e-3)
    router(states(widths=(12, 12)))[0].sum().backward()
    assert router.trust.grad is None and router.trust_bias.grad is None and router.W.grad is not None
    optimizer, W = rlvr.make_optimizer(policy, router, 1e-9, 1e-9, 0.3), router.W.detach().clone()
    for step in range(60):
        H = states(32, seed=2 + step, widths=(12, 12))
        right = (H[:, 0, 0] > 0).long()
        H[:, :, 1:6] += 2.0 * (2 * right - 1)[:, None, None]  # both states hold it, as they hold the task
        A = router(H)[1].mean((1, 2))
        optimizer.zero_grad()
        (-A[torch.arange(32), right].log().mean()).backward()
        optimizer.step()
    assert A[torch.arange(32), right].mean() > 0.9 and torch.allclose(router.W, W, atol=1e-6)

# -- model.py
def make_policy(folder, kind="Llama", **sizes):
    """A random policy, saved to `folder`, and the Hugging Face model itself."""
    policy = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=128)
    twin = random_model(kind, **policy | sizes)
    for name, p in twin.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    twin.save_pretrained(folder)
    return twin

def wake_lora(policy):
    torch.manual_seed(1)
    for layer in policy.adapters():
        for b in layer.B:
            nn.init.normal_(b, std=0.2)
    return policy

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One random Llama with LoRA that does something."""
    folder = tmp_path_factory.mktemp("llama")
    make_policy(folder)
    return wake_lora(Policy.from_pretrained(folder))

def example(prefix=True):
    """Three prompts of several lengths, padded; two completions each, one of them short; a prefix or None."""
    g = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(2, 300, (3, 9), generator=g), torch.tensor([9, 5, 7])
    answer, mask = torch.randint(2, 300, (3, 2, 6), generator=g), torch.ones(3, 2, 6, dtype=torch.bool)
    mask[1, 0, 3:] = False
    return tokens, lengths, (torch.randn(3, 4, 32, generator=g) if prefix else None), answer, mask

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)

@pytest.mark.parametrize("kind, settings", [
    ("Llama", {}), ("Llama", dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3)),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    ("Qwen2", dict(rope_parameters=YARN)), ("Qwen3", dict(head_dim=16))])
@pytest.mark.parametrize("prefixed", [False, True])
def test_logprobs_equal_transformers(tmp_path, kind, settings, prefixed):
    """Padding, prefix, shared prompt, temperature, entropy; LoRA off, and on with it merged into the twin."""
    neutral = "zero" if kind == "Qwen2" else "mean"
    twin, policy = make_policy(tmp_path, kind, **settings), Policy.from_pretrained(tmp_path, neutral=neutral)
    embed = twin.get_input_embeddings()
    tokens, lengths, prefix, answer, mask = example(prefixed)
    for awake in (False, True):
        if awake:
            wake_lora(policy)
            theirs = [module for module in twin.model.layers.modules() if isinstance(module, nn.Linear)]
            ours = [(A, B) for layer in policy.adapters() for A, B in zip(layer.A.split(8), layer.B)]
            for linear, (A, B) in zip(theirs, ours, strict=True):  # q, k, v, o, gate, up, down of each layer
                linear.weight.data += 2.0 * B @ A  # alpha / rank
        with torch.no_grad():
            got, entropy = policy.logprobs(policy.prefill(tokens, lengths, prefix), answer, mask, 0.7)
            for b, g in ((b, g) for b in range(3) for g in range(2)):
                n = int(mask[b, g].sum())
                x = embed(torch.cat((tokens[b, :lengths[b]], answer[b, g, :n])))
                if prefixed:  # in standard deviations of the embeddings, measured from their mean
                    mean = embed.weight.mean(0) * (neutral == "mean")
                    x = torch.cat((mean + embed.weight.std() * prefix[b], x))
                z = (twin(inputs_embeds=x[None]).logits[0, -n - 1:-1] / 0.7).log_softmax(-1)
                torch.testing.assert_close(got[b, g, :n], z.gather(1, answer[b, g, :n, None])[:, 0],
                                           atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(entropy[b, g, :n], -(z.exp() * z).sum(-1), atol=1e-4, rtol=1e-4)
            assert not got[~mask].any()

def test_bfloat16_is_float32_but_for_rounding():
    """Log-probabilities of the embedded policy, and the gradient of its prefix."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = Policy.from_pretrained("tiny/policy", dtype=dtype, neutral="mean")
        tokens, lengths, _, answer, mask = example()
        tokens, answer = tokens % len(policy.embed), answer % len(policy.embed)
        C = torch.ones(3, 4, policy.config.hidden_size, requires_grad=True)
        cache = policy.prefill(tokens, lengths, C)
        logp, _ = policy.logprobs(cache, answer, mask)
        logp.sum().backward()
        assert cache.kv[0][0].dtype == dtype
        found.append((logp[mask].detach(), C.grad.flatten()))
    for rounded, exact in zip(*found):
        error = (rounded - exact).norm() / exact.norm()
        assert 0 < error < 0.05

def test_cached_decoding_equals_the_full_forward(small):
    """40 greedy tokens from the cache, LoRA merged, are what the text as a single prompt gives."""
    tokens, lengths, prefix, *_ = example()
    policy = copy.deepcopy(small)
    policy.stop_at([0])  # a token that none of these chooses
    with torch.no_grad():
        got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 2, 40, temperature=0)
        assert torch.equal(got[:, 0], got[:, 1]) and mask.all()
        for b, t in ((b, t) for b in range(3) for t in (0, 1, 15, 16, 17, 33, 39)):
            text = torch.cat((tokens[b, :lengths[b]], got[b, 0, :t]))[None]
            last = policy.prefill(text, torch.tensor([text.shape[1]]), prefix[b:b + 1]).last
            assert policy.logits(last).argmax() == got[b, 0, t]

def test_lora_merged_is_lora_and_disabled_is_the_frozen_model(small, tmp_path):
    """Merged: the same states but for rounding. Disabled, or fresh: the frozen model's, to the bit."""
    tokens, lengths, prefix, *_ = example()
    last = lambda policy: policy.prefill(tokens, lengths, prefix).last.detach()
    make_policy(tmp_path)
    frozen = Policy.from_pretrained(tmp_path, rank=0)
    apart = last(small)
    with small.lora_merged():
        torch.testing.assert_close(last(small), apart, atol=1e-4, rtol=1e-4)
    with small.lora_disabled():
        assert torch.equal(last(small), last(frozen))
    assert torch.equal(last(Policy.from_pretrained(tmp_path)), last(frozen))
    assert torch.equal(last(small), apart) and (apart - last(frozen)).abs().max() > 0.1
    assert not list(frozen.parameters())

def test_shared_prefill_equals_plain_copies(small):
    """Log-probabilities and gradients of 3 prompts x 2 are those of 6 rows that each run all their text."""
    tokens, lengths, prefix, answer, mask = example()
    prefix.requires_grad_()
    weight = torch.randn(3, 2, 1)
    logp, _ = small.logprobs(small.prefill(tokens, lengths, prefix), answer, mask)
    (logp * weight).sum().backward()
    shared = gradients(small) | dict(prefix=prefix.grad)
    prefix.grad = None
    copies = lambda t: t.repeat_interleave(2, 0)
    cache = small.prefill(copies(tokens), copies(lengths), copies(prefix))
    logp2, _ = small.logprobs(cache, answer.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None])
    (logp2.view_as(logp) * weight).sum().backward()
    torch.testing.assert_close(logp2.view_as(logp), logp, atol=1e-5, rtol=1e-5)
    same_gradients(shared, gradients(small) | dict(prefix=prefix.grad))
    assert shared["prefix"].abs().max() > 1e-3  # it is learned from, through the cached keys and values

def test_swiglus_backward_is_the_derivative():
    assert torch.autograd.gradcheck(SwiGLU.apply, torch.randn(3, 8).double().requires_grad_())

def test_samples_follow_the_probabilities_that_the_loss_is_about(small):
    """Answers of three tokens: each as often as exp(log-probability) says, at one temperature."""
    tokens, lengths, prefix, *_ = example()
    with torch.no_grad():
        cache = small.prefill(tokens[:1], lengths[:1], prefix[:1])
        got, mask = small.generate(cache, 4096, 3, 0.3, torch.Generator().manual_seed(0))
        logp = small.logprobs(cache, got, mask, 0.3)[0][0].sum(-1)
    answers, place, counts = got[0].unique(dim=0, return_inverse=True, return_counts=True)
    expected = 4096 * torch.zeros(len(answers)).scatter(0, place, logp.exp())
    often = expected > 10
    n = int(often.sum())
    assert n > 5 and ((counts - expected).square() / expected)[often].sum() < n + 4 * (2 * n) ** 0.5

def test_token_logprob_equals_autograd():
    h, weight = torch.randn(37, 16, requires_grad=True), torch.randn(70, 16)
    targets, up = torch.randint(0, 70, (37,)), torch.randn(37)
    logp, entropy = TokenLogprob.apply(h, weight, targets, 0.6, 8)
    (logp * up).sum().backward()
    got, h.grad = h.grad, None
    z = (h @ weight.T / 0.6).log_softmax(-1)
    expected = z.gather(1, targets[:, None])[:, 0]
    (expected * up).sum().backward()
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(z.exp() * z).sum(-1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got, h.grad, atol=1e-5, rtol=1e-4)

def test_sample_at_the_edges():
    """Temperature 0 is the likeliest; no token of probability 0 is drawn; NaN gives any token."""
    assert sample(torch.tensor([[0.0, 2, 1]]), 0, None).tolist() == [1]
    ends = torch.tensor([[0.0], [1 - 2**-24]])  # of what torch.rand gives
    assert sample(torch.tensor([[-torch.inf, 0, -torch.inf]] * 2), 1.0, ends).tolist() == [1, 1]
    damaged = torch.tensor([[0.0, math.nan, 0], [math.nan] * 3, [0, 0, math.inf]])
    assert all(0 <= token < 3 for token in sample(damaged, 1.0, torch.rand(3, 1)).tolist())

@pytest.mark.parametrize("key, value", [  # more than a machine has, senseless, or of another type
    ("model_type", "gpt2"), ("model_type", ["x"]), ("hidden_act", "gelu"), ("hidden_size", 10**9),
    ("hidden_size", 16), ("hidden_size", math.nan), ("num_hidden_layers", 10**6), ("num_hidden_layers", 4),
    ("num_hidden_layers", "3"), ("num_attention_heads", 0), ("num_key_value_heads", 3),
    ("intermediate_size", 10**12), ("vocab_size", 10**12), ("vocab_size", 5), ("head_dim", -2),
    ("max_position_embeddings", math.inf), ("tie_word_embeddings", "false"), ("eos_token_id", None),
    ("eos_token_id", 300), ("rope_parameters", dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ("rope_parameters", dict(rope_theta="x")),
    ("rope_parameters", dict(rope_type="linear", rope_theta=1e4, factor=0.0))])
def test_a_policy_that_cannot_run_is_refused(tmp_path, key, value):
    """Unknown kinds, absurd numbers: one sentence, before anything of that size is made."""
    make_policy(tmp_path)
    (tmp_path / "generation_config.json").unlink()  # its eos_token_id would go before the config's
    edit(tmp_path, "config.json", **{key: value})
    with pytest.raises(ValueError) as error:
        Policy.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)

def test_a_policys_tensors_have_the_shape_and_type_that_its_config_implies(tmp_path):
    for name, wrong, message in (
            ("norm.weight", torch.ones(16, 2), r"model.norm.weight .* \(32,\) floating-point"),
            ("norm.weight", torch.ones(32).int(), r"model.norm.weight .* \(32,\) floating-point"),
            ("layers.0.self_attn.q_proj.bias", torch.ones(32), "q_proj.bias .* None .*not there")):
        make_policy(tmp_path)
        edit_weights(tmp_path, lambda weights: weights | {f"model.{name}": wrong})
        with pytest.raises(ValueError, match=message):
            Policy.from_pretrained(tmp_path)

# -- rlvr.py
def test_advantages_by_hand():
    """(reward - mean) / std within each group; a group of equal rewards teaches nothing."""
    A = advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]))
    expected = [[1, -1, -1, 1], [0, 0, 0, 0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float))

def test_grpo_loss_by_hand():
    """Ratio, clip, clip-higher, KL and mask, number by number."""
    old = torch.zeros(1, 2, 3)
    logp = torch.tensor([1.5, 0.5, 1.1, 0.5, 1.5, 9.0]).log().view(1, 2, 3).requires_grad_()
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0]]]).bool()
    args = types.SimpleNamespace(clip=0.2, clip_high=0.3, beta=0.1)
    loss = grpo_loss(logp, old, None, torch.tensor([[1.0, -2.0]]), mask, args)
    assert loss.item() == pytest.approx(-(1.3 + 0.5 + 1.1) + 2 * (0.8 + 1.5))
    loss.backward()  # no gradient where clipped: ratio 1.5 with advantage 1, 0.5 with advantage -2
    torch.testing.assert_close(logp.grad, torch.tensor([[[0, -0.5, -1.1], [0, 3.0, 0]]]))
    ref = logp.detach() + torch.tensor(2.0).log()  # k3 of log 2: 2 - log 2 - 1
    with_kl = grpo_loss(logp, old, ref, torch.tensor([[1.0, -2.0]]), mask, args)
    assert with_kl.item() - loss.item() == pytest.approx(0.1 * 5 * (1 - math.log(2)), rel=1e-5)

def test_kl_estimate_is_unbiased_and_never_negative():
    """Its mean under the policy is the exact KL divergence."""
    p, q = torch.randn(2, 50).double().log_softmax(-1)
    assert (kl_estimate(p, q) >= 0).all()
    torch.testing.assert_close((p.exp() * kl_estimate(p, q)).sum(), (p.exp() * (p - q)).sum())

made = functools.cache(problems)

def remembered(task, split, n, *rest, **options):
    """problems(), made once, and 256 at most: thousands of them take seconds."""
    return list(made(task, split, min(n, 256), *rest, **options))

rlvr.problems = remembered

@pytest.fixture(autouse=True)
def own_signals():
    """train.py takes over Ctrl-C; the next test has it back."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A small run: the embedded policy, two random experts that write, and an encoder, which only reads."""
    folder = tmp_path_factory.mktemp("pool")
    shutil.copytree("tiny/policy", folder / "policy")
    for name, kind, width in (
            ("logic", "Llama", 16), ("algorithmic", "GPTNeoX", 24), ("arithmetic", "Bert", 16)):
        shutil.copytree(f"tiny/{name}", folder / name, ignore=shutil.ignore_patterns("model.safetensors"))
        size = len(transformers.PreTrainedTokenizerFast.from_pretrained(folder / name))
        random_model(kind, vocab_size=size, hidden_size=width, num_hidden_layers=1, eos_token_id=2,
                     max_position_embeddings=256).save_pretrained(folder / name)
    return ("--task logic+algorithmic --level tiny --form plain --neutral mean --write 1 --positions 1 "
            "--own_text False --align 6 --align_words 6 --align_batch 8 --align_lr 5e-4 --steps 6 --batch 6 "
            "--group 4 --warmup 2 --lr 1e-3 --trust_lr 0.1 --seed 1 --micro_batch 4 --max_new 4 --val 8 "
            "--test 8 --eval_every 3 --save_every 3 --router_dim 16 --router_heads 2 --policy {0}/policy "
            "--experts {0}/logic {0}/algorithmic {0}/arithmetic".format(folder)).split()

@pytest.fixture(scope="session")
def finished(quick, tmp_path_factory):
    """The small run, finished."""
    return trained(tmp_path_factory.mktemp("run") / "finished", *quick)

def trained(out, *settings):
    """The folder of a run with these settings; a text of several words stands for all of them."""
    train.run([*" ".join(map(str, settings)).split(), "--out", str(out)])
    return out

def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]

def command(*argv, program=train.run):
    """The exit code of a command line, as its last line gives it to sys.exit."""
    return train.one_sentence("program", lambda: program([*map(str, argv)]))

def refused(capsys, *argv, program=train.run):
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert command(*argv, program=program) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]

def newest(out):
    return load_file(train.checkpoints(out)[0])

def resume_to(finished, out, *settings):
    """Gone on with, a run ends as the finished one, to the bit: weights, moments, generator, state, report,
    and all rows but their times."""
    train.run(["--resume", str(out), *settings])
    a, b = newest(finished), newest(out)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    timeless = lambda row: {k: v for k, v in row.items() if not k.endswith(("seconds", "per_second"))}
    for name in ("metrics.jsonl", "samples.jsonl", "align.jsonl"):
        assert [*map(timeless, rows(finished, name))] == [*map(timeless, rows(out, name))], name
    assert (finished / "eval.json").read_text() == (out / "eval.json").read_text()

def test_the_reference_is_the_frozen_policy_without_its_prefix(quick, tmp_path):
    """LoRA alone begins at KL 0, as its update is zero; a fresh prefix does not."""
    settings = [*quick, "--align 0 --beta 0.04 --steps 2 --collab"]
    single, soft = (rows(trained(tmp_path / collab, *settings, collab)) for collab in ("single", "soft"))
    assert abs(single[0]["kl"]) < 1e-6 < 1e-5 < single[1]["kl"] and soft[0]["kl"] > 1e-4

def test_stage_0_reads_back_texts_that_are_new_to_it(tmp_path):
    """The policy says what the expert would say to held-out problems, but not with another's states."""
    out = trained(tmp_path / "run", "--preset tiny --task algorithmic --experts tiny/algorithmic --align 25 "
                  "--align_words 60 --align_batch 32 --steps 1 --batch 2 --val 48 --test 1")
    [row] = [row for row in rows(out, "align.jsonl") if "read_back" in row]
    assert row["read_back"] > row["shuffled"] + 0.3 and row["n"] > 40

def test_an_expert_with_constant_states_is_named(tmp_path, capsys):
    """Every sum begins with the same word, so the state of the first token is the same for all of them."""
    for read, named in (("first", True), ("last", False)):
        trained(tmp_path / read, "--preset tiny --task arithmetic --experts tiny/arithmetic --align 0 "
                "--steps 1 --batch 2 --val 8 --test 1 --read", read)
        assert ("arithmetic's states are the same for all problems" in capsys.readouterr().out) == named

def test_no_gold_answer_reaches_stage_0(finished, quick, tmp_path, monkeypatch):
    """With wrong gold answers: the same weights after it, to the bit. GRPO does see them."""
    monkeypatch.setattr(rlvr, "problems", lambda *a, **b: [
        replace(p, answer="7000") for p in remembered(*a, **b)])
    misled = trained(tmp_path / "run", *quick)
    one, two = (load_file(next(out.glob("aligned*"))) for out in (finished, misled))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(row["reward"] for row in rows(finished)) and not any(row["reward"] for row in rows(misled))

@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_the_loop_is_grpo_written_once_more(quick, tmp_path, monkeypatch, beta):
    """Each gradient of three steps of two epochs, at temperature 0.7, all prompts at once; the rates of the
    parts; the problems in their order. The loop skips groups of equal rewards where there is no KL."""
    draw, steps, rates, old = train.rollout, [], [], {}

    def drawn(policy, router, batch, args, group, temperature, generator):
        out = draw(policy, router, batch, args, group, temperature, generator)
        out.rewards = ((torch.arange(6)[:, None] + torch.arange(4)) % 3 == 0).float()
        out.rewards[2] = 1.0
        assert temperature == 0.7
        steps.append((policy, router, batch, args, out))
        return out

    def compared(parameters):
        policy, router, batch, args, out = steps[-1]
        score = lambda context: policy.logprobs(
            policy.prefill(batch.tokens, batch.lengths, context), out.tokens, out.mask, 0.7)[0]
        logp = score(router(batch.H)[0])
        with torch.no_grad(), policy.lora_disabled():
            ref = score(None) if beta else None
        first = old.setdefault(len(steps), logp.detach())  # of the policy that sampled
        loss = grpo_loss(logp, first, ref, advantages(out.rewards), out.mask, args) / out.mask.sum()
        naive = dict(enumerate(torch.autograd.grad(loss, parameters)))
        same_gradients({i: p.grad for i, p in enumerate(parameters)}, naive, 1e-3)

    monkeypatch.setattr(train, "rollout", drawn)
    monkeypatch.setattr(train, "add_gradients", compared)
    monkeypatch.setattr(train, "keep", lambda *rest: rates.append(
        [group["lr"] for group in rest[-2].param_groups]))
    trained(tmp_path / "run", *quick, "--steps 3 --epochs 2 --temperature 0.7 --align 0 --lr 1e-2 "
            "--router_lr 2e-3 --micro_batch 1 --beta", beta)
    expected = torch.tensor([[0.5], [1], [1]]) * torch.tensor([1e-2, 2e-3, 0.1])  # warm-up of 2 steps
    torch.testing.assert_close(torch.tensor(rates), expected)
    assert sum((step[2].problems for step in steps), []) == train.load_problems(steps[0][3], "train")[:18]

def test_an_answer_ends_with_its_stop_token_or_is_cut_by_the_limit(finished, monkeypatch):
    """The mask holds the stop token and nothing behind it; what has none is cut, and the verifier is told."""
    policy, router, data, args = loaded(finished)
    policy.stop_at(list(range(0, len(policy.embed), 4)))
    monkeypatch.setattr(rlvr, "verify", lambda text, problem, form, truncated: rewards.Verdict(
        not truncated, not truncated, float(not truncated), "right"))
    generator = torch.Generator().manual_seed(0)
    out = rlvr.rollout(policy, router, data.batch(range(8)), args, 16, 1.0, generator)
    for row, kept in zip(out.tokens.flatten(0, 1).tolist(), out.mask.flatten(0, 1).tolist()):
        n = next((i + 1 for i, token in enumerate(row) if token % 4 == 0), len(row))
        assert kept == [True] * n + [False] * (len(row) - n)
    ended = (out.tokens % 4 == 0).any(-1)
    assert torch.equal(out.truncated, ~ended) and torch.equal(out.rewards, ended.float())
    assert ended.any() and not ended.all()

def test_a_longer_run_begins_alike_and_skipped_problems_are_left_out(monkeypatch):
    monkeypatch.setattr(rlvr, "problems", lambda task, split, n, *rest, **_: [
        Problem(f"{split} {i}", "") for i in range(n)])
    args = types.SimpleNamespace(task="", data="", level="", seed=1, batch=32, align=0, steps=10, test=5,
                                 test_skip=7)
    short, args.steps = train.load_problems(args, "train"), 100
    first = [Problem(f"train {i}", "") for i in range(256)]
    assert train.load_problems(args, "train")[:320] == short
    assert set(short[:256]) == set(first) and short[:256] != first
    assert [p.question for p in train.load_problems(args, "test")] == [f"test {i}" for i in range(7, 12)]

def test_stage_0_reads_one_expert_at_a_time(quick, tmp_path, monkeypatch):
    """In a step of one problem one expert that writes has a gradient, by turns; the encoder always."""
    seen = []

    def noted(parameters):
        W = next(p for p in parameters if p.shape[0] == 3 and p.dim() == 3)
        seen.append(W.grad.abs().sum((1, 2)).gt(0).tolist())

    monkeypatch.setattr(rlvr, "add_gradients", noted)
    monkeypatch.setattr(rlvr, "WORDS_BATCH", 1)
    trained(tmp_path / "run", *quick, "--align_batch 1 --steps 1")
    for part in (seen[:6], seen[6:12]):  # words, reading
        assert {tuple(row) for row in part} == {(True, False, True), (False, True, True)}

def test_controls_are_what_they_say(quick, tmp_path):
    """shuffled: another problem's states; wrong: the last expert's are those of its dataset's next problem;
    partly: only on the last dataset by name; noise: of their mean and std; untrained: of strangers."""
    H = {}
    for control in ("none", "shuffled", "wrong", "partly", "noise", "untrained"):
        args = train.parse_args([*quick, "--out", str(tmp_path), "--control", control, "--align", "0"])
        policy, pool, _ = train.build(args)
        data = Dataset(train.load_problems(args, "train", 256), policy, pool, args)
        H[control] = data.H
    place = {row.numpy().tobytes(): i for i, row in enumerate(H["none"])}
    order = [place[row.numpy().tobytes()] for row in H["shuffled"]]
    assert sorted(order) == sorted(place.values()) and len(place) > 250
    assert sum(i == j for i, j in enumerate(order)) < 3
    assert torch.equal(H["wrong"][:, :2], H["none"][:, :2])
    partner = rewards.next_of_dataset(data.problems)
    assert torch.equal(H["wrong"][:, 2], H["none"][partner, 2])
    primes = torch.tensor([problem.dataset == "count_primes" for problem in data.problems])
    assert torch.equal(H["partly"][primes], H["none"][primes])
    assert torch.equal(H["partly"][~primes], H["wrong"][~primes]) and not primes.all()
    for a, b in zip(torch.std_mean(H["none"], dim=0), torch.std_mean(H["noise"], dim=0)):
        assert (a - b).abs().max() < 0.3 * (1e-3 + H["none"].std(0).max())
    assert not torch.isclose(H["none"], H["untrained"]).all(-1).any()
    assert torch.equal(H["untrained"], read_states([Expert(e.source, untrained=True) for e in pool], [
        [rewards.prompt(p, "plain", None, ask=False) for p in data.problems]] * 3, progress=False))

# -- train.py
def test_a_run_writes_down_what_it_did(finished):
    assert [row["step"] for row in rows(finished)] == list(range(1, 7))
    names = {"logic", "algorithmic", "arithmetic"}
    for row in rows(finished):
        assert row.keys() >= {"length", "kl", "entropy", "grad_norm", "rollout_seconds", "train_seconds",
                              "tokens_per_second", "attention_entropy"}
        assert all(0 <= row[key] <= 1 for key in ("reward", "accuracy", "truncated", "frac_reward_zero_std"))
        assert set(row["attention"]) == names and sum(row["attention"].values()) == pytest.approx(1, abs=1e-5)
        assert set(row["attention_by_dataset"]) <= {"family_relationships", "count_primes"}
        assert sum(row["reasons"].values()) == 24 and ("val" in row) == (row["step"] % 3 == 0)
    verdicts, _, _ = evaluation.evaluate(*loaded(finished, "val"))
    assert rows(finished)[-1]["val"] == evaluation.accuracy(verdicts)
    assert {row["reason"] for row in rows(finished, "samples.jsonl")} <= set(rewards.REASONS)
    assert [row["expert"] for row in rows(finished, "align.jsonl")[1:]] == ["logic", "algorithmic"]
    assert set(json.loads((finished / "eval.json").read_text())["masked"]) == names
    assert len(list(finished.glob("step-*"))) == 2 and not list(finished.glob("*.part"))

def test_three_and_three_steps_equal_six(finished, quick, tmp_path):
    resume_to(finished, trained(tmp_path / "run", *quick, "--steps 3"), "--steps", "6")

def forked(run, log):
    """Call run() in a fork of this process, which has all imported; what it prints is in `log`."""
    def child():
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        sys.exit(run())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process

def stop_in(signal_number, where, name, moment, counts=lambda *args: True):
    """Sends itself a signal in the `moment`-th call of where.name that counts."""
    calls, original = [], getattr(where, name)

    def deadly(*args):
        calls.extend([1] * counts(*args))
        if len(calls) == moment:
            os.kill(os.getpid(), signal_number)
        return original(*args)

    setattr(where, name, deadly)

@pytest.mark.parametrize("code, stop", [
    (0, (signal.SIGINT, train, "log_alignment", 5)),  # finish the step and save it
    (0, (signal.SIGTERM, train, "log", 5)),
    (-9, (signal.SIGKILL, train, "log_alignment", 11)),  # between two checkpoints
    (-9, (signal.SIGKILL, experts.os, "replace", 7, lambda _, path: "safetensors" in path.name))])  # in one
def test_stopped_or_killed_and_resumed_is_the_undisturbed_run(finished, quick, tmp_path, code, stop):
    out, log = tmp_path / "run", tmp_path / "log"
    process = forked(lambda: stop_in(*stop) or command(*quick, "--out", out), log)
    process.join()
    assert process.exitcode == code
    assert (out / "config.json").exists() and not (out / "eval.json").exists()
    if code == 0:
        assert "stopped and saved" in log.read_text() and "-000005-" in train.checkpoints(out)[0].name
    resume_to(finished, out)

def stopped_at_three(finished, out):
    """A copy of the finished run as if it had been stopped after step 3 of 6."""
    shutil.copytree(finished, out)
    train.checkpoints(out)[0].unlink()
    (out / "eval.json").unlink()
    return out

def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, tmp_path, capsys):
    """Said in a sentence, and the run ends the same. All damaged: refused, nothing is started over."""
    shutil.copytree(finished, tmp_path / "run")
    flip(train.checkpoints(tmp_path / "run")[0], -5)
    with pytest.warns(UserWarning, match="damaged.*the checkpoint before it"):
        resume_to(finished, tmp_path / "run")
    for path in train.checkpoints(tmp_path / "run"):
        os.truncate(path, 1000)
    with pytest.warns(UserWarning):
        assert "another --out" in refused(capsys, "--resume", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 6

def test_every_bit_of_a_checkpoint_counts(finished, tmp_path):
    """A flipped bit or a cut is found wherever it is; one of other models leaves the weights as they were."""
    path = train.checkpoints(finished)[0]
    data, copied = path.read_bytes(), tmp_path / path.name
    header = int.from_bytes(data[:8], "little")
    for at in (0, 9, header // 2, header + 4, header + 8, len(data) // 2, len(data) - 1):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
        for damaged in (flipped, data[:at]):
            copied.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged"):
                experts.read_tensors(copied)
    policy, router = Policy.from_pretrained("tiny/policy"), make_router()
    before = [p.detach().clone() for p in (*policy.parameters(), *router.parameters())]
    with pytest.raises(ValueError, match="other models"):
        rlvr.load_checkpoint(path, policy, router)
    assert all(torch.equal(a, b) for a, b in zip(before, (*policy.parameters(), *router.parameters())))

def test_a_full_disk_loses_only_what_was_not_saved(finished, tmp_path, monkeypatch, capsys):
    """A checkpoint that does not fit: one sentence, no half file; with room again, the undisturbed run."""
    out, log = stopped_at_three(finished, tmp_path / "run"), train.log
    with monkeypatch.context() as patch:  # full from step 4 on
        patch.setattr(train, "log", lambda *args: patch.setattr(experts.os, "fsync", full_disk) or log(*args))
        sentence = refused(capsys, "--resume", out)
    assert "No space" in sentence and "--resume" in sentence and not list(out.glob("*.part"))
    resume_to(finished, out)

def test_one_process_trains_in_a_folder(finished, quick, tmp_path, capsys):
    with train.one_process(finished):
        assert "another process" in refused(capsys, "--resume", finished)
    assert "holds a run" in refused(capsys, *quick, "--out", finished)
    with train.one_process(tmp_path):
        assert "another process" in refused(capsys, *quick, "--out", tmp_path)
    with train.one_process(tmp_path):  # the file is there, its process is not
        pass

def test_a_step_that_is_not_finite_is_skipped(finished, tmp_path, monkeypatch, capsys):
    """Weights and moments stay as they were, to the bit; the next step goes on; five in a row end the run."""
    out = stopped_at_three(finished, tmp_path / "run")
    good = newest(out)
    with monkeypatch.context() as patch:
        patch.setattr(train, "grpo_loss", lambda *a: grpo_loss(*a) * math.nan)
        patch.setattr(train, "test_report", lambda *a: pytest.fail("it went on"))
        assert "5 steps in a row" in refused(capsys, "--resume", out, "--steps", 20)
    kept = newest(out)
    assert len(rows(out)) == 8 and good.keys() == kept.keys()
    assert all(torch.equal(good[k], kept[k]) for k in good if k not in ("generator.0", "state"))
    train.run(["--resume", str(out), "--steps", "9"])
    assert not torch.equal(newest(out)["optimizer.0.step"], kept["optimizer.0.step"])

def test_out_of_memory_halves_the_micro_batch(quick, tmp_path, monkeypatch, capsys):
    """Same samples, same gradient. A prompt that does not fit alone is a sentence; a mistake is raised."""
    settings = [*quick, "--micro_batch 6 --steps 1 --align 0 --beta 0.04"]
    original, gradients_of_step, sizes, room = Policy.logprobs, [], [], 3
    errors = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]

    def logprobs(self, cache, tokens, *rest):
        if torch.is_grad_enabled():
            sizes.append(len(tokens))
            if len(tokens) > room or len(sizes) == 3:  # after a part that left its gradient
                raise errors[len(sizes) % 3]
        return original(self, cache, tokens, *rest)

    monkeypatch.setattr(train, "add_gradients", lambda parameters: gradients_of_step.append(
        {i: p.grad.clone() for i, p in enumerate(parameters)}))
    [row] = rows(trained(tmp_path / "a", *settings))
    monkeypatch.setattr(Policy, "logprobs", logprobs)
    [other] = rows(trained(tmp_path / "b", *settings))
    expected, found = gradients_of_step
    assert any(g.any() for g in expected.values()) and row["kl"] > 0
    same_gradients(found, expected, 1e-4)
    assert (other["kl"], other["entropy"]) == pytest.approx((row["kl"], row["entropy"]), rel=1e-4)
    assert sizes == [6, 3, 3, 1, 1, 1, 1, 1, 1]
    room = 0
    assert "out of memory" in refused(capsys, *quick, "--out", tmp_path / "c", "--align", "0")
    errors[:] = [RuntimeError("shapes do not match")] * 3
    with pytest.raises(RuntimeError, match="shapes"):
        command(*quick, "--out", tmp_path / "d", "--align", "0")

def test_the_readmes_router_trains_as_it_stands(tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    monkeypatch.setitem(ROUTERS, "mean", None)  # taken out again after the test
    monkeypatch.setitem(train.PRESETS, "tiny", train.PRESETS["tiny"] | dict(
        align=1, align_words=1, align_batch=4, batch=4, val=4, test=4))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    row = rows(tmp_path / "runs" / "mean")[-1]
    assert list(row["attention"].values()) == pytest.approx([1 / 3] * 3) and row["step"] == 3

@pytest.mark.parametrize("collab, control, align", [
    ("hard", "shuffled", "6"), ("soft", "noise", "0"), ("linear", "untrained", "6"),
    ("prefix", "none", "6"), ("single", "none", "6"), ("text", "none", "0")])
def test_every_mode_trains_and_is_found_again(quick, tmp_path, capsys, collab, control, align):
    settings = f"--steps 2 --collab {collab} --control {control} --align {align}"
    out = trained(tmp_path / "run", *quick, settings)
    saved = newest(out)
    assert any(key.startswith("router") for key in saved) == (collab in ROUTERS)
    assert ("attention" in rows(out)[0]) == (collab in ("soft", "hard"))
    assert ("logic: " in loaded(out)[2].prompts[0]) == (collab == "text")
    assert bool(list(out.glob("aligned*"))) == (align == "6")
    capsys.readouterr()
    assert command(out, "--json", program=evaluation.main) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((out / "eval.json").read_text())
    assert all(report[key] == kept[key] for key in kept) and (out / "run.png").exists()
    assert command(out, "--ask", "How many primes?", program=evaluation.main) == 0
    assert ("logic" in capsys.readouterr().out.split("rewarded")[1]) == (collab in ("soft", "hard"))
    if control in ("shuffled", "noise"):
        assert "start anew with more" in refused(capsys, "--resume", out, "--steps", "3")

def as_rank(rank, ports, out, settings):
    """A run alone (rank None) or as one of two, which then go on with it until rank 1 is lost in step 3."""
    if rank is not None:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=ports[0], N_MUSKETEERS_TIMEOUT="3")
        for module in (rlvr, train, evaluation):
            module.RANK, module.WORLD = rank, 2
    rollout, add_gradients, seen = train.rollout, train.add_gradients, {}

    def given(*rest):  # no draws: two ranks have the samples of one
        sampled = rollout(*rest)
        n, g = torch.tensor([[len(p.question)] for p in sampled.problems]), torch.arange(4)
        sampled.tokens = 3 + ((n + 7 * g)[..., None] + torch.arange(4)) % 90
        sampled.mask, sampled.rewards = sampled.tokens > 0, ((n + g) % 3 == 0).float()
        return sampled

    def noted(parameters):
        add_gradients(parameters)
        seen.setdefault("gradients", {i: p.grad.clone() for i, p in enumerate(parameters)})

    train.rollout, train.add_gradients = given, noted
    if rank == 1:
        stop_in(signal.SIGKILL, train, "log", 3)
    trained(out, *settings)
    torch.save(seen["gradients"], f"{out}-{rank}.pt")
    if rank is not None:
        os.environ["MASTER_PORT"] = ports[1]  # on the first one rank 0 may still be listening
        return train.one_sentence("train.py", lambda: train.run(["--resume", str(out), "--steps", "4"]))

def test_two_ranks_are_one_run_and_a_lost_one_ends_the_other(quick, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [str(free.getsockname()[1]) for free in (first, second)]
    settings = [*quick, "--steps 2 --batch 5 --align_batch 5 --align_words 2 --align 2"]
    processes = [forked(lambda: as_rank(rank, ports, tmp_path / name, settings), tmp_path / f"log-{rank}")
                 for name, rank in (("two", 0), ("two", 1), ("one", None))]
    for process in processes:
        process.join()
    speaks, quiet = ((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
    assert [process.exitcode for process in processes] == [2, -9, 0], speaks
    assert "held-out problems" in speaks and "n-Musketeers" not in quiet
    assert "another rank is gone" in speaks and "Traceback" not in speaks
    assert "2 ranks" in refused(capsys, "--resume", tmp_path / "two")
    a, b = (load_file(next((tmp_path / name).glob("aligned*"))) for name in ("one", "two"))
    trained = [key for key in a if key.startswith(("policy", "router"))]
    same_gradients({key: a[key] for key in trained}, {key: b[key] for key in trained}, 1e-2)
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("one-None", "two-0", "two-1"))
    assert all(torch.equal(two[key], other[key]) for key in two) and any(g.any() for g in one.values())
    same_gradients(two, one, 1e-2)
    assert [row["reward"] for row in rows(tmp_path / "one")] == [
        row["reward"] for row in rows(tmp_path / "two")][:2]

@pytest.mark.parametrize("arguments, word", [  # behind those of the small run; a word of the sentence
    ("--group 1", "--group"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--batch 0", "--batch"),
    ("--temperature 0", "--temperature"), ("--steps 0", "--steps"), ("--level terms=3", "level"),
    ("--level tiny --task gcd", "--level easy"), ("--level impossible", "easy, default, hard"),
    ("--task chain_sum --level min_terms=two", "int"),
    ("--task chain_sum --level min_terms=9", "cannot be built"), ("--task logic+nope", "nope"),
    ("--task chain_sun", "chain_sum"), ("--task countdown", "refused"), ("--align 5 --collab text", "align"),
    ("--beta 0.04", "--beta 0"), ("--collab louder", "louder"), ("--align -1", "--align"),
    ("--experts nowhere/at/all", "nowhere"), ("--experts tiny", "tiny"), ("--policy nowhere", "nowhere"),
    ("--layer 9", "layer"), ("--layer -9", "layer"), ("--collab prefix --control noise --align 0", "control"),
    ("--collab single --align 0 --lora_rank 0", "lora_rank"), ("--max_new 600", "window"),
    ("--form tagged", "chat template"), ("--device cuda:7", "--device"), ("--device gpu", "--device"),
    ("--router_heads 3", "router_heads"), ("--write 300", "room"), ("--positions 0", "--positions"),
    ("--task gsm8k --data nowhere", "nowhere"), ("--task gsm8k --data FILE", "pass a larger file"),
    ("--experts ENCODER", "writes|text"), ("--out FILE/run", "FILE")])
def test_bad_input_is_one_sentence(quick, tmp_path, capsys, arguments, word):
    (tmp_path / "FILE").touch()
    settings = arguments.replace("FILE", f"{tmp_path}/FILE").replace("ENCODER", quick[-1]).split()
    assert re.search(word, refused(capsys, *quick, "--out", tmp_path / "run", *settings))
    assert not list(tmp_path.glob("*/config.json"))

def test_resume_takes_the_run_as_it_is(finished, tmp_path, capsys):
    assert "nowhere holds no run" in refused(capsys, "--resume", "nowhere")
    assert "seed" in refused(capsys, "--resume", finished, "--seed", 7)
    shutil.copytree(finished, tmp_path / "run")
    assert "steps" in refused(capsys, "--resume", tmp_path / "run", "--steps", 2)
    next((tmp_path / "run").glob("aligned-*")).unlink()  # as if it were in stage 0
    assert "draws for all" in refused(capsys, "--resume", tmp_path / "run", "--steps", 9)
    args = train.parse_args(["--resume", str(finished), "--steps", "9"])
    assert (args.steps, args.batch, args.task) == (9, 6, "logic+algorithmic")
    before = (finished / "metrics.jsonl").read_bytes()
    assert command("--resume", finished) == 0 and (finished / "metrics.jsonl").read_bytes() == before

@pytest.mark.parametrize("damage", [  # what the file holds, or what its settings do
    b"", b"[]", b'{"args": 3}', b'{"args": {"task": "gsm8k"', b"\xff", dict(batch=-1), dict(task=None),
    dict(lr=math.nan), dict(collab=1), dict(unheard=1), dict(layer=["x"])])
def test_a_damaged_config_of_a_run_is_one_sentence(finished, tmp_path, capsys, damage):
    """eval.py, too, says so where it reads what is damaged."""
    path = Path(shutil.copy(finished / "config.json", tmp_path))
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        edit(tmp_path, path.name, args=json.loads(path.read_text())["args"] | damage)
    assert "damaged" in refused(capsys, "--resume", tmp_path)
    if isinstance(damage, bytes) or "layer" in damage:
        assert "damaged" in refused(capsys, tmp_path, program=evaluation.main)

def test_a_small_data_file_gives_the_problems_that_it_has(quick, tmp_path):
    questions = [f"How much is {i} + {i + 1}?" for i in range(24)]
    held_out = sum(rewards.split_of(question) == "test" for question in questions)
    lines = [json.dumps(dict(question=question, answer="#### 5")) for question in questions]
    (tmp_path / "data").write_text("\n".join(lines))
    out = trained(tmp_path / "run", *quick, "--task gsm8k --align 0 --steps 1 --data", tmp_path / "data")
    assert json.loads((out / "eval.json").read_text())["n"] == min(8, held_out)

# -- eval.py
def test_wilson_by_hand():
    assert evaluation.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    assert evaluation.wilson(0, 5)[0] == 0 and evaluation.wilson(5, 5)[1] == 1

def loaded(out, split="test"):
    """(policy, router, problems of a split, args) of a run, as eval.py has them."""
    args = train.saved_run(out)
    policy, pool, router = train.build(args)
    rlvr.load_newest(out, policy, router)
    return policy, router, Dataset(train.load_problems(args, split), policy, pool, args), args

def test_swap_counts_who_follows_the_states(finished, monkeypatch):
    """Who says what the states' expert says follows always; who goes by the question never does."""
    policy, router, data, args = loaded(finished)
    place = {row.numpy().tobytes(): i for i, row in enumerate(data.H)}
    data.texts = [[f"{i}" for i in range(len(data))] for _ in data.texts]
    for reads, follows in ((True, 1.0), (False, 0.0)):
        def answers(policy, router, data, args, rows=None, H=None, **rest):
            read = [place[H[i].numpy().tobytes()] if reads else i for i in rows]
            attention = torch.full((len(rows), 2, 8, 3), 1 / 3)
            verdicts = [rewards.verify("x", data.problems[i], "plain") for i in rows]
            return verdicts, [f" {i}" for i in read], attention

        monkeypatch.setattr(evaluation, "evaluate", answers)
        swap = evaluation.swap_test(policy, router, data, args)
        assert swap["follows"] == follows and swap["n"] >= len(data) - 1 and swap["strict"] == 0
    data.problems[0] = replace(data.problems[0], dataset="alone")  # there is nothing to swap it with
    assert evaluation.swap_test(policy, router, data, args)["n"] < len(data)

def test_before_and_masked_are_what_they_say(finished, monkeypatch):
    """Before: the frozen policy alone. Masked: nothing of that expert. Its share: of all its states."""
    policy, router, data, args = loaded(finished)
    frozen, pool, _ = train.build(args)
    wake_lora(policy)
    answer, calls = evaluation.evaluate, []
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: calls.append(answer(*a)) or calls[-1])
    evaluation.test_report(policy, router, data, args, pool)
    assert calls[0][1] == answer(frozen, None, data, args)[1] != calls[1][1] and calls[0][2] is None
    assert len(calls) == 2 + len(pool)
    for e, (_, _, A) in enumerate(calls[2:]):
        assert not A[..., e].any()
        torch.testing.assert_close(A.sum(-1), torch.ones(A.shape[:-1]))
    A, owner = torch.randn(4, 2, 3, 5).softmax(-1), torch.tensor([0, 1, 1, 1, 2])
    naive = torch.stack([A[..., owner == e].sum(-1) for e in range(3)], -1)
    torch.testing.assert_close(evaluation.by_expert(A, owner), naive)
    assert evaluation.by_dataset([*"abab"], torch.tensor([1.0, 2, 3, 6])) == dict(a=2, b=4)

def test_the_forecast_by_hand(finished, monkeypatch, capsys):
    """A rollout of a minute: 10 steps of 3.5 minutes, and 48 test answers of 3/32 minutes."""
    policy, router, data, args = loaded(finished)
    settings = dict(steps=10, batch=4, group=8, epochs=1, beta=0.0, align=0, test=16, val=8, eval_every=5)
    monkeypatch.setattr(evaluation, "rollout", lambda *_: types.SimpleNamespace(seconds=60.0))
    evaluation.show_time(policy, {"train": data}, types.SimpleNamespace(**vars(args) | settings), 0)
    assert "about 39.5 minutes: reading 0.0, GRPO 35.0, tests 4.5" in capsys.readouterr().out

def test_eval_reports_the_run(finished, capsys):
    """Masked, swap; intervals hold the shares; the JSON line agrees with training's report."""
    assert command(finished, "--json", program=evaluation.main) == 0
    output = capsys.readouterr().out.splitlines()
    report, kept = json.loads(output[-1]), json.loads((finished / "eval.json").read_text())
    for when in ("before", "after"):
        low, high = report[when]["ci95"]
        assert 0 <= low <= report[when]["strict"] <= high <= 1
    assert all(report[key] == kept[key] for key in kept)
    assert 0 <= report["swap"]["follows"] <= 1
    assert (finished / "run.png").stat().st_size > 10_000
    assert any("attention (masked out): logic" in line for line in output)
    assert command(finished, "--aligned", program=evaluation.main) == 0
    assert command(finished, "--ask", "How many primes are between 1 and 9?", program=evaluation.main) == 0
    bars = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in bars] == ["logic", "algorithmic", "arithmetic"]
    assert sum(float(re.search(r"\d\.\d\d", line).group()) for line in bars) == pytest.approx(1, abs=0.02)
    assert (finished / "aligned.png").exists()

def test_bad_input_of_eval_is_one_sentence(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    shutil.copytree(finished, tmp_path / "run")
    for path in train.checkpoints(tmp_path / "run"):
        path.unlink()
    for run, arguments, word in (
            (finished, "--ask x --n 5", "--ask"), (finished, "--ask x --json", "--ask"),
            (finished, "--ask", "question"), (finished, "--n 0", "--n"),
            (finished, "--device cuda:9", "--device"), (tmp_path, "", "no run"),
            (tmp_path / "run", "", "no checkpoint"), (tmp_path / "run", "--aligned", "stage 0")):
        assert word in refused(capsys, run, *arguments.split(), program=evaluation.main)
