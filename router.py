"""
The router: attention from a few learned vectors to the hidden states of the experts.

The policy cannot read the experts' states directly. Every expert has its own width, and its own meaning for
every dimension. The router turns the N states of one problem into L context tokens: vectors of the policy's
width, which stand before the prompt, a soft prefix. The router is a Perceiver (2103.03206): a few learned
vectors, the latents, read a set of inputs of any size by cross-attention, and what they collect is the
output. Here, as in n-Musketeers (2602.09173), there is one layer of cross-attention. Sizes:

    B  problems                                   dim  width of the attention, divided among h heads
    N  states of a problem, of all experts        L    latents, and context tokens
       together; an expert gives one or several   d    width of the policy, and so of a context token
    D  width of the widest expert

    states       H (B, N, D)      padded with zeros to the widest expert
    standardize  x (B, N, D)      (H - mean) / std, for every dimension of every state
    project      S (B, N, dim)    einsum("bnd,ndk->bnk", x, W): state n has its own matrix W[n] (D, dim)
    attend       A (B, h, L, N)   softmax(8 Q K' h / dim + trust): Q from the L latents, K and V from S
    write        C (B, L, d)      out(mlp(latents + A V)): the context tokens, of the policy's width d

The latents are added in the last line, so the L context tokens differ from each other even where all latents
read the same single state, as they do when one expert with one state is visible. (Left out here: the clamp
after standardizing, norms, the embedding of each state, the output projection of the attention, and the
residual sum around the mlp. The factor 8 h / dim is the usual 1 / sqrt(dim / h) where a head has 64 numbers, as
sqrt(64) = 8, and twice as much where it has 16.)

A is the part to watch. It is a softmax over the states: A[b, :, :, n] says how much problem b attends to
state n, and the shares of one expert's states add up to the share of that expert. No label says which expert
is good at which kind of problem. So when each kind of problem comes to attend to its own specialist,
collaboration has emerged: rewards alone have told the router whom to believe.

Trust is ours, not the paper's. It is one number for each expert and problem, a linear function of the
expert's states, that is added to the scores of all of the expert's states, for all heads and latents. Where
an expert gives several states, queries and keys decide WHICH latent reads WHICH of them; they learn that in
stage 0, before any reward. Trust mainly decides WHOM to believe; only rewards can teach that. (Queries and
keys learn from the same rewards, but slowly.) The two are separate because they need different learning
rates: if queries and keys moved fast enough to learn whom to believe, they would forget how to read.

How trust learns: by comparing experts (rlvr.py). Half of a group of answers is sampled while only one expert
is visible (beside encoders, which write nothing), the other half while only another one is. The expert whose
half earned more reward gains trust on this kind of problem. The argument `visible` below hides the others.

One einsum projects the states of all experts at once. It is one batched matrix product, on a GPU one kernel,
without a loop over experts. The padding is harmless: x is zero there, so that the rows of W beyond an
expert's width have no effect and no gradient.

To add a router of your own, write a class with the arguments of Router and add it to ROUTERS.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class StateReader(nn.Module):
    """The base class of routers that read states. It standardizes them: x = (H - mean) / std.

    widths           N numbers: the width of each state
    expert_of_state  N numbers: which expert each state belongs to
    """

    def __init__(self, widths, expert_of_state):
        super().__init__()
        widths = torch.tensor(widths)
        is_real = torch.arange(int(widths.max())) < widths[:, None]  # (N, D), False where there is padding

        self.register_buffer("mean", torch.zeros(is_real.shape))
        self.register_buffer("inv_std", is_real.float())  # 1 / std, and 0 in the padding
        self.register_buffer("is_real", is_real, persistent=False)
        self.register_buffer("widths", widths, persistent=False)
        self.register_buffer("expert_of_state", torch.tensor(expert_of_state), persistent=False)

    @torch.no_grad()
    def fit_standardization(self, H):
        """Measure mean and std of every dimension on the states H (n, N, D) of training problems.

        The states of a language model share one large mean and a few huge dimensions that are the same for
        every prompt. What differs between prompts is small beside them, so it is brought to unit size here.
        Mean and std are saved with the weights and never trained. The paper does not mention such a step.
        """
        std, mean = torch.std_mean(H.float(), dim=0)  # (N, D)

        # Do not amplify dimensions that are nearly constant: no std below 1% of the largest one of the state.
        smallest = 1e-6 + 0.01 * std.amax(1, keepdim=True)  # (N, 1)
        std = std.clamp(min=smallest)

        self.inv_std.copy_(self.is_real / std)
        self.mean.copy_(mean)

    def standardize(self, H, visible=None):
        """H (B, N, D) -> x (B, N, D), zero for a state that is not visible (which may contain NaN)."""
        x = (H.to(self.mean.dtype) - self.mean) * self.inv_std
        x = x.clamp(-10, 10)  # no single dimension decides alone
        if visible is not None:
            x = x.masked_fill(~visible[..., None], 0.0)
        return x


class Router(StateReader):
    """The attention interface between frozen experts and the policy.

    widths, expert_of_state   see StateReader
    d_policy     d, the width of the policy's embeddings
    latents      L, the number of context tokens (8 in the paper)
    dim          the width of the attention (512 in the paper, with 8 heads)
    init_scale   the size of fresh context tokens, in standard deviations of the policy's embeddings; near
                 zero in the paper. A small prefix does little harm. With size 0 the layers before `out` would
                 get no gradient. (rlvr.build chooses 0.02 where `Policy.prepend` in model.py adds the
                 context tokens to the mean embedding, and 0.5 where it adds them to zero, as in the paper.)
    Raises ValueError when dim is not a multiple of 16.
    """

    compares = True  # its attention is trained by comparing experts (rlvr.py)

    def __init__(self, widths, expert_of_state, d_policy, latents=8, dim=512, init_scale=0.5):
        super().__init__(widths, expert_of_state)
        if dim % 16:
            raise ValueError(f"--router_dim {dim} must be a multiple of 16")

        # Take 8 heads, as the paper does; fewer in a narrow router, so that none is narrower than 16.
        #
        # Divide scores by the width of a head and not by its square root: once queries and keys have learned
        # to agree, their products grow with the width (muP, 2203.03466, section 4). 8 is sqrt(64).
        self.heads = min(8, dim // 16)
        self.score_scale = 8 * self.heads / dim
        N, D = self.mean.shape

        # Project: one matrix and one embedding for each state. The embedding says which state it is.
        W = torch.randn(N, D, dim) / self.widths[:, None, None].sqrt()
        self.W = nn.Parameter(W * self.is_real[..., None])  # zero in the padding
        self.state_embed = nn.Parameter(torch.randn(N, dim) * 0.02)
        self.norm_states = nn.LayerNorm(dim)

        # Trust: a linear function of each expert's states, zero at the start.
        self.trust = nn.Parameter(torch.zeros(N, D))
        self.trust_bias = nn.Parameter(torch.zeros(N))

        # Attend.
        self.latents = nn.Parameter(torch.randn(latents, dim) / math.sqrt(dim))
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

        # Write.
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm_out = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, d_policy)
        nn.init.normal_(self.out.weight, std=init_scale / math.sqrt(dim))
        nn.init.zeros_(self.out.bias)

    def forward(self, H, visible=None, attention=None):
        """States H (B, N, D), zero beyond each width -> context tokens and attention.

        Returns C (B, L, d) and A (B, h, L, N). C is in the units of the policy's embeddings: `Policy.prepend`
        multiplies it by their standard deviation, and adds their mean or zero.

        visible    (N,) or (B, N): False hides a state; its attention is 0, and it has no influence and no
                   gradient. All states of an expert must be hidden together, and one expert stay visible.
        attention  broadcast to (B, h, L, N): used as it is, in place of the router's own. It must be 0 where
                   a state is hidden.
        """
        # Project the states of all experts at once.
        x = self.standardize(H, visible)
        S = torch.einsum("bnd,ndk->bnk", x, self.W) + self.state_embed
        S = self.norm_states(S)  # (B, N, dim)

        # Attend: every latent asks, every state answers.
        q = self.split_heads(self.to_q(self.norm_latents(self.latents)))  # (h, L, dim / h)
        k, v = self.to_kv(S).chunk(2, dim=-1)
        k, v = self.split_heads(k), self.split_heads(v)  # (B, h, N, dim / h)
        scores = q @ k.transpose(-1, -2) * self.score_scale  # (B, h, L, N)
        scores = scores + self.trust_in_states(x)[:, None, None]
        if visible is not None:
            scores = scores.masked_fill(~visible[..., None, None, :], -torch.inf)
        if attention is None:
            A = scores.float().softmax(-1)
        else:
            A = attention.expand_as(scores)
        per_head = A.to(v.dtype) @ v  # (B, h, L, dim / h)
        y = per_head.transpose(-3, -2).flatten(-2)  # (B, L, dim), the heads side by side

        # Write the context tokens.
        z = self.latents + self.proj(y)
        z = z + self.mlp(self.norm_mlp(z))
        return self.out(self.norm_out(z)), A

    def trust_in_states(self, x):
        """x (B, N, D) -> (B, N): the trust in the expert that each state belongs to.

        Trust in an expert is the mean over its states of (x . w) / sqrt(width) + b, with w in self.trust and
        b in self.trust_bias. All states of an expert receive the same number. If each state had its own,
        rewards could push the attention onto one state of an expert, and what the latents read from the
        other states would be lost.
        """
        votes = torch.einsum("bnd,nd->bn", x, self.trust)  # (B, N)
        votes = votes / self.widths.sqrt() + self.trust_bias

        # Replace each vote by the mean of its expert. average[m, n] is 1 / k if m and n are two of the k
        # states of one expert, else 0. With two states of one expert and one of another:
        #     [[1/2, 1/2, 0],
        #      [1/2, 1/2, 0],
        #      [  0,   0, 1]]
        same_expert = self.expert_of_state[:, None] == self.expert_of_state  # (N, N)
        average = same_expert.float() / same_expert.sum(1, keepdim=True)
        return votes @ average  # (B, N)

    def split_heads(self, x):
        """(..., n, dim) -> (..., h, n, dim / h)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


