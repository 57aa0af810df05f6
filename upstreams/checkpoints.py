"""Checkpoints of HuBERT encoders: read in any of four formats told apart by their content, written and converted.

The formats: fairseq's `.pt`, the `.pt` that s3prl converts it to, a folder of the transformers library, and the project's own
pair `NAME.safetensors` and `NAME.json`. Reading runs no code from a file and checks every name and shape before use.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from superb_probe.errors import RequestError, all_at_once, nearest
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.fairseq_format import Content, from_fairseq, from_s3prl, to_s3prl
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.transformers_format import (
    from_transformers,
    read_json,
    read_safetensors,
    to_transformers,
    weight_paths,
)
from superb_probe.upstreams.unpickler import read_torch_file

FORMAT = "superb-probe/checkpoint/1"
_S3PRL_KEYS = ("task_cfg", "model_cfg", "model_weight")
_CHOICES = {
    "layer_type": ("transformer", "mamba", "ext_bi_mamba", "inn_bi_mamba", "mamba2"),
    "extractor_mode": ("default", "layer_norm", "causal"),
    "waveform_norm": ("none", "utterance"),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of one HuBERT encoder and what is known of them.

    Attributes:
        config: the encoder's shape.
        tensors: fairseq's names to float32 tensors: what `HubertEncoder(config).load_state_dict` takes.
        revision: "sha256:" and the digest of the file's bytes (of all files that were read, for folders and pairs).
        source_format: "fairseq", "s3prl", "transformers" or "superb-probe".
        name: the registered name the weights were made under; empty if the format has no place for it.
        trained_on: corpora seen in pre-training; ("unknown",) where the file does not say.
        license: licence of the weights; "unknown" where the file does not say.
        citation: what to cite for the weights; empty where the file does not say.
        labels: symbols of the pre-training dictionaries.
        notes: what was read differently from what the file says.
        metadata: free text of whoever wrote the file.
    """

    config: HubertConfig
    tensors: Mapping[str, Tensor]
    revision: str
    source_format: str
    name: str = ""
    trained_on: tuple[str, ...] = ("unknown",)
    license: str = "unknown"
    citation: str = ""
    labels: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path, whichever of the formats it is in.

    Args:
        path: a `.pt` file, a transformers folder, or of the own format the `.safetensors`, the `.json` or a folder with one pair.

    Raises:
        RequestError: if nothing is there, or it is truncated, of another kind or does not fit the encoder it describes; what was
            expected and what was found is said for every tensor at once.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RequestError(
            f"{path}: no such checkpoint. Fix: give the path of a .pt or .safetensors file, or of a folder."
        )
    if path.is_dir() and (path / "config.json").is_file() and "model_type" in read_json(path / "config.json"):
        extra = [path / "preprocessor_config.json"]
        files = [path / "config.json", *weight_paths(path), *(file for file in extra if file.is_file())]
        return _checkpoint(path, from_transformers(path), "transformers", files)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        return _read_own(*_pair(path))
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        raise _foreign(path, f"a {type(content).__name__}")
    try:
        if all(key in content for key in _S3PRL_KEYS):
            return _checkpoint(path, from_s3prl(content), "s3prl", [path])
        if "model" in content and ("cfg" in content or "args" in content):
            return _checkpoint(path, from_fairseq(content), "fairseq", [path])
    except RequestError as error:
        raise error if str(error).startswith(str(path)) else RequestError(f"{path}: {error}") from error
    keys = [str(key) for key in content]
    raise _foreign(path, f"{len(keys)} entries: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}")


