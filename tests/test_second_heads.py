"""`--head`: a second head is another run, named in its record, and trained with its own options."""

from __future__ import annotations

from pathlib import Path

import pytest

import superb_probe
from superb_probe.errors import RequestError
from superb_probe.upstreams.fbank import fbank_no_cmvn


def ask(out: Path, head: str | None) -> superb_probe.RunRecord:
    (record,) = superb_probe.run(
        fbank_no_cmvn(), "synthetic_sid", head=head, lr=[1e-2], steps=20, limit=24, out=out, device="cpu"
    )
    assert record.status == "finished"
    return record


def test_a_second_head_is_another_run_and_its_record_says_so(tmp_path):
    first, named, second = (ask(tmp_path, head) for head in (None, "utterance_linear", "mlp"))
    assert first.run_id == named.run_id != second.run_id, "the default's name asks for what is run anyway"
    assert (first.probe.head, second.probe.head) == ("utterance_linear", "mlp")
    told = "head mlp; the protocol's is utterance_linear"
    assert told in second.task.protocol_deviations and told not in first.task.protocol_deviations
    assert first.probe.trainable_params != second.probe.trainable_params, "its width is its own, not the first head's"


def test_a_head_the_task_does_not_have_is_refused_before_anything_is_extracted(tmp_path):
    with pytest.raises(
        RequestError, match="--head mpl: synthetic_sid has no such head. Fix: one of utterance_linear, mlp"
    ):
        ask(tmp_path, "mpl")
