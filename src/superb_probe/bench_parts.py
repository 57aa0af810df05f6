"""Benches of this project's own parts: the weighted sum, the way from FLAC to a batch, a sweep against one encoder pass."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from superb_probe.bench_corpus import BenchCorpus, choose_corpus, corpus_summary, flac_corpus
from superb_probe.bench_machine import counted_passes, describe_machine, synchronize, timed
from superb_probe.bench_ours import OursJob, run_ours
from superb_probe.bench_probing import SUPERB_SIZES
from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.engine_ask import choose_device
from superb_probe.engine_record import exact_arithmetic, now
from superb_probe.errors import RequestError
from superb_probe.probes.planner import Need, choose_place, measure_room
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore, duration_batches
from superb_probe.probes.weighted_sum import WeightedSum
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.checkpoints import write_checkpoint
from superb_probe.upstreams.load import load_upstream

GPU_SHAPE, CPU_SHAPE = (13, 32, 750, 768), (13, 4, 200, 768)
BATCH = 32
BATCH_S = {"cpu": 60.0, "cuda": 120.0}  # seconds of audio the encoder takes at once, as in a run


def _result(name: str, device: torch.device) -> dict[str, Any]:
    return {"bench": name, "started_at": now(), "machine": describe_machine(device)}


def bench_weighted_sum(args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of the weighted sum against the time its bytes need at the speed of a copy."""
    device = choose_device(args.device)
    shape = tuple(args.shape or (GPU_SHAPE if device.type == "cuda" else CPU_SHAPE))
    if min(shape) < 1:
        raise RequestError(f"--shape {' '.join(map(str, shape))}: positive numbers")
    repeats = 20 if device.type == "cuda" else 5
    result = _result("weighted-sum", device) | {"shape": dict(zip("LBTD", shape, strict=True)), "dtypes": {}}
    for dtype in (torch.float32, torch.float16):
        states = torch.randn(shape, device=device).to(dtype)
        result["dtypes"][str(dtype).removeprefix("torch.")] = _weighted_sum(states, repeats, device)
    return result


