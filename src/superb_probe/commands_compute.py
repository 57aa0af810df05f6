"""The command `analyze compute`: what encoders cost as audio gets longer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_device, add_json, add_threads
from superb_probe.commands_output import print_json, stdout_to_stderr, table

if TYPE_CHECKING:
    from superb_probe.compute import Point
    from superb_probe.results.lines import Panel

_LENGTHS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1200.0)
_NAMES = ("mamba_hubert_causal", "mamba_hubert", "transformer_hubert_causal", "transformer_hubert")


def add_compute(subparsers: Any) -> None:
    """Add `compute` to the subcommands of `analyze`."""
    parser = subparsers.add_parser(
        "compute",
        help="multiply-accumulates, speed and memory of encoders from 5 s to 20 min",
        description="Multiply-accumulates of encoders for a second of audio, as the Mamba-HuBERT paper counts (macs_paper) and with\n"
        "the scan (macs_all), their measured speed and peak memory from 5 s to 20 min, and the longest audio that fits in 16,\n"
        "24 and 80 GB: as the released code runs them (official: an explicit T x T mask and all) and at their best here.",
        epilog="examples:\n"
        "  superb-probe analyze compute --size tiny --seconds 5 10 20\n"
        "  superb-probe analyze compute --mode forward recorded train --device cuda --out docs/compute --time-limit 110",
    )
    parser.add_argument("--upstream", nargs="+", default=list(_NAMES), metavar="NAME", help="HuBERTs of this project")
    parser.add_argument("--size", default="base", help="test, tiny, small or base (default: %(default)s)")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("forward", "recorded", "train"),
        default=["forward"],
        help="recorded: forward with the graph kept, as code without no_grad runs (default: forward)",
    )
    parser.add_argument(
        "--variant", nargs="+", choices=("best", "official"), default=["best", "official"], help="default: both"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="number formats (default: float32)")
    parser.add_argument("--seconds", nargs="+", type=float, default=list(_LENGTHS), metavar="S", help="of audio")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes, the fastest counts (default: 2)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="S", help="no point begins after this"
    )
    parser.add_argument("--point-limit", type=float, default=10.0, metavar="S", help="longest pass (default: 10)")
    parser.add_argument("--macs-only", action="store_true", help="count, and measure nothing")
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.csv, STEM.png and STEM.svg")
    add_json(parser)
    parser.set_defaults(handler=run_compute)


def run_compute(args: argparse.Namespace) -> int:
    """Count, measure, print, draw."""
    import torch

    from superb_probe.bench_machine import describe_machine
    from superb_probe.compute import check_request, count, measure
    from superb_probe.upstreams.load import find_device

    check_request(args.mode, args.dtype, args.seconds)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = find_device(args.device)
    if args.macs_only:
        points = count(args.upstream, args.size, args.mode, args.seconds)
    else:
        with stdout_to_stderr(args.json):
            points = measure(
                args.upstream,
                size=args.size,
                modes=args.mode,
                variants=args.variant,
                dtypes=args.dtype,
                lengths_s=args.seconds,
                device=device,
                repeats=args.repeats,
                time_limit_s=args.time_limit,
                point_limit_s=args.point_limit,
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )
    machine = describe_machine(device)
    files = [] if args.out is None else draw(points, args.out, machine, args.size)
    if args.json:
        print_json({"machine": machine, "points": [each.row() for each in points], "longest": longest_rows(points)})
    else:
        print("\n".join(describe(points)))
        for file in files:
            print(file)
    return 0


def describe(points: Sequence[Point]) -> list[str]:
    """Tables for a person: the points, then the longest audio that fits."""
    rows = [
        (
            each.upstream,
            each.variant,
            each.mode,
            each.dtype,
            each.audio_s,
            round(each.macs_paper / 1e9, 3),
            round(each.macs_all / 1e9, 3),
            each.status if each.times_real_time is None else f"{each.times_real_time:.0f}",
            "" if each.peak_bytes is None else f"{each.peak_bytes / 1e9:.2f}",
        )
        for each in points
    ]
    header = (
        "upstream",
        "variant",
        "mode",
        "dtype",
        "audio s",
        "macs_paper G/s",
        "macs_all G/s",
        "x real time",
        "peak GB",
    )
    lines = [table(header, rows)]
    longest = longest_rows(points)
    if longest:
        names = ("upstream", "variant", "mode", "dtype", "16 GB", "24 GB", "80 GB")
        cells = [[row[name] for name in names[:4]] + [_fits(row[name]) for name in names[4:]] for row in longest]
        lines += ["", "longest audio (s) that fits; ~ beyond what was measured", table(names, cells)]
    return lines


def _fits(found: tuple[float, bool] | None) -> str:
    return "" if found is None else f"{'~' if found[1] else ''}{found[0]:.0f}"


def longest_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The longest audio that fits in each card, by series; empty where memory was not measured."""
    from superb_probe.compute import CARDS_BYTES, by_series, longest_s

    rows = []
    for key, series in by_series(points).items():
        found = {f"{limit / 1e9:.0f} GB": longest_s(series, limit) for limit in CARDS_BYTES}
        if any(found.values()):
            rows.append({**dict(zip(("upstream", "variant", "mode", "dtype"), key, strict=True)), **found})
    return rows


