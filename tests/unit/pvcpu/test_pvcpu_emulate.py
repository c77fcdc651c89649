"""Privileged instructions of the guest kernel: what is emulated, what is #GP or #UD, by real machine code at CPL3."""

from __future__ import annotations

import struct

import pytest

from bus.abi.physdev import PHYSDEVOP_set_iobitmap, PHYSDEVOP_set_iopl
from bus.abi.xen import HYPERVISOR_fpu_taskswitch, HYPERVISOR_physdev_op, HYPERVISOR_set_debugreg
from domains.pv.cpuid import BRAND, CpuidPolicy
from domains.pv.msr import MISC_ENABLE, XEN_PAT
from tests.unit.pvcpu.rig import (
    CODE,
    DATA,
    HANDLERS,
    KERNEL_STACK,
    STOP,
    SYSCALL,
    USER_CODE,
    Rig,
    hypercall,
    mov_rax,
)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def gp(rig: Rig) -> bool:
    """The guest took #GP(0) at the last instruction tried; forget it."""
    words = rig.qwords(KERNEL_STACK - 8 * 8, 8)
    taken = rig.regs.rip == HANDLERS + len(STOP)
    rig.regs.rsp = KERNEL_STACK
    return taken and words[2] == 0


RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xC0000080, 0xD01),
        (0x277, XEN_PAT),
        (0x1A0, MISC_ENABLE),
        (0x179, 0),
        (0x8B, 0),
        (0x1B, 0xFEE00900),
        (0xCE, 1 << 31),
        (0x10, 1_000_000),
    ],
)
def test_rdmsr(rig: Rig, index: int, value: int) -> None:
    rig.handler(13)
    rig.run(b"\xb9" + struct.pack("<I", index) + RDMSR)
    assert rig.regs.rip != HANDLERS + len(STOP), "no #GP"
    assert rig.regs.rdx << 32 | rig.regs.rbx * 0 | _saved_rax(rig, index) == value


def _saved_rax(rig: Rig, index: int) -> int:
    """RAX is the stop's number at the end: run again with the value moved to RBX."""
    rig.run(b"\xb9" + struct.pack("<I", index) + RDMSR + b"\x89\xc3")
    return rig.regs.rbx


@pytest.mark.parametrize("index", [0x1234, 0xC0000081, 0x38F, 0xC0010015])
def test_unknown_msrs_are_gp(rig: Rig, index: int) -> None:
    rig.handler(13)
    for opcode in (RDMSR, WRMSR):
        rig.run(b"\xb9" + struct.pack("<I", index) + opcode)
        assert gp(rig)


def test_base_msrs(rig: Rig) -> None:
    """FS, GS and the inactive GS base; a non-canonical base is #GP."""
    rig.handler(13)
    for index, name in ((0xC0000100, "fs_base"), (0xC0000101, "gs_base"), (0xC0000102, "kernel_gs_base")):
        rig.run(b"\xb9" + struct.pack("<I", index) + b"\xb8\x00\x10\x00\x00\xba\x80\xff\xff\xff" + WRMSR)
        assert getattr(rig.regs, name) == 0xFFFFFF80_00001000
    rig.run(b"\xb9\x00\x01\x00\xc0\x31\xc0\xba\x00\x00\x80\x00" + WRMSR)
    assert gp(rig)


def test_hypercall_page_msr_fills_the_page(rig: Rig) -> None:
    rig.run(b"\xb9\x00\x00\x00\x40\xb8\x00\x80\x02\x01\x31\xd2" + WRMSR)
    page = rig.frames.octets[0x28 * 4096 : 0x29 * 4096]
    assert bytes(page[32 * 3 : 32 * 3 + 10]) == b"\x51\x41\x53\xb8\x03\0\0\0\x0f\x05"
    assert bytes(page[32 * 23 : 32 * 23 + 4]) == b"\x51\x41\x53\x50"


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("hlt", b"\xf4"),
        ("invlpg", b"\x0f\x01\x38"),
        ("lmsw", b"\x0f\x01\xf0"),
        ("lgdt", b"\x0f\x01\x10"),
        ("invd", b"\x0f\x08"),
        ("mov rax, cr8", b"\x44\x0f\x20\xc0"),
        ("cli", b"\xfa"),
        ("sti", b"\xfb"),
    ],
)
def test_not_emulated(rig: Rig, what: str, code: bytes) -> None:
    """HLT and the like are #GP, as on Xen; CLI and STI too while the IOPL is 0."""
    rig.handler(13)
    rig.run(code)
    assert gp(rig), what


