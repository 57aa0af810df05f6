"""The bench of the whole path, FLAC on disk to a weighted-sum training batch: together, and each stage alone."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.bench_corpus import choose_corpus, flac_corpus
from superb_probe.bench_machine import counted_passes, synchronize
from superb_probe.bench_parts import BATCH_S, copies_of, encoder_for, encoder_pass, result_of, where
from superb_probe.downstreams.base import View
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.engine_ask import choose_device
from superb_probe.engine_record import exact_arithmetic
from superb_probe.probes.planner import Need, choose_place, measure_room
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_extract import Extractor, available_cores, chunks
from superb_probe.probes.store_stream import StreamStore
from superb_probe.probes.weighted_sum import WeightedSum
from superb_probe.upstreams.base import LayerStates, Upstream

BATCH = 32
WARM_UP = 16 * BATCH  # utterances: kernels are compiled and pinned memory is taken once a process


class StandIn(Upstream):
    """An upstream that takes no time: constant states of another one's shape and type."""

    def __init__(self, real: Upstream) -> None:
        """For what `real` would encode, where it is."""
        super().__init__()
        self.info = real.info
        self._frames = real.num_frames
        like = next(parameter for parameter in real.parameters() if parameter.is_floating_point())
        self.anchor = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device), requires_grad=False)

    def num_frames(self, num_samples: int) -> int:
        """As the real one's."""
        return self._frames(num_samples)

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """Halves."""
        counts = [self._frames(count) for count in num_samples.tolist()]
        shape = (self.info.num_layers, len(counts), max(counts), self.info.dim)
        states = torch.full(shape, 0.5, dtype=self.anchor.dtype, device=self.anchor.device)
        return LayerStates(states, torch.tensor(counts, device=states.device))


