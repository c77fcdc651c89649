"""Writable page-table assist: a guest kernel's store to an L1 table, which is mapped read-only, carried out
as a checked update (VMASST_TYPE_writable_pagetables in xen.h). Tables of higher levels are not assisted, as
on Xen.
"""

from __future__ import annotations

from typing import Final

from bus.addresses import PAGE_MASK
from domains.pv.api import GuestFault
from domains.pv.mm import decode as op
from domains.pv.mm.bits import ADDRESS_MASK, T_L1, WORD
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.walk import GuestMemory
from domains.vcpu.api import Registers

_ERROR_PRESENT: Final = 1
_ERROR_WRITE: Final = 2
_ERROR_RESERVED: Final = 8
_ERROR_FETCH: Final = 16
_CF, _PF, _AF, _ZF, _SF, _DF, _OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
_STATUS: Final = _CF | _PF | _AF | _ZF | _SF | _OF
_CACHE_LIMIT: Final = 4096


class WritableTables:
    """Emulates one store at a time."""

    def __init__(self, pages: PageTypes, memory: GuestMemory) -> None:
        self._pages = pages
        self._memory = memory
        self._decoded: dict[bytes, op.Instruction | None] = {}

    def write_fault(self, va: int, error_code: int, regs: Registers) -> bool:
        """See `PagingApi.write_fault`. Nothing is changed when it answers False."""
        if error_code & (_ERROR_PRESENT | _ERROR_WRITE | _ERROR_RESERVED | _ERROR_FETCH) != 3:
            return False
        pages = self._pages
        try:
            at, _ = self._memory.l1_entry(va, self._memory.root())
        except GuestFault:
            return False
        mapping = pages.words[at]
        if mapping & 3 != 1:
            return False
        table = pages.index((mapping & ADDRESS_MASK) >> 12)
        if table < 0 or pages.ptype[table] != T_L1:
            return False
        instruction = self._fetch(regs.rip)
        if instruction is None:
            return False
        address = self._address(instruction, regs)
        size = instruction.size
        if (address ^ va) & ~PAGE_MASK or address & (size - 1):
            return False
        return self._carry_out(instruction, table << 9 | address >> 3 & 511, address & 7, regs)

    def _fetch(self, rip: int) -> op.Instruction | None:
        read = self._memory.read
        try:
            code = read(rip, op.MAX_LENGTH)
        except GuestFault:
            # The bytes up to the end of the page may do.
            try:
                code = read(rip, min(op.MAX_LENGTH, 4096 - (rip & PAGE_MASK)))
            except GuestFault:
                return None
        cache = self._decoded
        if code in cache:
            return cache[code]
        if len(cache) >= _CACHE_LIMIT:
            cache.clear()
        found = cache[code] = op.decode(code)
        return found

    def _address(self, instruction: op.Instruction, regs: Registers) -> int:
        address = instruction.displacement
        base, index = instruction.base, instruction.index_register
        if base >= 0:
            address += regs.gpr(base)
        elif base == -2:
            address += regs.rip + instruction.length
        if index >= 0:
            address += regs.gpr(index) << instruction.scale
        if instruction.kind not in (op.STOS, op.MOVS):
            if instruction.segment == 0x64:
                address += regs.fs_base
            elif instruction.segment == 0x65:
                address += regs.gs_base
        if op.BTS <= instruction.kind <= op.BTC and instruction.register >= 0:
            # The bit may lie anywhere: the register is a signed bit offset.
            bits = instruction.size * 8
            offset = _signed(regs.gpr(instruction.register) & ((1 << bits) - 1), bits)
            address += (offset >> bits.bit_length() - 1) * instruction.size
        return address & WORD

    def _carry_out(self, instruction: op.Instruction, at: int, byte: int, regs: Registers) -> bool:
        """Compute the new entry, have it checked and written, then update the registers."""
        pages = self._pages
        size, kind = instruction.size, instruction.kind
        bits = size * 8
        mask = (1 << bits) - 1
        shift = byte * 8
        word = pages.words[at]
        old = word >> shift & mask
        operand = self._operand(instruction, regs, mask)
        flags = regs.rflags
        new = old
        loads: int | None = None  # what the register operand (or the accumulator) becomes
        if kind <= op.XOR:
            new, flags = _alu(kind, old, operand, bits, flags)
        elif kind == op.MOV:
            new = operand
        elif kind == op.XCHG:
            new, loads = operand, old
        elif kind == op.XADD:
            new, flags = _alu(op.ADD, old, operand, bits, flags)
            loads = old
        elif kind == op.CMPXCHG:
            accumulator = regs.rax & mask
            _, flags = _alu(op.SUB, accumulator, old, bits, flags)
            if accumulator != old:
                _store_register(regs, 0, False, old, size)
                return self._finish(instruction, regs, flags)
            new = operand
        elif kind == op.CMPXCHG8B:
            expected = regs.rdx << 32 & 0xFFFF_FFFF_0000_0000 | regs.rax & 0xFFFF_FFFF
            if expected != old:
                regs.rax, regs.rdx = old & 0xFFFF_FFFF, old >> 32
                return self._finish(instruction, regs, flags & ~_ZF)
            new = regs.rcx << 32 & 0xFFFF_FFFF_0000_0000 | regs.rbx & 0xFFFF_FFFF
            flags |= _ZF
        elif kind in (op.INC, op.DEC):
            new, changed = _alu(op.ADD if kind == op.INC else op.SUB, old, 1, bits, flags)
            flags = changed & ~_CF | flags & _CF
        elif kind == op.NOT:
            new = ~old & mask
        elif kind == op.NEG:
            new, flags = _alu(op.SUB, 0, old, bits, flags)
        elif kind in (op.BTS, op.BTR, op.BTC):
            bit = 1 << (operand & (bits - 1))
            flags = flags & ~_CF | (_CF if old & bit else 0)
            new = old | bit if kind == op.BTS else old & ~bit if kind == op.BTR else old ^ bit
        else:
            return self._string(instruction, at, shift, regs)
        if pages.mod_l1(at, word & ~(mask << shift) & WORD | new << shift, False):
            return False
        if loads is not None:
            _store_register(regs, instruction.register, instruction.high_byte, loads, size)
        return self._finish(instruction, regs, flags)

    def _string(self, instruction: op.Instruction, at: int, shift: int, regs: Registers) -> bool:
        """One element of STOS or MOVS; with REP the instruction runs again for the next one."""
        size = instruction.size
        mask = (1 << size * 8) - 1
        if instruction.repeat and regs.rcx == 0:
            return False  # it would not have written: not this instruction's fault
        if instruction.kind == op.STOS:
            value = regs.rax & mask
        else:
            source = regs.rsi
            if instruction.segment:
                source += regs.fs_base if instruction.segment == 0x64 else regs.gs_base
            try:
                value = int.from_bytes(self._memory.read(source & WORD, size), "little")
            except GuestFault:
                return False
        word = self._pages.words[at]
        if self._pages.mod_l1(at, word & ~(mask << shift) & WORD | value << shift, False):
            return False
        step = -size if regs.rflags & _DF else size
        regs.rdi = regs.rdi + step & WORD
        if instruction.kind == op.MOVS:
            regs.rsi = regs.rsi + step & WORD
        if instruction.repeat:
            regs.rcx = regs.rcx - 1 & WORD
            if regs.rcx:
                return True
        return self._finish(instruction, regs, regs.rflags)

    def _operand(self, instruction: op.Instruction, regs: Registers, mask: int) -> int:
        if instruction.register < 0:
            return instruction.immediate
        value = regs.gpr(instruction.register)
        return (value >> 8 if instruction.high_byte else value) & mask

    def _finish(self, instruction: op.Instruction, regs: Registers, flags: int) -> bool:
        regs.rflags = flags
        regs.rip = regs.rip + instruction.length & WORD
        return True


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _store_register(regs: Registers, number: int, high_byte: bool, value: int, size: int) -> None:
    """Write a register operand of 1, 2, 4 or 8 bytes as the processor does (4 bytes clear the upper half)."""
    if size >= 4:
        regs.set_gpr(number, value)
        return
    old = regs.gpr(number)
    if high_byte:
        regs.set_gpr(number, old & ~0xFF00 | value << 8)
    else:
        mask = (1 << size * 8) - 1
        regs.set_gpr(number, old & ~mask | value)


def _alu(kind: int, left: int, right: int, bits: int, flags: int) -> tuple[int, int]:
    """(result, RFLAGS) of an arithmetic or logic instruction (Intel SDM vol. 1, section 3.4.3.1)."""
    mask = (1 << bits) - 1
    sign = 1 << (bits - 1)
    carry = flags & _CF if kind in (op.ADC, op.SBB) else 0
    status = 0
    if kind in (op.ADD, op.ADC):
        total = left + right + carry
        result = total & mask
        status |= _CF if total > mask else 0
        status |= _OF if ~(left ^ right) & (left ^ result) & sign else 0
        status |= (left ^ right ^ result) & _AF
    elif kind in (op.SUB, op.SBB):
        total = left - right - carry
        result = total & mask
        status |= _CF if total < 0 else 0
        status |= _OF if (left ^ right) & (left ^ result) & sign else 0
        status |= (left ^ right ^ result) & _AF
    elif kind == op.AND:
        result = left & right
    elif kind == op.OR:
        result = left | right
    else:
        result = left ^ right
    status |= _ZF if not result else 0
    status |= _SF if result & sign else 0
    status |= _PF if not (result & 0xFF).bit_count() & 1 else 0
    return result, flags & ~_STATUS | status
