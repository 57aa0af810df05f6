"""Audio SNIPS as SUPERB prepares it, for slot filling (sf): sixteen synthetic voices, labels of every word."""

from __future__ import annotations

from collections.abc import Sequence

from superb_probe.downstreams.checks import some
from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Row, Tree, missing_audio

TRANSCRIPTS = "all.iob.snips.txt"
SLOTS = "slots.txt"
VOICES = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "dev": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
FOLDERS = {"train": "train", "dev": "valid", "test": "test"}
PUNCTUATION = "?!.,;-"


class AudioSnips(Corpus):
    """Requests to an assistant; `{train,valid,test}/<Voice>-snips-<split>-<number>.wav`, `all.iob.snips.txt`, `slots.txt`."""

    info = CorpusInfo(
        name="snips",
        title="Audio SNIPS",
        source="https://github.com/s3prl/s3prl (docs: SF; preprocess/snips_prepare_data.sh, or its prepared SNIPS.zip)",
        license="SNIPS: CC0 1.0; audio: see aws-lex-noisy-spoken-language-understanding",
        citation="Lai et al., Semi-Supervised Spoken Language Understanding via Self-Supervised Pretraining, arXiv:2010.13826",
        landmarks=(TRANSCRIPTS, SLOTS, *FOLDERS.values()),
        published={"sf": {"train": 104672, "dev": 2800, "test": 2800}},
        aliases=("audio_snips",),
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold: speaker, text, and by word "O", "B-slot" or "I-slot"; each split's own voices only."""
        texts = _transcripts(tree)
        known = {line.strip() for line in tree.lines(SLOTS)[1:] if line.strip()}  # its first line is no slot
        labels = {label[2:] for _, iob in texts.values() for label in iob.split() if label != "O"}
        if known and (strange := sorted(labels - known)):
            tree.findings.problem(TRANSCRIPTS, f"{some(strange, 'slot')} not in {SLOTS}", "take both from one archive")
        return [Draft(None, {split: _split(tree, split, texts) for split in FOLDERS})]


def _split(tree: Tree, split: str, texts: dict[str, tuple[str, str]]) -> list[Row]:
    folder = FOLDERS[split]
    audio = {
        key.rpartition("/")[2]: path
        for key, path in tree.audio(folder).items()
        if key.rpartition("/")[2].partition("-")[0] in VOICES[split]
    }
    listed = [name for name in texts if name.split("-")[0] in VOICES[split] and f"-{folder}-" in name]
    missing_audio(tree, folder, listed, [name for name in listed if name not in audio])
    untold = sorted(set(audio) - set(texts))
    if untold:
        what = f"audio without a transcript: {some(untold, 'utterance')}"
        tree.findings.problem(folder, what, f"take {TRANSCRIPTS} and the audio from one archive")
    return [
        Row(name, audio[name], {"speaker": name.partition("-")[0], "text": texts[name][0], "iob": texts[name][1]})
        for name in sorted(audio)
        if name in texts
    ]


def _transcripts(tree: Tree) -> dict[str, tuple[str, str]]:
    """By utterance, its words and their labels; a line is `<name> BOS words EOS<tab>O labels intent`."""
    texts: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(tree.lines(TRANSCRIPTS), start=1):
        if not line.strip():
            continue
        left, tab, right = line.strip().partition("\t")
        name, *sentence = left.split(" ")
        words, labels = sentence[1:-1], right.split(" ")[1:-1]
        where = f"{TRANSCRIPTS}, line {number}"
        if not tab or len(words) != len(labels) or not words:
            what = f"{name}: {len(words)} words, {len(labels)} labels"
            tree.findings.problem(where, what, "restore the file: BOS words EOS, a tab, a label for each")
            continue
        if name in texts:
            tree.findings.problem(where, f"a second transcript of {name}", "keep one")
        kept = [(word, label) for word, label in zip(words, marked(labels), strict=True) if word not in PUNCTUATION]
        texts[name] = (
            " ".join("AND" if word == "&" else word for word, _ in kept),
            " ".join(label for _, label in kept),
        )
    return texts


def marked(labels: Sequence[str]) -> list[str]:
    """Labels as "B-slot" and "I-slot"; the file has plain names, of which equal neighbours are one span.

    >>> marked(["O", "artist", "artist", "album"])
    ['O', 'B-artist', 'I-artist', 'B-album']
    """
    names = [label[2:] if label[:2] in ("B-", "I-") else label for label in labels]
    before = ["O", *names[:-1]]
    return [
        name if name == "O" else f"I-{name}" if name == last and not label.startswith("B-") else f"B-{name}"
        for name, last, label in zip(names, before, labels, strict=True)
    ]
