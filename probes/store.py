"""The feature store: layer states of a frozen upstream, extracted once, read by every trial."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import View
from superb_probe.downstreams.manifest import Manifest, Utterance, audio_digest
from superb_probe.errors import CheckError, RequestError, all_at_once
from superb_probe.probes.identity import source_digest, weights_digest
from superb_probe.probes.plan import digest_of
from superb_probe.upstreams.base import Upstream, UpstreamInfo, frame_mask

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 256 * 2**20
FORMAT = 1

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
    view, dtype, manifest and audio digests, waveform effects, adapter source. Deleting it is always safe.

    Attributes:
        root: folder that holds the stores; None keeps the states in memory.
        folder: the store's own folder below it, once built.
        view: "mean" or "frames".
        dtype: "float32", "float16" or "bfloat16".
        layer_norm: whether every frame of every layer is normalised (without affine).
        waveform: effects applied to the audio first.
        extract_s: seconds the last build took.
        encoder_passes: utterances the last build put through the upstream.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        view: View = "frames",
        dtype: str = "float16",
        layer_norm: bool = False,
        waveform: str = "none",
        memory: MutableMapping[str, Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """An empty store.

        Args:
            root: folder for stores; None for memory.
            view: what is kept of an utterance.
            dtype: in which it is kept.
            layer_norm: normalise frames; before the mean in view "mean", at reading in view "frames".
            waveform: effects applied to the audio first.
            memory: states in memory that several stores share, so that an utterance in two manifests is extracted once.
            device: where states in memory are kept; None for the CPU.
        """
        if dtype not in DTYPES:
            raise RequestError(f"unknown feature dtype {dtype!r}. Fix: one of {', '.join(DTYPES)}")
        self.root, self.view, self.dtype = root, view, dtype
        self.layer_norm, self.waveform = layer_norm, waveform
        self.folder: Path | None = None
        self.extract_s, self.encoder_passes = 0.0, 0
        self._memory: MutableMapping[str, Tensor] = {} if memory is None else memory
        self._memory_keys: dict[str, str] = {}
        self._device = device or torch.device("cpu")
        self._index: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._maps: list[np.ndarray[Any, Any]] = []

    @staticmethod
    def estimate_bytes(info: UpstreamInfo, manifest: Manifest, view: View, dtype: str = "float16") -> int:
        """What the states of a manifest take, from its durations.

        >>> from types import SimpleNamespace as N
        >>> info = N(num_layers=13, dim=768, sample_rate_hz=16000, hop_samples=320)
        >>> FeatureStore.estimate_bytes(info, [N(duration_s=1.0)], "frames")
        998400
        """
        frames = sum(
            1 if view == "mean" else max(1, int(utterance.duration_s * info.sample_rate_hz) // info.hop_samples)
            for utterance in manifest
        )
        return frames * info.num_layers * info.dim * DTYPES[dtype].itemsize

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
        }
        if manifest is not None:
            causes |= {"manifest": manifest.digest, "audio": audio_digest(manifest)}
        return causes

    def build(
        self, upstream: Upstream, manifest: Manifest, *, max_batch_s: float = 120.0, progress: Progress | None = None
    ) -> None:
        """Extract what is not there yet, and open the store.

        Args:
            upstream: frozen encoder.
            manifest: utterances.
            max_batch_s: seconds of padded audio in a batch.
            progress: called with the seconds of audio done since the last call.

        Raises:
            RequestError: if utterances are too short for a frame (all of them are named) or audio cannot be read.
            CheckError: if states are not finite or a frame count is not what the upstream declares, with the utterance.
        """
        started = time.perf_counter()
        self.encoder_passes = 0
        if self.root is None:
            self._build_memory(upstream, manifest, max_batch_s, progress)
        else:
            causes = self.causes(upstream, manifest)
            self.folder = (
                self.root / f"{upstream.info.name.replace('/', '_').replace(':', '_')}-{digest_of(causes)[:20]}"
            )
            self._build_disk(upstream, manifest, max_batch_s, progress, causes)
        self.extract_s = time.perf_counter() - started

    def __getitem__(self, utterance_id: str) -> Tensor:
        """The states of an utterance in float32, whatever the store keeps.

        (L, D) means for view "mean" (layer norm, if any, taken before the mean); (L, T, D) frames for view "frames" (layer norm at
        reading).
        """
        states = self.stored(utterance_id).float()
        if self.layer_norm and self.view == "frames":
            states = torch.nn.functional.layer_norm(states, states.shape[-1:])
        return states

    def stored(self, utterance_id: str) -> Tensor:
        """The states of an utterance as they are kept: in the store's dtype, not normalised in view "frames"."""
        if utterance_id in self._memory_keys:
            return self._memory[self._memory_keys[utterance_id]]
        if utterance_id not in self._index:
            raise KeyError(
                f"no states of utterance {utterance_id!r} in this store: build it over a manifest that has it"
            )
        shard, offset, shape = self._index[utterance_id]
        flat = np.array(self._maps[shard][offset : offset + int(np.prod(shape))])  # a copy: the map is read-only
        return torch.from_numpy(flat).view(DTYPES[self.dtype]).reshape(shape)

    def num_frames(self, utterance_id: str) -> int:
        """Frames kept of an utterance, without reading them; 1 in view "mean"."""
        if self.view == "mean":
            return 1
        if utterance_id in self._memory_keys:
            return self._memory[self._memory_keys[utterance_id]].shape[1]
        return self._index[utterance_id][2][1]

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
        keys = {u.id: f"{prefix} {manifest.root.resolve()} {u.audio} {u.start_s!r} {u.duration_s!r}" for u in manifest}
        # upstreams that read states by utterance id share nothing across manifests: the id is the cause there
        if hasattr(upstream, "states_for"):
            keys = {u: f"{key} {u}" for u, key in keys.items()}
        missing: dict[str, Utterance] = {}
        for utterance in manifest:
            if keys[utterance.id] not in self._memory:
                missing.setdefault(keys[utterance.id], utterance)
        if progress is not None:
            progress(manifest_seconds(manifest) - manifest_seconds(missing.values()))
        batches = duration_batches(list(missing.values()), max_batch_s)
        for batch, states in self._extract(upstream, manifest.root, batches, progress):
            for utterance, part in zip(batch, states, strict=True):
                self._memory[keys[utterance.id]] = part.to(self._device)
        self._memory_keys = keys

    def _build_disk(
        self,
        upstream: Upstream,
        manifest: Manifest,
        max_batch_s: float,
        progress: Progress | None,
        causes: Mapping[str, Any],
    ) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"cannot write the store {self.folder}: {error.strerror}. Fix: --store DIR that can be written"
            ) from error
        shards = self._shards(upstream.info, manifest, max_batch_s)
        _write(self.folder / "causes.json", json.dumps(causes, indent=1, sort_keys=True).encode())
        for shard in shards:
            if _intact(self.folder, shard.name):
                if progress is not None:
                    progress(sum(manifest_seconds(batch) for batch in shard.batches))
                continue
            parts: list[np.ndarray[Any, Any]] = []
            index: dict[str, Any] = {}
            offset = 0
            for batch, states in self._extract(upstream, manifest.root, shard.batches, progress):
                for utterance, part in zip(batch, states, strict=True):
                    flat = _as_numpy(part)
                    index[utterance.id] = [offset, list(part.shape)]
                    offset += flat.size
                    parts.append(flat)
            data = np.concatenate(parts).tobytes()
            _write(self.folder / f"{shard.name}.bin", data)
            entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "index": index}
            _write(
                self.folder / f"{shard.name}.json", json.dumps(entry).encode()
            )  # last: its presence says the shard is whole
        self._open(shards)

    def _open(self, shards: Sequence[_Shard]) -> None:
        assert self.folder is not None
        kind = np.float32 if self.dtype == "float32" else np.int16  # bit patterns: numpy has no bfloat16
        self._maps, self._index = [], {}
        for shard in shards:
            entry = json.loads((self.folder / f"{shard.name}.json").read_text())
            self._maps.append(np.memmap(self.folder / f"{shard.name}.bin", dtype=kind, mode="r"))
            for name, (offset, shape) in entry["index"].items():
                self._index[name] = (shard.number, offset, tuple(shape))

    def _shards(self, info: UpstreamInfo, manifest: Manifest, max_batch_s: float) -> list[_Shard]:
        """The same shards for the same manifest, whatever was written before: a resumed build ends in the same bytes."""
        shards: list[list[tuple[Utterance, ...]]] = []
        room = 0
        for batch in duration_batches(manifest, max_batch_s):
            size = self.estimate_bytes(info, batch, self.view, self.dtype)  # type: ignore[arg-type]
            if not shards or size > room:
                shards.append([])
                room = SHARD_BYTES
            room -= size
            shards[-1].append(tuple(batch))
        return [_Shard(number, tuple(batches)) for number, batches in enumerate(shards)]

    def _extract(
        self, upstream: Upstream, root: Path, batches: Sequence[Sequence[Utterance]], progress: Progress | None
    ) -> Iterator[tuple[Sequence[Utterance], list[Tensor]]]:
        """The kept states of every batch; audio of the next batches is decoded while one is encoded."""
        states_for = getattr(upstream, "states_for", None)
        with ThreadPoolExecutor(2) as readers:

            def read(utterance: Utterance) -> Tensor | None:
                if states_for is not None:
                    return None
                return torch.from_numpy(read_waveform(utterance, root, upstream.info.sample_rate_hz, self.waveform))

            ahead = [[readers.submit(read, utterance) for utterance in batch] for batch in batches[:2]]
            for number, batch in enumerate(batches):
                if number + 2 < len(batches):
                    ahead.append([readers.submit(read, utterance) for utterance in batches[number + 2]])
                waves = [future.result() for future in ahead[number]]
                ahead[number] = []
                if states_for is not None:
                    states = [torch.as_tensor(states_for(utterance.id)) for utterance in batch]
                else:
                    states = _encode(upstream, batch, [wave for wave in waves if wave is not None])
                self.encoder_passes += len(batch)
                yield (
                    batch,
                    [self._keep(upstream.info, utterance, part) for utterance, part in zip(batch, states, strict=True)],
                )
                if progress is not None:
                    progress(manifest_seconds(batch))

    def _keep(self, info: UpstreamInfo, utterance: Utterance, states: Tensor) -> Tensor:
        """What is kept of one utterance's states (L, T, D): checked, reduced to the view, in the store's dtype."""
        if states.ndim != 3 or states.shape[0] != info.num_layers or states.shape[2] != info.dim or states.shape[1] < 1:
            raise CheckError(
                f"{info.name}, utterance {utterance.id}: states of shape {tuple(states.shape)}, expected "
                f"(L={info.num_layers}, T, D={info.dim}). Fix: `superb-probe check upstream` says what the adapter gets wrong"
            )
        if self.view == "mean":
            states = states.float()
            if self.layer_norm:
                states = torch.nn.functional.layer_norm(states, states.shape[-1:])
            states = states.mean(1)
        kept = states.to(DTYPES[self.dtype]).contiguous().clone()
        if not bool(torch.isfinite(kept).all()):
            finite_before = bool(torch.isfinite(states).all())
            fix = (
                f"they overflow {self.dtype}: keep them as float32"
                if finite_before
                else "`superb-probe check upstream` finds the layer; half precision often is the cause"
            )
            raise CheckError(f"{info.name}, utterance {utterance.id}: states that are not finite. Fix: {fix}")
        return kept


