"""How far an encoder's states are from others, for the tests of checkpoint formats."""

from __future__ import annotations

import torch
from torch import Tensor

from superb_probe.upstreams.checkpoints import Checkpoint
from superb_probe.upstreams.hubert import HubertEncoder


def states_error(checkpoint: Checkpoint, wav: Tensor, reference: Tensor) -> float:
    """The relative error of the worst layer's states of one waveform (S,) against others (L, T, D)."""
    encoder = HubertEncoder(checkpoint.config).eval()
    encoder.load_state_dict(dict(checkpoint.tensors), strict=True)
    with torch.inference_mode():
        found = encoder(wav[None], torch.tensor([len(wav)])).states[:, 0]
    assert found.shape == reference.shape
    return float(((found - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).max())
