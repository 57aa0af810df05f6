"""Discrete units: k-means on the frames of a layer, and how well its clusters tell phones apart.

The measures are HuBERT's (Hsu et al., arXiv:2106.07447, 4.4): phone purity, cluster purity and the mutual information of phone and
unit over the entropy of the phones (PNMI), all from one table of counts. The k-means is fairseq's (`learn_kmeans.py`), whose
settings the Mamba-HuBERT paper keeps: scikit-learn's MiniBatchKMeans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superb_probe.errors import RequestError


@dataclass(frozen=True, slots=True)
class KMeansSettings:
    """How clusters are found: parameters of MiniBatchKMeans.

    Attributes:
        n_init: initialisations of k-means++, of which the best begins.
        batch_size: frames of an update.
        max_iter: passes over the frames at most.
        max_no_improvement: updates without improvement after which it ends.
        max_frames: frames it is trained on, drawn at random; None for all.
    """

    n_init: int = 20
    batch_size: int = 10_000
    max_iter: int = 100
    max_no_improvement: int = 100
    max_frames: int | None = None


# "full" are fairseq's and the paper's; "small" are for minutes of speech and two cores, and never stand in one figure with them.
BUDGETS = {"full": KMeansSettings(), "small": KMeansSettings(1, 4096, 20, 10, 20_000)}


def fit_clusters(
    frames: NDArray[np.float32], num_clusters: int, seed: int, settings: KMeansSettings | None = None
) -> NDArray[np.float32]:
    """(K, D) centres of the clusters of frames.

    Args:
        frames: (N, D).
        num_clusters: K.
        seed: of the initialisation, the batches and the subset.
        settings: `BUDGETS["full"]` where None.

    Raises:
        RequestError: for fewer frames than clusters, or frames that are not finite.

    >>> fit_clusters(np.array([[0.0], [0.0], [9.0], [9.0]], dtype=np.float32), 2, 0).round().ravel().tolist() in ([0, 9], [9, 0])
    True
    """
    from sklearn.cluster import MiniBatchKMeans

    settings = settings or BUDGETS["full"]
    if len(frames) < num_clusters:
        raise RequestError(f"{len(frames)} frames for {num_clusters} clusters. Fix: more speech, or fewer --clusters.")
    if not np.isfinite(frames).all():
        raise RequestError("k-means: frames that are not finite. Fix: `superb-probe check upstream` finds the layer.")
    generator = np.random.default_rng([seed, num_clusters])
    if settings.max_frames is not None and len(frames) > settings.max_frames:
        frames = frames[np.sort(generator.permutation(len(frames))[: settings.max_frames])]
    model = MiniBatchKMeans(
        n_clusters=num_clusters,
        init="k-means++",
        n_init=settings.n_init,
        batch_size=settings.batch_size,
        max_iter=settings.max_iter,
        max_no_improvement=settings.max_no_improvement,
        tol=0.0,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    return np.asarray(model.fit(np.ascontiguousarray(frames)).cluster_centers_, dtype=np.float32)


def assign_units(frames: NDArray[np.float32], centres: NDArray[np.float32], block: int = 8192) -> NDArray[np.int64]:
    """(N,) the nearest centre of every frame.

    >>> assign_units(np.array([[0.2], [7.0]], dtype=np.float32), np.array([[0.0], [9.0]], dtype=np.float32)).tolist()
    [0, 1]
    """
    half_norms = 0.5 * np.square(centres).sum(1)
    found = [np.argmin(half_norms - frames[at : at + block] @ centres.T, axis=1) for at in range(0, len(frames), block)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def count_pairs(
    units: NDArray[np.int64], phones: NDArray[np.int64], num_units: int, num_phones: int
) -> NDArray[np.int64]:
    """(K, P) in how many frames each unit meets each phone; frames whose phone is negative are not counted.

    >>> count_pairs(np.array([0, 0, 1]), np.array([1, -1, 0]), 2, 2).tolist()
    [[0, 1], [1, 0]]
    """
    known = phones >= 0
    flat = np.bincount(units[known] * num_phones + phones[known], minlength=num_units * num_phones)
    return flat.reshape(num_units, num_phones)


@dataclass(frozen=True, slots=True)
class UnitQuality:
    """How well units tell phones apart; all from 0 to 1.

    Attributes:
        phone_purity: the share of frames that the commonest phone of their unit names rightly.
        cluster_purity: the share of frames in the commonest unit of their phone; falls when a phone has many units.
        pnmi: what the unit tells of the phone, in shares of the phone's entropy.
    """

    phone_purity: float
    cluster_purity: float
    pnmi: float


def quality(counts: NDArray[Any]) -> UnitQuality:
    """Purities and PNMI from counts (K, P) of frames.

    >>> quality(np.array([[2, 0], [0, 2]]))
    UnitQuality(phone_purity=1.0, cluster_purity=1.0, pnmi=1.0)
    >>> quality(np.array([[1, 1], [1, 1]]))
    UnitQuality(phone_purity=0.5, cluster_purity=0.5, pnmi=0.0)
    """
    total = counts.sum()
    if total <= 0:
        raise RequestError("no frame has a phone. Fix: alignments of these utterances (--alignment).")
    joint = np.asarray(counts, dtype=np.float64) / total
    phones, units = joint.sum(0), joint.sum(1)
    information = entropy(phones) + entropy(units) - entropy(joint)
    of_phones = entropy(phones)
    pnmi = information / of_phones if of_phones > 0 else 0.0
    return UnitQuality(float(joint.max(1).sum()), float(joint.max(0).sum()), float(max(pnmi, 0.0)))


def entropy(shares: NDArray[np.float64]) -> float:
    """Entropy in bits of shares of any shape that sum to 1.

    >>> entropy(np.array([0.5, 0.25, 0.25]))
    1.5
    """
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def deduplicated(units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Units without immediate repetitions.

    >>> deduplicated(np.array([3, 3, 1, 1, 3])).tolist()
    [3, 1, 3]
    """
    if not len(units):
        return units
    kept: NDArray[np.int64] = units[np.concatenate([[True], units[1:] != units[:-1]])]
    return kept


