"""A domain's process runs no guest code while code of it may be stale."""

from __future__ import annotations

import os

from bus import lease_page as lp
from domains.domu.lease import Lease


def test_guest_code_waits_for_the_order_that_says_what_is_stale() -> None:
    """The page tells of it at once, the order comes later; orders that are merged skip numbers."""
    fd = lp.create()
    ours = lp.LeasePage(fd)
    lease = Lease(lambda: None)
    assert not lease.stale, "without a page there is nobody to tell"
    lease.attach([os.dup(fd)])
    assert not lease.stale
    ours.words[lp.STALE] = 2
    assert lease.stale
    lease.dropped(1)
    assert lease.stale
    lease.dropped(3)
    assert not lease.stale
    lease.dropped(2)
    ours.words[lp.STALE] = 4
    assert lease.stale
    ours.close()
    os.close(fd)
