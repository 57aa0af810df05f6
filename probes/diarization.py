"""Speaker diarisation: turns and RTTM files, labels on a frame grid, the scored error rate, and the head of SUPERB's SD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.signal import medfilt
from torch import Tensor

from superb_probe.downstreams.base import Batch
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.ctc import FrameLogits
from superb_probe.probes.heads import LstmPit

RTTM_FIELDS = 8  # up to the speaker's name; the confidence and the lookahead time may be left out
RTTM_TYPES = frozenset(
    ("SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH", "FILLER")
    + ("EDIT", "IP", "SU", "CB", "A/P", "SPEAKER", "SPKR-INFO")
)
REPEATED_FRAMES = 4  # s3prl accepts states that are up to this many frames shorter than the labels


class Turn(NamedTuple):
    """A stretch in which one speaker talks.

    Attributes:
        start_s: where it begins.
        stop_s: where it ends.
        speaker: who; any name.
    """

    start_s: float
    stop_s: float
    speaker: str


class Errors(NamedTuple):
    """What a diarisation of one recording got wrong, in seconds of speaker time.

    Attributes:
        miss_s: reference speech nobody was said to speak.
        false_alarm_s: speech said to be there that is not.
        confusion_s: speech given to the wrong speaker.
        speech_s: reference speech; a second with two speakers counts twice.
    """

    miss_s: float
    false_alarm_s: float
    confusion_s: float
    speech_s: float


def read_rttm(path: Path) -> dict[str, list[Turn]]:
    """The turns of every recording in an RTTM file (NIST RT-09 evaluation plan, appendix A).

    Lines of other types than SPEAKER, comments (";") and turns without a length are passed over. A file is read once for all its
    recordings, and again when it has changed; what it holds is shared, not to be modified.

    Raises:
        RequestError: if the file is missing or not UTF-8, or with every line that is not RTTM.
    """
    try:
        status = path.stat()
        return _read_rttm(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}. Fix: put the RTTM file there, or correct its path") from error


@lru_cache(maxsize=8)
def _read_rttm(path: Path, changed_ns: int, size_bytes: int) -> dict[str, list[Turn]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 (byte {error.start}). Fix: save it as UTF-8") from error
    found: dict[str, list[Turn]] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0].startswith(";"):
            continue
        if fields[0] not in RTTM_TYPES:
            wrong.append(f"line {number}: type {fields[0]!r} is none of RTTM's")
        elif fields[0] == "SPEAKER":
            turn = _turn(fields)
            if isinstance(turn, str):
                wrong.append(f"line {number}: {turn}")
            else:
                found.setdefault(fields[1], []).extend([turn] if turn.stop_s > turn.start_s else [])
    if wrong:
        raise all_at_once(
            str(path), wrong, "SPEAKER <recording> 1 <start s> <length s> <NA> <NA> <speaker> <NA> <NA>, a line a turn"
        )
    return found


def _turn(fields: Sequence[str]) -> Turn | str:
    if len(fields) < RTTM_FIELDS:
        return f"{len(fields)} fields, at least {RTTM_FIELDS} are needed"
    try:
        start, length = float(fields[3]), float(fields[4])
    except ValueError:
        return f"start {fields[3]!r} or length {fields[4]!r} is not a number"
    if not (math.isfinite(start) and math.isfinite(length) and start >= 0 and length >= 0):
        return f"start {fields[3]} and length {fields[4]} must be 0 or more"
    return Turn(start, start + length, fields[7])


def rttm_lines(recording: str, turns: Iterable[Turn], decimals: int = 3) -> str:
    """The turns of a recording as RTTM, in the order of their starts.

    >>> print(rttm_lines("meeting", [Turn(0.5, 2.0, "ann")]), end="")
    SPEAKER meeting 1 0.500 1.500 <NA> <NA> ann <NA> <NA>
    """
    return "".join(
        f"SPEAKER {recording} 1 {turn.start_s:.{decimals}f} {turn.stop_s - turn.start_s:.{decimals}f} "
        f"<NA> <NA> {turn.speaker} <NA> <NA>\n"
        for turn in sorted(turns)
    )


def frame_labels(turns: Iterable[Turn], speakers: Sequence[str], num_frames: int, hop_s: float) -> NDArray[np.float32]:
    """(T, C) ones where a speaker talks: a turn covers the frames from its start to its end, both rounded to the grid.

    As s3prl rounds (`rint`, halves to even).

    >>> frame_labels([Turn(0.02, 0.06, "a")], ["a", "b"], 4, 0.02).tolist()
    [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    labels = np.zeros((num_frames, len(speakers)), dtype=np.float32)
    for turn in turns:
        # rounded first, because 0.3 s / 0.02 s is 14.999... in binary
        first, end = (max(0, int(np.rint(round(time_s / hop_s, 6)))) for time_s in turn[:2])
        labels[first:end, speakers.index(turn.speaker)] = 1.0
    return labels


def decide(logits: NDArray[Any], threshold: float, median_frames: int) -> NDArray[np.bool_]:
    """(T, C) whether a speaker talks: probability above the threshold, then a median filter over time, zeros past the ends.

    Args:
        logits: (T, C).
        threshold: of the probability, between 0 and 1.
        median_frames: odd; 1 filters nothing.
    """
    active = logits > math.log(threshold / (1 - threshold))
    return active if median_frames == 1 else medfilt(active.astype(np.float64), (median_frames, 1)) > 0.5


def turns_of(active: NDArray[np.bool_], hop_s: float, start_s: float = 0.0) -> list[Turn]:
    """The turns of frame decisions (T, C); speakers are named by their number, from 1.

    >>> turns_of(np.array([[True, False], [True, False], [False, True]]), 0.5)
    [Turn(start_s=0.0, stop_s=1.0, speaker='1'), Turn(start_s=1.0, stop_s=1.5, speaker='2')]
    """
    found = []
    for speaker in range(active.shape[1]):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], active[:, speaker], [False]]).astype(np.int8)))
        found += [
            Turn(start_s + float(first * hop_s), start_s + float(end * hop_s), str(speaker + 1))
            for first, end in edges.reshape(-1, 2).tolist()
        ]
    return found


