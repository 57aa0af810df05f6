"""The leaderboard: records in, one row a comparable result out, by the aggregation rule in README.md of this folder."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.errors import CheckError
from superb_probe.results.overlap import worst_overlap
from superb_probe.results.record import RunRecord

# Records that differ in any of these never share a row.
_KEY_COLUMNS = (
    "task",
    "task_version",
    "dataset",
    "protocol",
    "budget",
    "control",
    "head",
    "layer",
    "layer_norm",
    "metric",
    "unit",
    "better",
    "upstream",
    "revision",
    "weights",
    "feature_dtype",
    "waveform_norm",
    "layer_convention",
    "upstream_options",
    "head_options",
    "steps",
    "batch",
    "accumulate",
    "optimizer",
    "imported_from",
)
COLUMNS = (
    "task",
    "upstream",
    "weights",
    "dataset",
    "protocol",
    "budget",
    "control",
    "metric",
    "unit",
    "better",
    "score",
    "ci95_low",
    "ci95_high",
    "ci",
    "seeds",
    "lr",
    "edge",
    "lr_tried",
    "dev_score",
    "dev_slope",
    "extra",
    "folds",
    "layer_weights_peak",
    "head",
    "layer",
    "layer_choice",
    "layer_norm",
    "params",
    "macs",
    "times_real_time",
    "lookahead_samples",
    "steps",
    "batch",
    "accumulate",
    "optimizer",
    "head_options",
    "upstream_options",
    "feature_dtype",
    "waveform_norm",
    "layer_convention",
    "revision",
    "task_version",
    "data",
    "imported_from",
    "failed",
    "incomplete",
    "protocol_deviations",
    "trained_on",
    "overlap",
    "warnings",
    "run_ids",
)


def _key(record: RunRecord) -> dict[str, Any]:
    upstream, task, probe = record.upstream, record.task, record.probe
    return {
        "task": task.name,
        "task_version": task.version,
        "dataset": task.dataset,
        "protocol": task.protocol,
        "budget": probe.budget,
        "control": probe.control or "",
        "head": probe.head,
        "layer": "by dev" if untrained(record) else "weighted sum" if probe.layer is None else str(probe.layer),
        "layer_norm": probe.layer_norm,
        "metric": task.metric,
        "unit": task.unit,
        "better": "higher" if task.higher_is_better else "lower",
        "upstream": upstream.name,
        "revision": upstream.revision,
        "weights": "random" if record.random_weights else "trained" if upstream.params else "none",
        "feature_dtype": probe.feature_dtype,
        "waveform_norm": upstream.waveform_norm,
        "layer_convention": upstream.layer_convention,
        "upstream_options": _canonical(upstream.options),
        "head_options": _canonical(probe.head_options),
        "steps": probe.steps,
        "batch": probe.batch,
        "accumulate": probe.accumulate,
        "optimizer": probe.optimizer,
        "imported_from": record.imported_from or "",
    }


def untrained(record: RunRecord) -> bool:
    """Whether the record's task trains no probe (QbE): it has no learning rate, and dev chooses its layer instead."""
    return record.probe.steps == 0 and record.probe.lr == 0


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True) if values else ""


def options_in_words(text: str) -> str:
    """The options in a row's `upstream_options` that somebody asked for, as the command line takes them.

    Digests of weights and files, which stand among them, and the seed of random weights are left out.

    >>> options_in_words('{"causal_front_end": false, "random": 0, "weights": "0768d4fd1a85e5ae"}')
    'causal_front_end=false'
    """
    found = json.loads(text) if text else {}
    return " ".join(f"{name}={json.dumps(value)}" for name, value in found.items() if name not in ("weights", "random"))


