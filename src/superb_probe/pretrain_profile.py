"""How fast pre-training is, what share of the GPU's peak it reaches, and where the time goes."""

from __future__ import annotations

import json
import time

import torch

from superb_probe.commands_output import table
from superb_probe.upstreams.macs import hubert_macs
from superb_probe.upstreams.pretrain import Job, make_trainer, units_of
from superb_probe.upstreams.pretrain_train import Trainer

# Dense bfloat16 matrix products, from the vendor's data sheets: operations a second.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
COSTS = 12
_TOP = 3


def profile(job: Job, updates: int) -> str:
    """Time some updates, then profile as many; the first iteration's, on its own units.

    Operations are counted as three times those of a forward pass (`hubert_macs`, twice the multiply-accumulates): the gradient costs
    two more. What is not a matrix product is not counted, so the share of the peak says how much of the chip does useful work.

    Returns:
        A text: one JSON line, then a table of the costliest kernels (on a CPU: operators).
    """
    trainer = make_trainer(job, 1, units_of(job, 1))
    first = _see_every_length(trainer)
    device = job.world.device
    spent, audio_s, operations = _timed(job, trainer, first, updates)
    said = {
        "encoder": job.name,
        "parameters": sum(each.numel() for each in trainer.masters.values()),
        "seconds_an_update": round(spent / updates, 5),
        "audio_s_per_s": round(audio_s / spent, 1),
        "frames_per_s": round(50 * audio_s / spent),
        "tera_operations_per_s": round(operations / spent / 1e12, 3),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for key, value in PEAKS.items() if key in name), None)
        said["share_of_peak"] = None if peak is None else round(operations / spent / peak, 4)
        said["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return f"{json.dumps(said)}\n{_costs(trainer, first + updates, updates, device)}"


def _see_every_length(trainer: Trainer) -> int:
    """Update on batches until each length was there (compiled, recorded); how many it took."""
    seen: set[int] = set()
    number = 0
    while len(seen) < len(trainer.sampler.groups):
        seen.add(trainer.sampler.batch(number * trainer.world.size * trainer.recipe.accumulate).length)
        trainer.update(number)
        number += 1
    return number


def _timed(job: Job, trainer: Trainer, first: int, updates: int) -> tuple[float, float, float]:
    """Seconds, seconds of audio and operations of some updates."""
    begun, audio_s, operations = time.perf_counter(), 0.0, 0.0
    for step in range(first, first + updates):
        audio_s += trainer.update(step).audio_s
    spent = time.perf_counter() - begun  # an update ends with the device in step: it reads the gradient's norm
    for step in range(first, first + updates):
        batch = trainer.sampler.batch(step * trainer.recipe.accumulate * trainer.world.size)
        operations += 6.0 * len(batch.starts) * hubert_macs(job.config, batch.length) * trainer.recipe.accumulate
    return spent, audio_s, operations


def _costs(trainer: Trainer, first: int, updates: int, device: torch.device) -> str:
    """The costliest kernels or operators over some updates."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with record(activities=activities) as recorded:
        for step in range(first, first + updates):
            trainer.update(step)
    averages = recorded.key_averages()
    cost = {each.key: float(each.self_device_time_total if on_gpu else each.self_cpu_time_total) for each in averages}
    total = sum(cost.values()) or 1.0
    calls = {each.key: int(each.count) for each in averages}
    ranked = sorted(cost, key=lambda key: -cost[key])[:COSTS]
    rows = [
        (key[:90], f"{100 * cost[key] / total:.1f}", f"{cost[key] / 1000 / updates:.3f}", calls[key]) for key in ranked
    ]
    top = sum(cost[key] for key in ranked[:_TOP]) / total
    return table(("kernel", "%", "ms an update", "calls"), rows) + f"\nthe {_TOP} costliest: {100 * top:.1f} %"
