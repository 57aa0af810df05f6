"""The bench of the search by dynamic time warping, with a stand-in for its peer."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from superb_probe import bench_dtw
from superb_probe.cli import main

SHAPE = ["--shape", "2", "3", "6", "4", "9"]


def warp(distances: np.ndarray, step_pattern: str, open_begin: bool, open_end: bool) -> SimpleNamespace:
    assert (step_pattern, open_begin, open_end) == ("asymmetric", True, True)
    costs = distances[0].copy()
    for row in distances[1:]:
        costs = np.array([row[j] + min(costs[j - s] for s in (0, 1, 2) if j >= s) for j in range(len(row))])
    return SimpleNamespace(normalizedDistance=float(costs.min() / len(distances)))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["bench", "dtw", "--device", "cpu", "--repeats", "1", "--json", *SHAPE, *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("dtw")
    module.dtw = warp  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dtw", module)
    monkeypatch.setattr(bench_dtw, "version", lambda name: f"0 of {name}")


@pytest.mark.usefixtures("peer")
def test_both_sides_are_timed_and_their_scores_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(capsys)
    assert result["peer"] == "dtw-python 0 of dtw-python"
    assert result["pairs"] == 8 and result["largest_difference"] < 1e-6
    ratio = result["peer_seconds_a_pair"]["search"] / result["seconds_a_pair"]["search"]
    assert result["ratio"]["search"] == pytest.approx(ratio)
    lines = bench_dtw.describe_dtw(result)
    assert "8 pairs" in lines[1] and "times" in lines[2] and "differ by" in lines[5]
    assert (
        lines[4].startswith("  products:")
        and "times" not in lines[4]
        and set(result["ratio"]) == {"search", "recurrence"}
    )
    right = bench_dtw.search
    monkeypatch.setattr(bench_dtw, "search", lambda *pair: right(*pair) + 0.01)
    assert run(capsys)["largest_difference"] == pytest.approx(0.01, abs=1e-6)


def test_without_its_peer_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dtw", None)
    result = run(capsys)
    assert result["peer"] is None and "pip install" in bench_dtw.describe_dtw(result)[-1]


def test_a_shape_is_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "dtw", "--shape", "2", "0", "6", "4", "9"]) == 2
    assert "positive numbers" in capsys.readouterr().err
