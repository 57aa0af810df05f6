"""Triton kernels for what torch does in several passes on a GPU: the weighted sum of layers, its gradient, Adam of many trials.

Each has a plain equivalent beside its caller, which is the reference and what runs where Triton does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # torch for CPUs comes without it
    triton = None

BLOCK = 2048


@cache
def available() -> bool:
    """Whether Triton is there and compiles; says so once where it is there and does not."""
    if triton is None or not torch.cuda.is_available():
        return False
    try:
        mix(torch.ones(1, 1, device="cuda"), torch.ones(1, 4, device="cuda"))
    except Exception as error:  # noqa: BLE001  whatever a compiler that is missing or does not fit raises
        warnings.warn(f"Triton is installed but does not compile ({error}): plain operations are used", stacklevel=2)
        return False
    return True


def can_multiply(device: torch.device) -> bool:
    """Whether products in kernels run on a device: an NVIDIA GPU whose matrix units take tf32, with a Triton that compiles."""
    if device.type != "cuda" or torch.version.hip or not available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def mix(mixture: Tensor, states: Tensor) -> Tensor:
    """(N, E) mixtures (N, L) of layers (L, E) of any float type, in float32: every layer is read once.

    See `weighted_sum.mix` for the plain equivalent.
    """
    trials, layers = mixture.shape
    size = states.shape[1]
    mixed = torch.empty(trials, size, device=states.device)
    block = _block(trials)
    _mix[(triton.cdiv(size, block),)](
        mixture.float().contiguous(), states, mixed, size, trials, layers, triton.next_power_of_2(trials), block
    )
    return mixed


def mixture_gradient(gradient: Tensor, states: Tensor) -> Tensor:
    """(N, L) inner products of gradients (N, E) with layers (L, E): both are read once, and the order of sums is fixed.

    See `weighted_sum.mixture_gradient` for the plain equivalent.
    """
    trials, size = gradient.shape
    layers = states.shape[0]
    block = _block(trials)
    blocks = triton.cdiv(size, block)
    parts = torch.empty(blocks, trials, layers, device=states.device)
    _mixture_gradient[(blocks,)](
        gradient.contiguous(), states, parts, size, trials, layers, triton.next_power_of_2(trials), block
    )
    return parts.sum(0)


def adam(
    values: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    factors: Tensor,
    made: Tensor,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Adam of N trials in one pass over (N, P) numbers.

    Args:
        values: changed in place, as `first` and `second` are.
        gradients: as they came.
        first: the first moments.
        second: the second moments.
        factors: (4, N) of the gradients, of the step, of the root of the second moment, of the values (decay).
        made: (N,) trials that are updated.
        betas: how much of each moment is kept.
        epsilon: added to the root of the second moment.
    """
    trials, size = values.shape
    beta1, beta2 = betas  # one minus each is taken in double precision here, not in single precision there
    _adam[(triton.cdiv(size, BLOCK), trials)](
        values,
        gradients,
        first,
        second,
        factors,
        made,
        size,
        trials,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        epsilon,
        BLOCK,
    )


