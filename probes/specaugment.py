"""SpecAugment (Park et al., arXiv:1904.08779) of layer states, as SUPERB trains its ASR and SF heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIM_MASK_WIDTH = 50  # s3prl's, of states of 768
CUBIC = -0.75  # the parameter of the cubic kernel that image libraries and `F.interpolate` use


class SpecAugment(nn.Module):
    """Time warping, dimension masks and time masks drawn from a generator of its own.

    Widths are drawn from 0 up to but without the bound; masks are filled with zero. Masks may lie in the padding of a row, and
    their positions are bounded by the widest mask of the batch, as in s3prl.

    Attributes:
        generator: the CPU generator every draw comes from; save and restore its state to resume.
    """

    def __init__(
        self,
        generator: torch.Generator,
        *,
        warp_frames: int = 5,
        dim_masks: int = 4,
        dim_mask_width: int = DIM_MASK_WIDTH,
        time_masks: int = 2,
        time_mask_frames: int = 40,
    ) -> None:
        """`warp_frames` is the most a frame moves; 0 switches warping off, as 0 masks do masking."""
        super().__init__()
        self.generator = generator
        self.warp_frames = warp_frames
        self.dim_masks, self.dim_mask_width = dim_masks, dim_mask_width
        self.time_masks, self.time_mask_frames = time_masks, time_mask_frames

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """(B, T, D) frames, warped and masked.

        >>> augment = SpecAugment(torch.Generator().manual_seed(1))
        >>> bool((augment(torch.ones(2, 60, 80), torch.tensor([60, 50])) == 0).any())
        True
        """
        batch, max_frames, dim = frames.shape
        if self.warp_frames:
            lengths = num_frames.cpu()
            centre, warped = self._draw_warp(lengths)
            frames = time_warp(frames, lengths.to(frames.device), centre.to(frames.device), warped.to(frames.device))
        in_dims = self._draw_masks(batch, dim, self.dim_masks, self.dim_mask_width).to(frames.device)
        in_time = self._draw_masks(batch, max_frames, self.time_masks, self.time_mask_frames).to(frames.device)
        return frames.masked_fill(in_dims[:, None, :] | in_time[:, :, None], 0.0)

    def _below(self, high: Tensor) -> Tensor:
        """Integers drawn uniformly from 0 up to but without `high`, one for each of its elements."""
        draw = torch.rand(high.shape, generator=self.generator, dtype=torch.float64)
        return (draw * high).long().clamp(max=high - 1)

    def _draw_warp(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) a frame of each row and where it goes; the same frame in rows too short to warp."""
        window = self.warp_frames
        centre = window + self._below((lengths - 2 * window).clamp(min=1))
        warped = centre - window + 1 + self._below(torch.full_like(centre, 2 * window))
        long_enough = lengths > 2 * window
        return torch.where(long_enough, centre, 1), torch.where(long_enough, warped, 1)

    def _draw_masks(self, batch: int, size: int, count: int, width_bound: int) -> Tensor:
        """(B, size) booleans, True inside one of `count` masks."""
        width = torch.randint(width_bound, (batch, count), generator=self.generator)
        widest = int(width.max()) if width.numel() else 0
        start = torch.randint(max(1, size - widest), (batch, count), generator=self.generator)
        position = torch.arange(size)
        return ((position >= start[..., None]) & (position < (start + width)[..., None])).any(1)


def time_warp(frames: Tensor, num_frames: Tensor, centre: Tensor, warped: Tensor) -> Tensor:
    """Frames before `centre` stretched to `warped` frames, the rest to what is left, each part by bicubic interpolation.

    Equal to two calls of `F.interpolate(mode="bicubic", align_corners=False)` a row, for the whole batch at once.

    Args:
        frames: (B, T, D).
        num_frames: (B,) valid frames; what lies past them is kept.
        centre: (B,) first frame of the second part, before.
        warped: (B,) first frame of the second part, after.
    """
    position = torch.arange(frames.shape[1], device=frames.device)[None]
    length, centre, warped = (values[:, None] for values in (num_frames, centre, warped))
    second = position >= warped
    low = torch.where(second, centre, 0)
    high = torch.where(second, length, centre) - 1  # last source frame of the part
    offset = torch.where(second, warped, 0)
    scale = (high + 1 - low) / torch.where(second, length - warped, warped).clamp(min=1)
    source = (position - offset + 0.5) * scale - 0.5
    floor = source.floor()
    output = torch.zeros_like(frames)
    for tap, weight in zip(range(-1, 3), cubic_weights(source - floor), strict=True):
        index = torch.minimum(torch.maximum(low + floor.long() + tap, low), high)
        index = torch.where(position < length, index, position)
        output = output + weight[..., None].to(frames.dtype) * frames.gather(1, index[..., None].expand_as(frames))
    return output


def cubic_weights(fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of the frames at -1, 0, 1 and 2 around a point `fraction` of a frame past 0 (Keys 1981, a = -0.75).

    >>> [round(float(weight), 4) for weight in cubic_weights(torch.tensor(0.5))]
    [-0.0938, 0.5938, 0.5938, -0.0938]
    """

    def near(x: Tensor) -> Tensor:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    return far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)
