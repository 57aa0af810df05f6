"""The leaderboard as one HTML file: no server, no network, nothing beside it; sortable and filterable, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.results.boards import Board, Cell, Line, task_name
from superb_probe.results.overlap import MARKS, MEANINGS

_HERE = Path(__file__)
_FILTERS = ("protocol", "budget", "data", "control", "layers", "layer_norm", "weights")
# Columns of the table with a row for each result: (heading, column of the leaderboard, is a number).
_DETAIL = (
    ("task", "task", False),
    ("score", "score", True),
    ("95 % low", "ci95_low", True),
    ("95 % high", "ci95_high", True),
    ("interval", "ci", False),
    ("seeds", "seeds", True),
    ("learning rate", "lr", True),
    ("rates tried", "lr_tried", False),
    ("edge", "edge", False),
    ("dev score", "dev_score", True),
    ("dev slope / 1000 updates", "dev_slope", True),
    ("updates", "steps", True),
    ("batch", "batch", True),
    ("protocol", "protocol", False),
    ("budget", "budget", False),
    ("control", "control", False),
    ("data", "dataset", False),
    ("head", "head", False),
    ("layer", "layer", False),
    ("layer norm", "layer_norm", False),
    ("weights", "weights", False),
    ("revision", "revision", False),
    ("trained on", "trained_on", False),
    ("holds the test set", "overlap", False),
    ("warnings", "warnings", False),
)
_WIDE = {"warnings", "interval", "trained on"}


def page(own: Sequence[Board], published: Sequence[Board], table: pd.DataFrame, num_records: int) -> str:
    """The whole file.

    Args:
        own: our tables.
        published: other people's.
        table: the leaderboard's rows, for the table of details.
        num_records: that everything came from.
    """
    css, script = (_HERE.with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    boards = [*own, *published]
    body = "\n".join(_section(board, number) for number, board in enumerate(boards))
    summary = f"{len(table)} result{'' if len(table) == 1 else 's'} from {num_records} records"
    policy = f"default-src 'none'; style-src {_digest(css)}; script-src {_digest(script)}; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>superb-probe leaderboard</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>superb-probe leaderboard</h1>
<p>{summary}. What is not comparable stands in another table. The learning rate was chosen on dev; small figures are 95 % intervals;
bold is the best of a column and underlined the second. Select a heading to sort by it. Dashed tables with italic rows are
published numbers.</p>
</header>
{_form(boards, table)}
<p id="status" role="status" class="quiet"></p>
<main>
{body}
{_details(table)}
</main>
<script>{script}</script>
</body>
</html>
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _form(boards: Sequence[Board], table: pd.DataFrame) -> str:
    found: dict[str, set[str]] = {name: set() for name in _FILTERS}
    for board in boards:
        if not board.published:
            for name in _FILTERS[:-1]:
                found[name].add(board.settings[name])
            found["weights"] |= {line.weights for line in board.lines}
    choices = []
    for name, values in found.items():
        if len(values) > 1:
            options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in sorted(values))
            label = name.replace("_", " ")
            choices.append(
                f'<label>{label}<select name="{name}"><option value="">any</option>{options}</select></label>'
            )
    tasks = list(dict.fromkeys(column.task for board in boards for column in board.columns))
    boxes = "".join(
        f'<label class="box"><input type="checkbox" name="task" value="{escape(task)}" checked>{escape(task_name(task))}</label>'
        for task in tasks
    )
    return f"""<form hidden>
<label class="name">upstream contains<input type="search" name="name" autocomplete="off" spellcheck="false"></label>
{"".join(choices)}
<label class="box"><input type="checkbox" name="published" checked>published rows</label>
<button type="reset">Show all</button>
<fieldset><legend>tasks</legend>{boxes}</fieldset>
</form>"""


def _section(board: Board, number: int) -> str:
    data = " ".join(f'data-{name}="{escape(value)}"' for name, value in board.settings.items())
    kind = "published" if board.published else "own"
    heads = [_head("upstream", "text", "ascending")]
    with_macs = any(line.macs is not None for line in board.lines)
    with_speed = any(line.times_real_time is not None for line in board.lines)
    scores = list(board.score_tasks)
    printed = sorted({name for line in board.lines for name in line.printed})
    heads += [_head(name.replace("journal4", "journal4 (inferred)"), "", "descending") for name in scores]
    heads += [
        _head({"superb_full": "FULL", "superb_s": "SUPERB_S"}[name] + " (printed)", "", "descending")
        for name in printed
    ]
    for column in board.columns:
        first = "descending" if column.higher_is_better else "ascending"
        heads.append(_head(column.heading, "", first, column.task, column.detail))
    heads += [_head("parameters", "", "ascending"), *[_head(board.macs_heading, "", "ascending")] * with_macs]
    heads += [_head("× real time", "", "descending")] * with_speed
    best = [board.best(index) for index in range(len(board.columns))]
    rows = "\n".join(_line(board, line, best, (with_macs, with_speed), scores, printed) for line in board.lines)
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes)
    source = f"<li>Source: {escape(board.source)}</li>" if board.source else ""
    return f"""<section class="{kind}" {data}>
