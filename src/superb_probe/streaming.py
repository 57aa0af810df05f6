"""Audio through a streaming encoder and, where there is one, its recogniser, as it arrives: transcript, delays, speed, memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.probes.finetune_heads import GreedyStream, HeadStream
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.stream import Stream

TRACE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Recogniser:
    """What turns the states of an encoder into tokens.

    Attributes:
        read: the head's input (T, D) from states (L, T, D).
        head: a head that sees no later frame.
        tokens: its vocabulary in id order, the blank first.
        silent: tokens that are not shown, e.g. the end token.
        spaced: whether a space follows every token (phones); else "|" is shown as a space (characters).
        name: where it comes from, for the report.
    """

    read: Callable[[Tensor], Tensor]
    head: torch.nn.Module
    tokens: tuple[str, ...]
    silent: frozenset[str]
    spaced: bool
    name: str

    def text(self, token: str) -> str:
        """What is shown of a token."""
        if token in self.silent:
            return ""
        return f"{token} " if self.spaced else token.replace("|", " ")


@dataclass(frozen=True, slots=True)
class Emission:
    """One token as it was given.

    Attributes:
        token: which.
        frame_s: start of the frame that it begins in.
        heard_s: audio that had arrived when it was given.
    """

    token: str
    frame_s: float
    heard_s: float


@dataclass(slots=True)
class Report:
    """What streaming one input took.

    Attributes:
        audio_s: length of the input.
        frames: frames given.
        compute_s: time spent encoding and decoding, waiting for audio left out.
        chunk_s: length of a chunk.
        lookahead_s: audio past its own window that a frame waits for.
        window_s: audio of a frame's own window.
        chunk_compute_s: time of every chunk.
        emissions: every token.
        state_bytes: carried from chunk to chunk, the most at any time.
        trace: (audio_s, compute_s, state_bytes, resident_bytes) every ten seconds of audio.
    """

    chunk_s: float
    lookahead_s: float
    window_s: float
    audio_s: float = 0.0
    frames: int = 0
    compute_s: float = 0.0
    chunk_compute_s: list[float] = field(default_factory=list)
    emissions: list[Emission] = field(default_factory=list)
    state_bytes: int = 0
    trace: list[tuple[float, float, int, int | None]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The numbers of the report as plain values.

        `real_time_factor` is compute time over audio time (below 1: faster than real time). `steady_latency_s` is how long after the
        end of a frame's window its states are there: on average half a chunk until the chunk is full, the look-ahead, and the chunk's
        computation; `worst_latency_s` has the whole chunk and the 99th percentile of the computation.
        """
        compute = np.array(self.chunk_compute_s[1:] or self.chunk_compute_s or [0.0])
        first = self.emissions[0] if self.emissions else None
        resident = [each for *_, each in self.trace if each is not None]
        return {
            "audio_s": round(self.audio_s, 3),
            "frames": self.frames,
            "chunk_s": self.chunk_s,
            "lookahead_s": self.lookahead_s,
            "window_s": self.window_s,
            "compute_s": round(self.compute_s, 4),
            "real_time_factor": round(self.compute_s / self.audio_s, 5) if self.audio_s else None,
            "chunk_compute_median_s": float(np.median(compute)),
            "chunk_compute_p90_s": float(np.quantile(compute, 0.9)),
            "steady_latency_s": self.chunk_s / 2 + self.lookahead_s + float(np.median(compute)),
            "worst_latency_s": self.chunk_s + self.lookahead_s + float(np.quantile(compute, 0.99)),
            "first_token_heard_s": None if first is None else first.heard_s,
            "first_token_frame_s": None if first is None else first.frame_s,
            "state_bytes": self.state_bytes,
            "resident_growth_bytes": resident[-1] - resident[0] if len(resident) > 1 else None,
            "tokens": len(self.emissions),
        }


