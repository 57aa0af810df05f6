"""An encoder and a CTC head trained together: the training forward with dropout, layer drop and recomputed activations.

Rows may have different lengths: as everywhere in this project, a row's states are those it has alone. The convolutional front end is
never trained, so it runs without a graph and, for long audio, block by block: what the rest keeps grows linearly with the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from superb_probe.downstreams.base import Head
from superb_probe.errors import RequestError
from superb_probe.probes.ctc import FrameLogits
from superb_probe.probes.specaugment import SpecAugment
from superb_probe.upstreams.base import counts_on
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.mamba import MambaLayer, zero_padding
from superb_probe.upstreams.residual import residual
from superb_probe.upstreams.transformer import TransformerLayer


@dataclass(frozen=True, slots=True)
class Regularisation:
    """What disturbs the encoder in training.

    Attributes:
        dropout: of a layer's mixing and feed-forward outputs, and of its first input (fairseq's `dropout`).
        layer_drop: chance that a layer is skipped.
        recompute: keep only the input of each layer, and compute it again in the backward pass.
    """

    dropout: float = 0.1
    layer_drop: float = 0.05
    recompute: bool = False

    def __post_init__(self) -> None:
        """Check the shares."""
        for name, share in (("dropout", self.dropout), ("layer_drop", self.layer_drop)):
            if not 0.0 <= share < 1.0:
                raise RequestError(f"{name} is {share}. Fix: from 0 to below 1.")


def encode(encoder: HubertEncoder, wavs: Tensor, num_samples: Tensor, how: Regularisation) -> tuple[Tensor, Tensor]:
    """The last layer's states (B, T, D) with gradients, zero past each row's end, and frames of each row (B,).

    In eval mode equal to the last of the encoder's own states.

    Args:
        encoder: in training or eval mode.
        wavs: (B, S).
        num_samples: (B,).
        how: dropout and the like; used in training mode only.
    """
    training = encoder.training
    features, counts = encoder.front_end(wavs, num_samples)
    body, frames = encoder.encoder, features.shape[1]
    x, (valid, attended, scanned) = body.begin(features, counts, lambda y: _drop(y, how.dropout, training))
    for layer in body.layers:
        if training and how.layer_drop and float(torch.rand(())) < how.layer_drop:
            continue
        if training and how.recompute and torch.is_grad_enabled():
            x = cast(Tensor, checkpoint(_layer, layer, x, attended, scanned, how.dropout, use_reentrant=False))
        else:
            x = _layer(layer, x, attended, scanned, how.dropout if training else 0.0)
    if body.norm_first:
        x = body.layer_norm(x)
    return zero_padding(x[:, :frames], valid), counts_on(x.device, counts)


def _layer(layer: nn.Module, x: Tensor, attended: Tensor | None, scanned: Tensor | None, dropout: float) -> Tensor:
    def mix(y: Tensor) -> Tensor:
        if isinstance(layer, TransformerLayer):
            return layer.self_attn(y, attended)  # type: ignore[no-any-return]
        return cast(MambaLayer, layer).mix(y, scanned)

    return residual(layer, x, mix, lambda y: _drop(y, dropout, True))


def _drop(x: Tensor, share: float, training: bool) -> Tensor:
    return F.dropout(x, share) if share and training else x


class FinetuneModel(nn.Module):
    """An encoder and a head on its last layer.

    Attributes:
        encoder: trained but for its front end, from the update on that `unfreeze` is called.
        head: trained from the start.
        augment: SpecAugment of the states in training, or None.
    """

    def __init__(self, encoder: HubertEncoder, head: Head, how: Regularisation, augment: SpecAugment | None) -> None:
        """Begins with the encoder frozen."""
        super().__init__()
        self.encoder, self.head, self.how, self.augment = encoder, head, how, augment
        self.encoder.requires_grad_(False)

    @property
    def frozen(self) -> bool:
        """Whether only the head is trained."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def unfreeze(self) -> None:
        """Train the encoder too, but for the convolutional front end and what only pre-training uses."""
        idle = ("feature_extractor.", "mask_emb", "final_proj.", "label_embs_concat")
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(not name.startswith(idle))

    def forward(self, wavs: Tensor, num_samples: Tensor) -> FrameLogits:
        """(B, T, C) logits of waveforms (B, S)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states, num_frames = encode(self.encoder, wavs, num_samples, self.how)
        states = states.float()
        if self.training and self.augment is not None:
            states = self.augment(states, num_frames)
        outputs: FrameLogits = self.head(states, num_frames)
        return outputs
