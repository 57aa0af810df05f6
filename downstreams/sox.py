"""Two effects of SoX 14.4.2, sample for sample: `gain` and the `silence` that removes it wherever it is.

SUPERB's speaker verification reads every file through `gain -3.0` and `silence 1 0.1 0.1% -1 0.1 0.1%` (s3prl,
downstream/sv_voxceleb1). The numbers of this task depend on what these keep, so they are reproduced here without SoX:
SoX works on 32-bit integers, and so does this module where a decision depends on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FULL_SCALE = 2**31  # SoX holds every sample as a 32-bit integer
WINDOWS_PER_S = 50  # the effect's loudness is taken over 20 ms

Waveform = NDArray[np.float32]


def gain(wav: Waveform, db: float) -> Waveform:
    """The waveform (S,) made louder or softer by `db` decibels, rounded as SoX rounds and clipped at full scale.

    >>> float(gain(np.full(4, 0.5, dtype=np.float32), -6.0206)[0])  # half the amplitude
    0.25
    """
    return _to_float(_gain_int(_to_int(wav), db))


def trim_silence(
    wav: Waveform, sample_rate_hz: int = 16000, *, duration_s: float = 0.1, threshold_percent: float = 0.1
) -> Waveform:
    """The waveform (S,) without its silences: `silence 1 0.1 0.1% -1 0.1 0.1%`.

    What is kept starts where the loudness stays above the threshold for `duration_s`, and ends before the first stretch of
    `duration_s` below it; then the search for a start begins anew, so silence inside is removed too. Loudness is the root
    mean square of the last 20 ms, counted from zero after each cut.

    >>> tone = np.full(16000, 0.1, dtype=np.float32)
    >>> quiet = np.zeros(16000, dtype=np.float32)
    >>> trim_silence(np.concatenate([quiet, tone, quiet])).shape  # the window still hears the tone for 20 ms
    (16319,)
    """
    samples = _to_int(wav)
    return _to_float(samples[_kept(samples, sample_rate_hz, duration_s, threshold_percent)])


def gain_and_trim(wav: Waveform, sample_rate_hz: int = 16000) -> Waveform:
    """SUPERB's effects for speaker verification: gain of -3 dB, then silence trimming, without rounding to float between.

    >>> gain_and_trim(np.zeros(8000, dtype=np.float32)).size
    0
    """
    samples = _gain_int(_to_int(wav), -3.0)
    return _to_float(samples[_kept(samples, sample_rate_hz, 0.1, 0.1)])


def _to_int(wav: Waveform) -> NDArray[np.int64]:
    if wav.ndim != 1:
        raise ValueError(f"expected one channel (S,), got an array of shape {wav.shape}")
    scaled = np.rint(wav.astype(np.float64) * FULL_SCALE)
    clipped: NDArray[np.int64] = np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int64)
    return clipped


def _to_float(samples: NDArray[np.int64]) -> Waveform:
    return (samples / FULL_SCALE).astype(np.float32)


def _gain_int(samples: NDArray[np.int64], db: float) -> NDArray[np.int64]:
    scaled = np.floor(samples * 10.0 ** (db / 20.0) + 0.5)
    clipped: NDArray[np.int64] = np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int64)
    return clipped


def _kept(
    samples: NDArray[np.int64], sample_rate_hz: int, duration_s: float, threshold_percent: float
) -> NDArray[np.bool_]:
    """Which samples (S,) the effect lets through."""
    window = sample_rate_hz // WINDOWS_PER_S
    duration = round(duration_s * sample_rate_hz)
    loud = _Loudness(samples, window, threshold_percent)
    kept = np.zeros(samples.size, dtype=np.bool_)
    position = 0
    while True:
        loud.restart(position)
        begin = _first_run(loud.above, position, duration, value=True)
        if begin is None:
            return kept  # what was held back while looking for a start is dropped
        silence = _first_run(loud.above, begin + duration, duration, value=False)
        if silence is None:
            kept[begin:] = True  # a tail shorter than `duration` is kept, loud or not
            return kept
        kept[begin:silence] = True
        position = silence + duration


class _Loudness:
    """Whether the root mean square of the window that ends at each sample is above the threshold.

    The sums are exact: squares are capped at what makes the whole window loud by itself, which no comparison can tell from the
    uncapped sum, and which keeps every windowed sum far inside 64 bits.
    """

    def __init__(self, samples: NDArray[np.int64], window: int, threshold_percent: float) -> None:
        self.window = window
        # SoX truncates the root to an integer before it compares: the least integer above the threshold decides.
        least = int(np.floor(threshold_percent / 100.0 * (FULL_SCALE - 1))) + 1
        self.loud_sum = window * least**2
        root = np.int64(int(self.loud_sum**0.5) + 1)
        self.squares = np.minimum(np.abs(samples), root) ** 2
        self.total = np.concatenate(
            [np.zeros(1, dtype=np.int64), np.cumsum(self.squares)]
        )  # may wrap; differences do not
        first = np.maximum(np.arange(samples.size) + 1 - window, 0)
        self.above = self.total[1:] - self.total[first] >= self.loud_sum

    def restart(self, position: int) -> None:
        """Forget what came before `position`, as SoX clears its window after a cut."""
        end = min(position + self.window, self.above.size)
        self.above[position:end] = self.total[position + 1 : end + 1] - self.total[position] >= self.loud_sum


def _first_run(flags: NDArray[np.bool_], start: int, length: int, *, value: bool) -> int | None:
    """Where the first `length` equal flags in a row begin, at or after `start`; None if nowhere."""
    chunk = 16 * length
    while start + length <= flags.size:
        part = flags[start : start + chunk] == value
        edges = np.flatnonzero(np.diff(np.concatenate([[False], part, [False]]).astype(np.int8)))
        begins, ends = edges[::2], edges[1::2]
        long_enough = np.flatnonzero(ends - begins >= length)
        if long_enough.size:
            return start + int(begins[long_enough[0]])
        # A run cut by the end of the part is looked at again from its beginning.
        start += int(begins[-1]) if ends.size and ends[-1] == part.size else part.size
    return None
