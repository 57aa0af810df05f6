"""Which of torch's attention kernels a batch is left to choose from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from superb_probe.upstreams import attention
from superb_probe.upstreams.attention import PLANNED_PAIRS, fused_attention, kernels_for, repeated_shapes


def planned() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


def test_no_plan_is_made_for_a_shape_that_is_not_worth_it() -> None:
    assert planned(), "torch's default"
    with kernels_for(32, 749):
        assert not planned()
    assert planned()
    with kernels_for(1, int(PLANNED_PAIRS**0.5) + 1):
        assert planned()
    with repeated_shapes(), kernels_for(32, 749):
        assert planned()
    with kernels_for(32, 749):
        assert not planned()


def test_a_choice_of_the_users_stays_and_comes_back_after_an_error() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with kernels_for(1, 10**6):
            assert not planned()
        with kernels_for(1, 10):
            pass
        assert not planned()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    with pytest.raises(RuntimeError, match="inside"), kernels_for(1, 10):
        raise RuntimeError("inside")
    assert planned()


def test_attention_goes_by_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    seen = []

    def watched(*arguments: object, **more: object) -> torch.Tensor:
        seen.append(planned())
        return expected

    assert torch.equal(fused_attention(query, key, value, causal=True), expected)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    fused_attention(query, key, value)
    monkeypatch.setattr(attention, "PLANNED_PAIRS", 2 * 5**2)
    fused_attention(query, key, value)
    assert seen == [False, True]
