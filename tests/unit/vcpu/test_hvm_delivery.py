"""Exceptions, interrupts and modes of an HVM vCPU, through the guest's own tables."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason, VcpuError
from domains.vcpu.hvm_testing import CODE, HANDLERS, IST1, MMIO, STACK, TSS, HvmGuest

pytestmark = pytest.mark.usefixtures("paging")

# A handler with an error code: pop rax; mov r15,[rsp] (RIP); mov rbx,cr2; out 0xf4,al; jmp $ (a stop asked
# for by OUT comes before the next block)
WITH_CODE = "58 4c8b3c24 0f20d3 e6f4ebfe"
WITHOUT_CODE = "4c8b3c24 e6f4ebfe"  # mov r15,[rsp]; out 0xf4,al; jmp $ (a stop asked for by OUT comes before the next block)

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


def test_msrs_are_trapped_or_native() -> None:
    """An unknown MSR gives #GP at RDMSR; a known one its value and the next instruction; LSTAR stays
    native."""
    guest = HvmGuest()
    # mov ecx,0x1b; rdmsr; mov ebx,eax; mov ecx,0x40000000; mov eax,5; xor edx,edx; wrmsr;
    # mov ecx,0xc0000082; mov eax,0x1234; wrmsr; rdmsr; mov ebp,eax; mov ecx,0x999; rdmsr
    guest.long_mode(
        "b91b000000 0f32 89c3 b900000040 b805000000 31d2 0f30 b9820000c0 b834120000 0f30 0f32 89c5"
        "b999090000 0f32"
    )
    guest.exits.msrs = {0x1B: 0xFEE00900, 0x40000000: 0}
    guest.handler(13, WITH_CODE)
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert (regs.rbp, regs.rax, guest.exits.msrs[0x40000000]) == (0x1234, 0, 5)
    seen = [item for item in guest.exits.seen if "msr" in str(item[0])]
    assert seen == [("rdmsr", 0x1B), ("wrmsr", 0x40000000, 5), ("rdmsr", 0x999)]


def test_hypercall_by_vmcall_and_vmmcall() -> None:
    """Both instructions reach the hook, RIP at them, and go on behind; at CPL0 and with #UD for its
    neighbours."""
    guest = HvmGuest()
    guest.long_mode("b807000000 0f01c1 0f01d9 e6f4ebfe")
    assert guest.run() is StopReason.REQUESTED
    calls = [item for item in guest.exits.seen if item[0] == "hypercall"]
    assert calls == [("hypercall", 7, guest.body + 5), ("hypercall", 8, guest.body + 8)]
    assert guest.vcpu.regs.rax == 9


def test_mmio() -> None:
    """Reads and writes of each size reach the hooks with their guest-physical address."""
    guest = HvmGuest()
    # mov ebx,MMIO; mov [rbx+8],al; mov [rbx+0x10],ecx; mov rdx,[rbx+0x20]; movzx ebp,word [rbx+0x30]; out
    # 0xf4
    guest.long_mode("bb000000e0 884308 894b10 488b5320 0fb76b30 e6f4ebfe")
    guest.vcpu.regs.rcx = 0
    assert guest.run() is StopReason.REQUESTED
    seen = [item for item in guest.exits.seen if item[0] in ("read", "write")]
    assert [item[:3] for item in seen if item[0] == "write"] == [
        ("write", MMIO + 8, 1),
        ("write", MMIO + 0x10, 4),
    ]
    assert ("read", MMIO + 0x30, 2) in seen
    assert guest.vcpu.regs.rbp == 0x7788


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


def test_ports_obey_iopl_and_the_bitmap() -> None:
    """OUT at CPL3 with IOPL 0: #GP(0); with the port's bit clear in the TSS bitmap it goes through."""
    for allowed in (False, True):
        guest = HvmGuest()
        guest.long_mode("6a23 6800500000 6802020000 6a2b 6800780000 48cf")
        guest.write(0x7800, "e680 cd30")
        guest.write(0x1030, (0x0000890000000000 | 0x87 | TSS << 16).to_bytes(8, "little"))  # TSS limit 0x87
        guest.write(TSS + 0x68, b"\xff" * 16 + (b"\xfe" if allowed else b"\xff") + b"\xff" * 8)
        guest.handler(13, WITH_CODE)
        guest.handler(0x30, "e6f4ebfe")
        assert guest.run() is StopReason.REQUESTED
        assert (("out", 0x80, 1, guest.vcpu.regs.rax & 0xFF) in guest.exits.seen) is allowed
        if not allowed:
            assert guest.vcpu.regs.r15 == 0x7800


