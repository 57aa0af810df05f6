"""Intervals cover the truth about as often as they say, and too seldom when clusters are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from superb_probe.errors import RequestError
from superb_probe.probes.metrics import UndefinedMetric, eer
from superb_probe.probes.statistics import bootstrap, t_interval


def mean(items: Mapping[str, Any]) -> float:
    return float(items["value"].mean())


def covered(simulations: int, spread: float, use_clusters: bool) -> float:
    """Share of simulations whose interval holds the true mean 0; items of one speaker share an offset of size `spread`."""
    hits = 0
    for seed in range(simulations):
        generator = np.random.default_rng(seed)
        speakers = np.repeat(np.arange(20), 5)
        values = generator.normal(size=100) + spread * generator.normal(size=20)[speakers]
        low, high, _ = bootstrap(
            mean, {"value": values}, clusters=speakers.tolist() if use_clusters else None, draws=200, seed=seed
        )
        hits += low <= 0 <= high
    return hits / simulations


def test_intervals_cover_the_truth() -> None:
    assert 0.89 <= covered(200, 0.0, use_clusters=False) <= 0.99
    assert 0.86 <= covered(200, 2.0, use_clusters=True) <= 0.99


def test_ignoring_clusters_makes_intervals_too_narrow() -> None:
    assert covered(100, 2.0, use_clusters=False) < 0.75


def trial_list(generator: np.random.Generator, speakers: int = 14) -> dict[str, np.ndarray]:
    """Scores of all pairs of five utterances a speaker, each speaker with a quirk that all its trials share."""
    names = np.repeat(np.arange(speakers), 5)
    first, second = np.triu_indices(len(names), 1)
    a, b = names[first], names[second]
    quirk = generator.normal(size=speakers)
    scores = 1.5 * (a == b) + quirk[a] * np.where(a == b, 1, 0.7) + 0.7 * np.where(a == b, 0, quirk[b])
    return {"label": (a == b).astype(int), "score": scores + 0.1 * generator.normal(size=len(a)), "a": a, "b": b}


def value(items: Mapping[str, Any]) -> float:
    return eer(items["label"], items["score"])[0]


def test_trials_are_drawn_by_the_speakers_of_both_sides() -> None:
    truth = float(np.mean([value(trial_list(np.random.default_rng(1000 + seed), 60)) for seed in range(12)]))
    hits = {"speakers": 0, "trials": 0}
    for seed in range(50):
        items = trial_list(np.random.default_rng(seed))
        columns = {"label": items["label"], "score": items["score"]}
        sides = {"clusters": items["a"].tolist(), "other_clusters": items["b"].tolist()}
        low, high, method = bootstrap(value, columns, **sides, cluster_name="test speakers", draws=80, seed=seed)
        assert method.startswith("bootstrap over test speakers, 80 draws")
        hits["speakers"] += low <= truth <= high
        low, high, _ = bootstrap(value, columns, draws=80, seed=seed)
        hits["trials"] += low <= truth <= high
    assert hits["speakers"] >= 40 and hits["trials"] <= 34


def test_a_trial_counts_as_often_as_both_its_speakers_were_drawn() -> None:
    sides = [("x", "x"), ("x", "y"), ("y", "y"), ("y", "x")]
    seen = set()

    def count(items: Mapping[str, Any]) -> float:
        times = [int((items["trial"] == number).sum()) for number in range(4)]
        assert times[0] + times[2] == 2 and times[1] == times[3] == times[0] * times[2]
        seen.add(tuple(times))
        return float(times[0])

    bootstrap(
        count, {"trial": np.arange(4)}, clusters=[a for a, _ in sides], other_clusters=[b for _, b in sides], draws=50
    )
    assert seen == {(2, 0, 0, 0), (1, 1, 1, 1), (0, 0, 2, 0)}


def test_whole_clusters_are_drawn() -> None:
    items = {"word": ["a1", "a2", "b1", "b2"], "pair": [("a", 1), ("a", 2), ("b", 1), ("b", 2)]}

    def drawn(clusters: list[str] | None) -> set[tuple[str, ...]]:
        seen = set()

        def note(resampled: Mapping[str, Any]) -> float:
            assert ["".join(map(str, pair)) for pair in resampled["pair"]] == list(resampled["word"])
            seen.add(tuple(sorted(resampled["word"])))
            return 0.0

        bootstrap(note, items, clusters=clusters, draws=100)
        return seen

    assert drawn(["a", "a", "b", "b"]) == {("a1", "a1", "a2", "a2"), ("a1", "a2", "b1", "b2"), ("b1", "b1", "b2", "b2")}
    assert ("a1", "a1", "a1", "b2") in drawn(None)


def test_the_seed_decides() -> None:
    items = {"value": np.random.default_rng(1).normal(size=50)}
    assert bootstrap(mean, items, draws=100, seed=3) == bootstrap(mean, items, draws=100, seed=3)
    assert bootstrap(mean, items, draws=100, seed=3) != bootstrap(mean, items, draws=100, seed=4)


def test_a_draw_without_a_value_is_drawn_again_and_told() -> None:
    items = {"label": [1] + [0] * 9, "score": [2.0, *range(9)]}
    _, _, method = bootstrap(value, items, draws=50)
    assert "redrawn" in method
    with pytest.raises(UndefinedMetric, match="both classes"):
        bootstrap(value, {"label": [0] * 10, "score": [*range(10)]}, draws=20)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(UndefinedMetric, match="1 items"):
        bootstrap(mean, {"value": [1.0]})
    with pytest.raises(UndefinedMetric, match="1 cluster"):
        bootstrap(mean, {"value": [1.0, 2.0]}, clusters=["a", "a"])
    for wrong in ({"value": [1.0, 2.0], "other": [1.0]}, {}):
        with pytest.raises(RequestError, match="equal length"):
            bootstrap(mean, wrong)
    with pytest.raises(RequestError, match="equal length"):
        bootstrap(mean, {"value": [1.0, 2.0]}, clusters=["a"])
    with pytest.raises(RequestError, match="nan"):
        bootstrap(lambda items: float("nan"), {"value": [1.0, 2.0]})


def test_t_intervals_cover_the_truth_and_normal_ones_would_not() -> None:
    generator = np.random.default_rng(2)
    draws = generator.normal(size=(2000, 3))
    ends = np.array([t_interval(row) for row in draws])
    assert 0.935 <= ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean() <= 0.965
    half = 1.96 * draws.std(1, ddof=1) / np.sqrt(3)
    assert (abs(draws.mean(1)) <= half).mean() < 0.88
    for scores in ([1.0], [], [1.0, np.nan]):
        with pytest.raises(UndefinedMetric):
            t_interval(scores)
