"""A whole update of linear heads on kept means in eight launches, in which nothing as large as the weights is written but they.

With a product for each step (`training.MeanStack`'s plain form, the reference) the gradient of N projectors is written, read for
its norm, and read again for Adam: eleven passes over (N, W, D) numbers. It is the product of (W, R) by (R, D) with some 32
rows R, cheaper to make than to read. So it is made twice and kept nowhere: once for its norm, once in the tile that Adam is
at. What is left are two reads of the weights for the products, and what Adam has to read and write: eight passes.
"""

from __future__ import annotations

from collections.abc import Sequence
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

PROJECTOR, PROJECTOR_BIAS, LINEAR, LINEAR_BIAS = 1, 2, 3, 4  # places in the updater's rows, after the layers' weights
TILE = 64  # widths are multiples of it
MOST_CLASSES, MOST_ROWS, MOST_LAYERS = 128, 64, 64  # what one program holds
UNITS = 16  # of the projector, of one program of the forward pass
COLUMNS = 32  # of the states, of one program of the way back
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


class MeanUpdate:
    """The update of N trials of `UtteranceLinear` on means: mix, project, classify, back, norm, Adam.

    Weights, moments and counters are the updater's, and so is the rule (`StackedUpdater.step`). Its `gradients` hold those of
    the small parameters; the projector's are kept nowhere.
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
            means: (L, M, D) of any float type.
            targets: (seeds, U, slots) class ids of every utterance.
            seed_of: (N,) which seed a trial has.
            sizes: classes of each slot.
            rows: R of an update.
        """
        self._updater, self._mixer, self._means = updater, mixer, means
        self._targets, self._seed_of = targets, seed_of
        device = means.device
        self._slots = len(sizes)
        slots = [slot for slot, size in enumerate(sizes) for _ in range(size)]
        numbers = [number for size in sizes for number in range(size)]
        self._slot_of, self._number_of = (
            torch.tensor(each, dtype=torch.int32, device=device) for each in (slots, numbers)
        )
        self._layers = len(means)
        self._width, self._dim = updater.shapes[PROJECTOR]
        count = len(self._seed_of)
        self._mixed, self._back = (torch.zeros(count, rows, self._dim, device=device) for _ in range(2))
        self._hidden, self._slopes = (torch.zeros(count, rows, self._width, device=device) for _ in range(2))
        self._parts = torch.zeros(count, rows, self._layers, device=device)
        self._squares = torch.zeros(count, self._width // TILE + self._dim // COLUMNS, device=device)
        self._losses, self._norms = (torch.zeros(count, device=device) for _ in range(2))

    def __call__(self, index: Tensor, weights: Tensor) -> None:
        """Make one update, without the host.

        Args:
            index: (seeds, R, 2) the rows' places among utterances and means.
            weights: (R,) what a row counts in the loss.
        """
        (count, rows, dim), width = self._mixed.shape, self._width
        updater = self._updater
        values, gradients, size = updater.values, updater.gradients, updater.values.shape[1]
        mixture = size, self._mixer.learnt, self._mixer.single
        means = self._means, index, self._seed_of, len(self._means[0]), rows
        projector, linear = updater.offsets[PROJECTOR:LINEAR], updater.offsets[LINEAR : LINEAR_BIAS + 1]
        layers = {"LAYERS": self._layers, "PADDED": triton.next_power_of_2(self._layers)}
        padded = max(16, triton.next_power_of_2(rows))
        shape: dict[str, Any] = {"DIM": dim, "WIDTH": width, "ROWS": padded, "TILE": TILE, "PRECISION": PRECISION}
        _mix_rows[(count, rows)](values, *mixture, *means, self._mixed, dim, BLOCK, **layers, num_warps=1)
        _project[(count, width // UNITS)](
            self._mixed, values, self._hidden, size, *projector, rows, UNITS, **shape, num_warps=2
        )
        classes, squares = len(self._slot_of), self._squares.shape[1]
        _classify[(count, width // TILE)](
            self._hidden, values, gradients, self._slopes, self._losses, self._squares, squares, self._targets, index,
            self._seed_of, weights, self._slot_of, self._number_of, size, projector[1], *linear, rows, classes,
            self._targets.shape[1], self._slots, max(16, triton.next_power_of_2(classes)), **shape,
        )  # fmt: skip
        _through[(count, dim // COLUMNS)](
            self._mixed, self._slopes, values, self._back, self._squares, squares, size, projector[0], rows,
            self._mixer.any_learnt, COLUMNS, **shape, num_warps=2, num_stages=1,
        )  # fmt: skip
        if self._mixer.any_learnt:
            _products[(count, rows)](self._back, *means, self._parts, dim, BLOCK, **layers, num_warps=1)
        _norm[(count,)](
            values, *mixture, gradients, self._parts, self._squares, self._norms, rows, squares, padded,
            triton.next_power_of_2(squares), **layers,
        )  # fmt: skip
        factors, made = updater.decide(self._norms, self._losses)
        tiles = width * dim // TILE**2
        others = triton.cdiv(size - width * dim, kernels.BLOCK)
        _adam_by_tiles[(tiles + others, count)](
            self._mixed, self._slopes, values, gradients, updater.first, updater.second, factors, made, size,
            projector[0], rows, count, BETA1, BETA2, 1 - BETA1, 1 - BETA2, EPS, tiles, kernels.BLOCK, **shape,
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

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _project(  # type: ignore[no-untyped-def]
        mixed, values, hidden, size, projector, projector_bias, rows, UNITS: tl.constexpr, DIM: tl.constexpr,
        WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        trial = tl.program_id(0)
        unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        row = tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        stand = (trial * rows + row)[:, None]
        inner = tl.arange(0, TILE)
        states = mixed + stand * DIM + inner[None, :]
        weights = values + trial * size + projector + unit[None, :] * DIM + inner[:, None]
        total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for start in range(0, DIM, TILE):
            state = tl.load(states + start, mask=inside, other=0.0)
            total = tl.dot(state, tl.load(weights + start), total, input_precision=PRECISION)
        total += tl.load(values + trial * size + projector_bias + unit)[None, :]
        tl.store(hidden + stand * WIDTH + unit[None, :], total, mask=inside)

    @triton.jit(do_not_specialize=["index", "weights"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _classify(  # type: ignore[no-untyped-def]
        hidden, values, gradients, slopes, losses, squares, parts, targets, index, seed_of, weights, slot_of, number_of, size,
        projector_bias, linear, linear_bias, rows, classes, count, SLOTS: tl.constexpr, CLASSES: tl.constexpr,
        DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        # Logits, losses and their gradient in every program; of the weights' gradients and the projections', a tile.
        trial, tile = tl.program_id(0), tl.program_id(1)
        row, number = tl.arange(0, ROWS), tl.arange(0, CLASSES)
        there, known = row < rows, number < classes
        stand = (trial * rows + row)[:, None]
        own, slope_of = values + trial * size, gradients + trial * size
        scores = tl.zeros((ROWS, CLASSES), dtype=tl.float32)
        for start in range(0, WIDTH, TILE):
            unit = start + tl.arange(0, TILE)
            state = tl.load(hidden + stand * WIDTH + unit[None, :], mask=there[:, None], other=0.0)
            weight = tl.load(own + linear + number[None, :] * WIDTH + unit[:, None], mask=known[None, :], other=0.0)
            scores = tl.dot(state, weight, scores, input_precision=PRECISION)
        scores += tl.load(own + linear_bias + number, mask=known, other=0.0)[None, :]
        seed = tl.load(seed_of + trial)
        utterance = tl.load(index + (seed * rows + row) * 2, mask=there, other=0)
        slot_is = tl.load(slot_of + number, mask=known, other=-1)
        number_is = tl.load(number_of + number, mask=known, other=-1)
        loss = tl.zeros((ROWS,), dtype=tl.float32)
        slope = tl.zeros((ROWS, CLASSES), dtype=tl.float32)
        for slot in tl.static_range(SLOTS):
            right = tl.load(targets + (seed * count + utterance) * SLOTS + slot, mask=there, other=0)
            mine = (slot_is == slot)[None, :]
            score = tl.where(mine, scores, -float("inf"))
            score -= tl.max(score, axis=1)[:, None]
            power = tl.exp(score)
            total = tl.sum(power, axis=1)
            hit = mine & (number_is[None, :] == right[:, None])
            loss += tl.log(total) - tl.sum(tl.where(hit, score, 0.0), axis=1)
            slope += tl.where(mine, power / total[:, None] - tl.where(hit, 1.0, 0.0), 0.0)
        weight_of_row = tl.load(weights + row, mask=there, other=0.0)
        slope *= weight_of_row[:, None]
        bias = tl.sum(slope, axis=0)
        square = tl.where(tile == 0, tl.sum(bias * bias, axis=0), 0.0)
        if tile == 0:
            tl.store(losses + trial, tl.sum(loss * weight_of_row, axis=0))
            tl.store(slope_of + linear_bias + number, bias, mask=known)
        unit = tile * TILE + tl.arange(0, TILE)
        state = tl.load(hidden + stand * WIDTH + unit[None, :], mask=there[:, None], other=0.0)
        into = tl.dot(tl.trans(slope), state, input_precision=PRECISION)
        tl.store(slope_of + linear + number[:, None] * WIDTH + unit[None, :], into, mask=known[:, None])
        square += tl.sum(tl.sum(into * into, axis=1), axis=0)
        weight = tl.load(own + linear + number[:, None] * WIDTH + unit[None, :], mask=known[:, None], other=0.0)
        back = tl.dot(slope, weight, input_precision=PRECISION)
        tl.store(slopes + stand * WIDTH + unit[None, :], back, mask=there[:, None])
        bias = tl.sum(back, axis=0)
        tl.store(slope_of + projector_bias + unit, bias)
        square += tl.sum(bias * bias, axis=0)
        tl.store(squares + trial * parts + tile, square)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _through(  # type: ignore[no-untyped-def]
        mixed, slopes, values, back, squares, parts, size, projector, rows, LEARNT: tl.constexpr, COLUMNS: tl.constexpr,
        DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        # Some columns of the projector's gradient for its norm, and of the mixed states'.
        trial, tile = tl.program_id(0), tl.program_id(1)
        place = tile * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        stand = (trial * rows + row)[:, None]
        state = tl.load(mixed + stand * DIM + place[None, :], mask=inside, other=0.0)
        through = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        square = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, WIDTH, TILE):
            unit = start + tl.arange(0, TILE)
            slope = tl.load(slopes + stand * WIDTH + unit[None, :], mask=inside, other=0.0)
            gradient = tl.dot(tl.trans(slope), state, input_precision=PRECISION)
            square += tl.sum(gradient * gradient, axis=1)
            if LEARNT:
                weight = tl.load(values + trial * size + projector + unit[:, None] * DIM + place[None, :])
                through = tl.dot(slope, weight, through, input_precision=PRECISION)
        tl.store(squares + trial * parts + WIDTH // TILE + tile, tl.sum(square, axis=0))
        if LEARNT:
            tl.store(back + stand * DIM + place[None, :], through, mask=inside)

    @triton.jit(do_not_specialize=["index"])  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _products(  # type: ignore[no-untyped-def]
        back, means, index, seed_of, count, rows, parts, DIM: tl.constexpr, BLOCK: tl.constexpr, LAYERS: tl.constexpr,
        PADDED: tl.constexpr
    ):  # fmt: skip
        # Inner products of a row's slope with each of its layers.
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
        tl.store(parts + (trial * rows + row) * LAYERS + layer, tl.sum(total, axis=1), mask=layer < LAYERS)

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _norm(  # type: ignore[no-untyped-def]
        values, size, learnt, single, gradients, parts, squares, norms, rows, tiles, ROWS: tl.constexpr,
        TILES: tl.constexpr, LAYERS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        # The gradient of the layers' weights, and the norm of all gradients of a trial.
        trial = tl.program_id(0)
        layer, row, tile = tl.arange(0, PADDED), tl.arange(0, ROWS), tl.arange(0, TILES)
        inside = layer < LAYERS
        mixture = _mixture(values + trial * size, learnt + trial, single + trial * LAYERS, layer, LAYERS)
        wanted = (row < rows)[:, None] & inside[None, :]
        part = parts + (trial * rows + row)[:, None] * LAYERS + layer[None, :]
        weighted = mixture * tl.sum(tl.load(part, mask=wanted, other=0.0), axis=0)
        slope = weighted - mixture * tl.sum(weighted, axis=0)
        slope = tl.where(tl.load(learnt + trial).to(tl.int1), slope, 0.0)
        tl.store(gradients + trial * size + layer, slope, mask=inside)
        square = tl.sum(tl.load(squares + trial * tiles + tile, mask=tile < tiles, other=0.0), axis=0)
        tl.store(norms + trial, tl.sqrt(square + tl.sum(slope * slope, axis=0)))

    @triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
    def _adam_by_tiles(  # type: ignore[no-untyped-def]
        mixed, slopes, values, gradients, first, second, factors, made, size, projector, rows, trials, beta1, beta2,
        rest1, rest2, epsilon, tiles, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
        TILE: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        block, trial = tl.program_id(0), tl.program_id(1)
        if tl.load(made + trial):
            start = trial.to(tl.int64) * size
            if block < tiles:
                unit = (block // (DIM // TILE)) * TILE + tl.arange(0, TILE)
                place = (block % (DIM // TILE)) * TILE + tl.arange(0, TILE)
                row = tl.arange(0, ROWS)
                stand = trial * rows + row
                inside = row < rows
                slope = tl.load(slopes + stand[None, :] * WIDTH + unit[:, None], mask=inside[None, :], other=0.0)
                state = tl.load(mixed + stand[:, None] * DIM + place[None, :], mask=inside[:, None], other=0.0)
                gradient = tl.dot(slope, state, input_precision=PRECISION)
                where = start + projector + unit[:, None] * DIM + place[None, :]
                kernels.adam_at(
                    where, unit[:, None] >= 0, gradient, values, first, second, factors, trial, trials,
                    beta1, beta2, rest1, rest2, epsilon,
                )  # fmt: skip
            else:  # the small parameters, which stand before and after the projector's weights
                number = (block - tiles) * BLOCK + tl.arange(0, BLOCK)
                number += tl.where(number >= projector, WIDTH * DIM, 0)
                wanted = number < size
                small = tl.load(gradients + start + number, mask=wanted, other=0.0)
                kernels.adam_at(
                    start + number, wanted, small, values, first, second, factors, trial, trials,
                    beta1, beta2, rest1, rest2, epsilon,
                )  # fmt: skip
