"""Tables and audio of `mini` that are made from its utterances: noise, styles' sessions, speakers to know, occurrences, mixtures.

Mixtures are made from the clean cache: their noise, room and microphone are one for both speakers and drawn, as for utterances, from
their id alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
from mini_assemble import (
    DISTURBANCES,
    SPEECH_LEVEL_DB,
    SPLITS,
    Disturbance,
    coloured_noise,
    columns_of,
    decibels,
    end_with_sound,
    generator_of,
    level,
    microphone,
    reverberate,
    seconds,
    write_audio,
    write_table,
)
from mini_model import SYNTHESIS_RATE_HZ, Packages, Segment, align, spell
from mini_voices import SAMPLE_RATE_HZ

SEED = 20_261_126
SILENCE = "_silence_"
# Noise files and the stretches of a second in each; every stretch has noise of its own.
NOISE_FILES = {"train": (4, 8), "dev": (1, 8), "test": (2, 7)}
SID_SENTENCES = {"train": 7, "dev": 1, "test": 3}  # of each train speaker's eleven
SID_STRETCH_S = 1.5  # of each sentence: on all of it a linear discriminant of log-mel means knows 91 % of the speakers
SID_MARGIN_S = 0.2  # least distance of the stretch from the file's ends
QUERY_MARGIN_S = 0.02
MIXTURES = {"train": 60, "dev": 12, "test": 24}
MIXTURE_S = 6.0
OVERLAP = (0.2, 0.6)  # time with both speakers over time with any
LEAST_SPEECH_S = 1.5  # of each speaker
MERGED_PAUSE_S = 0.25  # shorter pauses do not end a segment of the RTTM
LEVEL_DIFFERENCE_DB = 3.0

Row = dict[str, str]
MANIFEST = ("id", "audio", "start_s", "duration_s")


def noise_rows(split: str, corpus: Path) -> list[Row]:
    """Write the split's noise files; one row a stretch."""
    files, stretches = NOISE_FILES[split]
    rows = []
    for number in range(1, files + 1):
        name, parts = f"noise-{split}-{number}", []
        for stretch in range(stretches):
            identity = f"{name}-{stretch + 1}"
            generator = generator_of(identity)
            disturbance = Disturbance.draw(generator, "words")
            noise = coloured_noise(SAMPLE_RATE_HZ, disturbance, generator)
            noise *= decibels(SPEECH_LEVEL_DB - disturbance.snr_db)
            parts.append(microphone(noise, disturbance) * decibels(disturbance.gain_db))
            row = {"id": identity, "audio": f"audio/words/noise/{name}.opus", "keyword": SILENCE}
            rows.append(row | {"start_s": f"{stretch}.0", "duration_s": "1.0"} | disturbance.columns())
        write_audio(corpus / rows[-1]["audio"], np.concatenate(parts), name)
    return rows


def speaker_rows(done: list[Row]) -> dict[str, list[Row]]:
    """A stretch of every read sentence of the train speakers; the sentences are dealt to three splits by seed."""
    generator = np.random.default_rng([SEED, 1])
    dealt: dict[str, list[Row]] = {split: [] for split in SPLITS}
    train = [row for row in done if row["style"] == "read" and row["split"] == "train"]
    for speaker in sorted({row["speaker"] for row in train}):
        own = [row for row in train if row["speaker"] == speaker]
        order = iter(generator.permutation(len(own)))
        for split, count in SID_SENTENCES.items():
            for _ in range(count):
                row = own[next(order)]
                latest_s = float(row["duration_s"]) - SID_STRETCH_S - SID_MARGIN_S
                start = {
                    "start_s": f"{generator.uniform(SID_MARGIN_S, latest_s):.3f}",
                    "duration_s": str(SID_STRETCH_S),
                }
                dealt[split].append({**row, **start, "id": f"{row['id']}-part"})
    return {split: sorted(rows, key=lambda row: row["id"]) for split, rows in dealt.items()}


def occurrence_rows(queries: list[Row], documents: list[Row]) -> list[Row]:
    """Which query's word is in which document."""
    return [
        {"query": query["id"], "document": document["id"]}
        for query in queries
        for document in documents
        if query["text"] in document["text"].split()
    ]


