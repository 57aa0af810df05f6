"""Changes of audio: each does what its name says, the same every time, and leaves times where it says they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.errors import RequestError
from superb_probe.probes.audio_changes import CHANGES, change_audio, speech_level, stretch_time, write_changed

RATE = 16000
Wave = NDArray[np.float32]


def tone(hz: float, seconds: float = 1.0) -> Wave:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def pitch_hz(wav: Wave) -> float:
    middle = wav[len(wav) // 4 : -len(wav) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 2**18))
    return float(np.argmax(spectrum) * RATE / 2**18)


def band_level(wav: Wave, low: float, high: float) -> float:
    spectrum, hz = np.abs(np.fft.rfft(wav)) ** 2, np.fft.rfftfreq(len(wav), 1 / RATE)
    return float(spectrum[(hz >= low) & (hz < high)].mean())


@pytest.fixture(scope="module")
def speech() -> Wave:
    manifest = read_splits(mini_root(), "read")["dev"]
    return read_waveform(manifest[0], manifest.root)


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_change_is_seeded_finite_and_as_long_as_it_says(name: str, speech: Wave) -> None:
    changed = change_audio(speech, name, "a")
    assert np.array_equal(changed, change_audio(speech, name, "a"))
    assert changed.dtype == np.float32 and np.isfinite(changed).all() and np.abs(changed).max() <= 1.0
    assert abs(len(changed) - len(speech) * CHANGES[name].time_factor) <= 1
    assert not np.array_equal(changed[: len(speech)], speech[: len(changed)])
    if name in ("noise10", "room", "gain"):
        assert not np.array_equal(changed, change_audio(speech, name, "b"))
        assert not np.array_equal(changed, change_audio(speech, name, "a", seed=1))


@pytest.mark.parametrize(("name", "snr_db"), [("noise20", 20), ("noise10", 10), ("noise0", 0)])
def test_noise_is_as_loud_as_it_says(name: str, snr_db: float, speech: Wave) -> None:
    quiet = 0.1 * speech  # loud noise may not clip: the ratio of levels is what is measured
    noise = change_audio(quiet, name, "a").astype(np.float64) - quiet
    found = 20 * np.log10(speech_level(quiet.astype(np.float64)) / np.sqrt(np.mean(noise**2)))
    assert found == pytest.approx(snr_db, abs=0.05)


@pytest.mark.parametrize(
    ("name", "factor"), [("pitch+2", 2 ** (2 / 12)), ("pitch-2", 2 ** (-2 / 12)), ("speed0.9", 0.9), ("speed1.1", 1.1)]
)
def test_pitch_and_speed_move_a_tone(name: str, factor: float) -> None:
    for hz in (150.0, 440.0):
        assert pitch_hz(change_audio(tone(hz), name, "a")) == pytest.approx(hz * factor, rel=0.01)


@pytest.mark.parametrize("name", ["pitch+2", "pitch-2"])
def test_another_pitch_keeps_the_tempo(name: str) -> None:
    gap = np.zeros(RATE // 2, np.float32)
    changed = change_audio(np.concatenate([tone(200.0, 0.5), gap, tone(200.0, 0.5)]), name, "a")
    level = [float(np.abs(changed[int(at * RATE) : int((at + 0.1) * RATE)]).mean()) for at in (0.2, 0.7, 1.1, 1.35)]
    assert (
        min(level[0], level[2], level[3]) > 0.15 and level[1] < 0.01
    )  # sound, gap, and sound to the end, where they were


def test_stretching_keeps_pitch_and_moves_times() -> None:
    wav = np.concatenate([tone(200.0, 0.5), np.zeros(RATE // 2, np.float32), tone(300.0, 0.5)])
    longer = stretch_time(wav.astype(np.float64), int(1.2 * len(wav)))
    assert len(longer) == int(1.2 * len(wav))
    assert pitch_hz(longer[: int(0.5 * RATE)].astype(np.float32)) == pytest.approx(200.0, rel=0.01)
    loud = np.flatnonzero(np.abs(longer) > 0.05)
    gap = loud[np.argmax(np.diff(loud))], loud[np.argmax(np.diff(loud)) + 1]
    assert gap[0] / RATE == pytest.approx(0.6, abs=0.03) and gap[1] / RATE == pytest.approx(1.2, abs=0.03)


def test_telephone_keeps_its_band() -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, RATE).astype(np.float32)
    changed = change_audio(noise, "telephone", "a")
    inside = band_level(changed, 500, 3000)
    assert inside == pytest.approx(band_level(noise, 500, 3000), rel=0.1)
    assert band_level(changed, 20, 120) < 0.01 * inside and band_level(changed, 6000, 8000) < 0.01 * inside


def test_gain_and_room() -> None:
    wav = tone(200.0)
    gain_db = 20 * np.log10(np.abs(change_audio(wav, "gain", "a")).max() / 0.3)
    assert -12.01 <= gain_db <= -5.99
    click = np.zeros(RATE, np.float32)
    click[1000] = 0.5
    tail = change_audio(click, "room", "a")
    assert (
        np.argmax(np.abs(tail)) == 1000 and np.abs(tail[:1000]).max() < 1e-6
    )  # direct sound in its place, nothing before
    early, late = np.square(tail[1100:3000]).mean(), np.square(tail[9000:10000]).mean()
    assert early > 10 * late


def test_opus_is_close_and_not_delayed(speech: Wave) -> None:
    changed = change_audio(speech, "opus", "a")
    lags = np.correlate(changed[4000:20000], speech[4400:19600], mode="valid")
    assert abs(int(np.argmax(lags)) - 400) <= 16


def test_a_changed_manifest_reads_as_what_was_made(tmp_path: Path) -> None:
    manifest = read_splits(mini_root(), "read")["dev"][:2]
    changed = write_changed(manifest, "speed0.9", tmp_path / "x")
    assert changed.ids == manifest.ids and not changed.problems(read_audio=True, label_columns=())
    expected = change_audio(read_waveform(manifest[0], manifest.root), "speed0.9", manifest[0].id)
    assert np.array_equal(read_waveform(changed[0], changed.root), expected)


def test_unknown_changes_are_refused() -> None:
    with pytest.raises(RequestError, match="noise10"):
        change_audio(tone(200.0), "noise11", "a")
