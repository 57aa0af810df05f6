"""Records as a pandas DataFrame: `superb_probe.load_records`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.errors import RequestError
from superb_probe.results.record import RunRecord, scan_records


def load_records(*folders: Path | str, strict: bool = True) -> pd.DataFrame:
    """A row for every record under some folders, a column for every field.

    Columns are named as in the file ("upstream.name", "probe.lr", "score.value"); lists and free mappings stay as they are.

    Args:
        folders: of records; none means results/runs.
        strict: whether a file that is no valid record is an error; else it is left out and named in `.attrs["problems"]`.

    Raises:
        RequestError: naming every such file, or a folder that is not there.

    >>> load_records.__name__
    'load_records'
    """
    records, problems = scan_records(folders or ("results/runs",))
    if problems and strict:
        raise RequestError("\n".join(problems))
    table = to_frame(records)
    table.attrs["problems"] = problems
    return table


def to_frame(records: list[RunRecord]) -> pd.DataFrame:
    """A row for every record, a column for every field, in the order of the schema."""
    table: pd.DataFrame = pd.DataFrame([_flat(record.to_dict()) for record in records])
    return table


_OPEN = {"options", "data", "num_items", "extra", "head_options", "packages", "settings"}  # mappings of any keys


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in _OPEN:
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
