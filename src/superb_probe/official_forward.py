"""An encoder run as the official Mamba-HuBERT code runs it: what its length costs there, beside this project's own run.

What differs (the released code of arXiv 2506.12606, on fairseq and s3prl): the whole front end at once, with GroupNorm over its
materialised output; attention by `F.multi_head_attention_forward` with a padding mask; for the causal Transformer an explicit
(T, T) mask, built row by row on the CPU in every pass, moved to the device, and merged there with the padding mask into one mask a
head. Mamba layers are this project's in both: the official ones call a compiled kernel of another package.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.upstreams.convolutions import PositionalConv
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.residual import residual
from superb_probe.upstreams.transformer import SelfAttention, TransformerLayer


def official_forward(encoder: HubertEncoder, wavs: Tensor) -> list[Tensor]:
    """States of every layer, each (B, T, D), of waveforms (B, S) without padding."""
    x = official_front_end(encoder, wavs)
    body = encoder.encoder
    x = x + official_positional(cast(PositionalConv, body.pos_conv[0]), x)
    if not body.norm_first:
        x = body.layer_norm(x)
    frames = x.shape[1]
    x = F.pad(x, (0, 0, 0, -frames % body.frame_multiple))
    padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    padding[:, frames:] = True
    causal = encoder.config.layer_type == "transformer" and encoder.config.causal_attention
    mask = future_mask(x.shape[1]).to(x.device) if causal else None
    states = [x[:, :frames]]
    for layer in body.layers:
        if isinstance(layer, TransformerLayer):
            attention = layer.self_attn
            x = residual(layer, x, lambda y, each=attention: official_attention(each, y, padding, mask))  # type: ignore[misc]
        else:
            x = layer(x, None, None)
        states.append(x[:, :frames])
    if body.norm_first:
        states[-1] = body.layer_norm(states[-1])
    return states


def official_front_end(encoder: HubertEncoder, wavs: Tensor) -> Tensor:
    """Projected features (B, T, D): stock convolutions, the norms over what they give, everything at once."""
    x = wavs[:, None]
    for layer in encoder.feature_extractor.conv_layers:
        conv = cast(nn.Conv1d, layer.get_submodule("0"))
        x = conv(x)
        if layer.norm == "group":
            x = cast(nn.GroupNorm, layer.get_submodule("2"))(x)
        elif layer.norm == "layer":
            x = cast(nn.LayerNorm, layer.get_submodule("2.1"))(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
    x = encoder.layer_norm(x.transpose(1, 2))
    return x if encoder.post_extract_proj is None else cast(Tensor, encoder.post_extract_proj(x))


def official_positional(conv: PositionalConv, x: Tensor) -> Tensor:
    """The positional convolution by conv1d, (B, T, D)."""
    padded = F.pad(x.transpose(1, 2), (conv.left, conv.right))
    return F.gelu(F.conv1d(padded, conv.weight(), conv.bias, groups=conv.groups)).transpose(1, 2)


def future_mask(frames: int) -> Tensor:
    """(T, T) booleans, True above the diagonal, row by row on the CPU.

    >>> future_mask(2).tolist()
    [[False, True], [False, False]]
    """
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for row in range(frames):
        mask[row, row + 1 :] = True
    return mask


def official_attention(attention: SelfAttention, x: Tensor, padding: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, T, D) by torch's own function, as fairseq calls it.

    Args:
        attention: its projections.
        x: (B, T, D).
        padding: (B, T), True on padding.
        mask: (T, T), True where a frame (row) may not see another (column); None for no mask.
    """
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    mixed, _ = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        x.shape[2],
        attention.num_heads,
        torch.empty(0),
        torch.cat([project.bias for project in projections]),
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        training=attention.training,
        key_padding_mask=padding,
        need_weights=False,
        attn_mask=mask,
        use_separate_proj_weight=True,
        q_proj_weight=attention.q_proj.weight,
        k_proj_weight=attention.k_proj.weight,
        v_proj_weight=attention.v_proj.weight,
    )
    return mixed.transpose(0, 1)
