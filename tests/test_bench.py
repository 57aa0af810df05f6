"""The benches: what they count, how they scale, what they refuse. No test looks at a time."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from superb_probe import bench_extraction, bench_parts, bench_probing
from superb_probe.bench_corpus import (
    BenchCorpus,
    arrange_fluent_commands,
    arrange_librispeech,
    arrange_phones,
    arrange_voxceleb,
    choose_corpus,
    flac_corpus,
)
from superb_probe.bench_machine import counted_passes
from superb_probe.bench_ours import OursJob, measure
from superb_probe.bench_peer import (
    DRIVER,
    PeerRun,
    check_python,
    peer_job,
    read_result,
    run_peer,
    why_not,
)
from superb_probe.cli import main
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import mini_root
from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.base import LayerStates
from superb_probe.upstreams.fairseq_format import to_s3prl
from superb_probe.upstreams.load import load_upstream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ic(tmp_path_factory: pytest.TempPathFactory) -> BenchCorpus:
    return choose_corpus(load_task("ic"), 8, tmp_path_factory.mktemp("ic"))


@pytest.fixture(scope="module")
def pr(tmp_path_factory: pytest.TempPathFactory) -> BenchCorpus:
    return choose_corpus(load_task("pr"), 24, tmp_path_factory.mktemp("pr"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    upstream: Any = load_upstream("transformer_hubert", size="test", random=1)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(to_s3prl(upstream.encoder.config, upstream.encoder.state_dict(), ()), path)
    return path


@pytest.fixture(scope="module")
def stand_ins() -> ModuleType:
    path = DRIVER.with_name("s3prl_peer_stand_ins.py")
    if not path.is_file():
        pytest.skip("tools/ is part of a checkout only")
    spec = importlib.util.spec_from_file_location("s3prl_peer_stand_ins", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw_result(**changed: Any) -> dict[str, Any]:
    stamps = [10.0 + 0.5 * n for n in range(100)]
    evaluations = [
        {"split": split, "step": 100, "seconds": seconds, "passes": passes, "processor_s": seconds}
        for split, seconds, passes in (("dev", 2.0, 20), ("test", 3.0, 30))
    ]
    scalars = [["fluent_commands/dev-acc", 0.25, 100], ["fluent_commands/test-acc", 0.5, 100]]
    raw = {
        "begun": 9.0,
        "stamps": stamps,
        "processor_stamps": stamps,
        "updates": 100,
        "passes": {"training": 3200},
        "evaluations": evaluations,
        "peak_rss_bytes": 10**9,
        "peak_gpu_bytes": None,
        "scalars": scalars,
    }
    return {**raw, **changed}


def test_choosing_keeps_classes_known_and_splits_apart(ic: BenchCorpus) -> None:
    manifests = ic.fold.manifests
    assert len(manifests["train"]) == 8
    for column in ("slot_action", "slot_object", "slot_location"):
        known = set(manifests["train"].labels(column))
        assert all(set(manifests[split].labels(column)) <= known for split in ("dev", "test"))  # type: ignore[index]
    assert ic.distinct == sum(len(manifest) for manifest in manifests.values())
    assert set(ic.manifests) == {"train", "dev", "test"}


def test_a_corpus_for_fluent_commands(ic: BenchCorpus, tmp_path: Path) -> None:
    arrange_fluent_commands(ic.fold, tmp_path, batch=4)
    rows = list(csv.DictReader((tmp_path / "data" / "train_data.csv").open(encoding="utf-8")))
    train = ic.fold.manifests["train"]
    assert len(rows) == 200 * len(train)  # 400 updates an epoch
    assert rows[0]["action"] == train[0].labels["slot_action"]
    wav, rate = soundfile.read(str(tmp_path / rows[0]["path"]))
    assert rate == 16000 and len(wav) == round(train[0].duration_s * 16000)
    assert len(list(csv.DictReader((tmp_path / "data" / "valid_data.csv").open(encoding="utf-8")))) == len(
        ic.fold.manifests["dev"]
    )


def test_a_corpus_for_phones_and_the_windows_over_it(pr: BenchCorpus, tmp_path: Path, stand_ins: ModuleType) -> None:
    tokens = pr.task.labels(pr.fold.manifests["train"]).classes["tokens"]
    arrange_phones(pr.fold, tmp_path, tokens)
    assert (tmp_path / "vocabulary.txt").read_text().split() == list(tokens[3:])
    tokenizer = SimpleNamespace(encode=lambda text: text.split())
    windows = stand_ins.LibriPhoneDataset(["train"], tokenizer, 4, path=str(tmp_path), name="libriphone")
    assert len(windows) == 24
    lengths = [[len(labels) for _, labels in windows[index]] for index in range(24)]
    assert all(len(window) == 4 and window == sorted(window, reverse=True) for window in lengths)
    assert lengths[20] == lengths[23]  # the last window ends with the list
    single = stand_ins.LibriPhoneDataset(["dev"], tokenizer, 1, path=str(tmp_path))
    assert isinstance(single[0], tuple) and Path(single[0][0]).is_file()


def test_a_corpus_for_speech_recognition(tmp_path: Path) -> None:
    asr = choose_corpus(load_task("asr"), 4, tmp_path / "manifests")
    arrange_librispeech(asr.fold, tmp_path, asr.task.labels(asr.fold.manifests["train"]).classes["tokens"])
    rows = list(csv.DictReader((tmp_path / "lengths" / "train.csv").open(encoding="utf-8")))
    assert len(rows) == 4 and (tmp_path / rows[0]["file_path"]).is_file()
    assert int(rows[0]["length"]) == round(asr.fold.manifests["train"][0].duration_s * 16000)
    chapter = (tmp_path / rows[0]["file_path"]).parent
    (transcript,) = chapter.glob("*.trans.txt")
    assert asr.fold.manifests["train"][0].labels["text"] in transcript.read_text()


def test_a_corpus_for_verification_has_effects_applied_and_every_trial(tmp_path: Path) -> None:
    whole = load_task("asv").splits(mini_root())[0]
    kept = whole.manifests
    first = kept["train"][:3]
    ids = [whole.trials["test"].ids_a[0], whole.trials["test"].ids_b[0]]
    trials = type(whole.trials["test"]).of([1], ids[:1], ids[1:])
    fold = replace(whole, manifests={"train": first, "test": kept["test"].keep(ids)}, trials={"test": trials})
    lengths = arrange_voxceleb(fold, tmp_path, batch=50)
    tag, samples = lengths[0]
    wav, _ = soundfile.read(str(tmp_path / "dev" / "wav" / Path(*tag)))
    assert len(wav) == samples and samples <= round(first[0].duration_s * 16000)
    label, a, b = (tmp_path / "trials.txt").read_text().split()
    assert label == "1" and all((tmp_path / "test" / "wav" / name).is_file() for name in (a, b))


def test_flac_copies_hold_the_same_samples(pr: BenchCorpus, tmp_path: Path) -> None:
    from superb_probe.downstreams.audio import read_waveform

    copied = flac_corpus(pr, tmp_path)
    before, after = pr.fold.manifests["dev"], copied.fold.manifests["dev"]
    assert after.ids == before.ids and after[0].audio.endswith(".flac")
    difference = read_waveform(after[0], after.root) - read_waveform(before[0], before.root)
    assert np.abs(difference).max() < 2**-15  # 16 bits


def test_passes_are_counted_and_a_second_pass_is_seen(checkpoint: Path) -> None:
    upstream = load_upstream("transformer_hubert", checkpoint=checkpoint)
    waves = [torch.randn(1600), torch.randn(3200)]
    with counted_passes(upstream) as once:
        upstream.extract(waves)
    with counted_passes(upstream) as twice:
        upstream.extract(waves)
        upstream.extract(waves)
    assert (once.utterances, twice.utterances) == (2, 4)


def ours_job(corpus: BenchCorpus, checkpoint: Path, folder: Path, **changed: Any) -> OursJob:
    job = OursJob(
        checkpoint=str(checkpoint),
        task=corpus.task.info.name,
        manifests={split: str(path) for split, path in corpus.manifests.items()},
        root=str(corpus.root),
        lr=[1e-2, 1e-3],
        seed=[1],
        steps=3,
        out=str(folder / "records"),
        store=str(folder / "store"),
        device="cpu",
        threads=None,
    )
    return replace(job, **changed)


def test_a_sweep_here_passes_every_utterance_once(ic: BenchCorpus, checkpoint: Path, tmp_path: Path) -> None:
    found = measure(ours_job(ic, checkpoint, tmp_path))
    assert found["encoder_passes"] == ic.distinct and found["trials"] == 2 and not found["failed"]
    assert all(row["test"] is not None and row["after_last_update"] is not None for row in found["scores"])
    again = measure(ours_job(ic, checkpoint, tmp_path))
    assert again["encoder_passes"] == 0  # the store is there already: a bench must not time that as a first run


def test_rates_of_the_peer() -> None:
    peer = read_result(raw_result())
    assert peer.update_s == pytest.approx(0.5) and peer.update_processor_s == pytest.approx(0.5)
    assert peer.update_passes == 32 and peer.evaluation_s == {"dev": 2.0, "test": 3.0}
    assert peer.score("dev") == 25.0 and peer.score("test") == 50.0
    slow_start = raw_result(stamps=[0.0, 100.0, *[110.0 + 0.5 * n for n in range(98)]])
    assert read_result(slow_start).update_s == pytest.approx(0.5)  # the first updates are warm-up
    with pytest.raises(CheckError, match="no update"):
        read_result(raw_result(stamps=[]))


def test_scaling_of_the_peer_and_what_it_says() -> None:
    peer = read_result(raw_result())
    found = bench_probing.peer_summary(peer, 2000, 100, 5, 10, "dev")
    assert found["wall_s"] == pytest.approx(5 * (2000 * 0.5 + 10 * 2.0 + 3.0))
    assert found["encoder_passes"] == 5 * (2000 * 32 + 10 * 20 + 30)
    assert "scaled to 2000" in found["how"] and "FEWER" not in found["how"]
    assert found["after_last_update"] is None  # a part of the updates has no score to pair
    assert "FEWER than 100" in bench_probing.peer_summary(peer, 2000, 20, 5, 10, "dev")["how"]
    whole = bench_probing.peer_summary(peer, 100, 100, 5, 10, "dev")
    assert whole["after_last_update"] == {"dev": 25.0, "test": 50.0} and "all updates" in whole["how"]


def test_scores_stand_side_by_side_after_as_many_updates() -> None:
    rows = [
        {"lr": lr, "seed": seed, "after_last_update": dev}
        for lr, seed, dev in ((0.1, 1, 7.0), (0.01, 1, 20.0), (0.01, 2, 30.0))
    ]
    found = {"s3prl": {"after_last_update": {"dev": 25.0, "test": 1.0}}, "s3prl_lr": 0.01, "updates": 100}
    said = bench_probing._paired({**found, "superb_probe": {"scores": rows}})
    assert said == "dev after update 100 at lr 0.01: 25.0 there; here 20.0 (seed 1), 30.0 (seed 2)"
    failed = [{**row, "after_last_update": None} for row in rows]
    assert "its trials failed" in bench_probing._paired({**found, "superb_probe": {"scores": failed}})
    assert "no scores" in bench_probing._paired({**found, "s3prl": {"after_last_update": None}})


def compared(ic: BenchCorpus, peer: PeerRun) -> dict[str, Any]:
    ours = {"wall_s": 30.0, "fit_s": 20.0, "extract_s": 8.0, "encoder_passes": 100, "processor_s": 10.0}
    theirs = bench_probing.peer_summary(peer, 2000, 100, 5, 10, "dev")
    found = {"superb_probe": ours, "s3prl": theirs, "lr": [1, 2, 3, 4, 5], "seeds": [1]}
    return bench_probing.compare(found, peer, ic, 2000, 10)


def test_ratios_and_their_arithmetic(ic: BenchCorpus) -> None:
    peer = read_result(raw_result())
    found = compared(ic, peer)
    assert found["ratio"] == pytest.approx(5115.0 / 30.0)
    assert found["update_ratio"] == pytest.approx(5 * 0.5 / (20.0 / 2000))
    assert found["curve"]["2000"]["how"] == "measured" and found["curve"]["2000"]["ratio"] == pytest.approx(
        found["ratio"]
    )
    assert found["curve"]["20000"]["superb_probe_s"] == pytest.approx(10.0 + 200.0)
    assert (
        found["curve"]["200"]["ratio"] < found["curve"]["20000"]["ratio"]
    )  # one extraction is spread over more updates
    at = found["at_superb_sizes"]
    assert at["superb_probe_s"] == pytest.approx(8.0 * 19.0 * 3600 / ic.audio_s + 200_000 * 0.01, rel=1e-6)
    train = ic.fold.manifests["train"]
    longer = (14.7 * 3600 / 23_132) / (train.total_s / len(train))
    test_s = 2.4 * 3600 / ic.fold.manifests["test"].total_s * 3.0
    assert at["s3prl_s"] == pytest.approx(5 * (200_000 * 0.5 * longer + 40 * test_s * 1.9 / 2.4 + test_s), rel=1e-6)
    assert found["processor_ratio"] == pytest.approx(511.5)


def test_a_gpu_run_has_no_ratio_of_processor_seconds(ic: BenchCorpus) -> None:
    assert compared(ic, read_result(raw_result(peak_gpu_bytes=1)))["processor_ratio"] is None


def test_two_encoders_that_differ_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s3prl").mkdir()
    states = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)
    np.save(tmp_path / "states.npy", states)
    np.save(tmp_path / "s3prl" / "states.npy", states * (1 + 1e-6))
    assert bench_probing.states_difference(tmp_path) < 1e-5
    changed = states.copy()
    changed[1] *= 1.01  # one layer
    np.save(tmp_path / "s3prl" / "states.npy", changed)
    with pytest.raises(CheckError, match="differ by 0.0099"):
        bench_probing.states_difference(tmp_path)
    np.save(tmp_path / "s3prl" / "states.npy", states[:2])
    with pytest.raises(CheckError, match="shape"):
        bench_probing.states_difference(tmp_path)


def test_where_the_peer_cannot_run_it_says_so() -> None:
    assert "CUDA only" in str(why_not("asv", CPU, "python", DRIVER))
    assert why_not("asv", torch.device("cuda"), "python", Path(__file__)) is None
    assert "--peer-python" in str(why_not("ic", CPU, None, DRIVER))
    assert "--peer-driver" in str(why_not("ic", CPU, "python", Path("nowhere.py")))
    assert "arranges no corpus" in str(why_not("qbe", CPU, "python", DRIVER))


def test_an_environment_without_s3prl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no such program"):
        check_python(str(tmp_path / "python"))
    package = tmp_path / "s3prl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.txt").write_text("0.4.10\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"expected s3prl 0\.4\.18, found 0\.4\.10"):
        check_python(sys.executable)
    (package / "version.txt").write_text("0.4.18\n")
    assert check_python(sys.executable) == "0.4.18"


def driver(folder: Path, body: str) -> Path:
    path = folder / "driver.py"
    path.write_text(f"import json, sys, time\njob = json.load(open(sys.argv[1]))\n{body}\n", encoding="utf-8")
    return path


def test_running_the_peer(ic: BenchCorpus, checkpoint: Path, tmp_path: Path) -> None:
    def run(body: str, **changed: Any) -> PeerRun:
        arguments: dict[str, Any] = {"python": sys.executable, "checkpoint": checkpoint, "device": CPU, "updates": 100}
        arguments |= {"lr": 1e-4, "folder": tmp_path / "run", "gone": True, **changed}
        return run_peer(ic, driver=driver(tmp_path, body), **arguments)

    written = f"open(sys.argv[2], 'w').write(json.dumps({raw_result()!r} | {{'job': job}}))"
    peer = run(written)
    job = peer.raw["job"]
    assert job["config"]["runner"]["total_steps"] == 100 and job["config"]["optimizer"]["lr"] == 1e-4
    assert Path(job["states"]["audio"]).is_file() and job["checkpoint"] == str(checkpoint)
    with pytest.raises(CheckError, match=r"(?s)status 3.*no such layer"):
        run("print('no such layer'); sys.exit(3)")
    with pytest.raises(CheckError, match="status 0"):  # and no result
        run("pass")
    with pytest.raises(CheckError, match="stopped after 1 s"):
        run("time.sleep(60)", timeout_s=1.0)


@pytest.mark.parametrize("name", ["pr", "asr"])
def test_jobs_of_other_tasks(name: str, checkpoint: Path, tmp_path: Path) -> None:
    corpus = choose_corpus(load_task(name), 24, tmp_path / "manifests")
    job = peer_job(corpus, checkpoint=checkpoint, device=CPU, updates=7, lr=1e-2, folder=tmp_path)
    runner, budget = job["config"]["runner"], corpus.task.info.budgets["full"]
    assert runner["gradient_accumulate_steps"] == budget.accumulate and runner["eval_step"] == 7
    assert ("specaug" in job["config"]) == (name == "asr")
    assert json.dumps(job)


def test_the_recorder_keeps_what_is_logged(stand_ins: ModuleType) -> None:
    stand_ins.SCALARS.clear()
    writer = stand_ins.SummaryWriter("folder")
    writer.add_scalar("asr/dev-clean-wer", 12.5, global_step=3)
    assert stand_ins.SCALARS == [("asr/dev-clean-wer", 12.5, 3)]
    peer = read_result(raw_result(scalars=stand_ins.SCALARS))
    assert peer.score("dev") == 12.5  # already in percent


def test_bench_weighted_sum_prints_one_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert (
        main(["bench", "weighted-sum", "--device", "cpu", "--shape", "3", "2", "5", "4", "--json", "--out", str(out)])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    row = result["dtypes"]["float32"]
    assert row["needed_bytes"] == 4 * (2 * 3 * 2 * 5 * 4 + 2 * 2 * 5 * 4)
    assert row["ratio"] == pytest.approx(row["seconds"] / row["needed_s"])
    assert result["machine"]["versions"]["torch"] == torch.__version__ and "commit" in result["machine"]
    assert any("3x2x5x4" in line for line in bench_parts.describe_weighted_sum(result))


def test_bench_extraction_counts_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "bench",
                "extraction",
                "--device",
                "cpu",
                "--size",
                "test",
                "--limit",
                "3",
                "--copies",
                "2",
                "--dtype",
                "bfloat16",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert {row["passes_per_utterance"] for row in result["whole"].values()} == {1.0}
    places = ["frames, memory", "frames, disk", "frames, stream", "mean, memory"]
    assert list(result["whole"]) == places and result["planner"].startswith("memory")
    assert result["utterances"] == 6 and result["encoder"]["dtype"] == "bfloat16"
    sizes = [row["store_bytes"] for row in result["whole"].values()]
    # the copies are files of their own: none is read for another
    assert sizes[0] == sizes[1] > sizes[3] > sizes[2] == 0
    for row in result["whole"].values():
        assert row["stages_s"][row["limiting_stage"]] == max(row["stages_s"].values())
    assert sum("limiting stage" in line for line in bench_extraction.describe_extraction(result)) == len(places)


def test_sweep_ratios(ic: BenchCorpus) -> None:
    run = {"wall_s": 30.0, "fit_s": 18.0, "extract_s": 10.0, "encoder_passes": ic.distinct}
    result = {
        "task": "ic",
        "updates": 1000,
        "superb_updates": 200_000,
        "encoder_pass": {"seconds": 10.0, "audio_s": ic.audio_s, "audio_s_per_s": ic.audio_s / 10.0},
        "runs": {"weighted_sum": run, "every_layer": {**run, "wall_s": 45.0, "fit_s": 27.0}},
    }
    found = bench_parts.sweep_ratios(result, ic)
    assert found["ratio"] == pytest.approx(3.0) and found["passes_per_utterance"] == 1.0
    assert found["every_layer_ratio"] == pytest.approx(1.5) and found["every_layer_fit_ratio"] == pytest.approx(1.5)
    pass_s = 19.0 * 3600 * 10.0 / ic.audio_s
    assert found["at_superb_sizes"]["sweep_s"] == pytest.approx(pass_s + 18.0 * 200 + 2.0)
    assert found["at_superb_sizes"]["ratio"] == pytest.approx((pass_s + 3602.0) / pass_s)
    result["fewer_updates"] = {"updates": 100, "fit_s": 9.0}  # so 0.01 s an update, and 8 s once
    found = bench_parts.sweep_ratios(result, ic)
    assert found["at_superb_sizes"]["sweep_s"] == pytest.approx(pass_s + 0.01 * 200_000 + 8.0 + 2.0)


def test_a_sweep_of_a_real_corpus_s_classes(tmp_path: Path) -> None:
    corpus = choose_corpus(load_task("sid"), 30, tmp_path)
    labelled = bench_parts.with_classes(corpus, 7)
    for split, manifest in labelled.fold.manifests.items():
        assert {each.labels["speaker"] for each in manifest} == {f"class {number}" for number in range(7)}
        written = Manifest.read(labelled.manifests[str(split)], labelled.root)
        assert [each.labels for each in written] == [each.labels for each in manifest]
        assert [each.audio for each in manifest] == [each.audio for each in corpus.fold.manifests[split]]
    bench_parts.check_classes(corpus, 31, copies=2)
    for task, classes in (("sid", 31), ("sid", 1), ("ic", 7), ("pr", 7)):
        with pytest.raises(RequestError, match=f"--classes {classes}.*Fix"):
            bench_parts.check_classes(choose_corpus(load_task(task), 30, tmp_path), classes, copies=1)


def test_wrong_requests_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "probing", "--updates", "0", "--limit", "1"]) == 2
    said = capsys.readouterr().err
    assert "--updates 0" in said and "--limit 1" in said
    assert main(["bench", "probing", "--task", "ic", "--device", "cpu", "--peer-python", str(tmp_path / "no")]) == 2
    assert "no such program" in capsys.readouterr().err
    assert main(["bench", "weighted-sum", "--shpae", "1"]) == 2
    assert "--shape" in capsys.readouterr().err
    assert main(["bench", "sweep", "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_two_encoders_of_the_bench_are_one(pr: BenchCorpus, tmp_path: Path) -> None:
    """The whole bench against s3prl itself, where there is an environment with it."""
    python = os.environ.get("SUPERB_PROBE_PEER_PYTHON")
    if python is None:
        pytest.skip("SUPERB_PROBE_PEER_PYTHON names no environment with s3prl 0.4.18 (docs/benchmarks.md)")
    words = [
        "bench",
        "probing",
        "--task",
        "ic",
        "asv",
        "--size",
        "test",
        "--limit",
        "8",
        "--updates",
        "4",
        "--peer-updates",
        "4",
    ]
    out = tmp_path / "result.json"
    assert main([*words, "--device", "cpu", "--peer-python", python, "--work", str(tmp_path), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["tasks"]
    assert found["ic"]["encoder_difference"] < 1e-5 and found["ic"]["s3prl"]["passes_per_update"] == 32
    assert "CUDA only" in found["asv"]["s3prl_not_run"]


def test_layer_states_of_the_hook_are_the_encoders(checkpoint: Path) -> None:
    upstream = load_upstream("transformer_hubert", checkpoint=checkpoint)
    with counted_passes(upstream):
        counted = upstream.extract([torch.ones(1600)])
    assert isinstance(counted, LayerStates)
    assert torch.equal(counted.states, upstream.extract([torch.ones(1600)]).states)
