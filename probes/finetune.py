"""Fine-tuning: an encoder and a CTC head trained together, update by update, resumable at any of them.

The recipe is that of arXiv 2506.12606 (sections 4.2 and 4.3, and its code's configuration): Adam at 1e-4, a tenth of the updates to
warm up, four tenths held, then down to zero; for the first tenth only the head is trained, then all but the convolutional front end;
SpecAugment of the states. In the released code the encoder stays frozen throughout unless a run is resumed; here a test sees it move.

An update depends on its number, the weights and the optimiser's state alone: batches, masks and dropout are drawn from the number.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes.batches import collate, training_batches
from superb_probe.probes.ctc import greedy_ids
from superb_probe.probes.finetune_data import Passage
from superb_probe.probes.finetune_model import FinetuneModel
from superb_probe.upstreams.pretrain_model import lower_precision_

CHECKPOINT = "checkpoint.pt"
SAMPLE_RATE_HZ = 16_000
KEPT_S = 8 * 3600.0  # a corpus up to this long is kept decoded: 1.8 GB


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """How a recogniser is fine-tuned.

    Attributes:
        steps: updates.
        lr: the highest rate.
        batch: passages of an update.
        part_s: most seconds of audio, padding included, that go through the model at once; an update of more is summed from parts.
            One passage may be longer. It bounds memory and changes nothing else but dropout's draws.
        frozen_share: of the updates, in which only the head is trained.
        warmup_share: of the updates, in which the rate rises.
        hold_share: of the updates, in which it stays.
        clip: largest gradient norm.
        precision: "float32", or "bfloat16": matrix products in it, weights and sums in float32.
        seed: of order, masks and dropout.
        evaluate_every: updates between evaluations on dev.
    """

    steps: int = 2000
    lr: float = 1e-4
    batch: int = 16
    part_s: float = 200.0
    frozen_share: float = 0.1
    warmup_share: float = 0.1
    hold_share: float = 0.4
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 1
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        """Check the values, all at once."""
        problems = [
            f"{name} is {getattr(self, name)}"
            for name in ("steps", "batch", "evaluate_every")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}" for name in ("lr", "part_s", "clip") if not getattr(self, name) > 0
        ]
        problems += [
            f"{name} is {getattr(self, name)}"
            for name in ("frozen_share", "warmup_share", "hold_share")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.warmup_share + self.hold_share > 1:
            problems.append("warmup_share and hold_share are more than the whole")
        if self.precision not in ("float32", "bfloat16"):
            problems.append(f"precision is {self.precision!r}, not float32 or bfloat16")
        if problems:
            raise RequestError(f"fine-tuning: {'; '.join(problems)}")

    @property
    def frozen_steps(self) -> int:
        """Updates in which only the head is trained."""
        return round(self.frozen_share * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0: up in a line, held, down in a line that reaches zero after the last.

        >>> recipe = FinetuneRecipe(steps=10, lr=1.0, warmup_share=0.2, hold_share=0.4)
        >>> [round(recipe.rate(step), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        warmup, hold = round(self.warmup_share * self.steps), round(self.hold_share * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if step < warmup + hold:
            return self.lr
        return self.lr * (self.steps - step) / max(1, self.steps - warmup - hold)


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did.

    Attributes:
        loss: mean over the passages.
        gradient_norm: before clipping.
        audio_s: seconds of audio.
        seconds: that it took.
    """

    loss: float
    gradient_norm: float
    audio_s: float
    seconds: float


