"""KS, SID, ER and IC on small real corpora: real labels must beat shuffled ones at the small budget."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import pytest

import superb_probe
from superb_probe.downstreams.audio import read_header
from superb_probe.downstreams.manifest import Manifest, Utterance

pytestmark = pytest.mark.slow

Row = Mapping[str, str]
SLOTS = ("coffeeDrink", "size", "roast", "numberOfShots")


def write(
    corpus: Path, out: Path, split: Callable[[Row], str], labels: Callable[[Row], dict[str, str]]
) -> dict[str, Path]:
    """Manifests of a folder with a manifest.csv: which split a row is in, and its labels."""
    with open(corpus / "manifest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    utterances: dict[str, list[Utterance]] = {}
    for row in rows:
        seconds = read_header(corpus / row["path"]).duration_s
        utterances.setdefault(split(row), []).append(Utterance(row["utt_id"], row["path"], 0.0, seconds, labels(row)))
    for name, each in utterances.items():
        Manifest(each, corpus, name).write(out / f"{name}.tsv")
    return {name: out / f"{name}.tsv" for name in utterances}


def by_sentence(row: Row) -> str:
    """emodb4's ten sentences: seven to train on, one to choose by, two to test on, all speakers in each."""
    return {"b10": "dev", "a07": "test", "b03": "test"}.get(row["sentence"], "train")


CASES = {
    "ks": (
        "speech_commands_3w",
        lambda row: row["split"],
        lambda row: {"keyword": row["keyword"], "speaker": row["speaker"]},
    ),
    "sid": ("emodb4", by_sentence, lambda row: {"speaker": row["speaker"]}),
    "er": (
        "emodb4",
        lambda row: "train",  # one manifest; its sessions are the folds
        lambda row: {"emotion": row["emotion"], "speaker": row["speaker"], "session": row["fold"]},
    ),
    "ic": (  # no spoken intents, but two slots that a mean over time tells: who says which digit
        "fsdd",
        lambda row: row["split"],
        lambda row: {"slot_digit": row["keyword"], "slot_speaker": row["speaker"]},
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_real_labels_beat_shuffled_ones(task, shared, tmp_path):
    name, split, labels = CASES[task]
    corpus = shared / "data" / name
    manifests = write(corpus, tmp_path, split, labels)

    real, shuffled = (accuracies(task, corpus, manifests, control, tmp_path) for control in (None, "shuffle"))
    assert len(real) == len(shuffled) == (5 if task == "er" else 1)
    assert fmean(real) > fmean(shuffled) + 10


def test_a_mean_of_filter_banks_tells_no_intents(shared, tmp_path):
    """Real commands, four slots: no more than chance, as with any linear model on these means; a leak of labels would show."""
    corpus = shared / "data" / "picovoice_intent"
    manifests = write(
        corpus, tmp_path, lambda row: row["split"], lambda row: {f"slot_{name}": row[name] or "none" for name in SLOTS}
    )
    real, shuffled = (accuracies("ic", corpus, manifests, control, tmp_path) for control in (None, "shuffle"))
    assert abs(fmean(real) - fmean(shuffled)) < 10 and fmean(real) < 20


def accuracies(
    task: str, corpus: Path, manifests: Mapping[str, Path], control: str | None, tmp_path: Path
) -> list[float]:
    """Test accuracy of each fold."""
    records = superb_probe.run(
        "fbank_no_cmvn", task, manifest=manifests, root=corpus, lr=[1e-2], control=control, out=tmp_path / "out"
    )
    assert all(record.status == "finished" for record in records)
    return [record.score.value for record in records if record.score is not None]
