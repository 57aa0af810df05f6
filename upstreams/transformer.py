"""Transformer layers of HuBERT, post-norm and pre-norm, bidirectional and causal, under fairseq's tensor names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.upstreams.base import frame_mask


class SelfAttention(nn.Module):
    """Multi-head self-attention over the valid frames of each row."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False) -> None:
        """`dim` is D, split over `num_heads`; `causal` masks attention to each frame's past."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, T, D).
            mask: (B, 1, T or 1, T) booleans, True where a query may see a key; from `attention_mask`.

        Returns:
            (B, T, D).
        """
        batch, frames, dim = x.shape
        shape = (batch, frames, self.num_heads, dim // self.num_heads)
        query, key, value = (
            project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, frames, dim))  # type: ignore[no-any-return]


def attention_mask(num_frames: Tensor, max_frames: int, causal: bool) -> Tensor:
    """What each query may see: valid keys and, if causal, none after itself.

    Padding can only follow the valid frames, so every query of a row with a valid frame sees at least one key.

    Args:
        num_frames: (B,) valid frames.
        max_frames: T.
        causal: position t sees 0..t.

    Returns:
        Booleans, (B, 1, 1, T), or (B, 1, T, T) if causal.

    >>> attention_mask(torch.tensor([2]), 3, causal=True).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 0]]]]
    """
    valid = frame_mask(num_frames, max_frames)[:, None, None]
    if not causal:
        return valid
    return valid & torch.ones(max_frames, max_frames, dtype=torch.bool, device=num_frames.device).tril()


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward block: x = norm(x + f(x)), or x + f(norm(x)) with the norm first."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, causal: bool = False, norm_first: bool = False) -> None:
        """As `HubertConfig`'s dim, num_heads, ffn_dim, causal_attention and layer_norm_first."""
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = SelfAttention(dim, num_heads, causal)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, num_frames: Tensor, padded_frames: Tensor) -> Tensor:
        """Encode.

        Args:
            x: (B, T, D).
            num_frames: (B,) valid frames; the others are never attended to.
            padded_frames: not used: a frame that only fills up a row is masked here, as in fairseq.

        Returns:
            (B, T, D).
        """
        mask = attention_mask(num_frames, x.shape[1], self.self_attn.causal)
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        """fc2(GELU(fc1 x))."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
