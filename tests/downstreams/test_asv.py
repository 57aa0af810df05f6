"""Verification: speakers held out, trials made, short utterances left out, and the score of trials."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from superb_probe.downstreams import asv as module
from superb_probe.downstreams.asv import asv
from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_folds
from superb_probe.downstreams.manifest import Manifest, Trials, Utterance
from superb_probe.downstreams.speakers import balanced_trials, held_out_speakers, with_halves
from superb_probe.errors import RequestError


def speakers(name: str, count: int, each: int) -> Manifest:
    utterances = [
        Utterance(f"{name}{s}-{k}", f"{name}{s}-{k}.flac", 0.0, 3.0, {"speaker": f"{name}{s}"})
        for s in range(count)
        for k in range(each)
    ]
    return Manifest(utterances, Path("."), name)


@pytest.fixture
def no_audio(monkeypatch):
    """Arranging without files: every training utterance is as long as its line says."""
    monkeypatch.setattr(module, "effective_samples", lambda each, *_: round(each.duration_s * 16000))


def fold(train: Manifest, **more: Manifest) -> Fold:
    test = speakers("t", 2, 2)
    return Fold(None, {"train": train, "test": test, **more}, {"test": balanced_trials(test)})


def test_speakers_are_held_out_where_there_is_no_dev(no_audio):
    arranged = asv().arrange(fold(speakers("s", 30, 2)), "strict")
    held_out = set(arranged.manifests["dev"].labels("speaker"))
    kept = set(arranged.manifests["train"].labels("speaker"))
    assert len(held_out) == 10 and not held_out & kept and len(kept) == 20
    assert held_out == set(held_out_speakers(speakers("s", 30, 2).labels("speaker")))
    trials = arranged.trials["dev"]
    assert trials.labels.sum() == 10 == len(trials) / 2 and trials.problems(arranged.manifests["dev"]) == []
    assert "10 speakers held out" in arranged.notes[0] and "0 single utterances" in arranged.notes[1]
    again = asv().arrange(fold(speakers("s", 30, 2)), "strict")
    assert again.trials["dev"].digest == trials.digest
    assert len(held_out_speakers([f"s{k}" for k in range(400)])) == 20  # 5 %


def test_too_few_speakers_to_hold_out_are_refused(no_audio):
    assert asv().arrange(fold(speakers("s", 12, 2)), "strict").trials["dev"]
    with pytest.raises(RequestError, match="11 training speakers: 10 are held out"):
        asv().arrange(fold(speakers("s", 11, 2)), "strict")


def test_a_speaker_with_one_utterance_is_cut_into_halves(no_audio):
    arranged = asv().arrange(fold(speakers("s", 4, 1), dev=speakers("d", 3, 1)), "strict")
    dev = arranged.manifests["dev"]
    assert dev.ids == ("d0-0.half1", "d0-0.half2", "d1-0.half1", "d1-0.half2", "d2-0.half1", "d2-0.half2")
    assert (dev[1].start_s, dev[1].duration_s, dev[1].audio) == (1.5, 1.5, "d0-0.flac")
    assert len(arranged.manifests["train"]) == 4, "with a dev split nobody is held out"
    assert "3 single utterances cut into halves" in arranged.notes[-1]
    assert with_halves(speakers("d", 3, 2))[1] == 0


def test_given_dev_trials_are_used_as_they_are(mini_like):
    (arranged,) = load_folds(asv(), root=mini_like)
    given = Trials.read(mini_like / "trials.dev.tsv")
    assert arranged.trials["dev"].digest == given.digest and arranged.notes == ()


def test_superb_holds_nothing_out(no_audio):
    arranged = asv().arrange(fold(speakers("s", 30, 2), dev=speakers("d", 3, 2)), "superb")
    assert set(arranged.manifests) == {"train", "test"} and set(arranged.trials) == {"test"}
    assert len(arranged.manifests["train"]) == 60 and "best test score" in arranged.notes[-1]
    assert asv().info.protocols["superb"].select_on == "test"


def test_short_training_utterances_are_left_out_after_trimming(mini_like):
    """The corpus' utterances last 2.2 s; cut to 2.0 s they are not longer than 2 s, and are left out, of train only."""
    (whole,) = load_folds(asv(), root=mini_like)
    assert len(whole.manifests["train"]) == 9
    train = Manifest.read(mini_like / "read.train.tsv")
    cut = Manifest(
        [replace(train[0], duration_s=2.0), replace(train[1], duration_s=2.01), *train[2:]], train.root, "train"
    )
    test = whole.manifests["test"]
    short_test = Manifest([replace(each, duration_s=1.0) for each in test], test.root, "test")
    arranged = asv().arrange(replace(whole, manifests={**whole.manifests, "train": cut, "test": short_test}), "strict")
    assert train[0].id not in arranged.manifests["train"] and train[1].id in arranged.manifests["train"]
    assert len(arranged.manifests["test"]) == len(test)
    assert "1 of 9 utterances of 2 s or less" in arranged.notes[0]


