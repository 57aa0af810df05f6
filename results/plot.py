"""The score plot: a panel a task, an upstream a line, a point and its 95 % interval; drawn from records alone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.errors import RequestError
from superb_probe.results.leaderboard import leaderboard, options_in_words
from superb_probe.results.overlap import MARKS, short_notes
from superb_probe.results.record import RunRecord

# Rows that differ in these are in different panels; in the others, on different lines of one panel.
PANEL_COLUMNS = (
    "task",
    "task_version",
    "dataset",
    "protocol",
    "budget",
    "head",
    "layer_norm",
    "metric",
    "unit",
    "better",
)
_LINE_COLUMNS = ("upstream_options", "head_options", "layer", "revision", "feature_dtype", "steps", "batch", "data")
# Okabe and Ito's colours: told apart with every kind of colour vision; the marker says the same again.
_STYLES = {
    "trained": ("#0072B2", "o", "trained weights"),
    "none": ("#009E73", "D", "no weights (signal processing)"),
    "random": ("#D55E00", "s", "random weights"),
    "control": ("#7F7F7F", "X", "control: shuffled labels"),
}


def plot_scores(records: Sequence[RunRecord], out: Path | str) -> list[Path]:
    """Draw the scores of all finished records.

    Args:
        records: any mix; what may not share a table gets a panel or a line of its own.
        out: the picture; its suffix (.png, .svg or none) is replaced by each of those written.

    Returns:
        The files written: PNG, SVG and a CSV of the numbers in them.

    Raises:
        RequestError: if there is nothing to draw, or the place cannot be written.
    """
    table = leaderboard(records)
    if table.empty:
        raise RequestError(
            f"none of {len(records)} records is a finished result. Fix: run something, or give other --runs."
        )
    path = Path(out)
    if path.suffix not in ("", ".png", ".svg"):
        raise RequestError(f"--out {path}: the picture is written as PNG and SVG. Fix: a name ending in .png or .svg.")
    files = {path.with_suffix(f".{kind}"): _picture(table, kind) for kind in ("png", "svg")}
    numbers = table[
        [*PANEL_COLUMNS, "upstream", "weights", "control", "score", "ci95_low", "ci95_high", "ci", "seeds", "lr"]
    ]
    files[path.with_suffix(".csv")] = numbers.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            file.write_bytes(content)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}. Fix: another --out.") from error
    return list(files)


def _picture(table: pd.DataFrame, kind: str) -> bytes:
    """The whole figure as PNG or SVG; the same records give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for _, panel in table.groupby(list(PANEL_COLUMNS), sort=False)]
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    lines = max(len(set(_labels(panel))) for panel in panels)
    with matplotlib.rc_context({"svg.hashsalt": "superb-probe", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2 * columns, (1.7 + 0.38 * lines) * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, handles)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        order = [style[2] for style in _STYLES.values() if style[2] in handles]
        figure.legend(
            [handles[name] for name in order],
            order,
            loc="outside lower center",
            ncols=min(len(order), 2 * columns),
            frameon=False,
        )
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return content.getvalue()


def _labels(panel: pd.DataFrame) -> list[str]:
    """The name of each row's line: the upstream's, with whatever else tells it apart from others of that name."""
    words = panel["upstream_options"].map(options_in_words)
    named = _named(panel.assign(upstream_options=words))
    real = panel["control"] == ""
    if (
        len({label for label, one in zip(named, real, strict=True) if one}) < real.sum()
    ):  # digests alone tell some apart
        named = _named(panel)
    return named


def _named(panel: pd.DataFrame) -> list[str]:
    real = panel[panel["control"] == ""]
    labels = []
    for row in panel.to_dict("records"):
        alike = real[(real["upstream"] == row["upstream"]) & (real["weights"] == row["weights"])]
        differing = [name for name in _LINE_COLUMNS if alike[name].nunique() > 1]
        if "revision" in differing and alike.groupby("upstream_options")["revision"].nunique().max() == 1:
            differing.remove("revision")  # the options say which
        words = [row[name] if name == "upstream_options" else f"{name}: {_short(row[name])}" for name in differing]
        random = " (random)" if row["weights"] == "random" else ""
        labels.append("\n".join([row["upstream"] + random, *filter(None, words)]))
    return labels


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 28 else text[:25] + "..."


def _draw_panel(axes: Any, panel: pd.DataFrame, handles: dict[str, Any]) -> None:
    rows = panel.assign(label=_labels(panel)).to_dict("records")
    lowest_best = rows[0]["better"] == "lower"
    order: dict[str, float] = {}
    for row in rows:  # controls come after the real rows, so each line stands where its real score puts it
        order.setdefault(row["label"], row["score"] if lowest_best else -row["score"])
    labels = sorted(order, key=lambda label: (order[label], label))
    for row in rows:
        color, marker, name = _STYLES["control" if row["control"] else row["weights"]]
        height = labels.index(row["label"])
        score, low, high = row["score"], row["ci95_low"], row["ci95_high"]
        known = low is not None and not math.isnan(low)
        # a percentile interval need not hold the score itself: the bar may start beyond it, never go backwards
        reach = [[max(0.0, score - low)], [max(0.0, high - score)]] if known else None
        handles[name] = axes.errorbar(
            score,
            height,
            xerr=reach,
            color=color,
            marker=marker,
            markersize=6,
            linewidth=1.6,
            capsize=3,
            linestyle="none",
        )
        if not row["control"]:
            edge = " *" if row["edge"] == "edge" else ""
            edge += MARKS.get(row["overlap"], "")
            axes.annotate(
                f"{score:.2f}{edge}",
                (score, height),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    first = rows[0]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.7)
    axes.margins(x=0.08)
    arrow = "lower is better" if lowest_best else "higher is better"
    axes.set_xlabel(f"{_metric(first['metric'])} ({_unit(first['unit'])}, {arrow})" + _edge_note(rows))
    version = "" if first["task_version"] == 1 else f" v{first['task_version']}"
    normalised = ", layer norm" if first["layer_norm"] else ""
    axes.set_title(
        f"{first['task']}{version} on {first['dataset']}\n{first['protocol']} protocol, {first['budget']} budget, "
        f"{first['head']} head{normalised}",
        fontsize=10,
    )
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _edge_note(rows: Sequence[Mapping[Any, Any]]) -> str:
    real = [row for row in rows if not row["control"]]
    notes = ["* best learning rate at the edge of those tried"] * any(row["edge"] == "edge" for row in real)
    return "".join(f"\n{note}" for note in [*notes, *short_notes(row["overlap"] for row in real)])


def _metric(name: str) -> str:
    """A metric in words: short names in capitals."""
    if name in ("eer", "wer", "cer", "per", "der", "mtwv"):
        return name.upper()
    return name.replace("_", " ").replace(" f1", " F1").replace(" cer", " CER")


def _unit(name: str) -> str:
    return "%" if name == "percent" else name
