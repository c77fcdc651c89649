"""A simulated process of a native domain: the product's `NativeDomain` on a link, a reactor and memory that are simulated."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bus.addresses import DomId, Mfn, Port
from bus.doorbell import Doorbell
from bus.link import CALL_TIMEOUT_S, DomainLink, HypervisorGone
from bus.messages.domain import TO_DOMAIN, Hypercall, HypercallReply, Order, OrderDone
from bus.messages.envelope import Message
from domains.device_bell import DeviceBell
from domains.granting import Granting
from domains.native.domain import NativeDomain, _Channel
from domains.native.reactor import Callback, Reactor
from simulation.memory import SimHostMemory
from simulation.order import Turns
from simulation.scheduler import Killed, Thread

if TYPE_CHECKING:
    from simulation.machine import Machine


class Process:
    """One life of a domain's process: its thread, what has come for it, and whether it is frozen."""

    def __init__(self, machine: Machine, domid: DomId, role: str, life: int) -> None:
        self.machine = machine
        self.domid = domid
        self.role = role
        self.thread = Thread(f"{role}-{life}")
        self.inbox: deque[tuple[int, Message]] = deque()
        self.last_due = 0
        self.frozen_until = 0
        self.slow_until = 0
        self.slow_factor = 1.0
        self.turns = Turns(machine.overtaken)
        """To it."""
        self.turns_back = Turns(machine.overtaken)
        self.reactor = SimReactor(self)
        self.link = SimLink(self)
        self.host: SimDomain | None = None

    @property
    def alive(self) -> bool:
        return not self.thread.dead

    def post(self, message: Message) -> None:
        """The hypervisor sends: messages of a link keep their order, unless a plan has them change it."""
        self.machine.injector.link(self.turns, self.role, message, lambda: self._post(message))

    def _post(self, message: Message) -> None:
        machine = self.machine
        latency = machine.latency()
        if machine.scheduler.now < self.slow_until:
            latency = int(latency * self.slow_factor)
        due = max(self.last_due, machine.scheduler.now + latency)
        self.last_due = due
        self.inbox.append((due, machine.through(message, TO_DOMAIN)))
        machine.scheduler.at(due, self.deliver)

    def deliver(self) -> None:
        """What is due has come: orders are carried out, callbacks and replies wake the thread."""
        if not self.alive:
            return
        now = self.machine.scheduler.now
        if now < self.frozen_until:
            self.machine.scheduler.at(self.frozen_until, self.deliver)
            return
        while self.inbox and self.inbox[0][0] <= now:
            self.link.take(self.inbox.popleft()[1])

    def drain(self) -> None:
        """All that is under way to it arrives now."""
        while self.inbox and self.alive:
            self.link.take(self.inbox.popleft()[1])

    def wake(self) -> None:
        """Let its thread run, unless it is frozen."""
        scheduler = self.machine.scheduler
        if scheduler.now < self.frozen_until:
            scheduler.at(self.frozen_until, self.wake)
        else:
            scheduler.wake(self.thread)

    def park(self) -> None:
        """Its thread waits. Killed."""
        scheduler = self.machine.scheduler
        scheduler.park(self.thread)
        while scheduler.now < self.frozen_until:
            scheduler.at(self.frozen_until, self.wake)
            scheduler.park(self.thread)

    def pause(self) -> None:
        """Here the process may be taken off its CPU: others run, and what comes for it waits. Killed."""
        machine, scheduler = self.machine, self.machine.scheduler
        if scheduler.running is not self.thread or scheduler.in_event:
            return
        span = machine.pause()
        if not span:
            return
        self.frozen_until = max(self.frozen_until, scheduler.now + span)
        while scheduler.now < self.frozen_until:
            scheduler.at(self.frozen_until, self.wake)
            scheduler.park(self.thread)

    def check(self) -> None:
        """Killed, if it was killed meanwhile."""
        if self.thread.dead:
            raise Killed


