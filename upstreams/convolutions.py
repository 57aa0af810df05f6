"""The convolutions of HuBERT: the front end that turns waveforms into features, and the positional convolution.

Channels come last everywhere, so that each is a matrix product over windows; what is only worth it on a GPU says so.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.upstreams import fused_cpu, fused_cuda
from superb_probe.upstreams.base import counts_on, frame_mask
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.cuda_kernels import can_run
from superb_probe.upstreams.linear import linear

# Elements of the first convolution's output worked on at once without gradients: some rows, or a block of time of a long one. It is by
# far the largest activation.
_SLAB_ELEMENTS = {"cpu": 2**22, "cuda": 2**29}
_FOLD_FRAMES = 1024  # whose covariance is summed at once
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

    def forward(self, x: Tensor, num_frames: list[int], folded: FoldedNorm | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, T_in, C_in), in fp32 or the dtype of the weights. The arithmetic is in the dtype of x, so that a waveform
                is not rounded to bf16 before the first norm.
            num_frames: valid output frames of each row. What the others hold does not matter.
            folded: with a group norm, its statistics where `x` is only a block of the rows they are taken over.

        Returns:
            (B, T_out, C) in the dtype of the weights.
        """
        conv = cast(nn.Conv1d, self.get_submodule("0"))
        if self.norm == "group":
            return folded_waveform_conv(x[..., 0], conv, folded or self.fold(x[..., 0], num_frames))
        if self.norm == "layer" and self._fused(x, conv):
            norm = cast(nn.LayerNorm, self.get_submodule("2.1"))
            return fused_cuda.waveform_conv_norm_gelu(x[..., 0], conv, norm, conv.weight.dtype)
        y = strided_conv(x, conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype), self.stride)
        if self.norm == "layer":
            norm = cast(nn.LayerNorm, self.get_submodule("2.1"))
            y = F.layer_norm(y, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return F.gelu(y).to(conv.weight.dtype)

    def fold(self, wavs: Tensor, num_frames: list[int]) -> FoldedNorm:
        """The group norm over whole rows (B, S) of waveforms, folded into the convolution."""
        conv = cast(nn.Conv1d, self.get_submodule("0"))
        return fold_group_norm(wavs, conv, cast(nn.GroupNorm, self.get_submodule("2")), num_frames)

    def _fused(self, x: Tensor, conv: nn.Conv1d) -> bool:
        """Whether the GPU's kernel for a waveform and a norm over channels can run."""
        known = x.shape[2] == 1 and x.dtype == torch.float32 and can_run(x.device, conv.weight.dtype)
        return known and conv.out_channels % 32 == 0 and not torch.is_grad_enabled()


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
    return linear(windows, weight.transpose(1, 2).flatten(1), bias)


def _taps(x: Tensor, weight: Tensor, start: int, frames: int, stride: int) -> Tensor:
    return torch.bmm(*_tap_operands(x, weight, start, frames, stride))


def _tap_operands(x: Tensor, weight: Tensor, start: int, frames: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (B, T_out, K * C_in) of K <= stride frames from `start`, a view of x, and the weights (B, K * C_in, C_out)."""
    x = x.contiguous()
    kernel, channels = weight.shape[2], x.shape[2]
    row, frame, _ = x.stride()
    shape, strides = (x.shape[0], frames, kernel * channels), (row, stride * frame, 1)
    windows = x.as_strided(shape, strides, x.storage_offset() + start * frame)
    return windows, weight.transpose(1, 2).flatten(1).t().expand(x.shape[0], -1, -1)


class FoldedNorm(NamedTuple):
    """A convolution of a waveform with the norm after it folded in.

    Attributes:
        level: (B, 1) taken off the waveform first.
        weight: (B, C, K).
        shift: (B, C).
    """

    level: Tensor
    weight: Tensor
    shift: Tensor


def fold_group_norm(wavs: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, num_frames: list[int]) -> FoldedNorm:
    """The first convolution with GroupNorm, a group a channel over each row's own frames, as one convolution with weights of each row.

    Mean and variance of a channel over time follow from the mean and the covariance of the K samples in a window, so the largest
    activation of the encoder is never read again. A bias of the convolution cancels.

    Args:
        wavs: (B, S), in at least float32.
        conv: of one input channel.
        norm: its weight, bias and eps.
        num_frames: valid frames of each row, at least 1.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    lengths = counts_on(wavs.device, num_frames)
    blocks = -(-max(num_frames) // _FOLD_FRAMES)
    spare = (blocks * _FOLD_FRAMES - 1) * stride + kernel - wavs.shape[1]
    windows = F.pad(wavs, (0, spare)).unfold(1, kernel, stride)
    valid = frame_mask(lengths, windows.shape[1])[..., None]
    counts = lengths[:, None].double()
    exact = windows.double().masked_fill(~valid, 0.0)
    mean = exact.sum(1) / counts  # (B, K)
    exact = (exact - mean[:, None]).masked_fill(~valid, 0.0)
    pieces = exact.view(
        len(exact), blocks, _FOLD_FRAMES, kernel
    )  # many small products keep a GPU busy, one long one does not
    covariance = (pieces.transpose(2, 3) @ pieces).sum(1) / counts[..., None]  # (B, K, K)
    taps = conv.weight[:, 0].double()
    variance = torch.einsum("ck,bkl,cl->bc", taps, covariance, taps)
    scale = torch.rsqrt(variance.clamp(min=0.0) + norm.eps) * norm.weight.double()
    weight = taps * scale[..., None]  # (B, C, K)
    # The mean over all taps is taken off the waveform, where it cannot cancel against anything large.
    level = mean.mean(1, keepdim=True)
    shift = norm.bias.double() - torch.einsum("bck,bk->bc", weight, mean - level)
    return FoldedNorm(level.to(wavs.dtype), weight.to(wavs.dtype), shift.to(wavs.dtype))


def folded_waveform_conv(wavs: Tensor, conv: nn.Conv1d, folded: FoldedNorm) -> Tensor:
    """Convolution, group norm and GELU of waveforms (B, S): (B, T, C) in the dtype of the weights."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    dtype = conv.weight.dtype
    level, weight, shift = folded
    wavs = wavs - level
    if wavs.dtype == torch.float32 and can_run(wavs.device, dtype) and not torch.is_grad_enabled():
        return fused_cuda.waveform_conv_gelu(wavs, weight, shift, stride, dtype)
    if dtype == torch.float32 and not torch.is_grad_enabled():
        fused = fused_cpu.waveform_conv_gelu(wavs, weight, shift, stride)
        if fused is not None:
            return fused
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
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self._features(wavs, num_samples)
        with torch.no_grad():
            return self._slabs(wavs, num_samples)

    def _slabs(self, wavs: Tensor, num_samples: list[int]) -> Tensor:
        """Features, some rows or a block of one long row at a time."""
        limit = _SLAB_ELEMENTS.get(wavs.device.type, _SLAB_ELEMENTS["cpu"])
        row_elements = self.channels[0] * conv_frames(wavs.shape[1], self.layer_shapes[:1])
        rows = max(1, limit // row_elements)
        frames = conv_frames(wavs.shape[1], self.layer_shapes)
        dtype = next(self.parameters()).dtype
        features = wavs.new_zeros(len(num_samples), frames, self.channels[-1], dtype=dtype)
        for start in range(0, len(num_samples), rows):
            lengths = num_samples[start : start + rows]
            slab = wavs[start : start + rows, : max(lengths)]
            if row_elements > limit:
                self._write_blocks(slab, features[start : start + 1], limit)
            else:
                encoded = self._features(slab, lengths)
                features[start : start + rows, : encoded.shape[1]] = encoded
        return features

    def _write_blocks(self, wav: Tensor, features: Tensor, limit: int) -> None:
        """Features of one long row (1, S), block by block of time into `features`: what the convolutions see overlaps."""
        hop = math.prod(stride for _, stride in self.layer_shapes)
        block_frames = max(1, limit // (self.channels[0] * hop // self.layer_shapes[0][1]))
        first = cast(ConvLayer, self.conv_layers[0])
        frames = conv_frames(wav.shape[1], self.layer_shapes[:1])
        folded = first.fold(wav, [frames]) if first.norm == "group" else None
        window = 1
        for kernel, stride in reversed(self.layer_shapes):
            window = (window - 1) * stride + kernel
        total = conv_frames(wav.shape[1], self.layer_shapes)
        for start in range(0, total, block_frames):
            stop = min(total, start + block_frames)
            piece = wav[:, start * hop : (stop - 1) * hop + window]
            features[:, start:stop] = self._features(piece, [piece.shape[1]], folded)

    def _features(self, wavs: Tensor, num_samples: list[int], folded: FoldedNorm | None = None) -> Tensor:
        x = wavs[..., None]
        for count, layer in enumerate(self.conv_layers, start=1):
            x = layer(x, [conv_frames(length, self.layer_shapes[:count]) for length in num_samples], folded)
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


def reset_pos_conv_(conv: PositionalConv, generator: torch.Generator | None = None) -> None:
    """The start fairseq uses: weights from N(0, 4 / (K D)) with their norms as gains, bias zero."""
    dim, _, kernel = conv.weight_v.shape
    nn.init.normal_(conv.weight_v, 0.0, math.sqrt(4 / (kernel * dim)), generator=generator)
    conv.weight_g.copy_(conv.weight_v.square().sum((0, 1), keepdim=True).sqrt())
    nn.init.zeros_(conv.bias)
