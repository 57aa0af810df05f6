"""The aggregation rule: a golden table, and code that breaks the rule is caught by it."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superb_probe.errors import CheckError
from superb_probe.results import leaderboard as board
from superb_probe.results.leaderboard import aggregate, choose_lr, leaderboard, write_csv
from superb_probe.results.record import RunRecord

Make = Callable[..., RunRecord]
GOLDEN = Path(__file__).with_name("golden_leaderboard.csv")


def a_sweep(make: Make) -> list[RunRecord]:
    """Three rates and three seeds of one upstream; the best rate on dev is not the best on test."""
    table = {
        1e-2: ([6.0, 6.2, 6.1], [5.0, 5.0, 5.0]),
        1e-3: ([5.0, 5.2, 5.4], [7.0, 7.5, 8.0]),
        1e-4: ([9, 9, 9], [9, 9, 9]),
    }
    return [
        make(dev=float(d), test=float(t), **{"probe.lr": lr, "probe.seed": seed})
        for lr, (dev, test) in table.items()
        for seed, (d, t) in enumerate(zip(dev, test, strict=True), start=1)
    ]


def some_records(make: Make) -> list[RunRecord]:
    """What a golden table must cover: a sweep, a random twin, a control, a tie, folds, a failure, other data, versions, overlaps."""
    random_upstream = {"upstream.revision": "random:0", "upstream.name": "mamba_hubert_causal"}
    er = {
        "task.name": "er",
        "task.metric": "accuracy",
        "task.higher_is_better": True,
        "selection.metric": "accuracy",
        "upstream.name": "fbank_no_cmvn",
        "upstream.params": 0,
        "upstream.lookahead_samples": 0,
        "upstream.revision": "sha256:code",
        "score.extra": {},
    }
    records = a_sweep(make)
    records += [make(dev=40.0, test=41.0, half=2.0, **random_upstream, **{"probe.lr": 1e-3})]
    records += [make(dev=50.0, test=49.5, half=2.0, **{"probe.lr": 1e-3, "probe.control": "shuffle"})]
    records += [make(dev=5.0, test=t, **{"task.dataset": "mini", "probe.budget": "small", "probe.lr": lr, "probe.seed": seed})
                for lr, t in ((1e-3, 6.0), (1e-2, 4.0)) for seed in (1, 2)]  # fmt: skip
    for fold in range(1, 6):
        data = {"train": f"sha256:{fold}t", "dev": f"sha256:{fold}d", "test": f"sha256:{fold}e"}
        for seed in (1, 2):
            if (fold, seed) != (5, 2):  # seed 2 lacks a fold: it must not count
                changes = {**er, "task.fold": f"fold{fold}", "task.data": data, "probe.seed": seed, "probe.lr": 1e-4}
                records.append(make(dev=60.0 + fold, test=50.0 + fold + 10 * seed, **changes))
    failed = {
        "status": "failed",
        "score": None,
        "selection": None,
        "layer_weights": None,
        "items": None,
        "error": "nan loss",
    }
    records += [make(**{"probe.lr": 1e-1, "probe.seed": seed}, **failed) for seed in (1, 2)]
    records += [make(dev=1.0, test=1.0, **{"task.version": 2})]
    records += [make(dev=2.0, test=2.0, **{"probe.layer_norm": True})]
    records += [
        make(dev=3.0, test=3.0, **{"task.data": {"train": "sha256:other", "dev": "sha256:b", "test": "sha256:c"}})
    ]
    records += layers_of_qbe(make, {0: (5.0, 9.0), 1: (7.0, 6.0), 2: (7.0, 8.0)})
    records += [make(dev=4.0, test=4.0, **{"probe.layer": 3}, layer_weights=None)]
    for name, heard in (
        ("heard_all", ["voxceleb", "librispeech-960"]),
        ("heard_dev", ["voxceleb1-dev"]),
        ("heard_what", []),
    ):
        records.append(make(dev=4.5, test=4.5, **{"upstream.name": name, "upstream.trained_on": heard}))
    return records


def layers_of_qbe(make: Make, scores: dict[int, tuple[float, float]], num_layers: int = 3) -> list[RunRecord]:
    """A task without training: a record a layer, (dev, test) of each."""
    qbe = {"task.name": "qbe", "task.metric": "mtwv", "task.unit": "x 100", "task.higher_is_better": True, "selection.metric": "mtwv",
           "upstream.num_layers": num_layers, "probe.head": "dtw", "probe.lr": 0.0, "probe.steps": 0, "probe.seed": 0}  # fmt: skip
    return [
        make(dev=dev, test=test, **qbe, **{"probe.layer": layer}, layer_weights=None)
        for layer, (dev, test) in scores.items()
    ]


def test_dev_chooses_the_layer_of_a_task_without_training(make_record: Make) -> None:
    row = leaderboard(layers_of_qbe(make_record, {0: (5.0, 9.0), 1: (7.0, 6.0), 2: (7.0, 8.0)})).iloc[0]
    assert (row["layer"], row["score"], row["layer_choice"], row["edge"]) == ("1 (of 3, by dev)", 6.0, "all", "")
    some = leaderboard(layers_of_qbe(make_record, {1: (7.0, 6.0)})).iloc[0]
    assert (some["layer"], some["layer_choice"]) == ("1 (of 1, by dev)", "one")


def test_the_slope_of_dev_at_the_end(make_record: Make) -> None:
    curve = ((100, 9.0), (200, 8.0), (300, 6.0), (400, 4.0))
    row = leaderboard([make_record(**{"selection.curve": curve})]).iloc[0]
    assert row["dev_slope"] == pytest.approx(-20.0)  # two points in a hundred updates, over the last three
    assert leaderboard([make_record()]).iloc[0]["dev_slope"] is None


def test_further_metrics_and_speed_are_averaged(make_record: Make) -> None:
    records = [
        make_record(**{"probe.seed": s, "score.extra": {"min_dcf": x, f"only_{s}": 1.0}, "cost.audio_s": 100.0 * s,
                       "cost.extract_s": 10.0})
        for s, x in ((1, 0.25), (2, 0.75))
    ]  # fmt: skip
    row = leaderboard(records).iloc[0]
    assert row["extra"] == '{"min_dcf": 0.5}'
    assert row["times_real_time"] == pytest.approx(15.0)


def golden_text(make: Make, folder: Path) -> str:
    write_csv(leaderboard(some_records(make)), folder / "board.csv")
    return (folder / "board.csv").read_text()


def test_golden_csv(make_record: Make, tmp_path: Path) -> None:
    assert golden_text(make_record, tmp_path) == GOLDEN.read_text()


def test_the_order_of_the_records_does_not_matter(make_record: Make, tmp_path: Path) -> None:
    records = some_records(make_record)
    random.Random(0).shuffle(records)
    write_csv(leaderboard(records), tmp_path / "board.csv")
    assert (tmp_path / "board.csv").read_text() == GOLDEN.read_text()


def mutant_test_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_dev", board._test)


def mutant_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "choose_lr", lambda dev, higher: choose_lr(dev, not higher))


def mutant_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(dev: Any, higher: bool) -> float:
        sign = -1.0 if higher else 1.0
        return float(min(dev, key=lambda lr: (sign * statistics.fmean(dev[lr]), -lr)))

    monkeypatch.setattr(board, "choose_lr", larger)


def mutant_incomplete_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lenient(finished: Any, folds: Any) -> Any:
        cells: dict[float, dict[int, list[RunRecord]]] = {}
        for record in finished:
            cells.setdefault(record.probe.lr, {}).setdefault(record.probe.seed, []).append(record)
        return cells, 0

    monkeypatch.setattr(board, "_by_rate_and_seed", lenient)


def mutant_key(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def forget(monkeypatch: pytest.MonkeyPatch) -> None:
        real = board._key
        monkeypatch.setattr(board, "_key", lambda record: {**real(record), name: ""})

    forget.__name__ = f"mutant_forgets_{name}"
    return forget


def mutant_forgets_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "worst_overlap", lambda records: "none")


MUTANTS = [
    mutant_forgets_overlaps,
    mutant_test_chooses,
    mutant_direction,
    mutant_tie,
    mutant_incomplete_seed,
    *map(mutant_key, ("control", "budget", "task_version", "layer_norm", "revision", "dataset")),
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_broken_rule_changes_the_golden_csv(
    make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutate(monkeypatch)
    try:
        text = golden_text(make_record, tmp_path)
    except CheckError:  # records that must not share a row collide
        return
    assert text != GOLDEN.read_text()


def test_the_rate_is_chosen_on_dev(make_record: Make) -> None:
    row = leaderboard(a_sweep(make_record)).iloc[0]
    assert row["lr"] == 1e-3
    assert row["score"] == pytest.approx(7.5)
    assert row["dev_score"] == pytest.approx(5.2)
    assert row["edge"] == ""
    assert row["lr_tried"] == "0.0001 0.001 0.01"


def test_t_interval_by_hand(make_record: Make) -> None:
    row = leaderboard(a_sweep(make_record)).iloc[0]
    half = 4.302652729911275 * 0.5 / math.sqrt(3)  # t(0.975, 2); scores 7, 7.5, 8 have standard deviation 0.5
    assert (row["ci95_low"], row["ci95_high"]) == pytest.approx((7.5 - half, 7.5 + half))
    assert (row["ci"], row["seeds"]) == ("t over 3 seeds", 3)


def test_item_bootstrap_below_three_seeds(make_record: Make) -> None:
    records = [make_record(test=t, half=h, **{"probe.seed": s}) for s, (t, h) in enumerate(((5.0, 0.5), (6.0, 1.5)))]
    row = leaderboard(records).iloc[0]
    assert (row["ci95_low"], row["ci95_high"]) == pytest.approx((4.5, 6.5))
    assert row["ci"] == "bootstrap over test speakers, 1000 draws, mean of 2 intervals"
    assert leaderboard(records[:1]).iloc[0]["ci"] == "bootstrap over test speakers, 1000 draws"


def test_folds_are_averaged_inside_a_seed(make_record: Make) -> None:
    board_rows = leaderboard(some_records(make_record))
    row = board_rows[board_rows["task"] == "er"].iloc[0]
    assert (row["score"], row["seeds"], row["folds"], row["incomplete"]) == (pytest.approx(63.0), 1, 5, 1)
    assert (row["weights"], row["better"], row["edge"]) == ("none", "higher", "one rate")


def test_random_weights_and_dataset_are_shown(make_record: Make) -> None:
    rows = leaderboard(some_records(make_record))
    assert rows.loc[rows["revision"] == "random:0", "weights"].tolist() == ["random"]
    assert "mini" in rows["dataset"].tolist()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.protocol", "superb"),
        ("task.version", 2),
        ("task.dataset", "mini"),
        ("task.data", {"train": "x", "dev": "y", "test": "z"}),
        ("probe.head", "linear"),
        ("probe.layer", 4),
        ("probe.layer_norm", True),
        ("probe.feature_dtype", "float16"),
        ("probe.control", "shuffle"),
        ("probe.budget", "small"),
        ("probe.steps", 10),
        ("probe.head_options", {"width": 128}),
        ("upstream.name", "fbank"),
        ("upstream.revision", "random:0"),
        ("upstream.waveform_norm", "utterance"),
        ("upstream.options", {"size": "tiny"}),
        ("upstream.layer_convention", "before_residual"),
    ],
)
def test_what_differs_never_shares_a_row(make_record: Make, path: str, value: Any) -> None:
    extra = {"layer_weights": None} if path == "probe.layer" else {}
    same = leaderboard([make_record(), make_record(**{"probe.seed": 2})])
    apart = leaderboard([make_record(), make_record(**{"probe.seed": 2, path: value}, **extra)])
    assert (len(same), len(apart)) == (1, 2)


def test_folds_whose_data_changed_stay_apart(make_record: Make) -> None:
    def fold(name: str, digest: str) -> RunRecord:
        return make_record(**{"task.fold": name, "task.data": {"test": digest}})

    assert len(leaderboard([fold("1", "a"), fold("2", "b")])) == 1
    assert len(leaderboard([fold("1", "a"), fold("2", "b"), fold("1", "new")])) == 3


def test_same_settings_with_two_run_ids_are_an_error(make_record: Make) -> None:
    records = [
        make_record(run_id="bbbbbbbb"),
        make_record(run_id="aaaaaaaa"),
        make_record(**{"upstream.name": "fbank"}),
    ]
    with pytest.raises(CheckError, match=r"aaaaaaaa.*bbbbbbbb"):
        leaderboard(records)
    table, _, conflicts = aggregate(records)  # the rest of the table is still made
    assert (table["upstream"].tolist(), len(conflicts)) == (["fbank"], 1)


def test_failures_are_counted_and_groups_without_a_row_are_named(make_record: Make) -> None:
    failed = {"status": "failed", "score": None, "selection": None, "layer_weights": None, "error": "nan loss"}
    records = [make_record(), make_record(**failed, **{"probe.lr": 1.0})]
    assert leaderboard(records).iloc[0]["failed"] == 1
    assert aggregate(records)[1:] == ([], [])
    alone = [make_record(**failed, **{"upstream.name": "fbank"})]
    assert len(leaderboard(alone)) == 0
    assert aggregate(alone)[1] == ["asv / fbank on voxceleb1: no row (1 failed)"]


def test_columns(make_record: Make) -> None:
    assert GOLDEN.read_text().splitlines()[0].split(",") == list(board.COLUMNS)
    assert set(board._key(make_record())) <= set(board.COLUMNS)
