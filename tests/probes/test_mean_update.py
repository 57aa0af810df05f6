"""An update of linear heads in a few launches is the one that autograd and Adam make, trial by trial."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from superb_probe.probes import kernels, mean_update
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.mean_update import MeanUpdate, fits
from superb_probe.probes.update import StackedUpdater
from superb_probe.probes.weighted_sum import Mixer

SMALL: dict[str, Any] = {"dim": 128, "width": 64, "sizes": (3, 5), "layers": 3, "rows": 6, "means": 9}
BASE: dict[str, Any] = {"dim": 768, "width": 256, "sizes": (6, 14, 4), "layers": 13, "rows": 32, "means": 50}
SEED_OF = [0, 0, 1, 1, 1]
SINGLE = [None, None, None, 1, None]  # the fourth trial reads one layer
UPDATES = 3


class Problem:
    """Five trials of two seeds, and the rows of some updates. The last row of each is there to fill up, and counts nothing."""

    def __init__(
        self, dim: int, width: int, sizes: tuple[int, ...], layers: int, rows: int, means: int, optimizer: str = "adam"
    ) -> None:
        draw = torch.Generator().manual_seed(7)
        torch.manual_seed(7)
        classes = {f"slot{slot}": [str(number) for number in range(size)] for slot, size in enumerate(sizes)}
        self.means = torch.randn(layers, means, dim, generator=draw).half()
        self.targets = torch.stack(
            [torch.stack([torch.randint(size, (means,), generator=draw) for size in sizes], 1) for _ in range(2)]
        )
        self.index = torch.randint(means, (UPDATES, 2, rows, 2), generator=draw)
        self.weights = torch.full((UPDATES, rows), 1 / (rows - 1))
        self.weights[:, -1] = 0.0
        self.heads = [UtteranceLinear(dim, classes, width=width) for _ in SEED_OF]
        self.mixing = [nn.Parameter(torch.randn(layers, generator=draw) / 2) for _ in SEED_OF]
        self.lr = [0.01, 0.001, 1e30, 0.01, 0.0003]  # the third diverges
        self.optimizer, self.sizes = optimizer, sizes

    def updater(self, device: str) -> StackedUpdater:
        rows = [
            [mixing, *head.to(device).parameters()]
            for mixing, head in zip(
                [nn.Parameter(each.detach().to(device)) for each in self.mixing], self.heads, strict=True
            )
        ]
        return StackedUpdater(rows, self.optimizer, self.lr[: len(rows)], clip=0.05)  # smaller than every norm

    def reference(self) -> StackedUpdater:
        """By autograd, one trial after another."""
        updater = self.updater("cpu")
        for index, weights in zip(self.index, self.weights, strict=True):
            updater.gradients.zero_()
            losses = []
            for trial, seed in enumerate(SEED_OF):
                leaves = [updater.stacked(place)[trial].detach().requires_grad_() for place in range(5)]
                mixing, projector, projector_bias, linear, linear_bias = leaves
                single = SINGLE[trial]
                mixture = (
                    mixing.softmax(0) if single is None else nn.functional.one_hot(torch.tensor(single), len(mixing))
                )
                utterances, means = index[seed].unbind(1)
                mixed = torch.einsum("l,lrd->rd", mixture.float(), self.means[:, means].float())
                logits = (mixed @ projector.T + projector_bias) @ linear.T + linear_bias
                loss = torch.zeros(())
                for slot, scores in enumerate(logits.split(list(self.sizes), 1)):
                    right = self.targets[seed, utterances, slot]
                    loss = loss + (nn.functional.cross_entropy(scores, right, reduction="none") * weights).sum()
                losses.append(loss.detach())
                for place, slope in enumerate(torch.autograd.grad(loss, leaves, allow_unused=True)):
                    if slope is not None:
                        updater.stacked(place, updater.gradients)[trial] = slope
            updater.step(torch.stack(losses))
        return updater

    def ours(self, device: str) -> StackedUpdater:
        updater = self.updater(device)
        seed_of = torch.tensor(SEED_OF, device=device)
        means, targets, index, weights = (
            each.to(device) for each in (self.means, self.targets, self.index, self.weights)
        )
        mixer, rows = Mixer(updater.stacked(0), SINGLE), weights.shape[1]
        update = MeanUpdate(updater, mixer, means, targets, seed_of, self.sizes, rows)
        with torch.no_grad():
            for number in range(UPDATES):
                update(index[number], weights[number])
        return updater


def difference(device: str, **shape: Any) -> dict[str, float]:
    """Relative differences of the reference: moments in norm, values as a share of how far they went."""
    start = Problem(**shape).updater("cpu").values
    wanted, found = Problem(**shape).reference(), Problem(**shape).ours(device)
    for name in ("running", "stopped_at", "skipped", "count"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
    assert wanted.running.tolist() == [True, True, False, True, True]
    kept = wanted.running

    def both(name: str) -> tuple[Tensor, Tensor]:
        return getattr(found, name).cpu()[kept], getattr(wanted, name)[kept]

    errors = {}
    for name in ("first", "second"):
        mine, theirs = both(name)
        errors[name] = float(((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).max())
        errors[f"{name} of layers"] = float((mine[:, :4] - theirs[:, :4]).norm() / theirs[:, :4].norm())
    mine, theirs = both("values")
    moved = (theirs - start[kept]).abs().mean(1)
    errors["values"] = float(((mine - theirs).abs().mean(1) / moved).max())
    return errors


def interpreted(code: str) -> None:
    """Run some lines with Triton's interpreter, which is chosen where Triton is imported."""
    pytest.importorskip("triton")
    where = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": where}
    lines = f"import torch, test_mean_update as t\nfrom superb_probe.probes import mean_update\n{code}"
    subprocess.run([sys.executable, "-c", lines], env=environment, check=True)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_an_update_is_autograds_in_tritons_interpreter(optimizer: str) -> None:
    interpreted(f"e = t.difference('cpu', **t.SMALL, optimizer={optimizer!r})\nprint(e)\nassert max(e.values()) < 1e-4")


