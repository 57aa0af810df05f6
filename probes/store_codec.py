"""In which type states are kept: floats as they are, or int8 with a scale for every frame of every layer."""

from __future__ import annotations

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
    return torch.isfinite(_scales(packed) if dtype == "int8" else packed).all()


def _scales(packed: Tensor) -> Tensor:
    """The scales (..., 1) behind int8 frames; a copy, whose bytes lie where a float may."""
    return packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def to_numpy(packed: Tensor) -> np.ndarray[Any, Any]:
    """The bytes (uint8) of a packed tensor on the CPU."""
    return packed.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def from_numpy(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The packed tensor of some bytes (uint8), which it shares."""
    return torch.from_numpy(data).view(DTYPES[dtype]).reshape(shape)
