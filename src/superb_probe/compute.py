"""What an encoder costs as audio gets longer: multiply-accumulates, measured speed and memory, the longest audio that fits."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.bench_machine import synchronize
from superb_probe.errors import RequestError
from superb_probe.official_forward import official_forward
from superb_probe.probes.finetune_model import Regularisation, encode
from superb_probe.streaming import resident_bytes
from superb_probe.upstreams.attention import repeated_shapes
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.convolutions import conv_frames
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import DTYPES, load_upstream
from superb_probe.upstreams.macs import hubert_macs, scan_macs
from superb_probe.upstreams.sizes import FAMILIES, size_config

SAMPLE_RATE_HZ = 16_000
CARDS_BYTES = (16e9, 24e9, 80e9)
SCORE_OPERATIONS = 4
FURTHEST = 10.0  # times the longest audio measured: beyond, a fit says nothing
_SCANS = {"mamba": 1, "mamba2": 1, "ext_bi_mamba": 2, "inn_bi_mamba": 2, "transformer": 0}
# arXiv 2506.12606, figure 1, read off its pixels: GMACs for a second of audio (+-0.1). ExtBiMamba's is of a 94 M model
# whose widths are not published (reference: the released configuration has 147 M parameters).
PAPER_LENGTHS_S = (5, 10, 20, 40, 80, 160, 320)
PAPER_GMACS = {
    "mamba_hubert_causal": (6.1,) * 7,
    "mamba_hubert": (6.85,) * 7,
    "transformer_hubert": (7.25, 7.45, 7.9, 8.85, 10.75, 14.6, 22.2),
    "transformer_hubert_causal": (7.25, 7.45, 7.9, 8.85, 10.75, 14.6, 22.2),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One encoder at one length.

    Attributes:
        upstream: its name.
        variant: "best" (as this project runs it) or "official" (as the released code does).
        mode: "forward", "recorded" (forward with the graph kept, as code without no_grad runs), or "train" (forward and backward).
        dtype: number format.
        audio_s: length.
        status: "done", "out of memory", or "not run" (the time limit, or a shorter one did not fit).
        macs_paper: multiply-accumulates for a second of audio, as the paper counts.
        macs_all: the same with the scan.
        step_s: seconds of one pass; None unless done.
        peak_bytes: memory at its highest: on a GPU all of it, weights too; on a CPU what the pass adds. None unless done.
    """

    upstream: str
    variant: str
    mode: str
    dtype: str
    audio_s: float
    status: str
    macs_paper: float
    macs_all: float
    step_s: float | None = None
    peak_bytes: int | None = None

    @property
    def times_real_time(self) -> float | None:
        """Seconds of audio for a second of computing."""
        return None if self.step_s is None else self.audio_s / self.step_s

    def row(self) -> dict[str, Any]:
        """Its columns."""
        return {**asdict(self), "times_real_time": self.times_real_time}


