"""A reader of torch files that runs no code from them.

Tensors and plain containers are rebuilt, known foreign classes become inert records, any other global named in the file is an error.

`torch.load` is not used: the format is a zip archive of one pickle (`data.pkl`) and one raw file a storage (`data/N`); before
torch 1.6 it was a row of pickles followed by the storages. Both are read here with `pickle.Unpickler` whose `find_class` answers
from a closed list. What it hands out is made anew for each file and cannot be written to, so that a file cannot change this
program either.
"""

from __future__ import annotations

import math
import pickle
import struct
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import RequestError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}

# Built-in types that cannot be changed from outside and whose constructors have no effect beyond their result.
_PLAIN_TYPES: dict[tuple[str, str], Any] = {
    (
        "__builtin__",
        "unicode",
    ): str,  # Python 3's str and int in pickles that Python 2 could read, which is what torch writes
    ("__builtin__", "long"): int,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (dict, list, tuple, set)},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (frozenset, int, float)},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (str, bool, complex)},
}

# Packages whose classes appear in HuBERT checkpoints and are kept as `ForeignObject`, never imported.
_FOREIGN_PACKAGES = frozenset({"fairseq", "omegaconf", "argparse", "hydra", "s3prl", "typing", "enum", "pathlib"})
_NUMPY_KINDS = frozenset("biufcSU")


class ForeignObject:
    """An inert stand-in for an object of a class that is not imported: the name of the class and what the file holds of it.

    Attributes:
        qualified_name: module and class, e.g. "fairseq.data.dictionary.Dictionary".
        arguments: what its constructor would have been called with.
        state: its attributes, as pickled.
    """

    qualified_name = ""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """`arguments` are kept and nothing is called; a pickle may make an object without calling this."""
        self.__dict__["arguments"] = arguments

    @property
    def items(self) -> dict[Any, Any]:
        """Keys and values."""
        found: dict[Any, Any] = self.__dict__.setdefault("_items", {})
        return found

    @property
    def elements(self) -> list[Any]:
        """Elements of a list."""
        found: list[Any] = self.__dict__.setdefault("_elements", [])
        return found

    def __setstate__(self, state: Any) -> None:
        """Keep what the file says the attributes are."""
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep one item of a mapping."""
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keep one element of a list."""
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        """Keep several elements of a list."""
        self.elements.extend(list(values))

    def __repr__(self) -> str:
        """The class it stands for."""
        return f"<inert {self.qualified_name}>"


class _Function:
    """A function a pickle may call: not a plain function, because a pickle can write to the attributes of one."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"the file tries to set {name!r} of a function")


class _NumpyType:
    """A numpy dtype as pickled; a real one is shared by the whole program, so a pickle does not get it."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in _NUMPY_KINDS:
            raise pickle.UnpicklingError(f"a numpy dtype {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = ">" if code[:1] == ">" else "<"

    def __setstate__(self, state: Any) -> None:
        """Only the byte order is read."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class _StorageType:
    """The token of a storage's element type."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"the file tries to set {name!r} of a storage type")


def read_torch_file(path: str | Path) -> Any:
    """The object a torch file holds, read without running anything the file names.

    Args:
        path: a file written by `torch.save`, in the zip format or the one before torch 1.6.

    Returns:
        Plain containers, numbers, strings, numpy scalars, tensors on the CPU and `ForeignObject` records.

    Raises:
        RequestError: if there is no such file, it is truncated or no torch file, or it names a global that is not on the list.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    ...     torch.save({"bias": torch.zeros(2)}, file.name)
    ...     read_torch_file(file.name)
    {'bias': tensor([0., 0.])}
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file. Fix: give the path of a checkpoint.")
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_legacy(path)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except (
        # What the pickle, zip and tensor machinery raises on damaged or hostile bytes.
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        MemoryError,
        RecursionError,
        struct.error,
        OSError,
    ) as error:
        raise RequestError(
            f"{path}: expected a torch checkpoint (a zip archive with data.pkl, or torch's older format), found "
            f"{_describe(path)}: {type(error).__name__}: {error}. Fix: copy or download the file again."
        ) from error


def plain(value: Any) -> Any:
    """A value with fairseq's and omegaconf's wrappers taken off: mappings, lists, numbers, strings and None.

    Enumerations become their values, namespaces and configuration nodes dictionaries, tensors stay.

    >>> plain({"a": (1, 2)})
    {'a': [1, 2]}
    """
    if isinstance(value, ForeignObject):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:  # omegaconf's containers
            return plain(state["_content"])
        if "_val" in state:  # omegaconf's leaves
            return plain(state["_val"])
        if state:
            return {str(key): plain(item) for key, item in state.items()}
        if value.items:
            return {key: plain(item) for key, item in value.items.items()}
        if len(value.arguments) == 1:  # an enumeration is pickled as its class and its value
            return plain(value.arguments[0])
        return [plain(item) for item in value.arguments]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


class _Unpickler(pickle.Unpickler):
    """A `pickle.Unpickler` whose globals come from a closed list."""

    def __init__(self, file: IO[bytes], load_storage: Callable[..., Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage
        self._foreign: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The inert counterpart of a global, or an error that names it."""
        key = (module, name)
        if key in _PLAIN_TYPES:
            return _PLAIN_TYPES[key]
        if key in _FUNCTIONS:
            return _Function(_FUNCTIONS[key])
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.split(".")[0] in _FOREIGN_PACKAGES or key == ("numpy", "ndarray"):
            return self._foreign.setdefault(key, type(name, (ForeignObject,), {"qualified_name": f"{module}.{name}"}))
        raise RequestError(
            f"the file asks for {module}.{name}, which is not a tensor, a plain container or a known configuration class; "
            "it was not imported and nothing was run. Fix: use a checkpoint from a source you trust, or convert it to safetensors."
        )

    def persistent_load(self, saved_id: Any) -> Tensor:
        """The storage a tensor refers to, as a flat tensor."""
        if not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {str(saved_id)[:80]!r}")
        _, storage_type, key, _, numel = saved_id[:5]
        if not isinstance(storage_type, _StorageType) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"a storage of unknown type: {str(saved_id)[:80]!r}")
        view = saved_id[5] if len(saved_id) > 5 else None
        return self._load_storage(storage_type.dtype, str(key), numel, view)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise pickle.UnpicklingError(f"a tensor of size {size} and stride {stride}")
    if math.prod(size) and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= storage.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} past the end of its storage ({storage.numel()})")
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _numpy_scalar(kind: _NumpyType, data: bytes | str) -> Any:
    if not isinstance(kind, _NumpyType):
        raise pickle.UnpicklingError("a numpy scalar without a dtype")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=np.dtype(kind.order + kind.code), count=1)[0]


