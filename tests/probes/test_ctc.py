"""CTC's loss against a sum over all alignments, its decoding by hand, and when SpecAugment and dropout act."""

from __future__ import annotations

import math
from itertools import groupby, product

import pytest
import torch

from superb_probe.downstreams.base import Batch
from superb_probe.probes import ctc as ctc_module
from superb_probe.probes.ctc import BlstmCtc, FrameCtc, FrameLogits, ctc_loss, ctc_losses, greedy_ids
from superb_probe.probes.specaugment import SpecAugment

TOKENS = ("<s>", "</s>", "A", "B")


def collapse(path: tuple[int, ...], blank: int = 0) -> list[int]:
    return [number for number, _ in groupby(path) if number != blank]


def by_hand(outputs: FrameLogits, targets: list[list[int]], blank: int = 0) -> float:
    """Mean over utterances of -log P / tokens, P summed over every path of every frame."""
    total = 0.0
    for logits, length, target in zip(outputs.logits.double(), outputs.num_frames.tolist(), targets, strict=True):
        probability = logits[:length].softmax(-1)
        paths = product(range(logits.shape[1]), repeat=length)
        right = [
            math.prod(probability[t, k].item() for t, k in enumerate(p)) for p in paths if collapse(p, blank) == target
        ]
        total += -math.log(sum(right)) / len(target) if right else 0.0
    return total / len(targets)


def example() -> FrameLogits:
    return FrameLogits(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 4]))


def test_the_loss_is_the_sum_over_all_alignments() -> None:
    outputs, targets = example(), torch.tensor([[2, 2, 1], [3, 1, -1]])
    loss = float(ctc_loss(outputs, targets, torch.tensor([3, 2])))
    assert loss == pytest.approx(by_hand(outputs, [[2, 2, 1], [3, 1]]), rel=1e-5)
    # another blank, another end token, padding taken for valid: each is another value
    assert loss != pytest.approx(by_hand(outputs, [[2, 2, 1], [3, 1]], blank=1), rel=1e-3)
    assert loss != pytest.approx(by_hand(outputs, [[2, 2], [3]]), rel=1e-3)
    longer = FrameLogits(outputs.logits, torch.tensor([5, 5]))
    assert loss != pytest.approx(by_hand(longer, [[2, 2, 1], [3, 1]]), rel=1e-3)


def test_an_utterance_too_short_for_its_tokens_counts_as_zero() -> None:
    outputs = FrameLogits(example().logits, torch.tensor([5, 1]))
    logits = outputs.logits.requires_grad_()
    loss = ctc_loss(
        FrameLogits(logits, outputs.num_frames), torch.tensor([[2, 2, 1], [3, 1, -1]]), torch.tensor([3, 2])
    )
    assert float(loss.detach()) == pytest.approx(by_hand(outputs, [[2, 2, 1], [3, 1]]), rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_half_precision_logits_give_a_float32_loss() -> None:
    outputs = FrameLogits(example().logits.bfloat16(), example().num_frames)
    assert ctc_loss(outputs, torch.tensor([[2], [3]]), torch.tensor([1, 1])).dtype == torch.float32


def test_greedy_decoding_by_hand() -> None:
    rows = [[0, 2, 2, 0, 2, 3, 1, 1], [3, 3, 3, 1, 2, 2, 2, 2], [0, 0, 2, 0, 0, 0, 0, 0]]
    outputs = FrameLogits(torch.eye(4)[torch.tensor(rows)] * 9, torch.tensor([8, 3, 2]))
    assert [ids.tolist() for ids in greedy_ids(outputs)] == [[2, 2, 3, 1], [3], []]
    assert FrameCtc(4, TOKENS, drop=("</s>",)).predict(outputs) == [["A", "A", "B"], ["B"], []]
    assert FrameCtc(4, TOKENS).predict(outputs) == [["A", "A", "B", "</s>"], ["B"], []]


def test_decoding_equals_collapsing_on_random_paths() -> None:
    generator = torch.Generator().manual_seed(1)
    best = torch.randint(4, (50, 30), generator=generator)
    lengths = torch.randint(0, 31, (50,), generator=generator)
    decoded = greedy_ids(FrameLogits(torch.eye(4)[best], lengths))
    for row, length, ids in zip(best.tolist(), lengths.tolist(), decoded, strict=True):
        assert ids.tolist() == collapse(tuple(row[:length]))


def test_the_head_reads_its_targets_and_their_lengths() -> None:
    head = FrameCtc(3, TOKENS, width=4)
    outputs = head(torch.randn(2, 5, 3), torch.tensor([5, 4]))
    targets = {"tokens": torch.tensor([[2, 2, 1], [3, 1, -1]]), "tokens_lengths": torch.tensor([3, 2])}
    loss = head.loss(outputs, Batch(("a", "b"), outputs.num_frames, targets))
    assert float(loss) == pytest.approx(by_hand(outputs, [[2, 2, 1], [3, 1]]), rel=1e-4)


def test_augmentation_and_dropout_act_in_training_only() -> None:
    frames, lengths = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([60, 50])
    augmented = BlstmCtc(64, TOKENS, width=4, dropout=0.0, augment=SpecAugment(torch.Generator().manual_seed(1)))
    dropped = BlstmCtc(64, TOKENS, width=4, dropout=0.5)
    plain = BlstmCtc(64, TOKENS, width=4, dropout=0.0)
    with torch.no_grad():
        for head, random in ((augmented, True), (dropped, True), (plain, False)):
            head.train()
            assert torch.equal(head(frames, lengths).logits, head(frames, lengths).logits) != random
            head.eval()
            assert torch.equal(head(frames, lengths).logits, head(frames, lengths).logits)


def test_both_directions_are_read() -> None:
    head = BlstmCtc(4, TOKENS, width=3).eval()
    frames, lengths = torch.randn(1, 12, 4), torch.tensor([12])
    with torch.no_grad():
        before = head(frames, lengths).logits
        for changed, untouched in ((0, 11), (11, 0)):
            other = frames.clone()
            other[0, changed] += 1
            assert (head(other, lengths).logits[0, untouched] - before[0, untouched]).abs().max() > 0


def test_several_trials_in_one_call_are_each_one_s_loss() -> None:
    logits = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(5))
    lengths, targets, counts = torch.tensor([5, 4]), torch.tensor([[2, 2, 1], [3, 1, -1]]), torch.tensor([3, 2])
    losses = ctc_losses(logits, lengths, targets, counts)
    for trial in range(3):
        assert float(losses[trial]) == pytest.approx(
            by_hand(FrameLogits(logits[trial], lengths), [[2, 2, 1], [3, 1]]), rel=1e-5
        )


def run(head: BlstmCtc, frames: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Logits and every gradient."""
    head.zero_grad()
    logits = head(frames, lengths).logits
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in head.parameters())]


def test_turning_rows_round_equals_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = BlstmCtc(4, TOKENS, width=3, dropout=0.0)
    frames, lengths = torch.randn(4, 9, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([9, 4, 1, 7])
    turned = run(head, frames, lengths)
    other_length = run(head, frames, torch.tensor([9, 5, 1, 7]))
    monkeypatch.setattr(ctc_module, "_reversed", ctc_module._packed)
    packed = run(head, frames, lengths)
    for one, two in zip(turned, packed, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert (other_length[0][1, 0] - packed[0][1, 0]).abs().max() > 1e-3  # turned round at another frame
