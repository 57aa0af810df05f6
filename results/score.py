"""SUPERB's scores over several tasks: `superb_s` (points between two reference rows) and `superb_r` (ranks in a pool).

A score belongs to its reference set and its tasks, and its name says both: scores of two sets are never one column.

- `site` (superbbenchmark.github.io, Data.js): 1000 (value - FBANK) / (best - FBANK) a metric, averaged inside a task, then
  over tasks.
- `journal4`: a linear form of PR, SID, ER and IC, inferred by least squares from the scores printed in table 3 of
  arXiv:2506.12606.

The points of `journal4` stand in a paper that prints only the scores made with them; what is inferred predicts the scores of
that paper's tables 4 and 5 within 0.1, and is shown as inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from superb_probe.errors import RequestError
from superb_probe.results.reference import load_reference

ReferenceSet = Literal["site", "journal4"]
Values = Mapping[tuple[str, str], float]
SUPERB10 = ("pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf", "er")
PAPER4 = ("pr", "sid", "er", "ic")
_PAPER4_METRICS = (("pr", "per"), ("sid", "accuracy"), ("er", "accuracy"), ("ic", "accuracy"))


@cache
def site_points() -> Mapping[str, Mapping[str, tuple[float, float]]]:
    """By task and metric, the values of zero and of a thousand points.

    >>> site_points()["asv"]
    {'eer': (9.56, 5.11)}
    """
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for task, metric, zero, thousand in load_reference("superb").score["points"]:
        points.setdefault(task, {})[metric] = (zero, thousand)
    return points


def superb_s(values: Values, tasks: Sequence[str] = SUPERB10, reference: ReferenceSet = "site") -> float | None:
    """The score of one upstream over some tasks, in points; None when a metric of them is missing.

    Neither clipped nor rounded: below FBANK it is negative, above the best row of the reference it passes 1000.

    Args:
        values: by (task, metric), in percent (QbE: MTWV x 100).
        tasks: which; "journal4" takes its own four and no others.
        reference: the reference set.

    Raises:
        RequestError: for a task the reference set has no points for.

    >>> row = {row.upstream: row.values for row in load_reference("superb").rows}["HuBERT Base"]
    >>> round(superb_s(row)), round(superb_s(row, ["asv"]))
    (941, 1000)
    """
    if reference == "journal4":
        if set(tasks) != set(PAPER4):
            raise RequestError(
                f"superb_s journal4 is defined over {', '.join(PAPER4)} together, not {', '.join(tasks)}"
            )
        return _journal4(values)
    unknown = sorted(set(tasks) - set(site_points()))
    if unknown or not tasks:
        raise RequestError(
            f"superb_s site has no reference points for {', '.join(unknown) or 'no task at all'}. "
            f"Fix: tasks among {', '.join(site_points())}."
        )
    points = [task_points(task, values) for task in tasks]
    known = [point for point in points if point is not None]
    return sum(known) / len(known) if len(known) == len(points) else None


def task_points(task: str, values: Values) -> float | None:
    """The points of one task, 0 for FBANK and 1000 for the reference's best: the mean over its metrics."""
    ends = site_points()[task]
    if any((task, metric) not in values for metric in ends):
        return None
    shares = [(values[task, metric] - zero) / (best - zero) for metric, (zero, best) in ends.items()]
    return 1000 * sum(shares) / len(shares)


@dataclass(frozen=True, slots=True)
class LinearScore:
    """A score as a linear form of metrics, with how well it fits what it was inferred from."""

    weights: Mapping[tuple[str, str], float]
    constant: float
    rows: int
    largest_error: float

    def __call__(self, values: Values) -> float:
        """The score of some values."""
        return self.constant + sum(weight * values[key] for key, weight in self.weights.items())


@cache
def journal4_fit() -> LinearScore:
    """The paper's four-task score, by least squares over the eight rows of its table 3.

    >>> fit = journal4_fit()
    >>> fit.rows, fit.largest_error < 0.05
    (8, True)
    """
    import numpy as np

    rows = [row for row in load_reference("paper").rows if row.table == 3]
    design = np.array([[row.values[key] for key in _PAPER4_METRICS] + [1.0] for row in rows])
    printed = np.array([row.printed["superb_s"] for row in rows])
    solution = np.linalg.lstsq(design, printed, rcond=None)[0]
    error = float(np.abs(design @ solution - printed).max())
    weights = dict(zip(_PAPER4_METRICS, map(float, solution[:-1]), strict=True))
    return LinearScore(weights, float(solution[-1]), len(rows), error)


def _journal4(values: Values) -> float | None:
    if any(key not in values for key in _PAPER4_METRICS):
        return None
    return journal4_fit()(values)


def superb_r(pool: Sequence[Values], tasks: Sequence[str] = SUPERB10) -> list[float]:
    """SUPERB's rank score of each entry of a pool: entries strictly beaten, averaged over a task's metrics, then over tasks.

    A missing metric beats nobody. The number depends on the pool, so it stands only beside the rows it was made from.

    >>> superb_r([{("asv", "eer"): 5.0}, {("asv", "eer"): 6.0}, {("asv", "eer"): 6.0}], ["asv"])
    [2.0, 0.0, 0.0]
    """
    points = site_points()
    scores = []
    for entry in pool:
        per_task = []
        for task in tasks:
            beaten = []
            for metric, (zero, best) in points[task].items():
                sign = 1.0 if best > zero else -1.0
                mine = entry.get((task, metric))
                others = [other[task, metric] for other in pool if (task, metric) in other]
                beaten.append(0 if mine is None else sum(sign * mine > sign * value for value in others))
            per_task.append(sum(beaten) / len(beaten))
        scores.append(sum(per_task) / len(per_task))
    return scores


def superb_p(values: Values, params: int, tasks: Sequence[str] = SUPERB10) -> float | None:
    """The challenge's score against size (AAAI 2022): points divided by millions of parameters, at least one, when positive.

    >>> superb_p({("asv", "eer"): 5.11}, 2_000_000, ["asv"])
    500.0
    """
    score = superb_s(values, tasks)
    return score if score is None or score <= 0 else score / max(params / 1e6, 1.0)
