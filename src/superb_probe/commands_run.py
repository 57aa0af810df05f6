"""The command `run`: plan, extract once, train every trial, choose on dev, score on test, write records, print the result."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError
from superb_probe.settings import RUN_FLAGS, Flag, layer_value, load_settings, named_roots, pairs, read_sweep, resolve

if TYPE_CHECKING:
    from superb_probe.results.record import RunRecord

_EXAMPLES = """examples:
  superb-probe run --upstream mamba_hubert_causal --task asv
  superb-probe run --upstream transformer_hubert fbank --task asr ic --lr 1e-2 1e-3 --seed 1 2 3 --dry-run
  superb-probe run --upstream fbank --task asr --manifest train=a.tsv dev=b.tsv test=c.tsv
  superb-probe run --upstream fbank mamba_hubert --tier quick --time-limit 8h
  superb-probe run --config sweep.yaml --out results/runs --json"""


def add_commands(subparsers: Any) -> None:
    """Add `run`, with a flag for every parameter of `superb_probe.run`."""
    parser = subparsers.add_parser(
        "run",
        help="score upstreams on tasks",
        description="Score upstreams on tasks. Each trial (fold, learning rate, seed) writes one record.",
        epilog=_EXAMPLES,
    )
    for flag in RUN_FLAGS:
        _add_flag(parser, flag)
    parser.add_argument("--config", metavar="FILE", help="sweep file (YAML): any of these flags, with _ for -")
    add_json(parser, ": the list of records")
    parser.set_defaults(handler=run_trials)


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    if flag.kind == "boolean":
        parser.add_argument(flag.option, action="store_true", default=None, help=flag.help)
        return
    kinds: dict[str, Any] = {"integer": int, "number": float, "path": Path, "layer": _layer}
    parser.add_argument(
        flag.option,
        type=kinds.get(flag.kind, str),
        nargs="+" if flag.many else None,
        choices=flag.choices or None,
        metavar=flag.metavar or (None if flag.choices else flag.name.upper()),
        help=flag.help,
    )


def _layer(text: str) -> int | str:
    try:
        return layer_value(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_trials(args: argparse.Namespace) -> int:
    """Resolve the request, run it, print what came out; 1 if a question was left without an answer.

    One learning rate of several that diverges is an outcome, and said; every rate failing is a failure.
    """
    arguments = run_arguments(args)
    from superb_probe import engine

    with stdout_to_stderr(args.json):
        records = engine.run(**arguments)
    if args.json:
        print_json([record.to_dict() for record in records])
    elif records:
        print("\n".join(report(records, Path(arguments.get("out", "results/runs")))))
    return 1 if unanswered(records) else 0


def unanswered(records: Sequence[RunRecord]) -> list[tuple[str, str, str | None]]:
    """(upstream, task, fold) of which every trial failed."""
    asked = {(r.upstream.name, r.task.name, r.task.fold) for r in records}
    answered = {(r.upstream.name, r.task.name, r.task.fold) for r in records if r.status == "finished"}
    return sorted(asked - answered, key=str)


def run_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `superb_probe.run` for a command line.

    Raises:
        RequestError: when no upstream or task is named, or a pair or a file is wrong.
    """
    flags = {flag.name: getattr(args, flag.name) for flag in RUN_FLAGS}
    settings = load_settings()
    if flags["data"] is not None:
        flags["data"] = named_roots(flags["data"], settings.corpora)
    if flags["manifest"] is not None:
        flags["manifest"] = {
            key: Path(path).expanduser() for key, path in pairs(flags["manifest"], "--manifest").items()
        }
    for name in ("upstream_option", "head_option"):
        if flags[name] is not None:
            flags[name] = option_values(flags[name], f"--{name.replace('_', '-')}")
    sweep = read_sweep(Path(args.config)) if args.config else {}
    arguments = resolve(flags, sweep, settings)
    needed = ("upstream",) if arguments.get("tier") else ("upstream", "task")
    missing = [f"--{name}" for name in needed if not arguments.get(name)]
    if missing:
        raise RequestError(
            f"superb-probe run: {' and '.join(missing)} missing. `superb-probe list upstreams` and `list tasks` show names."
        )
    return arguments


def option_values(texts: Sequence[str], flag: str = "--upstream-option") -> dict[str, Any]:
    """Options of an upstream or a head, each value read as a YAML scalar.

    >>> option_values(["strict_causal=true", "layers=3", "eps=1e-5", "mode=x"])
    {'strict_causal': True, 'layers': 3, 'eps': 1e-05, 'mode': 'x'}
    """
    import yaml

    options: dict[str, Any] = {}
    for name, text in pairs(texts, flag).items():
        value = yaml.safe_load(text)
        if isinstance(value, str):
            try:  # YAML reads 1e-5 as text
                value = float(value)
            except ValueError:
                pass  # it is text
        options[name] = value
    return options


def report(records: Sequence[RunRecord], out: Path) -> list[str]:
    """What a person reads after a run: a row a result (the rate chosen on dev), warnings, failures."""
    from superb_probe.results.leaderboard import leaderboard
    from superb_probe.results.record import record_path

    by_id = {record.run_id: record for record in records}
    header = (
        *("task", "upstream", "dataset", "score [95 % interval]", "unit", "lr", "seeds"),
        *("updates x batch", "dev slope / 1000 updates", "layer peak", "record"),
    )
    rows: list[tuple[Any, ...]] = []
    for row in leaderboard(records).to_dict("records"):
        ids = row["run_ids"].split()
        path = record_path(out, row["task"], row["upstream"], ids[0])
        control = f" (control: {row['control']})" if row["control"] else ""
        random = " (RANDOM weights)" if row["weights"] == "random" else ""
        rate = f"{row['lr']:g}" + (f" ({row['edge']})" if row["edge"] else "")
        rows.append(
            (
                row["task"],
                row["upstream"] + random + control,
                row["dataset"],
                _score(row),
                f"{row['metric']} {row['unit']}, {row['better']} is better",
                rate,
                row["seeds"],
                f"{row['steps']} x {row['batch']}" if row["steps"] else "-",
                slope_text(row["dev_slope"]),
                row["layer_weights_peak"] or "-",
                path if len(ids) == 1 else path.parent,
            )
        )
    lines = [table(header, rows)] if rows else []
    said = {text for record in records for text in record.warnings if "random weights" not in text}
    lines += [f"WARNING: {text}" for text in sorted(said)]
    lines += [
        f"FAILED: {r.task.name} / {r.upstream.name}, lr {r.probe.lr:g}, seed {r.probe.seed}: {r.error}"
        for r in by_id.values()
        if r.status == "failed"
    ]
    return lines


def slope_text(slope: float | None) -> str:
    """How the dev metric still moved at the end, for a table.

    >>> slope_text(-1.234), slope_text(None)
    ('-1.2', '-')
    """
    return "-" if slope is None or math.isnan(slope) else f"{slope:+.1f}"


def _score(row: Mapping[Any, Any]) -> str:
    import math

    if row["ci95_low"] is None or math.isnan(row["ci95_low"]):
        return f"{row['score']:.2f}"
    return f"{row['score']:.2f} [{row['ci95_low']:.2f}, {row['ci95_high']:.2f}]"
