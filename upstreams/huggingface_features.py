"""transformers' encoders of log-mel features: Whisper's encoder and w2v-BERT 2.0, as `hf:NAME` builds them.

Their features are computed here, in float64 and from each utterance alone, by the recipes of transformers' WhisperFeatureExtractor
and SeamlessM4TFeatureExtractor.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import CheckError
from superb_probe.upstreams.attention import kernels_for
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo
from superb_probe.upstreams.fbank import HOP_SAMPLES, WINDOW_SAMPLES, log_mel_energies, mel_filters

WHISPER_CHUNK_SAMPLES = 480_000  # 30 s: the only length Whisper's encoder takes
WHISPER_FFT_SAMPLES = 400
WHISPER_HOP_SAMPLES = 160
HOP_OF_FRAMES = 320  # both give a frame of two feature frames
BERT_BINS = 80
BERT_STRIDE = 2  # feature frames stacked into one
BERT_VARIANCE_EPS = 1e-7
INT16_SCALE = 32768.0


class WhisperEncoder(Upstream):
    """Whisper's encoder (Radford et al., arXiv:2212.04356): every utterance is filled up with silence to 30 s, as in its training.

    Longer ones are encoded in pieces of 30 s that do not hear one another.
    """

    casts_inputs = True
    notes = ("each utterance is filled up to 30 s and encoded whole; one that is longer, in pieces of 30 s",)

    def __init__(self, model: nn.Module, info: UpstreamInfo, filters: Tensor) -> None:
        """`model` is the encoder alone; `filters` are its (frequencies, bins) mel filters."""
        super().__init__()
        self.model = model
        self.info = info
        self.filters = filters.double()
        self.requires_grad_(False).eval()

    def num_frames(self, num_samples: int) -> int:
        """Whole stretches of 20 ms."""
        return num_samples // HOP_OF_FRAMES

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The hidden states of every layer over each row's own frames."""
        counts = torch.tensor([self.num_frames(int(n)) for n in num_samples], device=wavs.device)
        states = _empty_states(self, wavs, counts)
        chunk_frames = self.num_frames(WHISPER_CHUNK_SAMPLES)
        for row, length in enumerate(num_samples.tolist()):
            for start in range(0, length, WHISPER_CHUNK_SAMPLES):
                first = start // HOP_OF_FRAMES
                kept = min(int(counts[row]) - first, chunk_frames)
                if kept < 1:
                    continue
                piece = wavs[row, start : min(length, start + WHISPER_CHUNK_SAMPLES)]
                features = self.features(piece)[None].to(states.dtype)
                hidden = _hidden_states(self, self.model, features, chunk_frames)
                states[:, row, first : first + kept] = hidden[:, 0, :kept]
        return LayerStates(states, counts)

    def features(self, wav: Tensor) -> Tensor:
        """Log-mel features (bins, 3000) of at most 30 s (S,), in float64: the last 80 dB, divided as in training."""
        padded = nn.functional.pad(wav.double(), (0, WHISPER_CHUNK_SAMPLES - wav.numel()))
        window = torch.hann_window(WHISPER_FFT_SAMPLES, dtype=torch.float64, device=wav.device)
        spectrum = torch.stft(padded, WHISPER_FFT_SAMPLES, WHISPER_HOP_SAMPLES, window=window, return_complex=True)
        power = spectrum[:, :-1].abs().square()
        log_mel = (self.filters.to(wav.device).T @ power).clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.max() - 8.0)
        return (log_mel + 4.0) / 4.0


class BertEncoder(Upstream):
    """w2v-BERT 2.0 (Seamless Communication, arXiv:2312.05187): filter banks normalised over the utterance, in pairs."""

    casts_inputs = True

    def __init__(self, model: nn.Module, info: UpstreamInfo) -> None:
        """`model` takes (B, T, 160) features."""
        super().__init__()
        self.model = model
        self.info = info
        self.filters = mel_filters(BERT_BINS)
        self.requires_grad_(False).eval()

    def num_frames(self, num_samples: int) -> int:
        """Whole pairs of 25 ms windows, 10 ms apart."""
        return max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1) // BERT_STRIDE

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The hidden states of every layer; only rows of one length are run together, so that none hears padding."""
        counts = torch.tensor([self.num_frames(int(n)) for n in num_samples], device=wavs.device)
        states = _empty_states(self, wavs, counts)
        rows_of_length: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(num_samples.tolist()):
            if counts[row] > 0:
                rows_of_length[length].append(row)
        for length, rows in rows_of_length.items():
            frames = self.num_frames(length)
            features = self.features(wavs[rows, :length]).to(states.dtype)
            states[:, rows, :frames] = _hidden_states(self, self.model, features, frames)
        return LayerStates(states, counts)

    def features(self, wavs: Tensor) -> Tensor:
        """(B, T, 160) features of waveforms of one length (B, S), in float64."""
        log_mel = log_mel_energies(wavs.double() * INT16_SCALE, self.filters)
        variance = log_mel.var(1, keepdim=True)
        normalised = (log_mel - log_mel.mean(1, keepdim=True)) / torch.sqrt(variance + BERT_VARIANCE_EPS)
        pairs = normalised.shape[1] // BERT_STRIDE
        return normalised[:, : pairs * BERT_STRIDE].reshape(len(wavs), pairs, BERT_STRIDE * BERT_BINS)


def _empty_states(upstream: Upstream, wavs: Tensor, counts: Tensor) -> Tensor:
    dtype = next(upstream.parameters()).dtype
    shape = (upstream.info.num_layers, wavs.shape[0], int(counts.max()), upstream.info.dim)
    return torch.zeros(shape, dtype=dtype, device=wavs.device)


def _hidden_states(upstream: Upstream, model: Any, features: Tensor, frames: int) -> Tensor:
    """(L, B, T, D) of features."""
    # Layer drop may draw a number even in eval mode.
    with torch.random.fork_rng(devices=[]), kernels_for(len(features), frames):
        got = torch.stack(list(model(features, output_hidden_states=True).hidden_states))
    expected = (upstream.info.num_layers, len(features), frames, upstream.info.dim)
    if got.shape != expected:
        raise CheckError(f"{upstream.info.name}: states of shape {tuple(got.shape)}, expected {expected}")
    return got
