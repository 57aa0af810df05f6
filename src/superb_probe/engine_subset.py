"""Parts of a fold: the first utterances (--limit), a seeded subset (--tier quick), a spread sample (to time things)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.manifest import Manifest, Trials
from superb_probe.errors import RequestError

QUICK_SIZES: Mapping[str, int] = {"train": 2000, "dev": 500, "test": 500}
QUICK_SEED = 0


def limited(fold: Fold, limit: int) -> Fold:
    """The first `limit` utterances of each split, and the trials among them.

    Raises:
        RequestError: if no trial of one kind is left.
    """
    manifests = {split: manifest[:limit] for split, manifest in fold.manifests.items()}
    trials = {split: _among(pairs, manifests[split].ids) for split, pairs in fold.trials.items()}
    empty = [split for split, pairs in trials.items() if len(set(pairs.labels.tolist())) < 2]
    if empty:
        raise RequestError(
            f"--limit {limit} leaves no same-speaker or no different-speaker trial in {empty[0]}. Fix: a larger limit"
        )
    return replace(fold, manifests=manifests, trials=trials)


def quick(fold: Fold) -> Fold:
    """A seeded subset of each split: the same utterances wherever and whenever it is drawn, in the manifest's order."""
    return _subset(fold, lambda split, manifest: drawn(manifest, QUICK_SIZES.get(split, len(manifest)), QUICK_SEED))


def drawn(manifest: Manifest, count: int, seed: int) -> list[str]:
    """The ids of `count` utterances, by the order of a seeded hash of their ids."""
    ranked = sorted(manifest.ids, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return ranked[:count]


def spread(fold: Fold, sizes: Mapping[str, int]) -> Fold:
    """So many utterances of each split, from the shortest to the longest in even steps: it is as a sample that they are used.

    Trials stay as they are where their utterances do; some of each kind always do.
    """
    kept = {split: even_ids(manifest, sizes.get(split, len(manifest))) for split, manifest in fold.manifests.items()}
    for split, pairs in fold.trials.items():
        for kind in (0, 1):
            rows = [row for row, label in enumerate(pairs.labels.tolist()) if label == kind][
                : max(1, sizes.get(split, 1))
            ]
            kept[split] += [name for row in rows for name in (pairs.ids_a[row], pairs.ids_b[row])]
    return _subset(fold, lambda split, manifest: kept[split])


def even_ids(manifest: Manifest, count: int) -> list[str]:
    """The ids of at most `count` utterances in even steps over their durations."""
    ranked = sorted(manifest, key=lambda utterance: (utterance.duration_s, utterance.id))
    count = min(count, len(ranked))
    return [ranked[(2 * step + 1) * len(ranked) // (2 * count)].id for step in range(count)]


def _subset(fold: Fold, choose: Callable[[str, Manifest], Sequence[str]]) -> Fold:
    manifests = {}
    for split, manifest in fold.manifests.items():
        wanted = set(choose(split, manifest))
        manifests[split] = manifest.keep([name for name in manifest.ids if name in wanted])
    trials = {split: _among(pairs, manifests[split].ids) for split, pairs in fold.trials.items()}
    return replace(fold, manifests=manifests, trials=trials)


def _among(pairs: Trials, ids: Sequence[str]) -> Trials:
    known = set(ids)
    columns = zip(pairs.labels.tolist(), pairs.ids_a, pairs.ids_b, strict=True)
    kept = [(label, a, b) for label, a, b in columns if a in known and b in known]
    return Trials.of([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])
