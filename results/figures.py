"""Figures of the leaderboard's tables: radar, heatmap, layer weights, learning rates, score against cost.

Each is PNG and SVG with its numbers as CSV beside it, drawn from records alone: the same records give the same bytes. Colours are
Okabe and Ito's, told apart with every kind of colour vision; line style and marker say the same again.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.errors import RequestError
from superb_probe.results.boards import Board, Column, Line, boards, metric_name, task_name
from superb_probe.results.leaderboard import aggregate, dev_by_rate
from superb_probe.results.overlap import MARKS, short_notes
from superb_probe.results.record import RunRecord

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
_DASHES = ("-", "--", "-.", ":")
DPI = 300
COST_WIDTH = 6.4
KINDS = ("scores", "radar", "heatmap", "layers", "rates", "cost")
Drawing = tuple[Any, pd.DataFrame]


def draw(records: Sequence[RunRecord], kind: str, out: Path | str, *, cost: str = "params") -> list[Path]:
    """Draw one kind of figure, once for each table that has what it needs.

    Args:
        records: any mix; what may not share a table never shares a figure.
        kind: "scores", "radar", "heatmap", "layers" (weights of the weighted sum), "rates" (learning rates) or "cost" (Pareto).
        out: the picture; its ending is replaced, and the second table's figure has "_2" before it.
        cost: for kind "cost", what stands on the axis: "params", "macs" or "time" (times real time).

    Returns:
        The files written: PNG, SVG and CSV of each figure.

    Raises:
        RequestError: if there is nothing to draw, or the place cannot be written.
    """
    if kind == "scores":
        from superb_probe.results.plot import plot_scores

        return plot_scores(records, out)
    path = Path(out)
    if path.suffix not in ("", ".png", ".svg"):
        raise RequestError(f"--out {path}: the picture is written as PNG and SVG. Fix: a name ending in .png or .svg.")
    table, _, _ = aggregate(records)
    makers: dict[str, Callable[[Board], Drawing | None]] = {
        "radar": _radar,
        "heatmap": _heatmap,
        "layers": lambda board: _layers(board, {record.run_id: record for record in records}),
        "rates": lambda board: _rates(board, records),
        "cost": lambda board: _cost(board, cost),
    }
    if kind not in makers:
        raise RequestError(f"unknown figure {kind!r}. Fix: one of {', '.join(KINDS)}.")
    written: list[Path] = []
    tables = [board for board in boards(table) if board.settings["control"] == "none"]
    with _style():
        made = [drawing for drawing in map(makers[kind], tables) if drawing is not None]
        if not made:
            raise RequestError(f"nothing to draw as {kind!r} in {len(records)} records: {_NEEDS[kind]}")
        for number, (figure, numbers) in enumerate(made, start=1):
            stem = path.with_suffix("") if number == 1 else path.with_name(f"{path.stem}_{number}")
            written += _save(figure, numbers, stem)
    return written


_NEEDS = {
    "radar": "it needs a table with three tasks or more and two upstreams that have them all.",
    "heatmap": "it needs a finished result.",
    "layers": "it needs a finished result that reads a weighted sum of layers.",
    "rates": "it needs a task with two learning rates or more.",
    "cost": "it needs a finished result whose encoder's cost is in the record.",
}


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.hashsalt": "superb-probe",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.titlesize": 9,
            "figure.titlesize": 10,
        }
    )


def _new(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, numbers: pd.DataFrame, stem: Path) -> list[Path]:
    files: dict[Path, bytes] = {}
    for kind in ("png", "svg"):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
        files[stem.with_name(f"{stem.name}.{kind}")] = content.getvalue()
    text = numbers.to_csv(index=False, lineterminator="\n", float_format="%.6g")
    files[stem.with_name(f"{stem.name}.csv")] = text.encode()
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for file, content_bytes in files.items():
            file.write_bytes(content_bytes)
    except OSError as error:
        raise RequestError(f"cannot write {stem}: {error.strerror or error}. Fix: another --out.") from error
    return list(files)


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[(number // len(_COLORS)) % len(_DASHES)],
    }


def _legend_columns(names: Iterable[str], width: float, most: int = 3) -> int:
    """As many columns of a legend, `most` at most, as fit across a figure of `width` inches; letters are some 0.075 inches wide."""
    widest = max(map(len, names), default=1)
    return max(1, min(most, int(width / (0.5 + 0.075 * widest))))


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """The names below the axes."""
    columns = _legend_columns(handles, figure.get_size_inches()[0])
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
    figure.legend(list(handles.values()), list(handles), **place)


def _label(line: Line) -> str:
    return line.name + (" (random)" if line.weights == "random" else "")


def _axis(column: Column) -> str:
    unit = {"percent": "%", "x 100": "x 100"}.get(column.unit, column.unit)
    return f"{task_name(column.task)} {metric_name(column.metric)} ({unit})"


def _direction(column: Column) -> str:
    return "higher is better" if column.higher_is_better else "lower is better"


def _share(column: Column, values: Sequence[float]) -> tuple[float, float]:
    """The worst and the best of a column's values."""
    return (min(values), max(values)) if column.higher_is_better else (max(values), min(values))


