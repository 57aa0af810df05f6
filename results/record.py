"""The run record: what one trial was, how its settings were chosen, and the number it got, as one JSON file.

A record is read strictly: an unknown field, a wrong type or a broken rule is an error that names the field. The same rules
stand in `schema.json` (JSON Schema) for readers in other languages; a test holds the two to each other.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from superb_probe.errors import RequestError
from superb_probe.results.typed_json import arguments_of, plain

Overwrite = Literal["never", "failed", "always"]
SCHEMA = "superb-probe/run/1"
_RUN_ID = re.compile(r"[0-9a-f]{8,64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@dataclass(frozen=True, slots=True)
class UpstreamPart:
    """The encoder a record is about: `UpstreamInfo` in JSON, with its size and the options it was built with.

    Attributes:
        macs: multiply-accumulates for a second of audio, in an utterance of ten; None where they were not counted.
    """

    name: str
    revision: str
    num_layers: int
    dim: int
    hop_samples: int
    waveform_norm: str
    sample_rate_hz: int
    lookahead_samples: int | None
    layer_convention: str
    params: int
    trained_on: tuple[str, ...]
    provided_by: str
    options: Mapping[str, Any] = field(default_factory=dict)
    macs: int | None = None


@dataclass(frozen=True, slots=True)
class TaskPart:
    """The task a record is about, and the data that stood for it.

    Attributes:
        dataset: "mini", a published corpus, or "manifest:<name>".
        data: digest of each split's manifest (and trials, as "trials.test").
        num_items: items (utterances, trials) of each split.
    """

    name: str
    version: int
    dataset: str
    fold: str | None
    protocol: Literal["strict", "superb", "mamba_hubert"]
    metric: str
    unit: str
    higher_is_better: bool
    protocol_deviations: tuple[str, ...]
    data: Mapping[str, str]
    num_items: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ProbePart:
    """The probe and how it was trained.

    Attributes:
        layer: the one layer read; None for the weighted sum of all.
        control: "shuffle" when it was trained on shuffled labels; None for the real thing.
    """

    head: str
    view: Literal["mean", "frames"]
    layer_norm: bool
    lr: float
    seed: int
    batch: int
    steps: int
    optimizer: str
    trainable_params: int
    layer: int | None = None
    feature_dtype: str = "float32"
    budget: str = "full"
    control: str | None = None
    accumulate: int = 1
    head_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SelectionPart:
    """Where the settings were chosen.

    Attributes:
        step: the update whose weights were kept.
        value: its metric on `split`.
        curve: (update, metric on `split`) at every evaluation; empty where it was not kept.
    """

    split: Literal["dev", "test"]
    metric: str
    step: int | None
    value: float
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ScorePart:
    """The number: the metric on test, its 95 % interval, how that was made, and further metrics."""

    split: Literal["test"]
    value: float
    ci95: tuple[float, float] | None
    ci: str | None
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightsPart:
    """The trained head, stored beside the record."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class CostPart:
    """What the trial cost; None where it was not measured.

    Attributes:
        encoder_passes: audio encoded, as a multiple of one pass over all splits.
        audio_s: seconds of audio encoded in `extract_s`.
    """

    extract_s: float | None = None
    fit_s: float | None = None
    peak_memory_bytes: int | None = None
    store_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    encoder_passes: float | None = None
    audio_s: float | None = None


