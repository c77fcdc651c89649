"""The network scenario: NetIO serves a guest's interface, and a station on the bridge sends every frame back; things break.

The guest numbers its frames and sends one again until it came back, as on any network. What must hold: all come back within a bound, none is
changed, the frontend finds no broken rule, and after the end nothing of the guest is mapped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from bus.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from bus.addresses import Port
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.xenstore import XenstoreClient
from domains.netio.__main__ import NetIo
from domains.netio.copies import STAGE_PAGES
from drivers.net.frames import Frame
from drivers.net.frontend import Frontend, FrontQueue
from drivers.net.nodes import QueueLink
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.receive import Abilities
from drivers.net.switch import Port as BridgePort
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.net.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import Page
from drivers.xenbus.states import XenbusState
from simulation.guest import Pages
from simulation.plan import NET_STEPS, Fault, Plan, What
from simulation.process import SimDomain
from simulation.world import RUN_LIMIT, World

if TYPE_CHECKING:
    from domains.netio.bridges import Bridges

GUEST_PAGES: Final = 256
STATION: Final = bytes.fromhex("020000000001")
GUEST: Final = bytes.fromhex("00163e000002")
TYPE: Final = b"\x88\xb5"
IN_FLIGHT: Final = 6
AGAIN_S: Final = 0.02


def network_faults(rng: random.Random, most: int) -> tuple[Fault, ...]:
    """Faults that the network must survive."""
    faults: list[Fault] = []
    for _ in range(rng.randint(1, most) if most else 0):
        draw = rng.random()
        if draw < 0.5:
            event = f"step:net-{rng.choice(NET_STEPS)}"
            faults.append(Fault(what=What.KILL, target="domio", event=event, n=rng.randint(1, 12)))
        elif draw < 0.6:
            faults.append(Fault(what=What.KILL, target="domio", at_ms=round(rng.uniform(0, 30), 3)))
        elif draw < 0.8:
            what = rng.choice([What.LOSE, What.DUPLICATE, What.DELAY])
            event = rng.choice(("notify:front", "notify:back"))
            faults.append(Fault(what=what, event=event, n=rng.randint(1, 25), for_ms=5.0))
        elif draw < 0.9:
            where = rng.choice(("domio", "guest"))
            faults.append(
                Fault(
                    what=What.FREEZE, target=where, event="ring:request", n=rng.randint(1, 15), for_ms=200.0
                )
            )
        elif draw < 0.95:
            faults.append(
                Fault(what=What.SLOW, target="domio", at_ms=round(rng.uniform(0, 10), 3), for_ms=20.0)
            )
        else:
            faults.append(Fault(what=What.NO_GRANTS, event="grant:map", n=rng.randint(1, 6)))
    return tuple(faults)


class Station:
    """On the bridge, in NetIO's process: sends every frame back."""

    def __init__(self, bridges: Bridges) -> None:
        self._bridges = bridges
        self._port: BridgePort = bridges.join("xenbr0", "station", self)

    def deliver(self, frames: Sequence[Frame]) -> None:
        back = [frame._replace(data=frame.data[6:12] + STATION + frame.data[12:]) for frame in frames]
        self._bridges.forward(self._port, back)


