"""A whole update of linear heads on kept means, in which nothing as large as the weights is written but they.

With a product for each step (`training.MeanStack`'s plain form, the reference) the gradients of N projectors are written, read for
their norm, and read again for Adam: eleven passes over (N, W, D) numbers. A gradient is the product of (W, R) by (R, D) with some
32 rows R, cheaper to make than to read. So it is made twice and kept nowhere: once for its norm, once in the tile that Adam
is at. What is left are two reads of the weights for the products, and what Adam has to read and write: eight passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superb_probe.probes import kernels
from superb_probe.probes.update import BETA1, BETA2, EPS, StackedUpdater
from superb_probe.probes.weighted_sum import Mixer

try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # torch for CPUs comes without it
    triton = None

# Places of the weights among an updater's parameters, each with its bias behind it; the layers' weights are first.
PROJECTOR, LINEAR = 1, 3
TILE = 64  # widths are multiples of it
MOST_CLASSES, MOST_ROWS, MOST_LAYERS = 4096, 64, 64  # what one program holds
UNITS = 16  # outputs of a layer, of one program of the forward pass
COLUMNS = 32  # inputs of a layer, of one program of the way back
BLOCK = 256  # of a mean's numbers, read at once
PRECISION = "tf32x3"  # three products of tf32 parts: as exact as float32


def fits(updater: StackedUpdater, rows: int, device: torch.device) -> bool:
    """Whether the updates of some trials can be made by `MeanUpdate`.

    Args:
        updater: of N trials of `UtteranceLinear`, whose rows begin with the layers' weights.
        rows: R of an update.
        device: where the trials are.
    """
    (layers,), (width, dim), (classes, _) = (updater.shapes[place] for place in (0, PROJECTOR, LINEAR))
    small = rows <= MOST_ROWS and classes <= MOST_CLASSES and layers <= MOST_LAYERS
    return small and width % TILE == 0 and dim % TILE == 0 and kernels.can_multiply(device)


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer of N trials in one update.

    Attributes:
        inputs: (N, R, I).
        outputs: (N, R, O); of the last layer, later their gradient.
        slopes: (N, R, O) the gradient of the outputs.
        back: (N, R, I) the gradient of the inputs.
        weight: where a trial's row of the updater has the weight (O, I).
        bias: where it has the bias.
        tiles: of the weight, for Adam.
        square: where the squares of its gradients begin.
    """

    inputs: Tensor
    outputs: Tensor
    slopes: Tensor
    back: Tensor
    weight: int
    bias: int
    tiles: int
    square: int

    @property
    def sizes(self) -> dict[str, int]:
        """I and O, as the kernels take them."""
        return {"IN": self.inputs.shape[2], "OUT": self.outputs.shape[2]}


