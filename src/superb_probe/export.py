"""Encoders of this project in the files of other tools, so that others can check them with their own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.fairseq_format import to_s3prl
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import FAMILIES
from superb_probe.upstreams.transformers_format import to_transformers

TOOLS = ("s3prl", "transformers")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how the other tool reads it.

    Attributes:
        path: the file or folder.
        reader: what reads it there.
    """

    path: Path
    reader: str


def export_upstream(upstream: Upstream, tool: str, folder: Path) -> Exported:
    """Write an encoder for another tool: `folder/<name>.pt` for s3prl, the folder itself for transformers.

    Args:
        upstream: a HuBERT of this project.
        tool: "s3prl" or "transformers".
        folder: where; for transformers it must be empty.

    Raises:
        RequestError: if the tool has no words for the encoder; the message names what can be written.
    """
    if tool not in TOOLS:
        raise RequestError(f"unknown tool {tool!r}. Fix: {' or '.join(TOOLS)}.")
    name = upstream.info.name
    if not isinstance(upstream, HubertUpstream):
        raise RequestError(f"{name} is no HuBERT of this project. Fix: one of {', '.join(_able(tool))}.")
    encoder = upstream.encoder
    try:
        if tool == "transformers":
            to_transformers(encoder.config, encoder.state_dict(), folder)
            return Exported(
                folder, f"transformers.HubertModel.from_pretrained({str(folder)!r}, output_hidden_states=True)"
            )
        content = to_s3prl(encoder.config, encoder.state_dict(), ())
    except RequestError as error:
        raise RequestError(f"{name}: {error}\nWhat {tool} can be given: {', '.join(_able(tool))}.") from error
    path = folder / f"{name}.pt"
    if path.exists():
        raise RequestError(f"{path} exists. Fix: another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    stock = encoder.config.layer_type == "transformer" and not encoder.config.causal_attention
    whose = (
        "s3prl 0.4.18"
        if stock
        else "the s3prl of the Mamba-HuBERT code (arXiv:2506.12606); s3prl 0.4.18 has no such layers"
    )
    return Exported(path, f"{whose}: run_downstream.py -u hubert_local -k {path}")


def _able(tool: str) -> list[str]:
    """The registered names whose test size the tool has words for."""
    able = []
    for name in FAMILIES:
        upstream = load_upstream(name, size="test", random=0)
        assert isinstance(upstream, HubertUpstream)
        config = upstream.encoder.config
        plain_transformer = config.layer_type == "transformer" and not config.causal_attention
        own_front = config.causal_pos_conv or config.extractor_mode == "causal"
        if not own_front and (plain_transformer or (tool == "s3prl" and config.layer_type != "inn_bi_mamba")):
            able.append(name)
    return able
