"""What the encoders do on a GPU and nowhere else: one product for queries, keys and values, rows' frames without waiting."""

from __future__ import annotations

import pytest
import torch

from superb_probe.engine_record import exact_arithmetic
from superb_probe.upstreams.base import counts_on
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.norms import sum_norm
from superb_probe.upstreams.transformer import SelfAttention

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = torch.device("cuda")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_one_product_gives_queries_keys_and_values_of_the_present_weights() -> None:
    torch.manual_seed(0)
    attention, x = SelfAttention(64, 4).to(DEVICE), torch.randn(2, 30, 64, device=DEVICE)
    with exact_arithmetic(DEVICE):
        for _ in range(2):  # the second time with other weights in the same memory
            apart = attention(x, None).detach()
            with torch.no_grad():
                together = attention(x, None)
            assert distance(together, apart) < 1e-5
            with torch.no_grad():
                attention.k_proj.weight.mul_(-1.5)
                attention.v_proj.bias.add_(1.0)
    with torch.no_grad():
        assert distance(attention(x, None), together) > 0.1, "the change is one that shows"


@pytest.mark.parametrize("name", ["transformer_hubert", "transformer_hubert_causal", "mamba_hubert"])
def test_states_are_those_of_the_cpu_for_full_and_padded_rows(name: str) -> None:
    upstream = load_upstream(name, size="test", random=0)
    generator = torch.Generator().manual_seed(1)
    for lengths in (
        [9000, 9000],
        [16000, 7001, 400],
        [331_000],
    ):  # the last has more frames than one block of the group norm
        wavs = [0.1 * torch.randn(length, generator=generator) for length in lengths]
        here = upstream.to("cpu").extract(wavs)
        with exact_arithmetic(DEVICE):
            there = upstream.to(DEVICE).extract(wavs)
        assert there.num_frames.tolist() == here.num_frames.tolist()
        for layer in range(len(here.states)):
            assert distance(there.states[layer].cpu(), here.states[layer]) < 1e-4, (lengths, layer)


def test_counts_arrive_whole() -> None:
    for _ in range(200):  # pinned memory is used again only when it has been read
        assert counts_on(DEVICE, [5, 7, 11]).tolist() == [5, 7, 11]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("width", [192, 768])
def test_the_norm_of_a_sum(dtype: torch.dtype, bound: float, width: int) -> None:
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width).to(DEVICE, dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, y = torch.randn(2, 3, 37, width, device=DEVICE).add(1.0).to(dtype).unbind()
    wide = torch.nn.LayerNorm(width).to(DEVICE, torch.float64)
    wide.load_state_dict(norm.state_dict())
    with torch.no_grad():
        found = sum_norm(x, y, norm)
        assert distance(found.double(), wide(x.double() + y.double())) < bound
    assert torch.equal(norm(x + y).detach(), sum_norm(x, y, norm).detach()), "with gradients it is torch's"
