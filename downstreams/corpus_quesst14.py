"""QUESST 2014 as published, for query by example (qbe): SUPERB's English part."""

from __future__ import annotations

from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Row, Tree, audio_key, missing_audio

ENGLISH = "nnenglish"
NUM_DOCUMENTS, NUM_QUERIES = 2438, 138
LISTS = {"dev": "dev", "test": "eval"}


class Quesst14(Corpus):
    """Spoken queries and documents; `Audio`, `{dev,eval}_queries`, and lists and ground truth in `scoring`."""

    info = CorpusInfo(
        name="quesst14",
        title="QUESST 2014",
        source="https://speech.fit.vutbr.cz/files/quesst14Database.tgz",
        license="research use, see its README",
        citation="Anguera et al., QUESST2014: Evaluating Query-by-Example Speech Search in a zero-resource setting, ICASSP 2015",
        landmarks=("Audio", "dev_queries", "eval_queries", "scoring"),
        published={"qbe": {"dev": NUM_DOCUMENTS + NUM_QUERIES, "test": NUM_DOCUMENTS + NUM_QUERIES}},
        aliases=("quesst",),
        rates_hz=(8000, 16000),  # published at 8 kHz; SUPERB's effects make 16 kHz of it
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold of dev and test: the role of each utterance, and of a query the documents it occurs in."""
        documents = _listed(tree, "scoring/language_key_utterances.lst")
        rows = {}
        for split, part in LISTS.items():
            queries = _listed(tree, f"scoring/language_key_{part}.lst")
            matches = _matches(tree, part, set(queries), set(documents))
            rows[split] = [_row(name, path, "query", matches.get(name, [])) for name, path in queries.items()]
            rows[split] += [_row(name, path, "document", []) for name, path in documents.items()]
        return [Draft(None, rows)]


def _row(name: str, path: str, role: str, occurrences: list[str]) -> Row:
    return Row(name, path, {"role": role, "occurrences": " ".join(occurrences)})


def _listed(tree: Tree, place: str) -> dict[str, str]:
    """By name, the audio of a list's English lines: a path, whose first folder is not in the archive, and a language."""
    found: dict[str, str] = {}
    listed, missing = [], []
    for number, line in enumerate(tree.lines(place), start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2 or "/" not in cells[0]:
            tree.findings.problem(f"{place}, line {number}", f"{line!r}", "restore it: a path and a language")
            continue
        if cells[1] != ENGLISH:
            continue
        key = audio_key(cells[0].partition("/")[2])
        name = key.rpartition("/")[2]
        listed.append(name)
        audio = tree.audio(key.partition("/")[0]) if "/" in key else {}
        if key in audio:
            found[name] = audio[key]
        else:
            missing.append(name)
    missing_audio(tree, place, listed, missing)
    return found


def _matches(tree: Tree, part: str, queries: set[str], documents: set[str]) -> dict[str, list[str]]:
    """By query, the documents it occurs in, in the order of the ground truth."""
    place = f"scoring/groundtruth_quesst14_{part}/quesst14_{part}.rttm"
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(tree.lines(place), start=1):
        cells = line.split()
        if not cells or cells[0] != "LEXEME":
            continue
        if len(cells) < 6:
            tree.findings.problem(
                f"{place}, line {number}", f"{line!r}", "restore it: LEXEME document 1 start length query"
            )
        elif cells[5] in queries and cells[1] in documents:
            found.setdefault(cells[5], {})[cells[1]] = None
    if queries and not found:
        fix = f"restore it ({tree.info.source})"
        tree.findings.problem(place, f"says of none of the {len(queries)} queries where it occurs", fix)
    return {query: list(names) for query, names in found.items()}
