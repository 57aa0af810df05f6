"""SD: speaker diarisation, who talks when, by an LSTM and permutation-invariant loss, scored by diarisation error rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superb_probe.downstreams.base import (
    Budget,
    Fold,
    FrameGrid,
    Head,
    LabelSet,
    Prediction,
    ProtocolSettings,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    mini_fold,
    total,
)
from superb_probe.errors import RequestError
from superb_probe.probes.diarization import (
    Diarizer,
    Errors,
    Turn,
    decide,
    diarization_errors,
    frame_accuracy,
    frame_labels,
    read_rttm,
    rttm_lines,
    turns_of,
)
from superb_probe.probes.metrics import UndefinedMetric

PROVIDES = ("sd",)

CHUNK_S = 40.0  # 2000 label frames of 20 ms
LEAST_REST_S = 0.5  # a shorter rest stays with the chunk before it
MAX_SPEAKERS = 5  # the loss tries every order of speakers
MAX_GRID_DIFFERENCE = 5  # frames
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
SETTINGS = tuple(product(THRESHOLDS, (1, 11)))  # threshold, median filter in frames
PLAIN = (0.5, 1)
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    "the test score is the least of ten post-processing settings on test, as SUPERB reports it",
    (
        "recordings are cut into chunks of 40 s (2000 label frames of 20 ms) for every encoder; s3prl counts 2000 frames of the "
        "encoder's own stride, and leaves a turn unlabelled that is longer than a chunk"
    ),
    "in a training batch s3prl repeats the last frame of the longest row only, and pads the others with zeros",
)
AS_SUPERB: dict[str, Any] = {
    "select_metric": "frame_error",
    "head": {"repeat_last": True},
    "deviations": DEVIATIONS,
}

INFO = TaskInfo(
    name="sd",
    version=1,
    metric="der",
    unit="percent",
    higher_is_better=False,
    view="frames",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, **AS_SUPERB),
        "mamba_hubert": ProtocolSettings(default_lr=1e-3, layer_norm=True, **AS_SUPERB),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=30_000, batch=8, accumulate=4, evaluate_every=500),
        "small": Budget(steps=200, batch=8, accumulate=1, evaluate_every=25, head={"width": 128}),
    },
    label_columns=("rttm",),
    speakers="shared",  # who talks is in the RTTM files: `arrange` says which names splits share
    license="LibriMix: LibriSpeech CC BY 4.0, WHAM! noise CC BY-NC 4.0",
    citation=SUPERB_CITATION,
    published={
        "lr": 1e-4,
        "batch": "8 x 4",
        "updates": 30_000,
        "der": {"fbank": 10.05, "hubert_base": 5.88},
        "label_rate": "the published rows had labels of 10 ms; s3prl's labels follow the encoder since (HuBERT Base: 5.87)",
    },
)


class SpeakerDiarization(Task):
    """Who talks when, of two speakers (or as many as a recording of train has): labels on the encoder's own frames.

    Attributes:
        grid: the frames of the encoder it is bound to; None before.
        protocol: "strict", or another that scores as SUPERB does.
        setting: threshold and median filter that dev chose; None before.
    """

    info = INFO

    def __init__(
        self,
        grid: FrameGrid | None = None,
        protocol: str = "strict",
        setting: tuple[float, int] | None = None,
    ) -> None:
        """Unbound; the fit binds it to an encoder."""
        self.grid, self.protocol, self.setting = grid, protocol, setting

    def splits(self, root: Path) -> list[Fold]:
        """The mixtures of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "mixtures")]

    def label_problems(self, fold: Fold) -> list[Problem]:
        """RTTM files that are missing or unreadable, that lack the recording, or have too many speakers."""
        found = []
        for manifest in fold.manifests.values():
            for utterance in manifest:
                where = f"{manifest.name}, utterance {utterance.id} ({utterance.labels['rttm']})"
                try:
                    turns = recording_turns(utterance, manifest.root)
                except RequestError as error:
                    what, _, fix = str(error).rpartition("Fix: ")
                    found.append(Problem(where, what.strip().rstrip("."), fix))
                    continue
                speakers = {turn.speaker for turn in turns}
                if len(speakers) > MAX_SPEAKERS:
                    what = f"{len(speakers)} speakers, the loss can order {MAX_SPEAKERS}"
                    found.append(Problem(where, what, "leave the recording out"))
        if not found and "train" in fold.manifests:
            found += _too_many_speakers(fold)
        return found

    def arrange(self, fold: Fold, protocol: str) -> Fold:
        """The fold with the turns of every recording in its labels, and recordings over 40 s cut into chunks."""
        manifests, notes = {}, []
        names: dict[str, set[str]] = {}
        for split, manifest in fold.manifests.items():
            turns = {utterance.id: recording_turns(utterance, manifest.root) for utterance in manifest}
            names[split] = {turn.speaker for each in turns.values() for turn in each}
            chunks = [chunk for utterance in manifest for chunk in _chunks(utterance, turns[utterance.id])]
            manifests[split] = Manifest(chunks, manifest.root, manifest.name, corpus=manifest.corpus)
            if len(chunks) > len(manifest):
                notes.append(f"{split} ({manifest.name}): {len(manifest)} recordings in {len(chunks)} chunks of 40 s")
            silent = [name for name, each in turns.items() if not each]
            if silent:
                notes.append(f"{split} ({manifest.name}): {len(silent)} recordings without speech, first {silent[0]}")
        for split in ("dev", "test"):
            shared = names.get("train", set()) & names.get(split, set())
            if shared:
                notes.append(f"train and {split} share {len(shared)} speaker names in their RTTM files")
        return replace(fold, manifests=manifests, notes=(*fold.notes, *notes), protocol=protocol)

    def labels(self, train: Manifest) -> LabelSet:
        """The speakers by number: two, or the most that a recording of train has."""
        counts = [len({turn.speaker for turn in labelled_turns(utterance, train.root)}) for utterance in train]
        return LabelSet({"speaker": tuple(str(number) for number in range(1, 1 + max(2, *counts, 0)))})

    def bind(self, fold: Fold, grid: FrameGrid) -> Task:
        """The task on the frames of one encoder, under the fold's protocol."""
        return SpeakerDiarization(grid, fold.protocol, self.setting)

    def tuned_by(self, score: Score) -> Task:
        """Under `strict`, with the threshold and median filter that are best on dev; else as it is."""
        if self.protocol != "strict":
            return self
        return SpeakerDiarization(self.grid, self.protocol, (score.extra["threshold"], int(score.extra["median"])))

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """Ones where a speaker talks, (T, C): in `strict` for every frame of the states, else for the chunk's whole frames."""
        grid = self._bound()
        num_frames = grid.num_frames[utterance.id] if self.protocol == "strict" else _grid_frames(utterance, grid)
        return {"speakers": torch.from_numpy(_labels(utterance, len(labels.classes["speaker"]), num_frames, grid))}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """One unidirectional LSTM and a linear layer, with permutation-invariant loss."""
        chosen = check_options("sd", options, ("width", "repeat_last"))
        return Diarizer(dim, num_speakers=len(labels.classes["speaker"]), **chosen)

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Diarisation error rate in percent: no collar, overlap scored.

        Under `strict` the best of ten settings (threshold, median filter) on dev is used on test; the other protocols take the
        best on test. Items are recordings: seconds missed, falsely said and confused, and the turns that were found, as
        "start length speaker", and how many of the five thresholds each frame's probability is above (`levels_text`).
        """
        manifest = fold.manifests[split]
        check_predictions("sd", predictions, manifest)
        grid = self._bound()
        recordings: dict[str, list[Utterance]] = {}
        for utterance in manifest:
            recordings.setdefault(utterance.labels["recording"], []).append(utterance)
        logits = {u.id: _on_grid(predictions[u.id], u, grid) for u in manifest}
        references = {name: list(_joined_turns(chunks)) for name, chunks in recordings.items()}
        best: tuple[float, dict[str, Any], dict[str, float]] | None = None
        for threshold, median in self._settings(split):
            turns = {name: _found_turns(chunks, logits, threshold, median, grid) for name, chunks in recordings.items()}
            items = _items(recordings, references, turns)
            value = self.value(items)
            if best is None or value < best[0]:
                best = value, items, {"threshold": threshold, "median": float(median)}
        assert best is not None
        value, items, setting = best
        items["levels"] = [
            levels_text(np.concatenate([logits[chunk.id] for chunk in chunks])) for chunks in recordings.values()
        ]
        speech = total(items, "speech_s")
        rates = {name: 100.0 * total(items, f"{name}_s") / speech for name in ("miss", "false_alarm", "confusion")}
        right = [
            frame_accuracy(logits[u.id], _labels(u, logits[u.id].shape[1], len(logits[u.id]), grid)) for u in manifest
        ]
        wrong = 100.0 * (1.0 - float(np.mean(right)))
        extra = {**setting, **rates, "frame_error": wrong}
        return Score(value, items, extra, selects=None if self.protocol == "strict" else wrong)

    def value(self, items: Mapping[str, Any]) -> float:
        """Diarisation error rate in percent: seconds wrong over seconds of reference speech, both summed."""
        speech = total(items, "speech_s")
        if speech == 0:
            raise UndefinedMetric("sd: nobody speaks in the references")
        return 100.0 * sum(total(items, f"{name}_s") for name in ("miss", "false_alarm", "confusion")) / speech

    def _bound(self) -> FrameGrid:
        if self.grid is None:
            raise ValueError("sd: labels and scores are on an encoder's frames; call task.bind(fold, grid) first")
        return self.grid

    def _settings(self, split: str) -> Sequence[tuple[float, int]]:
        """The settings tried on a split."""
        if self.protocol == "strict":
            return [self.setting or PLAIN] if split == "test" else SETTINGS
        return SETTINGS if split == "test" else [PLAIN]


def sd() -> Task:
    """The task as SUPERB sets it: Libri2Mix, two speakers who overlap."""
    return SpeakerDiarization()


def recording_turns(utterance: Utterance, root: Path) -> list[Turn]:
    """The turns of a recording in its RTTM file, within its stretch of the audio and counted from its start.

    In a file of several recordings, those of the utterance's id, or of its audio's name without the ending.

    Raises:
        RequestError: if the file is not there, not RTTM, or has no such recording.
    """
    path = PurePosixPath(utterance.labels["rttm"])
    if path.is_absolute() or ".." in path.parts:
        raise RequestError("the path is absolute or leaves the corpus root. Fix: give it relative to the root")
    recordings = read_rttm(root / path)
    names = (utterance.id, PurePosixPath(utterance.audio).stem)
    chosen = next((name for name in names if name in recordings), None)
    if chosen is None and len(recordings) == 1:
        chosen = next(iter(recordings))
    if chosen is None and recordings:
        raise RequestError(f"has recordings {', '.join(sorted(recordings)[:3])}, ... but not {names[0]}. Fix: add it")
    turns = recordings[chosen] if chosen is not None else []
    return list(_within(turns, utterance.start_s, utterance.duration_s))


def rttm_of_items(items: Mapping[str, Sequence[Any]]) -> str:
    """The turns that were found as RTTM, from a score's items or those read back from a record's file.

    >>> print(rttm_of_items({"id": ["meeting"], "turns": ["0.50 1.25 2"]}), end="")
    SPEAKER meeting 1 0.50 1.25 <NA> <NA> 2 <NA> <NA>
    """
    lines = []
    for name, text in zip(items["id"], items["turns"], strict=True):
        found = [turn.split() for turn in text.split("; ") if turn]
        turns = [Turn(float(start), float(start) + float(length), speaker) for start, length, speaker in found]
        lines.append(rttm_lines(name, turns, decimals=2))
    return "".join(lines)


def levels_text(logits: NDArray[Any]) -> str:
    """How many thresholds the probabilities (T, C) are above, as runs "level x frames", one speaker after the other.

    All that any of the ten settings asks of a probability, in a few characters a turn: what the site needs to score them all.

    >>> levels_text(np.array([[-9.0, 9.0], [-9.0, 9.0], [0.1, 9.0]]))
    '0x2 3x1; 5x3'
    """
    levels = sum((decide(logits, threshold, 1).astype(int) for threshold in THRESHOLDS), np.zeros(logits.shape, int))
    speakers = []
    for row in levels.T:
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        lengths = np.diff(starts, append=len(row))
        speakers.append(" ".join(f"{row[start]}x{length}" for start, length in zip(starts, lengths, strict=True)))
    return "; ".join(speakers)


def labelled_turns(utterance: Utterance, root: Path) -> list[Turn]:
    """The turns in an arranged utterance's labels; of its RTTM file where it is not arranged yet."""
    if "segments" not in utterance.labels:
        return recording_turns(utterance, root)
    turns = [text.split(",", 2) for text in utterance.labels["segments"].split()]
    return [Turn(float(start), float(stop), speaker) for start, stop, speaker in turns]


