"""Heads trained with connectionist temporal classification: phonemes (PR), characters (ASR), characters and slots (SF)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Head
from superb_probe.errors import RequestError
from superb_probe.probes.specaugment import SpecAugment

BLANK = 0  # the first token of every vocabulary: "<pad>" of PR and SF, "<s>" of ASR


class FrameLogits(NamedTuple):
    """Logits of a head that answers frame by frame.

    Attributes:
        logits: (B, T, C).
        num_frames: (B,) valid frames of each row.
    """

    logits: Tensor
    num_frames: Tensor


def ctc_loss(outputs: FrameLogits, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC's negative log-likelihood, each utterance's divided by its number of tokens, mean over the batch.

    As in s3prl, an utterance with fewer frames than its tokens need counts as zero (`zero_infinity`).

    Args:
        outputs: logits (B, T, C) and their valid frames.
        targets: (B, longest) token ids, anything past `target_lengths`.
        target_lengths: (B,).
    """
    return ctc_losses(outputs.logits[None], outputs.num_frames, targets, target_lengths)[0]


def ctc_losses(logits: Tensor, num_frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """`ctc_loss` of N trials on one batch, in one call.

    Args:
        logits: (N, B, T, C).
        num_frames: (B,) valid frames.
        targets: (B, longest) token ids, anything past `target_lengths`.
        target_lengths: (B,).

    Returns:
        (N,) losses.
    """
    count, batch = logits.shape[:2]
    past = torch.arange(targets.shape[1], device=targets.device) >= target_lengths[:, None]
    log_probabilities = nn.functional.log_softmax(logits.flatten(0, 1).float(), dim=-1).transpose(0, 1)
    each = nn.functional.ctc_loss(
        log_probabilities,
        targets.masked_fill(past, BLANK).repeat(count, 1),
        num_frames.repeat(count),
        target_lengths.repeat(count),
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return (each.view(count, batch) / target_lengths.clamp(min=1)).mean(1)


def greedy_ids(outputs: FrameLogits) -> list[np.ndarray[Any, Any]]:
    """The best token of every frame, repeats collapsed, blanks dropped: one array of ids an utterance.

    >>> logits = torch.eye(3)[torch.tensor([[1, 1, 0, 1, 2, 2]])]
    >>> [ids.tolist() for ids in greedy_ids(FrameLogits(logits, torch.tensor([5])))]
    [[1, 1, 2]]
    """
    best = outputs.logits.argmax(-1).cpu().numpy()
    decoded = []
    for row, length in zip(best, outputs.num_frames.tolist(), strict=True):
        ids = row[:length]
        changes = np.concatenate([np.ones(min(length, 1), dtype=bool), ids[1:] != ids[:-1]])
        decoded.append(ids[changes & (ids != BLANK)])
    return decoded


class _Ctc(Head):
    """What the CTC heads share: vocabulary, loss and greedy decoding."""

    def __init__(self, tokens: Sequence[str], drop: Sequence[str]) -> None:
        super().__init__()
        unknown = sorted(set(drop) - set(tokens))
        if len(tokens) < 2 or len(set(tokens)) != len(tokens) or unknown:
            raise RequestError(
                f"CTC head: {len(tokens)} tokens ({len(set(tokens))} different), to drop but not among them: {unknown}. "
                "Fix: give the blank and at least one token, each once"
            )
        self.tokens = tuple(tokens)
        self.drop = frozenset(drop)

    def loss(self, outputs: FrameLogits, batch: Batch) -> Tensor:
        """CTC loss of `batch.targets["tokens"]`, whose lengths are "tokens_lengths"."""
        return ctc_loss(outputs, batch.targets["tokens"], batch.targets["tokens_lengths"])

    def predict(self, outputs: FrameLogits) -> list[list[str]]:
        """Tokens of the greedy decoding, without blanks and what is in `drop`, for each utterance."""
        return [
            [self.tokens[number] for number in ids.tolist() if self.tokens[number] not in self.drop]
            for ids in greedy_ids(outputs)
        ]


class FrameCtc(_Ctc):
    """Projector and a linear layer, frame by frame: SUPERB's phoneme recogniser.

    Attributes:
        tokens: the vocabulary in id order, the blank first.
        drop: tokens left out of predictions, e.g. the end token.

    >>> head = FrameCtc(4, ("<pad>", "<eos>", "AA1"), drop=("<eos>",))
    >>> head(torch.zeros(2, 5, 4), torch.tensor([5, 3])).logits.shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, dim: int, tokens: Sequence[str], *, width: int = 256, drop: Sequence[str] = ()) -> None:
        """A head for states of width `dim`; `width` is the projector's."""
        super().__init__(tokens, drop)
        self.projector = nn.Linear(dim, width)
        self.linear = nn.Linear(width, len(self.tokens))

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits of every frame."""
        return FrameLogits(self.linear(self.projector(frames)), num_frames)


class BlstmCtc(_Ctc):
    """Projector, stacked bidirectional LSTM layers with dropout after each, and a linear layer: SUPERB's ASR and SF head.

    Attributes:
        tokens: the vocabulary in id order, the blank first.
        drop: tokens left out of predictions, e.g. the end token.
        augment: SpecAugment of the frames in training, or None.

    >>> head = BlstmCtc(4, ("<s>", "</s>", "A"), width=6, drop=("</s>",))
    >>> head(torch.zeros(2, 5, 4), torch.tensor([5, 3])).logits.shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        dim: int,
        tokens: Sequence[str],
        *,
        width: int = 1024,
        projection: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.2,
        drop: Sequence[str] = (),
        augment: SpecAugment | None = None,
    ) -> None:
        """A head for states of width `dim`.

        Args:
            dim: D of the states.
            tokens: the vocabulary in id order, the blank first.
            width: of each direction of each LSTM layer.
            projection: width of the projector; None for `width`.
            num_layers: bidirectional layers.
            dropout: probability after each layer.
            drop: tokens left out of predictions.
            augment: SpecAugment with its own generator, used in training mode only; None for none.
        """
        super().__init__(tokens, drop)
        self.augment = augment
        projection = width if projection is None else projection
        self.projector = nn.Linear(dim, projection)
        self.rnns = nn.ModuleList(
            nn.LSTM(projection if number == 0 else 2 * width, width, batch_first=True, bidirectional=True)
            for number in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * width, len(self.tokens))

    def forward(self, frames: Tensor, num_frames: Tensor) -> FrameLogits:
        """(B, T, C) logits of every frame; padding is never read."""
        if self.training and self.augment is not None:
            frames = self.augment(frames, num_frames)
        hidden = self.projector(frames)
        read = _packed if frames.is_cuda else _reversed
        for rnn in self.rnns:
            assert isinstance(rnn, nn.LSTM)
            hidden = self.dropout(read(rnn, hidden, num_frames))
        return FrameLogits(self.linear(hidden), num_frames)


def _packed(rnn: nn.LSTM, hidden: Tensor, num_frames: Tensor) -> Tensor:
    """(B, T, 2 width) of a bidirectional layer, zero past each row's end: what cuDNN does best."""
    packed = nn.utils.rnn.pack_padded_sequence(hidden, num_frames.cpu(), batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=hidden.shape[1])[0]


def _reversed(rnn: nn.LSTM, hidden: Tensor, num_frames: Tensor) -> Tensor:
    """The same without packing, whose gradient takes time quadratic in the frames on a CPU.

    Each row is turned round within its own frames, so that padding comes last in both directions.
    """
    batch, length = hidden.shape[:2]
    frame, row = torch.arange(length)[:, None], torch.arange(batch)
    valid = frame < num_frames
    turned = torch.where(valid, num_frames - 1 - frame, frame)
    forward = hidden.transpose(0, 1)
    weights: list[Any] = list(rnn._flat_weights)  # four of each direction
    start = hidden.new_zeros(1, batch, rnn.hidden_size)
    outputs = []
    for inputs, half in ((forward, weights[:4]), (forward[turned, row], weights[4:])):
        outputs.append(torch._VF.lstm(inputs, (start, start), half, True, 1, 0.0, rnn.training, False, False)[0])
    both = torch.cat([outputs[0], outputs[1][turned, row]], dim=2)
    return both.masked_fill(~valid[..., None], 0.0).transpose(0, 1)
