"""How far ahead an upstream looks: measured by changing the waveform, whatever the model says of itself.

A frame t has its own window, samples [t * hop, t * hop + window), where `window` is the shortest input that gives a frame. The
look-ahead is how many samples after that window the state still depends on. Two things are told apart, for they call for different
repairs: an order-sensitive part, such as the 63 frames of HuBERT's centred positional convolution, and a part that cares for the
whole utterance but not for its order, such as a normalisation over time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.upstreams.base import LayerStates, Upstream

CHANGE_FLOOR = 1e-6  # relative change of a frame that counts as a change: ten times float32's rounding
ORDER_FLOOR = 3e-5  # the same where two sums over the utterance differ in order, and so in rounding
LENGTH_FLOOR = 1e-5  # the same between inputs of two lengths, where kernels may differ
SPAN_FRAMES = 160  # frames of the probing waveform, at least
LONGEST_WINDOW_S = 60.0  # an upstream that needs more for its first frame is not measured
COARSE_POSITIONS = 8
PERIOD_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Lookahead:
    """What a frame depends on after its own window.

    Attributes:
        samples: how many samples ahead; None is the whole utterance.
        order_frames: frames ahead whose order matters, above a change of `ORDER_FLOOR`; None where that is the whole utterance.
        end_effect: relative change of the first frame when only the last hop of the utterance changes.
        length_effect: relative change of frames out of reach of the end when the utterance is cut.
    """

    samples: int | None
    order_frames: int | None
    end_effect: float
    length_effect: float


def encode(upstream: Upstream, wavs: list[Tensor], *, extra_samples: int = 0) -> LayerStates:
    """The states of some waveforms, padded together and with `extra_samples` more zeros, on the CPU.

    Args:
        upstream: the encoder.
        wavs: B tensors (S_b,).
        extra_samples: zeros after the longest waveform; they belong to no row.
    """
    parameter = next(upstream.parameters(), None)
    device = parameter.device if parameter is not None else wavs[0].device
    num_samples = torch.tensor([wav.numel() for wav in wavs])
    padded = torch.zeros(len(wavs), int(num_samples.max()) + extra_samples)
    for row, wav in zip(padded, wavs, strict=True):
        row[: wav.numel()] = wav
    with torch.inference_mode():
        result = upstream(padded.to(device), num_samples.to(device))
    return LayerStates(result.states.cpu(), result.num_frames.cpu())


def window_samples(upstream: Upstream) -> int:
    """The shortest input that gives a frame, by bisection over `num_frames`; 0 if not even a minute gives one.

    >>> from superb_probe.upstreams.fbank import fbank
    >>> window_samples(fbank())
    400
    """
    high = 1
    while upstream.num_frames(high) < 1:
        high *= 2
        if high > LONGEST_WINDOW_S * upstream.info.sample_rate_hz:
            return 0
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if upstream.num_frames(middle) >= 1 else (middle, high)
    return high


def frame_changes(before: Tensor, after: Tensor) -> Tensor:
    """Relative change of each frame, of its worst layer: (T,).

    Args:
        before: (L, T, D).
        after: (L, T, D).

    >>> frame_changes(torch.ones(1, 2, 4), torch.tensor([[[1.0] * 4, [2.0] * 4]])).tolist()
    [0.0, 1.0]
    """
    before, after = before.double(), after.double()
    typical = before.norm(dim=-1).mean(dim=-1, keepdim=True).clamp(min=1e-12)
    changes: Tensor = (after - before).norm(dim=-1) / typical
    return changes.amax(dim=0)


class _Prober:
    """One waveform, its states, and what becomes of them when samples change."""

    def __init__(self, upstream: Upstream, num_frames: int, seed: int) -> None:
        self.upstream = upstream
        self.hop = upstream.info.hop_samples
        self.window = window_samples(upstream)
        self.num_frames = num_frames
        self.num_samples = self.window + (num_frames - 1) * self.hop
        self.generator = torch.Generator().manual_seed(seed)
        self.wav = 0.1 * torch.randn(self.num_samples, generator=self.generator)
        self.other = 0.3 * torch.randn(self.num_samples, generator=self.generator)
        self.states = self.encode(self.wav)

    def encode(self, wav: Tensor) -> Tensor:
        """(L, T, D) of one waveform (S,)."""
        states: Tensor = encode(self.upstream, [wav]).states[:, 0]
        return states

    def window_end(self, frame: int) -> int:
        """First sample after the frame's own window."""
        return frame * self.hop + self.window

    def changes(self, position: int) -> Tensor:
        """Change of every frame, (T,), when all samples from `position` on do."""
        changed = torch.cat([self.wav[:position], self.other[position:]])
        return frame_changes(self.states, self.encode(changed))

    def depends(self, frame: int, position: int) -> bool:
        """Whether the frame depends on any sample from `position` on."""
        return bool(self.changes(position)[frame] > CHANGE_FLOOR)

    def first_changed(self, position: int) -> int:
        """The first frame that depends on any sample from `position` on; T if none does."""
        changed = (self.changes(position) > CHANGE_FLOOR).nonzero()
        return int(changed[0]) if len(changed) else self.num_frames


