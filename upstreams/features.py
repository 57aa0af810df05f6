"""States computed elsewhere (JAX, a closed model, another machine): a folder with one array an utterance and an `info.json`.

`features:DIR` reads them. `DIR/<utterance id>.npy` holds the states of one utterance, (L, T, D), floating point, every frame
valid; `DIR/info.json` holds the fields of `UpstreamInfo` and `window_samples`, the shortest input that gives a frame, so that an
utterance of S samples has exactly (S - window_samples) // hop_samples + 1 frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import RequestError, all_at_once, nearest
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo

INFO_FILE = "info.json"
REQUIRED: Mapping[str, type] = {"name": str, "num_layers": int, "dim": int, "hop_samples": int, "window_samples": int}
OPTIONAL: Mapping[str, tuple[type | tuple[type, ...], Any]] = {
    "revision": (str, ""),
    "sample_rate_hz": (int, 16000),
    "waveform_norm": (str, "none"),
    "lookahead_samples": ((int, type(None)), None),
    "layer_convention": (str, "block_output"),
    "trained_on": (list, ["unknown"]),
    "license": (str, "unknown"),
    "citation": (str, "unknown"),
}
WORDS = {"waveform_norm": ("none", "utterance"), "layer_convention": ("block_output", "before_residual")}


class StoredFeatures(Upstream):
    """An upstream whose states lie on disk, found by utterance and not by waveform.

    Whoever extracts asks first whether an upstream has `states_for`; if so, it calls that and decodes no audio. `forward` cannot
    know the utterance and raises.
    """

    def __init__(self, folder: Path) -> None:
        """Reads info.json and the header of every array; `folder` is looked through once."""
        super().__init__()
        self.folder = folder
        self.files = {
            str(path.relative_to(folder))[: -len(".npy")].replace("\\", "/"): path for path in _arrays(folder)
        }
        fields, problems = _read_info(folder / INFO_FILE)
        self.window_samples: int = fields.pop("window_samples", 1)
        if not problems:
            problems = _array_problems(self.files, fields["num_layers"], fields["dim"])
        if not self.files:
            problems.append("no .npy file: one a utterance, named by its id, is expected")
        if problems:
            raise all_at_once(
                f"features:{folder}", problems, "the layout is described at the top of upstreams/features.py"
            )
        fields["revision"] = fields["revision"] or _content_digest(folder / INFO_FILE, self.files)
        self.info = UpstreamInfo(**{**fields, "trained_on": tuple(fields["trained_on"])})
        self.eval()

    def num_frames(self, num_samples: int) -> int:
        """Frames an utterance of that many samples has: what every stored array is held against."""
        return max(0, (num_samples - self.window_samples) // self.info.hop_samples + 1)

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """Raises: a waveform does not say which utterance it is.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            f"{self.info.name}: its states are stored by utterance and cannot be computed from a waveform. "
            "Fix: use states_for(utterance_id), as `superb-probe run` does; streaming and `check upstream` need the encoder itself."
        )

    def require(self, utterance_ids: Iterable[str]) -> None:
        """Whether every utterance asked for is there; all that are not are named at once.

        Raises:
            RequestError: if any is missing.
        """
        missing = [f"{name}: no {self.folder / name}.npy" for name in utterance_ids if name not in self.files]
        if missing:
            raise all_at_once(
                f"features:{self.folder}", missing, "compute these utterances too, or leave them out of the manifest"
            )

    def states_for(self, utterance_id: str) -> Tensor:
        """The states of one utterance, (L, T, D) float32.

        Raises:
            RequestError: if there is no such file, or its values are not finite.
        """
        if utterance_id not in self.files:
            close = nearest(utterance_id, self.files, 1)
            hint = f" Nearest: {close[0]}." if close else ""
            raise RequestError(
                f"features:{self.folder}: no states of utterance {utterance_id!r}.{hint} Fix: compute it too."
            )
        states = torch.from_numpy(np.load(self.files[utterance_id], allow_pickle=False).astype(np.float32))
        if not bool(states.isfinite().all()):
            count = int((~states.isfinite()).sum())
            raise RequestError(
                f"{self.files[utterance_id]}: {count} values are not finite. Fix: compute this utterance again."
            )
        return states


def _arrays(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RequestError(
            f"features:{folder}: no such folder. Fix: features:DIR, where DIR has {INFO_FILE} and the .npy files."
        )
    return sorted(folder.rglob("*.npy"))


def _read_info(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The fields of an info.json with defaults for those that may be left out, and everything wrong with it."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"no {INFO_FILE}"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{INFO_FILE}: not JSON ({error})"]
    if not isinstance(given, dict):
        return {}, [f"{INFO_FILE}: a {type(given).__name__}, expected an object"]
    known = [*REQUIRED, *OPTIONAL]
    problems = []
    for key in sorted(set(given) - set(known)):
        close = nearest(key, known, 1)
        problems.append(f"{INFO_FILE}: unknown key {key!r}" + (f" (did you mean {close[0]}?)" if close else ""))
    problems += [f"{INFO_FILE}: no {key!r}" for key in REQUIRED if key not in given]
    kinds = {**REQUIRED, **{key: kind for key, (kind, _) in OPTIONAL.items()}}
    for key, kind in kinds.items():
        value = given.get(key)
        if key not in given:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            problems.append(f"{INFO_FILE}: {key} is {value!r}, a {type(value).__name__}")
        elif isinstance(value, int) and value < (0 if key == "lookahead_samples" else 1):
            problems.append(f"{INFO_FILE}: {key} is {value}")
        elif key in WORDS and value not in WORDS[key]:
            problems.append(f"{INFO_FILE}: {key} is {value!r}, expected {' or '.join(WORDS[key])}")
    if isinstance(given.get("trained_on"), list) and not all(isinstance(item, str) for item in given["trained_on"]):
        problems.append(f"{INFO_FILE}: trained_on has an item that is no text")
    return {**{key: default for key, (_, default) in OPTIONAL.items()}, **given}, problems


def _array_problems(files: Mapping[str, Path], num_layers: int, dim: int) -> list[str]:
    """What is wrong with the arrays, by their headers only."""
    problems = []
    for name, path in files.items():
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            problems.append(f"{name}.npy: cannot be read ({error})")
            continue
        if array.ndim != 3 or array.shape[0] != num_layers or array.shape[2] != dim:
            problems.append(f"{name}.npy: shape {array.shape}, expected ({num_layers}, T, {dim})")
        elif array.dtype.kind != "f":
            problems.append(f"{name}.npy: {array.dtype}, expected a floating point type")
    return problems


def _content_digest(info: Path, files: Mapping[str, Path]) -> str:
    """The sha256 of everything in the folder: read once, when info.json gives no revision."""
    digest = hashlib.sha256(info.read_bytes())
    for name, path in files.items():
        digest.update(f"\n{name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def build(folder: str) -> StoredFeatures:
    """The states stored in a folder, as an upstream: what `features:DIR` builds.

    Args:
        folder: with info.json and the arrays.

    Raises:
        RequestError: with everything wrong in it at once.
    """
    return StoredFeatures(Path(folder))
