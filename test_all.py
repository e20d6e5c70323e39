"""What must stay true. On the CPU, without downloads:   python -m pytest -q test_all.py"""
import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["N_MUSKETEERS_CACHE"] = tempfile.mkdtemp(prefix="n-musketeers-test-")  # what is read goes here
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import contextlib
import copy
import json
import math
import pickle
import re
import resource
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
from experts import Expert, read, write
from model import Policy, TokenLogprob, sample
from rewards import problems
from rlvr import Dataset, advantages, evaluate, grpo_loss, kl_estimate
from router import ROUTERS, LinearRouter, Router

torch.set_num_threads(1)  # for models this small two threads only wait for each other
os.chdir(Path(__file__).parent)
atexit.register(shutil.rmtree, os.environ["N_MUSKETEERS_CACHE"], True)

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for one test."""
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

def edit(folder, name, **changes):
    """Change keys of a JSON file."""
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

@contextlib.contextmanager
def files_of_at_most(size):
    """As near to a full disk as a process without privileges gets: no file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

# -- rewards.py

# -- experts.py
WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 40] for j in range(3 + 5 * i % 11)) for i in range(9)]
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)
KINDS = dict(llama="Llama", qwen2="Qwen2", neox="GPTNeoX", bert="Bert")

def make_expert(folder, kind="llama", seed=0, chat=False, **sizes):
    """A random model with a word-level tokenizer, saved as an ordinary Hugging Face folder; its path."""
    names = ["[PAD]", "[EOS]", "[CLS]", "[SEP]", *WORDS, "\n", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(names)}
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
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(getattr(transformers, f"{KINDS[kind]}Config")(**SIZES | sizes))
    for p in model.parameters():  # larger than usual, so that every token matters to a state
        nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return str(folder)

def read_all(expert, texts=TEXTS):
    return read([expert], [texts], progress=False)

@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_transformers_on_the_text_alone(tmp_path, kind, own_cache):
    """Every layer, each way to read: what the model gives for the one text, without any padding."""
    folder = make_expert(tmp_path / "m", kind)
    expert = Expert(folder, layers=(0, 1, 2, 3))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    H = {read_as: read_all(Expert(folder, read_as, (0, 1, 2, 3))) for read_as in ("last", "first", "mean")}
    for i in (0, 5):
        with torch.no_grad():
            ids = expert.tokenizer(TEXTS[i], return_tensors="pt")["input_ids"]
            out = model(ids, output_hidden_states=True)
        hidden = torch.stack(out.hidden_states)[:, 0]  # (layers, T, width)
        for read_as, expected in dict(last=hidden[:, -1], first=hidden[:, 0], mean=hidden.mean(1)).items():
            torch.testing.assert_close(H[read_as][i], expected, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_state_is_that_of_its_text_to_the_bit(tmp_path, monkeypatch, kind):
    """However the cache was filled: in another order, with other texts, one by one, or partly before."""
    expert, texts = Expert(make_expert(tmp_path / "m", kind)), TEXTS * 20 + [f"w1 {text}" for text in TEXTS]
    found = []
    for name, parts in dict(all=[texts], reverse=[texts[::-1]], alone=[[text] for text in TEXTS],
                            partly=[TEXTS[2:5], texts]).items():
        monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / name))
        for part in parts:
            read_all(expert, part)
        found.append(read_all(expert))
    assert all(torch.equal(found[0], other) for other in found[1:])

def test_layers_and_positions_give_the_entries_they_name(tmp_path, own_cache):
    """K = layers x positions: layer by layer, and in each the last token first."""
    folder = make_expert(tmp_path / "m")
    both = Expert(folder, layers=(1, -1), positions=3)
    H = read_all(both)
    assert both.entries == 6 and both.layers == [1, 3] and H.shape == (len(TEXTS), 6, 16)
    for k, layer in ((0, 1), (3, 3)):
        assert torch.equal(H[:, k], read_all(Expert(folder, layers=(layer,)))[:, 0])
    one_word_less = read_all(Expert(folder, layers=(1,)), [text.rsplit(" ", 1)[0] for text in TEXTS])
    torch.testing.assert_close(H[:, 1], one_word_less[:, 0], atol=1e-5, rtol=1e-5)

def test_padding_widths_and_dtype(tmp_path, own_cache, monkeypatch):
    """A narrower expert is padded with zeros; one dtype for all, the experts' own where theirs agree."""
    a, b = Expert(make_expert(tmp_path / "a")), Expert(make_expert(tmp_path / "b", "bert", hidden_size=24))
    H = read([a, b], [TEXTS, TEXTS[::-1]], progress=False)
    assert H.shape == (len(TEXTS), 2, 24) and H.dtype == torch.float32 and not H[:, 0, 16:].any()
    assert torch.equal(H[:, :1, :16], read_all(a)) and torch.equal(H[:, 1:], read_all(b, TEXTS[::-1]))
    monkeypatch.setattr(experts, "SMALL", 1)
    assert read_all(Expert(a.source)).dtype == torch.bfloat16

def test_cache_hit_loads_no_model(tmp_path, own_cache, monkeypatch):
    """What was read once, states or texts, is never read again, in whatever order it is asked for."""
    expert = Expert(make_expert(tmp_path / "m"))
    first, wrote = read_all(expert), write([expert], [TEXTS], progress=False)
    monkeypatch.setattr(Expert, "load", lambda self, kind: pytest.fail("a cached text was read again"))
    again = Expert(expert.source)
    assert torch.equal(read_all(again, TEXTS[::-1] * 2), first.flip(0).repeat(2, 1, 1))
    assert write([again], [TEXTS], progress=False) == wrote

