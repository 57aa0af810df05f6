"""Settings: which source wins, and what a file may say."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from superb_probe.errors import RequestError
from superb_probe.settings import RUN_FLAGS, Settings, load_settings, named_roots, pairs, read_sweep, resolve

FLAGS = {flag.name: flag for flag in RUN_FLAGS}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "superb.yaml"
    file.write_text("corpora:\n  librispeech: corpora/LibriSpeech\nstore: /fast/store\ndevice: cpu\nout: runs\n")
    return file


def test_nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}) == Settings(corpora={})


def test_the_file_in_the_working_directory(machine: Path) -> None:
    settings = load_settings({})
    assert settings.store == Path("/fast/store")
    assert settings.device == "cpu"
    assert settings.out is not None
    assert settings.out.resolve() == machine.parent / "runs"
    assert settings.corpora["librispeech"].resolve() == machine.parent / "corpora" / "LibriSpeech"


def test_paths_in_a_file_start_from_the_file(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = machine.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_settings({}).store is None
    assert load_settings({"SUPERB_PROBE_SETTINGS": str(machine)}).out == machine.parent / "runs"


def test_flag_over_environment_over_file(machine: Path) -> None:
    environment = {"SUPERB_PROBE_STORE": "/from/environment", "SUPERB_PROBE_DEVICE": "cuda"}
    settings = load_settings(environment)
    assert (settings.store, settings.device) == (Path("/from/environment"), "cuda")
    chosen = resolve({"store": Path("/from/flag"), "device": None}, {}, settings)
    assert chosen["store"] == Path("/from/flag")
    assert chosen["device"] == "cuda"
    assert resolve({}, {}, load_settings({}))["device"] == "cpu"
    assert "device" not in resolve({}, {}, Settings(corpora={}))


def test_flag_over_sweep_over_machine(machine: Path) -> None:
    sweep = {"device": "cuda:1", "seed": [1, 2]}
    assert resolve({"seed": [3]}, sweep, load_settings({})) == {
        "device": "cuda:1",
        "seed": [3],
        "store": Path("/fast/store"),
        "out": Path("runs"),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stor: /x", "did you mean store"),
        ("store: 3", "store must be text"),
        ("corpora: [a, b]", "corpora must map"),
        ("corpora:\n  a: 3", "corpora must map"),
        ("- a\n- b", "expected `key: value` lines"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("stor: 1\ndevice: 2", r"(?s)2 problems.*stor.*device"),
    ],
)
def test_wrong_settings_files(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "superb.yaml"
    file.write_text(text)
    with pytest.raises(RequestError, match=named) as caught:
        load_settings({}, file)
    assert str(file) in str(caught.value)


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        load_settings({"SUPERB_PROBE_SETTINGS": str(tmp_path / "none.yaml")})


def test_sweep_values_have_the_types_of_run(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "upstream: [fbank, mamba_hubert]\ntask: asr\nlr: [1e-4, 0.001, 1.0e-2, 1]\nseed: 3\nlayer_norm: true\nlimit: '5'\n"
        "manifest: {train: a.tsv, dev: b.tsv, test: c.tsv}\nupstream_option: {strict_causal: true, x: 3}\nstore: s\n"
    )
    assert read_sweep(file) == {
        "upstream": ["fbank", "mamba_hubert"],
        "task": ["asr"],
        "lr": [1e-4, 1e-3, 1e-2, 1.0],
        "seed": [3],
        "layer_norm": True,
        "limit": 5,
        "manifest": {"train": Path("a.tsv"), "dev": Path("b.tsv"), "test": Path("c.tsv")},
        "upstream_option": {"strict_causal": True, "x": 3},
        "store": Path("s"),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("upsteam: fbank", "did you mean upstream"),
        ("lr: fast", "lr must be a number"),
        ("seed: 1.5", "seed must be an integer"),
        ("seed: true", "seed must be an integer"),
        ("layer_norm: 1", "layer_norm must be true or false"),
        ("protocol: strickt", "protocol must be strict or superb or mamba_hubert"),
        ("manifest: a.tsv", "manifest must map"),
        ("upstream: 3", "upstream must be text"),
        ("checkpoint: 3", "checkpoint must be a path"),
        ("limit: [1, 2]", "limit must be an integer"),
        ("lr: x\nseed: y", r"(?s)2 problems.*lr.*seed"),
    ],
)
def test_wrong_sweeps(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(RequestError, match=named):
        read_sweep(file)


def test_every_flag_is_a_parameter_of_run_and_the_other_way_round() -> None:
    from superb_probe.engine import run

    assert set(inspect.signature(run).parameters) == set(FLAGS)


@pytest.mark.parametrize(("texts", "named"), [(["a"], "name=value"), (["=b"], "name=value"), (["a=1", "a=2"], "twice")])
def test_wrong_pairs(texts: list[str], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        pairs(texts, "--manifest")


def test_a_corpus_by_name_needs_a_root() -> None:
    with pytest.raises(RequestError, match=r"superb\.yaml knows b"):
        named_roots(["a"], {"b": Path("/b")})
    with pytest.raises(RequestError, match="names no corpora"):
        named_roots(["a"], {})


def test_options_of_choices() -> None:
    choices: dict[str, Any] = {name: flag.choices for name, flag in FLAGS.items() if flag.choices}
    assert choices["overwrite"] == ("never", "failed", "always")
    assert FLAGS["layer_norm"].option == "--layer-norm"
