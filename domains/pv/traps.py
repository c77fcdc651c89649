"""Every way out of guest code into the hypervisor side: `domains.vcpu.api.PvTraps` for a PV domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.abi.arch_x86_64 import FLAT_RING3_CS64, FLAT_RING3_SS64, HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from bus.addresses import VcpuId
from domains.pv.api import Continuation, GuestFault
from domains.pv.bounce import (
    PF_FETCH,
    RFLAGS_TF,
    TRAP_DB,
    TRAP_UD,
    VECTORS_WITH_ERROR_CODE,
    deliver_events,
    inject,
    inject_gp,
    inject_page_fault,
)
from domains.pv.calls import MASK64, NO_RESULT
from domains.pv.cpu import Cpu
from domains.pv.cpuid import CpuidPolicy
from domains.pv.emulate import Emulator, fetch, instruction_done
from domains.pv.hardware import Hardware
from domains.pv.hypercalls import NUMBERS, Hypercalls, no_such_hypercall
from domains.pv.ioports import IoPorts, access_ok
from domains.pv.state import CR0_TS, VcpuState
from domains.pv.syscall import SYSCALL_LENGTH, software_interrupt, user_syscall, user_sysenter
from domains.pv.time import Timekeeper
from domains.vcpu.api import Trap

NM: Final = 7
GP: Final = 13
PF: Final = 14
PF_PRESENT: Final = 1
PF_WRITE: Final = 2
PF_RESERVED: Final = 8
EFAULT: Final = 14
FORCED_EMULATION: Final = b"\x0f\x0bxen"
"""XEN_EMULATE_PREFIX (arch-x86/xen.h): UD2 and the letters; the instruction to emulate follows."""
CPUID_OPCODE: Final = b"\x0f\xa2"
RDPMC: Final = b"\x0f\x33"
ICEBP: Final = b"\xf1"
"""A trap to #DB; the vCPU does not know the instruction."""
CR4_TSD: Final = 4
_LOW32: Final = 0xFFFFFFFF


