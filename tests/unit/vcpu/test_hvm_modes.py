"""Modes of an HVM vCPU: real, protected, virtual-8086, long; system calls and task switches in them; walks of their tables; A20."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import CODE, HANDLERS, STACK, HvmGuest
from tests.unit.vcpu.hvm_programs import WITHOUT_CODE, protected_mode

pytestmark = pytest.mark.usefixtures("paging")


def test_syscall_and_sysret() -> None:
    """SYSCALL from CPL3: RCX, R11, FMASK, CS, SS, RIP = LSTAR; SYSRETQ brings user mode back."""
    guest = HvmGuest()
    # mov ecx,0xc0000081; xor eax,eax; mov edx,0x00180008; wrmsr (STAR: SYSCALL 08/10, SYSRET base 18: CS 2b
    # SS 23) mov ecx,0xc0000082; mov eax,0x7900; xor edx,edx; wrmsr; mov ecx,0xc0000084; mov eax,0x200; wrmsr
    # mov ecx,0x7800; mov r11d,0x202; sysretq
    guest.long_mode(
        "b9810000c0 31c0 ba08001800 0f30 b9820000c0 b800790000 31d2 0f30 b9840000c0 b800020000 0f30"
        "b900780000 41bb02020000 480f07"
    )
    guest.write(0x7800, "0f05 cd30")  # syscall; int 0x30
    guest.write(0x7900, "e610 480f07")  # out 0x10,al; sysretq
    states: list[tuple[int, ...]] = []

    def entered() -> None:
        r = guest.vcpu.regs
        states.append((r.cpl, r.rcx, r.r11 & 0xFFF, r.cs, r.ss, r.rflags & 0x200))

    guest.exits.on_out_hooks[0x10] = entered
    guest.handler(0x30, "488b442408 e6f4ebfe")  # mov rax,[rsp+8] (the CS pushed); out
    assert guest.run() is StopReason.REQUESTED
    assert states == [(0, 0x7802, 0x202, 8, 0x10, 0)]
    assert guest.vcpu.regs.rax == 0x2B


def test_syscall_without_sce_is_ud() -> None:
    """EFER.SCE clear: #UD at the instruction."""
    guest = HvmGuest()
    guest.long_mode("0f05")
    guest.handler(6, WITHOUT_CODE)
    guest.write(guest.body, "b9800000c0 0f32 24fe 0f30 0f05")  # rdmsr EFER; and al,~1; wrmsr; syscall
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.r15 == guest.body + 11


def test_real_mode_interrupts() -> None:
    """INT n in real mode by the vector table at 0, an external interrupt likewise, IRET, HLT."""
    guest = HvmGuest()
    guest.real_mode("cd20 fb 90 90 f4")  # int 0x20; sti; nop; nop; hlt
    guest.write(0x80, bytes.fromhex("00710000"))
    guest.write(0x84, bytes.fromhex("08710000"))
    guest.write(0x7100, "43 cf")  # inc bx; iret
    guest.write(0x7108, "45 cf")  # inc bp; iret
    guest.vcpu.regs.rbx = guest.vcpu.regs.rbp = 0
    guest.vcpu.inject_interrupt(0x21)
    assert guest.run() is StopReason.HALT
    assert (guest.vcpu.regs.rbx, guest.vcpu.regs.rbp) == (1, 1)
    assert guest.vcpu.regs.rip == CODE + 6


def test_pvh_entry() -> None:
    """32-bit flat protected mode, no paging, EBX = start_info; A20 open."""
    guest = HvmGuest()
    guest.write(CODE, "8b03 f4")  # mov eax,[ebx]; hlt
    guest.write(0x9100, "78563412")
    guest.vcpu.enter_pvh(CODE, 0x9100)
    assert guest.run() is StopReason.HALT
    assert guest.vcpu.regs.rax == 0x12345678
    assert guest.vcpu.regs.cr0 & 0x80000001 == 1


