"""The planner: never a place that the states do not fit in, otherwise the fastest by the rates it is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import RequestError
from superb_probe.probes.planner import (
    PLACES,
    Need,
    Rates,
    Room,
    choose_place,
    measure_rates,
    needs_rates,
    problems,
    seconds_by_place,
)
from superb_probe.probes.store import FeatureStore

GB = 10**9
NEED = Need(10 * GB, 10 * GB, 36_000.0, 36_000.0, reads_s=360_000.0, streamed_s=360_000.0)
RATES = Rates(decode=5000.0, encode=1000.0, disk_bytes=1e9, copy_bytes=1e10)
ROOMY = Room(80 * GB, 100 * GB, Path("s"), None)


@pytest.mark.parametrize("gpu", [None, 1 * GB, 80 * GB])
@pytest.mark.parametrize("memory", [None, 5 * GB, 100 * GB])
@pytest.mark.parametrize("disk", ["none", "full", "free"])
@pytest.mark.parametrize("rates", [None, RATES])
@pytest.mark.parametrize("anew", [False, True])
def test_what_does_not_fit_is_never_chosen(
    gpu: int | None, memory: int | None, disk: str, rates: Rates | None, anew: bool
) -> None:
    need = dataclasses.replace(NEED, crops_anew=anew)
    room = Room(gpu, memory, None if disk == "none" else Path("s"), "no room" if disk == "full" else None)
    wrong = problems(need, room)
    assert wrong["gpu"] is None if gpu == 80 * GB and not anew else wrong["gpu"] is not None
    assert (wrong["memory"] is None) == (memory != 5 * GB and not anew)
    assert (wrong["disk"] is None) == (disk == "free" and not anew)
    assert wrong[choose_place(need, room, rates).place] is None
    for place in PLACES:
        if wrong[place] is None:
            assert choose_place(need, room, rates, place).place == place
        else:
            with pytest.raises(RequestError, match=f"--states {place}"):
                choose_place(need, room, rates, place)


def test_the_fastest_place_wins_by_the_rates() -> None:
    seconds = seconds_by_place(NEED, RATES)
    assert seconds["gpu"] < seconds["memory"] < seconds["disk"] < seconds["stream"] == 360.0
    assert choose_place(NEED, ROOMY, RATES).place == "gpu"
    assert choose_place(NEED, dataclasses.replace(ROOMY, gpu_bytes=None), RATES).place == "memory"
    small = Room(None, 5 * GB, Path("s"), None)
    assert choose_place(NEED, small, RATES).place == "disk"
    slow_disk = dataclasses.replace(RATES, disk_bytes=1e8)
    assert choose_place(NEED, small, slow_disk).place == "stream"  # encoding again is faster than that disk
    few = dataclasses.replace(NEED, streamed_s=3600.0)  # a tenth of the corpus is ever read
    assert choose_place(few, ROOMY, RATES).place == "stream" == choose_place(few, ROOMY, None).place
    there = dataclasses.replace(few, missing_bytes=0, missing_s=0.0)  # extracted before
    assert choose_place(there, ROOMY, RATES).place == "gpu" == choose_place(there, ROOMY, None).place


def test_rates_are_measured_only_where_the_choice_depends_on_them() -> None:
    assert not needs_rates(NEED, ROOMY) and not needs_rates(NEED, Room(None, 100 * GB, Path("s"), None))
    assert needs_rates(NEED, Room(None, 5 * GB, Path("s"), None))
    assert not needs_rates(NEED, Room(None, 5 * GB, None, None))  # the stream is all there is


def test_the_reason_has_the_numbers() -> None:
    reason = choose_place(NEED, Room(None, 5 * GB, Path("s"), None), RATES).reason
    for part in (
        "disk",
        "10.0 GB of states",
        "5.0 GB host memory free",
        "stream 6.0 min",
        "not gpu: training is not on a GPU",
    ):
        assert part in reason, part


def test_rates_are_those_of_this_machine(toy: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(corpus / "train.tsv")
    keeping = FeatureStore(None).keeping
    rates = measure_rates(toy.Upstream(), manifest, keeping, tmp_path / "store")
    assert min(rates.decode, rates.encode, rates.copy_bytes, rates.disk_bytes or 0) > 0
    assert not list((tmp_path / "store").iterdir())  # what the disk was timed with is gone
    assert measure_rates(toy.Upstream(), manifest, keeping, None).disk_bytes is None

    class Slow(toy.Upstream):  # type: ignore[misc, name-defined]
        def forward(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> object:
            import time

            time.sleep(0.2 * float(num_samples.sum()) / 16000)
            return super().forward(wavs, num_samples)

    assert measure_rates(Slow(), manifest, keeping, None).encode < min(5.0, rates.encode)
