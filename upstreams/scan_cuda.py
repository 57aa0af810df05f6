"""The selective scan on an NVIDIA GPU: forward only, one launch, or three when time is split to fill the chip.

Kernels in `scan_forward.cu`. What bounds it: one exponential a channel, state and frame, on units that do 16 a clock and processor;
everything else is arranged to stay under that. Few rows leave processors idle, so time is then cut in chunks: every chunk's last
state from zero, a pass that carries states from chunk to chunk, and the chunks again from their true states.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.upstreams.cuda_kernels import KINDS, can_run, launch

SOURCE = "scan_forward.cu"
MAX_STATES = 64
TILE_FRAMES = 16
THREADS = 128
MIN_CHUNK_FRAMES = 470
FEW_WARPS = 300  # below it, scanning pieces of time twice over is faster than leaving processors idle
FULL_WARPS = 4600


@dataclass(frozen=True, slots=True)
class Split:
    """How a scan is laid over the chip.

    Attributes:
        channels: of a lane.
        group: lanes that share a channel's states.
        chunks: pieces of time.
        polynomial: of a lane's states, how many take their exponential on the multiply-add units.
    """

    channels: int
    group: int
    chunks: int
    polynomial: int = 0


class _Arguments(ctypes.Structure):
    """The kernel's struct of the same fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "delta", "b", "c", "z", "a", "d", "bias")),
        *((name, ctypes.c_void_p) for name in ("num_frames", "initial", "y", "last", "steps")),
        *(
            (f"{name}_{axis}", ctypes.c_longlong)
            for name in ("u", "delta", "b", "c", "z")
            for axis in ("batch", "frame")
        ),
        *((name, ctypes.c_int) for name in ("width", "frames", "chunk_frames", "chunks")),
    ]


def supports(u: Tensor, b: Tensor, a: Tensor) -> bool:
    """Whether the kernel can run on inputs like these: a GPU, a dtype it knows, at most 64 states, each with its own decay."""
    return can_run(u.device, u.dtype) and b.shape[1] <= MAX_STATES and a.shape[1] == b.shape[1] and u.shape[2] > 0


def choose_split(batch: int, width: int, frames: int, states: int, pairs: bool, narrow: bool) -> Split:
    """The layout for a shape, as measured on an H100 with bf16.

    Args:
        batch: B.
        width: E.
        frames: T.
        states: N.
        pairs: whether two neighbouring channels can be read at once.
        narrow: whether values are of 16 bits, for which the polynomial is exact enough to be worth its share.
    """
    channels = 2 if pairs else 1
    group = max(channels, -(-states // 24))
    group = 1 << (group - 1).bit_length()
    warps = batch * width * group // (32 * channels)
    chunks = 1
    if warps < FEW_WARPS:
        chunks = max(1, min(frames // MIN_CHUNK_FRAMES, -(-FULL_WARPS // max(1, warps))))
    return Split(channels, group, chunks, -(-states // group) // 6 if narrow and pairs else 0)


def selective_scan_cuda(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    num_frames: Tensor | None = None,
    initial_state: Tensor | None = None,
    split: Split | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` without gradients, on a GPU; shapes as there, all inputs in one dtype, the state in fp32."""
    batch, width, frames = u.shape
    states = b.shape[1]
    dtype = u.dtype
    u, delta, b, c = (_channels_last(x, dtype) for x in (u, delta, b, c))
    z = None if z is None else _channels_last(z, u.dtype)
    if split is None:
        pairs = all(x is None or _in_pairs(x) for x in (u, delta, z)) and width % 2 == 0
        split = choose_split(batch, width, frames, states, pairs, u.dtype != torch.float32)
    a = a.float().contiguous()
    d, bias, initial = (None if x is None else x.float().contiguous() for x in (d, delta_bias, initial_state))
    lengths = None if num_frames is None else num_frames.to(device=u.device, dtype=torch.int64).contiguous()
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty(batch, width, states, dtype=torch.float32, device=u.device)
    chunk_frames = -(-frames // split.chunks)
    macros = {
        "NSTATE": states,
        "STATES": -(-states // split.group),
        "GROUP": split.group,
        "CHANNELS": split.channels,
        "THREADS": THREADS,
        "TILE": TILE_FRAMES,
        "KIND": KINDS[u.dtype],
        "HAS_Z": int(z is not None),
        "HAS_D": int(d is not None),
        "HAS_BIAS": int(bias is not None),
        "SOFTPLUS": int(delta_softplus),
        "REVERSE": int(reverse),
        "POLYNOMIAL": split.polynomial,
    }
    blocks = -(-width // (THREADS // split.group * split.channels))
    arguments = _Arguments(
        *(_pointer(x) for x in (u, delta, b, c, z, a, d, bias, lengths, initial, y, last, None)),
        *(stride for x in (u, delta, b, c, z) for stride in ((0, 0) if x is None else x.stride()[:2])),
        width,
        frames,
        chunk_frames,
        split.chunks,
    )
    if split.chunks > 1:
        before = _carry(arguments, macros, blocks, a, initial, (batch, split.chunks, width, states))
        arguments.initial, arguments.last = before.data_ptr(), last.data_ptr()
    launch(
        SOURCE,
        "selective_scan_forward",
        {**macros, "OUTPUT": 1},
        u.device,
        (blocks, batch, split.chunks),
        THREADS,
        [arguments],
    )
    return y.transpose(1, 2), last


def _carry(
    arguments: _Arguments,
    macros: dict[str, int],
    blocks: int,
    a: Tensor,
    initial: Tensor | None,
    shape: tuple[int, int, int, int],
) -> Tensor:
    """The state before every chunk, (B, chunks, E, N)."""
    batch, chunks, width, states = shape
    ends = torch.empty(shape, dtype=torch.float32, device=a.device)
    steps = torch.empty(shape[:3], dtype=torch.float32, device=a.device)
    before = torch.empty_like(ends)
    arguments.initial, arguments.last, arguments.steps = None, ends.data_ptr(), steps.data_ptr()
    macros = {**macros, "OUTPUT": 0}
    launch(SOURCE, "selective_scan_forward", macros, a.device, (blocks, batch, chunks), THREADS, [arguments])
    values = [ctypes.c_void_p(_pointer(x)) for x in (a, initial, ends, steps, before)]
    sizes = [ctypes.c_int(value) for value in (batch, width, chunks)]
    grid = (-(-batch * width * states // 256), 1, 1)
    launch(SOURCE, "carry_states", macros, a.device, grid, 256, [*values, *sizes])
    return before


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, X, T) as (B, T, X) with X innermost in memory: a view where it is that already."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _in_pairs(x: Tensor) -> bool:
    """Whether two neighbouring channels of (B, T, E) can be read at once, everywhere."""
    return x.data_ptr() % (2 * x.element_size()) == 0 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
