"""The embedded corpus: its digest, its size, and what its tables promise. Audio and silence are measured by tools/mini_check.py."""

from __future__ import annotations

import csv
import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest

from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.mini import mini_root

SPLITS = ("train", "dev", "test")
SESSIONS = ("1", "2", "3", "4", "5")
LARGEST_BYTES = 20_000_000


def table(root: Path, name: str) -> list[dict[str, str]]:
    with (root / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def shared(sets: list[set[str]]) -> set[str]:
    return {value for value, count in Counter(value for each in sets for value in each).items() if count > 1}


def promises(root: Path) -> list[str]:
    """What the tables of a folder break; empty for the corpus as it ships."""
    broken = []
    for name in ("read", "phrases", "commands", "slots"):
        if shared([{row["text"] for row in table(root, f"{name}.{split}")} for split in SPLITS]):
            broken.append(f"{name}: a text in two splits")
    for name in ("read", "phrases", "commands", "slots", "words"):
        if shared([{row["speaker"] for row in table(root, f"{name}.{split}")} - {""} for split in SPLITS]):
            broken.append(f"{name}: a speaker in two splits")
    for split in SPLITS:
        counts = Counter(row["keyword"] for row in table(root, f"words.{split}"))
        if len(counts) != 12 or len(set(counts.values())) != 1:
            broken.append(f"words.{split}: keywords in unequal numbers")
        for row in table(root, f"slots.{split}"):
            labels = row["iob"].split()
            inside = [before[2:] for before, label in zip(["O", *labels], labels, strict=False) if label[:2] == "I-"]
            if len(labels) != len(row["text"].split()) or inside != [
                label[2:] for label in labels if label[:2] == "I-"
            ]:
                broken.append(f"{row['id']}: labels")
        broken += [problem for row in table(root, f"mixtures.{split}") for problem in rttm_problems(root, row)]
    sessions = [table(root, f"styles.{session}") for session in SESSIONS]
    for column in ("speaker", "text"):
        if shared([{row[column] for row in rows} for rows in sessions]):
            broken.append(f"styles: a {column} in two sessions")
    said = Counter((row["text"], row["speaker"], row["emotion"]) for rows in sessions for row in rows)
    if set(said.values()) != {1} or len(said) != 4 * len({key[:2] for key in said}):
        broken.append("styles: a sentence that is not once in every style")
    for split in ("dev", "test"):
        queries, documents = table(root, f"queries.{split}"), table(root, f"documents.{split}")
        found = {(q["id"], d["id"]) for q in queries for d in documents if q["text"] in d["text"].split()}
        if found != {(row["query"], row["document"]) for row in table(root, f"occurrences.{split}")}:
            broken.append(f"occurrences.{split}: not those of the texts")
    dealt = [table(root, f"speakers_id.{split}") for split in SPLITS]
    if (
        shared([{row["audio"] for row in rows} for rows in dealt])
        or len({len({r["speaker"] for r in d}) for d in dealt}) > 1
    ):
        broken.append("speakers_id: a sentence in two splits, or a speaker in one only")
    return broken


def rttm_problems(root: Path, row: dict[str, str]) -> list[str]:
    """What is wrong with the segments of one mixture."""
    lines = [line.split() for line in (root / row["rttm"]).read_text(encoding="utf-8").splitlines()]
    found = [f"{row['id']}: speakers"] if len({fields[7] for fields in lines}) != 2 else []
    ends_s = [float(fields[3]) + float(fields[4]) for fields in lines]
    if min(float(fields[3]) for fields in lines) < 0 or max(ends_s) > float(row["duration_s"]) + 1e-3:
        found.append(f"{row['id']}: a segment outside the file")
    return found


def test_the_tables_keep_their_promises():
    assert promises(mini_root()) == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables and RTTM files alone."""
    root = tmp_path_factory.mktemp("mini")
    for path in mini_root().glob("*.tsv"):
        shutil.copy(path, root)
    shutil.copytree(mini_root() / "rttm", root / "rttm")
    return root


@pytest.mark.parametrize(
    ("name", "pattern", "instead", "broken"),
    [
        ("commands.test.tsv", r"\tZOOM ROOM TWO\t", "\tROOM TWO ZOOM\t", "commands: a text in two splits"),
        ("read.dev.tsv", r"\tsp06\t", "\tsp01\t", "read: a speaker in two splits"),
        ("words.dev.tsv", r"\tyes\tYES", "\tno\tYES", "words.dev: keywords in unequal numbers"),
        ("slots.test.tsv", r" B-(\w+) I-\1", r" O I-\1", ": labels"),
        ("slots.test.tsv", r" B-city\t", " B-city O\t", ": labels"),
        ("rttm/mix-dev-01.rttm", r"(SPEAKER \S+ 1) \S+", r"\1 5.900", "mix-dev-01: a segment outside the file"),
        ("rttm/mix-dev-01.rttm", r"sp\d\d", "sp01", "mix-dev-01: speakers"),
        ("styles.1.tsv", r"\tplain\t", "\tlively\t", "styles: a sentence that is not once in every style"),
        ("occurrences.test.tsv", r"\n[^\n]+\n$", "\n", "occurrences.test: not those of the texts"),
    ],
)
def test_a_broken_promise_is_found(copy, name, pattern, instead, broken):
    original = (copy / name).read_text(encoding="utf-8")
    changed = re.sub(pattern, instead, original)
    assert changed != original
    (copy / name).write_text(changed, encoding="utf-8")
    try:
        assert any(broken in problem for problem in promises(copy))
    finally:
        (copy / name).write_text(original, encoding="utf-8")


def test_the_readme_states_the_digest(tmp_path):
    script = Path(__file__).parents[2] / "tools" / "mini_digest.py"
    if not script.exists():
        pytest.skip("tools/ is not part of this installation")
    corpus_digest = runpy.run_path(str(script))["corpus_digest"]
    readme = (mini_root() / "README.md").read_text(encoding="utf-8")
    assert f"Digest: `sha256:{corpus_digest(mini_root())}`" in readme
    (tmp_path / "rttm").mkdir()
    (tmp_path / "rttm" / "a.rttm").write_text("SPEAKER a 1 0.0 1.0\n", encoding="utf-8")
    before = corpus_digest(tmp_path)
    (tmp_path / "rttm" / "a.rttm").write_text("SPEAKER a 1 0.0 2.0\n", encoding="utf-8")
    assert corpus_digest(tmp_path) != before


def test_the_corpus_is_small_and_every_file_is_listed():
    files = [path for path in mini_root().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_BYTES
    rows = [row for path in mini_root().glob("*.tsv") for row in table(mini_root(), path.stem)]
    listed = {row["audio"] for row in rows if "audio" in row}
    assert listed == {path.relative_to(mini_root()).as_posix() for path in files if path.suffix == ".opus"}


@pytest.mark.parametrize("name", ["ks", "ic", "sid", "er", "sf", "sd", "qbe", "asr", "pr", "asv"])
def test_every_task_reads_it(name):
    folds = load_folds(load_task(name))
    assert len(folds) == (5 if name == "er" else 1)
    assert all(len(manifest) for fold in folds for manifest in fold.manifests.values())