@pytest.mark.parametrize("damage", ["cut", "empty", "bit of a state", "bit of the header", "other name"])
def test_damaged_shard_is_read_again(tmp_path, own_cache, damage):
    """It is found by its checksum, said, deleted and made again, with the same states."""
    expert = Expert(make_expert(tmp_path / "m"))
    first = read_all(expert)
    [shard] = own_cache.glob("states/*/*.safetensors")
    data = bytearray(shard.read_bytes())
    if damage.startswith("bit"):
        data[-3 if "state" in damage else 12] ^= 4
    shard.write_bytes(dict(cut=data[:len(data) // 2], empty=b"").get(damage, data))
    if damage == "other name":
        shard.rename(shard.with_name("0" * 16 + ".safetensors"))
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(read_all(expert), first)
    assert torch.equal(read_all(expert), first)  # and no warning: pytest would show it

def test_interrupted_read_continues(tmp_path, own_cache, monkeypatch):
    """Ctrl-C in the fourth batch: three are kept and are not read again."""
    expert, compute, seen = Expert(make_expert(tmp_path / "m")), Expert.states_of, []
    texts = [" ".join(["w1"] * n) for n in (60, 50, 40, 30, 20, 10)]  # four lengths of batches

    def stopped(self, model, ids, length):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(length)
        return compute(self, model, ids, length)

    with monkeypatch.context() as patch:
        patch.setattr(Expert, "states_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            read_all(expert, texts)
        assert seen == [64, 48, 32]
        seen[:] = []
        resumed = read_all(expert, texts)
    assert seen == [16]
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "another"))
    assert torch.equal(resumed, read_all(expert, texts))

def test_a_full_disk_costs_the_cache_only(tmp_path, own_cache):
    """The states are there, a warning says that they could not be kept, and no half file is left."""
    expert = Expert(make_expert(tmp_path / "m"))
    with files_of_at_most(300), pytest.warns(UserWarning, match="cannot be kept.*N_MUSKETEERS_CACHE"):
        H = read_all(expert)
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
    assert torch.equal(H, read_all(expert)) and len(list(own_cache.rglob("*.safetensors"))) == 1

def test_fingerprint_changes_with_all_that_decides_a_row(tmp_path, monkeypatch):
    """Settings, weights, tokenizer, template, dtype: another row has another place in the cache."""
    folder = make_expert(tmp_path / "m", chat=True)
    kinds = [dict(), dict(read="first"), dict(layers=(1,)), dict(positions=2), dict(cue="w1"),
             dict(template="plain"), dict(untrained=True)]
    prints = [Expert(folder, **kind).fingerprint("states") for kind in kinds]
    assert prints[0] == Expert(folder, layers=(3,), template="chat").fingerprint("states")  # the same
    prints += [Expert(folder).fingerprint("texts"), Expert(folder, tokens=3).fingerprint("texts")]
    with monkeypatch.context() as patch:
        patch.setattr(experts, "SMALL", 1)
        prints.append(Expert(folder).fingerprint("states"))
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    prints.append(Expert(folder).fingerprint("states"))
    Path(folder, "chat_template.jinja").write_text("another")
    prints.append(Expert(folder).fingerprint("states"))
    assert len(set(prints)) == len(prints) == 12

@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_texts_are_what_generate_gives_for_the_text_alone(tmp_path, own_cache, kind):
    """Greedy, until a stop token or a line's end, whatever penalties the model's own generation_config
    has."""
    folder = make_expert(tmp_path / "m", kind, seed=1)
    edit(folder, "generation_config.json", repetition_penalty=5.0)
    expert = Expert(folder, tokens=12)
    line_end = expert.tokenizer.convert_tokens_to_ids("\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [" ".join([f"w{i} w{i + 1}"] * (1 + i % 3)) for i in range(30)]
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=[1, line_end])
    expected = []
    for text in texts:
        ids = expert.tokenizer(text, return_tensors="pt")["input_ids"]
        row = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
        row = row[:-1] if row[-1] in (1, line_end) else row
        expected.append(" ".join(expert.tokenizer.decode(row, skip_special_tokens=True).split()))
    [wrote] = write([expert], [texts], progress=False)
    assert wrote == expected and len({len(text.split()) for text in wrote}) > 2

def test_encoders_write_nothing(tmp_path, own_cache):
    """A BERT reads; what it would write is empty, beside one that writes."""
    pair = [Expert(make_expert(tmp_path / kind, kind), tokens=2) for kind in ("bert", "llama")]
    empty, wrote = write(pair, [TEXTS, TEXTS], progress=False)
    assert [expert.writes for expert in pair] == [False, True] and empty == [""] * len(TEXTS) and any(wrote)

def drop_layer(folder):
    path = Path(folder, "model.safetensors")
    save_file({key: value for key, value in load_file(path).items() if "layers.1." not in key}, path)

DAMAGES = [  # (what is done to an expert's folder, a word of the sentence)
    (lambda f: os.remove(f + "/model.safetensors"), "no safetensors weights"),
    (lambda f: os.truncate(f + "/model.safetensors", 900), "damaged"),
    (lambda f: os.remove(f + "/config.json"), "config.json"),
    (lambda f: os.truncate(f + "/config.json", 9), "damaged"),
    (lambda f: Path(f, "config.json").write_text("[]"), "width|damaged"),
    (lambda f: os.remove(f + "/tokenizer.json"), "tokenizer"),
    (lambda f: edit(f, "config.json", hidden_size=10**9), "width"),
    (lambda f: edit(f, "config.json", vocab_size=10**12), "cannot be loaded"),
    (lambda f: edit(f, "config.json", model_type="unheard"), "unheard"),
    (lambda f: edit(f, "config.json", is_encoder_decoder=True), "encoder"),
    (lambda f: edit(f, "config.json", model_type="x", auto_map=dict(AutoModel="x.Y")), "loaded"),
    (drop_layer, "not in its files"),
]

@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_damaged_expert_is_one_sentence(tmp_path, own_cache, damage, message):
    """Whatever is wrong with a model's folder: a ValueError of one line."""
    folder = make_expert(tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_all(Expert(folder))
    assert "\n" not in str(error.value)

def test_what_an_expert_cannot_do_is_refused(tmp_path, own_cache):
    """A layer that it has not, a template that it has not, texts that do not fit, states that are not
    finite."""
    folder = make_expert(tmp_path / "m")
    for wrong, message in ((dict(layers=(4,)), "layers 0 to 3"), (dict(template="chat"), "chat template")):
        with pytest.raises(ValueError, match=message):
            Expert(folder, **wrong)
    for text, message in (("w1 " * 65, "65 tokens .* 64"), ("", "0 tokens")):
        with pytest.raises(ValueError, match=message):
            read_all(Expert(folder), [text])
    with pytest.raises(ValueError, match="room for 1 to 48"):
        write([Expert(folder)], [["w1 " * 50]], progress=False)
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        read_all(Expert(folder))
    with pytest.raises(ValueError, match="is no folder"):
        Expert(str(tmp_path / "nowhere"))

def test_nothing_of_a_models_folder_is_run(tmp_path, own_cache):
    """Neither code that its config names nor a pickle: the canary of each would show it."""
    canary = tmp_path / "canary"
    make_policy(tmp_path / "policy")
    make_expert(tmp_path / "expert")
    for name in ("policy", "expert"):
        (tmp_path / name / "x.py").write_text(f"open({str(canary)!r}, 'w')\nclass Y: pass\n")
        edit(tmp_path / name, "config.json", auto_map=dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "x.Y"))
    Policy.from_pretrained(tmp_path / "policy")
    read_all(Expert(str(tmp_path / "expert")))
    write([Expert(str(tmp_path / "expert"))], [TEXTS], progress=False)

    class Pickled:
        def __reduce__(self):
            return open, (str(canary), "w")

    for name, load in (("policy", Policy.from_pretrained), ("expert", Expert)):
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
        with pytest.raises(ValueError, match="no safetensors"):
            load(str(tmp_path / name))
    assert not canary.exists()

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
    return router

def gradients(*modules):
    """Every gradient, and none is left."""
    found = {f"{i}.{name}": p.grad for i, m in enumerate(modules) if m for name, p in m.named_parameters()}
    for m in filter(None, modules):
        m.zero_grad()
    return found

def same_gradients(a, b, tolerance=1e-5):
    """Norm of the difference against the norm, parameter by parameter."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-8, name

@pytest.mark.parametrize("widths", [WIDTHS, (8, 8), (130, 500, 257)])
def test_one_einsum_equals_a_loop_over_experts(widths):
    """The router written once more with a loop, unpadded states and torch's attention: values and
    gradients."""
    router, H, up = make_router(widths=widths), states(widths=widths), torch.randn(4, 4, 32)
    C, A = router(H)
    (C * up).sum().backward()
    fast = gradients(router)
    x = [(H[:, i, :w] - router.mean[i, :w]) * router.inv_std[i, :w] for i, w in enumerate(widths)]
    E = [x[i].clamp(-10, 10) @ router.W[i, :w] + router.expert_embed[i] for i, w in enumerate(widths)]
    k, v = router.to_kv(router.norm_experts(torch.stack(E, 1))).chunk(2, -1)
    q = router.to_q(router.norm_latents(router.latents))
    heads = lambda t: t.unflatten(-1, (2, 8)).transpose(-3, -2)
    y = F.scaled_dot_product_attention(heads(q).expand(4, -1, -1, -1), heads(k), heads(v))
    z = router.latents + router.proj(y.transpose(1, 2).flatten(-2))
    z = z + router.mlp(router.norm_mlp(z))
    naive = router.out(router.norm_out(z))
    (naive * up).sum().backward()
    torch.testing.assert_close(C, naive, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(A.sum(-1), torch.ones(4, 2, 4))
    same_gradients(fast, gradients(router))

@pytest.mark.parametrize("kind", ["soft", "hard", "linear"])
def test_padding_never_matters(kind):
    """Whatever stands beyond a state's width, the context is the same, and nothing is learned there."""
    router, H = make_router(kind), states()
    dirty = H.clone()
    dirty[:, 0, 5:] = 7.0
    C = router(dirty)[0]
    assert torch.equal(C, router(H)[0])
    C.square().sum().backward()
    if kind != "linear":
        assert router.W.grad[0, :5].abs().min() > 0 and not router.W.grad[0, 5:].any()

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

def test_standardized_states_have_mean_zero_and_std_one():
    """Of the prompts they were fitted to; a constant dimension gives no large numbers, padding stays zero."""
    router, H = make_router(), 50 + 3 * states(200, seed=2)
    H[:, 0, 5:], H[:, 1, 0] = 0, 7.0
    router.fit_standardization(H)
    x = router.standardize(H)
    torch.testing.assert_close(x[:, 2, :8].mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    assert 0.9 < x[:, 2, :8].std() < 1.01 and not x[:, 0, 5:].any() and x[:, 1, 0].abs().max() < 1e-3
    assert router.standardize(H * 1e6).abs().max() == 10

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

def test_a_constant_prefix_reads_nothing_and_linear_is_linear():
    """The prefix is the same for all problems; the linear map of a mean is the mean of the maps."""
    prefix, linear, H = make_router("prefix"), make_router("linear"), states()
    assert torch.equal(prefix(H)[0], prefix(-H)[0]) and prefix(H)[1] is None and linear(H)[1] is None
    C = linear(H)[0]
    torch.testing.assert_close(linear((H[:2] + H[2:]) / 2)[0], (C[:2] + C[2:]) / 2, atol=1e-5, rtol=1e-4)

# -- model.py
def make_policy(folder, kind="llama", **settings):
    """A random Hugging Face model of the given family, saved to `folder`, and the model itself."""
    name = dict(llama="Llama", qwen2="Qwen2", qwen3="Qwen3")[kind]
    config = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16 if kind == "qwen3" else 8,
                  max_position_embeddings=128, eos_token_id=1, bos_token_id=0) | settings
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config)
    twin = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, p in twin.named_parameters():
        nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else nn.init.normal_(p, std=0.3)
    twin.save_pretrained(folder)
    return twin

def wake_lora(policy):
    """B starts at zero; now LoRA does something."""
    torch.manual_seed(1)
    for layer in policy.adapters():
        for b in layer.B:
            nn.init.normal_(b, std=0.2)

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One random Llama with LoRA that does something."""
    folder = tmp_path_factory.mktemp("llama")
    make_policy(folder)
    policy = Policy.from_pretrained(folder)
    wake_lora(policy)
    return policy

def example(prefix=True):
    """Three prompts of different lengths, padded; two completions each, one of them short; a prefix or
    None."""
    g = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(2, 300, (3, 9), generator=g), torch.tensor([9, 5, 7])
    answer, mask = torch.randint(2, 300, (3, 2, 6), generator=g), torch.ones(3, 2, 6, dtype=torch.bool)
    mask[1, 0, 3:] = False
    return tokens, lengths, (torch.randn(3, 4, 32, generator=g) if prefix else None), answer, mask

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)

@pytest.mark.parametrize("kind, settings", [
    ("llama", {}), ("llama", dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    ("qwen2", dict(rope_parameters=YARN)), ("qwen3", {})])
@pytest.mark.parametrize("prefixed", [False, True])
def test_logprobs_equal_transformers(tmp_path, kind, settings, prefixed):
    """Padding, prefix, shared prompt, temperature, entropy; LoRA off, and on with it merged into the twin."""
    twin, policy = make_policy(tmp_path, kind, **settings), Policy.from_pretrained(tmp_path, neutral="mean")
    embed = twin.get_input_embeddings()
    tokens, lengths, prefix, answer, mask = example(prefixed)
    for awake in (False, True):
        if awake:
            wake_lora(policy)
            for block, layer in zip(policy.blocks, twin.model.layers):
                a, m = layer.self_attn, layer.mlp
                for ours, theirs in ((block.qkv, (a.q_proj, a.k_proj, a.v_proj)), (block.o, (a.o_proj,)),
                                     (block.gate_up, (m.gate_proj, m.up_proj)), (block.down, (m.down_proj,))):
                    for i, linear in enumerate(theirs):
                        linear.weight.data += 2.0 * ours.B[i] @ ours.A[i * 8:i * 8 + 8]  # alpha / rank
        with torch.no_grad():
            got, entropy = policy.logprobs(policy.prefill(tokens, lengths, prefix), answer, mask, 0.7)
            for b, g in ((b, g) for b in range(3) for g in range(2)):
                n = int(mask[b, g].sum())
                x = embed(torch.cat((tokens[b, :lengths[b]], answer[b, g, :n])))
                if prefixed:  # in standard deviations of the embeddings, measured from their mean
                    x = torch.cat((embed.weight.mean(0) + embed.weight.std() * prefix[b], x))
                z = (twin(inputs_embeds=x[None]).logits[0, -n - 1:-1] / 0.7).log_softmax(-1)
                torch.testing.assert_close(got[b, g, :n], z.gather(1, answer[b, g, :n, None])[:, 0],
                                           atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(entropy[b, g, :n], -(z.exp() * z).sum(-1), atol=1e-4, rtol=1e-4)
            assert not got[~mask].any()

def test_cached_decoding_equals_the_full_forward(small):
    """40 greedy tokens from the cache, LoRA merged, behind prompts of several lengths and a prefix: each is
    what the text as a single prompt gives."""
    tokens, lengths, prefix, *_ = example()
    policy = copy.deepcopy(small)
    policy.stop_at([])
    policy.ends[0] = True  # a token that none of these chooses
    with torch.no_grad():
        got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 2, 40, temperature=0)
        assert torch.equal(got[:, 0], got[:, 1]) and mask.all()
        for b, t in ((b, t) for b in range(3) for t in (0, 1, 15, 16, 17, 33, 39)):
            text = torch.cat((tokens[b, :lengths[b]], got[b, 0, :t]))[None]
            last = policy.prefill(text, torch.tensor([text.shape[1]]), prefix[b:b + 1]).last
            assert policy.logits(last).argmax() == got[b, 0, t]

def test_lora_merged_is_lora_and_disabled_is_the_frozen_model(small, tmp_path):
    """Merged for sampling: the same states but for rounding. Disabled, or fresh: the frozen model's, to the
    bit."""
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
    """Log-probabilities and gradients of 3 prompts x 2 are those of 6 rows that each run all of their
    text."""
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

def test_token_logprob_equals_autograd():
    """Chunked log-probability, its gradient and the entropy against log_softmax over the full vocabulary."""
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

def test_sample_draws_from_the_softmax():
    """Chi-square of 200,000 draws; never a token of probability 0; temperature 0 is the likeliest; a seed
    fixes
    the draws; NaN logits give any token."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(0))
    logits[::3] = -torch.inf
    draw = lambda seed: sample(logits.expand(200_000, -1), 0.8, torch.Generator().manual_seed(seed))
    drawn = draw(0)
    counts, expected = torch.bincount(drawn, minlength=60), 200_000 * (logits / 0.8).softmax(-1)
    possible = expected > 0
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    assert chi_square < 39 + 4 * (2 * 39) ** 0.5 and not counts[~possible].any()  # 40 tokens: 39 degrees
    assert torch.equal(drawn, draw(0)) and not torch.equal(drawn, draw(1))
    assert sample(logits[None], 0) == logits.argmax()
    damaged = torch.randn(4, 300)
    damaged[0, 3], damaged[1], damaged[2, 299] = math.nan, math.nan, math.inf
    assert all(0 <= token < 300 for token in sample(damaged, 1.0).tolist())

def test_a_completion_ends_with_its_stop_token(small):
    """The mask covers the first stop token and nothing behind it."""
    tokens, lengths, prefix, *_ = example()
    policy = copy.deepcopy(small)
    policy.stop_at(list(range(0, 300, 4)))  # a quarter of all tokens: completions end early
    cache, generator = policy.prefill(tokens, lengths, prefix), torch.Generator().manual_seed(0)
    got, mask = policy.generate(cache, 16, 12, 1.0, generator)
    ends = []
    for row, kept in zip(got.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):
        n = next((i + 1 for i, token in enumerate(row) if token % 4 == 0), len(row))
        assert kept == [True] * n + [False] * (len(row) - n)
        ends.append(n)
    assert len(set(ends)) > 4

def test_a_bf16_rollout_is_consistent_with_its_logprobs(tmp_path):
    """Sampled by one path in bf16 (cache, LoRA merged), scored by another: the same distribution, nearly."""
    make_policy(tmp_path)
    policy = Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wake_lora(policy)
    policy.stop_at([299])
    tokens, lengths, prefix, *_ = example()
    with torch.no_grad():
        got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 1, 6, temperature=0)
        best, _ = policy.logprobs(policy.prefill(tokens, lengths, prefix), got, mask)
        fine = Policy.from_pretrained(tmp_path)
        fine.load_state_dict(policy.state_dict())
        exact, _ = fine.logprobs(fine.prefill(tokens, lengths, prefix), got, mask)
        for b, t in ((b, t) for b in range(3) for t in range(6)):
            text = torch.cat((tokens[b, :lengths[b]], got[b, 0, :t]))[None]
            cache = policy.prefill(text, torch.tensor([text.shape[1]]), prefix[b:b + 1])
            z = policy.logits(cache.last)[0].float()
            assert z[got[b, 0, t]] > z.max() - 0.05 * z.std()
    assert (best - exact).abs().max() < 0.3 and best.abs().max() > 1

