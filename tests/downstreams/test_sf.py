"""SF: tokens of a sentence and its text again, as s3prl writes them; what the vocabulary is; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.sf import decode, encode, iob_error, is_tag


def manifest(name: str, *rows: tuple[str, str]) -> Manifest:
    made = [Utterance(f"{name}{k}", f"{name}{k}.wav", 0.0, 1.0, {"text": t, "iob": i}) for k, (t, i) in enumerate(rows)]
    return Manifest(made, Path(), name)


SENTENCES = (("PLAY THE WHO", "O artist artist"), ("BOOK IT FOR TWO IN ROME", "O O O size O city"))


@pytest.mark.parametrize(
    ("text", "iob", "written"),
    [
        ("PLAY THE WHO", "O artist artist", "PLAY B-artist THE WHO E-artist"),
        ("PLAY THE WHO", "O B-artist I-artist", "PLAY B-artist THE WHO E-artist"),
        ("ROME PARIS", "B-city B-city", "B-city ROME E-city B-city PARIS E-city"),
        ("ROME PARIS", "city city", "B-city ROME PARIS E-city"),  # equal neighbours are one slot in Audio SNIPS
        ("ROME TWO", "city size", "B-city ROME E-city B-size TWO E-size"),
        ("play R & B , now", "O genre genre genre O O", "PLAY B-genre R AND B E-genre NOW"),
        ("WHO ?", "B-artist O", "B-artist WHO E-artist"),
        ("THE WHO !", "artist artist artist", "B-artist THE WHO E-artist"),
    ],
)
def test_a_sentence_is_written_as_s3prl_writes_it(text: str, iob: str, written: str) -> None:
    assert decode(encode(text, iob)) == written


def test_tags_are_tokens_and_words_are_characters() -> None:
    assert encode("GO TO A-B", "O O B-x") == [*"GO TO ", "B-x", *"A-B", "E-x"]
    assert [token for token in encode(*SENTENCES[1]) if is_tag(token)] == ["B-size", "E-size", "B-city", "E-city"]


def test_nothing_counts_after_the_end_token() -> None:
    assert decode(["A", "<eos>", "B-x", "C", "E-x"]) == "A"
    task = load_task("sf")
    fold = Fold(None, {"test": manifest("t", SENTENCES[0])})
    right = encode(*SENTENCES[0])
    assert task.score({"t0": [*right, "<eos>", "B-x", "C", "E-x"]}, fold, "test").value == 100.0
    assert task.score({"t0": [*right, "B-x", "C", "E-x"]}, fold, "test").value < 100.0


def test_the_vocabulary_is_superbs() -> None:
    task = load_task("sf")
    tokens = task.labels(manifest("train", *SENTENCES)).classes["tokens"]
    assert tokens[:5] == ("<pad>", "<eos>", "<unk>", " ", "A") and tokens[29:31] == ("Z", "'")
    assert tokens[31:] == ("B-artist", "E-artist", "B-city", "E-city", "B-size", "E-size")
    assert len(tokens) == 3 + 28 + 2 * 3
    other = task.labels(manifest("train", ("FÜR ROM", "O city"))).classes["tokens"]
    assert other == ("<pad>", "<eos>", "<unk>", " ", "F", "M", "O", "R", "Ü", "B-city", "E-city")


def test_a_target_ends_with_its_end_token() -> None:
    task = load_task("sf")
    train = manifest("train", SENTENCES[0], ("WHO ?", "B-artist O"))
    labels = task.labels(train)
    for utterance in train:
        names = [labels.classes["tokens"][number] for number in task.target(utterance, labels)["tokens"].tolist()]
        assert names == [*encode(utterance.labels["text"], utterance.labels["iob"]), "<eos>"]
        assert names[-2] == "E-artist"


def test_scores_by_hand() -> None:
    task = load_task("sf")
    fold = Fold(None, {"test": manifest("t", *SENTENCES, ("STOP", "O"))})
    said = {
        "t0": encode("PLAY THE HO", "O artist artist"),
        "t1": encode("BOOK IT FOR TWO IN ROME", "O O O size O O"),
        "t2": encode("STOP", "O"),
    }
    score = task.score(said, fold, "test")
    assert score.value == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)  # of the sets of types, 1 where neither has a slot
    assert score.extra["slot_value_cer"] == pytest.approx(100 * (1 + 0 + 4) / (7 + 3 + 4))
    assert score.extra["slot_value_wer"] == pytest.approx(100 * (1 + 0 + 1) / (2 + 1 + 1))
    assert task.value({"f1": score.items["f1"][:2]}) == pytest.approx(100 * (1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "iob", "told"),
    [
        ("A B", "O", "2 words, 1 labels"),
        ("A B", "O I-x", "'I-x' of 'B' follows 'O'"),
        ("A B", "B-y I-x", "'I-x' of 'B' follows 'B-y'"),
        ("A", "B-", "names no slot"),
        ("? !", "O O", "no words"),
        ("A B C", "B-x I-x I-x", None),
        ("A B", "x x", None),
    ],
)
def test_labels_must_fit_their_words(text: str, iob: str, told: str | None) -> None:
    error = iob_error(text, iob)
    assert (error is None) if told is None else (error is not None and told in error)


def test_everything_wrong_is_named_at_once() -> None:
    task = load_task("sf")
    train, test = manifest("train", ("A B", "O"), ("A B", "O I-x")), manifest("test", ("A B", "O O"))
    told = [str(problem) for problem in task.label_problems(Fold(None, {"train": train, "test": test}))]
    assert len(told) == 3 and "train0" in told[0] and "train1" in told[1] and "no slot in any sentence" in told[2]
    fold = Fold(None, {"train": manifest("train", *SENTENCES), "test": manifest("test", ("É ROME", "mood city"))})
    (problem,) = task.label_problems(fold)
    assert "'B-mood' (first in test0)" in problem.what and "'É'" in problem.what and "B-city" not in problem.what


def test_the_full_budget_is_superbs() -> None:
    info = load_task("sf").info
    full = info.budgets["full"]
    assert (full.steps, full.batch, full.accumulate, full.evaluate_every) == (200_000, 32, 1, 2000)
    assert (info.optimizer, info.clip, info.protocols["superb"].default_lr, dict(full.head)) == ("adam", 1.0, 1e-4, {})
    assert info.higher_is_better and info.metric == "slot_type_f1"
    head = load_task("sf").head(4, load_task("sf").labels(manifest("train", *SENTENCES)), {"width": 3})
    assert head.augment is not None and head.dropout.p == 0.2  # type: ignore[attr-defined]
