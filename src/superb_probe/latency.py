"""Streaming recognition measured: word error rate and word delay against chunk and look-ahead, on utterances with word times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from superb_probe.downstreams.asr import WORD_END, normalise
from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, read_table
from superb_probe.errors import RequestError
from superb_probe.probes.metrics import edit_distance
from superb_probe.probes.statistics import bootstrap
from superb_probe.streaming import Emission, Recogniser, Report, stream_audio
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.stream import ReencodedStream, Stream


@dataclass(frozen=True, slots=True)
class Word:
    """A word that was recognised.

    Attributes:
        text: its characters.
        heard_s: audio that had come when its last character was given.
    """

    text: str
    heard_s: float


def words_of(emissions: Iterable[Emission], silent: frozenset[str]) -> list[Word]:
    """The words of characters as they were given, parted by "|".

    >>> said = [Emission(token, 0.0, heard) for token, heard in (("H", 0.2), ("I", 0.3), ("|", 0.9), ("A", 1.0))]
    >>> words_of(said, frozenset())
    [Word(text='HI', heard_s=0.3), Word(text='A', heard_s=1.0)]
    """
    found: list[Word] = []
    text, heard = "", 0.0
    for each in emissions:
        if each.token in silent:
            continue
        if each.token == WORD_END:
            if text:
                found.append(Word(text, heard))
            text = ""
        else:
            text, heard = text + each.token, each.heard_s
    return [*found, Word(text, heard)] if text else found


def delays(reference: Sequence[str], ends_s: Sequence[float], words: Sequence[Word]) -> list[float]:
    """Seconds from the end of each rightly recognised word to the moment its last character was given.

    Args:
        reference: the words that were said.
        ends_s: when each ends.
        words: those recognised; the alignment with the fewest edits tells which are right.

    >>> delays(["A", "CAT", "SAT"], [0.1, 0.5, 1.0], [Word("A", 0.25), Word("SAT", 1.25)])
    [0.15, 0.25]
    """
    if len(reference) != len(ends_s):
        raise RequestError(f"{len(reference)} words with {len(ends_s)} ends")
    found = []
    for code in Levenshtein.opcodes(list(reference), [word.text for word in words]):
        if code.tag == "equal":
            pairs = zip(range(code.src_start, code.src_end), range(code.dest_start, code.dest_end), strict=True)
            found += [round(words[said].heard_s - ends_s[told], 6) for told, said in pairs]
    return found


def read_word_ends(path: Path) -> dict[str, tuple[list[str], list[float]]]:
    """By utterance, its words and when each ends (s), from a TSV with `id`, `words` and `word_ends_ms`."""
    header, rows = read_table(path, required=("id", "words", "word_ends_ms"))
    found = {}
    for _, row in rows:
        cells = dict(zip(header, row, strict=True))
        found[cells["id"]] = (cells["words"].split(), [float(each) / 1000 for each in cells["word_ends_ms"].split()])
    return found


def measure_latency(
    upstream: Upstream,
    recogniser: Recogniser,
    manifest: Manifest,
    ends: Mapping[str, tuple[list[str], list[float]]],
    chunk_s: float,
    lookahead_frames: int | None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Stream every utterance of a manifest: error rate with its interval over speakers, delays, speed.

    Args:
        upstream: the encoder.
        recogniser: of characters.
        manifest: with `text`.
        ends: word ends of its utterances.
        chunk_s: of a chunk.
        lookahead_frames: None streams as the encoder itself does; a number encodes all anew with every chunk and holds so many frames
            back, which works with any encoder.
        limit: only the first so many utterances.

    Raises:
        RequestError: for a recogniser of phones, or utterances without word ends.
    """
    if recogniser.spaced:
        raise RequestError("word delays need a recogniser of characters. Fix: a record of asr, or --finetuned")
    rows = list(manifest)[:limit]
    missing = [row.id for row in rows if row.id not in ends]
    if missing:
        raise RequestError(
            f"{len(missing)} utterances of {manifest.name} have no word ends, e.g. {missing[0]}. Fix: --alignments"
        )
    found, edits, words, reports = [], [], [], []
    make: Callable[[], Stream] = upstream.stream
    if lookahead_frames is not None:
        make = lambda: ReencodedStream(upstream, lookahead_frames)  # noqa: E731
    for row in rows:
        reference = normalise(row.labels["text"]).split()
        told, word_ends = ends[row.id]
        if [normalise(each) for each in told] != reference:
            raise RequestError(
                f"utterance {row.id}: its word ends are of {' '.join(told)!r}, its text is {' '.join(reference)!r}"
            )
        wav = torch.from_numpy(read_waveform(row, manifest.root, upstream.info.sample_rate_hz))
        chunks = iter(torch.split(wav, max(1, round(chunk_s * upstream.info.sample_rate_hz))))
        report = stream_audio(upstream, chunks, chunk_s=chunk_s, recogniser=recogniser, stream=make())
        said = words_of(report.emissions, recogniser.silent)
        found += delays(reference, [end - row.start_s for end in word_ends], said)
        edits.append(edit_distance(reference, [word.text for word in said]))
        words.append(len(reference))
        reports.append(report)
    return {**_rates(rows, edits, words), **_spread(found), **_speed(reports)}


def _rates(rows: Sequence[Any], edits: list[int], words: list[int]) -> dict[str, Any]:
    clusters = [row.labels.get("speaker") or row.id for row in rows]
    low = high = None
    if len(set(clusters)) > 1:
        low, high, _ = bootstrap(
            lambda drawn: 100.0 * float(drawn["edits"].sum() / drawn["words"].sum()),
            {"edits": edits, "words": words},
            clusters=clusters,
        )
    return {"utterances": len(rows), "words": sum(words), "wer": 100.0 * sum(edits) / sum(words), "ci95": [low, high]}


def _spread(found: Sequence[float]) -> dict[str, Any]:
    if not found:
        return {"right_words": 0, "delay_median_s": None, "delay_p90_s": None}
    return {
        "right_words": len(found),
        "delay_median_s": float(np.median(found)),
        "delay_p90_s": float(np.quantile(found, 0.9)),
    }


def _speed(reports: Sequence[Report]) -> dict[str, Any]:
    audio_s = sum(report.audio_s for report in reports)
    return {
        "lookahead_s": reports[0].lookahead_s,
        "real_time_factor": sum(report.compute_s for report in reports) / audio_s,
    }
