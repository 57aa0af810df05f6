"""The metrics of every task, as fractions of one: equal to s3prl's values, with clear errors instead of NaN.

A metric that its data leave undefined (one class only, no reference token) raises `UndefinedMetric`; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rapidfuzz.distance import Levenshtein

from superb_probe.errors import RequestError

Floats = NDArray[np.float64]
SPAN = re.compile(r"B-(\S+) (.+?) E-\1")  # a slot: the shortest stretch between tags of one type
TAG = re.compile(r"B-\S+ | E-\S+")


class UndefinedMetric(RequestError):
    """The data leave the metric without a value, e.g. trials of one class only."""


def _same_length(what: str, first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second):
        raise RequestError(f"{what}: {len(first)} references or labels beside {len(second)} predictions")
    if len(first) == 0:
        raise UndefinedMetric(f"{what}: no items to score")


def detection_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The operating points of a verification system, from accepting nothing to accepting everything.

    Args:
        labels: (n,) 1 for a target trial, 0 for another.
        scores: (n,) higher means more alike; trials of equal score are accepted together.

    Returns:
        False-acceptance rates, miss rates and thresholds (accept a score at or above it; the first is infinite).

    Raises:
        UndefinedMetric: when there are no trials, or none of one class.
        RequestError: for labels other than 0 and 1, scores that are not finite, or lengths that differ.
    """
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or score.ndim != 1:
        raise RequestError(f"trials: labels {truth.shape} and scores {score.shape}, both must be one-dimensional")
    _same_length("trials", truth, score)  # type: ignore[arg-type]
    if not np.isfinite(score).all():
        raise RequestError(f"trials: {int((~np.isfinite(score)).sum())} of {len(score)} scores are not finite")
    target = truth == 1
    if not (target | (truth == 0)).all():
        raise RequestError(
            f"trials: labels must be 0 or 1, found {sorted(set(np.unique(truth).tolist()) - {0, 1})[:5]}"
        )
    num_targets = int(target.sum())
    if num_targets in (0, len(truth)):
        raise UndefinedMetric(f"trials: {num_targets} of {len(truth)} are targets; both classes are needed")
    order = np.argsort(-score, kind="stable")
    score, accepted_targets = score[order], np.cumsum(target[order])
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # the last trial of each run of equal scores
    hits = accepted_targets[ends]
    false_alarm = np.append(0.0, (ends + 1 - hits) / (len(truth) - num_targets))
    miss = np.append(1.0, (num_targets - hits) / num_targets)
    return false_alarm, miss, np.append(np.inf, score[ends])


