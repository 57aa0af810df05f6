"""The metrics of every task, as fractions of one: equal to s3prl's values, with clear errors instead of NaN.

A metric that its data leave undefined (one class only, no reference token) raises `UndefinedMetric`; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rapidfuzz.distance import Levenshtein

from superb_probe.errors import RequestError

Floats = NDArray[np.float64]
SPAN = re.compile(r"B-(\S+) (.+?) E-\1")  # a slot: the shortest stretch between tags of one type
# MediaEval QUESST 2014 (Anguera et al.): prior of a target 0.0008, a miss costs 100 false alarms. The scoring script of the year
# after, score-TWV-Cnxe.sh of QUESST 2015, has the same three numbers (effective prior 0.0741289); that of 2014 was not at hand.
TWV_PRIOR, TWV_COST_MISS, TWV_COST_FALSE_ALARM = 0.0008, 100.0, 1.0
TWV_BETA = TWV_COST_FALSE_ALARM / TWV_COST_MISS * (1 / TWV_PRIOR - 1)  # 12.49
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


def detection_counts(
    labels: Sequence[ArrayLike], scores: Sequence[ArrayLike]
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """What each query of a search accepts, at every threshold at which a term-weighted value can be largest.

    Between two scores of targets a lower threshold only adds false alarms, so the scores of targets are all that matter. Queries
    that occur nowhere have no miss rate; they take no part (NIST STD 2006 evaluation plan, section 3).

    Args:
        labels: by query, (documents,) 1 where it occurs, 0 elsewhere.
        scores: by query, (documents,) higher means more alike.

    Returns:
        (K,) thresholds, falling, and hits and false alarms (queries, K) of scores at or above them; a query that occurs nowhere
        has zeros.

    >>> detection_counts([[1, 0, 0]], [[0.5, 0.9, 0.1]])
    (array([0.5]), array([[1]]), array([[1]]))
    """
    _same_length("detections", labels, scores)
    targets, others = [], []
    for number, (truth, score) in enumerate(zip(labels, scores, strict=True)):
        truth, score = np.asarray(truth), np.asarray(score, dtype=np.float64)
        if truth.shape != score.shape or truth.ndim != 1 or not np.isin(truth, (0, 1)).all():
            raise RequestError(f"detections: query {number} has labels {truth.shape} (0 or 1), scores {score.shape}")
        if not np.isfinite(score).all():
            raise RequestError(f"detections: query {number} has scores that are not finite")
        occurs = bool((truth == 1).any())
        targets.append(np.sort(score[truth == 1]))
        others.append(np.sort(score[(truth == 0) & occurs]))
    thresholds = np.unique(np.concatenate(targets))[::-1]
    if len(thresholds) == 0:
        raise UndefinedMetric(f"detections: none of the {len(labels)} queries occurs in a document")
    hits, false_alarms = (
        np.stack([len(each) - np.searchsorted(each, thresholds, side="left") for each in kind])
        for kind in (targets, others)
    )
    return thresholds, hits.astype(np.int64), false_alarms.astype(np.int64)


def term_weighted_values(
    hits: ArrayLike, false_alarms: ArrayLike, targets: ArrayLike, others: ArrayLike, *, beta: float = TWV_BETA
) -> Floats:
    """(K,) the term-weighted value at each threshold: 1 - mean over queries of (miss rate + beta x false-alarm rate).

    NIST STD 2006; here a trial is a query and a document, as in MediaEval (Rodriguez-Fuentes and Penagarikano 2013).

    Args:
        hits: (queries, K) of `detection_counts`.
        false_alarms: (queries, K).
        targets: (queries,) documents each occurs in; queries with none take no part.
        others: (queries,) documents it does not occur in.
        beta: (cost of a false alarm / cost of a miss) x (1 / prior - 1).

    >>> float(term_weighted_values([[1]], [[1]], [1], [999])[0].round(4))
    0.9875
    """
    counted, spare = np.asarray(targets, dtype=np.float64), np.asarray(others, dtype=np.float64)
    occurs = counted > 0
    if not occurs.any():
        raise UndefinedMetric(f"term-weighted value: none of the {len(counted)} queries occurs in a document")
    found = np.asarray(hits, dtype=np.float64)[occurs] / counted[occurs, None]
    alarms = np.asarray(false_alarms, dtype=np.float64)[occurs] / np.maximum(spare[occurs, None], 1)
    value: Floats = found.mean(0) - beta * alarms.mean(0)
    return value


def mtwv(labels: Sequence[ArrayLike], scores: Sequence[ArrayLike], *, beta: float = TWV_BETA) -> tuple[float, float]:
    """The maximum term-weighted value over one threshold for all queries, and that threshold (accept at or above it).

    Accepting nothing has the value 0, at the threshold infinity.

    Args:
        labels: by query, (documents,) 1 where it occurs, 0 elsewhere.
        scores: by query, (documents,) higher means more alike.
        beta: weight of false alarms.

    >>> mtwv([[1, 0, 0], [0, 1, 0]], [[2.0, 1.0, 0.0], [0.5, 3.0, 0.1]])
    (1.0, 2.0)
    """
    thresholds, hits, false_alarms = detection_counts(labels, scores)
    targets = [int(np.sum(truth)) for truth in labels]
    others = [len(np.asarray(truth)) - count for truth, count in zip(labels, targets, strict=True)]
    values = term_weighted_values(hits, false_alarms, targets, others, beta=beta)
    best = int(values.argmax())
    return (float(values[best]), float(thresholds[best])) if values[best] > 0 else (0.0, math.inf)


def mean_average_precision(labels: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> float:
    """The mean over queries of the average precision of their ranked documents; equal scores are ranked together.

    Queries that occur nowhere take no part. A document's precision is taken at its score: among all scores at or above it.

    Args:
        labels: by query, (documents,) 1 where it occurs, 0 elsewhere.
        scores: by query, (documents,) higher means more alike.

    >>> mean_average_precision([[1, 0, 1]], [[0.9, 0.5, 0.1]]) == (1 / 1 + 2 / 3) / 2
    True
    """
    _same_length("mean average precision", labels, scores)
    values = []
    for truth, score in zip(labels, scores, strict=True):
        ordered = np.sort(np.asarray(score, dtype=np.float64))
        targets = np.sort(np.asarray(score, dtype=np.float64)[np.asarray(truth) == 1])
        if len(targets):
            hits = len(targets) - np.searchsorted(targets, targets, side="left")
            values.append(float((hits / (len(ordered) - np.searchsorted(ordered, targets, side="left"))).mean()))
    if not values:
        raise UndefinedMetric(f"mean average precision: none of the {len(labels)} queries occurs in a document")
    return sum(values) / len(values)


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


def slot_value_pairs(reference: str, hypothesis: str, tokens: Callable[[str], Sequence[Any]]) -> tuple[int, int]:
    """Edits and reference tokens of the slot values of one utterance; sums over a corpus give its error rate.

    >>> slot_value_pairs("B-a XYZ E-a", "B-a XYQ E-a", list)
    (1, 3)
    """
    pairs = list(_matched_values(reference, hypothesis, tokens))
    return sum(edit_distance(*pair) for pair in pairs), sum(len(value) for value, _ in pairs)


def _matched_values(
    reference: str, hypothesis: str, tokens: Callable[[str], Sequence[Any]]
) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    said = slots(hypothesis, clean=True)
    for kind, values in slots(reference).items():
        candidates = [tokens(value) for value in said.get(kind, [""])]
        for value in map(tokens, values):
            # the same reference length for all candidates, so the least error rate is the least number of edits
            yield value, min(candidates, key=lambda candidate: edit_distance(value, candidate))


def _value_error_rate(
    what: str, references: Sequence[str], hypotheses: Sequence[str], tokens: Callable[[str], Sequence[Any]]
) -> float:
    _same_length(what, references, hypotheses)
    pairs = [
        pair
        for reference, hypothesis in zip(references, hypotheses, strict=True)
        for pair in _matched_values(reference, hypothesis, tokens)
    ]
    if not pairs:
        raise UndefinedMetric(f"{what}: none of the {len(references)} references has a slot value")
    return token_error_rate(what, [value for value, _ in pairs], [guess for _, guess in pairs])
