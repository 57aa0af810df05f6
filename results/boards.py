"""Tables of several tasks: the leaderboard's rows arranged so that only what is comparable shares a table.

A table is one protocol, budget, control, kind of data, reading of the layers and layer norm. Within it a column is one form of a
task: one version, data, head, updates and batch. Where a table would need two forms of one task, the rarer one goes to a table of
its own that says what is different. Published rows have tables of their own and are never ranked with ours.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from superb_probe.results.leaderboard import options_in_words
from superb_probe.results.overlap import MARKS, overlap_notes
from superb_probe.results.reference import Reference, load_reference
from superb_probe.results.score import PAPER4, SUPERB10, site_points, superb_r, superb_s

Row = Mapping[str, Any]
_LINE_KEY = (
    "upstream",
    "revision",
    "weights",
    "upstream_options",
    "waveform_norm",
    "layer_convention",
    "imported_from",
)
_FORM_KEY = (
    "task_version",
    "dataset",
    "data",
    "head",
    "head_options",
    "steps",
    "batch",
    "accumulate",
    "optimizer",
    "feature_dtype",
    "metric",
    "unit",
)
# A task's further metric that stands in its own column, as SUPERB prints it: (name in `extra`, higher is better).
_SECOND = {"sf": ("slot_value_cer", False)}
_BUDGETS = ("full", "small", "quick")
_SCALE = {"percent": 1.0, "x 100": 1.0, "fraction": 100.0}


@dataclass(frozen=True, slots=True)
class Column:
    """A task's column, or its second metric's.

    Attributes:
        detail: what the column's numbers share: data, head, updates; for the heading's explanation.
    """

    task: str
    metric: str
    unit: str
    higher_is_better: bool
    detail: str = ""

    @property
    def heading(self) -> str:
        """Task, metric, unit and direction in a few characters.

        >>> Column("asv", "eer", "percent", False).heading
        'ASV EER % ↓'
        """
        unit = {"percent": "%", "x 100": "×100", "fraction": ""}.get(self.unit, self.unit)
        arrow = "↑" if self.higher_is_better else "↓"
        return " ".join(part for part in (task_name(self.task), metric_name(self.metric), unit, arrow) if part)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the table; `row` is the leaderboard row it came from, None for published numbers."""

    value: float
    low: float | None = None
    high: float | None = None
    row: Row | None = None

    @property
    def overlap(self) -> str:
        """What is known of the encoder's training data and this test set; "none" for published numbers."""
        return "none" if self.row is None else str(self.row["overlap"])

    @property
    def mark(self) -> str:
        """What stands behind the number: "*" for a learning rate at the edge of those tried, then the overlap's mark."""
        edge = "*" if self.row is not None and self.row["edge"] == "edge" else ""
        return edge + MARKS.get(self.overlap, "")


@dataclass(frozen=True, slots=True)
class Line:
    """An upstream's line.

    Attributes:
        name: as shown: with what tells it from another line of the same upstream.
        cells: one a column; None where there is no result.
        scores: by score name, e.g. "superb_s site"; None where a task is missing.
        printed: a published row's own score, as printed.
    """

    name: str
    weights: str
    params: int | None
    macs: float | None
    times_real_time: float | None
    lookahead: str
    cells: tuple[Cell | None, ...]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    printed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Board:
    """One table.

    Attributes:
        title: what all its numbers share.
        settings: the same by name, for filters.
        source: of published rows; empty for our own.
        score_tasks: tasks that each score column is over, by its name.
    """

    title: str
    settings: Mapping[str, str]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    score_tasks: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    source: str = ""

    @property
    def published(self) -> bool:
        """Whether the rows are somebody else's."""
        return bool(self.source)

    @property
    def macs_heading(self) -> str:
        """Ours are for a second of audio, published ones for SUPERB's 32 utterances together."""
        return "MACs, 32 utterances" if self.published else "MACs a second"

    def best(self, column: int) -> tuple[float | None, float | None]:
        """The best and the second-best value of a column, as shown with two decimals."""
        values = {round(line.cells[column].value, 2) for line in self.lines if line.cells[column]}  # type: ignore[union-attr]
        ordered = sorted(values, reverse=self.columns[column].higher_is_better)
        return (ordered[0] if ordered else None, ordered[1] if len(ordered) > 1 else None)


def task_name(task: str) -> str:
    """A task as the field writes it.

    >>> task_name("qbe"), task_name("synthetic_sid")
    ('QbE', 'synthetic_sid')
    """
    if task == "qbe":
        return "QbE"
    return task.upper() if len(task) <= 3 else task.replace("asr_lm", "ASR with LM")


