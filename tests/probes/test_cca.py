"""CCA: by hand, by scikit-learn and by numpy's plain formulas; held-out values and their floors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import eigh, sqrtm
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA

from superb_probe.errors import RequestError
from superb_probe.probes.cca import (
    FLAVOURS,
    Similarity,
    directions,
    fold_numbers,
    held_out_correlations,
    moments,
    one_hot,
    similarities,
)

Matrix = NDArray[np.float64]


def similarity(x: Matrix, y: Matrix, groups: list[str], flavour: str, **options: Any) -> Similarity:
    """One flavour alone."""
    return similarities(x, y, groups, (flavour,), **options)[flavour]


def pairs(count: int = 400, seed: int = 0, noise: float = 0.5) -> tuple[Matrix, Matrix, list[str]]:
    """Two sides that share two of their dimensions, and groups of ten."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((count, 2))
    x = np.hstack([shared + noise * generator.standard_normal((count, 2)), generator.standard_normal((count, 4))])
    y = np.hstack([shared + noise * generator.standard_normal((count, 2)), generator.standard_normal((count, 2))])
    return (
        x @ generator.standard_normal((6, 6)),
        y @ generator.standard_normal((4, 4)),
        [f"g{i // 10}" for i in range(count)],
    )


def test_against_scikit_learn_and_a_second_formula() -> None:
    x, y, _ = pairs()
    fit = directions(moments(x, y))
    model = CCA(n_components=4, max_iter=5000, tol=1e-10).fit(x, y)
    a, b = model.transform(x, y)
    theirs = [float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(4)]
    assert fit.correlations == pytest.approx(theirs, abs=1e-4)
    cx, cy = x - x.mean(0), y - y.mean(0)
    whitened = np.linalg.inv(sqrtm(cx.T @ cx)) @ (cx.T @ cy) @ np.linalg.inv(sqrtm(cy.T @ cy))
    assert fit.correlations == pytest.approx(np.linalg.svd(np.real(whitened), compute_uv=False), abs=1e-8)


def test_held_out_correlations_are_scikit_learns() -> None:
    x, y, _ = pairs()
    fit = directions(moments(x[:250], y[:250]))
    model = CCA(n_components=4, max_iter=5000, tol=1e-10).fit(x[:250], y[:250])
    a, b = model.transform(x[250:], y[250:])
    theirs = [float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(4)]
    assert held_out_correlations(fit, x[250:], y[250:]) == pytest.approx(theirs, abs=1e-3)
    assert not np.allclose(theirs, fit.correlations, atol=0.02)  # values of the fit itself would show


def plain_directions(x: Matrix, y: Matrix, ridge: float) -> tuple[Matrix, Matrix, Matrix]:
    """Regularised CCA as one generalised eigenproblem (Hardoon et al. 2004), and Morcos' weights from their definition."""
    size, spread = min(x.shape[1], y.shape[1]), [np.cov(side.T, bias=True) for side in (x, y)]
    joint = np.cov(x.T, y.T, bias=True)
    dim = x.shape[1]
    crossed, alone = joint.copy(), np.zeros_like(joint)
    crossed[:dim, :dim] = 0.0
    crossed[dim:, dim:] = 0.0
    alone[:dim, :dim] = spread[0] + ridge * np.trace(spread[0]) / dim * np.eye(dim)
    alone[dim:, dim:] = spread[1] + ridge * np.trace(spread[1]) / y.shape[1] * np.eye(y.shape[1])
    _, found = eigh(crossed, alone)
    found = found[:, ::-1][:, :size]
    centred = x - x.mean(0)
    variates = centred @ found[:dim]
    weights = np.abs((variates / np.linalg.norm(variates, axis=0)).T @ centred).sum(1)
    return found[:dim], found[dim:], weights / weights.sum()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_similarity_against_a_plain_writing(flavour: str) -> None:
    """Folds, the choice of the ridge, SVCCA's components and the weights, each written again with scikit-learn and scipy."""
    x, y, groups = pairs(300, noise=1.0)
    x = np.hstack([x, 1e-3 * np.random.default_rng(3).standard_normal((300, 2))])
    ridges = (1e-4, 1e-2, 1.0)
    fold = fold_numbers(groups, 4, 5)
    values, chosen = [], []
    for held in range(4):
        dev, test = fold == (held + 1) % 4, fold == held
        train = ~(dev | test)
        sides = [x, y]
        if flavour == "svcca":
            sides = [PCA(n_components=0.99, svd_solver="full").fit(side[train]).transform(side) for side in (x, y)]
        scores = []
        for ridge in ridges:
            a, b, weights = plain_directions(sides[0][train], sides[1][train], ridge)
            if flavour != "pwcca":
                weights = np.full(a.shape[1], 1 / a.shape[1])
            scores.append(
                [
                    sum(
                        weights[i] * np.corrcoef(sides[0][part] @ a[:, i], sides[1][part] @ b[:, i])[0, 1]
                        for i in range(a.shape[1])
                    )
                    for part in (dev, test)
                ]
            )
        best = int(np.argmax([score[0] for score in scores]))
        values.append(scores[best][1])
        chosen.append(ridges[best])
    found = similarity(x, y, groups, flavour, num_folds=4, ridges=ridges, seed=5, draws=20)
    assert found.ridges == tuple(chosen) and len(set(chosen)) > 1
    assert found.value == pytest.approx(np.mean(values), abs=1e-8)


