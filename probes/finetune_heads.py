"""Heads of fine-tuned recognisers: a unidirectional LSTM, and a stack of convolutions; and any of them frame by frame as audio comes.

`BlstmCtc` of `ctc.py` is the third. The paper (arXiv 2506.12606) names a 12-layer convolutional encoder for whole talks without its
widths; those here are ours. Its streaming recogniser has two LSTM layers of 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Head
from superb_probe.errors import RequestError
from superb_probe.probes.ctc import BLANK, BlstmCtc, FrameCtc, FrameLogits
from superb_probe.upstreams.base import frame_mask

HEADS = ("lstm", "blstm", "conv", "linear")


class LstmCtc(FrameCtc):
    """Projector, stacked unidirectional LSTM layers with dropout after each, and a linear layer: a frame sees no later one.

    >>> head = LstmCtc(4, ("<s>", "</s>", "A"), width=6, drop=("</s>",))
    >>> head(torch.zeros(2, 5, 4), torch.tensor([5, 3])).logits.shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        dim: int,
        tokens: Sequence[str],
        *,
        width: int = 1024,
        num_layers: int = 2,
        dropout: float = 0.2,
        drop: Sequence[str] = (),
    ) -> None:
        """As `BlstmCtc`."""
        super().__init__(dim, tokens, width=width, drop=drop)
        self.rnns = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits of every frame; padding comes after a row's own frames, which do not see it."""
        return FrameLogits(self.run(frames, [None] * len(self.rnns))[0], num_frames)

    def run(
        self, frames: Tensor, states: Sequence[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        """Logits (B, T, C) of the next frames (B, T, D), and the states the layers end in.

        Args:
            frames: (B, T, D), at least one frame.
            states: of each layer before them; None at the start.
        """
        hidden = self.projector(frames)
        ended: list[tuple[Tensor, Tensor] | None] = []
        for rnn, state in zip(self.rnns, states, strict=True):
            hidden, last = rnn(hidden, state)
            hidden = self.dropout(hidden)
            ended.append(last)
        return self.linear(hidden), ended


class ConvCtc(FrameCtc):
    """Projector, a stack of residual convolutions over time, and a linear layer: work and memory grow with the length, not its square.

    Each layer is x + dropout(GELU(convolution(layer norm(x)))); 12 layers of kernel 5 see half a second to either side.

    >>> head = ConvCtc(4, ("<s>", "</s>", "A"), width=6, num_layers=2, drop=("</s>",))
    >>> head(torch.zeros(2, 5, 4), torch.tensor([5, 3])).logits.shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        dim: int,
        tokens: Sequence[str],
        *,
        width: int = 256,
        num_layers: int = 12,
        kernel: int = 5,
        dropout: float = 0.1,
        drop: Sequence[str] = (),
    ) -> None:
        """`kernel` is odd: the convolutions are centred."""
        super().__init__(dim, tokens, width=width, drop=drop)
        if kernel % 2 == 0:
            raise RequestError(f"ConvCtc: kernel {kernel} is even. Fix: an odd one, whose centre is the frame itself")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers))
        self.convs = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits of every frame; padding is zero at every layer, as what lies beyond an utterance alone."""
        past = ~frame_mask(num_frames, frames.shape[1])[..., None]
        hidden = self.projector(frames)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            inputs = norm(hidden).masked_fill(past, 0.0).transpose(1, 2)
            hidden = hidden + self.dropout(nn.functional.gelu(conv(inputs))).transpose(1, 2)
        return FrameLogits(self.linear(hidden), num_frames)


def make_head(
    name: str,
    dim: int,
    tokens: Sequence[str],
    *,
    width: int | None = None,
    num_layers: int | None = None,
    drop: Sequence[str] = (),
) -> Head:
    """A head by its name in `HEADS`; None gives the class's own widths and layers.

    Raises:
        RequestError: for another name, or layers asked of the linear head.
    """
    given = {key: value for key, value in (("width", width), ("num_layers", num_layers)) if value is not None}
    if name == "linear" and num_layers is not None:
        raise RequestError("the linear head has no layers to count. Fix: drop --head-layers")
    classes: dict[str, Callable[..., Head]] = {"lstm": LstmCtc, "blstm": BlstmCtc, "conv": ConvCtc, "linear": FrameCtc}
    if name not in classes:
        raise RequestError(f"unknown head {name!r}. Fix: one of {', '.join(HEADS)}")
    return classes[name](dim, tokens, drop=drop, **given)


class HeadStream:
    """A head on frames as they come: their logits, equal to one pass.

    >>> stream = HeadStream(FrameCtc(4, ("<s>", "A")))
    >>> stream.push(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, head: nn.Module) -> None:
        """A linear or a unidirectional head.

        Raises:
            RequestError: for a head that sees later frames.
        """
        if type(head) not in (FrameCtc, LstmCtc):
            raise RequestError(
                f"a {type(head).__name__} head sees frames that have not come yet, so it cannot stream. "
                "Fix: fine-tune with --head lstm or linear, or train a probe with --head linear"
            )
        self.head = head
        self._states: list[tuple[Tensor, Tensor] | None] = [None] * (len(head.rnns) if isinstance(head, LstmCtc) else 0)

    @torch.inference_mode()
    def push(self, frames: Tensor) -> Tensor:
        """Logits (T, C) of the next frames (T, D)."""
        if not isinstance(self.head, LstmCtc):
            assert isinstance(self.head, FrameCtc)
            outputs: FrameLogits = self.head(frames[None], torch.tensor([frames.shape[0]]))
            return outputs.logits[0]
        if not frames.shape[0]:
            return frames.new_zeros(0, len(self.head.tokens))
        logits, self._states = self.head.run(frames[None], self._states)
        return logits[0]

    @property
    def state_bytes(self) -> int:
        """Bytes carried to the next frames."""
        return sum(part.numel() * part.element_size() for state in self._states if state is not None for part in state)


class GreedyStream:
    """Greedy CTC decoding as logits come: each token is given once, at the frame where it begins.

    >>> stream = GreedyStream()
    >>> stream.push(torch.eye(3)[torch.tensor([1, 1, 0])]), stream.push(torch.eye(3)[torch.tensor([1, 2])])
    ([(0, 1)], [(3, 1), (4, 2)])
    """

    def __init__(self) -> None:
        """At the start of an utterance."""
        self._last = BLANK
        self._frames = 0

    def push(self, logits: Tensor) -> list[tuple[int, int]]:
        """(frame, token id) of the tokens that the next frames' logits (T, C) begin."""
        found = []
        for token in logits.argmax(-1).tolist():
            if token not in (BLANK, self._last):
                found.append((self._frames, int(token)))
            self._last = token
            self._frames += 1
        return found
