"""What one trial trains, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Head, Score, Task
from superb_probe.probes.plan import Trial
from superb_probe.probes.weighted_sum import WeightedSum


class Probe(nn.Module):
    """A weighted sum and a head: what one trial trains.

    Attributes:
        weighted_sum: None when a single layer is read.
        head: the task's head.
    """

    def __init__(self, head: Head, num_layers: int | None) -> None:
        """`num_layers` is None when a single layer is read."""
        super().__init__()
        self.weighted_sum = None if num_layers is None else WeightedSum(num_layers)
        self.head = head

    def forward(self, states: Tensor, num_frames: Tensor) -> Any:
        """The head's outputs for states (L, B, T, D), or (1, B, T, D) of a single layer."""
        frames = states[0] if self.weighted_sum is None else self.weighted_sum(states)
        return self.head(frames, num_frames)


@dataclass(slots=True)
class Runner:
    """One trial in training: its probe, its own stream of random numbers, its best weights so far.

    Attributes:
        trial: which.
        task: as tuned by the best score so far.
        probe: what is trained.
        random: states of the generators, of the CPU and of the device.
        num_params: numbers trained.
        error: why it failed; None while it has not.
        stopped: the update after which it was given up as hopeless; None if it was not.
        step: the update of the best weights.
        selected: the metric that chose them.
        weights: the best so far.
        curve: (update, metric) at every evaluation.
    """

    trial: Trial
    task: Task
    probe: Probe
    random: list[Tensor]
    num_params: int
    error: str | None = None
    stopped: int | None = None
    step: int | None = None
    selected: float | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it is still trained."""
        return self.error is None and self.stopped is None

    def keep_if_best(self, step: int, score: Score, higher_is_better: bool) -> None:
        """Copy the weights when the selecting metric is better than at every evaluation before."""
        value = selecting(score)
        self.curve.append((step, value))
        if self.selected is None or (value > self.selected if higher_is_better else value < self.selected):
            self.step, self.selected = step, value
            self.task = self.task.tuned_by(score)
            self.weights = {name: tensor.detach().clone() for name, tensor in self.probe.state_dict().items()}


def selecting(score: Score) -> float:
    """What chooses the update: the metric, or what the task names instead."""
    return score.value if score.selects is None else score.selects


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the default generators: the CPU's and a GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
