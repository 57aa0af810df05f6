"""What `--dry-run` says beside what the run takes, in processor seconds of this process: other work on the machine does not count.

Usage: python tools/dry_run_truth.py ic pr asr asv --limit 100 --steps 200
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

time.perf_counter = time.process_time  # before anything keeps the other one

import torch  # noqa: E402

from superb_probe import engine  # noqa: E402
from superb_probe.engine_estimate import Estimate  # noqa: E402


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def said(tasks: list[str], options: dict[str, Any]) -> list[Estimate]:
    """The estimates of a dry run."""
    found: list[Estimate] = []
    real = engine.estimate_jobs
    engine.estimate_jobs = lambda *arguments: found.extend(real(*arguments)) or found  # type: ignore[func-returns-value]
    try:
        with quiet():
            engine.run(task=tasks, dry_run=True, **options)
    finally:
        engine.estimate_jobs = real
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+")
    parser.add_argument("--upstream", default="transformer_hubert")
    parser.add_argument("--size", default="test")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"upstream": args.upstream, "size": args.size, "random": 1, "lr": [1e-3, 1e-4]}
    options |= {"device": "cpu", "limit": args.limit, "steps": args.steps}
    started = time.process_time()
    estimates = said(args.task, options)
    print(
        f"the dry run itself: {time.process_time() - started:.0f} s\n\n| run | said | taken | said / taken |\n|---|---|---|---|"
    )
    for task, estimate in zip(args.task, estimates, strict=True):
        with quiet(), tempfile.TemporaryDirectory() as folder:
            records = engine.run(task=task, out=Path(folder), **options)
        extract_s, fit_s = records[0].cost.extract_s or 0.0, sum(record.cost.fit_s or 0.0 for record in records)
        ratio = estimate.total_s / (extract_s + fit_s)
        print(
            f"| {task} | {estimate.extract_s:.1f} + {estimate.fit_s:.1f} | {extract_s:.1f} + {fit_s:.1f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
