"""A progress bar for terminals, and sparse lines where there is none."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """``with Progress(total, "training") as bar: bar.update(step, "loss 0.1")``."""

    def __init__(self, total: int, label: str, *, width: int = 32, stream: TextIO | None = None):
        self.total, self.label, self.width = max(total, 1), label, width
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.start = time.perf_counter()
        self._last = -1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` are done."""
        # A terminal sees every percent, a log every tenth.
        mark = done * (100 if self.live else 10) // self.total
        if mark == self._last and done != self.total:
            return
        self._last = mark
        filled = done * self.width // self.total
        seconds = time.perf_counter() - self.start
        line = f"{self.label} {'█' * filled}{'·' * (self.width - filled)} {done}/{self.total} {seconds:5.1f} s  {note}"
        self.stream.write(f"\r\033[K{line}" if self.live else f"{line}\n")
        self.stream.flush()
