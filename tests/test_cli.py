"""The command line: every flag, every exit status, and what is printed where."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from superb_probe import cli, commands_run
from superb_probe.errors import CheckError, RequestError
from superb_probe.results.record import read_records
from superb_probe.settings import RUN_FLAGS

COMMANDS = (
    "run",
    "list",
    "show",
    "check",
    "conformance",
    "prepare",
    "extract",
    "convert",
    "leaderboard",
    "plot",
    "compare",
    "verify",
    "import",
    "export",
    "submit",
    "pretrain",
    "finetune",
    "store",
    "bench",
    "stream",
    "analyze",
    "align",
    "doctor",
)
Printed = Callable[[], tuple[str, str]]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("STORE", "DEVICE", "OUT", "SETTINGS"):
        monkeypatch.delenv(f"SUPERB_PROBE_{name}", raising=False)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    def read() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return read


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine would have been asked."""
    from superb_probe import engine

    received: dict[str, Any] = {}

    def run(**arguments: Any) -> list[Any]:
        received.clear()
        received.update(arguments)
        return []

    monkeypatch.setattr(engine, "run", run)
    return received


def noise(path: Path, seconds: float = 1.0, rate_hz: int = 16000, channels: int = 1) -> Path:
    generator = np.random.default_rng(len(path.name))
    samples = 0.1 * generator.standard_normal((round(seconds * rate_hz), channels)).squeeze()
    soundfile.write(path, samples.astype(np.float32), rate_hz)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, printed: Printed) -> None:
    assert cli.main([command, "--help"]) == 0
    out, err = printed()
    assert "examples:\n  superb-probe " + command in out
    assert err == ""


def test_the_commands_are_these_and_no_others(printed: Printed) -> None:
    assert cli.main(["--help"]) == 0
    out, _ = printed()
    listed = tuple(line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " ")
    assert listed == COMMANDS


def test_version(printed: Printed) -> None:
    import superb_probe

    assert cli.main(["--version"]) == 0
    assert printed()[0] == f"superb-probe {superb_probe.__version__}\n"


BAD = [
    ([], "required: COMMAND"),
    (["lst"], "Did you mean list"),
    (["list"], "what"),
    (["list", "upstream"], "Did you mean upstreams"),
    (["list", "tasks", "--jsn"], "Did you mean --json"),
    (["show", "task", "asw"], "Did you mean asv"),
    (["show", "upstream", "mamba_hubrt"], "Did you mean mamba_hubert"),
    (["show", "upstream", "fbank", "--size", "enormous"], "size"),
    (["check", "upstream", "fbnk"], "Did you mean fbank"),
    (["check", "upstream", "./none.py:mine"], "no file ./none.py"),
    (["run"], "--upstream and --task missing"),
    (["run", "--upstream", "fbank"], "--task missing"),
    (["run", "--upsteam", "fbank", "--task", "asv"], "Did you mean --upstream"),
    (["run", "--upstream=fbank", "--tsk=asv"], "Did you mean --task"),
    (["run", "--upstream", "fbnk", "--task", "synthetic_sid"], "Did you mean fbank"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sod"], "Did you mean synthetic_sid"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--lr", "fast"], "--lr"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--lr", "-1"], "lr"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--seed", "1.5"], "--seed"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--limit", "0"], "--limit 0"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--layer", "99"], "--layer 99"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--head", "xvector"], "--head xvector"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--protocol", "strikt"], "Did you mean strict"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--overwrite", "maybe"], "overwrite"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--control", "none"], "control"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--device", "cuda:77"], "cuda:77"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--device", "gpu"], "gpu"),
    (["run", "--upstream", "mamba_hubert", "--task", "synthetic_sid", "--checkpoint", "none.pt"], "none.pt"),
    (["run", "--upstream", "mamba_hubert", "--task", "synthetic_sid", "--checkpoint", "text.pt"], "text.pt"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--out", "text.pt/runs"], "--out"),
    (["run", "--upstream", "fbank", "--task", "asr", "--manifest", "a.tsv"], "--manifest takes name=value"),
    (["run", "--upstream", "fbank", "--task", "asr", "--manifest", "trian=a.tsv"], "train"),
    (["run", "--upstream", "fbank", "--task", "asr", "--manifest", "train=none.tsv", "dev=b", "test=c"], "none.tsv"),
    (["run", "--upstream", "fbank", "--task", "asr", "--data", "librispeech"], "where is it"),
    (["run", "--upstream", "fbank", "--task", "asr", "--data", "librispeech=empty"], "librispeech"),
    (["run", "--upstream", "fbank", "--task", "asr", "--data", "mini=empty"], "empty"),
    (["run", "--upstream", "mamba_hubert", "--task", "synthetic_sid", "--upstream-option", "causl=true"], "causl"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--layer", "most"], "an integer or all"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--feature-dtype", "int4"], "Did you mean int8"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--states", "cloud"], "states"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--states", "disk"], "no --store DIR"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--store", "s", "--store-limit", "much"], "not a size"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--store-limit", "5GB"], "--store DIR too"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--store", "s", "--store-clean"], "--store-limit SIZE"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--time-limit", "soon"], "not a time"),
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--crops", "-1"], "--crops -1"),
    (["run", "--upstream", "fbank", "--tier", "quick", "--task", "asr"], "--tier quick has the tasks pr sid er ic"),
    (["run", "--upstream", "fbank", "--tier", "quick", "--limit", "5"], "leave --budget and --limit out"),
    (["run", "--config", "none.yaml"], "none.yaml"),
    (["store", "list"], "which folder"),
    (["store", "list", "none"], "no folder none"),
    (["store", "clean", "empty"], "--keep SIZE"),
    (["store", "clean", "empty", "--keep", "all"], "not a size"),
    (["run", "--config", "text.pt"], "text.pt"),
    (["prepare", "csv", "empty"], "--out missing"),
    (["prepare", "csv", "empty", "--out", "manifests"], "manifest.csv"),
    (["prepare", "cvs", "empty"], "Did you mean csv"),
    (["extract", "a.wav"], "--upstream and --out missing"),
    (["extract", "--upstream", "fbank", "--out", "s", "none.wav", "text.pt", "slow.wav", "two.wav"], "4 problems"),
    (["extract", "--upstream", "fbank", "--out", "s", "short.wav"], "no frame"),
    (["extract", "--upstream", "fbank", "--out", "s", "good.wav", "empty/../good.wav"], "another file is named good"),
    (["extract", "--upstream", "fbank", "--out", "text.pt", "good.wav"], "--out"),
    (["convert", "text.pt", "--out", "x.safetensors"], "text.pt"),
    (["convert", "none.pt"], "--out missing"),
    (["convert", "none.pt", "--out", "x.onnx"], "no format has that ending"),
    (["conformance", "none"], "none"),
    (["leaderboard"], "no folder results/runs"),
    (["leaderboard", "--runs", "none"], "no folder none"),
    (["plot", "--runs", "empty"], "finished result"),
    (["plot", "--runs", "empty", "--task", "asv"], "asv"),
]


