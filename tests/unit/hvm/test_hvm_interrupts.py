"""Events and interrupts: callback and upcall vectors, windows with interrupts off, HLT, timers, IPIs, start of a second vCPU."""

from __future__ import annotations

import struct

import pytest

from bus.addresses import Port, VcpuId
from domains.hvm.events import COMPAT_MASK, COMPAT_PENDING
from domains.hvm.lapic import APIC_BASE
from tests.unit.hvm.hvm_rig import CODE, DATA, Rig, mov

pytestmark = pytest.mark.usefixtures("paging")

IF = 0x200
VECTOR = 0xF3
COUNT = DATA + 0x100
INCREMENT = f"ff0425{struct.pack('<I', COUNT).hex()}"  # inc dword [COUNT]
IRETQ = "48cf"


def clear_flag(rig: Rig) -> str:
    """mov byte [vcpu_info.evtchn_upcall_pending], 0: the shared info is mapped at gfn 0x300."""
    return f"c60425{struct.pack('<I', 0x300000).hex()}00"


def eoi() -> str:
    """mov dword [APIC EOI], eax, 64-bit: mov rbx, imm64; mov [rbx], eax."""
    return f"48bb{struct.pack('<Q', APIC_BASE + 0xB0).hex()}8903"


def rig(code: str, *, flags: int = 2, vcpus: int = 1) -> Rig:
    made = Rig(code, flags=flags, vcpus=vcpus)
    made.physmap.changed(0x300, made.physmap.base + (made.shared >> 12), 1, 1)
    made.handler(VECTOR, INCREMENT + clear_flag(made) + IRETQ)
    return made


def test_the_callback_waits_for_the_interrupt_flag_and_needs_no_eoi() -> None:
    guest = rig("90ebfd")  # 1: nop; jmp 1b, interrupts off
    guest.domain.interrupts.callback_vector = VECTOR
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 0
    guest.regs.rflags |= IF
    guest.run(2)
    assert guest.word(COUNT) == 1  # and not once more: the flag was cleared
    guest.buffer[guest.shared + 2048 : guest.shared + 2056] = bytes(8)  # the guest takes the port's bit
    guest.buffer[guest.shared + 8 : guest.shared + 16] = bytes(8)
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 2


@pytest.mark.parametrize(("priority", "taken"), [(15, 0), (14, 1)])
def test_the_task_priority_of_cr8_holds_back_what_is_not_above_it(priority: int, taken: int) -> None:
    """A vector of class 15; it comes once CR8 lets it. The register is the upper half of the APIC's."""
    go = struct.pack("<I", DATA + 0x200).hex()
    # mov eax, priority; mov cr8, rax; l: cmp dword [go], 0; je l; xor eax, eax; mov cr8, rax; nop; mov rdx, cr8; jmp $
    guest = rig(
        f"{mov('eax', priority)} 440f22c0 833c25{go}00 74f6 31c0 440f22c0 90 440f20c2 ebfe", flags=IF | 2
    )
    state = guest.domain.states[0]
    state.upcall_vector = VECTOR
    state.apic.svr = 0x1FF
    guest.run(1)
    assert state.apic.tpr == priority << 4
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == taken
    guest.buffer[DATA + 0x200] = 1
    guest.run(2)
    assert guest.word(COUNT) == 1
    assert (state.apic.tpr, guest.regs.rdx) == (0, 0)


def test_the_callback_comes_again_while_the_flag_is_up() -> None:
    guest = rig("90ebfd", flags=IF | 2)
    guest.handler(VECTOR, INCREMENT + IRETQ)  # forgets to clear the flag
    guest.domain.interrupts.callback_vector = VECTOR
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(3)
    assert guest.word(COUNT) >= 2


def test_sti_shadow() -> None:
    """sti; nop(1 instruction in the shadow): inc ecx; then the interrupt: ECX is 1 in the handler."""
    guest = rig(f"31c9fbffc1{'90' * 4}ebfe")
    guest.handler(VECTOR, f"890c25{struct.pack('<I', COUNT).hex()}" + clear_flag(guest) + IRETQ)
    guest.domain.interrupts.callback_vector = VECTOR
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 1


