"""Hypercalls of HVM guests that differ from PV's: frames are named by guest frame number, the upcall is an interrupt, memory
and grants are the hypervisor's business alone (its `memory` and `grant_attach` orders change the map here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from bus.abi import event_channel as ec
from bus.abi import features, vcpu
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi.errno import XEN_EEXIST, XEN_EINVAL, XEN_ENOENT, XEN_ENOSYS, XEN_ENXIO, XEN_EOPNOTSUPP
from bus.abi.hvm import hvm_op, params
from bus.abi.hvm.hvm_vcpu import VCPU_HVM_CONTEXT
from bus.abi.hypercalls_model import MAX_FRAMES, Command, Guests, State
from bus.abi.xen import (
    DOMID_SELF,
    VCPU_INFO,
    HYPERVISOR_event_channel_op,
    HYPERVISOR_grant_table_op,
    HYPERVISOR_hvm_op,
    HYPERVISOR_memory_op,
    HYPERVISOR_vm_assist,
    VMASST_CMD_disable,
    VMASST_CMD_enable,
    VMASST_TYPE_runstate_update_flag,
)
from bus.addresses import PAGE_SIZE, DomId
from domains.hvm.cpu import HvmCpu
from domains.hvm.first_state import first_state
from domains.hvm.state import HvmState
from domains.pv.api import GuestFault
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.calls_events import CONTROL_BLOCK_ALIGNMENT, EventCalls
from domains.pv.calls_memory import of_nothing
from domains.pv.calls_other import OtherCalls
from domains.pv.calls_sched import SchedCalls
from domains.pv.calls_vcpu import VCPU_INFO_ALIGNMENT, VcpuCalls
from domains.pv.calls_version import VersionCalls
from domains.pv.events import CONTROL_BLOCK_SIZE
from domains.pv.state import VcpuState
from domains.pv.wire import Remote

HVM_FEATURES: Final = (
    1 << features.XENFEAT_memory_op_vnode_supported
    | 1 << features.XENFEAT_writable_page_tables
    | 1 << features.XENFEAT_auto_translated_physmap
    | 1 << features.XENFEAT_hvm_callback_vector
    | 1 << features.XENFEAT_hvm_safe_pvclock
    | 1 << features.XENFEAT_not_direct_mapped
)
EXTENT_SHIFT: Final = 6
EXTENTS: Final = 2048
"""Extents of one message."""
MAX_EXTENTS: Final = 1 << 24
RESERVATIONS: Final = (
    mem.XENMEM_increase_reservation,
    mem.XENMEM_decrease_reservation,
    mem.XENMEM_populate_physmap,
)
Commands = Callable[[int, int], Command | None]


class HvmVersionCalls(VersionCalls):
    """xen_version."""

    def feature_word(self, index: int) -> int | None:
        """What an auto-translated guest is told."""
        return HVM_FEATURES if index < features.XENFEAT_NR_SUBMAPS else None


class HvmSchedCalls(SchedCalls):
    """sched_op. `has_work`: an interrupt waits for the vCPU."""

    has_work: Callable[[HvmState], bool]

    def _block(self) -> int:
        cpu = self._cpu
        s = cpu.current
        assert isinstance(s, HvmState)
        if s.info >= 0:
            cpu.octets[s.info + 1] = 0
        deadline = s.deadline()
        if self.has_work(s) or (deadline is not None and self._time.now() >= deadline):
            return 0
        s.blocked = True
        cpu.vcpu.request_stop()
        return 0


class HvmVcpuCalls(VcpuCalls):
    """vcpu_op. `asserted`: a vCPU's upcall flag went up."""

    asserted: Callable[[HvmState], None]

    def _initialise(self, state: VcpuState, arg: int) -> int:
        assert isinstance(state, HvmState)
        if state.info < 0:
            return -XEN_EINVAL
        data = self._cpu.mmu.read_virtual(arg, VCPU_HVM_CONTEXT.size)
        if state.initialised:
            return -XEN_EEXIST
        first = first_state(data)
        if first is None:
            return -XEN_EINVAL
        state.first, state.sipi, state.initialised = first, None, True
        return 0

    def _register_info(self, state: VcpuState, arg: int) -> int:
        cpu = self._cpu
        assert isinstance(cpu, HvmCpu)
        assert isinstance(state, HvmState)
        layout = vcpu.VCPU_REGISTER_VCPU_INFO
        request = layout.unpack(cpu.mmu.read_virtual(arg, layout.size))
        offset = request.offset
        if offset > PAGE_SIZE - VCPU_INFO.size or offset % (4 if cpu.compat else VCPU_INFO_ALIGNMENT):
            return -XEN_ENXIO
        if state.info_registered or (state is not cpu.current and state.online):
            return -XEN_EINVAL
        page = cpu.place(request.mfn)
        if page is None:
            return -XEN_EINVAL
        place = page + offset
        octets = cpu.octets
        octets[place : place + VCPU_INFO.size] = (
            bytes(octets[state.info : state.info + VCPU_INFO.size])
            if state.info >= 0
            else bytes(VCPU_INFO.size)
        )
        state.info, state.info_registered = place, True
        # Nothing may be lost in the move: everything counts as pending.
        octets[place] = 1
        selector = slice(place + 4, place + 8) if cpu.compat else slice(place + 8, place + 16)
        octets[selector] = b"\xff" * (selector.stop - selector.start)
        self._time.update_time_info(cpu, state)
        self.asserted(state)
        return 0


