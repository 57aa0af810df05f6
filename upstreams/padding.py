"""States as s3prl computes them: of padded batches, in which an utterance hears the padding that its batch adds.

s3prl pads the waveforms of a batch with zeros, and its encoders take the padding for sound in several places (s3prl 0.4.18,
upstream/hubert/hubert_model.py and upstream/wav2vec2/wav2vec2_model.py; the layers of arXiv 2506.12606 are built on the same
code): the group norm of the first convolution is over padding too; the mask of the encoder marks a frame as padding by a share of
the padded waveform, not by the frame's own window; behind the positional convolution padded frames are not zero again; a
Mamba layer is never told of padding, so a backward scan begins in it.

Everywhere else in this project an utterance is computed as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import LayerStates, Upstream, frame_mask, normalize_waveforms
from superb_probe.upstreams.fbank import FilterBank
from superb_probe.upstreams.hubert import Encoder, HubertEncoder
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.mamba import zero_padding
from superb_probe.upstreams.s3prl import S3PRLEncoder
from superb_probe.upstreams.transformer import TransformerLayer

PADDED_TYPES = (HubertUpstream, S3PRLEncoder, FilterBank)


class PaddedUpstream(Upstream):
    """An upstream whose states depend on the batch, as those of s3prl's code do.

    Attributes:
        encoder: the upstream that it stands for.
    """

    casts_inputs = True

    def __init__(self, encoder: Upstream) -> None:
        """Wrap an encoder.

        Raises:
            RequestError: for an encoder whose s3prl code is not known.
        """
        super().__init__()
        if not isinstance(encoder, PADDED_TYPES):
            states = (
                "its states are made elsewhere"
                if hasattr(encoder, "states_for")
                else "s3prl's code for it is not known"
            )
            raise RequestError(
                f"{encoder.info.name}: no padding as s3prl's: {states}. Fix: --padding exact, or another encoder (HuBERT of any "
                "kind, s3prl:NAME, fbank, mfcc)"
            )
        self.encoder = encoder
        self.info = encoder.info
        self.eval()

    def num_frames(self, num_samples: int) -> int:
        """Frames of an utterance that is alone in its batch."""
        return self.encoder.num_frames(num_samples)

    def frames_in_batch(self, num_samples: Sequence[int]) -> list[int]:
        """Frames of each utterance of a batch: round(S / hop), as far as the batch's longest one goes.

        (s3prl, upstream/interfaces.py: one more than the windows that fit, where the batch has room.)
        """
        longest = self.num_frames(max(num_samples))
        return [min(longest, round(count / self.info.hop_samples)) for count in num_samples]

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The states of a batch, padding heard.

        Args:
            wavs: (B, S), zeros after each row's end.
            num_samples: (B,).
        """
        lengths = [int(count) for count in num_samples.tolist()]
        wavs = wavs[:, : max(lengths)]
        if isinstance(self.encoder, HubertUpstream):
            states = hubert_states(self.encoder.encoder, wavs, num_samples)
        elif isinstance(self.encoder, S3PRLEncoder):
            states = self.encoder.layers([wav[:length] for wav, length in zip(wavs, lengths, strict=True)])
        else:  # s3prl computes filter banks an utterance at a time and pads them with zeros
            states = self.encoder(wavs, num_samples).states
        counts = torch.tensor(self.frames_in_batch(lengths), device=states.device)
        valid = frame_mask(counts, states.shape[2])
        return LayerStates(states.masked_fill(~valid[None, :, :, None], 0.0), counts)


def hubert_states(encoder: HubertEncoder, wavs: Tensor, num_samples: Tensor) -> Tensor:
    """States (L, B, T, D) of a padded batch of a HuBERT of any layer type, those of padded frames included.

    Args:
        encoder: the encoder.
        wavs: (B, S), S the longest row's samples.
        num_samples: (B,).
    """
    wavs = wavs.to(torch.promote_types(encoder.mask_emb.dtype, torch.float32))
    wavs = wavs.masked_fill(~frame_mask(num_samples, wavs.shape[1]), 0.0)
    if encoder.config.waveform_norm == "utterance":
        wavs = normalize_waveforms(wavs, num_samples)
    features = encoder.layer_norm(encoder.feature_extractor(wavs, [wavs.shape[1]] * len(wavs)))
    if encoder.post_extract_proj is not None:
        features = encoder.post_extract_proj(features)
    return _layers(encoder.encoder, features, unmasked_frames(num_samples, wavs.shape[1], features.shape[1]))


def unmasked_frames(num_samples: Tensor, max_samples: int, max_frames: int) -> Tensor:
    """Frames (B,) that s3prl's encoder does not mask: the padded waveform is cut into T shares, and one share of sound is a frame.

    In a long batch this is a frame less than the windows that fit, in a short one a frame more.

    >>> unmasked_frames(torch.tensor([16000, 11200]), 16000, 49).tolist()
    [49, 35]
    """
    share = max_samples // max_frames
    return ((num_samples + share - 1) // share).clamp(max=max_frames)


def _layers(encoder: Encoder, x: Tensor, unmasked: Tensor) -> Tensor:
    """States (L, B, T, D) from projected features (B, T, D)."""
    frames = x.shape[1]
    x = zero_padding(x, unmasked)
    x = x + encoder.pos_conv(x)
    if not encoder.norm_first:
        x = encoder.layer_norm(x)
    x = F.pad(x, (0, 0, 0, -frames % encoder.frame_multiple))
    attended = _attended(encoder, x, unmasked)
    states = [x[:, :frames]]
    for layer in encoder.layers:
        x = layer(x, None, None, attended) if isinstance(layer, TransformerLayer) else layer(x, None, None)
        states.append(x[:, :frames])
    if encoder.norm_first:
        states[-1] = encoder.layer_norm(states[-1])
    return torch.stack(states)


def _attended(encoder: Encoder, x: Tensor, unmasked: Tensor) -> Tensor | None:
    """Which frames each frame attends to, (B, 1, T or 1, T); None where there is no attention."""
    layer = encoder.layers[0]
    if not isinstance(layer, TransformerLayer):
        return None
    keys = frame_mask(unmasked, x.shape[1])[:, None, None]
    if not layer.self_attn.causal:
        return keys
    return keys & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
