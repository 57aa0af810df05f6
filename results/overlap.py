"""Whether an encoder's training data holds a task's test set, judged by the names in `trained_on` and the corpus of the record.

Names are all there is to go by: nothing is listened to. Five answers:

- "none": no name is of the test set's corpus;
- "train": of that corpus, but the name leaves its test part out;
- "possible": of that corpus, and the name does not say which part;
- "overlap": of its dev or test part, or of a corpus that is tested as a whole;
- "unknown": a name, or what stands behind it, is not known.

Where the table of corpora comes from. LibriSpeech's parts share no speaker (Panayotov et al., ICASSP 2015, section 3.1); LibriMix
mixes LibriSpeech part by part (arXiv:2005.11262); LibriTTS is cut from the same parts (arXiv:1904.02882); Libri-Light leaves out
the speakers of LibriSpeech's dev and test (facebookresearch/libri-light, data_preparation/split_librilight). VoxCeleb1 has two
divisions (arXiv:1706.08612, section 5): that of identification has every speaker in train and test, that of verification sets 40 of
them apart; so "dev" of verification holds SID's test utterances, "train" of identification ASV's. VoxCeleb2 is other people
(arXiv:1806.05622). SUPERB tests ER on every session of IEMOCAP in turn, and QUESST 2014 has no training part (arXiv:2105.01051).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from superb_probe.results.record import RunRecord, TaskPart, UpstreamPart

Kind = Literal["none", "train", "possible", "overlap", "unknown"]
ORDER: tuple[Kind, ...] = ("none", "train", "unknown", "possible", "overlap")
# What tables put behind a score, and what it says.
MARKS = {"possible": "†", "overlap": "†", "unknown": "‡"}
MEANINGS = {
    "possible": "the encoder's training data may hold this test set",
    "overlap": "the encoder's training data holds dev or test data of this task",
    "unknown": "what the encoder was trained on is not known well enough",
}

_LIBRI = ("librispeech", "libri2mix")
_EVERY = (*_LIBRI, "voxceleb1", "speech_commands", "fluent_speech_commands", "snips", "iemocap", "quesst14")
# Corpora whose test part, where they have one, is that of these: (names squeezed to letters and digits, what they hold).
_SAME: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("librispeech", "libri", "ls", "librimix", "libri2mix", "libri3mix", "libritts"), _LIBRI),
    (("voxceleb", "voxceleb1", "vox1"), ("voxceleb1",)),
    (("speechcommands", "googlespeechcommands", "gsc"), ("speech_commands",)),
    (("fluentspeechcommands", "fluentcommands", "fsc"), ("fluent_speech_commands",)),
    (("snips", "audiosnips"), ("snips",)),
    (("iemocap",), ("iemocap",)),
    (("quesst", "quesst14", "quesst2014"), ("quesst14",)),
    (("superb",), _EVERY),
    (("mini", "kokoro"), ("mini",)),  # Kokoro speaks mini
)
_LEAVES_OUT = {"librilight": _LIBRI}  # of the same recordings, less all that is tested on
# Other corpora, by where their recordings are from: of the same place as a test set, they may share some with it.
_OTHERS = {
    "librivox": ("multilinguallibrispeech", "mls", "libriheavy", "ljspeech", "librivox"),
    "librivox youtube": ("gigaspeech",),
    "youtube": ("audioset", "youtube", "yodas"),
    "": ("voxceleb2", "vox2", "voxpopuli", "commonvoice", "tedlium", "switchboard", "fisher", "wsj", "timit", "vctk", "fleurs", "ami",
         "babel", "peoplesspeech", "voxlingua107", "aishell", "emodb", "fsdd", "flite"),
}  # fmt: skip
_PLACE = {"librispeech": "librivox", "libri2mix": "librivox", "voxceleb1": "youtube"}
# short enough to stand for something else further on in a name
_ONLY_FIRST = frozenset(["mini", "superb", "snips", "libri", "ls", "fsc", "gsc", "mls", "ami"])
_TRAIN_WORDS = frozenset({"train", "training"})
_LIBRI_TRAIN = _TRAIN_WORDS | {"100", "360", "460", "500", "860", "960"}  # hours of LibriSpeech's training parts
_HELD_OUT = frozenset({"dev", "development", "val", "valid", "validation", "test", "testing", "eval", "evaluation"})


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the names say.

    Attributes:
        kind: one of five, as at the top of this module.
        names: the names it comes from, as they are recorded.
    """

    kind: Kind
    names: tuple[str, ...] = ()


def training_overlap(trained_on: Iterable[str], dataset: str, task: str) -> Overlap:
    """Whether data of these names hold the test set of a task.

    Args:
        trained_on: as `UpstreamInfo` has them; "fine-tuned: NAME" counts like NAME.
        dataset: of the record: a corpus that is read as published, "mini", "manifest:NAME".
        task: its name, where one corpus is divided differently for two tasks.

    >>> training_overlap(["librispeech-960"], "librispeech", "pr").kind
    'train'
    >>> training_overlap(["openslr/librispeech_asr", "voxpopuli"], "libri2mix", "sd")
    Overlap(kind='possible', names=('openslr/librispeech_asr',))
    >>> training_overlap(["LibriSpeech test-clean"], "librispeech", "asr").kind
    'overlap'
    """
    found = [(_one(name, dataset, task), name) for name in trained_on]
    worst: Kind = max((kind for kind, _ in found), key=ORDER.index, default="none")
    return Overlap(worst, () if worst == "none" else tuple(name for kind, name in found if kind == worst))


def upstream_overlap(upstream: UpstreamPart, task: TaskPart) -> Overlap:
    """The same of a record's parts: random weights and encoders without any have heard nothing, whatever their names say.

    Trained weights without a name are "unknown".
    """
    if upstream.revision.startswith("random:"):
        return Overlap("none")
    if not upstream.trained_on:
        return Overlap("unknown" if upstream.params else "none")
    return training_overlap(upstream.trained_on, task.dataset, task.name)


def worst_overlap(records: Iterable[RunRecord]) -> Kind:
    """Of several records: the kind that a reader must know."""
    return max(
        (upstream_overlap(record.upstream, record.task).kind for record in records), key=ORDER.index, default="none"
    )


def overlap_warning(upstream: str, task: str, dataset: str, overlap: Overlap) -> str:
    """The sentence for a record's warnings; "" where training data and test set do not meet, as far as is known.

    >>> overlap_warning("mine", "pr", "mini", Overlap("possible", ("mini",)))
    'mine was trained on mini, which is not said to leave out test: the test set of pr (mini) may be among its training data'
    """
    names = ", ".join(overlap.names)
    if overlap.kind == "possible":
        return (
            f"{upstream} was trained on {names}, which is not said to leave out test: the test set of {task} ({dataset}) may be "
            "among its training data"
        )
    if overlap.kind == "overlap":
        return f"{upstream} was trained on {names}: dev or test data of {task} ({dataset}) are among its training data"
    return ""


_NOTES: tuple[tuple[tuple[Kind, ...], str], ...] = (
    (
        ("possible", "overlap"),
        "† the encoder was trained on data that hold, or are not said to leave out, this test set",
    ),
    (("unknown",), "‡ what the encoder was trained on is not known well enough to rule this test set out"),
    (("train",), "Trained on the test set's corpus, its test data left out"),
)


def overlap_notes(rows: Sequence[Mapping[Any, Any]], task_name: Callable[[str], str] = str) -> list[str]:
    """What stands under a table: the marks in words, and where a corpus was heard without its test data.

    Args:
        rows: of the leaderboard.
        task_name: a task as the table shows it.

    >>> rows = [{"overlap": "train", "upstream": "a", "trained_on": "librispeech-960", "task": task} for task in ("sd", "pr")]
    >>> overlap_notes(rows, str.upper)
    ["Trained on the test set's corpus, its test data left out: a, librispeech-960 (PR, SD)."]
    """
    notes = []
    for kinds, text in _NOTES:
        tasks: dict[str, set[str]] = {}
        for row in rows:
            if row["overlap"] in kinds:
                name = f"{row['upstream']}, {row['trained_on'] or 'unknown'}"
                tasks.setdefault(name, set()).add(task_name(row["task"]))
        if tasks:
            notes.append(f"{text}: {'; '.join(f'{name} ({_listed(tasks[name])})' for name in sorted(tasks))}.")
    return notes


