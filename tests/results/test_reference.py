"""Published numbers: complete, and the scores published for them come out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from superb_probe.results import record

FOLDER = Path(record.__file__).with_name("reference")
# superb_s over the subsets "paper" and "public", computed from the site's unrounded rows; a dash where a metric is missing
SUPERB_S = {
    "FBANK (site)": (0, 0),
    "wav2vec 2.0 Base": (818, 674),
    "wav2vec 2.0 Large": (914, 781),
    "HuBERT Base": (941, 778),
    "HuBERT Large": (919, 921),
    "DistilHuBERT": (717, None),
    "WavLM Base": (1019, 970),
    "WavLM Base+": (1106, 1155),
    "WavLM Large": (1145, 1286),
}


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / name).read_text(encoding="utf-8")))


@pytest.fixture(params=["superb.json", "paper.json"])
def reference(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def test_every_row_says_what_it_is(reference: dict[str, Any]) -> None:
    assert reference["schema"] == "superb-probe/reference/1"
    assert "arXiv" in reference["source"] or "superbbenchmark" in reference["source"]
    assert reference["protocol"] in ("superb", "mamba_hubert")
    for row in reference["rows"]:
        names = [(score["task"], score["metric"]) for score in row["scores"]]
        assert len(names) == len(set(names))
        for score in row["scores"]:
            assert score["metric"] in reference["units"]
            assert score["metric"] in reference["higher_is_better"]


def test_counts() -> None:
    rows = load("superb.json")["rows"]
    assert [len(row["scores"]) for row in rows] == [16] * 12 + [12] * 2 + [16] * 3
    assert rows[0]["upstream"] == "FBANK (site)"
    assert rows[-1]["upstream"] == "WavLM Large"
    paper = load("paper.json")["rows"]
    tables = [row["table"] for row in paper]
    assert [tables.count(number) for number in (3, 4, 5, 6)] == [8, 4, 3, 4]
    assert all(len(row["scores"]) == (11 if row["table"] == 6 else 4) for row in paper)


def superb_s(row: dict[str, Any], reference: dict[str, Any], subset: str) -> float | None:
    points: dict[str, list[tuple[str, float, float]]] = {}
    for task, metric, zero, thousand in reference["score"]["points"]:
        points.setdefault(task, []).append((metric, zero, thousand))
    values = {(score["task"], score["metric"]): score["value"] for score in row["scores"]}
    total = 0.0
    for task in reference["score"]["subsets"][subset]:
        for metric, zero, thousand in points[task]:
            if (task, metric) not in values:
                return None
            total += (values[task, metric] - zero) / (thousand - zero) / len(points[task])
    return 1000 * total / len(reference["score"]["subsets"][subset])


def wrong_scores(reference: dict[str, Any], tolerance: float = 3.0) -> list[str]:
    rows = {row["upstream"]: row for row in reference["rows"]}
    wrong = []
    for name, expected in SUPERB_S.items():
        for subset, value in zip(("paper", "public"), expected, strict=True):
            found = superb_s(rows[name], reference, subset)
            if (found is None) != (value is None) or (found is not None and abs(found - (value or 0)) > tolerance):
                wrong.append(f"{name} {subset}: {found}, expected {value}")
    return wrong


def test_superb_s_comes_out() -> None:
    assert wrong_scores(load("superb.json")) == []


@pytest.mark.parametrize(
    ("task", "metric"), [("pr", "per"), ("sf", "slot_value_cer"), ("asv", "eer"), ("er", "accuracy")]
)
def test_a_typing_error_is_caught(task: str, metric: str) -> None:
    reference = load("superb.json")
    row = next(row for row in reference["rows"] if row["upstream"] == "HuBERT Base")
    score = next(score for score in row["scores"] if (score["task"], score["metric"]) == (task, metric))
    score["value"] += 5.0
    assert wrong_scores(reference)


def paper_errors(rows: list[dict[str, Any]]) -> list[float]:
    errors = []
    for row in rows:
        if "superb_s" in row:
            value = {score["task"]: score["value"] for score in row["scores"]}
            fitted = -3.1481 * value["pr"] + 2.6259 * value["sid"] + 7.0824 * value["er"] + 2.8092 * value["ic"] - 21.80
            errors.append(abs(fitted - row["superb_s"]))
    return errors


def test_the_papers_score_comes_out() -> None:
    rows = load("paper.json")["rows"]
    assert len(paper_errors(rows)) == 15
    assert max(paper_errors(rows)) < 0.05
    rows[0]["scores"][0]["value"] += 0.1  # a typing error is seen
    assert max(paper_errors(rows)) > 0.05


def test_table_6_agrees_with_tables_3_and_4() -> None:
    rows = load("paper.json")["rows"]
    four = {(row["upstream"], row["size"], row["causal"]): row for row in rows if row["table"] in (3, 4)}
    for row in rows:
        if row["table"] == 6:
            earlier = {s["task"]: s["value"] for s in four[row["upstream"], row["size"], row["causal"]]["scores"]}
            full = {
                s["task"]: s["value"] for s in row["scores"] if s["metric"] not in ("slot_type_f1", "slot_value_cer")
            }
            assert {task: full[task] for task in earlier} == earlier
