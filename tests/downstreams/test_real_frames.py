"""Small real corpora: diarisation of meetings, phones and words of read speech and of acted German, a few updates each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import superb_probe
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.prepare import prepare_csv

pytestmark = pytest.mark.slow
BAD = ("6081-41997-0000", "7078-271888-0000", "3235-11599-0000")  # transcript and audio do not align
UNLABELLED = ("08a01Wa",)  # the one recording of emodb4 without hand labels


def run(shared: Path, folder: str, out: Path, task: str, exclude: tuple[str, ...] = (), **options: Any) -> Any:
    root = shared / "data" / folder
    if not root.is_dir():
        pytest.skip(f"no {folder} in {shared}")
    paths = {k: p for k, p in prepare_csv(root, out / "manifests", exclude=exclude).items() if k != "trials"}
    if column := options.pop("seen", None):  # narrow transcriptions: a few labels of dev and test never occur in train
        known = {token for label in Manifest.read(paths["train"], root).labels(column) for token in label.split()}
        for split in ("dev", "test"):
            manifest = Manifest.read(paths[split], root)
            kept = [u.id for u in manifest if known.issuperset(u.labels[column].split())]
            assert len(kept) > 0.9 * len(manifest)
            manifest.keep(kept).write(paths[split])
    for split, count in options.pop("first", {}).items():
        Manifest.read(paths[split], root)[:count].write(paths[split])
    (record,) = superb_probe.run("fbank", task, manifest=paths, root=root, out=out / "runs", **options)
    assert record.status == "finished" and record.selection is not None, record.error
    return record


def test_meetings_of_up_to_four_speakers(shared: Path, tmp_path: Path) -> None:
    record = run(shared, "ami_diarization", tmp_path, "sd", lr=[1e-2], steps=40)
    # nobody is ever said to speak: 100; the head has one output for each of the four speakers of the busiest clip
    assert record.score.value < 99 and record.score.extra["miss"] > 0
    assert record.selection.value < 70, "the two dev clips have two speakers and little overlap"


def test_words_and_phones_of_read_speech(shared: Path, tmp_path: Path) -> None:
    first = {"train": 60, "dev": 6, "test": 6}
    record = run(shared, "librispeech_mini", tmp_path / "pr", "pr", BAD, lr=[1e-2], steps=60, first=first)
    assert record.score.value < 98
    record = run(shared, "librispeech_mini", tmp_path / "asr", "asr", BAD, lr=[1e-3], steps=6, first=first)
    assert 50 < record.score.value <= 110 and record.score.extra["cer"] <= 101


def test_hand_labelled_phones_of_german(shared: Path, tmp_path: Path) -> None:
    record = run(shared, "emodb4", tmp_path, "pr", UNLABELLED, lr=[1e-2], steps=150, seen="phones")
    assert record.score.value < 90
