"""A PV domain in its process: one Unicorn vCPU object on which its vCPUs take turns, memory management, time, events, the end.

Without I/O apart from the vCPU. The process shell calls `run_slice` in a loop and does what it returns: run again, or wait
until the deadline or until something arrives (`deliver`, `pause`, an order). What needs the hypervisor goes through `Upstream`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from bus.abi.arch_x86 import (
    VCPU_GUEST_CONTEXT,
    VGCF_IN_KERNEL,
    XEN_LEGACY_MAX_VCPUS,
    VGCF_online,
    vcpu_guest_context,
)
from bus.abi.hypercalls_model import Command, Hypercall
from bus.abi.sched import SHUTDOWN_crash
from bus.abi.vcpu import RUNSTATE_running
from bus.abi.xen import VCPU_INFO
from bus.addresses import PAGE_SHIFT, DomId, MachineAddr, Mfn, VcpuId
from domains.pv.api import GuestFrames
from domains.pv.bounce import deliver_events, inject_failsafe
from domains.pv.calls import Handler
from domains.pv.calls_cpu import CpuCalls
from domains.pv.calls_events import EventCalls
from domains.pv.calls_grant import GrantCalls
from domains.pv.calls_memory import MemoryCalls
from domains.pv.calls_other import OtherCalls
from domains.pv.calls_sched import SchedCalls
from domains.pv.calls_vcpu import VcpuCalls
from domains.pv.calls_version import Identity, VersionCalls
from domains.pv.capture import Capture
from domains.pv.context import start_vcpu
from domains.pv.cpu import Cpu
from domains.pv.cpuid import CpuidPolicy
from domains.pv.dump import register_dump
from domains.pv.events import EventChannels
from domains.pv.hardware import Hardware
from domains.pv.hypercalls import Hypercalls
from domains.pv.life import Life
from domains.pv.mm import Mmu
from domains.pv.state import VcpuState
from domains.pv.time import Timekeeper, idle_runstate, timer_due
from domains.pv.traps import Traps
from domains.pv.turns import SLICE_BLOCKS, Turns
from domains.pv.upstream import Upstream
from domains.pv.wire import Remote
from domains.pv.xenmap import XenMap
from domains.vcpu.api import PvTraps, PvVcpu, StopReason


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """What a domain is made of, besides its memory."""

    domain: DomId
    shared_info: Mfn
    max_mfn: int
    """Highest machine frame number: what the machine-to-physical table covers."""
    vcpus: int = 1
    control: bool = False
    """The control domain's privileges, as far as this process decides (the hypervisor decides for itself)."""
    hardware: Hardware | None = None
    """Devices of its own: a driver domain's."""
    identity: Identity = field(default_factory=Identity)
    slice_blocks: int = SLICE_BLOCKS


