"""Stores that are extracted on a GPU: the states of a CPU's, from every place, and found out when they are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import CheckError
from superb_probe.probes import kernels, store_kernels
from superb_probe.probes.batches import assemble
from superb_probe.probes.planner import free_gpu_bytes
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_stream import StreamStore
from superb_probe.upstreams.load import load_upstream

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def train(corpus: Path) -> Manifest:
    return Manifest.read(corpus / "train.tsv")


def built(root: Path | None, manifest: Manifest, device: torch.device, kept: torch.device, **options: Any) -> Any:
    kind = options.pop("kind", FeatureStore)
    store = kind(root, device=kept, **{"dtype": "float32", **options})
    upstream = load_upstream("transformer_hubert", size="test", random=1).to(device)
    store.build(upstream, manifest, max_batch_s=2.0)
    return store


@pytest.mark.parametrize("view", ["frames", "mean"])
@pytest.mark.parametrize("place", ["gpu", "memory", "disk", "stream"])
def test_a_gpu_gives_a_cpus_states_to_every_place(train: Manifest, tmp_path: Path, place: str, view: str) -> None:
    expected = States(built(None, train, CPU, CPU, view=view), train.ids, None, CPU)
    kept = GPU if place in ("gpu", "stream") else CPU
    kind = StreamStore if place == "stream" else FeatureStore
    store = built(tmp_path if place == "disk" else None, train, GPU, kept, view=view, kind=kind)
    states = States(store, train.ids, None, GPU)
    for rows in ([5, 0, 3], list(range(20))):
        states.prefetch([1, 2])
        got, frames = states.batch(rows)
        wanted, wanted_frames = expected.batch(rows)
        assert got.device.type == "cuda" and frames.tolist() == wanted_frames.tolist()
        torch.testing.assert_close(got.cpu(), wanted, atol=2e-4, rtol=2e-3)
    if place == "stream":
        store.close()
    else:
        assert store.encoder_passes == len(train) and store.clock.total_s > 0


def test_states_of_a_stream_that_are_not_finite_are_found_at_the_latest_when_it_closes(train: Manifest) -> None:
    store = StreamStore(None, device=GPU)
    upstream: Any = load_upstream("transformer_hubert", size="test", random=1).to(GPU)
    upstream.encoder.encoder.layer_norm.weight.data[3] = float("nan")
    store.build(upstream, train)
    States(store, train.ids, None, GPU).batch([1, 2])
    with pytest.raises(CheckError, match="states that are not finite"):
        store.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_batch_put_together_in_one_launch(dtype: torch.dtype) -> None:
    if not kernels.available():
        pytest.skip("needs Triton")
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(13, count, 768, generator=generator).to("cuda", dtype) for count in (50, 1, 700, 333)]
    parts[2] = parts[2][:, 20:520]  # a crop
    for given in (parts, [part[4:5] for part in parts]):
        assert store_kernels.can_pad(given)
        padded, lengths = store_kernels.pad(given)
        expected, expected_lengths = assemble(given, GPU)
        assert torch.equal(padded, expected) and torch.equal(lengths, expected_lengths)
    assert not store_kernels.can_pad([part.transpose(0, 1) for part in parts])


def test_the_planner_sees_what_this_process_may_have() -> None:
    total = torch.cuda.mem_get_info()[1]
    before = [free_gpu_bytes(torch.device(name)) for name in ("cuda", "cuda:0")]
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        assert free_gpu_bytes(torch.device("cuda")) <= 0.1 * total < min(before)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
