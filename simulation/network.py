"""The network scenario: NetIO serves a guest's interface, and a station on the bridge sends every frame back; things break.

The guest numbers its frames and sends one again until it came back, as on any network. What must hold: all come back within a bound, none is
changed, the frontend finds no broken rule, and after the end nothing of the guest is mapped."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

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
from drivers.xenbus.states import XenbusState
from simulation.guest import IN_FLIGHT, Guest
from simulation.plan import NET_STEPS, Fault, What
from simulation.process import SimDomain
from simulation.world import World

if TYPE_CHECKING:
    from domains.netio.bridges import Bridges

GUEST_PAGES: Final = 256
STATION: Final = bytes.fromhex("020000000001")
GUEST: Final = bytes.fromhex("00163e000002")
TYPE: Final = b"\x88\xb5"
AGAIN_S: Final = 0.02


def network_faults(rng: random.Random, most: int, operations: int) -> tuple[Fault, ...]:
    """Faults that the network must survive; when they strike fits a guest that sends so many frames."""
    faults: list[Fault] = []
    some = 1 + operations * 14 // 24
    for _ in range(rng.randint(1, most) if most else 0):
        draw = rng.random()
        if draw < 0.5:
            event = f"step:net-{rng.choice(NET_STEPS)}"
            n = rng.randint(1, max(2, operations // 2))
            faults.append(Fault(what=What.KILL, target="domio", event=event, n=n))
        elif draw < 0.6:
            faults.append(
                Fault(what=What.KILL, target="domio", at_ms=round(rng.uniform(0, 6 + operations), 3))
            )
        elif draw < 0.8:
            what = rng.choice([What.LOSE, What.DUPLICATE, What.DELAY])
            event = rng.choice(("notify:front", "notify:back"))
            faults.append(Fault(what=what, event=event, n=rng.randint(1, 1 + operations), for_ms=5.0))
        elif draw < 0.9:
            where: Literal["domio", "guest"] = rng.choice(("domio", "guest"))
            n = rng.randint(1, some)
            faults.append(Fault(what=What.FREEZE, target=where, event="ring:request", n=n, for_ms=200.0))
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


class NetGuest(Guest):
    """One life of the guest. Implements `drivers.net.xenbus_front.FrontPort`."""

    DEVICE = "the interface"

    def __init__(self, world: World, host: SimDomain) -> None:
        super().__init__(world, host, range(1, GUEST_PAGES - 2))
        self.front: Frontend = Frontend(self.pages, self._received)
        rng = self.rng
        able = Abilities(scatter=rng.random() < 0.7, multicast_control=rng.random() < 0.3)
        self.limit = 9000 if able.scatter else 1500
        wish = Wish(queues=rng.choice((1, 1, 2)), split=rng.random() < 0.5, abilities=able)
        self.device = FrontDevice(world.front, world.back, self, wish)
        self._queues: list[FrontQueue] = []
        self.sent: dict[int, bytes] = {}
        """Payloads that have not come back, by number."""
        self._under_way: Counter[int] = Counter()
        """How often each was sent, less how often it came back."""
        self.begin()

    # ------------------------------------------------------------------ xenbus

    def publish(self, queues: int, split: bool) -> list[QueueLink]:
        """See FrontPort."""
        links = []
        for _ in range(queues):
            pages, refs = self._ring_pages(2)
            tx, rx = PagedRing([pages[0].data], TX_SLOT), PagedRing([pages[1].data], RX_SLOT)
            tx.init()
            rx.init()
            first = self._channel()
            second = self._channel() if split else first
            self._queues.append(FrontQueue(tx, rx, self._notify(first), self._notify(second)))
            links.append(QueueLink(refs[0], refs[1], first, second))
        self.front.connect(self._queues)
        return links

    def connected(self) -> None:
        """See FrontPort."""
        if self.world.going:
            self._look_again()

    def go(self) -> None:
        """See Guest."""
        super().go()
        self._look_again()

    def _look_again(self) -> None:
        self.host.reactor.after(AGAIN_S, self._resend)

    def disconnect(self) -> None:
        """See FrontPort."""
        super().disconnect()
        self._queues = []

    # ------------------------------------------------------------------ frames

    @property
    def waits(self) -> str:
        return f"{len(self.sent)} frames did not come back"

    def _kicked(self) -> None:
        super()._kicked()
        if self.front.refused:
            self.world.violation(f"{self.front.refused} good packets were answered with an error")
            self.front.refused = 0

    def _received(self, frame: Frame) -> None:
        data = frame.data
        if data[:6] != GUEST or data[6:12] != STATION:
            self.world.violation(f"a frame from {data[6:12].hex()} to {data[:6].hex()}")
            return
        number = int.from_bytes(data[14:18], "big")
        self._under_way[number] -= 1
        if self._under_way[number] < 0 and self.world.machine.lives("domio") == 1:
            # (What a dead process had sent and not answered its successor sends again.)
            self.world.violation(f"frame {number} came back more often than it was sent")
        wanted = self.sent.pop(number, None)
        if wanted is None:
            return  # it came before: it was sent twice
        self.done += 1
        self.world.machine.trace(f"guest frame {number} came back")
        if data[14:] != wanted:
            self.world.violation(
                f"frame {number} came back changed ({len(data) - 14} bytes for {len(wanted)})"
            )

    def _work(self) -> None:
        if not self._ready:
            return
        while self.issued < self.world.operations and len(self.sent) < IN_FLIGHT:
            size = self.rng.choice((46, 46, 500, 1486, self.limit - 14))
            self.sent[self.issued] = self.issued.to_bytes(4, "big") + self.rng.randbytes(size - 4)
            self.issued += 1
            self._send(self.issued - 1)
        if self.done == self.world.operations:
            self._close_soon()

    def _send(self, number: int) -> None:
        cuts = [self.rng.randint(1, 4096) for _ in range(self.rng.choice((0, 0, 1, 3)))]
        if self.front.send(Frame(STATION + GUEST + TYPE + self.sent[number]), cuts):
            self._under_way[number] += 1
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
        for number in list(self.sent):
            self._send(number)
        self._work()
        self.host.reactor.after(AGAIN_S, self._resend)


class NetWorld(World):
    """A seed and a plan with `scenario = "network"`, run once by `run`."""

    BACKEND = "NetIO"
    KIND = "vif"
    NUMBER = 0

    draw = staticmethod(network_faults)

    def _memory(self) -> tuple[list[int], list[int]]:
        return list(range(STAGE_PAGES + 8)), list(range(GUEST_PAGES))

    def _hardware(self, host: SimDomain) -> None:
        """None: the bridge is in its process."""

    def _nodes(self) -> list[tuple[str, str]]:
        return [
            ("state", "1"), ("mac", GUEST.hex(":")), ("bridge", "xenbr0"), ("handle", "0"), ("type", "vif"), ("trusted", "1"),
        ]  # fmt: skip

    def _domio(self, host: SimDomain) -> None:
        netio = NetIo(host, None)
        Station(netio.bridges)
        netio.start()

    def _start_guest(self, host: SimDomain) -> Guest:
        return NetGuest(self, host)