def _weighted_sum(states: torch.Tensor, repeats: int, device: torch.device) -> dict[str, Any]:
    target = torch.empty_like(states)
    copy_s = timed(partial(target.copy_, states), device, repeats, warm_up=3)
    del target
    bytes_per_s = 2 * states.nbytes / copy_s
    module = WeightedSum(states.shape[0]).to(device)
    gradient = torch.randn(states.shape[1:], device=device)

    def ours() -> None:
        module.weights.grad = None
        module(states).backward(gradient)

    weights = torch.zeros(states.shape[0], device=device, requires_grad=True)

    def product() -> None:  # what s3prl's featurizer does: a stack, a product, a sum
        weights.grad = None
        stacked = torch.stack(list(states.float().unbind()))
        (weights.softmax(0)[:, None, None, None] * stacked).sum(0).backward(gradient)  # type: ignore[no-untyped-call]

    output_bytes = gradient.nbytes
    needed = 2 * states.nbytes + 2 * output_bytes  # states read twice, the output written, its gradient read
    seconds = timed(ours, device, repeats, warm_up=3)
    return {
        "seconds": seconds,
        "copy_bytes_per_s": bytes_per_s,
        "needed_bytes": needed,
        "needed_s": needed / bytes_per_s,
        "ratio": seconds / (needed / bytes_per_s),
        "stack_and_product_s": timed(product, device, max(repeats // 4, 2), warm_up=1),
    }


def describe_weighted_sum(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    lines = [_where(result), "x".join(str(n) for n in result["shape"].values()) + ", forward and backward"]
    for dtype, row in result["dtypes"].items():
        lines.append(
            f"  {dtype} states: {1e3 * row['seconds']:.3g} ms, {row['ratio']:.2f} times what {row['needed_bytes'] / 1e9:.2f} GB need "
            f"at a copy's {row['copy_bytes_per_s'] / 1e9:.0f} GB/s; stack and product {1e3 * row['stack_and_product_s']:.3g} ms"
        )
    return lines


def encoder_for(args: argparse.Namespace, folder: Path, dtype: str = "float32") -> tuple[Upstream, Path]:
    """The encoder of the bench and a checkpoint of it that another process can load."""
    if args.checkpoint is not None:
        return load_upstream("transformer_hubert", checkpoint=args.checkpoint, dtype=dtype), args.checkpoint
    made: Any = load_upstream("transformer_hubert", size=args.size, random=1)
    path = folder / "encoder.safetensors"
    write_checkpoint(
        path, made.encoder.config, made.encoder.state_dict(), name="transformer_hubert", trained_on=(), license="none"
    )
    return load_upstream("transformer_hubert", checkpoint=path, dtype=dtype), path


def encoder_pass(upstream: Upstream, manifests: Sequence[Manifest], device: torch.device) -> dict[str, float]:
    """Seconds of one pass of the encoder alone, audio decoded and on the device before the clock starts."""
    utterances = [(manifest, utterance) for manifest in manifests for utterance in manifest]
    roots = {utterance.id: manifest.root for manifest, utterance in utterances}
    batches = duration_batches([utterance for _, utterance in utterances], BATCH_S[device.type])
    waves = [
        [torch.from_numpy(read_waveform(u, roots[u.id], SAMPLE_RATE_HZ)).to(device) for u in batch] for batch in batches
    ]
    upstream.to(device)
    with exact_arithmetic(device):
        for warm in (waves[0], waves[-1]):
            upstream.extract(warm)
        synchronize(device)
        started = time.perf_counter()
        for batch in waves:
            upstream.extract(batch)
        synchronize(device)
    seconds = time.perf_counter() - started
    audio_s = sum(utterance.duration_s for _, utterance in utterances)
    return {"seconds": seconds, "audio_s": audio_s, "audio_s_per_s": audio_s / seconds, "utterances": len(utterances)}


def bench_extraction(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """FLAC on disk to a weighted-sum training batch, whole and stage by stage, for every place states are kept in."""
    device = choose_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = choose_corpus(load_task("pr"), args.limit, folder / "manifests", labelled=False)
    manifest = _copies(flac_corpus(chosen, folder / "flac").fold.manifests["train"], args.copies)
    upstream, _ = encoder_for(args, folder, args.dtype)
    encode = encoder_pass(upstream, [manifest], device)
    result = _result("extraction", device) | {
        "encoder": {"dim": upstream.info.dim, "layers": upstream.info.num_layers, "dtype": args.dtype},
        "utterances": len(manifest),
        "audio_s": manifest.total_s,
        "encoder_alone": encode,
        "stages_audio_s_per_s": {"encode": encode["audio_s_per_s"], "decode": _decode_rate(manifest)},
        "planner": _planned(upstream, manifest, device),
        "whole": {},
    }
    stages, warm = result["stages_audio_s_per_s"], manifest.keep(manifest.ids[:BATCH])
    for place in ("gpu", "memory", "disk") if device.type == "cuda" else ("memory", "disk"):
        for part in (warm, manifest):  # kernels are compiled and pinned memory is taken once a process
            shutil.rmtree(folder / "store", ignore_errors=True)
            found = _whole(upstream, part, place, folder / "store", device)
        stages[f"read from {place}"] = manifest.total_s / found["read_s"]
        result["whole"][place] = found | {"share_of_encoder": encode["seconds"] / found["seconds"]}
    limiting = min(stages, key=lambda name: stages[name])
    result["limiting_stage"] = limiting
    return result


def _copies(manifest: Manifest, copies: int) -> Manifest:
    """A manifest whose every file is there so many times, for a bench that lasts longer than what starts and ends it.

    Raises:
        RequestError: for less than one.
    """
    if copies < 1:
        raise RequestError(f"--copies {copies}: at least 1")
    made = list(manifest)
    for number in range(1, copies):
        for utterance in manifest:
            path = Path(utterance.audio)
            audio = str(path.with_name(f"{path.stem}.copy{number}{path.suffix}"))
            shutil.copyfile(manifest.root / path, manifest.root / audio)
            made.append(replace(utterance, id=f"{utterance.id}.copy{number}", audio=audio))
    return Manifest(made, manifest.root, manifest.name)


def _planned(upstream: Upstream, manifest: Manifest, device: torch.device) -> str:
    """Where a run of several epochs would keep these states, and why."""
    size, seconds = FeatureStore.estimate_bytes(upstream.info, manifest, "frames", "float16"), manifest.total_s
    need = Need(size, size, seconds, seconds, reads_s=10 * seconds, streamed_s=10 * seconds)
    return choose_place(need, measure_room(device, None, need, None), None).reason


def _decode_rate(manifest: Manifest) -> float:
    """Seconds of audio decoded in a second by as many threads as there are cores."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(lambda utterance: read_waveform(utterance, manifest.root, SAMPLE_RATE_HZ), manifest):
            pass
    return manifest.total_s / (time.perf_counter() - started)


def _whole(upstream: Upstream, manifest: Manifest, place: str, root: Path, device: torch.device) -> dict[str, Any]:
    """Build a store from FLAC and read every utterance once in weighted-sum training batches."""
    kept = device if place == "gpu" else torch.device("cpu")
    store = FeatureStore(root if place == "disk" else None, view="frames", dtype="float16", device=kept)
    module = WeightedSum(upstream.info.num_layers).to(device)
    with exact_arithmetic(device), counted_passes(upstream) as passes:
        synchronize(device)
        started = time.perf_counter()
        store.build(upstream, manifest, max_batch_s=BATCH_S[device.type])
        built = time.perf_counter() - started
        states = States(store, manifest.ids, None, device)
        order = sorted(range(len(manifest)), key=lambda row: states.num_frames[row])
        for start in range(0, len(order), BATCH):
            module(states.batch(order[start : start + BATCH])[0])
        synchronize(device)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "build_s": built,
        "read_s": seconds - built,
        "audio_s_per_s": manifest.total_s / seconds,
        "store_bytes": store.num_bytes,
        "passes_per_utterance": passes.utterances / len(manifest),
        "build_limit": store.clock.limiting(),
    }


def describe_extraction(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    stages = ", ".join(f"{name} {rate:.0f}" for name, rate in result["stages_audio_s_per_s"].items())
    lines = [
        _where(result),
        f"{result['utterances']} FLAC files, {result['audio_s']:.0f} s; seconds of audio a second: {stages}",
        f"  limiting stage: {result['limiting_stage']}; a run would keep the states in {result['planner']}",
    ]
    for place, row in result["whole"].items():
        lines.append(
            f"  FLAC to weighted-sum batches by {place}: {row['audio_s_per_s']:.0f} s a second, "
            f"{100 * row['share_of_encoder']:.0f} % of the encoder alone, {row['passes_per_utterance']:.2f} passes an utterance"
            + f"; {row['build_limit']}"
        )
    return lines


def bench_sweep(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole sweep against one encoder pass, and the sweep of every layer against the weighted sum's."""
    device = choose_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(args.task)
    corpus = flac_corpus(choose_corpus(task, args.limit, folder / "manifests"), folder / "flac")
    upstream, checkpoint = encoder_for(args, folder)
    one_pass = encoder_pass(upstream, list(corpus.fold.manifests.values()), device)
    del upstream
    if device.type == "cuda":
        torch.cuda.empty_cache()
    budget, settings = task.info.budgets["full"], task.info.protocols["superb"]
    updates = args.updates or budget.steps
    result = _result("sweep", device) | {
        "task": args.task,
        "data": corpus_summary(corpus),
        "updates": updates,
        "superb_updates": budget.steps,
        "encoder_pass": one_pass,
        "runs": {},
    }
    plans: dict[str, tuple[str | None, Sequence[int]]] = {"weighted_sum": (None, args.seed)}
    if not args.no_layers:
        plans["every_layer"] = ("all", args.seed[:1])
    for name, (layer, seeds) in plans.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        job = _sweep_job(args, corpus, checkpoint, list(settings.lr_grid), list(seeds), updates, folder / name, layer)
        result["runs"][name] = run_ours(job, folder / name, args.timeout)
    result |= sweep_ratios(result, corpus)
    return result


def _sweep_job(
    args: argparse.Namespace,
    corpus: BenchCorpus,
    checkpoint: Path,
    rates: list[float],
    seeds: list[int],
    updates: int,
    folder: Path,
    layer: str | None,
) -> OursJob:
    return OursJob(
        checkpoint=str(checkpoint),
        task=args.task,
        manifests={split: str(path) for split, path in corpus.manifests.items()},
        root=str(corpus.root),
        lr=rates,
        seed=seeds,
        steps=updates,
        out=str(folder / "records"),
        store=str(folder / "store"),
        device=str(choose_device(args.device)),
        threads=args.threads,
        layer=layer,
    )


def sweep_ratios(result: Mapping[str, Any], corpus: BenchCorpus) -> dict[str, Any]:
    """Ratios to one encoder pass: as run here, and at SUPERB's corpus and updates with the arithmetic."""
    one_pass, runs = result["encoder_pass"], result["runs"]
    summed = runs["weighted_sum"]
    found: dict[str, Any] = {
        "ratio": summed["wall_s"] / one_pass["seconds"],
        "passes_per_utterance": summed["encoder_passes"] / corpus.distinct,
    }
    if "every_layer" in runs:
        found["every_layer_ratio"] = runs["every_layer"]["wall_s"] / summed["wall_s"]
        found["every_layer_fit_ratio"] = runs["every_layer"]["fit_s"] / summed["fit_s"] if summed["fit_s"] else None
    sizes = SUPERB_SIZES.get(result["task"])
    if sizes is not None:
        audio_s = 3600 * (sizes["train_h"] + sizes["select_h"] + sizes["test_h"])
        pass_s = audio_s / one_pass["audio_s_per_s"]
        extract_s = summed["extract_s"] / corpus.audio_s * audio_s
        other_s = max(summed["wall_s"] - summed["fit_s"] - summed["extract_s"], 0.0)
        fit_s = summed["fit_s"] / result["updates"] * result["superb_updates"]
        sweep_s = extract_s + fit_s + other_s
        found["at_superb_sizes"] = {
            "encoder_pass_s": pass_s,
            "sweep_s": sweep_s,
            "ratio": sweep_s / pass_s,
            "arithmetic": (
                f"one pass: {audio_s / 3600:.3g} h at {one_pass['audio_s_per_s']:.4g} s a second = {pass_s:.4g} s; sweep: the same "
                f"audio decoded, encoded, written at {corpus.audio_s / summed['extract_s']:.4g} s a second = {extract_s:.4g} s + "
                f"{result['superb_updates']} updates x {summed['fit_s'] / result['updates']:.4g} s = {fit_s:.4g} s + {other_s:.3g} s"
            ),
        }
    return found


def describe_sweep(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    one_pass = result["encoder_pass"]
    lines = [
        _where(result),
        f"{result['task']}, {result['updates']} updates ({result['superb_updates']} in SUPERB); one encoder pass over "
        + f"{one_pass['audio_s']:.0f} s of audio: {one_pass['seconds']:.2f} s ({one_pass['audio_s_per_s']:.0f} s a second)",
    ]
    for name, run in result["runs"].items():
        lines.append(
            f"  {name.replace('_', ' ')}: {run['trials']} trials, {run['wall_s']:.2f} s in all (decoded, encoded, written "
            f"{run['extract_s']:.2f} s, training {run['fit_s']:.2f} s)"
        )
    lines.append(
        f"  the weighted sum's sweep takes {result['ratio']:.2f} encoder passes here, {result['passes_per_utterance']:.2f} passes an "
        "utterance counted"
    )
    if "every_layer_ratio" in result:
        lines.append(f"  every layer: {result['every_layer_ratio']:.2f} times the weighted sum's sweep")
    if "at_superb_sizes" in result:
        at = result["at_superb_sizes"]
        lines.append(f"  at SUPERB's sizes (computed): {at['ratio']:.2f} encoder passes: {at['arithmetic']}")
    return lines


def _where(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    return f"{name}; torch {machine['versions']['torch']}; commit {machine['commit']}"