def metric_name(metric: str) -> str:
    """A metric as the field writes it.

    >>> metric_name("slot_value_cer"), metric_name("accuracy")
    ('CER', 'acc')
    """
    short = {"accuracy": "acc", "slot_type_f1": "F1", "slot_value_cer": "CER", "si_sdri": "SI-SDRi"}
    return short.get(metric, metric.upper() if len(metric) <= 5 else metric.replace("_", " "))


def boards(table: pd.DataFrame, score_tasks: Sequence[str] | None = None) -> list[Board]:
    """Our own tables, the most comparable with the published ones first.

    Args:
        table: of `leaderboard`.
        score_tasks: the tasks that `superb_s site` is over; None takes each table's own.
    """
    tables: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in table.to_dict("records"):
        tables[tuple(_settings(row).values())].append(row)  # type: ignore[arg-type]
    made = []
    for _, rows in sorted(tables.items(), key=lambda entry: _order(_settings(entry[1][0]))):
        for forms, different in _forms(rows):
            made.append(_board(forms, different, score_tasks))
    return made


def _settings(row: Row) -> dict[str, str]:
    data = str(row["dataset"])
    kind = data if data in ("mini", "synthetic") else "own data" if data.startswith("manifest:") else "corpora"
    return {
        "protocol": str(row["protocol"]),
        "budget": str(row["budget"]),
        "control": str(row["control"]) or "none",
        "data": kind,
        "layers": "all layers" if row["layer_choice"] == "all" else "one layer at a time",
        "layer_norm": "layer norm" if row["layer_norm"] else "no layer norm",
    }


def _order(settings: Mapping[str, str]) -> tuple[Any, ...]:
    budget = settings["budget"]
    return (
        settings["control"] != "none",
        settings["layers"] != "all layers",
        _BUDGETS.index(budget) if budget in _BUDGETS else len(_BUDGETS),
        {"corpora": 0, "own data": 1, "mini": 2}.get(settings["data"], 3),
        tuple(settings.values()),
    )


def _forms(rows: Sequence[Row]) -> list[tuple[list[Row], str]]:
    """The rows of one table's settings in as many tables as a task has forms, and how each differs from the first."""
    forms: dict[str, Counter[tuple[Any, ...]]] = defaultdict(Counter)
    for row in rows:
        forms[row["task"]][_form(row)] += 1
    ranked = {
        task: [form for form, _ in sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))]
        for task, counts in forms.items()
    }
    tables = []
    for number in range(max(map(len, ranked.values()))):
        chosen = {task: order[number] for task, order in ranked.items() if number < len(order)}
        members = [row for row in rows if chosen.get(row["task"]) == _form(row)]
        tables.append((members, _difference(ranked, number)))
    return tables


def _form(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _FORM_KEY)


def _difference(ranked: Mapping[str, Sequence[tuple[Any, ...]]], number: int) -> str:
    """What tells the forms of this number from the other forms of their tasks, in words."""
    told = []
    for task, order in sorted(ranked.items()):
        if number < len(order) and len(order) > 1:
            differing = [
                f"{name.replace('_', ' ')} {_short(order[number][i])}"
                for i, name in enumerate(_FORM_KEY)
                if len({form[i] for form in order}) > 1
            ]
            told.append(f"{task_name(task)} with {', '.join(differing)}")
    return "; ".join(told)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _board(rows: Sequence[Row], different: str, score_tasks: Sequence[str] | None) -> Board:
    settings = _settings(rows[0])
    columns = _columns(rows)
    by_line: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        layer = row["layer"] if settings["layers"] != "all layers" else ""
        key = (*(row[name] for name in _LINE_KEY), layer)
        by_line[key].append(row)
    names = _line_names(list(by_line))
    lines = [_line(names[each], members, columns) for each, members in by_line.items()]
    tasks = tuple(dict.fromkeys(column.task for column in columns))
    scored: dict[str, tuple[str, ...]] = {}
    if settings["control"] == "none":  # what shuffled labels reach is no score
        lines, scored = _scored(lines, columns, tasks, score_tasks)
    first = next(iter(scored), "")
    lines.sort(key=lambda line: (line.scores.get(first) is None, -(line.scores.get(first) or 0.0), line.name))
    title = " · ".join((
        f"{settings['protocol']} protocol",
        f"{settings['budget']} budget",
        settings["data"],
        settings["layers"],
        settings["layer_norm"],
        *([] if settings["control"] == "none" else [f"control: {settings['control']}d labels"]),
    ))  # fmt: skip
    return Board(
        title=title + (f" · {different}" if different else ""),
        settings=settings,
        columns=columns,
        lines=tuple(lines),
        score_tasks=scored,
        notes=_notes(rows, settings, scored),
    )


