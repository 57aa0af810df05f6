"""SoX's gain and silence: against SoX's own output, and against its rule written out sample by sample."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import soundfile

from superb_probe.downstreams import sox

RATE = 16000


def cases(shared):
    stored = np.load(shared / "fixtures" / "sox" / "sox_effects.npz", allow_pickle=False)
    for number in range(sum(name.endswith("/path") for name in stored.files)):
        path = shared / "data" / str(stored[f"{number:02d}/path"])
        if path.is_file():
            wav, _ = soundfile.read(path, dtype="float32")
            yield number, wav, stored[f"{number:02d}/gain"], stored[f"{number:02d}/gain_silence"]


def test_sox_itself_gives_the_same(shared):
    count = 0
    for number, wav, gained, trimmed in cases(shared):
        assert np.abs(sox.gain(wav, -3.0) - gained).max() <= 1e-6, number
        ours = sox.gain_and_trim(wav)
        assert ours.shape == trimmed.shape, number
        assert np.abs(ours - trimmed).max() <= 1e-6, number
        count += 1
    assert count == 11


def by_the_rule(wav: np.ndarray) -> np.ndarray:
    """The effect as a state machine, one sample at a time, in plain Python integers."""
    samples = [round(float(value) * 2**31) for value in wav]
    window, duration, threshold = [0] * 320, 1600, 0.001 * (2**31 - 1)
    kept: list[int] = []
    held: list[int] = []
    looking, position, total = True, 0, 0
    for value in samples:
        total += value * value - window[position]
        window[position] = value * value
        position = (position + 1) % 320
        loud = math.isqrt(total // 320) > threshold
        if looking:
            held = [*held, value] if loud else []
            if len(held) >= duration:
                kept, held, looking = kept + held, [], False
        elif loud:
            kept, held = [*kept, *held, value], []
        else:
            held.append(value)
            if len(held) >= duration:
                held, looking, window, total = [], True, [0] * 320, 0
    return np.asarray(kept if looking else kept + held, dtype=np.float64) / 2**31


def signal(seed: int) -> np.ndarray:
    """Stretches of noise, silent, around the threshold and loud."""
    generator = np.random.default_rng(seed)
    parts = [
        generator.normal(size=int(generator.integers(200, 5000))) * generator.choice([0.0, 3e-4, 9.5e-4, 1.05e-3, 0.05])
        for _ in range(14)
    ]
    return np.clip(np.concatenate(parts), -1, 1).astype(np.float32)


def level(*stretches: tuple[float, int]) -> np.ndarray:
    return np.concatenate([np.full(length, height, dtype=np.float32) for height, length in stretches])


def on_the_edge() -> list[np.ndarray]:
    """Sounds and silences as long as the rule asks, give or take a few samples, and a rise right after a cut."""
    sounds = [level((0.0, 900), (0.05, length), (0.0, 4000)) for length in range(1276, 1292, 5)]
    rises = [
        level((0.0, 900), (0.2, 3000), (9.9e-4, length), (1.05e-3, 3000), (0.2, 2000))
        for length in range(1850, 1950, 20)
    ]
    return sounds + rises


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and bool(np.abs(first - second).max(initial=0.0) <= 1e-7)


def test_the_rule_written_out_gives_the_same_on_the_edge():
    wavs = on_the_edge()
    assert all(same(sox.trim_silence(wav), by_the_rule(wav)) for wav in wavs)
    assert {sox.trim_silence(wav).size > 0 for wav in wavs} == {True, False}


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_written_out_gives_the_same(seed):
    wav = signal(seed)
    trimmed = sox.trim_silence(wav)
    assert same(trimmed, by_the_rule(wav))
    assert 0 < trimmed.size < wav.size


@pytest.mark.parametrize("name", ["window", "threshold", "duration", "restart", "tail"])
def test_a_wrong_rule_would_be_seen(name, monkeypatch):
    """Mutants: another window, threshold or duration, a window not cleared after a cut, a tail dropped."""
    options = {"threshold": {"threshold_percent": 0.101}, "duration": {"duration_s": 0.1005}}.get(name, {})
    if name == "window":
        monkeypatch.setattr(sox, "WINDOWS_PER_S", 49)
    if name == "restart":
        monkeypatch.setattr(sox._Loudness, "restart", lambda self, position: None)
    if name == "tail":
        first_run = sox._first_run
        monkeypatch.setattr(
            sox,
            "_first_run",
            lambda f, start, length, value: first_run(f, start, 1 if not value else length, value=value),
        )
    signals = [signal(0), *on_the_edge()]
    assert not all(same(sox.trim_silence(wav, **options), by_the_rule(wav)) for wav in signals)


def test_edges():
    assert sox.trim_silence(np.zeros(0, dtype=np.float32)).size == 0
    assert sox.trim_silence(np.zeros(RATE, dtype=np.float32)).size == 0
    loud = np.full(RATE, 0.5, dtype=np.float32)
    assert np.array_equal(sox.trim_silence(loud), loud)
    assert sox.trim_silence(loud[:1599]).size == 0  # a sound shorter than 0.1 s is no start
    assert sox.gain(loud, 12.0).max() <= 1.0  # clipped
    with pytest.raises(ValueError, match="one channel"):
        sox.gain(np.zeros((2, 5), dtype=np.float32), -3.0)


def test_trimming_is_fast():
    generator = np.random.default_rng(0)
    level = np.repeat(generator.choice([0.0, 0.1], size=600), 1600)
    wav = (generator.normal(size=level.size) * level).astype(np.float32)
    best_s = math.inf
    for _ in range(3):
        started = time.process_time()
        sox.gain_and_trim(wav)
        best_s = min(best_s, time.process_time() - started)
    assert wav.size / RATE / best_s > 200
