"""Entry into the guest kernel: frames byte for byte, masks, modes, and what crashes the domain."""

from __future__ import annotations

import struct

import pytest

from bus.abi.arch_x86_64 import VGCF_in_syscall
from bus.abi.sched import SCHEDOP_shutdown
from bus.abi.xen import (
    HYPERVISOR_iret,
    HYPERVISOR_sched_op,
    HYPERVISOR_stack_switch,
    VMASST_TYPE_architectural_iopl,
)
from tests.unit.pvcpu.rig import (
    CODE,
    DATA,
    HANDLERS,
    KERNEL_STACK,
    STOP,
    SYSCALL,
    UNMAPPED,
    USER_CODE,
    USER_STACK,
    Rig,
    hypercall,
    mov_rsp,
)

FLAT_CS, FLAT_SS = 0xE033, 0xE02B
UD2 = b"\x0f\x0b"


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_exception_without_error_code_from_kernel_pushes_seven_words(rig: Rig) -> None:
    """#UD: RCX, R11, RIP, CS (RPL 0, mask in bits 32..39), RFLAGS, RSP, SS on the interrupted stack, 16-byte aligned."""
    rig.mask = 1
    handler = rig.handler(6)
    rig.regs.rcx, rig.regs.r11 = 0x1111, 0x2222
    rig.regs.rsp = KERNEL_STACK - 0x38
    rig.run(UD2)
    frame = KERNEL_STACK - 0x40 - 7 * 8
    rcx, r11, rip, cs, flags, rsp, ss = rig.qwords(frame, 7)
    assert (rcx, r11, rip, rsp, ss) == (0x1111, 0x2222, CODE, KERNEL_STACK - 0x38, FLAT_SS)
    assert cs == (FLAT_CS & ~3) | 1 << 32
    assert not flags & 0x200, "IF shows the upcall mask, which was set"
    assert rig.regs.rsp == frame
    assert rig.regs.rip == handler + len(STOP)
    assert rig.regs.cs == FLAT_CS


def test_error_code_sits_below_rip_and_if_shows_open_mask(rig: Rig) -> None:
    rig.mask = 0
    rig.handler(13)
    rig.run(b"\xf4")  # hlt
    frame = KERNEL_STACK - 8 * 8
    words = rig.qwords(frame, 8)
    assert words[2] == 0
    assert words[3] == CODE
    assert words[4] == FLAT_CS & ~3
    assert words[5] & 0x200


def test_ti_if_masks_events_and_saves_the_old_mask(rig: Rig) -> None:
    rig.mask = 0
    rig.handler(6, flags=4)
    rig.run(UD2)
    assert rig.mask == 1
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[3] >> 32 == 0


def test_page_fault_sets_cr2_and_the_user_bit_by_guest_mode(rig: Rig) -> None:
    """A kernel fault has U clear although the code runs at CPL3; a user fault has it set. W is kept."""
    rig.handler(14)
    store = b"\x48\x89\x04\x25" + b"\0" * 4
    rig.run(b"\x48\xa3" + struct.pack("<Q", UNMAPPED))  # mov [UNMAPPED], rax
    assert rig.qwords(KERNEL_STACK - 8 * 8, 8)[2] == 2
    info = rig.state.info
    assert rig.frames.words[(info >> 3) + 2] == UNMAPPED
    assert rig.state.cr2 == UNMAPPED
    rig.enter_user(b"\x48\xa3" + struct.pack("<Q", UNMAPPED + 8))
    assert rig.qwords(KERNEL_STACK - 8 * 8, 8)[2] == 6
    assert rig.state.kernel_mode
    assert store  # the absolute 32-bit form is not used: addresses need 64 bits


def test_user_fault_uses_the_kernel_stack_and_shows_rpl_3(rig: Rig) -> None:
    rig.handler(6)
    rig.regs.gs_base, rig.regs.kernel_gs_base = 0x100, 0x200
    rig.enter_user(UD2)
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[3] & 0xFFFF == FLAT_CS
    assert words[5] == USER_STACK
    assert words[2] == USER_CODE
    assert (rig.regs.gs_base, rig.regs.kernel_gs_base) == (0x100, 0x200), "swapped there and back"
    assert rig.regs.cr3 >> 12 == rig.state.kernel_root


