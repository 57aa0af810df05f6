"""Gradients of the GPU's scan and depthwise convolution against autograd over the plain ones in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams import fused_cuda, mamba
from superb_probe.upstreams.scan import selective_scan
from superb_probe.upstreams.scan_cuda import selective_scan_cuda
from superb_probe.upstreams.scan_inputs import ScanInputs
from superb_probe.upstreams.scan_layout import GradientLayout, Split, choose_gradient_layout

cuda = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
H100_BLOCK_BYTES = 232448


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def draw_inputs(
    batch: int, width: int, frames: int, states: int, dtype: torch.dtype, without: tuple[str, ...]
) -> dict[str, Tensor | None]:
    generator = torch.Generator("cuda").manual_seed(batch * width + frames + states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    values: dict[str, Tensor | None] = {
        "u": draw(batch, frames, width).to(dtype).transpose(1, 2),
        "delta": (0.5 * draw(batch, frames, width)).to(dtype).transpose(1, 2),
        "A": -torch.rand(width, states, device="cuda", generator=generator) * states,
        "B": draw(batch, frames, states).to(dtype).transpose(1, 2),
        "C": draw(batch, frames, states).to(dtype).transpose(1, 2),
        "D": draw(width),
        "z": draw(batch, frames, width).to(dtype).transpose(1, 2),
        "delta_bias": 0.5 * draw(width) - 3.0,
        "initial_state": draw(batch, width, states),
    }
    return {name: None if name in without else value for name, value in values.items()}


CASES = [
    # batch, width, frames, states, dtype, reverse, lengths, absent, split, layout
    (3, 200, 37, 24, torch.float32, False, None, (), None, None),
    (3, 200, 37, 24, torch.float32, True, [37, 5, 1], (), None, GradientLayout(1, 128, 1, 16)),
    (2, 130, 1, 16, torch.float32, False, None, ("initial_state",), None, None),
    (2, 63, 70, 24, torch.bfloat16, True, [70, 33], ("z",), None, None),
    (2, 64, 300, 24, torch.float32, True, [300, 133], (), Split(2, 2, 3), GradientLayout(2, 256, 2, 32)),
    (2, 192, 333, 24, torch.bfloat16, False, [333, 332], (), None, GradientLayout(2, 128, 4, 32)),
    (2, 96, 133, 1, torch.float32, False, None, ("D", "delta_bias"), None, None),
    (2, 96, 133, 64, torch.float32, True, None, (), None, None),
    (2, 96, 133, 7, torch.float32, False, [100, 99], (), None, GradientLayout(2, 128, 3, 16)),
    (4, 256, 500, 24, torch.float16, False, None, (), None, None),
]


def gradients(case: tuple, run: object, wide: bool, lengths: list[int] | None) -> dict[str, Tensor]:  # type: ignore[type-arg]
    """Of a random weighting of the output, and of the last state where there is a first one."""
    batch, width, frames, states, dtype, reverse, _, absent, _, _ = case
    values = draw_inputs(batch, width, frames, states, dtype, absent)
    given = {
        name: None if value is None else (value.double() if wide else value.clone()).requires_grad_()
        for name, value in values.items()
    }
    valid = None if lengths is None else torch.tensor(lengths, device="cuda")
    state = given.pop("initial_state")
    y, last = run(*given.values(), True, reverse=reverse, num_frames=valid, initial_state=state)  # type: ignore[operator]
    generator = torch.Generator("cuda").manual_seed(5)
    weights = torch.randn(y.shape, device="cuda", generator=generator).to(dtype)
    loss = (y * weights.to(y.dtype)).sum(dtype=torch.float64)
    if state is not None:
        loss = loss + (last * torch.randn(last.shape, device="cuda", generator=generator)).sum(dtype=torch.float64)
    given["initial_state"] = state
    names = [name for name, value in given.items() if value is not None]
    return dict(zip(names, torch.autograd.grad(loss, [given[name] for name in names]), strict=True))  # type: ignore[misc]


@cuda
@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_plain_ones_in_float64(case: tuple) -> None:  # type: ignore[type-arg]
    expected = gradients(case, lambda *x, **y: selective_scan(*x, **y, backend="plain"), True, case[6])
    found = gradients(case, lambda *x, **y: selective_scan_cuda(ScanInputs(*x, **y), *case[8:]), False, case[6])
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert all(error < BOUNDS[case[4]] for error in errors.values()), errors
    for name, value in found.items():
        assert value.dtype == (case[4] if name in ("u", "delta", "B", "C", "z") else torch.float32)
    again = gradients(case, lambda *x, **y: selective_scan_cuda(ScanInputs(*x, **y), *case[8:]), False, case[6])
    assert all(torch.equal(found[name], again[name]) for name in found), "bits differ between two runs"


@cuda
@needs_gpu
def test_gradients_that_ignore_lengths_are_found() -> None:
    case = CASES[1]
    expected = gradients(case, lambda *x, **y: selective_scan(*x, **y, backend="plain"), True, case[6])
    found = gradients(case, lambda *x, **y: selective_scan_cuda(ScanInputs(*x, **y)), False, None)
    assert all(relative(found[name], expected[name]) > 1e-2 for name in NAMES)


@cuda
@needs_gpu
def test_frames_past_the_end_have_no_gradient_whatever_they_hold() -> None:
    values = draw_inputs(2, 64, 40, 24, torch.float32, ())
    lengths = torch.tensor([40, 17], device="cuda")
    state = values.pop("initial_state")
    for name in ("u", "delta", "B", "C", "z"):
        value = values[name]
        assert value is not None
        value[1, :, 17:] = float("nan")
    given = [None if x is None else x.requires_grad_() for x in values.values()]
    inputs = ScanInputs(*given, True, num_frames=lengths, initial_state=state)  # type: ignore[arg-type]
    y, last = selective_scan_cuda(inputs)
    found = torch.autograd.grad(y.square().sum() + last.sum(), given)  # type: ignore[arg-type]
    assert all(torch.isfinite(each).all() for each in found)
    assert not found[0][1, :, 17:].any() and not found[3][1, :, 17:].any() and found[0][1, :, :17].all()


@cuda
@needs_gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_convolutions_gradients(reverse: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 150, 400, device="cuda").to(dtype)[..., :200]
    weight, bias = torch.randn(200, 1, 4, device="cuda"), torch.randn(200, device="cuda")
    tail = None if reverse else torch.randn(3, 3, 200, device="cuda").to(dtype)
    weights = torch.randn(3, 150, 200, device="cuda").to(dtype)

    def run(fused: bool, backwards: bool) -> list[Tensor]:
        given = [(value if fused else value.double()).detach().requires_grad_() for value in (x, weight, bias)]
        before = None if tail is None or backwards != reverse else tail if fused else tail.double()
        if fused:
            y = fused_cuda.depthwise_conv_silu(*given, before, backwards)
        else:
            y = F.silu(mamba.depthwise_conv(*given, before, reverse=backwards))
        return [y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), given)]

    expected = run(False, reverse)
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    assert all(relative(a, b) < bound for a, b in zip(run(True, reverse), expected, strict=True))
    assert all(relative(a, b) > 1e-2 for a, b in zip(run(True, not reverse)[:3], expected, strict=False))


@cuda
@needs_gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_a_mixers_gradients_on_the_gpu(reverse: bool) -> None:
    """The whole mixer: the fused path against float64, where everything is plain."""
    torch.manual_seed(3)
    mixer = mamba.Mamba(64, 24, 4, 3, reverse=reverse).cuda()
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(-4.0)
    lengths = torch.tensor([90, 41], device="cuda")
    x = torch.randn(2, 90, 64, device="cuda")

    def run(dtype: torch.dtype) -> list[Tensor]:
        each = x.detach().to(dtype).requires_grad_()
        module = mixer.to(dtype)
        y = module(each, lengths)
        found = torch.autograd.grad(y.square().mean(), [each, *module.parameters()])
        return [grad.double() for grad in (y, *found)]

    expected, found = run(torch.float64), run(torch.float32)
    assert all(relative(a, b) < 1e-3 for a, b in zip(found, expected, strict=True))


def test_layouts_of_the_backward_pass_fit() -> None:
    for states in (1, 7, 16, 24, 33, 64):
        for pairs in (False, True):
            for limit in (H100_BLOCK_BYTES, 101376, 65536):
                layout = choose_gradient_layout(states, pairs, limit)
                assert layout.shared_bytes(states) <= limit
                assert layout.chunk_frames % Split(1, 1, 1).tile == 0 and layout.threads % 32 == 0
    assert choose_gradient_layout(24, True, H100_BLOCK_BYTES).shared_bytes(24) <= (H100_BLOCK_BYTES - 1024) // 2
