"""The score plot: what is drawn is what the records say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superb_probe.errors import RequestError
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.plot import plot_scores
from superb_probe.results.record import RunRecord

Make = Callable[..., RunRecord]


@pytest.fixture
def records(make_record: Make) -> list[RunRecord]:
    ic = {"task.name": "ic", "task.metric": "accuracy", "task.higher_is_better": True, "task.dataset": "mini"}
    return [
        make_record(test=5.25, **{"probe.lr": 1e-3}),
        make_record(test=41.5, **{"upstream.revision": "random:0"}),
        make_record(test=12.75, **{"upstream.name": "fbank", "upstream.params": 0}),
        make_record(test=49.5, **{"probe.control": "shuffle", "probe.lr": 1e-3}),
        make_record(test=91.25, **ic),
        make_record(test=60.5, **ic, **{"upstream.name": "fbank", "upstream.params": 0}),
    ]


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())


def test_picture_and_numbers(records: list[RunRecord], tmp_path: Path) -> None:
    png, svg, csv = plot_scores(records, tmp_path / "new" / "scores.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = texts(svg)
    for text in (
        "asv on voxceleb1",
        "ic on mini",
        "strict protocol, full budget, xvector head",
        "EER (%, lower is better)",
        "accuracy (%, higher is better)",
        "mamba_hubert_causal (random)",
        "random weights",
        "control: shuffled labels",
    ):
        assert text in drawn, text
    for score in ("5.25", "41.50", "12.75", "91.25", "60.50"):
        assert score in drawn
    assert "49.50" not in drawn  # controls are marked, not labelled
    numbers = pd.read_csv(csv)
    assert sorted(numbers["score"]) == [5.25, 12.75, 41.5, 49.5, 60.5, 91.25]
    assert (numbers["ci95_low"] < numbers["score"]).all()


def test_the_best_stands_at_the_top(records: list[RunRecord], tmp_path: Path) -> None:
    _, svg, _ = plot_scores(records, tmp_path / "scores.svg")
    drawn = texts(svg)
    # matplotlib writes tick labels from the first to the last position; position 0 is at the top
    asv = drawn[: drawn.index("ic on mini")] if drawn.index("asv on voxceleb1") < drawn.index("ic on mini") else drawn
    names = [text for text in asv if text in ("mamba_hubert_causal", "fbank", "mamba_hubert_causal (random)")]
    assert names[:3] == ["mamba_hubert_causal", "fbank", "mamba_hubert_causal (random)"]


def test_what_may_not_share_a_table_gets_a_panel_or_a_line(make_record: Make, tmp_path: Path) -> None:
    pair = [
        make_record(),
        make_record(**{"probe.layer_norm": True}),
        make_record(**{"probe.layer": 3}, layer_weights=None),
    ]
    _, svg, _ = plot_scores(pair, tmp_path / "scores.png")
    drawn = texts(svg)
    assert "strict protocol, full budget, xvector head, layer norm" in drawn
    assert "layer: 3" in drawn
    assert "layer: weighted sum" in drawn


def test_encoders_of_one_name_are_told_apart_in_words(make_record: Make, tmp_path: Path) -> None:
    def one(revision: str, **options: Any) -> Any:
        return make_record(**{"upstream.revision": revision, "upstream.options": options})

    alike = [
        one("sha256:aa", weights="1a"),
        one("sha256:bb", causal_front_end=False, weights="2b"),
        one("random:0", random=0, weights="3c"),
    ]
    drawn = texts(plot_scores(alike, tmp_path / "a.png")[1])
    assert drawn.count("mamba_hubert_causal") == 2 and "mamba_hubert_causal (random)" in drawn
    assert "causal_front_end=false" in drawn and not any("sha256" in text or "3c" in text for text in drawn)
    drawn = texts(plot_scores([one("sha256:aa", weights="1a"), one("sha256:bb", weights="2b")], tmp_path / "b.png")[1])
    assert {"revision: sha256:aa", "revision: sha256:bb"} <= set(drawn)
    drawn = texts(plot_scores([one("sha256:aa", weights="1a"), one("sha256:aa", weights="2b")], tmp_path / "c.png")[1])
    assert sum("2b" in text for text in drawn) == 1  # nothing else tells them apart


def test_the_same_records_give_the_same_bytes_and_others_do_not(
    records: list[RunRecord], make_record: Make, tmp_path: Path
) -> None:
    first = plot_scores(records[:3], tmp_path / "1.png")
    second = plot_scores(records[2::-1], tmp_path / "2.png")
    other = plot_scores([make_record(test=5.26, **{"probe.lr": 1e-3}), *records[1:3]], tmp_path / "3.png")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


def test_nothing_to_draw(make_record: Make, tmp_path: Path) -> None:
    failed = make_record(status="failed", score=None, selection=None, error="nan")
    assert leaderboard([failed]).empty
    for records in ([], [failed]):
        with pytest.raises(RequestError, match="finished result"):
            plot_scores(records, tmp_path / "scores.png")


def test_other_endings_and_places_are_refused(records: list[RunRecord], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"\.png or \.svg"):
        plot_scores(records, tmp_path / "scores.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write"):
        plot_scores(records, tmp_path / "file" / "scores.png")
