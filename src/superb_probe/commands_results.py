"""The commands that read records: leaderboard, plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from superb_probe.commands_output import table


def add_commands(subparsers: Any) -> None:
    """Add `leaderboard` and `plot`."""
    board = subparsers.add_parser(
        "leaderboard",
        help="one table from all records",
        description="One CSV from all records, a row for each comparable result (the rule is in results/README.md).",
        epilog="examples:\n  superb-probe leaderboard\n  superb-probe leaderboard --runs results/runs /other/runs --out board.csv",
    )
    _add_runs(board)
    board.add_argument(
        "--out", type=Path, default=Path("results/leaderboard.csv"), metavar="FILE", help="default: %(default)s"
    )
    board.set_defaults(handler=write_leaderboard)

    plot = subparsers.add_parser(
        "plot",
        help="scores of all records in one picture",
        description="Scores with their 95 %% intervals, a panel a task: PNG and SVG, with the numbers as CSV beside them.",
        epilog="examples:\n  superb-probe plot --out results/scores.png\n  superb-probe plot --runs results/runs --task asv",
    )
    _add_runs(plot)
    plot.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks")
    plot.add_argument(
        "--out", type=Path, default=Path("results/scores.png"), metavar="FILE", help="default: %(default)s"
    )
    plot.set_defaults(handler=write_plot)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("results/runs")],
        metavar="DIR",
        help="folders of records (default: results/runs)",
    )


def write_leaderboard(args: argparse.Namespace) -> int:
    """Write the CSV and print its main columns; 1 if a file could not be read as a record (the others still count)."""
    from superb_probe.results.leaderboard import aggregate, write_csv
    from superb_probe.results.record import scan_records

    records, problems = scan_records(args.runs)
    board, unfinished, conflicts = aggregate(records)
    write_csv(board, args.out)
    columns = (
        "task",
        "upstream",
        "weights",
        "dataset",
        "protocol",
        "budget",
        "control",
        "score",
        "seeds",
        "lr",
        "edge",
    )
    if len(board):
        shown = board.assign(score=board["score"].map("{:.2f}".format), lr=board["lr"].map("{:g}".format))
        print(table(columns, shown[list(columns)].values.tolist()))
    print(f"{len(board)} rows from {len(records)} records: {args.out}")
    for line in (*unfinished, *conflicts, *problems):
        print(f"superb-probe: {line}", file=sys.stderr)
    return 1 if problems or conflicts else 0


def write_plot(args: argparse.Namespace) -> int:
    """Draw the scores; 1 if a file could not be read as a record (the others still count)."""
    from superb_probe.errors import unknown_name
    from superb_probe.results.plot import plot_scores
    from superb_probe.results.record import scan_records

    records, problems = scan_records(args.runs)
    tasks = {record.task.name for record in records}
    for name in args.task or ():
        if name not in tasks:
            raise unknown_name("task", name, tasks)
    written = plot_scores([record for record in records if not args.task or record.task.name in args.task], args.out)
    print("\n".join(map(str, written)))
    for line in problems:
        print(f"superb-probe: {line}", file=sys.stderr)
    return 1 if problems else 0
