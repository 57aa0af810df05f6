"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of official-format fixtures and small corpora beside the checkout."""
    folder = Path(os.environ.get("SUPERB_PROBE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder} (set SUPERB_PROBE_SHARED)")
    return folder
