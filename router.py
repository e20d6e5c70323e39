"""
The router: a small attention interface that turns what the frozen experts made of a problem into a few
context tokens.

It is a Perceiver (2103.03206): a handful of learned vectors, the latents, ask questions of a set of inputs of
any size by cross-attention, and what they collect IS the output. Here the inputs are N experts' states of one
problem, one vector each, and the L answers become L context tokens, a soft prefix for the policy
(n-Musketeers, 2602.09173, method):

    H_n (D_n,)  --its own projection-->  E_n (dim,)           n = 1..N, all experts at once in one batched
    einsum
    latents (L, dim)  --ask, 8 heads-->  A (heads, L, N)      who is listened to: a softmax over the experts
    A, E  --collect, feed-forward-->  Z (L, dim)  --output, near zero-->  C (L, d_policy)

Nothing else in this project decides whom to listen to: the experts are frozen and no label says who is good
at what. The attention A is therefore something one can watch; `Router.forward` returns it with the context
tokens.

Widths differ between experts. Their states are padded with zeros to the widest and stacked, (B, N, D). The
projection is cut into M slices of one width w, each belonging to one expert, (M, w, dim), so that padding
meets no weight: one batched product projects everything, and there is no loop over experts.
"""

import math

import torch
import torch.nn as nn


class Router(nn.Module):
    """Context tokens from expert states.

    widths: the experts' hidden sizes, N of them; d_policy: width of the policy's embeddings. The paper has 8
    latents, 8 heads and dim 512. `temperature` divides the attention scores: below 1 it sharpens a choice
    among few experts. `start` is the scale of the fresh context tokens, in spreads of the policy's
    embeddings: near zero (paper), not zero, so that experts, latents and projections all have a gradient from
    the first step. Raises ValueError without experts or when dim is no multiple of heads.
    """

    def __init__(self, widths, d_policy, latents=8, heads=8, dim=512, temperature=1.0, start=0.02):
        super().__init__()
        if not widths:
            raise ValueError("a router needs an expert: name some with --experts, or use --collab single")
        if dim % heads:
            raise ValueError(f"the router's width {dim} must be a multiple of its {heads} heads")
        self.heads, self.scale = heads, (dim / heads) ** -0.5 / temperature
        D = max(widths)
        w = max(math.gcd(*widths), min(256, D))  # one slice an expert where widths are equal or all small
        slices = torch.tensor([-(-n // w) for n in widths])  # (N,)
        owner = torch.arange(len(widths)).repeat_interleave(slices)  # (M,) whose slice it is
        first = torch.arange(len(owner)) - (slices.cumsum(0) - slices)[owner]  # (M,) its place in the state
        place = first[:, None] * w + torch.arange(w)  # (M, w)
        real = place < torch.tensor(widths)[owner, None]  # False: no such dimension, it weighs nothing
        columns = (owner[:, None] * D + place.clamp(max=D - 1)).flatten()
        for name, value in (("owner", owner), ("real", real), ("columns", columns)):
            self.register_buffer(name, value, persistent=False)
        self.whole = real.shape == (len(widths), D)  # nothing to cut
        self.register_buffer("shift", torch.zeros(len(owner), w))
        self.register_buffer("gain", real.float())
        fan_in = torch.tensor(widths)[owner, None, None]
        self.project = nn.Parameter(torch.randn(len(owner), w, dim) * real[..., None] / fan_in.sqrt())
        self.identity = nn.Parameter(torch.randn(len(widths), dim) * 0.02)  # who speaks, whatever is said
        self.latents = nn.Parameter(torch.randn(latents, dim) / math.sqrt(dim))
        self.norm_in, self.norm_latent, self.norm_mlp, self.norm_out = (nn.LayerNorm(dim) for _ in range(4))
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_z = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.out = nn.Linear(dim, d_policy)
        nn.init.normal_(self.out.weight, std=start / math.sqrt(dim))
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def standardise(self, H):
        """Fix each expert's mean and spread, dimension by dimension, from states H (n, N, D) of training
        prompts.

        A language model's states share one large mean and a few huge dimensions, equal for every prompt; what
        differs between prompts, the part worth reading, is small beside them. Kept with the weights; not
        trained. Our choice.
        """
        spread, mean = (torch.std_mean(H, 0) if len(H) > 1 else (torch.ones_like(H[0]), H[0]))  # (N, D)
        gain = 1 / spread.clamp(min=1e-6 + 0.01 * spread.amax(1, keepdim=True))
        self.gain.copy_(self.cut(gain) * self.real)
        self.shift.copy_(self.cut(-mean * gain) * self.real)

    def cut(self, H):
        """Expert states (..., N, D), padding and all, to slices (..., M, w)."""
        return H.flatten(-2)[..., self.columns].unflatten(-1, self.real.shape)

    def forward(self, H, mask=None, attention=None):
        """H (B, N, D) expert states, zero beyond an expert's width; mask (B, N) or (N,), True where the
        expert is present; attention (heads, L, N) to use in place of its own, at test time.

        Returns context tokens C (B, L, d_policy), in spreads of the policy's embeddings, and attention (B,
        heads, L, N). An absent expert gets attention exactly 0, and neither influence nor gradient. At least
        one must be present.
        """
        mask = None if mask is None else mask.expand(H.shape[:2])
        if mask is not None:  # its states may hold anything, NaN too
            H = H.masked_fill(~mask[..., None], 0.0)
        return self.attend(self.entries(self.standard(H)), mask, attention)

    def standard(self, H):
        """States H (B, N, D) from their mean, in their spreads, in slices (B, M, w)."""
        H = H if self.whole else self.cut(H)
        return torch.addcmul(self.shift, H.to(self.gain.dtype), self.gain).clamp_(-10, 10)

    def entries(self, x):
        """What the latents may listen to (B, N, dim), from standardised slices."""
        return self.norm_in(self.embed(x))

    def embed(self, x):
        """Slices (B, M, w), each projected by its own weights and summed to their expert: (B, N, dim).

        The einsum bnd,ndk->bnk over all experts at once, as one kernel together with what is added to it.
        """
        x, start = x.transpose(0, 1).contiguous(), self.identity[:, None]
        if len(self.project) == len(self.identity):  # every expert is one slice
            return torch.baddbmm(start, x, self.project).transpose(0, 1)
        parts, owner = torch.bmm(x, self.project), self.owner[:len(self.project)]  # (M, B, dim)
        return start.expand(-1, x.shape[1], -1).index_add(0, owner, parts).transpose(0, 1)

    def expert_grad(self):
        """Norm of the gradient at each expert's projection, N numbers."""
        squares = self.project.grad.flatten(1).square().sum(1)  # (M,)
        total = squares.new_zeros(len(self.identity)).index_add(0, self.owner[:len(squares)], squares)
        return total.sqrt().tolist()

    def attend(self, E, mask=None, attention=None):
        """The latents' questions to E (B, N, dim), whatever projected it: what `forward` returns."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., heads, n, dim / heads)
        q = split(self.to_q(self.norm_latent(self.latents)))  # (heads, L, ·): the same for every prompt
        k, v = map(split, self.to_kv(E).chunk(2, -1))  # (B, heads, N, ·)
        scores = q @ k.transpose(-1, -2) * self.scale  # (B, heads, L, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        A = scores.float().softmax(-1) if attention is None else attention.to(scores.device).expand_as(scores)
        heard = (A.to(v.dtype) @ v).transpose(-3, -2).flatten(-2)  # (B, L, dim)

        z = self.latents + self.to_z(heard)
        z = z + self.mlp(self.norm_mlp(z))
        return self.out(self.norm_out(z)), A
