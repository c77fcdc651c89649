"""An HVM or PVH domain in its process: one Unicorn vCPU object on which its vCPUs take turns, local APICs, hypercalls, events, time.

Without I/O apart from the vCPU; it has what the process's loop uses of `domains.pv.domain.PvDomain`. There is no device model:
a PVH guest of Xen has none either, apart from the local APIC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bus.abi.arch_x86 import vcpu_guest_context
from bus.abi.hvm import params
from bus.abi.hvm.save import hvm_hw_cpu
from bus.abi.hypercalls_model import Command, Hypercall
from bus.abi.sched import SHUTDOWN_crash, SHUTDOWN_poweroff, SHUTDOWN_reboot
from bus.abi.vcpu import RUNSTATE_running
from bus.abi.xen import VCPU_INFO, HYPERVISOR_grant_table_op, HYPERVISOR_hvm_op, HYPERVISOR_memory_op
from bus.addresses import PAGE_SHIFT, DomId, Mfn, VcpuId
from domains.hvm.board import Board, DebugLog
from domains.hvm.calls import (
    HvmEventCalls,
    HvmMemoryCalls,
    HvmOps,
    HvmOtherCalls,
    HvmSchedCalls,
    HvmVcpuCalls,
    HvmVersionCalls,
)
from domains.hvm.compat import hypercall_page
from domains.hvm.context import (
    FPU_INITIALISED,
    BadContext,
    as_vcpu_context,
    context_of,
    first_cpu,
    load_cpu,
    save_cpu,
)
from domains.hvm.cpu import HvmCpu
from domains.hvm.cpuid import HvmCpuid
from domains.hvm.dump import register_dump
from domains.hvm.events import COMPAT_WALL_CLOCK, HvmEvents
from domains.hvm.exits import Exits
from domains.hvm.interrupts import Interrupts
from domains.hvm.lapic import LocalApic
from domains.hvm.model import Model
from domains.hvm.msr import Msrs
from domains.hvm.pci_root import PciOverlay, PciRoot
from domains.hvm.physmap import PhysicalMap
from domains.hvm.shadow import POOL, WINDOW, Shadow
from domains.hvm.state import HvmState
from domains.pv.calls import Handler
from domains.pv.calls_version import Identity
from domains.pv.cpuid import SIGNATURE
from domains.pv.hypercalls import Hypercalls
from domains.pv.life import Life
from domains.pv.time import TSC_HZ, WALL_CLOCK_OFFSET, Timekeeper, count_nanoseconds, idle_runstate, timer_due
from domains.pv.turns import SLICE_BLOCKS, Slice, Turns
from domains.pv.upstream import Upstream
from domains.pv.wire import Remote
from domains.vcpu.api import StopReason, VcpuError
from domains.vcpu.context_reader import ContextReader
from domains.vcpu.hvm_thunks import HF_CS64
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.shadow_mmu import ShadowMmu
from domains.vcpu.shadow_vcpu import ShadowHvmVcpu
from domains.vcpu.walk import NotMapped
from drivers.pc.assigned import AssignedFunction
from drivers.pc.ioapic import decode_msi

SHARED_INFO_VCPUS: Final = 32
START_NS: Final = 1_000_000
NS: Final = 1_000_000_000
IF: Final = 1 << 9
STRING_PORTS: Final = (0x1F0, 0x170, 0x511)
"""Data ports of IDE and of fw_cfg: whole blocks go through them."""


@dataclass(frozen=True, slots=True)
class HvmConfig:
    """What a domain is made of, besides its memory."""

    domain: DomId
    shared_info: Mfn
    vcpus: int = 1
    identity: Identity = field(default_factory=Identity)
    slice_blocks: int = SLICE_BLOCKS
    hap: bool = True
    """Two levels of paging; False: shadow page tables."""
    shadow_pages: int = 1024
    """Memory for those."""
    board: bool = False
    """A full HVM guest: it has interrupt controllers, timers and, with a device model, everything else of a PC."""


class HvmDomain(Turns[HvmState]):
    """See the module. `octets` and `words` are the domain's own frames, from `physmap.base` on."""

    def __init__(
        self,
        config: HvmConfig,
        physmap: PhysicalMap,
        octets: memoryview,
        words: memoryview,
        upstream: Upstream,
        table: Mapping[int, Hypercall],
        *,
        wall: Callable[[], int],
        monotonic: Callable[[], int],
    ) -> None:
        self.config: Final = config
        self.physmap: Final = physmap
        self.octets: Final = octets
        self._upstream: Final = upstream
        self.time: Final = Timekeeper(wall)
        self.interrupts: Final = Interrupts(octets)

        def now() -> int:
            return self.time.now()

        self.states: Final = [
            HvmState(number, LocalApic(number, now, self.interrupts.send)) for number in range(config.vcpus)
        ]
        self.cpu: Final = HvmCpu(physmap.base, octets, words, self.states[0], physmap)
        self._shared = config.shared_info - physmap.base << PAGE_SHIFT
        for state in self.states[:SHARED_INFO_VCPUS]:
            state.info = self._shared + state.id * VCPU_INFO.size
        self.events: Final = HvmEvents(octets, words, self._shared, self.states, self.interrupts.upcall)
        self.life: Final = Life(self.cpu, upstream)
        self.triple_fault_reason = SHUTDOWN_reboot
        self.exits: Final = self._exits(table)
        self.shadow: Shadow | None = None
        self.vcpu: Final = self._hap_vcpu(physmap) if config.hap else self._shadow_vcpu(physmap, octets)
        self.cpu.attach(self.vcpu)
        count_nanoseconds(self.vcpu, monotonic, START_NS)
        self.time.now = self.vcpu.guest_tsc
        self.exits.cpuid = HvmCpuid(config.domain, config.vcpus, self.vcpu.native_cpuid, hap=config.hap)
        self.exits.msrs = Msrs(self.vcpu.guest_tsc, self._make_page)
        wired = self.interrupts
        wired.states, wired.vcpu = self.states, self.vcpu
        for state in self.states:
            state.apic.software_enabled = wired.apic_enabled
        wired.started, wired.stopped = self._started, self._stopped
        self.board: Final = self._board() if config.board else None
        self.exits.board = self.board
        self.root: PciRoot | None = None
        self.model: Model | None = None
        self._retired: list[Model] = []
        self._reader: ContextReader | None = None
        self._reset_state: Final = save_cpu(self.vcpu, 0)
        self.crash_text: str | None = None
        super().__init__(self.cpu, self.states, self.time, self.life, self.events)

    def _hap_vcpu(self, physmap: PhysicalMap) -> UnicornHvmVcpu:
        vcpu = UnicornHvmVcpu(self.exits)
        vcpu.trap_control_writes(4)
        physmap.attach(vcpu)
        return vcpu

    def _shadow_vcpu(self, physmap: PhysicalMap, octets: memoryview) -> UnicornHvmVcpu:
        mmu = ShadowMmu(self.config.shadow_pages)
        shadow = self.shadow = Shadow(physmap, octets, memoryview(mmu.pool))
        vcpu = ShadowHvmVcpu(self.exits, shadow, mmu, POOL, WINDOW)
        shadow.attach(vcpu, vcpu.regs)
        physmap.attach(shadow)
        return vcpu

    def _board(self) -> Board:
        wired = self.interrupts
        board = Board(
            self.vcpu.guest_tsc,
            self.time.wall,
            wired,
            self._upstream.console_line,
            self._reset,
            self.vcpu.set_a20,
            self._power_off,
        )
        wired.pic = board.pic
        for state in self.states:
            state.apic.ended = board.end_of_interrupt
        return board

    def give_devices(self, functions: Mapping[int, AssignedFunction]) -> None:
        """Before the start: devices of its own. ValueError: there is no room for them on its bus."""
        log = self._upstream.console_line
        if self.board is not None:
            self.exits.board = PciOverlay(functions, self.board.ports, self.board.mmio, log)
            return
        self.root = self.exits.board = PciRoot(functions, self._reset, log, DebugLog(log).put)

    def msi(self, address: int, data: int) -> None:
        """A device's interrupt message. What is none is dropped, as on a bus where nobody takes it."""
        message = decode_msi(address, data)
        if message is not None:
            self.interrupts.message(
                message.vector,
                message.mode,
                message.destination,
                logical=message.logical,
                level=message.level,
            )

    def join_model(self, number: int, fds: list[int], idle: Callable[[], None]) -> Model:
        """A device model has an ioreq server: its memory and doorbells. VcpuError if this guest has no board for it."""
        if self.board is None:
            raise VcpuError("a guest without a board has no device model")
        self.retire_model("another device model takes its place")
        model = Model(
            number, fds, self.board, self.cpu, idle, lambda: self.paused and self.life.shutdown_code is None
        )
        self.model = model
        return model

    def retire_model(self, why: str) -> None:
        """The device model's server, if there is one, is no more. An access may be under way: the rest is for before the next run."""
        if self.model is not None:
            self.model.retire(why)
            self._retired.append(self.model)
            self.model, self.vcpu.string_ports = None, frozenset()

    def run_slice(self) -> Slice:
        """See Turns; what is not needed any more is closed first."""
        while self._retired:
            self._retired.pop().close()
        return super().run_slice()

    def model_changed(self, body: Mapping[str, Any]) -> bool:
        """An order `ioreq_server`. False if there is no such server, or a range cannot be."""
        model = self.model
        if model is None or model.number != body["id"]:
            return False
        if body.get("gone"):
            self.retire_model("its device model is gone")
            return True
        done = model.change(body)
        vcpu = self.vcpu
        vcpu.string_ports = frozenset(port for port in STRING_PORTS if model.owns_port(port))
        around = self.exits.around
        vcpu.on_string_in = lambda port, size, count: around(lambda: model.string_in(port, size, count))
        vcpu.on_string_out = lambda port, size, data: around(lambda: model.string_out(port, size, data))
        return done

    def _reset(self) -> None:
        """A reset that the guest asked the board for: on Xen that is the end of the domain, and a new one is started."""
        self.life.shutdown(SHUTDOWN_reboot)

    def _power_off(self) -> None:
        """ACPI's S5."""
        self.life.shutdown(SHUTDOWN_poweroff)

    def _exits(self, table: Mapping[int, Hypercall]) -> Exits:
        commands = {
            (number, command.number): command for number, entry in table.items() for command in entry.commands
        }

        def find(number: int, cmd: int) -> Command | None:
            return commands.get((number, cmd))

        cpu, config, wired = self.cpu, self.config, self.interrupts
        remote = Remote(cpu, self._upstream)
        other = HvmOtherCalls(cpu, remote, table, control=False)
        handlers: dict[int, Handler] = {number: other.generic(number) for number in table}
        sched = HvmSchedCalls(cpu, self.time, self.events, self.life, remote, find)
        sched.has_work = wired.has_work
        vcpus = HvmVcpuCalls(cpu, self.states, self.time, self.life)
        vcpus.asserted = wired.upcall
        memory = HvmMemoryCalls(
            cpu, remote, find, other.generic(HYPERVISOR_memory_op), other.generic(HYPERVISOR_grant_table_op)
        )
        hvm_ops = HvmOps(
            cpu,
            self.states,
            other.generic(HYPERVISOR_hvm_op),
            config.domain,
            lambda: self.time.now(),
            self.set_callback,
            wired.upcall,
        )
        parts = (
            HvmVersionCalls(cpu, config.identity),
            sched,
            vcpus,
            HvmEventCalls(cpu, self.events, remote, self._upstream, find),
            memory,
            hvm_ops,
            other,
        )
        for part in parts:
            handlers.update(part.handlers())
        calls = Hypercalls(cpu, handlers)
        exits = Exits(cpu, calls, wired, lambda: self.time.now(), self._upstream.console_line)

        def guest32(on: bool) -> None:
            memory.guest32 = on

        exits.guest32 = guest32
        return exits

    # --- start

    def start(self, context: bytes) -> None:
        """vCPU 0 from an HVM context. BadContext."""
        cpu = first_cpu(context)
        self.vcpu.reset()
        try:
            load_cpu(self.vcpu, cpu)
        except VcpuError as error:
            raise BadContext(str(error)) from None
        state = self.states[0]
        state.initialised = state.online = True
        if self.board is not None:
            state.apic.virtual_wire()  # as hvmloader leaves it
        self.time.set_runstate(state, idle_runstate(state))
        self.update_clocks()

    def set_param(self, index: int, value: int) -> None:
        """The toolstack set an HVM parameter."""
        if index == params.HVM_PARAM_CALLBACK_IRQ:
            self.set_callback(value)
        elif index == params.HVM_PARAM_TRIPLE_FAULT_REASON:
            self.triple_fault_reason = value & 0xFF

    def set_callback(self, value: int) -> None:
        """HVM_PARAM_CALLBACK_IRQ: by vector, or by a line (GSI, INTx), which a guest without interrupt controllers besides the
        local APIC does not have. The layout of the shared info follows the mode of the code that sets it."""
        self._latch_layout()
        kind = value >> 56
        vector = value & 0xFF if kind == params.HVM_PARAM_CALLBACK_TYPE_VECTOR else 0
        self.interrupts.callback_vector = vector if vector >= 16 else 0
        self.interrupts.set_callback_line(self._callback_line(kind, value))

    def _callback_line(self, kind: int, value: int) -> Callable[[bool], None] | None:
        """The line that a full HVM guest asks to be told by: an input of the I/O APIC, or a PCI pin (hvm/params.h)."""
        board = self.board
        if board is None:
            return None
        if kind == params.HVM_PARAM_CALLBACK_TYPE_GSI and value & 0xFF:
            return lambda level: board.gsi_line(value & 0xFF, level)
        if kind == params.HVM_PARAM_CALLBACK_TYPE_PCI_INTX:
            return lambda level: board.callback_pin(value >> 11 & 31, value & 3, level)
        return None

    def _make_page(self, gfn: int) -> bool:
        self._latch_layout()
        return self.cpu.write_physical(gfn << PAGE_SHIFT, hypercall_page())

    def _latch_layout(self) -> None:
        """As Xen does, when the guest makes its hypercall page or sets its callback: 32-bit code has the 32-bit shared info."""
        if self.paused:
            return  # set by the toolstack
        compat = not self.vcpu.regs.hflags & HF_CS64
        if compat != self.cpu.compat:
            self.cpu.compat = self.events.compat = compat
            self.update_clocks()

    def update_clocks(self) -> None:
        """Write wall clock and pvclock anew: at the start, and after the domain was stopped for long or the time was set."""
        shift = COMPAT_WALL_CLOCK - WALL_CLOCK_OFFSET if self.cpu.compat else 0
        self.time.update_wall_clock(self.octets, self._shared + shift)
        for state in self.states:
            if state.info >= 0:
                self.time.update_time_info(self.cpu, state)

    def time_of_day_moved(self, ns: int) -> None:
        """The clock was set, by so much: the RTC goes with it, as Xen's does."""
        self.update_clocks()
        if self.board is not None:
            self.board.rtc.shift((ns + NS // 2) // NS)

    # --- vCPUs that come and go

    def _started(self, state: HvmState) -> None:
        state.initialised = state.online = True
        state.blocked = False
        state.context = None
        self.time.set_runstate(state, idle_runstate(state))
        if state.info >= 0:
            self.time.update_time_info(self.cpu, state)
        self.life.vcpu_changed(state.id, True)
        self.vcpu.request_stop()

    def _stopped(self, state: HvmState) -> None:
        if not state.online:
            return
        state.online = False
        self.time.set_runstate(state, idle_runstate(state))
        self.life.vcpu_changed(state.id, False)
        if state is self.cpu.current:
            self.vcpu.request_stop()

    def ring(self) -> None:
        """See Turns."""
        self.vcpu.ring()

    # --- running

    def _switch(self, state: HvmState) -> None:
        previous = self.cpu.current
        assert isinstance(previous, HvmState)
        if state is not previous:
            self.time.set_runstate(previous, idle_runstate(previous))
            self.interrupts.disarm(previous)
            previous.context = self.vcpu.save_context()
            self.cpu.current = state
            if state.context is not None:
                self.vcpu.load_context(state.context)
                state.context = None
        if state.sipi is not None:
            self.vcpu.reset()
            self.vcpu.enter_startup(state.sipi)
            state.sipi = state.armed = state.first = None
        elif state.first is not None:
            self.vcpu.reset()
            load_cpu(self.vcpu, state.first)
            state.armed = state.first = None

    def context(self) -> bytes:
        """XEN_DOMCTL_gethvmcontext: the registers of each vCPU that was started. At any time, also while one of them waits for the device
        model or for the hypervisor in the middle of an instruction (it is shown as it was before that): nothing is touched."""
        current = self.cpu.current
        cpus = [
            (state.id, self._record(state)) for state in self.states if state.initialised or state is current
        ]
        return context_of(cpus, SIGNATURE, TSC_HZ // 1000)

    def vcpu_context(self, vcpu: VcpuId) -> vcpu_guest_context | None:
        """XEN_DOMCTL_getvcpucontext, at any time as `context`; None if that vCPU was never started."""
        if vcpu >= len(self.states):
            return None
        state = self.states[vcpu]
        if not state.initialised and state is not self.cpu.current:
            return None
        return as_vcpu_context(self._record(state), online=state.online)

    def _record(self, state: HvmState) -> hvm_hw_cpu:
        """Of one vCPU, as its next run would find it (`_switch`)."""
        tsc = self.vcpu.guest_tsc()
        if state.sipi is not None:
            vector = state.sipi
            return self._reset_state._replace(cs_sel=vector << 8, cs_base=vector << 12, rip=0, tsc=tsc)
        if state.first is not None:
            first = state.first._replace(rflags=state.first.rflags | 2, tsc=tsc, flags=FPU_INITIALISED)
            return (
                first
                if state.first.flags & FPU_INITIALISED
                else first._replace(fpu_regs=self._reset_state.fpu_regs)
            )
        if state is self.cpu.current:
            return save_cpu(self.vcpu, tsc)
        if state.context is None:
            return self._reset_state._replace(tsc=tsc)
        if self._reader is None:
            self._reader = ContextReader()
        with self._reader.holding(state.context) as held:
            return save_cpu(held, tsc)

    def _run(self, state: HvmState) -> bool:
        self._switch(state)
        if state.runstate != RUNSTATE_running:
            self.time.set_runstate(state, RUNSTATE_running)
            if state.runstate_area:
                self.time.write_runstate_area(self.cpu, state)
        self.interrupts.settle(state)
        self.interrupts.arm(state)
        try:
            reason = self.vcpu.run(self.config.slice_blocks)
        except VcpuError as error:
            self.cpu.crash(f"the vCPU cannot go on: {error}")
            return False
        self.interrupts.settle(state)
        self.exits.counts[reason.name] += 1
        bell = reason is StopReason.BELL
        if bell:
            self.vcpu.clear_bell()
        elif reason is StopReason.HALT:
            self._halted(state)
        elif reason is StopReason.TRIPLE_FAULT:
            self._triple_fault(state)
        elif reason is StopReason.BAD_ACCESS:
            self._bad_access()
        if not state.runnable:
            self.time.set_runstate(state, idle_runstate(state))
        return bell

    def _bad_access(self) -> None:
        """Nothing is at that address: it reads as ones from now on. Code cannot run there."""
        access = self.vcpu.bad_access
        assert access is not None
        gfn = access.address >> PAGE_SHIFT
        if gfn == self._code_gfn():
            self.cpu.crash(f"code at guest-physical {access.address:#x}, where nothing is")
        elif not self.physmap.touch(gfn):
            self.cpu.crash(f"access to guest-physical {access.address:#x}, which cannot be served")

    def _code_gfn(self) -> int:
        regs = self.vcpu.regs
        base = 0 if regs.hflags & HF_CS64 else regs.segment("cs").base
        try:
            return self.vcpu.memory.physical(base + regs.rip) >> PAGE_SHIFT
        except NotMapped:
            return -1

    def _halted(self, state: HvmState) -> None:
        """HLT: until an interrupt. With interrupts off nothing but an NMI or a start-up interrupt ends it: the vCPU is down, and
        with the last one the domain powers off."""
        if self.interrupts.has_work(state) and (self.vcpu.regs.rflags & IF or state.nmi):
            return
        if self.vcpu.regs.rflags & IF:
            state.blocked = True
            return
        self._stopped(state)
        if not any(other.online for other in self.states):
            self._upstream.console_line("all vCPUs are down with interrupts off: powering off")
            self.life.shutdown(SHUTDOWN_poweroff)

    def _triple_fault(self, state: HvmState) -> None:
        self._upstream.console_line(f"vcpu#{state.id}: triple fault at RIP {self.vcpu.regs.rip:#x}")
        self._tell(register_dump(self.vcpu))
        self.life.shutdown(self.triple_fault_reason)

    def next_deadline(self) -> int | None:
        """See Turns; the board's timers as well."""
        found = super().next_deadline()
        timers = self.board.next_deadline() if self.board is not None else None
        if found is None or timers is None:
            return timers if found is None else found
        return min(found, timers)

    def _expire_all(self) -> None:
        now = self.time.now()
        if self.board is not None:
            self.board.expire(now)
        for state in self.states:
            if not state.online:
                continue
            if state.poll_deadline is not None and now >= state.poll_deadline:
                state.wake()
            self.interrupts.timer(state, now)
            if timer_due(state, now) and state.timer_port:
                self.events.set_pending(state.timer_port, state.id)

    # --- the end

    def _tell(self, text: str) -> None:
        for line in text.splitlines():
            self._upstream.console_line(line)

    def _ended(self) -> None:
        """After a crash, here or declared by the guest itself: keep the registers for the reader, tell the hypervisor."""
        reason = self.cpu.crash_reason
        if reason is None and self.life.shutdown_code == SHUTDOWN_crash:
            reason = "the guest declared SHUTDOWN_crash"
        if self.crash_text is None and reason is not None:
            self.crash_text = f"Domain {self.config.domain} (vcpu#{self.cpu.current.id}) crashed: {reason}\n{register_dump(self.vcpu)}"
            self._tell(self.crash_text)
            self.life.shutdown(SHUTDOWN_crash)
