"""Recognition and intents: the published vocabularies, targets and numbers, and labels that cannot be used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError


def manifest(name: str, column: str, *labels: str, corpus: str = "") -> Manifest:
    utterances = [
        Utterance(f"{name}{k}", f"{name}{k}.flac", 0.0, 1.0, {column: label}) for k, label in enumerate(labels)
    ]
    return Manifest(utterances, __file__.rsplit("/", 1)[0], name, corpus=corpus)  # type: ignore[arg-type]


def test_the_character_vocabulary_is_superbs():
    tokens = load_task("asr").labels(manifest("m", "text", "as it is", "don't")).classes["tokens"]
    assert len(tokens) == 32
    assert tokens[:7] == ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T") and tokens[-1] == "Z" and tokens[23] == "P"


def test_another_alphabet_is_learned_from_train():
    task = load_task("asr")
    train = manifest("train", "text", "für", "so")
    assert task.labels(train).classes["tokens"][4:] == ("F", "O", "R", "S", "|", "Ü")
    fold = Fold(None, {"train": train, "test": manifest("test", "text", "fürs", "frühe")})
    (problem,) = task.label_problems(fold)
    assert "'H' (first in test1)" in problem.what and "'E'" in problem.what and "'S'" not in problem.what


def test_an_asr_target_ends_words_and_the_sentence():
    task = load_task("asr")
    train = manifest("m", "text", " as  is")
    labels = task.labels(train)
    ids = task.target(train[0], labels)["tokens"].tolist()
    assert [labels.classes["tokens"][number] for number in ids] == ["A", "S", "|", "I", "S", "|", "</s>"]


def test_the_word_error_rate_is_of_the_corpus():
    task = load_task("asr")
    fold = Fold(None, {"test": manifest("u", "text", "one two three four", "five")})
    score = task.score({"u0": list("ONE|TWO|THREE|FOUR|"), "u1": list("FINE|")}, fold, "test")
    assert score.value == pytest.approx(20.0)  # not the mean of 0 and 100
    assert score.extra["cer"] == pytest.approx(100 / 22)
    assert task.value({"edits": [0, 1], "words": [0, 1]}) == 100.0


def test_the_phoneme_vocabulary_is_superbs_for_a_known_corpus():
    tokens = load_task("pr").labels(manifest("m", "phones", "G OW1", corpus="mini")).classes["tokens"]
    assert len(tokens) == 74
    assert tokens[:6] == ("<pad>", "<eos>", "<unk>", "SIL", "SPN", "AA0") and tokens[-1] == "ZH"


def test_anyones_phones_are_those_of_train():
    task = load_task("pr")
    train = manifest("train", "phones", "a: b", "z a:")
    labels = task.labels(train)
    assert labels.classes["tokens"] == ("<pad>", "<eos>", "<unk>", "a:", "b", "z")
    assert task.target(train[1], labels)["tokens"].tolist() == [5, 3, 1]
    (problem,) = task.label_problems(Fold(None, {"train": train, "dev": manifest("dev", "phones", "z @")}))
    assert "'@' (first in dev0)" in problem.what


def test_the_phone_error_rate_counts_stress():
    task = load_task("pr")
    fold = Fold(None, {"test": manifest("u", "phones", "G OW1", "AA1 T")})
    assert task.score({"u0": ["G", "OW0"], "u1": ["AA1", "T"]}, fold, "test").value == pytest.approx(25.0)
    assert task.score({"u0": [], "u1": ["AA1", "T"]}, fold, "test").value == pytest.approx(50.0)


def slots(name: str, *rows: dict[str, str]) -> Manifest:
    return Manifest(
        [Utterance(f"{name}{k}", f"{name}{k}.flac", 0.0, 1.0, row) for k, row in enumerate(rows)], ".", name
    )  # type: ignore[arg-type]


def test_an_intent_is_right_when_every_slot_is():
    task = load_task("ic")
    rows = [{"slot_a": "x", "slot_b": "none"}, {"slot_a": "y", "slot_b": "none"}]
    fold = Fold(None, {"train": slots("r", *rows), "test": slots("t", *rows)})
    labels = task.labels(fold.manifests["train"])
    assert labels.classes == {"slot_a": ("x", "y"), "slot_b": ("none",)}
    score = task.score({"t0": rows[0], "t1": {"slot_a": "x", "slot_b": "none"}}, fold, "test")
    assert score.value == 50.0 and score.extra == {"accuracy_slot_a": 50.0, "accuracy_slot_b": 100.0}


def test_slots_that_differ_between_splits_are_refused():
    task = load_task("ic")
    train = slots("r", {"slot_a": "x"})
    (problem,) = task.label_problems(Fold(None, {"train": train, "test": slots("t", {"slot_b": "x"})}))
    assert "columns slot_b, but train has slot_a" in problem.what
    (problem,) = task.label_problems(Fold(None, {"train": train, "test": slots("t", {"slot_a": "new"})}))
    assert "1 label (new) not in train" in problem.what


@pytest.mark.parametrize(
    ("name", "stem", "column"),
    [("asr", "read", "text"), ("pr", "read", "phones"), ("ic", "commands", "slot_action")],
)
def test_an_empty_label_is_refused(mini_like, tmp_path, name, stem, column):
    task = load_task(name)
    paths = {split: mini_like / f"{stem}.{split}.tsv" for split in ("train", "dev", "test")}
    assert load_folds(task, manifests=paths, root=mini_like)
    test = Manifest.read(paths["test"])
    emptied = [replace(test[0], labels={**test[0].labels, column: ""}), *test[1:]]
    Manifest(emptied, mini_like, "test").write(tmp_path / "test.tsv")
    with pytest.raises(RequestError, match=f"utterance {test[0].id}: empty '{column}'"):
        load_folds(task, manifests={**paths, "test": tmp_path / "test.tsv"}, root=mini_like)


@pytest.mark.parametrize(
    ("name", "steps", "batch", "accumulate", "evaluate_every", "optimizer", "clip", "lr"),
    [
        ("asr", 200_000, 16, 1, 2000, "adam", 1.0, 1e-4),
        ("pr", 100_000, 16, 2, 1000, "adam", 1.0, 1e-2),
        ("ic", 200_000, 32, 1, 5000, "adam", 1.0, 1e-4),
        ("asv", 200_000, 10, 5, 20_000, "adamw", 1e3, 1e-4),
    ],
)
def test_the_full_budget_is_superbs(name, steps, batch, accumulate, evaluate_every, optimizer, clip, lr):
    info = load_task(name).info
    full, superb = info.budgets["full"], info.protocols["superb"]
    assert (full.steps, full.batch, full.accumulate, full.evaluate_every) == (steps, batch, accumulate, evaluate_every)
    assert (info.optimizer, info.clip, superb.default_lr, superb.layer_norm) == (optimizer, clip, lr, False)
    assert not full.head, "the heads' own widths are the protocol's"
    assert info.protocols["mamba_hubert"].layer_norm
    paper = info.protocols["mamba_hubert"]
    assert (paper.default_lr, paper.batch, paper.accumulate) == ((1e-4, 8, 4) if name == "pr" else (lr, None, None))
