"""Benches of this project's own parts: the weighted sum, a sweep against one encoder pass, and what they share."""

from __future__ import annotations

import argparse
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
from superb_probe.bench_machine import describe_machine, synchronize, timed
from superb_probe.bench_ours import OursJob, run_ours
from superb_probe.bench_probing import SUPERB_SIZES
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.engine_ask import choose_device
from superb_probe.engine_record import exact_arithmetic, now
from superb_probe.errors import RequestError
from superb_probe.probes.store import FeatureStore, duration_batches, manifest_seconds
from superb_probe.probes.store_extract import Extractor
from superb_probe.probes.weighted_sum import WeightedSum
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.checkpoints import write_checkpoint
from superb_probe.upstreams.load import load_upstream

GPU_SHAPE, CPU_SHAPE = (13, 32, 750, 768), (13, 4, 200, 768)
WARM_UPDATES = 500  # of the run before, whose time counts nowhere
BATCH_S = {"cpu": 60.0, "cuda": 120.0}  # seconds of audio the encoder takes at once, as in a run


def result_of(name: str, device: torch.device) -> dict[str, Any]:
    """What every result begins with."""
    return {"bench": name, "started_at": now(), "machine": describe_machine(device)}


def bench_weighted_sum(args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of the weighted sum against the time its bytes need at the speed of a copy."""
    device = choose_device(args.device)
    shape = tuple(args.shape or (GPU_SHAPE if device.type == "cuda" else CPU_SHAPE))
    if min(shape) < 1:
        raise RequestError(f"--shape {' '.join(map(str, shape))}: positive numbers")
    repeats = 20 if device.type == "cuda" else 5
    result = result_of("weighted-sum", device) | {"shape": dict(zip("LBTD", shape, strict=True)), "dtypes": {}}
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
    lines = [where(result), "x".join(str(n) for n in result["shape"].values()) + ", forward and backward"]
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
    upstream.to(device)
    keeping = FeatureStore().keeping
    utterances: list[Utterance] = []
    waves: list[list[torch.Tensor]] = []
    for manifest in manifests:
        extractor = Extractor(upstream, manifest.root, keeping)
        batches = duration_batches(manifest, BATCH_S[device.type])
        with ThreadPoolExecutor(extractor.workers) as pool:
            waves += [[wave.to(device) for wave in found] for found in pool.map(extractor.read, batches)]
        utterances += list(manifest)
    with exact_arithmetic(device):
        for batch in waves:  # every shape once: kernels are compiled and algorithms chosen when a shape is first met
            upstream.extract(batch)
        synchronize(device)
        started = time.perf_counter()
        for batch in waves:
            upstream.extract(batch)
        synchronize(device)
    seconds = time.perf_counter() - started
    audio_s = manifest_seconds(utterances)
    return {"seconds": seconds, "audio_s": audio_s, "audio_s_per_s": audio_s / seconds, "utterances": len(utterances)}


def copies_of(manifest: Manifest, copies: int) -> Manifest:
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


def _copied_corpus(corpus: BenchCorpus, copies: int) -> BenchCorpus:
    """A corpus with so many copies of every file, its manifests written again."""
    manifests = {split: copies_of(manifest, copies) for split, manifest in corpus.fold.manifests.items()}
    for split, manifest in manifests.items():
        manifest.write(corpus.manifests[str(split)])
    return replace(corpus, fold=replace(corpus.fold, manifests=manifests))


def check_classes(corpus: BenchCorpus, classes: int, copies: int) -> None:
    """Refuse what `with_classes` cannot do.

    Raises:
        RequestError: for a task with several labels, or more classes than utterances of train.
    """
    train = corpus.fold.manifests["train"]
    slots, count = list(corpus.task.labels(train).classes), len(train) * copies
    if slots != list(corpus.task.info.label_columns) or not 2 <= classes <= count:
        raise RequestError(
            f"--classes {classes}: {corpus.task.info.name} has labels {', '.join(slots)} and {count} training utterances. "
            "Fix: a task with one class an utterance, and 2 to as many classes as utterances (--copies N makes more)"
        )


def with_classes(corpus: BenchCorpus, classes: int) -> BenchCorpus:
    """A corpus with so many classes, for heads of a real one's size: labels by place in the manifest, scores mean nothing."""
    (column,) = corpus.task.info.label_columns
    manifests = {}
    for split, manifest in corpus.fold.manifests.items():
        labelled = [
            replace(utterance, labels={**utterance.labels, column: f"class {row % classes}"})
            for row, utterance in enumerate(manifest)
        ]
        manifests[split] = Manifest(labelled, manifest.root, manifest.name)
        manifests[split].write(corpus.manifests[str(split)])
    return replace(corpus, fold=replace(corpus.fold, manifests=manifests))


def bench_sweep(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole sweep against one encoder pass, and the sweep of every layer against the weighted sum's."""
    device = choose_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(args.task)
    corpus = choose_corpus(task, args.limit, folder / "manifests")
    if args.classes is not None:
        check_classes(corpus, args.classes, args.copies)
    corpus = _copied_corpus(flac_corpus(corpus, folder / "flac"), args.copies)
    if args.classes is not None:
        corpus = with_classes(corpus, args.classes)
    upstream, checkpoint = encoder_for(args, folder)
    one_pass = encoder_pass(upstream, list(corpus.fold.manifests.values()), device)
    del upstream
    if device.type == "cuda":
        torch.cuda.empty_cache()
    budget, settings = task.info.budgets["full"], task.info.protocols["superb"]
    updates = args.updates or budget.steps
    result = result_of("sweep", device) | {
        "task": args.task,
        "data": corpus_summary(corpus),
        "updates": updates,
        "superb_updates": budget.steps,
        "classes": sum(task.labels(corpus.fold.manifests["train"]).sizes().values()),
        "encoder_pass": one_pass,
        "runs": {},
    }
    plans: dict[str, tuple[str | None, Sequence[int]]] = {"weighted_sum": (None, args.seed)}
    if not args.no_layers:
        plans["every_layer"] = ("all", args.seed[:1])
    if device.type == "cuda":  # the first run on a machine compiles kernels, which later ones find
        warm = folder / "warm"
        job = _sweep_job(args, corpus, checkpoint, list(settings.lr_grid), list(args.seed), WARM_UPDATES, warm, None)
        result["warm_up"] = {"updates": WARM_UPDATES, "fit_s": run_ours(job, warm, args.timeout)["fit_s"]}
        shutil.rmtree(warm / "store", ignore_errors=True)
    for name, (layer, seeds) in plans.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        job = _sweep_job(args, corpus, checkpoint, list(settings.lr_grid), list(seeds), updates, folder / name, layer)
        result["runs"][name] = run_ours(job, folder / name, args.timeout)
    if updates < budget.steps:  # what an update takes once all is compiled: the rest does not grow with them
        fewer = max(1, updates // 10)
        job = _sweep_job(
            args, corpus, checkpoint, list(settings.lr_grid), list(args.seed), fewer, folder / "fewer", None
        )
        job = replace(job, store=str(folder / "weighted_sum" / "store"))
        result["fewer_updates"] = {"updates": fewer, "fit_s": run_ours(job, folder / "fewer", args.timeout)["fit_s"]}
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
        fewer = result.get("fewer_updates", {"updates": 0, "fit_s": 0.0})
        update_s = (summed["fit_s"] - fewer["fit_s"]) / (result["updates"] - fewer["updates"])
        once_s = max(0.0, summed["fit_s"] - result["updates"] * update_s)
        updates = result["superb_updates"] * int(sizes.get("folds", 1))
        fit_s = once_s + update_s * updates
        sweep_s = extract_s + fit_s + other_s
        found["at_superb_sizes"] = {
            "encoder_pass_s": pass_s,
            "sweep_s": sweep_s,
            "ratio": sweep_s / pass_s,
            "arithmetic": (
                f"one pass: {audio_s / 3600:.3g} h at {one_pass['audio_s_per_s']:.4g} s a second = {pass_s:.4g} s; sweep: the same "
                f"audio decoded, encoded, written at {corpus.audio_s / summed['extract_s']:.4g} s a second = {extract_s:.4g} s + "
                f"{updates} updates x {update_s:.4g} s + {once_s:.3g} s once = {fit_s:.4g} s + {other_s:.3g} s"
            ),
        }
    return found


def describe_sweep(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    one_pass = result["encoder_pass"]
    lines = [
        where(result),
        f"{result['task']}, {result['updates']} updates ({result['superb_updates']} in SUPERB); one encoder pass over "
        + f"{one_pass['audio_s']:.0f} s of audio: {one_pass['seconds']:.2f} s ({one_pass['audio_s_per_s']:.0f} s a second)",
    ]
    wanted = SUPERB_SIZES.get(result["task"], {}).get("classes", result["classes"])
    if result["classes"] != wanted:
        lines.append(
            f"  heads of {result['classes']} classes, where SUPERB has {wanted}: updates are those of these heads"
        )
    if "warm_up" in result:
        first = result["warm_up"]
        lines.append(
            f"  before it, so that kernels are compiled: {first['updates']} updates, {first['fit_s']:.2f} s of training"
        )
    for name, run in result["runs"].items():
        rest_s = run["wall_s"] - run["extract_s"] - run["fit_s"]
        lines.append(
            f"  {name.replace('_', ' ')}: {run['trials']} trials, {run['wall_s']:.2f} s in all (decoded, encoded, written "
            f"{run['extract_s']:.2f} s, training {run['fit_s']:.2f} s, the rest {rest_s:.2f} s)"
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


def where(result: Mapping[str, Any]) -> str:
    """The machine of a result in one line."""
    machine = result["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    return f"{name}; torch {machine['versions']['torch']}; commit {machine['commit']}"
