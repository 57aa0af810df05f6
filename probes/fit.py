"""Training: all learning rates and seeds of one task and fold in one pass over the stored states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Budget, Fold, Head, LabelSet, Prediction, Score, Split, Task
from superb_probe.errors import RequestError
from superb_probe.probes.batches import assemble, collate, crop, evaluation_batches, training_batches
from superb_probe.probes.plan import Trial
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.update import Updater
from superb_probe.probes.weighted_sum import WeightedSum
from superb_probe.upstreams.base import UpstreamInfo

EVALUATION_FLOATS = 2**26  # padded states of one evaluation batch: 256 MiB in float32
Progress = Callable[[int], None]  # called with trial updates done


@dataclass(frozen=True, slots=True)
class FitResult:
    """What came of one trial.

    Attributes:
        trial: which.
        error: why it stopped early (its loss was not finite); None when it finished.
        step: the update whose weights were kept.
        selected: their metric on the selecting split.
        score: on test, with those weights.
        curve: (update, metric on the selecting split) at every evaluation.
        layer_weights: softmax weights of the L layers; None for a single layer.
        weights: tensors of the kept probe, by name.
        trainable_params: numbers trained.
    """

    trial: Trial
    error: str | None
    step: int | None
    selected: float | None
    score: Score | None
    curve: tuple[tuple[int, float], ...]
    layer_weights: tuple[float, ...] | None
    weights: Mapping[str, Tensor]
    trainable_params: int


class Probe(nn.Module):
    """A weighted sum and a head: what one trial trains.

    Attributes:
        weighted_sum: None when a single layer is read.
        head: the task's head.
    """

    def __init__(self, head: Head, num_layers: int | None) -> None:
        """`num_layers` is None when a single layer is read."""
        super().__init__()
        self.weighted_sum = None if num_layers is None else WeightedSum(num_layers)
        self.head = head

    def forward(self, states: Tensor, num_frames: Tensor) -> Any:
        """The head's outputs for states (L, B, T, D), or (1, B, T, D) of a single layer."""
        frames = states[0] if self.weighted_sum is None else self.weighted_sum(states)
        return self.head(frames, num_frames)


@dataclass(slots=True)
class _Runner:
    """One trial in training: its probe, its optimiser, its own stream of random numbers, its best weights so far."""

    trial: Trial
    probe: Probe
    updater: Updater
    random: list[Tensor]
    error: str | None = None
    step: int | None = None
    selected: float | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)

    def keep_if_best(self, step: int, value: float, higher_is_better: bool) -> None:
        """Copy the weights when the metric is better than at every evaluation before."""
        self.curve.append((step, value))
        if self.selected is None or (value > self.selected if higher_is_better else value < self.selected):
            self.step, self.selected = step, value
            self.weights = {name: tensor.detach().clone() for name, tensor in self.probe.state_dict().items()}


