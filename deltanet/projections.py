"""What a mixer has that no teacher has, each with a neutral start: gates, feature maps and short convolutions.

Shapes: B batch, T tokens, H heads, hd head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .history import History

LONGEST_STEP = 16
"""Tokens of a call that counts as a step of decoding."""


class Neutral(nn.Linear):
    """A projection that ignores its input at the start: weight 0, every output equal to `neutral`."""

    def __init__(self, in_features: int, out_features: int, neutral: float = 0.0, bias: bool = True):
        self.neutral = neutral
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.constant_(self.bias, self.neutral)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = -self.out_features % 8
        if not missing or not x.is_cuda or x.shape[1] <= LONGEST_STEP:
            return super().forward(x)
        # A product of, say, 9 columns misses the alignment of fast kernels: by a profile of 16,384 x 576 inputs on an
        # H100 (26 November 2026) 0.22 ms, where reading the input takes 0.006. A step of decoding has no such inputs,
        # and waits for every kernel's launch.
        weight = F.pad(self.weight, (0, 0, 0, missing))
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(x, weight, bias)[..., : self.out_features]


class FeatureMap(nn.Module):
    """x (B, T, H, hd) -> x + x W_h, a linear map of its own for every head, the identity at the start.

    T2R (arXiv 2103.13076) learns its features likewise, with a bias and a ReLU. Measured: docs/results/students.md."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.einsum("bthd,hde->bthe", x, self.weight.to(x.dtype))


class Convolution(nn.Module):
    """A causal depthwise convolution over tokens, `tap` times the identity at the start; weight (channels, kernel)."""

    def __init__(self, channels: int, kernel: int, tap: float = 1.0):
        super().__init__()
        self.tap = tap
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        identity = torch.zeros_like(self.weight)
        identity[:, -1] = self.tap
        init.copy_(self.weight, identity)

    def forward(self, history: History, channels: slice) -> torch.Tensor:
        kernel = self.weight.shape[1]
        return sum(history.back(j)[..., channels] * self.weight[:, kernel - 1 - j] for j in range(kernel))
