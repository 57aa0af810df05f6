"""How far a layer keeps speakers and phones apart: probes, angles, what is left without a subspace, and what units say of speakers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from superb_probe.analysis_corpus import AnalysisCorpus, Frames, extract
from superb_probe.analysis_units import DRAWS, abx_items
from superb_probe.downstreams.manifest import Manifest, Trials
from superb_probe.engine_progress import Stage
from superb_probe.errors import all_at_once
from superb_probe.probes.abx import MODES, list_triples, mean_error, score
from superb_probe.probes.metrics import UndefinedMetric, eer
from superb_probe.probes.statistics import bootstrap
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
from superb_probe.probes.units import BUDGETS, assign_units, fit_clusters, speaker_information
from superb_probe.results.analysis_record import Measurement
from superb_probe.upstreams.base import Upstream

REMOVED = ("nothing", "speakers", "phones", "random")
MOST_TRIALS = 20_000


@dataclass(frozen=True, slots=True)
class DisentangleRequest:
    """What `analyze disentangle` was asked for.

    Attributes:
        max_frames: training frames of the probes and subspaces, drawn at random among those with speech.
        variance: of the class means that the subspaces hold.
        most_dims: largest dimension of a subspace, and most directions that are erased.
        clusters: of the units whose information about speakers is measured.
        seed: of all draws.
        abx: whether ABX across minus within speakers is measured.
    """

    max_frames: int = 20_000
    variance: float = 0.95
    most_dims: int = 30
    clusters: int = 100
    seed: int = 0
    abx: bool = True


def analyze_disentangle(
    upstream: Upstream,
    name: str,
    corpus: AnalysisCorpus,
    request: DisentangleRequest,
    store: Path | None,
    device: torch.device,
) -> list[Measurement]:
    """All numbers of every layer.

    Raises:
        RequestError: for speech that says nothing of speakers.
    """
    trials = corpus.trials.get("test") or all_pairs(corpus.splits["test"], request.seed)
    _check_speakers(corpus.splits["train"], trials)
    stores = extract(upstream, name, corpus.splits, store, device)
    train, test = (
        Frames(stores[split], corpus.splits[split], upstream, corpus.phones, corpus.phone_names)
        for split in ("train", "test")
    )
    rows: list[Measurement] = []
    with Stage(f"subspaces of {name}", upstream.info.num_layers, "layers") as stage:
        for layer in range(upstream.info.num_layers):
            rows += _layer(train, test, trials, layer, request)
            stage.advance(1)
    if request.abx:
        rows += _abx_gap(test, upstream.info.num_layers)
    return rows


def _check_speakers(train: Manifest, trials: Trials) -> None:
    """All that is wrong, before anything is extracted."""
    wrong = []
    if len({each.labels.get("speaker") or each.id for each in train}) < 2:
        wrong.append("train has a single speaker")
    if not 0 < int(trials.labels.sum()) < len(trials.labels):
        wrong.append("test lacks pairs of utterances of one speaker, or of two")
    if wrong:
        raise all_at_once(
            "disentangle", wrong, "manifests with a column `speaker`, two speakers or more, several utterances each"
        )


def all_pairs(manifest: Manifest, seed: int) -> Trials:
    """All pairs of utterances with known speakers, at most `MOST_TRIALS`, those of one speaker first."""
    known = [each for each in manifest if each.labels.get("speaker")]
    pairs = list(combinations(known, 2))
    if len(pairs) > MOST_TRIALS:
        order = np.random.default_rng([seed, 6]).permutation(len(pairs))
        pairs = sorted(
            (pairs[at] for at in order), key=lambda pair: pair[0].labels["speaker"] != pair[1].labels["speaker"]
        )[:MOST_TRIALS]
    labels = [int(a.labels["speaker"] == b.labels["speaker"]) for a, b in pairs]
    return Trials.of(labels, [a.id for a, _ in pairs], [b.id for _, b in pairs])


def _layer(train: Frames, test: Frames, trials: Trials, layer: int, request: DisentangleRequest) -> list[Measurement]:
    rows_of_train = train.sample(request.max_frames, request.seed, speech_only=True)
    x = train.layer(layer, rows_of_train)
    phones, names = _renumbered(train.phones[rows_of_train])
    speakers, _ = _renumbered(train.speakers[train.utterance[rows_of_train]])
    erasing, found = _subspaces(x, phones, speakers, layer, request)
    states = test.layer(layer)
    speech = np.flatnonzero(test.speech)
    number = np.full(len(test.names), -1)
    number[names] = np.arange(len(names))
    true = number[test.phones[speech]]
    held = _held_out_utterances(train, rows_of_train)
    mean = x.mean(0)
    for removed in REMOVED:
        left, left_test = ((values - mean) @ erasing[removed] for values in (x, states))
        right = LinearClassifier(left, phones).predict(left_test[speech]) == true
        where = {"removed": removed}
        found.append(_share(right, test.speakers[test.utterance[speech]], "phone_accuracy", layer, where))
        found.append(_eer(test, left_test @ whitening_matrix(left, speakers).astype(np.float32), trials, layer, where))
        if held.any() and not held.all():
            probe = LinearClassifier(left[~held], speakers[~held])
            hit = probe.predict(left[held]) == speakers[held]
            found.append(
                _share(
                    hit,
                    train.utterance[rows_of_train[held]],
                    "speaker_frame_accuracy",
                    layer,
                    where,
                    "train, other utterances",
                )
            )
    return [*found, *_information(train, test, states, layer, request)]


def _renumbered(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), names


def _held_out_utterances(train: Frames, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are of a speaker's every fifth utterance: speakers of train, other words. None where speakers have one each."""
    place: dict[int, int] = {}
    held = np.zeros(len(train.manifest), dtype=bool)
    for utterance, speaker in enumerate(train.speakers.tolist()):
        place[speaker] = place.get(speaker, 0) + 1
        held[utterance] = place[speaker] % 5 == 0
    found: NDArray[np.bool_] = held[train.utterance[rows]]
    return found


