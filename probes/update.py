"""Optimiser updates by s3prl's rule, for many trials at once: loss over accumulation, clipped norm, step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.probes import kernels

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
WEIGHT_DECAY = {"adam": 0.0, "adamw": 0.01}
NORM_BLOCK = 2**15  # numbers of one norm on a CPU
ALIGNMENT = 32  # numbers between the starts of parameters: matrix products read whole cache lines


def row_norms(rows: Tensor) -> Tensor:
    """(N,) norms of (N, P) numbers.

    On a CPU by blocks: torch 2.13 adds the squares of a long row one after another, and its norm is off by 2e-5 at 1.7 million
    numbers, by 3e-3 at 43 million.
    """
    if not rows.is_cuda and rows.shape[1] > NORM_BLOCK:
        whole = rows.shape[1] // NORM_BLOCK * NORM_BLOCK
        blocks = torch.linalg.vector_norm(rows[:, :whole].view(len(rows), -1, NORM_BLOCK), dim=2)
        rows = torch.cat([blocks, rows[:, whole:]], dim=1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


class StackedUpdater:
    """The optimisers of N trials: each with its own rate, moments, clipped norm and count of updates.

    Adam (betas 0.9 and 0.999, eps 1e-8, no decay) or AdamW (torch's default decay of 0.01) at a constant rate. The parameters of
    a trial become views of one row of `values`, so that an update of all trials is a few operations on (N, P) numbers and no trial
    can reach another's. Nothing here waits for a GPU.

    An update whose gradient norm is not finite is not made; it counts as one and is counted in `skipped`. A trial whose loss
    is not finite stops: it is no longer `running`, and `stopped_at` says in which update.

    Attributes:
        values: (N, P) the trained numbers of every trial.
        gradients: (N, P) theirs; whoever computes them adds to them, `step` does not clear them.
        first: (N, P) Adam's first moments.
        second: (N, P) its second.
        running: (N,) trials that are still updated.
        stopped_at: (N,) the update whose loss was not finite, 0 where there was none.
        stopped_loss: (N,) that loss.
        skipped: (N,) updates not made because the norm of the gradient was not finite.
        count: () updates so far, those skipped included.
    """

    def __init__(
        self, parameters: Sequence[Iterable[nn.Parameter]], optimizer: str, lr: Sequence[float], clip: float
    ) -> None:
        """`parameters` and `lr` are those of each trial; `clip` is the largest gradient norm."""
        rows = [[parameter for parameter in row if parameter.requires_grad] for row in parameters]
        if optimizer not in WEIGHT_DECAY:
            raise RequestError(f"unknown optimizer {optimizer!r}. Fix: one of {', '.join(WEIGHT_DECAY)}")
        if not rows or not rows[0] or not (min(lr) > 0 and clip > 0):
            raise RequestError(
                f"updates of {len(rows)} trials, {len(rows[0]) if rows else 0} parameters, lr {list(lr)}, clip {clip}. "
                "Fix: all of them must be positive"
            )
        self.shapes = [parameter.shape for parameter in rows[0]]
        if any([parameter.shape for parameter in row] != self.shapes for row in rows) or len(lr) != len(rows):
            raise ValueError("trials of one fit have parameters of the same shapes and a rate each")
        self.clip, self.decay, self.lr = clip, WEIGHT_DECAY[optimizer], tuple(lr)
        sizes = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in self.shapes]
        self.offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        device, count = rows[0][0].device, len(rows)
        self.values = torch.zeros(count, sum(sizes), device=device)
        self.gradients, self.first, self.second = (torch.zeros_like(self.values) for _ in range(3))
        for number, row in enumerate(rows):
            for place, parameter in enumerate(row):
                self.stacked(place)[number].copy_(parameter.detach())
                parameter.data = self.stacked(place)[number]
                parameter.grad = self.stacked(place, self.gradients)[number]
        self.running = torch.ones(count, dtype=torch.bool, device=device)
        self.stopped_at, self.skipped = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(2))
        self.stopped_loss = torch.zeros(count, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self._taken = torch.zeros(count, device=device)  # updates made: Adam's own count
        self._rates = torch.tensor(self.lr, dtype=torch.float64, device=device)

    def stacked(self, place: int, of: Tensor | None = None) -> Tensor:
        """(N, ...) the parameters at one place of all trials, a view; `of` is `values` or `gradients`."""
        shape, start = self.shapes[place], self.offsets[place]
        rows = self.values if of is None else of
        return rows[:, start : start + shape.numel()].view(len(rows), *shape)

    def state(self) -> list[Tensor]:
        """All tensors that an update changes."""
        return [
            self.values, self.gradients, self.first, self.second, self.running, self.stopped_at, self.stopped_loss,
            self.skipped, self.count, self._taken,
        ]  # fmt: skip

    @torch.no_grad()
    def step(self, losses: Tensor) -> Tensor:
        """Clip and step every running trial whose loss and gradient are finite.

        Args:
            losses: (N,) of this update.

        Returns:
            (N,) the gradients' norms before clipping.
        """
        norms = row_norms(self.gradients)
        if self.values.is_cuda and kernels.available():
            factors, made = self.decide(norms, losses)
            betas = BETA1, BETA2
            kernels.adam(self.values, self.gradients, self.first, self.second, factors, made, betas, EPS)
            return norms
        self.count += 1
        lost = self.running & ~losses.isfinite()
        self.stopped_at.copy_(torch.where(lost, self.count, self.stopped_at))
        self.stopped_loss.copy_(torch.where(lost, losses, self.stopped_loss))
        self.running &= ~lost
        made = self.running & norms.isfinite()
        self.skipped += self.running & ~made
        self._taken += made
        scales = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        if self.values.is_cuda:
            self._adam(made, scales)
        else:
            self._adam_by_rows(made.tolist(), scales.tolist())
        return norms

    def decide(self, norms: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """What `step` does before Adam, by a launch of a GPU.

        Args:
            norms: (N,) of the gradients.
            losses: (N,) of this update.

        Returns:
            Factors (4, N) and which trials are updated (N,), as `kernels.adam` takes them.
        """
        decided = [self.running, self.stopped_at, self.stopped_loss, self.skipped, self.count, self._taken]
        return kernels.decide(norms, losses, decided, self._rates, self.clip, self.decay, (BETA1, BETA2))

    def _adam_by_rows(self, made: Sequence[bool], scales: Sequence[float]) -> None:
        """Trial after trial, each in one pass over its numbers."""
        update = torch._fused_adamw_ if self.decay else torch._fused_adam_
        for row, scale in enumerate(scales):
            if not made[row]:
                continue
            if scale < 1:
                self.gradients[row].mul_(scale)
            update(
                [self.values[row]], [self.gradients[row]], [self.first[row]], [self.second[row]], [], [self._taken[row]],
                lr=self.lr[row], beta1=BETA1, beta2=BETA2, weight_decay=self.decay, eps=EPS, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _adam(self, made: Tensor, scales: Tensor) -> None:
        """All trials at once, by masks: nothing is decided on the host."""
        taken = self._taken.double()
        step = torch.where(made, self._rates / (1 - BETA1**taken), 0.0)
        root = torch.where(taken > 0, (1 - BETA2**taken).sqrt(), 1.0)
        keep = torch.where(made, 1 - self._rates * self.decay, 1.0)
        factors = torch.stack([scales.nan_to_num(0.0).double(), step, root, keep]).float()
        self._adam_by_masks(factors[..., None], made[:, None])

    def _adam_by_masks(self, factors: Tensor, made: Tensor) -> None:
        """Adam in plain operations; factors (4, N, 1) of gradients, step, root and decay, made (N, 1)."""
        scale, step, root, keep = factors
        keep1, keep2 = (torch.where(made, beta, 1.0) for beta in (BETA1, BETA2))
        take1, take2 = (torch.where(made, 1 - beta, 0.0) for beta in (BETA1, BETA2))
        gradients = torch.where(made, self.gradients, 0.0).mul_(scale)
        if self.decay:
            self.values.mul_(keep)
        self.first.mul_(keep1).addcmul_(gradients, take1)
        self.second.mul_(keep2).addcmul_(gradients * take2, gradients)
        self.values.sub_((self.first * step).div_(self.second.sqrt().div_(root).add_(EPS)))


class Updater:
    """One optimiser that accumulates, clips and steps: `StackedUpdater` of a single trial.

    An update whose gradient norm is not finite is not made; it still counts as one, is counted in `skipped_updates`, and its
    norm is returned.

    Attributes:
        parameters: what is trained: the layer weights and the head, at one rate.

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
        if accumulate < 1:
            raise RequestError(f"Updater: accumulate is {accumulate}. Fix: it must be positive")
        self._stack = StackedUpdater([self.parameters], optimizer, [lr], clip)
        self.clip, self.accumulate = clip, accumulate
        self._batches = 0

    @property
    def updates(self) -> int:
        """Updates so far, those skipped included."""
        return int(self._stack.count)

    @property
    def skipped_updates(self) -> int:
        """Updates not made because the norm of the gradient was not finite."""
        return int(self._stack.skipped)

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
        norms = self._stack.step(torch.zeros(1, device=loss.device))
        self._stack.gradients.zero_()
        return float(norms)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after an update; gradients of a half-accumulated one are not in it.

        Raises:
            RequestError: between the batches of one update.
        """
        if self._batches:
            raise RequestError(
                f"Updater: {self._batches} of {self.accumulate} batches accumulated; save after an update"
            )
        return {str(number): tensor.clone() for number, tensor in enumerate(self._stack.state()) if number > 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; the parameters themselves are loaded by their module."""
        for number, tensor in enumerate(self._stack.state()):
            if number > 1:
                tensor.copy_(state[str(number)])
        self._batches = 0
