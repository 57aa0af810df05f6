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
    S3prlBatches,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.language_model import (
    BlstmCtcLm,
    Emissions,
    FrameCtcLm,
    LexiconDecoder,
    lm_options,
    load_decoder,
)
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    choose_head,
    clusters,
    mini_fold,
    rate,
)
from superb_probe.downstreams.vocabulary import read_vocabulary, unknown_tokens
from superb_probe.probes.heads import BlstmCtc, FrameCtc, SpecAugment
from superb_probe.probes.metrics import edit_distance, wer

PROVIDES = ("asr",)

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's dictionary: <s> is the CTC blank
WORD_END = "|"
HEAD_OPTIONS = ("width", "projection", "num_layers", "dropout", "augment")
LM_OPTIONS = ("lm", "lexicon")
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    (
        "an epoch visits every utterance once in batches of similar length; s3prl shuffles fixed batches of 16 neighbours in a list "
        "sorted by length"
    ),
    "with lm=FILE the words are those of the language model, not of fairseq's lexicon, unless lexicon=FILE is given",
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
        "small": Budget(
            steps=1000,
            batch=8,
            accumulate=1,
            evaluate_every=125,
            head={"width": 128, "augment": "none"},
            second_heads={"linear": {"width": 128}},
        ),
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
        "wer_with_lm": {"fbank": 15.21, "hubert_base": 4.79},
    },
    heads=("blstm_ctc", "linear"),
    s3prl_batches=S3prlBatches("length_buckets"),
    notes=(
        (
            "Head option lm=FILE (ARPA or KenLM's binary form; pip install 'superb-probe[lm]') decodes the test split with a language "
            "model, beam 5, weight 2, word score -1 as SUPERB; the update is still chosen by greedy decoding of dev."
        ),
        (
            "On the embedded corpus compare the character error rate (`cer`) too: a probe that only ever says THE has 92 % word "
            "errors and 89 % character errors there."
        ),
    ),
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
        """Two bidirectional LSTM layers with CTC, or "linear": one projector and one linear layer.

        Option "augment" is "superb" (SpecAugment, the default) or "none"; "lm" is the file of a language model, "lexicon" of its
        words.
        """
        name, given = choose_head(INFO, options)
        tokens = labels.classes["tokens"]
        known = ("width",) if name == "linear" else HEAD_OPTIONS
        lm, lexicon, chosen = lm_options(check_options("asr", given, (*known, *LM_OPTIONS)))
        decoder = None if lm is None else load_decoder(lm, tokens, lexicon)
        if name == "linear":
            linear = FrameCtc if decoder is None else FrameCtcLm
            return _with_decoder(linear(dim, tokens, drop=("</s>",), **chosen), decoder)
        augment = chosen.pop("augment", "superb")
        if augment not in ("superb", "none"):
            check_options("asr", {augment: None}, ("superb", "none"))
        drawn = int(torch.randint(2**31 - 1, ()))  # its own stream, from the generator the head is drawn from
        masks = SpecAugment(torch.Generator().manual_seed(drawn)) if augment == "superb" else None
        recurrent = BlstmCtc if decoder is None else BlstmCtcLm
        return _with_decoder(recurrent(dim, tokens, drop=("</s>",), augment=masks, **chosen), decoder)

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Word error rate in percent over the split; items count edits and reference words and characters.

        With a language model, test is scored by its words, and `extra["wer_greedy"]` is the rate without it.
        """
        manifest = fold.manifests[split]
        check_predictions("asr", predictions, manifest)
        references = [normalise(text) for text in manifest.labels("text")]
        said = [predictions[name] for name in manifest.ids]
        greedy = [unspell(list(each.tokens) if isinstance(each, Emissions) else each) for each in said]
        searched = split == "test" and any(isinstance(each, Emissions) for each in said)
        hypotheses = [normalise(" ".join(each.words())) for each in said] if searched else greedy
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
        extra = {"cer": rate(items, "character_edits", "characters")}
        if searched:
            extra["wer_greedy"] = 100.0 * wer(references, greedy)
        return Score(self.value(items), items, extra)

    def value(self, items: Mapping[str, Any]) -> float:
        """Word error rate in percent: edits over reference words, both summed."""
        return rate(items, "edits", "words")


def asr() -> Task:
    """The task as SUPERB sets it: LibriSpeech 100 h, no language model."""
    return AutomaticSpeechRecognition()


def _with_decoder(head: Head, decoder: LexiconDecoder | None) -> Head:
    if isinstance(head, (BlstmCtcLm, FrameCtcLm)) and decoder is not None:
        head.decoder = decoder
    return head


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
