"""The layout: four folders at the root that are sub-packages of superb_probe, and the traps of that."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("upstreams", "downstreams", "probes", "results")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not a checkout")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text()))


def folders_with_init(root: Path) -> set[Path]:
    skipped = {".venv", "build", "dist", "tests", "docs", "tools", "node_modules"}
    return {
        file.parent.relative_to(root)
        for file in root.rglob("__init__.py")
        if not skipped & set(file.relative_to(root).parts) and not file.relative_to(root).parts[0].startswith(".")
    }


def test_packages_are_the_folders_with_an_init(project: dict[str, Any], tmp_path: Path) -> None:
    setup = project["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted(setup["package-dir"])
    listed = {Path(folder) for folder in setup["package-dir"].values()}
    assert listed == folders_with_init(ROOT)
    (tmp_path / "upstreams" / "nested").mkdir(parents=True)
    (tmp_path / "upstreams" / "nested" / "__init__.py").touch()
    assert folders_with_init(tmp_path) == {Path("upstreams/nested")}  # a nested package would be seen


@pytest.mark.parametrize("part", PARTS)
def test_top_level_imports_of_the_folders_raise(part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {part}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import superb_probe.{part}" in done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_modules_name_their_package_in_full(part: str) -> None:
    wrong = [
        f"{file.name}:{node.lineno}"
        for file in sorted((ROOT / part).glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in PARTS))
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PARTS for alias in node.names))
    ]
    assert wrong == []


# Who may import whom: a folder's modules import what is listed, never what comes later.
_ALLOWED = {
    "upstreams": {"upstreams"},
    "probes": {"upstreams", "probes", "downstreams.base", "downstreams.manifest", "downstreams.audio"},
    "results": {"results", "probes.metrics", "probes.statistics"},  # these two need no torch
}


def imports_of(file: Path) -> set[str]:
    """Dotted names below superb_probe that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.removeprefix("superb_probe.") for name in names if name.startswith("superb_probe.")}
    return found


@pytest.mark.parametrize("part", sorted(_ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    allowed = _ALLOWED[part] | {"errors", "registry"}
    wrong = {
        f"{file.name}: {name}"
        for file in (ROOT / part).glob("*.py")
        for name in imports_of(file)
        if name not in allowed and name.split(".")[0] not in allowed
    }
    assert wrong == set()


def test_an_import_the_wrong_way_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "probe.py"
    file.write_text("def f():\n    from superb_probe.downstreams.asr import ASR\n")
    assert imports_of(file) == {"downstreams.asr"}


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_holds_every_module_and_data_file(project: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 60 * 2**20
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for file in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names
    for file in ("results/schema.json", "results/reference/superb.json", "downstreams/characters.txt", "py.typed"):
        assert f"superb_probe/{file}" in names
    tops = {name.split("/")[0] for name in names}
    assert all(top == "superb_probe" or top.endswith(".dist-info") for top in tops)


def bounds_that_are_not_tested(dependencies: list[str], oldest: str) -> list[str]:
    """Dependencies whose low bound is not the release that `oldest.txt` pins (a patch of the same release is)."""
    pinned = dict(line.split("==") for line in oldest.splitlines() if "==" in line and not line.startswith("#"))
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in dependencies)  # type: ignore[union-attr]
    return [name for name, low in bounds.items() if not f"{pinned.get(name)}.".startswith(f"{low}.")]


def test_the_oldest_versions_are_the_low_bounds(project: dict[str, Any]) -> None:
    oldest = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8")
    dependencies = project["project"]["dependencies"]
    assert not bounds_that_are_not_tested(dependencies, oldest)
    assert bounds_that_are_not_tested([*dependencies[1:], "torch>=2.7"], oldest) == ["torch"]
    assert bounds_that_are_not_tested([*dependencies, "new>=1"], oldest) == ["new"]
