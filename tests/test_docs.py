"""The documentation's code runs: every python and console block of README and docs, in order, in a scratch folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<note><!-- not run: [^>]+ -->\n)?"
    r"```(?P<kind>python|console)(?: file=(?P<file>\S+))?\n(?P<code>.*?)```",
    re.DOTALL,
)


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """(kind, file name, code) of each block that is to be run."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(m["kind"], m["file"], m["code"]) for m in found if not m["note"]]


def run_blocks(found: list[tuple[str, str | None, str]], folder: Path) -> None:
    """Run blocks one after another; a python block with a file name is written, not run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, name, code in found:
        if name:
            (folder / name).write_text(code, encoding="utf-8")
            continue
        commands = (
            [[sys.executable, "-c", code]]
            if kind == "python"
            else [shlex.split(line[2:], comments=True) for line in code.splitlines() if line.startswith("$ ")]
        )
        for command in commands:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    found = blocks(page)
    run_blocks(found, tmp_path)
    assert found or page.name not in {"README.md", "add-an-upstream.md", "add-a-task.md"}, f"{page.name} shows no code"


def test_a_broken_block_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_blocks([("python", None, "1 / 0\n")], tmp_path)
