"""s3prl's trained heads in ours: which head some tensors are, and the same tensors under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from superb_probe.downstreams.base import Head
from superb_probe.errors import RequestError
from superb_probe.probes.heads import BlstmCtc, FrameCtc, LstmPit, UtteranceLinear, XVector

# (what is in a name there, what it is here), applied in order
RENAMED = (
    (r"^model\.post_net\.linear\.", "linear."),
    (r"^model\.framelevel_feature_extractor\.module\.", "tdnn."),
    (r"^model\.utterancelevel_feature_extractor\.", ""),
    (r"^model\.rnns\.(\d+)\.layer\.", r"rnns.\1."),
    (r"^model\.", ""),
    (r"^objective\.W$", "objective"),
)
# a tensor that only this head has; the first that is found decides
MARKS = {
    "objective.W": "x-vector",
    "model.rnns.0.layer.weight_ih_l0": "BLSTM CTC",
    "model.rnn.weight_ih_l0": "LSTM PIT",
    "model.post_net.linear.weight": "utterance linear",
    "model.linear.weight": "frame CTC",
}


def renamed(name: str) -> str:
    """Our name of one of s3prl's tensors.

    >>> renamed("model.rnns.1.layer.weight_hh_l0_reverse")
    'rnns.1.weight_hh_l0_reverse'
    """
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def head_from_s3prl(tensors: Mapping[str, Tensor]) -> Head:
    """The head that some of s3prl's tensors belong to, with sizes read off them, their values loaded, dropout off.

    Classes are named "0", "1", ...; the x-vector pools s3prl's extra frame.

    Args:
        tensors: s3prl's names of a probe's parameters ("projector.weight", "model.linear.bias", "objective.W", ...).

    Raises:
        RequestError: when they are of no known head, or some are missing, left over or of a wrong shape.
    """
    mark = next((mark for mark in MARKS if mark in tensors), None)
    if mark is None:
        raise RequestError(f"not a head of s3prl's: tensors {sorted(tensors)}, none of {sorted(MARKS)}")
    try:
        head = _build(MARKS[mark], {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        head.load_state_dict({renamed(name): tensor for name, tensor in tensors.items()})
    except KeyError as error:
        raise RequestError(f"{MARKS[mark]} head: tensor {error} is missing among {sorted(tensors)}") from error
    except (
        RuntimeError,
        ValueError,
        IndexError,
    ) as error:  # load_state_dict lists every missing, left-over and misshapen one
        raise RequestError(f"{MARKS[mark]} head: {' '.join(str(error).split())}") from error
    return head


def _build(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Head:
    if kind == "x-vector":
        width, dim = shapes["connector.weight"]
        (pool_width,) = shapes["model.framelevel_feature_extractor.module.4.kernel.bias"]
        _, num_speakers = shapes["objective.W"]
        return XVector(dim, num_speakers, width=width, pool_width=pool_width, pool_extra_frame=True)
    if kind == "LSTM PIT":
        num_speakers, width = shapes["model.linear.weight"]
        _, dim = shapes["model.rnn.weight_ih_l0"]
        return LstmPit(dim, width=width, num_speakers=num_speakers)
    projection, dim = shapes["projector.weight"]
    if kind == "utterance linear":
        num_classes, _ = shapes["model.post_net.linear.weight"]
        return UtteranceLinear(dim, {"label": _numbered(num_classes)}, width=projection)
    num_classes, double_width = shapes["model.linear.weight"]
    if kind == "frame CTC":
        return FrameCtc(dim, _numbered(num_classes), width=projection)
    num_layers = len({re.match(r"model\.rnns\.(\d+)\.|", name).group(1) for name in shapes} - {None})  # type: ignore[union-attr]
    return BlstmCtc(
        dim,
        _numbered(num_classes),
        width=double_width // 2,
        projection=projection,
        num_layers=num_layers,
        dropout=0.0,
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))
