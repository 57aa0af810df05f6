"""What the tasks share: checks of options and predictions, clusters of items, deviations that all protocols have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from superb_probe.downstreams.base import Fold, TaskInfo
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import read_splits
from superb_probe.errors import RequestError, nearest
from superb_probe.probes.metrics import UndefinedMetric

SUPERB_CITATION = (
    "Yang et al., SUPERB: Speech processing Universal PERformance Benchmark, Interspeech 2021 (arXiv:2105.01051)"
)

# What still differs from s3prl's code in every task trained here.
STATES_ALONE = (
    "states are computed for each utterance alone: s3prl's training batches are padded before the encoder, whose group "
    "normalisation hears the padding"
)
PADDED_STATES = "states of s3prl's padded batches: an utterance's depend on the batch it is in (--padding s3prl)"
COMMON_DEVIATIONS = (
    STATES_ALONE,
    "random draws (initial values, order, dropout) come from this project's generators",
)


def check_options(task: str, options: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """The options of a head as a dictionary; one the head does not have is an error that names the nearest.

    >>> check_options("ic", {"width": 128}, ["width"])
    {'width': 128}
    """
    chosen = dict(options or {})
    for name in chosen:
        if name not in known:
            close = nearest(name, known)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise RequestError(f"{task}: its head has no option {name!r}.{hint} Fix: one of {', '.join(known)}.")
    return chosen


def choose_head(info: TaskInfo, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The name of the head that some options ask for with "head" (the task's first without it), and the other options.

    Raises:
        RequestError: for a head the task does not have.
    """
    rest = dict(options or {})
    name = rest.pop("head", info.heads[0])
    if name not in info.heads:
        raise RequestError(f"{info.name} has no head {name!r}. Fix: --head with one of {', '.join(info.heads)}")
    return name, rest


def check_predictions(task: str, predictions: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse to score a split with predictions missing or to spare."""
    missing = [name for name in manifest.ids if name not in predictions]
    spare = sorted(set(predictions) - set(manifest.ids))
    if missing or spare:
        raise RequestError(
            f"{task}: {manifest.name} has {len(manifest)} utterances; {len(missing)} have no prediction "
            f"({', '.join(missing[:3])}), {len(spare)} predictions are of no utterance ({', '.join(spare[:3])}). "
            "Fix: predict every utterance of the split and no other."
        )


def clusters(manifest: Manifest) -> list[str]:
    """Which utterances belong together for an interval: the speaker where known, else the utterance by itself."""
    return [utterance.labels.get("speaker", "") or utterance.id for utterance in manifest]


def total(items: Mapping[str, Any], column: str) -> float:
    """The sum of an item column."""
    return float(np.asarray(items[column], dtype=np.float64).sum())


def rate(items: Mapping[str, Any], errors: str, tokens: str) -> float:
    """An error rate over (resampled) items, in percent: errors over reference tokens, both summed.

    >>> rate({"edits": [1, 0], "words": [2, 2]}, "edits", "words")
    25.0
    """
    reference = total(items, tokens)
    if reference == 0:
        raise UndefinedMetric(f"the references hold no {tokens}")
    return 100.0 * total(items, errors) / reference


def mini_fold(root: Path, stem: str) -> Fold:
    """The fold of the embedded corpus, or of a folder laid out like it; its class lists are the protocol's own."""
    return Fold(
        None, {split: own_corpus(manifest, "mini") for split, manifest in read_splits(Path(root), stem).items()}
    )


def own_corpus(manifest: Manifest, corpus: str) -> Manifest:
    """The same manifest, marked as a split of a named corpus."""
    return Manifest(tuple(manifest), manifest.root, manifest.name, corpus=corpus)


def with_notes(fold: Fold, *notes: str) -> Fold:
    """The fold with more notes."""
    return replace(fold, notes=(*fold.notes, *notes))
