"""The command line itself: commands and their help, wrong requests, exit statuses, warnings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superb_probe import cli, commands_run
from superb_probe.errors import CheckError, RequestError

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
pytestmark = pytest.mark.usefixtures("own_folder")


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
    (["run", "--upstream", "fbank", "--task", "synthetic_sid", "--crop-seed", "-1"], "--crop-seed -1"),
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
    argv: list[str], named: str, printed: Printed, noise: Callable[..., Path], tmp_path: Path
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


def test_the_installed_commands(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "run_superb.py"
    commands = [[sys.executable, "-m", "superb_probe.cli", "run"]]
    if script.is_file():
        commands.append([sys.executable, str(script)])
    installed = Path(sys.executable).with_name("superb-probe")
    if installed.is_file():
        commands.append([str(installed), "run"])
    for command in commands:
        done = subprocess.run(
            [*command, "--upsteam", "fbank"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 2
        assert "Did you mean --upstream" in done.stderr
        assert "Traceback" not in done.stderr
