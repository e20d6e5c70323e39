"""
What must stay true. On the CPU, without downloads:   python -m pytest -q test_all.py

The first half is about the method: each formula by hand, and each fast algorithm beside its naive form. Two
tests show the method once more in plain lines: test_one_einsum_equals_a_loop_over_experts, and
test_the_loop_is_grpo_written_once_more. The second half is about the faults: damaged files, killed processes,
wrong settings.
"""
import os
import tempfile

os.environ["N_MUSKETEERS_CACHE"] = tempfile.mkdtemp(prefix="n-musketeers-test-")  # what is read goes here
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import contextlib
import copy
import dataclasses
import datetime
import doctest
import errno
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
import urllib.request
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import eval as evaluation
import experts
import rewards
import rlvr
import router as routers
import train
from experts import Expert, read_states, write_texts
from model import Float16Linear, Policy, SwiGLU, TokenLogprob, group_attention, pick_dtype, sample
from rewards import (EXAMPLE, INSTRUCTION, Problem, cache_dir, check_answer_format, get_problems, known_task,
                     next_in_dataset, number, official_files_to_fetch, render_prompt, split_of, verify)
from rlvr import (Dataset, advantages, choice_loss, draw_pair, grpo_loss, kl_estimate, pair_probabilities,
                  rollout)
from router import ROUTERS, NoRouter, Router, WithoutExpert, by_expert
from train import (GAPS, GPU_ROWS, KNOWN_MODELS, PRESETS, Args, estimate_of, memory_estimate, model_size,
                   parse_args, peak_memory, run_operations)

torch.set_num_threads(1)  # for models this small two threads only wait for each other
os.chdir(Path(__file__).parent)
atexit.register(shutil.rmtree, os.environ["N_MUSKETEERS_CACHE"], True)


# == What many tests use

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def own_signals():
    """train.py takes over Ctrl-C; the next test has it back."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def edit(folder, name, **changes):
    """Change keys of a JSON file."""
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    """Change the {name: tensor} of a model's folder."""
    path = Path(folder, "model.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})


def flip(path, at, bit=1):
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def gradients(module):
    """{name: gradient} of a module, which are then cleared."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


def same_gradients(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-8, name


# Random models

SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)


def random_model(kind, seed=0, **sizes):
    """A random model of a kind. Its weights are large, so that every token matters."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForCausalLM
    if kind == "Bert":
        auto = transformers.AutoModel
    if kind == "Rwkv":
        sizes |= dict(attention_hidden_size=16, context_length=64)
    if kind == "OPT":
        sizes |= dict(ffn_dim=32, do_layer_norm_before=False)

    model = auto.from_config(getattr(transformers, f"{kind}Config")(**SIZES | sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


# Small runs

make_once = functools.cache(get_problems)


def remembered(task, split, n, *rest, **options):
    """get_problems(), made once, and 256 at most: thousands of them take seconds."""
    if n <= rewards.MAX_PROBLEMS:
        n = min(n, 256)
    return list(make_once(task, split, n, *rest, **options))


rlvr.get_problems = remembered
train.SAVE_EVERY = 3  # steps between two checkpoints, so that a run of six steps has two of them


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A small run: the embedded policy, two random experts that write, and an encoder, which only reads."""
    folder = tmp_path_factory.mktemp("pool")
    shutil.copytree("tiny/policy", folder / "policy")
    for name, kind, width in (
            ("logic", "Llama", 16), ("algorithmic", "GPTNeoX", 24), ("arithmetic", "Bert", 16)):
        shutil.copytree(f"tiny/{name}", folder / name, ignore=shutil.ignore_patterns("model.safetensors"))
        vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / name))
        model = random_model(kind, vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1,
                             eos_token_id=2, max_position_embeddings=256)
        model.save_pretrained(folder / name)
    return ("--preset tiny --device cpu --task logic+algorithmic --words_steps 6 --reading_steps 6 "
            "--reading_lr 5e-4 --steps 6 --batch 6 --group 4 --lr 1e-3 "
            "--router_lr 2e-3 --trust_lr 0.1 --seed 2 --micro_batch 4 --max_new 4 --val 8 --test 8 "
            "--eval_every 3 --router_dim 32 --policy {0}/policy "
            "--experts {0}/logic {0}/algorithmic {0}/arithmetic".format(folder)).split()


@pytest.fixture(scope="session")
def finished(quick, tmp_path_factory):
    """The small run, finished."""
    return trained(tmp_path_factory.mktemp("run") / "finished", *quick)


def as_arguments(settings):
    """A text of several words stands for all of them."""
    return " ".join(map(str, settings)).split()


def trained(out, *settings):
    """The folder of a run with these settings."""
    train.run([*as_arguments(settings), "--out", str(out)])
    return out


def built(out, *settings):
    """(args, policy, experts, router, training set) of a run with these settings, which has not begun."""
    args = parse_args([*as_arguments(settings), "--out", str(out)])
    policy, pool, router = rlvr.build(args)
    dataset = Dataset(rlvr.load_problems(args, "train", 256), policy, pool, args, progress=False)
    if rlvr.reads_states(args.router):
        router.fit_standardization(dataset.H)
    return args, policy, pool, router, dataset


def loaded(out, split="test"):
    """(policy, router, problems of a split, args) of a run, as eval.py has them."""
    args, policy, pool, router = rlvr.open_run(out, "cpu")
    dataset = Dataset(rlvr.load_problems(args, split), policy, pool, args)
    return policy, router, dataset, args


def records(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def command(*argv, program=train.run):
    """The exit code of a command line, as the last line of a program gives it to sys.exit."""
    name = "train.py" if program == train.run else "program"
    return rlvr.run_cli(name, lambda: program([*map(str, argv)]))


def refused(capsys, *argv, program=train.run):
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert command(*argv, program=program) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


def newest(out):
    """{name: tensor} of the newest checkpoint."""
    return load_file(rlvr.checkpoints(out)[0])


def without_times(record):
    return {key: value for key, value in record.items() if not key.endswith(("seconds", "per_second"))}


def resume_to(finished, out, *settings):
    """Continued, a run ends as the finished one, to the bit: weights, moments, generator, progress, report,
    and all records but their times."""
    train.run(["--resume", str(out), *settings])
    a, b = newest(finished), newest(out)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for name in ("metrics.jsonl", "samples.jsonl", "stage0.jsonl"):
        expected = [without_times(record) for record in records(finished, name)]
        assert [without_times(record) for record in records(out, name)] == expected, name
    assert (finished / "eval.json").read_text() == (out / "eval.json").read_text()


def forked(run, log):
    """Call run() in a fork of this process, which has all imported; what it prints is in `log`.

    In a fork PyTorch may refuse to work in a new thread ("Invalid thread pool"), and transformers loads
    weights in threads. So there it is told not to.
    """
    def child():
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        faulthandler.enable(sys.stderr)  # a crash leaves a traceback in the log, too
        sys.exit(run())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def always(*args):
    return True


def stop_in(signal_number, where, name, moment, counts=always):
    """Send this process a signal in the `moment`-th call of where.name that counts."""
    calls, original = [], getattr(where, name)

    def deadly(*args):
        if counts(*args):
            calls.append(args)
        if len(calls) == moment:
            os.kill(os.getpid(), signal_number)
        return original(*args)

    setattr(where, name, deadly)


# == The method

# -- router.py

WIDTHS = (5, 12, 8)


def states(n=4, seed=0, widths=WIDTHS):
    """States (n, N, D), zero beyond each width."""
    H = torch.randn(n, len(widths), max(widths), generator=torch.Generator().manual_seed(seed))
    for i, width in enumerate(widths):
        H[:, i, width:] = 0
    return H


def make_router(name="attention", widths=WIDTHS, expert_of_state=None, **settings):
    """A router of experts with one state each, unless expert_of_state says otherwise."""
    torch.manual_seed(0)
    expert_of_state = expert_of_state or list(range(len(widths)))
    settings = dict(latents=4, dim=32, init_scale=1.0) | settings
    router = ROUTERS[name](widths, expert_of_state, 32, **settings)
    router.fit_standardization(states(64, seed=1, widths=widths))
    if hasattr(router, "trust"):  # it is zero at the start
        nn.init.normal_(router.trust, std=4.0)
        nn.init.normal_(router.trust_bias, std=0.2)
    return router


def naive_router(router, H, expert_of_state):
    """The context tokens (L, d) of ONE problem with states H (N, D), by loops and without padding."""
    N = len(H)
    n_latents, dim = router.latents.shape
    head_width = dim // router.heads

    # Scale and project each state by itself.
    x, E = [], []
    for n in range(N):
        width = int(router.widths[n])
        scaled = (H[n, :width] - router.mean[n, :width]) * router.inv_std[n, :width]
        x.append(scaled.clamp(-10, 10))
        E.append(router.norm_states(x[n] @ router.W[n, :width] + router.state_embed[n]))

    # Trust in an expert is the mean of the votes of its states.
    trust = []
    for e in range(max(expert_of_state) + 1):
        votes = []
        for n in range(N):
            if expert_of_state[n] == e:
                width = len(x[n])
                votes.append(x[n] @ router.trust[n, :width] / width**0.5 + router.trust_bias[n])
        trust.append(sum(votes) / len(votes))

    # Each latent asks, with each head, and reads the states in proportion to the softmax of its scores.
    queries = router.to_q(router.norm_latents(router.latents))
    context = []
    for latent in range(n_latents):
        read = []
        for head in range(router.heads):
            part = slice(head * head_width, (head + 1) * head_width)
            scores, values = [], []
            for n in range(N):
                key, value = router.to_kv(E[n]).chunk(2)
                score = queries[latent, part] @ key[part] * 8 / head_width
                scores.append(score + trust[expert_of_state[n]])
                values.append(value[part])
            shares = torch.stack(scores).softmax(0)
            read.append(sum(share * value for share, value in zip(shares, values)))

        # Write the context token.
        z = router.latents[latent] + router.proj(torch.cat(read))
        z = z + router.mlp(router.norm_mlp(z))
        context.append(router.out(router.norm_out(z)))
    return torch.stack(context)


@pytest.mark.parametrize("widths, expert_of_state", [
    (WIDTHS, [0, 1, 2]),
    ((8, 8), [0, 1]),
    ((130, 500, 257), [0, 1, 2]),
    ((8, 8, 5, 5, 5, 12), [0, 0, 1, 1, 1, 2]),
])
def test_one_einsum_equals_a_loop_over_experts(widths, expert_of_state):
    """The router written once more with loops and unpadded states: values and gradients."""
    router = make_router("attention", widths, expert_of_state)
    H = states(widths=widths)
    up = torch.randn(4, 4, 32)

    fast, attention = router(H)
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 4))
    (fast * up).sum().backward()
    fast_gradients = gradients(router)

    slow = torch.stack([naive_router(router, H[b], expert_of_state) for b in range(4)])
    (slow * up).sum().backward()
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    same_gradients(fast_gradients, gradients(router))


@pytest.mark.parametrize("widths", [WIDTHS, (8, 8), (130, 500, 257)])
def test_states_are_standardized(widths):
    """Mean 0 and deviation 1 in every real dimension of the states that were measured; 0 in the padding."""
    router = make_router(widths=widths)
    std, mean = torch.std_mean(router.standardize(states(64, seed=1, widths=widths)), 0)
    is_real = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
    torch.testing.assert_close(mean, torch.zeros(is_real.shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, is_real.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["attention", "hard", "linear"])
def test_an_expert_that_is_not_visible_has_no_influence_and_no_gradient(name):
    """NaN in its states is harmless; what is visible may also differ from problem to problem."""
    router, H = make_router(name), states(30)
    visible = torch.tensor([True, False, True])
    with_nan = H.clone()
    with_nan[:, 1] = math.nan
    context, attention = router(with_nan, visible)
    assert torch.equal(context, router(H, visible)[0])
    assert not torch.equal(context, router(H)[0])

    context.square().sum().backward()
    weights = router.map.weight.grad.view(-1, 3, 12).transpose(0, 1) if name == "linear" else router.W.grad
    assert not weights[1].any()
    assert weights[0].any()
    assert weights[2].any()
    for gradient in gradients(router).values():
        assert gradient is None or gradient.isfinite().all()

    if attention is not None:
        assert not attention[..., 1].any()
        torch.testing.assert_close(attention.sum(-1), torch.ones(30, 2, 4))
        only_one = torch.eye(3, dtype=torch.bool)[[0, 1, 2] * 10]
        _, attention = router(H, only_one)
        assert torch.equal(attention.mean((1, 2)), only_one.float())


def test_a_router_without_an_expert_is_the_router_that_does_not_see_it():
    router, H = make_router(widths=(8, 8, 5), expert_of_state=[0, 0, 1]), states(widths=(8, 8, 5))
    others = WithoutExpert(router, torch.tensor([0, 0, 1]), 0)
    context, attention = others(H)
    expected, _ = router(H, torch.tensor([False, False, True]))
    assert torch.equal(context, expected)
    assert not attention[..., :2].any()

    # What was hidden before stays hidden.
    visible = torch.tensor([[True, True, True]] * 3 + [[True, False, True]])
    _, attention = WithoutExpert(router, torch.tensor([0, 0, 1]), 1)(H, visible)
    assert torch.equal(attention[3, ..., 0], torch.ones(2, 4))
    assert attention[0, ..., 1].any()


def test_attention_to_an_expert_is_the_sum_over_its_states():
    attention = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(by_expert(attention, torch.tensor([0, 0, 1])), torch.tensor([0.7, 0.3]))

    attention, expert_of_state = torch.randn(4, 2, 3, 5).softmax(-1), torch.tensor([0, 1, 1, 1, 2])
    columns = [attention[..., expert_of_state == e].sum(-1) for e in range(3)]
    torch.testing.assert_close(by_expert(attention, expert_of_state), torch.stack(columns, -1))


def test_trust_is_one_number_for_each_expert():
    """Also if it has four states: the mean over them of (x . w) / sqrt(width) + b, for all four the same."""
    router = make_router(widths=(9, 9, 9, 9, 4), expert_of_state=[0, 0, 0, 0, 1])
    x = router.standardize(states(widths=(9, 9, 9, 9, 4)))
    trust = router.trust_in_states(x)  # (B, N)
    for n in range(4):
        torch.testing.assert_close(trust[:, n], trust[:, 0])

    votes = [x[:, n, :9] @ router.trust[n, :9] / 3 + router.trust_bias[n] for n in range(4)]
    torch.testing.assert_close(trust[:, 0], sum(votes) / 4)
    torch.testing.assert_close(trust[:, 4], x[:, 4, :4] @ router.trust[4, :4] / 2 + router.trust_bias[4])
    assert (trust[:, 0] - trust[:, 4]).abs().min() > 0.01


def test_trust_has_a_rate_of_its_own():
    """At rate 0 it has no gradient and changes nothing; else it learns whom to attend to, and with the other
    rates near zero nothing else moves. A problem's states say which of them is right."""
    policy, router = nn.Linear(1, 1), make_router(widths=(12, 12))
    nn.init.zeros_(router.trust)
    nn.init.zeros_(router.trust_bias)
    rlvr.make_optimizer(policy, router, 1e-3, 1e-3)
    router(states(widths=(12, 12)))[0].sum().backward()
    assert router.trust.grad is None
    assert router.trust_bias.grad is None
    assert router.W.grad is not None

    optimizer, W = rlvr.make_optimizer(policy, router, 1e-9, 1e-9, 0.3), router.W.detach().clone()
    for step in range(60):
        # Both states hold which of the two is right, as real states hold the kind of problem.
        H = states(32, seed=2 + step, widths=(12, 12))
        right = (H[:, 0, 0] > 0).long()
        H[:, :, 1:6] += 2.0 * (2 * right - 1)[:, None, None]
        attention = router(H)[1].mean((1, 2))
        optimizer.zero_grad()
        (-attention[torch.arange(32), right].log().mean()).backward()
        optimizer.step()
    assert attention[torch.arange(32), right].mean() > 0.9
    assert torch.allclose(router.W, W, atol=1e-6)


def test_hard_chooses_one_and_learns_of_all():
    """Forward: the context of the chosen state alone. Backward: the choice learns, for every state."""
    router, H = make_router("hard"), states(32)
    context, attention = router(H)
    assert torch.equal(attention.round(decimals=5).sort(-1).values[0, 0, 0], torch.tensor([0.0, 0, 1]))
    chosen = F.one_hot(attention[:, 0, 0].argmax(-1), 3).bool()
    assert len(chosen.unique(dim=0)) > 1
    torch.testing.assert_close(context, Router.forward(router, H, chosen)[0], atol=1e-5, rtol=1e-5)
    context.square().sum().backward()
    assert router.choice.weight.grad.abs().sum(1).min() > 0


def test_every_router_is_called_alike():
    """Same arguments, same shapes; those without attention or context return None in its place."""
    H = states()
    for name in ROUTERS:
        router = ROUTERS[name](WIDTHS, [0, 1, 2], 32, 4, 16, 0.5)
        context, attention = router(H, torch.ones(4, 3, dtype=torch.bool), None)
        assert (context is None) == (name in ("text", "none"))
        assert routers.has_context(name) == (name not in ("text", "none"))
        assert context is None or context.shape == (4, 4, 32)
        assert (attention is None) == (name in ("linear", "constant", "text", "none"))
        assert routers.reads_states(name) == (name not in ("constant", "text", "none"))
    with pytest.raises(ValueError, match="--router_dim 40 must be a multiple of 16"):
        Router(WIDTHS, [0, 1, 2], 32, dim=40)


# -- rlvr.py: GRPO

def test_advantages_by_hand():
    """(reward - mean) / std within each group; a group of equal rewards teaches nothing."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    expected = [[1, -1, -1, 1], [0, 0, 0, 0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]]
    torch.testing.assert_close(advantages(rewards), torch.tensor(expected, dtype=torch.float))


def test_groups_of_equal_rewards_are_left_out_of_the_gradient():
    advantage = torch.tensor([[0.0, 0], [1, -1], [0, 0], [-1, 1]])
    assert rlvr.informative(advantage, beta=0.0).tolist() == [1, 3]
    assert rlvr.informative(advantage, beta=0.04).tolist() == [0, 1, 2, 3]  # the KL term has a gradient
    assert rlvr.informative(torch.zeros(3, 2), beta=0.0).tolist() == [0]


def test_prompts_of_similar_length_share_a_gradient_pass():
    lengths = torch.tensor([9, 60, 8, 62, 30])
    passes = [rows.tolist() for rows in rlvr.micro_batches(lengths, 2)]
    assert passes == [[2, 0], [4, 1], [3]]
    assert [rows.tolist() for rows in rlvr.micro_batches(lengths, 5)] == [[0, 1, 2, 3, 4]]  # the order stays


def test_prompts_answered_in_parts_have_the_answers_that_they_have_together(finished, monkeypatch):
    policy, router, dataset, args = loaded(finished)
    batch = dataset.batch(range(4))
    together = rlvr.rollout(policy, router, batch, args, group=2, temperature=0)

    monkeypatch.setattr(rlvr, "parts_of_similar_length", lambda lengths: [[3, 1], [0], [2]])
    in_parts = rlvr.rollout(policy, router, batch, args, group=2, temperature=0)
    assert in_parts.texts == together.texts
    assert torch.equal(in_parts.mask, together.mask)
    assert torch.equal(in_parts.tokens[together.mask], together.tokens[together.mask])


def test_long_prompts_are_answered_apart_from_short_ones():
    assert rlvr.parts_of_similar_length([300, 20, 90, 700]) == [[1, 2], [0], [3]]
    assert rlvr.parts_of_similar_length([128, 5, 70]) == [[0, 1, 2]]  # short prompts stay as they are

    lengths = [1 + 4 * i * i % 797 for i in range(200)]
    parts = rlvr.parts_of_similar_length(lengths)
    assert sorted(i for part in parts for i in part) == list(range(200))
    for part in parts:
        longest, shortest = max(lengths[i] for i in part), min(lengths[i] for i in part)
        assert longest <= 128 or longest <= 2 * shortest


def test_a_part_of_a_batch_has_no_more_padding_than_it_needs(finished):
    _, _, dataset, _ = loaded(finished)
    order = sorted(range(len(dataset)), key=lambda i: len(dataset.ids[i]))
    shortest, longest = order[0], order[-1]
    batch = dataset.batch([longest, shortest])
    part, alone = batch[torch.tensor([1])], dataset.batch([shortest])
    assert part.tokens.shape[1] < batch.tokens.shape[1]
    assert torch.equal(part.tokens, alone.tokens) and torch.equal(part.lengths, alone.lengths)


def test_grpo_loss_by_hand():
    """Value and gradient, KL and mask, number by number."""
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, 9.0]).view(1, 2, 3).requires_grad_()
    mask = torch.tensor([[[True, True, True], [True, True, False]]])
    advantage = torch.tensor([[2.0, -1.0]])

    # The ratio is 1, so that each token counts by its advantage alone.
    loss = grpo_loss(logp, None, advantage, mask, beta=0.1)
    assert loss.item() == pytest.approx(3 * -2.0 + 2 * 1.0)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[[-2.0, -2, -2], [1, 1, 0]]]))

    # A reference that finds every token twice as likely: k3 is 2 - log 2 - 1, its derivative 1 - 2.
    logp.grad = None
    reference = logp.detach() + math.log(2)
    with_kl = grpo_loss(logp, reference, advantage, mask, beta=0.1)
    assert with_kl.item() - loss.item() == pytest.approx(0.1 * 5 * (1 - math.log(2)), rel=1e-5)
    with_kl.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[[-2.1, -2.1, -2.1], [0.9, 0.9, 0]]]))


def test_kl_estimate_is_unbiased_and_never_negative():
    """Its mean under the policy is the exact KL divergence."""
    p, q = torch.randn(2, 50).double().log_softmax(-1)
    assert (kl_estimate(p, q) >= 0).all()
    torch.testing.assert_close((p.exp() * kl_estimate(p, q)).sum(), (p.exp() * (p - q)).sum())


def token_log_probabilities(policy, context, prompt, completion, temperature):
    """Of each token of a completion, given all that stands before it: one full forward pass for each."""
    logp = []
    for t, token in enumerate(completion):
        text = torch.cat((prompt, completion[:t]))
        last = policy.prefill(text[None], torch.tensor([len(text)]), context).last
        logp.append((policy.logits(last)[0] / temperature).log_softmax(-1)[token])
    return torch.stack(logp)


def naive_loss(policy, router, batch, pair, expert_of_state, sampled, beta, temperature):
    """The loss of a step, written once more in plain lines.

    pair: for each problem the two experts that are compared; None for GRPO alone.
    """
    grpo, choice, n_tokens, row = 0.0, 0.0, 0, 0
    for b in range(len(batch)):
        prompt = batch.tokens[b, :batch.lengths[b]]
        H = batch.H[b:b + 1]
        shown = [None] if pair is None else pair[b].tolist()

        # GRPO. If two experts are compared, half of the group sees one of them, and half the other.
        means = []
        for expert in shown:
            visible = None if expert is None else expert_of_state == expert
            context, _ = router(H, visible)
            rewards = sampled.rewards[row].tolist()
            mean = sum(rewards) / len(rewards)
            std = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
            means.append(mean)

            for g, reward in enumerate(rewards):
                completion = sampled.tokens[row, g][sampled.mask[row, g]]
                logp = token_log_probabilities(policy, context, prompt, completion, temperature)
                n_tokens += len(completion)

                # Make every token likelier, if its answer was better than those of its half.
                if std > 0:
                    grpo = grpo - (reward - mean) / std * logp.sum()

                # Stay near the frozen policy, which has neither LoRA nor context.
                if beta:
                    with torch.no_grad(), policy.lora("off"):
                        frozen = token_log_probabilities(policy, None, prompt, completion, temperature)
                    x = frozen - logp
                    grpo = grpo + beta * (x.exp() - x - 1).sum()
            row += 1

        # The choice: attend more to the better of the two, the more so the more they differ.
        if pair is not None:
            _, attention = router(H)
            share = [attention[..., expert_of_state == expert].sum() for expert in shown]
            better = 0 if means[0] > means[1] else 1
            lead = means[better] - means[1 - better]
            choice = choice - lead * torch.log(share[better] / (share[0] + share[1]))
    return grpo / n_tokens + choice / len(batch)


@pytest.mark.parametrize("name, beta", [("attention", 0.0), ("mixed", 0.04)])
def test_the_loop_is_grpo_written_once_more(quick, tmp_path, monkeypatch, name, beta):
    """The gradients of all parameters in two steps at temperature 0.7; the rates of the three parts; the
    problems in their order. The loop has micro-batches, and leaves out groups without a gradient."""
    compare = name == "attention"
    models, steps, pairs, rates, clipped = [], [], [], [], []

    def recorded_build(args):
        policy, pool, router = rlvr.build(args)
        models.extend((policy, router))
        return policy, pool, router

    def recorded_draw(shares, candidates, u):
        pairs.append(draw_pair(shares, candidates, u))
        return pairs[-1]

    def rollout_with_given_rewards(policy, router, shown, args, group, temperature, generator=None):
        sampled = rollout(policy, router, shown, args, group, temperature, generator)
        rows = torch.arange(len(shown))[:, None]
        sampled.rewards = ((rows + torch.arange(group)) % 3 == 0).float()
        sampled.rewards[2] = 1.0
        if generator:  # of the loop, and not of the forecast
            assert temperature == 0.7
            assert (len(shown), group) == ((8, 2) if compare else (4, 4))
            steps.append((args, shown, sampled))
        return sampled

    def compared_with_the_naive(parameters):
        args, shown, sampled = steps[-1]
        policy, router = models
        n = args.batch
        first_rows = torch.arange(0, len(shown), len(shown) // n)
        batch, pair = shown[first_rows], None
        if compare:
            pair = pairs[-1]
        loss = naive_loss(policy, router, batch, pair, router.expert_of_state, sampled, beta, 0.7)
        naive = torch.autograd.grad(loss, parameters, allow_unused=True)
        for gradient, parameter in zip(naive, parameters):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7
        clipped.append(any(gradient is not None and gradient.any() for gradient in naive))
        return rlvr.clip_gradients(parameters)

    def recorded_rates(out, step, args, policy, router, progress, optimizer, generator):
        rates.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(train, "build", recorded_build)
    monkeypatch.setattr(train, "draw_pair", recorded_draw)
    monkeypatch.setattr(train, "rollout", rollout_with_given_rewards)
    monkeypatch.setattr(train, "clip_gradients", compared_with_the_naive)
    monkeypatch.setattr(train, "save_and_maybe_stop", recorded_rates)
    trained(tmp_path / "run", *quick, "--task algorithmic --batch 4 --max_new 3 --val 2 --test 2 --steps 2 "
            "--temperature 0.7 --reading_steps 0 --lr 1e-2 --micro_batch 1",
            "--router", name, "--beta", beta)

    assert clipped == [True, True]
    assert rates == [[1e-2, 2e-3, 0.1]] * 2  # LoRA, router, trust
    problems = []
    for args, shown, _ in steps:
        problems += shown.problems[::2 if compare else 1]
    assert problems == rlvr.load_problems(args, "train")[:8]


def test_an_answer_ends_with_its_stop_token_or_is_cut_by_the_limit(finished, monkeypatch):
    """The mask holds the stop token and nothing after it; what has none is cut, and the verifier is told."""
    policy, router, dataset, args = loaded(finished)
    policy.stop_at(list(range(0, len(policy.embed), 4)))

    def right_if_complete(text, problem, answer_format, truncated):
        return rewards.Verdict(float(not truncated), "right", not truncated)

    monkeypatch.setattr(rlvr, "verify", right_if_complete)
    generator = torch.Generator().manual_seed(0)
    sampled = rollout(policy, router, dataset.batch(range(8)), args, 16, 1.0, generator)
    for row, mask in zip(sampled.tokens.flatten(0, 1).tolist(), sampled.mask.flatten(0, 1).tolist()):
        n = next((i + 1 for i, token in enumerate(row) if token % 4 == 0), len(row))
        assert mask == [True] * n + [False] * (len(row) - n)
    has_stop = (sampled.tokens % 4 == 0).any(-1)
    assert torch.equal(sampled.truncated, ~has_stop)
    assert torch.equal(sampled.rewards, has_stop.float())
    assert has_stop.any()
    assert not has_stop.all()


def word_tokenizer(words, special=()):
    """A tokenizer of whole words; the special ones are special tokens."""
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(special)))
    return tokenizer


def test_special_tokens_of_an_answer_are_read(monkeypatch):
    """<answer> is a special token of some tokenizers; only the stop token is taken off."""
    tokenizer = word_tokenizer(["7", "8", "?"], special=["<end>", "<answer>", "</answer>", "<think>"])
    answers = ["<answer> 7 </answer> <end> <end>", "<think> <answer> 7 </answer> <end>",
               "<answer> 8 </answer> <end> <end>"]
    ids = [tokenizer.convert_tokens_to_ids(answer.split()) for answer in answers]
    tokens = torch.tensor(ids)[None]  # (1, G, T)
    is_stop = tokens == tokenizer.convert_tokens_to_ids("<end>")
    mask = is_stop.cumsum(-1) - is_stop.long() == 0

    policy = policy_that_stops_at(tokenizer, ["<end>"], own=["<end>"])
    batch = types.SimpleNamespace(problems=[Problem("3 + 4 =", "7")], H=None, visible=None)
    monkeypatch.setattr(rlvr, "sample", lambda *rest: (tokens, mask))
    args = types.SimpleNamespace(max_new=5, answer_format="tagged")
    sampled = rollout(policy, NoRouter([], [], 0), batch, args, 3, 1.0)
    assert [verdict.reason for verdict in sampled.verdicts[0]] == ["right", "no_answer", "wrong"]
    assert sampled.rewards.tolist() == [[1.0, 0.0, 0.0]]
    assert not sampled.truncated.any()


def policy_that_stops_at(tokenizer, ends, own):
    """What `rollout` needs of a policy. own: those of the ends that are the model's own stop tokens."""
    is_end = torch.zeros(len(tokenizer), dtype=torch.bool)
    is_end[tokenizer.convert_tokens_to_ids(ends)] = True
    config = types.SimpleNamespace(stop=tokenizer.convert_tokens_to_ids(own))
    return types.SimpleNamespace(tokenizer=tokenizer, ends=is_end, config=config)


def test_a_mark_in_the_token_that_ends_a_line_belongs_to_the_answer(monkeypatch):
    """In Qwen's vocabulary "]\\n" is one token. It ends a plain answer, and its "]" is a part of it."""
    tokenizer = word_tokenizer(["[", "1", ",", "2", "]", "]\n", "\n"], special=["<end>"])
    answers = ["[", "1", ",", "2", "]\n"], ["[", "1", ",", "2", "]"], ["[", "1", "\n", "<end>", "<end>"]
    tokens = torch.tensor([tokenizer.convert_tokens_to_ids(answer) for answer in answers])[None]
    policy = policy_that_stops_at(tokenizer, ["]\n", "\n", "<end>"], own=["<end>"])
    is_end = policy.ends[tokens]
    mask = is_end.cumsum(-1) - is_end.long() == 0
    batch = types.SimpleNamespace(problems=[Problem("Sort.", "[1, 2]", dataset="number_sorting")], H=None,
                                  visible=None)
    monkeypatch.setattr(rlvr, "sample", lambda *rest: (tokens, mask))
    args = types.SimpleNamespace(max_new=5, answer_format="plain")
    sampled = rollout(policy, NoRouter([], [], 0), batch, args, 3, 1.0)
    assert [text.replace(" ", "") for text in sampled.texts[0]] == ["[1,2]", "[1,2]", "[1"]
    assert [verdict.reason for verdict in sampled.verdicts[0]] == ["right", "truncated", "wrong"]


def test_the_reference_is_the_frozen_policy_without_its_prefix(quick, tmp_path):
    """LoRA alone begins at KL 0, as its update is zero; a fresh prefix does not."""
    settings = [*quick, "--reading_steps 0 --beta 0.04 --steps 2 --router"]
    alone = records(trained(tmp_path / "alone", *settings, "none"))
    with_prefix = records(trained(tmp_path / "prefix", *settings, "attention"))
    assert abs(alone[0]["kl"]) < 1e-6
    assert alone[1]["kl"] > 1e-5
    assert with_prefix[0]["kl"] > 1e-4


# -- rlvr.py: comparing experts

def test_choice_loss_equals_its_closed_form():
    """Two experts with trust t and 0, so that p = sigmoid(t). If the first one is better, the loss is
    -(R1 - R2) log p, and its derivative with respect to t is -(R1 - R2) (1 - p)."""
    for t, R1, R2 in ((0.0, 1.0, 0.0), (1.5, 0.25, 0.75), (-2.0, 0.5, 0.5), (0.3, 1.0, 1.0), (-9.0, 1, 0.5)):
        trust = torch.tensor(t, requires_grad=True)
        p = torch.stack((trust, torch.tensor(0.0))).softmax(0)[None]
        loss = choice_loss(p, torch.tensor([[R1, R2]]))
        loss.backward()
        first = 1 / (1 + math.exp(-t))
        second = 1 - first
        expected, derivative = -(R1 - R2) * math.log(first), -(R1 - R2) * second
        if R2 > R1:
            expected, derivative = -(R2 - R1) * math.log(second), (R2 - R1) * first
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert trust.grad.item() == pytest.approx(derivative, abs=1e-6)

    # It is summed over the problems. The first of these is the example of its docstring.
    p = torch.full((3, 2), 0.5, requires_grad=True)
    loss = choice_loss(p, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.25, 0.75]]))
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    assert p.grad.tolist() == [[-2.0, 0.0], [0.0, 0.0], [0.0, -1.0]]


