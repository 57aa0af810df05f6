"""HuBERT's training forward and loss on an encoder whose modules `hubert.py` has: masks, dropout, layer drop, cosine logits.

Crops are not padded, so nothing here knows lengths, and every shape is fixed by (B, S): the whole can be recorded as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from superb_probe.errors import RequestError
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.convolutions import ConvLayer, PositionalConv, strided_conv
from superb_probe.upstreams.hubert import HubertEncoder, default_uniform_
from superb_probe.upstreams.mamba import InnBiMamba, Mamba, MambaLayer
from superb_probe.upstreams.pretrain_conv import positional
from superb_probe.upstreams.pretrain_recipe import Recipe
from superb_probe.upstreams.residual import residual
from superb_probe.upstreams.transformer import SelfAttention, TransformerLayer

SPECIAL_SYMBOLS = 4  # rows of the label embeddings before the units': fairseq's dictionary begins with them
_STEP_RANGE = (1e-3, 1e-1)
_FLOAT32_NAMES = ("A_log", "A_b_log", ".D", ".D_b", "dt_proj.bias", "dt_proj_b.bias", "dt_bias")


@dataclass(frozen=True, slots=True)
class Score:
    """What one batch says, as sums that add up over batches and processes.

    Attributes:
        loss: what is differentiated: (cross entropy + feature penalty) summed over masked frames.
        sums: (4,) float32 without gradient: cross entropy over masked frames (nats), masked frames that the likeliest unit is right
            for, masked frames, mean square of the features x masked frames.
        likeliest: (B, T) int64, the likeliest unit of every frame (below zero where it is a special symbol).
    """

    loss: Tensor
    sums: Tensor
    likeliest: Tensor


class _ScaleGradient(torch.autograd.Function):
    """The identity; its gradient is scaled."""

    @staticmethod
    def forward(context: Any, x: Tensor, scale: float) -> Tensor:
        context.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.scale, None


class HubertPretraining(nn.Module):
    """An encoder with the loss of its pre-training.

    >>> from superb_probe.upstreams.sizes import size_config
    >>> model = HubertPretraining(HubertEncoder(size_config("mamba_hubert_causal", "test")), Recipe())
    >>> mask = torch.ones(2, 3, dtype=torch.bool)
    >>> score = model(torch.randn(2, 1040), mask, torch.zeros(2, 3, dtype=torch.long))
    >>> score.sums[2].item()
    6.0
    """

    def __init__(self, encoder: HubertEncoder, recipe: Recipe) -> None:
        """`encoder` has a pre-training head; `recipe` says how it is trained."""
        super().__init__()
        if encoder.final_proj is None or encoder.label_embs_concat is None:
            raise RequestError("pre-training needs an encoder with final_dim and num_classes above zero.")
        self.encoder = encoder
        self.recipe = recipe

    def forward(self, wavs: Tensor, mask: Tensor, targets: Tensor) -> Score:
        """Predict the units of masked frames.

        Args:
            wavs: (B, S) float32; every sample counts.
            mask: (B, T) booleans.
            targets: (B, T) int64 units from 0.
        """
        encoder, recipe = self.encoder, self.recipe
        features = self._features(wavs)
        if recipe.feature_gradient != 1.0:
            features = _ScaleGradient.apply(features, recipe.feature_gradient)  # type: ignore[no-untyped-call]
        power = features.float().square().mean()
        x = encoder.layer_norm(features)
        if encoder.post_extract_proj is not None:
            x = encoder.post_extract_proj(x)
        x = self._drop(x, recipe.input_dropout)
        x = torch.where(mask[..., None], encoder.mask_emb.to(x.dtype), x)
        logits = self.logits(self._encode(x))
        weight = mask.float()
        entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten() + SPECIAL_SYMBOLS, reduction="none")
        summed = (entropy * weight.flatten()).sum()
        masked = weight.sum()
        loss = summed + recipe.feature_penalty * power * masked
        likeliest = logits.detach().argmax(-1) - SPECIAL_SYMBOLS
        right = (likeliest == targets) & mask
        sums = torch.stack((summed.detach(), right.sum().float(), masked, power.detach() * masked))
        return Score(loss, sums, likeliest)

    def logits(self, states: Tensor) -> Tensor:
        """Cosines of the projected last states (B, T, D) and the label embeddings over the temperature, (B, T, C) in float32."""
        encoder = self.encoder
        projected = cast(nn.Linear, encoder.final_proj)(states)
        embeddings = cast(Tensor, encoder.label_embs_concat)
        cosines = F.normalize(projected.float(), dim=-1) @ F.normalize(embeddings.float(), dim=-1).T
        return cosines / self.recipe.logit_temperature

    def _features(self, wavs: Tensor) -> Tensor:
        """The front end, (B, S) to (B, T, C); a group norm is taken over the whole crop."""
        x = wavs[..., None]
        for layer in self.encoder.feature_extractor.conv_layers:
            x = _group_norm_layer(cast(ConvLayer, layer), x) if layer.norm == "group" else layer(x, [])
        return x

    def _encode(self, x: Tensor) -> Tensor:
        """Positional convolution, norm and layers, (B, T, D)."""
        encoder, recipe = self.encoder.encoder, self.recipe
        x = x + positional(cast(PositionalConv, encoder.pos_conv[0]), x)
        if not encoder.norm_first:
            x = encoder.layer_norm(x)
        x = self._drop(x, recipe.dropout)
        for layer in encoder.layers:
            if recipe.recompute_activations and self.training:
                y = cast(Tensor, checkpoint(self._layer, layer, x, use_reentrant=False))
            else:
                y = self._layer(layer, x)
            if recipe.layer_drop and self.training:
                # Chosen on the device, so that a recorded graph chooses anew every time.
                y = torch.where(torch.rand((), device=x.device) < recipe.layer_drop, x, y)
            x = y
        return cast(Tensor, encoder.layer_norm(x)) if encoder.norm_first else x

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One encoder layer with dropout, (B, T, D)."""

        def mix(y: Tensor) -> Tensor:
            return self._attend(layer.self_attn, y) if isinstance(layer, TransformerLayer) else _mix(layer, y)

        return residual(layer, x, mix, lambda y: self._drop(y, self.recipe.dropout))

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(attention, SelfAttention)
        batch, frames, dim = x.shape
        shape = (batch, frames, attention.num_heads, dim // attention.num_heads)
        query, key, value = (
            project(x).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        dropout = self.recipe.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=attention.causal)
        return cast(Tensor, attention.out_proj(mixed.transpose(1, 2).reshape(batch, frames, dim)))

    def _drop(self, x: Tensor, share: float) -> Tensor:
        return F.dropout(x, share) if share and self.training else x


def _mix(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, MambaLayer)
    return layer.mix(x, None)


def _group_norm_layer(layer: ConvLayer, x: Tensor) -> Tensor:
    """Convolution, norm of each channel over time, GELU; (B, S, 1) to (B, T, C) in the dtype of the weights, the norm in that of x."""
    conv, norm = cast(nn.Conv1d, layer.get_submodule("0")), cast(nn.GroupNorm, layer.get_submodule("2"))
    y = strided_conv(x, conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype), layer.stride)
    variance, mean = torch.var_mean(y, 1, correction=0, keepdim=True)
    y = (y - mean) * (torch.rsqrt(variance + norm.eps) * norm.weight.to(x.dtype)) + norm.bias.to(x.dtype)
    return F.gelu(y).to(conv.weight.dtype)


