"""What the demo prints: a line a happening, and on a terminal a line that moves while one waits."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TextIO

_COLOURS = {"good": "32", "bad": "31;1", "dim": "2", "head": "1"}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]")
QUIET_S = 5.0
"""Where there is no terminal: how often a wait says that it goes on."""


class Show:
    """Lines with the time since the start."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        terminal = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.moves = terminal
        self._colour = terminal and not os.environ.get("NO_COLOR")
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def paint(self, text: str, how: str) -> str:
        """With colour, where there is one."""
        return f"\x1b[{_COLOURS[how]}m{text}\x1b[0m" if self._colour else text

    def line(self, text: str = "", how: str = "") -> None:
        """One line with the time before it."""
        print(
            f"[{self.elapsed():5.1f} s] {self.paint(text, how) if how else text}", file=self.out, flush=True
        )

    def plain(self, text: str = "") -> None:
        """A line as it is."""
        print(text, file=self.out, flush=True)

    def table(self, rows: Iterable[tuple[str, bool | None, float, str]]) -> None:
        """The summary: step, ok (None: left out), seconds, what was seen."""
        rows = list(rows)
        width = max(len(row[0]) for row in rows)
        for name, ok, seconds, detail in rows:
            word = self.paint("ok  ", "good") if ok else self.paint("FAIL", "bad") if ok is False else "--  "
            self.plain(f"  {word} {name:<{width}} {seconds:5.1f} s  {detail}")

    def waiting(self, text: str) -> Waiting:
        """Use as a context manager, and call `tick` now and then."""
        return Waiting(self, text)


class Waiting:
    """A wait that shows itself."""

    def __init__(self, show: Show, text: str) -> None:
        self._show = show
        self._text = text
        self._begin = self._told = time.monotonic()
        self._frame = 0

    def __enter__(self) -> Self:
        self.tick()
        return self

    def tick(self, more: str = "") -> None:
        """Still there."""
        now = time.monotonic()
        seconds = now - self._begin
        if self._show.moves:
            self._frame += 1
            sign = "|/-\\"[self._frame % 4]
            # A guest's words, without what would move the cursor.
            text = f"  {sign} {self._text} ({seconds:.0f} s) {CONTROL.sub('', more)}"[:99]
            print(f"\r\x1b[K{text}", end="", file=self._show.out, flush=True)
        elif now - self._told >= QUIET_S:
            self._told = now
            self._show.line(f"    ... {self._text}: {seconds:.0f} s")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._show.moves:
            print("\r\x1b[K", end="", file=self._show.out, flush=True)
