"""What the process in a container says, line by line, for the container's log: bounded in length and rate, and kept at its end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_RECORD: Final = 16 << 10
"""Bytes of a line that is looked at (a record of bus.log is no longer)."""
MAX_LINE: Final = 500
"""Characters of a line that is said."""
MAX_LAST_READS: Final = 16
LINES_A_SECOND: Final = 100
BURST: Final = 400
_KEPT: Final = 3000


def readable(line: str) -> str:
    """The hypervisor's records (one JSON object a line) in words; any other line as it is."""
    if not line.startswith('{"time"'):
        return line
    try:
        record = json.loads(line)
        where = "" if "domain" not in record else f"{_name(int(record['domain']))}: "
        level = "" if record["level"] == "info" else f"{record['level']}: "
        return f"{level}{where}{record['event']}"
    except (ValueError, KeyError, TypeError):
        return line


def _name(number: int) -> str:
    return f"device {number & 0x7FFFFFFF:#x}" if number & 0x80000000 else f"domain {number}"


class Output:
    """The reading end of a pipe. `say` prints a line."""

    def __init__(self, fd: int, say: Callable[[str], None]) -> None:
        """Takes over `fd`."""
        os.set_blocking(fd, False)
        self.fd = fd
        self._say = say
        self._rest = b""
        self._tail: deque[str] = deque()
        self._kept = 0
        self._budget = float(BURST)
        self._at = time.monotonic()
        self._dropped = 0

    def fileno(self) -> int:
        """For poll."""
        return self.fd

    def pump(self) -> bool:
        """Take what is there, a bounded amount. False at the end of the pipe."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_RECORD or not data:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if line.strip():
                self._line(readable(line[:MAX_RECORD].decode("utf-8", "replace").rstrip())[:MAX_LINE])
        return bool(data)

    def _line(self, line: str) -> None:
        self._tail.append(line)
        self._kept += len(line) + 1
        while self._kept > _KEPT:
            self._kept -= len(self._tail.popleft()) + 1
        now = time.monotonic()
        self._budget = min(float(BURST), self._budget + (now - self._at) * LINES_A_SECOND)
        self._at = now
        if self._budget < 1:
            self._dropped += 1
            return
        self._budget -= 1
        if self._dropped:
            self._say(f"({self._dropped} lines left out)")
            self._dropped = 0
        self._say(line.replace("\x1b", "?"))

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._tail)

    def close(self) -> None:
        """Take what is left, and close."""
        for _ in range(MAX_LAST_READS):  # whoever still has the other end may go on writing
            if not self.pump() or not self._more():
                break
        with contextlib.suppress(OSError):
            os.close(self.fd)

    def _more(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])