def test_on_its_own_data_held_out_is_the_fit() -> None:
    x, y, _ = pairs()
    fit = directions(moments(x, y))
    assert held_out_correlations(fit, x, y) == pytest.approx(fit.correlations, abs=1e-9)


def test_invariant_to_linear_maps_and_one_for_the_same_thing() -> None:
    x, y, groups = pairs()
    generator = np.random.default_rng(9)
    mapped = x @ generator.standard_normal((6, 6)) + 3.0
    assert directions(moments(mapped, y)).correlations == pytest.approx(directions(moments(x, y)).correlations)
    assert similarity(x, mapped, groups, "plain", ridges=(0.0,)).value == pytest.approx(1.0)


def test_projection_weights_are_morcos_formula() -> None:
    x, y, _ = pairs()
    fit = directions(moments(x, y))
    centred = x - x.mean(0)
    variates = centred @ fit.x
    variates /= np.linalg.norm(variates, axis=0)
    alpha = np.abs(variates.T @ centred).sum(1)
    assert fit.weights == pytest.approx(alpha / alpha.sum(), abs=1e-9)


def test_ridge_shrinks_and_singular_sides_are_reduced() -> None:
    x, y, _ = pairs(40)
    assert directions(moments(x, y), 1.0).correlations.max() < directions(moments(x, y)).correlations.max()
    labels = one_hot([str(i % 3) for i in range(40)])  # three columns that sum to one: rank two
    assert len(directions(moments(x, labels)).correlations) == 2


def test_svcca_keeps_the_variance_asked_for() -> None:
    x, y, _ = pairs()
    x = np.hstack([x * 100, np.random.default_rng(0).standard_normal((400, 3)) * 1e-3])
    kept = moments(x, y, 0.99)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    count = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.99) + 1)
    assert len(kept.values[0]) == count < x.shape[1]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_similarity_is_above_its_shuffled_floor(flavour: str) -> None:
    x, y, groups = pairs()
    real = similarity(x, y, groups, flavour)
    floor = similarity(x, y[np.random.default_rng(1).permutation(len(y))], groups, flavour)
    assert real.low is not None and real.high is not None and floor.high is not None and floor.low is not None
    assert real.low < real.value < real.high and real.low > floor.high
    assert floor.low < 0.05 and abs(floor.value) < 0.1


def test_flavours_that_share_fits_are_those_alone() -> None:
    x, y, groups = pairs(120)
    together = similarities(x, y, groups, draws=20)
    assert together == {flavour: similarity(x, y, groups, flavour, draws=20) for flavour in FLAVOURS}
    assert len({found.value for found in together.values()}) == 3


def test_overfitting_lowers_held_out_values() -> None:
    # 60 pairs of 50 random dimensions: plain CCA finds correlations near one where there are none
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((90, 50)), generator.standard_normal((90, 50))
    assert directions(moments(x[:60], y[:60])).correlations.mean() > 0.8
    assert abs(similarity(x, y, [str(i) for i in range(90)], "plain").value) < 0.15


def test_the_bootstrap_of_sums_is_the_bootstrap_of_rows() -> None:
    from superb_probe.probes import cca

    x, y, groups = pairs(60)
    fit = directions(moments(x[:30], y[:30]))
    names = np.asarray(groups[30:])

    class Fixed:
        def multinomial(self, count: int, shares: Matrix, size: int) -> NDArray[np.int64]:
            return np.array([[2, 0, 1], [1, 1, 1]])

    found = cca._resampled(fit, x[30:], y[30:], names, "plain", 2, Fixed())  # type: ignore[arg-type]
    assert found is not None
    rows = np.concatenate([np.arange(10), np.arange(10), np.arange(20, 30)])
    assert found[0] == pytest.approx(held_out_correlations(fit, x[30:][rows], y[30:][rows]).mean())
    assert found[1] == pytest.approx(held_out_correlations(fit, x[30:], y[30:]).mean())


def test_groups_stay_together() -> None:
    _, _, groups = pairs(200)
    folds = fold_numbers(groups, 5, 3)
    assert all(len({fold for fold, name in zip(folds, groups, strict=True) if name == group}) == 1 for group in groups)
    assert sorted(set(folds.tolist())) == [0, 1, 2, 3, 4]


def test_wrong_requests() -> None:
    x, y, groups = pairs(40)
    with pytest.raises(RequestError, match="flavour"):
        similarity(x, y, groups, "best")
    with pytest.raises(RequestError, match="groups for 5 folds"):
        similarity(x, y, ["a", "b"] * 20, "plain")
    with pytest.raises(RequestError, match="all the same"):
        moments(np.ones((5, 2)), y[:5])
    with pytest.raises(RequestError, match="three pairs"):
        moments(x[:5], y[:4])
