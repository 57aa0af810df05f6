"""Extraction: audio decoded ahead, padded and copied beside the encoder, reduced where it was encoded, checked behind.

Four things go on at once: threads (with a GPU, processes) decode the batches to come, threads pad them and start their copy to the
GPU, the caller's thread encodes, and threads wait for what is kept and check it. On a GPU copies both ways run beside the encoder,
from and to pinned memory, and the host waits for nothing but the encoder itself.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Utterance
from superb_probe.errors import CheckError, all_at_once
from superb_probe.probes.store_codec import finite_bounds, is_finite, pack
from superb_probe.probes.store_decode import Decoders, possible, shared_decoders
from superb_probe.probes.store_keeping import Keeping
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask, to_device

IN_FLIGHT = 2  # encoded batches that wait to be checked; twice as many where they are copied out of pinned memory
CHUNK_S = 10.0  # seconds of audio that are decoded in one go: some milliseconds
PACKERS = 2  # threads that pad batches


@dataclass(slots=True)
class Clock:
    """Where the time of an extraction went.

    Attributes:
        decode_s: the encoder waited for audio.
        keep_s: it waited for states on their way to where they are kept.
        write_s: it waited for files to be written.
        total_s: in all.
    """

    decode_s: float = 0.0
    keep_s: float = 0.0
    write_s: float = 0.0
    total_s: float = 0.0

    def limiting(self) -> str:
        """The stage that took longest and its share of the time; empty when nothing was extracted.

        >>> Clock(decode_s=1.0, write_s=0.5, total_s=10.0).limiting()
        'limited by encoding, 85 % of the time'
        """
        if self.total_s <= 0:
            return ""
        stages = {"decoding": self.decode_s, "keeping": self.keep_s, "writing": self.write_s}
        stages["encoding"] = self.total_s - sum(stages.values())
        stage = max(stages, key=lambda name: stages[name])
        return f"limited by {stage}, {100 * stages[stage] / self.total_s:.0f} % of the time"


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_processes(device: torch.device) -> Decoders | None:
    """The processes that decode for an encoder on a device: none on a CPU, which is busy encoding and slower than two threads."""
    if device.type != "cuda" or not possible():
        return None
    return shared_decoders(max(1, available_cores() - 1))


def chunks(utterances: Iterable[Utterance], chunk_s: float = CHUNK_S) -> Iterator[list[Utterance]]:
    """Utterances in order, in pieces of about so many seconds.

    >>> rows = [Utterance(str(n), "a.wav", 0.0, 4.0, {}) for n in range(5)]
    >>> [len(chunk) for chunk in chunks(rows)]
    [3, 2]
    """
    chunk: list[Utterance] = []
    seconds = 0.0
    for utterance in utterances:
        chunk.append(utterance)
        seconds += utterance.duration_s
        if seconds >= chunk_s:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch whose waveforms are where they are encoded, or on their way there.

    Attributes:
        utterances: of the batch.
        pieces: how many waveforms are encoded of each.
        samples: of every waveform.
        frames: that the upstream gives for each.
        waves: on the CPU, where the upstream pads them itself; empty elsewhere.
        padded: (B, S) on the GPU.
        lengths: (B,) samples, there.
        counts: (B,) frames, there.
        arrived: when the copy is done; None where there is none.
    """

    utterances: Sequence[Utterance]
    pieces: Sequence[int]
    samples: Sequence[int]
    frames: Sequence[int]
    waves: Sequence[Tensor]
    padded: Tensor | None = None
    lengths: Tensor | None = None
    counts: Tensor | None = None
    arrived: Any = None

    @property
    def names(self) -> list[str]:
        """Whose each waveform is."""
        return [u.id for u, count in zip(self.utterances, self.pieces, strict=True) for _ in range(count)]


