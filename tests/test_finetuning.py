"""`superb-probe finetune`: a tiny run, stopped and resumed, its folder, and the transcript `superb-probe stream` gives from it."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from superb_probe import cli
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.errors import RequestError
from superb_probe.finetuning import recogniser_of_folder
from superb_probe.results.overlap import training_overlap
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.load import load_upstream

MODEL = ("--upstream", "mamba_hubert_causal", "--size", "test", "--random", "0", "--head-width", "16")
BUDGET = ("--steps", "4", "--batch", "4", "--evaluate-every", "2", "--lr", "1e-2", "--frozen-share", "0.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--root and --manifest of eight utterances a split of mini."""
    folder, files = tmp_path_factory.mktemp("manifests"), []
    for split, manifest in read_splits(mini_root(), "read").items():
        manifest[:8].write(folder / f"{split}.tsv")
        files.append(f"{split}={folder / split}.tsv")
    return ["--root", str(mini_root()), "--manifest", *files]


def finetune(*words: str | Path) -> int:
    return cli.main(["finetune", *(str(word) for word in words)])


def test_a_run_its_folder_and_its_transcript(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = (
        *MODEL,
        *BUDGET,
        *data,
        "--out",
        out,
        "--test-context",
        "utterance",
        "document",
        "--document-column",
        "speaker",
        "--json",
    )
    assert finetune(*words) == 0
    document = json.loads(capsys.readouterr().out)
    assert [score["context"] for score in document["test"]] == ["utterance", "document"]
    assert [score["passages"] for score in document["test"]] == [8, 1]
    assert document["step"] in (2, 4)
    with (out / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["2", "4"] and [row["frozen"] for row in rows] == ["1", "0"]
    items = document["test"][0]["items"]
    assert (
        100 * sum(item["edits"] for item in items) / sum(item["words"] for item in items) == document["test"][0]["wer"]
    )

    fresh = load_upstream("mamba_hubert_causal", size="test", random=0)
    trained = read_checkpoint(out / "encoder.safetensors")
    name = "encoder.layers.0.mamba.in_proj.weight"
    same = bool((trained.tensors[name] == fresh.state_dict()[f"encoder.{name}"]).all())
    assert same == (document["step"] == 2)  # frozen in the first half
    assert trained.trained_on == ("fine-tuned: mini.train",)
    assert training_overlap(trained.trained_on, "mini", "asr").kind == "train"

    audio = mini_root() / read_splits(mini_root(), "read")["test"][0].audio
    assert cli.main(["stream", str(audio), "--finetuned", str(out), "--json"]) == 0
    streamed = json.loads(capsys.readouterr().out)
    assert " ".join(streamed["transcript"].split()) == items[0]["hypothesis"]


def test_a_stopped_run_goes_on_to_the_same_end(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(out: Path) -> dict[str, Any]:
        description = json.loads((out / "finetuned.json").read_text())
        return {name: description[name] for name in ("dev_wer", "step", "test")}

    words = (*MODEL, *BUDGET, *data)
    assert finetune(*words, "--out", tmp_path / "a") == 0
    assert finetune(*words, "--out", tmp_path / "b", "--time-limit", "0.0001") == 0
    assert "--resume goes on" in capsys.readouterr().err
    assert finetune(*words, "--out", tmp_path / "b") == 2
    assert "holds a run" in capsys.readouterr().err
    assert finetune(*words, "--out", tmp_path / "b", "--resume", "--seed", "2") == 2
    assert "differs in recipe" in capsys.readouterr().err
    assert finetune(*words, "--out", tmp_path / "b", "--resume") == 0
    assert ended(tmp_path / "a") == ended(tmp_path / "b")
    assert (tmp_path / "a" / "encoder.safetensors").read_bytes() == (
        tmp_path / "b" / "encoder.safetensors"
    ).read_bytes()


def test_documents_of_an_stm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "dev", "test"):
        for part in ("stm", "sph"):
            (tmp_path / split / part).mkdir(parents=True)
        (tmp_path / split / "stm" / "Talk.stm").write_text("Talk 1 Talk 0 0.8 <NA> a b\nTalk 1 Talk 0.9 2.0 <NA> c\n")
        noise = 0.1 * np.random.default_rng(0).standard_normal(32_000)
        soundfile.write(tmp_path / split / "sph" / "Talk.sph", noise, 16_000, format="NIST", subtype="PCM_16")
    words = (
        *MODEL,
        *BUDGET,
        "--stm",
        tmp_path,
        "--context",
        "document",
        "--out",
        tmp_path / "run",
        "--json",
        "--head",
        "conv",
    )
    assert finetune(*words, "--head-layers", "2", "--recompute", "--test-context", "utterance", "document") == 0
    document = json.loads(capsys.readouterr().out)
    by_segment, by_talk = document["test"]
    (item,) = by_talk["items"]
    assert item["reference"] == "A B C" and item["seconds"] == 2.0
    assert [each["seconds"] for each in by_segment["items"]] == [0.8, 1.1]
    assert [each["from_s"] for each in by_segment["by_length"]] == [0.5, 1.0]
    with pytest.raises(RequestError, match="cannot stream"):
        recogniser_of_folder(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "one of --manifest, --stm and --mini"),
        (("--mini", "--stm", "x"), "one of --manifest, --stm and --mini"),
        (("--manifest", "train=a.tsv"), "expected train=, dev= and test="),
        (("--mini", "--context", "document"), "which document is it of"),
        (("--mini", "--resume"), "holds no run"),
        (("--mini", "--steps", "0"), "steps is 0"),
        (("--stm", "x"), "no stm/*.stm"),
    ],
)
def test_wrong_requests(words: tuple[str, ...], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(*MODEL, *words, "--out", tmp_path / "run") == 2
    assert what in capsys.readouterr().err


def test_other_encoders_and_characters_are_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--upstream", "fbank", *data, "--out", tmp_path / "run") == 2
    assert "no HuBERT of this project" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no finetuned.json"):
        recogniser_of_folder(tmp_path)


def test_the_grid_of_comparisons_asks_for_equal_budgets(load_tool: Callable[[str], Any], tmp_path: Path) -> None:
    """Cells differ in what they compare and in nothing else; an update of documents holds as much audio as one of utterances."""
    grid = load_tool("finetune_grid")
    manifests = grid.mini_manifests()
    assert {row.labels["speaker"] for row in manifests["train"]}.isdisjoint(manifests["test"].labels("speaker"))
    args = argparse.Namespace(
        plan="length", document_column=None, manifest=None, batch=16, steps=100, lr=1e-3, precision="float32", size="test",
        head_width=8, frozen_share=None, device="cpu", random=False, part_seconds=200.0,
        head=None, augment=True,
    )  # fmt: skip
    asked = {
        name: grid.request(args, cell, manifests, None, 1, tmp_path) for name, cell in grid.CELLS["length"].items()
    }
    for family in ("mamba", "transformer"):
        short, whole = asked[f"{family}, utterance"].recipe, asked[f"{family}, document"].recipe
        documents = len({row.labels["speaker"] for row in manifests["train"]})
        assert whole.batch * len(manifests["train"]) / documents == pytest.approx(short.batch, rel=0.02)
        assert (short.steps, short.lr, short.seed) == (whole.steps, whole.lr, whole.seed)
    args.plan = "causal"
    trained = grid.request(args, grid.CELLS["causal"]["mamba, strict"], manifests, None, 1, tmp_path)
    assert (trained.size, trained.random, trained.recipe.frozen_share) == (None, None, 0.1)  # the shipped weights
    args.random = True
    scratch = grid.request(args, grid.CELLS["causal"]["mamba, strict"], manifests, None, 7, tmp_path)
    assert (scratch.size, scratch.random, scratch.recipe.frozen_share) == ("test", 7, 0.0)
    for name, cell in grid.CELLS["causal"].items():
        encoder = load_upstream(cell["upstream"], size="test", random=0, **cell["upstream_options"])
        assert (encoder.info.lookahead_samples == 0) == ("strict" in name)


def test_the_grid_compares_families_and_contexts_seed_by_seed(load_tool: Callable[[str], Any]) -> None:
    grid = load_tool("finetune_grid")
    scores = {
        ("mamba, utterance", "document"): [80.0, 82.0],
        ("mamba, document", "document"): [78.0, 81.0],
        ("transformer, utterance", "document"): [90.0, 95.0],
    }
    rows = {(row["cell"], row["test by"]): row["each"] for row in grid.differences(scores)}
    assert rows == {
        ("mamba less transformer, utterance", "document"): "-10.00 -13.00",
        ("mamba, document less utterance", "document"): "-2.00 -1.00",
    }


def test_the_grid_gathers_every_seed_by_length(load_tool: Callable[[str], Any]) -> None:
    def run(short: float, long: float) -> dict[str, Any]:
        parts = [{"from_s": 2.0, "to_s": 4.0, "wer": short}], [{"from_s": 16.0, "to_s": 32.0, "wer": long}]
        return {"test": [{"by_length": part} for part in reversed(parts)]}

    found = load_tool("finetune_grid").against_length("mamba", [run(50.0, 60.0), run(52.0, 66.0)])
    assert list(found.items()) == [(("mamba", 2.0, 4.0), [50.0, 52.0]), (("mamba", 16.0, 32.0), [60.0, 66.0])]