def test_trust_comes_back_from_a_wrong_direction():
    """Where p of the better expert is nearly 0, the gradient is the largest, and it is finite."""
    for t in (-30.0, -60.0):
        trust = torch.tensor(t, requires_grad=True)
        p = torch.stack((trust, torch.tensor(0.0))).softmax(0)[None]
        choice_loss(p, torch.tensor([[1.0, 0.0]])).backward()
        assert trust.grad.item() == pytest.approx(-1.0, abs=1e-3)


def test_trust_moves_to_who_was_right_and_stays_where_both_were():
    """Through the router's own attention, with two states for the first expert."""
    expert_of_state = [0, 0, 1, 2]
    H = states(2, widths=(8, 8, 8, 8))
    for R, sign in (([1.0, 0.0], 1), ([0.0, 0.5], -1), ([1.0, 1.0], 0), ([0.0, 0.0], 0)):
        router = make_router(widths=(8, 8, 8, 8), expert_of_state=expert_of_state)
        _, attention = router(H)
        pair = torch.tensor([[0, 2], [0, 2]])
        p = pair_probabilities(attention, router.expert_of_state, pair)
        choice_loss(p, torch.tensor([R, R])).backward()
        step = -router.trust_bias.grad  # where a step of gradient descent goes
        assert step[:2].sign().tolist() == [sign, sign]
        assert step[3].sign().item() == -sign


def test_how_the_attention_divides_between_two_experts():
    """The other experts do not count; heads and latents are averaged first."""
    attention = torch.tensor([0.6, 0.2, 0.2]).expand(1, 2, 4, 3)
    p = pair_probabilities(attention, torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(p, torch.tensor([[0.75, 0.25]]))

    attention = torch.tensor([[[[0.1, 0.3, 0.6]], [[0.3, 0.1, 0.6]]]])  # (1, 2 heads, 1 latent, 3 states)
    p = pair_probabilities(attention, torch.tensor([0, 0, 1]), torch.tensor([[1, 0]]))
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.4]]))


def test_pairs_are_two_different_candidates_drawn_by_attention():
    """First: 80% of the attention among the candidates, and 20% even. Second: one of the others, evenly."""
    n = 200_000
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([[0.5, 0.1, 0.4, 0.0]]).expand(n, 4)
    pair = draw_pair(shares, [0, 2, 3], u)  # expert 1 is no candidate
    assert (pair[:, 0] != pair[:, 1]).all()

    first = [0.8 * share / 0.9 + 0.2 / 3 for share in (0.5, 0.4, 0.0)]
    for i, a in enumerate((0, 2, 3)):
        for b in {0, 2, 3} - {a}:
            fraction = ((pair[:, 0] == a) & (pair[:, 1] == b)).float().mean().item()
            assert fraction == pytest.approx(first[i] / 2, abs=4e-3)

    # The largest and the smallest u give an expert, too.
    edges = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.0, 1 - 2**-24]])
    assert draw_pair(shares[:3], [0, 2, 3], edges).tolist() == [[0, 2], [3, 2], [0, 3]]

    # With two candidates both are drawn, even if nobody attends to them.
    for row in draw_pair(torch.zeros(n, 4), [1, 3], u)[:1000].tolist():
        assert sorted(row) == [1, 3]


def test_the_draw_depends_on_seed_and_step_alone(monkeypatch):
    args = types.SimpleNamespace(seed=3, batch=7)
    torch.manual_seed(0)
    u = train.random_numbers(args, 5, "cpu")
    torch.manual_seed(1)
    assert torch.equal(train.random_numbers(args, 5, "cpu"), u)
    assert u.shape == (7, 2)
    assert not torch.equal(train.random_numbers(args, 6, "cpu"), u)
    assert not torch.equal(train.random_numbers(types.SimpleNamespace(seed=4, batch=7), 5, "cpu"), u)

    # Two ranks have the rows of one.
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(rlvr, "RANK", rank)
        monkeypatch.setattr(rlvr, "WORLD", 2)
        parts.append(train.random_numbers(args, 5, "cpu"))
    assert [len(part) for part in parts] == [3, 4]
    assert torch.equal(torch.cat(parts), u)


def test_two_halves_equal_two_separate_rollouts(finished):
    """Rows of `with_experts` are the problems with the other writing expert hidden by hand: the same context,
    the same greedy answers, the same log-probabilities. The encoder, expert 2, stays visible."""
    policy, router, dataset, args = loaded(finished)
    nn.init.normal_(router.trust, std=1.0)
    batch = dataset.batch(range(5))
    pair = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    shown = batch.with_experts(pair)
    context, attention = router(shown.H, shown.visible)
    both = rollout(policy, router, shown, args, 2, temperature=0)
    logp, _ = policy.score(shown, context, both.tokens, both.mask)

    for half in (0, 1):
        rows = torch.arange(half, 10, 2)
        assert [shown.problems[row] for row in rows] == batch.problems
        alone = dataset.batch(range(5))
        for b in range(5):
            hidden = 1 - int(pair[b, half])
            assert hidden in (0, 1)
            alone.visible[b, dataset.expert_of_state == hidden] = False
            alone.H[b, dataset.expert_of_state == hidden] = 1e6  # what is hidden has no influence
        expected, attention_alone = router(alone.H, alone.visible)
        torch.testing.assert_close(context[rows], expected)
        torch.testing.assert_close(attention[rows], attention_alone)
        assert (by_expert(attention_alone, dataset.expert_of_state)[..., 2] > 0).all()

        separate = rollout(policy, router, alone, args, 2, temperature=0)
        assert separate.texts == [both.texts[row] for row in rows]
        assert torch.equal(separate.rewards, both.rewards[rows])
        expected, _ = policy.score(alone, expected, both.tokens[rows], both.mask[rows])
        torch.testing.assert_close(logp[rows], expected, atol=1e-5, rtol=1e-4)


def test_who_can_be_compared(quick, tmp_path):
    """Experts that write; all of them without stage 0; nobody where there are fewer than two, or the router
    has no attention that comparing could train."""
    args, _, _, _, dataset = built(tmp_path, *quick)
    assert rlvr.candidates(dataset, args) == [0, 1]
    assert dataset.visible_alone.tolist() == [[True, False, True], [False, True, True], [False, False, True]]

    assert rlvr.candidates(dataset, replace(args, reading_steps=0)) == [0, 1, 2]
    for name in ("mixed", "hard", "linear", "constant", "none"):
        assert rlvr.candidates(dataset, replace(args, router=name)) == []
    dataset.writers = [1]
    assert rlvr.candidates(dataset, args) == []


def test_one_expert_that_writes_is_not_compared(quick, tmp_path):
    """With a writer and an encoder the run is the one without comparing and without trust, to the bit."""
    writer, encoder = quick[-2:]
    settings = [*quick, "--experts", writer, encoder, "--task algorithmic --words_steps 1 --reading_steps 1 "
                "--steps 2 --val 2 --test 2 --router"]
    a = trained(tmp_path / "a", *settings, "attention")
    b = trained(tmp_path / "b", *settings, "mixed --trust_lr 0")
    for one, other in zip(records(a), records(b), strict=True):
        assert without_times(one) == without_times(other)
        assert "reward_by_expert" not in one
        assert sum(one["reasons"].values()) == 24
    one, other = newest(a), newest(b)
    for name in one:
        if name != "progress":
            assert torch.equal(one[name], other[name]), name
    assert not one["router.trust"].any()


# -- rlvr.py: stage 0

def test_stage_0_reads_back_texts_that_are_new_to_it(tmp_path):
    """The policy says what the expert would say to held-out problems, but not with another's states."""
    out = trained(tmp_path / "run", "--preset tiny --task algorithmic --experts tiny/algorithmic "
                  "--words_steps 60 --reading_steps 14 --steps 1 --batch 2 --group 4 "
                  "--micro_batch 2 --max_new 4 --val 48 --test 1")
    [record] = [record for record in records(out, "stage0.jsonl") if "read_back" in record]
    assert record["read_back"] > record["shuffled"] + 0.3
    assert record["n"] > 40


def test_no_gold_answer_reaches_stage_0(finished, quick, tmp_path, monkeypatch):
    """With wrong gold answers: the same weights after it, to the bit. GRPO does see them."""
    def misleading(*arguments, **options):
        return [replace(problem, answer="7000") for problem in remembered(*arguments, **options)]

    monkeypatch.setattr(rlvr, "get_problems", misleading)
    misled = trained(tmp_path / "run", *quick, "--steps 2")
    one, two = (load_file(next(out.glob("stage0-*"))) for out in (finished, misled))
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert any(record["reward"] for record in records(finished))
    assert not any(record["reward"] for record in records(misled))


def test_stage_0_reads_one_expert_at_a_time(quick, tmp_path, monkeypatch):
    """In a step of one problem one expert that writes has a gradient; the encoder, the third one, always."""
    args, policy, _, router, dataset = built(tmp_path, *quick, "--words_steps 12 --reading_steps 12")
    seen = []

    def noted(parameters):
        seen.append(tuple(router.W.grad.abs().sum((1, 2)).gt(0).tolist()))
        return 1.0

    monkeypatch.setattr(rlvr, "clip_gradients", noted)
    monkeypatch.setattr(rlvr, "WORDS_BATCH", 1)
    monkeypatch.setattr(rlvr, "READING_BATCH", 1)
    for losses in (rlvr.learn_words(policy, router, dataset, args),
                   rlvr.learn_to_read(policy, router, dataset, args)):
        seen.clear()
        assert len(list(losses)) == 12
        assert set(seen) == {(True, False, True), (False, True, True)}


def test_micro_batches_do_not_change_a_step_of_reading(quick, tmp_path):
    args, policy, _, router, dataset = built(tmp_path, *quick)
    found = []
    for args.micro_batch in (3, 16):
        loss = rlvr.reading_gradients(policy, router, dataset, args, 0)
        found.append((loss, gradients(router) | gradients(policy)))
        train.clear_gradients(policy, router)
    (a, of_parts), (b, of_all) = found
    assert a == pytest.approx(b, rel=1e-5)
    same_gradients(of_parts, of_all)


def test_the_parts_of_stage_0_share_no_question():
    """Reading: the second quarter of the questions. Words: the second half. GRPO begins with the first."""
    problems = [Problem(question, "") for question in "abcdefgh"]
    assert rlvr.stage0_parts(problems) == ([2, 3], [4, 5, 6, 7])


def test_a_run_wants_all_of_its_experts(finished, capsys):
    """Fewer than it was trained with is a sentence about --experts, not a lost run."""
    sentence = refused(capsys, "--resume", finished, "--experts", "tiny/logic")
    assert "was trained with 3 experts, and --experts names 1" in sentence


def test_an_extension_may_have_the_name_of_a_module(tmp_path):
    path = tmp_path / "router.py"
    path.write_text("from router import Router\n\n\nclass Mine(Router):\n    pass\n")
    assert issubclass(rlvr.import_extension(path).Mine, Router)
    assert sys.modules["router"].Router is Router


def test_an_extension_is_a_python_file(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("not Python")
    with pytest.raises(ValueError, match="name a Python file"):
        rlvr.import_extension(notes)


def test_lines_that_are_no_records_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"step": 2')
    assert rlvr.read_records(path) == [{"step": 1}]


def test_a_question_in_another_encoding_is_still_text():
    assert evaluation.unescape("caf\udce9 3 + 4 =") == "caf? 3 + 4 ="


def test_a_dataset_that_repeats_its_questions_is_divided_by_itself():
    """All questions of the small dataset come early; a third of them is for reading, the others for words."""
    small = [Problem(question, "", dataset="small") for question in "abcabcabc"]
    large = [Problem(question, "", dataset="large") for question in "ABCDEFGHI"]
    problems = [problem for pair in zip(small, large) for problem in pair]
    reading, words = rlvr.stage0_parts(problems)
    assert [problems[i].question for i in reading] == ["a", "C", "D"]
    assert [problems[i].question for i in words] == ["b", "c", "E", "F", "G", "H", "I"]
    assert rlvr.stage0_parts([Problem("a", "")] * 3) == ([0], [0])  # there is nothing to divide


def test_experts_that_say_nothing_in_stage_0_are_named():
    with pytest.raises(ValueError, match="--reading_steps 0"):
        rlvr.draw_stage0([[], []], [0, 1], 4, seed=0)


def test_problems_are_grouped_by_what_the_expert_says():
    assert rlvr.group_by_text(["7", "3", "7", ""], [0, 1, 2, 3]) == [[0, 2], [1]]
    assert rlvr.group_by_text(["7", "3", "7", ""], [2, 3]) == [[2]]
    assert rlvr.group_by_text(["", ""], [0, 1]) == []


def test_stage_0_draws_an_expert_then_a_text_then_a_problem():
    """A text that comes 4 times is drawn twice as often as one that comes once; by the seed alone."""
    groups = [[[0, 1, 2, 3], [4]], [], [[5]]]  # expert 1 says nothing
    indices, drawn_experts = rlvr.draw_stage0(groups, [0, 2], 40_000, seed=7)
    expected = {(0, 0): 1 / 12, (1, 0): 1 / 12, (2, 0): 1 / 12, (3, 0): 1 / 12, (4, 0): 1 / 6, (5, 2): 1 / 2}
    drawn = list(zip(indices, drawn_experts))
    assert set(drawn) == set(expected)
    for what, fraction in expected.items():
        assert drawn.count(what) / 40_000 == pytest.approx(fraction, abs=0.01)

    assert rlvr.draw_stage0(groups, [0, 2], 50, seed=7) == (indices[:50], drawn_experts[:50])
    assert rlvr.draw_stage0(groups, [0, 2], 50, seed=8) != (indices[:50], drawn_experts[:50])


def test_two_ranks_divide_the_draws_of_stage_0(monkeypatch):
    groups = [[[0, 1, 2, 3], [4]], [[5]]]
    expected = rlvr.draw_stage0(groups, [0, 1], 9, seed=7)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(rlvr, "RANK", rank)
        monkeypatch.setattr(rlvr, "WORLD", 2)
        parts.append(rlvr.draw_stage0(groups, [0, 1], 9, seed=7))
    assert [len(part[0]) for part in parts] == [4, 5]
    assert (parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]) == expected


def test_words_loss_by_hand():
    """Cross-entropy of the inner products, and a tenth of the mean square of the difference."""
    embed = torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 4.0, 0, 0]])
    policy = types.SimpleNamespace(embed=embed, prefix_origin=torch.zeros(4), embed_std=2.0)

    # In units of the context the two embeddings are (1, 0, 0, 0) and (0, 2, 0, 0).
    context = torch.tensor([[[4.0, 0, 0, 0], [9, 9, 9, 9]], [[0, 1.0, 0, 0], [1, 0, 0, 0]]])
    loss, n = rlvr.words_loss(policy, context, [[1], [2, 1, 2]], [1, 2])
    first = math.log(1 + math.exp(-2))  # inner products, divided by sqrt(4): 2 and 0
    second = math.log(1 + math.exp(-1))  # 1 for token 2, and 0
    third = math.log(1 + math.exp(-0.5))  # 0.5 for token 1, and 0
    assert n == 3  # the text of three tokens is cut at two latents
    assert loss.item() == pytest.approx(first + second + third + 0.1 * (9 / 4 + 1 / 4), rel=1e-5)


def test_reading_loss_is_minus_the_log_probability_of_the_texts(finished):
    policy, router, dataset, args = loaded(finished)
    batch = dataset.batch([3, 1, 2])
    context, _ = router(batch.H, batch.visible)
    targets = [[7, 8, 2], [], [9, 2]]
    loss = rlvr.reading_loss(policy, batch, context, targets)
    expected = 0.0
    for b, ids in enumerate(targets):
        if ids:
            prompt = batch.tokens[b, :batch.lengths[b]]
            logp = token_log_probabilities(policy, context[b:b + 1], prompt, torch.tensor(ids), 1.0)
            expected -= logp.sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def targets_of(tokenizer, prompt, text, answer_format="plain"):
    """The tokens of a text as the answer to a prompt, as `Dataset` makes them."""
    config = types.SimpleNamespace(stop=[tokenizer.convert_tokens_to_ids("</s>")])
    policy = types.SimpleNamespace(tokenizer=tokenizer, config=config)
    prompt_format = "plain" if answer_format == "plain" else "chat"
    dataset = types.SimpleNamespace(
        prompts=[prompt], ids=experts.prompt_ids(tokenizer, [prompt], prompt_format, config.stop))
    [ids] = Dataset.as_answers(dataset, [text], policy, answer_format)
    return tokenizer.convert_ids_to_tokens(ids)


