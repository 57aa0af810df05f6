"""Write the texts of the corpus `mini`: which speaker says which sentence or command, and how fast.

Read sentences come from the patterns of `mini_words.py` and are all different. Commands are a carrier ("could you
...") around a core ("turn on the ..."); a (carrier, core) pair belongs to one split, so that no phrasing is in two.
Every speaker of a split says the same number of utterances, and intents are dealt to speakers in equal numbers. The
result is a table of utterances that the later steps read; the same seed gives the same table.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mini_model import Packages
from mini_voices import WITHDRAWN, Speaker, read_speakers
from mini_words import (
    CARRIERS,
    CORES,
    LISTS,
    LOCATIONS,
    OBJECTS_BY_ACTION,
    OBJECTS_WITH_LOCATION,
    SENTENCES,
)

SEED = 20_261_123
# What the texts are dealt for; the corpus keeps the first KEPT of each speaker, so that it can grow without changing.
READ_PER_SPEAKER = {"train": 11, "dev": 9, "test": 10}
COMMANDS_PER_SPEAKER = {"train": 23, "dev": 13, "test": 17}
KEPT = {
    "read": {"train": 10, "dev": 9, "test": 10},
    "commands": {"train": 18, "dev": 13, "test": 17},
}
WORDS_PER_SENTENCE = (6, 13)
RATES = (0.9, 1.2)  # speaking rate, uniform, drawn for every utterance
PHRASING_SHARES = {"train": 0.6, "dev": 0.15, "test": 0.25}
COLUMNS = (
    "id",
    "style",
    "split",
    "speaker",
    "voice",
    "warp",
    "rate",
    "text",
    "slot_action",
    "slot_object",
    "slot_location",
)
VOWEL_LETTERS = frozenset("AEIOU")


def expand(pattern: str, generator: np.random.Generator) -> str:
    """Fill the slots of a pattern, at random, until none is left."""
    while match := re.search(r"\{(\w+)\}", pattern):
        items = LISTS[match.group(1)]
        pattern = pattern[: match.start()] + items[generator.integers(len(items))] + pattern[match.end() :]
    return pattern


def with_articles(text: str, pronunciations: dict[str, tuple[str, ...]]) -> str:
    """The text with `an` before words that begin with a vowel phone.

    >>> with_articles("a owl and a hour", {"OWL": ("AW1",), "HOUR": ("AW1",), "AND": ("AH0",)})
    'an owl and an hour'
    """
    tokens = text.split()
    for index, token in enumerate(tokens[:-1]):
        following = tokens[index + 1].rstrip(",").upper()
        if token == "a" and pronunciations[following][0][0] in VOWEL_LETTERS:
            tokens[index] = "an"
    return " ".join(tokens)


def sentences(generator: np.random.Generator, pronunciations: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Different sentences without end; the patterns take turns in a random order."""
    seen: set[str] = set()
    while True:
        for index in generator.permutation(len(SENTENCES)):
            text = with_articles(expand(SENTENCES[index], generator), pronunciations)
            tokens = text.replace(",", "").upper().split()
            content = [token for token in tokens if len(token) > 4]
            repeats = len(content) != len(set(content))
            if (
                not repeats
                and WORDS_PER_SENTENCE[0] <= len(tokens) <= WORDS_PER_SENTENCE[1]
                and text.upper() not in seen
            ):
                seen.add(text.upper())
                yield text


def intents() -> list[tuple[str, str, str]]:
    """Every (action, object, location) of the corpus."""
    return [
        (action, thing, location)
        for action, things in OBJECTS_BY_ACTION.items()
        for thing in things
        for location in (LOCATIONS if thing in OBJECTS_WITH_LOCATION else ("none",))
    ]


def phrasings(intent: tuple[str, str, str]) -> list[tuple[str, str]]:
    """The (carrier, core) pairs of an intent; a location stands before the object or at the end."""
    action, thing, location = intent
    cores = CORES.get(f"{action} {thing}", CORES[action])
    if location != "none":
        cores = tuple(
            core.replace("{object}", place) + end
            for core in cores
            for place, end in (("{location} {object}", ""), ("{object}", " in the {location}"))
        )
    return [(carrier, core) for carrier in CARRIERS for core in cores]


