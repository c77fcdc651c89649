"""A guest whose process is a program: the project's own network frontend, which sends as fast as it is answered, or takes what comes
(benchmarks/programs/native_guest.py; run by benchmarks/net.py). The command line says which: `send` or `receive`.
"""

from __future__ import annotations

import os
import time

from benchmarks.programs.front import FrontProgram, Grants
from benchmarks.programs.native_guest import PvNative, say, serve
from bus.abi import xen
from bus.abi.io.netif import XEN_NETIF_GSO_TYPE_TCPV4
from bus.addresses import DomId, Port
from domains.native.xenstore import XenstoreClient
from drivers.net.frames import Frame, blank
from drivers.net.frontend import Frontend, FrontQueue
from drivers.net.nodes import QueueLink
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.net.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.states import XenbusState

SECONDS = float(os.environ.get("DOMICILE_BENCHMARK_SECONDS", "4"))
SENDER, RECEIVER = bytes.fromhex("00163e000001"), bytes.fromhex("00163e000002")
DEPTH = 128
"""Slots under way."""


class Nic(FrontProgram):
    """`drivers.net.xenbus_front.FrontPort`: one interface of the domain."""

    frontend: Frontend
    device: FrontDevice

    def __init__(self, host: PvNative, store: XenstoreClient) -> None:
        super().__init__(host, store)
        base = "device/vif/0"
        backend = (store.read(f"{base}/backend") or b"").decode()
        self.backend = DomId(int(store.read(f"{base}/backend-id") or b"0"))
        self.grants = Grants(host, self.backend)
        self.frontend = Frontend(self.grants, lambda frame: None)
        self._ports: list[Port] = []
        self.device = FrontDevice(base, backend, self, Wish(split=False))
        self.follow(backend)

    def publish(self, queues: int, split: bool) -> list[QueueLink]:
        """See FrontPort."""
        pages = self.grants.allocate(2)
        for page in pages:
            page.data[:] = bytes(4096)
        refs = self.grants.grant(pages, False)
        tx, rx = PagedRing([pages[0].data], TX_SLOT), PagedRing([pages[1].data], RX_SLOT)
        tx.init()
        rx.init()
        port = self.host.alloc_unbound(xen.DOMID_SELF, self.backend)
        self.host.on_event(port, self.poll)
        self._ports.append(port)
        notify = lambda: self.host.notify(port)  # noqa: E731  (one line is the shorter form)
        self.frontend.connect([FrontQueue(tx, rx, notify, notify)])
        return [QueueLink(refs[0], refs[1], port, port)]

    def connected(self) -> None:
        """See FrontPort."""

    def disconnect(self) -> None:
        """See FrontPort."""
        self.frontend.disconnect()


def tcp(payload: int) -> Frame:
    """A TCP frame that stands for segments of 1448 bytes."""
    length = 40 + payload
    network = (
        b"\x45\0" + length.to_bytes(2, "big") + bytes(4) + b"\x40\x06\0\0" + bytes((10, 0, 0, 1, 10, 0, 0, 2))
    )
    transport = bytes(12) + b"\x50\x10" + bytes(6)
    data = blank(RECEIVER + SENDER + b"\x08\0" + network + transport + bytes(payload))
    return Frame(data, True, True, 1448, XEN_NETIF_GSO_TYPE_TCPV4)


STAGES = {
    "60 bytes": Frame(RECEIVER + SENDER + b"\x88\xb5" + bytes(46)),
    "1514 bytes": Frame(RECEIVER + SENDER + b"\x88\xb5" + bytes(1500)),
    "32 KiB of TCP (GSO)": tcp(32000),
}


def send(nic: Nic) -> None:
    """Each kind of frame for SECONDS."""
    reactor, front = nic.host.reactor, nic.frontend
    for name, frame in STAGES.items():
        for seconds in (0.5, SECONDS):
            say(stage=name, what="warm" if seconds < SECONDS else "begin")
            sent = 0
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                while front.pending < DEPTH and front.send(frame):
                    sent += 1
                reactor.once(0.01)
            took = time.perf_counter() - start
        say(stage=name, what="end", sent=sent / took, refused=front.refused)
        until = time.monotonic() + 10
        while front.pending and time.monotonic() < until:
            reactor.once(0.1)
    say(stage="over", what="over")


def run(host: PvNative) -> None:
    """As the command line says."""
    store = XenstoreClient(host)
    nic = Nic(host, store)
    while nic.device.state is not XenbusState.Connected:
        host.reactor.once(0.1)
    if host.command_line() == "receive":
        nic.frontend.send(Frame(SENDER + RECEIVER + b"\x88\xb5" + bytes(46)))  # the bridge learns where it is
    else:
        send(nic)
    host.reactor.run()


if __name__ == "__main__":
    serve(run)