class Extractor:
    """Puts utterances through an upstream and gives what is kept of each, in order.

    Attributes:
        clock: where the time went.
        encoded: waveforms put through the upstream.
        audio_s: seconds of audio in them.
    """

    def __init__(
        self,
        upstream: Upstream,
        root: Path,
        keeping: Keeping,
        *,
        pinned: bool = False,
        decoders: Decoders | None = None,
    ) -> None:
        """An extractor for audio below a folder.

        Args:
            upstream: frozen encoder, where it runs.
            root: folder of the audio.
            keeping: what is kept.
            pinned: what comes from a GPU may lie in pinned memory: for who lets go of it soon.
            decoders: processes that decode; None for those of this interpreter with a GPU, for two threads without.
        """
        self._pinned = pinned
        self.upstream, self.root, self.keeping = upstream, root, keeping
        self.clock, self.encoded, self.audio_s = Clock(), 0, 0.0
        parameter = next(upstream.parameters(), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        on_gpu = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._feeds = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._decoders = decoders or decoding_processes(self.device)
        self.workers = self._decoders.count if self._decoders is not None else available_cores() if on_gpu else 2
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
        readers = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        packers = ThreadPoolExecutor(PACKERS, thread_name_prefix="pad")
        most = 2 * IN_FLIGHT if self._feeds is not None and self.keeping.device.type == "cpu" else IN_FLIGHT
        checkers = ThreadPoolExecutor(most, thread_name_prefix="check")
        ahead: deque[tuple[int, Future[Loaded]]] = deque()
        in_flight: deque[tuple[Encoding, Future[list[Tensor]]]] = deque()
        coming = iter(batches)
        try:
            while True:
                while sum(count for count, _ in ahead) < 2 * self.workers or len(ahead) < 2:
                    following = next(coming, None)
                    if following is None:
                        break
                    decoded = [readers.submit(self.read, chunk) for chunk in chunks(following)]
                    ahead.append((len(decoded), packers.submit(self.collect, following, decoded)))
                if not ahead:
                    break
                waited = time.perf_counter()
                loaded = ahead.popleft()[1].result()
                self.clock.decode_s += time.perf_counter() - waited
                encoding = self.start(loaded)
                in_flight.append((encoding, checkers.submit(encoding.finish)))
                if len(in_flight) > most:
                    encoding, future = in_flight.popleft()
                    encoding.wait_encoded()
                    waited = time.perf_counter()
                    kept = future.result()
                    self.clock.keep_s += time.perf_counter() - waited
                    self.clock.total_s = time.perf_counter() - started
                    yield encoding.utterances, kept
            for encoding, future in in_flight:
                kept = future.result()
                self.clock.total_s = time.perf_counter() - started
                yield encoding.utterances, kept
        finally:
            for pool in (readers, packers, checkers):
                pool.shutdown(cancel_futures=True)

    def read(self, utterances: Sequence[Utterance]) -> list[Tensor]:
        """The whole waveforms (S,) of some utterances."""
        rate, waveform = self.upstream.info.sample_rate_hz, self.keeping.waveform
        if self._decoders is not None:
            waves = self._decoders.read(utterances, self.root, rate, waveform)
        else:
            waves = [read_waveform(utterance, self.root, rate, waveform) for utterance in utterances]
        return [torch.from_numpy(wave) for wave in waves]

    def collect(self, batch: Sequence[Utterance], decoded: Sequence[Future[list[Tensor]]]) -> Loaded:
        """A batch whose audio is being decoded."""
        waves = [wave for future in decoded for wave in future.result()]
        rate = self.upstream.info.sample_rate_hz
        return self.load(batch, [self.keeping.cut(wave, u, rate) for wave, u in zip(waves, batch, strict=True)])

    def load(self, batch: Sequence[Utterance], waves: Sequence[Sequence[Tensor]]) -> Loaded:
        """A batch ready to be encoded; `waves` are the waveforms that are encoded of each utterance.

        Raises:
            RequestError: if some are too short for a frame: all of them are named.
        """
        flat = [piece for pieces in waves for piece in pieces]
        info, samples = self.upstream.info, [wave.numel() for wave in flat]
        loaded = Loaded(batch, [len(pieces) for pieces in waves], samples, self._expected(samples), flat)
        short = [
            f"utterance {name}: {count} samples after effects, {count / info.sample_rate_hz:.3f} s"
            for name, count, frames in zip(loaded.names, samples, loaded.frames, strict=True)
            if frames < 1
        ]
        if short:
            raise all_at_once(f"{info.name}: too short for one frame", short, "leave them out of the manifest")
        if self._feeds is None or type(self.upstream).extract is not Upstream.extract:
            return loaded
        padded = torch.empty(len(flat), max(samples), pin_memory=True)
        for row, wave in enumerate(flat):
            padded[row, : wave.numel()] = wave
            padded[row, wave.numel() :] = 0
        with torch.cuda.stream(self._feeds):
            given = [to_device(each, self.device) for each in (padded, torch.tensor([samples, loaded.frames]))]
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._feeds)
        lengths, counts = given[1].unbind()
        return replace(loaded, waves=(), padded=given[0], lengths=lengths, counts=counts, arrived=arrived)

    def _expected(self, num_samples: Sequence[int]) -> list[int]:
        """Frames of waveforms encoded together; an upstream whose frames depend on the batch (`PaddedUpstream`) says them."""
        in_batch = getattr(self.upstream, "frames_in_batch", None)
        if in_batch is not None:
            return list(in_batch(num_samples))
        return [self.upstream.num_frames(count) for count in num_samples]

    def start(self, loaded: Loaded) -> Encoding:
        """Encode a batch, without waiting for it."""
        layers = self._forward(loaded)
        info, frames = self.upstream.info, loaded.frames
        self.encoded += len(frames)
        self.audio_s += sum(loaded.samples) / info.sample_rate_hz
        _check_shape(info, loaded.names, layers, max(frames))
        device = layers.states.device
        counts = torch.tensor(frames, device=device) if loaded.counts is None else loaded.counts
        reduced = _reduce(layers.states, counts, frames, self.keeping)
        packed = pack(reduced, self.keeping.dtype)
        flags = finite_bounds(reduced, self.keeping.dtype)
        arrival = _Arrival(packed, flags, layers.num_frames, self.keeping.device, self._copies)
        return Encoding(info, loaded, self.keeping, arrival, keep_pinned=self._pinned)

    def _forward(self, loaded: Loaded) -> LayerStates:
        if loaded.padded is None or loaded.lengths is None:
            return self.upstream.extract(loaded.waves)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(loaded.arrived)
        # memory of the other stream: it is not used again before this one is done
        for tensor in (loaded.padded, loaded.lengths):
            tensor.record_stream(current)
        with torch.inference_mode():
            return self.upstream(loaded.padded, loaded.lengths)  # type: ignore[no-any-return]

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
                count = states.shape[1]
                reduced = _reduce(states[:, None], torch.tensor([count]), [count], keeping)
                packed = pack(reduced, keeping.dtype)
                part = packed[0] if keeping.view == "mean" else packed.view(info.num_layers, count, -1)
                finite, kept_finite = finite_bounds(reduced, keeping.dtype).tolist()
                if not kept_finite:
                    _raise_not_finite(info, [utterance], [part], keeping.dtype, finite)
                kept.append(part.to(keeping.device).clone())
            yield batch, kept


