"""How long a job will take: a few updates and evaluations of its own trials are timed, on fabricated states of the real shape."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.manifest import Manifest
from superb_probe.engine_places import Placed, with_question
from superb_probe.engine_record import interval
from superb_probe.engine_request import Job, LoadedFold
from superb_probe.engine_subset import even_ids, spread
from superb_probe.probes.fit import FitResult, fit_trials
from superb_probe.probes.plan import Trial
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_codec import pack
from superb_probe.probes.untrained import DOCUMENT, QUERY, search_split

SAMPLE = 96  # utterances of a split that are timed
TIMED_S = 1.0  # about how long updates are timed
QUERIES, DOCUMENTS = 6, 48  # that are searched when nothing is trained


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds a job will take.

    Attributes:
        extract_s: for extraction.
        fit_s: for training, evaluation and scoring of all trials.
        trials: how many those are.
    """

    extract_s: float
    fit_s: float
    trials: int

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.extract_s + self.fit_s


class FabricatedStore(FeatureStore):
    """States of the right shape and type, and no meaning: what timing needs."""

    def __init__(self, job: Job, manifest: Manifest, split: str, device: torch.device) -> None:
        """For the utterances of a manifest, on a device."""
        info, task = job.upstream.upstream.info, job.question.task.info
        super().__init__(
            view=task.view, dtype=job.template.feature_dtype, layer_norm=job.template.layer_norm, device=device
        )
        self._shape = (info.num_layers, info.dim)
        frames = (job.upstream.upstream.num_frames(round(u.duration_s * info.sample_rate_hz)) for u in manifest)
        if hasattr(job.upstream.upstream, "states_for"):
            frames = (int(u.duration_s * info.sample_rate_hz) // info.hop_samples for u in manifest)
        self._lengths = {
            u.id: 1 if task.view == "mean" else max(1, count) for u, count in zip(manifest, frames, strict=True)
        }
        generator = torch.Generator().manual_seed(len(manifest))
        longest = max(self._lengths.values())
        self._buffer = pack(torch.randn(info.num_layers, longest, info.dim, generator=generator), self.dtype).to(device)
        self._crops = job.crops if job.cropped(split) else 0

    def fetch_packed(self, ids: Sequence[str], generator: torch.Generator | None = None) -> list[Tensor]:
        """A part of one buffer for every utterance."""
        parts = [self._buffer[:, : self._lengths[name]] for name in ids]
        if self.view == "frames":
            return parts
        return [part.transpose(0, 1).expand(self._crops, -1, -1) if self._crops else part[:, 0] for part in parts]

    def num_frames(self, utterance_id: str) -> int:
        """Frames of an utterance."""
        return self._lengths[utterance_id]


def estimate_jobs(planned: Sequence[tuple[Job, Placed]], device: torch.device, control: str | None) -> list[Estimate]:
    """The seconds each job will take, all folds and planned trials; growth of the grid is not part of it.

    Trials of one task on encoders of one shape are timed once.
    """
    timed: dict[tuple[Hashable, ...], float] = {}
    found = []
    for job, placed in planned:
        key = _timing_key(job, placed)
        if key not in timed:
            timed[key] = _time_trials(job, placed, device, control)
        found.append(_estimate(job, placed, timed[key]))
    return found


def _timing_key(job: Job, placed: Placed) -> tuple[Hashable, ...]:
    """What the seconds of training and scoring depend on."""
    info, question = job.upstream.upstream.info, job.question
    template = replace(job.template, upstream="", upstream_revision="", upstream_options={})
    asked = (repr(template), repr(question.budget), repr(question.settings), tuple(question.rates))
    return (*asked, job.seeds, job.layers, job.crops, placed.choice.place, info.num_layers, info.dim, info.hop_samples)


def _time_trials(job: Job, placed: Placed, device: torch.device, control: str | None) -> float:
    """Seconds of training, evaluation and scoring of all folds."""
    folds = job.question.folds
    if not job.question.task.info.trained:
        return sum(_time_untrained(job, each, device) for each in folds)
    return _time_fold(job, folds[0], placed, device, control) * len(folds)


def _estimate(job: Job, placed: Placed, fit_s: float) -> Estimate:
    trials, rates = len(job.trials()), placed.rates
    extract_s = 0.0 if rates is None else placed.need.missing_s / rates.encode
    if not job.question.task.info.trained:
        return Estimate(extract_s, fit_s, trials)
    if rates is not None:
        seconds = placed.choice.seconds
        if placed.choice.place == "stream":
            extract_s, fit_s = 0.0, fit_s + seconds["stream"]
        elif placed.choice.place == "disk":
            fit_s += seconds["disk"] - extract_s
    return Estimate(extract_s, fit_s, trials)


def _time_fold(job: Job, each: LoadedFold, placed: Placed, device: torch.device, control: str | None) -> float:
    """Seconds of training, evaluation and scoring of one fold's trials."""
    timer = _Timer(job, each, placed, device, control)
    timer.run(1)  # warms up
    short_s, results = timer.run(2)
    budget, steps = job.question.budget, 4
    while True:
        steps = min(max(steps, 3), max(3, budget.steps))
        long_s, results = timer.run(steps)
        if long_s - short_s >= TIMED_S or steps >= budget.steps or long_s > 4 * TIMED_S:
            break
        per_update = max((long_s - short_s) / (steps - 2), 1e-5)
        steps = max(2 * steps, math.ceil(1.2 * TIMED_S / per_update))
    update_s = max(0.0, (long_s - short_s) / (steps - 2))
    rest_s = max(0.0, short_s - 2 * update_s)  # one evaluation of each split
    select = job.question.settings.select_on
    weight = {split: timer.frames(timer.sample, split) for split in (select, "test")}
    per_frame = rest_s / sum(weight.values()) if select != "test" else rest_s / (2 * weight["test"])
    whole = {split: timer.frames(each.fold, split) for split in (select, "test")}
    evaluations = -(-budget.steps // budget.evaluate_every)
    scoring_s = _time_scoring(job, results, each.fold, timer.sample)
    return budget.steps * update_s + per_frame * (evaluations * whole[select] + whole["test"]) + scoring_s


def _time_untrained(job: Job, each: LoadedFold, device: torch.device) -> float:
    """Seconds of searching some queries in some documents, scaled by the products of their lengths, and of scoring every layer."""
    fold, layers, task = each.fold, len(job.layers), job.question.task
    splits = dict.fromkeys((job.question.settings.select_on, "test"))
    seconds, scored = 0.0, 0.0
    for split in splits:
        manifest = fold.manifests[split]
        sample = _some_of_each_role(manifest)
        states = States(FabricatedStore(job, sample, split, torch.device("cpu")), sample.ids, None, device)
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            search_split(states, sample)
            taken = time.perf_counter() - started
        seconds += taken * _products(manifest) / _products(sample)
        scored += _products(manifest)
    documents = sum(u.labels["role"] == DOCUMENT for u in fold.manifests["test"])
    random = np.random.default_rng(0)
    made = {u.id: random.normal(size=documents) for u in fold.manifests["test"] if u.labels["role"] == QUERY}
    started = time.perf_counter()
    score = task.score(made, fold, "test")
    score_s = time.perf_counter() - started
    interval(task, score)
    interval_s = time.perf_counter() - started - score_s
    return seconds + layers * (score_s * scored / _products(fold.manifests["test"]) + interval_s)


def _some_of_each_role(manifest: Manifest) -> Manifest:
    """At most `QUERIES` queries and `DOCUMENTS` documents, in even steps over their durations."""
    kept: list[str] = []
    for role, count in ((QUERY, QUERIES), (DOCUMENT, DOCUMENTS)):
        kept += even_ids(manifest.keep([u.id for u in manifest if u.labels["role"] == role]), count)
    return manifest.keep(kept)


def _products(manifest: Manifest) -> float:
    """Seconds of all queries times seconds of all documents: what a search goes through."""
    totals = {role: sum(u.duration_s for u in manifest if u.labels["role"] == role) for role in (QUERY, DOCUMENT)}
    return totals[QUERY] * totals[DOCUMENT]


class _Timer:
    """Runs the trials of one fold for a few updates, with an evaluation of each split at the end."""

    def __init__(self, job: Job, each: LoadedFold, placed: Placed, device: torch.device, control: str | None) -> None:
        self.job, self.each, self.device, self.control = job, each, device, control
        kept = device if placed.choice.place in ("gpu", "stream") else torch.device("cpu")
        budget = job.question.budget
        self.sample = spread(each.fold, {"train": max(SAMPLE, 4 * budget.batch), "dev": SAMPLE, "test": SAMPLE})
        self.stores = {
            split: FabricatedStore(job, manifest, split, kept) for split, manifest in self.sample.manifests.items()
        }
        trials = [trial for trial in job.trials() if trial.fold == each.fold.name]
        # so small a rate changes nothing: the numbers stay finite, whatever the states
        self.trials: list[Trial] = [replace(trial, lr=1e-9 * (1 + n)) for n, trial in enumerate(trials)]

    def run(self, steps: int) -> tuple[float, list[FitResult]]:
        """Seconds and results of so many updates."""
        question = self.job.question
        started = time.perf_counter()
        results = fit_trials(
            self.trials,
            question.task,
            self.sample,
            self.each.labels,
            self.stores,
            self.job.upstream.upstream.info,
            replace(question.budget, steps=steps, evaluate_every=steps),
            select_on=question.settings.select_on,
            control=self.control,
            device=self.device,
        )
        return time.perf_counter() - started, results

    def frames(self, fold: Fold, split: str) -> float:
        """What an evaluation of a split goes through, in utterances of a view "mean" or seconds of audio."""
        manifest = fold.manifests[split]
        return len(manifest) if self.job.question.task.info.view == "mean" else manifest.total_s


def _time_scoring(job: Job, results: Sequence[FitResult], whole: Fold, sample: Fold) -> float:
    """Seconds for the intervals of all trials' scores."""
    score = next((result.score for result in results if result.score is not None), None)
    if score is None:
        return 0.0
    started = time.perf_counter()
    interval(job.question.task, score)
    items = len(sample.trials.get("test", sample.manifests["test"]))
    share = len(whole.trials.get("test", whole.manifests["test"])) / max(1, items)
    return (time.perf_counter() - started) * share * len(results)


def fit_into(
    jobs: Sequence[Job], estimates: Sequence[Estimate], limit_s: float
) -> tuple[list[Job], list[Estimate], list[str]]:
    """The part of a plan that fits into a time: jobs, their estimates, and what was dropped.

    Dropped first are the last seeds, then the probes of single layers, then the learning rates farthest from the protocol's own,
    then the last tasks.
    """
    kept, costs, dropped = list(jobs), list(estimates), []
    while kept and sum(cost.total_s for cost in costs) > limit_s:
        number = _largest(kept, lambda job: len(job.seeds))
        if len(kept[number].seeds) > 1:
            job, what = replace(kept[number], seeds=kept[number].seeds[:-1]), f"seed {kept[number].seeds[-1]}"
        elif len(kept[number := _largest(kept, lambda job: len(job.layers))].layers) > 1:
            job, what = replace(kept[number], layers=kept[number].layers[:1]), "the probes of single layers"
        elif len(kept[number := _largest(kept, lambda job: len(job.question.rates))].question.rates) > 1:
            far = _farthest(kept[number])
            rates = tuple(rate for rate in kept[number].question.rates if rate != far)
            job, what = with_question(kept[number], rates=rates), f"lr {far:g}"
        else:
            dropped.append(f"{kept.pop().name}, which would take {costs.pop().total_s / 60:.1f} min")
            continue
        dropped.append(f"{what} of {job.name}")
        told = tuple(text for text in job.question.deviations if not text.startswith("--time-limit"))
        left_out = ", ".join(
            line.removesuffix(f" of {job.name}") for line in dropped if line.endswith(f" of {job.name}")
        )
        kept[number] = with_question(job, deviations=(*told, f"--time-limit left out {left_out}"), may_grow=False)
        share = len(job.trials()) / costs[number].trials
        costs[number] = Estimate(costs[number].extract_s, costs[number].fit_s * share, len(job.trials()))
    return kept, costs, dropped


def _largest(jobs: Sequence[Job], measure: object) -> int:
    sizes = [measure(job) for job in jobs]  # type: ignore[operator]
    return max(range(len(jobs)), key=lambda number: (sizes[number], number))


def _farthest(job: Job) -> float:
    default = math.log10(job.question.settings.default_lr)
    return max(job.question.rates, key=lambda rate: (round(abs(math.log10(rate) - default), 6), -rate))
