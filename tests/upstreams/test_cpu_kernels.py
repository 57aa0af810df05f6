"""Kernels compiled for the CPU against plain float64, and what happens where they cannot be compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.errors import CheckError
from superb_probe.upstreams import cpu_kernels, fused_cpu, linear
from superb_probe.upstreams.mamba import depthwise_conv
from superb_probe.upstreams.scan import choose_backend, selective_scan
from superb_probe.upstreams.scan_inputs import ScanInputs

needs_compiler = pytest.mark.skipif(cpu_kernels.find_compiler() is None, reason="no C++ compiler on this machine")
SHAPES = [(1, 7, 1, 1), (3, 37, 5, 71), (2, 16, 64, 33), (1, 48, 24, 130), (2, 33, 1, 17)]  # B, E, N, T
LOOSE = ("-O1", *cpu_kernels._FLAGS[1:])  # mutants are compiled faster


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is loaded is forgotten before and after."""
    cpu_kernels._library.cache_clear()
    yield
    cpu_kernels._library.cache_clear()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def scan_errors(shape: tuple[int, int, int, int], reverse: bool, full: bool, shared: bool, backend: str) -> list[float]:
    """Errors of y, the last state and every gradient in fp32 against the plain scan in float64."""
    batch, width, states, frames = shape
    generator = torch.Generator().manual_seed(frames)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).float().double()

    u, delta, z = (draw(batch, width, frames) for _ in range(3))
    b, c = (draw(batch, states, frames) for _ in range(2))
    a = -draw(width, 1 if shared else states).exp().float().double()
    inputs = [u, delta if full else 0.3 * delta.abs().float().double(), a, b, c]
    inputs += [draw(width), z, draw(width), draw(batch, width, states)] if full else []
    num_frames = torch.tensor([frames, max(1, frames // 2), 1][:batch]) if full else None
    weights = draw(batch, width, frames), draw(batch, width, states)

    def run(dtype: torch.dtype, name: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        tensors = [*leaves, *[None] * (9 - len(leaves))]
        y, last = selective_scan(
            *tensors[:8],  # type: ignore[arg-type]
            full, reverse=reverse, num_frames=num_frames, initial_state=tensors[8], backend=name,
        )  # fmt: skip
        total = (y * weights[0].to(dtype)).sum() + (last * weights[1].to(dtype)).sum()
        return [y.detach(), last.detach(), *torch.autograd.grad(total, leaves)]

    pairs = zip(run(torch.float32, backend), run(torch.float64, "plain"), strict=True)
    return [relative(found, exact) for found, exact in pairs]


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_scan_and_its_gradients(
    shape: tuple[int, int, int, int], shared: bool, full: bool, reverse: bool
) -> None:
    errors = scan_errors(shape, reverse, full, shared, "cpu")
    assert all(error < 5e-6 for error in errors)  # not max(): it may drop a NaN


MUTANTS = {
    "the backward scan starts in the padding": ("g.reverse ? item.end - 1 - i : i", "g.reverse ? g.frames - 1 - i : i"),
    "lengths are ignored": ("g.num_frames ? std::min", "false ? std::min"),
    "the step's gradient lacks the decay": ("grad_step += exponent * a[n];", ""),
    "the state's gradient is dropped between tiles": ("carry[n] = grad_h * decay[n];", "carry[n] = grad_h * 0.0f;"),
    "softplus is not differentiated": ("if (g.softplus) grad_step *= sigmoid(x.raw);", ""),
    "a cheaper exponential": ("p = p * f + 0.24022647913556217f;", "p = 0.0f * f + 0.24022647913556217f;"),
}


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_scan_is_seen(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    text = cpu_kernels.SOURCE.read_text(encoding="utf-8")
    old, new = MUTANTS[mutant]
    assert old in text
    (tmp_path / "broken.cpp").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(cpu_kernels, "SOURCE", tmp_path / "broken.cpp")
    monkeypatch.setattr(cpu_kernels, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu_kernels, "_FLAGS", LOOSE)
    errors = scan_errors((3, 37, 5, 71), True, True, False, "cpu")
    assert not all(error < 1e-4 for error in errors)  # NaN counts: a frame that is never written holds anything


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_batches_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    inputs = [torch.randn(3, 50, 40) for _ in range(2)]
    a, b, c = -torch.rand(50, 6), torch.randn(3, 6, 40), torch.randn(3, 6, 40)
    try:
        torch.set_num_threads(threads)
        y, last = selective_scan(*inputs, a, b, c, delta_softplus=True, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        alone, end = selective_scan(
            inputs[0][row : row + 1], inputs[1][row : row + 1], a, b[row : row + 1], c[row : row + 1],
            delta_softplus=True, backend="cpu",
        )  # fmt: skip
        assert torch.equal(alone[0], y[row]) and torch.equal(end[0], last[row])


@needs_compiler
def test_the_cpu_scan_streams_and_lets_nothing_in() -> None:
    u, delta, z = (torch.randn(2, 20, 50) for _ in range(3))
    a, b, c = -torch.rand(20, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    whole, last = selective_scan(u, delta, a, b, c, z=z, delta_softplus=True, backend="cpu")
    state, parts = None, []
    for piece in (slice(0, 1), slice(1, 18), slice(18, 50)):
        y, state = selective_scan(
            u[..., piece], delta[..., piece], a, b[..., piece], c[..., piece], z=z[..., piece],
            delta_softplus=True, initial_state=state, backend="cpu",
        )  # fmt: skip
        parts.append(y)
    assert torch.equal(torch.cat(parts, -1), whole) and torch.equal(state, last)
    num_frames = torch.tensor([50, 20])
    clean = selective_scan(u, delta, a, b, c, z=z, delta_softplus=True, num_frames=num_frames, reverse=True)
    for x in (u, delta, z, b, c):
        x[1, :, 20:] = float("nan")
    dirty = selective_scan(u, delta, a, b, c, z=z, delta_softplus=True, num_frames=num_frames, reverse=True)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1]) and not dirty[0][1, :, 20:].any()
    u[0, 0, 3] = float("nan")  # a value that is not a number is not swallowed either
    assert selective_scan(u, delta, a, b, c, backend="cpu")[0][0, 0, 3:].isnan().all()


@needs_compiler
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_depthwise_convolution(reverse: bool, tail: bool) -> None:
    both = torch.randn(2, 70, 74)
    x, weight, bias = (
        both[..., :37],
        torch.randn(37, 1, 4),
        torch.randn(37),
    )  # x is a view, as half of in_proj's output is
    past = torch.randn(2, 3, 37) if tail else None
    found = fused_cpu.depthwise_conv_silu(x, weight, bias, past, reverse)
    wide = None if past is None else past.double()
    exact = F.silu(depthwise_conv(x.double(), weight.double(), bias.double(), wide, reverse=reverse))
    other = F.silu(depthwise_conv(x.double(), weight.double(), bias.double(), wide, reverse=not reverse))
    assert found is not None and relative(found, exact) < 1e-6 < relative(found, other)
    assert fused_cpu.depthwise_conv_silu(x.double(), weight.double(), bias.double(), None, reverse) is None


@needs_compiler
def test_the_first_convolution() -> None:
    wavs, weight, shift = torch.randn(2, 400), 2 * torch.randn(2, 19, 10), torch.randn(2, 19)
    found = fused_cpu.waveform_conv_gelu(wavs, weight, shift, 5)
    windows = wavs.double().unfold(1, 10, 5)
    sums = torch.einsum("btk,bck->btc", windows, weight.double()) + shift.double()[:, None]
    assert found is not None and relative(found, F.gelu(sums)) < 2e-7
    assert relative(F.gelu(sums, approximate="tanh"), F.gelu(sums)) > 1e-5  # the approximation would be seen


@needs_compiler
def test_gelu_is_exact_in_the_tail() -> None:
    x = torch.linspace(-12, 12, 4001)
    windows = torch.stack([x, torch.zeros_like(x)], dim=1).reshape(1, -1)
    found = fused_cpu.waveform_conv_gelu(windows, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1), 2)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert found is not None
    torch.testing.assert_close(found[0, :, 0].double(), exact, rtol=3e-5, atol=1e-30)
    assert relative(found[0, :, 0], exact) < 1e-7


def test_linear_by_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear.Linear(48, 20)
    x = torch.randn(3, 40, 48)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    for preferred in (False, torch.backends.mkldnn.is_available()):
        monkeypatch.setattr(linear, "prefers_onednn", lambda preferred=preferred: preferred)
        with torch.no_grad():
            assert relative(layer(x), exact) < 1e-6
        (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        assert relative(gradient, x.sum((0, 1)).double().expand(20, -1)) < 1e-6


def test_without_a_compiler_the_plain_scan_runs(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    ones = torch.ones(1, 1, 3)
    assert choose_backend("auto", ScanInputs(ones, ones, -torch.ones(1, 1), ones, ones)) == "plain"
    assert fused_cpu.waveform_conv_gelu(torch.ones(1, 9), torch.ones(1, 2, 3), torch.ones(1, 2), 1) is None
    with pytest.raises(ValueError, match="compiler"):
        selective_scan(ones, ones, -torch.ones(1, 1), ones, ones, backend="cpu")


def test_a_compiler_that_fails_is_told_of_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(RuntimeWarning, match="no such flag"):
        assert cpu_kernels.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_kernels.library() is None


def test_the_switch_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_kernels.SWITCH, "0")
    ones = torch.ones(1, 1, 3)
    assert cpu_kernels.library() is None
    assert choose_backend("auto", ScanInputs(ones, ones, -torch.ones(1, 1), ones, ones)) == "plain"


@needs_compiler
def test_sources_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, compiler = tmp_path / "one.cpp", str(cpu_kernels.find_compiler())
    source.write_text('extern "C" int one() { return 1; }\n', encoding="utf-8")
    made = cpu_kernels.compiled(source, compiler, tmp_path / "kept")
    words: list[list[str]] = []
    monkeypatch.setattr(cpu_kernels, "_run", lambda command: words.append(command) or b"")
    assert cpu_kernels.compiled(source, compiler, tmp_path / "kept") == made and not words
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [made.name]
    source.write_text("this is not C++\n", encoding="utf-8")
    monkeypatch.undo()
    with pytest.raises(CheckError, match="failed"):
        cpu_kernels.compiled(source, compiler, tmp_path / "kept")
