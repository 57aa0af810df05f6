"""The corpora that are read as published: their names, the tasks each serves, and its reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from superb_probe.downstreams.base import Fold, Task
from superb_probe.downstreams.checks import report
from superb_probe.downstreams.corpus_base import Corpus, Findings, read_tasks
from superb_probe.downstreams.corpus_fluent_speech_commands import FluentSpeechCommands
from superb_probe.downstreams.corpus_iemocap import Iemocap
from superb_probe.downstreams.corpus_libri2mix import Libri2Mix
from superb_probe.downstreams.corpus_librispeech import LibriSpeech
from superb_probe.downstreams.corpus_quesst14 import Quesst14
from superb_probe.downstreams.corpus_snips import AudioSnips
from superb_probe.downstreams.corpus_speech_commands import SpeechCommands
from superb_probe.downstreams.corpus_voxceleb1 import VoxCeleb1
from superb_probe.errors import RequestError, nearest

CORPORA: Mapping[str, Corpus] = {
    corpus.info.name: corpus
    for corpus in (
        AudioSnips(),
        FluentSpeechCommands(),
        Iemocap(),
        Libri2Mix(),
        LibriSpeech(),
        Quesst14(),
        SpeechCommands(),
        VoxCeleb1(),
    )
}


def find_corpus(name: str) -> Corpus:
    """A corpus by its name or an alias.

    >>> find_corpus("fsc").info.name
    'fluent_speech_commands'

    Raises:
        RequestError: for an unknown name, with the nearest ones.
    """
    by_name = {alias: corpus for corpus in CORPORA.values() for alias in (corpus.info.name, *corpus.info.aliases)}
    if name not in by_name:
        close = nearest(name, (*by_name, "csv"))
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        known = ", ".join(sorted(CORPORA))
        raise RequestError(
            f"unknown corpus {name!r}.{hint} Fix: one of {known}, or csv (`superb-probe prepare csv`) for other data."
        )
    return by_name[name]


def corpus_folds(
    name: str, folder: Path, task: Task, extras: Mapping[str, Path] | None = None, *, partial: bool = False
) -> list[Fold]:
    """The folds of a task on a published tree, complete and readable.

    Raises:
        RequestError: with every problem found. A part of a corpus is one, unless `partial`: its score is no score of the corpus.
    """
    corpus = find_corpus(name)
    findings = Findings(partial=partial)
    folds = read_tasks(corpus, folder, (task.info.name,), findings=findings, extras=extras)[task.info.name]
    if findings.problems:
        raise report(f"{corpus.info.title} at {folder}", findings.problems)
    return divided(task, folds)


def divided(task: Task, folds: Sequence[Fold]) -> list[Fold]:
    """The folds that are asked: an undivided corpus (train alone) as the task divides it, with the notes of the whole."""
    (first, *others) = folds
    if others or set(first.manifests) != {"train"}:
        return list(folds)
    return [replace(fold, notes=(*first.notes, *fold.notes)) for fold in task.folds_of(first.manifests["train"])]


def choose_data(task: str, data: Mapping[str, Path]) -> tuple[str, Path, dict[str, Path]]:
    """Which of the corpora of --data a task reads: its name, its folder, and the extra files given as NAME.EXTRA=PATH.

    Args:
        task: the task's name.
        data: what --data gave, e.g. {"librispeech": ..., "librispeech.lexicon": ...}; "mini" is a folder like the embedded corpus.

    >>> choose_data("pr", {"librispeech": Path("/c"), "librispeech.lexicon": Path("/l"), "fsc": Path("/f")})
    ('librispeech', PosixPath('/c'), {'lexicon': PosixPath('/l')})

    Raises:
        RequestError: for an unknown corpus, an extra without its corpus, or when none or several serve the task.
    """
    roots: dict[str, Path] = {}
    extras: dict[str, dict[str, Path]] = {}
    for key, path in data.items():
        base, dot, extra = key.partition(".")
        name = "mini" if base == "mini" else find_corpus(base).info.name
        if dot:
            extras.setdefault(name, {})[extra] = Path(path)
        else:
            roots[name] = Path(path)
    orphans = sorted(set(extras) - set(roots))
    if orphans:
        raise RequestError(f"--data {orphans[0]}.…: where is {orphans[0]}? Fix: --data {orphans[0]}=FOLDER too.")
    serving = [name for name in roots if name == "mini" or task in CORPORA[name].info.tasks]
    if len(serving) > 1 and "mini" in serving:
        serving.remove("mini")
    if len(serving) != 1:
        able = [name for name, corpus in CORPORA.items() if task in corpus.info.tasks]
        fix = (
            f"one of {', '.join(f'--data {name}=FOLDER' for name in able)}"
            if able
            else "--manifest train=... dev=... test=..."
        )
        what = f"several serve {task}: {', '.join(serving)}" if serving else f"none serves {task}"
        raise RequestError(f"--data {' '.join(data)}: {what}. Fix: {fix}.")
    return serving[0], roots[serving[0]], extras.get(serving[0], {})


def corpora_table() -> str:
    """The corpora as a Markdown table: what docs/corpora.md shows.

    >>> print(corpora_table().split(chr(10))[0])
    | corpus | name | tasks | utterances | found by | files beside it | source |
    """
    lines = ["| corpus | name | tasks | utterances | found by | files beside it | source |", "| --- " * 7 + "|"]
    for name, corpus in sorted(CORPORA.items()):
        info = corpus.info
        counts = dict.fromkeys(
            " / ".join(f"{count}" for count in splits.values()) for splits in info.published.values()
        )
        found_by = ", ".join(f"`{mark}`" for mark in info.landmarks[:3]) + (", ..." if len(info.landmarks) > 3 else "")
        beside = "; ".join(f"`{extra.name}`: {extra.what} ({extra.source})" for extra in info.extras)
        cells = (
            info.title,
            f"`{name}`",
            ", ".join(info.tasks),
            "; ".join(counts),
            found_by,
            beside or "-",
            info.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
