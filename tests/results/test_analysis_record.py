"""Analysis records: strict, beside run records without confusing them, and figures from them alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from superb_probe.errors import RequestError
from superb_probe.results import analysis_figures, analysis_record
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

SCHEMA_FILE = Path(analysis_record.__file__).with_name("analysis_schema.json")
REMOVED = object()
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
        (("upstream", "dim"), 0, "upstream.dim must be at least 1"),
        (("finished_at",), "yesterday", "finished_at must be UTC"),
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


@pytest.mark.parametrize("targets", [("phones",), ("phones", "speaker", "emotion")])
def test_no_name_is_cut_off_where_panels_are_few(
    targets: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four columns of names, a figure of one panel's width showed half of them."""
    rows = tuple(
        Measurement("cca", layer, "cross-fitted", 0.3, (0.2, 0.4), 1, {"target": target, "flavour": "plain"})
        for layer in range(3)
        for target in targets
    )
    records = [
        dataclasses.replace(made_up(name, identity=f"{number:012d}"), analysis="cca", measurements=rows)
        for number, name in enumerate(("transformer_hubert_causal_mask", "mamba_mlp_hubert_causal", "fbank", "a", "b"))
    ]
    figures: list[Any] = []
    real = analysis_figures._save
    monkeypatch.setattr(
        analysis_figures, "_save", lambda figure, *rest: (figures.append(figure), real(figure, *rest))[1]
    )
    draw_analysis(records, "cca", tmp_path / "c.png")
    (figure,) = figures
    names, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= names.x0 and names.x1 <= whole.x1 and names.y1 <= whole.y1


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


@pytest.mark.parametrize("encoders", [2, 7])
def test_every_interval_is_drawn(encoders: int) -> None:
    """As bands of few encoders, as bars beside each other of many; a single layer's is a band across."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    records = [made_up(f"encoder{number}") for number in range(encoders - 1)] + [made_up("fbank", "analytic:1", 1)]
    table = as_table(records)
    table = table[(table["measure"] == "abx_error")]
    names = table["upstream"].drop_duplicates().tolist()
    looks = {name: analysis_figures._look(number) for number, name in enumerate(names)}
    analysis_figures._draw_layers(axes, analysis_figures._Axes("ABX", "error", table), looks)
    heights = [path.vertices[:, 1] for found in axes.collections for path in found.get_paths()]
    assert len(heights) == (1 if encoders == 2 else 6 * 3)  # bands of three layers, or a bar a layer
    assert all(height.min() == pytest.approx(0.1) and height.max() == pytest.approx(0.3) for height in heights)
    assert len(axes.patches) == 1  # of fbank
    places = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 3]
    assert len({round(float(place), 6) for place in places}) == encoders - 1  # none hides another


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to draw"):
        draw_analysis([made_up()], "cca", tmp_path / "c.png")
    with pytest.raises(RequestError, match="unknown figure"):
        draw_analysis([made_up()], "pie", tmp_path / "c.png")
    with pytest.raises(RequestError, match="PNG and SVG"):
        draw_analysis([made_up()], "units", tmp_path / "c.jpg")
    assert set(FIGURES) == {"units", "robustness", "cca", "disentangle", "page"}


def changed(values: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with one place set, or taken away."""
    values = copy.deepcopy(values)
    place: Any = values
    for key in where[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return values


def accepted(values: dict[str, Any]) -> bool:
    try:
        AnalysisRecord.from_dict(values)
    except RequestError:
        return False
    return True


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document: one element of each list stands for all."""
    entries = values.items() if isinstance(values, dict) else list(enumerate(values))[:1]
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def disagreements(schema: dict[str, Any], values: dict[str, Any]) -> Iterator[str]:
    """Every place where the reader and a schema differ, with what is there replaced, taken away, or joined by another name."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for where in places(values):
        for value in (
            "x",
            "",
            7,
            -1,
            1.5,
            True,
            None,
            [],
            {},
            [1, 2],
            [0.1, 0.2],
            [0.1, 0.2, 0.3],
            ["x"],
            {"x": 1},
            {"x": "x"},
            REMOVED,
        ):
            document = changed(values, where, value)
            if validator.is_valid(document) != accepted(document):
                yield f"{where} = {value!r}"
        if where[-1] != 0 and len(where) in (1, 2, 3):
            document = changed(values, (*where[:-1], "colour"), "x")
            if validator.is_valid(document) != accepted(document):
                yield f"{where[:-1]} with a field colour"


def full_record() -> dict[str, Any]:
    """A record in which every field holds something."""
    record = dataclasses.replace(made_up(), measurements=made_up().measurements[:1], files={"centres": "a.safetensors"})
    upstream = dataclasses.replace(record.upstream, trained_on=("speech",), options={"size": "test"}, macs=5)
    environment = dataclasses.replace(record.environment, packages={"numpy": "2"}, settings={"threads": 1})
    values: dict[str, Any] = json.loads(
        json.dumps(dataclasses.replace(record, upstream=upstream, environment=environment).to_dict())
    )
    return values


def test_reader_and_schema_agree_on_every_field() -> None:
    values = full_record()
    fields = {field.name for field in dataclasses.fields(AnalysisRecord)}
    assert set(values) == fields and accepted(values)
    beyond = [
        "'layer') = 7",
        "'ci95', 0) = 7",
        "'ci95', 0) = 1.5",
    ]  # layers below num_layers, low below high: the reader alone
    found = list(disagreements(json.loads(SCHEMA_FILE.read_text()), values))
    assert found == [f"('measurements', 0, {each}" for each in beyond]


@pytest.mark.parametrize(
    ("where", "value", "shown_by"),
    [
        (("properties", "warnings"), REMOVED, "warnings"),
        (("additionalProperties",), True, "colour"),
        (("properties", "measurements", "items", "additionalProperties"), True, "colour"),
        (("properties", "measurements", "items", "properties", "layer", "minimum"), REMOVED, "layer"),
        (("properties", "measurements", "items", "properties", "ci95", "maxItems"), 3, "[0.1, 0.2, 0.3]"),
        (("properties", "measurements", "items", "properties", "ci95", "type"), "array", "ci95"),
        (("properties", "measurements", "items", "required"), ["measure"], "value"),
        (("properties", "data", "required"), [], "digests"),
        (("properties", "chosen"), {}, "chosen"),
        (("properties", "seconds", "type"), "integer", "seconds"),
        (("properties", "environment", "properties", "dirty", "type"), "boolean", "dirty"),
        (("required",), ["schema"], "analysis_id"),
    ],
    ids=str,
)
def test_a_schema_that_says_otherwise_is_found_out(where: tuple[Any, ...], value: Any, shown_by: str) -> None:
    mutant = changed(json.loads(SCHEMA_FILE.read_text()), where, value)
    assert any(shown_by in each for each in disagreements(mutant, full_record()))


def test_shared_parts_are_those_of_run_records() -> None:
    own = json.loads(SCHEMA_FILE.read_text())["properties"]
    run = json.loads(SCHEMA_FILE.with_name("schema.json").read_text())["properties"]
    assert all(own[part] == run[part] for part in ("upstream", "environment", "started_at", "finished_at"))
