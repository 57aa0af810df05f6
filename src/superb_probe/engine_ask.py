"""The request of a run and what can be said of it before any task is read: plain values, device, folders, encoders."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from superb_probe.errors import RequestError
from superb_probe.probes.identity import weights_digest
from superb_probe.probes.planner import PLACES
from superb_probe.probes.store_codec import DTYPES
from superb_probe.registry import Registry
from superb_probe.results.record import Overwrite
from superb_probe.settings import parse_bytes, parse_duration
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream

DEFAULT_OUT = Path("results/runs")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """What `superb_probe.run` is asked.

    Attributes:
        upstream: names or `Upstream` objects.
        task: names, aliases (sv, phoneme, intent) and suites (all, superb10, paper4); with a tier it may be left out.
        checkpoint: weights of the one upstream that is named.
        data: corpus folders by name; none: the embedded corpus.
        manifest: your own data: TSVs by "train", "dev", "test", "trials", "dev_trials".
        root: what the manifests' audio is relative to; None: each TSV's own folder.
        head: the head, by name; None: the task's.
        head_option: options of the head, e.g. {"width": 256} or, for ASR, {"lm": "3-gram.arpa"}; deviations, which the record names.
        layer: read one layer instead of the weighted sum of all; "all": one probe a layer beside the weighted sum.
        layer_norm: normalise every frame of every layer first.
        feature_dtype: type the states are kept in: "float16", "bfloat16", "float32" or "int8".
        crops: random crops kept of a long training utterance where the protocol crops; 0 encodes new ones each time.
        crop_seed: draws where the kept crops begin.
        size: of an upstream without a checkpoint: "test", "tiny", "small" or "base".
        random: seed of random weights.
        upstream_option: the upstream's own options.
        budget: "small" or "full"; None: small under 10 hours of training audio and on `mini`.
        steps: optimiser updates instead of the budget's; the record's budget is then named after them ("full:2000").
        lr: learning rates; None: the protocol's grid, which grows while the best on dev lies at its edge.
        seed: seeds of the probes.
        protocol: "strict", "superb" or "mamba_hubert".
        control: "shuffle" trains on permuted labels.
        stop_hopeless: give up trials that fall behind others for good; recorded.
        device: "auto", "cpu", "cuda" or "cuda:N".
        out: folder of the records; None: results/runs.
        store: folder of extracted states; None keeps them in memory.
        store_limit: most that the stores in it may take: bytes, or "500GB".
        store_clean: delete the least recently used stores when the limit asks for room.
        states: where they are read from in training: "gpu", "memory", "disk" or "stream"; None: the fastest that they fit in.
        padding: "exact": an utterance's states do not depend on its batch; "s3prl": batches are composed and padded as s3prl does, and
            each is encoded anew, so that states of an utterance differ from update to update. Nothing is stored then.
        limit: use only the first utterances of each split.
        tier: "quick": PR, SID, ER and IC on seeded subsets.
        time_limit: seconds, or "8h": what does not fit is dropped from the plan, and said.
        overwrite: "never" returns a trial's record where there is one; "failed" runs failed trials again, "always" all.
        dry_run: time the machine for a few seconds, print the plan and return nothing.
    """

    upstream: str | Upstream | Sequence[str | Upstream]
    task: str | Sequence[str]
    checkpoint: Path | None
    data: Mapping[str, Path] | None
    manifest: Mapping[str, Path] | None
    root: Path | None
    head: str | None
    head_option: Mapping[str, Any] | None
    layer: int | str | None
    layer_norm: bool
    feature_dtype: str
    crops: int | None
    crop_seed: int
    size: str | None
    random: int | None
    upstream_option: Mapping[str, Any] | None
    budget: str | None
    steps: int | None
    lr: Sequence[float] | None
    seed: Sequence[int]
    protocol: str
    control: str | None
    stop_hopeless: bool
    device: str
    out: Path | None
    store: Path | None
    store_limit: str | int | None
    store_clean: bool
    states: str | None
    padding: str
    limit: int | None
    tier: str | None
    time_limit: str | float | None
    overwrite: Overwrite
    dry_run: bool

    @property
    def upstreams(self) -> list[str | Upstream]:
        """The encoders asked for."""
        return [self.upstream] if isinstance(self.upstream, (str, Upstream)) else list(self.upstream)

    @property
    def tasks(self) -> list[str]:
        """The tasks asked for, as they were typed."""
        return [self.task] if isinstance(self.task, str) else list(self.task)

    @property
    def out_folder(self) -> Path:
        """Where records go."""
        return Path(self.out) if self.out is not None else DEFAULT_OUT

    @property
    def store_folder(self) -> Path | None:
        """Where states on disk go."""
        return None if self.store is None else Path(self.store)

    @property
    def limit_bytes(self) -> int | None:
        """Most that the stores may take."""
        return None if self.store_limit is None else parse_bytes(self.store_limit)

    @property
    def limit_s(self) -> float | None:
        """Most seconds the run may take."""
        return None if self.time_limit is None else parse_duration(self.time_limit)


def value_problems(request: Request) -> list[str]:
    """What is wrong with the plain values of a request."""
    lr, seed, wrong = request.lr, request.seed, []
    if not request.upstreams or not (request.tasks or request.tier):
        wrong.append("name at least one upstream and one task")
    if request.checkpoint is not None and len(request.upstreams) != 1:
        wrong.append(f"--checkpoint goes with one upstream, {len(request.upstreams)} are named")
    if lr is not None and (not lr or not all(0 < rate < float("inf") for rate in lr)):
        wrong.append(f"--lr {' '.join(map(str, lr))}: learning rates are positive numbers")
    if not seed or any(number < 0 or number >= 2**31 for number in seed):
        wrong.append(f"--seed {' '.join(map(str, seed))}: seeds are whole numbers from 0 to {2**31 - 1}")
    numbers = (("limit", request.limit, 1), ("steps", request.steps, 1), ("crops", request.crops, 0))
    for name, number, least in (*numbers, ("crop-seed", request.crop_seed, 0)):
        if number is not None and number < least:
            wrong.append(f"--{name} {number}: at least {least}")
    if isinstance(request.layer, str) and request.layer != "all":
        wrong.append(f"--layer {request.layer}: a number, or all")
    if request.tier is not None and (request.budget is not None or request.limit is not None):
        wrong.append(f"--tier {request.tier} has its own budget and subsets. Fix: leave --budget and --limit out")
    if request.store is None and (request.store_limit is not None or request.store_clean):
        wrong.append("--store-limit and --store-clean are about stores on disk. Fix: --store DIR too")
    if request.store_clean and request.store_limit is None:
        wrong.append("--store-clean makes room below a limit. Fix: --store-limit SIZE too")
    if request.padding == "s3prl" and (request.store is not None or request.states not in (None, "stream")):
        place = "--store" if request.store is not None else f"--states {request.states}"
        wrong.append(
            f"--padding s3prl: an utterance has other states in every batch, which {place} cannot keep. "
            f"Fix: leave {place} out (a store named in superb.yaml or SUPERB_PROBE_STORE too), or --padding exact"
        )
    if request.padding == "s3prl" and request.crops:
        wrong.append("--padding s3prl encodes new crops each time. Fix: leave --crops out")
    for name, value, known in (
        ("control", request.control, (None, "shuffle")),
        ("overwrite", request.overwrite, ("never", "failed", "always")),
        ("feature-dtype", request.feature_dtype, tuple(DTYPES)),
        ("states", request.states, (None, *PLACES)),
        ("padding", request.padding, ("exact", "s3prl")),
        ("tier", request.tier, (None, "quick")),
    ):
        if value not in known:
            wrong.append(f"--{name} {value}: one of {', '.join(each for each in known if each)}")
    return wrong


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
