"""Texts of what joined the corpus `mini` later: commands, words, sentences with slots, styles, queries.

Each kind draws from a generator of its own, so that one can grow while the others, and what existed before, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from mini_more_words import (
    KEYWORDS,
    MORE_INTENTS,
    SLOT_LISTS,
    SLOT_SENTENCES,
    STYLE_SENTENCES,
    UNKNOWN_WORDS,
)
from mini_voices import Speaker

SEED = 20_261_125
UNKNOWN = "_unknown_"
COMMANDS_PER_SPEAKER = {"train": 12, "dev": 12, "test": 15}
WORDS_PER_SPEAKER = len(KEYWORDS) + 1
SLOTS_PER_SPEAKER = {"train": 3, "dev": 2, "test": 3}
QUERIES = {"dev": 24, "test": 48}
QUERY_DOCUMENTS = (2, 8)  # fewest and most documents of the split that hold a query's word
QUERY_PHONES = 4  # shortest query
COMMAND_RATES, WORD_RATES, SLOT_RATES = (0.9, 1.2), (0.85, 1.15), (0.95, 1.2)
# Speaking rate, factor on the pitch and on its deviations from the utterance's mean, by style; loudness is `mini_assemble.py`'s.
STYLES = {
    "plain": (1.0, 1.0, 1.0),
    "lively": (1.15, 1.12, 1.6),
    "forceful": (1.05, 1.04, 1.2),
    "subdued": (0.82, 0.93, 0.5),
}
STYLE_JITTER = (0.08, 0.03, 0.15)  # each of the three is varied by up to this share
SESSIONS = 5

Row = dict[str, str]
Item = TypeVar("Item")


def new_row(speaker: Speaker, style: str, letter: str, number: int, text: str, rate: float) -> Row:
    """A row of the table of utterances."""
    return {
        "id": f"{speaker.id}-{letter}{number:02d}",
        "style": style,
        "split": speaker.split,
        "speaker": speaker.id,
        "voice": speaker.voice,
        "warp": f"{speaker.warp:.2f}",
        "rate": f"{rate:.3f}",
        "text": text,
    }


def by_split(speakers: Sequence[Speaker]) -> dict[str, list[Speaker]]:
    """The speakers of each split, by id."""
    ordered = sorted(speakers, key=lambda speaker: speaker.id)
    return {split: [each for each in ordered if each.split == split] for split in ("train", "dev", "test")}


def endless(items: Sequence[Item], generator: np.random.Generator) -> Iterator[Item]:
    """All items in a random order, again and again."""
    while True:
        yield from (items[index] for index in generator.permutation(len(items)))


def command_rows(speakers: Sequence[Speaker]) -> list[Row]:
    """Commands, their intents in equal numbers; every text belongs to one split and is said by several speakers."""
    generator = np.random.default_rng([SEED, 1])
    rows = []
    for split, group in by_split(speakers).items():
        texts = {intent: endless(MORE_INTENTS[intent][split], generator) for intent in sorted(MORE_INTENTS)}
        intents = endless(sorted(MORE_INTENTS), generator)
        for speaker in group:
            for number in range(1, COMMANDS_PER_SPEAKER[split] + 1):
                intent = next(intents)
                text, rate = next(texts[intent]), generator.uniform(*COMMAND_RATES)
                row = new_row(speaker, "commands", "i", number, text, rate)
                rows.append(row | dict(zip(("slot_action", "slot_object", "slot_location"), intent, strict=True)))
    return rows


def word_rows(speakers: Sequence[Speaker]) -> list[Row]:
    """Every keyword once by every speaker, and one other word, of which each split has its own."""
    generator = np.random.default_rng([SEED, 2])
    rows = []
    for split, group in by_split(speakers).items():
        others = endless(UNKNOWN_WORDS[split], generator)
        for speaker in group:
            said = [(word, word) for word in KEYWORDS] + [(next(others), UNKNOWN)]
            for number, index in enumerate(generator.permutation(len(said)), 1):
                word, keyword = said[index]
                row = new_row(speaker, "words", "k", number, word, generator.uniform(*WORD_RATES))
                rows.append(row | {"keyword": keyword})
    return rows


def tagged(pattern: str, generator: np.random.Generator) -> tuple[str, str]:
    """A pattern with its slots filled, and the label of every word: O, or B- and I- with the slot's name."""
    text: list[str] = []
    labels: list[str] = []
    for token in pattern.split():
        found = re.fullmatch(r"\{(\w+)\}", token)
        if found is None:
            text.append(token)
            labels.append("O")
            continue
        name = found.group(1)
        filled = SLOT_LISTS[name][generator.integers(len(SLOT_LISTS[name]))].split()
        text += filled
        labels += [f"B-{name}"] + [f"I-{name}"] * (len(filled) - 1)
    return " ".join(text), " ".join(labels)