def write_checkpoint(
    path: str | Path,
    config: HubertConfig,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    trained_on: tuple[str, ...],
    license: str,
    citation: str = "",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write the project's own format: `NAME.safetensors` and, beside it, `NAME.json`.

    Args:
        path: the `.safetensors` file to write; both files are replaced whole or not at all.
        config: the encoder's shape.
        tensors: what `HubertEncoder(config).state_dict()` gives; checked against it.
        name: registered name the weights are for.
        trained_on: corpora seen in pre-training; () for random weights.
        license: licence of the weights.
        citation: what to cite.
        metadata: free text, e.g. the recipe.
        dtype: element type on disk; float16 halves the file, and reading gives float32 again.

    Returns:
        The revision `read_checkpoint` will give.

    Raises:
        RequestError: if the tensors do not fit the config, or the path does not end in .safetensors.

    >>> from superb_probe.upstreams.sizes import size_config
    >>> encoder = HubertEncoder(size_config("mamba_hubert", "test"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "mine.safetensors"
    ...     written = write_checkpoint(path, encoder.config, encoder.state_dict(), name="", trained_on=("mini",), license="MIT")
    ...     read_checkpoint(path).revision == written
    True
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise RequestError(f"{path}: expected a name that ends in .safetensors.")
    check_tensors(config, tensors, str(path))
    stored = {key: tensor.detach().cpu().to(dtype).contiguous() for key, tensor in tensors.items()}
    weights = safetensors.torch.save(stored, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "name": name,
        "config": asdict(config),
        "trained_on": list(trained_on),
        "license": license,
        "citation": citation,
        "metadata": dict(metadata or {}),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, weights)
    _replace(path.with_suffix(".json"), text.encode("utf-8"))
    return _revision([path, path.with_suffix(".json")])


def convert_checkpoint(source: str | Path, target: str | Path, target_format: str) -> Path:
    """Write a checkpoint in another format.

    Args:
        source: a checkpoint in any format.
        target: the `.safetensors` file, `.pt` file or folder to write.
        target_format: "superb-probe", "s3prl" or "transformers".

    Returns:
        `target`.

    Raises:
        RequestError: if the source is unreadable or the target format has no words for the encoder.
    """
    checkpoint, target = read_checkpoint(source), Path(target)
    if target_format == "superb-probe":
        write_checkpoint(
            target,
            checkpoint.config,
            checkpoint.tensors,
            name=checkpoint.name,
            trained_on=checkpoint.trained_on,
            license=checkpoint.license,
            citation=checkpoint.citation,
            metadata={**checkpoint.metadata, "converted_from": checkpoint.revision},
        )
    elif target_format == "s3prl":
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(to_s3prl(checkpoint.config, checkpoint.tensors, checkpoint.labels), target)
    elif target_format == "transformers":
        to_transformers(checkpoint.config, checkpoint.tensors, target)
    else:
        raise RequestError(f"unknown format {target_format!r}: expected superb-probe, s3prl or transformers.")
    return target


def check_tensors(config: HubertConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes with the encoder that `config` describes.

    Raises:
        RequestError: with every missing, unexpected, misshapen or non-finite tensor.
    """
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in HubertEncoder(config).state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise RequestError(f"{where}: its config describes no encoder: {error}") from error
    problems = [f"{name}: missing, expected {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"{name}: unexpected, {tuple(t.shape)}" for name, t in tensors.items() if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"{name}: expected {expected[name]}, found {tuple(tensor.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name}: expected floating-point numbers, found {tensor.dtype}")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite")
    if problems:
        kind = f"{config.layer_type} HuBERT of {config.num_layers} layers of width {config.dim}"
        raise all_at_once(
            f"{where}: the tensors are not those of a {kind}", problems, "check that it is the right file"
        )


def _checkpoint(path: Path, content: Content, source_format: str, files: list[Path]) -> Checkpoint:
    check_tensors(content.config, content.tensors, str(path))
    return Checkpoint(
        config=content.config,
        tensors={name: tensor.float().contiguous() for name, tensor in content.tensors.items()},
        revision=_revision(files),
        source_format=source_format,
        labels=content.labels,
        notes=content.notes,
    )


def _pair(path: Path) -> tuple[Path, Path]:
    if path.is_dir():
        found = sorted(file for file in path.glob("*.safetensors") if file.with_suffix(".json").is_file())
        if len(found) != 1:
            files = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
            raise RequestError(
                f"{path}: expected a transformers folder (config.json with model_type) or one pair NAME.safetensors and "
                f"NAME.json, found {len(found)} pairs among: {files}. Fix: give the path of one checkpoint."
            )
        path = found[0]
    weights, description = path.with_suffix(".safetensors"), path.with_suffix(".json")
    for file in (weights, description):
        if not file.is_file():
            raise RequestError(
                f"{path}: expected {weights.name} and {description.name}, found no {file.name} beside it."
            )
    return weights, description


def _read_own(weights: Path, description: Path) -> Checkpoint:
    found = read_json(description)
    if found.get("format") != FORMAT:
        raise RequestError(f"{description}: expected format {FORMAT!r}, found {found.get('format')!r}.")
    expected: dict[str, type] = {
        "name": str,
        "config": dict,
        "trained_on": list,
        "license": str,
        "citation": str,
        "metadata": dict,
        "weights_sha256": str,
    }
    problems = [f"{key}: missing" for key in expected if key not in found]
    problems += [f"{key}: unknown" for key in found if key not in expected and key != "format"]
    problems += [
        f"{key}: expected {kind.__name__}, found {found[key]!r}"
        for key, kind in expected.items()
        if key in found and not isinstance(found[key], kind)
    ]
    if problems:
        raise all_at_once(
            str(description), problems, "write it with superb_probe.upstreams.checkpoints.write_checkpoint"
        )
    tensors = read_safetensors(weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != found["weights_sha256"]:
        raise RequestError(
            f"{weights}: expected the weights {description.name} describes (sha256 {found['weights_sha256'][:12]}...), "
            f"found {digest[:12]}.... Fix: copy both files of the pair again."
        )
    config = config_from_dict(found["config"], str(description))
    check_tensors(config, tensors, str(weights))
    return Checkpoint(
        config=config,
        tensors={name: tensor.float().contiguous() for name, tensor in tensors.items()},
        revision=_revision([weights, description]),
        source_format="superb-probe",
        name=found["name"],
        trained_on=tuple(str(corpus) for corpus in found["trained_on"]),
        license=found["license"],
        citation=found["citation"],
        metadata={str(key): str(value) for key, value in found["metadata"].items()},
    )


def config_from_dict(found: Mapping[str, Any], where: str) -> HubertConfig:
    """The config in a description; every field must be there, with its type.

    Raises:
        RequestError: naming every missing, unknown or wrong field.

    >>> from dataclasses import asdict
    >>> config_from_dict(asdict(HubertConfig(dim=384)), "here").dim
    384
    """
    known = {item.name: getattr(HubertConfig(), item.name) for item in fields(HubertConfig)}
    problems = [f"{name}: missing" for name in known if name not in found]
    for name, value in found.items():
        if name not in known:
            close = nearest(name, known, 1)
            problems.append(f"{name}: unknown" + (f", did you mean {close[0]}?" if close else ""))
        elif name == "conv_layers":
            if not _is_conv_layers(value):
                problems.append(f"{name}: expected a list of [channels, kernel, stride], found {value!r}")
        elif type(value) is not type(known[name]):
            problems.append(f"{name}: expected {type(known[name]).__name__}, found {value!r}")
        elif name in _CHOICES and value not in _CHOICES[name]:
            problems.append(f"{name}: expected {' or '.join(_CHOICES[name])}, found {value!r}")
        elif isinstance(value, int) and value < 0:
            problems.append(f"{name}: expected at least 0, found {value}")
    if problems:
        raise all_at_once(
            f"{where}: config", problems, "write it with superb_probe.upstreams.checkpoints.write_checkpoint"
        )
    values = {**found, "conv_layers": tuple((layer[0], layer[1], layer[2]) for layer in found["conv_layers"])}
    return HubertConfig(**values)


def _is_conv_layers(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(
            isinstance(layer, (list, tuple)) and len(layer) == 3 and all(type(n) is int and n > 0 for n in layer)
            for layer in value
        )
    )


def _foreign(path: Path, found: str) -> RequestError:
    return RequestError(
        f"{path}: expected a HuBERT checkpoint of fairseq (keys cfg or args, model) or of s3prl (keys {', '.join(_S3PRL_KEYS)}), "
        f"found {found}. Fix: check that it is the right file."
    )


def _revision(files: list[Path]) -> str:
    """The digest of one file, or of the digests of several in their order."""
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        digests.append(digest.hexdigest())
    one = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return f"sha256:{one}"


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
