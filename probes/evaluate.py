"""Scores of several trials on one split: each batch of states is read and mixed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from superb_probe.downstreams.base import Fold, Prediction, Score, Split
from superb_probe.probes.batches import evaluation_batches
from superb_probe.probes.runner import Runner
from superb_probe.probes.states import States
from superb_probe.probes.weighted_sum import Mixer, mix

EVALUATION_FLOATS = 2**26  # padded states of one evaluation batch: 256 MiB in float32


def evaluate(runners: Sequence[Runner], mixer: Mixer, fold: Fold, states: States, split: Split) -> list[Score | None]:
    """The score of every trial on one split; None where its outputs are not finite.

    Args:
        runners: the trials.
        mixer: their mixtures of layers, in the same order.
        fold: what is scored.
        states: of the split.
        split: its name.
    """
    if not runners:
        return []
    predictions: list[dict[str, Prediction]] = [{} for _ in runners]
    with torch.inference_mode():
        mixture = mixer.mixture()
        num_layers, width = mixture.shape[1], states.batch([0])[0].shape[3]
        for runner in runners:
            runner.probe.eval()
        room = max(1, EVALUATION_FLOATS // (max(num_layers, len(runners)) * width))
        for rows in evaluation_batches(states.num_frames, room):
            layers, num_frames = states.batch(rows)
            for runner, predicted, frames in zip(runners, predictions, mix(mixture, layers), strict=True):
                outputs = runner.probe.head(frames, num_frames)
                for row, prediction in zip(rows, runner.probe.head.predict(outputs), strict=True):
                    predicted[states.ids[row]] = prediction
    return [
        runner.task.score(predicted, fold, split) if finite(predicted) else None
        for runner, predicted in zip(runners, predictions, strict=True)
    ]


def finite(predictions: Mapping[str, Prediction]) -> bool:
    """Whether all predictions that are arrays of real numbers are finite."""
    arrays = [value for value in predictions.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return all(np.isfinite(array).all() for array in arrays)