class HvmEventCalls(EventCalls):
    """event_channel_op: pages of FIFO words are given by guest frame number."""

    def _fifo(self, cmd: int, command: Command, arg: int) -> int:
        cpu = self._cpu
        assert isinstance(cpu, HvmCpu)
        assert command.argument is not None
        item = command.argument.unpack(cpu.mmu.read_virtual(arg, command.argument.size))
        if cmd == ec.EVTCHNOP_expand_array and not self._events.fifo:
            return -XEN_EOPNOTSUPP
        offset = 0
        if cmd == ec.EVTCHNOP_init_control:
            page, offset = cpu.place(item.control_gfn), item.offset
            if not self._events.has_vcpu(item.vcpu):
                return -XEN_ENOENT
            if offset > PAGE_SIZE - CONTROL_BLOCK_SIZE or offset % CONTROL_BLOCK_ALIGNMENT:
                return -XEN_EINVAL
        else:
            page = cpu.place(item.array_gfn)
        if page is None:
            return -XEN_EINVAL
        rc, _ = self._remote.call_item(HYPERVISOR_event_channel_op, command, item, arg, cmd=cmd)
        if rc < 0:
            return rc
        if cmd == ec.EVTCHNOP_init_control:
            self._events.init_control(item.vcpu, page + offset)
        else:
            self._events.expand_array(page)
        return rc


class HvmOtherCalls(OtherCalls):
    """What this process does nothing about."""

    translated = True

    def _refusal(self, command: Command) -> int:
        if not command.guests & Guests.TRANSLATED:
            return -XEN_ENOSYS
        if Guests.PV not in command.guests:
            # The base class knows the rest of the rules, of commands that a PV guest has.
            return -command.refusal if command.state is State.REFUSED else 0
        return super()._refusal(command)


GRANT_COMMANDS: Final = frozenset(
    (
        gt.GNTTABOP_map_grant_ref,
        gt.GNTTABOP_unmap_grant_ref,
        gt.GNTTABOP_setup_table,
        gt.GNTTABOP_copy,
        gt.GNTTABOP_query_size,
        gt.GNTTABOP_set_version,
        gt.GNTTABOP_get_version,
        gt.GNTTABOP_swap_grant_ref,
    )
)
"""What Xen serves for an auto-translated guest."""


