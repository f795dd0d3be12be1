"""The normalizations, as rows of NORMS. Statistics are computed in fp32 for activations of any precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) over the last dimension; with `affine`, times a weight; with `bias`, plus a bias."""

    def __init__(self, size: int, eps: float, affine: bool, bias: bool):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)  # (..., size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times (offset + weight); Gemma stores weight - 1, with offset 1."""

    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return (x_fp32 * (self.offset + self.weight.float())).to(x.dtype)  # (..., size)


NORMS = {
    "layer_norm_nonparametric": lambda size, eps, bias: LayerNorm(size, eps, affine=False, bias=False),
    "layer_norm": lambda size, eps, bias: LayerNorm(size, eps, affine=True, bias=bias),
    "rms_norm": lambda size, eps, bias: RMSNorm(size, eps, offset=0.0),
    "rms_norm_offset": lambda size, eps, bias: RMSNorm(size, eps, offset=1.0),
}
