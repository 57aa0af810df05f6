"""Stored states: what is read back, and what a broken folder says, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams.features import StoredFeatures, build

INFO: dict[str, Any] = {"name": "closed", "num_layers": 3, "dim": 4, "hop_samples": 320, "window_samples": 400}


def _write(folder: Path, info: Any = INFO, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    for name, array in (arrays or {"one": np.ones((3, 5, 4), np.float16)}).items():
        path = folder / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, array)
    return folder


def test_states_are_found_by_utterance(tmp_path: Path) -> None:
    arrays = {"one": np.arange(60, dtype=np.float32).reshape(3, 5, 4), "speaker__two": np.zeros((3, 2, 4), np.float16)}
    upstream = build(str(_write(tmp_path, **arrays)))
    assert isinstance(upstream, StoredFeatures)
    states = upstream.states_for("one")
    assert states.dtype == torch.float32
    assert torch.equal(states, torch.from_numpy(arrays["one"]))
    assert upstream.states_for("speaker/two").shape == (3, 2, 4)
    assert (upstream.info.num_layers, upstream.info.dim, upstream.info.lookahead_samples) == (3, 4, None)
    assert [upstream.num_frames(n) for n in (0, 399, 400, 719, 720)] == [0, 0, 1, 1, 2]
    assert upstream.info.trained_on == ("unknown",)  # somebody's encoder made them


def test_the_revision_is_the_content(tmp_path: Path) -> None:
    first = build(str(_write(tmp_path / "a"))).info.revision
    assert first == build(str(_write(tmp_path / "b"))).info.revision
    changed = np.ones((3, 5, 4), np.float16)
    changed[2, 4, 3] = 2
    assert first != build(str(_write(tmp_path / "c", one=changed))).info.revision
    assert first.startswith("sha256:")
    assert build(str(_write(tmp_path / "d", {**INFO, "revision": "v7"}))).info.revision == "v7"


def test_a_broken_folder_names_everything_at_once(tmp_path: Path) -> None:
    info = {"name": 7, "num_layers": 3, "dim": 0, "hop_sample": 320, "window_samples": 400, "waveform_norm": "batch"}
    with pytest.raises(RequestError) as caught:
        build(str(_write(tmp_path / "info", info)))
    for part in (
        "name is 7",
        "dim is 0",
        "unknown key 'hop_sample' (did you mean hop_samples?)",
        "no 'hop_samples'",
        "'batch'",
    ):
        assert part in str(caught.value)
    arrays = {
        "layers": np.ones((2, 5, 4), np.float32),
        "whole": np.ones((3, 5, 4), np.int16),
        "flat": np.ones((3, 4), np.float32),
        "good": np.ones((3, 9, 4), np.float32),
    }
    folder = _write(tmp_path / "arrays", **arrays)
    (folder / "text.npy").write_text("no array")
    with pytest.raises(RequestError) as caught:
        build(str(folder))
    for part in (
        "4 problems",
        "layers.npy: shape (2, 5, 4)",
        "whole.npy: int16",
        "flat.npy: shape (3, 4)",
        "text.npy: cannot be read",
    ):
        assert part in str(caught.value)
    assert "good.npy" not in str(caught.value)


@pytest.mark.parametrize(("info", "says"), [("{", "not JSON"), ("[]", "expected an object"), (None, "no info.json")])
def test_a_broken_info(tmp_path: Path, info: str | None, says: str) -> None:
    _write(tmp_path, info or "{}")
    if info is None:
        (tmp_path / "info.json").unlink()
    with pytest.raises(RequestError, match=says):
        build(str(tmp_path))


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        build(str(tmp_path / "absent"))
    (tmp_path / "info.json").write_text(json.dumps(INFO))
    with pytest.raises(RequestError, match="no .npy file"):
        build(str(tmp_path))


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    np.save(folder / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RequestError, match="evil.npy: cannot be read"):
        build(str(folder))


def test_missing_utterances_and_values(tmp_path: Path) -> None:
    bad = np.ones((3, 5, 4), np.float32)
    bad[1, 2, 3] = np.nan
    upstream = build(str(_write(tmp_path, good=np.ones((3, 5, 4), np.float32), bad=bad)))
    with pytest.raises(RequestError, match="1 values are not finite"):
        upstream.states_for("bad")
    with pytest.raises(RequestError, match="Nearest: good"):
        upstream.states_for("goood")
    upstream.require(["good", "bad"])
    with pytest.raises(RequestError, match="2 problems(.|\n)*u1(.|\n)*u2"):
        upstream.require(["good", "u1", "u2"])


def test_a_waveform_does_not_say_which_utterance_it_is(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="states_for"):
        build(str(_write(tmp_path))).extract([torch.zeros(16000)])
