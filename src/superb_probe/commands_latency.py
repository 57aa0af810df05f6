"""The command `analyze latency`: streaming recognition against chunk and look-ahead."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError
from superb_probe.settings import pairs


def add_latency(subparsers: Any) -> None:
    """Add `latency` to the subcommands of `analyze`."""
    parser = subparsers.add_parser(
        "latency",
        help="streaming recognition: error rate and word delay against chunk and look-ahead",
        description="Stream utterances with word times through recognisers, chunk by chunk: word error rate with its\n"
        "95 % interval over speakers, and how long after its end a rightly recognised word is complete (median, 90th percentile).",
        epilog="examples:\n"
        "  superb-probe analyze latency --out latency   # the recogniser that ships\n"
        "  superb-probe analyze latency --finetuned mamba=runs/mamba transformer=runs/transformer --out latency\n"
        "  superb-probe analyze latency --finetuned runs/bidirectional --chunk-ms 160 --lookahead-ms 0 320 640 1280",
    )
    parser.add_argument("--finetuned", nargs="+", default=[], metavar="[NAME=]DIR", help="folders of `finetune`")
    parser.add_argument("--record", nargs="+", default=[], metavar="[NAME=]FILE", help="records of asr (linear heads)")
    parser.add_argument("--chunk-ms", nargs="+", type=float, default=[40, 80, 160, 320, 640], metavar="MS")
    parser.add_argument(
        "--lookahead-ms", nargs="+", type=float, metavar="MS",
        help="encode all anew with every chunk and hold so much back: any encoder, quadratic work (default: the encoder's own stream)",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", type=Path, metavar="TSV", help="utterances with `text` (default: mini's test split)"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="what its audio starts from")
    parser.add_argument("--alignments", type=Path, metavar="TSV", help="id, words, word_ends_ms (default: mini's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first utterances")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.csv, STEM.png and STEM.svg")
    add_json(parser)
    parser.set_defaults(handler=run_latency)


def run_latency(args: argparse.Namespace) -> int:
    """Stream, print, draw."""
    from superb_probe.downstreams.manifest import Manifest
    from superb_probe.downstreams.mini import mini_root, read_splits
    from superb_probe.latency import measure_latency, read_word_ends

    if (args.manifest is None) != (args.alignments is None):
        raise RequestError("superb-probe analyze latency: --manifest and --alignments go together")
    root = mini_root()
    manifest = read_splits(root, "read")["test"] if args.manifest is None else Manifest.read(args.manifest, args.root)
    ends = read_word_ends(args.alignments or root / "alignments.test.tsv")
    rows = []
    with stdout_to_stderr(args.json):
        for name, upstream, recogniser in _recognisers(args):
            hop_ms = 1000 * upstream.info.hop_samples / upstream.info.sample_rate_hz
            for chunk_ms in args.chunk_ms:
                for lookahead_ms in args.lookahead_ms or [None]:
                    frames = None if lookahead_ms is None else round(lookahead_ms / hop_ms)
                    found = measure_latency(upstream, recogniser, manifest, ends, chunk_ms / 1000, frames, args.limit)
                    rows.append({"name": name, "upstream": upstream.info.name, "chunk_ms": chunk_ms, **found})
                    print(_line(rows[-1]), file=sys.stderr, flush=True)
    files = [] if args.out is None else draw(rows, args.out)
    if args.json:
        print_json(rows)
        return 0
    header = (
        "name",
        "chunk ms",
        "look-ahead ms",
        "wer %",
        "95 %",
        "delay median ms",
        "90 % within ms",
        "real-time factor",
    )
    print(table(header, [_cells(row) for row in rows]))
    for file in files:
        print(file)
    return 0


def _recognisers(args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    from superb_probe.finetuning import recogniser_of_folder, shipped_recogniser
    from superb_probe.streaming import recogniser_of_record

    found = []
    named_here = args.finetuned or ([] if args.record else [str(shipped_recogniser())])
    for flag, texts in (("--finetuned", named_here), ("--record", args.record)):
        named = pairs([text if "=" in text else f"{Path(text).name}={text}" for text in texts], flag)
        for name, place in named.items():
            made = (
                recogniser_of_folder(Path(place))
                if flag == "--finetuned"
                else recogniser_of_record(Path(place), None, None, None)
            )
            found.append((name, *made))
    return found


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    low, high = row["ci95"]
    return (
        row["name"],
        row["chunk_ms"],
        _milliseconds(row["lookahead_s"]),
        f"{row['wer']:.2f}",
        "-" if low is None else f"[{low:.2f}, {high:.2f}]",
        _milliseconds(row["delay_median_s"]),
        _milliseconds(row["delay_p90_s"]),
        f"{row['real_time_factor']:.3f}",
    )


def _line(row: dict[str, Any]) -> str:
    return " ".join(str(cell) for cell in _cells(row))


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Error rate and delay against the chunk, a line a recogniser and look-ahead, or against the look-ahead where only it varies.

    PNG, SVG and CSV.
    """
    import pandas as pd

    from superb_probe.results.lines import Panel, draw_panels

    errors: dict[str, tuple[list[float], list[float]]] = {}
    waits: dict[str, tuple[list[float], list[float]]] = {}
    ahead = len({row["chunk_ms"] for row in rows}) == 1 and len({row["lookahead_s"] for row in rows}) > 1
    for row in rows:
        held = f"look-ahead {_milliseconds(row['lookahead_s'])} ms"
        name = f"{row['name']}, chunk {row['chunk_ms']:g} ms" if ahead else f"{row['name']}, {held}"
        for lines, value in ((errors, row["wer"]), (waits, row["delay_median_s"])):
            x, y = lines.setdefault(name, ([], []))
            if value is not None:
                x.append(1000 * (row["lookahead_s"] or 0.0) if ahead else row["chunk_ms"])
                y.append(value if lines is errors else 1000 * value)
    numbers = pd.DataFrame([{**row, "ci95_low": row["ci95"][0], "ci95_high": row["ci95"][1]} for row in rows]).drop(
        columns="ci95"
    )
    against = "look-ahead (ms)" if ahead else "chunk (ms)"
    panels = [
        Panel("Word errors", against, "wer (%, lower is better)", errors, log_x=not ahead),
        Panel("Word delay", against, "median delay (ms, lower is better)", waits, log_x=not ahead),
    ]
    return draw_panels(panels, numbers, out)
