"""HYPERVISOR_sched_op: yield, block and poll are done here; shutdown, watchdog and the rest by the hypervisor (sched.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import unpack
from typing import Final

from bus.abi.errno import XEN_EINVAL, XEN_ENOSYS
from bus.abi.hypercalls_model import Command, State
from bus.abi.sched import (
    SCHED_POLL,
    SCHED_SHUTDOWN,
    SCHEDOP_block,
    SCHEDOP_poll,
    SCHEDOP_shutdown,
    SCHEDOP_yield,
)
from bus.abi.xen import HYPERVISOR_sched_op, HYPERVISOR_sched_op_compat
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.events import EventChannels
from domains.pv.life import Life
from domains.pv.time import Timekeeper
from domains.pv.wire import Remote

MAX_POLL_PORTS: Final = 128


class SchedCalls:
    """See the module. `commands` finds an entry of the table of hypercalls."""

    def __init__(
        self,
        cpu: Cpu,
        time: Timekeeper,
        events: EventChannels,
        life: Life,
        remote: Remote,
        commands: Callable[[int, int], Command | None],
    ) -> None:
        self._cpu = cpu
        self._time = time
        self._events = events
        self._life = life
        self._remote = remote
        self._commands = commands

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_sched_op: self.sched_op, HYPERVISOR_sched_op_compat: self.sched_op_compat}

    def sched_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for an unknown command."""
        cmd &= LOW32
        if cmd == SCHEDOP_block:
            return self._block()
        if cmd == SCHEDOP_yield:
            self._cpu.yielded = True
            self._cpu.vcpu.request_stop()
            return 0
        if cmd == SCHEDOP_poll:
            return self._poll(arg)
        if cmd == SCHEDOP_shutdown:
            data = self._cpu.mmu.read_virtual(arg, SCHED_SHUTDOWN.size)
            return self._life.shutdown(SCHED_SHUTDOWN.unpack(data).reason & 0xFF)
        command = self._commands(HYPERVISOR_sched_op, cmd)
        if command is None:
            return -XEN_ENOSYS
        if command.state is State.REFUSED:
            return -command.refusal
        return self._remote.call(HYPERVISOR_sched_op, command, arg)

    def sched_op_compat(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """The call as it was before Xen 3.0.2: yield, block, and shutdown with the reason as argument."""
        cmd &= LOW32
        if cmd == SCHEDOP_shutdown:
            return self._life.shutdown(arg & 0xFF)
        if cmd in (SCHEDOP_block, SCHEDOP_yield):
            return self.sched_op(cmd, arg, a3, a4, a5)
        return -XEN_ENOSYS

    def _block(self) -> int:
        """Upcalls are enabled; with one pending, or an NMI, the vCPU goes on."""
        cpu = self._cpu
        s = cpu.current
        cpu.octets[s.info + 1] = 0
        if cpu.octets[s.info] or s.nmi_pending:
            return 0
        deadline = s.deadline()
        if deadline is not None and self._time.now() >= deadline:
            return 0
        s.blocked = True
        cpu.vcpu.request_stop()
        return 0

    def _poll(self, arg: int) -> int:
        """-EINVAL: over 128 ports, or one that cannot exist. Returns when a port of the list is pending, an event is to be
        delivered, or the timeout (absolute system time, 0 for none) has passed; always 0."""
        cpu = self._cpu
        memory = cpu.mmu
        request = SCHED_POLL.unpack(memory.read_virtual(arg, SCHED_POLL.size))
        if request.nr_ports > MAX_POLL_PORTS:
            return -XEN_EINVAL
        count = request.nr_ports
        ports = unpack(f"<{count}I", memory.read_virtual(request.ports, 4 * count)) if count else ()
        s = cpu.current
        info = s.info
        if cpu.octets[info] and not cpu.octets[info + 1]:
            return 0
        for port in ports:
            if not self._events.exists(port):
                return -XEN_EINVAL
            if self._events.is_pending(port):
                return 0
        if request.timeout:
            if self._time.now() >= request.timeout:
                return 0
            s.poll_deadline = request.timeout
        s.poll_ports = ports
        s.blocked = True
        cpu.vcpu.request_stop()
        return 0
