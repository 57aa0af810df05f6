"""The selective scan on a CPU in C++ (`cpu_kernels.cpp`), forward and backward, where `cpu_kernels.py` finds a compiler.

Sixteen channels at a time keep their states in the first cache while time passes, so that nothing of size (T, E, N) is ever in
memory; the exponential is a polynomial of six terms. For gradients the states before every sixteenth frame are kept, and the ones
between are computed again. Measured with `superb-probe bench kernels`; docs/encoder-speed.md has the numbers and what else was tried.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from superb_probe.upstreams.cpu_kernels import address, innermost, library
from superb_probe.upstreams.scan_inputs import ScanInputs

KEPT_FRAMES = 16  # frames between kept states: TILE of the source
_LANES = 16
_POINTERS = ("u", "delta", "b", "c", "z", "a", "d", "bias", "initial", "num_frames", "y", "last", "kept")
_GRADIENTS = ("y", "last", "u", "delta", "z", "b", "c", "a", "d", "bias", "initial")
_SEQUENCES = ("u", "delta", "b", "c", "z")


class _Arguments(ctypes.Structure):
    """The source's struct of the same fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"grad_{name}", ctypes.c_void_p) for name in _GRADIENTS),
        *((f"{name}_{axis}", ctypes.c_int64) for name in _SEQUENCES for axis in ("batch", "frame")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "width", "frames", "states", "decays", "ranges", "threads", "softplus", "reverse")
        ),
    ]


def supports(inputs: ScanInputs) -> bool:
    """Whether the kernel can run on inputs: dense CPU tensors of at most fp32, and a compiler on this machine."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    given = [x for x in inputs.tensors if x is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in known for x in given)
    return plain and all(x.numel() > 0 for x in given) and library() is not None


def selective_scan_cpu(given: ScanInputs) -> tuple[Tensor, Tensor]:
    """`selective_scan` on inputs that `supports` allows."""
    u, initial_state, num_frames = given.u, given.initial_state, given.num_frames
    sequences = (None if x is None else x.float().transpose(1, 2) for x in (u, given.delta, given.B, given.C, given.z))
    # The kernel's exponentials have base 2.
    decays = given.A.float().t() * math.log2(math.e)
    d, bias = (None if x is None else x.float() for x in (given.D, given.delta_bias))
    initial = None if initial_state is None else initial_state.float().transpose(1, 2)
    lengths = None if num_frames is None else num_frames.to(torch.int64).contiguous()
    options = given.delta_softplus, given.reverse, torch.is_grad_enabled()
    y, last = _Scan.apply(*sequences, decays, d, bias, initial, lengths, *options)  # type: ignore[no-untyped-call]
    return y.to(u.dtype).transpose(1, 2), last.transpose(1, 2)


class _Scan(torch.autograd.Function):
    """The kernel under autograd. Sequences are (B, T, E) or (B, T, N), decays (N or 1, E), states (B, N, E)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, lengths, softplus, reverse, recorded = inputs
        u, delta, b, c, z = (None if x is None else innermost(x) for x in tensors[:5])
        a, d, bias, initial = (None if x is None else x.contiguous() for x in tensors[5:])
        assert u is not None and b is not None
        batch, frames, width = u.shape
        states = b.shape[2]
        y, last = u.new_empty(batch, frames, width), u.new_empty(batch, states, width)
        kept = None
        if recorded and any(ctx.needs_input_grad):  # parameters need gradients under no_grad as well
            kept = u.new_empty(batch, -(-frames // KEPT_FRAMES), states, width)
            ctx.save_for_backward(u, delta, b, c, z, a, d, bias, initial, lengths, kept)
            ctx.options = softplus, reverse
        arguments = _arguments((u, delta, b, c, z, a, d, bias, initial, lengths, y, last, kept), softplus, reverse)
        _call("scan_forward", arguments)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, b, c, z, a, d, bias, initial, lengths, kept = ctx.saved_tensors
        arguments = _arguments((u, delta, b, c, z, a, d, bias, initial, lengths, None, None, kept), *ctx.options)
        batch, frames, width = u.shape
        states = b.shape[2]
        grad_y, grad_last = grad_y.contiguous(), grad_last.contiguous()
        sequences = [u.new_zeros(batch, frames, width) for _ in range(2 if z is None else 3)]
        weights = [u.new_zeros(arguments.ranges, batch, frames, states) for _ in range(2)]
        grad_a, grad_initial = u.new_empty(batch, states, width), u.new_empty(batch, states, width)
        grad_d, grad_bias = u.new_empty(batch, width), u.new_empty(batch, width)
        grad_u, grad_delta, grad_z = (*sequences, None)[:3]
        found = (grad_y, grad_last, grad_u, grad_delta, grad_z, *weights, grad_a, grad_d, grad_bias, grad_initial)
        for name, tensor in zip(_GRADIENTS, found, strict=True):
            setattr(arguments, f"grad_{name}", address(tensor))
        _call("scan_backward", arguments)
        # Of the exponent in units of log 2, as `a` was given.
        grad_a = grad_a.sum(0) * math.log(2)
        if a.shape[0] == 1:
            grad_a = grad_a.sum(0, keepdim=True)
        return (
            grad_u,
            grad_delta,
            weights[0].sum(0),
            weights[1].sum(0),
            grad_z,
            grad_a,
            None if d is None else grad_d.sum(0),
            None if bias is None else grad_bias.sum(0),
            None if initial is None else grad_initial,
            None,
            None,
            None,
            None,
        )


def _arguments(tensors: tuple[Tensor | None, ...], softplus: bool, reverse: bool) -> _Arguments:
    u, delta, b, c, z, a = tensors[:6]
    assert u is not None and b is not None and a is not None
    batch, frames, width = u.shape
    threads = torch.get_num_threads()
    blocks = -(-width // _LANES)
    ranges = min(blocks, 1 if threads == 1 else -(-4 * threads // batch))
    strides = [stride for x in (u, delta, b, c, z) for stride in ((0, 0) if x is None else x.stride()[:2])]
    sizes = (batch, width, frames, b.shape[2], a.shape[0], ranges, threads, int(softplus), int(reverse))
    return _Arguments(*map(address, tensors), *(None for _ in _GRADIENTS), *strides, *sizes)


def _call(name: str, arguments: _Arguments) -> None:
    compiled = library()
    assert compiled is not None
    getattr(compiled, name)(ctypes.byref(arguments))
