"""What QEMU's translator says wrong of an HVM guest's exception, put right before it is delivered.

* #NM where a processor finds #UD first: an MMX or SSE instruction with CR0.EM set, an SSE instruction without CR4.OSFXSR (SDM
  volume 3, tables 2-3 and 13-1).
* #UD, without CR4.OSFXSR, of instructions on general registers that have the prefix 66 in their opcode, SHLX above all (a kernel's own
  decompressor runs it before it sets that bit).
* #GP where the address that is not canonical is reached by the stack segment: #SS (`domains.vcpu.stack_fault`).
* In long mode, the error code of a fault at an IDT entry counts 16 bytes an entry: it is the vector times 8 (SDM volume 3, 6.13).
* A fault while a hardware event is delivered has the EXT bit (same place).
* A fault while INT n, INT3, INTO or ICEBP is delivered is a fault: RIP is at the instruction, not behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.addresses import canonical
from domains.vcpu.api import Registers
from domains.vcpu.stack_fault import by_stack_segment

DB, UD, NM, TS, NP, SS, GP = 1, 6, 7, 10, 11, 12, 13
ALWAYS: Final = 1 << DB | 1 << NM | 1 << NP | 1 << GP
"""Vectors that are looked at even where nothing is being delivered; #DB only to know of it (`watchpoints.py`)."""
HARDWARE, SOFTWARE = 1, 2
"""What is being delivered: an exception; INT n, INT3 or INTO."""
SEGMENT_FAULTS: Final = frozenset((TS, NP, SS, GP))
EC_EXT, EC_IDT = 1, 2
CR0_EM, CR4_OSFXSR, LMA = 1 << 2, 1 << 9, 1 << 10
ICEBP, INT3, INT_N, INTO = 0xF1, 0xCC, 0xCD, 0xCE
BEFORE: Final = 15
"""Bytes before RIP that may belong to the instruction: the longest there is."""
PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_SSE_WITHOUT_PREFIX: Final = frozenset(
    (*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x60), 0xAE, 0xC2, 0xC6)
)
"""Second opcode bytes (after 0F) that name SSE instructions without 66, F2 or F3; the rest of what gives #NM are MMX."""


def skip_prefixes(code: bytes, *, long: bool) -> int:
    """Where the opcode is."""
    at = 0
    while at < len(code) and code[at] in PREFIXES:
        at += 1
    if long and at < len(code) and code[at] & 0xF0 == 0x40:
        at += 1
    return at


def general_registers(code: bytes, *, long: bool) -> bool:
    """The instruction at the start of `code` is SHLX, MOVBE or CRC32: it needs no bit of CR4 (SDM volume 2)."""
    if len(code) >= 4 and code[0] == 0xC4:  # three-byte VEX: map 0F38, pp 66, L 0
        return code[1] & 0x1F == 2 and code[2] & 7 == 1 and code[3] == 0xF7
    at = skip_prefixes(code, long=long)
    return 0x66 in code[:at] and code[at : at + 3] in (b"\x0f\x38\xf0", b"\x0f\x38\xf1")


def undefined_first(code: bytes, cr0: int, cr4: int, *, long: bool) -> bool:
    """The instruction at the start of `code`, which gave #NM, is #UD by these control registers."""
    at = skip_prefixes(code, long=long)
    if code[at : at + 1] != b"\x0f" or len(code) < at + 2:
        return False  # x87, WAIT
    second = code[at + 1]
    if second == 0xAE and (len(code) < at + 3 or code[at + 2] >> 3 & 7 not in (2, 3)):
        return False  # FXSAVE, FXRSTOR, XSAVE and XRSTOR obey EM and TS alike; LDMXCSR and STMXCSR are SSE
    if cr0 & CR0_EM:
        return True
    prefixed = any(byte in b"\x66\xf2\xf3" for byte in code[:at])
    return not cr4 & CR4_OSFXSR and (prefixed or second in _SSE_WITHOUT_PREFIX)


def software_length(before: bytes, vector: int, *, long: bool) -> int:
    """Length of the INT n, INT3 or INTO that `before` ends with. Bytes that are prefixes in front of it count as its own: where
    they are the end of the instruction before, the length is too long by them (nothing tells)."""
    length = 2
    if (vector == 3 and before.endswith(bytes([INT3]))) or (vector == 4 and before.endswith(bytes([INTO]))):
        length = 1
    rest = before[: len(before) - length]
    if long and rest and rest[-1] & 0xF0 == 0x40:
        rest = rest[:-1]
    return len(before) - len(rest.rstrip(bytes(PREFIXES)))


class Corrections:
    """`correct` is called with what QEMU has; it returns the right vector and leaves `regs` right."""

    def __init__(
        self, regs: Registers, code_at: Callable[[int, int], bytes], code_is_long: Callable[[], bool]
    ) -> None:
        """`code_at(RIP, size)`: at most `size` bytes of code there, as far as they are mapped."""
        self._regs: Final = regs
        self._code_at: Final = code_at
        self._long: Final = code_is_long
        self._icebp: tuple[int, int] | None = None

    def icebp(self, code: bytes) -> bool:
        """ICEBP is at RIP: RIP goes behind it, and #DB is to be raised. False if it is something else."""
        at = skip_prefixes(code, long=self._long())
        if code[at : at + 1] != bytes([ICEBP]):
            return False
        start = self._regs.rip
        self._regs.rip = start + at + 1
        self._icebp = start, start + at + 1
        return True

    def correct(self, vector: int, error_code: int, delivering: int, delivered: int) -> tuple[int, int]:
        """(vector, error code). `delivering`: 0, HARDWARE or SOFTWARE: a fault in the delivery of vector `delivered`."""
        if delivering:
            self._back_to_start(delivering, delivered)
        if vector in SEGMENT_FAULTS:
            if error_code & EC_IDT and self._regs.efer & LMA:
                error_code = error_code >> 1 & ~7 | EC_IDT
            if delivering == HARDWARE:
                error_code |= EC_EXT
        if delivering:
            return vector, error_code
        rip = self._regs.rip
        if vector == NM:
            code = self._code_at(rip, BEFORE)
            if undefined_first(code, self._regs.cr0, self._regs.cr4, long=self._long()):
                return UD, 0
        elif (
            vector == GP
            and not error_code
            and self._long()
            and canonical(rip)
            and by_stack_segment(self._code_at(rip, BEFORE), self._regs)
        ):
            return SS, 0
        return vector, error_code

    def _back_to_start(self, delivering: int, delivered: int) -> None:
        rip = self._regs.rip
        if delivering == SOFTWARE:
            before = self._code_before(rip)
            self._regs.rip = rip - software_length(before, delivered, long=self._long())
        elif delivered == DB and self._icebp is not None and self._icebp[1] == rip:
            self._regs.rip = self._icebp[0]
        self._icebp = None

    def _code_before(self, rip: int) -> bytes:
        for size in (BEFORE, min(BEFORE, rip & 0xFFF) or 2):
            code = self._code_at(rip - size, size)
            if len(code) == size:
                return code
        return b"\xcd\x00"  # not readable: an INT n without prefixes