def test_speakers_are_needed_where_trials_do_not_say(mini_like, tmp_path):
    paths = {split: mini_like / f"read.{split}.tsv" for split in ("train", "dev", "test")}
    paths |= {"trials": mini_like / "trials.test.tsv", "dev_trials": mini_like / "trials.dev.tsv"}

    def without_speakers(split: str) -> Path:
        manifest = Manifest.read(paths[split])
        nameless = [replace(each, labels={**each.labels, "speaker": ""}) for each in manifest]
        Manifest(nameless, mini_like, split).write(tmp_path / f"{split}.tsv")
        return tmp_path / f"{split}.tsv"

    (arranged,) = load_folds(asv(), manifests={**paths, "test": without_speakers("test")}, root=mini_like)
    assert "speakers of 4 of 4 utterances are not known" in arranged.notes[0]
    with pytest.raises(RequestError, match="9 problems"):
        load_folds(asv(), manifests={**paths, "train": without_speakers("train")}, root=mini_like)
    del paths["dev_trials"]
    with pytest.raises(RequestError, match="empty 'speaker'"):
        load_folds(asv(), manifests={**paths, "dev": without_speakers("dev")}, root=mini_like)


def test_trials_of_unknown_utterances_are_refused(mini_like, tmp_path):
    Trials.of([1, 0], ["fay-0", "fay-0"], ["fay-1", "zoe-1"]).write(tmp_path / "trials.tsv")
    paths = {split: mini_like / f"read.{split}.tsv" for split in ("train", "dev", "test")}
    with pytest.raises(RequestError, match="1 ids are not in the manifest, first zoe-1"):
        load_folds(asv(), manifests={**paths, "trials": tmp_path / "trials.tsv"}, root=mini_like)


def test_balanced_trials():
    manifest = speakers("s", 5, 4)
    trials = balanced_trials(manifest)
    assert trials.labels.sum() == 5 * 6 and len(trials) == 60
    assert len(set(zip(trials.ids_a, trials.ids_b, strict=True))) == 60 and trials.problems(manifest) == []
    assert balanced_trials(manifest).digest == trials.digest != balanced_trials(manifest, seed=1).digest
    for count, each in ((5, 1), (1, 5)):
        with pytest.raises(RequestError, match="trials need both kinds"):
            balanced_trials(speakers("s", count, each))


def test_the_score_of_trials_is_a_cosine():
    task = asv()
    test = speakers("t", 2, 2)
    pairs = list(combinations(test.ids, 2))
    trials = Trials.of([int(a[:2] == b[:2]) for a, b in pairs], [a for a, _ in pairs], [b for _, b in pairs])
    arranged = Fold(None, {"test": test}, {"test": trials})
    vectors = {"t0-0": [1.0, 0.0], "t0-1": [7.0, 0.1], "t1-0": [0.0, 2.0], "t1-1": [0.1, 1.0]}
    score = task.score({name: np.asarray(vector) for name, vector in vectors.items()}, arranged, "test")
    assert score.value == 0.0 and score.extra["min_dcf"] == 0.0
    assert score.items["score"][0] == pytest.approx(np.cos(np.arctan2(0.1, 7.0)))  # lengths do not matter
    assert score.items["cluster_a"][1] == "t0" and score.items["cluster_b"][1] == "t1"
    vectors["t0-1"], vectors["t1-1"] = vectors["t1-1"], vectors["t0-1"]
    assert task.score({name: np.asarray(vector) for name, vector in vectors.items()}, arranged, "test").value > 50
    assert task.value({"label": [1, 0, 1, 0], "score": [0.9, 0.1, 0.8, 0.2]}) == 0.0