def characters(*longer_tokens):
    """A Llama 2 tokenizer: "▁" stands for a space, and the normalizer puts one before every text."""
    pieces = ["</s>", "▁", *"0123456789:Q<>/answer", *longer_tokens]
    scores = [(piece, -1.0 - 0.1 * (len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_target_tokens_are_those_of_prompt_and_answer_less_the_prompt():
    """Alone, " 7" would be tokenized as "▁", "▁7" by Llama 2's tokenizer."""
    tokenizer = characters("▁7")
    assert tokenizer.tokenize(" 7") == ["▁", "▁7"]
    assert targets_of(tokenizer, "Q:", "7") == ["▁7", "</s>"]
    assert targets_of(tokenizer, "Q:", "7", "tagged") == [*"<answer>7</answer>", "</s>"]
    assert targets_of(tokenizer, "Q:", "") == []

    # Where the end of the prompt and the answer would be one token, the answer's own tokens are used.
    tokenizer = characters(":▁7")
    assert tokenizer.tokenize("Q: 7") == ["▁", "Q", ":▁7"]
    assert targets_of(tokenizer, "Q:", "7") == ["▁", "▁", "7", "</s>"]


@pytest.mark.parametrize("answer_format", ["tagged", "plain"])
def test_what_stage_0_teaches_to_say_is_in_the_rewarded_format(answer_format):
    tokenizer = characters("▁7")
    target = targets_of(tokenizer, "Q:", "18", answer_format)
    assert target[-1] == "</s>"
    text = "".join(target[:-1]).replace("▁", " ")
    assert verify(text, Problem("How many?", "18"), answer_format).reward == 1


# -- rlvr.py: problems and controls

def test_a_longer_run_begins_alike_and_skipped_problems_are_left_out(monkeypatch):
    def counted(task, split, n, *rest, **options):
        return [Problem(f"{split} {i}", "") for i in range(n)]

    monkeypatch.setattr(rlvr, "get_problems", counted)
    args = types.SimpleNamespace(task="", data="", level="", seed=1, batch=32, reading_steps=0, steps=10,
                                 test=5, test_skip=7)
    short = rlvr.load_problems(args, "train")
    args.steps = 100
    first = [Problem(f"train {i}", "") for i in range(256)]
    assert rlvr.load_problems(args, "train")[:320] == short
    assert set(short[:256]) == set(first)
    assert short[:256] != first
    assert [problem.question for problem in rlvr.load_problems(args, "test")] == [
        f"test {i}" for i in range(7, 12)]


def test_controls_are_what_they_say(quick, tmp_path):
    """shuffled: another problem's states; noise: of their mean and std; untrained: of random models."""
    H = {}
    for control in ("none", "shuffled", "noise", "untrained"):
        _, _, pool, _, dataset = built(tmp_path, *quick, "--reading_steps 0 --control", control)
        H[control] = dataset.H

    place = {row.numpy().tobytes(): i for i, row in enumerate(H["none"])}
    order = [place[row.numpy().tobytes()] for row in H["shuffled"]]
    assert sorted(order) == sorted(place.values())
    assert len(place) > 250
    assert sum(i == j for i, j in enumerate(order)) < 3

    for a, b in zip(torch.std_mean(H["none"], dim=0), torch.std_mean(H["noise"], dim=0)):
        assert (a - b).abs().max() < 0.3 * (1e-3 + H["none"].std(0).max())

    assert not torch.isclose(H["none"], H["untrained"]).all(-1).any()
    prompts = [render_prompt(problem, instruct=False) for problem in dataset.problems]
    random = [Expert(expert.source, untrained=True) for expert in pool]
    assert torch.equal(H["untrained"], read_states(random, [prompts] * 3, progress=False))


@pytest.mark.parametrize("name, control, reading_steps", [
    ("hard", "shuffled", 1),
    ("attention", "noise", 0),
    ("linear", "untrained", 1),
    ("constant", "none", 1),
    ("none", "none", 1),
    ("text", "none", 0),
])
def test_every_mode_trains_and_is_found_again(quick, tmp_path, capsys, name, control, reading_steps):
    out = trained(tmp_path / "run", *quick, f"--router {name} --control {control}",
                  "--steps 2 --words_steps 1 --val 4 --test 4", "--reading_steps", reading_steps)
    saved = newest(out)
    has_attention = name in ("attention", "hard")
    assert any(key.startswith("router") for key in saved) == (name not in ("none", "text"))
    assert ("attention" in records(out)[0]) == has_attention
    assert ("reward_by_expert" in records(out)[0]) == (name == "attention")
    assert ("logic: " in loaded(out)[2].prompts[0]) == (name == "text")
    assert bool(list(out.glob("stage0-*"))) == (reading_steps > 0)

    # eval.py finds the same numbers as the run did at its end.
    capsys.readouterr()
    assert command(out, "--json", program=evaluation.run) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    at_the_end = json.loads((out / "eval.json").read_text())
    assert {key: report[key] for key in at_the_end} == at_the_end
    assert list(out.glob("*.png"))
    assert command(out, "--ask", "How many primes?", program=evaluation.run) == 0
    has_bar = re.search(r"^  logic .*\d\.\d\d", capsys.readouterr().out, re.MULTILINE) is not None
    assert has_bar == has_attention
    if control in ("shuffled", "noise"):
        assert "start another run with more" in refused(capsys, "--resume", out, "--steps", "3")


# -- train.py

def test_a_run_writes_down_what_it_did(finished):
    names = {"logic", "algorithmic", "arithmetic"}
    assert [record["step"] for record in records(finished)] == list(range(1, 7))
    for record in records(finished):
        assert record.keys() >= {"length", "kl", "entropy", "grad_norm", "rollout_seconds", "train_seconds",
                                 "tokens_per_second", "attention_entropy", "attention_map"}
        for key in ("reward", "sampled_reward", "truncated", "frac_reward_zero_std"):
            assert 0 <= record[key] <= 1
        assert set(record["attention"]) == names
        assert sum(record["attention"].values()) == pytest.approx(1, abs=1e-5)
        assert set(record["attention_by_dataset"]) <= {"family_relationships", "count_primes"}
        assert record["reward_by_expert"].keys() == record["reward_by_dataset"].keys()
        for by_expert_ in record["reward_by_expert"].values():
            assert set(by_expert_) == {"logic", "algorithmic"}  # the encoder is never compared
        assert sum(record["reasons"].values()) == 24
        assert ("val" in record) == (record["step"] % 3 == 0)

    verdicts, _, _ = evaluation.evaluate(*loaded(finished, "val"))
    assert records(finished)[-1]["val"] == evaluation.accuracy(verdicts)
    for sample_ in records(finished, "samples.jsonl"):
        assert sample_["reason"] in rewards.REASONS
        assert sample_["expert"] in ("logic", "algorithmic")  # the one that this answer's half saw
    by_part = [record.get("part") or record["expert"] for record in records(finished, "stage0.jsonl")]
    assert by_part == ["words", "reading", "logic", "algorithmic"]
    assert set(json.loads((finished / "eval.json").read_text())["masked"]) == names
    assert len(list(finished.glob("step-*"))) == 2
    assert not list(finished.glob("*.part"))


def verdicts_of(rewards_of_rows):
    """Verdicts with these rewards, [rows][G]."""
    rows = []
    for row in rewards_of_rows:
        rows.append([rewards.Verdict(reward, "right" if reward else "wrong", False) for reward in row])
    return rows


def test_the_record_of_a_step_by_hand():
    """Two problems, each shown with two of three experts. The reward is what the policy itself would get:
    each half counts as much as its problem attends to its expert."""
    sums_, words = Problem("q", "1", "sums", "sums"), Problem("q", "1", "words", "words")
    half_rewards = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]],
                         [[1, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]]]).bool()
    sampled = rlvr.Rollout([sums_, sums_, words, words], None, mask, None, verdicts_of(half_rewards),
                           torch.tensor(half_rewards), ~mask[..., 1], None, 2.0)
    batch = types.SimpleNamespace(problems=[sums_, words])
    pair = torch.tensor([[0, 1], [2, 1]])
    pool = [types.SimpleNamespace(name=name) for name in ("one", "two", "three")]
    attention = torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.3, 0.6]]).view(2, 1, 1, 3)
    record = train.summarize(sampled, batch, attention, pair, torch.tensor([0, 1, 2]), pool,
                             dict(loss=0.5, tokens=4, entropy=2.0, kl=1.0))

    # The four halves have the mean rewards 0.5, 1, 0 and 0.5, and the attention 0.6, 0.2, 0.6 and 0.3.
    in_sums, in_words = 0.6 * 0.5 + 0.2 * 1.0, 0.6 * 0.0 + 0.3 * 0.5
    assert record["reward_by_dataset"] == pytest.approx({"sums": in_sums / 0.8, "words": in_words / 0.9})
    assert record["reward"] == pytest.approx((in_sums + in_words) / 1.7)
    assert record["sampled_reward"] == 0.5
    assert record["reward_by_expert"] == {"sums": {"one": 0.5, "two": 1.0},
                                          "words": {"two": 0.5, "three": 0.0}}
    assert record["frac_reward_zero_std"] == 0.5
    assert record["length"] == 15 / 8
    assert record["truncated"] == 4 / 8
    assert record["reasons"] == {"right": 4, "wrong": 4}
    assert record["tokens_per_second"] == 7.5
    assert (record["loss"], record["kl"], record["entropy"]) == (0.5, 0.25, 0.5)

    assert train.experts_seen(pair, pool) == ["one", "two", "three", "two"]

    # The attention is that with all experts visible.
    assert record["attention"] == pytest.approx({"one": 0.35, "two": 0.25, "three": 0.4})
    assert record["attention_by_dataset"]["words"] == pytest.approx({"one": 0.1, "two": 0.3, "three": 0.6})
    entropy = -sum(share * math.log(share) for share in (0.6, 0.2, 0.2, 0.1, 0.3, 0.6)) / 2
    assert record["attention_entropy"] == pytest.approx(entropy)
    assert record["attention_map"] == [[pytest.approx([0.35, 0.25, 0.4])]]

    # The example of a docstring: who is hardly attended to counts little.
    weighted = train.weighted_mean(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.9, 0.1, 0.1, 0]))
    assert weighted == pytest.approx(0.9 / 1.1)

    # Without comparing it is the mean reward of the problem.
    sampled.problems = batch.problems = [sums_, sums_, words, words]
    record = train.summarize(sampled, batch, None, None, torch.tensor([0, 1, 2]), pool,
                             dict(loss=0.5, tokens=4, entropy=2.0, kl=1.0))
    assert record["reward"] == record["sampled_reward"] == 0.5
    assert record["reward_by_dataset"] == {"sums": 0.75, "words": 0.25}
    assert not {"reward_by_expert", "attention", "attention_entropy"} & record.keys()


def test_three_and_three_steps_equal_six(finished, quick, tmp_path):
    resume_to(finished, trained(tmp_path / "run", *quick, "--steps 3"), "--steps", "6")


def test_a_run_returns_its_report(finished, tmp_path):
    """A finished run that is resumed has nothing to do but the test; its records stay as they are."""
    out = shutil.copytree(finished, tmp_path / "run")
    report = train.run(["--resume", str(out)])
    assert json.loads(json.dumps(report)) == json.loads((finished / "eval.json").read_text())
    assert report["n"] == 8
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


MEAN_ROUTER = '''\
import torch
from router import ROUTERS, Router


class MeanRouter(Router):
    """A router whose attention to all states is the same, whatever the problem."""

    compares = False  # its attention never changes

    def forward(self, H, visible=None, attention=None):
        if visible is None:
            visible = torch.ones(H.shape[1], dtype=torch.bool, device=H.device)
        weight = visible.float().expand(H.shape[:2])  # (B, N)
        even = weight / weight.sum(1, keepdim=True)
        return super().forward(H, visible, attention=even[:, None, None])


ROUTERS["mean"] = MeanRouter
'''


def test_a_router_of_ones_own_is_trained_resumed_and_tested(quick, tmp_path, capsys, monkeypatch):
    """It comes from the file that --extension names, also in a process that does not know it yet."""
    extension = tmp_path / "mean_router.py"
    extension.write_text(MEAN_ROUTER)

    def forget():
        monkeypatch.setitem(ROUTERS, "mean", None)  # so that it is taken out again after the test
        monkeypatch.delitem(ROUTERS, "mean")

    forget()
    out = trained(tmp_path / "run", *quick, "--words_steps 1 --reading_steps 1 --steps 2 --val 2 --test 2 "
                  "--router mean --extension", extension)
    for record in records(out):
        assert list(record["attention"].values()) == pytest.approx([1 / 3] * 3)
        assert "reward_by_expert" not in record

    forget()
    train.run(["--resume", str(out), "--steps", "3"])
    assert records(out)[-1]["step"] == 3

    forget()
    assert command(out, program=evaluation.run) == 0
    assert json.loads((out / "eval.json").read_text())["router"] == "mean"

    # Without the file, the sentence names the option, and does not call the run damaged.
    forget()
    settings = json.loads((out / "config.json").read_text())["args"]
    edit(out, "config.json", args=settings | dict(extension=""))
    for program, argv in ((train.run, ("--resume", out)), (evaluation.run, (out,))):
        sentence = refused(capsys, *argv, program=program)
        assert "'mean'" in sentence
        assert "--extension" in sentence
    assert command(out, "--n", 1, "--extension", extension, program=evaluation.run) == 0
    forget()
    train.run(["--resume", str(out), "--steps", "4", "--extension", str(extension)])
    assert records(out)[-1]["step"] == 4


README_CODE = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)


def test_the_readmes_router_is_the_one_that_is_tested():
    assert MEAN_ROUTER in README_CODE


class RememberingWriter:
    """Stands for tensorboard's SummaryWriter, which need not be installed."""

    def __init__(self, folder):
        self.path = Path(os.environ["N_MUSKETEERS_TEST_WRITER"])

    def add_scalar(self, name, value, step):
        with open(self.path, "a") as file:
            file.write(f"{name} {value} {step}\n")


@pytest.mark.parametrize("number, line", [(1, "rlvr.verify = short_is_better"),
                                          (2, "train.advantages = without_std"),
                                          (3, "rlvr.Expert = PoliteExpert"),
                                          (4, "train.log = log_and_draw")])
def test_the_readmes_extensions_run_word_for_word(quick, tmp_path, monkeypatch, number, line):
    """Each in a process of its own, as it replaces a function of the program."""
    code = README_CODE[number]
    assert line in code
    path = tmp_path / "mine.py"
    path.write_text(code)
    out = tmp_path / "run"
    monkeypatch.setenv("N_MUSKETEERS_TEST_WRITER", str(tmp_path / "written"))

    def run():
        sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=RememberingWriter)
        arguments = [*quick, "--words_steps", "1", "--reading_steps", "1", "--steps", "2", "--out", str(out)]
        return rlvr.run_cli("train.py", lambda: train.run([*arguments, "--extension", str(path)]))

    process = forked(run, tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert len(records(out)) == 2
    if line == "train.log = log_and_draw":
        names = [text.split()[0] for text in (tmp_path / "written").read_text().splitlines()]
        assert names == ["reward", "reward"]


def test_an_extension_that_imports_eval_gets_the_program_that_runs(finished, tmp_path):
    """`python eval.py` calls itself __main__. A second copy of it would be changed without effect."""
    path = tmp_path / "mine.py"
    path.write_text("import sys\nimport eval\n"
                    "raise ValueError(f'the same program: {eval is sys.modules[\"__main__\"]}')\n")
    result = subprocess.run([sys.executable, "eval.py", str(finished), "--extension", str(path)],
                            capture_output=True, text=True)
    assert "the same program: True" in result.stderr, result.stderr


def test_the_readmes_script_runs_word_for_word(tmp_path, monkeypatch):
    """As in a notebook: train, open the run, evaluate. Only stage 0 is made shorter here."""
    code = README_CODE[5]
    short = dict(words_steps=1, reading_steps=1, stage0_problems=64, batch=4, val=32)
    monkeypatch.setitem(train.PRESETS, "tiny", short)
    repository = os.getcwd()

    def run():
        os.chdir(tmp_path)
        names = {}
        exec(compile(code, "README", "exec"), names)
        assert names["report"]["n"] == 32
        assert len(names["verdicts"]) == 32
        assert names["attention"].shape == (32, 4, 8, 3)
        return 0

    sys.path.insert(0, repository)
    try:
        process = forked(run, tmp_path / "log")
        process.join()
    finally:
        sys.path.remove(repository)
    assert process.exitcode == 0, f"exit code {process.exitcode}: " + (tmp_path / "log").read_text()


def test_an_expert_with_constant_states_is_named(tmp_path, capsys):
    """Every sum begins with the same word, so the state of the first token is the same for all of them."""
    for states, is_named in (("first", True), ("last", False)):
        trained(tmp_path / states, "--preset tiny --task arithmetic --experts tiny/arithmetic "
                "--reading_steps 0 --steps 1 --batch 2 --group 4 --val 8 --test 1 --states", states)
        output = capsys.readouterr().out
        assert ("arithmetic's states are the same for all problems" in output) == is_named


def gate(capsys, texts, verdicts, router="attention"):
    """What is printed about two experts, the second of which writes nothing."""
    problems = [Problem("q", answer, "sums", "sums") for answer in "1234"]
    pool = [types.SimpleNamespace(name="one", writes=True, prompt=lambda problem: "q"),
            types.SimpleNamespace(name="two", writes=False, prompt=lambda problem: "q")]
    H = torch.randn(4, 2, 3)
    dataset = types.SimpleNamespace(problems=problems, texts=texts, H=H, expert_of_state=torch.tensor([0, 1]))
    args = types.SimpleNamespace(router=router)
    capsys.readouterr()
    train.compare_with_experts(pool, dataset, args, range(4), verdicts)
    return capsys.readouterr().out


def test_what_the_experts_know_is_said_before_the_first_step(capsys, monkeypatch):
    """What they say must be right more often than the policy, by 15 points, or a warning says so."""
    [verdicts] = verdicts_of([[1.0, 0.0, 0.0, 0.0]])
    output = gate(capsys, [["1", "2", "3", "x"], [""] * 4], verdicts)
    assert "alone      the policy is right in sums 25%" in output
    assert "one alone is right in sums 75%" in output
    assert "two" not in output
    assert "warning" not in output
    assert "little to learn from them" in gate(capsys, [["1", "x", "x", "x"], [""] * 4], verdicts)

    # With --router text the policy has read the experts' words, and is not alone.
    assert "untrained  the policy, which reads" in gate(capsys, [["1"] * 4, [""] * 4], verdicts, "text")
    assert evaluation.before_name(dict(router="text")) != evaluation.before_name(dict(router="none"))

    # Without stage 0 the experts are asked here.
    monkeypatch.setattr(train, "write_texts", lambda pool, prompts: [["1", "2", "3", "4"], [""] * 4])
    assert "one alone is right in sums 100%" in gate(capsys, [], verdicts)


def test_a_verifier_of_ones_own_judges_tasks_and_experts_too(monkeypatch, capsys):
    """What rlvr.verify accepts is a task that can be learned, and an expert that knows."""
    sudoku = {"train": [Problem("q", "1 2\n2 1", "own", "own")]}
    sudoku |= dict(val=sudoku["train"], test=sudoku["train"])
    args = types.SimpleNamespace(answer_format="plain")
    with pytest.raises(ValueError, match="cannot be learned"):
        train.check_problems(args, sudoku)

    def accepts_all(completion, problem, answer_format, truncated):
        return rewards.Verdict(reward=0.5, reason="right", lenient=True)

    monkeypatch.setattr(rlvr, "verify", accepts_all)
    train.check_problems(args, sudoku)
    [verdicts] = verdicts_of([[0.0, 0.0, 0.0, 0.0]])
    assert "one alone is right in sums 100%" in gate(capsys, [["x"] * 4, [""] * 4], verdicts)


def test_the_experts_are_also_asked_without_stage_0(quick, tmp_path, capsys):
    trained(tmp_path / "run", *quick, "--reading_steps 0 --steps 1")
    output = capsys.readouterr().out
    assert "logic alone is right in" in output
    assert "algorithmic alone is right in" in output
    assert "arithmetic alone" not in output


def test_the_forecast_by_hand(finished, monkeypatch, capsys):
    """A rollout, a step of words and one of reading take a minute each, a gradient pass half a minute, and an
    answer 3 seconds."""
    policy, router, dataset, args = loaded(finished)
    dataset.ids = [[1] * 20 for _ in dataset.ids]
    settings = dict(steps=10, batch=4, group=8, micro_batch=4, eval_every=5, words_steps=30, reading_steps=15)
    args = types.SimpleNamespace(**vars(args) | settings)
    datasets = dict(train=dataset, val=dataset, test=dataset)  # 8 problems each
    monkeypatch.setattr(train, "timed", lambda function, n_calls, on_all_ranks=False: 60.0)
    train.forecast(policy, router, datasets, args, 3, 30.0, 3.0)

    # A step shows 4 problems twice: a rollout and two gradient passes, 2 minutes.
    grpo = 10 * 2.0
    # Two validations; the test before, after and with each of three experts masked; two experts read back
    # with two kinds of states.
    n_answers = 2 * 8 + 5 * 8 + 2 * 2 * 8
    tests = n_answers * 3 / 60
    expected = f"about {30 + 15 + grpo + tests:.1f} minutes: words 30.0, reading 15.0, GRPO 20.0, tests 4.4"
    assert expected in capsys.readouterr().out

    # A stage 0 that is done takes no time.
    train.forecast(policy, router, datasets, args, 3, 30.0, 3.0, stage0_is_done=True)
    assert "words 0.0, reading 0.0, GRPO 20.0, tests 2.8" in capsys.readouterr().out

    # Without stage 0 and comparing a step shows 4 problems once: 1.5 minutes.
    args.reading_steps, dataset.writers, args.router = 0, [], "mixed"
    train.forecast(policy, router, datasets, args, 3, 30.0, 3.0)
    assert "about 17.8 minutes: words 0.0, reading 0.0, GRPO 15.0, tests 2.8" in capsys.readouterr().out

    # The timed pass had prompts of 20 tokens, 52 with 8 answers of 4 tokens. If those of the step have only
    # 7, 39 with their answers, a pass takes three quarters of the time, 22.5 seconds.
    args.max_new = 4
    dataset.ids = [[1] * 7] * 4 + [[1] * 20] * 4
    train.forecast(policy, router, datasets, args, 3, 30.0, 3.0)
    assert "GRPO 13.8," in capsys.readouterr().out


@pytest.mark.parametrize("first, n_calls, expected", [(2.0, 10, 2.0), (2.0, 20, 1.0), (25.0, 20, 25.0)])
def test_a_call_is_timed_again_where_it_matters(first, n_calls, expected, monkeypatch):
    """The first call takes longer. A short one is made again if all would take over half a minute."""
    seconds = iter([first, 1.0])
    monkeypatch.setattr(train, "seconds_of", lambda function: next(seconds))
    assert train.timed(None, n_calls) == expected


def test_what_will_be_fetched_is_said_first(monkeypatch, capsys):
    """With sizes, before a problem is made or a model is loaded; nothing if there is nothing to fetch."""
    def stop_here(*arguments):
        raise ValueError("no problem has been made before")

    monkeypatch.setattr(train, "to_fetch", lambda sources: [("org/model", 2_000_000_000)])
    monkeypatch.setattr(train, "official_files_to_fetch", lambda: [("train.jsonl", 10_000_000)])
    monkeypatch.setattr(train, "load_problems", stop_here)
    settings = ["--preset", "paper", "--device", "cpu", "--out", os.environ["N_MUSKETEERS_CACHE"] + "/none"]
    with pytest.raises(ValueError, match="no problem has been made"):
        train.run(settings)
    output = capsys.readouterr().out
    assert "2.010 GB in all" in output
    assert re.search(r"org/model +2\.000 GB", output)
    assert re.search(r"train\.jsonl +0\.010 GB", output)

    monkeypatch.setattr(train, "to_fetch", lambda sources: [])
    args = types.SimpleNamespace(policy="tiny/policy", experts=[], task="gsm8k", data="mine.jsonl")
    train.announce_downloads(args)
    assert capsys.readouterr().out == ""


def test_a_small_data_file_gives_the_problems_that_it_has(quick, tmp_path, capsys):
    """And the header says how many: different ones for training, and fewer for the test than asked for."""
    questions = [f"How much is {i} + {i + 1}?" for i in range(24)]
    n = {split: sum(split_of(question) == split for question in questions) for split in rewards.SPLITS}
    lines = [json.dumps(dict(question=question, answer="#### 5")) for question in questions]
    (tmp_path / "data").write_text("\n".join(lines))
    out = trained(tmp_path / "run", *quick, "--task gsm8k --reading_steps 0 --steps 1 --data",
                  tmp_path / "data")
    assert json.loads((out / "eval.json").read_text())["n"] == min(8, n["test"])
    assert json.loads((out / "config.json").read_text())["args"]["level"] == "default"

    output = capsys.readouterr().out
    drawn = rlvr.load_problems(rlvr.open_run(out, "cpu")[0], "train")
    different = len({problem.question for problem in drawn})
    assert different < 16
    assert f"32 train ({different} different), {n['val']} val, {n['test']} test" in output
    assert f"there are only {n['test']} test problems, not 8" in output
    assert f"{n['test']} test problems are few" in output


def test_data_that_has_changed_is_refused(quick, tmp_path, capsys):
    """A line that is added would move others to another split. A copy in another place is accepted."""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps(dict(question=f"{i} + 1 =", answer=f"#### {i + 1}")) for i in range(40)]
    data.write_text("\n".join(lines))
    out = trained(tmp_path / "run", *quick, "--task gsm8k --reading_steps 0 --steps 1 --data", data)
    copy = shutil.copy(data, tmp_path / "copy.jsonl")

    data.write_text("\n".join([*lines, json.dumps(dict(question="9 + 9 =", answer="#### 18"))]))
    for program, words in ((evaluation.run, [out]), (train.run, ["--resume", out, "--steps", "2"])):
        assert "is not what it was when" in refused(capsys, *words, program=program)
        data.rename(tmp_path / "elsewhere.jsonl")
        assert "if it has moved, name its new place" in refused(capsys, *words, program=program)
        assert command(*words, "--data", copy, program=program) == 0
        (tmp_path / "elsewhere.jsonl").rename(data)


def test_right_answers_without_room_are_counted():
    """Three tokens have room for "12" and the end of the line, and not for 1,000."""
    def tokenizer(texts, add_special_tokens):
        return dict(input_ids=[list(text) for text in texts])  # a token is a character

    policy = types.SimpleNamespace(tokenizer=tokenizer)
    problems = [Problem("?", answer, dataset=dataset)
                for dataset, answer in (("a", "12"), ("a", "1000"), ("b", " 12 "), ("a", "999"))]
    assert train.too_long(problems, policy, 3) == {"a": (2, 3)}


