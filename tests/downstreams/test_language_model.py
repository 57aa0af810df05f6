"""Decoding with an n-gram model: the model's word wins where the sounds do not decide, on test only; files that cannot be used."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Fold, LabelSet
from superb_probe.downstreams.language_model import (
    BlstmCtcLm,
    Emissions,
    FrameCtcLm,
    LexiconDecoder,
    arpa_lexicon,
    lm_options,
    read_lexicon,
)
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError
from superb_probe.probes.ctc import BlstmCtc, FrameCtc, FrameLogits

ARPA = """\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-99\t<s>\t-0.3
-1.0\t</s>
-2.0\t<unk>
-0.7\tBE\t-0.2
-1.2\tBEE\t-0.2
-0.8\tA\t-0.2

\\2-grams:
-0.1\t<s> A
-0.1\tA BEE
-0.5\tBEE </s>
-2.5\tA BE

\\end\\
"""
TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "|", "A", "B", "E")


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    (tmp_path / "bigram.arpa").write_text(ARPA)
    return tmp_path / "bigram.arpa"


def doubtful() -> np.ndarray:
    """Sounds of "A BE" in which a second E is a little less likely than a blank."""
    ids = [5, 4, 6, 7, 0, 0, 4]
    frames = np.full((len(ids), len(TOKENS)), -8.0, dtype=np.float32)
    frames[range(len(ids)), ids] = -0.2
    frames[5, 7] = -2.0
    return frames


@pytest.fixture
def flashlight() -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="flashlight-text is not installed (extra lm)")


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_decides_where_sounds_do_not(arpa: Path, packed: bool) -> None:
    if packed:
        (arpa.parent / "bigram.arpa.gz").write_bytes(gzip.compress(arpa.read_bytes()))
        arpa = arpa.parent / "bigram.arpa.gz"
    assert LexiconDecoder(arpa, TOKENS)(doubtful()) == ["A", "BEE"]
    assert LexiconDecoder(arpa, TOKENS, weight=0.0)(doubtful()) == ["A", "BE"]
    lexicon = arpa.parent / "words.lst"
    lexicon.write_text("A\tA |\nBE\tB E |\n")
    assert LexiconDecoder(arpa, TOKENS, lexicon=lexicon)(doubtful()) == ["A", "BE"], "BEE is no word of this lexicon"


@pytest.mark.usefixtures("flashlight")
def test_a_model_that_cannot_be_used_is_named(arpa: Path) -> None:
    (arpa.parent / "broken.arpa").write_text(ARPA.replace("\t", " "))
    with pytest.raises(RequestError, match="not a language model KenLM reads"):
        LexiconDecoder(arpa.parent / "broken.arpa", TOKENS)
    with pytest.raises(RequestError, match="none of its 3 words can be written"):
        LexiconDecoder(arpa, ("<s>", "|", "X"))
    with pytest.raises(RequestError, match="no such file"):
        labels = LabelSet({"tokens": TOKENS})
        load_task("asr").head(4, labels, {"lm": str(arpa.parent / "none.arpa"), "width": 3})


def fold_of(text: str) -> Fold:
    made = [Utterance("u", "u.wav", 0.0, 1.0, {"text": text})]
    return Fold(None, {split: Manifest(made, Path(), split) for split in ("dev", "test")})


@pytest.mark.usefixtures("flashlight")
def test_dev_is_decoded_greedily_and_test_with_the_model(arpa: Path) -> None:
    emissions = Emissions(["A", "|", "B", "E", "|"], doubtful(), LexiconDecoder(arpa, TOKENS))
    task = load_task("asr")
    on_test = task.score({"u": emissions}, fold_of("a bee"), "test")
    assert on_test.value == 0.0 and on_test.extra["wer_greedy"] == 50.0
    on_dev = task.score({"u": emissions}, fold_of("a bee"), "dev")
    assert on_dev.value == 50.0 and "wer_greedy" not in on_dev.extra
    plain = task.score({"u": ["A", "|", "B", "E", "|"]}, fold_of("a bee"), "test")
    assert plain.value == 50.0 and "wer_greedy" not in plain.extra


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize(
    ("name", "plain", "decoded"), [("blstm_ctc", BlstmCtc, BlstmCtcLm), ("linear", FrameCtc, FrameCtcLm)]
)
def test_a_head_with_a_model_is_the_same_head(arpa: Path, name: str, plain: type, decoded: type) -> None:
    task, labels = load_task("asr"), LabelSet({"tokens": TOKENS})
    heads = []
    for options in ({}, {"lm": str(arpa)}):
        torch.manual_seed(3)
        heads.append(task.head(4, labels, {"head": name, "width": 3, **options}))
    assert type(heads[0]) is plain and type(heads[1]) is decoded
    for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(a, b)
    logits = torch.from_numpy(doubtful())[None].repeat(2, 1, 1)
    logits[1, 3:] = 9.0
    first, second = heads[1].predict(FrameLogits(logits, torch.tensor([7, 3])))
    assert first.tokens == heads[0].predict(FrameLogits(logits, torch.tensor([7, 3])))[0]
    assert first.words() == ["A", "BEE"] and second.log_probabilities.shape == (3, len(TOKENS))
    assert np.allclose(np.exp(first.log_probabilities).sum(1), 1.0, atol=1e-5)


def test_words_and_lexicons(arpa: Path) -> None:
    assert arpa_lexicon(arpa, "|") == {"BE": ["B", "E", "|"], "BEE": ["B", "E", "E", "|"], "A": ["A", "|"]}
    with pytest.raises(RequestError, match="no unigrams"):
        arpa_lexicon(Path(__file__), "|")
    (arpa.parent / "words.lst").write_text("A\tA |\nA\tE |\n\nBE\n")
    with pytest.raises(RequestError, match="line 4: 'BE' has no tokens"):
        read_lexicon(arpa.parent / "words.lst")
    (arpa.parent / "words.lst").write_text("A\tA |\nA\tE |\n")
    assert read_lexicon(arpa.parent / "words.lst") == {"A": ["A", "|"]}, "the first spelling counts"


def test_a_lexicon_needs_a_model() -> None:
    assert lm_options({"width": 3}) == (None, None, {"width": 3})
    with pytest.raises(RequestError, match="without a language model"):
        lm_options({"lexicon": "x"})
