from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.manifest import Manifest
from superb_probe.probes import evaluate as evaluate_module
from superb_probe.probes import training as training_module
from superb_probe.probes.batches import assemble, collate, crop, evaluation_batches, training_batches
from superb_probe.probes.fit import FitResult


def same(a: FitResult, b: FitResult, *, tolerance: float = 1e-5) -> bool:
    """Whether two results are one training to rounding: batched products may sum in another order with another company."""
    equal = all(torch.allclose(a.weights[name], b.weights[name], rtol=tolerance, atol=tolerance) for name in a.weights)
    return (
        equal
        and a.weights.keys() == b.weights.keys()
        and a.curve == b.curve
        and a.step == b.step
        and a.score is not None
        and b.score is not None
        and (a.score.value == b.score.value)
    )


@pytest.mark.parametrize("view", ["frames", "mean"])
def test_a_trial_alone_equals_the_same_trial_in_company(toy: SimpleNamespace, world: Any, view: str) -> None:
    task = toy.Task(view)
    trials = [toy.trial(lr=lr, seed=seed) for seed in (1, 2) for lr in (0.1, 0.01)]
    together = world(trials, task)
    for trial, result in zip(trials, together, strict=True):
        (alone,) = world([trial], task)
        assert result.trial == trial and same(alone, result)
    assert not same(together[0], together[2])  # another seed is another training
    assert not same(together[0], together[1])


