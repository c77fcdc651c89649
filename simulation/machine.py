"""The hypervisor's simulated shell: what `hypervisor.shell.server` does with sockets, done with queues."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

from bus.abi import grant_table as gt
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.memory import XENMEM_resource_grant_table
from bus.abi.xen import HYPERVISOR_grant_table_op
from bus.addresses import Bdf, DomId, Mfn
from bus.messages.device import FROM_ANY_DOMAIN, FROM_DEVICE, TO_DEVICE, Attach, DeviceAccess, Plug
from bus.messages.domain import Hypercall, HypercallReply, Order, OrderDone, Raised
from bus.messages.envelope import Message, Registry, decode, encode
from hypervisor.core import effects as fx
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.devices import DeviceService
from hypervisor.core.grant_calls import GrantCalls
from hypervisor.core.grants import GrantTables
from hypervisor.core.invariants import InvariantChecker
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import DmaService
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.pool import XenPool
from simulation.device import Device, SimMedia
from simulation.injector import Injector
from simulation.memory import SimMemory, SimStaging
from simulation.process import Bell, Process, SimDomain
from simulation.scheduler import Scheduler

STAGING: Final = 1 << 19
OVERTAKEN_NS: Final = 50_000_000
"""So long a message waits to be overtaken, at most."""
ROLES: Final = {0: "dom0", 1: "domio", 2: "guest"}
NAMES: Final = {
    (number, command.number): command.name.lower()
    for number, call in HYPERCALLS.items()
    if call is not None
    for command in call.commands
}
Body = Callable[[SimDomain], None]


class Machine:
    """Hypervisor core, processes, one disk; time, chance and faults."""

    def __init__(self, sectors: int, bodies: dict[str, Body], *, encoded: bool) -> None:
        """`bodies`: what the process of each role runs. `encoded`: each message goes through its encoding, as on a real link; else the
        validated object is passed on."""
        self.rng: Final = random.Random(0)
        self.encoded: Final = encoded
        self._random: Final = self.rng.random
        self.scheduler: Final = Scheduler()
        self.injector: Final = Injector(self)
        self.bodies: Final = bodies
        self.memory: Final = SimMemory()
        self.media: Final = SimMedia(sectors, random.Random(0))
        self.processes: dict[DomId, Process] = {}
        self.all_processes: list[Process] = []
        self.device: Device | None = None
        self.device_pages: dict[int, tuple[memoryview, Callable[[], None]]] = {}
        self.bells: dict[int, tuple[Bell, Bell]] = {}
        self.lines: list[tuple[int, str]] = []
        """The trace: when, and what."""
        self._asides: Final[set[int]] = set()
        """Of these lines, by index: only for a reader."""
        self.keep_trace = False
        self.on_power_cut: list[Callable[[Sequence[int]], None]] = []
        self.on_device_ended: Callable[[int], None] | None = None
        self._pairs: Final = itertools.count(1)
        self._bundles: Final = itertools.count(1)
        self._lives: dict[str, int] = defaultdict(int)
        self._slowest, self._quick = 2_000, 1.0
        """The longest that a message takes (ns), and how probable it is that an answer comes before anything else happens."""
        self._pauses = 0.0
        """How probable it is that a process loses its CPU where it may (Process.pause)."""
        self._tick_at = 0
        memory = self.memory
        config = MachineConfig(total_pages=1 << 14, mfn_limit=1 << 18, mfn_holes=(), xenheap_frames=32)
        core = self.core = HypervisorCore(memory, config)
        iommu = Iommu(memory, XenPool(memory, Mfn(config.mfn_limit), 256))
        self.grants: Final = GrantTables(core.frames, core.views, memory, core.outbox, iommu)
        calls = GrantCalls(self.grants, core.dispatcher, core.outbox)
        core.attach_hooks(calls)
        core.physmap.grant_frame = calls.physmap_frame
        core.memory_ops.resources[XENMEM_resource_grant_table] = calls.resource

        def written(mfn: Mfn, count: int) -> None:
            for owner, first, frames in core.frames.owners(mfn, count):
                core.views.frame_written(owner, Mfn(first), frames)

        dma = DmaService(iommu, self.grants, written, self._interrupt)
        self.devices: Final = DeviceService(
            iommu,
            dma,
            core.physdev,
            core.domains,
            core.events,
            core.outbox,
            core.dispatcher,
            core.frames,
            core.news,
        )
        core.attach_hooks(self.devices)
        self.checker: Final = InvariantChecker(core)
        self.checker.add_references(self.grants.references)
        core.create_dom0(self.now, max_pages=64)
        self.apply()

    def begin(self, seed: int) -> None:
        """From here on chance is the seed's: until then all seeds are alike."""
        self.rng.seed(seed)
        self.media.seed(seed ^ 0x5EED)
        self._slowest = self.rng.choice((2_000, 20_000, 300_000))
        self._quick = self.rng.choice((0.5, 0.9, 1.0))
        self._pauses = self.rng.choice((0.0, 0.02, 0.1))

    @property
    def now(self) -> int:
        """Nanoseconds."""
        return self.scheduler.now

    def lives(self, role: str) -> int:
        """How many processes of that role have been started."""
        return self._lives[role]

    def idle(self) -> bool:
        """Whether all processes are there, and each waits, for nothing in particular."""
        running = self.processes
        return len(running) == len(ROLES) and all(one.alive and one.reactor.waits for one in running.values())

    # ------------------------------------------------------------------ chance

    def latency(self) -> int:
        """How long a message takes, ns."""
        return int(500 + self._random() * self._slowest)

    def pause(self) -> int:
        """For how long a process loses its CPU now, ns: mostly 0; else a microsecond to two milliseconds, and short ones as often as long."""
        if not self._pauses or self._random() >= self._pauses:
            return 0
        return int(1000 * 2 ** (11 * self._random()))

    def quick(self) -> bool:
        """Whether the answer to a call comes before anything else happens."""
        return self._random() < self._quick

    def through(self, message: Message, kinds: Registry) -> Message:
        """The message as it comes out at the other end of its link: encoded and decoded if the machine is `encoded`."""
        return decode(encode(message), kinds) if self.encoded else message

    def digest(self) -> str:
        """SHA-256 of the trace, in hexadecimal: of all but what is in it only for a reader."""
        asides = self._asides
        lines = [line for at, line in enumerate(self.lines) if at not in asides] if asides else self.lines
        return hashlib.sha256(repr(lines).encode()).hexdigest()

    def text(self) -> list[str]:
        """The trace in lines."""
        return [f"{when} {what}" for when, what in self.lines]

    def trace(self, text: str) -> None:
        """A line of the trace."""
        self.lines.append((self.scheduler.now, text))

    def overtaken(self, release: Callable[[], None]) -> None:
        """A message waits for the next of its kind (simulation.order): for so long."""
        self.scheduler.after(OVERTAKEN_NS, release)

    # ------------------------------------------------------------------ from processes

    def from_domain(self, process: Process, message: Message) -> None:
        """A domain's process sends; the hypervisor takes it at once (what varies is when the answer comes)."""
        self.injector.link(
            process.turns_back, process.role, message, lambda: self._from_domain(process, message)
        )

    def _from_domain(self, process: Process, message: Message) -> None:
        core, domid, now = self.core, process.domid, self.now
        message = self.through(message, FROM_ANY_DOMAIN)
        if isinstance(message, Hypercall):
            name = NAMES.get((message.nr, message.cmd), f"{message.nr}.{message.cmd}")
            refusal = self.injector.hypercall(name)
            process.check()
            if refusal:
                process.post(HypercallReply.made(token=message.token, rc=refusal, data=b""))
                return
            if (
                message.nr == HYPERVISOR_grant_table_op
                and message.cmd == gt.GNTTABOP_map_grant_ref
                and self.injector.grants_short()
            ):
                process.post(HypercallReply.made(token=message.token, rc=0, data=_refused(message.data)))
                return
            process.check()
            core.call(now, domid, message.vcpu, message.token, message.nr, message.cmd, message.data)
        elif isinstance(message, OrderDone):
            if self.processes.get(domid) is process:
                core.order_done(now, domid, message.order, message.rc, message.data)
        elif isinstance(message, DeviceAccess):
            self.devices.domain_access(now, domid, message)
        elif isinstance(message, Plug):
            self._plug(message)
            process.post(HypercallReply.made(token=message.token, rc=0, data=b""))
        else:
            raise AssertionError(
                f"message {message.KIND} of domain {domid}: no program of the simulation sends that"
            )
        self.apply()

    def from_device(self, device: Device, message: Message) -> None:
        """The device's process sends."""
        self.injector.link(device.turns_back, "device", message, lambda: self._from_device(device, message))

    def _from_device(self, device: Device, message: Message) -> None:
        if device.alive and device is self.device:
            self.devices.receive(self.now, Bdf(device.bdf), self.through(message, FROM_DEVICE))
            self.apply()

    def _plug(self, plug: Plug) -> None:
        if not plug.present:
            if self.device is not None:
                self.device.alive = False
                self.device = None
            self.devices.remove(Bdf(plug.bdf))
            return
        staging = SimStaging(self.memory, STAGING)
        self.devices.plug(Bdf(plug.bdf), staging)
        self.device = Device(self, plug.bdf, self.media, staging)

    # ------------------------------------------------------------------ effects

    def apply(self) -> None:
        """Carry out what the core wants."""
        while batch := self.core.take_effects():
            for effect in batch:
                self._one(effect)
        deadline, other = self.core.next_deadline(), self.devices.next_deadline()
        if deadline is None or (other is not None and other < deadline):
            deadline = other
        if deadline is not None and (self._tick_at <= self.now or deadline < self._tick_at):
            self._tick_at = deadline
            self.scheduler.at(deadline, self._tick)

    def _tick(self) -> None:
        self.core.tick(self.now)
        self.devices.tick(self.now)
        self._tick_at = 0
        self.apply()

    def _one(self, effect: fx.Effect) -> None:
        if isinstance(effect, fx.StartProcess):
            self._start(effect.domain)
        elif isinstance(effect, fx.KillProcess):
            self.trace(f"killed domain {effect.domain}: {effect.reason}")
            self._end(effect.domain)
        elif isinstance(effect, fx.StopMachine):
            raise RuntimeError(f"the machine stops: {effect.reason}")
        elif isinstance(effect, fx.Log):
            if self.keep_trace:
                self._asides.add(len(self.lines))
                self.trace(f"log {effect.text}")
        elif isinstance(effect, fx.Bind):
            self._bind(effect)
        elif isinstance(effect, fx.ToDevice):
            self._to_device(effect)
        elif isinstance(effect, fx.BindInterrupt):
            pass  # interrupts go by messages
        elif isinstance(effect, fx.JoinModel | fx.DmaAnswer):
            raise RuntimeError("the simulation has no device models, and no DMA lanes")
        else:
            process = self.processes.get(effect.domain)
            if process is None:
                return
            if isinstance(effect, fx.Reply):
                process.post(HypercallReply.made(token=effect.token, rc=effect.rc, data=effect.data))
            elif isinstance(effect, fx.Raise):
                process.post(Raised.made(events=[(effect.port, effect.vcpu)]))
            elif isinstance(effect, fx.Order):
                self._order(process, effect)
            else:
                self._tell(process, "doorbell_off", {"port": effect.port})

    def _order(self, process: Process, order: fx.Order) -> None:
        body = order.body
        fds = [-1 - window for window, _ in order.windows]
        if fds:
            body = {**body, "windows": [window for window, _ in order.windows]}
        bundle = next(self._bundles)
        if fds:
            process.link.put_bundle(bundle, fds)
        process.post(
            Order.made(order=order.order_id, what=order.kind, body=body, descriptors=0, bundle=bundle)
        )

    def _tell(self, process: Process, what: str, body: dict[str, object]) -> None:
        process.post(Order.made(order=0, what=what, body=body, descriptors=0, bundle=0))

    def _bind(self, bind: fx.Bind) -> None:
        pair = {bind.left, bind.right}
        block = pair == {1, 2}
        to_left, to_right = (
            Bell(self, self._bell_name(block, int(domain))) for domain in (bind.left, bind.right)
        )
        for domain, port, ring, listen in (
            (bind.left, bind.left_port, to_right, to_left),
            (bind.right, bind.right_port, to_left, to_right),
        ):
            process = self.processes.get(domain)
            if process is not None:
                number = next(self._pairs)
                self.bells[number] = (ring, listen)
                self._tell(process, "doorbell", {"port": int(port), "pair": number})

    @staticmethod
    def _bell_name(block: bool, listener: int) -> str:
        if block:
            return "notify:back" if listener == 1 else "notify:front"
        return "notify:xenstore"

    def _to_device(self, effect: fx.ToDevice) -> None:
        device = self.device
        if device is None or device.bdf != effect.bdf:
            return
        message = effect.message
        if isinstance(message, Attach):
            words = memoryview(bytearray(4096)).cast("I")
            self.device_pages[device.bdf] = (words, device.ring)
            owner = self.devices.owner(effect.bdf)
            process = self.processes.get(owner) if owner is not None else None
            if process is not None:
                ranges = [
                    {"bar": bar.index, "offset": bar.doorbell_offset, "length": bar.doorbell_length}
                    for bar in device.kind.bars
                ]
                self._tell(
                    process,
                    "device_attached",
                    {"bdf": device.bdf, "epoch": message.epoch, "doorbells": ranges},
                )
        device.post(self.through(message, TO_DEVICE))

    def _interrupt(self, now: int, entry: InterruptEntry) -> None:
        for delay in self.injector.notification("interrupt"):
            if delay:
                self.scheduler.after(delay, lambda: self._raise(entry))
            else:
                self.devices.interrupt(self.now, entry)

    def _raise(self, entry: InterruptEntry) -> None:
        self.devices.interrupt(self.now, entry)
        self.apply()

    # ------------------------------------------------------------------ lives of processes

    def _start(self, domid: DomId) -> None:
        role = ROLES[int(domid)]
        self._lives[role] += 1
        process = Process(self, domid, role, self._lives[role])
        host = SimDomain(process)
        process.host = host
        self.processes[domid] = process
        self.all_processes.append(process)
        body = self.bodies[role]
        self.trace(f"start {process.thread.name}")

        def started(order: Order, fds: list[int]) -> bytes:
            process.reactor.soon(lambda: body(host))
            return b""

        host.on_order["start"] = started
        self.scheduler.spawn(process.thread, process.reactor.run)

    def _end(self, domid: DomId) -> None:
        process = self.processes.get(domid)
        if process is None or not process.alive:
            self.scheduler.after(1000, lambda: self._ended(domid, process))
            return
        self.scheduler.kill(process.thread)
        self.scheduler.after(self.rng.randrange(1000, 200_000), lambda: self._ended(domid, process))

    def _ended(self, domid: DomId, process: Process | None) -> None:
        if process is not None and self.processes.get(domid) is process:
            del self.processes[domid]
            self.core.process_ended(self.now, domid, "signal 9")
            self.apply()

    def _target(self, target: str) -> Process | Device | None:
        if target == "device":
            return self.device
        domid = next(DomId(number) for number, role in ROLES.items() if role == target)
        return self.processes.get(domid)

    def kill(self, target: str) -> None:
        """SIGKILL."""
        found = self._target(target)
        if isinstance(found, Device):
            found.alive = False
            self.scheduler.after(self.rng.randrange(1000, 200_000), lambda: self._device_gone(found))
        elif found is not None and found.alive:
            self._end(found.domid)

    def _device_gone(self, device: Device) -> None:
        if self.device is device:
            self.device = None
            self.devices.unplug(Bdf(device.bdf))
            self.apply()
            if self.on_device_ended is not None:
                self.on_device_ended(device.bdf)

    def freeze(self, target: str, span: int) -> None:
        """SIGSTOP, and SIGCONT later."""
        found = self._target(target)
        if found is not None:
            found.frozen_until = max(found.frozen_until, self.now + span)

    def slow(self, target: str, span: int, factor: float) -> None:
        """Messages to it take longer for a while."""
        found = self._target(target)
        if isinstance(found, Process):
            found.slow_until, found.slow_factor = self.now + span, factor

    def power_cut(self) -> None:
        """The disk loses power, and comes back."""
        lost = self.media.power_cut()
        for listener in self.on_power_cut:
            listener(lost)
        self.kill("device")

    # ------------------------------------------------------------------ the end

    def problems(self) -> list[str]:
        """Broken invariants of the hypervisor."""
        return [*self.checker.check(), *self.grants.check()]

    def close(self) -> None:
        """End all threads."""
        for process in self.all_processes:
            self.scheduler.reap(process.thread)


def _refused(data: bytes) -> bytes:
    layout = gt.GNTTAB_MAP_GRANT_REF
    return b"".join(
        layout.pack(layout.unpack(data, at)._replace(status=gt.GNTST_no_space))
        for at in range(0, len(data), layout.size)
    )
