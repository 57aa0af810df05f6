"""What analysis records say of the paper's two claims (arXiv 2506.12606: better units, speakers more distinct), a table a corpus.

    python tools/analyses_claims.py FOLDER/runs

FOLDER is that of `tools/analyses.py`. Units are those of the layer that dev chose; CCA and speakers are of the layer where the
number is best, which favours all encoders alike; the rest is at the layer of the units.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from superb_probe.results.analysis_record import AnalysisRecord, Measurement, read_analyses

Found = Mapping[str, AnalysisRecord]  # of one encoder: analysis to record
FLAVOUR = "pwcca"


def of(
    found: Found, analysis: str, measure: str, split: str, layer: int | None = None, **where: Any
) -> list[Measurement]:
    """The measurements of an analysis that are of just these; of `where`, sizes of the data are not asked."""
    if analysis not in found:
        return []
    sizes = ("clusters", "components", "held_out", "triples", "context", "distance", "flavour")
    return [
        each
        for each in found[analysis].measurements
        if (each.measure, each.split) == (measure, split)
        and (layer is None or each.layer == layer)
        and {name: value for name, value in each.where.items() if name not in sizes or name in where} == where
    ]


def said(found: Sequence[Measurement], scale: float = 1.0, digits: int = 2, *, layer: bool = False) -> str:
    """A number with its interval, where it has one, and its layer where asked for."""
    if not found:
        return ""
    (each,) = found
    text = f"{scale * each.value:.{digits}f}"
    if each.ci95 is not None:
        text += f" [{scale * each.ci95[0]:.{digits}f}, {scale * each.ci95[1]:.{digits}f}]"
    return f"{text} (layer {each.layer})" if layer else text


def best(found: Sequence[Measurement], sign: int = 1) -> list[Measurement]:
    """The one with the largest number, or the smallest with a sign of -1."""
    return [max(found, key=lambda each: sign * each.value)] if found else []


def mean_distance(found: Found, layer: int) -> str:
    """Unit edit distance between clean and changed audio, the mean over all changes."""
    each = [one for one in found["units"].measurements if one.measure == "unit_edit_distance" and one.layer == layer]
    values = [one.value for one in each if "control" not in one.where]
    return f"{sum(values) / len(values):.2f}" if values else ""


def cells_of(found: Found) -> list[str]:
    """The numbers of an encoder."""
    layer = int(next(iter(found["units"].chosen.values()))) if "units" in found else -1  # one number of clusters
    angle = of(found, "disentangle", "mean_angle_deg", "train", layer)
    control = of(found, "disentangle", "mean_angle_deg", "train", layer, control="random subspace")
    eer = of(found, "disentangle", "speaker_eer", "test", removed="nothing")
    abx = of(found, "units", "abx_error", "test", layer, speakers="across")
    return [
        str(layer),
        said(of(found, "units", "pnmi", "test", layer)),
        said(of(found, "units", "phone_purity", "test", layer)),
        mean_distance(found, layer) if "units" in found else "",
        said([each for each in abx if "clusters" not in each.where], 100, 1),  # of states, not of units
        said(best(of(found, "cca", "cca", "cross-fitted", target="phones", flavour=FLAVOUR)), layer=True),
        said(best(of(found, "cca", "cca", "cross-fitted", target="speaker", flavour=FLAVOUR)), layer=True),
        said(best(eer, -1), 100, 1, layer=True),
        f"{angle[0].value:.0f} ({control[0].value:.0f})" if angle and control else "",
    ]


HEADS = ("encoder", "layer", "PNMI", "phone purity", "unit edit distance", "ABX across %", "CCA phones", "CCA speakers",
         "speaker EER %", "angle (random)")  # fmt: skip


def order(name: str) -> tuple[bool, bool, str]:
    """Trained first, then random, then filter banks."""
    return name.startswith("fbank"), "(random)" in name, name


def table_of(records: Sequence[AnalysisRecord]) -> str:
    """The Markdown table of one corpus."""
    encoders: dict[str, dict[str, AnalysisRecord]] = {}
    for record in records:
        name = record.label
        encoders.setdefault(name, {})[record.analysis] = record
    rows = [f"| {' | '.join(HEADS)} |", "|" + " --- |" * len(HEADS)]
    rows += [f"| {' | '.join([name, *cells_of(encoders[name])])} |" for name in sorted(encoders, key=order)]
    return "\n".join(rows)


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Print a table for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of analysis records")
    records = read_analyses([parser.parse_args(words).runs])
    for dataset in sorted({record.data.dataset for record in records}):
        own = [each for each in records if each.data.dataset == dataset]
        say(f"\n{dataset.removeprefix('manifest:')}:\n\n{table_of(own)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
