"""What leaves an HVM vCPU: ports, memory that is none, MSRs, control registers, INVLPG, hypercalls; and errors of the hooks."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import MMIO, STACK, TSS, HvmGuest
from tests.unit.vcpu.hvm_programs import WITH_CODE

pytestmark = pytest.mark.usefixtures("paging")


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

    guest.exits.on_port_in = port_in  # a faster recorder
    bells = 0
    while guest.run() is StopReason.BELL:
        bells += 1
        guest.vcpu.clear_bell()
    assert (reads, bells) == (16000, 16000 // 7)
    assert guest.memory[0x40000 : 0x40000 + 16000] == bytes((n + 1) * 7 & 0xFF for n in range(16000))


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


def test_cr8_is_the_hypervisors() -> None:
    """Written and read by any register; more than four bits are #GP; 32-bit code has no such register."""
    guest = HvmGuest()
    # mov eax, 11; mov cr8, rax; mov r9, cr8; mov r10d, 5; mov cr8, r10; mov rdx, cr8
    guest.long_mode("b80b000000 440f22c0 450f20c1 41ba05000000 450f22c2 440f20c2 e6f4ebfe")
    assert guest.run() is StopReason.REQUESTED
    assert [item for item in guest.exits.seen if item[0] == "cr8"] == [
        ("cr8", 11),
        ("cr8",),
        ("cr8", 5),
        ("cr8",),
    ]
    assert (guest.vcpu.regs.r9, guest.vcpu.regs.rdx) == (11, 5)
    guest = HvmGuest()
    guest.long_mode("b810000000 440f22c0 e6f4ebfe")
    guest.handler(13, WITH_CODE)
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.r15 == guest.body + 5
    assert not [item for item in guest.exits.seen if item[0] == "cr8"]
