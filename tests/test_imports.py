"""What an import costs: the command line and the records pull in nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

HEAVY = {"torch", "pandas", "numpy", "transformers", "scipy", "sklearn", "matplotlib", "soundfile", "yaml", "tqdm"}


def imported(code: str) -> set[str]:
    """Top-level packages that some code imports, by `python -X importtime`."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    return {match[1].split(".")[0] for match in re.finditer(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize(
    "code",
    [
        "import superb_probe",
        "import superb_probe.cli",
        "from superb_probe.cli import main; main(['list', 'upstreams'])",
        "from superb_probe.cli import main; main(['list', 'tasks', '--json'])",
        "from superb_probe.cli import main; main(['run', '--help'])",
        "import superb_probe.results.record",
    ],
)
def test_light_imports(code: str) -> None:
    assert imported(code) & HEAVY == set()


@pytest.mark.parametrize("module", ["leaderboard", "plot", "record"])
def test_results_never_import_torch(module: str) -> None:
    assert "torch" not in imported(f"import superb_probe.results.{module}")


def test_a_heavy_import_would_be_seen() -> None:
    assert {"torch", "numpy"} <= imported("import superb_probe; superb_probe.LayerStates")
    assert "pandas" in imported("import superb_probe.results.leaderboard")


def test_lazy_names_are_where_they_are_said_to_be() -> None:
    import superb_probe

    for name in superb_probe.__all__:
        assert getattr(superb_probe, name) is not None
    assert set(superb_probe.__all__) <= set(dir(superb_probe))
    with pytest.raises(AttributeError, match="no attribute 'lod_upstream'"):
        _ = superb_probe.lod_upstream
