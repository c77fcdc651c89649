"""HYPERVISOR_vcpu_op and HYPERVISOR_set_timer_op: bringing vCPUs up and down, timers, vcpu_info placement, run states (vcpu.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT
from bus.abi.errno import XEN_EEXIST, XEN_EFAULT, XEN_EINVAL, XEN_ENOENT, XEN_ENOSYS, XEN_ENXIO
from bus.abi.sched import SHUTDOWN_poweroff
from bus.abi.vcpu import (
    VCPU_REGISTER_RUNSTATE_MEMORY_AREA,
    VCPU_REGISTER_TIME_MEMORY_AREA,
    VCPU_REGISTER_VCPU_INFO,
    VCPU_RUNSTATE_INFO,
    VCPU_SET_PERIODIC_TIMER,
    VCPU_SET_SINGLESHOT_TIMER,
    VCPUOP_down,
    VCPUOP_get_physid,
    VCPUOP_get_runstate_info,
    VCPUOP_initialise,
    VCPUOP_is_up,
    VCPUOP_register_runstate_memory_area,
    VCPUOP_register_vcpu_info,
    VCPUOP_register_vcpu_time_memory_area,
    VCPUOP_send_nmi,
    VCPUOP_set_periodic_timer,
    VCPUOP_set_singleshot_timer,
    VCPUOP_stop_periodic_timer,
    VCPUOP_stop_singleshot_timer,
    VCPUOP_up,
)
from bus.abi.xen import VCPU_INFO, HYPERVISOR_set_timer_op, HYPERVISOR_vcpu_op
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.context import start_vcpu
from domains.pv.cpu import Cpu
from domains.pv.debugreg import hypervisor_range
from domains.pv.life import Life
from domains.pv.state import VcpuState
from domains.pv.time import Timekeeper, idle_runstate

MIN_PERIOD_NS: Final = 1_000_000
MAX_PERIOD_NS: Final = (1 << 63) - 1
FAR_FUTURE_NS: Final = 1 << 50
"""A timeout further away than this is taken for a wrapped one, as by Xen: it fires in 100 ms."""
WRAPPED_TIMEOUT_NS: Final = 100_000_000
VCPU_INFO_ALIGNMENT: Final = VCPU_INFO.align


class VcpuCalls:
    """See the module. `free_type` tells whether a frame may be written by Xen for the guest (no page table)."""

    def __init__(self, cpu: Cpu, states: Sequence[VcpuState], time: Timekeeper, life: Life) -> None:
        self._cpu = cpu
        self._states = states
        self._time = time
        self._life = life

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_vcpu_op: self.vcpu_op, HYPERVISOR_set_timer_op: self.set_timer_op}

    def set_timer_op(self, timeout: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """Single-shot timer of the calling vCPU at an absolute system time in ns; 0 stops it."""
        s = self._cpu.current
        if timeout == 0:
            s.singleshot = None
            return 0
        now = self._time.now()
        if timeout >= 1 << 63 or timeout - now >= FAR_FUTURE_NS:
            timeout = now + WRAPPED_TIMEOUT_NS
        s.singleshot = timeout
        return 0

    def vcpu_op(self, cmd: int, vcpuid: int, arg: int, a4: int, a5: int) -> Result:
        """-ENOENT: no such vCPU. -ENOSYS: no such command."""
        cmd &= LOW32
        vcpuid &= LOW32
        states = self._states
        if vcpuid >= len(states):
            return -XEN_ENOENT
        state = states[vcpuid]
        current = self._cpu.current
        if cmd == VCPUOP_set_singleshot_timer:  # the busiest one
            return self._set_singleshot(state, arg)
        if cmd == VCPUOP_stop_singleshot_timer:
            if state is not current:
                return -XEN_EINVAL
            state.singleshot = None
            return 0
        if cmd == VCPUOP_is_up:
            return int(state.online)
        if cmd == VCPUOP_get_runstate_info:
            self._cpu.mmu.write_virtual(arg, VCPU_RUNSTATE_INFO.pack(self._time.runstate_info(state)))
            return 0
        if cmd == VCPUOP_set_periodic_timer:
            return self._set_periodic(state, arg)
        if cmd == VCPUOP_stop_periodic_timer:
            state.periodic_period = 0
            return 0
        if cmd == VCPUOP_register_vcpu_info:
            return self._register_info(state, arg)
        if cmd == VCPUOP_register_runstate_memory_area:
            return self._register_runstate(state, arg)
        if cmd == VCPUOP_register_vcpu_time_memory_area:
            return self._register_time(state, arg)
        if cmd == VCPUOP_initialise:
            return self._initialise(state, arg)
        if cmd == VCPUOP_up:
            return self._up(state)
        if cmd == VCPUOP_down:
            return self._down(state)
        if cmd == VCPUOP_send_nmi:
            if arg:
                return -XEN_EINVAL
            state.nmi_pending = True
            state.wake()
            return 0
        if cmd == VCPUOP_get_physid:
            return -XEN_EINVAL  # only vCPUs of the hardware domain are pinned for good
        return -XEN_ENOSYS

    # --- timers

    def _set_singleshot(self, state: VcpuState, arg: int) -> int:
        if state is not self._cpu.current:
            return -XEN_EINVAL
        data = self._cpu.mmu.read_virtual(arg, VCPU_SET_SINGLESHOT_TIMER.size)
        timeout = int.from_bytes(data[:8], "little")
        # VCPU_SSHOTTMR_future changes nothing in Xen 4.17: a time that is past fires at once.
        state.singleshot = timeout
        return 0

    def _set_periodic(self, state: VcpuState, arg: int) -> int:
        period = VCPU_SET_PERIODIC_TIMER.unpack(
            self._cpu.mmu.read_virtual(arg, VCPU_SET_PERIODIC_TIMER.size)
        ).period_ns
        if not MIN_PERIOD_NS <= period <= MAX_PERIOD_NS:
            return -XEN_EINVAL
        state.periodic_period = period
        state.periodic_next = self._time.now() + period
        return 0

    # --- memory areas

    def _register_info(self, state: VcpuState, arg: int) -> int:
        """Once a vCPU; the structure must not cross the page, which must be the domain's and of no special type."""
        cpu = self._cpu
        request = VCPU_REGISTER_VCPU_INFO.unpack(cpu.mmu.read_virtual(arg, VCPU_REGISTER_VCPU_INFO.size))
        offset = request.offset
        if offset > PAGE_SIZE - VCPU_INFO.size or offset % VCPU_INFO_ALIGNMENT:
            return -XEN_ENXIO
        if state.info_registered:
            return -XEN_EINVAL
        if state is not cpu.current and state.online:
            return -XEN_EINVAL
        mfn = Mfn(request.mfn)
        # A writable reference, as that of a grant, for as long as the domain lives.
        if cpu.mmu.hold_for_grant(mfn, True):
            return -XEN_EINVAL
        place = (mfn - cpu.base << PAGE_SHIFT) + offset
        octets = cpu.octets
        if state.info >= 0:
            octets[place : place + VCPU_INFO.size] = bytes(octets[state.info : state.info + VCPU_INFO.size])
        else:
            octets[place : place + VCPU_INFO.size] = bytes(VCPU_INFO.size)
            octets[place + 1] = 1
        state.info = place
        state.info_registered = True
        # Nothing may be lost in the move: everything counts as pending.
        octets[place] = 1
        cpu.words[(place >> 3) + 1] = (1 << 64) - 1
        self._time.update_time_info(cpu, state)
        return 0

    def _register_runstate(self, state: VcpuState, arg: int) -> int:
        request = VCPU_REGISTER_RUNSTATE_MEMORY_AREA.unpack(
            self._cpu.mmu.read_virtual(arg, VCPU_REGISTER_RUNSTATE_MEMORY_AREA.size)
        )
        if hypervisor_range(request.addr):
            return -XEN_EFAULT
        state.runstate_area = request.addr
        if request.addr:
            self._time.write_runstate_area(self._cpu, state)
        return 0

    def _register_time(self, state: VcpuState, arg: int) -> int:
        request = VCPU_REGISTER_TIME_MEMORY_AREA.unpack(
            self._cpu.mmu.read_virtual(arg, VCPU_REGISTER_TIME_MEMORY_AREA.size)
        )
        if hypervisor_range(request.addr):
            return -XEN_EFAULT
        state.time_area = request.addr
        self._time.update_time_info(self._cpu, state)
        if request.addr:
            self._time.write_time_area(self._cpu, state)
        return 0

    # --- life

    def _initialise(self, state: VcpuState, arg: int) -> int:
        if state.info < 0:
            return -XEN_EINVAL  # beyond the 32 of the shared info, and none registered
        data = self._cpu.mmu.read_virtual(arg, VCPU_GUEST_CONTEXT.size)
        if state.initialised:
            return -XEN_EEXIST
        return start_vcpu(self._cpu, state, VCPU_GUEST_CONTEXT.unpack(data))

    def _up(self, state: VcpuState) -> int:
        if not state.initialised:
            return -XEN_EINVAL
        if not state.online:
            state.online = True
            self._time.set_runstate(state, idle_runstate(state))
            if state.info >= 0:
                self._time.update_time_info(self._cpu, state)
            self._life.vcpu_changed(state.id, True)
        return 0

    def _down(self, state: VcpuState) -> int:
        """The last vCPU that is up takes the domain with it (SHUTDOWN_poweroff)."""
        others = any(other.online for other in self._states if other is not state)
        if not others:
            self._life.shutdown(SHUTDOWN_poweroff)
            return 0
        if state.online:
            state.online = False
            self._time.set_runstate(state, idle_runstate(state))
            self._life.vcpu_changed(state.id, False)
            if state is self._cpu.current:
                self._cpu.vcpu.request_stop()
        return 0
