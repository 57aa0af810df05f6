"""Manifests made from a folder with a manifest.csv, and trials from a trials.txt; the corpus itself is never touched."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from superb_probe.downstreams.audio import read_header
from superb_probe.downstreams.checks import report
from superb_probe.downstreams.manifest import Manifest, Problem, Trials, Utterance
from superb_probe.errors import RequestError, all_at_once, nearest

NEEDED = ("path", "utt_id", "split")
KEPT = ("emotion", "iob", "keyword", "rttm", "session")  # label columns taken over as they are
SPLITS = ("train", "dev", "test")
SILENCES = ("SIL", "<sil>", "sil", "sp", "")
MAX_DIFFERENCE_S = 0.01


def prepare_csv(
    folder: Path,
    out: Path,
    *,
    slot: Sequence[str] = (),
    exclude: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Write train.tsv, dev.tsv and test.tsv, and trials.tsv where there is a trials.txt, from a folder with a manifest.csv.

    The CSV has the columns path, utt_id, split and any of speaker, transcript, duration_s, emotion, keyword, iob, rttm, session;
    phones come from the one phones*.csv (utt_id, phone) where there is one. A label that no utterance has is left out.

    Args:
        folder: the corpus; give it as --root with the manifests made here.
        out: a folder for the manifests, outside the corpus.
        slot: columns that become slots, e.g. coffeeDrink -> slot_coffeeDrink.
        exclude: utterance ids to leave out.
        say: told everything that was changed or left out.

    Returns:
        The files written, by "train", "dev", "test" and "trials": what --manifest takes.

    Raises:
        RequestError: with every problem found; nothing is written then.
    """
    folder, out = Path(folder), Path(out)
    tell = say or (lambda line: None)
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise RequestError(f"{out}: inside the corpus, which is left as it is. Fix: --out elsewhere.")
    header, rows = _read_csv(folder / "manifest.csv", NEEDED)
    _check_names(folder, header, rows, slot, exclude)
    rows = [row for row in rows if row["utt_id"] not in set(exclude)]
    if exclude:
        tell(f"{len(exclude)} utterances left out as asked: {', '.join(exclude)}")
    columns = _labels(folder, header, rows, slot, tell)
    manifests = _manifests(folder, rows, columns)
    trials = _trials(folder, rows, set(exclude), tell)
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, manifest in manifests.items():
        manifest.write(out / f"{split}.tsv")
        written[split] = out / f"{split}.tsv"
        tell(f"{written[split]}: {len(manifest)} utterances, {manifest.total_s / 3600:.2f} h, {', '.join(columns)}")
    if trials is not None:
        trials.write(out / "trials.tsv")
        written["trials"] = out / "trials.tsv"
        tell(f"{written['trials']}: {len(trials)} trials, {int(trials.labels.sum())} of one speaker")
    tell(f"audio stays in {folder}: give --root {folder} with these manifests")
    return written


def plain_text(transcript: str) -> str:
    """A transcript as recognisers write it: upper case, apostrophes kept, dashes read as spaces, other punctuation gone.

    >>> plain_text("Well-known; it’s Dick’s “café”.")
    "WELL KNOWN IT'S DICK'S CAFÉ"
    """
    text = unicodedata.normalize("NFC", transcript).replace("\u2019", "'").upper()
    kept = []
    for character in text:
        kind = unicodedata.category(character)
        if character == "'" or kind[0] in "LNM":
            kept.append(character)
        elif kind in ("Pd", "Zs", "Cc"):
            kept.append(" ")
    return " ".join("".join(kept).split())


def _read_csv(path: Path, needed: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        there = sorted(each.name for each in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise RequestError(
            f"{path}: no such file; the folder has {', '.join(there) or 'nothing'}. "
            f"Fix: give a folder with a {path.name} (columns {', '.join(needed)}, ...)."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = list(reader.fieldnames or [])
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 (byte {error.start}). Fix: save it as UTF-8.") from error
    missing = [name for name in needed if name not in header]
    if missing:
        raise RequestError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)}. Fix: add it.")
    uneven = [f"line {number}" for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if uneven:
        raise all_at_once(str(path), [f"{line}: not {len(header)} cells" for line in uneven], "one cell a column")
    return header, rows


def _check_names(
    folder: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]], slot: Sequence[str], exclude: Sequence[str]
) -> None:
    wrong = []
    for name in slot:
        if name not in header:
            close = nearest(name, header)
            wrong.append(f"no column {name!r} for a slot" + (f"; did you mean {close[0]}?" if close else ""))
    ids = {row["utt_id"] for row in rows}
    wrong += [f"no utterance {name!r} to leave out" for name in exclude if name not in ids]
    unknown = sorted({row["split"] for row in rows} - set(SPLITS))
    if unknown:
        wrong.append(f"splits {', '.join(map(repr, unknown))}, expected {', '.join(SPLITS)}")
    if wrong:
        raise all_at_once(str(folder / "manifest.csv"), wrong, f"columns are {', '.join(header)}")


