"""tools/gpu_memory.py: speech made long, and a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.probes.diarization import read_rttm


def test_utterances_are_repeated_with_their_labels(load_tool: Callable[[str], Any], tmp_path: Path) -> None:
    tool = load_tool("gpu_memory")
    for table in ("read", "mixtures"):
        (row,) = read_splits(mini_root(), table)["train"][:1]
        times = round(20 / row.duration_s)
        (long,) = tool.stretched(read_splits(mini_root(), table)["train"][:1], 20.0, tmp_path)
        assert long.id == row.id and long.duration_s == pytest.approx(times * row.duration_s, abs=0.01) and times > 2
        if table == "read":
            assert long.labels["text"] == " ".join([row.labels["text"]] * times)
            continue
        (turns,) = read_rttm(tmp_path / long.labels["rttm"]).values()
        (once,) = read_rttm(mini_root() / row.labels["rttm"]).values()
        assert len(turns) == times * len(once) and max(each.start_s for each in turns) > (times - 1) * row.duration_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    load_tool: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        load_tool("gpu_memory").main()
    assert ended.value.code == 2 and "no GPU" in capsys.readouterr().err
