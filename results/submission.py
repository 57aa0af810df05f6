"""The prediction files that SUPERB's leaderboard takes, from the items of records.

Names and lines are those of s3prl 0.4.18: its experts write the predictions, and `submit/submit.py` collects them as
`predict/<task>_public/...` (the site's public set takes prediction files only).
"""

from __future__ import annotations

import importlib
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from superb_probe.errors import RequestError, all_at_once
from superb_probe.results.record import RunRecord, read_items, read_record

Items = Mapping[str, list[str]]
CORPORA = {
    "pr": "librispeech",
    "asr": "librispeech",
    "ks": "speech_commands",
    "sid": "voxceleb1",
    "asv": "voxceleb1",
    "ic": "fluent_speech_commands",
    "er": "iemocap",
    "sf": "snips",
    "sd": "libri2mix",
    "qbe": "quesst14",
}
PARTS = (
    "pr_public", "asr_public", "asr_lm_public", "ks_public", "sid_public", "sv_public", "ic_public", "sf_public", "sd_public",
    "qbe_public", *(f"er_fold{number}_public" for number in range(1, 6)),
)  # fmt: skip
SLOTS = ("action", "object", "location")
# between the thresholds that the site tries on SD's posteriors (0.3 to 0.7): one for every level that a record's items name
POSTERIORS = (0.15, 0.35, 0.45, 0.55, 0.65, 0.85)
YES_ABOVE = 2.0  # s3prl's decision in QbE; the site's score asks the scores only
Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Submission:
    """What was written.

    Attributes:
        path: the zip file.
        parts: by name of the site's part, the number of items.
        absent: parts that no record stood for.
    """

    path: Path
    parts: Mapping[str, int]
    absent: tuple[str, ...]


