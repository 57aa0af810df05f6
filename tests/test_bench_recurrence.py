"""The bench of recurrent layers, small and on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from superb_probe import bench_recurrence
from superb_probe.cli import main

COMMAND = ["bench", "recurrence", "--device", "cpu", "--repeats", "1", "--json"]


def test_both_sides_are_timed_and_their_gradients_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--shape", "2", "3", "6", "5", "64"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plain"] and result["largest_difference"] < 1e-5
    seconds = result["seconds"]
    assert result["ratio"] == pytest.approx(seconds["one after another"] / seconds["stack"])
    # two layers, forward and backward, six frames, two trials and directions, 256 by 64 float32
    assert result["needed_bytes"] == 2 * 2 * 6 * 2 * 2 * 256 * 64 * 4
    # of a frame: both directions' 256 rows of 5 + 64 and 128 + 64; three passes, two operations, 36 rows
    assert result["operations"] == 2 * 3 * 2 * 256 * (5 + 64 + 128 + 64) * 36
    lines = bench_recurrence.describe_recurrence(result)
    assert "2 trials of 2 bidirectional layers of 64, 3 rows of 6 frames" in lines[1] and "times" in lines[2]


def test_other_gradients_would_be_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_recurrence.blstm

    def whole(inputs: Tensor, lengths: Tensor, weights: list[Tensor], *, plain: bool) -> Tensor:
        return real(inputs, torch.full_like(lengths, inputs.shape[2]), weights, plain=plain)

    monkeypatch.setattr(bench_recurrence, "blstm", whole)  # a mutant: rows run on into their padding
    assert main([*COMMAND, "--shape", "2", "3", "6", "5", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] > 1e-3


@pytest.mark.parametrize("shape", ["0 3 6 5 64", "2 3 6 5 65"])
def test_shapes_that_no_kernel_takes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--shape", *shape.split()]) == 2
    assert "a multiple of 64" in capsys.readouterr().err