class Finetuning:
    """A model in training.

    Attributes:
        step: updates done.
    """

    def __init__(
        self,
        model: FinetuneModel,
        train: Sequence[Passage],
        targets: Sequence[Tensor],
        recipe: FinetuneRecipe,
        device: torch.device,
    ) -> None:
        """`targets` are the token ids of each passage."""
        self.model, self.recipe, self.device = model.to(device), recipe, device
        self._train, self._targets = train, targets
        self.step = 0
        # What is updated is float32: the head's own weights, and a copy of the encoder's where that computes in bfloat16.
        self._masters = {name: each.detach().clone() for name, each in model.encoder.named_parameters()}
        if recipe.precision == "bfloat16":
            lower_precision_(cast(Any, model.encoder))
        self._optimizer = torch.optim.Adam([*self._masters.values(), *model.head.parameters()], lr=recipe.lr)
        self._rows = self._batches(0)
        total_s = sum(passage.duration_s for passage in train)
        self._kept: dict[int, Tensor] | None = {} if total_s <= KEPT_S else None

    def _batches(self, step: int) -> Iterator[list[int]]:
        lengths = [round(passage.duration_s * 100) for passage in self._train]
        order = torch.Generator().manual_seed(self.recipe.seed)
        similar = len(set(lengths)) > 1
        return islice(training_batches(lengths, self.recipe.batch, order, similar=similar), step, None)

    def run(self, until: int) -> Iterator[Update]:
        """Make updates until `until` are done, reading the next batch's audio meanwhile.

        Raises:
            CheckError: if a loss or a gradient is not finite.
        """
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, next(self._rows)) if self.step < until else None
            while ahead is not None:
                rows, wavs = ahead.result()
                ahead = reader.submit(self._read, next(self._rows)) if self.step + 1 < until else None
                yield self._update(rows, wavs)
        self._rows = self._batches(self.step)

    def _read(self, rows: list[int]) -> tuple[list[int], list[Tensor]]:
        return rows, [self._waveform(row) for row in rows]

    def _waveform(self, row: int) -> Tensor:
        """A passage's samples, decoded once where the corpus is small."""
        if self._kept is None:
            return self._train[row].waveform()
        if row not in self._kept:
            self._kept[row] = self._train[row].waveform()
        return self._kept[row]

    def _update(self, rows: list[int], wavs: list[Tensor]) -> Update:
        started, recipe, model = time.perf_counter(), self.recipe, self.model
        if self.step >= recipe.frozen_steps and model.frozen:
            model.unfreeze()
        model.train()
        torch.manual_seed(recipe.seed * 2**32 + self.step)
        if model.augment is not None:
            model.augment.generator.manual_seed(recipe.seed * 2**32 + self.step)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in parts([len(wav) for wav in wavs], recipe.part_s):
            loss = self._loss([rows[number] for number in part], [wavs[number] for number in part])
            (loss * (len(part) / len(rows))).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * (len(part) / len(rows))
        for name, parameter in model.encoder.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            self._masters[name].grad = None if gradient is None else gradient.float()
        updated = [each for group in self._optimizer.param_groups for each in group["params"] if each.grad is not None]
        norm = nn.utils.clip_grad_norm_(updated, recipe.clip)
        loss_value, norm_value = float(total), float(norm)
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            raise CheckError(
                f"update {self.step + 1}: loss {loss_value}, gradient norm {norm_value}. Fix: a lower --lr, or --precision float32"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        self._optimizer.step()
        self._push()
        self.step += 1
        audio_s = sum(len(wav) for wav in wavs) / SAMPLE_RATE_HZ
        return Update(loss_value, norm_value, audio_s, time.perf_counter() - started)

    def _loss(self, rows: list[int], wavs: list[Tensor]) -> Tensor:
        padded, lengths = stacked(wavs, self.device)
        outputs = self.model(padded, lengths)
        names = [self._train[row].id for row in rows]
        batch: Batch = collate(names, outputs.num_frames, [{"tokens": self._targets[row]} for row in rows])
        loss: Tensor = self.model.head.loss(outputs, batch)
        return loss

    @torch.no_grad()
    def _push(self) -> None:
        torch._foreach_copy_(list(self.model.encoder.parameters()), list(self._masters.values()))

    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder's state dict in float32."""
        return {name: each.detach().cpu().clone() for name, each in self._masters.items()}

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write all that resuming needs, whole or not at all; `more` is plain values of the caller's."""
        content = {
            "step": self.step,
            "encoder": self._masters,
            "head": self.model.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "more": dict(more),
        }
        temporary = path.with_suffix(".part")
        torch.save(content, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> dict[str, Any]:
        """Take over what `save` wrote; returns its `more`.

        Raises:
            RequestError: if it is of another model.
        """
        content = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.model.encoder.load_state_dict(content["encoder"])
            self.model.head.load_state_dict(content["head"])
        except RuntimeError as error:
            raise RequestError(
                f"{path}: of another encoder or head. Fix: another --out, or the options it began with"
            ) from error
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(content["encoder"][name])
        self.step = int(content["step"])
        if self.step > self.recipe.frozen_steps:
            self.model.unfreeze()
        self._optimizer.load_state_dict(content["optimizer"])
        self._rows = self._batches(self.step)
        more: dict[str, Any] = content["more"]
        return more


def parts(num_samples: Sequence[int], part_s: float) -> list[list[int]]:
    """The rows of a batch in parts of at most so many seconds with their padding, at least one row each; rows by length.

    >>> parts([16000, 48000, 32000], 4.0)
    [[0, 2], [1]]
    """
    found: list[list[int]] = []
    for row in sorted(range(len(num_samples)), key=lambda each: num_samples[each]):
        if found and (len(found[-1]) + 1) * num_samples[row] <= part_s * SAMPLE_RATE_HZ:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def stacked(wavs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Waveforms (B, S), padded with zeros, and their lengths (B,), on a device."""
    lengths = torch.tensor([len(wav) for wav in wavs])
    return nn.utils.rnn.pad_sequence(list(wavs), batch_first=True).to(device), lengths.to(device)


@torch.no_grad()
def transcribe(model: FinetuneModel, rows: Sequence[Passage], part_s: float, device: torch.device) -> list[list[int]]:
    """Token ids of each passage by greedy decoding, in eval mode.

    Args:
        model: put back into the mode it was in.
        rows: passages.
        part_s: most seconds of audio at once, padding included.
        device: of the model.
    """
    was_training = model.training
    model.eval()
    found: list[list[int]] = [[] for _ in rows]
    for part in parts([round(row.duration_s * SAMPLE_RATE_HZ) for row in rows], part_s):
        padded, lengths = stacked([rows[number].waveform() for number in part], device)
        for number, ids in zip(part, greedy_ids(model(padded, lengths)), strict=True):
            found[number] = ids.tolist()
    model.train(was_training)
    return found


def evaluations(recipe: FinetuneRecipe) -> list[int]:
    """Updates after which dev is evaluated: every so many, and the last.

    >>> evaluations(FinetuneRecipe(steps=5, evaluate_every=2))
    [2, 4, 5]
    """
    return sorted({*range(recipe.evaluate_every, recipe.steps + 1, recipe.evaluate_every), recipe.steps})
