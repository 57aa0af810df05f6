"""`superb-probe run`: what reaches the engine, what is printed and written, and corpora that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from superb_probe import cli, engine
from superb_probe.results.record import read_records
from superb_probe.settings import RUN_FLAGS

Printed = Callable[[], tuple[str, str]]
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine would have been asked."""
    received: dict[str, Any] = {}

    def run(**arguments: Any) -> list[Any]:
        received.clear()
        received.update(arguments)
        return []

    monkeypatch.setattr(engine, "run", run)
    return received


EVERY_FLAG = {
    "upstream": (["fbank", "hf:org/name"], ["fbank", "hf:org/name"]),
    "task": (["asr", "ic"], ["asr", "ic"]),
    "checkpoint": (["c.pt"], Path("c.pt")),
    "size": (["tiny"], "tiny"),
    "random": (["7"], 7),
    "upstream_option": (["a=true", "b=1e-5"], {"a": True, "b": 1e-5}),
    "data": (["mini=/m"], {"mini": Path("/m")}),
    "manifest": (["train=a", "trials=t"], {"train": Path("a"), "trials": Path("t")}),
    "root": (["r"], Path("r")),
    "head": (["xvector"], "xvector"),
    "head_option": (["width=64", "lm=m.arpa"], {"width": 64, "lm": "m.arpa"}),
    "layer": (["0"], 0),
    "layer_norm": ([], True),
    "budget": (["full"], "full"),
    "lr": (["1e-1", "0.01"], [0.1, 0.01]),
    "seed": (["1", "2"], [1, 2]),
    "protocol": (["superb"], "superb"),
    "control": (["shuffle"], "shuffle"),
    "device": (["cpu"], "cpu"),
    "out": (["o"], Path("o")),
    "store": (["s"], Path("s")),
    "limit": (["5"], 5),
    "overwrite": (["failed"], "failed"),
    "dry_run": ([], True),
    "steps": (["70"], 70),
    "feature_dtype": (["int8"], "int8"),
    "crops": (["4"], 4),
    "crop_seed": (["3"], 3),
    "stop_hopeless": ([], True),
    "store_limit": (["500GB"], "500GB"),
    "store_clean": ([], True),
    "states": (["disk"], "disk"),
    "padding": (["s3prl"], "s3prl"),
    "tier": (["quick"], "quick"),
    "time_limit": (["8h"], "8h"),
}


def test_every_flag_of_run_reaches_the_engine(asked: dict[str, Any]) -> None:
    assert set(EVERY_FLAG) == {flag.name for flag in RUN_FLAGS}
    argv = ["run"]
    for name, (words, _) in EVERY_FLAG.items():
        argv += ["--" + name.replace("_", "-"), *words]
    assert cli.main(argv) == 0
    assert asked == {name: value for name, (_, value) in EVERY_FLAG.items()}


def test_flags_that_are_not_given_are_left_to_the_engine(asked: dict[str, Any]) -> None:
    assert cli.main(["run", "--upstream", "fbank", "--task", "asv"]) == 0
    assert asked == {"upstream": ["fbank"], "task": ["asv"]}


def test_a_sweep_file_under_flags_over_settings(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("upstream: [fbank]\ntask: [asv, asr]\nlr: [1e-4]\nseed: [1, 2]\n")
    (tmp_path / "superb.yaml").write_text("store: /fast\ncorpora: {librispeech: /corpora/ls}\n")
    assert cli.main(["run", "--config", "sweep.yaml", "--seed", "5", "--data", "librispeech"]) == 0
    assert asked == {
        "upstream": ["fbank"],
        "task": ["asv", "asr"],
        "lr": [1e-4],
        "seed": [5],
        "store": Path("/fast"),
        "data": {"librispeech": Path("/corpora/ls")},
    }


def test_run_and_the_fixed_command_are_the_same(asked: dict[str, Any]) -> None:
    assert cli.run(["--upstream", "fbank", "--task", "asv"]) == 0
    assert asked == {"upstream": ["fbank"], "task": ["asv"]}


RUN = ["run", "--upstream", "fbank_no_cmvn", "--task", "synthetic_sid", "--lr", "1e-1", "1e-2", "--device", "cpu"]


def test_a_run_prints_a_table_and_writes_records(printed: Printed, tmp_path: Path) -> None:
    argv = ["run", "--upstream", "mamba_hubert_causal", "--size", "test", "--random", "3", *RUN[3:]]
    assert cli.main([*argv, "--limit", "32", "--layer-norm"]) == 0
    out, err = printed()
    records = read_records(tmp_path / "results" / "runs")
    assert {record.probe.lr for record in records} == {1e-1, 1e-2}
    assert "synthetic_sid" in out
    assert "[95 % interval]" in out
    assert "mamba_hubert_causal (RANDOM weights)" in out
    assert (out + err).count("random weights") == 1  # said once, before the work
    assert any(str(Path("results/runs/synthetic_sid/mamba_hubert_causal") / record.run_id) in out for record in records)
    assert "WARNING" in err


def test_json_prints_one_document_and_nothing_else(printed: Printed, tmp_path: Path) -> None:
    assert cli.main([*RUN, "--out", "runs", "--json"]) == 0
    out, err = printed()
    document = json.loads(out)
    written = {record.run_id: record.to_dict() for record in read_records(tmp_path / "runs")}
    assert {entry["run_id"]: entry for entry in document} == written
    assert err != ""

    # records make a leaderboard and a plot
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "board.csv"]) == 0
    assert "1 rows from 2 records" in printed()[0]
    assert cli.main(["plot", "--runs", "runs", "--out", "scores.png", "--task", "synthetic_sid"]) == 0
    assert all((tmp_path / f"scores.{kind}").is_file() for kind in ("png", "svg", "csv"))
    assert cli.main(["plot", "--runs", "runs", "--task", "synthetic_sod"]) == 2

    # a file that is no record is named, and the rest is still made
    (tmp_path / "runs" / "bad.json").write_text("{}")
    printed()
    assert cli.main(["leaderboard", "--runs", "runs", "--out", "again.csv"]) == 1
    assert "bad.json" in printed()[1]
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "board.csv").read_bytes()


