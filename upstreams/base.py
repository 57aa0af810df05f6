"""What turns audio into layer states: the interface every upstream meets.

Glossary of shape letters, used in all docstrings:
**B** utterances in a batch, **S** samples, **L** layers, **T** frames, **D** width, **C** classes, **U** utterances of a split.
Units are in the names: ``_s`` seconds, ``_hz``, ``_samples``, ``_frames``, ``_bytes``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError

if TYPE_CHECKING:
    from superb_probe.upstreams.stream import Stream


@dataclass(frozen=True, slots=True)
class UpstreamInfo:
    """What must be known of an encoder before it is run.

    Attributes:
        name: the registered name.
        revision: identity of the weights: "sha256:...", "hf:<commit>" or "random:<seed>".
        num_layers: L. Layer 0 is the input of the first encoder layer (after positional convolution and norm), layer i the
            output of encoder layer i: 13 for the Base models, as s3prl counts.
        dim: D, the same for every layer.
        sample_rate_hz: rate the waveforms must have.
        hop_samples: samples between frames, e.g. 320 (20 ms at 16 kHz).
        waveform_norm: "none", or "utterance" (zero mean, unit variance): what the original checkpoint's recipe says.
            `Upstream.forward` applies it itself.
        lookahead_samples: samples after its own window that frame t depends on; 0 is strictly causal, None is the whole
            utterance. Declared here, measured by `check upstream`.
        layer_convention: "block_output" or "before_residual" (fairseq and HF differ; results are not comparable across it).
        trained_on: corpora heard in training, with the parts where it was not all of one, so that overlap with a task's test set is
            marked (results/overlap.py); () for random weights and fixed transforms, ("unknown",) where nobody says.
        license: licence of the weights.
        citation: the paper to cite.
    """

    name: str
    revision: str
    num_layers: int
    dim: int
    sample_rate_hz: int
    hop_samples: int
    waveform_norm: str
    lookahead_samples: int | None
    layer_convention: str
    trained_on: tuple[str, ...]
    license: str
    citation: str


@dataclass(frozen=True, slots=True)
class LayerStates:
    """The states of every layer for a batch, on one time grid.

    Attributes:
        states: (L, B, T, D) float tensor; frames at or past `num_frames[b]` are zero.
        num_frames: (B,) int64, exactly `upstream.num_frames(num_samples[b])`.
    """

    states: Tensor
    num_frames: Tensor


class Upstream(nn.Module, ABC):
    """A frozen encoder. Subclasses implement two methods; `superb-probe check upstream NAME` says whether they are right."""

    info: UpstreamInfo

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Frames produced for an utterance of that many samples; 0 if it is too short."""

    @abstractmethod
    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """Encode a batch.

        Args:
            wavs: (B, S) float32 in [-1, 1] at `info.sample_rate_hz`, zeros after each row's end.
            num_samples: (B,) int64, valid samples of each row.
        """

    def extract(self, wavs: Sequence[Tensor]) -> LayerStates:
        """The states of some utterances: padded together, encoded without gradients.

        Args:
            wavs: B tensors of shape (S_b,).

        Raises:
            RequestError: if a waveform is not one-dimensional or too short for one frame; all of them are named.
        """
        problems = [f"waveform {i}: shape {tuple(w.shape)}, expected (S,)" for i, w in enumerate(wavs) if w.ndim != 1]
        problems += [
            f"waveform {i}: {w.numel()} samples give no frame"
            for i, w in enumerate(wavs)
            if w.ndim == 1 and self.num_frames(w.numel()) < 1
        ]
        if problems or not wavs:
            raise RequestError(f"{self.info.name}: " + ("; ".join(problems) or "no waveforms given"))
        parameter = next(self.parameters(), None)
        device = parameter.device if parameter is not None else wavs[0].device
        num_samples = torch.tensor([w.numel() for w in wavs])
        padded = nn.utils.rnn.pad_sequence([w.float() for w in wavs], batch_first=True)
        with torch.inference_mode():
            return self(padded.to(device), num_samples.to(device))  # type: ignore[no-any-return]

    def stream(self, *, window_frames: int | None = None) -> Stream:
        """A stream: one utterance encoded as its samples come, with the states of `extract` but for rounding.

        Args:
            window_frames: frames that attention sees, the current one included, which bounds its memory; states then differ from
                `extract`'s. None is all of the past.

        Raises:
            RequestError: if frames of this upstream depend on the whole utterance; the message names a variant that can stream.
        """
        raise RequestError(
            f"{self.info.name} cannot stream: it gives no states before it has the whole utterance. "
            "Fix: --upstream mamba_hubert_causal or transformer_hubert_causal, at size test or tiny."
        )


def normalize_waveforms(wavs: Tensor, num_samples: Tensor) -> Tensor:
    """Waveforms with zero mean and unit variance over each row's own samples (eps 1e-5, as `F.layer_norm`), zero after it.

    Args:
        wavs: (B, S).
        num_samples: (B,).

    >>> normalize_waveforms(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([2])).round().abs().tolist()
    [[1.0, 1.0, 0.0]]
    """
    valid = torch.arange(wavs.shape[1], device=wavs.device) < num_samples[:, None]
    count = num_samples[:, None].to(wavs.dtype)
    mean = (wavs * valid).sum(1, keepdim=True) / count
    centred = (wavs - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on a device; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def counts_on(device: torch.device, counts: Sequence[int]) -> Tensor:
    """(B,) counts on a device, as `to_device` brings them.

    >>> counts_on(torch.device("cpu"), [3, 2])
    tensor([3, 2])
    """
    return to_device(torch.tensor(counts), device)


def frame_mask(num_frames: Tensor, max_frames: int) -> Tensor:
    """(B, T) booleans, True on valid frames.

    >>> frame_mask(torch.tensor([1, 2]), 3).tolist()
    [[True, False, False], [True, True, False]]
    """
    return torch.arange(max_frames, device=num_frames.device) < num_frames[:, None]
