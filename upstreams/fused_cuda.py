"""Elementwise stages of the encoders on an NVIDIA GPU, each in one pass over memory.

Kernels in `front_end.cu` and `residual.cu` (no gradients) and `depthwise.cu` (with gradients).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from superb_probe.upstreams.cuda_kernels import KINDS, Value, in_pairs, launch

SOURCE = "front_end.cu"
DEPTHWISE_SOURCE = "depthwise.cu"
NORM_SOURCE = "residual.cu"
WALK_FRAMES = 64  # of a block of `waveform_conv_gelu`, as its source says
NORM_BLOCK_FRAMES = 64  # of a block of `waveform_conv_norm_gelu`
SUM_NORM_WARPS = 4  # of a block of `sum_layer_norm`
DEPTHWISE_FRAMES = 64  # of a thread of `depthwise_conv_silu`


def _address(x: Tensor | None) -> Value:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def waveform_conv_gelu(wavs: Tensor, weight: Tensor, shift: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    """GELU(wavs * weight + shift), a convolution with weights of each row.

    Args:
        wavs: (B, S) float32.
        weight: (B, C, K) float32.
        shift: (B, C) float32.
        stride: samples between frames.
        dtype: of the result.

    Returns:
        (B, T, C).
    """
    batch, channels, kernel = weight.shape
    frames = (wavs.shape[1] - kernel) // stride + 1
    wavs, weight, shift = wavs.contiguous(), weight.contiguous(), shift.contiguous()
    y = torch.empty(batch, frames, channels, dtype=dtype, device=wavs.device)
    macros = {"KIND": KINDS[dtype], "KERNEL": kernel, "STRIDE": stride, "CHANNELS": channels}
    arguments: list[Value] = [
        *map(_address, (wavs, weight, shift, y)),
        ctypes.c_longlong(wavs.stride(0)),
        ctypes.c_int(frames),
    ]
    grid = (-(-frames // WALK_FRAMES), -(-channels // 256), batch)
    launch(SOURCE, "waveform_conv_gelu", macros, wavs.device, grid, 256, arguments)
    return y


def waveform_conv_norm_gelu(wavs: Tensor, conv: nn.Conv1d, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """GELU(LayerNorm(conv(wavs))), the norm over the channels of each frame.

    Args:
        wavs: (B, S) float32.
        conv: of one input channel, to a multiple of 32 channels.
        norm: of the channels.
        dtype: of the result.

    Returns:
        (B, T, C).
    """
    channels, _, kernel = conv.weight.shape
    stride = conv.stride[0]
    frames = (wavs.shape[1] - kernel) // stride + 1
    wavs = wavs.contiguous()
    bias = wavs.new_zeros(channels) if conv.bias is None else conv.bias
    parts = [x.float().contiguous() for x in (conv.weight, bias, norm.weight, norm.bias)]
    y = torch.empty(wavs.shape[0], frames, channels, dtype=dtype, device=wavs.device)
    macros = {"KIND": KINDS[dtype], "KERNEL": kernel, "STRIDE": stride, "CHANNELS": channels}
    arguments: list[Value] = [*map(_address, (wavs, *parts, y)), ctypes.c_longlong(wavs.stride(0))]
    arguments += [ctypes.c_int(frames), ctypes.c_float(norm.eps)]
    grid = (-(-frames // NORM_BLOCK_FRAMES), wavs.shape[0], 1)
    launch(SOURCE, "waveform_conv_norm_gelu", macros, wavs.device, grid, 128, arguments)
    return y


def can_sum_norm(x: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether `sum_layer_norm` takes a norm and what it is of."""
    width = x.shape[-1]
    affine = norm.bias is not None and norm.weight is not None and norm.weight.dtype == norm.bias.dtype == x.dtype
    return affine and norm.normalized_shape == (width,) and width % 64 == 0 and width <= 2048 and x.numel() > 0


def sum_layer_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(x + y), the sum in fp32.

    Args:
        x: (..., D), D a multiple of 64.
        y: of x's shape and type.
        norm: over D, its weights of x's type.

    Returns:
        (..., D).
    """
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    macros = {"KIND": KINDS[x.dtype], "CHANNELS": width, "WARPS": SUM_NORM_WARPS}
    arguments: list[Value] = [*map(_address, (x, y, norm.weight, norm.bias, out)), ctypes.c_longlong(rows)]
    arguments.append(ctypes.c_float(norm.eps))
    grid = (-(-rows // SUM_NORM_WARPS), 1, 1)
    launch(NORM_SOURCE, "sum_layer_norm", macros, x.device, grid, SUM_NORM_WARPS * 32, arguments)
    return out


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, reverse: bool) -> Tensor:
    """SiLU of a causal depthwise convolution, with gradients of all but the tail.

    Args:
        x: (B, T, E), channels innermost in memory.
        weight: (E, 1, K).
        bias: (E,).
        tail: (B, K - 1, E) inputs before the first frame; None for zeros.
        reverse: each frame and those after it, instead of those before; without a tail.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    tail = None if tail is None else tail.to(x.dtype).contiguous()
    return _DepthwiseConv.apply(x, weight[:, 0].float().contiguous(), bias.float().contiguous(), tail, reverse)  # type: ignore[no-any-return,no-untyped-call]


def _depthwise_macros(
    x: Tensor, weight: Tensor, tail: Tensor | None, reverse: bool, others: Sequence[Tensor]
) -> dict[str, int]:
    pairs = x.shape[2] % 2 == 0 and all(in_pairs(each) for each in (x, *others))
    return {
        "KIND": KINDS[x.dtype],
        "KERNEL": weight.shape[1],
        "REVERSE": int(reverse),
        "HAS_TAIL": int(tail is not None),
        "FRAMES": DEPTHWISE_FRAMES,
        "CHANNELS": 2 if pairs else 1,
    }


class _DepthwiseConv(torch.autograd.Function):
    """`depthwise_conv_silu` with weights (E, K) in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, reverse: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, tail)
        ctx.reverse = reverse
        batch, frames, width = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        macros = _depthwise_macros(x, weight, tail, reverse, ())
        arguments: list[Value] = [*map(_address, (x, weight, bias, tail, y)), *map(ctypes.c_longlong, x.stride()[:2])]
        arguments += [ctypes.c_int(frames), ctypes.c_int(width)]
        grid = (-(-width // (128 * macros["CHANNELS"])), -(-frames // DEPTHWISE_FRAMES), batch)
        launch(DEPTHWISE_SOURCE, "depthwise_conv_silu", macros, x.device, grid, 128, arguments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail = ctx.saved_tensors
        if ctx.needs_input_grad[3]:
            raise NotImplementedError("the fused convolution gives no gradient of its tail")
        batch, frames, width = x.shape
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        macros = _depthwise_macros(x, weight, tail, ctx.reverse, (dy,))
        pieces = -(-frames // DEPTHWISE_FRAMES)
        sums = weight.new_empty(batch, pieces, width, weight.shape[1] + 1)
        arguments: list[Value] = [*map(_address, (x, weight, bias, tail, dy, dx, sums))]
        arguments += [
            *map(ctypes.c_longlong, (*x.stride()[:2], *dy.stride()[:2])),
            ctypes.c_int(frames),
            ctypes.c_int(width),
        ]
        grid = (-(-width // (128 * macros["CHANNELS"])), pieces, batch)
        launch(DEPTHWISE_SOURCE, "depthwise_conv_silu_backward", macros, x.device, grid, 128, arguments)
        total = sums.sum((0, 1))
        return dx, total[:, :-1], total[:, -1], None, None
