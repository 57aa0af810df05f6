"""Manifests: which utterances a split has and what their labels are, as a TSV that people can read and diff."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import overload

import numpy as np
from numpy.typing import NDArray

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, AudioHeader, read_header, read_waveform, stretch_error
from superb_probe.errors import RequestError, all_at_once

COLUMNS = ("id", "audio", "start_s", "duration_s")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a manifest: a stretch of one audio file and its labels.

    Attributes:
        id: unique within the manifest, stable across machines (never an absolute path).
        audio: path relative to the corpus root.
        start_s: first second used; 0.0 for the whole file.
        duration_s: length used, > 0.
        labels: what the task needs, e.g. {"speaker": "id10270"} or {"text": "..."}; an empty string is an unknown label.
    """

    id: str
    audio: str
    start_s: float
    duration_s: float
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a request: where, what, and what mends it.

    >>> print(Problem("train.tsv, utterance u7", "no text", "write it or leave the utterance out"))
    train.tsv, utterance u7: no text. Fix: write it or leave the utterance out
    """

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        """Where, what and the fix on one line."""
        return f"{self.where}: {self.what}. Fix: {self.fix}"


class Manifest(Sequence[Utterance]):
    """The utterances of one split; a TSV on disk, readable and diffable.

    Attributes:
        root: the folder `Utterance.audio` is relative to.
        name: the name of the file it was read from, without its ending.
        corpus: the corpus whose own class lists apply ("mini"); empty for anyone's own data, whose classes are those of train.
        columns: label columns, in the order of the canonical text (sorted).
        digest: sha256 of the canonical text, "sha256:...": goes into store keys and records.

    >>> manifest = Manifest([Utterance("a", "a.wav", 0.0, 1.5, {"text": "HI"})], Path("."), "train")
    >>> print(manifest.text().expandtabs(1), end="")
    id audio start_s duration_s text
    a a.wav 0 1.5 HI
    >>> len(manifest), manifest["a"].labels["text"], manifest.total_s
    (1, 'HI', 1.5)
    """

    def __init__(self, utterances: Sequence[Utterance], root: Path, name: str, *, corpus: str = "") -> None:
        """Check and freeze the utterances.

        Raises:
            RequestError: for repeated ids, differing label columns, bad paths or times: all of them at once.
        """
        self.root = Path(root)
        self.name = name
        self.corpus = corpus
        self._utterances = tuple(utterances)
        self._position = {utterance.id: index for index, utterance in enumerate(self._utterances)}
        self.columns = tuple(sorted(self._utterances[0].labels)) if self._utterances else ()
        wrong = list(_wrong_utterances(self._utterances, self.columns))
        if wrong:
            raise all_at_once(f"manifest {name}", wrong, "correct these utterances")
        self.digest = "sha256:" + hashlib.sha256(self.text().encode("utf-8")).hexdigest()

    @classmethod
    def read(cls, path: Path, root: Path | None = None) -> Manifest:
        """Read a manifest: UTF-8 TSV with the columns id, audio, start_s, duration_s and one a label.

        Args:
            path: the TSV; Windows line ends and a byte order mark are accepted.
            root: what `audio` is relative to; the TSV's folder when None.

        Raises:
            RequestError: with everything wrong in the file.
        """
        path = Path(path)
        root = path.parent if root is None else Path(root)
        header, rows = read_table(path, required=COLUMNS)
        if not rows:
            raise RequestError(f"{path}: no utterances below the header. Fix: one line an utterance.")
        wrong: list[str] = []
        seen: dict[str, int] = {}
        headers: dict[str, AudioHeader] = {}
        utterances = []
        for line, row in rows:
            cells = dict(zip(header, row, strict=True))
            found = list(_wrong_cells(cells, line, seen))
            if not found:
                try:
                    utterances.append(_utterance(cells, root, headers))
                except (RequestError, ValueError) as error:
                    found = [f"line {line}: {error}"]
            wrong += found
        if wrong:
            raise all_at_once(str(path), wrong, "correct these lines; docs/quickstart.md shows a manifest")
        return cls(utterances, root, path.stem)

    def text(self) -> str:
        """The canonical text: sorted label columns, times with no needless digits, a newline after every line."""
        lines = ["\t".join((*COLUMNS, *self.columns))]
        for utterance in self._utterances:
            cells = (utterance.id, utterance.audio, _number(utterance.start_s), _number(utterance.duration_s))
            lines.append("\t".join((*cells, *(utterance.labels[column] for column in self.columns))))
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write the canonical text to a TSV."""
        Path(path).write_text(self.text(), encoding="utf-8", newline="\n")

    def __len__(self) -> int:
        """Number of utterances, U."""
        return len(self._utterances)

    def __iter__(self) -> Iterator[Utterance]:
        """The utterances in the order of the file."""
        return iter(self._utterances)

    def __contains__(self, item: object) -> bool:
        """Whether an utterance, or an utterance of that id, is in the split."""
        return item in self._position if isinstance(item, str) else item in self._utterances

    @overload
    def __getitem__(self, key: int | str) -> Utterance: ...
    @overload
    def __getitem__(self, key: slice) -> Manifest: ...
    def __getitem__(self, key: int | str | slice) -> Utterance | Manifest:
        """An utterance by position or by id; a slice is a manifest of its own."""
        if isinstance(key, slice):
            return Manifest(self._utterances[key], self.root, self.name, corpus=self.corpus)
        return self._utterances[self._position[key] if isinstance(key, str) else key]

    def __repr__(self) -> str:
        """Name, size and the beginning of the digest."""
        return f"Manifest({self.name!r}, {len(self)} utterances, {self.digest[:15]})"

    @property
    def ids(self) -> tuple[str, ...]:
        """The utterance ids in the order of the file."""
        return tuple(self._position)

    @property
    def total_s(self) -> float:
        """Seconds of audio."""
        return sum(utterance.duration_s for utterance in self._utterances)

    def labels(self, column: str) -> list[str]:
        """One label of every utterance; empty strings where the column is missing."""
        return [utterance.labels.get(column, "") for utterance in self._utterances]

    def keep(self, ids: Sequence[str]) -> Manifest:
        """The manifest with only these utterances, in the order of the file."""
        wanted = set(ids)
        kept = [each for each in self._utterances if each.id in wanted]
        return Manifest(kept, self.root, self.name, corpus=self.corpus)

    def problems(
        self,
        *,
        read_audio: bool = False,
        label_columns: Sequence[str] | None = None,
        sample_rate_hz: int = SAMPLE_RATE_HZ,
        resample: bool = False,
    ) -> list[Problem]:
        """Everything wrong at once: missing files, wrong rate, several channels, empty labels, times past the end of a file.

        Args:
            read_audio: decode every utterance too, not only the headers.
            label_columns: labels that may not be empty ("slot_*" stands for all that match); None: all but the speaker, who may be
                unknown. A column that is missing altogether is a problem of its own.
            sample_rate_hz: rate the audio must have.
            resample: whether another rate is fine.
        """
        found = self.label_problems(label_columns)
        headers: dict[str, AudioHeader | RequestError] = {}
        for utterance in self._utterances:
            where = f"{self.name}, utterance {utterance.id} ({utterance.audio})"
            if utterance.audio not in headers:
                try:
                    headers[utterance.audio] = read_header(self.root / utterance.audio)
                except RequestError as error:
                    headers[utterance.audio] = error
            header = headers[utterance.audio]
            if isinstance(header, RequestError):
                what, _, fix = str(header).partition(". Fix: ")
                found.append(Problem(where, what.split(": ", 1)[-1], fix))
                continue
            wrong = stretch_error(utterance, header, sample_rate_hz, resample=resample)
            if wrong is not None:
                found.append(Problem(where, *wrong))
            elif read_audio:
                try:
                    read_waveform(utterance, self.root, sample_rate_hz, resample=resample)
                except RequestError as error:
                    what, _, fix = str(error).partition(". Fix: ")
                    found.append(Problem(where, what.split("): ", 1)[-1], fix))
        return found

    def label_problems(self, label_columns: Sequence[str] | None) -> list[Problem]:
        """Label columns that are missing, and labels that are empty: those asked for, or all but the speaker when None."""
        if label_columns is None:
            names = [column for column in self.columns if column != "speaker"]
        else:
            names = []
            for wanted in label_columns:
                matching = expand_columns(wanted, self.columns)
                if not matching:
                    fix = f"add it to the header and fill it in; it has {', '.join(self.columns) or 'no labels'}"
                    return [Problem(self.name, f"no column {wanted!r}", fix)]
                names += matching
        found = []
        for column in names:
            for utterance in self._utterances:
                if not utterance.labels[column].strip():
                    fix = "fill it in, or leave the utterance out"
                    found.append(Problem(f"{self.name}, utterance {utterance.id}", f"empty {column!r}", fix))
        return found


