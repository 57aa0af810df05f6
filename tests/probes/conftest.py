"""A small world for the tests of store, fit and engine: tones in noise, an encoder of three layers, a task on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Budget, Fold, Head, LabelSet, ProtocolSettings, Score, Task, TaskInfo
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.probes.fit import FitResult, fit_trials
from superb_probe.probes.heads import UtteranceLinear, masked_mean
from superb_probe.probes.plan import Trial
from superb_probe.probes.store import FeatureStore
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask

HOP = 160
NAMES = ("low", "middle", "high")


class ToyUpstream(Upstream):
    """Three layers of fixed projections of 160 samples, the tanh of each; every frame stands for itself."""

    def __init__(self, seed: int = 0, dim: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, HOP, dim, generator=generator) / 4, requires_grad=False)
        self.calls = 0
        self.info = UpstreamInfo(
            "toy", f"random:{seed}", 3, dim, 16000, HOP, "none", 0, "block_output", (), "CC0", "none"
        )

    def num_frames(self, num_samples: int) -> int:
        return num_samples // HOP

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        self.calls += wavs.shape[0]
        frames = wavs[:, : wavs.shape[1] // HOP * HOP].unflatten(1, (-1, HOP))
        spectrum = torch.fft.rfft(frames, n=2 * (HOP - 1)).abs()
        states = torch.tanh(torch.einsum("bts,lsd->lbtd", spectrum, self.weight))
        num_frames = num_samples // HOP
        return LayerStates(states * frame_mask(num_frames, states.shape[2])[..., None], num_frames)


class DropoutHead(Head):
    """A linear classifier with dropout before it: its training draws random numbers."""

    def __init__(self, dim: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(dim, len(classes))

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        return self.linear(masked_mean(self.dropout(frames), num_frames))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch.targets["tone"])

    def predict(self, outputs: Tensor) -> list[dict[str, str]]:
        return [{"tone": self.classes[row]} for row in outputs.argmax(1).tolist()]


class ToyTask(Task):
    """Which of three tones sounds."""

    def __init__(self, view: str = "frames", dropout: bool = True, **changes: Any) -> None:
        budget = Budget(steps=30, batch=6, accumulate=1, evaluate_every=10, max_crop_s=0.2 if dropout else None)
        self.dropout = dropout
        self.info = TaskInfo(
            name="toy_task",
            version=1,
            metric="accuracy",
            unit="percent",
            higher_is_better=True,
            view=view,  # type: ignore[arg-type]
            protocols={"strict": ProtocolSettings(lr_grid=(1e-1, 1e-2))},
            optimizer="adam",
            clip=1.0,
            budgets={"small": budget, "full": budget},
            label_columns=("tone",),
            speakers="shared",
            **changes,
        )

    def splits(self, root: Path) -> list[Fold]:
        return [Fold(None, {split: Manifest.read(root / f"{split}.tsv") for split in ("train", "dev", "test")})]

    def labels(self, train: Manifest) -> LabelSet:
        return LabelSet({"tone": tuple(sorted(set(train.labels("tone"))))})

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        return {"tone": torch.tensor(labels.classes["tone"].index(utterance.labels["tone"]))}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        return (
            DropoutHead(dim, labels.classes["tone"]) if self.dropout else UtteranceLinear(dim, labels.classes, width=8)
        )

    def score(self, predictions: Mapping[str, Any], fold: Fold, split: Any) -> Score:
        manifest = fold.manifests[split]
        right = np.array([predictions[each.id]["tone"] == each.labels["tone"] for each in manifest], dtype=np.int8)
        items = {"id": list(manifest.ids), "correct": right}
        return Score(self.value(items), items)

    def value(self, items: Mapping[str, Any]) -> float:
        return 100.0 * float(np.mean(items["correct"]))


def write_corpus(folder: Path, counts: Mapping[str, int]) -> None:
    """Tones of 0.15 s to 0.45 s in noise, three classes by turns, and their manifests."""
    generator = np.random.default_rng(7)
    for split, count in counts.items():
        made = []
        for number in range(count):
            name = f"{split}-{number:03d}"
            samples = int(generator.integers(2400, 7200))
            tone = np.sin(2 * np.pi * 500 * 2 ** (number % 3) * np.arange(samples) / 16000 + generator.uniform(0, 6))
            soundfile.write(
                folder / f"{name}.wav", 0.3 * tone + 0.1 * generator.normal(size=samples), 16000, subtype="PCM_16"
            )
            made.append(Utterance(name, f"{name}.wav", 0.0, samples / 16000, {"tone": NAMES[number % 3]}))
        Manifest(made, folder, split).write(folder / f"{split}.tsv")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_corpus(folder, {"train": 30, "dev": 15, "test": 21})
    return folder


@pytest.fixture
def toy() -> SimpleNamespace:
    """The classes and makers above, for test modules (which cannot import this file)."""

    def trial(**changes: Any) -> Trial:
        values: dict[str, Any] = {
            "upstream": "toy", "upstream_revision": "random:0", "task": "toy_task", "task_version": 1, "dataset": "mini",
            "data_digest": "d", "fold": None, "protocol": "strict", "head": "dropout_head", "layer": None, "layer_norm": False,
            "feature_dtype": "float32", "upstream_options": {}, "head_options": {}, "budget": "small", "steps": 30, "batch": 6,
            "optimizer": "adam", "lr": 1e-2, "seed": 1,
        }  # fmt: skip
        return Trial(**{**values, **changes})

    make: Callable[..., Trial] = trial
    return SimpleNamespace(Upstream=ToyUpstream, Task=ToyTask, trial=make, write_corpus=write_corpus, HOP=HOP)


@pytest.fixture
def world(toy: SimpleNamespace, corpus: Path) -> Iterator[Any]:
    """A function that trains some trials of the toy task."""
    upstreams = {6: toy.Upstream()}

    def train(
        trials: list[Trial], task: Any = None, layer_norm: bool = False, dim: int = 6, **options: Any
    ) -> list[FitResult]:
        task = task or toy.Task()
        upstream = upstreams.setdefault(dim, toy.Upstream(dim=dim))
        (fold,) = task.splits(corpus)
        fold = options.pop("fold", fold)
        stores = {}
        for split, manifest in fold.manifests.items():
            stores[split] = FeatureStore(None, view=task.info.view, dtype="float32", layer_norm=layer_norm)
            stores[split].build(upstream, manifest)
        budget = dataclasses.replace(task.info.budgets["small"], **options.pop("budget", {}))
        labels = task.labels(fold.manifests["train"])
        return fit_trials(trials, task, fold, labels, stores, upstream.info, budget, **options)

    yield train
