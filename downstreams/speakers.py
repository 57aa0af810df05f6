"""Speakers held out and balanced trials made, by rules that need no list: what selects where a corpus has no dev trials."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from superb_probe.downstreams.manifest import Manifest, Trials, Utterance
from superb_probe.errors import RequestError

HELD_OUT_SHARE = 0.05
HELD_OUT_LEAST = 10
MAX_PAIRS = 5000  # same-speaker trials made, and as many of different speakers
SEED = 20260101


def held_out_speakers(speakers: Sequence[str], seed: int = SEED) -> tuple[str, ...]:
    """The speakers to keep out of training: 5 %, at least 10, by a seeded hash of their names, so that order does not matter.

    >>> names = [f"s{number}" for number in range(40)]
    >>> len(held_out_speakers(names)), held_out_speakers(names) == held_out_speakers(names[::-1])
    (10, True)

    Raises:
        RequestError: if fewer than two speakers would remain.
    """
    distinct = sorted(set(speakers))
    count = max(HELD_OUT_LEAST, round(HELD_OUT_SHARE * len(distinct)))
    if len(distinct) < count + 2:
        raise RequestError(
            f"{len(distinct)} training speakers: {count} are held out to choose on, and at least 2 must remain. "
            "Fix: give a dev manifest (--manifest dev=...), or more speakers."
        )
    return tuple(sorted(sorted(distinct, key=lambda name: _hash(f"{seed}:{name}"))[:count]))


def with_halves(manifest: Manifest) -> tuple[Manifest, int]:
    """The manifest with every utterance that is its speaker's only one cut into two halves, and how many were cut.

    >>> from pathlib import Path
    >>> halves, cut = with_halves(Manifest([Utterance("a", "a.wav", 1.0, 4.0, {"speaker": "s"})], Path("."), "dev"))
    >>> [(half.id, half.start_s, half.duration_s) for half in halves], cut
    ([('a.half1', 1.0, 2.0), ('a.half2', 3.0, 2.0)], 1)
    """
    count = Counter(manifest.labels("speaker"))
    utterances: list[Utterance] = []
    cut = 0
    for utterance in manifest:
        if count[utterance.labels["speaker"]] > 1:
            utterances.append(utterance)
            continue
        cut += 1
        half_s = utterance.duration_s / 2
        for number, start_s in ((1, utterance.start_s), (2, utterance.start_s + half_s)):
            utterances.append(
                Utterance(f"{utterance.id}.half{number}", utterance.audio, start_s, half_s, utterance.labels)
            )
    return Manifest(utterances, manifest.root, manifest.name, corpus=manifest.corpus), cut


def balanced_trials(manifest: Manifest, seed: int = SEED) -> Trials:
    """As many trials of one speaker as of two: all same-speaker pairs (at most 5,000, drawn) and others drawn among all pairs.

    Raises:
        RequestError: if there are no two utterances of one speaker, or only one speaker.
    """
    by_speaker: dict[str, list[str]] = {}
    for utterance in manifest:
        by_speaker.setdefault(utterance.labels["speaker"], []).append(utterance.id)
    same = [pair for name in sorted(by_speaker) for pair in combinations(sorted(by_speaker[name]), 2)]
    if not same or len(by_speaker) < 2:
        raise RequestError(
            f"{manifest.name}: {len(by_speaker)} speakers and {len(same)} pairs of one speaker; trials need both kinds. "
            "Fix: at least two speakers with two utterances each."
        )
    generator = np.random.default_rng(seed)
    if len(same) > MAX_PAIRS:
        same = [same[index] for index in np.sort(generator.permutation(len(same))[:MAX_PAIRS])]
    speaker = {utterance.id: utterance.labels["speaker"] for utterance in manifest}
    ids = sorted(speaker)
    sizes = [len(names) for names in by_speaker.values()]
    possible = (len(ids) ** 2 - sum(size**2 for size in sizes)) // 2
    different: dict[tuple[str, str], None] = {}
    while len(different) < min(len(same), possible):
        a, b = sorted(ids[index] for index in generator.integers(len(ids), size=2))
        if speaker[a] != speaker[b]:
            different[a, b] = None
    pairs = [(1, *pair) for pair in same] + [(0, *pair) for pair in different]
    return Trials.of([label for label, _, _ in pairs], [a for _, a, _ in pairs], [b for _, _, b in pairs])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
