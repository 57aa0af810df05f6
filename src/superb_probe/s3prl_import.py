"""s3prl's results as records: the numbers its folder vouches for, its head under our names, and the head scored again here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from superb_probe.downstreams.base import Fold, Head, LabelSet, Score, Task
from superb_probe.downstreams.corpora import choose_data
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.engine_record import describe_upstream, environment, interval, now
from superb_probe.errors import RequestError
from superb_probe.probes.dtw import DISTANCES
from superb_probe.probes.heads import BlstmCtc, FrameCtc, LstmPit, UtteranceLinear, XVector
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
    write_record,
)
from superb_probe.s3prl_experiment import CHECKPOINTS, Experiment, class_order, read_experiment, read_searches
from superb_probe.s3prl_scores import WITHOUT_TRUTH, logged, stored_score
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import family_name
from superb_probe.verification import Data, Finding, rescored

_SEARCH = {
    "feature_normalization": True,
    "silence_frame": None,
    "step_pattern": "asymmetric",
    "minmax_norm": True,
    "subsequence": True,
}
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
    experiments = read_searches(Path(folder)) if Path(folder).is_dir() else []
    experiments = experiments or [read_experiment(Path(folder))]
    findings: list[Finding] = []
    task = load_task(experiments[0].task)
    encoder = _encoder(experiments[0], upstream, checkpoint, findings)
    where, dataset, fold = _data(experiments[0], task, data, manifest, root, findings)
    experiment = experiments[0] if len(experiments) == 1 else _best_layer(experiments, fold)
    head = None if experiment.task == "qbe" else head_from_s3prl(experiment.tensors)
    score, source = stored_score(experiment, "test", fold)
    if score is None:
        fix = f"s3prl's -m evaluate -e {experiment.checkpoint.name}"
        if experiment.task in WITHOUT_TRUTH:
            fix = "--data or --manifest: its folder does not hold what is right"
        raise RequestError(f"{experiment.folder}: no test score of {task.info.name}. Fix: {fix}")
    if fold is not None and score.items and experiment.task not in WITHOUT_TRUTH:
        _same_test(experiment, fold, len(score.items["id"]))
    record = _record(experiment, task, head, score, source, encoder, dataset, fold)
    weights = None
    if fold is not None:
        weights = save({}) if head is None else _weights(experiment, task, head, fold, record, findings)
    if weights is not None:
        digest = hashlib.sha256(weights).hexdigest()
        record = replace(record, probe_weights=WeightsPart(f"{record.run_id}.safetensors", digest))
        if encoder is not None:
            findings += _scored_again(record, weights, encoder, where)
    told = [f"scored again here: {each.what}: {each.verdict} ({each.detail})" for each in findings]
    record = replace(record, warnings=(*record.warnings, *told))
    items = {name: list(column) for name, column in score.items.items()} or None
    path = write_record(record, items, out, overwrite)
    if weights is not None:
        path.with_suffix(".safetensors").write_bytes(weights)
    return Imported(path, record, tuple(findings))


def _best_layer(experiments: Sequence[Experiment], fold: Fold | None) -> Experiment:
    """The QbE evaluation of the layer that is best on dev, ties to the lower, as SUPERB chooses it.

    Raises:
        RequestError: without the data, or when a layer was not searched on dev.
    """
    folder = experiments[0].folder.parent
    if fold is None or any(each.dev is None for each in experiments):
        what = "the data are needed to choose one" if fold is None else "not all of them were searched on dev"
        layers = ", ".join(str(each.arguments["upstream_layer_selection"]) for each in experiments)
        raise RequestError(f"{folder}: layers {layers}, and {what}. Fix: name one evaluation, or give --data and dev.")
    scores = [stored_score(each, "dev", fold)[0] for each in experiments]
    values = [0.0 if score is None else score.value for score in scores]
    return experiments[values.index(max(values))]


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
    head: Head | None,
    score: Score,
    source: str,
    encoder: Upstream | None,
    dataset: str,
    fold: Fold | None,
) -> RunRecord:
    low_high, method = interval(task, score) if score.items else (None, "none: no outcome of each item")
    warnings = [f"trained by s3prl; the score is of {source}", *(fold.notes if fold else ())]
    file = experiment.checkpoint
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    task_part = _task_part(task, score, dataset, fold)
    causes = f"{digest} {dataset} {sorted(task_part.data.items())} {score.value}"
    logits = experiment.layer_logits
    return RunRecord(
        run_id=hashlib.sha256(causes.encode()).hexdigest()[:12],
        status="finished",
        upstream=_upstream_part(experiment, head, encoder, warnings),
        task=task_part,
        probe=_probe_part(experiment, task, head),
        selection=_selection(experiment, task, score, fold),
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


def _task_part(task: Task, score: Score, dataset: str, fold: Fold | None) -> TaskPart:
    info = task.info
    return TaskPart(
        name=info.name,
        version=info.version,
        dataset=dataset,
        fold=None if fold is None else fold.name,
        protocol="superb",
        metric=info.metric,
        unit=info.unit,
        higher_is_better=info.higher_is_better,
        protocol_deviations=(),
        data={} if fold is None else {name: rows.digest for name, rows in fold.manifests.items()},
        num_items={"test": len(score.items["id"])} if score.items else {},
    )


def _probe_part(experiment: Experiment, task: Task, head: Head | None) -> ProbePart:
    arguments, config, info = experiment.arguments, experiment.config, task.info
    layer, logits = arguments.get("upstream_layer_selection"), experiment.layer_logits
    normalised = bool(arguments.get("upstream_feature_normalize"))
    if head is None:
        return ProbePart(
            head="none",
            view=info.view,
            layer_norm=normalised,
            lr=0.0,
            seed=0,
            batch=1,
            steps=0,
            optimizer="none",
            trainable_params=0,
            layer=int(str(layer)),
            budget="s3prl:0",
            head_options=_search_options(experiment),
        )
    runner, optimizer = config["runner"], config["optimizer"]
    sizes = {**config["downstream_expert"].get("loaderrc", {}), **experiment.data}  # SD has a part of its own
    batch = sizes.get("train_batch_size") or sizes.get("train_batchsize") or sizes.get("batch_size") or 0
    return ProbePart(
        head=info.heads[0] if info.heads else type(head).__name__,
        view=info.view,
        layer_norm=normalised,
        lr=float(optimizer["lr"]),
        seed=int(arguments["seed"]),
        batch=int(batch),
        steps=int(runner["total_steps"]),
        optimizer=str(optimizer.get("torch_optim_name", optimizer["name"])).lower(),
        trainable_params=sum(t.numel() for t in experiment.tensors.values())
        + (0 if logits is None else logits.numel()),
        layer=0 if layer is None and logits is None else layer,
        budget=f"s3prl:{runner['total_steps']}",
        accumulate=int(runner.get("gradient_accumulate_steps", 1)),
        head_options=_options(head),
    )


def _search_options(experiment: Experiment) -> dict[str, Any]:
    """How QbE's frames were compared.

    Raises:
        RequestError: for a search that this project does not make.
    """
    expert = experiment.config["downstream_expert"]
    rules = expert["dtwrc"]
    asked = {
        "feature_normalization": bool(expert["feature_normalization"]),
        "silence_frame": expert["silence_frame"],
        "step_pattern": rules["step_pattern"],
        "minmax_norm": bool(rules["minmax_norm"]),
        "subsequence": bool(rules["subsequence"]),
    }
    other = [f"{name} {value}" for name, value in asked.items() if value != _SEARCH[name]]
    if other or rules["dist_method"] not in DISTANCES:
        other += [f"dist_method {rules['dist_method']}"] * (rules["dist_method"] not in DISTANCES)
        raise RequestError(f"{experiment.folder}: {', '.join(other)}: not SUPERB's search, which is what is imported.")
    return {"distance": rules["dist_method"]}


def _selection(experiment: Experiment, task: Task, score: Score, fold: Fold | None) -> SelectionPart:
    """What chose the checkpoint, or QbE's layer, in percent: dev where the folder says it, else test."""
    metric = task.info.protocols["superb"].select_metric or task.info.metric
    dev = logged(experiment, "dev")
    found = 100.0 * dev if dev is not None else _chosen(experiment, fold)
    if found is None:
        chosen = score.value if score.selects is None else score.selects
        return SelectionPart("test", metric, experiment.step, float(chosen))
    return SelectionPart("dev", metric, experiment.step, found)


