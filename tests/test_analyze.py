"""`superb-probe analyze` from audio to table, record, CSV and figure, on a few utterances of the embedded corpus."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from superb_probe.analysis_cca import CcaRequest, load_targets
from superb_probe.analysis_corpus import Frames, extract, load_corpus, read_embeddings
from superb_probe.analysis_units import abx_items
from superb_probe.cli import main
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import mini_root
from superb_probe.errors import RequestError
from superb_probe.results import analysis_record
from superb_probe.results.analysis_record import read_analyses
from superb_probe.upstreams.load import load_upstream

SMALL = ["--upstream", "transformer_hubert", "--size", "test", "--random", "0", "--limit", "20", "--beside", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of all three analyses."""
    out = tmp_path_factory.mktemp("analyses")
    shared = [*SMALL, "--out", str(out / "runs")]
    units = [
        "--clusters",
        "20",
        "--seed",
        "1",
        "2",
        "--curve-seeds",
        "1",
        "--change",
        "noise0",
        "--change-utterances",
        "4",
        "--abx",
        "across",
    ]
    assert main(["analyze", "units", *shared, *units, "--figure", str(out / "units.png")]) == 0
    assert main(["analyze", "cca", *shared, "--flavour", "pwcca", "--figure", str(out / "cca.png")]) == 0
    assert (
        main(["analyze", "disentangle", *shared, "--no-abx", "--clusters", "20", "--figure", str(out / "d.png")]) == 0
    )
    return out


def test_records_are_as_the_schema_says(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(analysis_record.__file__).with_name("analysis_schema.json").read_text())
    paths = sorted(folder.rglob("*.analysis.json"))
    assert len(paths) == 3
    for path in paths:
        jsonschema.Draft202012Validator(schema).validate(json.loads(path.read_text()))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_units_leave_a_record_a_csv_a_figure_and_sequences(folder: Path) -> None:
    (record,) = [each for each in read_analyses([folder / "runs"]) if each.analysis == "units"]
    assert record.label == "transformer_hubert (random)" and any("random weights" in each for each in record.warnings)
    layers = {
        each.layer
        for each in record.measurements
        if each.measure == "pnmi" and each.split == "test" and not each.where.get("change")
    }
    assert layers == {0, 1, 2}
    best = record.chosen["layer of 20"]
    dev = {each.layer: each.value for each in record.measurements if each.measure == "pnmi" and each.split == "dev"}
    assert dev[best] == max(dev.values())  # dev chooses
    seeds = {
        each.layer: each.seeds
        for each in record.measurements
        if each.measure == "pnmi" and each.split == "test" and len(each.where) == 1
    }
    assert seeds == {layer: 2 if layer == best else 1 for layer in range(3)}
    for file in record.files.values():
        assert list(folder.rglob(file))
    (sequences,) = folder.rglob("*.units20.tsv.gz")
    with gzip.open(sequences, "rt") as text:
        lines = list(csv.DictReader(text, delimiter="\t"))
    assert len(lines) == 60 and {line["split"] for line in lines} == {"train", "dev", "test"}
    units = [int(unit) for unit in lines[0]["units"].split()]
    assert [unit for at, unit in enumerate(units) if at == 0 or unit != units[at - 1]] == [
        int(unit) for unit in lines[0]["unit_runs"].split()
    ]
    for name in ("units.png", "units.svg", "units_robustness.png"):
        assert (folder / name).stat().st_size > 1000
    table = rows(folder / "units.csv")
    assert {row["measure"] for row in table} >= {
        "phone_purity",
        "cluster_purity",
        "pnmi",
        "bits_per_s",
        "abx_error",
        "unit_edit_distance",
    }


def test_saved_units_give_the_recorded_numbers(folder: Path) -> None:
    """The sequences on disk, counted by hand, have the purity that one of the two seeds is averaged from."""
    (record,) = [each for each in read_analyses([folder / "runs"]) if each.analysis == "units"]
    bits = {
        (each.where.get("control", ""), each.measure): each.value
        for each in record.measurements
        if each.split == "test"
        and each.layer == record.chosen["layer of 20"]
        and set(each.where) <= {"clusters", "control"}
    }
    assert (
        bits["random units", "pnmi"] < bits["", "pnmi"]
        and bits["random units", "phone_purity"] < bits["", "phone_purity"]
    )
    assert bits["random units", "bits_per_s"] == pytest.approx(bits["", "bits_per_s"], rel=0.05)


