"""tools/finetune_speech.py: what it takes of a pack, how it makes documents, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import RequestError

HEADER = "id\taudio\tstart_s\tduration_s\tcorpus\tlicense\tvoice\ttext\n"


@pytest.fixture
def tool(load_tool: Callable[[str], Any]) -> Any:
    load_tool("finetune_grid")
    return load_tool("finetune_speech")


def pack(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    lines = []
    for number, (name, voice, text) in enumerate(rows):
        soundfile.write(folder / f"{name}.wav", np.full(1600 * (number + 1), 0.1 * number), 16000)
        lines.append(f"{name}\t{name}.wav\t0\t{0.1 * (number + 1):g}\tc\tfree\t{voice}\t{text}\n")
    (folder / "train.tsv").write_text(HEADER + "".join(lines), encoding="utf-8")
    return folder


def test_a_pack_gives_its_whole_clips_with_texts(tool: Any, tmp_path: Path) -> None:
    rows = [("u-0000", "b", "well, yes"), ("u-0001", "a", ""), ("long-0002-1", "a", "a piece"), ("w-0003", "a", "It's")]
    found = tool.packed(pack(tmp_path, rows))
    assert [(row.id, row.labels["text"]) for row in found] == [("u-0000", "WELL YES"), ("w-0003", "IT'S")]
    (tmp_path / "w-0003.wav").unlink()
    with pytest.raises(RequestError, match=r"1 clips are missing, first w-0003\.wav"):
        tool.packed(tmp_path)


def test_a_split_is_written_by_voice_with_its_documents(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    source = tool.packed(
        pack(tmp_path / "pack", [("x-0000", "b", "one"), ("y-0001", "a", "two"), ("z-0002", "a", "three")])
    )
    with ThreadPoolExecutor(1) as pool:
        tool.write([source], "train", tmp_path / "out", 2, pool)
    made = Manifest.read(tmp_path / "out" / "train.tsv")
    assert [(row.id, row.labels["document"]) for row in made] == [
        ("y-0001", "y-0001"),
        ("z-0002", "y-0001"),
        ("x-0000", "x-0000"),
    ]
    assert [row.duration_s for row in made] == [0.2, 0.3, 0.1]
    assert read_waveform(made["z-0002"], made.root) == pytest.approx(0.2, abs=1e-4)
