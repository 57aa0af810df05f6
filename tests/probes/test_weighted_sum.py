"""The weighted sum mixes layers by the softmax of its weights, which start equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from superb_probe.errors import RequestError
from superb_probe.probes import kernels
from superb_probe.probes.weighted_sum import Mixer, WeightedSum, mix, mixture_gradient


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.arange(1, shape[0] + 1).view(
        -1, *[1] * (len(shape) - 1)
    )


def by_hand(layers: torch.Tensor, weights: torch.Tensor, layer_norm: bool) -> torch.Tensor:
    powers = weights.double().exp()
    total = torch.zeros(layers.shape[1:], dtype=torch.float64)
    for layer, power in zip(layers.double(), powers, strict=True):
        if layer_norm:
            mean = layer.mean(-1, keepdim=True)
            layer = (layer - mean) / (layer.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        total += layer * power / powers.sum()
    return total.float()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 5, 6), (4, 6)])
def test_it_equals_the_sum_by_hand(shape: tuple[int, ...], layer_norm: bool) -> None:
    mix = WeightedSum(4, layer_norm)
    layers = states(*shape)
    assert mix.weights.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(mix(layers), by_hand(layers, mix.weights, layer_norm))
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.3, -1.0, 2.0, 0.0]))
    torch.testing.assert_close(mix(layers), by_hand(layers, mix.weights, layer_norm))
    # what the check must reject: the other normalisation, and weights that are not a softmax
    other = by_hand(layers, mix.weights, not layer_norm)
    assert (mix(layers) - other).norm() > 0.1 * other.norm()
    raw = torch.tensordot(mix.weights, layers, dims=1)
    assert (mix(layers) - raw).norm() > 0.1 * raw.norm()


def test_padding_stays_zero_and_the_gradient_reaches_every_layer() -> None:
    mix = WeightedSum(3, layer_norm=True)
    layers = states(3, 2, 5, 4)
    layers[:, 1, 3:] = 0
    mixed = mix(layers)
    assert mixed[1, 3:].abs().max() == 0
    mixed.square().sum().backward()
    assert mix.weights.grad is not None and (mix.weights.grad != 0).all()


def test_half_precision_states_are_mixed_in_the_weights_precision() -> None:
    layers = states(3, 7, 4).half()
    mixed = WeightedSum(3)(layers)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, layers.float().mean(0))


def test_it_has_no_other_parameter() -> None:
    assert [name for name, _ in WeightedSum(5, layer_norm=True).named_parameters()] == ["weights"]
    assert isinstance(WeightedSum(5), nn.Module)


@pytest.mark.parametrize("shape", [(3, 2, 4), (2,), (4,)])
def test_a_wrong_number_of_layers_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"L = 4"):
        WeightedSum(4)(torch.zeros(shape))
    with pytest.raises(RequestError, match="num_layers"):
        WeightedSum(0)


def autograd(weights: torch.Tensor, layers: torch.Tensor, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = weights.double().requires_grad_()
    mixed = torch.einsum("nl,lbtd->nbtd", leaf.softmax(1), layers.double())
    (gradient,) = torch.autograd.grad((mixed * slopes.double()).sum(), leaf)
    return mixed.detach().float(), gradient.float()


def test_the_mixtures_of_several_trials_and_their_gradients_are_autograd_s() -> None:
    generator = torch.Generator().manual_seed(3)
    weights, layers = torch.randn(3, 4, generator=generator), states(4, 2, 5, 6)
    mixer = Mixer(weights, (None, 2, None))
    slopes = torch.randn(3, 2, 5, 6, generator=generator)
    mixed, gradient = autograd(weights, layers, slopes)
    got = mixer.gradient(mixer.mixture(), mixture_gradient(slopes, layers))
    for trial in (0, 2):
        torch.testing.assert_close(mix(mixer.mixture(), layers)[trial], mixed[trial], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[trial], gradient[trial], rtol=1e-4, atol=1e-4)
    assert torch.equal(mix(mixer.mixture(), layers)[1], layers[2]) and got[1].abs().max() == 0
    assert mixer.part([1, 2]).mixture().tolist() == mixer.mixture()[1:].tolist()


def test_states_that_need_a_gradient_get_it() -> None:
    sum_of = WeightedSum(3)
    layers = states(3, 2, 5).requires_grad_()
    sum_of(layers).sum().backward()
    torch.testing.assert_close(layers.grad, torch.full((3, 2, 5), 1 / 3))


@pytest.mark.cuda
@pytest.mark.parametrize("trials", [1, 3, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_equal_the_plain_operations(trials: int, dtype: torch.dtype) -> None:
    assert kernels.available()
    generator = torch.Generator().manual_seed(3)
    layers = torch.randn(13, 5, 77, 31, generator=generator).to("cuda", dtype)
    mixture = torch.rand(trials, 13, generator=generator).cuda()
    slopes = torch.randn(trials, 5, 77, 31, generator=generator).cuda()
    flat = layers.flatten(1).double()
    torch.testing.assert_close(mix(mixture, layers).flatten(1).double(), mixture.double() @ flat, rtol=1e-5, atol=1e-5)
    expected = slopes.flatten(1).double() @ flat.T
    torch.testing.assert_close(mixture_gradient(slopes, layers).double(), expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(mixture_gradient(slopes.roll(1, 1), layers).double(), expected, rtol=1e-2, atol=1e-2)
