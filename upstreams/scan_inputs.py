"""What a selective scan is given, on its way from `selective_scan` to the back end that runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """The arguments of `selective_scan` of the same names, which says what they are."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False
    reverse: bool = False
    num_frames: Tensor | None = None
    initial_state: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that gradients may be asked of."""
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial_state

    def recorded(self) -> bool:
        """Whether gradients are wanted."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.tensors)

    def check_shapes(self) -> None:
        """Refuse tensors that do not fit together.

        Raises:
            ValueError: that names all of them.
        """
        batch, width, frames = self.u.shape
        size = self.B.shape[1]
        expected = {
            "delta": (self.delta, (batch, width, frames)),
            "A": (self.A, (width, 1 if self.A.shape[-1] == 1 else size)),
            "B": (self.B, (batch, size, frames)),
            "C": (self.C, (batch, size, frames)),
        }
        if self.initial_state is not None:
            expected["initial_state"] = (self.initial_state, (batch, width, size))
        wrong = [
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
            for name, (tensor, shape) in expected.items()
            if tuple(tensor.shape) != shape
        ]
        if wrong:
            raise ValueError(f"selective_scan with u of shape (B, E, T) = {tuple(self.u.shape)}: " + "; ".join(wrong))
