"""Streams on a GPU against one pass there."""

from __future__ import annotations

import pytest
import torch

from superb_probe.upstreams.load import load_upstream

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("name", ["mamba_hubert_causal", "mamba_mlp_hubert_causal", "transformer_hubert_causal"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("size", ["test", "tiny"])
def test_chunks_give_one_pass(name: str, dtype: str, bound: float, size: str) -> None:
    upstream = load_upstream(name, size=size, random=0, device="cuda", dtype=dtype)
    wav = 0.1 * torch.randn(50_001, generator=torch.Generator().manual_seed(0))
    whole = upstream.extract([wav]).states[:, 0].float()
    for chunk_samples in (160, 1280, 50_001):
        stream = upstream.stream()
        pieces = [stream.push(chunk) for chunk in wav.split(chunk_samples)]
        states = torch.cat([*pieces, stream.finish()], dim=1).float()
        error = (states - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        assert float(error.max()) <= bound
