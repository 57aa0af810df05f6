"""PR: phoneme recognition, a linear layer and CTC, scored by phone error rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superb_probe.downstreams.base import (
    Budget,
    Fold,
    Head,
    LabelSet,
    Prediction,
    ProtocolSettings,
    S3prlBatches,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    clusters,
    mini_fold,
    rate,
)
from superb_probe.downstreams.vocabulary import read_vocabulary, unknown_tokens
from superb_probe.probes.heads import FrameCtc
from superb_probe.probes.metrics import edit_distance

PROVIDES = ("pr",)

SPECIALS = ("<pad>", "<eos>", "<unk>")  # <pad> is the CTC blank
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    (
        "an epoch visits every utterance once in batches of similar length; s3prl takes windows of 16 neighbours in a list sorted by "
        "label length, which overlap, and halves those that begin with more than 18.75 s"
    ),
)

INFO = TaskInfo(
    name="pr",
    version=1,
    metric="per",
    unit="percent",
    higher_is_better=False,
    view="frames",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-2),
        "superb": ProtocolSettings(default_lr=1e-2, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(
            default_lr=1e-4, layer_norm=True, batch=8, accumulate=4, deviations=DEVIATIONS
        ),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=100_000, batch=16, accumulate=2, evaluate_every=1000),
        "small": Budget(steps=1000, batch=16, accumulate=1, evaluate_every=100, head={"width": 128}),
    },
    label_columns=("phones",),
    speakers="disjoint",
    license="LibriSpeech: CC BY 4.0",
    citation=SUPERB_CITATION,
    published={"lr": 1e-2, "batch": "16 x 2", "updates": 100_000, "per": {"fbank": 82.01, "hubert_base": 5.41}},
    s3prl_batches=S3prlBatches("label_windows"),
)


class PhonemeRecognition(Task):
    """Which phones are said, stress included where the corpus marks it."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The read sentences of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "read")]

    def labels(self, train: Manifest) -> LabelSet:
        """Three special tokens and the published 71 symbols; for anyone's own data, the sorted phones of train."""
        if train.corpus:
            return LabelSet({"tokens": SPECIALS + read_vocabulary("phonemes")})
        seen = {phone for phones in train.labels("phones") for phone in phones.split()}
        return LabelSet({"tokens": SPECIALS + tuple(sorted(seen))})

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Phones that the vocabulary lacks."""
        return unknown_tokens(fold, "phones", self.labels(fold.manifests["train"]).classes["tokens"], str.split)

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """The phones and the end token: ids (phones + 1,)."""
        number = {token: index for index, token in enumerate(labels.classes["tokens"])}
        return {"tokens": torch.tensor([number[phone] for phone in (*utterance.labels["phones"].split(), "<eos>")])}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """Projector and linear layer, frame by frame."""
        return FrameCtc(dim, labels.classes["tokens"], drop=("<eos>",), **check_options("pr", options, ("width",)))

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Phone error rate in percent over the split; items count edits and reference phones."""
        manifest = fold.manifests[split]
        check_predictions("pr", predictions, manifest)
        references = [phones.split() for phones in manifest.labels("phones")]
        hypotheses = [list(predictions[name]) for name in manifest.ids]
        items: dict[str, Any] = {
            "id": list(manifest.ids),
            "cluster": clusters(manifest),
            "edits": [edit_distance(*pair) for pair in zip(references, hypotheses, strict=True)],
            "phones": [len(reference) for reference in references],
            "reference": [" ".join(reference) for reference in references],
            "hypothesis": [" ".join(hypothesis) for hypothesis in hypotheses],
        }
        return Score(self.value(items), items)

    def value(self, items: Mapping[str, Any]) -> float:
        """Phone error rate in percent: edits over reference phones, both summed."""
        return rate(items, "edits", "phones")


def pr() -> Task:
    """The task as SUPERB sets it: LibriSpeech 100 h, phones of its lexicon."""
    return PhonemeRecognition()
