"""Prediction files, line by line as s3prl writes them."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.signal import medfilt

from superb_probe import cli
from superb_probe.downstreams.sd import SETTINGS, levels_text
from superb_probe.errors import RequestError
from superb_probe.probes.diarization import decide
from superb_probe.results.record import RunRecord, write_record
from superb_probe.results.submission import CORPORA, PARTS, write_submission

Make = Callable[..., RunRecord]
Write = Callable[..., Path]

TEXT = {"id": ["61-0-1", "61-0-2"], "hypothesis": ["AH0 B", ""], "edits": [1, 2], "phones": [2, 2]}
CASES: dict[str, tuple[str, Mapping[str, Any], str, list[str]]] = {
    "pr": ("pr", TEXT, "pr_public/predict.ark", ["61-0-1 AH0 B", "61-0-2 "]),
    "asr": ("asr", TEXT, "asr_public/predict.ark", ["61-0-1 AH0 B", "61-0-2 "]),
    "asr with lm": ("asr", TEXT, "asr_lm_public/predict.ark", ["61-0-1 AH0 B", "61-0-2 "]),
    "sf": ("sf", TEXT, "sf_public/predict.ark", ["61-0-1 AH0 B", "61-0-2 "]),
    "ks": (
        "ks",
        {"id": ["yes-1_nohash_0"], "predicted_keyword": ["_unknown_"]},
        "ks_public/predict.txt",
        ["yes-1_nohash_0.wav _unknown_"],
    ),
    "sid": (
        "sid",
        {"id": ["id10001-v-00001.wav"], "predicted_speaker": ["id10002"]},
        "sid_public/predict.txt",
        ["id10001-v-00001 id10002"],
    ),
    "asv": ("asv", {"id": ["a-v-1.wav b-w-2.wav"], "score": [0.25]}, "sv_public/predict.txt", ["a-v-1_b-w-2 0.25"]),
    "ic": (
        "ic",
        {"id": ["u1"], **{f"predicted_slot_{slot}": [slot] for slot in ("location", "object", "action")}},
        "ic_public/predict.csv",
        ["u1,action,object,location"],
    ),
    "er": ("er", {"id": ["Ses01F"], "predicted_emotion": ["neu"]}, "er_fold1_public/predict.txt", ["Ses01F neu"]),
}


@pytest.fixture
def write(make_record: Make, tmp_path: Path) -> Write:
    """A record of a task and its items on disk."""

    def made(task: str, items: Mapping[str, Any], **changes: Any) -> Path:
        given = {
            "task.name": task,
            "task.dataset": CORPORA.get(task, "mini"),
            "task.num_items": {"test": len(items["id"])},
            "task.fold": "session1" if task == "er" else None,
            **changes,
        }
        return write_record(make_record(**given), items, tmp_path / "runs")

    return made


@pytest.mark.parametrize("case", list(CASES))
def test_each_task_as_the_site_takes_it(case: str, write: Write, tmp_path: Path) -> None:
    task, items, name, lines = CASES[case]
    options = {"probe.head_options": {"lm": "4-gram.arpa"}} if case == "asr with lm" else {}
    made = write_submission([write(task, items, **options)], tmp_path / "out")
    assert (tmp_path / "out" / "predict" / name).read_text().splitlines() == lines
    with zipfile.ZipFile(made.path) as archive:
        assert archive.namelist() == [f"predict/{name}"]
    part = name.partition("/")[0]
    assert made.parts == {part: len(lines)}
    assert set(made.absent) == set(PARTS) - {part}


def test_posteriors_that_every_setting_of_the_site_decides_alike(write: Write, tmp_path: Path) -> None:
    """Mutant: with one posterior a threshold off, the turns of some setting differ."""
    h5py = pytest.importorskip("h5py")
    logits = np.random.default_rng(0).normal(scale=1.2, size=(400, 2))
    path = write("sd", {"id": ["a_b"], "levels": [levels_text(logits)]}, **{"upstream.hop_samples": 160})
    made = write_submission([path], tmp_path / "out")
    folder = tmp_path / "out" / "predict" / "sd_public"
    assert (folder / "frame_shift").read_text() == "160\n"
    with h5py.File(folder / "scoring" / "predictions" / "a_b.h5") as file:
        posteriors = file["T_hat"][:]
    assert posteriors.dtype == np.float32
    for threshold, median in SETTINGS:  # the site's own steps: where, then a median filter
        theirs = medfilt(np.where(posteriors > threshold, 1, 0).astype(float), (median, 1))
        assert np.array_equal(theirs > 0.5, decide(logits, threshold, median))
    assert made.parts == {"sd_public": 1}
    with zipfile.ZipFile(made.path) as archive:
        names = ["frame_shift", "scoring/predictions/a_b.h5"]
        assert archive.namelist() == [f"predict/sd_public/{name}" for name in names]


def test_without_h5py_it_says_what_to_install(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RequestError, match=r"superb-probe\[hdf5\]"):
        write_submission([write("sd", {"id": ["a"], "levels": ["0x1; 0x1"]})], tmp_path / "out")


def test_detected_terms(write: Write, tmp_path: Path) -> None:
    items = {"id": ["q1", "q2"], "scores": ["2.5000 -0.1000", "0.0000 2.0000"], "documents": ["d1 d2", ""]}
    write_submission([write("qbe", items)], tmp_path / "out")
    text = (tmp_path / "out" / "predict" / "qbe_public" / "benchmark.stdlist.xml").read_text()
    root = ElementTree.fromstring(text)
    found = [
        (each.attrib["termid"], *((t.attrib["file"], t.attrib["score"], t.attrib["decision"]) for t in each))
        for each in root
    ]
    assert found == [
        ("q1", ("d1", "2.5000", "YES"), ("d2", "-0.1000", "NO")),
        ("q2", ("d1", "0.0000", "NO"), ("d2", "2.0000", "NO")),
    ]
    assert root.attrib == {
        "termlist_filename": "benchmark.stdlist.xml", "indexing_time": "1.00", "language": "english", "index_size": "1",
        "system_id": "benchmark",
    }  # fmt: skip
    assert set(root[0][0].attrib) == {"file", "channel", "tbeg", "dur", "score", "decision"}


def test_the_command_says_what_is_absent(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("pr", TEXT)
    assert cli.main(["submit", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "no record of: asr_public" in capsys.readouterr().out
    assert cli.main(["submit", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "has a submission already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.dataset": "mini"}, "the site scores the test set of librispeech"),
        ({"task.num_items": {"test": 3}}, "2 items beside the record, which says 3"),
        ({"probe.control": "shuffle"}, "true labels"),
    ],
)
def test_what_is_no_submission(changes: dict[str, Any], told: str, write: Write, tmp_path: Path) -> None:
    path = write("pr", TEXT, **changes)
    with pytest.raises(RequestError, match=told):
        write_submission([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_problems_at_once(write: Write, tmp_path: Path) -> None:
    """Two records of a part, a task that is none of the site's, items of before predictions were kept."""
    paths = [write("pr", TEXT), write("pr", TEXT, run_id="aaaaaaaa"), write("synthetic_sid", TEXT)]
    paths += [write("ks", {"id": ["a"], "correct": [1]}), write("sd", {"id": ["a"], "turns": ["0 1 1"]})]
    paths += [write("qbe", {"id": ["a"], "hits": ["1"]})]
    with pytest.raises(RequestError) as error:
        write_submission(paths, tmp_path / "out")
    columns = ("no column 'predicted_keyword'", "no column 'levels'", "no column 'documents'")
    for told in ("a second record of pr_public", "synthetic_sid is no task of the site", *columns):
        assert told in str(error.value)
    assert not (tmp_path / "out").exists()