class HvmMemoryCalls:
    """memory_op and grant_table_op, all served by the hypervisor."""

    def __init__(
        self, cpu: HvmCpu, remote: Remote, commands: Commands, generic: Handler, grants: Handler
    ) -> None:
        self._cpu: Final = cpu
        self._remote: Final = remote
        self._commands: Final = commands
        self._generic: Final = generic
        self._grants: Final = grants
        self.guest32 = False
        """The call comes from 32-bit code: extents are 32-bit numbers."""

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_memory_op: self.memory_op, HYPERVISOR_grant_table_op: self.grant_table_op}

    def grant_table_op(self, cmd: int, uop: int, count: int, a4: int, a5: int) -> Result:
        """Mapping into the guest's physical map is done by the hypervisor's orders to this process."""
        if cmd & LOW32 not in GRANT_COMMANDS:
            return -XEN_ENOSYS
        if (count & LOW32) >> 31:
            return -XEN_EINVAL
        return self._grants(cmd, uop, count, a4, a5)

    def memory_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """Lists of extents are divided into messages; how many were done is the result, as on Xen."""
        start, number = (cmd & LOW32) >> EXTENT_SHIFT, cmd & (1 << EXTENT_SHIFT) - 1
        nothing = of_nothing(self._cpu.mmu, number, arg)
        if nothing is not None:
            return nothing
        if number not in RESERVATIONS:
            return self._generic(cmd, arg, a3, a4, a5)
        memory, layout = self._cpu.mmu, mem.XEN_MEMORY_RESERVATION
        try:
            item = layout.unpack(memory.read_virtual(arg, layout.size))
        except GuestFault:
            return start  # as whatever else is refused: none done
        if item.nr_extents > MAX_EXTENTS:
            return start
        width, done = 4 if self.guest32 else 8, start
        while done < item.nr_extents:
            count = min(EXTENTS, max(1, MAX_FRAMES >> item.extent_order), item.nr_extents - done)
            try:
                raw = memory.read_virtual(item.extent_start + width * done, width * count)
            except GuestFault:
                return done
            if self.guest32:
                raw = b"".join(raw[i : i + 4] + bytes(4) for i in range(0, len(raw), 4))
            rc, _ = self._remote.raw(
                HYPERVISOR_memory_op, number, layout.pack(item._replace(nr_extents=count)) + raw
            )
            if rc < 0:
                return done
            done += rc
            if rc != count:
                break
        return done


class HvmOps:
    """hvm_op. `set_callback` takes HVM_PARAM_CALLBACK_IRQ; `asserted` interrupts a vCPU by its upcall vector."""

    def __init__(
        self,
        cpu: HvmCpu,
        states: Sequence[HvmState],
        generic: Handler,
        domain: DomId,
        now: Callable[[], int],
        set_callback: Callable[[int], None],
        asserted: Callable[[HvmState], None],
    ) -> None:
        self._cpu: Final = cpu
        self._asserted: Final = asserted
        self._states: Final = states
        self._generic: Final = generic
        self._domain: Final = domain
        self._now: Final = now
        self._set_callback: Final = set_callback

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_hvm_op: self.hvm_op, HYPERVISOR_vm_assist: self.vm_assist}

    def vm_assist(self, cmd: int, kind: int, a3: int, a4: int, a5: int) -> Result:
        """The one assist that a translated guest can have: XEN_RUNSTATE_UPDATE around updates of its run-state areas, which changes
        nothing here (`Timekeeper.write_runstate_area`). -EINVAL for any other."""
        if kind & LOW32 != VMASST_TYPE_runstate_update_flag:
            return -XEN_EINVAL
        if cmd & LOW32 == VMASST_CMD_enable:
            self._cpu.assists |= 1 << VMASST_TYPE_runstate_update_flag
        elif cmd & LOW32 == VMASST_CMD_disable:
            self._cpu.assists &= ~(1 << VMASST_TYPE_runstate_update_flag)
        else:
            return -XEN_ENOSYS
        return 0

    def hvm_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """Parameters are kept by the hypervisor; the callback is acted on here."""
        cmd &= LOW32
        memory = self._cpu.mmu
        if cmd == hvm_op.HVMOP_set_evtchn_upcall_vector:
            layout = hvm_op.XEN_HVM_EVTCHN_UPCALL_VECTOR
            return self._upcall_vector(layout.unpack(memory.read_virtual(arg, layout.size)))
        if cmd == hvm_op.HVMOP_get_time:
            memory.write_virtual(arg, hvm_op.XEN_HVM_GET_TIME.pack(hvm_op.xen_hvm_get_time(self._now())))
            return 0
        if cmd == hvm_op.HVMOP_flush_tlbs:
            self._cpu.flush_tlb()
            return 0 if not arg else -XEN_EINVAL
        rc = self._generic(cmd, arg, a3, a4, a5)
        if cmd == hvm_op.HVMOP_set_param and rc == 0:
            layout_param = hvm_op.XEN_HVM_PARAM
            item = layout_param.unpack(memory.read_virtual(arg, layout_param.size))
            if item.domid in (DOMID_SELF, self._domain) and item.index_ == params.HVM_PARAM_CALLBACK_IRQ:
                self._set_callback(item.value)
        return rc

    def _upcall_vector(self, item: Any) -> int:
        if item.vcpu >= len(self._states):
            return -XEN_ENOENT
        if item.vector < 0x10:
            return -XEN_EINVAL
        state = self._states[item.vcpu]
        state.upcall_vector = item.vector
        self._asserted(state)  # the upcall flag may have gone up before: as on Xen nothing is lost
        return 0