<h2 id="table{number}">{escape(board.title)}</h2>
<div class="scroll" role="region" aria-labelledby="table{number}" tabindex="0">
<table aria-labelledby="table{number}">
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<ul class="notes">{notes}{source}</ul>
</section>"""


def _head(text: str, css: str, first: str, task: str = "", detail: str = "") -> str:
    column = f' data-column="{escape(task)}"' if task else ""
    title = f' title="{escape(detail)}"' if detail else ""
    first_word, _, rest = text.partition(" ")
    rest = rest.replace(" ", "\u00a0") if task else rest  # a metric with its unit and arrow stays on one line
    shown = f"{escape(first_word)} <span>{escape(rest)}</span>" if rest else escape(text)
    return (
        f'<th scope="col" class="{css}" data-first="{first}"{column}><button type="button"{title}>{shown}</button></th>'
    )


def _number(value: float | None, text: str = "") -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '<td data-v=""><span class="vh">none</span><span aria-hidden="true">–</span></td>'
    return f'<td data-n="1" data-v="{value!r}">{text or escape(format(value, "g"))}</td>'


def _line(
    board: Board,
    line: Line,
    best: Sequence[tuple[float | None, float | None]],
    shown: tuple[bool, bool],
    scores: Sequence[str],
    printed: Sequence[str],
) -> str:
    tag = f'<span class="tag">{escape(line.weights)}</span>' if line.weights in ("random", "none") else ""
    tag = tag.replace(">random<", ">random weights<").replace(">none<", ">no weights<")
    cells = [f'<th scope="row" data-v="{escape(line.name.lower())}">{escape(line.name)}{tag}</th>']
    for name in scores:
        value = line.scores.get(name)
        cells.append(_number(value, f"{value or 0:.{2 if name == 'superb_r' else 0}f}"))
    cells += [_number(line.printed.get(name), f"{line.printed.get(name, 0):.2f}") for name in printed]
    for column, cell, (first, second) in zip(board.columns, line.cells, best, strict=True):
        text = "" if cell is None else _cell(cell, first, second, board.published)
        td = _number(None if cell is None else cell.value, text)
        cells.append(td.replace("<td", f'<td data-column="{escape(column.task)}"', 1))
    cells.append(_number(line.params, short_count(line.params)))
    cells += [_number(line.macs, short_count(line.macs))] * shown[0]
    cells += [_number(line.times_real_time, f"{line.times_real_time or 0:.3g}")] * shown[1]
    name = escape(line.name.lower())
    weights = "" if board.published else f' data-weights="{escape(line.weights)}"'
    return f'<tr data-name="{name}"{weights}>{"".join(cells)}</tr>'


def _cell(cell: Cell, first: float | None, second: float | None, published: bool) -> str:
    shown = round(cell.value, 2)
    css = "best" if shown == first else "second" if shown == second else ""
    text = f"{cell.value:.2f}"
    if cell.row is not None and cell.row["edge"] == "edge":
        text += "*"
    text = f'<span class="{css}">{text}</span>' if css and not published else text
    text += _overlap(cell)
    if cell.low is None or cell.high is None:
        return text
    method = escape(str(cell.row["ci"])) if cell.row else ""
    return text + f' <span class="ci" title="{method}">[{cell.low:.2f}, {cell.high:.2f}]</span>'


def _overlap(cell: Cell) -> str:
    """The mark of what the encoder heard of this test set: in words for screen readers, and for a pointer that rests on it."""
    if cell.row is None or cell.overlap not in MARKS:
        return ""
    told = escape(f"{MEANINGS[cell.overlap]}: {cell.row['trained_on'] or 'unknown'}")
    mark = f'<span aria-hidden="true">{MARKS[cell.overlap]}</span>'
    return f'<span title="{told}">{mark}<span class="vh"> ({told})</span></span>'


def short_count(value: float | None) -> str:
    """A count with three digits and its power of a thousand.

    >>> short_count(94_371_712), short_count(1.669e12), short_count(0)
    ('94.4 M', '1.67 T', '0')
    """
    if value is None:
        return ""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {unit}" if value < 1000 * power else f"{value / power:.0f} {unit}"
    return f"{value:g}"


def _details(table: pd.DataFrame) -> str:
    heads = [_head("upstream", "text", "ascending")]
    heads += [_head(heading, "" if number else "text", "ascending") for heading, _, number in _DETAIL]
    rows = "\n".join(_detail_row(row) for row in table.to_dict("records"))
    return f"""<details>
<summary>Every result: how its learning rate was chosen, its interval, its settings</summary>
<section data-detail="">
<h2 id="details">Every result, a row each</h2>
<div class="scroll" role="region" aria-labelledby="details" tabindex="0">
<table aria-labelledby="details">
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</section>
</details>"""


def _detail_row(row: Mapping[Any, Any]) -> str:
    cells: Iterable[str] = (
        _number(_clean(row[name]), f"{row[name]:.4g}" if _clean(row[name]) is not None else "")
        if number
        else f'<td class="text{" wide" if heading in _WIDE else ""}" data-v="{escape(str(row[name]))}">{escape(str(row[name]))}</td>'
        for heading, name, number in _DETAIL
    )
    filters = {
        "protocol": row["protocol"],
        "budget": row["budget"],
        "control": row["control"] or "none",
        "weights": row["weights"],
    }
    data = " ".join(f'data-{name}="{escape(str(value))}"' for name, value in filters.items())
    name = escape(str(row["upstream"]).lower())
    shown = escape(str(row["upstream"]))
    start = (
        f'<tr data-name="{name}" data-task="{escape(row["task"])}" {data}><th scope="row" data-v="{name}">{shown}</th>'
    )
    return f"{start}{''.join(cells)}</tr>"


def _clean(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else value if isinstance(value, int) else float(value)
