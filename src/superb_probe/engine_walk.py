"""The walk from audio to records: extract once, train every trial of a fold in one pass, choose on dev, score on test, write."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superb_probe.engine_places import JobStores, Placed, Places
from superb_probe.engine_progress import Stage, say
from superb_probe.engine_record import Cost, failed_record, finished_record, now, write
from superb_probe.engine_request import Job, LoadedFold
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes.fit import FitResult, fit_trials
from superb_probe.probes.plan import Trial, next_rate, readable_bytes
from superb_probe.probes.store import FeatureStore
from superb_probe.results.record import Overwrite, RunRecord, existing_record, may_write
from superb_probe.upstreams.base import Upstream


@dataclass(slots=True)
class Extraction:
    """What the extraction of one job cost so far.

    Attributes:
        seconds: it took.
        encoded: waveforms put through the encoder, as its forward hook counts them; calibration is not part of it.
        audio_s: seconds of audio in the stores built.
    """

    seconds: float = 0.0
    encoded: int = 0
    audio_s: float = 0.0


@dataclass(slots=True)
class Walk:
    """Jobs carried out one after the other; states of one upstream are shared by all its jobs.

    Attributes:
        places: how states are kept.
        out: folder of the records.
        overwrite: which records may be replaced.
        control: "shuffle", or None.
        stop_hopeless: whether trials without hope are given up.
    """

    places: Places
    out: Path
    overwrite: Overwrite
    control: str | None
    stop_hopeless: bool = False
    _said: set[str] = field(default_factory=set)

    def jobs(self, jobs: Sequence[tuple[Job, Placed]]) -> list[RunRecord]:
        """The records of all jobs, in order."""
        records: list[RunRecord] = []
        memory: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        for number, (job, placed) in enumerate(jobs):
            later = {_memory_key(other) for other, _ in jobs[number:]}
            for key in memory.keys() - later:  # nobody reads them again
                del memory[key]
            for text in job.upstream.warnings:
                if text not in self._said:
                    say(f"WARNING: {text}")
                self._said.add(text)
            stores = JobStores(job, self.places, placed, memory.setdefault(_memory_key(job), {}))
            extraction = Extraction()
            try:
                with _counting(job.upstream.upstream, extraction):
                    records += self._job(job, stores, extraction)
            finally:
                stores.close()
                job.upstream.upstream.to("cpu")
        return records

    def _job(self, job: Job, stores: JobStores, extraction: Extraction) -> list[RunRecord]:
        """All trials of a job: the grid first, then what it grows by, for each layer that is read."""
        records: dict[str, RunRecord] = {}
        pending = job.trials()
        while pending:
            for each in job.question.folds:
                trials = [trial for trial in pending if trial.fold == each.fold.name]
                records.update(self._trials(job, each, trials, stores, extraction))
            pending = self._grown(job, records.values()) if job.question.may_grow else []
        return sorted(records.values(), key=_order)

    def _grown(self, job: Job, records: Iterable[RunRecord]) -> list[Trial]:
        """The trials that follow: a decade past the edge of the grid, for every layer whose best rate lies there."""
        by_layer: dict[int | None, list[RunRecord]] = {layer: [] for layer in job.layers}
        for record in records:
            by_layer[record.probe.layer].append(record)
        grown: list[Trial] = []
        for layer, found in by_layer.items():
            rate = next_rate(dev_values(found), job.question.task.info.higher_is_better)
            if rate is None:
                continue
            which = "" if layer is None else f", layer {layer}"
            say(f"{job.name}{which}: the best rate lies at the edge of the grid; trying {rate:g}")
            grown += [trial for trial in job.trials((rate,)) if trial.layer == layer]
        return grown

    def _trials(
        self, job: Job, each: LoadedFold, trials: Sequence[Trial], stores: JobStores, extraction: Extraction
    ) -> dict[str, RunRecord]:
        """The records of some trials of one fold: those on disk, and those trained now."""
        found, pending = self._finished_before(trials)
        if found:
            say(f"{job.name}: {len(found)} of {len(trials)} trials have a record already")
        if not pending:
            return found
        started_at, fit_s = now(), 0.0
        try:
            splits = self._extract(job, each, stores, extraction)
            clock = time.perf_counter()
            results = self._fit(job, each, pending, splits)
            fit_s = (time.perf_counter() - clock) / len(pending)
            cost = _cost(job, extraction, fit_s, splits, started_at)
            made = [finished_record(job, each, result, cost, self.places.device, self.out) for result in results]
            scores = {result.trial.run_id: result.score for result in results}
        except RequestError:
            raise
        except Exception as error:
            cost = _cost(job, extraction, fit_s, {}, started_at)
            found |= self._failed(job, each, pending, cost, error)
            if not isinstance(error, (CheckError, MemoryError, torch.OutOfMemoryError)):
                raise  # a defect: the records say so, the traceback says where
            return found
        for record in made:
            found[record.run_id] = write(record, scores.get(record.run_id), self.out, self.overwrite)
        return found

    def _finished_before(self, trials: Sequence[Trial]) -> tuple[dict[str, RunRecord], list[Trial]]:
        """The records that are there and stay, and the trials to run."""
        found: dict[str, RunRecord] = {}
        pending = []
        for trial in trials:
            existing = existing_record(self.out, trial.task, trial.upstream, trial.run_id)
            if existing is not None and not may_write(existing, self.overwrite):
                found[trial.run_id] = existing
            else:
                pending.append(trial)
        return found, pending

    def _failed(
        self, job: Job, each: LoadedFold, trials: Sequence[Trial], cost: Cost, error: Exception
    ) -> dict[str, RunRecord]:
        """The records of trials that all failed for one reason."""
        text = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
        say(f"FAILED: {job.name}: {text}")
        failed = [failed_record(job, each, trial, text, cost, self.places.device) for trial in trials]
        return {record.run_id: write(record, None, self.out, self.overwrite) for record in failed}

    def _extract(
        self, job: Job, each: LoadedFold, stores: JobStores, extraction: Extraction
    ) -> dict[str, FeatureStore]:
        """The stores of a fold's splits, built where they are not."""
        upstream, manifests = job.upstream.upstream, each.fold.manifests
        missing = stores.missing(manifests)
        if missing:
            upstream.to(self.places.device)
            total_s = sum(manifest.total_s for _, manifest, store in missing if store.resident)
            with Stage(f"extract {job.upstream.name} for {job.template.task}", total_s, "s of audio") as stage:
                for key, manifest, store in missing:
                    store.build(upstream, manifest, max_batch_s=self.places.batch_s, progress=stage.advance, say=say)
                    extraction.seconds += store.extract_s
                    extraction.audio_s += store.audio_s
                    stage.note = store.clock.limiting() or stage.note
                    stores.add(key, store)
        return stores.of(manifests)

    def _fit(
        self, job: Job, each: LoadedFold, trials: Sequence[Trial], splits: Mapping[str, FeatureStore]
    ) -> list[FitResult]:
        rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(trial.lr for trial in trials))
        size = readable_bytes(sum(store.num_bytes for store in {id(each): each for each in splits.values()}.values()))
        question, info = job.question, job.upstream.upstream.info
        say(f"{job.name}: {len(trials)} trials, lr {rates}, states {size} {job.template.feature_dtype}")
        shared: dict[str, Any] = {"select_on": question.settings.select_on, "device": self.places.device}
        if not question.task.info.trained:
            score = importlib.import_module("superb_probe.probes.untrained").score_untrained
            with Stage(f"score {job.template.task} on {job.upstream.name}", len(trials), "layers") as stage:
                return score(  # type: ignore[no-any-return]
                    trials, question.task, each.fold, each.labels, splits, info, progress=stage.advance, **shared
                )
        steps = len(trials) * question.budget.steps
        with Stage(f"train {job.template.task} on {job.upstream.name}", steps, "updates") as stage:
            return fit_trials(
                trials,
                question.task,
                each.fold,
                each.labels,
                splits,
                info,
                question.budget,
                control=self.control,
                progress=stage.advance,
                stop_hopeless=self.stop_hopeless,
                composed=job.padded,
                **shared,
            )