ODD = [  # (key of a policy's config.json, value): more than a machine has, senseless, or of another type
    ("model_type", "gpt2"), ("model_type", ["x"]), ("hidden_act", "gelu"), ("hidden_size", 10**9),
    ("hidden_size", 16), ("hidden_size", math.nan), ("num_hidden_layers", 10**6), ("num_hidden_layers", 4),
    ("num_hidden_layers", -1), ("num_hidden_layers", "3"), ("num_attention_heads", 0),
    ("num_attention_heads", -4), ("num_key_value_heads", 0), ("num_key_value_heads", 3),
    ("num_key_value_heads", 10**9), ("intermediate_size", 10**12), ("intermediate_size", "48"),
    ("vocab_size", 10**12), ("vocab_size", 5), ("head_dim", 10**12), ("head_dim", -2),
    ("max_position_embeddings", 10**12), ("max_position_embeddings", math.inf), ("rms_norm_eps", math.nan),
    ("rms_norm_eps", -1.0), ("tie_word_embeddings", "false"), ("eos_token_id", None), ("eos_token_id", 300),
    ("rope_parameters", dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ("rope_parameters", dict(rope_theta="x")), ("rope_parameters", dict(rope_theta=-1e4)),
    ("rope_parameters", dict(rope_type="linear", rope_theta=1e4, factor=0.0)),
]

@pytest.fixture(scope="module")
def plain_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    make_policy(folder)
    (folder / "generation_config.json").unlink()
    return folder

@pytest.mark.parametrize("key, value", ODD)
def test_a_policy_that_cannot_run_is_refused(plain_policy, tmp_path, key, value):
    """Unknown architectures and rope kinds, absurd numbers: one sentence, before anything of that size is
    made."""
    shutil.copytree(plain_policy, tmp_path / "p")
    edit(tmp_path / "p", "config.json", **{key: value})
    with pytest.raises(ValueError) as error:
        Policy.from_pretrained(tmp_path / "p")
    assert "\n" not in str(error.value)

def header_says(**changes):
    """Rewrite the header of a safetensors file, leaving its bytes as they are."""
    def damage(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        header["model.norm.weight"] |= changes
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n:])
    return damage

