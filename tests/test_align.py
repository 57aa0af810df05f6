"""`superb-probe align`: times from a trained record, in files that `analyze` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import superb_probe
from superb_probe.cli import main
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import mini_root
from superb_probe.probes.alignments import read_alignments

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few utterances, and a record of pr and of asr trained on them for two updates."""
    out = tmp_path_factory.mktemp("align")
    train = Manifest.read(mini_root() / "read.train.tsv")[:60]
    known = {phone for phones in train.labels("phones") for phone in phones.split()}
    train.write(out / "train.tsv")
    for split in ("dev", "test"):
        manifest = Manifest.read(mini_root() / f"read.{split}.tsv")
        manifest.keep([each.id for each in manifest if set(each.labels["phones"].split()) <= known][:6]).write(
            out / f"{split}.tsv"
        )
    paths = {split: out / f"{split}.tsv" for split in SPLITS}
    superb_probe.run("fbank", ["pr", "asr"], manifest=paths, root=mini_root(), lr=[1e-3], steps=2, out=out / "runs")
    return out


def command(folder: Path, task: str, *more: str) -> list[str]:
    (record,) = (folder / "runs" / task / "fbank").glob("*.json")
    own = [f"{split}={folder / split}.tsv" for split in SPLITS]
    return [
        "align",
        str(record),
        "--record-manifest",
        *own,
        "--record-root",
        str(mini_root()),
        "--root",
        str(mini_root()),
        *more,
    ]


@pytest.mark.parametrize(("task", "tier", "column"), [("pr", "phones", "phones"), ("asr", "words", "text")])
def test_every_token_gets_a_time_in_order(task: str, tier: str, column: str, folder: Path) -> None:
    out = folder / f"{task}.csv"
    assert main(command(folder, task, "--manifest", str(folder / "dev.tsv"), "--out", str(out))) == 0
    times = read_alignments(out, tier)  # it refuses times that run backwards
    for utterance in Manifest.read(folder / "dev.tsv", mini_root()):
        segments = times[utterance.id]
        assert [each.label for each in segments] == utterance.labels[column].split()
        assert segments[0].start_s >= 0 and segments[-1].end_s <= utterance.duration_s + 0.02


def test_textgrids_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(command(folder, "pr", "--manifest", str(folder / "dev.tsv"), "--out", str(folder / "grids"), "--json"))
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["aligned"], found["problems"], found["backend"], len(found["files"])) == (6, [], "own search", 6)
    assert len(read_alignments(folder / "grids")) == 6


def test_what_cannot_be_aligned_is_told_and_the_rest_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "dev.tsv").read_text().splitlines()
    header, cells = lines[0].split("\t"), lines[1].split("\t")
    cells[header.index("duration_s")] = "0.2"  # too few frames for its phones
    (folder / "short.tsv").write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    assert main(command(folder, "pr", "--manifest", str(folder / "short.tsv"), "--out", str(folder / "short.csv"))) == 1
    assert "5 of 6 utterances aligned" in (said := capsys.readouterr().out) and f"{cells[0]}:" in said
    assert set(read_alignments(folder / "short.csv")) == {line.split("\t")[0] for line in lines[2:]}


def test_wrong_requests_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "unknown.tsv").write_text(
        "id\taudio\tstart_s\tduration_s\tphones\na\tx.wav\t0\t1\tQQ\nb\tx.wav\t0\t1\tZZ9\n"
    )
    assert main(command(folder, "pr", "--manifest", str(folder / "unknown.tsv"), "--out", str(folder / "x.csv"))) == 2
    error = capsys.readouterr().err
    assert "QQ" in error and "ZZ9" in error
    assert main(command(folder, "asr", "--manifest", str(folder / "unknown.tsv"), "--out", str(folder / "x.csv"))) == 2
    assert "no column 'text'" in capsys.readouterr().err
