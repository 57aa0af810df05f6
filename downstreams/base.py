"""What a task is: the question asked of the states, in the words every task shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from superb_probe.downstreams.manifest import Manifest, Problem, Trials, Utterance

Split = Literal["train", "dev", "test"]
View = Literal["mean", "frames"]
Protocol = Literal["strict", "superb", "mamba_hubert"]
Prediction = Any  # what a head's `predict` gives for one utterance: an embedding, a list of ids, a dict of class names


@dataclass(frozen=True, slots=True)
class Budget:
    """How much training one probe gets.

    Attributes:
        steps: optimiser updates.
        batch: utterances in a batch.
        accumulate: batches summed into one update; the loss is divided by it.
        evaluate_every: updates between evaluations on dev.
        max_crop_s: longest stretch of an utterance seen in training (a random crop); None for all of it. With view "mean" the
            waveform is cropped before it is encoded.
        crops: with view "mean", random crops of a longer utterance that are encoded and drawn from.
        balance: the target whose classes are drawn equally often, with replacement; "" visits every utterance once an epoch.
        head: widths of the default head and other options that `Task.head` takes.
        second_heads: the options of every other head, by its name.
    """

    steps: int
    batch: int
    accumulate: int
    evaluate_every: int
    max_crop_s: float | None = None
    crops: int = 1
    balance: str = ""
    head: Mapping[str, Any] = field(default_factory=dict)
    second_heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_head(self, name: str) -> Budget:
        """The same training of a second head: `head` holds its name and its own options only.

        >>> budget = Budget(10, 4, 1, 5, head={"width": 256}, second_heads={"mlp": {"width": 64}})
        >>> budget.for_head("mlp").head
        {'head': 'mlp', 'width': 64}
        """
        return replace(self, head={"head": name, **self.second_heads.get(name, {})})


@dataclass(frozen=True, slots=True)
class ProtocolSettings:
    """What one protocol fixes for a task, where it differs from the task's defaults.

    Attributes:
        lr_grid: learning rates tried when none is given.
        default_lr: the rate of the published configuration.
        layer_norm: per-frame layer normalisation before the weighted sum.
        batch: utterances in a batch; None keeps the budget's.
        accumulate: batches an update; None keeps the budget's.
        select_on: the split that chooses learning rate and step ("dev"; "test" only where SUPERB itself does).
        select_metric: what chooses them there, where it is not the task's metric: what `Score.selects` holds.
        head: options for `Task.head`, e.g. {"pool_extra_frame": True}.
        deviations: what still differs from the published code, for the record.
    """

    lr_grid: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    default_lr: float = 1e-4
    layer_norm: bool = False
    batch: int | None = None
    accumulate: int | None = None
    select_on: Split = "dev"
    select_metric: str | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class S3prlBatches:
    """How s3prl puts the batches of a task together, which counts where states depend on the batch (`--padding s3prl`).

    Attributes:
        train: "shuffled"; "label_windows", as many neighbours in the order of label length; or "length_buckets", neighbours in the
            order of audio length.
        evaluation: utterances in a batch of dev and test, in the order of the manifest.
    """

    train: Literal["shuffled", "label_windows", "length_buckets"] = "shuffled"
    evaluation: int = 1


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What must be known of a task before it is run.

    Attributes:
        name: the registered name.
        version: raised whenever a number can change.
        metric: e.g. "eer"; `unit` is "percent" for all metrics that are rates.
        unit: unit of the metric.
        higher_is_better: direction of the metric.
        view: what the probe reads: "mean" where the head is linear up to its mean over time, else "frames".
        protocols: the settings of each protocol the task can run under.
        optimizer: "adam" or "adamw".
        clip: largest gradient norm.
        budgets: "small" and "full".
        label_columns: manifest columns it needs; "slot_*" means one or more.
        speakers: "disjoint" when no two splits may share a speaker, "test_disjoint" when only test is apart, else "shared".
        trained: False for tasks without a probe (QbE).
        waveform: effects applied to every waveform first: "none", "gain" (sox gain -3) or "gain_trim" (that and silence trimming).
        license: of the protocol's corpus.
        citation: the paper to cite.
        published: published settings and scores worth printing, by name.
        dataset: the data a run uses when none is named.
        heads: names of the heads `Task.head` builds, the default first; empty where there is one.
        notes: what a reader of the scores must know.
        resample: whether audio of another rate is converted (QbE: its corpus is published at 8 kHz) instead of refused.
        s3prl_batches: which utterances hear each other's padding in s3prl.
    """

    name: str
    version: int
    metric: str
    unit: str
    higher_is_better: bool
    view: View
    protocols: Mapping[str, ProtocolSettings]
    optimizer: str
    clip: float
    budgets: Mapping[str, Budget]
    label_columns: tuple[str, ...]
    speakers: Literal["disjoint", "test_disjoint", "shared"]
    trained: bool = True
    waveform: str = "none"
    license: str = ""
    citation: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = "mini"
    heads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    resample: bool = False
    s3prl_batches: S3prlBatches = S3prlBatches()


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The classes of a task, fixed before training.

    Attributes:
        classes: by slot ("speaker", "slot_action", "token"), the class names in id order.
    """

    classes: Mapping[str, tuple[str, ...]]

    def sizes(self) -> dict[str, int]:
        """Number of classes of each slot."""
        return {slot: len(names) for slot, names in self.classes.items()}


@dataclass(frozen=True, slots=True)
class Fold:
    """One partition of a corpus: a manifest for each split, and trials where verification needs them.

    Attributes:
        name: None where a task has a single fold.
        manifests: by split.
        trials: by split ("dev", "test"); empty for most tasks.
        notes: what was made, left out or could not be checked while arranging it: for the output and the record.
        protocol: under which `Task.arrange` arranged it, where the task's targets or scores depend on that.
    """

    name: str | None
    manifests: Mapping[str, Manifest]
    trials: Mapping[str, Trials] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    protocol: str = "strict"


@dataclass(frozen=True, slots=True)
class FrameGrid:
    """The frames that an encoder gives, for tasks whose targets or scores have times.

    Attributes:
        hop_samples: samples between frames.
        sample_rate_hz: of the waveforms.
        num_frames: by utterance id, the frames of its states.
    """

    hop_samples: int
    sample_rate_hz: int
    num_frames: Mapping[str, int]

    @property
    def hop_s(self) -> float:
        """Seconds between frames.

        >>> FrameGrid(320, 16000, {}).hop_s
        0.02
        """
        return self.hop_samples / self.sample_rate_hz


@dataclass(frozen=True, slots=True)
class Batch:
    """What a head's loss needs beside its outputs.

    Attributes:
        ids: B utterance ids.
        num_frames: (B,) valid frames of each row.
        targets: what `Task.target` gave for each utterance, collated: equal-length rows are stacked (B, ...); sequences are
            padded with -1 to (B, longest) beside their "<name>_lengths".
    """

    ids: tuple[str, ...]
    num_frames: Tensor
    targets: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """A metric and what it is made of.

    Attributes:
        value: the metric.
        items: per item (utterance, trial), named columns of equal length, enough to compute the metric again; "id" names the items
            and "cluster" (the speaker, where known) says which belong together.
        extra: further metrics, e.g. {"min_dcf": 0.41}.
        selects: what chooses the update instead of the metric, in the metric's direction (SD under "superb"); None: the metric.
    """

    value: float
    items: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]
    extra: Mapping[str, float] = field(default_factory=dict)
    selects: float | None = None


class Head(nn.Module, ABC):
    """What is trained on the weighted sum.

    Attributes:
        min_frames: fewest frames an utterance must have.
        joins_batches: whether the batches of one update may go through as one: the loss is a mean over utterances that do not see
            each other, nothing is drawn at random, and `forward` also takes `longest`, (B,) the frames of the longest utterance in
            each one's own batch.
    """

    min_frames: int = 1
    joins_batches: bool = False

    @abstractmethod
    def forward(self, frames: Tensor, num_frames: Tensor) -> Any:
        """Outputs for a batch: frames (B, T, D) zero past num_frames (B,)."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The training loss, a scalar; parameters of the objective (AM-softmax) belong to the head."""

    @abstractmethod
    def predict(self, outputs: Any) -> list[Any]:
        """One prediction an utterance, free of padding, ready for `Task.score`: class names, text or an embedding array."""


