"""The `Registers` view: the live CPU state as a C structure, one attribute a register.

Every field is a ctypes field at its place in the CPU state (about 0.04 us to read, 0.05 us to write; a
value is taken modulo its width). Faster still, for hot paths in `domains/vcpu` and `domains/pv` only: `q`,
the state as 64-bit words, with the index constants below (`regs.q[RAX]`; values must then be in range).

The arithmetic flags are lazy: the translated code leaves behind what they follow from. `rflags` computes
them.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from domains.vcpu.insides import SEGMENT_NAMES, SEGMENT_SIZE, Fixed, Offsets, library

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
RIP: Final = Fixed.RIP // 8
GENERAL_NAMES: Final = tuple(f"r{n}" for n in ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *range(8, 16)))
CR0: Final = Fixed.CR // 8
CR2: Final = CR0 + 2
CR3: Final = CR0 + 3
CR4: Final = CR0 + 4
FS_BASE: Final = (Fixed.SEGMENTS + 4 * SEGMENT_SIZE + 8) // 8
GS_BASE: Final = (Fixed.SEGMENTS + 5 * SEGMENT_SIZE + 8) // 8
"""Indices in `EnvRegisters.q`."""

M64: Final = (1 << 64) - 1
CC_OP_EFLAGS: Final = 1
"""`cc_op` when `cc_src` holds the arithmetic flags themselves."""
ARITHMETIC: Final = 0x8D5
"""CF, PF, AF, ZF, SF, OF."""
RFLAGS_FIXED: Final = 0x2
RFLAGS_MASK: Final = 0x3F7FD5
"""Every flag that exists; bit 1 is always set, the others always clear."""

HF_OSFXSR: Final = 1 << 22
"""In hflags: CR4.OSFXSR."""
HF_CPL: Final = 3
"""In hflags: the current privilege level."""

_read_eflags = library().held("helper_read_eflags_x86_64", ctypes.c_uint32, ctypes.c_void_p)


class Segment(NamedTuple):
    """A segment register with its hidden part."""

    selector: int
    base: int
    limit: int
    """In bytes."""
    attributes: int
    """Descriptor bits 40..55: type 0..3, S 4, DPL 5..6, P 7, AVL 12, L 13, D/B 14, G 15 (as VMX and SVM lay
    access rights out, with the gap closed as in the descriptor)."""


class EnvRegisters(ctypes.Structure):
    """`domains.vcpu.api.Registers` over the CPU state; see the module for the cost of an access.

    Valid on the vCPU's thread only, between runs and inside hooks. Writing CR0, CR4, EFER or a selector
    here has no side effect: `Machine.load_segment` has.
    """

    if TYPE_CHECKING:
        rax: int
        rcx: int
        rdx: int
        rbx: int
        rsp: int
        rbp: int
        rsi: int
        rdi: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int
        rip: int
        cr0: int
        cr2: int
        cr3: int
        cr4: int
        efer: int
        fs_base: int
        gs_base: int
        kernel_gs_base: int
        cs: int
        ss: int
        ds: int
        es: int
        fs: int
        gs: int
        gdtr_base: int
        gdtr_limit: int
        idtr_base: int
        idtr_limit: int
        ldtr_base: int
        ldtr_limit: int
        tr_base: int
        hflags: int
        hflags2: int
        error_code: int
        exception_is_int: int
        exception_next_eip: int
        old_exception: int
        vmcb: int
        star: int
        lstar: int
        fmask: int
        tsc_aux: int
        sysenter_cs: int
        sysenter_esp: int
        sysenter_eip: int
        _rflags: int
        _cc_src: int
        _cc_op: int
        _df: int
    q: memoryview
    """The state as 64-bit words; the constants RAX ... GS_BASE of this module index it."""
    d: memoryview
    """The state as 32-bit words."""
    address: int
    """Host address of the CPU state."""

    def gpr(self, index: int) -> int:
        """General register by its number in machine code (0 RAX ... 15 R15)."""
        if not 0 <= index < 16:
            raise IndexError(f"general register {index}")
        value: int = self.q[index]
        return value

    def set_gpr(self, index: int, value: int) -> None:
        """Write a general register (modulo 2**64) by its number."""
        if not 0 <= index < 16:
            raise IndexError(f"general register {index}")
        self.q[index] = value & M64

    @property
    def rflags(self) -> int:
        """The architectural value, arithmetic flags and DF computed."""
        if self._cc_op == CC_OP_EFLAGS:
            flags = self._rflags & ~0xCD5 | self._cc_src & ARITHMETIC | self._df & 0x400
        else:
            flags = int(_read_eflags(self.address))
        return flags & RFLAGS_MASK | RFLAGS_FIXED

    @rflags.setter
    def rflags(self, value: int) -> None:
        # The whole value goes to env.eflags too: the entry of the run loop takes the arithmetic flags from
        # there.
        self._cc_op = CC_OP_EFLAGS
        self._cc_src = value & ARITHMETIC
        self._df = -1 if value & 0x400 else 1
        self._rflags = value & RFLAGS_MASK | RFLAGS_FIXED

    @property
    def cpl(self) -> int:
        """The current privilege level."""
        return self.hflags & HF_CPL

    def segment(self, name: str) -> Segment:
        """A segment or system segment register (es cs ss ds fs gs ldtr tr) with its hidden part."""
        at = self.address + Fixed.SEGMENTS + SEGMENT_SIZE * SEGMENT_NAMES.index(name)
        selector, base, limit, flags = struct.unpack("<I4xQII", ctypes.string_at(at, SEGMENT_SIZE))
        return Segment(selector & 0xFFFF, base, limit, flags >> 8 & 0xFFFF)

    def set_segment(self, name: str, value: Segment) -> None:
        """Write a segment register and its hidden part. The run loop's derived flags are the caller's
        business."""
        at = self.address + Fixed.SEGMENTS + SEGMENT_SIZE * SEGMENT_NAMES.index(name)
        packed = struct.pack(
            "<I4xQII",
            value.selector & 0xFFFF,
            value.base & M64,
            value.limit,
            (value.attributes & 0xFFFF) << 8,
        )
        ctypes.memmove(at, packed, SEGMENT_SIZE)


def registers_class(found: Offsets) -> type[EnvRegisters]:
    """The view's class for the offsets of the loaded library."""
    u64, u32, i32 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int32
    places: dict[str, tuple[int, Any]] = {
        name: (8 * number, u64) for number, name in enumerate(GENERAL_NAMES)
    }
    places |= {
        "rip": (Fixed.RIP, u64),
        "_rflags": (Fixed.RFLAGS, u64),
        "_cc_src": (Fixed.CC_SRC, u64),
        "_cc_op": (Fixed.CC_OP, u32),
        "_df": (Fixed.DF, i32),
        "hflags": (Fixed.HFLAGS, u32),
        "hflags2": (Fixed.HFLAGS2, u32),
    }
    for number, name in enumerate(SEGMENT_NAMES):
        at = Fixed.SEGMENTS + SEGMENT_SIZE * number
        places[name] = (at, u32)
        places[f"{name}_base"] = (at + 8, u64)
        places[f"{name}_limit"] = (at + 16, u32)
    places |= {f"cr{number}": (Fixed.CR + 8 * number, u64) for number in (0, 2, 3, 4)}
    places |= {
        name: (getattr(found, name), u64)
        for name in (
            "efer",
            "star",
            "lstar",
            "fmask",
            "kernel_gs_base",
            "sysenter_esp",
            "sysenter_eip",
            "exception_next_eip",
            "vmcb",
        )
    }
    places |= {
        "error_code": (found.error_code, u32),
        "exception_is_int": (found.exception_is_int, u32),
        "old_exception": (found.old_exception, i32),
        "tsc_aux": (found.tsc_aux, u64),
        "sysenter_cs": (found.sysenter_cs, u32),
    }
    fields: list[tuple[str, Any]] = []
    end = 0
    for name, (at, kind) in sorted(places.items(), key=lambda item: item[1][0]):
        if at > end:
            fields.append((f"_gap{end}", ctypes.c_uint8 * (at - end)))
        elif at < end:
            raise AssertionError(f"{name} overlaps its neighbour in the CPU state")
        fields.append((name, kind))
        end = at + ctypes.sizeof(kind)
    made = type("Registers", (EnvRegisters,), {"_pack_": 1, "_fields_": fields})
    for name, (at, _) in places.items():
        assert getattr(made, name).offset == at, name
    return made


def view(address: int, found: Offsets) -> EnvRegisters:
    """The registers of the CPU state at `address`."""
    registers = registers_class(found).from_address(address)
    raw = memoryview((ctypes.c_uint8 * (found.uc & ~7)).from_address(address)).cast("B")
    registers.q = raw.cast("Q")
    registers.d = raw.cast("I")
    registers.address = address
    return registers
