"""The selective scan on an NVIDIA GPU, forward and backward: one launch, or three when time is split to fill the chip.

Kernels in `scan_forward.cu` and `scan_backward.cu`. What bounds the forward pass: one exponential a channel, state and frame, on
units that do 16 a clock and processor; everything else is arranged to stay under that. Few rows leave processors idle, so time is
then cut in chunks: every chunk's last state from zero, a pass that carries states from chunk to chunk, and the chunks again from
their true states. Two scans of one shape, one forwards in time and one backwards, can share a launch (`selective_scan_both`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from superb_probe.upstreams.cuda_kernels import KINDS, can_run, in_pairs, launch, processor_count, shared_limit_bytes
from superb_probe.upstreams.scan_inputs import ScanInputs
from superb_probe.upstreams.scan_layout import GradientLayout, Split, choose_gradient_layout, choose_split

SOURCE = "scan_forward.cu"
GRADIENT_SOURCE = "scan_backward.cu"
MAX_STATES = 64
NAMES = ("U", "DELTA", "B", "C", "Z")


class _Arguments(ctypes.Structure):
    """The kernel's struct of the same fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "delta", "b", "c", "z", "a", "d", "bias")),
        *((name, ctypes.c_void_p) for name in ("num_frames", "initial", "y", "last", "steps", "kept")),
        *((f"{name}_batch", ctypes.c_longlong) for name in ("u", "delta", "b", "c", "z")),
        *((name, ctypes.c_int) for name in ("frames", "chunk_frames", "chunks")),
    ]