@dataclass(frozen=True, slots=True)
class EnvironmentPart:
    """The machine and the software; `settings` are the values resolved from flags, environment and files."""

    superb_probe: str
    commit: str | None
    dirty: bool | None
    python: str
    torch: str
    device: str
    platform: str
    deterministic: bool
    command: str
    packages: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One trial, finished or failed: everything a table or a figure needs.

    Attributes:
        schema: "superb-probe/run/1".
        run_id: hash of all causes of the number, 8 to 64 hexadecimal digits; also the file's name.
        layer_weights: softmax weights of the L layers; None where there is no weighted sum.
        items: file of per-item outcomes beside the record.
        error: what went wrong; None when finished.
        warnings: what a reader must know (unknown speakers, halved utterances, random weights).
        imported_from: the tool and folder a foreign result came from; None for our own.
    """

    run_id: str
    status: Literal["finished", "failed"]
    upstream: UpstreamPart
    task: TaskPart
    probe: ProbePart
    selection: SelectionPart | None
    score: ScorePart | None
    layer_weights: tuple[float, ...] | None
    items: str | None
    probe_weights: WeightsPart | None
    cost: CostPart
    environment: EnvironmentPart
    started_at: str
    finished_at: str
    schema: str = SCHEMA
    error: str | None = None
    warnings: tuple[str, ...] = ()
    imported_from: str | None = None

    def __post_init__(self) -> None:
        """Check the rules a type cannot say.

        Raises:
            RequestError: naming every rule that is broken.
        """
        problems = list(_broken_rules(self))
        if problems:
            raise RequestError(f"run record {self.run_id}: " + "; ".join(problems))

    @property
    def random_weights(self) -> bool:
        """Whether the encoder had random weights."""
        return self.upstream.revision.startswith("random:")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the schema."""
        values = {"schema": self.schema}
        values.update({f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "schema"})
        return values

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "run record") -> RunRecord:
        """The record of a JSON object.

        Args:
            values: what `json.loads` gave.
            where: the file, for messages.

        Raises:
            RequestError: for another schema version, a missing or unknown field, a wrong type or a broken rule; all of them at once.
        """
        if not isinstance(values, Mapping):
            raise RequestError(f"{where}: expected a JSON object, found {type(values).__name__}")
        if values.get("schema") != SCHEMA:
            raise RequestError(
                f"{where}: schema is {values.get('schema')!r}, this version reads {SCHEMA!r}. "
                "Fix: read it with the superb-probe that wrote it, or upgrade: pip install -U superb-probe"
            )
        problems: list[str] = []
        arguments = arguments_of(cls, values, "", problems)
        if problems:
            raise RequestError(f"{where}: " + "; ".join(problems))
        try:
            return cls(**arguments)
        except RequestError as error:
            raise RequestError(
                str(error).replace("run record", where, 1) if where != "run record" else str(error)
            ) from None


def shared_problems(record: Any, schema: str, id_name: str) -> list[str]:
    """What is wrong in the fields that records of runs and of analyses share: schema, id, times, the encoder's shape."""
    problems = []
    if record.schema != schema:
        problems.append(f"schema must be {schema!r}")
    if not _RUN_ID.fullmatch(getattr(record, id_name)):
        problems.append(f"{id_name} must be 8 to 64 hexadecimal digits")
    for name in ("started_at", "finished_at"):
        if not _TIME.fullmatch(getattr(record, name)):
            problems.append(f"{name} must be UTC like 2026-11-22T20:15:03Z")
    for name in ("num_layers", "dim"):
        if getattr(record.upstream, name) < 1:
            problems.append(f"upstream.{name} must be at least 1")
    return problems


def _broken_rules(record: RunRecord) -> list[str]:
    """What is wrong in a record whose types are right."""
    problems = shared_problems(record, SCHEMA, "run_id")
    if record.probe.lr < 0:
        problems.append("probe.lr must not be negative")
    if record.status == "failed":
        problems += ["score must be null in a failed run"] * (record.score is not None)
        problems += ["error must say why the run failed"] * (not record.error)
    else:
        problems += ["error must be null in a finished run"] * (record.error is not None)
        problems += ["score must be there in a finished run"] * (record.score is None)
        problems += ["selection must be there in a finished run"] * (record.selection is None)
    if record.score is not None and record.score.ci95 is not None and record.score.ci95[0] > record.score.ci95[1]:
        problems.append("score.ci95 must be [low, high]")
    if record.selection is not None and record.selection.split != "dev" and record.task.protocol != "superb":
        problems.append(
            f"selection.split must be 'dev' under protocol {record.task.protocol!r}: test scores choose nothing"
        )
    weights = record.layer_weights
    if weights is not None and len(weights) != record.upstream.num_layers:
        problems.append(f"layer_weights has {len(weights)} values for {record.upstream.num_layers} layers")
    return problems


def record_path(folder: Path | str, task: str, upstream: str, run_id: str) -> Path:
    """Where a record stands: `folder/<task>/<upstream>/<run_id>.json`.

    Characters that a path cannot carry everywhere become "_" (names like "hf:org/name"); the run id keeps files apart.

    >>> record_path("runs", "asv", "hf:org/name", "3f9c1ab2").as_posix()
    'runs/asv/hf_org_name/3f9c1ab2.json'
    """
    return Path(folder) / _file_name(task) / _file_name(upstream) / f"{run_id}.json"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "_"


