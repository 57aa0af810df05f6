"""The files of stores: written whole or not at all, verified when opened, listed, and cleaned when somebody asks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superb_probe.errors import CheckError

Part = tuple[str, Sequence[int], Iterable[np.ndarray[Any, Any]]]

USED = "last_used"
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """One store on disk.

    Attributes:
        path: its folder.
        num_bytes: what its files take.
        last_used_s: when it was last opened, in seconds since 1970.
        causes: what its numbers depend on.
    """

    path: Path
    num_bytes: int
    last_used_s: float
    causes: Mapping[str, Any]


def write_shard(folder: Path, name: str, parts: Iterable[Part]) -> None:
    """Write one shard whole or not at all; its index comes last: its presence says the shard is whole.

    Args:
        folder: of the store.
        name: of the shard.
        parts: of every utterance its id, the shape of its packed states, and their bytes (uint8) in pieces.
    """
    temporary = folder / f"{name}.bin.{uuid.uuid4().hex[:8]}.tmp"
    digest, index, count = hashlib.sha256(), {}, 0
    try:
        with temporary.open("wb") as stream:
            for utterance_id, shape, pieces in parts:
                index[utterance_id] = [count, list(shape)]
                for data in pieces:
                    stream.write(data.data)
                    digest.update(data.data)
                    count += data.nbytes
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / f"{name}.bin")
    finally:
        temporary.unlink(missing_ok=True)
    entry = {"sha256": digest.hexdigest(), "bytes": count, "index": index}
    write_whole(folder / f"{name}.json", json.dumps(entry).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def intact(folder: Path, name: str) -> bool:
    """Whether a shard is there and has the bytes it was written with.

    Raises:
        CheckError: if it is there but damaged.
    """
    data, entry = folder / f"{name}.bin", folder / f"{name}.json"
    if not entry.is_file():
        return False
    expected = json.loads(entry.read_text())
    digest = hashlib.sha256()
    if data.is_file():
        with data.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    if digest.hexdigest() != expected["sha256"]:
        raise CheckError(f"{data}: checksum {digest.hexdigest()[:12]} is not {expected['sha256'][:12]} as written. "
                         f"Fix: delete {folder}, it is extracted again")  # fmt: skip
    return True


@contextlib.contextmanager
def one_builder(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Lets one process at a time build a store; a killed one gives it free. Where files cannot be locked, all may build.

    Gives whether this process is alone for sure.

    Args:
        folder: of the store.
        on_wait: called once, without arguments, when another process is building.
    """
    if sys.platform == "win32":
        yield False  # no flock: both write the same bytes
        return
    import fcntl

    alone = True
    with (folder / LOCK).open("ab") as stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            alone = False
        yield alone  # closing the file unlocks it


def remove_leftovers(folder: Path) -> None:
    """Delete what killed builds left half written; only for who is alone."""
    for path in folder.glob("*.tmp"):
        path.unlink()


def busy(folder: Path) -> bool:
    """Whether a process is building a store right now."""
    if sys.platform == "win32" or not (folder / LOCK).is_file():
        return False
    import fcntl

    with (folder / LOCK).open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
    return False


def mark_used(folder: Path) -> None:
    """Note that a store was opened now."""
    (folder / USED).touch()
    now_s = time.time()
    os.utime(folder / USED, (now_s, now_s))


def folder_bytes(folder: Path) -> int:
    """What the files of one store take; a file that another process renames meanwhile does not count."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def list_stores(root: Path) -> list[StoreFolder]:
    """The stores below a folder, the most recently used first; other folders are not looked at."""
    found = []
    for causes in sorted(Path(root).glob("*/causes.json")):
        folder = causes.parent
        used = folder / USED
        last_used_s = (used if used.is_file() else causes).stat().st_mtime
        found.append(StoreFolder(folder, folder_bytes(folder), last_used_s, json.loads(causes.read_text())))
    return sorted(found, key=lambda each: (-each.last_used_s, each.path.name))


def clean_stores(root: Path, keep_bytes: int) -> list[StoreFolder]:
    """Delete the least recently used stores until what is left takes at most `keep_bytes`; the ones deleted.

    A store that a process is building stays.
    """
    stores = list_stores(root)
    total = sum(each.num_bytes for each in stores)
    deleted = []
    for each in reversed(stores):
        if total <= keep_bytes:
            break
        if busy(each.path):
            continue
        for index in each.path.glob("shard-*.json"):  # first what says a shard is whole: half a deletion is no store
            index.unlink()
        shutil.rmtree(each.path)
        deleted.append(each)
        total -= each.num_bytes
    return deleted


def overhead_bytes(ids: Iterable[str]) -> int:
    """About what the index and the causes of a store take beside its states.

    >>> overhead_bytes(["a", "b"])
    2146
    """
    return 2048 + sum(len(name.encode()) + 48 for name in ids)


def room_problem(root: Path, needed_bytes: int, limit_bytes: int | None, *, clean: bool = False) -> str | None:
    """Why so many more bytes may not be written below a folder; None when they may.

    Args:
        root: the folder.
        needed_bytes: how many more.
        limit_bytes: most that the stores in it may take.
        clean: whether what is there may be deleted for them.
    """
    from superb_probe.probes.plan import readable_bytes

    existing = Path(root)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        return f"{readable_bytes(needed_bytes)} more are needed, the disk of {root} has {readable_bytes(free)} free"
    if limit_bytes is not None:
        taken = sum(each.num_bytes for each in list_stores(root)) if Path(root).is_dir() and not clean else 0
        if taken + needed_bytes > limit_bytes:
            return (
                f"{readable_bytes(needed_bytes)} more are needed, the stores in {root} take {readable_bytes(taken)} of "
                f"{readable_bytes(limit_bytes)} (--store-limit)"
            )
    return None
