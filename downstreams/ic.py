"""IC: intent classification, one linear classifier a slot on the mean of the frames, right when every slot is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.base import (
    Budget,
    Fold,
    Head,
    LabelSet,
    Prediction,
    ProtocolSettings,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.checks import unseen_problems
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance, expand_columns
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    clusters,
    mini_fold,
)
from superb_probe.probes.heads import UtteranceLinear

PROVIDES = ("ic",)

DEVIATIONS = (*COMMON_DEVIATIONS, "class ids are sorted by name; s3prl numbers them as they first appear in train")

INFO = TaskInfo(
    name="ic",
    version=1,
    metric="accuracy",
    unit="percent",
    higher_is_better=True,
    view="mean",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(default_lr=1e-4, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=200_000, batch=32, accumulate=1, evaluate_every=5000),
        "small": Budget(steps=2000, batch=32, accumulate=1, evaluate_every=200, head={"width": 128}),
    },
    label_columns=("slot_*",),
    speakers="disjoint",
    license="Fluent Speech Commands: academic use, see its licence",
    citation=SUPERB_CITATION,
    published={"lr": 1e-4, "batch": 32, "updates": 200_000, "accuracy": {"fbank_no_cmvn": 9.65, "hubert_base": 98.34}},
)


class IntentClassification(Task):
    """What a spoken command asks for, slot by slot; "none" is a class of its own."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The spoken commands of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "commands")]

    def labels(self, train: Manifest) -> LabelSet:
        """By slot, the sorted values of train."""
        return LabelSet(
            {slot: tuple(sorted(set(train.labels(slot)))) for slot in expand_columns("slot_*", train.columns)}
        )

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Slots that a split lacks, and values that train does not have."""
        slots = expand_columns("slot_*", fold.manifests["train"].columns)
        found = []
        for split, manifest in fold.manifests.items():
            if expand_columns("slot_*", manifest.columns) != slots:
                what = (
                    f"slots {', '.join(expand_columns('slot_*', manifest.columns))}, but train has {', '.join(slots)}"
                )
                found.append(Problem(f"{split} ({manifest.name})", what, "give every split the same slot columns"))
        return found or [problem for slot in slots for problem in unseen_problems(fold, slot)]

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """By slot, the class id ()."""
        return {slot: torch.tensor(names.index(utterance.labels[slot])) for slot, names in labels.classes.items()}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """Projector, mean over time, one linear classifier a slot."""
        return UtteranceLinear(dim, labels.classes, **check_options("ic", options, ("width",)))

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Accuracy in percent, all slots right; items say which utterances and which slots are."""
        manifest = fold.manifests[split]
        check_predictions("ic", predictions, manifest)
        slots = expand_columns("slot_*", manifest.columns)
        items: dict[str, Any] = {"id": list(manifest.ids), "cluster": clusters(manifest)}
        for slot in slots:
            right = [predictions[utterance.id][slot] == utterance.labels[slot] for utterance in manifest]
            items[f"correct_{slot}"] = np.asarray(right, dtype=np.int8)
        items["correct"] = np.min([items[f"correct_{slot}"] for slot in slots], axis=0)
        extra = {f"accuracy_{slot}": 100.0 * float(items[f"correct_{slot}"].mean()) for slot in slots}
        return Score(self.value(items), items, extra)

    def value(self, items: Mapping[str, Any]) -> float:
        """Accuracy in percent."""
        return 100.0 * float(np.asarray(items["correct"], dtype=np.float64).mean())


def ic() -> Task:
    """The task as SUPERB sets it: Fluent Speech Commands, action, object and location."""
    return IntentClassification()