class _GradientArguments(ctypes.Structure):
    """The backward kernel's struct of the same fields."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("u", "delta", "b", "c", "z", "dy", "a", "d", "bias", "num_frames", "kept")
        ),
        *((name, ctypes.c_void_p) for name in ("dlast", "du", "da", "dinitial", "dd", "dbias", "dbc")),
        *((f"{name}_batch", ctypes.c_longlong) for name in ("u", "delta", "b", "c", "z", "dy")),
        ("frames", ctypes.c_int),
    ]


def supports(given: ScanInputs) -> bool:
    """Whether the kernel can run on inputs like these: a GPU, a dtype it knows, at most 64 states, each with its own decay."""
    states = given.B.shape[1]
    own_decays = given.A.shape[1] == states
    return can_run(given.u.device, given.u.dtype) and states <= MAX_STATES and own_decays and given.u.shape[2] > 0


def selective_scan_cuda(
    given: ScanInputs, split: Split | None = None, layout: GradientLayout | None = None
) -> tuple[Tensor, Tensor]:
    """`selective_scan` on a GPU: all values are worked on in the dtype of u, the state in fp32.

    Args:
        given: what `supports` allows.
        split: how the forward pass is laid out; by default what was fast for the shape.
        layout: how the backward pass is.
    """
    inputs = _Inputs.of(given)
    split = inputs.split() if split is None else split
    if given.recorded():
        if layout is None:
            layout = choose_gradient_layout(given.B.shape[1], inputs.pairs(), shared_limit_bytes(given.u.device))
        y, last = _Scan.apply(*inputs, split, layout)  # type: ignore[no-untyped-call]
    else:
        y, last, _ = _forward([inputs], split, 0)[0]
    return y.transpose(1, 2), last


def selective_scan_both(ahead: ScanInputs, back: ScanInputs) -> tuple[Tensor, Tensor] | None:
    """Two scans without gradients in one launch: the outputs (B, E, T), or None where they cannot share one.

    Args:
        ahead: forwards in time.
        back: backwards in time.
    """
    both = (ahead, back)
    if (ahead.reverse, back.reverse) != (False, True) or not all(supports(each) for each in both):
        return None
    scans = [_Inputs.of(each) for each in both]
    split = scans[0].split(2)
    same = all(a is not None and a.shape == b.shape for a, b in zip(scans[0][:5], scans[1][:5], strict=True))
    macros = [{**each.forward_macros(split), "REVERSE": 0, "PAIRS": int(each.pairs())} for each in scans]
    if not same or macros[0] != macros[1] or any(each.recorded() for each in both):
        return None
    first, second = _forward(scans, split, 0)
    return first[0].transpose(1, 2), second[0].transpose(1, 2)


class _Inputs(NamedTuple):
    """What the kernels read: (B, T, E), (E, N) and (B, T, N) with the last axis innermost; a, d, bias and initial in fp32."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    initial: Tensor | None
    lengths: Tensor | None
    softplus: bool
    reverse: bool

    @classmethod
    def of(cls, given: ScanInputs) -> _Inputs:
        """From what `selective_scan` was given, by operations that gradients go through."""
        dtype, device = given.u.dtype, given.u.device
        u, delta, b, c = (_channels_last(x, dtype) for x in (given.u, given.delta, given.B, given.C))
        z = None if given.z is None else _channels_last(given.z, dtype)
        constants = (given.D, given.delta_bias, given.initial_state)
        d, bias, initial = (None if x is None else x.float().contiguous() for x in constants)
        lengths = (
            None if given.num_frames is None else given.num_frames.to(device=device, dtype=torch.int64).contiguous()
        )
        softplus, reverse = bool(given.delta_softplus), given.reverse
        return cls(u, delta, given.A.float().contiguous(), b, c, d, z, bias, initial, lengths, softplus, reverse)

    def pairs(self) -> bool:
        """Whether two neighbouring channels can be read at once."""
        return self.u.shape[2] % 2 == 0 and all(x is None or in_pairs(x) for x in (self.u, self.delta, self.z))

    def split(self, scans: int = 1) -> Split:
        """The layout of so many scans like this one."""
        batch, frames, width = self.u.shape
        processors = processor_count(self.u.device)
        return choose_split(scans * batch, width, frames, self.b.shape[2], self.pairs(), processors)

    @property
    def macros(self) -> dict[str, int]:
        """What a source must know of them."""
        return {
            "NSTATE": self.b.shape[2],
            "WIDTH": self.u.shape[2],
            "KIND": KINDS[self.u.dtype],
            "HAS_Z": int(self.z is not None),
            "HAS_D": int(self.d is not None),
            "HAS_BIAS": int(self.bias is not None),
            "SOFTPLUS": int(self.softplus),
            "REVERSE": int(self.reverse),
        }

    @property
    def strided(self) -> tuple[Tensor | None, ...]:
        """Those of `NAMES`."""
        return self.u, self.delta, self.b, self.c, self.z

    def forward_macros(self, split: Split) -> dict[str, int]:
        """What the forward source must know of them and of the layout."""
        states = self.b.shape[2]
        lane_states = -(-states // split.group)
        paired = states % 2 == 0 and lane_states % 2 == 0 and in_pairs(self.b) and in_pairs(self.c)
        return {
            **self.macros,
            **_frame_strides(NAMES, self.strided),
            "STATES": lane_states,
            "GROUP": split.group,
            "CHANNELS": split.channels,
            "THREADS": split.threads,
            "RESIDENT": split.resident,
            "TILE": split.tile,
            "UNROLL": split.unroll,
            "POLYNOMIAL": split.polynomial,
            "WEIGHTS": 2 if paired else 1,
        }


def _forward(scans: Sequence[_Inputs], split: Split, kept_every: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Run one scan, or two of one shape in one launch: the first forwards in time, the second backwards.

    Returns:
        Of each scan (B, T, E), the last state (B, E, N) and, for a backward pass, the state before every `kept_every` frames.
    """
    first = scans[0]
    batch, frames, width = first.u.shape
    states = first.b.shape[2]
    blocks = -(-width // (split.threads // split.group * split.channels))
    chunk_frames = -(-frames // split.chunks)
    if kept_every:
        if kept_every % split.tile:
            raise ValueError(
                f"states are kept at the ends of tiles: {kept_every} frames are not whole tiles of {split.tile}"
            )
        chunk_frames = -(-chunk_frames // kept_every) * kept_every
    macros = {**first.forward_macros(split), "KEPT": kept_every, "BOTH": len(scans) - 1}
    grid = (blocks, batch, split.chunks * len(scans))
    results, arguments = [], (_Arguments * len(scans))()
    for place, inputs in enumerate(scans):
        y = torch.empty(batch, frames, width, dtype=first.u.dtype, device=first.u.device)
        last = torch.empty(batch, width, states, dtype=torch.float32, device=y.device)
        kept = last.new_empty(batch, -(-frames // kept_every), states, width) if kept_every else None
        results.append((y, last, kept))
        constants = (inputs.a, inputs.d, inputs.bias, inputs.lengths, inputs.initial, y, last, None, kept)
        pointers = map(_pointer, (*inputs.strided, *constants))
        arguments[place] = _Arguments(*pointers, *_batch_strides(inputs.strided), frames, chunk_frames, split.chunks)
    if split.chunks > 1:
        carried = _carry(scans, arguments, {**macros, "OUTPUT": 0}, grid, split)
        for each, before, (_, last, _) in zip(arguments, carried, results, strict=True):
            each.initial, each.last = before.data_ptr(), last.data_ptr()
    launch(SOURCE, "selective_scan_forward", {**macros, "OUTPUT": 1}, first.u.device, grid, split.threads, [arguments])
    return results


def _carry(
    scans: Sequence[_Inputs],
    arguments: ctypes.Array[_Arguments],
    macros: dict[str, int],
    grid: tuple[int, int, int],
    split: Split,
) -> list[Tensor]:
    """The state before every chunk of each scan, (B, chunks, E, N): nothing follows the last one, which is not run."""
    device = scans[0].u.device
    batch, _, width = scans[0].u.shape
    shape = (batch, split.chunks, width, scans[0].b.shape[2])
    ends = [torch.empty(shape, dtype=torch.float32, device=device) for _ in scans]
    steps = [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in scans]
    for place, each in enumerate(arguments):
        each.initial, each.last, each.steps = None, ends[place].data_ptr(), steps[place].data_ptr()
    fewer = (grid[0], grid[1], grid[2] - len(scans))
    launch(SOURCE, "selective_scan_forward", macros, device, fewer, split.threads, [arguments])
    befores = []
    for inputs, end, step in zip(scans, ends, steps, strict=True):
        before = torch.empty_like(end)
        values = [ctypes.c_void_p(_pointer(x)) for x in (inputs.a, inputs.initial, end, step, before)]
        sizes = [ctypes.c_int(value) for value in (batch, width, split.chunks)]
        blocks = -(-batch * width * shape[3] // 256)
        launch(SOURCE, "carry_states", macros, device, (blocks, 1, 1), 256, [*values, *sizes])
        befores.append(before)
    return befores


class _Scan(torch.autograd.Function):
    """The scan of `_Inputs` with its gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *fields, split, layout = arguments
        inputs = _Inputs(*fields)
        y, last, kept = _forward([inputs], split, layout.chunk_frames)[0]
        ctx.save_for_backward(*inputs[:10], kept)
        ctx.rest, ctx.layout = inputs[10:], layout
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *fields, kept = ctx.saved_tensors
        inputs = _Inputs(*fields, *ctx.rest)
        found = _backward(inputs, kept, ctx.layout, dy, dlast)
        asked = zip(found, ctx.needs_input_grad, strict=False)
        return (*(gradient if needed else None for gradient, needed in asked), *[None] * 5)


def _backward(
    inputs: _Inputs, kept: Tensor, layout: GradientLayout, dy: Tensor | None, dlast: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the first nine of `inputs`."""
    u, z = inputs.u, inputs.z
    batch, frames, width = u.shape
    states = inputs.b.shape[2]
    dy = torch.zeros_like(u) if dy is None else dy.to(u.dtype)
    if dy.stride(2) != 1 or layout.channels == 2 and not in_pairs(dy):
        dy = dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    blocks = -(-width // layout.block_channels)
    by_frame = torch.empty(batch, frames, 3, width, dtype=u.dtype, device=u.device)
    by_state = [kept.new_empty(batch, width, states) for _ in range(2)]
    by_channel = [kept.new_empty(batch, width) for _ in range(2)]
    dbc = kept.new_empty(blocks, batch, frames, 2, states)
    strided = (*inputs.strided, dy)
    constants = (inputs.a, inputs.d, inputs.bias, inputs.lengths, kept, dlast)
    pointers = (*strided, *constants, by_frame, *by_state, *by_channel, dbc)
    arguments = _GradientArguments(*map(_pointer, pointers), *_batch_strides(strided), frames)
    macros = {
        **inputs.macros,
        "CHANNELS": layout.channels,
        "THREADS": layout.threads,
        "RESIDENT": layout.resident,
        "CHUNK": layout.chunk_frames,
        **_frame_strides((*NAMES, "DY"), strided),
    }
    launch(
        GRADIENT_SOURCE,
        "selective_scan_backward",
        macros,
        u.device,
        (blocks, batch, 1),
        layout.threads,
        [arguments],
        layout.shared_bytes(states),
    )
    db, dc = dbc.sum(0).to(u.dtype).unbind(2)
    return [
        by_frame[:, :, 0],
        by_frame[:, :, 1],
        by_state[0].sum(0),
        db,
        dc,
        None if inputs.d is None else by_channel[0].sum(0),
        None if z is None else by_frame[:, :, 2],
        None if inputs.bias is None else by_channel[1].sum(0),
        by_state[1],
    ]


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, X, T) as (B, T, X) with X innermost in memory: a view where it is that already."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _batch_strides(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of each tensor's first axis, in values."""
    return [0 if x is None else x.stride(0) for x in tensors]


def _frame_strides(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, int]:
    """Of each tensor's second axis, as macros: what is known when a source is compiled costs no arithmetic."""
    return {f"{name}_FRAME": 0 if x is None else x.stride(1) for name, x in zip(names, tensors, strict=True)}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
