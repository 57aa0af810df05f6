"""N linear heads as one: stacked parameters, batched matrix products, gradients written out.

`UtteranceLinear` and `FrameCtc` are both a projector and a linear layer. For N trials that is two batched products forward and
three backward, whatever N is; a trial's numbers meet no other trial's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from superb_probe.downstreams.base import Head
from superb_probe.probes.ctc import FrameCtc, ctc_losses
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.update import StackedUpdater

STACKED = (UtteranceLinear, FrameCtc)  # exactly these: a subclass may do something else
CHUNK_NUMBERS = 2**18  # parameters worked on at once on a CPU: 1 MiB stays in its cache


def can_stack(heads: Sequence[Head]) -> bool:
    """Whether heads are linear ones that train as one stack."""
    return all(type(head) is type(heads[0]) and type(head) in STACKED for head in heads)


class LinearStack:
    """Projector and linear layer of N trials, on mixed states.

    The parameters stand in the updater's rows in the order of the head's: projector weight and bias, linear weight and bias.

    Attributes:
        updater: holds the parameters and takes the gradients.
        chunks: slices of trials that are worked on at once.
    """

    def __init__(self, updater: StackedUpdater, first: int) -> None:
        """`first` is the place of the projector's weight in the updater's rows."""
        self.updater = updater
        places = range(first, first + 4)
        self._values = [updater.stacked(place) for place in places]
        self._gradients = [updater.stacked(place, updater.gradients) for place in places]
        count, size = updater.values.shape
        step = count if updater.values.is_cuda else max(1, CHUNK_NUMBERS // size)
        self.chunks = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def forward(self, mixed: Tensor, trials: slice) -> tuple[Tensor, Tensor]:
        """Projections (n, R, W) and logits (n, R, C) of some trials' mixed states (n, R, D)."""
        projector, projector_bias, linear, linear_bias = (each[trials] for each in self._values)
        hidden = torch.baddbmm(projector_bias[:, None], mixed, projector.transpose(1, 2))
        return hidden, torch.baddbmm(linear_bias[:, None], hidden, linear.transpose(1, 2))

    def backward(self, mixed: Tensor, hidden: Tensor, logits_gradient: Tensor, trials: slice, *, add: bool) -> Tensor:
        """Write the gradients of some trials' parameters, and return that of the projections (n, R, W).

        Args:
            mixed: what `forward` took.
            hidden: what it gave.
            logits_gradient: (n, R, C).
            trials: which.
            add: to the gradients that are there.
        """
        beta = 1.0 if add else 0.0
        hidden_gradient = torch.bmm(logits_gradient, self._values[2][trials])
        for place, outer, inner in ((0, hidden_gradient, mixed), (2, logits_gradient, hidden)):
            weight, bias = self._gradients[place][trials], self._gradients[place + 1][trials]
            weight.baddbmm_(outer.transpose(1, 2), inner, beta=beta)
            if add:
                bias += outer.sum(1)
            else:
                torch.sum(outer, 1, out=bias)
        return hidden_gradient

    def through(self, hidden_gradient: Tensor, trials: slice) -> Tensor:
        """The gradient (n, R, D) of the mixed states; needed only where a mixture is learnt."""
        return torch.bmm(hidden_gradient, self._values[0][trials])


def class_losses(logits: Tensor, targets: Tensor, sizes: Sequence[int], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies summed over slots, and their gradients.

    Args:
        logits: (N, B, C) of all slots, one slot after the other.
        targets: (N, B, slots) class ids.
        sizes: classes of each slot.
        weights: (B,) of the rows: one over the rows that count, zero for rows that do not.

    Returns:
        (N,) losses and (N, B, C) gradients of the logits.
    """
    losses = logits.new_zeros(logits.shape[0])
    gradients = []
    for slot, scores in enumerate(torch.split(logits, list(sizes), dim=2)):
        right = targets[:, :, slot, None]
        logs = scores.log_softmax(2)
        losses = losses - (logs.gather(2, right)[..., 0] * weights).sum(1)
        gradients.append(logs.exp().scatter_add(2, right, torch.full_like(logs[..., :1], -1.0).expand_as(right)))
    return losses, torch.cat(gradients, dim=2) * weights[:, None]


def token_losses(logits: Tensor, num_frames: Tensor, targets: Tensor, target_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """CTC losses of N trials on one batch, and their gradients.

    Args:
        logits: (N, B, T, C).
        num_frames: (B,) valid frames.
        targets: (B, longest) token ids.
        target_lengths: (B,).

    Returns:
        (N,) losses and (N, B, T, C) gradients of the logits, zero past `num_frames`.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = ctc_losses(leaf, num_frames, targets, target_lengths)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient
