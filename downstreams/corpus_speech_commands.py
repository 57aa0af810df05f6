"""Speech Commands v0.01 as published, with its separate test set, for keyword spotting (ks)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from superb_probe.downstreams.audio import read_header
from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Extra, Row, Tree, places
from superb_probe.errors import RequestError

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
NOISE = "_background_noise_"
HASH_BINS = 2**27  # of the corpus' own rule: Warden, "Speech Commands", arXiv:1804.03209, section 5.6
LISTS = {"dev": "validation_list.txt", "left out": "testing_list.txt"}
NOISE_FILES = 6
DEV_NOISE_SHARE = 0.2  # of each noise file, its end: dev hears no stretch of noise that train does

TEST_SET = Extra(
    name="test",
    what="the folder of the separate test set, 12 classes",
    source="http://download.tensorflow.org/data/speech_commands_test_set_v0.01.tar.gz",
    files=("speech_commands_test_set_v0.01",),
    tasks=("ks",),
)


class SpeechCommands(Corpus):
    """Single words; `<word>/<speaker>_nohash_<number>.wav`, `_background_noise_`, and a test set in a folder of its own."""

    info = CorpusInfo(
        name="speech_commands",
        title="Speech Commands v0.01",
        source="http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
        license="CC BY 4.0",
        citation="Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, arXiv:1804.03209",
        landmarks=(NOISE, *KEYWORDS),
        published={"ks": {"train": 51088, "dev": 6798, "test": 3081}},
        extras=(TEST_SET,),
        aliases=("speech_commands_v0.01", "gsc"),
    )

    def locate(self, folder: Path, extras: Mapping[str, Path]) -> Path:
        """The folder that holds both trees, of the words and of the test set."""
        words, test = _trees(folder, extras)
        return Path(os.path.commonpath([words, test])) if words != test else words

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold: the keyword (one of SUPERB's twelve classes) and the speaker, where the file's name tells."""
        words, test = (path.relative_to(tree.root).as_posix() for path in _trees(tree.given, tree.extras))
        rows: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
        for key, path in _word_files(tree, words).items():
            split = split_of(key.rpartition("/")[2])
            if split != "left out":
                rows[split].append(_row(key, path))
        _compare_lists(tree, words)
        made = _add_silence(tree, words, rows)
        rows["test"] = [_row(key, path) for key, path in tree.audio(test).items()]
        strange = sorted({row.id.partition("-")[0] for row in rows["test"]} - {*KEYWORDS, UNKNOWN, SILENCE})
        if strange:
            tree.findings.problem(test, f"folders {', '.join(strange)}", "give the separate test set, with 12 folders")
        tree.findings.note(
            f"silence: one-second pieces of the noise files, the last {DEV_NOISE_SHARE:.0%} of each for dev, the rest for train"
        )
        return [Draft(None, rows, made=made)]


def split_of(stem: str) -> str:
    """The split of a word by the corpus' own rule: a hash of the speaker, so that nobody is in two splits.

    >>> split_of("0a7c2a8d_nohash_0") == split_of("0a7c2a8d_nohash_3")
    True
    """
    speaker = re.sub(r"_nohash_.*$", "", stem)
    number = int(hashlib.sha1(speaker.encode("utf-8")).hexdigest(), 16) % HASH_BINS
    percent = number * 100.0 / (HASH_BINS - 1)
    return "dev" if percent < 10 else "left out" if percent < 20 else "train"


def _trees(folder: Path, extras: Mapping[str, Path]) -> tuple[Path, Path]:
    """The folder of the words and the folder of the test set: at, below or beside the one that was given."""
    info = SpeechCommands.info
    if not folder.is_dir():
        raise RequestError(
            f"{info.name}: {folder}: no such folder. Fix: give the folder of {info.title} ({info.source})."
        )
    near = [*places(folder), *sorted(path for path in folder.resolve().parent.iterdir() if path.is_dir())]
    if "test" in extras:
        near.insert(0, extras["test"])
    words = next((place for place in near if (place / NOISE).is_dir() and (place / KEYWORDS[0]).is_dir()), None)
    test = next((place for place in near if (place / SILENCE).is_dir() and (place / UNKNOWN).is_dir()), None)
    if words is None or test is None:
        wrong = [] if words else [f"no folder with {NOISE} and {KEYWORDS[0]} ({info.source})"]
        wrong += [] if test else [f"no test set with {SILENCE} and {UNKNOWN} ({TEST_SET.source})"]
        there = sorted(path.name for path in folder.iterdir())[:8]
        raise RequestError(
            f"{info.name}: {folder} is not {info.title}: {'; '.join(wrong)}; found {', '.join(there) or 'nothing'}. "
            "Fix: unpack both archives side by side, or name the test set (prepare: --extra test=FOLDER; "
            f"run: --data {info.name}.test=FOLDER)."
        )
    return words.resolve(), test.resolve()


def _word_files(tree: Tree, words: str) -> dict[str, str]:
    folders = sorted(path.name for path in (tree.root / words).iterdir() if path.is_dir() and path.name[0] not in "._")
    return {key: path for name in folders for key, path in tree.audio(f"{words}/{name}").items()}


def _compare_lists(tree: Tree, words: str) -> None:
    """Say it when the lists in the archive and the rule do not agree."""
    for split, name in LISTS.items():
        if tree.has(f"{words}/{name}"):
            stems = [line.strip().rpartition("/")[2].rpartition(".")[0] for line in tree.lines(f"{words}/{name}")]
            other = [stem for stem in stems if stem and split_of(stem) != split]
            if other:
                tree.findings.note(
                    f"{name}: {len(other)} files are of another split by the corpus' rule, which counts: {other[0]}"
                )


def _row(key: str, path: str) -> Row:
    word, _, stem = key.rpartition("/")
    word = word.rpartition("/")[2]
    keyword = word if word in (*KEYWORDS, SILENCE) else UNKNOWN
    speaker = stem.partition("_nohash_")[0] if "_nohash_" in stem else ""
    return Row(f"{word}-{stem}", path, {"speaker": speaker, "keyword": keyword})


def _add_silence(tree: Tree, words: str, rows: dict[str, list[Row]]) -> dict[str, int]:
    """Add the pieces of the noise files to train and dev, and say how many each got."""
    files = tree.audio(f"{words}/{NOISE}")
    if len(files) != NOISE_FILES:
        what = f"{len(files)} noise files, {NOISE_FILES} published"
        tree.findings.fewer(f"{words}/{NOISE}", what, f"complete it ({tree.info.source})")
    made = {"train": 0, "dev": 0}
    for key, path in files.items():
        try:
            seconds = int(read_header(tree.root / path).duration_s)
        except RequestError:
            seconds = 1  # the row makes the reading of all headers tell the problem
        first_dev = min(seconds - 1, round(seconds * (1 - DEV_NOISE_SHARE)))
        for second in range(seconds):
            split = "dev" if second >= first_dev else "train"
            name = f"{NOISE}-{key.rpartition('/')[2]}-{second}"
            rows[split].append(Row(name, path, {"speaker": "", "keyword": SILENCE}, float(second), 1.0))
            made[split] += 1
    return made
