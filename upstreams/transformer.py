"""Transformer layers of HuBERT, post-norm and pre-norm, bidirectional and causal, under fairseq's tensor names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.upstreams.attention import fused_attention
from superb_probe.upstreams.base import frame_mask
from superb_probe.upstreams.linear import Linear
from superb_probe.upstreams.norms import sum_norm


class SelfAttention(nn.Module):
    """Multi-head self-attention over the valid frames of each row."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False) -> None:
        """`dim` is D, split over `num_heads`; `causal` masks attention to each frame's past."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self._kept: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, num_frames: Tensor | None, attended: Tensor | None = None) -> Tensor:
        """Attend.

        Causal attention needs no mask for padding: it can only follow the valid frames, which then never see it. So no mask is ever
        larger than (B, 1, 1, T), and the flash kernels can run.

        Args:
            x: (B, T, D).
            num_frames: (B,) valid frames of each row; None: all.
            attended: (B, 1, T or 1, T) what each frame attends to, whatever `num_frames` and causality say.

        Returns:
            (B, T, D).
        """
        batch, frames, dim = x.shape
        shape = (batch, frames, self.num_heads, dim // self.num_heads)
        query, key, value = (each.view(shape).transpose(1, 2) for each in self._projected(x))
        mask = None if self.causal or num_frames is None else frame_mask(num_frames, frames)[:, None, None]
        if attended is not None:
            mask = attended
        causal = self.causal and attended is None
        mixed = fused_attention(query, key, value, mask, causal=causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, frames, dim))  # type: ignore[no-any-return]

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, T, D) each: on a GPU without gradients by one product, faster than three narrow ones."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weights = [each for part in parts for each in (part.weight, part.bias)]
        if not x.is_cuda or torch.is_grad_enabled() or any(each.is_inference() for each in weights):
            return tuple(part(x) for part in parts)
        key = tuple((each.data_ptr(), each._version, each.dtype, each.device) for each in weights)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, torch.cat(weights[0::2]), torch.cat(weights[1::2])
        return F.linear(x, *self._kept[1:]).chunk(3, dim=-1)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward block: x = norm(x + f(x)), or x + f(norm(x)) with the norm first."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, causal: bool = False, norm_first: bool = False) -> None:
        """As `HubertConfig`'s dim, num_heads, ffn_dim, causal_attention and layer_norm_first."""
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = SelfAttention(dim, num_heads, causal)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, ffn_dim)
        self.fc2 = Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, num_frames: Tensor | None, padded_frames: Tensor | None, attended: Tensor | None = None
    ) -> Tensor:
        """Encode.

        Args:
            x: (B, T, D).
            num_frames: (B,) valid frames, the others are never attended to; None: all.
            padded_frames: not used: a frame that only fills up a row is masked here, as in fairseq.
            attended: see `SelfAttention.forward`.

        Returns:
            (B, T, D).
        """
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), num_frames, attended)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = sum_norm(x, self.self_attn(x, num_frames, attended), self.self_attn_layer_norm)
        return sum_norm(x, self.feed_forward(x), self.final_layer_norm)

    def feed_forward(self, x: Tensor) -> Tensor:
        """fc2(GELU(fc1 x))."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
