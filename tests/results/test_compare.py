"""Paired tests: by hand where that can be done, by simulation for how often they err, and what they refuse to say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superb_probe.errors import RequestError
from superb_probe.results import compare
from superb_probe.results.compare import compare_items, holm, load_items, mcnemar, pairs, randomisation_test
from superb_probe.results.record import RunRecord, read_records, write_record

Make = Callable[..., RunRecord]


def accuracy(items: Any) -> float:
    return 100 * float(np.mean(items["correct"]))


def side(correct: list[int], speakers: list[str] | None = None) -> list[dict[str, Any]]:
    items: dict[str, Any] = {"id": [f"u{i}" for i in range(len(correct))], "correct": correct}
    return [{**items, "cluster": speakers} if speakers else items]


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0


def test_randomisation_by_hand() -> None:
    # of the 2**4 swaps of 3, 2, 1, 1 those with |sum| >= 7 are all as they are and all turned
    assert randomisation_test(np.array([3.0, 2.0, 1.0, 1.0])) == 2 / 16
    assert randomisation_test(np.zeros(5)) == 1.0
    # the draws agree with all swaps where there are too many to try
    values = np.random.default_rng(0).normal(0.3, 1, 13)
    whole = randomisation_test(values, draws=2**13)
    drawn = randomisation_test(values, draws=2**13 - 1)
    assert whole == pytest.approx(drawn, abs=0.02)


def test_a_cluster_is_swapped_as_one() -> None:
    values = np.ones(12)
    alone = randomisation_test(values)
    together = randomisation_test(values, ["a", "a", "b", "b", "c", "c"] * 2)
    assert alone == 2 / 2**12
    assert together == 2 / 2**3


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_clear_difference_of_independent_items() -> None:
    a, b = [1, 0] * 50, [1, 1] * 45 + [1, 0] * 5
    found = compare_items("ic", "accuracy", True, side(a), side(b), accuracy)
    assert found.p == mcnemar(0, 45)
    assert (found.a, found.b, found.difference) == pytest.approx((50, 95, 45))
    assert found.ci95 is not None
    assert found.ci95[0] < 45 < found.ci95[1]
    assert found.effect["cohens_h"] == pytest.approx(2 * np.arcsin(0.95**0.5) - 2 * np.arcsin(0.5**0.5))
    assert found.verdict("A", "B") == "B is better"
    turned = compare_items("ic", "accuracy", True, side(b), side(a), accuracy)
    assert (turned.p, turned.verdict("A", "B")) == (found.p, "A is better")


def test_lower_is_better_turns_the_verdict() -> None:
    words = [10] * 60
    sides = [[{"id": [str(i) for i in range(60)], "edits": [e] * 60, "words": words}] for e in (2, 1)]
    found = compare_items(
        "asr", "wer", False, *sides, lambda items: 100 * np.sum(items["edits"]) / np.sum(items["words"])
    )
    assert found.difference == pytest.approx(-10.0)
    assert found.effect["relative_change_percent"] == pytest.approx(-50.0)
    assert found.verdict("A", "B") == "B is better"


def test_it_says_when_it_cannot_tell() -> None:
    few = compare_items("ic", "accuracy", True, side([1, 0, 1]), side([0, 0, 1]), accuracy)
    assert few.p is None
    assert few.verdict("A", "B").startswith("cannot tell: 3 items")
    speakers = [f"s{i % 5}" for i in range(100)]
    clustered = compare_items("ic", "accuracy", True, side([0] * 100, speakers), side([1] * 100, speakers), accuracy)
    assert clustered.verdict("A", "B").startswith("cannot tell: 5 speakers")
    same = compare_items("ic", "accuracy", True, side([1, 0] * 20), side([1, 0] * 20), accuracy)
    assert (same.p, same.verdict("A", "B")) == (1.0, "cannot tell")


def test_unknown_speakers_are_no_cluster() -> None:
    found = compare_items("ic", "accuracy", True, side([0] * 20, [""] * 20), side([1] * 20, [""] * 20), accuracy)
    assert (found.clusters, found.p) == (None, mcnemar(0, 20))


def test_items_are_paired_by_name_and_not_by_place() -> None:
    a, b = side([1, 0] * 20)[0], side([1, 0] * 20)[0]
    b = {name: column[::-1] for name, column in b.items()}
    assert compare_items("ic", "accuracy", True, [a], [b], accuracy).p == 1.0
    with pytest.raises(RequestError, match="same items"):
        compare_items("ic", "accuracy", True, side([1] * 10), side([1] * 9), accuracy)
    with pytest.raises(RequestError, match="an id that another has"):
        compare_items("ic", "accuracy", True, [{"id": ["a", "a"], "correct": [1, 1]}], [a], accuracy)


def test_seeds_are_averaged_item_by_item() -> None:
    a = side([0] * 30) + side([1] * 30)
    b = side([1] * 30) + side([1] * 30)
    found = compare_items("ic", "accuracy", True, a, b, accuracy)
    assert (found.a, found.b) == (50, 100)
    assert "randomisation" in found.method


@pytest.mark.parametrize(
    ("case", "times"),
    [("McNemar, 400 items", 300), ("accuracy, 20 speakers x 20", 300), ("WER, 12 speakers x 15", 300)],
)
def test_false_positives_and_power(
    simulate_compare: Any, monkeypatch: pytest.MonkeyPatch, case: str, times: int
) -> None:
    """At most 6 % with what 300 tries scatter (2.5 standard errors); the full run is in the simulation's own file."""
    monkeypatch.setattr(compare, "DRAWS", 500)
    wolf, _ = simulate_compare.rejections(case, 0.0, times)
    assert wolf <= 0.05 + 2.5 * (0.05 * 0.95 / times) ** 0.5
    power, _ = simulate_compare.rejections(case, simulate_compare.CASES[case][-1], 60, seed=1)
    assert power > 0.6


