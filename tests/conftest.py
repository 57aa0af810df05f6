"""Fixtures every test may use."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of official-format fixtures and small corpora beside the checkout."""
    folder = Path(os.environ.get("SUPERB_PROBE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder} (set SUPERB_PROBE_SHARED)")
    return folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where no variable of the environment sets anything."""
    monkeypatch.chdir(tmp_path)
    for name in ("STORE", "DEVICE", "OUT", "SETTINGS"):
        monkeypatch.delenv(f"SUPERB_PROBE_{name}", raising=False)
    return tmp_path


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[str, str]]:
    """A function that gives what was printed to the two outputs since its last call."""

    def read() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return read


@pytest.fixture
def noise() -> Callable[..., Path]:
    """A function that writes a file of noise."""

    def write(path: Path, seconds: float = 1.0, rate_hz: int = 16000, channels: int = 1) -> Path:
        generator = np.random.default_rng(len(path.name))
        samples = 0.1 * generator.standard_normal((round(seconds * rate_hz), channels)).squeeze()
        soundfile.write(path, samples.astype(np.float32), rate_hz)
        return path

    return write


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], Any]:
    """A function that imports a script of tools/ by its name; tests of it skip where there is no checkout."""

    def load(name: str) -> Any:
        file = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
        if not file.is_file():
            pytest.skip("not a checkout")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
