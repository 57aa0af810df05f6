"""Changes of audio that leave the words alone: noise, room, gain, speed, pitch, telephone band, Opus.

Each is drawn from a seed and the utterance's id, so that the same utterance is changed in the same way whatever the encoder. Noise
and room are those of the embedded corpus' generator (tools/mini_assemble.py); levels are over the louder half of the speech.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError, unknown_name

Wave = NDArray[np.float64]
PEAK = 0.999
SEMITONE = 2.0 ** (1 / 12)
GRAIN_S, SEARCH_S = 0.030, 0.008  # of time stretching: windows, and how far each is moved to fit


@dataclass(frozen=True, slots=True)
class Change:
    """One way to change audio.

    Attributes:
        apply: from samples (S,) and a generator to the changed samples.
        time_factor: by which every time of an alignment is multiplied.
        what: in words.
    """

    apply: Callable[[Wave, np.random.Generator], Wave]
    time_factor: float
    what: str


def add_noise(wav: Wave, snr_db: float, generator: np.random.Generator) -> Wave:
    """Speech with noise whose power falls with frequency by a power drawn from 0 (white) to 2 (brown)."""
    spectrum = np.fft.rfft(generator.standard_normal(len(wav)))
    frequencies = np.maximum(np.fft.rfftfreq(len(wav), 1 / SAMPLE_RATE_HZ), 60.0)
    noise = np.fft.irfft(spectrum * frequencies ** (-generator.uniform(0.0, 2.0) / 2), len(wav))
    noisy: Wave = wav + noise * (speech_level(wav) * 10 ** (-snr_db / 20) / np.sqrt(np.mean(noise**2)))
    return noisy


def speech_level(wav: Wave) -> float:
    """Root mean square of the louder half of the 20 ms stretches.

    >>> speech_level(np.concatenate([np.zeros(3200), np.ones(3200)]))
    1.0
    """
    length = min(len(wav), SAMPLE_RATE_HZ // 50)
    powers = np.sort(np.square(wav[: len(wav) // length * length].reshape(-1, length)).mean(1))
    return float(np.sqrt(powers[len(powers) // 2 :].mean()))


def add_room(wav: Wave, generator: np.random.Generator) -> Wave:
    """Speech with the tail of a room: noise that decays by 60 dB in 0.3 to 0.6 s, 3 to 8 dB under the direct sound."""
    from scipy.signal import fftconvolve

    samples = int(generator.uniform(0.3, 0.6) * SAMPLE_RATE_HZ)
    response = generator.standard_normal(samples) * 10 ** (-3.0 * np.arange(samples) / samples)
    response[: int(0.002 * SAMPLE_RATE_HZ)] = 0.0
    response *= 10 ** (-generator.uniform(3.0, 8.0) / 20) / np.sqrt(np.square(response).sum())
    response[0] = 1.0
    return np.asarray(fftconvolve(wav, response)[: len(wav)])


def change_gain(wav: Wave, generator: np.random.Generator) -> Wave:
    """Speech 6 to 12 dB weaker."""
    return wav * 10 ** (-generator.uniform(6.0, 12.0) / 20)


def change_speed(wav: Wave, factor: float) -> Wave:
    """Audio played `factor` times as fast: pitch and formants move with it.

    >>> len(change_speed(np.zeros(16000), 0.8))
    20000
    """
    import soxr

    return np.asarray(soxr.resample(wav, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="HQ"))


def stretch_time(wav: Wave, num_samples: int) -> Wave:
    """Audio of another length at the same pitch: overlapping windows, each moved to where it fits best (WSOLA, Verhelst 1993)."""
    grain, search = int(GRAIN_S * SAMPLE_RATE_HZ) // 2 * 2, int(SEARCH_S * SAMPLE_RATE_HZ)
    hop, window = grain // 2, np.hanning(grain + 1)[:-1]
    margin = grain + search
    source = np.pad(wav, (margin, margin + grain + search))
    count = num_samples // hop + 2
    stretched, weight = np.zeros((count + 2) * hop + grain), np.zeros((count + 2) * hop + grain)
    previous = None
    for number in range(count):
        place = margin - hop + round((number * hop) * (len(wav) - 1) / max(1, num_samples - 1))
        if previous is not None:
            expected = source[previous + hop : previous + hop + grain]
            area = source[place - search : place + search + grain]
            place += int(np.argmax(np.correlate(area, expected, mode="valid"))) - search
        stretched[number * hop : number * hop + grain] += source[place : place + grain] * window
        weight[number * hop : number * hop + grain] += window
        previous = min(place, len(source) - 2 * grain - search)
    return (stretched / np.maximum(weight, 1e-3))[hop : hop + num_samples]


def change_pitch(wav: Wave, semitones: float) -> Wave:
    """Speech at another pitch (its formants move too) and the same tempo and length."""
    factor = SEMITONE**semitones
    longer = stretch_time(wav, round(len(wav) * factor))
    played = change_speed(longer, factor)
    return np.pad(played, (0, max(0, len(wav) - len(played))))[: len(wav)]  # resampling rounds to a sample more or less


def telephone_band(wav: Wave) -> Wave:
    """Audio of which only 300 to 3400 Hz are left (Butterworth, order 4)."""
    from scipy.signal import butter, sosfilt

    return np.asarray(sosfilt(butter(4, (300.0, 3400.0), "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), wav))


def through_opus(wav: Wave) -> Wave:
    """Audio through Ogg Opus and back, at libsndfile's strongest compression."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS", compression_level=1.0)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float64")
    if len(decoded) != len(wav):
        raise RequestError(
            f"Opus gave {len(decoded)} samples of {len(wav)}. Fix: libsndfile 1.2 or later (soundfile 0.13)."
        )
    return np.asarray(decoded)