class NetGuest:
    """One life of the guest. Implements `drivers.net.xenbus_front.FrontPort`."""

    def __init__(self, world: NetWorld, host: SimDomain) -> None:
        self.world = world
        self.host = host
        rng = self.rng = world.guest_rng
        self.store = XenstoreClient(host)
        self.pages = Pages(host, world.guest_table, range(1, GUEST_PAGES - 2), world.backend_id)
        self.front = Frontend(self.pages, self._received)
        backend = f"/local/domain/{world.backend_id}/backend/vif/{host.domid}/0"
        able = Abilities(scatter=rng.random() < 0.7, multicast_control=rng.random() < 0.3)
        self.limit = 9000 if able.scatter else 1500
        wish = Wish(queues=rng.choice((1, 1, 2)), split=rng.random() < 0.5, abilities=able)
        self.device = FrontDevice(f"/local/domain/{host.domid}/device/vif/0", backend, self, wish)
        self._rings: list[tuple[PagedRing, PagedRing]] = []
        self._held: list[tuple[Page, int]] = []
        self._ports: list[Port] = []
        self._queues: list[FrontQueue] = []
        self.waits: dict[int, bytes] = {}
        self.issued = self.done = 0
        self._running = self._again = self._closing = False
        self.store.watch(f"{backend}/state", self._changed)

    # ------------------------------------------------------------------ xenbus

    def _changed(self, _path: str) -> None:
        if self._running:
            self._again = True
            return
        self._running = True
        try:
            while True:
                self._again = False
                self.store.run(self.device.changed())
                if not self._again:
                    break
        finally:
            self._running = False
        self.world.front_state = self.device.state
        self._work()

    def _port(self) -> Port:
        port = self.host.alloc_unbound(DOMID_SELF, self.world.backend_id)
        self.host.on_event(port, self._kicked)
        self._ports.append(port)
        return port

    def publish(self, queues: int, split: bool) -> list[QueueLink]:
        links = []
        for _ in range(queues):
            pages = self.pages.allocate(2)
            refs = self.pages.grant(pages, False)
            self._held += zip(pages, refs, strict=True)
            tx, rx = PagedRing([pages[0].data], TX_SLOT), PagedRing([pages[1].data], RX_SLOT)
            tx.init()
            rx.init()
            first = self._port()
            second = self._port() if split else first
            self._queues.append(FrontQueue(tx, rx, self._notify(first), self._notify(second)))
            links.append(QueueLink(refs[0], refs[1], first, second))
        self.front.connect(self._queues)
        return links

    def _notify(self, port: Port) -> Callable[[], None]:
        return lambda: self.host.notify(port)

    def connected(self) -> None:
        self.host.reactor.after(AGAIN_S, self._resend)

    def disconnect(self) -> None:
        self.front.disconnect()
        self._queues = []
        ended = self.pages.end([ref for _, ref in self._held])
        if not all(ended):
            self.world.violation("the back end kept ring pages mapped after it let go")
        self.pages.free([page for (page, _), fine in zip(self._held, ended, strict=True) if fine])
        for port in self._ports:
            self.host.close_port(port)
        self._held, self._ports = [], []

    def removed(self) -> None:
        """The back end is gone for good."""

    # ------------------------------------------------------------------ frames

    def _kicked(self) -> None:
        self.front.poll()
        if self.front.leaked:
            self.world.violation(f"{self.front.leaked} pages stay in use by the back end after its answer")
            self.front.leaked = 0
        if self.front.refused:
            self.world.violation(f"{self.front.refused} good packets were answered with an error")
            self.front.refused = 0
        if self.front.error:
            self.world.violation(f"the frontend found: {self.front.error}")
        self._work()

    def _received(self, frame: Frame) -> None:
        data = frame.data
        if data[:6] != GUEST or data[6:12] != STATION:
            self.world.violation(f"a frame from {data[6:12].hex()} to {data[:6].hex()}")
            return
        number = int.from_bytes(data[14:18], "big")
        wanted = self.waits.pop(number, None)
        if wanted is None:
            return  # it came before: it was sent twice
        self.done += 1
        self.world.machine.trace(f"guest frame {number} came back")
        if data[14:] != wanted:
            self.world.violation(
                f"frame {number} came back changed ({len(data) - 14} bytes for {len(wanted)})"
            )

    def _work(self) -> None:
        if self.device.state is not XenbusState.Connected or self.front.error:
            return
        while self.issued < self.world.operations and len(self.waits) < IN_FLIGHT:
            size = self.rng.choice((46, 46, 500, 1486, self.limit - 14))
            self.waits[self.issued] = self.issued.to_bytes(4, "big") + self.rng.randbytes(size - 4)
            self.issued += 1
            self._send(self.issued - 1)
        if self.done == self.world.operations and not self._closing:
            self._closing = True
            self.host.reactor.soon(self._close)

    def _send(self, number: int) -> None:
        cuts = [self.rng.randint(1, 4096) for _ in range(self.rng.choice((0, 0, 1, 3)))]
        if self.front.send(Frame(STATION + GUEST + TYPE + self.waits[number]), cuts):
            self.world.machine.trace(f"guest sends {number}")
            self.world.machine.injector.happen("ring:request")
            self.host.process.check()

    def _resend(self) -> None:
        """What did not come back is sent again: frames may be lost, and a notification, too."""
        if self._closing or self.device.state is not XenbusState.Connected:
            return
        self._kicked()
        for queue in self._queues:
            queue.notify_tx()
        for number in list(self.waits):
            self._send(number)
        self._work()
        self.host.reactor.after(AGAIN_S, self._resend)

    def _close(self) -> None:
        self.world.machine.trace("guest closes the interface")
        self.store.run(self.device.close())
        self.world.front_state = self.device.state


