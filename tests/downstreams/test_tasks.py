"""The contract of every task: targets fit the head, the loss is finite, a perfect answer scores best, scores come from items."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Fold, LabelSet, Task
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.errors import RequestError
from superb_probe.probes.batches import collate
from superb_probe.registry import Registry

TASKS = Registry("task").names()
DIM = 12


def fold_of(task: Task, root: Path) -> Fold:
    """The task's fold of the small corpus (a task that makes its own data ignores the folder)."""
    (fold,) = load_folds(task, root=root)
    return fold


@pytest.fixture(params=TASKS)
def case(request, mini_like) -> tuple[Task, Fold, LabelSet]:
    task = load_task(request.param)
    fold = fold_of(task, mini_like)
    return task, fold, task.labels(fold.manifests["train"])


def small(task: Task) -> dict:
    """Head options for a test: every width is small."""
    return {name: 8 if "width" in name else value for name, value in task.info.budgets["small"].head.items()}


def run_head(task: Task, fold: Fold, labels: LabelSet, split: str = "train"):
    torch.manual_seed(0)
    manifest = fold.manifests[split]
    head = task.head(DIM, labels, small(task))
    frames = 1 if task.info.view == "mean" else 60
    states = torch.randn(len(manifest), frames, DIM, generator=torch.Generator().manual_seed(0))
    num_frames = torch.full((len(manifest),), frames)
    return head, manifest, states, num_frames


def perfect(task: Task, fold: Fold, split: str) -> dict[str, object]:
    """What a head that is always right predicts."""
    manifest = fold.manifests[split]
    if task.info.metric == "eer":
        names = sorted(set(manifest.labels("speaker")))
        return {u.id: np.eye(len(names))[names.index(u.labels["speaker"])] for u in manifest}
    if task.info.metric == "wer":
        return {u.id: list(u.labels["text"].upper().replace(" ", "|") + "|") for u in manifest}
    if task.info.metric == "per":
        return {u.id: u.labels["phones"].split() for u in manifest}
    return {u.id: dict(u.labels) for u in manifest}


def test_it_trains_on_its_targets(case):
    task, fold, labels = case
    head, manifest, states, num_frames = run_head(task, fold, labels)
    batch = collate(manifest.ids, num_frames, [task.target(utterance, labels) for utterance in manifest])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = head.loss(head(states, num_frames), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_its_predictions_are_scored_and_the_score_comes_from_the_items(case):
    task, fold, labels = case
    head, manifest, states, num_frames = run_head(task, fold, labels, "test")
    predictions = dict(zip(manifest.ids, head.eval().predict(head(states, num_frames)), strict=True))
    score = task.score(predictions, fold, "test")
    assert math.isfinite(score.value) and 0 <= score.value
    assert task.value(score.items) == pytest.approx(score.value)
    assert "id" in score.items and {len(column) for column in score.items.values()} == {len(score.items["id"])}
    assert len(set(score.items["id"])) == len(score.items["id"])


def test_a_perfect_answer_scores_best_and_a_wrong_one_does_not(case):
    task, fold, _ = case
    best = 100.0 if task.info.higher_is_better else 0.0
    answers = perfect(task, fold, "test")
    assert task.score(answers, fold, "test").value == pytest.approx(best)
    ids = list(answers)
    wrong = dict(
        zip(ids, [answers[name] for name in [*ids[1:], ids[0]]], strict=True)
    )  # everybody gets another's answer
    value = task.score(wrong, fold, "test").value
    assert value < best if task.info.higher_is_better else value > best


def test_a_missing_or_foreign_prediction_is_refused(case):
    task, fold, _ = case
    answers = perfect(task, fold, "test")
    first = next(iter(answers))
    for given in (
        {**answers, "nobody": answers[first]},
        {name: answer for name, answer in answers.items() if name != first},
    ):
        with pytest.raises(RequestError, match="predict every utterance"):
            task.score(given, fold, "test")


def test_an_unknown_head_option_is_refused(case):
    task, _, labels = case
    with pytest.raises(RequestError, match="Did you mean width"):
        task.head(DIM, labels, {"widht": 8})


def test_what_is_declared_hangs_together(case):
    task, _, labels = case
    info = task.info
    assert set(info.budgets) == {"small", "full"} and "strict" in info.protocols
    assert info.protocols["strict"].select_on == "dev" and not info.protocols["strict"].deviations
    assert info.protocols["strict"].default_lr in info.protocols["strict"].lr_grid
    for name, settings in info.protocols.items():
        assert name == "strict" or settings.deviations, f"{name} says what still differs from the published code"
        for budget in info.budgets.values():
            assert task.head(DIM, labels, {**budget.head, **settings.head, **small(task)})
    for budget in info.budgets.values():
        assert 0 < budget.evaluate_every <= budget.steps
    assert max(labels.sizes().values()) > 1