def existing_record(folder: Path | str, task: str, upstream: str, run_id: str) -> RunRecord | None:
    """The record already written for a trial, or None: running twice is running once."""
    path = record_path(folder, task, upstream, run_id)
    return read_record(path) if path.is_file() else None


def may_write(existing: RunRecord | None, overwrite: Overwrite) -> bool:
    """Whether a trial with that record on disk may be run and written (again).

    >>> may_write(None, "never")
    True
    """
    return existing is None or overwrite == "always" or (overwrite == "failed" and existing.status == "failed")


def write_record(
    record: RunRecord,
    items: Mapping[str, Sequence[Any]] | None,
    folder: Path | str,
    overwrite: Overwrite = "never",
) -> Path:
    """Write a record, and its per-item outcomes first, each under a temporary name and then renamed.

    Args:
        record: checked again here, so that nothing invalid reaches the disk; `items` in it is set by this function.
        items: named columns of equal length, or None (a failed run).
        folder: the folder of all records, e.g. results/runs.
        overwrite: "never", "failed" (only a failed record) or "always".

    Returns:
        The record's file.

    Raises:
        RequestError: if the record is invalid, exists and may not be replaced, or the folder cannot be written.
    """
    path = record_path(folder, record.task.name, record.upstream.name, record.run_id)
    if path.is_file() and not may_write(read_record(path), overwrite):
        raise RequestError(f"{path} exists. Fix: --overwrite always (or failed, for failed runs), or another --out")
    items_path = path.with_name(f"{record.run_id}.items.tsv.gz")
    record = dataclasses.replace(record, items=items_path.name if items is not None else None)
    RunRecord.from_dict(record.to_dict())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if items is not None:
            _write_atomically(items_path, _items_bytes(items, items_path))
        _write_atomically(path, record.to_json().encode())
    except OSError as error:
        raise RequestError(
            f"cannot write {path}: {error.strerror or error}. Fix: --out FOLDER that you may write"
        ) from error
    return path


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _items_bytes(items: Mapping[str, Sequence[Any]], path: Path) -> bytes:
    lengths = {name: len(column) for name, column in items.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError(f"{path.name}: columns of different lengths {lengths}")
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(items)
    writer.writerows(zip(*([plain(value) for value in column] for column in items.values()), strict=True))
    # no name and no time in the header: the same outcomes give the same bytes
    return gzip.compress(text.getvalue().encode(), mtime=0)


def read_items(path: Path | str) -> dict[str, list[str]]:
    """The per-item outcomes beside a record: named columns of text.

    Args:
        path: the record's `.json` file.
    """
    record = read_record(path)
    if record.items is None:
        raise RequestError(f"{path}: this record has no per-item outcomes")
    with gzip.open(Path(path).with_name(record.items), "rt", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def read_record(path: Path | str) -> RunRecord:
    """The record in a file.

    Raises:
        RequestError: if it cannot be read, is not JSON or breaks the schema; the message names the file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: not a readable JSON file: {error}") from error
    return RunRecord.from_dict(values, where=str(path))


def scan_records(folders: Iterable[Path | str]) -> tuple[list[RunRecord], list[str]]:
    """All records under some folders, sorted by run id, and a line for every file that is not one.

    The same record found twice counts once; two different records of one run id are a problem.

    Raises:
        RequestError: if a folder is not there.
    """
    found: dict[str, RunRecord] = {}
    problems = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RequestError(
                f"no folder {folder}. Fix: give the folder of run records (--runs), or run something first"
            )
        for path in sorted(folder.rglob("*.json")):
            if path.name.endswith(".analysis.json"):  # results/analysis_record.py reads these
                continue
            try:
                record = read_record(path)
            except RequestError as error:
                problems.append(str(error))
                continue
            if found.setdefault(record.run_id, record) != record:
                problems.append(f"{path}: another record has the run id {record.run_id} and other content; left out")
    return [found[run_id] for run_id in sorted(found)], problems


def read_records(folder: Path | str) -> list[RunRecord]:
    """All records under a folder, sorted by run id.

    Raises:
        RequestError: if a file under it is not a valid record; all such files are named.
    """
    records, problems = scan_records([folder])
    if problems:
        raise RequestError("\n".join(problems))
    return records
