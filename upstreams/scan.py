"""The selective scan of Mamba in plain PyTorch: the definition that faster kernels are tested against.

Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, algorithm 2), for each row, channel e and state n:

    h[t] = exp(delta[t] A) h[t - 1] + delta[t] B[t] u[t]        y[t] = sum over n of C[t] h[t]  +  D u[t]

with y then gated by SiLU(z). The recurrence is run a chunk of frames at a time: what does not depend on h (the exponentials, the
inputs) and what only reads it (the sum over n) are computed for the whole chunk, which leaves one multiply-add a frame in the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams.base import frame_mask
from superb_probe.upstreams.cpu_kernels import COMPILERS
from superb_probe.upstreams.scan_inputs import ScanInputs

BACKENDS = ("auto", "plain", "cpu", "cuda", "mamba_ssm")

# Elements of (frames, B, N, E) worked on at once on a CPU without gradients: 2 MiB in fp32, about a core's share of the cache.
_CPU_BLOCK_ELEMENTS = 2**19


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    num_frames: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_frames: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan and the state it ends in.

    Here B (the batch) and B (the input matrix) share a letter, as they do in the literature; E is the inner width, N the state's.
    The state is fp32 whatever the inputs are (float64 for float64 inputs). Positional arguments are those of mamba_ssm's
    `selective_scan_fn`.

    Args:
        u: (B, E, T) inputs.
        delta: (B, E, T) step sizes, before `delta_bias` and softplus.
        A: (E, N), negative; or (E, 1), one decay for all N states of a channel (Mamba-2).
        B: (B, N, T).
        C: (B, N, T).
        D: (E,) skip weights.
        z: (B, E, T) gate; y is multiplied by SiLU(z).
        delta_bias: (E,) added to delta.
        delta_softplus: whether softplus is applied to delta.
        reverse: run from each row's last valid frame to its first, as if the valid frames were flipped, scanned and flipped back.
        num_frames: (B,) valid frames of each row. Frames at or past it give zero and leave the state alone.
        initial_state: (B, E, N) state before the first frame scanned; zeros by default.
        chunk_frames: frames the plain back end works on at once. It bounds memory; the result is the same.
        backend: "plain" (this file: any device, gradients), "cuda" (`scan_cuda.py`), "cpu" (`scan_cpu.py`: compiled C++, gradients),
            "mamba_ssm" (that package's kernel, without this function's own arguments), or "auto": the fastest of the first three.

    Returns:
        y (B, E, T) in the dtype of u, and the last state (B, E, N).

    >>> ones = torch.ones(1, 1, 3)
    >>> y, state = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones)
    >>> y.flatten().tolist(), state.item()
    ([1.0, 2.0, 3.0], 3.0)
    >>> selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, reverse=True, num_frames=torch.tensor([2]))[0].flatten().tolist()
    [2.0, 1.0, 0.0]
    """
    given = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, num_frames, initial_state)
    given.check_shapes()
    chosen = choose_backend(backend, given)
    return _plain_scan(given, chunk_frames) if chosen == "plain" else _other_scan(chosen)(given)


