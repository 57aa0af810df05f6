"""What a recogniser is fine-tuned on: utterances one by one, or whole documents with their utterances' transcripts joined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError, all_at_once

CONTEXTS = ("utterance", "document")
LONGEST_S = 1200.0  # arXiv 2506.12606, section 4.2: talks longer than 20 min are left out of all splits
_LIBRISPEECH = re.compile(r"(\d+-\d+)-\d+")
_SKIPPED = "ignore_time_segment_in_scoring"


@dataclass(frozen=True, slots=True)
class Passage:
    """One input of a recogniser.

    Attributes:
        id: unique in its split.
        parts: stretches of audio, in order; their samples are joined.
        root: what their paths start from.
        text: their transcripts, joined by spaces.
        cluster: the speaker, where known; else the passage itself.
    """

    id: str
    parts: tuple[Utterance, ...]
    root: Path
    text: str
    cluster: str

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return sum(part.duration_s for part in self.parts)

    def waveform(self) -> Tensor:
        """(S,) float32."""
        return torch.from_numpy(np.concatenate([read_waveform(part, self.root) for part in self.parts]))


def passages(
    manifest: Manifest, context: str, column: str | None = None, longest_s: float = LONGEST_S
) -> list[Passage]:
    """The passages of a manifest that has a `text`.

    Args:
        manifest: utterances in the order in which they were spoken.
        context: "utterance", or "document": all that share a document are one passage, in the manifest's order.
        column: the label that names the document; None: "document" where there is one, else LibriSpeech's chapter from ids like
            1089-134686-0003.
        longest_s: longer passages are left out.

    Raises:
        RequestError: if there is no text, or no way to tell documents.

    >>> rows = [Utterance(f"1-2-{number}", "a.wav", number, 1.0, {"text": word}) for number, word in enumerate(("HOW", "ARE"))]
    >>> [(each.id, each.text, each.duration_s) for each in passages(Manifest(rows, Path("."), "train"), "document")]
    [('1-2', 'HOW ARE', 2.0)]
    """
    if "text" not in manifest.columns:
        raise RequestError(f"{manifest.name}: no column 'text'. Fix: add the transcripts")
    if context not in CONTEXTS:
        raise RequestError(f"unknown context {context!r}. Fix: {' or '.join(CONTEXTS)}")
    groups: dict[str, list[Utterance]] = {}
    for utterance in manifest:
        name = utterance.id if context == "utterance" else _document(manifest, utterance, column)
        groups.setdefault(name, []).append(utterance)
    found = [
        Passage(
            name,
            tuple(parts),
            manifest.root,
            " ".join(part.labels["text"] for part in parts),
            parts[0].labels.get("speaker") or name,
        )
        for name, parts in groups.items()
    ]
    kept = [each for each in found if each.duration_s <= longest_s]
    if not kept:
        raise RequestError(
            f"{manifest.name}: none of {len(found)} passages is at most {longest_s:g} s. Fix: --max-seconds"
        )
    return kept


def _document(manifest: Manifest, utterance: Utterance, column: str | None) -> str:
    if column is None and "document" in manifest.columns:
        column = "document"
    if column is not None:
        name = utterance.labels.get(column, "")
        if not name:
            raise RequestError(
                f"{manifest.name}, utterance {utterance.id}: no {column!r}. Fix: --document-column names the right one"
            )
        return name
    chapter = _LIBRISPEECH.fullmatch(utterance.id)
    if chapter is None:
        raise RequestError(
            f"{manifest.name}, utterance {utterance.id}: which document is it of? Fix: a column `document`, --document-column NAME, "
            "or LibriSpeech's ids (speaker-chapter-number)"
        )
    return chapter[1]


def stm_manifest(folder: Path, context: str, name: str) -> Manifest:
    """A split in TED-LIUM 3's form: `stm/*.stm` beside `sph/*.sph` (or .wav, .flac).

    A line of an STM is `file channel speaker start end <label> words`. Words of segments that are not scored are left out, " 's" is
    joined to the word before, and `<unk>` is dropped.

    Args:
        folder: of the split, e.g. legacy/train.
        context: "utterance" gives a segment a row; "document" a talk, from its first scored segment's start to its last one's end.
        name: of the split.

    Raises:
        RequestError: for missing files and malformed lines, all at once.
    """
    wrong: list[str] = []
    rows: list[Utterance] = []
    files = sorted((folder / "stm").glob("*.stm"))
    if not files:
        raise RequestError(
            f"{folder}: no stm/*.stm. Fix: the folder of a split of TED-LIUM 3, e.g. TEDLIUM_release-3/legacy/dev"
        )
    for file in files:
        segments = _segments(file, wrong)
        audio = next((path for path in sorted((folder / "sph").glob(f"{file.stem}.*"))), None)
        if audio is None:
            wrong.append(f"{file.name}: no audio sph/{file.stem}.sph")
        elif segments:
            place = audio.relative_to(folder).as_posix()
            if context == "document":
                segments = [(segments[0][0], segments[-1][1], " ".join(text for *_, text in segments))]
            for start_s, end_s, text in segments:
                row = (
                    file.stem
                    if context == "document"
                    else f"{file.stem}-{round(100 * start_s):07d}-{round(100 * end_s):07d}"
                )
                labels = {"text": text, "speaker": file.stem, "document": file.stem}
                rows.append(Utterance(row, place, start_s, round(end_s - start_s, 6), labels))
    if wrong:
        raise all_at_once(str(folder), wrong, "unpack the corpus again")
    return Manifest(rows, folder, name)


def _segments(file: Path, wrong: list[str]) -> list[tuple[float, float, str]]:
    """(start_s, end_s, text) of the scored segments of one talk, by time."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        cells = line.split(None, 6)
        try:
            start_s, end_s = float(cells[3]), float(cells[4])
        except (IndexError, ValueError):
            wrong.append(f"{file.name}, line {number}: expected `file channel speaker start end <label> words`")
            continue
        text = cells[6] if len(cells) > 6 else ""
        if not start_s < end_s:
            wrong.append(f"{file.name}, line {number}: from {start_s:g} to {end_s:g} s")
        elif text and _SKIPPED not in text:
            words = text.replace(" '", "'").replace("<unk>", " ").upper().split()
            if words:
                found.append((start_s, end_s, " ".join(words)))
    return sorted(found)


def too_dense(rows: Sequence[Passage], frames: Sequence[int], tokens: Sequence[Tensor]) -> list[str]:
    """Passages that CTC cannot align, said each: fewer frames than tokens and the blanks between equal neighbours."""
    found = []
    for passage, count, target in zip(rows, frames, tokens, strict=True):
        needed = len(target) + int((target[1:] == target[:-1]).sum())
        if count < needed:
            found.append(f"{passage.id}: {count} frames for {needed} tokens and blanks")
    return found