def test_control_register_and_invlpg_traps() -> None:
    """Writes of CR3, CR0 (MOV and CLTS) and INVLPG reach the hooks with their values and then take effect."""
    guest = HvmGuest()
    # mov rax,cr3; mov cr3,rax; mov r9,cr0; mov cr0,r9; clts; invlpg [rsp+0x10]; invlpg [rip+0]; out 0xf4
    guest.long_mode("0f20d8 0f22d8 440f20c1 410f22c1 0f06 0f017c2410 0f013d00000000 e6f4ebfe")
    guest.write(guest.body + 6, "440f20c1")  # (mov rcx is r9: REX.R) kept as bytes above
    guest.vcpu.trap_control_writes(0, 3)
    guest.vcpu.trap_invlpg(True)
    guest.write(guest.body, "0f20d8 0f22d8 410f20c1 410f22c1 0f06 0f017c2410 0f013d00000000 e6f4ebfe")
    assert guest.run() is StopReason.REQUESTED
    seen = [item for item in guest.exits.seen if item[0] in ("cr", "invlpg")]
    assert seen[0][:2] == ("cr", 0)  # PE, in real mode
    body = seen[-5:]
    assert body[0] == ("cr", 3, 0x10000)
    assert body[1][:2] == ("cr", 0)
    assert body[2] == ("cr", 0, guest.vcpu.regs.cr0)
    assert body[3] == ("invlpg", STACK + 0x10)
    assert body[4] == ("invlpg", guest.body + 3 + 3 + 4 + 4 + 2 + 5 + 7)


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


def test_hook_errors_come_out_of_run() -> None:
    """An exception in an exit hook is raised by run; the instruction has not happened."""
    guest = HvmGuest()
    guest.long_mode("e610 e6f4ebfe")

    def fail() -> None:
        raise ZeroDivisionError("hook")

    guest.exits.on_out_hooks[0x10] = fail
    with pytest.raises(ZeroDivisionError):
        guest.run()
    assert guest.vcpu.regs.rip == guest.body
    guest.exits.on_out_hooks.clear()
    assert guest.run() is StopReason.REQUESTED


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


def protected_mode(guest: HvmGuest, code: str) -> None:
    """32-bit code at CODE with a flat GDT at 0x1000 (08 code, 10 data, 18/20 user, 28 TSS) and an IDT at
    0x2000."""
    flat = (0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF)
    tss = 0x0000890000000000 | 0x67 | TSS << 16
    guest.write(0x1000, b"".join(entry.to_bytes(8, "little") for entry in (0, *flat, tss)))
    guest.write(TSS + 4, STACK.to_bytes(4, "little") + (0x10).to_bytes(4, "little"))
    guest.write(TSS + 0x66, "6800")
    for vector in range(64):
        target = HANDLERS + 64 * vector
        gate = target & 0xFFFF | 8 << 16 | 0xEE << 40 | target >> 16 << 48
        guest.write(0x2000 + 8 * vector, gate.to_bytes(8, "little"))
        guest.write(target, "f4")
    vcpu = guest.vcpu
    vcpu.enter_pvh(CODE, 0)
    vcpu.regs.gdtr_base, vcpu.regs.gdtr_limit = 0x1000, 0x2F
    vcpu.regs.idtr_base, vcpu.regs.idtr_limit = 0x2000, 0x1FF
    vcpu.regs.rsp = STACK
    # jmp 8:+0; mov ax,0x10; mov ss,ax; mov ds,ax; mov ax,0x28; ltr ax
    entry = "ea" + (CODE + 7).to_bytes(4, "little").hex() + "0800 66b81000 8ed0 8ed8 66b82800 0f00d8"
    guest.write(CODE, entry + code)


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


