"""How sure a score is: bootstrap intervals over items or speakers, and t intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from superb_probe.errors import RequestError
from superb_probe.probes.metrics import UndefinedMetric

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
LEVEL = 0.95
MOST_REDRAWS = 10  # draws without a value may be this many times the draws asked for


def bootstrap(
    value_fn: Callable[[dict[str, NDArray[Any]]], float],
    items: Columns,
    *,
    clusters: Sequence[Hashable] | None = None,
    other_clusters: Sequence[Hashable] | None = None,
    cluster_name: str = "clusters",
    draws: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float, str]:
    """The percentile interval of a metric under resampling (Efron and Tibshirani 1993, chapters 6 and 13).

    Without clusters, items are drawn with replacement. With them, whole clusters are: items of one speaker hang together, and
    drawing them one by one makes intervals too narrow. A verification trial belongs to two speakers: with `other_clusters`,
    speakers are drawn once for both sides, and a trial counts m_a * m_b times, where m is how often a speaker was drawn
    (m_a times when both sides are the same speaker): the node bootstrap of Snijders and Borgatti (1999).
    A draw in which the metric has no value (no target trial left) is drawn again, and the method says how many were.

    Args:
        value_fn: the metric from resampled columns.
        items: by name, columns of equal length, one entry an item (`Score.items`).
        clusters: (n,) the speaker of each item, or of a trial's first side.
        other_clusters: (n,) the speaker of a trial's second side.
        cluster_name: what the clusters are, for the method's text.
        draws: how many.
        seed: of the generator; the same seed gives the same interval.
        level: coverage aimed at.

    Returns:
        Low end, high end, and the method in words.

    Raises:
        UndefinedMetric: for fewer than two items or clusters, or a metric that hardly any draw gives a value.
        RequestError: for columns of unequal length.

    >>> low, high, method = bootstrap(lambda items: items["right"].mean(), {"right": [0, 1, 1, 1, 0, 1, 1, 1]}, draws=200)
    >>> bool(low < 0.75 < high), method
    (True, 'bootstrap over items, 200 draws')
    """
    columns = {name: as_column(values) for name, values in items.items()}
    given = {**columns, "clusters": clusters, "other_clusters": other_clusters}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(lengths.values())) != 1 or not columns or draws < 1 or (clusters is None and other_clusters is not None):
        raise RequestError(f"bootstrap: columns of equal length are needed, found {lengths}; draws {draws}")
    resampled = resampled_rows(next(iter(lengths.values())), clusters, other_clusters, np.random.default_rng(seed))
    values, redrawn = _values_of_draws(value_fn, columns, resampled, draws)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    drawn = "items" if clusters is None else cluster_name
    again = f", {redrawn} more redrawn (no value)" if redrawn else ""
    return float(low), float(high), f"bootstrap over {drawn}, {draws} draws{again}"


def _values_of_draws(
    value_fn: Callable[[dict[str, NDArray[Any]]], float],
    columns: Mapping[str, NDArray[Any]],
    resampled: Iterator[NDArray[np.int64]],
    draws: int,
) -> tuple[list[float], int]:
    """The metric's values of so many draws, and how many without a value were drawn again."""
    values: list[float] = []
    redrawn = 0
    while len(values) < draws:
        rows = next(resampled)
        try:
            value = float(value_fn({name: column[rows] for name, column in columns.items()}))
        except UndefinedMetric as error:
            redrawn += 1
            if redrawn > MOST_REDRAWS * draws:
                raise UndefinedMetric(f"bootstrap: {redrawn} draws have no value, the last because: {error}") from error
            continue
        if not np.isfinite(value):
            raise RequestError(
                f"bootstrap: the metric gave {value} for a draw; it must be finite or raise UndefinedMetric"
            )
        values.append(value)
    return values, redrawn


def t_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval for the mean of a few independent runs, e.g. seeds.

    Args:
        values: (n,) one score a run, at least two.
        level: coverage aimed at.

    >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise UndefinedMetric(f"t interval: at least two finite scores are needed, found {scores.tolist()}")
    half = float(_t_quantile(level, len(scores)) * scores.std(ddof=1) / np.sqrt(len(scores)))
    return float(scores.mean()) - half, float(scores.mean()) + half


def jackknife_interval(value: float, without: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The interval of a statistic from its values with each group left out in turn (Efron and Tibshirani 1993, chapter 11).

    For statistics that resampling with replacement would bias, such as information and purity: repeated data look predictable.

    Args:
        value: of all groups.
        without: (n,) with each group left out, at least two.
        level: coverage aimed at.

    >>> [round(end, 3) for end in jackknife_interval(2.0, [2.5, 2.0, 1.5])] == [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    True
    """
    left = np.asarray(without, dtype=np.float64)
    count = len(left)
    if left.ndim != 1 or count < 2 or not np.isfinite(left).all():
        raise UndefinedMetric(f"jackknife: at least two finite values are needed, found {left.tolist()}")
    error = np.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
    half = float(_t_quantile(level, count) * error)
    return value - half, value + half


def _t_quantile(level: float, count: int) -> Any:
    from scipy import stats  # a second to import, and a run of one seed asks for no such interval

    return stats.t.ppf((1 + level) / 2, count - 1)


def as_column(values: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
    """An array of one dimension first; ragged and mixed items stay Python objects."""
    if isinstance(values, np.ndarray):
        return values
    if all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
        return np.asarray(values)
    column = np.empty(len(values), dtype=object)
    column[:] = list(values)
    return column


def resampled_rows(
    count: int,
    clusters: Sequence[Hashable] | None,
    other_clusters: Sequence[Hashable] | None,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.int64]]:
    """Row numbers of one resample after another; rows that count k times stand k times."""
    if clusters is None:
        if count < 2:
            raise UndefinedMetric(f"bootstrap: {count} items; at least two are needed")
        while True:
            yield generator.integers(count, size=count)
    numbers: dict[Hashable, int] = {}
    first = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    second = first
    if other_clusters is not None:
        second = np.array([numbers.setdefault(name, len(numbers)) for name in other_clusters])
    if len(numbers) < 2:
        raise UndefinedMetric(f"bootstrap: {len(numbers)} cluster(s); at least two are needed")
    shares = np.full(len(numbers), 1 / len(numbers))
    while True:
        drawn = generator.multinomial(len(numbers), shares)
        times = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        yield np.repeat(np.arange(count), times)
