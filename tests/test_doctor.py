"""The doctor: what works, what does not, and that a broken package cannot break it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from superb_probe import cli, doctor
from superb_probe.doctor import PACKAGES, Package, examine

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def package(probe: str, distribution: str = "numpy", core: bool = True) -> Package:
    return Package(distribution, probe, "tests", "pip install it", core)


def test_a_working_package() -> None:
    found = examine(package("import sys"))
    assert found.state == "works"
    assert re.match(r"\d+\.\d+", found.version)


def test_a_missing_package_is_not_imported() -> None:
    found = examine(package("raise SystemError", "no-such-distribution-at-all"))
    assert (found.state, found.version) == ("missing", "-")


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("import os; os.abort()", "status -6"),
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
    ],
)
def test_a_broken_package_is_a_line_in_a_table(probe: str, said: str) -> None:
    found = examine(package(probe))
    assert found.state == "broken"
    assert said in found.detail


def test_an_import_that_hangs_ends() -> None:
    found = examine(package("import time; time.sleep(60)"), timeout_s=1.0)
    assert found.state == "broken"
    assert "1 s" in found.detail


def run_doctor(monkeypatch: pytest.MonkeyPatch, packages: list[Package], *flags: str) -> int:
    monkeypatch.setattr(doctor, "examine_all", lambda: [examine(entry) for entry in packages])
    monkeypatch.setattr(doctor, "_devices", lambda: "cpu only")
    return cli.main(["doctor", *flags])


def test_status_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = [
        package("pass"),
        package("raise ValueError('x')", core=False),
        package("", "no-such-thing-at-all", core=False),
    ]
    assert run_doctor(monkeypatch, good, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [entry["state"] for entry in found["packages"]] == ["works", "broken", "missing"]
    assert set(found["packages"][0]) == {"package", "version", "state", "detail", "enables", "mend", "core"}


def test_a_broken_core_package_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(monkeypatch, [package("raise ValueError('x')")]) == 1
    printed = capsys.readouterr().out
    assert "broken: ValueError: x" in printed
    assert "pip install it" in printed
    assert run_doctor(monkeypatch, [package("", "no-such-thing-at-all")]) == 1


def test_every_dependency_is_examined() -> None:
    if not PYPROJECT.is_file():
        pytest.skip("not a checkout")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads(PYPROJECT.read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w.-]+", text)[0].lower() for text in requirements}  # type: ignore[index]

    extras = project["optional-dependencies"]
    needed = set().union(*(names(extras[key]) for key in extras if key != "all"))
    examined = {entry.distribution: entry.core for entry in PACKAGES}
    assert {name for name, core in examined.items() if core} == names(project["dependencies"])
    stubs = {name for name in needed if name.startswith("types-") or name.endswith("-stubs")}
    assert {name for name, core in examined.items() if not core} == needed - stubs
