"""The documentation's code runs: every python and console block of README and docs, in order, in a scratch folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<note><!-- not run: [^>]+ -->\n)?"
    r"```(?P<kind>python|console)(?: file=(?P<file>\S+))?\n(?P<code>.*?)```",
    re.DOTALL,
)


Run = Callable[[list[str], Path], tuple[int, str]]  # a command in a folder: its exit status and what it printed
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# Most of a small command's time is the imports of libraries. They are imported once; each command then is a process of its own that
# starts from there, with nothing of superb_probe imported, as the installed script `superb-probe` would.
STARTER = """
import atexit, gc, importlib, json, os, sys, traceback
for name in ("torch", "torch._dynamo", "scipy.stats", "pandas", "matplotlib.figure"):
    importlib.import_module(name)
assert not any(name.startswith("superb_probe") for name in sys.modules)
gc.freeze()
for line in sys.stdin:
    words, folder, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, opened in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
            os.dup2(opened, number)
        sys.argv = words
        try:
            from superb_probe.cli import main
            status = main()
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking the libraries apart would take as long as the command
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def in_a_process(words: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A function that runs a command; `superb-probe` from the starter, where the system has safe forks."""
    if not sys.platform.startswith("linux"):
        yield in_a_process
        return
    output = tmp_path_factory.mktemp("printed") / "output.txt"
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdin is not None and starter.stdout is not None
        ask, answers = starter.stdin, starter.stdout

        def run(words: list[str], folder: Path) -> tuple[int, str]:
            if words[0] != "superb-probe":
                return in_a_process(words, folder)
            print(json.dumps([words, str(folder), str(output)]), file=ask, flush=True)
            status = int(answers.readline())
            return status, output.read_text(encoding="utf-8", errors="replace")[-6000:]

        yield run


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """(kind, file name, code) of each block that is to be run."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(m["kind"], m["file"], m["code"]) for m in found if not m["note"]]


def run_blocks(found: list[tuple[str, str | None, str]], folder: Path, run: Run) -> None:
    """Run blocks one after another; a python block with a file name is written, not run."""
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
            status, printed = run(command, folder)
            assert status == 0, f"{command}\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, run: Run) -> None:
    found = blocks(page)
    run_blocks(found, tmp_path, run)
    assert found or page.name not in {"README.md", "add-an-upstream.md", "add-a-task.md"}, f"{page.name} shows no code"


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("python", "1 / 0\n", "ZeroDivisionError"),
        ("console", "$ superb-probe lst\n", "Did you mean list"),
        ("console", "$ superb-probe list tasks\n$ superb-probe check upstream ./broken.py:mine\n", "ZeroDivisionError"),
    ],
)
def test_a_broken_block_is_caught(kind: str, code: str, said: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken.py").write_text("def mine():\n    return 1 / 0\n")
    with pytest.raises(AssertionError, match=said):
        run_blocks([(kind, None, code)], tmp_path, run)
    assert run(["superb-probe", "list", "tasks"], tmp_path)[0] == 0
