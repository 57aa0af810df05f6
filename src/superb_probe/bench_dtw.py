"""The bench of the search by dynamic time warping, beside dtw-python, which s3prl's QbE calls pair by pair."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.bench_parts import result_of, where
from superb_probe.bench_race import cost, race
from superb_probe.engine_ask import choose_device
from superb_probe.errors import RequestError
from superb_probe.probes.dtw import LEAST_RANGE, frame_distances, hold_last, scale_rows, search, subsequence_costs
from superb_probe.probes.dtw import unit_frames as unit

PEER = "dtw-python"
PEER_OF_S3PRL = f"{PEER} 1.3.0"  # the release that s3prl pins; later ones run beside numpy 2


def bench_dtw(args: argparse.Namespace) -> dict[str, Any]:
    """One query in some documents, all layers: the whole search and the recurrence alone, here and in the peer; our products alone.

    The states are random: the time does not depend on them. The peer's side is what s3prl does: scipy's cosine distance, its
    exponential, each query frame scaled to 0..1, and `dtw` with the asymmetric pattern, for every pair and layer in turn.

    Raises:
        RequestError: for a shape that is not positive.
    """
    layers, dim, query_frames, documents, frames = shape = tuple(args.shape)
    if min(shape) < 1:
        raise RequestError(f"--shape {' '.join(map(str, shape))}: positive numbers")
    device = choose_device(args.device)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(layers, query_frames, dim, generator=generator)
    lengths = torch.randint(max(1, frames * 2 // 3), frames + 1, (documents,), generator=generator)
    states = torch.randn(layers, documents, frames, dim, generator=generator)
    here = unit(query).to(device), hold_last(unit(states), lengths).to(device)
    scaled = [scale_rows(frame_distances(*pair)) for pair in zip(*here, strict=True)]
    runs = {
        "search": lambda: search(*here),
        "recurrence": lambda: [subsequence_costs(each) for each in scaled],
        "products": lambda: [query @ documents.transpose(-1, -2) for query, documents in zip(*here, strict=True)],
    }
    timings = race(runs, device, args.repeats, args.limit)
    pairs = layers * documents
    result = result_of("dtw", device) | {
        "shape": dict(zip(("layers", "dim", "query_frames", "documents", "frames"), shape, strict=True)),
        "pairs": pairs,
        "seconds_a_pair": {name: (cost(timing) or 0.0) / pairs for name, timing in timings.items()},
    }
    return result | _beside_peer(result, query, states, lengths, search(*here).cpu(), args.limit)


def _beside_peer(
    result: Mapping[str, Any], query: Tensor, states: Tensor, lengths: Tensor, scores: Tensor, limit_s: float
) -> dict[str, Any]:
    """The peer's times and ratios, and how far its scores are from ours; why not where it cannot be imported."""
    try:
        from dtw import dtw  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from scipy.spatial.distance import cdist  # type: ignore[import-untyped,unused-ignore]
    except (ImportError, ValueError) as error:  # ValueError: built for another numpy
        return {
            "peer": None,
            "why": f"{PEER_OF_S3PRL} cannot be imported ({error}). Fix: pip install dtw-python==1.3.0 'numpy<2'",
        }
    layer, row = np.meshgrid(range(len(query)), range(len(lengths)), indexing="ij")
    places = list(zip(layer.flatten().tolist(), row.flatten().tolist(), strict=True))

    def distances(layer: int, row: int) -> np.ndarray[Any, Any]:
        found = np.exp(cdist(query[layer].numpy(), states[layer, row, : lengths[row]].numpy(), "cosine")) - 1
        least, greatest = found.min(1)[:, None], found.max(1)[:, None]
        return np.asarray((found - least) / np.clip(greatest - least, LEAST_RANGE, None))

    def warp(scaled: np.ndarray[Any, Any]) -> float:
        return -float(dtw(scaled, step_pattern="asymmetric", open_begin=True, open_end=True).normalizedDistance)

    scaled = [distances(*place) for place in places]
    found: list[float] = []

    def whole() -> None:
        found[:] = [warp(distances(*place)) for place in places]

    runs = {"search": whole, "recurrence": lambda: [warp(each) for each in scaled]}
    timings = race(runs, torch.device("cpu"), 2, limit_s)
    seconds = {name: (cost(timing) or 0.0) / len(places) for name, timing in timings.items()}
    ours = result["seconds_a_pair"]
    return {
        "peer": f"{PEER} {version(PEER)}",
        "peer_seconds_a_pair": seconds,
        "ratio": {name: seconds[name] / ours[name] for name in seconds},
        "largest_difference": float((torch.tensor(found).view_as(scores) - scores).abs().max()),
    }


def describe_dtw(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    shape, ours = result["shape"], result["seconds_a_pair"]
    lines = [
        where(result),
        f"{shape['layers']} layers of {shape['dim']}, {shape['query_frames']} query frames in {shape['documents']} documents: "
        + f"{result['pairs']} pairs",
    ]
    for name in ours:
        line = f"  {name}: {1e3 * ours[name]:.3g} ms a pair"
        if result["peer"] and name in result["ratio"]:
            line += f", {result['peer']} {1e3 * result['peer_seconds_a_pair'][name]:.3g} ms: {result['ratio'][name]:.1f} times"
        lines.append(line)
    end = f"scores differ by {result['largest_difference']:.1e} at most" if result["peer"] else result["why"]
    return [*lines, end]