def test_dry_run_prints_a_plan_and_writes_nothing(printed: Printed, tmp_path: Path) -> None:
    assert cli.main([*RUN, "--dry-run"]) == 0
    assert "2 trials" in printed()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_question_without_an_answer_is_status_1(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([*RUN, "--out", "runs"]) == 0
    good, bad = read_records("runs")
    bad = replace(bad, status="failed", score=None, error="the loss is not finite")
    monkeypatch.setattr(engine, "run", lambda **_: [good, bad])
    printed()
    assert cli.main([*RUN]) == 0  # one rate diverged, the other answered
    assert "FAILED: synthetic_sid / fbank_no_cmvn" in printed()[0]
    monkeypatch.setattr(engine, "run", lambda **_: [bad])
    assert cli.main([*RUN]) == 1
    assert "FAILED: synthetic_sid / fbank_no_cmvn" in printed()[0]


def write_manifests(folder: Path, noise: Callable[..., Path], changes: dict[str, dict[str, str]]) -> list[str]:
    """Manifests of 15 speakers (12 in train, 1 in dev, 2 in test, 2 utterances each), with some cells changed by utterance id."""
    rows: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for speaker in range(15):
        split = "train" if speaker < 12 else "dev" if speaker == 12 else "test"
        for number in range(2):
            name = f"s{speaker}_{number}"
            row = {"audio": f"{name}.wav", "duration_s": "", "speaker": f"s{speaker}", "text": "HI", "phones": "HH AY"}
            row |= changes.get(name, {})
            if row["audio"] == f"{name}.wav":
                noise(folder / row["audio"], seconds=2.5)
            cells = [name, row["audio"], "0.0", row["duration_s"], row["speaker"], row["text"], row["phones"]]
            rows[split].append("\t".join(cells))
    for split, lines in rows.items():
        header = "id\taudio\tstart_s\tduration_s\tspeaker\ttext\tphones"
        (folder / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    (folder / "trials.tsv").write_text("label\tid_a\tid_b\n1\ts13_0\ts13_1\n0\ts13_0\ts14_0\n")
    return ["train=train.tsv", "test=test.tsv"]


@pytest.mark.parametrize(
    ("task", "changes", "named"),
    [
        ("asv", {"s13_0": {"speaker": "s1"}}, ["s1"]),
        ("asv", {"s13_0": {"duration_s": "0.03"}, "s14_1": {"duration_s": "0.03"}}, ["s13_0", "s14_1"]),
        ("asv", {"s13_0": {"duration_s": "0.001"}}, ["s13_0", "one frame"]),
        ("asv", {"s13_0": {"audio": "slow.wav"}}, ["s13_0", "8000"]),
        ("asv", {"s13_0": {"audio": "text.wav"}, "s14_0": {"audio": "none.wav"}}, ["text.wav", "none.wav"]),
        ("asv", {"s13_0": {"audio": "/etc/passwd"}}, ["/etc/passwd"]),
        ("asv", {"s13_0": {"audio": "../up.wav"}}, ["../up.wav"]),
        ("asv", {"s13_0": {"duration_s": "5.0"}}, ["s13_0"]),
        ("asr", {"s0_0": {"text": ""}, "s14_1": {"text": " "}}, ["s0_0", "s14_1"]),
        ("pr", {"s13_1": {"phones": ""}}, ["s13_1"]),
    ],
    ids=str,
)
def test_wrong_corpora_are_reported_before_anything_is_computed(
    task: str,
    changes: dict[str, dict[str, str]],
    named: list[str],
    printed: Printed,
    noise: Callable[..., Path],
    tmp_path: Path,
) -> None:
    noise(tmp_path / "slow.wav", rate_hz=8000)
    (tmp_path / "text.wav").write_text("not audio")
    manifests = write_manifests(tmp_path, noise, changes)
    manifests.append("trials=trials.tsv" if task == "asv" else "dev=dev.tsv")
    argv = ["run", "--upstream", "fbank_no_cmvn", "--task", task, "--manifest", *manifests, "--out", "runs"]
    assert cli.main([*argv, "--lr", "1e-3"]) == 2
    _, err = printed()
    assert "Traceback" not in err
    assert "extract" not in err
    assert [text for text in named if text not in err] == []
    assert not list((tmp_path / "runs").rglob("*.json"))
