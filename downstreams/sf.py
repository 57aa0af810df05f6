"""SF: slot filling, characters and slot tags by a BLSTM and CTC, scored by slot-type F1 and the error rate of slot values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
from superb_probe.errors import RequestError
from superb_probe.probes.heads import BlstmCtc, SpecAugment
from superb_probe.probes.metrics import UndefinedMetric, slot_type_f1, slot_value_pairs

PROVIDES = ("sf",)

SPECIALS = ("<pad>", "<eos>", "<unk>")  # <pad> is the CTC blank
OUTSIDE = "O"
PUNCTUATION = "?!.,;-"  # words that are left out
HEAD_OPTIONS = ("width", "projection", "num_layers", "dropout", "augment")
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    (
        "an epoch visits every utterance once in batches of similar length; s3prl takes windows of 32 neighbours in a list sorted by "
        "label length, which overlap, and halves those that begin with more than 18.75 s"
    ),
    (
        "every target ends with its end token and every slot is closed; s3prl's lacks the end token after a final punctuation mark, "
        "and the tag of a slot that begins or ends with one"
    ),
)

INFO = TaskInfo(
    name="sf",
    version=1,
    metric="slot_type_f1",
    unit="percent",
    higher_is_better=True,
    view="frames",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(default_lr=1e-4, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=200_000, batch=32, accumulate=1, evaluate_every=2000),
        "small": Budget(steps=1000, batch=8, accumulate=1, evaluate_every=125, head={"width": 128, "augment": "none"}),
    },
    label_columns=("text", "iob"),
    speakers="disjoint",
    license="Audio SNIPS: SNIPS CC0 1.0, synthetic voices",
    citation=SUPERB_CITATION,
    published={
        "lr": 1e-4,
        "batch": 32,
        "updates": 200_000,
        "slot_type_f1": {"fbank": 69.64, "hubert_base": 88.53},
        "slot_value_cer": {"fbank": 52.94, "hubert_base": 25.20},
    },
    s3prl_batches=S3prlBatches("label_windows"),
)


class SlotFilling(Task):
    """What is said, with a tag before and after every stretch that fills a slot."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The slot sentences of the embedded corpus, or of a folder laid out like it."""
        return [mini_fold(root, "slots")]

    def labels(self, train: Manifest) -> LabelSet:
        """Three special tokens, the published 28 characters (or those of train, if it has others), two tags a slot of train."""
        spelled = [encode(u.labels["text"], u.labels["iob"]) for u in train]
        tags = {token for tokens in spelled for token in tokens if is_tag(token)}
        seen = {token for tokens in spelled for token in tokens} - tags
        published = character_list()
        characters = published if seen.issubset(published) else tuple(sorted(seen))
        kinds = sorted({tag[2:] for tag in tags})
        return LabelSet({"tokens": SPECIALS + characters + tuple(f"{end}-{kind}" for kind in kinds for end in "BE")})

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Sentences whose labels do not fit their words, splits without a slot, characters and slots that train lacks."""
        found = []
        for split, manifest in fold.manifests.items():
            for utterance in manifest:
                wrong = iob_error(utterance.labels["text"], utterance.labels["iob"])
                if wrong is not None:
                    fix = 'one label a word: "O", or the slot with or without B- and I-'
                    found.append(Problem(f"{manifest.name}, utterance {utterance.id}", wrong, fix))
            labels = chain.from_iterable(text.split() for text in manifest.labels("iob"))
            if all(label == OUTSIDE for label in labels):
                found.append(Problem(f"{split} ({manifest.name})", "no slot in any sentence", "label some words"))
        if found or "train" not in fold.manifests:
            return found
        known = self.labels(fold.manifests["train"]).classes["tokens"]
        texts = {
            split: Manifest([_tokens_as_label(utterance) for utterance in manifest], manifest.root, manifest.name)
            for split, manifest in fold.manifests.items()
        }
        return unknown_tokens(Fold(fold.name, texts), "tokens", known, lambda label: label.split("\x1f"))

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """Characters and tags, and the end token: ids (tokens + 1,)."""
        number = {token: index for index, token in enumerate(labels.classes["tokens"])}
        tokens = encode(utterance.labels["text"], utterance.labels["iob"])
        return {"tokens": torch.tensor([number[token] for token in (*tokens, "<eos>")])}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """Two bidirectional LSTM layers with CTC; "augment" is "superb" (SpecAugment, the default) or "none"."""
        chosen = check_options("sf", options, HEAD_OPTIONS)
        augment = chosen.pop("augment", "superb")
        if augment not in ("superb", "none"):
            raise RequestError(f"sf: augment {augment!r}. Fix: superb or none")
        drawn = int(torch.randint(2**31 - 1, ()))  # its own stream, from the generator the head is drawn from
        masks = SpecAugment(torch.Generator().manual_seed(drawn)) if augment == "superb" else None
        return BlstmCtc(dim, labels.classes["tokens"], augment=masks, **chosen)

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Slot-type F1 in percent, mean over utterances; character and word error rates of slot values beside it."""
        manifest = fold.manifests[split]
        check_predictions("sf", predictions, manifest)
        references = [decode(encode(u.labels["text"], u.labels["iob"])) for u in manifest]
        hypotheses = [decode(predictions[name]) for name in manifest.ids]
        return self.score_texts({"id": list(manifest.ids), "cluster": clusters(manifest)}, references, hypotheses)

    def score_texts(self, names: Mapping[str, Any], references: Sequence[str], hypotheses: Sequence[str]) -> Score:
        """The score of texts with tags; `names` are the columns that say which utterances they are."""
        items: dict[str, Any] = {
            **names,
            "f1": np.array([slot_type_f1([r], [h]) for r, h in zip(references, hypotheses, strict=True)]),
        }
        for unit, cut in (("character", list), ("word", str.split)):
            counts = [slot_value_pairs(r, h, cut) for r, h in zip(references, hypotheses, strict=True)]
            items[f"value_{unit}_edits"] = [edits for edits, _ in counts]
            items[f"value_{unit}s"] = [length for _, length in counts]
        items["reference"], items["hypothesis"] = list(references), list(hypotheses)
        extra = {
            "slot_value_cer": rate(items, "value_character_edits", "value_characters"),
            "slot_value_wer": rate(items, "value_word_edits", "value_words"),
        }
        return Score(self.value(items), items, extra)

    def value(self, items: Mapping[str, Any]) -> float:
        """Slot-type F1 in percent, mean over utterances."""
        if len(items["f1"]) == 0:
            raise UndefinedMetric("sf: no utterances")
        return 100.0 * float(np.asarray(items["f1"], dtype=np.float64).mean())


