"""The HuBERT encoder: convolutional front end, positional convolution, and Transformer or Mamba layers.

Tensor names and numbers are those of the official checkpoints (fairseq, and the Mamba-HuBERT code built on it), so that their
weights load strictly. What differs is the handling of padding: each row is computed as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import LayerStates, counts_on, frame_mask, normalize_waveforms
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.convolutions import FeatureExtractor, PositionalConv, conv_frames, reset_pos_conv_
from superb_probe.upstreams.linear import Linear
from superb_probe.upstreams.mamba import InnBiMamba, Mamba, Mamba2, MambaLayer, zero_padding
from superb_probe.upstreams.transformer import TransformerLayer


class Rows(NamedTuple):
    """Which frames of each row a stage reads, (B,) each; None: all of them.

    Attributes:
        valid: of the T frames that come in and go out.
        attended: of the frames that layers see, which may be filled up to a multiple.
        scanned: of those, with the frame that fills a row up.
    """

    valid: Tensor | None
    attended: Tensor | None
    scanned: Tensor | None


class Encoder(nn.Module):
    """Positional convolution and layers: what fairseq calls the encoder."""

    def __init__(self, config: HubertConfig):
        """As `config` says."""
        super().__init__()
        self.norm_first = config.layer_norm_first
        self.frame_multiple = config.frame_multiple
        self.scans = config.layer_type != "transformer"
        self.pos_conv = nn.Sequential(
            PositionalConv(config.dim, config.conv_pos, config.conv_pos_groups, config.causal_pos_conv)
        )
        self.layers = nn.ModuleList(make_layer(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.dim)

    def begin(
        self, x: Tensor, counts: Sequence[int], drop: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Rows]:
        """What the first layer reads, and which frames of it.

        Args:
            x: (B, T, D) projected features.
            counts: frames of each row, known to the host, so that it need not wait for a GPU.
            drop: dropout of the result; None for none.

        Returns:
            (B, T', D), T' filled up to the multiple where layers scan, and the rows' frames.
        """
        frames = x.shape[1]
        valid = None if min(counts) == frames else counts_on(x.device, counts)
        x = zero_padding(x, valid)
        x = x + self.pos_conv(x)
        if not self.norm_first:
            x = self.layer_norm(x)
        if drop is not None:
            x = drop(x)
        # A row is filled up to the multiple with zero frames of its own, which scans then carry along. Attention masks them, so that
        # without them nothing changes but that full rows need no mask, which flash attention does not take.
        multiple = self.frame_multiple if self.scans else 1
        filled = [-(-count // multiple) * multiple for count in counts]
        x = F.pad(zero_padding(x, valid), (0, 0, 0, -frames % multiple))
        attended = valid if x.shape[1] == frames else counts_on(x.device, counts)
        return x, Rows(valid, attended, None if min(filled) == x.shape[1] else counts_on(x.device, filled))

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """States of every layer.

        Args:
            x: (B, T, D) projected features.
            counts: frames of each row.

        Returns:
            (L, B, T, D), zero past each row's end.
        """
        frames = x.shape[1]
        x, rows = self.begin(x, counts)

        kept: list[Tensor] | None = [] if torch.is_grad_enabled() else None
        states = None if kept is not None else x.new_empty(len(self.layers) + 1, x.shape[0], frames, x.shape[2])
        for index in range(len(self.layers) + 1):
            if index:
                x = self.layers[index - 1](x, rows.attended, rows.scanned)
            last = index == len(self.layers)
            state = zero_padding((self.layer_norm(x) if last and self.norm_first else x)[:, :frames], rows.valid)
            if kept is not None:
                kept.append(state)
            elif states is not None:
                states[index] = state
        return torch.stack(kept) if kept is not None else cast(Tensor, states)


def make_layer(config: HubertConfig) -> nn.Module:
    """One encoder layer of the config's type.

    Raises:
        RequestError: for an unknown layer type.
    """
    if config.layer_type == "transformer":
        return TransformerLayer(
            config.dim, config.num_heads, config.ffn_dim, config.causal_attention, config.layer_norm_first
        )
    if config.layer_type in ("mamba", "ext_bi_mamba", "inn_bi_mamba", "mamba2"):
        return MambaLayer(
            config.layer_type,
            config.dim,
            config.state_dim,
            config.conv_kernel,
            config.expand,
            config.head_dim,
            config.ffn_dim,
            config.layer_norm_first,
        )
    raise RequestError(
        f"layer_type {config.layer_type!r} is none of transformer, mamba, ext_bi_mamba, inn_bi_mamba, mamba2"
    )


class HubertEncoder(nn.Module):
    """A HuBERT encoder with its pre-training head, built from a config; `model_weight` of an official checkpoint loads strictly.

    >>> small = HubertConfig(conv_layers=((8, 10, 5), (8, 8, 64)), dim=16, num_layers=1, num_heads=2, ffn_dim=16)
    >>> encoder = HubertEncoder(small).eval()
    >>> encoder.num_frames(16000), encoder.lookahead_samples
    (50, None)
    >>> encoder(torch.zeros(1, 16000), torch.tensor([16000])).states.shape
    torch.Size([2, 1, 50, 16])
    """

    def __init__(self, config: HubertConfig, generator: torch.Generator | None = None):
        """Weights are drawn from `generator`, as the official code draws them."""
        super().__init__()
        self.config = config
        width = config.conv_layers[-1][0]
        self.feature_extractor = FeatureExtractor(config)
        self.layer_norm = nn.LayerNorm(width)
        self.post_extract_proj = Linear(width, config.dim) if width != config.dim else None
        self.mask_emb = nn.Parameter(torch.empty(config.dim))
        self.encoder = Encoder(config)
        self.final_proj = nn.Linear(config.dim, config.final_dim) if config.final_dim else None
        self.label_embs_concat = (
            nn.Parameter(torch.empty(config.num_classes, config.final_dim))
            if config.num_classes and config.final_dim
            else None
        )
        if not self.mask_emb.is_meta:  # nothing is drawn for weights that a checkpoint brings
            self.reset_parameters(generator)

    @property
    def num_layers(self) -> int:
        """L: one more than the encoder has layers."""
        return self.config.num_layers + 1

    @property
    def hop_samples(self) -> int:
        """Samples between frames."""
        return math.prod(stride for _, _, stride in self.config.conv_layers)

    @property
    def lookahead_samples(self) -> int | None:
        """Samples after its own window that a frame depends on, from the config; None is the whole utterance."""
        config = self.config
        attends_past = config.layer_type in ("mamba", "mamba2") or (
            config.layer_type == "transformer" and config.causal_attention
        )
        if config.extractor_mode == "default" or config.waveform_norm == "utterance" or not attends_past:
            return None
        return cast(PositionalConv, self.encoder.pos_conv[0]).right * self.hop_samples

    def num_frames(self, num_samples: int) -> int:
        """Frames of an utterance of that many samples; 0 if it is too short."""
        return conv_frames(num_samples, self.feature_extractor.layer_shapes)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all ("total") and without the pre-training head ("encoder": no final_proj, no label embeddings)."""
        total = sum(parameter.numel() for parameter in self.parameters())
        head = [] if self.final_proj is None else list(self.final_proj.parameters())
        head += [] if self.label_embs_concat is None else [self.label_embs_concat]
        return {"total": total, "encoder": total - sum(parameter.numel() for parameter in head)}

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """Encode a batch.

        Args:
            wavs: (B, S) float32. Samples past a row's end are not read.
            num_samples: (B,).

        Raises:
            RequestError: if a row has more samples than `wavs`, or too few for one frame.
        """
        features, counts = self.front_end(wavs, num_samples)
        return LayerStates(self.encoder(features, counts), counts_on(features.device, counts))

    def front_end(self, wavs: Tensor, num_samples: Tensor) -> tuple[Tensor, list[int]]:
        """Projected features (B, T, D), which enter the encoder, and frames of each row."""
        lengths = [int(count) for count in num_samples.tolist()]
        counts = [self.num_frames(length) for length in lengths]
        problems = [
            f"row {row}: {length} samples, "
            + (f"but only {wavs.shape[1]} given" if length > wavs.shape[1] else "too few for a frame")
            for row, (length, count) in enumerate(zip(lengths, counts, strict=True))
            if count < 1 or length > wavs.shape[1]
        ]
        if problems:
            raise RequestError("cannot encode: " + "; ".join(problems))
        wavs = wavs[:, : max(lengths)]
        wavs = wavs.to(torch.promote_types(self.mask_emb.dtype, torch.float32))
        wavs = wavs.masked_fill(~frame_mask(num_samples, wavs.shape[1]), 0.0)
        if self.config.waveform_norm == "utterance":
            wavs = normalize_waveforms(wavs, num_samples)
        features = self.layer_norm(self.feature_extractor(wavs, lengths))
        if self.post_extract_proj is not None:
            features = self.post_extract_proj(features)
        return features, counts

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew, as the official code does (reference: its `init_bert_params` reaches all linear layers)."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv1d):
                default_uniform_(module, generator)
        for layer in self.feature_extractor.conv_layers:
            conv = cast(nn.Conv1d, layer.get_submodule("0"))
            nn.init.kaiming_normal_(conv.weight, generator=generator)
        for linear in (self.post_extract_proj, self.final_proj):
            if linear is not None:
                default_uniform_(linear, generator)
        self.mask_emb.uniform_(generator=generator)
        if self.label_embs_concat is not None:
            self.label_embs_concat.normal_(generator=generator)
        reset_pos_conv_(cast(PositionalConv, self.encoder.pos_conv[0]), generator)
        init_bert_params(self.encoder, generator)
        for module in self.encoder.modules():
            if isinstance(module, Mamba | InnBiMamba | Mamba2):
                module.reset_scan_parameters(generator)


def init_bert_params(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Every linear layer inside: weight from N(0, 0.02), bias zero.

    In the official code this also reaches a Mamba mixer's projections, its dt_proj included, and so overrides mamba_ssm's choice of
    step sizes in [1e-3, 0.1]: steps start near softplus(0) = 0.69.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, 0.0, 0.02, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def default_uniform_(module: nn.Linear | nn.Conv1d, generator: torch.Generator | None = None) -> None:
    """PyTorch's own start of a linear or convolutional layer, drawn from `generator`."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    nn.init.uniform_(module.weight, -bound, bound, generator=generator)
    if module.bias is not None:
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)
