"""SpecAugment warps as two bicubic interpolations and masks within its bounds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from superb_probe.probes.specaugment import SpecAugment, time_warp


def augment(seed: int = 0, **options: int) -> SpecAugment:
    return SpecAugment(torch.Generator().manual_seed(seed), **options)


def interpolated(row: torch.Tensor, centre: int, warped: int) -> torch.Tensor:
    """One row (T, D) by torch's own bicubic resize."""
    parts = ((row[:centre], warped), (row[centre:], len(row) - warped))
    resized = [
        nn.functional.interpolate(part[None, None], (size, row.shape[1]), mode="bicubic", align_corners=False)[0, 0]
        for part, size in parts
    ]
    return torch.cat(resized)


CENTRES, WARPED = torch.tensor([20, 5, 33, 1]), torch.tensor([17, 9, 37, 1])
LENGTHS = torch.tensor([57, 12, 41, 4])


def test_the_warp_equals_two_interpolations_a_row() -> None:
    frames = torch.randn(4, 57, 6, generator=torch.Generator().manual_seed(2))
    result = time_warp(frames, LENGTHS, CENTRES, WARPED)
    for row in range(4):
        length = int(LENGTHS[row])
        expected = interpolated(frames[row, :length], int(CENTRES[row]), int(WARPED[row]))
        torch.testing.assert_close(result[row, :length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[row, length:], frames[row, length:])
    torch.testing.assert_close(result[3], frames[3])
    wrong = time_warp(frames, LENGTHS, CENTRES, WARPED + 1)
    assert (result - wrong).abs().max() > 0.1


def test_the_warp_carries_the_gradient() -> None:
    frames = torch.randn(4, 57, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    time_warp(frames, LENGTHS, CENTRES, WARPED)[0, :57].sum().backward()
    assert frames.grad is not None and frames.grad[0].abs().sum() > 0 and frames.grad[1].abs().sum() == 0


def test_draws_stay_within_superb_s_bounds() -> None:
    lengths = torch.tensor([11, 12, 30, 200]).repeat(500)
    centre, warped = augment(5)._draw_warp(lengths)
    moved = warped - centre
    assert int(moved.min()) == -4 and int(moved.max()) == 5
    assert (centre >= 5).all() and (centre < (lengths - 5)).all() and (warped >= 1).all() and (warped < lengths).all()
    short, still = augment(5)._draw_warp(torch.full((100,), 10))
    assert torch.equal(short, still)
    drawn = augment(6)
    for size, count, bound in ((768, 4, 50), (300, 2, 40)):
        runs = drawn._draw_masks(2000, size, 1, bound).sum(1)
        assert int(runs.min()) == 0 and int(runs.max()) == bound - 1
        assert abs(float(runs.float().mean()) - (bound - 1) / 2) < 1.5
        assert int(drawn._draw_masks(500, size, count, bound).sum(1).max()) <= count * (bound - 1)
    assert drawn._draw_masks(3, 20, 4, 50).shape == (3, 20)  # masks wider than the axis


def test_masks_are_zero_over_whole_dimensions_and_frames() -> None:
    frames = torch.ones(8, 120, 200)
    result = augment(7, warp_frames=0)(frames, torch.full((8,), 120))
    zero = result == 0
    whole_dims, whole_frames = zero.all(1), zero.all(2)
    assert torch.equal(zero, whole_dims[:, None, :] | whole_frames[:, :, None])
    assert whole_dims.any() and whole_frames.any() and (result[~zero] == 1).all()
    nothing = augment(7, warp_frames=0, dim_masks=0, time_masks=0)
    assert torch.equal(nothing(frames, torch.full((8,), 120)), frames)


def test_the_generator_alone_decides() -> None:
    frames, lengths = torch.randn(3, 60, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([60, 50, 40])
    first = augment(11)
    state = first.generator.get_state()
    result = first(frames, lengths)
    torch.manual_seed(99)
    assert torch.equal(result, augment(11)(frames, lengths))
    assert not torch.equal(result, augment(12)(frames, lengths))
    assert not torch.equal(result, first(frames, lengths))
    first.generator.set_state(state)
    assert torch.equal(result, first(frames, lengths))


def test_it_can_be_copied() -> None:
    first = augment(3)
    second = copy.deepcopy(first)
    frames, lengths = torch.ones(2, 60, 64), torch.tensor([60, 50])
    assert torch.equal(first(frames, lengths), second(frames, lengths))


@pytest.mark.parametrize("length", [1, 5, 16])
def test_short_utterances_pass(length: int) -> None:
    result = augment(1)(torch.ones(2, length, 8), torch.tensor([length, 1]))
    assert result.shape == (2, length, 8) and result.isfinite().all()
