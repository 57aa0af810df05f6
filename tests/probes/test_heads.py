"""The heads against their formulas written out row by row, and against themselves in other batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from superb_probe.downstreams.base import Batch, Head
from superb_probe.errors import RequestError
from superb_probe.probes.ctc import FrameLogits
from superb_probe.probes.heads import BlstmCtc, FrameCtc, LstmPit, UtteranceLinear, XVector, masked_mean
from superb_probe.probes.xvector import XVectorOutputs, statistics_pooling
from superb_probe.upstreams.base import frame_mask

DIM = 6
LENGTHS = torch.tensor([40, 29, 16])
SLOTS = {"action": ("on", "off"), "object": ("lamp", "tv", "none")}
TOKENS = ("<pad>", "<eos>", "A", "B", "C")


def frames() -> Tensor:
    values = torch.randn(3, 40, DIM, generator=torch.Generator().manual_seed(4))
    return values * frame_mask(LENGTHS, 40)[..., None]


def build(name: str) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        made: dict[str, Callable[[], Head]] = {
            "utterance": lambda: UtteranceLinear(DIM, SLOTS, width=5),
            "ctc": lambda: FrameCtc(DIM, TOKENS, width=5),
            "blstm": lambda: BlstmCtc(DIM, TOKENS, width=5, projection=4),
            "xvector": lambda: XVector(DIM, 4, width=7, pool_width=9),
            "xvector of s3prl": lambda: XVector(DIM, 4, width=7, pool_width=9, pool_extra_frame=True),
            "pit": lambda: LstmPit(DIM, width=5),
        }
        head = made[name]().eval()
    if isinstance(head, XVector):
        with torch.no_grad():
            for layer in head.tdnn:
                layer.kernel.weight *= 3  # the default start hardly tells one utterance from another
    return head


def targets(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    speakers = (
        torch.randint(2, (3, 40, 2), generator=generator).float().masked_fill(~frame_mask(LENGTHS, 40)[..., None], -1)
    )
    everything = {
        "action": torch.tensor([0, 1, 1]),
        "object": torch.tensor([2, 0, 1]),
        "tokens": torch.tensor([[2, 3, 3, 1], [4, 1, -1, -1], [2, 4, 1, -1]]),
        "tokens_lengths": torch.tensor([4, 2, 3]),
        "speaker": torch.tensor([3, 0, 1]),
        "speakers": speakers,
    }
    return {name: value[:count] for name, value in everything.items()}


def batch(count: int = 3) -> Batch:
    return Batch(("a", "b", "c")[:count], LENGTHS[:count], targets(count))


def rows(outputs: Tensor | FrameLogits) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return list(outputs)
    return [row[:length] for row, length in zip(outputs.logits, outputs.num_frames.tolist(), strict=True)]


def difference_alone(head: Head) -> float:
    """How far the last row is, relatively, from itself without the other rows and their padding."""
    with torch.no_grad():
        together = head(frames(), LENGTHS)
        alone = head(frames()[2:, :16], LENGTHS[2:])
    if isinstance(together, XVectorOutputs):
        return max(relative(whole[2], one[0]) for whole, one in zip(together, alone, strict=True))
    return relative(rows(together)[2], rows(alone)[0])


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["utterance", "ctc", "blstm", "xvector", "pit"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    assert difference_alone(build(name)) < 1e-5


def test_s3prl_s_extra_frame_makes_a_row_depend_on_its_batch() -> None:
    assert difference_alone(build("xvector of s3prl")) > 1e-3


@pytest.mark.parametrize("name", ["utterance", "ctc", "blstm", "xvector", "xvector of s3prl", "pit"])
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    head = build(name).train()
    loss = head.loss(head(frames(), LENGTHS), batch())
    assert loss.shape == () and bool(loss.isfinite())
    loss.backward()
    for parameter_name, parameter in head.named_parameters():
        if "linear2" in parameter_name and parameter.ndim == 1:
            continue  # a ReLU may be shut
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", ["utterance", "ctc", "blstm", "xvector", "pit"])
def test_garbage_past_the_end_of_labels_is_not_read(name: str) -> None:
    head = build(name)
    given = targets()
    given["tokens"] = given["tokens"].masked_fill(given["tokens"] < 0, 77)
    given["speakers"] = given["speakers"].masked_fill(given["speakers"] < 0, 77.0)
    outputs = head(frames(), LENGTHS)
    first, second = head.loss(outputs, batch()), head.loss(outputs, Batch(("a", "b", "c"), LENGTHS, given))
    assert torch.equal(first, second)


# one row or utterance at a time, from the definitions


def test_the_utterance_head_is_linear_mean_linear() -> None:
    head = build("utterance")
    assert isinstance(head, UtteranceLinear)
    logits = head(frames(), LENGTHS)
    rows = [
        head.linear(head.projector(row[:length]).mean(0))
        for row, length in zip(frames(), LENGTHS.tolist(), strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(rows), rtol=1e-5, atol=1e-6)
    unmasked = torch.stack([head.linear(head.projector(row).mean(0)) for row in frames()])
    assert (logits - unmasked).abs().max() > 1e-3
    expected = 0.0
    for row, action, thing in zip(logits, (0, 1, 1), (2, 0, 1), strict=True):
        expected += -row[:2].log_softmax(0)[action] / 3 - row[2:].log_softmax(0)[thing] / 3
    torch.testing.assert_close(head.loss(logits, batch()), expected)
    predictions = head.predict(torch.tensor([[0.0, 1.0, 3.0, 2.0, 1.0], [2.0, 1.0, 0.0, 2.0, 5.0]]))
    assert predictions == [{"action": "off", "object": "lamp"}, {"action": "on", "object": "none"}]


def test_the_mean_view_equals_the_frame_view() -> None:
    head = build("utterance")
    means = masked_mean(frames(), LENGTHS)[:, None]
    by_frames, by_means = head(frames(), LENGTHS), head(means, torch.ones(3, dtype=torch.long))
    assert (by_frames - by_means).norm() / by_frames.norm() < 1e-5
    padded_means = frames().mean(1, keepdim=True)
    assert (by_frames - head(padded_means, torch.ones(3, dtype=torch.long))).norm() / by_frames.norm() > 1e-3


def pit_by_hand(logits: Tensor, labels: Tensor, *, shuffle: bool = True) -> Tensor:
    total = torch.zeros(())
    for row, truth, length in zip(logits, labels, LENGTHS.tolist(), strict=True):
        sums = []
        for order in permutations(range(2)) if shuffle else [(0, 1)]:
            x, y = row[:length], truth[:length][:, list(order)]
            sums.append(-(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(1).sum())
        total = total + torch.stack(sums).min()
    return total / LENGTHS.sum()


def test_the_diarisation_loss_is_that_of_the_best_permutation() -> None:
    head = build("pit")
    outputs = head(frames(), LENGTHS)
    labels = targets()["speakers"]
    torch.testing.assert_close(head.loss(outputs, batch()), pit_by_hand(outputs.logits, labels), rtol=1e-5, atol=1e-6)
    # speakers swapped in one utterance: the same loss; without permutations it is another
    swapped = labels.clone()
    swapped[1] = labels[1].flip(-1)
    again = head.loss(outputs, Batch(("a", "b", "c"), LENGTHS, {"speakers": swapped}))
    torch.testing.assert_close(again, head.loss(outputs, batch()))
    fixed = [pit_by_hand(outputs.logits, value, shuffle=False) for value in (labels, swapped)]
    assert (fixed[0] - fixed[1]).abs().item() > 1e-4
    predicted = head.predict(outputs)
    assert [row.shape for row in predicted] == [(40, 2), (29, 2), (16, 2)]
    np.testing.assert_array_equal(predicted[1], outputs.logits[1, :29].detach().numpy())


def test_diarisation_labels_on_another_grid_are_an_error() -> None:
    head = build("pit")
    with pytest.raises(RequestError, match="labels"):
        head.loss(head(frames(), LENGTHS), Batch(("a", "b", "c"), LENGTHS, {"speakers": torch.zeros(3, 39, 2)}))


def xvector_by_hand(head: XVector, row: Tensor, *, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    hidden = head.connector(row)
    for layer, (size, dilation) in zip(head.tdnn, ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1)), strict=True):
        times = range(len(hidden) - (size - 1) * dilation)
        windows = [torch.cat([hidden[t + k * dilation] for k in range(size)]) for t in times]
        hidden = torch.relu(layer.kernel(torch.stack(windows)))
    pooled = torch.cat([hidden.mean(0), hidden.std(0, unbiased=unbiased)])
    first = torch.relu(head.linear1(pooled))
    return torch.relu(head.linear2(first)), first / first.norm()


def test_the_xvector_is_its_layers_row_by_row() -> None:
    head = build("xvector")
    assert isinstance(head, XVector)
    outputs = head(frames(), LENGTHS)
    for number, length in enumerate(LENGTHS.tolist()):
        vector, embedding = xvector_by_hand(head, frames()[number, :length])
        torch.testing.assert_close(outputs.vector[number], vector, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.embedding[number], embedding, rtol=1e-4, atol=1e-5)
    biased, _ = xvector_by_hand(head, frames()[2, :16], unbiased=False)
    assert (biased - outputs.vector[2]).abs().max() > 1e-4
    embeddings = head.predict(outputs)
    assert all(abs(float(np.linalg.norm(embedding)) - 1) < 1e-5 and embedding.shape == (7,) for embedding in embeddings)


def test_am_softmax_takes_the_margin_off_the_right_speaker_only() -> None:
    head = build("xvector")
    assert isinstance(head, XVector)
    outputs = head(frames(), LENGTHS)
    losses = {}
    for margin in (0.4, 0.0):
        total = torch.zeros(())
        for vector, speaker in zip(outputs.vector, (3, 0, 1), strict=True):
            columns = head.objective.T
            cosine = [torch.dot(vector, column) / vector.norm() / column.norm() for column in columns]
            scores = torch.stack([30 * (c - margin * (k == speaker)) for k, c in enumerate(cosine)])
            total = total - torch.log(scores[speaker].exp() / scores.exp().sum())
        losses[margin] = total / 3
    torch.testing.assert_close(head.loss(outputs, batch()), losses[0.4], rtol=1e-5, atol=1e-5)
    assert (losses[0.4] - losses[0.0]).abs().item() > 1


def test_a_constant_dimension_has_no_deviation_and_a_finite_gradient() -> None:
    values = torch.zeros(1, 20, 2)
    values[0, :, 1] = torch.arange(20.0)
    values.requires_grad_()
    pooled = statistics_pooling(values, torch.tensor([18]))
    assert pooled[0, 2] == 0 and pooled[0, 3].item() == pytest.approx(float(torch.arange(18.0).std()))
    pooled.sum().backward()
    assert values.grad is not None and values.grad.isfinite().all()
    plain = torch.zeros(1, 3, requires_grad=True)
    plain.var(1).sqrt().sum().backward()  # what it guards against
    assert plain.grad is not None and plain.grad.isnan().any()


def test_the_xvector_needs_sixteen_frames() -> None:
    head = build("xvector")
    assert head.min_frames == 16
    assert head(torch.randn(1, 16, DIM), torch.tensor([16])).embedding.isfinite().all()
    with pytest.raises(RequestError, match="16"):
        head(torch.randn(1, 15, DIM), torch.tensor([15]))


def test_full_widths_are_superb_s() -> None:
    sizes = {
        "utterance": sum(
            p.numel() for p in UtteranceLinear(768, {"speaker": tuple(map(str, range(1251)))}).parameters()
        ),
        "xvector": sum(p.numel() for p in XVector(768, 1211).parameters()),
        "blstm": sum(p.numel() for p in BlstmCtc(768, tuple(map(str, range(32)))).parameters()),
        "ctc": sum(p.numel() for p in FrameCtc(768, tuple(map(str, range(74)))).parameters()),
        "pit": sum(p.numel() for p in LstmPit(768).parameters()),
    }
    tdnn = (5 * 512 + 1) * 512 + 2 * (3 * 512 + 1) * 512 + (512 + 1) * 512 + (512 + 1) * 1500
    blstm = 8 * 1024 * (1024 + 1024 + 2) + 8 * 1024 * (2048 + 1024 + 2)
    assert sizes == {
        "utterance": 769 * 256 + 257 * 1251,
        "xvector": 769 * 512 + tdnn + 3001 * 512 + 513 * 512 + 512 * 1211,
        "blstm": 769 * 1024 + blstm + 2049 * 32,
        "ctc": 769 * 256 + 257 * 74,
        "pit": 4 * 512 * (768 + 512 + 2) + 513 * 2,
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: UtteranceLinear(4, {}),
        lambda: UtteranceLinear(4, {"speaker": ()}),
        lambda: XVector(4, 1),
        lambda: FrameCtc(4, ("<pad>",)),
        lambda: FrameCtc(4, ("<pad>", "A", "A")),
        lambda: BlstmCtc(4, ("<pad>", "A"), drop=("<eos>",)),
    ],
)
def test_classes_that_cannot_be_are_errors(make: Callable[[], Head]) -> None:
    with pytest.raises(RequestError):
        make()
