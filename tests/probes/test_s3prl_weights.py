"""s3prl's tensors are recognised by their names, and all of them must fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from superb_probe.downstreams.base import Head
from superb_probe.errors import RequestError
from superb_probe.probes.heads import BlstmCtc, FrameCtc, LstmPit, UtteranceLinear, XVector
from superb_probe.probes.s3prl_weights import head_from_s3prl, renamed

TOKENS = ("<s>", "A", "B")
HEADS: dict[str, Head] = {
    "utterance": UtteranceLinear(6, {"label": ("0", "1")}, width=4),
    "frame": FrameCtc(6, TOKENS, width=4),
    "blstm": BlstmCtc(6, TOKENS, width=4, projection=5, num_layers=3),
    "pit": LstmPit(6, width=4, num_speakers=3),
    "xvector": XVector(6, 5, width=4, pool_width=7),
}


def theirs(kind: str) -> dict[str, Tensor]:
    """Our tensors under s3prl's names, written down by hand."""
    names = {}
    for name in HEADS[kind].state_dict():
        first, _, rest = name.partition(".")
        place = {
            "rnns": f"model.rnns.{rest[:1]}.layer{rest[1:]}",
            "rnn": f"model.rnn.{rest}",
            "tdnn": f"model.framelevel_feature_extractor.module.{rest}",
            "linear1": f"model.utterancelevel_feature_extractor.linear1.{rest}",
            "linear2": f"model.utterancelevel_feature_extractor.linear2.{rest}",
            "linear": f"model.{'post_net.' if kind == 'utterance' else ''}linear.{rest}",
            "objective": "objective.W",
        }
        names[place.get(first, name)] = name
    state = HEADS[kind].state_dict()
    return {theirs: state[ours] for theirs, ours in names.items()}


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_head_is_rebuilt_from_its_tensors(kind: str) -> None:
    tensors = theirs(kind)
    head = head_from_s3prl(tensors)
    assert type(head) is type(HEADS[kind])
    for name, value in tensors.items():
        assert torch.equal(head.state_dict()[renamed(name)], value)
    assert len(tensors) == len(head.state_dict())
    if isinstance(head, XVector):
        assert head.pool_extra_frame
    if isinstance(head, BlstmCtc):
        assert head.dropout.p == 0 and head.augment is None


@pytest.mark.parametrize("kind", list(HEADS))
def test_every_missing_left_over_or_misshapen_tensor_is_an_error(kind: str) -> None:
    for name in theirs(kind):
        tensors = theirs(kind)
        value = tensors.pop(name)
        with pytest.raises(RequestError):
            head_from_s3prl(tensors)
        with pytest.raises(RequestError):
            head_from_s3prl({**tensors, name: torch.cat([value, value])})
    with pytest.raises(RequestError, match="extra"):
        head_from_s3prl({**theirs(kind), "model.extra.weight": torch.zeros(1)})


def test_strangers_are_refused() -> None:
    with pytest.raises(RequestError, match="not a head"):
        head_from_s3prl({"encoder.weight": torch.zeros(2, 2)})
