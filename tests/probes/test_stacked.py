"""Linear heads trained as one stack: each trial is what it is alone, and what its own module's autograd gives."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch
from superb_probe.probes import training as training_module
from superb_probe.probes import update as update_module
from superb_probe.probes.batches import training_batches
from superb_probe.probes.ctc import FrameCtc, FrameLogits
from superb_probe.probes.fit import FitResult
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.stacked import can_stack, class_losses, token_losses

TOLERANCE = 2e-5  # relative and absolute, of trained weights after 30 updates


def distance(a: FitResult, b: FitResult) -> float:
    """How far the kept weights are apart, in units of the tolerance."""
    assert a.weights.keys() == b.weights.keys()
    return max(
        float(((a.weights[name] - b.weights[name]).abs() / (TOLERANCE * (1 + b.weights[name].abs()))).max())
        for name in a.weights
    )


def ctc_task(toy: SimpleNamespace) -> Any:
    """The toy task asked frame by frame: the tone is the one token."""

    class CtcTask(toy.Task):  # type: ignore[name-defined, misc]
        def head(self, dim: int, labels: Any, options: Mapping[str, Any] | None = None) -> FrameCtc:
            return FrameCtc(dim, ("<blank>", *labels.classes["tone"], "<end>"), width=7, drop=("<end>",))

        def target(self, utterance: Any, labels: Any) -> dict[str, Tensor]:
            tone = labels.classes["tone"].index(utterance.labels["tone"]) + 1
            return {"tokens": torch.tensor([tone, 4] if tone == 1 else [tone])}

        def score(self, predictions: Mapping[str, Any], fold: Any, split: Any) -> Any:
            chosen = {name: {"tone": tokens[0] if tokens else ""} for name, tokens in predictions.items()}
            return super().score(chosen, fold, split)

    return CtcTask("frames", dropout=False)


TASKS = {"means": lambda toy: toy.Task("mean", dropout=False), "ctc": ctc_task}
SETTINGS = [(lr, seed, layer) for lr, seed, layer in ((0.1, 1, None), (0.01, 2, None), (0.01, 1, 2), (0.1, 2, 0))]


def trials_of(toy: SimpleNamespace, settings: Any = SETTINGS) -> list[Any]:
    return [toy.trial(lr=lr, seed=seed, layer=layer) for lr, seed, layer in settings]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_trials_of_other_rates_seeds_and_layers_change_nothing(
    toy: SimpleNamespace, world: Any, name: str, accumulate: int
) -> None:
    task, budget = TASKS[name](toy), {"accumulate": accumulate, "batch": 7}  # 30 utterances: the last batch is smaller
    trials = trials_of(toy)
    together = world(trials, task, budget=budget)
    for trial, result in zip(trials, together, strict=True):
        (alone,) = world([trial], task, budget=budget)
        assert result.trial == trial and distance(alone, result) < 1 and alone.curve == result.curve
        assert alone.trainable_params == result.trainable_params
    assert all(distance(together[0], other) > 100 for other in together[1:] if other.trial.layer is None)
    uneven = world(trials[:3], task, budget=budget)  # two trials of seed 1, one of seed 2
    assert max(map(distance, uneven, together[:3])) < 1


@pytest.mark.parametrize("name", TASKS)
def test_a_stack_equals_the_modules_own_gradients(
    toy: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    task, trials = TASKS[name](toy), trials_of(toy)
    stacked = world(trials, task, budget={"accumulate": 2})
    monkeypatch.setattr(training_module, "can_stack", lambda heads: False)
    separate = world(trials, task, budget={"accumulate": 2})
    assert max(map(distance, stacked, separate)) < 1
    assert [result.curve for result in stacked] == [result.curve for result in separate]


@pytest.mark.parametrize("name", TASKS)
def test_training_twice_gives_the_same_bits(toy: SimpleNamespace, world: Any, name: str) -> None:
    one, two = (world(trials_of(toy), TASKS[name](toy)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a.weights[key], b.weights[key]) for key in a.weights) and a.curve == b.curve


def shared_norm(updater: Any, losses: Tensor) -> Tensor:
    """A mutant of `step`: one norm for all trials."""
    norm = updater.gradients.norm().expand(len(losses))
    updater.count += 1
    updater._taken += 1
    updater._adam_by_rows([True] * len(losses), (updater.clip / (norm + 1e-6)).clamp(max=1.0).tolist())
    return norm


def shared_moments(updater: Any, made: Any, scales: Any) -> None:
    """A mutant of Adam: trials share the second moment."""
    updater.second.copy_(updater.second.mean(0, keepdim=True).expand_as(updater.second))
    BY_ROWS(updater, made, scales)


def shared_rate(updater: Any, made: Any, scales: Any) -> None:
    """A mutant of Adam: all trials learn at the first one's rate."""
    updater.lr = (updater.lr[0],) * len(updater.lr)
    BY_ROWS(updater, made, scales)


