"""How far the embedding is: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_SECONDS = 30.0


class Progress:
    """A context to which what was done is told.

    Args:
        title: what is done.
        texts: how many there are.
        work: by which the time left is reckoned, in any unit; texts' bytes, since long texts take longer.
        shown: whether to show anything at all.
    """

    def __init__(self, title: str, texts: int, work: int, *, shown: bool) -> None:
        self._title, self._texts, self._work = title, texts, max(1, work)
        self._shown = shown
        self._bar: Bar | None = None
        self._done = self._tokens = self._worked = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            rates = TextColumn("{task.fields[rates]}")
            columns = TextColumn("{task.description}"), BarColumn(), rates, TimeRemainingColumn()
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.add_task(self._title, total=self._work, rates=self.rates())
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and self._done:
            self._line()

    def advance(self, texts: int, tokens: int, work: int) -> None:
        """So many texts, tokens, and units of work more are done."""
        self._done += texts
        self._tokens += tokens
        self._worked += work
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._worked, rates=self.rates())
        elif self._shown and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line()

    def rates(self) -> str:
        """Texts done, and texts and tokens a second."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        told = f"{self._done}/{self._texts} texts, {self._done / seconds:.0f} texts/s"
        return f"{told}, {self._tokens / seconds:.0f} tokens/s" if self._tokens else told

    def seconds_left(self) -> float:
        """By the work done so far; infinite before any."""
        spent = time.monotonic() - self._began
        return spent * (self._work - self._worked) / self._worked if self._worked else float("inf")

    def _line(self) -> None:
        left = "" if self._done >= self._texts else f", {self.seconds_left():.0f} s left"
        print(f"{self._title}: {self.rates()}{left}", file=sys.stderr, flush=True)
