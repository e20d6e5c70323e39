"""
The policy: a Llama, Qwen2 or Qwen3 decoder in one file, with LoRA, a soft prefix and a shared prompt.

This file exists because AutoModelForCausalLM does not offer these three things together:

1. A soft prefix. The router's context vectors C (B, L, d) stand before the prompt x, in the place of token
   embeddings: the policy reads [C ; x].
2. A shared prompt. GRPO samples G completions of one prompt. The prompt is run once for all G, and not G
   times: once before they are sampled (`prefill`, then `generate`), and once whenever they are scored
   (`score`).
3. No tensor of size (B, G, T, V). `TokenLogprob` computes log-probabilities in chunks, and only of
   completion tokens.

Letters for sizes:

    B   prompts                          d    width of hidden states and embeddings
    G   completions of each prompt       V    tokens in the vocabulary
    L   context vectors                  nq   query heads
    P   prompt tokens                    nk   key heads: each has keys and values of its own
    S   L + P                            r    nq / nk: r query heads read the same key head (arXiv 2305.13245)
    T   completion tokens                hd   numbers in one head
    n   rows of a matrix, whatever they stand for

The mark ' means transposed: x W' is x @ W.T. In LoRALinear, A and B are LoRA's two matrices, not sizes.

What is easy to get wrong:
- The hidden state of a token predicts the NEXT token. The first completion token is therefore predicted by
  the last prompt token, and the last completion token need not be run at all.
- Prompts are padded on the right. A completion continues at the true length of its prompt, not after the
  padding, and it must not attend to the padding.
- The sampler and the loss must use the same distribution: one temperature, no top-k, no top-p. (Below float32
  they differ by rounding, as LoRA is merged into the weights while tokens are sampled.)
"""
import contextlib
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from experts import (SMALL, check_weight_headers, computes_in_bfloat16, find_model, loading, stop_tokens,
                     weight_files)

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Llama and SmolLM2; Qwen2 and Qwen2.5; Qwen3
ROPES = ("default", "linear", "llama3", "yarn")  # the other kinds change their angles with the text's length
GRAPH_FROM = int(os.environ.get("N_MUSKETEERS_GRAPH_FROM", 32))  # use a CUDA graph from this `max_new` on


# -- One layer of the decoder