class Task(ABC):
    """A question asked of the states: which utterances, which head, which number."""

    info: TaskInfo

    @abstractmethod
    def splits(self, root: Path) -> list[Fold]:
        """One Fold, or several (ER: five), of the corpus at `root`."""

    def folds_of(self, whole: Manifest) -> list[Fold]:
        """The folds of one undivided manifest (`--manifest train=...` alone), where the task cross-validates; else none."""
        return []

    def arrange(self, fold: Fold, protocol: str) -> Fold:
        """The fold as the protocol uses it: speakers held out, trials made, utterances left out, each told in `Fold.notes`."""
        return fold

    def bind(self, fold: Fold, grid: FrameGrid) -> Task:
        """The task as it is asked of one encoder's frames; what `target` and `score` are then called on.

        Only a task whose labels have times (SD) differs by the encoder.
        """
        return self

    def tuned_by(self, score: Score) -> Task:
        """The task with what is tuned on dev (a threshold) as a score there chose it; the test split is scored by that."""
        return self

    def label_columns(self, fold: Fold, split: str) -> tuple[str, ...]:
        """Label columns that a split must have and fill in; "slot_*" means one or more."""
        return self.info.label_columns

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Labels that this task cannot use: a class that train lacks, a character outside the vocabulary."""
        return []

    @abstractmethod
    def labels(self, train: Manifest) -> LabelSet:
        """The classes, from the training manifest (or fixed by the protocol)."""

    @abstractmethod
    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """The training target of one utterance."""

    @abstractmethod
    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """A new head for states of width `dim`; `options` are the budget's and the protocol's (an unknown one is an error).

        The option "head" names one of `info.heads`; without it, it is the first (`support.choose_head` reads it).
        """

    @abstractmethod
    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """The metric over one split, from a prediction for every utterance of it."""

    @abstractmethod
    def value(self, items: Mapping[str, Any]) -> float:
        """The metric computed again from (resampled) item columns: what the bootstrap calls."""