def spoken_part(row: Row) -> Row:
    """The row of a query, its stretch cut to the word: noise around it would have to be found in the documents too."""
    begin_s = max(0.0, int(row["word_starts_ms"].split()[0]) / 1000 - QUERY_MARGIN_S)
    end_s = min(float(row["duration_s"]), int(row["word_ends_ms"].split()[-1]) / 1000 + QUERY_MARGIN_S)
    return {**row, "start_s": f"{begin_s:.3f}", "duration_s": f"{end_s - begin_s:.3f}"}


@dataclass(frozen=True, slots=True)
class Voice:
    """A clean utterance (S,) at 16 kHz and where speech is in it."""

    audio: np.ndarray
    speech: list[tuple[float, float]]


def clean_voice(row: Row, cache: Path, packages: Packages) -> Voice:
    """A read sentence from the clean cache, cut to its speech."""
    with np.load(cache / "clean" / f"{row['id']}.npz") as stored:
        clean, frames = stored["audio"].astype(np.float32) / 32767, stored["frames"].astype(np.int64)
    phones, words = align(spell(row["spoken"], packages.pronunciations), frames, len(clean) / SYNTHESIS_RATE_HZ)
    phones, _ = end_with_sound(phones, words, clean)
    spoken = [phone for phone in phones if phone.label != "SIL"]
    begin = round(spoken[0].start_s * SYNTHESIS_RATE_HZ)
    end = min(len(clean), round(spoken[-1].end_s * SYNTHESIS_RATE_HZ))
    warp = float(row["warp"])
    audio = soxr.resample(clean[begin:end], SYNTHESIS_RATE_HZ * warp, SAMPLE_RATE_HZ, quality="HQ").astype(np.float64)
    moved = [Segment("", (p.start_s - spoken[0].start_s) / warp, (p.end_s - spoken[0].start_s) / warp) for p in spoken]
    speech: list[tuple[float, float]] = []
    for phone in moved:
        if speech and phone.start_s - speech[-1][1] < MERGED_PAUSE_S:
            speech[-1] = (speech[-1][0], phone.end_s)
        else:
            speech.append((phone.start_s, phone.end_s))
    return Voice(audio / level(audio), speech)


def activity(turns: list[tuple[float, Voice]]) -> np.ndarray:
    """Whether a speaker talks in each 10 ms of a mixture, from (start, utterance) pairs."""
    active = np.zeros(round(MIXTURE_S * 100), bool)
    for start_s, voice in turns:
        for begin_s, end_s in voice.speech:
            active[round(100 * (start_s + begin_s)) : round(100 * (start_s + end_s))] = True
    return active


def arrange(
    voices: dict[str, list[Voice]], generator: np.random.Generator
) -> tuple[list[str], list[list[tuple[float, Voice]]]]:
    """Two speakers and when each starts which utterance, drawn until the overlap is as wanted."""
    while True:
        names = [str(name) for name in generator.choice(sorted(voices), 2, replace=False)]
        turns: list[list[tuple[float, Voice]]] = []
        for place, name in enumerate(names):
            at, own = generator.uniform(0.0, 0.6) + place * generator.uniform(0.3, 3.0), []
            for index in generator.permutation(len(voices[name])):
                own.append((float(at), voices[name][index]))
                at += own[-1][1].speech[-1][1] + generator.uniform(0.3, 1.5)
                if at > MIXTURE_S - LEAST_SPEECH_S:
                    break
            turns.append(own)
        first, second = (activity(own) for own in turns)
        overlap = (first & second).sum() / (first | second).sum()
        if OVERLAP[0] <= overlap <= OVERLAP[1] and min(first.sum(), second.sum()) >= 100 * LEAST_SPEECH_S:
            return names, turns


