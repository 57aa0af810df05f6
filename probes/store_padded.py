"""Stores whose states depend on the batch, as s3prl's do: training encodes each batch as it is asked for, unsplit.

Their upstream is a `PaddedUpstream`. Nothing of them is shared or put on disk: in another order the
same utterance has other states.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from superb_probe.downstreams.manifest import Manifest
from superb_probe.probes.store import FeatureStore, Progress, manifest_seconds
from superb_probe.probes.store_extract import Extractor
from superb_probe.probes.store_stream import StreamStore
from superb_probe.upstreams.base import Upstream


class PaddedStore(StreamStore):
    """Training states, encoded anew each time: what is asked for at once is one batch of the encoder."""

    def build(
        self,
        upstream: Upstream,
        manifest: Manifest,
        *,
        max_batch_s: float = 120.0,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Remember what is to be encoded, however much a batch is. Arguments as for `FeatureStore.build`."""
        super().build(upstream, manifest, max_batch_s=math.inf, progress=progress, say=say)


class PaddedEvaluationStore(FeatureStore):
    """Dev or test states in memory, encoded once in batches of a fixed size in the manifest's order, as s3prl evaluates.

    Attributes:
        batch: utterances in a batch.
    """

    batch = 1

    def _build_memory(
        self, upstream: Upstream, manifest: Manifest, max_batch_s: float, progress: Progress | None
    ) -> None:
        utterances = list(manifest)
        batches = [utterances[start : start + self.batch] for start in range(0, len(utterances), self.batch)]
        extractor = Extractor(upstream, manifest.root, self.keeping)
        for batch, states in extractor.run(batches):
            for utterance, part in zip(batch, states, strict=True):
                self._memory[utterance.id] = part.clone()
                self._memory_keys[utterance.id] = utterance.id
            if progress is not None:
                progress(manifest_seconds(batch))
        self._note(extractor)