@dataclass(frozen=True, slots=True)
class Bitrate:
    """How much a stream of units says: symbols a second times the entropy of a symbol (ZeroSpeech 2019, Dunbar et al.).

    Attributes:
        units_per_s: symbols a second after repetitions are dropped.
        bits_per_s: their bitrate.
        frame_bits_per_s: with a symbol a frame.
    """

    units_per_s: float
    bits_per_s: float
    frame_bits_per_s: float


def bitrate(utterances: Iterable[NDArray[np.int64]], duration_s: float) -> Bitrate:
    """The bitrate of utterances' units (one a frame) that last `duration_s` together.

    >>> bitrate([np.array([0, 0, 1, 1])], 1.0)
    Bitrate(units_per_s=2.0, bits_per_s=2.0, frame_bits_per_s=4.0)
    """
    every = list(utterances)
    frames = np.concatenate(every)
    kept = np.concatenate([deduplicated(units) for units in every])

    def bits(units: NDArray[np.int64]) -> float:
        _, counts = np.unique(units, return_counts=True)
        return len(units) * entropy(counts / counts.sum()) / duration_s

    return Bitrate(len(kept) / duration_s, bits(kept), bits(frames))


def edit_rates(
    clean: Sequence[NDArray[np.int64]], changed: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edits between the units of the same utterances, clean and changed, both without repetitions, and the clean ones' number.

    Their sums' quotient is the unit edit distance of Gat et al. (arXiv:2209.15483), over units rather than over frames. A code of
    one unit alone has distance 0: read it beside the bitrate.

    >>> edit_rates([np.array([1, 1, 2])], [np.array([1, 3])])
    (array([1]), array([2]))
    """
    from rapidfuzz.distance import Levenshtein

    pairs = [(deduplicated(a).tolist(), deduplicated(b).tolist()) for a, b in zip(clean, changed, strict=True)]
    edits = np.array([Levenshtein.distance(a, b) for a, b in pairs], dtype=np.int64)
    return edits, np.array([len(a) for a, _ in pairs], dtype=np.int64)


def random_units(utterances: Sequence[NDArray[np.int64]], seed: int) -> list[NDArray[np.int64]]:
    """Units that say nothing at the same bitrate: the runs of all utterances, shuffled and cut anew at the same lengths.

    Every unit keeps its number of frames, so the entropy of a frame is the same. Runs keep their lengths, and two of the same unit
    are moved apart where they came to stand together, so that there are as many.

    >>> [each.tolist() for each in random_units([np.array([5, 5]), np.array([5])], 0)]
    [[5, 5], [5]]
    """
    generator = np.random.default_rng([seed, 1])
    runs = [list(group) for units in utterances for _, group in itertools.groupby(units.tolist())]
    runs = [runs[at] for at in generator.permutation(len(runs))]

    def fits(run: list[int], at: int) -> bool:
        return all(runs[near][0] != run[0] for near in (at - 1, at + 1) if 0 <= near < len(runs))

    for at in range(1, len(runs)):
        if runs[at][0] == runs[at - 1][0]:
            for other in generator.integers(0, len(runs), 50).tolist():
                if abs(other - at) > 1 and fits(runs[at], other) and fits(runs[other], at):
                    runs[at], runs[other] = runs[other], runs[at]
                    break
    shuffled = np.array([unit for run in runs for unit in run], dtype=np.int64)
    ends = np.cumsum([len(units) for units in utterances])
    return np.split(shuffled, ends[:-1])


def speaker_information(
    units: NDArray[np.int64], phones: NDArray[np.int64], speakers: NDArray[np.int64], shuffles: int, seed: int
) -> tuple[float, float]:
    """I(unit; speaker | phone) in shares of H(speaker | phone), and the same with speakers shuffled within phones.

    Counts of few frames make any information look larger than it is; the shuffled value is that bias, so the difference counts.

    Args:
        units: (N,).
        phones: (N,), negative where unknown.
        speakers: (N,).
        shuffles: how many shufflings are averaged.
        seed: of the shufflings.
    """
    known = phones >= 0
    units, phones, speakers = units[known], phones[known], speakers[known]
    found = _conditional_share(units, phones, speakers)
    generator = np.random.default_rng(seed)
    order = np.argsort(phones, kind="stable")
    units, phones, speakers = units[order], phones[order], speakers[order]
    edges = np.flatnonzero(np.diff(phones)) + 1
    floors = []
    for _ in range(shuffles):
        mixed = np.concatenate([generator.permutation(part) for part in np.split(speakers, edges)])
        floors.append(_conditional_share(units, phones, mixed))
    return found, float(np.mean(floors)) if floors else 0.0


def _conditional_share(units: NDArray[np.int64], phones: NDArray[np.int64], speakers: NDArray[np.int64]) -> float:
    def joint_entropy(*columns: NDArray[np.int64]) -> float:
        code = np.zeros(len(phones), dtype=np.int64)
        for column in columns:
            code = code * (int(column.max()) + 1) + column
        _, counts = np.unique(code, return_counts=True)
        return entropy(counts / counts.sum())

    of_phone, of_both = joint_entropy(phones), joint_entropy(phones, speakers)
    speaker_given_phone = of_both - of_phone
    given_unit_too = joint_entropy(phones, units, speakers) - joint_entropy(phones, units)
    return (speaker_given_phone - given_unit_too) / speaker_given_phone if speaker_given_phone > 1e-12 else 0.0


def settings_as_dict(settings: KMeansSettings) -> Mapping[str, Any]:
    """The settings as a record keeps them, with those that never change."""
    fixed = {"algorithm": "sklearn MiniBatchKMeans", "init": "k-means++", "tol": 0.0, "reassignment_ratio": 0.0}
    return {**fixed, **asdict(settings)}
