"""What a pre-training run says while it goes: a CSV, TensorBoard where it is installed, and lines for people."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from superb_probe.upstreams.pretrain_train import Update

COLUMNS = (
    "iteration",
    "step",
    "loss",
    "accuracy",
    "feature_power",
    "gradient_norm",
    "learning_rate",
    "skipped",
    "seconds",
    "audio_hours",
    "audio_s_per_s",
    "frames_per_s",
    "held_out_loss",
    "held_out_accuracy",
    "unit_purity",
)
FRAMES_PER_S = 50


class Window:
    """Means over the updates since the last line, as plain numbers that a checkpoint can hold.

    >>> window = Window()
    >>> window.add(Update(2.0, 0.5, 0.1, 3.0, False, 10.0), 0.5)
    >>> window.means()["loss"], window.means()["audio_s_per_s"]
    (2.0, 20.0)
    """

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        """Empty, or with the sums of a checkpoint."""
        self.sums = dict(sums or {})

    def add(self, update: Update, seconds: float) -> None:
        """One more update; numbers of a skipped one are left out of the means, its time is not."""
        said = {"seconds": seconds, "audio_s": update.audio_s}
        if not update.skipped:
            said |= {"loss": update.entropy, "accuracy": update.accuracy, "feature_power": update.power}
            said |= {"gradient_norm": update.gradient_norm, "count": 1.0}
        for name, value in said.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means over the window; not a number where nothing was added."""
        count = self.sums.get("count", 0.0)
        names = ("loss", "accuracy", "feature_power", "gradient_norm")
        found = {name: self.sums[name] / count if count else math.nan for name in names}
        seconds = self.sums.get("seconds", 0.0)
        found["audio_s_per_s"] = self.sums.get("audio_s", 0.0) / seconds if seconds else math.nan
        return {**found, "frames_per_s": FRAMES_PER_S * found["audio_s_per_s"]}


class Log:
    """The lines of a run: `log.csv` in its folder, events for TensorBoard beside it, and stderr."""

    def __init__(self, folder: Path, iteration: int, step: int, *, quiet: bool = False) -> None:
        """Go on after a step: lines of later ones, which a run that was stopped had written, are dropped.

        Args:
            folder: of the run.
            iteration: now.
            step: updates of it that are done.
            quiet: write the CSV only.
        """
        self.path, self.iteration, self.quiet = folder / "log.csv", iteration, quiet
        kept = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                kept = [
                    row
                    for row in csv.DictReader(file)
                    if (int(row["iteration"]), int(row["step"])) <= (iteration, step)
                ]
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self._events: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / f"tensorboard/iteration-{iteration}"), purge_step=step + 1)

    def line(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Write one line of numbers after update `step`."""
        row = {name: f"{value:.6g}" for name, value in values.items() if not math.isnan(value)}
        row |= {"iteration": str(self.iteration), "step": str(step)}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="").writerow(row)
        if self._events is not None:
            for name, value in values.items():
                if not math.isnan(value):
                    self._events.add_scalar(name, value, step)
        if not self.quiet:
            self.say(_words(self.iteration, step, steps, values))

    def say(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the events file."""
        if self._events is not None:
            self._events.close()


def _words(iteration: int, step: int, steps: int, values: Mapping[str, float]) -> str:
    text = f"iteration {iteration}, update {step} of {steps}: loss {values.get('loss', math.nan):.3f}, "
    text += (
        f"accuracy {100 * values.get('accuracy', math.nan):.1f} %, gradient {values.get('gradient_norm', math.nan):.2f}"
    )
    if not math.isnan(values.get("audio_s_per_s", math.nan)):
        text += f", {values['audio_s_per_s']:.0f} s of audio a second, {values['seconds'] / step * (steps - step):.0f} s left"
    if "held_out_accuracy" in values:
        text += f"; held out: loss {values['held_out_loss']:.3f}, accuracy {100 * values['held_out_accuracy']:.1f} %"
    if "unit_purity" in values:
        text += f", purity {values['unit_purity']:.3f}"
    return text + (f"; {values['skipped']:.0f} skipped" if values.get("skipped") else "")