def test_the_help_says_what_a_setting_is_its_default_and_its_range(capsys):
    assert command("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    tiny, small, paper_ = (preset.get("steps", Args().steps) for preset in PRESETS.values())
    assert len({tiny, small, paper_}) == 3
    steps = f"Default: tiny {tiny}; small {small}; paper {paper_}."
    for sentence in (f"--steps STEPS Steps of GRPO. At least 1. {steps}",
                     "--latents LATENTS Number of context tokens. At least 1, at most 512. Default: 8.",
                     "One of auto, tagged, plain. Default: tiny plain; small plain; paper auto.",
                     "One of tiny, small, paper."):
        assert sentence in text
    for field in dataclasses.fields(Args):
        assert f"--{field.name} " in text
        assert re.search(r"\.$", field.metadata["help"]), field.name


def test_the_preset_without_a_gpu(monkeypatch):
    """tiny for what the embedded pool knows; --policy: small, without its experts if none are named."""
    def preset(*argv):
        args = parse_args([*argv, "--device", "cpu"])
        return args.preset, args.task, args.policy, args.experts

    embedded = ["tiny/arithmetic", "tiny/logic", "tiny/algorithmic"]
    assert preset() == ("tiny", "arithmetic+logic+algorithmic", "tiny/policy", embedded)
    assert preset("--task", "logic") == ("tiny", "logic", "tiny/policy", embedded)
    assert preset("--policy", "X", "--router", "none") == ("small", "chain_sum", "X", [])
    named = ["--policy", "X", "--experts", "A", "--task", "gsm8k"]
    assert preset(*named) == ("small", "gsm8k", "X", ["A"])
    assert parse_args([*named, "--device", "cpu"]).think == train.THINKING["think"]
    assert preset("--router", "none") == ("tiny", "arithmetic+logic+algorithmic", "tiny/policy", [])
    assert preset("--preset", "paper", "--router", "none")[:2] == ("paper", "gsm8k")
    assert parse_args(["--preset", "small", "--device", "cpu"]).level == "easy"
    assert parse_args(["--preset", "small", "--device", "cpu", "--task", "gsm8k"]).level == "default"
    monkeypatch.setattr(train, "product_rate", lambda dtype, device: 1e11)
    with pytest.raises(ValueError, match="--preset small --task gsm8k"):
        preset("--task", "gsm8k")


def test_a_run_is_found_again_when_the_repository_has_moved(tmp_path, monkeypatch):
    """From another working directory, and with the repository in another place: config.json names the
    embedded pool relative to it."""
    out = trained(tmp_path / "run", "--preset tiny --device cpu --task algorithmic --reading_steps 0 "
                  "--experts tiny/algorithmic --steps 1 --batch 2 --val 4 --test 4")
    settings = json.loads((out / "config.json").read_text())["args"]
    assert (settings["policy"], settings["experts"]) == ("tiny/policy", ["tiny/algorithmic"])

    for name in ("policy", "algorithmic"):
        shutil.copytree(f"tiny/{name}", tmp_path / "moved" / "tiny" / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("../run", program=evaluation.run) == 0
    monkeypatch.setattr(experts, "REPOSITORY", (tmp_path / "moved").resolve())
    assert command("../run", "--n", 2, program=evaluation.run) == 0
    assert command("--resume", "../run", "--steps", 2) == 0
    assert records(out)[-1]["step"] == 2


# -- train.py: what fits on which machine. No GPU is needed: torch.cuda is replaced.

GSM8K = ["--task", "gsm8k"]


def has_card(monkeypatch, gigabytes, dtype=torch.bfloat16, used=0.05):
    """Let torch report a GPU of so many GB, a part of which is in use."""
    total = gigabytes * 2**30
    card = types.SimpleNamespace(name=f"card of {gigabytes} GB", total_memory=total)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int((1 - used) * total), total))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
    monkeypatch.setattr(train, "pick_dtype", lambda device, params: dtype)
    monkeypatch.setattr(train, "computes_in_bfloat16", lambda device: dtype == torch.bfloat16)


def fetches_nothing(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("something is fetched before the machine is judged")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(train.AutoConfig, "from_pretrained", fetch)


def row_of(args):
    """The gigabytes of the row whose settings a run has."""
    found = []
    for row in GPU_ROWS:
        wanted = train.preset_settings(row["preset"], row.get("task")) | row
        names = ("policy", "experts", "micro_batch", "preset")
        if all(getattr(args, name) == wanted[name] for name in names):
            found.append(row["gpu"])
    return found


def paper(**changes):
    return Args(**(PRESETS["paper"] | dict(device="cuda", dtype="bfloat16") | changes))


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 48, 80])
def test_every_card_gets_its_row(monkeypatch, capsys, gigabytes, preset):
    has_card(monkeypatch, gigabytes)
    fetches_nothing(monkeypatch)
    args = parse_args(GSM8K if preset == "small" else ["--preset", "paper"])
    cards = [row["gpu"] for row in train.rows_for(preset, "gsm8k")]
    assert row_of(args) == [max(card for card in cards if card <= gigabytes)]
    assert (args.preset, args.task, args.device) == (preset, "gsm8k", "cuda")
    assert bool(args.think) == (preset == "small")

    # It fits from the start, with room for gaps.
    assert GAPS * peak_memory(estimate_of(args)) <= 0.95 * gigabytes * 2**30

    # One line says what was chosen, why, and what the next larger row would need.
    [line] = capsys.readouterr().out.splitlines()
    assert f"card of {gigabytes} GB" in line and f"{args.micro_batch} prompts" in line
    assert ("next larger" in line) == (gigabytes < max(cards))


def test_what_others_use_of_a_card_is_not_counted_as_free(monkeypatch):
    has_card(monkeypatch, 24, used=0.4)
    assert row_of(parse_args(["--preset", "paper"])) == [16]


def test_a_card_without_bfloat16_needs_more_and_gets_a_smaller_row(monkeypatch):
    has_card(monkeypatch, 16, torch.float16)
    args = parse_args(["--preset", "paper"])
    assert row_of(args) == [12]
    assert GAPS * peak_memory(estimate_of(args)) <= 0.95 * 16 * 2**30


def test_without_a_task_a_card_changes_nothing(monkeypatch, capsys):
    has_card(monkeypatch, 80)
    args = parse_args([])
    assert args.preset == "tiny" and args.micro_batch == Args().micro_batch
    assert capsys.readouterr().out == ""


def test_a_given_micro_batch_is_taken_with_a_warning(monkeypatch, capsys):
    has_card(monkeypatch, 24)
    large = ["--policy", "Qwen/Qwen2.5-3B-Instruct", "--micro_batch", "16"]
    args = parse_args([*GSM8K, "--preset", "paper", *large])
    assert args.micro_batch == 16
    assert "warning" in capsys.readouterr().out

    # One that fits nowhere is taken, too.
    assert parse_args(["--preset", "paper", "--micro_batch", "32"]).micro_batch == 32
    assert "warning" in capsys.readouterr().out

    # Without --policy, a smaller policy lets it fit.
    args = parse_args(["--preset", "paper", "--micro_batch", "4"])
    assert args.micro_batch == 4 and "1.5B" in args.policy
    assert "warning" not in capsys.readouterr().out


def test_a_given_policy_is_taken_with_a_warning(monkeypatch, capsys):
    has_card(monkeypatch, 8)
    args = parse_args(["--preset", "paper", "--policy", "Qwen/Qwen2.5-3B-Instruct"])
    assert args.policy == "Qwen/Qwen2.5-3B-Instruct" and args.preset == "paper"
    assert args.micro_batch == 1  # as little as possible
    output = capsys.readouterr().out
    assert "warning" in output and "smaller --policy" in output

    # One that fits is taken without.
    args = parse_args([*GSM8K, "--policy", "HuggingFaceTB/SmolLM2-135M-Instruct"])
    assert args.policy == "HuggingFaceTB/SmolLM2-135M-Instruct" and "warning" not in capsys.readouterr().out


def test_another_preset_can_take_the_place_of_small(monkeypatch):
    has_card(monkeypatch, 24)
    monkeypatch.setattr(train, "GPU_PRESET", "paper")
    args = parse_args(GSM8K)
    assert args.preset == "paper" and row_of(args) == [24]


def test_on_a_card_other_tasks_have_the_models_of_the_preset(monkeypatch):
    """The models for a card are chosen for GSM8K. Another task has small's own, and the tiny ones theirs."""
    has_card(monkeypatch, 24)
    args = parse_args(["--task", "gcd"])
    assert (args.preset, args.policy, args.think) == ("small", PRESETS["small"]["policy"], 0)
    assert parse_args(["--task", "logic"]).preset == "tiny"


def test_experts_reason_on_gsm8k_with_preset_small():
    def settings(*argv):
        args = parse_args([*argv, "--device", "cpu"])
        return args.think, args.cue, args.level

    small = PRESETS["small"]
    assert settings("--preset", "small", *GSM8K) == (320, "Final answer, only a number:", "default")
    assert settings("--preset", "small", *GSM8K, "--think", "0")[0] == 0
    assert settings("--preset", "small") == (0, small["cue"], "easy")
    assert settings("--preset", "paper") == (0, "", "default")


def test_a_micro_batch_is_lowered_until_it_fits(monkeypatch):
    has_card(monkeypatch, 24)
    args = paper(micro_batch=32)
    train.fit_to_memory(args, {})
    assert args.micro_batch == 2


@pytest.mark.parametrize("argv", [GSM8K, ["--task", "chain_sum"],
                                  ["--task", "chain_sum", "--level", "min_terms=2,max_terms=3"]])
def test_without_a_gpu_one_sentence_says_what_runs_here(monkeypatch, argv):
    fetches_known(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "main_memory", lambda: 6 * 2**30)
    monkeypatch.setattr(train, "product_rate", lambda dtype, device: 1e11)
    with pytest.raises(ValueError) as error:
        parse_args(argv)
    sentence = str(error.value)
    assert "\n" not in sentence and "6 GB of memory" in sentence
    options = shlex.join(argv)  # the user's own, to be copied
    for command in ("`python train.py`", f"`python train.py --preset small {options}`",
                    f"`python train.py {options}`"):
        assert command in sentence
    assert sentence.count("about") == 2  # a time for each of the two that run here
    assert ("GPU of 8 GB or more" in sentence) == (argv == GSM8K)


def fetches_known(monkeypatch):
    """Nothing may be fetched, but the config.json of a folder may be read."""
    def fetch(*args, **kwargs):
        raise AssertionError("something is fetched before the machine is judged")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)


def test_a_card_too_small_for_any_row_is_named(monkeypatch):
    has_card(monkeypatch, 4)
    monkeypatch.setattr(train, "product_rate", lambda dtype, device: 1e11)
    with pytest.raises(ValueError, match="a GPU with only 4.1 GB free.*train.py --device cpu --preset small"):
        parse_args(GSM8K)
    assert parse_args(["--task", "logic"]).preset == "tiny"


def test_memory_that_cannot_be_found_out_is_said_to_be_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "main_memory", lambda: 0)
    monkeypatch.setattr(train, "product_rate", lambda dtype, device: 1e11)
    with pytest.raises(ValueError, match="an unknown amount of memory"):
        parse_args(GSM8K)


def test_main_memory_needs_no_sysconf(monkeypatch):
    assert train.main_memory() > 2**28

    def missing(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(train.os, "sysconf", missing)
    assert train.main_memory() == 0  # on Linux there is no other way


def test_times_come_from_operations_and_a_short_measurement():
    assert 1e8 < train.product_rate(torch.float32, "cpu") < 1e15
    tiny = Args(device="cpu")
    more = dataclasses.replace(tiny, steps=2 * tiny.steps)
    assert run_operations(tiny) < run_operations(more) < 2 * run_operations(tiny)

    # A thought costs more than a prompt of the same length.
    thinks = dataclasses.replace(tiny, think=100, cue="So:")
    writes = dataclasses.replace(tiny, write=tiny.write + 100)
    assert run_operations(thinks) > run_operations(writes) > run_operations(tiny)

    # An encoder reads, but neither thinks nor writes.
    encoder = dataclasses.replace(tiny, experts=["BAAI/bge-base-en-v1.5"])
    patient_encoder = dataclasses.replace(encoder, think=100, cue="So:")
    assert run_operations(patient_encoder) == run_operations(encoder)

    assert train.duration(20) == "about 1 minute" and train.duration(3 * 3600) == "about 3 hours"
    assert train.duration(200 * 3600) == "about 8 days"


def test_the_estimate_grows_with_what_needs_memory(monkeypatch):
    monkeypatch.setattr(train, "computes_in_bfloat16", lambda device: True)
    base = peak_memory(estimate_of(paper()))
    for change in (dict(micro_batch=8), dict(group=16), dict(max_new=256), dict(lora_rank=64),
                   dict(dtype="float32"), dict(dtype="float16"), dict(router_dim=4096), dict(latents=64)):
        assert peak_memory(estimate_of(paper(**change))) > base, change

    # Comparing halves the answers of a row: one row of the gradient pass needs less.
    assert peak_memory(estimate_of(paper(router="attention"))) < base

    # Micro-batch bounds the gradient pass and nothing else.
    one, two = (estimate_of(paper(micro_batch=n)) for n in (1, 2))
    differ = [a for a, b in zip(one, two) if one[a] != two.get(a)]
    assert differ == ["gradient pass, 1 prompts"]

    # Stage 0 has a row of its own, and --micro_batch bounds it, too, up to the 16 problems of a step.
    reading = [estimate_of(paper(reading_steps=60, micro_batch=n, beta=0.0))["stage 0, reading"]
               for n in (2, 16, 32)]
    assert reading[0] < reading[1] == reading[2]


def test_the_plan_knows_who_is_compared():
    """With stage 0 only experts that write are compared; without it, all of them."""
    writer, encoder = (KNOWN_MODELS[name] for name in ("EleutherAI/pythia-410m", "BAAI/bge-base-en-v1.5"))
    args = Args(batch=8, group=8)
    assert train.rows_and_group(args, [writer, writer]) == (16, 4)
    assert train.rows_and_group(args, [writer, encoder]) == (8, 8)
    assert train.rows_and_group(replace(args, reading_steps=0), [writer, encoder]) == (16, 4)
    assert train.rows_and_group(replace(args, router="mixed"), [writer, writer]) == (8, 8)


def test_an_expert_counts_while_it_reads(monkeypatch):
    monkeypatch.setattr(train, "computes_in_bfloat16", lambda device: True)
    large = KNOWN_MODELS["HuggingFaceTB/SmolLM2-1.7B-Instruct"]
    small = KNOWN_MODELS["HuggingFaceTB/SmolLM2-360M-Instruct"]
    policy = KNOWN_MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
    with_large, with_small = (memory_estimate(paper(), policy, [e], 384) for e in (large, small))
    reads = "an expert while it reads"

    # By hand: 1.711e9 weights and 16,384 tokens with 2 * 24 * 2,048 keys and values, 4 * 8,192 numbers of the
    # MLP and 4 * 2,048 hidden ones, 2 bytes each; and the logits of 42 last tokens, 10 bytes each.
    by_hand = 2 * (1_711_376_384 + 16_384 * (98_304 + 32_768 + 8_192)) + 42 * 49_152 * 10
    assert with_large[reads] == by_hand
    assert peak_memory(with_large) > peak_memory(with_small)


def test_a_gradient_pass_by_hand():
    policy = KNOWN_MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
    bytes_ = train.scoring_memory(paper(beta=0.0), policy, 1, 8, 392, 128)

    # 392 + 8 * 128 tokens; in each of 24 layers 6 * 896 + 2 * 128 + 3 * 4,864 numbers; 8 * 14 * 128 rows of
    # attention over 520 tokens; 3 last hidden states; 256 tokens of logits, 2 + 12 bytes each.
    tokens = 1416
    layers = 24 * 2 * (tokens * 20_224 + 14_336 * 520)
    by_hand = layers + 3 * 1024 * 896 * 2 + 256 * 151_936 * 14
    assert bytes_ == by_hand


def test_sizes_are_those_of_the_models(tmp_path):
    # The constants: a tied Qwen2.5-0.5B has embeddings, and in 24 layers biases of q, k and v and two norms.
    size = KNOWN_MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
    small = 24 * ((896 + 2 * 128) + 2 * 896) + 896
    assert size.params == size.vocab * size.width + size.blocks + small

    # A folder: counted from its config.json alone.
    tiny = model_size("tiny/policy")
    assert tiny.params == sum(p.numel() for p in train_model("tiny/policy").parameters())
    assert model_size("Qwen/Qwen2.5-3B-Instruct@" + "0" * 40) == KNOWN_MODELS["Qwen/Qwen2.5-3B-Instruct"]
    for row in GPU_ROWS:
        named = PRESETS[row["preset"]] | row
        assert {named["policy"], *named["experts"]} <= KNOWN_MODELS.keys()


def train_model(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(train.local_folder(folder))


def test_a_plan_loads_nothing_but_a_config(monkeypatch, capsys):
    fetches_known(monkeypatch)
    table = train.run(["--preset", "paper", "--device", "cpu", "--plan"])
    output = capsys.readouterr().out
    assert "at the worst moment" in output and "233 steps of 32 problems" in output
    assert sum(table.values()) > peak_memory(table) > table["policy, frozen"]


def test_on_a_mac_small_models_stay_on_the_cpu_and_larger_ones_use_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(train, "product_rate", measured := Measured())
    assert parse_args([]).device == "cpu"
    with pytest.raises(ValueError, match="no CUDA GPU"):
        parse_args(GSM8K)
    assert measured.on == {(torch.float32, "cpu"), (torch.float32, "mps")}  # this "Mac" has no bfloat16

    # A larger model runs on its GPU, with the memory that Metal recommends.
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
    args = parse_args(["--preset", "small"])
    assert args.device == "mps" and args.micro_batch == PRESETS["small"]["micro_batch"]


class Measured:
    """In place of product_rate: remembers where it was asked to measure."""

    def __init__(self):
        self.on = set()

    def __call__(self, dtype, device):
        self.on.add((dtype, device))
        return 1e11


# -- model.py

def make_policy(folder, kind="Llama", **sizes):
    """A random policy, saved to `folder`; returns the Hugging Face model itself."""
    policy_sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=128)
    twin = random_model(kind, **policy_sizes | sizes)
    for name, parameter in twin.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    twin.save_pretrained(folder)
    return twin


def wake_lora(policy):
    """Give LoRA's B, which is zero at the start, random numbers."""
    torch.manual_seed(1)
    for layer in policy.adapters():
        for B in layer.B:
            nn.init.normal_(B, std=0.2)
    return policy


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One random Llama with LoRA that does something."""
    folder = tmp_path_factory.mktemp("llama")
    make_policy(folder)
    return wake_lora(Policy.from_pretrained(folder))


def example(with_context=True):
    """Three prompts of several lengths, padded; two completions each, one of them short; context or None."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 300, (3, 9), generator=g)
    lengths = torch.tensor([9, 5, 7])
    completions = torch.randint(2, 300, (3, 2, 6), generator=g)
    mask = torch.ones(3, 2, 6, dtype=torch.bool)
    mask[1, 0, 3:] = False
    context = None
    if with_context:
        context = torch.randn(3, 4, 32, generator=g)
    return tokens, lengths, context, completions, mask


def merge_lora_into(twin, policy):
    """Add scale B A to the weights of the Hugging Face model, part by part."""
    theirs = [module for module in twin.model.layers.modules() if isinstance(module, nn.Linear)]
    ours = []
    for layer in policy.adapters():
        ours += zip(layer.A.split(8), layer.B)  # rank 8

    for linear, (A, B) in zip(theirs, ours, strict=True):  # q, k, v, o, gate, up, down of each layer
        linear.weight.data += 2.0 * B @ A  # alpha / rank


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)


@pytest.mark.parametrize("kind, settings", [
    ("Llama", {}),
    ("Llama", dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3)),
    ("Llama", dict(rope_parameters=LINEAR)),
    ("Qwen2", dict(rope_parameters=YARN)),
    ("Qwen3", dict(head_dim=16)),
])
@pytest.mark.parametrize("with_context", [False, True])
def test_logprobs_equal_transformers(tmp_path, kind, settings, with_context):
    """Padding, context, shared prompt, temperature, entropy; LoRA fresh, and LoRA merged into the twin."""
    prefix_origin = "zero" if kind == "Qwen2" else "mean"
    twin = make_policy(tmp_path, kind, **settings)
    policy = Policy.from_pretrained(tmp_path, prefix_origin=prefix_origin)
    embed = twin.get_input_embeddings()
    tokens, lengths, context, completions, mask = example(with_context)
    batch = types.SimpleNamespace(tokens=tokens, lengths=lengths)

    for awake in (False, True):
        if awake:
            wake_lora(policy)
            merge_lora_into(twin, policy)

        with torch.no_grad():
            logp, entropy = policy.score(batch, context, completions, mask, 0.7)
            for b in range(3):
                for g in range(2):
                    # Run prompt and completion as one text, without padding.
                    n = int(mask[b, g].sum())
                    completion = completions[b, g, :n]
                    x = embed(torch.cat((tokens[b, :lengths[b]], completion)))
                    if with_context:  # in standard deviations of the embeddings, measured from the origin
                        origin = embed.weight.mean(0) * (prefix_origin == "mean")
                        x = torch.cat((origin + embed.weight.std() * context[b], x))
                    logits = twin(inputs_embeds=x[None]).logits[0, -n - 1:-1]
                    z = (logits / 0.7).log_softmax(-1)

                    expected = z.gather(1, completion[:, None])[:, 0]
                    torch.testing.assert_close(logp[b, g, :n], expected, atol=1e-4, rtol=1e-4)
                    expected = -(z.exp() * z).sum(-1)
                    torch.testing.assert_close(entropy[b, g, :n], expected, atol=1e-4, rtol=1e-4)
        assert not logp[~mask].any()


def score_of_the_embedded_policy(dtype):
    """Log-probabilities (n,), and the gradients of context and LoRA, each as one vector."""
    torch.manual_seed(0)
    policy = wake_lora(Policy.from_pretrained("tiny/policy", dtype=dtype, prefix_origin="mean"))
    tokens, lengths, _, completions, mask = example()
    tokens, completions = tokens % len(policy.embed), completions % len(policy.embed)
    C = torch.ones(3, 4, policy.config.hidden_size, requires_grad=True)

    prefill = policy.prefill(tokens, lengths, C)
    logp, _ = policy.logprobs(prefill, completions, mask)
    (logp.sum() * 1e-5).backward()  # as small as a step of 100,000 tokens makes it
    lora = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert lora.dtype == torch.float32
    return logp[mask].detach(), C.grad.flatten(), lora, prefill.prompt_kv[0][0].dtype


@pytest.mark.parametrize("dtype, kv_dtype, most", [
    (torch.bfloat16, torch.bfloat16, 0.05),
    (torch.float16, torch.float32, 0.005),
])
def test_sixteen_bits_are_float32_but_for_rounding(dtype, kv_dtype, most):
    """Log-probabilities of the embedded policy, and the gradients of its context and of LoRA."""
    *rounded, found = score_of_the_embedded_policy(dtype)
    *exact, _ = score_of_the_embedded_policy(torch.float32)
    assert found == kv_dtype
    for ours, expected in zip(rounded, exact):
        error = (ours - expected).norm() / expected.norm()
        assert 0 < error < most


def test_a_float16_policy_neither_overflows_nor_loses_small_gradients():
    """Numbers far outside float16's range, 6e-8 to 65504, come through a product in float16."""
    torch.manual_seed(0)
    weight = torch.randn(24, 16).half()
    for size in (1e-15, 1e-9, 1.0, 1e6, 1e15):
        x = (size * torch.randn(5, 16)).requires_grad_()
        dy = size * torch.randn(5, 24)
        y = Float16Linear.apply(x, weight)
        y.backward(dy)
        for ours, expected in ((y, x @ weight.float().T), (x.grad, dy @ weight.float())):
            assert ours.dtype == torch.float32
            assert (ours - expected).norm() < 1e-3 * expected.norm()

    # Zeros stay zeros, and NaN is not hidden.
    assert not Float16Linear.apply(torch.zeros(2, 16), weight).any()
    assert Float16Linear.apply(torch.full((2, 16), math.nan), weight).isnan().all()


