"""The command `doctor`: every package, its version, whether it really works, what it enables and what mends it.

Each package is imported in a process of its own, so that a broken one (a CUDA-linked torchaudio, a half-built mamba-ssm) is
a line in a table and not the end of the command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, table

TIMEOUT_S = 180
_STUB = "from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub as stub; stub()\n"
_STAND_INS = "from superb_probe.upstreams.torchaudio_stub import install_s3prl_stand_ins as stub; stub()\n"


@dataclass(frozen=True, slots=True)
class Package:
    """One dependency.

    Attributes:
        distribution: its name on the package index.
        probe: Python that fails when it does not work.
        enables: what it is for.
        mend: the command that installs or repairs it.
        core: whether nothing works without it.
    """

    distribution: str
    probe: str
    enables: str
    mend: str
    core: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What `doctor` found out about one package; `state` is "works", "missing" or "broken"."""

    package: str
    version: str
    state: str
    detail: str
    enables: str
    mend: str
    core: bool


def _core(distribution: str, probe: str, enables: str) -> Package:
    return Package(distribution, probe, enables, f"pip install --force-reinstall '{distribution}'")


PACKAGES = (
    _core("torch", "import torch; torch.ones(2) @ torch.ones(2)", "everything that computes"),
    _core(
        "transformers", "from transformers import HubertConfig, HubertModel", "transformers folders and hf: upstreams"
    ),
    _core("numpy", "import numpy", "arrays"),
    _core("scipy", "import scipy.stats, scipy.signal", "intervals and filters"),
    _core(
        "soundfile",
        "import soundfile; assert 'OGG' in soundfile.available_formats(), 'libsndfile without Ogg'; "
        "assert 'OPUS' in soundfile.available_subtypes('OGG'), 'libsndfile without Opus'",
        "reading audio (WAV, FLAC, Opus)",
    ),
    _core("soxr", "import soxr", "resampling where a task's protocol asks for it"),
    _core("safetensors", "import safetensors.torch", "the project's own weights"),
    _core("pyyaml", "import yaml", "sweep files and superb.yaml"),
    _core("pandas", "import pandas; pandas.DataFrame({'a': [1]})", "leaderboards"),
    _core("scikit-learn", "import sklearn.metrics", "ROC curves for EER"),
    _core("matplotlib", "import matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot", "plots"),
    _core("rapidfuzz", "from rapidfuzz.distance import Levenshtein", "edit distance for WER, CER and PER"),
    _core("tqdm", "import tqdm", "progress bars"),
    Package(
        "s3prl",
        _STAND_INS + "from s3prl.nn import S3PRLUpstream",
        "s3prl: upstreams",
        "pip install 'superb-probe[s3prl]'",
        False,
    ),
    Package(
        "flashlight-text",
        "from flashlight.lib.text.decoder import LexiconDecoder, kenlm",
        "ASR with a language model (--head-option lm=FILE)",
        "pip install 'superb-probe[lm]'",
        False,
    ),
    Package(
        "speechbrain",
        _STUB + "import speechbrain.utils.metric_stats",
        "the head `ecapa` of ASV, an independent check of metrics",
        "pip install 'superb-probe[speechbrain]'",
        False,
    ),
    Package(
        "torchaudio",
        _STUB + "import torchaudio, torchaudio.compliance.kaldi",
        "Kaldi features as an independent check",
        "pip install 'superb-probe[torchaudio]'",
        False,
    ),
    Package(
        "mamba-ssm",
        "import mamba_ssm; from mamba_ssm.ops.selective_scan_interface import selective_scan_fn",
        "fused Mamba kernels on NVIDIA GPUs (never needed)",
        "pip install --no-build-isolation 'superb-probe[cuda]' (after torch, with nvcc)",
        False,
    ),
    Package(
        "resemblyzer",
        "from resemblyzer import VoiceEncoder, preprocess_wav",
        "speaker embeddings (analyze cca --target resemblyzer)",
        "pip install 'superb-probe[speakers]'",
        False,
    ),
    Package(
        "setuptools",
        "import pkg_resources",
        "resemblyzer's voice activity detector imports it",
        "pip install 'superb-probe[speakers]'",
        False,
    ),
    Package("h5py", "import h5py", "SD between s3prl and here", "pip install 'superb-probe[hdf5]'", False),
    Package(
        "jsonschema",
        "import jsonschema",
        "tests: records against their schemas",
        "pip install 'superb-probe[dev]'",
        False,
    ),
    Package("pytest", "import pytest", "tests", "pip install 'superb-probe[dev]'", False),
    Package(
        "ruff",
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'ruff', '--version'], check=True)",
        "tests: style",
        "pip install 'superb-probe[dev]'",
        False,
    ),
    Package("mypy", "import mypy.api", "tests: types", "pip install 'superb-probe[dev]'", False),
    Package("build", "import build", "building the wheel", "pip install 'superb-probe[dev]'", False),
)


def add_commands(subparsers: Any) -> None:
    """Add `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="which packages work, what each enables, what mends it",
        description="Every package this project can use: version, works or not, what it enables, the command that mends it.\n"
        "Exit status 1 when a core package is missing or broken.",
        epilog="examples:\n  superb-probe doctor\n  superb-probe doctor --json",
    )
    add_json(parser)
    parser.set_defaults(handler=report)


def examine(package: Package, timeout_s: float = TIMEOUT_S) -> Finding:
    """Import one package in a process of its own and say how that went."""

    def finding(version: str, state: str, detail: str = "") -> Finding:
        return Finding(package.distribution, version, state, detail, package.enables, package.mend, package.core)

    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return finding("-", "missing")
    try:
        done = subprocess.run(
            [sys.executable, "-c", package.probe], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return finding(version, "broken", f"import took more than {timeout_s:g} s")
    if done.returncode == 0:
        return finding(version, "works")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return finding(version, "broken", said[-1].strip() if said else f"import ended with status {done.returncode}")


def examine_all(packages: Sequence[Package] = PACKAGES) -> list[Finding]:
    """The findings for all packages, two imports at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(examine, packages))


def report(args: argparse.Namespace) -> int:
    """Print the findings; 1 when a core package is missing or broken."""
    findings = examine_all()
    python = f"Python {platform.python_version()} on {platform.platform(terse=True)} ({sys.executable})"
    device = _devices()
    if args.json:
        print_json({"python": python, "devices": device, "packages": findings})
    else:
        print(f"{python}\ndevices: {device}\n")
        rows = []
        for found in findings:
            state = found.state + (": " + found.detail if found.detail else "")
            mend = "" if found.state == "works" else found.mend
            rows.append(
                (found.package, found.version, "core" if found.core else "extra", state[:90], found.enables, mend)
            )
        print(table(("package", "version", "kind", "state", "enables", "mend with"), rows))
    return 1 if any(found.core and found.state != "works" for found in findings) else 0


def _devices() -> str:
    """The GPUs torch sees, asked in another process."""
    code = (
        "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or 'cpu only')"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "unknown (torch does not answer)"
    return done.stdout.strip() if done.returncode == 0 else "unknown (torch does not work)"
