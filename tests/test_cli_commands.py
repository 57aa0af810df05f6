"""`superb-probe list`, `show`, `check`, `extract`, `convert`, `prepare`, `conformance`: what each prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from superb_probe import cli

Printed = Callable[[], tuple[str, str]]
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("what", ["upstreams", "tasks"])
def test_list(what: str, printed: Printed) -> None:
    assert cli.main(["list", what, "--json"]) == 0
    listed = json.loads(printed()[0])
    assert {"name", "provided_by", "summary"} == set(listed[0])
    assert cli.main(["list", what, listed[0]["name"]]) == 0
    assert listed[0]["name"] in printed()[0]
    assert cli.main(["list", what, "zzz*"]) == 0
    assert "no " in printed()[0]


def test_show(printed: Printed) -> None:
    assert cli.main(["show", "task", "asr", "--json"]) == 0
    assert json.loads(printed()[0])["metric"] == "wer"
    assert cli.main(["show", "task", "asr"]) == 0
    assert "lr_grid" in printed()[0]
    assert cli.main(["show", "upstream", "transformer_hubert", "--size", "test", "--json"]) == 0
    facts = json.loads(printed()[0])
    assert facts["params"] < 500_000
    assert "checkpoint" in facts["options"]


BROKEN_UPSTREAM = '''
import torch
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo


class Broken(Upstream):
    """Declares 3 layers and gives 2."""

    info = UpstreamInfo("broken", "none", 3, 4, 16000, 320, "none", 0, "block_output", (), "", "")

    def num_frames(self, num_samples):
        return num_samples // 320

    def forward(self, wavs, num_samples):
        frames = num_samples // 320
        return LayerStates(torch.zeros(2, len(wavs), int(frames.max()), 4), frames)


def broken():
    return Broken()
'''


def test_check(printed: Printed, tmp_path: Path) -> None:
    assert cli.main(["check", "upstream", "mamba_hubert_causal", "--size", "test", "--random", "0", "--json"]) == 0
    report = json.loads(printed()[0])
    assert report["passed"]
    assert len(report["checks"]) == 10
    (tmp_path / "broken.py").write_text(BROKEN_UPSTREAM)
    assert cli.main(["check", "upstream", "./broken.py:broken"]) == 1
    assert "FAILED" in printed()[0]


def test_extract_is_what_features_reads(printed: Printed, noise: Callable[..., Path], tmp_path: Path) -> None:
    noise(tmp_path / "a.wav")
    noise(tmp_path / "b.flac", seconds=0.7)
    argv = ["extract", "--upstream", "mamba_hubert", "--size", "test", "--random", "1", "--out", "states"]
    assert cli.main([*argv, "a.wav", "b.flac"]) == 0
    assert printed()[0].split() == ["states/a.npy", "states/b.npy"]
    from superb_probe.upstreams.load import load_upstream

    stored = load_upstream("features:states")
    assert stored.info.revision == "random:1"
    assert stored.states_for("a").shape[0] == stored.info.num_layers
    assert cli.main(["extract", "--upstream", "fbank", "--out", "states", "a.wav"]) == 2
    assert "other states" in printed()[1]


def test_convert(printed: Printed, tmp_path: Path, shared: Path) -> None:
    source = min((shared / "fixtures" / "upstreams").glob("*.pt"))
    assert cli.main(["convert", str(source), "--out", "own.safetensors"]) == 0
    assert "superb-probe" in printed()[0]
    assert cli.main(["convert", "own.safetensors", "--out", "again.pt"]) == 0
    assert cli.main(["convert", "own.safetensors", "--out", "named", "--format", "s3prl"]) == 0
    assert (tmp_path / "again.pt").is_file()


def test_prepare(printed: Printed, noise: Callable[..., Path], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = ["path,utt_id,split,speaker,transcript,size"]
    for index, split in enumerate(("train", "train", "dev", "test")):
        noise(corpus / f"u{index}.wav")
        rows.append(f"u{index}.wav,u{index},{split},s{index},hello,{'big' if index % 2 else 'small'}")
    (corpus / "manifest.csv").write_text("\n".join(rows) + "\n")
    argv = ["prepare", "csv", "corpus", "--out", "manifests", "--slot", "size", "--exclude", "u1"]
    assert cli.main([*argv, "--json"]) == 0
    written = json.loads(printed()[0])
    assert set(written) == {"train", "dev", "test"}
    assert "slot_size" in Path(written["train"]).read_text()
    assert "u1" not in Path(written["train"]).read_text()
    assert cli.main(argv) == 0
    assert "--manifest train=" in printed()[0]


def test_conformance_of_an_empty_folder_fails(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["conformance", "empty", "--json"]) == 1
    assert json.loads(printed()[0])["passed"] is False
