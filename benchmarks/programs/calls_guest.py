"""The guests of benchmarks/calls.py (benchmarks/programs/native_guest.py): one that asks the hypervisor, and two that ring each other."""

from __future__ import annotations

import statistics
import time

from benchmarks.programs.native_guest import PvNative, say, serve
from bus.abi import event_channel as ec
from bus.abi import xen
from bus.addresses import DomId, Port

CALLS = 3000
RINGS = 3000


def microseconds(times: list[float]) -> float:
    """The median."""
    return statistics.median(times) * 1e6


def ask(host: PvNative) -> None:
    """EVTCHNOP_status of a port of its own, again and again."""
    port = host.alloc_unbound(xen.DOMID_SELF, host.domid + 1)
    request = ec.EVTCHN_STATUS.pack(ec.EVTCHN_STATUS.zero()._replace(dom=xen.DOMID_SELF, port=port))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        rc, _reply = host.hypercall(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_status, request)
        times.append(time.perf_counter() - start)
        if rc:
            raise SystemExit(f"EVTCHNOP_status: {rc}")
    say(what="call", microseconds=microseconds(times))
    host.on_event(port, lambda: host.notify(port))
    say(what="port", port=port, domid=host.domid)


def ring(host: PvNative, words: list[str]) -> None:
    """Ring the other guest, which rings back: half the round trip."""
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1

    port = host.bind_interdomain(DomId(int(words[0])), Port(int(words[1])), hear)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:  # the doorbell comes by message
        host.reactor.once(0.1)
    times = []
    for number in range(RINGS):
        start = time.perf_counter()
        host.notify(port)
        while heard <= number:
            host.reactor.once(1.0)
        times.append(time.perf_counter() - start)
    say(what="event", microseconds=microseconds(times) / 2)


def run(host: PvNative) -> None:
    """As the command line says."""
    words = host.command_line().split()
    if words:
        ring(host, words)
    else:
        ask(host)


if __name__ == "__main__":
    serve(run)
