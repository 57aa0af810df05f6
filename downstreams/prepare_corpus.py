"""Manifests made from the published tree of a corpus, everything checked first; the corpus itself is never touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.checks import fold_problems, report
from superb_probe.downstreams.corpora import divided, find_corpus
from superb_probe.downstreams.corpus_base import Findings, read_tasks
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Problem
from superb_probe.errors import RequestError
from superb_probe.registry import Registry


@dataclass(frozen=True, slots=True)
class Prepared:
    """The manifests of one task.

    Attributes:
        task: the task.
        root: what their audio is relative to: give it as --root.
        files: by what --manifest calls them ("train", "dev", "test", "trials"), the files written.
    """

    task: str
    root: Path
    files: Mapping[str, Path]

    @property
    def arguments(self) -> str:
        """What to give to `run`.

        >>> Prepared("asr", Path("/c"), {"train": Path("m/asr.train.tsv")}).arguments
        '--task asr --root /c --manifest train=m/asr.train.tsv'
        """
        manifests = " ".join(f"{name}={path}" for name, path in self.files.items())
        return f"--task {self.task} --root {self.root} --manifest {manifests}"


def prepare_corpus(
    name: str,
    folder: Path,
    out: Path,
    *,
    tasks: Sequence[str] = (),
    extras: Mapping[str, Path] | None = None,
    exclude: Sequence[str] = (),
    partial: bool = False,
    read_audio: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Prepared]:
    """Write `<task>.<split>.tsv` and `<task>.trials.tsv` for the tasks of a corpus.

    Args:
        name: the corpus, e.g. "librispeech".
        folder: its published tree, or a folder one or two levels above it.
        out: a folder for the manifests, outside the corpus.
        tasks: the tasks to serve; none for all that the corpus has.
        extras: files that are not in the corpus, by name ("lexicon", "trials").
        exclude: utterance ids to leave out.
        partial: accept a corpus that lacks utterances, and say so.
        read_audio: decode every file instead of looking at its header and its end.
        say: told what was found, decided and written.

    Raises:
        RequestError: with every problem found; nothing is written then.
    """
    corpus = find_corpus(name)
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    tell = say or (lambda line: None)
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise RequestError(f"{out}: inside the corpus, which is left as it is. Fix: --out elsewhere.")
    findings = Findings(partial=partial)
    wanted = tuple(tasks) or corpus.info.tasks
    folds = read_tasks(corpus, folder, wanted, findings=findings, extras=extras, exclude=exclude)
    problems = list(findings.problems)
    for task in wanted:
        problems += _task_problems(task, folds[task], read_audio, tell)
    for note in findings.notes:
        tell(note)
    problems = list(dict.fromkeys(problems))
    if problems:
        for problem in problems[20:]:  # the error names twenty; the rest is said before it
            tell(str(problem))
        raise report(f"{corpus.info.title} at {folder}", problems)
    out.mkdir(parents=True, exist_ok=True)
    return [_write(task, folds[task][0], out, tell) for task in wanted]


def _task_problems(name: str, folds: Sequence[Fold], read_audio: bool, tell: Callable[[str], None]) -> list[Problem]:
    """What is wrong with the labels and between the splits, as the task sees it."""
    if not folds[0].manifests or name not in Registry("task").names():
        return []
    task = load_task(name)
    found: list[Problem] = []
    for fold in divided(task, folds):
        for split, manifest in fold.manifests.items():
            if read_audio:
                found += _decoding_problems(manifest)
            found += manifest.label_problems(task.label_columns(fold, split))
        errors, warnings = fold_problems(fold, task.info)
        found += errors
        for warning in warnings:
            tell(f"{name}: {warning}")
        if not errors and "train" in fold.manifests:
            found += task.label_problems(fold)
    return found


def _decoding_problems(manifest: Manifest) -> list[Problem]:
    found = []
    for utterance in manifest:
        try:
            read_waveform(utterance, manifest.root, resample=True)
        except RequestError as error:
            what, _, fix = str(error).partition(". Fix: ")
            found.append(Problem(f"{manifest.name}, utterance {utterance.id}", what.split("): ", 1)[-1], fix))
    return found


def _write(task: str, fold: Fold, out: Path, tell: Callable[[str], None]) -> Prepared:
    files = {}
    for split, manifest in fold.manifests.items():
        files[split] = out / f"{task}.{split}.tsv"
        manifest.write(files[split])
        labels = ", ".join(manifest.columns)
        tell(f"{files[split]}: {len(manifest)} utterances, {manifest.total_s / 3600:.2f} h, {labels}")
    for split, trials in fold.trials.items():
        key = {"test": "trials", "dev": "dev_trials"}[split]
        files[key] = out / f"{task}.{key}.tsv"
        trials.write(files[key])
        tell(f"{files[key]}: {len(trials)} trials, {int(trials.labels.sum())} of one speaker")
    root = next(iter(fold.manifests.values())).root
    return Prepared(task, root, files)
