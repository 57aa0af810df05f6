"""Figures of measurements: panels of lines, PNG and SVG with the numbers as CSV beside them, in the style of the other figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from superb_probe.results.figures import _legend_columns, _look, _new, _save, _style

Line = tuple[Sequence[float], Sequence[float]]
MOST_TICKS = 12  # of a logarithmic axis, at measured places


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x: label of the x axis, with its unit.
        y: label of the y axis, with its unit and which direction is better.
        lines: x and y values by the name in the legend; colours follow the order.
        log_x: a logarithmic x axis.
        log_y: a logarithmic y axis.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    log_x: bool = False
    log_y: bool = False


def draw_panels(panels: Sequence[Panel], numbers: pd.DataFrame, out: Path | str, title: str = "") -> list[Path]:
    """Draw panels side by side.

    Args:
        panels: one or more; a name has one colour and marker in all of them.
        numbers: what the CSV holds.
        out: the picture; its ending is replaced by .png, .svg and .csv.
        title: above all of them.

    Returns:
        The files written.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    with _style():
        width = 3.6 * len(panels) + 0.4
        columns = _legend_columns(names, width, 4)
        figure = _new(width, 3.2 + 0.18 * (math.ceil(len(names) / columns) - 1))
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            for name, (x, y) in panel.lines.items():
                look = _look(names.index(name))
                if len(x) > 20:
                    look.pop("marker")
                axes.plot(x, y, label=name, linewidth=1.2, markersize=4, **look)
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            if panel.log_x:
                axes.set_xscale("log")
                values = sorted({value for x, _ in panel.lines.values() for value in x})
                if len(values) <= MOST_TICKS:  # where it was measured, rather than powers of ten
                    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
                    axes.minorticks_off()
            if panel.log_y:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        if len(names) > 1:
            found = [axes.get_legend_handles_labels() for axes in figure.axes]
            handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
        if title:
            figure.suptitle(title)
        return _save(figure, numbers, Path(out).with_suffix(""))