class PvDomain(Turns[VcpuState]):
    """See the module.

    `make_vcpu` builds the vCPU object around the traps it is given and has the domain's frames and Xen's private frames mapped
    (`xenmap.private`). `clock` and `wall` give ns; a `clock` of None means the guest's TSC itself (the caller has set it to
    count ns by `Vcpu.set_tsc`), else RDTSC is trapped and answered from `clock`.
    """

    def __init__(
        self,
        config: DomainConfig,
        frames: GuestFrames,
        xenmap: XenMap,
        make_vcpu: Callable[[PvTraps], PvVcpu],
        upstream: Upstream,
        table: Mapping[int, Hypercall],
        *,
        wall: Callable[[], int],
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.config: Final = config
        self.frames: Final = frames
        self.states: Final = [VcpuState(index) for index in range(config.vcpus)]
        self._upstream: Final = upstream
        self.time: Final = Timekeeper(wall)
        self.cpu: Final = Cpu(frames.base, frames.octets, frames.words, self.states[0])
        self._capture: Final = Capture(self.cpu)
        self.mmu: Final = Mmu(
            frames,
            xenmap,
            self.cpu,
            config.domain,
            hardware=config.control or config.hardware is not None,
            flush_page=self.cpu.flush_page,
        )
        self.cpu.mmu = self.mmu
        self._shared = config.shared_info - frames.base << PAGE_SHIFT
        for state in self.states[:XEN_LEGACY_MAX_VCPUS]:
            state.info = self._shared + state.id * VCPU_INFO.size
            frames.octets[state.info + 1] = 1
        self.events: Final = EventChannels(frames.octets, frames.words, self._shared, self.states)
        self.life: Final = Life(self.cpu, upstream)
        self.calls: Final = self._hypercalls(table)
        self.traps: Final = Traps(
            self.cpu, self.calls, self.time, CpuidPolicy(config.vcpus), self._expire, config.hardware
        )
        self.vcpu: Final = make_vcpu(self.traps)
        self.cpu.attach(self.vcpu)
        self.time.now = clock if clock is not None else self.vcpu.guest_tsc
        self.vcpu.trap_tsc(clock is not None)
        self.crash_text: str | None = None
        super().__init__(self.cpu, self.states, self.time, self.life, self.events)

    def _hypercalls(self, table: Mapping[int, Hypercall]) -> Hypercalls:
        commands = {
            (number, command.number): command for number, entry in table.items() for command in entry.commands
        }

        def find(number: int, cmd: int) -> Command | None:
            return commands.get((number, cmd))

        cpu, config = self.cpu, self.config
        remote = Remote(cpu, self._upstream)
        other = OtherCalls(cpu, remote, table, control=config.control, hardware=config.hardware)
        handlers: dict[int, Handler] = {number: other.generic(number) for number in table}
        for part in (
            CpuCalls(cpu),
            VcpuCalls(cpu, self.states, self.time, self.life),
            VersionCalls(cpu, config.identity),
            SchedCalls(cpu, self.time, self.events, self.life, remote, find),
            EventCalls(cpu, self.events, remote, self._upstream, find),
            MemoryCalls(cpu, remote, find, config.domain, config.max_mfn),
            GrantCalls(cpu, remote, find, config.domain),
            other,
        ):
            handlers.update(part.handlers())
        return Hypercalls(cpu, handlers)

    # --- start

    def start(self, context: vcpu_guest_context) -> int:
        """vCPU 0 from its context (XEN_DOMCTL_setvcpucontext): validates and pins the builder's page tables. 0 or -errno."""
        state = self.states[0]
        rc = self.mmu.adopt_initial_tables(context.ctrlreg[3] >> PAGE_SHIFT)
        if rc:
            return rc
        rc = start_vcpu(self.cpu, state, context, adopted=True)
        if rc:
            return rc
        self.cpu.switch_in(state)
        self.update_clocks()
        return 0

    def start_flat(self, rip: int, rsp: int, rsi: int, cr3: Mfn) -> int:
        """vCPU 0 as the domain builder leaves it: flat segments, RSI at the start info, nothing else."""
        zero = VCPU_GUEST_CONTEXT.zero()
        registers = zero.user_regs._replace(rip=rip, rsp=rsp, rsi=rsi, rflags=0x200, cs=0xE033, ss=0xE02B)
        return self.start(
            zero._replace(
                flags=VGCF_IN_KERNEL | VGCF_online,
                user_regs=registers,
                kernel_ss=0xE02B,
                kernel_sp=rsp,
                ctrlreg=(0, 0, 0, cr3 << PAGE_SHIFT, 0, 0, 0, 0),
            )
        )

    def update_clocks(self) -> None:
        """Write wall clock and pvclock anew: at the start, and after the domain was stopped for long or the time was set."""
        self.time.update_wall_clock(self.frames.octets, self._shared)
        for state in self.states:
            if state.info >= 0:
                self.time.update_time_info(self.cpu, state)

    # --- what the shell calls between runs

    def time_of_day_moved(self, ns: int) -> None:
        """The clock was set, by so much."""
        self.update_clocks()

    def give_io_memory(self, first: Mfn, count: int) -> None:
        """Registers of a device of the domain's own are there now: it may map them."""
        self.mmu.pages.io_frames.update(range(first, first + count))
        self.vcpu.map_mmio(MachineAddr(first << PAGE_SHIFT), count << PAGE_SHIFT)

    def resume(self, value: int) -> None:
        """After SCHEDOP_shutdown(SHUTDOWN_suspend): go on, and have that hypercall return `value` (1: the suspend was cancelled
        or was a checkpoint; 0: the domain is a new one)."""
        self.life.resume()
        self.cpu.regs.rax = value
        self.update_clocks()

    def ring(self) -> None:
        """See Turns."""
        self.vcpu.ring()

    # --- running

    def _run(self, state: VcpuState) -> bool:
        cpu = self.cpu
        previous = cpu.current
        if state is not previous:
            self.time.set_runstate(previous, idle_runstate(previous))
            cpu.switch_out()
            cpu.switch_in(state)
        if state.runstate != RUNSTATE_running:
            self.time.set_runstate(state, RUNSTATE_running)
            if state.runstate_area:
                self.time.write_runstate_area(cpu, state)
        if state.segment_failure:
            state.segment_failure = False
            r = cpu.regs
            inject_failsafe(cpu, (r.ds, r.es, r.fs, r.gs))
        deliver_events(cpu, state)
        cpu.arm_breakpoints()
        bell = False
        if cpu.crash_reason is None:
            reason = self.vcpu.run(self.config.slice_blocks)
            bell = reason is StopReason.BELL
            if bell:
                self.vcpu.clear_bell()
            if reason in (StopReason.BAD_ACCESS, StopReason.TRIPLE_FAULT, StopReason.HALT):
                self._bad_stop(reason)
        if not state.runnable:
            self.time.set_runstate(state, idle_runstate(state))
        return bell

    def _bad_stop(self, reason: StopReason) -> None:
        access = self.vcpu.bad_access
        where = f" at machine address {access.address:#x}" if access is not None else ""
        self.cpu.crash(f"vCPU stopped: {reason.name}{where}")

    def nmi(self, vcpu: VcpuId) -> None:
        """Somebody else sent an NMI to a vCPU: a sleeping one wakes for it, as Xen kicks it. None of an unknown one's business."""
        if vcpu < len(self.states) and self.states[vcpu].online:
            state = self.states[vcpu]
            state.nmi_pending = True
            state.wake()
            self.ring()

    # --- timers

    def _expire(self, state: VcpuState) -> None:
        """Fire what is due of one vCPU."""
        now = self.time.now()
        if state.poll_deadline is not None and now >= state.poll_deadline:
            state.wake()
        if timer_due(state, now) and state.timer_port:
            self.events.set_pending(state.timer_port, state.id)

    def _expire_all(self) -> None:
        for state in self.states:
            if state.online:
                self._expire(state)

    # --- the end

    def context(self, vcpu: VcpuId) -> vcpu_guest_context | None:
        """XEN_DOMCTL_getvcpucontext, between two runs: registers of that vCPU; None if it was never initialised."""
        if vcpu >= len(self.states) or not self.states[vcpu].initialised:
            return None
        return self._capture.context(self.states[vcpu])

    def tell_crash(self) -> None:
        """The registers of a guest that is about to be reported crashed: for the hypervisor's log, once."""
        reason = self.cpu.crash_reason or "the guest declared SHUTDOWN_crash"
        if self.crash_text is None:
            self.crash_text = (
                f"Domain {self.config.domain} (vcpu#{self.cpu.current.id}) crashed: {reason}\n"
                + register_dump(self.cpu)
            )
            for line in self.crash_text.splitlines():
                self._upstream.console_line(line)

    def _ended(self) -> None:
        """After a crash, here or declared by the guest itself: keep the registers for the reader, tell the hypervisor."""
        if self.cpu.crash_reason is not None or self.life.shutdown_code == SHUTDOWN_crash:
            self.tell_crash()
            self.life.shutdown(SHUTDOWN_crash)
