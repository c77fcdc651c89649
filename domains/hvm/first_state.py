"""VCPUOP_initialise of an HVM or PVH vCPU: `vcpu_hvm_context` (hvm/hvm_vcpu.h) checked and made a CPU record.

32-bit mode is given with its segments; in 64-bit mode they are flat. What is wrong is EINVAL for the guest.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from bus.abi.hvm import hvm_vcpu as abi
from bus.abi.hvm.save import HVM_HW_CPU, hvm_hw_cpu
from bus.addresses import canonical

PE, PG = 1, 1 << 31
PAE: Final = 1 << 5
LME, LMA = 1 << 8, 1 << 10
EFER_BITS: Final = 0xD01
CR4_BITS: Final = 0x7FF_FFFF
FLAGS: Final = 0x3F7FD5
FLAT: Final = 0xFFFFFFFF
CODE, WRITABLE, BUSY_TSS = 8, 2, 0xB
CODE64, DATA, TSS = 0xA9B, 0xC93, 0x8B


class Segment(NamedTuple):
    """Of the context; `rights` as in a descriptor, without the limit's high bits."""

    base: int
    limit: int
    rights: int

    @property
    def type(self) -> int:
        return self.rights & 15

    @property
    def system(self) -> bool:
        return not self.rights & 0x10

    @property
    def dpl(self) -> int:
        return self.rights >> 5 & 3

    @property
    def last(self) -> int:
        """The last byte, by the granularity."""
        return (self.limit << 12 | 0xFFF) & FLAT if self.rights & 0x800 else self.limit


def _segment_ok(name: str, segment: Segment) -> bool:
    if segment.rights >> 12:
        return False
    if not segment.rights:
        return name in ("ds", "es")
    if not segment.rights & 0x80:
        return False
    if name == "tr":
        return segment.system and segment.type == BUSY_TSS
    if segment.system:
        return False
    code = bool(segment.type & CODE)
    if name == "cs":
        return code
    if name == "ss":
        return not code and bool(segment.type & WRITABLE)
    return not code or bool(segment.type & WRITABLE)  # of code: readable


def _protected(given: Any) -> dict[str, Segment] | None:
    if given.pad1 or any(given.pad2) or given.efer & LMA:
        return None
    found = {
        name: Segment(*(getattr(given, f"{name}_{part}") for part in ("base", "limit", "ar")))
        for name in ("cs", "ds", "es", "ss", "tr")
    }
    if not all(_segment_ok(name, segment) for name, segment in found.items()):
        return None
    level = found["cs"].dpl
    if found["ss"].dpl != level or given.eip > found["cs"].last:
        return None
    if any(found[name].rights and found[name].dpl < level for name in ("ds", "es")):
        return None
    return found


def _long(given: Any) -> dict[str, Segment] | None:
    if not canonical(given.rip) or not given.cr0 & PE or not given.cr0 & PG:
        return None
    if not given.cr4 & PAE or not given.efer & LME:
        return None
    data = Segment(0, FLAT, DATA)
    return {"cs": Segment(0, FLAT, CODE64), "ds": data, "es": data, "ss": data, "tr": Segment(0, 0x67, TSS)}


def first_state(data: bytes) -> hvm_hw_cpu | None:
    """None: a state that a vCPU cannot begin in."""
    context = abi.VCPU_HVM_CONTEXT.unpack(data)
    given: Any
    if context.mode == abi.VCPU_HVM_MODE_32B:
        given = abi.VCPU_HVM_X86_32.unpack(context.cpu_regs[: abi.VCPU_HVM_X86_32.size])
        segments, prefix = _protected(given), "e"
    elif context.mode == abi.VCPU_HVM_MODE_64B:
        given = abi.VCPU_HVM_X86_64.unpack(context.cpu_regs[: abi.VCPU_HVM_X86_64.size])
        segments, prefix = _long(given), "r"
    else:
        return None
    if segments is None or context.pad or given.cr4 & ~CR4_BITS or given.efer & ~(EFER_BITS | LMA):
        return None
    if given.cr0 & PG and not given.cr0 & PE:
        return None
    fields: dict[str, Any] = {
        f"r{name}": getattr(given, prefix + name)
        for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp", "ip")
    }
    for name, segment in segments.items():
        fields[f"{name}_base"], fields[f"{name}_limit"] = segment.base, segment.last
        fields[f"{name}_arbytes"] = segment.rights
    fields["tr_limit"] = segments["tr"].limit
    return HVM_HW_CPU.zero()._replace(
        rflags=getattr(given, prefix + "flags") & FLAGS | 2,
        cr0=given.cr0,
        cr3=given.cr3,
        cr4=given.cr4,
        msr_efer=given.efer & ~LMA,
        dr6=0xFFFF0FF0,
        dr7=0x400,
        **fields,
    )
