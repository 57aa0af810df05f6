"""How far this package is from the official code: encoders, heads, training, effects and metrics against stored numbers.

A folder laid out as `upstreams/NAME.pt` (and `NAME.fairseq.pt`) with `NAME.npz`, `probes/*.npz`, `probes/metrics.json`,
`training/*.npz`, `sox/*.npz` is measured case by case. What a file is, is read off its content; its name is only its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Head
from superb_probe.downstreams.sox import gain, gain_and_trim
from superb_probe.errors import CheckError, RequestError, SuperbProbeError
from superb_probe.probes import metrics
from superb_probe.probes.ctc import FrameLogits
from superb_probe.probes.heads import LstmPit, UtteranceLinear, XVector
from superb_probe.probes.s3prl_weights import head_from_s3prl, renamed
from superb_probe.probes.update import Updater
from superb_probe.probes.weighted_sum import WeightedSum
from superb_probe.upstreams.base import frame_mask
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.hubert import HubertEncoder

Arrays = Mapping[str, NDArray[Any]]

BOUNDS = {"upstream": 1e-4, "probe": 1e-5, "training": 1e-4, "sox": 1e-4, "metric": 1e-9}
GRADIENT_BOUND = 5e-5
METRICS: dict[str, tuple[str, ...]] = {
    "verification": ("eer",),
    "text": ("wer", "cer"),
    "slots": ("slot_type_f1", "slot_value_cer", "slot_value_wer"),
}
NOT_WEIGHTS = {"hidden_states", "lengths", "labels", "targets", "target_lengths", "featurizer.weights"}
OUTCOMES = {"logits", "vector", "embedding", "loss", "der", "weights_grad"}


@dataclass(frozen=True, slots=True)
class Case:
    """One file, or one metric, against its reference.

    Attributes:
        name: file stem, or "metrics.eer".
        kind: "upstream", "probe", "training", "sox" or "metric".
        error: of the quantity closest to its bound, or farthest over it; None where nothing could be measured.
        bound: the bound of that quantity.
        passed: every quantity is within its bound and nothing else is wrong.
        detail: the error of every quantity measured.
        reason: why it failed; empty when it passed.
    """

    name: str
    kind: str
    error: float | None
    bound: float
    passed: bool
    detail: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """All cases of a folder.

    Attributes:
        passed: every case passed, and there is one.
        cases: in the order of the folder's parts.
        absent: parts of the layout that the folder does not have, and that were not measured.
    """

    passed: bool
    cases: tuple[Case, ...]
    absent: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints.

        >>> ConformanceReport(False, ()).to_dict()
        {'passed': False, 'cases': []}
        """
        keys = ("name", "kind", "error", "bound", "passed", "detail", "reason")
        cases = [{key: getattr(case, key) for key in keys} for case in self.cases]
        return {"passed": self.passed, "cases": [case | {"detail": dict(case["detail"])} for case in cases]}

    def format_table(self) -> str:
        """One line a case with its measured error, the reasons of failures, and a last line with the verdict.

        >>> print(ConformanceReport(False, (), ("sox",)).format_table())
        not measured, absent from the folder: sox
        conformance FAILED: 0 cases
        """
        width = max((len(case.name) for case in self.cases), default=0)
        lines = []
        for case in self.cases:
            error = "-" if case.error is None else f"{case.error:.2e}"
            verdict = "ok" if case.passed else f"FAILED: {case.reason}"
            lines.append(f"{case.kind:<8}  {case.name:<{width}}  {error:>8} <= {case.bound:.0e}  {verdict}")
        if self.absent:
            lines.append(f"not measured, absent from the folder: {', '.join(self.absent)}")
        failed = sum(not case.passed for case in self.cases)
        total = f"{len(self.cases)} cases"
        lines.append(
            f"conformance passed: {total}"
            if self.passed
            else f"conformance FAILED: {total}" + f", {failed} failed" * (failed > 0)
        )
        return "\n".join(lines)


