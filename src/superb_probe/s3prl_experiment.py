"""An experiment folder of s3prl 0.4.18, read without s3prl and without running anything a file names.

What `run_downstream.py` leaves: checkpoints with the keys Args, Config, Step, Featurizer and Downstream, and what
`s3prl_scores.py` reads scores from. QbE, which trains nothing, leaves a folder for each evaluation of a layer on a split.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from superb_probe.downstreams.base import LabelSet, Split, Task
from superb_probe.errors import RequestError
from superb_probe.upstreams.unpickler import plain, read_torch_file

CHECKPOINTS = ("dev-best.ckpt", "dev-clean-best.ckpt", "best-states-dev.ckpt")
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_")
SEARCH_FILE = "benchmark.stdlist.xml"
INTENT_SLOTS = ("action", "object", "location")
_TASKS = {
    "fluent_commands": "ic",
    "speech_commands": "ks",
    "voxceleb1": "sid",
    "emotion": "er",
    "ctc-libriphone": "pr",
    "asr": "asr",
    "sv_voxceleb1": "asv",
    "ctc-snips": "sf",
    "diarization": "sd",
    "quesst14_dtw": "qbe",
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """What an experiment folder says.

    Attributes:
        folder: the folder.
        checkpoint: which of its checkpoints; of QbE, the scores on test.
        task: our name of its downstream.
        arguments: what run_downstream.py was called with.
        config: its configuration.
        step: the update of the checkpoint.
        layer_logits: (L,) the featurizer's weights before the softmax; None where one layer was read.
        tensors: the probe's, under s3prl's names.
        best: the best value of the selecting metric so far, as s3prl keeps it.
        dev: of QbE, the scores of the same layer on dev; None where they are not there.
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
    dev: Path | None = None

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
        raise RequestError(f"{file}: downstream {downstream!r} cannot be imported. Fix: one of {', '.join(_TASKS)}.")
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


def read_searches(path: Path) -> list[Experiment]:
    """The QbE evaluations of test in a folder or its subfolders, by layer, each with its scores on dev; none: not a folder of QbE.

    Raises:
        RequestError: if they are not of one encoder, or only of dev.
    """
    folders = sorted(file.parent for file in (*path.glob(SEARCH_FILE), *path.glob(f"*/{SEARCH_FILE}")))
    found: dict[tuple[int, Split], tuple[Path, dict[str, Any], dict[str, Any]]] = {}
    for folder in folders:
        arguments, config = (_newest_yaml(folder, kind) for kind in ("args", "config"))
        layer = arguments.get("upstream_layer_selection")
        if layer is None:
            raise RequestError(f"{folder}: no single layer was searched. Fix: s3prl's -l LAYER, one run a layer.")
        key: tuple[int, Split] = (int(layer), "dev" if arguments.get("evaluate_split") == "dev" else "test")
        if key in found:
            raise RequestError(f"{folder} and {found[key][0]} are both of layer {key[0]} on {key[1]}. Fix: name one.")
        found[key] = (folder, arguments, config)
    causes = {
        (each["upstream"], each.get("upstream_ckpt"), str(config["downstream_expert"]["dtwrc"]))
        for _, each, config in found.values()
    }
    tests = sorted(layer for layer, split in found if split == "test")
    if len(causes) > 1 or (found and not tests):
        what = "of several encoders or distances" if len(causes) > 1 else "of dev only"
        raise RequestError(f"{path}: its evaluations are {what}. Fix: one folder of -m evaluate -t test, and -t dev.")
    searches = []
    for layer in tests:
        folder, arguments, config = found[layer, "test"]
        dev = found[layer, "dev"][0] / SEARCH_FILE if (layer, "dev") in found else None
        searches.append(Experiment(folder, folder / SEARCH_FILE, "qbe", arguments, config, 0, None, {}, None, dev))
    return searches


def _newest_yaml(folder: Path, kind: str) -> dict[str, Any]:
    """The last `args_*.yaml` or `config_*.yaml`; their names are times."""
    paths = sorted(folder.glob(f"{kind}_*.yaml"))
    if not paths:
        raise RequestError(f"{folder}: no {kind}_*.yaml beside {SEARCH_FILE}. Fix: the folder as s3prl left it.")
    try:
        values = yaml.safe_load(paths[-1].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RequestError(f"{paths[-1]}: not YAML of plain values: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{paths[-1]}: not a list of names and values.")
    return values


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
    if name in ("asv", "sd"):  # their order is in no file; no score needs it
        return tuple(("speaker", speaker) for speaker in labels.classes["speaker"])
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
    if name == "sf":
        return tuple(("tokens", token) for token in _slot_tokens(experiment, file))
    words = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    first = ("<pad>", "<eos>", "<unk>") if name == "pr" else ("<s>", "<pad>", "</s>", "<unk>")
    assert data
    return tuple(("tokens", token) for token in (*first, *words))


def _slot_tokens(experiment: Experiment, file: Path) -> list[str]:
    """Characters, one a line, and two tags a slot; the first line of the slots is a heading."""
    slots = Path(experiment.data["slots_file"])
    if not slots.is_file():
        raise RequestError(f"{slots} is gone, by which s3prl numbers the tags of sf. Fix: put it back there.")
    characters = [line.strip("\r\n") for line in file.read_text(encoding="utf-8").split("\n")]
    characters = characters[:-1] if characters and not characters[-1] else characters
    kinds = slots.read_text(encoding="utf-8").split("\n")[1:]
    return ["<pad>", "<eos>", "<unk>", *characters, *(f"{end}-{kind}" for kind in kinds for end in "BE")]


def _class_file(experiment: Experiment) -> Path:
    data = experiment.data
    if experiment.task == "ic":
        return Path(data["file_path"]) / "data" / "train_data.csv"
    if experiment.task == "er":
        return Path(data["meta_data"]) / str(experiment.fold).replace("fold", "Session") / "train_meta_data.json"
    return Path(data["vocab_file" if experiment.task in ("pr", "sf") else "dict_path"])