class Encoding:
    """A batch that is being encoded.

    Attributes:
        utterances: of the batch.
    """

    def __init__(
        self, info: UpstreamInfo, loaded: Loaded, keeping: Keeping, arrival: _Arrival, *, keep_pinned: bool
    ) -> None:
        """`keep_pinned` leaves the states in the pinned memory that they arrived in."""
        self.utterances = loaded.utterances
        self._info, self._loaded, self._keeping, self._arrival = info, loaded, keeping, arrival
        self._keep_pinned = keep_pinned

    def wait_encoded(self) -> None:
        """Wait until the GPU is done with it, the way to where it is kept aside."""
        self._arrival.wait_encoded()

    def finish(self) -> list[Tensor]:
        """The packed states of each utterance, once they have arrived and are checked."""
        self.check()
        packed = self._arrival.packed
        return self.parts(packed.clone() if packed.is_pinned() and not self._keep_pinned else packed)

    def check(self) -> None:
        """Wait, and see whether the frames are as many as declared and the states finite."""
        (finite, kept_finite), found = self._arrival.wait()
        _check_frames(self._info, self._loaded.names, found, self._loaded.frames)
        if not kept_finite:
            _raise_not_finite(self._info, self._loaded.utterances, self.parts(), self._keeping.dtype, finite)

    def parts(self, packed: Tensor | None = None) -> list[Tensor]:
        """The packed states of each utterance; on a GPU they may still be in the making, in the order of its stream."""
        packed = self._arrival.packed if packed is None else packed
        loaded = self._loaded
        if self._keeping.view == "frames":
            frames, width, layers = loaded.frames, packed.shape[-1], self._info.num_layers
            parts = torch.split(packed, [layers * count for count in frames])
            return [part.view(layers, count, width) for part, count in zip(parts, frames, strict=True)]
        starts = itertools.accumulate(loaded.pieces, initial=0)
        return [
            packed[start] if count == 1 else packed[start : start + count]
            for start, count in zip(starts, loaded.pieces, strict=False)
        ]


