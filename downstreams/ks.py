"""KS: keyword spotting, which of twelve words is said, one linear classifier on the mean of the frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from superb_probe.downstreams.base import (
    Budget,
    Fold,
    LabelSet,
    Prediction,
    ProtocolSettings,
    S3prlBatches,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.classification import HEADS, MEAN_NOTE, SMALL_HEADS, Classification
from superb_probe.downstreams.manifest import Manifest, Problem
from superb_probe.downstreams.support import COMMON_DEVIATIONS, SUPERB_CITATION, mini_fold

PROVIDES = ("ks",)

UNKNOWN, SILENCE = "_unknown_", "_silence_"
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", UNKNOWN, SILENCE)

DEVIATIONS = (
    *COMMON_DEVIATIONS,
    "the mean of the classes' accuracies on dev selects: what s3prl's class-balanced random draw from dev gives on average",
    (
        "silence is pieces of one second of the noise files, cut once, those of train and dev apart; s3prl draws a new second of "
        "every file at each access, in train and in dev"
    ),
)

INFO = TaskInfo(
    name="ks",
    version=1,
    metric="accuracy",
    unit="percent",
    higher_is_better=True,
    view="mean",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4, select_metric="balanced_accuracy"),
        "superb": ProtocolSettings(default_lr=1e-4, select_metric="balanced_accuracy", deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(
            default_lr=1e-4, layer_norm=True, select_metric="balanced_accuracy", deviations=DEVIATIONS
        ),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=200_000, batch=32, accumulate=1, evaluate_every=5000, balance="keyword"),
        "small": Budget(
            steps=2000,
            batch=256,
            accumulate=1,
            evaluate_every=200,
            balance="keyword",
            head={"width": 128},
            second_heads=SMALL_HEADS,
        ),
    },
    label_columns=("keyword",),
    speakers="disjoint",
    waveform="gain",
    license="Speech Commands v0.01: CC BY 4.0",
    citation=SUPERB_CITATION,
    published={
        "lr": 1e-4,
        "batch": 32,
        "updates": 200_000,
        "accuracy": {"fbank_no_cmvn": 41.38, "hubert_base": 96.30, "wavlm_large": 97.86},
    },
    heads=HEADS,
    s3prl_batches=S3prlBatches(evaluation=32),
    notes=(
        MEAN_NOTE,
        "training draws the classes equally often, with replacement; what selects on dev is the mean of the classes' accuracies",
    ),
)


class KeywordSpotting(Classification):
    """Which word is said: ten keywords, any other word, or no word at all."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The single words of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "words")]

    def labels(self, train: Manifest) -> LabelSet:
        """SUPERB's twelve classes in its order; for anyone's own data, the sorted keywords of train."""
        return LabelSet({"keyword": KEYWORDS}) if train.corpus else super().labels(train)

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Keywords that are no class: in a known corpus, those outside the twelve; elsewhere, those that train lacks."""
        if not fold.manifests["train"].corpus:
            return super().label_problems(fold)
        found = []
        for split, manifest in fold.manifests.items():
            foreign = sorted(set(manifest.labels("keyword")) - set(KEYWORDS))
            if foreign:
                what = f"keywords outside the twelve classes: {', '.join(foreign)}"
                found.append(Problem(f"{split} ({manifest.name})", what, f"any other word is {UNKNOWN}"))
        return found

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Accuracy in percent; what selects is the mean of the classes' accuracies, as s3prl's balanced draw from dev expects."""
        score = super().score(predictions, fold, split)
        keywords = fold.manifests[split].labels("keyword")
        right: dict[str, list[int]] = {}
        for keyword, correct in zip(keywords, score.items["correct"], strict=True):
            right.setdefault(keyword, []).append(int(correct))
        balanced = 100.0 * fmean(fmean(each) for each in right.values())
        return Score(score.value, score.items, {"balanced_accuracy": balanced}, selects=balanced)


def ks() -> Task:
    """The task as SUPERB sets it: Speech Commands v0.01, ten keywords, unknown and silence."""
    return KeywordSpotting()
