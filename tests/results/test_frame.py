"""Records as a table, and records of every past form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import superb_probe
from superb_probe.errors import RequestError
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.record import RunRecord, read_record, write_record

OLD = sorted(Path(__file__).with_name("records_v1").glob("*.json"))


def test_a_row_a_record_and_a_column_a_field(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(make_record(test=5.0 + seed, **{"probe.seed": seed}), None, tmp_path)
    table = superb_probe.load_records(tmp_path)
    assert sorted(zip(table["probe.seed"], table["score.value"], strict=True)) == [(1, 6.0), (2, 7.0)]
    assert table.loc[0, "task.data"] == {"train": "sha256:a", "dev": "sha256:b", "test": "sha256:c"}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RequestError, match=r"bad\.json"):
        superb_probe.load_records(tmp_path)
    assert "bad.json" in superb_probe.load_records(tmp_path, strict=False).attrs["problems"][0]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_old_records_keep_loading(path: Path) -> None:
    """Files as earlier versions wrote them (scores of random encoders on the embedded corpus); none is ever edited."""
    record = read_record(path)
    assert len(leaderboard([record])) == 1
    written = json.loads(record.to_json())
    old = json.loads(path.read_text())
    for part, values in old.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            assert written[part][name] == value, f"{part}.{name}"


def test_there_is_an_old_record() -> None:
    assert OLD