def test_cli_and_sti_with_iopl_do_nothing(rig: Rig) -> None:
    rig.handler(13)
    rig.put(DATA, struct.pack("<I", 1))
    rig.mask = 0
    rig.run(hypercall(HYPERVISOR_physdev_op, PHYSDEVOP_set_iopl, DATA) + b"\xfa\xfb\xfa")
    assert rig.regs.rip != HANDLERS + len(STOP)
    assert rig.mask == 0
    rig.put(DATA, struct.pack("<I", 4))
    rig.run(hypercall(HYPERVISOR_physdev_op, PHYSDEVOP_set_iopl, DATA) + b"\x48\x89\xc3")
    assert rig.regs.rbx == (1 << 64) - 22


def test_control_registers(rig: Rig) -> None:
    """CR0: only TS changes; CR3 is the root; CR4 keeps what is not the guest's."""
    rig.run(b"\x0f\x20\xc3\x0f\x20\xd9\x0f\x20\xe2")  # mov rbx,cr0; mov rcx,cr3; mov rdx,cr4
    assert rig.regs.rbx == 0x80050033
    assert rig.regs.rcx >> 12 == rig.state.kernel_root
    assert rig.regs.rdx == 0x620
    rig.run(mov_rax(0x8005003B) + b"\x0f\x22\xc0" + mov_rax(0xFFFFFFFF) + b"\x0f\x22\xe0")
    assert rig.state.cr0 == 0x8005003B
    assert rig.state.cr4 == 0x1062C
    rig.run(b"\x0f\x06")  # clts
    assert rig.state.cr0 == 0x80050033
    rig.handler(13)
    rig.run(mov_rax(0x80040033) + b"\x0f\x22\xc0")
    assert gp(rig)
    assert rig.state.cr0 == 0x80050033


def test_ts_gives_nm_once(rig: Rig) -> None:
    """An SSE instruction with TS set: #NM, TS clear afterwards."""
    rig.handler(7)
    rig.run(hypercall(HYPERVISOR_fpu_taskswitch, 1) + b"\x66\x0f\xef\xc0")  # pxor xmm0, xmm0
    assert rig.regs.rip == HANDLERS + len(STOP)
    assert not rig.state.cr0 & 8
    rig.regs.rsp = KERNEL_STACK
    rig.run(b"\x66\x0f\xef\xc0")
    assert rig.regs.rip != HANDLERS + len(STOP)


def test_debug_registers(rig: Rig) -> None:
    rig.handler(13)
    rig.handler(6, 1)
    rig.run(mov_rax(0x1234) + b"\x0f\x23\xc0\x0f\x21\xc3")  # mov dr0, rax; mov rbx, dr0
    assert rig.regs.rbx == 0x1234
    rig.run(mov_rax(0xFFFF_8000_0000_0000) + b"\x0f\x23\xc0")
    assert gp(rig), "an address of Xen's"
    rig.run(mov_rax(0x2000) + b"\x0f\x23\xf8")
    assert gp(rig), "DR7.GD"
    rig.run(mov_rax(1 << 32) + b"\x0f\x23\xf0")
    assert gp(rig), "upper half of DR6"
    rig.run(hypercall(HYPERVISOR_set_debugreg, 9, 0) + b"\x48\x89\xc3")
    assert rig.regs.rbx == (1 << 64) - 19
    rig.state.cr4 |= 8
    rig.run(b"\x0f\x21\xe3")  # mov rbx, dr4 with CR4.DE
    assert rig.regs.rip == HANDLERS + 64 + len(STOP)


def test_xsetbv_is_ud_and_rdtsc_is_the_clock(rig: Rig) -> None:
    rig.handler(6)
    rig.now = 0x5_0000_0007
    rig.run(b"\x0f\x31\x89\xc3")
    assert (rig.regs.rdx, rig.regs.rbx) == (5, 7)
    rig.run(b"\x0f\x01\xd1")
    assert rig.regs.rip == HANDLERS + len(STOP)


def test_user_mode_gets_none_of_it(rig: Rig) -> None:
    rig.handler(13)
    for code in (b"\x0f\x06", RDMSR, b"\x0f\x20\xc0", b"\x0f\x09", b"\xfa"):
        rig.enter_user(code)
        assert rig.qwords(KERNEL_STACK - 64, 8)[3] == USER_CODE
        assert gp(rig)


