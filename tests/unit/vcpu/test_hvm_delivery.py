"""Exceptions and interrupts of an HVM vCPU, through the guest's own tables."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason, VcpuError
from domains.vcpu.hvm_testing import HANDLERS, IST1, STACK, HvmGuest
from tests.unit.vcpu.hvm_programs import WITH_CODE, WITHOUT_CODE

pytestmark = pytest.mark.usefixtures("paging")


EXCEPTIONS = [
    # name, code, vector, error code or None, offset of the saved RIP
    ("divide", "31c9f7f1", 0, None, 2),
    ("int3", "cc", 3, None, 1),
    ("ud2", "0f0b", 6, None, 0),
    ("gp: not canonical", "48b80000000000800000 488b00", 13, 0, 10),
    ("gp: bad selector", "b8f0ff0000 8ed8", 13, 0xFFF0, 5),
    ("pf: read", "488b042500003000", 14, 0, 0),
    ("pf: write", "4889042500003000", 14, 2, 0),
    ("int 0x30", "cd30", 0x30, None, 2),
]


@pytest.mark.parametrize(
    ("name", "code", "vector", "error", "at"), EXCEPTIONS, ids=[r[0] for r in EXCEPTIONS]
)
def test_exception_in_long_mode(name: str, code: str, vector: int, error: int | None, at: int) -> None:
    """The guest boots real, protected, long; its handler finds RIP and error code where the manual puts
    them."""
    guest = HvmGuest()
    guest.long_mode(code)
    guest.handler(vector, WITHOUT_CODE if error is None else WITH_CODE)
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert regs.r15 == guest.body + at
    assert regs.rip in (HANDLERS + 64 * vector + 6, HANDLERS + 64 * vector + 10)
    if error is not None:
        assert regs.rax == error
    if vector == 14:
        assert regs.rbx == 0x300000


def test_handler_returns_by_iret_many_times() -> None:
    """1,000 INT3 and 1,000 #PF, each handled and returned from: nothing remembered between them."""
    guest = HvmGuest()
    # mov ecx,1000; l: int3; mov rax,[0x300000]; dec ecx; jnz l; out 0xf4,al; jmp $ (a stop asked for by OUT
    # comes before the next block)
    guest.long_mode("b9e8030000 cc 488b042500003000 ffc9 75f3 e6f4ebfe")
    guest.handler(3, "ffc3 48cf")  # inc ebx; iretq
    guest.handler(14, "ffc5 58 48830424 08 48cf")  # inc ebp; pop rax; add qword [rsp],8; iretq
    guest.vcpu.regs.rbx = guest.vcpu.regs.rbp = 0
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rbx & 0xFFFFFFFF, guest.vcpu.regs.rbp & 0xFFFFFFFF) == (1000, 1000)


def test_ist_and_stack_switch_from_user_mode() -> None:
    """INT from CPL3 takes RSP0 of the TSS; a gate with IST 1 takes IST1."""
    for ist, top in ((0, STACK), (1, IST1)):
        guest = HvmGuest()
        # push 0x23; push 0x5000; push 0x202; push 0x2b; push rip+..; iretq ; user: int 0x30
        target = 0x7800
        guest.long_mode("6a23 6800500000 6802020000 6a2b 68" + target.to_bytes(4, "little").hex() + "48cf")
        guest.write(target, "cd30")
        guest.gate(0x30, HANDLERS + 64 * 0x30, ist=ist)
        guest.handler(0x30, "4889e0 4c8b3c24 e6f4ebfe")  # mov rax,rsp; mov r15,[rsp]; out
        assert guest.run() is StopReason.REQUESTED
        assert guest.vcpu.regs.rax == top - 40
        assert guest.vcpu.regs.r15 == target + 2
        assert guest.vcpu.regs.cpl == 0


def test_double_fault_then_triple_fault() -> None:
    """No #PF gate: #DF with error code 0. No #DF gate either: triple fault, told apart from a stop."""
    guest = HvmGuest()
    guest.long_mode("488b042500003000")
    guest.write(0x2000 + 14 * 16, bytes(16))
    guest.handler(8, WITH_CODE)
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rax == 0
    assert guest.vcpu.regs.rip == HANDLERS + 64 * 8 + 10
    guest = HvmGuest()
    guest.long_mode("488b042500003000")
    guest.write(0x2000 + 14 * 16, bytes(16))
    guest.write(0x2000 + 8 * 16, bytes(16))
    assert guest.run() is StopReason.TRIPLE_FAULT
    guest.vcpu.reset()
    assert (guest.vcpu.regs.rip, guest.vcpu.regs.cr0 & 1) == (0xFFF0, 0)


def test_interrupt_waits_for_if_and_for_the_sti_shadow() -> None:
    """With IF=0 nothing is taken; STI opens only after one more instruction; taken exactly once."""
    guest = HvmGuest()
    # cli; mov ecx,1000; l: dec ecx; jnz l; out 0x10,al; sti; inc ebx; inc ebp; out 0xf4,al; jmp $ (a stop
    # asked for by OUT comes before the next block)
    guest.long_mode("fa b9e8030000 ffc9 75fc e610 fb ffc3 ffc5 e6f4ebfe")
    guest.handler(0x20, "4c8b3c24 ffc2 48cf")  # mov r15,[rsp]; inc edx; iretq
    guest.vcpu.inject_interrupt(0x20)
    guest.exits.on_out_hooks[0x10] = lambda: guest.exits.seen.append(
        ("pending", guest.vcpu.interrupt_pending())
    )
    guest.vcpu.regs.rdx = 0
    assert guest.run() is StopReason.REQUESTED
    assert ("pending", True) in guest.exits.seen
    assert not guest.vcpu.interrupt_pending()
    after_sti = guest.body + 1 + 5 + 2 + 2 + 2 + 1
    assert guest.vcpu.regs.r15 == after_sti + 2
    assert guest.vcpu.regs.rdx & 0xFFFFFFFF == 1