class Block(nn.Module):
    """One layer: attention, in which tokens look at earlier tokens, then an MLP on every token by itself.

    Both read a normalized copy of the hidden states and add their result to them (pre-norm). A prompt attends
    only to itself, a completion also to its prompt. So the caller passes the function `attend`.
    """

    def __init__(self, config, weights, index, rank):
        """weights: {Hugging Face's name: tensor}. Those of this layer, number `index`, are taken out."""
        super().__init__()
        self.index = index
        self.eps = config.rms_norm_eps
        self.nq, self.nk, self.hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def take(name):
            tensor = weights.pop(f"model.layers.{index}.{name}", None)
            return None if tensor is None else nn.Buffer(tensor)

        def linear(*names):
            matrices = [take(f"{name}.weight") for name in names]
            biases = [take(f"{name}.bias") for name in names]
            return LoRALinear(matrices, biases, rank)

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        self.norm1 = take("input_layernorm.weight")
        self.norm2 = take("post_attention_layernorm.weight")
        self.q_norm = take("self_attn.q_norm.weight")  # only Qwen3 has these two
        self.k_norm = take("self_attn.k_norm.weight")

    def forward(self, x, cos, sin, attend):
        """Hidden states x (..., T, d) -> (..., T, d).

        cos, sin: of the angles that belong to the tokens' positions, broadcast to (..., T, 1, hd / 2).
        attend(index of the layer, q (..., T, nq, hd), k and v (..., T, nk, hd)) -> (..., T, nq, hd).
        """
        # One product gives queries, keys and values, head beside head.
        normed = self.norm(x, self.norm1)
        heads = self.qkv(normed).unflatten(-1, (-1, self.hd))  # (..., T, nq + 2 nk, hd)
        qk, v = heads.split((self.nq + self.nk, self.nk), dim=-2)

        # Qwen3 also normalizes every query and every key.
        if self.q_norm is not None:
            q, k = qk.split((self.nq, self.nk), dim=-2)
            q = self.norm(q, self.q_norm)
            k = self.norm(k, self.k_norm)
            qk = torch.cat((q, k), dim=-2)

        # Rotate queries and keys by their position. They are still one tensor, so this is done once.
        qk = rotate(qk, cos, sin)
        q, k = qk.split((self.nq, self.nk), dim=-2)

        # Attend, and add the result.
        y = attend(self.index, q, k, v)  # (..., T, nq, hd)
        x = x + self.o(y.flatten(-2))

        # Run the MLP, and add the result.
        normed = self.norm(x, self.norm2)
        inner = SwiGLU.apply(self.gate_up(normed))
        return x + self.down(inner)

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def rotate(x, cos, sin):
    """Rotary position embedding (2104.09864): x (..., hd), cos and sin (..., hd / 2).

    Number i and number i + hd / 2 are a point in the plane, which turns by an angle that grows with the
    position. The product of a query and a key then depends on the distance between their tokens.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (2002.05202). gate and up lie side by side: (..., 2 f) -> (..., f).

    The backward pass is written by hand to save memory. Autograd would save gate, up and silu(gate), 3 f
    numbers for every token. This saves gate and up, 2 f, and computes silu(gate) once more.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        d_up = dy * F.silu(gate)
        return torch.cat((d_gate, d_up), dim=-1)


class LoRALinear(nn.Module):
    """Linear layers with LoRA; layers with the same input are computed by one product.

    LoRA (2106.09685) leaves a large matrix W (out, in) frozen and trains two thin ones, A (rank, in) and
    B (out, rank): the layer computes x (W + scale B A)', a change of W that takes few numbers to describe.
    A starts random and B at zero, so a fresh layer computes exactly x W'.

    Here m layers are stacked. W has the rows of all of them, and A (m rank, in) stacks the A of all m layers.
    Each layer keeps its own B; in the product these are the diagonal blocks of one matrix (out, m rank). For
    example, for queries, keys and values:

            [Aq]        [Bq  0   0 ]          [Bq Aq]
        A = [Ak]    B = [0   Bk  0 ]    B A = [Bk Ak]
            [Av]        [0   0   Bv]          [Bv Av]

    So m layers with LoRA cost three products, and not 3 times m.
    """

    def __init__(self, matrices, biases, rank):
        super().__init__()
        self.weight = nn.Buffer(torch.cat(matrices))  # (out, in), frozen
        self.bias = None if biases[0] is None else nn.Buffer(torch.cat(biases))  # (out,), frozen
        self.active = rank > 0  # `Policy.lora` switches it
        if rank == 0:
            return

        # A and B are float32 whatever W is. bfloat16 has 8 significant bits: an update that changes a number
        # by a ten-thousandth would be rounded away.
        self.scale = 2.0  # alpha / rank in LoRA's paper; here alpha is always 2 * rank
        width, device = self.weight.shape[1], self.weight.device
        self.A = nn.Parameter(torch.randn(rank * len(matrices), width, device=device) / width**0.5)
        self.B = nn.ParameterList(torch.zeros(len(w), rank, device=device) for w in matrices)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)  # (n, in)
        y = frozen_linear(rows, self.weight, self.bias)
        if self.active:
            B, A = self.pair(rows.dtype)
            y.addmm_(rows @ A.T, B.T)  # y += (x A') (scale B)', without a second tensor of y's size
        return y.unflatten(0, x.shape[:-1])

    def pair(self, dtype):
        """scale * B, block-diagonal (out, m rank), and A (m rank, in)."""
        B = self.B[0]
        if len(self.B) > 1:
            B = torch.block_diag(*self.B)
        return (self.scale * B).to(dtype), self.A.to(dtype)


# -- The policy

@dataclass
class Prefill:
    """What remains of B prompts after they were run."""
    prompt_kv: list  # (keys, values) of each layer, both (B, nk, S, hd)
    last: torch.Tensor  # (B, d): hidden state of the last real token, before the final norm
    lengths: torch.Tensor  # (B,): number of context vectors plus number of real prompt tokens
    padding: torch.Tensor  # (B, 1, 1, 1, S): True where a position is padding


class Policy(nn.Module):
    """The decoder. Only LoRA's matrices are parameters. `Policy.from_pretrained` makes one.

    Attributes that others use: `embed` (V, d), the token embeddings; `prefix_origin` (d,) and `embed_std`
    (a number), the units of the context vectors; `ends` (V,), True for tokens that end a completion;
    `window`, the maximum number of positions of a text; `config`, where `config.stop` lists the model's own
    stop tokens.
    """

    def __init__(self, config, weights, rank=8, prefix_origin="zero"):
        """config: see `policy_config`. weights: see `read_weights`; the tensors are taken out, one by one.
        prefix_origin: "zero" or "mean", see `prepend`."""
        super().__init__()
        self.config = config
        self.window = config.max_position_embeddings
        layers = range(config.num_hidden_layers)
        self.embed = nn.Buffer(weights.pop("model.embed_tokens.weight"))  # (V, d)
        self.norm = nn.Buffer(weights.pop("model.norm.weight"))  # (d,)
        self.dtype = self.norm.dtype  # of hidden states: the weights', or float32 beside float16 (`convert`)
        self.head = self.embed
        if not config.tie_word_embeddings:
            self.head = nn.Buffer(weights.pop("lm_head.weight"))  # (V, d)
        self.blocks = nn.ModuleList(Block(config, weights, layer, rank) for layer in layers)

        # Compute the rotary angles of all positions. A padded text can be up to 64 positions longer than the
        # window.
        positions = torch.arange(self.window + 64)[None]
        cos, sin = config.rotary(self.norm.cpu(), positions)  # (1, positions, hd): both halves are equal
        self.cos = nn.Buffer(cos[0, :, :config.head_dim // 2])
        self.sin = nn.Buffer(sin[0, :, :config.head_dim // 2])

        # Estimate mean and standard deviation of the embeddings from about 4,096 of them.
        some_rows = self.embed[:: max(1, len(self.embed) // 4096)].float()
        mean = some_rows.mean(0)
        self.prefix_origin = nn.Buffer(mean if prefix_origin == "mean" else torch.zeros_like(mean))
        self.embed_std = nn.Buffer(some_rows.std())
        self.stop_at(config.stop)

    @classmethod
    def from_pretrained(cls, name, rank=8, dtype=torch.float32, device="cpu", prefix_origin="zero"):
        """The policy in the folder or hub repository `name`. Only safetensors are read, and no code is run.

        rank: of LoRA; 0 for none. prefix_origin: "zero" or "mean", see `prepend`. dtype: of the frozen
        weights, float32, bfloat16, or, for a GPU without bfloat16 (V100, T4), float16; see `pick_dtype`. With
        float16 only matrices are float16, see `float16_product`.
        Raises ValueError, one sentence that says what to do, for a model that this file cannot run.
        """
        folder, _ = find_model(name)
        config = policy_config(folder)
        weights = read_weights(name, folder, config, dtype, device)
        return cls(config, weights, rank, prefix_origin).to(device)

    def stop_at(self, ids):
        """Let a completion end with the first of these token ids."""
        self.ends = nn.Buffer(torch.zeros(len(self.embed), dtype=torch.bool, device=self.embed.device))
        self.ends[ids] = True

    def prefill(self, tokens, lengths, context=None):
        """Run prompts once, all positions at the same time, and keep their keys and values in a `Prefill`.

        A decoder reads from left to right: keys and values of a token depend on the tokens before it, never
        on those after it. So they are computed once and stored, and every later token reads them. The store
        is called a KV cache. Filling it with a prompt is the prefill; `generate` then adds token after token.

        tokens (B, P): padded on the right. lengths (B,): their real tokens. context (B, L, d) or None.
        """
        # Look up the embeddings, and put the context vectors before them.
        x = F.embedding(tokens, self.embed).to(self.dtype)  # (B, P, d)
        if context is not None:
            x = self.prepend(context, x)
            lengths = lengths + context.shape[1]
        S = x.shape[1]

        # A token attends to itself and to the tokens before it. That hides the padding too: it comes last.
        attn_dtype = x.dtype
        if x.device.type == "cpu":
            attn_dtype = torch.float32  # PyTorch's attention is slow in bfloat16 on a CPU
        prompt_kv = []

        def attend(layer, q, k, v):
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()  # (B, nk, S, hd)
            prompt_kv.append((k, v))
            q, k, v = q.transpose(1, 2).to(attn_dtype), k.to(attn_dtype), v.to(attn_dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, nq, S, hd)
            return y.to(x.dtype).transpose(1, 2)

        # Run the layers.
        cos, sin = self.cos[:S, None], self.sin[:S, None]
        for block in self.blocks:
            x = block(x, cos, sin, attend)

        # Keep the hidden state of each prompt's last real token: it predicts the first completion token.
        rows = torch.arange(len(x), device=x.device)
        last = x[rows, lengths - 1]
        padding = torch.arange(S, device=x.device) >= lengths[:, None]  # (B, S)
        padding = padding[:, None, None, None]  # (B, 1, 1, 1, S), as `group_attention` wants it
        return Prefill(prompt_kv, last, lengths, padding)

    def prepend(self, context, x):
        """Put context vectors (B, L, d) before the embeddings x (B, P, d): a soft prefix (2104.08691).

        It works because the layers never see tokens, only a vector for each, and they accept any vector. A
        token is one of V choices, but a vector can be changed a little in every direction. So a gradient
        flows through the frozen policy into the vectors, and from there into the router that wrote them.

            vector = prefix_origin + embed_std * context

        A context whose numbers have standard deviation 1 is as large as an embedding. The origin is zero (as
        in the paper) or the mean embedding. This matters because the first RMSNorm scales all vectors to the
        same size. With the origin zero, even a tiny context arrives as L strong vectors in random directions.
        Around the mean embedding, a tiny context is L vectors that all look like an average token.
        """
        vectors = self.prefix_origin + self.embed_std * context
        return torch.cat((vectors.to(x.dtype), x), dim=1)  # (B, S, d)

    def extend(self, tokens, prefill, first=0, completion_kv=None):
        """Hidden states (B, G, T, d) of T completion tokens (B, G, T).

        first: the position of tokens[..., 0] in its completion, a number or a tensor (1,). completion_kv, of
        shape (layers, 2, B, nk, G, slots, hd): keys and values of the completions, one slot for each token.
        The slots of earlier tokens are read, those of the T tokens are written. None: no earlier tokens.
        """
        T = tokens.shape[-1]
        slots = T
        if completion_kv is not None:
            slots = completion_kv.shape[-2]
        r = self.config.num_attention_heads // self.config.num_key_value_heads

        # Number the tokens of a completion, and find for each token the slots that lie in its future: (T,
        # slots). `group_attention` puts the r query heads that share one key head below each other, and so
        # wants r copies of this mask. With r = 2 and two tokens they are
        #
        #     head 0, token 0    False  True
        #     head 0, token 1    False  False
        #     head 1, token 0    False  True
        #     head 1, token 1    False  False
        slot_index = torch.arange(slots, device=tokens.device)
        token_index = first + slot_index[:T]  # (T,)
        future = slot_index > token_index[:, None]  # (T, slots)
        future = future.repeat(r, 1)  # (r T, slots), as `group_attention` wants it

        # Continue the positions where each prompt ends.
        positions = (prefill.lengths[:, None] + token_index)[:, None, :, None]  # (B, 1, T, 1)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, T, 1, hd / 2)

        def attend(layer, q, k, v):
            k, v = k.permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4)  # (B, nk, G, T, hd)

            # Write them into their slots, and take those of all slots.
            if completion_kv is not None:
                kv = completion_kv[layer]  # (2, B, nk, G, slots, hd)
                kv.index_copy_(-2, token_index, torch.stack((k, v)))
                k, v = kv
            prompt_k, prompt_v = prefill.prompt_kv[layer]
            return group_attention(q, k, v, future, prompt_k, prompt_v, prefill.padding)

        # Run the layers.
        x = F.embedding(tokens, self.embed).to(self.dtype)  # (B, G, T, d)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return x

    @torch.no_grad()
    def generate(self, prefill, group, max_new, temperature=1.0, generator=None):
        """Sample `group` completions of each prompt, of at most `max_new` tokens.

        Returns tokens and mask (B, G, T). mask is True up to and including the first stop token; what comes
        after it is filled with a stop token. T is the length of the longest completion, rounded up by
        `bucket` and at most max_new. Temperature 0 takes the likeliest token.
        """
        decoder = Decoder(self, prefill, group, max_new, temperature)
        step = decoder.step
        on_cpu = self.embed.device.type == "cpu"
        use_graph = self.embed.is_cuda and max_new >= GRAPH_FROM

        # LoRA is merged into the weights here, as it does not change while tokens are sampled.
        with self.lora("merged"):
            for t in range(max_new):
                # Stop when all completions have ended. To find out, the CPU must wait for a GPU: do it only
                # every 8 tokens there.
                if (on_cpu or t % 8 == 0) and not decoder.alive.any():
                    break

                # Draw a random number for each completion, outside of the step: a graph cannot do that.
                if temperature:
                    decoder.uniform.uniform_(generator=generator)

                # The prompt's last hidden state predicts the first token.
                if t == 0:
                    decoder.choose(prefill.last[:, None].expand(-1, group, -1))
                    continue

                # At t = 2 record the step as a CUDA graph, a list of the GPU's operations that is replayed
                # from then on without Python. The step at t = 1 ran without a graph, as the first call loads
                # kernels.
                if t == 2 and use_graph:
                    step = capture_graph(decoder.step, self.embed.device)
                if on_cpu:
                    decoder.make_room(t)
                step()
        return decoder.result()

    def score(self, batch, context, tokens, mask, temperature=1.0):
        """Log-probability and entropy, both (B, G, T), of completions after their prompts, with gradient.

        batch: anything with tokens (B, P) and lengths (B,). context (B, L, d) or None: what the router wrote.
        tokens, mask (B, G, T): as `generate` returns them.
        """
        prefill = self.prefill(batch.tokens, batch.lengths, context)
        return self.logprobs(prefill, tokens, mask, temperature)

    def logprobs(self, prefill, tokens, mask, temperature=1.0, chunk=256):
        """Log-probability and entropy (nats), both (B, G, T), of completion tokens; 0 where mask is False.

        Gradients of the log-probabilities flow into LoRA and, through what `prefill` keeps of the prompt,
        into the context and the router. The entropy has none.
        """
        # For each token, take the hidden state that predicts it: that of the token before it. The first token
        # is predicted by the prompt, the same state for all G completions.
        B, G, T = tokens.shape
        h = prefill.last[:, None, None].expand(-1, G, 1, -1)  # (B, G, 1, d)
        if T > 1:
            later = self.extend(tokens[..., :-1], prefill)  # (B, G, T - 1, d)
            h = torch.cat((h, later), dim=2)  # (B, G, T, d)

        # Keep the real tokens only.
        h = h[mask]  # (n, d)
        targets = tokens[mask]  # (n,)

        # Add rows of zeros up to a round number, see `bucket`.
        extra = bucket(len(h)) - len(h)
        h = F.pad(h, (0, 0, 0, extra))
        targets = F.pad(targets, (0, extra))

        # Compute log-probability and entropy of each row.
        normed = self.final_norm(h)
        logp, entropy = TokenLogprob.apply(normed, self.head, targets, temperature, chunk)

        # Put them where mask is True. masked_scatter ignores the rows that were added at the end.
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)

    def logits(self, h):
        """Logits (n, V) of hidden states h (n, d)."""
        return frozen_linear(self.final_norm(h), self.head)

    def final_norm(self, h):
        return F.rms_norm(h, (h.shape[-1],), self.norm, self.config.rms_norm_eps)

    def adapters(self):
        return [module for module in self.modules() if isinstance(module, LoRALinear)]

    @contextlib.contextmanager
    def lora(self, mode):
        """Within `with policy.lora(mode)` LoRA is disabled ("off") or part of the weights ("merged").

        "merged" computes W + scale B A once, rounded to the dtype of W. That saves two thin products for each
        token and layer, a sixth of the time of a decoding step. It is for sampling: LoRA gets no gradient.
        Within `lora("off")`, `lora("merged")` changes nothing, so `generate` can be used there.
        """
        if mode not in ("off", "merged"):
            raise ValueError(f'lora("{mode}") is not known: use "off" or "merged"')
        layers = [layer for layer in self.adapters() if layer.active]
        unmerged = [layer.weight for layer in layers]
        try:
            for layer in layers:
                if mode == "merged":
                    with torch.no_grad():
                        layer.weight = torch.addmm(layer.weight, *layer.pair(layer.weight.dtype))
                layer.active = False
            yield
        finally:
            for layer, weight in zip(layers, unmerged):
                layer.weight = weight
                layer.active = True


# -- Attention of completions, sampling, log-probabilities

def group_attention(q, own_k, own_v, future, prompt_k, prompt_v, padding):
    """G completions attend to the prompt that they share and each to its own tokens, in one softmax.

    q (B, G, T, nq, hd)                 queries of T tokens of each completion
    own_k, own_v (B, nk, G, slots, hd)  keys and values of the completions' tokens
    future (r T, slots)                 True where a completion token comes after the query's token
    prompt_k, prompt_v (B, nk, S, hd)   keys and values of the prompt: ONE copy for all G completions
    padding (B, 1, 1, 1, S)             True where a prompt position is padding
    Returns (B, G, T, nq, hd).

    An example with one head and hd = 1. The prompt has keys [0, log 2] and values [1, 2]. Two completions,
    both with the query 1, have one token each: keys [0] and [log 5], values [5] and [10].

        completion   scores             weights           result
        0            0, log 2, 0        1/4, 2/4, 1/4     1/4 *  1 + 2/4 * 2 + 1/4 *  5 = 2.5
        1            0, log 2, log 5    1/8, 2/8, 5/8     1/8 *  1 + 2/8 * 2 + 5/8 * 10 = 6.875

    The first two scores of both rows come from one product of the two queries and the prompt's keys.
    """
    B, G, T, nq, hd = q.shape
    nk, S = prompt_k.shape[1:3]
    r = nq // nk

    # 1. Group the queries by the key head that they read. Query heads 0 to r - 1 read key head 0, and so on.
    q = q.view(B, G, T, nk, r, hd)
    q = q.permute(0, 3, 1, 4, 2, 5)  # (B, nk, G, r, T, hd)
    q = q.reshape(B, nk, G, r * T, hd) * hd**-0.5

    # 2. Compare them with the prompt's keys. All G completions share these, so this is one product.
    stacked = q.flatten(2, 3)  # (B, nk, G r T, hd)
    prompt_scores = (stacked @ prompt_k.mT).unflatten(2, (G, -1))  # (B, nk, G, r T, S)
    prompt_scores = prompt_scores.masked_fill(padding, -torch.inf)

    # 3. Compare them with the keys of their own completion.
    own_scores = (q @ own_k.mT).masked_fill(future, -torch.inf)  # (B, nk, G, r T, slots)

    # 4. Let one softmax distribute the attention over both. PyTorch sums it in float32.
    weights = torch.cat((prompt_scores, own_scores), dim=-1).softmax(-1)
    prompt_weights, own_weights = weights[..., :S], weights[..., S:]

    # 5. Average the values: those of the prompt in one product again, and those of each completion.
    prompt_part = (prompt_weights.flatten(2, 3) @ prompt_v).unflatten(2, (G, -1))  # (B, nk, G, r T, hd)
    y = prompt_part + own_weights @ own_v

    # 6. Undo step 1.
    y = y.view(B, nk, G, r, T, hd)
    y = y.permute(0, 2, 4, 1, 3, 5)  # (B, G, T, nk, r, hd)
    return y.reshape(B, G, T, nq, hd)


class Decoder:
    """G completions of B prompts while they are sampled, and the step that adds one token to each.

    tokens (B, G, max_new)   the tokens so far; the rest is filled with a stop token
    newest (1,)              index of the newest token
    alive (B, G, 1)          False for a completion that has ended
    uniform (B G, 1)         random numbers for the next draw
    completion_kv (layers, 2, B, nk, G, slots, hd)   keys and values of the tokens: their KV cache

    A step changes these tensors in place and returns nothing, so that a GPU can record it as a graph.
    """

    def __init__(self, policy, prefill, group, max_new, temperature):
        self.policy, self.prefill, self.temperature = policy, prefill, temperature
        k, device = prefill.prompt_kv[0][0], policy.embed.device
        B, nk, _, hd = k.shape
        self.stop = int(policy.ends.nonzero()[0])
        self.goes_on = ~policy.ends  # (V,): True for a token after which a completion goes on

        self.tokens = torch.full((B, group, max_new), self.stop, device=device)
        self.alive = torch.ones(B, group, 1, dtype=torch.bool, device=device)
        self.newest = torch.zeros(1, dtype=torch.long, device=device)
        self.uniform = torch.zeros(B * group, 1, device=device)

        # Attention reads every slot, used or not. On a CPU we start with few and add more, which is faster.
        # On a GPU all are there from the start: a graph needs tensors that stay where they are.
        slots = max_new
        if device.type == "cpu":
            slots = 16
        self.completion_kv = k.new_zeros(len(policy.blocks), 2, B, nk, group, slots, hd)

    def step(self):
        """Run the newest token of every completion, which stores its keys and values; choose the next one."""
        token = self.tokens.index_select(2, self.newest)  # (B, G, 1)
        h = self.policy.extend(token, self.prefill, self.newest, self.completion_kv)  # (B, G, 1, d)
        self.newest.add_(1)
        self.choose(h[:, :, 0])

    def choose(self, h):
        """Sample the token that comes after the hidden states h (B, G, d), and write it at `newest`."""
        logits = self.policy.logits(h.flatten(0, 1))  # (B G, V)
        token = sample(logits, self.temperature, self.uniform).view_as(self.alive)
        self.tokens.index_copy_(2, self.newest, token)
        self.alive.logical_and_(self.goes_on[token])

    def make_room(self, used):
        """Make sure that there are slots for `used` tokens. Makes a new tensor: not for a recorded graph."""
        slots = self.completion_kv.shape[-2]
        if used > slots:
            self.completion_kv = F.pad(self.completion_kv, (0, 0, 0, bucket(used) - slots))

    def result(self):
        """tokens and mask (B, G, T), see `Policy.generate`."""
        # A token belongs to the completion if no stop token comes before it. Compare is_stop with its running
        # sum. For example is_stop 0 0 1 0 1 has the running sum 0 0 1 1 2: the two are equal up to and
        # including the first stop token.
        is_stop = self.policy.ends[self.tokens].long()
        mask = is_stop.cumsum(-1) == is_stop

        # Cut off what comes after the longest completion.
        longest = int(mask.sum(-1).max())
        T = min(self.tokens.shape[-1], bucket(longest))
        tokens = self.tokens.masked_fill(~mask, self.stop)
        return tokens[..., :T], mask[..., :T]


def sample(logits, temperature, uniform):
    """Draw one token id for each row of logits (n, V), or take the likeliest if the temperature is 0.

    The distribution is softmax(logits / temperature), without top-k and top-p, because the loss is about
    exactly this distribution. uniform (n, 1) holds random numbers in [0, 1). The drawn token is the one at
    which the sum of the probabilities, from token 0 on, reaches 1 - uniform:

        probabilities 0.2, 0.5, 0.3   sums 0.2, 0.7, 1.0   uniform 0.4   0.2 < 0.6 <= 0.7, so token 1

    This takes one random number for a row; torch.multinomial takes V of them. No token of probability 0 is
    drawn, because 1 - uniform is above 0.
    """
    if temperature == 0:
        return logits.argmax(-1)

    # A CPU works on a few rows at a time, as many as its cache holds.
    n_rows = 16
    if logits.is_cuda:
        n_rows = len(logits)

    tokens = []
    for some_logits, threshold in zip(logits.split(n_rows), (1 - uniform).split(n_rows)):
        probabilities = torch.softmax(some_logits.float() / temperature, dim=-1)
        cumulative = probabilities.cumsum(-1)  # (rows, V)
        total = cumulative[:, -1:]  # 1, but for rounding
        tokens.append(torch.searchsorted(cumulative, threshold * total)[:, 0])
    return torch.cat(tokens).clamp(max=logits.shape[-1] - 1)  # NaN gives V; training skips that step


class TokenLogprob(torch.autograd.Function):
    """log softmax(h W' / temperature)[target] and the entropy of n tokens, without a tensor of size (n, V).

    h (n, d), weight W (V, d), targets (n,) -> logp (n,), entropy (n,) in nats, the entropy without gradient.

    W is frozen, and a log-probability depends only on its own row of h. So the gradient is one vector (d,)
    for each token:

        d logp / d h = (W[target] - softmax(h W' / temperature) W) / temperature

    The forward pass computes these vectors, because it has the softmax of each chunk in memory. The backward
    pass would need all softmaxes, (n, V) numbers, or would have to compute them a second time. Forward saves
    the vectors (n, d), and backward multiplies each by the gradient of its log-probability.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, chunk):
        wants_gradient = ctx.needs_input_grad[0]
        grad = torch.empty_like(h) if wants_gradient else None
        logp, entropy = [], []
        n_rows = 16  # a CPU works on a few rows of a chunk at a time, as many as its cache holds
        if h.is_cuda:
            n_rows = chunk

        for start in range(0, len(h), chunk):
            # 1. Compute the logits of one chunk, (chunk, V).
            logits = frozen_linear(h[start:start + chunk], weight)
            chunk_targets = targets[start:start + chunk, None]

            for rows, target in zip(logits.split(n_rows), chunk_targets.split(n_rows)):
                # 2. Take the softmax in float32. (If the logits are float32, z is the same memory.)
                z = rows.float().div_(temperature)
                p = z.softmax(-1)

                # 3. log p = z - logsumexp, so logsumexp = z - log p, for any token. Take the likeliest one,
                #    whose p is never 0. This is cheaper than a sum of V exponentials.
                logsumexp = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
                logp.append((z.gather(1, target) - logsumexp)[:, 0])

                # 4. Entropy = -sum p log p = logsumexp - sum p z.
                entropy.append(logsumexp[:, 0] - torch.linalg.vecdot(p, z))

                # 5. Write p - onehot(target) over the logits, which are not needed any more. `rows` is a
                #    view, so `logits` itself changes.
                if wants_gradient:
                    minus_one = torch.full_like(logsumexp, -1.0)
                    rows.copy_(p.scatter_add_(1, target, minus_one))

            # 6. The gradient is (onehot - p) W / temperature.
            if wants_gradient:
                p_minus_onehot = logits
                grad[start:start + chunk] = frozen_matmul(p_minus_onehot, weight) / -temperature
                del p_minus_onehot  # it would keep this chunk in memory beside the next one

        logp, entropy = torch.cat(logp), torch.cat(entropy)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, _):
        (grad,) = ctx.saved_tensors
        d_h = (d_logp[:, None] * grad).to(grad.dtype)
        return d_h, None, None, None, None


# -- Plumbing. Nothing below is about the method; skip it at first reading.

def bucket(n):
    """n rounded up: to a power of two, above 16 to a multiple of 16, above 128 to a multiple of 64.

    Libraries such as oneDNN keep a compiled kernel for each shape that they have seen. Few different shapes
    cost little memory and little compiling.
    """
    if n <= 16:
        return 1 << (n - 1).bit_length()
    step = 64
    if n <= 128:
        step = 16
    return math.ceil(n / step) * step


def capture_graph(step, device):
    """Record step() as a CUDA graph and return the function that replays it.

    The CPU starts every operation of PyTorch by itself. For the thousand small operations of a decoding step
    that takes longer than the operations do. A graph starts them all at once. It repeats the same operations
    on the same addresses, so step must work in place, and must not draw random numbers or wait for a result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()  # is recorded, not run
    return graph.replay


def pick_dtype(device, n_params):
    """The dtype for the frozen weights of a model with n_params parameters.

    A small model gets float32, a larger one bfloat16. If the device does not compute in bfloat16, the larger
    one gets float16 on a CUDA GPU and float32 on any other device.
    """
    if n_params < SMALL:
        return torch.float32
    if computes_in_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


# float16 holds no number above 65,504 and none below 6e-8. Hidden states of large models exceed the first. If
# a loss is divided by thousands of tokens, its gradients fall below the second. So only the large frozen
# matrices of a float16 policy are float16. Everything else is float32: hidden states, keys and values, LoRA
# and all gradients. No loss scale is needed.

ROW_LENGTH = 32.0
LONGEST = 65504 / ROW_LENGTH  # 2047. Rows and columns of trained matrices are much shorter.


def frozen_linear(x, weight, bias=None):
    """x W' + bias, with a gradient for x alone.

    x (n, in) has the dtype of W (out, in), or is float32 where W is float16.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    y = Float16Linear.apply(x, weight)
    return y if bias is None else y + bias


def frozen_matmul(x, weight):
    """x W, where x (n, out) has the dtype of W (out, in), or is float32 where W is float16."""
    if x.dtype == weight.dtype:
        return x @ weight
    return float16_product(x, weight)


class Float16Linear(torch.autograd.Function):
    """x W' for float32 x (n, in) and frozen float16 W (out, in). Result and gradient are float32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return float16_product(x, weight.T)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return float16_product(dy, weight), None


def float16_product(x, matrix):
    """x (n, in) float32 @ matrix (in, out) float16 -> (n, out) float32, multiplied in float16.

    Every row of x is first scaled to the length 32, however large or small it is, and the product is scaled
    back. In between, no number of the row is above 32, and no number of the product is above 32 times the
    length of a column of the matrix (Cauchy-Schwarz). float16 holds that if columns are shorter than LONGEST.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.clamp(min=1e-20) / ROW_LENGTH  # a row of zeros stays zero
    return ((x / scale).half() @ matrix).float() * scale


def fits_float16(tensor):
    """True if all rows and columns of a matrix are short enough for `float16_product`, which uses both."""
    for dim in (0, 1):
        lengths = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float32)
        if not (lengths < LONGEST).all():
            return False
    return True


