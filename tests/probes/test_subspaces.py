"""Subspaces: angles against scipy, means by hand, and what removal takes away."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from superb_probe.errors import RequestError
from superb_probe.probes.subspaces import (
    LinearClassifier,
    balanced_means,
    erasing_matrix,
    principal_angles,
    principal_subspace,
    random_subspace,
    variance_inside,
    whitening_matrix,
)

Ints = NDArray[np.int64]


def speech(phone_axis: int = 1, count: int = 2000) -> tuple[NDArray[np.float64], Ints, Ints]:
    """Frames whose speakers lie on axis 0 and whose phones on another, in ten dimensions."""
    generator = np.random.default_rng(0)
    speakers, phones = generator.integers(0, 5, count), generator.integers(0, 6, count)
    frames = 0.3 * generator.standard_normal((count, 10))
    frames[:, 0] += 2.0 * speakers
    frames[:, phone_axis] += 3.0 * phones
    return frames, speakers, phones


@pytest.mark.parametrize(("first", "second"), [(3, 3), (5, 2), (2, 5), (1, 1)])
def test_angles_are_scipys(first: int, second: int) -> None:
    a, b = random_subspace(12, first, 1), random_subspace(12, second, 2)
    assert principal_angles(a, b) == pytest.approx(np.sort(np.degrees(subspace_angles(a, b))), abs=1e-9)


def test_angles_by_hand_even_the_smallest() -> None:
    def line(degrees: float) -> NDArray[np.float64]:
        return np.array([[np.cos(np.radians(degrees))], [np.sin(np.radians(degrees))], [0.0]])

    for degrees in (1e-7, 30.0, 45.0, 89.9999999, 90.0):
        assert principal_angles(line(0), line(degrees))[0] == pytest.approx(degrees, rel=1e-6)
    plane = np.eye(3)[:, :2]
    other = np.array([[1.0, 0.0], [0.0, np.cos(np.radians(20))], [0.0, np.sin(np.radians(20))]])
    assert principal_angles(plane, other) == pytest.approx([0.0, 20.0], abs=1e-6)


def test_means_are_balanced_over_the_other_kind() -> None:
    # speaker 0 says phone 0 nine times and phone 1 once; its mean must not lean to phone 0
    frames = np.concatenate([np.zeros((9, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.ones((9, 1))])
    speakers, phones = np.repeat([0, 1], 10), np.array([0] * 9 + [1] + [0] + [1] * 9)
    assert balanced_means(frames, speakers, phones).ravel().tolist() == [0.5, 0.5]
    assert frames[speakers == 0].mean() == 0.1  # what a plain mean would say
    with pytest.raises(RequestError, match="no frame"):
        balanced_means(frames, speakers * 2, phones)


def test_orthogonal_speakers_and_phones_are_found_so() -> None:
    frames, speakers, phones = speech()
    of_speakers = principal_subspace(balanced_means(frames, speakers, phones))
    of_phones = principal_subspace(balanced_means(frames, phones, speakers))
    assert of_speakers.shape == (10, 1) and abs(of_speakers[0, 0]) > 0.99
    assert principal_angles(of_speakers, of_phones)[0] > 85
    shared, speakers, phones = speech(phone_axis=0)
    angle = principal_angles(
        principal_subspace(balanced_means(shared, speakers, phones)),
        principal_subspace(balanced_means(shared, phones, speakers)),
    )[0]
    assert angle < 5


def accuracy(values: NDArray[np.float64], labels: Ints) -> float:
    return float((LinearClassifier(values[:1000], labels[:1000]).predict(values[1000:]) == labels[1000:]).mean())


def test_erasure_takes_its_own_and_leaves_the_other() -> None:
    frames, speakers, phones = speech()
    frames -= frames.mean(0)
    means = balanced_means(frames, speakers, phones)
    left = frames @ erasing_matrix(frames, means, 4)
    assert accuracy(frames, speakers) > 0.95 and accuracy(left, speakers) < 0.35
    assert accuracy(left, phones) > 0.95
    assert accuracy(frames @ erasing_matrix(frames, means, 1, drawn=1), speakers) > 0.8  # the control erases neither
    # in a layer where both lie on one axis, erasing one takes the other along
    shared, speakers, phones = speech(phone_axis=0)
    shared -= shared.mean(0)
    without = shared @ erasing_matrix(shared, balanced_means(shared, speakers, phones), 4)
    assert accuracy(without, phones) < accuracy(shared, phones) - 0.2


def test_erasure_is_leace() -> None:
    """No linear map of what is left correlates with the classes, and no other such map changes the frames less."""
    generator = np.random.default_rng(0)
    frames, speakers, _ = speech()
    frames = (frames - frames.mean(0)) @ generator.standard_normal((10, 10))
    plain = np.stack([frames[speakers == kind].mean(0) for kind in range(5)])
    left = frames @ erasing_matrix(frames, plain, 9)
    ones = np.eye(5)[speakers] - np.eye(5)[speakers].mean(0)
    assert np.abs(left.T @ ones / len(frames)).max() < 1e-9
    basis = principal_subspace(plain, 1.0)
    orthogonal = frames - frames @ basis @ basis.T  # another map that erases them
    assert np.abs(orthogonal.T @ ones / len(frames)).max() < 1e-9
    precision = np.linalg.inv(np.cov(frames.T))
    change = [
        np.einsum("nd,de,ne->n", delta, precision, delta).mean() for delta in (left - frames, orthogonal - frames)
    ]
    assert change[0] < change[1]


def test_little_variance_is_erased_too() -> None:
    frames, speakers, phones = speech()
    frames[:, 2] = 0.01 * (2 * speakers % 5) + 0.0005 * np.random.default_rng(1).standard_normal(
        len(frames)
    )  # faint, and another order
    frames -= frames.mean(0)
    means = balanced_means(frames, speakers, phones)
    basis = principal_subspace(means)
    projected = frames - frames @ basis @ basis.T
    scaled = np.array([1, 1, 1000, 1, 1, 1, 1, 1, 1, 1])  # shrinkage of the classifier must not hide it
    assert (
        accuracy(projected * scaled, speakers) > 0.9
        and accuracy(frames @ erasing_matrix(frames, means, 9) * scaled, speakers) < 0.35
    )


def test_whitened_classes_are_round() -> None:
    frames, speakers, _ = speech()
    white = frames @ whitening_matrix(frames, speakers, 0.0)
    within = white - np.stack([white[speakers == kind].mean(0) for kind in range(5)])[speakers]
    assert np.abs(within.T @ within / len(within) - np.eye(10)).max() < 1e-9
    means = np.stack([frames[speakers == kind].mean(0) for kind in range(5)])
    assert variance_inside(means, principal_subspace(means)) > 0.95


def test_classifier_is_a_linear_discriminant() -> None:
    frames, _, phones = speech()
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(frames, phones)
    ours = LinearClassifier(frames, phones, shrinkage=0.0)
    probabilities = np.exp(ours.scores(frames) - ours.scores(frames).max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert probabilities == pytest.approx(theirs.predict_proba(frames), abs=1e-6)


def test_subspaces_hold_the_variance_asked_for() -> None:
    means = np.diag([3.0, 2.0, 1.0, 0.1])
    for variance in (0.5, 0.9, 0.99):
        basis = principal_subspace(means, variance)
        assert variance_inside(means, basis) >= variance
        assert basis.shape[1] == 1 or variance_inside(means, basis[:, :-1]) < variance
    assert principal_subspace(means, 0.99, most=2).shape == (4, 2)
    with pytest.raises(RequestError, match="two are needed"):
        principal_subspace(means[:1])
    with pytest.raises(RequestError, match="the same"):
        principal_subspace(np.ones((3, 2)))
