"""The conformance report passes on the fixtures and fails on every small change of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from superb_probe.conformance import Case, ConformanceReport, main_conformance, run_conformance
from superb_probe.errors import RequestError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def fixtures(shared: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies some of the fixtures into a folder of their own, beside the audio they name."""

    def copy(*names: str) -> Path:
        folder = tmp_path / "fixtures"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shared / "fixtures" / name, folder / name)
        return folder

    return copy


def change(path: Path, edit: Callable[[Arrays], Any]) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    edit(arrays)
    np.savez(path, **arrays)


def only(report: ConformanceReport) -> Case:
    assert len(report.cases) == 1
    assert report.passed == report.cases[0].passed
    return report.cases[0]


def failure(folder: Path, name: str | None = None) -> str:
    report = run_conformance(folder)
    failed = [case for case in report.cases if not case.passed]
    assert len(failed) == 1 and not report.passed
    assert name is None or failed[0].name == name
    assert failed[0].reason
    return failed[0].reason


def test_all_fixtures_pass(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_conformance(shared / "fixtures", as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and set(report) == {"passed", "cases"}
    kinds = [case["kind"] for case in report["cases"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "upstream": 9,
        "probe": 10,
        "training": 10,
        "sox": 1,
        "metric": 6,
    }
    names = {case["name"] for case in report["cases"]}
    assert {"mamba_hubert_causal.fairseq", "xvector_amsoftmax.plain", "metrics.eer", "sox_effects"} <= names
    for case in report["cases"]:
        assert case["passed"] and case["error"] <= case["bound"] and case["detail"], case
    worst = {kind: max(case["error"] for case in report["cases"] if case["kind"] == kind) for kind in kinds}
    assert worst["upstream"] < 1e-5 and worst["probe"] < 1e-5 and worst["training"] < 5e-5


@pytest.mark.parametrize("tensor", ["encoder.layers.0", "feature_extractor.conv_layers.0.0.weight", "encoder.pos_conv"])
def test_a_changed_weight_of_an_upstream_fails(fixtures: Callable[..., Path], tensor: str) -> None:
    folder = fixtures("upstreams/mamba_hubert_causal.pt", "upstreams/mamba_hubert_causal.npz")
    assert only(run_conformance(folder)).passed
    path = folder / "upstreams/mamba_hubert_causal.pt"
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["model_weight"] if name.startswith(tensor) and "weight" in name)
    values = content["model_weight"][name].view(-1)
    values[len(values) // 2] += 1.0  # the middle: the ends of the positional kernel lie outside these short utterances
    torch.save(content, path)
    assert "over the bound" in failure(folder, "mamba_hubert_causal")


def test_a_changed_state_fails_only_where_it_is(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("upstreams/transformer_hubert_prenorm.pt", "upstreams/transformer_hubert_prenorm.npz")

    def edit(arrays: Arrays) -> None:
        layer = arrays["utt1/layer01"]
        layer += 1.5e-4 * np.linalg.norm(layer) / np.sqrt(layer.size)

    change(folder / "upstreams/transformer_hubert_prenorm.npz", edit)
    assert failure(folder).startswith("utt1/layer01: error 1.5")


def test_a_name_says_nothing_about_an_upstream(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("upstreams/mamba_mlp_hubert.pt", "upstreams/mamba_mlp_hubert.npz")
    for suffix in (".pt", ".npz"):
        (folder / f"upstreams/mamba_mlp_hubert{suffix}").rename(folder / f"upstreams/transformer_hubert{suffix}")
    assert only(run_conformance(folder)).passed


PROBES = ["utterance_linear", "phoneme_ctc", "asr_blstm_ctc", "diarization_lstm_pit", "xvector_amsoftmax"]


@pytest.mark.parametrize("head", PROBES)
def test_every_expected_value_of_a_probe_is_measured(fixtures: Callable[..., Path], head: str) -> None:
    folder = fixtures(f"probes/{head}.plain.npz")
    path = folder / f"probes/{head}.plain.npz"
    original = path.read_bytes()
    case = only(run_conformance(folder))
    assert case.passed and {"loss", "weights_grad"} < set(case.detail)
    for quantity in case.detail:
        bound = {"weights_grad": 5e-5, "der": 1e-9}.get(quantity, 1e-5)

        def edit(arrays: Arrays, quantity: str = quantity, bound: float = bound) -> None:
            arrays[quantity] = arrays[quantity] * (1 + 3 * bound)

        change(path, edit)
        assert failure(folder).startswith(f"{quantity}: error")
        path.write_bytes(original)


@pytest.mark.parametrize("head", PROBES)
def test_every_weight_of_a_probe_matters(fixtures: Callable[..., Path], head: str) -> None:
    folder = fixtures(f"probes/{head}.normalized.npz")
    path = folder / f"probes/{head}.normalized.npz"
    original = path.read_bytes()
    with np.load(path) as file:
        weights = [
            name
            for name in file.files
            if name.startswith(("projector", "connector", "model", "objective", "featurizer"))
        ]
    for weight in weights:

        def edit(arrays: Arrays, weight: str = weight) -> None:
            # not the same for all: the softmax of the layer weights would hide that
            arrays[weight] = arrays[weight] + np.linspace(0.5, 1.5, arrays[weight].size, dtype=np.float32).reshape(
                arrays[weight].shape
            )

        change(path, edit)
        assert "over the bound" in failure(folder), weight
        path.write_bytes(original)


def test_plain_and_normalized_are_told_apart(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("probes/phoneme_ctc.plain.npz")
    (folder / "probes/phoneme_ctc.plain.npz").rename(folder / "probes/phoneme_ctc.normalized.npz")
    assert "over the bound" in failure(folder)


def broken_nan(arrays: Arrays) -> None:
    arrays["logits"][0, 0] = np.nan


def broken_hidden(arrays: Arrays) -> None:
    arrays["hidden_states"][0, 0, 0, 0] = np.inf


def broken_shape(arrays: Arrays) -> None:
    arrays["logits"] = arrays["logits"][:, :-1]


def broken_missing(arrays: Arrays) -> None:
    del arrays["loss"]


def broken_weight_missing(arrays: Arrays) -> None:
    del arrays["projector.bias"]


def broken_weight_shape(arrays: Arrays) -> None:
    arrays["projector.bias"] = arrays["projector.bias"][:-1]


def broken_foreign(arrays: Arrays) -> None:
    arrays["model.adapter.weight"] = np.zeros((2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (broken_nan, "not finite"),
        (broken_hidden, "not finite"),
        (broken_shape, "logits: shape (3, 7) measured, (3, 6) expected"),
        (broken_missing, "missing in the file: loss"),
        (broken_weight_missing, "projector.bias"),
        (broken_weight_shape, "projector.bias"),
        (broken_foreign, "adapter.weight"),
    ],
)
def test_a_broken_probe_file_says_why(
    fixtures: Callable[..., Path], edit: Callable[[Arrays], None], reason: str
) -> None:
    folder = fixtures("probes/utterance_linear.plain.npz")
    change(folder / "probes/utterance_linear.plain.npz", edit)
    assert reason in failure(folder)


@pytest.mark.parametrize("part", ["upstreams/mamba_hubert.pt", "upstreams/mamba_hubert.npz"])
def test_a_truncated_or_missing_half_of_a_pair_fails(fixtures: Callable[..., Path], part: str) -> None:
    folder = fixtures("upstreams/mamba_hubert.pt", "upstreams/mamba_hubert.npz")
    path = folder / part
    path.write_bytes(path.read_bytes()[:5000])
    assert only(run_conformance(folder)).error is None
    assert failure(folder)
    path.unlink()
    assert "beside it" in failure(folder)


def test_a_truncated_archive_and_text_for_an_archive_fail(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("probes/phoneme_ctc.plain.npz", "probes/metrics.json")
    path = folder / "probes/phoneme_ctc.plain.npz"
    for content in (path.read_bytes()[:3000], b"hello", b""):
        path.write_bytes(content)
        assert failure(folder, "phoneme_ctc.plain")


def training_loss(arrays: Arrays) -> None:
    arrays["loss"][31] *= 1.0003


def training_final(arrays: Arrays) -> None:
    arrays["final/projector.weight"] *= 1.0003


def training_layers(arrays: Arrays) -> None:
    arrays["final/featurizer.weights"] *= 1.0003


def training_start(arrays: Arrays) -> None:
    arrays["initial/model.post_net.linear.bias"][0] += 1e-2


def training_order(arrays: Arrays) -> None:
    arrays["batches"] = arrays["batches"][::-1]


def training_rate(arrays: Arrays) -> None:
    arrays["lr"] = arrays["lr"] * 1.01


def training_accumulate(arrays: Arrays) -> None:
    arrays["accumulate"] = np.array(2)


def training_clip(arrays: Arrays) -> None:
    arrays["clip"] = np.array(1e-3)


def training_lost_weight(arrays: Arrays) -> None:
    del arrays["final/projector.bias"]


TRAINING_MUTANTS = {
    training_loss: "loss: error",
    training_final: "final/projector.weight: error",
    training_layers: "final/featurizer.weights: error",
    training_start: "over the bound",
    training_order: "over the bound",
    training_rate: "over the bound",
    training_accumulate: "batches (50, 3)",
    training_clip: "over the bound",
    training_lost_weight: "without a partner: ['final/projector.bias']",
}


def test_every_part_of_a_training_run_is_measured(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("training/utterance_linear.plain.npz")
    path = folder / "training/utterance_linear.plain.npz"
    original = path.read_bytes()
    assert only(run_conformance(folder)).passed
    for edit, reason in TRAINING_MUTANTS.items():
        change(path, edit)
        assert reason in failure(folder), edit.__name__
        path.write_bytes(original)


def test_the_optimizer_is_the_file_s(fixtures: Callable[..., Path]) -> None:
    folder = fixtures("training/xvector_amsoftmax.plain.npz")
    change(folder / "training/xvector_amsoftmax.plain.npz", lambda arrays: arrays.update(optimizer=np.array("Adam")))
    assert "over the bound" in failure(folder)


def test_sox_is_measured_and_needs_its_audio(fixtures: Callable[..., Path], shared: Path) -> None:
    folder = fixtures("sox/sox_effects.npz")
    path = folder / "sox/sox_effects.npz"
    change(path, lambda arrays: [arrays.pop(name) for name in list(arrays) if not name.startswith("06/")])
    assert "no audio" in failure(folder, "sox_effects")
    (folder.parent / "data").symlink_to(shared / "data")
    assert only(run_conformance(folder)).passed
    original = path.read_bytes()

    def louder(arrays: Arrays) -> None:
        arrays["06/gain"][100] += 2e-4

    def longer(arrays: Arrays) -> None:
        arrays["06/gain_silence"] = np.append(arrays["06/gain_silence"], np.float32(0))

    def outside(arrays: Arrays) -> None:
        arrays["06/path"] = np.array("../secret.flac")

    for edit, reason in (
        (louder, "06/gain: error 2.00e-04"),
        (longer, "06/gain_silence: shape"),
        (outside, "leads out"),
    ):
        change(path, edit)
        assert reason in failure(folder)
        path.write_bytes(original)


METRICS = ("eer", "wer", "cer", "slot_type_f1", "slot_value_cer", "slot_value_wer")


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_measured(fixtures: Callable[..., Path], metric: str) -> None:
    folder = fixtures("probes/metrics.json")
    path = folder / "probes/metrics.json"
    report = run_conformance(folder)
    assert report.passed and [case.name for case in report.cases] == [f"metrics.{name}" for name in METRICS]
    content = json.loads(path.read_text())
    group = next(group for group in content.values() if metric in group)
    group[metric] += 3e-9
    path.write_text(json.dumps(content))
    assert "over the bound" in failure(folder, f"metrics.{metric}")
    group[metric] = float("nan")
    path.write_text(json.dumps(content))
    assert "not finite" in failure(folder, f"metrics.{metric}")
    del group[metric]
    path.write_text(json.dumps(content))
    assert "missing" in failure(folder, f"metrics.{metric}")


def test_unreadable_metrics_fail(tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "metrics.json").write_text("{")
    report = run_conformance(tmp_path)
    assert not report.passed and all("JSONDecodeError" in case.reason for case in report.cases)


@pytest.mark.parametrize("parts", [(), ("upstreams",), ("upstreams", "probes", "training", "sox")])
def test_an_empty_folder_fails(tmp_path: Path, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for part in parts:
        (tmp_path / part).mkdir()
    assert main_conformance(tmp_path, as_json=False) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main_conformance(tmp_path, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_a_folder_that_is_not_there_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no folder"):
        run_conformance(tmp_path / "nothing")


def test_the_table_says_what_failed_and_what_was_absent() -> None:
    bad = Case("x", "probe", 2e-3, 1e-5, False, {"loss": 2e-3}, "loss: error 2.00e-03 over the bound 1e-05")
    table = ConformanceReport(False, (bad,), ("sox",)).format_table()
    assert "FAILED: loss: error" in table and "absent from the folder: sox" in table and "1 failed" in table
