"""Privileged instructions of a guest kernel, which runs at CPL3 and faults on them: what Xen emulates, and nothing more.

Emulated: CLTS, WBINVD, MOV to and from control and debug registers, RDMSR, WRMSR, RDTSC, RDTSCP, CPUID, CLI and STI (allowed
by IOPL and otherwise without effect), XSETBV (#UD: there is no XSAVE). Everything else (HLT, INVLPG, LMSW, LGDT, ...) is #GP for
the guest, as on Xen 4.17. Encodings: Intel SDM volume 2.
"""

from __future__ import annotations

from typing import Final

from bus.addresses import PAGE_SHIFT, Mfn, canonical
from domains.pv.api import GuestFault
from domains.pv.bounce import (
    PF_FETCH,
    RFLAGS_RF,
    RFLAGS_TF,
    TRAP_DB,
    TRAP_SS,
    TRAP_UD,
    inject,
    inject_gp,
    inject_page_fault,
)
from domains.pv.cpu import Cpu
from domains.pv.debugreg import DR6_BS, read_debugreg, set_debugreg
from domains.pv.ioports import iopl_ok
from domains.pv.msr import GeneralProtection, read_msr, write_msr
from domains.pv.state import CR0_BASE, CR0_TS, CR4_BASE, CR4_GUEST_MASK
from domains.pv.time import Timekeeper
from domains.vcpu.stack_fault import by_stack_segment

ENODEV: Final = 19
MAX_INSTRUCTION: Final = 15
_LEGACY_PREFIXES: Final = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65))
_LOW32: Final = 0xFFFFFFFF


def fetch(cpu: Cpu, address: int, length: int) -> bytes:
    """Up to `length` instruction bytes at `address`, fewer where the page after is not there. GuestFault if none."""
    user = not cpu.current.kernel_mode
    try:
        return cpu.mmu.read_virtual(address, length, user=user)
    except GuestFault:
        here = (1 << PAGE_SHIFT) - (address & (1 << PAGE_SHIFT) - 1)
        if here >= length:
            raise
        return cpu.mmu.read_virtual(address, here, user=user)


def instruction_done(cpu: Cpu) -> None:
    """An instruction was completed by emulation, RIP is behind it: RF is over, and TF gives its #DB now."""
    r = cpu.regs
    flags = r.rflags
    if flags & RFLAGS_RF:
        r.rflags = flags & ~RFLAGS_RF
    if flags & RFLAGS_TF:
        cpu.current.dr6 |= DR6_BS
        inject(cpu, TRAP_DB)


