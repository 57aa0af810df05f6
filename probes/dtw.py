"""Search for a spoken query in documents by subsequence dynamic time warping, for many pairs and all layers at once.

The scores of s3prl's QbE (arXiv:2105.01051): exponential cosine distance, each query frame scaled to 0..1 within a document, and
the asymmetric step pattern of R's and Python's `dtw` (Giorgino 2009) with open begin and end.

Distances are (Q, N, T): query frames first, so that a step of the recurrence reads one block of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from superb_probe.errors import RequestError

LEAST_QUERY_FRAMES = 5  # s3prl gives shorter queries the score 0 everywhere
LEAST_RANGE = 1e-9
DISTANCES = ("cosine_exp", "cosine")
CPU_CELLS = 2**13  # cells of one step of the recurrence: they stay in a core's cache
CUDA_CELLS = 2**20


def unit_frames(states: Tensor) -> Tensor:
    """The states with every frame of length one; a frame of zeros stays zero, at distance one from all others.

    >>> unit_frames(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return torch.nn.functional.normalize(states, dim=-1)


def hold_last(documents: Tensor, num_frames: Tensor) -> Tensor:
    """The documents (L, B, T, D) with each one's last valid frame in the place of its padding.

    Neither the range of a query frame's distances nor the least cost of a path changes by that, because a path may stay in a
    frame: nothing needs a mask.

    >>> hold_last(torch.tensor([[[[1.0], [2.0], [0.0]]]]), torch.tensor([2])).flatten().tolist()
    [1.0, 2.0, 2.0]
    """
    position = torch.arange(documents.shape[2], device=documents.device)
    index = torch.minimum(position[None], num_frames[:, None] - 1)
    return documents.gather(2, index[None, ..., None].expand_as(documents))


def frame_distances(query: Tensor, documents: Tensor, distance: str = "cosine_exp") -> Tensor:
    """(Q, N, T) distances between unit frames.

    Args:
        query: (Q, D).
        documents: (N, T, D).
        distance: "cosine", or "cosine_exp": its exponential less one.

    >>> frame_distances(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), "cosine").tolist()
    [[[0.0, 1.0]]]
    """
    if distance not in DISTANCES:
        raise RequestError(f"unknown distance {distance!r}. Fix: one of {', '.join(DISTANCES)}")
    product = query @ documents.reshape(-1, documents.shape[-1]).T
    cosine = product.neg_().add_(1.0).view(query.shape[0], *documents.shape[:2])
    return cosine if distance == "cosine" else cosine.expm1_()


def scale_rows(distances: Tensor) -> Tensor:
    """The distances (Q, N, T) with each query frame's least at 0 and its greatest at 1 in each document.

    >>> scale_rows(torch.tensor([[[1.0, 3.0, 2.0]]])).tolist()
    [[[0.0, 1.0, 0.5]]]
    """
    # aminmax takes five times as long as both together
    least, greatest = distances.amin(-1, keepdim=True), distances.amax(-1, keepdim=True)
    return (distances - least).div_((greatest - least).clamp_(min=LEAST_RANGE))


def subsequence_costs(distances: Tensor) -> Tensor:
    """(N,) the least cost of a warping path through the whole query and any stretch of a document, over the query's frames.

    Step pattern "asymmetric": each query frame is met once, and the document goes on by 0, 1 or 2 frames. Equal to `dtw(x,
    step_pattern="asymmetric", open_begin=True, open_end=True).normalizedDistance` of dtw-python 1.3.0.

    Args:
        distances: (Q, N, T).

    >>> grid = torch.tensor([[[9.0, 0.0, 9.0, 9.0]], [[9.0, 9.0, 9.0, 1.0]]])
    >>> subsequence_costs(grid).tolist()
    [0.5]
    """
    query_frames, pairs, frames = distances.shape
    # two columns of infinity stand before the first frame, so that the three steps are three slices
    costs = distances.new_full((pairs, frames + 2), torch.inf)
    here, one_back, two_back = costs[:, 2:], costs[:, 1:-1], costs[:, :-2]
    here.copy_(distances[0])
    best = torch.empty_like(distances[0])
    for row in range(1, query_frames):
        torch.minimum(here, one_back, out=best)
        torch.minimum(best, two_back, out=best)
        torch.add(best, distances[row], out=here)
    return here.amin(1) / query_frames


def search(query: Tensor, documents: Tensor, distance: str = "cosine_exp") -> Tensor:
    """(L, B) how much the query sounds like a stretch of each document: minus the cost of its best path, layer by layer.

    Args:
        query: (L, Q, D) unit frames.
        documents: (L, B, T, D) unit frames, padded by `hold_last`.
        distance: as in `frame_distances`.
    """
    layers, count, frames, _ = documents.shape
    scores = documents.new_zeros((layers, count))
    if query.shape[1] < LEAST_QUERY_FRAMES:
        return scores
    group = max(1, (CUDA_CELLS if documents.is_cuda else CPU_CELLS) // frames)
    for layer in range(layers):
        for start in range(0, count, group):
            rows = slice(start, start + group)
            distances = frame_distances(query[layer], documents[layer, rows], distance)
            scores[layer, rows] = -subsequence_costs(scale_rows(distances))
    return scores
