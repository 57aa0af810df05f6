"""Linear layers of the encoders, by the fastest library that torch brings for the processor at hand.

torch multiplies fp32 matrices on a CPU by MKL, which leaves AVX-512 alone on processors that are not Intel's; oneDNN, which torch
brings as well, uses it. On a Zen 4 core the products of a Base encoder are 1.1 to 1.3 times as fast by oneDNN.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_ROWS = 32  # fewer are no faster


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of x and the transposed weight, plus bias.

    Args:
        x: (..., D_in).
        weight: (D_out, D_in).
        bias: (D_out,) or None.

    >>> linear(torch.ones(64, 3), torch.ones(2, 3), torch.ones(2))[0].tolist()
    [4.0, 4.0]
    """
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not on_cpu or torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.numel() >= _MIN_ROWS * x.shape[-1] and prefers_onednn()


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN is the faster of torch's two libraries here: AVX-512 on a processor that is not Intel's."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if not available or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in processor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
