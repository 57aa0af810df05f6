"""`--padding s3prl`: what a run does with it, what its record says, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import superb_probe
from superb_probe.errors import RequestError
from superb_probe.results.record import RunRecord
from superb_probe.upstreams.base import LayerStates
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.padding import PaddedUpstream
from superb_probe.verification import verify

STEPS = 3


def run(out: Path, upstream: Any = None, task: str = "pr", **options: Any) -> RunRecord:
    upstream = upstream or load_upstream("mamba_hubert", size="test", random=0)
    shared: dict[str, Any] = {"lr": [1e-2], "steps": STEPS, "limit": 20, "budget": "small", "device": "cpu", "out": out}
    (record,) = superb_probe.run(upstream, task, **{**shared, **options})
    assert record.status == "finished", record.error
    return record


def test_the_record_says_how_states_were_padded(tmp_path: Path) -> None:
    exact, padded = run(tmp_path), run(tmp_path, padding="s3prl")
    assert exact.run_id != padded.run_id
    assert "padding" not in exact.probe.head_options and padded.probe.head_options["padding"] == "s3prl"
    assert any("padded batches" in text for text in padded.task.protocol_deviations)
    assert not any("padded" in text for text in exact.task.protocol_deviations)


def test_under_superb_padding_is_no_deviation_any_more(tmp_path: Path) -> None:
    exact, padded = (run(tmp_path, protocol="superb", padding=padding) for padding in ("exact", "s3prl"))
    assert any("for each utterance alone" in text for text in exact.task.protocol_deviations)
    assert not any("padded" in text for text in padded.task.protocol_deviations)


class Counting(PaddedUpstream):
    """Notes the batches it is given."""

    def __init__(self) -> None:
        super().__init__(load_upstream("mamba_hubert", size="test", random=0))
        self.sizes: list[int] = []
        self.longest: list[int] = []

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        self.sizes.append(len(wavs))
        self.longest.append(int(num_samples.max()))
        return super().forward(wavs, num_samples)


@pytest.mark.parametrize(("task", "sizes"), [("pr", {16: STEPS, 1: 40}), ("ic", {20: STEPS + 2})])
def test_batches_reach_the_encoder_as_s3prl_makes_them(tmp_path: Path, task: str, sizes: dict[int, int]) -> None:
    """16 of pr in training, all 20 of ic; the 20 of dev and of test one by one, of ic up to 32 together, encoded once."""
    counting = Counting()
    run(tmp_path, counting, task, padding="s3prl")
    assert Counter(counting.sizes) == sizes


def test_verification_hears_crops_of_the_waveform(tmp_path: Path) -> None:
    """Training utterances of asv are cut to 2 s before they are encoded; dev and test are whole."""
    counting = Counting()
    run(tmp_path, counting, "asv", padding="s3prl")
    training = [longest for size, longest in zip(counting.sizes, counting.longest, strict=True) if size > 1]
    assert training and set(training) == {2 * 16000}
    assert max(counting.longest) > 2 * 16000


def test_two_trials_of_a_seed_share_each_encoded_batch(tmp_path: Path) -> None:
    one, two = Counting(), Counting()
    run(tmp_path / "one", one, padding="s3prl")
    shared: dict[str, Any] = {"steps": STEPS, "limit": 20, "budget": "small", "device": "cpu"}
    superb_probe.run(two, "pr", lr=[1e-2, 1e-3], padding="s3prl", out=tmp_path / "two", **shared)
    assert one.sizes == two.sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "states"}, "an utterance has other states in every batch, which --store cannot keep"),
        ({"states": "memory"}, "which --states memory cannot keep"),
        ({"crops": 2}, "encodes new crops each time. Fix: leave --crops out"),
        ({"padding": "fairseq"}, "--padding fairseq: one of exact, s3prl"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, options: Any, message: str) -> None:
    if "store" in options:
        options = {"store": tmp_path / options["store"]}
    with pytest.raises(RequestError, match=message):
        run(tmp_path / "out", **{"padding": "s3prl", **options})
    assert not (tmp_path / "states").exists()


def test_states_from_files_have_no_other_padding(tmp_path: Path) -> None:
    class Files(superb_probe.Upstream):
        def __init__(self) -> None:
            super().__init__()
            self.info = load_upstream("fbank").info

        def num_frames(self, num_samples: int) -> int:
            return num_samples // 160

        def states_for(self, name: str) -> Tensor:
            return torch.zeros(1, 5, 240)

        def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
            raise NotImplementedError

    with pytest.raises(RequestError, match="its states are made elsewhere. Fix: --padding exact"):
        run(tmp_path, Files(), padding="s3prl")


def test_states_of_batches_are_not_verified_one_at_a_time(tmp_path: Path) -> None:
    run(tmp_path / "ic", task="ic", padding="s3prl", limit=None, steps=1)
    (path,) = (tmp_path / "ic").rglob("*.json")
    (_, states) = verify(path)
    assert states.verdict == "not checked" and "depend on their batches of 32" in states.detail
