"""Audio decoded in processes of their own: many threads of one interpreter wait for each other and for the encoder's.

Opening a file and taking its samples over holds the interpreter for a part of the millisecond that three seconds of FLAC take, and so
does every operation of the encoder's thread. A worker shares a piece of memory with this process, reads requests from its input and
answers on its output, a line of JSON each. `python -m superb_probe.probes.store_decode FD` is what it runs; it imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Utterance
from superb_probe.errors import CheckError, RequestError

FIRST_BYTES = 4 * 2**20  # of shared memory, which grows with what is asked
SPARE_SAMPLES = 64  # an effect or another rate may round up
FLOAT_BYTES = 4


def possible() -> bool:
    """Whether this system has what the processes need: memory without a file that two of them map (Linux)."""
    return hasattr(os, "memfd_create") and bool(sys.executable)


class Decoders:
    """Processes that decode. Any number of threads may ask at once; each waits for a process that is free.

    Attributes:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        """Starts them and does not wait until they are up."""
        self.count = count
        self._workers = [_Worker() for _ in range(count)]
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def read(
        self, utterances: Sequence[Utterance], root: Path, sample_rate_hz: int, waveform: str = "none"
    ) -> list[NDArray[np.float32]]:
        """The samples (S,) of some utterances, as `read_waveform` gives them.

        Raises:
            RequestError: as `read_waveform` does.
            CheckError: if the process that decodes ended.
        """
        worker = self._free.get()
        try:
            return worker.read(utterances, root, sample_rate_hz, waveform)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process and the memory shared with it."""

    def __init__(self) -> None:
        self._file = os.memfd_create("superb-probe-decode")  # type: ignore[attr-defined, unused-ignore]
        self._memory: mmap.mmap | None = None
        self._bytes = 0
        words = [sys.executable, "-m", "superb_probe.probes.store_decode", str(self._file)]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._file],
            env={**os.environ, **one_thread},
        )

    def read(
        self, utterances: Sequence[Utterance], root: Path, sample_rate_hz: int, waveform: str
    ) -> list[NDArray[np.float32]]:
        room = sum(int(u.duration_s * sample_rate_hz + SPARE_SAMPLES) for u in utterances) * FLOAT_BYTES
        if room > self._bytes:
            self._grow(max(room, FIRST_BYTES))
        rows = [[u.id, u.audio, u.start_s, u.duration_s] for u in utterances]
        answer = self._ask(
            {"bytes": self._bytes, "root": str(root), "rate": sample_rate_hz, "waveform": waveform, "utterances": rows}
        )
        if "problem" in answer:
            raise RequestError(answer["problem"])
        if "defect" in answer:
            raise RuntimeError(f"in a process that decodes: {answer['defect']}")
        assert self._memory is not None
        found, start = [], 0
        for count in answer["samples"]:
            found.append(np.frombuffer(self._memory, np.float32, count, start).copy())
            start += count * FLOAT_BYTES
        return found

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # it ended before it read what was asked last
                    stream.close()
        self._process.wait()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # ValueError: closed
            line = b""
        if not line:
            status = self._process.poll()
            raise CheckError(
                f"a process that decodes audio ended (status {status}). Fix: free memory, or see its message above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _grow(self, size: int) -> None:
        os.ftruncate(self._file, size)
        if self._memory is not None:
            self._memory.close()
        self._memory, self._bytes = mmap.mmap(self._file, size), size


@cache
def shared_decoders(count: int) -> Decoders:
    """The processes of this interpreter, started when they are first asked for; they end with it."""
    made = Decoders(count)
    atexit.register(made.close)
    return made


def _serve(file: int) -> None:
    """Answer requests until there are no more."""
    memory: mmap.mmap | None = None
    size = 0
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["bytes"] != size or memory is None:
            size = request["bytes"]
            if memory is not None:
                memory.close()
            memory = mmap.mmap(file, size)
        try:
            answer: dict[str, Any] = {"samples": _decode(request, memory)}
        except RequestError as error:
            answer = {"problem": str(error)}
        except Exception:  # noqa: BLE001  whatever it is, it is raised again where the request came from
            answer = {"defect": traceback.format_exc()}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _decode(request: dict[str, Any], memory: mmap.mmap) -> list[int]:
    """Put the samples of all utterances into the memory, one after the other; how many each has."""
    counts, start = [], 0
    for name, audio, start_s, duration_s in request["utterances"]:
        utterance = Utterance(name, audio, start_s, duration_s, {})
        wave = read_waveform(utterance, Path(request["root"]), request["rate"], request["waveform"])
        np.frombuffer(memory, np.float32, wave.size, start)[:] = wave
        counts.append(wave.size)
        start += wave.nbytes
    return counts


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked is interrupted, and closes the input
    try:
        _serve(int(sys.argv[1]))
    except BrokenPipeError:
        os._exit(0)