def _position(value: float, ends: tuple[float, float]) -> float:
    worst, best = ends
    return 1.0 if worst == best else (value - worst) / (best - worst)


def _numbers(board: Board, lines: Iterable[Line], ends: Mapping[int, tuple[float, float]]) -> pd.DataFrame:
    rows = [
        {
            "table": board.title,
            "upstream": _label(line),
            "task": column.task,
            "metric": column.metric,
            "unit": column.unit,
            "better": "higher" if column.higher_is_better else "lower",
            "score": cell.value,
            "ci95_low": cell.low,
            "ci95_high": cell.high,
            "position": _position(cell.value, ends[i]),
        }
        for line in lines
        for i, (column, cell) in enumerate(zip(board.columns, line.cells, strict=True))
        if cell is not None and i in ends
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _ends(board: Board, lines: Sequence[Line]) -> dict[int, tuple[float, float]]:
    found = {}
    for i, column in enumerate(board.columns):
        values = [cell.value for line in lines if (cell := line.cells[i]) is not None]
        if values:
            found[i] = _share(column, values)
    return found


def _radar(board: Board) -> Drawing | None:
    """Tasks around a circle, the best of these rows at the rim and the worst at the inner ring."""
    lines = [line for line in board.lines if all(cell is not None for cell in line.cells)]
    if len(board.columns) < 3 or len(lines) < 2:
        return None
    ends = _ends(board, lines)
    figure = _new(7.2, 5.6 + 0.18 * len(lines))
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(board.columns) for i in range(len(board.columns))]
    handles: dict[str, Any] = {}
    for number, line in enumerate(lines):
        reach = [0.2 + 0.8 * _position(cell.value, ends[i]) for i, cell in enumerate(line.cells) if cell is not None]
        (handles[_label(line)],) = axes.plot(
            [*angles, angles[0]], [*reach, reach[0]], linewidth=1.6, markersize=4, **_look(number)
        )
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    labels = [f"{_axis(column)}\n{ends[i][1]:.1f} (worst {ends[i][0]:.1f})" for i, column in enumerate(board.columns)]
    axes.set_xticks(angles, labels, fontsize=8)
    axes.tick_params(axis="x", pad=6)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):  # labels grow away from the circle
        label.set_horizontalalignment(
            "center" if abs(math.sin(angle)) < 0.1 else "left" if angle < math.pi else "right"
        )
    axes.set_yticks([0.2, 0.6, 1.0], [])
    axes.set_ylim(0, 1.02)
    figure.suptitle(f"{board.title}\nrim: the best of these rows on each axis; inner ring: the worst")
    _legend(figure, handles)
    return figure, _numbers(board, lines, ends)


def _heatmap(board: Board) -> Drawing | None:
    """Upstreams by tasks; the colour is the place between the worst and the best of the column, the text the score."""
    ends = _ends(board, board.lines)
    figure = _new(2.6 + 0.82 * len(board.columns), 1.7 + 0.34 * len(board.lines))
    axes = figure.add_subplot()
    grid = [
        [math.nan if cell is None else _position(cell.value, ends[i]) for i, cell in enumerate(line.cells)]
        for line in board.lines
    ]
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(board.lines):
        for x, cell in enumerate(line.cells):
            if cell is None:
                axes.text(x, y, "–", ha="center", va="center", color="#555555")
            else:
                color = _readable(image.cmap(grid[y][x]))
                text = f"{cell.value:.1f}{MARKS.get(cell.overlap, '')}"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
    heads = [
        f"{task_name(column.task)}\n{metric_name(column.metric)} {'↑' if column.higher_is_better else '↓'}"
        for column in board.columns
    ]
    axes.set_xticks(range(len(heads)), heads, fontsize=8)
    axes.set_yticks(range(len(board.lines)), [_label(line) for line in board.lines])
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, ticks=[0, 1])
    bar.ax.set_yticklabels(["worst", "best"])
    bar.set_label("within the column")
    units = sorted({"%" if column.unit == "percent" else column.unit for column in board.columns})
    notes = short_notes(cell.overlap for line in board.lines for cell in line.cells if cell is not None)
    figure.suptitle("\n".join([board.title, f"scores in {' and '.join(units)}; arrows point to the better", *notes]))
    return figure, _numbers(board, board.lines, ends)


