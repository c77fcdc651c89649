"""Windows of other domains' granted frames, as long as a mapping uses them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bus.addresses import PAGE_SIZE
from domains.hostmem import Window


class _Users:
    __slots__ = ("count", "opened")

    def __init__(self) -> None:
        self.count = 0
        self.opened: list[Window] = []
        """Read-only first, then perhaps writable: mappings that were made with the first still point into it."""


class GrantedWindows:
    """Windows by the hypervisor's numbers, each with its count of mappings."""

    def __init__(self) -> None:
        self._windows: dict[int, _Users] = {}

    def take(self, body: Mapping[str, Any], fds: list[int]) -> None:
        """The descriptors of a `grant_attach` order, in the order of its `windows`: opened, or closed if the window is open with
        rights that suffice. ValueError if there are not as many descriptors as windows, or one is no sealed memfd."""
        rights: dict[int, bool] = {}
        for item in body["items"]:
            rights[item[2]] = rights.get(item[2], False) or bool(item[4])
        for number, fd in zip(body.get("windows", ()), fds, strict=True):
            known = self._windows.get(number)
            if known is not None and (known.opened[-1].writable or not rights[number]):
                os.close(fd)
                continue
            window = Window(fd, os.fstat(fd).st_size // PAGE_SIZE, rights[number])
            self._windows.setdefault(number, _Users()).opened.append(window)

    def use(self, number: int) -> Window | None:
        """One mapping more. None: no window has that number (the frame is of the domain's own extent)."""
        users = self._windows.get(number)
        if users is None:
            return None
        users.count += 1
        return users.opened[-1]

    def leave(self, number: int) -> bool:
        """One mapping less, which nothing reaches any more: the window closes after the last. False: no window has that number."""
        users = self._windows.get(number)
        if users is None:
            return False
        users.count -= 1
        if users.count <= 0:
            del self._windows[number]
            for window in users.opened:
                window.close()
        return True
