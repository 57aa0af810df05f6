"""The feature store: layer states of a frozen upstream, extracted once, read by every trial."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.base import View
from superb_probe.downstreams.manifest import Manifest, Utterance, audio_digest
from superb_probe.errors import RequestError
from superb_probe.probes.identity import source_digest, weights_digest
from superb_probe.probes.plan import digest_of, readable_bytes
from superb_probe.probes.store_codec import byte_pieces, check_dtype, frame_bytes, of_bytes, unpack
from superb_probe.probes.store_extract import Clock, Extractor, available_cores, decoding_processes
from superb_probe.probes.store_files import (
    Part,
    intact,
    mark_used,
    one_builder,
    overhead_bytes,
    remove_leftovers,
    room_problem,
    write_shard,
    write_whole,
)
from superb_probe.probes.store_keeping import Keeping
from superb_probe.upstreams.base import Upstream, UpstreamInfo

SHARD_BYTES = 128 * 2**20
WRITERS = max(4, available_cores() // 2)  # shards written at once: one core hashes about 1 GB a second
FORMAT = 3

Progress = Callable[[float], None]  # called with seconds of audio done


@dataclass(frozen=True, slots=True)
class _Shard:
    """A fixed set of batches of utterances: what is written as one file."""

    number: int
    batches: tuple[tuple[Utterance, ...], ...]

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"


class FeatureStore:
    """Layer states of one upstream over one manifest, on disk or, without a folder, in memory.

    Built in shards, each written to a temporary name and renamed, so an interrupted build goes on where it stopped.
    The folder's name is the hash of everything that can change a number: upstream name, revision and weights, `layer_norm`,
    view, dtype, crops, the manifest's utterances and their audio, waveform effects, adapter source. Labels change no state, so
    tasks on the same utterances share a store. Deleting it is always safe.

    Attributes:
        root: folder that holds the stores; None keeps the states in memory.
        folder: the store's own folder below it, once built.
        view: "mean" or "frames".
        dtype: "float32", "float16", "bfloat16", or "int8" (with a scale for every frame of every layer).
        layer_norm: whether every frame of every layer is normalised (without affine).
        waveform: effects applied to the audio first.
        crops: random stretches of `crop_s` seconds whose means are kept of a longer utterance; 0 for all of it.
        limit_bytes: most that all stores of `root` may take.
        extract_s: seconds the last build took.
        encoder_passes: utterances (or crops of them) the last build put through the upstream.
        audio_s: seconds of audio in them.
        clock: where the time of the last build went.
    """

    resident = True  # whether an utterance can be read at no cost but the reading

    def __init__(
        self,
        root: Path | None = None,
        *,
        view: View = "frames",
        dtype: str = "float16",
        layer_norm: bool = False,
        waveform: str = "none",
        crops: int = 0,
        crop_s: float | None = None,
        crop_seed: int = 0,
        memory: MutableMapping[str, Tensor] | None = None,
        device: torch.device | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """An empty store.

        Args:
            root: folder for stores; None for memory.
            view: what is kept of an utterance.
            dtype: in which it is kept.
            layer_norm: normalise frames; before the mean in view "mean", at reading in view "frames".
            waveform: effects applied to the audio first.
            crops: random stretches whose means are kept of an utterance longer than `crop_s`, in view "mean".
            crop_s: their seconds.
            crop_seed: draws where they begin.
            memory: states in memory that several stores share, so that an utterance in two manifests is extracted once.
            device: where states in memory are kept; None for the CPU.
            limit_bytes: most that all stores of `root` may take; None for what the disk has.
        """
        check_dtype(dtype)
        if crops and (view != "mean" or crop_s is None):
            raise ValueError("crops are kept in view mean, and have a length")
        self.root, self.view, self.dtype = root, view, dtype
        self.layer_norm, self.waveform = layer_norm, waveform
        self.crops, self.crop_s, self.crop_seed = crops, crop_s, crop_seed
        self.limit_bytes = limit_bytes
        self.folder: Path | None = None
        self.extract_s, self.audio_s, self.encoder_passes, self.clock = 0.0, 0.0, 0, Clock()
        self._memory: MutableMapping[str, Tensor] = {} if memory is None else memory
        self._memory_keys: dict[str, str] = {}
        self._device = device or torch.device("cpu")
        self._index: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._maps: list[Tensor] = []

    @staticmethod
    def estimate_bytes(
        info: UpstreamInfo,
        manifest: Iterable[Utterance],
        view: View,
        dtype: str = "float16",
        *,
        crops: int = 0,
        crop_s: float | None = None,
    ) -> int:
        """What the states of a manifest take, from its durations.

        >>> from types import SimpleNamespace as N
        >>> info = N(num_layers=13, dim=768, sample_rate_hz=16000, hop_samples=320)
        >>> FeatureStore.estimate_bytes(info, [N(duration_s=1.0)], "frames")
        998400
        """
        frames = 0
        for utterance in manifest:
            if view == "mean":
                frames += crops if crops and crop_s is not None and utterance.duration_s > crop_s else 1
            else:
                frames += max(1, int(utterance.duration_s * info.sample_rate_hz) // info.hop_samples)
        return frames * info.num_layers * frame_bytes(info.dim, dtype)

    @property
    def keeping(self) -> Keeping:
        """What is kept of an utterance."""
        return Keeping(
            self.view, self.dtype, self.layer_norm, self.waveform, self.crops, self.crop_s, self.crop_seed, self._device
        )

    def causes(self, upstream: Upstream, manifest: Manifest | None = None) -> dict[str, Any]:
        """Everything a stored number depends on, as JSON; without a manifest, all but the data."""
        info = upstream.info
        causes: dict[str, Any] = {
            "format": FORMAT,
            "upstream": info.name,
            "revision": info.revision,
            "weights": weights_digest(upstream),
            "source": source_digest(upstream),
            "shape": [info.num_layers, info.dim, info.sample_rate_hz, info.hop_samples],
            "waveform_norm": info.waveform_norm,
            "frame_multiple": getattr(getattr(upstream, "config", None), "frame_multiple", None),
            "precision": str(getattr(upstream, "dtype", "float32")),
            "layer_norm": self.layer_norm and self.view == "mean",  # frames are stored as they are
            "view": self.view,
            "dtype": self.dtype,
            "waveform": self.waveform,
            "crops": [self.crops, self.crop_s, self.crop_seed] if self.crops else None,
        }
        if manifest is not None:
            causes |= {"utterances": utterances_digest(manifest), "audio": audio_digest(manifest)}
        return causes

    def build(
        self,
        upstream: Upstream,
        manifest: Manifest,
        *,
        max_batch_s: float = 120.0,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Extract what is not there yet, and open the store.

        Args:
            upstream: frozen encoder.
            manifest: utterances.
            max_batch_s: seconds of padded audio in a batch.
            progress: called with the seconds of audio done since the last call.
            say: called with a line before anything is written: how much it will be, and where.

        Raises:
            RequestError: if utterances are too short for a frame (all of them are named), audio cannot be read, or the states
                would take more than the disk or the limit has room for.
            CheckError: if states are not finite, a frame count is not what the upstream declares, or a file is damaged.
        """
        started = time.perf_counter()
        self.audio_s, self.encoder_passes, self.clock = 0.0, 0, Clock()
        parameter = next(upstream.parameters(), None)
        if parameter is not None and not hasattr(upstream, "states_for"):
            decoding_processes(parameter.device)  # they start while digests are computed
        if self.root is None:
            self._build_memory(upstream, manifest, max_batch_s, progress)
        else:
            causes = self.causes(upstream, manifest)
            self.folder = store_folder(self.root, upstream.info.name, causes)
            self._make_folder()
            tell = say or (lambda text: None)
            waits = f"waiting for another process that builds {self.folder}"
            with one_builder(self.folder, lambda: tell(waits)) as alone:
                if alone:
                    remove_leftovers(self.folder)
                if not (self.folder / "causes.json").is_file():
                    about = {**causes, "first_manifest": manifest.name}
                    write_whole(self.folder / "causes.json", json.dumps(about, indent=1, sort_keys=True).encode())
                self._build_disk(upstream, manifest, max_batch_s, progress, tell)
        self.extract_s = time.perf_counter() - started

    def __getitem__(self, utterance_id: str) -> Tensor:
        """The states of an utterance in float32, whatever the store keeps.

        (L, D) means for view "mean" (layer norm, if any, taken before the mean), (K, L, D) where crops are kept;
        (L, T, D) frames for view "frames" (layer norm at reading).
        """
        states = self.stored(utterance_id).float()
        if self.layer_norm and self.view == "frames":
            states = torch.nn.functional.layer_norm(states, states.shape[-1:])
        return states

    def stored(self, utterance_id: str) -> Tensor:
        """The states of an utterance as they are kept (int8 as float32): not normalised in view "frames"."""
        return self.fetch([utterance_id])[0]

    def fetch(self, ids: Sequence[str], generator: torch.Generator | None = None) -> list[Tensor]:
        """The states of some utterances as they are kept (int8 as float32): (L, D), (K, L, D) or (L, T, D).

        Args:
            ids: utterances.
            generator: draws the crops of sources that encode when they are asked; stored ones are drawn by who reads them.
        """
        return [unpack(packed, self.dtype) for packed in self.fetch_packed(ids, generator)]

    def fetch_packed(self, ids: Sequence[str], generator: torch.Generator | None = None) -> list[Tensor]:
        """As `fetch`, still packed: int8 frames have their scales behind them."""
        return [self._packed(name) for name in ids]

    def prefetch(self, ids: Sequence[str]) -> None:
        """Announce what will be fetched next; only sources that encode when they are asked make use of it."""

    def _packed(self, utterance_id: str) -> Tensor:
        if utterance_id in self._memory_keys:
            return self._memory[self._memory_keys[utterance_id]]
        if utterance_id not in self._index:
            raise KeyError(
                f"no states of utterance {utterance_id!r} in this store: build it over a manifest that has it"
            )
        shard, start, shape = self._index[utterance_id]
        return of_bytes(self._maps[shard], start, shape, self.dtype)

    def num_frames(self, utterance_id: str) -> int:
        """Frames kept of an utterance, without reading them; 1 in view "mean"."""
        if self.view == "mean":
            return 1
        if utterance_id in self._memory_keys:
            return self._memory[self._memory_keys[utterance_id]].shape[1]
        return self._index[utterance_id][2][1]

    def load(self, device: torch.device) -> None:
        """Bring what is on disk into the memory of a device, where it is read from then on."""
        shards = [shard.to(device, copy=True) for shard in self._maps]
        for name, (number, start, shape) in self._index.items():
            self._memory[name] = of_bytes(shards[number], start, shape, self.dtype)
            self._memory_keys[name] = name
        self._index, self._maps = {}, []

    def __contains__(self, utterance_id: object) -> bool:
        """Whether the states of an utterance are there."""
        return utterance_id in self._memory_keys or utterance_id in self._index

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self._memory_keys) + len(self._index)

    @property
    def num_bytes(self) -> int:
        """Bytes of states, in memory or in the shards."""
        in_memory = sum(self._memory[key].nbytes for key in set(self._memory_keys.values()))
        return in_memory + sum(shard.nbytes for shard in self._maps)

    def _build_memory(
        self, upstream: Upstream, manifest: Manifest, max_batch_s: float, progress: Progress | None
    ) -> None:
        prefix = digest_of(self.causes(upstream))
        root = manifest.root.resolve()
        keys = {u.id: f"{prefix} {root} {u.audio} {u.start_s!r} {u.duration_s!r}" for u in manifest}
        # upstreams that read states by utterance id share nothing across manifests: the id is the cause there
        if hasattr(upstream, "states_for"):
            keys = {u: f"{key} {u}" for u, key in keys.items()}
        missing: dict[str, Utterance] = {}
        for utterance in manifest:
            if keys[utterance.id] not in self._memory:
                missing.setdefault(keys[utterance.id], utterance)
        if progress is not None:
            progress(manifest_seconds(manifest) - manifest_seconds(missing.values()))
        extractor = Extractor(upstream, manifest.root, self.keeping)
        for batch, states in extractor.run(duration_batches(list(missing.values()), max_batch_s, self.keeping.pieces)):
            for utterance, part in zip(batch, states, strict=True):
                self._memory[keys[utterance.id]] = part
            if progress is not None:
                progress(manifest_seconds(batch))
        self._memory_keys = keys
        self._note(extractor)

    def _note(self, extractor: Extractor) -> None:
        self.encoder_passes, self.audio_s, self.clock = extractor.encoded, extractor.audio_s, extractor.clock

    def _make_folder(self) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark_used(self.folder)
        except OSError as error:
            raise RequestError(
                f"cannot write the store {self.folder}: {error.strerror}. Fix: --store DIR that can be written"
            ) from error

    def _build_disk(
        self,
        upstream: Upstream,
        manifest: Manifest,
        max_batch_s: float,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> None:
        assert self.folder is not None and self.root is not None
        shards = self._shards(upstream.info, manifest, max_batch_s)
        with ThreadPoolExecutor(available_cores()) as pool:
            there = list(pool.map(partial(intact, self.folder), [shard.name for shard in shards]))
        missing = []
        for shard, whole in zip(shards, there, strict=True):
            if not whole:
                missing.append(shard)
            elif progress is not None:
                progress(sum(manifest_seconds(batch) for batch in shard.batches))
        if missing:
            needed = sum(self._estimate(upstream.info, batch) for shard in missing for batch in shard.batches)
            names = [utterance.id for shard in missing for batch in shard.batches for utterance in batch]
            problem = room_problem(self.root, needed + overhead_bytes(names), self.limit_bytes)
            if problem is not None:
                raise RequestError(
                    f"the states of {upstream.info.name} over {manifest.name} do not fit: {problem}. Fix: `superb-probe store "
                    f"clean {self.root} --keep SIZE`, another --store, or --states stream"
                )
            say(f"writing {readable_bytes(needed)} of states to {self.folder}")
            self._write(upstream, manifest.root, missing, progress)
        self._open(shards)

    def _write(self, upstream: Upstream, root: Path, shards: Sequence[_Shard], progress: Progress | None) -> None:
        """Extract some shards in one go; threads hash and write those that are encoded, one shard each."""
        assert self.folder is not None
        started = time.perf_counter()
        extractor = Extractor(upstream, root, replace(self.keeping, device=torch.device("cpu")), pinned=True)
        extracted = extractor.run([batch for shard in shards for batch in shard.batches])
        behind: deque[Future[None]] = deque()
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
            for shard in shards:
                parts: list[Part] = []
                for _ in shard.batches:
                    batch, states = next(extracted)
                    parts += [(u.id, each.shape, byte_pieces(each)) for u, each in zip(batch, states, strict=True)]
                    if progress is not None:
                        progress(manifest_seconds(batch))
                behind.append(pool.submit(write_shard, self.folder, shard.name, parts))
                _wait(behind, WRITERS, extractor.clock)
            next(extracted, None)  # lets its threads end
            _wait(behind, 0, extractor.clock)
        extractor.clock.total_s = time.perf_counter() - started
        self._note(extractor)

    def _open(self, shards: Sequence[_Shard]) -> None:
        assert self.folder is not None
        self._maps, self._index = [], {}
        for shard in shards:
            entry = json.loads((self.folder / f"{shard.name}.json").read_text())
            path = self.folder / f"{shard.name}.bin"  # mapped copy-on-write: what a reader changes stays its own
            self._maps.append(torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")))
            for name, (start, shape) in entry["index"].items():
                self._index[name] = (shard.number, start, tuple(shape))

    def _estimate(self, info: UpstreamInfo, utterances: Iterable[Utterance]) -> int:
        return self.estimate_bytes(info, utterances, self.view, self.dtype, crops=self.crops, crop_s=self.crop_s)

    def _shards(self, info: UpstreamInfo, manifest: Manifest, max_batch_s: float) -> list[_Shard]:
        """The same shards for the same manifest, whatever was written before: a resumed build ends in the same bytes."""
        shards: list[list[tuple[Utterance, ...]]] = []
        room = 0
        for batch in duration_batches(manifest, max_batch_s, self.keeping.pieces):
            size = self._estimate(info, batch)
            if not shards or size > room:
                shards.append([])
                room = SHARD_BYTES
            room -= size
            shards[-1].append(tuple(batch))
        return [_Shard(number, tuple(batches)) for number, batches in enumerate(shards)]


def _wait(behind: deque[Future[None]], most: int, clock: Clock) -> None:
    """Wait until at most so many writes are left; their errors come out here."""
    while len(behind) > most:
        started = time.perf_counter()
        behind.popleft().result()
        clock.write_s += time.perf_counter() - started


def store_folder(root: Path, upstream: str, causes: Mapping[str, Any]) -> Path:
    """Where a store with these causes is, or would be."""
    return Path(root) / f"{upstream.replace('/', '_').replace(':', '_')}-{digest_of(causes)[:20]}"


def utterances_digest(manifest: Iterable[Utterance]) -> str:
    """The sha256 of which stretches of audio a manifest names, and how; labels and order do not count."""
    lines = sorted(f"{u.id}\t{u.audio}\t{u.start_s!r}\t{u.duration_s!r}\n" for u in manifest)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def duration_batches(
    utterances: Iterable[Utterance],
    max_batch_s: float,
    pieces: Callable[[Utterance], tuple[float, int]] | None = None,
) -> list[list[Utterance]]:
    """Utterances from the longest to the shortest (ties by id), in batches of at most `max_batch_s` padded seconds, or one utterance.

    Args:
        utterances: what to batch.
        max_batch_s: padded seconds.
        pieces: seconds and number of what is encoded of an utterance; None for the whole, once.

    >>> made = [Utterance(name, "a.wav", 0.0, seconds, {}) for name, seconds in (("a", 1.0), ("b", 4.0), ("c", 3.0))]
    >>> [[utterance.id for utterance in batch] for batch in duration_batches(made, 8.0)]
    [['b', 'c'], ['a']]
    """
    batches: list[list[Utterance]] = []
    longest_s, count = 0.0, 0
    measured = pieces or (lambda utterance: (utterance.duration_s, 1))
    for utterance in sorted(utterances, key=lambda each: (-each.duration_s, each.id)):
        seconds, number = measured(utterance)
        if batches and max(longest_s, seconds) * (count + number) <= max_batch_s:
            batches[-1].append(utterance)
            longest_s, count = max(longest_s, seconds), count + number
        else:
            batches.append([utterance])
            longest_s, count = seconds, number
    return batches


def manifest_seconds(utterances: Iterable[Utterance]) -> float:
    """Seconds of audio of some utterances."""
    return float(sum(utterance.duration_s for utterance in utterances))
