"""Checking a record against what stands beside it: its items, its trained probe, and the encoder and data it names."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import Fold, FrameGrid, LabelSet, Prediction, Split, Task
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.errors import RequestError
from superb_probe.probes.runner import Probe
from superb_probe.probes.states import States
from superb_probe.probes.statistics import as_column
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.untrained import SubsequenceDtw, search_split
from superb_probe.results.compare import numbers
from superb_probe.results.record import RunRecord, read_items, read_record
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream

Verdict = Literal["equal", "within the interval", "different", "not checked"]
_NOT_HEAD = ("evaluate_every", "max_crop_s", "crops", "crop_seed", "stop_hopeless", "padding")
EQUAL = 1e-6  # in the metric's unit: sums in another order
# what an imported record's dev score is of, where that is not what is scored here
_DEV_ELSEWHERE = {
    "ks": "s3prl scores a random draw of dev, its classes equally often",
    "er": "s3prl draws dev at random",
    "sd": "s3prl averages over batches of dev",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: e.g. "score from the stored items".
        verdict: "equal", "within the interval" (the record's own 95 %), "different", or "not checked".
        detail: both values, or why it was not checked.
    """

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class Data:
    """Where the data of a record stand on this machine; nothing: the embedded corpus.

    Attributes:
        root: the corpus folder, or what the manifests' audio is relative to.
        manifest: TSVs by "train", "dev", "test", "trials", "dev_trials".
        extras: files of a published corpus that are not in its folder, by name.
    """

    root: Path | None = None
    manifest: Mapping[str, Path] | None = None
    extras: Mapping[str, Path] | None = None


def load_probe(record: Path | str, data: Data | None = None) -> Probe:
    """The trained probe of a record: a module from states (L, B, T, D), or (1, B, T, D) of its one layer, to the head's outputs.

    Args:
        record: the `.json` file, its `.safetensors` beside it.
        data: where its training labels are: they name the classes.

    Raises:
        RequestError: for a failed record, another version of the task, or weights that are gone or were changed.
    """
    path = Path(record)
    found = read_record(path)
    task, _, labels = _question(found, data or Data())
    return _probe(path, found, task, labels)


