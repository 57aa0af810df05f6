"""Elementwise stages of the encoders on a CPU, each in one pass over memory: kernels in `cpu_kernels.cpp`, no gradients.

Each returns None where its kernel cannot run: without a compiler, in another dtype than fp32, on a subclass of Tensor.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from superb_probe.upstreams.cpu_kernels import address, innermost, is_plain_float, library


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, reverse: bool) -> Tensor | None:
    """SiLU of a causal depthwise convolution.

    Args:
        x: (B, T, E).
        weight: (E, 1, K).
        bias: (E,).
        tail: (B, K - 1, E) inputs before the first frame scanned; zeros if None.
        reverse: run backwards in time.
    """
    compiled = library() if is_plain_float(x, weight, bias, tail) and x.numel() else None
    if compiled is None:
        return None
    x, bias = innermost(x), bias.contiguous()
    taps = weight[:, 0].t().contiguous()
    tail = None if tail is None else tail.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    numbers = (*x.stride()[:2], *x.shape, taps.shape[0], int(reverse), torch.get_num_threads())
    pointers = [ctypes.c_void_p(address(each)) for each in (x, tail, taps, bias, y)]
    compiled.depthwise_conv_silu(*pointers, *(ctypes.c_int64(number) for number in numbers))
    return y


def waveform_conv_gelu(wavs: Tensor, weight: Tensor, shift: Tensor, stride: int) -> Tensor | None:
    """GELU(wavs * weight + shift), a convolution with weights of each row.

    Args:
        wavs: (B, S).
        weight: (B, C, K).
        shift: (B, C).
        stride: samples between frames.

    Returns:
        (B, T, C).
    """
    compiled = library() if is_plain_float(wavs, weight, shift) and wavs.numel() else None
    if compiled is None:
        return None
    wavs, shift = innermost(wavs), shift.contiguous()
    taps = weight.transpose(1, 2).contiguous()
    batch, kernel, channels = taps.shape
    y = wavs.new_empty(batch, (wavs.shape[1] - kernel) // stride + 1, channels)
    numbers = (wavs.stride(0), *y.shape, kernel, stride, torch.get_num_threads())
    pointers = [ctypes.c_void_p(address(each)) for each in (wavs, taps, shift, y)]
    compiled.waveform_conv_gelu(*pointers, *(ctypes.c_int64(number) for number in numbers))
    return y