def rewrite(change):
    """Change the tensors of a policy."""
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return damage

@pytest.mark.parametrize("damage, message", [
    (header_says(shape=[10**9, 10**9]), "fetch it again"), (header_says(shape=[-32]), "fetch it again"),
    (header_says(data_offsets=[0, 10**15]), "fetch it again"), (header_says(shape=[16, 2]), r"is \(16, 2\)"),
    (header_says(dtype="I32"), "int32"), (rewrite(lambda t: t.pop("model.norm.weight")), "is missing"),
    (rewrite(lambda t: t.update({"lm_head.weight": torch.ones(3)})), "lm_head.weight is"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "fetch it again"),
    (lambda f: (f / "generation_config.json").write_text("{"), "damaged")])
def test_lies_about_a_policys_tensors_are_one_sentence(plain_policy, tmp_path, damage, message):
    """A tensor that is missing, of another shape or type than config.json implies, or a header that lies."""
    shutil.copytree(plain_policy, tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(ValueError, match=message) as error:
        Policy.from_pretrained(tmp_path / "p")
    assert "\n" not in str(error.value)


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

def test_the_stop_token_is_trained(small):
    """A completion that is its stop token alone has a gradient: else no policy learns to stop."""
    tokens, lengths, *_ = example()
    stop = torch.full((3, 2, 1), small.config.stop[0])
    logp, _ = small.logprobs(small.prefill(tokens, lengths), stop, torch.ones_like(stop).bool())
    advantage, args = torch.tensor([[1.0, 0.5]] * 3), types.SimpleNamespace(clip=0.2, clip_high=0.2)
    grpo_loss(logp, logp.detach(), None, advantage, stop > 0, args).backward()
    assert gradients(small)["0.blocks.0.qkv.A"].abs().max() > 0

def remembered(*arguments):
    """problems(), made once: thousands of them take seconds."""
    if arguments not in MADE:
        MADE[arguments] = problems(*arguments)
    return list(MADE[arguments])

MADE = {}
train.problems = remembered
TINY = {name: f"tiny/{name}" for name in ("policy", "arithmetic", "logic", "algorithmic")}

@pytest.fixture(autouse=True)
def own_signals():
    """train.py takes over Ctrl-C; the next test has it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Arguments of a small run: the embedded policy, two random experts that write and an encoder, which
    reads
    only; six steps of words, of reading aloud and of GRPO."""
    folder = tmp_path_factory.mktemp("pool")
    pool = (("logic", "Llama", 16), ("algorithmic", "GPTNeoX", 24), ("arithmetic", "Bert", 16))
    for name, kind, width in pool:
        shutil.copytree(TINY[name], folder / name, ignore=shutil.ignore_patterns("model.safetensors"))
        size = len(transformers.PreTrainedTokenizerFast.from_pretrained(folder / name))
        config = getattr(transformers, f"{kind}Config")(**SIZES | dict(
            vocab_size=size, hidden_size=width, num_hidden_layers=1, eos_token_id=2,
            max_position_embeddings=256))
        auto = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        model = auto.from_config(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder / name)
    return [*"--policy tiny/policy --task logic+algorithmic --level tiny --form plain --neutral mean "
             "--write 1 --align 6 --align_words 6 --align_batch 8 --align_lr 3e-3 --steps 6 --batch 6 "
             "--group 4 --warmup 2 --lr 3e-3 --beta 0.04 --micro_batch 4 --max_new 4 --val 8 --test 8 "
             "--eval_every 3 --save_every 3 --router_dim 16 --router_heads 2".split(),
            "--experts", *(str(folder / name) for name in ("logic", "algorithmic", "arithmetic"))]

@pytest.fixture(scope="session")
def finished(quick, tmp_path_factory):
    """The small run, finished."""
    out = tmp_path_factory.mktemp("run") / "finished"
    train.run([*quick, "--out", str(out)])
    return out

def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]

def command(*argv, program=train):
    """The exit code of a command line, as its last line gives it to sys.exit."""
    run = train.run if program is train else evaluation.main
    return train.one_sentence(f"{program.__name__}.py", lambda: run([*map(str, argv)]))

def refused(capsys, *argv, program=train):
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert command(*argv, program=program) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]

def newest(out):
    return load_file(train.checkpoints(out)[0])

def same_run(one, two):
    """Equal to the bit: weights, moments, generator, state, and all rows but their times."""
    a, b = newest(one), newest(two)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    timeless = lambda row: {k: v for k, v in row.items() if not k.endswith(("seconds", "per_second"))}
    for name in ("metrics.jsonl", "samples.jsonl", "align.jsonl"):
        assert [*map(timeless, rows(one, name))] == [*map(timeless, rows(two, name))], name
    assert json.loads((one / "eval.json").read_text()) == json.loads((two / "eval.json").read_text())
    return True

def gradient_of_first_step(monkeypatch, out, *argv):
    """What a step of train.main has gathered before it is clipped; and the row of that step."""
    with monkeypatch.context() as patch:
        found = []
        patch.setattr(train, "add_gradients", lambda parameters: found.append(
            {str(i): p.grad.clone() for i, p in enumerate(parameters)}))
        train.run([*argv, "--out", str(out), "--steps", "1", "--align", "0"])
    return found[0], rows(out)[0]