def diarization_errors(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> Errors:
    """Miss, false alarm and confusion of a recording, as NIST scores them: no collar, overlapped speech counted.

    Speakers are matched one to one so that they share the most time. Turns of one speaker that overlap count once.
    Source: NIST RT-09 evaluation plan, section 6.1 (what md-eval and dscore compute).

    >>> diarization_errors([Turn(0, 2, "a"), Turn(2, 4, "b")], [Turn(0, 3, "1"), Turn(3, 4, "2")])
    Errors(miss_s=0.0, false_alarm_s=0.0, confusion_s=1.0, speech_s=4.0)
    """
    edges = np.unique([time_s for turn in (*reference, *hypothesis) for time_s in turn[:2]])
    if len(edges) < 2:
        return Errors(0.0, 0.0, 0.0, 0.0)
    lengths = np.diff(edges)
    truth, said = _activity(reference, edges), _activity(hypothesis, edges)
    shared = np.einsum("i,ir,is->rs", lengths, truth, said)
    rows, columns = linear_sum_assignment(-shared)
    correct = float(shared[rows, columns].sum())
    num_true, num_said = truth.sum(1), said.sum(1)
    both = float((lengths * np.minimum(num_true, num_said)).sum())
    return Errors(
        miss_s=float((lengths * np.maximum(num_true - num_said, 0)).sum()),
        false_alarm_s=float((lengths * np.maximum(num_said - num_true, 0)).sum()),
        confusion_s=max(0.0, both - correct),
        speech_s=float((lengths * num_true).sum()),
    )


def _activity(turns: Sequence[Turn], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """(intervals, speakers) ones where a speaker talks between two edges."""
    speakers = sorted({turn.speaker for turn in turns})
    active = np.zeros((len(edges) - 1, len(speakers)))
    for turn in turns:
        first, end = np.searchsorted(edges, turn[:2])
        active[first:end, speakers.index(turn.speaker)] = 1.0
    return active


def frame_accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of right decisions over all frames and speakers of one chunk, under the best order of speakers.

    What s3prl chooses SD's checkpoint by: a speaker talks where the logit is above zero, the order is that of the least binary
    cross-entropy.

    >>> frame_accuracy(np.array([[2.0, -1.0], [3.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]))
    0.75
    """
    order = frame_order(logits, labels)
    return float(((logits > 0) == (labels[:, order] > 0.5)).mean())


def frame_order(logits: NDArray[Any], labels: NDArray[Any]) -> list[int]:
    """The order of the labels' speakers with the least binary cross-entropy: an assignment problem, solved exactly."""
    # softplus(x) - x y: the first term is the same in every order
    gain = logits.astype(np.float64).T @ labels.astype(np.float64)
    return [int(column) for column in linear_sum_assignment(-gain)[1]]


class Diarizer(LstmPit):
    """SUPERB's diarisation head: `LstmPit`, with the labels' own number of frames where a protocol asks for it.

    Attributes:
        repeat_last: whether the last frame of every row is repeated, so that labels may be a few frames longer than the states.
    """

    def __init__(self, dim: int, *, width: int = 512, num_speakers: int = 2, repeat_last: bool = False) -> None:
        """A head for states of width `dim`; `width` is the LSTM's."""
        super().__init__(dim, width=width, num_speakers=num_speakers)
        self.repeat_last = repeat_last

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits; with `repeat_last`, of each row's frames and of its last frame four more times.

        >>> Diarizer(4, width=3, repeat_last=True)(torch.zeros(2, 5, 4), torch.tensor([5, 3])).num_frames.tolist()
        [9, 7]
        """
        if self.repeat_last:
            position = torch.arange(frames.shape[1] + REPEATED_FRAMES, device=frames.device)
            index = torch.minimum(position[None], num_frames[:, None] - 1)
            frames = frames.gather(1, index[..., None].expand(-1, -1, frames.shape[2]))
            num_frames = num_frames + REPEATED_FRAMES
        return super().forward(frames, num_frames)

    def loss(self, outputs: FrameLogits, batch: Batch) -> Tensor:
        """Binary cross-entropy of the best permutation of each utterance, over the frames that have a label.

        Labels are as long as the states (with `repeat_last`, up to four frames longer). A shuffled control gives a row the labels
        of another utterance: the frames both have are used.
        """
        labels, lengths = batch.targets["speakers"], batch.targets["speakers_lengths"]
        longest = min(labels.shape[1], outputs.logits.shape[1])
        cut = FrameLogits(outputs.logits[:, :longest], torch.minimum(lengths, outputs.num_frames))
        targets = {**batch.targets, "speakers": labels[:, :longest]}
        return super().loss(cut, Batch(batch.ids, batch.num_frames, targets))
