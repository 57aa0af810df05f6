"""The audio of a pre-training run: decoded once into one flat file of int16 samples, and drawn from in batches of crops.

A folder of clips holds `samples.int16` (all clips one after the other, 16 kHz), `clips.tsv` (`id samples held_out`) and `clips.json`
(digest, hours, where they came from). Batches are drawn from their number alone: a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.pretrain_mask import span_mask
from superb_probe.upstreams.pretrain_recipe import Recipe

SAMPLE_RATE_HZ = 16000
FULL_SCALE = 32768.0
_GPU_SHARE = 0.3  # of the free memory that samples may take
_SAMPLES, _TABLE, _FACTS, _PHONES = "samples.int16", "clips.tsv", "clips.json", "phones.npz"


@dataclass(frozen=True, slots=True)
class Phones:
    """The phone at the middle of every frame of some clips.

    Attributes:
        clips: (A,) indices of the clips that are aligned.
        values: int16, of these one after the other; below zero: not known.
        offsets: (A + 1,).
        names: of the phones.
    """

    clips: NDArray[np.int64]
    values: NDArray[np.int16]
    offsets: NDArray[np.int64]
    names: tuple[str, ...]

    def of(self, clip: int) -> NDArray[np.int16]:
        """Phones of the frames of a clip, (T,)."""
        place = int(np.flatnonzero(self.clips == clip)[0])
        return self.values[self.offsets[place] : self.offsets[place + 1]]

    def write(self, folder: Path) -> None:
        """`phones.npz` in a folder of clips."""
        names = np.frombuffer("\n".join(self.names).encode(), np.uint8)
        np.savez(folder / _PHONES, clips=self.clips, values=self.values, offsets=self.offsets, names=names)

    @classmethod
    def read(cls, folder: Path) -> Phones | None:
        """What `write` wrote; None if nothing is there."""
        if not (folder / _PHONES).is_file():
            return None
        with np.load(folder / _PHONES, allow_pickle=False) as stored:
            names = tuple(stored["names"].tobytes().decode().split("\n"))
            return cls(stored["clips"], stored["values"], stored["offsets"], names)


class Clips:
    """The clips of a run.

    Attributes:
        ids: of every clip.
        offsets: (U + 1,) int64, where each begins in `samples`.
        samples: (S,) int16 of all, mapped from the file.
        held_out: (U,) booleans: clips that only measure.
        facts: what `clips.json` says: "digest", "hours", "sources" and whatever was given to `write`.
        phones: of the clips that are aligned; None if none is.
    """

    def __init__(
        self,
        ids: Sequence[str],
        offsets: NDArray[np.int64],
        samples: NDArray[np.int16],
        held_out: NDArray[np.bool_],
        facts: Mapping[str, Any],
        phones: Phones | None = None,
    ) -> None:
        """As the attributes."""
        self.ids, self.offsets, self.samples, self.held_out, self.facts = ids, offsets, samples, held_out, facts
        self.phones = phones
        self._placed: dict[torch.device, Tensor] = {}

    @classmethod
    def write(
        cls,
        folder: Path,
        clips: Iterable[tuple[str, bool, NDArray[np.int16]]],
        facts: Mapping[str, Any],
        phones: Phones | None = None,
    ) -> Clips:
        """Write the files of a folder whole, the facts last, and read them.

        Args:
            folder: made if need be.
            clips: id, whether it is held out, samples (S,).
            facts: kept in `clips.json`.
            phones: of aligned clips.
        """
        folder.mkdir(parents=True, exist_ok=True)
        digest, lines, hours = hashlib.sha256(), [], {True: 0.0, False: 0.0}
        temporary = folder / f".{_SAMPLES}.{os.getpid()}"
        with temporary.open("wb") as file:
            for name, held_out, samples in clips:
                data = np.ascontiguousarray(samples, dtype="<i2").tobytes()
                digest.update(f"{name}\t{len(samples)}\t{int(held_out)}\n".encode())
                digest.update(data)
                file.write(data)
                lines.append(f"{name}\t{len(samples)}\t{int(held_out)}")
                hours[held_out] += len(samples) / SAMPLE_RATE_HZ / 3600
        os.replace(temporary, folder / _SAMPLES)
        (folder / _TABLE).write_text("\n".join(["id\tsamples\theld_out", *lines]) + "\n", encoding="utf-8")
        (folder / _PHONES).unlink(missing_ok=True)
        if phones is not None:
            phones.write(folder)
        whole = {**facts, "digest": "sha256:" + digest.hexdigest(), "clips": len(lines)}
        whole |= {"hours": round(hours[False], 4), "hours_held_out": round(hours[True], 4)}
        temporary = folder / f".{_FACTS}.{os.getpid()}"
        temporary.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, folder / _FACTS)
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Clips:
        """The clips in a folder that `write` made.

        Raises:
            RequestError: if there are none, or the files do not fit each other.
        """
        if not (folder / _FACTS).is_file():
            raise RequestError(f"{folder}: no prepared clips ({_FACTS}) there. Fix: superb-probe pretrain --data ...")
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        rows = [line.split("\t") for line in (folder / _TABLE).read_text(encoding="utf-8").splitlines()[1:]]
        offsets = np.concatenate([[0], np.cumsum([int(row[1]) for row in rows], dtype=np.int64)]).astype(np.int64)
        size = (folder / _SAMPLES).stat().st_size
        if size != 2 * int(offsets[-1]) or len(rows) != facts["clips"]:
            raise RequestError(
                f"{folder}: {_SAMPLES} has {size} bytes and {_TABLE} {len(rows)} clips, expected {2 * int(offsets[-1])} and "
                f"{facts['clips']}. Fix: delete the folder; it is made again."
            )
        samples = np.memmap(folder / _SAMPLES, dtype="<i2", mode="c") if size else np.zeros(0, np.int16)
        held_out = np.array([row[2] == "1" for row in rows], dtype=np.bool_)
        return cls([row[0] for row in rows], offsets, samples, held_out, facts, Phones.read(folder))

    def __len__(self) -> int:
        """U."""
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(U,) samples of every clip."""
        return np.diff(self.offsets)

    def waveform(self, index: int) -> NDArray[np.float32]:
        """(S,) in [-1, 1]."""
        stretch = self.samples[self.offsets[index] : self.offsets[index + 1]]
        wave: NDArray[np.float32] = np.asarray(stretch, dtype=np.float32) / np.float32(FULL_SCALE)
        return wave

    def on(self, device: torch.device) -> Tensor:
        """All samples (S,) int16: on a GPU that has room for them, copied once; else where they are, mapped."""
        if device not in self._placed:
            mapped = torch.from_numpy(self.samples)
            fits = device.type == "cuda" and mapped.nbytes < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
            self._placed[device] = mapped.to(device) if fits else mapped
        return self._placed[device]