def stream_audio(
    upstream: Upstream,
    chunks: Iterator[Tensor],
    *,
    chunk_s: float,
    recogniser: Recogniser | None = None,
    window_frames: int | None = None,
    stream: Stream | None = None,
    show: Callable[[str], None] | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> Report:
    """Stream audio through an encoder, and its states through a recogniser.

    Args:
        upstream: an encoder that can stream.
        chunks: tensors (S,) as they come.
        chunk_s: how long they are, for the report.
        recogniser: None for states alone.
        window_frames: frames that attention sees; None for all.
        stream: another stream than the upstream's own; `window_frames` is not for it.
        show: given the text of every token as it comes.
        keep: given the states (L, T, D) of every chunk.
    """
    info = upstream.info
    if stream is None:
        stream = upstream.stream(window_frames=window_frames)
    transcriber = None if recogniser is None else _Transcriber(recogniser)
    hop_s, rate = info.hop_samples / info.sample_rate_hz, info.sample_rate_hz
    report = Report(chunk_s, stream.delay_frames * hop_s, _window_samples(upstream) / rate)
    next_trace_s = 0.0

    def take(states: Tensor, started: float) -> None:
        found = [] if transcriber is None else transcriber.push(states)
        if states.is_cuda:
            torch.cuda.synchronize(states.device)
        spent = time.perf_counter() - started
        report.chunk_compute_s.append(spent)
        report.compute_s += spent
        if keep is not None:
            keep(states)
        for frame, token, text in found:
            report.emissions.append(Emission(token, frame * hop_s, stream.num_samples / rate))
            if show is not None:
                show(text)

    for chunk in chunks:
        started = time.perf_counter()
        take(stream.push(chunk), started)
        audio_s = stream.num_samples / rate
        carried = stream.state_bytes + (0 if transcriber is None else transcriber.head.state_bytes)
        report.state_bytes = max(report.state_bytes, carried)
        if audio_s >= next_trace_s:
            report.trace.append((audio_s, report.compute_s, carried, resident_bytes()))
            next_trace_s += TRACE_EVERY_S
    started = time.perf_counter()
    take(stream.finish(), started)
    report.audio_s, report.frames = stream.num_samples / rate, stream.num_frames
    return report


class _Transcriber:
    """A recogniser on states as they come."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser, self.head, self.decoder = recogniser, HeadStream(recogniser.head), GreedyStream()

    @torch.inference_mode()
    def push(self, states: Tensor) -> list[tuple[int, str, str]]:
        """The tokens that the next states (L, T, D) begin: frame, token, and what is shown of it."""
        if not states.shape[1]:
            return []
        tokens, show = self.recogniser.tokens, self.recogniser.text
        found = self.decoder.push(self.head.push(self.recogniser.read(states)))
        return [(frame, tokens[number], show(tokens[number])) for frame, number in found]


def _window_samples(upstream: Upstream) -> int:
    from superb_probe.upstreams.lookahead import window_samples

    return window_samples(upstream)


def resident_bytes() -> int | None:
    """Memory of this process that is in use; None where the system does not say so."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def file_chunks(path: Path, chunk_samples: int, rate_hz: int, loop_s: float | None = None) -> Iterator[Tensor]:
    """The chunks (S,) of an audio file, read as they are asked for.

    Args:
        path: one channel at `rate_hz`.
        chunk_samples: samples of a chunk; the last may be shorter.
        rate_hz: expected rate.
        loop_s: repeat the file until so many seconds have come.

    Raises:
        RequestError: if the file is missing, no audio, or has another rate or several channels.
    """
    import soundfile

    from superb_probe.downstreams.audio import read_header

    header = read_header(path)
    if header.sample_rate_hz != rate_hz or header.num_channels != 1 or not header.num_samples:
        raise RequestError(
            f"{path}: {header.sample_rate_hz} Hz, {header.num_channels} channels, {header.num_samples} samples; "
            f"expected {rate_hz} Hz, one channel. Fix: ffmpeg -i FILE -ar {rate_hz} -ac 1 OUT.wav"
        )
    left = header.num_samples if loop_s is None else round(loop_s * rate_hz)
    rest = np.zeros(0, dtype=np.float32)
    while left > 0:
        for block in soundfile.blocks(str(path), blocksize=chunk_samples, dtype="float32"):
            rest = np.concatenate([rest, block])
            while len(rest) >= min(chunk_samples, left) and left > 0:
                size = min(chunk_samples, left)
                yield torch.from_numpy(rest[:size].copy())
                rest, left = rest[size:], left - size
            if left <= 0:
                return
        if loop_s is None:
            if len(rest):
                yield torch.from_numpy(rest)
            return


def raw_chunks(source: BinaryIO, chunk_samples: int) -> Iterator[Tensor]:
    """The chunks (S,) of raw samples, signed 16 bit, little endian, one channel, as they come: what `ffmpeg -f s16le -` writes.

    >>> import io
    >>> [chunk.tolist() for chunk in raw_chunks(io.BytesIO(bytes([0, 64, 0, 192, 0, 0])), 2)]
    [[0.5, -0.5], [0.0]]
    """
    rest = b""
    while True:
        found = source.read1(2 * chunk_samples - len(rest)) if hasattr(source, "read1") else source.read(2)
        rest += found
        whole = len(rest) // 2 * 2
        if whole == 2 * chunk_samples or (not found and whole):
            yield torch.from_numpy(np.frombuffer(rest[:whole], dtype="<i2").astype(np.float32) / 32768.0)
            rest = rest[whole:]
        if not found:
            if rest:
                raise RequestError("the input ended within a sample. Fix: signed 16-bit samples, little endian")
            return


def recogniser_of_record(
    record: Path, checkpoint: Path | None, root: Path | None, manifest: Mapping[str, Path] | None
) -> tuple[Upstream, Recogniser]:
    """The encoder and the trained CTC probe of a record of asr or pr.

    Raises:
        RequestError: for a record of another task, with a head that sees later frames, or whose weights or encoder are not there.
    """
    from superb_probe.results.record import read_record
    from superb_probe.verification import Data, load_encoder, load_probe, read_states

    found = read_record(record)
    if found.task.name not in ("asr", "pr"):
        raise RequestError(f"{record}: a probe of {found.task.name} writes no transcript. Fix: a record of asr or pr")
    probe = load_probe(record, Data(root, manifest))
    HeadStream(probe.head)  # refuses a head that cannot stream before the encoder is loaded
    upstream = load_encoder(found, None, checkpoint)
    kind = getattr(torch, found.probe.feature_dtype, torch.float32)

    def read(states: Tensor) -> Tensor:
        probe.to(states.device)
        states = read_states(states[:, None], found, kind)
        return (states[0] if probe.weighted_sum is None else probe.weighted_sum(states))[0]

    tokens = tuple(str(token) for token in probe.head.tokens)  # type: ignore[union-attr]
    silent = frozenset(probe.head.drop)  # type: ignore[arg-type]
    return upstream, Recogniser(read, probe.head, tokens, silent, found.task.name == "pr", str(record))


def one_pass_error(upstream: Upstream, wav: Tensor, states: np.ndarray[Any, Any]) -> float:
    """Relative error of streamed states (L, T, D) against one pass over the waveform (S,): the worst layer's.

    Raises:
        RequestError: if the numbers of frames differ.
    """
    whole = upstream.extract([wav]).states[:, 0].float().cpu().numpy()
    if whole.shape != states.shape:
        raise RequestError(f"{states.shape} states were streamed, one pass gives {whole.shape}")
    errors = []
    for streamed, expected in zip(states, whole, strict=True):
        norm = float(np.linalg.norm(expected.astype(np.float64)))
        errors.append(float(np.linalg.norm(streamed.astype(np.float64) - expected)) / norm)
    return max(errors)


def stdin_source() -> BinaryIO:
    """Raw samples from the standard input.

    Raises:
        RequestError: if it is a terminal.
    """
    if sys.stdin.isatty():
        raise RequestError(
            "superb-probe stream -: nothing is piped in. Fix: ffmpeg -i talk.mp3 -f s16le -ac 1 -ar 16000 - | superb-probe stream -"
        )
    return sys.stdin.buffer
