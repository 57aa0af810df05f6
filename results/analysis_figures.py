"""Figures of analyses: units, CCA, disentanglement, and one page of all of them; drawn from analysis records alone.

Every figure says below how it maps to the figures of the Mamba-HuBERT paper (arXiv:2506.12606). An encoder without layers to
compare (filter banks) is a horizontal line; what chance gives is grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.errors import RequestError
from superb_probe.results.analysis_record import AnalysisRecord, as_table
from superb_probe.results.figures import _legend_columns, _look, _new, _save, _style
from superb_probe.results.record import RunRecord

FIGURES = ("units", "robustness", "cca", "disentangle", "page")
_GREY = "#999999"
MOST_BANDS = 4  # encoders whose bands can be told apart where they overlap
_NOTES = {
    "units": "Figures 2 and 6 of the paper (phone purity by layer; 100, and 500 and 1000 clusters), with PNMI and ABX beside them "
    "and layer 0 too. The paper: clusters from train-clean-100, purity on dev-clean, 41 phones, one seed, Base encoders. Here: ",
    "robustness": "Not in the paper: what its units lose when the audio changes. Grey: random units of the same bitrate. A code "
    "of few units changes little whatever it says: read the bitrates too. Here: ",
    "cca": "Figure 3 of the paper (CCA with phones, speaker and emotion embeddings by layer). The paper does not say which CCA, how "
    "it is regularised or on which data; these are correlations of held-out data, so they are lower. Grey: rows shuffled. Here: ",
    "disentangle": "The paper's claim that speakers are captured more distinctly (section 5.2, Figure 3) as angles, probes and what "
    "is left when speakers or phones are erased; not in the paper. Grey: random directions, as many. Here: ",
    "page": "Layer by layer: Figures 2 and 3 of the paper, and what goes with them. Here: ",
}


@dataclass(frozen=True, slots=True)
class _Axes:
    """One pair of axes: which rows of the table, and what they are called."""

    title: str
    y: str
    rows: pd.DataFrame
    controls: pd.DataFrame | None = None
    percent: bool = False


def draw_analysis(
    records: Sequence[AnalysisRecord], kind: str, out: Path | str, runs: Sequence[RunRecord] = ()
) -> list[Path]:
    """Draw one figure.

    Args:
        records: analyses of any encoders; those of another data set get a figure of their own, "_2" before the ending.
        kind: "units", "robustness", "cca", "disentangle" or "page".
        out: the picture; its ending is replaced.
        runs: run records, for the layer weights on the page.

    Returns:
        The files written: PNG, SVG and CSV.

    Raises:
        RequestError: if there is nothing to draw, or the place cannot be written.
    """
    if kind not in FIGURES:
        raise RequestError(f"unknown figure {kind!r}. Fix: one of {', '.join(FIGURES)}.")
    path = Path(out)
    if path.suffix not in ("", ".png", ".svg"):
        raise RequestError(
            f"--figure {path}: the picture is written as PNG and SVG. Fix: a name ending in .png or .svg."
        )
    wanted = {"units": ("units",), "robustness": ("units",), "cca": ("cca",), "disentangle": ("disentangle",)}.get(kind)
    used = _latest([each for each in records if wanted is None or each.analysis in wanted])
    groups: dict[tuple[str, ...], list[AnalysisRecord]] = {}
    for each in used:  # other speech is another figure, and so is another k-means
        splits = sorted(digest for name, digest in each.data.digests.items() if name in ("train", "test"))
        budget = str(each.settings.get("budget")) if wanted == ("units",) else ""
        groups.setdefault((each.data.dataset, budget, *splits), []).append(each)
    makers: Mapping[str, Callable[[pd.DataFrame], list[_Axes]]] = {
        "units": _units, "robustness": _robustness, "cca": _cca, "disentangle": _disentangle, "page": _page,
    }  # fmt: skip
    written: list[Path] = []
    with _style():
        for number, members in enumerate(groups.values(), start=1):
            table = as_table(members)
            panels = [each for each in makers[kind](table) if len(each.rows)]
            if not panels:
                continue
            stem = path.with_suffix("") if number == 1 else path.with_name(f"{path.stem}_{number}")
            written += _figure(kind, members, table, panels, stem, runs if kind == "page" else ())
    if not written:
        raise RequestError(
            f"nothing to draw as {kind!r} in {len(records)} analysis records. Fix: `superb-probe analyze` first."
        )
    return written


def _latest(records: Sequence[AnalysisRecord]) -> list[AnalysisRecord]:
    """Of records that would be drawn as one line, the one that was finished last."""
    found: dict[tuple[str, ...], AnalysisRecord] = {}
    for each in records:
        speech = (each.data.dataset, each.data.digests.get("train", ""), each.data.digests.get("test", ""))
        key = (each.analysis, each.label, str(each.settings.get("budget")), *speech)
        if key not in found or each.finished_at >= found[key].finished_at:
            found[key] = each
    return list(found.values())


def _pick(table: pd.DataFrame, measure: str, **where: Any) -> pd.DataFrame:
    """The rows of a measure on test (or wherever it is measured) in which the columns of `where` have these values, "" for none."""
    rows: pd.DataFrame = table[table["measure"] == measure]
    rows = rows[rows["split"] != "dev"]
    for name, value in {"control": "", "change": "", **where}.items():
        if name not in rows.columns:
            if value != "":
                rows = rows.iloc[:0]
            continue
        column = rows[name]
        rows = rows[column.isna() | (column == "")] if value == "" else rows[column == value]
    return rows


def _values(table: pd.DataFrame, name: str) -> list[Any]:
    return sorted(table[name].dropna().unique().tolist()) if name in table.columns else []


def _units(table: pd.DataFrame) -> list[_Axes]:
    panels = []
    for measure, title in (("phone_purity", "phone purity"), ("pnmi", "PNMI")):
        for clusters in _values(table, "clusters"):
            rows = _pick(table, measure, clusters=clusters)
            panels.append(_Axes(f"{title}, {int(clusters)} clusters", f"{title} (higher is better)", rows,
                                _pick(table, measure, clusters=clusters, control="random units")))  # fmt: skip
    return panels + _abx_panels(table)


def _abx_panels(table: pd.DataFrame) -> list[_Axes]:
    panels = []
    for mode in ("within", "across"):
        rows = _pick(table, "abx_error", speakers=mode)
        if "clusters" in rows.columns:
            rows = rows[rows["clusters"].isna()]
        if len(rows):
            context = rows["context"].iloc[0]
            panels.append(_Axes(f"ABX {mode} speakers, states ({context})", "error (lower is better)", rows))
    return panels


def _robustness(table: pd.DataFrame) -> list[_Axes]:
    panels = []
    for clusters in _values(table, "clusters"):
        for measure, title in (
            ("unit_edit_distance", "unit edit distance (lower is better)"),
            ("pnmi", "PNMI (higher is better)"),
        ):
            rows = table[(table["measure"] == measure) & (table["clusters"] == clusters)]
            if "change" not in rows.columns:
                continue
            rows = rows[rows["change"].notna()]
            control = rows["control"].fillna("") if "control" in rows.columns else pd.Series("", index=rows.index)
            panels.append(_Axes(f"{int(clusters)} clusters", title, rows[control == ""], rows[control != ""]))
    return panels


def _cca(table: pd.DataFrame) -> list[_Axes]:
    return [
        _Axes(f"{target}, {flavour}", "CCA similarity, held out", _pick(table, "cca", target=target, flavour=flavour),
              _pick(table, "cca", target=target, flavour=flavour, control="shuffled"))
        for flavour in ("plain", "svcca", "pwcca")
        for target in _values(table, "target")
    ]  # fmt: skip


def _disentangle(table: pd.DataFrame) -> list[_Axes]:
    panels = [
        _Axes("angle of phones and speakers", "mean principal angle (degrees)", _pick(table, "mean_angle_deg"),
              _pick(table, "mean_angle_deg", control="random subspace")),
        _Axes("phone accuracy", "share of frames (higher is better)", _pick(table, "phone_accuracy", removed="nothing")),
        _Axes("phone accuracy, speakers erased", "share of frames", _pick(table, "phone_accuracy", removed="speakers"),
              _pick(table, "phone_accuracy", removed="random")),
        _Axes("speaker EER", "equal error rate (lower is better)", _pick(table, "speaker_eer", removed="nothing")),
        _Axes("speaker EER, phones erased", "equal error rate", _pick(table, "speaker_eer", removed="phones"),
              _pick(table, "speaker_eer", removed="random")),
        _Axes("speaker accuracy", "share of frames (higher is better)", _pick(table, "speaker_frame_accuracy", removed="nothing")),
        _Axes("units about speakers, phone known", "share of entropy, less shuffled", _pick(table, "unit_speaker_information_net")),
        _Axes("ABX across minus within speakers", "difference of errors", _pick(table, "abx_across_minus_within")),
    ]  # fmt: skip
    return panels


def _page(table: pd.DataFrame) -> list[_Axes]:
    clusters = _values(table, "clusters")
    panels = []
    if clusters:
        panels = [
            each
            for each in _units(table[(table["analysis"] == "units") & (table["clusters"] == clusters[0])])
            if "ABX" not in each.title
        ]
    panels += _abx_panels(table)[1:]
    panels += [each for each in _cca(table) if each.title.endswith("pwcca")]
    return panels + [
        each
        for each in _disentangle(table)
        if each.title.split()[0] in ("angle", "speaker", "units") and "erased" not in each.title
    ]


def _figure(
    kind: str,
    records: Sequence[AnalysisRecord],
    table: pd.DataFrame,
    panels: Sequence[_Axes],
    stem: Path,
    runs: Sequence[RunRecord],
) -> list[Path]:
    names = list(dict.fromkeys(table["upstream"]))
    looks = {name: _look(number) for number, name in enumerate(names)}
    drawn = {(each.upstream.name, each.upstream.revision, each.upstream.num_layers) for each in records}
    weights = [
        each
        for each in runs
        if each.layer_weights and len(each.layer_weights) > 1 and each.probe.control is None
        and (each.upstream.name, each.upstream.revision, each.upstream.num_layers) in drawn
    ]  # fmt: skip
    if weights:
        panels = [*panels, _weights(weights)]
    columns = min(len(panels), _columns(kind, table, len(panels)))
    lines = math.ceil(len(panels) / columns)
    note = _note(kind, records)
    wide = (6.4 if kind == "robustness" else 3.5) * columns
    figure = _new(wide, 2.75 * lines + 0.25 * math.ceil(len(names) / _legend_columns(names, wide, 4)) + 0.9)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        (_draw_changes if kind == "robustness" else _draw_layers)(axes, panel, looks)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid:
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles = {name: handles[name] for name in sorted(handles, key=lambda name: name == "control")}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=_legend_columns(handles, wide, 4),
        frameon=False,
        fontsize=8,
    )
    figure.supxlabel(textwrap.fill(note, int(wide * 19)), fontsize=7, color="#444444", ha="center")
    return _save(figure, table, stem)


def _columns(kind: str, table: pd.DataFrame, panels: int) -> int:
    """How many panels stand side by side."""
    if kind == "robustness":
        return 2
    if kind == "cca":  # a row a flavour
        return min(4, len(_values(table, "target")))
    return 4 if panels > 6 else panels if panels == 4 else 3


def _note(kind: str, records: Sequence[AnalysisRecord]) -> str:
    first = records[0]
    utterances, seconds = first.data.num_utterances, first.data.seconds
    text = (
        _NOTES[kind]
        + f"{first.data.dataset}, {seconds['train'] / 60:.1f} minutes of train and {seconds['test'] / 60:.1f} of test "
    )
    text += f"({utterances['test']} utterances). "
    if kind in ("units", "robustness"):
        settings = first.settings
        text += f"{len(settings['seeds'])} seeds at the layer chosen on dev, {settings['curve_seeds']} elsewhere; "
        text += f"{settings['budget']} budget. "
    if any(each.upstream.revision.startswith("random:") for each in records):
        text += "Encoders marked (random) have RANDOM weights: they say nothing of the paper's claims. "
    few = [each for each in first.warnings if each.startswith("test has ")]
    return text + "Bars and bands: 95 %." + "".join(f" {each[0].upper()}{each[1:]}." for each in few)


def _draw_layers(axes: Any, panel: _Axes, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Lines over layers with bands, of many encoders with bars that stand side by side; one layer alone is a horizontal line."""
    most = int(panel.rows["layer"].max())
    names = panel.rows["upstream"].drop_duplicates().tolist()
    for number, name in enumerate(names):
        rows, look = panel.rows[panel.rows["upstream"] == name].sort_values("layer"), dict(looks[str(name)])
        y, low, high = (rows[column].astype(float) for column in ("value", "ci95_low", "ci95_high"))
        if len(rows) == 1:
            look.pop("marker")
            axes.axhline(float(y.iloc[0]), label=name, linewidth=1.2, **{**look, "linestyle": ":"})
            if low.notna().all():
                axes.axhspan(float(low.iloc[0]), float(high.iloc[0]), color=look["color"], alpha=0.12, linewidth=0)
            continue
        bars = len(names) > MOST_BANDS
        x = rows["layer"].astype(float) + (0.5 * ((number + 0.5) / len(names) - 0.5) if bars else 0.0)
        axes.plot(x, y, label=name, linewidth=1.3, markersize=3.5, **look)
        known = low.notna()
        if bars:
            axes.vlines(x[known], low[known], high[known], color=look["color"], alpha=0.6, linewidth=0.9)
        elif known.any():
            axes.fill_between(x[known], low[known], high[known], color=look["color"], alpha=0.12, linewidth=0)
    if panel.controls is not None and len(panel.controls):
        label = "control"
        for _, rows in panel.controls.groupby("upstream", sort=False):
            rows = rows.sort_values("layer")
            x, y = rows["layer"].astype(int).tolist(), rows["value"].tolist()
            style = (
                {"color": _GREY, "linewidth": 0.9, "linestyle": "--"}
                if len(x) > 1
                else {"color": _GREY, "linestyle": "none", "marker": "x", "markersize": 5}
            )
            axes.plot(x, y, label=label, zorder=0, **style)
    axes.set_title(panel.title)
    axes.set_xlabel("layer (0: input of the first)")
    axes.set_ylabel(panel.y)
    if most <= 12:
        axes.set_xticks(range(most + 1))
    _plain(axes)


