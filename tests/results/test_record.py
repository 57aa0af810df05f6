"""Records: the schema and the reader agree, wrong records are refused, files are whole or absent."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superb_probe.errors import RequestError
from superb_probe.results import record as record_module
from superb_probe.results.record import (
    RunRecord,
    existing_record,
    read_items,
    read_record,
    read_records,
    record_path,
    scan_records,
    write_record,
)

SCHEMA_FILE = Path(record_module.__file__).with_name("schema.json")
FAILED = {
    "status": "failed",
    "score": None,
    "selection": None,
    "layer_weights": None,
    "items": None,
    "error": "loss is nan",
}

VALID = [
    {},
    FAILED,
    {"selection.split": "test", "task.protocol": "superb"},
    {"score.ci95": None, "score.ci": None},
    {"probe.layer": 3, "layer_weights": None},
    {"probe.control": "shuffle", "probe.budget": "small"},
    {"upstream.lookahead_samples": 0},
    {"warnings": ["speakers unknown"], "cost": {}},
    {"probe.lr": 1},
]
INVALID = [
    ({"schema": "superb-probe/run/2"}, "superb-probe/run/2"),
    ({"run_id": "xyz"}, "run_id"),
    ({"status": "done"}, "status"),
    ({"upstram": 1}, "did you mean upstream"),
    ({"probe.learning_rate": 1}, "probe.learning_rate"),
    ({"probe.lr": "1e-4"}, "probe.lr"),
    ({"probe.lr": -1.0}, "lr"),
    ({"probe.seed": True}, "probe.seed"),
    ({"probe.seed": 1.5}, "probe.seed"),
    ({"probe.layer_norm": 0}, "probe.layer_norm"),
    ({"probe.view": "sum"}, "probe.view"),
    ({"probe": None}, "probe"),
    ({"upstream.name": None}, "upstream.name"),
    ({"upstream.trained_on": "librispeech"}, "trained_on"),
    ({"upstream.num_layers": 0}, "num_layers"),
    ({"task.data": {"train": 3}}, "task.data.train"),
    ({"task.protocol": "mine"}, "task.protocol"),
    ({"selection.split": "test"}, "test scores choose nothing"),
    ({"selection.split": "test", "task.protocol": "mamba_hubert"}, "test scores choose nothing"),
    ({"selection": None}, "selection"),
    ({"score": None}, "score"),
    ({"score.split": "dev"}, "score.split"),
    ({"score.ci95": [1.0]}, "ci95"),
    ({"score.ci95": [1.0, "2"]}, "ci95"),
    ({"error": "but it finished"}, "error"),
    ({**FAILED, "error": None}, "error"),
    ({**FAILED, "error": ""}, "error"),
    ({"status": "failed", "error": "x"}, "score"),
    ({"layer_weights": 0.5}, "layer_weights"),
    ({"started_at": "yesterday"}, "started_at"),
    ({"environment.settings": []}, "settings"),
]


def apply(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return values


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("changes", VALID, ids=str)
def test_valid_records_pass_reader_and_schema(example: dict[str, Any], validator: Any, changes: dict[str, Any]) -> None:
    values = apply(example, changes)
    record = RunRecord.from_dict(values)
    assert validator.is_valid(values)
    written = json.loads(record.to_json())
    assert validator.is_valid(written)
    assert RunRecord.from_dict(written) == record


@pytest.mark.parametrize(("changes", "named"), INVALID, ids=str)
def test_invalid_records_fail_reader_and_schema(
    example: dict[str, Any], validator: Any, changes: dict[str, Any], named: str
) -> None:
    values = apply(example, changes)
    with pytest.raises(RequestError) as caught:
        RunRecord.from_dict(values, where="runs/a.json")
    assert named in str(caught.value)
    assert "runs/a.json" in str(caught.value)
    assert not validator.is_valid(values)


def test_the_example_of_the_design_keeps_its_fields(example: dict[str, Any]) -> None:
    written = RunRecord.from_dict(example).to_dict()
    for part, values in example.items():
        if isinstance(values, dict):
            assert {name: written[part][name] for name in values} == values
        else:
            assert written[part] == values


def test_every_field_is_required_or_has_a_default_in_both(example: dict[str, Any], validator: Any) -> None:
    """A field left out is refused by both or accepted by both."""
    full = RunRecord.from_dict(example).to_dict()
    for part in full:
        names = [part] + [f"{part}.{name}" for name in full[part]] if isinstance(full[part], dict) else [part]
        for path in names:
            if path.startswith(("task.data.", "task.num_items.")):
                continue
            values = copy.deepcopy(full)
            place, name = (values, part) if "." not in path else (values[part], path.split(".")[1])
            del place[name]
            try:
                RunRecord.from_dict(values)
                accepted = True
            except RequestError:
                accepted = False
            assert validator.is_valid(values) == accepted, path


def test_not_finite_numbers_are_refused(example: dict[str, Any]) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(RequestError, match=r"score\.value must be finite"):
            RunRecord.from_dict(apply(example, {"score.value": value}))


def test_all_problems_are_named_at_once(example: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"probe\.seed.*score\.value"):
        RunRecord.from_dict(apply(example, {"probe.seed": "1", "score.value": None}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"layer_weights": [0.5, 0.5]}, "2 values for 13 layers"), ({"score.ci95": [6.0, 5.0]}, r"\[low, high\]")],
)
def test_rules_beyond_the_schema(example: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        RunRecord.from_dict(apply(example, changes))


def test_write_and_read(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    record = make_record()
    items = {"id": ["a b", 'quote"d'], "score": np.array([0.1, 2 / 3]), "label": np.array([1, 0], dtype=np.int8)}
    path = write_record(record, items, tmp_path)
    assert path == tmp_path / "asv" / "mamba_hubert_causal" / f"{record.run_id}.json"
    assert read_record(path) == replace(record, items=f"{record.run_id}.items.tsv.gz")
    assert read_records(tmp_path) == [read_record(path)]
    assert existing_record(tmp_path, "asv", "mamba_hubert_causal", record.run_id) == read_record(path)
    assert existing_record(tmp_path, "asv", "fbank", record.run_id) is None
    columns = read_items(path)
    assert columns["id"] == ["a b", 'quote"d']
    assert [float(value) for value in columns["score"]] == [0.1, 2 / 3]
    assert columns["label"] == ["1", "0"]


def test_the_same_items_give_the_same_bytes(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    record = make_record()
    first = write_record(record, {"id": ["a"]}, tmp_path / "1").with_name(f"{record.run_id}.items.tsv.gz")
    second = write_record(record, {"id": ["a"]}, tmp_path / "2").with_name(f"{record.run_id}.items.tsv.gz")
    assert first.read_bytes() == second.read_bytes()
    assert gzip.decompress(first.read_bytes()) == b"id\na\n"


@pytest.mark.parametrize(
    ("old", "overwrite", "replaced"),
    [
        ("finished", "never", False),
        ("finished", "failed", False),
        ("finished", "always", True),
        ("failed", "never", False),
        ("failed", "failed", True),
        ("failed", "always", True),
    ],
)
def test_overwrite(
    make_record: Callable[..., RunRecord], tmp_path: Path, old: str, overwrite: Any, replaced: bool
) -> None:
    before = make_record(run_id="aaaaaaaa", **(FAILED if old == "failed" else {}))
    path = write_record(before, None, tmp_path)
    text = path.read_text()
    after = make_record(test=1.0, run_id="aaaaaaaa")
    if replaced:
        write_record(after, {"id": ["a"]}, tmp_path, overwrite)
        assert read_record(path).score is not None
        assert read_record(path).score.value == 1.0
    else:
        with pytest.raises(RequestError, match="--overwrite"):
            write_record(after, {"id": ["a"]}, tmp_path, overwrite)
        assert path.read_text() == text


def test_a_crash_while_writing_leaves_no_half_record(
    make_record: Callable[..., RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_record(make_record(), {"id": ["a"]}, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_invalid_record_never_reaches_the_disk(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    record = make_record()
    assert record.score is not None
    broken = replace(record, score=replace(record.score, value="5"))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"score\.value"):
        write_record(broken, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_uneven_items_are_refused(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="different lengths"):
        write_record(make_record(), {"id": ["a", "b"], "score": [1.0]}, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_an_out_that_cannot_be_written(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="--out"):
        write_record(make_record(), None, tmp_path / "file")


def test_names_that_a_path_cannot_carry(tmp_path: Path) -> None:
    path = record_path(tmp_path, "../up", "./mine.py:mine", "aaaaaaaa")
    assert path.resolve().is_relative_to(tmp_path)
    assert len(path.relative_to(tmp_path).parts) == 3


def test_bad_files_are_named_and_the_rest_is_read(
    make_record: Callable[..., RunRecord], tmp_path: Path, example: dict[str, Any]
) -> None:
    good = write_record(make_record(), None, tmp_path)
    (tmp_path / "cut.json").write_text('{"schema": ')
    (tmp_path / "future.json").write_text(json.dumps({**example, "schema": "superb-probe/run/9"}))
    (tmp_path / "list.json").write_text("[]")
    records, problems = scan_records([tmp_path, good.parent])
    assert records == [read_record(good)]
    assert [name for name in ("cut.json", "future.json", "list.json") if any(name in line for line in problems)] == [
        "cut.json",
        "future.json",
        "list.json",
    ]
    with pytest.raises(RequestError, match=r"(?s)cut\.json.*future\.json"):
        read_records(tmp_path)


def test_two_records_of_one_run_id_are_reported(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    for folder, score in (("1", 5.0), ("2", 6.0)):
        write_record(make_record(test=score, run_id="aaaaaaaa"), None, tmp_path / folder)
    records, problems = scan_records([tmp_path])
    assert len(records) == 1
    assert "aaaaaaaa" in problems[0]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no folder"):
        scan_records([tmp_path / "none"])