@contextmanager
def _counting(upstream: Upstream, extraction: Extraction) -> Iterator[None]:
    """Counts the waveforms an upstream encodes, by a hook on its forward, while it lasts."""

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        extraction.encoded += int(arguments[0].shape[0])

    handle = upstream.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _cost(job: Job, extraction: Extraction, fit_s: float, splits: Mapping[str, FeatureStore], started_at: str) -> Cost:
    stores = {id(store): store for store in splits.values()}.values()
    passes = round(extraction.encoded / len(job.audio()), 6)
    return Cost(
        extraction.seconds, fit_s, sum(store.num_bytes for store in stores), started_at, passes, extraction.audio_s
    )


def _order(record: RunRecord) -> tuple[Any, ...]:
    layer = -1 if record.probe.layer is None else record.probe.layer
    return str(record.task.fold), record.probe.seed, layer, -record.probe.lr


def _memory_key(job: Job) -> tuple[Any, ...]:
    info = job.question.task.info
    mean_of_normed = job.template.layer_norm and info.view == "mean"
    return (id(job.upstream), info.view, info.waveform, job.template.feature_dtype, mean_of_normed)


def dev_values(records: Iterable[RunRecord]) -> dict[float, float | None]:
    """The mean selecting metric of each learning rate over folds and seeds; None where a trial failed."""
    values: dict[float, list[float | None]] = {}
    for record in records:
        selected = None if record.selection is None or record.status == "failed" else record.selection.value
        values.setdefault(record.probe.lr, []).append(selected)
    return {
        lr: None if None in found else statistics.fmean(value for value in found if value is not None)
        for lr, found in values.items()
    }
