"""The HuBERT encoder: convolutional front end, positional convolution, and Transformer or Mamba layers.

Tensor names and numbers are those of the official checkpoints (fairseq, and the Mamba-HuBERT code built on it), so that their
weights load strictly. What differs is the handling of padding: each row is computed as if it were alone.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.upstreams import fused_cuda
from superb_probe.upstreams.base import LayerStates, frame_mask, normalize_waveforms
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.mamba import InnBiMamba, Mamba, Mamba2, MambaLayer, zero_padding
from superb_probe.upstreams.transformer import TransformerLayer

# Elements of the first convolution's output worked on at once without gradients. It is by far the largest activation.
_SLAB_ELEMENTS = {"cpu": 2**22, "cuda": 2**29}
RUN_FRAMES = 8  # outputs of the positional convolution that share a row of a matrix product


class ConvLayer(nn.Module):
    """A convolution along time, a norm where the mode has one, GELU. Channels come last: (B, T, C).

    Modules are numbered as in fairseq: "0" the convolution, "2" the norm.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, bias: bool, norm: str):
        """`norm` is "group" (a channel over each row's valid frames; of a waveform only), "layer" (the channels of a frame) or ""."""
        super().__init__()
        if norm == "group" and in_channels != 1:
            raise ValueError(
                f"a group norm over time is for the layer that reads the waveform, not for {in_channels} channels"
            )
        self.norm = norm
        self.kernel, self.stride = kernel, stride
        self.add_module("0", nn.Conv1d(in_channels, channels, kernel, stride, bias=bias))
        if norm == "group":
            self.add_module("2", nn.GroupNorm(channels, channels))
        if norm == "layer":
            self.add_module("2", nn.Sequential(nn.Identity(), nn.LayerNorm(channels), nn.Identity()))

    def forward(self, x: Tensor, num_frames: list[int]) -> Tensor:
        """Convolve.

        Args:
            x: (B, T_in, C_in), in fp32 or the dtype of the weights. The arithmetic is in the dtype of x, so that a waveform
                is not rounded to bf16 before the first norm.
            num_frames: valid output frames of each row. What the others hold does not matter.

        Returns:
            (B, T_out, C) in the dtype of the weights.
        """
        conv = cast(nn.Conv1d, self.get_submodule("0"))
        if self.norm == "group":
            return normalized_waveform_conv(x[..., 0], conv, cast(nn.GroupNorm, self.get_submodule("2")), num_frames)
        if self.norm == "layer" and self._fused(x, conv):
            norm = cast(nn.LayerNorm, self.get_submodule("2.1"))
            return fused_cuda.waveform_conv_norm_gelu(x[..., 0], conv, norm, conv.weight.dtype)
        y = strided_conv(x, conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype), self.stride)
        if self.norm == "layer":
            norm = cast(nn.LayerNorm, self.get_submodule("2.1"))
            y = F.layer_norm(y, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return F.gelu(y).to(conv.weight.dtype)

    def _fused(self, x: Tensor, conv: nn.Conv1d) -> bool:
        """Whether the GPU's kernel for a waveform and a norm over channels can run."""
        known = x.shape[2] == 1 and x.dtype == torch.float32 and conv.weight.dtype in fused_cuda.KINDS
        return x.is_cuda and known and conv.out_channels % 32 == 0 and not torch.is_grad_enabled()


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution along time with channels last, as matrix products: faster than conv1d on CPUs and GPUs.

    Args:
        x: (B, T, C_in).
        weight: (C_out, C_in, K).
        bias: (C_out,) or None.
        stride: frames of x between frames of y.

    Returns:
        (B, (T - K) // stride + 1, C_out).

    >>> strided_conv(torch.ones(1, 7, 2), torch.ones(3, 2, 3), None, 2).shape
    torch.Size([1, 3, 3])
    """
    kernel = weight.shape[2]
    if x.is_cuda and stride < kernel <= 2 * stride and x.shape[2] > 1:
        # The first `stride` taps see neighbouring frames, which lie together in memory: a product without a copy; so do the others.
        frames = (x.shape[1] - kernel) // stride + 1
        y = _taps(x, weight[..., :stride], 0, frames, stride)
        y = y.baddbmm_(*_tap_operands(x, weight[..., stride:], stride, frames, stride))
        return y if bias is None else y + bias
    # (B, T_out, K * C_in), each row a window, times the weights: on a CPU 1.3 to 2 times as fast as conv1d.
    windows = x.unfold(1, kernel, stride).transpose(2, 3).flatten(2)
    return F.linear(windows, weight.transpose(1, 2).flatten(1), bias)


def _taps(x: Tensor, weight: Tensor, start: int, frames: int, stride: int) -> Tensor:
    return torch.bmm(*_tap_operands(x, weight, start, frames, stride))


def _tap_operands(x: Tensor, weight: Tensor, start: int, frames: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (B, T_out, K * C_in) of K <= stride frames from `start`, a view of x, and the weights (B, K * C_in, C_out)."""
    kernel, channels = weight.shape[2], x.shape[2]
    row, frame, _ = x.stride()
    shape, strides = (x.shape[0], frames, kernel * channels), (row, stride * frame, 1)
    windows = x.contiguous().as_strided(shape, strides, x.storage_offset() + start * frame)
    return windows, weight.transpose(1, 2).flatten(1).t().expand(x.shape[0], -1, -1)


def normalized_waveform_conv(wavs: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, num_frames: list[int]) -> Tensor:
    """The first convolution, GroupNorm with a group a channel over each row's own frames, and GELU, in one pass over its output.

    Mean and variance of a channel over time follow from the mean and the covariance of the K samples in a window, so the norm folds
    into weights and biases of each row, and the largest activation of the encoder is never read again. A bias of the convolution
    cancels.

    Args:
        wavs: (B, S), in at least float32.
        conv: of one input channel.
        norm: its weight, bias and eps.
        num_frames: valid frames of each row, at least 1.

    Returns:
        (B, T, C) in the dtype of the weights.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    lengths = torch.tensor(num_frames, device=wavs.device)
    windows = wavs.unfold(1, kernel, stride)
    valid = frame_mask(lengths, windows.shape[1])[..., None]
    counts = lengths[:, None].double()
    exact = windows.double().masked_fill(~valid, 0.0)
    mean = exact.sum(1) / counts  # (B, K)
    exact = (exact - mean[:, None]).masked_fill(~valid, 0.0)
    covariance = exact.transpose(1, 2) @ exact / counts[..., None]  # (B, K, K)
    taps = conv.weight[:, 0].double()
    variance = torch.einsum("ck,bkl,cl->bc", taps, covariance, taps)
    scale = torch.rsqrt(variance.clamp(min=0.0) + norm.eps) * norm.weight.double()
    weight = taps * scale[..., None]  # (B, C, K)
    # The mean over all taps is taken off the waveform, where it cannot cancel against anything large.
    level = mean.mean(1, keepdim=True)
    shift = norm.bias.double() - torch.einsum("bck,bk->bc", weight, mean - level)
    wavs, weight, shift = (wavs - level.to(wavs.dtype)), weight.to(wavs.dtype), shift.to(wavs.dtype)
    dtype = conv.weight.dtype
    if wavs.is_cuda and wavs.dtype == torch.float32 and dtype in fused_cuda.KINDS and not torch.is_grad_enabled():
        return fused_cuda.waveform_conv_gelu(wavs, weight, shift, stride, dtype)
    windows = wavs.unfold(1, kernel, stride)
    return F.gelu(torch.baddbmm(shift[:, None], windows, weight.transpose(1, 2))).to(dtype)


class FeatureExtractor(nn.Module):
    """The convolutional front end: waveforms to features every 20 ms."""

    def __init__(self, config: HubertConfig):
        """Layers as in `config.conv_layers`, norms as its `extractor_mode` says."""
        super().__init__()
        modes = {"default": ("group", ""), "layer_norm": ("layer", "layer"), "causal": ("layer", "")}
        if config.extractor_mode not in modes:
            raise RequestError(f"extractor_mode {config.extractor_mode!r} is none of {', '.join(modes)}")
        first_norm, other_norm = modes[config.extractor_mode]
        self.channels = [channels for channels, _, _ in config.conv_layers]
        self.layer_shapes = [(kernel, stride) for _, kernel, stride in config.conv_layers]
        self.conv_layers = nn.ModuleList(
            ConvLayer(
                self.channels[i - 1] if i else 1,
                channels,
                kernel,
                stride,
                config.conv_bias,
                other_norm if i else first_norm,
            )
            for i, (channels, kernel, stride) in enumerate(config.conv_layers)
        )

    def forward(self, wavs: Tensor, num_samples: list[int]) -> Tensor:
        """Features.

        Args:
            wavs: (B, S).
            num_samples: valid samples of each row.

        Returns:
            (B, T, C); frames past a row's end hold anything finite.
        """
        if torch.is_grad_enabled():
            return self._features(wavs, num_samples)
        limit = _SLAB_ELEMENTS.get(wavs.device.type, _SLAB_ELEMENTS["cpu"])
        rows = max(1, limit // (self.channels[0] * conv_frames(wavs.shape[1], self.layer_shapes[:1])))
        frames = conv_frames(wavs.shape[1], self.layer_shapes)
        dtype = next(self.parameters()).dtype
        features = wavs.new_zeros(len(num_samples), frames, self.channels[-1], dtype=dtype)
        for start in range(0, len(num_samples), rows):
            lengths = num_samples[start : start + rows]
            slab = self._features(wavs[start : start + rows, : max(lengths)], lengths)
            features[start : start + rows, : slab.shape[1]] = slab
        return features

    def _features(self, wavs: Tensor, num_samples: list[int]) -> Tensor:
        x = wavs[..., None]
        for count, layer in enumerate(self.conv_layers, start=1):
            x = layer(x, [conv_frames(length, self.layer_shapes[:count]) for length in num_samples])
        return x


def conv_frames(length: int, layers: list[tuple[int, int]]) -> int:
    """Frames left of `length` after unpadded convolutions of (kernel, stride); 0 if it is too short for one.

    >>> conv_frames(16000, [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2), conv_frames(399, [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2)
    (49, 0)
    """
    for kernel, stride in layers:
        length = max(0, (length - kernel) // stride + 1)
    return length


class PositionalConv(nn.Module):
    """The positional convolution: grouped, weight-normalised over its taps, followed by GELU.

    The weight of tap k is weight_g[k] * weight_v[..., k] / ||weight_v[..., k]||, as the old `weight_norm(dim=2)`.
    """

    def __init__(self, dim: int, kernel: int, groups: int, causal: bool):
        """Centred (kernel // 2 frames before, one less after if the kernel is even), or, if `causal`, kernel - 1 before."""
        super().__init__()
        self.groups = groups
        self.left = kernel - 1 if causal else kernel // 2
        self.right = kernel - 1 - self.left
        self.bias = nn.Parameter(torch.zeros(dim))
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self._kept: tuple[Any, Tensor] | None = None

    def weight(self) -> Tensor:
        """(D, D / groups, K)."""
        wide = self.weight_v.to(torch.promote_types(self.weight_v.dtype, torch.float32))
        return (wide * (self.weight_g / wide.square().sum((0, 1), keepdim=True).sqrt())).to(self.weight_v.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D). Frames past a row's end must be zero."""
        if x.is_cuda:
            return F.gelu(self._matrix_product(x) + self.bias)
        weight, dtype = self.weight(), x.dtype
        bias: Tensor = self.bias
        if dtype in (torch.bfloat16, torch.float16):
            # torch 2.11 gives wrong sums for grouped bf16 convolutions of some widths on CPUs with AMX.
            x, weight, bias = x.float(), weight.float(), bias.float()
        padded = F.pad(x.transpose(1, 2), (self.left, self.right))
        y = F.conv1d(padded, weight, bias, groups=self.groups)
        return F.gelu(y).transpose(1, 2).to(dtype)

    def _matrix_product(self, x: Tensor) -> Tensor:
        """The convolution as one matrix product a group, RUN frames a row: on a GPU 20 to 30 times as fast as cuDNN's grouped one."""
        matrix = self._unrolled()
        (batch, frames, dim), kernel = x.shape, self.weight_v.shape[2]
        runs = -(-frames // RUN_FRAMES)
        total = runs * RUN_FRAMES + kernel - 1
        padded = F.pad(x, (0, 0, self.left, total - frames - self.left))
        width = dim // self.groups
        grouped = padded.view(batch, total, self.groups, width).permute(2, 0, 1, 3).contiguous()
        shape = (self.groups, batch, runs, (RUN_FRAMES + kernel - 1) * width)
        windows = grouped.as_strided(shape, (batch * total * width, total * width, RUN_FRAMES * width, 1))
        y = torch.bmm(windows.reshape(self.groups, batch * runs, -1), matrix)
        y = y.view(self.groups, batch, runs * RUN_FRAMES, width).permute(1, 2, 0, 3)
        return y.reshape(batch, runs * RUN_FRAMES, dim)[:, :frames]

    def _unrolled(self) -> Tensor:
        """(G, (RUN + K - 1) D / G, RUN D / G): what RUN neighbouring outputs take from the inputs they see; kept without gradients."""
        recorded = torch.is_grad_enabled() or self.weight_v.is_inference() or self.weight_g.is_inference()
        parts = () if recorded else (self.weight_v, self.weight_g)
        key = tuple((part.data_ptr(), part._version, part.dtype, part.device) for part in parts)
        if not recorded and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        dim, width, kernel = self.weight_v.shape
        taps = self.weight().view(self.groups, dim // self.groups, width, kernel).permute(0, 3, 2, 1)
        matrix = taps.new_zeros(self.groups, RUN_FRAMES + kernel - 1, width, RUN_FRAMES, dim // self.groups)
        for frame in range(RUN_FRAMES):
            matrix[:, frame : frame + kernel, :, frame] = taps
        matrix = matrix.flatten(3).flatten(1, 2)
        self._kept = None if recorded else (key, matrix)
        return matrix


class Encoder(nn.Module):
    """Positional convolution and layers: what fairseq calls the encoder."""

    def __init__(self, config: HubertConfig):
        """As `config` says."""
        super().__init__()
        self.norm_first = config.layer_norm_first
        self.frame_multiple = config.frame_multiple
        self.pos_conv = nn.Sequential(
            PositionalConv(config.dim, config.conv_pos, config.conv_pos_groups, config.causal_pos_conv)
        )
        self.layers = nn.ModuleList(make_layer(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """States of every layer.

        Args:
            x: (B, T, D) projected features.
            num_frames: (B,).

        Returns:
            (L, B, T, D), zero past each row's end.
        """
        frames = x.shape[1]
        lengths = None if bool((num_frames == frames).all()) else num_frames
        x = zero_padding(x, lengths)
        x = x + self.pos_conv(x)
        if not self.norm_first:
            x = self.layer_norm(x)
        # A row is filled up to the multiple with zero frames of its own, which the layers then carry along.
        multiple = self.frame_multiple
        padded_frames = (num_frames + multiple - 1) // multiple * multiple
        x = F.pad(zero_padding(x, lengths), (0, 0, 0, -frames % multiple))
        attended = lengths if x.shape[1] == frames else num_frames
        scanned = None if bool((padded_frames == x.shape[1]).all()) else padded_frames

        kept: list[Tensor] | None = [] if torch.is_grad_enabled() else None
        states = None if kept is not None else x.new_empty(len(self.layers) + 1, x.shape[0], frames, x.shape[2])
        for index in range(len(self.layers) + 1):
            if index:
                x = self.layers[index - 1](x, attended, scanned)
            last = index == len(self.layers)
            state = zero_padding((self.layer_norm(x) if last and self.norm_first else x)[:, :frames], lengths)
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
        self.post_extract_proj = nn.Linear(width, config.dim) if width != config.dim else None
        self.mask_emb = nn.Parameter(torch.empty(config.dim))
        self.encoder = Encoder(config)
        self.final_proj = nn.Linear(config.dim, config.final_dim) if config.final_dim else None
        self.label_embs_concat = (
            nn.Parameter(torch.empty(config.num_classes, config.final_dim))
            if config.num_classes and config.final_dim
            else None
        )
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
        features, num_frames = self.front_end(wavs, num_samples)
        return LayerStates(self.encoder(features, num_frames), num_frames)

    def front_end(self, wavs: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, T, D), which enter the encoder, and frames of each row (B,)."""
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
        return features, torch.tensor(counts, device=wavs.device)

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


def reset_pos_conv_(conv: PositionalConv, generator: torch.Generator | None = None) -> None:
    """The start fairseq uses: weights from N(0, 4 / (K D)) with their norms as gains, bias zero."""
    dim, _, kernel = conv.weight_v.shape
    nn.init.normal_(conv.weight_v, 0.0, math.sqrt(4 / (kernel * dim)), generator=generator)
    conv.weight_g.copy_(conv.weight_v.square().sum((0, 1), keepdim=True).sqrt())
    nn.init.zeros_(conv.bias)
