"""What a device model has to tell Dom0: sent at once, or kept in order while the link is full, and sent when there is room again.

Dom0 may be busy for a while (it waits for others, with bounds); what it would miss it would never learn: that a disk is free, what a
guest wrote last. What is kept is bounded: Dom0's own requests, of which it has one at a time under way, and a mebibyte of a serial line,
beyond which the line's output is lost as on a line without flow control.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Final

from bus.messages.envelope import Message, encode
from bus.messages.model import ModelOutput
from bus.packets import LinkFull, PacketLink, close_all
from domains.native.reactor import Reactor

MAX_OUTPUT: Final = 1 << 20
"""Bytes of serial output that are kept."""
MAX_KEPT: Final = 64
"""Other messages that are kept; the drives that a guest can unplug and Dom0's requests are fewer."""


class Outbox:
    """See the module. LinkClosed comes out of whatever sends, as it does where Dom0's messages are taken."""

    def __init__(self, link: PacketLink, reactor: Reactor) -> None:
        """The link stays the caller's."""
        self._link: Final = link
        self._reactor: Final = reactor
        self._kept: Final[deque[tuple[bytes, list[int], int]]] = deque()
        """Encoded messages with copies of their descriptors, which are this one's, and how many bytes of output they hold."""
        self._output = self._others = 0
        self.lost = 0
        """Bytes of serial output that found no room."""

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send a message, or keep it for later; the descriptors stay the caller's. False: too much is kept already, and it is lost."""
        raw = encode(message)
        output = len(message.data) if isinstance(message, ModelOutput) else 0
        if not self._kept:
            try:
                self._link.send_raw(raw, descriptors)
                return True
            except LinkFull:
                self._reactor.writer(self._link.fileno(), self._room)
        if output and self._output + output > MAX_OUTPUT:
            self.lost += output
            return False
        if not output and self._others >= MAX_KEPT:
            return False
        self._output += output
        self._others += not output
        self._kept.append((raw, [os.dup(fd) for fd in descriptors], output))
        return True

    def _room(self) -> None:
        """The link takes something again."""
        while self._kept:
            raw, descriptors, output = self._kept[0]
            try:
                self._link.send_raw(raw, descriptors)
            except LinkFull:
                return
            self._kept.popleft()
            close_all(descriptors)
            self._output -= output
            self._others -= not output
        self._reactor.writer(self._link.fileno(), None)
