"""States that are kept nowhere: each batch is encoded when it is asked for, once for all trials that read it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, effective_samples
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.probes.store import FeatureStore, Progress, duration_batches
from superb_probe.probes.store_extract import PACKERS, Encoding, Extractor, Loaded, chunks
from superb_probe.upstreams.base import Upstream

UNCHECKED = 2  # batches on a GPU that are used before it is known whether they are finite


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
        self._coming: dict[tuple[str, ...], list[_Coming]] = {}
        self._unchecked: deque[Encoding] = deque()
        self._readers = ThreadPoolExecutor(self._extractor.workers, thread_name_prefix="decode")
        self._packers = ThreadPoolExecutor(PACKERS, thread_name_prefix="pad")

    def fetch_packed(self, ids: Sequence[str], generator: torch.Generator | None = None) -> list[Tensor]:
        """Encode some utterances; the states of each, packed.

        On a GPU they may still be in the making, in the order of its stream; whether they are finite is then known two calls later.
        """
        if self._extractor.states_for is not None:
            utterances = [self._utterances[name] for name in ids]
            return [kept for _, (kept,) in self._extractor.run([[utterance] for utterance in utterances])]
        self.prefetch(ids)
        found: dict[str, Tensor] = {}
        for loaded in self._loaded(ids, self._coming.pop(tuple(ids)), generator):
            encoding = self._extractor.start(loaded)
            if self.keeping.device.type == "cuda":
                self._unchecked.append(encoding)
                parts = encoding.parts()
            else:
                parts = encoding.finish()
            found.update(zip([utterance.id for utterance in loaded.utterances], parts, strict=True))
        self._check(UNCHECKED)
        self.encoder_passes = self._extractor.encoded
        return [found[name] for name in ids]

    def prefetch(self, ids: Sequence[str]) -> None:
        """Begin to decode what will be asked for next, in the same order, and bring it to where it is encoded."""
        if self._extractor.states_for is not None or tuple(ids) in self._coming:
            return
        utterances = list({name: self._utterances[name] for name in ids}.values())
        coming = []
        for batch in self._batches(utterances):
            decoded = [self._readers.submit(self._extractor.read, chunk) for chunk in chunks(batch)]
            whole = None if self.crop_s else self._packers.submit(self._extractor.collect, batch, decoded)
            coming.append(_Coming(batch, decoded, whole))
        self._coming[tuple(ids)] = coming

    def _batches(self, utterances: list[Utterance]) -> list[list[Utterance]]:
        """What of the utterances asked for at once is encoded together."""
        return duration_batches(utterances, self._max_batch_s)

    def _loaded(
        self, ids: Sequence[str], coming: Sequence[_Coming], generator: torch.Generator | None
    ) -> Iterator[Loaded]:
        """The batches that were announced; crops are drawn now, in the order asked for."""
        if not self.crop_s:
            yield from (each.whole.result() for each in coming if each.whole is not None)
            return
        rate = self._extractor.upstream.info.sample_rate_hz
        whole = {u.id: wave for each in coming for u, wave in zip(each.utterances, each.waves(), strict=True)}
        draw = None if generator is None else _draw(generator)
        cut = {name: self.keeping.cut(whole[name], self._utterances[name], rate, draw) for name in ids}
        for each in coming:
            yield self._extractor.load(each.utterances, [cut[utterance.id] for utterance in each.utterances])

    def _check(self, most: int) -> None:
        """Look at batches encoded a while ago, until at most so many are left."""
        while len(self._unchecked) > most:
            self._unchecked.popleft().check()

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
        """End the threads that decode.

        Raises:
            CheckError: if the last states were not finite.
        """
        self._readers.shutdown(cancel_futures=True)
        self._packers.shutdown(cancel_futures=True)
        self._check(0)


@dataclass(frozen=True, slots=True)
class _Coming:
    """A batch that was announced: its audio on the way, and the batch on its way to the encoder where nothing is drawn before."""

    utterances: Sequence[Utterance]
    decoded: Sequence[Future[list[Tensor]]]
    whole: Future[Loaded] | None

    def waves(self) -> list[Tensor]:
        return [wave for future in self.decoded for wave in future.result()]


def _draw(generator: torch.Generator) -> Any:
    return lambda below: int(torch.randint(below, (), generator=generator))
