"""What is kept of an utterance, and which stretches of it are encoded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.downstreams.base import View
from superb_probe.downstreams.manifest import Utterance

Draw = Callable[[int], int]  # a whole number below the one given


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of an utterance.

    Attributes:
        view: "mean" or "frames".
        dtype: in which it is kept.
        layer_norm: normalise every frame before the mean.
        waveform: effects applied to the audio first.
        crops: random stretches kept of an utterance longer than `crop_s`, in view "mean"; 0 keeps all of it.
        crop_s: their length.
        crop_seed: draws where they begin.
        device: where it is kept.
    """

    view: View
    dtype: str
    layer_norm: bool
    waveform: str
    crops: int
    crop_s: float | None
    crop_seed: int
    device: torch.device

    def pieces(self, utterance: Utterance) -> tuple[float, int]:
        """Seconds and number of what is encoded of an utterance."""
        if self.crop_s is None or self.crops == 0 or utterance.duration_s <= self.crop_s:
            return utterance.duration_s, 1
        return self.crop_s, self.crops

    def cut(self, wave: Tensor, utterance: Utterance, sample_rate_hz: int, draw: Draw | None = None) -> list[Tensor]:
        """What is encoded of a waveform (S,): all of it, or crops at places that depend on the seed and the audio alone.

        Args:
            wave: the samples.
            utterance: whose they are.
            sample_rate_hz: their rate.
            draw: where one crop begins, for who encodes anew each time; None for the stored ones.
        """
        length = int(self.crop_s * sample_rate_hz) if self.crop_s is not None else 0
        if length == 0 or wave.numel() <= length or (draw is None and self.crops == 0):
            return [wave]
        if draw is not None:
            start = draw(wave.numel() - length + 1)
            return [wave[start : start + length]]
        words = f"{self.crop_seed} {utterance.audio} {utterance.start_s!r} {utterance.duration_s!r}"
        generator = random.Random(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big"))
        starts = [generator.randrange(wave.numel() - length + 1) for _ in range(self.crops)]
        return [wave[start : start + length] for start in starts]
