"""Audio files: what their headers say, and the stretch an utterance names, as one channel of float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from superb_probe.errors import RequestError

if TYPE_CHECKING:
    from superb_probe.downstreams.manifest import Manifest, Utterance

SAMPLE_RATE_HZ = 16000
WAVEFORMS = ("none", "gain", "gain_trim")
GAIN_DB = -3.0


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What the header of an audio file says.

    Attributes:
        sample_rate_hz: rate of the file.
        num_channels: 1 for mono.
        num_samples: samples of one channel.
    """

    sample_rate_hz: int
    num_channels: int
    num_samples: int

    @property
    def duration_s(self) -> float:
        """Length of the file."""
        return self.num_samples / self.sample_rate_hz


def read_header(path: Path) -> AudioHeader:
    """The header of a WAV, FLAC, OGG (Vorbis or Opus) or other file that libsndfile reads.

    Raises:
        RequestError: if the file is missing or not audio.
    """
    with _opened(path) as file:
        return AudioHeader(file.samplerate, file.channels, file.frames)


def _opened(path: Path) -> soundfile.SoundFile:
    if not path.is_file():
        raise RequestError(f"{path}: no such audio file. Fix: put it there, or correct the manifest or --root.")
    try:
        return soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as error:
        raise RequestError(
            f"{path}: cannot be read as audio ({error.error_string}). Fix: convert it to FLAC or WAV."
        ) from error


def _decoded(file: soundfile.SoundFile, start: int, count: int, where: str) -> NDArray[np.float32]:
    """So many samples, or as many as there are."""
    try:
        if start:
            file.seek(start)
        return file.read(count, dtype="float32")  # type: ignore[no-any-return]
    except soundfile.LibsndfileError as error:
        raise RequestError(f"{where}: cannot be decoded ({error.error_string}). Fix: replace the file.") from error


def read_waveform(
    utterance: Utterance,
    root: Path,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    waveform: Literal["none", "gain", "gain_trim"] | str = "none",
    *,
    resample: bool = False,
) -> NDArray[np.float32]:
    """The samples (S,) of an utterance: its stretch of the file, one channel, at `sample_rate_hz`.

    Args:
        utterance: what to read; exactly `duration_s` from `start_s`, or an error.
        root: the corpus root its `audio` is relative to.
        sample_rate_hz: rate the samples must have.
        waveform: effects: "none", "gain" (SoX's `gain -3`, as SUPERB's keyword spotting) or "gain_trim" (that and silence trimming,
            as its speaker verification).
        resample: convert another rate (soxr, high quality) instead of refusing it; `resampled_files` says which are. SUPERB's effects
            begin with that conversion, so they imply it: `Manifest.problems` is what refuses another rate where none is meant.

    Raises:
        RequestError: if the file cannot be read, has several channels or another rate, or ends before the stretch does.
    """
    if waveform not in WAVEFORMS:
        raise RequestError(f"unknown waveform effects {waveform!r}. Fix: one of {', '.join(WAVEFORMS)}.")
    path = root / utterance.audio
    with _opened(path) as file:
        header = AudioHeader(file.samplerate, file.channels, file.frames)
        wrong = stretch_error(utterance, header, sample_rate_hz, resample=resample or waveform != "none")
        if wrong is not None:
            raise RequestError(f"{utterance.id} ({path}): {wrong[0]}. Fix: {wrong[1]}")
        start, count = stretch_samples(utterance, header.sample_rate_hz)
        wav = _decoded(file, start, count, f"{utterance.id} ({path})")
    if wav.shape != (count,) or not np.isfinite(wav).all():
        raise RequestError(
            f"{utterance.id} ({path}): {wav.shape[0]} of {count} samples could be decoded to finite values. "
            "Fix: the file is damaged; replace it."
        )
    if header.sample_rate_hz != sample_rate_hz:
        import soxr

        wav = soxr.resample(wav, header.sample_rate_hz, sample_rate_hz, quality="HQ").astype(np.float32)
    if waveform != "none":
        from superb_probe.downstreams.sox import gain, gain_and_trim

        wav = gain(wav, GAIN_DB) if waveform == "gain" else gain_and_trim(wav, sample_rate_hz)
    return np.ascontiguousarray(wav, dtype=np.float32)


def stretch_samples(utterance: Utterance, sample_rate_hz: int) -> tuple[int, int]:
    """First sample of an utterance in its file and how many it has, at the file's rate.

    >>> from superb_probe.downstreams.manifest import Utterance
    >>> stretch_samples(Utterance("a", "a.wav", 0.5, 1.0, {}), 16000)
    (8000, 16000)
    """
    return round(utterance.start_s * sample_rate_hz), round(utterance.duration_s * sample_rate_hz)


def stretch_error(
    utterance: Utterance, header: AudioHeader, sample_rate_hz: int = SAMPLE_RATE_HZ, *, resample: bool = False
) -> tuple[str, str] | None:
    """What is wrong with reading this utterance from a file with this header, and the fix; None if nothing.

    >>> from superb_probe.downstreams.manifest import Utterance
    >>> stretch_error(Utterance("a", "a.wav", 0.0, 2.0, {}), AudioHeader(16000, 1, 16000))[0]
    '0.0 s to 2.0 s, but the file ends at 1.0 s'
    """
    if header.num_channels != 1:
        return f"{header.num_channels} channels, expected one", "mix down or keep one channel: `ffmpeg -ac 1`"
    if header.sample_rate_hz != sample_rate_hz and not resample:
        return (
            f"{header.sample_rate_hz} Hz, expected {sample_rate_hz} Hz; this task does not resample",
            f"convert the corpus once: `ffmpeg -ar {sample_rate_hz}`",
        )
    start, count = stretch_samples(utterance, header.sample_rate_hz)
    if count < 1:
        return f"duration_s {utterance.duration_s:g} is less than one sample", "correct duration_s"
    if start + count > header.num_samples:
        end_s = round(utterance.start_s + utterance.duration_s, 6)
        return (
            f"{utterance.start_s} s to {end_s} s, but the file ends at {header.duration_s} s",
            "correct the times, or leave duration_s empty for all from the start to the end of the file",
        )
    return None


def effective_samples(
    utterance: Utterance, manifest: Manifest, waveform: str, sample_rate_hz: int, *, resample: bool = False
) -> int:
    """Samples of an utterance as an encoder gets it; decoded only where effects or another rate ask for it."""
    other_rate = resample and read_header(manifest.root / utterance.audio).sample_rate_hz != sample_rate_hz
    if waveform != "gain_trim" and not other_rate:
        return round(utterance.duration_s * sample_rate_hz)
    return int(read_waveform(utterance, manifest.root, sample_rate_hz, waveform, resample=resample).size)
