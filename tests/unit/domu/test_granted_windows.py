"""Windows of granted frames in a domain's process: as long as they are used, with the rights that are needed, and not longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bus import sealed
from bus.addresses import PAGE_SIZE
from domains.domu.granted import GrantedWindows


def order(number: int, *, writable: bool) -> dict[str, object]:
    """The body of a `grant_attach` order of one frame: handle, mfn, window, index, writable, address, flags, granter."""
    return {"items": [(1, 0x1000, number, 0, writable, 0, 0, 2)], "windows": [number]}


def mapped(name: str) -> int:
    """Mappings of that memfd in this process."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"memfd:{name} ")


def test_a_window_closes_with_its_last_mapping() -> None:
    name = "test-granted-last"
    fd = sealed.create(name, PAGE_SIZE)
    windows = GrantedWindows()
    windows.take(order(7, writable=True), [os.dup(fd)])
    window = windows.use(7)
    assert windows.use(7) is window
    assert windows.leave(7)
    assert mapped(name) == 1
    assert windows.leave(7)
    assert mapped(name) == 0
    assert not windows.leave(7)
    assert windows.use(7) is None
    os.close(fd)


def test_a_read_only_window_that_becomes_writable_is_closed_too() -> None:
    """The first mapping still points into the first window: both are there until the last mapping goes."""
    name = "test-granted-both"
    fd = sealed.create(name, PAGE_SIZE)
    windows = GrantedWindows()
    windows.take(order(7, writable=False), [sealed.read_only(fd)])
    first = windows.use(7)
    assert first is not None
    assert not first.writable
    windows.take(order(7, writable=True), [os.dup(fd)])
    second = windows.use(7)
    assert second is not None
    assert second.writable
    windows.take(order(7, writable=False), [sealed.read_only(fd)])  # rights that suffice are there
    assert windows.use(7) is second
    assert mapped(name) == 2
    assert bytes(first.page(0)) == bytes(PAGE_SIZE)
    for _ in range(3):
        assert mapped(name) == 2
        assert windows.leave(7)
    assert mapped(name) == 0
    os.close(fd)


def test_windows_and_descriptors_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        GrantedWindows().take(order(7, writable=True), [])
