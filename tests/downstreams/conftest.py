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
    """A folder laid out like `mini`: read sentences with text and phones, commands with slots, trials, and what is cut from them."""
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
        write_words(root, split)
        write_slots(root, split)
        write_mixtures(root, split)
        if split != "train":
            write_queries(root, split)
    write_speakers(root)
    write_styles(root)
    return root


def write_words(root: Path, split: str) -> None:
    """KS: two words and silence, stretches of the commands."""
    rows = []
    for speaker in SPEAKERS[split]:
        rows.append((f"{speaker}-yes", f"audio/{speaker}-c0.flac", 0, 0.5, speaker, "yes"))
        rows.append((f"{speaker}-no", f"audio/{speaker}-c1.flac", 0, 0.5, speaker, "no"))
        rows.append((f"{speaker}-noise", f"audio/{speaker}-c0.flac", 0.5, 0.3, "", "_silence_"))
    write_rows(root / f"words.{split}.tsv", ["id", "audio", "start_s", "duration_s", "speaker", "keyword"], rows)


def write_slots(root: Path, split: str) -> None:
    """SF: each speaker fills one slot in one sentence, another in the other."""
    rows = []
    for speaker in SPEAKERS[split]:
        for number, (action, iob) in enumerate((("on", "O O state"), ("off", "O thing O"))):
            row = (f"{speaker}-c{number}", f"audio/{speaker}-c{number}.flac", 0, 0.8, speaker, f"turn it {action}", iob)
            rows.append(row)
    write_rows(root / f"slots.{split}.tsv", ["id", "audio", "start_s", "duration_s", "speaker", "text", "iob"], rows)


def write_mixtures(root: Path, split: str) -> None:
    """SD: recordings of 1.2 s in which two speakers overlap, elsewhere in each."""
    (root / "rttm").mkdir(exist_ok=True)
    rows = []
    for number, speaker in enumerate(SPEAKERS[split]):
        name = f"{speaker}-mix"
        turns = ((0.0, 0.4 + 0.2 * number, "a"), (0.3, 0.9 - 0.1 * number, "b"))
        lines = [
            f"SPEAKER {name} 1 {start:.2f} {length:.2f} <NA> <NA> {who} <NA> <NA>\n" for start, length, who in turns
        ]
        (root / "rttm" / f"{name}.rttm").write_text("".join(lines), encoding="utf-8")
        rows.append((name, f"audio/{speaker}-0.flac", 0, 1.2, f"rttm/{name}.rttm"))
    write_rows(root / f"mixtures.{split}.tsv", ["id", "audio", "start_s", "duration_s", "rttm"], rows)


def write_queries(root: Path, split: str) -> None:
    """QbE: each speaker's command is looked for in all sentences and is in one."""
    queries = [(f"{name}-q", f"audio/{name}-c0.flac", 0, 0.8, name) for name in SPEAKERS[split]]
    documents = [(f"{name}-{k}", f"audio/{name}-{k}.flac", 0, 2.2, name) for name in SPEAKERS[split] for k in range(2)]
    header = ["id", "audio", "start_s", "duration_s", "speaker"]
    write_rows(root / f"queries.{split}.tsv", header, queries)
    write_rows(root / f"documents.{split}.tsv", header, documents)
    pairs = [(f"{name}-q", f"{name}-1") for name in SPEAKERS[split]]
    write_rows(root / f"occurrences.{split}.tsv", ["query", "document"], pairs)


def write_speakers(root: Path) -> None:
    """SID: the training speakers in every split, with another sentence in each."""
    for number, split in enumerate(("train", "dev", "test")):
        rows = [(f"{name}-{number}", f"audio/{name}-{number}.flac", 0, 2.2, name) for name in SPEAKERS["train"]]
        write_rows(root / f"speakers_id.{split}.tsv", ["id", "audio", "start_s", "duration_s", "speaker"], rows)


def write_styles(root: Path) -> None:
    """ER: five sessions of two speakers, each a stretch of every read sentence of the training speakers."""
    for session in range(1, 6):
        rows = []
        for number, speaker in enumerate(f"{name}-{k}" for name in SPEAKERS["train"] for k in range(3)):
            style = ("fast", "slow")[number % 2]
            who = f"s{session}{'ab'[number // 2 % 2]}"
            rows.append((f"{session}-{speaker}", f"audio/{speaker}.flac", 0.4 * (session - 1), 0.4, who, f"{style}"))
        header = ["id", "audio", "start_s", "duration_s", "speaker", "emotion"]
        write_rows(root / f"styles.{session}.tsv", header, rows)


@pytest.fixture(scope="session")
def speech() -> Callable[..., np.ndarray]:
    """Speech of the embedded corpus: the utterance of a number, or its first seconds."""
    from superb_probe.downstreams.audio import read_waveform
    from superb_probe.downstreams.manifest import Manifest
    from superb_probe.downstreams.mini import mini_root

    manifest = Manifest.read(mini_root() / "read.test.tsv", mini_root())
    known: dict[int, np.ndarray] = {}

    def take(number: int, seconds: float | None = None) -> np.ndarray:
        position = number % len(manifest)
        if position not in known:
            known[position] = read_waveform(manifest[position], manifest.root)
        return known[position] if seconds is None else known[position][: round(seconds * RATE)]

    return take


@pytest.fixture(scope="session")
def write_speech(speech: Callable[..., np.ndarray]) -> Callable[..., Path]:
    """Write speech of the embedded corpus to a file of a tree, making its folders."""

    def write(path: Path, number: int, seconds: float | None = 1.0, rate: int = RATE, channels: int = 1) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        wav = speech(number, seconds)
        soundfile.write(path, np.stack([wav] * channels, axis=1) if channels > 1 else wav, rate)
        return path

    return write