def draw(points: Sequence[Point], out: Path, machine: dict[str, Any], size: str) -> list[Path]:
    """MACs with the paper's own beside them, speed and memory against length: PNG, SVG and CSV."""
    import pandas as pd

    from superb_probe.results.lines import draw_panels

    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    columns = {"size": size, "machine": name, "torch": machine["versions"]["torch"], "commit": machine["commit"]}
    numbers = pd.DataFrame([{**each.row(), **columns} for each in points])
    return draw_panels(_panels(points, size), numbers, out, title=f"{size}, {name}")


def _panels(points: Sequence[Point], size: str) -> list[Panel]:
    from superb_probe.compute import PAPER_GMACS, PAPER_LENGTHS_S, by_series
    from superb_probe.results.lines import Panel

    series = by_series(points)
    modes = list(dict.fromkeys(each.mode for each in points))
    dtypes = {each.dtype for each in points}
    macs: dict[str, tuple[list[float], list[float]]] = {}
    for (name, _, mode, _), members in series.items():
        if mode == modes[0]:
            lengths = [each.audio_s for each in members]
            macs[f"{name}, macs_paper"] = (lengths, [each.macs_paper / 1e9 for each in members])
            if members[0].macs_all != members[0].macs_paper and "mamba" in name:
                macs[f"{name}, macs_all"] = (lengths, [each.macs_all / 1e9 for each in members])
            if size == "base" and mode == "forward" and name in PAPER_GMACS:
                macs[f"{name}, paper"] = (list(map(float, PAPER_LENGTHS_S)), list(PAPER_GMACS[name]))
    axis = "audio (s)"
    panels = [Panel("Multiply-accumulates", axis, "G for a second of audio", macs, log_x=True)]
    for mode in modes:
        speed, memory = {}, {}
        for (name, variant, of_mode, dtype), members in series.items():
            done = [each for each in members if each.status == "done"]
            if of_mode != mode or not done:
                continue
            label = f"{name}, {variant}" + (f", {dtype}" if len(dtypes) > 1 else "")
            lengths = [each.audio_s for each in done]
            speed[label] = (lengths, [float(each.times_real_time or 0) for each in done])
            held = [each for each in done if each.peak_bytes]  # on a CPU a short pass may take nothing new
            if held:
                memory[label] = ([each.audio_s for each in held], [float(each.peak_bytes or 0) / 1e9 for each in held])
        if speed:
            panels.append(
                Panel(f"Speed, {mode}", axis, "x real time (higher is better)", speed, log_x=True, log_y=True)
            )
        if memory:
            panels.append(Panel(f"Memory, {mode}", axis, "peak GB (lower is better)", memory, log_x=True, log_y=True))
    return panels
