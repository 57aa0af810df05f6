"""The commands that measure: check, conformance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from superb_probe.commands_flags import add_json, add_weights


def add_commands(subparsers: Any) -> None:
    """Add `check` and `conformance`."""
    check = subparsers.add_parser(
        "check",
        help="measure whether an upstream keeps its contract",
        description="Measure an upstream by perturbing waveform and batch: shapes, frame counts, padding, determinism, lookahead.",
        epilog="examples:\n  superb-probe check upstream mamba_hubert_causal --size test\n"
        "  superb-probe check upstream ./mine.py:mine --checkpoint mine.pt --json",
    )
    check.add_argument("what", choices=("upstream",))
    check.add_argument("name")
    add_weights(check)
    add_json(check)
    check.set_defaults(handler=check_upstream)

    conformance = subparsers.add_parser(
        "conformance",
        help="compare with reference outputs of the original code",
        description="Measure every case of a folder of fixtures (upstreams, probes, training, sox, metrics) against its bound.",
        epilog="examples:\n  superb-probe conformance fixtures\n  superb-probe conformance fixtures --json",
    )
    conformance.add_argument("folder", type=Path, metavar="DIR")
    add_json(conformance)
    conformance.set_defaults(handler=run_conformance)


def check_upstream(args: argparse.Namespace) -> int:
    """Print what was measured of an upstream; 1 if it breaks its contract."""
    from superb_probe.commands_output import print_json, stdout_to_stderr
    from superb_probe.upstreams import check
    from superb_probe.upstreams.load import load_upstream

    with stdout_to_stderr(args.json):
        upstream = load_upstream(args.name, checkpoint=args.checkpoint, size=args.size, random=args.random)
        results = check.check_upstream(upstream)
    passed = all(result.passed for result in results)
    if args.json:
        print_json({"upstream": args.name, "passed": passed, "checks": check.to_dicts(results)})
    else:
        print(check.format_checks(results))
    return 0 if passed else 1


def run_conformance(args: argparse.Namespace) -> int:
    """Measure a folder of fixtures; 1 when a bound is passed or a case cannot be measured."""
    from superb_probe.conformance import main_conformance

    return main_conformance(args.folder, args.json)
