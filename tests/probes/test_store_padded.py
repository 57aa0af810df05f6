"""Stores whose states depend on the batch: batches are neither split nor regrouped, and composed as s3prl composes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.probes.batches import s3prl_batches
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_padded import PaddedEvaluationStore, PaddedStore
from superb_probe.probes.store_stream import StreamStore
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.padding import PaddedUpstream

SECONDS = (1.0, 0.4, 0.7, 0.55, 0.9)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for number, seconds in enumerate(SECONDS):
        soundfile.write(root / f"{number}.wav", 0.1 * generator.standard_normal(int(seconds * 16000)), 16000)
    return Manifest(
        [Utterance(f"u{n}", f"{n}.wav", 0.0, seconds, {}) for n, seconds in enumerate(SECONDS)], root, "all"
    )


@pytest.fixture(scope="module")
def encoder() -> Upstream:
    return PaddedUpstream(load_upstream("mamba_hubert", size="test", random=0))


def states_of(encoder: Upstream, manifest: Manifest, names: list[str]) -> list[Tensor]:
    """The states (L, T, D) of some utterances encoded together."""
    chosen = {utterance.id: utterance for utterance in manifest}
    got = encoder.extract([torch.from_numpy(read_waveform(chosen[name], manifest.root, 16000)) for name in names])
    return [got.states[:, row, :count] for row, count in enumerate(got.num_frames.tolist())]


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in expected]
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def training_error(kind: Callable[..., FeatureStore], encoder: Upstream, manifest: Manifest) -> float:
    """The largest difference of what a store gives for a batch from the states of that batch."""
    store = kind(view="frames", dtype="float32")
    store.build(encoder, manifest, max_batch_s=1.5)
    try:
        names = ["u3", "u0", "u1"]
        return largest(store.fetch(names), states_of(encoder, manifest, names))
    finally:
        store.close()  # type: ignore[attr-defined]


def test_a_training_batch_is_encoded_as_a_whole(encoder: Upstream, manifest: Manifest) -> None:
    assert training_error(PaddedStore, encoder, manifest) < 1e-5


def test_a_store_that_regroups_utterances_gives_other_states(encoder: Upstream, manifest: Manifest) -> None:
    """The mutant: the plain streaming store splits what is asked for at 1.5 s of padded audio."""
    with pytest.raises(AssertionError):
        assert training_error(StreamStore, encoder, manifest) < 1e-5


def test_the_mean_of_an_utterance_depends_on_its_batch(encoder: Upstream, manifest: Manifest) -> None:
    store = PaddedStore(view="mean", dtype="float32")
    store.build(encoder, manifest)
    try:
        beside = [store.fetch(["u1", other])[0] for other in ("u2", "u0")]
    finally:
        store.close()
    for found, other in zip(beside, ("u2", "u0"), strict=True):
        expected = states_of(encoder, manifest, ["u1", other])[0].mean(1)
        assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(beside[0], beside[1], atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_evaluation_is_in_batches_of_the_manifests_order(encoder: Upstream, manifest: Manifest, batch: int) -> None:
    store = PaddedEvaluationStore(view="frames", dtype="float32")
    store.batch = batch
    store.build(encoder, manifest)
    for start in range(0, len(SECONDS), batch):
        names = list(manifest.ids[start : start + batch])
        assert largest(store.fetch(names), states_of(encoder, manifest, names)) < 1e-5
    if batch == 1:
        assert largest(store.fetch(["u1"]), states_of(encoder.encoder, manifest, ["u1"])) < 1e-5  # type: ignore[union-attr, arg-type]


def test_every_window_of_label_length_comes_once_an_epoch() -> None:
    labels, samples = [3, 9, 5, 7, 1, 8], [100_000] * 6
    batches = s3prl_batches("label_windows", samples, labels, 4, torch.Generator().manual_seed(0))
    order = [1, 5, 3, 2, 0, 4]
    epoch = Counter(tuple(rows) for rows in islice(batches, 6))
    # the windows that begin at the last three utterances are all the last one
    assert epoch == {tuple(order[0:4]): 1, tuple(order[1:5]): 1, tuple(order[2:6]): 4}


def test_a_window_whose_first_utterance_is_long_is_halved() -> None:
    labels, samples = [9, 8, 7, 6], [300_001, 1, 300_001, 1]
    batches = s3prl_batches("label_windows", samples, labels, 2, torch.Generator().manual_seed(0))
    assert {tuple(rows) for rows in islice(batches, 4)} == {(0,), (1, 2), (2,)}


def test_buckets_of_length_are_cut_in_two_but_for_the_last() -> None:
    samples = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    batches = s3prl_batches("length_buckets", samples, [], 2, torch.Generator().manual_seed(0))
    first = sorted(islice(batches, 4))
    assert first == [[2, 1], [4, 3], [6, 5], [8, 7]], "the shortest is left over alone and not used"
    batches = s3prl_batches("length_buckets", samples[:7], [], 2, torch.Generator().manual_seed(0))
    assert sorted(islice(batches, 3)) == [[2, 1, 0], [4, 3], [6, 5]]


def test_batches_of_one_seed_are_always_the_same_and_unknown_kinds_are_refused() -> None:
    def drawn(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return list(islice(s3prl_batches("length_buckets", list(range(40)), [], 2, generator), 20))

    assert drawn(1) == drawn(1) != drawn(2)
    with pytest.raises(ValueError, match="unknown batches"):
        next(s3prl_batches("shuffle", [1], [1], 1, torch.Generator()))