def test_forgetting_the_speakers_cries_wolf(simulate_compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: items of one speaker taken as independent."""
    monkeypatch.setattr(compare, "_clusters", lambda items: (None, None))
    wolf, _ = simulate_compare.rejections("WER, 12 speakers x 15", 0.0, 200)
    assert wolf > 0.10


@pytest.mark.slow
def test_false_positives_of_verification(simulate_compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BOOTSTRAP_DRAWS", 200)
    wolf, _ = simulate_compare.rejections("EER, 20 speakers", 0.0, 200)
    assert wolf <= 0.06 + 2.5 * (0.05 * 0.95 / 200) ** 0.5


def test_verification_sees_a_large_difference_and_no_absent_one(
    simulate_compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BOOTSTRAP_DRAWS", 100)
    assert simulate_compare.rejections("EER, 20 speakers", 2.0, 3)[0] == 1.0
    a, _ = simulate_compare.trials(np.random.default_rng(0), 0.0)
    same = compare_items("asv", "eer", False, a, a, simulate_compare.CASES["EER, 20 speakers"][3])
    assert same.verdict("A", "B") == "cannot tell"


def test_pairs_are_of_one_kind(make_record: Make) -> None:
    other = {"upstream.name": "other", "upstream.revision": "sha256:o"}
    small = {"probe.budget": "small"}
    records = [
        make_record(),
        make_record(**other),
        make_record(**small),
        make_record(**other, **{"probe.layer_norm": True}),
    ]
    (pair,) = pairs(records, "asv", "mamba_hubert_causal", "other")
    assert [row["budget"] for row in pair] == ["full", "full"]
    with pytest.raises(RequestError, match="run them alike"):
        pairs([make_record(), make_record(**other, **small)], "asv", "mamba_hubert_causal", "other")
    with pytest.raises(RequestError, match=r"no result of fbank\. Known: mamba_hubert_causal, other"):
        pairs(records, "asv", "fbank", "other")
    two = [*records, make_record(**{"upstream.revision": "sha256:2"})]
    with pytest.raises(RequestError, match=r"several revisions.*mamba_hubert_causal@sha256:2"):
        pairs(two, "asv", "mamba_hubert_causal", "other")
    assert pairs(two, "asv", "mamba_hubert_causal@sha256:9b", "other")


def test_a_control_is_a_side_of_its_own(make_record: Make) -> None:
    records = [make_record(), make_record(**{"probe.control": "shuffle"})]
    (pair,) = pairs(records, "asv", "mamba_hubert_causal:shuffle", "mamba_hubert_causal")
    assert [row["control"] or None for row in pair] == ["shuffle", None]
    with pytest.raises(RequestError, match=r"no result of mamba_hubert_causal under the control 'shuffle'"):
        pairs(records[:1], "asv", "mamba_hubert_causal:shuffle", "mamba_hubert_causal")


def test_stored_items_come_back_by_seed_with_folds_joined(make_record: Make, tmp_path: Path) -> None:
    for seed in (1, 2):
        for fold in ("1", "2"):
            record = make_record(**{"probe.seed": seed, "task.fold": fold, "task.data": {"test": fold}})
            write_record(record, {"id": [f"{fold}a", f"{fold}b"], "score": [0.5, seed]}, tmp_path)
    found = load_items(read_records(tmp_path), [tmp_path])
    assert found == [{"id": ["1a", "1b", "2a", "2b"], "score": [0.5, seed, 0.5, seed]} for seed in (1, 2)]
    (gone,) = tmp_path.rglob(f"{read_records(tmp_path)[0].run_id}.json")
    record = read_records(tmp_path)[0]
    gone.unlink()
    with pytest.raises(RequestError, match="no per-item outcomes"):
        load_items([record], [tmp_path])


def test_slots_are_compared_by_the_columns_that_the_task_writes() -> None:
    """Mutant: the metric's name for its column, which no item has."""
    from superb_probe.downstreams.sf import SlotFilling

    task = SlotFilling()
    references = ["B-a X E-a"] * 12
    names = {"id": [f"u{number}" for number in range(12)]}
    right = dict(task.score_texts(names, references, references).items)
    wrong = dict(task.score_texts(names, references, ["X"] * 12).items)
    found = compare_items("sf", "slot_type_f1", True, [right], [wrong], task.value)
    assert (found.a, found.b, found.difference) == (100.0, 0.0, -100.0)
    assert found.p is not None and found.p < 0.001


def test_counts_of_one_threshold_stay_text() -> None:
    columns = {"id": ["q"], "hits": ["3"], "false_alarms": ["0"], "targets": ["4"]}
    assert compare.numbers(columns) == {**columns, "targets": [4]}