def new_encoder(config: HubertConfig, recipe: Recipe) -> HubertEncoder:
    """An encoder with the weights that pre-training starts from, drawn from the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    encoder = HubertEncoder(config, generator)
    if not recipe.redraw_mixer_projections:
        for module in encoder.modules():
            if isinstance(module, Mamba | InnBiMamba):
                start_as_mamba_ssm_(module, generator)
    return encoder


@torch.no_grad()
def start_as_mamba_ssm_(mixer: nn.Module, generator: torch.Generator) -> None:
    """A mixer's projections as mamba_ssm starts them: uniform, and steps log-uniform in [0.001, 0.1] (arXiv 2312.00752, 3.6)."""
    for name, linear in mixer.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if not name.startswith("dt_proj"):
            default_uniform_(linear, generator)
            continue
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        low, high = (torch.tensor(each).log().item() for each in _STEP_RANGE)
        step = torch.empty_like(linear.bias).uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
        linear.bias.copy_(step + torch.log(-torch.expm1(-step)))


def lower_precision_(model: HubertPretraining) -> None:
    """The model in bfloat16 but for what the scan reads in float32: decays, step biases and skip weights."""
    for name, parameter in model.named_parameters():
        if not name.endswith(_FLOAT32_NAMES):
            parameter.data = parameter.data.to(torch.bfloat16)
