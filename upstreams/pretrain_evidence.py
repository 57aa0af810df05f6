"""What a pre-trained encoder learned, on held-out speech: how pure its units and its layers' clusters are in phones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.pretrain_data import Clips, padded_batches
from superb_probe.upstreams.pretrain_model import SPECIAL_SYMBOLS, HubertPretraining
from superb_probe.upstreams.pretrain_targets import BATCH_SAMPLES, assign, cepstra, features_of, fit_kmeans

MOST_FITTED_S = 900.0


@dataclass(frozen=True, slots=True)
class Purity:
    """How well clusters and phones tell each other, over frames.

    Attributes:
        phone: share of frames that have the commonest phone of their cluster.
        cluster: share of frames that have the commonest cluster of their phone.
        chance: share of the commonest phone: the phone purity of a single cluster.
    """

    phone: float
    cluster: float
    chance: float


def purity(clusters: NDArray[np.integer[Any]], phones: NDArray[np.integer[Any]]) -> Purity:
    """Purity of clusters against phones (arXiv 2106.07447, IV-E), frames with a phone below zero left out.

    >>> found = purity(np.array([0, 0, 0, 1, 2]), np.array([5, 5, 6, 6, -1]))
    >>> found.phone, found.cluster, found.chance
    (0.75, 0.75, 0.5)
    """
    known = phones >= 0
    joint = np.zeros((int(clusters.max()) + 1, int(phones.max()) + 1))
    np.add.at(joint, (clusters[known], phones[known]), 1.0)
    joint /= joint.sum()
    return Purity(float(joint.max(1).sum()), float(joint.max(0).sum()), float(joint.sum(0).max()))


@torch.no_grad()
def unit_purity(model: HubertPretraining, clips: Clips, device: torch.device) -> float | None:
    """Phone purity of the likeliest units of unmasked aligned clips; None if no clip is aligned."""
    if clips.phones is None:
        return None
    said, phones = [], []
    encoder, training = model.encoder, model.training
    model.eval()
    for taken, wavs, lengths in padded_batches(clips, clips.phones.clips.tolist(), BATCH_SAMPLES, device):
        found = encoder(wavs, lengths)
        likeliest = (model.logits(found.states[-1]).argmax(-1) - SPECIAL_SYMBOLS).clamp(min=0).cpu().numpy()
        for row, (index, count) in enumerate(zip(taken, found.num_frames.tolist(), strict=True)):
            said.append(likeliest[row, :count])
            phones.append(clips.phones.of(index))
    model.train(training)
    return purity(np.concatenate(said), np.concatenate(phones)).phone


def layer_purities(
    encoder: HubertEncoder, clips: Clips, clusters: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Purity of k-means clusters of every layer and of the cepstra: fitted on training clips, measured on aligned held-out ones.

    Args:
        encoder: on the device.
        clips: the run's.
        clusters: of each k-means.
        seed: of the draw of training clips (a quarter of an hour of them) and of k-means.
        device: where to compute.

    Returns:
        "mfcc" and "layers" (layer 0 first), each with "phone" and "cluster" purity, and "chance". Empty without aligned clips.
    """
    if clips.phones is None:
        return {}
    drawn = np.random.default_rng([seed, 5]).permutation(np.flatnonzero(~clips.held_out))
    fitted = drawn[: 1 + int(np.searchsorted(np.cumsum(clips.lengths[drawn]), MOST_FITTED_S * 16000))].tolist()
    aligned = clips.phones.clips.tolist()
    phones = {index: clips.phones.of(index) for index in aligned}
    points = torch.cat([features[::2].clone() for _, features in features_of(clips, fitted, cepstra(), device)])
    measured = [(index, features[::2]) for index, features in features_of(clips, aligned, cepstra(), device)]
    result: dict[str, Any] = {"mfcc": _purity_of(points, measured, phones, clusters, seed), "layers": []}
    del points
    encoder.eval()
    for layer in range(encoder.num_layers):
        points = torch.cat([each for _, each in _states(encoder, clips, fitted, layer, device)])
        measured = _states(encoder, clips, aligned, layer, device)
        result["layers"].append(_purity_of(points, measured, phones, clusters, seed))
    everything = np.concatenate(list(phones.values()))
    return {**result, "chance": purity(np.zeros_like(everything), everything).chance, "clusters": clusters}


def _states(
    encoder: HubertEncoder, clips: Clips, members: list[int], layer: int, device: torch.device
) -> list[tuple[int, Tensor]]:
    kept = []
    for taken, wavs, lengths in padded_batches(clips, members, BATCH_SAMPLES, device):
        with torch.inference_mode():
            found = encoder(wavs, lengths)
        for row, (index, count) in enumerate(zip(taken, found.num_frames.tolist(), strict=True)):
            kept.append((index, found.states[layer, row, :count].float()))
    return kept


def _purity_of(
    points: Tensor, measured: list[tuple[int, Tensor]], phones: dict[int, NDArray[np.int16]], clusters: int, seed: int
) -> dict[str, float]:
    centres = fit_kmeans(points, clusters, seed)
    labels = np.concatenate([assign(features, centres)[0].cpu().numpy() for _, features in measured])
    found = purity(labels, np.concatenate([phones[index] for index, _ in measured]))
    return {"phone": found.phone, "cluster": found.cluster}