def test_micro_batches_change_nothing(quick, tmp_path, monkeypatch):
    """1, 2, 4 + 2 or all 6 prompts in a backward pass: the same gradient, loss, entropy and KL."""
    first, row = gradient_of_first_step(monkeypatch, tmp_path / "6", *quick, "--micro_batch", "6")
    assert any(g.any() for g in first.values()) and row["kl"] > 0
    for micro_batch in "124":
        found, other = gradient_of_first_step(monkeypatch, tmp_path / micro_batch, *quick, "--micro_batch",
                                              micro_batch)
        same_gradients(found, first, 1e-4)
        assert (other["kl"], other["entropy"]) == pytest.approx((row["kl"], row["entropy"]), rel=1e-4)

def test_the_reference_is_the_policy_as_grpo_finds_it(finished, quick, tmp_path, small):
    """After stage 0: KL 0 at the first step, above 0 later. Without: the frozen policy without its prefix."""
    kl = [row["kl"] for row in rows(finished)]
    assert abs(kl[0]) < 1e-6 < 1e-5 < kl[-1]
    train.run([*quick, "--out", str(tmp_path / "run"), "--align", "0", "--steps", "1"])
    assert rows(tmp_path / "run")[0]["kl"] > 1e-4
    tokens, lengths, _, answer, mask = example()
    batch = rlvr.Batch([], tokens, lengths, None)
    before = [p.detach().clone() for p in small.parameters()]
    with small.lora_disabled(), torch.no_grad():
        frozen = small.logprobs(small.prefill(tokens, lengths), answer, mask)[0]
    assert torch.equal(rlvr.reference_logprobs(small, None, batch, answer, mask, 1.0), frozen)
    fresh = [torch.zeros_like(p) for p in small.parameters()]
    other = rlvr.reference_logprobs(small, (fresh, None), batch, answer, mask, 1.0)
    torch.testing.assert_close(other, frozen)
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters()))

def test_stage_0_reads_back_texts_that_are_new_to_it(tmp_path):
    """The policy says what the expert would say to held-out problems, and not so with another problem's
    states."""
    out = tmp_path / "run"
    train.run([*"--preset tiny --task algorithmic --experts tiny/algorithmic --align_words 100 --align 25 "
                "--align_batch 32 --steps 1 --val 48 --test 1 --out".split(), str(out)])
    [row] = [row for row in rows(out, "align.jsonl") if "read_back" in row]
    assert row["read_back"] > 0.8 and row["shuffled"] < 0.5 and row["n"] > 40

def test_no_gold_answer_reaches_stage_0(finished, quick, tmp_path, monkeypatch):
    """With wrong gold answers: the same weights after it, to the bit. GRPO does see them."""
    monkeypatch.setattr(train, "problems", lambda *a: [replace(p, answer="7000") for p in remembered(*a)])
    train.run([*quick, "--out", str(tmp_path / "run")])
    one, two = (load_file(next(out.glob("aligned*"))) for out in (finished, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(row["reward"] == 0 for row in rows(finished)) and {
        row["reward"] for row in rows(tmp_path / "run")} == {0}

def test_stage_0_reads_one_expert_at_a_time(quick, tmp_path, monkeypatch):
    """In a step of one problem one expert has a gradient, the others and the encoder none; each has its
    turn."""
    seen = []

    def noted(parameters):
        W = next(p for p in parameters if p.shape[0] == 3 and p.dim() == 3)
        seen.append(W.grad.abs().sum((1, 2)).gt(0).tolist())

    monkeypatch.setattr(rlvr, "add_gradients", noted)
    monkeypatch.setattr(rlvr, "WORDS_BATCH", 1)
    train.run([*quick, "--out", str(tmp_path / "run"), "--align_batch", "1", "--steps", "1"])
    words, reading = seen[:6], seen[6:12]
    for part in (words, reading):
        assert {tuple(row) for row in part} == {(True, False, False), (False, True, False)}

def test_controls_are_what_they_say(quick, tmp_path):
    """shuffled: each problem has another's states; noise: their mean and std; untrained: strangers, the same
    ones."""
    H = {}
    for control in ("none", "shuffled", "noise", "untrained"):
        args = train.parse_args([*quick, "--out", str(tmp_path), "--control", control, "--align", "0"])
        policy, pool, _ = train.build(args)
        data = Dataset(train.load_problems(args, "train", 600), policy, pool, args)
        H[control] = data.H
    place = {row.numpy().tobytes(): i for i, row in enumerate(H["none"])}
    order = [place[row.numpy().tobytes()] for row in H["shuffled"]]
    assert sorted(order) == sorted(place.values()) and len(place) > 590
    assert sum(i == j for i, j in enumerate(order)) < 3
    for a, b in zip(torch.std_mean(H["none"], dim=0), torch.std_mean(H["noise"], dim=0)):
        assert (a - b).abs().max() < 0.3 * (1e-3 + H["none"].std(0).max())
    assert not torch.isclose(H["none"], H["untrained"]).all(-1).any()
    assert torch.equal(H["untrained"], read([Expert(e.source, untrained=True) for e in pool], [
        [rewards.prompt(p, "plain", None, ask=False) for p in data.problems]] * 3, progress=False))

# -- train.py
def test_a_run_writes_down_what_it_did(finished):
    """The files, the metric names of every row, shares between 0 and 1, attention that sums to 1."""
    assert [row["step"] for row in rows(finished)] == list(range(1, 7))
    names = {"logic", "algorithmic", "arithmetic"}
    for row in rows(finished):
        assert row.keys() >= {
            "step", "reward", "accuracy", "length", "truncated", "frac_reward_zero_std", "kl", "entropy",
            "grad_norm", "rollout_seconds", "train_seconds", "tokens_per_second", "attention",
            "attention_by_dataset", "attention_entropy", "reasons"}
        assert all(0 <= row[key] <= 1 for key in ("reward", "accuracy", "truncated", "frac_reward_zero_std"))
        assert set(row["attention"]) == names and sum(row["attention"].values()) == pytest.approx(1, abs=1e-5)
        assert set(row["attention_by_dataset"]) <= {"family_relationships", "count_primes"}
        assert all(set(shares) == names for shares in row["attention_by_dataset"].values())
        assert sum(row["reasons"].values()) == 24 and ("val" in row) == (row["step"] % 3 == 0)
    assert {row["reason"] for row in rows(finished, "samples.jsonl")} <= set(rewards.REASONS)
    assert [row["expert"] for row in rows(finished, "align.jsonl")[1:]] == ["logic", "algorithmic"]
    report = json.loads((finished / "eval.json").read_text())
    assert report.keys() >= {"task", "n", "before", "after", "by_dataset"} and set(report["masked"]) == names
    assert len(list(finished.glob("step-*"))) == 2 and not list(finished.glob("*.part"))

def test_three_and_three_steps_equal_six(finished, quick, tmp_path):
    """Stopped after 3 and resumed: weights, moments, generator, rows and report are those of the straight
    run."""
    train.run([*quick, "--out", str(tmp_path / "run"), "--steps", "3"])
    train.run(["--resume", str(tmp_path / "run"), "--steps", "6"])
    assert same_run(finished, tmp_path / "run")

def killed(argv, where, name, moment, counts=lambda *args: True):
    """Run train.py in a process of its own, which SIGKILL ends in the `moment`-th call of where.name that
    counts."""
    process = os.fork()
    if process == 0:
        calls, original = [], getattr(where, name)

        def deadly(*args):
            calls.extend([1] * counts(*args))
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(where, name, deadly)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train.run(argv)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL

KILLS = {  # (object, name of its function, which call of it): SIGKILL comes then
    "words": (train.Keeper, "after_align_step", 5), "border": (train.Keeper, "after_align_step", 7),
    "reading": (train.Keeper, "after_align_step", 11), "read back": (train, "read_back", 1),
    "GRPO": (train, "log", 5), "writing a checkpoint": (
        experts.os, "replace", 2, lambda aside, path: path.name.startswith("step-"))}

@pytest.mark.parametrize("moment", KILLS)
def test_kill_9_and_resume_is_the_undisturbed_run(finished, quick, tmp_path, moment):
    """In stage 0 and in GRPO, between checkpoints and in the middle of one."""
    out = tmp_path / "run"
    killed([*quick, "--out", str(out)], *KILLS[moment])
    assert (out / "config.json").exists() and not (out / "eval.json").exists()
    train.run(["--resume", str(out)])
    assert same_run(finished, out)

@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(finished, quick, tmp_path, monkeypatch, capsys, stop):
    """In stage 0 and in GRPO: exit code 0, and the run goes on where it was."""
    out = tmp_path / "run"
    name = "after_align_step" if stop == signal.SIGINT else "after_step"
    original, calls = getattr(train.Keeper, name), []

    def stopped(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), stop)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Keeper, name, stopped)
        assert command(*quick, "--out", out) == 0
    assert "stopped and saved" in capsys.readouterr().out and len(calls) == 5
    assert not (out / "eval.json").exists()
    assert re.search("align-000005|step-000005", str(train.checkpoints(out)[0]))
    train.run(["--resume", str(out)])
    assert same_run(finished, out)

