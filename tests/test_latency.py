"""`analyze latency`: words and their delays from known emissions, and the command on a recogniser that hears the truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from superb_probe import cli, commands_latency, latency
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.errors import RequestError
from superb_probe.latency import Word, delays, measure_latency, read_word_ends, words_of
from superb_probe.streaming import Emission, Recogniser, Report
from superb_probe.upstreams.load import load_upstream

UPSTREAM = {"size": "test", "random": 0}


@pytest.fixture(scope="module")
def spoken() -> Manifest:
    return read_splits(mini_root(), "read")["test"]


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[list[str], list[float]]]:
    return read_word_ends(mini_root() / "alignments.test.tsv")


def recogniser(spaced: bool = False) -> Recogniser:
    return Recogniser(
        lambda states: states[-1], torch.nn.Identity(), ("<s>", "|"), frozenset({"</s>"}), spaced, "oracle"
    )


def oracle(rows: Manifest, ends: Any, delay_s: float, wrong: int = 0) -> Callable[..., Report]:
    """A `stream_audio` that says each word of each utterance in turn `delay_s` after its end, the first `wrong` of them wrongly."""
    turns: Iterator[Utterance] = iter(rows)

    def stream_audio(upstream: Any, chunks: Iterator[Tensor], *, chunk_s: float, **rest: Any) -> Report:
        report = Report(chunk_s, 0.0, 0.025, audio_s=1.0, compute_s=0.1)
        words, word_ends = ends[next(turns).id]
        for number, (word, end) in enumerate(zip(words, word_ends, strict=True)):
            text = "X" if number < wrong else word.upper()
            for token in text:
                report.emissions.append(Emission(token, 0.0, end + delay_s - (0.01 if token != text[-1] else 0.0)))
            report.emissions += [Emission("|", 0.0, end + 9.0), Emission("</s>", 0.0, end + 9.0)]
        return report

    return stream_audio


def test_words_end_with_their_last_character() -> None:
    said = [Emission(token, 0.0, float(heard)) for heard, token in enumerate("|NO||GO")]
    assert words_of(said, frozenset()) == [Word("NO", 2.0), Word("GO", 6.0)]
    assert words_of([Emission("</s>", 0.0, 1.0)], frozenset({"</s>"})) == []


def test_only_right_words_count() -> None:
    said = [Word("THE", 1.0), Word("CAT", 2.0), Word("SAT", 3.0)]
    assert delays(["THE", "BAT", "SAT"], [0.9, 1.5, 2.5], said) == [0.1, 0.5]
    assert delays(["A"], [1.0], []) == []
    with pytest.raises(RequestError, match="1 words with 2 ends"):
        delays(["A"], [1.0, 2.0], said)


@pytest.mark.parametrize(("delay_s", "wrong"), [(0.2, 0), (0.5, 1), (-0.1, 0)])
def test_a_known_delay_is_found(
    delay_s: float, wrong: int, spoken: Manifest, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "stream_audio", oracle(spoken, ends, delay_s, wrong))
    upstream = load_upstream("mamba_hubert_causal", **UPSTREAM)
    found = measure_latency(upstream, recogniser(), spoken, ends, 0.16, None, limit=12)
    assert found["delay_median_s"] == pytest.approx(delay_s)
    assert found["delay_p90_s"] == pytest.approx(delay_s)
    assert found["wer"] == pytest.approx(100 * 12 * wrong / found["words"])
    assert found["right_words"] == found["words"] - 12 * wrong
    assert found["real_time_factor"] == pytest.approx(0.1)


def test_times_of_a_stretch_start_with_it(spoken: Manifest, ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An utterance that begins later in its file has word ends of the file."""
    first = spoken[0]
    late = Manifest([Utterance(first.id, first.audio, 0.25, 1.0, first.labels)], spoken.root, "late")
    monkeypatch.setattr(latency, "stream_audio", oracle(late, ends, 0.2))
    upstream = load_upstream("mamba_hubert_causal", **UPSTREAM)
    assert measure_latency(upstream, recogniser(), late, ends, 0.16, None)["delay_median_s"] == pytest.approx(0.45)


def test_what_cannot_be_measured_is_refused(spoken: Manifest, ends: Any) -> None:
    upstream = load_upstream("mamba_hubert_causal", **UPSTREAM)
    with pytest.raises(RequestError, match="of characters"):
        measure_latency(upstream, recogniser(spaced=True), spoken, ends, 0.16, None)
    with pytest.raises(RequestError, match="140 utterances of .* have no word ends"):
        measure_latency(upstream, recogniser(), spoken, {}, 0.16, None)
    other = {name: (["other"], [1.0]) for name in ends}
    with pytest.raises(RequestError, match="its word ends are of 'other'"):
        measure_latency(upstream, recogniser(), spoken, other, 0.16, None, limit=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--upstream", "mamba_hubert_causal", "--size", "test", "--random", "0", "--head-width", "8")
    files = []
    for split, manifest in read_splits(mini_root(), "read").items():
        manifest[:2].write(tmp_path / f"{split}.tsv")
        files.append(f"{split}={tmp_path / split}.tsv")
    words = [*model, "--steps", "2", "--root", str(mini_root()), "--manifest", *files, "--out", str(tmp_path / "run")]
    assert cli.main(["finetune", *words]) == 0
    capsys.readouterr()
    words = ["--finetuned", f"mine={tmp_path / 'run'}", "--limit", "2", "--out", str(tmp_path / "figure"), "--json"]
    assert cli.main(["analyze", "latency", *words, "--chunk-ms", "160", "640"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["chunk_ms"], row["lookahead_s"]) for row in rows] == [
        ("mine", 160, 0.0),
        ("mine", 640, 0.0),
    ]
    assert (tmp_path / "figure.png").is_file()
    assert cli.main(["analyze", "latency", *words, "--chunk-ms", "640", "--lookahead-ms", "320"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["lookahead_s"] == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("words", "what"),
    [(("--finetuned", "x"), "no finetuned.json"), (("--finetuned", "x", "--manifest", "a.tsv"), "go together")],
)
def test_wrong_requests(words: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "latency", *words]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "label", "names", "places"),
    [
        ([(160, 0.0), (160, 0.32)], "look-ahead (ms)", ["mine, chunk 160 ms"], [0.0, 320.0]),
        ([(160, 0.0), (640, 0.0)], "chunk (ms)", ["mine, look-ahead 0 ms"], [160, 640]),
    ],
)
def test_the_figure_is_against_what_varies(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: list[tuple[float, float]],
    label: str,
    names: list[str],
    places: list[float],
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "superb_probe.results.lines.draw_panels", lambda panels, numbers, out: drawn.extend(panels) or []
    )
    values = {"wer": 80.0, "delay_median_s": 0.4, "ci95": (78.0, 82.0)}
    rows = [{"name": "mine", "chunk_ms": chunk, "lookahead_s": ahead, **values} for chunk, ahead in settings]
    commands_latency.draw(rows, tmp_path / "figure")
    assert [panel.x for panel in drawn] == [label, label]
    assert list(drawn[0].lines) == names and drawn[0].lines[names[0]][0] == places
    assert drawn[1].lines[names[0]][1] == [400.0, 400.0]
