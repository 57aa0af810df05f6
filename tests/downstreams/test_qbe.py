"""QbE: tables and manifests, standard scores, items that give the metric again, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.qbe import read_split, standard_scores
from superb_probe.errors import RequestError
from superb_probe.probes.metrics import TWV_BETA, mtwv
from superb_probe.probes.statistics import bootstrap


def split_of(name: str, occurs: dict[str, str], documents: int = 30) -> Manifest:
    rows = [(f"{name}-{q}", "query", inside) for q, inside in occurs.items()]
    rows += [(f"d{k}", "document", "") for k in range(documents)]
    made = [
        Utterance(key, f"{key}.wav", 0.0, 1.0, {"role": role, "occurrences": inside, "speaker": ""})
        for key, role, inside in rows
    ]
    return Manifest(made, Path(), name)


OCCURS = {"a": "d0 d3", "b": "d7", "c": "", "e": "d1"}


def world(seed: int = 0, protocol: str = "strict") -> tuple[Fold, dict[str, np.ndarray]]:
    task = load_task("qbe")
    fold = task.arrange(Fold(None, {"dev": split_of("dev", OCCURS), "test": split_of("test", OCCURS)}), protocol)
    generator = np.random.default_rng(seed)
    found = {}
    for query in fold.manifests["test"]:
        if query.labels["role"] == "query":
            truth = np.isin([f"d{k}" for k in range(30)], query.labels["occurrences"].split())
            found[query.id] = (
                -5 + 3 * generator.normal(size=30) + 9 * truth
            )  # every query has its own offset and scale below
    return fold, {name: scores * (1 + number) + 7 * number for number, (name, scores) in enumerate(found.items())}


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_standardised_a_query_and_one_threshold_serves_all(seed: int) -> None:
    fold, predictions = world(seed)
    truths = [np.isin([f"d{k}" for k in range(30)], OCCURS[name[5:]].split()).astype(int) for name in predictions]
    standard = [(scores - scores.mean()) / scores.std() for scores in predictions.values()]
    score = load_task("qbe").score(predictions, fold, "test")
    assert score.value == pytest.approx(100 * mtwv(truths, standard)[0])
    assert score.value != pytest.approx(100 * mtwv(truths, list(predictions.values()))[0])
    sample = [(scores - scores.mean()) / scores.std(ddof=1) for scores in predictions.values()]
    assert standard_scores(predictions["test-a"], 30, "a").tolist() == pytest.approx(standard[0].tolist())
    assert standard_scores(predictions["test-a"], 30, "a").tolist() != pytest.approx(sample[0].tolist(), rel=1e-3)
    assert not standard_scores(np.zeros(30), 30, "short").any()


def test_items_are_queries_and_give_intervals() -> None:
    task = load_task("qbe")
    fold, predictions = world(1)
    score = task.score(predictions, fold, "test")
    assert score.items["id"] == [f"test-{name}" for name in OCCURS] and score.items["targets"] == [2, 1, 0, 1]
    columns = {name: column for name, column in score.items.items() if name not in ("id", "cluster")}
    low, high, _ = bootstrap(task.value, columns, clusters=score.items["cluster"], draws=50)
    assert low <= score.value <= high


def test_the_threshold_of_dev_gives_the_actual_value() -> None:
    task = load_task("qbe")
    fold, predictions = world(2)
    dev = task.score({name.replace("test", "dev"): -scores for name, scores in predictions.items()}, fold, "dev")
    tuned = task.tuned_by(dev)
    score = tuned.score(predictions, fold, "test")
    assert score.extra["atwv"] < score.value == task.score(predictions, fold, "test").value
    assert "atwv" not in task.score(predictions, fold, "test").extra
    nothing = task.score(
        {name: -abs(scores) * (np.arange(30) < 8) for name, scores in predictions.items()}, fold, "test"
    )
    assert nothing.value == 0.0 and task.tuned_by(nothing).score(predictions, fold, "test").extra["atwv"] == 0.0
    own = task.tuned_by(task.score(predictions, fold, "test")).score(predictions, fold, "test")
    assert own.extra["atwv"] == pytest.approx(own.value)


def test_published_scores_have_four_decimals() -> None:
    scores = np.linspace(0, 1, 30)
    scores[1] = scores[0]
    near = {f"test-{name}": scores.copy() for name in OCCURS}
    near["test-a"][[0, 3]] = 2.0, 2.0
    near["test-a"][5] = 2.0 - 1e-7  # a false alarm just below the targets
    values = {}
    for protocol in ("strict", "superb"):
        fold, _ = world(0, protocol)
        values[protocol] = load_task("qbe").score(near, fold, "test")
    assert values["strict"].items["false_alarms"] != values["superb"].items["false_alarms"]


def test_yes_is_above_two_deviations() -> None:
    fold, _ = world(0)
    scores = {f"test-{name}": np.zeros(30) for name in OCCURS}
    scores["test-a"][[0, 3]] = 1.0  # standard score 3.74
    scores["test-b"][[7, 8]] = 1.0  # a hit and a false alarm
    expected = 100 * ((1 + 1 + 0) / 3 - TWV_BETA * (1 / 29) / 3)
    assert load_task("qbe").score(scores, fold, "test").extra["twv_yes"] == pytest.approx(expected)


def test_tables_become_one_manifest_a_split(mini_like: Path, tmp_path: Path) -> None:
    manifest = read_split(mini_like, "test")
    roles = manifest.labels("role")
    assert roles == ["query"] * roles.count("query") + ["document"] * roles.count("document")
    assert manifest["fay-q"].labels["occurrences"] == "fay-1" and manifest["fay-1"].labels["occurrences"] == ""
    (fold,) = load_folds(load_task("qbe"), root=mini_like)
    assert set(fold.manifests) == {"dev", "test"}
    for table in ("queries", "documents", "occurrences"):
        (tmp_path / f"{table}.test.tsv").write_text((mini_like / f"{table}.test.tsv").read_text())
    (tmp_path / "occurrences.test.tsv").write_text("query\tdocument\nfay-q\tnone\nnobody\tfay-1\n")
    with pytest.raises(RequestError, match="2 problems"):
        read_split(tmp_path, "test")


def test_anyones_manifests_need_dev_but_no_train(mini_like: Path, tmp_path: Path) -> None:
    task = load_task("qbe")
    for split in ("dev", "test"):
        read_split(mini_like, split).write(tmp_path / f"{split}.tsv")
    paths = {split: tmp_path / f"{split}.tsv" for split in ("dev", "test")}
    assert load_folds(task, manifests=paths, root=mini_like)
    with pytest.raises(RequestError, match="lacks dev"):
        load_folds(task, manifests={"test": paths["test"]}, root=mini_like)


def test_documents_may_be_shared_by_splits_and_queries_may_not() -> None:
    task = load_task("qbe")
    dev, test = split_of("dev", OCCURS), split_of("test", OCCURS)
    assert not task.label_problems(Fold(None, {"dev": dev, "test": test}))
    (problem,) = task.label_problems(Fold(None, {"dev": dev, "test": dev}))
    assert "share 4 queries" in problem.what


def test_everything_wrong_is_named() -> None:
    task = load_task("qbe")
    wrong = split_of("test", {"a": "d0 d99", "b": "d1"})
    odd = replace(wrong[4], labels={**wrong[4].labels, "role": "noise"})
    manifest = Manifest([*wrong[:4], odd, *wrong[5:]], Path(), "test")
    told = [str(problem) for problem in task.label_problems(Fold(None, {"test": manifest}))]
    assert len(told) == 2 and "occurs in d99" in told[0] and "role 'noise'" in told[1]
    nothing = split_of("test", {"a": ""}, documents=2)
    assert "nothing to find" in str(task.label_problems(Fold(None, {"test": nothing}))[0])
    assert "no query" in str(task.label_problems(Fold(None, {"test": split_of("test", {})}))[0])
    fold, predictions = world()
    with pytest.raises(RequestError, match="30 finite scores"):
        task.score({**predictions, "test-a": np.zeros(29)}, fold, "test")
    assert any("1 queries occur nowhere" in note for note in fold.notes)


def test_it_listens_as_superb_does() -> None:
    info = load_task("qbe").info
    assert (info.waveform, info.trained, info.metric) == ("gain", False, "mtwv")
    assert all(settings.select_on == "dev" for settings in info.protocols.values())
