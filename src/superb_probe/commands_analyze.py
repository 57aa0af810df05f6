"""The command `analyze`: training-free measurements of the layers of any encoder: units, cca, disentangle, and figures of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe import commands_compute, commands_latency
from superb_probe.commands_flags import add_json, add_random
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError

if TYPE_CHECKING:
    from superb_probe.results.analysis_record import AnalysisRecord

FIGURE_KINDS = ("units", "robustness", "cca", "disentangle", "page")


def add_commands(subparsers: Any) -> None:
    """Add `analyze units`, `analyze cca`, `analyze disentangle` and `analyze figures`."""
    parser = subparsers.add_parser(
        "analyze",
        help="what the layers hold, without training heads: units, cca, disentangle",
        description="Measurements of every layer of any encoder: a table here, and a CSV, a record and a figure on disk. "
        "docs/analyses.md says what each number is and how it maps to the Mamba-HuBERT paper.",
        epilog="examples:\n  superb-probe analyze units --upstream mamba_hubert transformer_hubert\n"
        "  superb-probe analyze cca --upstream mamba_hubert --target phones speaker\n"
        "  superb-probe analyze figures --kind page",
    )
    kinds = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    _add_units(kinds)
    _add_cca(kinds)
    _add_disentangle(kinds)
    _add_figures(kinds)
    commands_compute.add_compute(kinds)
    commands_latency.add_latency(kinds)


def _add_units(kinds: Any) -> None:
    units = kinds.add_parser(
        "units",
        help="k-means of every layer: purity, PNMI, bitrate, robustness, ABX",
        description="Discrete units of every layer (the paper's Figures 2 and 6), how they bear changes of the audio, and ABX.",
        epilog="examples:\n  superb-probe analyze units --upstream mamba_hubert --clusters 100\n"
        "  superb-probe analyze units --upstream fbank --clusters 50 --seed 1 2 --change noise10 opus --abx none",
    )
    _add_shared(units, "units")
    units.add_argument(
        "--clusters", nargs="+", type=int, default=[100, 500, 1000], metavar="K", help="default: 100 500 1000"
    )
    units.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N", help="default: 1 2 3 4 5")
    units.add_argument(
        "--curve-seeds", type=int, metavar="N", help="seeds at layers that dev does not choose (default: all)"
    )
    units.add_argument("--budget", choices=("small", "full"), help="full: the paper's k-means; small: for minutes of speech "
                       "(default: small below ten hours of train)")  # fmt: skip
    units.add_argument(
        "--max-frames", type=int, metavar="N", help="frames k-means is trained on (default: 20,000 or all)"
    )
    units.add_argument(
        "--change",
        nargs="+",
        metavar="NAME",
        help="changes of the audio, or none (default: all; a wrong name lists them)",
    )
    units.add_argument(
        "--change-utterances", type=int, default=60, metavar="N", help="test utterances that are changed (default: 60)"
    )
    units.add_argument(
        "--abx", nargs="+", choices=("within", "across", "none"), default=["within", "across"], help="default: both"
    )
    units.add_argument("--abx-context", choices=("triphone", "none"), default="triphone", help="default: triphone")
    units.add_argument("--abx-distance", choices=("dtw", "mean"), default="dtw", help="default: dtw")
    units.set_defaults(handler=analyze_units)


def _add_cca(kinds: Any) -> None:
    cca = kinds.add_parser(
        "cca",
        help="canonical correlation of every layer with phones, speakers, any embedding",
        description="Similarity of every layer with phones, speakers, labels of utterances or any embedding (the paper's Figure 3): "
        "fitted on some speakers, measured on others, beside the same with shuffled rows.",
        epilog="examples:\n  superb-probe analyze cca --upstream mamba_hubert --target phones resemblyzer\n"
        "  superb-probe analyze cca --upstream fbank --target emotion2vec=embeddings.npz --flavour pwcca",
    )
    _add_shared(cca, "cca")
    cca.add_argument("--target", nargs="+", default=["phones", "speaker"], metavar="NAME",
                     help="phones, resemblyzer, a label column (speaker, emotion, ...), or NAME=FILE.npz|.csv by utterance "
                     "(default: phones speaker)")  # fmt: skip
    cca.add_argument(
        "--flavour",
        nargs="+",
        choices=("plain", "svcca", "pwcca"),
        default=["plain", "svcca", "pwcca"],
        help="default: all",
    )
    cca.add_argument(
        "--max-segments", type=int, default=10_000, metavar="N", help="phones used, at most (default: 10000)"
    )
    cca.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and draws (default: 0)")
    cca.set_defaults(handler=analyze_cca)


def _add_disentangle(kinds: Any) -> None:
    disentangle = kinds.add_parser(
        "disentangle",
        help="speakers and phones: angles, what is left without the other, what units tell",
        description="How far every layer keeps speakers and phones apart: principal angles, phone accuracy and speaker EER without a "
        "subspace, what units say of speakers once the phone is known, ABX across minus within speakers.",
        epilog="examples:\n  superb-probe analyze disentangle --upstream mamba_hubert transformer_hubert",
    )
    _add_shared(disentangle, "disentangle")
    disentangle.add_argument(
        "--max-frames", type=int, default=20_000, metavar="N", help="training frames (default: 20000)"
    )
    disentangle.add_argument("--clusters", type=int, default=100, metavar="K", help="of the units (default: 100)")
    disentangle.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    disentangle.add_argument("--no-abx", action="store_true", help="without ABX")
    disentangle.set_defaults(handler=analyze_disentangle)


def _add_figures(kinds: Any) -> None:
    figures = kinds.add_parser(
        "figures",
        help="figures of analyses already made, all on one page if wanted",
        description="Draw analysis records again, for chosen encoders: page has all of them and the layer weights of probes.",
        epilog="examples:\n  superb-probe analyze figures --kind page --upstream mamba_hubert fbank --out page.png",
    )
    figures.add_argument("--kind", nargs="+", choices=FIGURE_KINDS, default=["page"], help="default: page")
    figures.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("results/runs")],
        metavar="DIR",
        help="folders of records (default: results/runs)",
    )
    figures.add_argument("--upstream", nargs="+", metavar="NAME", help="only these encoders")
    figures.add_argument("--dataset", metavar="NAME", help="only analyses of this speech, e.g. mini")
    figures.add_argument("--out", type=Path, metavar="FILE", help="default: results/analysis_KIND.png")
    figures.set_defaults(handler=draw_figures)


def _add_shared(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--upstream", nargs="+", required=True, metavar="NAME", help="encoders, as for run")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the encoder")
    parser.add_argument("--size", help="test, tiny, small or base")
    add_random(parser)
    parser.add_argument("--beside", nargs="+", choices=("fbank", "random", "none"), default=["fbank", "random"],
                        help="also filter banks, and each trained encoder with random weights (default: both)")  # fmt: skip
    parser.add_argument(
        "--manifest",
        nargs="+",
        default=[],
        metavar="SPLIT=TSV",
        help="your own speech: train=a.tsv dev=b.tsv test=c.tsv (default: mini)",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder that audio paths start from")
    parser.add_argument(
        "--alignment",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="phone times: TextGrid, CTM, CSV, files or folders",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="utterances of a split, at most")
    parser.add_argument("--skip-unaligned", action="store_true", help="leave utterances without phone times out")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep extracted states there (default: in memory)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/runs"),
        metavar="DIR",
        help="folder of the records (default: results/runs)",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help=f"the figure, with its CSV beside it, or none (default: results/analysis_{kind}.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="analyse again what has a record")
    add_json(parser, ": the records")


def _request(args: argparse.Namespace) -> Any:
    from superb_probe.analysis import AnalysisRequest
    from superb_probe.settings import pairs

    manifest = {split: Path(file) for split, file in pairs(args.manifest, "--manifest").items()} or None
    return AnalysisRequest(
        upstream=tuple(args.upstream), checkpoint=args.checkpoint, size=args.size, random=args.random, beside=tuple(args.beside),
        manifest=manifest, root=args.root, alignment=tuple(args.alignment), limit=args.limit, skip_unaligned=args.skip_unaligned,
        out=args.out, store=args.store, device=args.device, overwrite=args.overwrite,
    )  # fmt: skip


def analyze_units(args: argparse.Namespace) -> int:
    """Units of every layer."""
    from superb_probe.analysis import analyze_units as run
    from superb_probe.analysis_units import UnitsRequest
    from superb_probe.errors import unknown_name
    from superb_probe.probes.audio_changes import CHANGES

    changes = tuple(CHANGES) if args.change is None else () if args.change == ["none"] else tuple(args.change)
    for name in changes:
        if name not in CHANGES:
            raise RequestError(
                str(unknown_name("change", name, CHANGES)).partition("`")[0] + f"All: {', '.join(CHANGES)}, none."
            )
    _positive(args, "curve_seeds", "max_frames", "change_utterances", "limit")
    if min(args.clusters) < 2:
        raise RequestError("--clusters: two or more.")
    request = _request(args)
    asked = UnitsRequest(
        clusters=tuple(dict.fromkeys(args.clusters)), seeds=tuple(dict.fromkeys(args.seed)),
        budget=args.budget, max_frames=args.max_frames,
        curve_seeds=min(args.curve_seeds or len(args.seed), len(args.seed)), changes=changes, change_utterances=args.change_utterances,
        abx=() if "none" in args.abx else tuple(args.abx), abx_context=args.abx_context, abx_distance=args.abx_distance,
    )  # fmt: skip
    return _finish(args, lambda: run(request, asked), ("units", "robustness") if changes else ("units",))


def analyze_cca(args: argparse.Namespace) -> int:
    """CCA of every layer."""
    from superb_probe.analysis import analyze_cca as run
    from superb_probe.analysis_cca import CcaRequest

    _positive(args, "max_segments", "limit")
    asked = CcaRequest(
        tuple(dict.fromkeys(args.target)), tuple(dict.fromkeys(args.flavour)), args.max_segments, args.seed
    )
    return _finish(args, lambda: run(_request(args), asked), ("cca",))


def analyze_disentangle(args: argparse.Namespace) -> int:
    """Speakers and phones in every layer."""
    from superb_probe.analysis import analyze_disentangle as run
    from superb_probe.analysis_disentangle import DisentangleRequest

    _positive(args, "max_frames", "clusters", "limit")
    asked = DisentangleRequest(max_frames=args.max_frames, clusters=args.clusters, seed=args.seed, abx=not args.no_abx)
    return _finish(args, lambda: run(_request(args), asked), ("disentangle",))


def _positive(args: argparse.Namespace, *names: str) -> None:
    wrong = [
        f"--{name.replace('_', '-')} {value}"
        for name in names
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if wrong:
        raise RequestError(f"{', '.join(wrong)}: one or more.")


def _finish(args: argparse.Namespace, run: Callable[[], list[AnalysisRecord]], figures: Sequence[str]) -> int:
    from superb_probe.results.analysis_figures import draw_analysis

    with stdout_to_stderr(args.json):
        records = run()
        first = args.figure or Path("results") / f"analysis_{figures[0]}.png"
        files: list[Path] = []
        for number, kind in enumerate(figures if first != Path("none") else ()):
            out = first if number == 0 else first.with_name(f"{first.stem}_{kind}{first.suffix}")
            files += draw_analysis(records, kind, out)
    if args.json:
        print_json({"records": [each.to_dict() for each in records], "files": [str(file) for file in files]})
        return 0
    print("\n".join([summary(records), *map(str, files)]))
    return 0


def draw_figures(args: argparse.Namespace) -> int:
    """Draw records again."""
    from superb_probe.results.analysis_figures import draw_analysis
    from superb_probe.results.analysis_record import read_analyses
    from superb_probe.results.record import scan_records

    records = read_analyses(args.runs)
    known = sorted({each.upstream.name for each in records})
    if args.upstream:
        unknown = sorted(set(args.upstream) - set(known))
        if unknown:
            raise RequestError(f"no analysis of {', '.join(unknown)}. Known: {', '.join(known) or 'none'}.")
        records = [each for each in records if each.upstream.name in args.upstream]
    if args.dataset:
        records = [each for each in records if each.data.dataset == args.dataset]
    runs, _ = scan_records(args.runs)
    for kind in dict.fromkeys(args.kind):
        out = args.out or Path("results") / f"analysis_{kind}.png"
        if args.out and len(args.kind) > 1:
            out = args.out.with_name(f"{args.out.stem}_{kind}{args.out.suffix}")
        print("\n".join(map(str, draw_analysis(records, kind, out, runs))))
    return 0


def summary(records: Sequence[AnalysisRecord]) -> str:
    """The main numbers as a table: where dev chose a layer, that layer's on test; elsewhere the range over layers."""
    from superb_probe.results.analysis_record import as_table

    lines = []
    for record in records:
        found = as_table([record])
        found = found[found["split"] != "dev"]
        settings = [
            name
            for name in ("clusters", "change", "speakers", "target", "flavour", "removed", "of", "control")
            if name in found.columns
        ]
        for keys, rows in found.groupby(["measure", *settings], sort=False, dropna=False):
            measure, *values = keys
            named: dict[str, Any] = dict(zip(settings, values, strict=True))
            where = ", ".join(_said(name, value) for name, value in named.items() if _known(value))
            chosen = record.chosen.get(f"layer of {int(named['clusters'])}") if _known(named.get("clusters")) else None
            if chosen is not None:
                rows = rows[rows["layer"] == chosen]
            if len(rows) == 1:
                row = rows.iloc[0]
                ends = f"[{row['ci95_low']:.3f}, {row['ci95_high']:.3f}]" if _known(row["ci95_low"]) else ""
                lines.append((record.label, measure, where, str(row["layer"]), f"{row['value']:.3f}", ends))
            else:
                value = f"{rows['value'].min():.3f} to {rows['value'].max():.3f}"
                lines.append((record.label, measure, where, f"{rows['layer'].min()}..{rows['layer'].max()}", value, ""))
    return table(("upstream", "measure", "where", "layer", "value", "95 %"), lines)


def _known(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def _said(name: str, value: Any) -> str:
    if name == "clusters":
        return f"{int(value)} clusters"
    return f"{name} {value}" if name in ("removed", "speakers") else str(value)
