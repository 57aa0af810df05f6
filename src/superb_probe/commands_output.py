"""How commands print: aligned tables for people, one JSON document for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines with aligned columns; numbers to the right.

    >>> print(table(("name", "n"), [("fbank", 3), ("x", 12)]))
    name    n
    fbank   3
    x      12
    """
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) and bool(rows) for i in range(len(header))]
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    import dataclasses
    from collections.abc import Mapping
    from pathlib import Path

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"not JSON: {type(value).__name__}")


@contextlib.contextmanager
def stdout_to_stderr(active: bool) -> Iterator[None]:
    """While a command computes, nothing but its document may reach stdout."""
    if not active:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