class NetWorld(World):
    """A seed and a plan with `scenario = "network"`, run once by `run`."""

    def __init__(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        drawn = network_faults(random.Random(seed), plan.random_faults)
        own = plan.model_copy(update={"fault": plan.fault + drawn, "random_faults": 0})
        super().__init__(seed, own, keep_trace=keep_trace)
        self.net_guest: NetGuest | None = None

    def _dom0(self, host: SimDomain) -> None:
        """What domains/dom0/toolstack does, for NetIO, one interface and one guest."""
        store = self.store = XenstoreService(host)
        xc = self.xc = ControlInterface(host)
        host.bind_virq(VIRQ_DOM_EXC, self._check_domains)
        self._build(host, self.backend_id, list(range(STAGE_PAGES + 8)), "NetIO")
        base = f"/local/domain/{self.backend_id}"
        store.mkdir(f"{base}/backend")
        store.permit(f"{base}/backend", f"n{self.backend_id}")
        self._build(host, self.guest_id, list(range(GUEST_PAGES)), "guest")
        xc.unpause(self.backend_id)
        self.machine.injector.arm()
        self._write_nodes()
        xc.unpause(self.guest_id)
        self.ready = True

    def _write_nodes(self) -> None:
        back_id, front_id = self.backend_id, self.guest_id
        back = f"/local/domain/{back_id}/backend/vif/{front_id}/0"
        front = f"/local/domain/{front_id}/device/vif/0"
        self._write_pair(back, front, [
            ("frontend", front), ("frontend-id", str(front_id)), ("online", "1"), ("state", "1"),
            ("mac", GUEST.hex(":")), ("bridge", "xenbr0"), ("handle", "0"), ("type", "vif"), ("trusted", "1"),
        ])  # fmt: skip

    def _domio(self, host: SimDomain) -> None:
        netio = NetIo(host, None)
        Station(netio.bridges)
        netio.start()

    def _guest(self, host: SimDomain) -> None:
        self.net_guest = NetGuest(self, host)

    @property
    def answered(self) -> int:
        return self.net_guest.done if self.net_guest is not None else 0

    def _judge(self) -> None:
        machine, guest = self.machine, self.net_guest
        if self.violations:
            return
        if not self.over:
            state = self.front_state.name
            if self._errors and state in ("Closing", "Closed"):
                return  # it failed cleanly, as planned
            waits = len(guest.waits) if guest is not None else 0
            self.violation(
                f"hang: after {RUN_LIMIT // 1_000_000_000} s {waits} frames did not come back (frontend {state})"
            )
            return
        machine.scheduler.run(machine.now + 1_000_000_000, lambda: False)  # what is under way comes to rest
        for problem in machine.problems():
            self.violation(f"hypervisor: {problem}")
        granter = self.guest_id
        mapped = [m for m in machine.grants.mappings(self.backend_id) if m.granter == granter]
        if mapped:
            self.violation(f"{len(mapped)} grants of the guest are mapped by NetIO after close")
