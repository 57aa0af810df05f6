"""Check a built wheel: every package and data file is in it, nothing else is, and it is under its size limit.

Usage: python tools/check_wheel.py dist/superb_probe-*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LIMIT_BYTES = 60_000_000
REQUIRED = (
    "superb_probe/py.typed",
    "superb_probe/cli.py",
    "superb_probe/upstreams/base.py",
    "superb_probe/downstreams/asv.py",
    "superb_probe/downstreams/mini/read.train.tsv",
    "superb_probe/downstreams/mini/trials.test.tsv",
    "superb_probe/probes/heads.py",
    "superb_probe/results/schema.json",
    "superb_probe/results/analysis_schema.json",
)


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel; empty when nothing is."""
    names = zipfile.ZipFile(wheel).namelist()
    found = [f"missing: {name}" for name in REQUIRED if name not in names]
    found += [f"outside the package: {n}" for n in names if not n.startswith(("superb_probe/", "superb_probe-"))]
    if wheel.stat().st_size > LIMIT_BYTES:
        found.append(f"{wheel.stat().st_size:,} bytes, over the limit of {LIMIT_BYTES:,}")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    wrong = problems(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" + "".join(f"\n  {line}" for line in wrong))
    sys.exit(1 if wrong else 0)
