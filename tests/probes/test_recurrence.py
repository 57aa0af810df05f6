"""Recurrent heads of several trials as one stack: the layer against torch's, the training against that of one head after another."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from superb_probe.probes import kernels, recurrence, recurrent_stack, training
from superb_probe.probes.ctc import BlstmCtc, greedy_ids
from superb_probe.probes.fit import FitResult
from superb_probe.probes.recurrence import blstm
from superb_probe.probes.specaugment import SpecAugment
from superb_probe.probes.update import StackedUpdater

LENGTHS = [7, 3, 1, 6, 5]


def layers_of(count: int, size: int, width: int) -> list[nn.LSTM]:
    torch.manual_seed(3)
    return [nn.LSTM(size, width, batch_first=True, bidirectional=True) for _ in range(count)]


def packed(rnn: nn.LSTM, frames: Tensor, lengths: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(rnn(rows)[0], batch_first=True, total_length=frames.shape[1])[0]


def errors(device: str, *, plain: bool, width: int = 64, size: int = 24) -> dict[str, float]:
    """The largest relative error of the output and of each gradient, against torch's layer on packed rows."""
    rnns = layers_of(3, size, width)
    lengths = torch.tensor(LENGTHS)
    frames = torch.randn(3, len(LENGTHS), 7, size)
    slope = torch.randn(3, len(LENGTHS), 7, 2 * width)  # of padding too: nothing of it may reach a gradient
    theirs = frames.clone().requires_grad_()
    wanted = torch.stack([packed(rnn, each, lengths) for rnn, each in zip(rnns, theirs, strict=True)])
    gradients = torch.autograd.grad(wanted, [theirs, *[each for rnn in rnns for each in rnn.parameters()]], slope)
    names = [name for name, _ in rnns[0].named_parameters()]
    stacked = [torch.stack([dict(rnn.named_parameters())[name].detach() for rnn in rnns]) for name in names]
    ours = frames.to(device).requires_grad_()
    weights = [each.to(device).requires_grad_() for each in stacked]
    found = blstm(ours, lengths.to(device), weights, plain=plain)
    mine = torch.autograd.grad(found, [ours, *weights], slope.to(device))
    pairs = {"output": (found, wanted), "input": (mine[0], gradients[0])}
    for place, name in enumerate(names):
        pairs[name] = mine[1 + place], torch.stack([gradients[1 + len(names) * number + place] for number in range(3)])
    return {name: float((a.detach().cpu() - b.detach()).norm() / b.detach().norm()) for name, (a, b) in pairs.items()}


def test_the_layer_is_torchs_on_rows_of_any_length() -> None:
    assert max(errors("cpu", plain=True).values()) < 1e-6