def split_phrasings(generator: np.random.Generator) -> dict[tuple[str, str], str]:
    """The split of every phrasing. Each core and each carrier occurs in train."""
    pairs = sorted({pair for intent in intents() for pair in phrasings(intent)})
    splits: dict[tuple[str, str], str] = {}
    for core in sorted({core for _, core in pairs}):
        carriers = generator.permutation(sorted(carrier for carrier, other in pairs if other == core))
        bounds = np.round(np.cumsum(list(PHRASING_SHARES.values())) * len(carriers)).astype(int)
        for split, part in zip(PHRASING_SHARES, np.split(carriers, bounds[:-1]), strict=True):
            splits.update({(str(carrier), core): split for carrier in part})
    return splits


def commands(
    split: str, count: int, splits: dict[tuple[str, str], str], generator: np.random.Generator
) -> list[tuple[str, tuple[str, str, str]]]:
    """Texts with their intents for one split: intents in equal numbers, phrasings at random without early repeats."""
    every = intents()
    dealt = [every[index] for _ in range(count // len(every) + 1) for index in generator.permutation(len(every))][
        :count
    ]
    left: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    result = []
    for intent in dealt:
        if not left.get(intent):
            allowed = [pair for pair in phrasings(intent) if splits[pair] == split]
            left[intent] = [allowed[index] for index in generator.permutation(len(allowed))]
        carrier, core = left[intent].pop()
        words = carrier.replace("{core}", core).replace("{object}", intent[1]).replace("{location}", intent[2])
        result.append((words, intent))
    return result


def utterances(speakers: list[Speaker], pronunciations: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """All rows of the table, by id."""
    generator = np.random.default_rng(SEED)
    source = sentences(generator, pronunciations)
    phrasing_splits = split_phrasings(generator)
    rows: list[dict[str, str]] = []
    for split in ("train", "dev", "test"):
        group = sorted((speaker for speaker in speakers if speaker.split == split), key=lambda speaker: speaker.id)
        per_speaker = COMMANDS_PER_SPEAKER[split]
        dealt = commands(split, per_speaker * len(group), phrasing_splits, generator)
        for position, speaker in enumerate(group):
            said = [("read", next(source), ("", "", "")) for _ in range(READ_PER_SPEAKER[split])]
            said += [("commands", *command) for command in dealt[position * per_speaker : (position + 1) * per_speaker]]
            for number, (style, text, intent) in enumerate(said):
                first = number if style == "read" else number - READ_PER_SPEAKER[split]
                rows.append(
                    {
                        "id": f"{speaker.id}-{style[0]}{first + 1:02d}",
                        "style": style,
                        "split": split,
                        "speaker": speaker.id,
                        "voice": speaker.voice,
                        "warp": f"{speaker.warp:.2f}",
                        "rate": f"{generator.uniform(*RATES):.3f}",
                        "text": text,
                        **dict(zip(COLUMNS[-3:], intent, strict=True)),
                    }
                )
    return sorted(rows, key=lambda row: row["id"])


def place(row: dict[str, str]) -> float:
    """Where an utterance stands among those kept of its speaker and style, as a share; above 1 it is not in the corpus.

    Utterances of withdrawn speakers are at infinity.

    >>> place({"id": "sp01-r04", "speaker": "sp01", "style": "read", "split": "train"})
    0.5
    """
    if row["speaker"] in WITHDRAWN:
        return float("inf")
    number = int(row["id"].split("-")[1][1:])
    return number / KEPT[row["style"]][row["split"]]


def read_utterances(path: Path) -> list[dict[str, str]]:
    """The rows of a table of utterances."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def main() -> None:
    """Write the table of utterances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument("--cache", type=Path, required=True, help="folder with speakers.tsv, for the table")
    arguments = parser.parse_args()
    pronunciations = Packages(arguments.packages).pronunciations
    rows = utterances(read_speakers(arguments.cache / "speakers.tsv"), pronunciations)
    unknown = {
        word for row in rows for word in row["text"].replace(",", "").upper().split() if word not in pronunciations
    }
    if unknown:
        raise SystemExit(f"not in the dictionary: {sorted(unknown)}")
    with (arguments.cache / "utterances.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
