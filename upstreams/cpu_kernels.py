"""C++ compiled for this machine's own processor when it is first needed, where there is a compiler; nothing at install time.

A source is compiled once, in about two seconds, and kept in the user's cache, under a name made of the source, the compiler and the
processor. Without a compiler, or with SUPERB_PROBE_CPU_KERNELS=0, what asks for it runs in plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from superb_probe.errors import CheckError

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
SWITCH = "SUPERB_PROBE_CPU_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-ffp-contract=fast")
_TIMEOUT_S = 120


def library() -> ctypes.CDLL | None:
    """The compiled `SOURCE`, or None where it cannot be had; a compiler that fails is warned of once.

    >>> library() is library()
    True
    """
    return None if os.environ.get(SWITCH) == "0" else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(compiled(SOURCE, compiler, cache_folder())))
    except (CheckError, OSError) as error:
        warnings.warn(
            f"{SOURCE.name} cannot be used, plain PyTorch runs instead, which is slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def find_compiler() -> str | None:
    """Path of a C++ compiler: $CXX if set, else the first of `COMPILERS`; None if there is none."""
    wanted = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, (wanted,) if wanted else COMPILERS)), None)


def cache_folder() -> Path:
    """Where compiled sources are kept: $XDG_CACHE_HOME/superb-probe/kernels, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "superb-probe" / "kernels"


def compiled(source: Path, compiler: str, folder: Path) -> Path:
    """The shared library made from a source, compiled if `folder` lacks it.

    Args:
        source: one C++ file.
        compiler: of GCC's or Clang's command line.
        folder: made if needed, for this user alone.

    Raises:
        CheckError: with the compiler's words.
        OSError: if the folder cannot be written.
    """
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = (*_FLAGS, native)
    parts = [source.read_bytes(), " ".join(flags).encode(), compiler.encode(), _version(compiler), _processor()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    kept = folder / f"{source.stem}-{digest}.so"
    if kept.is_file():
        return kept
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / kept.name
        _run([compiler, *flags, str(source), "-o", str(made)])
        made.replace(kept)  # whole or not at all, whoever else compiles it now
    return kept


def _run(words: list[str]) -> bytes:
    try:
        done = subprocess.run(words, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"{words[0]} was stopped after {_TIMEOUT_S} s") from error
    if done.returncode:
        raise CheckError(f"{words[0]} failed: {done.stderr.decode(errors='replace')[-1500:]}")
    return done.stdout


@functools.cache
def _version(compiler: str) -> bytes:
    return _run([compiler, "--version"])


@functools.cache
def _processor() -> bytes:
    """What tells processors apart that do not run the same instructions: a home directory may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"\n".join(
        sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))})
    )


def address(x: Tensor | None) -> int | None:
    """Where a tensor's first element is, for a kernel."""
    return None if x is None else x.data_ptr()


def innermost(x: Tensor) -> Tensor:
    """As it is if the last axis is dense in memory, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_plain_float(*tensors: Tensor | None) -> bool:
    """Whether tensors are what a kernel reads by address: on the CPU and in fp32 memory, no subclass."""
    return all(
        x is None or (type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32)
        for x in tensors
    )
