"""How a selective scan is laid over an NVIDIA GPU: what a lane, a block and a launch of its kernels take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

MAX_SHARED_BYTES = 48 * 1024  # of a block of the forward pass, which declares its shared memory
LANE_STATES = 12  # states of all its channels that a lane holds, where a group of eight lanes is enough
RESIDENT = 5  # blocks of a processor: so all of batch 16 runs at once
MIN_CHUNK_FRAMES = 470
# Times over that a processor could hold its blocks: from here on scanning pieces of time twice is faster than idling.
WORTH_SPLITTING = 4


@dataclass(frozen=True, slots=True)
class Split:
    """How a scan is laid over the chip.

    Attributes:
        channels: of a lane.
        group: lanes that share a channel's states.
        chunks: pieces of time.
        polynomial: of a lane's channels x states, how many take their exponential on the multiply-add units.
        threads: of a block.
        resident: blocks of a processor that the registers must have room for.
        tile: frames between two barriers, a multiple of the group.
        unroll: of the loop over a tile.
    """

    channels: int
    group: int
    chunks: int
    polynomial: int = 0
    threads: int = 128
    resident: int = 1
    tile: int = 8
    unroll: int = 2

    def shared_bytes(self, states: int) -> int:
        """Memory that a block shares, in two halves: step sizes and drives, B and C, shares of y; as `Shared` of the source."""
        sets = self.threads // self.group
        staged = sets * 2 * self.channels
        weights = self.group * 2 * -(-states // self.group)
        return 4 * 2 * self.tile * (staged + weights + sets * self.channels + 16)


@dataclass(frozen=True, slots=True)
class GradientLayout:
    """How the backward pass is laid over the chip.

    Attributes:
        channels: of a lane.
        threads: of a block.
        resident: blocks of a processor that the registers must have room for.
        chunk_frames: frames between the states that the forward pass keeps.
    """

    channels: int
    threads: int
    resident: int
    chunk_frames: int

    @property
    def block_channels(self) -> int:
        """Channels of a block: four lanes share them."""
        return self.threads // 4 * self.channels

    def shared_bytes(self, states: int) -> int:
        """Memory that a block shares: tiles of B and C, sums of its warps, states within a chunk, A."""
        own = -(-states // 4)
        tiles = 2 * self.chunk_frames * 4 * own
        sums = 2 * (self.threads // 32) * 2 * 4 * 4 * own
        return 4 * (tiles + sums + (self.chunk_frames // 4 + 1) * own * self.channels * self.threads)


def choose_split(batch: int, width: int, frames: int, states: int, pairs: bool, processors: int) -> Split:
    """The layout for a shape, as measured on an H100 with bf16.

    Args:
        batch: B.
        width: E.
        frames: T.
        states: N.
        pairs: whether two neighbouring channels can be read at once.
        processors: of the GPU.
    """
    channels = 2 if pairs else 1
    group = min(8, 1 << (-(-states * channels // LANE_STATES) - 1).bit_length())
    split = Split(channels, group, 1, resident=RESIDENT if channels * -(-states // group) <= LANE_STATES else 2)
    while split.shared_bytes(states) > MAX_SHARED_BYTES:
        split = dataclasses.replace(split, threads=split.threads // 2)
    blocks = batch * -(-width // (split.threads // group * channels))
    places = processors * split.resident
    chunks = min(places // blocks, frames // MIN_CHUNK_FRAMES) if places // blocks >= WORTH_SPLITTING else 1
    return dataclasses.replace(split, chunks=max(1, chunks))


def choose_gradient_layout(states: int, pairs: bool, limit_bytes: int) -> GradientLayout:
    """The layout of a backward pass.

    Args:
        states: N.
        pairs: whether two neighbouring channels can be read at once.
        limit_bytes: of memory that a block can share.
    """
    channels = 2 if pairs and states <= 32 else 1
    for chunk_frames in (32, 16, 8):
        layout = GradientLayout(channels, 128, 3, chunk_frames)
        if layout.shared_bytes(states) <= limit_bytes:
            break
    return layout
