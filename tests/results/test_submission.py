"""Prediction files, line by line as s3prl writes them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from superb_probe import cli
from superb_probe.errors import RequestError
from superb_probe.results.record import RunRecord, write_record
from superb_probe.results.submission import CORPORA, NOT_WRITTEN, PARTS, write_submission

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
    """Two records of a part, tasks whose files cannot be made, items of before predictions were kept."""
    paths = [write("pr", TEXT), write("pr", TEXT, run_id="aaaaaaaa")]
    paths += [write(task, {"id": ["a"]}) for task in NOT_WRITTEN]
    paths += [write("ks", {"id": ["a"], "correct": [1]})]
    with pytest.raises(RequestError) as error:
        write_submission(paths, tmp_path / "out")
    for told in ("a second record of pr_public", "scoring/predictions", "not stated", "no column 'predicted_keyword'"):
        assert told in str(error.value)
    assert not (tmp_path / "out").exists()
