"""Manifests and trials: the contract of the TSV, and everything wrong with one at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from superb_probe.downstreams.manifest import Manifest, Problem, Trials, Utterance, audio_digest, resampled_files
from superb_probe.errors import RequestError

HEADER = "id audio start_s duration_s text"


def test_a_manifest_is_read(write_tsv, write_audio):
    write_audio("a.flac", 1.0)
    path = write_tsv("train.tsv", HEADER, ("u1", "a.flac", 0, 0.5, "HI"), ("u2", "a.flac", 0.25, "", "HO"))
    manifest = Manifest.read(path)
    assert manifest[0] == Utterance("u1", "a.flac", 0.0, 0.5, {"text": "HI"})
    assert manifest["u2"].duration_s == 0.75  # empty: from the start to the end of the file
    assert (manifest.name, manifest.ids, manifest.columns, len(manifest)) == ("train", ("u1", "u2"), ("text",), 2)
    assert manifest.problems(read_audio=True) == []
    assert len(manifest[:1]) == 1 and manifest[:1].digest != manifest.digest


def test_line_ends_and_byte_order_mark_do_not_matter(write_tsv, write_audio, tmp_path):
    write_audio("a.flac")
    plain = Manifest.read(write_tsv("a.tsv", HEADER, ("u1", "a.flac", 0, 1, "É")))
    windows = tmp_path / "b.tsv"
    windows.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.tsv").read_bytes().replace(b"\n", b"\r\n"))
    assert Manifest.read(windows).digest == plain.digest
    (tmp_path / "latin.tsv").write_bytes((tmp_path / "a.tsv").read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(RequestError, match="not UTF-8"):
        Manifest.read(tmp_path / "latin.tsv")


def test_the_digest_is_of_what_is_said_not_of_how(write_tsv):
    first = write_tsv("a.tsv", HEADER + " speaker", ("u1", "a.flac", "0", "1.50", "HI", "s1"))
    other = write_tsv("b.tsv", "speaker id audio start_s duration_s text", ("s1", "u1", "a.flac", "0.0", "1.5", "HI"))
    assert Manifest.read(first).digest == Manifest.read(other).digest
    assert Manifest.read(first).digest.startswith("sha256:")


@pytest.mark.parametrize(
    "row",
    [
        ("u2", "a.flac", 0, 1, "HI"),
        ("u1", "b.flac", 0, 1, "HI"),
        ("u1", "a.flac", 0.1, 1, "HI"),
        ("u1", "a.flac", 0, 1, "HO"),
    ],
)
def test_whatever_changes_changes_the_digest(write_tsv, row):
    before = Manifest.read(write_tsv("a.tsv", HEADER, ("u1", "a.flac", 0, 1, "HI")))
    assert Manifest.read(write_tsv("a.tsv", HEADER, row)).digest != before.digest


def test_writing_and_reading_gives_the_same(write_tsv, tmp_path):
    manifest = Manifest.read(write_tsv("a.tsv", HEADER, ("u1", "a.flac", 0.1234567, 1 / 3, "")))
    manifest.write(tmp_path / "again.tsv")
    again = Manifest.read(tmp_path / "again.tsv")
    assert again.digest == manifest.digest and (tmp_path / "again.tsv").read_text(encoding="utf-8") == manifest.text()


def test_all_that_is_wrong_in_a_file_is_said_at_once(write_tsv):
    path = write_tsv(
        "bad.tsv",
        HEADER,
        ("u1", "a.flac", 0, 1, "x"),
        ("u1", "a.flac", 0, 1, "x"),
        ("u2", "/abs/a.flac", 0, 1, "x"),
        ("u3", "../a.flac", 0, 1, "x"),
        ("u4", "C:\\a.flac", 0, 1, "x"),
        ("u5", "a.flac", "soon", 1, "x"),
        ("u6", "a.flac", -1, 1, "x"),
        ("u7", "a.flac", 0, 0, "x"),
        ("u8", "a.flac", 0, "nan", "x"),
        ("", "a.flac", 0, 1, "x"),
        ("u9", "nowhere.flac", 0, "", "x"),
    )
    with pytest.raises(RequestError) as caught:
        Manifest.read(path)
    message = str(caught.value)
    for said in (
        "10 problems", "line 3: id 'u1' is already on line 2", "line 4: audio '/abs/a.flac' is an absolute path",
        "line 5: audio '../a.flac' leaves", "line 6: audio", "line 7: start_s 'soon' is not a number", "line 8: start_s -1",
        "line 9: duration_s 0", "line 10: duration_s nan", "line 11: the id is empty", "line 12", "no such audio file",
    ):  # fmt: skip
        assert said in message, said


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("id audio start_s text", ("u", "a", 0, "x"), "no column 'duration_s'"),
        ("id audio start_s duration_s text text", ("u", "a", 0, 1, "x", "y"), "column 'text' is there twice"),
        (HEADER, ("u", "a.flac", 0, 1), "line 2: 4 cells for 5 columns"),
    ],
)
def test_a_table_of_another_shape_is_refused(write_tsv, header, row, said):
    with pytest.raises(RequestError, match=said):
        Manifest.read(write_tsv("a.tsv", header, row))


def test_an_empty_or_missing_file_is_refused(write_tsv, tmp_path):
    with pytest.raises(RequestError, match="no utterances"):
        Manifest.read(write_tsv("a.tsv", HEADER))
    with pytest.raises(RequestError, match="no such file"):
        Manifest.read(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    "changes", [{"id": "u1"}, {"audio": "../x.flac"}, {"duration_s": -1.0}, {"labels": {}}, {"id": "a\tb"}]
)
def test_a_manifest_made_in_code_is_checked_too(changes):
    cells = {"id": "u2", "audio": "a.flac", "start_s": 0.0, "duration_s": 1.0, "labels": {"text": "x"}}
    good = Utterance("u1", "a.flac", 0.0, 1.0, {"text": "x"})
    assert len(Manifest([good, Utterance(**cells)], Path("."), "m")) == 2
    with pytest.raises(RequestError):
        Manifest([good, Utterance(**{**cells, **changes})], Path("."), "m")


def test_problems_are_found_all_at_once(write_tsv, write_audio, tmp_path):
    write_audio("good.flac", 1.0)
    write_audio("slow.flac", 1.0, rate=8000)
    write_audio("two.flac", 1.0, channels=2)
    (tmp_path / "text.flac").write_text("not audio", encoding="utf-8")
    whole = (tmp_path / "good.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    names = ("good", "missing", "slow", "two", "text", "cut")
    rows = [(name, f"{name}.flac", 0, 1.0, "x") for name in names]
    manifest = Manifest.read(
        write_tsv("a.tsv", HEADER, *rows, ("late", "good.flac", 0.5, 0.6, "x"), ("mute", "good.flac", 0, 1, " "))
    )
    found = {
        problem.where.split("utterance ")[1].split(" ")[0]: problem for problem in manifest.problems(read_audio=True)
    }
    assert set(found) == {"missing", "slow", "two", "text", "cut", "late", "mute"}
    for name, said in (
        ("missing", "no such audio file"), ("slow", "8000 Hz, expected 16000"), ("two", "2 channels"), ("text", "cannot be read"),
        ("late", "the file ends at 1.0 s"), ("mute", "empty 'text'"),
    ):  # fmt: skip
        assert said in found[name].what and found[name].fix
    # The mutants of each check: a look at headers alone must miss the file cut short, and resampling must forgive the rate.
    assert "cut" not in "".join(problem.where for problem in manifest.problems())
    assert "slow" not in "".join(problem.where for problem in manifest.problems(resample=True))


def test_labels_that_are_needed_must_be_there(write_tsv, write_audio):
    write_audio("a.flac")
    manifest = Manifest.read(write_tsv("a.tsv", HEADER + " speaker", ("u1", "a.flac", 0, 1, "x", "")))
    assert manifest.problems() == []  # an unknown speaker is no problem of the manifest itself
    assert [problem.what for problem in manifest.problems(label_columns=("speaker",))] == ["empty 'speaker'"]
    assert "no column 'phones'" in str(manifest.problems(label_columns=("phones",))[0])
    assert "no column 'slot_*'" in str(manifest.problems(label_columns=("slot_*",))[0])


def test_the_audio_digest_hears_a_changed_sample(write_tsv, write_audio):
    write_audio("a.flac")
    manifest = Manifest.read(write_tsv("a.tsv", HEADER, ("u1", "a.flac", 0, 0.5, "x"), ("u2", "a.flac", 0.5, 0.5, "x")))
    before = audio_digest(manifest)
    assert before == audio_digest(manifest)
    write_audio("a.flac", 1.5)
    assert audio_digest(manifest) != before and resampled_files(manifest) == []
    write_audio("a.flac", rate=8000)
    assert resampled_files(manifest) == ["a.flac"]


def test_trials_are_read(write_tsv, write_audio, tmp_path):
    trials = Trials.read(write_tsv("t.tsv", "label id_a id_b", (1, "u1", "u2"), (0, "u1", "u3")))
    assert trials.labels.tolist() == [1, 0] and trials.labels.dtype == np.int8 and trials.ids_b == ("u2", "u3")
    trials.write(tmp_path / "again.tsv")
    assert Trials.read(tmp_path / "again.tsv").digest == trials.digest
    assert Trials.of([1, 1], ["u1", "u1"], ["u2", "u3"]).digest != trials.digest
    rows = [("u1", "a.flac", 0, 1, "s1"), ("u2", "a.flac", 0, 1, "s1"), ("u3", "a.flac", 0, 1, "s2")]
    header = "id audio start_s duration_s speaker"
    manifest = Manifest.read(write_tsv("m.tsv", header, *rows))
    assert trials.problems(manifest) == []
    contradicting = Trials.of([0, 0], ["u1", "u1"], ["u2", "u3"]).problems(manifest)
    assert len(contradicting) == 1 and "u1 u2 has label 0" in contradicting[0].what
    assert "u3" in Trials.of([1], ["u1"], ["u3"]).problems(manifest[:2])[0].what


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, "a", "b"), (2, "a", "c")], "label '2'"),
        ([(1, "a", "b"), (0, "", "c")], "an id is empty"),
        ([(1, "a", "b")], "no different-speaker trial"),
        ([(0, "a", "b")], "no same-speaker trial"),
    ],
)
def test_bad_trials_are_refused(write_tsv, rows, said):
    with pytest.raises(RequestError, match=said):
        Trials.read(write_tsv("t.tsv", "label id_a id_b", *rows))


def test_a_problem_says_where_what_and_the_fix():
    assert str(Problem("here", "this is wrong", "do that")) == "here: this is wrong. Fix: do that"
