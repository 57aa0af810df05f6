"""Mamba mixers against their equations written out in float64, and their handling of direction, length and state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.upstreams import mamba
from superb_probe.upstreams.mamba import InnBiMamba, Mamba, Mamba2, MambaLayer, MixerState, depthwise_conv

DIM, STATE, KERNEL, EXPAND, HEAD = 6, 3, 4, 2, 4
LENGTHS = torch.tensor([23, 11, 2])


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module


def frames(batch: int = 3, length: int = 23) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ssm(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """h = exp(step A) h + step B u; y = C h + D u; one utterance, (T, E), frame by frame."""
    h, out = torch.zeros(u.shape[1], b.shape[1], dtype=u.dtype), []
    for t in range(len(u)):
        h = torch.exp(step[t, :, None] * a) * h + (step[t] * u[t])[:, None] * b[t]
        out.append(h @ c[t] + d * u[t])
    return torch.stack(out)


def convolve(x: Tensor, conv: nn.Conv1d) -> Tensor:
    padded = F.pad(x.T[None], (KERNEL - 1, 0))
    return F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=x.shape[1])[0].T)


def scanned(m: Any, hidden: Tensor, suffix: str = "") -> Tensor:
    """Convolution and scan of Mamba-1 for one utterance, (T, E)."""
    u = convolve(hidden, getattr(m, f"conv1d{suffix}"))
    x_proj, dt_proj = getattr(m, f"x_proj{suffix}"), getattr(m, f"dt_proj{suffix}")
    low, b, c = x_proj(u).split([dt_proj.in_features, STATE, STATE], dim=-1)
    a = -torch.exp(m.A_b_log if suffix else m.A_log)
    return ssm(u, F.softplus(dt_proj(low)), a, b, c, m.D_b if suffix else m.D)


def plain_mamba(m: Mamba, x: Tensor) -> Tensor:
    x = x.flip(0) if m.reverse else x
    hidden, gate = m.in_proj(x).chunk(2, -1)
    y = m.out_proj(scanned(m, hidden) * F.silu(gate))
    return y.flip(0) if m.reverse else y


def plain_inn(m: InnBiMamba, x: Tensor) -> Tensor:
    hidden, gate = m.in_proj(x).chunk(2, -1)
    return m.out_proj((scanned(m, hidden) + scanned(m, hidden.flip(0), "_b").flip(0)) * F.silu(gate))


def plain_mamba2(m: Mamba2, x: Tensor) -> Tensor:
    inner = EXPAND * DIM
    gate, mixed, step = m.in_proj(x).split([inner, inner + 2 * STATE, inner // HEAD], dim=-1)
    u, b, c = convolve(mixed, m.conv1d).split([inner, STATE, STATE], dim=-1)
    step = F.softplus(step + m.dt_bias)
    heads = [
        ssm(u[:, i : i + HEAD], step[:, h, None].expand(-1, HEAD), -torch.exp(m.A_log[h]), b, c, m.D[h])
        for h, i in enumerate(range(0, inner, HEAD))
    ]
    y = torch.cat(heads, -1) * F.silu(gate)
    return m.out_proj(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight)


MIXERS = {
    "forward": (lambda: Mamba(DIM, STATE, KERNEL, EXPAND), plain_mamba),
    "backward": (lambda: Mamba(DIM, STATE, KERNEL, EXPAND, reverse=True), plain_mamba),
    "inn": (lambda: InnBiMamba(DIM, STATE, KERNEL, EXPAND), plain_inn),
    "mamba2": (lambda: Mamba2(DIM, STATE, KERNEL, EXPAND, HEAD), plain_mamba2),
}


@torch.no_grad()
def error_in_batch(kind: str) -> float:
    """The largest difference on valid frames between a mixer on a padded batch and its equations row by row."""
    build, plain = MIXERS[kind]
    mixer, x = randomised(build()), frames()
    got = mixer(x, LENGTHS)
    rows = [plain(mixer, x[row, :end]) for row, end in enumerate(LENGTHS.tolist())]  # type: ignore[operator]
    padding = torch.arange(x.shape[1]) >= LENGTHS[:, None]
    assert kind != "forward" or not got[padding].any()
    return max(float((got[row, : len(y)] - y).abs().max()) for row, y in enumerate(rows))


@pytest.mark.parametrize("kind", MIXERS)
def test_mixer_is_its_equations_in_a_padded_batch(kind: str) -> None:
    assert error_in_batch(kind) < 1e-12


@pytest.mark.parametrize("kind", ["backward", "inn"])
def test_a_backward_scan_that_starts_in_the_padding_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = mamba.selective_scan
    monkeypatch.setattr(mamba, "selective_scan", lambda *a, **k: original(*a, **(k | {"num_frames": None})))
    assert error_in_batch(kind) > 1e-3


@pytest.mark.parametrize("kind", ["backward", "inn"])
def test_a_backward_convolution_over_the_padding_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "zero_padding", lambda x, num_frames: x)
    assert error_in_batch(kind) > 1e-3


def test_a_backward_mixer_convolves_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(
        x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None, *, reverse: bool = False
    ) -> Tensor:
        return depthwise_conv(x, weight, bias, tail)

    monkeypatch.setattr(mamba, "depthwise_conv", forward_only)
    assert error_in_batch("backward") > 1e-3
    assert error_in_batch("forward") < 1e-12


@pytest.mark.parametrize("kind", ["forward", "mamba2"])
@torch.no_grad()
def test_pieces_with_their_state_equal_one_pass(kind: str) -> None:
    mixer, x = randomised(MIXERS[kind][0]()), frames()
    whole, last = mixer.run(x)

    def in_pieces(change: Any) -> Tensor:
        state, out = None, []
        for piece in x.split([1, 2, 10, 10], dim=1):
            y, state = mixer.run(piece, initial=state)
            state = change(state)
            out.append(y)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
        return torch.cat(out, dim=1)

    torch.testing.assert_close(in_pieces(lambda state: state), whole, rtol=1e-12, atol=1e-12)
    for forget in (lambda s: MixerState(s.conv * 0, s.scan), lambda s: MixerState(s.conv, s.scan * 0)):
        with pytest.raises(AssertionError):  # each half of the state matters
            in_pieces(forget)


@torch.no_grad()
def test_state_of_a_padded_row_is_that_of_the_row_alone() -> None:
    mixer, x = randomised(MIXERS["forward"][0]()), frames()
    _, state = mixer.run(x, LENGTHS)
    for row, end in enumerate(LENGTHS.tolist()):
        _, alone = mixer.run(x[row : row + 1, :end])
        torch.testing.assert_close(state.conv[row : row + 1], alone.conv, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.scan[row : row + 1], alone.scan, rtol=1e-12, atol=1e-12)


def test_a_reversed_mixer_refuses_a_past_state() -> None:
    mixer = randomised(MIXERS["backward"][0]())
    _, state = mixer.run(frames())
    with pytest.raises(ValueError, match="reversed"):
        mixer.run(frames(), initial=state)


LAYER_KINDS = ("mamba", "ext_bi_mamba", "inn_bi_mamba", "mamba2")


@pytest.mark.parametrize("ffn_dim", [0, 10])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layer_tensor_names(kind: str, ffn_dim: int) -> None:
    names = {name.split(".")[0] for name in MambaLayer(kind, DIM, STATE, KERNEL, EXPAND, HEAD, ffn_dim).state_dict()}
    mixers = {
        "mamba": {"mamba"},
        "ext_bi_mamba": {"mamba", "mamba_rev"},
        "inn_bi_mamba": {"bimamba"},
        "mamba2": {"mamba"},
    }
    norm = "bimamba_layer_norm" if "bi_mamba" in kind else "mamba_layer_norm"
    assert names == mixers[kind] | {norm} | ({"fc1", "fc2", "final_layer_norm"} if ffn_dim else set())


def test_mixer_tensor_names_and_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in Mamba(384, 24, 4, 3).state_dict().items()}
    assert shapes == {
        "A_log": (1152, 24), "D": (1152,), "in_proj.weight": (2304, 384), "conv1d.weight": (1152, 1, 4),
        "conv1d.bias": (1152,), "x_proj.weight": (72, 1152), "dt_proj.weight": (1152, 24), "dt_proj.bias": (1152,),
        "out_proj.weight": (384, 1152),
    }  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in Mamba2(384, 24, 4, 3, 48).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2376, 384), "conv1d.weight": (1200, 1, 4), "conv1d.bias": (1200,), "dt_bias": (24,),
        "A_log": (24,), "D": (24,), "norm.weight": (1152,), "out_proj.weight": (384, 1152),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_ext_bi_layer_sums_its_directions_and_norms_once(norm_first: bool) -> None:
    layer = randomised(MambaLayer("ext_bi_mamba", DIM, STATE, KERNEL, EXPAND, HEAD, 10, norm_first))
    x = frames()
    flipped = copy.deepcopy(layer.mamba_rev)
    flipped.reverse = False

    def mix(v: Tensor) -> Tensor:
        return layer.mamba(v) + flipped(v.flip(1)).flip(1)  # type: ignore[no-any-return]

    def feed(v: Tensor) -> Tensor:
        return layer.fc2(F.gelu(layer.fc1(v)))  # type: ignore[no-any-return]

    if norm_first:
        middle = x + mix(layer.bimamba_layer_norm(x))
        expected = middle + feed(layer.final_layer_norm(middle))
    else:
        middle = layer.bimamba_layer_norm(x + mix(x))
        expected = layer.final_layer_norm(middle + feed(middle))
    full = torch.full((3,), 23)
    torch.testing.assert_close(layer(x, full, full), expected, rtol=1e-12, atol=1e-12)
    layer.norm_first = not norm_first
    assert (layer(x, full, full) - expected).abs().max() > 1e-3


def test_mamba2_start_of_steps_and_decays() -> None:
    mixer = Mamba2(48, 8, 4, 2, 4)
    steps = F.softplus(mixer.dt_bias)
    assert 1e-4 <= steps.min() and steps.max() <= 0.1001
    assert 1 <= mixer.A_log.exp().min() and mixer.A_log.exp().max() <= 16
    mixer.reset_scan_parameters(torch.Generator().manual_seed(3))
    again = mixer.A_log.clone()
    mixer.reset_scan_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(mixer.A_log, again)
