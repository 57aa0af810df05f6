"""The batched search against a slow one, and against dtw-python where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.probes import dtw as ours
from superb_probe.probes.dtw import frame_distances, hold_last, scale_rows, search, subsequence_costs, unit_frames


def world(seed: int, layers: int = 3, dim: int = 8, query: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([25, 1, 2, 13, 7])
    documents = torch.randn(layers, len(lengths), int(lengths.max()), dim, generator=generator)
    for row, length in enumerate(lengths.tolist()):
        documents[:, row, length:] = 0
    return unit_frames(torch.randn(layers, query, dim, generator=generator)), unit_frames(documents), lengths


def slow_distances(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    distances = np.exp(cdist(query, document, "cosine")) - 1
    low, high = distances.min(1)[:, None], distances.max(1)[:, None]
    return (distances - low) / np.maximum(high - low, 1e-9)


def slow_cost(distances: np.ndarray, steps: tuple[int, ...] = (0, 1, 2)) -> float:
    costs = distances[0].copy()
    for row in distances[1:]:
        costs = np.array([row[j] + min(costs[j - s] for s in steps if j - s >= 0) for j in range(len(row))])
    return float(costs.min() / len(distances))


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_slow_search(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, documents, lengths = world(seed)
    whole = search(query, hold_last(documents, lengths))
    monkeypatch.setattr(ours, "CPU_CELLS", 1)  # one document at a time
    assert torch.equal(search(query, hold_last(documents, lengths)), whole)
    for layer in range(query.shape[0]):
        for row, length in enumerate(lengths.tolist()):
            distances = slow_distances(query[layer].numpy(), documents[layer, row, :length].numpy())
            assert float(whole[layer, row]) == pytest.approx(-slow_cost(distances), abs=1e-6)
    distances = slow_distances(query[0].numpy(), documents[0, 0].numpy())
    assert slow_cost(distances, (0, 1)) > slow_cost(distances), "two frames at a step are allowed"


def test_scores_equal_dtw_python() -> None:
    try:
        from dtw import dtw
    except (ImportError, ValueError) as error:  # 1.3.0's wheels are built for numpy 1
        pytest.skip(f"dtw-python cannot be imported: {error}")
    for seed in range(4):
        query, documents, lengths = world(seed, layers=2, query=5 + seed)
        scores = search(query, hold_last(documents, lengths))
        for layer in range(2):
            for row, length in enumerate(lengths.tolist()):
                distances = slow_distances(query[layer].numpy(), documents[layer, row, :length].numpy())
                path = dtw(distances, step_pattern="asymmetric", open_begin=True, open_end=True)
                assert float(scores[layer, row]) == pytest.approx(-path.normalizedDistance, abs=1e-6)
                if length > 2:
                    closed = dtw(distances, step_pattern="symmetric2")
                    assert abs(closed.normalizedDistance + float(scores[layer, row])) > 1e-3


def test_short_queries_score_nothing() -> None:
    query, documents, lengths = world(0, query=4)
    assert search(query, hold_last(documents, lengths)).abs().sum() == 0
    assert search(world(0, query=5)[0], hold_last(documents, lengths)).abs().sum() > 0


def test_frames_past_the_end_are_not_read() -> None:
    query, documents, lengths = world(1)
    before = search(query, hold_last(documents, lengths))
    documents[:, 3, 13:] = query[:, :1]  # a perfect match, but in the padding
    assert torch.equal(search(query, hold_last(documents, lengths)), before)
    assert not torch.equal(search(query, documents), before)


def test_an_inserted_query_is_found() -> None:
    query, documents, lengths = world(2)
    documents[:, 3, 4:11] = query
    scores = search(query, hold_last(documents, lengths))
    assert float(scores[:, 3].min()) > -1e-6 > float(scores[:, [0, 2, 4]].max())
    assert not scores[:, 1].any(), "a document of one frame has no range, so every query fits, as in s3prl"


def test_rows_are_scaled_within_one_document() -> None:
    distances = torch.tensor([[[2.0, 6.0, 4.0], [3.0, 1.0, 2.0]], [[1.0, 1.0, 1.0], [5.0, 0.0, 5.0]]])
    scaled = scale_rows(distances)
    assert scaled[0].tolist() == [[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]], "each document by itself"
    assert scaled[1].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], "no range: no division by zero"
    assert subsequence_costs(distances[:, :, :1]).tolist() == [1.5, 4.0]


def test_distances_by_hand() -> None:
    frames = unit_frames(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]))
    assert frame_distances(frames[:1], frames[None], "cosine").tolist() == [[[0.0, 1.0, 2.0, 1.0]]]
    assert frame_distances(frames[:1], frames[None])[0, 0, :3].tolist() == pytest.approx([0.0, np.e - 1, np.e**2 - 1])
    with pytest.raises(RequestError, match="cosine_exp, cosine"):
        frame_distances(frames, frames[None], "euclidean")
