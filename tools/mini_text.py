"""Write the texts of the corpus `mini`: which speaker says which sentence or command, and how fast.

Read sentences come from the patterns of `mini_words.py` and are all different. Commands are a carrier ("please ...")
around a core ("volume up"); a (carrier, core) pair belongs to one split, so that no phrasing is in two.
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
from mini_more_text import command_rows, query_rows, slot_rows, style_rows, word_rows
from mini_voices import WITHDRAWN, Speaker, read_speakers
from mini_words import CARRIERS, INTENTS, LISTS, SENTENCES

SEED = 20_261_123
READ_TABLE = Path(__file__).parent / "mini_read.tsv"
PHRASES_PER_SPEAKER = {"train": 16, "dev": 14, "test": 17}
# Reads in the corpus: the first KEPT of a speaker's; more were spoken, so that it can grow without changing.
KEPT = {
    "read": {"train": 11, "dev": 9, "test": 10},
    "phrases": PHRASES_PER_SPEAKER,
    "commands": {"train": 8, "dev": 12, "test": 10},
    "slots": {"train": 2, "dev": 2, "test": 3},
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
    "keyword",
    "iob",
    "emotion",
    "session",
    "pitch",
    "spread",
)
SLOTS = ("slot_action", "slot_object", "slot_location")
WITHDRAWN_TEXTS = (("train", "zoom, room two"),)  # the same words are a command of test
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


def split_phrasings(generator: np.random.Generator) -> dict[tuple[str, str], str]:
    """The split of every phrasing, a (carrier, core) pair. Each core occurs in every split."""
    splits: dict[tuple[str, str], str] = {}
    for core in sorted({core for cores in INTENTS.values() for core in cores}):
        carriers = generator.permutation(sorted(CARRIERS))
        bounds = np.round(np.cumsum(list(PHRASING_SHARES.values())) * len(carriers)).astype(int)
        for split, part in zip(PHRASING_SHARES, np.split(carriers, bounds[:-1]), strict=True):
            splits.update({(str(carrier), core): split for carrier in part})
    return splits


def phrases(
    split: str, count: int, splits: dict[tuple[str, str], str], generator: np.random.Generator
) -> list[tuple[str, tuple[str, str, str]]]:
    """Texts with their intents for one split: intents in equal numbers, phrasings at random without early repeats."""
    every = sorted(INTENTS)
    dealt = [every[index] for _ in range(count // len(every) + 1) for index in generator.permutation(len(every))]
    left: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    result = []
    for intent in dealt[:count]:
        if not left.get(intent):
            allowed = [pair for pair, own in sorted(splits.items()) if own == split and pair[1] in INTENTS[intent]]
            left[intent] = [allowed[index] for index in generator.permutation(len(allowed))]
        carrier, core = left[intent].pop()
        result.append((carrier.replace("{core}", core), intent))
    return result


def read_rows() -> list[dict[str, str]]:
    """The read sentences of every speaker, as they were drawn once.

    `sentences` drew them in one stream of random numbers with a set of commands that was replaced before the corpus was
    frozen (log-mel means were at chance on it); the table keeps them, so that the commands could change and they did not.
    """
    rows = read_utterances(READ_TABLE)
    return [{**dict.fromkeys(COLUMNS, ""), "style": "read", **row} for row in rows]


def phrase_rows(speakers: list[Speaker]) -> list[dict[str, str]]:
    """The phrases of every speaker: the first set of commands."""
    generator = np.random.default_rng(SEED)
    phrasing_splits = split_phrasings(generator)
    rows: list[dict[str, str]] = []
    for split, per_speaker in PHRASES_PER_SPEAKER.items():
        group = sorted((speaker for speaker in speakers if speaker.split == split), key=lambda speaker: speaker.id)
        dealt = iter(phrases(split, per_speaker * len(group), phrasing_splits, generator))
        for speaker in group:
            for number in range(per_speaker):
                text, intent = next(dealt)
                row = {
                    "id": f"{speaker.id}-c{number + 1:02d}",
                    "style": "phrases",
                    "split": split,
                    "speaker": speaker.id,
                    "voice": speaker.voice,
                    "warp": f"{speaker.warp:.2f}",
                    "rate": f"{generator.uniform(*RATES):.3f}",
                    "text": text,
                }
                rows.append(row | dict(zip(SLOTS, intent, strict=True)))
    return rows


def place(row: dict[str, str]) -> float:
    """Where an utterance stands among those kept of its speaker and style, as a share; above 1 it is not in the corpus.

    Utterances of withdrawn speakers, and of texts that another split has too, are at infinity.

    >>> place({"id": "sp01-r04", "speaker": "sp01", "style": "read", "split": "test"})
    0.4
    """
    if row["speaker"] in WITHDRAWN or (row["split"], row.get("text")) in WITHDRAWN_TEXTS:
        return float("inf")
    number = int(row["id"].split("-")[1][1:])
    kept = KEPT.get(row["style"])  # None: all of them
    return number / kept[row["split"]] if kept else min(1.0, number / 12)


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
    speakers = [each for each in read_speakers(arguments.cache / "speakers.tsv") if each.id not in WITHDRAWN]
    documents = [row for row in read_rows() if place(row) <= 1]
    rows = read_rows() + phrase_rows(speakers) + command_rows(speakers) + word_rows(speakers) + slot_rows(speakers)
    rows += style_rows(speakers) + query_rows(speakers, documents, pronunciations)
    rows.sort(key=lambda row: row["id"])
    unknown = {
        word for row in rows for word in row["text"].replace(",", "").upper().split() if word not in pronunciations
    }
    if unknown:
        raise SystemExit(f"not in the dictionary: {sorted(unknown)}")
    with (arguments.cache / "utterances.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
