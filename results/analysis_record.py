"""The analysis record: what was measured of the layers of one encoder, as one JSON file beside the run records.

Its name ends in `.analysis.json`, which is how the leaderboard knows that it is not a run. It is read as strictly as a run record: an
unknown field, a wrong type or a broken rule is an error that names the field. The same stands in `analysis_schema.json` (JSON Schema)
for readers in other languages; a test holds the two to each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from superb_probe.errors import RequestError
from superb_probe.results.record import EnvironmentPart, UpstreamPart, _write_atomically, record_path, shared_problems
from superb_probe.results.typed_json import arguments_of, plain

SCHEMA = "superb-probe/analysis/1"
ENDING = ".analysis.json"
Kind = Literal["units", "cca", "disentangle"]
KINDS = ("units", "cca", "disentangle")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number.

    Attributes:
        measure: what was measured, e.g. "pnmi", "abx", "cca".
        layer: of which layer; None for a number that belongs to none.
        split: on which utterances.
        value: the number; the mean over seeds where there are several.
        ci95: its 95 % interval, or None.
        seeds: how many it is the mean of.
        where: what else tells it from others, e.g. {"clusters": 100, "change": "noise10", "control": "random units"}.
    """

    measure: str
    layer: int | None
    split: str
    value: float
    ci95: tuple[float, float] | None = None
    seeds: int = 1
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataPart:
    """The speech that was analysed.

    Attributes:
        dataset: "mini" or "manifest:<name>".
        digests: of each split's manifest, and of the alignments and embeddings that were read.
        num_utterances: of each split.
        seconds: of each split.
    """

    dataset: str
    digests: Mapping[str, str]
    num_utterances: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AnalysisRecord:
    """Everything that one analysis found about one encoder.

    Attributes:
        schema: "superb-probe/analysis/1".
        analysis_id: hash of all causes of the numbers, also in the file's name.
        analysis: "units", "cca" or "disentangle".
        upstream: the encoder.
        data: the speech.
        settings: everything chosen, e.g. clusters, seeds, limits.
        chosen: what dev data chose, e.g. the layer of each number of clusters.
        measurements: the numbers.
        ci: how the intervals were made.
        files: what was written beside the record, by what it holds.
        warnings: what a reader must know (random weights, utterances left out).
    """

    analysis_id: str
    analysis: Kind
    upstream: UpstreamPart
    data: DataPart
    settings: Mapping[str, Any]
    chosen: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    ci: str
    files: Mapping[str, str]
    environment: EnvironmentPart
    seconds: float
    started_at: str
    finished_at: str
    schema: str = SCHEMA
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the rules a type cannot say.

        Raises:
            RequestError: naming every rule that is broken.
        """
        problems = shared_problems(self, SCHEMA, "analysis_id")
        for number, each in enumerate(self.measurements):
            if each.layer is not None and not 0 <= each.layer < self.upstream.num_layers:
                problems.append(f"measurements[{number}].layer must be 0 to {self.upstream.num_layers - 1}")
            if each.ci95 is not None and each.ci95[0] > each.ci95[1]:
                problems.append(f"measurements[{number}].ci95 must be [low, high]")
        if problems:
            raise RequestError(f"analysis record {self.analysis_id}: " + "; ".join(problems))

    @property
    def label(self) -> str:
        """The encoder's name, with "(random)" where its weights are."""
        return self.upstream.name + (" (random)" if self.upstream.revision.startswith("random:") else "")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types, the schema first."""
        values = {"schema": self.schema}
        values.update({f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "schema"})
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str = "analysis record") -> AnalysisRecord:
        """The record of a JSON object.

        Raises:
            RequestError: for another schema, a missing or unknown field, a wrong type or a broken rule; all of them at once.
        """
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
            raise RequestError(
                f"{where}: schema is {found!r}, this version reads {SCHEMA!r}. Fix: the superb-probe that wrote it."
            )
        problems: list[str] = []
        arguments = arguments_of(cls, values, "", problems)
        if problems:
            raise RequestError(f"{where}: " + "; ".join(problems))
        try:
            return cls(**arguments)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None


def analysis_path(folder: Path | str, analysis: str, upstream: str, analysis_id: str) -> Path:
    """Where an analysis record stands.

    >>> analysis_path("runs", "units", "fbank", "3f9c1ab2").as_posix()
    'runs/analyze_units/fbank/3f9c1ab2.analysis.json'
    """
    return record_path(folder, f"analyze_{analysis}", upstream, analysis_id).with_suffix(ENDING)


def write_analysis(record: AnalysisRecord, folder: Path | str) -> Path:
    """Write a record whole or not at all; one of the same causes is replaced.

    Raises:
        RequestError: if it is invalid or cannot be written.
    """
    AnalysisRecord.from_dict(record.to_dict())
    path = analysis_path(folder, record.analysis, record.upstream.name, record.analysis_id)
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, text.encode())
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}. Fix: another --out.") from error
    return path


def read_analysis(path: Path | str) -> AnalysisRecord:
    """The record in a file.

    Raises:
        RequestError: if it cannot be read, is not JSON or breaks the schema; the message names the file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: not a readable JSON file: {error}") from error
    return AnalysisRecord.from_dict(values, where=str(path))


def read_analyses(folders: Iterable[Path | str]) -> list[AnalysisRecord]:
    """All analysis records under some folders, in the order of their files.

    Raises:
        RequestError: if a folder is not there, or a file is not a valid record.
    """
    found: dict[str, AnalysisRecord] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RequestError(f"no folder {folder}. Fix: the folder of records (--runs), or analyze something first.")
        for path in sorted(folder.rglob(f"*{ENDING}")):
            record = read_analysis(path)
            found.setdefault(record.analysis_id, record)
    return list(found.values())


def as_table(records: Iterable[AnalysisRecord]) -> pd.DataFrame:
    """A row a number, with the encoder and the data it is of; what a record's CSV holds."""
    rows: list[dict[str, Any]] = []
    for record in records:
        about = {
            "analysis": record.analysis,
            "upstream": record.label,
            "revision": record.upstream.revision,
            "dataset": record.data.dataset,
        }
        for each in record.measurements:
            low, high = each.ci95 or (None, None)
            rows.append({**about, "split": each.split, "measure": each.measure, "layer": each.layer, **each.where,
                         "value": each.value, "ci95_low": low, "ci95_high": high, "seeds": each.seeds})  # fmt: skip
    table: pd.DataFrame = pd.DataFrame(rows)
    if len(table):
        numbers = ["value", "ci95_low", "ci95_high", "seeds"]
        table = table[[name for name in table.columns if name not in numbers] + numbers]
        table["layer"] = table["layer"].astype("Int64")
    return table
