"""Multiply-accumulates: counted by hand, by torch, and by the shapes, which must agree."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from superb_probe.upstreams import macs
from superb_probe.upstreams.base import LayerStates, Upstream
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import size_config

SAMPLES = 4000


class Counted(Upstream):
    """Frames of ten samples, a linear layer and attention over them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 8, bias=False)
        self.info = dataclasses.replace(
            load_upstream("fbank").info, name="counted", dim=8, num_layers=1, hop_samples=10
        )

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 10

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        frames = self.linear(wavs.view(len(wavs), -1, 10))[:, None]
        mixed = nn.functional.scaled_dot_product_attention(frames, frames, frames)
        return LayerStates(mixed.transpose(0, 1), num_samples // 10)


def test_a_run_is_counted_as_by_hand() -> None:
    # 10 frames: 10 x 10 x 8 in the linear layer, 10 x 10 x 8 for the scores and as many for the values
    assert macs.measured_macs(Counted(), 100) == 800 + 800 + 800


def test_transformer_layers_count_what_torch_counts() -> None:
    """Two layers more, so that the front end, which a CPU computes by tricks of its own, falls out."""
    upstream = load_upstream("transformer_hubert", size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    configs = [dataclasses.replace(upstream.encoder.config, num_layers=number) for number in (1, 3)]
    measured = [macs.measured_macs(HubertUpstream(HubertEncoder(each), upstream.info), SAMPLES) for each in configs]
    shapes = [macs.hubert_macs(each, SAMPLES) for each in configs]
    assert measured[1] - measured[0] == shapes[1] - shapes[0] > 0


@pytest.mark.parametrize("name", ["mamba_hubert", "mamba_hubert_causal", "mamba_mlp_hubert", "mamba_inner_hubert"])
def test_mamba_linear_layers_are_all_counted(name: str) -> None:
    """Everything beside scan and depthwise convolution is a linear layer: read off the modules, not the config."""
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    encoder, config = upstream.encoder, upstream.encoder.config
    frames = upstream.num_frames(SAMPLES)
    filled = -(-frames // config.frame_multiple) * config.frame_multiple
    linear = sum(m.weight.numel() for m in encoder.encoder.layers.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    scans = sum("A_" in key and key.endswith("log") for key in encoder.encoder.layers.state_dict())
    counted = filled * (linear + scans * macs.scan_macs(config.expand * config.dim, config.state_dim))
    nothing = dataclasses.replace(config, num_layers=0)
    assert macs.hubert_macs(config, SAMPLES) - macs.hubert_macs(nothing, SAMPLES) == counted


def test_a_scan_with_more_states_costs_more() -> None:
    config = size_config("mamba_hubert", "test")
    more = dataclasses.replace(config, state_dim=2 * config.state_dim)
    assert macs.hubert_macs(more, SAMPLES) > macs.hubert_macs(config, SAMPLES)


def test_hubert_base_is_where_superb_has_it() -> None:
    """SUPERB: 1.669e12 over 32 utterances spread over test-clean, whose mean length is 7.4 s (5.4 h, 2620 utterances)."""
    ours = macs.hubert_macs(size_config("transformer_hubert", "base"), 160_000) / 10
    assert 0.9 < ours * 32 * 7.42 / 1.669e12 < 1.1


def test_counted_once_an_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = load_upstream("fbank")
    first = macs.macs_per_second(upstream)
    assert first is not None and first > 0
    monkeypatch.setattr(macs, "measured_macs", None)
    assert first == macs.macs_per_second(upstream)
    assert macs.macs_per_second(Counted()) is None  # a stranger's code is not run for it


def test_two_frames_by_hand() -> None:
    config = HubertConfig(
        conv_layers=((4, 10, 5),), dim=8, num_layers=1, num_heads=2, ffn_dim=16, conv_pos=3, conv_pos_groups=2
    )
    front = 2 * 4 * 10 + 2 * 4 * 8 + 2 * 3 * 8 * 4
    layer = 2 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 2 * 8
    assert macs.hubert_macs(config, 15) == front + layer


def test_the_mapping_for_cpu_attention_is_needed() -> None:
    """Mutant: without it, torch's table alone may not see attention on a CPU; with it, it is seen once."""
    upstream = Counted()
    with torch.no_grad():
        assert macs.measured_macs(upstream, 200) - 2 * macs.measured_macs(upstream, 100) == 2 * 8 * (20**2 - 2 * 10**2)
