"""States that are kept nowhere: each batch is encoded when it is asked for, once for all trials that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, effective_samples
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.probes.store import FeatureStore, Progress, duration_batches
from superb_probe.probes.store_extract import Extractor, available_cores
from superb_probe.upstreams.base import Upstream


class StreamStore(FeatureStore):
    """A feature store that keeps nothing: `fetch` decodes and encodes.

    What it gives is rounded to the store's dtype, so that a trial reads the same numbers from here as from a store. Random crops
    (`crop_s`) are drawn anew each time a generator is given, as SUPERB's training loops do; without one, whole utterances are read.
    """

    resident = False

    def build(
        self,
        upstream: Upstream,
        manifest: Manifest,
        *,
        max_batch_s: float = 120.0,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Remember what is to be encoded; nothing is, yet. Arguments as for `FeatureStore.build`."""
        rate = upstream.info.sample_rate_hz or SAMPLE_RATE_HZ
        self._extractor = Extractor(upstream, manifest.root, self.keeping)
        self._max_batch_s = max_batch_s
        self._utterances: dict[str, Utterance] = {utterance.id: utterance for utterance in manifest}
        self._frames = {
            u.id: 1 if self.view == "mean" else upstream.num_frames(effective_samples(u, manifest, self.waveform, rate))
            for u in manifest
        }
        self._coming: dict[str, Future[list[Tensor]]] = {}
        self._readers = ThreadPoolExecutor(available_cores(), thread_name_prefix="decode")

    def fetch_packed(self, ids: Sequence[str], generator: torch.Generator | None = None) -> list[Tensor]:
        """Encode some utterances; the states of each, packed."""
        utterances = [self._utterances[name] for name in ids]
        if self._extractor.states_for is not None:
            return [kept for _, (kept,) in self._extractor.run([[utterance] for utterance in utterances])]
        self.prefetch(ids)
        waves = {}
        for utterance in utterances:  # in the order asked for: the generator draws in it
            (wave,) = self._coming[utterance.id].result()
            draw = None if generator is None else _draw(generator)
            waves[utterance.id] = self.keeping.cut(wave, utterance, self._extractor.upstream.info.sample_rate_hz, draw)
        for name in dict.fromkeys(ids):
            del self._coming[name]
        found: dict[str, Tensor] = {}
        for batch in duration_batches({u.id: u for u in utterances}.values(), self._max_batch_s):
            encoded = self._extractor.encode(batch, [waves[utterance.id] for utterance in batch])
            found.update(zip([utterance.id for utterance in batch], encoded, strict=True))
        self.encoder_passes = self._extractor.encoded
        return [found[name] for name in ids]

    def prefetch(self, ids: Sequence[str]) -> None:
        """Begin to decode what will be asked for."""
        for name in ids:
            if name not in self._coming:
                self._coming[name] = self._readers.submit(self._extractor.read, self._utterances[name])

    def num_frames(self, utterance_id: str) -> int:
        """Frames an utterance will have; 1 in view "mean"."""
        return self._frames[utterance_id]

    def __contains__(self, utterance_id: object) -> bool:
        """Whether an utterance can be asked for."""
        return utterance_id in self._utterances

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self._utterances)

    @property
    def num_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def close(self) -> None:
        """End the threads that decode."""
        self._readers.shutdown(cancel_futures=True)


def _draw(generator: torch.Generator) -> Any:
    return lambda below: int(torch.randint(below, (), generator=generator))
