"""Debug registers of a PV guest: breakpoints fire in kernel and user mode, for the vCPU that set them alone."""

from __future__ import annotations

import struct

import pytest

from bus.abi.arch_x86_64 import VGCF_in_syscall
from bus.abi.xen import HYPERVISOR_iret, HYPERVISOR_set_debugreg
from tests.unit.pvcpu.rig import CODE, DATA, KERNEL_STACK, USER_CODE, USER_STACK, Rig, hypercall, mov_rsp

FLAT_CS, FLAT_SS = 0xE033, 0xE02B
NOPS = b"\x90" * 8
RF = 1 << 16
ENABLE_1 = 1 << 2
"""DR7: the second breakpoint, local, execution."""


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.handler(1)
    return rig


def frame(rig: Rig) -> list[int]:
    """RCX, R11, RIP, CS, RFLAGS, RSP, SS of the last entry on the kernel's stack."""
    return list(rig.qwords(KERNEL_STACK - 7 * 8, 7))


def test_a_breakpoint_in_the_kernel_fires_in_front_of_its_instruction(rig: Rig) -> None:
    """Set by hypercall; the stop comes before the next block."""
    code = hypercall(HYPERVISOR_set_debugreg, 1, CODE + 0x100) + hypercall(
        HYPERVISOR_set_debugreg, 7, ENABLE_1
    )
    rig.put(CODE + 0x100, NOPS + b"\xeb\xfe")
    rig.run(code + b"\xe9" + struct.pack("<i", 0x100 - len(code) - 5))  # jmp
    assert frame(rig)[2] == CODE + 0x100
    assert rig.state.dr6 & 0x400F == 2
    assert rig.domain.traps.exceptions[1] == 1


def resume(rig: Rig, rip: int, flags: int, *, user: bool) -> None:
    """iret to there."""
    cs, stack = (FLAT_CS, USER_STACK) if user else (FLAT_CS & ~3, KERNEL_STACK)
    rig.put(
        DATA, struct.pack("<9Q", 0x99, 1, 2, VGCF_in_syscall if user else 0, rip, cs, flags, stack, FLAT_SS)
    )
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))


@pytest.fixture
def with_user(rig: Rig) -> Rig:
    """A user page table, and two nops behind UD2's place."""
    assert rig.domain.mmu.take_root(rig.frames.base + 4) == 0
    rig.state.user_root = rig.frames.base + 4  # type: ignore[assignment]  # a plain number is an MFN here
    rig.state.kernel_sp = KERNEL_STACK
    rig.handler(6)
    rig.put(USER_CODE, b"\x90\x90\x90\x0f\x0b")
    return rig


def test_a_breakpoint_in_user_mode_and_the_resume_flag(with_user: Rig) -> None:
    """#DB at the instruction; the handler goes on with RF set, and the instruction runs."""
    rig = with_user
    rig.state.dr[1], rig.state.dr7 = USER_CODE + 1, ENABLE_1
    resume(rig, USER_CODE, 0x202, user=True)
    assert frame(rig)[2] == USER_CODE + 1
    assert frame(rig)[3] & 0xFFFF == FLAT_CS
    resume(rig, USER_CODE + 1, 0x202 | RF, user=True)
    assert frame(rig)[2] == USER_CODE + 3, "UD2"
    assert rig.domain.traps.exceptions[1] == 1
    resume(rig, USER_CODE, 0x202, user=True)
    assert frame(rig)[2] == USER_CODE + 1, "it fires the next time"


def test_a_breakpoint_that_is_taken_back_does_not_fire(with_user: Rig) -> None:
    rig = with_user
    rig.state.dr[1], rig.state.dr7 = USER_CODE + 1, ENABLE_1
    resume(rig, USER_CODE, 0x202, user=True)
    rig.state.dr7 = 0x400
    resume(rig, USER_CODE, 0x202, user=True)
    assert frame(rig)[2] == USER_CODE + 3
    assert rig.domain.traps.exceptions[1] == 1
    assert not rig.cpu.vcpu.breakpoints_armed


def test_a_step_onto_a_breakpoint_shows_both(with_user: Rig) -> None:
    """As ptrace does it: BS, and then the breakpoint's bit."""
    rig = with_user
    rig.state.dr[1], rig.state.dr7 = USER_CODE + 1, ENABLE_1
    resume(rig, USER_CODE, 0x302, user=True)
    assert frame(rig)[2] == USER_CODE + 1
    assert rig.state.dr6 & 0x4000
    rig.state.dr6 = 0xFFFF0FF0
    resume(rig, USER_CODE + 1, 0x302 | RF, user=True)
    assert frame(rig)[2] == USER_CODE + 2
    assert rig.state.dr6 & 0x400F == 0x4000


def test_a_data_breakpoint_in_the_kernel_fires_behind_the_store(rig: Rig) -> None:
    """Set by hypercall, as Linux sets it: write, four bytes."""
    code = hypercall(HYPERVISOR_set_debugreg, 1, DATA + 8) + hypercall(
        HYPERVISOR_set_debugreg, 7, ENABLE_1 | 0xD << 20
    )
    store = (
        b"\x48\xb8" + struct.pack("<Q", DATA) + b"\xc7\x40\x08\x55\x00\x00\x00"
    )  # mov dword [rax + 8], 0x55
    rig.put(CODE + 0x100, store + b"\xeb\xfe")
    rig.run(code + b"\xe9" + struct.pack("<i", 0x100 - len(code) - 5))
    assert frame(rig)[2] == CODE + 0x100 + len(store)
    assert rig.state.dr6 & 0x400F == 2
    assert rig.domain.traps.exceptions[1] == 1
    assert rig.qwords(DATA + 8, 1)[0] == 0x55


def test_breakpoints_follow_the_vcpu() -> None:
    """Disarmed while another vCPU has its turn, armed again with the first."""
    rig = Rig()
    rig.state.dr[0], rig.state.dr7 = CODE, 1
    rig.cpu.arm_breakpoints()
    assert rig.cpu.vcpu.breakpoints_armed
    rig.cpu.switch_out()
    assert not rig.cpu.vcpu.breakpoints_armed
    rig.cpu.switch_in(rig.state)
    rig.cpu.arm_breakpoints()
    assert rig.cpu.vcpu.breakpoints_armed
