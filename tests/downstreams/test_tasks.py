"""The contract of every task: targets fit the head, the loss is finite, a perfect answer scores best, scores come from items."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Fold, FrameGrid, LabelSet, Task
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.sf import encode
from superb_probe.engine_request import head_name
from superb_probe.errors import RequestError
from superb_probe.probes.batches import collate
from superb_probe.registry import Registry
from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub

TASKS = Registry("task").names()
DIM = 12
FRAMES = 60  # of every utterance, where the head reads frames; 20 ms each


def fold_of(task: Task, root: Path) -> Fold:
    """The task's first fold of the small corpus (a task that makes its own data ignores the folder)."""
    return load_folds(task, root=root)[0]


@pytest.fixture(params=TASKS)
def case(request, mini_like) -> tuple[Task, Fold, LabelSet]:
    task = load_task(request.param)
    fold = fold_of(task, mini_like)
    labels = task.labels(fold.manifests.get("train", fold.manifests["dev"]))
    ids = [name for manifest in fold.manifests.values() for name in manifest.ids]
    return task.bind(fold, FrameGrid(320, 16000, dict.fromkeys(ids, FRAMES))), fold, labels


def untrained(task: Task) -> None:
    if not task.info.trained:
        pytest.skip(f"{task.info.name} has nothing to train")


def small(task: Task) -> dict:
    """Head options for a test: every width is small."""
    return {name: 8 if "width" in name else value for name, value in task.info.budgets["small"].head.items()}


def run_head(task: Task, fold: Fold, labels: LabelSet, split: str = "train"):
    torch.manual_seed(0)
    manifest = fold.manifests[split]
    head = task.head(DIM, labels, small(task))
    frames = 1 if task.info.view == "mean" else FRAMES
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
    if task.info.metric == "slot_type_f1":
        return {u.id: encode(u.labels["text"], u.labels["iob"]) for u in manifest}
    if task.info.metric == "der":
        labels = task.labels(manifest)
        return {u.id: 20 * task.target(u, labels)["speakers"].numpy() - 10 for u in manifest}
    if task.info.metric == "mtwv":
        documents = [u.id for u in manifest if u.labels["role"] == "document"]
        queries = [u for u in manifest if u.labels["role"] == "query"]
        return {u.id: np.isin(documents, u.labels["occurrences"].split()).astype(float) for u in queries}
    return {u.id: dict(u.labels) for u in manifest}


def test_it_trains_on_its_targets(case):
    task, fold, labels = case
    untrained(task)
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
    if task.info.trained:
        head, manifest, states, num_frames = run_head(task, fold, labels, "test")
        predictions = dict(zip(manifest.ids, head.eval().predict(head(states, num_frames)), strict=True))
    else:
        rng = np.random.default_rng(0)
        predictions = {name: rng.normal(size=right.shape) for name, right in perfect(task, fold, "test").items()}
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
    with pytest.raises(RequestError, match="has no option 'widht'"):
        task.head(DIM, labels, {"widht": 8})


def test_every_head_it_names_is_built_trained_and_scored(case):
    task, fold, labels = case
    untrained(task)
    budget = task.info.budgets["small"]
    default = task.head(DIM, labels, {**budget.head, **small(task)})
    assert task.info.heads[:1] in ((), (head_name(default),)), "the name in records is the default head's own"
    for name in task.info.heads[1:]:
        if name == "ecapa":
            install_torchaudio_stub()
            pytest.importorskip("speechbrain.lobes.models.ECAPA_TDNN")
        options = budget.for_head(name).head
        head = task.head(DIM, labels, {key: 8 if "width" in key else value for key, value in options.items()})
        shapes = [tuple(tensor.shape) for tensor in head.parameters()]
        assert type(head) is not type(default) or shapes != [tuple(tensor.shape) for tensor in default.parameters()]
        _, manifest, states, num_frames = run_head(task, fold, labels)
        batch = collate(manifest.ids, num_frames, [task.target(utterance, labels) for utterance in manifest])
        loss = head.loss(head(states, num_frames), batch)
        loss.backward()
        assert math.isfinite(float(loss.detach())) and all(tensor.grad is not None for tensor in head.parameters())
        _, manifest, states, num_frames = run_head(task, fold, labels, "test")
        with torch.no_grad():
            predictions = dict(zip(manifest.ids, head.eval().predict(head(states, num_frames)), strict=True))
        assert math.isfinite(task.score(predictions, fold, "test").value)
    with pytest.raises(RequestError, match="has no head 'transformer'|has no option 'head'"):
        task.head(DIM, labels, {"head": "transformer"})


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
        assert 0 < budget.evaluate_every <= budget.steps or not task.info.trained
    assert max(labels.sizes().values()) > 1
