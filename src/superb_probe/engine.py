"""The walk from audio to records: plan, extract once, train every trial, choose on dev, score on test, write."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superb_probe.engine_progress import Stage, say
from superb_probe.engine_record import Cost, exact_arithmetic, failed_record, finished_record, now, write
from superb_probe.engine_request import (
    Job,
    LoadedFold,
    Problems,
    check_out,
    choose_device,
    make_job,
    memory_problem,
    raise_short,
    resolve_question,
    resolve_upstream,
)
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes.fit import fit_trials
from superb_probe.probes.plan import PlanRow, Trial, describe_plan, next_rate, plan_trials, readable_bytes
from superb_probe.probes.store import FeatureStore
from superb_probe.results.record import Overwrite, RunRecord, existing_record, may_write, record_path
from superb_probe.upstreams.base import Upstream

DEFAULT_OUT = Path("results/runs")


def run(
    upstream: str | Upstream | Sequence[str | Upstream],
    task: str | Sequence[str],
    *,
    checkpoint: Path | None = None,
    data: Mapping[str, Path] | None = None,
    manifest: Mapping[str, Path] | None = None,
    root: Path | None = None,
    head: str | None = None,
    layer: int | None = None,
    layer_norm: bool = False,
    size: str | None = None,
    random: int | None = None,
    upstream_option: Mapping[str, Any] | None = None,
    budget: str | None = None,
    steps: int | None = None,
    lr: Sequence[float] | None = None,
    seed: Sequence[int] = (1,),
    protocol: str = "strict",
    control: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    store: Path | None = None,
    limit: int | None = None,
    overwrite: Overwrite = "never",
    dry_run: bool = False,
) -> list[RunRecord]:
    """Plan, extract once, train every trial, select on dev, score on test, write records.

    Args:
        upstream: names or `Upstream` objects.
        task: names.
        checkpoint: weights of the one upstream that is named.
        data: corpus folders by name; none: the embedded corpus.
        manifest: your own data: TSVs by "train", "dev", "test", "trials", "dev_trials".
        root: what the manifests' audio is relative to; None: each TSV's own folder.
        head: the head, by name; None: the task's.
        layer: read one layer instead of the weighted sum of all.
        layer_norm: normalise every frame of every layer first.
        size: of an upstream without a checkpoint: "test", "tiny", "small" or "base".
        random: seed of random weights.
        upstream_option: the upstream's own options.
        budget: "small" or "full"; None: small under 10 hours of training audio and on `mini`.
        steps: optimiser updates instead of the budget's; the record's budget is then named after them ("full:2000").
        lr: learning rates; None: the protocol's grid, which grows while the best on dev lies at its edge.
        seed: seeds of the probes.
        protocol: "strict", "superb" or "mamba_hubert".
        control: "shuffle" trains on permuted labels.
        device: "auto", "cpu", "cuda" or "cuda:N".
        out: folder of the records; None: results/runs.
        store: folder of extracted states; None keeps them in memory.
        limit: use only the first utterances of each split.
        overwrite: "never" returns a trial's record where there is one; "failed" runs failed trials again, "always" all.
        dry_run: print the plan and return nothing.

    Returns:
        One record a trial, failed ones included.

    Raises:
        RequestError: with everything wrong in the request, before anything is extracted.
    """
    names = [upstream] if isinstance(upstream, (str, Upstream)) else list(upstream)
    tasks = [task] if isinstance(task, str) else list(task)
    out = Path(out) if out is not None else DEFAULT_OUT
    problems = Problems()
    _check_values(problems, names, tasks, checkpoint, lr, seed, limit, steps, control, overwrite)
    chosen = problems.attempt(partial(choose_device, device))
    if not dry_run:
        problems.attempt(partial(check_out, out))
    load = partial(
        resolve_upstream, checkpoint=checkpoint, size=size, random=random, options=dict(upstream_option or {})
    )
    loaded = [problems.attempt(partial(load, name)) for name in names]
    ask = partial(resolve_question, data=data, manifest=manifest, root=root, protocol=protocol, budget=budget)
    ask = partial(ask, steps=steps, lr=lr, limit=limit, control=control)
    questions = [problems.attempt(partial(ask, name)) for name in dict.fromkeys(tasks)]
    make = partial(make_job, head=head, layer=layer, layer_norm=layer_norm, protocol=protocol, control=control)
    made = [
        problems.attempt(partial(make, each, question))
        for each in loaded
        if each is not None
        for question in questions
        if question is not None
    ]
    jobs = [job for job in made if job is not None]
    problems.attempt(partial(raise_short, jobs))
    if store is None and jobs and (text := memory_problem(jobs)):
        problems.found.append(RequestError(text))
    problems.raise_any()
    assert chosen is not None
    seeds = tuple(dict.fromkeys(seed))
    if dry_run:
        print(describe_plan([_plan_row(job, seeds, out) for job in jobs]))
        return []
    walk = _Walk(chosen, out, Path(store) if store is not None else None, overwrite, control, seeds)
    with exact_arithmetic(chosen):
        return walk.jobs(jobs)


def _check_values(
    problems: Problems,
    names: Sequence[str | Upstream],
    tasks: Sequence[str],
    checkpoint: Path | None,
    lr: Sequence[float] | None,
    seed: Sequence[int],
    limit: int | None,
    steps: int | None,
    control: str | None,
    overwrite: str,
) -> None:
    """Note what is wrong with the plain values of a request."""
    wrong = []
    if not names or not tasks:
        wrong.append("name at least one upstream and one task")
    if checkpoint is not None and len(names) != 1:
        wrong.append(f"--checkpoint goes with one upstream, {len(names)} are named")
    if lr is not None and (not lr or not all(0 < rate < float("inf") for rate in lr)):
        wrong.append(f"--lr {' '.join(map(str, lr))}: learning rates are positive numbers")
    if not seed or any(number < 0 or number >= 2**31 for number in seed):
        wrong.append(f"--seed {' '.join(map(str, seed))}: seeds are whole numbers from 0 to {2**31 - 1}")
    if limit is not None and limit < 1:
        wrong.append(f"--limit {limit}: at least 1")
    if steps is not None and steps < 1:
        wrong.append(f"--steps {steps}: at least 1")
    if control not in (None, "shuffle"):
        wrong.append(f"--control {control}: the one control is shuffle")
    if overwrite not in ("never", "failed", "always"):
        wrong.append(f"--overwrite {overwrite}: never, failed or always")
    problems.found += [RequestError(text) for text in wrong]


def _planned(job: Job, rates: Sequence[float], seeds: Sequence[int]) -> list[Trial]:
    return plan_trials(job.template, [(each.fold.name, each.digest) for each in job.question.folds], rates, seeds)


def _plan_row(job: Job, seeds: tuple[int, ...], out: Path) -> PlanRow:
    trials = _planned(job, job.question.rates, seeds)
    manifests = {m.digest: m for each in job.question.folds for m in each.fold.manifests.values()}
    return PlanRow(
        upstream=job.upstream.name,
        task=job.template.task,
        dataset=job.question.dataset,
        protocol=job.template.protocol,
        budget=job.question.budget_name,
        trials=len(trials),
        finished=sum(record_path(out, trial.task, trial.upstream, trial.run_id).is_file() for trial in trials),
        lr=tuple(job.question.rates),
        seed=seeds,
        utterances=sum(len(manifest) for manifest in manifests.values()),
        audio_s=sum(manifest.total_s for manifest in manifests.values()),
        state_bytes=job.state_bytes,
    )


@dataclass(slots=True)
class _Walk:
    """Jobs carried out one after the other; states of one upstream are shared by all its jobs."""

    device: torch.device
    out: Path
    store: Path | None
    overwrite: Overwrite
    control: str | None
    seeds: tuple[int, ...]

    def jobs(self, jobs: Sequence[Job]) -> list[RunRecord]:
        """The records of all jobs, in order."""
        records: list[RunRecord] = []
        memory: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        for number, job in enumerate(jobs):
            later = {_memory_key(other) for other in jobs[number:]}
            for key in memory.keys() - later:  # nobody reads them again
                del memory[key]
            for text in job.upstream.warnings:
                say(f"WARNING: {text}")
            records += self._job(job, memory.setdefault(_memory_key(job), {}))
        return records

    def _job(self, job: Job, memory: dict[str, Tensor]) -> list[RunRecord]:
        """All trials of a job: the grid first, then what it grows by."""
        rates = tuple(dict.fromkeys(job.question.rates))
        stores: dict[str, FeatureStore] = {}
        records: dict[str, RunRecord] = {}
        extracted = _Extraction()
        try:
            while rates:
                for each in job.question.folds:
                    trials = [t for t in _planned(job, rates, self.seeds) if t.fold == each.fold.name]
                    records.update(self._trials(job, each, trials, stores, memory, extracted))
                grown = (
                    next_rate(dev_values(records.values()), job.question.task.info.higher_is_better)
                    if job.question.may_grow
                    else None
                )
                rates = () if grown is None else (grown,)
                if grown is not None:
                    say(
                        f"{job.template.task}, {job.upstream.name}: the best rate lies at the edge of the grid; trying {grown:g}"
                    )
        finally:
            job.upstream.upstream.to("cpu")
        return sorted(records.values(), key=lambda r: (str(r.task.fold), r.probe.seed, -r.probe.lr))

    def _trials(
        self,
        job: Job,
        each: LoadedFold,
        trials: Sequence[Trial],
        stores: dict[str, FeatureStore],
        memory: dict[str, Tensor],
        extracted: _Extraction,
    ) -> dict[str, RunRecord]:
        """The records of some trials of one fold: those on disk, and those trained now."""
        found: dict[str, RunRecord] = {}
        pending = []
        for trial in trials:
            existing = existing_record(self.out, trial.task, trial.upstream, trial.run_id)
            if existing is not None and not may_write(existing, self.overwrite):
                found[trial.run_id] = existing
            else:
                pending.append(trial)
        if found:
            say(f"{job.template.task}, {job.upstream.name}: {len(found)} of {len(trials)} trials have a record already")
        if not pending:
            return found
        started_at, fit_s = now(), 0.0
        scores = {}
        try:
            splits = self._extract(job, each, stores, memory, extracted)
            clock = time.perf_counter()
            results = self._fit(job, each, pending, splits)
            fit_s = (time.perf_counter() - clock) / len(pending)
            cost = Cost(extracted.seconds, fit_s, sum(s.num_bytes for s in splits.values()), started_at)
            made = [finished_record(job, each, result, cost, self.device, self.out) for result in results]
            scores = {result.trial.run_id: result.score for result in results}
        except RequestError:
            raise
        except Exception as error:
            cost = Cost(extracted.seconds, fit_s, 0, started_at)
            text = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
            say(f"FAILED: {job.template.task}, {job.upstream.name}: {text}")
            failed = [failed_record(job, each, trial, text, cost, self.device) for trial in pending]
            found |= {record.run_id: write(record, None, self.out, self.overwrite) for record in failed}
            if not isinstance(error, (CheckError, MemoryError, torch.OutOfMemoryError)):
                raise  # a defect: the records say so, the traceback says where
            return found
        for record in made:
            found[record.run_id] = write(record, scores.get(record.run_id), self.out, self.overwrite)
        return found

    def _extract(
        self,
        job: Job,
        each: LoadedFold,
        stores: dict[str, FeatureStore],
        memory: dict[str, Tensor],
        extracted: _Extraction,
    ) -> dict[str, FeatureStore]:
        """The stores of a fold's splits, built where they are not."""
        template, upstream = job.template, job.upstream.upstream
        manifests = each.fold.manifests
        missing = [m for m in manifests.values() if m.digest not in stores]
        if missing:
            upstream.to(self.device)
            batch_s = 60.0 if self.device.type == "cpu" else 120.0  # half the peak memory, at the same speed on a CPU
            stage = Stage(
                f"extract {job.upstream.name} for {template.task}", sum(m.total_s for m in missing), "s of audio"
            )
            with stage:
                for manifest in missing:
                    made = FeatureStore(
                        self.store,
                        view=job.question.task.info.view,
                        dtype=template.feature_dtype,
                        layer_norm=template.layer_norm,
                        waveform=job.question.task.info.waveform,
                        memory=memory,
                        device=self._states_device(job),
                    )
                    made.build(upstream, manifest, max_batch_s=batch_s, progress=stage.advance)
                    extracted.seconds += made.extract_s
                    stores[manifest.digest] = made
        return {split: stores[manifest.digest] for split, manifest in manifests.items()}

    def _states_device(self, job: Job) -> torch.device:
        """Where states in memory are kept: on the GPU when they fill no more than half of what is free there."""
        if self.device.type == "cuda" and job.state_bytes < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            return self.device
        return torch.device("cpu")

    def _fit(
        self, job: Job, each: LoadedFold, trials: Sequence[Trial], splits: Mapping[str, FeatureStore]
    ) -> list[Any]:
        rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(trial.lr for trial in trials))
        size = readable_bytes(sum(store.num_bytes for store in splits.values()))
        say(
            f"{job.template.task}, {job.upstream.name}: {len(trials)} trials, lr {rates}, states {size} {job.template.feature_dtype}"
        )
        with Stage(
            f"train {job.template.task} on {job.upstream.name}", len(trials) * job.question.budget.steps, "updates"
        ) as stage:
            return fit_trials(
                trials,
                job.question.task,
                each.fold,
                each.labels,
                splits,
                job.upstream.upstream.info,
                job.question.budget,
                select_on=job.question.settings.select_on,
                control=self.control,
                device=self.device,
                progress=stage.advance,
            )


@dataclass(slots=True)
class _Extraction:
    """Seconds spent on extraction for one job."""

    seconds: float = 0.0


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