def policy_config(folder):
    """The config.json of a policy, with three things added that may not be in it.

    head_dim: numbers in one head. rotary: the module that computes rotary angles. stop: ids of stop tokens.
    Raises ValueError for a model that this file cannot run. `read_weights` checks the tensors.
    """
    # Read it, and accept known architectures only.
    with loading("config", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{folder} is of architecture {config.model_type!r}, but a policy is one of "
                         f"{', '.join(ARCHITECTURES)}: name another --policy")

    # Check the numbers that no tensor's shape shows.
    with loading("config", folder):
        if not getattr(config, "head_dim", None):
            config.head_dim = config.hidden_size // config.num_attention_heads
        largest = dict(num_hidden_layers=1000, head_dim=2**20, max_position_embeddings=2**20)
        for name, limit in largest.items():
            if not 1 <= getattr(config, name) <= limit:
                raise ValueError(f"{name} is not from 1 to {limit:,}")
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
        if not 0 < config.rms_norm_eps < 1:
            raise ValueError("rms_norm_eps is not between 0 and 1")

        # Make the module that computes the rotary angles.
        rope_type = config.rope_parameters.get("rope_type", "default")
        config.rotary = LlamaRotaryEmbedding(config)
        scaling = config.rotary.attention_scaling
        if not (config.rotary.inv_freq.isfinite().all() and math.isfinite(scaling)):
            raise ValueError(f"{config.rope_parameters} gives angles that are not finite")

    # Refuse what is not written in this file.
    if config.hidden_act != "silu":
        raise ValueError(f"{folder} has the activation {config.hidden_act!r}, but a policy has 'silu': "
                         "name another --policy")
    if rope_type not in ROPES:
        raise ValueError(f"{folder} has rope scaling {rope_type!r}, but a policy has one of "
                         f"{', '.join(ROPES)}: name another --policy")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{folder} has sliding-window attention, which a policy may not have: "
                         "name another --policy")
    config.stop = stop_tokens(folder, config)
    return config


