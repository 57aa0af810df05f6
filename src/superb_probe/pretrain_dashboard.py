"""The picture at the end of a pre-training run: curves, code usage and phone purity, drawn from the files of its folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from superb_probe.pretrain_card import read_evidence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DPI = 150
STYLE: Any = {"font.size": 8, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}


def draw_dashboard(folder: Path) -> Path:
    """Draw `dashboard.png` in a run's folder from its log.csv and evidence.json.

    Returns:
        The picture.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    evidence = read_evidence(folder)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        FigureCanvasAgg(figure)
        loss, right, gradient, usage, layers, speed = figure.subplots(2, 3).flatten()
        _curves(loss, rows, "loss", "held_out_loss", "Cross entropy at masked frames (nats)")
        _curves(right, rows, "accuracy", "held_out_accuracy", "Accuracy at masked frames")
        for number, each in enumerate(evidence):
            if each["held_out"]:
                right.axhline(each["held_out"]["chance"], color=COLORS[number], linestyle=":", linewidth=1)
        _curves(gradient, rows, "gradient_norm", None, "Gradient norm before clipping")
        gradient.set_yscale("log")
        _usage(usage, evidence)
        _layers(layers, evidence[-1].get("layers") or {})
        _curves(speed, rows, "audio_s_per_s", None, "Seconds of audio a second")
        path = folder / "dashboard.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _curves(axes: Any, rows: list[dict[str, str]], name: str, held_out: str | None, title: str) -> None:
    """A column over updates, a line an iteration; what is held out as dots."""
    for number, iteration in enumerate(sorted({row["iteration"] for row in rows})):
        mine = [row for row in rows if row["iteration"] == iteration]
        color = COLORS[number % len(COLORS)]
        points = [(int(row["step"]), float(row[name])) for row in mine if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=f"iteration {iteration}")
        held = [(int(row["step"]), float(row[held_out])) for row in mine if held_out and row[held_out]]
        if held:
            axes.plot(*zip(*held, strict=True), "o", color=color, markersize=4, label=f"{iteration}, held out")
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.legend(fontsize=7)


def _usage(axes: Any, evidence: list[dict[str, Any]]) -> None:
    """How often each unit is right and is said at masked held-out frames, commonest first."""
    for number, each in enumerate(evidence):
        if not each["held_out"]:
            continue
        for kind, style in (("targets", "-"), ("likeliest", "--")):
            counts = sorted(each["held_out"][kind], reverse=True)
            total = max(1, sum(counts))
            used = sum(count > 0 for count in counts)
            label = f"iteration {each['iteration']}, {'right' if kind == 'targets' else 'said'}: {used} of {len(counts)} used"
            shares = [max(count / total, 1e-6) for count in counts]
            axes.plot(
                range(1, len(counts) + 1), shares, style, color=COLORS[number % len(COLORS)], linewidth=1, label=label
            )
    axes.set_yscale("log")
    axes.set_title("Share of each unit at masked held-out frames")
    axes.set_xlabel("unit, commonest first")
    axes.legend(fontsize=6)


def _layers(axes: Any, found: dict[str, Any]) -> None:
    """Phone purity by layer beside that of cepstra and of a single cluster."""
    axes.set_title("Phone purity by layer, held out")
    if not found:
        axes.text(0.5, 0.5, "no alignments", ha="center", va="center", transform=axes.transAxes)
        return
    axes.plot(
        range(len(found["layers"])), [each["phone"] for each in found["layers"]], "o-", color=COLORS[0], label="layers"
    )
    axes.axhline(found["mfcc"]["phone"], color=COLORS[1], linestyle="--", label="MFCC")
    axes.axhline(found["chance"], color="#000000", linestyle=":", label="one cluster")
    axes.set_xlabel("layer")
    axes.legend(fontsize=7)
