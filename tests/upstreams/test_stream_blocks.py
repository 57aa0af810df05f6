"""The front end computed in blocks of time against all at once, on ten minutes: what a long reference pass rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from superb_probe.upstreams import convolutions
from superb_probe.upstreams.convolutions import FeatureExtractor
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.sizes import size_config

TEN_MINUTES = 600 * 16_000


def extractor(mode: str) -> FeatureExtractor:
    config = size_config("mamba_hubert_causal", "test")
    config = replace(config, extractor_mode=mode, conv_layers=((8, 10, 5), *((8, 3, 2),) * 4, *((8, 2, 2),) * 2))
    return HubertEncoder(config, torch.Generator().manual_seed(0)).eval().feature_extractor


def ten_minutes() -> Tensor:
    """Noise whose level changes by the minute, so that statistics of a part are not those of the whole."""
    wav = 0.1 * torch.randn(TEN_MINUTES + 77, generator=torch.Generator().manual_seed(1))
    return (wav * torch.linspace(0.1, 1.0, len(wav)))[None]


def blocked_error(front_end: FeatureExtractor, wav: Tensor, limit: int, patch: pytest.MonkeyPatch) -> float:
    """Relative difference between the front end in blocks and all at once."""
    with torch.no_grad():
        whole = front_end._features(wav, [wav.shape[1]])
        patch.setitem(convolutions._SLAB_ELEMENTS, "cpu", limit)
        blocks = front_end(wav, [wav.shape[1]])
    assert blocks.shape == whole.shape
    return float((blocks - whole).norm() / whole.norm())


@pytest.mark.parametrize("mode", ["default", "causal", "layer_norm"])
def test_blocks_of_ten_minutes_are_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wav, passes = ten_minutes(), []
    front_end = extractor(mode)
    features: Callable[..., Tensor] = front_end._features
    monkeypatch.setattr(front_end, "_features", lambda *given: passes.append(given[0].shape[1]) or features(*given))
    assert blocked_error(front_end, wav, 2**20, monkeypatch) <= 1e-6
    assert passes[0] == wav.shape[1] and len(passes) > 10  # all at once, then in blocks
    assert max(passes[1:]) < 16_000 * 60


def test_statistics_of_a_block_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    front_end, wav = extractor("default"), ten_minutes()[:, : 16_000 * 60]
    features: Callable[..., Tensor] = front_end._features
    monkeypatch.setattr(front_end, "_features", lambda wavs, lengths, folded=None: features(wavs, lengths))
    assert blocked_error(front_end, wav, 2**18, monkeypatch) > 0.01


def test_a_frozen_front_end_is_blocked_under_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    front_end = extractor("causal")
    wav = ten_minutes()[:, : 16_000 * 20]
    for parameter in front_end.parameters():
        parameter.requires_grad_(False)
    monkeypatch.setitem(convolutions._SLAB_ELEMENTS, "cpu", 2**16)
    lengths: list[int] = []
    features = front_end._features
    monkeypatch.setattr(front_end, "_features", lambda *given: lengths.append(given[0].shape[1]) or features(*given))
    front_end(wav, [wav.shape[1]])
    assert len(lengths) > 1
    for parameter in front_end.parameters():
        parameter.requires_grad_(True)
    lengths.clear()
    assert front_end(wav, [wav.shape[1]]).requires_grad
    assert lengths == [wav.shape[1]]
