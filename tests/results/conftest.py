"""Made-up records: the example of the record's documentation, changed field by field."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from superb_probe.results.record import RunRecord

EXAMPLE: dict[str, Any] = {
    "schema": "superb-probe/run/1",
    "run_id": "3f9c1ab2",
    "status": "finished",
    "upstream": {
        "name": "mamba_hubert_causal",
        "revision": "sha256:9b1e",
        "num_layers": 13,
        "dim": 768,
        "hop_samples": 320,
        "waveform_norm": "none",
        "sample_rate_hz": 16000,
        "lookahead_samples": None,
        "layer_convention": "block_output",
        "params": 94371712,
        "trained_on": ["librispeech-960"],
        "provided_by": "superb-probe 0.1.0",
    },
    "task": {
        "name": "asv",
        "version": 1,
        "dataset": "voxceleb1",
        "fold": None,
        "protocol": "strict",
        "metric": "eer",
        "unit": "percent",
        "higher_is_better": False,
        "protocol_deviations": [],
        "data": {"train": "sha256:a", "dev": "sha256:b", "test": "sha256:c"},
        "num_items": {"test": 37720},
    },
    "probe": {
        "head": "xvector",
        "view": "frames",
        "layer_norm": False,
        "lr": 0.0001,
        "seed": 1,
        "batch": 50,
        "steps": 200000,
        "optimizer": "adamw",
        "trainable_params": 4219137,
    },
    "selection": {"split": "dev", "metric": "eer", "step": 180000, "value": 4.91},
    "score": {
        "split": "test",
        "value": 5.23,
        "ci95": [4.98, 5.49],
        "ci": "bootstrap over test speakers, 1000 draws",
        "extra": {"min_dcf": 0.41},
    },
    "layer_weights": [0.03, 0.04, 0.06, 0.07, 0.10, 0.12, 0.14, 0.12, 0.10, 0.08, 0.06, 0.05, 0.03],
    "items": "3f9c1ab2.items.tsv.gz",
    "probe_weights": {"file": "3f9c1ab2.safetensors", "sha256": "00"},
    "cost": {"extract_s": 1200.1, "fit_s": 5312.4, "peak_memory_bytes": 9100000000, "store_bytes": 359424000000},
    "environment": {
        "superb_probe": "0.1.0",
        "commit": "abc1234",
        "dirty": False,
        "python": "3.11.7",
        "torch": "2.5.1",
        "device": "NVIDIA H100 80GB",
        "platform": "Linux-x86_64",
        "deterministic": True,
        "command": "python run_superb.py --upstream mamba_hubert_causal --task asv",
    },
    "started_at": "2026-11-22T20:15:03Z",
    "finished_at": "2026-11-22T22:03:51Z",
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The example with some values replaced; keys are paths like "probe.lr"."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return values


@pytest.fixture
def example() -> dict[str, Any]:
    return copy.deepcopy(EXAMPLE)


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """make_record(dev=..., test=..., **{"probe.lr": ...}): its run id is a hash of what was changed, as in a real run."""

    def make(dev: float = 4.91, test: float = 5.23, **changes: Any) -> RunRecord:
        half = changes.pop("half", 0.3)
        run_id = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]
        scores = {
            "selection.value": dev,
            "score.value": test,
            "score.ci95": [test - half, test + half],
            "run_id": run_id,
        }
        return RunRecord.from_dict(changed(EXAMPLE, {**scores, **changes}))

    return make


def _neighbour(name: str) -> Any:
    """A helper module of this folder (tests are no package)."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"results_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made_up() -> Any:
    """The module that makes records up."""
    return _neighbour("made_up")


@pytest.fixture(scope="session")
def simulate_compare() -> Any:
    """The module that simulates comparisons."""
    return _neighbour("simulate_compare")


@pytest.fixture(scope="session")
def base_record() -> RunRecord:
    """The record that others are changed from."""
    return RunRecord.from_dict(EXAMPLE)


@pytest.fixture(scope="session")
def tab() -> Iterator[Any]:
    """A tab of a headless Chromium; skips where there is none."""
    chromium = _neighbour("chromium")
    program = chromium.find_chromium()
    if program is None:
        pytest.skip(
            "no Chromium: install one (Debian: apt-get install chromium) or set SUPERB_PROBE_CHROMIUM to its program"
        )
    with chromium.chromium(program) as found:
        yield found