@pytest.mark.parametrize(("argv", "named"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_request_is_status_2_and_a_message(
    argv: list[str], named: str, printed: Printed, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("- not a checkpoint\n")
    noise(tmp_path / "good.wav")
    noise(tmp_path / "slow.wav", rate_hz=8000)
    noise(tmp_path / "two.wav", channels=2)
    noise(tmp_path / "short.wav", seconds=0.01)
    assert cli.main(argv) == 2
    out, err = printed()
    assert out == ""
    assert named in err
    assert "Traceback" not in err
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.json"))


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


@pytest.mark.parametrize(
    ("error", "status"),
    [(RequestError("no"), 2), (CheckError("no"), 1), (KeyboardInterrupt(), 130), (SystemExit(3), 3)],
)
def test_statuses(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(commands_run, "run_trials", fail)
    assert cli.main(["run", "--upstream", "fbank", "--task", "asv"]) == status


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(commands_run, "run_trials", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["run"])


def test_own_warnings_are_one_plain_line_each(monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    own = type("RandomWeightsWarning", (UserWarning,), {"__module__": "superb_probe.upstreams.load"})

    def warn(args: Any) -> int:
        for _ in range(3):
            warnings.warn("random!", own, stacklevel=1)
        return 0

    monkeypatch.setattr(commands_run, "run_trials", warn)
    assert cli.main(["run"]) == 0
    assert printed()[1] == "superb-probe: WARNING: random!\n"


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
    from dataclasses import replace

    from superb_probe import engine

    good, bad = read_records("runs")
    bad = replace(bad, status="failed", score=None, error="the loss is not finite")
    monkeypatch.setattr(engine, "run", lambda **_: [good, bad])
    printed()
    assert cli.main([*RUN]) == 0  # one rate diverged, the other answered
    assert "FAILED: synthetic_sid / fbank_no_cmvn" in printed()[0]
    monkeypatch.setattr(engine, "run", lambda **_: [bad])
    assert cli.main([*RUN]) == 1
    assert "FAILED: synthetic_sid / fbank_no_cmvn" in printed()[0]


@pytest.mark.parametrize("what", ["upstreams", "tasks"])
def test_list(what: str, printed: Printed) -> None:
    assert cli.main(["list", what, "--json"]) == 0
    listed = json.loads(printed()[0])
    assert {"name", "provided_by", "summary"} == set(listed[0])
    assert cli.main(["list", what, listed[0]["name"]]) == 0
    assert listed[0]["name"] in printed()[0]
    assert cli.main(["list", what, "zzz*"]) == 0
    assert "no " in printed()[0]


def test_show(printed: Printed) -> None:
    assert cli.main(["show", "task", "asr", "--json"]) == 0
    assert json.loads(printed()[0])["metric"] == "wer"
    assert cli.main(["show", "task", "asr"]) == 0
    assert "lr_grid" in printed()[0]
    assert cli.main(["show", "upstream", "transformer_hubert", "--size", "test", "--json"]) == 0
    facts = json.loads(printed()[0])
    assert facts["params"] < 500_000
    assert "checkpoint" in facts["options"]


BROKEN_UPSTREAM = '''
import torch
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo


class Broken(Upstream):
    """Declares 3 layers and gives 2."""

    info = UpstreamInfo("broken", "none", 3, 4, 16000, 320, "none", 0, "block_output", (), "", "")

    def num_frames(self, num_samples):
        return num_samples // 320

    def forward(self, wavs, num_samples):
        frames = num_samples // 320
        return LayerStates(torch.zeros(2, len(wavs), int(frames.max()), 4), frames)


def broken():
    return Broken()
'''


def test_check(printed: Printed, tmp_path: Path) -> None:
    assert cli.main(["check", "upstream", "mamba_hubert_causal", "--size", "test", "--random", "0", "--json"]) == 0
    report = json.loads(printed()[0])
    assert report["passed"]
    assert len(report["checks"]) == 10
    (tmp_path / "broken.py").write_text(BROKEN_UPSTREAM)
    assert cli.main(["check", "upstream", "./broken.py:broken"]) == 1
    assert "FAILED" in printed()[0]


def test_extract_is_what_features_reads(printed: Printed, tmp_path: Path) -> None:
    noise(tmp_path / "a.wav")
    noise(tmp_path / "b.flac", seconds=0.7)
    argv = ["extract", "--upstream", "mamba_hubert", "--size", "test", "--random", "1", "--out", "states"]
    assert cli.main([*argv, "a.wav", "b.flac"]) == 0
    assert printed()[0].split() == ["states/a.npy", "states/b.npy"]
    from superb_probe.upstreams.load import load_upstream

    stored = load_upstream("features:states")
    assert stored.info.revision == "random:1"
    assert stored.states_for("a").shape[0] == stored.info.num_layers
    assert cli.main(["extract", "--upstream", "fbank", "--out", "states", "a.wav"]) == 2
    assert "other states" in printed()[1]


def test_convert(printed: Printed, tmp_path: Path, shared: Path) -> None:
    source = min((shared / "fixtures" / "upstreams").glob("*.pt"))
    assert cli.main(["convert", str(source), "--out", "own.safetensors"]) == 0
    assert "superb-probe" in printed()[0]
    assert cli.main(["convert", "own.safetensors", "--out", "again.pt"]) == 0
    assert cli.main(["convert", "own.safetensors", "--out", "named", "--format", "s3prl"]) == 0
    assert (tmp_path / "again.pt").is_file()


def test_prepare(printed: Printed, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = ["path,utt_id,split,speaker,transcript,size"]
    for index, split in enumerate(("train", "train", "dev", "test")):
        noise(corpus / f"u{index}.wav")
        rows.append(f"u{index}.wav,u{index},{split},s{index},hello,{'big' if index % 2 else 'small'}")
    (corpus / "manifest.csv").write_text("\n".join(rows) + "\n")
    argv = ["prepare", "csv", "corpus", "--out", "manifests", "--slot", "size", "--exclude", "u1"]
    assert cli.main([*argv, "--json"]) == 0
    written = json.loads(printed()[0])
    assert set(written) == {"train", "dev", "test"}
    assert "slot_size" in Path(written["train"]).read_text()
    assert "u1" not in Path(written["train"]).read_text()
    assert cli.main(argv) == 0
    assert "--manifest train=" in printed()[0]


def test_conformance_of_an_empty_folder_fails(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["conformance", "empty", "--json"]) == 1
    assert json.loads(printed()[0])["passed"] is False


def test_the_installed_commands(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "run_superb.py"
    commands = [[sys.executable, "-m", "superb_probe.cli", "run"]]
    if script.is_file():
        commands.append([sys.executable, str(script)])
    for command in commands:
        done = subprocess.run(
            [*command, "--upsteam", "fbank"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 2
        assert "Did you mean --upstream" in done.stderr
        assert "Traceback" not in done.stderr


def write_manifests(folder: Path, changes: dict[str, dict[str, str]]) -> list[str]:
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
    task: str, changes: dict[str, dict[str, str]], named: list[str], printed: Printed, tmp_path: Path
) -> None:
    noise(tmp_path / "slow.wav", rate_hz=8000)
    (tmp_path / "text.wav").write_text("not audio")
    manifests = write_manifests(tmp_path, changes)
    manifests.append("trials=trials.tsv" if task == "asv" else "dev=dev.tsv")
    argv = ["run", "--upstream", "fbank_no_cmvn", "--task", task, "--manifest", *manifests, "--out", "runs"]
    assert cli.main([*argv, "--lr", "1e-3"]) == 2
    _, err = printed()
    assert "Traceback" not in err
    assert "extract" not in err
    assert [text for text in named if text not in err] == []
    assert not list((tmp_path / "runs").rglob("*.json"))
