"""Training: all trials of one task and fold in one pass over the stored states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.downstreams.base import Budget, Fold, FrameGrid, LabelSet, Score, Split, Task
from superb_probe.probes.draws import Composed, Draws
from superb_probe.probes.evaluate import evaluate
from superb_probe.probes.plan import Trial
from superb_probe.probes.runner import Probe, Runner, random_state, selecting, set_random_state
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.training import Company, make_company
from superb_probe.upstreams.base import UpstreamInfo

HOPELESS_AFTER = 0.25  # of the updates, before a trial can be given up
Progress = Callable[[int], None]  # called with trial updates done


@dataclass(frozen=True, slots=True)
class FitResult:
    """What came of one trial.

    Attributes:
        trial: which.
        error: why it failed (its loss was not finite); None when it did not.
        step: the update whose weights were kept.
        selected: their metric on the selecting split.
        score: on test, with those weights.
        curve: (update, metric on the selecting split) at every evaluation.
        layer_weights: softmax weights of the L layers; None for a single layer.
        weights: tensors of the kept probe, by name.
        trainable_params: numbers trained.
        stopped: the update after which it was given up as hopeless; None if it was not.
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
    stopped: int | None = None


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
    stop_hopeless: bool = False,
    composed: bool = False,
) -> list[FitResult]:
    """Train all trials of one task and fold in one pass, choose each one's best update, score it once on test.

    Every batch is read and padded once for all trials of a seed. Each trial has its own weights, optimiser and random numbers,
    seeded by its seed alone, so that it gives the same result alone and in any company, to rounding.

    Args:
        trials: differ in learning rate, seed and layer only.
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
        stop_hopeless: give a trial up when, after a quarter of the updates, its best is still worse than what another one of
            its seed and layer had at the first evaluation.
        composed: put training batches together as s3prl does (`TaskInfo.s3prl_batches`).

    Returns:
        One result a trial, in the given order; one whose loss was not finite has an error and no score.
    """
    device = device or torch.device("cpu")
    only = _only_layer(trials)
    num_layers = info.num_layers if only is None else 1
    seeds = dict.fromkeys(trial.seed for trial in trials)
    random_before = random_state(device)
    try:
        wanted: set[Split] = {"train", select_on, "test"}
        splits = {str(split): States(stores[split], fold.manifests[split].ids, only, device) for split in wanted}
        task = task.bind(fold, _frame_grid(splits.values(), info))
        runners = [_start(trial, task, labels, info, budget, device) for trial in trials]
        targets = [task.target(utterance, labels) for utterance in fold.manifests["train"]]
        batches = _composed(task, fold, info) if composed else None
        draws = {seed: Draws(splits["train"], targets, seed, budget, info, control, batches) for seed in seeds}
        company = make_company(runners, draws, splits["train"], num_layers, budget, task.info.clip)
        _train(company, fold, splits[select_on], budget, select_on, progress, stop_hopeless)
        scores = _test(company, fold, splits["test"])
    finally:
        set_random_state(random_before, device)
    return [_result(runner, scores.get(id(runner))) for runner in runners]


def _only_layer(trials: Sequence[Trial]) -> int | None:
    """The layer that all trials read; None where they read several or the weighted sum."""
    layers = {trial.layer for trial in trials}
    return layers.pop() if len(layers) == 1 else None


def _frame_grid(splits: Iterable[States], info: UpstreamInfo) -> FrameGrid:
    """How many frames each utterance has, and where they are."""
    frames = {name: count for each in splits for name, count in zip(each.ids, each.num_frames, strict=True)}
    return FrameGrid(info.hop_samples, info.sample_rate_hz, frames)


def _composed(task: Task, fold: Fold, info: UpstreamInfo) -> Composed:
    rate = info.sample_rate_hz
    return Composed(task.info.s3prl_batches.train, [round(u.duration_s * rate) for u in fold.manifests["train"]])


def _start(
    trial: Trial, task: Task, labels: LabelSet, info: UpstreamInfo, budget: Budget, device: torch.device
) -> Runner:
    torch.manual_seed(trial.seed)
    head = task.head(info.dim, labels, dict(budget.head))
    probe = Probe(head, info.num_layers if trial.layer is None else None).to(device)
    for module in probe.modules():
        generator = getattr(module, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(trial.seed)
    trained = sum(parameter.numel() for parameter in probe.parameters() if parameter.requires_grad)
    return Runner(trial, task, probe, random_state(device), trained)


def _train(
    company: Company,
    fold: Fold,
    states: States,
    budget: Budget,
    select_on: Split,
    progress: Progress | None,
    stop_hopeless: bool,
) -> None:
    """Run all updates, and evaluate as often as the budget says; the host looks in every `stride` updates."""
    step = 0
    while step < budget.steps:
        evaluation = min((step // budget.evaluate_every + 1) * budget.evaluate_every, budget.steps)
        count = min(company.stride, evaluation - step)
        company.learn(count)
        company.look()
        step += count
        running = company.running()
        if progress is not None:
            progress(count * len(running))
        if not running:
            return
        if step == evaluation:
            _select(company, running, step, fold, states, select_on)
            if stop_hopeless and step >= HOPELESS_AFTER * budget.steps:
                for number in hopeless(company.runners):
                    company.runners[number].stopped = step
                    company.stop(number)


def _select(company: Company, running: Sequence[int], step: int, fold: Fold, states: States, select_on: Split) -> None:
    """Evaluate the running trials and keep what is best so far."""
    runners = [company.runners[number] for number in running]
    scores = evaluate(runners, company.mixer.part(running), fold, states, select_on)
    for number, runner, score in zip(running, runners, scores, strict=True):
        if score is None or not math.isfinite(selecting(score)):
            rate = f"lr {runner.trial.lr:g}"
            runner.error = f"diverged: outputs on {select_on} are not finite after update {step} at {rate}"
            company.stop(number)
        else:
            runner.keep_if_best(step, score, runner.task.info.higher_is_better)


def hopeless(runners: Sequence[Runner]) -> list[int]:
    """Numbers of running trials whose best is worse than the first evaluation of another one of their seed and layer."""
    found = []
    for number, runner in enumerate(runners):
        peers = [
            other.curve[0][1]
            for other in runners
            if other.curve and (other.trial.seed, other.trial.layer) == (runner.trial.seed, runner.trial.layer)
        ]
        if not runner.running or runner.selected is None or not peers:
            continue
        higher = runner.task.info.higher_is_better
        if runner.selected < max(peers) if higher else runner.selected > min(peers):
            found.append(number)
    return found


def _test(company: Company, fold: Fold, states: States) -> dict[int, Score | None]:
    """The score on test of every trial that did not fail, with its best weights; by the runner's identity."""
    finished = [number for number, runner in enumerate(company.runners) if runner.error is None]
    runners = [company.runners[number] for number in finished]
    for runner in runners:
        runner.probe.load_state_dict(runner.weights)
    scores = evaluate(runners, company.mixer.part(finished), fold, states, "test")
    return dict(zip(map(id, runners), scores, strict=True))


def _result(runner: Runner, score: Score | None) -> FitResult:
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
        trainable_params=runner.num_params,
        stopped=runner.stopped,
    )
