"""Units of every layer: k-means, purity and PNMI on held-out speech, bitrate, what changes of the audio do to them, and ABX."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from superb_probe.analysis_corpus import AnalysisCorpus, Frames, extract, utterance_segments
from superb_probe.downstreams.manifest import Manifest
from superb_probe.engine_progress import Stage
from superb_probe.probes.abx import AbxScore, Item, interval, list_triples, score
from superb_probe.probes.alignments import scale_times, segment_frames
from superb_probe.probes.audio_changes import CHANGES, write_changed
from superb_probe.probes.metrics import UndefinedMetric
from superb_probe.probes.statistics import jackknife_interval
from superb_probe.probes.units import (
    BUDGETS,
    KMeansSettings,
    assign_units,
    bitrate,
    count_pairs,
    deduplicated,
    edit_rates,
    fit_clusters,
    quality,
    random_units,
)
from superb_probe.results.analysis_record import Measurement
from superb_probe.upstreams.base import Upstream

QUALITIES = ("phone_purity", "cluster_purity", "pnmi")
DRAWS = 200
MOST_GROUPS = 50  # groups of speakers that are left out in turn
Units = list[NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class UnitsRequest:
    """What `analyze units` was asked for.

    Attributes:
        clusters: numbers of clusters.
        seeds: of k-means; the curve over layers has the first `curve_seeds` of them, the chosen layer all.
        budget: "full" (the paper's k-means) or "small"; None: by the hours of train.
        max_frames: frames k-means is trained on; None for the budget's.
        curve_seeds: seeds at layers that are not chosen.
        changes: names of changes of the audio.
        change_utterances: test utterances that are changed.
        abx: modes of ABX, none for none.
        abx_context: "triphone", or "none": any context, over the phone alone.
        abx_distance: "dtw" or "mean".
    """

    clusters: tuple[int, ...] = (100, 500, 1000)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    budget: str | None = None
    max_frames: int | None = None
    curve_seeds: int = 5
    changes: tuple[str, ...] = tuple(CHANGES)
    change_utterances: int = 60
    abx: tuple[str, ...] = ("within", "across")
    abx_context: str = "triphone"
    abx_distance: str = "dtw"

    @property
    def kmeans(self) -> KMeansSettings:
        """The settings of k-means."""
        base = BUDGETS[self.budget or "full"]
        return base if self.max_frames is None else replace(base, max_frames=self.max_frames)


@dataclass(slots=True)
class UnitsResult:
    """What was found.

    Attributes:
        measurements: the numbers.
        chosen: the layer of each number of clusters, by PNMI on dev.
        sequences: by number of clusters, the units of every utterance, one a frame, at the chosen layer with the first seed.
        centres: by number of clusters, (K, D).
    """

    measurements: list[Measurement] = field(default_factory=list)
    chosen: dict[str, int] = field(default_factory=dict)
    sequences: dict[int, dict[str, NDArray[np.int64]]] = field(default_factory=dict)
    centres: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class ChangedAudio:
    """The changed test utterances of a corpus, written once for all encoders, in a temporary folder that goes with it."""

    def __init__(self, corpus: AnalysisCorpus, request: UnitsRequest) -> None:
        """Choose the utterances; each change is written when it is first asked for."""
        test = corpus.splits["test"]
        count = min(request.change_utterances, len(test))
        self.clean = test.keep([test.ids[int(at * len(test) / count)] for at in range(count)]) if count else test[:0]
        self._folder = tempfile.TemporaryDirectory(prefix="superb-probe-changed-")
        self._made: dict[str, Manifest] = {}

    def manifest(self, name: str) -> Manifest:
        """The utterances under a change."""
        if name not in self._made:
            self._made[name] = write_changed(self.clean, name, Path(self._folder.name) / name)
        return self._made[name]

    def close(self) -> None:
        """Delete the audio."""
        self._folder.cleanup()


def analyze_units(
    upstream: Upstream,
    name: str,
    corpus: AnalysisCorpus,
    request: UnitsRequest,
    changed: ChangedAudio,
    store: Path | None,
    device: torch.device,
) -> UnitsResult:
    """All that is asked about the units of one encoder."""  # fmt: skip
    stores = extract(upstream, name, corpus.splits, store, device)
    frames = {
        split: Frames(stores[split], manifest, upstream, corpus.phones, corpus.phone_names)
        for split, manifest in corpus.splits.items()
    }
    result = UnitsResult()
    models: dict[tuple[int, int], list[NDArray[np.float32]]] = {}
    layers = upstream.info.num_layers
    with Stage(f"units of {name}", layers * len(request.clusters), "layers") as stage:
        for clusters in request.clusters:
            curve = request.seeds[: request.curve_seeds]
            found = {}
            for layer in range(layers):
                models[clusters, layer] = _fit(frames["train"], layer, clusters, curve, request)
                found[layer] = _measure(frames, layer, models[clusters, layer])
                stage.advance(1)
            best = max(found, key=lambda layer: found[layer]["dev"].values["pnmi"])
            rest = request.seeds[request.curve_seeds :]
            if rest:
                models[clusters, best] += _fit(frames["train"], best, clusters, rest, request)
                chose = found[best]["dev"]  # dev keeps the numbers that chose
                found[best] = {**_measure(frames, best, models[clusters, best]), "dev": chose}
            result.chosen[str(clusters)] = best
            for layer, parts in found.items():
                result.measurements += _rows(
                    parts, layer, clusters, {"dev": len(curve), "test": len(models[clusters, layer])}
                )
            _keep_units(result, frames, best, clusters, models[clusters, best])
    if request.changes:
        result.measurements += _robustness(upstream, name, corpus, request, changed, result, models, device)
    if request.abx:
        result.measurements += _abx(frames["test"], layers, request, result)
    return result


def _fit(
    frames: Frames, layer: int, clusters: int, seeds: Sequence[int], request: UnitsRequest
) -> list[NDArray[np.float32]]:
    """Centres by each seed, on the frames of train that the seed draws."""
    found = []
    for seed in seeds:
        rows = frames.sample(request.kmeans.max_frames, seed)
        found.append(fit_clusters(frames.layer(layer, rows), clusters, seed, request.kmeans))
    return found


@dataclass(frozen=True, slots=True)
class _Quality:
    """Means over seeds of the measures, and their intervals."""

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]


def _measure(frames: Mapping[str, Frames], layer: int, centres: Sequence[NDArray[np.float32]]) -> dict[str, _Quality]:
    found = {}
    for split in ("dev", "test"):
        states = frames[split].layer(layer)
        units = [assign_units(states, each) for each in centres]
        found[split] = measure_units(frames[split], units, len(centres[0]), split == "test")
    return found


def measure_units(
    frames: Frames, units: Sequence[NDArray[np.int64]], num_units: int, intervals: bool = True
) -> _Quality:
    """Purities, PNMI and bitrate of units, averaged over seeds, with intervals by leaving speakers out in turn.

    The bootstrap would not do: data drawn twice look more predictable, so purity and information of a resample are too high.

    Args:
        frames: whose phones and speakers they are.
        units: (N,) of each seed.
        num_units: K.
        intervals: whether to make them.
    """
    tables = [_by_group(frames, each, num_units) for each in units]
    wholes = [table.sum(0) for table in tables]
    values = {name: _seed_mean(wholes, name) for name in QUALITIES}
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(QUALITIES)
    groups = len(tables[0])
    if intervals and groups > 1:
        without = [[whole - table[at] for whole, table in zip(wholes, tables, strict=True)] for at in range(groups)]
        for name in QUALITIES:
            low, high = jackknife_interval(values[name], [_seed_mean(each, name) for each in without])
            found[name] = max(low, 0.0), min(high, 1.0)  # all three are shares; few speakers reach beyond
    seconds = float(frames.num_frames.sum() * frames.hop_s)
    rates = [bitrate(frames.split(each), seconds) for each in units]
    for name in ("units_per_s", "bits_per_s", "frame_bits_per_s"):
        values[name] = float(np.mean([getattr(each, name) for each in rates]))
        found[name] = None
    return _Quality(values, found)


def _seed_mean(tables: Sequence[NDArray[np.int64]], name: str) -> float:
    return float(np.mean([getattr(quality(table), name) for table in tables]))


def _by_group(frames: Frames, units: NDArray[np.int64], num_units: int) -> NDArray[np.int64]:
    """(G, K, P) counts of each speaker, or of at most `MOST_GROUPS` groups of speakers."""
    groups, phones = min(len(frames.speaker_names), MOST_GROUPS), len(frames.names)
    grouped = frames.speakers[frames.utterance] % groups * num_units + units
    return count_pairs(grouped, frames.phones, groups * num_units, phones).reshape(groups, num_units, phones)


def _rows(parts: Mapping[str, _Quality], layer: int, clusters: int, seeds: Mapping[str, int]) -> Iterator[Measurement]:
    for split, found in parts.items():
        for name, value in found.values.items():
            yield Measurement(name, layer, split, value, found.intervals[name], seeds[split], {"clusters": clusters})


def _keep_units(
    result: UnitsResult, frames: Mapping[str, Frames], layer: int, clusters: int, centres: Sequence[NDArray[np.float32]]
) -> None:
    """Keep the units of every utterance, and what random units of the same bitrate would score."""
    result.centres[clusters] = centres[0]
    result.sequences[clusters] = {}
    for each in frames.values():
        units = each.split(assign_units(each.layer(layer), centres[0]))
        result.sequences[clusters].update(zip(each.manifest.ids, units, strict=True))
    test = frames["test"]
    own = [result.sequences[clusters][name] for name in test.manifest.ids]
    control = [np.concatenate(random_units(own, seed)) for seed in range(3)]
    found = measure_units(test, control, clusters)
    for name, value in found.values.items():
        where = {"clusters": clusters, "control": "random units"}
        result.measurements.append(Measurement(name, layer, "test", value, found.intervals[name], 3, where))


def _robustness(
    upstream: Upstream,
    name: str,
    corpus: AnalysisCorpus,
    request: UnitsRequest,
    changed: ChangedAudio,
    result: UnitsResult,
    models: Mapping[tuple[int, int], list[NDArray[np.float32]]],
    device: torch.device,
) -> list[Measurement]:
    """Units of the same utterances clean and changed, at the chosen layers."""  # fmt: skip
    manifests = {"clean": changed.clean, **{each: changed.manifest(each) for each in request.changes}}
    stores = extract(upstream, f"{name}, changed audio", manifests, None, device)
    rows: list[Measurement] = []
    frames = {}
    for each, manifest in manifests.items():
        factor = CHANGES[each].time_factor if each in CHANGES else 1.0
        segments = {u.id: scale_times(corpus.phones[u.id], factor) for u in manifest}
        frames[each] = Frames(stores[each], manifest, upstream, segments, corpus.phone_names)
    for clusters in request.clusters:
        layer = result.chosen[str(clusters)]
        centres = models[clusters, layer]
        units = {
            each: [found.split(assign_units(found.layer(layer), centre)) for centre in centres]
            for each, found in frames.items()
        }
        for each in manifests:
            where = {"clusters": clusters, "change": each}
            measured = measure_units(frames[each], [np.concatenate(seed) for seed in units[each]], clusters)
            rows += [
                Measurement(
                    measure, layer, "test", measured.values[measure], measured.intervals[measure], len(centres), where
                )
                for measure in ("phone_purity", "pnmi", "bits_per_s")
            ]
            if each == "clean":
                continue
            rows.append(_edit_row(frames[each], units["clean"], units[each], layer, where))
            control = [random_units(of_seed, at) for at, of_seed in enumerate(units["clean"])]
            other = [random_units(of_seed, 100 + at) for at, of_seed in enumerate(units[each])]
            rows.append(_edit_row(frames[each], control, other, layer, {**where, "control": "random units"}))
    return rows


def _edit_row(
    frames: Frames, clean: Sequence[Units], changed: Sequence[Units], layer: int, where: Mapping[str, Any]
) -> Measurement:
    """Unit edit distance in edits per clean unit, mean over seeds, with an interval over speakers."""
    pairs = [edit_rates(a, b) for a, b in zip(clean, changed, strict=True)]
    value = float(np.mean([edits.sum() / counts.sum() for edits, counts in pairs]))
    number, size = frames.speakers, len(frames.speaker_names)
    sums = [tuple(np.bincount(number, column, minlength=size) for column in pair) for pair in pairs]
    interval_of_value = None
    if size > 1:
        times = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=DRAWS)
        drawn = np.mean([(times @ edits) / (times @ counts) for edits, counts in sums], axis=0)
        interval_of_value = (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))
    return Measurement("unit_edit_distance", layer, "test", value, interval_of_value, len(pairs), where)


def abx_items(frames: Frames, context: str) -> tuple[list[Item], list[tuple[int, int, int]]]:
    """The tokens of an ABX test and where they are: (utterance, first frame, one past the last).

    Args:
        frames: of a split.
        context: "triphone": a phone with its neighbours, none of them silence, over all three; "none": the phone alone.
    """
    items, places = [], []
    for row, (name, count) in enumerate(zip(frames.manifest.ids, frames.num_frames.tolist(), strict=True)):
        speaker = frames.speaker_names[frames.speakers[row]]
        segments = frames.segments[name]
        spoken = {id(each) for each in utterance_segments(segments)}
        for at, each in enumerate(segments):
            if id(each) not in spoken:
                continue
            first, last, around = each, each, ""
            if context == "triphone":
                if at == 0 or at + 1 == len(segments) or {id(segments[at - 1]), id(segments[at + 1])} - spoken:
                    continue
                first, last = segments[at - 1], segments[at + 1]
                around = f"{first.label} {last.label}"
            start, end = segment_frames(first, count, frames.hop_s)[0], segment_frames(last, count, frames.hop_s)[1]
            items.append(Item(each.label, around, speaker))
            places.append((row, start, max(end, start + 1)))
    return items, places


def _abx(frames: Frames, layers: int, request: UnitsRequest, result: UnitsResult) -> list[Measurement]:
    """ABX errors of every layer's states, of the units of the chosen layer, and of random units."""
    items, places = abx_items(frames, request.abx_context)
    limits = (
        {"max_tokens": 10, "max_speakers": 5}
        if request.abx_context == "triphone"
        else {"max_tokens": 5, "max_speakers": 2}
    )
    triples = {mode: list_triples(items, mode, **limits) for mode in request.abx}
    rows: list[Measurement] = []
    shared = {"context": request.abx_context, "distance": request.abx_distance}
    with Stage("ABX", layers, "layers") as stage:
        for layer in range(layers):
            states = frames.split(frames.layer(layer))
            cut = [states[row][start:end] for row, start, end in places]
            for mode in request.abx:
                found = score(triples[mode], cut, request.abx_distance)
                rows.append(_abx_row(found, layer, {"speakers": mode, **shared}))
            stage.advance(1)
    for clusters in request.clusters:
        own = [result.sequences[clusters][name] for name in frames.manifest.ids]
        for control, units in (("", own), ("random units", random_units(own, 0))):
            cut = [units[row][start:end] for row, start, end in places]
            where = {"clusters": clusters, **shared, **({"control": control} if control else {})}
            for mode in request.abx:
                rows.append(
                    _abx_row(score(triples[mode], cut), result.chosen[str(clusters)], {"speakers": mode, **where})
                )
    return rows


def _abx_row(found: AbxScore, layer: int, where: Mapping[str, Any]) -> Measurement:
    try:
        ci95 = interval(found, DRAWS)
    except UndefinedMetric:
        ci95 = None
    return Measurement("abx_error", layer, "test", found.error, ci95, 1, {**where, "triples": found.num_triples})


def write_units(result: UnitsResult, corpus: AnalysisCorpus, stem: Path) -> dict[str, str]:
    """The unit sequences and the centres beside a record: a gzipped TSV a number of clusters, and one `.safetensors`.

    Columns `id split layer units unit_runs`: one unit a frame, and without repetitions.

    Returns:
        File names by what they hold.
    """
    from safetensors.numpy import save_file

    files = {}
    split_of = {name: split for split, manifest in corpus.splits.items() for name in manifest.ids}
    for clusters, by_name in result.sequences.items():
        path = stem.with_name(f"{stem.name}.units{clusters}.tsv.gz")
        lines = ["id\tsplit\tlayer\tunits\tunit_runs"]
        for name, units in by_name.items():
            runs = " ".join(map(str, deduplicated(units).tolist()))
            lines.append(
                f"{name}\t{split_of[name]}\t{result.chosen[str(clusters)]}\t{' '.join(map(str, units.tolist()))}\t{runs}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
        files[f"units {clusters}"] = path.name
    centres = stem.with_name(f"{stem.name}.centres.safetensors")
    save_file({f"k{clusters}": found for clusters, found in result.centres.items()}, centres)
    files["centres"] = centres.name
    return files
