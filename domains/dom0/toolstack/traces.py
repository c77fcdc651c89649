"""The trace pages of the machine's processes as the control domain has them: to be handed to a command, and read for counters."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from bus.messages.device import Inspect
from bus.messages.domain import Order
from bus.trace_page import Counters, map_read_only
from domains.native.domain import HypercallError, NativeDomain
from drivers.block.watch import counter_disk
from drivers.net.watch import counter_vif

DEVICES: Final = 0x8000_0000
"""Peers from here on are no domains."""
BATCH: Final = 32
"""Pages of one answer."""
PAST: Final = 32
"""Pages of peers that are gone that are kept for who watches."""


@dataclass(slots=True)
class _Page:
    id: int
    fd: int
    role: str
    name: str
    counters: Counters


class Traces:
    """By peer: a domain's number, or from 0x80000000 on a device's (its PCI address), or 0xFFFFFFFF for the hypervisor."""

    def __init__(self, host: NativeDomain) -> None:
        """To be made before any message is taken: pages come from the first on."""
        self._host = host
        self._pages: dict[int, _Page] = {}
        self._past: deque[tuple[int, _Page]] = deque()
        """Of peers that are gone since somebody watches: who watches looks for new pages now and then, and a guest may live shorter."""
        self._watchers: set[int] = set()
        self._serial = 0
        host.on_order["trace_page"] = self._page
        host.on_order["trace_page_gone"] = self._gone

    def _page(self, order: Order, fds: list[int]) -> bytes:
        body = order.body
        self._drop(body["peer"])
        self._serial += 1
        self._pages[body["peer"]] = _Page(
            self._serial, fds[0], body["role"], body["name"], Counters(map_read_only(fds[0]))
        )
        return b""

    def _gone(self, order: Order, fds: list[int]) -> bytes:
        self._drop(order.body["peer"])
        return b""

    def _drop(self, peer: int) -> None:
        page = self._pages.pop(peer, None)
        if page is not None:
            self._past.append((peer, page))
            self._forget_past(PAST if self._watchers else 0)

    def _forget_past(self, most: int) -> None:
        while len(self._past) > most:
            os.close(self._past.popleft()[1].fd)

    def watch(self, watcher: int, on: bool) -> None:
        """A client begins to watch, or ends. All processes note what they do while anybody watches. HypercallError."""
        before = bool(self._watchers)
        (self._watchers.add if on else self._watchers.discard)(watcher)
        if not self._watchers:
            self._forget_past(0)
        if bool(self._watchers) != before:
            link = self._host.link
            token = link.next_token()
            rc, _ = link.exchange(Inspect(token=token, what="trace", args={"on": not before}), token)
            if rc < 0:
                raise HypercallError(-rc, "trace")

    @property
    def watched(self) -> bool:
        """Somebody watches."""
        return bool(self._watchers)

    def fresh(self, known: Iterable[int]) -> tuple[list[dict[str, Any]], list[int]]:
        """Pages whose numbers the asker does not know, at most BATCH, and their descriptors (the caller's)."""
        have = set(known)
        pages = [(peer, page) for peer, page in (*self._past, *self._pages.items()) if page.id not in have][
            :BATCH
        ]
        rows = [{"id": page.id, "peer": peer, "role": page.role, "name": page.name} for peer, page in pages]
        return rows, [os.dup(page.fd) for _, page in pages]

    def domains(self) -> list[int]:
        """Those that have a page."""
        return [peer for peer in self._pages if peer < DEVICES]

    def disks(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """What back ends say that they did: counters (drivers.block.watch) by (frontend's domain, disk's number)."""
        return self._counted("domio", counter_disk)

    def nets(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """The same of network interfaces (drivers.net.watch)."""
        return self._counted("netio", counter_vif)

    def _counted(
        self, role: str, whose: Callable[[int], tuple[int, int] | None]
    ) -> dict[tuple[int, int], tuple[int, ...]]:
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for page in self._pages.values():
            if page.role == role:
                for key, values in page.counters.read().items():
                    device = whose(key)
                    if device is not None:
                        found[device] = tuple(values)
        return found
