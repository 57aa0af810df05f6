"""Settings: what is true of a machine (superb.yaml), what a sweep asks for, and which source wins.

Flag > environment > file > default. Unknown keys and wrong types are errors that name the file and the nearest key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superb_probe.errors import RequestError, all_at_once, nearest


@dataclass(frozen=True, slots=True)
class Flag:
    """One parameter of `run`: the same name in Python, on the command line (--long-form) and in a sweep file.

    Attributes:
        kind: "text", "integer", "number", "path", "boolean", "paths" (name=path), "options" (name=value), "layer" (an integer or
            all) or "amount" (a number with a unit, as text).
        many: takes several values.
        choices: the only values allowed; empty for any.
    """

    name: str
    kind: str
    help: str
    many: bool = False
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def option(self) -> str:
        """How it is typed on the command line."""
        return "--" + self.name.replace("_", "-")


RUN_FLAGS = (
    Flag(
        "upstream",
        "text",
        "encoders: registered names, hf:org/name, s3prl:name, features:DIR or ./file.py:function",
        True,
    ),
    Flag("task", "text", "tasks: registered names, ./file.py:function, or the suites all, superb10, paper4", True),
    Flag("checkpoint", "path", "weights of the encoder, any supported format (default: what ships with the name)"),
    Flag("size", "text", "size of an encoder without a checkpoint: test, tiny, small or base"),
    Flag("random", "integer", "random weights from this seed instead of trained ones", metavar="SEED"),
    Flag(
        "upstream_option",
        "options",
        "options of the encoder's own, e.g. causal_front_end=true",
        True,
        metavar="NAME=VALUE",
    ),
    Flag(
        "data",
        "paths",
        "corpora, e.g. librispeech=/corpora/LibriSpeech, or a name in superb.yaml",
        True,
        metavar="NAME=DIR",
    ),
    Flag(
        "manifest",
        "paths",
        "your own data: train=a.tsv dev=b.tsv test=c.tsv (asv: trials=t.tsv)",
        True,
        metavar="SPLIT=FILE",
    ),
    Flag("root", "path", "folder that audio paths of the manifests start from (default: each manifest's own)"),
    Flag("head", "text", "another head than the task's own"),
    Flag(
        "head_option",
        "options",
        "options of the head, e.g. width=256, or for asr lm=FILE",
        True,
        metavar="NAME=VALUE",
    ),
    Flag(
        "layer",
        "layer",
        "read one layer (0 is the first encoder layer's input) instead of the weighted sum; all: one probe a layer beside it",
        metavar="N|all",
    ),
    Flag("layer_norm", "boolean", "normalise every frame of every layer before the weighted sum"),
    Flag(
        "feature_dtype",
        "text",
        "type the states are kept in (default: float16; int8 has a scale for every frame)",
        choices=("float32", "float16", "bfloat16", "int8"),
    ),
    Flag(
        "crops", "integer", "random crops kept of a long training utterance; 0 encodes new ones each time", metavar="K"
    ),
    Flag("crop_seed", "integer", "draws where the kept crops begin (default: 0)"),
    Flag("budget", "text", "how much training: small, or full (the protocol's)", choices=("small", "full")),
    Flag("steps", "integer", "optimiser updates instead of the budget's; rows of another count share no table"),
    Flag("lr", "number", "learning rates; the best on dev is reported (default: the protocol's grid)", True),
    Flag("seed", "integer", "seeds of the probes (default: 1)", True),
    Flag("protocol", "text", "rules of selection (default: strict)", choices=("strict", "superb", "mamba_hubert")),
    Flag(
        "control", "text", "train on shuffled labels: what the probe scores without information", choices=("shuffle",)
    ),
    Flag("stop_hopeless", "boolean", "give up trials that have fallen behind others for good (recorded)"),
    Flag("device", "text", "auto, cpu, cuda or cuda:N (default: auto)"),
    Flag("out", "path", "folder of the records (default: results/runs)", metavar="DIR"),
    Flag("store", "path", "folder of extracted states, safe to delete", metavar="DIR"),
    Flag("store_limit", "amount", "most that the stores may take, e.g. 500GB", metavar="SIZE"),
    Flag("store_clean", "boolean", "delete the least recently used stores when --store-limit asks for room"),
    Flag(
        "states",
        "text",
        "where states are read from in training (default: the fastest place they fit in, as measured)",
        choices=("gpu", "memory", "disk", "stream"),
    ),
    Flag(
        "padding",
        "text",
        "exact (default): an utterance's states are its own; s3prl: those of s3prl's padded batches, encoded anew at every update",
        choices=("exact", "s3prl"),
    ),
    Flag("limit", "integer", "use only the first N utterances of each split (for trying things out)", metavar="N"),
    Flag("tier", "text", "quick: pr sid er ic on seeded subsets, a table of its own", choices=("quick",)),
    Flag("time_limit", "amount", "plan what fits into this time, e.g. 8h, and say what is dropped", metavar="TIME"),
    Flag("overwrite", "text", "records that may be replaced (default: never)", choices=("never", "failed", "always")),
    Flag("dry_run", "boolean", "print the plan: trials, extractions, gigabytes, minutes; train nothing"),
)
_RUN_FLAGS = {flag.name: flag for flag in RUN_FLAGS}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is true of this machine.

    Attributes:
        corpora: corpus roots by name: `--data librispeech` stands for `--data librispeech=<its root>`.
        store: folder of extracted states.
        device: "auto", "cpu", "cuda" or "cuda:N".
        out: folder of the records.
    """

    corpora: Mapping[str, Path]
    store: Path | None = None
    device: str | None = None
    out: Path | None = None


