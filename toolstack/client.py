"""The command's end of the control link: ask Dom0's toolstack, take its notices."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bus.messages.control import FROM_TOOLSTACK, Notice, Request, Response
from bus.packets import LinkClosed, PacketLink, close_all
from toolstack.errors import MachineError, MachineGone

__all__ = ["ControlClient", "MachineError", "MachineGone"]
REQUEST_TIMEOUT_S = 60.0


class ControlClient:
    """One connection to a running machine."""

    def __init__(self, path: Path, timeout: float = 5.0) -> None:
        """Connects. MachineError if no machine runs there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise MachineError(
                f"{path}: the machine belongs to another user: run the command as that user"
            ) from None
        except OSError:
            self._socket.close()
            raise MachineError(f"no machine runs at {path.parent}: start one with `domicile up`") from None
        self._link = PacketLink(self._socket, FROM_TOOLSTACK)
        self._ids = itertools.count(1)
        self.notices: deque[Notice] = deque()
        self._files: list[int] = []

    def fileno(self) -> int:
        """For poll."""
        return self._link.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def request(
        self,
        verb: str,
        args: dict[str, Any] | None = None,
        descriptors: Sequence[int] = (),
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> Any:
        """The result of a verb. MachineError with the toolstack's own words if it failed; MachineGone."""
        result, files = self.request_files(verb, args, descriptors, timeout)
        close_all(files)
        return result

    def request_files(
        self,
        verb: str,
        args: dict[str, Any] | None = None,
        descriptors: Sequence[int] = (),
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> tuple[Any, list[int]]:
        """The same, with the descriptors that came with the result: the caller's from now on."""
        number = next(self._ids)
        try:
            self._link.send(Request(id=number, verb=verb, args=args or {}), descriptors)
        except LinkClosed:
            raise MachineGone("the machine went down") from None
        deadline = time.monotonic() + timeout
        while True:
            message = self._next(deadline - time.monotonic(), keep=True)
            if message is None:
                raise MachineError(f"{verb}: no answer within {timeout:.0f} s")
            if isinstance(message, Notice):
                self.notices.append(message)
            elif message.id in (number, 0):
                if not message.ok:
                    raise MachineError(message.error)
                files, self._files = self._files, []
                return message.result, files

    def _next(self, timeout: float, *, keep: bool = False) -> Notice | Response | None:
        """The next message; the descriptors of a response are kept in `_files` if asked for."""
        poller = select.poll()
        poller.register(self._link.fileno(), select.POLLIN)
        deadline = time.monotonic() + timeout
        while True:
            try:
                packet = self._link.receive()
            except LinkClosed:
                raise MachineGone("the machine went down") from None
            if packet is not None:
                message, fds = packet
                assert isinstance(message, Notice | Response)
                if keep and isinstance(message, Response):
                    close_all(self._files)
                    self._files = fds
                else:
                    close_all(fds)
                return message
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            poller.poll(left * 1000)

    def notice(self, timeout: float) -> Notice | None:
        """The next notice, or None if none comes in time. MachineGone."""
        if self.notices:
            return self.notices.popleft()
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 or timeout == 0:
            message = self._next(max(0.0, left))
            if isinstance(message, Notice):
                return message
            if message is None:
                return None
        return None
