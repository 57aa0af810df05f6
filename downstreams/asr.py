"""ASR: speech recognition, characters by a BLSTM and CTC, scored by word error rate."""

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
from superb_probe.probes.heads import BlstmCtc, SpecAugment
from superb_probe.probes.metrics import edit_distance

PROVIDES = ("asr",)

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's dictionary: <s> is the CTC blank
WORD_END = "|"
HEAD_OPTIONS = ("width", "projection", "num_layers", "dropout", "augment")
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    (
        "an epoch visits every utterance once in batches of similar length; s3prl shuffles fixed batches of 16 neighbours in a list "
        "sorted by length"
    ),
    "no language model row",
)

INFO = TaskInfo(
    name="asr",
    version=1,
    metric="wer",
    unit="percent",
    higher_is_better=False,
    view="frames",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(default_lr=1e-4, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        # s3prl asks for 32 and gets 16: its "halve if longer than" is in frames, its lengths in samples
        "full": Budget(steps=200_000, batch=16, accumulate=1, evaluate_every=2000),
        "small": Budget(steps=1000, batch=8, accumulate=1, evaluate_every=200, head={"width": 128, "augment": "none"}),
    },
    label_columns=("text",),
    speakers="disjoint",
    license="LibriSpeech: CC BY 4.0",
    citation=SUPERB_CITATION,
    published={
        "lr": 1e-4,
        "batch": "32 asked for, 16 real",
        "updates": 200_000,
        "wer": {"fbank": 23.18, "hubert_base": 6.42},
    },
)


class AutomaticSpeechRecognition(Task):
    """Which words are said: 28 characters, word ends included, an end token, and three special ones."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The read sentences of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "read")]

    def labels(self, train: Manifest) -> LabelSet:
        """The published 32 tokens; for text they cannot write, the special ones and the sorted characters of train."""
        published = read_vocabulary("characters")
        seen = {character for text in train.labels("text") for character in spell(text)}
        own = seen.issubset(published)
        return LabelSet({"tokens": SPECIALS + (published if own else tuple(sorted(seen)))})

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Characters of dev or test that the vocabulary lacks."""
        return unknown_tokens(fold, "text", self.labels(fold.manifests["train"]).classes["tokens"], spell)

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """The characters, a word end after every word, and the end token: ids (characters + 1,)."""
        number = {token: index for index, token in enumerate(labels.classes["tokens"])}
        return {"tokens": torch.tensor([number[token] for token in (*spell(utterance.labels["text"]), "</s>")])}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """Two bidirectional LSTM layers with CTC; "augment" is "superb" (SpecAugment, the default) or "none"."""
        chosen = check_options("asr", options, HEAD_OPTIONS)
        augment = chosen.pop("augment", "superb")
        if augment not in ("superb", "none"):
            check_options("asr", {augment: None}, ("superb", "none"))
        drawn = int(torch.randint(2**31 - 1, ()))  # its own stream, from the generator the head is drawn from
        masks = SpecAugment(torch.Generator().manual_seed(drawn)) if augment == "superb" else None
        return BlstmCtc(dim, labels.classes["tokens"], drop=("</s>",), augment=masks, **chosen)

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Word error rate in percent over the split; items count edits and reference words and characters."""
        manifest = fold.manifests[split]
        check_predictions("asr", predictions, manifest)
        references = [normalise(text) for text in manifest.labels("text")]
        hypotheses = [unspell(predictions[name]) for name in manifest.ids]
        pairs = list(zip(references, hypotheses, strict=True))
        items: dict[str, Any] = {
            "id": list(manifest.ids),
            "cluster": clusters(manifest),
            "edits": [edit_distance(reference.split(), hypothesis.split()) for reference, hypothesis in pairs],
            "words": [len(reference.split()) for reference in references],
            "character_edits": [edit_distance(reference, hypothesis) for reference, hypothesis in pairs],
            "characters": [len(reference) for reference in references],
            "reference": references,
            "hypothesis": hypotheses,
        }
        return Score(self.value(items), items, {"cer": rate(items, "character_edits", "characters")})

    def value(self, items: Mapping[str, Any]) -> float:
        """Word error rate in percent: edits over reference words, both summed."""
        return rate(items, "edits", "words")


def asr() -> Task:
    """The task as SUPERB sets it: LibriSpeech 100 h, no language model."""
    return AutomaticSpeechRecognition()


def normalise(text: str) -> str:
    """The text as it is scored: upper case, words parted by single spaces.

    >>> normalise(" how  are you")
    'HOW ARE YOU'
    """
    return " ".join(text.upper().split())


def spell(text: str) -> list[str]:
    """The tokens of a text: its characters, and a word end after every word.

    >>> spell("as is")
    ['A', 'S', '|', 'I', 'S', '|']
    """
    return [token for word in normalise(text).split() for token in (*word, WORD_END)]


def unspell(tokens: list[str]) -> str:
    """The text of some tokens.

    >>> unspell(["A", "S", "|", "I", "S", "|"])
    'AS IS'
    """
    return " ".join("".join(tokens).replace(WORD_END, " ").split())
