"""Analysis records: strict, beside run records without confusing them, and figures from them alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from superb_probe.errors import RequestError
from superb_probe.results.analysis_figures import FIGURES, draw_analysis
from superb_probe.results.analysis_record import (
    AnalysisRecord,
    DataPart,
    Measurement,
    analysis_path,
    as_table,
    read_analyses,
    read_analysis,
    write_analysis,
)
from superb_probe.results.record import EnvironmentPart, UpstreamPart, scan_records

ENVIRONMENT = EnvironmentPart(
    "0.1.0", "abc", False, "3.11", "2.13", "cpu", "Linux-x86_64", True, "superb-probe analyze units"
)


def made_up(
    name: str = "mamba_hubert", revision: str = "random:0", layers: int = 3, identity: str = "0123456789ab"
) -> AnalysisRecord:
    upstream = UpstreamPart(
        name, revision, layers, 8, 320, "none", 16000, None, "block_output", 10, (), "superb-probe 0.1.0"
    )
    rows = [
        Measurement("pnmi", layer, split, 0.1 * layer + 0.2, (0.1, 0.9), 2, {"clusters": 10})
        for layer in range(layers)
        for split in ("dev", "test")
    ]
    rows += [Measurement("phone_purity", layer, "test", 0.3, None, 1, {"clusters": 10}) for layer in range(layers)]
    rows += [Measurement("pnmi", 0, "test", 0.01, None, 3, {"clusters": 10, "control": "random units"})]
    rows += [Measurement(measure, 0, "test", 0.4, (0.3, 0.5), 1, {"clusters": 10, "change": change})
             for measure in ("unit_edit_distance", "pnmi") for change in ("noise0", "opus")]  # fmt: skip
    rows += [
        Measurement(
            "abx_error", layer, "test", 0.2, (0.1, 0.3), 1, {"speakers": "across", "context": "triphone", "triples": 7}
        )
        for layer in range(layers)
    ]
    data = DataPart(
        "mini",
        {"train": "sha256:a", "test": "sha256:b"},
        {"train": 3, "dev": 2, "test": 1},
        {"train": 60.0, "dev": 9.0, "test": 8.0},
    )
    settings = {"seeds": [1, 2], "curve_seeds": 1, "budget": "small"}
    return AnalysisRecord(identity, "units", upstream, data, settings, {"layer of 10": 2}, tuple(rows), "95 %", {}, ENVIRONMENT, 1.5,
                          "2026-11-23T00:00:00Z", "2026-11-23T00:00:01Z", warnings=("random weights",))  # fmt: skip


def test_written_and_read_again_and_no_run(tmp_path: Path) -> None:
    record = made_up()
    path = write_analysis(record, tmp_path)
    assert path == analysis_path(tmp_path, "units", "mamba_hubert", record.analysis_id) and path.name.endswith(
        ".analysis.json"
    )
    assert read_analysis(path) == record and read_analyses([tmp_path]) == [record]
    assert scan_records([tmp_path]) == ([], [])  # the leaderboard neither reads it nor complains
    (tmp_path / "broken.json").write_text("{}")
    assert len(scan_records([tmp_path])[1]) == 1  # but it does complain of what is none of both


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("schema",), "superb-probe/analysis/2", "schema is 'superb-probe/analysis/2'"),
        (("analysis",), "colours", "analysis must be"),
        (("analysis_id",), "xyz", "analysis_id must be"),
        (("measurements", 0, "layer"), 3, "measurements[0].layer must be 0 to 2"),
        (("measurements", 0, "ci95"), [0.9, 0.1], "measurements[0].ci95 must be [low, high]"),
        (("measurements", 1, "value"), "high", "measurements[1].value must be a number"),
        (("settigns",), {}, "did you mean settings"),
    ],
)
def test_what_is_wrong_is_named(where: tuple[Any, ...], value: Any, said: str, tmp_path: Path) -> None:
    values = json.loads(json.dumps(made_up().to_dict()))
    place = values
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (tmp_path / "x.analysis.json").write_text(json.dumps(values))
    with pytest.raises(RequestError) as error:
        read_analyses([tmp_path])
    assert said in str(error.value) and "x.analysis.json" in str(error.value)


def test_a_missing_field_is_named() -> None:
    values = copy.deepcopy(made_up().to_dict())
    del values["settings"]
    with pytest.raises(RequestError, match="missing field settings"):
        AnalysisRecord.from_dict(values)


def test_the_table_has_a_row_a_number() -> None:
    record = made_up()
    table = as_table([record, made_up("fbank", "analytic:1", 1, "f" * 12)])
    assert len(table) == len(record.measurements) + len(made_up(layers=1).measurements)
    assert set(table["upstream"]) == {"mamba_hubert (random)", "fbank"}
    first = table.iloc[0]
    assert (first["measure"], first["layer"], first["split"], first["value"], first["clusters"]) == (
        "pnmi",
        0,
        "dev",
        0.2,
        10,
    )


def test_figures_come_from_records_alone(tmp_path: Path) -> None:
    records = [made_up(), made_up("fbank", "analytic:1", 1, "f" * 12)]
    for kind in ("units", "robustness", "page"):
        files = draw_analysis(records, kind, tmp_path / f"{kind}.png")
        again = draw_analysis(records, kind, tmp_path / "again" / f"{kind}.png")
        assert [file.suffix for file in files] == [".png", ".svg", ".csv"]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, again, strict=True))
        drawn = files[1].read_text()
        assert (
            "mamba_hubert (random)" in drawn and "RANDOM" in drawn
        )  # a random encoder is never shown as if it were trained
    assert "Figures 2 and 6" in (tmp_path / "units.svg").read_text().replace("\n", " ")


def test_trained_encoders_are_not_called_random(tmp_path: Path) -> None:
    files = draw_analysis([made_up(revision="sha256:0")], "units", tmp_path / "u.png")
    assert "RANDOM" not in files[1].read_text() and "(random)" not in files[1].read_text()


def test_other_speech_is_another_figure(tmp_path: Path) -> None:
    other = dataclasses.replace(
        made_up(), analysis_id="a" * 12, data=dataclasses.replace(made_up().data, dataset="manifest:x")
    )
    files = draw_analysis([made_up(), other], "units", tmp_path / "u.png")
    assert [file.name for file in files] == ["u.png", "u.svg", "u.csv", "u_2.png", "u_2.svg", "u_2.csv"]


def test_of_two_records_of_one_encoder_the_later_is_drawn(tmp_path: Path) -> None:
    later = dataclasses.replace(made_up(), analysis_id="b" * 12, finished_at="2026-11-23T09:00:00Z")
    later = dataclasses.replace(
        later, measurements=tuple(dataclasses.replace(each, seeds=7) for each in later.measurements)
    )
    for records in ([made_up(), later], [later, made_up()]):
        table = draw_analysis(records, "units", tmp_path / "u.png")[2].read_text().splitlines()
        assert len(table) == len(later.measurements) + 1 and all(line.endswith(",7") for line in table[1:])
    full = dataclasses.replace(made_up(), settings={"seeds": [1], "curve_seeds": 1, "budget": "full"})
    assert len(draw_analysis([made_up(), full], "units", tmp_path / "u.png")) == 6  # two figures


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to draw"):
        draw_analysis([made_up()], "cca", tmp_path / "c.png")
    with pytest.raises(RequestError, match="unknown figure"):
        draw_analysis([made_up()], "pie", tmp_path / "c.png")
    with pytest.raises(RequestError, match="PNG and SVG"):
        draw_analysis([made_up()], "units", tmp_path / "c.jpg")
    assert set(FIGURES) == {"units", "robustness", "cca", "disentangle", "page"}