def _reach(prober: _Prober, declared: int | None) -> int:
    """Samples after its window that the most far-seeing frame found depends on, exactly."""
    frame, known = prober.num_frames // 2, -1
    for index in range(COARSE_POSITIONS):
        share = 0.3 + 0.7 * (index + 0.5) / COARSE_POSITIONS
        position = int(share * prober.num_samples)
        first = prober.first_changed(position)
        reach = position + 1 - prober.window_end(first)
        if first < prober.num_frames and reach > known:
            frame, known = first, reach
    end = prober.window_end(frame)
    low, high = max(known, 0), prober.num_samples - end  # depends on `low` samples, perhaps on `high`
    if declared is not None and low <= declared < high:  # most often it is right: two looks instead of sixteen
        if not prober.depends(frame, end + declared):
            high = declared
            if declared > low and prober.depends(frame, end + declared - 1):
                low = declared
        else:
            low = declared + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if prober.depends(frame, end + middle - 1) else (low, middle - 1)
    return low


def _order_frames(prober: _Prober) -> int | None:
    """Frames ahead whose order a frame depends on; None if that is all of them.

    A burst on a periodic waveform is moved by one period: every statistic over time stays the same (but for rounding), so what
    changes is what sees the order.
    """
    period = PERIOD_FRAMES * prober.hop
    first = int(0.7 * prober.num_frames)
    start = prober.window_end(first) - prober.hop
    tile = 0.1 * torch.randn(period, generator=prober.generator)
    base = tile.repeat(prober.num_samples // period + 1)[: prober.num_samples]
    burst = 0.5 * torch.randn(prober.hop, generator=prober.generator)
    states = []
    for position in (start, start + period):
        wav = base.clone()
        wav[position : position + prober.hop] += burst
        states.append(prober.encode(wav))
    changed = (frame_changes(*states) > ORDER_FLOOR).nonzero()
    if not len(changed):
        return 0
    return None if int(changed[0]) == 0 else max(0, first - int(changed[0]))


def _length_effect(prober: _Prober, reach: int) -> float:
    """Relative change of the frames out of reach of the end when the utterance loses its last 40 %."""
    kept = int(0.6 * prober.num_samples)
    frames = (kept - reach - prober.window) // prober.hop + 1
    if frames < 1:
        return 0.0
    cut = prober.encode(prober.wav[:kept])
    return float(frame_changes(prober.states[:, :frames], cut[:, :frames]).max())


def measure_lookahead(upstream: Upstream, *, seed: int = 0) -> Lookahead:
    """The look-ahead of an upstream, from some ten to thirty runs on a waveform of 160 frames or more.

    Args:
        upstream: the encoder; `info.lookahead_samples` only sets how long a waveform is taken and where to look first.
        seed: of the waveforms.

    >>> from superb_probe.upstreams.fbank import fbank_no_cmvn
    >>> measure_lookahead(fbank_no_cmvn()).samples
    640
    """
    declared = upstream.info.lookahead_samples
    declared_frames = -(-(declared or 0) // upstream.info.hop_samples)
    prober = _Prober(upstream, max(SPAN_FRAMES, 3 * declared_frames), seed)
    end = prober.changes(prober.num_samples - prober.hop)
    end_effect = float(end[0])
    if bool((end[: prober.num_frames // 4] > CHANGE_FLOOR).any()):
        return Lookahead(None, _order_frames(prober), end_effect, 0.0)
    reach = _reach(prober, declared)
    length_effect = _length_effect(prober, reach)
    if length_effect > LENGTH_FLOOR:
        return Lookahead(None, -(-reach // prober.hop), end_effect, length_effect)
    return Lookahead(reach, -(-reach // prober.hop), end_effect, length_effect)