def _readable(behind: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more (WCAG 2.2, relative luminance).

    >>> _readable((1.0, 1.0, 0.0, 1.0)), _readable((0.0, 0.0, 0.4, 1.0))
    ('black', 'white')
    """
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in behind[:3]]
    luminance = sum(part * v for part, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _layers(board: Board, records: Mapping[str, RunRecord]) -> Drawing | None:
    """What each task reads from which layer: the softmax weights of the chosen probes, averaged over seeds and folds."""
    found: list[tuple[Line, list[tuple[str, list[float]]]]] = []
    for line in board.lines:
        tasks: list[tuple[str, list[float]]] = []
        for column, cell in zip(board.columns, line.cells, strict=True):
            if cell is None or cell.row is None or any(column.task == name for name, _ in tasks):
                continue
            weights = [records[name].layer_weights for name in cell.row["run_ids"].split()]
            known = [each for each in weights if each is not None]
            if known and len(known[0]) > 1:
                tasks.append((column.task, [statistics.fmean(values) for values in zip(*known, strict=True)]))
        if tasks:
            found.append((line, tasks))
    if not found:
        return None
    columns = 1 if len(found) == 1 else 2
    rows = math.ceil(len(found) / columns)
    most = max(len(tasks) for _, tasks in found)
    figure = _new(5.2 * columns, 0.9 + rows * (1.0 + 0.26 * most))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    top = max(max(weights) for _, tasks in found for _, weights in tasks)
    image = None
    for axes, (line, tasks) in zip(grid, found, strict=False):
        image = axes.imshow([weights for _, weights in tasks], cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_title(_label(line))
        axes.set_yticks(range(len(tasks)), [task_name(task) for task, _ in tasks])
        count = len(tasks[0][1])
        axes.set_xticks(range(0, count, 1 if count <= 13 else 4))
        axes.set_xlabel("layer (0: input of the first)")
        axes.tick_params(length=0)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="weight of the layer (a row sums to 1)", shrink=0.8, aspect=40)
    figure.suptitle(f"Layer weights · {board.title}")
    numbers = [
        {"table": board.title, "upstream": _label(line), "task": task, "layer": layer, "weight": weight}
        for line, tasks in found
        for task, weights in tasks
        for layer, weight in enumerate(weights)
    ]
    return figure, pd.DataFrame(numbers)


def _rates(board: Board, records: Sequence[RunRecord]) -> Drawing | None:
    """Dev score against learning rate, a panel a task; a ring marks the rate that was chosen."""
    curves = {row["run_ids"]: scores for row, scores in dev_by_rate(records)}
    panels: list[tuple[Column, list[tuple[Line, Mapping[str, Any], dict[float, list[float]]]]]] = []
    for i, column in enumerate(board.columns):
        members = []
        for line in board.lines:
            cell = line.cells[i]
            if cell is not None and cell.row is not None and cell.row["metric"] == column.metric:
                scores = curves.get(cell.row["run_ids"], {})
                if len(scores) > 1:
                    members.append((line, cell.row, scores))
        if members:
            panels.append((column, members))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _new(3.6 * columns, 0.9 + 2.7 * rows + 0.16 * len(board.lines))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    looks = {id(line): _look(number) for number, line in enumerate(board.lines)}
    handles: dict[str, Any] = {}
    for axes, (column, members) in zip(grid, panels, strict=False):
        for line, row, scores in members:
            handles[_label(line)] = _rate_curve(axes, scores, float(row["lr"]), looks[id(line)])
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"dev {_axis(column)}")
        axes.set_title(f"{task_name(column.task)} ({_direction(column)})")
        axes.grid(color="#DDDDDD", linewidth=0.6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"Dev scores by learning rate, mean ± sd over seeds; ring: chosen · {board.title}", wrap=True)
    _legend(figure, handles)
    numbers = [
        {"table": board.title, "task": column.task, "metric": column.metric, "unit": column.unit, "upstream": _label(line), "lr": lr,
         "dev_mean": statistics.fmean(values), "dev_sd": statistics.stdev(values) if len(values) > 1 else math.nan,
         "seeds": len(values), "chosen": lr == row["lr"]}
        for column, members in panels
        for line, row, scores in members
        for lr, values in scores.items()
    ]  # fmt: skip
    return figure, pd.DataFrame(numbers)


def _rate_curve(axes: Any, scores: Mapping[float, Sequence[float]], chosen: float, look: Mapping[str, Any]) -> Any:
    """One line of mean and standard deviation over seeds, a ring around the chosen rate."""
    means = {lr: statistics.fmean(values) for lr, values in scores.items()}
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in scores.values()]
    ring = {"markersize": 10, "fillstyle": "none", "markeredgewidth": 1.4, "color": look["color"]}
    axes.plot([chosen], [means[chosen]], "o", **ring)
    return axes.errorbar(
        list(means), list(means.values()), yerr=spread, linewidth=1.3, markersize=3.5, capsize=2, **look
    )


_COST: dict[str, tuple[str, Callable[[Line], float | None]]] = {
    "params": (
        "parameters of the encoder (millions, fewer is better)",
        lambda line: None if line.params is None else line.params / 1e6,
    ),
    "macs": (
        "multiply-accumulates for a second of audio (1e9, fewer is better)",
        lambda line: None if line.macs is None else line.macs / 1e9,
    ),
    "time": ("speed of extraction (times real time, more is better)", lambda line: line.times_real_time),
}


def _cost(board: Board, cost: str) -> Drawing | None:
    """Score against cost; the line joins the rows that no other row beats in both."""
    if cost not in _COST:
        raise RequestError(f"unknown cost {cost!r}. Fix: one of {', '.join(_COST)}.")
    label, value_of = _COST[cost]
    title, higher, scores = _cost_scores(board)
    points = [(line, value_of(line), score) for line, score in zip(board.lines, scores, strict=True)]
    known = [(line, float(x), float(y)) for line, x, y in points if x is not None and y is not None]
    if not known:
        return None
    front = [entry for entry in known if not any(_beats(o[1:], entry[1:], cost == "time", higher) for o in known)]
    names = ["not beaten in both", *(_label(line) for line, _, _ in known)]
    columns = _legend_columns(names, COST_WIDTH)
    figure = _new(COST_WIDTH, 3.8 + 0.19 * math.ceil(len(names) / columns))
    axes = figure.add_subplot()
    ordered = sorted(front, key=lambda entry: entry[1])
    (joined,) = axes.plot(
        [x for _, x, _ in ordered], [y for _, _, y in ordered], color="#999999", linewidth=1, zorder=1
    )
    handles = {names[0]: joined}
    for number, (line, x, y) in enumerate(known):
        (handles[_label(line)],) = axes.plot([x], [y], markersize=7, **{**_look(number), "linestyle": "none"})
    _cost_scale(axes.xaxis, [x for _, x, _ in known])
    if not higher:
        axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_ylabel(title)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.suptitle(board.title, wrap=True)
    _legend(figure, handles)
    members = {id(line) for line, _, _ in front}
    numbers = [
        {"table": board.title, "upstream": _label(line), "cost": cost, "cost_value": x, "score": title.replace("\n", " "),
         "score_value": y, "front": id(line) in members}
        for line, x, y in known
    ]  # fmt: skip
    return figure, pd.DataFrame(numbers)


def _cost_scores(board: Board) -> tuple[str, bool, list[float | None]]:
    """What stands on the upright axis, whether more of it is better, and its value of each row."""
    if any(line.scores.get("superb_s site") is not None for line in board.lines):
        over = board.score_tasks["superb_s site"]
        title = f"superb_s site over {len(over)} tasks\n(points, higher is better)"
        return title, True, [line.scores.get("superb_s site") for line in board.lines]
    column = board.columns[0]
    values = [cell.value if (cell := line.cells[0]) else None for line in board.lines]
    return f"{_axis(column)}, {_direction(column)}", column.higher_is_better, values


def _cost_scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic scale with plain numbers: 1, 2 and 5 of each decade where there are few decades."""
    import matplotlib.ticker

    ticker: Any = matplotlib.ticker
    least, most = min(values), max(values)
    if least > 0:
        axis.axes.set_xscale("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if most < 30 * least else (1.0,)))
    else:
        positive = [value for value in values if value > 0]
        axis.axes.set_xscale("symlog", linthresh=max(1e-3, min(positive, default=1.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _beats(one: tuple[float, float], other: tuple[float, float], more: bool, higher: bool) -> bool:
    """Whether a point is as good in both and better in one."""
    (x, y), (u, v) = ((a if more else -a, b if higher else -b) for a, b in (one, other))
    return x >= u and y >= v and (x, y) != (u, v)
