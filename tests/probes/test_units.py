"""Units: the k-means of the paper, and measures by hand, by scikit-learn, and by a plain second writing of each."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import homogeneity_score, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from superb_probe.errors import RequestError
from superb_probe.probes.units import (
    BUDGETS,
    KMeansSettings,
    assign_units,
    bitrate,
    count_pairs,
    deduplicated,
    edit_rates,
    entropy,
    fit_clusters,
    quality,
    random_units,
    settings_as_dict,
    speaker_information,
)

Ints = NDArray[np.int64]


def drawn(count: int = 3000, seed: int = 0) -> tuple[Ints, Ints]:
    """Units that know something of the phone."""
    generator = np.random.default_rng(seed)
    phones = generator.integers(0, 7, count)
    units = np.where(
        generator.random(count) < 0.5, phones * 2 + generator.integers(0, 2, count), generator.integers(0, 14, count)
    )
    return units, phones


def test_the_papers_settings() -> None:
    assert BUDGETS["full"] == KMeansSettings(
        n_init=20, batch_size=10_000, max_iter=100, max_no_improvement=100, max_frames=None
    )
    fixed = settings_as_dict(BUDGETS["full"])
    assert fixed["reassignment_ratio"] == 0.0 and fixed["tol"] == 0.0 and fixed["init"] == "k-means++"


def test_clusters_are_found_and_seeds_count() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 4, 400)
    frames = (np.eye(4)[true] * 20 + generator.standard_normal((400, 4))).astype(np.float32)
    centres = fit_clusters(frames, 4, 1)
    units = assign_units(frames, centres, block=37)
    assert all(len(set(units[true == kind])) == 1 for kind in range(4)) and len(set(units)) == 4
    assert np.array_equal(centres, fit_clusters(frames, 4, 1))
    few = KMeansSettings(1, 100, 5, 5, 50)
    assert not np.array_equal(fit_clusters(frames, 4, 1, few), fit_clusters(frames, 4, 2, few))


def test_assignment_is_the_nearest_centre() -> None:
    generator = np.random.default_rng(1)
    frames, centres = (
        generator.standard_normal((200, 5)).astype(np.float32),
        generator.standard_normal((9, 5)).astype(np.float32),
    )
    brute = [int(np.argmin([np.sum((frame - centre) ** 2) for centre in centres])) for frame in frames]
    assert assign_units(frames, centres).tolist() == brute


def test_too_few_or_broken_frames_are_refused() -> None:
    with pytest.raises(RequestError, match="3 frames for 4 clusters"):
        fit_clusters(np.zeros((3, 2), np.float32), 4, 0)
    with pytest.raises(RequestError, match="not finite"):
        fit_clusters(np.full((5, 2), np.nan, np.float32), 2, 0)


def test_quality_by_hand() -> None:
    # unit 0: a a b; unit 1: b b b; unit 2: c
    found = quality(np.array([[2, 1, 0], [0, 3, 0], [0, 0, 1]]))
    assert found.phone_purity == pytest.approx((2 + 3 + 1) / 7)
    assert found.cluster_purity == pytest.approx((2 + 3 + 1) / 7)
    split = quality(np.array([[2, 0], [2, 0], [0, 4]]))  # a phone of two units: pure phones, split clusters
    assert (split.phone_purity, split.cluster_purity, split.pnmi) == (1.0, 0.75, 1.0)


def test_quality_against_scikit_learn_and_a_plain_count() -> None:
    units, phones = drawn()
    found = quality(count_pairs(units, phones, 14, 7))
    nats = mutual_info_score(phones, units)
    shares = np.bincount(phones) / len(phones)
    assert found.pnmi == pytest.approx(nats / -(shares * np.log(shares)).sum(), abs=1e-12)
    by_unit = [Counter(phones[units == unit].tolist()).most_common(1)[0][1] for unit in range(14)]
    by_phone = [Counter(units[phones == phone].tolist()).most_common(1)[0][1] for phone in range(7)]
    assert found.phone_purity == pytest.approx(sum(by_unit) / len(units))
    assert found.cluster_purity == pytest.approx(sum(by_phone) / len(units))
    assert found.phone_purity != pytest.approx(found.cluster_purity)  # a swap of the two would show
    table = contingency_matrix(phones, units)  # phones down, units across
    assert found.phone_purity == pytest.approx(table.max(0).sum() / table.sum())
    assert found.cluster_purity == pytest.approx(table.max(1).sum() / table.sum())
    assert found.pnmi == pytest.approx(homogeneity_score(phones, units), abs=1e-12)


def test_frames_without_a_phone_do_not_count() -> None:
    units, phones = drawn(50)
    phones[::3] = -1
    kept = phones >= 0
    assert np.array_equal(count_pairs(units, phones, 14, 7), count_pairs(units[kept], phones[kept], 14, 7))
    with pytest.raises(RequestError, match="no frame has a phone"):
        quality(np.zeros((2, 2)))


def test_bitrate_by_hand() -> None:
    found = bitrate([np.array([1, 1, 2, 2]), np.array([2, 3])], 2.0)
    assert found.units_per_s == 2.0  # 1 2 and 2 3: equal neighbours of two utterances stay two
    assert found.bits_per_s == pytest.approx(4 * 1.5 / 2)
    assert found.frame_bits_per_s == pytest.approx(6 * entropy(np.array([2, 3, 1]) / 6) / 2)


def test_edit_rates_against_a_plain_table() -> None:
    def distance(a: list[int], b: list[int]) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
        for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
        return int(table[-1, -1])

    generator = np.random.default_rng(3)
    clean = [generator.integers(0, 4, n) for n in (5, 20, 33)]
    changed = [generator.integers(0, 4, n) for n in (7, 18, 33)]
    edits, counts = edit_rates(clean, changed)
    plain = [[unit for unit, _ in itertools.groupby(each.tolist())] for each in (*clean, *changed)]
    assert edits.tolist() == [distance(a, b) for a, b in zip(plain[:3], plain[3:], strict=True)]
    assert counts.tolist() == [len(each) for each in plain[:3]]
    assert edit_rates(clean, clean)[0].tolist() == [0, 0, 0]


def test_random_units_of_the_same_bitrate_lose() -> None:
    generator = np.random.default_rng(5)
    phones = np.repeat(generator.integers(0, 6, 400), 5)
    units = np.where(generator.random(len(phones)) < 0.1, generator.integers(0, 6, len(phones)), phones)
    utterances = np.split(units, 10)
    noise = random_units(utterances, 0)
    assert [len(each) for each in noise] == [len(each) for each in utterances]
    assert np.array_equal(np.bincount(np.concatenate(noise)), np.bincount(units))
    own, other = bitrate(utterances, 40.0), bitrate(noise, 40.0)
    assert (
        own.frame_bits_per_s == pytest.approx(other.frame_bits_per_s)
        and abs(other.bits_per_s / own.bits_per_s - 1) < 0.02
    )
    real, chance = quality(count_pairs(units, phones, 6, 6)), quality(count_pairs(np.concatenate(noise), phones, 6, 6))
    assert real.pnmi > chance.pnmi + 0.3 and real.phone_purity > chance.phone_purity + 0.3
    changed = [np.where(generator.random(len(each)) < 0.05, 0, each) for each in utterances]
    edits, counts = edit_rates(utterances, changed)
    random_edits, random_counts = edit_rates(noise, random_units(changed, 1))
    assert edits.sum() / counts.sum() < random_edits.sum() / random_counts.sum()


def test_speaker_information_by_hand_and_its_floor() -> None:
    phones = np.repeat([0, 1], 200)
    speakers = np.tile([0, 1], 200)
    share, floor = speaker_information(speakers.copy(), phones, speakers, 3, 0)
    assert share == pytest.approx(1.0) and floor < 0.05  # the unit is the speaker
    share, _ = speaker_information(phones.copy(), phones, speakers, 0, 0)
    assert share == pytest.approx(0.0)  # the unit is the phone, which is known already
    units = np.arange(400)  # every frame a unit of its own: all information is the bias
    share, floor = speaker_information(units, phones, speakers, 3, 0)
    assert share == pytest.approx(1.0) and floor == pytest.approx(1.0)


def test_deduplication() -> None:
    assert deduplicated(np.array([], dtype=np.int64)).tolist() == []
    assert deduplicated(np.array([0, 0, 1, 0])).tolist() == [0, 1, 0]
