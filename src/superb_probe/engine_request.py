"""From a request to jobs: tasks and data resolved, every problem found before anything is computed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from superb_probe.downstreams.audio import effective_samples
from superb_probe.downstreams.base import Budget, Fold, Head, LabelSet, ProtocolSettings, Split, Task
from superb_probe.downstreams.checks import report
from superb_probe.downstreams.corpora import choose_data
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance, audio_digest
from superb_probe.downstreams.support import PADDED_STATES, STATES_ALONE
from superb_probe.engine_ask import (
    LoadedUpstream,
    Problems,
    Request,
    check_out,
    choose_device,
    resolve_upstream,
    value_problems,
)
from superb_probe.engine_names import expand_tasks, quick_tasks
from superb_probe.engine_subset import QUICK_SIZES, limited, quick
from superb_probe.errors import RequestError
from superb_probe.probes.plan import Trial, default_budget, digest_of, plan_trials
from superb_probe.probes.store import FeatureStore
from superb_probe.upstreams.padding import PaddedUpstream


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
        budget_name: "small", "full" or "quick", with ":<steps>" behind it when the steps are one's own.
        dataset: "mini", the name of a published corpus, or "manifest:<name>".
        folds: one or several.
        rates: learning rates to begin with; of a task without training the one rate 0.
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
    """One upstream asked one question: its trials differ in fold, layer, learning rate and seed only.

    Attributes:
        upstream: the encoder.
        question: the task and its data.
        template: what all trials share.
        seeds: of the probes.
        layers: what the probes read: one layer, or None for the weighted sum of all.
        crops: stored crops of long training utterances in view "mean"; 0 for whole utterances.
        crops_anew: whether crops are encoded anew each time instead.
        padded: whether training encodes each batch as s3prl composes and pads it.
        least_frames: fewest frames an utterance must have.
        crop_seed: draws where the stored crops begin.
    """

    upstream: LoadedUpstream
    question: Question
    template: Trial
    seeds: tuple[int, ...]
    layers: tuple[int | None, ...]
    crops: int
    crops_anew: bool
    padded: bool
    least_frames: int
    crop_seed: int = 0

    @property
    def name(self) -> str:
        """Task and upstream, for what is printed."""
        return f"{self.template.task}, {self.upstream.name}"

    def trials(self, rates: Sequence[float] | None = None) -> list[Trial]:
        """The planned trials, or those with other learning rates."""
        folds = [(each.fold.name, each.digest) for each in self.question.folds]
        return plan_trials(self.template, folds, rates or self.question.rates, self.seeds, self.layers)

    def audio(self) -> dict[tuple[str, str, float, float, bool], tuple[Utterance, bool]]:
        """The distinct stretches of audio of all splits and folds, and whether training crops them."""
        found = {}
        for each in self.question.folds:
            for split, manifest in each.fold.manifests.items():
                for u in manifest:
                    cropped = self.cropped(split) and u.duration_s > (self.question.budget.max_crop_s or 0.0)
                    found[(str(manifest.root), u.audio, u.start_s, u.duration_s, cropped)] = (u, cropped)
        return found

    def cropped(self, split: str) -> bool:
        """Whether crops of a split are kept."""
        return self.crops > 0 and split == "train"

    @property
    def state_bytes(self) -> int:
        """Size of the states of all distinct audio."""
        info, view, dtype = self.upstream.upstream.info, self.question.task.info.view, self.template.feature_dtype
        crop_s = self.question.budget.max_crop_s
        groups: dict[bool, list[Utterance]] = {False: [], True: []}
        for utterance, cropped in self.audio().values():
            groups[cropped].append(utterance)
        return FeatureStore.estimate_bytes(info, groups[False], view, dtype) + FeatureStore.estimate_bytes(
            info, groups[True], view, dtype, crops=self.crops, crop_s=crop_s
        )


def resolve(request: Request, problems: Problems) -> list[Job]:
    """Every upstream asked every question; what is wrong is noted in `problems`."""
    problems.found += [RequestError(text) for text in value_problems(request)]
    problems.attempt(lambda: (request.limit_bytes, request.limit_s))
    problems.attempt(partial(choose_device, request.device))
    if not request.dry_run:
        problems.attempt(partial(check_out, request.out_folder))
    options = dict(request.upstream_option or {})
    load = partial(resolve_upstream, checkpoint=request.checkpoint, size=request.size, random=request.random)
    loaded = [problems.attempt(partial(load, name, options=options)) for name in request.upstreams]
    if request.padding == "s3prl":
        loaded = [problems.attempt(partial(padded_upstream, each)) for each in loaded if each is not None]
    choose = quick_tasks if request.tier == "quick" else expand_tasks
    names = problems.attempt(partial(choose, request.tasks)) or []
    questions = [problems.attempt(partial(resolve_question, name, request)) for name in names]
    made = [
        problems.attempt(partial(make_job, each, question, request))
        for each in loaded
        if each is not None
        for question in questions
        if question is not None
    ]
    jobs = [job for job in made if job is not None]
    problems.attempt(partial(raise_short, jobs))
    return jobs


def resolve_question(name: str, request: Request) -> Question:
    """A task with its data read and checked.

    Raises:
        RequestError: with everything wrong in the request for this task.
    """
    task = load_task(name)
    settings = task.info.protocols.get(request.protocol)
    if settings is None:
        known = ", ".join(sorted(task.info.protocols))
        raise RequestError(f"{name} has no protocol {request.protocol!r}. Fix: one of {known}")
    dataset, folder = task.info.dataset, request.root
    extras: dict[str, Path] = {}
    manifest = request.manifest
    if manifest:
        dataset = f"manifest:{Path(manifest.get('test', next(iter(manifest.values())))).resolve().parent.name}"
    elif request.data:
        dataset, folder, extras = choose_data(task.info.name, request.data)
    folds = load_folds(task, dataset=dataset, root=folder, extras=extras, manifests=manifest, protocol=request.protocol)
    check_selecting(task, settings.select_on, folds)
    train_s = max(_training_manifest(fold).total_s for fold in folds)
    budget, budget_name = choose_budget(task, settings, request, default_budget(train_s, dataset))
    deviations = padding_deviations(settings.deviations, request)
    if request.limit is not None:
        deviations.append(f"only the first {request.limit} utterances of each split")
    if request.tier == "quick":
        sizes = ", ".join(f"{count} of {split}" for split, count in QUICK_SIZES.items())
        deviations.append(f"quick tier: a seeded subset of at most {sizes}")
    loaded = []
    for fold in folds:
        labels = task.labels(_training_manifest(fold))  # of the whole split: a part changes no classes
        fold = fold if request.limit is None else limited(fold, request.limit)
        fold = quick(fold) if request.tier == "quick" else fold
        loaded.append(LoadedFold(fold, labels, data_digest(fold)))
    if not task.info.trained:
        return Question(task, settings, budget, budget_name, dataset, tuple(loaded), (0.0,), False, tuple(deviations))
    rates = tuple(request.lr) if request.lr else settings.lr_grid
    grows = not request.lr and request.control is None
    return Question(task, settings, budget, budget_name, dataset, tuple(loaded), rates, grows, tuple(deviations))


def padded_upstream(loaded: LoadedUpstream) -> LoadedUpstream:
    """The encoder with s3prl's padding; one that has it already stays.

    Raises:
        RequestError: for one that has none.
    """
    if isinstance(loaded.upstream, PaddedUpstream):
        return loaded
    return replace(loaded, upstream=PaddedUpstream(loaded.upstream))


def padding_deviations(told: Sequence[str], request: Request) -> list[str]:
    """What differs from the published code, with the states' padding as it was asked for."""
    if request.padding == "exact":
        return list(told)
    kept = [text for text in told if text != STATES_ALONE]
    return [*kept, PADDED_STATES] if request.protocol == "strict" else kept