def load_settings(environment: Mapping[str, str] | None = None, file: Path | None = None) -> Settings:
    """The settings of this machine: SUPERB_PROBE_STORE, _DEVICE and _OUT over superb.yaml.

    Args:
        environment: variables; the process's own when None.
        file: the settings file; else SUPERB_PROBE_SETTINGS, else superb.yaml in the working directory if there is one.

    Raises:
        RequestError: for a file that is missing or not YAML, an unknown key or a wrong type; all of them at once.
    """
    environment = os.environ if environment is None else environment
    if file is None and environment.get("SUPERB_PROBE_SETTINGS"):
        file = Path(environment["SUPERB_PROBE_SETTINGS"])
    if file is None and Path("superb.yaml").is_file():
        file = Path("superb.yaml")
    values = _settings_values(file) if file is not None else {}
    for name in ("store", "device", "out"):
        if environment.get(f"SUPERB_PROBE_{name.upper()}"):
            values[name] = environment[f"SUPERB_PROBE_{name.upper()}"]
    return Settings(
        corpora=values.get("corpora", {}),
        store=Path(values["store"]) if "store" in values else None,
        device=values.get("device"),
        out=Path(values["out"]) if "out" in values else None,
    )


def _settings_values(file: Path) -> dict[str, Any]:
    values = read_yaml(file)
    problems = _unknown_keys(values, ("corpora", "store", "device", "out"))
    for name in ("store", "device", "out"):
        if name in values and not isinstance(values[name], str):
            problems.append(f"{name} must be text, found {values[name]!r}")
    corpora = values.get("corpora", {})
    if not isinstance(corpora, dict) or not all(isinstance(path, str) for path in corpora.values()):
        problems.append(f"corpora must map names to folders, found {corpora!r}")
    if problems:
        raise all_at_once(str(file), problems, "see docs/quickstart.md for the keys of superb.yaml")
    # paths in a file are relative to the file, not to where the command is typed
    for name in ("store", "out"):
        if name in values:
            values[name] = str(file.parent / Path(values[name]).expanduser())
    if "corpora" in values:
        values["corpora"] = {str(name): file.parent / Path(path).expanduser() for name, path in corpora.items()}
    return values


def named_roots(texts: Iterable[str], corpora: Mapping[str, Path]) -> dict[str, Path]:
    """The corpora of `--data`: NAME=DIR, or a NAME whose root superb.yaml knows.

    >>> named_roots(["a=/x", "b"], {"b": Path("/y")})
    {'a': PosixPath('/x'), 'b': PosixPath('/y')}

    Raises:
        RequestError: for a name without a root.
    """
    spelt = []
    for text in texts:
        if "=" not in text and text not in corpora:
            known = f"superb.yaml knows {', '.join(sorted(corpora))}" if corpora else "superb.yaml names no corpora"
            raise RequestError(f"--data {text}: where is it? {known}. Fix: --data {text}=FOLDER")
        spelt.append(text if "=" in text else f"{text}={corpora[text]}")
    return {name: Path(path).expanduser() for name, path in pairs(spelt, "--data").items()}


def read_sweep(file: Path) -> dict[str, Any]:
    """The parameters of `run` in a sweep file; paths are relative to the working directory, as on the command line.

    Raises:
        RequestError: for a file that is missing or not YAML, an unknown key or a wrong type; all of them at once.
    """
    values = read_yaml(file)
    problems = _unknown_keys(values, _RUN_FLAGS)
    parameters = {}
    for name in values.keys() & _RUN_FLAGS.keys():
        try:
            parameters[name] = typed(_RUN_FLAGS[name], values[name])
        except RequestError as error:
            problems.append(str(error))
    if problems:
        raise all_at_once(str(file), sorted(problems), "keys are the flags of `superb-probe run --help`, with _ for -")
    return {name: parameters[name] for name in _RUN_FLAGS if name in parameters}


