"""Attention by torch's kernels, without those that make a plan for every new shape where the plan costs more than it saves.

On a GPU and in 16 bits torch prefers cuDNN's attention, which spends about 75 ms on a plan for every shape that it has not met (150 ms
with gradients; H100, torch 2.11): as much as encoding half an hour of speech. Batches of a corpus all differ in shape. Flash
attention makes no plan and takes a third more time, which is less than that for anything shorter than a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

PLANNED_PAIRS = 3e9  # rows times frames squared from which the twelve layers of a Base encoder save what the plan costs

_repeated = False


@contextmanager
def repeated_shapes() -> Iterator[None]:
    """Within it every shape is worth a plan: for passes over the same few shapes, as benches make."""
    global _repeated
    before, _repeated = _repeated, True
    try:
        yield
    finally:
        _repeated = before


@contextmanager
def kernels_for(rows: int, frames: int) -> Iterator[None]:
    """Within it torch chooses among the attention kernels that are worth it for a batch of a new shape.

    Args:
        rows: B.
        frames: T.
    """
    planned = bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    if _repeated or rows * frames**2 >= PLANNED_PAIRS or not planned:
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of all heads, (B, H, T, D / H) each.

    Args:
        query: (B, H, T, D / H).
        key: (B, H, S, D / H).
        value: (B, H, S, D / H).
        mask: what is attended to, true or an added number, in a shape that fits (B, H, T, S); None: all.
        causal: no frame sees a later one; without a mask.
    """
    with kernels_for(query.shape[0], key.shape[2]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