def eer(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The equal error rate and its threshold.

    The value x at which the ROC, its points joined by straight lines, meets x = 1 - true-acceptance rate: what
    `brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1)` on scikit-learn's `roc_curve` searches for, solved exactly.

    Args:
        labels: (n,) 1 for a target trial, 0 for another.
        scores: (n,) higher means more alike.

    Returns:
        The rate as a fraction, and the threshold on the same line (accept at or above it).

    >>> eer([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.2, 0.7, 0.3, 0.1])
    (0.3333333333333333, 0.7)
    """
    false_alarm, miss, threshold = detection_curve(labels, scores)
    difference = false_alarm - miss  # rises from -1 to 1
    after = int(np.argmax(difference >= 0))
    before = after - 1
    share = -difference[before] / (difference[after] - difference[before])
    value = false_alarm[before] + share * (false_alarm[after] - false_alarm[before])
    low = threshold[before] if np.isfinite(threshold[before]) else threshold[after]
    return float(value), float(low + share * (threshold[after] - low))


def min_dcf(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    p_target: float = 0.01,
    cost_miss: float = 1.0,
    cost_false_alarm: float = 1.0,
) -> float:
    """The least normalised detection cost over all thresholds (NIST SRE 2016, section 3.1).

    Args:
        labels: (n,) 1 for a target trial, 0 for another.
        scores: (n,) higher means more alike.
        p_target: prior of a target.
        cost_miss: cost of rejecting a target.
        cost_false_alarm: cost of accepting another.

    >>> min_dcf([1, 1, 0, 0], [0.9, 0.4, 0.5, 0.1])
    0.5
    """
    false_alarm, miss, _ = detection_curve(labels, scores)
    cost = cost_miss * p_target * miss + cost_false_alarm * (1 - p_target) * false_alarm
    return float(cost.min() / min(cost_miss * p_target, cost_false_alarm * (1 - p_target)))


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other.

    >>> edit_distance("sitting", "kitten")
    3
    """
    return int(Levenshtein.distance(reference, hypothesis))


def token_error_rate(
    what: str, references: Sequence[Sequence[Hashable]], hypotheses: Sequence[Sequence[Hashable]]
) -> float:
    """Edits over reference tokens, both summed over the corpus; `what` names the metric in errors.

    >>> token_error_rate("wer", [["a", "b"], ["c"]], [["a"], ["c"]])
    0.3333333333333333
    """
    _same_length(what, references, hypotheses)
    tokens = sum(len(reference) for reference in references)
    if tokens == 0:
        raise UndefinedMetric(f"{what}: the references hold no token")
    return sum(map(edit_distance, references, hypotheses)) / tokens


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate of a corpus: edits over reference words, words parted by white space.

    >>> wer(["the cat sat", "on"], ["the cat", "on"])
    0.25
    """
    return token_error_rate("wer", [text.split() for text in references], [text.split() for text in hypotheses])


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of a corpus: edits over reference characters, spaces counted.

    >>> cer(["the cat"], ["the bat"]) == 1 / 7
    True
    """
    return token_error_rate("cer", references, hypotheses)


def per(references: Sequence[Sequence[str] | str], hypotheses: Sequence[Sequence[str] | str]) -> float:
    """Phone error rate of a corpus: edits over reference phones, given as lists or parted by white space.

    >>> per(["DH AH0 K AE1 T"], [["DH", "AH1", "K", "AE1", "T"]])
    0.2
    """
    parted = [[t.split() if isinstance(t, str) else t for t in texts] for texts in (references, hypotheses)]
    return token_error_rate("per", *parted)


def accuracy(references: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Share of items predicted right; an item with several slots is right when all are equal.

    >>> accuracy([{"action": "on", "object": "lamp"}, "off"], [{"action": "on", "object": "tv"}, "off"])
    0.5
    """
    _same_length("accuracy", references, predictions)
    return sum(bool(a == b) for a, b in zip(references, predictions, strict=True)) / len(references)


def frame_errors(logits: ArrayLike, labels: ArrayLike) -> tuple[int, int]:
    """Diarisation errors of one utterance's frames, and its reference speaker-frames.

    A speaker is active where the logit is above zero. Speakers are matched by the permutation of labels with the least binary
    cross-entropy; each frame's missed speakers, false alarms and confusions are counted.

    Args:
        logits: (T, C), C speakers.
        labels: (T, C), ones where a speaker is active.

    Returns:
        Errors (misses, false alarms and confusions) and active labels.
    """
    score, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if score.ndim != 2 or score.shape != truth.shape:
        raise RequestError(f"frame_der: logits {score.shape} beside labels {truth.shape}, both must be (T, speakers)")
    if not np.isfinite(score).all() or not np.isin(truth, (0, 1)).all():
        raise RequestError("frame_der: logits must be finite and labels 0 or 1")
    # softplus(x) - x y is the cross-entropy; its first term is the same for all permutations
    orders = [list(order) for order in permutations(range(score.shape[1]))]
    best = min(orders, key=lambda order: -(score * truth[:, order]).sum())
    truth, decided = truth[:, best] == 1, score > 0
    reference, system, correct = truth.sum(1), decided.sum(1), (truth & decided).sum(1)
    # miss + false alarm + confusion = max(reference, system) - correct, frame by frame
    return int((np.maximum(reference, system) - correct).sum()), int(reference.sum())


def frame_der(logits: ArrayLike, labels: ArrayLike, num_frames: Sequence[int] | ArrayLike) -> float:
    """Frame-level diarisation error rate of a batch: errors over reference speaker-frames, valid frames only.

    Not the scored DER of RTTM files: no segments, no collar, no post-processing.

    Args:
        logits: (B, T, C), C speakers.
        labels: (B, T, C), ones where a speaker is active.
        num_frames: (B,) valid frames.

    >>> frame_der([[[2.0, -1.0], [3.0, -2.0], [0.0, 9.0]]], [[[0, 1], [1, 1], [0, 0]]], [2])
    0.3333333333333333
    """
    _same_length("frame_der", np.asarray(logits), np.asarray(labels))  # type: ignore[arg-type]
    lengths = np.asarray(num_frames).tolist()
    rows = zip(np.asarray(logits), np.asarray(labels), lengths, strict=True)
    counts = [frame_errors(row[:length], truth[:length]) for row, truth, length in rows]
    speech = sum(reference for _, reference in counts)
    if speech == 0:
        raise UndefinedMetric("frame_der: no speaker is active in any valid frame")
    return sum(errors for errors, _ in counts) / speech


def slots(text: str, *, clean: bool = False) -> dict[str, list[str]]:
    """The values of each slot type in a text with tags, in order; `clean` removes tags inside values, as for hypotheses.

    >>> slots("PLAY B-artist THE KINKS E-artist")
    {'artist': ['THE KINKS']}
    """
    found: dict[str, list[str]] = {}
    for kind, value in SPAN.findall(re.sub(" +", " ", text)):
        found.setdefault(kind, []).append(TAG.sub("", value) if clean else value)
    return found


def slot_type_f1(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Mean over utterances of the F1 of the set of slot types; 1 where neither text has a slot.

    >>> slot_type_f1(["B-a X E-a B-b Y E-b"], ["B-a Z E-a"]) == 2 / 3
    True
    """
    _same_length("slot_type_f1", references, hypotheses)
    values = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        truth, guess = set(slots(reference)), set(slots(hypothesis))
        # 2 P R / (P + R) with P and R the shares of common types is twice the common ones over the sum of both sizes
        values.append(2 * len(truth & guess) / (len(truth) + len(guess)) if truth or guess else 1.0)
    return sum(values) / len(values)


def slot_value_cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character edits over characters of all reference slot values.

    Each reference value is matched with the hypothesis value of its type that has the least error rate, or with nothing.

    >>> slot_value_cer(["B-a XYZ E-a"], ["B-a XYQ E-a"]) == 1 / 3
    True
    """
    return _value_error_rate("slot_value_cer", references, hypotheses, lambda text: text)


def slot_value_wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word edits over words of all reference slot values, matched as in `slot_value_cer`.

    >>> slot_value_wer(["B-a X Y E-a"], ["B-a X E-a B-b Y E-b"])
    0.5
    """
    return _value_error_rate("slot_value_wer", references, hypotheses, str.split)


def _value_error_rate(
    what: str, references: Sequence[str], hypotheses: Sequence[str], tokens: Callable[[str], Sequence[Any]]
) -> float:
    _same_length(what, references, hypotheses)
    truths: list[Sequence[Any]] = []
    guesses: list[Sequence[Any]] = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said = slots(hypothesis, clean=True)
        for kind, values in slots(reference).items():
            candidates = [tokens(value) for value in said.get(kind, [""])]
            for value in map(tokens, values):
                truths.append(value)
                guesses.append(min(candidates, key=lambda candidate: edit_distance(value, candidate)))
    if not truths:
        raise UndefinedMetric(f"{what}: none of the {len(references)} references has a slot value")
    return token_error_rate(what, truths, guesses)
