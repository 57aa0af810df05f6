"""An experiment folder of s3prl 0.4.18, read without s3prl and without running anything a file names.

What `run_downstream.py` leaves: checkpoints with the keys Args, Config, Step, Featurizer and Downstream, `log.log` for the tasks of
utterances, and the predictions and truths of the last evaluation of each split.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from superb_probe.downstreams.base import LabelSet, Score, Task
from superb_probe.downstreams.load import load_task
from superb_probe.errors import RequestError
from superb_probe.probes.metrics import edit_distance
from superb_probe.upstreams.unpickler import plain, read_torch_file

CHECKPOINTS = ("dev-best.ckpt", "dev-clean-best.ckpt", "best-states-dev.ckpt")
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_")
INTENT_SLOTS = ("action", "object", "location")
_TASKS = {
    "fluent_commands": "ic",
    "speech_commands": "ks",
    "voxceleb1": "sid",
    "emotion": "er",
    "ctc-libriphone": "pr",
    "asr": "asr",
    "sv_voxceleb1": "asv",
}
_LOGGED = ("ic", "ks", "sid", "er")
_LINE = re.compile(r"(\w+) at step (\d+): ([-+.\deE]+)")


@dataclass(frozen=True, slots=True)
class Experiment:
    """What an experiment folder says.

    Attributes:
        folder: the folder.
        checkpoint: which of its checkpoints.
        task: our name of its downstream.
        arguments: what run_downstream.py was called with.
        config: its configuration.
        step: the update of the checkpoint.
        layer_logits: (L,) the featurizer's weights before the softmax; None where one layer was read.
        tensors: the probe's, under s3prl's names.
        best: the best value of the selecting metric so far, as s3prl keeps it.
    """

    folder: Path
    checkpoint: Path
    task: str
    arguments: Mapping[str, Any]
    config: Mapping[str, Any]
    step: int
    layer_logits: Tensor | None
    tensors: Mapping[str, Tensor]
    best: float | None

    @property
    def data(self) -> Mapping[str, Any]:
        """The part of the configuration that names files: "datarc", or "corpus" and "text" of a CTC task."""
        expert = self.config["downstream_expert"]
        found: Mapping[str, Any] = expert.get("datarc") or {**expert.get("corpus", {}), **expert.get("text", {})}
        return found

    @property
    def fold(self) -> str | None:
        """The test fold, e.g. "fold1", of emotion recognition; else None."""
        if self.task != "er":
            return None
        return str(self.data.get("test_fold") or self.arguments.get("downstream_variant") or "fold1")


def read_experiment(path: Path) -> Experiment:
    """The experiment in a folder, of its best checkpoint on dev, or of the checkpoint that is named.

    Raises:
        RequestError: if there is none, its downstream has no counterpart here, or the encoder was fine-tuned.
    """
    file = _checkpoint_file(path)
    found = read_torch_file(file)
    missing = [key for key in ("Args", "Config", "Step", "Downstream") if key not in found]
    if not isinstance(found, Mapping) or missing:
        raise RequestError(f"{file}: not a checkpoint of run_downstream.py: {', '.join(missing)} missing.")
    arguments, config = plain(found["Args"]), plain(found["Config"])
    downstream = str(arguments.get("downstream"))
    if downstream == "ctc":
        downstream = f"ctc-{str(config['downstream_expert']['corpus']['name']).lower()}"
    if downstream not in _TASKS:
        raise RequestError(
            f"{file}: downstream {downstream!r} cannot be imported. Fix: one of {', '.join(_TASKS)}; sd, sf and qbe experiments "
            "are run again here instead: their folders hold no score per test item."
        )
    if arguments.get("upstream_trainable"):
        raise RequestError(f"{file}: the encoder was fine-tuned (-f). Only probes of frozen encoders are imported.")
    tensors = {name.removeprefix("module."): tensor for name, tensor in found["Downstream"].items()}
    best = tensors.pop("best_score", None)
    featurizer = {name.removeprefix("module."): tensor for name, tensor in found.get("Featurizer", {}).items()}
    return Experiment(
        folder=file.parent,
        checkpoint=file,
        task=_TASKS[downstream],
        arguments=arguments,
        config=config,
        step=int(found["Step"]),
        layer_logits=featurizer.get("weights"),
        tensors=tensors,
        best=None if best is None else float(best),
    )


def _checkpoint_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
    if not found:
        states = sorted(file.name for file in path.glob("states-*.ckpt")) if path.is_dir() else []
        hint = f" It has {', '.join(states)}: name one of them." if states else ""
        raise RequestError(
            f"{path}: no {', '.join(CHECKPOINTS)} there.{hint} Fix: the folder given to -p or -n of s3prl."
        )
    return found[0]


def logged(experiment: Experiment, split: str) -> float | None:
    """The accuracy that log.log holds for the checkpoint's update, a fraction; None where it has none.

    A split that was scored by `-m evaluate` only is logged as update 0.
    """
    path = experiment.folder / "log.log"
    if not path.is_file():
        return None
    values: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match and match[1] == split:
            values[int(match[2])] = float(match[3])
    return values.get(experiment.step, values.get(0))


def stored_items(experiment: Experiment, split: str) -> dict[str, Any] | None:
    """The outcome of every item of the split's last evaluation, in our columns; None where the files are not there."""
    pair = [experiment.folder / name for name in _prediction_files(experiment, split)]
    if not all(file.is_file() for file in pair):
        return None
    said, truth = (_lines(file, "," if experiment.task == "ic" else " ") for file in pair)
    if said.keys() != truth.keys():
        raise RequestError(f"{pair[0]} and {pair[1]} are not of the same items. Fix: run s3prl's -m evaluate again.")
    ids = list(said)
    if experiment.task == "asv":
        labels, scores = [int(truth[name]) for name in ids], [float(said[name]) for name in ids]
        sides = [name.split("_") for name in ids]
        apart = all(len(side) == 2 for side in sides)
        return {
            "id": [" ".join(side) for side in sides] if apart else ids,
            "label": np.asarray(labels),
            "score": np.asarray(scores),
        }
    if experiment.task in ("pr", "asr"):
        return _text_items(experiment.task, ids, said, truth)
    items: dict[str, Any] = {"id": ids}
    columns = [f"slot_{slot}" for slot in INTENT_SLOTS] if experiment.task == "ic" else [""]
    correct = []
    for position, column in enumerate(columns):
        pairs = [(said[name].split(",")[position], truth[name].split(",")[position]) for name in ids]
        items[f"predicted_{column}".rstrip("_")] = [mine for mine, _ in pairs]
        correct.append([int(mine == right) for mine, right in pairs])
        if column:
            items[f"correct_{column}"] = np.asarray(correct[-1], np.int8)
    items["correct"] = np.min(np.asarray(correct, np.int8), axis=0)
    return items


