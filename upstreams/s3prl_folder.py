"""A folder with its own expert.py and hubconf.py, written as s3prl's documentation says: `s3prl:./FOLDER[:function]`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from superb_probe.errors import RequestError, nearest

HUBCONF, EXPERT = "hubconf.py", "expert.py"
CLASS = "UpstreamExpert"


def is_folder(name: str) -> bool:
    """Whether what follows `s3prl:` is a folder, with or without a function behind it, not a name that s3prl lists.

    >>> is_folder("hubert_base"), is_folder("./nowhere"), is_folder("./nowhere:mine")
    (False, True, True)
    """
    folder, _ = _parts(name)
    return folder.is_dir() or "/" in str(name).partition(":")[0]


def needs_s3prl(name: str) -> bool:
    """Whether a folder's code imports from s3prl, by its name or as the neighbour it would have there (`from ..interfaces`)."""
    folder, _ = _parts(name)
    for path in sorted(folder.glob("*.py")):
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except SyntaxError:
            continue  # told when it is imported
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        if any(name.split(".")[0] == "s3prl" for name in names):
            return True
        if any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in nodes):
            return True
    return False


def load_expert(name: str, checkpoint: str | None) -> tuple[nn.Module, str]:
    """The expert of a folder, and the sha256 of its code.

    Args:
        name: the folder, with ":function" behind it where its hubconf.py has several.
        checkpoint: given to the function as `ckpt`.

    Raises:
        RequestError: if the folder lacks what is needed, cannot be imported, or does not give an expert.
    """
    folder, function = _parts(name)
    there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    if not {HUBCONF, EXPERT} & {path.name for path in folder.glob("*.py")}:
        raise RequestError(
            f"s3prl:{name}: no {EXPERT} or {HUBCONF} in {folder}; it has {', '.join(there) or 'nothing'}. "
            f"Fix: give a folder with an {EXPERT} (class {CLASS}), and a {HUBCONF} where it is not built by that class alone."
        )
    try:
        build = _builder(name, folder, function)
        expert = build(ckpt=checkpoint) if checkpoint is not None else build()
    except RequestError:
        raise
    except Exception as error:  # a stranger's code may raise anything; the cause is kept and shown
        needs = " Where it needs a checkpoint, give --checkpoint FILE." if checkpoint is None else ""
        raise RequestError(
            f"s3prl:{name}: its code fails: {type(error).__name__}: {error}. Fix: correct {folder}.{needs}"
        ) from error
    if not isinstance(expert, nn.Module) or not callable(getattr(expert, "get_downsample_rates", None)):
        raise RequestError(
            f"s3prl:{name}: it gave {type(expert).__name__}, not a torch.nn.Module with get_downsample_rates. "
            f"Fix: return an {CLASS} as s3prl's upstream/example does."
        )
    return expert, source_digest(folder)


def source_digest(folder: Path) -> str:
    """The sha256 of a folder's Python files and configurations: code that changes gives other states under the same weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml", ".yml", ".json") and "__pycache__" not in path.parts:
            digest.update(f"\n{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _parts(name: str) -> tuple[Path, str]:
    if Path(name).is_dir():
        return Path(name), ""
    folder, separator, function = name.rpartition(":")
    return (Path(folder), function) if separator else (Path(name), "")


def _builder(name: str, folder: Path, function: str) -> Callable[..., Any]:
    """The function of hubconf.py that is asked for, or its only one; without a hubconf.py the class itself."""
    package = _package(folder, "s3prl.upstream" if needs_s3prl(name) else "")
    if not (folder / HUBCONF).is_file():
        if function:
            raise RequestError(
                f"s3prl:{name}: {folder} has no {HUBCONF}, so no function {function!r}. Fix: leave it out."
            )
        expert = importlib.import_module(f"{package}.expert")
        if not hasattr(expert, CLASS):
            raise RequestError(f"s3prl:{name}: {folder / EXPERT} has no class {CLASS}. Fix: define it there.")
        found: Callable[..., Any] = expert.UpstreamExpert
        return found
    hubconf = importlib.import_module(f"{package}.hubconf")
    functions: dict[str, Callable[..., Any]] = {
        key: value
        for key, value in vars(hubconf).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == hubconf.__name__
    }
    if not function and len(functions) == 1:
        return next(iter(functions.values()))
    if function not in functions:
        close = nearest(function, functions) if function else []
        hint = f" Did you mean {close[0]}?" if close else ""
        wanted = f"no function {function!r}" if function else f"{len(functions)} functions"
        known = ", ".join(sorted(functions)) or "none"
        raise RequestError(f"s3prl:{name}: {HUBCONF} has {wanted}.{hint} Fix: s3prl:{folder}:NAME with one of {known}.")
    return functions[function]


def _package(folder: Path, parent: str) -> str:
    """Make the folder a package, below a parent (s3prl's own upstreams, so that `from ..interfaces` finds them) where one is named."""
    resolved = folder.resolve()
    tail = f"superb_probe_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if parent:
        importlib.import_module(parent)
    name = f"{parent}.{tail}" if parent else tail
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]  # the files may have changed since
    importlib.invalidate_caches()
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)  # its own __init__.py, often empty, is not run
    spec.submodule_search_locations = [str(resolved)]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return name