class SimLink(DomainLink):
    """The process's end of its link."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._token = 0
        self.calls = 0
        self.refused = 0
        self._replies: dict[int, HypercallReply] = {}
        self._awaited = -1
        self._bundles: dict[int, list[int]] = {}
        self.on_message: Callable[[Message], None] = lambda message: None

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Nothing is held."""

    def put_bundle(self, number: int, fds: list[int]) -> None:
        """Descriptors that travel beside an order."""
        self._bundles[number] = fds

    def descriptors_of(self, order: Order, timeout: float = 1.0) -> list[int]:
        return self._bundles.pop(order.bundle, [])

    def take(self, message: Message) -> None:
        """A message has come."""
        if isinstance(message, HypercallReply):
            self._replies[message.token] = message
            if message.token == self._awaited:
                self._process.wake()
        else:
            self.on_message(message)

    def dispatch(self) -> int:
        return 0  # `Process.deliver` has done it

    def send(self, message: Message) -> None:
        self._process.pause()
        self._process.check()
        self._process.machine.from_domain(self._process, message)

    def call(self, nr: int, cmd: int, data: bytes = b"", vcpu: int = 0) -> tuple[int, bytes]:
        token = self.next_token()
        self.calls += 1
        return self.exchange(Hypercall.made(token=token, vcpu=vcpu, nr=nr, cmd=cmd, data=data), token)

    def answer(self, order: Order, rc: int = 0, data: bytes = b"") -> None:
        if order.order:
            self.send(OrderDone.made(order=order.order, rc=rc, data=data))

    def exchange(self, message: Message, token: int) -> tuple[int, bytes]:
        process = self._process
        machine = process.machine
        self._awaited = token
        self.send(message)
        process.check()
        if machine.quick():
            process.drain()
        if token not in self._replies:  # else there is nothing to wait for
            deadline = machine.scheduler.now + int(CALL_TIMEOUT_S * 1e9)
            machine.scheduler.at(deadline, lambda: process.wake() if self._awaited == token else None)
        while token not in self._replies:
            if machine.scheduler.now >= deadline:
                raise HypervisorGone(f"no answer to {message.KIND}")
            self._awaited = token  # an exchange within this one has set it otherwise
            process.park()
        self._awaited = -1
        reply = self._replies.pop(token)
        process.check()
        return reply.rc, reply.data


class SimReactor(Reactor):
    """Timers and callbacks on simulated time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._queue: deque[Callback] = deque()
        self._alarms: list[tuple[int, int, Callback]] = []
        self._numbers = itertools.count()
        self.before_wait: list[Callable[[], bool]] = []
        self.stopping = False
        self.waits = False
        """It is in `run`, and nothing of it is under way."""

    def reader(self, fd: int, callback: Callback) -> None:
        """Bells and links call by themselves."""

    def forget(self, fd: int) -> None:
        """See `reader`."""

    def after(self, seconds: float, callback: Callback) -> None:
        scheduler = self._process.machine.scheduler
        when = scheduler.now + int(seconds * 1e9)
        heapq.heappush(self._alarms, (when, next(self._numbers), callback))
        scheduler.at(when, self._process.wake)

    def soon(self, callback: Callback) -> None:
        self._queue.append(callback)
        self._process.wake()

    def _due(self) -> bool:
        return bool(self._alarms) and self._alarms[0][0] <= self._process.machine.scheduler.now

    def once(self, timeout: float) -> None:
        scheduler = self._process.machine.scheduler
        deadline = scheduler.now + int(timeout * 1e9)
        if not self._queue and not self._due():
            scheduler.at(deadline, self._process.wake)
            self._process.park()
        self._round()

    def run(self) -> None:
        while not self.stopping:
            if not self._queue and not self._due():
                self.waits = True
                self._process.park()
                self.waits = False
            self._round()

    def _round(self) -> None:
        # One at a time: a callback may wait in `once`, and what woke us must not be hidden from it.
        for _ in range(len(self._queue)):
            if self._queue:
                self._queue.popleft()()
                self._process.check()
        while self._due():
            heapq.heappop(self._alarms)[2]()
            self._process.check()

    def close(self) -> None:
        """Nothing is held."""


class Bell(Doorbell):
    """One direction of a channel's doorbells: what is rung before the other side listens is heard when it does."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self._name = name
        self.fd = -1
        self._rung = False
        self._listener: tuple[Process, Callable[[], None]] | None = None

    def ring(self) -> None:
        """Notify: the plan may lose, double or delay that."""
        for delay in self._machine.injector.notification(self._name):
            self._machine.scheduler.after(self._machine.latency() + delay, self._arrive)

    def listen(self, process: Process, callback: Callable[[], None]) -> None:
        """Whom it wakes."""
        self._listener = (process, callback)
        if self._rung:
            self._arrive()

    def _arrive(self) -> None:
        if self._listener is None:
            self._rung = True
            return
        self._rung = False
        process, callback = self._listener
        if process.alive:
            process.reactor.soon(callback)

    def take(self) -> bool:
        return True

    def close(self) -> None:
        self._listener = None


