"""The x-vector head of speaker verification and its additive-margin softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Head
from superb_probe.errors import RequestError
from superb_probe.upstreams.base import frame_mask

TDNN_CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # (frames seen, frames between them) of each layer
LOST_FRAMES = sum((size - 1) * dilation for size, dilation in TDNN_CONTEXTS)  # 14


class XVectorOutputs(NamedTuple):
    """What the x-vector head gives for a batch.

    Attributes:
        vector: (B, C') what the training objective sees: the second linear layer, after ReLU.
        embedding: (B, C') what trials are scored with: the first linear layer, after ReLU, of length one.
    """

    vector: Tensor
    embedding: Tensor


class TimeDelay(nn.Module):
    """A linear layer over a few frames spaced `dilation` apart, and a ReLU; no padding, so it shortens the sequence."""

    def __init__(self, dim: int, width: int, context: int, dilation: int) -> None:
        """`context` frames are seen at once."""
        super().__init__()
        self.context, self.dilation = context, dilation
        self.kernel = nn.Linear(dim * context, width)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, D) -> (B, T - (context - 1) * dilation, width)."""
        length = frames.shape[1] - (self.context - 1) * self.dilation
        windows = [frames[:, k * self.dilation : k * self.dilation + length] for k in range(self.context)]
        return torch.relu(self.kernel(torch.cat(windows, dim=-1)))


def statistics_pooling(frames: Tensor, num_frames: Tensor) -> Tensor:
    """(B, 2 D) mean and unbiased standard deviation of each row's valid frames.

    A dimension that is constant over time has deviation 0 and no gradient, as with `torch.std`.

    Args:
        frames: (B, T, D).
        num_frames: (B,), at least 2.

    >>> statistics_pooling(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2])).tolist()
    [[2.0, 1.4142135381698608]]
    """
    valid = frame_mask(num_frames, frames.shape[1])[..., None]
    count = num_frames[:, None].to(frames.dtype)
    mean = frames.masked_fill(~valid, 0.0).sum(1) / count
    centred = (frames - mean[:, None]).masked_fill(~valid, 0.0)
    variance = centred.square().sum(1) / (count - 1)
    constant = variance == 0
    deviation = variance.masked_fill(constant, 1.0).sqrt().masked_fill(constant, 0.0)
    return torch.cat([mean, deviation], dim=1)


def additive_margin_loss(vector: Tensor, objective: Tensor, speakers: Tensor, *, margin: float, scale: float) -> Tensor:
    """Additive-margin softmax (Wang et al., arXiv:1801.05599), a mean over the batch.

    Args:
        vector: (B, C').
        objective: (C', C) one direction a speaker.
        speakers: (B,) class ids.
        margin: taken off the cosine of the right speaker.
        scale: of the cosines.
    """
    cosines = nn.functional.normalize(vector, dim=1) @ nn.functional.normalize(objective, dim=0)
    margins = margin * nn.functional.one_hot(speakers, cosines.shape[1]).to(cosines.dtype)
    return nn.functional.cross_entropy(scale * (cosines - margins), speakers)


class XVector(Head):
    """Connector, five time-delay layers, statistics pooling and two linear layers, trained with additive-margin softmax.

    Snyder et al. 2018 as s3prl builds it (no batch norm, no dropout); Wang et al., arXiv:1801.05599 for the objective.

    Attributes:
        pool_extra_frame: pool one frame too many in rows shorter than the batch's longest, as s3prl does: right for comparing
            with it, but a result then depends on its batch.
        objective: (width, C) one direction a training speaker.
    """

    min_frames = LOST_FRAMES + 2
    joins_batches = True

    def __init__(
        self,
        dim: int,
        num_speakers: int,
        *,
        width: int = 512,
        pool_width: int = 1500,
        margin: float = 0.4,
        scale: float = 30.0,
        pool_extra_frame: bool = False,
    ) -> None:
        """A head for states of width `dim`; `pool_width` is that of the last time-delay layer."""
        super().__init__()
        if num_speakers < 2:
            raise RequestError(
                f"XVector: {num_speakers} training speakers. Fix: it takes at least two to tell them apart"
            )
        self.pool_extra_frame, self.margin, self.scale = pool_extra_frame, margin, scale
        self.connector = nn.Linear(dim, width)
        widths = [width] * len(TDNN_CONTEXTS) + [pool_width]
        self.tdnn = nn.Sequential(
            *(TimeDelay(widths[k], widths[k + 1], *context) for k, context in enumerate(TDNN_CONTEXTS))
        )
        self.linear1 = nn.Linear(2 * pool_width, width)
        self.linear2 = nn.Linear(width, width)
        self.objective = nn.Parameter(torch.empty(width, num_speakers))
        nn.init.xavier_normal_(self.objective)

    def forward(self, frames: Tensor, num_frames: Tensor, longest: Tensor | None = None) -> XVectorOutputs:
        """Vector and embedding of each utterance, which must have `min_frames` frames; `longest` as `Head.joins_batches` says.

        >>> outputs = XVector(4, 3, width=8, pool_width=6)(torch.zeros(2, 20, 4), torch.tensor([20, 16]))
        >>> outputs.embedding.shape
        torch.Size([2, 8])
        """
        if frames.shape[1] < self.min_frames:
            raise RequestError(f"XVector: a batch of {frames.shape[1]} frames; the head needs {self.min_frames}")
        hidden = self.tdnn(self.connector(frames))
        pooled_frames = num_frames - LOST_FRAMES
        if self.pool_extra_frame:
            most = hidden.shape[1] if longest is None else longest - LOST_FRAMES
            pooled_frames = torch.clamp(pooled_frames + 1, max=most)
        first = torch.relu(self.linear1(statistics_pooling(hidden, pooled_frames)))
        return XVectorOutputs(torch.relu(self.linear2(first)), nn.functional.normalize(first, dim=1))

    def loss(self, outputs: XVectorOutputs, batch: Batch) -> Tensor:
        """Cross-entropy over scaled cosines, the margin taken off the right speaker's first."""
        return additive_margin_loss(
            outputs.vector, self.objective, batch.targets["speaker"], margin=self.margin, scale=self.scale
        )

    def predict(self, outputs: XVectorOutputs) -> list[np.ndarray[Any, Any]]:
        """The embedding of each utterance, of length one; a trial's score is the dot product of two."""
        return list(outputs.embedding.detach().float().cpu().numpy())