def test_shared_random_numbers_would_be_noticed(
    toy: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [toy.trial(lr=lr) for lr in (0.1, 0.01)]
    (alone,) = world(trials[1:])
    monkeypatch.setattr(training_module, "set_random_state", lambda *_: None)  # a mutant: trials draw from one stream
    assert not same(alone, world(trials)[1])


def test_training_leaves_the_process_random_numbers_alone(toy: SimpleNamespace, world: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    world([toy.trial()])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_learns_and_shuffled_labels_leave_it_at_chance(toy: SimpleNamespace, world: Any) -> None:
    task = toy.Task("mean", dropout=False)
    trials = [toy.trial(lr=0.03, seed=seed) for seed in range(1, 6)]
    budget = {"steps": 60, "evaluate_every": 60}
    real = [result.score.value for result in world(trials, task, budget=budget)]
    control = [result.score.value for result in world(trials, task, budget=budget, control="shuffle")]
    assert min(real) > 90
    assert sum(control) / 5 < 60  # three classes


def test_shuffling_moves_training_targets_and_nothing_else(
    toy: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[str | None, list[tuple[tuple[str, ...], list[int]]]] = {None: [], "shuffle": []}
    real = training_module.Draws.batch
    for control, seen in batches.items():

        def watch(draws: Any, seen: Any = seen) -> Any:
            states, batch = real(draws)
            seen.append((batch.ids, batch.targets["tone"].tolist()))
            return states, batch

        with monkeypatch.context() as patch:
            patch.setattr(training_module.Draws, "batch", watch)
            world([toy.trial()], control=control, budget={"steps": 5})  # five batches of six: one epoch
    assert [ids for ids, _ in batches[None]] == [ids for ids, _ in batches["shuffle"]]
    plain, mixed = ([t for _, targets in batches[key] for t in targets] for key in (None, "shuffle"))
    assert plain != mixed and sorted(plain) == sorted(mixed)


def test_a_trial_that_diverges_is_told_and_leaves_the_others_as_they_are(toy: SimpleNamespace, world: Any) -> None:
    task = toy.Task(dropout=False)
    trials = [toy.trial(lr=1e30), toy.trial(lr=0.01)]
    failed, finished = world(trials, task, budget={"steps": 20})
    assert (
        failed.error is not None
        and failed.error.startswith("diverged")
        and failed.score is None
        and failed.selected is None
    )
    (alone,) = world(trials[1:], task, budget={"steps": 20})
    assert same(alone, finished)


def test_the_best_update_on_dev_is_kept_and_ties_go_to_the_earlier(toy: SimpleNamespace, world: Any) -> None:
    (result,) = world([toy.trial(lr=0.1)], budget={"steps": 25, "evaluate_every": 10})
    assert [step for step, _ in result.curve] == [10, 20, 25]
    best = max(value for _, value in result.curve)
    assert result.selected == best and result.step == next(step for step, value in result.curve if value == best)


def test_the_direction_of_the_metric_counts(toy: SimpleNamespace, world: Any) -> None:
    task = toy.Task()
    task.info = dataclasses.replace(task.info, higher_is_better=False)
    (result,) = world([toy.trial(lr=0.1)], task)
    assert result.selected == min(value for _, value in result.curve)


def test_test_scores_choose_nothing(toy: SimpleNamespace, world: Any, corpus: Path) -> None:
    task = toy.Task()
    (fold,) = task.splits(corpus)
    test = fold.manifests["test"]
    wrong = [
        dataclasses.replace(u, labels={"tone": test[(k + 1) % len(test)].labels["tone"]}) for k, u in enumerate(test)
    ]
    other = Fold(None, {**fold.manifests, "test": Manifest(wrong, test.root, test.name)})
    (one,), (two,) = world([toy.trial()]), world([toy.trial()], fold=other)
    assert one.step == two.step and one.curve == two.curve and one.score.value != two.score.value
    (chosen,) = world([toy.trial()], select_on="test")  # SUPERB's own exception, asked for
    assert chosen.selected == chosen.score.value and chosen.curve != one.curve


def test_one_layer_is_read_without_a_weighted_sum(toy: SimpleNamespace, world: Any) -> None:
    (result,) = world([toy.trial(layer=1)])
    assert result.layer_weights is None and not any(name.startswith("weighted_sum") for name in result.weights)
    (all_layers,) = world([toy.trial()])
    assert all_layers.layer_weights is not None and abs(sum(all_layers.layer_weights) - 1) < 1e-6
    assert len(set(all_layers.layer_weights)) == 3  # they moved
    assert all_layers.trainable_params == result.trainable_params + 3
    (other,) = world([toy.trial(layer=2)])
    assert not torch.equal(other.weights["head.linear.weight"], result.weights["head.linear.weight"])


@pytest.mark.parametrize("view", ["frames", "mean"])
def test_layer_norm_changes_what_is_read(toy: SimpleNamespace, world: Any, view: str) -> None:
    task = toy.Task(view, dropout=False)
    (plain,), (normed,) = world([toy.trial()], task), world([toy.trial()], task, layer_norm=True)
    assert not torch.equal(plain.weights["head.linear.weight"], normed.weights["head.linear.weight"])


def test_mean_and_frames_train_a_linear_head_alike(toy: SimpleNamespace, world: Any) -> None:
    # without crops, in batches that hold the whole split, so that both views see the same data in every update
    budget = {"batch": 30, "steps": 10, "max_crop_s": None}
    for layer_norm in (False, True):
        (frames,) = world([toy.trial()], toy.Task("frames", dropout=False), budget=budget, layer_norm=layer_norm)
        (mean,) = world([toy.trial()], toy.Task("mean", dropout=False), budget=budget, layer_norm=layer_norm)
        for name, tensor in frames.weights.items():
            torch.testing.assert_close(mean.weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_evaluation_does_not_depend_on_its_batches(
    toy: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (together,) = world([toy.trial()])
    monkeypatch.setattr(evaluate_module, "EVALUATION_FLOATS", 1)
    (one_by_one,) = world([toy.trial()])
    assert together.curve == one_by_one.curve and together.score.value == one_by_one.score.value


def test_accumulated_batches_are_one_update(toy: SimpleNamespace, world: Any) -> None:
    seen: list[int] = []
    (result,) = world([toy.trial()], budget={"accumulate": 3, "steps": 4, "evaluate_every": 2}, progress=seen.append)
    assert [step for step, _ in result.curve] == [2, 4] and seen == [1, 1, 1, 1]


def test_an_epoch_visits_every_utterance_once() -> None:
    lengths = [int(n) for n in torch.randint(1, 100, (53,), generator=torch.Generator().manual_seed(0))]
    for similar in (False, True):
        batches = training_batches(lengths, 4, torch.Generator().manual_seed(1), similar=similar)
        for _ in range(2):
            rows: list[int] = []
            while len(rows) < len(lengths):
                rows += next(batches)
            assert sorted(rows) == list(range(len(lengths)))
    padded = {}
    for similar in (False, True):
        batches = training_batches(lengths, 4, torch.Generator().manual_seed(1), similar=similar)
        made = [next(batches) for _ in range(14)]
        padded[similar] = sum(max(lengths[row] for row in batch) * len(batch) for batch in made)
    assert padded[True] < 0.8 * padded[False]


def test_evaluation_batches_hold_everything_once_and_stay_within_bounds() -> None:
    lengths = [7, 1, 30, 12, 12, 5, 40]
    batches = evaluation_batches(lengths, 30)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= 30 for batch in batches)


def test_assembled_states_are_zero_past_their_end() -> None:
    parts = [torch.ones(2, 3, 4), torch.ones(2, 5, 4, dtype=torch.float16)]
    states, num_frames = assemble(parts, torch.device("cpu"))
    assert states.shape == (2, 2, 5, 4) and num_frames.tolist() == [3, 5]
    assert states[:, 0, 3:].abs().sum() == 0 and states.sum() == 2 * 8 * 4


def test_crops_are_stretches_and_every_one_is_possible() -> None:
    states = torch.arange(6.0).reshape(1, 6, 1)
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(60):
        part = crop(states, 4, generator)[0, :, 0]
        assert (part.diff() == 1).all() and len(part) == 4
        starts.add(float(part[0]))
    assert starts == {0.0, 1.0, 2.0}
    assert crop(states, 6, generator).shape == crop(states, 9, generator).shape == (1, 6, 1)


def test_targets_of_any_length_keep_their_lengths() -> None:
    targets = [
        {"t": torch.tensor([[1.0, 0.0]] * 2), "c": torch.tensor(1)},
        {"t": torch.tensor([[0.0, 1.0]] * 3), "c": torch.tensor(2)},
    ]
    batch = collate(["a", "b"], torch.tensor([2, 3]), targets)
    assert batch.targets["t"].shape == (2, 3, 2) and batch.targets["t_lengths"].tolist() == [2, 3]
    assert batch.targets["c"].tolist() == [1, 2] and "c_lengths" not in batch.targets
    assert (batch.targets["t"][0, 2] == -1).all()
