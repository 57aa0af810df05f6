"""Token vocabularies of the CTC tasks: the published lists, and what a fold has outside of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.manifest import Problem


def read_vocabulary(name: str) -> tuple[str, ...]:
    """The symbols of a vocabulary shipped with the package, in id order and without the special ones.

    >>> len(read_vocabulary("phonemes")), len(read_vocabulary("characters"))
    (71, 28)
    """
    text = (Path(__file__).resolve().parent / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def unknown_tokens(
    fold: Fold, column: str, known: Iterable[str], tokens: Callable[[str], Iterable[str]]
) -> list[Problem]:
    """One problem a split for the tokens that a vocabulary lacks, with where each comes first.

    Args:
        fold: the splits.
        column: the label column.
        known: the vocabulary.
        tokens: what gives the tokens of a label.
    """
    vocabulary = set(known)
    found = []
    for split, manifest in fold.manifests.items():
        places: dict[str, str] = {}
        for utterance in manifest:
            for token in tokens(utterance.labels[column]):
                if token not in vocabulary:
                    places.setdefault(token, utterance.id)
        if places:
            shown = ", ".join(f"{token!r} (first in {place})" for token, place in list(places.items())[:5])
            what = f"{len(places)} tokens outside the vocabulary of {len(vocabulary)}: {shown}"
            fix = "rewrite them, or leave the utterances out"
            found.append(Problem(f"{split} ({manifest.name}), {column}", what, fix))
    return found