def sf() -> Task:
    """The task as SUPERB sets it: Audio SNIPS."""
    return SlotFilling()


def character_list() -> tuple[str, ...]:
    """The published characters: a space, A to Z and the apostrophe.

    >>> len(character_list()), character_list()[:3], character_list()[-1]
    (28, (' ', 'A', 'B'), "'")
    """
    letters = sorted(set(read_vocabulary("characters")) - {"|", "'"})
    return (" ", *letters, "'")


def is_tag(token: str) -> bool:
    """Whether a token is a slot's tag and not a character.

    >>> is_tag("B-artist"), is_tag("B")
    (True, False)
    """
    return len(token) > 2 and token[:2] in ("B-", "E-")


def spans(words: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Runs of words with one label, "" outside of slots; words of punctuation are left out, "&" is AND.

    Labels are IOB ("B-artist I-artist"), or plain slot names, whose equal neighbours are one slot, as in Audio SNIPS.

    >>> list(spans("PLAY THE WHO NOW".split(), "O B-artist I-artist O".split()))
    [('', ['PLAY']), ('artist', ['THE', 'WHO']), ('', ['NOW'])]
    """
    run: tuple[str, list[str]] | None = None
    for word, label in zip(words, labels, strict=True):
        begins = label.startswith("B-")
        kind = "" if label == OUTSIDE else label[2:] if label[:2] in ("B-", "I-") else label
        if run is None or kind != run[0] or begins:
            if run is not None and run[1]:
                yield run
            run = (kind, [])
        if word.strip(PUNCTUATION):
            run[1].append("AND" if word == "&" else word.upper())
    if run is not None and run[1]:
        yield run


def encode(text: str, iob: str) -> list[str]:
    """The tokens of a sentence: its characters, B-slot before and E-slot after the words of a slot, spaces between words.

    >>> "".join(encode("Play the Who", "O artist artist"))
    'PLAY B-artistTHE WHOE-artist'
    """
    parts = []
    for kind, words in spans(text.split(), iob.split()):
        characters = list(" ".join(words))
        parts.append([f"B-{kind}", *characters, f"E-{kind}"] if kind else characters)
    return [token for number, part in enumerate(parts) for token in ([" "] if number else []) + part]


def decode(tokens: Sequence[str]) -> str:
    """The text that is scored: tags parted from characters by spaces, up to the first end token.

    >>> decode(encode("Play the Who", "O artist artist"))
    'PLAY B-artist THE WHO E-artist'
    """
    written = list(tokens)
    if "<eos>" in written:
        written = written[: written.index("<eos>")]
    return "".join(
        f"{token} " if is_tag(token) and token[0] == "B" else f" {token}" if is_tag(token) else token
        for token in written
        if token != "<pad>"
    )


def iob_error(text: str, iob: str) -> str | None:
    """What is wrong with the labels of a sentence; None if nothing.

    >>> iob_error("PLAY THIS", "O")
    '2 words, 1 labels'
    """
    words, labels = text.split(), iob.split()
    if len(words) != len(labels):
        return f"{len(words)} words, {len(labels)} labels"
    before = OUTSIDE
    for word, label in zip(words, labels, strict=True):
        if label in ("B-", "I-"):
            return f"label {label!r} of {word!r} names no slot"
        if label.startswith("I-") and before not in (label, f"B-{label[2:]}"):
            return f"label {label!r} of {word!r} follows {before!r}"
        before = label
    if not any(word.strip(PUNCTUATION) for word in words):
        return "no words"
    return None


def _tokens_as_label(utterance: Utterance) -> Utterance:
    tokens = "\x1f".join(encode(utterance.labels["text"], utterance.labels["iob"]))
    return Utterance(utterance.id, utterance.audio, utterance.start_s, utterance.duration_s, {"tokens": tokens})
