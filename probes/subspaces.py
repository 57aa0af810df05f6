"""Where a layer keeps speakers and where phones: the subspaces their means span, the angles between, and what is left without either.

The subspaces are those of Liu et al. (arXiv:2305.12464): principal components of the means of speakers and of phones. A speaker's
mean is taken over its means of each phone, so that what it happens to say does not count, and a phone's over speakers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from superb_probe.errors import RequestError

Matrix = NDArray[np.float64]


def class_sums(rows: NDArray[Any], labels: NDArray[np.int64], classes: int) -> Matrix:
    """(C, D) the sum of the rows (N, D) of every class, in float64: as `np.add.at`, many times as fast.

    >>> class_sums(np.array([[1.0], [2.0], [4.0]]), np.array([1, 0, 1]), 3).tolist()
    [[2.0], [5.0], [0.0]]
    """
    members = scipy.sparse.csr_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))), (classes, len(labels)))
    found: Matrix = members @ np.asarray(rows, dtype=np.float64)
    return found


def balanced_means(frames: NDArray[Any], labels: NDArray[np.int64], others: NDArray[np.int64]) -> Matrix:
    """(C, D) the mean of every class over its means with each class of the other kind.

    Args:
        frames: (N, D).
        labels: (N,) classes 0 to C - 1, each there.
        others: (N,) classes of the other kind.

    >>> balanced_means(np.array([[0.0], [2.0], [2.0], [2.0]]), np.array([0, 0, 0, 0]), np.array([0, 1, 1, 1])).tolist()
    [[1.0]]
    """
    pairs, number = np.unique(np.stack([labels, others]), axis=1, return_inverse=True)
    number = number.ravel()
    means = class_sums(frames, number, pairs.shape[1]) / np.bincount(number)[:, None]
    found = class_sums(means, pairs[0], int(labels.max()) + 1)
    counts = np.bincount(pairs[0], minlength=len(found))
    if (counts == 0).any():
        raise RequestError("subspaces: a class has no frame. Fix: number the classes that are there.")
    return found / counts[:, None]


def principal_subspace(means: Matrix, variance: float = 0.95, most: int | None = None) -> Matrix:
    """(D, K) an orthonormal basis of the first principal components of class means.

    Args:
        means: (C, D).
        variance: share of their variance that is kept, as in Liu et al.
        most: largest K; None for any.

    >>> principal_subspace(np.array([[1.0, 0.0], [-1.0, 0.0]])).round().tolist() in ([[1.0], [0.0]], [[-1.0], [0.0]])
    True
    """
    if len(means) < 2:
        raise RequestError(f"subspaces: {len(means)} class; at least two are needed.")
    _, values, rows = np.linalg.svd(means - means.mean(0), full_matrices=False)
    shares = np.cumsum(values**2)
    if shares[-1] <= 0:
        raise RequestError("subspaces: the means of all classes are the same. Fix: data that differ.")
    count = int(np.searchsorted(shares, variance * shares[-1] * (1 - 1e-12)) + 1)
    basis: Matrix = rows[: count if most is None else min(count, most)].T
    return basis


def principal_angles(first: Matrix, second: Matrix) -> Matrix:
    """(min(K, K'),) angles in degrees between two subspaces given by orthonormal bases, the smallest first (Björck and Golub 1973).

    Small angles come from the sine, large ones from the cosine, where each is exact.

    >>> principal_angles(np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])).tolist()
    [90.0]
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    _, cosines, right = np.linalg.svd(first.T @ second)
    cosines = np.clip(cosines, -1.0, 1.0)
    principal = second @ right.T  # the principal vectors of the smaller subspace, in the order of the cosines
    sines = np.clip(np.linalg.norm(principal - first @ (first.T @ principal), axis=0), 0.0, 1.0)
    angles: Matrix = np.degrees(np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines)))
    return np.sort(angles)