def _within(turns: Sequence[Turn], start_s: float, duration_s: float) -> Iterator[Turn]:
    """The parts of turns inside a stretch, counted from its start."""
    for turn in sorted(turns):
        start, stop = max(0.0, turn.start_s - start_s), min(duration_s, turn.stop_s - start_s)
        if stop > start:
            yield Turn(start, stop, turn.speaker)


def _chunks(utterance: Utterance, turns: Sequence[Turn]) -> Iterator[Utterance]:
    """The recording in pieces of 40 s with their turns written into the labels; whole, under its own id, where it is shorter."""
    count = max(1, int((utterance.duration_s - LEAST_REST_S) // CHUNK_S) + 1)
    for number in range(count):
        start = number * CHUNK_S
        duration = utterance.duration_s - start if number == count - 1 else CHUNK_S
        inside = _within(turns, start, duration)
        segments = " ".join(f"{turn.start_s:.4f},{turn.stop_s:.4f},{turn.speaker}" for turn in inside)
        labels = {**utterance.labels, "recording": utterance.id, "segments": segments}
        name = utterance.id if count == 1 else f"{utterance.id}#{number}"
        yield Utterance(name, utterance.audio, utterance.start_s + start, duration, labels)


def _too_many_speakers(fold: Fold) -> Iterator[Problem]:
    """Recordings of dev and test with more speakers than any of train, which the head has no output for."""
    counts = {
        split: {u.id: len({turn.speaker for turn in recording_turns(u, manifest.root)}) for u in manifest}
        for split, manifest in fold.manifests.items()
    }
    most = max(2, *counts["train"].values())
    for split, manifest in fold.manifests.items():
        over = [name for name, count in counts[split].items() if count > most]
        if over:
            what = f"{len(over)} recordings have more than {most} speakers, the most of train: {', '.join(over[:5])}"
            yield Problem(f"{split} ({manifest.name})", what, "leave them out, or train on as many speakers")


def _grid_frames(utterance: Utterance, grid: FrameGrid) -> int:
    """Whole frames of the grid in an utterance, as s3prl counts labels."""
    return max(1, round(utterance.duration_s * grid.sample_rate_hz) // grid.hop_samples)


def _labels(utterance: Utterance, num_speakers: int, num_frames: int, grid: FrameGrid) -> NDArray[np.float32]:
    """(T, C) labels of an arranged utterance; speakers in the order of their names, columns to spare are zero."""
    turns = labelled_turns(utterance, Path())
    speakers = sorted({turn.speaker for turn in turns})
    spare = [f"\t{number}" for number in range(num_speakers - len(speakers))]  # no name in a file has a tab
    return frame_labels(turns, [*speakers, *spare], num_frames, grid.hop_s)


def _on_grid(logits: NDArray[Any], utterance: Utterance, grid: FrameGrid) -> NDArray[Any]:
    """Logits of the utterance's whole frames: the last is repeated, or what lies past the end is left out, as s3prl does.

    Encoders give a frame or two less than a stretch has hops: their last window must fit.
    """
    wanted = _grid_frames(utterance, grid)
    if abs(len(logits) - wanted) > MAX_GRID_DIFFERENCE:
        raise RequestError(
            f"sd: {utterance.id} has {wanted} frames of {grid.hop_s:g} s, the prediction {len(logits)}. "
            "Fix: the encoder's hop_samples must be the distance of its frames"
        )
    return np.pad(logits, ((0, max(0, wanted - len(logits))), (0, 0)), mode="edge")[:wanted]


def _joined_turns(chunks: Sequence[Utterance]) -> Iterator[Turn]:
    """The reference turns of a recording, from those of its chunks."""
    for chunk in chunks:
        offset = chunk.start_s - chunks[0].start_s
        for turn in labelled_turns(chunk, Path()):
            yield Turn(turn.start_s + offset, turn.stop_s + offset, turn.speaker)


def _found_turns(
    chunks: Sequence[Utterance], logits: Mapping[str, NDArray[Any]], threshold: float, median: int, grid: FrameGrid
) -> list[Turn]:
    """The turns that decisions on all chunks of a recording make, filtered across chunks as s3prl does."""
    parts = [logits[chunk.id] for chunk in chunks]
    active = decide(np.concatenate(parts), threshold, median)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return [
        turn
        for chunk, part in zip(chunks, np.split(active, ends), strict=True)
        for turn in turns_of(part, grid.hop_s, chunk.start_s - chunks[0].start_s)
    ]


def _items(
    recordings: Mapping[str, Sequence[Utterance]],
    references: Mapping[str, Sequence[Turn]],
    found: Mapping[str, Sequence[Turn]],
) -> dict[str, Any]:
    """The item columns of one setting."""
    counted = {name: diarization_errors(references[name], found[name]) for name in recordings}
    items: dict[str, Any] = {
        "id": list(recordings),
        "cluster": [chunks[0].labels.get("speaker", "") or name for name, chunks in recordings.items()],
    }
    for field in Errors._fields:
        items[field] = np.array([getattr(counted[name], field) for name in recordings])
    items["turns"] = [
        "; ".join(f"{turn.start_s:.2f} {turn.stop_s - turn.start_s:.2f} {turn.speaker}" for turn in sorted(found[name]))
        for name in recordings
    ]
    return items
