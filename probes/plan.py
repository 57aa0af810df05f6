"""The plan of a run: which trials there are, what each is made of, and which learning rates are tried next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SMALL_BUDGET_BELOW_S = 10 * 3600.0
LOWEST_RATE = 1e-7
HIGHEST_RATE = 10.0


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the plan; `run_id` is the hash of all its causes.

    Running twice is running once; new weights, another corpus, a changed manifest or another fold is another run.

    Attributes:
        upstream: the name.
        upstream_revision: identity of the weights.
        task: the name.
        task_version: raised whenever a number can change.
        dataset: "mini", "voxceleb1", "manifest:<name>".
        data_digest: of the manifests and trial lists of all splits and of their audio.
        fold: name of the fold; None where a task has a single one.
        protocol: "strict", "superb" or "mamba_hubert".
        head: name of the head.
        layer: the one layer read; None for the weighted sum of all.
        layer_norm: whether every frame of every layer is normalised first.
        feature_dtype: in which the states are stored.
        upstream_options: size, causal front end, digest of the weights.
        head_options: width, crops, accumulation, control.
        budget: "full", the protocol's, or "small".
        steps: optimiser updates.
        batch: utterances an update.
        optimizer: "adam" or "adamw".
        lr: learning rate.
        seed: of initial values, order, crops and dropout.
    """

    upstream: str
    upstream_revision: str
    task: str
    task_version: int
    dataset: str
    data_digest: str
    fold: str | None
    protocol: str
    head: str
    layer: int | None
    layer_norm: bool
    feature_dtype: str
    upstream_options: Mapping[str, Any]
    head_options: Mapping[str, Any]
    budget: str
    steps: int
    batch: int
    optimizer: str
    lr: float
    seed: int

    @property
    def run_id(self) -> str:
        """The hash of all fields, 12 hexadecimal digits."""
        return digest_of(asdict(self))[:12]


