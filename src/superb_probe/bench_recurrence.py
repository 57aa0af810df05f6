"""The bench of ASR's recurrent layers: several trials as one stack, beside torch's layers one trial after another."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.bench_parts import result_of, where
from superb_probe.bench_race import cost, race
from superb_probe.engine_ask import choose_device
from superb_probe.engine_record import exact_arithmetic
from superb_probe.errors import RequestError
from superb_probe.probes.kernels import can_multiply
from superb_probe.probes.recurrence import GATES, UNIT_BLOCK, blstm

LAYERS = 2
SHAPE = ("trials", "batch", "frames", "input", "width")


def bench_recurrence(args: argparse.Namespace) -> dict[str, Any]:
    """Two bidirectional LSTM layers of every trial, forward and backward, on rows of 1/2 to all of the frames.

    torch's side is `nn.LSTM` on packed rows, which on a GPU is cuDNN. Without Triton ours is the plain form, whose time says nothing.

    Raises:
        RequestError: for a shape that is not positive, or a width that the kernels do not take.
    """
    trials, batch, frames, size, width = shape = tuple(args.shape)
    if min(shape) < 1 or width % UNIT_BLOCK:
        raise RequestError(
            f"--shape {' '.join(map(str, shape))}: positive numbers, the last one a multiple of {UNIT_BLOCK}"
        )
    device = choose_device(args.device)
    plain = not can_multiply(device)
    stacked, one = _sides(shape, device, plain=plain)
    with exact_arithmetic(device):
        pairs = list(zip(stacked(), one(0), strict=True))
        apart = max(float((ours[0] - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
        runs = {"stack": stacked, "one after another": lambda: [one(number) for number in range(trials)]}
        timings = race(runs, device, args.repeats, args.limit)
    seconds = {name: cost(timing) or 0.0 for name, timing in timings.items()}
    return result_of("recurrence", device) | {
        "shape": dict(zip(SHAPE, shape, strict=True)),
        "plain": plain,
        "seconds": seconds,
        "ratio": seconds["one after another"] / seconds["stack"],
        "peak_bytes": {name: timing["peak_bytes"] for name, timing in timings.items()},
        "largest_difference": apart,
        "needed_bytes": 2 * LAYERS * frames * 4 * trials * 2 * GATES * width * width,
        "operations": 2 * 3 * _products(size, width) * trials * batch * frames,
    }


def _sides(
    shape: Sequence[int], device: torch.device, *, plain: bool
) -> tuple[Callable[[], list[Tensor]], Callable[[int], list[Tensor]]]:
    """Calls that give the parameters' gradients: of all trials as a stack, and of one by torch's layers."""
    trials, batch, frames, size, width = shape
    torch.manual_seed(0)
    sizes = (size, *[2 * width] * (LAYERS - 1))
    heads = [
        [nn.LSTM(each, width, batch_first=True, bidirectional=True).to(device) for each in sizes] for _ in range(trials)
    ]
    rows = [[list(head[layer].parameters()) for head in heads] for layer in range(LAYERS)]
    weights = [
        [torch.stack([each.detach() for each in places]).requires_grad_() for places in zip(*layer, strict=True)]
        for layer in rows
    ]
    lengths = torch.randint(-(-frames // 2), frames + 1, (batch,))
    lengths[0] = frames
    there = lengths.to(device)
    inputs = torch.randn(trials, batch, frames, size, device=device)
    slope = torch.randn(trials, batch, frames, 2 * width, device=device)

    def stacked() -> list[Tensor]:
        hidden = inputs
        for layer in weights:
            hidden = blstm(hidden, there, layer, plain=plain)
        return list(torch.autograd.grad(hidden, [each for layer in weights for each in layer], slope))

    def one(number: int) -> list[Tensor]:
        hidden = inputs[number]
        for rnn in heads[number]:
            packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            hidden = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=frames)[0]
        return list(torch.autograd.grad(hidden, [each for layer in rows for each in layer[number]], slope[number]))

    return stacked, one


def _products(size: int, width: int) -> int:
    """Multiply-adds of a frame of all layers."""
    return 2 * GATES * width * sum(inputs + width for inputs in (size, *[2 * width] * (LAYERS - 1)))


def describe_recurrence(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    shape = result["shape"]
    ours, theirs = (1e3 * result["seconds"][name] for name in ("stack", "one after another"))
    return [
        where(result),
        f"{shape['trials']} trials of {LAYERS} bidirectional layers of {shape['width']}, "
        + f"{shape['batch']} rows of {shape['frames']} frames",
        f"  as a stack{' (plain, without Triton)' if result['plain'] else ''}: {ours:.1f} ms; torch's layers one trial after another "
        + f"{theirs:.1f} ms: {result['ratio']:.2f} times",
        f"  it reads {result['needed_bytes'] / 1e9:.1f} GB of recurrent weights and makes {result['operations'] / 1e12:.2f} TFLOP",
        f"  gradients differ by {result['largest_difference']:.1e} of their norm at most",
    ]
