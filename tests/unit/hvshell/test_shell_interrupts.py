"""Interrupts of devices by doorbell: rung here, listened to by the domain's process, gone with the port."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bus.addresses import DomId
from bus.doorbell import Doorbell
from hypervisor.shell.joins import Joins

GUEST = DomId(3)


class _Peer:
    """What a peer is for joins: it keeps what it was told."""

    behind = False

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, object], list[int]]] = []

    def order(self, number: int, what: str, body: dict[str, object], fds: list[int]) -> None:
        self.told.append((what, body, [os.dup(fd) for fd in fds]))


def joined(*, doorbells: bool = True) -> tuple[Joins, _Peer]:
    """Joins with one peer."""
    peer = _Peer()
    peers: Any = {GUEST: peer}
    return Joins(peers, lambda peer: None, lambda domain, why: None, doorbells=doorbells), peer


def test_an_interrupt_rings_until_its_port_is_closed() -> None:
    """The process gets one descriptor, to listen; after the end of the port nothing is rung, and messages are not missed."""
    joins, peer = joined()
    before = len(os.listdir("/proc/self/fd"))
    joins.interrupt(GUEST, 5)
    ((what, body, fds),) = peer.told
    assert (what, body, len(fds)) == ("doorbell", {"port": 5}, 1)
    listen = Doorbell(fds[0])
    assert not listen.take()
    assert joins.ring(GUEST, 5)
    assert listen.take()
    assert not joins.ring(GUEST, 6)
    joins.unbind(GUEST, 5)
    assert peer.told[1][:2] == ("doorbell_off", {"port": 5})
    assert not joins.ring(GUEST, 5)
    joins.interrupt(GUEST, 7)
    joins.gone(GUEST)
    assert not joins.ring(GUEST, 7)
    listen.close()
    os.close(peer.told[2][2][0])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("why", ["messages", "behind", "nobody"])
def test_without_a_doorbell_events_go_by_messages(why: str) -> None:
    """All over ZeroMQ, a process that does not read, or none."""
    joins, peer = joined(doorbells=why != "messages")
    peer.behind = why == "behind"
    domain = DomId(9) if why == "nobody" else GUEST
    joins.interrupt(domain, 5)
    assert peer.told == []
    assert not joins.ring(domain, 5)
