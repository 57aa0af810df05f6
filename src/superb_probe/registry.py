"""The registry: three doors through which an upstream or a task comes in, none of which imports it before it is used.

A name is a file in the tree that lists it in a literal ``PROVIDES``, ``./file.py:function``, or an installed entry point.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .errors import RequestError, unknown_name


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered name and where its builder is.

    Attributes:
        name: what a user types.
        module: dotted module, or the path of a file.
        function: the builder in it.
        provided_by: distribution and version, or the file.
        summary: first line of the module's docstring; empty where reading it would need an import.
    """

    name: str
    module: str
    function: str
    provided_by: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """The builder, imported now.

        Raises:
            RequestError: if the module cannot be imported or lacks the function.
        """
        try:
            module = (
                _import_file(Path(self.module)) if self.module.endswith(".py") else importlib.import_module(self.module)
            )
        except Exception as error:  # a stranger's module may raise anything; the cause is kept and shown
            raise RequestError(
                f"{self.name}: cannot import {self.module}: {type(error).__name__}: {error}. "
                "Fix: `superb-probe doctor` says which packages work and how to mend the others."
            ) from error
        builder = getattr(module, self.function, None)
        if not callable(builder):
            raise RequestError(f"{self.name}: {self.module} has no function {self.function!r}. Fix: define it there.")
        return builder  # type: ignore[no-any-return]


class Registry:
    """The names of one kind (upstreams or tasks) and how to build each.

    >>> "fbank" in Registry("upstream").names()
    True
    """

    def __init__(self, kind: str) -> None:
        """`kind` is "upstream" or "task"."""
        self.kind = kind
        self.package = {"upstream": "superb_probe.upstreams", "task": "superb_probe.downstreams"}[kind]

    def entries(self) -> dict[str, Entry]:
        """Every registered name, without importing what provides it."""
        found = {entry.name: entry for entry in self._in_tree()}
        for point in importlib.metadata.entry_points(group=f"superb_probe.{self.kind}s"):
            module, _, function = point.value.partition(":")
            owner = f"{point.dist.name} {point.dist.version}" if point.dist else "entry point"
            if point.name in found:
                raise RequestError(
                    f"{self.kind} {point.name!r} is provided twice: by {found[point.name].provided_by} and by {owner}. "
                    "Fix: uninstall one, or rename its entry point."
                )
            found[point.name] = Entry(point.name, module, function or point.name, owner, "")
        return found

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        return sorted(name for name in self.entries() if fnmatch(name, pattern))

    def find(self, name: str) -> Entry:
        """The entry of a registered name or of ``./file.py:function``.

        Raises:
            RequestError: for an unknown name (with the nearest ones) or a file that is not there.
        """
        path, separator, function = name.rpartition(":")
        if separator and path.endswith(".py"):
            if not Path(path).is_file():
                raise RequestError(f"{name}: no file {path}. Fix: give the path of a Python file, ./file.py:function.")
            return Entry(function, str(Path(path).resolve()), function, path, "")
        entries = self.entries()
        if name not in entries:
            raise unknown_name(self.kind, name, entries)
        return entries[name]

    def _in_tree(self) -> list[Entry]:
        from . import __version__

        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise RequestError(f"{self.package} is not installed. Fix: pip install -e .")
        entries = []
        for file in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
            provides, summary = read_provides(file)
            module = f"{self.package}.{file.stem}"
            entries += [Entry(name, module, name, f"superb-probe {__version__}", summary) for name in provides]
        return entries


def read_provides(file: Path) -> tuple[tuple[str, ...], str]:
    """The literal ``PROVIDES`` of a file and the first line of its docstring, read without running it."""
    source = file.read_text(encoding="utf-8")
    if "PROVIDES" not in source:
        return (), ""
    tree = ast.parse(source, filename=str(file))
    summary = (ast.get_docstring(tree) or "").split("\n")[0]
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "PROVIDES" for target in targets):
            return tuple(ast.literal_eval(node.value)), summary  # type: ignore[attr-defined]
    return (), summary


def _import_file(path: Path) -> Any:
    name = f"superb_probe_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