def test_cca_is_above_its_floor_and_says_what_was_held_out(folder: Path) -> None:
    found = {(row["target"], row["control"], row["layer"]): row for row in rows(folder / "cca.csv")}
    assert {key[0] for key in found} == {"phones", "speaker"}
    assert float(found["phones", "", "0"]["value"]) > float(found["phones", "shuffled", "0"]["ci95_high"])
    assert found["phones", "", "0"]["held_out"] == "speaker" and found["speaker", "", "0"]["held_out"] == "utterance"


def test_disentanglement_has_its_controls(folder: Path) -> None:
    table = rows(folder / "d.csv")
    assert {row["removed"] for row in table} >= {"nothing", "speakers", "phones", "random"}
    assert {row["control"] for row in table} >= {"random subspace", "shuffled speakers"}
    accuracy = {
        (row["removed"], row["layer"]): float(row["value"]) for row in table if row["measure"] == "phone_accuracy"
    }
    assert all(0 <= value <= 1 for value in accuracy.values()) and len(accuracy) == 12


def test_running_twice_is_running_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.analysis.json")}
    arguments = [
        "analyze",
        "cca",
        *SMALL,
        "--out",
        str(folder / "runs"),
        "--flavour",
        "pwcca",
        "--figure",
        str(folder / "again.png"),
        "--json",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["records"][0]["analysis"] == "cca" and "record already" in printed.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.analysis.json")} == before
    assert (folder / "again.csv").read_bytes() == (folder / "cca.csv").read_bytes()


def test_one_page_of_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "analyze",
                "figures",
                "--runs",
                str(folder / "runs"),
                "--out",
                str(folder / "page.png"),
                "--upstream",
                "transformer_hubert",
            ]
        )
        == 0
    )
    assert (folder / "page.png").stat().st_size > 10_000
    assert {row["analysis"] for row in rows(folder / "page.csv")} == {"units", "cca", "disentangle"}
    assert (
        main(
            [
                "analyze",
                "figures",
                "--runs",
                str(folder / "runs"),
                "--upstream",
                "fbank",
                "--out",
                str(folder / "x.png"),
            ]
        )
        == 2
    )
    assert "no analysis of fbank" in capsys.readouterr().err


