"""Dataclasses from JSON and back, strictly: every unknown field, missing field and wrong type is found, all in one go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from superb_probe.errors import nearest


def plain(value: Any) -> Any:
    """JSON types of a value: dataclasses and mappings become dicts, tuples lists, numpy scalars Python ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def arguments_of(cls: type, values: Mapping[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """The checked arguments of a dataclass; what is wrong is appended to `problems`."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = nearest(str(name), fields, 1)
            problems.append(f"unknown field {path}{name}" + (f" (did you mean {close[0]}?)" if close else ""))
    arguments = {}
    for name, entry in fields.items():
        if name in values:
            arguments[name] = _checked(_hints(cls)[name], values[name], path + name, problems)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            problems.append(f"missing field {path}{name}")
    return arguments


def _checked(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """A value of the hinted type, or a line in `problems`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (hint,) = (option for option in options if option is not NoneType)
        return _checked(hint, value, path, problems)
    if hint is Any:
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in options:
            problems.append(f"{path} must be {' or '.join(map(repr, options))}, found {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            problems.append(f"{path} must be an object, found {value!r}")
            return value
        inner: list[str] = []
        arguments = arguments_of(hint, value, path + ".", inner)  # type: ignore[arg-type]
        problems += inner
        return value if inner else hint(**arguments)  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path} must be a list, found {value!r}")
            return value
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(kinds) != len(value):
            problems.append(f"{path} must have {len(kinds)} values, found {len(value)}")
            return value
        return tuple(
            _checked(k, v, f"{path}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            problems.append(f"{path} must be an object, found {value!r}")
            return value
        return {key: _checked(options[1], entry, f"{path}.{key}", problems) for key, entry in value.items()}
    return _scalar(hint, value, path, problems)


def _scalar(hint: type, value: Any, path: str, problems: list[str]) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            problems.append(f"{path} must be finite, found {value!r}")
        return float(value)
    if type(value) is not hint:
        kind = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[hint]
        problems.append(f"{path} must be {kind}, found {value!r}")
    return value