def decide(
    norms: Tensor,
    losses: Tensor,
    state: Sequence[Tensor],
    rates: Tensor,
    clip: float,
    decay: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """What `StackedUpdater.step` does with N numbers before Adam, in one launch instead of thirty.

    Args:
        norms: (N,) of the gradients.
        losses: (N,).
        state: running, stopped_at, stopped_loss, skipped, count and updates taken; changed in place.
        rates: (N,) float64.
        clip: largest norm.
        decay: AdamW's.
        betas: Adam's.

    Returns:
        Factors (4, N) and made (N,), as `adam` takes them.
    """
    trials = len(norms)
    factors = torch.empty(4, trials, device=norms.device)
    made = torch.empty(trials, dtype=torch.bool, device=norms.device)
    logs = [math.log(beta) for beta in betas]
    _decide[(1,)](
        norms, losses, *state, rates, factors, made, trials, clip, decay, *logs, triton.next_power_of_2(trials)
    )
    return factors, made


def _block(trials: int) -> int:
    return max(128, BLOCK // int(triton.next_power_of_2(trials)))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _mix(mixture, states, mixed, size, trials, LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row = tl.arange(0, ROWS)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for layer in tl.static_range(LAYERS):
            part = tl.load(states + place, mask=place < size, other=0.0).to(tl.float32)
            states += size
            weight = tl.load(mixture + row * LAYERS + layer, mask=row < trials, other=0.0)
            total += weight[:, None] * part[None, :]
        wanted = (row[:, None] < trials) & (place[None, :] < size)
        tl.store(mixed + row[:, None].to(tl.int64) * size + place[None, :], total, mask=wanted)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _mixture_gradient(  # type: ignore[no-untyped-def]
        gradient, states, parts, size, trials, LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        block = tl.program_id(0).to(tl.int64)
        place = block * BLOCK + tl.arange(0, BLOCK)
        row = tl.arange(0, ROWS)
        wanted = (row[:, None] < trials) & (place[None, :] < size)
        slope = tl.load(gradient + row[:, None].to(tl.int64) * size + place[None, :], mask=wanted, other=0.0)
        for layer in tl.static_range(LAYERS):
            part = tl.load(states + place, mask=place < size, other=0.0).to(tl.float32)
            states += size
            product = tl.sum(slope * part[None, :], axis=1)
            tl.store(parts + (block * trials + row) * LAYERS + layer, product, mask=row < trials)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def adam_at(  # type: ignore[no-untyped-def]
        place, inside, slope, values, first, second, factors, trial, trials, beta1, beta2, rest1, rest2, epsilon
    ):
        """Adam where `inside`; `factors` are those of `adam`."""
        slope *= tl.load(factors + trial)
        step = tl.load(factors + trials + trial)
        root = tl.load(factors + 2 * trials + trial)
        keep = tl.load(factors + 3 * trials + trial)
        mean = beta1 * tl.load(first + place, mask=inside, other=0.0) + rest1 * slope
        square = beta2 * tl.load(second + place, mask=inside, other=0.0) + rest2 * slope * slope
        value = tl.load(values + place, mask=inside, other=0.0) * keep
        tl.store(first + place, mean, mask=inside)
        tl.store(second + place, square, mask=inside)
        tl.store(values + place, value - step * mean / (tl.sqrt(square) / root + epsilon), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _adam(  # type: ignore[no-untyped-def]
        values,
        gradients,
        first,
        second,
        factors,
        made,
        size,
        trials,
        beta1,
        beta2,
        rest1,
        rest2,
        epsilon,
        BLOCK: tl.constexpr,
    ):
        trial = tl.program_id(1)
        if tl.load(made + trial):
            place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = place < size
            place += trial.to(tl.int64) * size
            slope = tl.load(gradients + place, mask=inside, other=0.0)
            adam_at(
                place, inside, slope, values, first, second, factors, trial, trials, beta1, beta2, rest1, rest2, epsilon
            )

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _decide(  # type: ignore[no-untyped-def]
        norms, losses, running, stopped_at, stopped_loss, skipped, count, taken, rates, factors, made, trials, clip, decay,
        log1, log2, ROWS: tl.constexpr
    ):  # fmt: skip
        row = tl.arange(0, ROWS)
        inside = row < trials
        updates = tl.load(count) + 1
        tl.store(count, updates)
        loss = tl.load(losses + row, mask=inside, other=0.0)
        norm = tl.load(norms + row, mask=inside, other=0.0)
        runs = tl.load(running + row, mask=inside, other=0).to(tl.int1)
        lost = runs & ~(tl.abs(loss) < float("inf"))
        tl.store(stopped_at + row, updates, mask=inside & lost)
        tl.store(stopped_loss + row, loss, mask=inside & lost)
        runs = runs & ~lost
        tl.store(running + row, runs, mask=inside)
        sound = tl.abs(norm) < float("inf")
        goes = runs & sound
        misses = tl.load(skipped + row, mask=inside, other=0)
        tl.store(skipped + row, misses + (runs & ~sound).to(tl.int64), mask=inside)
        steps = tl.load(taken + row, mask=inside, other=0.0) + goes.to(tl.float32)
        tl.store(taken + row, steps, mask=inside)
        tl.store(made + row, goes, mask=inside)
        rate = tl.load(rates + row, mask=inside, other=0.0)
        exponent = tl.where(goes, steps, 1.0).to(tl.float64)  # of trials that are not updated: anything
        scale = tl.where(goes, tl.minimum(clip / (norm + 1e-6), 1.0), 0.0)
        tl.store(factors + row, scale, mask=inside)
        tl.store(factors + trials + row, (rate / (1.0 - tl.exp(exponent * log1))).to(tl.float32), mask=inside)
        tl.store(factors + 2 * trials + row, tl.sqrt(1.0 - tl.exp(exponent * log2)).to(tl.float32), mask=inside)
        tl.store(factors + 3 * trials + row, (1.0 - rate * decay).to(tl.float32), mask=inside)
