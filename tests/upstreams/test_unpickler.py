"""The reader of torch files reads what torch writes and runs nothing of what a file names."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams import unpickler
from superb_probe.upstreams.unpickler import ForeignObject, plain, read_torch_file


class Runs:
    """Pickles as a call of any function: what a malicious file does."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_writes(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    written = {
        "view": base[:, 1:3],
        "transposed": base.T,
        "shared": base,
        "half": torch.ones(2, 3, dtype=torch.float16),
        "bfloat16": torch.full((2,), 1.5, dtype=torch.bfloat16),
        "integers": torch.tensor([1, -2]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([3, 4]),
        "dtype": torch.float16,
        "plain": [1, 2.5, "text", None, True, {"a": (1, 2)}, {3, 4}],
        "ordered": collections.OrderedDict(b=1, a=2),
    }
    path = tmp_path / "file.pt"
    torch.save(written, path, _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(path)
    assert list(found) == list(written)
    for key, value in written.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value.detach()), key
        else:
            assert found[key] == value, key


def test_reads_numpy_scalars_and_keeps_arrays_inert(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"best": np.float64(0.25), "count": np.int64(7), "array": np.ones(3)}, path)
    found = read_torch_file(path)
    assert (found["best"], found["count"]) == (0.25, 7)
    assert isinstance(found["array"], ForeignObject)
    assert plain({"best": found["best"]}) == {"best": 0.25}


def foreign_module(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """A module that exists while the file is written and is gone when it is read."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    return sys.modules[name]


def test_foreign_classes_become_inert_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = foreign_module(monkeypatch, "fairseq.data.dictionary")
    for name, kind in {
        "Dictionary": type("Dictionary", (), {"__module__": module.__name__}),
        "Choice": enum.Enum("Choice", {"gelu": "gelu"}, module=module.__name__),
        "Meters": type("Meters", (collections.OrderedDict,), {"__module__": module.__name__}),
    }.items():
        setattr(module, name, kind)
    dictionary = module.Dictionary()
    dictionary.symbols = ["<s>", "0"]
    written = {
        "dictionary": dictionary,
        "choice": module.Choice.gelu,
        "meters": module.Meters(a=1),
        "args": argparse.Namespace(lr=[0.1], name="hubert"),
        "types": [Any, Optional[str], list[int], type(None), int],  # noqa: UP045
    }
    path = tmp_path / "file.pt"
    torch.save(written, path)
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.delitem(sys.modules, name)
    found = read_torch_file(path)
    assert found["dictionary"].state["symbols"] == ["<s>", "0"]
    assert found["dictionary"].qualified_name == "fairseq.data.dictionary.Dictionary"
    assert plain(found["choice"]) == "gelu"
    assert plain(found["meters"]) == {"a": 1}
    assert plain(found["args"]) == {"lr": [0.1], "name": "hubert"}
    assert "fairseq" not in sys.modules


def test_configuration_nodes_become_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = foreign_module(monkeypatch, "omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    module.AnyNode = type("AnyNode", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    leaf, inner, outer = module.AnyNode(), module.DictConfig(), module.DictConfig()
    leaf.__dict__.update(_val=48, _parent=inner)
    inner.__dict__.update(_content={"encoder_embed_dim": leaf}, _parent=outer)
    outer.__dict__.update(_content={"model": inner}, _parent=None)
    path = tmp_path / "file.pt"
    torch.save({"cfg": outer}, path)
    assert plain(read_torch_file(path)["cfg"]) == {"model": {"encoder_embed_dim": 48}}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, io.open, torch.load, pickle.loads])
def test_a_malicious_file_runs_nothing(tmp_path: Path, function: Any, legacy: bool) -> None:
    marker = tmp_path / "marker"
    arguments = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')", io.open: str(marker)}
    written = {
        "cfg": {},
        "model": Runs(function, arguments.get(function, "x"), *(["w"] if function is io.open else [])),
    }
    path = tmp_path / "file.pt"
    torch.save(written, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RequestError, match=f"{function.__name__}.*nothing was run") as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_the_malicious_file_would_run_without_the_closed_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: with Python's own `find_class` the marker appears."""
    marker = tmp_path / "marker"
    path = tmp_path / "file.pt"
    torch.save({"model": Runs(os.system, f"touch {marker}")}, path)
    monkeypatch.setattr(unpickler._Unpickler, "find_class", pickle.Unpickler.find_class)
    read_torch_file(path)
    assert marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}U\x05_callNs0b.",  # BUILD on a function
        b"cfairseq.meters\nMeter\n}U\x03runNs0b.",  # BUILD on a stand-in class
        b"cnumpy\ndtype\n}U\x03runNs0b.",
        b"ccollections\nOrderedDict\nN}U\x03runNs\x860b.",
        b"ctorch\nFloatStorage\nN}U\x05dtypeNs\x86b.",
    ],
)
def test_a_file_cannot_write_to_what_it_is_given(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", b"\x80\x02" + opcodes)
    with pytest.raises(RequestError, match="expected a torch checkpoint"):
        read_torch_file(path)


def storage_pickle(numel: int, size: int) -> bytes:
    """A pickle of one tensor whose numbers are claimed to be `numel` in the storage and `size` in the tensor."""

    storage = frozenset({"any object"})

    class Writer(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if thing is storage else None

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = (storage, 0, (size,), (1,), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    stream = io.BytesIO()
    Writer(stream, 2).dump({"a": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(("numel", "size", "right"), [(4, 4, True), (4, 5, False), (5, 4, False), (4, -1, False)])
def test_a_tensor_cannot_reach_past_its_storage(tmp_path: Path, numel: int, size: int, right: bool) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", storage_pickle(numel, size))
        archive.writestr("file/data/0", np.arange(4, dtype="<f4").tobytes())
    if right:
        assert read_torch_file(path)["a"].tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(RequestError, match="past the end|expected 5 numbers|of size"):
            read_torch_file(path)


def test_damaged_and_foreign_files_say_what_they_are(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(1000.0)}, whole)
    data = whole.read_bytes()
    changed = bytearray(data)
    changed[data.index(torch.arange(1000.0).numpy().tobytes()) + 8] ^= (
        1  # one bit of one number: the archive's checksum sees it
    )
    cases = {
        "half.pt": (data[: len(data) // 2], "a zip archive cut short"),
        "changed.pt": (bytes(changed), "Bad CRC-32"),
        "empty.pt": (b"", "an empty file"),
        "text.pt": (b"once upon a time\n" * 9, "text"),
        "wave.pt": (b"RIFF\x24\x00\x00\x00WAVEfmt \x10", "a WAVE file"),
        "pickle.pt": (pickle.dumps({"a": 1}), "not one of torch's|a pickle"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=words):
            read_torch_file(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(RequestError, match="without data.pkl"):
        read_torch_file(tmp_path / "other.pt")
    with pytest.raises(RequestError, match="no such file"):
        read_torch_file(tmp_path / "absent.pt")


def test_a_truncated_file_of_the_older_format_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(100.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RequestError, match="4 bytes short"):
        read_torch_file(path)