class States:
    """The states of one split as a fit reads them.

    View "mean" is one tensor (L, U, 1, D) on the device; "frames" are read from the store a batch at a time.

    Attributes:
        ids: utterance ids.
        num_frames: frames of each.
    """

    def __init__(self, store: FeatureStore, ids: Sequence[str], layer: int | None, device: torch.device) -> None:
        """`layer` is the one layer to read; None for all."""
        self.ids = tuple(ids)
        self._store, self._layer, self._device = store, layer, device
        self.num_frames = [store.num_frames(name) for name in self.ids]
        self._means: Tensor | None = None
        if store.view == "mean":
            self._means = (
                torch.stack([self._layers(store.stored(name)) for name in self.ids], 1).float().to(device)[:, :, None]
            )

    def batch(
        self, rows: Sequence[int], max_frames: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Padded states (L, B, T, D) of some utterances and their frames (B,).

        Args:
            rows: positions in `ids`.
            max_frames: longest random crop; None for whole utterances.
            generator: draws the crops.
        """
        if self._means is not None:
            index = torch.tensor(rows, device=self._device)
            return self._means.index_select(1, index), torch.ones(len(rows), dtype=torch.long, device=self._device)
        parts = [self._layers(self._store.stored(self.ids[row])) for row in rows]
        if max_frames is not None:
            if generator is None:
                raise ValueError("random crops need a generator")
            parts = [crop(part, max_frames, generator) for part in parts]
        states, num_frames = assemble(parts, self._device)
        if self._store.layer_norm:  # zero frames stay zero
            states = nn.functional.layer_norm(states, states.shape[-1:])
        return states, num_frames

    def _layers(self, states: Tensor) -> Tensor:
        return states if self._layer is None else states[self._layer : self._layer + 1]


def fit_trials(
    trials: Sequence[Trial],
    task: Task,
    fold: Fold,
    labels: LabelSet,
    stores: Mapping[str, FeatureStore],
    info: UpstreamInfo,
    budget: Budget,
    *,
    select_on: Split = "dev",
    control: str | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> list[FitResult]:
    """Train all trials of one task and fold in one pass, choose each one's best update, score it once on test.

    Every batch is read and padded once for all learning rates of a seed. Each trial has its own weights, optimiser and random
    numbers, seeded by its seed alone, so that it gives the same result alone and in any company.

    Args:
        trials: differ in learning rate and seed only.
        task: the task.
        fold: manifests and trial lists.
        labels: the classes.
        stores: states of each split.
        info: of the upstream.
        budget: updates, batch, crops and the head's options, the protocol's settings merged in.
        select_on: the split that chooses the update ("test" under SUPERB's own rule for ASV).
        control: "shuffle" trains on targets permuted across utterances; selection and test keep theirs.
        device: where to train; None for the CPU.
        progress: called with the trial updates done since the last call.

    Returns:
        One result a trial, in the given order; one whose loss was not finite has an error and no score.
    """
    device = device or torch.device("cpu")
    layers = {trial.layer for trial in trials}
    if len(layers) != 1:
        raise ValueError(f"trials of one fit read one layer or all, found {layers}")
    layer = layers.pop()
    random_before = _random_state(device)
    try:
        runners = [_start(trial, task, labels, info, budget, device) for trial in trials]
        wanted: set[Split] = {"train", select_on, "test"}
        splits = {str(split): States(stores[split], fold.manifests[split].ids, layer, device) for split in wanted}
        targets = [task.target(utterance, labels) for utterance in fold.manifests["train"]]
        groups = []
        for seed in dict.fromkeys(trial.seed for trial in trials):
            stream = _batches(splits["train"], targets, seed, budget, info, control)
            groups.append((stream, [runner for runner in runners if runner.trial.seed == seed]))
        _train(groups, task, fold, splits, budget, select_on, device, progress)
        finished = [runner for runner in runners if runner.error is None]
        for runner in finished:
            runner.probe.load_state_dict(runner.weights)
        scores = dict(zip(map(id, finished), _evaluate(finished, task, fold, splits["test"], "test"), strict=True))
    finally:
        _set_random_state(random_before, device)
    return [_result(runner, scores.get(id(runner))) for runner in runners]


def _start(
    trial: Trial, task: Task, labels: LabelSet, info: UpstreamInfo, budget: Budget, device: torch.device
) -> _Runner:
    torch.manual_seed(trial.seed)
    head = task.head(info.dim, labels, dict(budget.head))
    probe = Probe(head, info.num_layers if trial.layer is None else None).to(device)
    for module in probe.modules():
        generator = getattr(module, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(trial.seed)
    updater = Updater(probe.parameters(), trial.optimizer, trial.lr, task.info.clip, budget.accumulate)
    return _Runner(trial, probe, updater, _random_state(device))


def _batches(
    states: States,
    targets: Sequence[Mapping[str, Tensor]],
    seed: int,
    budget: Budget,
    info: UpstreamInfo,
    control: str | None,
) -> Iterator[tuple[Tensor, Batch]]:
    """The training batches of one seed, without end: states (L, B, T, D) and targets."""
    order = torch.Generator().manual_seed(seed)
    crops = torch.Generator().manual_seed(seed + 2**32)
    if control == "shuffle":
        mixed = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed + 2**33)).tolist()
        targets = [targets[row] for row in mixed]
    elif control is not None:
        raise RequestError(f"unknown control {control!r}. Fix: shuffle")
    max_frames = None
    if budget.max_crop_s is not None and max(states.num_frames) > 1:
        max_frames = int(budget.max_crop_s * info.sample_rate_hz) // info.hop_samples
    similar = max_frames is None and len(set(states.num_frames)) > 1
    for rows in training_batches(states.num_frames, budget.batch, order, similar=similar):
        frames, num_frames = states.batch(rows, max_frames, crops)
        yield frames, collate([states.ids[row] for row in rows], num_frames, [targets[row] for row in rows])


def _train(
    groups: Sequence[tuple[Iterator[tuple[Tensor, Batch]], list[_Runner]]],
    task: Task,
    fold: Fold,
    splits: Mapping[str, States],
    budget: Budget,
    select_on: Split,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Run all updates; the batches of a seed are drawn once for all its learning rates."""
    for step in range(1, budget.steps + 1):
        for stream, runners in groups:
            for _ in range(budget.accumulate):
                running = [runner for runner in runners if runner.error is None]
                if running:
                    states, batch = next(stream)
                    for runner in running:
                        _learn(runner, states, batch, device)
        running = [runner for _, runners in groups for runner in runners if runner.error is None]
        if progress is not None:
            progress(len(running))
        if not running:
            return
        if step % budget.evaluate_every == 0 or step == budget.steps:
            scores = _evaluate(running, task, fold, splits[select_on], select_on)
            for runner, score in zip(running, scores, strict=True):
                if score is None or not math.isfinite(score.value):
                    runner.error = (
                        f"diverged: outputs on {select_on} are not finite after update {step} at lr {runner.trial.lr:g}"
                    )
                else:
                    runner.keep_if_best(step, score.value, task.info.higher_is_better)


def _learn(runner: _Runner, states: Tensor, batch: Batch, device: torch.device) -> None:
    """One batch of one trial, with the trial's own random numbers."""
    _set_random_state(runner.random, device)
    runner.probe.train()
    loss = runner.probe.head.loss(runner.probe(states, batch.num_frames), batch)
    runner.random = _random_state(device)
    if not math.isfinite(float(loss.detach())):
        runner.error = (
            f"diverged: loss {float(loss.detach())} in update {runner.updater.updates + 1} at lr {runner.trial.lr:g}"
        )
        return
    runner.updater.update(loss)


def _evaluate(runners: Sequence[_Runner], task: Task, fold: Fold, states: States, split: Split) -> list[Score | None]:
    """The score of every trial on one split, each batch of states read once for all; None where outputs are not finite."""
    predictions: list[dict[str, Prediction]] = [{} for _ in runners]
    if not runners:
        return []
    first = states.batch([0])[0]
    with torch.inference_mode():
        for runner in runners:
            runner.probe.eval()
        for rows in evaluation_batches(
            states.num_frames, max(1, EVALUATION_FLOATS // (first.shape[0] * first.shape[3]))
        ):
            frames, num_frames = states.batch(rows)
            for runner, predicted in zip(runners, predictions, strict=True):
                outputs = runner.probe(frames, num_frames)
                for row, prediction in zip(rows, runner.probe.head.predict(outputs), strict=True):
                    predicted[states.ids[row]] = prediction
    return [task.score(predicted, fold, split) if _finite(predicted) else None for predicted in predictions]


def _finite(predictions: Mapping[str, Prediction]) -> bool:
    arrays = [value for value in predictions.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return all(np.isfinite(array).all() for array in arrays)


def _result(runner: _Runner, score: Score | None) -> FitResult:
    if runner.error is None and (score is None or not math.isfinite(score.value)):
        runner.error = "diverged: outputs on test are not finite"
        score = None
    weighted_sum = runner.probe.weighted_sum
    return FitResult(
        trial=runner.trial,
        error=runner.error,
        step=runner.step if runner.error is None else None,
        selected=runner.selected if runner.error is None else None,
        score=score,
        curve=tuple(runner.curve),
        layer_weights=None if weighted_sum is None or runner.error else tuple(weighted_sum.mixture().tolist()),
        weights={name: tensor.cpu() for name, tensor in runner.weights.items()},
        trainable_params=sum(parameter.numel() for parameter in runner.updater.parameters),
    )


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