def _chosen(experiment: Experiment, fold: Fold | None) -> float | None:
    """s3prl's best on dev, in percent, or of another checkpoint what its dev files say; None where it has none."""
    if experiment.task == "asv":
        return None
    if experiment.best is None or experiment.checkpoint.name not in CHECKPOINTS:
        score, _ = stored_score(experiment, "dev", fold)
        return None if score is None else float(score.value)
    if experiment.task == "sd":  # chosen by the frames that are right
        return 100.0 * (1.0 - experiment.best)
    return experiment.best if experiment.task == "asr" else 100.0 * experiment.best


def _upstream_part(
    experiment: Experiment, head: Head | None, encoder: Upstream | None, warnings: list[str]
) -> UpstreamPart:
    layers = 1 if experiment.layer_logits is None else experiment.layer_logits.numel()
    dim = 1 if head is None else _width(experiment, head)
    if encoder is not None:
        part = describe_upstream(encoder.info.name, encoder)
        one_layer = experiment.layer_logits is None
        if head is not None and (part.dim != dim or (part.num_layers != layers and not one_layer)):
            raise RequestError(
                f"{experiment.checkpoint}: its probe reads {layers} layers of width {dim}; {part.name} has {part.num_layers} of "
                f"{part.dim}. Fix: --upstream NAME and --checkpoint FILE of the encoder it was trained on."
            )
        return part
    unknown = "revision, parameters, hop and sample rate" if head is not None else "all of it but its name"
    warnings.append(f"encoder not here: {unknown} is not known and stands as 0 or 1")
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