def expand_columns(wanted: str, columns: Sequence[str]) -> list[str]:
    """The columns a name stands for: itself, or all with that beginning for "slot_*".

    >>> expand_columns("slot_*", ["slot_action", "slot_object", "text"])
    ['slot_action', 'slot_object']
    """
    if wanted.endswith("*"):
        return [column for column in columns if column.startswith(wanted[:-1])]
    return [wanted] if wanted in columns else []


def audio_digest(manifest: Manifest) -> str:
    """The sha256 over the sha256 of every audio file's bytes, in the order of the file: tells changed audio under the same names."""
    keys = {audio: _file_key(manifest.root / audio) for audio in dict.fromkeys(u.audio for u in manifest)}
    missing = [key for key in keys.values() if key not in _digests]
    with ThreadPoolExecutor() as pool:
        for found in pool.map(_hash_files, [missing[n : n + 64] for n in range(0, len(missing), 64)]):
            _digests.update(found)
    total = hashlib.sha256()
    for utterance in manifest:
        total.update(_digests[keys[utterance.audio]])
    return "sha256:" + total.hexdigest()


_FileKey = tuple[str, int, int, int]
_digests: dict[_FileKey, bytes] = {}  # of files read before: several stores and records ask for the same


def _file_key(path: Path) -> _FileKey:
    about = path.stat()
    return str(path), about.st_ino, about.st_size, about.st_mtime_ns


