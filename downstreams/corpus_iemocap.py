"""IEMOCAP as published, for emotion recognition (er): four classes, improvised and scripted, by session."""

from __future__ import annotations

import re

from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Row, Tree, missing_audio

CLASSES = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}  # excited is merged into happy
SESSIONS = ("1", "2", "3", "4", "5")
PUBLISHED = {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241}
# [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
LINE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(?P<name>(?P<dialog>Ses\d\d[FM]_\w+)_(?P<sex>[FM])\w+)\t(?P<emotion>\w+)\t")


class Iemocap(Corpus):
    """Acted dialogues; labels in `Session*/dialog/EmoEvaluation/<dialog>.txt`, audio in `Session*/sentences/wav/<dialog>/`."""

    info = CorpusInfo(
        name="iemocap",
        title="IEMOCAP",
        source="https://sail.usc.edu/iemocap/",
        license="by agreement with its authors: research use",
        citation="Busso et al., IEMOCAP: interactive emotional dyadic motion capture database, LRE 42, 2008",
        landmarks=tuple(f"Session{session}" for session in SESSIONS),
        published={"er": {"train": sum(PUBLISHED.values())}},
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """All utterances of the four classes with their session, which the task divides into five folds."""
        rows: list[Row] = []
        for session in SESSIONS:
            found = _session(tree, session)
            if len(found) != PUBLISHED[session]:
                what = f"{len(found)} utterances of the four classes, {PUBLISHED[session]} published"
                tree.findings.fewer(f"Session{session}", what, f"complete it ({tree.info.source})")
            rows += found
        return [Draft(None, {"train": rows})]


def _session(tree: Tree, session: str) -> list[Row]:
    folder = f"Session{session}/dialog/EmoEvaluation"
    files = [path for path in sorted((tree.root / folder).glob("*.txt")) if not path.name.startswith(".")]
    if not files:
        tree.findings.fewer(folder, "no labels there", f"unpack IEMOCAP_full_release completely ({tree.info.source})")
    audio = tree.audio(f"Session{session}/sentences/wav") if files else {}
    rows: list[Row] = []
    listed, missing = [], []
    seen: set[str] = set()
    for file in files:
        place = f"{folder}/{file.name}"
        for number, line in enumerate(tree.lines(place), start=1):
            if not line.startswith("["):
                continue  # a rater's own line, or the heading
            match = LINE.match(line)
            if match is None:
                if not line.startswith("[START_TIME"):
                    tree.findings.problem(f"{place}, line {number}", f"{line[:60]!r}", "restore the file")
                continue
            name = match["name"]
            if match["emotion"] not in CLASSES:
                continue
            if name in seen:
                tree.findings.problem(f"{place}, line {number}", f"a second label of {name}", "restore the file")
                continue
            seen.add(name)
            listed.append(name)
            key = f"Session{session}/sentences/wav/{match['dialog']}/{name}"
            if key not in audio:
                missing.append(name)
                continue
            labels = {"speaker": name[:5] + match["sex"], "emotion": CLASSES[match["emotion"]], "session": session}
            rows.append(Row(name, audio[key], labels))
    missing_audio(tree, f"Session{session}", listed, missing)
    return rows