def resolve(flags: Mapping[str, Any], sweep: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The arguments of `run`: flags over the sweep file over this machine's settings; what nobody says is left out.

    >>> resolve({"lr": [0.1]}, {"lr": [0.2], "seed": [1]}, Settings(corpora={}, device="cpu"))
    {'device': 'cpu', 'lr': [0.1], 'seed': [1]}
    """
    machine: dict[str, Any] = {"store": settings.store, "device": settings.device, "out": settings.out}
    given = {name: value for name, value in machine.items() if value is not None}
    given.update(sweep)
    given.update({name: value for name, value in flags.items() if value is not None})
    return dict(sorted(given.items()))


def typed(flag: Flag, value: Any) -> Any:
    """A value of a sweep file in the type `run` takes.

    YAML reads 1e-4 as text (its floats need a point): text that is a number counts as one.

    >>> typed(Flag("lr", "number", "", many=True), "1e-4")
    [0.0001]

    Raises:
        RequestError: for a wrong type or a value that is not among the choices.
    """
    if flag.kind in ("paths", "options"):
        if not isinstance(value, dict):
            raise RequestError(f"{flag.name} must map names to values, found {value!r}")
        return {str(name): Path(str(v)).expanduser() if flag.kind == "paths" else v for name, v in value.items()}
    if flag.many:
        return [_single(flag, entry) for entry in (value if isinstance(value, list) else [value])]
    return _single(flag, value)


def _single(flag: Flag, value: Any) -> Any:
    wrong = RequestError(f"{flag.name} must be {_KINDS[flag.kind]}, found {value!r}")
    if flag.kind == "boolean":
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    if flag.kind == "amount":
        return str(value)
    if flag.kind == "layer":
        return layer_value(value)
    if flag.kind in ("text", "path"):
        if not isinstance(value, str):
            raise wrong
        if flag.choices and value not in flag.choices:
            raise RequestError(f"{flag.name} must be {' or '.join(flag.choices)}, found {value!r}")
        return Path(value).expanduser() if flag.kind == "path" else value
    try:
        return int(value) if flag.kind == "integer" and float(value).is_integer() else _number(flag, value)
    except ValueError:
        raise wrong from None


def _number(flag: Flag, value: str | float) -> float:
    if flag.kind != "number":
        raise ValueError
    return float(value)


def layer_value(value: str | float) -> int | str:
    """A layer: its number, or "all".

    >>> layer_value("3"), layer_value("all")
    (3, 'all')

    Raises:
        RequestError: for anything else.
    """
    if value == "all":
        return "all"
    if not re.fullmatch(r"-?\d+", str(value)):
        raise RequestError(f"layer must be an integer or all, found {value!r}")
    return int(value)


def parse_bytes(text: str | int) -> int:
    """Bytes from "50GB", "1.5 TB", "800M" or a plain number; units are decimal.

    >>> parse_bytes("50GB"), parse_bytes("1.5 kB"), parse_bytes("12")
    (50000000000, 1500, 12)

    Raises:
        RequestError: for anything else.
    """
    units = {"": 1, "b": 1, **{name: size for unit, size in _BYTES.items() for name in (unit, f"{unit}b")}}
    return int(_amount(text, units, "a size: bytes, or a number with kB, MB, GB or TB, as 50GB"))


def parse_duration(text: str | float) -> float:
    """Seconds from "8h", "90m", "1.5d" or a plain number of seconds.

    >>> parse_duration("8h"), parse_duration("90m"), parse_duration("5")
    (28800.0, 5400.0, 5.0)

    Raises:
        RequestError: for anything else, and for nothing at all.
    """
    return _amount(
        text, {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}, "a time: seconds, or as 90m, 8h, 2d"
    )


_BYTES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _amount(text: str | float, units: Mapping[str, int], expected: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise RequestError(f"{text!r} is not {expected}")
    return float(found[1]) * units[found[2]]


_KINDS = {"text": "text", "path": "a path", "integer": "an integer", "number": "a number", "boolean": "true or false"}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file (`yaml.safe_load`).

    Raises:
        RequestError: if the file cannot be read, is not YAML or is not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(f"{file}: expected `key: value` lines, found {type(values).__name__}")
    return values


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """The pairs in "name=value" texts.

    >>> pairs(["train=a.tsv", "dev=b.tsv"], "--manifest")
    {'train': 'a.tsv', 'dev': 'b.tsv'}

    Raises:
        RequestError: for a text without "=", or a name given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise RequestError(f"{option} takes name=value, found {text!r}")
        if name in found:
            raise RequestError(f"{option} gives {name!r} twice")
        found[name] = value
    return found


def _unknown_keys(values: Mapping[Any, Any], known: Iterable[str]) -> list[str]:
    names = list(known)
    lines = []
    for key in values:
        if key not in names:
            close = nearest(str(key), names, 1)
            lines.append(f"unknown key {key!r}" + (f" (did you mean {close[0]}?)" if close else ""))
    return lines
