"""An update is s3prl's: the loss over the accumulation, the norm clipped, one step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from superb_probe.errors import RequestError
from superb_probe.probes.update import NORM_BLOCK, StackedUpdater, Updater, row_norms


def problem() -> tuple[nn.Linear, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, [(torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(12)]


def by_hand(
    optimizer: str, lr: float, clip: float, accumulate: int, *, mean: bool = True
) -> tuple[torch.Tensor, list[float]]:
    """Adam from its paper, in float64."""
    model, batches = problem()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    first, second, norms = torch.zeros_like(weights), torch.zeros_like(weights), []
    for update in range(len(batches) // accumulate):
        gradient = torch.zeros_like(weights)
        for x, y in batches[update * accumulate : (update + 1) * accumulate]:
            flat = weights.clone().requires_grad_()
            loss = (x.double() @ flat[:8].view(2, 4).T + flat[8:] - y.double()).square().mean()
            (loss / (accumulate if mean else 1)).backward()
            gradient += flat.grad
        norm = float(gradient.norm())
        norms.append(norm)
        gradient *= min(1.0, clip / (norm + 1e-6))
        if optimizer == "adamw":
            weights = weights * (1 - lr * 0.01)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        step = update + 1
        weights = weights - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weights, norms


def ours(optimizer: str, lr: float, clip: float, accumulate: int) -> tuple[torch.Tensor, list[float]]:
    model, batches = problem()
    updater = Updater(model.parameters(), optimizer, lr, clip, accumulate)
    returned = [updater.update((model(x) - y).square().mean()) for x, y in batches]
    assert [norm is not None for norm in returned] == [(i + 1) % accumulate == 0 for i in range(len(batches))]
    assert updater.updates == len(batches) // accumulate and updater.skipped_updates == 0
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double(), [
        n for n in returned if n is not None
    ]


def by_masks(updater: StackedUpdater, made: list[bool], scales: list[float]) -> None:
    """What a GPU without Triton does, in place of the pass over rows."""
    updater._adam(torch.tensor(made), torch.tensor(scales))


def of_three(optimizer: str, monkeypatch: pytest.MonkeyPatch | None) -> StackedUpdater:
    """Six updates of three trials; a gradient of the first is not finite in update 3, a loss of the second in update 4."""
    generator = torch.Generator().manual_seed(4)
    rows = [
        [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn((), generator=generator))]
        for _ in range(3)
    ]
    updater = StackedUpdater(rows, optimizer, [0.3, 0.1, 0.01], 0.5)
    if monkeypatch is not None:
        monkeypatch.setattr(StackedUpdater, "_adam_by_rows", by_masks)
    for step in range(1, 7):
        for place in range(2):
            gradient = updater.stacked(place, updater.gradients)
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        if step == 3:
            updater.gradients[0, 0] = math.nan
        updater.step(torch.tensor([1.0, math.inf if step == 4 else 1.0, 1.0]))
    assert updater.values[0, 0] == rows[0][0][0, 0] and updater.values.isfinite().all()
    return updater


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_masks_equal_rows_and_keep_trials_apart(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = of_three(optimizer, None)
    masks = of_three(optimizer, monkeypatch)
    torch.testing.assert_close(masks.values, rows.values, rtol=1e-5, atol=1e-6)
    for updater in (rows, masks):
        assert updater.running.tolist() == [True, False, True] and int(updater.count) == 6
        assert updater.stopped_at.tolist() == [0, 4, 0] and updater.skipped.tolist() == [1, 0, 0]
        assert math.isinf(float(updater.stopped_loss[1]))
        assert updater._taken.tolist() == [5, 3, 6]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(("clip", "accumulate"), [(1.0, 1), (0.1, 3), (1e3, 4)])
def test_it_equals_the_rule_by_hand(optimizer: str, clip: float, accumulate: int) -> None:
    weights, norms = ours(optimizer, 0.05, clip, accumulate)
    expected, expected_norms = by_hand(optimizer, 0.05, clip, accumulate)
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-4)


def test_the_check_tells_other_rules_apart() -> None:
    weights, norms = ours("adam", 0.05, 0.1, 3)
    for other in (
        by_hand("adamw", 0.05, 0.1, 3),
        by_hand("adam", 0.051, 0.1, 3),
        by_hand("adam", 0.05, 0.1, 4),
    ):
        assert (weights - other[0]).abs().max() > 1e-4
    assert norms != pytest.approx(by_hand("adam", 0.05, 0.1, 3, mean=False)[1], rel=1e-2)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_update_without_a_finite_norm_is_not_made_and_counted(poison: float) -> None:
    model, batches = problem()
    updater = Updater(model.parameters(), "adam", 0.1, 1.0)
    before = model.weight.detach().clone()
    norm = updater.update((model(batches[0][0]) * poison).sum())
    assert norm is not None and not math.isfinite(norm)
    assert torch.equal(model.weight, before)
    assert (updater.updates, updater.skipped_updates) == (1, 1)
    updater.update((model(batches[0][0]) - batches[0][1]).square().mean())
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
    assert (updater.updates, updater.skipped_updates) == (2, 1)


def test_training_goes_on_from_its_state() -> None:
    whole, _ = ours("adamw", 0.05, 1.0, 2)
    model, batches = problem()
    updater = Updater(model.parameters(), "adamw", 0.05, 1.0, 2)
    for x, y in batches[:6]:
        updater.update((model(x) - y).square().mean())
    resumed, _ = problem()
    resumed.load_state_dict(model.state_dict())
    again = Updater(resumed.parameters(), "adamw", 0.05, 1.0, 2)
    again.load_state_dict(updater.state_dict())
    forgetful = Updater(model.parameters(), "adamw", 0.05, 1.0, 2)
    for x, y in batches[6:]:
        again.update((resumed(x) - y).square().mean())
        forgetful.update((model(x) - y).square().mean())
    assert again.updates == 6
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in resumed.parameters()]).double(), whole)
    assert not torch.equal(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double(), whole)


def test_a_half_accumulated_update_is_not_saved() -> None:
    model, batches = problem()
    updater = Updater(model.parameters(), "adam", 0.1, 1.0, 2)
    updater.update(model(batches[0][0]).sum())
    with pytest.raises(RequestError, match="1 of 2"):
        updater.state_dict()


@pytest.mark.parametrize(
    "arguments", [("sgd", 0.1, 1.0, 1), ("adam", 0.0, 1.0, 1), ("adam", 0.1, -1.0, 1), ("adam", 0.1, 1.0, 0)]
)
def test_wrong_settings_are_errors(arguments: tuple[str, float, float, int]) -> None:
    with pytest.raises(RequestError, match="Fix"):
        Updater(nn.Linear(1, 1).parameters(), *arguments)
    with pytest.raises(RequestError, match="0 parameters"):
        Updater([], "adam", 0.1, 1.0)


@pytest.mark.parametrize("size", [3, NORM_BLOCK, 2_000_000 + 7])
def test_the_norm_of_a_long_row_is_exact(size: int) -> None:
    rows = torch.randn(2, size, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-3], [1.0]])
    torch.testing.assert_close(row_norms(rows).double(), rows.double().norm(dim=1), rtol=1e-6, atol=0)


def test_torchs_own_norm_of_a_long_row_would_be_noticed() -> None:
    """The mutant that was there: one norm of the whole row. Should torch mend it, `row_norms` can go."""
    rows = torch.randn(1, 2_000_000, generator=torch.Generator().manual_seed(1))
    assert abs(float(torch.linalg.vector_norm(rows, dim=1) / rows.double().norm()) - 1) > 5e-6