# -- Other routers, to compare with. Each of them takes the arguments of Router and is called like it, so that
# the loop never asks which one it has.

class MixedRouter(Router):
    """The same attention, but GRPO never compares experts: it shows all of them at once, as in the paper.

    The reward then belongs to their mixture. The GRPO loss alone trains the attention; it trains trust, too,
    if --trust_lr is above 0 (rlvr.py: Why compare?).
    """

    compares = False


class HardRouter(Router):
    """Every problem attends to ONE state, chosen by a linear layer that sees all of them.

    The choice is straight-through (1308.3432). In value it is 1 for the chosen state and 0 for the others:
    the policy sees the chosen state alone. Its gradient is that of the softmax: so the layer also learns
    about the states that it did not choose.
    """

    compares = False  # it learns its choice from the GRPO loss

    def __init__(self, widths, expert_of_state, *args, **kwargs):
        super().__init__(widths, expert_of_state, *args, **kwargs)
        self.choice = nn.Linear(self.mean.numel(), len(widths))

    def forward(self, H, visible=None, attention=None):
        """As Router.forward; the attention is 1 for the chosen state and 0 for all others."""
        if attention is None:
            scores = self.choice(self.standardize(H, visible).flatten(1))  # (B, N)
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            p = scores.float().softmax(-1)
            chosen = F.one_hot(p.argmax(-1), p.shape[-1]).float()
            straight_through = chosen + p - p.detach()  # the value of chosen, the gradient of p
            attention = straight_through[:, None, None]
        return super().forward(H, visible, attention)


