"""How utterances are put together: training order, padding, crops, targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch

POOL_BATCHES = 16
AHEAD = 50  # batches drawn at once where utterances are weighted


def training_batches(
    num_frames: Sequence[int],
    batch: int,
    generator: torch.Generator,
    *,
    similar: bool,
    weights: Tensor | None = None,
) -> Iterator[list[int]]:
    """Batches of row numbers without end: each epoch visits every utterance once, in a new order, unless there are weights.

    Args:
        num_frames: length of each utterance.
        batch: utterances in a batch; the last of an epoch may be smaller, none is skipped.
        generator: draws the order.
        similar: batch utterances of similar length, to waste little on padding: each run of 16 batches' worth of shuffled
            utterances is sorted by length before it is cut, and the batches are shuffled again.
        weights: (U,) draw every utterance with a chance in proportion, with replacement: there are no epochs then.

    >>> batches = training_batches([5, 3, 9, 1], 3, torch.Generator().manual_seed(0), similar=False)
    >>> sorted(next(batches) + next(batches))
    [0, 1, 2, 3]
    """
    count = len(num_frames)
    if count < 1 or batch < 1:
        raise ValueError(f"cannot batch {count} utterances by {batch}")
    while weights is not None:  # many at once: every call adds all weights up
        drawn = torch.multinomial(weights, AHEAD * batch, replacement=True, generator=generator)
        yield from drawn.view(AHEAD, batch).tolist()
    pool = batch * POOL_BATCHES if similar else count
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, count, pool):
            part = order[start : start + pool]
            if similar:
                part = sorted(part, key=lambda row: num_frames[row])
            batches += [part[i : i + batch] for i in range(0, len(part), batch)]
        if similar:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        yield from batches


LONG_SAMPLES = 300_000  # s3prl halves a window of PR or SF whose first utterance is longer


def s3prl_batches(
    kind: str, num_samples: Sequence[int], label_lengths: Sequence[int], batch: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Training batches without end, composed as s3prl composes those of a task (s3prl 0.4.18).

    Args:
        kind: "label_windows" (PR, SF; downstream/ctc): a window of `batch` neighbours in the order of label length, the longest
            first, begins at every utterance once an epoch, so that most are seen `batch` times; half of it where its first
            utterance is longer than 300,000 samples. "length_buckets" (ASR; downstream/asr): twice `batch` neighbours in the
            order of audio length, cut in two; what is left at the end stays whole, and a single utterance left over is not used.
        num_samples: length of each utterance's audio.
        label_lengths: length of each utterance's target; read for windows only.
        batch: utterances in a batch.
        generator: draws the order.

    >>> batches = s3prl_batches("length_buckets", [5, 9, 7, 8, 6, 3, 4], [], 2, torch.Generator().manual_seed(0))
    >>> sorted(next(batches) for _ in range(3))
    [[0, 6, 5], [1, 3], [2, 4]]
    """
    lengths = label_lengths if kind == "label_windows" else num_samples
    order = sorted(range(len(num_samples)), key=lambda row: -lengths[row])
    made: list[list[int]] = []
    if kind == "label_windows":
        for first in range(len(order)):
            start = max(0, min(len(order) - batch, first))
            window = order[start : start + batch]
            long = num_samples[window[0]] > LONG_SAMPLES and len(window) > 1
            made.append(window[: len(window) // 2] if long else window)
    elif kind == "length_buckets":
        whole = len(order) // (2 * batch) * 2 * batch
        made = [order[start : start + batch] for start in range(0, whole, batch)]
        made += [order[whole:]] if len(order) - whole > 1 or not made else []
    else:
        raise ValueError(f"unknown batches {kind!r}")
    while True:
        yield from (made[place] for place in torch.randperm(len(made), generator=generator).tolist())


def class_weights(classes: Sequence[int]) -> Tensor:
    """(U,) weights that draw every class equally often, and the utterances of one class equally often.

    >>> class_weights([0, 0, 1]).tolist()
    [0.5, 0.5, 1.0]
    """
    each = torch.tensor(classes)
    return 1.0 / torch.bincount(each)[each]


def evaluation_batches(num_frames: Sequence[int], max_frames: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, of at most `max_frames` padded frames (or one utterance).

    >>> evaluation_batches([4, 9, 5], 10)
    [[1], [2, 0]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(num_frames)), key=lambda r: (-num_frames[r], r)):
        if batches and num_frames[batches[-1][0]] * (len(batches[-1]) + 1) <= max_frames:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def assemble(states: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded float32 states of a batch and their lengths.

    Args:
        states: B tensors (L, T_b, D) of any float type.
        device: where the batch is needed.

    Returns:
        (L, B, T, D) states, zero past each length, and (B,) lengths.
    """
    longest = max(part.shape[1] for part in states)
    first = states[0]
    padded = torch.empty(first.shape[0], len(states), longest, first.shape[2], device=device)
    for row, part in enumerate(states):
        padded[:, row, : part.shape[1]].copy_(part, non_blocking=True)
        padded[:, row, part.shape[1] :].zero_()
    return padded, torch.tensor([part.shape[1] for part in states], device=device)


def crop(states: Tensor, max_frames: int, generator: torch.Generator) -> Tensor:
    """A random stretch of at most `max_frames` frames of one utterance's states (L, T, D); one draw, also when all is kept."""
    spare = states.shape[1] - max_frames
    start = int(torch.randint(max(spare, 0) + 1, (), generator=generator))
    return states if spare <= 0 else states[:, start : start + max_frames]


def collate(ids: Sequence[str], num_frames: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Batch:
    """The targets of some utterances as one `Batch`.

    Scalars are stacked to (B,); sequences (U_b, ...) are padded with -1 to the longest, beside their lengths "<name>_lengths" (B,).

    >>> batch = collate(["a", "b"], torch.tensor([3, 2]), [{"token": torch.tensor([4, 5])}, {"token": torch.tensor([6])}])
    >>> batch.targets["token"].tolist(), batch.targets["token_lengths"].tolist()
    ([[4, 5], [6, -1]], [2, 1])
    """
    collated: dict[str, Tensor] = {}
    for name in targets[0]:
        values = [target[name] for target in targets]
        if values[0].ndim == 0:
            collated[name] = torch.stack(values).to(num_frames.device)
            continue
        padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-1)
        collated[name] = padded.to(num_frames.device)
        collated[f"{name}_lengths"] = torch.tensor([value.shape[0] for value in values], device=num_frames.device)
    return Batch(tuple(ids), num_frames, collated)
