"""Recurrent CTC heads of several trials as one stack on a GPU: every product and every step of the recurrence is one for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch, Head
from superb_probe.probes import kernels
from superb_probe.probes.ctc import BlstmCtc, ctc_losses
from superb_probe.probes.recurrence import UNIT_BLOCK, blstm
from superb_probe.probes.runner import Runner, random_state, set_random_state
from superb_probe.probes.update import StackedUpdater

ROWS_TOGETHER = 40_000  # frames of all trials at once: 6 GB of gates, cells and inputs at SUPERB's width
LSTM_PLACES = 8  # parameters of a bidirectional layer


def can_stack_recurrent(heads: Sequence[Head], device: torch.device) -> bool:
    """Whether heads are recurrent ones that this machine trains as one stack."""
    if not all(isinstance(head, BlstmCtc) for head in heads) or not kernels.can_multiply(device):
        return False
    return all(rnn.hidden_size % UNIT_BLOCK == 0 for head in heads for rnn in head.rnns)  # type: ignore[union-attr]


def consecutive(numbers: Sequence[int], most: int) -> Iterator[slice]:
    """Ascending numbers as slices of at most so many.

    >>> [(each.start, each.stop) for each in consecutive([0, 1, 2, 4], 2)]
    [(0, 2), (2, 3), (4, 5)]
    """
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1 or place - start == most:
            yield slice(numbers[start], numbers[place - 1] + 1)
            start = place


class BlstmStack:
    """Projectors, LSTM layers and linear layers of N `BlstmCtc` heads, whose parameters stand in an updater's rows."""

    def __init__(self, updater: StackedUpdater, head: BlstmCtc, first: int, *, plain: bool = False) -> None:
        """`first` is the place of the projector's weight in the updater's rows; `plain` does without Triton."""
        self._updater, self._plain = updater, plain
        self._places = range(first, first + len(list(head.parameters())))

    def learn(self, runners: Sequence[Runner], trials: slice, mixed: Tensor, batch: Batch, share: float) -> Tensor:
        """Add one batch's gradients to those of the parameters, and give the losses.

        Each trial masks and drops with its own random numbers, as it would alone.

        Args:
            runners: the trials of `trials`.
            trials: which rows of the updater.
            mixed: (n, B, T, D) their mixed states, which take their gradient too.
            batch: frames and tokens.
            share: of the update, that the batch's loss is.

        Returns:
            (n,) losses times `share`.
        """
        weights = [self._leaf(place, trials) for place in self._places]
        losses = share * ctc_losses(
            self._logits(runners, weights, mixed, batch.num_frames),
            batch.num_frames,
            batch.targets["tokens"],
            batch.targets["tokens_lengths"],
        )
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _leaf(self, place: int, trials: slice) -> Tensor:
        """(n, ...) one parameter of some trials, its gradient added where the updater looks for it."""
        leaf = self._updater.stacked(place)[trials].detach().requires_grad_()
        total = self._updater.stacked(place, self._updater.gradients)[trials]

        def add(done: Tensor) -> None:
            assert done.grad is not None
            total.add_(done.grad)
            done.grad = None

        leaf.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
        return leaf

    def _logits(
        self, runners: Sequence[Runner], weights: Sequence[Tensor], mixed: Tensor, num_frames: Tensor
    ) -> Tensor:
        """(n, B, T, C): `BlstmCtc.forward` of every trial."""
        frames = torch.stack(
            [_augmented(runner, each, num_frames) for runner, each in zip(runners, mixed, strict=True)]
        )
        hidden = _linear(frames, *weights[:2])
        for start in range(2, len(weights) - 2, LSTM_PLACES):
            layer = list(weights[start : start + LSTM_PLACES])
            hidden = _dropped(runners, blstm(hidden, num_frames, layer, plain=self._plain))
        return _linear(hidden, *weights[-2:])


def _augmented(runner: Runner, frames: Tensor, num_frames: Tensor) -> Tensor:
    head = runner.probe.head
    assert isinstance(head, BlstmCtc)
    return frames if head.augment is None else head.augment(frames, num_frames)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, B, T, O) of inputs (n, B, T, I), a linear layer a trial."""
    rows = torch.baddbmm(bias[:, None], inputs.flatten(1, 2), weight.transpose(1, 2))
    return rows.view(*inputs.shape[:3], -1)


def _dropped(runners: Sequence[Runner], hidden: Tensor) -> Tensor:
    """Dropout of (n, B, T, W), each trial by its own random numbers."""
    found = []
    for runner, rows in zip(runners, hidden, strict=True):
        head = runner.probe.head
        assert isinstance(head, BlstmCtc)
        set_random_state(runner.random, rows.device)
        found.append(head.dropout(rows))
        runner.random = random_state(rows.device)
    return torch.stack(found)
