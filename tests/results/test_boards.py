"""Tables of several tasks: what is not comparable never shares one, and its scores are over one set of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from superb_probe.results import boards as boards_module
from superb_probe.results.boards import Board, boards, published_boards
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.record import RunRecord

Make = Callable[..., RunRecord]
OTHER = {"upstream.name": "other", "upstream.revision": "sha256:other"}


def made(records: list[RunRecord], score_tasks: list[str] | None = None) -> list[Board]:
    return boards(leaderboard(records), score_tasks)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("task.protocol", "superb", "superb protocol"),
        ("task.version", 2, "task version 2"),
        ("probe.head", "linear", "head linear"),
        ("probe.layer_norm", True, "layer norm"),
        ("probe.budget", "small", "small budget"),
        ("probe.budget", "quick", "quick budget"),
        ("probe.control", "shuffle", "control: shuffled labels"),
        ("probe.layer", 4, "one layer at a time"),
        ("task.dataset", "mini", "mini"),
        ("task.data", {"test": "sha256:new"}, "data"),
        ("probe.steps", 10, "steps 10"),
        ("probe.feature_dtype", "float16", "float16"),
    ],
)
def test_what_is_not_comparable_never_shares_a_table(make_record: Make, path: str, value: Any, named: str) -> None:
    extra = {"layer_weights": None} if path == "probe.layer" else {}
    alike = made([make_record(), make_record(**OTHER)])
    assert [len(board.lines) for board in alike] == [2]
    apart = made([make_record(), make_record(**OTHER, **{path: value}, **extra)])
    assert [len(board.lines) for board in apart] == [1, 1]
    assert any(named in board.title for board in apart), [board.title for board in apart]
    assert apart[0].title != apart[1].title


@pytest.mark.parametrize("setting", ["protocol", "budget", "control", "layers", "layer_norm", "data"])
def test_a_forgotten_setting_is_caught(make_record: Make, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """A mutant for each setting: without it, the two share a table."""
    changes: dict[str, dict[str, Any]] = {
        "protocol": {"task.protocol": "superb"},
        "budget": {"probe.budget": "small"},
        "control": {"probe.control": "shuffle"},
        "layers": {"probe.layer": 4, "layer_weights": None},
        "layer_norm": {"probe.layer_norm": True},
        "data": {"task.dataset": "mini"},
    }
    real = boards_module._settings
    records = [make_record(), make_record(**OTHER, **changes[setting])]
    assert len(made(records)) == 2
    monkeypatch.setattr(boards_module, "_settings", lambda row: {**real(row), setting: "mutant"})
    monkeypatch.setattr(boards_module, "_FORM_KEY", ("task_version",))
    assert len(made(records)) == 1


def test_the_rarer_form_of_a_task_goes_to_a_table_of_its_own(make_record: Make) -> None:
    records = [
        make_record(),
        make_record(**OTHER),
        make_record(**OTHER, **{"probe.head": "ecapa"}),
        make_record(**{"task.name": "sid", "task.metric": "accuracy", "task.higher_is_better": True}),
    ]
    first, second = made(records)
    assert [column.task for column in first.columns] == ["sid", "asv"]
    assert [line.name for line in second.lines] == ["other"]
    assert second.title.endswith("ASV with head ecapa")


def test_two_revisions_are_two_lines_with_different_names(make_record: Make) -> None:
    (board,) = made([make_record(), make_record(**{"upstream.revision": "sha256:2"})])
    assert sorted(line.name for line in board.lines) == [
        "mamba_hubert_causal, revision sha256:2",
        "mamba_hubert_causal, revision sha256:9b1e",
    ]


def test_options_tell_lines_apart_in_words_and_digests_only_where_nothing_else_does(make_record: Make) -> None:
    def names(*encoders: tuple[str, dict[str, Any]]) -> list[str]:
        (board,) = made([make_record(**{"upstream.revision": one, "upstream.options": each}) for one, each in encoders])
        return sorted(line.name for line in board.lines)

    trained, published = ("sha256:aa", {"weights": "1a"}), ("sha256:bb", {"causal_front_end": False, "weights": "2b"})
    assert names(trained, published, ("random:0", {"random": 0, "weights": "3c"})) == [
        "mamba_hubert_causal",
        "mamba_hubert_causal",  # with random weights, which every table says beside the name
        "mamba_hubert_causal, causal_front_end=false",
    ]
    assert names(trained, ("sha256:bb", {"weights": "2b"}))[1] == "mamba_hubert_causal, revision sha256:bb"
    assert "2b" in names(trained, ("sha256:aa", {"weights": "2b"}))[1]


def test_the_main_table_comes_first_and_quick_after_it(make_record: Make) -> None:
    records = [
        make_record(**{"probe.budget": name, "probe.seed": i}) for i, name in enumerate(("quick", "small", "full"))
    ]
    records.append(make_record(**{"probe.control": "shuffle"}))
    assert [(b.settings["budget"], b.settings["control"]) for b in made(records)] == [
        ("full", "none"),
        ("small", "none"),
        ("quick", "none"),
        ("full", "shuffle"),
    ]


def test_layers_one_at_a_time_are_lines_of_another_table(make_record: Make) -> None:
    records = [make_record()] + [make_record(**{"probe.layer": layer}, layer_weights=None) for layer in (0, 1)]
    whole, single = made(records)
    assert [line.name for line in whole.lines] == ["mamba_hubert_causal"]
    assert [line.name for line in single.lines] == ["mamba_hubert_causal, layer 0", "mamba_hubert_causal, layer 1"]


def test_qbe_stands_beside_the_weighted_sums_when_all_layers_were_tried(make_record: Make) -> None:
    qbe = {"task.name": "qbe", "task.metric": "mtwv", "task.unit": "x 100", "task.higher_is_better": True, "upstream.num_layers": 3,
           "probe.head": "dtw", "probe.lr": 0.0, "probe.steps": 0, "probe.seed": 0, "layer_weights": None}  # fmt: skip
    every = [make_record(**qbe, **{"probe.layer": layer}) for layer in range(3)]
    (board,) = made([make_record(), *every])
    assert [column.task for column in board.columns] == ["qbe", "asv"]
    assert len(made([make_record(), *every[:2]])) == 2


def test_scores_are_over_one_set_of_tasks(make_record: Make, made_up: Any, base_record: RunRecord) -> None:
    records = made_up.made_up_records(base_record, upstreams=("a", "b"), rates=(1e-3,), seeds=(1,))
    (board,) = made(records)
    assert set(board.score_tasks) == {"superb_s site", "superb_s journal4", "superb_r"}
    assert len(board.score_tasks["superb_s site"]) == 10
    assert all(line.scores["superb_s site"] is not None for line in board.lines)
    without = [r for r in records if not (r.upstream.name == "b" and r.task.name == "sd")]
    (board,) = made(without)
    by_name = {line.name: line.scores for line in board.lines}
    assert by_name["b"]["superb_s site"] is None
    assert by_name["b"]["superb_r"] is None
    assert by_name["b"]["superb_s journal4"] is not None  # its four are there
    assert by_name["a"]["superb_s site"] is not None
    (board,) = made(without, ["asv", "pr"])
    assert board.score_tasks["superb_s site"] == ("asv", "pr")
    assert all(line.scores["superb_s site"] is not None for line in board.lines)
    assert "mean over 2 of 10 tasks (ASV, PR)" in " ".join(board.notes)


def test_sf_counts_with_both_metrics(made_up: Any, base_record: RunRecord) -> None:
    records = made_up.made_up_records(base_record, upstreams=("a", "b"), tasks=("sf",), rates=(1e-3,), seeds=(1,))
    (board,) = made(records)
    assert [column.heading for column in board.columns] == ["SF F1 % ↑", "SF CER % ↓"]
    bare = [replace(r, score=replace(r.score, extra={})) for r in records if r.score]
    (board,) = made(bare)
    assert [column.heading for column in board.columns] == ["SF F1 % ↑"]
    assert "superb_s site" not in board.score_tasks


def test_controls_have_no_score(make_record: Make) -> None:
    (board,) = made([make_record(**{"probe.control": "shuffle"})])
    assert board.score_tasks == {}


def test_best_and_second(make_record: Make) -> None:
    (board,) = made(
        [make_record(test=5.001), make_record(test=5.0, **OTHER), make_record(test=7.0, **{"upstream.name": "third"})]
    )
    assert board.best(0) == (5.0, 7.0)  # equal as shown is equal


def test_published_rows_have_tables_of_their_own() -> None:
    site, six, others = published_boards()
    assert all(board.published for board in (site, six, others))
    assert {line.name: round(line.scores["superb_s site"] or 0) for line in site.lines}["WavLM Large"] == 1145
    assert [line.printed["superb_full"] for line in six.lines] == [608.1, 651.6, 772.4, 683.5]
    assert len(others.lines) == 15
    assert "superb_s site" not in six.score_tasks