def erasing_matrix(frames: NDArray[Any], means: Matrix, most: int, drawn: int | None = None) -> Matrix:
    """(D, D) what erases classes: centred frames times it hold nothing of the class means that a linear map could read.

    The least change of the frames that does so, in their own covariance: LEACE (Belrose et al., arXiv:2306.03819). Projecting
    principal components of the means away would leave what has little variance, which a classifier reads all the same.

    Args:
        frames: (N, D) centred.
        means: (C, D) of the classes.
        most: erase at most so many directions, those along which the means differ most.
        drawn: seed of as many random directions instead: the control.

    >>> frames = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> (frames @ erasing_matrix(frames, np.array([[1.0, 0.0], [-1.0, 0.0]]), 1)).round(6).tolist()
    [[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]]
    """
    x = np.asarray(frames, dtype=np.float64)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    used = values > 1e-9 * values[-1]
    values, vectors = values[used], vectors[:, used]
    whiten = vectors / np.sqrt(values)
    _, sizes, rows = np.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=False)
    count = min(most, int((sizes > 1e-9 * max(sizes[0], 1e-300)).sum()))
    basis = rows[:count].T if drawn is None else random_subspace(len(values), count, drawn)
    matrix: Matrix = np.eye(x.shape[1]) - whiten @ basis @ basis.T @ (vectors * np.sqrt(values)).T
    return matrix


def whitening_matrix(frames: NDArray[Any], labels: NDArray[np.int64], shrinkage: float = 0.01) -> Matrix:
    """(D, D) the inverse square root of the covariance within classes, shrunk toward a multiple of one (WCCN, Hatch et al. 2006).

    >>> whitening_matrix(np.array([[2.0], [-2.0], [7.0], [3.0]]), np.array([0, 0, 1, 1]), 0.0).tolist()
    [[0.5]]
    """
    within = np.asarray(frames, dtype=np.float64)
    counts = np.maximum(np.bincount(labels), 1)
    within = within - (class_sums(within, labels, len(counts)) / counts[:, None])[labels]
    covariance = within.T @ within / len(within)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    values, vectors = np.linalg.eigh(covariance)
    matrix: Matrix = (vectors / np.sqrt(np.maximum(values, 1e-12 * values[-1]))) @ vectors.T
    return matrix


def random_subspace(dim: int, count: int, seed: int) -> Matrix:
    """(D, K) an orthonormal basis of a subspace drawn uniformly: what chance gives.

    >>> random_subspace(4, 2, 0).shape
    (4, 2)
    """
    found, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, count)))
    return found


def variance_inside(means: Matrix, basis: Matrix) -> float:
    """The share of the variance of class means (C, D) that lies in a subspace (D, K).

    >>> variance_inside(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[0.0], [1.0]]))
    0.0
    """
    centred = means - means.mean(0)
    return float(np.square(centred @ basis).sum() / np.square(centred).sum())


class LinearClassifier:
    """A linear discriminant with a shared covariance shrunk toward its diagonal: exact, without steps to tune.

    >>> frames = np.array([[0.0], [0.2], [5.0], [5.2]])
    >>> LinearClassifier(frames, np.array([0, 0, 1, 1])).predict(frames).tolist()
    [0, 0, 1, 1]
    """

    def __init__(self, frames: NDArray[Any], labels: NDArray[np.int64], shrinkage: float = 0.01) -> None:
        """Fit to frames (N, D) of classes 0 to C - 1.

        Args:
            frames: (N, D).
            labels: (N,) classes.
            shrinkage: share of the mean variance in the covariance.
        """
        x = np.asarray(frames, dtype=np.float64)
        counts = np.bincount(labels)
        means = class_sums(x, labels, len(counts)) / np.maximum(counts, 1)[:, None]
        within = x - means[labels]
        covariance = within.T @ within / len(x)
        # a dimension that a subspace's removal emptied must not become infinitely certain
        floor = shrinkage * np.trace(covariance) / len(covariance) + 1e-12
        covariance = (1 - shrinkage) * covariance + floor * np.eye(len(covariance))
        self._weights = np.linalg.solve(covariance, means.T)
        with np.errstate(divide="ignore"):
            self._bias = np.log(counts / counts.sum()) - 0.5 * (means.T * self._weights).sum(0)

    def scores(self, frames: NDArray[Any]) -> Matrix:
        """(N, C) log posteriors, up to a constant of each frame."""
        found: Matrix = np.asarray(frames, dtype=np.float64) @ self._weights + self._bias
        return found

    def predict(self, frames: NDArray[Any]) -> NDArray[np.int64]:
        """(N,) the likeliest class of every frame."""
        found: NDArray[np.int64] = np.argmax(self.scores(frames), axis=1)
        return found