def digest_of(causes: Any) -> str:
    """The sha256 of some JSON values in canonical form; the order of a mapping's keys does not matter.

    >>> digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1})
    True
    >>> digest_of({"a": 1}) == digest_of({"a": 2})
    False
    """
    text = json.dumps(causes, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a cause must be plain JSON, found {type(value).__name__}: {value!r}")


def plan_trials(
    template: Trial,
    folds: Iterable[tuple[str | None, str]],
    lr: Iterable[float],
    seed: Iterable[int],
    layer: Iterable[int | None] | None = None,
) -> list[Trial]:
    """The trials of one upstream and one task: every fold with every seed, every layer and every learning rate.

    Args:
        template: holds all that the trials share; its fold, data digest, layer, lr and seed are replaced.
        folds: (name, data digest) of each fold.
        lr: learning rates.
        seed: seeds.
        layer: what is read: one layer, or None for the weighted sum; the template's own when left out.
    """
    shared = {name: getattr(template, name) for name in Trial.__slots__}
    rates, seeds, layers = list(lr), list(seed), [template.layer] if layer is None else list(layer)
    return [
        Trial(**{**shared, "fold": fold, "data_digest": digest, "layer": read, "lr": float(rate), "seed": int(number)})
        for fold, digest in folds
        for number in seeds
        for read in layers
        for rate in rates
    ]


def default_budget(train_s: float, dataset: str) -> str:
    """The budget a run takes when none is asked for: "small" under 10 hours of training audio and on `mini`, else "full".

    >>> default_budget(3600.0, "manifest:mine"), default_budget(360_000.0, "voxceleb1"), default_budget(360_000.0, "mini")
    ('small', 'full', 'small')
    """
    return "small" if train_s < SMALL_BUDGET_BELOW_S or dataset == "mini" else "full"


def best_rate(values: Mapping[float, float | None], higher_is_better: bool) -> float | None:
    """The learning rate with the best mean dev value, ties to the smaller rate; None when every rate failed.

    Args:
        values: mean dev metric of each rate; None for one that failed.
        higher_is_better: direction of the metric.

    >>> best_rate({1e-1: 0.5, 1e-2: 0.2, 1e-3: 0.2, 1e-4: None}, higher_is_better=False)
    0.001
    """
    ranked = sorted(
        (value if not higher_is_better else -value, rate) for rate, value in values.items() if value is not None
    )
    return ranked[0][1] if ranked else None


def next_rate(values: Mapping[float, float | None], higher_is_better: bool) -> float | None:
    """The learning rate to try next: a decade past the edge on which the best one lies; None when it lies inside, or at a limit.

    >>> next_rate({1e-1: 50.0, 1e-2: 20.0, 1e-3: 30.0}, higher_is_better=False) is None
    True
    >>> next_rate({1e-4: 50.0, 1e-5: 20.0}, higher_is_better=False)
    1e-06
    """
    best = best_rate(values, higher_is_better)
    if best is None:
        return None
    if best == min(values):
        lower = float(f"{best / 10:.6g}")
        return lower if lower >= LOWEST_RATE * 0.99 else None
    if best == max(values):
        higher = float(f"{best * 10:.6g}")
        return higher if higher <= HIGHEST_RATE * 1.01 else None
    return None


def at_edge(values: Mapping[float, float | None], higher_is_better: bool) -> bool:
    """Whether the best of several learning rates is the smallest or the largest that was tried.

    >>> at_edge({1e-1: 50.0, 1e-2: 20.0, 1e-3: 30.0}, higher_is_better=False)
    False
    """
    return len(values) > 1 and best_rate(values, higher_is_better) in (min(values), max(values))


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one upstream costs on one task: a line of the dry run.

    Attributes:
        upstream: the name.
        task: the name.
        dataset: which data.
        protocol: which protocol.
        budget: "small", "full" or "quick".
        trials: planned trials, before any growth of the grid.
        finished: those whose record is there already.
        lr: learning rates.
        seed: seeds.
        layers: probes of each rate and seed: 1, or one more than the layers with --layer all.
        utterances: distinct stretches of audio.
        extractions: those to be encoded, their states are not on disk yet.
        audio_s: their seconds of audio.
        state_bytes: what the states take.
        place: where they will be, and why.
        extract_s: estimated seconds of extraction.
        fit_s: estimated seconds of training, evaluation and scoring, of all trials.
        may_grow: whether further learning rates may follow.
    """

    upstream: str
    task: str
    dataset: str
    protocol: str
    budget: str
    trials: int
    finished: int
    lr: tuple[float, ...]
    seed: tuple[int, ...]
    layers: int
    utterances: int
    extractions: int
    audio_s: float
    state_bytes: int
    place: str
    extract_s: float
    fit_s: float
    may_grow: bool


def describe_plan(rows: Sequence[PlanRow]) -> str:
    """The plan as text: trials, extractions, gigabytes and minutes of each upstream and task, and the sums.

    >>> row = PlanRow("fbank", "ic", "mini", "strict", "small", 2, 0, (0.1, 0.01), (1,), 1, 900, 900, 3600.0, 4_000_000,
    ...               "memory: it fits", 30.0, 90.0, False)
    >>> print(describe_plan([row]))
    fbank on ic (mini, strict, small): 2 trials, lr 0.1 0.01, seed 1; 900 utterances, 1.00 h, 4.0 MB of states
      900 extractions, 0.5 min; training and scoring 1.5 min
      states in memory: it fits
    in all: 2 trials, 0 finished before; 900 extractions; 0.004 GB of states; 2.0 minutes
    """
    lines = []
    for row in rows:
        layers = f", {row.layers} probes each (--layer all)" if row.layers > 1 else ""
        grows = "; more when the best rate lies at the edge of the grid" if row.may_grow else ""
        lines.append(
            f"{row.upstream} on {row.task} ({row.dataset}, {row.protocol}, {row.budget}): {row.trials} trials, "
            f"lr {' '.join(f'{rate:g}' for rate in row.lr)}, seed {' '.join(map(str, row.seed))}{layers}; "
            f"{row.utterances} utterances, {row.audio_s / 3600:.2f} h, {readable_bytes(row.state_bytes)} of states"
        )
        minutes = f"{row.extract_s / 60:.1f} min; training and scoring {row.fit_s / 60:.1f} min"
        lines.append(f"  {row.extractions} extractions, {minutes}{grows}")
        lines.append(f"  states in {row.place}")
    lines.append(
        f"in all: {sum(row.trials for row in rows)} trials, {sum(row.finished for row in rows)} finished before; "
        f"{sum(row.extractions for row in rows)} extractions; {sum(row.state_bytes for row in rows) / 1e9:.3f} GB of states; "
        f"{sum(row.extract_s + row.fit_s for row in rows) / 60:.1f} minutes"
    )
    return "\n".join(lines)


def readable_bytes(count: float) -> str:
    """Bytes in the decimal unit that suits them.

    >>> readable_bytes(1_500_000), readable_bytes(12), readable_bytes(3.6e11)
    ('1.5 MB', '12 B', '360.0 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
