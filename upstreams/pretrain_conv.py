"""The positional convolution for training on a GPU: matrix products forward and backward.

`PositionalConv` computes it as one product a group over runs of neighbouring frames, whose windows overlap in memory; autograd would
add the windows' gradients up element by element. Here the gradient of the input is the same convolution with the taps turned
round, and that of the weights a product of windows and output gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams.convolutions import RUN_FRAMES, PositionalConv


class _GroupedConv(torch.autograd.Function):
    """A grouped convolution along time, channels last, as matrix products."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, groups: int, left: int) -> Tensor:
        context.save_for_backward(x, weight)
        context.groups, context.left = groups, left
        return _convolve(x, weight, groups, left)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = context.saved_tensors
        groups, left, kernel = context.groups, context.left, weight.shape[2]
        width = weight.shape[1]
        turned = weight.view(groups, width, width, kernel).transpose(1, 2).flip(3).reshape(weight.shape)
        x_gradient = _convolve(gradient, turned, groups, kernel - 1 - left)
        # (G, (RUN + K - 1) W, RUN W): what every window position has with every output of its run.
        products = torch.bmm(_windows(x, groups, left, kernel).transpose(1, 2), _runs(gradient, groups))
        products = products.view(groups, RUN_FRAMES + kernel - 1, width, RUN_FRAMES, width)
        taps = torch.stack([products[:, run : run + kernel, :, run] for run in range(RUN_FRAMES)]).sum(0)
        return x_gradient, taps.permute(0, 3, 2, 1).reshape(weight.shape), None, None


def grouped_conv(x: Tensor, weight: Tensor, groups: int, left: int) -> Tensor:
    """A grouped convolution along time.

    Args:
        x: (B, T, D).
        weight: (D, D / G, K).
        groups: G.
        left: zeros before the first frame; K - 1 - left after the last.

    Returns:
        (B, T, D).

    >>> x, weight = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    >>> expected = F.conv1d(F.pad(x.transpose(1, 2), (1, 1)), weight, groups=2).transpose(1, 2)
    >>> torch.allclose(grouped_conv(x, weight, 2, 1), expected)
    True
    """
    return _GroupedConv.apply(x, weight, groups, left)  # type: ignore[no-any-return, no-untyped-call]


def positional(conv: PositionalConv, x: Tensor) -> Tensor:
    """What `conv` gives for x (B, T, D), by products with gradients on a GPU and by the module itself elsewhere."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return conv(x)  # type: ignore[no-any-return]
    return F.gelu(grouped_conv(x, conv.weight(), conv.groups, conv.left) + conv.bias)


def _windows(x: Tensor, groups: int, left: int, kernel: int) -> Tensor:
    """(G, B runs, (RUN + K - 1) W): the inputs that each run of RUN outputs sees."""
    batch, frames, dim = x.shape
    runs, width = -(-frames // RUN_FRAMES), dim // groups
    total = runs * RUN_FRAMES + kernel - 1
    padded = F.pad(x, (0, 0, left, total - frames - left))
    grouped = padded.view(batch, total, groups, width).permute(2, 0, 1, 3).contiguous()
    shape = (groups, batch, runs, (RUN_FRAMES + kernel - 1) * width)
    windows = grouped.as_strided(shape, (batch * total * width, total * width, RUN_FRAMES * width, 1))
    return windows.reshape(groups, batch * runs, -1)


def _runs(y: Tensor, groups: int) -> Tensor:
    """(G, B runs, RUN W): outputs, or their gradients, by runs; zeros fill the last one."""
    batch, frames, dim = y.shape
    runs, width = -(-frames // RUN_FRAMES), dim // groups
    padded = F.pad(y, (0, 0, 0, runs * RUN_FRAMES - frames))
    parts = padded.view(batch, runs, RUN_FRAMES, groups, width).permute(3, 0, 1, 2, 4)
    return parts.reshape(groups, batch * runs, RUN_FRAMES * width)


def _convolve(x: Tensor, weight: Tensor, groups: int, left: int) -> Tensor:
    (batch, frames, dim), kernel = x.shape, weight.shape[2]
    width, runs = dim // groups, -(-x.shape[1] // RUN_FRAMES)
    taps = weight.view(groups, width, width, kernel).permute(0, 3, 2, 1)
    matrix = taps.new_zeros(groups, RUN_FRAMES + kernel - 1, width, RUN_FRAMES, width)
    for run in range(RUN_FRAMES):
        matrix[:, run : run + kernel, :, run] = taps
    y = torch.bmm(_windows(x, groups, left, kernel), matrix.flatten(3).flatten(1, 2))
    y = y.view(groups, batch, runs * RUN_FRAMES, width).permute(1, 2, 0, 3)
    return y.reshape(batch, runs * RUN_FRAMES, dim)[:, :frames]