class MeanUpdate:
    """The update of N trials of `UtteranceLinear` on means: mix, both layers, losses, both layers back, norm, Adam.

    Weights, moments and counters are the updater's, and so is the rule (`StackedUpdater.step`). Its `gradients` hold those of
    the biases and of the layers' weights; those of the heads' weights are kept nowhere.
    """

    def __init__(
        self,
        updater: StackedUpdater,
        mixer: Mixer,
        means: Tensor,
        targets: Tensor,
        seed_of: Tensor,
        sizes: Sequence[int],
        rows: int,
    ) -> None:
        """Plan the updates of some trials.

        Args:
            updater: of the trials, as `fits` says.
            mixer: their mixtures.
            means: (L, M, D) of any float type, contiguous.
            targets: (seeds, U, slots) class ids of every utterance.
            seed_of: (N,) which seed a trial has.
            sizes: classes of each slot.
            rows: R of an update.
        """
        if not means.is_contiguous():
            raise ValueError(f"means of strides {means.stride()}: contiguous ones are read")
        self._updater, self._mixer, self._means = updater, mixer, means
        self._targets, self._seed_of = targets, seed_of
        device, count = means.device, len(seed_of)
        slots = [slot for slot, size in enumerate(sizes) for _ in range(size)]
        numbers = [number for size in sizes for number in range(size)]
        self._slot_of, self._number_of = (
            torch.tensor(each, dtype=torch.int32, device=device) for each in (slots, numbers)
        )
        (width, dim), (classes, _) = updater.shapes[PROJECTOR], updater.shapes[LINEAR]

        def frames(size: int) -> Tensor:
            return torch.zeros(count, rows, size, device=device)

        mixed, back, hidden, hidden_back, scores = (frames(size) for size in (dim, dim, width, width, classes))
        squares = dim // COLUMNS
        at, bias, linear_at, linear_bias = updater.offsets[PROJECTOR : LINEAR + 2]
        tiles = width // TILE * (dim // TILE), triton.cdiv(classes, TILE) * (width // TILE)
        self._projector = _Linear(mixed, hidden, hidden_back, back, at, bias, tiles[0], 0)
        self._linear = _Linear(hidden, scores, scores, hidden_back, linear_at, linear_bias, tiles[1], squares)
        self._squares = torch.zeros(count, squares + width // COLUMNS, device=device)
        self._products = torch.zeros(count, rows, len(means), device=device)
        self._losses = torch.zeros(count, rows, device=device)
        self._loss, self._norms = (torch.zeros(count, device=device) for _ in range(2))

    def __call__(self, index: Tensor, weights: Tensor) -> None:
        """Make one update, without the host.

        Args:
            index: (seeds, R, 2) the rows' places among utterances and means.
            weights: (R,) what a row counts in the loss.
        """
        updater, projector, linear = self._updater, self._projector, self._linear
        values, gradients, size = updater.values, updater.gradients, updater.values.shape[1]
        count, rows, dim = projector.inputs.shape
        mixture = size, self._mixer.learnt, self._mixer.single
        means = self._means, index, self._seed_of, self._means.shape[1], rows
        layers = {"LAYERS": len(self._means), "PADDED": triton.next_power_of_2(len(self._means))}
        shape: dict[str, Any] = {"ROWS": max(16, triton.next_power_of_2(rows)), "TILE": TILE, "PRECISION": PRECISION}
        learnt = self._mixer.any_learnt

        _mix_rows[(count, rows)](values, *mixture, *means, projector.inputs, dim, BLOCK, **layers, num_warps=1)
        for layer in (projector, linear):
            _forward[(count, triton.cdiv(layer.outputs.shape[2], UNITS))](
                layer.inputs, values, layer.outputs, size, layer.weight, layer.bias, rows, UNITS, **layer.sizes, **shape,
                num_warps=2,
            )  # fmt: skip
        classes, slots = len(self._slot_of), self._targets.shape[2]
        _class_losses[(count, rows)](
            linear.outputs, self._losses, self._targets, index, self._seed_of, weights, self._slot_of, self._number_of,
            rows, classes, self._targets.shape[1], slots, triton.next_power_of_2(classes),
        )  # fmt: skip
        for layer, needed in ((linear, True), (projector, learnt)):
            _backward[(count, layer.inputs.shape[2] // COLUMNS)](
                layer.inputs, layer.slopes, values, gradients, layer.back, self._squares, size, layer.weight, layer.bias,
                rows, self._squares.shape[1], layer.square, needed, COLUMNS, **layer.sizes, **shape,
                num_warps=2, num_stages=1,
            )  # fmt: skip
        if learnt:
            _inner_products[(count, rows)](projector.back, *means, self._products, dim, BLOCK, **layers, num_warps=1)
        squares = self._squares.shape[1]
        _norm[(count,)](
            values, *mixture, gradients, self._products, self._squares, self._losses, self._loss, self._norms, rows,
            squares, shape["ROWS"], triton.next_power_of_2(squares), **layers,
        )  # fmt: skip
        factors, made = updater.decide(self._norms, self._loss)
        heads = sum(layer.outputs.shape[2] * layer.inputs.shape[2] for layer in (projector, linear))
        tiles = projector.tiles, linear.tiles
        _adam_by_tiles[(sum(tiles) + triton.cdiv(size - heads, kernels.BLOCK), count)](
            projector.inputs, projector.slopes, linear.inputs, linear.slopes, values, gradients, updater.first,
            updater.second, factors, made, size, projector.weight, linear.weight, rows, count, BETA1, BETA2,
            1 - BETA1, 1 - BETA2, EPS, *tiles, kernels.BLOCK, dim, projector.outputs.shape[2], classes, **shape,
        )  # fmt: skip


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _mixture(weights, learnt, single, layer, LAYERS: tl.constexpr):  # type: ignore[no-untyped-def]
        inside = layer < LAYERS
        weight = tl.load(weights + layer, mask=inside, other=-float("inf"))
        power = tl.exp(weight - tl.max(weight, axis=0))
        chosen = tl.load(single + layer, mask=inside, other=0.0)
        return tl.where(tl.load(learnt).to(tl.int1), power / tl.sum(power, axis=0), chosen)

    @triton.jit(do_not_specialize=["index"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _mix_rows(  # type: ignore[no-untyped-def]
        values, size, learnt, single, means, index, seed_of, count, rows, mixed, DIM: tl.constexpr, BLOCK: tl.constexpr,
        LAYERS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        trial, row = tl.program_id(0), tl.program_id(1)
        layer = tl.arange(0, PADDED)
        mixture = _mixture(values + trial * size, learnt + trial, single + trial * LAYERS, layer, LAYERS)
        seed = tl.load(seed_of + trial)
        mean = tl.load(index + (seed * rows + row) * 2 + 1)
        states = means + layer[:, None].to(tl.int64) * count * DIM + mean * DIM
        for start in range(0, DIM, BLOCK):
            place = start + tl.arange(0, BLOCK)
            wanted = (layer < LAYERS)[:, None] & (place < DIM)[None, :]
            state = tl.load(states + place[None, :], mask=wanted, other=0.0).to(tl.float32)
            total = tl.sum(state * mixture[:, None], axis=0)
            tl.store(mixed + (trial * rows + row) * DIM + place, total, mask=place < DIM)

    @triton.jit(do_not_specialize=["index"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _inner_products(  # type: ignore[no-untyped-def]
        back, means, index, seed_of, count, rows, products, DIM: tl.constexpr, BLOCK: tl.constexpr,
        LAYERS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        # of a row's slope with each of its layers
        trial, row = tl.program_id(0), tl.program_id(1)
        layer = tl.arange(0, PADDED)
        seed = tl.load(seed_of + trial)
        mean = tl.load(index + (seed * rows + row) * 2 + 1)
        states = means + layer[:, None].to(tl.int64) * count * DIM + mean * DIM
        total = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        for start in range(0, DIM, BLOCK):
            place = start + tl.arange(0, BLOCK)
            wanted = (layer < LAYERS)[:, None] & (place < DIM)[None, :]
            state = tl.load(states + place[None, :], mask=wanted, other=0.0).to(tl.float32)
            total += state * tl.load(back + (trial * rows + row) * DIM + place, mask=place < DIM, other=0.0)[None, :]
        tl.store(products + (trial * rows + row) * LAYERS + layer, tl.sum(total, axis=1), mask=layer < LAYERS)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def]
        inputs, values, outputs, size, weight, bias, rows, UNITS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
        ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        trial = tl.program_id(0)
        unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        there = unit < OUT
        row = tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        stand = (trial * rows + row)[:, None]
        inner = tl.arange(0, TILE)
        own = values + trial.to(tl.int64) * size
        states = inputs + stand * IN + inner[None, :]
        weights = own + weight + unit[None, :] * IN + inner[:, None]
        total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for start in range(0, IN, TILE):
            state = tl.load(states + start, mask=inside, other=0.0)
            part = tl.load(weights + start, mask=there[None, :], other=0.0)
            total = tl.dot(state, part, total, input_precision=PRECISION)
        total += tl.load(own + bias + unit, mask=there, other=0.0)[None, :]
        tl.store(outputs + stand * OUT + unit[None, :], total, mask=inside & there[None, :])

    @triton.jit(do_not_specialize=["index", "weights"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _class_losses(  # type: ignore[no-untyped-def]
        scores, losses, targets, index, seed_of, weights, slot_of, number_of, rows, classes, count, SLOTS: tl.constexpr,
        CLASSES: tl.constexpr
    ):  # fmt: skip
        # Cross-entropies of a row, summed over slots; the scores' gradient takes their place.
        trial, row = tl.program_id(0), tl.program_id(1)
        number = tl.arange(0, CLASSES)
        known = number < classes
        own = scores + (trial * rows + row) * classes + number
        given = tl.load(own, mask=known, other=0.0)
        slot_is = tl.load(slot_of + number, mask=known, other=-1)
        number_is = tl.load(number_of + number, mask=known, other=-1)
        utterance = tl.load(index + (tl.load(seed_of + trial) * rows + row) * 2)
        right = targets + (tl.load(seed_of + trial) * count + utterance) * SLOTS
        slope = tl.zeros((CLASSES,), dtype=tl.float32)
        loss = tl.sum(slope, axis=0)
        for slot in tl.static_range(SLOTS):
            mine = slot_is == slot
            score = tl.where(mine, given, -float("inf"))
            score -= tl.max(score, axis=0)
            power = tl.exp(score)
            total = tl.sum(power, axis=0)
            hit = mine & (number_is == tl.load(right + slot))
            loss += tl.log(total) - tl.sum(tl.where(hit, score, 0.0), axis=0)
            slope += tl.where(mine, power / total - tl.where(hit, 1.0, 0.0), 0.0)
        weight = tl.load(weights + row)
        tl.store(losses + trial * rows + row, loss * weight)
        tl.store(own, slope * weight, mask=known)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def]
        inputs, slopes, values, gradients, back, squares, size, weight, bias, rows, parts, first, NEEDED: tl.constexpr,
        COLUMNS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        PRECISION: tl.constexpr
    ):  # fmt: skip
        # Some columns of the weight's gradient, for its norm, and of the inputs'; the first program has the bias's too.
        trial, block = tl.program_id(0), tl.program_id(1)
        place = block * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        stand = (trial * rows + row)[:, None]
        start_of = trial.to(tl.int64) * size
        state = tl.load(inputs + stand * IN + place[None, :], mask=inside, other=0.0)
        through = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        square = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, OUT, TILE):
            unit = start + tl.arange(0, TILE)
            there = unit < OUT
            slope = tl.load(slopes + stand * OUT + unit[None, :], mask=inside & there[None, :], other=0.0)
            gradient = tl.dot(tl.trans(slope), state, input_precision=PRECISION)
            square += tl.sum(gradient * gradient, axis=1)
            if block == 0:
                total = tl.sum(slope, axis=0)
                tl.store(gradients + start_of + bias + unit, total, mask=there)
                square += total * total
            if NEEDED:
                part = values + start_of + weight + unit[:, None] * IN + place[None, :]
                part = tl.load(part, mask=there[:, None], other=0.0)
                through = tl.dot(slope, part, through, input_precision=PRECISION)
        tl.store(squares + trial * parts + first + block, tl.sum(square, axis=0))
        if NEEDED:
            tl.store(back + stand * IN + place[None, :], through, mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _norm(  # type: ignore[no-untyped-def]
        values, size, learnt, single, gradients, products, squares, losses, loss, norms, rows, parts,
        ROWS: tl.constexpr, PARTS: tl.constexpr, LAYERS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        # The gradient of the layers' weights, the norm of all gradients of a trial, and its loss.
        trial = tl.program_id(0)
        layer, row, part = tl.arange(0, PADDED), tl.arange(0, ROWS), tl.arange(0, PARTS)
        inside = layer < LAYERS
        mixture = _mixture(values + trial * size, learnt + trial, single + trial * LAYERS, layer, LAYERS)
        wanted = (row < rows)[:, None] & inside[None, :]
        product = products + (trial * rows + row)[:, None] * LAYERS + layer[None, :]
        weighted = mixture * tl.sum(tl.load(product, mask=wanted, other=0.0), axis=0)
        slope = weighted - mixture * tl.sum(weighted, axis=0)
        slope = tl.where(tl.load(learnt + trial).to(tl.int1), slope, 0.0)
        tl.store(gradients + trial * size + layer, slope, mask=inside)
        square = tl.sum(tl.load(squares + trial * parts + part, mask=part < parts, other=0.0), axis=0)
        tl.store(norms + trial, tl.sqrt(square + tl.sum(slope * slope, axis=0)))
        tl.store(loss + trial, tl.sum(tl.load(losses + trial * rows + row, mask=row < rows, other=0.0), axis=0))

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _adam_tile(  # type: ignore[no-untyped-def]
        inputs, slopes, values, first, second, factors, size, weight, rows, trial, trials, tile, beta1, beta2, rest1,
        rest2, epsilon, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        PRECISION: tl.constexpr
    ):  # fmt: skip
        unit = (tile // (IN // TILE)) * TILE + tl.arange(0, TILE)
        place = (tile % (IN // TILE)) * TILE + tl.arange(0, TILE)
        row = tl.arange(0, ROWS)
        stand, inside, there = trial * rows + row, row < rows, (unit < OUT)[:, None]
        slope = tl.load(slopes + stand[None, :] * OUT + unit[:, None], mask=inside[None, :] & there, other=0.0)
        state = tl.load(inputs + stand[:, None] * IN + place[None, :], mask=inside[:, None], other=0.0)
        gradient = tl.dot(slope, state, input_precision=PRECISION)
        where = trial.to(tl.int64) * size + weight + unit[:, None] * IN + place[None, :]
        kernels.adam_at(
            where, there, gradient, values, first, second, factors, trial, trials, beta1, beta2, rest1, rest2, epsilon
        )

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _adam_by_tiles(  # type: ignore[no-untyped-def]
        mixed, hidden_slopes, hidden, scores_slopes, values, gradients, first, second, factors, made, size, projector,
        linear, rows, trials, beta1, beta2, rest1, rest2, epsilon, projector_tiles, linear_tiles, BLOCK: tl.constexpr,
        DIM: tl.constexpr, WIDTH: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
        PRECISION: tl.constexpr
    ):  # fmt: skip
        block, trial = tl.program_id(0), tl.program_id(1)
        if tl.load(made + trial):
            if block < projector_tiles:
                _adam_tile(
                    mixed, hidden_slopes, values, first, second, factors, size, projector, rows, trial, trials, block,
                    beta1, beta2, rest1, rest2, epsilon, DIM, WIDTH, ROWS, TILE, PRECISION,
                )  # fmt: skip
            elif block < projector_tiles + linear_tiles:
                _adam_tile(
                    hidden, scores_slopes, values, first, second, factors, size, linear, rows, trial, trials,
                    block - projector_tiles, beta1, beta2, rest1, rest2, epsilon, WIDTH, CLASSES, ROWS, TILE, PRECISION,
                )  # fmt: skip
            else:  # what stands before, between and behind the weights of the heads
                number = (block - projector_tiles - linear_tiles) * BLOCK + tl.arange(0, BLOCK)
                number += tl.where(number >= projector, WIDTH * DIM, 0)
                number += tl.where(number >= linear, CLASSES * WIDTH, 0)
                wanted = number < size
                where = trial.to(tl.int64) * size + number
                gradient = tl.load(gradients + where, mask=wanted, other=0.0)
                kernels.adam_at(
                    where, wanted, gradient, values, first, second, factors, trial, trials,
                    beta1, beta2, rest1, rest2, epsilon,
                )  # fmt: skip
