"""RTTM, labels on a grid, the scored error rate against a slow count, and the head that takes labels of another length."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Batch
from superb_probe.errors import RequestError
from superb_probe.probes.batches import collate
from superb_probe.probes.diarization import (
    Diarizer,
    Turn,
    decide,
    diarization_errors,
    frame_accuracy,
    frame_labels,
    read_rttm,
    rttm_lines,
    turns_of,
)
from superb_probe.probes.heads import LstmPit


def test_rttm_is_read_as_it_is_written(tmp_path: Path) -> None:
    turns = [Turn(0.5, 1.25, "ann"), Turn(1.0, 3.0, "bob")]
    text = ";; comment\n" + rttm_lines("a", turns[::-1]) + "SPKR-INFO a 1 <NA> <NA> <NA> adult ann <NA>\n"
    (tmp_path / "x.rttm").write_text(text + "SPEAKER b 1 0.00 0.00 <NA> <NA> cem <NA> <NA>\n")
    assert read_rttm(tmp_path / "x.rttm") == {"a": turns, "b": []}
    (tmp_path / "short.rttm").write_text(
        "SPEAKER a 1 0.0 1.0 <NA> <NA> ann <NA>\n"
    )  # dscore's files leave out the last field
    assert read_rttm(tmp_path / "short.rttm") == {"a": [Turn(0.0, 1.0, "ann")]}


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    lines = ["SPEAKER a 1 0.0 1.0", "SPEAKER a 1 x 1.0 <NA> <NA> ann <NA>", "SPEAKER a 1 1 -1 <NA> <NA> ann", "talk a"]
    (tmp_path / "x.rttm").write_text("\n".join(lines))
    with pytest.raises(RequestError) as caught:
        read_rttm(tmp_path / "x.rttm")
    told = str(caught.value)
    assert "4 problems" in told and "line 1: 5 fields" in told and "line 2: start 'x'" in told
    assert "line 3: start 1 and length -1" in told and "line 4: type 'talk'" in told
    with pytest.raises(RequestError, match="No such file"):
        read_rttm(tmp_path / "none.rttm")


def test_labels_round_to_the_nearest_frame() -> None:
    turns = [Turn(0.009, 0.05, "a"), Turn(0.3, 9.0, "b")]  # 0.45 and 2.5 (to even) frames; 15 and past the end
    labels = frame_labels(turns, ["a", "b"], 20, 0.02)
    assert labels[:, 0].nonzero()[0].tolist() == [0, 1] and labels[:, 1].nonzero()[0].tolist() == list(range(15, 20))
    floors = [int(time_s // 0.02) for time_s in (0.3, 0.05)]
    assert floors == [14, 2], "rounding down would begin a frame early"
    finer = frame_labels(turns, ["a", "b"], 40, 0.01)
    assert finer[:, 0].nonzero()[0].tolist() == [1, 2, 3, 4], "labels follow the grid they are asked on"


def slow_errors(reference: list[Turn], said: list[Turn], step_s: float = 0.01) -> tuple[float, float, float, float]:
    """Counted on a fine grid, every assignment of speakers tried."""
    names, found = sorted({t.speaker for t in reference}), sorted({t.speaker for t in said})
    width = max(len(names), len(found))
    columns = [*found, *[None] * (width - len(found))]
    best = None
    for order in permutations(columns):
        miss = false = wrong = speech = 0
        for step in range(1000):
            now = (step + 0.5) * step_s
            true = {t.speaker for t in reference if t.start_s <= now < t.stop_s}
            heard = {t.speaker for t in said if t.start_s <= now < t.stop_s}
            right = sum(name in true and order[k] in heard for k, name in enumerate(names) if k < width)
            miss += max(0, len(true) - len(heard))
            false += max(0, len(heard) - len(true))
            wrong += min(len(true), len(heard)) - right
            speech += len(true)
        if best is None or wrong < best[2]:
            best = (miss, false, wrong, speech)
    assert best is not None
    return tuple(count * step_s for count in best)  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(6))
def test_errors_equal_a_slow_count(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def draw(speakers: str, count: int) -> list[Turn]:
        made = []
        for _ in range(count):
            start = round(float(generator.uniform(0, 8)), 2)
            made.append(
                Turn(start, start + round(float(generator.uniform(0.1, 2)), 2), str(generator.choice(list(speakers))))
            )
        return made

    reference, said = draw("abc"[: 1 + seed % 3], 6), draw("123"[: 1 + seed % 2], 6)
    errors = diarization_errors(reference, said)
    assert errors == pytest.approx(slow_errors(reference, said), abs=1e-6)


def test_errors_by_hand() -> None:
    reference = [Turn(0, 4, "a"), Turn(2, 6, "b")]
    assert diarization_errors(reference, [Turn(0, 4, "2"), Turn(2, 6, "1")]) == (0, 0, 0, 8)  # names do not matter
    assert diarization_errors(reference, []) == (8, 0, 0, 8)  # overlap counts twice
    assert diarization_errors([], [Turn(1, 2, "1")]) == (0, 1, 0, 0)
    assert diarization_errors(reference, [Turn(0, 6, "1")]) == (2, 0, 2, 8)
    # no collar: a quarter of a second too late at each end counts in full
    assert diarization_errors([Turn(0, 2, "a")], [Turn(0.25, 2.25, "1")]) == (0.25, 0.25, 0, 2)
    assert diarization_errors([Turn(0, 2, "a"), Turn(1, 3, "a")], [Turn(0, 3, "1")]) == (0, 0, 0, 3)  # one speaker once
    assert diarization_errors([], []) == (0, 0, 0, 0)


def test_decisions_are_thresholds_on_probabilities_and_a_median() -> None:
    logits = np.log(
        np.array([[0.35, 0.65], [0.55, 0.2], [0.65, 0.71]]) / (1 - np.array([[0.35, 0.65], [0.55, 0.2], [0.65, 0.71]]))
    )
    assert decide(logits, 0.3, 1).astype(int).tolist() == [[1, 1], [1, 0], [1, 1]]
    assert decide(logits, 0.7, 1).astype(int).tolist() == [[0, 0], [0, 0], [0, 1]]
    blips = np.full((40, 1), -5.0)
    blips[3:8], blips[20:26] = 5.0, 5.0  # five frames go, six stay under a median of eleven
    assert decide(blips, 0.5, 11)[:, 0].nonzero()[0].tolist() == list(range(20, 26))
    assert decide(blips, 0.5, 1).sum() == 11
    edge = np.full((12, 1), 5.0)
    assert decide(edge, 0.5, 11)[:, 0].all(), "at the ends the window holds six of its eleven frames"


def test_turns_cover_what_is_active() -> None:
    active = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], dtype=bool)
    turns = turns_of(active, 0.02, 40.0)
    assert turns == [Turn(40.0, 40.04, "1"), Turn(40.06, 40.08, "1"), Turn(40.02, 40.06, "2")]


def test_frame_accuracy_takes_the_order_with_the_least_entropy() -> None:
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=float)
    assert frame_accuracy((20 * labels - 10)[:, ::-1], labels) == 1
    logits = np.array([[0.1, -0.1], [0.1, -0.1], [-9.0, 9.0], [0.1, -0.1]])
    # entropy prefers the order the third frame asks for, although most frames ask for the other
    by_entropy = ((logits > 0) == (labels[:, ::-1] > 0)).mean()
    assert frame_accuracy(logits, labels) in (by_entropy, ((logits > 0) == (labels > 0)).mean())
    scores = {order: -(logits * labels[:, list(order)]).sum() for order in ((0, 1), (1, 0))}
    best = min(scores, key=lambda order: scores[order])
    assert frame_accuracy(logits, labels) == ((logits > 0) == (labels[:, list(best)] > 0)).mean()


def batch_of(lengths: list[int], labels: list[torch.Tensor]) -> Batch:
    return collate(
        [str(n) for n in range(len(lengths))], torch.tensor(lengths), [{"speakers": each} for each in labels]
    )


def test_the_head_is_lstm_pit_where_labels_fit() -> None:
    torch.manual_seed(0)
    plain, ours = LstmPit(6, width=5), Diarizer(6, width=5)
    ours.load_state_dict(plain.state_dict())
    frames, num_frames = torch.randn(3, 9, 6), torch.tensor([9, 4, 7])
    labels = [torch.randint(2, (n, 2)).float() for n in (9, 4, 7)]
    batch = batch_of([9, 4, 7], labels)
    losses = [float(head.loss(head(frames, num_frames), batch).detach()) for head in (plain, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


def test_the_last_frame_is_repeated_for_labels_that_are_longer() -> None:
    torch.manual_seed(0)
    head = Diarizer(6, width=5, repeat_last=True)
    frames, num_frames = torch.randn(2, 9, 6), torch.tensor([9, 4])
    frames[1, 4:] = 0
    labels = [torch.randint(2, (n, 2)).float() for n in (10, 6)]
    got = head.loss(head(frames, num_frames), batch_of([9, 4], labels))
    by_hand = []
    for row, length in enumerate((9, 4)):
        wanted = labels[row].shape[0]
        extended = torch.cat([frames[row, :length], frames[row, length - 1 : length].expand(wanted - length, -1)])[None]
        logits = head.linear(head.rnn(extended)[0])[0]
        entropies = [
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[row][:, list(order)], reduction="none")
            .mean(1)
            .sum()
            for order in ((0, 1), (1, 0))
        ]
        by_hand.append(min(entropies))
    assert got.item() == pytest.approx(sum(each.item() for each in by_hand) / 16, abs=1e-6)
    without = Diarizer(6, width=5)
    without.load_state_dict(head.state_dict())
    assert float(without.loss(without(frames, num_frames), batch_of([9, 4], labels))) != pytest.approx(
        float(got), abs=1e-4
    )
    predicted = head.predict(head(frames, num_frames))
    assert [len(row) for row in predicted] == [13, 8] and np.isfinite(predicted[1]).all()


def test_labels_of_another_length_are_cut_to_what_both_have() -> None:
    torch.manual_seed(0)
    head = Diarizer(6, width=5)
    frames, num_frames = torch.randn(2, 9, 6), torch.tensor([9, 4])
    labels = [torch.randint(2, (n, 2)).float() for n in (3, 9)]
    got = head.loss(head(frames, num_frames), batch_of([9, 4], labels))
    cut = LstmPit(6, width=5)
    cut.load_state_dict(head.state_dict())
    fitting = cut.loss(cut(frames[:, :4], torch.tensor([3, 4])), batch_of([3, 4], [labels[0], labels[1][:4]]))
    assert float(got) == pytest.approx(float(fitting), abs=1e-6)