def test_walk_follows_the_mode() -> None:
    """memory.read and translate: identity without paging, the tables in long mode, NotMapped where nothing
    is."""
    from domains.vcpu.walk import NotMapped

    guest = HvmGuest()
    guest.long_mode("e6f4ebfe")
    guest.write(0x50000, b"hello")
    assert guest.vcpu.memory.read(0x50000, 5) == b"hello"
    guest.run()
    guest.write(0x10000 + 0x3000 + 8 * 0x60, (0x50000 | 5).to_bytes(8, "little"))
    memory = guest.vcpu.memory
    assert memory.read(0x60000, 5) == b"hello"
    found = memory.translate(0x60003)
    assert (found.physical, found.page_size, found.writable, found.user) == (0x50003, 4096, False, True)
    memory.write(0x60000, b"HE")
    assert memory.read_physical(0x50000, 5) == b"HEllo"
    with pytest.raises(NotMapped):
        memory.read(0x300000, 1)
    with pytest.raises(NotMapped):
        memory.translate(1 << 47)


def test_both_walks_agree() -> None:
    """The walk in Python and QEMU's own lead to the same place, in long mode and in 32-bit mode with 4 MiB
    pages."""
    from domains.vcpu.walk import NotMapped

    guest = HvmGuest()
    guest.long_mode("e6f4ebfe")
    guest.run()
    memory = guest.vcpu.memory
    for address in (0, 0x1234, 0x1FFFFF, 0xC0000123, 0xE0000010):
        assert memory.physical(address) == memory.translate(address).physical
    for address in (0x200000, 1 << 40, 1 << 47, (1 << 64) - 1):
        with pytest.raises(NotMapped):
            memory.physical(address)
    guest = HvmGuest()
    guest.write(CODE, "8b05 00104000 f4")  # mov eax,[0x401000]; hlt
    guest.write(0x20000, (0x21000 | 7).to_bytes(4, "little") + (0x00000000 | 0x87).to_bytes(4, "little"))
    guest.write(0x21000 + 4 * (CODE >> 12), (CODE | 7).to_bytes(4, "little"))
    guest.write(0x1000, "44332211")
    guest.vcpu.enter_pvh(CODE, 0)
    guest.vcpu.set_control(4, 0x10)
    guest.vcpu.set_control(3, 0x20000)
    guest.vcpu.set_control(0, 0x80000011)
    assert guest.run() is StopReason.HALT
    assert guest.vcpu.regs.rax == 0x11223344
    memory = guest.vcpu.memory
    assert memory.translate(0x401000)[:2] == (0x1000, 1 << 22)
    assert memory.physical(0x401000) == 0x1000
    assert memory.physical(CODE + 5) == memory.translate(CODE + 5).physical == CODE + 5


def test_protected_mode_faults_and_user_mode() -> None:
    """32-bit: IRET to CPL3, INT back on the TSS's stack; the frame has SS:ESP, EFLAGS, CS:EIP."""
    guest = HvmGuest()
    # push 0x23; push 0x5000; push 0x202; push 0x1b; push 0x7800; iret
    protected_mode(guest, "6a23 6800500000 6802020000 6a1b 6800780000 cf")
    guest.write(0x7800, "cd30")
    guest.handler(0x30, "89e0 8b0c24 8b5c2404 e6f4ebfe")  # mov eax,esp; mov ecx,[esp]; mov ebx,[esp+4]
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert (regs.rax, regs.rcx, regs.rbx & 0xFFFF) == (STACK - 20, 0x7802, 0x1B)


def test_virtual_8086_mode() -> None:
    """IRET with VM set runs 16-bit code at CS << 4; its INT comes back with the segments on the stack."""
    guest = HvmGuest()
    # push gs fs ds es (0), ss 0x600, esp 0x100, eflags VM|IOPL3|IF, cs 0x780, eip 0; iret
    protected_mode(guest, "6a00 6a00 6a00 6a00 6800060000 6800010000 6802320200 6880070000 6a00 cf")
    guest.write(0x7800, "b83412 cd30")  # mov ax,0x1234; int 0x30
    guest.handler(0x30, "8b0c24 8b5c2404 8b542408 e6f4ebfe")  # mov ecx,[esp]; ebx,[esp+4]; edx,[esp+8]
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert (regs.rax & 0xFFFF, regs.rcx, regs.rbx & 0xFFFF) == (0x1234, 5, 0x780)
    assert regs.rdx & 0x20000
    assert not regs.rflags & 0x20000


