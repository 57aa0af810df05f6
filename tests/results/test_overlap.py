"""Training data against test sets: what names say, where it is shown, and code that forgets it is caught."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import superb_probe
from superb_probe import cli
from superb_probe.downstreams.corpora import CORPORA
from superb_probe.results import boards as boards_module
from superb_probe.results import figures, overlap, page, plot, text_tables
from superb_probe.results.boards import boards
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.overlap import overlap_warning, training_overlap, upstream_overlap
from superb_probe.results.record import RunRecord, write_record
from superb_probe.upstreams.load import load_upstream

Make = Callable[..., RunRecord]
CASES = [
    ("librispeech-960", "librispeech", "pr", "train"),
    ("librispeech960h", "librispeech", "asr", "train"),
    ("LibriSpeech train-clean-100", "libri2mix", "sd", "train"),
    ("LibriSpeech train-clean-100, dev-clean", "librispeech", "pr", "overlap"),
    ("openslr/librispeech_asr", "librispeech", "asr", "possible"),
    ("openslr/librispeech_asr", "voxceleb1", "sid", "none"),
    ("LibriSpeech test-other", "librispeech", "asr", "overlap"),
    ("libri2mix train-100", "librispeech", "pr", "train"),
    ("Libri-Light", "librispeech", "asr", "train"),
    ("Libri-Light", "iemocap", "er", "none"),
    ("facebook/multilingual_librispeech", "librispeech", "asr", "unknown"),
    ("facebook/multilingual_librispeech", "voxceleb1", "asv", "none"),
    ("speechcolab/gigaspeech", "voxceleb1", "asv", "unknown"),
    ("voxpopuli", "librispeech", "asr", "none"),
    ("VoxPopuli and LibriSpeech", "librispeech", "asr", "possible"),
    # the two divisions of VoxCeleb1
    ("voxceleb1 train", "voxceleb1", "sid", "train"),
    ("voxceleb1 train", "voxceleb1", "asv", "possible"),
    ("voxceleb1 dev", "voxceleb1", "asv", "train"),
    ("voxceleb1 dev", "voxceleb1", "sid", "overlap"),
    ("voxceleb2", "voxceleb1", "asv", "none"),
    ("IEMOCAP, training sessions", "iemocap", "er", "overlap"),
    ("QUESST 2014", "quesst14", "qbe", "overlap"),
    ("superb", "snips", "sf", "possible"),
    ("mini", "mini", "pr", "possible"),
    ("mini-train", "mini", "pr", "train"),
    ("kokoro-train", "mini", "pr", "train"),  # mini is spoken by Kokoro
    ("kokoro", "mini", "pr", "possible"),
    ("kokoro", "librispeech", "pr", "none"),
    ("flite", "mini", "pr", "none"),
    ("mini-train", "librispeech", "pr", "none"),
    ("librispeech_mini", "mini", "pr", "none"),
    ("fine-tuned: mini.read.train", "mini", "asr", "train"),
    ("fine-tuned: talks.test", "manifest:talks", "asr", "overlap"),
    ("talks", "manifest:talks", "asr", "possible"),
    ("librispeech-960", "manifest:librispeech", "asr", "train"),
    ("librispeech-960", "manifest:talks", "asr", "none"),
    ("their talks", "manifest:talks", "asr", "unknown"),
    ("unknown", "mini", "pr", "unknown"),
    ("unknown", "synthetic", "synthetic_sid", "none"),
    ("", "mini", "pr", "unknown"),
]


@pytest.mark.parametrize(("name", "dataset", "task", "kind"), CASES)
def test_what_a_name_says(name: str, dataset: str, task: str, kind: str) -> None:
    assert training_overlap([name], dataset, task).kind == kind


def test_the_worst_name_counts() -> None:
    found = training_overlap(["voxpopuli", "mls", "librispeech_asr", "LibriSpeech dev-clean"], "librispeech", "pr")
    assert (found.kind, found.names) == ("overlap", ("LibriSpeech dev-clean",))
    assert training_overlap(["mls", "librispeech_asr"], "librispeech", "pr").names == ("librispeech_asr",)
    assert training_overlap([], "librispeech", "pr").kind == "none"


def unrecognised() -> list[str]:
    """Names of corpora that runs read, of which the table here knows nothing."""
    return [
        f"{alias} on {name}, {task}"
        for name, corpus in CORPORA.items()
        for task in corpus.info.tasks
        for alias in (name, *corpus.info.aliases, corpus.info.title)
        if training_overlap([alias], name, task).kind not in ("possible", "overlap")
    ]


def test_every_corpus_that_runs_read_is_known_by_all_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unrecognised() == []
    monkeypatch.setattr(overlap, "_KNOWN", overlap._KNOWN - {"fsc"})  # mutant: a corpus without one of its names
    overlap._one.cache_clear()
    assert unrecognised() == ["fsc on fluent_speech_commands, ic"]
    overlap._one.cache_clear()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"upstream.trained_on": ["voxceleb1"]}, "possible"),
        ({"upstream.trained_on": ["voxceleb1"], "upstream.revision": "random:0"}, "none"),
        ({"upstream.trained_on": []}, "unknown"),  # weights that say nothing of their data
        ({"upstream.trained_on": [], "upstream.revision": "random:0"}, "none"),
        ({"upstream.trained_on": [], "upstream.params": 0}, "none"),  # fbank
        ({"upstream.trained_on": ["unknown"], "upstream.params": 0}, "unknown"),  # states made elsewhere
    ],
)
def test_weights_that_heard_nothing(make_record: Make, changes: dict[str, Any], kind: str) -> None:
    record = make_record(**changes)
    assert upstream_overlap(record.upstream, record.task).kind == kind


def test_folds_and_seeds_show_the_worst(make_record: Make) -> None:
    heard = {"upstream.trained_on": ["voxceleb1"]}
    (row,) = leaderboard([make_record(**{"probe.seed": 1}), make_record(**{"probe.seed": 2}, **heard)]).to_dict(
        "records"
    )
    assert (row["overlap"], row["trained_on"]) == ("possible", "librispeech-960; voxceleb1")


def texts(records: list[RunRecord]) -> dict[str, str]:
    """The tables of some records, by format."""
    table = leaderboard(records)
    own = boards(table)
    return {
        "html": page.page(own, [], table, len(records)),
        "markdown": text_tables.markdown(own, len(table), len(records)),
        "latex": text_tables.latex(own),
    }


def pictures(records: list[RunRecord]) -> dict[str, str]:
    """The figures that have marks, as SVG."""
    table = leaderboard(records)
    heatmap = io.BytesIO()
    with figures._style():
        figures._heatmap(boards(table)[0])[0].savefig(heatmap, format="svg")  # type: ignore[index]
    return {"scores": plot._picture(table, "svg").decode(), "heatmap": heatmap.getvalue().decode()}


def unmarked(make: Make, write: Callable[[list[RunRecord]], dict[str, str]]) -> list[str]:
    """Formats that do not mark an overlap and an unknown, each at its score and in a note, or that mark what is neither."""
    clean = write([make(), make(**{"upstream.name": "noise", "upstream.revision": "random:0"})])
    heard = [make(test=7.25, **{"upstream.name": "heard", "upstream.trained_on": ["voxceleb1"]})]
    heard += [make(test=9.75, **{"upstream.name": "who_knows", "upstream.trained_on": ["unknown"]})]
    marks = {"latex": (r"$^{\dagger}$", r"$^{\ddagger}$")}
    wrong = []
    for name, text in write(heard).items():
        for value, mark in zip(("7.25", "9.75"), marks.get(name, ("†", "‡")), strict=True):
            value = value if name != "heatmap" else format(float(value), ".1f")
            at_score = any(value in line and mark in line for line in text.replace("<td", "\n<td").splitlines())
            wrong += [f"{name}: no {mark} at {value}"] * (not at_score)
            wrong += [f"{name}: no note of {mark}"] * (f"{mark} the" not in text and f"{mark} what" not in text)
            wrong += [f"{name}: {mark} where it does not belong"] * (mark in clean[name])
    return wrong


def test_every_format_marks_it_and_says_what_the_mark_means(make_record: Make) -> None:
    assert unmarked(make_record, texts) == unmarked(make_record, pictures) == []


MUTANTS: dict[str, tuple[Any, str, Any, set[str]]] = {
    "no_mark_at_a_score": (boards_module, "MARKS", {}, {"markdown", "latex"}),
    "no_mark_on_the_page": (page, "MARKS", {}, {"html"}),
    "no_mark_in_the_plot": (plot, "MARKS", {}, {"scores"}),
    "no_mark_in_the_heatmap": (figures, "MARKS", {}, {"heatmap"}),
    "no_notes": (boards_module, "overlap_notes", lambda rows, name: [], {"markdown", "latex", "html"}),
    "no_note_in_the_caption": (text_tables, "MARKS", {}, {"latex"}),
    "no_note_in_the_plot": (plot, "short_notes", lambda kinds: [], {"scores"}),
    "no_note_in_the_heatmap": (figures, "short_notes", lambda kinds: [], {"heatmap"}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_format_that_forgets_it_is_caught(make_record: Make, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    module, name, broken, formats = MUTANTS[mutant]
    monkeypatch.setattr(module, name, broken)
    write = pictures if module in (plot, figures) else texts
    assert {line.partition(":")[0] for line in unmarked(make_record, write)} == formats


def test_a_mark_on_everything_is_caught(make_record: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("superb_probe.results.leaderboard.worst_overlap", lambda records: "possible")
    assert any("where it does not belong" in line for line in unmarked(make_record, texts))


def test_the_page_says_it_in_words(make_record: Make) -> None:
    record = make_record(**{"upstream.trained_on": ["<b>voxceleb1"]})
    table = leaderboard([record])
    text = page.page(boards(table), [], table, 1)
    words = "the encoder&#x27;s training data may hold this test set: &lt;b&gt;voxceleb1"
    assert f'title="{words}"' in text
    assert f'<span class="vh"> ({words})</span>' in text
    assert "<b>" not in text


def test_train_splits_are_said_and_not_marked(make_record: Make) -> None:
    table = leaderboard([make_record(**{"task.dataset": "librispeech", "task.name": "pr"})])
    text = text_tables.markdown(boards(table), 1, 1)
    assert (
        "Trained on the test set's corpus, its test data left out: mamba\\_hubert\\_causal, librispeech-960 (PR)."
        in text
    )
    assert "†" not in text


@pytest.fixture
def folder(make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records with items of two encoders, one of which heard the test set's corpus."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "task.name": "sid",
        "task.metric": "accuracy",
        "task.higher_is_better": True,
        "selection.metric": "accuracy",
    }
    for upstream, heard, right in (("heard", ["voxceleb1"], 1), ("apart", ["librispeech-960"], 0)):
        record = make_record(**changes, **{"upstream.name": upstream, "upstream.trained_on": heard})
        write_record(record, {"id": [f"u{i}" for i in range(8)], "correct": [right] * 8}, tmp_path / "runs")
    yield tmp_path / "runs"


def test_the_terminal_says_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.csv"]) == 0
    said = capsys.readouterr().out
    assert "5.23†" in said
    assert "not said to leave out, this test set: heard, voxceleb1 (sid)." in said
    assert cli.main(["compare", "sid", "apart", "heard", "--runs", "runs"]) == 0
    said = capsys.readouterr().out
    assert "100.00†" in said
    assert "this test set: heard, voxceleb1 (sid)." in said
    assert cli.main(["compare", "sid", "apart", "heard", "--runs", "runs", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert line["overlap"] == {"a": "none", "b": "possible"}


def test_a_run_keeps_it_as_a_warning(tmp_path: Path) -> None:
    upstream = load_upstream("fbank")
    warnings = {}
    for heard in ((), ("synthetic (train)",), ("synthetic",)):
        upstream.info = dataclasses.replace(upstream.info, name=f"heard_{len(warnings)}", trained_on=heard)
        (record,) = superb_probe.run(upstream, "synthetic_sid", lr=[0.01], steps=2, limit=24, out=tmp_path)
        warnings[heard] = [text for text in record.warnings if "trained on" in text]
    assert warnings[()] == warnings[("synthetic (train)",)] == []
    (said,) = warnings[("synthetic",)]
    assert said.startswith(
        "heard_2 was trained on synthetic, which is not said to leave out test: the test set of synthetic_sid"
    )


def test_the_sentence_of_a_certain_overlap() -> None:
    found = training_overlap(["LibriSpeech dev-clean"], "librispeech", "pr")
    assert overlap_warning("x", "pr", "librispeech", found) == (
        "x was trained on LibriSpeech dev-clean: dev or test data of pr (librispeech) are among its training data"
    )
    assert overlap_warning("x", "pr", "mini", training_overlap(["unknown"], "mini", "pr")) == ""
