"""The training batches of one seed: their order, their crops, their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch, Budget
from superb_probe.errors import RequestError
from superb_probe.probes.batches import class_weights, collate, s3prl_batches, training_batches
from superb_probe.probes.states import States
from superb_probe.upstreams.base import UpstreamInfo


@dataclass(frozen=True, slots=True)
class Composed:
    """How s3prl puts the training batches of a task together.

    Attributes:
        kind: as `S3prlBatches.train` says.
        num_samples: of each training utterance.
    """

    kind: str
    num_samples: Sequence[int]


def label_length(target: Mapping[str, Tensor]) -> int:
    """Tokens of a target; 1 where it is a class.

    >>> label_length({"tokens": torch.zeros(7)})
    7
    """
    return max((len(value) if value.ndim else 1) for value in target.values())


class Draws:
    """The training batches of one seed, without end.

    Attributes:
        targets: of every training utterance, permuted across them under the control "shuffle".
        crops: draws crops.
    """

    def __init__(
        self,
        states: States,
        targets: Sequence[Mapping[str, Tensor]],
        seed: int,
        budget: Budget,
        info: UpstreamInfo,
        control: str | None,
        composed: Composed | None = None,
    ) -> None:
        """Every seed has its own order and its own crops; `composed` puts batches together as s3prl does."""
        self.crops = torch.Generator().manual_seed(seed + 2**32)
        if control == "shuffle":
            mixed = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed + 2**33)).tolist()
            targets = [targets[row] for row in mixed]
        elif control is not None:
            raise RequestError(f"unknown control {control!r}. Fix: shuffle")
        self.targets = targets
        self._states = states
        self._ahead: list[int] = []
        self._coming: list[tuple[list[int], int]] = []
        self._max_frames: int | None = None
        if budget.max_crop_s is not None and max(states.num_frames) > 1:
            self._max_frames = int(budget.max_crop_s * info.sample_rate_hz) // info.hop_samples
        weights = class_weights([int(target[budget.balance]) for target in targets]) if budget.balance else None
        similar = self._max_frames is None and len(set(states.num_frames)) > 1
        order = torch.Generator().manual_seed(seed)
        if composed is not None and composed.kind != "shuffled":
            labels = [label_length(target) for target in targets]
            self.rows = s3prl_batches(composed.kind, composed.num_samples, labels, budget.batch, order)
            return
        similar = similar and composed is None
        self.rows = training_batches(states.num_frames, budget.batch, order, similar=similar, weights=weights)

    def batch(self) -> tuple[Tensor, Batch]:
        """The next batch: states (L, B, T, D) and targets; the one after it is announced to the store."""
        rows = self._ahead or next(self.rows)
        self._ahead = next(self.rows)
        self._states.prefetch(self._ahead)
        return self._of(rows)

    def update(self, count: int) -> Iterator[tuple[Tensor, Batch, int]]:
        """The batches of one update, joined into one where they are equally large, and how many each holds; as `batch` else.

        Crops and order are those of the same batches one by one.
        """
        parts = self._coming or self._parts(count)
        self._coming = self._parts(count)
        for rows, _ in self._coming:
            self._states.prefetch(rows)
        for rows, held in parts:
            yield (*self._of(rows), held)

    def _parts(self, count: int) -> list[tuple[list[int], int]]:
        batches = [next(self.rows) for _ in range(count)]
        joined = [row for rows in batches for row in rows]
        even = len({len(rows) for rows in batches}) == 1
        # an utterance that is there twice has two crops, and the store gives one of each name
        return [(joined, count)] if even and len(set(joined)) == len(joined) else [(rows, 1) for rows in batches]

    def _of(self, rows: Sequence[int]) -> tuple[Tensor, Batch]:
        states, num_frames = self._states.batch(rows, self._max_frames, self.crops)
        ids = [self._states.ids[row] for row in rows]
        return states, collate(ids, num_frames, [self.targets[row] for row in rows])
