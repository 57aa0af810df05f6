"""In which type states are kept: floats as they are, or int8 with a scale for every frame of every layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import RequestError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
SCALE_BYTES = 4  # a float32 scale stands behind the numbers of each frame


def check_dtype(dtype: str) -> None:
    """Refuse an unknown name.

    Raises:
        RequestError: with the known ones.
    """
    if dtype not in DTYPES:
        raise RequestError(f"unknown feature dtype {dtype!r}. Fix: one of {', '.join(DTYPES)}")


def frame_bytes(dim: int, dtype: str) -> int:
    """What one frame of one layer takes.

    >>> frame_bytes(768, "float16"), frame_bytes(768, "int8")
    (1536, 772)
    """
    return dim + SCALE_BYTES if dtype == "int8" else dim * DTYPES[dtype].itemsize


def pack(states: Tensor, dtype: str) -> Tensor:
    """States (..., D) as they are kept: (..., D) of a float type, or (..., D + 4) bytes for "int8".

    An int8 frame is round(x / scale) with scale = max|x| / 127, as its float32 bytes behind the numbers: the error of a number
    is at most half its frame's scale.

    >>> unpack(pack(torch.tensor([[1.0, -127.0, 0.4]]), "int8"), "int8").tolist()
    [[1.0, -127.0, 0.0]]
    """
    if dtype != "int8":
        return states.to(DTYPES[dtype])
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True) / 127
    whole = (states / torch.where(scale > 0, scale, torch.ones_like(scale))).round().clamp_(-127, 127)
    return torch.cat([whole.to(torch.int8), scale.contiguous().view(torch.int8)], -1)


def unpack(packed: Tensor, dtype: str) -> Tensor:
    """States (..., D) of what `pack` gave: float32 for "int8", else the type they are kept in."""
    if dtype != "int8":
        return packed
    return packed[..., :-SCALE_BYTES].float() * _scales(packed)


def is_finite(packed: Tensor, dtype: str) -> Tensor:
    """A boolean scalar: whether all that is kept can be read back as finite numbers."""
    return finite(_scales(packed) if dtype == "int8" else packed)


def finite_bounds(numbers: Tensor, dtype: str) -> Tensor:
    """Two booleans: whether all numbers are finite, and whether they still are as they are kept; one pass over them.

    Rounding keeps the order, so that the least and the largest number tell.

    >>> finite_bounds(torch.tensor([1.0, 1e5]), "float16").tolist(), finite_bounds(torch.tensor([1e5]), "int8").tolist()
    ([True, False], [True, True])
    """
    bounds = torch.stack(torch.aminmax(numbers))
    kept = bounds if dtype == "int8" else bounds.to(DTYPES[dtype])
    return torch.stack([torch.isfinite(bounds).all(), torch.isfinite(kept).all()])


def finite(numbers: Tensor) -> Tensor:
    """A boolean scalar: whether all numbers are finite, in one pass over them: NaN is both the least and the largest.

    >>> bool(finite(torch.tensor([1.0, float("nan"), 2.0]))), bool(finite(torch.tensor([1.0, 2.0])))
    (False, True)
    """
    least, largest = torch.aminmax(numbers)
    return torch.isfinite(least) & torch.isfinite(largest)


def _scales(packed: Tensor) -> Tensor:
    """The scales (..., 1) behind int8 frames; a copy, whose bytes lie where a float may."""
    return packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def byte_pieces(packed: Tensor) -> list[np.ndarray[Any, Any]]:
    """The bytes (uint8) of a packed tensor on the CPU, in order; shared with it where each of its layers lies in one piece."""
    pieces = [packed] if packed.is_contiguous() else packed.unbind()
    return [piece.contiguous().reshape(-1).view(torch.uint8).numpy() for piece in pieces]


def of_bytes(data: Tensor, start: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The packed tensor of some shape whose bytes begin at `start` of some bytes (uint8), which it shares."""
    count = math.prod(shape) * DTYPES[dtype].itemsize
    return data[start : start + count].view(DTYPES[dtype]).view(shape)
