"""Speak sentences for pre-training: voices and blends of voices that no dev or test utterance of `mini` has.

Sentences come from the patterns of `mini` (drawn from a generator of their own) and, turn by turn, from the lines of any `--texts`
files, cut into stretches of 6 to 16 words. A sentence of `mini`'s dev and test tables is never spoken. Each utterance is a file of
the cache as `mini_synthesise.py` writes it, and a line of `utterances.tsv`. It goes on until `--hours` are there or it is stopped,
and from there when it is started again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mini_model import SYNTHESIS_RATE_HZ, Packages, Synthesiser, spell
from mini_text import RATES, sentences

SEED = 20_261_125
SPEAKERS = 160
WARPS = (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)
STRETCH_WORDS = (6, 16)
MINI = Path(__file__).parent.parent / "downstreams" / "mini"
COLUMNS = ("id", "style", "split", "speaker", "voice", "warp", "rate", "text", "emotion")


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def held_out_texts() -> set[str]:
    """Every text of `mini` outside its train tables, in capitals without commas."""
    tables = [path for path in sorted(MINI.glob("*.tsv")) if not path.name.endswith(".train.tsv")]
    return {row["text"] for path in tables for row in rows_of(path) if row.get("text")}


def speakers(packages: Packages) -> list[tuple[str, float]]:
    """(voice, warp) of every speaker: two thirds are the mean of two voices, "a+b"; none is of a dev or test voice of `mini`."""
    held_out = {row["voice"] for row in rows_of(MINI / "speakers.tsv") if row["split"] != "train"}
    voices = [voice for voice in packages.voices if voice not in held_out]
    generator = np.random.default_rng(SEED)
    chosen = []
    for number in range(SPEAKERS):
        first, second = generator.choice(voices, size=2, replace=False)
        blended = number % 3 > 0
        chosen.append((f"{first}+{second}" if blended else str(first), float(generator.choice(WARPS))))
    return chosen


def style_of(voice: str, packages: Packages) -> np.ndarray:
    """The style table (510, 256) of a voice, or of the mean of two."""
    return np.mean([packages.voices[name] for name in voice.split("+")], axis=0, dtype=np.float32)


def stretches(paths: list[Path], known: dict[str, tuple[str, ...]], generator: np.random.Generator) -> Iterator[str]:
    """Stretches of the files' lines whose every word is in the dictionary, the lines in a random order."""
    lines = [line.split() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    for index in generator.permutation(len(lines)):
        words = lines[index]
        while len(words) >= STRETCH_WORDS[0]:
            count = int(generator.integers(STRETCH_WORDS[0], STRETCH_WORDS[1] + 1))
            stretch, words = words[:count], words[count:]
            if len(stretch) >= STRETCH_WORDS[0] and all(word.upper() in known for word in stretch):
                yield " ".join(stretch)


def utterances(packages: Packages, texts: list[Path]) -> Iterator[dict[str, str]]:
    """Rows of the table without end: patterns and texts take turns, every row its speaker and rate."""
    generator = np.random.default_rng([SEED, 1])
    dictionary = packages.pronunciations
    own = sentences(np.random.default_rng([SEED, 2]), dictionary)
    other = itertools.chain(stretches(texts, dictionary, np.random.default_rng([SEED, 3])), own)
    held_out, people, said = held_out_texts(), speakers(packages), set[str]()
    for number in itertools.count():
        text = next(other if number % 2 else own)
        plain = text.replace(",", "").upper()
        speaker = int(generator.integers(len(people)))
        rate = generator.uniform(*RATES)
        if plain in held_out or plain in said:
            continue
        said.add(plain)
        voice, warp = people[speaker]
        name = f"pk{speaker:03d}"
        row = {"id": f"{name}-{number:05d}", "style": "read", "split": "train", "speaker": name, "voice": voice}
        yield {**row, "warp": f"{warp:.2f}", "rate": f"{rate:.3f}", "text": text, "emotion": ""}


def main() -> None:
    """Speak until there are as many hours as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument("--cache", type=Path, required=True, help="folder for utterances.tsv and clean/")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="plain text, one sentence a line")
    parser.add_argument("--hours", type=float, default=1.0, help="of speech, before trimming")
    arguments = parser.parse_args()
    packages = Packages(arguments.packages)
    synthesise = Synthesiser(packages)
    folder, table = arguments.cache / "clean", arguments.cache / "utterances.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    listed = {row["id"] for row in rows_of(table)} if table.is_file() else set[str]()
    if not listed:
        table.write_text("\t".join(COLUMNS) + "\n", encoding="utf-8")
    spoken_s, begun = 0.0, time.monotonic()
    for row in utterances(packages, arguments.texts):
        target = folder / f"{row['id']}.npz"
        if target.exists() and row["id"] in listed:
            with np.load(target) as stored:
                spoken_s += len(stored["audio"]) / SYNTHESIS_RATE_HZ
            continue
        if spoken_s >= 3600 * arguments.hours:
            break
        symbols = spell(row["text"], packages.pronunciations)
        audio, frames = synthesise(
            symbols.text, style_of(row["voice"], packages), float(row["rate"]) / float(row["warp"])
        )
        if not np.isfinite(audio).all() or np.abs(audio).max() < 0.01:
            raise RuntimeError(f"{row['id']}: the model gave silence or a value that is not finite")
        peak = max(1.0, float(np.abs(audio).max()))
        temporary = target.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(temporary, audio=np.round(audio / peak * 32767).astype(np.int16), frames=frames.astype(np.int16))
        temporary.rename(target)
        with table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n").writerow(row)
        spoken_s += len(audio) / SYNTHESIS_RATE_HZ
        print(f"{row['id']} {spoken_s:.0f} s spoken in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