def stopped_at_three(finished, out):
    """A copy of the finished run as if it had been stopped after step 3 of 6."""
    shutil.copytree(finished, out)
    train.checkpoints(out)[0].unlink()
    (out / "eval.json").unlink()
    return out

def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)

def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, tmp_path, capsys):
    """Said in a sentence, and the run ends the same. All damaged: refused, nothing is started over."""
    shutil.copytree(finished, tmp_path / "run")
    flip(train.checkpoints(tmp_path / "run")[0], -5)
    with pytest.warns(UserWarning, match="damaged.*the checkpoint before it"):
        train.run(["--resume", str(tmp_path / "run")])
    assert same_run(finished, tmp_path / "run")
    for path in train.checkpoints(tmp_path / "run"):
        os.truncate(path, 1000)
    with pytest.warns(UserWarning):
        assert "another --out" in refused(capsys, "--resume", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 6

def test_every_bit_of_a_checkpoint_counts(finished, tmp_path):
    """Header, tensors, name: a flipped bit or a cut is found, and weights stay as they were."""
    path = train.checkpoints(finished)[0]
    data, copied = path.read_bytes(), tmp_path / path.name
    header = int.from_bytes(data[:8], "little")
    for at in (0, 7, 9, header // 2, header + 4, header + 8, len(data) // 2, len(data) - 1):
        copied.write_bytes(data)
        flip(copied, at)
        with pytest.raises(ValueError, match="damaged"):
            experts.read_tensors(copied)
    for size in (0, 7, 100, header + 8, len(data) - 1):
        copied.write_bytes(data[:size])
        with pytest.raises(ValueError, match="damaged"):
            experts.read_tensors(copied)
    policy, router = Policy.from_pretrained(TINY["policy"]), make_router()
    before = [p.detach().clone() for p in (*policy.parameters(), *router.parameters())]
    with pytest.raises(ValueError, match="other models"):
        train.load_checkpoint(path, policy, router)
    assert all(torch.equal(a, b) for a, b in zip(before, (*policy.parameters(), *router.parameters())))

def test_a_full_disk_loses_only_what_was_not_saved(finished, tmp_path, capsys):
    """A checkpoint that does not fit: one sentence, no half file; with room again, the undisturbed run."""
    out = stopped_at_three(finished, tmp_path / "run")
    with files_of_at_most(10**5):
        sentence = refused(capsys, "--resume", out)
    assert "File too large" in sentence and "--resume" in sentence and not list(out.glob("*.part"))
    train.run(["--resume", str(out)])
    assert same_run(finished, out)

def test_one_process_trains_in_a_folder(finished, quick, tmp_path, capsys):
    """The second is refused, by --resume and by the first command; a lock left by a kill stops nobody."""
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

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_halves_the_micro_batch(quick, tmp_path, monkeypatch, capsys, error):
    """Same samples, same gradient. A prompt that does not fit alone is a sentence; a mistake of ours is
    raised."""
    expected, _ = gradient_of_first_step(monkeypatch, tmp_path / "a", *quick, "--micro_batch", "6")
    original, sizes, room = Policy.logprobs, [], 3

    def logprobs(self, cache, tokens, *rest):
        if torch.is_grad_enabled():
            sizes.append(len(tokens))
            if len(tokens) > room or len(sizes) == 3:  # after a part that left its gradient
                raise error
        return original(self, cache, tokens, *rest)

    monkeypatch.setattr(Policy, "logprobs", logprobs)
    found, _ = gradient_of_first_step(monkeypatch, tmp_path / "b", *quick, "--micro_batch", "6")
    same_gradients(found, expected, 1e-4)
    assert sizes == [6, 3, 3, 1, 1, 1, 1, 1, 1]
    room = 0
    assert "out of memory" in refused(capsys, *quick, "--out", tmp_path / "c", "--align", "0")
    if type(error) is RuntimeError:
        monkeypatch.setattr(error, "args", ("shapes do not match",))
        with pytest.raises(RuntimeError, match="shapes"):
            command(*quick, "--out", tmp_path / "d", "--align", "0")

def test_a_router_of_ones_own_trains(quick, tmp_path, monkeypatch):
    """As in router.py's head: one class with ConstantPrefix's signature and one entry in ROUTERS."""
    class MeanRouter(LinearRouter):
        def forward(self, H, mask=None, attention=None):
            C, _ = super().forward(H, mask)
            return C, torch.full((len(H), 1, self.latents, H.shape[1]), 1 / H.shape[1], device=H.device)

    monkeypatch.setitem(ROUTERS, "soft", MeanRouter)
    train.run([*quick, "--out", str(tmp_path / "run"), "--steps", "2"])
    assert rows(tmp_path / "run")[1]["attention"]["logic"] == pytest.approx(1 / 3)
    assert "router.map.weight" in newest(tmp_path / "run")

MODES = [("hard", "shuffled", "6"), ("soft", "noise", "0"), ("linear", "untrained", "6"),
         ("prefix", "none", "6"), ("single", "none", "6"), ("text", "none", "0")]

@pytest.mark.parametrize("collab, control, align", MODES)
def test_every_mode_trains_and_is_found_again(quick, tmp_path, capsys, collab, control, align):
    """Trained, loaded, measured again with the same result, asked. LoRA and the order of problems are the
    same."""
    out = tmp_path / "run"
    train.run([*quick, "--out", str(out), "--collab", collab, "--control", control, "--align", align,
               "--steps", "2"])
    saved = newest(out)
    assert any(key.startswith("router") for key in saved) == (collab in ROUTERS)
    assert ("attention" in rows(out)[0]) == (collab in ("soft", "hard"))
    assert bool(list(out.glob("aligned*"))) == (align == "6")
    capsys.readouterr()
    assert command(out, "--json", program=evaluation) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((out / "eval.json").read_text())
    assert all(report[key] == kept[key] for key in kept if key not in ("before", "after"))
    assert report["after"]["strict"] == kept["after"]["strict"] and (out / "run.png").exists()
    assert command(out, "--ask", "How many primes?", program=evaluation) == 0
    assert ("logic" in capsys.readouterr().out.split("rewarded")[1]) == (collab in ("soft", "hard"))


RANKS = """
import os, sys, torch, rlvr, train
folder, *argv = sys.argv[1:]
torch.set_num_threads(1)
problems, rollout = train.problems, train.rollout
add_gradients, after_step = train.add_gradients, train.Keeper.after_step
seen = {}
def few(task, split, n, *rest):
    return problems(task, split, min(n, 64), *rest)
def given(policy, router, batch, args, group, *rest):  # no draws: two ranks have the samples of one
    sampled = rollout(policy, router, batch, args, group, *rest)
    answers = range(group)
    lengths = [len(p.question) for p in batch.problems]
    sampled.tokens = torch.tensor([[[3 + (n + 7 * g + t) % 90 for t in range(4)] for g in answers]
                                   for n in lengths])
    sampled.mask = torch.ones(sampled.tokens.shape, dtype=torch.bool)
    sampled.rewards = torch.tensor([[float((n + g) % 3 == 0) for g in answers] for n in lengths])
    return sampled
def noted(parameters):
    add_gradients(parameters)
    seen.setdefault("gradients", {str(i): p.grad.clone() for i, p in enumerate(parameters)})
def lost(self, step, *rest):
    if self.args.out.endswith("lose") and step == 2 and rlvr.RANK == 1:
        os._exit(7)
    return after_step(self, step, *rest)
train.problems, train.rollout, train.add_gradients, train.Keeper.after_step = few, given, noted, lost
train.run([*argv, "--out", folder])
torch.save(seen["gradients"], f"{folder}-{rlvr.RANK}.pt")
if rlvr.WORLD == 2:
    sys.exit(train.one_sentence("train.py", lambda: train.run(
        [*argv, "--align", "0", "--steps", "4", "--out", f"{folder}/lose"])))
"""

def test_two_ranks_are_one_run_and_a_lost_one_ends_the_other(quick, tmp_path, capsys):
    """Stage 0 and the gradient of a step on the same samples: on each of two ranks what one has alone. When
    a rank
    is gone the other ends with a sentence; and one rank cannot go on with a run of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, N_MUSKETEERS_TIMEOUT="0.5")
    argv = [*quick, *"--steps 2 --batch 5 --align_batch 5 --align_words 2 --align 2".split()]
    processes = [subprocess.Popen([sys.executable, "-c", RANKS, tmp_path / name, *argv], env=os.environ | env,
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                 for name, env in (("two", torchrun | dict(RANK="0", LOCAL_RANK="0")),
                                   ("two", torchrun | dict(RANK="1", LOCAL_RANK="1")), ("one", {}))]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 7, 0], outputs
    assert "held-out problems" in outputs[0] and "n-Musketeers" not in outputs[1]  # rank 0 speaks
    assert "another rank is gone" in outputs[0] and "Traceback" not in outputs[0]
    assert "2 ranks" in refused(capsys, "--resume", tmp_path / "two" / "lose")
    a, b = (load_file(next((tmp_path / name).glob("aligned*"))) for name in ("one", "two"))
    for key in (key for key in a if key.startswith(("policy", "router"))):
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
    one, two, other = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    assert all(torch.equal(two[key], other[key]) for key in two) and any(g.any() for g in one.values())
    same_gradients(two, one, 1e-2)
    rewards_of = lambda name: [row["reward"] for row in rows(tmp_path / name)]
    assert rewards_of("one") == rewards_of("two")

BAD_INPUT = [  # (arguments behind those of the small run, a word of the sentence)
    ("--group 1", "--group"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--batch 0", "--batch"),
    ("--temperature 0", "--temperature"), ("--steps 0", "--steps"), ("--level terms=3", "level"),
    ("--level tiny --task gcd", "tiny"), ("--task chain_sun", "chain_sum"), ("--task countdown", "refused"),
    ("--align 5 --collab text", "align"), ("--collab louder", "louder"), ("--align -1", "--align"),
    ("--experts nowhere/at/all", "nowhere"), ("--experts tiny", "tiny"), ("--policy nowhere", "nowhere"),
    ("--layer 9", "layer"), ("--layer -9", "layer"), ("--collab prefix --control noise --align 0", "control"),
    ("--collab single --align 0 --lora_rank 0", "lora_rank"), ("--max_new 600", "window"),
    ("--form tagged", "chat template"), ("--device cuda:7", "--device"), ("--device gpu", "--device"),
    ("--router_heads 3", "router_heads"), ("--write 300", "room"), ("--positions 0", "--positions"),
    ("--task gsm8k --data nowhere", "nowhere"), ("--task gsm8k --data EMPTY", "problem|question"),
    ("--experts ENCODER", "writes|text"), ("--resume nowhere", "nowhere"), ("--out FILE/run", "FILE"),
]

@pytest.mark.parametrize("arguments, word", BAD_INPUT)
def test_bad_input_is_one_sentence(quick, tmp_path, capsys, monkeypatch, arguments, word):
    """Exit code 2, the mend named, no traceback, and no run is begun."""
    monkeypatch.setattr(transformers.logging, "get_verbosity", lambda: transformers.logging.ERROR)
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").touch()
    for name, path in dict(FILE=tmp_path / "FILE", EMPTY=tmp_path / "EMPTY", ENCODER=quick[-1]).items():
        arguments = arguments.replace(name, str(path))
    if arguments.startswith("--resume"):
        argv = arguments.split()
    else:
        argv = [*quick, "--out", str(tmp_path / "run"), *arguments.split()]
    assert re.search(word, refused(capsys, *argv)) and not list(tmp_path.glob("*/config.json"))

def test_a_task_without_a_preset_names_one(capsys):
    """`--task gcd` on a machine without a large GPU: the embedded pool was not made for it."""
    if not torch.cuda.is_available():
        assert "--preset small or paper" in refused(capsys, "--task", "gcd", "--out", "never")
    with pytest.raises(SystemExit):
        train.run(["--unheard"])

def test_resume_takes_the_run_as_it_is(finished, tmp_path, capsys):
    """Repeated settings are accepted, others named; fewer steps than done are refused, a finished run stays
    so."""
    assert "seed" in refused(capsys, "--resume", finished, "--seed", 7)
    shutil.copytree(finished, tmp_path / "run")
    assert "steps" in refused(capsys, "--resume", tmp_path / "run", "--steps", 2)
    args = train.parse_args(["--resume", str(finished), "--seed", "0", "--batch", "6", "--steps", "9"])
    assert (args.steps, args.batch, args.task) == (9, 6, "logic+algorithmic")
    before = (finished / "metrics.jsonl").read_bytes()
    assert command("--resume", finished) == 0 and (finished / "metrics.jsonl").read_bytes() == before

DAMAGED_CONFIGS = ["", "[]", "{}", '{"args": 3}', '{"args": {"task": "gsm8k"', "\udcff", dict(batch=-1),
                   dict(batch="6"), dict(lr=math.nan), dict(lora_rank=1.5), dict(group=None),
                   dict(task=None), dict(experts="tiny/logic"), dict(collab="loud"), dict(unheard=1),
                   dict(layer=["x"]), dict(experts=[3])]

@pytest.mark.parametrize("damage", DAMAGED_CONFIGS)
def test_a_damaged_config_of_a_run_is_one_sentence(finished, tmp_path, capsys, damage):
    """Cut, no JSON, other types, absurd numbers: train.py --resume and eval.py say so."""
    text = (finished / "config.json").read_text()
    if isinstance(damage, dict):
        config = json.loads(text)
        config["args"] |= damage
        damage = json.dumps(config)
    (tmp_path / "config.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert "damaged" in refused(capsys, "--resume", tmp_path)
    assert "damaged" in refused(capsys, tmp_path, program=evaluation)

def test_a_data_file_of_five_problems_is_enough_or_says_how_many(quick, tmp_path, capsys):
    """Held-out splits take what there is; a split without any problem is a sentence."""
    questions = [f"How much is {i} + {i + 1}?" for i in range(24)]
    lines = [json.dumps(dict(question=q, answer="#### 5")) for q in questions]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    (tmp_path / "one.jsonl").write_text(lines[0])
    argv = [*quick, "--task", "gsm8k", "--align", "0", "--steps", "1", "--out"]
    train.run([*argv, str(tmp_path / "run"), "--data", str(tmp_path / "many.jsonl")])
    held_out = sum(rewards.split_of(question) == "test" for question in questions)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["n"] == min(8, held_out)
    sentence = refused(capsys, *argv, tmp_path / "b", "--data", tmp_path / "one.jsonl")
    assert "has no" in sentence and "--data" in sentence and "at most 0" not in sentence

# -- eval.py
def test_wilson_by_hand():
    """8 of 10; the ends stay inside 0 and 1."""
    assert evaluation.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    assert evaluation.wilson(0, 5)[0] == 0 and evaluation.wilson(5, 5)[1] == 1

def loaded(out):
    """(policy, router, test problems, args) of a run, as eval.py has them."""
    args = train.saved_args(out)
    policy, pool, router = train.build(args)
    train.load_newest(out, policy, router)
    return policy, router, Dataset(train.load_problems(args, "test"), policy, pool, args), args

def test_pass_at_k_and_majority_by_hand(finished, monkeypatch):
    """Two of four samples right: pass@1 1/2, pass@2 5/6, pass@4 1. Majority: the commonest, the first on a
    tie."""
    policy, router, data, args = loaded(finished)
    texts = [" seven", " 5", " 5.0", " eight"]

    def four(policy, router, batch, *rest):
        gold = [replace(problem, answer="5") for problem in batch.problems]
        return types.SimpleNamespace(texts=[texts] * len(gold), verdicts=[
            [rewards.verify(text, problem, "plain") for text in texts] for problem in gold])

    monkeypatch.setattr(evaluation, "rollout", four)
    passed, majority = evaluation.sample_pass(policy, router, data, args, 4)
    assert passed == pytest.approx({1: 1 / 2, 2: 5 / 6, 4: 1}) and majority == {1: 0, 2: 0, 4: 1}

def test_swap_counts_who_follows_the_states(finished, monkeypatch):
    """A policy that says what the states' expert says follows in all cases; one that goes by the question in
    none."""
    policy, router, data, args = loaded(finished)
    place = {row.numpy().tobytes(): i for i, row in enumerate(data.H)}
    data.texts = [[f"{i}" for i in range(len(data))] for _ in data.texts]
    for reads, follows in ((True, 1.0), (False, 0.0)):
        def answers(policy, router, data, args, rows=None, H=None, **rest):
            told = [place[row.numpy().tobytes()] if reads else i for i, row in enumerate(H)]
            attention = torch.full((len(data), 2, 8, 3), 1 / 3)
            verdicts = [rewards.verify("x", problem, "plain") for problem in data.problems]
            return verdicts, [f" {i}" for i in told], attention

        monkeypatch.setattr(evaluation, "evaluate", answers)
        swap = evaluation.swap_test(policy, router, data, args)
        assert swap["follows"] == follows and swap["n"] >= len(data) - 1 and swap["strict"] == 0

def test_eval_reports_the_run(finished, capsys):
    """Before, after, masked, swap, pass@k; intervals hold the shares; the JSON line agrees with training's
    report."""
    assert command(finished, "--samples", "2", "--json", program=evaluation) == 0
    output = capsys.readouterr().out.splitlines()
    report, kept = json.loads(output[-1]), json.loads((finished / "eval.json").read_text())
    for when in ("before", "after"):
        low, high = report[when].pop("ci95")
        assert 0 <= low <= report[when]["strict"] <= high <= 1
    assert all(report[key] == kept[key] for key in kept)
    assert report["pass_at"]["1"] <= report["pass_at"]["2"] and 0 <= report["swap"]["follows"] <= 1
    assert (finished / "run.png").stat().st_size > 10_000
    assert any("attention to logic" in line for line in output)
    assert command(finished, "--aligned", "--json", program=evaluation) == 0
    aligned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert aligned["before"]["strict"] == report["before"]["strict"] and (finished / "aligned.png").exists()

def test_ask_shows_the_answer_and_a_bar_for_each_expert(finished, capsys):
    """The bars sum to 1; what each expert itself would say stands beside its own."""
    assert command(finished, "--ask", "How many primes are between 1 and 9?", program=evaluation) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["logic", "algorithmic", "arithmetic"]
    assert sum(float(re.search(r"\d\.\d\d", line).group()) for line in lines) == pytest.approx(1, abs=0.02)
    assert all("█" in line for line in lines) and "says" in lines[0] and "says" not in lines[2]

@pytest.mark.parametrize("arguments, word", [
    ("--ask x --n 5", "--ask"), ("--ask x --json", "--ask"), ("--ask", "question"), ("--n 0", "--n"),
    ("--n -3", "--n"), ("--samples -1", "--samples"), ("--device cuda:9", "--device")])
def test_bad_input_of_eval_is_one_sentence(finished, capsys, monkeypatch, arguments, word):
    """Exit code 2, the mend named, no traceback."""
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert word in refused(capsys, finished, *arguments.split(), program=evaluation)

def test_eval_of_what_is_no_run_is_one_sentence(finished, tmp_path, capsys):
    """No folder, no checkpoint of GRPO, no stage 0, an empty question."""
    assert "no run" in refused(capsys, tmp_path, program=evaluation)
    assert "question" in refused(capsys, finished, "--ask", "", program=evaluation)
    shutil.copytree(finished, tmp_path / "run")
    for path in [*(tmp_path / "run").glob("step-*"), *(tmp_path / "run").glob("aligned*")]:
        path.unlink()
    for more, word in (((), "no checkpoint"), (("--aligned",), "stage 0")):
        assert word in refused(capsys, tmp_path / "run", *more, program=evaluation)


# -- another device
DEVICE = """
import os, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
torch.set_num_threads(1)
_setup_privateuseone_for_python_backend("npu")
there = torch.device("npu:0")

class There(torch.Tensor):  # claims to be on the device, holds a tensor on the CPU
    is_cuda = True
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device=there)
    def __init__(self, inner):
        self.inner = inner
    def tolist(self):
        return self.inner.tolist()
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
counts = dict(operations=0)

def run(function, args, kwargs):
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    mine = [t for t in tensors if isinstance(t, There)]
    others = [t for t in tensors if not isinstance(t, There) and t.dim() > 0]
    target = kwargs.get("device")
    name = function._schema.name
    if mine and others and name not in COPIES:
        raise RuntimeError(f"{name} mixes devices: {[tuple(t.shape) for t in others]} is on the CPU")
    counts["operations"] += bool(mine)
    to_there = torch.device(target).type == "npu" if target is not None else bool(mine)
    if name == "aten::copy_":
        to_there = isinstance(args[0], There)
    inner = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    if target is not None:
        inner[1]["device"] = torch.device("cpu")
    out = function(*inner[0], **inner[1])
    if function._schema.name.endswith("_") or "out" in kwargs:  # in place: the very tensor that was given
        return args[0] if "out" not in kwargs else kwargs["out"]
    return tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) and to_there else t, out)

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