class SimDeviceBell(DeviceBell):
    """A doorbell page of a device."""

    def __init__(
        self,
        words: memoryview,
        rung: Callable[[], None],
        pause: Callable[[], None],
        bar: int,
        offset: int,
        length: int,
    ) -> None:
        self._pause = pause
        self._bar, self._offset, self._length = bar, offset, length
        self._words = words
        self._ring = rung

    def put(self, offset: int, size: int, value: int) -> None:
        self._pause()
        self._words[(offset - self._offset) >> 2] = value

    def ring(self) -> None:
        self._ring()

    def close(self) -> None:
        """Nothing is held."""


class SimDomain(NativeDomain):
    """The product's library for native domains; what comes by descriptors in a machine of processes comes by number here."""

    def __init__(self, process: Process) -> None:
        # Not super().__init__: that makes sockets. Everything else of it is here.
        self.process = process
        self.reactor = process.reactor
        self.link = process.link
        self.link.on_message = self._message
        self.domid = process.domid
        self.memory = None
        self.ram_frames = 0
        self.shared_info = Mfn(0)
        self._p2m = {}
        self._device_bells = {}
        self.devices = set()
        self.on_device = None
        self.known_channels = []
        self._windows = {}
        self._superseded = {}
        self._attached = {}
        self._channels = {}
        self._early_raises = set()
        self._granting = None
        self._next_foreign = 1 << 20
        self._dma_next = 1 << 21
        self._dma_free = []
        self.foreign_extents = {}

        def nothing(order: Order, fds: list[int]) -> bytes:
            return b""

        self.on_order = {
            "extent": self._extent,
            "build_extent": self._build_extent,
            "drop_extent": nothing,
            "memory": self._memory_news,
            "own_windows": self._own_windows,
            "channels": self._known_channels,
            "stop": self._stop,
            "grant_map": self._grant_map,
            "grant_unmap": self._grant_unmap,
            "grant_attach": self._grant_attach,
            "grant_detach": self._grant_detach,
            "doorbell": self._doorbell,
            "doorbell_off": self._doorbell_off,
            "device_attached": self._device_attached,
            **dict.fromkeys(("configure", "drop_code", "loop", "start", "pause", "resume"), nothing),
        }

    def notify(self, port: Port) -> None:
        self.process.pause()
        super().notify(port)
        self.process.pause()

    def _extent(self, order: Order, fds: list[int]) -> bytes:
        body: dict[str, Any] = order.body
        self.memory = SimHostMemory(self.process.machine.memory, Mfn(body["base"]), body["frames"])
        self.ram_frames = body["ram_frames"]
        self.shared_info = Mfn(body["shared_info"])
        self._granting = Granting(self.memory)
        return b""

    def _build_extent(self, order: Order, fds: list[int]) -> bytes:
        self.foreign_extents[DomId(order.body["domid"])] = (-1, order.body)
        return b""

    def _grant_attach(self, order: Order, fds: list[int]) -> bytes:
        items: Sequence[Any] = order.body["items"]
        for handle, mfn, number, _index, writable, *_ in items:
            page = self.process.machine.memory.page(Mfn(mfn))
            self._attached[handle] = (number or -1, page if writable else page.toreadonly())
        return bytes(2 * len(items))

    def _grant_detach(self, order: Order, fds: list[int]) -> bytes:
        for handle, *_ in order.body["items"]:
            self._attached.pop(handle, None)
        return bytes(2 * len(order.body["items"]))

    def _doorbell(self, order: Order, fds: list[int]) -> bytes:
        port = Port(order.body["port"])
        ring, listen = self.process.machine.bells.pop(order.body["pair"])

        def early() -> None:
            self._early_raises.add(port)

        channel = self._channels.setdefault(port, _Channel(port, early))
        self._silence(channel)
        channel.ring, channel.listen = ring, listen
        listen.listen(self.process, lambda: self._rung(channel))
        return b""

    def _device_attached(self, order: Order, fds: list[int]) -> bytes:
        bdf = order.body["bdf"]
        words, rung = self.process.machine.device_pages[bdf]
        self._device_bells[bdf] = [
            SimDeviceBell(words, rung, self.process.pause, each["bar"], each["offset"], each["length"])
            for each in order.body["doorbells"]
        ]
        self.devices.add(bdf)
        if self.on_device is not None:
            call = self.on_device
            self.reactor.soon(lambda: call(bdf))
        return b""