def duration_batches(utterances: Sequence[Utterance], max_batch_s: float) -> list[list[Utterance]]:
    """Utterances from the longest to the shortest (ties by id), in batches of at most `max_batch_s` padded seconds, or one utterance.

    >>> made = [Utterance(name, "a.wav", 0.0, seconds, {}) for name, seconds in (("a", 1.0), ("b", 4.0), ("c", 3.0))]
    >>> [[utterance.id for utterance in batch] for batch in duration_batches(made, 8.0)]
    [['b', 'c'], ['a']]
    """
    batches: list[list[Utterance]] = []
    for utterance in sorted(utterances, key=lambda each: (-each.duration_s, each.id)):
        if batches and batches[-1][0].duration_s * (len(batches[-1]) + 1) <= max_batch_s:
            batches[-1].append(utterance)
        else:
            batches.append([utterance])
    return batches


def manifest_seconds(utterances: Any) -> float:
    """Seconds of audio of some utterances."""
    return float(sum(utterance.duration_s for utterance in utterances))


def _encode(upstream: Upstream, batch: Sequence[Utterance], waves: Sequence[Tensor]) -> list[Tensor]:
    """The states (L, T, D) of each utterance of a batch, padded together for the upstream only."""
    short = [
        f"utterance {utterance.id}: {wave.numel()} samples after effects, {wave.numel() / upstream.info.sample_rate_hz:.3f} s"
        for utterance, wave in zip(batch, waves, strict=True)
        if upstream.num_frames(wave.numel()) < 1
    ]
    if short:
        raise all_at_once(f"{upstream.info.name}: too short for one frame", short, "leave them out of the manifest")
    layers = upstream.extract(waves)
    expected = [upstream.num_frames(wave.numel()) for wave in waves]
    found = layers.num_frames.tolist()
    wrong = [
        f"utterance {utterance.id}: {got} frames, `num_frames` says {want}"
        for utterance, got, want in zip(batch, found, expected, strict=True)
        if got != want or want > layers.states.shape[2]
    ]
    if layers.states.ndim != 4 or layers.states.shape[1] != len(batch):
        wrong.append(f"states of shape {tuple(layers.states.shape)} for {len(batch)} utterances, expected (L, B, T, D)")
    if wrong:
        raise CheckError(f"{upstream.info.name}: " + "; ".join(wrong) + ". Fix: `superb-probe check upstream`")
    valid = frame_mask(layers.num_frames, layers.states.shape[2])
    states = layers.states.masked_fill(~valid[None, :, :, None], 0.0)
    return [states[:, row, :length] for row, length in enumerate(found)]


def _as_numpy(states: Tensor) -> np.ndarray[Any, Any]:
    flat = states.cpu().reshape(-1)
    return flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.int16).numpy()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: written beside, then renamed. Two processes that write the same file end with one good file."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _intact(folder: Path, name: str) -> bool:
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
        raise CheckError(
            f"{data}: its bytes are not those that were written (checksum). Fix: delete {folder}; it is built again"
        )
    return True
