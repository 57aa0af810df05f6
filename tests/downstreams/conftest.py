"""A small corpus laid out like the embedded one, and the pieces to break it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16000
SPEAKERS = {"train": ("ann", "bob", "cem"), "dev": ("dee", "eve"), "test": ("fay", "gus")}
SENTENCES = {
    "train": ("go on", "as it is", "no"),
    "dev": ("it is on", "so it is"),
    "test": ("is it so", "on it"),
}

Writer = Callable[..., Path]


def tone(seconds: float, hz: float, rate: int = RATE) -> np.ndarray:
    """A tone with a little noise, loud enough not to be trimmed."""
    time_s = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(int(hz)).normal(size=time_s.size) * 0.01
    return (0.2 * np.sin(2 * np.pi * hz * time_s) + noise).astype(np.float32)


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """A TSV."""
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


@pytest.fixture
def write_tsv(tmp_path: Path) -> Writer:
    """Write a TSV into the test's folder."""

    def write(name: str, header: str, *rows: Sequence[object]) -> Path:
        return write_rows(tmp_path / name, header.split(), rows)

    return write


@pytest.fixture
def write_audio(tmp_path: Path) -> Callable[..., str]:
    """Write a file of sound into the test's folder and give its name."""

    def write(name: str, seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> str:
        wav = tone(seconds, 300.0, rate)
        soundfile.write(tmp_path / name, np.stack([wav] * channels, axis=1) if channels > 1 else wav, rate)
        return name

    return write


@pytest.fixture(scope="session")
def mini_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like `mini`: read sentences with text and phones, commands with slots, trials."""
    root = tmp_path_factory.mktemp("mini_like")
    (root / "audio").mkdir()
    hz = 100.0
    for split, speakers in SPEAKERS.items():
        read, commands = [], []
        for speaker in speakers:
            for number, sentence in enumerate(SENTENCES[split]):
                hz += 17.0
                name = f"{speaker}-{number}"
                soundfile.write(root / "audio" / f"{name}.flac", tone(2.2, hz), RATE)
                phones = " ".join(("G", "OW1", "AA1")[: number + 1])
                read.append((name, f"audio/{name}.flac", 0, 2.2, speaker, sentence, phones))
            for number, action in enumerate(("on", "off")):
                hz += 17.0
                name = f"{speaker}-c{number}"
                soundfile.write(root / "audio" / f"{name}.flac", tone(0.8, hz), RATE)
                row = (name, f"audio/{name}.flac", 0, 0.8, speaker, f"turn it {action}", action, "lamp", "none")
                commands.append(row)
        write_rows(
            root / f"read.{split}.tsv", ["id", "audio", "start_s", "duration_s", "speaker", "text", "phones"], read
        )
        slots = [
            "id",
            "audio",
            "start_s",
            "duration_s",
            "speaker",
            "text",
            "slot_action",
            "slot_object",
            "slot_location",
        ]
        write_rows(root / f"commands.{split}.tsv", slots, commands)
        if split != "train":
            ids = [row[0] for row in read]
            speaker_of = {row[0]: row[4] for row in read}
            pairs = [(int(speaker_of[a] == speaker_of[b]), a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
            write_rows(root / f"trials.{split}.tsv", ("label", "id_a", "id_b"), pairs)
    return root