def _training_manifest(fold: Fold) -> Manifest:
    """What classes come from: train, or of a task without training whatever there is."""
    return fold.manifests.get("train") or next(iter(fold.manifests.values()))


def check_selecting(task: Task, split: Split, folds: Iterable[Fold]) -> None:
    """Refuse folds without the split that chooses.

    Raises:
        RequestError: that names them.
    """
    without = [fold.name or "the only fold" for fold in folds if split not in fold.manifests]
    if without:
        raise RequestError(
            f"{task.info.name}: no {split} split in {', '.join(without)}: learning rate, update and layer are chosen on it. "
            f"Fix: --manifest ... {split}={split}.tsv"
        )


def choose_budget(task: Task, settings: ProtocolSettings, request: Request, default: str) -> tuple[Budget, str]:
    """The training of each probe, the protocol's settings merged in, and its name.

    Raises:
        RequestError: for a budget that is not there.
    """
    base = "small" if request.tier == "quick" else request.budget or default
    if base not in task.info.budgets:
        raise RequestError(f"{task.info.name} has no budget {base!r}. Fix: one of {', '.join(task.info.budgets)}")
    budget, name = task.info.budgets[base], "quick" if request.tier == "quick" else base
    budget = replace(
        budget,
        batch=settings.batch or budget.batch,
        accumulate=settings.accumulate or budget.accumulate,
        head={**budget.head, **settings.head},
    )
    if not task.info.trained:
        return replace(budget, steps=0), name
    if request.steps is not None and request.steps != budget.steps:
        evaluate_every = min(budget.evaluate_every, -(-request.steps // 10))
        return replace(budget, steps=request.steps, evaluate_every=evaluate_every), f"{name}:{request.steps}"
    return budget, name


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


def with_head(question: Question, head: str) -> Question:
    """The question asked through another of the task's heads, which its deviations say."""
    told = f"head {head}; the protocol's is {question.task.info.heads[0]}"
    return replace(question, budget=question.budget.for_head(head), deviations=(*question.deviations, told))


def with_head_options(question: Question, options: Mapping[str, Any]) -> Question:
    """The question with options of the head changed, which its deviations say.

    Raises:
        RequestError: for a task without a trained head.
    """
    if not question.task.info.trained:
        raise RequestError(f"--head-option: {question.task.info.name} trains no head. Fix: leave it out")
    told = "head options " + ", ".join(f"{key}={value}" for key, value in identified(options).items())
    budget = replace(question.budget, head={**question.budget.head, **options})
    return replace(question, budget=budget, deviations=(*question.deviations, told))


def identified(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a record keeps them: a file by its name and the digest of its bytes, so that another file is another run.

    >>> identified({"width": 128, "lm": "no-such-file"})
    {'width': 128, 'lm': 'no-such-file'}
    """
    kept = dict(options)
    for key, value in options.items():
        if isinstance(value, str | Path) and Path(value).is_file():
            kept[key] = f"{Path(value).name}@sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}"
    return kept


def make_job(upstream: LoadedUpstream, question: Question, request: Request) -> Job:
    """The trials' common part for one upstream and one question.

    Raises:
        RequestError: for a head or a layer that is not there.
    """
    info, task, head = upstream.upstream.info, question.task, request.head
    if head is not None and head in task.info.heads[1:]:
        question = with_head(question, head)
    if request.head_option:
        question = with_head_options(question, request.head_option)
    layers = choose_layers(request.layer, info.num_layers, task, info.name)
    chosen_head, least_frames = choose_head(question, head, info.dim)
    crops, crops_anew = choose_crops(question, request)
    budget = question.budget
    options = training_options(budget, request, crops if crops or crops_anew else None)
    template = Trial(
        upstream=upstream.name,
        upstream_revision=info.revision,
        task=task.info.name,
        task_version=task.info.version,
        dataset=question.dataset,
        data_digest="",
        fold=None,
        protocol=request.protocol,
        head=chosen_head,
        layer=None,
        layer_norm=request.layer_norm or question.settings.layer_norm,
        feature_dtype=request.feature_dtype,
        upstream_options=upstream.options,
        head_options=options,
        budget=question.budget_name,
        steps=budget.steps,
        batch=budget.batch * budget.accumulate,
        optimizer=task.info.optimizer,
        lr=0.0,
        seed=0,
    )
    seeds = tuple(dict.fromkeys(request.seed)) if task.info.trained else (0,)
    padded = request.padding == "s3prl"
    return Job(upstream, question, template, seeds, layers, crops, crops_anew, padded, least_frames, request.crop_seed)


def choose_head(question: Question, asked: str | None, dim: int) -> tuple[str, int]:
    """The name of the head in records, and the fewest frames that it reads.

    Raises:
        RequestError: if another one was asked for than there is.
    """
    info = question.task.info
    if info.trained:
        made = question.task.head(dim, question.folds[0].labels, dict(question.budget.head))
        name = asked if asked is not None and asked in info.heads[1:] else head_name(made)
        least_frames = 1 if info.view == "mean" else max(1, made.min_frames)
    else:
        name, least_frames = info.heads[0] if info.heads else "none", 1
    if asked not in (None, name):
        known = ", ".join(info.heads or (name,))
        raise RequestError(f"--head {asked}: {info.name} has no such head. Fix: one of {known}, or leave --head out")
    return name, least_frames


def training_options(budget: Budget, request: Request, crops: int | None) -> dict[str, Any]:
    """What a record keeps as the head's options: these, and what else of the training makes it another run."""
    options: dict[str, Any] = {
        **identified(budget.head),
        "accumulate": budget.accumulate,
        "evaluate_every": budget.evaluate_every,
    }
    if budget.max_crop_s is not None:
        options["max_crop_s"] = budget.max_crop_s
    if crops is not None:
        options["crops"] = crops
    if crops:
        options["crop_seed"] = request.crop_seed
    if request.control is not None:
        options["control"] = request.control
    if request.stop_hopeless:
        options["stop_hopeless"] = True
    if request.padding != "exact":
        options["padding"] = request.padding
    return options


def choose_layers(layer: int | str | None, num_layers: int, task: Task, name: str) -> tuple[int | None, ...]:
    """What the probes read: None is the weighted sum of all; a task without training reads one layer after the other.

    Raises:
        RequestError: for a layer that is not there.
    """
    if isinstance(layer, int):
        if not 0 <= layer < num_layers:
            raise RequestError(f"--layer {layer}: {name} has layers 0 to {num_layers - 1}")
        return (layer,)
    if not task.info.trained:
        return tuple(range(num_layers))
    return (None, *range(num_layers)) if layer == "all" else (None,)


def choose_crops(question: Question, request: Request) -> tuple[int, bool]:
    """How many random crops of a long training utterance are kept, and whether they are encoded anew instead.

    SUPERB cuts anew at every access; so does protocol "superb" unless `--crops K` asks for stored ones.
    """
    budget = question.budget
    if question.task.info.view != "mean" or budget.max_crop_s is None:
        return 0, False
    longest_s = max(u.duration_s for each in question.folds for u in each.fold.manifests["train"])
    if longest_s <= budget.max_crop_s:
        return 0, False
    anew = request.crops == 0 if request.crops is not None else request.protocol == "superb"
    anew = anew or request.padding == "s3prl"
    return (0, True) if anew else (request.crops or budget.crops, False)


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


def raise_short(jobs: Sequence[Job]) -> None:
    """Raise one report of all utterances that are too short, if there are any."""
    problems = short_utterances(jobs)
    if problems:
        raise report("utterances too short", problems)
