"""VCPUOP_initialise and VCPUOP_up of HVM and PVH guests: contexts that are taken and refused, vCPUs that begin with them."""

from __future__ import annotations

from typing import Any

import pytest

from bus.abi.errno import XEN_EEXIST, XEN_EFAULT, XEN_EINVAL, XEN_ENOENT
from bus.abi.hvm.hvm_vcpu import (
    VCPU_HVM_CONTEXT,
    VCPU_HVM_MODE_32B,
    VCPU_HVM_MODE_64B,
    VCPU_HVM_X86_32,
    VCPU_HVM_X86_64,
    vcpu_hvm_context,
)
from bus.abi.vcpu import VCPUOP_get_physid, VCPUOP_initialise, VCPUOP_up
from bus.abi.xen import HYPERVISOR_vcpu_op
from domains.hvm.first_state import first_state
from tests.unit.hvm.hvm_rig import CODE, DATA, FLAT, STACK, TABLES, Rig, mov

SECOND, CONTEXT, RESULTS = 0x12000, 0x13000, DATA + 0x100
CODE32, DATA32, TSS = 0xC9B, 0xC93, 0x8B


def protected(**changes: Any) -> bytes:
    """Flat 32-bit code without paging."""
    fields: dict[str, Any] = {
        "eip": SECOND,
        "esp": STACK,
        "ebx": 0x1234,
        "eflags": 2,
        "cr0": 0x11,
        "tr_limit": 0x67,
        "tr_ar": TSS,
        "cs_ar": CODE32,
    }
    for name in ("ds", "es", "ss"):
        fields[f"{name}_ar"], fields[f"{name}_limit"] = DATA32, FLAT
    fields["cs_limit"] = FLAT
    regs = VCPU_HVM_X86_32.pack(VCPU_HVM_X86_32.zero()._replace(**{**fields, **changes}))
    return whole(VCPU_HVM_MODE_32B, regs)


def long(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "rip": SECOND,
        "rsp": STACK,
        "rbx": 0x1234,
        "rflags": 2,
        "cr0": 0x80000011,
        "cr3": TABLES,
        "cr4": 0x20,
        "efer": 0x100,
    }
    regs = VCPU_HVM_X86_64.pack(VCPU_HVM_X86_64.zero()._replace(**{**fields, **changes}))
    return whole(VCPU_HVM_MODE_64B, regs)


def whole(mode: int, regs: bytes, pad: int = 0) -> bytes:
    size = VCPU_HVM_CONTEXT.field_size("cpu_regs")
    return VCPU_HVM_CONTEXT.pack(vcpu_hvm_context(mode, pad, regs.ljust(size, b"\0")))


@pytest.mark.parametrize(
    "data",
    [
        protected(cs_ar=DATA32), protected(cs_ar=0), protected(cs_ar=CODE32 & ~0x80), protected(cs_ar=CODE32 | 0x1000),
        protected(ss_ar=0), protected(ss_ar=CODE32), protected(ss_ar=DATA32 & ~2), protected(ss_ar=DATA32 | 0x60),
        protected(ds_ar=0xC99), protected(es_ar=0x82), protected(tr_ar=0), protected(tr_ar=0x89), protected(tr_ar=DATA32),
        protected(cs_ar=CODE32 | 0x60, ss_ar=DATA32 | 0x60), protected(cs_limit=0x11, cs_ar=CODE32 & ~0x800), protected(pad1=1), protected(pad2=(0, 1, 0)),
        protected(efer=0x400), protected(efer=0x2), protected(cr4=1 << 31), protected(cr0=1 << 31),
        long(rip=1 << 47), long(cr0=0x11), long(cr0=0x80000010), long(cr4=0), long(efer=0), long(cr4=1 << 40),
        whole(7, b""), whole(VCPU_HVM_MODE_64B, long()[8:], pad=1),
    ],
)  # fmt: skip
def test_a_context_that_no_vcpu_can_begin_with(data: bytes) -> None:
    assert first_state(data) is None


def test_what_is_not_given_is_as_after_reset_or_flat() -> None:
    cpu = first_state(protected(ds_ar=0, cs_limit=0x7FF, efer=0x100))
    assert cpu is not None
    assert (cpu.rip, cpu.rbx, cpu.cs_limit, cpu.ds_arbytes, cpu.msr_efer) == (
        SECOND,
        0x1234,
        0x7FFFFF,
        0,
        0x100,
    )
    cpu = first_state(long(efer=0x500, rflags=1 << 63 | 0x202))
    assert cpu is not None
    assert (cpu.cs_arbytes, cpu.ss_limit, cpu.tr_limit, cpu.rflags, cpu.r8) == (0xA9B, FLAT, 0x67, 0x202, 0)


def call(guest: Rig, cmd: int, vcpu: int, arg: int, at: int) -> str:
    """vcpu_op by VMCALL; its result is stored at `at`."""
    numbers = (
        (("edi", cmd), ("esi", vcpu), ("edx", arg))
        if guest.bits == 64
        else (("ebx", cmd), ("ecx", vcpu), ("edx", arg))
    )
    return (
        "".join(mov(*n) for n in numbers) + mov("eax", HYPERVISOR_vcpu_op) + "0f01c1" + guest.store("eax", at)
    )


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("second", [32, 64])
def test_a_vcpu_begins_with_its_registers(bits: int, second: int, paging: str) -> None:
    guest = Rig("f4", bits=bits, vcpus=2)
    calls = (
        (VCPUOP_up, 1, 0, -XEN_EINVAL),
        (VCPUOP_initialise, 5, CONTEXT, -XEN_ENOENT),
        (VCPUOP_initialise, 1, 0xF0000000, -XEN_EFAULT),
        (VCPUOP_initialise, 1, CONTEXT + 0x800, -XEN_EINVAL),
        (VCPUOP_initialise, 1, CONTEXT, 0),
        (VCPUOP_initialise, 1, CONTEXT, -XEN_EEXIST),
        (VCPUOP_initialise, 0, CONTEXT, -XEN_EEXIST),
        (VCPUOP_get_physid, 0, CONTEXT, -XEN_EINVAL),
        (VCPUOP_up, 1, 0, 0),
    )
    code = "".join(call(guest, *what[:3], RESULTS + 4 * at) for at, what in enumerate(calls))
    guest.write(CODE, code + "f390ebfc")
    guest.write(CONTEXT, long() if second == 64 else protected())
    guest.write(CONTEXT + 0x800, protected(cr0=1 << 31))
    guest.bits = second
    guest.write(
        SECOND, guest.store("ebx", DATA) + mov("eax", 0x5A) + guest.store("eax", DATA + 4) + "f390ebfc"
    )
    guest.run(8)
    assert [guest.word(RESULTS + 4 * at) for at in range(len(calls))] == [what[3] & FLAT for what in calls]
    assert (guest.word(DATA), guest.word(DATA + 4)) == (0x1234, 0x5A)
    assert guest.domain.states[1].online