def macs_of(config: HubertConfig, audio_s: float, mode: str) -> tuple[float, float]:
    """Multiply-accumulates for a second of audio: as the paper counts, and those with the scan.

    The paper's counts follow from the shapes when the scan is left out and four operations are counted for every score of attention:
    one for its scale, three for its softmax (0.5 G a second at 320 s, without which its figure cannot be met). Training is three
    times forward (values, gradients of inputs, gradients of weights), but once only for the front end, which is not trained.

    >>> from superb_probe.upstreams.sizes import FAMILIES, size_config
    >>> [round(each / 1e9, 2) for each in macs_of(size_config("mamba_hubert_causal", "base"), 320.0, "forward")]
    [6.1, 6.24]
    """
    samples = round(audio_s * SAMPLE_RATE_HZ)
    frames = conv_frames(samples, [(kernel, stride) for _, kernel, stride in config.conv_layers])
    frames = -(-frames // config.frame_multiple) * config.frame_multiple
    inner = config.expand * config.dim
    scans = config.num_layers * frames * _SCANS[config.layer_type] * scan_macs(inner, config.state_dim)
    scores = config.num_layers * config.num_heads * frames * frames if config.layer_type == "transformer" else 0
    every = hubert_macs(config, samples) + SCORE_OPERATIONS * scores
    if mode == "train":
        every, scans = 3 * every - 2 * front_end_macs(config, samples), 3 * scans
    return (every - scans) / audio_s, every / audio_s


def front_end_macs(config: HubertConfig, samples: int) -> int:
    """Multiply-accumulates of the convolutional front end over one utterance."""
    return hubert_macs(replace(config, num_layers=0, conv_pos=0, dim=config.conv_layers[-1][0]), samples)


def count(names: Sequence[str], size: str, modes: Sequence[str], lengths_s: Sequence[float]) -> list[Point]:
    """Points with their counts alone, from the shapes.

    >>> [point.status for point in count(["mamba_hubert_causal"], "base", ["forward"], [5.0])]
    ['not run']
    """
    return [
        point
        for name in names
        for mode in modes
        for point in _series(name, size_config(name, size), "best", mode, "float32", lengths_s)
    ]


def measure(
    names: Sequence[str],
    *,
    size: str,
    modes: Sequence[str],
    variants: Sequence[str],
    dtypes: Sequence[str],
    lengths_s: Sequence[float],
    device: torch.device,
    repeats: int = 2,
    time_limit_s: float = math.inf,
    point_limit_s: float = 10.0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """Points of every encoder, variant, mode and number format, lengths ascending; a series ends where memory or time does.

    Args:
        names: of HuBERTs of this project, with random weights and their released front end.
        size: "test", "tiny", "small" or "base".
        modes: "forward", "recorded" and "train", as `Point.mode`.
        variants: "best" and "official".
        dtypes: number formats.
        lengths_s: of audio.
        device: where.
        repeats: timed passes after the first; the fastest counts.
        time_limit_s: no point begins after so long.
        point_limit_s: a series ends when its next point would take longer than this.
        say: told of every point.
    """
    points = []
    began = time.monotonic()
    for dtype in dtypes:
        for name in names:
            upstream = load_upstream(name, size=size, random=0, device=str(device), dtype=dtype)
            if not isinstance(upstream, HubertUpstream):
                raise RequestError(f"{name} is no HuBERT of this project. Fix: one of {', '.join(FAMILIES)}")
            for mode in modes:
                for variant in variants:
                    run = _runner(upstream, mode, variant)
                    series = _series(name, upstream.encoder.config, variant, mode, dtype, lengths_s)
                    for point in _run_series(series, run, device, repeats, began + time_limit_s, point_limit_s):
                        points.append(point)
                        say(describe_point(point))
            del upstream
    return points


def _series(
    name: str, config: HubertConfig, variant: str, mode: str, dtype: str, lengths_s: Sequence[float]
) -> list[Point]:
    return [
        Point(name, variant, mode, dtype, length, "not run", *macs_of(config, length, mode))
        for length in sorted(lengths_s)
    ]


def _runner(upstream: HubertUpstream, mode: str, variant: str) -> Callable[[Tensor], None]:
    """One pass over waveforms (1, S) in the way that mode and variant say."""
    encoder = upstream.encoder
    how = Regularisation(dropout=0.0, layer_drop=0.0)

    def states(wavs: Tensor) -> Tensor:
        if variant == "official":
            kept = official_forward(encoder, wavs.to(encoder.mask_emb.dtype))
            return kept[-1]
        if mode == "forward":
            result: Tensor = upstream(wavs, torch.tensor([wavs.shape[1]], device=wavs.device)).states[-1]
            return result
        return encode(encoder, wavs, torch.tensor([wavs.shape[1]], device=wavs.device), how)[0]

    def run(wavs: Tensor) -> None:
        trained = mode != "forward"
        for parameter in upstream.parameters():
            parameter.requires_grad_(trained)
        for parameter in encoder.feature_extractor.parameters():
            parameter.requires_grad_(trained and variant == "official" and mode == "recorded")
        with torch.set_grad_enabled(trained):
            last = states(wavs)
            if mode == "train":
                last.float().square().mean().backward()  # type: ignore[no-untyped-call]

    return run


def _run_series(
    series: Sequence[Point],
    run: Callable[[Tensor], None],
    device: torch.device,
    repeats: int,
    end: float,
    point_limit_s: float,
) -> Iterator[Point]:
    previous: Point | None = None
    for point in series:
        expected = 0.0
        if previous is not None and previous.step_s is not None:
            ratio = point.audio_s / previous.audio_s
            expected = (
                previous.step_s * ratio * (ratio if previous.audio_s >= 80 and "transformer" in point.upstream else 1)
            )
        stopped = previous is not None and previous.status != "done"
        if stopped or expected > point_limit_s or time.monotonic() > end:
            previous = replace(point, status="not run")
            yield previous
            continue
        wavs = 0.1 * torch.randn(1, round(point.audio_s * SAMPLE_RATE_HZ), generator=torch.Generator().manual_seed(0))
        try:
            with repeated_shapes():  # as training on crops of one length has them
                if previous is None:  # kernels are compiled once a series, which is no part of its first point
                    run(wavs.to(device))
                step_s, peak = _timed(run, wavs.to(device), device, repeats, point_limit_s)
        except (torch.OutOfMemoryError, MemoryError):
            previous = replace(point, status="out of memory")
        except RuntimeError as error:
            if not re.search(r"can't allocate memory|not enough memory", str(error)):
                raise
            previous = replace(point, status="out of memory")
        else:
            previous = replace(point, status="done", step_s=step_s, peak_bytes=peak)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield previous


def _timed(
    run: Callable[[Tensor], None], wavs: Tensor, device: torch.device, repeats: int, point_limit_s: float
) -> tuple[float, int | None]:
    """Seconds of the fastest pass and the highest memory; the first, which compiles and chooses kernels, counts only if it is long."""
    found: list[float] = []
    for number in range(repeats + 1):
        resting = _start_peak(device)
        synchronize(device)
        started = time.perf_counter()
        run(wavs)
        synchronize(device)
        found.append(time.perf_counter() - started)
        if sum(found) > point_limit_s and number:
            break
        if found[0] > point_limit_s / 2:
            break
    peak = _peak(device)
    return min(found[1:] or found), None if peak is None else peak - resting


def _start_peak(device: torch.device) -> int:
    """Begin to watch the highest memory; what the process itself takes, which does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None
    if trim is not None:
        trim(0)  # glibc: freed memory goes back, so that the next pass has to ask for it again
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux: the highest resident size starts again from the present one
    return resident_bytes() or 0


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def longest_s(points: Sequence[Point], limit_bytes: float) -> tuple[float, bool] | None:
    """The longest audio of a series that fits into some memory, and whether that lies beyond what was measured (at most ten times).

    Peaks are fitted by a + b T + c T^2 (none below zero) with relative errors as equal as possible; None below two measured points.

    >>> series = [Point("x", "best", "train", "float32", t, "done", 0, 0, 1.0, int(1e9 + 2e7 * t)) for t in (5.0, 50.0, 500.0)]
    >>> longest_s(series, 16e9)
    (750.0, True)
    """
    measured = [
        (point.audio_s, float(point.peak_bytes)) for point in points if point.peak_bytes and point.status == "done"
    ]
    if len(measured) < 2:
        return None
    a, b, c = _fit(measured)
    room = limit_bytes - a
    if room <= 0:
        return 0.0, False
    if c > 0:
        found = (-b + math.sqrt(b * b + 4 * c * room)) / (2 * c)
    else:
        found = room / b if b > 0 else math.inf
    longest = max(audio_s for audio_s, _ in measured)
    return round(min(found, FURTHEST * longest), 6), found > longest


def _fit(measured: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """a, b and c of a + b T + c T^2 with the least squared relative errors, none of them below zero."""
    times, peaks = np.array(measured).T
    design = np.stack([np.ones_like(times), times, times**2], axis=1) / peaks[:, None]
    best, least = (float(peaks.max()), 0.0, 0.0), math.inf
    for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        found = np.linalg.lstsq(design[:, used], np.ones_like(times), rcond=None)[0]
        error = float(np.square(design[:, used] @ found - 1).sum())
        if (found >= 0).all() and error < least - 1e-18:
            whole = np.zeros(3)
            whole[used] = found
            best, least = (float(whole[0]), float(whole[1]), float(whole[2])), error
    return best


def by_series(points: Sequence[Point]) -> Mapping[tuple[str, str, str, str], list[Point]]:
    """Points by (upstream, variant, mode, dtype)."""
    grouped: dict[tuple[str, str, str, str], list[Point]] = {}
    for point in points:
        grouped.setdefault((point.upstream, point.variant, point.mode, point.dtype), []).append(point)
    return grouped


def describe_point(point: Point) -> str:
    """A line for a person."""
    what = f"{point.upstream} {point.variant} {point.mode} {point.dtype} {point.audio_s:g} s"
    if point.status != "done":
        return f"{what}: {point.status}"
    memory = "" if point.peak_bytes is None else f", {point.peak_bytes / 1e9:.2f} GB"
    return f"{what}: {1000 * (point.step_s or 0):.0f} ms, {point.times_real_time:.0f} x real time{memory}"


def check_request(modes: Sequence[str], dtypes: Sequence[str], lengths_s: Sequence[float]) -> None:
    """Refuse what cannot be measured.

    Raises:
        RequestError: for unknown number formats or lengths too short for a frame.
    """
    problems = [f"unknown dtype {dtype!r}" for dtype in dtypes if dtype not in DTYPES]
    problems += [f"{length:g} s is too short" for length in lengths_s if length < 0.1]
    if problems:
        raise RequestError(f"superb-probe analyze compute: {'; '.join(problems)}. Fix: dtypes {', '.join(DTYPES)}")
