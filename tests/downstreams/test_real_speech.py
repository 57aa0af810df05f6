"""tools/real_speech.py, which gives the table of docs/real-speech.md: its manifests, its cells with a few updates, its table."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from superb_probe.downstreams.manifest import Manifest
from superb_probe.results.record import read_records

FILE = Path(__file__).resolve().parents[2] / "tools" / "real_speech.py"
STEPS = {"asr": 4, "asv": 10, "sd": 40, "pr": 40}


def load() -> ModuleType:
    if not FILE.is_file():
        pytest.skip("tools/ is not part of this installation", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("real_speech", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_speech"] = module
    spec.loader.exec_module(module)
    return module


real_speech = load()
CELLS = {f"{cell.task}-{cell.corpus}": cell for cell in real_speech.CELLS}


def corpus(shared: Path, name: str) -> Path:
    if not (shared / "data" / CELLS[name].corpus).is_dir():
        pytest.skip(f"no {CELLS[name].corpus} in {shared / 'data'}")
    return shared / "data"


def manifests(shared: Path, name: str, tmp_path: Path) -> dict[str, Manifest]:
    data = corpus(shared, name)
    files = real_speech.manifests_of(CELLS[name], data, tmp_path)
    root = data / CELLS[name].corpus
    return {split: Manifest.read(path, root) for split, path in files.items() if split != "trials"}


def test_speakers_are_divided_by_sentence(shared: Path, tmp_path: Path) -> None:
    made = manifests(shared, "sid-emodb4", tmp_path)
    speakers = {split: set(manifest.labels("speaker")) for split, manifest in made.items()}
    sentences = {split: {utterance.id[2:5] for utterance in manifest} for split, manifest in made.items()}
    assert len(speakers["train"]) == 10 and speakers["dev"] | speakers["test"] <= speakers["train"]
    assert [len(sentences[split]) for split in ("train", "dev", "test")] == [7, 1, 2]
    assert not sentences["train"] & (sentences["dev"] | sentences["test"])
    assert sum(map(len, made.values())) == 339


def test_emotions_have_a_session_for_every_pair_of_speakers(shared: Path, tmp_path: Path) -> None:
    made = manifests(shared, "er-emodb4", tmp_path)
    assert set(made) == {"train"} and len(made["train"]) == 339
    pairs: dict[str, set[str]] = {}
    for utterance in made["train"]:
        pairs.setdefault(utterance.labels["session"], set()).add(utterance.labels["speaker"])
    assert len(pairs) == 5 and all(len(pair) == 2 for pair in pairs.values())


def test_every_speaker_to_verify_has_several_utterances(shared: Path, tmp_path: Path) -> None:
    """Otherwise labels shuffled among the training utterances are the same task with other names."""
    train = manifests(shared, "asv-librispeech_mini", tmp_path)["train"]
    count = Counter(train.labels("speaker"))
    assert len(count) == 227 and sum(number > 1 for number in count.values()) > 190
    whole: dict[str, list[float]] = {}
    for each in train:
        whole.setdefault(each.audio, []).append(each.start_s)
        assert each.start_s == pytest.approx((len(whole[each.audio]) - 1) * each.duration_s, abs=1e-6)
    assert len(whole) == 227 and max(each.duration_s for each in train) < 8


def test_phones_of_dev_and_test_are_in_train(shared: Path, tmp_path: Path) -> None:
    made = manifests(shared, "pr-emodb4", tmp_path)
    known = {phone for label in made["train"].labels("phones") for phone in label.split()}
    assert all(known.issuperset(label.split()) for split in ("dev", "test") for label in made[split].labels("phones"))
    assert sum(map(len, made.values())) > 0.9 * 338


def test_a_cell_without_its_control_is_no_line(tmp_path: Path) -> None:
    assert real_speech.lines_of([], tmp_path) == []
    assert (
        real_speech.table_of([]).splitlines()[1].count("---") == real_speech.table_of([]).splitlines()[0].count("|") - 1
    )


def test_without_the_corpora_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), "--manifests", str(tmp_path / "m"), "--out", str(tmp_path / "runs"), "--task", "ks", "sd"]
    assert real_speech.main(words) == 0
    said = capsys.readouterr()
    assert "ks: no speech_commands_3w in" in said.err and "sd: no ami_diarization in" in said.err
    assert len(said.out.splitlines()) == 2, "the head of a table"


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_runs_beside_its_control(name: str, shared: Path, tmp_path: Path) -> None:
    cell, data, out = CELLS[name], corpus(shared, name), tmp_path / "runs"
    real_speech.run_cell(cell, ["fbank"], data, tmp_path / "manifests", out, STEPS.get(cell.task, 100))
    records = read_records(out)
    assert {record.probe.control for record in records} == {None, "shuffle"}
    assert all(record.status == "finished" for record in records)
    (line,) = real_speech.lines_of(records, out)
    assert line.row["upstream"] == ("fbank_no_cmvn" if cell.task in real_speech.POOLED else "fbank")
    assert f"| {cell.task} (" in real_speech.table_of([line]) and f"| {cell.corpus} |" in real_speech.table_of([line])
    if cell.task in ("er", "sid"):
        assert line.verdict == "yes"
