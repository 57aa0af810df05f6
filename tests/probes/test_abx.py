"""ABX: by hand, and against a second writing that walks over every triple and every path."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from superb_probe.errors import RequestError
from superb_probe.probes import abx
from superb_probe.probes.abx import Item, distances, dtw_means, interval, list_triples, mean_error, score

Frames = list[NDArray[Any]]


def slow_dtw(grid: NDArray[Any]) -> float:
    """The mean along the cheapest path, by recursion over whole paths."""
    height, width = grid.shape

    def best(i: int, j: int) -> tuple[float, int]:
        if i == 0 and j == 0:
            return float(grid[0, 0]), 1
        options = [best(i - a, j - b) for a, b in ((1, 1), (0, 1), (1, 0)) if i >= a and j >= b]
        cost, length = min(options, key=lambda option: option[0])
        return cost + float(grid[i, j]), length + 1

    cost, length = best(height - 1, width - 1)
    return cost / length


def slow_angle(a: NDArray[Any], b: NDArray[Any]) -> float:
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.arccos(min(1.0, max(-1.0, cosine))) / np.pi)


def slow_error(items: list[Item], frames: Frames, mode: str) -> float:
    """The error by four nested means."""
    pairs: dict[Any, dict[Any, dict[Any, dict[Any, list[float]]]]] = {}
    for a, b, x in itertools.permutations(range(len(items)), 3):
        ia, ib, ix = items[a], items[b], items[x]
        if not (
            ia.context == ib.context == ix.context and ia.phone == ix.phone != ib.phone and ia.speaker == ib.speaker
        ):
            continue
        if (ix.speaker == ia.speaker) != (mode == "within"):
            continue
        near, far = (
            slow_dtw(np.array([[slow_angle(p, q) for q in frames[x]] for p in frames[other]])) for other in (a, b)
        )
        value = 1.0 if near < far else 0.5 if near == far else 0.0
        nested = pairs.setdefault((ia.phone, ib.phone), {}).setdefault(ia.speaker, {}).setdefault(ix.speaker, {})
        nested.setdefault(ia.context, []).append(value)
    means = [
        np.mean(
            [
                np.mean([np.mean([np.mean(v) for v in contexts.values()]) for contexts in by_x.values()])
                for by_x in by_speaker.values()
            ]
        )
        for by_speaker in pairs.values()
    ]
    return 1.0 - float(np.mean(means))


def made_up(seed: int = 0, count: int = 40) -> tuple[list[Item], Frames]:
    generator = np.random.default_rng(seed)
    items = [
        Item(
            str(generator.choice(["a", "i", "u"])),
            str(generator.choice(["k t", "p t"])),
            str(generator.choice(["s1", "s2", "s3"])),
        )
        for _ in range(count)
    ]
    centre = {"a": [3.0, 0, 0], "i": [0, 3.0, 0], "u": [0, 0, 3.0]}
    frames = [
        (np.array(centre[item.phone]) + 2.5 * generator.standard_normal((int(generator.integers(2, 5)), 3))).astype(
            np.float64
        )
        for item in items
    ]
    return items, frames


@pytest.mark.parametrize("mode", ["within", "across"])
def test_against_the_slow_writing(mode: str) -> None:
    items, frames = made_up()
    found = score(list_triples(items, mode, max_tokens=99, max_speakers=99), frames)
    assert found.error == pytest.approx(slow_error(items, frames, mode), abs=1e-9)
    assert 0.02 < found.error < 0.48


def test_dtw_against_all_paths() -> None:
    generator = np.random.default_rng(1)
    shapes = [(1, 1), (1, 4), (3, 2), (4, 4), (2, 5)]
    grids = np.zeros((5, 4, 5))
    for number, (height, width) in enumerate(shapes):
        grids[number, :height, :width] = generator.random((height, width))
    rows, columns = (np.array([shape[axis] for shape in shapes]) for axis in (0, 1))
    expected = [slow_dtw(grids[number, :h, :w]) for number, (h, w) in enumerate(shapes)]
    assert dtw_means(grids, rows, columns) == pytest.approx(expected)


def test_distances_in_small_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, frames = made_up(2)
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 40, 30), generator.integers(0, 40, 30)
    whole = distances(frames, first, second)
    monkeypatch.setattr(abx, "PAIRS_AT_ONCE", 4)
    assert distances(frames, first, second) == pytest.approx(whole)
    means = [slow_angle(frames[a].mean(0), frames[b].mean(0)) for a, b in zip(first, second, strict=True)]
    assert distances(frames, first, second, "mean") == pytest.approx(means, abs=1e-3)  # float32 near angle 0


def test_by_hand() -> None:
    items = [Item("a", "", "s"), Item("a", "", "s"), Item("b", "", "s")]
    east, north = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    right = score(list_triples(items, "within"), [east, east, north])
    assert (right.error, right.num_triples) == (0.0, 2)
    assert score(list_triples(items, "within"), [east, north, east + north]).error == 1.0
    assert score(list_triples(items, "within"), [east, north, east]).error == 0.75  # 1/2 of a tie, and wrong
    assert score(list_triples(items, "within"), [east, east, east]).error == 0.5  # ties


def test_units_are_compared_as_symbols() -> None:
    items = [Item("a", "", "s"), Item("a", "", "s"), Item("b", "", "s")]
    units = [np.array([7, 7, 3]), np.array([7, 3]), np.array([8, 3])]
    assert score(list_triples(items, "within"), units).error == 0.0
    assert distances(units, np.array([0, 1]), np.array([1, 2])).tolist() == [0.0, 0.25]


def test_random_units_are_at_chance_and_good_ones_are_not() -> None:
    items, _ = made_up(3, 300)
    number = {"a": 0, "i": 1, "u": 2}
    generator = np.random.default_rng(0)
    good = [np.where(generator.random(6) < 0.2, generator.integers(0, 3, 6), number[item.phone]) for item in items]
    bad = [good[at] for at in generator.permutation(len(good))]
    triples = list_triples(items, "across")
    assert score(triples, good).error < 0.1
    assert abs(score(triples, bad).error - 0.5) < 0.1


def test_within_is_one_speaker_and_across_is_two() -> None:
    items, _ = made_up(4)
    for mode in ("within", "across"):
        triples = list_triples(items, mode)
        for a, b, x in zip(triples.a, triples.b, triples.x, strict=True):
            assert a != x and items[a].phone == items[x].phone != items[b].phone
            assert items[a].context == items[b].context == items[x].context and items[a].speaker == items[b].speaker
            assert (items[x].speaker == items[a].speaker) == (mode == "within")


def test_limits_draw_by_the_seed() -> None:
    items, _ = made_up(5, 200)
    few = list_triples(items, "across", max_tokens=2, max_speakers=1)
    assert len(few.a) < len(list_triples(items, "across").a)
    assert np.array_equal(few.a, list_triples(items, "across", max_tokens=2, max_speakers=1).a)
    per_cell = np.bincount(few.cell)
    assert per_cell.max() <= 2**3


def test_means_are_not_swayed_by_many_triples() -> None:
    # a speaker with many tokens and errors counts as much as one with few and none
    table = np.array([[0.0, np.nan], [1.0, 0.5]])
    assert mean_error(table, np.ones(2)) == pytest.approx((0.5 + 0.5) / 2)
    assert mean_error(table, np.array([3, 1])) == pytest.approx((0.25 + 0.5) / 2)


def test_the_interval_holds_the_error() -> None:
    items, frames = made_up(6, 120)
    found = score(list_triples(items, "within"), frames)
    low, high = interval(found, 100)
    assert low < found.error < high


def test_wrong_requests() -> None:
    items, frames = made_up()
    with pytest.raises(RequestError, match="ABX mode"):
        list_triples(items, "both")
    with pytest.raises(RequestError, match="none of 1 items"):
        list_triples(items[:1], "within")
    with pytest.raises(RequestError, match="distance"):
        distances(frames, np.array([0]), np.array([1]), "cosine")