class Traps:
    """See the module. `expire` takes the timers of the domain that are due."""

    def __init__(
        self,
        cpu: Cpu,
        calls: Hypercalls,
        time: Timekeeper,
        policy: CpuidPolicy,
        expire: Callable[[VcpuState], None],
        hardware: Hardware | None = None,
    ) -> None:
        self._hardware = hardware
        self._cpu = cpu
        self._calls = calls
        self._table = calls.table
        self._counts = calls.counts
        self._time = time
        self._policy = policy
        self._expire = expire
        self._emulator = Emulator(cpu, time)
        self.ports = IoPorts(hardware)
        self.exceptions: Final = [0] * 256
        """Traps by vector."""

    # --- system calls and hypercalls

    def on_syscall(self) -> None:
        """From the guest kernel a hypercall (RAX, then RDI, RSI, RDX, R10, R8), from user mode the guest's own system call."""
        cpu = self._cpu
        s = cpu.current
        if not s.kernel_mode:
            user_syscall(cpu)
            return
        r = cpu.regs
        if (
            r.cs != FLAT_RING3_CS64 or r.ss != FLAT_RING3_SS64
        ):  # a selector of the guest's own does not come back
            r.cs = FLAT_RING3_CS64
            r.ss = FLAT_RING3_SS64
        number = r.rax
        if number < NUMBERS:
            handler = self._table[number]
            self._counts[number] += 1
        else:
            handler = no_such_hypercall
        trace = self._calls.trace
        if trace.on[0]:
            vcpu, first, began = s.id, r.rdi, trace.now()
        else:
            began = 0
        try:
            result = handler(r.rdi, r.rsi, r.rdx, r.r10, r.r8)
        except GuestFault:
            result = -EFAULT
        if began:
            self._calls.note(vcpu, number, first, began, result)
        if result.__class__ is int:
            r.rax = result & MASK64
        elif result is not NO_RESULT:
            assert isinstance(result, Continuation)
            self._continue(result)
        if s.singleshot is not None and self._time.now() >= s.singleshot:
            self._expire(s)
        octets = cpu.octets
        info = s.info
        if (octets[info] and not octets[info + 1]) or s.nmi_pending:
            deliver_events(cpu, s)
            cpu.stale_step = cpu.stale_step and r.rflags & RFLAGS_TF != 0

    def _continue(self, continuation: Continuation) -> None:
        """The guest executes the hypercall again, with other arguments, after it has seen its events."""
        r = self._cpu.regs
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8"), continuation.args, strict=False):
            setattr(r, name, value & MASK64)
        r.rip -= SYSCALL_LENGTH

    def on_sysenter(self) -> None:
        """From user mode to the sysenter callback. The guest kernel has no use for it: #GP."""
        cpu = self._cpu
        if cpu.current.kernel_mode or not cpu.current.sysenter_callback:
            cpu.vcpu.raise_fault(GP)
        user_sysenter(cpu)

    # --- exceptions

    def on_trap(self, trap: Trap) -> None:
        """An exception or INT n."""
        cpu = self._cpu
        vector = trap.vector & 0xFF
        self.exceptions[vector] += 1
        if trap.is_software:
            software_interrupt(cpu, vector)
        elif vector == PF:
            self._page_fault(trap.error_code)
        elif vector == GP:
            if trap.error_code or not self._emulator.privileged():
                inject_gp(cpu, trap.error_code)
        elif vector == NM:
            cpu.current.cr0 &= ~CR0_TS
            cpu.apply_ts()
            inject(cpu, NM)
        elif vector == TRAP_DB and cpu.stale_step:
            cpu.stale_step = False
            self.exceptions[vector] -= 1
            cpu.vcpu.debug_status()
        elif vector == TRAP_DB:
            cpu.current.dr6 |= cpu.vcpu.debug_status()
            inject(cpu, TRAP_DB)
        else:
            inject(cpu, vector, trap.error_code if vector in VECTORS_WITH_ERROR_CODE else None)
        s = cpu.current
        octets = cpu.octets
        if (octets[s.info] and not octets[s.info + 1]) or s.nmi_pending:
            deliver_events(cpu, s)

    def _page_fault(self, error_code: int) -> None:
        cpu = self._cpu
        s = cpu.current
        address = cpu.regs.cr2
        if HYPERVISOR_VIRT_START <= address < HYPERVISOR_VIRT_END:
            found = cpu.mmu.ldt_fault(address, VcpuId(s.id))
            if found is True:
                cpu.flush_tlb()
                return
            if found is not False:
                address = int(found)
        elif (
            s.kernel_mode
            and error_code & (PF_PRESENT | PF_WRITE | PF_RESERVED | PF_FETCH) == PF_PRESENT | PF_WRITE
            and cpu.mmu.writable_page_tables
            and cpu.mmu.write_fault(address, error_code, cpu.regs)
        ):
            return
        inject_page_fault(cpu, address, error_code)

    def on_invalid_opcode(self) -> None:
        """Forced emulation of CPUID, or the guest's #UD."""
        cpu = self._cpu
        r = cpu.regs
        self.exceptions[TRAP_UD] += 1
        try:
            code = fetch(cpu, r.rip, len(FORCED_EMULATION) + len(CPUID_OPCODE))
        except GuestFault as fault:
            inject_page_fault(cpu, fault.va, PF_FETCH)
            return
        if code[:2] == RDPMC:  # a counter that is not there; the vCPU does not know the instruction
            inject_gp(cpu)
            return
        if code[:5] != FORCED_EMULATION or code[5:7] != CPUID_OPCODE:
            if code[:1] == ICEBP:
                r.rip += 1
                inject(cpu, TRAP_DB)
            else:
                inject(cpu, TRAP_UD)
            return
        s = cpu.current
        if not s.kernel_mode and s.misc_features & 1:
            r.rip += len(FORCED_EMULATION)
            inject_gp(cpu)
            return
        r.rax, r.rbx, r.rcx, r.rdx = self._policy.query(r.rax & _LOW32, r.rcx & _LOW32, s.id)
        r.rip += len(FORCED_EMULATION) + len(CPUID_OPCODE)
        instruction_done(cpu)

    # --- instructions

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The domain's policy; #GP in user mode while CPUID faulting is on."""
        cpu = self._cpu
        s = cpu.current
        if s.misc_features & 1 and not s.kernel_mode:
            cpu.vcpu.raise_fault(GP)
        return self._policy.query(leaf, subleaf, s.id)

    def on_port_in(self, port: int, size: int) -> int:
        """IN and INS."""
        if not access_ok(self._cpu, port, size):
            self._cpu.vcpu.raise_fault(GP)
        return self.ports.read(port, size)

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """OUT and OUTS."""
        if not access_ok(self._cpu, port, size):
            self._cpu.vcpu.raise_fault(GP)
        self.ports.write(port, size, value)

    def on_mmio_read(self, address: int, size: int) -> int:
        """I/O memory of the domain's own devices."""
        return self._hardware.mmio_read(address, size) if self._hardware is not None else (1 << 8 * size) - 1

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        """I/O memory of the domain's own devices."""
        if self._hardware is not None:
            self._hardware.mmio_write(address, size, value)

    def on_rdtsc(self) -> int:
        """While RDTSC is trapped: the time that the timers go by."""
        return self._time.now()
