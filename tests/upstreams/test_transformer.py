"""Transformer layers against PyTorch's own, and their masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from superb_probe.upstreams import transformer
from superb_probe.upstreams.transformer import SelfAttention, TransformerLayer

DIM, HEADS, FFN = 12, 3, 20


def layer(causal: bool = False, norm_first: bool = False) -> TransformerLayer:
    torch.manual_seed(0)
    made = TransformerLayer(DIM, HEADS, FFN, causal, norm_first).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return made


def torch_twin(made: TransformerLayer) -> nn.TransformerEncoderLayer:
    twin = nn.TransformerEncoderLayer(
        DIM, HEADS, FFN, 0.0, "gelu", batch_first=True, norm_first=made.norm_first, dtype=torch.float64
    )
    attention = made.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    twin.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
            **{f"self_attn.out_proj.{k}": v for k, v in attention.out_proj.state_dict().items()},
            **{f"linear1.{k}": v for k, v in made.fc1.state_dict().items()},
            **{f"linear2.{k}": v for k, v in made.fc2.state_dict().items()},
            **{f"norm1.{k}": v for k, v in made.self_attn_layer_norm.state_dict().items()},
            **{f"norm2.{k}": v for k, v in made.final_layer_norm.state_dict().items()},
        }
    )
    return twin.train()  # eval would take the fused path, which zeroes padding


@torch.no_grad()
def largest_difference(made: TransformerLayer, causal_twin: bool) -> float:
    x, num_frames = torch.randn(2, 7, DIM, dtype=torch.float64), torch.tensor([7, 4])
    got = made(x, num_frames, num_frames)
    padding = torch.arange(7) >= num_frames[:, None]
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal_twin else None
    expected = torch_twin(made)(x, src_mask=future, src_key_padding_mask=padding)
    return float((got - expected)[~padding].abs().max())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_layer_is_torchs(causal: bool, norm_first: bool) -> None:
    assert largest_difference(layer(causal, norm_first), causal) < 1e-12
    assert largest_difference(layer(not causal, norm_first), causal) > 1e-3  # the wrong mask is seen


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_not_attended_to(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(causal)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    padded = torch.cat([x, torch.full((1, 3, DIM), 9.0)], dim=1)
    lengths = torch.tensor([5])

    @torch.no_grad()
    def difference() -> float:
        return float((made(padded, lengths, lengths)[:, :5] - made(x, lengths, lengths)).abs().max())

    assert difference() < 1e-12
    if not causal:  # a causal query never reaches the padding, whatever the mask says of it
        monkeypatch.setattr(transformer, "frame_mask", lambda n, t: torch.ones(len(n), t, dtype=torch.bool))
        assert difference() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_definition(causal: bool) -> None:
    attention = SelfAttention(DIM, 2, causal).double()
    x, lengths = torch.randn(2, 5, DIM, dtype=torch.float64), [5, 3]
    with torch.no_grad():
        found = attention(x, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            query, key, value = (
                project(x[row, :length]).view(length, 2, -1).transpose(0, 1)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = query @ key.transpose(1, 2) / (DIM // 2) ** 0.5
            if causal:
                weights = weights.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            expected = attention.out_proj((weights.softmax(-1) @ value).transpose(0, 1).reshape(length, DIM))
            torch.testing.assert_close(found[row, :length], expected)
        assert found.isfinite().all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        SelfAttention(DIM, 5)
