"""Structured logs: one JSON object a line on standard error, from every process of a machine; the warden keeps them in a file each.

Fields: `time` (seconds since 1970), `level`, `role` (of the process), `event` (what happened, in words), and what else was given.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

MAX_LINE: Final = 16 << 10
"""Bytes of a line; a longer one is cut, and is then no JSON any more but still one line."""


class Logger:
    """The log of a process, or of a part of it."""

    __slots__ = ("_bound",)

    def __init__(self, role: str, **fields: Any) -> None:
        self._bound = {"role": role, **fields}

    def bind(self, **fields: Any) -> Logger:
        """The same with more fields in each line."""
        bound = {**self._bound, **fields}
        return Logger(bound.pop("role"), **bound)

    def write(self, level: str, event: str, **fields: Any) -> None:
        """One line, at once: what a process said before it was killed is there. A log that cannot be written is lost in silence, for
        nothing may end for it."""
        record = {
            "time": round(time.time(), 6),
            "level": level,
            **self._bound,
            "event": event,
            **{name: value for name, value in fields.items() if value is not None},
        }
        try:
            sys.stderr.write(json.dumps(record, default=str)[:MAX_LINE] + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            return

    def info(self, event: str, **fields: Any) -> None:
        """Something that one wants to find later."""
        self.write("info", event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something was refused, or gave way."""
        self.write("warning", event, **fields)
