"""Canonical correlation of a layer with phones, speakers or any embedding: fitted on some data, measured on others.

Plain CCA (Hotelling 1936), SVCCA (Raghu et al., arXiv:1706.05806: principal components of 99 % of the variance first) and
projection-weighted CCA (Morcos et al., arXiv:1806.05759), as Pasad et al. (arXiv:2107.04734) turn them on speech encoders.
Correlations are those of held-out pairs under directions found without them, so overfitting lowers a value instead of raising it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from superb_probe.errors import RequestError
from superb_probe.probes.subspaces import class_sums

FLAVOURS = ("plain", "svcca", "pwcca")
RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # times the mean variance of a dimension
SVCCA_VARIANCE = 0.99
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Directions:
    """What a fit found: pairs of directions, the most correlated first.

    Attributes:
        x_mean: (D,).
        y_mean: (E,).
        x: (D, C) weights of the canonical variates.
        y: (E, C).
        correlations: (C,) on the data of the fit.
        weights: (C,) how much of x each variate accounts for (Morcos et al., equation 3 ff.); they sum to 1.
    """

    x_mean: Matrix
    y_mean: Matrix
    x: Matrix
    y: Matrix
    correlations: Matrix
    weights: Matrix


@dataclass(frozen=True, slots=True)
class Moments:
    """Means and covariances of pairs, with the eigenvectors of each side: what fits of all ridges share.

    Attributes:
        means: of x (D,) and y (E,).
        values: eigenvalues of the two covariances, none of them zero.
        vectors: (D, R) and (E, Q) their eigenvectors.
        cross: (R, Q) covariance of the two sides in these bases.
    """

    means: tuple[Matrix, Matrix]
    values: tuple[Matrix, Matrix]
    vectors: tuple[Matrix, Matrix]
    cross: Matrix


def moments(x: Matrix, y: Matrix, keep: float = 1.0) -> Moments:
    """The moments of pairs of rows.

    Args:
        x: (N, D).
        y: (N, E).
        keep: share of each side's variance whose principal components are kept; 1 for all that is not numerically zero.

    Raises:
        RequestError: for fewer than three pairs, rows that do not pair, or a side without variance.
    """
    if len(x) != len(y) or len(x) < 3:
        raise RequestError(f"CCA: {len(x)} and {len(y)} rows; at least three pairs are needed. Fix: more speech.")
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    means, centred = (x.mean(0), y.mean(0)), (x - x.mean(0), y - y.mean(0))
    values, vectors = [], []
    for name, side in zip(("x", "y"), centred, strict=True):
        found, basis = np.linalg.eigh(side.T @ side / len(side))
        found, basis = found[::-1], basis[:, ::-1]
        if found[0] <= 0:
            raise RequestError(f"CCA: the rows of {name} are all the same. Fix: data that differ.")
        used = found > 1e-10 * found[0]
        if keep < 1:
            used &= np.cumsum(found) - found < keep * found.sum()
        values.append(found[used])
        vectors.append(basis[:, used])
    cross = vectors[0].T @ (centred[0].T @ centred[1] / len(x)) @ vectors[1]
    return Moments(means, (values[0], values[1]), (vectors[0], vectors[1]), cross)


def directions(found: Moments, ridge: float = 0.0) -> Directions:
    """The canonical directions with `ridge` times the mean variance added to every variance of each side."""
    scales = []
    for values in found.values:
        scales.append(1.0 / np.sqrt(values + ridge * values.mean()))
    left, correlations, right = np.linalg.svd(scales[0][:, None] * found.cross * scales[1], full_matrices=False)
    x_in_basis = scales[0][:, None] * left
    # <h_i, x_j> summed over j in the original coordinates, up to N: covariance of variate i with every dimension of x
    covariances = found.vectors[0] @ (found.values[0][:, None] * x_in_basis)
    norms = np.sqrt((found.values[0][:, None] * x_in_basis**2).sum(0))
    weights = np.abs(covariances / norms).sum(0)
    return Directions(
        found.means[0], found.means[1], found.vectors[0] @ x_in_basis, found.vectors[1] @ (scales[1][:, None] * right.T),
        correlations, weights / weights.sum(),
    )  # fmt: skip


def held_out_correlations(fit: Directions, x: Matrix, y: Matrix) -> Matrix:
    """(C,) correlations of the canonical variates on pairs that the fit has not seen; 0 where a variate is constant."""
    a, b = (x - fit.x_mean) @ fit.x, (y - fit.y_mean) @ fit.y
    a, b = a - a.mean(0), b - b.mean(0)
    product = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(product > 1e-12, (a * b).sum(0) / np.maximum(product, 1e-12), 0.0)


@dataclass(frozen=True, slots=True)
class Similarity:
    """How much a layer and something else have in common.

    Attributes:
        value: mean held-out correlation over components, for "pwcca" weighted; the mean over folds.
        low: end of the 95 % interval from resampling groups; None for a single group in a fold.
        high: the other end.
        num_components: of the last fold.
        ridges: chosen in each fold on its own dev part.
    """

    value: float
    low: float | None
    high: float | None
    num_components: int
    ridges: tuple[float, ...]


def similarities(
    x: Matrix,
    y: Matrix,
    groups: Sequence[str],
    flavours: Sequence[str] = FLAVOURS,
    *,
    num_folds: int = 5,
    ridges: Sequence[float] = RIDGES,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Similarity]:
    """Held-out similarity of each flavour by cross-fitting; flavours that keep the same variance share their fits.

    Groups (speakers, or utterances) are dealt into folds by the seed. Each fold is held out once; the fold after it chooses the
    ridge; directions come from the rest.

    Args:
        x: (N, D) a layer's vectors.
        y: (N, E) what they are compared with.
        groups: (N,) whose pairs never stand on two sides of a split.
        flavours: "plain", "svcca" or "pwcca".
        num_folds: at least three.
        ridges: of which one is chosen.
        draws: of the interval's bootstrap.
        seed: of folds and draws.

    Raises:
        RequestError: for another flavour, or fewer groups than folds.
    """
    unknown = sorted(set(flavours) - set(FLAVOURS))
    if unknown:
        raise RequestError(f"unknown flavour of CCA {unknown[0]!r}. Fix: one of {', '.join(FLAVOURS)}.")
    fold = fold_numbers(groups, num_folds, seed)
    names = np.asarray(groups)
    parts: dict[str, list[_Held]] = {flavour: [] for flavour in flavours}
    draw = {flavour: np.random.default_rng([seed, 2]) for flavour in flavours}
    for held in range(num_folds):
        dev, test = fold == (held + 1) % num_folds, fold == held
        shared: dict[float, tuple[list[Directions], list[Matrix]]] = {}
        for flavour in flavours:
            keep = SVCCA_VARIANCE if flavour == "svcca" else 1.0
            if keep not in shared:
                common = moments(x[~dev & ~test], y[~dev & ~test], keep)
                made = [directions(common, ridge) for ridge in ridges]
                shared[keep] = made, [held_out_correlations(fit, x[dev], y[dev]) for fit in made]
            fits, on_dev = shared[keep]
            best = int(np.argmax([_mean(each, fit, flavour) for each, fit in zip(on_dev, fits, strict=True)]))
            value = _mean(held_out_correlations(fits[best], x[test], y[test]), fits[best], flavour)
            drawn = _resampled(fits[best], x[test], y[test], names[test], flavour, draws, draw[flavour])
            parts[flavour].append(_Held(value, drawn, float(ridges[best]), len(fits[best].correlations)))
    return {flavour: _over_folds(found) for flavour, found in parts.items()}


class _Held(NamedTuple):
    """A fold's value, its resampled values, the ridge chosen for it and its components."""

    value: float
    drawn: Matrix | None
    ridge: float
    components: int


