"""What every corpus reader shares: a published tree looked through once, rows drafted from it, all problems found at once."""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, AudioHeader, read_header
from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.checks import file_problem, some
from superb_probe.downstreams.manifest import Manifest, Problem, Trials, Utterance
from superb_probe.errors import RequestError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
MAX_DIFFERENCE_S = 0.01  # between a list's length of a file and its own
MIN_SAMPLES = 400  # 25 ms at 16 kHz: the window of every encoder that SUPERB lists
READERS = 8  # threads that read headers: the disk waits, not the processor
MAX_CHILDREN = 64  # a folder with more is no place to look for a corpus in


@dataclass(frozen=True, slots=True)
class Extra:
    """A file that belongs to a protocol but not to the corpus' own archives: a trial list, a lexicon.

    Attributes:
        name: what --extra calls it: "lexicon".
        what: what it holds.
        source: where it is published.
        files: names it is looked for under, in the corpus and beside it.
        tasks: the tasks that need it.
    """

    name: str
    what: str
    source: str
    files: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CorpusInfo:
    """What must be known of a corpus before it is read.

    Attributes:
        name: what --data and `prepare` call it.
        title: what its authors call it.
        source: where it is published.
        license: its licence.
        landmarks: files or folders at the top of its tree, by which the tree is found.
        published: by task, utterances of each split as SUPERB uses them; "train" alone is divided into folds by the task.
        extras: files that some tasks need beside it.
        aliases: other names people know it by.
        rates_hz: sample rates its published audio has.
        citation: what its authors ask to be cited.
    """

    name: str
    title: str
    source: str
    license: str
    landmarks: tuple[str, ...]
    published: Mapping[str, Mapping[str, int]]
    extras: tuple[Extra, ...] = ()
    aliases: tuple[str, ...] = ()
    rates_hz: tuple[int, ...] = (SAMPLE_RATE_HZ,)
    citation: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it serves."""
        return tuple(self.published)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a manifest to be: its length is read from the file where none is given.

    Attributes:
        id: unique within the corpus.
        audio: path relative to the tree's root.
        labels: by column.
        start_s: first second used.
        duration_s: length used; None for all from the start to the end of the file.
        listed_s: the file's length by a list of the corpus, which must be right; None where no list says it.
    """

    id: str
    audio: str
    labels: Mapping[str, str]
    start_s: float = 0.0
    duration_s: float | None = None
    listed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A fold to be.

    Attributes:
        name: None where a task has a single fold.
        rows: by split.
        trials: by split.
        made: by split, rows that the reader made itself and the published count does not have.
    """

    name: str | None
    rows: Mapping[str, Sequence[Row]]
    trials: Mapping[str, Trials] = field(default_factory=dict)
    made: Mapping[str, int] = field(default_factory=dict)


class Findings:
    """What a reader has to say: problems, and notes for the output and the record.

    >>> findings = Findings(partial=True)
    >>> findings.fewer("dev", "1 of 2 utterances found", "complete it")
    >>> findings.problems, findings.notes
    ([], ['PARTIAL corpus, dev: 1 of 2 utterances found'])
    """

    def __init__(self, *, partial: bool = False) -> None:
        """`partial`: whether a corpus that lacks utterances is accepted, with a note."""
        self.partial = partial
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def problem(self, where: str, what: str, fix: str) -> None:
        """Note something wrong; what has been noted is not noted again."""
        found = Problem(where, what, fix)
        if found not in self.problems:
            self.problems.append(found)

    def fewer(self, where: str, what: str, fix: str) -> None:
        """Note something missing: a problem, or with `partial` a note."""
        if self.partial:
            self.note(f"PARTIAL corpus, {where}: {what}")
        else:
            self.problem(where, what, f"{fix}, or `prepare --partial` if a part is meant")

    def note(self, text: str) -> None:
        """Note something to be said."""
        if text not in self.notes:
            self.notes.append(text)


class Tree:
    """A corpus folder: its audio by name, its lists as lines, the files that come beside it.

    Attributes:
        root: the top of the published tree.
        info: the corpus.
        findings: where problems and notes go.
        given: the folder that was asked for.
        extras: the files of --extra, by name.
        headers: what has been read of each audio file.
    """

    def __init__(
        self, root: Path, info: CorpusInfo, findings: Findings, *, given: Path, extras: Mapping[str, Path]
    ) -> None:
        """Check that every extra named is one that the corpus knows."""
        self.root, self.info, self.findings = root, info, findings
        self.given, self.extras = given, dict(extras)
        self.headers: dict[str, AudioHeader | str] = {}
        self._folders: dict[str, dict[str, str]] = {}
        known = [extra.name for extra in info.extras]
        for name in extras:
            if name not in known:
                fix = f"one of {', '.join(known)}" if known else "leave it out"
                findings.problem(info.name, f"no extra file {name!r}", fix)

    def audio(self, folder: str = ".") -> dict[str, str]:
        """Audio files below a folder: by path without ending (NFC, relative to the root), the path as it is on disk."""
        if folder not in self._folders:
            self._folders[folder] = self._walk(folder)
        return self._folders[folder]

    def _walk(self, folder: str) -> dict[str, str]:
        found: dict[str, str] = {}
        other_form = 0
        for parent, folders, names in os.walk(self.root / folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            for name in sorted(names):
                if name.startswith(".") or not name.lower().endswith(AUDIO_SUFFIXES):
                    continue
                path = (Path(parent) / name).relative_to(self.root).as_posix()
                if not _is_utf8(path):
                    self.findings.problem(f"{path!r}", "the file's name is not UTF-8", "rename it as in the archive")
                    continue
                key = audio_key(path)
                if key in found:
                    self.findings.problem(key, f"two audio files: {found[key]} and {path}", "keep one of them")
                other_form += key != path.rpartition(".")[0]
                found.setdefault(key, path)
        if other_form:
            self.findings.note(
                f"{folder}: {other_form} file names are stored in decomposed Unicode (as macOS does); found by their composed form"
            )
        return found

    def has(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return (self.root / path).exists()

    def lines(self, path: str | Path) -> list[str]:
        """The lines of a list, UTF-8 with line ends of any kind; empty if it cannot be read (a problem)."""
        file = self.root / path
        if not file.is_file():
            self.findings.problem(
                str(path), "no such file", f"unpack {self.info.title} completely ({self.info.source})"
            )
            return []
        raw = file.read_bytes()
        if b"\r" in raw:
            self.findings.note(f"{path}: Windows line ends, read as plain ones")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.findings.problem(
                str(path), f"not UTF-8 (byte {error.start})", "restore it from the archive, or convert it"
            )
            return []
        return [line.rstrip("\r") for line in text.replace("\r\n", "\n").split("\n")]

    def extra(self, name: str) -> list[Path]:
        """The file or files of an extra: from --extra (a folder stands for the names it has), from the corpus, or from beside it."""
        extra = next(each for each in self.info.extras if each.name == name)
        given = self.extras.get(name)
        places = [given] if given is not None else [self.root, self.root.parent]
        if given is not None and given.is_file():
            return [given]
        for place in places:
            found = [place / file for file in extra.files if (place / file).is_file()]
            if found:
                return found
        looked = f"{given}: no such file" if given is not None else f"none of {', '.join(extra.files)} in {self.root}"
        self.findings.problem(
            self.info.name,
            f"{' and '.join(extra.tasks)} cannot do without the {extra.name} ({extra.what}); {looked}",
            f"get it from {extra.source} and give --extra {name}=FILE (in a run: --data {self.info.name}.{name}=FILE)",
        )
        return []


class Corpus(ABC):
    """A published corpus: how its tree is found and what its lists mean."""

    info: CorpusInfo

    @abstractmethod
    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """The folds of a task, before any audio file is opened."""

    def locate(self, folder: Path, extras: Mapping[str, Path]) -> Path:
        """The top of the tree: the folder itself, or the one up to two levels below it that has the most landmarks.

        Raises:
            RequestError: if there is none.
        """
        if not folder.is_dir():
            raise RequestError(
                f"{self.info.name}: {folder}: no such folder. Fix: give the folder of {self.info.title} ({self.info.source})."
            )
        best, most = folder, 0
        for place in places(folder):
            count = sum((place / name).exists() for name in self.info.landmarks)
            if count > most:
                best, most = place, count
        if not most:
            there = sorted(path.name for path in folder.iterdir())[:8]
            raise RequestError(
                f"{self.info.name}: {folder} is not {self.info.title}: expected {', '.join(self.info.landmarks)}; "
                f"found {', '.join(there) or 'nothing'}. Fix: give the right folder, or unpack the corpus there ({self.info.source})."
            )
        return best

    def folds(
        self,
        folder: Path,
        task: str,
        *,
        extras: Mapping[str, Path] | None = None,
        exclude: Iterable[str] = (),
        findings: Findings | None = None,
    ) -> list[Fold]:
        """The folds of a task, every audio file's header read. Problems are left in `findings`, whose utterances are left out.

        Raises:
            RequestError: if the folder is no such corpus, or does not serve the task.
        """
        return read_tasks(self, folder, (task,), extras=extras, exclude=exclude, findings=findings or Findings())[task]


def read_tasks(
    corpus: Corpus,
    folder: Path,
    tasks: Sequence[str],
    *,
    findings: Findings,
    extras: Mapping[str, Path] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, list[Fold]]:
    """By task, the folds of a corpus; a file that several tasks use is opened once.

    Raises:
        RequestError: if the folder is no such corpus, or a task is not one it serves.
    """
    unserved = [task for task in tasks if task not in corpus.info.tasks]
    if unserved:
        raise RequestError(
            f"{corpus.info.name} does not serve {', '.join(unserved)}. Fix: one of {', '.join(corpus.info.tasks)}."
        )
    beside = {name: Path(path).expanduser() for name, path in (extras or {}).items()}
    given = Path(folder).expanduser()
    top = corpus.locate(given, beside)
    tree = Tree(top, corpus.info, findings, given=given, extras=beside)
    if top != given:
        findings.note(f"{corpus.info.name}: read from {top}")
    excluded = set(exclude)
    seen: set[str] = set()
    folds: dict[str, list[Fold]] = {}
    for task in tasks:
        drafts = corpus.drafts(tree, task)
        _check_counts(tree, task, drafts)
        _read_headers(tree, drafts, excluded)
        folds[task] = [_fold(tree, draft, excluded, seen) for draft in drafts]
    for name in sorted(excluded - seen):
        findings.problem(corpus.info.name, f"no utterance {name!r} to leave out", "correct --exclude")
    return folds


def audio_key(path: str) -> str:
    r"""A path without its ending, in composed Unicode: what a list's name and a file's name are compared by.

    >>> audio_key("wavs/Zoe\u0308.wav") == "wavs/Zo\u00eb"
    True
    """
    return unicodedata.normalize("NFC", path.rpartition(".")[0])


def places(folder: Path) -> Iterable[Path]:
    """A folder and those up to two levels below it, nearest first; folders with very many children are not searched."""
    level = [folder]
    for _ in range(3):
        yield from level
        below: list[Path] = []
        for parent in level:
            children = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
            if len(children) <= MAX_CHILDREN:
                below += children
        level = below


def missing_audio(tree: Tree, where: str, listed: Sequence[str], names: Sequence[str]) -> None:
    """Note listed utterances that have no audio, as one finding."""
    if names:
        tree.findings.fewer(
            where,
            f"{len(names)} of {len(listed)} listed utterances have no audio, first {', '.join(names[:3])}",
            f"unpack {tree.info.title} completely ({tree.info.source})",
        )


def _check_counts(tree: Tree, task: str, drafts: Sequence[Draft]) -> None:
    for draft in drafts:
        for split, rows in draft.rows.items():
            expected = tree.info.published[task].get(split)
            count = len(rows) - draft.made.get(split, 0)
            where = f"{tree.info.name} at {tree.root}, {task}, {split}"
            if expected is None or count == expected:
                continue
            what = f"{count} utterances, {expected} published"
            if count < expected:
                tree.findings.fewer(where, what, f"complete it ({tree.info.source})")
            else:
                tree.findings.problem(where, what, "remove what does not belong to it")


def _read_headers(tree: Tree, drafts: Sequence[Draft], excluded: set[str]) -> None:
    rows = [row for draft in drafts for split in draft.rows.values() for row in split if row.id not in excluded]
    wanted = [audio for audio in dict.fromkeys(row.audio for row in rows) if audio not in tree.headers]

    def look(audio: str) -> AudioHeader | str:
        try:
            header = read_header(tree.root / audio)
        except RequestError as error:
            return str(error).partition(": ")[2].partition(". Fix: ")[0]
        return file_problem(tree.root / audio, header, tree.info.rates_hz) or header

    with ThreadPoolExecutor(READERS) as pool:
        tree.headers.update(zip(wanted, pool.map(look, wanted), strict=True))


def _fold(tree: Tree, draft: Draft, excluded: set[str], seen: set[str]) -> Fold:
    manifests = {}
    kept: dict[str, set[str]] = {}
    for split, rows in draft.rows.items():
        utterances = []
        for row in rows:
            seen.add(row.id)
            if row.id not in excluded and (utterance := _utterance(tree, split, row)) is not None:
                utterances.append(utterance)
        if not utterances and not tree.findings.problems:
            fix = f"unpack it ({tree.info.source})"
            tree.findings.problem(f"{tree.info.name} at {tree.root}, {split}", "no utterance", fix)
        repeated = _repeated(rows)
        if repeated:
            tree.findings.problem(split, f"several files give {some(repeated, 'utterance id')}", "keep one of each")
        if utterances and not repeated:
            manifests[split] = Manifest(utterances, tree.root, f"{tree.info.name}.{split}", corpus=tree.info.name)
            kept[split] = set(manifests[split].ids)
    trials = {split: _without(tree, pairs, kept[split]) for split, pairs in draft.trials.items() if split in manifests}
    return Fold(draft.name, manifests, trials, tuple(tree.findings.notes))


def _utterance(tree: Tree, split: str, row: Row) -> Utterance | None:
    header = tree.headers[row.audio]
    where = f"{split}, utterance {row.id} ({row.audio})"
    if isinstance(header, str):
        tree.findings.problem(where, header, "restore the file from the archive, or leave it out with --exclude ID")
        return None
    total_s = header.duration_s - row.start_s
    if row.listed_s is not None and abs(row.listed_s - header.duration_s) > MAX_DIFFERENCE_S:
        what = f"lasts {header.duration_s:.3f} s, but the list says {row.listed_s:.3f} s"
        tree.findings.problem(where, what, "the list and the audio do not belong together: make or unpack both again")
        return None
    duration_s = total_s if row.duration_s is None else row.duration_s
    if duration_s * SAMPLE_RATE_HZ < MIN_SAMPLES - 0.5:
        tree.findings.problem(
            where, f"{duration_s:.4f} s, shorter than one frame of 25 ms", "leave it out with --exclude ID"
        )
        return None
    if duration_s > total_s + 0.5 / header.sample_rate_hz:
        what = f"ends at {row.start_s + duration_s:.3f} s, but the file ends at {row.start_s + total_s:.3f} s"
        tree.findings.problem(where, what, "the list and the audio do not belong together")
        return None
    return Utterance(row.id, row.audio, row.start_s, duration_s, row.labels)


def _without(tree: Tree, pairs: Trials, ids: set[str]) -> Trials:
    """The trials whose utterances are there; those dropped are told (without `partial` a missing utterance is a problem already)."""
    kept = [
        (int(label), a, b)
        for label, a, b in zip(pairs.labels, pairs.ids_a, pairs.ids_b, strict=True)
        if a in ids and b in ids
    ]
    if len(kept) == len(pairs):
        return pairs
    tree.findings.note(f"trials: {len(pairs) - len(kept)} of {len(pairs)} have an utterance that is not there; dropped")
    return Trials.of([each[0] for each in kept], [each[1] for each in kept], [each[2] for each in kept])


def _repeated(rows: Sequence[Row]) -> list[str]:
    seen: set[str] = set()
    return sorted({row.id for row in rows if row.id in seen or seen.add(row.id)})  # type: ignore[func-returns-value]


def _is_utf8(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
