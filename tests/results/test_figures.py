"""Figures: what is drawn is what the records say, with its numbers beside it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superb_probe.errors import RequestError
from superb_probe.results import figures
from superb_probe.results import lines as line_figures
from superb_probe.results.figures import KINDS, draw
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.record import RunRecord

Make = Callable[..., RunRecord]


@pytest.fixture(scope="module")
def records(made_up: Any, base_record: RunRecord) -> list[RunRecord]:
    found: list[RunRecord] = made_up.made_up_records(
        base_record, upstreams=("up_a", "up_b"), tasks=("pr", "sf", "er"), rates=(1e-2, 1e-3), seeds=(1, 2)
    )
    return found


def texts(svg: Path) -> str:
    return "\n".join(re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text()))


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print quality costs seconds a picture and is not what is tested here."""
    monkeypatch.setattr(figures, "DPI", 40)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scores"])
def test_every_kind_is_png_svg_and_csv_and_its_bytes_follow_from_the_records(
    records: list[RunRecord], tmp_path: Path, kind: str
) -> None:
    first = draw(records, kind, tmp_path / "1.png")
    again = draw(records[::-1], kind, tmp_path / "2.png")
    assert [path.suffix for path in first] == [".png", ".svg", ".csv"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    fewer = [record for record in records if (record.task.name, record.probe.lr, record.probe.seed) != ("er", 1e-3, 2)]
    other = draw(fewer, kind, tmp_path / "3.png")
    assert first[2].read_bytes() != other[2].read_bytes()
    assert first[1].read_bytes() != other[1].read_bytes()
    shown = texts(first[1])
    for name in ("up_a", "up_b"):
        assert name in shown


def test_heatmap_and_radar_place_a_score_between_the_worst_and_the_best(
    records: list[RunRecord], tmp_path: Path
) -> None:
    table = leaderboard(records)
    for kind in ("heatmap", "radar"):
        _, svg, csv = draw(records, kind, tmp_path / kind)
        numbers = pd.read_csv(csv)
        for (task, metric), column in numbers.groupby(["task", "metric"]):
            best = column["score"].max() if column["better"].iloc[0] == "higher" else column["score"].min()
            assert column.loc[column["position"] == 1.0, "score"].tolist() == [best]
            assert min(column["position"]) == 0.0
            if metric != "slot_value_cer":
                wanted = table[table["task"] == task].set_index("upstream")["score"]
                assert column.set_index("upstream")["score"].to_dict() == pytest.approx(wanted.to_dict(), rel=1e-5)
        assert "worst" in texts(svg)
    assert "PER ↓" in texts(tmp_path / "heatmap.svg")


def test_a_turned_direction_is_seen(records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_share", lambda column, values: (min(values), max(values)))
    _, _, csv = draw(records, "heatmap", tmp_path / "mutant")
    numbers = pd.read_csv(csv)
    column = numbers[numbers["task"] == "pr"]
    assert column.loc[column["position"] == 1.0, "score"].iloc[0] != column["score"].min()


def test_layer_weights_are_the_chosen_probes(records: list[RunRecord], tmp_path: Path) -> None:
    _, svg, csv = draw(records, "layers", tmp_path / "layers.png")
    numbers = pd.read_csv(csv)
    assert numbers.groupby(["upstream", "task"])["weight"].sum().tolist() == pytest.approx([1.0] * 6, abs=1e-4)
    row = leaderboard(records).query("upstream == 'up_a' and task == 'er'").iloc[0]
    chosen = [record.layer_weights for record in records if record.run_id in row["run_ids"].split()]
    wanted = [statistics.fmean(values) for values in zip(*filter(None, chosen), strict=True)]
    found = numbers.query("upstream == 'up_a' and task == 'er'").sort_values("layer")["weight"]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert "layer (0: input of the first)" in texts(svg)


def test_learning_rates_mark_the_chosen_one(records: list[RunRecord], tmp_path: Path) -> None:
    _, svg, csv = draw(records, "rates", tmp_path / "rates.png")
    numbers = pd.read_csv(csv)
    table = leaderboard(records).set_index(["task", "upstream"])
    for (task, upstream), lines in numbers.groupby(["task", "upstream"]):
        assert lines.loc[lines["chosen"], "lr"].tolist() == [table.loc[(task, upstream), "lr"]]
        best = lines["dev_mean"].min() if task == "pr" else lines["dev_mean"].max()
        assert lines.loc[lines["chosen"], "dev_mean"].tolist() == [best]
    assert "PR (lower is better)" in texts(svg)


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = {"small_good": (1.0, 9.0), "large_best": (5.0, 10.0), "large_bad": (5.0, 8.0), "twin": (1.0, 9.0)}
    front = {
        name
        for name, point in points.items()
        if not any(figures._beats(other, point, False, True) for other in points.values())
    }
    assert front == {"small_good", "large_best", "twin"}
    assert figures._beats((9.0, 1.0), (5.0, 2.0), True, False)  # faster, and a lower error


def test_cost_needs_a_known_cost(make_record: Make, records: list[RunRecord], tmp_path: Path) -> None:
    for cost, axis in (("params", "parameters"), ("macs", "multiply-accumulates"), ("time", "times real time")):
        _, svg, csv = draw(records, "cost", tmp_path / cost, cost=cost)
        assert axis in texts(svg)
        assert pd.read_csv(csv)["cost_value"].gt(0).all()
    with pytest.raises(RequestError, match="cost is in the record"):
        draw([make_record()], "cost", tmp_path / "none", cost="macs")
    with pytest.raises(RequestError, match="unknown cost"):
        draw(records, "cost", tmp_path / "none", cost="money")


def test_what_may_not_share_a_table_gets_a_figure_of_its_own(make_record: Make, tmp_path: Path) -> None:
    files = draw([make_record(), make_record(**{"probe.layer_norm": True})], "heatmap", tmp_path / "h.png")
    assert [path.name for path in files] == ["h.png", "h.svg", "h.csv", "h_2.png", "h_2.svg", "h_2.csv"]


def test_controls_are_not_drawn(make_record: Make, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="finished result"):
        draw([make_record(**{"probe.control": "shuffle"})], "heatmap", tmp_path / "h.png")


def test_requests_that_cannot_be_served(records: list[RunRecord], make_record: Make, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="three tasks"):
        draw([make_record()], "radar", tmp_path / "r.png")
    with pytest.raises(RequestError, match="two learning rates"):
        draw([make_record()], "rates", tmp_path / "r.png")
    with pytest.raises(RequestError, match="unknown figure"):
        draw(records, "pie", tmp_path / "r.png")
    with pytest.raises(RequestError, match=r"\.png or \.svg"):
        draw(records, "heatmap", tmp_path / "r.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write"):
        draw(records, "heatmap", tmp_path / "file" / "r.png")


def test_no_name_of_a_legend_is_cut(made_up: Any, base_record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: three columns whatever the names, as wide as the figure and more."""
    names = tuple(f"hf:organisation/a-rather-long-name-{letter}" for letter in "abcdef")
    made = made_up.made_up_records(
        base_record, upstreams=names, tasks=("pr", "er", "ic"), rates=(1e-2, 1e-3), seeds=(1,)
    )
    kept: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, numbers, stem: kept.append(figure) or [])
    for kind in ("cost", "radar", "rates"):
        draw(made, kind, "unused.png")
    for figure in kept:
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_a_logarithmic_axis_has_its_ticks_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    save = line_figures._save
    monkeypatch.setattr(line_figures, "_save", lambda figure, *rest: (drawn.append(figure), save(figure, *rest))[1])
    few, many = [40.0, 80.0, 160.0, 640.0], [1.5**power for power in range(20)]
    panels = [line_figures.Panel("", "ms", "%", {"a": (values, values)}, log_x=True) for values in (few, many)]
    line_figures.draw_panels(panels, pd.DataFrame({"a": few}), tmp_path / "figure")
    first, second = drawn[0].axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["40", "80", "160", "640"]
    assert not list(first.get_xticks(minor=True)) and len(second.get_xticks()) != len(many)
