"""Synthetic SID: which of eight voices hums, on tones made on the spot; for docs and first tries, it needs no data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from superb_probe.downstreams.base import Budget, Fold, ProtocolSettings, Task, TaskInfo
from superb_probe.downstreams.classification import HEADS, Classification
from superb_probe.downstreams.manifest import Manifest, Utterance

PROVIDES = ("synthetic_sid",)

SAMPLE_RATE_HZ = 16000
NUM_SPEAKERS = 8
UTTERANCES = {"train": 10, "dev": 4, "test": 8}  # of each speaker

INFO = TaskInfo(
    name="synthetic_sid",
    version=1,
    metric="accuracy",
    unit="percent",
    higher_is_better=True,
    view="mean",
    protocols={"strict": ProtocolSettings(lr_grid=(1e-1, 1e-2, 1e-3), default_lr=1e-2)},
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=400, batch=16, accumulate=1, evaluate_every=40),
        "small": Budget(steps=120, batch=16, accumulate=1, evaluate_every=20, head={"width": 64}),
    },
    label_columns=("speaker",),
    speakers="shared",
    license="made by the task, CC0",
    dataset="synthetic",
    heads=HEADS,
)


class SyntheticSpeakers(Classification):
    """Who hums: eight pitches and timbres in noise. A number on it says that an encoder runs, and nothing about speech."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """Tones made once in the folder for temporary files; `root` is not looked at."""
        folder = make_corpus(Path(tempfile.gettempdir()))
        return [Fold(None, {split: Manifest.read(folder / f"{split}.tsv") for split in UTTERANCES})]


def synthetic_sid() -> Task:
    """Eight synthetic voices, half a second to a second each."""
    return SyntheticSpeakers()


def make_corpus(parent: Path) -> Path:
    """Write the tones and their manifests below `parent`, unless they are there; returns their folder.

    The folder appears whole or not at all, so that two runs at once do no harm.
    """
    folder = parent / f"superb-probe-synthetic_sid-{INFO.version}-{os.getuid() if hasattr(os, 'getuid') else 0}"
    if (folder / "test.tsv").is_file():
        return folder
    making = Path(tempfile.mkdtemp(prefix="superb-probe-", dir=parent))
    generator = np.random.default_rng(0)
    for split, count in UTTERANCES.items():
        utterances = []
        for speaker in range(NUM_SPEAKERS):
            for number in range(count):
                name = f"{split}-{speaker}-{number}"
                wav = hum(speaker, generator)
                soundfile.write(making / f"{name}.flac", wav, SAMPLE_RATE_HZ, subtype="PCM_16")
                duration_s = wav.size / SAMPLE_RATE_HZ
                utterances.append(Utterance(name, f"{name}.flac", 0.0, duration_s, {"speaker": f"voice{speaker}"}))
        Manifest(utterances, making, split).write(making / f"{split}.tsv")
    try:
        making.rename(folder)
    except OSError:  # another run was first; its files are the same
        shutil.rmtree(making)
        if not (folder / "test.tsv").is_file():
            raise
    return folder


def hum(speaker: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """A hum of one voice (S,): a pitch of its own, wavering, five harmonics with a tilt of its own, noise and a random level."""
    num_samples = int(generator.uniform(0.5, 1.0) * SAMPLE_RATE_HZ)
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    pitch_hz = 110.0 * 2 ** (speaker / 6) * generator.uniform(0.98, 1.02)
    tilt = 1.0 + speaker % 4
    wave = np.zeros(num_samples)
    for harmonic in range(1, 6):
        phase = generator.uniform(0, 2 * np.pi)
        wave += np.sin(2 * np.pi * pitch_hz * harmonic * time_s + phase) / harmonic**tilt
    noise = generator.normal(size=num_samples) * 0.3
    return (generator.uniform(0.05, 0.15) * (wave + noise)).astype(np.float32)
