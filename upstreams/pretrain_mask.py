"""Which frames of a batch are masked: spans at random, as fairseq's `compute_mask_indices` draws them (static, overlaps allowed)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def span_mask(
    rows: int,
    frames: int,
    generator: np.random.Generator,
    *,
    probability: float = 0.8,
    span_frames: int = 10,
    least_spans: int = 2,
) -> NDArray[np.bool_]:
    """(B, T) booleans, True where a frame is masked; every row has the same number of them.

    The number of spans is probability x T / span, rounded up or down at random, once for the batch; their starts are drawn without
    replacement from those that leave room. Rows in which fewer spans overlap give masked frames back, at random, until all have as
    many as the one with the fewest.

    Args:
        rows: B.
        frames: T; at least two.
        generator: what draws.
        probability: masked frames over T, if spans did not overlap.
        span_frames: length of a span; half of T at most.
        least_spans: of a row, as far as they have room.

    >>> mask = span_mask(4, 100, np.random.default_rng(0))
    >>> mask.shape, len(set(mask.sum(1)))
    ((4, 100), 1)
    """
    span = max(1, min(span_frames, frames // 2))
    places = frames - span + 1
    spans = min(places, max(least_spans, int(probability * frames / span + generator.random())))
    starts = generator.random((rows, places)).argpartition(spans - 1, axis=1)[:, :spans]
    mask = np.zeros((rows, frames), dtype=np.bool_)
    index = (starts[:, :, None] + np.arange(span)).reshape(rows, -1)
    np.put_along_axis(mask, index, True, axis=1)
    # The `count` masked frames with the largest random keys stay.
    count = int(mask.sum(1).min())
    keys = np.where(mask, 1.0 + generator.random((rows, frames)), 0.0)
    kept = keys.argpartition(frames - count, axis=1)[:, frames - count :]
    mask = np.zeros((rows, frames), dtype=np.bool_)
    np.put_along_axis(mask, kept, True, axis=1)
    return mask
