"""IC: intent classification, one linear classifier a slot on the mean of the frames, right when every slot is."""

from __future__ import annotations

from pathlib import Path

from superb_probe.downstreams.base import Budget, Fold, ProtocolSettings, S3prlBatches, Task, TaskInfo
from superb_probe.downstreams.classification import HEADS, MEAN_NOTE, SMALL_HEADS, Classification
from superb_probe.downstreams.support import COMMON_DEVIATIONS, SUPERB_CITATION, mini_fold

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
        # a batch of 32 makes updates on badly scaled means (raw log-mel) a matter of luck
        "small": Budget(
            steps=2000, batch=256, accumulate=1, evaluate_every=200, head={"width": 128}, second_heads=SMALL_HEADS
        ),
    },
    label_columns=("slot_*",),
    speakers="disjoint",
    license="Fluent Speech Commands: academic use, see its licence",
    citation=SUPERB_CITATION,
    published={"lr": 1e-4, "batch": 32, "updates": 200_000, "accuracy": {"fbank_no_cmvn": 9.65, "hubert_base": 98.34}},
    heads=HEADS,
    s3prl_batches=S3prlBatches(evaluation=32),
    notes=(MEAN_NOTE,),
)


class IntentClassification(Classification):
    """What a spoken command asks for, slot by slot; "none" is a class of its own, and the loss is the sum over slots."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The spoken commands of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "commands")]


def ic() -> Task:
    """The task as SUPERB sets it: Fluent Speech Commands, action, object and location."""
    return IntentClassification()
