"""Second heads, for asking whether a ranking of encoders is the encoders' or the probe's: never SUPERB's own.

| `--head` | tasks | class |
| --- | --- | --- |
| `mlp` | KS, SID, ER, IC | `UtteranceMlp` |
| `linear` | ASR | `probes.ctc.FrameCtc`, on characters |
| `ecapa` | ASV | `EcapaTdnn`, speechbrain's network |
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Head
from superb_probe.errors import RequestError
from superb_probe.probes.heads import UtteranceLinear, masked_mean
from superb_probe.probes.xvector import XVectorOutputs, additive_margin_loss
from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub


class UtteranceMlp(UtteranceLinear):
    """Mean over time, one hidden layer with a ReLU, and one linear classifier a slot: `UtteranceLinear` and one nonlinearity."""

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """(B, C) logits of all slots, one slot after the other. A mean over time may be given as frames (B, 1, D).

        >>> UtteranceMlp(4, {"keyword": ("yes", "no")})(torch.zeros(3, 5, 4), torch.tensor([5, 4, 1])).shape
        torch.Size([3, 2])
        """
        hidden = torch.relu(self.projector(masked_mean(frames, num_frames)))
        return self.linear(hidden)  # type: ignore[no-any-return]


class EcapaTdnn(Head):
    """ECAPA-TDNN (Desplanques et al., arXiv:2005.07143) as speechbrain builds it, trained with additive-margin softmax.

    Needs the extra `speechbrain`. An utterance is embedded alone in evaluation: the network's convolutions look past the end of a
    shorter one in a padded batch, which would make a score depend on its batch.

    Attributes:
        objective: (embedding, C) one direction a training speaker.
    """

    min_frames = 5  # its convolutions mirror up to 4 frames at each end

    def __init__(
        self,
        dim: int,
        num_speakers: int,
        *,
        width: int = 512,
        embedding: int = 192,
        attention: int = 128,
        margin: float = 0.4,
        scale: float = 30.0,
    ) -> None:
        """A head for states of width `dim`; `width` is that of the network's blocks, `attention` of its pooling and squeezing.

        Raises:
            RequestError: without speechbrain, or for fewer than two speakers.
        """
        super().__init__()
        if num_speakers < 2:
            raise RequestError(
                f"EcapaTdnn: {num_speakers} training speakers. Fix: it takes at least two to tell them apart"
            )
        if width % 8:
            raise RequestError(f"EcapaTdnn: width {width}. Fix: a multiple of 8, for its Res2Net blocks")
        self.margin, self.scale = margin, scale
        self.network = _ecapa_class()(
            dim,
            lin_neurons=embedding,
            channels=[width] * 4 + [3 * width],
            attention_channels=attention,
            se_channels=attention,
        )
        self.objective = nn.Parameter(torch.empty(embedding, num_speakers))
        nn.init.xavier_normal_(self.objective)

    def forward(self, frames: Tensor, num_frames: Tensor) -> XVectorOutputs:
        """Vector and embedding (B, 192) of each utterance, which must have `min_frames` frames."""
        if int(num_frames.min()) < self.min_frames:
            raise RequestError(
                f"EcapaTdnn: an utterance of {int(num_frames.min())} frames; the head needs {self.min_frames}"
            )
        if self.training:
            vector = self.network(frames, num_frames / frames.shape[1])[:, 0]
        else:
            lengths = num_frames.tolist()
            rows = [self.network(frames[row : row + 1, :length])[:, 0] for row, length in enumerate(lengths)]
            vector = torch.cat(rows)
        return XVectorOutputs(vector, nn.functional.normalize(vector, dim=1))

    def loss(self, outputs: XVectorOutputs, batch: Batch) -> Tensor:
        """Cross-entropy over scaled cosines, the margin taken off the right speaker's first."""
        return additive_margin_loss(
            outputs.vector, self.objective, batch.targets["speaker"], margin=self.margin, scale=self.scale
        )

    def predict(self, outputs: XVectorOutputs) -> list[np.ndarray[Any, Any]]:
        """The embedding of each utterance, of length one; a trial's score is the dot product of two."""
        return list(outputs.embedding.detach().float().cpu().numpy())


def _ecapa_class() -> Any:
    """The network of speechbrain, imported only when it is asked for."""
    install_torchaudio_stub()
    try:
        return importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN").ECAPA_TDNN
    except ImportError as error:
        raise RequestError(
            f"--head ecapa needs speechbrain: {error}. Fix: pip install 'superb-probe[speechbrain]'"
        ) from error
