"""Training one iteration: updates with master weights in float32, on one process or several, recorded as CUDA graphs where that pays.

An update depends on its number, the weights and the optimiser's state, and on nothing else: batches, masks and dropout are drawn from
the number. So a run that was stopped goes on to the same curve from its last checkpoint.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.pretrain_data import Batch, Clips, Sampler, fetch
from superb_probe.upstreams.pretrain_model import HubertPretraining, Score, lower_precision_
from superb_probe.upstreams.pretrain_recipe import Recipe

_WARM_UP = 2  # passes before a graph is recorded


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this one.
        size: how many.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def find_world(device: torch.device) -> World:
    """The world of `torchrun`'s environment variables, joined; one process without them.

    Raises:
        RequestError: if there are fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if size == 1:
        return World(0, 1, device)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RequestError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did.

    Attributes:
        entropy: mean cross entropy over masked frames, in nats.
        accuracy: share of masked frames whose unit was the likeliest.
        power: mean square of the front end's features.
        gradient_norm: before clipping.
        skipped: whether it was not finite, and the weights stayed.
        audio_s: seconds of audio, of all processes.
    """

    entropy: float
    accuracy: float
    power: float
    gradient_norm: float
    skipped: bool
    audio_s: float


class _Graph:
    """The pass over a batch of one shape, recorded once and replayed."""

    def __init__(self, trainer: Trainer, wavs: Tensor, mask: Tensor, targets: Tensor, pool: Any) -> None:
        """Warm up on a side stream, then record; gradients add up in the parameters' own tensors."""
        self.wavs, self.mask, self.targets = wavs.clone(), mask.clone(), targets.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                trainer.pass_over(self.wavs, self.mask, self.targets)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.sums = trainer.pass_over(self.wavs, self.mask, self.targets)

    def replay(self, wavs: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        self.wavs.copy_(wavs)
        self.mask.copy_(mask)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.sums


class Trainer:
    """The weights of one iteration and how they are updated.

    Attributes:
        model: in the recipe's precision, on the world's device.
        masters: parameter name to float32 weights, which the optimiser updates.
        skipped: updates whose gradient was not finite.
    """

    def __init__(
        self, model: HubertPretraining, sampler: Sampler, recipe: Recipe, steps: int, world: World, graphs: bool = True
    ) -> None:
        """Move the model and split it from its master weights.

        Args:
            model: in float32.
            sampler: its batches.
            recipe: how to train.
            steps: updates of the whole iteration, for the schedule.
            world: the processes.
            graphs: record CUDA graphs on a GPU (never with recomputed activations).
        """
        self.recipe, self.sampler, self.steps, self.world = recipe, sampler, steps, world
        self.model = model.to(world.device).train()
        self.masters = {name: each.detach().clone() for name, each in model.named_parameters()}
        if recipe.precision == "bfloat16":
            lower_precision_(self.model)
        self._parameters: list[Tensor] = [each for _, each in model.named_parameters()]
        for each in self._parameters:
            each.grad = torch.zeros_like(each)
        self._copies = list(self.masters.values())
        self._gradients = [torch.zeros_like(each) for each in self._copies]
        self.optimizer = torch.optim.AdamW(
            self._copies,
            lr=recipe.learning_rate,
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            fused=world.device.type == "cuda",
        )
        self._push()
        self.skipped = 0
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._record = graphs and world.device.type == "cuda" and not recipe.recompute_activations
        self._samples = sampler.clips.on(world.device)
        self._units = torch.from_numpy(sampler.units.values).to(self._samples.device)

    def learning_rate(self, step: int) -> float:
        """Of an update, counted from 0: a linear rise to the recipe's rate, then a linear fall that would reach zero after the last.

        >>> trainer = Trainer.__new__(Trainer)
        >>> trainer.recipe, trainer.steps = Recipe(learning_rate=1.0, warmup_share=0.5), 4
        >>> [trainer.learning_rate(step) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        warmup = round(self.recipe.warmup_share * self.steps)
        share = (step + 1) / warmup if step < warmup else (self.steps - step) / max(1, self.steps - warmup)
        return self.recipe.learning_rate * share

    def update(self, step: int) -> Update:
        """Update number `step`, counted from 0.

        Raises:
            CheckError: if more gradients than the recipe allows were not finite.
        """
        world, recipe = self.world, self.recipe
        sums = torch.zeros(5, device=world.device)
        for part in range(recipe.accumulate):
            number = (step * recipe.accumulate + part) * world.size + world.rank
            batch = self.sampler.batch(number)
            torch.manual_seed(recipe.seed * 2**32 + number)  # dropout
            sums[:4] += self._run(batch)
            sums[4] += len(batch.starts) * batch.length / 16000
            gradients = [cast(Tensor, each.grad) for each in self._parameters]
            if part:
                torch._foreach_add_(self._gradients, gradients)
            else:
                torch._foreach_copy_(self._gradients, gradients)
        world.add_up(sums)
        if world.size > 1:
            flat = torch.cat([each.flatten() for each in self._gradients])
            world.add_up(flat)
            parts = torch.split(flat, [each.numel() for each in self._gradients])
            torch._foreach_copy_(self._gradients, [p.view_as(g) for p, g in zip(parts, self._gradients, strict=True)])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients)))
        entropy, right, masked, power, audio_s, summed_norm = torch.cat([sums, norm[None]]).tolist()
        gradient_norm = summed_norm / masked
        finite = math.isfinite(gradient_norm) and math.isfinite(entropy)
        if finite:
            self._apply(step, min(1.0, recipe.clip_norm / (gradient_norm + 1e-6)) / masked)
        else:
            self.skipped += 1
            if self.skipped > recipe.most_skipped:
                raise CheckError(
                    f"update {step + 1}: gradient norm {gradient_norm}, loss {entropy / masked}; {self.skipped} updates were not "
                    f"finite, and the recipe allows {recipe.most_skipped}. Fix: a lower learning_rate, or precision float32."
                )
        return Update(entropy / masked, right / masked, power / masked, gradient_norm, not finite, audio_s)

    def _apply(self, step: int, scale: float) -> None:
        torch._foreach_mul_(self._gradients, scale)
        for master, gradient in zip(self._copies, self._gradients, strict=True):
            master.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self._push()

    def _push(self) -> None:
        """The master weights into the model."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._copies)

    def _run(self, batch: Batch) -> Tensor:
        """Sums of `Score` of a batch; its gradient is left in the parameters."""
        torch._foreach_zero_([cast(Tensor, each.grad) for each in self._parameters])
        wavs, mask, targets = fetch(batch, self._samples, self._units, self.sampler.units_per_frame, self.world.device)
        if not self._record:
            return self.pass_over(wavs, mask, targets)
        shape = tuple(wavs.shape)
        if shape not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[shape] = _Graph(self, wavs, mask, targets, pool)
            torch._foreach_zero_([cast(Tensor, each.grad) for each in self._parameters])
        return self._graphs[shape].replay(wavs, mask, targets)

    def pass_over(self, wavs: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward; gradients add up in the parameters. Returns the sums of `Score`."""
        score: Score = self.model(wavs, mask, targets)
        score.loss.backward()  # type: ignore[no-untyped-call]
        return score.sums

    def state(self) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint."""
        masters = {name: each.cpu() for name, each in self.masters.items()}
        return {"masters": masters, "optimizer": self.optimizer.state_dict(), "skipped": self.skipped}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            RequestError: if it is of another encoder.
        """
        stored = state["masters"]
        wrong = [
            name
            for name in {**stored, **self.masters}
            if name not in stored or name not in self.masters or stored[name].shape != self.masters[name].shape
        ]
        if wrong:
            raise RequestError(f"the checkpoint is of another encoder: {', '.join(sorted(wrong)[:6])} do not fit.")
        for name, master in self.masters.items():
            master.copy_(stored[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped = int(state["skipped"])
        self._push()

    def weights(self) -> dict[str, Tensor]:
        """The encoder's state dict in float32: the masters under its own names."""
        return {name.removeprefix("encoder."): each.detach().cpu().clone() for name, each in self.masters.items()}


@torch.no_grad()
def measure(model: HubertPretraining, sampler: Sampler, clips: Clips, device: torch.device) -> dict[str, Any]:
    """Masked prediction on held-out clips, with crops and masks that are always the same.

    Returns:
        "entropy" (nats), "accuracy", "chance" (accuracy of always saying the commonest unit of the masked frames), "masked" frames,
        "targets" and "likeliest" (how often each unit was right, and was said, at masked frames). Empty without held-out clips.
    """
    batches = held_out_batches(sampler, clips)
    if not batches:
        return {}
    samples = clips.on(device)
    units = torch.from_numpy(sampler.units.values).to(samples.device)
    clusters = sampler.units.clusters
    sums = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(2, clusters, dtype=torch.int64)
    training = model.training
    model.eval()
    for batch in batches:
        wavs, mask, targets = fetch(batch, samples, units, sampler.units_per_frame, device)
        score = model(wavs, mask, targets)
        sums += score.sums.double().cpu()
        for row, said in enumerate((targets, score.likeliest)):
            counts[row] += torch.bincount(said[mask].clamp(min=0), minlength=clusters).cpu()
    model.train(training)
    entropy, right, masked, _ = sums.tolist()
    return {
        "entropy": entropy / masked,
        "accuracy": right / masked,
        "chance": int(counts[0].max()) / masked,
        "masked": int(masked),
        "targets": counts[0].tolist(),
        "likeliest": counts[1].tolist(),
    }


def held_out_batches(sampler: Sampler, clips: Clips) -> list[Batch]:
    """Fixed crops of the held-out clips that are long enough."""
    allowed = [round(seconds * 16000) for seconds in sampler.recipe.clip_lengths_s]
    place = np.searchsorted(np.array(allowed), clips.lengths, side="right") - 1
    batches = []
    for index, length in enumerate(allowed):
        members = np.flatnonzero(clips.held_out & (place == index))
        rows = max(1, round(sampler.recipe.batch_s * 16000) // length)
        for start in range(0, len(members), rows):
            generator = np.random.default_rng([sampler.recipe.seed, 4, index, start])
            batches.append(sampler.crop(members[start : start + rows], length, generator))
    return batches