def _over_folds(folds: Sequence[_Held]) -> Similarity:
    low_high: tuple[float | None, float | None] = (None, None)
    drawn = [each.drawn for each in folds if each.drawn is not None]
    if len(drawn) == len(folds):
        low, high = np.quantile(np.mean(np.array(drawn, dtype=np.float64), axis=0), [0.025, 0.975])
        low_high = float(low), float(high)
    value = float(np.mean([each.value for each in folds]))
    return Similarity(value, *low_high, folds[-1].components, tuple(each.ridge for each in folds))


def fold_numbers(groups: Sequence[str], num_folds: int, seed: int) -> NDArray[np.int64]:
    """(N,) the fold of each row: groups dealt out in an order drawn by the seed.

    >>> fold_numbers(["a", "a", "b", "c"], 3, 0).tolist()[:2] in ([0, 0], [1, 1], [2, 2])
    True
    """
    names = sorted(set(groups))
    if num_folds < 3 or len(names) < num_folds:
        raise RequestError(
            f"CCA: {len(names)} groups for {num_folds} folds. Fix: at least three folds, and a group in each."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    number = {names[at]: place % num_folds for place, at in enumerate(order)}
    return np.array([number[name] for name in groups], dtype=np.int64)


def _mean(correlations: Matrix, fit: Directions, flavour: str) -> float:
    return float((correlations * fit.weights).sum() if flavour == "pwcca" else correlations.mean())


def _resampled(
    fit: Directions,
    x: Matrix,
    y: Matrix,
    groups: NDArray[np.str_],
    flavour: str,
    draws: int,
    generator: np.random.Generator,
) -> Matrix | None:
    """(draws,) values with whole groups drawn anew, from sums over each group; None for a single group."""
    names, number = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    a, b = (x - fit.x_mean) @ fit.x, (y - fit.y_mean) @ fit.y
    columns = np.concatenate([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    sums = class_sums(columns, number, len(names)).reshape(len(names), 6, -1).transpose(1, 0, 2)
    times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    count, sum_a, sum_b, sum_aa, sum_bb, sum_ab = np.einsum("dg,kgc->kdc", times, sums)
    covariance = sum_ab - sum_a * sum_b / count
    product = np.sqrt(np.maximum(sum_aa - sum_a**2 / count, 0) * np.maximum(sum_bb - sum_b**2 / count, 0))
    correlations = np.where(product > 1e-12, covariance / np.maximum(product, 1e-12), 0.0)
    found: Matrix = correlations @ fit.weights if flavour == "pwcca" else correlations.mean(1)
    return found


def one_hot(labels: Sequence[str]) -> Matrix:
    """(N, C) a column a class, in sorted order.

    >>> one_hot(["b", "a"]).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    classes = {name: at for at, name in enumerate(sorted(set(labels)))}
    table = np.zeros((len(labels), len(classes)))
    table[np.arange(len(labels)), [classes[name] for name in labels]] = 1.0
    return table