@dataclass(slots=True)
class _Measured:
    """The errors of one case as they are collected."""

    bound: float
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def relative(self, quantity: str, value: ArrayLike, expected: ArrayLike, bound: float | None = None) -> None:
        """Norm of the difference over the norm of what is expected."""
        self._add(quantity, value, expected, bound, lambda a, b: _norm(a - b) / (_norm(b) or 1.0))

    def each_relative(self, quantity: str, value: ArrayLike, expected: ArrayLike, bound: float | None = None) -> None:
        """The worst relative error of single numbers."""
        self._add(quantity, value, expected, bound, lambda a, b: _largest((a - b) / np.where(b == 0, 1.0, b)))

    def absolute(self, quantity: str, value: ArrayLike, expected: ArrayLike, bound: float | None = None) -> None:
        """The largest difference."""
        self._add(quantity, value, expected, bound, lambda a, b: _largest(a - b))

    def _add(
        self,
        quantity: str,
        value: ArrayLike,
        expected: ArrayLike,
        bound: float | None,
        error_of: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    ) -> None:
        bound = self.bound if bound is None else bound
        ours, truth = np.asarray(value, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        if ours.shape != truth.shape:
            self.reasons.append(f"{quantity}: shape {ours.shape} measured, {truth.shape} expected")
        elif not np.isfinite(truth).all():
            self.reasons.append(f"{quantity}: the expected values are not finite")
        elif not np.isfinite(ours).all():
            self.reasons.append(f"{quantity}: the measured values are not finite")
        else:
            error = error_of(ours, truth)
            self.errors[quantity] = (error, bound)
            if not error <= bound:
                self.reasons.append(f"{quantity}: error {error:.2e} over the bound {bound:.0e}")

    def case(self, name: str, kind: str) -> Case:
        """The finished case."""
        if not self.errors and not self.reasons:
            self.reasons.append("nothing in it to measure")
        error, bound = max(self.errors.values(), key=lambda pair: pair[0] / pair[1], default=(None, self.bound))
        detail = {quantity: pair[0] for quantity, pair in self.errors.items()}
        return Case(name, kind, error, bound, not self.reasons, detail, "; ".join(self.reasons))


def run_conformance(folder: Path) -> ConformanceReport:
    """Measure every case of a folder of reference numbers; a case that cannot be measured is a failed one.

    Args:
        folder: laid out as the module's docstring says; the audio of `sox/` is looked for in `folder/../data`.

    Raises:
        RequestError: when there is no such folder.
    """
    if not folder.is_dir():
        raise RequestError(
            f"no folder {folder}. Fix: give the folder that holds upstreams/, probes/, training/ and sox/"
        )
    folder = folder.resolve()
    cases = [*_upstream_cases(folder / "upstreams")]
    probes = sorted((folder / "probes").glob("*.npz"))
    cases += [_measure(path.stem, "probe", _measure_probe, path) for path in probes]
    training = sorted((folder / "training").glob("*.npz"))
    cases += [_measure(path.stem, "training", _measure_training, path) for path in training]
    effects = sorted((folder / "sox").glob("*.npz"))
    cases += [_measure(path.stem, "sox", _measure_sox, path) for path in effects]
    cases += _metric_cases(folder / "probes" / "metrics.json")
    kinds = {case.kind for case in cases}
    absent = [] if "metric" in kinds else ["probes/metrics.json"]
    parts = {"upstreams": {"upstream"}, "probes": {"probe", "metric"}, "training": {"training"}, "sox": {"sox"}}
    for part, measured in parts.items():
        if not (folder / part).is_dir():
            absent.append(part)
        elif not kinds & measured:
            kind = max(measured)
            cases.append(Case(part, kind, None, BOUNDS[kind], False, {}, f"{folder / part} holds no file to measure"))
    return ConformanceReport(bool(cases) and all(case.passed for case in cases), tuple(cases), tuple(absent))


def main_conformance(folder: Path, as_json: bool) -> int:
    """`superb-probe conformance DIR [--json]`: prints the report; 0 when everything passed, else 1."""
    report = run_conformance(folder)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        print(report.format_table())
        if not report.cases:
            print(f"{folder} holds nothing to measure")
    return 0 if report.passed else 1


def _measure(name: str, kind: str, measure: Callable[..., None], *paths: Path) -> Case:
    """One case; whatever a file does to its reader is the reason why the case failed."""
    measured = _Measured(BOUNDS[kind])
    try:
        measure(measured, *paths)
    except Exception as error:  # noqa: BLE001 - files of strangers fail in many ways; none of them may end the report or pass
        text = " ".join(str(error).split())
        measured.reasons.append(text if isinstance(error, SuperbProbeError) else f"{type(error).__name__}: {text}")
    return measured.case(name, kind)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if broken or not arrays:
        raise CheckError(f"{path.name}: values that are not finite in {broken}" if broken else f"{path.name} is empty")
    return arrays


def _need(arrays: Arrays, *names: str) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise CheckError(f"missing in the file: {', '.join(missing)}")


def _norm(values: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.square(values).sum()))


