"""A bidirectional LSTM layer of several trials at once, with its gradient: one launch a frame for all trials and both directions.

cuDNN runs one trial's layer at a time, and its products of a frame (16 rows by 4,096) leave most of a GPU idle. Here every trial,
direction and block of units is a program of one launch, which multiplies, adds and applies the gates: what bounds it is reading the
recurrent weights once a frame. Rows are not packed: each runs over its own frames alone, in both directions.

The plain functions beside the kernels are the reference, and what runs without Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # torch for CPUs comes without it
    triton = None

GATES = 4  # input, forget, cell, output: torch's order
UNIT_BLOCK = 64  # widths are multiples of it
# The fastest of eight shapes on an H100. Three products of tf32 parts are as exact as float32 here (both
# differ from cuDNN by 5e-7) and twice as fast as its own multiply-adds.
FORWARD = {"UNITS": 32, "INNER": 32, "num_warps": 4, "num_stages": 5}
BACKWARD = {"UNITS": 32, "INNER": 64, "num_warps": 4, "num_stages": 4}
PRECISION = "tf32x3"


def blstm(inputs: Tensor, num_frames: Tensor, weights: list[Tensor], *, plain: bool = False) -> Tensor:
    """A bidirectional LSTM layer of n trials.

    Args:
        inputs: (n, B, T, I) float32.
        num_frames: (B,) valid frames of each row, on the same device.
        weights: eight of `torch.nn.LSTM`'s names in its order, each with n rows: (n, 4H, I), (n, 4H, H), (n, 4H), (n, 4H), and
            those of the reverse direction.
        plain: without Triton.

    Returns:
        (n, B, T, 2H), zero past each row's end.

    >>> rnn = torch.nn.LSTM(3, 2, batch_first=True, bidirectional=True)
    >>> frames = torch.randn(1, 5, 3)
    >>> ours = blstm(frames[None], torch.tensor([5]), [each[None] for each in rnn.parameters()], plain=True)
    >>> torch.allclose(ours[0], rnn(frames)[0], atol=1e-6)
    True
    """
    output: Tensor = _Blstm.apply(inputs, num_frames, plain, *weights)  # type: ignore[no-untyped-call]
    return output


class _Blstm(torch.autograd.Function):
    """See `blstm`. Gates are computed in place of their inputs' products, and their gradients in place of the gates."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, num_frames: Tensor, plain: bool, *weights: Tensor) -> Tensor:
        trials, batch, frames, _ = inputs.shape
        width = weights[1].shape[2]
        gates = inputs.new_empty(trials, 2, batch, frames, GATES * width)
        rows = inputs.reshape(trials, batch * frames, -1)
        for trial in range(trials):
            for way, (into, _, bias, more) in enumerate((weights[:4], weights[4:])):
                target = gates[trial, way].view(batch * frames, -1)
                torch.addmm(bias[trial] + more[trial], rows[trial], into[trial].t(), out=target)
        recurrent = torch.stack([weights[1], weights[5]], 1)
        cells = inputs.new_empty(trials, 2, batch, frames, width)
        # frame by frame in memory, as torch's layers leave it: dropout draws in that order
        output = inputs.new_empty(trials, frames, batch, 2 * width).transpose(1, 2)
        step = _plain_forward if plain else _launch_forward
        for number in range(frames):
            step(number, gates, cells, output, recurrent, num_frames)
        ctx.save_for_backward(inputs, num_frames, gates, cells, output, recurrent, weights[0], weights[4])
        ctx.plain = plain
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, num_frames, gates, cells, output, recurrent, *into = ctx.saved_tensors
        trials, batch, frames, size = inputs.shape
        width = cells.shape[-1]
        slope = gradients[0].contiguous()
        carried = cells.new_zeros(trials, 2, batch, width)
        step = _plain_backward if ctx.plain else _launch_backward
        for number in reversed(range(frames)):
            step(number, gates, cells, slope, carried, recurrent, num_frames)
        rows = inputs.reshape(trials, batch * frames, size)
        through = torch.zeros_like(rows)
        found: list[Tensor] = []
        for way in range(2):
            flat = gates[:, way].reshape(trials, batch * frames, -1)
            turned = flat.transpose(1, 2)
            before = _before(output, way, width).view(trials, batch * frames, width)
            bias = flat.sum(1)
            found += [torch.bmm(turned, rows), torch.bmm(turned, before), bias, bias]
            through.baddbmm_(flat, into[way])
        return (through.view_as(inputs), None, None, *found)


def _before(output: Tensor, way: int, width: int) -> Tensor:
    """(n, B, T, H) the state that each frame's step of a direction began with."""
    before = output.new_zeros(*output.shape[:3], width)
    if way == 0:
        before[:, :, 1:] = output[:, :, :-1, :width]
    else:
        before[:, :, :-1] = output[:, :, 1:, width:]
    return before


