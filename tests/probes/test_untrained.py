"""Untrained search: all layers at once equal s3prl's steps taken one by one, whatever the batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.probes import untrained
from superb_probe.probes.untrained import SubsequenceDtw, score_untrained, search_split, standardisation

LENGTHS = {"q0": 6, "q1": 4, "q2": 9, "d0": 30, "d1": 12, "d2": 41, "d3": 18, "d4": 25}
OCCURS = {"q0": "d1 d4", "q1": "d0", "q2": "d2"}
LAYERS, DIM = 3, 5


def utterance(name: str, prefix: str = "") -> Utterance:
    query = name[0] == "q"
    inside = " ".join(prefix + each for each in OCCURS.get(name, "").split())
    labels = {"role": "query" if query else "document", "occurrences": inside, "speaker": ""}
    return Utterance(prefix + name, f"{prefix}{name}.wav", 0.0, 1.0, labels)


def manifest(prefix: str = "") -> Manifest:
    return Manifest([utterance(name, prefix) for name in LENGTHS], __file__.rsplit("/", 1)[0], f"{prefix}split")  # type: ignore[arg-type]


class FakeStates:
    """States in memory with the interface of `States`."""

    def __init__(self, ids: tuple[str, ...], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = ids
        self.parts = [3 + 2 * torch.randn(LAYERS, LENGTHS[name[-2:]], DIM, generator=generator) for name in ids]
        self.num_frames = [part.shape[1] for part in self.parts]
        self.asked: list[int] = []

    def batch(self, rows: Any, max_frames: Any = None, generator: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += list(rows)
        longest = max(self.num_frames[row] for row in rows)
        padded = torch.zeros(LAYERS, len(rows), longest, DIM)
        for number, row in enumerate(rows):
            padded[:, number, : self.num_frames[row]] = self.parts[row]
        return padded, torch.tensor([self.num_frames[row] for row in rows])


def slow_search(states: FakeStates, layer: int, ddof: int = 1, standard: bool = True) -> dict[str, list[float]]:
    """s3prl's steps, with numpy, a pair at a time."""
    from scipy.spatial.distance import cdist

    parts = {name: part[layer].double().numpy() for name, part in zip(states.ids, states.parts, strict=True)}
    frames = np.concatenate(list(parts.values()))
    mean, deviation = (frames.mean(0), frames.std(0, ddof=ddof)) if standard else (0.0, 1.0)
    parts = {name: (part - mean) / deviation for name, part in parts.items()}
    found: dict[str, list[float]] = {}
    for query in (name for name in states.ids if name[-2] == "q"):
        found[query] = []
        for document in (name for name in states.ids if name[-2] == "d"):
            if len(parts[query]) < 5:
                found[query].append(0.0)
                continue
            cost = np.exp(cdist(parts[query], parts[document], "cosine")) - 1
            low, high = cost.min(1)[:, None], cost.max(1)[:, None]
            cost = (cost - low) / np.maximum(high - low, 1e-9)
            total = cost[0]
            for row in cost[1:]:
                total = np.array([row[j] + total[max(0, j - 2) : j + 1].min() for j in range(len(row))])
            found[query].append(float(-total.min() / len(cost)))
    return found


@pytest.mark.parametrize("room", [1, 2**25])
def test_all_layers_at_once_equal_one_pair_at_a_time(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained, "BATCH_FLOATS", room)
    states = FakeStates(manifest().ids)
    found = search_split(states, manifest())  # type: ignore[arg-type]
    for layer in range(LAYERS):
        for query, wanted in slow_search(states, layer).items():
            assert found[query][layer].tolist() == pytest.approx(wanted, abs=1e-6)
    assert found["q1"].abs().sum() == 0, "four frames are too few"
    raw = slow_search(states, 0, standard=False)["q0"]
    assert found["q0"][0].tolist() != pytest.approx(raw, abs=1e-3)


def test_the_deviation_is_that_of_a_sample_of_all_frames() -> None:
    states = FakeStates(manifest().ids)
    mean, deviation = standardisation(states, [[0, 3], [1], [2, 4, 5, 6, 7]])  # type: ignore[arg-type]
    frames = torch.cat(states.parts, 1)
    assert torch.allclose(mean[:, 0], frames.mean(1), atol=1e-5)
    assert torch.allclose(deviation[:, 0], frames.std(1), atol=1e-5)
    assert not torch.allclose(deviation[:, 0], frames.std(1, unbiased=False), atol=1e-4)
    states.parts = [torch.full_like(part, 7.0) for part in states.parts]
    assert (standardisation(states, [[0], [1]])[1] == torch.tensor(1e-9)).all()  # type: ignore[arg-type]


def test_a_result_a_layer(toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("qbe")
    fold = task.arrange(Fold(None, {"dev": manifest("dev-"), "test": manifest("test-")}), "strict")
    made = {"dev": FakeStates(fold.manifests["dev"].ids, 1), "test": FakeStates(fold.manifests["test"].ids, 2)}
    monkeypatch.setattr(untrained, "States", lambda store, ids, layer, device: made[store])
    trials = [
        toy.trial(task="qbe", layer=layer, steps=0, lr=0.0, head_options={"distance": "cosine"}) for layer in (2, 0)
    ]
    stores: Any = {"dev": "dev", "test": "test"}
    done: list[int] = []
    info: Any = SimpleNamespace(dim=DIM)
    labels = task.labels(fold.manifests["dev"])
    results = score_untrained(trials, task, fold, labels, stores, info, progress=done.append)
    assert [result.trial.layer for result in results] == [2, 0] and sum(done) == 2
    for result in results:
        layer = result.trial.layer
        assert layer is not None and result.score is not None
        for split, value in (("dev", result.selected), ("test", result.score.value)):
            found = search_split(made[split], fold.manifests[split], "cosine")  # type: ignore[arg-type]
            alone = task.score({name: scores[layer].numpy() for name, scores in found.items()}, fold, split)  # type: ignore[arg-type]
            assert value == pytest.approx(alone.value)
        assert (result.step, result.error, result.trainable_params) == (0, None, 0)
        assert result.curve == ((0, result.selected),)
        assert "atwv" in result.score.extra and result.score.extra["atwv"] <= result.score.value + 1e-9
    with pytest.raises(ValueError, match="one trial a layer"):
        score_untrained([toy.trial(layer=None)], task, fold, labels, stores, info)


def test_the_head_is_never_called() -> None:
    head = SubsequenceDtw()
    assert not list(head.parameters())
    for call in (lambda: head(None, None), lambda: head.loss(None, None), lambda: head.predict(None)):  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError):
            call()
