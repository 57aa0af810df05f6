"""tools/store_effects.py: differences of kept crops, with as many draws of them as are asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("store_effects")


def test_the_interval_is_over_draws_where_there_are_several(tool: Any) -> None:
    base = np.array([50.0, 60.0, 40.0, 70.0])
    found = base + np.array([1.0, 1.0, -1.0, -1.0])  # what a draw adds, all of its seeds share
    assert tool.row("2", found, base, draws=2).endswith("| +0.00 | -12.71 to +12.71 |")  # t of two draws
    assert tool.row("2", found, base).endswith("| +0.00 | -1.84 to +1.84 |")  # as if four had been drawn


def test_every_draw_keeps_other_crops_for_its_own_seeds(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def scores(upstream: Any, task: str, args: Any, *, crops: int, seed: list[int], crop_seed: int) -> Any:
        asked.append((tuple(seed), crop_seed))
        return np.array(seed, dtype=float)

    monkeypatch.setattr(tool, "scores", scores)
    args = argparse.Namespace(seed=[1, 2, 3, 4, 5, 6], draws=3)
    assert tool.drawn_anew(None, "t", args, 2).tolist() == [1, 2, 3, 4, 5, 6]
    assert asked == [((1, 2), 1), ((3, 4), 2), ((5, 6), 3)]  # 0 is the reference's
    asked.clear()
    tool.drawn_anew(None, "t", argparse.Namespace(seed=[1, 2], draws=1), 2)
    assert asked == [((1, 2), 0)]


def test_groups_of_seeds_are_even(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["store_effects.py", "crops", "--draws", "2", "--seed", "1", "2", "3"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "--draws 2 of 3 seeds" in capsys.readouterr().err