def test_task_switch_by_far_jump() -> None:
    """JMP to a TSS selector loads the new task's registers and marks it busy."""
    guest = HvmGuest()
    new = 0x3800
    protected_mode(guest, "ea00000000 3000")  # jmp 0x30:0
    guest.write(0x1030, (0x0000890000000000 | 0x67 | new << 16).to_bytes(8, "little"))
    guest.vcpu.regs.gdtr_limit = 0x37
    image = bytearray(0x68)
    fields = {0x20: 0x7A00, 0x24: 2, 0x28: 0x55, 0x38: STACK, 0x48: 0x10, 0x4C: 8, 0x50: 0x10, 0x54: 0x10}
    for at, value in fields.items():  # EIP, EFLAGS, EAX, ESP, ES, CS, SS, DS
        image[at : at + 4] = value.to_bytes(4, "little")
    guest.write(new, bytes(image))
    guest.write(0x7A00, "e6f4ebfe")
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rax & 0xFF == 0x55
    assert guest.vcpu.regs.tr == 0x30
    assert guest.memory[0x1035] == 0x8B


def test_sysenter_and_sysexit() -> None:
    """SYSENTER from 32-bit user mode: CS:EIP and SS:ESP from the MSRs, IF clear; SYSEXIT goes back."""
    guest = HvmGuest()
    protected_mode(guest, "6a23 6800500000 6802020000 6a1b 6800780000 cf")
    guest.vcpu.regs.sysenter_cs, guest.vcpu.regs.sysenter_esp, guest.vcpu.regs.sysenter_eip = (
        8,
        0x6F00,
        0x7900,
    )
    guest.write(0x7800, "0f34")
    # mov ebp,esp; pushf; pop ebx; mov edx,0x7810; mov ecx,0x4F00; sysexit
    guest.write(0x7900, "89e5 9c 5b ba10780000 b9004f0000 0f35")
    guest.write(0x7810, "89e6 cd30")  # mov esi,esp; int 0x30
    guest.handler(0x30, "8b5c2404 89df e6f4ebfe")  # mov ebx,[esp+4]; mov edi,ebx
    guest.write(HANDLERS + 64 * 0x30, "8b7c2404 e6f4ebfe")
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert (regs.rbp, regs.rsi, regs.rdi & 0xFFFF) == (0x6F00, 0x4F00, 0x1B)
    assert not regs.rbx & 0x200


def test_a20_gate() -> None:
    """With the gate closed 1 MiB is 0 again; open, it is not."""
    guest = HvmGuest()
    protected_mode(guest, "a100001000 f4")  # mov eax,[0x100000]; hlt
    guest.write(0, "11111111")
    guest.write(0x100000, "22222222")
    guest.vcpu.set_a20(False)
    assert guest.run() is StopReason.HALT
    closed = guest.vcpu.regs.rax
    guest.vcpu.set_a20(True)
    guest.vcpu.regs.rip = CODE + 7 + 4 + 2 + 2 + 4 + 3
    assert guest.run() is StopReason.HALT
    assert (closed, guest.vcpu.regs.rax) == (0x11111111, 0x22222222)


def test_reset_state_has_cr4_zero_and_no_sse() -> None:
    """CR4 is 0 after RESET; ADDPS is #UD until CR4.OSFXSR is set (SDM volume 3, 10.1.1 and 14.1)."""
    guest = HvmGuest()
    assert guest.vcpu.regs.cr4 == 0
    guest.real_mode("0f58c1 45 f4")  # addps xmm0,xmm1; inc bp; hlt
    guest.write(4 * 6, "00710000")
    guest.write(0x7100, "f4")
    guest.vcpu.regs.rbp = 0
    assert guest.run() is StopReason.HALT
    assert (guest.vcpu.regs.rip, guest.vcpu.regs.rbp) == (0x7101, 0)
    guest.vcpu.reset()
    guest.vcpu.set_control(4, 0x200)
    guest.vcpu.regs.rsp, guest.vcpu.regs.rbp = STACK, 0
    assert guest.run() is StopReason.HALT
    assert guest.vcpu.regs.rbp == 1