@pytest.mark.parametrize("name", ["_places", "_before"])
def test_a_step_at_the_wrong_frame_would_be_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Mutants: both directions go ahead in time; recurrent weights learn from the other direction's states."""
    real = getattr(recurrence, name)

    def ahead(number: int, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        places, valid = real(number, num_frames)
        return places[:1].expand(2, -1), valid

    def other(output: Tensor, way: int, width: int) -> Tensor:
        return real(output, 1 - way, width)  # type: ignore[no-any-return]

    monkeypatch.setattr(recurrence, name, {"_places": ahead, "_before": other}[name])
    assert max(errors("cpu", plain=True).values()) > 1e-3


def test_the_kernels_give_the_same_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    code = "import test_recurrence as t; assert max(t.errors('cpu', plain=False).values()) < 2e-6"
    where = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": where}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.cuda
def test_the_kernels_give_the_same_on_a_gpu() -> None:
    assert max(errors("cuda", plain=False).values()) < 2e-6
    assert max(errors("cuda", plain=False, width=1024, size=80).values()) < 2e-6


def task_of(toy: SimpleNamespace) -> Any:
    """The toy task, its tones told by a recurrent head's only token."""

    class Told(BlstmCtc):
        def predict(self, outputs: Any) -> list[dict[str, str]]:  # type: ignore[override]
            return [{"tone": self.tokens[ids[0]] if len(ids) else ""} for ids in greedy_ids(outputs)]

    class ToldTask(toy.Task):  # type: ignore[misc, name-defined]
        def target(self, utterance: Any, labels: Any) -> dict[str, Tensor]:
            return {"tokens": torch.tensor([1 + labels.classes["tone"].index(utterance.labels["tone"])])}

        def head(self, dim: int, labels: Any, options: Any = None) -> Told:
            masks = SpecAugment(torch.Generator().manual_seed(1), dim_mask_width=2, time_mask_frames=3, warp_frames=0)
            return Told(dim, ("<s>", *labels.classes["tone"]), width=64, projection=8, augment=masks)

    return ToldTask()


def trained(world: Any, toy: SimpleNamespace, lrs: tuple[float, ...] = (0.01, 1e38, 0.001)) -> list[FitResult]:
    trials = [toy.trial(lr=lr, seed=seed) for seed in (1, 2) for lr in lrs]
    found: list[FitResult] = world(trials, task_of(toy), budget={"steps": 6, "batch": 7, "evaluate_every": 3})
    return found


def furthest(a: list[FitResult], b: list[FitResult]) -> float:
    """The typical difference of a weight, as a share of how far the weights have moved; the largest of all trials.

    Not the largest difference: Adam moves a weight whose gradient is rounding alone by the whole rate, either way.
    """
    found = []
    for one, other in zip(a, b, strict=True):
        values, others = (torch.cat([each.weights[name].flatten() for name in one.weights]) for each in (one, other))
        found.append(float((values - others).abs().mean() / values.std()))
    return max(found)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trains as on a GPU, without Triton; the list says how many trials went through at once."""
    sizes: list[int] = []
    real = recurrent_stack.BlstmStack.learn

    def learn(self: Any, runners: Any, *rest: Any) -> Any:
        sizes.append(len(runners))
        return real(self, runners, *rest)

    monkeypatch.setattr(training, "can_stack_recurrent", lambda heads, device: True)
    monkeypatch.setattr(recurrent_stack.BlstmStack, "learn", learn)
    return sizes


def test_the_stack_trains_what_each_head_alone_does(
    world: Any, toy: SimpleNamespace, stacked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(world, toy)
    assert set(stacked) >= {3, 1}, "all three of a seed, and two apart once the one between them has diverged"
    monkeypatch.setattr(training, "ROWS_TOGETHER", 1)
    stacked.clear()
    by_one = trained(world, toy)
    assert set(stacked) == {1}
    monkeypatch.setattr(training, "can_stack_recurrent", lambda heads, device: False)
    alone = trained(world, toy)
    assert (
        [each.error is None for each in together] == [each.error is None for each in alone] == [True, False, True] * 2
    )
    kept = [place for place, each in enumerate(alone) if each.error is None]
    together, by_one, alone = ([each[place] for place in kept] for each in (together, by_one, alone))
    assert furthest(together, alone) < 2e-5 and furthest(by_one, alone) < 2e-5
    assert [each.curve for each in together] == [each.curve for each in alone]


def test_random_numbers_of_another_trial_would_be_noticed(
    world: Any, toy: SimpleNamespace, stacked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant: dropout goes on with the random numbers of the trial before."""
    right = trained(world, toy, (0.01, 0.001))
    monkeypatch.setattr(recurrent_stack, "set_random_state", lambda state, device: None)
    assert furthest(trained(world, toy, (0.01, 0.001)), right) > 1e-3


def test_gradients_are_added_where_the_updater_looks(toy: SimpleNamespace) -> None:
    weights = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    updater = StackedUpdater([[each] for each in weights], "adam", [0.1] * 3, 1.0)
    leaf = recurrent_stack.BlstmStack(updater, BlstmCtc(4, ("<s>", "A"), width=64), first=0)._leaf(0, slice(1, 3))
    (leaf * torch.tensor([2.0, 5.0])[:, None, None]).sum().backward()
    assert [float(each.grad.sum()) for each in weights if each.grad is not None] == [0.0, 12.0, 30.0]


@pytest.mark.parametrize(
    ("width", "device", "capability", "stacks"),
    [(64, "cuda", (8, 0), True), (96, "cuda", (9, 0), False), (64, "cuda", (7, 5), False), (64, "cpu", (9, 0), False)],
)
def test_only_heads_and_devices_that_fit_the_kernels_are_stacked(
    monkeypatch: pytest.MonkeyPatch, width: int, device: str, capability: tuple[int, int], stacks: bool
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    heads = [BlstmCtc(4, ("<s>", "A"), width=width) for _ in range(2)]
    assert recurrent_stack.can_stack_recurrent(heads, torch.device(device)) is stacks
    assert not recurrent_stack.can_stack_recurrent([*heads, nn.Linear(1, 1)], torch.device(device))  # type: ignore[list-item]