class Emulator:
    """Emulates the instruction at RIP. Holds what instructions reach beyond the vCPU."""

    __slots__ = ("_cpu", "_time")

    def __init__(self, cpu: Cpu, time: Timekeeper) -> None:
        self._cpu = cpu
        self._time = time

    def privileged(self) -> bool:
        """#GP(0) was raised at RIP. True: the instruction was emulated, or an exception given to the guest already.
        False: the #GP is the guest's."""
        cpu = self._cpu
        rip = cpu.regs.rip
        if not canonical(rip):
            return False
        try:
            code = fetch(cpu, rip, MAX_INSTRUCTION)
        except GuestFault as fault:
            inject_page_fault(cpu, fault.va, PF_FETCH)
            return True
        if by_stack_segment(code, cpu.regs) and cpu.code64(cpu.regs.cs):
            inject(cpu, TRAP_SS, 0)
            return True
        position = 0
        rex = 0
        limit = len(code)
        while position < limit and code[position] in _LEGACY_PREFIXES:
            position += 1
        if position < limit and 0x40 <= code[position] <= 0x4F:
            rex = code[position]
            position += 1
        if position >= limit:
            return False
        opcode = code[position]
        if opcode in (0xFA, 0xFB):  # cli, sti
            if not iopl_ok(cpu):
                return False
            self._done(position + 1)
            return True
        if opcode != 0x0F or position + 1 >= limit:
            return False
        second = code[position + 1]
        third = code[position + 2] if position + 2 < limit else -1
        position += 2
        if second == 0x31 or (second == 0x01 and third == 0xF9):
            return self._rdtsc(position, second == 0x01)
        if second == 0x01 and third == 0xD1:  # xsetbv: there is no XSAVE
            inject(cpu, TRAP_UD)
            return True
        if not cpu.current.kernel_mode:
            return False
        if 0x20 <= second <= 0x23 and third >= 0:
            return self._move_special(second, third, rex, position + 1)
        if second == 0x30 or second == 0x32:
            return self._msr(second == 0x30, position)
        if second == 0x06:  # clts
            cpu.current.cr0 &= ~CR0_TS
            cpu.apply_ts()
        elif second == 0x09:  # wbinvd: no device memory to write back to
            pass
        else:
            return False
        self._done(position)
        return True

    def _done(self, length: int) -> None:
        self._cpu.regs.rip += length
        instruction_done(self._cpu)

    def _rdtsc(self, position: int, with_aux: bool) -> bool:
        cpu = self._cpu
        s = cpu.current
        if not s.kernel_mode and s.cr4 & 4:  # TSD
            return False
        tsc = self._time.now()
        r = cpu.regs
        r.rax = tsc & _LOW32
        r.rdx = tsc >> 32 & _LOW32
        if with_aux:
            r.rcx = s.tsc_aux
            position += 1
        self._done(position)
        return True

    def _msr(self, write: bool, position: int) -> bool:
        cpu = self._cpu
        r = cpu.regs
        index = r.rcx & _LOW32
        try:
            if write:
                write_msr(cpu, index, (r.rdx & _LOW32) << 32 | r.rax & _LOW32)
            else:
                value = read_msr(cpu, self._time, index)
                r.rax = value & _LOW32
                r.rdx = value >> 32
        except GeneralProtection:
            return False
        self._done(position)
        return True

    def _move_special(self, opcode: int, modrm: int, rex: int, position: int) -> bool:
        """0F 20 to 0F 23: MOV between a general register and a control (20, 22) or debug (21, 23) register."""
        cpu = self._cpu
        number = modrm >> 3 & 7 | (rex & 4) << 1
        register = modrm & 7 | (rex & 1) << 3
        if opcode == 0x20:
            value = self._read_cr(number)
            if value is None:
                return False
            cpu.regs.set_gpr(register, value)
        elif opcode == 0x22:
            if not self._write_cr(number, cpu.regs.gpr(register)):
                return False
        elif opcode == 0x21:
            read = read_debugreg(cpu.current, number)
            if read is None:
                inject(cpu, TRAP_UD)
                return True
            cpu.regs.set_gpr(register, read)
        else:
            rc = set_debugreg(cpu.current, number, cpu.regs.gpr(register))
            if rc:
                if rc == -ENODEV:
                    inject(cpu, TRAP_UD)
                else:
                    inject_gp(cpu)
                return True
            cpu.debugreg_changed()
        self._done(position)
        return True

    def _read_cr(self, number: int) -> int | None:
        s = self._cpu.current
        if number == 0:
            return s.cr0
        if number == 2:
            return s.cr2
        if number == 3:
            return s.kernel_root << PAGE_SHIFT
        if number == 4:
            return s.cr4
        return None

    def _write_cr(self, number: int, value: int) -> bool:
        cpu = self._cpu
        s = cpu.current
        if number == 0:
            if (value ^ CR0_BASE) & ~CR0_TS:
                return False
            s.cr0 = CR0_BASE | value & CR0_TS
            cpu.apply_ts()
            return True
        if number == 2:
            s.cr2 = value
            cpu.words[(s.info >> 3) + 2] = value
            return True
        if number == 3:
            return self._new_cr3(Mfn(value >> PAGE_SHIFT & 0xFFFFFFFFFF))
        if number == 4:
            s.cr4 = CR4_BASE | value & CR4_GUEST_MASK
            cpu.apply_cr4()
            return True
        return False

    def _new_cr3(self, root: Mfn) -> bool:
        cpu = self._cpu
        s = cpu.current
        old = s.kernel_root
        if root == old:
            cpu.flush_tlb()
            return True
        if cpu.mmu.take_root(root):
            return False
        cpu.load_cr3(root, s.user_root)
        cpu.mmu.drop_root(old)
        return True
