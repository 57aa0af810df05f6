"""Encoding audio as it arrives: chunks of any size in, the states of every frame out as soon as they are determined.

What is carried from chunk to chunk: the last inputs of every convolution, the states of the scans, and for attention the keys and
values of past frames (all of them, or a window). The work is that of one pass, and so are the states, but for rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.upstreams.attention import fused_attention
from superb_probe.upstreams.base import Upstream, UpstreamInfo
from superb_probe.upstreams.convolutions import ConvLayer, PositionalConv, conv_frames
from superb_probe.upstreams.mamba import Mamba, Mamba2, MixerState
from superb_probe.upstreams.residual import residual
from superb_probe.upstreams.transformer import SelfAttention, TransformerLayer

if TYPE_CHECKING:
    from superb_probe.upstreams.hubert import HubertEncoder

BLOCK_SAMPLES = 160_000  # a longer chunk is worked off in blocks of this many samples, which bounds memory
_STRICT_VARIANTS = {
    "transformer_hubert": "transformer_hubert_causal",
    "transformer_hubert_causal_mask": "transformer_hubert_causal",
    "mamba_hubert": "mamba_hubert_causal",
    "mamba_mlp_hubert": "mamba_mlp_hubert_causal",
    "mamba_inner_hubert": "mamba_hubert_causal",
    "fbank": "fbank_no_cmvn",
}


class Stream(ABC):
    """One utterance on its way through an encoder.

    Attributes:
        num_samples: samples taken so far.
        num_frames: frames given so far.
        delay_frames: frames that are held back until what they look ahead to has come.
        finished: whether the utterance has ended.
    """

    delay_frames: int

    def __init__(self, name: str) -> None:
        """`name` is the upstream's, for messages."""
        self.name = name
        self.num_samples = 0
        self.num_frames = 0
        self.finished = False

    def push(self, wav: Tensor) -> Tensor:
        """Take the next samples.

        Args:
            wav: (S,) any number of samples, none included.

        Returns:
            (L, T, D) states of the frames that are now determined; T may be 0.

        Raises:
            RequestError: after `finish`, or for another shape.
        """
        if self.finished:
            raise RequestError(f"{self.name}: this stream has ended. Fix: upstream.stream() begins another.")
        if wav.ndim != 1:
            raise RequestError(f"{self.name}: a chunk of shape {tuple(wav.shape)}, expected (S,)")
        with torch.inference_mode():
            blocks = [self._encode(block) for block in torch.split(wav, BLOCK_SAMPLES)] if wav.numel() else []
            return self._given(blocks, wav.numel())

    def finish(self) -> Tensor:
        """End the utterance: (L, T, D) states of the frames that waited for samples which do not come."""
        if self.finished:
            raise RequestError(f"{self.name}: this stream has ended already.")
        self.finished = True
        with torch.inference_mode():
            return self._given([self._encode(None)], 0)

    def _given(self, blocks: list[Tensor], samples: int) -> Tensor:
        states = blocks[0] if len(blocks) == 1 else torch.cat([self._none(), *blocks], dim=1)
        self.num_samples += samples
        self.num_frames += states.shape[1]
        return states

    @property
    def state_bytes(self) -> int:
        """Bytes carried to the next chunk."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @abstractmethod
    def _encode(self, wav: Tensor | None) -> Tensor:
        """States (L, T, D) determined by the next samples (S,), or by the end."""

    @abstractmethod
    def _none(self) -> Tensor:
        """No frames: (L, 0, D)."""

    @abstractmethod
    def _tensors(self) -> Iterator[Tensor]:
        """Everything that is carried to the next chunk."""


class PastFrames(NamedTuple):
    """What attention keeps of past frames.

    Attributes:
        keys: (1, H, T, D / H).
        values: (1, H, T, D / H).
    """

    keys: Tensor
    values: Tensor


LayerMemory: TypeAlias = "MixerState | PastFrames | None"


class HubertStream(Stream):
    """One utterance on its way through a HuBERT whose frames depend on the past and a finite look-ahead.

    >>> from superb_probe.upstreams.load import load_upstream
    >>> stream = load_upstream("mamba_hubert_causal", size="test", random=0).stream()
    >>> stream.push(torch.zeros(300)).shape, stream.push(torch.zeros(1000)).shape, stream.finish().shape
    (torch.Size([3, 0, 48]), torch.Size([3, 3, 48]), torch.Size([3, 0, 48]))
    """

    def __init__(self, encoder: HubertEncoder, info: UpstreamInfo, window_frames: int | None = None) -> None:
        """See `superb_probe.upstreams.base.Upstream.stream`."""
        super().__init__(info.name)
        reason = whole_utterance(encoder)
        if reason:
            raise RequestError(f"{info.name} cannot stream: {reason}. Fix: {_advice(info.name)}")
        if window_frames is not None and window_frames < 1:
            raise RequestError(f"{info.name}: window_frames is {window_frames}. Fix: 1 or more, or None for all.")
        if window_frames is not None and encoder.config.layer_type != "transformer":
            raise RequestError(f"{info.name}: window_frames is for attention, and this encoder has none. Fix: drop it.")
        self._encoder = encoder
        self._window_frames = window_frames
        self._device = encoder.mask_emb.device
        self._positional = cast(PositionalConv, encoder.encoder.pos_conv[0])
        self.delay_frames = self._positional.right
        self._waveform_type = torch.promote_types(encoder.mask_emb.dtype, torch.float32)
        with torch.inference_mode():
            self._taps = self._positional.weight().to(self._waveform_type)
        self._front_tails: list[Tensor | None] = [None] * len(encoder.feature_extractor.conv_layers)
        self._seen = encoder.mask_emb.new_zeros(1, self._positional.left, encoder.config.dim)
        self._memories: list[LayerMemory] = [None] * len(encoder.encoder.layers)

    def _encode(self, wav: Tensor | None) -> Tensor:
        x = None if wav is None else self._features(wav.to(self._device, self._waveform_type)[None, :, None])
        placed = self._place(x, last=wav is None)
        return self._none() if placed is None else self._layers(placed)

    def _features(self, x: Tensor) -> Tensor | None:
        """Projected features (1, T, D) that the next samples (1, S, 1) complete."""
        extractor = self._encoder.feature_extractor
        for number, (layer, (kernel, stride)) in enumerate(
            zip(extractor.conv_layers, extractor.layer_shapes, strict=True)
        ):
            tail = self._front_tails[number]
            x = x if tail is None else torch.cat([tail, x], dim=1)
            frames = conv_frames(x.shape[1], [(kernel, stride)])
            self._front_tails[number] = x[:, frames * stride :].clone()
            if not frames:
                return None
            x = cast(ConvLayer, layer)(x[:, : (frames - 1) * stride + kernel], [frames])
        x = self._encoder.layer_norm(x)
        return x if self._encoder.post_extract_proj is None else self._encoder.post_extract_proj(x)

    def _place(self, x: Tensor | None, *, last: bool) -> Tensor | None:
        """Frames (1, T, D) that enter the layers: those whose look-ahead has come, with the positional convolution added."""
        conv = self._positional
        parts = [self._seen] if x is None else [self._seen, x]
        if last:
            parts.append(self._seen.new_zeros(1, conv.right, self._seen.shape[2]))
        seen = torch.cat(parts, dim=1)
        frames = seen.shape[1] - conv.left - conv.right
        if frames < 1:
            self._seen = seen
            return None
        self._seen = seen[:, frames:].clone()
        y = positional_windows(seen.to(self._waveform_type), self._taps, conv.bias, conv.groups).to(seen.dtype)
        placed = seen[:, conv.left : conv.left + frames] + y
        return placed if self._encoder.encoder.norm_first else self._encoder.encoder.layer_norm(placed)

    def _layers(self, x: Tensor) -> Tensor:
        """States (L, T, D) of the next frames (1, T, D)."""
        encoder = self._encoder.encoder
        states = x.new_empty(len(encoder.layers) + 1, x.shape[1], x.shape[2])
        states[0] = x[0]
        for number, layer in enumerate(encoder.layers):
            x, self._memories[number] = step(layer, x, self._memories[number], self._window_frames)
            states[number + 1] = x[0]
        if encoder.norm_first:
            states[-1] = encoder.layer_norm(x)[0]
        return states

    def _none(self) -> Tensor:
        return self._seen.new_empty(len(self._memories) + 1, 0, self._seen.shape[2])

    def _tensors(self) -> Iterator[Tensor]:
        yield self._seen
        yield from (tail for tail in self._front_tails if tail is not None)
        yield from (tensor for memory in self._memories if memory is not None for tensor in memory)


class WindowedStream(Stream):
    """One utterance on its way through an upstream whose frames depend on a few around them: stretches are encoded with margins.

    >>> from superb_probe.upstreams.fbank import fbank_no_cmvn
    >>> stream = fbank_no_cmvn().stream()
    >>> stream.push(torch.zeros(1200)).shape, stream.finish().shape
    (torch.Size([1, 2, 240]), torch.Size([1, 4, 240]))
    """

    def __init__(self, upstream: Upstream, past_frames: int) -> None:
        """`past_frames` is how many frames before its own a frame depends on; `info.lookahead_samples` says how far ahead."""
        super().__init__(upstream.info.name)
        if upstream.info.lookahead_samples is None:
            raise RequestError(
                f"{self.name} cannot stream: it normalises over the utterance. Fix: {_advice(self.name)}"
            )
        self._upstream = upstream
        self._past_frames = past_frames
        self._hop = upstream.info.hop_samples
        self.delay_frames = -(-upstream.info.lookahead_samples // self._hop)
        self._samples = torch.zeros(0)
        self._first = 0  # the frame that the kept samples begin with
        self._next = 0

    def _encode(self, wav: Tensor | None) -> Tensor:
        if wav is not None:
            self._samples = torch.cat([self._samples, wav.float()])
        known = (
            self._first + self._upstream.num_frames(self._samples.numel()) - (0 if wav is None else self.delay_frames)
        )
        if known <= self._next:
            return self._none()
        states = self._upstream.extract([self._samples]).states[:, 0, self._next - self._first : known - self._first]
        first = max(0, known - self._past_frames)
        self._samples = self._samples[(first - self._first) * self._hop :].clone()
        self._first, self._next = first, known
        return states

    def _none(self) -> Tensor:
        return torch.zeros(self._upstream.info.num_layers, 0, self._upstream.info.dim)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._samples


def step(layer: nn.Module, x: Tensor, memory: LayerMemory, window_frames: int | None) -> tuple[Tensor, LayerMemory]:
    """The output (1, T, D) of a layer for its next frames (1, T, D), and what it remembers.

    Args:
        layer: a forward Mamba layer or a causal Transformer layer.
        x: the next frames.
        memory: what the frames before them left.
        window_frames: frames attention sees, the current one included; None for all.
    """
    kept: LayerMemory = None

    def mix(normed: Tensor) -> Tensor:
        nonlocal kept
        if isinstance(layer, TransformerLayer):
            mixed, kept = attend(layer.self_attn, normed, cast("PastFrames | None", memory), window_frames)
        else:
            mixer = cast("Mamba | Mamba2", layer.mamba)
            mixed, kept = mixer.run(normed, None, cast("MixerState | None", memory))
        return mixed

    return residual(layer, x, mix), kept


def attend(
    attention: SelfAttention, x: Tensor, past: PastFrames | None, window_frames: int | None
) -> tuple[Tensor, PastFrames]:
    """Causal attention of the next frames (1, T, D) to themselves and to the past, and the past of the frames after them.

    Args:
        attention: its projections.
        x: the next frames.
        past: keys and values of the frames before them.
        window_frames: frames that a frame sees, itself included; None for all.
    """
    batch, frames, dim = x.shape
    shape = (batch, frames, attention.num_heads, dim // attention.num_heads)
    query, keys, values = (
        project(x).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if past is not None:
        keys, values = torch.cat([past.keys, keys], dim=2), torch.cat([past.values, values], dim=2)
    length = keys.shape[2]
    position = torch.arange(length, device=x.device)
    current = position[length - frames :, None]
    mask = position <= current
    if window_frames is not None:
        mask &= position > current - window_frames
    mixed = fused_attention(query, keys, values, mask)
    kept = 0 if window_frames is None else max(0, length - window_frames + 1)
    out = attention.out_proj(mixed.transpose(1, 2).reshape(batch, frames, dim))
    # A copy where frames are dropped: a view would hold all of them.
    return out, PastFrames(keys[:, :, kept:].clone(), values[:, :, kept:].clone()) if kept else PastFrames(keys, values)


def positional_windows(x: Tensor, taps: Tensor, bias: Tensor, groups: int) -> Tensor:
    """GELU of the positional convolution without padding: (1, T + K - 1, D) to (1, T, D), as one matrix product a group.

    Args:
        x: the frames.
        taps: (D, D / groups, K).
        bias: (D,).
        groups: G.

    >>> positional_windows(torch.zeros(1, 5, 4), torch.zeros(4, 2, 3), torch.zeros(4), 2).shape
    torch.Size([1, 3, 4])
    """
    dim, width, kernel = taps.shape
    matrix = taps.view(groups, dim // groups, width * kernel).transpose(1, 2)
    windows = x[0].unfold(0, kernel, 1).view(-1, groups, width, kernel).permute(1, 0, 2, 3)
    y = torch.bmm(windows.reshape(groups, windows.shape[1], width * kernel), matrix)
    return F.gelu(y.transpose(0, 1).reshape(1, -1, dim) + bias.to(x.dtype))


def whole_utterance(encoder: HubertEncoder) -> str:
    """Why the first frame of an encoder waits for the whole utterance; empty if it does not."""
    config = encoder.config
    if config.layer_type not in ("mamba", "mamba2") and not (
        config.layer_type == "transformer" and config.causal_attention
    ):
        return f"its {config.layer_type} layers see the whole utterance"
    if config.waveform_norm == "utterance":
        return "its waveforms are normalised over the whole utterance (waveform_norm utterance)"
    if config.extractor_mode == "default":
        return "its front end normalises every channel over the whole utterance (GroupNorm, extractor_mode default)"
    return ""


def _advice(name: str) -> str:
    """What to use instead of an upstream that needs the whole utterance."""
    strict = _STRICT_VARIANTS.get(name, name if name.startswith(("mamba", "transformer")) else "mamba_hubert_causal")
    if strict == "fbank_no_cmvn":
        return "--upstream fbank_no_cmvn"
    return (
        f"the strict variant, --upstream {strict} with causal_front_end=True (what sizes test and tiny have), trained as such: "
        "it differs in its weights"
    )


class ReencodedStream(Stream):
    """Any upstream, streamed by encoding all that has come anew with every chunk: to measure with, for its work is quadratic.

    A frame is given once and never corrected, from what had come by then: with an encoder that sees the whole utterance its states are
    those of an utterance cut there.

    >>> from superb_probe.upstreams.load import load_upstream
    >>> stream = ReencodedStream(load_upstream("mamba_hubert", size="test", random=0), lookahead_frames=2)
    >>> stream.push(torch.zeros(1600)).shape, stream.finish().shape
    (torch.Size([3, 2, 48]), torch.Size([3, 2, 48]))
    """

    def __init__(self, upstream: Upstream, lookahead_frames: int = 0) -> None:
        """`lookahead_frames` are held back until as many frames after them have come."""
        super().__init__(upstream.info.name)
        if lookahead_frames < 0:
            raise RequestError(f"{self.name}: lookahead_frames is {lookahead_frames}. Fix: 0 or more.")
        self.delay_frames = lookahead_frames
        self._upstream = upstream
        self._samples = torch.zeros(0)

    def _encode(self, wav: Tensor | None) -> Tensor:
        if wav is not None:
            self._samples = torch.cat([self._samples, wav.float()])
        count = self._upstream.num_frames(self._samples.numel())
        known = count - (0 if wav is None else self.delay_frames)
        if known <= self.num_frames:
            return self._none()
        return self._upstream.extract([self._samples]).states[:, 0, self.num_frames : known]

    def _none(self) -> Tensor:
        return torch.zeros(self._upstream.info.num_layers, 0, self._upstream.info.dim)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._samples
