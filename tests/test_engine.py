from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from superb_probe import engine_places, engine_record, engine_request, engine_subset, engine_walk
from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Trials, Utterance
from superb_probe.engine import run
from superb_probe.engine_walk import dev_values
from superb_probe.errors import RequestError
from superb_probe.results.record import RunRecord, read_items, read_records, record_path
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo

TASK = "synthetic_sid"


class Spectrum(Upstream):
    """Two layers of 40 fixed projections of the magnitude spectrum of 20 ms."""

    def __init__(self, name: str = "spectrum") -> None:
        super().__init__()
        weight = torch.randn(2, 161, 40, generator=torch.Generator().manual_seed(0)) / 12
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.calls = 0
        self.info = UpstreamInfo(name, "sha256:0", 2, 40, 16000, 320, "none", 0, "block_output", (), "CC0", "none")

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 320

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        self.calls += wavs.shape[0]
        frames = wavs[:, : wavs.shape[1] // 320 * 320].unflatten(1, (-1, 320))
        states = torch.einsum("bts,lsd->lbtd", torch.fft.rfft(frames).abs().clamp(min=1e-3).log(), self.weight)
        num_frames = num_samples // 320
        valid = torch.arange(states.shape[2]) < num_frames[:, None]
        return LayerStates(states * valid[..., None], num_frames)


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., list[RunRecord]]:
    """`run` with a fast encoder, one task and a folder of its own."""

    def call(upstream: Any = None, task: Any = TASK, **options: Any) -> list[RunRecord]:
        return run(upstream or Spectrum(), task, **{"out": tmp_path / "runs", "lr": [0.01], **options})

    return call


def outcome(record: RunRecord) -> dict[str, Any]:
    """What of a record must be equal when the same trial is run again."""
    values = record.to_dict()
    for name in ("cost", "environment", "started_at", "finished_at"):
        del values[name]
    return values


def write_manifests(folder: Path, seconds: float = 0.6, **changes: Any) -> dict[str, Path]:
    """Manifests of two hums a split for the task of synthetic speakers."""
    generator = np.random.default_rng(3)
    paths = {}
    for split in ("train", "dev", "test"):
        made = []
        for number in range(6):
            name = f"{split}{number}"
            wav = np.sin(np.arange(int(seconds * 16000)) * (0.05 + 0.1 * (number % 2))) * 0.3
            soundfile.write(
                folder / f"{name}.wav", wav + 0.05 * generator.normal(size=wav.size), 16000, subtype="PCM_16"
            )
            made.append(Utterance(name, f"{name}.wav", 0.0, wav.size / 16000, {"speaker": f"s{number % 2}"}))
        made = changes.get(split, lambda utterances: utterances)(made)
        Manifest(made, folder, split).write(folder / f"{split}.tsv")
        paths[split] = folder / f"{split}.tsv"
    return paths


def test_a_run_ends_in_records_with_everything_beside_them(go: Any, tmp_path: Path) -> None:
    records = go(lr=[0.03, 0.003], seed=[1, 2])
    assert [(r.probe.seed, r.probe.lr) for r in records] == [(1, 0.03), (1, 0.003), (2, 0.03), (2, 0.003)]
    assert sorted(read_records(tmp_path / "runs"), key=lambda r: r.run_id) == sorted(records, key=lambda r: r.run_id)
    for record in records:
        assert record.status == "finished" and record.score is not None and record.selection is not None
        assert record.score.ci95 is not None and record.score.ci95[0] <= record.score.value <= record.score.ci95[1]
        assert record.selection.split == "dev" and record.task.num_items["test"] == 64
        assert record.layer_weights is not None and abs(sum(record.layer_weights) - 1) < 1e-5
        assert record.cost.peak_memory_bytes and record.cost.store_bytes and record.environment.deterministic
        path = record_path(tmp_path / "runs", TASK, "spectrum", record.run_id)
        items = read_items(path)
        assert np.mean([int(each) for each in items["correct"]]) * 100 == pytest.approx(record.score.value)
        assert record.probe_weights is not None and path.with_name(record.probe_weights.file).is_file()
    assert max(record.score.value for record in records if record.score) > 50  # chance is 12.5


