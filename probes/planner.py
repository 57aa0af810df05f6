"""Where the states of a job are kept: GPU memory, host memory, disk, or nowhere. Chosen by what fits and by measured rates."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError
from superb_probe.probes.plan import readable_bytes
from superb_probe.probes.store import duration_batches, manifest_seconds
from superb_probe.probes.store_extract import Extractor, available_cores
from superb_probe.probes.store_files import room_problem
from superb_probe.probes.store_keeping import Keeping
from superb_probe.upstreams.base import Upstream

Place = Literal["gpu", "memory", "disk", "stream"]
PLACES: tuple[Place, ...] = ("gpu", "memory", "disk", "stream")
GPU_SHARE = 0.5  # of free GPU memory that states may take: heads, optimisers and batches need the rest
MEMORY_SHARE = 0.6
SAMPLE_S = 2.0  # about how long the encoder is timed
DISK_SAMPLE_BYTES = 64 * 2**20
COPY_SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Need:
    """What a job asks of the place its states are kept in.

    Attributes:
        state_bytes: all of them.
        missing_bytes: those that are not on disk yet.
        audio_s: seconds of audio behind them.
        missing_s: seconds that are still to be extracted for a place that keeps them.
        reads_s: seconds of audio whose states training and evaluation read, repeats counted.
        streamed_s: seconds of audio encoded when nothing is kept of the training split.
        crops_anew: training draws new crops each time, which only encoding anew can give.
        padded: states depend on the batch.
    """

    state_bytes: int
    missing_bytes: int
    audio_s: float
    missing_s: float
    reads_s: float
    streamed_s: float
    crops_anew: bool = False
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """What there is to keep states in.

    Attributes:
        gpu_bytes: free memory of the GPU that trains; None without one.
        memory_bytes: free memory of the host; None where the system does not tell.
        store: the folder for stores; None when none is given.
        disk_problem: why the states do not go there; None when they do.
    """

    gpu_bytes: int | None
    memory_bytes: int | None
    store: Path | None
    disk_problem: str | None


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does in a second, as measured.

    Attributes:
        decode: seconds of audio read and decoded, by all threads.
        encode: seconds of audio from files to states.
        disk_bytes: read back from the store's disk; None without a store.
        copy_bytes: from host memory to where training is.
    """

    decode: float
    encode: float
    disk_bytes: float | None
    copy_bytes: float

    def describe(self) -> str:
        """The rates in one line.

        >>> Rates(5000.0, 100.0, None, 2e10).describe()
        'decode 5000 s of audio a second, decode and encode 100, copy 20.0 GB a second'
        """
        disk = f", disk {readable_bytes(self.disk_bytes)} a second" if self.disk_bytes is not None else ""
        return (
            f"decode {self.decode:.0f} s of audio a second, decode and encode {self.encode:.3g}, "
            f"copy {readable_bytes(self.copy_bytes)} a second{disk}"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A place and the numbers behind it.

    Attributes:
        place: where the states are read from in training.
        reason: one line for a person.
        seconds: by place, what extraction and reading would take; empty when nothing was measured.
    """

    place: Place
    reason: str
    seconds: dict[Place, float]


def measure_room(
    device: torch.device, store: Path | None, need: Need, limit_bytes: int | None, *, clean: bool = False
) -> Room:
    """What there is right now; `clean` says that other stores may be deleted for room below the limit."""
    gpu = free_gpu_bytes(device) if device.type == "cuda" else None
    problem = None if store is None else room_problem(store, need.missing_bytes, limit_bytes, clean=clean)
    return Room(gpu, free_memory_bytes(), store, problem)


def free_gpu_bytes(device: torch.device) -> int:
    """GPU memory that is free, and that this process may have (`torch.cuda.set_per_process_memory_fraction`)."""
    free, total = torch.cuda.mem_get_info(device)
    number = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(number) * total - torch.cuda.memory_reserved(number)
    return min(free, int(allowed))


def free_memory_bytes() -> int | None:
    """Memory of the host that is free or can be made free; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def problems(need: Need, room: Room) -> dict[Place, str | None]:
    """By place, why the states cannot be kept there; None where they can."""
    size = readable_bytes(need.state_bytes)
    found: dict[Place, str | None] = {"gpu": None, "memory": None, "disk": None, "stream": None}
    if room.gpu_bytes is None:
        found["gpu"] = "training is not on a GPU"
    elif need.state_bytes > GPU_SHARE * room.gpu_bytes:
        found["gpu"] = f"{size} are more than {GPU_SHARE:.0%} of the {readable_bytes(room.gpu_bytes)} free GPU memory"
    if room.memory_bytes is not None and need.state_bytes > MEMORY_SHARE * room.memory_bytes:
        found["memory"] = (
            f"{size} are more than {MEMORY_SHARE:.0%} of the {readable_bytes(room.memory_bytes)} free memory"
        )
    if room.store is None:
        found["disk"] = "no --store DIR is given"
    elif room.disk_problem is not None:
        found["disk"] = room.disk_problem
    if need.padded:
        found.update(dict.fromkeys(("gpu", "memory", "disk"), "states depend on the batch (--padding s3prl)"))
    elif need.crops_anew:
        found.update(
            dict.fromkeys(("gpu", "memory", "disk"), "new random crops are encoded anew (--crops K keeps some)")
        )
    return found


def choose_place(need: Need, room: Room, rates: Rates | None, asked: Place | None = None) -> Choice:
    """The fastest place among those that the states fit in; without rates, the first that fits.

    Args:
        need: what the job asks.
        room: what there is.
        rates: as measured; None when they were not needed.
        asked: the place somebody wants.

    Raises:
        RequestError: if the states do not fit where they are wanted.
    """
    wrong = problems(need, room)
    if asked is not None:
        if wrong[asked] is not None:
            raise RequestError(f"--states {asked}: {wrong[asked]}. Fix: leave --states out, or --states stream")
        return Choice(asked, f"{asked}, as asked", {} if rates is None else seconds_by_place(need, rates))
    fitting = [place for place in PLACES if wrong[place] is None]
    seconds = {} if rates is None else seconds_by_place(need, rates)
    size = readable_bytes(need.state_bytes)
    room_text = ", ".join(
        f"{readable_bytes(count)} {name}"
        for name, count in (("GPU memory free", room.gpu_bytes), ("host memory free", room.memory_bytes))
        if count is not None
    )
    if not seconds:
        place = fitting[0]
        # encoding is what costs: nothing is gained by keeping what is read less than once
        if need.streamed_s < 0.5 * need.missing_s:
            place = "stream"
        return Choice(place, f"{place}: {size} of states, {room_text}", seconds)
    place = min(fitting, key=lambda each: (seconds[each], PLACES.index(each)))
    weighed = ", ".join(f"{each} {_minutes(seconds[each])}" for each in fitting)
    left = "; ".join(f"not {each}: {text}" for each, text in wrong.items() if text is not None)
    return Choice(place, f"{place}: {size} of states, {room_text}; {weighed}{f'; {left}' if left else ''}", seconds)


def seconds_by_place(need: Need, rates: Rates) -> dict[Place, float]:
    """What extraction and reading take, by place."""
    per_s = need.state_bytes / need.audio_s if need.audio_s else 0.0
    extraction = need.missing_s / rates.encode
    reads = need.reads_s * per_s
    disk = rates.disk_bytes or rates.copy_bytes
    return {
        "gpu": extraction + need.state_bytes / rates.copy_bytes,
        "memory": extraction + reads / rates.copy_bytes,
        "disk": extraction + need.missing_bytes / disk + reads / min(disk, rates.copy_bytes),
        "stream": need.streamed_s / rates.encode,
    }


def needs_rates(need: Need, room: Room) -> bool:
    """Whether the choice depends on what the machine does in a second: it does when neither memory has room, but the disk has."""
    wrong = problems(need, room)
    return wrong["gpu"] is not None and wrong["memory"] is not None and wrong["disk"] is None


def measure_rates(
    upstream: Upstream,
    manifest: Manifest,
    keeping: Keeping,
    store: Path | None,
    *,
    max_batch_s: float = 120.0,
    machine: Rates | None = None,
) -> Rates:
    """Time decoding, encoding, the disk and the copy for a few seconds; the upstream is where it will run.

    What is measured of the `machine` already, its disk and copy, is not measured again.
    """
    device = keeping.device
    decode = _time_decoding(manifest, upstream.info.sample_rate_hz, keeping.waveform)
    return Rates(
        decode,
        time_encoding(upstream, manifest, keeping, max_batch_s=max_batch_s),
        machine.disk_bytes if machine else None if store is None else _time_disk(store),
        machine.copy_bytes if machine else _time_copy(device),
    )


def time_encoding(upstream: Upstream, manifest: Manifest, keeping: Keeping, *, max_batch_s: float = 120.0) -> float:
    """Seconds of audio an upstream gets through in a second, read from files, in the batches a store would make of them.

    Batches from all over the manifest are timed, as many as `SAMPLE_S` seconds allow, after one short one that warms up.
    """
    batches = duration_batches(manifest, max_batch_s, keeping.pieces)
    shortest = batches[-1][-1:]
    extractor = Extractor(upstream, manifest.root, keeping)
    for _ in range(2):
        started = time.perf_counter()
        list(extractor.run([shortest]))
        rough = manifest_seconds(shortest) / (time.perf_counter() - started)
    seconds, taken = 0.0, 0.0
    for number in _spread(len(batches)):
        batch = batches[number]
        if taken == 0.0:  # on a slow machine part of a batch has to do
            fitting = max(1, int(len(batch) * min(1.0, 2 * SAMPLE_S * rough / manifest_seconds(batch))))
            batch = batch[:fitting]
        started = time.perf_counter()
        list(Extractor(upstream, manifest.root, keeping).run([batch]))
        if keeping.device.type == "cuda":
            torch.cuda.synchronize(keeping.device)
        taken += time.perf_counter() - started
        seconds += manifest_seconds(batch)
        if taken >= SAMPLE_S:
            break
    return seconds / taken


def _spread(count: int) -> list[int]:
    """All of the numbers below `count`, the middle first, then ever finer between.

    >>> _spread(5)
    [2, 1, 3, 0, 4]
    """
    order: dict[int, None] = {}
    parts = 2
    while len(order) < count:
        order.update(dict.fromkeys(count * part // parts for part in range(1, parts)))
        if parts > 2 * count:
            order.update(dict.fromkeys(range(count)))
        parts *= 2
    return list(order)


def _time_decoding(manifest: Manifest, sample_rate_hz: int, waveform: str) -> float:
    sample: Sequence[Utterance] = [manifest[number] for number in _spread(len(manifest))[:64]]
    started = time.perf_counter()
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(lambda u: read_waveform(u, manifest.root, sample_rate_hz, waveform).shape, sample))
    return manifest_seconds(sample) / (time.perf_counter() - started)


def _time_disk(store: Path) -> float:
    """Bytes a second read back from the disk of a folder, past the system's cache where it can be dropped."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / f".rate-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with path.open("wb") as stream:
            stream.write(os.urandom(DISK_SAMPLE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        path.read_bytes()
        return DISK_SAMPLE_BYTES / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _time_copy(device: torch.device) -> float:
    """Bytes a second from half precision in host memory to float32 where training is."""
    source = torch.zeros(COPY_SAMPLE_BYTES // 2, dtype=torch.float16, pin_memory=device.type == "cuda")
    target = torch.empty(source.shape, device=device)
    target.copy_(source)
    started = time.perf_counter()
    target.copy_(source.to(device, non_blocking=True))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return COPY_SAMPLE_BYTES / (time.perf_counter() - started)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"