def test_other_speech_with_its_own_alignments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = []
    for split in ("train", "dev", "test"):
        manifest = Manifest.read(mini_root() / f"read.{split}.tsv")
        manifest = manifest.keep([*manifest.ids[:2], *manifest.ids[-2:]])  # of two speakers
        manifest.write(tmp_path / f"{split}.tsv")
        manifests.append(f"{split}={tmp_path / split}.tsv")
    alone = [
        *SMALL[:6],
        "--beside",
        "none",
        "--manifest",
        *manifests,
        "--root",
        str(mini_root()),
        "--out",
        str(tmp_path / "runs"),
    ]
    command = [
        "analyze",
        "units",
        *alone,
        "--clusters",
        "5",
        "--seed",
        "1",
        "--change",
        "none",
        "--abx",
        "none",
        "--figure",
        "none",
    ]
    assert main(command) == 2 and "--alignment" in capsys.readouterr().err
    tables = [str(mini_root() / f"alignments.{split}.tsv") for split in ("train", "dev")]
    assert main([*command, "--alignment", *tables]) == 2 and "4 utterances have no alignment" in capsys.readouterr().err
    tables.append(str(mini_root() / "alignments.test.tsv"))
    assert main([*command, "--alignment", *tables]) == 0
    (record,) = read_analyses([tmp_path / "runs"])
    assert not list(tmp_path.rglob("*.png")) and not Path("none").exists()
    assert any(each.startswith("test has 2 speaker(s)") for each in record.warnings)
    purity = [each for each in record.measurements if each.measure == "phone_purity" and each.ci95]
    assert purity and all(0 <= low <= high <= 1 for low, high in (each.ci95 for each in purity if each.ci95))
    assert record.data.dataset == f"manifest:{tmp_path.name}" and record.data.num_utterances == {
        "train": 4,
        "dev": 4,
        "test": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["units", "--change", "echo"], "noise20"),
        (["units", "--clusters", "1"], "two or more"),
        (["units", "--limit", "0"], "one or more"),
        (["cca", "--target", "colour"], "resemblyzer"),
        (["units", "--manifest", "train=x.tsv"], "missing dev, test"),
    ],
)
def test_wrong_requests_are_told(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "analyze",
        arguments[0],
        *SMALL[:6],
        "--out",
        str(tmp_path),
        "--figure",
        str(tmp_path / "f.png"),
        *arguments[1:],
    ]
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_speaker_embeddings_stand_in_the_order_of_the_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, whose vectors are the length of the audio: whose they are shows."""

    class VoiceEncoder:
        def __init__(self, device: str, verbose: bool) -> None:
            assert device == "cpu" and not verbose

        def embed_utterance(self, wav: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.array([len(wav), 1.0], dtype=np.float32)

    package = ModuleType("resemblyzer")
    package.__dict__.update(VoiceEncoder=VoiceEncoder, preprocess_wav=lambda wav, source_sr: wav[: len(wav) // 2])
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    corpus = load_corpus(limit=3)
    (target,) = load_targets(corpus, CcaRequest(targets=("resemblyzer",)))
    utterances = [each for manifest in corpus.splits.values() for each in manifest]
    assert target.ids == tuple(each.id for each in utterances) and target.y.shape == (9, 2)
    assert target.y[:, 0] == pytest.approx([each.duration_s * 8000 for each in utterances], abs=1)
    assert target.groups == tuple(each.labels["speaker"] for each in utterances)
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(RequestError, match=r"superb-probe\[speakers\]"):
        load_targets(corpus, CcaRequest(targets=("resemblyzer",)))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"train": ("a", "a", "a"), "test": ("b", "b", "b")}, ("single speaker", "or of two")),
        ({"train": ("a", "b", "c"), "test": ("", "", "")}, ("or of two",)),
        ({"train": ("a", "b", "c"), "test": ("a", "b", "c")}, ("or of two",)),
    ],
)
def test_speech_that_says_nothing_of_speakers_is_refused_before_extraction(
    labels: dict[str, tuple[str, ...]], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = []
    for split in ("train", "dev", "test"):
        manifest = Manifest.read(mini_root() / f"read.{split}.tsv")
        speakers = labels.get(split, labels["train"])
        three = [
            dataclasses.replace(each, labels={"speaker": speaker} if speaker else {"text": "x"})
            for each, speaker in zip(manifest[:3], speakers, strict=True)
        ]
        Manifest(three, mini_root(), split).write(tmp_path / f"{split}.tsv")
        manifests.append(f"{split}={tmp_path / split}.tsv")
    tables = [str(mini_root() / f"alignments.{split}.tsv") for split in ("train", "dev", "test")]
    command = ["analyze", "disentangle", "--upstream", "fbank", "--beside", "none", "--out", str(tmp_path / "runs")]
    command += ["--manifest", *manifests, "--root", str(mini_root()), "--alignment", *tables, "--figure", "none"]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert all(each in printed for each in said) and ("single speaker" in printed) == ("single speaker" in said)
    assert "extract" not in printed


def test_embeddings_from_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", a=np.ones(3), b=np.zeros(3))
    (tmp_path / "e.csv").write_text("id,x,y\na,1,2\nb,3,4\n")
    assert read_embeddings(tmp_path / "e.npz")["a"].tolist() == [1, 1, 1]
    assert read_embeddings(tmp_path / "e.csv")["b"].tolist() == [3, 4]
    (tmp_path / "e.csv").write_text("id,x,y\na,1,2\nb,3\n")
    with pytest.raises(RequestError, match="one length"):
        read_embeddings(tmp_path / "e.csv")
    with pytest.raises(RequestError, match="unknown form"):
        read_embeddings(tmp_path / "e.txt")


@pytest.fixture(scope="module")
def frames() -> Frames:
    corpus = load_corpus(limit=6)
    upstream = load_upstream("fbank")
    stores = extract(upstream, "fbank", {"test": corpus.splits["test"]}, None, torch.device("cpu"))
    return Frames(stores["test"], corpus.splits["test"], upstream, corpus.phones, corpus.phone_names)


def test_frames_are_the_states_of_their_utterances(frames: Frames) -> None:
    whole = frames.layer(0)
    assert len(whole) == len(frames.phones) == frames.num_frames.sum()
    chosen = frames.sample(50, seed=1)
    assert np.array_equal(frames.layer(0, chosen), whole[chosen])
    assert np.array_equal(chosen, frames.sample(50, seed=1)) and not np.array_equal(chosen, frames.sample(50, seed=2))
    assert set(frames.sample(None, 0, speech_only=True)) == set(np.flatnonzero(frames.speech))
    upstream = load_upstream("fbank")
    from superb_probe.downstreams.audio import read_waveform

    third = frames.manifest[2]
    states = upstream.extract([torch.from_numpy(read_waveform(third, frames.manifest.root))]).states[0, 0].numpy()
    assert np.abs(frames.split(whole)[2] - states).max() < 2e-2  # float16


def test_labels_lie_where_the_energy_is(frames: Frames) -> None:
    """Silence is quieter than speech: labels that are shifted or belong to another utterance would not be."""
    energy = frames.layer(0)[:, :80].mean(1)
    silent = ~frames.speech & (frames.phones >= 0)
    assert energy[frames.speech].mean() - energy[silent].mean() > 0.5
    shifted = np.roll(frames.speech, 60)
    assert energy[shifted].mean() - energy[~shifted].mean() < 0.5 * (
        energy[frames.speech].mean() - energy[silent].mean()
    )


def test_abx_items_are_triphones_without_silence(frames: Frames) -> None:
    items, places = abx_items(frames, "triphone")
    assert items and all("SIL" not in f"{each.phone} {each.context}".split() for each in items)
    row, start, end = places[0]
    name = frames.manifest.ids[row]
    at = next(at for at, each in enumerate(frames.segments[name]) if each.label == items[0].phone and at > 1)
    first, last = frames.segments[name][at - 1], frames.segments[name][at + 1]
    assert (
        abs(start * frames.hop_s - first.start_s) <= frames.hop_s
        and abs(end * frames.hop_s - last.end_s) <= frames.hop_s
    )
    alone, _ = abx_items(frames, "none")
    assert len(alone) > len(items) and {each.context for each in alone} == {""}


def test_limits_keep_trials_among_what_is_left() -> None:
    corpus = load_corpus(limit=30)
    assert all(
        a in corpus.splits["test"] and b in corpus.splits["test"]
        for a, b in zip(corpus.trials["test"].ids_a, corpus.trials["test"].ids_b, strict=True)
    )
    assert len(load_corpus().trials["test"]) == 1260


def test_a_trained_encoder_gets_a_random_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from superb_probe import analysis

    trained = load_upstream("mamba_hubert_causal", size="test", random=3)

    def resolve(name: str, **options: Any) -> Any:
        loaded = original(name, **options)
        if options["random"] == 3:  # stands for weights that were trained
            loaded.upstream.info = dataclasses.replace(trained.info, revision="sha256:0")
        return loaded

    original = analysis.resolve_upstream
    monkeypatch.setattr(analysis, "resolve_upstream", resolve)
    request = analysis.AnalysisRequest(("mamba_hubert_causal",), size="test", random=3)
    found = [(each.name, each.upstream.info.revision, each.upstream.info.dim) for each in analysis._upstreams(request)]
    assert found == [
        ("mamba_hubert_causal", "sha256:0", 48),
        ("mamba_hubert_causal", "random:0", 48),
        ("fbank", "analytic:1", 240),
    ]