MUTANTS = {
    "batches of another seed": """
ours = t.Problem.ours
def mutated(self, device):
    t.SEED_OF = [1, 0, 1, 1, 1]
    return ours(self, device)
t.Problem.ours = mutated
""",
    "classes of another slot": "m = t.MeanUpdate\nt.MeanUpdate = lambda *a: m(*a[:5], a[5][::-1], a[6])",
    "a mixture where one layer is read": "m = t.Mixer\nt.Mixer = lambda weights, layers: m(weights, [None] * len(layers))",
    "a norm of less than all": """
norm = mean_update._norm
class Less:
    def __getitem__(self, grid):
        return lambda *a, **k: (norm[grid](*a, **k), a[9].mul_(0.9))
mean_update._norm = Less()
""",
}


@pytest.mark.parametrize("mutant", list(MUTANTS.values()), ids=list(MUTANTS))
def test_what_is_not_that_update_is_noticed(mutant: str) -> None:
    interpreted(f"{mutant}\ne = t.difference('cpu', **t.SMALL)\nprint(e)\nassert max(e.values()) > 1e-2")


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [SMALL, BASE, {**BASE, "rows": 64, "sizes": (1251,), "layers": 25, "dim": 1024}])
def test_an_update_is_autograds_on_a_gpu(shape: dict[str, Any]) -> None:
    errors = difference("cuda", **shape)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.cuda
def test_an_update_is_the_same_each_time_and_for_a_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    once, again = (Problem(**BASE).ours("cuda").values for _ in range(2))
    assert torch.equal(once[kept()], again[kept()])
    monkeypatch.setattr(sys.modules[__name__], "SEED_OF", SEED_OF[:1])
    monkeypatch.setattr(sys.modules[__name__], "SINGLE", SINGLE[:1])
    assert torch.equal(Problem(**BASE).ours("cuda").values[0], once[0])


def kept() -> list[int]:
    """The trials that do not diverge."""
    return [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("change", "device", "whole"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"dim": 80}, "cuda", False),
        ({"width": 32}, "cuda", False),
        ({"sizes": (1251,)}, "cuda", True),
        ({"sizes": (5000,)}, "cuda", False),
        ({"rows": 65}, "cuda", False),
        ({"layers": 65}, "cuda", False),
    ],
)
def test_only_what_the_kernels_hold_goes_that_way(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], device: str, whole: bool
) -> None:
    monkeypatch.setattr(mean_update.kernels, "can_multiply", lambda device: device.type == "cuda")
    shape = {**SMALL, **change}
    assert fits(Problem(**shape).updater("cpu"), shape["rows"], torch.device(device)) is whole
    assert kernels is mean_update.kernels
