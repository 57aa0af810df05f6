"""From a request to jobs: upstreams, tasks and data resolved, every problem found before anything is computed."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from superb_probe.downstreams.base import Budget, Fold, Head, LabelSet, ProtocolSettings, Task
from superb_probe.downstreams.checks import effective_samples, report
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Problem, Trials, audio_digest
from superb_probe.errors import RequestError
from superb_probe.probes.identity import weights_digest
from superb_probe.probes.plan import Trial, default_budget, digest_of
from superb_probe.probes.store import FeatureStore
from superb_probe.registry import Registry
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream

FLOAT32_BELOW_BYTES = 4 * 2**30
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedUpstream:
    """An encoder and how it was asked for.

    Attributes:
        upstream: frozen, in eval mode, on the CPU.
        name: what was asked for, or its own name.
        options: how it was built, with the digest of its weights.
        provided_by: distribution, or file.
        warnings: what a reader of its scores must know.
    """

    upstream: Upstream
    name: str
    options: Mapping[str, Any]
    provided_by: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedFold:
    """A fold, its classes, and the digest of its data."""

    fold: Fold
    labels: LabelSet
    digest: str


@dataclass(frozen=True, slots=True)
class Question:
    """A task on some data under a protocol: what is asked of every upstream.

    Attributes:
        task: the task.
        settings: the protocol's.
        budget: updates, batch and head options, the protocol's settings merged in.
        budget_name: "small" or "full".
        dataset: "mini" or "manifest:<name>".
        folds: one or several.
        rates: learning rates to begin with.
        may_grow: whether further rates may be tried.
        deviations: from the published protocol.
    """

    task: Task
    settings: ProtocolSettings
    budget: Budget
    budget_name: str
    dataset: str
    folds: tuple[LoadedFold, ...]
    rates: tuple[float, ...]
    may_grow: bool
    deviations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One upstream asked one question: its trials differ in fold, learning rate and seed only.

    Attributes:
        upstream: the encoder.
        question: the task and its data.
        template: what all trials share.
        state_bytes: size of the states of all splits.
        least_frames: fewest frames an utterance must have.
    """

    upstream: LoadedUpstream
    question: Question
    template: Trial
    state_bytes: int
    least_frames: int


class Problems:
    """Collects what is wrong from several checks, to be told at once."""

    def __init__(self) -> None:
        """Starts empty."""
        self.found: list[RequestError] = []

    def attempt(self, make: Callable[[], T]) -> T | None:
        """The value, or None after noting a RequestError."""
        try:
            return make()
        except RequestError as error:
            self.found.append(error)
            return None

    def raise_any(self) -> None:
        """Raise what was noted, if anything was."""
        texts = list(dict.fromkeys(str(error) for error in self.found))
        if texts:
            raise RequestError("\n".join(texts)) from self.found[0]


