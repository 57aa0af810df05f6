"""What a person sees while it runs: one bar a stage on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Stage:
    """The progress of one stage, with its rate and the time left.

    >>> with Stage("extract", 2.0, "s of audio") as stage:
    ...     stage.advance(2.0)
    """

    def __init__(self, name: str, total: float, unit: str) -> None:
        """`total` is in `unit`."""
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.note = ""  # said at the end, e.g. which part took longest
        self._bar: Any = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        """Starts the bar, on a terminal."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=round(self.total),
                desc=self.name,
                unit=f" {self.unit}",
                unit_scale=False,
                file=sys.stderr,
                leave=False,
            )
        self._started = self._said = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the bar and, when the stage took a while or ended well, says how long it took."""
        if self._bar is not None:
            self._bar.close()
        if kind is None and self.done:
            note = f", {self.note}" if self.note else ""
            say(f"{self.name}: {self.done:.0f} {self.unit} in {time.monotonic() - self._started:.1f} s{note}")

    def advance(self, amount: float) -> None:
        """More of the stage is done."""
        before, self.done = self.done, self.done + amount
        if self._bar is not None:
            self._bar.update(round(self.done) - round(before))
            return
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate if rate else float("inf")
            say(f"{self.name}: {self.done:.0f} of {self.total:.0f} {self.unit}, {rate:.1f} a second, {left:.0f} s left")