def _inert_array(kind: type, *arguments: Any) -> ForeignObject:
    if not (isinstance(kind, type) and issubclass(kind, ForeignObject)):
        raise pickle.UnpicklingError("a numpy array of an unknown class")
    return kind(*arguments)


def _inert_type(*arguments: Any) -> ForeignObject:
    return ForeignObject(*arguments)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise pickle.UnpicklingError(f"a byte string encoded with {encoding!r}")
    return text.encode(encoding)


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = types.MappingProxyType(
    {
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch", "Size"): lambda size=(): tuple(size),
        ("torch", "device"): lambda *arguments: ":".join(str(argument) for argument in arguments),
        ("numpy", "dtype"): _NumpyType,
        ("numpy.core.multiarray", "scalar"): _numpy_scalar,
        ("numpy._core.multiarray", "scalar"): _numpy_scalar,
        ("numpy.core.multiarray", "_reconstruct"): _inert_array,
        ("numpy._core.multiarray", "_reconstruct"): _inert_array,
        ("_codecs", "encode"): _encode,
        # How `None`'s type and List[str] are pickled, which omegaconf keeps beside its values: a record, no call.
        ("builtins", "type"): _inert_type,
        ("__builtin__", "type"): _inert_type,
        ("_operator", "getitem"): _inert_type,
        ("operator", "getitem"): _inert_type,
        ("types", "GenericAlias"): _inert_type,
    }
)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise RequestError(
                f"expected a torch checkpoint, found a zip archive of {len(names)} files without data.pkl."
            )
        prefix = pickles[0][: -len("data.pkl")]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise RequestError(
                "expected a torch checkpoint, whose files are stored as they are; found compressed ones."
            )
        if prefix + "byteorder" in names and archive.read(prefix + "byteorder") != b"little":
            raise RequestError(
                "the tensors are in big-endian byte order. Fix: save it again on a little-endian machine."
            )
        loaded: dict[str, Tensor] = {}

        def load_storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> Tensor:
            if key not in loaded:
                loaded[key] = _from_bytes(archive.read(f"{prefix}data/{key}"), dtype)
            storage = loaded[key]
            if storage.dtype != dtype or storage.numel() != numel:
                found = f"{storage.numel()} {storage.dtype}"
                raise pickle.UnpicklingError(f"storage {key}: expected {numel} numbers of {dtype}, found {found}")
            return storage

        with archive.open(pickles[0]) as file:
            return _Unpickler(file, load_storage).load()


def _read_legacy(path: Path) -> Any:
    size_bytes = path.stat().st_size
    pending: dict[str, Tensor] = {}

    def load_storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> Tensor:
        if numel * dtype.itemsize > size_bytes:
            raise pickle.UnpicklingError(f"storage {key} of {numel} numbers in a file of {size_bytes} bytes")
        storage = pending.setdefault(key, torch.empty(numel, dtype=dtype))
        if view is None:
            return storage
        _, offset, view_numel = view
        return _rebuild_tensor(storage, offset, (view_numel,), (1,))

    with path.open("rb") as file:
        head = [_Unpickler(file, load_storage).load() for _ in range(2)]
        if head != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise pickle.UnpicklingError("a pickle, but not one of torch's")
        _Unpickler(file, load_storage).load()  # sizes of the writer's integers; storages say their own
        content = _Unpickler(file, load_storage).load()
        keys = _Unpickler(file, load_storage).load()
        if not isinstance(keys, list) or set(map(str, keys)) != set(pending):
            raise pickle.UnpicklingError("the list of storages is not that of the tensors")
        for key in map(str, keys):
            storage = pending[key]
            (numel,) = struct.unpack("<q", _read_exactly(file, 8))
            if numel != storage.numel():
                raise pickle.UnpicklingError(f"storage {key}: expected {storage.numel()} numbers, found {numel}")
            storage.copy_(_from_bytes(_read_exactly(file, numel * storage.dtype.itemsize), storage.dtype))
    return content


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _read_exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes short")
    return data


def _describe(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return "a file that cannot be opened"
    if not start:
        return "an empty file"
    kind = "a zip archive cut short" if start[:2] == b"PK" else next(_kinds(start), "bytes")
    return f"{kind} ({path.stat().st_size} bytes, beginning {start[:16]!r})"


def _kinds(start: bytes) -> Iterator[str]:
    if all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start):
        yield "text"
    if start[:1] == b"\x80":
        yield "a pickle"
    if start[:4] == b"RIFF":
        yield "a WAVE file"
    if len(start) > 9 and start[8:9] == b"{":
        yield "a safetensors file"
