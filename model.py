"""
The policy: a decoder-only transformer in the nanoGPT manner, with LoRA (lora.py), a soft prefix and a shared
prompt.

It loads ordinary Hugging Face folders of the Llama family (SmolLM2, Llama 3.x), Qwen2/2.5 and Qwen3; these
differ only in switches of their configuration (attention bias, q/k norm, rope scaling, tied head). Three
things are here that a library model does not give together, and they are why this file exists:

1. A soft prefix. Context tokens C (B, L, d) stand before the prompt in embedding space: [C ; x] instead of x.
2. A shared prompt. GRPO samples G completions for one prompt. Prompt and prefix are run ONCE (`prefill`);
   their keys and values serve all G rows while sampling (`generate`) and again, with gradient, while scoring
   (`logprobs`).
3. No (B, T, V) tensor. Log-probabilities are taken in chunks, over completion tokens only (`TokenLogprob`).

Shapes: B prompts, G completions of each, P prompt tokens, L prefix vectors, S = L + P, T completion tokens, d
width, H query heads, K key/value heads, R = H / K query heads that share one key/value head, D head width, V
vocabulary.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from folders import read_config, tensor_shapes, weight_files
from lora import LoRALinear, blocks, prepare, product


def rotate(x, cos, sin):
    """Rotary position embedding (2104.09864), in the half-split layout of Hugging Face: x (..., D), cos/sin
    broadcast."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of gate and up side by side (..., 2 f) (2002.05202). Nothing else is kept for the
    backward pass, a third less than autograd would; it takes a few rows at a time, which stay in a CPU's
    cache."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, rows = torch.empty_like(x), 4096 if x.is_cuda else 128
        for part, d, out in zip(*(t.flatten(0, -2).split(rows) for t in (x, dy, dx))):
            gate, up = part.chunk(2, -1)
            d_gate, d_up = out.chunk(2, -1)
            d_gate.copy_(torch.ops.aten.silu_backward(d * up, gate))
            d_up.copy_(d * F.silu(gate))
        return dx


class Block(nn.Module):
    """Pre-norm attention and SwiGLU. Who attends to what is decided by `attend`, the one thing that differs
    between reading a prompt and continuing it."""

    def __init__(self, config, weight, rank, alpha):
        super().__init__()
        self.D, self.eps, self.fused = config["head_dim"], config["rms_norm_eps"], None
        self.H, self.K = config["num_attention_heads"], config["num_key_value_heads"]

        def linear(*names):
            biases = [weight(f"{n}.bias", optional=True) for n in names]
            return LoRALinear([weight(f"{n}.weight") for n in names], biases, rank, alpha)

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        for ours, theirs in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"),
                             ("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm")):
            value = weight(f"{theirs}.weight", optional=theirs.startswith("self_attn"))
            self.register_buffer(ours, value, persistent=False)

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def heads(self, x, cos, sin):
        """Of x (..., T, d) the queries (..., T, H, D), keys and values (..., T, K, D); cos, sin broadcast to
        (..., T, 1, D / 2)."""
        heads = self.qkv(self.norm(x, self.norm1)).unflatten(-1, (-1, self.D))  # (..., T, H + 2 K, D)
        qk, v = heads.split((self.H + self.K, self.K), -2)
        if self.q_norm is not None:
            q, k = qk.split((self.H, self.K), -2)
            qk = torch.cat((self.norm(q, self.q_norm), self.norm(k, self.k_norm)), -2)
        q, k = rotate(qk, cos, sin).split((self.H, self.K), -2)
        return q, k, v

    def rest(self, x, y):
        """x (..., T, d) with what attention found, y (..., T, H, D), and the MLP's answer to it."""
        x = x + self.o(y.flatten(-2))
        return x + self.down(SwiGLU.apply(self.gate_up(self.norm(x, self.norm2))))

    def forward(self, x, cos, sin, attend):
        """x (..., T, d); attend(q, k, v) -> (..., T, H, D)."""
        fused = x.shape[-2] == 1 and not torch.is_grad_enabled()
        heads, rest = self.fused if self.fused and fused else (self.heads, self.rest)
        return rest(x, attend(*heads(x, cos, sin)))


