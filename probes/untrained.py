"""Tasks without a probe: a spoken query is looked for in documents, layer by layer, and nothing is trained (QbE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch, Fold, Head, LabelSet, Prediction, Score, Split, Task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import RequestError
from superb_probe.probes.batches import evaluation_batches
from superb_probe.probes.dtw import DISTANCES, hold_last, search, unit_frames
from superb_probe.probes.fit import FitResult, Progress
from superb_probe.probes.plan import Trial
from superb_probe.probes.runner import selecting
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.upstreams.base import UpstreamInfo

QUERY, DOCUMENT = "query", "document"
LEAST_DEVIATION = 1e-9
BATCH_FLOATS = 2**25  # padded states of one batch of documents: 128 MiB in float32
HEAD_OPTIONS = ("distance",)


class SubsequenceDtw(Head):
    """How queries are looked for; it has no parameters and is never called as a module.

    Attributes:
        distance: between frames: "cosine_exp" or "cosine".
    """

    def __init__(self, distance: str = "cosine_exp") -> None:
        """`distance` is one of `probes.dtw.DISTANCES`."""
        super().__init__()
        if distance not in DISTANCES:
            raise RequestError(f"unknown distance {distance!r}. Fix: one of {', '.join(DISTANCES)}")
        self.distance = distance

    def forward(self, frames: Tensor, num_frames: Tensor) -> NoReturn:
        """Not called: whole splits are searched at once by `score_untrained`."""
        raise NotImplementedError("SubsequenceDtw searches whole splits: probes.untrained.score_untrained")

    def loss(self, outputs: Any, batch: Batch) -> NoReturn:
        """Not called: nothing is trained."""
        raise NotImplementedError("SubsequenceDtw has nothing to train")

    def predict(self, outputs: Any) -> NoReturn:
        """Not called: whole splits are searched at once by `score_untrained`."""
        raise NotImplementedError("SubsequenceDtw searches whole splits: probes.untrained.score_untrained")


def score_untrained(
    trials: Sequence[Trial],
    task: Task,
    fold: Fold,
    labels: LabelSet,
    stores: Mapping[str, FeatureStore],
    info: UpstreamInfo,
    *,
    select_on: Split = "dev",
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> list[FitResult]:
    """The scores of all layers in one pass over the states; which layer counts is chosen on dev by whoever reads the results.

    Args:
        trials: one a layer; their head options are the same.
        task: the task, whose predictions are, by query, the scores (documents,) in the order of the manifest.
        fold: manifests of the selecting split and of test, with the label "role": "query" or "document".
        labels: what `task.labels` gave.
        stores: frame states of each split.
        info: of the upstream.
        select_on: the split that chooses the layer.
        device: where to search; None for the CPU.
        progress: called with the trials done since the last call.

    Returns:
        One result a trial, in the given order: update 0, the metric on the selecting split, the score on test.
    """
    device = device or torch.device("cpu")
    layers = [trial.layer for trial in trials]
    if any(layer is None for layer in layers):
        raise ValueError("a task without a probe reads single layers: plan one trial a layer")
    options = {name: value for name, value in trials[0].head_options.items() if name in HEAD_OPTIONS}
    head = task.head(info.dim, labels, options)
    assert isinstance(head, SubsequenceDtw)
    found: dict[str, dict[str, Tensor]] = {}
    for split in dict.fromkeys((str(select_on), "test")):
        states = States(stores[split], fold.manifests[split].ids, None, device)
        found[split] = search_split(states, fold.manifests[split], head.distance)
    results = []
    for trial in trials:
        assert trial.layer is not None
        selected = task.score(_of_layer(found[str(select_on)], trial.layer), fold, select_on)
        score = task.tuned_by(selected).score(_of_layer(found["test"], trial.layer), fold, "test")
        results.append(_result(trial, selected, score))
        if progress is not None:
            progress(1)
    return results


def search_split(states: States, manifest: Manifest, distance: str = "cosine_exp") -> dict[str, Tensor]:
    """By query, the scores (L, documents) of all documents of a split, in the order of the manifest.

    Every dimension is standardised first, over all frames of queries and documents together, as s3prl does.
    """
    rows = {role: [n for n, u in enumerate(manifest) if u.labels["role"] == role] for role in (QUERY, DOCUMENT)}
    lengths = [states.num_frames[row] for row in rows[DOCUMENT]]
    one = states.batch([0])[0]
    room = max(1, BATCH_FLOATS // (one.shape[0] * one.shape[3]))
    batches = [[rows[DOCUMENT][number] for number in batch] for batch in evaluation_batches(lengths, room)]
    place = {row: number for number, row in enumerate(rows[DOCUMENT])}
    with torch.inference_mode():
        mean, deviation = standardisation(states, [[row] for row in rows[QUERY]] + batches)
        queries = [unit_frames((states.batch([row])[0][:, 0] - mean) / deviation) for row in rows[QUERY]]
        scores = [torch.empty(one.shape[0], len(place), dtype=torch.float64) for _ in queries]
        for batch in batches:
            documents, num_frames = states.batch(batch)
            documents = hold_last(unit_frames((documents - mean[:, None]) / deviation[:, None]), num_frames)
            columns = [place[row] for row in batch]
            for query, scored in zip(queries, scores, strict=True):
                scored[:, columns] = search(query, documents, distance).double().cpu()
    return {manifest[row].id: scored for row, scored in zip(rows[QUERY], scores, strict=True)}


def standardisation(states: States, batches: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(L, 1, D) mean and standard deviation (of a sample, 1e-9 at least) of every dimension over all frames."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        frames, num_frames = states.batch(batch)  # zero past each row's end, so sums may run over all
        count += int(num_frames.sum())
        total = total.to(frames.device) + frames.double().sum((1, 2))
        squares = squares.to(frames.device) + frames.double().square().sum((1, 2))
    mean = total / count
    variance = (squares - count * mean.square()) / max(1, count - 1)
    deviation = variance.clamp(min=0.0).sqrt().clamp(min=LEAST_DEVIATION)
    return mean[:, None].float(), deviation[:, None].float()


def _of_layer(found: Mapping[str, Tensor], layer: int) -> dict[str, Prediction]:
    return {name: np.asarray(scores[layer]) for name, scores in found.items()}


def _result(trial: Trial, selected: Score, score: Score) -> FitResult:
    return FitResult(
        trial=trial,
        error=None,
        step=0,
        selected=selecting(selected),
        score=score,
        curve=((0, selecting(selected)),),
        layer_weights=None,
        weights={},
        trainable_params=0,
    )