def _width(experiment: Experiment, head: Head) -> int:
    """The width of the states that a head reads."""
    names = {XVector: "connector.weight", LstmPit: "model.rnn.weight_ih_l0"}
    return int(experiment.tensors[names.get(type(head), "projector.weight")].shape[1])


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
    if isinstance(head, LstmPit):
        return {"width": head.rnn.hidden_size, "repeat_last": True}
    raise RequestError(f"a {type(head).__name__} of s3prl's is not imported.")


def _weights(
    experiment: Experiment, task: Task, head: Head, fold: Fold, record: RunRecord, findings: list[Finding]
) -> bytes | None:
    """The probe's tensors as our records store them, classes in our order; None, with the reason, where that cannot be."""
    labels = task.labels(fold.manifests["train"])
    try:
        tensors = _our_order(experiment, task, head, labels, findings)
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


def _our_order(
    experiment: Experiment, task: Task, head: Head, labels: LabelSet, findings: list[Finding]
) -> dict[str, Tensor]:
    """The head's tensors with the rows of its last layer in the order of our classes.

    Raises:
        RequestError: when its classes are not those of the data.
    """
    theirs = class_order(experiment, labels, task)
    ours = [(slot, name) for slot, names in labels.classes.items() for name in names]
    tensors = dict(head.state_dict())
    if task.info.name in ("asv", "sd"):  # in no order: trials ask who is alike, and speakers are matched
        return tensors
    rows = int(tensors["linear.bias"].numel())
    if task.info.name == "sf" and set(ours) < set(theirs) and len(theirs) == rows:
        never = sorted(name for _, name in set(theirs) - set(ours))
        findings.append(Finding("tokens", "not checked", f"no training text has {never[:6]}: left out of the head"))
    elif set(theirs) != set(ours) or len(theirs) != rows:
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