BY_ROWS = update_module.StackedUpdater._adam_by_rows


@pytest.mark.parametrize(
    ("method", "mutant"), [("step", shared_norm), ("_adam_by_rows", shared_moments), ("_adam_by_rows", shared_rate)]
)
def test_anything_shared_between_trials_is_noticed(
    toy: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch, method: str, mutant: Any
) -> None:
    task, trials = toy.Task("mean", dropout=False), trials_of(toy)
    task.info = task_info_with(task, clip=0.05)
    (alone,) = world(trials[1:2], task)
    assert distance(alone, world(trials, task)[1]) < 1
    monkeypatch.setattr(update_module.StackedUpdater, method, mutant)
    assert distance(alone, world(trials, task)[1]) > 10


def task_info_with(task: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(task.info, **changes)


def test_a_diverged_trial_is_told_its_update_and_poisons_nobody(toy: SimpleNamespace, world: Any) -> None:
    for make in TASKS.values():
        task = make(toy)
        trials = [toy.trial(lr=1e30), toy.trial(lr=0.01), toy.trial(lr=0.01, seed=2)]
        failed, *finished = world(trials, task)
        assert (
            failed.error is not None and failed.error.startswith("diverged: loss ") and "in update 2 " in failed.error
        )
        assert failed.score is None and failed.selected is None and failed.curve == ()
        for trial, result in zip(trials[1:], finished, strict=True):
            assert distance(result, world([trial], task)[0]) < 1


def planner_of_means() -> Any:
    """The part of a `MeanStack` that draws batches: three seeds, 70 utterances, two batches an update, drawn crops."""

    def draws(seed: int) -> SimpleNamespace:
        order = torch.Generator().manual_seed(seed)
        rows = training_batches([1] * 70, 32, order, similar=False)
        return SimpleNamespace(rows=rows, crops=torch.Generator().manual_seed(seed))

    stack: Any = training_module.MeanStack.__new__(training_module.MeanStack)
    stack.groups = [(draws(seed), slice(0, 5)) for seed in range(3)]
    stack._rows, stack.accumulate, stack._planned = 64, 2, None
    stack._states = SimpleNamespace(
        draw_means=lambda rows, sizes, crops: torch.randint(9, (len(rows),), generator=crops)
    )
    return stack


@pytest.mark.parametrize("strides", [(40,), (3, 10, 10, 2, 1, 10, 4), (10, 10, 10, 10)])
def test_batches_planned_ahead_are_those_planned_in_time(strides: tuple[int, ...]) -> None:
    in_time, ahead = planner_of_means(), planner_of_means()
    expected = [in_time._plan(1) for _ in range(40)]
    found = []
    for count in strides:
        index, weights = ahead._next(count)
        found += list(zip(index.split(1), weights.split(1), strict=True))
        if ahead._planned is None:
            ahead._planned = ahead._plan(10)
    for (index, weights), (other_index, other_weights) in zip(found, expected, strict=True):
        assert torch.equal(index, other_index) and torch.equal(weights, other_weights)


def test_the_losses_and_gradients_are_the_heads_own() -> None:
    generator = torch.Generator().manual_seed(1)
    utterance = UtteranceLinear(3, {"a": "xyz", "b": "pq"}, width=4)
    logits = torch.randn(2, 5, 5, generator=generator, requires_grad=True)
    targets = torch.stack(
        [torch.randint(3, (2, 5), generator=generator), torch.randint(2, (2, 5), generator=generator)], 2
    )
    losses, gradients = class_losses(logits.detach(), targets, utterance.sizes, torch.full((5,), 0.2))
    for trial in range(2):
        named = {"a": targets[trial, :, 0], "b": targets[trial, :, 1]}
        loss = utterance.loss(logits[trial], Batch(tuple("abcde"), torch.ones(5), named))
        (expected,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(losses[trial], loss.detach())
        torch.testing.assert_close(gradients[trial], expected[trial], rtol=1e-5, atol=1e-7)
    # a row that fills a batch up counts nothing
    fewer, slopes = class_losses(logits.detach(), targets, utterance.sizes, torch.tensor([0.25] * 4 + [0.0]))
    assert slopes[:, 4].abs().max() == 0 and not torch.allclose(fewer, losses)

    head = FrameCtc(3, ("<b>", "x", "y"), width=4)
    frames = torch.randn(2, 3, 6, 3, generator=generator, requires_grad=True)
    lengths, tokens, counts = torch.tensor([6, 4, 5]), torch.tensor([[1, 2], [1, -1], [2, 2]]), torch.tensor([2, 1, 2])
    losses, gradients = token_losses(frames.detach(), lengths, tokens, counts)
    for trial in range(2):
        batch = Batch(tuple("abc"), lengths, {"tokens": tokens, "tokens_lengths": counts})
        loss = head.loss(FrameLogits(frames[trial], lengths), batch)
        (expected,) = torch.autograd.grad(loss, frames)
        torch.testing.assert_close(losses[trial], loss.detach())
        torch.testing.assert_close(gradients[trial], expected[trial])


def test_only_the_heads_that_are_known_to_be_linear_are_stacked() -> None:
    class Other(UtteranceLinear):
        pass

    linear = UtteranceLinear(3, {"a": "xyz"}, width=4)
    assert can_stack([linear, linear]) and can_stack([FrameCtc(3, ("<b>", "x"))])
    assert not can_stack([Other(3, {"a": "xyz"}, width=4)])
    assert not can_stack([linear, FrameCtc(3, ("<b>", "x"))])


def test_hopeless_trials_are_stopped_only_when_asked(toy: SimpleNamespace, world: Any) -> None:
    task = toy.Task("mean", dropout=False)
    trials = [toy.trial(lr=0.1), toy.trial(lr=1e-6)]
    budget = {"steps": 40, "evaluate_every": 4}
    kept = world(trials, task, budget=budget)
    assert [result.stopped for result in kept] == [None, None] and len(kept[1].curve) == 10
    good, hopeless = world(trials, task, budget=budget, stop_hopeless=True)
    assert good.stopped is None and distance(good, kept[0]) < 1
    assert hopeless.stopped == 12 and len(hopeless.curve) == 3 and hopeless.error is None  # a quarter is 10 updates
    assert hopeless.score is not None and hopeless.curve == kept[1].curve[:3]


def wide_task(toy: SimpleNamespace) -> Any:
    """The toy task with a projector that the kernels of `mean_update` take."""

    class WideTask(toy.Task):  # type: ignore[name-defined, misc]
        def head(self, dim: int, labels: Any, options: Mapping[str, Any] | None = None) -> UtteranceLinear:
            return UtteranceLinear(dim, labels.classes, width=64)

    return WideTask("mean", dropout=False)


@pytest.mark.cuda
@pytest.mark.parametrize(("make", "dim"), [(TASKS["means"], 6), (TASKS["ctc"], 6), (wide_task, 64)])
def test_a_gpu_trains_what_a_cpu_trains(toy: SimpleNamespace, world: Any, make: Any, dim: int) -> None:
    trials = [toy.trial(lr=1e30), *trials_of(toy)]
    budget = {"steps": 120, "evaluate_every": 60, "batch": 7}  # of means: 50 updates as a graph, 10 one by one
    for here, there in zip(
        world(trials, make(toy), budget=budget, dim=dim),
        world(trials, make(toy), budget=budget, dim=dim, device=torch.device("cuda")),
        strict=True,
    ):
        assert (here.error, here.step) == (there.error, there.step)
        assert here.error is not None or distance(here, there) < 50  # other sums, 120 updates
