"""
The router: attention from a few learned latents to the experts' hidden states.

The policy cannot read the experts' states as they are: each expert has its own width and its own meaning for
every dimension. The router turns the N states of one problem into L context tokens, vectors of the policy's
width that stand before the prompt as a soft prefix. It is a Perceiver (2103.03206): a set of inputs of any
size is read by cross-attention from a few learned vectors, the latents, and what the latents collect IS the
output. Here it has one cross-attention layer, as in n-Musketeers (2602.09173):

    states   H (B, N, D)       padded to the widest expert   x = (H - mean) / std     per expert and dimension
    project  E (B, N, dim)     einsum("bnd,ndk->bnk", x, W)  W (N, D, dim): every expert has its own matrix
    attend   A (B, h, L, N)    softmax(Q K' / sqrt(dim / h) + trust)    Q from L latents, K and V from E
    write    C (B, L, d)       out(mlp(A V))                 the context tokens

A is a softmax over the experts: A[b, :, :, n] is how much problem b attends to expert n. Nothing else in this
project decides that: no label says which expert is good at what. So one can watch collaboration emerge in A.

Trust (B, N) is ours: a linear layer for each state, zero at the start, that says how much the state is worth
on this problem, for all heads and latents alike. In stage 0 queries and keys learn which latent reads which
state; only rewards can say whom to believe, and if they moved Q and K fast enough for that, the reading would
be lost. So trust has a learning rate of its own; at 0, as in the paper, there is none.

One einsum projects all experts at once: a single batched matrix product, with no loop over experts and no
custom kernel. Padding is harmless: x is zero there, so W's rows beyond a width have no effect, no gradient.

An expert may give several states (more layers, more positions): then N counts states, and nothing here
changes. A router of your own is one class made and called as LinearRouter is, and one entry in ROUTERS.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

class StateReader(nn.Module):
    """The base of routers that read states: x = (H - mean) / std. widths: see Router."""

    def __init__(self, widths):
        super().__init__()
        real = torch.arange(max(widths)) < torch.tensor(widths)[:, None]  # (N, D), False: padding
        self.register_buffer("mean", torch.zeros(real.shape))
        self.register_buffer("inv_std", real.float())  # 1 / std, 0 where there is padding

    @torch.no_grad()
    def fit_standardization(self, H):
        """Fix mean and std of every state's dimensions from the states H (n, N, D) of training prompts.

        States of a language model share one large mean and a few huge dimensions, equal for every prompt;
        what differs between prompts is small beside them. Kept with the weights, never trained. Not in the
        paper.
        """
        std, mean = torch.std_mean(H.float(), dim=0)  # (N, D)
        std = std.clamp(min=1e-6 + 0.01 * std.amax(1, keepdim=True))  # what hardly varies is not blown up
        self.inv_std.copy_((self.inv_std > 0) / std)  # stays 0 in the padding
        self.mean.copy_(mean)

    def standardize(self, H, mask=None):
        x = ((H.to(self.mean.dtype) - self.mean) * self.inv_std).clamp(-10, 10)  # (B, N, D)
        if mask is not None:  # a state that is masked out may hold anything, NaN too
            x = x.masked_fill(~mask[..., None], 0.0)
        return x

class Router(StateReader):
    """
    widths       width of each state, a list of N
    d_policy     d, the width of the policy's embeddings
    latents      L, the number of context tokens; heads and dim: of the attention (8, 8 and 512 in the paper)
    temperature  divides Q K', not trust; below 1 a choice among few experts is sharper
    init_scale   size of fresh context tokens in standard deviations of the policy's embeddings: small (near
                 zero in the paper), so that a fresh prefix does little harm; not zero, so that every part
                 has a gradient from the start
    Raises ValueError when dim is no multiple of heads.
    """

    def __init__(self, widths, d_policy, latents=8, heads=8, dim=512, temperature=1.0, init_scale=0.5):
        super().__init__(widths)
        if dim % heads:
            raise ValueError(f"--router_dim {dim} must be a multiple of --router_heads {heads}")
        self.heads, self.scale = heads, (dim / heads) ** -0.5 / temperature
        N, D = self.mean.shape
        self.register_buffer("widths", torch.tensor(widths), persistent=False)
        fan_in = self.widths[:, None, None]  # W is 0 in the padding: inv_std is 0 there, 1 elsewhere
        self.W = nn.Parameter(torch.randn(N, D, dim) * self.inv_std[..., None] / fan_in.sqrt())
        self.expert_embed = nn.Parameter(torch.randn(N, dim) * 0.02)  # whose state it is, whatever it holds
        self.trust, self.trust_bias = nn.Parameter(torch.zeros(N, D)), nn.Parameter(torch.zeros(N))
        self.latents = nn.Parameter(torch.randn(latents, dim) / math.sqrt(dim))
        self.norm_experts, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_mlp, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.out = nn.Linear(dim, d_policy)
        nn.init.normal_(self.out.weight, std=init_scale / math.sqrt(dim))
        nn.init.zeros_(self.out.bias)

    def forward(self, H, mask=None, attention=None):
        """
        H (B, N, D), zero beyond a state's width -> context tokens C (B, L, d), in standard deviations of the
        policy's embeddings, and attention A (B, heads, L, N).

        mask (N,) or (B, N): False masks a state out: attention 0, no influence and no gradient. One must
        stay. attention, broadcast to (B, heads, L, N): used as it is, in place of the router's own.
        """
        x = self.standardize(H, mask)
        E = self.project(x)  # (B, N, dim)
        q = self.split_heads(self.to_q(self.norm_latents(self.latents)))  # (h, L, dim / h), for every problem
        k, v = self.to_kv(E).chunk(2, dim=-1)
        k, v = self.split_heads(k), self.split_heads(v)  # (B, h, N, dim / h)
        # a mean over dimensions, so that one rate suits trust's weights and its bias
        trust = torch.einsum("bnd,nd->bn", x, self.trust) / self.widths + self.trust_bias  # (B, N)
        scores = q @ k.transpose(-1, -2) * self.scale + trust[:, None, None]  # (B, h, L, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None, None, :], -torch.inf)
        A = scores.float().softmax(-1) if attention is None else attention.expand_as(scores)
        y = (A.to(v.dtype) @ v).transpose(-3, -2).flatten(-2)  # (B, L, dim)

        z = self.latents + self.proj(y)
        z = z + self.mlp(self.norm_mlp(z))
        return self.out(self.norm_out(z)), A

    def project(self, x):
        return self.norm_experts(torch.einsum("bnd,ndk->bnk", x, self.W) + self.expert_embed)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., n, dim) -> (..., h, n, dim / h)

class HardRouter(Router):
    """A control: every problem attends to ONE state, chosen by a linear layer that sees all of them.

    The choice is straight-through (1308.3432): the forward pass takes the chosen state alone, the backward
    pass the softmax's mixture. So the layer learns what the states that were not chosen would have given.
    """

    def __init__(self, widths, *args, **kwargs):
        super().__init__(widths, *args, **kwargs)
        self.choice = nn.Linear(self.mean.numel(), len(widths))

    def forward(self, H, mask=None, attention=None):
        """As Router.forward; the attention is 1 for the chosen state and 0 for the others."""
        scores = self.choice(self.standardize(H, mask).flatten(1))  # (B, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        p = scores.float().softmax(-1)
        chosen = F.one_hot(p.argmax(-1), p.shape[-1]).float()
        straight_through = chosen + p - p.detach()
        return super().forward(H, mask, straight_through[:, None, None] if attention is None else attention)

class LinearRouter(StateReader):
    """A control: one linear map of all states side by side, without attention."""

    def __init__(self, widths, d_policy, latents=8, heads=8, dim=512, temperature=1.0, init_scale=0.5):
        super().__init__(widths)
        self.latents = latents
        self.map = nn.Linear(self.mean.numel(), latents * d_policy)
        nn.init.normal_(self.map.weight, std=init_scale / math.sqrt(sum(widths)))
        nn.init.zeros_(self.map.bias)

    def forward(self, H, mask=None, attention=None):
        """H (B, N, D) -> C (B, L, d), and no attention."""
        x = self.standardize(H, mask)
        return self.map(x.flatten(1)).unflatten(-1, (self.latents, -1)), None

class ConstantPrefix(nn.Module):
    """A control: L learned vectors, the same for every problem (2104.08691). What a run gains with these it
    does not gain by reading the experts."""

    def __init__(self, widths, d_policy, latents=8, heads=8, dim=512, temperature=1.0, init_scale=0.5):
        super().__init__()
        self.C = nn.Parameter(torch.randn(latents, d_policy) * init_scale)

    def forward(self, H, mask=None, attention=None):
        """H of B problems -> C (B, L, d), and no attention."""
        return self.C.expand(len(H), -1, -1), None

# by --collab; all are made from the same arguments, used or not
ROUTERS = {"soft": Router, "hard": HardRouter, "linear": LinearRouter, "prefix": ConstantPrefix}

def reads_states(collab):
    """Does this way to collaborate read the experts' states?"""
    return collab in ROUTERS and ROUTERS[collab] is not ConstantPrefix

def by_expert(attention, owner):
    """Attention (..., N) to states -> to experts (..., experts); an expert's share is that of all its states.
    owner (N,): whose state each is."""
    shares = torch.zeros(*attention.shape[:-1], int(owner.max()) + 1, device=attention.device)
    return shares.index_add(-1, owner.to(attention.device), attention)

def masked_router(router, owner, e):
    """The router with expert e masked out."""
    return lambda H: router(H, (owner != e).to(H.device))
