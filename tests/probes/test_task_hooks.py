"""What a fit asks of tasks whose targets have frames, whose dev split tunes something, or whose update another number chooses."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any


def hooked(toy: SimpleNamespace, selects: str | None = None) -> Any:
    """A toy task that notes what it is bound to and tuned by."""

    class Hooked(toy.Task):  # type: ignore[misc, name-defined]
        grid: Any = None
        tuned: Any = None

        def bind(self, fold: Any, grid: Any) -> Any:
            bound = copy.copy(self)
            bound.grid = grid
            return bound

        def tuned_by(self, score: Any) -> Any:
            tuned = copy.copy(self)
            tuned.tuned = score.value
            return tuned

        def target(self, utterance: Any, labels: Any) -> Any:
            assert self.grid.num_frames[utterance.id] > 0 and self.grid.hop_samples == toy.HOP
            return super().target(utterance, labels)

        def score(self, predictions: Any, fold: Any, split: Any) -> Any:
            score = super().score(predictions, fold, split)
            extra = {"tuned": -1.0 if self.tuned is None else self.tuned}
            return replace(score, extra=extra, selects=-score.value if selects == "worst" else None)

    return Hooked()


def test_targets_and_scores_come_from_the_bound_task_tuned_at_the_kept_update(toy: SimpleNamespace, world: Any) -> None:
    (result,) = world([toy.trial()], task=hooked(toy))
    assert result.score is not None and result.selected == max(value for _, value in result.curve)
    assert result.score.extra["tuned"] == result.selected, (
        "the value on dev of the update that is scored, not of the last"
    )


def test_another_number_may_choose_the_update(toy: SimpleNamespace, world: Any) -> None:
    (best,) = world([toy.trial()], task=hooked(toy))
    (worst,) = world([toy.trial()], task=hooked(toy, "worst"))
    assert worst.selected == -min(value for _, value in best.curve)
    assert [value for _, value in worst.curve] == [-value for _, value in best.curve]
    assert worst.step != best.step