def _draw_changes(axes: Any, panel: _Axes, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """A group of points a change, a point an encoder."""
    changes = [name for name in panel.rows["change"].drop_duplicates().tolist()]
    names = panel.rows["upstream"].drop_duplicates().tolist()
    step = 0.7 / max(1, len(names) - 1) if len(names) > 1 else 0.0
    for number, name in enumerate(names):
        rows = panel.rows[panel.rows["upstream"] == name].set_index("change").loc[changes]
        x = [at - 0.35 * (len(names) > 1) + step * number for at in range(len(changes))]
        y = rows["value"].astype(float)
        low, high = rows["ci95_low"].astype(float).fillna(y), rows["ci95_high"].astype(float).fillna(y)
        look = {**looks[name], "linestyle": "none"}
        reach = [(y - low).clip(lower=0).tolist(), (high - y).clip(lower=0).tolist()]
        axes.errorbar(x, y.tolist(), yerr=reach, label=name, markersize=4, linewidth=1.1, capsize=1.5, **look)
        control = panel.controls[panel.controls["upstream"] == name] if panel.controls is not None else None
        if control is not None and len(control):
            by_change = control.set_index("change")["value"]
            axes.plot(x, [by_change.get(each, math.nan) for each in changes], label="control", color=_GREY, marker="_", markersize=5,
                      linestyle="none", zorder=0)  # fmt: skip
    for at in range(1, len(changes)):
        axes.axvline(at - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(changes)), changes, rotation=30, ha="right")
    axes.set_title(panel.title)
    axes.set_ylabel(panel.y)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _weights(runs: Sequence[RunRecord]) -> _Axes:
    """The layer weights of probes of encoders on the page, averaged over tasks, seeds and rates."""
    sums: dict[tuple[str, int], list[float]] = {}
    for each in runs:
        for layer, weight in enumerate(each.layer_weights or ()):
            sums.setdefault((each.upstream.name + (" (random)" if each.random_weights else ""), layer), []).append(
                weight
            )
    rows = [
        {
            "upstream": name,
            "layer": layer,
            "value": sum(found) / len(found),
            "ci95_low": math.nan,
            "ci95_high": math.nan,
        }
        for (name, layer), found in sums.items()
    ]
    tasks = ", ".join(sorted({each.task.name for each in runs}))
    return _Axes(f"layer weights of probes ({tasks})", "weight (sums to 1)", pd.DataFrame(rows))