@dataclass(frozen=True, slots=True)
class Units:
    """The targets of a run: one unit a frame.

    Attributes:
        values: int16, of all clips one after the other.
        offsets: (U + 1,).
        hop_samples: between units: 160 for cepstra, 320 for layers. Unit i of a clip belongs to the frame at sample i x hop.
        clusters: how many there are.
        inertia: mean square distance of a frame to its centre, over the training clips.
        source: in words.
    """

    values: NDArray[np.int16]
    offsets: NDArray[np.int64]
    hop_samples: int
    clusters: int
    inertia: float
    source: str

    def write(self, path: Path) -> None:
        """One .npz, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        facts = json.dumps([self.hop_samples, self.clusters, self.inertia, self.source])
        np.savez(temporary, values=self.values, offsets=self.offsets, facts=np.frombuffer(facts.encode(), np.uint8))
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Units:
        """What `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            hop, clusters, inertia, source = json.loads(stored["facts"].tobytes())
            return cls(stored["values"], stored["offsets"], hop, clusters, inertia, source)


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the crops of one batch lie.

    Attributes:
        starts: (B,) int64 first sample of each crop, in all clips' samples.
        units: (B,) int64 first unit, in all clips' units.
        length: S, of every crop.
        mask: (B, T) booleans.
    """

    starts: NDArray[np.int64]
    units: NDArray[np.int64]
    length: int
    mask: NDArray[np.bool_]


class Sampler:
    """Batches of crops by number: an epoch has every training clip at least once, in an order of its own.

    A clip is cropped, anywhere, to the longest of the recipe's lengths that it has; rows of a batch have one length and as many as
    `batch_s` allows. A length whose clips do not fill its last batch fills it with clips of that length drawn again.

    Attributes:
        left_out: clips shorter than the shortest length.
        clips_used: clips in an epoch.
        batches: of an epoch.
    """

    def __init__(
        self, clips: Clips, units: Units, recipe: Recipe, frames_of: Callable[[int], int], hop_samples: int
    ) -> None:
        """`frames_of` says how many frames the encoder gives for samples, `hop_samples` how far apart they are.

        Raises:
            RequestError: if no clip is long enough.
        """
        self.clips, self.units, self.recipe = clips, units, recipe
        self.frames_of, self.units_per_frame = frames_of, hop_samples // units.hop_samples
        allowed = [round(seconds * SAMPLE_RATE_HZ) for seconds in recipe.clip_lengths_s]
        lengths = clips.lengths
        place = np.searchsorted(np.array(allowed), lengths, side="right") - 1
        wanted = ~clips.held_out
        self.left_out = int((wanted & (place < 0)).sum())
        self.groups = {allowed[p]: np.flatnonzero(wanted & (place == p)) for p in sorted(set(place[wanted])) if p >= 0}
        self.rows = {length: max(1, round(recipe.batch_s * SAMPLE_RATE_HZ) // length) for length in self.groups}
        self.clips_used = sum(len(group) for group in self.groups.values())
        self.batches = sum(-(-len(group) // self.rows[length]) for length, group in self.groups.items())
        if not self.batches:
            raise RequestError(
                f"{len(clips)} clips, and none has {recipe.clip_lengths_s[0]:g} s. Fix: more data, or shorter clip_lengths_s."
            )
        self._epoch: tuple[int, list[tuple[int, NDArray[np.int64]]]] = (-1, [])

    def batch(self, number: int) -> Batch:
        """The batch of that number, counted over all epochs."""
        epoch, place = divmod(number, self.batches)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw_epoch(epoch))
        length, members = self._epoch[1][place]
        generator = np.random.default_rng([self.recipe.seed, 1, number])
        return self.crop(members, length, generator)

    def crop(self, members: NDArray[np.int64], length: int, generator: np.random.Generator) -> Batch:
        """Crops of `length` samples of some clips, at random, with a mask; a frame's unit is the one nearest to it."""
        frames, hop = self.frames_of(length), self.units.hop_samples
        counts = np.diff(self.units.offsets)[members]
        # The last frame's unit must exist: the first unit is at most this.
        last_unit = counts - 1 - self.units_per_frame * (frames - 1)
        room = np.minimum(self.clips.lengths[members] - length, last_unit * hop + (hop + 1) // 2 - 1)
        if (room < 0).any():
            short = self.clips.ids[int(members[int(np.argmin(room))])]
            raise CheckError(f"{short}: too few units for {frames} frames. Fix: delete the units; they are made again.")
        start = (generator.random(len(members)) * (room + 1)).astype(np.int64)
        mask = span_mask(
            len(members),
            frames,
            generator,
            probability=self.recipe.mask_probability,
            span_frames=self.recipe.mask_frames,
            least_spans=self.recipe.least_spans,
        )
        units = self.units.offsets[members] + (start + hop // 2) // hop
        return Batch(self.clips.offsets[members] + start, units, length, mask)

    def _draw_epoch(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        generator = np.random.default_rng([self.recipe.seed, 2, epoch])
        batches = []
        for length, group in self.groups.items():
            rows = self.rows[length]
            order = generator.permutation(group)
            missing = -len(order) % rows
            order = np.concatenate([order, generator.choice(group, missing)])
            batches += [(length, order[start : start + rows]) for start in range(0, len(order), rows)]
        return [batches[index] for index in generator.permutation(len(batches))]


def fetch(
    batch: Batch, samples: Tensor, units: Tensor, units_per_frame: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms (B, S) float32, mask (B, T) and targets (B, T) int64 of a batch, on a device.

    Args:
        batch: which.
        samples: all clips' samples, int16, on the device or not.
        units: all clips' units, int16, where the samples are.
        units_per_frame: 1, or 2 for units twice as dense as frames.
        device: where to.
    """
    numbers = _moved(torch.from_numpy(np.stack([batch.starts, batch.units])), samples.device)
    mask = _moved(torch.from_numpy(batch.mask), device)
    index = numbers[0, :, None] + torch.arange(batch.length, device=samples.device)
    places = numbers[1, :, None] + units_per_frame * torch.arange(batch.mask.shape[1], device=samples.device)
    wavs, targets = _moved(samples[index], device), _moved(units[places], device)
    return wavs.float() / FULL_SCALE, mask, targets.long()


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU through pinned memory, without waiting."""
    if x.device.type == device.type or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def padded_batches(
    clips: Clips, members: Sequence[int], batch_samples: int, device: torch.device
) -> Iterable[tuple[list[int], Tensor, Tensor]]:
    """Whole clips for encoding: their indices, waveforms (B, S) with zeros at the end, and lengths (B,); longest first.

    Args:
        clips: the clips.
        members: which of them.
        batch_samples: of a batch, padding included; a longer clip is alone.
        device: where the tensors are to be.
    """
    lengths = clips.lengths
    left = sorted((int(index) for index in members), key=lambda index: (-int(lengths[index]), index))
    while left:
        rows = max(1, batch_samples // max(1, int(lengths[left[0]])))
        taken, left = left[:rows], left[rows:]
        padded = np.zeros((len(taken), int(lengths[taken[0]])), np.float32)
        for row, index in enumerate(taken):
            padded[row, : lengths[index]] = clips.waveform(index)
        yield taken, torch.from_numpy(padded).to(device), torch.tensor(lengths[taken]).to(device)