def _largest(values: NDArray[np.float64]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# upstreams


def _upstream_cases(folder: Path) -> Iterator[Case]:
    references = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    used = set()
    for path in sorted(folder.glob("*.pt")):
        stem = path.stem
        reference = stem if stem in references else stem.removesuffix(".fairseq")
        if reference in references:
            used.add(reference)
            yield _measure(stem, "upstream", _measure_upstream, path, references[reference])
        else:
            yield Case(
                stem, "upstream", None, BOUNDS["upstream"], False, {}, f"{path.name} has no {reference}.npz beside it"
            )
    for stem in sorted(set(references) - used):
        yield Case(stem, "upstream", None, BOUNDS["upstream"], False, {}, f"{stem}.npz has no {stem}.pt beside it")


def _measure_upstream(measured: _Measured, checkpoint: Path, reference: Path) -> None:
    arrays = _load(reference)
    encoder = _encoder(checkpoint)
    utterances = sorted({name.split("/")[0] for name in arrays if name.startswith("utt")})
    if not utterances:
        raise CheckError(f"{reference.name}: no utt0/wav in it")
    for utterance in utterances:
        _need(arrays, f"{utterance}/wav")
        layers = sorted(name for name in arrays if name.startswith(f"{utterance}/layer"))
        wav = _tensor(arrays[f"{utterance}/wav"])[None]
        with torch.inference_mode():
            output = encoder(wav, torch.tensor([wav.shape[1]]))
        states = output.states[:, 0].numpy()
        if len(layers) != len(states) or layers != [f"{utterance}/layer{k:02d}" for k in range(len(states))]:
            measured.reasons.append(f"{utterance}: {len(states)} layers measured, the file has {layers}")
            continue
        for name, layer in zip(layers, states, strict=True):
            measured.relative(name, layer, arrays[name])


def _encoder(path: Path) -> HubertEncoder:
    checkpoint = read_checkpoint(path)
    encoder = HubertEncoder(checkpoint.config)
    encoder.load_state_dict(dict(checkpoint.tensors))
    return encoder.eval()


# heads


def _normalized(path: Path) -> bool:
    return "normalized" in path.stem.split(".")


def _targets(head: Head, arrays: Arrays) -> dict[str, Tensor]:
    """A batch's targets under the names our heads read."""
    if isinstance(head, (UtteranceLinear, XVector, LstmPit)):
        _need(arrays, "labels")
        name = {UtteranceLinear: "label", XVector: "speaker", LstmPit: "speakers"}[type(head)]
        return {name: _tensor(arrays["labels"])}
    _need(arrays, "targets", "target_lengths")
    return {"tokens": _tensor(arrays["targets"]), "tokens_lengths": _tensor(arrays["target_lengths"])}


def _mixed(featurizer: WeightedSum, states: Tensor, num_frames: Tensor) -> Tensor:
    """(B, T, D) the weighted sum, zero past each row's end: stored states are not zero there."""
    frames: Tensor = featurizer(states)
    return frames.masked_fill(~frame_mask(num_frames, frames.shape[1])[..., None], 0.0)


def _measure_probe(measured: _Measured, path: Path) -> None:
    arrays = _load(path)
    _need(arrays, "hidden_states", "lengths", "featurizer.weights", "loss", "weights_grad")
    names = set(arrays) - NOT_WEIGHTS - OUTCOMES
    head = head_from_s3prl({name: _tensor(arrays[name]) for name in names})
    outcome = ("vector", "embedding") if isinstance(head, XVector) else ("logits",)
    _need(arrays, *outcome, *(("der",) if isinstance(head, LstmPit) else ()))
    states, num_frames = _tensor(arrays["hidden_states"]), _tensor(arrays["lengths"])
    if states.ndim != 4 or num_frames.shape != states.shape[1:2] or int(num_frames.max()) > states.shape[2]:
        raise CheckError(
            f"hidden_states {tuple(states.shape)} and lengths {num_frames.tolist()} do not fit (L, B, T, D)"
        )
    featurizer = WeightedSum(states.shape[0], layer_norm=_normalized(path))
    featurizer.load_state_dict({"weights": _tensor(arrays["featurizer.weights"])})
    outputs = head(_mixed(featurizer, states, num_frames), num_frames)
    loss = head.loss(outputs, Batch(tuple(map(str, range(states.shape[1]))), num_frames, _targets(head, arrays)))
    loss.backward()  # type: ignore[no-untyped-call]
    valid = frame_mask(num_frames, states.shape[2]).numpy()
    for name in outcome:
        value = (outputs if isinstance(outputs, Tensor) else getattr(outputs, name)).detach().numpy()
        expected = arrays[name]
        if isinstance(outputs, FrameLogits) and value.shape == expected.shape:
            value, expected = value[valid], expected[valid]
        measured.relative(name, value, expected)
    measured.each_relative("loss", loss.item(), arrays["loss"])
    gradient = featurizer.weights.grad
    measured.relative(
        "weights_grad", gradient.numpy() if gradient is not None else [], arrays["weights_grad"], GRADIENT_BOUND
    )
    if isinstance(head, LstmPit):
        der = metrics.frame_der(outputs.logits.detach().numpy(), arrays["labels"], arrays["lengths"])
        measured.absolute("der", der, arrays["der"], BOUNDS["metric"])


def _numbered(arrays: Arrays, group: str) -> list[NDArray[Any]]:
    names = sorted(
        (name for name in arrays if re.fullmatch(rf"{group}/\d+", name)), key=lambda name: int(name.split("/")[1])
    )
    if [int(name.split("/")[1]) for name in names] != list(range(len(names))) or not names:
        raise CheckError(f"{group}/00, /01, ... expected, found {names}")
    return [arrays[name] for name in names]


def _measure_training(measured: _Measured, path: Path) -> None:
    arrays = _load(path)
    _need(arrays, "batches", "loss", "grad_norm", "lr", "accumulate", "clip", "optimizer", "final/featurizer.weights")
    states = [_tensor(array) for array in _numbered(arrays, "hidden_states")]
    initial = {name.removeprefix("initial/"): array for name, array in arrays.items() if name.startswith("initial/")}
    start = initial.pop("featurizer.weights", None)
    head = head_from_s3prl({name: _tensor(array) for name, array in initial.items()}).train()
    featurizer = WeightedSum(states[0].shape[0], layer_norm=_normalized(path))
    if start is not None:
        featurizer.load_state_dict({"weights": _tensor(start)})
    accumulate = int(arrays["accumulate"])
    updater = Updater(
        [*featurizer.parameters(), *head.parameters()],
        str(arrays["optimizer"]).lower(),
        float(arrays["lr"]),
        float(arrays["clip"]),
        accumulate,
    )
    losses, norms = _train(updater, featurizer, head, states, arrays)
    measured.each_relative("loss", np.reshape(losses, (-1, accumulate)).mean(1), arrays["loss"])
    measured.each_relative("grad_norm", norms, arrays["grad_norm"])
    if updater.skipped_updates:
        measured.reasons.append(f"{updater.skipped_updates} updates skipped for a gradient norm that is not finite")
    trained = {f"final/{name}": value for name, value in head.state_dict().items()}
    trained["final/featurizer.weights"] = featurizer.weights.detach()
    finals = {name: f"final/{renamed(name.removeprefix('final/'))}" for name in arrays if name.startswith("final/")}
    finals["final/featurizer.weights"] = "final/featurizer.weights"
    if set(finals.values()) != set(trained):
        measured.reasons.append(f"final weights without a partner: {sorted(set(finals.values()) ^ set(trained))}")
    for name, ours in finals.items():
        if ours in trained:
            measured.relative(name, trained[ours].numpy(), arrays[name])


def _train(
    updater: Updater, featurizer: WeightedSum, head: Head, states: list[Tensor], arrays: Arrays
) -> tuple[list[float], list[float]]:
    """The loss of every batch and the gradient norm of every update."""
    batches = arrays["batches"]
    if batches.ndim != 2 or len(batches) != updater.accumulate * len(arrays["loss"]):
        raise CheckError(f"batches {batches.shape} for {len(arrays['loss'])} updates of {updater.accumulate} batches")
    targets_of = _training_targets(head, arrays)
    losses, norms = [], []
    for rows in batches.tolist():
        num_frames = torch.tensor([states[row].shape[1] for row in rows])
        padded = nn.utils.rnn.pad_sequence([states[row].transpose(0, 1) for row in rows], batch_first=True)
        frames = _mixed(featurizer, padded.permute(2, 0, 1, 3), num_frames)
        batch = Batch(tuple(map(str, rows)), num_frames, targets_of(rows))
        loss = head.loss(head(frames, num_frames), batch)
        losses.append(loss.item())
        norm = updater.update(loss)
        if norm is not None:
            norms.append(norm)
    return losses, norms


def _training_targets(head: Head, arrays: Arrays) -> Callable[[list[int]], dict[str, Tensor]]:
    """A function from a batch's utterance numbers to its targets."""
    if isinstance(head, (UtteranceLinear, XVector)):
        _need(arrays, "labels")
        return lambda rows: _targets(head, {"labels": arrays["labels"][rows]})
    name = "labels" if isinstance(head, LstmPit) else "targets"
    sequences = [_tensor(array) for array in _numbered(arrays, name)]

    def padded(rows: list[int]) -> dict[str, Tensor]:
        chosen = [sequences[row] for row in rows]
        values = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1).numpy()
        return _targets(head, {name: values, "target_lengths": np.array([len(row) for row in chosen])})

    return padded


