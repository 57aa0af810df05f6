"""Where the states of each job go: what it needs, what there is, and the stores that are made for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.engine_request import Job
from superb_probe.probes.plan import readable_bytes
from superb_probe.probes.planner import (
    MEMORY_SHARE,
    Choice,
    Need,
    Place,
    Rates,
    choose_place,
    free_memory_bytes,
    measure_rates,
    measure_room,
    needs_rates,
)
from superb_probe.probes.store import FeatureStore, store_folder
from superb_probe.probes.store_extract import decoding_processes
from superb_probe.probes.store_files import clean_stores, mark_used, overhead_bytes
from superb_probe.probes.store_padded import PaddedEvaluationStore, PaddedStore
from superb_probe.probes.store_stream import StreamStore

CPU_BATCH_S, GPU_BATCH_S = 60.0, 120.0  # on a CPU half the memory, at the same speed


@dataclass(frozen=True, slots=True)
class Places:
    """How states are kept in a run.

    Attributes:
        device: where training is.
        store: folder for stores on disk.
        limit_bytes: most that they may take.
        clean: whether the least recently used ones may be deleted for room.
        asked: the place somebody wants.
        measured: rates that jobs share.
    """

    device: torch.device
    store: Path | None = None
    limit_bytes: int | None = None
    clean: bool = False
    asked: Place | None = None
    measured: dict[tuple[int, str, int], Rates] = field(default_factory=dict)

    @property
    def batch_s(self) -> float:
        """Seconds of audio in a batch of the encoder."""
        return CPU_BATCH_S if self.device.type == "cpu" else GPU_BATCH_S

    def choose(self, job: Job, *, measure: bool = False) -> Placed:
        """The place of a job's states, with rates measured if asked or if the choice depends on them.

        Raises:
            RequestError: if the states do not fit where they are wanted.
        """
        if not hasattr(job.upstream.upstream, "states_for"):
            decoding_processes(self.device)  # they start while the rest is looked at
        need = need_of(job, self)
        room = measure_room(self.device, self.store, need, self.limit_bytes, clean=self.clean)
        rates = None
        if measure or (self.asked is None and needs_rates(need, room)):
            rates = measured_rates(job, self)
        choice = choose_place(need, room, rates, self.asked)
        persists = self.store is not None and room.disk_problem is None and choice.place != "stream"
        return Placed(choice, need, rates, persists)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one job's states go.

    Attributes:
        choice: the place, and why.
        need: what the job asked.
        rates: of the machine, where they were measured.
        persists: whether the states are kept on disk as well.
    """

    choice: Choice
    need: Need
    rates: Rates | None
    persists: bool


def measured_rates(job: Job, places: Places) -> Rates:
    """What the machine does in a second with a job's encoder and audio.

    Measured once for all jobs of an encoder whose audio has the same effects and is about as long (within a factor 1.5).
    """
    upstream = job.upstream.upstream
    manifest = next(iter(job.question.folds[0].fold.manifests.values()))
    length = round(math.log2(manifest.total_s / len(manifest)))
    key = (id(upstream), job.question.task.info.waveform, length)
    if key not in places.measured:
        machine = next(iter(places.measured.values()), None)
        places.measured[key] = _measured_now(job, manifest, places, machine)
    return places.measured[key]


def _measured_now(job: Job, manifest: Manifest, places: Places, machine: Rates | None) -> Rates:
    upstream = job.upstream.upstream
    store = _empty_store(job, "dev", places.device, None)
    upstream.to(places.device)
    try:
        return measure_rates(
            upstream, manifest, store.keeping, places.store, max_batch_s=places.batch_s, machine=machine
        )
    finally:
        upstream.to("cpu")