def _hash_files(keys: Sequence[_FileKey]) -> dict[_FileKey, bytes]:
    return {key: hashlib.sha256(Path(key[0]).read_bytes()).digest() for key in keys}


def resampled_files(manifest: Manifest, sample_rate_hz: int = SAMPLE_RATE_HZ) -> list[str]:
    """The audio files of another rate, which `read_waveform(..., resample=True)` converts: to be said aloud."""
    files = dict.fromkeys(utterance.audio for utterance in manifest)
    return [audio for audio in files if read_header(manifest.root / audio).sample_rate_hz != sample_rate_hz]


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """Pairs of utterances to verify: are they of the same speaker?

    Attributes:
        labels: (n,) int8, 1 for the same speaker.
        ids_a: n utterance ids.
        ids_b: n utterance ids.
        digest: sha256 of the canonical text, "sha256:...".
    """

    labels: NDArray[np.int8]
    ids_a: tuple[str, ...]
    ids_b: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, labels: Sequence[int], ids_a: Sequence[str], ids_b: Sequence[str]) -> Trials:
        """Trials from their columns.

        >>> len(Trials.of([1, 0], ["a", "a"], ["b", "c"]))
        2
        """
        lines = [f"{label}\t{a}\t{b}" for label, a, b in zip(labels, ids_a, ids_b, strict=True)]
        digest = hashlib.sha256(("\n".join(["label\tid_a\tid_b", *lines]) + "\n").encode("utf-8")).hexdigest()
        return cls(np.asarray(labels, dtype=np.int8), tuple(ids_a), tuple(ids_b), "sha256:" + digest)

    @classmethod
    def read(cls, path: Path) -> Trials:
        """Read a TSV with the header `label id_a id_b`.

        Raises:
            RequestError: with everything wrong in the file.
        """
        header, rows = read_table(Path(path), required=("label", "id_a", "id_b"))
        table = [dict(zip(header, row, strict=True)) for _, row in rows]
        wrong = [
            f"line {line}: label {cells['label']!r} is not 1 (same speaker) or 0"
            for (line, _), cells in zip(rows, table, strict=True)
            if cells["label"] not in ("0", "1")
        ]
        wrong += [
            f"line {line}: an id is empty"
            for (line, _), cells in zip(rows, table, strict=True)
            if not cells["id_a"] or not cells["id_b"]
        ]
        if not wrong:
            for label, kind in (("1", "same-speaker"), ("0", "different-speaker")):
                if not any(cells["label"] == label for cells in table):
                    wrong.append(f"no {kind} trial (label {label}): no error rate can be computed")
        if wrong:
            raise all_at_once(str(path), wrong, "correct these lines: label, id_a and id_b, separated by tabs")
        labels = [int(cells["label"]) for cells in table]
        return cls.of(labels, [cells["id_a"] for cells in table], [cells["id_b"] for cells in table])

    def __len__(self) -> int:
        """Number of trials."""
        return len(self.ids_a)

    def write(self, path: Path) -> None:
        """Write the canonical TSV."""
        lines = [f"{label}\t{a}\t{b}" for label, a, b in zip(self.labels, self.ids_a, self.ids_b, strict=True)]
        Path(path).write_text("\n".join(["label\tid_a\tid_b", *lines]) + "\n", encoding="utf-8", newline="\n")

    def problems(self, manifest: Manifest) -> list[Problem]:
        """The trials' ids that the manifest lacks, and labels that its speakers contradict."""
        where = f"trials for {manifest.name}"
        missing = sorted({*self.ids_a, *self.ids_b} - set(manifest.ids))
        if missing:
            what = f"{len(missing)} ids are not in the manifest, first {', '.join(missing[:5])}"
            return [Problem(where, what, "use the ids of that manifest")]
        found = []
        for label, a, b in zip(self.labels, self.ids_a, self.ids_b, strict=True):
            speakers = (manifest[a].labels.get("speaker", ""), manifest[b].labels.get("speaker", ""))
            if all(speakers) and (speakers[0] == speakers[1]) != bool(label):
                what = f"trial {a} {b} has label {label}, but its speakers are {speakers[0]} and {speakers[1]}"
                found.append(Problem(where, what, "correct the label or the speaker"))
        return found


