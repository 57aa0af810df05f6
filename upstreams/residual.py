"""The order of sums and norms in an encoder layer, around other ways to mix frames than the layer's own `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from superb_probe.upstreams.mamba import MambaLayer
from superb_probe.upstreams.transformer import TransformerLayer


def residual(
    layer: nn.Module, x: Tensor, mix: Callable[[Tensor], Tensor], drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A layer's output (B, T, D): what its `forward` gives when `mix` is its own attention or mixer and nothing is dropped.

    Args:
        layer: a Transformer or Mamba layer, post-norm or pre-norm, with a feed-forward block or without.
        x: (B, T, D).
        mix: what replaces the attention or the mixer, (B, T, D) to (B, T, D).
        drop: dropout of what is added to the residual; None for none.

    >>> import torch
    >>> layer = TransformerLayer(8, 2, 16, causal=True)
    >>> x = torch.randn(1, 5, 8)
    >>> torch.equal(residual(layer, x, lambda y: layer.self_attn(y, None)), layer(x, None, None))
    True
    """
    if isinstance(layer, TransformerLayer):
        norm: nn.Module = layer.self_attn_layer_norm
        has_ffn = True
    elif isinstance(layer, MambaLayer):
        norm, has_ffn = cast(nn.Module, getattr(layer, layer.norm_name)), layer.has_ffn
    else:
        raise TypeError(f"not a layer of this project: {type(layer).__name__}")
    if drop is None:
        drop = _as_it_is
    if layer.norm_first:
        x = x + drop(mix(norm(x)))
        return x + drop(layer.feed_forward(layer.final_layer_norm(x))) if has_ffn else x
    x = norm(x + drop(mix(x)))
    return cast(Tensor, layer.final_layer_norm(x + drop(layer.feed_forward(x)))) if has_ffn else x


def _as_it_is(x: Tensor) -> Tensor:
    return x
