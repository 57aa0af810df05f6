"""Verification: a true record is found true, an edited one is caught and told where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import superb_probe
from superb_probe import cli, verification
from superb_probe.engine import run
from superb_probe.errors import RequestError
from superb_probe.results.record import record_path

Findings = dict[str, str]


@pytest.fixture(scope="module")
def true_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    (record,) = run("fbank", "synthetic_sid", lr=[0.01], steps=20, out=out, device="cpu")
    return record_path(out, record.task.name, record.upstream.name, record.run_id)


@pytest.fixture
def record(true_record: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(true_record.parent, tmp_path / "copy")
    return tmp_path / "copy" / true_record.name


def edit(path: Path, part: str, name: str, value: Any) -> None:
    values = json.loads(path.read_text())
    values[part][name] = value
    path.write_text(json.dumps(values))


def verdicts(path: Path, **options: Any) -> Findings:
    return {finding.what: finding.verdict for finding in superb_probe.verify(path, **options)}


def test_a_true_record_is_equal_in_everything(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdicts(record, retrain=True) == {
        "score from the stored items": "equal",
        "dev score from the stored probe": "equal",
        "test score from the stored probe": "equal",
        "test score of a probe trained again": "equal",
    }
    assert cli.main(["verify", str(record), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 3


def test_an_edited_score_is_caught(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(record, "score", "value", 1.5)
    edit(record, "score", "ci95", [0.0, 100.0])
    found = verdicts(record)
    assert found["score from the stored items"] == "different"
    assert found["test score from the stored probe"] == "within the interval"
    assert cli.main(["verify", str(record)]) == 1
    assert "recorded 1.500000" in capsys.readouterr().out


def test_an_edited_dev_score_is_caught(record: Path) -> None:
    edit(record, "selection", "value", 1.5)
    assert verdicts(record)["dev score from the stored probe"] == "different"


def test_another_probe_is_caught(record: Path) -> None:
    file = record.with_suffix(".safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RequestError, match="sha256 differs"):
        superb_probe.load_probe(record)
    assert verdicts(record)["scores from the stored probe"] == "not checked"
    file.unlink()
    with pytest.raises(RequestError, match="not beside it"):
        superb_probe.load_probe(record)


def test_other_data_and_another_encoder_are_told(record: Path) -> None:
    edit(record, "upstream", "revision", "sha256:0")
    (_, finding) = superb_probe.verify(record)
    assert "the encoder found is" in finding.detail
    values = json.loads(record.read_text())
    edit(record, "task", "data", {**values["task"]["data"], "test": "sha256:0"})
    (_, finding) = superb_probe.verify(record)
    assert "test differ" in finding.detail
    edit(record, "task", "version", 99)
    (_, finding) = superb_probe.verify(record)
    assert "version 99" in finding.detail


def test_the_probe_comes_back(record: Path) -> None:
    probe = superb_probe.load_probe(record)
    values = json.loads(record.read_text())
    states = torch.randn(values["upstream"]["num_layers"], 2, 7, values["upstream"]["dim"])
    outputs = probe(states, torch.tensor([7, 5]))
    assert len(probe.head.predict(outputs)) == 2
    assert sum(p.numel() for p in probe.parameters()) == values["probe"]["trainable_params"]


def test_equal_is_not_nearly_equal() -> None:
    assert verification._finding("x", 5.0, 5.0 + 1e-9, None).verdict == "equal"
    assert verification._finding("x", 5.0, 5.01, (4.0, 6.0)).verdict == "within the interval"
    assert verification._finding("x", 5.0, 5.01, None).verdict == "different"
    assert verification._finding("x", 5.0, 7.0, (4.0, 6.0)).verdict == "different"


def test_the_same_head_is_trained_again(tmp_path: Path) -> None:
    """Mutant: without the record's own head options, retraining makes another probe."""
    given: dict[str, Any] = {"lr": [0.01], "steps": 20, "out": tmp_path, "device": "cpu"}
    (record,) = run("fbank_no_cmvn", "synthetic_sid", head_option={"width": 2}, **given)
    path = record_path(tmp_path, record.task.name, record.upstream.name, record.run_id)
    assert record.probe.head_options["width"] == 2
    assert verdicts(path, retrain=True)["test score of a probe trained again"] == "equal"
