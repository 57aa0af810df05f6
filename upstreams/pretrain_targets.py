"""The units that pre-training predicts: k-means of cepstra, then of a layer of the model that came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.fbank import HOP_SAMPLES, FilterBank
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.pretrain_data import Clips, Units, padded_batches

Extract = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (B, S), (B,) -> (B, T, D), (B,) frames
BATCH_SAMPLES = 16000 * 240
POINTS_AT_ONCE = 2**16
LLOYD_ROUNDS = 60
LLOYD_TOLERANCE = 1e-4  # relative change of the inertia that ends it
SEEDING_POINTS = 2**16
STARTS = 3


def cepstra() -> Extract:
    """39 features at 100 Hz: 13 Kaldi cepstra of 23 bins with deltas and delta-deltas, not normalised (arXiv 2106.07447, IV-B)."""
    bank = FilterBank("mfcc", num_bins=23, num_ceps=13, cmvn=False)

    def extract(wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = bank(wavs, lengths)
        return found.states[0], found.num_frames

    return extract


def layer_states(encoder: HubertEncoder, layer: int) -> Extract:
    """States of a layer, counted from 1, of an encoder on its device; it is put in eval mode."""
    if not 0 <= layer <= encoder.config.num_layers:
        raise RequestError(f"layer {layer} asked for, of an encoder with {encoder.config.num_layers} layers.")
    encoder.eval()

    def extract(wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            found = encoder(wavs, lengths)
        return found.states[layer].float(), found.num_frames

    return extract


def features_of(
    clips: Clips, members: Sequence[int], extract: Extract, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(index, features (T, D) float32) of clips, the longest first."""
    for taken, wavs, lengths in padded_batches(clips, members, BATCH_SAMPLES, device):
        features, counts = extract(wavs, lengths)
        for row, (index, count) in enumerate(zip(taken, counts.tolist(), strict=True)):
            yield index, features[row, :count]


def make_units(
    clips: Clips,
    extract: Extract,
    *,
    hop_samples: int,
    clusters: int,
    share: float,
    seed: int,
    device: torch.device,
    source: str,
) -> Units:
    """Fit k-means on a share of the training clips and give every frame of every clip its unit.

    Args:
        clips: all clips; those held out are not fitted on.
        extract: their features.
        hop_samples: between these.
        clusters: how many units.
        share: of the training clips, drawn by the seed.
        seed: of the draw and of k-means.
        device: where to compute.
        source: what the units are of, in words.

    Raises:
        RequestError: if there are fewer frames than clusters.
    """
    training = np.flatnonzero(~clips.held_out)
    drawn = np.random.default_rng([seed, 3]).permutation(training)[: max(1, round(share * len(training)))]
    kept = [features.clone() for _, features in features_of(clips, drawn.tolist(), extract, device)]
    points = torch.cat(kept)
    del kept
    centres = fit_kmeans(points, clusters, seed)
    del points
    found: dict[int, np.ndarray[Any, np.dtype[np.int16]]] = {}
    total, count = 0.0, 0
    for index, features in features_of(clips, range(len(clips)), extract, device):
        nearest, distances = assign(features, centres)
        found[index] = nearest.to(torch.int16).cpu().numpy()
        if not clips.held_out[index]:
            total, count = total + float(distances.sum()), count + len(features)
    sizes = [len(found[index]) for index in range(len(clips))]
    values = np.concatenate([found[index] for index in range(len(clips))])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Units(values, offsets, hop_samples, clusters, total / max(1, count), source)


def mfcc_units(clips: Clips, clusters: int, share: float, seed: int, device: torch.device) -> Units:
    """Units of the first iteration."""
    source = f"k-means {clusters} of 39 MFCC features at 100 Hz"
    return make_units(
        clips,
        cepstra(),
        hop_samples=HOP_SAMPLES,
        clusters=clusters,
        share=share,
        seed=seed,
        device=device,
        source=source,
    )


def fit_kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres (K, D) of points (N, D).

    On a GPU: full batches (Lloyd's rounds) from the best of three k-means++ starts. On a CPU: scikit-learn's MiniBatchKMeans with the
    settings of the official code (batches of 10,000, 100 rounds at most, 20 starts, no reassignment).

    Raises:
        RequestError: if there are fewer points than clusters.
    """
    if len(points) < clusters:
        raise RequestError(f"{len(points)} frames for {clusters} clusters. Fix: more data, or fewer clusters.")
    if points.device.type == "cuda":
        return lloyd(points, clusters, seed)
    from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped,unused-ignore]

    model = MiniBatchKMeans(
        n_clusters=clusters,
        init="k-means++",
        batch_size=10_000,
        max_iter=100,
        n_init=20,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    model.fit(points.numpy())
    return torch.from_numpy(np.asarray(model.cluster_centers_, dtype=np.float32))


def lloyd(points: Tensor, clusters: int, seed: int) -> Tensor:
    """K-means in full batches on any device: rounds of assigning and averaging until the inertia stands still.

    >>> centres = lloyd(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2, seed=0)
    >>> sorted(centres.flatten().tolist())
    [0.5, 10.5]
    """
    generator = torch.Generator().manual_seed(seed)
    level = points.mean(0)  # taken off, so that distances do not cancel in float32
    sample = points[torch.randperm(len(points), generator=generator)[:SEEDING_POINTS].to(points.device)] - level
    starts = [_plus_plus(sample, clusters, generator) for _ in range(STARTS)]
    centres = min(starts, key=lambda start: float(assign(sample, start)[1].sum()))
    before = float("inf")
    for _ in range(LLOYD_ROUNDS):
        centres, inertia = _round(points, level, centres)
        if before - inertia <= LLOYD_TOLERANCE * inertia:
            break
        before = inertia
    return centres + level


def _plus_plus(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """K-means++ (Arthur and Vassilvitskii 2007): each next centre a point drawn by its square distance to those before."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [points[first]]
    distances = (points - chosen[0]).square().sum(1)
    for _ in range(clusters - 1):
        place = torch.rand((), generator=generator, dtype=torch.float64).to(points.device)
        cumulative = distances.double().cumsum(0)
        index = torch.searchsorted(cumulative, place * cumulative[-1]).clamp(max=len(points) - 1)
        chosen.append(points[index])
        distances = torch.minimum(distances, (points - chosen[-1]).square().sum(1))
    return torch.stack(chosen)


def _round(points: Tensor, level: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """New centres and the inertia of the old ones; a centre without points stays."""
    sums = torch.zeros_like(centres)
    counts = torch.zeros(len(centres), device=points.device)
    inertia = torch.zeros((), dtype=torch.float64, device=points.device)
    for chunk in torch.split(points, POINTS_AT_ONCE):
        centred = chunk - level
        nearest, distances = assign(centred, centres)
        # A product with one-hot rows adds in a fixed order, where index_add_ on a GPU does not.
        member = torch.nn.functional.one_hot(nearest, len(centres)).to(points.dtype)
        sums += member.T @ centred
        counts += member.sum(0)
        inertia += distances.sum(dtype=torch.float64)
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return moved, float(inertia)


def assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point (N,) int64, and its square distance (N,)."""
    nearest, distances = [], []
    squares = centres.square().sum(1)
    for chunk in torch.split(points, POINTS_AT_ONCE):
        least, index = torch.addmm(squares, chunk, centres.T, alpha=-2.0).min(1)
        nearest.append(index)
        distances.append((least + chunk.square().sum(1)).clamp(min=0.0))
    return torch.cat(nearest), torch.cat(distances)