def slot_rows(speakers: Sequence[Speaker]) -> list[Row]:
    """Sentences with labelled slots, all different; the patterns take turns."""
    generator = np.random.default_rng([SEED, 3])
    rows, seen = [], set()
    for split, group in by_split(speakers).items():
        patterns = endless(SLOT_SENTENCES, generator)
        for speaker in group:
            for number in range(1, SLOTS_PER_SPEAKER[split] + 1):
                pattern = next(patterns)
                text, labels = tagged(pattern, generator)
                while text in seen:
                    text, labels = tagged(pattern, generator)
                seen.add(text)
                # "a" before a vowel: only cuisines follow one.
                text = re.sub(r"\ba (?=Italian|Indian)", "an ", text)
                row = new_row(speaker, "slots", "s", number, text, generator.uniform(*SLOT_RATES))
                rows.append(row | {"iob": labels})
    return rows


def style_speakers(speakers: Sequence[Speaker], generator: np.random.Generator) -> list[Speaker]:
    """Two speakers a session, one of each sex, all of different voices, none of them from train."""
    first_of_voice: dict[str, Speaker] = {}
    for speaker in sorted(speakers, key=lambda each: (abs(each.warp - 1.0), each.id)):
        if speaker.split != "train":
            first_of_voice.setdefault(speaker.voice, speaker)
    chosen = []
    for sex in "fm":
        group = sorted((each for each in first_of_voice.values() if each.sex == sex), key=lambda each: each.id)
        chosen.append([group[index] for index in generator.permutation(len(group))[:SESSIONS]])
    return [speaker for pair in zip(*chosen, strict=True) for speaker in pair]


def style_rows(speakers: Sequence[Speaker]) -> list[Row]:
    """Each session's sentences by both of its speakers in every style."""
    generator = np.random.default_rng([SEED, 4])
    rows = []
    for place, speaker in enumerate(style_speakers(speakers, generator)):
        session = place // 2
        said = [(text, style) for text in STYLE_SENTENCES[session] for style in STYLES]
        for number, index in enumerate(generator.permutation(len(said)), 1):
            text, style = said[index]
            rate, pitch, spread = (
                value * (1 + generator.uniform(-jitter, jitter))
                for value, jitter in zip(STYLES[style], STYLE_JITTER, strict=True)
            )
            row = new_row(speaker, "styles", "e", number, text, rate)
            rows.append(
                row
                | {"emotion": style, "session": str(session + 1), "pitch": f"{pitch:.3f}", "spread": f"{spread:.3f}"}
            )
    return rows


def holds(phones: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a run of phones occurs in others, stress aside.

    >>> holds(["K", "AE1", "T", "S"], ["AE0", "T"])
    True
    """
    bare = [phone.rstrip("012") for phone in phones]
    sought = [phone.rstrip("012") for phone in wanted]
    return any(bare[start : start + len(sought)] == sought for start in range(len(bare) - len(sought) + 1))


def query_rows(
    speakers: Sequence[Speaker], documents: Sequence[Row], pronunciations: dict[str, tuple[str, ...]]
) -> list[Row]:
    """Words of the split's sentences, each said alone by a speaker of the split who reads none of the sentences with it.

    A word that is part of another one's sound in some sentence is not taken: an occurrence is right by text and by phones.

    Args:
        speakers: all.
        documents: rows of the read sentences in the corpus.
        pronunciations: the dictionary.
    """
    generator = np.random.default_rng([SEED, 5])
    rows: list[Row] = []
    used: set[str] = set()
    for split, wanted in QUERIES.items():
        readers: dict[str, list[str]] = {}
        spoken = []
        for row in (row for row in documents if row["split"] == split):
            tokens = row["text"].replace(",", "").upper().split()
            spoken.append((set(tokens), [phone for token in tokens for phone in pronunciations[token]]))
            for token in sorted(set(tokens)):
                readers.setdefault(token, []).append(row["speaker"])
        fit = [
            word
            for word, names in sorted(readers.items())
            if QUERY_DOCUMENTS[0] <= len(names) <= QUERY_DOCUMENTS[1]
            and len(pronunciations[word]) >= QUERY_PHONES
            and word not in used
            and all((word in tokens) == holds(phones, pronunciations[word]) for tokens, phones in spoken)
        ]
        group = by_split(speakers)[split]
        counts = dict.fromkeys((speaker.id for speaker in group), 0)
        for index in generator.permutation(len(fit))[:wanted]:
            word = fit[index]
            free = [speaker for speaker in group if speaker.id not in readers[word]]
            speaker = min(free, key=lambda each: (counts[each.id], each.id))
            counts[speaker.id] += 1
            rows.append(
                new_row(speaker, "queries", "q", counts[speaker.id], word.lower(), generator.uniform(*WORD_RATES))
            )
            used.add(word)
    return rows
