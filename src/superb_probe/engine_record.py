"""From a trial's result to its record: scores with intervals, weights, costs, the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import superb_probe
from superb_probe.downstreams.base import Score, Task
from superb_probe.engine_request import Job, LoadedFold
from superb_probe.probes.fit import FitResult
from superb_probe.probes.metrics import UndefinedMetric
from superb_probe.probes.plan import Trial
from superb_probe.probes.statistics import bootstrap
from superb_probe.results.overlap import overlap_warning, upstream_overlap
from superb_probe.results.record import (
    CostPart,
    EnvironmentPart,
    Overwrite,
    ProbePart,
    RunRecord,
    ScorePart,
    SelectionPart,
    TaskPart,
    UpstreamPart,
    WeightsPart,
    record_path,
    write_record,
)
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.macs import macs_per_second

_PACKAGES = ("numpy", "soundfile", "safetensors", "transformers", "scikit-learn", "scipy", "rapidfuzz")
_MEMORY_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class Cost:
    """What the trials of one fit cost, each its share of the training.

    Attributes:
        extract_s: seconds of extraction, for all trials of the task.
        fit_s: seconds of training of one trial.
        store_bytes: what the states take.
        started_at: when the trials began.
        encoder_passes: how often an utterance went through the encoder, on average over the task's utterances.
        audio_s: seconds of audio that were encoded.
    """

    extract_s: float
    fit_s: float
    store_bytes: int
    started_at: str
    encoder_passes: float | None = None
    audio_s: float | None = None


def now() -> str:
    """The time in UTC, as records write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def failed_record(job: Job, each: LoadedFold, trial: Trial, error: str, cost: Cost, device: torch.device) -> RunRecord:
    """The record of a trial that gave no number."""
    return _record(job, each, trial, cost, device, status="failed", error=error)


def finished_record(
    job: Job, each: LoadedFold, result: FitResult, cost: Cost, device: torch.device, out: Path
) -> RunRecord:
    """The record of a trial, its probe written beside where the record will be; a diverged one is a failed record."""
    trial = result.trial
    if result.error is not None or result.score is None or result.selected is None:
        return _record(
            job, each, trial, cost, device, status="failed", error=result.error, params=result.trainable_params
        )
    settings, task = job.question.settings, job.question.task
    low_high, method = interval(task, result.score)
    return _record(
        job,
        each,
        trial,
        cost,
        device,
        status="finished",
        params=result.trainable_params,
        num_items={"test": _num_items(result.score)},
        selection=SelectionPart(
            settings.select_on,  # type: ignore[arg-type]
            settings.select_metric or task.info.metric,
            result.step,
            result.selected,
            result.curve,
        ),
        score=ScorePart("test", float(result.score.value), low_high, method, dict(result.score.extra)),
        layer_weights=result.layer_weights,
        probe_weights=_save_weights(record_path(out, trial.task, trial.upstream, trial.run_id), result),
    )


def interval(task: Task, score: Score) -> tuple[tuple[float, float] | None, str | None]:
    """The 95 % interval of a score by the bootstrap over its items, and how it was made; items of one speaker stay together.

    Columns "cluster", or "cluster_a" and "cluster_b" of a trial, name the speakers; they and "id" are no part of the metric.
    """
    groups = ("cluster", "cluster_a", "cluster_b")
    items = {name: column for name, column in score.items.items() if name not in ("id", *groups)}
    paired = "cluster_a" in score.items
    try:
        low, high, method = bootstrap(
            task.value,
            items,
            clusters=score.items.get("cluster_a" if paired else "cluster"),  # type: ignore[arg-type]
            other_clusters=score.items.get("cluster_b"),  # type: ignore[arg-type]
            cluster_name="test speakers",
        )
    except UndefinedMetric as error:
        return None, f"none: {error}"
    return (low, high), method


def write(record: RunRecord, score: Score | None, out: Path, overwrite: Overwrite) -> RunRecord:
    """Write a record and its items; returns it as it stands on disk."""
    from superb_probe.results.record import read_record

    items = (
        None
        if score is None or record.status == "failed"
        else {name: list(column) for name, column in score.items.items()}
    )
    return read_record(write_record(record, items, out, overwrite))


def _num_items(score: Score) -> int:
    return len(next(iter(score.items.values()))) if score.items else 0


def _record(
    job: Job,
    each: LoadedFold,
    trial: Trial,
    cost: Cost,
    device: torch.device,
    *,
    status: str,
    error: str | None = None,
    params: int = 0,
    num_items: Mapping[str, int] | None = None,
    **results: Any,
) -> RunRecord:
    parts: dict[str, Any] = {"selection": None, "score": None, "layer_weights": None, "probe_weights": None, **results}
    upstream, task = _upstream_part(job, count=status == "finished"), _task_part(job, each, trial, num_items or {})
    heard = overlap_warning(upstream.name, task.name, task.dataset, upstream_overlap(upstream, task))
    return RunRecord(
        run_id=trial.run_id,
        status=status,  # type: ignore[arg-type]
        upstream=upstream,
        task=task,
        probe=_probe_part(job, trial, params),
        items=None,
        cost=_cost_part(cost, device),
        environment=environment(device),
        started_at=cost.started_at,
        finished_at=now(),
        error=error,
        warnings=(*job.upstream.warnings, *[heard] * bool(heard), *job.question.task.info.notes, *each.fold.notes),
        **parts,
    )


