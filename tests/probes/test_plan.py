from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from superb_probe.probes.plan import (
    Trial,
    at_edge,
    best_rate,
    default_budget,
    describe_plan,
    digest_of,
    next_rate,
    plan_trials,
)

CHANGED = {
    "upstream": "other",
    "upstream_revision": "sha256:1",
    "task": "other",
    "task_version": 2,
    "dataset": "manifest:mine",
    "data_digest": "e",
    "fold": "1",
    "protocol": "superb",
    "head": "other",
    "layer": 0,
    "layer_norm": True,
    "feature_dtype": "float16",
    "upstream_options": {"size": "base"},
    "head_options": {"control": "shuffle"},
    "budget": "full",
    "steps": 31,
    "batch": 7,
    "optimizer": "adamw",
    "lr": 1e-3,
    "seed": 2,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Trial)])
def test_every_field_is_a_cause_of_the_run_id(toy: SimpleNamespace, name: str) -> None:
    trial = toy.trial()
    assert dataclasses.replace(trial, **{name: CHANGED[name]}).run_id != trial.run_id


def test_the_run_id_is_stable_and_ignores_the_order_of_options(toy: SimpleNamespace) -> None:
    one = toy.trial(head_options={"width": 8, "accumulate": 1})
    other = toy.trial(head_options={"accumulate": 1, "width": 8})
    assert one.run_id == other.run_id and len(one.run_id) == 12
    assert toy.trial(lr=0.1).run_id == toy.trial(lr=1e-1).run_id


def test_a_cause_that_is_no_plain_value_is_refused() -> None:
    with pytest.raises(TypeError, match="plain JSON"):
        digest_of({"a": object()})
    with pytest.raises(ValueError):
        digest_of({"a": float("nan")})


def test_trials_cross_folds_rates_and_seeds(toy: SimpleNamespace) -> None:
    trials = plan_trials(toy.trial(), [("a", "d1"), ("b", "d2")], [0.1, 0.01, 0.001], [1, 2])
    assert len(trials) == len({trial.run_id for trial in trials}) == 12
    assert {(trial.fold, trial.data_digest) for trial in trials} == {("a", "d1"), ("b", "d2")}
    assert {trial.lr for trial in trials} == {0.1, 0.01, 0.001} and {trial.seed for trial in trials} == {1, 2}


def test_the_grid_grows_at_its_edges_until_the_best_lies_inside() -> None:
    values: dict[float, float | None] = {10.0**-k: float(k) for k in range(1, 6)}  # an error rate: best at 1e-1
    assert next_rate(values, higher_is_better=False) == 1.0
    values[1.0] = 9.0
    assert next_rate(values, higher_is_better=False) is None and not at_edge(values, higher_is_better=False)
    assert next_rate({1e-4: 1.0, 1e-5: 2.0}, higher_is_better=True) == 1e-6
    assert next_rate({1e-6: 1.0, 1e-7: 2.0}, higher_is_better=True) is None  # 1e-7 at the least
    assert at_edge({1e-6: 1.0, 1e-7: 2.0}, higher_is_better=True)
    assert next_rate({1.0: 1.0, 10.0: 2.0}, higher_is_better=True) is None


def test_a_rate_whose_trials_failed_is_an_edge_but_never_the_best() -> None:
    values: dict[float, float | None] = {1e-1: None, 1e-2: 5.0, 1e-3: 7.0}
    assert best_rate(values, higher_is_better=False) == 1e-2
    assert next_rate(values, higher_is_better=False) is None
    assert (
        best_rate({1e-1: None}, higher_is_better=False) is None
        and next_rate({1e-1: None}, higher_is_better=False) is None
    )


def test_growth_runs_through_exact_decades() -> None:
    values: dict[float, float | None] = {1e-1: 1.0, 1e-5: 0.0}
    seen = []
    while (rate := next_rate(values, higher_is_better=False)) is not None:
        seen.append(rate)
        values[rate] = -float(len(seen))
    assert seen == [1e-6, 1e-7]


def test_small_is_the_default_below_ten_hours_and_on_mini() -> None:
    assert default_budget(9.99 * 3600, "manifest:mine") == "small"
    assert default_budget(10 * 3600, "manifest:mine") == "full"
    assert default_budget(100 * 3600, "mini") == "small"


def test_an_empty_plan_is_said() -> None:
    assert describe_plan([]) == "in all: 0 trials, 0 finished before; 0 extractions; 0.000 GB of states; 0.0 minutes"