def test_a_float16_policy_holds_hidden_states_that_float16_does_not(tmp_path):
    """Hidden states of over a million, the greedy tokens of float32; weights that do not fit are refused."""
    make_policy(tmp_path)

    def grow(tensors):
        for name in tensors:
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name] * 32
            if "down_proj" in name:
                tensors[name] = tensors[name] * 512
            tensors[name] = tensors[name].half().float()  # float32 and float16 then have the same weights
        return tensors

    edit_weights(tmp_path, grow)
    tokens, lengths, *_ = example()
    completions = []
    for dtype in (torch.float32, torch.float16):
        policy = Policy.from_pretrained(tmp_path, dtype=dtype)
        prefill = policy.prefill(tokens, lengths)
        assert prefill.last.abs().amax(1).min() > 1e6
        completions.append(policy.generate(prefill, 1, 8, temperature=0)[0])
    assert torch.equal(*completions)

    edit_weights(tmp_path, lambda tensors: {name: 1e5 * tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="is too large for float16"):
        Policy.from_pretrained(tmp_path, dtype=torch.float16)


def test_the_dtype_is_one_that_the_device_computes_fast(monkeypatch):
    assert pick_dtype("cpu", 49_999_999) == torch.float32
    assert pick_dtype("cpu", 50_000_000) == torch.bfloat16

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert pick_dtype("cuda:1", 135_000_000) == dtype
        assert pick_dtype("cuda", 1_000_000) == torch.float32


def test_group_attention_by_hand():
    """The example of its docstring, with a third prompt position that is padding and a slot in the future."""
    ln = math.log
    prompt_k = torch.tensor([0, ln(2), 9]).view(1, 1, 3, 1)
    prompt_v = torch.tensor([1.0, 2, 99]).view(1, 1, 3, 1)
    padding = torch.tensor([False, False, True]).view(1, 1, 1, 1, 3)
    own_k = torch.tensor([[0, 9], [ln(5), 9]]).view(1, 1, 2, 2, 1)
    own_v = torch.tensor([[5.0, 99], [10, 99]]).view(1, 1, 2, 2, 1)
    future = torch.tensor([[False, True]])
    q = torch.ones(1, 2, 1, 1, 1)

    y = group_attention(q, own_k, own_v, future, prompt_k, prompt_v, padding)
    torch.testing.assert_close(y.flatten(), torch.tensor([2.5, 6.875]))


def test_group_attention_equals_a_loop_over_queries():
    """Every query by itself, in plain lines: its head, the keys that it may see, softmax, average."""
    torch.manual_seed(0)
    B, G, T, nq, nk, hd, S = 2, 3, 4, 6, 2, 5, 7
    q = torch.randn(B, G, T, nq, hd)
    own_k, own_v = torch.randn(2, B, nk, G, T, hd)
    prompt_k, prompt_v = torch.randn(2, B, nk, S, hd)
    lengths = [7, 4]
    padding = torch.arange(S) >= torch.tensor(lengths).view(-1, 1, 1, 1, 1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1).repeat(nq // nk, 1)
    y = group_attention(q, own_k, own_v, future, prompt_k, prompt_v, padding)

    for b, g, t, head in itertools.product(range(B), range(G), range(T), range(nq)):
        key_head = head // 3  # three query heads read one key head
        keys = torch.cat((prompt_k[b, key_head, :lengths[b]], own_k[b, key_head, g, :t + 1]))
        values = torch.cat((prompt_v[b, key_head, :lengths[b]], own_v[b, key_head, g, :t + 1]))
        weights = (keys @ q[b, g, t, head] / hd**0.5).softmax(0)
        torch.testing.assert_close(y[b, g, t, head], weights @ values)


def test_cached_decoding_equals_the_full_forward(small):
    """40 greedy tokens from the KV cache, LoRA merged, are what the text as a single prompt gives."""
    tokens, lengths, context, *_ = example()
    policy = copy.deepcopy(small)
    policy.stop_at([0])  # a token that none of these chooses
    with torch.no_grad():
        prefill = policy.prefill(tokens, lengths, context)
        completions, mask = policy.generate(prefill, 2, 40, temperature=0)
        assert torch.equal(completions[:, 0], completions[:, 1])
        assert mask.all()

        for b in range(3):
            for t in (0, 1, 15, 16, 17, 33, 39):
                text = torch.cat((tokens[b, :lengths[b]], completions[b, 0, :t]))[None]
                last = policy.prefill(text, torch.tensor([text.shape[1]]), context[b:b + 1]).last
                assert policy.logits(last).argmax() == completions[b, 0, t]


def test_a_completion_ends_with_its_first_stop_token(small):
    """The mask is True up to it, the rest is filled with a stop token, and T is the longest, in buckets."""
    tokens, lengths, context, *_ = example()
    policy = copy.deepcopy(small)
    policy.stop_at([0])
    prefill = policy.prefill(tokens, lengths, context)
    endless, _ = policy.generate(prefill, 1, 40, temperature=0)

    # Let the third token of the first completion be a stop token, and the fourth of the others.
    stops = {int(endless[0, 0, 2]), int(endless[1, 0, 3]), int(endless[2, 0, 3])}
    policy.stop_at(sorted(stops))
    completions, mask = policy.generate(prefill, 1, 40, temperature=0)
    for b in range(3):
        ids = endless[b, 0].tolist()
        n = 1 + min(ids.index(stop) for stop in stops if stop in ids)
        assert mask[b, 0].tolist() == [t < n for t in range(mask.shape[-1])]
        assert completions[b, 0, :n].tolist() == ids[:n]
        assert policy.ends[completions[b, 0, n - 1:]].all()
    assert mask.shape[-1] in (2, 4)


def test_lora_merged_is_lora_and_lora_off_is_the_frozen_model(small, tmp_path):
    """Merged: the same states but for rounding. Off, or fresh: those of the frozen model, to the bit."""
    tokens, lengths, context, *_ = example()

    def last(policy):
        return policy.prefill(tokens, lengths, context).last.detach()

    make_policy(tmp_path)
    frozen = Policy.from_pretrained(tmp_path, rank=0)
    trained = last(small)
    with small.lora("merged"):
        torch.testing.assert_close(last(small), trained, atol=1e-4, rtol=1e-4)
    with small.lora("off"):
        assert torch.equal(last(small), last(frozen))
        with small.lora("merged"):  # off stays off
            assert torch.equal(last(small), last(frozen))
    assert torch.equal(last(Policy.from_pretrained(tmp_path)), last(frozen))
    assert torch.equal(last(small), trained)
    assert (trained - last(frozen)).abs().max() > 0.1
    assert not list(frozen.parameters())

    # An error inside leaves LoRA as it was.
    for mode in ("merged", "off"):
        with pytest.raises(KeyError):
            with small.lora(mode):
                raise KeyError
        assert torch.equal(last(small), trained)
    with pytest.raises(ValueError, match='"off" or "merged"'):
        with small.lora("on"):
            pass


def test_shared_prefill_equals_plain_copies(small):
    """Log-probabilities and gradients of 3 prompts x 2 are those of 6 rows that each run all their text."""
    tokens, lengths, context, completions, mask = example()
    context.requires_grad_()
    weight = torch.randn(3, 2, 1)
    logp, _ = small.logprobs(small.prefill(tokens, lengths, context), completions, mask)
    (logp * weight).sum().backward()
    shared = gradients(small) | dict(context=context.grad)
    context.grad = None

    # Repeat each prompt for each of its completions.
    def copies(tensor):
        return tensor.repeat_interleave(2, 0)

    prefill = small.prefill(copies(tokens), copies(lengths), copies(context))
    logp2, _ = small.logprobs(prefill, completions.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None])
    logp2 = logp2.view_as(logp)
    (logp2 * weight).sum().backward()

    torch.testing.assert_close(logp2, logp, atol=1e-5, rtol=1e-5)
    same_gradients(shared, gradients(small) | dict(context=context.grad))
    assert shared["context"].abs().max() > 1e-3  # the gradient reaches it


def test_swiglus_backward_is_the_derivative():
    assert torch.autograd.gradcheck(SwiGLU.apply, torch.randn(3, 8).double().requires_grad_())


def test_samples_follow_the_probabilities_that_the_loss_is_about(small):
    """Completions of three tokens: each as often as exp(log-probability) says, at one temperature."""
    tokens, lengths, context, *_ = example()
    with torch.no_grad():
        prefill = small.prefill(tokens[:1], lengths[:1], context[:1])
        completions, mask = small.generate(prefill, 4096, 3, 0.3, torch.Generator().manual_seed(0))
        logp = small.logprobs(prefill, completions, mask, 0.3)[0][0].sum(-1)

    # Count how often each different completion came, and compare by a chi-squared test.
    different, which, counts = completions[0].unique(dim=0, return_inverse=True, return_counts=True)
    expected = 4096 * torch.zeros(len(different)).scatter(0, which, logp.exp())
    often = expected > 10
    n = int(often.sum())
    assert n > 5
    chi_squared = ((counts - expected).square() / expected)[often].sum()
    assert chi_squared < n + 4 * (2 * n) ** 0.5


def test_token_logprob_equals_autograd():
    h, weight = torch.randn(37, 16, requires_grad=True), torch.randn(70, 16)
    targets, up = torch.randint(0, 70, (37,)), torch.randn(37)
    logp, entropy = TokenLogprob.apply(h, weight, targets, 0.6, 8)
    (logp * up).sum().backward()
    ours, h.grad = h.grad, None

    z = (h @ weight.T / 0.6).log_softmax(-1)
    expected = z.gather(1, targets[:, None])[:, 0]
    (expected * up).sum().backward()
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(z.exp() * z).sum(-1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours, h.grad, atol=1e-5, rtol=1e-4)


def test_sample_at_the_edges():
    """Temperature 0 is the likeliest; no token of probability 0 is drawn; NaN gives any token."""
    assert sample(torch.tensor([[0.0, 2, 1]]), 0, None).tolist() == [1]

    smallest_and_largest = torch.tensor([[0.0], [1 - 2**-24]])  # of what torch.rand gives
    certain = torch.tensor([[-torch.inf, 0, -torch.inf]] * 2)
    assert sample(certain, 1.0, smallest_and_largest).tolist() == [1, 1]

    damaged = torch.tensor([[0.0, math.nan, 0], [math.nan] * 3, [0, 0, math.inf]])
    for token in sample(damaged, 1.0, torch.rand(3, 1)).tolist():
        assert 0 <= token < 3


# -- rewards.py: the verifier

THIN, NARROW, NO_BREAK, MINUS = "\u2009", "\u202f", "\u00a0", "\u2212"
GOLD_18 = Problem("How many?", "18")
NUMBERS = {  # the number: texts that are it
    18: ["18", " 18 ", "$18", "18$", "$ 18", "18.", "18.00", "0018", "+18", "**18**", "*18*", "__18__", "18%",
         "**$18**", "\\boxed{18}", "$\\boxed{18}$", "\\boxed{\\boxed{18}}", "\\(18\\)", "$$18$$", "18\\%",
         "€18", "18 dollars.", "18 apples per day", "**18.**", f"{NO_BREAK}18{NO_BREAK}", "36/2", "36 / 2",
         "`18`", '"18"', "\\[18\\]", "\\[\\boxed{18}\\]", "$18 \\text{ apples}$", "₹18", "18 km/h"],
    -18: ["-18", MINUS + "18", "-$18", "$-18", "-36/2"],
    1.5: ["15e-1"],
    0.5: [".5"],
    0: ["-0"],
    1000: ["1,000", f"1{THIN}000", f"1{THIN}000 dollars", "1e3"],
    10**6: [f"1{NARROW}000{NARROW}000"],
    1234567.5: ["1,234,567.50"],
    10**99: ["1e99"],
    int("9" * 200): ["9" * 200],
}
NO_NUMBER = [
    "", ".", "-", "$", ",", "/", "e3", "\\boxed{}", "18 19", "18, 19", "18,19", "9+9", "10-2", "2**3", "1,00",
    "1000,000", "0,018", f"1,000{THIN}000", "1 000", "--18", "- 18", "1/0", "1/2/3", "1.5/2", "36/-2",
    "1 1/2", "½", "１８", "٣", "18²", "1e999999", "0x12", "1_000", "inf", "nan", "eighteen",
    "18 apples per day here", "18km", "18 thousand", "18 or nineteen", "18 M", "18 grand", "about 18",
    "18:00", "[18]", "18\x00", "\ud80018",
    "\\frac{36}{2}", "\\boxed{18", "18\n19", "9" * 201, "–18", "3 fourths", "18 is wrong", "18 doubled",
    "18 tens", "18 ninths", "18 maybe", "1\\text{8}", "18 / x"]


def test_what_is_one_number_and_what_is_none():
    """Marks, units, groups of thousands and quotients of whole numbers are read; a list or a sum is not."""
    for value, texts in NUMBERS.items():
        for text in texts:
            assert number(text) == value, text

    for text in NO_NUMBER:
        assert number(text) is None, text


TAGGED = [  # (completion, reason, lenient)
    ("<answer>18</answer>", "right", True),
    ("<answer>18</answer>, not 19", "right", True),
    ("<think><answer>17</answer></think>\n<answer> **18** </answer><|im_end|>", "right", True),
    ("<answer>18.1</answer>", "wrong", False),
    ("<answer>17 18</answer>", "not_a_number", True),
    ("18", "no_answer", True),
    ("<answer></answer>", "no_answer", False),
    ("<Answer>18</Answer>", "no_answer", True),
    ("<answer>18</answer></think>", "no_answer", True),
    ("<answer>18", "unclosed", True),
    ("<answer>18", "truncated", True),
    ("</answer>18<answer>", "unclosed", True),
    ("<answer>18</answer><answer>18</answer>", "several", True),
    ("<answer><answer>18</answer></answer>", "several", True),
    ("<answer>" + " " * 200 + "18</answer>", "right", True),
    ("<answer>" + "0" * 200 + "18</answer>", "too_long", False),
    ("<answer>-$18</answer>", "wrong", False),
    ("It is -$18.", "no_answer", False),
    ("#### Step 1: 3 * 6\n#### Step 2\nIt is 18", "no_answer", True),
    ("#### 18\n\nQuestion: What is 4 + 4?", "no_answer", True),
    ("\\boxed{18\\text{ apples}}", "no_answer", True),
    ("\\boxed{3} \\boxed{18} 4", "no_answer", True),
    ("\\boxed{18", "no_answer", False),
    ("3 + 15 = 18.\nThat is it.", "no_answer", True),
]
PLAIN = [  # (completion, truncated, reason)
    ("18", False, "right"),
    (" 18\n", False, "right"),
    ("18\nQuestion: 2 + 2 =", True, "right"),
    ("18</s>", False, "right"),
    ("18 <|im_end|> ", False, "right"),
    ("$18.", False, "right"),
    ("18", True, "truncated"),
    ("", False, "no_answer"),
    ("\n18", False, "no_answer"),
    ("18 apples", False, "not_a_number"),
    ("18 19", False, "not_a_number"),
    ("<answer>18</answer>", False, "not_a_number"),
    ("17", False, "wrong"),
    ("9" * 999, False, "too_long"),
]


def test_an_answer_stands_between_tags_or_on_the_first_line():
    """The reason of each verdict; only "right" earns a reward; an unknown format is named."""
    for completion, reason, lenient in TAGGED:
        verdict = verify(completion, GOLD_18, truncated=reason == "truncated")
        assert (verdict.reason, verdict.lenient) == (reason, lenient), completion
        assert verdict.reward == float(reason == "right")

    for completion, truncated, reason in PLAIN:
        verdict = verify(completion, GOLD_18, "plain", truncated)
        assert verdict.reason == reason, completion
        assert verdict.reward == float(reason == "right")

    with pytest.raises(ValueError, match="tagged or plain"):
        verify("18", GOLD_18, "json")


def test_a_dataset_of_ones_own_as_registry_shows_it(monkeypatch):
    """The lines in the docstring of `rewards.registry`, word for word."""
    import reasoning_gym
    monkeypatch.setattr(reasoning_gym.factory, "DATASETS", dict(reasoning_gym.factory.DATASETS))
    code = rewards.registry.__doc__.partition("learns it:\n")[2].partition("    The program asks")[0]
    exec(textwrap.dedent(code), {})

    problems = get_problems("doubles", "test", 20, level="easy")
    assert problems[0].dataset == "doubles"
    for problem in problems:
        i = int(re.search("[0-9]+", problem.question)[0])
        assert verify(f"{2 * i}\n", problem, "plain").reward == 1.0


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(rewards).failed == 0


@pytest.mark.parametrize("opening, closing", rewards.THOUGHT_TAGS)
def test_an_answer_inside_a_thought_does_not_count(opening, closing):
    """Not even if the thought is never closed; the tag that opens it may stand in the prompt."""
    answer = "<answer>18</answer>"
    for completion, truncated, reason in [
            (f"{opening}Maybe 17?{closing}{answer}", False, "right"),
            (f"{opening}{answer}{closing}{answer}", False, "right"),
            (f"Maybe <answer>17</answer>?{closing}\n{answer}", False, "right"),
            (f"{answer}{opening}It is.", False, "right"),
            (f"{opening}\nMaybe {answer}, but", True, "truncated"),
            (f"{opening}\nMaybe {answer}, but", False, "no_answer"),
            (f"{opening}A{closing} {opening}Maybe {answer}", False, "no_answer"),
            (f"{answer}{closing}", False, "no_answer"),
            (f"{answer} {opening}Or{answer}", False, "several")]:
        assert verify(completion, GOLD_18, truncated=truncated).reason == reason, completion


SLOW_TO_MAKE = {"futoshiki", "zebra_puzzles", "rearc", "arc_agi", "acre"}


@pytest.fixture(scope="module")
def problems_of_every_dataset():
    """{dataset: three problems} of all datasets that can be trained on, but for the slow ones."""
    names = set(rewards.registry()) - set(rewards.REFUSED) - SLOW_TO_MAKE
    return {name: get_problems(name, "train", 3) for name in sorted(names)}


def test_gold_is_right_and_hostile_answers_are_not(problems_of_every_dataset, tmp_path):
    """For every dataset: nothing is executed, nothing raises, and a megabyte of anything earns nothing."""
    canary = tmp_path / "canary"
    code = f"__import__('os').system('touch {canary}')"
    hostile = [code, f"[{code}]", f"open('{canary}','w')", "9**9**9**9", "1e999999999", "-1", "9" * 5000,
               "9" * 64, "(" * 2000, "[" * 60, '{"a":' * 5000, "nan", "[NaN]", "inf", "\x00", "\ud800",
               "None", "[]", "{}", "[[1]]", '{"a": 1}', '["fill Z"]', "aa is a aa, " * 9, "A=1, " * 9,
               "R999999999", "hello world", "a" * 60, "Move disk 99 from Peg 99 to Peg 98",
               "not " * 2000 + "P", "(P ∨ Q)"]

    for name, problems in problems_of_every_dataset.items():
        for problem in problems:
            gold = problem.answer
            for text in (gold, f" {gold} ", f"\n{gold}\n"):
                assert verify(f"<answer>{text}</answer>", problem).reward == 1, name

            for text in hostile:
                verdict = verify(f"<answer>{text}</answer>", problem)
                assert verdict.reason in rewards.REASONS, (name, text)
                if verdict.reward == 1:  # "-1" may be the answer
                    assert number(text) is not None and number(text) == number(gold), (name, text)
    assert not canary.exists()
    assert set(rewards.REFUSED) < set(rewards.registry())

    for unit in ("9", "<answer>", "</answer>", "(", "\\boxed{", "####", "</think>", "[THINK]", "\n", "1,",
                 "0.", " "):
        text = unit * (10**6 // len(unit))
        assert verify(text, GOLD_18, "plain").reward == 0
        assert verify(text, GOLD_18, "tagged").reward == 0
        assert verify(f"<answer>{text}</answer>", GOLD_18, "tagged").reward == 0


REWARDED = [  # (dataset, gold, another way to write it)
    ("knights_knaves", "Ann is a pioneer, and Bo is a laggard.", "Ann is a pioneer, and Bo is a laggard"),
    ("knights_knaves", "Ann is an egoist, and Bo is an altruist.", "Ann is a egoist and Bo is a altruist"),
    ("fraction_simplification", "$244/607$", "244/607"),
    ("fraction_simplification", "$\\dfrac{242}{311}$", "242/311"),
    ("fraction_simplification", "138/583", "$\\frac{138}{583}$"),
    ("chain_sum", "1156", "+1,156.00"),
    ("family_relationships", "aunt", "Aunt"),
    ("family_relationships", "aunt", "**Aunt.**"),
    ("family_relationships", "aunt", "\\text{aunt}"),
    ("number_sorting", "['1', '3.0']", "[1, 3]"),
    ("complex_arithmetic", "-1.0 + 2.0i", MINUS + "1+2i"),
    ("gsm_symbolic", "18", "$18"),
    ("game_of_life", "[[0,1]]", "[[0, 1]]"),
    ("game_of_life", "[[0,1],[1,0]]", "[[0, 1],\n [1, 0]]"),
    ("arc_agi", "1 2\n3 4", "\n 1  2 \r\n3 4\n"),
    ("pool_matrix", "4.5 4.0\n1.0 2.5", "4.50 4\n1 2.5"),
    ("mini_sudoku", "1 2\n\n3 4", "1 2\n3 4"),
    ("manipulate_matrix", "1 2 3", " 1 2 3"),
]
NOT_REWARDED = [  # the same, but an answer that the dataset's own scorer would reward, or run
    ("time_intervals", "03:22:03", "03:22:00"),
    ("word_sorting", "a, b", "a, b, c"),
    ("game_of_life_halting", "True", "False"),
    ("number_sorting", "[1, 3]", "[2, 2]"),
    ("gsm_symbolic", "18", "18 19"),
    ("chain_sum", "156", "1,5,6"),
    ("complex_arithmetic", "1.0", "nan"),
    ("basic_arithmetic", "2", "8 / 4"),
    ("base_conversion", "100", "1e2"),
    ("base_conversion", "12", "12 ab"),
    ("game_of_life", "[.]", "[]"),
    ("string_manipulation", "ab", "ab.."),
    ("fraction_simplification", "1/2", "2/4"),
    ("quantum_lock", "A → B", "A quick cab"),
    ("knights_knaves", "Zoey is a hero, and Al is a knave.", "Zoey is a dog, Zoey is a hero, Al is a knave"),
]


def test_which_answers_are_rewarded():
    for dataset, gold, answer in REWARDED:
        assert verify(f"<answer>{answer}</answer>", Problem("q", gold, dataset, dataset)).reward == 1, answer

    for dataset, gold, answer in NOT_REWARDED:
        assert verify(f"<answer>{answer}</answer>", Problem("q", gold, dataset, dataset)).reward == 0, answer


@pytest.mark.parametrize("dataset", rewards.GRIDS + ("a_registered_dataset",))
def test_a_grid_of_another_shape_is_wrong(dataset):
    """The same numbers in other rows are another answer. A registered dataset is treated in the same way."""
    grid = Problem("q", "1 2\n3 4\n5 6", dataset, dataset)
    assert verify("<answer>1 2\n3 4\n5 6</answer>", grid).reward == 1
    for answer in ("1 2 3 4 5 6", "1 2 3\n4 5 6", "1 2\n3 4 5 6", "1\n2\n3\n4\n5\n6"):
        assert verify(f"<answer>{answer}</answer>", grid).reason == "wrong", answer

    if dataset in rewards.GRIDS:
        row = Problem("q", "1 2 3", dataset, dataset)
        assert verify("<answer>1\n2\n3</answer>", row).reason == "wrong"


def test_all_datasets_with_answers_of_several_lines_are_known(problems_of_every_dataset):
    found = set()
    for name, problems in problems_of_every_dataset.items():
        if any("\n" in problem.answer for problem in problems):
            found.add(name)
    assert found == set(rewards.GRIDS) - SLOW_TO_MAKE


def test_a_format_in_which_the_gold_answer_is_wrong_is_refused():
    grids = get_problems("mini_sudoku", "train", 2)
    check_answer_format(grids, "tagged")
    with pytest.raises(ValueError, match="mini_sudoku .* --answer_format tagged"):
        check_answer_format(grids, "plain")

    # Some answers of this dataset have a single line. A mix is refused if one of its datasets is.
    mix = get_problems("chain_sum+manipulate_matrix", "train", 20)
    with pytest.raises(ValueError, match="manipulate_matrix"):
        check_answer_format(mix, "plain")

    # The advice never names the format that is set already.
    with pytest.raises(ValueError, match="choose another --task") as refusal:
        check_answer_format([Problem("q", "<answer>", "own", "own")], "tagged")
    assert "use --answer_format" not in str(refusal.value)

    mix = [GOLD_18] + get_problems("arithmetic+logic+algorithmic", "val", 60)
    check_answer_format(mix, "tagged")
    check_answer_format(mix, "plain")


# -- rewards.py: prompts

def chat_tokenizer(template):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


ROLES = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"


def test_prompts():
    tokenizer = chat_tokenizer(ROLES)
    assert render_prompt(Problem("2 + 3 =", "5")) == "2 + 3 ="
    assert render_prompt(Problem(" Who? ", "I")) == "Who?\nAnswer:"
    assert render_prompt(GOLD_18) == render_prompt(GOLD_18, "plain", tokenizer) == "How many?\nAnswer:"
    assert render_prompt(GOLD_18, "chat", tokenizer, instruct=False) == "<user>How many?"

    chat = render_prompt(GOLD_18, "chat", tokenizer)
    assert chat.endswith("<user>How many?" + INSTRUCTION)

    # The solved example shows an answer that is rewarded.
    example = chat.partition("<assistant>")[2].partition("<user>")[0]
    assert verify(example, Problem(EXAMPLE[0], "26")).reward == 1


@pytest.mark.parametrize("template", [
    "{%- set today = strftime_now('%d %B %Y') -%}\n\n  Today is {{ today }}." + ROLES,
    "\n\n{{ 'Date: ' + strftime_now(format='%A, %b %d, %Y, %H:%M') }}\n" + ROLES,
    "  {% if strftime_now is defined %}{% set t = strftime_now('%d %m %Y') %}{% endif %}\n{{ t }}" + ROLES,
    "{% macro head() %}[{{ strftime_now('%B %d, %Y') }}]{% endmacro %}{{ head() }}" + ROLES])
def test_a_chat_template_writes_the_same_date_on_any_day(template, monkeypatch):
    """Namely that of FIXED_DATE; all else is as transformers writes it, line breaks included."""
    tokenizer = chat_tokenizer(template)
    prompt = render_prompt(GOLD_18, "chat", tokenizer, instruct=False)

    class FixedClock:
        @staticmethod
        def now():
            return datetime.datetime(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", FixedClock)
    turns = [dict(role="user", content="How many?")]
    assert prompt == tokenizer.apply_chat_template(turns, tokenize=False)
    assert "26" in prompt and "2024" in prompt


def test_a_model_that_thinks_is_asked_to_answer_at_once():
    """Either its template can say so, or the thought that the template opens is closed."""
    qwen = ROLES + ("{% if enable_thinking is defined and enable_thinking is false %}"
                    "<think>\n\n</think>\n\n{% endif %}")
    assert render_prompt(GOLD_18, "chat", chat_tokenizer(qwen), False).endswith("<think>\n\n</think>\n\n")

    for opening, closing in rewards.THOUGHT_TAGS:
        always = ROLES + "{% if add_generation_prompt %}<assistant>" + opening + "\n{% endif %}"
        prompt = render_prompt(GOLD_18, "chat", chat_tokenizer(always), instruct=False)
        assert prompt == f"<user>How many?<assistant>{opening}\n\n{closing}\n\n"


@pytest.mark.parametrize("template", [
    "{{ raise_exception('Only one turn!\nNo more.') }}", "{{ messages[7].content + 1 }}", "{% for %}", None])
def test_a_chat_template_that_raises_is_one_sentence(template):
    with pytest.raises(ValueError, match="chat template of .* another model") as refusal:
        render_prompt(GOLD_18, "chat", chat_tokenizer(template))
    assert "\n" not in str(refusal.value)


# -- rewards.py: problems and splits

@pytest.mark.parametrize("task", ["chain_sum", "gcd", "aiw", "lcm", "arithmetic+algorithmic"])
def test_splits_share_no_question(task):
    """Whatever sizes are asked for; and the first 10 of 1,000 are the 10."""
    val = [problem.question for problem in get_problems(task, "val", 40)]
    test = [problem.question for problem in get_problems(task, "test", 40)]
    train = [problem.question for problem in get_problems(task, "train", 1000)]

    assert train[:10] == [problem.question for problem in get_problems(task, "train", 10)]
    assert not set(val) & set(test)
    assert not set(val + test) & set(train)
    assert len(set(val)) == len(set(test)) == 40
    assert {split_of(question) for question in val} == {"val"}
    assert {split_of(question) for question in test} == {"test"}


def test_a_small_space_says_how_many_there_are():
    level = "min_terms=2,max_terms=2,min_digits=1,max_digits=1,allow_negation=false"
    all_of_them = get_problems("chain_sum", "val", 10**6, level=level, least=1)
    n = len(all_of_them)
    assert n < 100
    assert get_problems("chain_sum", "val", n, level=level) == all_of_them
    with pytest.raises(ValueError, match=f"only {n} distinct"):
        get_problems("chain_sum", "val", n + 1, level=level)

    # Training goes on with the same questions in another order.
    train = [problem.question for problem in get_problems("chain_sum", "train", 400, level=level)]
    n = len(set(train))
    assert n < 200 and len(set(train[:n])) == n
    assert set(train[n:2 * n]) == set(train[:n]) and train[n:2 * n] != train[:n]


def test_a_mix_takes_turns():
    mix = get_problems("arithmetic+logic+algorithmic", "train", 9, level="tiny")
    assert [problem.task for problem in mix] == ["arithmetic", "logic", "algorithmic"] * 3

    # chain_sum is a part of arithmetic too, but no question comes twice.
    overlapping = get_problems("chain_sum+arithmetic", "val", 60)
    assert len({problem.question for problem in overlapping}) == 60


def test_the_next_problem_of_a_dataset():
    problems = [Problem("q", "1", name, name) for name in "abaacb"]
    assert next_in_dataset(problems) == [2, 5, 3, 0, 4, 1]


def test_items_do_not_depend_on_the_hash_seed():
    tasks = ("chain_sum", "family_relationships", "base_conversion")
    here = []
    for task in tasks:
        here += [problem.question for problem in get_problems(task, "train", 5)]

    code = ("from rewards import get_problems; "
            f"print([p.question for task in {tasks} for p in get_problems(task, 'train', 5)])")
    other_seed = "1"
    if os.environ.get("PYTHONHASHSEED") == "1":
        other_seed = "2"
    elsewhere = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(PYTHONHASHSEED=other_seed),
                               stdout=subprocess.PIPE, text=True, cwd=Path(rewards.__file__).parent)
    assert elsewhere.stdout.strip() == str(here)


def test_a_task_is_known_by_its_name():
    assert known_task("gsm8k") == "gsm8k"
    assert known_task("arithmetic") == "arithmetic"
    assert known_task("chain_sum") == "chain_sum"


# -- rewards.py: GSM8K and the cache

def write_gsm8k(path, name, n, encoding="utf-8"):
    lines = [json.dumps(dict(question=f"{name} {i}?", answer=f"so\n#### {i + 1},000")) for i in range(n)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def test_gsm8k_files(tmp_path):
    write_gsm8k(tmp_path / "train.jsonl", "train", 20)
    write_gsm8k(tmp_path / "test.jsonl", "test", 6)
    train = [problem.question for problem in get_problems("gsm8k", "train", 40, tmp_path)]
    val = [problem.question for problem in get_problems("gsm8k", "val", 5, tmp_path)]
    test = get_problems("gsm8k", "test", 6, tmp_path)

    assert train[:15] == [f"train {i}?" for i in range(15)]
    assert sorted(train[15:30]) == sorted(train[:15])
    assert not set(val) & set(train)
    assert test[2].answer == "3000"
    assert verify("<answer>$3,000.00</answer>", test[2]).reward == 1
    assert get_problems("gsm8k", "test", 6, tmp_path / "test.jsonl") == test

    # A split that is smaller than asked for gives what it has.
    assert len(get_problems("gsm8k", "test", 100, tmp_path, least=1)) == 6
    with pytest.raises(ValueError, match="only 6 distinct test questions.*larger file as --data"):
        get_problems("gsm8k", "test", 100, tmp_path)

    # A mix may have a level, which is that of its other part.
    mix = get_problems("gsm8k+chain_sum", "train", 4, tmp_path, level="easy")
    assert [problem.dataset for problem in mix] == ["gsm8k", "chain_sum"] * 2


def test_one_file_of_ones_own(tmp_path, monkeypatch):
    """Its questions are divided like those of Reasoning Gym. A byte-order mark is left out, ~ is the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_gsm8k(tmp_path / "mine.jsonl", "mine", 40, encoding="utf-8-sig")
    questions = []
    for split in rewards.SPLITS:
        problems = get_problems("gsm8k", split, 40, "~/mine.jsonl", least=1)
        assert {split_of(problem.question) for problem in problems} == {split}
        questions += {problem.question for problem in problems}
    assert sorted(questions) == sorted(f"mine {i}?" for i in range(40))


def test_a_question_in_two_files_is_tested_and_not_trained_on(tmp_path):
    """Also where it is written with other spaces or capitals. val.jsonl, if it is there, is the val split."""
    def write(name, *questions):
        lines = [json.dumps(dict(question=question, answer="#### 5")) for question in questions]
        (tmp_path / name).write_text("\n".join(lines))

    write("train.jsonl", "One?", "two  words?", "Three?", "Four?", "THREE?", "Five?")
    write("val.jsonl", "four?", "Six?", "Two words?")
    write("test.jsonl", "Two words?", "Seven?")
    splits = {split: [question for question, _ in rows] for split, rows in rewards.gsm8k(tmp_path).items()}
    assert splits == dict(train=["One?", "Three?", "Five?"], val=["four?", "Six?"],
                          test=["Two words?", "Seven?"])


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("N_MUSKETEERS_CACHE", "~/x")
    assert cache_dir() == Path("/home/somebody/x")

    monkeypatch.delenv("N_MUSKETEERS_CACHE")
    assert cache_dir() == Path("/home/somebody/.cache/n-musketeers")

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ValueError, match="set N_MUSKETEERS_CACHE"):
        cache_dir()


# -- experts.py

WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 40] for j in range(3 + 5 * i % 11)) for i in range(9)]
VOCABULARY = ["[PAD]", "[EOS]", "[CLS]", "[SEP]", *WORDS, "\n", "[UNK]", "]", "]\n"]  # 48 words


def save_tokenizer(folder, before_and_after="$A"):
    """A tokenizer of words. before_and_after: the special tokens that it adds to a text $A."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        before_and_after, special_tokens=[("[EOS]", 1), ("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    tokenizer.save_pretrained(folder)


def make_expert(folder, kind="Llama", seed=0, **sizes):
    """A random model and its tokenizer, saved as an ordinary Hugging Face folder. Returns its path."""
    save_tokenizer(folder, "[CLS] $A [SEP]" if kind == "Bert" else "$A")
    random_model(kind, seed, **sizes).save_pretrained(folder)
    return str(folder)


def read_all(expert, texts=TEXTS):
    return read_states([expert], [texts], progress=False)


def write_all(expert, texts=TEXTS):
    return write_texts([expert], [texts], progress=False)[0]


def forbid_loading(monkeypatch):
    """From now on a model that is loaded fails the test."""
    def load(self, kind):
        pytest.fail("a cached text was read again")

    monkeypatch.setattr(Expert, "load", load)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPTNeoX", "Bert"])
def test_states_equal_transformers_on_the_text_alone(tmp_path, kind, own_cache):
    """Every layer and each way to read: what the model gives for one text, without any padding."""
    folder = make_expert(tmp_path / "m", kind)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = Expert(folder).tokenizer

    H = {}
    for states in ("last:3", "first", "mean"):
        H[states] = read_all(Expert(folder, states, layers=range(4)))

    for i in (0, 5):
        with torch.no_grad():
            output = model(**tokenizer(TEXTS[i], return_tensors="pt"), output_hidden_states=True)
        hidden = torch.stack(output.hidden_states)[:, 0]  # (layers, T, width)

        # Layer by layer, and in each layer the last token first.
        last = hidden[:, [-1, -2, -3]].flatten(0, 1)
        torch.testing.assert_close(H["last:3"][i], last, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(H["first"][i], hidden[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(H["mean"][i], hidden.mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_state_is_that_of_its_text_to_the_bit(tmp_path, monkeypatch, kind):
    """However the cache was filled: in another order, with other texts, one by one, or partly before."""
    expert = Expert(make_expert(tmp_path / "m", kind))
    texts = TEXTS * 20 + [f"w1 {text}" for text in TEXTS]
    ways = dict(all=[texts], reverse=[texts[::-1]], alone=[[text] for text in TEXTS],
                partly=[TEXTS[2:5], texts])

    found = []
    for name, parts in ways.items():
        monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / name))
        for part in parts:
            read_all(expert, part)
        with monkeypatch.context() as patch:  # what was read once is never read again
            forbid_loading(patch)
            found.append(read_all(expert))

    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_all_batches_of_a_length_have_one_shape(tmp_path, own_cache, monkeypatch):
    """Products of other shapes round differently. So one text is read in a batch as large as that of many."""
    expert = Expert(make_expert(tmp_path / "m"))
    compute = Expert.states_of
    sizes = {16: set(), 64: set()}  # of batches, by length

    def recorded(self, model, ids, length, before_answer):
        sizes[length].add(len(ids))
        return compute(self, model, ids, length, before_answer)

    monkeypatch.setattr(Expert, "states_of", recorded)
    read_all(expert, ["w1 w2"])
    read_all(expert, [f"w{i} w{j}" for i in range(20) for j in range(15)])
    read_all(expert, ["w1 " * 60])
    assert sizes == {16: {128}, 64: {32}}


def test_an_own_answer_is_read_from_its_first_token_on(tmp_path, own_cache):
    """State k is the one from which the expert chose token k; a short answer repeats its last state."""
    folder = make_expert(tmp_path / "m")
    expert = Expert(folder, "answer:3", layers=(1, -1), max_new=3)
    answers = experts.written_ids(expert, TEXTS, progress=False)
    assert len({len(answer) for answer in answers}) > 1  # some end early
    writer = expert.load("texts")

    H = read_all(expert)
    for i, prompt_ids in enumerate(expert.tokenize(TEXTS)):
        ids = prompt_ids + answers[i]
        with torch.no_grad():
            hidden = writer.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        first, last = len(prompt_ids) - 1, len(ids) - 1
        places = [first, min(first + 1, last), min(first + 2, last)]
        expected = torch.cat((hidden[1][0, places], hidden[-1][0, places]))
        torch.testing.assert_close(H[i], expected, atol=1e-5, rtol=1e-5)

        # The last layer's states predict the answer.
        chosen = writer.lm_head(H[i, 3:]).argmax(-1).tolist()
        assert chosen[:len(answers[i])] == answers[i]


def test_an_expert_thinks_before_its_answer(tmp_path, own_cache):
    """prompt -> thought -> cue -> answer, all greedy; the states are those from which it chose the answer."""
    expert = Expert(make_expert(tmp_path / "m"), "answer:2", max_new=2, cue="w7 w8", think=5)
    prompts = [expert.prompt(Problem(text, "1")) for text in TEXTS]
    assert prompts[0] == TEXTS[0] + "\n" + experts.THINK + "\n"  # the cue comes later
    thoughts = experts.thought_ids(expert, prompts, progress=False)
    answers = experts.written_ids(expert, prompts, progress=False)
    H = read_all(expert, prompts)

    cue = expert.tokenizer("w7 w8", add_special_tokens=False)["input_ids"]
    writer = expert.load("texts")
    for i, prompt in enumerate(expert.tokenize(prompts)):
        # The thought, token by token, and the cue after it.
        thought = continued(writer, prompt, 5, ends=expert.stop_ids)
        assert thoughts[i] == thought + cue

        # The answer, which also ends at the end of a line.
        start = prompt + thoughts[i]
        assert answers[i] == continued(writer, start, 2, ends=[*expert.stop_ids, *experts.line_ends(
            expert.tokenizer)])

        # The states.
        ids = torch.tensor([start + answers[i]])
        with torch.no_grad():
            hidden = writer.model(ids).last_hidden_state[0]
        second = min(len(start), len(ids[0]) - 1)
        expected = hidden[[len(start) - 1, second]]
        torch.testing.assert_close(H[i], expected, atol=1e-5, rtol=1e-5)


def continued(writer, ids, max_new, ends):
    """Greedy tokens after `ids`, one forward pass for each."""
    written = []
    while len(written) < max_new:
        with torch.no_grad():
            token = int(writer(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written


def test_thoughts_are_kept_when_the_cue_changes(tmp_path, own_cache, monkeypatch):
    """A thought is written before the cue, so it is the same for every cue. Its answers are not."""
    folder = make_expert(tmp_path / "m")
    one = Expert(folder, max_new=2, cue="w7", think=5)
    two = Expert(folder, max_new=2, cue="w9", think=5)
    longer = Expert(folder, max_new=2, cue="w7", think=6)
    assert one.fingerprint("thoughts") == two.fingerprint("thoughts") != longer.fingerprint("thoughts")
    others = (one, two, longer, Expert(folder, max_new=2))
    for kind in ("texts", "states"):
        assert len({expert.fingerprint(kind) for expert in others}) == 4

    experts.thought_ids(one, TEXTS, progress=False)
    forbid_loading(monkeypatch)
    experts.thought_ids(two, TEXTS, progress=False)


def test_a_window_that_is_too_short_is_found_before_an_expert_reads(quick, tmp_path, monkeypatch):
    """The last expert has room for six tokens; the others, which have more, are not asked in vain."""
    args, policy, pool, _, dataset = built(tmp_path, *quick)
    short = make_expert(tmp_path / "short", max_position_embeddings=8)
    monkeypatch.setattr(experts, "compute_rows", None)
    with pytest.raises(ValueError, match="for short, which has room for 1 to 6: use shorter problems"):
        rlvr.ask_experts(dataset.problems, policy, [*pool, Expert(short, max_new=2)], args)


def test_a_thought_needs_room_in_the_window(tmp_path, own_cache):
    expert = Expert(make_expert(tmp_path / "m", max_position_embeddings=64), max_new=2, cue="w7 w8", think=30)
    fits = " ".join(["w1"] * 30)  # 30 + 30 + 2 + 2 = 64
    assert len(experts.written_ids(expert, [fits], progress=False)) == 1
    with pytest.raises(ValueError, match="31 tokens .* room for 1 to 30: .* a lower --write or --think"):
        experts.written_ids(expert, [fits + " w1"], progress=False)

    # Its thought is in the cache now. A longer answer behind it is refused all the same.
    more = Expert(expert.source, max_new=20, cue="w7 w8", think=30)
    with pytest.raises(ValueError, match="room for 1 to 44"):
        experts.written_ids(more, [fits], progress=False)


def test_a_batch_that_thinks_has_more_rows(tmp_path):
    """20480 tokens, thoughts included; the longest text comes first, and the last batch is not filled up."""
    expert = Expert(make_expert(tmp_path / "m", max_position_embeddings=256), think=48, cue="w7")
    ids = [[5] * 16] * 200 + [[5] * 80]
    sizes = []
    for indices, length, size in experts.batches(expert, "thoughts", ids):
        sizes.append((len(indices), length, size))
    assert sizes == [(1, 128, 16), (182, 64, 182), (18, 64, 32)]


def test_a_narrower_expert_is_padded_with_zeros(tmp_path, own_cache):
    a = Expert(make_expert(tmp_path / "a"))
    b = Expert(make_expert(tmp_path / "b", "Bert", hidden_size=24))
    H = read_states([a, b], [TEXTS, TEXTS[::-1]], progress=False)
    assert torch.equal(H[:, :1], F.pad(read_all(a), (0, 8)))
    assert torch.equal(H[:, 1:], read_all(b, TEXTS[::-1]))


def test_the_fingerprint_changes_with_everything_that_decides_a_row(tmp_path):
    """With another setting, weight, tokenizer or chat template a row has another place in the cache."""
    folder = make_expert(tmp_path / "m")
    template = Path(folder, "chat_template.jinja")
    template.write_text("{{ messages[0]['content'] }}")

    settings = [dict(), dict(states="first"), dict(layers=(1,)), dict(states="last:2"), dict(cue="w1"),
                dict(untrained=True), dict(states="answer:2"), dict(states="answer:2", max_new=3)]
    prints = [Expert(folder, **setting).fingerprint("states") for setting in settings]
    assert prints[0] == Expert(folder, layers=(3,)).fingerprint("states")  # 3 is the last layer, as -1 is
    prints.append(Expert(folder).fingerprint("texts"))
    prints.append(Expert(folder, max_new=3).fingerprint("texts"))

    edit_weights(folder, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + torch.eye(16)[0]})
    prints.append(Expert(folder).fingerprint("states"))
    template.write_text("another")
    prints.append(Expert(folder).fingerprint("states"))
    template.unlink()
    prints.append(Expert(folder).fingerprint("states"))
    assert len(set(prints)) == len(prints) == 13


def text_alone(expert, text, max_new):
    """What transformers' generate gives for one text without padding, as `write_texts` shows it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(expert.folder).eval()
    ends = [VOCABULARY.index("[EOS]"), VOCABULARY.index("\n"), VOCABULARY.index("]\n")]
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=max_new,
                                                            pad_token_id=0, eos_token_id=ends)
    ids = expert.tokenizer(text, return_tensors="pt")["input_ids"]
    row = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
    if row[-1] == 1:
        row.pop()
    return " ".join(expert.tokenizer.decode(row, skip_special_tokens=True).split())


def test_texts_are_what_generate_gives_for_the_text_alone(tmp_path, own_cache, monkeypatch):
    """Greedy, until a stop token or a line end, whatever penalties the model's folder asks for."""
    folder = make_expert(tmp_path / "m", seed=3)
    expert = Expert(folder, max_new=12)
    encoder = Expert(make_expert(tmp_path / "bert", "Bert"))
    texts = [" ".join([f"w{i} w{i + 1}"] * (1 + i % 3)) for i in range(0, 30, 2)]
    expected = [text_alone(expert, text, 12) for text in texts]

    edit(folder, "generation_config.json", repetition_penalty=5.0)
    wrote, nothing = write_texts([expert, encoder], [texts, texts], progress=False)
    assert wrote == expected
    assert len({len(text.split()) for text in wrote}) > 2
    assert encoder.writes is False and nothing == [""] * len(texts)

    forbid_loading(monkeypatch)
    assert write_all(expert, texts[::-1]) == wrote[::-1]


def test_a_token_that_holds_text_and_a_line_end_belongs_to_the_answer(tmp_path, own_cache, monkeypatch):
    """Of "w1 ]\\n" the cache keeps both tokens, of "w1 \\n" only the first; the stop token is never kept."""
    expert = Expert(make_expert(tmp_path / "m"), max_new=3)
    answers = [["w1", "]\n", "w2"], ["w1", "\n", "w2"], ["w1", "[EOS]", "]\n"], ["\n", "w1", "w2"],
               ["w1", "w2", "w3"]]
    kept = [["w1", "]\n"], ["w1"], ["w1"], [], ["w1", "w2", "w3"]]
    new_ids = torch.tensor([[VOCABULARY.index(word) for word in answer] for answer in answers])

    def generate(input_ids, **settings):  # a model that gives these answers to the first five prompts
        answer_of_row = new_ids[torch.arange(len(input_ids)) % 5]
        return torch.cat((input_ids, answer_of_row), dim=1)

    monkeypatch.setattr(Expert, "load", lambda self, kind: types.SimpleNamespace(generate=generate))
    monkeypatch.setattr(Expert, "reads_padding", lambda self, model: False)
    ids = experts.written_ids(expert, WORDS[:5], progress=False)
    assert [[VOCABULARY[i] for i in row] for row in ids] == kept
    assert write_all(expert, WORDS[:5]) == ["w1 ]", "w1", "w1", "", "w1 w2 w3"]


@pytest.mark.parametrize("kind, ignores_mask", [("Mamba", False), ("Rwkv", True)])
def test_a_model_that_ignores_the_mask_writes_texts_one_by_one(tmp_path, monkeypatch, kind, ignores_mask):
    """RWKV reads padding on the left, Mamba does not. The texts are those of each text alone."""
    expert = Expert(make_expert(tmp_path / "m", kind), max_new=6)
    assert expert.reads_padding(expert.load("texts")) == ignores_mask
    expected = [text_alone(expert, text, 6) for text in TEXTS]
    assert len(set(expected)) > 3

    for name, parts in dict(all=[TEXTS], alone=[[text] for text in TEXTS[:3]]).items():
        monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / name))
        for part in parts:
            write_all(expert, part)
        assert write_all(expert) == expected


def test_stop_tokens_are_taken_off_the_end_of_a_plain_prompt(tmp_path):
    """After [EOS] a causal model has nothing more to say. An encoder keeps its [SEP]."""
    folder = make_expert(tmp_path / "m")
    alone = Expert(folder).tokenize(TEXTS)
    save_tokenizer(folder, "$A [EOS]")
    expert = Expert(folder)
    assert expert.tokenizer(TEXTS[0])["input_ids"] == alone[0] + [1]
    assert expert.tokenize(TEXTS) == alone
    with pytest.raises(ValueError, match="0 tokens"):
        expert.tokenize([""])

    # A chat template decides itself how a prompt ends.
    w1, w2 = VOCABULARY.index("w1"), VOCABULARY.index("w2")
    assert experts.prompt_ids(expert.tokenizer, ["w1 w2"], "chat", [1, w2]) == [[w1, w2]]
    assert experts.prompt_ids(expert.tokenizer, ["w1 w2"], "plain", [1, w2]) == [[w1]]

    encoder = Expert(make_expert(tmp_path / "bert", "Bert", eos_token_id=3))
    assert encoder.tokenize(["w1"]) == [[2, w1, 3]]


def test_states_have_the_width_of_the_models_output(tmp_path, own_cache):
    """OPT-350m's last layer is narrower than its blocks: its inner layers are refused in one sentence."""
    folder = make_expert(tmp_path / "m", "OPT", word_embed_proj_dim=8)
    assert read_all(Expert(folder)).shape == (9, 1, 8)
    with pytest.raises(ValueError, match="layer 1 of m gives .* --layers -1"):
        read_all(Expert(folder, layers=(1,)))


def test_a_vision_language_model_reads_and_does_not_write(tmp_path, own_cache):
    """AutoModelForCausalLM cannot load it, although its architecture generates text."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=32, patch_size=8)
    config = transformers.SmolVLMConfig(text_config=dict(model_type="llama", pad_token_id=0, **SIZES),
                                        vision_config=vision, image_token_id=3)
    save_tokenizer(tmp_path / "m")
    transformers.SmolVLMForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    expert = Expert(str(tmp_path / "m"), "answer:2")
    assert expert.writes is False and expert.reads_own_answer is False
    assert read_all(expert).shape == (9, 2, 16)  # those of "last:2"
    assert write_all(expert) == [""] * 9


def test_a_model_is_found_from_any_folder(tmp_path, monkeypatch):
    """The embedded experts by their name in the repository, others by their absolute path; ~ is the home."""
    (tmp_path / "elsewhere").mkdir()
    folder = make_expert(tmp_path / "home" / "m")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")

    repository = Path(experts.__file__).parent
    assert experts.find_model("tiny/logic") == (repository / "tiny" / "logic", None)
    assert experts.portable("tiny/logic") == experts.portable(str(repository / "tiny/logic")) == "tiny/logic"
    assert Expert("tiny/logic").pinned == "tiny/logic" and Expert("tiny/logic").name == "logic"
    assert experts.portable("~/m") == experts.portable("../home/m") == folder
    with pytest.raises(ValueError, match="no folder and cannot be fetched"):
        experts.find_model("tiny/nothing")


def test_a_copy_has_the_same_weights_fingerprint(tmp_path):
    folder = make_expert(tmp_path / "m")
    first = experts.weights_fingerprint(folder)
    copy_of_it = shutil.copytree(folder, tmp_path / "copy")
    assert experts.weights_fingerprint(copy_of_it) == first
    edit_weights(copy_of_it, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 1})
    assert experts.weights_fingerprint(copy_of_it) != first
    shutil.copytree(folder, copy_of_it, dirs_exist_ok=True)
    edit(copy_of_it, "tokenizer_config.json", extra=1)
    assert experts.weights_fingerprint(copy_of_it) != first


def test_models_of_the_hub(tmp_path, monkeypatch):
    """A hub name is stored with its commit; what is to be downloaded is known before; nothing is, offline."""
    assert experts.to_fetch(["org/name", "tiny/logic"]) == []

    commit = tmp_path / ("c" * 40)
    make_expert(commit)

    def snapshot_download(repo, revision, dry_run, **patterns):
        assert (repo, revision) == ("org/name", "main")
        if not dry_run:
            return str(commit)
        return [types.SimpleNamespace(file_size=7, will_download=True),
                types.SimpleNamespace(file_size=100, will_download=False)]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert experts.to_fetch(["org/name@main", "tiny/logic", "org/name@main"]) == [("org/name", 7)]
    assert experts.portable("org/name@main") == f"org/name@{commit.name}"
    expert = Expert("org/name@main")
    assert (expert.name, expert.revision, expert.pinned) == ("name", commit.name, f"org/name@{commit.name}")

    # A large file of the hub is a link to a file that is named by its sha256.
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (commit / "linked").symlink_to(blob)
    assert experts.file_digest(commit / "linked") == blob.name
    assert experts.file_digest(commit / "config.json") != blob.name


def test_the_hubs_progress_bars_stay_on():
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_which_device_is_picked(monkeypatch):
    """A small model is faster on a Mac's CPU. Processes are mentioned only if torchrun has started some."""
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    assert experts.pick_device("auto") == experts.pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="there is no cuda here: use --device cpu$"):
        experts.pick_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="there is no cuda:1 here.* than there are GPUs"):
        experts.pick_device("cuda")
    assert experts.pick_device("auto") == "cpu"

    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert experts.pick_device("auto") == "mps"
    assert experts.pick_device("auto", small=True) == "cpu"
    assert experts.pick_device("mps", small=True) == "mps"  # as asked


# -- eval.py

def hand_made_report(**changes):
    """A report of two datasets and two experts."""
    report = dict(
        task="a+b", level="tiny", n=400, seed=0, router="attention", control="none", reading_steps=1,
        stage="GRPO", step=80,
        before=dict(strict=0.1, lenient=0.1, ci95=(0.07, 0.13)),
        after=dict(strict=0.9, lenient=0.9, ci95=(0.87, 0.93)),
        by_dataset={"sums": dict(n=200, before=0.0, after=0.8), "words": dict(n=200, before=0.2, after=1.0)},
        attention_by_dataset={"sums": {"one": 0.75, "two": 0.25}, "words": {"one": 0.5, "two": 0.5}},
        masked={"one": {"sums": 0.3, "words": 1.0}, "two": {"sums": 0.8, "words": 0.5}},
        right=[1, 0])
    return report | changes


def shown(capsys, report, path):
    """What `show_report` prints, as lines."""
    capsys.readouterr()
    evaluation.show_report(report, path)
    return capsys.readouterr().out.splitlines()


def test_wilson_by_hand():
    assert evaluation.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    assert evaluation.wilson(0, 5)[0] == 0
    assert evaluation.wilson(5, 5)[1] == 1


def test_a_right_answer_counts_whatever_its_reward_is():
    """An extension may give it 0.5 for its length, or a wrong answer -1: accuracy is about the reason."""
    verdicts = [rewards.Verdict(0.5, "right", True), rewards.Verdict(-1.0, "wrong", False),
                rewards.Verdict(0.5, "no_answer", True), rewards.Verdict(1.0, "right", True)]
    assert evaluation.right_of(verdicts).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert evaluation.accuracy(verdicts) == 0.5
    assert evaluation.summary(verdicts) == dict(strict=0.5, lenient=0.75, ci95=evaluation.wilson(2, 4))


def test_averages_by_dataset_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert evaluation.by_dataset(["a", "b", "a", "b"], values) == {"a": 2, "b": 4}

    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    means = evaluation.by_dataset(["a", "b", "a"], shares, ["one", "two"])
    assert means == {"a": {"one": 0.25, "two": 0.75}, "b": {"one": 1, "two": 0}}


def test_swap_counts_who_follows_the_states(finished, monkeypatch):
    """A policy that reads the states always gives the other question's answer; one that goes by the question
    never does."""
    policy, router, dataset, args = loaded(finished)
    place = {states.numpy().tobytes(): i for i, states in enumerate(dataset.H)}
    dataset.texts = [[str(i) for i in range(len(dataset))] for _ in dataset.texts]

    for reads_the_states, follows in ((True, 1.0), (False, 0.0)):
        def answers(policy, router, dataset, args, indices=None, H=None, visible=None):
            texts = []
            for i in indices:
                source = place[H[i].numpy().tobytes()] if reads_the_states else i
                texts.append(f" {source}")
            verdicts = [rewards.verify("x", dataset.problems[i], "plain") for i in indices]
            return verdicts, texts, torch.full((len(indices), 2, 8, 3), 1 / 3)

        monkeypatch.setattr(evaluation, "evaluate", answers)
        swap = evaluation.swap_test(policy, router, dataset, args)
        assert swap["follows"] == follows
        assert swap["strict"] == 0
        assert swap["n"] >= len(dataset) - 1

    # "1,000" is what an expert says that writes "1000", and a swap counts only where that is no right answer.
    dataset.texts = [["1000"] * len(dataset) for _ in dataset.texts]
    verdicts = [rewards.verify("x", problem, "plain") for problem in dataset.problems]
    attention = torch.full((len(dataset), 2, 8, 3), 1 / 3)
    monkeypatch.setattr(evaluation, "evaluate",
                        lambda *rest, **more: (verdicts, [" 1,000"] * len(dataset), attention))
    numbers = [replace(problem, answer="5") for problem in dataset.problems]
    dataset.problems[:] = numbers
    assert evaluation.swap_test(policy, router, dataset, args)["follows"] == 1
    dataset.problems[:] = [replace(problem, answer="1000.0") for problem in numbers]
    assert evaluation.swap_test(policy, router, dataset, args)["n"] == 0

    # A question that is alone in its dataset is left out: there is nothing to swap it with.
    assert evaluation.can_swap(dataset)
    dataset.problems[0] = replace(dataset.problems[0], dataset="alone")
    assert evaluation.swap_test(policy, router, dataset, args)["n"] < len(dataset)
    for i, problem in enumerate(dataset.problems):
        dataset.problems[i] = replace(problem, dataset=str(i))
    assert not evaluation.can_swap(dataset)


def test_before_and_masked_are_what_they_say(finished, monkeypatch):
    """Before: the frozen policy alone. Masked: the expert has no attention, the others share all of it."""
    policy, router, dataset, args = loaded(finished)
    frozen, pool, _ = rlvr.build(args)
    wake_lora(policy)
    evaluate, calls = evaluation.evaluate, []

    def recorded(*arguments):
        calls.append(evaluate(*arguments))
        return calls[-1]

    monkeypatch.setattr(evaluation, "evaluate", recorded)
    evaluation.test_report(policy, router, dataset, args, pool)
    before, after, *masked = calls
    assert before[1] == evaluate(frozen, NoRouter([], [], 0), dataset, args)[1]
    assert before[1] != after[1]
    assert before[2] is None
    assert len(masked) == len(pool)
    for e, (_, _, attention) in enumerate(masked):
        assert not attention[..., e].any()
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_evaluate_replaces_what_is_visible(finished):
    """For all problems (N,) or for each one (n, N). The result is that of a router without the expert."""
    policy, router, dataset, args = loaded(finished)
    others = dataset.expert_of_state != 1
    indices = [5, 2, 3]
    without_one = WithoutExpert(router, dataset.expert_of_state, 1)
    expected = evaluation.evaluate(policy, without_one, dataset, args, indices)

    for visible in (others, others.repeat(len(dataset), 1)):
        found = evaluation.evaluate(policy, router, dataset, args, indices, visible=visible)
        assert found[:2] == expected[:2]
        assert torch.equal(found[2], expected[2])

    # Each problem has its own row, also when they are answered in another order.
    alone = dataset.visible_alone[[i % 2 for i in range(len(dataset))]]
    _, _, attention = evaluation.evaluate(policy, router, dataset, args, indices, visible=alone)
    seen = [[bool(row[..., e].any()) for e in (0, 1)] for row in attention]
    assert seen == [[False, True], [True, False], [False, True]]


def test_eval_reports_the_run(finished, tmp_path, capsys):
    """Intervals hold the fractions; the JSON line agrees with the report that training ended with."""
    out = shutil.copytree(finished, tmp_path / "run")
    assert command(out, "--json", program=evaluation.run) == 0
    output = capsys.readouterr().out.splitlines()
    report = json.loads(output[-1])
    at_the_end = json.loads((out / "eval.json").read_text())

    assert {key: report[key] for key in at_the_end} == at_the_end
    assert (report["stage"], report["step"], report["router"]) == ("GRPO", 6, "attention")
    for when in ("before", "after"):
        low, high = report[when]["ci95"]
        assert 0 <= low <= report[when]["strict"] <= high <= 1
    assert 0 <= report["swap"]["follows"] <= 1
    assert any("after 6 steps of GRPO" in line for line in output)
    assert any(re.search(r"logic 0\.\d\d \([+-]\d+\)", line) for line in output)

    # The report and the picture are in the run's folder, and their names say what they show.
    assert json.loads((out / "eval-step6-n8.json").read_text()) == report
    assert (out / "eval-step6-n8.png").stat().st_size > 10_000


def test_a_report_overwrites_no_other(finished, tmp_path, capsys):
    """Neither one on more problems, nor one of other weights. Under 200 problems there is a warning."""
    out = shutil.copytree(finished, tmp_path / "run")
    assert command(out, program=evaluation.run) == 0
    on_eight = (out / "eval-step6-n8.json").read_bytes()
    capsys.readouterr()

    assert command(out, "--n", 5, program=evaluation.run) == 0
    assert "fewer than 200" in capsys.readouterr().out
    assert (out / "eval-step6-n8.json").read_bytes() == on_eight
    assert json.loads((out / "eval-step6-n5.json").read_text())["n"] == 5

    # The newest checkpoint is damaged, so that the one before it is tested, and the name says so.
    policy, router, _, _ = loaded(out)
    newest_checkpoint = rlvr.checkpoints(out)[0]
    progress = dict(stage0=True, step=4)
    rlvr.save_checkpoint(out / "step-000004-", policy, router, progress, None, torch.Generator())
    flip(newest_checkpoint, at=-1)
    with pytest.warns(UserWarning, match="the checkpoint before it is used"):
        report = evaluation.run([str(out), "--n", "5"])
    assert report["step"] == 4
    assert (out / "eval-step4-n5.json").exists()
    assert (out / "eval-step4-n5.png").exists()


def test_fewer_problems_than_asked_for_is_said(finished, monkeypatch, capsys):
    args = rlvr.open_run(finished, "cpu")[0]
    monkeypatch.setattr(evaluation, "load_problems", lambda args, split, n: ["problem"] * min(n, 55))
    assert len(evaluation.test_problems(args, 60)) == 55
    assert "only 55 test problems, not 60" in capsys.readouterr().out
    assert len(evaluation.test_problems(args, 55)) == 55
    assert capsys.readouterr().out == ""

    # All of GSM8K is meant without --n, and that may be a small file of one's own.
    args.task = "gsm8k"
    assert len(evaluation.test_problems(args)) == 55
    assert capsys.readouterr().out == ""


def test_stage_0_is_shown_as_stage_0(finished, tmp_path, capsys, monkeypatch):
    """GRPO's curves are not drawn over it, and the console says before which step it was measured."""
    def never(*arguments):
        raise AssertionError("a curve of GRPO in a picture of stage 0")

    monkeypatch.setattr(evaluation, "draw_learning", never)
    monkeypatch.setattr(evaluation, "draw_attention_over_time", never)
    out = shutil.copytree(finished, tmp_path / "run")
    assert command(out, "--stage0", program=evaluation.run) == 0
    assert "after stage 0, before GRPO" in capsys.readouterr().out
    report = json.loads((out / "eval-stage0-n8.json").read_text())
    assert (report["stage"], report["step"]) == ("stage 0", 0)
    assert (out / "eval-stage0-n8.png").stat().st_size > 10_000


def test_what_the_console_says(tmp_path, capsys):
    """A format that costs nothing is not mentioned; a line breaks between two experts, never inside one."""
    lines = shown(capsys, hand_made_report(), tmp_path / "report.json")
    assert not any("in any format" in line or "warning" in line for line in lines)
    assert "      one 0.75 (-50), two 0.25 (+0)" in lines

    after = dict(strict=0.9, lenient=0.95, ci95=(0.87, 0.93))
    lines = shown(capsys, hand_made_report(n=100, after=after), tmp_path / "report.json")
    assert any("95.0% right in any format" in line for line in lines)
    assert any("fewer than 200 problems" in line for line in lines)

    for length in range(1, 60):
        names = ["x" * length, "a-name-with-hyphens", "third"]
        attention = {"sums": dict(zip(names, (0.5, 0.3, 0.2)))}
        masked = {name: {"sums": 0.8} for name in names}
        by_dataset = {"sums": dict(n=200, before=0.0, after=0.8)}
        report = hand_made_report(attention_by_dataset=attention, masked=masked, by_dataset=by_dataset)
        lines = shown(capsys, report, tmp_path / "report.json")
        for name, share in attention["sums"].items():
            assert any(f"{name} {share:.2f} (+0)" in line for line in lines)
        assert all(len(line) <= 100 for line in lines)


def test_a_picture_shows_no_later_steps_than_were_tested(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        rlvr.append(tmp_path / "metrics.jsonl", dict(step=step, reward=0.5))
    steps = []
    monkeypatch.setattr(evaluation, "draw_learning",
                        lambda panel, records, report: steps.extend(record["step"] for record in records))
    evaluation.picture(tmp_path, hand_made_report(step=3), tmp_path / "picture.png")
    assert steps == [1, 2, 3]


def test_one_question_is_answered(finished, capsys):
    """With three questions as examples, and a bar for each expert; the shares add up to 1."""
    question = "Count how many prime numbers there are between 2 and 9 (inclusive) ?"
    assert command(finished, "--ask", question, program=evaluation.run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  Count how many prime numbers") for line in lines) >= 1
    assert any("\\n\\nWhat relation is" in line for line in lines)  # a question of several lines, on one

    bars = lines[-3:]
    assert [line.split()[0] for line in bars] == ["logic", "algorithmic", "arithmetic"]
    shares = [float(re.search(r"\d\.\d\d", line).group()) for line in bars]
    assert sum(shares) == pytest.approx(1, abs=0.02)


def test_each_piped_line_is_answered_by_one_line(finished, capsys, monkeypatch):
    """\\n in a line stands for a line break; a question that is too long is said to be so."""
    asked = []

    def answer(policy, router, experts, args, question):
        asked.append(evaluation.unescape(question))
        if "long" in question:
            raise ValueError("it is too long")
        return [], "two\nlines", None

    monkeypatch.setattr(evaluation, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\na long one\nJacob is tall.\\n\\nWho is?\n"))
    assert command(finished, "--ask", program=evaluation.run) == 0
    assert capsys.readouterr().out.splitlines() == ["two\\nlines", "it is too long", "two\\nlines"]
    assert asked == ["first", "a long one", "Jacob is tall.\n\nWho is?"]


def test_typed_questions_are_answered_until_the_end(finished, capsys, monkeypatch):
    typed = ["Is 7 a prime ?", "", "long " * 1000, "Is 8 a prime ?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert command(finished, "--ask", program=evaluation.run) == 0
    output = capsys.readouterr().out
    assert "Three test questions" in output
    assert output.count("  algorithmic ") == 2
    assert "tokens" in output  # the long one was too long, and the next one was answered


# == The faults

# -- Stopped, killed, resumed

def is_checkpoint(unfinished, path):
    return path.suffix == ".safetensors"


@pytest.mark.parametrize("code, stop", [
    (0, (signal.SIGTERM, train, "log", 5)),  # the step is finished and saved
    (130, (signal.SIGINT, train, "log_stage0", 8)),  # stage 0 stops at once, and will begin again
    (-9, (signal.SIGKILL, train, "log", 5)),  # between two checkpoints
    (-9, (signal.SIGKILL, experts.os, "replace", 2, is_checkpoint)),  # while the second one is written
])
def test_stopped_or_killed_and_resumed_is_the_undisturbed_run(finished, quick, tmp_path, code, stop):
    out, log = tmp_path / "run", tmp_path / "log"
    process = forked(lambda: stop_in(*stop) or command(*quick, "--out", out), log)
    process.join()
    assert process.exitcode == code, log.read_text()
    assert (out / "config.json").exists()
    assert not (out / "eval.json").exists()
    if code == 0:
        assert "stopped and saved" in log.read_text()
        assert "-000005-" in rlvr.checkpoints(out)[0].name
    resume_to(finished, out)


def stopped_at_three(finished, out):
    """A copy of the finished run as if it had been stopped after step 3 of 6."""
    shutil.copytree(finished, out)
    rlvr.checkpoints(out)[0].unlink()
    (out / "eval.json").unlink()
    return out


def test_models_that_have_moved_are_named_to_resume(finished, tmp_path, capsys):
    """The same weights in another place give the same run, with the same names; others are refused."""
    out = stopped_at_three(finished, tmp_path / "run")
    settings = json.loads((out / "config.json").read_text())["args"]
    places = []
    for i, source in enumerate((settings["policy"], *settings["experts"])):
        places.append(str(shutil.copytree(source, tmp_path / str(i) / "moved")))
    policy, one, two, three = places
    assert "--experts" in refused(capsys, "--resume", out, "--experts", two, one, three)
    resume_to(finished, out, "--policy", policy, "--experts", one, two, three)
    assert json.loads((out / "config.json").read_text())["args"]["experts"] == [one, two, three]
    assert {*records(out)[-1]["attention"]} == {"arithmetic", "logic", "algorithmic"}


def test_resume_takes_the_run_as_it_is(finished, tmp_path, capsys):
    assert "nowhere holds no run" in refused(capsys, "--resume", "nowhere")
    assert "seed" in refused(capsys, "--resume", finished, "--seed", 7)
    assert "steps" in refused(capsys, "--resume", finished, "--steps", 2)
    args = parse_args(["--resume", str(finished), "--steps", "9"])
    assert (args.steps, args.batch, args.task) == (9, 6, "logic+algorithmic")


def test_ctrl_c_while_the_experts_read(tmp_path, capsys):
    """There is no run to resume yet, and the sentence says what continues."""
    def interrupted():
        raise KeyboardInterrupt

    assert rlvr.run_cli("train.py", interrupted) == 130
    assert "continue with train.py --resume" in capsys.readouterr().err
    assert rlvr.run_cli("eval.py", interrupted) == 130
    assert capsys.readouterr().err == "\neval.py: stopped\n"
    with rlvr.one_process(tmp_path / "run"):
        pass
    assert "start the same command again" in refused(capsys, "--resume", tmp_path / "run")


# -- Several ranks

def as_rank(rank, ports, out, settings):
    """A run alone (rank None) or as one of two, which then continue until rank 1 is lost in step 3."""
    if rank is not None:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=ports[0], N_MUSKETEERS_TIMEOUT="3")
        for module in (rlvr, train, evaluation):
            module.RANK, module.WORLD = rank, 2
    clip_gradients, first = train.clip_gradients, {}

    def rollout_of_given_samples(policy, router, batch, args, group, temperature, generator=None):
        """Two ranks draw other samples than one, so all are given the same, by question, half and answer."""
        sampled = rollout(policy, router, batch, args, group, temperature, generator)
        n = torch.tensor([[len(problem.question)] for problem in sampled.problems])
        half = torch.arange(len(n))[:, None] % 2
        g = torch.arange(group)
        sampled.tokens = 3 + ((n + 7 * g)[..., None] + torch.arange(4)) % 90
        sampled.mask = sampled.tokens > 0
        sampled.rewards = ((n + g + half) % 3 == 0).float()
        sampled.verdicts = [[rewards.Verdict(reward, "right" if reward else "wrong", reward == 1)
                             for reward in row] for row in sampled.rewards.tolist()]
        return sampled

    def noted(parameters):
        norm = clip_gradients(parameters)
        first.setdefault("gradients", {i: p.grad.clone() for i, p in enumerate(parameters)})
        return norm

    train.rollout, train.clip_gradients = rollout_of_given_samples, noted
    if rank == 1:
        stop_in(signal.SIGKILL, train, "log", 3)
    trained(out, *settings)
    torch.save(first["gradients"], f"{out}-{rank}.pt")
    if rank is not None:
        os.environ["MASTER_PORT"] = ports[1]  # on the first one rank 0 may still be listening
        return rlvr.run_cli("train.py", lambda: train.run(["--resume", str(out), "--steps", "4"]))


def test_two_ranks_are_one_run_and_a_lost_one_ends_the_other(quick, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [str(free.getsockname()[1]) for free in (first, second)]
    settings = [*quick, "--seed 1 --steps 2 --batch 5 --words_steps 2 --reading_steps 2"]
    processes = []
    for name, rank in (("two", 0), ("two", 1), ("one", None)):
        process = forked(functools.partial(as_rank, rank, ports, tmp_path / name, settings),
                         tmp_path / f"log-{rank}")
        processes.append(process)
    for process in processes:
        process.join()
    speaks, quiet = ((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
    assert [process.exitcode for process in processes] == [2, -9, 0], speaks
    assert "8 test problems" in speaks
    assert "n-Musketeers" not in quiet
    assert "another rank has stopped" in speaks
    assert "Traceback" not in speaks
    assert "2 ranks" in refused(capsys, "--resume", tmp_path / "two")

    # Stage 0 gives the same weights.
    a, b = (load_file(next((tmp_path / name).glob("stage0-*"))) for name in ("one", "two"))
    weights = [name for name in a if name.startswith(("policy", "router"))]
    same_gradients({name: a[name] for name in weights}, {name: b[name] for name in weights}, 1e-2)

    # The first step of GRPO with comparing gives the same gradient, and both ranks have all of it.
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("one-None", "two-0", "two-1"))
    for i in two:
        assert torch.equal(two[i], other[i])
    assert any(gradient.any() for gradient in one.values())
    same_gradients(two, one, 1e-2)

    # So do its records.
    for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two")[:2], strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-3)
        assert ours["reward_by_expert"] == theirs["reward_by_expert"]
        assert ours["reasons"] == theirs["reasons"]


# -- Damage

def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, tmp_path, capsys):
    """Said in a sentence, and the run ends the same. All damaged: refused, nothing is started over."""
    out = shutil.copytree(finished, tmp_path / "run")
    flip(rlvr.checkpoints(out)[0], -5)
    with pytest.warns(UserWarning, match="damaged.*the checkpoint before it"):
        resume_to(finished, out)
    for path in rlvr.checkpoints(out):
        os.truncate(path, 1000)
    with pytest.warns(UserWarning):
        assert "another --out" in refused(capsys, "--resume", out)
    assert len(records(out)) == 6


def test_every_bit_of_a_checkpoint_counts(finished, tmp_path):
    """A flipped bit or a cut is found wherever it is; one of other models leaves the weights as they were."""
    path = rlvr.checkpoints(finished)[0]
    data, copied = path.read_bytes(), tmp_path / path.name
    header = int.from_bytes(data[:8], "little")
    for at in (0, 9, header // 2, header + 4, header + 8, len(data) // 2, len(data) - 1):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
        for damaged in (flipped, data[:at]):
            copied.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged"):
                experts.read_tensors(copied)

    policy, router = Policy.from_pretrained("tiny/policy"), make_router()
    parameters = [*policy.parameters(), *router.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(ValueError, match="other models"):
        rlvr.load_checkpoint(path, policy, router)
    for a, b in zip(before, parameters, strict=True):
        assert torch.equal(a, b)


def test_a_generator_of_another_kind_of_device_gets_a_new_seed():
    """The state of a CUDA generator has 16 bytes, that of a CPU generator 5,056."""
    saved, generator = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.rand(5, generator=saved)
    rlvr.set_generator(generator, saved.get_state(), dict(step=10))
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=saved))

    rlvr.set_generator(generator, torch.zeros(16, dtype=torch.uint8), dict(step=10))
    numbers = torch.rand(4, generator=generator)
    assert not torch.equal(numbers, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_a_torn_last_record_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rlvr.append(path, dict(step=1))
    rlvr.append(path, dict(step=2))
    with open(path, "a") as file:
        file.write('{"step": 3, "rew')
    assert [record["step"] for record in rlvr.read_records(path)] == [1, 2]
    assert rlvr.read_records(tmp_path / "nothing.jsonl") == []
    rlvr.drop_records(path, dict(stage0=True, step=1))
    assert records(tmp_path) == [dict(step=1)]


def test_nan_is_null_in_a_record(tmp_path):
    record = dict(a=math.nan, b=[math.inf, 1.5, {"c": -math.inf}], d="NaN", e=(1, None), f=True)
    rlvr.append(tmp_path / "metrics.jsonl", record)
    text = (tmp_path / "metrics.jsonl").read_text()
    expected = dict(a=None, b=[None, 1.5, {"c": None}], d="NaN", e=[1, None], f=True)

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == expected


@pytest.mark.parametrize("damage", [  # what the file holds, or what its settings do
    b"", b"[]", b'{"args": 3}', b'{"args": {"task": "gsm8k"', b"\xff", dict(batch=-1), dict(task=None),
    dict(lr=math.nan), dict(router=1), dict(unheard=1), dict(layers=["x"])])
def test_a_damaged_config_of_a_run_is_one_sentence(finished, tmp_path, capsys, damage):
    """eval.py, too, says so where it reads what is damaged."""
    path = Path(shutil.copy(finished / "config.json", tmp_path))
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        edit(tmp_path, path.name, args=json.loads(path.read_text())["args"] | damage)
    assert "damaged" in refused(capsys, "--resume", tmp_path)
    if isinstance(damage, bytes) or "layers" in damage:
        assert "damaged" in refused(capsys, tmp_path, program=evaluation.run)


# -- Disk, lock, memory, numbers

def test_a_full_disk_loses_only_what_was_not_saved(finished, tmp_path, monkeypatch, capsys):
    """A checkpoint that does not fit: one sentence, no half file; with room again, the undisturbed run."""
    out, log = stopped_at_three(finished, tmp_path / "run"), train.log
    with monkeypatch.context() as patch:
        def log_and_fill_the_disk(*arguments):  # full from step 4 on
            patch.setattr(experts.os, "fsync", full_disk)
            log(*arguments)

        patch.setattr(train, "log", log_and_fill_the_disk)
        sentence = refused(capsys, "--resume", out)
    assert "No space" in sentence
    assert "--resume" in sentence
    assert not list(out.glob("*.part"))
    resume_to(finished, out)


def test_one_process_trains_in_a_folder(finished, quick, tmp_path, capsys):
    with rlvr.one_process(finished):
        assert "another process" in refused(capsys, "--resume", finished)
    assert "holds a run" in refused(capsys, *quick, "--out", finished)
    with rlvr.one_process(tmp_path):
        assert "another process" in refused(capsys, *quick, "--out", tmp_path)
    with rlvr.one_process(tmp_path):  # the file is there, its process is not
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, code):
    """Lustre and some NFS have none. The run goes on, and what was half written is removed."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "torn.part").touch()
    entered = []
    with pytest.warns(UserWarning, match="cannot be locked.*only one process"):
        with rlvr.one_process(tmp_path):
            entered.append(True)
    assert entered
    assert not (tmp_path / "torn.part").exists()


def test_a_step_that_is_not_finite_is_skipped(finished, tmp_path, monkeypatch, capsys):
    """Weights and moments stay as they were, to the bit; the next step goes on; five in a row end the run."""
    out = stopped_at_three(finished, tmp_path / "run")
    good = newest(out)
    with monkeypatch.context() as patch:
        patch.setattr(train, "grpo_loss", lambda *arguments: grpo_loss(*arguments) * math.nan)
        patch.setattr(train, "test_report", lambda *arguments: pytest.fail("it went on"))
        assert "5 steps in a row" in refused(capsys, "--resume", out, "--steps", 20)
    skipped = newest(out)
    assert len(records(out)) == 8
    assert records(out)[-1]["loss"] is None  # JSON has no NaN
    assert good.keys() == skipped.keys()
    for name in good:
        if name not in ("generator.0", "progress"):
            assert torch.equal(good[name], skipped[name]), name

    train.run(["--resume", str(out), "--steps", "9"])
    assert not torch.equal(newest(out)["optimizer.0.step"], skipped["optimizer.0.step"])


def test_a_gradient_of_stage_0_that_is_not_finite_ends_the_run(quick, tmp_path, monkeypatch, capsys):
    def words_loss(*arguments):
        loss, n = rlvr_words_loss(*arguments)
        return loss * math.nan, n

    rlvr_words_loss = rlvr.words_loss
    monkeypatch.setattr(rlvr, "words_loss", words_loss)
    assert "--words_lr" in refused(capsys, *quick, "--out", tmp_path / "run")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_the_rehearsal_halves_the_micro_batch_until_it_fits(finished, monkeypatch, capsys, error):
    """It leaves no gradient. What has nothing to do with memory is raised."""
    policy, router, dataset, args = loaded(finished)
    args.micro_batch = 8
    score, sizes = Policy.score, []

    def with_little_memory(self, batch, context, tokens, *rest):
        sizes.append((len(batch), tokens.shape[1]))
        if len(batch) > room:
            raise error
        return score(self, batch, context, tokens, *rest)

    monkeypatch.setattr(Policy, "score", with_little_memory)
    room = 2
    assert train.gradient_pass_seconds(policy, router, dataset, args) > 0
    assert sizes[:3] == [(8, 2), (4, 2), (2, 2)]  # two answers to each row, as two experts are compared
    assert args.micro_batch == 2
    assert capsys.readouterr().out.count("too little") == 2
    for parameter in (*policy.parameters(), *router.parameters()):
        assert parameter.grad is None

    room = 0
    with pytest.raises(type(error)):
        train.gradient_pass_seconds(policy, router, dataset, args)
    assert args.micro_batch == 1
    assert sizes[-1] == (1, 2)

    error, args.micro_batch = RuntimeError("shapes do not match"), 8
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.gradient_pass_seconds(policy, router, dataset, args)
    assert args.micro_batch == 8


def test_too_little_memory_is_one_sentence(quick, tmp_path, monkeypatch, capsys):
    """The micro-batch that was found stays in the run's settings, so that --resume has it, too."""
    gradient_pass = train.gradient_pass_seconds

    def halved(policy, router, dataset, args):
        args.micro_batch = 2
        return gradient_pass(policy, router, dataset, args)

    monkeypatch.setattr(train, "gradient_pass_seconds", halved)
    out = trained(tmp_path / "run", *quick, "--steps 1 --reading_steps 0")
    assert json.loads((out / "config.json").read_text())["args"]["micro_batch"] == 2

    for error in OUT_OF_MEMORY:
        def fails(*arguments):
            raise error

        monkeypatch.setattr(train, "rehearse", fails)
        sentence = refused(capsys, *quick, "--out", tmp_path / "another", "--reading_steps", "0")
        assert "out of memory" in sentence
        assert "--micro_batch" in sentence
        shutil.rmtree(tmp_path / "another")

    # A policy that does not fit onto a GPU is not called damaged.
    with pytest.raises(torch.OutOfMemoryError), experts.loading("model", "a policy"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train, "rehearse", lambda *arguments: [][0])
    with pytest.raises(IndexError):
        command(*quick, "--out", tmp_path / "bug", "--reading_steps", "0")


def test_a_terminal_without_unicode_ends_no_run(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    assert rlvr.run_cli("eval.py", lambda: print("attention █ 0.5")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"attention ? 0.5\n"


# -- Refusals: one sentence that says how to fix it

@pytest.mark.parametrize("arguments, word", [  # after those of the small run; a word of the sentence
    # numbers out of their range
    ("--group 1", "--group.*at least 2"),
    ("--group 3", "--group 3.*--router mixed"),
    ("--group 2", "--group 2.*each half has two answers.*from 4 on"),
    ("--lr nan", "--lr"),
    ("--lr -1", "--lr.*above 0"),
    ("--batch 0", "--batch"),
    ("--temperature 0", "--temperature"),
    ("--steps 0", "--steps.*at least 1"),
    ("--reading_steps -1", "--reading_steps"),
    ("--states last:0", "--states last:0"),
    ("--latents 600", "--latents.*at most 512"),
    ("--seed 99999999999999999999", "--seed.*at most"),
    ("--steps 999999999999", "--steps or --batch"),
    ("--batch 1000000", "--steps or --batch"),
    ("--test 99999999", "lower --test"),
    # tasks and levels
    ("--level terms=3", "level"),
    ("--level tiny --task gcd", "--level easy"),
    ("--level impossible", "easy, default, hard"),
    ("--task gsm_symbolic --level hard", "no levels"),
    ("--task chain_sum --level min_terms=two", "int"),
    ("--task chain_sum --level min_terms=9", "cannot be built"),
    ("--task logic+nope", "nope"),
    ("--task chain_sun", "chain_sum"),
    ("--task countdown", "refused"),
    ("--task mini_sudoku --level easy", "--answer_format tagged"),
    # options that would have no effect, or exclude each other
    ("--data /does/not/exist", "--data .* has no effect"),
    ("--task gsm8k --data FILE --level bananas", "--level bananas has no effect"),
    ("--router text --reading_steps 5", "--reading_steps 0"),
    ("--beta 0.04", "--beta 0"),
    ("--router constant --control noise --reading_steps 0", "--control"),
    ("--router none --lora_rank 0", "--lora_rank"),
    ("--states first:2", "--states first:2"),
    ("--states answer:1", "2 to 64"),
    ("--think 8", "--cue"),
    ("--think 8 --cue A: --states first", "--think"),
    # names
    ("--preset smal", "choose tiny, small, paper"),
    ("--dtype fp16", "choose auto, float32"),
    ("--router louder", "louder.*attention.*--extension"),
    ("--control wrong", "wrong.*shuffled.*--extension"),
    ("--states second", "last, first, mean"),
    ("--extension nowhere.py", "--extension nowhere.py is not there"),
    ("--device cuda:7", "--device"),
    ("--device gpu", "--device"),
    # models
    ("--experts nowhere/at/all", "nowhere"),
    ("--experts tiny", "tiny"),
    ("--experts ENCODER", "an expert that writes"),
    ("--policy nowhere", "nowhere"),
    ("--layers 9", "layer"),
    ("--layers -9", "layer"),
    ("--router_dim 40", "--router_dim"),
    ("--max_new 600", "window"),
    ("--write 300", "room"),
    ("--answer_format tagged", "chat template"),
    # files
    ("--task gsm8k --data nowhere", "nowhere"),
    ("--task gsm8k --data FILE", "pass a larger file"),
    ("--out FILE/run", "FILE"),
    ("--out FILE", "--out .*FILE is a file"),
])
def test_bad_input_is_one_sentence(quick, tmp_path, capsys, arguments, word):
    (tmp_path / "FILE").touch()
    settings = arguments.replace("FILE", f"{tmp_path}/FILE").replace("ENCODER", quick[-1]).split()
    assert re.search(word, refused(capsys, *quick, "--out", tmp_path / "run", *settings))
    assert not list(tmp_path.glob("*/config.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_named(quick, tmp_path, capsys):
    sentence = refused(capsys, *quick, "--out", tmp_path / "run", "--device", "cuda")
    assert "--device" in sentence
    assert "rank" not in sentence


def test_a_router_that_reads_needs_experts(tmp_path, capsys):
    sentence = refused(capsys, "--policy", "tiny/policy", "--device", "cpu", "--out", tmp_path / "run")
    assert "--experts" in sentence
    assert "--router none" in sentence


@pytest.mark.parametrize("arguments", [
    "--task gsm9k --preset paper",
    "--task countdown --preset small",
    "--task gsm8k --preset paper --data BAD",
    "--task gsm8k --preset paper --data nowhere.jsonl",
    "--task chain_sum --preset small --level impossible",
    "--task mini_sudoku --preset small",
])
def test_mistakes_in_the_problems_come_before_any_model(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "BAD").write_text("no JSON")
    monkeypatch.setattr(train, "build", lambda args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(train, "official_files_to_fetch", lambda: [])
    settings = arguments.replace("BAD", f"{tmp_path}/BAD").split()
    refused(capsys, *settings, "--device", "cpu", "--out", tmp_path / "run")


# -- Tasks and files that are wrong

@pytest.mark.parametrize("settings, word", [  # settings of get_problems; a word of the refusal
    (dict(task="chain_sun"), "chain_sum"),
    (dict(task="logic+nope"), "nope"),
    (dict(task=""), "unknown task"),
    (dict(task="countdown"), "refused"),
    (dict(task="chain_sum", split="dev"), "train, val, test"),
    (dict(task="gcd", level="tiny"), "--level easy"),
    (dict(task="logic", level="terms=3"), "level"),
    (dict(task="chain_sum", level="impossible"), "easy, default, hard"),
    (dict(task="chain_sum", level="min_terms=two"), "int"),
    (dict(task="chain_sum", level="min_terms=9"), "cannot be built"),
    (dict(task="gcd+chain_sum", level="min_numbers=2"), "chain_sum"),
    (dict(task="gsm8k", data_path="nowhere.jsonl"), "nowhere.jsonl is not there"),
    (dict(task="gsm8k", data_path="~nobody-of-this-name/gsm8k"), "--data"),
    (dict(task="gsm8k", data_path="x" * 5000), "is not there"),
    (dict(task="gsm8k", level="bananas"), "--level bananas has no effect"),
    (dict(task="chain_sum+logic", data_path="anything.jsonl"), "--data anything.jsonl has no effect"),
    (dict(task="chain_sum", n=10**12), "lower --(steps or --batch|val|test)")])
def test_every_mistake_is_found_in_every_split_before_a_problem_is_made(settings, word):
    """Also with n=1, where a mix would draw a problem of its first part only; and in one sentence."""
    for split in rewards.SPLITS:
        with pytest.raises(ValueError, match=word) as refusal:
            get_problems(**(dict(split=split, n=1) | settings))
        assert "\n" not in str(refusal.value)


def test_a_wrong_line_of_a_file_is_named(tmp_path):
    good, mine = '{"question": "q", "answer": "#### 1"}', tmp_path / "mine.jsonl"
    for wrong in ("{", "null", '{"question": "q"}', '{"question": "q", "answer": "18"}',
                  '{"question": 3, "answer": "#### 1"}', '{"question": "q", "answer": "#### one"}'):
        mine.write_text(f"{good}\n\n{wrong}")
        with pytest.raises(ValueError, match="mine.jsonl, line 3"):
            get_problems("gsm8k", "train", 1, mine)

    # One question has one answer. A unit is no part of it: a plain answer may be the number alone.
    mine.write_text('{"question": "q", "answer": "#### 1 apple."}\n{"question": "q", "answer": "#### 1.0"}')
    assert rewards.read_gsm8k_file(mine) == {"q": "1"}
    mine.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "#### 2"}')
    with pytest.raises(ValueError, match="line 2: a line above has the same question"):
        get_problems("gsm8k", "train", 1, mine)

    mine.write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(ValueError, match="mine.jsonl is not a text in UTF-8"):
        get_problems("gsm8k", "train", 1, mine)

    write_gsm8k(tmp_path / "train.jsonl", "train", 20)
    with pytest.raises(ValueError, match="test.jsonl is not there"):
        get_problems("gsm8k", "train", 1, tmp_path)


def test_official_files_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    """A file has its name only if its sha256 is the official one, and nothing unfinished stays."""
    write_gsm8k(tmp_path / "content", "test", 6)
    content = (tmp_path / "content").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rewards, "GSM8K_FILES", {
        "train.jsonl": (len(content), sha256), "test.jsonl": (len(content), sha256)})
    requests = []

    def answer_with(body):
        def urlopen(url, timeout):
            requests.append((url, timeout))
            return io.BytesIO(body)
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    # A connection that breaks off.
    answer_with(content[:-1])
    with pytest.raises(ValueError, match="sha256.*--data FOLDER"):
        get_problems("gsm8k", "test", 1)
    assert official_files_to_fetch() == [("train.jsonl", len(content)), ("test.jsonl", len(content))]
    assert not list(tmp_path.glob("cache/gsm8k/*"))

    # The whole files, once.
    answer_with(content)
    requests.clear()
    assert len(get_problems("gsm8k", "test", 6)) == 6
    assert len(get_problems("gsm8k", "test", 6)) == 6
    assert official_files_to_fetch() == []
    assert requests == [(rewards.GSM8K_URL + "train.jsonl", 30), (rewards.GSM8K_URL + "test.jsonl", 30)]
    assert len(list(tmp_path.glob("cache/gsm8k/*"))) == 2


# -- A policy that is damaged or cannot run

@pytest.mark.parametrize("key, value", [  # more than a machine has, senseless, or of another type
    ("model_type", "gpt2"), ("model_type", ["x"]), ("hidden_act", "gelu"), ("hidden_size", 10**9),
    ("hidden_size", 16), ("hidden_size", math.nan), ("num_hidden_layers", 10**6), ("num_hidden_layers", 4),
    ("num_hidden_layers", 2), ("num_hidden_layers", "3"), ("num_attention_heads", 0),
    ("num_key_value_heads", 3), ("intermediate_size", 10**12), ("vocab_size", 10**12), ("vocab_size", 5),
    ("head_dim", -2), ("max_position_embeddings", math.inf), ("tie_word_embeddings", "false"),
    ("eos_token_id", None), ("eos_token_id", 300), ("rope_parameters", dict(rope_theta="x")),
    ("rope_parameters", dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ("rope_parameters", dict(rope_type="linear", rope_theta=1e4, factor=0.0)),
])
def test_a_policy_that_cannot_run_is_refused(tmp_path, key, value):
    """Unknown kinds, absurd numbers: one sentence, before anything of that size is made."""
    make_policy(tmp_path)
    (tmp_path / "generation_config.json").unlink()  # its eos_token_id would go before the config's
    edit(tmp_path, "config.json", **{key: value})
    with pytest.raises(ValueError) as error:
        Policy.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name, tensor, message", [
    ("model.norm.weight", torch.ones(16, 2), r"model.norm.weight has shape \(16, 2\), .* \(32,\)"),
    ("model.norm.weight", torch.ones(32).int(), "model.norm.weight as I32, .* not quantized"),
    ("model.norm.weight", torch.ones(32).double(), "model.norm.weight as F64"),
    ("model.norm.weight", None, "model.norm.weight is not in its files"),
    (f"{Q_PROJ}.weight", torch.ones(32, 32).to(torch.float8_e4m3fn), "q_proj.weight as F8_E4M3"),
    (f"{Q_PROJ}.bias", torch.ones(32), "q_proj.bias, which its config.json does not imply"),
    (f"{Q_PROJ}.weight_scale_inv", torch.ones(1, 1), "q_proj.weight_scale_inv, which its"),
    ("model.layers.9.mlp.up_proj.weight", torch.ones(48, 32), "layers.9.mlp.up_proj.weight, which"),
])
def test_a_policys_tensors_are_those_that_its_config_implies(tmp_path, name, tensor, message):
    """Another shape, a dtype that needs a scale, a tensor that is missing or that nothing asks for."""
    make_policy(tmp_path)

    def change(tensors):
        if tensor is None:
            del tensors[name]
            return tensors
        return tensors | {name: tensor}

    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        Policy.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_tensors_that_old_files_hold_besides_do_no_harm(tmp_path):
    """Angles that are computed anyway, and a copy of the embeddings that the config ties to the head."""
    make_policy(tmp_path, tie_word_embeddings=True)
    tokens, lengths, *_ = example()
    before = Policy.from_pretrained(tmp_path).prefill(tokens, lengths).last
    edit_weights(tmp_path, lambda tensors: tensors | {
        "lm_head.weight": torch.zeros(300, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    policy = Policy.from_pretrained(tmp_path)
    assert torch.equal(policy.prefill(tokens, lengths).last, before)
    assert policy.head is policy.embed


def test_a_policy_is_not_loaded_as_integers(tmp_path):
    make_policy(tmp_path)
    with pytest.raises(ValueError, match="use float32, bfloat16 or float16"):
        Policy.from_pretrained(tmp_path, dtype=torch.int8)


# -- An expert that is damaged or hostile

def test_a_damaged_shard_is_read_again(tmp_path, own_cache):
    """The checksum shows the damage: the shard is deleted with a warning, and the texts are read again."""
    expert = Expert(make_expert(tmp_path / "m"))
    first = read_all(expert)
    for at in (-3, 12):  # a bit of a state, and one of the header
        flip(next(own_cache.glob("states/*/*.safetensors")), at, 4)
        with pytest.warns(UserWarning, match="damaged"):
            assert torch.equal(read_all(expert), first)
    assert torch.equal(read_all(expert), first)  # and no warning: pytest would show it


def test_a_shard_that_cannot_be_read_now_is_kept(tmp_path, own_cache, monkeypatch):
    """Too many open files or a network disk: that is no damage."""
    def fails(path):
        raise OSError("too many open files")

    expert = Expert(make_expert(tmp_path / "m"))
    first = read_all(expert)
    shards = list(own_cache.glob("states/*/*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(experts, "read_tensors", fails)
        with pytest.warns(UserWarning, match="cannot be read .too many open files.*computed again"):
            assert torch.equal(read_all(expert), first)
    assert all(path.exists() for path in shards)


def test_with_a_full_disk_nothing_is_cached_and_the_states_are_the_same(tmp_path, own_cache, monkeypatch):
    expert = Expert(make_expert(tmp_path / "m"))
    with monkeypatch.context() as patch:
        patch.setattr(experts.os, "fsync", full_disk)
        with pytest.warns(UserWarning, match="cannot be stored.*N_MUSKETEERS_CACHE"):
            H = read_all(expert)
    assert not list(own_cache.rglob("*.safetensors"))
    assert torch.equal(read_all(expert), H)


def test_interrupted_reading_continues(tmp_path, own_cache, monkeypatch):
    """Ctrl-C in the fourth batch: the other three are stored and are not read again."""
    expert = Expert(make_expert(tmp_path / "m"))
    texts = [" ".join(["w1"] * n) for n in (60, 40, 30, 10)]  # four batches of different lengths
    compute = Expert.states_of
    lengths = []

    def interrupted(self, model, ids, length, before_answer):
        lengths.append(length)
        if len(lengths) == 4:
            raise KeyboardInterrupt
        return compute(self, model, ids, length, before_answer)

    monkeypatch.setattr(Expert, "states_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_all(expert, texts)
    resumed = read_all(expert, texts)
    assert lengths == [64, 48, 32, 16, 16]

    monkeypatch.setenv("N_MUSKETEERS_CACHE", str(tmp_path / "another"))
    assert torch.equal(resumed, read_all(expert, texts))


def remove_layer(weights):
    return {name: tensor for name, tensor in weights.items() if "layers.1." not in name}


def spoil_norm(weights):
    return weights | {"model.norm.weight": torch.tensor([math.nan] + 15 * [1.0])}


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
    (lambda f: edit(f, "generation_config.json", eos_token_id=48), "eos_token_id"),
    (lambda f: edit_weights(f, remove_layer), "not in its files"),
    (lambda f: edit_weights(f, spoil_norm), "not finite")])
def test_a_damaged_expert_is_one_sentence(tmp_path, own_cache, damage, message):
    folder = make_expert(tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_all(Expert(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8, torch.uint8, torch.int64])
def test_weights_that_are_no_ordinary_numbers_are_refused_by_name(tmp_path, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = make_expert(tmp_path / "m")
    edit_weights(folder, lambda w: w | {name: w[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name} as .* not quantized"):
        Expert(folder)


def test_scales_that_the_model_does_not_use_are_refused_and_masks_are_not(tmp_path, own_cache):
    """Pythia's files have masks of bytes, BERT's have positions of integers: they are no weights."""
    buffers = {"model.layers.0.attention.bias": torch.ones(4, 4, dtype=torch.uint8),
               "model.position_ids": torch.arange(4)}
    folder = make_expert(tmp_path / "m")
    before = Expert(folder)
    H = read_all(before)
    edit_weights(folder, lambda w: w | buffers)
    expert = Expert(folder)
    assert torch.equal(read_all(expert), H)
    assert expert.params == before.params

    for scale in ("weight_scale_inv", "weight_scale", "scales"):
        name = f"model.layers.0.mlp.up_proj.{scale}"
        folder = make_expert(tmp_path / scale)
        edit_weights(folder, lambda w: w | {name: torch.ones(1)})
        with pytest.raises(ValueError, match=f"quantized, as it has {name}"):
            read_all(Expert(folder))


def split_weights(folder, with_index=True):
    """Store the weights of a model in two files. Returns its {tensor name: file name}."""
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    path.unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    weight_map = {}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, Path(folder, file), {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if with_index:
        Path(folder, experts.INDEX).write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    return weight_map


def test_the_files_of_the_index_and_no_others_are_read(tmp_path, own_cache):
    """Files of another save beside them change neither states nor size nor fingerprint."""
    complete = Expert(make_expert(tmp_path / "complete"))
    H = read_all(complete)

    folder = make_expert(tmp_path / "m")
    weight_map = split_weights(folder)
    files = [Path(folder, name) for name in sorted(set(weight_map.values()))]
    assert experts.weight_files(Path(folder)) == files
    before = experts.weights_fingerprint(folder), Expert(folder).fingerprint("states")

    other = make_expert(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "model-00009-of-00009.safetensors"):
        shutil.copy(Path(other, "model.safetensors"), Path(folder, name))
    expert = Expert(folder)
    assert torch.equal(read_all(expert), H) and expert.params == complete.params
    assert (experts.weights_fingerprint(folder), expert.fingerprint("states")) == before

    # An index cannot name files outside the folder, nor files that are missing.
    files[0].unlink()
    with pytest.raises(ValueError, match="lacks model-00001-of-00002.safetensors"):
        Expert(folder)
    edit(folder, experts.INDEX, weight_map={"x": "../other/model.safetensors"})
    assert experts.weight_files(Path(folder)) == [Path(folder, "model.safetensors")]


def test_without_an_index_a_tensor_in_two_files_is_refused(tmp_path, own_cache):
    folder = make_expert(tmp_path / "m")
    split_weights(folder, with_index=False)
    files = experts.weight_files(Path(folder))
    whole = Expert(make_expert(tmp_path / "whole"))
    assert experts.check_weight_headers(files) == whole.params

    # One file needs no index, whatever number it has.
    H = read_all(whole)
    weights = Path(whole.folder, "model.safetensors")
    weights.rename(weights.with_name("model-00001-of-00001.safetensors"))
    assert torch.equal(read_all(Expert(str(whole.folder))), H)

    shutil.copy(files[0], Path(folder, "model-00009-of-00009.safetensors"))
    with pytest.raises(ValueError, match="lm_head.weight in both model-00001.* and model-00009"):
        Expert(folder)


def test_a_text_that_does_not_fit_is_refused(tmp_path, own_cache):
    expert = Expert(make_expert(tmp_path / "m"))
    for text, message in (("w1 " * 65, "65 tokens .* 64"), ("", "0 tokens")):
        with pytest.raises(ValueError, match=message):
            read_all(expert, [text])
    with pytest.raises(ValueError, match="room for 1 to 48"):
        write_all(expert, ["w1 " * 50])


def test_nothing_of_a_models_folder_is_run(tmp_path, own_cache):
    """Neither code that its config names nor a pickle: either would make a file named canary."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass Y: pass\n"
    pickled = f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode()  # open(canary, "w")
    make_policy(tmp_path / "policy")
    make_expert(tmp_path / "expert")

    def load_expert(folder):
        read_all(Expert(folder))

    for name, load in (("policy", Policy.from_pretrained), ("expert", load_expert)):
        folder = tmp_path / name
        (folder / "x.py").write_text(code)
        auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "x.Y")
        edit(folder, "config.json", auto_map=auto_map)
        load(str(folder))

        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickled)
        with pytest.raises(ValueError, match="no safetensors"):
            load(str(folder))

    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists()  # the pickle does what it should


# -- eval.py on a run that is damaged or has moved

def test_null_and_nan_are_tolerated(tmp_path):
    """JSON has no NaN: a report and a record have null there, and a picture has a gap."""
    unknown = {"sums": {"one": math.nan, "two": 0.5}, "words": {"one": 0.5, "two": 0.5}}
    report = hand_made_report(attention_by_dataset=unknown)
    evaluation.show_report(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert report["attention_by_dataset"]["sums"]["one"] is None

    for step in (1, 2, 3):
        share, reward = 0.7, 0.5
        if step == 2:
            share, reward = math.nan, math.nan
        attention = {"sums": {"one": share, "two": 0.3}}
        record = dict(step=step, reward=reward, val=None, attention_by_dataset=attention)
        rlvr.append(tmp_path / "metrics.jsonl", record)
    report["by_dataset"]["sums"]["before"] = None
    for stage in ("GRPO", "stage 0"):
        path = evaluation.picture(tmp_path, report | dict(stage=stage), tmp_path / f"{stage}.png")
        assert path.stat().st_size > 10_000


def test_models_that_have_moved_are_named(finished, tmp_path, capsys):
    """The same weights in another place give the same report; other weights are refused."""
    settings = json.loads((finished / "config.json").read_text())["args"]
    out = shutil.copytree(finished, tmp_path / "run")
    places = []
    for i, source in enumerate((settings["policy"], *settings["experts"])):
        places.append(shutil.copytree(source, tmp_path / str(i) / "moved"))
    moved = ["--policy", places[0], "--experts", *places[1:]]
    assert command(out, *moved, program=evaluation.run) == 0
    report = json.loads((out / "eval-step6-n8.json").read_text())
    at_the_end = json.loads((out / "eval.json").read_text())
    assert {key: report[key] for key in at_the_end} == at_the_end

    wrong = ["--experts", places[2], places[1], places[3]]
    assert "--experts" in refused(capsys, out, *wrong, program=evaluation.run)


def test_bad_input_of_eval_is_one_sentence(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    shutil.copytree(finished, tmp_path / "run")
    for path in rlvr.checkpoints(tmp_path / "run"):
        path.unlink()
    for run, arguments, word in (
            (finished, "--ask x --n 5", "--ask"),
            (finished, "--ask x --json", "--ask"),
            (finished, "--ask", "question"),
            (finished, "--n 0", "--n"),
            (finished, "--device cuda:9", "--device"),
            (finished, "--extension nowhere.py", "--extension"),
            (tmp_path, "", "no run"),
            (tmp_path / "run", "", "no checkpoint"),
            (tmp_path / "run", "--stage0", "stage 0")):
        assert word in refused(capsys, run, *arguments.split(), program=evaluation.run)