def choose_device(device: str) -> torch.device:
    """The device a name stands for: "auto" is a GPU where there is one.

    >>> choose_device("cpu")
    device(type='cpu')

    Raises:
        RequestError: for an unknown name or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RequestError(f"unknown device {device!r}. Fix: auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise RequestError(
            f"device {device}: this machine has {count} usable GPUs (torch {torch.__version__}). Fix: --device cpu"
        )
    return chosen


def check_out(out: Path) -> None:
    """Make sure records can be written.

    Raises:
        RequestError: if they cannot.
    """
    probe = out / f".write-{uuid.uuid4().hex[:8]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(
            f"--out {out} cannot be written: {error.strerror}. Fix: --out FOLDER that you may write"
        ) from error


def resolve_upstream(
    upstream: str | Upstream,
    *,
    checkpoint: Path | None,
    size: str | None,
    random: int | None,
    options: Mapping[str, Any],
) -> LoadedUpstream:
    """The encoder of a name, or of an object that already is one."""
    if isinstance(upstream, Upstream):
        upstream.eval().requires_grad_(False)
        loaded, name, provided_by = (
            upstream,
            upstream.info.name,
            f"{type(upstream).__module__}.{type(upstream).__qualname__}",
        )
        if checkpoint is not None or size is not None or random is not None or options:
            raise RequestError(
                f"{name} is an Upstream already. Fix: give checkpoint, size, random and options when building it"
            )
    else:
        loaded = load_upstream(upstream, checkpoint=checkpoint, size=size, random=random, **options)
        name = loaded.info.name
        provided_by = _provided_by(upstream)
    named = {"size": size, "random": random, **options}
    recorded = {key: value for key, value in named.items() if value is not None}
    warnings = list(getattr(loaded, "notes", ()))
    if loaded.info.revision.startswith("random:"):
        warnings.append(f"{name}: random weights ({loaded.info.revision}), not a trained encoder")
    return LoadedUpstream(
        loaded, name, {**recorded, "weights": weights_digest(loaded)[:16]}, provided_by, tuple(warnings)
    )


def _provided_by(name: str) -> str:
    prefix = name.partition(":")[0]
    return name if prefix in ("hf", "s3prl", "features") else Registry("upstream").find(name).provided_by


def resolve_question(
    name: str,
    *,
    data: Mapping[str, Path] | None,
    manifest: Mapping[str, Path] | None,
    root: Path | None,
    protocol: str,
    budget: str | None,
    steps: int | None,
    lr: Sequence[float] | None,
    limit: int | None,
    control: str | None,
) -> Question:
    """A task with its data read and checked.

    Raises:
        RequestError: with everything wrong in the request for this task.
    """
    task = load_task(name)
    settings = task.info.protocols.get(protocol)
    if settings is None:
        known = ", ".join(sorted(task.info.protocols))
        raise RequestError(f"{name} has no protocol {protocol!r}. Fix: one of {known}")
    dataset, folder = task.info.dataset, root
    if manifest:
        dataset = f"manifest:{Path(manifest.get('test', next(iter(manifest.values())))).resolve().parent.name}"
    elif data:
        if set(data) != {"mini"}:
            raise RequestError(
                f"--data {' '.join(f'{key}={path}' for key, path in data.items())}: the trees of published corpora are not read yet. "
                "Fix: --manifest train=a.tsv dev=b.tsv test=c.tsv (docs/quickstart.md says how to make them)"
            )
        folder = data["mini"]
    folds = load_folds(task, dataset=dataset, root=folder, manifests=manifest, protocol=protocol)
    train_s = max(fold.manifests["train"].total_s for fold in folds)
    budget_name = budget or default_budget(train_s, dataset)
    if budget_name not in task.info.budgets:
        raise RequestError(f"{name} has no budget {budget_name!r}. Fix: one of {', '.join(task.info.budgets)}")
    chosen = task.info.budgets[budget_name]
    chosen = replace(
        chosen,
        batch=settings.batch or chosen.batch,
        accumulate=settings.accumulate or chosen.accumulate,
        head={**chosen.head, **settings.head},
    )
    if steps is not None and steps != chosen.steps:
        chosen = replace(chosen, steps=steps, evaluate_every=min(chosen.evaluate_every, -(-steps // 10)))
        budget_name = f"{budget_name}:{steps}"
    deviations = list(settings.deviations)
    if limit is not None:
        deviations.append(f"only the first {limit} utterances of each split")
    loaded = []
    for fold in folds:
        labels = task.labels(fold.manifests["train"])  # of the whole split: a limit changes no classes
        fold = fold if limit is None else limited(fold, limit)
        loaded.append(LoadedFold(fold, labels, data_digest(fold)))
    rates = tuple(lr) if lr else settings.lr_grid
    grows = not lr and control is None
    return Question(task, settings, chosen, budget_name, dataset, tuple(loaded), rates, grows, tuple(deviations))


def limited(fold: Fold, limit: int) -> Fold:
    """The first `limit` utterances of each split, and the trials among them.

    Raises:
        RequestError: if no trial of one kind is left.
    """
    manifests = {split: manifest[:limit] for split, manifest in fold.manifests.items()}
    trials = {}
    for split, pairs in fold.trials.items():
        ids = set(manifests[split].ids)
        columns = zip(pairs.labels.tolist(), pairs.ids_a, pairs.ids_b, strict=True)
        kept = [(label, a, b) for label, a, b in columns if a in ids and b in ids]
        if len({label for label, _, _ in kept}) < 2:
            raise RequestError(
                f"--limit {limit} leaves no same-speaker or no different-speaker trial in {split}. Fix: a larger limit"
            )
        trials[split] = Trials.of([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])
    return replace(fold, manifests=manifests, trials=trials)


def data_digest(fold: Fold) -> str:
    """The digest of everything a fold is made of: manifests, trials, the bytes of the audio."""
    causes = {split: [manifest.digest, audio_digest(manifest)] for split, manifest in fold.manifests.items()}
    return digest_of({**causes, **{f"trials.{split}": trials.digest for split, trials in fold.trials.items()}})


def head_name(head: Head) -> str:
    """The name of a head in records.

    >>> from superb_probe.probes.heads import UtteranceLinear
    >>> head_name(UtteranceLinear(2, {"keyword": ("yes", "no")}))
    'utterance_linear'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(head).__name__).lower()


