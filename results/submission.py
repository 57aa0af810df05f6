"""The prediction files that SUPERB's leaderboard takes, from the items of records.

Names and lines are those of s3prl 0.4.18: its experts write the predictions, and `submit/submit.py` collects them as
`predict/<task>_public/predict.*` (the site's public set takes prediction files only).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
}
NOT_WRITTEN = {
    "sd": "the site takes the posteriors of every frame (scoring/predictions/*.h5, frame_shift); a record's items hold turns",
    "qbe": "the site takes benchmark.stdlist.xml; how its scores are to be normalised is not stated in the reference we follow",
}
PARTS = (
    "pr_public", "asr_public", "asr_lm_public", "ks_public", "sid_public", "sv_public", "ic_public", "sf_public",
    *(f"er_fold{number}_public" for number in range(1, 6)),
)  # fmt: skip
SLOTS = ("action", "object", "location")


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
    """Write `out/predict/<part>/predict.*` and `out/predict.zip`.

    Args:
        records: the `.json` files, their items beside them: one for each part of the site.
        out: a folder without a submission in it.

    Raises:
        RequestError: with everything wrong in the records; nothing is written then.
    """
    problems: list[str] = []
    files: dict[str, tuple[str, list[str]]] = {}
    if (out / "predict").exists() or (out / "predict.zip").exists():
        problems.append(f"{out} has a submission already")
    for path in records:
        try:
            part, name, lines = _part(Path(path))
        except RequestError as error:
            problems.append(str(error))
            continue
        if part in files:
            problems.append(f"{path}: a second record of {part}")
        files[part] = (name, lines)
    if problems:
        raise all_at_once(
            "submit", problems, "give one finished record of each task on its published corpus, and an empty --out"
        )
    for part, (name, lines) in files.items():
        (out / "predict" / part).mkdir(parents=True)
        (out / "predict" / part / name).write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n"
        )
    with zipfile.ZipFile(out / "predict.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, (name, _) in sorted(files.items()):
            archive.write(out / "predict" / part / name, f"predict/{part}/{name}")
    counts = {part: len(lines) for part, (_, lines) in sorted(files.items())}
    return Submission(out / "predict.zip", counts, tuple(part for part in PARTS if part not in files))


def _part(path: Path) -> tuple[str, str, list[str]]:
    """The site's name of a record's part, its file's name and its lines."""
    record = read_record(path)
    task = record.task.name
    if task in NOT_WRITTEN:
        raise RequestError(f"{path}: {task}: {NOT_WRITTEN[task]}")
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
        return _WRITERS[task](record, items)
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
