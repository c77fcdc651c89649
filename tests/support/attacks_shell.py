"""Attacks on what the hypervisor and Dom0 share with a domain's process: the lease page, doorbells, the link, rings, last words.
Run by `tests.support.attacks`."""

from __future__ import annotations

import contextlib
import mmap
import os
import time

from bus import lease_page as lp
from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import sched, xen
from bus.abi.io.console import XENCONS_INTERFACE
from bus.addresses import Mfn
from bus.doorbell import Doorbell
from bus.messages.domain import Hypercall, Order, Report
from bus.messages.envelope import encode
from tests.support.hostile import Answer, Hostile
from tests.support.raw_zmtp import RawClient

ATTACK_S = 2.0
CONSOLE_PORT = 2
"""Dom0 makes two ports for a domain that it builds: xenstore's, then the console's."""
STATUS = ec.EVTCHN_STATUS.zero()._replace(dom=xen.DOMID_SELF)


def still_served(h: Hostile) -> int:
    """An honest call's return value."""
    for token in range(1 << 41, (1 << 41) + 10):
        h.send_call(token, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_status, ec.EVTCHN_STATUS.pack(STATUS))
        if h.serve(1.0, lambda token=token: token in h.replies):  # type: ignore[misc]  # a default binds the loop's value
            return h.replies[token][0]
    return -1


def lease_page(h: Hostile) -> None:
    """Writes to every word of the page, the hypervisor's own too, and makes both doorbells blocking, full and empty, over and over."""
    kept: list[int] = []

    def take(order: Order, fds: list[int]) -> Answer:
        kept.extend(fds)
        return 0, b""

    h.on["lease_page"] = take
    h.connect()
    h.started()
    page = mmap.mmap(kept[0], lp.SIZE)
    bells = [Doorbell(os.dup(fd)) for fd in kept[1:]]
    h.say("begun", bells=len(bells))
    end, count = time.monotonic() + ATTACK_S, 0
    while time.monotonic() < end:
        page[:] = b"\xff" * lp.SIZE
        for bell in bells:
            os.set_blocking(bell.fd, True)
            for _ in range(20):
                bell.ring()
            bell.take()
        count += 1
        if not count % 50:
            h.link.dispatch()
    h.say("done", rc=still_served(h), count=count)
    h.idle()


def console_page(h: Hostile) -> memoryview:
    """The ring page that it granted to Dom0's consoled."""
    assert h.memory is not None
    data = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(xen.DOMID_SELF, 1, 0, 0))
    _, reply = h.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, data)
    table = Mfn(int.from_bytes(reply[gt.GNTTAB_SETUP_TABLE.size :][:8], "little"))
    size = gt.GRANT_ENTRY_V1.size
    start = gt.GNTTAB_RESERVED_CONSOLE * size
    entry = gt.GRANT_ENTRY_V1.unpack(bytes(h.memory.page(table)[start : start + size]))
    return h.memory.page(Mfn(entry.frame))


def endless_console(h: Hostile) -> None:
    """Its output ring is full again as soon as something was taken out."""
    h.connect()
    h.started()
    words = console_page(h)[: XENCONS_INTERFACE.size & ~3].cast("I")
    cons, prod = (XENCONS_INTERFACE.offset(name) // 4 for name in ("out_cons", "out_prod"))
    send = ec.EVTCHN_SEND.pack(ec.evtchn_send(CONSOLE_PORT))
    h.say("begun")
    end = time.monotonic() + ATTACK_S
    while time.monotonic() < end:
        h.call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_send, send)
        for _ in range(2000):
            words[prod] = (words[cons] + 2048) & 0xFFFFFFFF
    words[prod] = words[cons]
    h.say("done", rc=still_served(h))
    h.idle()


def last_words(h: Hostile) -> None:
    """Counters as long as a message, and then a crash, which whoever follows it is told of with them."""
    h.connect()
    h.started()
    h.say("begun")
    for body in ({"hypercalls": "x" * 59_000}, {"hypercalls": {"y" * 40_000: 1}, "events": [[[]]]}):
        h.send(Report(what="counters", body=body))
        h.serve(0.1)
    reason = sched.SCHED_SHUTDOWN.pack(sched.sched_shutdown(sched.SHUTDOWN_crash))
    h.call(xen.HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, reason)
    h.idle()


def bind_and_close(h: Hostile) -> None:
    """Joins a channel to Dom0's port of its console and closes it, over and over: each time Dom0 is told."""
    h.connect()
    h.started()
    status = ec.EVTCHN_STATUS.pack(STATUS._replace(port=CONSOLE_PORT))
    _, reply = h.call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_status, status)
    far = ec.EVTCHN_STATUS_INTERDOMAIN.unpack(ec.EVTCHN_STATUS.unpack(reply).u)
    bind = ec.EVTCHN_BIND_INTERDOMAIN.pack(
        ec.evtchn_bind_interdomain(remote_dom=far.dom, remote_port=far.port, local_port=0)
    )
    local, count = CONSOLE_PORT, 0
    h.say("begun")
    end = time.monotonic() + ATTACK_S
    while time.monotonic() < end:
        close = ec.EVTCHN_CLOSE.pack(ec.evtchn_close(local))
        h.call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_close, close)
        rc, reply = h.call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_bind_interdomain, bind)
        assert rc == 0
        local = ec.EVTCHN_BIND_INTERDOMAIN.unpack(reply).local_port
        count += 1
    h.say("done", rc=still_served(h), count=count)
    h.idle()


def vanish(h: Hostile) -> None:
    """Makes calls and reads nothing until the hypervisor waits for room, and closes then; several times."""
    h.connect()
    h.started()
    call = encode(Hypercall(token=1, vcpu=0, nr=63, cmd=0))
    for _ in range(5):
        client = RawClient(h.keys)
        client.socket.settimeout(0.3)
        with contextlib.suppress(OSError):
            client.socket.sendall(b"".join(client.message(call) for _ in range(2500)))
        time.sleep(0.1)
        client.close()
        time.sleep(0.05)
    h.say("done", rc=still_served(h))
    h.idle()


def forks(h: Hostile) -> None:
    """Leaves processes behind, in sessions of their own."""
    h.connect()
    h.started()
    pids = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            os.setsid()
            time.sleep(600)
            os._exit(0)
        pids.append(pid)
    h.say("done", rc=still_served(h), pids=pids)
    h.idle()
