"""
The policy: a Llama / Qwen2 / Qwen3 decoder in one file, with LoRA, a soft prefix and a shared prompt.

Three things are here that AutoModelForCausalLM does not give together, and they are why this file exists:

1. A soft prefix. Context tokens C (B, L, d) stand before the prompt x in embedding space: [C ; x].
2. A shared prompt. GRPO samples G completions of one prompt. It is run ONCE (`prefill`); its keys and values
   serve all G in sampling (`generate`) and again, with gradient, in scoring (`logprobs`).
3. No (B, T, V) tensor. Log-probabilities are taken in chunks, over completion tokens only (`TokenLogprob`).

Shapes: B prompts, G completions of each, P prompt tokens, L prefix vectors, S = L + P, T completion tokens,
d width, H query heads, K key heads, R = H / K query heads that share one key head, D head size, V vocabulary.
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

from experts import find_model, loading, stop_tokens, weight_files

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Llama and SmolLM2; Qwen2 and Qwen2.5; Qwen3
ROPES = ("default", "linear", "llama3", "yarn")  # the other kinds change with the length of the text
GRAPH_FROM = int(os.environ.get("N_MUSKETEERS_GRAPH_FROM", 32))  # tokens a completion; 1000000: no CUDA graph

class LoRALinear(nn.Module):
    """Linear layers that read the same input, fused into one product, with LoRA (2106.09685) on each.

    y = x W' + scale (x A') B'. W (out, in) is frozen. Each of the n parts has a rank-r pair of its own: the A
    are stacked, (n r, in), and the B are diagonal blocks of one matrix, so n adapters cost two products.
    A starts random and B at zero: at the start y is exactly x W'.
    """

    def __init__(self, weights, biases, rank, alpha):
        super().__init__()
        self.weight = nn.Buffer(torch.cat(weights))  # (out, in)
        self.bias = None if biases[0] is None else nn.Buffer(torch.cat(biases))
        self.adapted = rank > 0  # see Policy.lora_disabled
        if rank:
            self.scale = alpha / rank
            # fp32 master weights: an update of 1e-4 of a weight is lost in bf16, which keeps 8 bits
            width, device = self.weight.shape[1], self.weight.device
            self.A = nn.Parameter(torch.randn(rank * len(weights), width, device=device) / width**0.5)
            self.B = nn.ParameterList(torch.zeros(len(w), rank, device=w.device) for w in weights)

    def pair(self):
        """The block-diagonal scale * B (out, n r) and A (n r, in), in the dtype of the weight."""
        B = self.B[0] if len(self.B) == 1 else torch.block_diag(*self.B)
        return (self.scale * B).to(self.weight.dtype), self.A.to(self.weight.dtype)

    def forward(self, x):
        rows = x.flatten(0, -2)  # (n, in)
        y = F.linear(rows, self.weight, self.bias)  # (n, out)
        if self.adapted:
            B, A = self.pair()
            y.addmm_(rows @ A.T, B.T)
        return y.unflatten(0, x.shape[:-1])

def rotate(x, cos, sin):
    """Rotary position embedding (2104.09864), half-split: x (..., D), cos and sin (..., D / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of gate and up side by side, (..., 2 f) -> (..., f) (2002.05202). Only the input is
    kept for the backward pass, two thirds of what autograd would keep."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)), dim=-1)

class Block(nn.Module):
    """Pre-norm attention and SwiGLU. `attend` decides which token sees which: it is the one thing that
    differs between reading a prompt and continuing it."""

    def __init__(self, config, weight, layer, rank, alpha):
        """weight(name): a buffer by its Hugging Face name, or None; layer: how this layer's names begin."""
        super().__init__()
        self.eps = config.rms_norm_eps
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def linear(*names):
            biases = [weight(f"{layer}.{name}.bias") for name in names]
            return LoRALinear([weight(f"{layer}.{name}.weight") for name in names], biases, rank, alpha)

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        self.norm1 = weight(f"{layer}.input_layernorm.weight")
        self.norm2 = weight(f"{layer}.post_attention_layernorm.weight")
        self.q_norm = weight(f"{layer}.self_attn.q_norm.weight")  # Qwen3 alone has these two
        self.k_norm = weight(f"{layer}.self_attn.k_norm.weight")

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def forward(self, x, cos, sin, attend):
        """x (..., T, d); cos and sin broadcast to (..., T, 1, D / 2); attend(q, k, v) -> (..., T, H, D)."""
        heads = self.qkv(self.norm(x, self.norm1)).unflatten(-1, (-1, self.D))  # (..., T, H + 2 K, D)
        qk, v = heads.split((self.H + self.K, self.K), dim=-2)
        if self.q_norm is not None:
            q, k = qk.split((self.H, self.K), dim=-2)
            qk = torch.cat((self.norm(q, self.q_norm), self.norm(k, self.k_norm)), dim=-2)
        q, k = rotate(qk, cos, sin).split((self.H, self.K), dim=-2)
        x = x + self.o(attend(q, k, v).flatten(-2))
        return x + self.down(SwiGLU.apply(self.gate_up(self.norm(x, self.norm2))))

@dataclass
class Prefill:
    """What B prompts leave behind."""
    kv: list  # (keys, values) of each layer, both (B, K, S, D)
    last: torch.Tensor  # (B, d) hidden state of the last real token, before the final norm
    lengths: torch.Tensor  # (B,) real positions, prefix included
    padding: torch.Tensor  # (B, 1, 1, 1, S) True where a position is padding

def bucket(n):
    """n rounded up to a power of two, above 16 to a multiple of 16, above 128 to one of 64. Libraries keep a
    kernel for each new shape: with few shapes neither time nor memory creeps up."""
    if n <= 16:
        return 1 << (n - 1).bit_length()
    step = 16 if n <= 128 else 64
    return math.ceil(n / step) * step

def group_attention(q, own_k, own_v, causal_mask, shared_k, shared_v, padding):
    """G completions attend to their shared prompt and each to its own tokens, in one softmax.

    q (B, G, T, H, D), own_k and own_v (B, K, G, t, D), shared_k and shared_v (B, K, S, D) -> (B, G, T, H, D).
    causal_mask (R T, t): True where an own token lies ahead of the query; padding: see `Prefill`.
    All G R T queries of a prompt meet its keys in ONE matrix product: its keys are not copied G times.
    """
    B, G, T, H, D = q.shape
    K, S = shared_k.shape[1:3]
    R = H // K
    q = q.view(B, G, T, K, R, D).permute(0, 3, 1, 4, 2, 5).reshape(B, K, G, R * T, D) * D**-0.5
    shared = (q.flatten(2, 3) @ shared_k.mT).unflatten(2, (G, -1)).masked_fill(padding, -torch.inf)
    own = (q @ own_k.mT).masked_fill(causal_mask, -torch.inf)  # (B, K, G, R T, t)
    p = torch.cat((shared, own), dim=-1).softmax(-1)  # (B, K, G, R T, S + t), summed in fp32
    y = (p[..., :S].flatten(2, 3) @ shared_v).unflatten(2, (G, -1)) + p[..., S:] @ own_v
    return y.view(B, K, G, R, T, D).permute(0, 2, 4, 1, 3, 5).reshape(B, G, T, H, D)

class TokenLogprob(torch.autograd.Function):
    """log softmax(h W' / temperature)[target] of n tokens, in chunks, so that (n, V) never exists.

    W is frozen, so the only gradient wanted is that of each log-probability with respect to its own h (d,):
    (W[target] - softmax W) / temperature. It is formed while the chunk's logits are at hand; the backward
    pass is one multiplication, and no logits are kept. Also returns the entropy, without gradient.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, chunk):
        logp, entropy = [], []
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        rows = chunk if h.is_cuda else 16  # as many rows of logits as a processor's cache holds
        for i in range(0, len(h), chunk):
            logits = F.linear(h[i:i + chunk], weight)  # (chunk, V)
            for few, target in zip(logits.split(rows), targets[i:i + chunk, None].split(rows)):
                z = few.float().div_(temperature)
                p = z.softmax(-1)
                logsumexp = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # log p = z - logsumexp
                logp.append((z.gather(1, target) - logsumexp)[:, 0])
                entropy.append(logsumexp[:, 0] - torch.linalg.vecdot(p, z))
                if grad is not None:
                    few.copy_(p.scatter_add_(1, target, torch.full_like(logsumexp, -1.0)))  # p minus one-hot
            if grad is not None:
                grad[i:i + chunk] = logits @ weight / -temperature
        logp, entropy = torch.cat(logp), torch.cat(entropy)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, _):
        (grad,) = ctx.saved_tensors
        return (d_logp[:, None] * grad).to(grad.dtype), None, None, None, None

def sample(logits, temperature, u):
    """One token id for each row of logits (n, V): the most likely one at temperature 0, else a draw from
    softmax(logits / temperature). No top-k or top-p: the loss is about this very distribution.
    The draw is the token at which the summed probability passes 1 - u, u (n, 1) uniform: one random number a
    row, where torch.multinomial takes V. As 0 < 1 - u <= 1, no token of probability 0 is drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    rows = len(logits) if logits.is_cuda else 16  # on a CPU a few rows at a time stay in its cache
    tokens = []
    for few, share in zip(logits.split(rows), (1 - u).split(rows)):
        edges = torch.softmax(few.float() / temperature, dim=-1).cumsum(-1)  # (rows, V)
        tokens.append(torch.searchsorted(edges, share * edges[:, -1:])[:, 0])
    return torch.cat(tokens).clamp(max=logits.shape[-1] - 1)  # for NaN logits, whose step is skipped

def capture(step, device):
    """`step` as one CUDA graph: a thousand kernels by one launch. It is recorded, not run, reads and writes
    the same tensors each time, and nothing in it may ask the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay

class Policy(nn.Module):
    """The decoder. Its only parameters are LoRA's. Made by `Policy.from_pretrained`."""

    def __init__(self, config, weight, rank=8, alpha=16.0, neutral="zero"):
        """config: see `policy_config`; weight: see `Block`; neutral: the vector from which the prefix is
        measured, in standard deviations of the embeddings, "zero" (paper) or the "mean" embedding. The first
        RMSNorm scales every vector to unit size, so near zero even a faint prefix arrives as L strong
        vectors; near the mean embedding of a small policy a faint prefix stays faint."""
        super().__init__()
        self.config, self.window = config, config.max_position_embeddings
        self.embed = weight("model.embed_tokens.weight")  # (V, d)
        self.head = self.embed if config.tie_word_embeddings else weight("lm_head.weight")
        self.norm = weight("model.norm.weight")
        self.blocks = nn.ModuleList(Block(config, weight, f"model.layers.{i}", rank, alpha)
                                    for i in range(config.num_hidden_layers))
        positions = torch.arange(self.window + 64)[None]  # padding may lie beyond the window
        cos, sin = config.rotary(self.embed[0].cpu(), positions)  # (1, positions, D), both halves alike
        self.cos = nn.Buffer(cos[0, :, :config.head_dim // 2])
        self.sin = nn.Buffer(sin[0, :, :config.head_dim // 2])
        rows = self.embed[:: max(1, len(self.embed) // 4096)].float()
        self.neutral = nn.Buffer(rows.mean(0) * (neutral == "mean"))
        self.embed_std = nn.Buffer(rows.std())
        self.stop_at(config.stop)

    def stop_at(self, ids):
        """A completion ends with the first of these token ids; a table (V,), as a look-up costs nothing."""
        self.ends = nn.Buffer(self.embed.new_zeros(len(self.embed), dtype=torch.bool))
        self.ends[ids] = True

    @classmethod
    def from_pretrained(cls, name, rank=8, alpha=16.0, dtype=torch.float32, device="cpu", neutral="zero"):
        """The policy in folder or hub repository `name`, from safetensors and without remote code. Raises
        ValueError, one sentence with the mend, for an unknown architecture or a missing or wrong tensor."""
        folder, _ = find_model(name)
        config = policy_config(folder)
        with loading("model", name):
            tensors = {key.removeprefix("model."): tensor for path in weight_files(folder)
                       for key, tensor in load_file(path, device=str(device)).items()}
            with torch.device("meta"):  # what config.json implies, without memory
                expected = AutoModelForCausalLM.from_config(config).state_dict()

        def weight(key):
            tensor = tensors.pop(key.removeprefix("model."), None)  # a bare backbone's names lack the prefix
            shape = tuple(expected[key].shape) if key in expected else None
            if tensor is None and shape is None:
                return None
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(f"{name}: of tensor {key} its config.json says {shape} floating-point "
                                 "numbers (None: not there): fetch the model again, not quantised")
            return nn.Buffer(tensor.to(dtype))

        return cls(config, weight, rank, alpha, neutral).to(device)

    def prefill(self, tokens, lengths, prefix=None):
        """Run prompts once: tokens (B, P) padded on the right, lengths (B,) of the real ones, prefix None or
        (B, L, d) in standard deviations of the embeddings. Returns a `Prefill`."""
        x = F.embedding(tokens, self.embed)  # (B, P, d)
        if prefix is not None:
            x = torch.cat(((self.neutral + self.embed_std * prefix).to(x.dtype), x), dim=1)  # (B, S, d)
            lengths = lengths + prefix.shape[1]
        S = x.shape[1]
        exact = torch.float32 if x.device.type == "cpu" else x.dtype  # a CPU's kernel is slow in bfloat16
        kv = []

        def attend(q, k, v):  # causality alone masks the padding here: it stands behind the real tokens
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
            kv.append((k, v))  # (B, K, S, D)
            q, k, v = q.transpose(1, 2).to(exact), k.to(exact), v.to(exact)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return y.to(x.dtype).transpose(1, 2)

        for block in self.blocks:
            x = block(x, self.cos[:S, None], self.sin[:S, None], attend)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]
        padding = torch.arange(S, device=x.device) >= lengths.view(-1, 1, 1, 1, 1)
        return Prefill(kv, last, lengths, padding)

    def extend(self, tokens, cache, start=0, memory=None):
        """Hidden states (B, G, T, d) of completion tokens (B, G, T) from place `start` on. memory: keys and
        values of the tokens before, (layers, 2, B, K, G, places, D); these add theirs. None: none before."""
        R = self.config.num_attention_heads // self.config.num_key_value_heads
        reach = tokens.shape[-1] if memory is None else memory.shape[5]
        places = torch.arange(reach, device=tokens.device)
        now = start + places[:tokens.shape[-1]]
        causal_mask = places > now.repeat(R)[:, None]  # (R T, reach), the queries' order in group_attention
        positions = (cache.lengths[:, None] + now)[:, None, :, None]  # (B, 1, T, 1)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, T, 1, D / 2)
        x = F.embedding(tokens, self.embed)
        for i, block in enumerate(self.blocks):

            def attend(q, k, v, i=i):
                k, v = k.permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4)  # (B, K, G, T, D)
                if memory is not None:
                    k, v = memory[i].index_copy_(4, now, torch.stack((k, v)))
                return group_attention(q, k, v, causal_mask, *cache.kv[i], cache.padding)

            x = block(x, cos, sin, attend)
        return x

    @torch.no_grad()
    def generate(self, cache, group, max_new, temperature=1.0, generator=None):
        """Sample `group` completions of each prompt in `cache`. Returns tokens and mask (B, G, T), mask True
        up to and including the first stop token; T <= max_new is where the longest one ends, in buckets.
        A step works in place on tensors that stay where they are, so that a GPU repeats it as one graph."""
        (B, K, _, D), device = cache.kv[0][0].shape, self.embed.device
        on_cpu = device.type == "cpu"
        room = 16 if on_cpu else max_new  # places for own keys and values; a CPU adds to them, to read less
        memory = self.embed.new_zeros(len(self.blocks), 2, B, K, group, room, D)
        stop, goes_on = int(self.ends.nonzero()[0]), ~self.ends
        tokens = torch.full((B, group, max_new), stop, device=device)
        alive = torch.ones(B, group, 1, dtype=torch.bool, device=device)
        place = torch.zeros(1, dtype=torch.long, device=device)  # of the newest token
        u = torch.zeros(B * group, 1, device=device)

        def draw(h):  # (B, G, d)
            token = sample(self.logits(h.flatten(0, 1)), temperature, u).view(B, group, 1)
            tokens.index_copy_(2, place, token)
            alive.logical_and_(goes_on[token])

        def step():  # the newest token's keys and values are kept, then the next one is drawn
            h = self.extend(tokens.index_select(2, place), cache, place, memory)[:, :, 0]
            place.add_(1)
            draw(h)

        with self.lora_merged():
            for t in range(max_new):
                if (on_cpu or t % 8 == 0) and not alive.any():  # to ask a GPU makes the host wait
                    break
                if temperature:
                    u.uniform_(generator=generator)
                if t == 0:
                    draw(cache.last[:, None].expand(-1, group, -1))
                    continue
                if t > memory.shape[5]:  # on a CPU alone: what a graph works on must stay where it is
                    memory = F.pad(memory, (0, 0, 0, bucket(t) - memory.shape[5]))
                if t == 2 and self.embed.is_cuda and max_new >= GRAPH_FROM:  # the first step has warmed up
                    step = capture(step, device)
                step()
        ended = self.ends[tokens].long()
        mask = ended.cumsum(-1) == ended  # no end before this token
        longest = min(max_new, bucket(int(mask.sum(-1).max())))
        return tokens.masked_fill(~mask, stop)[..., :longest], mask[..., :longest]

    def logits(self, h):
        """Logits (n, V) of hidden states (n, d)."""
        return F.linear(F.rms_norm(h, (h.shape[-1],), self.norm, self.config.rms_norm_eps), self.head)

    def logprobs(self, cache, tokens, mask, temperature=1.0, chunk=256):
        """Log-probability and entropy (nats), each (B, G, T), of completion tokens; zero where mask is False.
        The gradient flows through the cached keys and values into prompt, prefix and router."""
        h = cache.last[:, None, None].expand(-1, tokens.shape[1], 1, -1)  # predicts the first token
        if tokens.shape[-1] > 1:
            h = torch.cat((h, self.extend(tokens[..., :-1], cache)), dim=2)
        h, targets = h[mask], tokens[mask]  # (n, d), (n,): no padding meets the head, but for the bucket's
        extra = bucket(len(h)) - len(h)
        h = F.rms_norm(F.pad(h, (0, 0, 0, extra)), (h.shape[-1],), self.norm, self.config.rms_norm_eps)
        logp, entropy = TokenLogprob.apply(h, self.head, F.pad(targets, (0, extra)), temperature, chunk)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)

    def adapters(self):
        return [module for module in self.modules() if isinstance(module, LoRALinear)]

    def lora_merged(self):
        """LoRA within the weights, W + scale B A in a copy that is rounded like W. While sampling it does not
        change, and two thin products at each token and layer cost a sixth of a decode step."""
        return self.lora_disabled(merged=True)

    @contextlib.contextmanager
    def lora_disabled(self, merged=False):
        """LoRA's products are left out: the frozen policy, or (merged) the one with LoRA in its weights."""
        layers = [layer for layer in self.adapters() if layer.adapted]
        frozen = [layer.weight for layer in layers]
        try:
            for layer in layers:
                if merged:
                    layer.weight = torch.addmm(layer.weight, *layer.pair())
                layer.adapted = False
            yield
        finally:
            for layer, weight in zip(layers, frozen):
                layer.weight, layer.adapted = weight, True

# -- reading a model's folder

def policy_config(folder):
    """The config.json of a policy, with `head_dim`, `rotary` (its angles' module) and `stop` filled in.
    Raises ValueError for what this file cannot run. Sizes that a tensor has are checked with it."""
    with loading("config", folder):
        c = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if c.model_type not in ARCHITECTURES:
        raise ValueError(f"{folder} is of architecture {c.model_type!r}, but a policy is one of "
                         f"{', '.join(ARCHITECTURES)}: name another --policy")
    with loading("config", folder):
        c.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        most = dict(num_hidden_layers=1000, head_dim=2**20, max_position_embeddings=2**20)
        wrong = [name for name in most if not 1 <= getattr(c, name) <= most[name]]
        if wrong or c.num_attention_heads % c.num_key_value_heads or not 0 < c.rms_norm_eps < 1:
            raise ValueError(f"no model has this {wrong or 'number of heads or rms_norm_eps'}")
        kind = c.rope_parameters.get("rope_type", "default")
        c.rotary = LlamaRotaryEmbedding(c)
        if not (c.rotary.inv_freq.isfinite().all() and math.isfinite(c.rotary.attention_scaling)):
            raise ValueError(f"{c.rope_parameters} gives angles that are not finite")
    sliding = "sliding_attention" in (getattr(c, "layer_types", None) or ())
    if c.hidden_act != "silu" or sliding or kind not in ROPES:
        raise ValueError(f"{folder} has {c.hidden_act}, rope scaling {kind!r} or a sliding window, not silu, "
                         f"one of {', '.join(ROPES)} and none: name another --policy")
    c.stop = stop_tokens(folder, c)
    return c
