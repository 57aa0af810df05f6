"""CUDA C++ compiled when it is first needed, by the run-time compiler (NVRTC) that torch brings: nothing at install time.

A kernel is a `.cu` file of this folder and a set of macros. What is compiled for a device is kept for the process.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from superb_probe.errors import CheckError

SOURCES = Path(__file__).parent
COMMON = "values.cuh"  # what every source begins with
_MAX_DYNAMIC_SHARED_BYTES = 8  # the driver's number of that attribute of a function
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Value: TypeAlias = "ctypes.Structure | ctypes.Array[Any] | ctypes._SimpleCData[Any]"  # an argument of a kernel


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels can run on values of a type: on an NVIDIA GPU, bfloat16 from compute capability 8.0 on.

    >>> can_run(torch.device("cpu"), torch.float32)
    False
    """
    if device.type != "cuda" or torch.version.cuda is None or dtype not in KINDS:
        return False
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0)


def shared_limit_bytes(device: torch.device) -> int:
    """The most memory that the threads of a block can share."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def processor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class KernelError(CheckError):
    """A kernel that could not be compiled or started on this machine."""


def _load(name: str, folders: list[Path]) -> ctypes.CDLL:
    """A shared library by name, looked for by the loader and then in `folders`."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        for folder in folders:
            for path in sorted(folder.glob(f"**/{name}*")):
                for builtins in path.parent.glob(name.replace("nvrtc.so", "nvrtc-builtins.so") + "*"):
                    ctypes.CDLL(str(builtins))  # the compiler finds it by name once it is loaded
                return ctypes.CDLL(str(path))
    raise KernelError(f"{name} was not found. Fix: install a CUDA build of torch, or use the plain back end")


@functools.cache
def _compiler() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise KernelError(f"torch {torch.__version__} has no CUDA. Fix: install a CUDA build of torch")
    major = torch.version.cuda.partition(".")[0]
    packages = [Path(entry) / "nvidia" for entry in sys.path if entry and (Path(entry) / "nvidia").is_dir()]
    return _load(f"libnvrtc.so.{major}", [*packages, Path(torch.__file__).parent / "lib"])


@functools.cache
def _driver() -> ctypes.CDLL:
    return _load("libcuda.so.1", [])


@functools.cache
def compile_source(name: str, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Machine code of `SOURCES/name` for an architecture such as "sm_90".

    Raises:
        KernelError: with the compiler's words.
    """
    nvrtc = _compiler()
    source = (SOURCES / COMMON).read_bytes() + (SOURCES / name).read_bytes()
    program = ctypes.c_void_p()
    _check_nvrtc(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None), name)
    flags = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{key}={value}" for key, value in macros)]
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    status = nvrtc.nvrtcCompileProgram(program, len(flags), encoded)
    if status:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelError(f"{name} does not compile for {architecture}: {log.value.decode()}")
    size = ctypes.c_size_t()
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), name)
    code = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBIN(program, code), name)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _check_nvrtc(nvrtc: ctypes.CDLL, status: int, name: str) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"{name}: the run-time compiler says {nvrtc.nvrtcGetErrorString(status).decode()}")


@functools.cache
def _function(name: str, entry: str, macros: tuple[tuple[str, int], ...], device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(name, macros, f"sm_{major}{minor}")
    driver = _driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check_driver(driver.cuModuleLoadData(ctypes.byref(module), code), name)
    _check_driver(driver.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), name)
    return function


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The context that torch works in on a device."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check_driver(_driver().cuDeviceGet(ctypes.byref(handle), device), "context")
    _check_driver(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "context")
    return context


def _check_driver(status: int, name: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{name}: the CUDA driver says {(text.value or b'?').decode()} ({status})")


def in_pairs(x: torch.Tensor) -> bool:
    """Whether two neighbouring channels of (B, T, E) can be read at once, everywhere."""
    return x.data_ptr() % (2 * x.element_size()) == 0 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0


def launch(
    name: str,
    entry: str,
    macros: Mapping[str, int],
    device: torch.device,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Value],
    shared_bytes: int = 0,
) -> None:
    """Start a kernel on the current stream of a device.

    Args:
        name: the `.cu` file.
        entry: the kernel in it.
        macros: what its source asks to be defined.
        device: a CUDA device.
        grid: blocks.
        threads: of a block.
        arguments: the kernel's arguments in order, as ctypes values.
        shared_bytes: of memory shared by a block beyond what the source declares; at most `shared_limit_bytes`.

    Raises:
        KernelError: if it cannot be compiled or started.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        # A thread of autograd may not have used the device yet: then no context is current in it.
        _check_driver(_driver().cuCtxSetCurrent(_context(index)), name)
        function = _function(name, entry, tuple(sorted(macros.items())), index)
        if shared_bytes:
            _check_driver(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes), name)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
        status = _driver().cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, pointers, None)
        _check_driver(status, name)
