"""The commands that read records, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superb_probe import cli
from superb_probe.downstreams.corpora import CORPORA
from superb_probe.results.record import RunRecord, write_record

Make = Callable[..., RunRecord]


@pytest.fixture
def runs(make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two upstreams of four tasks, with items; the current folder is a scratch one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    for task, metric, higher in (
        ("pr", "per", False),
        ("sid", "accuracy", True),
        ("er", "accuracy", True),
        ("ic", "accuracy", True),
    ):
        for upstream, right in (("one", 1), ("two", 0)):
            changes = {"task.name": task, "task.metric": metric, "task.higher_is_better": higher, "selection.metric": metric,
                       "upstream.name": upstream, "upstream.revision": f"sha256:{upstream}"}  # fmt: skip
            names = [f"u{i}" for i in range(40)]
            items = (
                {"id": names, "correct": [right] * 39 + [0]}
                if higher
                else {"id": names, "edits": [1] * 40, "phones": [4] * 40}
            )
            write_record(make_record(test=60.0 + right, **changes), items, folder)
    return folder


def test_all_formats_and_their_names(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["leaderboard", "--runs", "runs"]) == 0
    made = {path.name for path in (tmp_path / "results").iterdir()}
    assert made == {"leaderboard.csv", "leaderboard.md", "leaderboard.html"}
    assert (
        cli.main(
            [
                "leaderboard",
                "--runs",
                "runs",
                "--out",
                "board",
                "--format",
                "latex",
                "md",
                "--task",
                "pr",
                "ic",
                "--no-published",
            ]
        )
        == 0
    )
    assert "over 2 of 10 tasks (PR, IC)" in (tmp_path / "board.md").read_text()
    assert "WavLM" not in (tmp_path / "board.md").read_text()
    assert "booktabs" in (tmp_path / "board.tex").read_text()
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.html"]) == 0
    assert "WavLM Large" in (tmp_path / "board.html").read_text()
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.xls"]) == 2
    assert ".csv, .md, .html, .tex" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "file/board.html"]) == 2
    assert cli.main(["leaderboard", "--runs", "runs", "--task", "asw"]) == 2


def test_citations_of_what_is_in_the_table(runs: Path, tmp_path: Path, make_record: Make) -> None:
    write_record(make_record(**{"upstream.name": "fbank"}), None, runs)
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.tex", "--cite"]) == 0
    text = (tmp_path / "board.bib").read_text()
    assert "asv" in text
    assert "@misc{" in text
    assert "Nagrani et al., VoxCeleb" in text
    assert "annote = {corpus voxceleb1}" in text
    assert text.rstrip().endswith("% no citation declared: one, two")


def test_citing_runs_no_file_and_asks_no_network(runs: Path, tmp_path: Path, make_record: Make) -> None:
    """Mutant: building every upstream of the table for its citation imports somebody's file, and asks a hub for `hf:`."""
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    for name in ("./mine.py:mine", "hf:org/name"):
        write_record(make_record(**{"upstream.name": name}), None, runs)
    write_record(make_record(**{"task.name": "task_of_theirs"}), None, runs)
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.tex", "--cite"]) == 0
    assert not (tmp_path / "ran").exists()
    told = (tmp_path / "board.bib").read_text().rstrip().splitlines()[-1]
    assert all(name in told for name in ("./mine.py:mine", "hf:org/name", "task_of_theirs"))


def test_every_corpus_has_a_citation_and_mini_too(runs: Path, tmp_path: Path, make_record: Make) -> None:
    assert all(corpus.info.citation for corpus in CORPORA.values())
    changes = {"task.dataset": "mini", "upstream.name": "fbank"}
    write_record(make_record(**changes), None, runs)
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.tex", "--cite"]) == 0
    assert "the embedded corpus of superb-probe" in (tmp_path / "board.bib").read_text()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda values: values["probe"].update(lr="0.1"), "probe.lr must be a number, found '0.1'"),
        (lambda values: values["probe"].update(learning_rate=0.1), "unknown field probe.learning_rate"),
        (lambda values: values.update(schema="superb-probe/run/2"), "this version reads 'superb-probe/run/1'"),
    ],
)
def test_a_spoilt_record_is_named_and_the_rest_is_made(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[dict[str, Any]], None], told: str
) -> None:
    (path,) = (runs / "ic" / "one").glob("*.json")
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board", "--format", "csv", "md", "html"]) == 1
    said = capsys.readouterr().err
    assert str(path.relative_to(tmp_path)) in said
    assert told in said
    for ending in ("csv", "md", "html"):
        text = (tmp_path / f"board.{ending}").read_text()
        assert "two" in text
    assert len((tmp_path / "board.csv").read_text().splitlines()) == 1 + 7


def test_plots_of_several_kinds(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superb_probe.results.figures.DPI", 40)
    assert (
        cli.main(["plot", "--runs", "runs", "--kind", "heatmap", "cost", "--cost", "params", "--out", "figure.png"])
        == 0
    )
    assert {path.name for path in tmp_path.glob("figure*")} == {
        f"figure_{k}.{e}" for k in ("heatmap", "cost") for e in ("png", "svg", "csv")
    }
    assert cli.main(["plot", "--runs", "runs", "--kind", "rates"]) == 2
    assert "two learning rates" in capsys.readouterr().err


def test_compare(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "all", "one", "two", "--runs", "runs", "--json"]) == 0
    found = {line["task"]: line for line in json.loads(capsys.readouterr().out)["comparisons"]}
    assert {task: line["verdict"] for task, line in found.items()} == {
        "pr": "cannot tell",
        "sid": "one is better",
        "er": "one is better",
        "ic": "one is better",
    }
    assert found["ic"]["p_holm"] == pytest.approx(4 * found["ic"]["p"])
    assert cli.main(["compare", "ic,pr", "one", "two", "--runs", "runs"]) == 0
    said = capsys.readouterr().out
    assert "McNemar's exact test over items, 40 items" in said
    assert "cannot tell" in said
    assert cli.main(["compare", "ic", "one", "three", "--runs", "runs"]) == 2
    assert "no result of three" in capsys.readouterr().err
    assert cli.main(["compare", "all", "one", "three", "--runs", "runs"]) == 2