def _noise(snr_db: float) -> Change:
    return Change(
        lambda wav, generator: add_noise(wav, snr_db, generator), 1.0, f"noise {snr_db:g} dB under the speech"
    )


def _speed(factor: float) -> Change:
    return Change(lambda wav, generator: change_speed(wav, factor), 1 / factor, f"played {factor:g} times as fast")


def _pitch(semitones: float) -> Change:
    return Change(lambda wav, generator: change_pitch(wav, semitones), 1.0, f"pitch {semitones:+g} semitones")


CHANGES: Mapping[str, Change] = {
    "noise20": _noise(20.0),
    "noise10": _noise(10.0),
    "noise0": _noise(0.0),
    "room": Change(add_room, 1.0, "a room"),
    "gain": Change(change_gain, 1.0, "6 to 12 dB weaker"),
    "speed0.9": _speed(0.9),
    "speed1.1": _speed(1.1),
    "pitch+2": _pitch(2.0),
    "pitch-2": _pitch(-2.0),
    "telephone": Change(lambda wav, generator: telephone_band(wav), 1.0, "300 to 3400 Hz"),
    "opus": Change(lambda wav, generator: through_opus(wav), 1.0, "Ogg Opus, strongest compression"),
}


def change_audio(wav: NDArray[np.float32], name: str, utterance_id: str, seed: int = 0) -> NDArray[np.float32]:
    """The samples (S',) of an utterance, changed.

    Args:
        wav: (S,) at 16 kHz.
        name: one of `CHANGES`.
        utterance_id: with the seed, what the change is drawn from.
        seed: of all draws.

    Returns:
        float32; made weaker as a whole where it would leave [-1, 1].

    Raises:
        RequestError: for an unknown change.
    """
    if name not in CHANGES:
        raise unknown_name("change", name, CHANGES)
    digest = hashlib.sha256(f"{name} {utterance_id}".encode()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    changed = CHANGES[name].apply(wav.astype(np.float64), generator)
    peak = float(np.abs(changed).max(initial=0.0))
    return (changed * (PEAK / peak if peak > PEAK else 1.0)).astype(np.float32)


def write_changed(manifest: Manifest, name: str, folder: Path, seed: int = 0) -> Manifest:
    """A manifest of the same utterances with changed audio, written to a folder as WAV of 32-bit floats."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for number, utterance in enumerate(manifest):
        wav = change_audio(read_waveform(utterance, manifest.root), name, utterance.id, seed)
        file = f"{number:06d}.wav"
        soundfile.write(folder / file, wav, SAMPLE_RATE_HZ, subtype="FLOAT")
        changed.append(Utterance(utterance.id, file, 0.0, len(wav) / SAMPLE_RATE_HZ, utterance.labels))
    return Manifest(changed, folder, f"{manifest.name}-{name}")