class LinearRouter(StateReader):
    """One linear map of all states side by side, without attention."""

    def __init__(self, widths, expert_of_state, d_policy, latents=8, dim=512, init_scale=0.5):
        super().__init__(widths, expert_of_state)
        self.latents = latents
        self.map = nn.Linear(self.mean.numel(), latents * d_policy)
        nn.init.normal_(self.map.weight, std=init_scale / math.sqrt(sum(widths)))
        nn.init.zeros_(self.map.bias)

    def forward(self, H, visible=None, attention=None):
        """H (B, N, D) -> C (B, L, d), and no attention."""
        x = self.standardize(H, visible)
        return self.map(x.flatten(1)).unflatten(-1, (self.latents, -1)), None


class ConstantPrefix(nn.Module):
    """L learned vectors that are the same for every problem (2104.08691).

    Training these vectors alone can raise the reward, too. Such a gain does not come from the experts.
    """

    def __init__(self, widths, expert_of_state, d_policy, latents=8, dim=512, init_scale=0.5):
        super().__init__()
        self.C = nn.Parameter(torch.randn(latents, d_policy) * init_scale)

    def forward(self, H, visible=None, attention=None):
        """H of B problems -> C (B, L, d), and no attention."""
        return self.C.expand(len(H), -1, -1), None


class NoRouter(nn.Module):
    """No context at all: the policy and its LoRA alone."""

    def __init__(self, widths, expert_of_state, d_policy, latents=8, dim=512, init_scale=0.5):
        super().__init__()

    def forward(self, H, visible=None, attention=None):
        return None, None


class TextInPrompt(NoRouter):
    """No context either: what the experts say stands in the policy's prompt as words (rlvr.Dataset)."""


ROUTERS = {  # by --router
    "attention": Router,
    "mixed": MixedRouter,
    "hard": HardRouter,
    "linear": LinearRouter,
    "constant": ConstantPrefix,
    "text": TextInPrompt,
    "none": NoRouter,
}


def reads_states(router_name):
    """Does this router read the experts' states?"""
    return not issubclass(ROUTERS[router_name], (ConstantPrefix, NoRouter))


def has_context(router_name):
    """Does this router give the policy context tokens?"""
    return not issubclass(ROUTERS[router_name], NoRouter)


def shows_texts(router_name):
    """Does the policy read what the experts say as words in its prompt?"""
    return issubclass(ROUTERS[router_name], TextInPrompt)


def compares(router_name):
    """Does this router learn whom to believe by comparing experts?"""
    return getattr(ROUTERS[router_name], "compares", False)


def by_expert(attention, expert_of_state):
    """Attention to states (..., N) -> attention to experts (..., E): the shares of its states, added up.

    With expert_of_state [0, 0, 1]:   [0.2, 0.5, 0.3]  ->  [0.7, 0.3]
    """
    expert_of_state = expert_of_state.to(attention.device)
    shares = torch.zeros(*attention.shape[:-1], int(expert_of_state.max()) + 1, device=attention.device)
    return shares.index_add(-1, expert_of_state, attention)


class WithoutExpert(nn.Module):
    """A router that cannot see one expert: the test of what that expert contributes."""

    def __init__(self, router, expert_of_state, expert):
        super().__init__()
        self.router = router
        self.others = expert_of_state != expert  # (N,)

    def forward(self, H, visible=None, attention=None):
        others = self.others.to(H.device)
        if visible is not None:
            others = others & visible
        return self.router(H, others, attention)