def mixture_rows(
    split: str, done: list[Row], cache: Path, corpus: Path, packages: Packages, *, resume: bool
) -> list[Row]:
    """Write the split's mixtures and their RTTM files; with `resume`, audio that is there is kept."""
    generator = np.random.default_rng([SEED, 2, SPLITS.index(split)])
    voices: dict[str, list[Voice]] = {}
    for row in done:
        if row["style"] == "read" and row["split"] == split:
            voices.setdefault(row["speaker"], []).append(clean_voice(row, cache, packages))
    rows = []
    for number in range(1, MIXTURES[split] + 1):
        name = f"mix-{split}-{number:02d}"
        own = generator_of(name)
        disturbance = Disturbance.draw(own, "mixtures")
        names, turns = arrange(voices, generator)
        samples = round(MIXTURE_S * SAMPLE_RATE_HZ)
        mixed, lines = np.zeros(samples), []
        for speaker, speaker_turns in zip(names, turns, strict=True):
            loud = decibels(SPEECH_LEVEL_DB + own.uniform(-LEVEL_DIFFERENCE_DB, LEVEL_DIFFERENCE_DB))
            for start_s, voice in speaker_turns:
                begin = round(start_s * SAMPLE_RATE_HZ)
                piece = voice.audio[: max(0, samples - begin)] * loud
                mixed[begin : begin + len(piece)] += piece
                for speech_begin_s, speech_end_s in voice.speech:
                    from_s, to_s = start_s + speech_begin_s, min(MIXTURE_S, start_s + speech_end_s)
                    if to_s - from_s >= 0.01:
                        lines.append((from_s, to_s - from_s, speaker))
        noise = coloured_noise(samples, disturbance, own) * decibels(SPEECH_LEVEL_DB - disturbance.snr_db)
        audio = microphone(reverberate(mixed, disturbance, own) + noise, disturbance) * decibels(disturbance.gain_db)
        if np.abs(audio).max() >= 1.0:
            raise ValueError(f"{name}: clips at {np.abs(audio).max():.2f}")
        row = {"id": name, "audio": f"audio/mixtures/{name}.opus", "start_s": "0.0", "duration_s": seconds(samples)}
        rows.append({**disturbance.columns(), **row, "rttm": f"rttm/{name}.rttm"})
        if not resume or not (corpus / row["audio"]).exists():
            write_audio(corpus / row["audio"], audio, name)
        target = corpus / "rttm" / f"{name}.rttm"
        target.parent.mkdir(exist_ok=True)
        text = [
            f"SPEAKER {name} 1 {begin_s:.3f} {long_s:.3f} <NA> <NA> {who} <NA> <NA>\n"
            for begin_s, long_s, who in sorted(lines)
        ]
        target.write_text("".join(text), encoding="utf-8")
    return rows


def write_more(done: list[Row], cache: Path, corpus: Path, packages: Packages, *, resume: bool) -> None:
    """Write what is made from finished utterances; with `resume`, the mixtures' audio that is there is kept."""
    disturbances = tuple(name for name in DISTURBANCES if name not in ("speed", "rate"))
    sessions = sorted({row["session"] for row in done if row["style"] == "styles"})
    for session in sessions:
        rows = [row for row in done if row["style"] == "styles" and row["session"] == session]
        write_table(corpus / f"styles.{session}.tsv", columns_of("styles"), rows)
    for split, rows in speaker_rows(done).items():
        write_table(corpus / f"speakers_id.{split}.tsv", (*MANIFEST, "speaker", *DISTURBANCES), rows)
    for split in SPLITS:
        of_split = [row for row in done if row["split"] == split]
        words = [row for row in of_split if row["style"] == "words"]
        write_table(corpus / f"words.{split}.tsv", columns_of("words"), words + noise_rows(split, corpus))
        mixtures = mixture_rows(split, done, cache, corpus, packages, resume=resume)
        write_table(corpus / f"mixtures.{split}.tsv", (*MANIFEST, "rttm", *disturbances), mixtures)
        if split != "train":
            documents = [row for row in of_split if row["style"] == "read"]
            write_table(corpus / f"documents.{split}.tsv", (*MANIFEST, "speaker", "text"), documents)
            queries = [spoken_part(row) for row in of_split if row["style"] == "queries"]
            write_table(corpus / f"queries.{split}.tsv", columns_of("queries"), queries)
            found = occurrence_rows(queries, documents)
            write_table(corpus / f"occurrences.{split}.tsv", ("query", "document"), found)
