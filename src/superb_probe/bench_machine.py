"""What a bench says about the machine it ran on, and how it counts and times."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import superb_probe
from superb_probe.errors import CheckError
from superb_probe.upstreams.base import Upstream

_PACKAGES = ("torch", "transformers", "numpy", "soundfile", "triton")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, GPU and versions, as every result of a bench carries them.

    >>> sorted(describe_machine(torch.device("cpu")))
    ['commit', 'cores', 'device', 'gpu', 'memory_bytes', 'platform', 'processor', 'threads', 'versions']
    """
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    versions = {"superb_probe": superb_probe.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = str(torch.__version__)
    return {
        "platform": f"{platform.system()}-{platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": str(device),
        "gpu": gpu,
        "commit": _commit(),
        "versions": versions,
    }


@dataclass(slots=True)
class Passes:
    """Utterances put through an encoder, and the seconds they took with their padding.

    Attributes:
        utterances: rows of all batches.
        batches: calls of the encoder.
    """

    utterances: int = 0
    batches: int = 0


@contextmanager
def counted_passes(upstream: Upstream) -> Iterator[Passes]:
    """Count what goes through an encoder while it lasts, by a forward hook.

    >>> from superb_probe.upstreams.load import load_upstream
    >>> upstream = load_upstream("transformer_hubert", size="test", random=0)
    >>> with counted_passes(upstream) as passes:
    ...     _ = upstream.extract([torch.zeros(800), torch.zeros(1600)])
    >>> passes.utterances, passes.batches
    (2, 1)
    """
    passes = Passes()

    def count(module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
        wavs = arguments[0] if arguments else keywords["wavs"]
        passes.utterances += int(wavs.shape[0])
        passes.batches += 1

    handle = upstream.register_forward_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 1, warm_up: int = 0) -> float:
    """Seconds of one call: the median of some, after some that are not counted.

    >>> timed(lambda: None, torch.device("cpu"), repeats=3) < 1.0
    True
    """
    for _ in range(warm_up):
        work()
    found = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return float(median(found))


def run_side(
    words: Sequence[str],
    result: Path,
    log: Path,
    what: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one side of a bench in a process of its own, and read the JSON document it writes.

    Raises:
        CheckError: if it fails or is stopped; the end of its log is in the message.
    """
    result.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(
                list(words),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckError(f"{what}: stopped after {timeout_s:.0f} s; log: {log}") from error
    if done.returncode != 0 or not result.is_file():
        end = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise CheckError(f"{what} ended with status {done.returncode}; its log ends:\n{end}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit of the checkout this runs from, "-dirty" where files differ; None elsewhere."""
    here = Path(superb_probe.__file__).resolve().parent
    try:
        words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
