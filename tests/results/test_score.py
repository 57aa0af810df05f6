"""Scores: the published ones come out, a set never mixes with another, a missing task is no score."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from superb_probe.errors import RequestError
from superb_probe.results import score
from superb_probe.results.reference import load_reference
from superb_probe.results.score import PAPER4, SUPERB10, journal4_fit, site_points, superb_p, superb_r, superb_s

SITE = {row.upstream: row.values for row in load_reference("superb").rows}
PAPER = load_reference("paper").rows
# as the site's formula gives them, rounded as the site rounds; computed independently of this package
PUBLISHED = {
    "FBANK (site)": 0,
    "wav2vec 2.0 Base": 818,
    "wav2vec 2.0 Large": 914,
    "HuBERT Base": 941,
    "HuBERT Large": 919,
    "DistilHuBERT": 717,
    "WavLM Base": 1019,
    "WavLM Base+": 1106,
    "WavLM Large": 1145,
}


@pytest.mark.parametrize(("upstream", "expected"), PUBLISHED.items())
def test_published_scores_come_out(upstream: str, expected: int) -> None:
    found = superb_s(SITE[upstream])
    assert found is not None
    assert round(found) == expected


@pytest.mark.parametrize("task", SUPERB10)
def test_a_swapped_reference_point_is_seen(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant for each task: zero and best exchanged."""
    mutant = {name: dict(metrics) for name, metrics in site_points().items()}
    mutant[task] = {metric: (best, zero) for metric, (zero, best) in mutant[task].items()}
    monkeypatch.setattr(score, "site_points", lambda: mutant)
    assert any(round(superb_s(SITE[name]) or 0) != value for name, value in PUBLISHED.items())


def test_metrics_are_averaged_inside_a_task() -> None:
    values = {("sf", "slot_type_f1"): 89.81, ("sf", "slot_value_cer"): 52.94}  # 1000 points and 0 points
    assert superb_s(values, ["sf"]) == pytest.approx(500.0)
    both = {**values, ("asv", "eer"): 5.11}
    assert superb_s(both, ["sf", "asv"]) == pytest.approx(750.0)  # not (1000 + 0 + 1000) / 3


def test_a_subset_and_a_missing_metric() -> None:
    assert superb_s({("asv", "eer"): 9.56}, ["asv"]) == pytest.approx(0.0)
    assert superb_s({("asv", "eer"): 14.01}, ["asv"]) == pytest.approx(-1000.0)  # not clipped
    assert superb_s({("sf", "slot_type_f1"): 80.0}, ["sf"]) is None
    assert superb_s({("asv", "eer"): 5.0}) is None
    with pytest.raises(RequestError, match=r"asw.*pr, ks"):
        superb_s({}, ["asw"])
    with pytest.raises(RequestError, match="no task"):
        superb_s({}, [])


def test_the_fit_on_table_3_predicts_tables_4_and_5() -> None:
    fit = journal4_fit()
    others = [row for row in PAPER if row.table in (4, 5)]
    assert (fit.rows, len(others)) == (8, 7)
    errors = [abs(fit(row.values) - row.printed["superb_s"]) for row in others]
    assert max(errors) < 0.1
    assert fit.largest_error < 0.05
    spoiled = replace(fit, weights={**fit.weights, ("er", "accuracy"): 7.2})
    assert max(abs(spoiled(row.values) - row.printed["superb_s"]) for row in others) > 0.1
    assert superb_s(others[0].values, PAPER4, "journal4") == pytest.approx(fit(others[0].values))


def test_journal4_is_one_set_of_tasks() -> None:
    with pytest.raises(RequestError, match="journal4"):
        superb_s(SITE["HuBERT Base"], SUPERB10, "journal4")
    assert superb_s({("pr", "per"): 5.0}, PAPER4, "journal4") is None
    site, journal = (superb_s(SITE["HuBERT Base"], PAPER4, kind) for kind in ("site", "journal4"))  # type: ignore[arg-type]
    assert site is not None
    assert journal is not None
    assert abs(site - journal) > 5  # two sets give two numbers: they may never share a column


def test_ranks_count_strictly_beaten_entries() -> None:
    pool = [{("asv", "eer"): v, ("ks", "accuracy"): k} for v, k in ((5.0, 90.0), (6.0, 95.0), (6.0, 90.0))]
    assert superb_r(pool, ["asv", "ks"]) == [1.0, 1.0, 0.0]
    assert superb_r([{}, {("asv", "eer"): 5.0}], ["asv"]) == [0.0, 0.0]


def test_points_for_size() -> None:
    assert superb_p({("asv", "eer"): 5.11}, 94_000_000, ["asv"]) == pytest.approx(1000 / 94)
    assert superb_p({("asv", "eer"): 14.01}, 94_000_000, ["asv"]) == pytest.approx(-1000.0)


def test_the_papers_full_column_is_as_printed() -> None:
    printed = {row.upstream: row.printed["superb_full"] for row in PAPER if row.table == 6}
    assert printed == {
        "Causal Transformer Base": 608.1,
        "Mamba+MLP Base": 651.6,
        "Transformer Base": 772.4,
        "ExtBiMamba Base": 683.5,
    }
    assert all(math.isfinite(value) for value in printed.values())