def test_probe_weights_beside_a_record_are_the_ones_it_names(go: Any, tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load_file

    (record,) = go()
    path = record_path(tmp_path / "runs", TASK, "spectrum", record.run_id).with_suffix(".safetensors")
    assert record.probe_weights is not None
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record.probe_weights.sha256
    tensors = load_file(path)
    assert sum(tensor.numel() for tensor in tensors.values()) == record.probe.trainable_params
    assert tensors["weighted_sum.weights"].softmax(0).tolist() == pytest.approx(list(record.layer_weights or ()))


def test_running_twice_is_running_once(go: Any) -> None:
    upstream = Spectrum()
    first = go(upstream)
    calls = upstream.calls
    assert calls == 176  # every utterance once
    assert go(upstream) == first and upstream.calls == calls
    again = go(upstream, overwrite="always")
    assert upstream.calls == 2 * calls and list(map(outcome, again)) == list(map(outcome, first))


def test_every_cause_makes_another_run(go: Any, tmp_path: Path) -> None:
    changed = Spectrum()
    changed.weight.data[0, 0, 0] += 1e-3
    few: dict[str, Any] = {"limit": 40, "lr": [0.01]}
    variants: list[list[RunRecord]] = [
        go(**few),
        go(changed, **few),
        go(**few, seed=[2]),
        go(limit=40, lr=[0.02]),
        go(**few, layer=1),
        go(**few, layer_norm=True),
        go(**few, budget="full"),
        go(**few, control="shuffle"),
        go(limit=39),
    ]
    ids = [record.run_id for records in variants for record in records]
    assert len(set(ids)) == len(ids) == 9
    limited = variants[-1][0]
    assert limited.task.protocol_deviations == ("only the first 39 utterances of each split",)
    assert limited.task.num_items["train"] == 39 and variants[-2][0].probe.control == "shuffle"


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(lr=[0.1, 0.01, 0.001], out=tmp_path / "whole")
    written: list[str] = []
    real = engine_walk.write

    def dying(record: RunRecord, *rest: Any) -> RunRecord:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(record.run_id)
        return real(record, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine_walk, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            go(lr=[0.1, 0.01, 0.001], out=tmp_path / "broken")
    assert len(read_records(tmp_path / "broken")) == 2
    trained: list[float] = []
    fit = engine_walk.fit_trials
    monkeypatch.setattr(
        engine_walk, "fit_trials", lambda trials, *a, **k: trained.extend(t.lr for t in trials) or fit(trials, *a, **k)
    )
    resumed = go(lr=[0.1, 0.01, 0.001], out=tmp_path / "broken")
    assert len(trained) == 1  # only what was missing
    for one, other in zip(map(outcome, resumed), map(outcome, whole), strict=True):  # alone and in company: to rounding
        assert one.pop("layer_weights") == pytest.approx(other.pop("layer_weights"), rel=1e-5)
        for values in (one, other):
            values.pop("probe_weights")
            values["selection"].pop("curve")
        assert one == other


def test_a_failed_trial_has_a_record_and_is_run_again_only_when_asked(go: Any) -> None:
    failed, finished = go(lr=[1e30, 0.01])
    assert failed.status == "failed" and "diverged" in (failed.error or "") and failed.score is None
    assert finished.status == "finished"
    upstream = Spectrum()
    assert go(upstream, lr=[1e30, 0.01]) == [failed, finished] and upstream.calls == 0
    again = go(upstream, lr=[1e30, 0.01], overwrite="failed")
    assert upstream.calls == 176 and again[0].started_at >= failed.started_at and again[1] == finished


def test_states_that_are_not_finite_fail_all_trials_and_later_jobs_still_run(go: Any) -> None:
    broken = Spectrum("broken")
    broken.weight.data[:] = float("inf")
    records = go([broken, Spectrum()], lr=[0.1, 0.01])
    assert [record.status for record in records] == ["failed", "failed", "finished", "finished"]
    assert "utterance" in (records[0].error or "") and "not finite" in (records[0].error or "")


def test_a_defect_is_recorded_and_raised(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(engine_walk, "fit_trials", broken)
    with pytest.raises(ZeroDivisionError):
        go()
    (record,) = read_records(tmp_path / "runs")
    assert record.status == "failed" and record.error == "ZeroDivisionError: oops"


def test_the_grid_of_the_protocol_grows_only_when_no_rate_is_given(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(TASK)
    task.info = dataclasses.replace(  # type: ignore[misc]
        task.info, protocols={"strict": dataclasses.replace(task.info.protocols["strict"], lr_grid=(1e-5, 1e-6))}
    )
    monkeypatch.setattr(engine_request, "load_task", lambda name: task)
    grown = go(lr=None)
    rates = sorted({record.probe.lr for record in grown})
    assert rates[:2] == [1e-6, 1e-5] and max(rates) >= 1e-4  # towards where it learns, decade by decade
    assert all(b == pytest.approx(10 * a) for a, b in itertools.pairwise(rates))
    values = dev_values(grown)
    assert max(rates) > max(rates, key=lambda rate: (values[rate], -rate)) or max(rates) == 10  # type: ignore[type-var]
    assert {record.probe.lr for record in go(lr=[1e-5, 1e-6])} == {1e-5, 1e-6}
    assert {record.probe.lr for record in go(lr=None, control="shuffle")} == {1e-5, 1e-6}


def test_one_upstream_is_extracted_once_for_tasks_that_read_the_same(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {name: load_task(TASK) for name in ("one", "two")}
    for name, task in tasks.items():
        task.info = dataclasses.replace(task.info, name=name)  # type: ignore[misc]
    monkeypatch.setattr(engine_request, "load_task", tasks.__getitem__)
    upstream = Spectrum()
    records = go(upstream, ["one", "two"])
    assert [record.task.name for record in records] == ["one", "two"] and upstream.calls == 176


def test_a_store_on_disk_gives_the_same_numbers_and_is_read_by_the_next_run(go: Any, tmp_path: Path) -> None:
    in_memory = go(out=tmp_path / "a")
    upstream = Spectrum()
    on_disk = go(upstream, out=tmp_path / "b", store=tmp_path / "store")
    assert upstream.calls == 176
    assert (
        go(upstream, out=tmp_path / "c", store=tmp_path / "store")[0].score == on_disk[0].score
        and upstream.calls == 176
    )
    assert list(map(outcome, in_memory)) == list(map(outcome, on_disk))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    go: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(lr=None, seed=[1, 2], dry_run=True, store=tmp_path / "store") == []
    text = capsys.readouterr().out
    assert "spectrum on synthetic_sid (synthetic, strict, small): 6 trials" in text and "176 utterances" in text
    assert "176 extractions" in text and "decode and encode" in text and text.rstrip().endswith("minutes")
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "store").glob("*"))
    go(store=tmp_path / "store")
    capsys.readouterr()
    go(seed=[1, 2], dry_run=True, store=tmp_path / "store")
    text = capsys.readouterr().out
    assert "2 trials, 1 finished before; 0 extractions" in text  # the states are there


def test_all_that_is_wrong_is_told_at_once_before_anything_is_extracted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError) as caught:
        run(
            ["no_such_upstream", "fbank"], ["no_such_task", TASK], lr=[-1.0], seed=[], limit=0, checkpoint=Path("x.pt"),
            device="cuda:99", out=tmp_path / "file" / "runs", protocol="superb", control="noise",
            states="cloud", store_limit="5GB",  # type: ignore[arg-type]
        )  # fmt: skip
    text = str(caught.value)
    for part in (
        "no_such_upstream", "no_such_task", "--lr -1.0", "--seed", "--limit 0", "--checkpoint goes with one", "cuda:99",
        "cannot be written", "no protocol 'superb'", "--control noise", "--states cloud", "--store-limit and --store-clean",
    ):  # fmt: skip
        assert part in text, part


def test_utterances_too_short_for_the_encoder_are_all_named_first(go: Any, tmp_path: Path) -> None:
    def shortened(utterances: list[Utterance]) -> list[Utterance]:
        return [dataclasses.replace(u, duration_s=0.015) if k in (1, 4) else u for k, u in enumerate(utterances)]

    paths = write_manifests(tmp_path, train=shortened, test=shortened)
    upstream = Spectrum()
    with pytest.raises(RequestError) as caught:
        go(upstream, manifest=paths)
    text = str(caught.value)
    assert "4 problems" in text and all(name in text for name in ("train1", "train4", "test1", "test4"))
    assert "less than one frame" in text and upstream.calls == 0


def test_own_data_comes_in_through_manifests(go: Any, tmp_path: Path) -> None:
    (record,) = go(manifest=write_manifests(tmp_path), lr=[0.1])
    assert record.task.dataset == f"manifest:{tmp_path.name}" and record.probe.budget == "small"
    assert set(record.task.data) == {"train", "dev", "test", "all"}
    wav, rate = soundfile.read(tmp_path / "train0.wav")
    soundfile.write(tmp_path / "train0.wav", wav * 0.9, rate, subtype="PCM_16")
    (other,) = go(manifest={split: tmp_path / f"{split}.tsv" for split in ("train", "dev", "test")}, lr=[0.1])
    assert other.run_id != record.run_id
    changed = {name for name, digest in other.task.data.items() if digest != record.task.data[name]}
    assert changed == {"all"}  # the audio changed, not the manifest


def test_steps_of_ones_own_are_a_budget_of_their_own(go: Any, tmp_path: Path) -> None:
    own = write_manifests(tmp_path)
    (usual,), (short,) = go(manifest=own, lr=[0.1]), go(manifest=own, lr=[0.1], steps=7)
    assert short.probe.steps == 7 and short.probe.budget == "small:7" and short.run_id != usual.run_id
    assert short.selection is not None and short.selection.step <= 7
    with pytest.raises(RequestError, match="--steps 0"):
        go(manifest=own, lr=[0.1], steps=0)


def test_a_corpus_that_does_not_serve_the_task_is_told(go: Any) -> None:
    with pytest.raises(RequestError, match="librispeech: none serves.*--manifest"):
        go(data={"librispeech": Path("/corpora")})


def test_a_missing_layer_head_or_gpu_is_told(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        ({"layer": 2}, "layers 0 to 1"),
        ({"head": "xvector"}, "no such head"),
        ({"device": "cuda"}, "0 usable GPUs"),
        ({"device": "tpu"}, "unknown device"),
        ({"budget": "huge"}, "no budget 'huge'"),
        ({"size": "tiny"}, "is an Upstream already"),
    ):
        with pytest.raises(RequestError, match=message):
            go(**options)


def test_states_larger_than_memory_are_encoded_on_the_fly_and_give_the_same_numbers(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"limit": 20, "steps": 10, "lr": [0.1, 0.01]}
    kept = go(out=tmp_path / "kept", **few)
    for module in (engine_places.measure_room.__globals__, vars(engine_places)):
        monkeypatch.setitem(module, "free_memory_bytes", lambda: 1000)
    upstream = Spectrum()
    streamed = go(upstream, out=tmp_path / "streamed", **few)
    assert "states in stream" in capsys.readouterr().err
    assert [r.run_id for r in streamed] == [r.run_id for r in kept]
    for a, b in zip(kept, streamed, strict=True):
        assert a.score is not None and b.score is not None and a.selection is not None and b.selection is not None
        assert b.score.value == a.score.value and b.selection.value == pytest.approx(a.selection.value)
    assert streamed[0].cost.store_bytes == 0 and (streamed[0].cost.encoder_passes or 0) > 1
    upstream.calls = 0
    with pytest.raises(RequestError, match="--states memory: .* are more than 60% of"):
        go(upstream, states="memory", out=tmp_path / "none")
    with pytest.raises(RequestError, match="--states disk: no --store DIR"):
        go(upstream, states="disk", out=tmp_path / "none")
    assert upstream.calls == 0


def test_random_weights_are_said_in_the_record_and_aloud(go: Any, capsys: pytest.CaptureFixture[str]) -> None:
    upstream = Spectrum()
    upstream.info = dataclasses.replace(upstream.info, revision="random:0")
    (record,) = go(upstream)
    assert any("random weights" in text for text in record.warnings) and record.random_weights
    assert capsys.readouterr().err.count("random weights") == 1
    go([upstream, upstream], lr=[0.02])
    assert capsys.readouterr().err.count("random weights") == 1


def test_a_limit_keeps_the_trials_among_what_it_keeps() -> None:
    utterances = [Utterance(f"u{k}", "a.wav", float(k), 1.0, {"speaker": f"s{k // 2}"}) for k in range(6)]
    manifest = Manifest(utterances, Path("."), "test")
    trials = Trials.of([1, 0, 1, 0], ["u0", "u0", "u4", "u1"], ["u1", "u2", "u5", "u5"])
    fold = Fold(None, {"test": manifest}, {"test": trials})
    small = engine_subset.limited(fold, 3)
    assert small.manifests["test"].ids == ("u0", "u1", "u2") and small.trials["test"].ids_b == ("u1", "u2")
    with pytest.raises(RequestError, match="larger limit"):
        engine_subset.limited(fold, 2)


def test_clusters_of_trials_widen_the_interval() -> None:
    task = load_task("asv")
    generator = np.random.default_rng(0)
    labels = np.tile([1, 0], 100)
    scores = labels * 0.5 + generator.normal(size=200) + np.repeat(generator.normal(size=10), 20)
    items = {"id": list(map(str, range(200))), "label": labels, "score": scores}
    speakers = {"cluster_a": list(np.repeat(np.arange(10), 20)), "cluster_b": list(generator.integers(0, 10, 200))}
    plain, by_items = engine_record.interval(task, engine_record.Score(30.0, items))
    paired, by_speakers = engine_record.interval(task, engine_record.Score(30.0, {**items, **speakers}))
    assert plain is not None and paired is not None
    assert paired[1] - paired[0] > plain[1] - plain[0]
    assert "items" in str(by_items) and "speakers" in str(by_speakers)


def test_exact_arithmetic_is_put_back() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="inside"), engine_record.exact_arithmetic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
        raise ValueError("inside")
    assert torch.are_deterministic_algorithms_enabled() == before


def test_the_command_and_the_machine_are_in_the_record(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/run_superb.py", "--upstream", "a b"])
    (record,) = go()
    assert record.environment.command == "python run_superb.py --upstream 'a b'"
    text = record_path(tmp_path / "runs", TASK, "spectrum", record.run_id).read_text()
    assert json.loads(text)["environment"]["torch"] == str(torch.__version__)


def test_options_of_the_head_are_another_run_and_are_told(tmp_path: Path) -> None:
    common = {"lr": [1e-2], "steps": 3, "limit": 20}
    (plain,) = run(Spectrum(), TASK, out=tmp_path, **common)
    (narrow,) = run(Spectrum(), TASK, out=tmp_path, head_option={"width": 8}, **common)
    assert narrow.run_id != plain.run_id and narrow.probe.head_options["width"] == 8
    assert narrow.probe.trainable_params < plain.probe.trainable_params
    assert "head options width=8" in narrow.task.protocol_deviations
    assert not any("head options" in each for each in plain.task.protocol_deviations)
    with pytest.raises(RequestError, match="wdth"):
        run(Spectrum(), TASK, out=tmp_path, head_option={"wdth": 8}, **common)


def test_a_file_among_the_options_is_known_by_its_bytes(tmp_path: Path) -> None:
    model = tmp_path / "lm.arpa"
    model.write_text("one")
    first = engine_request.identified({"lm": str(model), "width": 8})
    model.write_text("two")
    assert first["lm"].startswith("lm.arpa@sha256:") and first["width"] == 8
    assert engine_request.identified({"lm": str(model)})["lm"] != first["lm"]
