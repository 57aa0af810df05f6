"""Make the corpus `mini` from the clean cache: trim, disturb, encode, and write manifests, alignments and trials.

What disturbs an utterance is drawn from a generator seeded by its id alone, before its audio is looked at, and every
level is relative to a fixed speech level: nothing in it depends on speaker, words, intent or split (`mini_check.py`
measures that). Utterances that the cache lacks are left out, so a preview can be made while the synthesis runs;
`--complete` makes that an error.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import soundfile
import soxr
from mini_model import FRAME_S, SYNTHESIS_RATE_HZ, Packages, Segment, align, spell
from mini_ogg import set_serial
from mini_text import SLOTS, place, read_utterances
from mini_voices import SAMPLE_RATE_HZ, WITHDRAWN, Speaker, read_speakers
from scipy.signal import butter, fftconvolve, sosfilt

SEED = 20_261_124
SPEECH_LEVEL_DB = (
    -29.0
)  # root mean square of the louder half of the speech, before the gain; low enough that nothing clips
BEFORE_S, AFTER_S = 0.02, 0.05  # kept around the first and the last phone
END_OF_SOUND_DB = -45.0  # below the loudest 10 ms: where the last phone ends
OPUS_COMPRESSION = 0.94  # soundfile's scale from 0 to 1; about 24 kbit/s
# Commands are short, and a mean over time is all that their probe reads: disturbances as strong as the sentences' drown it.
SNR_DB = {
    "read": (8.0, 30.0),
    "phrases": (25.0, 40.0),
    "commands": (25.0, 40.0),
    "words": (15.0, 35.0),
    "slots": (12.0, 30.0),
    "styles": (12.0, 30.0),
    "queries": (15.0, 30.0),
    "mixtures": (12.0, 30.0),
}
# Of tilt and gain, and of the shares with a room and a telephone band.
STRENGTH = {
    "read": 1.0,
    "phrases": 0.2,
    "commands": 0.2,
    "words": 0.4,
    "slots": 0.6,
    "styles": 0.3,
    "queries": 0.5,
    "mixtures": 0.6,
}
# Loudness of a speaking style and how much its spectrum rises per octave (loud voices have stronger high frequencies), in dB.
EFFORT_DB = {"plain": (0.0, 0.0), "lively": (3.0, 0.4), "forceful": (6.0, 1.0), "subdued": (-5.0, -1.0)}
EFFORT_JITTER_DB = 3.0
SPLITS = ("train", "dev", "test")
LABELS = {
    "read": ("speaker", "text", "phones"),
    "phrases": ("speaker", "text", *SLOTS),
    "commands": ("speaker", "text", *SLOTS),
    "words": ("speaker", "keyword", "text"),
    "slots": ("speaker", "text", "iob"),
    "styles": ("speaker", "emotion", "text"),
    "queries": ("speaker", "text"),
}
FOLDERS = {"phrases": "commands"}  # of audio, where the style has not its own
DISTURBANCES = ("snr_db", "noise", "hum", "room_s", "band", "tilt_db", "gain_db", "speed", "rate")
MELODY = ("pitch", "spread", "effort_db")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What is done to one utterance.

    Attributes:
        snr_db: level of speech over noise.
        noise_slope: the noise's power falls with frequency to this power: 0 white, 1 pink, 2 brown.
        modulation: depth of the slow changes of the noise's level, 0 to 0.8.
        hum_hz: mains hum in the noise, or 0.
        room_s: reverberation time, or 0 for none.
        room_db: level of the direct sound over the reverberation.
        telephone: whether only 300 to 3400 Hz are kept.
        tilt_db: slope of the microphone's response in dB an octave.
        gain_db: gain of the result.
        speed: the audio is played that much faster, a small change of pitch and tempo.
        lead_s: noise before the speech.
        trail_s: noise after it.
    """

    snr_db: float
    noise_slope: float
    modulation: float
    hum_hz: float
    room_s: float
    room_db: float
    telephone: bool
    tilt_db: float
    gain_db: float
    speed: float
    lead_s: float
    trail_s: float

    @classmethod
    def draw(cls, generator: np.random.Generator, style: str) -> Disturbance:
        """A disturbance at random, for a style of speech."""
        uniform, strength = generator.uniform, STRENGTH[style]
        return cls(
            snr_db=round(uniform(*SNR_DB[style]), 1),
            noise_slope=round(uniform(0.0, 2.0), 2),
            modulation=round(uniform(0.0, 0.8), 2),
            hum_hz=float(generator.choice([0.0, 0.0, 50.0, 60.0])),
            room_s=round(uniform(0.15, 0.6), 2) if uniform() < 0.5 * strength else 0.0,
            room_db=round(uniform(3.0, 13.0), 1),
            telephone=bool(uniform() < 0.1 * strength),
            tilt_db=round(strength * uniform(-2.0, 2.0), 1),
            gain_db=round(strength * uniform(-12.0, 3.0), 1),
            speed=round(uniform(0.97, 1.03), 3),
            lead_s=round(uniform(0.12, 0.3), 3),
            trail_s=round(uniform(0.05, 0.2), 3),
        )

    def columns(self) -> dict[str, str]:
        """The manifest's columns, `rate` excepted."""
        return {
            "snr_db": f"{self.snr_db:.1f}",
            "noise": f"{self.noise_slope:.2f}",
            "hum": f"{self.hum_hz:.0f}",
            "room_s": f"{self.room_s:.2f}",
            "band": "telephone" if self.telephone else "wide",
            "tilt_db": f"{self.tilt_db:.1f}",
            "gain_db": f"{self.gain_db:.1f}",
            "speed": f"{self.speed:.3f}",
        }