def _groups(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Records that may share a row.

    Digests are part of the key, but the folds of one corpus have different ones: folds are put together when each fold name
    stands for one set of digests, and stay apart otherwise.
    """
    alike: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        alike[tuple(_key(record).values())].append(record)
    groups = []
    for members in alike.values():
        digests: dict[str | None, set[str]] = defaultdict(set)
        for record in members:
            digests[record.task.fold].add(_canonical(record.task.data))
        if None not in digests and all(len(found) == 1 for found in digests.values()):
            groups.append(members)
            continue
        apart: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
        for record in members:
            apart[str(record.task.fold), _canonical(record.task.data)].append(record)
        groups += apart.values()
    return groups


def _by_rate_and_seed(
    finished: Sequence[RunRecord], folds: set[str | None]
) -> tuple[dict[float, dict[int, list[RunRecord]]], int]:
    """Records by what dev chooses and seed, where the seed has every fold; and how many such pairs lack some.

    Dev chooses the learning rate; where nothing is trained, the layer.
    """
    cells: dict[float, dict[int, dict[str | None, RunRecord]]] = defaultdict(lambda: defaultdict(dict))
    for record in finished:
        first = cells[_choice(record)][record.probe.seed].setdefault(record.task.fold, record)
        if first is not record:
            raise CheckError(
                f"records {first.run_id} and {record.run_id} have the same settings, rate and seed but another run id. "
                "Fix: keep one of them, or give --runs the folder of one."
            )
    complete: dict[float, dict[int, list[RunRecord]]] = {}
    incomplete = 0
    for lr, seeds in cells.items():
        whole = {seed: list(cell.values()) for seed, cell in sorted(seeds.items()) if set(cell) == folds}
        incomplete += len(seeds) - len(whole)
        if whole:
            complete[lr] = whole
    return complete, incomplete


def _choice(record: RunRecord) -> float:
    return float(record.probe.layer or 0) if untrained(record) else record.probe.lr


def _dev(record: RunRecord) -> float:
    assert record.selection is not None
    return record.selection.value


def _test(record: RunRecord) -> float:
    assert record.score is not None
    return record.score.value


def choose_lr(dev_scores: Mapping[float, Sequence[float]], higher_is_better: bool) -> float:
    """The learning rate with the best mean dev score over seeds; ties go to the smaller rate.

    >>> choose_lr({1e-2: [7.0, 9.0], 1e-3: [8.0, 8.0], 1e-1: [9.0]}, higher_is_better=False)
    0.001
    """
    sign = -1.0 if higher_is_better else 1.0
    return min(dev_scores, key=lambda lr: (sign * statistics.fmean(dev_scores[lr]), lr))


def edge_mark(lr: float, tried: Iterable[float]) -> str:
    """Whether a better rate may lie outside the ones tried.

    >>> edge_mark(1e-3, [1e-2, 1e-3, 1e-4]), edge_mark(1e-4, [1e-3, 1e-4]), edge_mark(0.1, [0.1])
    ('', 'edge', 'one rate')
    """
    rates = set(tried)
    if len(rates) == 1:
        return "one rate"
    return "edge" if lr in (min(rates), max(rates)) else ""


def interval(seed_records: Sequence[Sequence[RunRecord]]) -> tuple[float | None, float | None, str]:
    """A 95 % interval of the mean test score and how it was made: t over seeds if there are 3, else the item bootstrap.

    Args:
        seed_records: for every seed, the record of each fold.

    With several records the bootstrap intervals are averaged, end by end.
    """
    scores = [statistics.fmean(_test(record) for record in records) for records in seed_records]
    if len(scores) >= 3:
        from scipy.stats import t

        mean = statistics.fmean(scores)
        half = float(t.ppf(0.975, len(scores) - 1)) * statistics.stdev(scores) / math.sqrt(len(scores))
        return mean - half, mean + half, f"t over {len(scores)} seeds"
    parts = [record.score for records in seed_records for record in records if record.score is not None]
    ends = [part.ci95 for part in parts if part.ci95 is not None]
    if not ends or len(ends) != len(parts):
        return None, None, "none"
    methods = " / ".join(sorted({part.ci or "unnamed" for part in parts}))
    averaged = f", mean of {len(ends)} intervals" if len(ends) > 1 else ""
    return statistics.fmean(low for low, _ in ends), statistics.fmean(high for _, high in ends), methods + averaged


def _row(members: Sequence[RunRecord]) -> dict[str, Any] | None:
    """One row of the table, or None when no trial of the group finished with all folds."""
    finished = [record for record in members if record.status == "finished"]
    folds = {record.task.fold for record in members}
    complete, incomplete = _by_rate_and_seed(finished, folds)
    if not complete:
        return None
    better = finished[0].task.higher_is_better
    dev = {
        lr: [statistics.fmean(map(_dev, records)) for records in seeds.values()]
        for lr, seeds in sorted(complete.items())
    }
    choice = choose_lr(dev, better)
    chosen = list(complete[choice].values())
    low, high, method = interval(chosen)
    flat = [record for records in chosen for record in records]
    trained = not untrained(finished[0])
    tried = sorted({record.probe.lr for record in members})
    peaks = [weights.index(max(weights)) for weights in (record.layer_weights for record in flat) if weights]
    return {
        **_key(finished[0]),
        **_layer(members, flat[0]),
        "score": statistics.fmean(statistics.fmean(map(_test, records)) for records in chosen),
        "ci95_low": low,
        "ci95_high": high,
        "ci": method,
        "seeds": len(chosen),
        "lr": flat[0].probe.lr,
        "edge": edge_mark(choice, tried) if trained else "",
        "lr_tried": " ".join(f"{rate:g}" for rate in tried),
        "dev_score": statistics.fmean(dev[choice]),
        "dev_slope": dev_slope(flat),
        "extra": _canonical(_extra(chosen)),
        "folds": len(folds),
        "layer_weights_peak": " ".join(str(peak) for peak in sorted(set(peaks))),
        "params": finished[0].upstream.params,
        "macs": _known_mean(record.upstream.macs for record in flat),
        "times_real_time": _known_mean(_speed(record) for record in flat),
        "lookahead_samples": "utterance"
        if finished[0].upstream.lookahead_samples is None
        else str(finished[0].upstream.lookahead_samples),
        "data": " ".join(
            sorted({f"{split}={digest}" for record in flat for split, digest in record.task.data.items()})
        ),
        "failed": len(members) - len(finished),
        "incomplete": incomplete,
        "protocol_deviations": "; ".join(sorted({text for record in flat for text in record.task.protocol_deviations})),
        "trained_on": "; ".join(sorted({name for record in flat for name in record.upstream.trained_on})),
        "overlap": worst_overlap(flat),
        "warnings": "; ".join(sorted({text for record in flat for text in record.warnings})),
        "run_ids": " ".join(sorted(record.run_id for record in flat)),
    }


def _layer(members: Sequence[RunRecord], chosen: RunRecord) -> dict[str, str]:
    """What was read of the encoder: "all" layers, or only some of them, and which it was."""
    if not untrained(chosen):
        return {"layer_choice": "all" if chosen.probe.layer is None else "one"}
    layers = {record.probe.layer for record in members}
    whole = layers >= set(range(chosen.upstream.num_layers))
    return {
        "layer": f"{chosen.probe.layer} (of {len(layers)}, by dev)",
        "layer_choice": "all" if whole else "one",
    }


def dev_slope(records: Sequence[RunRecord]) -> float | None:
    """How fast the dev metric still moved at the end, per 1000 updates: least squares through the last three evaluations.

    The mean over the records; None when one of them kept no curve. Far from zero in the better direction: trained too short.
    """
    slopes = []
    for record in records:
        tail = record.selection.curve[-3:] if record.selection else ()
        if len(tail) < 2:
            return None
        slopes.append(1000 * statistics.linear_regression(*zip(*tail, strict=True)).slope)
    return statistics.fmean(slopes)


def _extra(seed_records: Sequence[Sequence[RunRecord]]) -> dict[str, float]:
    """The mean of every further metric, folds inside seeds first; one that a record lacks is left out."""
    found = [[record.score.extra for record in records if record.score] for records in seed_records]
    names = set.intersection(*(set(extra) for extras in found for extra in extras))
    return {
        name: round(statistics.fmean(statistics.fmean(extra[name] for extra in extras) for extras in found), 6)
        for name in names
    }


def _speed(record: RunRecord) -> float | None:
    cost = record.cost
    return cost.audio_s / cost.extract_s if cost.audio_s and cost.extract_s else None


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def leaderboard(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row for each comparable result: the rate chosen on dev, its mean test score over seeds, its interval.

    The rows do not depend on the order of the records. Within a task, dataset, protocol, budget and control the best comes first.

    Raises:
        CheckError: when two records claim the same place.

    >>> leaderboard([]).columns[:2].tolist()
    ['task', 'upstream']
    """
    table, _, conflicts = aggregate(records)
    if conflicts:
        raise CheckError("\n".join(conflicts))
    return table


def dev_by_rate(records: Iterable[RunRecord]) -> list[tuple[dict[str, Any], dict[float, list[float]]]]:
    """The dev scores behind each row: the row, and by learning rate the mean over folds of each complete seed."""
    found = []
    for members in _groups(sorted(records, key=lambda record: record.run_id)):
        row = None if untrained(members[0]) else _row(members)
        if row is not None:
            finished = [record for record in members if record.status == "finished"]
            complete, _ = _by_rate_and_seed(finished, {record.task.fold for record in members})
            scores = {
                lr: [statistics.fmean(map(_dev, cell)) for cell in seeds.values()]
                for lr, seeds in sorted(complete.items())
            }
            found.append((row, scores))
    return found


def aggregate(records: Iterable[RunRecord]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The table, a line for each group without a row, and a line for each pair of records that claim the same place."""
    rows, unfinished, conflicts = [], [], []
    for members in _groups(sorted(records, key=lambda record: record.run_id)):
        name = f"{members[0].task.name} / {members[0].upstream.name} on {members[0].task.dataset}"
        try:
            row = _row(members)
        except CheckError as error:
            conflicts.append(f"{name}: {error}")
            continue
        if row is not None:
            rows.append(row)
            continue
        failed = sum(record.status == "failed" for record in members)
        unfinished.append(f"{name}: no row ({f'{failed} failed' if failed else 'no seed has all folds'})")

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        block = tuple(row[name] for name in _KEY_COLUMNS[: _KEY_COLUMNS.index("upstream")])
        sign = -1.0 if row["better"] == "higher" else 1.0
        return (*block, sign * row["score"], row["upstream"], row["revision"], row["run_ids"])

    table = pd.DataFrame([[row[name] for name in COLUMNS] for row in sorted(rows, key=order)], columns=list(COLUMNS))
    return table, unfinished, conflicts


def write_csv(table: pd.DataFrame, path: Path | str) -> None:
    """Write the table; scores with six decimals, so that the same records give the same bytes everywhere."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rounded = table.copy()
    for name in ("score", "ci95_low", "ci95_high", "dev_score", "dev_slope"):
        rounded[name] = [None if value is None or pd.isna(value) else f"{value:.6f}" for value in rounded[name]]
    for name in ("macs", "times_real_time"):
        rounded[name] = [None if value is None or pd.isna(value) else f"{value:.6g}" for value in rounded[name]]
    rounded["lr"] = [f"{value:g}" for value in rounded["lr"]]
    rounded.to_csv(path, index=False, lineterminator="\n")
