"""The norm after a sum, which ends every post-norm block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from superb_probe.upstreams import fused_cuda
from superb_probe.upstreams.cuda_kernels import can_run


def sum_norm(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
    """norm(x + y), (..., D); in one kernel on a GPU without gradients, where the sum is not rounded in between.

    Args:
        x: (..., D).
        y: of x's shape.
        norm: over D.

    >>> sum_norm(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), nn.LayerNorm(2)).round().tolist()
    [-1.0, 1.0]
    """
    fits = can_run(x.device, x.dtype) and x.dtype == y.dtype and not torch.is_grad_enabled()
    if fits and isinstance(norm, nn.LayerNorm) and fused_cuda.can_sum_norm(x, norm):
        return fused_cuda.sum_layer_norm(x, y, norm)
    return norm(x + y)  # type: ignore[no-any-return]
