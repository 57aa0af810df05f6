"""Fluent Speech Commands as published, for intent classification (ic)."""

from __future__ import annotations

import csv

from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Row, Tree, audio_key, missing_audio

FILES = {"train": "data/train_data.csv", "dev": "data/valid_data.csv", "test": "data/test_data.csv"}
COLUMNS = ("path", "speakerId", "transcription", "action", "object", "location")


class FluentSpeechCommands(Corpus):
    """Commands to a home; `data/{train,valid,test}_data.csv` name files below `wavs/speakers/<speaker>/`."""

    info = CorpusInfo(
        name="fluent_speech_commands",
        title="Fluent Speech Commands",
        source="https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
        license="Fluent Speech Commands public licence: academic research only",
        citation="Lugosch et al., Speech Model Pre-training for End-to-End Spoken Language Understanding, arXiv:1904.03670",
        landmarks=("data/train_data.csv", "data/valid_data.csv", "data/test_data.csv", "wavs"),
        published={"ic": {"train": 23132, "dev": 3118, "test": 3793}},
        aliases=("fsc", "fluent_commands"),
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold: speaker, text and the three slots."""
        return [Draft(None, {split: _split(tree, file) for split, file in FILES.items()})]


def _split(tree: Tree, file: str) -> list[Row]:
    reader = csv.DictReader(tree.lines(file))
    lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if lacking:
        if reader.fieldnames:
            tree.findings.problem(file, f"no column {', '.join(lacking)}", f"restore it from {tree.info.source}")
        return []
    audio = tree.audio("wavs")
    rows: list[Row] = []
    listed, missing = [], []
    for cells in reader:
        empty = [name for name in COLUMNS if not (cells[name] or "").strip()]
        if empty:
            where = f"{file}, line {reader.line_num}"
            tree.findings.problem(where, f"empty {', '.join(empty)}", f"restore it from {tree.info.source}")
            continue
        key = audio_key(cells["path"])
        listed.append(key)
        if key not in audio:
            missing.append(cells["path"])
            continue
        labels = {"speaker": cells["speakerId"], "text": " ".join(cells["transcription"].split())}
        labels |= {f"slot_{name}": cells[name] for name in ("action", "object", "location")}
        rows.append(Row(key.rpartition("/")[2], audio[key], labels))
    missing_audio(tree, file, listed, missing)
    return rows
