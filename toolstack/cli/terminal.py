"""The user's terminal and standard output while a guest's console has them."""

from __future__ import annotations

import contextlib
import os
import select
import termios
import time
from types import TracebackType
from typing import Final, Self

ESCAPE: Final = 0x1D
"""^], as xl console has it."""
INTERRUPT: Final = 0x03
INTERRUPTS: Final = 3
INTERRUPT_WITHIN_S: Final = 1.0
WRITE_S: Final = 60.0
"""How long a reader of standard output may take nothing."""


class RawTerminal:
    """Standard input as a guest wants it: every key as it is typed, ^C too. Restored on exit, whatever happens.

    Output processing stays on, so that a guest's bare newline still starts at the left edge.
    """

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None
        self.active = os.isatty(fd)

    def __enter__(self) -> Self:
        if self.active:
            self._saved = termios.tcgetattr(self._fd)
            raw = termios.tcgetattr(self._fd)
            raw[0] &= ~(
                termios.BRKINT
                | termios.ICRNL
                | termios.IGNBRK
                | termios.IGNCR
                | termios.INLCR
                | termios.INPCK
                | termios.ISTRIP
                | termios.IXON
                | termios.PARMRK
            )
            raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
            raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)
            except termios.error:  # a background process may not: the guest then has no keyboard
                self.active = False
                self._saved = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None

    def read(self) -> bytes:
        """Keys typed; empty at the end of input."""
        try:
            return os.read(self._fd, 4096)
        except OSError:
            return b""


class EscapeKeys:
    """Tells when the user wants out: ^], or ^C three times within a second. No clock of its own."""

    def __init__(self) -> None:
        self._interrupts: list[float] = []

    def feed(self, data: bytes, now: float) -> tuple[bytes, bool]:
        """What the guest gets of these keys, and whether the user wants out."""
        for index, byte in enumerate(data):
            if byte == ESCAPE:
                return data[:index], True
            if byte == INTERRUPT:
                self._interrupts = [t for t in self._interrupts if now - t < INTERRUPT_WITHIN_S] + [now]
                if len(self._interrupts) >= INTERRUPTS:
                    return data[:index], True
            else:
                self._interrupts.clear()
        return data, False


def write_all(data: bytes, fd: int = 1, timeout: float = WRITE_S) -> None:
    """Write every byte, unbuffered, within `timeout` seconds. BrokenPipeError if nobody reads; TimeoutError if the reader is stuck.

    Standard output may be blocking, and is shared with other processes, so it is not made non-blocking: a pipe that polls as
    writable takes PIPE_BUF bytes at once (pipe(7)).
    """
    view = memoryview(data)
    deadline = time.monotonic() + timeout
    while view:
        _, ready, _ = select.select([], [fd], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"standard output took nothing more within {timeout:.0f} s")
        with contextlib.suppress(BlockingIOError):  # it may be non-blocking by somebody else's wish
            view = view[os.write(fd, view[: select.PIPE_BUF]) :]
