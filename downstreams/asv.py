"""ASV: speaker verification, an x-vector trained on the speakers of train, scored by equal error rate over trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.audio import effective_samples
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
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.mini import read_trials
from superb_probe.downstreams.speakers import balanced_trials, held_out_speakers, with_halves
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    choose_head,
    mini_fold,
    with_notes,
)
from superb_probe.probes.heads import XVector
from superb_probe.probes.metrics import eer, min_dcf
from superb_probe.probes.second_heads import EcapaTdnn

PROVIDES = ("asv",)

MIN_TRAIN_S = 2.0  # training utterances must be longer, after silence trimming
SAMPLE_RATE_HZ = 16000
ECAPA_OPTIONS = ("width", "embedding", "attention", "margin", "scale")
HEAD_OPTIONS = ("width", "pool_width", "margin", "scale", "pool_extra_frame")
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    "training crops of 8 s are cut from the states of the whole utterance; s3prl cuts the waveform",
)

INFO = TaskInfo(
    name="asv",
    version=1,
    metric="eer",
    unit="percent",
    higher_is_better=False,
    view="frames",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(
            default_lr=1e-4, select_on="test", head={"pool_extra_frame": True}, deviations=DEVIATIONS
        ),
        "mamba_hubert": ProtocolSettings(
            default_lr=1e-4,
            layer_norm=True,
            head={"pool_extra_frame": True},
            deviations=(*DEVIATIONS, "dev trials choose the checkpoint; the paper's code took the best on test"),
        ),
    },
    optimizer="adamw",
    clip=1e3,
    budgets={
        "full": Budget(steps=200_000, batch=10, accumulate=5, evaluate_every=20_000, max_crop_s=8.0),
        "small": Budget(
            steps=400,
            batch=16,
            accumulate=1,
            evaluate_every=100,
            max_crop_s=2.0,
            head={"width": 128, "pool_width": 384},
            second_heads={"ecapa": {"width": 64}},
        ),
    },
    label_columns=("speaker",),
    speakers="disjoint",
    waveform="gain_trim",
    license="VoxCeleb1: CC BY 4.0",
    citation=SUPERB_CITATION,
    published={"lr": 1e-4, "batch": "10 x 5", "updates": 200_000, "eer": {"fbank": 9.56, "hubert_base": 5.11}},
    heads=("xvector", "ecapa"),
)


class SpeakerVerification(Task):
    """Whether two utterances are of one speaker, none of whom was heard in training."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The read sentences and the trials of the embedded corpus, or of a folder laid out like it."""
        return [replace(mini_fold(root, "read"), trials=read_trials(Path(root)))]

    def label_columns(self, fold: Fold, split: str) -> tuple[str, ...]:
        """Speakers of train, and of a dev split whose trials are yet to be made; elsewhere the trials say what is the same."""
        return () if split in fold.trials else ("speaker",)

    def arrange(self, fold: Fold, protocol: str) -> Fold:
        """Short training utterances left out, and under `strict` dev trials where the corpus has none.

        Without a dev split, 5 % of the training speakers (at least 10) are held out; a speaker's only utterance is cut into
        halves. A protocol that selects on test, as SUPERB does, trains on all speakers and has no dev split.
        """
        fold = _without_short(fold)
        if self.info.protocols[protocol].select_on == "test":
            kept = {split: manifest for split, manifest in fold.manifests.items() if split != "dev"}
            note = "the best test score over learning rates and steps is reported, as SUPERB does: nothing is held out"
            return with_notes(replace(fold, manifests=kept, trials={"test": fold.trials["test"]}), note)
        if "dev" in fold.trials:
            return fold
        notes = []
        manifests = dict(fold.manifests)
        if "dev" not in manifests:
            train = manifests["train"]
            held_out = held_out_speakers(train.labels("speaker"))
            manifests["train"] = train.keep([each.id for each in train if each.labels["speaker"] not in held_out])
            manifests["dev"] = train.keep([each.id for each in train if each.labels["speaker"] in held_out])
            notes.append(f"dev: {len(held_out)} speakers held out of train by a seeded hash ({', '.join(held_out)})")
        manifests["dev"], cut = with_halves(manifests["dev"])
        trials = balanced_trials(manifests["dev"])
        targets = int(trials.labels.sum())
        notes.append(
            f"dev: {len(trials)} trials made, {targets} of one speaker; {cut} single utterances cut into halves"
        )
        arranged = replace(fold, manifests=manifests, trials={**fold.trials, "dev": trials})
        return with_notes(arranged, *notes)

    def labels(self, train: Manifest) -> LabelSet:
        """The speakers of train, sorted."""
        return LabelSet({"speaker": tuple(sorted(set(train.labels("speaker"))))})

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """The speaker's number ()."""
        return {"speaker": torch.tensor(labels.classes["speaker"].index(utterance.labels["speaker"]))}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """An x-vector with additive-margin softmax; "ecapa" is speechbrain's ECAPA-TDNN, with the same objective."""
        name, rest = choose_head(INFO, options)
        num_speakers = len(labels.classes["speaker"])
        if name == "ecapa":
            return EcapaTdnn(dim, num_speakers, **check_options("asv", rest, ECAPA_OPTIONS))
        return XVector(dim, num_speakers, **check_options("asv", rest, HEAD_OPTIONS))

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Equal error rate in percent over the split's trials, scored by the cosine of two embeddings."""
        manifest, trials = fold.manifests[split], fold.trials[split]
        check_predictions("asv", predictions, manifest)
        vectors = {name: _unit(np.asarray(vector, dtype=np.float64)) for name, vector in predictions.items()}
        pairs = list(zip(trials.ids_a, trials.ids_b, strict=True))
        speaker = {utterance.id: utterance.labels.get("speaker", "") or utterance.id for utterance in manifest}
        items: dict[str, Any] = {
            "id": [f"{a} {b}" for a, b in pairs],
            "label": np.asarray(trials.labels),
            "score": np.asarray([float(vectors[a] @ vectors[b]) for a, b in pairs]),
            "cluster_a": [speaker[a] for a, _ in pairs],
            "cluster_b": [speaker[b] for _, b in pairs],
        }
        return Score(self.value(items), items, {"min_dcf": min_dcf(items["label"], items["score"])})

    def value(self, items: Mapping[str, Any]) -> float:
        """Equal error rate in percent."""
        return 100.0 * eer(items["label"], items["score"])[0]


def asv() -> Task:
    """The task as SUPERB sets it: VoxCeleb1, additive-margin softmax, cosine scoring without normalisation."""
    return SpeakerVerification()


def _unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The vector at length one; one of zeros (every unit of the ReLU off) stays, and is like nothing."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _without_short(fold: Fold) -> Fold:
    """The fold without training utterances of 2 s or less after trimming, and a note that says how many."""
    train = fold.manifests["train"]
    lengths = {each.id: effective_samples(each, train, INFO.waveform, SAMPLE_RATE_HZ) for each in train}
    kept = train.keep([name for name, samples in lengths.items() if samples > MIN_TRAIN_S * SAMPLE_RATE_HZ])
    left_out = len(train) - len(kept)
    if not left_out:
        return fold
    lost = len(set(train.labels("speaker"))) - len(set(kept.labels("speaker")))
    note = f"train: {left_out} of {len(train)} utterances of {MIN_TRAIN_S:g} s or less after trimming left out, {lost} speakers"
    return with_notes(replace(fold, manifests={**fold.manifests, "train": kept}), note)
