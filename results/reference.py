"""Published numbers: read from `reference/*.json`, shown beside our own in another style, never ranked with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("reference")


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """One published row.

    Attributes:
        upstream: the name as published, with its size where the source tells sizes apart.
        table: the table it stands in; None where the source is a single one.
        params: parameters as published.
        macs: multiply-accumulates as published.
        values: by (task, metric).
        printed: scores printed with the row, by name: never recomputed, never compared with ours.
    """

    upstream: str
    table: int | None
    params: int | None
    macs: float | None
    values: Mapping[tuple[str, str], float]
    printed: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reference:
    """A source of published rows.

    Attributes:
        name: of the file.
        title: of the source.
        source: where the numbers stand.
        protocol: the protocol they were made under.
        notes: what a reader must know.
        units: by metric.
        higher_is_better: by metric.
        score: the score's definition as the source gives it.
        rows: in the source's order.
    """

    name: str
    title: str
    source: str
    protocol: str
    notes: tuple[str, ...]
    units: Mapping[str, str]
    higher_is_better: Mapping[str, bool]
    score: Mapping[str, Any]
    rows: tuple[ReferenceRow, ...]


@cache
def load_reference(name: str) -> Reference:
    """A source that ships: "superb" (the site's leaderboard) or "paper" (Mamba-HuBERT, tables 3 to 6).

    >>> row = load_reference("superb").rows[-1]
    >>> row.upstream, row.values["asr", "wer"]
    ('WavLM Large', 3.44)
    """
    content = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rows = tuple(
        ReferenceRow(
            upstream=row["upstream"] + (f" {row['size'].title()}" if "size" in row else ""),
            table=row.get("table"),
            params=row.get("params"),
            macs=row.get("macs"),
            values={(score["task"], score["metric"]): float(score["value"]) for score in row["scores"]},
            printed={key: row[key] for key in ("superb_s", "superb_full") if key in row},
        )
        for row in content["rows"]
    )
    return Reference(
        name=name,
        title=content["title"],
        source=content["source"],
        protocol=content["protocol"],
        notes=tuple(content["notes"]),
        units=content["units"],
        higher_is_better=content["higher_is_better"],
        score=content["score"],
        rows=rows,
    )
