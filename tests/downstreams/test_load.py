"""The doors: tasks by name and by file, folds from a folder and from manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from superb_probe.downstreams.base import Task
from superb_probe.downstreams.load import folds_from_manifests, load_folds, load_task
from superb_probe.errors import RequestError
from superb_probe.registry import Registry


def paths(root, stem="read", **more):
    return {**{split: root / f"{stem}.{split}.tsv" for split in ("train", "dev", "test")}, **more}


def test_a_task_is_loaded_by_name_and_by_file(tmp_path):
    assert load_task("ic").info.name == "ic"
    with pytest.raises(RequestError, match="Did you mean ic"):
        load_task("icc")
    (tmp_path / "mine.py").write_text(
        "from superb_probe.downstreams.ic import IntentClassification\n"
        "def mine():\n    return IntentClassification()\n"
        "def wrong():\n    return 3\n",
        encoding="utf-8",
    )
    assert isinstance(load_task(f"{tmp_path}/mine.py:mine"), Task)
    with pytest.raises(RequestError, match="gave int, not a Task"):
        load_task(f"{tmp_path}/mine.py:wrong")
    with pytest.raises(RequestError, match="no file"):
        load_task(f"{tmp_path}/nobody.py:mine")


@pytest.mark.parametrize("name", ["asv", "asr", "pr", "ic"])
def test_a_folder_that_is_no_corpus_is_refused(name, tmp_path):
    task = load_task(name)
    with pytest.raises(RequestError, match="no such folder"):
        load_folds(task, root=tmp_path / "nowhere")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RequestError, match=r"expected .*\.train\.tsv.*found photo\.jpg.*--manifest"):
        load_folds(task, root=tmp_path)


@pytest.mark.parametrize(("name", "stem"), [("asr", "read"), ("pr", "read"), ("ic", "commands")])
def test_manifests_and_folder_give_the_same_split(mini_like, name, stem):
    task = load_task(name)
    (folder,) = load_folds(task, root=mini_like)
    (own,) = load_folds(task, manifests=paths(mini_like, stem))
    assert {split: m.digest for split, m in folder.manifests.items()} == {s: m.digest for s, m in own.manifests.items()}
    (elsewhere,) = load_folds(task, manifests=paths(mini_like, stem), root=mini_like)
    assert elsewhere.manifests["test"].digest == own.manifests["test"].digest


def test_audio_is_relative_to_the_root_when_one_is_given(mini_like, tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.tsv").write_bytes((mini_like / f"read.{split}.tsv").read_bytes())
    moved = {split: tmp_path / f"{split}.tsv" for split in ("train", "dev", "test")}
    assert load_folds(load_task("asr"), manifests=moved, root=mini_like)
    with pytest.raises(RequestError, match="no such audio file"):
        load_folds(load_task("asr"), manifests=moved)


def test_wrong_keys_are_refused(mini_like):
    asr, asv = load_task("asr"), load_task("asv")
    trials = mini_like / "trials.test.tsv"
    for task, given, said in (
        (asr, {"trian": "x"}, "Did you mean train"),
        (asr, {"train": mini_like / "read.train.tsv"}, "lacks test, dev"),
        (asr, paths(mini_like, trials=trials), "asr has no trials"),
        (asv, paths(mini_like), "lacks trials"),
        (asv, {"train": 1, "test": 2, "trials": 3, "dev_trials": 4}, "dev_trials= needs dev="),
    ):
        with pytest.raises(RequestError, match=said):
            folds_from_manifests(task, given)


def test_an_unknown_protocol_or_corpus_is_refused(mini_like):
    with pytest.raises(RequestError, match="no protocol 'lax'"):
        load_folds(load_task("asr"), root=mini_like, protocol="lax")
    with pytest.raises(RequestError, match="where is librispeech"):
        load_folds(load_task("asr"), dataset="librispeech")


def test_every_task_of_the_tree_is_listed():
    assert {"asr", "asv", "ic", "pr", "synthetic_sid"} <= set(Registry("task").names())


def test_all_missing_manifests_are_named_at_once(tmp_path: Path) -> None:
    paths = {split: tmp_path / f"{split}.tsv" for split in ("train", "dev", "test")}
    with pytest.raises(RequestError) as caught:
        folds_from_manifests(load_task("asr"), paths)
    assert all(f"{split}.tsv: no such file" in str(caught.value) for split in paths)
