"""What s3prl's padded batches do to scores, on the embedded corpus: the table of docs/corpora.md.

Usage: OMP_NUM_THREADS=1 python tools/padding_effects.py --task asv pr ic asr

Three runs with the same seeds: states of each utterance alone in this project's batches (the default), the same states in batches
composed as s3prl composes them, and the states of those batches padded (`--padding s3prl`). A difference is paired: the same test
items, the seeds' outcomes averaged, with the 95 % interval over test speakers. The difference of the last two is the padding's own.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from superb_probe import run
from superb_probe.downstreams.asv import INFO as ASV
from superb_probe.downstreams.asv import SpeakerVerification
from superb_probe.downstreams.base import Task
from superb_probe.downstreams.ic import INFO, IntentClassification
from superb_probe.downstreams.load import load_task
from superb_probe.results.compare import compare_items, load_items
from superb_probe.results.record import RunRecord
from superb_probe.upstreams.base import LayerStates, Upstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.padding import PaddedUpstream

STEPS = {"asv": 60, "pr": 100, "ic": 150, "asr": 200}
RATES = {"asv": 1e-3, "pr": 1e-2, "ic": 1e-2, "asr": 1e-2}
# after so few updates the recurrent head of asr says nothing but blanks, whatever the states; and characters tell more than words
HEADS = {"asr": "linear"}
CHARACTERS = {"edits": "character_edits", "words": "characters"}


class Alone(PaddedUpstream):
    """An encoder that is run on s3prl's batches and does not hear their padding."""

    def frames_in_batch(self, num_samples: Sequence[int]) -> list[int]:
        """Those of each utterance alone."""
        return [self.num_frames(count) for count in num_samples]

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The states of each utterance alone."""
        states: LayerStates = self.encoder(wavs, num_samples)
        return states


class SmallBatches(IntentClassification):
    """IC with s3prl's batches of 32; this project's small budget has 256."""

    info = replace(INFO, budgets={name: replace(budget, batch=32) for name, budget in INFO.budgets.items()})


class LongCrops(SpeakerVerification):
    """ASV with SUPERB's crops of 8 s; the small budget's are 2 s, as long as the shortest utterance, and so never padded."""

    info = replace(ASV, budgets={name: replace(budget, max_crop_s=8.0) for name, budget in ASV.budgets.items()})


def ic() -> Task:
    """The task, for `run`."""
    return SmallBatches()


def asv() -> Task:
    """The task, for `run`."""
    return LongCrops()


def outcome(
    upstream: Upstream, task: str, padding: str, steps: int, args: argparse.Namespace
) -> tuple[list[RunRecord], Any]:
    """The records of every seed and the outcome of every test item."""
    name = f"{Path(__file__).resolve()}:{task}" if task in ("asv", "ic") else task
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        shared: dict[str, Any] = {
            "lr": [RATES[task]],
            "seed": args.seed,
            "steps": steps,
            "device": "cpu",
            "budget": "small",
            "head": HEADS.get(task),
        }
        records = run(upstream, name, padding=padding, feature_dtype="float32", out=Path(folder), **shared)
        items = load_items(records, [Path(folder)])
    if task == "asr":
        items = [each | {name: each[column] for name, column in CHARACTERS.items()} for each in items]
    return records, items


def mean_score(records: Sequence[RunRecord], task: str) -> float:
    """The mean over seeds, of asr of its character error rate."""
    parts = [record.score for record in records if record.score is not None]
    return fmean(part.extra["cer"] if task == "asr" else part.value for part in parts)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--upstream", default="mamba_hubert")
    parser.add_argument("--size", default="test")
    parser.add_argument("--random", type=int, default=1)
    parser.add_argument("--steps", type=int, help="updates (default: by task)")
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    encoder = load_upstream(args.upstream, size=args.size, random=args.random)
    arms = {
        "alone": (encoder, "exact"),
        "alone, s3prl's batches": (Alone(encoder), "s3prl"),
        "padded, s3prl's batches": (encoder, "s3prl"),
    }
    print(
        "| task | updates | states | score | less the row above [95 %] |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for task in args.task:
        steps, before, asked = args.steps or STEPS[task], None, load_task(task)
        for arm, (upstream, padding) in arms.items():
            records, items = outcome(upstream, task, padding, steps, args)
            info, difference = asked.info, "-"
            if before is not None:
                found = compare_items(task, info.metric, info.higher_is_better, before, items, asked.value)
                low, high = found.ci95 or (math.nan, math.nan)
                spread = "every item equal" if math.isnan(low) else f"{low:+.2f}, {high:+.2f}"
                difference = f"{found.difference:+.2f} [{spread}]"
            before = items
            metric, mean = "cer" if task == "asr" else info.metric, mean_score(records, task)
            print(f"| {task} ({metric} %) | {steps} | {arm} | {mean:.2f} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
