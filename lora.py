"""
A frozen linear layer with LoRA, and its products.

Most of a step's time goes into products with frozen weights, so they are few and large: layers that read the
same input are fused, adapters and all; while sampling the adapters are added into the weights, and these are
sorted once into the order that the processor wants.
"""

import math
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCKS = (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
          and torch.ops.mkldnn._is_mkldnn_bf16_supported())
LIBRARY = torch.library.Library("musketeers", "DEF")  # of one operator, which torch.compile takes as it is
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.impl("linear", lambda *args: torch.ops.mkldnn._linear_pointwise(*args, "none", [], ""), "MkldnnCPU")
torch.library.register_fake("musketeers::linear", lambda x, w, _: x.new_empty(x.shape[0], w.shape[0]))


def blocks(x):
    """Do products like x's want their weights in blocks? A CPU's in bf16 do, and F.linear sorts the weight
    anew at every call, a fifth of its time in a decode step."""
    return BLOCKS and x.device.type == "cpu" and x.dtype == torch.bfloat16


def prepare(weight, rows):
    """weight (out, in) as `product` takes it, for many inputs of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows) if blocks(weight) else weight


def product(x, prepared, bias=None):
    """F.linear without gradient of x (rows, in) and a weight (out, in) from `prepare`."""
    return (torch.ops.musketeers.linear if blocks(x) else F.linear)(x, prepared, bias)


class LoRALinear(nn.Module):
    """One or several linear layers that read the same input, fused into one product, with LoRA (2106.09685)
    on each.

    y = x W' + scale * (x A') B'. W (out, in) is frozen. Each of the n fused parts has its own rank-r pair:
    the pairs' A are stacked, (n r, in), and their B are the diagonal blocks of one matrix, so that n adapters
    cost two products. A starts random, B at zero: at the start the layer is exactly the frozen one.
    """

    def __init__(self, weights, biases, rank, alpha):
        super().__init__()
        self.register_buffer("weight", torch.cat(weights), persistent=False)  # (out, in)
        bias = None if biases[0] is None else torch.cat(biases)
        self.register_buffer("bias", bias, persistent=False)
        self.scale, self.on, self.merged = alpha / max(rank, 1), rank > 0, None
        if rank:  # fp32 masters: an update of 1e-4 of a weight is lost in bf16, which keeps 8 bits
            a = torch.randn(rank * len(weights), self.weight.shape[1]) / math.sqrt(self.weight.shape[1])
            self.A = nn.Parameter(a)
            self.B = nn.ParameterList(nn.Parameter(torch.zeros(w.shape[0], rank)) for w in weights)

    def pair(self):
        """A (n r, in) and the block-diagonal scale * B (out, n r), in the dtype of the weights."""
        b = self.B[0] if len(self.B) == 1 else torch.block_diag(*self.B)
        return self.A.to(self.weight.dtype), (self.scale * b).to(self.weight.dtype)

    def forward(self, x):
        rows = x.flatten(0, -2)  # (n, in)
        if self.merged is not None:
            return product(rows, self.merged, self.bias).unflatten(0, x.shape[:-1])
        y = F.linear(rows, self.weight, self.bias)  # (n, out)
        if self.on:
            a, b = self.pair()
            y.addmm_(rows @ a.T, b.T)
        return y.unflatten(0, x.shape[:-1])