def _task_part(job: Job, each: LoadedFold, trial: Trial, num_items: Mapping[str, int]) -> TaskPart:
    info = job.question.task.info
    data = {split: manifest.digest for split, manifest in each.fold.manifests.items()}
    data |= {f"trials.{split}": trials.digest for split, trials in each.fold.trials.items()}
    data["all"] = trial.data_digest  # the audio's bytes included
    counts = {split: len(manifest) for split, manifest in each.fold.manifests.items()}
    counts |= {split: len(trials) for split, trials in each.fold.trials.items()}
    return TaskPart(
        name=trial.task,
        version=trial.task_version,
        dataset=trial.dataset,
        fold=trial.fold,
        protocol=trial.protocol,  # type: ignore[arg-type]
        metric=info.metric,
        unit=info.unit,
        higher_is_better=info.higher_is_better,
        protocol_deviations=job.question.deviations,
        data=data,
        num_items={**counts, **num_items},
    )


def _probe_part(job: Job, trial: Trial, params: int) -> ProbePart:
    options = dict(trial.head_options)
    accumulate, control = options.pop("accumulate", 1), options.pop("control", None)
    return ProbePart(
        head=trial.head,
        view=job.question.task.info.view,
        layer_norm=trial.layer_norm,
        lr=trial.lr,
        seed=trial.seed,
        batch=trial.batch,
        steps=trial.steps,
        optimizer=trial.optimizer,
        trainable_params=params,
        layer=trial.layer,
        feature_dtype=trial.feature_dtype,
        budget=trial.budget,
        control=control,
        accumulate=accumulate,
        head_options=options,
    )


def _cost_part(cost: Cost, device: torch.device) -> CostPart:
    return CostPart(
        extract_s=round(cost.extract_s, 3),
        fit_s=round(cost.fit_s, 3),
        peak_memory_bytes=peak_memory_bytes(),
        store_bytes=cost.store_bytes,
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        encoder_passes=cost.encoder_passes,
        audio_s=None if cost.audio_s is None else round(cost.audio_s, 3),
    )


def _upstream_part(job: Job, count: bool) -> UpstreamPart:
    return replace(
        describe_upstream(job.upstream.name, job.upstream.upstream, count=count),
        provided_by=job.upstream.provided_by,
        options=job.upstream.options,
    )


def describe_upstream(name: str, upstream: Upstream, *, count: bool = True) -> UpstreamPart:
    """The part of a record that says which encoder it is, its size and its cost.

    Args:
        name: what the run calls it.
        upstream: the encoder.
        count: whether multiply-accumulates are counted, which may run it once; not where it has just failed.
    """
    info = upstream.info
    return UpstreamPart(
        name=name,
        revision=info.revision,
        num_layers=info.num_layers,
        dim=info.dim,
        hop_samples=info.hop_samples,
        waveform_norm=info.waveform_norm,
        sample_rate_hz=info.sample_rate_hz,
        lookahead_samples=info.lookahead_samples,
        layer_convention=info.layer_convention,
        params=sum(parameter.numel() for parameter in upstream.parameters()),
        trained_on=tuple(info.trained_on),
        provided_by=f"superb-probe {superb_probe.__version__}",
        macs=macs_per_second(upstream) if count else None,
    )


def _save_weights(record: Path, result: FitResult) -> WeightsPart:
    """Write the probe's tensors beside the record, whole or not at all."""
    data = save({name: tensor.contiguous() for name, tensor in result.weights.items()})
    path = record.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return WeightsPart(path.name, hashlib.sha256(data).hexdigest())


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT_BYTES


def environment(device: torch.device) -> EnvironmentPart:
    """The machine and the software of this process."""
    commit, dirty = _commit()
    return EnvironmentPart(
        superb_probe=superb_probe.__version__,
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({torch.get_num_threads()} threads)",
        platform=f"{platform.system()}-{platform.machine()}",
        deterministic=device.type == "cpu",
        command=_command(),
        packages=_packages(),
    )


def _command() -> str:
    program = Path(sys.argv[0])
    words = [program.name or "python", *sys.argv[1:]]
    return shlex.join(["python", *words] if program.suffix == ".py" else words)


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@lru_cache(maxsize=1)
def _commit() -> tuple[str | None, bool | None]:
    """The commit this code was checked out from and whether files differ from it; None where it is not a checkout."""
    here = Path(superb_probe.__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # installed, perhaps inside somebody else's checkout
        return None, None
    commit, status = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
    return commit, None if status is None else bool(status)


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Full float32 and deterministic algorithms while it lasts; on a GPU, what has no deterministic algorithm runs all the same."""
    filling: Any = (
        torch.utils.deterministic
    )  # empty tensors need no filling: nothing reads them before they are written
    before = (
        torch.get_deterministic_debug_mode(),
        filling.fill_uninitialized_memory,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    # `use_deterministic_algorithms` sets the same, after importing torch's compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    filling.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[2], before[3]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[4], before[5]
