"""What a cached state depends on: digests of an upstream's weights and of the code that runs it."""

from __future__ import annotations

import hashlib
import inspect
import sys
from types import ModuleType

import torch
from torch import Tensor

from superb_probe.upstreams.base import Upstream

_PACKAGE = "superb_probe.upstreams"


def weights_digest(upstream: Upstream) -> str:
    """The sha256 of every parameter and buffer: name, type, shape and bytes. One changed weight is another digest."""
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