def _probe(path: Path, record: RunRecord, task: Task, labels: LabelSet) -> Probe:
    weights = record.probe_weights
    if weights is None:
        raise RequestError(f"{path}: this record has no trained probe ({record.status}).")
    file = path.with_name(weights.file)
    if not file.is_file():
        raise RequestError(f"{path}: {file.name} is not beside it. Fix: copy the probe's weights there.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != weights.sha256:
        raise RequestError(f"{path}: {file.name} is not the file the record was written with (sha256 differs).")
    options = {name: value for name, value in record.probe.head_options.items() if name not in _NOT_HEAD}
    head = task.head(record.upstream.dim, labels, options)
    probe = Probe(head, None if record.probe.layer is not None else record.upstream.num_layers)
    probe.load_state_dict(load_file(file))
    return probe.eval()


def _question(record: RunRecord, data: Data) -> tuple[Task, Fold, LabelSet]:
    """The task, the record's fold and its classes.

    Raises:
        RequestError: when the data here are not the record's.
    """
    task = load_task(record.task.name)
    if task.info.version != record.task.version:
        raise RequestError(
            f"record {record.run_id} is of {task.info.name} version {record.task.version}, this is version {task.info.version}. "
            f"Fix: verify it with {record.upstream.provided_by}."
        )
    folds = load_folds(
        task,
        dataset=record.task.dataset,
        root=data.root,
        extras=data.extras,
        manifests=data.manifest,
        protocol=record.task.protocol,
    )
    fold = next((each for each in folds if each.name == record.task.fold), None)
    if fold is None:
        raise RequestError(f"record {record.run_id}: no fold {record.task.fold!r} in these data.")
    others = [split for split, manifest in fold.manifests.items() if record.task.data.get(split) != manifest.digest]
    if others:
        raise RequestError(
            f"record {record.run_id}: the data here are not its own ({', '.join(sorted(others))} differ). Fix: --root or --manifest."
        )
    return task, fold, task.labels(fold.manifests.get("train") or next(iter(fold.manifests.values())))


def verify(
    record: Path | str,
    *,
    upstream: Upstream | None = None,
    checkpoint: Path | None = None,
    data: Data | None = None,
    retrain: bool = False,
) -> list[Finding]:
    """Check a record: its score from its items, its probe's weights, its scores from the probe and the encoder, or by training again.

    Args:
        record: the `.json` file.
        upstream: its encoder, where it cannot be built by name.
        checkpoint: the encoder's weights, where the record names some.
        data: where its data stand.
        retrain: train the probe again as well.

    Returns:
        What was checked, in order.

    Raises:
        RequestError: for a failed or unreadable record.
    """
    path = Path(record)
    found = read_record(path)
    if found.score is None:
        raise RequestError(f"{path}: a failed run has no score to verify ({found.error}).")
    findings = [_items_finding(path, found)]
    try:
        findings += rescored(path, found, upstream, checkpoint, data or Data())
    except RequestError as error:
        findings.append(Finding("scores from the stored probe", "not checked", str(error)))
    if retrain:
        findings.append(_retrained(found, upstream, checkpoint, data or Data()))
    return findings


def _finding(what: str, recorded: float, value: float, interval: tuple[float, float] | None) -> Finding:
    detail = f"recorded {recorded:.6f}, now {value:.6f}"
    if abs(recorded - value) <= EQUAL * max(1.0, abs(recorded)):
        return Finding(what, "equal", detail)
    inside = interval is not None and interval[0] <= value <= interval[1]
    return Finding(what, "within the interval" if inside else "different", detail)


def _items_finding(path: Path, record: RunRecord) -> Finding:
    assert record.score is not None
    what = "score from the stored items"
    if record.items is None or not path.with_name(record.items).is_file():
        return Finding(what, "not checked", "no items beside the record")
    columns = {name: as_column(values) for name, values in numbers(read_items(path)).items()}
    value = load_task(record.task.name).value({name: column for name, column in columns.items() if name != "id"})
    return _finding(what, record.score.value, value, None)  # the same items: nothing but equal is right


def rescored(
    path: Path, record: RunRecord, upstream: Upstream | None, checkpoint: Path | None, data: Data
) -> list[Finding]:
    """Dev and test scores of the stored probe on states encoded anew, one utterance at a time.

    Raises:
        RequestError: when the encoder, the data or the probe's weights are not the record's.
    """
    assert record.score is not None
    assert record.selection is not None
    task, fold, labels = _question(record, data)
    batch = task.info.s3prl_batches.evaluation
    if batch > 1 and record.probe.head_options.get("padding") == "s3prl":
        raise RequestError(
            f"record {record.run_id}: with --padding s3prl the states of {task.info.name}'s dev and test depend on their batches "
            f"of {batch}, and here utterances are encoded one at a time. Fix: --retrain"
        )
    encoder = load_encoder(record, upstream, checkpoint)
    splits: list[Split] = ["test"] if record.selection.split == "test" else ["dev", "test"]
    if task.info.trained:
        probe = _probe(path, record, task, labels)
        predictions, frames = _predictions(record, task, fold, probe, encoder, splits)
    else:
        predictions, frames = _searched(record, task, fold, labels, encoder, splits), {}
    bound = task.bind(fold, FrameGrid(encoder.info.hop_samples, encoder.info.sample_rate_hz, frames))
    what = "the stored probe" if task.info.trained else "the search made again"
    findings = []
    for split in splits:
        score = bound.score(predictions[split], fold, split)
        if split == record.selection.split:
            bound = bound.tuned_by(score)
            chosen = score.value if score.selects is None else score.selects
            findings.append(_dev_finding(record, f"{split} score from {what}", chosen))
        if split == "test":
            score = bound.score(predictions[split], fold, split)
            findings.append(_finding(f"test score from {what}", record.score.value, score.value, record.score.ci95))
    return findings


def _dev_finding(record: RunRecord, what: str, value: float) -> Finding:
    """The score that chose, compared; of another tool's record only where both are of the same items."""
    assert record.selection is not None
    found = _finding(what, record.selection.value, value, None)
    why = _DEV_ELSEWHERE.get(record.task.name) if record.imported_from else None
    if found.verdict != "different" or why is None or record.selection.split == "test":
        return found
    return Finding(what, "not checked", f"{why}: {found.detail}")


def _searched(
    record: RunRecord, task: Task, fold: Fold, labels: LabelSet, encoder: Upstream, splits: list[Split]
) -> dict[Split, dict[str, Prediction]]:
    """By query, the scores of the record's layer on states encoded anew: what stands for a probe where nothing is trained."""
    layer, options = record.probe.layer, record.probe.head_options
    head = task.head(record.upstream.dim, labels, {name: options[name] for name in options if name not in _NOT_HEAD})
    assert layer is not None and isinstance(head, SubsequenceDtw)
    found: dict[Split, dict[str, Prediction]] = {}
    for split in splits:
        manifest = fold.manifests[split]
        store = FeatureStore(
            dtype=record.probe.feature_dtype, layer_norm=record.probe.layer_norm, waveform=task.info.waveform
        )
        store.build(encoder, manifest)
        states = States(store, manifest.ids, layer, torch.device("cpu"))
        found[split] = {
            query: scores[0].numpy() for query, scores in search_split(states, manifest, head.distance).items()
        }
    return found


def load_encoder(record: RunRecord, upstream: Upstream | None, checkpoint: Path | None) -> Upstream:
    """The record's encoder.

    Raises:
        RequestError: when the one found is another.
    """
    if upstream is None:
        options = {name: value for name, value in record.upstream.options.items() if name != "weights"}
        if record.random_weights:
            options["random"] = int(record.upstream.revision.partition(":")[2])
        upstream = load_upstream(record.upstream.name, checkpoint=checkpoint, **options)
    if upstream.info.revision != record.upstream.revision:
        raise RequestError(
            f"the encoder found is {upstream.info.revision}, the record's is {record.upstream.revision}. Fix: --checkpoint FILE."
        )
    return upstream


def _predictions(
    record: RunRecord, task: Task, fold: Fold, probe: Probe, encoder: Upstream, splits: list[Split]
) -> tuple[dict[Split, dict[str, Prediction]], dict[str, int]]:
    predictions: dict[Split, dict[str, Prediction]] = {split: {} for split in splits}
    frames: dict[str, int] = {}
    kind = getattr(torch, record.probe.feature_dtype, torch.float32)
    with torch.inference_mode():
        for split in splits:
            manifest = fold.manifests[split]
            for utterance in manifest:
                wave = read_waveform(utterance, manifest.root, encoder.info.sample_rate_hz, task.info.waveform)
                encoded = encoder.extract([torch.from_numpy(wave)])
                states, count = read_states(encoded.states, record, kind), encoded.num_frames
                frames[utterance.id] = int(count[0])
                if record.probe.view == "mean":
                    count = torch.ones_like(count)
                outputs = probe(states, count)
                predictions[split][utterance.id] = probe.head.predict(outputs)[0]
    return predictions, frames


def read_states(states: Tensor, record: RunRecord, kind: torch.dtype) -> Tensor:
    """States as the store gives them: (L, 1, T, D), or one layer of them, normalised, averaged, rounded."""
    if record.probe.layer is not None:
        states = states[record.probe.layer : record.probe.layer + 1]
    normal = torch.nn.functional.layer_norm
    if record.probe.view == "mean":
        states = normal(states, states.shape[-1:]) if record.probe.layer_norm else states
        return states.mean(dim=2, keepdim=True).to(kind).float()
    states = states.to(kind).float()
    return normal(states, states.shape[-1:]) if record.probe.layer_norm else states


def _retrained(record: RunRecord, upstream: Upstream | None, checkpoint: Path | None, data: Data) -> Finding:
    """The score when the probe is trained again with the record's settings."""
    from superb_probe.engine import run

    assert record.score is not None
    what = "test score of a probe trained again"
    budget, _, steps = record.probe.budget.partition(":")
    options = {name: value for name, value in record.probe.head_options.items() if name not in (*_NOT_HEAD, "padding")}
    head, name = options.pop("head", None), record.task.dataset
    published = data.root is not None and not data.manifest and name != "mini"
    corpus = {name: data.root, **{f"{name}.{extra}": path for extra, path in (data.extras or {}).items()}}
    try:
        encoder = load_encoder(record, upstream, checkpoint)
        task, _, _ = _question(record, data)  # other data would give another number
        with tempfile.TemporaryDirectory() as folder:
            records = run(
                encoder,
                record.task.name,
                data=corpus if published else None,  # type: ignore[arg-type]
                root=None if published else data.root,
                manifest=data.manifest,
                head=head,
                head_option=options if task.info.trained else None,
                layer=record.probe.layer,
                layer_norm=record.probe.layer_norm,
                feature_dtype=record.probe.feature_dtype,
                budget=None if budget == "quick" else budget,
                tier="quick" if budget == "quick" else None,
                steps=int(steps) if steps else None,
                lr=[record.probe.lr] if record.probe.steps else None,
                seed=[record.probe.seed],
                protocol=record.task.protocol,
                control=record.probe.control,
                padding="s3prl" if record.probe.head_options.get("padding") == "s3prl" else "exact",
                device="cpu",
                out=Path(folder),
            )
    except RequestError as error:
        return Finding(what, "not checked", str(error))
    again = next(
        (each for each in records if each.task.fold == record.task.fold and each.probe.layer == record.probe.layer),
        None,
    )
    if again is None or again.score is None:
        return Finding(
            what,
            "different",
            f"recorded {record.score.value:.6f}, now it failed: {again.error if again else 'no record'}",
        )
    return _finding(what, record.score.value, again.score.value, record.score.ci95)
