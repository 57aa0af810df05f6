"""Pack the speech of a pre-training run: Ogg files and one manifest in a folder that travels, and the list of what is kept out.

Sources: real corpora (folders with `manifest.csv`, see CORPORA), sentences that `pretrain_synthesise.py` spoke, and sentences that
flite speaks now, in its four voices under several warps. Synthesised speech gets the disturbances of `mini`'s sentences.
Whatever the exclusion list holds (dev and test of `mini` and of these corpora: files, texts, voices) is left out here, and said;
`superb-probe pretrain --exclude PACK/exclusion.txt` refuses it again.

    python tools/pretrain_pack.py --out pack --corpora DIR --kokoro CACHE --packages DIR --flite LIBRARIES --flite-hours 2
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from mini_assemble import (
    SPEECH_LEVEL_DB,
    Disturbance,
    coloured_noise,
    decibels,
    generator_of,
    level,
    microphone,
    reverberate,
)
from mini_model import SYNTHESIS_RATE_HZ, Packages
from mini_ogg import set_serial
from mini_text import sentences
from mini_voices import SAMPLE_RATE_HZ
from pretrain_synthesise import held_out_texts, rows_of, stretches

from superb_probe.pretrain_corpus import Exclusion, build_exclusion, normal_text

SEED = 20_261_126
COMPRESSION = 0.95  # of Opus: about 20 kbit/s, 30 times as fast as it is spoken; Vorbis at its smallest has 27 to 34
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
FLITE_WARPS = (0.88, 0.94, 1.0, 1.06, 1.12)
EDGE_DB = -40.0  # below the loudest 20 ms: silence at the ends
LONGEST_S = 15.0
# Real corpora: licence, and utterances to leave out (transcript and audio do not agree).
CORPORA = {
    "librispeech_mini": ("CC BY 4.0", ("6081-41997-0000", "7078-271888-0000", "3235-11599-0000")),
    "speech_commands_3w": ("CC BY 4.0", ()),
    "emodb4": ("CC0 1.0", ()),
    "fsdd": ("CC BY-SA 4.0", ()),
    "ami_diarization": ("CC BY 4.0", ()),
}
# What is heard of a corpus, by the names that superb_probe.results.overlap judges scores by.
HEARD = {
    "librispeech_mini": "librispeech-train-clean-100",
    "ami_diarization": "ami-train",
    "kokoro": "kokoro-train",  # none of the voices, blends and sentences of `mini`'s dev and test
}
# Only their dev and test splits are read, to be kept out: speakers of picovoice_intent are unknown and cross its splits, and
# ljspeech32's reader is of LibriVox, where LibriSpeech's test speakers are from.
KEPT_OUT_ONLY = ("picovoice_intent", "ljspeech32")
COLUMNS = ("id", "audio", "start_s", "duration_s", "corpus", "license", "voice", "text")


@dataclass(frozen=True, slots=True)
class Clip:
    """An utterance to pack: samples (S,) at 16 kHz and what is known of it."""

    id: str
    corpus: str
    license: str
    voice: str
    text: str
    audio: np.ndarray


def real_rows(corpora: Path, name: str) -> list[dict[str, str]]:
    """The rows of a corpus folder's manifest.csv."""
    with (corpora / name / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_kept_out(corpora: Path, target: Path) -> None:
    """A manifest of every dev and test utterance of the corpora, with voices and texts as `superb-probe pretrain` compares them."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, COLUMNS, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
        )
        writer.writeheader()
        for name in (*CORPORA, *KEPT_OUT_ONLY):
            for row in real_rows(corpora, name):
                if row["split"] == "train":
                    continue
                voice = "+".join(f"{name}:{each}" for each in row["speaker"].split("|") if each)
                cells = {"id": f"{name}/{row['utt_id']}", "audio": f"{name}/{row['path']}", "start_s": "0"}
                cells |= {"duration_s": "", "corpus": name, "license": "", "voice": voice, "text": row["transcript"]}
                writer.writerow(cells)


def real_clips(corpora: Path) -> Iterator[Clip]:
    """Train utterances of the corpora as they are."""
    for name, (licence, bad) in CORPORA.items():
        for row in real_rows(corpora, name):
            if row["split"] != "train" or row["utt_id"] in bad:
                continue
            audio, rate = soundfile.read(corpora / name / row["path"], dtype="float64")
            if rate != SAMPLE_RATE_HZ or audio.ndim != 1:
                raise ValueError(f"{row['path']}: {rate} Hz, {audio.ndim} dimensions; expected 16 kHz mono")
            voice = "+".join(f"{name}:{each}" for each in row["speaker"].split("|") if each)
            parts = max(1, int(np.ceil(len(audio) / SAMPLE_RATE_HZ / (LONGEST_S + 1))))
            for part, piece in enumerate(np.array_split(audio, parts)):
                suffix = f"-{part}" if parts > 1 else ""
                yield Clip(f"{row['utt_id']}{suffix}", name, licence, voice, row["transcript"], piece)


def kokoro_clips(cache: Path) -> Iterator[Clip]:
    """What `pretrain_synthesise.py` has spoken so far, disturbed."""
    for row in rows_of(cache / "utterances.tsv"):
        path = cache / "clean" / f"{row['id']}.npz"
        if not path.is_file():
            continue
        with np.load(path) as stored:
            clean = stored["audio"].astype(np.float32) / 32767
        voice = "+".join(f"kokoro:{each}" for each in row["voice"].split("+"))
        audio = disturbed(row["id"], clean, SYNTHESIS_RATE_HZ, float(row["warp"]))
        yield Clip(row["id"], "kokoro", "Apache-2.0", voice, row["text"], audio)


class _Wave(ctypes.Structure):
    """flite's cst_wave."""

    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class Flite:
    """flite 2.2 by its shared libraries: a process for every sentence costs more than the sentence."""

    def __init__(self, folder: Path) -> None:
        """`folder` has libflite.so.1 and the voices'."""
        libraries = ("flite", "flite_cmulex", "flite_usenglish", *(f"flite_cmu_us_{name}" for name in FLITE_VOICES))
        loaded = {name: ctypes.CDLL(str(folder / f"lib{name}.so.1"), ctypes.RTLD_GLOBAL) for name in libraries}
        self.flite = loaded["flite"]
        self.flite.flite_init()
        self.flite.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
        self.voices: dict[str, ctypes.c_void_p] = {}
        for name in FLITE_VOICES:
            register = getattr(loaded[f"flite_cmu_us_{name}"], f"register_cmu_us_{name}")
            register.restype = ctypes.c_void_p
            self.voices[name] = ctypes.c_void_p(register(None))

    def __call__(self, text: str, voice: str, stretch: float) -> tuple[np.ndarray, int]:
        """Samples (S,) float32 and their rate."""
        # A cst_voice begins with a pointer to its name and one to its features.
        features = ctypes.cast(self.voices[voice], ctypes.POINTER(ctypes.c_void_p))[1]
        name = b"duration_stretch"
        self.flite.feat_set_float(ctypes.c_void_p(features), name, ctypes.c_float(stretch))
        wave = self.flite.flite_text_to_wave(text.encode(), self.voices[voice])
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        rate = int(wave.contents.sample_rate)
        self.flite.delete_wave(wave)
        return samples.astype(np.float32) / 32768, rate


def flite_clips(folder: Path, hours: float, packages: Packages, texts: list[Path]) -> Iterator[Clip]:
    """Sentences that flite speaks, from the same patterns and texts but other draws, disturbed."""
    own = sentences(np.random.default_rng([SEED, 1]), packages.pronunciations)
    other = stretches(texts, packages.pronunciations, np.random.default_rng([SEED, 2]))
    generator, held_out, speak = np.random.default_rng([SEED, 3]), held_out_texts(), Flite(folder)
    spoken_s, number = 0.0, 0
    while spoken_s < 3600 * hours:
        number += 1
        text = next(own) if number % 2 else next(other, None) or next(own)
        voice, warp = str(generator.choice(FLITE_VOICES)), float(generator.choice(FLITE_WARPS))
        stretch = generator.uniform(0.85, 1.15) * warp
        if text.replace(",", "").upper() in held_out:
            continue
        name = f"fl{number:05d}"
        audio = disturbed(name, *speak(text, voice, stretch), warp)
        spoken_s += len(audio) / SAMPLE_RATE_HZ
        yield Clip(name, "flite", "BSD-style (flite)", f"flite:{voice}", text, audio)


def disturbed(name: str, clean: np.ndarray, rate_hz: int, warp: float) -> np.ndarray:
    """Speech (S,) with silence at its ends cut, played `warp` times faster, and disturbed as `mini`'s sentences are, by its id."""
    frame = rate_hz // 50
    powers = (clean[: len(clean) // frame * frame].reshape(-1, frame) ** 2).mean(1)
    loud = np.flatnonzero(powers > powers.max() * decibels(EDGE_DB) ** 2)
    clean = clean[max(0, loud[0] - 1) * frame : (loud[-1] + 3) * frame]
    generator = generator_of(name)
    how = Disturbance.draw(generator, "read")
    speech = soxr.resample(clean, rate_hz * warp * how.speed, SAMPLE_RATE_HZ, quality="HQ").astype(np.float64)
    speech *= decibels(SPEECH_LEVEL_DB) / level(speech)
    lead, trail = (round(seconds * SAMPLE_RATE_HZ) for seconds in (how.lead_s, how.trail_s))
    padded = reverberate(np.pad(speech, (lead, trail)), how, generator)
    noise = coloured_noise(len(padded), how, generator) * decibels(SPEECH_LEVEL_DB - how.snr_db)
    audio = microphone(padded + noise, how) * decibels(how.gain_db)
    return audio / max(1.0, float(np.abs(audio).max()) / 0.99)


def reasons(clip: Clip, exclusion: Exclusion) -> list[str]:
    """Kinds of things of the exclusion list that a clip shares."""
    found = ["voice"] if set(clip.voice.split("+")) & exclusion.voices else []
    return found + (["text"] if clip.text and normal_text(clip.text) in exclusion.texts else [])


def pack(clip: Clip, out: Path) -> dict[str, str]:
    """Encode a clip; its line of the manifest."""
    path = f"audio/{clip.corpus}/{clip.id}.ogg"
    target = out / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        soundfile.write(target, clip.audio, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
        set_serial(target, int.from_bytes(hashlib.sha256(f"{clip.corpus}/{clip.id}".encode()).digest()[:4], "big"))
    seconds = soundfile.info(target).frames / SAMPLE_RATE_HZ
    cells = {"id": f"{clip.corpus}-{clip.id}", "audio": path, "start_s": "0", "duration_s": f"{seconds:.7g}"}
    text = " ".join(clip.text.split())
    cells["corpus"] = HEARD.get(clip.corpus, clip.corpus)
    return {**cells, "license": clip.license, "voice": clip.voice, "text": text}


def main() -> None:
    """Write the pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pack; files that are there are kept")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the real corpora")
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument("--kokoro", type=Path, help="cache of pretrain_synthesise.py")
    parser.add_argument("--flite", type=Path, help="folder of flite's shared libraries")
    parser.add_argument("--flite-hours", type=float, default=2.0)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="as of pretrain_synthesise.py")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # The manifest's audio is relative to its folder: links stand for the corpora, which may be read-only.
        for name in (*CORPORA, *KEPT_OUT_ONLY):
            (Path(folder) / name).symlink_to((arguments.corpora / name).resolve())
        kept_out = Path(folder) / "kept_out.tsv"
        write_kept_out(arguments.corpora, kept_out)
        exclusion = build_exclusion([kept_out])
    (arguments.out / "exclusion.txt").write_text("\n".join(exclusion.lines()) + "\n", encoding="utf-8")
    sources = [real_clips(arguments.corpora)]
    if arguments.kokoro:
        sources.append(kokoro_clips(arguments.kokoro))
    if arguments.flite:
        packages = Packages(arguments.packages)
        sources.append(flite_clips(arguments.flite, arguments.flite_hours, packages, arguments.texts))
    rows, left_out, hours = [], Counter[str](), Counter[str]()
    with ThreadPoolExecutor(1) as pool:
        clips = (clip for source in sources for clip in source)
        wanted = []
        for clip in clips:
            if why := reasons(clip, exclusion):
                left_out[f"{clip.corpus}: {', '.join(why)}"] += 1
                continue
            wanted.append(pool.submit(pack, clip, arguments.out))
        rows = [each.result() for each in wanted]
    for row in rows:
        hours[row["corpus"]] += float(row["duration_s"]) / 3600
    with (arguments.out / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, COLUMNS, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
        )
        writer.writeheader()
        writer.writerows(rows)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    said = {"hours": {k: round(v, 3) for k, v in hours.items()}, "all_hours": round(sum(hours.values()), 3)}
    said |= {"clips": len(rows), "megabytes": round(size / 1e6, 2), "left_out": dict(left_out)}
    print(json.dumps({**said, "exclusion_digest": exclusion.digest}, indent=2))


if __name__ == "__main__":
    main()
