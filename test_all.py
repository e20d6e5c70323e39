"""What must stay true. CPU, no downloads:   python -m pytest -q test_all.py"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from model import Policy, TokenLogprob, sample
from rlvr import (Batch, Rollout, advantages, gradients, grpo_loss, make_optimizer, reference_logprobs, rollout,
                  set_rate, update)
from router import Router


# ---------------------------------------------------------------------------------------------------------- the policy
def make_policy(folder, kind="llama", **settings):
    """A random Hugging Face model of the given family, saved to `folder`, and the model itself."""
    import transformers as tf
    name = dict(llama="Llama", qwen2="Qwen2", qwen3="Qwen3")[kind]
    config = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
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
    """Three prompts of different lengths, padded; two completions each, one of them short; a prefix or None."""
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
    for lora in (False, True):
        if lora:
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
                    want = twin_logprobs(policy, hf, tokens[b, :lengths[b]], None if prefix is None else prefix[b],
                                         answer[b, g, :n], 0.7)
                    torch.testing.assert_close(got[b, g, :n], want, atol=1e-4, rtol=1e-4)


def test_cached_decoding_equals_the_full_forward(small):
    """Greedy tokens, chosen one at a time from the cache, are those of a full forward at every length."""
    policy, hf = small
    tokens, lengths, prefix, *_ = example()
    with policy.plain(), torch.no_grad():
        got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 2, 8, temperature=0)
        assert torch.equal(got[:, 0], got[:, 1])
        for b in range(3):
            x = torch.cat((policy.neutral + policy.spread * prefix[b], hf.get_input_embeddings()(tokens[b, :lengths[b]])))
            for t in range(int(mask[b, 0].sum())):
                best = hf(inputs_embeds=x[None]).logits[0, -1].argmax()
                assert best == got[b, 0, t]
                x = torch.cat((x, hf.get_input_embeddings()(best[None])))


def test_completion_ends_with_its_stop_token(small):
    """mask covers the first stop token and nothing after it."""
    policy, _ = small
    tokens, lengths, prefix, *_ = example()
    stop, policy.stop = policy.stop, torch.arange(0, 300, 4)  # a quarter of all tokens: completions end early
    got, mask = policy.generate(policy.prefill(tokens, lengths, prefix), 16, 12, 1.0, torch.Generator().manual_seed(0))
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
    logp2, _ = policy.logprobs(policy.prefill(copy(tokens), copy(lengths), copy(prefix)), answer.flatten(0, 1)[:, None],
                               mask.flatten(0, 1)[:, None])
    (logp2 * weight.flatten(0, 1)[:, None]).sum().backward()
    torch.testing.assert_close(logp2.view_as(logp), logp, atol=1e-5, rtol=1e-5)
    for a, b in zip(shared + [d_shared], grads(policy) + [prefix.grad]):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert d_shared.abs().max() > 1e-3  # the prefix is learned from, through the cached keys and values


def test_token_logprobs_equal_autograd():
    """The chunked log-probability, its gradient and the entropy against log_softmax over the whole vocabulary."""
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
    """Frequencies of 200,000 draws; impossible tokens never; temperature 0 is argmax; equal seeds, equal draws."""
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


# ---------------------------------------------------------------------------------------------------------- the router
WIDTHS = (5, 12, 8)


def states(n=4, seed=0):
    """States (n, 3, 12), zero beyond each expert's width."""
    H = torch.randn(n, 3, 12, generator=torch.Generator().manual_seed(seed))
    for i, w in enumerate(WIDTHS):
        H[:, i, w:] = 0
    return H


def make_router(**settings):
    torch.manual_seed(0)
    return Router(WIDTHS, 32, **dict(latents=4, heads=2, dim=16, start=1.0) | settings)


def test_fused_projection_equals_a_loop_over_experts():
    """All of the router, written once more with a loop, unpadded states and torch's own attention."""
    router, H = make_router(), states()
    router.standardise(states(64, seed=1))
    C, A = router(H)
    E = torch.stack([((H[:, i, :w] - router.mean[i, :w]) * router.gain[i, :w]).clamp(-10, 10) @ router.project[i, :w]
                     + router.identity[i] for i, w in enumerate(WIDTHS)], 1)
    E = router.norm_in(E)
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
    x = (H - router.mean) * router.gain
    assert x.mean(0).abs().max() < 1e-5 and (x[:, 1].std(0) - 1).abs().max() < 1e-4 and (x[:, 0, 5:] == 0).all()


def test_router_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        C, A = make_router()(states())
    assert torch.isfinite(C).all() and A.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- GRPO
def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    got = advantages(r)
    torch.testing.assert_close(got[:2], torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]))
    torch.testing.assert_close(got[2], torch.tensor([3.0, -1, -1, -1]) / 3 ** 0.5)  # spread is sqrt(3)/4
    torch.testing.assert_close(advantages(r, scale=False)[2], torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_grpo_loss_by_hand():
    """Two tokens, one masked; ratio 1.5 clipped to 1.2 without gradient; then k3 = e^x - x - 1 at x = ln 2."""
    ln = math.log
    logp = torch.tensor([[[ln(0.3), -9.0]]], requires_grad=True)
    old, mask = torch.tensor([[[ln(0.2), -1.0]]]), torch.tensor([[[True, False]]])
    up, down = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    loss = grpo_loss(logp, old, None, up, mask, 1)
    loss.backward()
    assert abs(loss.item() + 1.2) < 1e-6 and (logp.grad == 0).all()
    assert abs(grpo_loss(logp, old, None, down, mask, 1).item() - 1.5) < 1e-6  # a bad one is not clipped from above
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
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
        assert all(abs(sums[k] - found[0][1][k]) < 1e-5 for k in sums)


def test_router_learns_through_the_training_forward(small):
    policy, router, batch, sampled = step_example(small)
    gradients(policy, router, batch, sampled, micro=3, **HOW)
    assert router.project.grad.abs().max() > 0 and policy.blocks[0].qkv.A.grad.abs().max() > 0
    grads(policy, router)


def test_reference_is_the_plain_policy(small):
    """LoRA off and prefix off: what transformers gives for the bare prompt; and `plain` leaves LoRA as it was."""
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
    """Every prompt is the same; the answer stands in the state of expert 1 of 3. Alone, one answer in four is right."""
    make_policy(tmp_path, vocab_size=12, num_hidden_layers=2)
    policy, router = Policy.load(tmp_path), make_router(start=0.1)
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
        update(policy, router, batch, sampled, optimizer, micro=16, **HOW | dict(temperature=1.0, max_new=1, beta=0.0))
        mean = 0.9 * mean + 0.1 * sampled.rewards.mean().item()
    assert mean > 0.8
    assert sampled.attention[..., 1].mean() > 0.4


# --------------------------------------------------------------------------------------------------------- checkpoints
def test_checkpoint_comes_back_whole_and_damage_is_found(tmp_path, small):
    policy, router, batch, sampled = step_example(small)
    optimizer, generator = make_optimizer(policy, router, 1e-3, 1e-3, (0.9, 0.98), 0.0), torch.Generator().manual_seed(3)
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