def test_ports(rig: Rig) -> None:
    """#GP without IOPL or bitmap; with it ones are read, and CONFIG_ADDRESS and the RTC index are kept."""
    rig.handler(13)
    rig.run(b"\xe4\x60")
    assert gp(rig)
    rig.state.iopl = 0x1000
    rig.run(b"\xe4\x60\x89\xc3")
    assert rig.regs.rbx & 0xFF == 0xFF
    out = b"\x66\xba\xf8\x0c\xb8\x00\x00\x00\x80\xef\x31\xc0\xed\x89\xc3"  # out dx, eax; in eax, dx
    rig.run(out)
    assert rig.regs.rbx == 0x80000000
    rig.run(b"\xb0\x0b\xe6\x70\x31\xc0\xe4\x70\x89\xc3")
    assert rig.regs.rbx == 0x0B
    rig.enter_user(b"\xe4\x60")
    assert gp(rig), "IOPL 1 is the kernel's"


def test_io_bitmap(rig: Rig) -> None:
    rig.handler(13)
    bitmap = bytearray(b"\xff" * 64)
    bitmap[0x60 >> 3] &= ~1
    rig.put(DATA + 64, bytes(bitmap))
    rig.put(DATA, struct.pack("<QI", DATA + 64, 512))
    rig.run(hypercall(HYPERVISOR_physdev_op, PHYSDEVOP_set_iobitmap, DATA) + b"\xe4\x60\x89\xc3")
    assert rig.regs.rbx & 0xFF == 0xFF
    rig.run(b"\xe4\x61")
    assert gp(rig)
    rig.run(b"\x66\xba\x00\x02\xec")
    assert gp(rig), "beyond the limit"


# --- CPUID


def test_cpuid_instruction_and_forced_emulation_agree(rig: Rig) -> None:
    rig.run(b"\xb8\x00\x00\x00\x40\x31\xc9\x0f\xa2\x89\xd6\x89\xcf\x41\x89\xc0")
    name = b"".join(struct.pack("<I", value) for value in (rig.regs.rbx, rig.regs.rdi, rig.regs.rsi))
    assert name == b"XenVMMXenVMM"
    assert rig.regs.r8 == 0x40000005
    rig.run(b"\xb8\x01\x00\x00\x40\x31\xc9\x0f\x0bxen\x0f\xa2\x41\x89\xc0")
    assert rig.regs.r8 == 4 << 16 | 17


def test_forced_emulation_of_anything_else_is_ud(rig: Rig) -> None:
    rig.handler(6)
    rig.run(b"\x0f\x0bxen\x0f\x31")
    assert rig.qwords(KERNEL_STACK - 56, 7)[2] == CODE


def test_cpuid_faulting(rig: Rig) -> None:
    """With MISC_FEATURES_ENABLES bit 0, CPUID in user mode is #GP, in the kernel not."""
    rig.handler(13)
    rig.run(b"\xb9\x40\x01\x00\x00\xb8\x01\x00\x00\x00\x31\xd2" + WRMSR + b"\x31\xc0\x0f\xa2")
    assert rig.regs.rip != HANDLERS + len(STOP)
    rig.enter_user(b"\x0f\xa2" + SYSCALL)
    assert rig.qwords(KERNEL_STACK - 64, 8)[3] == USER_CODE


def test_policy_hides_what_the_vcpu_lacks() -> None:
    """No AVX, XSAVE, OSXSAVE, x2APIC, TSC-deadline, MONITOR; no SMAP, INVPCID, AVX2; no MCE, MCA, MTRR, PSE."""
    policy = CpuidPolicy(2)
    _, ebx, ecx, edx = policy.query(1, 0, 1)
    for bit in (3, 12, 17, 21, 24, 26, 27, 28, 29):
        assert not ecx >> bit & 1, bit
    for bit in (3, 7, 12, 14, 17):
        assert not edx >> bit & 1, bit
    assert ecx >> 31 & 1
    assert ebx >> 24 == 2
    for bit in (5, 7, 10, 20):
        assert not policy.query(7, 0, 0)[1] >> bit & 1, bit
    assert policy.query(7, 1, 0) == (0, 0, 0, 0)
    assert policy.query(0xD, 0, 0) == (0, 0, 0, 0)
    words = [policy.query(0x80000002 + i, 0, 0) for i in range(3)]
    assert b"".join(struct.pack("<4I", *w) for w in words).rstrip(b"\0") == BRAND
    assert policy.query(0, 0, 0)[0] == 0x16
    denominator, numerator, crystal, _ = policy.query(0x15, 0, 0)
    assert crystal * numerator // denominator == 1_000_000_000
    assert policy.query(0x40000003, 0, 0)[2] == 1_000_000
    assert policy.query(0x40000003, 1, 0) == (0, 0, 1 << 31, 1)
    assert policy.query(0x40000005, 0, 0)[1] == 40
    assert policy.query(0x40000002, 0, 0) == (1, 0x40000000, 1, 0)
