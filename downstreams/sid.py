"""SID: speaker identification, which of the training speakers talks, one linear classifier on the mean of the frames."""

from __future__ import annotations

from pathlib import Path

from superb_probe.downstreams.base import Budget, Fold, ProtocolSettings, Task, TaskInfo
from superb_probe.downstreams.classification import HEADS, MEAN_NOTE, SMALL_HEADS, Classification
from superb_probe.downstreams.support import COMMON_DEVIATIONS, SUPERB_CITATION, mini_fold

PROVIDES = ("sid",)

CROP_S = 8.0  # longest stretch of a training utterance; dev and test are heard whole
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    (
        "where crops are kept (in any protocol but superb, or with --crops K), those of a training utterance longer than 8 s are "
        "encoded once and drawn from; s3prl cuts anew at every access"
    ),
)

INFO = TaskInfo(
    name="sid",
    version=1,
    metric="accuracy",
    unit="percent",
    higher_is_better=True,
    view="mean",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(default_lr=1e-1, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=200_000, batch=8, accumulate=4, evaluate_every=5000, max_crop_s=CROP_S, crops=2),
        "small": Budget(
            steps=2000,
            batch=256,
            accumulate=1,
            evaluate_every=200,
            max_crop_s=CROP_S,
            crops=2,
            head={"width": 128},
            second_heads=SMALL_HEADS,
        ),
    },
    label_columns=("speaker",),
    speakers="shared",
    license="VoxCeleb1: CC BY 4.0",
    citation=SUPERB_CITATION,
    published={
        "lr": "1e-4 by default; HuBERT Base's 81.42 needs 1e-1 (67.37 with 1e-4)",
        "batch": "8 x 4",
        "updates": 200_000,
        "accuracy": {"fbank_no_cmvn": 20.06, "hubert_base": 81.42, "wavlm_large": 95.49},
    },
    heads=HEADS,
    notes=(MEAN_NOTE,),
)


class SpeakerIdentification(Classification):
    """Who talks, among the speakers of train; every speaker is in all splits, with other utterances."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """Read sentences of the training speakers of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "speakers_id")]


def sid() -> Task:
    """The task as SUPERB sets it: VoxCeleb1, 1251 speakers, the official split by utterances."""
    return SpeakerIdentification()
