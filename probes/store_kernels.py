"""The Triton kernel that puts the utterances of a training batch together on a GPU: one launch instead of two an utterance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from superb_probe.probes import kernels

try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # torch for CPUs comes without it
    triton = None

BLOCK = 1024


def can_pad(parts: Sequence[Tensor]) -> bool:
    """Whether `pad` takes these: floats on one GPU, the frames of each layer in one piece."""
    first = parts[0]
    return (
        first.is_cuda
        and kernels.available()
        and all(
            part.device == first.device
            and part.dtype == first.dtype
            and part.is_floating_point()
            and part.stride(2) == 1
            and part.stride(1) == part.shape[2]
            for part in parts
        )
    )


def pad(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded float32 states (L, B, T, D) of utterances (L, T_b, D), zero past each length, and their lengths (B,).

    What `batches.assemble` does, which is the reference. The host waits for nothing.
    """
    first = parts[0]
    layers, _, dim = first.shape
    lengths = [part.shape[1] for part in parts]
    longest, size = max(lengths), first.element_size()
    offsets = [(part.data_ptr() - first.data_ptr()) // size for part in parts]  # in numbers, from the first
    table = torch.tensor([lengths, offsets, [part.stride(0) for part in parts]])
    if first.is_cuda:
        table = table.pin_memory().to(first.device, non_blocking=True)
    padded = torch.empty(layers, len(parts), longest, dim, device=first.device)
    grid = (triton.cdiv(longest * dim, BLOCK), layers * len(parts))
    _pad[grid](first, table, padded, len(parts), longest * dim, dim, BLOCK)
    return padded, table[0]


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _pad(first, table, padded, batch, size, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(1)  # a layer of an utterance
        utterance = row % batch
        count = tl.load(table + utterance) * dim
        source = tl.load(table + batch + utterance) + (row // batch) * tl.load(table + 2 * batch + utterance)
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        numbers = tl.load(first + source + place, mask=place < count, other=0.0)
        target = row.to(tl.int64) * size + place
        tl.store(padded + target, numbers.to(tl.float32), mask=place < size)
