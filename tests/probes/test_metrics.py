"""Every metric against a slow second implementation, cases counted by hand, and inputs it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from superb_probe.errors import RequestError
from superb_probe.probes.metrics import (
    UndefinedMetric,
    accuracy,
    cer,
    detection_curve,
    edit_distance,
    eer,
    frame_der,
    frame_errors,
    min_dcf,
    per,
    slot_type_f1,
    slot_value_cer,
    slot_value_wer,
    slots,
    wer,
)


def trials(seed: int, count: int, decimals: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=count)
    labels[:2] = (0, 1)
    return labels, np.round(generator.normal(size=count) + shift * labels, decimals)


def searched(labels: np.ndarray, scores: np.ndarray) -> float:
    """What s3prl and most of the field run."""
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from sklearn.metrics import roc_curve

    false_alarm, hit, _ = roc_curve(labels, scores, pos_label=1)
    return float(brentq(lambda x: 1.0 - x - interp1d(false_alarm, hit)(x), 0.0, 1.0))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("count", "decimals", "shift"), [(400, 4, 1.0), (400, 0, 1.0), (37, 1, 0.0), (5, 1, 1.0), (150, 3, 9.0)]
)
def test_eer_equals_the_search_on_the_roc_curve(seed: int, count: int, decimals: int, shift: float) -> None:
    labels, scores = trials(seed, count, decimals, shift)
    value, threshold = eer(labels, scores)
    assert abs(value - searched(labels, scores)) < 1e-9
    target = labels == 1
    around = [
        (float((scores[~target] >= t).mean()), float((scores[target] < t).mean()))
        for t in (threshold - 1, threshold + 1)
    ]
    assert (
        around[0][0] >= value - 1e-12 >= around[1][0] - 2e-12 and around[0][1] <= value + 1e-12 <= around[1][1] + 2e-12
    )


def test_eer_by_hand() -> None:
    assert eer([1, 1, 0, 0], [4, 3, 2, 1])[0] == 0
    assert eer([0, 0, 1, 1], [4, 3, 2, 1])[0] == 1
    assert eer([1, 0], [0, 0])[0] == 0.5
    assert eer([1, 0, 1, 0], [4, 3, 2, 1])[0] == 0.5
    # two thirds of the way along the tied point: one target and one of two others at 0.5
    assert eer([1, 0, 0, 1], [0.5, 0.5, 0.1, 0.9])[0] == pytest.approx(1 / 4)


@pytest.mark.parametrize("seed", range(5))
def test_min_dcf_is_the_least_cost_over_every_threshold(seed: int) -> None:
    labels, scores = trials(seed, 60, 1)
    target = labels == 1
    costs = {}
    for p in (0.01, 0.5):
        for threshold in (*scores, np.inf):
            miss, false_alarm = (scores[target] < threshold).mean(), (scores[~target] >= threshold).mean()
            costs.setdefault(p, []).append((p * miss + (1 - p) * false_alarm) / min(p, 1 - p))
    assert min_dcf(labels, scores) == pytest.approx(min(costs[0.01]), abs=1e-12)
    assert min_dcf(labels, scores, p_target=0.5) == pytest.approx(min(costs[0.5]), abs=1e-12)
    assert min_dcf(labels, scores) <= 1


@pytest.mark.parametrize(
    ("labels", "scores", "error", "words"),
    [
        ([1, 1, 1], [1, 2, 3], UndefinedMetric, "3 of 3"),
        ([0, 0], [1, 2], UndefinedMetric, "0 of 2"),
        ([], [], UndefinedMetric, "no items"),
        ([1, 0], [1.0, math.nan], RequestError, "1 of 2 scores are not finite"),
        ([1, 0], [1.0, math.inf], RequestError, "not finite"),
        ([1, 0, 1], [1.0, 2.0], RequestError, "3 .* 2"),
        ([1, 2, 0], [1.0, 2.0, 0.0], RequestError, r"\[2\]"),
        ([[1, 0]], [[1.0, 2.0]], RequestError, "one-dimensional"),
    ],
)
def test_trials_that_cannot_be_scored(labels: Any, scores: Any, error: type[Exception], words: str) -> None:
    for metric in (eer, min_dcf, detection_curve):
        with pytest.raises(error, match=words):
            metric(labels, scores)


def slow_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


WORDS = ("far", "be", "mat", "sea", "a")


def texts(seed: int, count: int = 30) -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(seed)
    made = [
        [" ".join(generator.choice(WORDS, generator.integers(1 - side, 8))) for _ in range(count)] for side in (0, 1)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("seed", range(4))
def test_error_rates_are_edits_over_tokens_of_the_corpus(seed: int) -> None:
    references, hypotheses = texts(seed)
    for metric, cut in ((wer, str.split), (per, str.split), (cer, list)):
        pairs = [(cut(r), cut(h)) for r, h in zip(references, hypotheses, strict=True)]
        distances = [slow_distance(r, h) for r, h in pairs]
        assert metric(references, hypotheses) == sum(distances) / sum(len(r) for r, _ in pairs)
        per_utterance = np.mean([d / len(r) for d, (r, _) in zip(distances, pairs, strict=True)])
        assert metric(references, hypotheses) != pytest.approx(per_utterance, rel=1e-3)
    assert [edit_distance(r, h) for r, h in zip(references, hypotheses, strict=True)] == [
        slow_distance(r, h) for r, h in zip(references, hypotheses, strict=True)
    ]


def test_error_rates_by_hand() -> None:
    assert wer(["a b c"], [""]) == 1 and wer(["a"], ["a b c"]) == 2 and wer(["a", ""], ["a", "b"]) == 1
    assert cer(["ab"], ["b"]) == 0.5
    assert per([["AA1", "B"]], ["AA1"]) == 0.5
    for metric in (wer, cer, per):
        with pytest.raises(UndefinedMetric, match="no token"):
            metric([""], ["a"])
        with pytest.raises(UndefinedMetric, match="no items"):
            metric([], [])
        with pytest.raises(RequestError, match="2 .* 1"):
            metric(["a", "b"], ["a"])


def test_accuracy_needs_every_slot_right() -> None:
    truth = [{"action": "on", "object": "lamp"}, {"action": "off", "object": "tv"}]
    assert accuracy(truth, truth) == 1
    assert accuracy(truth, [{"action": "on", "object": "tv"}, truth[1]]) == 0.5
    assert accuracy(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75
    with pytest.raises(RequestError):
        accuracy(["a"], [])
    with pytest.raises(UndefinedMetric):
        accuracy([], [])


def slow_der(logits: np.ndarray, labels: np.ndarray, lengths: Sequence[int]) -> float:
    """Speaker by speaker, frame by frame."""
    errors = speech = 0
    for x, y, length in zip(logits.astype(float), labels, lengths, strict=True):

        def entropy(order: tuple[int, ...], x: np.ndarray = x, y: np.ndarray = y, length: int = length) -> float:
            p = 1 / (1 + np.exp(-x[:length]))
            z = y[:length][:, list(order)]
            return float(-(z * np.log(p) + (1 - z) * np.log(1 - p)).sum())

        best = min(permutations(range(y.shape[1])), key=entropy)
        for t in range(length):
            said, true = (
                {k for k in range(y.shape[1]) if x[t, k] > 0},
                {k for k in range(y.shape[1]) if y[t, best[k]] == 1},
            )
            miss, false_alarm = max(len(true) - len(said), 0), max(len(said) - len(true), 0)
            errors += miss + false_alarm + min(len(true), len(said)) - len(true & said)
            speech += len(true)
    return errors / speech


@pytest.mark.parametrize("speakers", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_frame_der_counts_misses_false_alarms_and_confusions(seed: int, speakers: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(4, 20, speakers)).astype(np.float32)
    labels = generator.integers(2, size=(4, 20, speakers)).astype(np.float32)
    lengths = [20, 11, 3, 1]
    value = frame_der(logits, labels, lengths)
    assert value == slow_der(logits, labels, lengths)
    assert value != slow_der(logits, labels, [20] * 4)
    counts = [frame_errors(x[:n], y[:n]) for x, y, n in zip(logits, labels, lengths, strict=True)]
    assert value == sum(c[0] for c in counts) / sum(c[1] for c in counts)


def test_frame_der_by_hand() -> None:
    said = np.array([[[9.0, -9], [9, -9], [9, 9], [-9, -9]]])
    assert frame_der(said, (said > 0).astype(float), [4]) == 0
    assert frame_der(said, (said > 0).astype(float)[..., ::-1], [4]) == 0  # speakers have no order
    true = np.array([[[1.0, 0], [0, 1], [1, 0], [0, 1]]])  # right, confusion, false alarm, miss
    assert frame_der(said, true, [4]) == 3 / 4
    with pytest.raises(UndefinedMetric, match="no speaker"):
        frame_der(said, np.zeros_like(said), [4])
    for logits, labels in ((said * np.nan, true), (said, true + 0.5), (said, true[:, :3])):
        with pytest.raises(RequestError):
            frame_der(logits, labels, [4])


def test_slots_are_the_shortest_stretches_of_one_type() -> None:
    text = "B-a X E-b B-a Y E-a B-b Z  W E-b E-a B-c  E-c B-d Q"
    assert slots(text) == {"a": ["X E-b B-a Y"], "b": ["Z W"]}
    assert slots(text, clean=True) == {"a": ["X Y"], "b": ["Z W"]}
    assert slots("B-a X E-a B-a Y E-a") == {"a": ["X", "Y"]}
    assert slots("no tags") == {}


def test_slot_metrics_by_hand() -> None:
    references = ["B-a XY E-a B-b Z E-b", "none", "B-a P E-a B-a Q E-a"]
    hypotheses = ["B-a XZ E-a B-c Z E-c", "none", "B-a Q E-a"]
    assert slot_type_f1(references, hypotheses) == (0.5 + 1 + 1) / 3
    assert slot_type_f1(["B-a X E-a"], ["X"]) == 0 == slot_type_f1(["X"], ["B-a X E-a"])
    # XY with XZ: 1 of 2; Z missing: 1 of 1; P with Q: 1 of 1; Q with Q: 0 of 1
    assert slot_value_cer(references, hypotheses) == 3 / 5
    assert slot_value_wer(references, hypotheses) == 3 / 4
    assert slot_value_wer(["B-a X Y E-a"], ["B-a Q W E E-a B-a X E-a"]) == 1 / 2  # the closest value is taken
    metrics: tuple[Callable[[list[str], list[str]], float], ...] = (slot_type_f1, slot_value_cer, slot_value_wer)
    for metric in metrics:
        with pytest.raises(RequestError):
            metric(["a"], [])
        with pytest.raises(UndefinedMetric):
            metric([], [])
    with pytest.raises(UndefinedMetric, match="slot value"):
        slot_value_cer(["no slot"], ["B-a X E-a"])
