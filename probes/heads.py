"""The probes' heads: what is trained on the weighted sum of a frozen encoder's layers.

Every head takes frames (B, T, D) that are zero past `num_frames` (B,), and returns what its own `loss` and `predict` take.
They reproduce s3prl's modules (arXiv:2105.01051) in output, loss and gradient; widths are arguments, the defaults are SUPERB's.

| head | tasks | targets it reads from the batch |
| --- | --- | --- |
| `UtteranceLinear` | KS, SID, ER, IC | one (B,) tensor of class ids a slot, under the slot's name |
| `FrameCtc` | PR | "tokens" (B, longest) and "tokens_lengths" (B,) |
| `BlstmCtc` | ASR, SF | "tokens" (B, longest) and "tokens_lengths" (B,) |
| `XVector` | ASV | "speaker" (B,) |
| `LstmPit` | SD | "speakers" (B, T, 2), ones where a speaker is active |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Head
from superb_probe.errors import RequestError
from superb_probe.probes.ctc import BlstmCtc, FrameCtc, FrameLogits
from superb_probe.probes.specaugment import SpecAugment
from superb_probe.probes.xvector import XVector
from superb_probe.upstreams.base import frame_mask

__all__ = ["BlstmCtc", "FrameCtc", "FrameLogits", "LstmPit", "SpecAugment", "UtteranceLinear", "XVector", "masked_mean"]


def masked_mean(frames: Tensor, num_frames: Tensor) -> Tensor:
    """(B, D) mean of each row's valid frames.

    Args:
        frames: (B, T, D).
        num_frames: (B,), at least 1.

    >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2])).tolist()
    [[2.0]]
    """
    valid = frame_mask(num_frames, frames.shape[1])
    summed = frames.masked_fill(~valid[..., None], 0.0).sum(1)
    return summed / num_frames[:, None].to(frames.dtype)


class UtteranceLinear(Head):
    """Projector, mean over time, and one linear classifier a slot: linear from the frames to the logits.

    Attributes:
        classes: by slot, the class names in id order.
    """

    def __init__(self, dim: int, classes: Mapping[str, Sequence[str]], *, width: int = 256) -> None:
        """A head for states of width `dim`; `width` is the projector's."""
        super().__init__()
        empty = [slot for slot, names in classes.items() if not names]
        if not classes or empty:
            raise RequestError(
                f"UtteranceLinear: no classes for {empty or 'any slot'}. Fix: give each slot its class names"
            )
        self.classes = {slot: tuple(names) for slot, names in classes.items()}
        self.sizes = [len(names) for names in self.classes.values()]
        self.projector = nn.Linear(dim, width)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """(B, C) logits of all slots, one slot after the other. A mean over time may be given as frames (B, 1, D).

        >>> UtteranceLinear(4, {"keyword": ("yes", "no")})(torch.zeros(3, 5, 4), torch.tensor([5, 4, 1])).shape
        torch.Size([3, 2])
        """
        # The mean is taken before the projector, not after: equal, because the projector is linear, and T times cheaper.
        return self.linear(self.projector(masked_mean(frames, num_frames)))  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum over slots of the cross-entropy, each a mean over the batch."""
        losses = [
            nn.functional.cross_entropy(logits, batch.targets[slot])
            for slot, logits in zip(self.classes, torch.split(outputs, self.sizes, dim=1), strict=True)
        ]
        return torch.stack(losses).sum()

    def predict(self, outputs: Tensor) -> list[dict[str, str]]:
        """By slot, the name of the best class, for each utterance."""
        best = [logits.argmax(1).tolist() for logits in torch.split(outputs, self.sizes, dim=1)]
        slots = list(self.classes.items())
        return [
            {slot: names[row[number]] for (slot, names), row in zip(slots, best, strict=True)}
            for number in range(outputs.shape[0])
        ]


class LstmPit(Head):
    """One unidirectional LSTM and a linear layer: which of the speakers talks in each frame, in any order of speakers.

    The loss is permutation-invariant (Fujita et al., arXiv:1909.05952) with s3prl's weights: mean over speakers, sum over
    valid frames, the least of all permutations in each utterance, divided by the frames of the batch.
    """

    def __init__(self, dim: int, *, width: int = 512, num_speakers: int = 2) -> None:
        """A head for states of width `dim`; `width` is the LSTM's."""
        super().__init__()
        self.rnn = nn.LSTM(dim, width, batch_first=True)
        self.linear = nn.Linear(width, num_speakers)
        self.orders = list(permutations(range(num_speakers)))

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits, C speakers; without padding in the recurrence's past, so it needs no packing."""
        return FrameLogits(self.linear(self.rnn(frames)[0]), num_frames)

    def loss(self, outputs: FrameLogits, batch: Batch) -> Tensor:
        """Binary cross-entropy of the best permutation of each utterance."""
        labels = batch.targets["speakers"]
        if labels.shape != outputs.logits.shape:
            raise RequestError(
                f"LstmPit: labels (B, T, speakers) {tuple(labels.shape)} beside logits {tuple(outputs.logits.shape)}"
            )
        valid = frame_mask(outputs.num_frames, outputs.logits.shape[1])
        labels = labels.masked_fill(~valid[..., None], 0.0).to(outputs.logits.dtype)  # the collation pads with -1
        sums = []
        for order in self.orders:
            entropy = nn.functional.binary_cross_entropy_with_logits(
                outputs.logits, labels[..., list(order)], reduction="none"
            )
            sums.append((entropy.mean(-1) * valid).sum(1))
        return torch.stack(sums).min(0).values.sum() / outputs.num_frames.sum()

    def predict(self, outputs: FrameLogits) -> list[np.ndarray[Any, Any]]:
        """(T, C) logits of each utterance, its own frames only; a speaker is active where they are above zero."""
        logits = outputs.logits.detach().float().cpu().numpy()
        return [row[:length] for row, length in zip(logits, outputs.num_frames.tolist(), strict=True)]
