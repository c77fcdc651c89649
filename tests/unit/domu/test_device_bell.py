"""A doorbell page: what is stored is where the device looks for it, aligned or not."""

from __future__ import annotations

import socket

from bus import sealed
from domains.device_bell import DeviceBell


def test_a_store_that_is_not_aligned_is_where_it_was_aimed() -> None:
    """32 bits at any offset; others' bytes stay."""
    page, ours = sealed.create("bell", 4096), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    bell = DeviceBell(page, ours[0].detach(), 0, 0x1000, 4096)
    try:
        bell.put(0x1000, 4, 0x11111111)
        bell.put(0x1004, 4, 0x22222222)
        bell.put(0x1002, 4, 0xAABBCCDD)
        assert bytes(bell._mapping[:8]).hex() == "1111ddccbbaa2222"
    finally:
        bell.close()
        ours[1].close()
