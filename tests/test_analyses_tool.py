"""tools/analyses.py, the one command for all analyses: its splits, commands that the command line takes, its table of times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from superb_probe.cli import build_parser
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import RequestError
from superb_probe.upstreams.sizes import FAMILIES


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("analyses")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A corpus in the form of emodb4: ten speakers, two sentences."""
    folder = tmp_path / "data" / "emodb4"
    folder.mkdir(parents=True)
    speakers = ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16")
    names = [f"{speaker}{sentence}Fa" for speaker in speakers for sentence in ("a01", "b10")] + ["08a01Wa"]
    lines = ["path,utt_id,speaker,transcript,duration_s,split,emotion"]
    for number, name in enumerate(names):
        soundfile.write(folder / f"{name}.wav", np.zeros(1600), 16000)
        lines.append(f"{name}.wav,{name},{name[:2]},Text.,0.1,{('train', 'dev', 'test')[number % 3]},happy")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder.parent


def test_the_encoders_are_all_embedded_ones_each_once(tool: Any) -> None:
    parts = tool.halves(FAMILIES)
    assert (
        sorted(name for part in parts for name in part) == sorted(FAMILIES) and abs(len(parts[0]) - len(parts[1])) < 2
    )
    assert tool.halves(["fbank"]) == [["fbank"]]


def test_six_speakers_are_tested_and_none_of_them_is_trained_on(tool: Any, data: Path, tmp_path: Path) -> None:
    speech = next(each for each in tool.SPEECH if each.name == "emodb4")
    options = tool.places(speech, tool.Settings(data, tmp_path / "out", limit=7))
    assert options[:2] == ["--limit", "7"]
    files = dict(each.split("=") for each in options[options.index("--manifest") + 1 :])
    found = {split: Manifest.read(Path(file), data / "emodb4") for split, file in files.items()}
    speakers = {split: {each.labels["speaker"] for each in manifest} for split, manifest in found.items()}
    assert (
        len(speakers["test"]) == 6 and not speakers["test"] & speakers["train"] and speakers["dev"] == speakers["train"]
    )
    assert {name[2:5] for name in found["dev"].ids} == {"b10"} and "b10" not in {
        name[2:5] for name in found["train"].ids
    }
    assert sum(map(len, found.values())) == 20  # all but the one without phones


def test_every_command_is_one_that_the_command_line_takes(tool: Any, data: Path, tmp_path: Path) -> None:
    asked = tool.Settings(data, tmp_path / "out", size="test", change=("opus",))
    parser = build_parser()
    for speech in tool.SPEECH:
        if speech.alignment and not (data / speech.name).is_dir():
            continue
        options = tool.places(speech, asked)
        for first in (True, False):
            commands = tool.commands_of(speech, ["mamba_hubert"], first, options, asked)
            parsed = [parser.parse_args(command) for command in commands]
            assert [each.analysis for each in parsed] == ["units", "cca", "disentangle"]
            assert all(("fbank" in each.beside) == first and str(each.figure) == "none" for each in parsed)
            assert parsed[0].clusters == list(speech.clusters) and parsed[1].target[: len(speech.targets)] == list(
                speech.targets
            )
            assert all(bool(each.alignment) == bool(speech.alignment) for each in parsed)


def test_a_command_that_fails_is_told_with_what_it_said(tool: Any, tmp_path: Path) -> None:
    log = tool.Log(tmp_path)
    with pytest.raises(RequestError, match="mini units a ended with status 2.*two or more"):
        log.run("mini units a", ["analyze", "units", "--upstream", "fbank", "--clusters", "1"])
    assert log.seconds == [] and "two or more" in (tmp_path / "mini_units_a.txt").read_text()


def test_times_of_both_parts_are_added(tool: Any) -> None:
    table = tool.table_of([("mini units a", 10.0), ("mini units b", 5.0), ("mini figures", 2.0)], 90.0)
    assert "| mini | units | 15 |" in table and "| mini | figures | 2 |" in table and "1.5 minutes in all" in table


def test_a_failed_command_ends_the_other_chain_before_its_next(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    other, failed = threading.Event(), threading.Event()

    def run(self: Any, name: str, command: list[str]) -> None:
        begun.append(name)
        if name == "mini units a":
            assert other.wait(10)
            failed.set()
            raise RequestError("no")
        other.set()
        assert failed.wait(10)
        time.sleep(0.3)  # until the pool has seen it

    monkeypatch.setattr(tool.Log, "run", run)
    with pytest.raises(RequestError, match="no"):
        tool.run_all(tool.Settings(None, tmp_path), ["mamba_hubert", "transformer_hubert"], tool.SPEECH[:1])
    assert sorted(begun) == ["mini units a", "mini units b"]


def test_data_that_is_no_folder_ends_it(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
