"""Batches of one update that go through as one: the same training as one by one, crops and unequal batches included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from superb_probe.probes.draws import Draws
from superb_probe.probes.fit import FitResult
from superb_probe.probes.xvector import XVector


def task_of(toy: SimpleNamespace, extra: bool) -> Any:
    """The toy task with an x-vector head, which has no objective but the tones'."""

    class Tones(XVector):
        def loss(self, outputs: Any, batch: Any) -> Tensor:
            batch.targets["speaker"] = batch.targets["tone"]
            return super().loss(outputs, batch)

        def predict(self, outputs: Any) -> list[dict[str, str]]:
            return [{"tone": names[row]} for row in (outputs.vector @ self.objective).argmax(1).tolist()]

    names: tuple[str, ...] = ()

    class ToneTask(toy.Task):  # type: ignore[misc, name-defined]
        def head(self, dim: int, labels: Any, options: Any = None) -> Tones:
            nonlocal names
            names = labels.classes["tone"]
            return Tones(dim, len(names), width=8, pool_width=6, pool_extra_frame=extra)

    return ToneTask()


def trained(world: Any, toy: SimpleNamespace, extra: bool, crop_s: float | None) -> list[FitResult]:
    budget = {
        "steps": 14,
        "batch": 4,
        "accumulate": 3,
        "max_crop_s": crop_s,
        "evaluate_every": 7,
    }  # 30 utterances: 7.5 batches
    trials = [toy.trial(lr=lr, seed=seed) for seed in (1, 2) for lr in (0.01, 0.001)]
    found: list[FitResult] = world(trials, task_of(toy, extra), budget=budget)
    return found


def furthest(a: list[FitResult], b: list[FitResult]) -> float:
    return max(
        float((one.weights[name] - other.weights[name]).abs().max())
        for one, other in zip(a, b, strict=True)
        for name in one.weights
    )


@pytest.mark.parametrize("crop_s", [None, 0.3])
@pytest.mark.parametrize("extra", [False, True])
def test_joined_batches_train_the_same_probe(
    world: Any, toy: SimpleNamespace, extra: bool, crop_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = Draws.update

    def watched(draws: Draws, count: int) -> Any:
        for part in real(draws, count):
            held.append(part[2])
            yield part

    monkeypatch.setattr(Draws, "update", watched)
    joined = trained(world, toy, extra, crop_s)
    assert set(held) == {1, 3}, "most updates are joined, those with the short last batch of an epoch are not"
    monkeypatch.setattr(XVector, "joins_batches", False)
    one_by_one = trained(world, toy, extra, crop_s)
    assert furthest(joined, one_by_one) < 2e-5
    assert [each.curve for each in joined] == [each.curve for each in one_by_one]


def test_a_frame_of_another_batch_would_be_noticed(
    world: Any, toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant: the longest utterance of all batches instead of each one's own."""
    joined = trained(world, toy, True, None)
    real = XVector.forward
    monkeypatch.setattr(
        XVector, "forward", lambda head, frames, num_frames, longest=None: real(head, frames, num_frames)
    )
    assert furthest(joined, trained(world, toy, True, None)) > 1e-3


def test_an_utterance_that_is_there_twice_keeps_its_two_crops(toy: SimpleNamespace) -> None:
    draws = Draws.__new__(Draws)
    draws.rows = iter([[0, 1], [2, 3], [0, 2], [2, 1]])
    assert draws._parts(2) == [([0, 1, 2, 3], 2)]
    assert draws._parts(2) == [([0, 2], 1), ([2, 1], 1)]


def test_batches_ahead_are_announced_once(toy: SimpleNamespace) -> None:
    announced: list[list[int]] = []
    draws = Draws.__new__(Draws)
    draws.rows = iter([[at, at + 1] for at in range(0, 24, 2)])
    draws._coming = []
    draws._states = SimpleNamespace(prefetch=announced.append)  # type: ignore[assignment]
    draws._of = lambda rows: (torch.tensor(rows), rows)  # type: ignore[method-assign, assignment, return-value]
    seen = [[part[0].tolist() for part in draws.update(3)] for _ in range(3)]
    assert seen == [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10, 11]], [[12, 13, 14, 15, 16, 17]]]
    assert announced == [seen[1][0], seen[2][0], [18, 19, 20, 21, 22, 23]]