def test_the_upcall_vector_goes_through_the_local_apic() -> None:
    guest = rig("90ebfd", flags=IF | 2)
    state = guest.domain.states[0]
    state.upcall_vector = VECTOR
    state.apic.svr = 0x1FF
    guest.handler(VECTOR, INCREMENT + clear_flag(guest) + IRETQ)  # no EOI
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 1
    assert state.apic.isr == 1 << VECTOR
    guest.domain.deliver(Port(70), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 1  # still in service
    state.apic.end_of_interrupt()
    guest.run(2)
    assert guest.word(COUNT) == 2


def with_keyboard_input() -> Rig:
    """A full HVM guest whose callback is GSI 1, input 1 of its I/O APIC an edge with vector 0x41, as Linux programs it."""
    guest = Rig("90ebfd", board=True)
    board = guest.domain.board
    assert board is not None
    board.ioapic.write(0, 1, 0x12)
    board.ioapic.write(0x10, 4, 0x41)
    guest.domain.states[0].apic.svr = 0x1FF
    return guest


def test_the_upcall_vector_goes_before_the_callback_by_a_line() -> None:
    """Linux from 6.0 on asks for both, and GSI 1 is the keyboard's: that interrupt is not raised."""
    guest = with_keyboard_input()
    state = guest.domain.states[0]
    state.upcall_vector = VECTOR
    guest.domain.set_callback(1)
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert state.apic.irr == 1 << VECTOR
    state.upcall_vector = 0
    guest.domain.interrupts.follow_upcall()
    assert state.apic.irr == 1 << VECTOR | 1 << 0x41  # without it, the line is the only way


def test_a_callback_by_a_line_that_is_up_falls_with_the_flag_only() -> None:
    guest = with_keyboard_input()
    board, state = guest.domain.board, guest.domain.states[0]
    assert board is not None
    levels: list[bool] = []
    guest.domain.interrupts.set_callback_line(levels.append)
    guest.domain.deliver(Port(5), VcpuId(0))
    state.upcall_vector = VECTOR
    guest.domain.interrupts.follow_upcall()
    assert levels == [True]
    guest.buffer[guest.shared] = 0
    guest.domain.interrupts.follow_upcall()
    guest.domain.interrupts.follow_upcall()
    assert levels == [True, False]


def test_the_callback_leaves_a_devices_line_alone() -> None:
    """The keyboard holds its line up; events come and go on the same GSI."""
    guest = with_keyboard_input()
    board, state = guest.domain.board, guest.domain.states[0]
    assert board is not None
    guest.domain.set_callback(1)
    board.isa_line(1, True)
    state.apic.irr = 0
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.buffer[guest.shared] = 0
    guest.run(2)
    assert state.apic.irr == 0  # no new edge: the line never fell
    board.isa_line(1, False)
    board.isa_line(1, True)
    assert state.apic.irr == 1 << 0x41


def test_eoi_at_the_apics_page() -> None:
    guest = rig("90ebfd", flags=IF | 2)
    state = guest.domain.states[0]
    state.upcall_vector = VECTOR
    state.apic.svr = 0x1FF
    guest.handler(VECTOR, INCREMENT + clear_flag(guest) + eoi() + IRETQ)
    for port in (5, 70, 140):
        guest.domain.deliver(Port(port), VcpuId(0))
        guest.run(2)
    assert guest.word(COUNT) == 3
    assert state.apic.isr == 0


def test_hlt_waits_for_an_event_and_goes_on_behind_it() -> None:
    guest = rig(f"fbf4{mov('eax', 77)}{'890425' + struct.pack('<I', DATA).hex()}ebfe")
    guest.domain.interrupts.callback_vector = VECTOR
    guest.run(3)
    assert not guest.domain.run_slice().runnable
    assert guest.word(DATA) == 0
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(2)
    assert guest.word(COUNT) == 1
    assert guest.word(DATA) == 77


def test_the_local_apics_timer_wakes_a_halted_vcpu() -> None:
    guest = rig(f"fbf4{'ebfd'}")
    guest.handler(0x40, INCREMENT + eoi() + IRETQ)
    apic = guest.domain.states[0].apic
    apic.svr = 0x1FF
    apic.write(0x320, 0x40)
    now = [guest.domain.time.now()]
    guest.domain.time.now = lambda: now[0]
    apic.write(0x380, 1_000_000)  # 20 ms
    guest.run(3)
    blocked = guest.domain.run_slice()
    assert not blocked.runnable
    assert blocked.deadline == apic.deadline == now[0] + 20_000_000
    now[0] += 20_000_000
    guest.run(3)
    assert guest.word(COUNT) == 1
    assert apic.isr == 0


def test_a_self_ipi_in_x2apic_mode() -> None:
    code = mov("ecx", 0x83F) + mov("eax", 0x51) + mov("edx", 0) + "0f30ebfe"
    guest = rig(code, flags=IF | 2)
    guest.handler(0x51, INCREMENT + mov("ecx", 0x80B) + "31c031d20f30" + IRETQ)
    apic = guest.domain.states[0].apic
    apic.svr = 0x1FF
    apic.write_base(apic.base | 1 << 10)
    guest.run(2)
    assert guest.word(COUNT) == 1
    assert apic.isr == 0


def test_init_and_sipi_start_the_second_vcpu_in_real_mode() -> None:
    """vCPU 0 sends INIT and SIPI by the xAPIC page; vCPU 1 (16-bit code at 0x9000) stores a word and halts."""
    icr = struct.pack("<Q", APIC_BASE + 0x300).hex()
    icr2 = struct.pack("<Q", APIC_BASE + 0x310).hex()
    send = "".join(
        f"48bb{icr2}{mov('eax', 2 << 24)}890348bb{icr}{mov('eax', what)}8903" for what in (0x4500, 0x4609)
    )
    guest = rig(send + "f390ebfc", vcpus=2)
    # 16 bit: cs: mov word [0x0100], 0x1234 with DS 0 -> physical 0x100; hlt with interrupts off
    guest.write(0x9000, "c70600013412 f4".replace(" ", ""))
    guest.domain.states[0].apic.svr = 0x1FF
    guest.run(6)
    assert guest.word(0x100) & 0xFFFF == 0x1234
    second = guest.domain.states[1]
    assert second.initialised
    assert not second.online  # HLT with interrupts off: down again
    assert guest.domain.states[0].online
    assert not guest.domain.finished


def test_contexts_of_two_vcpus_do_not_mix_and_interrupts_go_to_the_right_one() -> None:
    icr = struct.pack("<Q", APIC_BASE + 0x300).hex()
    icr2 = struct.pack("<Q", APIC_BASE + 0x310).hex()
    send = "".join(
        f"48bb{icr2}{mov('eax', 2 << 24)}890348bb{icr}{mov('eax', what)}8903" for what in (0x4500, 0x4609)
    )
    guest = rig(send + "fbffc690ebfb", vcpus=2)  # sti; 1: inc esi; nop; jmp 1b
    guest.write(0x9000, "66ff06000290ebf8")  # 1: inc dword [0x200]; nop; jmp 1b
    guest.domain.states[0].apic.svr = 0x1FF
    guest.domain.interrupts.callback_vector = VECTOR
    guest.run(9)
    guest.domain.deliver(Port(5), VcpuId(0))
    guest.run(8)
    assert guest.word(COUNT) == 1
    assert guest.word(0x200) > 1000
    assert guest.domain.states[0].online
    assert guest.domain.states[1].online


def test_the_two_level_bits_of_a_32_bit_guest() -> None:
    guest = Rig("ebfe", bits=32)
    events = guest.domain.events
    events.compat = True
    guest.domain.deliver(Port(37), VcpuId(0))
    base = guest.shared
    assert guest.word(base + COMPAT_PENDING + 4) == 1 << 5
    assert guest.word(base + 4) == 1 << 1  # evtchn_pending_sel
    assert guest.buffer[base] == 1
    guest.write(base + COMPAT_MASK, struct.pack("<I", 1 << 3))
    guest.write(base, bytes(8))
    guest.domain.deliver(Port(3), VcpuId(0))
    assert guest.buffer[base] == 0  # masked
    events.unmask(3)
    assert guest.buffer[base] == 1
    assert guest.word(base + COMPAT_MASK) == 0
    assert not events.valid(1024)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, bytes(600), b"\1\0\0\0\xff\xff\xff\xff"])
def test_bad_contexts_are_refused(data: bytes) -> None:
    from domains.hvm.context import BadContext, first_cpu

    with pytest.raises(BadContext):
        first_cpu(data)


def test_an_nmi_comes_with_interrupts_off() -> None:
    guest = rig("90ebfd")
    guest.handler(2, INCREMENT + IRETQ)
    guest.domain.states[0].nmi = True
    guest.run(2)
    assert guest.word(COUNT) == 1
    assert CODE <= guest.regs.rip < CODE + 3
