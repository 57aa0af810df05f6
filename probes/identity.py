"""What a cached state depends on: digests of an upstream's weights and of the code that runs it."""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from superb_probe.upstreams.base import Upstream

_PACKAGE = "superb_probe.upstreams"
FACTORS = 2**18  # random numbers that a fingerprint multiplies with
_known: WeakKeyDictionary[Upstream, tuple[tuple[object, ...], str]] = WeakKeyDictionary()


def weights_digest(upstream: Upstream) -> str:
    """The sha256 of every parameter and buffer: name, type, shape and bytes. One changed weight is another digest.

    A model whose `fingerprint` is what it was is not hashed again: stores of several splits ask for the same digest.
    """
    found = fingerprint(upstream)
    known = _known.get(upstream)
    if known is None or known[0] != found:
        known = _known[upstream] = found, _weights_digest(upstream)
    return known[1]


def fingerprint(upstream: Upstream) -> tuple[object, ...]:
    """Names, types, shapes, and 64 bits of the bits of every parameter and buffer, computed where they are, in milliseconds on a GPU.

    The 64 bits are a sum, modulo 2**64, of the numbers' bits times fixed random odd factors: a change of one number always shows,
    a change of several goes unseen once in 2**63.
    """
    tensors = sorted([*upstream.named_parameters(), *upstream.named_buffers()])
    sums = [_bit_sum(tensor.detach()) for _, tensor in tensors]
    by_device: dict[torch.device, list[Tensor]] = {}
    for each in sums:
        by_device.setdefault(each.device, []).append(each)
    numbers = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}  # one wait a device
    return tuple(
        (name, str(tensor.dtype), tuple(tensor.shape), next(numbers[each.device]))
        for (name, tensor), each in zip(tensors, sums, strict=True)
    )


def _bit_sum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    flat = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    factors, total = _factors(flat.device), torch.zeros((), dtype=torch.long, device=flat.device)
    for number, start in enumerate(range(0, flat.numel(), FACTORS)):
        part = flat[start : start + FACTORS].long()
        total += (part * factors[: part.numel()]).sum() * factors[number]
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**62), 2**62, (FACTORS,), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 + 1).to(device)


def _weights_digest(upstream: Upstream) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*upstream.named_parameters(), *upstream.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def source_digest(upstream: Upstream) -> str:
    """The sha256 of the source files an upstream runs: those of its modules' classes and what these import from the package.

    Files outside the package count when one of the classes is defined there; installed libraries are identified by the revision.
    """
    pending = {type(module).__module__ for module in upstream.modules()}
    pending = {name for name in pending if name.startswith(_PACKAGE) or name == type(upstream).__module__}
    pending |= {cls.__module__ for cls in type(upstream).__mro__ if cls.__module__.startswith(_PACKAGE)}
    seen: dict[str, str] = {}
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen[name] = _source(module)
        for value in vars(module).values():
            home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith(_PACKAGE) and home not in seen:
                pending.add(home)
    return hashlib.sha256("".join(f"{name}\n{seen[name]}\n" for name in sorted(seen)).encode()).hexdigest()


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except OSError:  # a class typed at a prompt has no file: its name is all there is
        return repr(module)
