"""Recognition with an n-gram language model: flashlight's lexicon decoder and KenLM, as SUPERB's "ASR with LM" row."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superb_probe.downstreams.base import Head
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.ctc import BlstmCtc, FrameCtc, FrameLogits

# s3prl's downstream/asr/config.yaml
BEAM, BEAM_THRESHOLD, LM_WEIGHT, WORD_SCORE = 5, 25.0, 2.0, -1.0
UNKNOWN_WORD = "<unk>"
NOT_WORDS = ("<s>", "</s>", UNKNOWN_WORD)


@dataclass(frozen=True, slots=True)
class Emissions:
    """What a recogniser says of one utterance, and how a language model reads it.

    Attributes:
        tokens: of the greedy decoding.
        log_probabilities: (T, C).
        decoder: of the language model.
    """

    tokens: Sequence[str]
    log_probabilities: NDArray[np.float32]
    decoder: LexiconDecoder = field(repr=False)

    def words(self) -> list[str]:
        """The words of the best path under acoustics and language model."""
        return self.decoder(self.log_probabilities)


class LexiconDecoder:
    """A beam search over the words of a lexicon, for one language model and one vocabulary."""

    def __init__(
        self,
        model: Path,
        tokens: Sequence[str],
        *,
        lexicon: Path | None = None,
        word_end: str = "|",
        blank: str = "<s>",
        weight: float = LM_WEIGHT,
        word_score: float = WORD_SCORE,
        beam: int = BEAM,
    ) -> None:
        """Read the model.

        Args:
            model: an n-gram model: ARPA, ARPA.gz, or KenLM's binary form.
            tokens: the head's vocabulary in id order.
            lexicon: lines of a word and its tokens; None spells the words of the ARPA file by their characters.
            word_end: the token after every word.
            blank: the CTC blank.
            weight: of the language model's log-probability.
            word_score: added for every word.
            beam: hypotheses kept.

        Raises:
            RequestError: if flashlight-text is not installed, or the model or the lexicon cannot be used.
        """
        decoders, kenlm, dictionaries = _flashlight()
        number = {token: index for index, token in enumerate(tokens)}
        spelled = read_lexicon(lexicon) if lexicon is not None else arpa_lexicon(model, word_end)
        usable = {word: spelling for word, spelling in spelled.items() if all(token in number for token in spelling)}
        if not usable:
            raise RequestError(
                f"{lexicon or model}: none of its {len(spelled)} words can be written with the head's {len(tokens)} tokens. "
                f"Fix: words in capital letters, each ended by {word_end} in a lexicon"
            )
        words = dictionaries.Dictionary()
        for word in (*usable, UNKNOWN_WORD):
            words.add_entry(word)
        self._names = (*usable, UNKNOWN_WORD)
        try:
            self._model = kenlm.KenLM(str(model), words)
        except RuntimeError as error:
            raise RequestError(
                f"{model}: not a language model KenLM reads ({error}). Fix: ARPA, or its binary form"
            ) from error
        trie = decoders.Trie(len(tokens), number[word_end])
        start = self._model.start(False)
        for word, spelling in usable.items():
            label = words.get_index(word)
            _, score = self._model.score(start, label)
            trie.insert([number[token] for token in spelling], label, score)
        trie.smear(decoders.SmearingMode.MAX)
        options = decoders.LexiconDecoderOptions(
            beam, len(tokens), BEAM_THRESHOLD, weight, word_score, float("-inf"), 0.0, False, decoders.CriterionType.CTC
        )
        self._words = words
        self._decoder = decoders.LexiconDecoder(
            options, trie, self._model, number[word_end], number[blank], words.get_index(UNKNOWN_WORD), [], False
        )

    def __call__(self, log_probabilities: NDArray[np.float32]) -> list[str]:
        """The words of the best hypothesis for (T, C)."""
        frames = np.ascontiguousarray(log_probabilities, dtype=np.float32)
        best = self._decoder.decode(frames.ctypes.data, *frames.shape)[0]
        return [self._names[index] for index in best.words if index >= 0]


class _Decoded(Head):
    """What a language model adds to a head: predictions it can read. What is trained stays the same."""

    decoder: LexiconDecoder

    def predict(self, outputs: FrameLogits) -> list[Any]:
        """Greedy tokens and log-probabilities of each utterance, free of padding."""
        greedy = super().predict(outputs)  # type: ignore[safe-super]
        frames = outputs.logits.detach().float().log_softmax(-1).cpu().numpy()
        lengths = outputs.num_frames.tolist()
        return [
            Emissions(tokens, np.ascontiguousarray(row[:length]), self.decoder)
            for tokens, row, length in zip(greedy, frames, lengths, strict=True)
        ]


class BlstmCtcLm(_Decoded, BlstmCtc):
    """The recurrent head, decoded with a language model; set `decoder` once it is made."""


class FrameCtcLm(_Decoded, FrameCtc):
    """The linear head, decoded with a language model; set `decoder` once it is made."""


def _flashlight() -> tuple[Any, Any, Any]:
    try:
        import flashlight.lib.text.decoder as decoders
        from flashlight.lib.text import dictionary
        from flashlight.lib.text.decoder import kenlm
    except ImportError as error:
        raise RequestError(
            f"a language model needs flashlight-text ({error}). Fix: pip install 'superb-probe[lm]'"
        ) from error
    return decoders, kenlm, dictionary


@lru_cache(maxsize=4)
def load_decoder(model: Path, tokens: tuple[str, ...], lexicon: Path | None) -> LexiconDecoder:
    """The decoder of a model, read once for all trials."""
    for path in (model, lexicon):
        if path is not None and not path.is_file():
            raise RequestError(
                f"{path}: no such file. Fix: give an n-gram model (ARPA or KenLM binary) and its lexicon"
            )
    return LexiconDecoder(model, tokens, lexicon=lexicon)


def read_lexicon(path: Path) -> dict[str, list[str]]:
    """The first spelling of every word: lines of a word, a tab or spaces, and its tokens parted by spaces.

    Raises:
        RequestError: with every line that has no tokens.
    """
    spelled: dict[str, list[str]] = {}
    wrong = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if len(fields) == 1:
            wrong.append(f"line {number}: {fields[0]!r} has no tokens")
        elif fields:
            spelled.setdefault(fields[0], fields[1:])
    if wrong:
        raise all_at_once(str(path), wrong, "a line a word: the word, a tab, its tokens parted by spaces")
    return spelled


def arpa_lexicon(path: Path, word_end: str) -> dict[str, list[str]]:
    """The words of an ARPA model, spelled by their characters in capital letters and the word end.

    Raises:
        RequestError: for a file that is not ARPA.
    """
    spelled = {word: [*word.upper(), word_end] for word in _unigrams(path) if word not in NOT_WORDS}
    if not spelled:
        raise RequestError(f"{path}: no unigrams found, so its words are not known. Fix: an ARPA file, or lexicon=FILE")
    return spelled


def _unigrams(path: Path) -> Iterator[str]:
    inside = False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for raw in file:
            line = raw.strip()
            if line == b"\\1-grams:":
                inside = True
            elif inside and line.startswith(b"\\"):
                return
            elif inside and line:
                yield line.split()[1].decode("utf-8")


def lm_options(options: Mapping[str, Any]) -> tuple[Path | None, Path | None, dict[str, Any]]:
    """The language model and the lexicon that head options name, and the other options.

    >>> lm_options({"width": 8, "lm": "4-gram.arpa"})[0].name
    '4-gram.arpa'
    """
    rest = dict(options)
    paths = [
        None if (name := rest.pop(key, None)) is None else Path(str(name)).expanduser() for key in ("lm", "lexicon")
    ]
    if paths[0] is None and paths[1] is not None:
        raise RequestError("asr: lexicon=FILE without a language model. Fix: add lm=FILE")
    return paths[0], paths[1], rest