# effects and metrics


def _measure_sox(measured: _Measured, path: Path) -> None:
    arrays = _load(path)
    data = path.parents[2] / "data"
    for number in sorted({name.split("/")[0] for name in arrays}):
        _need(arrays, f"{number}/path", f"{number}/gain", f"{number}/gain_silence")
        relative = Path(str(arrays[f"{number}/path"]))
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckError(f"{number}/path: {relative} leads out of {data}")
        if not (data / relative).is_file():
            raise CheckError(
                f"{number}/path: no audio {data / relative}. Fix: put the data folder beside the fixtures' one"
            )
        wav, rate_hz = soundfile.read(data / relative, dtype="float32")
        if wav.ndim != 1 or rate_hz != 16000:
            raise CheckError(f"{relative}: shape {wav.shape} at {rate_hz} Hz; one channel at 16000 Hz is needed")
        measured.absolute(f"{number}/gain", gain(wav, -3.0), arrays[f"{number}/gain"])
        measured.absolute(f"{number}/gain_silence", gain_and_trim(wav), arrays[f"{number}/gain_silence"])


def _metric_cases(path: Path) -> Iterator[Case]:
    if not path.exists():
        return
    for group, names in METRICS.items():
        for name in names:
            yield _measure(f"metrics.{name}", "metric", partial(_measure_metric, group=group, name=name), path)


def _measure_metric(measured: _Measured, path: Path, group: str, name: str) -> None:
    given = json.loads(path.read_text(encoding="utf-8")).get(group, {})
    inputs = ("labels", "scores") if group == "verification" else ("reference", "hypothesis")
    _need(given, *inputs, name)
    value = getattr(metrics, name)(*(given[key] for key in inputs))
    measured.absolute(name, value[0] if name == "eer" else value, given[name])
