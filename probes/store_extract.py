"""Extraction: audio decoded ahead in threads, encoded in batches of similar length, reduced where it was encoded, checked behind.

Three things go on at once: threads decode the batches to come, the caller's thread encodes, and one thread brings what is kept
to the host and checks it. On a GPU copies both ways run beside the encoder, from and to pinned memory.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import View
from superb_probe.downstreams.manifest import Utterance
from superb_probe.errors import CheckError, all_at_once
from superb_probe.probes.store_codec import finite, is_finite, pack
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask

IN_FLIGHT = 2  # encoded batches that wait to be checked
Draw = Callable[[int], int]  # a whole number below the one given


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of an utterance.

    Attributes:
        view: "mean" or "frames".
        dtype: in which it is kept.
        layer_norm: normalise every frame before the mean.
        waveform: effects applied to the audio first.
        crops: random stretches kept of an utterance longer than `crop_s`, in view "mean"; 0 keeps all of it.
        crop_s: their length.
        crop_seed: draws where they begin.
        device: where it is kept.
    """

    view: View
    dtype: str
    layer_norm: bool
    waveform: str
    crops: int
    crop_s: float | None
    crop_seed: int
    device: torch.device

    def pieces(self, utterance: Utterance) -> tuple[float, int]:
        """Seconds and number of what is encoded of an utterance."""
        if self.crop_s is None or self.crops == 0 or utterance.duration_s <= self.crop_s:
            return utterance.duration_s, 1
        return self.crop_s, self.crops

    def cut(self, wave: Tensor, utterance: Utterance, sample_rate_hz: int, draw: Draw | None = None) -> list[Tensor]:
        """What is encoded of a waveform (S,): all of it, or crops at places that depend on the seed and the audio alone.

        Args:
            wave: the samples.
            utterance: whose they are.
            sample_rate_hz: their rate.
            draw: where one crop begins, for who encodes anew each time; None for the stored ones.
        """
        length = int(self.crop_s * sample_rate_hz) if self.crop_s is not None else 0
        if length == 0 or wave.numel() <= length or (draw is None and self.crops == 0):
            return [wave]
        if draw is not None:
            start = draw(wave.numel() - length + 1)
            return [wave[start : start + length]]
        words = f"{self.crop_seed} {utterance.audio} {utterance.start_s!r} {utterance.duration_s!r}"
        generator = random.Random(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big"))
        starts = [generator.randrange(wave.numel() - length + 1) for _ in range(self.crops)]
        return [wave[start : start + length] for start in starts]


@dataclass(slots=True)
class Clock:
    """Where the time of an extraction went.

    Attributes:
        decode_s: the encoder waited for audio.
        write_s: it waited for files to be written.
        total_s: in all.
    """

    decode_s: float = 0.0
    write_s: float = 0.0
    total_s: float = 0.0

    def limiting(self) -> str:
        """The stage that took longest and its share of the time; empty when nothing was extracted.

        >>> Clock(decode_s=1.0, write_s=0.5, total_s=10.0).limiting()
        'limited by encoding, 85 % of the time'
        """
        if self.total_s <= 0:
            return ""
        stages = {"decoding": self.decode_s, "writing": self.write_s}
        stages["encoding"] = self.total_s - sum(stages.values())
        stage = max(stages, key=lambda name: stages[name])
        return f"limited by {stage}, {100 * stages[stage] / self.total_s:.0f} % of the time"


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Extractor:
    """Puts utterances through an upstream and gives what is kept of each, in order.

    Attributes:
        clock: where the time went.
        encoded: waveforms put through the upstream.
        audio_s: seconds of audio in them.
    """

    def __init__(
        self, upstream: Upstream, root: Path, keeping: Keeping, workers: int | None = None, *, pinned: bool = False
    ) -> None:
        """An extractor for audio below a folder.

        Args:
            upstream: frozen encoder, where it runs.
            root: folder of the audio.
            keeping: what is kept.
            workers: threads that decode; None for as many as cores with a GPU, two without.
            pinned: what comes from a GPU may lie in pinned memory: for who lets go of it soon.
        """
        self._pinned = pinned
        self.upstream, self.root, self.keeping = upstream, root, keeping
        self.clock, self.encoded, self.audio_s = Clock(), 0, 0.0
        parameter = next(upstream.parameters(), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        on_gpu = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._workers = workers or (available_cores() if self.device.type == "cuda" else 2)
        self.states_for = getattr(upstream, "states_for", None)

    def run(self, batches: Sequence[Sequence[Utterance]]) -> Iterator[tuple[Sequence[Utterance], list[Tensor]]]:
        """The packed states of every batch: (L, D), (K, L, D) with crops, or (L, T, D), parts of one tensor a batch.

        Raises:
            RequestError: if utterances are too short for a frame (all of a batch are named) or audio cannot be read.
            CheckError: if states are not finite or not of the declared shape, with the utterance.
        """
        if self.states_for is not None:
            yield from self._ready_made(batches)
            return
        started = time.perf_counter()
        readers = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        checker = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="check")
        ahead: deque[list[Future[list[Tensor]]]] = deque()
        in_flight: deque[tuple[Sequence[Utterance], Future[list[Tensor]]]] = deque()
        coming = iter(batches)
        try:
            for batch in batches:
                while sum(map(len, ahead)) < 2 * self._workers or len(ahead) < 2:
                    following = next(coming, None)
                    if following is None:
                        break
                    ahead.append([readers.submit(self.read, utterance) for utterance in following])
                waited = time.perf_counter()
                waves = [future.result() for future in ahead.popleft()]
                self.clock.decode_s += time.perf_counter() - waited
                in_flight.append((batch, checker.submit(self._encode(batch, waves))))
                if len(in_flight) > IN_FLIGHT:
                    done, future = in_flight.popleft()
                    self.clock.total_s, kept = time.perf_counter() - started, future.result()
                    yield done, kept
            for done, future in in_flight:
                kept = future.result()
                self.clock.total_s = time.perf_counter() - started
                yield done, kept
        finally:
            readers.shutdown(cancel_futures=True)
            checker.shutdown(cancel_futures=True)

    def read(self, utterance: Utterance, draw: Draw | None = None) -> list[Tensor]:
        """The waveforms of an utterance that are encoded."""
        rate = self.upstream.info.sample_rate_hz
        wave = torch.from_numpy(read_waveform(utterance, self.root, rate, self.keeping.waveform))
        return self.keeping.cut(wave, utterance, rate, draw)

    def encode(self, batch: Sequence[Utterance], waves: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The packed states of a batch whose waveforms are there."""
        return self._encode(batch, waves)()

    def _encode(self, batch: Sequence[Utterance], waves: Sequence[Sequence[Tensor]]) -> Callable[[], list[Tensor]]:
        """Start a batch; what comes back waits for it, checks it and takes it apart."""
        info = self.upstream.info
        owners = [row for row, pieces in enumerate(waves) for _ in pieces]
        flat = [piece for pieces in waves for piece in pieces]
        expected = [self.upstream.num_frames(piece.numel()) for piece in flat]
        short = [
            f"utterance {batch[owner].id}: {piece.numel()} samples after effects, {piece.numel() / info.sample_rate_hz:.3f} s"
            for owner, piece, frames in zip(owners, flat, expected, strict=True)
            if frames < 1
        ]
        if short:
            raise all_at_once(f"{info.name}: too short for one frame", short, "leave them out of the manifest")
        layers = self._forward(flat)
        self.encoded += len(flat)
        self.audio_s += sum(piece.numel() for piece in flat) / info.sample_rate_hz
        names = [batch[owner].id for owner in owners]
        _check_shape(info, names, layers, max(expected))
        lengths = _to_device(torch.tensor(expected), layers.states.device)
        valid = frame_mask(lengths, layers.states.shape[2])
        states = layers.states.masked_fill(~valid[None, :, :, None], 0.0)
        reduced = _reduce(states, lengths, self.keeping)
        packed = pack(reduced, self.keeping.dtype)
        kept_finite = is_finite(packed, self.keeping.dtype)
        flags = torch.stack([kept_finite if packed is reduced else finite(reduced), kept_finite])
        arrived = _Arrival(packed, flags, layers.num_frames, self.keeping.device, self._copies)

        def finish() -> list[Tensor]:
            kept, (finite, kept_finite), found = arrived.wait()
            _check_frames(info, names, found, expected)
            if not kept_finite:
                _raise_not_finite(info, names, kept, self.keeping, finite)
            if kept.is_pinned() and not self._pinned:
                kept = kept.clone()
            mean = self.keeping.view == "mean"
            parts = [kept[row] if mean else kept[:, row, :length] for row, length in enumerate(expected)]
            whole: list[Tensor] = []
            for row, pieces in enumerate(waves):
                mine = (
                    [part for part, owner in zip(parts, owners, strict=True) if owner == row] if len(pieces) > 1 else []
                )
                whole.append(torch.stack(mine) if mine else parts[owners.index(row)])
            return whole

        return finish

    def _forward(self, waves: list[Tensor]) -> LayerStates:
        """The states of some waveforms, copied to the GPU beside what it does."""
        if self.device.type != "cuda" or type(self.upstream).extract is not Upstream.extract:
            return self.upstream.extract(waves)
        lengths = torch.tensor([wave.numel() for wave in waves])
        padded = torch.zeros(len(waves), int(lengths.max()), pin_memory=True)
        for row, wave in enumerate(waves):
            padded[row, : wave.numel()] = wave
        with torch.inference_mode():
            given = padded.to(self.device, non_blocking=True)
            return self.upstream(given, _to_device(lengths, self.device))  # type: ignore[no-any-return]

    def _ready_made(self, batches: Sequence[Sequence[Utterance]]) -> Iterator[tuple[Sequence[Utterance], list[Tensor]]]:
        """States computed elsewhere, read by utterance id."""
        info, keeping = self.upstream.info, self.keeping
        for batch in batches:
            kept = []
            for utterance in batch:
                states = torch.as_tensor(self.states_for(utterance.id))  # type: ignore[misc]
                if (
                    states.ndim != 3
                    or states.shape[0] != info.num_layers
                    or states.shape[2] != info.dim
                    or not len(states[0])
                ):
                    raise CheckError(
                        f"{info.name}, utterance {utterance.id}: states of shape {tuple(states.shape)}, expected "
                        f"(L={info.num_layers}, T, D={info.dim}). Fix: `superb-probe check upstream` says what the adapter gets wrong"
                    )
                reduced = _reduce(states[:, None], torch.tensor([states.shape[1]]), keeping)
                packed = pack(reduced, keeping.dtype)
                if not bool(is_finite(packed, keeping.dtype)):
                    finite = bool(torch.isfinite(reduced).all())
                    _raise_not_finite(info, [utterance.id], packed, keeping, finite)
                kept.append((packed[0] if keeping.view == "mean" else packed[:, 0]).to(keeping.device).clone())
            yield batch, kept


class _Arrival:
    """Tensors on their way to where they are kept; from a GPU on a stream of their own, beside the next batch."""

    def __init__(
        self, packed: Tensor, flags: Tensor, num_frames: Tensor, device: torch.device, copies: Any = None
    ) -> None:
        self._event: Any = None
        if packed.device.type == "cuda":
            copies.wait_stream(torch.cuda.current_stream(packed.device))
            with torch.cuda.stream(copies):
                self._flags, self._frames = _to_host(flags), _to_host(num_frames)
                self._packed = packed.to(device) if device.type == "cuda" else _to_host(packed)
                for tensor in (packed, flags, num_frames):  # freed only when they are copied
                    if tensor.device.type == "cuda":
                        tensor.record_stream(copies)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(copies)
        else:
            self._packed, self._flags, self._frames = packed.to(device), flags, num_frames

    def wait(self) -> tuple[Tensor, list[bool], list[int]]:
        """What was kept, whether (it was before, it is) finite, and the frames the upstream says it gave."""
        if self._event is not None:
            self._event.synchronize()
        return self._packed, self._flags.tolist(), self._frames.tolist()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on a device; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _reduce(states: Tensor, lengths: Tensor, keeping: Keeping) -> Tensor:
    """What is kept of states (L, B, T, D), zero past `lengths`: means (B, L, D), or the states."""
    if keeping.view == "frames":
        return states
    states = states.float()
    if keeping.layer_norm:  # zero frames stay zero
        states = nn.functional.layer_norm(states, states.shape[-1:])
    return (states.sum(2) / lengths[None, :, None]).transpose(0, 1)


def _check_shape(info: UpstreamInfo, names: Sequence[str], layers: LayerStates, frames: int) -> None:
    shape = tuple(layers.states.shape)
    wanted = (info.num_layers, len(names), info.dim)
    if len(shape) != 4 or (shape[0], shape[1], shape[3]) != wanted:
        raise CheckError(
            f"{info.name}, utterance {names[0]}: states of shape {shape}, expected (L={info.num_layers}, B={len(names)}, T, "
            f"D={info.dim}). Fix: `superb-probe check upstream` says what the adapter gets wrong"
        )
    if shape[2] < frames:
        _check_frames(info, names, layers.num_frames.tolist(), [frames] * len(names))
        raise CheckError(f"{info.name}: states of {shape[2]} frames, `num_frames` says {frames}")


def _check_frames(info: UpstreamInfo, names: Sequence[str], found: Sequence[int], expected: Sequence[int]) -> None:
    wrong = [
        f"utterance {name}: {got} frames, `num_frames` says {want}"
        for name, got, want in zip(names, found, expected, strict=True)
        if got != want
    ]
    if wrong:
        raise CheckError(f"{info.name}: " + "; ".join(wrong) + ". Fix: `superb-probe check upstream`")


def _raise_not_finite(
    info: UpstreamInfo, names: Sequence[str], kept: Tensor, keeping: Keeping, finite_before: bool
) -> None:
    """Name the first utterance whose kept states are not finite."""
    rows = kept if keeping.view == "mean" else kept.transpose(0, 1)
    name = next(name for name, row in zip(names, rows, strict=True) if not bool(is_finite(row, keeping.dtype)))
    fix = (
        f"they overflow {keeping.dtype}: keep them as float32 (--feature-dtype float32)"
        if finite_before
        else "`superb-probe check upstream` finds the layer; half precision often is the cause"
    )
    raise CheckError(f"{info.name}, utterance {name}: states that are not finite. Fix: {fix}")
