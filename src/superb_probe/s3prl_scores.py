"""The scores that an experiment folder of s3prl vouches for: from its log, its prediction files, or its posteriors and the data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from superb_probe.downstreams.base import Fold, FrameGrid, Score, Split
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.qbe import QueryByExample
from superb_probe.downstreams.sf import SlotFilling
from superb_probe.errors import RequestError
from superb_probe.probes.metrics import edit_distance
from superb_probe.probes.untrained import DOCUMENT, QUERY
from superb_probe.results.submission import hdf5
from superb_probe.s3prl_experiment import INTENT_SLOTS, SEARCH_FILE, Experiment

LOGGED = ("ic", "ks", "sid", "er")
WITHOUT_TRUTH = ("sd", "qbe")  # their folders hold what was said, not what is right
_RATE_HZ = 16000
_LEAST = 1e-7  # posteriors of 0 and 1 in float32 have no logit
_MOST_APART = 5  # frames that s3prl's labels and states may differ by
_LINE = re.compile(r"(\w+) at step (\d+): ([-+.\deE]+)")


def stored_score(experiment: Experiment, split: Split, fold: Fold | None = None) -> tuple[Score | None, str]:
    """The score of a split that the folder vouches for, and how; without items where they are of another evaluation.

    Args:
        experiment: the folder.
        split: dev or test.
        fold: the data, of which SD and QbE need the truth.
    """
    if experiment.task in WITHOUT_TRUTH:
        return (None, "") if fold is None else _scored_with_truth(experiment, split, fold)
    task = load_task(experiment.task)
    items = stored_items(experiment, split)
    score = None
    if items is not None and isinstance(task, SlotFilling):
        score = task.score_texts({"id": items["id"]}, items["reference"], items["hypothesis"])
    elif items is not None:
        score = Score(task.value({name: column for name, column in items.items() if name != "id"}), items)
    if experiment.task not in LOGGED:
        return (None, "") if score is None else (score, f"the last evaluation of {split}")
    log = logged(experiment, split)
    if log is None:
        return None, ""
    if score is not None and abs(score.value - 100.0 * log) < 1e-3:
        return score, f"log.log and the predictions, update {experiment.step}"
    return Score(100.0 * log, {}), f"log.log, update {experiment.step}"


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
    if experiment.task == "sf":
        return {"id": ids, "reference": list(truth.values()), "hypothesis": [said[name] for name in truth]}
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
    if task in ("pr", "sf"):
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


def _scored_with_truth(experiment: Experiment, split: Split, fold: Fold) -> tuple[Score | None, str]:
    manifest = fold.manifests[split]
    if experiment.task == "qbe":
        path = experiment.folder / SEARCH_FILE if split == "test" else experiment.dev
        if path is None:
            return None, ""
        return QueryByExample().score_standard(_search_scores(path, manifest), manifest), f"{SEARCH_FILE} and the data"
    if split != "test":
        return None, ""  # s3prl writes posteriors of test only
    hop = frame_shift(experiment)
    predictions = _posteriors(experiment.folder / "scoring" / "predictions", manifest, hop)
    task = load_task("sd").bind(fold, FrameGrid(hop, _RATE_HZ, {}))
    return task.score(predictions, fold, "test"), "scoring/predictions and the data, the least of ten settings"


def frame_shift(experiment: Experiment) -> int:
    """Samples between the frames of SD's labels.

    Raises:
        RequestError: when neither the folder nor the configuration says it.
    """
    path = experiment.folder / "frame_shift"
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else str(experiment.data.get("frame_shift"))
    if not text.isdigit() or text == "0":
        raise RequestError(f"{path}: {text!r} is no number of samples. Fix: s3prl's -m evaluate -e writes it.")
    return int(text)


def _posteriors(folder: Path, manifest: Manifest, hop_samples: int) -> dict[str, NDArray[np.float64]]:
    """By chunk of the data, the logits (T, C) of s3prl's posteriors.

    Raises:
        RequestError: naming the recordings of the data that have no file, or one of another length.
    """
    recordings: dict[str, list[Any]] = {}
    for utterance in manifest:
        recordings.setdefault(utterance.labels["recording"], []).append(utterance)
    found, wrong = {}, []
    for name, chunks in recordings.items():
        path = folder / f"{name}.h5"
        if not path.is_file():
            wrong.append(f"no {path.name}")
            continue
        with hdf5(f"{folder}: SD's posteriors").File(path, "r") as file:
            values = np.asarray(file["T_hat"][:], dtype=np.float64).clip(_LEAST, 1 - _LEAST)
        counts = [round(chunk.duration_s * _RATE_HZ) // hop_samples for chunk in chunks]
        # s3prl pads the last chunk of a recording to the length of the others
        if len(values) < sum(counts) - _MOST_APART or (len(chunks) == 1 and len(values) > counts[0] + _MOST_APART):
            wrong.append(f"{path.name} has {len(values)} frames, the recording {sum(counts)}")
            continue
        logits = np.log(values / (1 - values))
        parts = np.split(logits[: sum(counts)], np.cumsum(counts)[:-1])
        found.update({chunk.id: part for chunk, part in zip(chunks, parts, strict=True)})
    spare = sorted({path.stem for path in folder.glob("*.h5")} - set(recordings))
    wrong += [f"{name}.h5 is of no recording of the data" for name in spare]
    if wrong:
        what = f"{len(wrong)} of {len(recordings)} recordings do not fit: {'; '.join(wrong[:3])}"
        raise RequestError(
            f"{folder}: {what}. Fix: the data it was tested on; -m evaluate -e CKPT writes posteriors anew."
        )
    return found


def _search_scores(path: Path, manifest: Manifest) -> dict[str, NDArray[np.float64]]:
    """By query, the scores (documents,) of a stdlist file, in the order of the manifest's documents.

    Raises:
        RequestError: if it cannot be read, or has other queries or documents than the data.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise RequestError(f"{path}: a document type declaration, which s3prl does not write; not read.")
        lists = ElementTree.fromstring(text).iter("detected_termlist")
        found = {each.attrib["termid"]: {t.attrib["file"]: float(t.attrib["score"]) for t in each} for each in lists}
    except (OSError, ElementTree.ParseError, KeyError, ValueError) as error:
        raise RequestError(f"{path}: not a list of detected terms: {error}. Fix: s3prl's -m evaluate again.") from error
    queries = {u.id for u in manifest if u.labels["role"] == QUERY}
    documents = [u.id for u in manifest if u.labels["role"] == DOCUMENT]
    listed = set().union(*found.values()) if found else set()
    if set(found) != queries or any(set(each) != set(documents) for each in found.values()):
        raise RequestError(
            f"{path} has {len(found)} queries and {len(listed)} documents, the data have {len(queries)} and {len(documents)}: "
            f"{_unlike(set(found) | listed, queries | set(documents))}. Fix: the data it was tested on."
        )
    return {name: np.array([each[document] for document in documents]) for name, each in found.items()}


def _unlike(there: set[str], here: set[str]) -> str:
    return f"only there {sorted(there - here)[:3]}, only here {sorted(here - there)[:3]}"
