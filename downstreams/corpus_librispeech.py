"""LibriSpeech as published: train-clean-100, dev-clean and test-clean, for speech (asr) and phoneme (pr) recognition."""

from __future__ import annotations

from superb_probe.downstreams.checks import some
from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Extra, Row, Tree

FOLDERS = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}
COUNTS = {"train": 28539, "dev": 2703, "test": 2620}

LEXICON = Extra(
    name="lexicon",
    what="a word and its phones a line; the first pronunciation of a word counts",
    source="https://huggingface.co/datasets/s3prl/g2p (both files of lexicon/), SUPERB's own",
    files=(
        "librispeech-lexicon-200k-g2p.txt",
        "librispeech-lexicon-allothers-g2p.txt",
        "lexicon/librispeech-lexicon-200k-g2p.txt",
        "lexicon/librispeech-lexicon-allothers-g2p.txt",
    ),
    tasks=("pr",),
)


class LibriSpeech(Corpus):
    """Read English; `<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac` beside `<speaker>-<chapter>.trans.txt`."""

    info = CorpusInfo(
        name="librispeech",
        title="LibriSpeech",
        source="https://www.openslr.org/12",
        license="CC BY 4.0",
        citation="Panayotov et al., Librispeech: an ASR corpus based on public domain audio books, ICASSP 2015",
        landmarks=tuple(FOLDERS.values()),
        published={"asr": COUNTS, "pr": COUNTS},
        extras=(LEXICON,),
        aliases=("libri",),
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold: speaker and text, for `pr` with phones from the lexicon."""
        lexicon = read_lexicon(tree) if task == "pr" else None
        rows = {split: _split(tree, folder, lexicon) for split, folder in FOLDERS.items()}
        return [Draft(None, rows)]


def _split(tree: Tree, folder: str, lexicon: dict[str, str] | None) -> list[Row]:
    audio = {key.rpartition("/")[2]: path for key, path in tree.audio(folder).items()}
    texts = _transcripts(tree, folder)
    silent = sorted(set(texts) - set(audio))
    untold = sorted(set(audio) - set(texts))
    source = f"unpack {folder} again ({tree.info.source})"
    if silent:
        tree.findings.fewer(folder, f"transcripts without audio: {some(silent, 'utterance')}", source)
    if untold:
        tree.findings.problem(folder, f"audio without a transcript: {some(untold, 'utterance')}", source)
    rows = []
    unknown: dict[str, None] = {}
    for name in sorted(set(audio) & set(texts)):
        labels = {"speaker": name.partition("-")[0], "text": texts[name]}
        if lexicon is not None:
            words = texts[name].split()
            unknown.update(dict.fromkeys(word for word in words if word not in lexicon))
            labels["phones"] = " ".join(lexicon.get(word, "") for word in words)
        rows.append(Row(name, audio[name], labels))
    if lexicon and unknown:
        fix = f"give all lexicons that the protocol uses ({LEXICON.source})"
        tree.findings.problem(folder, f"not in the lexicon: {some(list(unknown), 'word')}", fix)
    return rows


def _transcripts(tree: Tree, folder: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in sorted((tree.root / folder).rglob("*.trans.txt")):
        if file.name.startswith("."):
            continue
        place = file.relative_to(tree.root).as_posix()
        for number, line in enumerate(tree.lines(place), start=1):
            if not line.strip():
                continue
            name, _, text = line.partition(" ")
            if name in texts:
                tree.findings.problem(f"{place}, line {number}", f"a second transcript of {name}", "keep one")
            if not text.strip():
                tree.findings.problem(f"{place}, line {number}", f"{name} has no words", "restore the file")
            texts[name] = " ".join(text.split())
    return texts


def read_lexicon(tree: Tree) -> dict[str, str]:
    """By word, its phones; of several pronunciations the first in the order of the files."""
    phones: dict[str, str] = {}
    for file in tree.extra("lexicon"):
        for line in tree.lines(file):
            word, *pronunciation = line.split() or [""]
            if word and pronunciation:
                phones.setdefault(word, " ".join(pronunciation))
    return phones