def test_flags_that_a_trap_clears(rig: Rig) -> None:
    """TF, NT, RF, AC are clear in the handler and kept in the frame; IOPL is never shown without the assist."""
    rig.handler(6)
    rig.state.iopl = 0x3000
    rig.regs.rflags = 0x202 | 1 << 14 | 1 << 18
    rig.put(CODE, UD2)
    rig.regs.rip = CODE
    rig.run()
    assert not rig.regs.rflags & (1 << 14 | 1 << 18)
    flags = rig.qwords(KERNEL_STACK - 7 * 8, 7)[4]
    assert flags & 1 << 14
    assert flags & 1 << 18
    assert not flags & 0x3000


def test_architectural_iopl_is_shown(rig: Rig) -> None:
    rig.cpu.assists = 1 << VMASST_TYPE_architectural_iopl
    rig.state.iopl = 0x1000
    rig.handler(6)
    rig.run(UD2)
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[4] & 0x3000 == 0x1000


@pytest.mark.parametrize(
    ("stack", "text"),
    [(UNMAPPED + 64, "Fatal page fault"), (0xFFFF_8000_0000_1000, "Bad guest kernel stack")],
)
def test_no_room_for_the_frame_crashes(rig: Rig, stack: int, text: str) -> None:
    rig.handler(6)
    rig.regs.rsp = stack
    rig.run(UD2)
    assert rig.domain.finished
    assert rig.cpu.crash_reason is not None
    assert text in rig.cpu.crash_reason
    assert rig.domain.crash_text is not None
    assert "RIP:" in rig.domain.crash_text


def test_unhandled_exception_crashes_with_its_name(rig: Rig) -> None:
    rig.run(UD2)
    assert rig.cpu.crash_reason is not None
    assert "#UD" in rig.cpu.crash_reason
    assert rig.domain.life.shutdown_code == 3


def test_event_upcall_after_unmask_by_iret(rig: Rig) -> None:
    """A pending event is delivered when iret restores IF: the frame's RIP is iret's target."""
    rig.put(HANDLERS + 512, STOP)
    rig.state.event_callback = HANDLERS + 512
    rig.mask = 1
    rig.frames.octets[rig.state.info] = 1
    target = CODE + 256
    context = struct.pack(
        "<9Q", 0x77, 0x11, 0xCC, 0, target, FLAT_CS & ~3, 0x202, KERNEL_STACK - 256, FLAT_SS
    )
    rig.put(DATA, context)
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    assert rig.mask == 1, "masked again during the upcall"
    words = rig.qwords(KERNEL_STACK - 256 - 7 * 8, 7)
    assert words[2] == target
    assert words[3] >> 32 == 0
    assert words[4] & 0x200
    assert (words[0], words[1]) == (0xCC, 0x11)


def test_iret_to_user_and_back_by_syscall(rig: Rig) -> None:
    """iret with RPL 3 goes to user mode under the user root; SYSCALL there enters the syscall callback with RCX, R11 loaded."""
    assert rig.domain.mmu.take_root(rig.frames.base + 4) == 0
    rig.state.user_root = rig.frames.base + 4  # type: ignore[assignment]  # a plain number is an MFN here
    rig.put(HANDLERS, STOP)
    rig.state.syscall_callback, rig.state.syscall_masks = HANDLERS, True
    rig.put(USER_CODE, SYSCALL)
    rig.mask = 1
    rig.put(DATA, struct.pack("<9Q", 0x99, 1, 2, 0, USER_CODE, 0x33, 0x202 | 0x400, USER_STACK, 0x2B))
    rig.state.gdt_entries = 16
    rig.state.gdt_frames = (rig.frames.base + 40,)
    rig.frames.words[40 * 512 + 6] = 0x00AFFB000000FFFF
    rig.frames.words[40 * 512 + 5] = 0x00CFF3000000FFFF
    rig.run(
        hypercall(HYPERVISOR_stack_switch, FLAT_SS, KERNEL_STACK) + mov_rsp(DATA) + hypercall(HYPERVISOR_iret)
    )
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[0] == words[2] == USER_CODE + 2
    assert words[1] & 0x600 == 0x600, "R11 has the user's flags"
    assert words[3] & 0xFFFF == FLAT_CS
    assert words[5] == USER_STACK
    assert rig.mask == 1, "the callback was registered with CALLBACKF_mask_events"
    assert not rig.regs.rflags & 0x400, "DF is clear in the callback"