def bench_extraction(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """FLAC on disk to a weighted-sum training batch, whole and stage by stage, for every view and place states are kept in."""
    device = choose_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = choose_corpus(load_task("pr"), args.limit, folder / "manifests", labelled=False)
    manifest = copies_of(flac_corpus(chosen, folder / "flac").fold.manifests["train"], args.copies)
    upstream, _ = encoder_for(args, folder, args.dtype)
    encode = encoder_pass(upstream, [manifest], device)
    places = ("gpu", "memory", "disk", "stream") if device.type == "cuda" else ("memory", "disk", "stream")
    result = result_of("extraction", device) | {
        "encoder": {"dim": upstream.info.dim, "layers": upstream.info.num_layers, "dtype": args.dtype},
        "cores": available_cores(),
        "utterances": len(manifest),
        "audio_s": manifest.total_s,
        "encoder_alone": encode,
        "decode_s": _decode_s(upstream, manifest),
        "planner": _planned(upstream, manifest, device),
        "whole": {},
    }
    wanted: list[tuple[View, str]] = [("frames", place) for place in places]
    wanted.append(("mean", "gpu" if device.type == "cuda" else "memory"))
    for view, place in wanted:
        found = _measured(upstream, manifest, view, place, folder / "store", device)
        share = encode["seconds"] / found["seconds"]
        stages = {"decode": result["decode_s"], "encode": encode["seconds"], **found.pop("stages")}
        found |= {"share_of_encoder": share, "stages_s": stages, "limiting_stage": max(stages, key=lambda n: stages[n])}
        result["whole"][f"{view}, {place}"] = found
    return result


def _measured(
    upstream: Upstream, manifest: Manifest, view: View, place: str, root: Path, device: torch.device
) -> dict[str, Any]:
    """The whole path with the encoder, and without it, each after a warm-up."""
    without = StandIn(upstream)
    for each in (without, upstream):
        found: dict[str, Any] = {}
        for part in (manifest.keep(manifest.ids[:WARM_UP]), manifest):
            shutil.rmtree(root, ignore_errors=True)
            found = _whole(each, part, view, place, root, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if each is without:
            stages = {"all but the encoder": found["seconds"] - found["read_s"], "read": found["read_s"]}
            if place == "stream":
                stages = {"all but the encoder": found["seconds"]}
    shutil.rmtree(root, ignore_errors=True)
    return found | {"stages": stages}


def _planned(upstream: Upstream, manifest: Manifest, device: torch.device) -> str:
    """Where a run of several epochs would keep these states, and why."""
    size, seconds = FeatureStore.estimate_bytes(upstream.info, manifest, "frames", "float16"), manifest.total_s
    need = Need(size, size, seconds, seconds, reads_s=10 * seconds, streamed_s=10 * seconds)
    return choose_place(need, measure_room(device, None, need, None), None).reason


def _decode_s(upstream: Upstream, manifest: Manifest) -> float:
    """Seconds that decoding takes alone, by as many processes or threads as an extraction has."""
    extractor = Extractor(upstream, manifest.root, FeatureStore().keeping)
    parts = list(chunks(manifest))
    with ThreadPoolExecutor(extractor.workers) as pool:
        extractor.read(parts[0])  # the processes are up
        started = time.perf_counter()
        for _ in pool.map(extractor.read, parts):
            pass
        return time.perf_counter() - started


def _whole(
    upstream: Upstream, manifest: Manifest, view: View, place: str, root: Path, device: torch.device
) -> dict[str, Any]:
    """Build a store from FLAC and read every utterance once in weighted-sum training batches."""
    kind = StreamStore if place == "stream" else FeatureStore
    kept = device if place in ("gpu", "stream") else torch.device("cpu")
    store = kind(root if place == "disk" else None, view=view, dtype="float16", device=kept)
    module = WeightedSum(upstream.info.num_layers).to(device)
    with exact_arithmetic(device), counted_passes(upstream) as passes:
        synchronize(device)
        started, worked = time.perf_counter(), time.process_time()
        store.build(upstream, manifest, max_batch_s=BATCH_S[device.type])
        built = time.perf_counter() - started
        states = States(store, manifest.ids, None, device)
        order = sorted(range(len(manifest)), key=lambda row: manifest[row].duration_s)
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            if following is not None:
                states.prefetch(following)
            module(states.batch(batch)[0])
        synchronize(device)
        seconds = time.perf_counter() - started
    if isinstance(store, StreamStore):
        store.close()
    return {
        "seconds": seconds,
        "processor_s": time.process_time() - worked,
        "build_s": built,
        "before_s": built - store.clock.total_s,
        "waits_s": {"decode": store.clock.decode_s, "keep": store.clock.keep_s, "write": store.clock.write_s},
        "read_s": seconds - built,
        "audio_s_per_s": manifest.total_s / seconds,
        "store_bytes": store.num_bytes,
        "passes_per_utterance": passes.utterances / len(manifest),
    }


def describe_extraction(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    encode = result["encoder_alone"]
    rate = f"{encode['audio_s_per_s']:.0f} s of audio a second"
    alone = f"encoder alone ({result['encoder']['dtype']}) {encode['seconds']:.2f} s, {rate}"
    corpus = f"{result['utterances']} FLAC files, {result['audio_s']:.0f} s, {result['cores']} cores"
    lines = [where(result), f"{corpus}; {alone}", f"a run would keep the states in {result['planner']}"]
    for name, row in result["whole"].items():
        share = f"{100 * row['share_of_encoder']:.0f} % of the encoder alone"
        speed = f"{row['seconds']:.2f} s, {row['audio_s_per_s']:.0f} s a second, {share}"
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in row["stages_s"].items())
        waits = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in row["waits_s"].items())
        build = (
            f"build {row['build_s']:.2f} s, {row['before_s']:.2f} s of it before and after; read {row['read_s']:.2f} s"
        )
        lines.append(f"  FLAC to batches, {name}: {speed}, {row['passes_per_utterance']:.2f} passes an utterance")
        lines.append(f"    alone: {stages}; limiting stage: {row['limiting_stage']}")
        lines.append(f"    together: {build}; the encoder waited for {waits}")
    return lines