def _subspaces(
    x: NDArray[np.float32],
    phones: NDArray[np.int64],
    speakers: NDArray[np.int64],
    layer: int,
    request: DisentangleRequest,
) -> tuple[dict[str, NDArray[np.float32]], list[Measurement]]:
    """What erases each kind; and the angles between their subspaces, beside those of random subspaces as large."""
    means = {"phones": balanced_means(x, phones, speakers), "speakers": balanced_means(x, speakers, phones)}
    most, dim = min(request.most_dims, x.shape[1] // 3), x.shape[1]
    bases = {kind: principal_subspace(each, request.variance, most) for kind, each in means.items()}
    found = [
        Measurement("subspace_dim", layer, "train", float(bases[kind].shape[1]), None, 1, {"of": kind})
        for kind in means
    ]
    controls = [random_subspace(dim, bases["speakers"].shape[1], request.seed + at) for at in range(1, 21)]
    for control, others in (("", [bases["speakers"]]), ("random subspace", controls)):
        angles = np.array([principal_angles(bases["phones"], other) for other in others])
        inside = np.array([variance_inside(means["phones"], other) for other in others])
        where = {"control": control} if control else {}
        for measure, values in (
            ("mean_angle_deg", angles.mean(1)), ("smallest_angle_deg", angles[:, 0]), ("phone_variance_in_speakers", inside)
        ):  # fmt: skip
            spread = None if len(values) < 2 else (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
            found.append(Measurement(measure, layer, "train", float(values.mean()), spread, 1, where))
    centred = x - x.mean(0)
    erasing = {kind: erasing_matrix(centred, each, most) for kind, each in means.items()}
    erasing["random"] = erasing_matrix(centred, means["speakers"], most, drawn=request.seed)
    erasing["nothing"] = np.eye(dim)
    return {kind: each.astype(np.float32) for kind, each in erasing.items()}, found


def _share(
    right: NDArray[np.bool_],
    groups: NDArray[np.int64],
    measure: str,
    layer: int,
    where: Mapping[str, str],
    split: str = "test",
) -> Measurement:
    """A share of right frames with an interval over groups."""
    sums, counts = np.bincount(groups, right), np.bincount(groups)
    used = counts > 0
    sums, counts = sums[used], counts[used]
    ci95 = None
    if len(counts) > 1:
        times = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
        low, high = np.quantile((times @ sums) / (times @ counts), [0.025, 0.975])
        ci95 = (float(low), float(high))
    return Measurement(measure, layer, split, float(right.mean()), ci95, 1, where)


def _eer(
    test: Frames, states: NDArray[np.float32], trials: Trials, layer: int, where: Mapping[str, str]
) -> Measurement:
    """The equal error rate of cosines between means over speech of centred and whitened states."""
    vectors = {}
    for name, part, speech in zip(test.manifest.ids, test.split(states), test.split(test.speech), strict=True):
        vector = part[speech].mean(0)
        vectors[name] = vector / np.linalg.norm(vector)
    cosines = np.array([float(vectors[a] @ vectors[b]) for a, b in zip(trials.ids_a, trials.ids_b, strict=True)])
    value = eer(trials.labels, cosines)[0]
    speaker = {name: test.speaker_names[at] for name, at in zip(test.manifest.ids, test.speakers.tolist(), strict=True)}
    try:
        low, high, _ = bootstrap(
            lambda items: eer(items["labels"], items["scores"])[0],
            {"labels": trials.labels, "scores": cosines},
            clusters=[speaker[name] for name in trials.ids_a],
            other_clusters=[speaker[name] for name in trials.ids_b],
            draws=DRAWS // 4,
        )
        ci95: tuple[float, float] | None = (low, high)
    except UndefinedMetric:
        ci95 = None
    return Measurement("speaker_eer", layer, "test", value, ci95, 1, where)


def _information(
    train: Frames, test: Frames, states: NDArray[np.float32], layer: int, request: DisentangleRequest
) -> list[Measurement]:
    """What units say about speakers once the phone is known, and how much of that is only few frames."""
    rows = train.sample(BUDGETS["small"].max_frames, request.seed)
    clusters = min(request.clusters, len(rows))
    units = assign_units(states, fit_clusters(train.layer(layer, rows), clusters, request.seed, BUDGETS["small"]))
    speech = test.speech
    share, floor = speaker_information(
        units[speech], test.phones[speech], test.speakers[test.utterance[speech]], 5, request.seed
    )
    where = {"clusters": clusters}
    return [
        Measurement("unit_speaker_information", layer, "test", share, None, 1, where),
        Measurement(
            "unit_speaker_information", layer, "test", floor, None, 1, {**where, "control": "shuffled speakers"}
        ),
        Measurement("unit_speaker_information_net", layer, "test", share - floor, None, 1, where),
    ]


def _abx_gap(test: Frames, layers: int) -> list[Measurement]:
    """ABX error across speakers minus within, over the pairs of phones that both have."""
    items, places = abx_items(test, "triphone")
    triples = {mode: list_triples(items, mode) for mode in MODES}
    rows = []
    for layer in range(layers):
        states = test.split(test.layer(layer))
        cut = [states[row][start:end] for row, start, end in places]
        found = {mode: score(triples[mode], cut) for mode in MODES}
        speakers = sorted(set(found["within"].speakers) & set(found["across"].speakers))
        tables = {mode: each.table[[each.speakers.index(name) for name in speakers]] for mode, each in found.items()}

        def gap(
            items: Mapping[str, NDArray[np.int64]],
            tables: dict[str, NDArray[np.float64]] = tables,
            count: int = len(speakers),
        ) -> float:
            weights = np.bincount(items["row"], minlength=count)
            return mean_error(tables["across"], weights) - mean_error(tables["within"], weights)

        low, high, _ = bootstrap(gap, {"row": np.arange(len(speakers))}, draws=DRAWS)
        rows.append(
            Measurement("abx_across_minus_within", layer, "test", gap({"row": np.arange(len(speakers))}), (low, high))
        )
    return rows