def test_rep_insb_under_bells_reads_every_byte_once() -> None:
    """REP INSB of 16,000 bytes with a bell every few iterations: as many reads as bytes, each in its place."""
    guest = HvmGuest()
    # mov edi,0x40000; mov ecx,16000; mov edx,0x99; rep insb; out 0xf4,al; jmp $
    guest.long_mode("bf00000400 b9803e0000 ba99000000 f36c e6f4ebfe")
    reads = 0

    def port_in(port: int, size: int) -> int:
        nonlocal reads
        reads += 1
        if reads % 7 == 0:
            guest.vcpu.ring()
        return reads * 7 & 0xFF

    guest.exits.on_port_in = port_in  # type: ignore[method-assign]  # a faster recorder
    bells = 0
    while guest.run() is StopReason.BELL:
        bells += 1
        guest.vcpu.clear_bell()
    assert (reads, bells) == (16000, 16000 // 7)
    assert guest.memory[0x40000 : 0x40000 + 16000] == bytes((n + 1) * 7 & 0xFF for n in range(16000))


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


def test_lmsw_is_trapped() -> None:
    """LMSW from a register: the hook sees the CR0 it makes, and it takes effect."""
    guest = HvmGuest()
    guest.vcpu.trap_control_writes(0)
    guest.real_mode("b80100 0f01f0 eb00 f4")  # mov ax,1; lmsw ax; jmp +0; hlt
    assert guest.run() is StopReason.HALT
    assert ("cr", 0, 0x60000011) in guest.exits.seen
    assert guest.vcpu.regs.cr0 & 1


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("c70600050100 0f01360005 eb00 f4", "[disp16]"),  # mov word [0x500],1; lmsw [0x500]; jmp +0; hlt
        ("bb0005 be0600 c74001 0100 90 0f017001 eb00 f4", "[bx+si+disp8]"),  # word [bx+si+1]
        ("bd0005 c7460301 00 0f017603 eb00 f4", "[bp+disp8]"),
        ("66bb00050000 67c7430401 00 670f017304 eb00 f4", "[ebx+disp8], 16-bit code"),
        ("b85000 8ec0 26c706000001 00 260f01360000 eb00 f4", "es:[0]"),  # mov ax,0x50; mov es,ax
    ],
)
def test_lmsw_from_memory_is_trapped(code: str, what: str) -> None:
    """With each kind of 16-bit address, an address-size prefix, another segment."""
    guest = HvmGuest()
    guest.vcpu.trap_control_writes(0)
    guest.real_mode(code)
    assert guest.run() is StopReason.HALT, what
    assert ("cr", 0, 0x60000011) in guest.exits.seen
    assert guest.vcpu.regs.cr0 & 1


def test_invlpg_with_small_addresses_and_segments_is_trapped() -> None:
    """In 16-bit code: [0x1234], [bx], an address-size prefix; with another segment."""
    guest = HvmGuest()
    guest.vcpu.trap_invlpg(True)
    # mov bx,0x4321; mov ax,0x100; mov es,ax; invlpg [0x1234]; invlpg [bx]; invlpg es:[bx+1]; invlpg [ebx+2]; hlt
    guest.real_mode("bb2143 b80001 8ec0 0f013e3412 0f013f 260f017f01 670f017b02 f4")
    assert guest.run() is StopReason.HALT
    seen = [item[1] for item in guest.exits.seen if item[0] == "invlpg"]
    assert seen == [0x1234, 0x4321, 0x1000 + 0x4322, 0x4323]