@dataclass
class Prefill:
    """What a prompt leaves behind: per layer keys and values (B, K, S, D); the hidden state after the last
    real token (B, d), before the final norm; the number of real positions, prefix included (B,); which
    positions are padding (B, 1, 1, 1, S), or None where all prompts are equally long."""

    keys: list
    values: list
    last: torch.Tensor
    lengths: torch.Tensor
    hidden: torch.Tensor | None


def bucket(n):
    """n rounded up to a power of two, above 16 to a multiple of 16, above 128 of 64. Libraries prepare a
    kernel for every new shape (some 100 kB each on a CPU in bf16) and keep it: with few shapes neither time
    nor memory creeps up."""
    step = 16 if n <= 128 else 64
    return 1 << (n - 1).bit_length() if n <= 16 else -(-n // step) * step


def attend_group(q, k_own, v_own, later, k_shared, v_shared, hidden):
    """Attention of G continuations to their shared prompt and each to its own tokens, as one softmax.

    q (B, G, T, H, D); k_own, v_own (B, K, G, t, D); later (T, t) True where an own token lies ahead of the
    query; k_shared, v_shared (B, K, S, D); hidden (B, 1, 1, 1, S) True where a shared position is padding.
    later and hidden may be None where there is nothing to hide. The G * R * T queries of a prompt meet its
    keys in ONE matrix product: no copy of the prompt's keys is made for the group. Returns (B, G, T, H, D).
    """
    B, G, T, H, D = q.shape
    K, S = k_shared.shape[1:3]
    n = H // K * T  # queries of a row that meet one key head
    q = q.view(B, G, T, K, H // K, D).permute(0, 3, 1, 4, 2, 5) * D**-0.5  # (B, K, G, R, T, D)
    shared = (q.reshape(B, K, G * n, D) @ k_shared.transpose(-1, -2)).view(B, K, G, n, S)
    if hidden is not None:
        shared = shared.masked_fill(hidden, -torch.inf)
    own = q.reshape(B, K, G, n, D) @ k_own.transpose(-1, -2)  # (B, K, G, R T, t)
    if later is not None:
        own = own.unflatten(3, (-1, T)).masked_fill(later, -torch.inf).flatten(3, 4)
    p = torch.cat((shared, own), -1).softmax(-1)  # (B, K, G, R T, S + t), accumulated in fp32 by itself
    y = (p[..., :S].reshape(B, K, G * n, S) @ v_shared).view(B, K, G, n, D) + p[..., S:] @ v_own
    return y.view(B, K, G, H // K, T, D).permute(0, 2, 4, 1, 3, 5).reshape(B, G, T, H, D)


class TokenLogprob(torch.autograd.Function):
    """log softmax(h W' / temperature)[target] for n tokens, in chunks, so that (n, V) never exists.

    W is frozen, so the only gradient wanted is that of each log-probability with respect to its own h, one
    vector of width d: (W[target] - softmax W) / temperature. It is formed while the chunk's logits are at
    hand; the backward pass is then one multiplication, and no logits are kept or computed again.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, chunk):
        logp = torch.empty(len(h), device=h.device)
        entropy = torch.empty_like(logp)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        rows, head = chunk if h.is_cuda else 16, prepare(weight, chunk)  # as many rows as a CPU's cache holds
        for i in range(0, len(h), chunk):
            logits = product(h[i:i + chunk], head)  # (chunk, V)
            for j in range(0, len(logits), rows):
                here = logits[j:j + rows]
                part = slice(i + j, i + j + len(here))
                y = targets[part, None]
                z = here.float().div_(temperature)
                p = z.softmax(-1)
                lse = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
                logp[part] = (z.gather(1, y) - lse)[:, 0]
                entropy[part] = lse[:, 0] - torch.linalg.vecdot(p, z)
                if grad is not None:
                    here.copy_(p.scatter_add_(1, y, torch.full_like(lse, -1.0)))  # minus one-hot
            if grad is not None:
                grad[i:i + chunk] = logits @ weight / -temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, _):
        return (d_logp[:, None] * ctx.saved_tensors[0]).to(ctx.saved_tensors[0].dtype), None, None, None, None


def sample(logits, temperature, generator=None):
    """One token id for each row of logits (n, V): the most likely at temperature 0, else drawn from
    softmax(logits / t).

    Inverse transform on two levels: blocks of the vocabulary first, then a token inside the block. It needs
    one uniform number a row and one pass over V, where torch.multinomial needs V exponential draws (half of a
    decode step here). A few rows at a time: on a CPU their probabilities stay in its cache.
    """
    if temperature == 0:
        return logits.argmax(-1)
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    rows = 64 if logits.is_cuda else 16
    return torch.cat([_draw(z, temperature, part) for z, part in zip(logits.split(rows), u.split(rows))])


def _draw(logits, temperature, u, block=256):
    """The token at which the summed probability of logits (n, V) passes the share u (n, 1)."""
    p = torch.softmax(logits.float() / temperature, -1)
    p = F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block))  # (n, blocks, 256)
    mass = p.sum(-1)
    edges = mass.cumsum(-1)  # (n, blocks)
    below = lambda x, top: torch.minimum(x, torch.nextafter(top, torch.zeros_like(top)))  # despite rounding
    u = below(u * edges[:, -1:], edges[:, -1:])
    b = torch.searchsorted(edges, u, right=True)  # (n, 1): the first block whose edge lies above u
    b.clamp_(max=edges.shape[-1] - 1)  # logits that are NaN give any token, and their step is skipped
    inside = p.gather(1, b[..., None].expand(-1, 1, block))[:, 0].cumsum(-1)  # (n, 256)
    rest = below((u - (edges - mass).gather(1, b)).clamp_(min=0), inside[:, -1:])
    token = b * block + torch.searchsorted(inside, rest, right=True)
    return token[:, 0].clamp_(max=logits.shape[-1] - 1)


class Policy(nn.Module):
    """The decoder. Trainable: LoRA only. `Policy.load` makes one from a folder or a hub name."""

    def __init__(self, config, weight, rank=8, alpha=16, neutral="zero"):
        """config: dict, see `read_config`; weight(name, optional=False) -> tensor by its Hugging Face name.

        neutral: where a prefix that says nothing lies: at "zero" (paper) or at the "mean" embedding. The
        first RMSNorm makes every vector unit-sized: near zero a fresh prefix is L random directions, which a
        large policy shrugs off, but one that was taught to read its prefix (tiny) takes for a message.
        """
        super().__init__()
        self.config, self.eps = config, config["rms_norm_eps"]
        embed = weight("model.embed_tokens.weight")
        self.register_buffer("embed", embed, persistent=False)  # (V, d)
        head = embed if config["tie_word_embeddings"] else weight("lm_head.weight")
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("norm", weight("model.norm.weight"), persistent=False)

        def layer(i):
            return lambda name, optional=False: weight(f"model.layers.{i}.{name}", optional)

        self.blocks = nn.ModuleList(
            Block(config, layer(i), rank, alpha) for i in range(config["num_hidden_layers"]))
        reach = config["window"] + 64  # padding of a bucket may lie beyond the window, real tokens never do
        angles = torch.outer(torch.arange(reach).float(), config["inv_freq"])  # (reach, D / 2)
        self.register_buffer("cos", (angles.cos() * config["rope_scale"]).to(embed.dtype), persistent=False)
        self.register_buffer("sin", (angles.sin() * config["rope_scale"]).to(embed.dtype), persistent=False)
        # A prefix is measured from a neutral vector, in units of the embeddings' spread.
        rows = embed[:: max(1, len(embed) // 4096)].float()
        self.register_buffer("neutral", rows.mean(0) * (neutral == "mean"), persistent=False)
        self.register_buffer("spread", rows.std(), persistent=False)
        self.register_buffer("stop", torch.tensor(config["stop"]), persistent=False)

    @classmethod
    def load(cls, name, rank=8, alpha=16, dtype=torch.float32, device="cpu", neutral="zero"):
        """The policy in folder or hub repository `name` ('name@revision' allowed), with its `revision`.

        Raises ValueError, in one sentence with the mend: nothing there, no safetensors, an architecture or
        rope not known, a tensor that is not what config.json says, found before any is read.
        """
        from safetensors import safe_open

        from experts import Expert

        source = Expert(name)
        config = read_config(source.folder)
        shapes, files = tensor_shapes(config), {}
        place = f"cuda:{torch.cuda.current_device()}" if str(device) == "cuda" else str(device)
        for path in weight_files(source.folder):
            f = safe_open(path, framework="pt", device=place)
            files.update(dict.fromkeys(f.keys(), f))

        def weight(key, optional=False):
            for stored in (key, key.removeprefix("model.")):  # a folder of the bare backbone lacks the prefix
                if stored in files:
                    there, (part, what) = files[stored].get_slice(stored), key.split(".")[-2:]
                    want = shapes[part] if what == "weight" else shapes[part][:1]
                    kind, shape = there.get_dtype(), tuple(there.get_shape())
                    if kind not in ("F32", "F16", "BF16") or shape != want:
                        raise ValueError(f"{name}: {key} is {shape} of {kind}, its config.json says {want}: "
                                         "fetch the model again, not quantised")
                    return files[stored].get_tensor(stored).to(dtype)
            if optional:
                return None
            raise ValueError(f"{name} is incomplete, tensor {key} is missing: fetch the model again")

        policy = cls(config, weight, rank, alpha, neutral).to(device)
        policy.revision = source.revision
        return policy

    # -- running
    @property
    def window(self):
        """The longest text in tokens, prefix included."""
        return self.config["window"]

    def prefill(self, tokens, lengths, prefix=None):
        """Run prompts once. tokens (B, P) padded on the right, lengths (B,) of the real ones, prefix (B, L,
        d) or None.

        Padding stands after the real tokens, so causality alone hides it here; `Prefill.lengths` hides it
        later.
        """
        x = F.embedding(tokens, self.embed)  # (B, P, d)
        if prefix is not None:
            x = torch.cat(((self.neutral + self.spread * prefix).to(x.dtype), x), 1)  # (B, S, d)
            lengths = lengths + prefix.shape[1]
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]  # (B, S)
        hidden = padding[:, None, None, None] if bool(padding.any()) else None
        cache = Prefill([], [], None, lengths, hidden)

        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16  # torch's kernel, here a third as fast
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if slow else None

        def attend(own, k, v):
            q, k, v = own.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, S, D)
            k, v = k.contiguous(), v.contiguous()  # every later token's products would copy them again
            cache.keys.append(k)
            cache.values.append(v)
            if later is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return y.transpose(1, 2)
            empty = k[:, :, :0]
            return attend_group(own[:, None], k[:, :, None], v[:, :, None], later, empty, empty, None)[:, 0]

        cos, sin = self.cos[: x.shape[1], None], self.sin[: x.shape[1], None]
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        cache.last = x[torch.arange(len(x), device=x.device), lengths - 1]
        return cache

    def _continue(self, tokens, cache, start, reach, own):
        """Hidden states (B, G, T, d) of continuation tokens (B, G, T) at places start..start+T-1 after the
        prompt. own(layer, k, v) -> the layer's own keys and values, each (B, K, G, reach, D)."""
        T, places = tokens.shape[-1], torch.arange(reach, device=tokens.device)
        now = places[start:start + T]
        later = None if reach == start + 1 else places > now[:, None]  # (T, reach)
        positions = (cache.lengths[:, None] + now)[:, None, :, None]  # (B, 1, T, 1)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, T, 1, D / 2)
        x = F.embedding(tokens, self.embed)
        for i, block in enumerate(self.blocks):

            def attend(q, k, v, i=i):
                k, v = own(i, k.permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4))  # (B, K, G, T, D)
                return attend_group(q, k, v, later, cache.keys[i], cache.values[i], cache.hidden)

            x = block(x, cos, sin, attend)
        return x

    def logits(self, h, head):
        """Logits (n, V) of hidden states (n, d), head from `prepare`."""
        return product(F.rms_norm(h, (h.shape[-1],), self.norm, self.eps), head)

    @torch.no_grad()
    def generate(self, cache, group, max_new, temperature=1.0, generator=None):
        """Sample `group` completions of every prompt in `cache`. Returns tokens (B, G, T) and mask (B, G, T),
        True up to and including the first stop token; T <= max_new is where the longest ended, in buckets."""
        B, K, _, D = cache.keys[0].shape
        empty = torch.empty(2, B, K, group, 0, D, dtype=self.embed.dtype, device=self.embed.device)
        memory = [empty] * len(self.blocks)  # own keys and values, written in place
        tokens = torch.full((B, group, max_new), int(self.stop[0]), device=self.embed.device)
        alive = torch.ones(B, group, dtype=torch.bool, device=self.embed.device)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        h = cache.last[:, None].expand(-1, group, -1)
        check = 8 if self.embed.is_cuda else 1  # asking a GPU whether all are done makes it wait
        head = prepare(self.head, B * group)
        with self.merged(B * group):
            for t in range(max_new):
                logits = self.logits(h.flatten(0, 1), head)
                token = sample(logits, temperature, generator).view(B, group)
                mask[..., t] = alive
                tokens[..., t] = torch.where(alive, token, tokens[..., t])
                alive = alive & ~torch.isin(token, self.stop)
                if t + 1 == max_new or (t % check == check - 1 and not alive.any()):
                    break

                reach = bucket(max(16, t + 1))  # as far as written, little more: products want it dense

                def own(i, k, v, t=t, reach=reach):
                    if memory[i].shape[4] < reach:
                        memory[i] = F.pad(memory[i], (0, 0, 0, reach - memory[i].shape[4]))
                    memory[i][0, ..., t:t + 1, :], memory[i][1, ..., t:t + 1, :] = k, v
                    return memory[i]

                h = self._continue(tokens[..., t:t + 1], cache, t, reach, own)[:, :, 0]
        longest = min(max_new, bucket(int(mask.sum(-1).max())))
        return tokens[..., :longest], mask[..., :longest]

    def logprobs(self, cache, tokens, mask, temperature=1.0, chunk=256):
        """Log-probability and entropy (nats), each (B, G, T), of completion tokens under the policy at
        `temperature`. Gradient flows into the cached keys and values, hence into prompt, prefix and LoRA.
        Zero where mask is False."""
        h = cache.last[:, None, None].expand(-1, tokens.shape[1], 1, -1)  # predicts the first token
        if tokens.shape[-1] > 1:
            rest = self._continue(tokens[..., :-1], cache, 0, tokens.shape[-1] - 1, lambda i, k, v: (k, v))
            h = torch.cat((h, rest), 2)  # (B, G, T, d)
        h, targets = h[mask], tokens[mask]  # (n, d), (n,): no padding meets the head, but for the bucket's
        more = bucket(len(h)) - len(h)
        h = F.rms_norm(F.pad(h, (0, 0, 0, more)), (h.shape[-1],), self.norm, self.eps)
        logp, entropy = TokenLogprob.apply(h, self.head, F.pad(targets, (0, more)), temperature, chunk)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)

    def fuse(self, backend="inductor"):
        """From now on sampling runs through torch.compile, but for attention: the small operations around
        the products become one each. It takes half a minute for each new shape, and rounds a little
        otherwise."""
        heads, rest = (torch.compile(f, backend=backend) for f in (Block.heads, Block.rest))
        for block in self.blocks:
            block.fused = heads.__get__(block), rest.__get__(block)

    # -- LoRA
    def adapters(self):
        return [m for m in self.modules() if isinstance(m, LoRALinear)]

    @contextlib.contextmanager
    def plain(self):
        """LoRA off: the frozen policy, which is the reference of the KL term (with no prefix given
        either)."""
        was = [(m, m.on) for m in self.adapters()]
        try:
            for m, _ in was:
                m.on = False
            yield self
        finally:
            for m, on in was:
                m.on = on

    @contextlib.contextmanager
    def merged(self, rows):
        """While sampling the adapters do not change: W + scale * B A once, in a copy, not two thin products a
        layer and token (a sixth of a decode step here). The copy is rounded like W itself. A layer whose
        adapter is off is copied only where sorting pays."""
        layers = [m for m in self.adapters() if m.on or blocks(m.weight)]
        try:
            for m in layers:
                weight = torch.addmm(m.weight, *m.pair()[::-1]) if m.on else m.weight
                m.merged = prepare(weight, rows)
            yield
        finally:
            for m in layers:
                m.merged = None
