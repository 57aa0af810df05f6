"""Forced alignment against all paths of small grids, and against torchaudio where it runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.probes.alignments import Segment
from superb_probe.probes.forced_alignment import _torchaudio_function, best_paths, token_segments, word_segments


def brute_force(log_probabilities: Tensor, targets: list[int], blank: int = 0) -> list[int]:
    """The best of all label sequences that collapse to the targets, as positions."""
    frames, classes = log_probabilities.shape
    best: tuple[float, tuple[int, ...]] = (-np.inf, ())
    for labels in itertools.product(range(classes), repeat=frames):
        collapsed = [label for label, _ in itertools.groupby(labels) if label != blank]
        if collapsed == targets:
            total = float(sum(log_probabilities[t, label] for t, label in enumerate(labels)))
            best = max(best, (total, labels))
    positions, at = [], -1
    for t, label in enumerate(best[1]):
        if label != blank and (t == 0 or best[1][t - 1] != label):
            at += 1
        positions.append(at if label != blank else -1)
    return positions


@pytest.mark.parametrize("targets", [[1], [1, 2], [2, 2], [1, 1, 2], [1, 2, 1]])
def test_against_all_paths(targets: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(targets))
    for _ in range(5):
        grid = torch.randn(1, 6, 3, generator=generator).double().log_softmax(-1)
        found = best_paths(grid, torch.tensor([6]), [targets], backend="own")[0]
        assert found.tolist() == brute_force(grid[0], targets)


def test_a_batch_is_its_rows_and_padding_says_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(3, 12, 5, generator=generator).log_softmax(-1)
    counts, targets = torch.tensor([12, 7, 4]), [[1, 2, 3, 3], [4, 4], [2]]
    together = best_paths(grid, counts, targets, backend="own")
    spoilt = grid.clone()
    for row, count in enumerate(counts.tolist()):
        spoilt[row, count:] = 100.0
        alone = best_paths(grid[row : row + 1, :count], counts[row : row + 1], [targets[row]], backend="own")[0]
        assert together[row].tolist() == alone.tolist() and len(alone) == count
    again = best_paths(spoilt, counts, targets, backend="own")
    assert [each.tolist() for each in again] == [each.tolist() for each in together]


def test_another_blank() -> None:
    grid = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    found = best_paths(grid, torch.tensor([6]), [[0, 1]], blank=2, backend="own")[0]
    assert found.tolist() == brute_force(grid[0], [0, 1], blank=2)


def compare_with_torchaudio(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        frames, tokens = 40 + trial, 3 + trial
        targets = [torch.randint(1, 9, (tokens,), generator=generator).tolist() for _ in range(2)]
        grid = torch.randn(2, frames, 9, generator=generator).log_softmax(-1)
        counts = torch.tensor([frames, frames - 5])
        own = best_paths(grid, counts, targets, backend="own")
        theirs = best_paths(grid.to(device), counts.to(device), targets, backend="torchaudio")
        assert [each.tolist() for each in own] == [each.tolist() for each in theirs]


@pytest.mark.skipif(_torchaudio_function() is None, reason="torchaudio.functional.forced_align does not run here")
def test_equal_to_torchaudio() -> None:
    compare_with_torchaudio("cpu")


@pytest.mark.cuda
def test_equal_to_torchaudio_on_a_gpu() -> None:
    if _torchaudio_function() is None:
        pytest.skip("torchaudio.functional.forced_align does not run here")
    compare_with_torchaudio("cuda")


def test_what_cannot_be_aligned_is_named() -> None:
    grid = torch.zeros(3, 3, 4)
    with pytest.raises(RequestError) as error:
        best_paths(grid, torch.tensor([3, 3, 3]), [[1, 1, 2], [], [0]])
    message = str(error.value)
    assert (
        "3 frames for 3 tokens and 1 blanks" in message
        and "utterance 1: no tokens" in message
        and "blank is among" in message
    )
    with pytest.raises(RequestError, match="backend"):
        best_paths(grid, torch.tensor([3, 3, 3]), [[1], [1], [1]], backend="theirs")


def test_tokens_share_blanks_and_reach_no_farther() -> None:
    path = np.array([-1, -1, -1, -1, 0, -1, -1, 1, 1, -1])
    segments = token_segments(path, ["a", "b"], 0.02, reach_s=0.04)
    assert segments == (Segment(0.04, 0.12, "a"), Segment(0.12, 0.2, "b"))
    assert token_segments(path, ["a", "b"], 0.02, reach_s=0.0) == (Segment(0.08, 0.1, "a"), Segment(0.14, 0.18, "b"))


def test_words_are_their_tokens() -> None:
    tokens = tuple(Segment(at / 8, at / 8 + 0.0625, letter) for at, letter in enumerate("TOBE"))
    assert word_segments(tokens, ["TO", "BE"], [2, 2]) == (Segment(0.0, 0.1875, "TO"), Segment(0.25, 0.4375, "BE"))