def short_notes(kinds: Iterable[str]) -> list[str]:
    """What the marks of a figure mean.

    >>> short_notes(["none", "unknown"])
    ['‡ the training data is not known well enough to rule the test set out']
    """
    marks = {MARKS.get(kind) for kind in kinds}
    said = {"†": "may hold, or holds, the test set", "‡": "is not known well enough to rule the test set out"}
    return [f"{mark} the training data {text}" for mark, text in said.items() if mark in marks]


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(sorted(tasks))


@lru_cache(maxsize=4096)
def _one(name: str, dataset: str, task: str) -> Kind:
    """What a single name says."""
    words = _words(name.removeprefix("fine-tuned:").rpartition("/")[2])
    tested = _words(dataset.removeprefix("manifest:"))
    held = {corpus for found, _ in _corpora(tested) for names, holds in _SAME if found in names for corpus in holds}
    size = _begins(words, "".join(tested))
    if size:  # own data under its own name, and every corpus under the name that records give it
        return _part(words[size:], held, task)
    if dataset == "synthetic":  # made up anew for every run
        return "none"
    kinds = [_against(corpus, rest, held, task) for corpus, rest in _corpora(words)]
    return max(kinds, key=ORDER.index, default="unknown")


def _against(corpus: str, rest: Sequence[str], held: set[str], task: str) -> Kind:
    """A corpus that was recognised, with the words behind its name, against the corpora tested on."""
    for names, holds in _SAME:
        if corpus in names:
            return _part(rest, held, task) if held & set(holds) else "none"
    if corpus in _LEAVES_OUT:
        return "train" if held & set(_LEAVES_OUT[corpus]) else "none"
    places = next(place for place, names in _OTHERS.items() if corpus in names)
    return "unknown" if {_PLACE[each] for each in held & set(_PLACE)} & set(places.split()) else "none"


def _part(rest: Sequence[str], held: set[str], task: str) -> Kind:
    """Which part of the test set's corpus the words behind its name mean."""
    if held & {"iemocap", "quesst14"}:
        return "overlap"
    train = _LIBRI_TRAIN if "librispeech" in held else _TRAIN_WORDS
    if "voxceleb1" in held and task == "asv":
        train = frozenset({"dev", "development"})
    if set(rest) & (_HELD_OUT - train):
        return "overlap"
    return "train" if set(rest) & train else "possible"


def _words(name: str) -> tuple[str, ...]:
    """Small words and numbers.

    >>> _words("LibriSpeech train-clean-100"), _words("libri2mix")
    (('librispeech', 'train', 'clean', '100'), ('libri', '2', 'mix'))
    """
    return tuple(re.findall(r"[^\W\d_]+|\d+", name.lower()))


def _begins(words: Sequence[str], squeezed: str) -> int:
    """How many of the words make up a name written as one; 0 if they do not begin with it."""
    return next((size for size in range(1, len(words) + 1) if "".join(words[:size]) == squeezed), 0)


_KNOWN = frozenset(name for names in (*(same for same, _ in _SAME), _LEAVES_OUT, *_OTHERS.values()) for name in names)


def _corpora(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The corpora that are named, the longest name first, each with the words up to the next one.

    >>> _corpora(_words("multilingual_librispeech and LibriSpeech-960"))
    [('multilinguallibrispeech', ('and',)), ('librispeech', ('960',))]
    """
    found: list[tuple[str, list[str]]] = []
    start = 0
    while start < len(words):
        sizes = [(_begins(words[start:], name), name) for name in _KNOWN if start == 0 or name not in _ONLY_FIRST]
        size, name = max(sizes)
        if size:
            found.append((name, []))
        elif found:
            found[-1][1].append(words[start])
        start += size or 1
    return [(name, tuple(rest)) for name, rest in found]