def _plain_scan(given: ScanInputs, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """The scan in PyTorch, `chunk_frames` at a time."""
    u, num_frames, recorded = given.u, given.num_frames, given.recorded()
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    initial_state = given.initial_state
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], u.shape[1], given.B.shape[1])
    state = initial_state.to(dtype).transpose(1, 2).contiguous()  # (B, N, E): channels innermost
    a = given.A.to(dtype).T.contiguous()
    padding = None if num_frames is None else ~frame_mask(num_frames, u.shape[2])
    if not recorded and u.device.type == "cpu":
        chunk_frames = min(chunk_frames, _CPU_BLOCK_ELEMENTS // max(1, state.numel()))
    chunk_frames = max(1, min(chunk_frames, u.shape[2]))
    buffers = None if recorded else (state.new_empty(chunk_frames, *state.shape), torch.empty_like(state))

    outputs: list[Tensor] = []
    starts = range(0, u.shape[2], chunk_frames)
    for start in reversed(starts) if given.reverse else starts:
        chunk = slice(start, min(start + chunk_frames, u.shape[2]))
        inputs, steps, b, c = (_frames_first(x, chunk, dtype) for x in (u, given.delta, given.B, given.C))
        if given.delta_bias is not None:
            steps = steps + given.delta_bias.to(dtype)
        if given.delta_softplus:
            steps = F.softplus(steps)
        padded = None if padding is None else padding[:, chunk].T[..., None]
        y, state = _scan_chunk(inputs, steps, a, b, c, state, padded, given.reverse, buffers)
        if given.D is not None:
            y = torch.addcmul(y, inputs, given.D.to(dtype))
        if given.z is not None:
            y = y * F.silu(_frames_first(given.z, chunk, dtype))
        if padded is not None:
            y = y.masked_fill(padded, 0.0)
        outputs.append(y.to(u.dtype).transpose(0, 1))
    if not outputs:
        return u, state.transpose(1, 2)
    return torch.cat(outputs[::-1] if given.reverse else outputs, dim=1).transpose(1, 2), state.transpose(1, 2)


def choose_backend(backend: str, given: ScanInputs) -> str:
    """The back end that runs a scan: "plain", "cpu", "cuda" or "mamba_ssm".

    Args:
        backend: what was asked for; "auto" is the fastest that can.
        given: what is scanned.

    Raises:
        ValueError: for a back end that is unknown, or cannot run it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown back end {backend!r}: one of {', '.join(BACKENDS)}")
    if backend in ("plain", "mamba_ssm"):
        return backend
    u = given.u
    if backend == "cuda" or backend == "auto" and u.is_cuda:
        from superb_probe.upstreams.scan_cuda import supports

        if supports(given):
            return "cuda"
        if backend == "cuda":
            raise ValueError(
                "the cuda back end runs on a GPU, in float32, bfloat16 or float16, with at most 64 states of their own decays; "
                f"u is {u.dtype} on {u.device}, N is {given.B.shape[1]}"
            )
        return "plain"
    from superb_probe.upstreams import scan_cpu

    if scan_cpu.supports(given):
        return "cpu"
    if backend == "cpu":
        raise ValueError(
            "the cpu back end runs on a CPU, in float32, bfloat16 or float16, on at least one frame, and is compiled by a C++ "
            f"compiler ({', '.join(COMPILERS)} or $CXX); u is {u.dtype} on {u.device}, of shape {tuple(u.shape)}"
        )
    return "plain"


def _other_scan(backend: str) -> Callable[[ScanInputs], tuple[Tensor, Tensor]]:
    if backend == "cpu":
        from superb_probe.upstreams.scan_cpu import selective_scan_cpu

        return selective_scan_cpu
    if backend == "cuda":
        from superb_probe.upstreams.scan_cuda import selective_scan_cuda

        return selective_scan_cuda
    return _scan_of_mamba_ssm


def _scan_of_mamba_ssm(given: ScanInputs) -> tuple[Tensor, Tensor]:
    """mamba_ssm's own kernel on what it can do.

    Raises:
        ValueError: if it is asked for more, or is not installed.
    """
    if given.reverse or given.num_frames is not None or given.initial_state is not None:
        raise ValueError(
            "the mamba_ssm back end knows no reverse, num_frames or initial_state: leave them, or take another"
        )
    scan = mamba_ssm_scan()
    if scan is None:
        raise ValueError(
            "the mamba_ssm back end wants mamba_ssm, which cannot be imported: `superb-probe doctor` says why"
        )
    tensors = [None if x is None else x.contiguous() for x in given.tensors[:8]]
    y, last = scan(*tensors, given.delta_softplus, return_last_state=True)
    return y, last


@functools.cache
def mamba_ssm_scan() -> Callable[..., Any] | None:
    """mamba_ssm's `selective_scan_fn`, or None where it cannot be imported (it asks transformers for names that 5 has not)."""
    try:
        from transformers import generation

        for name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput", "TextStreamer"):
            if not hasattr(generation, name):
                setattr(generation, name, object)
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError, RuntimeError):  # OSError: built for another torch
        return None
    return selective_scan_fn  # type: ignore[no-any-return]


def _frames_first(x: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
    """The chunk's frames of (B, E, T) as (T, B, E), channels innermost in memory."""
    return x[..., chunk].permute(2, 0, 1).to(dtype).contiguous()


def _scan_chunk(
    inputs: Tensor,
    steps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    padded: Tensor | None,
    reverse: bool,
    buffers: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """C h over the frames of a chunk, and the last state.

    Args:
        inputs: (T, B, E).
        steps: (T, B, E).
        a: (N, E) or (1, E).
        b: (T, B, N).
        c: (T, B, N).
        state: (B, N, E).
        padded: (T, B, 1), True where a frame does not count.
        reverse: from the last frame to the first.
        buffers: room for the states of the chunk (T, B, N, E) and for the last one; None to record for autograd.
    """
    drive = steps * inputs
    if padded is not None:
        # A step of size zero keeps the state as it is (exp(0) = 1) and adds nothing to it.
        steps, drive, b = (x.masked_fill(padded, 0.0) for x in (steps, drive, b))
    if buffers is None:
        states, state = _recorded_chunk(steps, drive, a, b[..., None], state, reverse)
    else:
        states, state = _chunk_in_place(steps, drive, a, b[..., None], state, reverse, *buffers)
    return torch.matmul(c[:, :, None], states)[:, :, 0], state


def _recorded_chunk(
    delta: Tensor, drive: Tensor, a: Tensor, b: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The recurrence over a chunk, in a form autograd can follow.

    Args:
        delta: (T, B, E) step sizes.
        drive: (T, B, E), delta * u.
        a: (N, E) or (1, E).
        b: (T, B, N, 1).
        state: (B, N, E).
        reverse: from the last frame to the first.

    Returns:
        States after each frame (T, B, N, E), and the last of them.
    """
    decays = (delta[:, :, None] * a).exp()
    # unbind once: indexing frame by frame would make autograd quadratic in T.
    steps = list(zip(decays.unbind(), (drive[:, :, None] * b).unbind(), strict=True))
    kept: list[Tensor] = []
    for decay, added in reversed(steps) if reverse else steps:
        state = torch.addcmul(added, decay, state)
        kept.append(state)
    return torch.stack(kept[::-1] if reverse else kept), state


def _chunk_in_place(
    delta: Tensor, drive: Tensor, a: Tensor, b: Tensor, state: Tensor, reverse: bool, states: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, written into `states` (which the next chunk overwrites) and `last`."""
    states = states[: delta.shape[0]]
    if a.shape[0] == 1:
        states.copy_((delta[:, :, None] * a).exp())
    else:
        torch.mul(delta[:, :, None], a, out=states).exp_()
    steps = list(zip(states.unbind(), drive[:, :, None].unbind(), b.unbind(), strict=True))
    for decay, inputs, weights in reversed(steps) if reverse else steps:
        state = decay.mul_(state).addcmul_(inputs, weights)
    return states, last.copy_(state)