def _places(number: int, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """Where in time (2, B) a step of either direction stands, and whether the row has such a step (B,)."""
    valid = number < num_frames
    ahead = torch.full_like(num_frames, number)
    return torch.stack([ahead, torch.where(valid, num_frames - 1 - number, ahead)]), valid


def _plain_forward(
    number: int, gates: Tensor, cells: Tensor, output: Tensor, recurrent: Tensor, num_frames: Tensor
) -> None:
    """One step of all trials, both directions."""
    places, valid = _places(number, num_frames)
    batch, width = len(num_frames), cells.shape[-1]
    rows = torch.arange(batch, device=num_frames.device)
    for way, place in enumerate(places):
        half = output[..., way * width : (way + 1) * width]
        before = (place + (1 if way else -1)).clamp(0, cells.shape[3] - 1)
        has = (valid & (number > 0))[:, None]
        state = torch.where(has, half[:, rows, before], 0.0)
        cell = torch.where(has, cells[:, way, rows, before], 0.0)
        sums = gates[:, way, rows, place] + torch.bmm(state, recurrent[:, way].transpose(1, 2))
        into, forget, new, out = sums.chunk(GATES, -1)
        into, forget, new, out = into.sigmoid(), forget.sigmoid(), new.tanh(), out.sigmoid()
        cell = forget * cell + into * new
        kept = valid[:, None]
        gates[:, way, rows, place] = torch.cat([into, forget, new, out], -1) * kept
        cells[:, way, rows, place] = cell * kept
        half[:, rows, place] = out * cell.tanh() * kept


def _plain_backward(
    number: int, gates: Tensor, cells: Tensor, slope: Tensor, carried: Tensor, recurrent: Tensor, num_frames: Tensor
) -> None:
    """The gradient of `_plain_forward`: the gates' take their place, the cells' is carried to the step before."""
    places, valid = _places(number, num_frames)
    batch, width, longest = len(num_frames), cells.shape[-1], cells.shape[3]
    rows = torch.arange(batch, device=num_frames.device)
    for way, place in enumerate(places):
        before = (place + (1 if way else -1)).clamp(0, longest - 1)
        after = (place + (-1 if way else 1)).clamp(0, longest - 1)
        follows = (number + 1 < num_frames)[:, None]
        state = torch.bmm(torch.where(follows, gates[:, way, rows, after], 0.0), recurrent[:, way])
        state = state + slope[:, rows, place, way * width : (way + 1) * width]
        into, forget, new, out = gates[:, way, rows, place].chunk(GATES, -1)
        level = cells[:, way, rows, place].tanh()
        cell = torch.where((valid & (number > 0))[:, None], cells[:, way, rows, before], 0.0)
        change = state * out * (1 - level * level) + carried[:, way]
        parts = change * new * into * (1 - into), change * cell * forget * (1 - forget), change * into * (1 - new * new)
        kept = valid[:, None]
        gates[:, way, rows, place] = torch.cat([*parts, state * level * out * (1 - out)], -1) * kept
        carried[:, way] = change * forget * kept


def _launch_forward(
    number: int, gates: Tensor, cells: Tensor, output: Tensor, recurrent: Tensor, num_frames: Tensor
) -> None:
    _launch(_forward_step, FORWARD, number, (gates, cells, output, recurrent, num_frames), cells)


def _launch_backward(
    number: int, gates: Tensor, cells: Tensor, slope: Tensor, carried: Tensor, recurrent: Tensor, num_frames: Tensor
) -> None:
    _launch(_backward_step, BACKWARD, number, (gates, cells, slope, carried, recurrent, num_frames), cells)


def _launch(kernel: Any, shape: dict[str, int], number: int, tensors: tuple[Tensor, ...], cells: Tensor) -> None:
    trials, _, batch, frames, width = cells.shape
    units = min(shape["UNITS"], width)
    inner = min(shape["INNER"], width)
    rows = max(16, triton.next_power_of_2(batch))
    kernel[(2 * trials, triton.cdiv(width, units))](
        *tensors, number, batch, frames, width, rows, units, inner, PRECISION,
        num_warps=shape["num_warps"], num_stages=shape["num_stages"],
    )  # fmt: skip


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _tanh(value):  # type: ignore[no-untyped-def]
        fallen = tl.exp(-2.0 * tl.abs(value))
        level = (1.0 - fallen) / (1.0 + fallen)
        return tl.where(value < 0, -level, level)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _rows(num_frames, number, batch, way, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        # The rows, which there are, their lengths, which have such a step, where it stands, and the one before it.
        row = tl.arange(0, ROWS)
        there = row < batch
        length = tl.load(num_frames + row, mask=there, other=0)
        valid = there & (number < length)
        place = tl.where((way == 1) & valid, length - 1 - number, number)
        return row, there, length, valid, place, tl.where(way == 1, place + 1, place - 1)

    @triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _forward_step(  # type: ignore[no-untyped-def]
        gates, cells, output, recurrent, num_frames, number, batch, frames, WIDTH: tl.constexpr, ROWS: tl.constexpr,
        UNITS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        which = tl.program_id(0).to(tl.int64)  # trial and direction
        trial, way = which // 2, which % 2
        unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        row, there, _, valid, place, before = _rows(num_frames, number, batch, way, ROWS)
        has = (valid & (number > 0))[:, None]
        states = output + (((trial * frames + before) * batch + row) * 2 + way)[:, None] * WIDTH
        weights = recurrent + which * 4 * WIDTH * WIDTH + unit[None, :].to(tl.int64) * WIDTH
        into = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        forget = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        new = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        out = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for start in range(0, WIDTH, INNER):
            inner = start + tl.arange(0, INNER)
            state = tl.load(states + inner[None, :], mask=has, other=0.0)
            part = weights + inner[:, None]
            into = tl.dot(state, tl.load(part), into, input_precision=PRECISION)
            forget = tl.dot(state, tl.load(part + WIDTH * WIDTH), forget, input_precision=PRECISION)
            new = tl.dot(state, tl.load(part + 2 * WIDTH * WIDTH), new, input_precision=PRECISION)
            out = tl.dot(state, tl.load(part + 3 * WIDTH * WIDTH), out, input_precision=PRECISION)
        stand = ((which * batch + row) * frames)[:, None]
        own = gates + (stand + place[:, None]) * 4 * WIDTH + unit[None, :]
        inside = there[:, None]
        into = tl.sigmoid(into + tl.load(own, mask=inside, other=0.0))
        forget = tl.sigmoid(forget + tl.load(own + WIDTH, mask=inside, other=0.0))
        new = _tanh(new + tl.load(own + 2 * WIDTH, mask=inside, other=0.0))
        out = tl.sigmoid(out + tl.load(own + 3 * WIDTH, mask=inside, other=0.0))
        cell = tl.load(cells + (stand + before[:, None]) * WIDTH + unit[None, :], mask=has, other=0.0)
        cell = forget * cell + into * new
        kept = valid[:, None]
        tl.store(own, tl.where(kept, into, 0.0), mask=inside)
        tl.store(own + WIDTH, tl.where(kept, forget, 0.0), mask=inside)
        tl.store(own + 2 * WIDTH, tl.where(kept, new, 0.0), mask=inside)
        tl.store(own + 3 * WIDTH, tl.where(kept, out, 0.0), mask=inside)
        tl.store(cells + (stand + place[:, None]) * WIDTH + unit[None, :], tl.where(kept, cell, 0.0), mask=inside)
        target = output + (((trial * frames + place) * batch + row) * 2 + way)[:, None] * WIDTH + unit[None, :]
        tl.store(target, tl.where(kept, out * _tanh(cell), 0.0), mask=inside)

    @triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _backward_step(  # type: ignore[no-untyped-def]
        gates, cells, slope, carried, recurrent, num_frames, number, batch, frames, WIDTH: tl.constexpr,
        ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        which = tl.program_id(0).to(tl.int64)
        trial, way = which // 2, which % 2
        unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        row, there, length, valid, place, before = _rows(num_frames, number, batch, way, ROWS)
        after = tl.where(way == 1, place - 1, place + 1)
        follows = (there & (number + 1 < length))[:, None]
        has = (valid & (number > 0))[:, None]
        stand = ((which * batch + row) * frames)[:, None]
        slopes = gates + (stand + after[:, None]) * 4 * WIDTH
        weights = recurrent + which * 4 * WIDTH * WIDTH + unit[None, :]
        state = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for start in range(0, 4 * WIDTH, INNER):
            inner = start + tl.arange(0, INNER)
            part = tl.load(slopes + inner[None, :], mask=follows, other=0.0)
            weight = tl.load(weights + inner[:, None].to(tl.int64) * WIDTH)
            state = tl.dot(part, weight, state, input_precision=PRECISION)
        kept = valid[:, None]
        from_above = slope + (((trial * batch + row) * frames + place) * 2 + way)[:, None] * WIDTH + unit[None, :]
        state += tl.load(from_above, mask=kept, other=0.0)
        own = gates + (stand + place[:, None]) * 4 * WIDTH + unit[None, :]
        into = tl.load(own, mask=kept, other=0.0)
        forget = tl.load(own + WIDTH, mask=kept, other=0.0)
        new = tl.load(own + 2 * WIDTH, mask=kept, other=0.0)
        out = tl.load(own + 3 * WIDTH, mask=kept, other=0.0)
        level = _tanh(tl.load(cells + (stand + place[:, None]) * WIDTH + unit[None, :], mask=kept, other=0.0))
        cell = tl.load(cells + (stand + before[:, None]) * WIDTH + unit[None, :], mask=has, other=0.0)
        carry = carried + (which * batch + row)[:, None] * WIDTH + unit[None, :]
        change = state * out * (1.0 - level * level) + tl.load(carry, mask=kept, other=0.0)
        tl.store(own, change * new * into * (1.0 - into), mask=kept)
        tl.store(own + WIDTH, change * cell * forget * (1.0 - forget), mask=kept)
        tl.store(own + 2 * WIDTH, change * into * (1.0 - new * new), mask=kept)
        tl.store(own + 3 * WIDTH, state * level * out * (1.0 - out), mask=kept)
        tl.store(carry, change * forget, mask=kept)