def need_of(job: Job, places: Places) -> Need:
    """What a job asks of the place its states are kept in."""
    seconds = {key: u.duration_s if not cropped else _cropped_s(job) for key, (u, cropped) in job.audio().items()}
    audio_s, total_bytes = sum(seconds.values()), job.state_bytes
    present = _present_share(job, places.store)
    budget, seeds = job.question.budget, len(job.seeds)
    reads_s = streamed_s = 0.0
    for each in job.question.folds:
        parts = {split: manifest.total_s for split, manifest in each.fold.manifests.items()}
        train = each.fold.manifests.get("train")
        mean_s = parts["train"] / len(train) if train else 0.0
        if budget.max_crop_s is not None:
            mean_s = min(mean_s, budget.max_crop_s)
        updates_s = budget.steps * budget.batch * budget.accumulate * mean_s * seeds
        evaluations = -(-budget.steps // budget.evaluate_every)
        kept_s = sum(value for split, value in parts.items() if split != "train")
        reads_s += updates_s + evaluations * parts.get(job.question.settings.select_on, 0.0) + parts.get("test", 0.0)
        streamed_s += updates_s + kept_s  # dev and test are kept
    missing = 1.0 - present
    beside = sum(overhead_bytes(manifest.ids) for manifest, _ in _disk_manifests(job).values()) if missing else 0
    return Need(
        total_bytes,
        int(total_bytes * missing) + beside,
        audio_s,
        audio_s * missing,
        reads_s,
        streamed_s,
        job.crops_anew,
        job.padded,
    )


def _cropped_s(job: Job) -> float:
    return job.crops * float(job.question.budget.max_crop_s or 0.0)


def _present_share(job: Job, store: Path | None) -> float:
    """How much of a job's states is on disk already."""
    if store is None:
        return 0.0
    info, there, total = job.upstream.upstream.info, 0, 0
    for manifest, split in _disk_manifests(job).values():
        made = _empty_store(job, split, torch.device("cpu"), store)
        total += FeatureStore.estimate_bytes(
            info, manifest, made.view, made.dtype, crops=made.crops, crop_s=made.crop_s
        )
    for folder in _folders(job, store):
        there += sum(index.with_suffix(".bin").stat().st_size for index in folder.glob("shard-*.json"))
    return min(1.0, there / total) if total else 0.0


def _folders(job: Job, store: Path) -> list[Path]:
    """The folders of a job's stores that are there, whole or in part."""
    upstream = job.upstream.upstream
    found = []
    for manifest, split in _disk_manifests(job).values():
        made = _empty_store(job, split, torch.device("cpu"), store)
        folder = store_folder(store, upstream.info.name, made.causes(upstream, manifest))
        if folder.is_dir():
            found.append(folder)
    return found


def _disk_manifests(job: Job) -> dict[str, tuple[Manifest, str]]:
    """The manifests whose states are kept on disk, by what they hold, each with one split that reads it.

    Folds that share their utterances share one store over all of them.
    """
    whole = whole_manifest(job)
    if whole is not None:
        return {"whole": (whole, "all")}
    found = {}
    for each in job.question.folds:
        for split, manifest in each.fold.manifests.items():
            found[f"{manifest.digest} {job.cropped(split)}"] = (manifest, split)
    return found


def whole_manifest(job: Job) -> Manifest | None:
    """All utterances of several folds as one manifest; None for a single fold, or where ids or folders clash."""
    manifests = [manifest for each in job.question.folds for manifest in each.fold.manifests.values()]
    if len(job.question.folds) < 2 or job.crops or len({str(manifest.root) for manifest in manifests}) != 1:
        return None
    found: dict[str, Utterance] = {}
    for manifest in manifests:
        for utterance in manifest:
            other = found.setdefault(utterance.id, utterance)
            if (other.audio, other.start_s, other.duration_s) != (
                utterance.audio,
                utterance.start_s,
                utterance.duration_s,
            ):
                return None
    return Manifest([found[name] for name in sorted(found)], manifests[0].root, f"{job.template.task} (all folds)")


def _empty_store(
    job: Job,
    split: str,
    device: torch.device,
    root: Path | None,
    memory: MutableMapping[str, Tensor] | None = None,
    limit_bytes: int | None = None,
    kind: type[FeatureStore] = FeatureStore,
) -> FeatureStore:
    info, cropped = job.question.task.info, job.cropped(split)
    anew = (job.crops_anew or job.padded) and split == "train"
    crop_s = job.question.budget.max_crop_s if cropped or anew else None
    return kind(
        root,
        view=info.view,
        dtype=job.template.feature_dtype,
        layer_norm=job.template.layer_norm,
        waveform=info.waveform,
        crops=job.crops if cropped else 0,
        crop_s=crop_s,
        crop_seed=job.crop_seed,
        memory=memory,
        device=device,
        limit_bytes=limit_bytes,
    )


@dataclass(slots=True)
class JobStores:
    """The stores of one job, made as its folds come.

    Attributes:
        job: whose they are.
        places: how states are kept.
        placed: where this job's go.
        memory: states in memory that other jobs of the upstream share.
    """

    job: Job
    places: Places
    placed: Placed
    memory: MutableMapping[str, Tensor]
    _made: dict[str, FeatureStore] = field(default_factory=dict)

    def missing(self, manifests: Mapping[str, Manifest]) -> list[tuple[str, Manifest, FeatureStore]]:
        """The stores that some splits need and that are not there: (key, manifest, empty store), each once."""
        found: dict[str, tuple[str, Manifest, FeatureStore]] = {}
        for split, manifest in manifests.items():
            key, whole = self._key(split, manifest)
            if key not in self._made:
                found.setdefault(key, (key, whole, self._empty(split)))
        return list(found.values())

    def add(self, key: str, store: FeatureStore) -> None:
        """A store that is built now; on disk, it is brought to where it is read."""
        place = self.placed.choice.place
        if store.root is not None and place in ("gpu", "memory"):
            store.load(self.places.device if place == "gpu" else torch.device("cpu"))
        self._made[key] = store

    def of(self, manifests: Mapping[str, Manifest]) -> dict[str, FeatureStore]:
        """The stores of some splits."""
        return {split: self._made[self._key(split, manifest)[0]] for split, manifest in manifests.items()}

    def close(self) -> None:
        """End what still runs."""
        for store in self._made.values():
            if isinstance(store, StreamStore):
                store.close()

    def _key(self, split: str, manifest: Manifest) -> tuple[str, Manifest]:
        whole = whole_manifest(self.job) if self.placed.persists else None
        if whole is not None:
            return "whole", whole
        anew = self.placed.choice.place == "stream" and split == "train"
        return f"{manifest.digest} {self.job.cropped(split)} {anew}", manifest

    def _empty(self, split: str) -> FeatureStore:
        """A store for a split; dev and test are kept also where training encodes anew, when memory has room."""
        if self.job.padded:
            return self._padded(split)
        place = self.placed.choice.place
        device = self.places.device if place in ("gpu", "stream") else torch.device("cpu")
        if place == "stream" and (split == "train" or not self._evaluation_fits()):
            return _empty_store(self.job, split, device, None, kind=StreamStore)
        if place == "stream":
            device = torch.device("cpu")
        root = self.places.store if self.placed.persists else None
        return _empty_store(self.job, split, device, root, self.memory if root is None else None, self._limit())

    def _padded(self, split: str) -> FeatureStore:
        """A store of s3prl's batches: train is encoded when asked for, the other splits once, whatever their size."""
        if split == "train":
            return _empty_store(self.job, split, self.places.device, None, kind=PaddedStore)
        store = _empty_store(self.job, split, torch.device("cpu"), None, kind=PaddedEvaluationStore)
        assert isinstance(store, PaddedEvaluationStore)
        store.batch = self.job.question.task.info.s3prl_batches.evaluation
        return store

    def _evaluation_fits(self) -> bool:
        free = free_memory_bytes()
        manifests = [m for each in self.job.question.folds for s, m in each.fold.manifests.items() if s != "train"]
        info, view = self.job.upstream.upstream.info, self.job.question.task.info.view
        size = sum(FeatureStore.estimate_bytes(info, m, view, self.job.template.feature_dtype) for m in manifests)
        return free is None or size <= MEMORY_SHARE * free

    def _limit(self) -> int | None:
        return self.places.limit_bytes


def make_room(placed: Iterable[tuple[Job, Placed]], places: Places) -> list[str]:
    """Delete the least recently used stores until what is written next fits under the limit, when that is asked for.

    The lines that say what was deleted.
    """
    if places.store is None or places.limit_bytes is None or not places.clean or not places.store.is_dir():
        return []
    needed = 0
    for job, each in placed:
        if each.persists:
            needed += each.need.missing_bytes
            for folder in _folders(job, places.store):
                mark_used(folder)  # what this run reads is not what it deletes
    deleted = clean_stores(places.store, max(0, places.limit_bytes - needed))
    return [
        f"deleted the store {each.path} ({readable_bytes(each.num_bytes)}): least recently used" for each in deleted
    ]


def with_question(job: Job, **changes: object) -> Job:
    """A job whose question differs."""
    return replace(job, question=replace(job.question, **changes))  # type: ignore[arg-type]
