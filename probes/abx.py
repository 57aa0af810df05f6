"""ABX discrimination of phones: is a token of a phone nearer to another token of it than to a token of another phone?

The measure of Schatz et al. (Interspeech 2013) as the ZeroSpeech challenges and Libri-light run it: items are triphones, A and X
are the same triphone, B differs in its middle phone only. Within speakers, all three are one speaker's; across, X is another's.
The distance of two items is the mean angle between their frames along the best DTW path ("dtw", the standard), or the angle
between their means ("mean", faster). A triple counts 1 where A is nearer to X than B is, 1/2 where both are as near. Triples are
averaged within a context, contexts within speakers (across: pairs of speakers, then A's speaker), speakers within an ordered pair
of phones, then pairs, each with equal weight; what is reported is one minus that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superb_probe.errors import RequestError
from superb_probe.probes.metrics import UndefinedMetric

MODES = ("within", "across")
DISTANCES = ("dtw", "mean")
PAIRS_AT_ONCE = 4096
MOST_FLOATS = 2**24  # of the frames of one block of pairs


@dataclass(frozen=True, slots=True)
class Item:
    """One token of a phone in its context.

    Attributes:
        phone: the middle phone.
        context: the phones around it, or anything else that must be the same in A, B and X.
        speaker: who says it.
    """

    phone: str
    context: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Triples:
    """Which items are compared.

    Attributes:
        a: (n,) numbers of items.
        b: (n,).
        x: (n,).
        cell: (n,) which cell each triple belongs to.
        cells: of each cell (phone of A, phone of B, speaker of A and B, speaker of X, context).
    """

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    x: NDArray[np.int64]
    cell: NDArray[np.int64]
    cells: tuple[tuple[str, str, str, str, str], ...]


@dataclass(frozen=True, slots=True)
class AbxScore:
    """An ABX error with what it is made of.

    Attributes:
        error: from 0 to 1; 1/2 is chance.
        speakers: names of the speakers of A and B.
        table: (S, P) the error of every speaker and ordered pair of phones; nan where there is none.
        num_triples: how many were compared.
    """

    error: float
    speakers: tuple[str, ...]
    table: NDArray[np.float64]
    num_triples: int


def list_triples(
    items: Sequence[Item], mode: str, *, max_tokens: int = 10, max_speakers: int = 5, seed: int = 0
) -> Triples:
    """The triples of some items.

    Args:
        items: tokens.
        mode: "within" or "across" speakers.
        max_tokens: most tokens of a phone, context and speaker (Libri-light: 10), drawn at random.
        max_speakers: across, most speakers of X for a speaker of A (Libri-light: 5), drawn at random.
        seed: of the draws.

    Raises:
        RequestError: for another mode, or items that give no triple.

    >>> a = [Item("a", "k_t", "s1"), Item("a", "k_t", "s1"), Item("i", "k_t", "s1")]
    >>> triples = list_triples(a, "within")
    >>> triples.a.tolist(), triples.b.tolist(), triples.x.tolist()
    ([0, 1], [2, 2], [1, 0])
    """
    if mode not in MODES:
        raise RequestError(f"unknown ABX mode {mode!r}. Fix: one of {', '.join(MODES)}.")
    generator = np.random.default_rng(seed)
    groups: dict[str, dict[str, dict[str, list[int]]]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.context, {}).setdefault(item.phone, {}).setdefault(item.speaker, []).append(number)
    rows: list[NDArray[np.int64]] = []
    cells: list[tuple[str, str, str, str, str]] = []
    for context, by_phone in sorted(groups.items()):
        tokens = {
            phone: {name: _drawn(found, max_tokens, generator) for name, found in sorted(by_speaker.items())}
            for phone, by_speaker in sorted(by_phone.items())
        }
        for phone, of_phone in tokens.items():
            for other, of_other in tokens.items():
                if other == phone:
                    continue
                for speaker in (name for name in of_phone if name in of_other):
                    others = [speaker] if mode == "within" else [name for name in of_phone if name != speaker]
                    if len(others) > max_speakers:
                        others = [others[at] for at in np.sort(generator.permutation(len(others))[:max_speakers])]
                    for speaker_x in others:
                        grid = _grid(of_phone[speaker], of_other[speaker], of_phone[speaker_x])
                        if len(grid):
                            rows.append(np.column_stack([grid, np.full(len(grid), len(cells))]))
                            cells.append((phone, other, speaker, speaker_x, context))
    if not rows:
        raise RequestError(
            f"ABX {mode} speakers: none of {len(items)} items makes a triple. Fix: more speech of each speaker, or --abx-context none."
        )
    table = np.concatenate(rows)
    return Triples(table[:, 0], table[:, 1], table[:, 2], table[:, 3], tuple(cells))


def _drawn(found: list[int], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    numbers = np.array(found, dtype=np.int64)
    return numbers if len(numbers) <= count else numbers[np.sort(generator.permutation(len(numbers))[:count])]


def _grid(a: NDArray[np.int64], b: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.int64]:
    """All (a, b, x) in which a and x are not the same token."""
    grid = np.stack(np.meshgrid(a, b, x, indexing="ij"), axis=-1).reshape(-1, 3)
    kept: NDArray[np.int64] = grid[grid[:, 0] != grid[:, 2]]
    return kept


def score(triples: Triples, frames: Sequence[NDArray[Any]], distance: str = "dtw") -> AbxScore:
    """The ABX error of triples.

    Args:
        triples: what is compared.
        frames: of every item, states (T, D), or units (T,) of integers, whose distance is 0 or 1/2.
        distance: "dtw" or "mean".
    """
    count = len(frames)
    keys = np.concatenate([triples.a * count + triples.x, triples.b * count + triples.x])
    wanted, where = np.unique(keys, return_inverse=True)
    found = distances(frames, wanted // count, wanted % count, distance)[where]
    near, far = found[: len(triples.a)], found[len(triples.a) :]
    right = np.where(near < far, 1.0, np.where(near == far, 0.5, 0.0))
    per_cell = np.bincount(triples.cell, right) / np.bincount(triples.cell)
    return _averaged(triples, per_cell)


def _averaged(triples: Triples, per_cell: NDArray[np.float64]) -> AbxScore:
    by_context: dict[tuple[str, str, str, str], list[float]] = {}
    for (phone, other, speaker, speaker_x, _), value in zip(triples.cells, per_cell, strict=True):
        by_context.setdefault((phone, other, speaker, speaker_x), []).append(float(value))
    by_speaker: dict[tuple[str, str, str], list[float]] = {}
    for (phone, other, speaker, _), values in by_context.items():
        by_speaker.setdefault((phone, other, speaker), []).append(float(np.mean(values)))
    speakers = sorted({key[2] for key in by_speaker})
    pairs = sorted({key[:2] for key in by_speaker})
    table = np.full((len(speakers), len(pairs)), np.nan)
    row, column = {name: i for i, name in enumerate(speakers)}, {pair: i for i, pair in enumerate(pairs)}
    for (phone, other, speaker), values in by_speaker.items():
        table[row[speaker], column[phone, other]] = 1.0 - float(np.mean(values))
    return AbxScore(mean_error(table, np.ones(len(speakers))), tuple(speakers), table, len(triples.a))


def mean_error(table: NDArray[np.float64], weights: NDArray[Any]) -> float:
    """The mean over pairs of phones of the mean over speakers, each speaker counting `weights` times (S,)."""
    there = ~np.isnan(table)
    shares = weights[:, None] * there
    total = shares.sum(0)
    used = total > 0
    if not used.any():
        raise UndefinedMetric("ABX: no pair of phones is left")
    sums = (np.where(there, table, 0.0) * shares).sum(0)
    return float((sums[used] / total[used]).mean())


def distances(
    frames: Sequence[NDArray[Any]], first: NDArray[np.int64], second: NDArray[np.int64], distance: str = "dtw"
) -> NDArray[np.float64]:
    """(n,) the distances between items `first[i]` and `second[i]`.

    >>> round(float(distances([np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])], np.array([0]), np.array([1]))[0]), 6)
    0.5
    """
    if distance not in DISTANCES:
        raise RequestError(f"unknown ABX distance {distance!r}. Fix: one of {', '.join(DISTANCES)}.")
    discrete = bool(len(frames)) and np.issubdtype(frames[0].dtype, np.integer)
    if distance == "mean" and not discrete:
        frames = [np.asarray(each, dtype=np.float32).mean(0, keepdims=True) for each in frames]
    ready = list(frames) if discrete else [_unit(each) for each in frames]
    lengths = np.array([len(each) for each in ready])
    found = np.empty(len(first))
    order = np.lexsort((lengths[second], lengths[first]))  # pairs of like size together: little padding
    width = 1 if discrete else (ready[0].shape[1] if ready else 1)
    at = 0
    while at < len(order):
        rows = order[at : at + PAIRS_AT_ONCE]
        fitting = max(
            1, MOST_FLOATS // (max(int(lengths[first[rows]].max()), int(lengths[second[rows]].max())) * width * 2)
        )
        rows = rows[:fitting]
        grid = _frame_distances([ready[i] for i in first[rows]], [ready[i] for i in second[rows]], discrete)
        found[rows] = dtw_means(grid, lengths[first[rows]], lengths[second[rows]])
        at += len(rows)
    return found


def _unit(states: NDArray[Any]) -> NDArray[np.float32]:
    states = np.asarray(states, dtype=np.float32)
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    unit: NDArray[np.float32] = states / np.maximum(norms, 1e-12)
    return unit


def _frame_distances(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]], discrete: bool) -> NDArray[np.float32]:
    """(n, T, T') distances between the frames of pairs, anything past their ends."""
    padded = []
    for each in (a, b):
        block = np.zeros((len(each), max(map(len, each)), *each[0].shape[1:]), dtype=each[0].dtype)
        for row, item in enumerate(each):
            block[row, : len(item)] = item
        padded.append(block)
    if discrete:
        return np.where(padded[0][:, :, None] == padded[1][:, None], 0.0, 0.5).astype(np.float32)
    cosines = np.matmul(padded[0], padded[1].transpose(0, 2, 1))
    angles: NDArray[np.float32] = np.arccos(np.clip(cosines, -1.0, 1.0)) / np.float32(np.pi)
    return angles


def dtw_means(grid: NDArray[np.float32], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) the mean distance along the path of least total distance through each grid, from corner to corner.

    Steps go on by one frame in either or both; of paths that cost the same, the one with a step in both is taken, then the one along
    the columns, as Libri-light's does.

    Args:
        grid: (n, T, T') distances.
        rows: (n,) of each, how many rows count.
        columns: (n,) and columns.

    >>> dtw_means(np.array([[[0.0, 1.0], [1.0, 0.5]]]), np.array([2]), np.array([2])).tolist()
    [0.25]
    """
    count, height, width = grid.shape
    steps = np.ascontiguousarray(grid.transpose(1, 2, 0), dtype=np.float64)
    costs = np.full((height + 1, width + 1, count), np.inf)
    lengths = np.zeros((height + 1, width + 1, count), dtype=np.int32)
    costs[0, 0] = 0.0
    for i in range(height):
        for j in range(width):
            diagonal, left, up = costs[i, j], costs[i + 1, j], costs[i, j + 1]
            best, length = np.minimum(left, up), np.where(left <= up, lengths[i + 1, j], lengths[i, j + 1])
            straight = diagonal <= best
            costs[i + 1, j + 1] = steps[i, j] + np.where(straight, diagonal, best)
            lengths[i + 1, j + 1] = 1 + np.where(straight, lengths[i, j], length)
    each = np.arange(count)
    means: NDArray[np.float64] = costs[rows, columns, each] / lengths[rows, columns, each]
    return means


def interval(found: AbxScore, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of an error under resampling of speakers.

    Raises:
        UndefinedMetric: for fewer than two speakers.
    """
    from superb_probe.probes.statistics import bootstrap

    def value(items: Mapping[str, NDArray[Any]]) -> float:
        return mean_error(found.table, np.bincount(items["row"], minlength=len(found.speakers)))

    low, high, _ = bootstrap(value, {"row": np.arange(len(found.speakers))}, draws=draws, seed=seed)
    return low, high