class _Arrival:
    """Tensors on their way to where they are kept; from a GPU on a stream of their own, beside the next batch.

    Attributes:
        packed: where they are kept; whole once `wait` has returned.
    """

    def __init__(
        self, packed: Tensor, flags: Tensor, num_frames: Tensor, device: torch.device, copies: Any = None
    ) -> None:
        self._event: Any = None
        self._encoded: Any = None
        if packed.device.type == "cuda":
            self._encoded = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._encoded.record(torch.cuda.current_stream(packed.device))
            copies.wait_event(self._encoded)
            with torch.cuda.stream(copies):
                self._flags, self._frames = _to_host(flags), _to_host(num_frames)
                self.packed = packed.to(device) if device.type == "cuda" else _to_host(packed)
                for tensor in (packed, flags, num_frames):  # freed only when they are copied
                    if tensor.device.type == "cuda":
                        tensor.record_stream(copies)
                self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a core that spins decodes nothing
                self._event.record(copies)
        else:
            self.packed, self._flags, self._frames = packed.to(device), flags, num_frames

    def wait_encoded(self) -> None:
        """Wait until the tensors are there to be copied."""
        if self._encoded is not None:
            self._encoded.synchronize()

    def wait(self) -> tuple[list[bool], list[int]]:
        """Whether the states (are, will be as they are kept) finite, and the frames the upstream says it gave."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist(), self._frames.tolist()


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _reduce(states: Tensor, lengths: Tensor, frames: Sequence[int], keeping: Keeping) -> Tensor:
    """What is kept of states (L, B, T, D): means (B, L, D), or the frames of every layer of every utterance (R, D), no padding.

    Args:
        states: of a batch.
        lengths: (B,) frames, where the states are.
        frames: the same, on the host.
        keeping: what is kept.
    """
    if keeping.view == "frames":
        return states.reshape(-1, states.shape[-1]).index_select(0, _frame_rows(states.shape, lengths, frames))
    states = states.masked_fill(~frame_mask(lengths, states.shape[2])[None, :, :, None], 0.0)
    if keeping.layer_norm:  # zero frames stay zero
        states = nn.functional.layer_norm(states.float(), states.shape[-1:])
    return (states.sum(2, dtype=torch.float32) / lengths[None, :, None]).transpose(0, 1)


def _frame_rows(shape: Sequence[int], lengths: Tensor, frames: Sequence[int]) -> Tensor:
    """(R,) where the frames of states (L, B, T, D) lie: by utterance, then layer, then time; a GPU is not waited for."""
    layers, batch, longest, _ = shape
    sizes = layers * lengths
    ends = sizes.cumsum(0)
    number = torch.arange(layers * sum(frames), device=lengths.device)
    row = torch.searchsorted(ends, number, right=True)
    within, count = number - (ends - sizes)[row], lengths[row]
    layer = within // count
    return (layer * batch + row) * longest + within - layer * count


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
    info: UpstreamInfo, utterances: Sequence[Utterance], parts: Sequence[Tensor], dtype: str, finite_before: bool
) -> None:
    """Name the first utterance whose kept states are not finite."""
    name = next(u.id for u, part in zip(utterances, parts, strict=True) if not bool(is_finite(part, dtype)))
    fix = (
        f"they overflow {dtype}: keep them as float32 (--feature-dtype float32)"
        if finite_before
        else "`superb-probe check upstream` finds the layer; half precision often is the cause"
    )
    raise CheckError(f"{info.name}, utterance {name}: states that are not finite. Fix: {fix}")
