"""Term-weighted values against a slow count over every threshold, and slot values utterance by utterance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from superb_probe.errors import RequestError
from superb_probe.probes.metrics import (
    TWV_BETA,
    UndefinedMetric,
    detection_counts,
    mean_average_precision,
    mtwv,
    slot_value_cer,
    slot_value_pairs,
    slot_value_wer,
    term_weighted_values,
)


def search_results(seed: int, queries: int = 6, documents: int = 40, decimals: int = 1) -> tuple[list, list]:
    generator = np.random.default_rng(seed)
    labels = [(generator.uniform(size=documents) < 0.1).astype(int) for _ in range(queries)]
    labels[0][0], labels[1][:] = 1, 0  # the second query occurs nowhere
    scores = [np.round(generator.normal(size=documents) + 3 * truth, decimals) for truth in labels]
    return labels, scores


def slow_mtwv(labels: list, scores: list, beta: float, keep_idle: bool = False) -> float:
    best = 0.0
    for threshold in {float(score) for row in scores for score in row}:
        values = []
        for truth, row in zip(labels, scores, strict=True):
            targets, others = int(truth.sum()), int((1 - truth).sum())
            if targets == 0 and not keep_idle:
                continue
            miss = 1 - (row[truth == 1] >= threshold).sum() / targets if targets else 0.0
            values.append(1 - miss - beta * (row[truth == 0] >= threshold).sum() / others)
        best = max(best, float(np.mean(values)))
    return best


def test_beta_is_that_of_quesst() -> None:
    assert TWV_BETA == pytest.approx(12.49)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("decimals", [0, 1, 4])
def test_mtwv_is_the_best_over_every_threshold(seed: int, decimals: int) -> None:
    labels, scores = search_results(seed, decimals=decimals)
    value, threshold = mtwv(labels, scores)
    assert value == pytest.approx(slow_mtwv(labels, scores, TWV_BETA), abs=1e-12)
    if value > 0:
        assert any(threshold in row[truth == 1] for truth, row in zip(labels, scores, strict=True))
    cheap = mtwv(labels, scores, beta=0.1)[0]
    assert cheap == pytest.approx(slow_mtwv(labels, scores, 0.1), abs=1e-12) and cheap > value


def test_queries_that_occur_nowhere_take_no_part() -> None:
    labels, scores = search_results(3)
    assert mtwv(labels, scores)[0] == pytest.approx(mtwv([labels[0], *labels[2:]], [scores[0], *scores[2:]])[0])
    assert slow_mtwv(labels, scores, 1.0) != pytest.approx(slow_mtwv(labels, scores, 1.0, keep_idle=True), rel=1e-3)
    with pytest.raises(UndefinedMetric, match="none of the 1 queries"):
        mtwv([labels[1]], [scores[1]])


def test_mtwv_by_hand() -> None:
    assert mtwv([[1, 0, 0]], [[1.0, 0.5, 0.0]]) == (1.0, 1.0)
    assert mtwv([[1, 0, 0]], [[0.0, 0.5, 1.0]]) == (0.0, math.inf)  # accepting nothing is best
    # half of a query's targets, no false alarm; the other query all: (0.5 + 1) / 2
    assert mtwv([[1, 1, 0], [0, 1, 0]], [[5.0, 0.1, 1.0], [0.0, 3.0, 0.2]])[0] == 0.75
    # a false alarm in 999 documents costs 12.49 / 999
    assert mtwv([[1] + [0] * 999], [[1.0, 1.0] + [0.0] * 998])[0] == pytest.approx(1 - TWV_BETA / 999)
    # one threshold for all queries: each alone would be perfect
    labels, scores = [[1, 0] + [0] * 98] * 2, [[2.0, 1.5] + [0.0] * 98, [1.0, 0.5] + [0.0] * 98]
    assert mtwv(labels, scores)[0] < 1 == mtwv(labels[:1], scores[:1])[0] == mtwv(labels[1:], scores[1:])[0]


def test_counts_and_resampled_queries() -> None:
    labels, scores = search_results(5)
    thresholds, hits, false_alarms = detection_counts(labels, scores)
    targets = [int(truth.sum()) for truth in labels]
    others = [len(truth) - count for truth, count in zip(labels, targets, strict=True)]
    assert (np.diff(thresholds) < 0).all() and (np.diff(hits) >= 0).all() and hits[:, -1].tolist() == targets
    for rows in ([0, 0, 3], [2, 5, 4]):  # what the bootstrap does with the items of drawn queries
        values = term_weighted_values(hits[rows], false_alarms[rows], np.take(targets, rows), np.take(others, rows))
        again = mtwv([labels[row] for row in rows], [scores[row] for row in rows])[0]
        assert max(0.0, values.max()) == pytest.approx(again, abs=1e-12)


def test_detections_that_cannot_be_scored() -> None:
    for labels, scores in (([[1, 0]], [[1.0]]), ([[2, 0]], [[1.0, 0.0]]), ([[1, 0]], [[math.nan, 0.0]])):
        with pytest.raises(RequestError, match="query 0"):
            mtwv(labels, scores)
    with pytest.raises(RequestError, match="1 references"):
        mtwv([[1, 0]], [])


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_scikit_learns(seed: int) -> None:
    from sklearn.metrics import average_precision_score

    labels, scores = search_results(seed)
    pairs = [(truth, row) for truth, row in zip(labels, scores, strict=True) if truth.any()]
    wanted = np.mean([average_precision_score(truth, row) for truth, row in pairs])
    assert mean_average_precision(labels, scores) == pytest.approx(wanted, abs=1e-12)
    assert mean_average_precision(labels, [-row for row in scores]) < wanted
    with pytest.raises(UndefinedMetric, match="none of the 1"):
        mean_average_precision([labels[1]], [scores[1]])


def test_slot_values_add_up_to_the_rates_of_the_corpus() -> None:
    references = ["B-a XY E-a B-b Z E-b", "none", "B-a P E-a B-a QRS T E-a"]
    hypotheses = ["B-a XZ E-a B-c Z E-c", "none", "B-a QRS E-a"]
    for rate, cut in ((slot_value_cer, list), (slot_value_wer, str.split)):
        counts = [slot_value_pairs(r, h, cut) for r, h in zip(references, hypotheses, strict=True)]
        assert sum(edits for edits, _ in counts) / sum(length for _, length in counts) == rate(references, hypotheses)
    assert slot_value_pairs("none", "B-a X E-a", list) == (0, 0)