def read_table(path: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a TSV and its rows with their line numbers; empty lines are passed over.

    Raises:
        RequestError: if it is missing, not UTF-8, lacks a required column, repeats one, or has rows of another length.
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file. Fix: give the path of a TSV.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 (byte {error.start}). Fix: save it as UTF-8.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = [name.strip() for name in lines[0].split("\t")]
    wrong = [f"no column {name!r} (the header has {', '.join(header)})" for name in required if name not in header]
    wrong += [f"column {name!r} is there twice" for name in sorted({n for n in header if header.count(n) > 1})]
    if "" in header:
        wrong.append("a column has no name")
    rows = [(number, line.split("\t")) for number, line in enumerate(lines[1:], start=2) if line]
    wrong += [
        f"line {number}: {len(row)} cells for {len(header)} columns" for number, row in rows if len(row) != len(header)
    ]
    if wrong:
        raise all_at_once(str(path), wrong, f"a TSV with the header {' '.join(required)} and one cell a column")
    return header, rows


def _wrong_cells(cells: Mapping[str, str], line: int, seen: dict[str, int]) -> Iterator[str]:
    name = cells["id"]
    if name in seen:
        yield f"line {line}: id {name!r} is already on line {seen[name]}"
    seen.setdefault(name, line)
    for column in ("start_s", "duration_s"):
        text = cells[column].strip()
        if text and not _is_number(text):
            yield f"line {line}: {column} {text!r} is not a number"
    if path := _wrong_path(cells["audio"]):
        yield f"line {line}: {path}"
    if not name.strip():
        yield f"line {line}: the id is empty"


def _wrong_path(audio: str) -> str | None:
    if not audio.strip():
        return "audio is empty"
    posix, windows = PurePosixPath(audio), PureWindowsPath(audio)
    if posix.is_absolute() or windows.is_absolute() or windows.drive:
        return f"audio {audio!r} is an absolute path; it must be relative to the corpus root"
    if ".." in posix.parts or ".." in windows.parts:
        return f"audio {audio!r} leaves the corpus root"
    return None


def _utterance(cells: Mapping[str, str], root: Path, headers: dict[str, AudioHeader]) -> Utterance:
    audio, start = cells["audio"], float(cells["start_s"].strip() or 0)
    if cells["duration_s"].strip():
        duration = float(cells["duration_s"])
    else:
        if audio not in headers:
            headers[audio] = read_header(root / audio)
        header = headers[audio]
        duration = (header.num_samples - round(start * header.sample_rate_hz)) / header.sample_rate_hz
    labels = {column: cell for column, cell in cells.items() if column not in COLUMNS}
    utterance = Utterance(cells["id"], audio, start, duration, labels)
    if wrong := _wrong_times(utterance):
        raise ValueError(wrong)
    return utterance


def _wrong_times(utterance: Utterance) -> str | None:
    if not (math.isfinite(utterance.start_s) and utterance.start_s >= 0):
        return f"start_s {utterance.start_s} is not a time of 0 or later"
    if not (math.isfinite(utterance.duration_s) and utterance.duration_s > 0):
        return f"duration_s {utterance.duration_s} is not greater than 0"
    return None


def _wrong_utterances(utterances: Sequence[Utterance], columns: tuple[str, ...]) -> Iterator[str]:
    seen: set[str] = set()
    for utterance in utterances:
        if utterance.id in seen:
            yield f"id {utterance.id!r} is there twice"
        seen.add(utterance.id)
        if not utterance.id.strip():
            yield "an id is empty"
        for wrong in (_wrong_path(utterance.audio), _wrong_times(utterance)):
            if wrong:
                yield f"{utterance.id}: {wrong}"
        if tuple(sorted(utterance.labels)) != columns:
            yield f"{utterance.id}: labels {sorted(utterance.labels)}, expected {list(columns)}"
        cells = (utterance.id, utterance.audio, *utterance.labels.values())
        if any(character in cell for cell in cells for character in "\t\n\r"):
            yield f"{utterance.id}: a tab or a line break in a cell"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(seconds: float) -> str:
    """Seven decimals: a sample at 16 kHz is 0.0000625 s."""
    return f"{seconds:.7f}".rstrip("0").rstrip(".")