library = torch.library.Library("aten", "IMPL")  # where torch leaves modes out: table[[1, 2]] = True
for name in ("empty.memory_format", "empty_strided"):
    function = getattr(torch.ops.aten, name.split(".")[0])
    library.impl(name, lambda *args, function=function, device=None, **kwargs: There(
        function(*args, **kwargs)), "PrivateUse1")
library.impl("_local_scalar_dense", lambda t: t.inner.item(), "PrivateUse1")
library.impl("_copy_from", lambda source, target, non_blocking=False: run(
    torch.ops.aten.copy_.default, (target, source), {}), "PrivateUse1")

class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)
torch.Generator = Generator
import model, train
import eval as evaluation
load = model.load_file  # it makes its tensors in threads of its own, where no mode sees them
model.load_file = lambda path, device: {name: t.to(device) for name, t in load(path).items()}
train.pick_device = evaluation.pick_device = lambda name: "npu:0"
problems = train.problems
train.problems = lambda task, split, n, *rest: problems(task, split, min(n, 48), *rest)
folder, *argv = sys.argv[1:]
with Watch():
    train.run([*argv, "--out", folder])
    evaluation.main([folder, "--samples", "2"])
    train.run(["--resume", folder, "--steps", "2"])
print(counts["operations"], "operations")
"""

def test_a_run_on_a_device_that_is_not_the_cpu(quick, tmp_path, own_cache):
    """Reading, stage 0, GRPO, validation, checkpoint, resume, eval.py with real arithmetic on a pretended
    device:
    where a tensor of the CPU meets one of the device it raises, as CUDA would. (In a process of its own as it
    changes torch. It sees no hidden waiting of the host, and not cuda:1.)"""
    argv = [*quick, *"--align 2 --align_words 2 --steps 1 --val 4 --test 4 --epochs 2".split()]
    process = subprocess.run([sys.executable, "-c", DEVICE, tmp_path / "run", *argv], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout[-3000:]
    assert int(re.search(r"(\d+) operations", process.stdout).group(1)) > 10_000
    assert len(rows(tmp_path / "run")) == 2 and (tmp_path / "run" / "eval-run.json").exists()
