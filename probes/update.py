"""One optimiser update, by s3prl's rule: loss over accumulation, clipped norm, step; used by training and by conformance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Updater:
    """An optimiser that accumulates, clips and steps.

    Adam (betas 0.9 and 0.999, eps 1e-8, no decay) or AdamW (torch's default decay of 0.01) at a constant rate. An update whose
    gradient norm is not finite is not made; it still counts as one, is counted in `skipped_updates`, and its norm is returned.

    Attributes:
        parameters: what is trained: the layer weights and the head, at one rate.
        updates: updates so far, those skipped included.
        skipped_updates: updates not made because the norm of the gradient was not finite.

    >>> weight = nn.Parameter(torch.tensor(3.0))
    >>> updater = Updater([weight], "adam", lr=0.5, clip=1.0)
    >>> updater.update(weight.square()), round(weight.item(), 4)
    (6.0, 2.5)
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: str, lr: float, clip: float, accumulate: int = 1
    ) -> None:
        """`clip` is the largest gradient norm; `accumulate` batches make an update."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if optimizer not in OPTIMIZERS:
            raise RequestError(f"unknown optimizer {optimizer!r}. Fix: one of {', '.join(OPTIMIZERS)}")
        if not self.parameters or accumulate < 1 or not (lr > 0 and clip > 0):
            raise RequestError(
                f"Updater: {len(self.parameters)} parameters, lr {lr}, clip {clip}, accumulate {accumulate}. "
                "Fix: all of them must be positive"
            )
        self.optimizer = OPTIMIZERS[optimizer](self.parameters, lr=lr)  # type: ignore[call-arg]
        self.clip, self.accumulate = clip, accumulate
        self.updates = self.skipped_updates = 0
        self._batches = 0

    def update(self, loss: Tensor) -> float | None:
        """Add one batch's gradient; on every `accumulate`-th batch clip, step and clear.

        Args:
            loss: a scalar with its graph.

        Returns:
            The gradient's norm before clipping when this batch ended an update, else None.
        """
        (loss / self.accumulate).backward()  # type: ignore[no-untyped-call]
        self._batches += 1
        if self._batches < self.accumulate:
            return None
        self._batches = 0
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        self.updates += 1
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped_updates += 1
        self.optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after an update; gradients of a half-accumulated one are not in it.

        Raises:
            RequestError: between the batches of one update.
        """
        if self._batches:
            raise RequestError(
                f"Updater: {self._batches} of {self.accumulate} batches accumulated; save after an update"
            )
        return {
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.skipped_updates = state["updates"], state["skipped_updates"]
        self._batches = 0
