"""Whether one upstream is really better than another: paired tests on the outcomes of the same test items.

What is tested is the difference of two trained systems on items like these. Items of one speaker hang together, so wherever the
items name their speakers, speakers and not items are what is shuffled or drawn.

- Metrics that are a mean or a ratio over items (accuracy, WER, PER, DER, F1): approximate randomisation (Noreen 1989) that swaps the
  two systems' outcomes of a whole speaker; McNemar's exact test for accuracies of one seed whose items are independent.
- Metrics of all items together (EER, MTWV): a paired bootstrap over speakers (both sides of a trial) and Student's t.

Outcomes of several seeds are averaged, item by item, before the test. Holm's method (1979) keeps several tasks' tests at 5 % together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superb_probe.errors import RequestError
from superb_probe.results.leaderboard import aggregate
from superb_probe.results.record import RunRecord, read_items

CONTROLS = ("shuffle",)

Floats = NDArray[np.float64]
Items = Mapping[str, Sequence[Any] | NDArray[Any]]
DRAWS = 10_000
BOOTSTRAP_DRAWS = 1000
FEWEST_CLUSTERS = 6  # sign flips of five clusters never reach 5 %: 2 / 2**5 = 0.0625
# The columns that a metric is a ratio of sums of: those of the numerator, and the denominator (None: the number of items).
RATIOS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "accuracy": (("correct",), None),
    "wer": (("edits",), "words"),
    "per": (("edits",), "phones"),
    "der": (("miss_s", "false_alarm_s", "confusion_s"), "speech_s"),
    "slot_type_f1": (("f1",), None),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one paired test.

    Attributes:
        difference: B minus A, in the metric's unit.
        ci95: of the difference; None where there is too little to tell.
        p: two-sided; None where the test cannot be made.
        p_holm: corrected for all tasks compared together.
        effect: the size of the difference by name: "cohens_h" for accuracies, "relative_error_change" for error rates.
        method: the test in words.
        items: compared.
        clusters: speakers they come from; None where they are independent.
        reason: why it cannot tell, where there is no p.
    """

    task: str
    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: float
    ci95: tuple[float, float] | None
    p: float | None
    effect: Mapping[str, float]
    method: str
    items: int
    clusters: int | None
    reason: str = ""
    p_holm: float | None = None

    def verdict(self, name_a: str, name_b: str, level: float = 0.05) -> str:
        """What can be said, in words: who is better, or that it cannot tell."""
        p = self.p if self.p_holm is None else self.p_holm
        if p is None:
            return f"cannot tell: {self.reason}"
        if p >= level:
            return "cannot tell"
        return f"{name_b if (self.difference > 0) == self.higher_is_better else name_a} is better"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def randomisation_test(
    differences: Floats, clusters: Sequence[Hashable] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> float:
    """The two-sided p value of a sum of paired differences when A and B are swapped at random, a cluster at a time.

    Args:
        differences: (n,) one an item.
        clusters: (n,) what is swapped together; None: each item by itself.
        draws: random swaps; all of them are tried when there are no more.
        seed: of the generator.

    >>> randomisation_test(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    0.03125
    """
    sums = _cluster_sums(differences, clusters)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    observed = abs(float(sums.sum()))
    slack = 1e-9 * float(np.abs(sums).sum())  # equal sums in another order differ by rounding
    if 2 ** len(sums) <= draws:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        return float((np.abs(signs @ sums) >= observed - slack).mean())
    generator, reached, block = np.random.default_rng(seed), 0, max(1, 2_000_000 // len(sums))
    for start in range(0, draws, block):
        signs = 1 - 2 * generator.integers(2, size=(min(block, draws - start), len(sums)), dtype=np.int8)
        reached += int((np.abs(signs @ sums) >= observed - slack).sum())
    return (reached + 1) / (draws + 1)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p value, from the items that only A and only B got right (McNemar 1947; binomial).

    >>> mcnemar(1, 9)
    0.021484375
    """
    from scipy import stats  # a second to import: most of what reads this module asks for no p value

    total = only_a + only_b
    return 1.0 if total == 0 else float(stats.binomtest(min(only_a, only_b), total).pvalue)


def bootstrap_test(
    value: Callable[[dict[str, NDArray[Any]]], float],
    a: Items,
    b: Items,
    clusters: Sequence[Hashable] | None,
    other_clusters: Sequence[Hashable] | None,
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> tuple[float | None, tuple[float, float] | None]:
    """The p value and interval of value(B) - value(A) when the same items are drawn for both, whole clusters at a time.

    The bootstrap's standard error, widened for few clusters by G / (G - 1), is judged by Student's t with G - 1 degrees.
    """
    from superb_probe.probes.metrics import UndefinedMetric
    from superb_probe.probes.statistics import as_column, resampled_rows

    columns = [{name: as_column(values) for name, values in each.items()} for each in (a, b)]
    count = len(next(iter(columns[0].values())))
    named = {*(clusters or range(count)), *(other_clusters or ())}
    rows = resampled_rows(count, clusters, other_clusters, np.random.default_rng(seed))
    found: list[float] = []
    tries = 0
    while len(found) < draws and tries < 5 * draws:
        tries += 1
        drawn = next(rows)
        try:
            first, second = (value({name: column[drawn] for name, column in each.items()}) for each in columns)
        except UndefinedMetric:
            continue
        found.append(second - first)
    observed = value(columns[1]) - value(columns[0])
    if len(found) < draws:
        return None, None
    degrees = len(named) - 1
    error = float(np.std(found, ddof=1)) * math.sqrt(len(named) / degrees)
    if error == 0:
        return (1.0 if observed == 0 else None), None
    half = _student_half(degrees) * error
    return _student_p(observed / error, degrees), (observed - half, observed + half)


def _student_half(degrees: int) -> float:
    """The 97.5 % point of Student's distribution."""
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def _student_p(value: float, degrees: int) -> float:
    """The two-sided p value of Student's statistic."""
    from scipy import stats

    return float(2 * stats.t.sf(abs(value), degrees))


def compare_items(
    task: str,
    metric: str,
    higher_is_better: bool,
    a: Sequence[Items],
    b: Sequence[Items],
    value: Callable[[dict[str, NDArray[Any]]], float],
) -> Comparison:
    """Compare two systems on the items both were scored on.

    Args:
        task: its name.
        metric: its metric.
        higher_is_better: its direction.
        a: the item columns of A, one mapping a seed (folds joined); "id" names the items.
        b: those of B.
        value: the metric of item columns, in its unit (`Task.value`).

    Raises:
        RequestError: when the two were not scored on the same items.
    """
    aligned = _aligned(task, [*a, *b])
    left, right = aligned[: len(a)], aligned[len(a) :]
    count = len(left[0]["id"])
    clusters, others = _clusters(left[0])
    groups = None if clusters is None else len({*clusters, *(others or ())})
    scores = [float(np.mean([value(_bare(each)) for each in side])) for side in (left, right)]
    common: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "a": scores[0],
        "b": scores[1],
        "difference": scores[1] - scores[0],
        "effect": _effect(metric, scores[0], scores[1]),
        "items": count,
        "clusters": groups,
    }
    units = count if groups is None else groups
    if units < FEWEST_CLUSTERS:
        what = "items" if groups is None else "speakers"
        reason = f"{units} {what}, and no test of fewer than {FEWEST_CLUSTERS} can reach 5 %"
        return Comparison(**common, ci95=None, p=None, method="none", reason=reason)
    ratio = RATIOS.get(metric)
    if ratio is None or not {*ratio[0], *filter(None, ratio[1:])} <= left[0].keys():
        return _by_bootstrap(common, left, right, value, clusters, others)
    return _by_randomisation(common, left, right, ratio, clusters)


def _by_randomisation(
    common: dict[str, Any],
    left: Sequence[Items],
    right: Sequence[Items],
    ratio: tuple[tuple[str, ...], str | None],
    clusters: Sequence[Hashable] | None,
) -> Comparison:
    names, denominator = ratio
    first, second = (
        np.mean([np.sum([np.asarray(each[name], dtype=float) for name in names], axis=0) for each in side], axis=0)
        for side in (left, right)
    )
    weight = np.ones(len(first)) if denominator is None else np.asarray(left[0][denominator], dtype=float)
    difference = second - first
    alone = clusters is None or len(set(clusters)) == len(clusters)
    if common["metric"] == "accuracy" and alone and len(left) == len(right) == 1:
        p = mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
        method = "McNemar's exact test over items"
    else:
        p = randomisation_test(difference, clusters)
        method = f"approximate randomisation over {'items' if alone else 'test speakers'}, {DRAWS} draws"
    sums, weights = _cluster_sums(difference, clusters), _cluster_sums(weight, clusters)
    total = float(weights.sum())
    # linearised standard error of a ratio, clusters as units (Cochran 1977, section 6.5)
    residual = sums - weights * float(sums.sum()) / total
    error = math.sqrt(len(sums) / (len(sums) - 1) * float((residual**2).sum())) / total
    scale = common["difference"] / (float(sums.sum()) / total) if sums.sum() else 100.0
    half = _student_half(len(sums) - 1) * error * scale
    return Comparison(**common, ci95=(common["difference"] - half, common["difference"] + half), p=p, method=method)


def _by_bootstrap(
    common: dict[str, Any],
    left: Sequence[Items],
    right: Sequence[Items],
    value: Callable[[dict[str, NDArray[Any]]], float],
    clusters: Sequence[Hashable] | None,
    others: Sequence[Hashable] | None,
) -> Comparison:
    sides: list[dict[str, Any]] = []
    for side in (left, right):
        bare = [_bare(each) for each in side]
        sides.append({f"{i} {name}": column for i, each in enumerate(bare) for name, column in each.items()})

    def mean_value(columns: dict[str, NDArray[Any]]) -> float:
        seeds: dict[str, dict[str, NDArray[Any]]] = {}
        for key, column in columns.items():
            number, _, name = key.partition(" ")
            seeds.setdefault(number, {})[name] = column
        return float(np.mean([value(each) for each in seeds.values()]))

    p, ci95 = bootstrap_test(mean_value, sides[0], sides[1], clusters, others)
    drawn = "items" if clusters is None else "test speakers"
    reason = "" if p is not None else "the metric is undefined in too many draws, or never varies"
    method = f"paired bootstrap over {drawn}, {BOOTSTRAP_DRAWS} draws, Student's t"
    return Comparison(**common, ci95=ci95, p=p, method=method, reason=reason)


def _cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    if clusters is None:
        return np.asarray(values, dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters]
    return np.asarray(np.bincount(index, weights=values, minlength=len(numbers)), dtype=np.float64)


def _aligned(task: str, sides: Sequence[Items]) -> list[dict[str, Any]]:
    """The columns of every side with their rows in one order.

    Raises:
        RequestError: naming how many items differ.
    """
    reference = {name: i for i, name in enumerate(sides[0]["id"])}
    aligned = []
    for each in sides:
        places = {name: i for i, name in enumerate(each["id"])}
        if len(places) != len(each["id"]):
            raise RequestError(f"{task}: {len(each['id']) - len(places)} items have an id that another has, too")
        if places.keys() != reference.keys():
            missing = len(reference.keys() ^ places.keys())
            raise RequestError(
                f"{task}: the two were not scored on the same items ({missing} differ). Fix: compare runs on the same test data."
            )
        order = [places[name] for name in reference]
        aligned.append({name: [column[i] for i in order] for name, column in each.items()})
    return aligned


def _clusters(items: Items) -> tuple[Sequence[Hashable] | None, Sequence[Hashable] | None]:
    first: Any = items.get("cluster_a", items.get("cluster"))
    second: Any = items.get("cluster_b")
    return (first, second) if first is not None and any(first) else (None, None)  # nobody known: items stand alone


def _bare(items: Items) -> dict[str, Any]:
    return {name: column for name, column in items.items() if name not in ("id", "cluster", "cluster_a", "cluster_b")}


def _effect(metric: str, a: float, b: float) -> dict[str, float]:
    """Cohen's h of two accuracies (Cohen 1988, chapter 6), or the relative change of an error rate."""
    if metric == "accuracy":
        first, second = (2 * math.asin(math.sqrt(min(max(value / 100, 0.0), 1.0))) for value in (a, b))
        return {"cohens_h": second - first}
    return {"relative_change_percent": 100 * (b - a) / a} if a else {}


_TEXTS = ("id", "cluster", "cluster_a", "cluster_b", "reference", "hypothesis", "hits", "false_alarms", "scores")


def numbers(columns: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Item columns as they were before they became text: columns of which every entry is a number are numbers.

    >>> numbers({"id": ["a", "b"], "correct": ["1", "0"], "score": ["0.5", "1e-3"]})
    {'id': ['a', 'b'], 'correct': [1, 0], 'score': [0.5, 0.001]}
    """
    return {name: list(column) if name in _TEXTS else _parsed(column) for name, column in columns.items()}


def _parsed(column: Sequence[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(entry) for entry in column]
        except ValueError:
            continue
    return list(column)


def load_items(records: Iterable[RunRecord], folders: Iterable[Path | str]) -> list[dict[str, list[Any]]]:
    """The item columns of each seed, its folds joined.

    Args:
        records: of one system, the chosen rate's.
        folders: where they and their items stand.

    Raises:
        RequestError: for a record whose items are not there.
    """
    roots = [Path(folder) for folder in folders]
    by_seed: dict[int, dict[str, list[Any]]] = {}
    for record in sorted(records, key=lambda each: (each.probe.seed, each.task.fold or "")):
        path = next((found for root in roots for found in sorted(root.rglob(f"{record.run_id}.json"))), None)
        if path is None or record.items is None:
            raise RequestError(
                f"record {record.run_id} has no per-item outcomes beside it. Fix: run it again, or copy the .items.tsv.gz"
            )
        columns = numbers(read_items(path))
        joined = by_seed.setdefault(record.probe.seed, {name: [] for name in columns})
        for name, column in columns.items():
            joined.setdefault(name, []).extend(column)
    return list(by_seed.values())


def pairs(records: Sequence[RunRecord], task: str, a: str, b: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The leaderboard rows of two upstreams that may be compared: all they were scored with is the same.

    Args:
        records: any mix.
        task: its name.
        a: an upstream's name, or name@revision where it has several; with `:shuffle` after it, its probes on shuffled labels.
        b: the other.

    Raises:
        RequestError: when an upstream has no result, several revisions, or none comparable with the other's.
    """
    table, _, _ = aggregate(record for record in records if record.task.name == task)
    sides = []
    for side in (a, b):
        name, control = split_control(side)
        rows = [row for row in table.to_dict("records") if _is(row, name) and (row["control"] or None) == control]
        found = sorted({str(row["revision"]) for row in rows})
        if not rows:
            known = ", ".join(sorted(set(table["upstream"]))) or "none"
            kind = f" under the control {control!r}" if control else ""
            raise RequestError(f"{task}: no result of {name}{kind}. Known: {known}.")
        if len(found) > 1:
            raise RequestError(
                f"{task}: {name} has several revisions. Fix: one of {', '.join(f'{name}@{each}' for each in found)}."
            )
        sides.append(rows)
    same = (
        "task_version",
        "dataset",
        "data",
        "protocol",
        "budget",
        "head",
        "layer_norm",
        "metric",
        "steps",
        "batch",
        "accumulate",
    )
    matched = [
        (first, second)
        for first in sides[0]
        for second in sides[1]
        if all(first[name] == second[name] for name in same) and first["layer_choice"] == second["layer_choice"]
        and (first["layer_choice"] == "all" or first["layer"] == second["layer"])
    ]  # fmt: skip
    if not matched:
        raise RequestError(
            f"{task}: {a} and {b} have no results under the same protocol, budget, data and head. Fix: run them alike."
        )
    return matched  # type: ignore[return-value]


def split_control(side: str) -> tuple[str, str | None]:
    """An upstream as `compare` names it, and the control whose probes are meant.

    >>> split_control("fbank:shuffle"), split_control("hf:org/name")
    (('fbank', 'shuffle'), ('hf:org/name', None))
    """
    name, _, control = side.rpartition(":")
    return (name, control) if name and control in CONTROLS else (side, None)


def _is(row: Mapping[Any, Any], name: str) -> bool:
    upstream, _, revision = name.partition("@") if not name.startswith("hf:") else (name, "", "")
    return bool(
        row["upstream"] == name
        or (row["upstream"] == upstream and revision and str(row["revision"]).startswith(revision))
    )
