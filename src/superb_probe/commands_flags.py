"""Flags that several commands have, with the same words and the same meaning in each."""

from __future__ import annotations

import argparse


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`, `--size` and `--random`: which weights the one encoder of a command has."""
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to load")
    parser.add_argument("--size", help="test, tiny, small or base")
    add_random(parser)


def add_random(parser: argparse.ArgumentParser) -> None:
    """Add `--random`."""
    parser.add_argument("--random", type=int, metavar="SEED", help="random weights from this seed")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, the CPU unless told."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")


def add_json(parser: argparse.ArgumentParser, document: str = "") -> None:
    """Add `--json`; `document` says more of what is printed."""
    parser.add_argument("--json", action="store_true", help=f"one JSON document on stdout{document}")