def test_iret_in_syscall_leaves_sysret_registers(rig: Rig) -> None:
    assert rig.domain.mmu.take_root(rig.frames.base + 4) == 0
    rig.state.user_root = rig.frames.base + 4  # type: ignore[assignment]  # a plain number is an MFN here
    rig.handler(6)
    rig.state.kernel_sp = KERNEL_STACK
    rig.put(USER_CODE, UD2)
    rig.put(DATA, struct.pack("<9Q", 0x99, 1, 2, VGCF_in_syscall, USER_CODE, 0x33, 0x202, USER_STACK, 0x2B))
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[0] == USER_CODE
    assert words[1] & 0x200
    assert words[3] & 0xFFFF == FLAT_CS


def _steps(rig: Rig, ring: int) -> Rig:
    """iret with TF to `nop; nop` (in user mode for ring 3), with a handler of #DB that stops."""
    assert rig.domain.mmu.take_root(rig.frames.base + 4) == 0
    rig.state.user_root = rig.frames.base + 4  # type: ignore[assignment]  # a plain number is an MFN here
    rig.handler(1)
    rig.state.kernel_sp = KERNEL_STACK
    rig.put(USER_CODE, b"\x90\x90")
    cs, stack = (FLAT_CS, USER_STACK) if ring else (FLAT_CS & ~3, KERNEL_STACK)
    vgcf = VGCF_in_syscall if ring else 0
    rig.put(DATA, struct.pack("<9Q", 0x99, 1, 2, vgcf, USER_CODE, cs, 0x302, stack, FLAT_SS))
    return rig


@pytest.mark.parametrize("ring", [0, 3])
def test_the_first_step_after_iret_is_of_the_instruction_there(rig: Rig, ring: int) -> None:
    """TF that iret sets traps behind the next instruction, not in front of it: how a debugger steps."""
    _steps(rig, ring).run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[2] == USER_CODE + 1
    assert words[4] & 0x100
    assert rig.domain.traps.exceptions[1] == 1


def test_an_event_between_iret_and_the_step(rig: Rig) -> None:
    """The upcall comes first and has TF in its frame alone; the step comes when iret goes on with the interrupted code."""
    _steps(rig, 0)
    rig.put(HANDLERS + 512, STOP)
    rig.state.event_callback = HANDLERS + 512
    rig.mask = 1
    rig.frames.octets[rig.state.info] = 1
    code = mov_rsp(DATA) + hypercall(HYPERVISOR_iret)
    rig.run(code)
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[2] == USER_CODE
    assert words[4] & 0x100
    assert rig.domain.traps.exceptions[1] == 0
    rig.frames.octets[rig.state.info] = 0
    rig.run(code)
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[2] == USER_CODE + 1


def test_iret_without_user_tables_crashes(rig: Rig) -> None:
    rig.put(DATA, struct.pack("<9Q", 0, 0, 0, 0, USER_CODE, 0x33, 0x202, USER_STACK, 0x2B))
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    assert rig.cpu.crash_reason is not None
    assert "no user page tables" in rig.cpu.crash_reason


def test_iret_from_an_unreadable_stack_crashes(rig: Rig) -> None:
    rig.run(mov_rsp(UNMAPPED) + hypercall(HYPERVISOR_iret))
    assert rig.cpu.crash_reason is not None
    assert "IRET context" in rig.cpu.crash_reason


def test_iret_to_a_bad_selector_gives_the_kernel_a_gp(rig: Rig) -> None:
    rig.handler(13)
    rig.put(DATA, struct.pack("<9Q", 0, 0, 0, 0, CODE, 0x70, 0x202, KERNEL_STACK, FLAT_SS))
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    words = rig.qwords(KERNEL_STACK - 8 * 8, 8)
    assert words[2] == 0x70
    assert words[3] == CODE
    assert rig.regs.cs == FLAT_CS


@pytest.mark.parametrize(("vector", "dpl", "entered"), [(0x21, 3, True), (0x21, 0, False), (0x80, 0, True)])
def test_int_n_from_user(rig: Rig, vector: int, dpl: int, entered: bool) -> None:
    """A gate of DPL 3 is entered; another gives #GP with the vector in the error code; 0x80 goes straight to its handler."""
    rig.handler(vector, 0, flags=dpl)
    rig.handler(13, 1)
    rig.enter_user(bytes([0xCD, vector]))
    if entered:
        assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[2] == USER_CODE + 2
    else:
        words = rig.qwords(KERNEL_STACK - 8 * 8, 8)
        assert words[2] == vector << 3 | 2
        assert words[3] == USER_CODE