def decibels(value: float) -> float:
    """The amplitude factor of a level in dB."""
    return float(10.0 ** (value / 20.0))


def level(speech: np.ndarray) -> float:
    """Root mean square of the louder half of the 20 ms frames of (S,) speech."""
    frame = SAMPLE_RATE_HZ // 50
    frames = speech[: len(speech) // frame * frame].reshape(-1, frame)
    powers = np.sort((frames**2).mean(1))
    return float(np.sqrt(powers[len(powers) // 2 :].mean()))


def coloured_noise(samples: int, disturbance: Disturbance, generator: np.random.Generator) -> np.ndarray:
    """Noise (samples,) of unit root mean square with the disturbance's slope, modulation and hum."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    frequencies = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE_HZ), 60.0)
    noise = np.fft.irfft(spectrum * frequencies ** (-disturbance.noise_slope / 2), samples)
    noise /= np.sqrt(np.mean(noise**2))
    times_s = np.arange(samples) / SAMPLE_RATE_HZ
    for rate_hz in generator.uniform(0.3, 4.0, size=3):
        phase = generator.uniform(0, 2 * np.pi)
        noise *= 1 + disturbance.modulation / 3 * np.sin(2 * np.pi * rate_hz * times_s + phase)
    if disturbance.hum_hz:
        for harmonic in range(1, 8):
            phase = generator.uniform(0, 2 * np.pi)
            noise += (
                generator.uniform(0.0, 0.6)
                / harmonic
                * np.sin(2 * np.pi * disturbance.hum_hz * harmonic * times_s + phase)
            )
    return noise / np.sqrt(np.mean(noise**2))


def reverberate(speech: np.ndarray, disturbance: Disturbance, generator: np.random.Generator) -> np.ndarray:
    """Speech with a synthetic room's tail: noise that decays by 60 dB in `room_s`. The direct sound keeps its time."""
    if not disturbance.room_s:
        return speech
    samples = int(disturbance.room_s * SAMPLE_RATE_HZ)
    decay = decibels(-60.0) ** (np.arange(samples) / samples)
    response = generator.standard_normal(samples) * decay
    response[: int(0.002 * SAMPLE_RATE_HZ)] = 0.0
    response *= decibels(-disturbance.room_db) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    return fftconvolve(speech, response)[: len(speech)]


def tilted(audio: np.ndarray, slope_db: float) -> np.ndarray:
    """Audio (S,) whose spectrum rises by `slope_db` an octave around 1 kHz."""
    # A first-order shelf from 100 Hz to 7 kHz, as a minimum-phase filter made from its cepstrum.
    points = 4096
    frequencies = np.clip(np.fft.rfftfreq(points, 1 / SAMPLE_RATE_HZ), 100.0, 7000.0)
    log_response = slope_db * np.log2(frequencies / 1000.0) * np.log(10) / 20
    cepstrum = np.fft.irfft(log_response)
    cepstrum[1 : points // 2] *= 2
    cepstrum[points // 2 + 1 :] = 0
    response = np.fft.irfft(np.exp(np.fft.rfft(cepstrum)))[:1024]
    return fftconvolve(audio, response)[: len(audio)]


def effort(row: dict[str, str]) -> tuple[float, float]:
    """How loud an utterance is spoken and its spectrum's slope, in dB and dB an octave: 0 and 0 but for the styles."""
    if row["style"] != "styles":
        return 0.0, 0.0
    loud_db, slope_db = EFFORT_DB[row["emotion"]]
    generator = generator_of(f"{row['id']} effort")
    return round(loud_db + generator.uniform(-EFFORT_JITTER_DB, EFFORT_JITTER_DB), 1), slope_db


def microphone(audio: np.ndarray, disturbance: Disturbance) -> np.ndarray:
    """Audio (S,) through the tilted response and any telephone band; causal, so speech does not leak to before it."""
    audio = tilted(audio, disturbance.tilt_db)
    if disturbance.telephone:
        band = butter(4, (300.0, 3400.0), "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
        audio = sosfilt(band, audio)
    return audio


def move(segments: list[Segment], cut_s: float, factor: float, lead_s: float) -> list[Segment]:
    """Segments on the time line of the finished audio: cut, played `factor` times faster, after `lead_s`."""
    return [
        Segment(segment.label, (segment.start_s - cut_s) / factor + lead_s, (segment.end_s - cut_s) / factor + lead_s)
        for segment in segments
    ]


def end_with_sound(
    phones: list[Segment], words: list[Segment], clean: np.ndarray
) -> tuple[list[Segment], list[Segment]]:
    """Segments whose last phone ends with the sound: the model counts the final silence into that phone."""
    frame = SYNTHESIS_RATE_HZ // 100
    powers = (clean[: len(clean) // frame * frame].reshape(-1, frame) ** 2).mean(1)
    audible = np.flatnonzero(powers > powers.max() * decibels(END_OF_SOUND_DB) ** 2)
    last = max(index for index, phone in enumerate(phones) if phone.label != "SIL")
    end_s = max(phones[last].start_s + FRAME_S, min(phones[last].end_s, float(audible[-1] + 1) / 100))
    phone, word = phones[last], words[-1]
    tail = [Segment("SIL", end_s, len(clean) / SYNTHESIS_RATE_HZ)]
    ended = [*phones[:last], Segment(phone.label, phone.start_s, end_s), *tail]
    return ended, [*words[:-1], Segment(word.label, word.start_s, end_s)]


@dataclass(frozen=True, slots=True)
class Finished:
    """An utterance as it goes into the corpus: audio (S,) at 16 kHz, phones without a gap from 0 to its end, words."""

    audio: np.ndarray
    phones: list[Segment]
    words: list[Segment]


def finish(
    row: dict[str, str], clean: np.ndarray, frames: np.ndarray, pronunciations: dict[str, tuple[str, ...]]
) -> Finished:
    """Trim and disturb one utterance.

    Args:
        row: its line in the table of utterances.
        clean: (S,) float32 at 24 kHz.
        frames: the model's token durations.
        pronunciations: the dictionary.
    """
    generator = generator_of(row["id"])
    disturbance = Disturbance.draw(generator, row["style"])
    phones, words = align(spell(row["text"], pronunciations), frames, len(clean) / SYNTHESIS_RATE_HZ)
    phones, words = end_with_sound(phones, words, clean)
    spoken = [phone for phone in phones if phone.label != "SIL"]
    begin = max(0, round((spoken[0].start_s - BEFORE_S) * SYNTHESIS_RATE_HZ))
    end = min(len(clean), round((spoken[-1].end_s + AFTER_S) * SYNTHESIS_RATE_HZ))
    factor = float(row["warp"]) * disturbance.speed
    speech = soxr.resample(clean[begin:end], SYNTHESIS_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="HQ").astype(
        np.float64
    )
    loud_db, slope_db = effort(row)
    if slope_db:
        speech = tilted(speech, slope_db)
    speech *= decibels(SPEECH_LEVEL_DB + loud_db) / level(speech)
    lead, trail = (round(seconds * SAMPLE_RATE_HZ) for seconds in (disturbance.lead_s, disturbance.trail_s))
    padded = np.pad(speech, (lead, trail))
    padded = reverberate(padded, disturbance, generator)
    noise = coloured_noise(len(padded), disturbance, generator) * decibels(SPEECH_LEVEL_DB - disturbance.snr_db)
    audio = microphone(padded + noise, disturbance) * decibels(disturbance.gain_db)
    if np.abs(audio).max() >= 1.0:
        raise ValueError(f"{row['id']}: clips at {np.abs(audio).max():.2f}; lower SPEECH_LEVEL_DB")
    end_s = len(audio) / SAMPLE_RATE_HZ
    inner = [phone for phone in phones if phone.end_s > spoken[0].start_s and phone.start_s < spoken[-1].end_s]
    moved = move(inner, begin / SYNTHESIS_RATE_HZ, factor, disturbance.lead_s)
    silences = [Segment("SIL", 0.0, moved[0].start_s)], [Segment("SIL", moved[-1].end_s, end_s)]
    return Finished(
        audio, silences[0] + moved + silences[1], move(words, begin / SYNTHESIS_RATE_HZ, factor, disturbance.lead_s)
    )


def generator_of(utterance_id: str) -> np.random.Generator:
    """The generator of one utterance's disturbance: a hash of its id."""
    return np.random.default_rng([SEED, int.from_bytes(hashlib.sha256(utterance_id.encode()).digest()[:8], "big")])


def write_table(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """A TSV with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore", quoting=csv.QUOTE_NONE
        )
        writer.writeheader()
        writer.writerows(rows)


def milliseconds(times_s: list[float]) -> str:
    """Times as whole milliseconds in one cell."""
    return " ".join(str(round(1000 * time_s)) for time_s in times_s)


def trials(rows: list[dict[str, str]], sex_of: dict[str, str], generator: np.random.Generator) -> list[dict[str, str]]:
    """All pairs of one speaker and as many of two, two thirds of these within a sex."""
    pairs = list(combinations(rows, 2))
    same = [pair for pair in pairs if pair[0]["speaker"] == pair[1]["speaker"]]
    other = [pair for pair in pairs if pair[0]["speaker"] != pair[1]["speaker"]]
    close = [pair for pair in other if sex_of[pair[0]["speaker"]] == sex_of[pair[1]["speaker"]]]
    far = [pair for pair in other if sex_of[pair[0]["speaker"]] != sex_of[pair[1]["speaker"]]]
    from_close = min(len(close), 2 * len(same) // 3)
    chosen = [close[index] for index in generator.permutation(len(close))[:from_close]]
    chosen += [far[index] for index in generator.permutation(len(far))[: len(same) - from_close]]
    listed = [{"label": "1", "id_a": a["id"], "id_b": b["id"]} for a, b in same]
    listed += [{"label": "0", "id_a": a["id"], "id_b": b["id"]} for a, b in chosen]
    return sorted(listed, key=lambda trial: (trial["id_a"], trial["id_b"]))


def write_audio(target: Path, audio: np.ndarray, name: str) -> None:
    """An Opus file whose bytes depend on the samples and the name alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, audio, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION)
    set_serial(target, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))


def seconds(samples: int) -> str:
    """A duration as the manifests write it."""
    text = f"{samples / SAMPLE_RATE_HZ:.7f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


ALIGNMENT = ("id", "phones", "starts_ms", "words", "word_starts_ms", "word_ends_ms")
TIMES = ("duration_s", "timed_phones", "starts_ms", "word_starts_ms", "word_ends_ms")


def made_before(corpus: Path) -> dict[str, dict[str, str]]:
    """What the corpus' tables say of the utterances whose audio is there: duration and alignment, by id."""
    made: dict[str, dict[str, str]] = {}
    for path in sorted(corpus.glob("alignments.*.tsv")):
        made |= {row["id"]: {**row, "timed_phones": row["phones"]} for row in read_utterances(path)}
    for path in sorted(corpus.glob("*.tsv")):
        for row in read_utterances(path):
            whole = row.get("start_s") == "0.0"  # a stretch does not tell the file's duration
            if whole and row["id"] in made and (corpus / row["audio"]).exists():
                made[row["id"]] |= {"audio": row["audio"], "duration_s": row["duration_s"]}
    return {name: row for name, row in made.items() if "audio" in row}


def make(row: dict[str, str], relative: str, cache: Path, corpus: Path, packages: Packages) -> dict[str, str]:
    """Write one utterance's audio; returns its duration and alignment."""
    with np.load(cache / "clean" / f"{row['id']}.npz") as stored:
        clean, frames = stored["audio"].astype(np.float32) / 32767, stored["frames"].astype(np.int64)
    finished = finish(row, clean, frames, packages.pronunciations)
    write_audio(corpus / relative, finished.audio, row["id"])
    return {
        "duration_s": seconds(len(finished.audio)),
        "timed_phones": " ".join(phone.label for phone in finished.phones),
        "starts_ms": milliseconds([phone.start_s for phone in finished.phones]),
        "word_starts_ms": milliseconds([word.start_s for word in finished.words]),
        "word_ends_ms": milliseconds([word.end_s for word in finished.words]),
    }


def assemble(
    cache: Path, corpus: Path, packages: Packages, *, complete: bool, resume: bool = False
) -> list[dict[str, str]]:
    """Write the utterances' audio; returns their rows with everything that any table says of them.

    Args:
        cache: with utterances.tsv and clean/.
        corpus: the folder to write into.
        packages: for the dictionary.
        complete: whether an utterance missing from the cache is an error; else it is left out.
        resume: whether audio that is there, and in the tables, is kept as it is.
    """
    made = made_before(corpus) if resume else {}
    done: list[dict[str, str]] = []
    for row in read_utterances(cache / "utterances.tsv"):
        source = cache / "clean" / f"{row['id']}.npz"
        if place(row) > 1 or (not complete and not source.exists()):
            continue
        relative = f"audio/{FOLDERS.get(row['style'], row['style'])}/{row['speaker']}/{row['id']}.opus"
        known = made.get(row["id"]) or make(row, relative, cache, corpus, packages)
        done.append(
            {
                **row,
                **{name: known[name] for name in TIMES},
                **Disturbance.draw(generator_of(row["id"]), row["style"]).columns(),
                "effort_db": f"{effort(row)[0]:.1f}",
                "audio": relative,
                "start_s": "0.0",
                "spoken": row["text"],
                "text": row["text"].replace(",", "").upper(),
                "phones": " ".join(label for label in known["timed_phones"].split() if label != "SIL"),
            }
        )
    return done


def columns_of(style: str) -> tuple[str, ...]:
    """The columns of a style's manifests."""
    melody = MELODY if style == "styles" else ()
    return ("id", "audio", "start_s", "duration_s", *LABELS[style], *DISTURBANCES, *melody)


def write_tables(done: list[dict[str, str]], speakers: list[Speaker], corpus: Path) -> None:
    """Speakers, manifests, alignments and trials of the finished utterances."""
    kept = [speaker for speaker in speakers if speaker.id not in WITHDRAWN]
    table = [
        {
            "speaker": speaker.id,
            "split": speaker.split,
            "sex": speaker.sex,
            "voice": speaker.voice,
            "warp": f"{speaker.warp:.2f}",
        }
        for speaker in kept
    ]
    write_table(corpus / "speakers.tsv", ("speaker", "split", "sex", "voice", "warp"), table)
    sex_of = {speaker.id: speaker.sex for speaker in kept}
    for split in SPLITS:
        rows = [row for row in done if row["split"] == split]
        for style in LABELS:
            if style not in ("styles", "queries"):
                chosen = [row for row in rows if row["style"] == style]
                write_table(corpus / f"{style}.{split}.tsv", columns_of(style), chosen)
        aligned = [{**row, "phones": row["timed_phones"], "words": row["text"]} for row in rows]
        write_table(corpus / f"alignments.{split}.tsv", ALIGNMENT, aligned)
        if split != "train":
            read = [row for row in rows if row["style"] == "read"]
            generator = np.random.default_rng([SEED, SPLITS.index(split)])
            write_table(corpus / f"trials.{split}.tsv", ("label", "id_a", "id_b"), trials(read, sex_of, generator))


def main() -> None:
    """Assemble the corpus."""
    from mini_more_assemble import write_more

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument("--cache", type=Path, required=True, help="folder with utterances.tsv and clean/")
    parser.add_argument("--corpus", type=Path, default=Path("downstreams/mini"))
    parser.add_argument("--resume", action="store_true", help="keep the audio that is there and in the tables")
    parser.add_argument("--complete", action="store_true", help="an utterance missing from the cache is an error")
    arguments = parser.parse_args()
    packages, speakers = Packages(arguments.packages), read_speakers(arguments.cache / "speakers.tsv")
    if not arguments.resume:
        shutil.rmtree(arguments.corpus / "audio", ignore_errors=True)
    shutil.rmtree(arguments.corpus / "rttm", ignore_errors=True)
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    done = assemble(arguments.cache, arguments.corpus, packages, complete=arguments.complete, resume=arguments.resume)
    write_tables(done, speakers, arguments.corpus)
    write_more(done, arguments.cache, arguments.corpus, packages, resume=arguments.resume)


if __name__ == "__main__":
    main()
