"""s3prl's results as records: the numbers its folder vouches for, its head under our names, and the head scored again here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from superb_probe.downstreams.base import Fold, Head, LabelSet, Task
from superb_probe.downstreams.corpora import choose_data
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.engine_record import describe_upstream, environment, interval, now
from superb_probe.errors import RequestError
from superb_probe.probes.heads import BlstmCtc, FrameCtc, UtteranceLinear, XVector
from superb_probe.probes.runner import Probe
from superb_probe.probes.s3prl_weights import head_from_s3prl
from superb_probe.results.record import (
    CostPart,
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
from superb_probe.s3prl_experiment import CHECKPOINTS, Experiment, class_order, logged, read_experiment, stored_score
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import family_name
from superb_probe.verification import Data, Finding, rescored

_OWN_NAMES = ("fbank", "mfcc")
_CHECKPOINT_NAMES = ("hubert_local", "hubert_custom")


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import gave.

    Attributes:
        path: the record's file.
        record: the record.
        findings: what was scored again here, and what was not, with the reason.
    """

    path: Path
    record: RunRecord
    findings: tuple[Finding, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing that was scored again is different."""
        return all(finding.verdict != "different" for finding in self.findings)


def import_s3prl(
    folder: Path | str,
    out: Path | str,
    *,
    data: Mapping[str, Path | None] | None = None,
    manifest: Mapping[str, Path] | None = None,
    root: Path | None = None,
    upstream: str | None = None,
    checkpoint: Path | None = None,
    overwrite: Overwrite = "never",
) -> Imported:
    """A record of an s3prl experiment, marked as imported; its head is scored again where encoder and data are at hand.

    Args:
        folder: an experiment folder, or one of its checkpoints.
        out: folder of records.
        data: the corpus by name; {"mini": None} is the embedded one.
        manifest: TSVs by split instead.
        root: what their audio is relative to.
        upstream: our name of the encoder, where it does not follow from s3prl's.
        checkpoint: the encoder's weights, where they are not where s3prl read them.
        overwrite: whether a record that is there may be replaced.

    Raises:
        RequestError: if the folder, its head or the data do not fit.
    """
    experiment = read_experiment(Path(folder))
    task = load_task(experiment.task)
    theirs = head_from_s3prl(experiment.tensors)
    score, source = stored_score(experiment, "test")
    if score is None:
        raise RequestError(
            f"{experiment.folder}: no test score of {task.info.name}. Fix: s3prl's -m evaluate -e {experiment.checkpoint.name}"
        )
    findings: list[Finding] = []
    encoder = _encoder(experiment, upstream, checkpoint, findings)
    where, dataset, fold = _data(experiment, task, data, manifest, root, findings)
    if fold is not None and score.items:
        _same_test(experiment, fold, len(score.items["id"]))
    record = _record(experiment, task, theirs, score, source, encoder, dataset, fold)
    weights = None if fold is None else _weights(experiment, task, theirs, fold, record, findings)
    if weights is not None:
        path = record_path(out, record.task.name, record.upstream.name, record.run_id)
        record = replace(
            record, probe_weights=WeightsPart(f"{record.run_id}.safetensors", hashlib.sha256(weights).hexdigest())
        )
        if encoder is not None:
            findings += _scored_again(record, weights, encoder, where)
    told = [f"scored again here: {each.what}: {each.verdict} ({each.detail})" for each in findings]
    record = replace(record, warnings=(*record.warnings, *told))
    items = {name: list(column) for name, column in score.items.items()} or None
    path = write_record(record, items, out, overwrite)
    if weights is not None:
        path.with_suffix(".safetensors").write_bytes(weights)
    return Imported(path, record, tuple(findings))


def _encoder(
    experiment: Experiment, upstream: str | None, checkpoint: Path | None, findings: list[Finding]
) -> Upstream | None:
    """The encoder; None, with the reason among the findings, where it cannot be built here."""
    theirs, stored = str(experiment.arguments["upstream"]), experiment.arguments.get("upstream_ckpt")
    try:
        if upstream is None and theirs in _OWN_NAMES:
            return load_upstream(theirs)
        if upstream is None and theirs in _CHECKPOINT_NAMES:
            file = checkpoint or Path(str(stored))
            return load_upstream(family_name(read_checkpoint(file).config), checkpoint=file)
        return load_upstream(upstream or f"s3prl:{theirs}", checkpoint=checkpoint or stored)
    except RequestError as error:
        if upstream is not None or checkpoint is not None:
            raise
        findings.append(Finding("head", "not checked", f"the encoder {theirs} is not here: {error}"))
        return None


def _data(
    experiment: Experiment,
    task: Task,
    data: Mapping[str, Path | None] | None,
    manifest: Mapping[str, Path] | None,
    root: Path | None,
    findings: list[Finding],
) -> tuple[Data, str, Fold | None]:
    """Where the data are, their name, and the experiment's fold of them."""
    if not data and not manifest:
        findings.append(
            Finding("head", "not checked", "no data were given (--data NAME=DIR, --data mini or --manifest)")
        )
        return Data(), f"s3prl:{experiment.arguments['downstream']}", None
    where, name = Data(root, manifest), "mini"
    if manifest:
        name = f"manifest:{Path(manifest.get('test', next(iter(manifest.values())))).resolve().parent.name}"
    elif data and data != {"mini": None}:
        name, folder, extras = choose_data(
            task.info.name, {key: path for key, path in data.items() if path is not None}
        )
        where = Data(folder, None, extras)
    folds = load_folds(
        task, dataset=name, root=where.root, extras=where.extras, manifests=where.manifest, protocol="superb"
    )
    wanted = experiment.fold
    found = [fold for fold in folds if wanted is None or (fold.name or "")[-1:] == wanted[-1:]]
    if len(found) != 1:
        raise RequestError(f"{name}: {len(found)} of its folds are s3prl's {wanted}: {[fold.name for fold in folds]}.")
    return where, name, found[0]


def _same_test(experiment: Experiment, fold: Fold, count: int) -> None:
    """Refuse data whose test split is not the experiment's."""
    test = fold.trials["test"] if experiment.task == "asv" else fold.manifests["test"]
    if len(test) != count:
        raise RequestError(
            f"{experiment.folder} was tested on {count} items, the data have {len(test)}. Fix: the data it was trained and tested on."
        )


def _record(
    experiment: Experiment,
    task: Task,
    head: Head,
    score: Any,
    source: str,
    encoder: Upstream | None,
    dataset: str,
    fold: Fold | None,
) -> RunRecord:
    arguments, config, info = experiment.arguments, experiment.config, task.info
    layer = arguments.get("upstream_layer_selection")
    logits = experiment.layer_logits
    low_high, method = interval(task, score) if score.items else (None, "none: no outcome of each item")
    warnings = [f"trained by s3prl; the score is of {source}", *(fold.notes if fold else ())]
    file = experiment.checkpoint
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    dev = logged(experiment, "dev")
    chosen, split = (100.0 * dev, "dev") if dev is not None else _chosen(experiment, score.value)
    count = len(score.items["id"]) if score.items else None
    data = {} if fold is None else {name: rows.digest for name, rows in fold.manifests.items()}
    runner = config["runner"]
    return RunRecord(
        run_id=hashlib.sha256(f"{digest} {dataset} {sorted(data.items())} {score.value}".encode()).hexdigest()[:12],
        status="finished",
        upstream=_upstream_part(experiment, head, encoder, warnings),
        task=TaskPart(
            name=info.name,
            version=info.version,
            dataset=dataset,
            fold=None if fold is None else fold.name,
            protocol="superb",
            metric=info.metric,
            unit=info.unit,
            higher_is_better=info.higher_is_better,
            protocol_deviations=(),
            data=data,
            num_items={} if count is None else {"test": count},
        ),
        probe=ProbePart(
            head=info.heads[0] if info.heads else type(head).__name__,
            view=info.view,
            layer_norm=bool(arguments.get("upstream_feature_normalize")),
            lr=float(config["optimizer"]["lr"]),
            seed=int(arguments["seed"]),
            batch=int(experiment.data.get("train_batch_size") or experiment.data.get("batch_size") or 0),
            steps=int(runner["total_steps"]),
            optimizer=str(config["optimizer"].get("torch_optim_name", config["optimizer"]["name"])).lower(),
            trainable_params=sum(t.numel() for t in experiment.tensors.values())
            + (0 if logits is None else logits.numel()),
            layer=0 if layer is None and logits is None else layer,
            budget=f"s3prl:{runner['total_steps']}",
            accumulate=int(runner.get("gradient_accumulate_steps", 1)),
            head_options=_options(head),
        ),
        selection=SelectionPart(split, info.metric, experiment.step, chosen),  # type: ignore[arg-type]
        score=ScorePart("test", float(score.value), low_high, method, dict(score.extra)),
        layer_weights=None if logits is None else tuple(logits.double().softmax(0).tolist()),
        items=None,
        probe_weights=None,
        cost=CostPart(),
        environment=environment(torch.device("cpu")),
        started_at=now(),
        finished_at=now(),
        warnings=tuple(warnings),
        imported_from=f"s3prl {experiment.folder.name}/{file.name} sha256:{digest[:12]}",
    )


def _chosen(experiment: Experiment, test: float) -> tuple[float, str]:
    """What chose the checkpoint, in percent: s3prl's best on dev, or of another checkpoint its dev files; test where neither is."""
    if experiment.task == "asv" or experiment.best is None:
        return test, "test"
    if experiment.checkpoint.name not in CHECKPOINTS:
        score, _ = stored_score(experiment, "dev")
        return (test, "test") if score is None else (score.value, "dev")
    return experiment.best if experiment.task == "asr" else 100.0 * experiment.best, "dev"


def _upstream_part(experiment: Experiment, head: Head, encoder: Upstream | None, warnings: list[str]) -> UpstreamPart:
    layers = 1 if experiment.layer_logits is None else experiment.layer_logits.numel()
    first = experiment.tensors["connector.weight" if isinstance(head, XVector) else "projector.weight"]
    dim = int(first.shape[1])
    if encoder is not None:
        part = describe_upstream(encoder.info.name, encoder)
        one_layer = experiment.layer_logits is None
        if part.dim != dim or (part.num_layers != layers and not one_layer):
            raise RequestError(
                f"{experiment.checkpoint}: its probe reads {layers} layers of width {dim}; {part.name} has {part.num_layers} of "
                f"{part.dim}. Fix: --upstream NAME and --checkpoint FILE of the encoder it was trained on."
            )
        return part
    warnings.append("encoder not here: revision, parameters, hop and sample rate are not known and stand as 0")
    return UpstreamPart(
        name=f"s3prl:{experiment.arguments['upstream']}",
        revision="unknown",
        num_layers=layers,
        dim=dim,
        hop_samples=0,
        waveform_norm="unknown",
        sample_rate_hz=0,
        lookahead_samples=None,
        layer_convention="unknown",
        params=0,
        trained_on=("unknown",),
        provided_by="s3prl",
    )


def _options(head: Head) -> dict[str, Any]:
    """The options that make `Task.head` give a head of these sizes."""
    if isinstance(head, (UtteranceLinear, FrameCtc)):
        return {"width": head.projector.out_features}
    if isinstance(head, BlstmCtc):
        layers = [layer for layer in head.rnns if isinstance(layer, torch.nn.LSTM)]
        return {"width": layers[0].hidden_size, "projection": head.projector.out_features, "num_layers": len(layers)}
    if isinstance(head, XVector):
        width, _ = head.objective.shape
        return {"width": int(width), "pool_width": int(head.linear1.in_features // 2), "pool_extra_frame": True}
    raise RequestError(f"a {type(head).__name__} of s3prl's is not imported.")


def _weights(
    experiment: Experiment, task: Task, head: Head, fold: Fold, record: RunRecord, findings: list[Finding]
) -> bytes | None:
    """The probe's tensors as our records store them, classes in our order; None, with the reason, where that cannot be."""
    labels = task.labels(fold.manifests["train"])
    try:
        tensors = _our_order(experiment, task, head, labels)
        ours = task.head(record.upstream.dim, labels, record.probe.head_options)
        probe = Probe(ours, None if experiment.layer_logits is None else record.upstream.num_layers)
        stored = {f"head.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
        if experiment.layer_logits is not None:
            stored["weighted_sum.weights"] = experiment.layer_logits.float().contiguous()
        probe.load_state_dict(stored)
    except RuntimeError as error:  # load_state_dict: sizes of another corpus
        findings.append(Finding("head", "not checked", " ".join(str(error).split())))
        return None
    except RequestError as error:
        findings.append(Finding("head", "not checked", str(error)))
        return None
    return save(stored)


def _our_order(experiment: Experiment, task: Task, head: Head, labels: LabelSet) -> dict[str, Tensor]:
    """The head's tensors with the rows of its last layer in the order of our classes.

    Raises:
        RequestError: when its classes are not those of the data.
    """
    theirs = class_order(experiment, labels, task)
    ours = [(slot, name) for slot, names in labels.classes.items() for name in names]
    tensors = dict(head.state_dict())
    if task.info.name == "asv":
        return tensors
    rows = int(tensors["linear.bias"].numel())
    if set(theirs) != set(ours) or len(theirs) != rows:
        spare, lacking = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        raise RequestError(
            f"its head has {rows} classes, its files name {len(theirs)}, the data {len(ours)}: only there {spare[:5]}, only here "
            f"{lacking[:5]}. Fix: the data it was trained on."
        )
    order = torch.tensor([theirs.index(each) for each in ours])
    return {**tensors, "linear.weight": tensors["linear.weight"][order], "linear.bias": tensors["linear.bias"][order]}


def _scored_again(record: RunRecord, weights: bytes, encoder: Upstream, where: Data) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record.run_id}.json"
        path.with_suffix(".safetensors").write_bytes(weights)
        try:
            return rescored(path, record, encoder, None, where)
        except RequestError as error:
            return [Finding("head", "not checked", str(error))]