def make_job(
    upstream: LoadedUpstream,
    question: Question,
    *,
    head: str | None,
    layer: int | None,
    layer_norm: bool,
    protocol: str,
    control: str | None,
) -> Job:
    """The trials' common part for one upstream and one question.

    Raises:
        RequestError: for a head or a layer that is not there.
    """
    info, task, budget = upstream.upstream.info, question.task, question.budget
    if layer is not None and not 0 <= layer < info.num_layers:
        raise RequestError(f"--layer {layer}: {info.name} has layers 0 to {info.num_layers - 1}")
    made = task.head(info.dim, question.folds[0].labels, dict(budget.head))
    default_head = head_name(made)
    if head not in (None, default_head):
        raise RequestError(f"--head {head}: {task.info.name} has one head, {default_head}. Fix: leave --head out")
    manifests = [manifest for each in question.folds for manifest in each.fold.manifests.values()]
    whole = sum(FeatureStore.estimate_bytes(info, manifest, task.info.view, "float32") for manifest in manifests)
    dtype = "float32" if whole <= FLOAT32_BELOW_BYTES else "float16"
    options: dict[str, Any] = {**budget.head, "accumulate": budget.accumulate, "evaluate_every": budget.evaluate_every}
    if budget.max_crop_s is not None and task.info.view == "frames":
        options["max_crop_s"] = budget.max_crop_s
    if control is not None:
        options["control"] = control
    template = Trial(
        upstream=upstream.name,
        upstream_revision=info.revision,
        task=task.info.name,
        task_version=task.info.version,
        dataset=question.dataset,
        data_digest="",
        fold=None,
        protocol=protocol,
        head=default_head,
        layer=layer,
        layer_norm=layer_norm or question.settings.layer_norm,
        feature_dtype=dtype,
        upstream_options=upstream.options,
        head_options=options,
        budget=question.budget_name,
        steps=budget.steps,
        batch=budget.batch * budget.accumulate,
        optimizer=task.info.optimizer,
        lr=0.0,
        seed=0,
    )
    least_frames = 1 if task.info.view == "mean" else max(1, made.min_frames)
    return Job(upstream, question, template, whole if dtype == "float32" else whole // 2, least_frames)


def short_utterances(jobs: Iterable[Job]) -> list[Problem]:
    """Every utterance that is too short for a frame of an encoder or for a head, in all splits of all jobs.

    Files are decoded only where effects shorten them, once for all encoders.
    """
    groups: dict[tuple[str, str, str], list[Job]] = {}
    manifests: dict[tuple[str, str, str], Manifest] = {}
    for job in jobs:
        if hasattr(job.upstream.upstream, "states_for"):
            continue  # frames come from files made elsewhere; the store checks them
        for each in job.question.folds:
            for manifest in each.fold.manifests.values():
                key = (manifest.digest, str(manifest.root), job.question.task.info.waveform)
                groups.setdefault(key, []).append(job)
                manifests[key] = manifest
    found: dict[str, Problem] = {}
    for key, asking in groups.items():
        for utterance in manifests[key]:
            samples = effective_samples(
                utterance, manifests[key], key[2], asking[0].upstream.upstream.info.sample_rate_hz
            )
            for job in asking:
                problem = _short(job, manifests[key], utterance.id, samples)
                if problem is not None:
                    found.setdefault(f"{problem.where} {problem.what}", problem)
    return list(found.values())


def _short(job: Job, manifest: Manifest, utterance_id: str, num_samples: int) -> Problem | None:
    upstream, task = job.upstream.upstream, job.question.task
    frames = upstream.num_frames(num_samples)
    if frames >= job.least_frames:
        return None
    need = "one frame" if frames < 1 else f"the {job.least_frames} frames that the head of {task.info.name} needs"
    seconds = num_samples / upstream.info.sample_rate_hz
    what = f"{seconds:.3f} s give {frames} frames of {upstream.info.name}, less than {need}"
    return Problem(f"{manifest.name}, utterance {utterance_id}", what, "leave it out of the manifest")


def memory_problem(jobs: Sequence[Job]) -> str | None:
    """What to say when the states of the largest job do not fit in memory; None when they do or nobody knows."""
    largest = max(jobs, key=lambda job: job.state_bytes)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    if largest.state_bytes <= max(available, 0.6 * total):
        return None
    return (
        f"the states of {largest.upstream.name} for {largest.question.task.info.name} take {largest.state_bytes / 1e9:.1f} GB, "
        f"memory has {total / 1e9:.1f} GB. Fix: --store DIR keeps them on disk"
    )


def raise_short(jobs: Sequence[Job]) -> None:
    """Raise one report of all utterances that are too short, if there are any."""
    problems = short_utterances(jobs)
    if problems:
        raise report("utterances too short", problems)
