"""A PV guest's process: orders of the hypervisor, events, and the loop that runs the vCPUs."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any, Final

from bus import trace_page
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT
from bus.abi.domctl import XEN_DOMCTL_SENDTRIGGER_NMI
from bus.abi.errno import XEN_EACCES, XEN_EINVAL, XEN_ENODATA, XEN_ENOSYS
from bus.abi.hypercalls import HYPERCALLS, names
from bus.abi.sched import SHUTDOWN_crash
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, DomId, MachineAddr, Mfn, Port, VcpuId
from bus.credentials import from_descriptor
from bus.doorbell import Doorbell
from bus.link import DomainLink
from bus.messages.domain import Hello, Order, Raised, Report
from bus.messages.envelope import Message
from bus.packets import close_all
from bus.process import Start
from bus.trace import Kind
from domains.domu.ear import Ear
from domains.domu.granted import GrantedWindows
from domains.domu.lease import Lease
from domains.domu.pv_hardware import PvHardware
from domains.domu.rest import Rest
from domains.domu.upstream import BusUpstream
from domains.domu.wallclock import WallClock
from domains.granting import Granting
from domains.hostmem import HostMemory
from domains.pv.calls_version import Identity
from domains.pv.domain import DomainConfig, PvDomain
from domains.pv.frames import DomainFrames
from domains.pv.msr import hypercall_page
from domains.pv.time import count_nanoseconds
from domains.pv.xenmap import XenMap
from domains.vcpu.api import PvTraps, PvVcpu
from domains.vcpu.unicorn_vcpu import UnicornVcpu

MAX_MFN: Final = 1 << 24
"""The machine-to-physical table covers this many frames (hypervisor.core.config.MachineConfig.mfn_limit)."""
IDLE_S: Final = 60.0
YIELD_BOUND_NS: Final = 10_000_000
Handler = Callable[[Order, list[int]], tuple[int, bytes]]


class PvProcess:
    """One guest. Everything happens on one thread; the ear only rings."""

    def __init__(self, start: Start) -> None:
        """Connects and says hello."""
        import socket

        self.link = DomainLink(
            from_descriptor(start.fds["keys"]), socket.socket(fileno=start.fds["descriptors"])
        )
        self.link.on_message = self._message
        self.link.before_return = self._drop_stale
        self.upstream = BusUpstream(self.link)
        self.upstream.deliver = self._deliver
        self.upstream.before_shutdown = self._report_counters
        self._events = 0
        self._trace, _ = trace_page.of_process(start.fds)
        self.upstream.trace = self._trace
        self.upstream.vcpu = self._running
        self.domid = DomId(start.domain)
        self.memory: HostMemory | None = None
        self.frames: DomainFrames | None = None
        self.domain: PvDomain | None = None
        self._granting: Granting | None = None
        self._max_vcpus = 1
        self._handle = bytes(16)
        self._rest = Rest()
        self._shared_info = Mfn(0)
        self._m2p: list[tuple[int, int, int]] = []
        self._listen: dict[int, tuple[Port, Doorbell]] = {}
        self._windows = GrantedWindows()
        self._attached: dict[int, tuple[int, Mfn]] = {}
        self._foreign_users: dict[Mfn, int] = {}
        self._hardware: PvHardware | None = None
        self._channels: list[list[int]] = []
        self._granted: list[Mfn] = []
        """Frames that a process before this one had granted, and that others have mapped."""
        self._ear = Ear(self._ring)
        self._ear.add(self.link.fileno())
        self._wall = WallClock()
        self._lease = Lease(lambda: self.link.send(Report(what="lease")))
        self._handlers: dict[str, Handler] = {
            "lease_page": self._lease_page,
            "lease": lambda order, fds: (0, b""),  # look at the page: the loop does
            "configure": self._configure,
            "extent": self._extent,
            "memory": self._memory,
            "set_vcpu_context": self._set_context,
            "get_vcpu_context": self._get_context,
            "hypercall_page": self._hypercall_page,
            "start": lambda order, fds: (0, b""),
            "pause": self._pause,
            "stop": self._stop,
            "resume": self._resume,
            "grant_map": self._grant_map,
            "grant_unmap": self._grant_unmap,
            "grant_attach": self._grant_attach,
            "grant_detach": self._grant_detach,
            "doorbell": self._doorbell,
            "doorbell_off": self._doorbell_off,
            "loop": self._loop,
            "trigger": self._pv_trigger,
            "own_windows": self._own_windows,
            "channels": self._known_channels,
            "device_attached": self._driver_device,
            "wallclock": lambda order, fds: self._moved(self._wall.set(order.body["ns_at_system_time_0"])),
            "time_offset": lambda order, fds: self._moved(self._wall.set_offset(order.body["seconds"])),
            "ping": lambda order, fds: (0, b""),  # the hypervisor asks for a sign of life
        }
        self.link.send(Hello(pid=os.getpid(), role=start.role))

    def _ring(self) -> None:
        domain = self.domain
        if domain is not None:
            domain.ring()

    def _running(self) -> int:
        domain = self.domain
        return domain.cpu.current.id if domain is not None else 0

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until the process is killed: that is how a domain's process ends. HypervisorGone, if the machine goes down."""
        while True:
            domain = self.domain
            if domain is not None:
                domain.cpu.vcpu.clear_bell()  # all that it can have been rung for is looked at from here on
            while self.link.dispatch():
                pass
            self._take_doorbells(self._ear.ready(0))
            domain = self.domain
            if self._hardware is not None and domain is not None:
                self._hardware.settle(domain)
            lease = self._lease
            if domain is None or domain.paused or domain.finished:
                lease.sleeping()
                self._wait(IDLE_S)
                continue
            deadline = self._monotonic(domain.next_deadline())
            if not lease.may_run():
                domain.preempted()
                self._ear.set_deadline(deadline)
                due = 0 < deadline <= time.monotonic_ns()
                if due or any(state.runnable for state in domain.states):
                    lease.ask()
                    self._ear.set_deadline(0)  # what is due is looked at when it runs again
                else:
                    lease.sleeping()
                if not lease.may_run():
                    self._wait(IDLE_S)
                continue
            self._drop_stale()
            self._ear.set_deadline(min((t for t in (deadline, lease.end) if t), default=0))
            self._ear.arm()
            lease.running()
            began = time.thread_time_ns()
            watched = time.monotonic_ns() if self._trace.on[0] else 0
            outcome = domain.run_slice()
            lease.ran(domain.cpu.current.id, time.thread_time_ns() - began)
            if watched:
                spent = time.monotonic_ns() - watched
                self._trace.add(Kind.RUN, domain.cpu.current.id, 0, spent, time=watched)
            if outcome.yielded and not domain.finished:
                if lease.yielded():
                    self._wait_for_turn()
                rest = self._rest.yielded(self._events, time.monotonic_ns(), deadline)
                if rest:
                    self._ear.set_deadline(0)
                    self._wait(rest / 1e9)
                continue
            self._rest.ran()
            if not outcome.runnable and not domain.finished:
                lease.sleeping()
                self._ear.set_deadline(self._monotonic(outcome.deadline))
                self._wait(IDLE_S)

    def _wait_for_turn(self) -> None:
        """After a yield: until the hypervisor has said who goes on, which it does at once; not longer than a scheduler's slice."""
        until = time.monotonic_ns() + YIELD_BOUND_NS
        while not self._lease.answered and (left := until - time.monotonic_ns()) > 0:
            self._ear.set_deadline(0)
            self._wait(left / 1e9)

    def _monotonic(self, deadline: int | None) -> int:
        """The guest's system time as CLOCK_MONOTONIC ns."""
        if deadline is None:
            return 0
        assert self.domain is not None
        return max(1, time.monotonic_ns() + deadline - self.domain.time.now())

    def _wait(self, timeout: float) -> None:
        """Wait for something to do. Only after a receive found nothing: libzmq signals a socket's descriptor for what comes after that,
        and a send in between takes the signal away."""
        if not self.link.dispatch():
            self._take_doorbells(self._ear.ready(timeout))

    def _take_doorbells(self, fds: list[int]) -> None:
        domain = self.domain
        for fd in fds:
            if self._lease.take(fd):
                continue
            entry = self._listen.get(fd)
            if entry is not None and entry[1].take() and domain is not None:
                self._events += 1
                vcpu = VcpuId(domain.events.vcpu_of(entry[0]))
                if self._trace.on[0]:
                    self._trace.add(Kind.RECEIVE, vcpu, 0, entry[0])
                domain.deliver(entry[0], vcpu)

    # ------------------------------------------------------------------ messages

    def _message(self, message: Message) -> None:
        if isinstance(message, Raised):
            if self.domain is not None:
                self._events += len(message.events)
                for port, vcpu in message.events:
                    if self._trace.on[0]:
                        self._trace.add(Kind.RECEIVE, vcpu, 0, port)
                    self.domain.deliver(Port(port), VcpuId(vcpu))
        elif isinstance(message, Order):
            fds = self.link.descriptors_of(message)
            handler = self._handlers.get(message.what)
            if handler is None:
                close_all(fds)
                self.link.answer(message, -XEN_ENOSYS)
                return
            rc, data = handler(message, fds)
            self.link.answer(message, rc, data)

    def _lease_page(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        bell = self._lease.attach(fds)
        if bell is not None:
            self._ear.add(bell)
        return 0, b""

    def _configure(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        self._max_vcpus = order.body["max_vcpus"]
        self._handle = bytes(order.body["handle"])
        if order.body.get("driver"):
            self._hardware = PvHardware(self.link, self.upstream.console_line)
        return 0, b""

    def _moved(self, ns: int) -> tuple[int, bytes]:
        """The guest's time of day is another."""
        if self.domain is not None:
            self.domain.time_of_day_moved(ns)
        return 0, b""

    def _pv_trigger(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_SENDTRIGGER_NMI, the only one of a PV guest."""
        if self.domain is not None and order.body["trigger"] == XEN_DOMCTL_SENDTRIGGER_NMI:
            self.domain.nmi(VcpuId(order.body["vcpu"]))
        return 0, b""

    def _extent(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        body = order.body
        self.memory = HostMemory(fds[0], Mfn(body["base"]), body["frames"])
        self._shared_info = Mfn(body["shared_info"])
        self.frames = DomainFrames(
            self.memory.octets, body["base"], body["ram_frames"], shared=[body["shared_info"]]
        )
        return 0, b""

    def _memory(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """News of the domain's own memory."""
        assert self.frames is not None
        body = order.body
        for first, count in body.get("added", ()):
            mfns = range(first, first + count)
            if self.domain is not None:
                self.domain.mmu.populate_frames(mfns)
            else:
                for mfn in mfns:
                    self.frames.set_owned(Mfn(mfn), True)
        for first, count in body.get("removed", ()):
            for mfn in range(first, first + count):
                if self.domain is None:
                    self.frames.set_owned(Mfn(mfn), False)
        for pfn, mfn, count in body.get("m2p", ()):
            if self.domain is not None:
                self.domain.mmu.set_m2p(mfn, range(pfn, pfn + count))
            else:
                self._m2p.append((pfn, mfn, count))
        return 0, b""

    def _set_context(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """The builder is done with vCPU 0 (XEN_DOMCTL_setvcpucontext): its tables are validated now."""
        if order.body["vcpu"] != 0 or self.domain is not None:
            return -XEN_EINVAL, b""
        domain = self._make_domain()
        rc = domain.start(VCPU_GUEST_CONTEXT.unpack(order.body["context"]))
        for mfn in self._granted:  # as when their entries were flagged: the references go when the flags do
            rc = rc or domain.mmu.hold_for_grant(mfn, False) or domain.mmu.hold_for_grant(mfn, True)
        if rc == 0:
            self.domain = domain
        return rc, b""

    def _get_context(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_getvcpucontext."""
        context = self.domain.context(VcpuId(order.body["vcpu"])) if self.domain is not None else None
        return (0, VCPU_GUEST_CONTEXT.pack(context)) if context is not None else (-XEN_ENODATA, b"")

    def _hypercall_page(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_hypercall_init: the frame is one of this domain's, the hypervisor says."""
        mfn, domain = Mfn(order.body["mfn"]), self.domain
        if domain is not None and not domain.mmu.can_grant_writable(mfn):
            return -XEN_EACCES, b""  # a page table, say
        return self._write_page(mfn, hypercall_page())

    def _write_page(self, mfn: Mfn, page: bytes) -> tuple[int, bytes]:
        memory = self.memory
        if memory is None or not memory.base <= mfn < memory.base + memory.frames:
            return -XEN_EINVAL, b""
        at = (mfn - memory.base) << PAGE_SHIFT
        memory.octets[at : at + len(page)] = page
        self._drop_runs([(mfn, 1)])
        return 0, b""

    def _make_domain(self) -> PvDomain:
        memory, frames = self.memory, self.frames
        assert memory is not None
        assert frames is not None
        xenmap = XenMap(frames.base, frames.count, MAX_MFN, self._max_vcpus)

        def make_vcpu(traps: PvTraps) -> PvVcpu:
            vcpu = UnicornVcpu(traps)
            vcpu.map(MachineAddr(frames.base << PAGE_SHIFT), memory.address, memory.size)
            private = xenmap.private
            address = ctypes.addressof(ctypes.c_char.from_buffer(private.memory))
            vcpu.map(MachineAddr(private.base << PAGE_SHIFT), address, private.size)
            count_nanoseconds(vcpu, time.monotonic_ns, 1_000_000)
            return vcpu

        config = DomainConfig(
            self.domid,
            self._shared_info,
            MAX_MFN,
            self._max_vcpus,
            identity=Identity(handle=self._handle),
            hardware=self._hardware,
        )
        domain = PvDomain(config, frames, xenmap, make_vcpu, self.upstream, HYPERCALLS, wall=self._wall)
        domain.calls.trace = self._trace
        for pfn, mfn, count in self._m2p:
            domain.mmu.set_m2p(mfn, range(pfn, pfn + count))
        self._m2p.clear()
        for port, _, vcpu, *_ in self._channels:
            domain.events.bind(port, vcpu)
        self._granting = Granting(
            memory, domain.mmu.hold_for_grant, domain.mmu.release_from_grant, domain.cpu.drop_code
        )
        return domain

    def _pause(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self.domain is not None:
            if order.body["paused"]:
                self.domain.pause()
                self.link.send(
                    Report(what="counters", body=self.counters())
                )  # of a paused guest they are current
            else:
                self.domain.unpause()
            self.domain.ring()
        return 0, b""

    def _stop(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self.domain is not None:
            self.domain.life.shutdown_code = order.body["reason"]
            self.domain.ring()
        return 0, b""

    def _resume(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self.domain is not None:
            self.domain.life.resume()
            self.domain.update_clocks()
        return 0, b""

    # ------------------------------------------------------------------ event channels

    def _doorbell(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        port = Port(order.body["port"])
        self._silence(port)
        if len(fds) > 1:  # an interrupt is only listened to
            self.upstream.doorbells[port] = Doorbell(fds[0])
        listen = Doorbell(fds[-1])
        self._listen[listen.fd] = (port, listen)
        self._ear.add(listen.fd)
        return 0, b""

    def _loop(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """A channel both ends of which are this domain's."""
        self.upstream.loops[order.body["port"]] = Port(order.body["other"])
        return 0, b""

    def _drop_stale(self) -> None:
        """Others wrote to frames: what was translated from them is dropped. Before guest code runs, and before it goes on after anything
        that the hypervisor did for it."""
        runs = self._lease.take_stale()
        if runs is None:
            assert self.memory is not None
            runs = [(self.memory.base, self.memory.frames)]
        if runs:
            self._drop_runs(runs)

    def _drop_runs(self, runs: list[tuple[int, int]]) -> None:
        if self.domain is not None:
            for first, count in runs:
                self.domain.vcpu.drop_code(MachineAddr(first << PAGE_SHIFT), count << PAGE_SHIFT)

    def counters(self) -> dict[str, Any]:
        """What the guest did, for the record of a run: hypercalls by name, exceptions by vector, events delivered."""
        domain = self.domain
        if not isinstance(domain, PvDomain):
            return {"events": self._events}
        table = names()
        hypercalls = {
            table.get(number, str(number)): count for number, count in enumerate(domain.calls.counts) if count
        }
        exceptions = {str(vector): count for vector, count in enumerate(domain.traps.exceptions) if count}
        return {"hypercalls": hypercalls, "exceptions": exceptions, "events": self._events}

    def _report_counters(self, reason: int) -> None:
        domain = self.domain
        if isinstance(domain, PvDomain) and reason == SHUTDOWN_crash:
            domain.tell_crash()  # before the toolstack hears of the end, and looks for the reason
        self.link.send(Report(what="counters", body=self.counters()))

    def _deliver(self, port: Port) -> None:
        if self.domain is not None:
            self.domain.deliver(port, VcpuId(self.domain.events.vcpu_of(port)))

    def _doorbell_off(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        port = Port(order.body["port"])
        self._silence(port)
        self.upstream.loops.pop(port, None)
        return 0, b""

    def _silence(self, port: Port) -> None:
        ring = self.upstream.doorbells.pop(port, None)
        if ring is not None:
            ring.close()
        for fd, (owner, bell) in list(self._listen.items()):
            if owner == port:
                if bell.take() and self.domain is not None:  # rung before it was taken away
                    self.domain.deliver(port, VcpuId(self.domain.events.vcpu_of(port)))
                self._ear.remove(fd)
                bell.close()
                del self._listen[fd]

    # ------------------------------------------------------------------ a driver domain

    def _driver_device(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self._hardware is None:
            close_all(fds)
            return -XEN_EINVAL, b""
        self._hardware.attached(order.body, fds)
        return 0, b""

    def _own_windows(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """In place of a process that ended: frames that the domain granted are found in windows."""
        assert self.memory is not None
        by_number = dict(zip(order.body["windows"], fds, strict=True))
        for mfn, number, index in order.body["frames"]:
            self.memory.find_in_window(Mfn(mfn), by_number[number], index)
            self._granted.append(Mfn(mfn))
        close_all(fds)
        return 0, b""

    def _known_channels(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """In place of a process that ended: the event channels that the domain has."""
        self._channels += order.body["channels"]
        return 0, b""

    # ------------------------------------------------------------------ grants

    def _granting_side(self) -> Granting:
        if self._granting is None:
            assert self.memory is not None
            self._granting = Granting(self.memory)
        return self._granting

    def _grant_map(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        return 0, self._granting_side().grant_map(order.body, fds)

    def _grant_unmap(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        return 0, self._granting_side().grant_unmap(order.body)

    def _grant_attach(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """Make granted frames reachable, each at its MFN; the page-table entries follow when the hypercall returns."""
        domain, frames = self.domain, self.frames
        assert domain is not None
        assert frames is not None
        items: list[Any] = order.body["items"]
        self._windows.take(order.body, fds)
        for handle, mfn_number, number, index, writable, _address, _flags, granter in items:
            mfn = Mfn(mfn_number)
            self._attached[handle] = (number, mfn)
            window = self._windows.use(number)
            if window is None:
                continue  # a frame of its own
            self._foreign_users[mfn] = self._foreign_users.get(mfn, 0) + 1
            known = frames.foreign(mfn)
            if known is not None:  # mapped before: a read-only mapping takes nothing from a writable one
                frames.remove_foreign(mfn)
            can_write = bool(writable) or (known is not None and known[1])
            frames.add_foreign(mfn, DomId(granter), window.page(index), writable=can_write)
            domain.vcpu.map(
                MachineAddr(mfn << PAGE_SHIFT),
                window.address + (index << PAGE_SHIFT),
                PAGE_SIZE,
                writable=can_write,
            )
        return 0, bytes(2 * len(items))

    def _grant_detach(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        domain, frames = self.domain, self.frames
        assert domain is not None
        assert frames is not None
        items: list[Any] = order.body["items"]
        for handle, *_ in items:
            number, mfn = self._attached.pop(handle, (-1, Mfn(0)))
            if mfn not in self._foreign_users:
                continue  # a frame of its own, or nothing
            self._foreign_users[mfn] -= 1
            if not self._foreign_users[mfn]:
                del self._foreign_users[mfn]
                frames.remove_foreign(mfn)
                domain.vcpu.unmap(MachineAddr(mfn << PAGE_SHIFT), PAGE_SIZE)
            self._windows.leave(number)
        return 0, bytes(2 * len(items))

    def report_failure(self, error: BaseException) -> None:
        """Last words of a process that cannot go on."""
        self.link.send(Report(what="failed", body={"error": repr(error)[:1000]}))
        self.link.close()
