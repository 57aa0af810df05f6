"""`superb_probe.run`: plan, extract once, train every trial, choose on dev, score on test, write records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from superb_probe.engine_ask import Problems, Request, choose_device
from superb_probe.engine_estimate import Estimate, estimate_jobs, fit_into
from superb_probe.engine_places import Placed, Places, make_room
from superb_probe.engine_progress import say
from superb_probe.engine_record import exact_arithmetic
from superb_probe.engine_request import Job, resolve
from superb_probe.engine_walk import Walk
from superb_probe.errors import RequestError
from superb_probe.probes.plan import PlanRow, describe_plan
from superb_probe.probes.planner import Place
from superb_probe.results.record import Overwrite, RunRecord, record_path
from superb_probe.upstreams.base import Upstream


def run(
    upstream: str | Upstream | Sequence[str | Upstream],
    task: str | Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
    data: Mapping[str, Path] | None = None,
    manifest: Mapping[str, Path] | None = None,
    root: Path | None = None,
    head: str | None = None,
    head_option: Mapping[str, Any] | None = None,
    layer: int | Literal["all"] | None = None,
    layer_norm: bool = False,
    feature_dtype: str = "float16",
    crops: int | None = None,
    crop_seed: int = 0,
    size: str | None = None,
    random: int | None = None,
    upstream_option: Mapping[str, Any] | None = None,
    budget: str | None = None,
    steps: int | None = None,
    lr: Sequence[float] | None = None,
    seed: Sequence[int] = (1,),
    protocol: str = "strict",
    control: str | None = None,
    stop_hopeless: bool = False,
    device: str = "auto",
    out: Path | None = None,
    store: Path | None = None,
    store_limit: str | int | None = None,
    store_clean: bool = False,
    states: Place | None = None,
    padding: Literal["exact", "s3prl"] = "exact",
    limit: int | None = None,
    tier: Literal["quick"] | None = None,
    time_limit: str | float | None = None,
    overwrite: Overwrite = "never",
    dry_run: bool = False,
) -> list[RunRecord]:
    """Plan, extract once, train every trial, select on dev, score on test, write records: `superb-probe run` from Python.

    Each argument is the flag of that name; `superb_probe.engine_ask.Request` says what it is and which values it takes.
    What is asked: `upstream` (with `checkpoint`, `size`, `random`, `upstream_option`), `task` or `tier`, `protocol`, `control`.
    On what: the embedded corpus, or `data` or `manifest` and `root`; `limit`.
    With which probes: `head`, `head_option`, `layer`, `layer_norm`, `budget`, `steps`, `lr`, `seed`, `crops`, `crop_seed`,
    `stop_hopeless`.
    With which states: `feature_dtype`, `padding`, `states`, `store`, `store_limit`, `store_clean`.
    How: `device`, `out`, `overwrite`, `time_limit`, `dry_run`.

    Returns:
        One record a trial, failed ones included.

    Raises:
        RequestError: with everything wrong in the request, before anything is extracted.
    """
    return _run(Request(**locals()))


def _run(request: Request) -> list[RunRecord]:
    """Resolve, place, plan, walk."""
    problems = Problems()
    jobs = resolve(request, problems)
    problems.raise_any()
    device = choose_device(request.device)
    places = Places(device, request.store_folder, request.limit_bytes, request.store_clean, request.states)  # type: ignore[arg-type]
    timed = request.dry_run or request.limit_s is not None
    with exact_arithmetic(device):
        made = [problems.attempt(partial(places.choose, job, measure=timed)) for job in jobs]
        problems.raise_any()
        planned = [(job, placed) for job, placed in zip(jobs, made, strict=True) if placed is not None]
        if timed:
            estimates = estimate_jobs(planned, device, request.control)
            if request.limit_s is not None:
                planned, estimates = _fitted(planned, estimates, request.limit_s)
        if request.dry_run:
            rows = [
                _row(job, placed, cost, request.out_folder)
                for (job, placed), cost in zip(planned, estimates, strict=True)
            ]
            print(describe_plan(rows))
            return []
        for job, placed in planned:
            say(f"{job.name}: states in {placed.choice.reason}")
            if placed.rates is not None:
                say(f"{job.name}: measured {placed.rates.describe()}")
        for line in make_room(planned, places):
            say(line)
        walk = Walk(places, request.out_folder, request.overwrite, request.control, request.stop_hopeless)
        return walk.jobs(planned)


def _fitted(
    planned: Sequence[tuple[Job, Placed]], estimates: Sequence[Estimate], limit_s: float
) -> tuple[list[tuple[Job, Placed]], list[Estimate]]:
    """What of a plan fits into a time; what is dropped is said.

    Raises:
        RequestError: if not even one trial does.
    """
    jobs, costs, dropped = fit_into([job for job, _ in planned], estimates, limit_s)
    for line in dropped:
        say(f"--time-limit drops {line}")
    if not jobs:
        raise RequestError(f"--time-limit {limit_s / 60:.0f} min: no trial fits. Fix: a longer time, or --limit N")
    kept = {job.name: placed for job, placed in planned}
    return [(job, kept[job.name]) for job in jobs], costs


def _row(job: Job, placed: Placed, cost: Estimate, out: Path) -> PlanRow:
    trials = job.trials()
    missing = placed.need.missing_s / placed.need.audio_s if placed.need.audio_s else 0.0
    rates = "" if placed.rates is None else f" ({placed.rates.describe()})"
    return PlanRow(
        upstream=job.upstream.name,
        task=job.template.task,
        dataset=job.question.dataset,
        protocol=job.template.protocol,
        budget=job.question.budget_name,
        trials=len(trials),
        finished=sum(record_path(out, trial.task, trial.upstream, trial.run_id).is_file() for trial in trials),
        lr=tuple(job.question.rates),
        seed=job.seeds,
        layers=len(job.layers),
        utterances=len(job.audio()),
        extractions=round(len(job.audio()) * missing),
        audio_s=placed.need.audio_s,
        state_bytes=placed.need.state_bytes,
        place=f"{placed.choice.reason}{rates}",
        extract_s=cost.extract_s,
        fit_s=cost.fit_s,
        may_grow=job.question.may_grow,
    )