def _prediction_files(experiment: Experiment, split: str) -> tuple[str, str]:
    task = experiment.task
    if task == "pr":
        return f"{split}-hyp.ark", f"{split}-ref.ark"
    if task == "asr":
        return f"{split}-clean-noLM-hyp.ark", f"{split}-clean-noLM-ref.ark"
    fold, ending = f"_{experiment.fold}" if task == "er" else "", "csv" if task == "ic" else "txt"
    return f"{split}{fold}_predict.{ending}", f"{split}{fold}_truth.{ending}"


def _lines(path: Path, separator: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(separator)
        if name in found:
            raise RequestError(f"{path}: {name} stands there twice: its file names are not unique.")
        found[name] = rest
    return found


def _text_items(task: str, ids: list[str], said: Mapping[str, str], truth: Mapping[str, str]) -> dict[str, Any]:
    pairs = [(truth[name].split(), said[name].split()) for name in ids]
    items: dict[str, Any] = {
        "id": ids,
        "edits": [edit_distance(*pair) for pair in pairs],
        "phones" if task == "pr" else "words": [len(reference) for reference, _ in pairs],
        "reference": [" ".join(reference) for reference, _ in pairs],
        "hypothesis": [" ".join(hypothesis) for _, hypothesis in pairs],
    }
    if task == "asr":
        letters = [(" ".join(reference), " ".join(hypothesis)) for reference, hypothesis in pairs]
        items["character_edits"] = [edit_distance(*pair) for pair in letters]
        items["characters"] = [len(reference) for reference, _ in letters]
    return items


def stored_score(experiment: Experiment, split: str) -> tuple[Score | None, str]:
    """The score of a split that the folder vouches for, and how; without items where they are of another evaluation."""
    task = load_task(experiment.task)
    items = stored_items(experiment, split)
    value = None if items is None else task.value({name: column for name, column in items.items() if name != "id"})
    if experiment.task not in _LOGGED:
        return (
            (None, "") if items is None or value is None else (Score(value, items), f"the last evaluation of {split}")
        )
    log = logged(experiment, split)
    if log is None:
        return None, ""
    if items is not None and value is not None and abs(value - 100.0 * log) < 1e-3:
        return Score(value, items), f"log.log and the predictions, update {experiment.step}"
    return Score(100.0 * log, {}), f"log.log, update {experiment.step}"


def class_order(experiment: Experiment, labels: LabelSet, task: Task) -> tuple[tuple[str, str], ...]:
    """s3prl's classes in the order of its output rows: (our slot, name).

    Raises:
        RequestError: when the file that s3prl numbers them by is not there.
    """
    data, name = experiment.data, experiment.task
    if name == "ks":
        return tuple(("keyword", word) for word in KEYWORDS)
    if name == "sid":
        count = len(next(iter(labels.classes.values())))
        return tuple(("speaker", f"id{10001 + number}") for number in range(count))
    if name == "asv":
        return tuple(
            ("speaker", speaker) for speaker in labels.classes["speaker"]
        )  # their order is in no file; no score needs it
    file = _class_file(experiment)
    if not file.is_file():
        raise RequestError(
            f"{file} is gone, by which s3prl numbers the classes of {task.info.name}. Fix: put it back there."
        )
    if name == "ic":
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        seen = {slot: dict.fromkeys(row[slot] for row in rows) for slot in INTENT_SLOTS}
        return tuple((f"slot_{slot}", value) for slot in INTENT_SLOTS for value in seen[slot])
    if name == "er":
        numbers: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))["labels"]
        return tuple((next(iter(labels.classes)), word) for word in sorted(numbers, key=numbers.__getitem__))
    words = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    first = ("<pad>", "<eos>", "<unk>") if name == "pr" else ("<s>", "<pad>", "</s>", "<unk>")
    assert data
    return tuple(("tokens", token) for token in (*first, *words))


def _class_file(experiment: Experiment) -> Path:
    data = experiment.data
    if experiment.task == "ic":
        return Path(data["file_path"]) / "data" / "train_data.csv"
    if experiment.task == "er":
        return Path(data["meta_data"]) / str(experiment.fold).replace("fold", "Session") / "train_meta_data.json"
    return Path(data["vocab_file" if experiment.task == "pr" else "dict_path"])