def _labels(
    folder: Path,
    header: Sequence[str],
    rows: list[dict[str, str]],
    slot: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, list[str]]:
    """By manifest column, the label of every row; columns that nobody fills in are left out."""
    columns: dict[str, list[str]] = {}
    if "speaker" in header:
        columns["speaker"] = [row["speaker"] for row in rows]
    if "transcript" in header:
        columns["text"] = [plain_text(row["transcript"]) for row in rows]
        changed = sum(text != row["transcript"] for text, row in zip(columns["text"], rows, strict=True))
        if changed:
            tell(f"text: {changed} of {len(rows)} transcripts upper-cased or freed of punctuation")
    columns |= {name: [row[name] for row in rows] for name in KEPT if name in header}
    columns |= {f"slot_{name}": [row[name] or "none" for row in rows] for name in slot}
    if (phones := _phones(folder)) is not None:
        columns["phones"] = [phones.get(row["utt_id"], "") for row in rows]
    for name in list(columns):
        empty = sum(not label.strip() for label in columns[name])
        if empty == len(rows):
            tell(f"{name}: no utterance has one; left out")
            del columns[name]
        elif empty:
            tell(
                f"{name}: {empty} of {len(rows)} utterances have none; left empty, a task that needs it will say which"
            )
    ignored = set(header) - {"path", "utt_id", "split", "duration_s", "speaker", "transcript", *KEPT, *slot}
    if ignored:
        tell(f"columns not used: {', '.join(sorted(ignored))} (a slot is asked for with --slot)")
    return columns


def _phones(folder: Path) -> dict[str, str] | None:
    """By utterance, its phones parted by spaces, silence left out; None where there is no such file."""
    files = sorted(folder.glob("phones*.csv"))
    if not files:
        return None
    if len(files) > 1:
        raise RequestError(
            f"{folder}: several lists of phones ({', '.join(file.name for file in files)}). Fix: keep the one to use."
        )
    phones: dict[str, list[str]] = {}
    for row in _read_csv(files[0], ("utt_id", "phone"))[1]:
        phones.setdefault(row["utt_id"], [])
        if row["phone"].strip() not in SILENCES:
            phones[row["utt_id"]].append(row["phone"].strip())
    return {name: " ".join(each) for name, each in phones.items()}


def _manifests(folder: Path, rows: list[dict[str, str]], columns: Mapping[str, list[str]]) -> dict[str, Manifest]:
    """The manifest of each split, with exact lengths from the files' headers."""
    problems = []
    utterances: dict[str, list[Utterance]] = {}
    for number, row in enumerate(rows):
        try:
            duration_s = read_header(folder / row["path"]).duration_s
        except RequestError as error:
            what, _, fix = str(error).partition(". Fix: ")
            problems.append(Problem(row["utt_id"], what, fix))
            continue
        if row.get("duration_s") and abs(float(row["duration_s"]) - duration_s) > MAX_DIFFERENCE_S:
            what = f"duration_s {row['duration_s']}, but {row['path']} lasts {duration_s:.3f} s"
            problems.append(Problem(row["utt_id"], what, "the table and the audio do not belong together"))
        labels = {name: labels[number] for name, labels in columns.items()}
        utterance = Utterance(row["utt_id"], row["path"], 0.0, duration_s, labels)
        utterances.setdefault(row["split"], []).append(utterance)
    if problems:
        raise report(str(folder / "manifest.csv"), problems)
    return {split: Manifest(utterances[split], folder, split) for split in SPLITS if split in utterances}


def _trials(folder: Path, rows: list[dict[str, str]], excluded: set[str], tell: Callable[[str], None]) -> Trials | None:
    """The trials of trials.txt (label, two paths) by utterance id; those of utterances left out are dropped, and told."""
    path = folder / "trials.txt"
    if not path.is_file():
        return None
    ids = {row["path"]: row["utt_id"] for row in rows}
    wrong, kept, dropped = [], [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        cells = line.split()
        if len(cells) != 3 or cells[0] not in ("0", "1"):
            wrong.append(f"line {number}: expected a label 0 or 1 and two paths")
        elif cells[1] in ids and cells[2] in ids:
            kept.append((int(cells[0]), ids[cells[1]], ids[cells[2]]))
        elif excluded:
            dropped += 1
        else:
            wrong.append(f"line {number}: {cells[1]} or {cells[2]} is not in manifest.csv")
    if wrong:
        raise all_at_once(str(path), wrong, "label, path and path, parted by spaces")
    if dropped:
        tell(f"trials: {dropped} with an utterance that was left out are dropped")
    return Trials.of([each[0] for each in kept], [each[1] for each in kept], [each[2] for each in kept])
