"""What is checked of a fold before anything is computed, each check beside data that pass it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.checks import check_fold, fold_problems, length_problems, report, unseen_problems
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Problem
from superb_probe.errors import RequestError

HEADER = "id audio start_s duration_s speaker text"
ASR = load_task("asr")


@pytest.fixture
def fold(write_tsv, write_audio) -> Fold:
    """Three splits of one utterance each, nothing wrong."""
    manifests = {}
    for split in ("train", "dev", "test"):
        write_audio(f"{split}.flac")
        row = (f"{split}-1", f"{split}.flac", 0, 1, f"speaker of {split}", f"text of {split}")
        manifests[split] = Manifest.read(write_tsv(f"{split}.tsv", HEADER, row))
    return Fold(None, manifests)


def changed(fold: Fold, split: str, **changes: object) -> Fold:
    """The fold with one cell of one split changed."""
    utterance = fold.manifests[split][0]
    labels = {**utterance.labels, **{name: value for name, value in changes.items() if name in utterance.labels}}
    cells = {name: value for name, value in changes.items() if name not in utterance.labels}
    utterance = replace(utterance, labels=labels, **cells)
    manifest = Manifest([utterance], fold.manifests[split].root, split)
    return replace(fold, manifests={**fold.manifests, split: manifest})


def test_a_good_fold_passes(fold):
    assert fold_problems(fold, ASR.info) == ([], [])
    assert check_fold(ASR, fold, read_audio=True) == []


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_shared_speaker_is_an_error_where_speakers_are_disjoint(fold, split):
    broken = changed(fold, split, speaker="speaker of train")
    errors, _ = fold_problems(broken, ASR.info)
    assert len(errors) == 1 and "1 speaker (speaker of train)" in errors[0].what
    with pytest.raises(RequestError, match="needs speakers apart"):
        check_fold(ASR, broken)
    assert fold_problems(broken, replace(ASR.info, speakers="shared")) == ([], [])


def test_unknown_speakers_are_a_warning(fold):
    errors, warnings = fold_problems(changed(fold, "test", speaker=""), ASR.info)
    assert errors == [] and len(warnings) == 1 and "1 of 1 utterances are not known" in warnings[0]
    assert fold_problems(changed(fold, "test", speaker=""), replace(ASR.info, speakers="shared")) == ([], [])


def test_a_shared_utterance_is_an_error(fold):
    errors, _ = fold_problems(changed(fold, "test", id="train-1"), ASR.info)
    assert "share 1 utterance id (train-1)" in errors[0].what
    errors, _ = fold_problems(changed(fold, "test", audio="train.flac", start_s=0.9, duration_s=0.1), ASR.info)
    assert "share audio: 1 pair (train-1 and test-1)" in errors[0].what
    apart = changed(changed(fold, "train", duration_s=0.5), "test", audio="train.flac", start_s=0.5, duration_s=0.5)
    assert fold_problems(apart, ASR.info) == ([], [])


def test_a_shared_sentence_is_a_warning(fold):
    errors, warnings = fold_problems(changed(fold, "test", text="text of train"), ASR.info)
    assert errors == [] and "share 1 sentence (text of train)" in warnings[0]


def test_everything_wrong_is_said_in_one_error(fold):
    broken = changed(changed(fold, "test", speaker="speaker of train", text=" "), "dev", audio="missing.flac")
    with pytest.raises(RequestError) as caught:
        check_fold(ASR, broken)
    for said in ("asr: 3 problems", "no such audio file", "empty 'text'", "needs speakers apart"):
        assert said in str(caught.value)


def test_labels_that_train_lacks(fold):
    found = unseen_problems(fold, "speaker")
    assert [problem.where for problem in found] == ["dev (dev), speaker", "test (test), speaker"]
    assert unseen_problems(changed(fold, "dev", speaker="speaker of train"), "speaker")[0].where.startswith("test")


def test_utterances_too_short_are_found_all_at_once(write_tsv, write_audio):
    write_audio("a.flac", 2.0)
    rows = [(f"u{k}", "a.flac", 0, seconds, "s", "x") for k, seconds in enumerate((0.02, 0.3, 0.025, 1.0))]
    manifest = Manifest.read(write_tsv("a.tsv", HEADER, *rows))

    def num_frames(num_samples: int) -> int:
        return max(0, (num_samples - 400) // 320 + 1)

    assert [p.where.split()[-1] for p in length_problems(manifest, num_frames)] == ["u0"]
    found = length_problems(manifest, num_frames, 16)
    assert [p.where.split()[-1] for p in found] == ["u0", "u1", "u2"]
    assert "give 0 frames, less than one frame" in found[0].what and "give 14 frames, less than 16" in found[1].what
    assert length_problems(manifest, num_frames, 14) != found  # the head's need is what decides


def test_trimming_counts_against_the_length(tmp_path, write_tsv):
    import numpy as np
    import soundfile

    wav = np.zeros(16000, dtype=np.float32)
    wav[4000:7000] = 0.3
    soundfile.write(tmp_path / "a.flac", wav, 16000)
    manifest = Manifest.read(write_tsv("a.tsv", HEADER, ("u0", "a.flac", 0, 1, "s", "x")))
    assert length_problems(manifest, lambda n: n // 320, 12) == []
    assert "after silence trimming" in length_problems(manifest, lambda n: n // 320, 12, waveform="gain_trim")[0].what


def test_a_report_is_cut_but_counts_everything():
    error = report("x", [Problem(f"u{k}", "short", "drop it") for k in range(50)], limit=3)
    assert "50 problems" in str(error) and "(and 47 more)" in str(error) and str(error).count("drop it") == 1
