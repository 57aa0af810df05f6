"""Times of phones and words in every form they come in."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from superb_probe.downstreams.mini import mini_root
from superb_probe.errors import RequestError
from superb_probe.probes.alignments import (
    Segment,
    fold_labels,
    frame_labels,
    read_alignments,
    scale_times,
    segment_frames,
    write_alignments,
)

PHONES = (Segment(0.0, 0.1, "HH"), Segment(0.1, 0.25, "AY1"), Segment(0.4, 0.5, "X"))
WORDS = (Segment(0.0, 0.25, "HI"), Segment(0.4, 0.5, 'A"B'))
SHORT_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.5
<exists>
3
"IntervalTier"
"words"
0
0.5
1
0
0.5
"HI 2 you"
"TextTier"
"clicks"
0
0.5
1
0.3
"click"
"IntervalTier"
"phones"
0
0.5
2
0
0.1
"HH"
0.1
0.5
"AY1"
"""


def same(found: tuple[Segment, ...], expected: tuple[Segment, ...]) -> bool:
    spoken = [each for each in found if each.label]
    return [each.label for each in spoken] == [each.label for each in expected] and all(
        abs(a.start_s - b.start_s) < 1e-6 and abs(a.end_s - b.end_s) < 1e-6
        for a, b in zip(spoken, expected, strict=True)
    )


@pytest.mark.parametrize("form", ["times.csv", "times.ctm", "grids"])
def test_what_is_written_is_read_again(form: str, tmp_path: Path) -> None:
    files = write_alignments(tmp_path / form, {"u1": PHONES}, {"u1": WORDS}, {"u1": 0.6})
    assert files and all(file.is_file() for file in files)
    for tier, expected in (("phones", PHONES), ("words", WORDS)):
        path = tmp_path / f"times.{tier}.ctm" if form == "times.ctm" else tmp_path / form
        assert same(read_alignments(path, tier)["u1"], expected)


def test_the_short_form_of_a_textgrid_with_point_tiers(tmp_path: Path) -> None:
    (tmp_path / "u1.TextGrid").write_text(SHORT_TEXTGRID)
    assert same(read_alignments(tmp_path)["u1"], (Segment(0, 0.1, "HH"), Segment(0.1, 0.5, "AY1")))
    assert same(read_alignments(tmp_path, "words")["u1"], (Segment(0, 0.5, "HI 2 you"),))


def test_a_textgrid_of_the_montreal_aligner_in_utf16(tmp_path: Path) -> None:
    (tmp_path / "u1.TextGrid").write_text(SHORT_TEXTGRID.replace('"phones"', '"anna - phones"'), encoding="utf-16")
    assert len(read_alignments(tmp_path / "u1.TextGrid")["u1"]) == 2


def test_librispeech_alignments(tmp_path: Path) -> None:
    file = tmp_path / "84-121123.alignment.txt"
    file.write_text('84-121123-0000 ",GO,,DO,YOU" "0.490,0.890,1.110,1.270,1.380"\n')
    words = read_alignments(tmp_path, "words")["84-121123-0000"]
    assert same(words, (Segment(0.49, 0.89, "GO"), Segment(1.11, 1.27, "DO"), Segment(1.27, 1.38, "YOU")))
    with pytest.raises(RequestError, match="words only"):
        read_alignments(file)


def test_a_table_of_phones_that_name_their_words(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "utt_id,start_s,end_s,phone,word\na,0,0.1,HH,hi\na,0.1,0.2,AY,hi\na,0.2,0.3,SIL,<sil>\n"
    )
    assert [each.label for each in read_alignments(tmp_path / "p.csv")["a"]] == ["HH", "AY", "SIL"]
    assert same(read_alignments(tmp_path / "p.csv", "words")["a"], (Segment(0, 0.2, "hi"), Segment(0.2, 0.3, "<sil>")))


def test_the_embedded_corpus() -> None:
    path = mini_root() / "alignments.dev.tsv"
    phones, words = read_alignments(path)["sp06-c02"], read_alignments(path, "words")["sp06-c02"]
    assert (phones[0].label, phones[1]) == ("SIL", Segment(0.252, 0.301, "L"))
    assert phones[-1].end_s == math.inf
    assert words[0] == Segment(0.252, 0.5, "LIGHT")


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.ctm").write_text("a 1 0.0 0.5 X\na 1 0.2 0.1 Y\nb 1 0.0 0.0 Z\n")
    with pytest.raises(RequestError) as error:
        read_alignments(tmp_path / "p.ctm")
    assert "utterance a" in str(error.value) and "utterance b" in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("p.lab", "x"), ("p.csv", "id,from,to\n"), ("p.TextGrid", "nothing")])
def test_other_forms_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError):
        read_alignments(tmp_path / name)


def test_frames_take_the_label_at_their_middle() -> None:
    # frames of 20 ms: middles at 10, 30, 50, 70, ... ms; the gap from 60 to 80 ms has none
    segments = (Segment(0.0, 0.03, "a"), Segment(0.03, 0.06, "b"), Segment(0.08, 0.2, "c"))
    assert frame_labels(segments, 5, 0.02).tolist() == [0, 1, 1, -1, 2]
    assert frame_labels((), 2, 0.02).tolist() == [-1, -1]


def test_a_segment_has_the_frames_that_are_labelled_with_it() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(generator.uniform(0.0, 1.0, 8))
        segments = [Segment(a, b, "x") for a, b in itertools.pairwise(edges)]
        labels = frame_labels(segments, 50, 0.02)
        for number, each in enumerate(segments):
            rows = np.flatnonzero(labels == number)
            first, last = segment_frames(each, 50, 0.02)
            if len(rows):
                assert (first, last) == (rows[0], rows[-1] + 1)
            else:  # too short for a middle: the nearest frame
                assert last == first + 1


def test_stress_and_silences_are_folded() -> None:
    folded = fold_labels([Segment(0, 1, "AH0"), Segment(1, 2, "sp"), Segment(2, 3, "spn"), Segment(3, 4, "a6")])
    assert [each.label for each in folded] == ["AH", "SIL", "SPN", "a6"]
    assert scale_times([Segment(0.5, 1.0, "x")], 2.0) == (Segment(1.0, 2.0, "x"),)
