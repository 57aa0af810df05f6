"""Log-mel filter banks and cepstra: the baselines that need no weights, as s3prl runs them.

Kaldi's front end (80 log-mel bins or 13 cepstra, 25 ms windows every 10 ms), its deltas and delta-deltas over five frames, and, for
`fbank` and `mfcc`, zero mean and unit variance over each utterance. s3prl computes them with `torchaudio.compliance.kaldi` on
waveforms in [-1, 1]; this is our own implementation of the same formulas (Povey et al., "The Kaldi speech recognition toolkit", 2011;
options of s3prl's `upstream/baseline/{fbank,fbank_no_cmvn,mfcc}.yaml`), batched, in float64, every row from its own samples only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask
from superb_probe.upstreams.stream import WindowedStream

PROVIDES = ("fbank", "fbank_no_cmvn", "mfcc")

SAMPLE_RATE_HZ = 16000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOW_HZ = 20.0
ENERGY_FLOOR = torch.finfo(torch.float32).eps  # what Kaldi puts under a mel energy before the logarithm
DELTA_REACH_FRAMES = 2  # a window of five frames
CMVN_EPS = 1e-10
CEPSTRAL_LIFTER = 22.0
SIZES = (None, "test", "tiny", "small", "base")  # one and the same here: there are no weights
REVISION = "analytic:1"  # the version of these formulas: raised when a number can change


def mel_filters(num_bins: int) -> Tensor:
    """Kaldi's triangular mel filters over the power spectrum, (bins, FFT_SAMPLES // 2 + 1) in float64.

    The triangles are straight in mel (1127 ln(1 + f / 700)) from 20 Hz to the Nyquist frequency, whose own bin has weight zero.

    >>> mel_filters(80).shape
    torch.Size([80, 257])
    """

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([LOW_HZ, SAMPLE_RATE_HZ / 2], dtype=torch.float64))
    edges = low + (high - low) / (num_bins + 1) * torch.arange(num_bins + 2, dtype=torch.float64)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = mel(torch.arange(FFT_SAMPLES // 2 + 1, dtype=torch.float64) * SAMPLE_RATE_HZ / FFT_SAMPLES)
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0.0)
    filters[:, -1] = 0.0
    return filters


def cepstral_matrix(num_ceps: int, num_bins: int) -> Tensor:
    """Kaldi's orthonormal cosine transform with its liftering, (bins, cepstra) in float64.

    >>> cepstral_matrix(13, 23).shape
    torch.Size([23, 13])
    """
    order = torch.arange(num_ceps, dtype=torch.float64)
    position = torch.arange(num_bins, dtype=torch.float64)[:, None] + 0.5
    transform = math.sqrt(2.0 / num_bins) * torch.cos(math.pi / num_bins * position * order)
    transform[:, 0] = math.sqrt(1.0 / num_bins)
    lifter = 1.0 + 0.5 * CEPSTRAL_LIFTER * torch.sin(math.pi * order / CEPSTRAL_LIFTER)
    return transform * lifter


def log_mel_energies(wavs: Tensor, filters: Tensor) -> Tensor:
    """Log-mel energies of every whole window of a batch.

    Args:
        wavs: (B, S) in [-1, 1], at least one window long.
        filters: (bins, FFT_SAMPLES // 2 + 1), of `mel_filters`.

    Returns:
        (B, T, bins) in float64; T counts the windows of the padded row.
    """
    frames = wavs.double().unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    phase = 2.0 * math.pi * torch.arange(WINDOW_SAMPLES, dtype=torch.float64) / (WINDOW_SAMPLES - 1)
    povey = (0.5 - 0.5 * torch.cos(phase)).clamp(min=0.0).pow(0.85).to(wavs.device)
    spectrum = torch.fft.rfft((frames - PREEMPHASIS * previous) * povey, n=FFT_SAMPLES)
    power = spectrum.real.square() + spectrum.imag.square()
    energies: Tensor = power @ filters.to(wavs.device).T
    return energies.clamp(min=ENERGY_FLOOR).log()


def deltas(features: Tensor, num_frames: Tensor) -> Tensor:
    """Regression deltas over five frames, each row's first and last own frame standing for those beyond its ends.

    Args:
        features: (B, T, D).
        num_frames: (B,) valid frames of each row.

    >>> deltas(torch.tensor([[[0.0], [0.0], [5.0], [9.0]]]), torch.tensor([3]))[0, :3, 0].tolist()
    [1.0, 1.5, 1.5]
    """
    last = (num_frames - 1).clamp(min=0)[:, None]
    time = torch.arange(features.shape[1], device=features.device)[None]

    def shifted(offset: int) -> Tensor:
        index = torch.minimum((time + offset).clamp(min=0), last)
        return features.gather(1, index[..., None].expand_as(features))

    steps = range(1, DELTA_REACH_FRAMES + 1)
    total = torch.zeros_like(features)
    for step in steps:
        total = total + step * (shifted(step) - shifted(-step))
    return total / (2 * sum(step * step for step in steps))


def normalize_frames(features: Tensor, mask: Tensor) -> Tensor:
    """Features with zero mean and unit variance over each row's own frames (CMVN).

    The deviation divides by T - 1, as s3prl's; a row of one frame, where that gives no number, becomes zero, and so does a column
    at the energy floor throughout, where s3prl divides one rounding error by another.

    Args:
        features: (B, T, D), float64: in float32 a constant column would be noise over its own rounding error.
        mask: (B, T), True on valid frames.
    """
    valid = mask[..., None]
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = (features * valid).sum(1, keepdim=True) / count
    centred = (features - mean) * valid
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (CMVN_EPS + deviation)


class FilterBank(Upstream):
    """Mel filter banks or cepstra with their deltas: one layer, no weights."""

    def __init__(self, name: str, *, num_bins: int = 80, num_ceps: int = 0, cmvn: bool = True) -> None:
        """`num_ceps` above zero gives cepstra instead of log-mel energies; `cmvn` normalises over the utterance."""
        super().__init__()
        self.cmvn = cmvn
        self.filters = mel_filters(num_bins)
        self.cepstra = cepstral_matrix(num_ceps, num_bins) if num_ceps else None
        self.info = UpstreamInfo(
            name=name,
            revision=REVISION,
            num_layers=1,
            dim=3 * (num_ceps or num_bins),
            sample_rate_hz=SAMPLE_RATE_HZ,
            hop_samples=HOP_SAMPLES,
            waveform_norm="none",
            lookahead_samples=None if cmvn else 2 * DELTA_REACH_FRAMES * HOP_SAMPLES,
            layer_convention="block_output",
            trained_on=(),
            license="Apache-2.0",
            citation='D. Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011',
        )
        self.eval()

    def num_frames(self, num_samples: int) -> int:
        """Whole windows of 400 samples, 160 apart."""
        return max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The features as the states of one layer, (1, B, T, D), float32 whatever the precision asked for."""
        counts = torch.tensor([self.num_frames(int(n)) for n in num_samples], device=wavs.device)
        max_frames = int(counts.max())
        if max_frames < 1:
            return LayerStates(wavs.new_zeros(1, wavs.shape[0], 0, self.info.dim, dtype=torch.float32), counts)
        features = log_mel_energies(wavs, self.filters)[:, :max_frames]
        if self.cepstra is not None:
            features = features @ self.cepstra.to(wavs.device)
        velocity = deltas(features, counts)
        features = torch.cat([features, velocity, deltas(velocity, counts)], dim=-1)
        mask = frame_mask(counts, max_frames)
        if self.cmvn:
            features = normalize_frames(features, mask)
        return LayerStates(features.masked_fill(~mask[..., None], 0.0).float()[None], counts)

    def stream(self, *, window_frames: int | None = None) -> WindowedStream:
        """A stream over one utterance; see `Upstream.stream`."""
        if window_frames is not None:
            raise RequestError(f"{self.info.name}: window_frames is for attention, which it has not. Fix: drop it.")
        return WindowedStream(self, past_frames=2 * DELTA_REACH_FRAMES)


def _refuse_weights(name: str, checkpoint: str | None, size: str | None, random: int | None) -> None:
    problems = []
    if checkpoint is not None:
        problems.append(f"it has no weights, so no checkpoint ({checkpoint}) either")
    if random is not None:
        problems.append(f"it has no weights, so none at random (seed {random}) either")
    if size not in SIZES:
        problems.append(f"size {size!r} is none of {', '.join(str(known) for known in SIZES[1:])}")
    if problems:
        raise RequestError(f"{name}: {'; '.join(problems)}. Fix: leave the option out.")


def fbank(checkpoint: str | None = None, *, size: str | None = None, random: int | None = None) -> FilterBank:
    """80 log-mel bins with deltas and delta-deltas (240), normalised over the utterance: SUPERB's FBANK.

    Normalised features have mean zero, so a task that averages them over time is at chance: use `fbank_no_cmvn` there.

    >>> fbank().info.dim
    240
    """
    _refuse_weights("fbank", checkpoint, size, random)
    return FilterBank("fbank")


def fbank_no_cmvn(checkpoint: str | None = None, *, size: str | None = None, random: int | None = None) -> FilterBank:
    """80 log-mel bins with deltas and delta-deltas (240), not normalised: SUPERB's FBANK for tasks that average over time.

    >>> fbank_no_cmvn().info.lookahead_samples
    640
    """
    _refuse_weights("fbank_no_cmvn", checkpoint, size, random)
    return FilterBank("fbank_no_cmvn", cmvn=False)


def mfcc(checkpoint: str | None = None, *, size: str | None = None, random: int | None = None) -> FilterBank:
    """13 cepstra of 23 mel bins with deltas and delta-deltas (39), normalised over the utterance.

    >>> mfcc().info.dim
    39
    """
    _refuse_weights("mfcc", checkpoint, size, random)
    return FilterBank("mfcc", num_bins=23, num_ceps=13)
