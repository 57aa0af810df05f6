"""Markdown tables of what the benches of encoders and kernels wrote; docs/encoder-speed.md is made of these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superb_probe.bench_race import cost
from superb_probe.errors import RequestError

TITLES = {
    "scan": "Selective scan, forward",
    "scan-gradients": "Selective scan, forward and backward",
    "block": "Mamba block, forward",
    "block-gradients": "Mamba block, forward and backward",
}


def machine_line(result: Mapping[str, Any]) -> str:
    """The machine, its measured peaks, torch and the commit, in one line."""
    machine, peaks = result["machine"], result.get("peaks", {})
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, threads: {machine['threads']}"
    parts = [name, f"torch {machine['versions']['torch']}", f"commit {machine['commit']}"]
    if peaks.get("copy_bytes_per_s"):
        parts.append(f"copy {peaks['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    if peaks.get("matmul_flops_per_s"):
        parts.append(f"{result['dtype']} matrix product {peaks['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s")
    if not machine["gpu"]:
        parts.append("times are processor seconds of all threads")
    return "; ".join(parts)


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Documents of `bench encoders` and `bench kernels`.

    Raises:
        RequestError: naming every file that is not one.
    """
    found, problems = [], []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        if not isinstance(result, dict) or result.get("bench") not in ("encoders", "kernels"):
            problems.append(f"{path}: no document of `bench encoders` or `bench kernels`")
        else:
            found.append(result)
    if problems:
        raise RequestError("; ".join(problems))
    return found


def tables(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown for one document."""
    lines = [machine_line(result) + ".", ""]
    return lines + (_kernel_tables(result) if result["bench"] == "kernels" else _encoder_tables(result))


def _kernel_tables(result: Mapping[str, Any]) -> list[str]:
    from superb_probe.bench_kernels import own_name, peer_ratio

    lines = []
    for part in dict.fromkeys(row["part"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["part"] == part]
        title = f"{TITLES[part]}, {result['dtype']}, inner width {result['width']}, {result['states']} states"
        lines += [f"{title}:", "", "| rows x frames | run | time | over ours | memory | over its floor |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            known = [seconds for seconds in row["floors"].values() if seconds is not None]
            floor = sum(known) if part.startswith("block") else max(known)
            for name, timing in row["runs"].items():
                cells = [f"{row['batch']} x {row['frames']:,}", name]
                if "failed" in timing:
                    lines.append("| " + " | ".join([*cells, timing["failed"], "", "", ""]) + " |")
                    continue
                ratio = peer_ratio(name, row)
                over = f"{(cost(timing) or 0.0) / floor:.2f}" if name == own_name(row) else ""
                cells += [
                    _time(cost(timing) or 0.0),
                    "" if ratio is None else f"{ratio:.2f}",
                    _memory(timing["peak_bytes"]),
                    over,
                ]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _encoder_tables(result: Mapping[str, Any]) -> list[str]:
    lines = [f"Encoders of size {result['size']}, {result['dtype']}, all layers out:", ""]
    lines += ["| batch | encoder | time | x real time | share of the matrix product's peak | memory |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        cells = [f"{row['batch']} x {row['seconds']:g} s", row["name"]]
        if "failed" in row:
            cells += [row["failed"], "", "", ""]
        else:
            share = "" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.0%}"
            cells += [
                _time(cost(row) or 0.0),
                f"{row['times_real_time']:,.3g}" if row["times_real_time"] < 100 else f"{row['times_real_time']:,.0f}",
                share,
                _memory(row["peak_bytes"]),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _time(seconds: float) -> str:
    """Three figures.

    >>> _time(0.0007312), _time(12.3456)
    ('0.731 ms', '12.3 s')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
