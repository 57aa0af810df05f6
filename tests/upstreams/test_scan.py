"""The selective scan against the recurrence written out in float64, frame by frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams import scan
from superb_probe.upstreams.scan import selective_scan

BATCH, WIDTH, STATE, FRAMES = 3, 5, 3, 71  # nothing a power of two, FRAMES no multiple of a chunk


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(BATCH, WIDTH, FRAMES),
        "delta": normal(BATCH, WIDTH, FRAMES),
        "A": -normal(WIDTH, STATE).exp(),
        "B": normal(BATCH, STATE, FRAMES),
        "C": normal(BATCH, STATE, FRAMES),
        "D": normal(WIDTH),
        "z": normal(BATCH, WIDTH, FRAMES),
        "delta_bias": normal(WIDTH),
        "initial_state": normal(BATCH, WIDTH, STATE),
    }


def plain_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, reverse: bool = False,
    num_frames: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: one row, one frame at a time, nothing shared with the code under test."""
    y = torch.zeros_like(u)
    last = torch.zeros(u.shape[0], u.shape[1], B.shape[1], dtype=u.dtype)
    for row in range(u.shape[0]):
        state = torch.zeros_like(last[row]) if initial_state is None else initial_state[row]
        end = u.shape[2] if num_frames is None else int(num_frames[row])
        for t in range(end - 1, -1, -1) if reverse else range(end):
            step = delta[row, :, t] + (0 if delta_bias is None else delta_bias)
            step = F.softplus(step) if delta_softplus else step
            state = torch.exp(step[:, None] * A) * state + (step * u[row, :, t])[:, None] * B[row, :, t]
            out = state @ C[row, :, t] + (0 if D is None else D * u[row, :, t])
            y[row, :, t] = out * (1 if z is None else F.silu(z[row, :, t]))
        last[row] = state
    return y, last


OPTIONS: list[tuple[str, ...]] = [
    (),
    ("D",),
    ("z",),
    ("delta_bias", "softplus"),
    ("initial_state",),
    ("D", "z", "delta_bias", "softplus", "initial_state"),
]


def arguments(optional: tuple[str, ...], **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {k: v for k, v in inputs().items() if k in ("u", "delta", "A", "B", "C", *optional)}
    if "softplus" in optional:
        given["delta_softplus"] = True
    else:
        given["delta"] = given["delta"].abs()
    return given | more


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, (71, 33, 1)])
@pytest.mark.parametrize("optional", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_scan_is_the_recurrence(optional: tuple[str, ...], lengths: tuple[int, ...] | None, reverse: bool) -> None:
    num_frames = None if lengths is None else torch.tensor(lengths)
    given = arguments(optional, reverse=reverse, num_frames=num_frames)
    y, last = plain_loop(**given)
    for chunk_frames in (1, 32, 1000):
        got_y, got_last = selective_scan(**given, chunk_frames=chunk_frames)
        torch.testing.assert_close(got_y, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_last, last, rtol=1e-12, atol=1e-12)
    given["u"] = given["u"].clone().requires_grad_()
    torch.testing.assert_close(selective_scan(**given)[0].detach(), y, rtol=1e-12, atol=1e-12)  # the recorded path


def test_one_decay_for_all_states_is_the_same_as_repeating_it() -> None:
    given = arguments(())
    shared = given | {"A": given["A"][:, :1]}
    repeated = given | {"A": given["A"][:, :1].expand(-1, STATE)}
    torch.testing.assert_close(selective_scan(**shared), selective_scan(**repeated), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(reverse: bool) -> None:
    given = {name: tensor[..., :7] if tensor.ndim == 3 and tensor.shape[2] == FRAMES else tensor
             for name, tensor in inputs().items()}  # fmt: skip
    names = list(given)
    leaves = [given[name].detach().clone().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, tensors, strict=True))
        return selective_scan(
            **named, delta_softplus=True, reverse=reverse, num_frames=torch.tensor([7, 4, 1]), chunk_frames=3
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_streaming_by_chunks_equals_one_pass() -> None:
    given = arguments(OPTIONS[-1])
    whole, whole_last = selective_scan(**given)

    def pieces(hand_over: bool) -> tuple[Tensor, Tensor]:
        state, out = given["initial_state"], []
        for start in range(0, FRAMES, 10):
            piece = {
                k: v[..., start : start + 10] if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()
            }
            y, last = selective_scan(**(piece | {"initial_state": state}))
            state = last if hand_over else state
            out.append(y)
        return torch.cat(out, -1), last

    torch.testing.assert_close(pieces(True), (whole, whole_last), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # the state matters: dropping it is seen
        torch.testing.assert_close(pieces(False), (whole, whole_last), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("garbage", [1e3, float("nan"), float("inf")])
def test_padding_does_not_leak(reverse: bool, garbage: float) -> None:
    num_frames = torch.tensor([71, 33, 1])
    given = arguments(OPTIONS[-1], reverse=reverse, num_frames=num_frames)
    y, last = selective_scan(**given)
    for row, end in enumerate(num_frames.tolist()):
        assert torch.equal(y[row, :, end:], torch.zeros_like(y[row, :, end:]))
        for name in ("u", "delta", "z", "B", "C"):
            given[name][row, :, end:] = garbage
    dirty_y, dirty_last = selective_scan(**given)
    assert torch.equal(dirty_y, y) and torch.equal(dirty_last, last)


def test_a_scan_that_ignores_lengths_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments((), reverse=True, num_frames=torch.tensor([71, 33, 1]))
    y, _ = plain_loop(**given)
    monkeypatch.setattr(scan, "frame_mask", lambda n, t: torch.ones(len(n), t, dtype=torch.bool))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(selective_scan(**given)[0][1, :, :33], y[1, :, :33], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["plain", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_fp32_whatever_the_inputs(dtype: torch.dtype, backend: str) -> None:
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments(OPTIONS[-1]).items()}
    y, last = selective_scan(**given, backend=backend)
    exact, exact_last = plain_loop(**{k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()})
    assert y.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(
        last.double(), exact_last, rtol=1e-5, atol=1e-5
    )  # only y is rounded to the inputs' dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_no_frames_and_wrong_shapes() -> None:
    given = arguments(())
    empty = {k: v[..., :0] if v.shape[-1] == FRAMES else v for k, v in given.items()}
    y, last = selective_scan(**empty)
    assert y.shape == (BATCH, WIDTH, 0) and last.abs().max() == 0
    with pytest.raises(ValueError, match=r"B has shape .* C has shape"):
        selective_scan(**(given | {"B": given["B"][..., 1:], "C": given["C"][:, 1:]}))
