"""`analyze compute`: counts against the paper's figure and torch's own, the official way of running, memory, and the fit."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe import compute, official_forward
from superb_probe.commands_compute import add_compute, describe
from superb_probe.compute import PAPER_GMACS, PAPER_LENGTHS_S, Point, longest_s, macs_of, measure
from superb_probe.errors import RequestError
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.macs import hubert_macs
from superb_probe.upstreams.sizes import FAMILIES, size_config

CPU = torch.device("cpu")


def paper_error(name: str) -> float:
    config = size_config(name, "base")
    ours = [macs_of(config, float(length), "forward")[0] / 1e9 for length in PAPER_LENGTHS_S]
    return max(abs(mine / theirs - 1) for mine, theirs in zip(ours, PAPER_GMACS[name], strict=True))


@pytest.mark.parametrize("name", ["mamba_hubert_causal", "transformer_hubert", "transformer_hubert_causal"])
def test_counts_are_the_papers(name: str) -> None:
    assert paper_error(name) < 0.01


def test_without_the_softmax_the_papers_counts_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "SCORE_OPERATIONS", 0)
    assert paper_error("transformer_hubert") > 0.01


def test_the_scan_is_all_that_the_columns_differ_by() -> None:
    for name, scans in (("mamba_hubert_causal", 1), ("mamba_hubert", 2), ("transformer_hubert", 0)):
        paper, every = macs_of(size_config(name, "base"), 10.0, "forward")
        assert every - paper == pytest.approx(scans * 12 * 500 * 2304 * (4 * 24 + 2) / 10)
    config = size_config("mamba_hubert_causal", "base")
    assert macs_of(config, 10.0, "forward")[1] == hubert_macs(config, 160_000) / 10


def test_training_counts_the_front_end_once() -> None:
    config = size_config("mamba_hubert_causal", "base")
    forward, train = macs_of(config, 10.0, "forward")[1], macs_of(config, 10.0, "train")[1]
    assert (3 * forward - train) / 2 == pytest.approx(2.455e9, rel=0.002)  # the paper's digest has the same figure


def official_error(name: str) -> float:
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    wavs = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = upstream(wavs, torch.tensor([9000, 9000])).states
        theirs = torch.stack(official_forward.official_forward(upstream.encoder, wavs))
    return float((ours - theirs).norm() / ours.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_official_way_gives_the_same_states(name: str) -> None:
    assert official_error(name) < 5e-6


def test_a_missing_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_forward, "future_mask", lambda frames: torch.zeros(frames, frames, dtype=torch.bool))
    assert official_error("transformer_hubert_causal") > 1e-4


def test_the_official_mask_reaches_attention_as_one_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its memory comes from: torch merges the (T, T) mask with the padding mask into (B, H, T, T)."""
    shapes = []
    attend = F.scaled_dot_product_attention

    def watched(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Any:
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attend(query, key, value, attn_mask, *rest, **more)

    for module in (F, torch.nn.functional):
        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    upstream = load_upstream("transformer_hubert_causal", size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    with torch.no_grad():
        official_forward.official_forward(upstream.encoder, torch.zeros(1, 9000))
        assert shapes[0] == (1, 4, 27, 27)
        shapes.clear()
        upstream(torch.zeros(1, 9000), torch.tensor([9000]))
        assert shapes[0] is None


def test_points_are_measured_and_a_series_ends_where_time_does() -> None:
    points = measure(
        ["mamba_hubert_causal"], size="test", modes=["forward", "train", "recorded"], variants=["best", "official"],
        dtypes=["float32"], lengths_s=[1.0, 0.5], device=CPU, repeats=1,
    )  # fmt: skip
    assert [point.status for point in points] == ["done"] * 12
    assert [point.audio_s for point in points[:2]] == [0.5, 1.0]
    assert all(point.step_s and point.peak_bytes is not None for point in points)
    ended = measure(
        ["transformer_hubert"], size="test", modes=["forward"], variants=["best"], dtypes=["float32"],
        lengths_s=[0.5, 1.0], device=CPU, repeats=1, point_limit_s=1e-6,
    )  # fmt: skip
    assert [point.status for point in ended] == ["done", "not run"]


def test_what_does_not_fit_ends_its_series(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(run: Any, wavs: Tensor, *rest: Any) -> tuple[float, int]:
        if wavs.shape[1] > 10_000:
            raise torch.OutOfMemoryError
        return 1.0, 1000

    monkeypatch.setattr(compute, "_timed", timed)
    points = measure(
        ["mamba_hubert"], size="test", modes=["forward"], variants=["best"], dtypes=["float32"],
        lengths_s=[0.5, 1.0, 2.0], device=CPU,
    )  # fmt: skip
    assert [point.status for point in points] == ["done", "out of memory", "not run"]


@pytest.mark.parametrize(("quadratic", "expected"), [(0.0, 700.0), (1e6, 108.3)])
def test_the_longest_audio_that_fits(quadratic: float, expected: float) -> None:
    def point(audio_s: float) -> Point:
        peak = int(2e9 + 2e7 * audio_s + quadratic * audio_s**2)
        return Point("x", "best", "train", "float32", audio_s, "done", 0.0, 0.0, 1.0, peak)

    series = [point(length) for length in (5.0, 20.0, 80.0, 160.0)]
    found = longest_s(series, 16e9)
    assert found is not None
    assert found[0] == pytest.approx(expected, rel=0.01)
    assert found[1] == (expected > 160)
    assert longest_s(series[:1], 16e9) is None
    assert longest_s(series, 1e9) == (0.0, False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_compute(parser.add_subparsers())
    words = ["--size", "test", "--seconds", "0.5", "1", "--repeats", "1", "--upstream", "mamba_hubert_causal"]
    args = parser.parse_args(["compute", *words, "--json", "--out", str(tmp_path / "c")])
    assert args.handler(args) == 0
    document = json.loads(capsys.readouterr().out)
    assert {point["variant"] for point in document["points"]} == {"best", "official"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg", ".csv"}
    args = parser.parse_args(["compute", "--macs-only", "--upstream", "mamba_hubert_causal"])
    assert args.handler(args) == 0
    assert "6.1" in capsys.readouterr().out
    with pytest.raises(RequestError, match="float7"):
        args.dtype = ["float7"]
        args.handler(args)


def test_the_table_says_what_lies_beyond_the_measured() -> None:
    series = [
        Point("x", "best", "forward", "float32", length, "done", 1e9, 1e9, 1.0, int(1e9 + 2e7 * length))
        for length in (5.0, 50.0, 500.0)
    ]
    assert "~750" in "\n".join(describe(series))


def test_what_is_compiled_first_is_no_part_of_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first pass that takes long, as one that compiles does, neither counts nor ends the series."""
    passes = []

    def run(wavs: torch.Tensor) -> None:
        passes.append(wavs.shape[1])
        if len(passes) == 1:
            time.sleep(0.6)

    config = size_config("mamba_hubert_causal", "test")
    series = compute._series("mamba_hubert_causal", config, "best", "forward", "float32", [0.5, 1.0])
    points = list(compute._run_series(series, run, CPU, 1, math.inf, 0.5))
    assert [point.status for point in points] == ["done", "done"] and passes == [8000] * 3 + [16000] * 2
    assert max(point.step_s or 1.0 for point in points) < 0.3
