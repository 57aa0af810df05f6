"""The benches of encoders and kernels: what they time, compare and print."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from superb_probe import bench_kernels, bench_race
from superb_probe.bench_kernels import floors, own_name, peer_ratio, reference_scan
from superb_probe.bench_tables import tables
from superb_probe.cli import main
from superb_probe.upstreams.scan import selective_scan

CPU = torch.device("cpu")


def document(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", *words, "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and peaks that take no time."""
    monkeypatch.setattr(bench_kernels, "DIM", 16)
    monkeypatch.setattr(bench_kernels, "WIDTH", 48)
    monkeypatch.setattr(bench_race, "_COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(bench_race, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(bench_kernels, "_transformer_layer", lambda device, dtype: lambda x: x)


def test_encoders_are_timed_beside_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "encoders.json"
    words = [
        "--upstream",
        "mamba_hubert_causal",
        "--size",
        "test",
        "--batch",
        "2",
        "--seconds",
        "0.5",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    rows = document(["encoders", *words, "--part", "batch", "growth", "--growth-seconds", "0.3"], capsys)["rows"]
    names = ["mamba_hubert_causal", "transformers HubertModel"]
    assert [row["name"] for row in rows] == 2 * names
    assert [(row["part"], row["batch"], row["seconds"]) for row in rows[::2]] == [("batch", 2, 0.5), ("growth", 1, 0.3)]
    for row in rows:
        assert row["times_real_time"] == pytest.approx(row["batch"] * row["seconds"] / row["processor_s"])
        assert row["share_of_matmul"] > 0
    assert main(["bench", "table", str(out)]) == 0
    assert "| 2 x 0.5 s | transformers HubertModel |" in capsys.readouterr().out


def test_kernels_are_timed_beside_their_peers(capsys: pytest.CaptureFixture[str]) -> None:
    result = document(["kernels", "--shape", "2x9", "--repeats", "1"], capsys)
    rows = {row["part"]: row for row in result["rows"]}
    assert list(rows) == list(bench_kernels.PARTS)
    assert {"plain", "reference loop"} <= set(rows["scan"]["runs"]) and {
        "ours",
        "transformers",
        "matrix products",
    } <= set(rows["block"]["runs"])
    for row in rows.values():
        assert row["differences"] and max(row["differences"].values()) < 1e-5  # peers compute the same
        assert all(peer_ratio(name, row) for name in row["runs"] if name != own_name(row))
    assert rows["block-gradients"]["floors"]["products_s"] == pytest.approx(3 * rows["block"]["floors"]["products_s"])
    lines = tables(result)
    assert sum(line.startswith("| rows x frames") for line in lines) == 4
    assert sum(line.startswith("| 2 x 9 | transformers") for line in lines) == 2


def test_a_peer_that_computes_something_else_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "reference_scan", lambda *x: 1.01 * reference_scan(*x))
    (row,) = document(["kernels", "--part", "scan", "--shape", "1x9", "--repeats", "1"], capsys)["rows"]
    assert row["differences"]["reference loop"] > 5e-3


def test_the_reference_loop_is_the_scan() -> None:
    values = [x.double() for x in bench_kernels.scan_inputs(2, 11, torch.float32, CPU)]
    torch.testing.assert_close(reference_scan(*values), selective_scan(*values, True)[0], rtol=1e-10, atol=1e-10)


def test_floors_count_bytes_exponentials_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "DIM", 768)
    monkeypatch.setattr(bench_kernels, "WIDTH", 2304)
    peaks = {"copy_bytes_per_s": 2978e9, "exponentials_per_s": 16 * 132 * 1.755e9, "matmul_flops_per_s": 778e12}
    found = floors("block", 16, 1500, torch.bfloat16, peaks)
    assert found["exponentials_s"] == pytest.approx(0.36e-3, rel=0.02)  # 1.3e9 exponentials
    assert found["bytes_s"] == pytest.approx(0.15e-3, rel=0.03)
    assert found["products_s"] == pytest.approx(0.35e-3, rel=0.03)


def test_turns_alternate_and_slow_calls_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = bench_race.race({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 3)
    assert calls == ["a", "b", *"ababab"] and found["a"]["repeats"] == 3
    monkeypatch.setattr(bench_race, "SLOW_S", 0.01)
    slow = bench_race.race({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, CPU, 3)
    assert slow["slow"]["repeats"] == 1 and slow["slow"]["s"] >= 0.02 and slow["quick"]["repeats"] == 3


def test_a_call_without_memory_is_an_outcome() -> None:
    def fail() -> None:
        raise torch.cuda.OutOfMemoryError("too much")

    found = bench_race.race({"fails": fail, "runs": lambda: None}, CPU, 1)
    assert found["fails"] == {"failed": "out of GPU memory"} and found["runs"]["repeats"] == 1


def test_memory_of_a_call_is_seen() -> None:
    size = 2**26
    kept = bench_race.race({"fills": lambda: bytearray(b"x" * size)}, CPU, 1)["fills"]["peak_bytes"]
    assert kept is None or kept > size // 2


def test_wrong_requests_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "encoders", "--dtype", "float8", "--device", "cpu"]) == 2
    assert main(["bench", "kernels", "--shape", "16", "--device", "cpu"]) == 2
    other = tmp_path / "other.json"
    other.write_text('{"bench": "sweep"}', encoding="utf-8")
    assert main(["bench", "table", str(other), str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("float8", "ROWSxFRAMES", "other.json", "none.json"))
