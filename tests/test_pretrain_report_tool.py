"""tools/pretrain_report.py: what the six shipped encoders learned, from the files of their pre-training and from records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superb_probe.results.compare import Comparison
from superb_probe.upstreams.load import load_upstream

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("pretrain_report")


def row(task: str, upstream: str, revision: str, weights: str, score: float = 1.0) -> dict[str, Any]:
    found = {
        "task": task,
        "upstream": upstream,
        "revision": revision,
        "weights": weights,
        "control": None,
        "score": score,
    }
    return found | {"metric": "per", "better": "lower", "ci95_low": score - 1, "ci95_high": score + 1}


def test_it_draws_and_has_a_line_for_each_encoder(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--pretraining", str(ROOT / "docs/pretraining"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(tool.NAMES)
    learned = json.loads((ROOT / "docs/pretraining/mamba_hubert.json").read_text())
    assert f"{100 * learned[1]['held_out']['accuracy']:.1f} %" in next(
        line for line in lines if line.startswith("| mamba_hubert |")
    )


def test_masked_units_are_predicted_far_better_than_by_the_commonest(tool: Any) -> None:
    for name in tool.NAMES:
        for each in tool.evidence(ROOT / "docs/pretraining", name):
            assert each["held_out"]["accuracy"] > 5 * each["held_out"]["chance"], name


def test_encoders_are_known_by_their_weights(tool: Any) -> None:
    trained = load_upstream("mamba_hubert_causal").info.revision
    published = load_upstream("mamba_hubert_causal", causal_front_end=False).info.revision
    rows = [
        row("pr", "mamba_hubert_causal", trained, "trained", 75.0),
        row("pr", "mamba_hubert_causal", published, "trained", 70.0),
        row("pr", "mamba_hubert_causal", "random:0", "random", 89.0),
        row("pr", "mamba_hubert_causal", "sha256:another", "trained"),
        row("pr", "fbank", "1", "none", 81.0),
        row("pr", "fbank", "1", "none", 97.0) | {"control": "shuffle"},
        row("ic", "fbank", "1", "none"),  # at chance by construction: fbank_no_cmvn stands for it
    ]
    found = tool.systems(rows)
    assert {system: each["score"] for (_, system), each in found.items()} == {
        "mamba_hubert_causal": 75.0,
        f"mamba_hubert_causal{tool.PUBLISHED}": 70.0,
        "random mamba_hubert_causal": 89.0,
        "filter banks": 81.0,
        "shuffled labels, filter banks": 97.0,
    }
    table = tool.scores_table(found)
    assert "| mamba_hubert_causal, published front end | 70.0 [69.0, 71.0] |" in table
    with pytest.raises(SystemExit, match="two results"):
        tool.systems([*rows, rows[0]])


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [
        (-5.0, 0.01, "**-5.0 [-6.0, -4.0], p 0.010**"),
        (5.0, 0.01, "**+5.0 [+4.0, +6.0], p 0.010 (A is better)**"),
        (-5.0, 0.2, "-5.0 [-6.0, -4.0], p 0.200"),
    ],
)
def test_bold_is_what_holds_after_the_correction(tool: Any, difference: float, p: float, said: str) -> None:
    outcome = Comparison(
        "pr",
        "per",
        False,
        80.0,
        80.0 + difference,
        difference,
        (difference - 1, difference + 1),
        p / 9,
        {},
        "",
        10,
        9,
        p_holm=p,
    )
    assert tool.difference(outcome) == said
