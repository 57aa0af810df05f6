"""What KS, SID, ER and IC share: one class for each label column, read off the mean of the frames, scored by accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.base import Fold, Head, LabelSet, Prediction, Score, Split, Task
from superb_probe.downstreams.checks import unseen_problems
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance, expand_columns
from superb_probe.downstreams.support import check_options, check_predictions, choose_head, clusters
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.second_heads import UtteranceMlp

HEADS = ("utterance_linear", "mlp")
SMALL_HEADS = {"mlp": {"width": 128}}

MEAN_NOTE = (
    "the probe reads the mean over time: fbank's normalisation makes that mean zero in every utterance, so fbank is at chance here by "
    "construction; fbank_no_cmvn is the baseline that hears something"
)


class Classification(Task):
    """Which class an utterance is of, for each label column of `info.label_columns`; right when every one is."""

    def columns(self, manifest: Manifest) -> list[str]:
        """The label columns of a manifest that are asked for; "slot_*" stands for all that begin so."""
        return [column for wanted in self.info.label_columns for column in expand_columns(wanted, manifest.columns)]

    def labels(self, train: Manifest) -> LabelSet:
        """By column, the sorted labels of train."""
        return LabelSet({column: tuple(sorted(set(train.labels(column)))) for column in self.columns(train)})

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Columns that a split lacks, and labels that train does not have."""
        columns = self.columns(fold.manifests["train"])
        found = []
        for split, manifest in fold.manifests.items():
            if self.columns(manifest) != columns:
                what = f"columns {', '.join(self.columns(manifest))}, but train has {', '.join(columns)}"
                found.append(Problem(f"{split} ({manifest.name})", what, "give every split the same label columns"))
        return found or [problem for column in columns for problem in unseen_problems(fold, column)]

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """By column, the class id ()."""
        return {column: torch.tensor(names.index(utterance.labels[column])) for column, names in labels.classes.items()}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """Projector, mean over time, one linear classifier a column; "mlp" has a ReLU between the two."""
        name, rest = choose_head(self.info, options)
        kind = UtteranceMlp if name == "mlp" else UtteranceLinear
        return kind(dim, labels.classes, **check_options(self.info.name, rest, ("width",)))

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Accuracy in percent; items say which utterances are right, and in which columns where there are several."""
        manifest = fold.manifests[split]
        check_predictions(self.info.name, predictions, manifest)
        items: dict[str, Any] = {"id": list(manifest.ids), "cluster": clusters(manifest)}
        columns = self.columns(manifest)
        right = {
            column: np.asarray([predictions[each.id][column] == each.labels[column] for each in manifest], np.int8)
            for column in columns
        }
        extra = {}
        if self.info.label_columns == ("slot_*",):
            items |= {f"correct_{column}": right[column] for column in columns}
            extra = {f"accuracy_{column}": 100.0 * float(right[column].mean()) for column in columns}
        # what the site is sent, and what a confusion is counted from
        items |= {f"predicted_{column}": [predictions[each.id][column] for each in manifest] for column in columns}
        items["correct"] = np.min(list(right.values()), axis=0)
        return Score(self.value(items), items, extra)

    def value(self, items: Mapping[str, Any]) -> float:
        """Accuracy in percent."""
        return 100.0 * float(np.asarray(items["correct"], dtype=np.float64).mean())
