"""How benches time back ends beside each other: in turns within one process, with the memory each needs, against measured peaks."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from superb_probe.bench_machine import synchronize
from superb_probe.upstreams.linear import linear

SLOW_S = 5.0  # a call that takes longer is made once
MIN_TIMED_S = 0.005  # a GPU's work shorter than this is queued several times and timed together
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
_MATRIX = {"cuda": 8192, "cpu": 1536}


def race(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, limit_s: float = 20.0
) -> dict[str, dict[str, Any]]:
    """Time calls in turns, so that what else the machine does meets all of them.

    Args:
        runs: calls by name.
        device: where they run.
        repeats: turns, of which the median counts on a GPU and the quickest on a CPU, which others may share.
        limit_s: no new turn is begun after it.

    Returns:
        By name: "s" wall seconds of a call, "processor_s" of all threads (None on a GPU), "peak_bytes" it took beyond what was
        there before (None if the machine does not say), "repeats". A call that ran out of GPU memory has only "failed".

    >>> race({"nothing": lambda: None}, torch.device("cpu"), 2)["nothing"]["repeats"]
    2
    """
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    taken: dict[str, list[tuple[float, float]]] = {}
    for name, run in runs.items():
        try:
            first, peak = _first_call(run, device)
        except torch.cuda.OutOfMemoryError:
            found[name] = {"failed": "out of GPU memory"}
            torch.cuda.empty_cache()
            continue
        found[name] = {"peak_bytes": peak}
        taken[name] = [first] if first[0] > SLOW_S else []
        counts[name] = max(1, math.ceil(MIN_TIMED_S / max(first[0], 1e-6))) if device.type == "cuda" else 1
    started = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - started > limit_s:
            break
        for name, pairs in taken.items():
            if not pairs or pairs[0][0] <= SLOW_S:
                pairs.append(_call_s(runs[name], device, counts[name]))
    for name, pairs in taken.items():
        walls, processors = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        on_gpu = device.type == "cuda"
        found[name] |= {
            "s": median(walls) if on_gpu else min(walls),
            "processor_s": None if on_gpu else min(processors),
            "repeats": len(pairs),
        }
    return found


def _call_s(run: Callable[[], Any], device: torch.device, count: int) -> tuple[float, float]:
    """Wall and processor seconds of one of `count` calls."""
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        run()
    synchronize(device)
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def cost(timing: Mapping[str, Any]) -> float | None:
    """What ratios are made of: processor seconds where they are known, else wall seconds; None for a call that failed.

    >>> cost({"s": 2.0, "processor_s": 1.5}), cost({"failed": "out of GPU memory"})
    (1.5, None)
    """
    return timing.get("processor_s") or timing.get("s")


def _first_call(run: Callable[[], Any], device: torch.device) -> tuple[tuple[float, float], int | None]:
    """Times of a call, and the memory it takes beyond what was in use, results included; None where that cannot be told."""
    gc.collect()
    if device.type == "cuda":
        run()  # what the first call compiles or keeps is no part of it
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return _call_s(run, device, 1), int(torch.cuda.max_memory_allocated(device)) - before
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest resident size so far
    except OSError:
        return _call_s(run, device, 1), None
    before = _status_bytes("VmRSS")
    taken = _call_s(run, device, 1)
    return taken, max(0, _status_bytes("VmHWM") - before)


def _give_back() -> None:
    """Return what was freed to the system, so that the next call's memory is seen; glibc alone knows how."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def machine_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    """What this machine reaches now, in this process: a copy's bytes a second, a large matrix product's operations, exponentials.

    Args:
        device: where.
        dtype: of the matrix product.

    Returns:
        "copy_bytes_per_s" (read and written), "matmul_flops_per_s" (of torch.mm or `linear`, the faster), and
        "exponentials_per_s": 16 a clock and multiprocessor at the GPU's highest clock, None where that is not known.
    """
    values = _COPY_BYTES[device.type] // 8
    source = torch.ones(values, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = _MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def copy() -> Tensor:
        return target.copy_(source)

    def multiply() -> Tensor:
        return torch.mm(left, right, out=product)

    runs: dict[str, Callable[[], Any]] = {"copy": copy, "multiply": multiply, "linear": lambda: linear(left, right)}
    with torch.inference_mode():
        found = race(runs, device, repeats=8, limit_s=4.0)
    quickest = min(cost(found[name]) or math.inf for name in ("multiply", "linear"))
    return {
        "copy_bytes_per_s": 8 * values / (cost(found["copy"]) or math.nan),
        "matmul_flops_per_s": 2 * size**3 / quickest,
        "exponentials_per_s": _exponentials_per_s(device),
    }


def _exponentials_per_s(device: torch.device) -> float | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    clock_khz = ctypes.c_int()
    attribute = 13  # CU_DEVICE_ATTRIBUTE_CLOCK_RATE, the highest in kHz
    index = torch.cuda.current_device() if device.index is None else device.index
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(clock_khz), attribute, index):
        return None
    return 16.0 * torch.cuda.get_device_properties(device).multi_processor_count * clock_khz.value * 1e3