def write_submission(records: Sequence[Path], out: Path) -> Submission:
    """Write `out/predict/<part>/...` and `out/predict.zip`.

    Args:
        records: the `.json` files, their items beside them: one for each part of the site.
        out: a folder without a submission in it.

    Raises:
        RequestError: with everything wrong in the records; nothing is written then.
    """
    problems: list[str] = []
    parts: dict[str, tuple[int, Files]] = {}
    if (out / "predict").exists() or (out / "predict.zip").exists():
        problems.append(f"{out} has a submission already")
    for path in records:
        try:
            part, count, files = _part(Path(path))
        except RequestError as error:
            problems.append(str(error))
            continue
        if part in parts:
            problems.append(f"{path}: a second record of {part}")
        parts[part] = (count, files)
    if problems:
        raise all_at_once(
            "submit", problems, "give one finished record of each task on its published corpus, and an empty --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "predict.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, (_, files) in sorted(parts.items()):
            for name, content in files.items():
                path = out / "predict" / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                archive.write(path, f"predict/{part}/{name}")
    counts = {part: count for part, (count, _) in sorted(parts.items())}
    return Submission(out / "predict.zip", counts, tuple(part for part in PARTS if part not in parts))


def hdf5(what: str) -> Any:
    """The module h5py, which reads and writes the files of SD's posteriors.

    Raises:
        RequestError: where it is not installed.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise RequestError(f"{what} are HDF5 files: {error}. Fix: pip install 'superb-probe[hdf5]'") from error


def _part(path: Path) -> tuple[str, int, Files]:
    """The site's name of a record's part, its items and its files."""
    record = read_record(path)
    task = record.task.name
    if task not in CORPORA:
        raise RequestError(f"{path}: {task} is no task of the site")
    if record.status != "finished" or record.probe.control is not None:
        raise RequestError(f"{path}: not a finished run on true labels ({record.error or record.probe.control})")
    if record.task.dataset != CORPORA[task]:
        raise RequestError(f"{path}: {task} on {record.task.dataset}; the site scores the test set of {CORPORA[task]}")
    items = read_items(path)
    expected, found = record.task.num_items.get("test"), len(items["id"])
    if expected != found:
        raise RequestError(f"{path}: {found} items beside the record, which says {expected}: some are missing")
    try:
        if task == "sd":
            return "sd_public", found, _posteriors(record, items)
        if task == "qbe":
            return "qbe_public", found, {"benchmark.stdlist.xml": _search(items)}
        part, name, lines = _WRITERS[task](record, items)
        return part, found, {name: "".join(f"{line}\n" for line in lines).encode()}
    except KeyError as error:
        raise RequestError(
            f"{path}: its items have no column {error}: it was written before predictions were kept. Fix: --overwrite always"
        ) from error


def _text(record: RunRecord, items: Items) -> tuple[str, str, list[str]]:
    lines = [f"{name} {said}" for name, said in zip(items["id"], items["hypothesis"], strict=True)]
    searched = record.task.name == "asr" and bool(record.probe.head_options.get("lm"))
    return f"{'asr_lm' if searched else record.task.name}_public", "predict.ark", lines


def _intents(record: RunRecord, items: Items) -> tuple[str, str, list[str]]:
    columns = [items["id"], *(items[f"predicted_slot_{slot}"] for slot in SLOTS)]
    return "ic_public", "predict.csv", [",".join(row) for row in zip(*columns, strict=True)]


def _classes(record: RunRecord, items: Items) -> tuple[str, str, list[str]]:
    task, ending = record.task.name, ""
    part = f"{task}_public"
    if task == "ks":
        ending = ".wav"  # "folder-file.wav label"
    if task == "er":
        number = (record.task.fold or "")[-1:]
        if number not in "12345" or not number:
            raise RequestError(f"record {record.run_id}: fold {record.task.fold!r} is none of IEMOCAP's five sessions")
        part = f"er_fold{number}_public"
    lines = [
        f"{name.removesuffix('.wav')}{ending} {said}"
        for name, said in zip(items["id"], items[f"predicted_{COLUMN[task]}"], strict=True)
    ]
    return part, "predict.txt", lines


def _trials(record: RunRecord, items: Items) -> tuple[str, str, list[str]]:
    lines = []
    for name, score in zip(items["id"], items["score"], strict=True):
        first, _, second = name.partition(" ")
        lines.append(f"{first.removesuffix('.wav')}_{second.removesuffix('.wav')} {score}")
    return "sv_public", "predict.txt", lines


def _posteriors(record: RunRecord, items: Items) -> Files:
    """SD's file of each recording, and the samples between its frames.

    Items hold how many of the five thresholds a posterior is above. A value between the same two thresholds stands for it, so
    that each of the ten settings the site tries decides the same of every frame.
    """
    h5py = hdf5("SD's posteriors")
    files = {"frame_shift": f"{record.upstream.hop_samples}\n".encode()}
    for name, text in zip(items["id"], items["levels"], strict=True):
        speakers = []
        for runs in text.split("; "):
            levels = [run.split("x") for run in runs.split()]
            speakers.append(np.repeat([POSTERIORS[int(level)] for level, _ in levels], [int(n) for _, n in levels]))
        buffer = io.BytesIO()
        with h5py.File(buffer, "w", track_order=False) as file:
            file.create_dataset("T_hat", data=np.stack(speakers, axis=1).astype(np.float32), track_times=False)
        files[f"scoring/predictions/{name}.h5"] = buffer.getvalue()
    return files


def _search(items: Items) -> bytes:
    """QbE's list of detected terms: the standard score of every document for every query, four decimals, as s3prl writes it."""
    documents = items["documents"][0].split()
    attributes = {"termlist_filename": "benchmark.stdlist.xml", "indexing_time": "1.00", "language": "english"}
    root = ElementTree.Element("stdlist", {**attributes, "index_size": "1", "system_id": "benchmark"})
    for query, text in zip(items["id"], items["scores"], strict=True):
        listed = ElementTree.SubElement(
            root, "detected_termlist", {"termid": query, "term_search_time": "1.0", "oov_term_count": "1"}
        )
        for document, score in zip(documents, text.split(), strict=True):
            place = {"file": document, "channel": "1", "tbeg": "0.000", "dur": "0.00"}
            decision = "YES" if float(score) > YES_ABOVE else "NO"
            ElementTree.SubElement(listed, "term", {**place, "score": score, "decision": decision})
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return written + b"\n"


COLUMN = {"ks": "keyword", "sid": "speaker", "er": "emotion"}
_WRITERS: Mapping[str, Callable[[RunRecord, Items], tuple[str, str, list[str]]]] = {
    "pr": _text,
    "asr": _text,
    "sf": _text,
    "ic": _intents,
    "ks": _classes,
    "sid": _classes,
    "er": _classes,
    "asv": _trials,
}