def test_int3_needs_no_dpl(rig: Rig) -> None:
    rig.handler(3)
    rig.enter_user(b"\xcc")
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[2] == USER_CODE + 1


def test_user_syscall_without_callback_is_ud(rig: Rig) -> None:
    rig.handler(6)
    rig.enter_user(SYSCALL)
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[2] == USER_CODE


def test_sysenter_from_user(rig: Rig) -> None:
    """To its callback with null CS:RIP and RSP; #GP at the instruction without one."""
    rig.handler(13, 1)
    rig.enter_user(b"\x0f\x34")
    assert rig.qwords(KERNEL_STACK - 8 * 8, 8)[3] == USER_CODE
    rig.put(HANDLERS + 256, STOP)
    rig.state.sysenter_callback = HANDLERS + 256
    rig.enter_user(b"\x0f\x34")
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[2] == 0
    assert words[3] & 0xFFFF == 3
    assert words[5] == 0


def test_nmi_is_delivered_once_and_masked_until_iret(rig: Rig) -> None:
    rig.handler(2)
    rig.state.nmi_pending = True
    rig.mask = 1
    rig.run(b"\x90")
    assert rig.qwords(KERNEL_STACK - 7 * 8, 7)[2] == CODE
    assert rig.state.nmi_masked
    rig.state.nmi_pending = True
    before = rig.regs.rsp
    rig.run(b"\x90")
    assert rig.regs.rsp == before, "no second NMI before iret"


def test_failsafe_frame_has_four_selectors(rig: Rig) -> None:
    rig.put(HANDLERS, STOP)
    rig.state.failsafe_callback = HANDLERS
    rig.state.segment_failure = True
    rig.run(b"\x90")
    words = rig.qwords(KERNEL_STACK - 12 * 8, 12)[1:]
    assert len(words) == 11
    assert words[6] == CODE
    assert words[10] == FLAT_SS


def test_compatibility_mode_and_back(rig: Rig) -> None:
    """iret to 32-bit code; INT 0x80 from there enters 64-bit kernel code with the 32-bit CS in the frame; iret goes back."""
    assert rig.domain.mmu.take_root(rig.frames.base + 4) == 0
    rig.state.user_root = rig.frames.base + 4  # type: ignore[assignment]  # a plain number is an MFN here
    rig.state.kernel_sp = KERNEL_STACK
    # In 32-bit code 0x48 is DEC EAX, in 64-bit code a prefix: what runs shows the mode.
    rig.put(USER_CODE, b"\xb8\x05\x00\x00\x00\x48\x89\xc3\xcd\x80\x48\xff\xc3\xcd\x80")
    rig.put(HANDLERS, b"\x49\x89\xc0" + STOP)  # mov r8, rax
    rig.state.trap_address[0x80] = HANDLERS
    rig.put(DATA, struct.pack("<9Q", 0, 0, 0, 0, USER_CODE, 0xE023, 0x202, USER_STACK, FLAT_SS))
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    words = rig.qwords(KERNEL_STACK - 7 * 8, 7)
    assert words[3] & 0xFFFF == 0xE023
    assert words[2] == USER_CODE + 10
    assert rig.regs.r8 == 4, "DEC EAX ran"
    assert rig.regs.cs == FLAT_CS
    rig.put(USER_CODE + 10, b"\xb8\x07\x00\x00\x00\xcd\x80")
    rig.put(DATA, struct.pack("<9Q", 0, 0, 0, 0, USER_CODE + 10, 0xE033, 0x202, USER_STACK, FLAT_SS))
    rig.run(mov_rsp(DATA) + hypercall(HYPERVISOR_iret))
    assert rig.regs.r8 == 7


def test_suspend_and_resume(rig: Rig) -> None:
    """SHUTDOWN_suspend stops the vCPU behind the hypercall; resume has it return what it is told."""
    rig.put(DATA, struct.pack("<I", 2))
    rig.put(CODE, hypercall(HYPERVISOR_sched_op, SCHEDOP_shutdown, DATA) + b"\x48\x89\xc3" + STOP)
    rig.regs.rip = CODE
    rig.domain.run_slice()
    assert rig.domain.life.shutdown_code == 2
    rig.domain.resume(1)
    assert not rig.domain.finished
    rig.run()
    assert rig.regs.rbx == 1