def read_weights(name, folder, config, dtype, device):
    """{Hugging Face's name: tensor} of a policy, converted to `dtype`.

    These are exactly the tensors that its config.json implies. Raises ValueError for a tensor that is
    missing, that has another shape or is quantized, or that is not expected: it may be a scale, and others
    are wrong without it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a policy cannot be {dtype}: use float32, bfloat16 or float16")

    # Read all files. Drop "model." from the names, because the files of a model without a head lack it.
    files = weight_files(folder)
    check_weight_headers(files)
    tensors = {}
    with loading("model", name):
        for path in files:
            for key, tensor in load_file(path, device=str(device)).items():
                tensors[key.removeprefix("model.")] = tensor

        # Let transformers say which tensors there should be. On the device "meta" they take no memory.
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config).state_dict()

    # Where the head is tied to the embeddings, it is the embeddings, even if the files hold a head too.
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        tensors.pop("lm_head.weight", None)

    # Check every tensor and convert it.
    weights = {}
    for key, model_tensor in expected.items():
        tensor = tensors.pop(key.removeprefix("model."), None)
        if tensor is None:
            raise ValueError(f"{name}: tensor {key} is not in its files: fetch the model again")
        if tensor.shape != model_tensor.shape:
            raise ValueError(f"{name}: tensor {key} has shape {tuple(tensor.shape)}, but its config.json "
                             f"implies {tuple(model_tensor.shape)}: fetch the model again")
        weights[key] = convert(tensor, dtype)
        if weights[key].dtype == torch.float16 and not fits_float16(weights[key]):
            raise ValueError(f"{name}: tensor {key} is too large for float16: use --dtype float32")

    # Refuse tensors that were not expected. Old files hold rotary frequencies, which are not needed.
    unexpected = [key for key in tensors if not key.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise ValueError(f"{name}: its files have a tensor {unexpected[0]}, which its config.json does not "
                         "imply: name a model that is not quantized, or fetch it again")
    return weights


def convert(tensor, dtype):
    """A tensor in `dtype`. For float16 only matrices are converted: norms and biases are small."""
    if dtype == torch.float16 and tensor.dim() == 1:
        dtype = torch.float32
    return tensor.to(dtype)
