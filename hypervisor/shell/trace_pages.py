"""The trace pages of a machine's processes: made with the first process of a domain or device, kept until that is gone.

The control domain gets a read-only descriptor of each, and says when somebody watches. The hypervisor itself writes one too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from bus.addresses import DomId
from bus.sealed import read_only
from bus.trace import Trace
from bus.trace_page import Page

HYPERVISOR: Final = DomId(0xFFFF_FFFF)
"""The number under which the hypervisor's own page is told."""
MAX_PAGES: Final = 1024
Tell = Callable[[str, dict[str, object], list[int]], None]
"""Gives the control domain an order: (what, body, descriptors, which stay the caller's)."""


class TracePages:
    """By peer: a domain's number, or a device's (hypervisor.shell.devices.peer_id)."""

    def __init__(self) -> None:
        self._pages: dict[DomId, Page] = {}
        self._roles: dict[DomId, tuple[str, str]] = {}
        self._on = False
        self._tell: Tell | None = None
        self.own: Final = Trace(self._make(HYPERVISOR, "hypervisor", "hypervisor").memory, time.monotonic_ns)
        """What the hypervisor notes."""

    def _make(self, peer: DomId, role: str, name: str) -> Page:
        page = self._pages[peer] = Page(f"{peer:x}")
        self._roles[peer] = (role, name)
        page.switch(self._on)
        return page

    def page(self, peer: DomId, role: str, name: str) -> int | None:
        """The descriptor for a new process of that peer; it stays this object's. None: there are too many."""
        known = self._pages.get(peer)
        if known is None:
            if len(self._pages) >= MAX_PAGES:
                return None
            known = self._make(peer, role, name)
            self._told(peer)
        return known.fd

    def connect(self, tell: Tell) -> None:
        """There is a control domain: it is told of all pages, from now on."""
        self._tell = tell
        for peer in self._pages:
            self._told(peer)

    def _told(self, peer: DomId) -> None:
        if self._tell is None:
            return
        role, name = self._roles[peer]
        fd = read_only(self._pages[peer].fd)
        try:
            self._tell("trace_page", {"peer": int(peer), "role": role, "name": name}, [fd])
        finally:
            os.close(fd)

    def switch(self, on: bool) -> None:
        """Somebody watches, or nobody does."""
        self._on = on
        for page in self._pages.values():
            page.switch(on)

    def sweep(self, alive: Callable[[DomId], bool]) -> None:
        """Drop the pages of those that are gone for good."""
        for peer in [peer for peer in self._pages if peer != HYPERVISOR and not alive(peer)]:
            self._pages.pop(peer).close()
            del self._roles[peer]
            if self._tell is not None:
                self._tell("trace_page_gone", {"peer": int(peer)}, [])

    def close(self) -> None:
        """Give all back."""
        self.own.close()
        for page in self._pages.values():
            page.close()
        self._pages.clear()