def _columns(rows: Iterable[Row]) -> tuple[Column, ...]:
    first: dict[str, Row] = {}
    second = set()
    for row in rows:
        first.setdefault(row["task"], row)
        if row["task"] in _SECOND and _SECOND[row["task"]][0] in _extra(row):
            second.add(row["task"])
    columns = []
    for task in sorted(first, key=lambda name: (SUPERB10.index(name) if name in SUPERB10 else 99, name)):
        row = first[task]
        detail = (
            f"{row['dataset']}, task version {row['task_version']}, head {row['head']}, {row['steps']} updates of "
            f"{row['batch']} x {row['accumulate']}, {row['optimizer']}, {row['feature_dtype']} states"
        )
        columns.append(Column(task, row["metric"], row["unit"], row["better"] == "higher", detail))
        if task in second:
            name, higher = _SECOND[task]
            columns.append(Column(task, name, row["unit"], higher, detail))
    return tuple(columns)


def _extra(row: Row) -> dict[str, float]:
    return dict(json.loads(row["extra"])) if row["extra"] else {}


def _line_names(keys: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """Names of lines: the upstream's, with whatever else tells apart two lines of one upstream, both trained or both random."""
    labels = (*_LINE_KEY, "layer")
    name, revision, weights, options = (
        labels.index(each) for each in ("upstream", "revision", "weights", "upstream_options")
    )
    alike: dict[tuple[Any, Any], dict[tuple[Any, ...], tuple[Any, ...]]] = defaultdict(dict)
    for key in keys:  # each with its options in words
        alike[key[name], key[weights]][key] = (*key[:options], options_in_words(key[options]), *key[options + 1 :])
    names = {}
    for (first, _), members in alike.items():
        if len(set(members.values())) < len(members):  # digests alone tell them apart
            members = {key: key for key in members}
        told = members.values()
        differing = [i for i in range(len(labels)) if len({each[i] for each in told}) > 1]
        if revision in differing and len({each[options] for each in told}) == len({each[revision] for each in told}):
            differing.remove(revision)  # the options say which
        for key, each in members.items():
            more = [
                each[i] if i == options else f"{labels[i].replace('_', ' ')} {_short(each[i]) or 'default'}"
                for i in differing
            ]
            names[key] = ", ".join([first, *filter(None, more)])
    return names


def _line(name: str, rows: Sequence[Row], columns: Sequence[Column]) -> Line:
    by_task = {row["task"]: row for row in rows}
    cells: list[Cell | None] = []
    for column in columns:
        row = by_task.get(column.task)
        if row is None:
            cells.append(None)
        elif column.metric == row["metric"]:
            cells.append(Cell(float(row["score"]), _number(row["ci95_low"]), _number(row["ci95_high"]), row))
        else:
            value = _extra(row).get(column.metric)
            cells.append(None if value is None else Cell(value, row=row))
    macs = [_number(row["macs"]) for row in rows]
    speeds = [_number(row["times_real_time"]) for row in rows]
    return Line(
        name=name,
        weights=str(rows[0]["weights"]),
        params=int(rows[0]["params"]),
        macs=next((value for value in macs if value is not None), None),
        times_real_time=max((value for value in speeds if value is not None), default=None),
        lookahead=str(rows[0]["lookahead_samples"]),
        cells=tuple(cells),
    )


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _scored(
    lines: Sequence[Line], columns: Sequence[Column], tasks: Sequence[str], wanted: Sequence[str] | None
) -> tuple[list[Line], dict[str, tuple[str, ...]]]:
    """The lines with their scores: one set of tasks and one reference set a column."""
    values = [_values(line, columns) for line in lines]
    found = {key for each in values for key in each}
    whole = [
        task
        for task in (wanted or tasks)
        if all((task, metric) in found for metric in site_points().get(task, {"": 0}))
    ]
    sets: dict[str, tuple[str, ...]] = {}
    if whole and len(whole) == len(wanted or whole):
        sets["superb_s site"] = tuple(whole)
    if sets and set(PAPER4) <= set(whole):
        sets["superb_s journal4"] = PAPER4
    ranks = superb_r(values, whole) if whole and len(lines) > 1 else [None] * len(lines)
    scored = []
    for line, each, rank in zip(lines, values, ranks, strict=True):
        scores: dict[str, float | None] = {}
        for name, over in sets.items():
            scores[name] = superb_s(each, over, "journal4" if name.endswith("journal4") else "site")
        if sets and len(lines) > 1:  # a row without one of the tasks has no rank score here, as it has no superb_s
            scores["superb_r"] = rank if scores["superb_s site"] is not None else None
        scored.append(Line(**{**{name: getattr(line, name) for name in line.__slots__}, "scores": scores}))
    if sets and len(lines) > 1:
        sets["superb_r"] = tuple(whole)
    return scored, sets


def _values(line: Line, columns: Sequence[Column]) -> dict[tuple[str, str], float]:
    return {
        (column.task, column.metric): cell.value * _SCALE[column.unit]
        for column, cell in zip(columns, line.cells, strict=True)
        if cell is not None and column.unit in _SCALE
    }


def _notes(rows: Sequence[Row], settings: Mapping[str, str], scored: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    methods = sorted({str(row["ci"]) for row in rows if row["ci"] != "none"})
    notes = [f"Intervals: 95 %; {'; '.join(methods)}."] if methods else []
    if "superb_s site" in scored:
        over = scored["superb_s site"]
        notes.append(
            f"superb_s site: 0 for SUPERB's FBANK and 1000 for the best of its reference rows, mean over {len(over)} of 10 tasks "
            f"({', '.join(map(task_name, over))}); empty where a task is missing. superb_r counts the rows of this table beaten."
        )
    if "superb_s journal4" in scored:
        notes.append(
            "superb_s journal4: over PR, SID, ER and IC; its points are inferred from the printed scores of a paper."
        )
    if settings["data"] == "mini":
        notes.append("mini is synthesised speech: these numbers and scores say nothing of SUPERB's own corpora.")
    deviations = sorted({str(row["protocol_deviations"]) for row in rows if row["protocol_deviations"]})
    if deviations:
        notes.append(f"Differs from the published protocol: {'; '.join(deviations)}.")
    edges = sorted({str(row["task"]) for row in rows if row["edge"] == "edge"})
    if edges:
        notes.append(f"* the best learning rate is at the edge of those tried ({', '.join(map(task_name, edges))}).")
    short = sorted(
        {f"{row['upstream']} {task_name(row['task'])}" for row in rows if row["failed"] or row["incomplete"]}
    )
    if short:
        notes.append(f"Failed or incomplete runs are left out of: {', '.join(short)}.")
    return (*notes, *overlap_notes(rows, task_name))


def published_boards() -> list[Board]:
    """The published tables that ship: the site's ten tasks, and the Mamba-HuBERT paper's table 6 and tables 3 to 5."""
    site, paper = load_reference("superb"), load_reference("paper")
    ten = [("pr", "per"), ("asr", "wer"), ("ks", "accuracy"), ("qbe", "mtwv"), ("sid", "accuracy"), ("asv", "eer"), ("sd", "der"),
           ("ic", "accuracy"), ("sf", "slot_type_f1"), ("sf", "slot_value_cer"), ("er", "accuracy")]  # fmt: skip
    four = [key for key in ten if key[0] in PAPER4]
    return [
        _published(site, None, ten, "SUPERB's leaderboard, ten tasks", {"superb_s site": SUPERB10}),
        _published(paper, (6,), ten, "Mamba-HuBERT paper, table 6", {}),
        _published(paper, (3, 4, 5), four, "Mamba-HuBERT paper, tables 3 to 5", {}),
    ]


def _published(
    reference: Reference,
    tables: Sequence[int] | None,
    keys: Sequence[tuple[str, str]],
    title: str,
    scored: Mapping[str, tuple[str, ...]],
) -> Board:
    columns = tuple(
        Column(task, metric, reference.units[metric], reference.higher_is_better[metric]) for task, metric in keys
    )
    lines = []
    for row in reference.rows:
        if tables is None or row.table in tables:
            cells = tuple(Cell(row.values[key]) if key in row.values else None for key in keys)
            scores = {name: superb_s(row.values, over) for name, over in scored.items()}
            lines.append(
                Line(
                    row.upstream, "published", row.params, row.macs, None, "", cells, scores, printed=dict(row.printed)
                )
            )
    printed = {"superb_full": "FULL", "superb_s": "SUPERB_S"}
    names = sorted({name for line in lines for name in line.printed})
    notes = [f"{printed[name]} is shown as the source prints it and compares with nothing here." for name in names]
    if scored:
        notes.append("superb_s site is computed from the row by the site's formula.")
    protocol = f"compare with rows of the {reference.protocol} protocol only"
    return Board(
        title=f"{title} ({protocol})",
        settings={"protocol": reference.protocol, "budget": "published", "control": "none", "data": "published"},
        columns=columns,
        lines=tuple(lines),
        score_tasks=dict(scored),
        notes=(*notes, *reference.notes),
        source=reference.source,
    )