def test_interrupt_wakes_hlt_and_hook_can_ask_for_one() -> None:
    """HLT stops run with RIP behind it; an interrupt from inside an OUT hook is taken in the same run."""
    guest = HvmGuest()
    guest.long_mode("fb 90 f4 e610 eb00 90 e6f4ebfe")  # sti; nop; hlt; out 0x10; jmp +0; nop; out 0xf4
    guest.handler(0x21, "ffc2 48cf")
    guest.exits.on_out_hooks[0x10] = lambda: guest.vcpu.inject_interrupt(0x21)
    assert guest.run() is StopReason.HALT
    assert guest.vcpu.regs.rip == guest.body + 3
    assert guest.vcpu.interrupts_open()
    guest.vcpu.regs.rdx = 0
    guest.vcpu.inject_interrupt(0x21)
    assert guest.run() is StopReason.REQUESTED
    assert not guest.vcpu.interrupt_pending()
    assert guest.vcpu.regs.rdx & 0xFFFFFFFF == 2


def test_cancel_interrupt() -> None:
    """A withdrawn interrupt is never taken."""
    guest = HvmGuest()
    guest.long_mode("fa 90 fb 90 90 e6f4ebfe")
    guest.vcpu.inject_interrupt(0x22)
    assert guest.vcpu.cancel_interrupt()
    assert not guest.vcpu.cancel_interrupt()
    assert guest.run() is StopReason.REQUESTED


def test_nmi_ignores_if_and_is_blocked_until_iret() -> None:
    """An NMI comes with IF=0; a second one inside its handler waits for IRET."""
    guest = HvmGuest()
    guest.long_mode("fa 90 e610 eb00 90 90 e6f4ebfe")
    guest.handler(2, "ffc2 e611 eb00 90 ffc5 48cf")  # inc edx; out 0x11,al; jmp +0; nop; inc ebp; iretq
    guest.exits.on_out_hooks[0x10] = guest.vcpu.inject_nmi
    depth: list[tuple[int, int]] = []

    def in_handler() -> None:
        regs = guest.vcpu.regs
        depth.append((regs.rdx & 0xFF, regs.rbp & 0xFF))
        if len(depth) == 1:
            guest.vcpu.inject_nmi()

    guest.exits.on_out_hooks[0x11] = in_handler
    guest.vcpu.regs.rdx = guest.vcpu.regs.rbp = 0
    assert guest.run() is StopReason.REQUESTED
    assert depth == [(1, 0), (2, 1)]


def test_inject_exception() -> None:
    """#GP(0x18) from outside at the next run; from RIP; refused inside hooks and for vectors that are
    none."""
    guest = HvmGuest()
    guest.long_mode("e6f4ebfe 90")
    guest.handler(13, WITH_CODE)
    guest.run()
    rip = guest.vcpu.regs.rip
    guest.vcpu.inject_exception(13, 0x18)
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rax, guest.vcpu.regs.r15) == (0x18, rip)
    with pytest.raises(VcpuError):
        guest.vcpu.inject_exception(32)


def test_injected_exception_comes_before_a_pending_interrupt() -> None:
    """Both from outside, IF set: the exception first, the interrupt at its handler's IRET (an interrupt
    gate)."""
    guest = HvmGuest()
    guest.long_mode("fb 90 e6f4ebfe 90 90 e6f4ebfe")
    guest.run()
    guest.handler(13, "58 4889c3 ffc2 48cf")  # pop rax; mov rbx,rax; inc edx; iretq
    guest.handler(0x20, "89d5 48cf")  # mov ebp,edx; iretq
    guest.vcpu.regs.rdx = 0
    guest.vcpu.inject_interrupt(0x20)
    guest.vcpu.inject_exception(13, 0x18)
    guest.vcpu.regs.rip += 2
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rbx, guest.vcpu.regs.rdx, guest.vcpu.regs.rbp) == (0x18, 1, 1)


def test_two_hvm_vcpus_take_turns() -> None:
    """A second vCPU made by reset and a start-up IPI counts in real mode while the first is in long mode."""
    guest = HvmGuest()
    guest.long_mode("31db ffc3 ebfc")  # xor ebx,ebx; l: inc ebx; jmp l
    guest.vcpu.run(20)
    first = guest.vcpu.save_context()
    guest.vcpu.reset()
    guest.vcpu.enter_startup(0x50)
    guest.write(0x50000, "45 ebfd")  # l: inc bp; jmp l
    guest.vcpu.regs.rbp = 0
    second = guest.vcpu.save_context()
    for _ in range(10):
        guest.vcpu.load_context(first)
        before = guest.vcpu.regs.rbx
        assert guest.vcpu.run(7) is StopReason.SLICE
        assert guest.vcpu.regs.rbx == before + 7
        first = guest.vcpu.save_context()
        guest.vcpu.load_context(second)
        assert guest.vcpu.run(5) is StopReason.SLICE
        second = guest.vcpu.save_context()
    assert guest.vcpu.regs.rbp == 50
    assert guest.vcpu.regs.segment("cs").base == 0x50000
