"""The states of one split as a fit reads them: a batch at a time, from wherever they are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from superb_probe.probes.batches import assemble, crop
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_codec import unpack
from superb_probe.probes.store_kernels import can_pad, pad


class States:
    """The states of one split as a fit reads them.

    View "mean" is one tensor (L, N, D) on the device in the store's dtype, N the means of all utterances: one each, or K where
    random crops are kept. "frames" are read from the store a batch at a time. A store that keeps nothing encodes when asked.

    Attributes:
        ids: utterance ids.
        num_frames: frames of each; 1 in view "mean".
    """

    def __init__(self, store: FeatureStore, ids: Sequence[str], layer: int | None, device: torch.device) -> None:
        """`layer` is the one layer to read; None for all."""
        self.ids = tuple(ids)
        self._store, self._layer, self._device = store, layer, device
        self.num_frames = [store.num_frames(name) for name in self.ids]
        self._means: Tensor | None = None
        self._counts = torch.zeros(0, dtype=torch.long)
        if store.view == "mean" and store.resident:
            self._means, self._counts = self._gather(self.ids, None)
        self._starts = self._counts.cumsum(0) - self._counts

    @property
    def means(self) -> Tensor | None:
        """(L, N, D) all means and their crops, where they are on the device; else None."""
        return self._means

    def batch(
        self, rows: Sequence[int], max_frames: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Padded float32 states (L, B, T, D) of some utterances and their frames (B,).

        Args:
            rows: positions in `ids`.
            max_frames: longest random crop; None for whole utterances.
            generator: draws the crops: the stretch of an utterance, or which of its stored means.
        """
        if self._store.view == "mean":
            return self._mean_batch(rows, generator), torch.ones(len(rows), dtype=torch.long, device=self._device)
        parts = [self._layers(part) for part in self._store.fetch_packed([self.ids[row] for row in rows], generator)]
        if max_frames is not None:
            if generator is None:
                raise ValueError("random crops need a generator")
            parts = [crop(part, max_frames, generator) for part in parts]
        states, num_frames = self._assemble(parts)
        if self._store.layer_norm:  # zero frames stay zero
            states = nn.functional.layer_norm(states, states.shape[-1:])
        return states, num_frames

    def prefetch(self, rows: Sequence[int]) -> None:
        """Say which utterances a later batch asks for, so that a store that keeps nothing can decode them meanwhile."""
        self._store.prefetch([self.ids[row] for row in rows])

    def _mean_batch(self, rows: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Means (L, B, 1, D), one crop of each utterance where several are kept."""
        if self._means is not None:
            index = self.draw_means(torch.tensor(rows), torch.tensor([len(rows)]), generator)
            return self._means.index_select(1, index.to(self._means.device))[:, :, None].float()
        means, counts = self._gather([self.ids[row] for row in rows], generator)
        index = _draw(counts.cumsum(0) - counts, counts, torch.tensor([len(rows)]), generator)
        return means.index_select(1, index.to(means.device))[:, :, None].float()

    def draw_means(self, rows: Tensor, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Where in `means` (its second axis) some batches' utterances stand, one crop of each where several are kept.

        Args:
            rows: positions in `ids`, batch after batch.
            sizes: of the batches: what is drawn for them is what is drawn for one after another.
            generator: draws the crops.
        """
        if self._means is not None and self._means.shape[1] == len(self.ids):  # one mean each: nothing to draw
            return self._starts[rows]
        return _draw(self._starts[rows], self._counts[rows], sizes, generator)

    def _gather(self, ids: Sequence[str], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The means (L, N, D) of some utterances on the device, and how many each has (B,)."""
        parts = [part[None] if part.ndim == 2 else part for part in self._store.fetch(ids, generator)]
        if self._layer is not None:
            parts = [part[:, self._layer : self._layer + 1] for part in parts]
        counts = torch.tensor([len(part) for part in parts])
        return torch.cat(parts).transpose(0, 1).contiguous().to(self._device), counts

    def _layers(self, states: Tensor) -> Tensor:
        return states if self._layer is None else states[self._layer : self._layer + 1]

    def _assemble(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Padded float32 states on the device; what lies on the host travels packed, in one copy from pinned memory."""
        dtype = self._store.dtype
        if dtype != "int8" and can_pad(parts):
            return pad(parts)
        if self._device.type != "cuda" or parts[0].device.type == "cuda":
            return assemble([unpack(part, dtype) for part in parts], self._device)
        lengths = [part.shape[1] for part in parts]
        shape = (parts[0].shape[0], len(parts), max(lengths), parts[0].shape[2])
        padded = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)
        for row, part in enumerate(parts):
            padded[:, row, : part.shape[1]] = part
            padded[:, row, part.shape[1] :] = 0
        states = unpack(padded.to(self._device, non_blocking=True), dtype).float()
        return states, torch.tensor(lengths).pin_memory().to(self._device, non_blocking=True)


def _draw(starts: Tensor, counts: Tensor, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of the `counts` numbers from each of `starts`; nothing is drawn for batches in which there is no choice."""
    batch_of = torch.arange(len(sizes)).repeat_interleave(sizes)
    choice = torch.zeros(len(sizes), dtype=torch.bool).index_put((batch_of,), counts > 1, accumulate=True)[batch_of]
    if not choice.any():
        return starts
    if generator is None:
        raise ValueError("stored crops need a generator that draws among them")
    drawn = torch.zeros(len(counts))
    drawn[choice] = torch.rand(int(choice.sum()), generator=generator)
    return starts + (drawn * counts).long()
