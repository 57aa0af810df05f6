"""tools/analyses_claims.py: the numbers of analysis records that the paper's claims are judged by."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from superb_probe.results.analysis_record import Measurement


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("analyses_claims")


def number(measure: str, layer: int, value: float, split: str = "test", ci: Any = None, **where: Any) -> Measurement:
    return Measurement(measure, layer, split, value, ci, 1, where)


def record(analysis: str, *measurements: Measurement, **more: Any) -> Any:
    facts = {"analysis": analysis, "label": "mamba_hubert", "measurements": measurements, "chosen": {"layer of 100": 1}}
    return SimpleNamespace(**facts, **more)


@pytest.fixture
def records() -> list[Any]:
    units = record(
        "units",
        number("pnmi", 0, 0.9, clusters=100),  # not the layer that dev chose
        number("pnmi", 1, 0.3, ci=(0.25, 0.35), clusters=100),
        number("pnmi", 1, 0.1, clusters=100, control="random units"),
        number("pnmi", 1, 0.2, clusters=100, change="opus"),
        number("phone_purity", 1, 0.4, clusters=100),
        number("unit_edit_distance", 1, 0.2, clusters=100, change="opus"),
        number("unit_edit_distance", 1, 0.4, clusters=100, change="gain"),
        number("unit_edit_distance", 1, 0.9, clusters=100, change="gain", control="random units"),
        number("abx_error", 1, 0.2, speakers="across", context="triphone"),
        number("abx_error", 1, 0.3, speakers="across", context="triphone", clusters=100),  # of units
    )
    cca = record(
        "cca",
        number("cca", 0, 0.1, "cross-fitted", target="phones", flavour="pwcca", held_out="speaker"),
        number("cca", 1, 0.5, "cross-fitted", target="phones", flavour="pwcca", held_out="speaker"),
        number("cca", 0, 0.9, "cross-fitted", target="phones", flavour="cca", held_out="speaker"),
        number("cca", 0, 0.8, "cross-fitted", target="phones", flavour="pwcca", held_out="speaker", control="shuffled"),
    )
    apart = record(
        "disentangle",
        number("speaker_eer", 0, 0.3, removed="nothing"),
        number("speaker_eer", 1, 0.2, removed="nothing"),
        number("speaker_eer", 1, 0.1, removed="phones"),
        number("mean_angle_deg", 1, 40.0, "train"),
        number("mean_angle_deg", 1, 70.0, "train", control="random subspace"),
    )
    return [units, cca, apart]


def test_each_number_is_of_the_right_layer_and_of_no_control(tool: Any, records: list[Any]) -> None:
    cells = tool.cells_of({each.analysis: each for each in records})
    assert cells == [
        "1",
        "0.30 [0.25, 0.35]",
        "0.40",
        "0.30",
        "20.0",
        "0.50 (layer 1)",
        "",
        "20.0 (layer 1)",
        "40 (70)",
    ]


def test_what_was_not_analysed_is_empty(tool: Any, records: list[Any]) -> None:
    assert tool.table_of(records[:1]).splitlines()[-1].endswith("|  |  |  |  |")
    assert tool.cells_of({"cca": records[1]})[1:5] == [""] * 4


def test_trained_encoders_come_first_and_filter_banks_last(tool: Any) -> None:
    names = ["fbank", "a (random)", "b", "a"]
    assert sorted(names, key=tool.order) == ["a", "b", "a (random)", "fbank"]
