"""Exceptions that QEMU's translator gets wrong arrive at an HVM guest as a processor gives them."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.corrections import software_length, undefined_first
from domains.vcpu.hvm_testing import CODE, HANDLERS, IDT, STACK, HvmGuest

CR0_TS, CR0_EM, CR4_OSFXSR = 8, 4, 0x200
WITH_CODE = "58 4c8b3c24 e6f4ebfe"  # pop rax; mov r15,[rsp]; out 0xf4,al; jmp $
WITHOUT_CODE = "4c8b3c24 e6f4ebfe"


def _run(guest: HvmGuest, vector: int, handler: str) -> tuple[int, int]:
    """(error code, saved RIP's distance from the body) that the handler of `vector` found."""
    guest.handler(vector, handler)
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert regs.rip >> 6 == HANDLERS + 64 * vector >> 6, f"RIP {regs.rip:#x}"
    return regs.rax & 0xFFFFFFFF, regs.r15 - guest.body


ABSENT = [
    ("int3", "90 cc", 3, 3 * 8 + 2, 1),
    ("int 3 of two bytes", "90 cd03", 3, 3 * 8 + 2, 1),
    ("int 0x30", "90 cd30", 0x30, 0x30 * 8 + 2, 1),
    ("int 0x30 with a prefix", "90 67cd30", 0x30, 0x30 * 8 + 2, 1),
    ("icebp", "90 f1", 1, 1 * 8 + 3, 1),
    ("icebp with a prefix", "90 67f1", 1, 1 * 8 + 3, 1),
    ("ud2: a hardware exception", "90 0f0b", 6, 6 * 8 + 3, 1),
]


@pytest.mark.parametrize(("name", "code", "vector", "error", "at"), ABSENT, ids=[row[0] for row in ABSENT])
def test_gate_that_is_not_present(name: str, code: str, vector: int, error: int, at: int) -> None:
    """#NP: the error code is the vector times 8, IDT, EXT unless software asked; RIP is at the instruction."""
    guest = HvmGuest()
    guest.long_mode(code)
    guest.memory[IDT + 16 * vector + 5] &= 0x7F
    assert _run(guest, 11, WITH_CODE) == (error, at)


@pytest.mark.parametrize("bits", [32, 64])
def test_gate_whose_privilege_does_not_allow_it(bits: int) -> None:
    """INT n from CPL 3 by a gate of DPL 0 is #GP at the instruction; ICEBP does not ask for the DPL."""
    guest = HvmGuest()
    # push 0x23; push 0x5000; push 0x202; push CS of CPL 3; push 0x7800; iretq
    guest.long_mode("6a23 6800500000 6802020000 6a2b 6800780000 48cf")
    guest.write(0x7800, "90 cd30")
    guest.gate(0x30, HANDLERS + 64 * 0x30, dpl=0)
    guest.gate(1, HANDLERS + 64, dpl=0)
    if bits == 64:
        guest.handler(13, "58 4c8b3c24 e6f4ebfe")
        assert guest.run() is StopReason.REQUESTED
        assert (guest.vcpu.regs.rax, guest.vcpu.regs.r15) == (0x30 * 8 + 2, 0x7801)
    else:
        guest.write(0x7800, "90 f1")
        guest.handler(1, WITHOUT_CODE)
        assert guest.run() is StopReason.REQUESTED
        assert guest.vcpu.regs.r15 == 0x7802


def test_icebp_is_a_trap() -> None:
    """#DB with RIP behind the instruction, again and again."""
    guest = HvmGuest()
    guest.long_mode("b9e8030000 f1 ffc9 75fb e6f4ebfe")  # mov ecx,1000; l: icebp; dec ecx; jnz l; out; jmp $
    guest.handler(1, "ffc3 48cf")  # inc ebx; iretq
    guest.vcpu.regs.rbx = 0
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1000


STACK_SEGMENT = [
    ("mov [rax]", "48b80000000000800000 c60000", 13),
    ("mov [rbp]", "48bd0000000000800000 c6450000", 12),
    ("mov ds:[rbp]: no segment counts but FS and GS", "48bd0000000000800000 3ec6450000", 12),
    ("mov fs:[rbp]", "48bd0000000000800000 64c6450000", 13),
]


@pytest.mark.parametrize(("name", "code", "vector"), STACK_SEGMENT, ids=[row[0] for row in STACK_SEGMENT])
def test_address_that_is_not_canonical(name: str, code: str, vector: int) -> None:
    """#SS(0) by the stack segment, else #GP(0), both at the instruction."""
    guest = HvmGuest()
    guest.long_mode(code)
    assert _run(guest, vector, WITH_CODE) == (0, 10)


COPROCESSOR = [
    # name, instruction, CR0, CR4.OSFXSR, vector
    ("x87", "d9d0", CR0_EM | CR0_TS, True, 7),
    ("mmx, emulated", "0f6fc0", CR0_EM | CR0_TS, True, 6),
    ("mmx, switched", "0f6fc0", CR0_TS, True, 7),
    ("sse, emulated", "0f10c0", CR0_EM | CR0_TS, True, 6),
    ("sse, not enabled", "0f10c0", CR0_TS, False, 6),
    ("sse, switched", "0f10c0", CR0_TS, True, 7),
    ("sse2 of integers, not enabled", "660fefc0", CR0_TS, False, 6),
    ("mmx without SSE", "0fefc0", CR0_TS, False, 7),
]


@pytest.mark.parametrize(
    ("name", "code", "cr0", "sse", "vector"), COPROCESSOR, ids=[row[0] for row in COPROCESSOR]
)
def test_ud_comes_before_nm(name: str, code: str, cr0: int, sse: bool, vector: int) -> None:
    """SDM volume 3, tables 2-3 and 13-1."""
    guest = HvmGuest()
    # mov rax,cr4; or/and; mov cr4,rax; mov rax,cr0; or al,CR0; mov cr0,rax
    guest.long_mode(f"0f20e0 {'0d' if sse else '25'}{(0x200 if sse else 0xFFFFFDFF).to_bytes(4, 'little').hex()} 0f22e0"
                    f"0f20c0 0c{cr0:02x} 0f22c0 {code}")  # fmt: skip
    assert _run(guest, vector, WITHOUT_CODE)[1] == 3 + 5 + 3 + 3 + 2 + 3


def test_a_fault_of_an_interrupt_gate_in_protected_mode_is_at_the_instruction() -> None:
    """INT 0x30 beyond the IDT's limit, in 32-bit code."""
    guest = HvmGuest()
    guest.long_mode("")
    guest.write(
        CODE + 0x20, "66b81000 8ed8 8ed0 bc" + STACK.to_bytes(4, "little").hex() + "0f011d00450000 cd30"
    )
    at = CODE + 0x20 + 4 + 2 + 2 + 5 + 7
    guest.write(0x4500, (0x2F * 8 + 7).to_bytes(2, "little") + (0x4600).to_bytes(4, "little"))
    gate = 0x7A00 | 0x18 << 16 | 0x8E << 40
    guest.write(0x4600 + 8 * 13, gate.to_bytes(8, "little"))
    guest.write(0x7A00, "58 8b1c24 e6f4ebfe")  # pop eax; mov ebx,[esp]
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rax, guest.vcpu.regs.rbx) == (0x30 * 8 + 2, at)


def test_length_of_a_software_interrupt() -> None:
    """By what stands before RIP: the vector tells INT3 from INT 3; one REX prefix at most, in 64-bit code only."""
    assert software_length(b"\x90\xcd\x30", 0x30, long=True) == 2
    assert software_length(b"\x90\xcd\x03", 3, long=True) == 2
    assert software_length(b"\xcd\x03\xcc", 3, long=True) == 1
    assert software_length(b"\xcd\xcc", 0xCC, long=True) == 2
    assert software_length(b"\x90\x48\x48\xcd\x30", 0x30, long=True) == 3
    assert software_length(b"\x90\x48\xcd\x30", 0x30, long=False) == 2
    assert software_length(b"\x90\x66\x67\xce", 4, long=False) == 3


def test_what_obeys_em_and_ts_alike() -> None:
    """FXSAVE and XSAVE are #NM; LDMXCSR is SSE. A code that ends too soon stays as QEMU has it."""
    assert not undefined_first(bytes.fromhex("0fae00"), CR0_EM, CR4_OSFXSR, long=True)
    assert not undefined_first(bytes.fromhex("480fae20"), CR0_EM, CR4_OSFXSR, long=True)
    assert undefined_first(bytes.fromhex("0fae10"), CR0_EM, CR4_OSFXSR, long=True)
    assert undefined_first(bytes.fromhex("0fae10"), 0, 0, long=True)
    assert not undefined_first(b"\x0f", CR0_EM, 0, long=True)
    assert not undefined_first(b"", CR0_EM, 0, long=True)


def _wrmsr(number: int, value: int) -> str:
    """mov ecx; mov eax; mov edx; wrmsr: 17 bytes, the instruction at 15."""
    words = (number, value & 0xFFFFFFFF, value >> 32)
    return (
        "".join(
            op + word.to_bytes(4, "little").hex() for op, word in zip(("b9", "b8", "ba"), words, strict=True)
        )
        + "0f30"
    )


@pytest.mark.parametrize("number", [0x175, 0x176, 0xC0000082, 0xC0000100, 0xC0000101, 0xC0000102])
def test_wrmsr_of_an_address(number: int) -> None:
    """One that is canonical is read back, one that is not is #GP; nobody outside the vCPU is asked."""
    guest = HvmGuest()
    good, bad = 0xFFFF800000001000, 0x8000000000000000
    guest.long_mode(
        _wrmsr(number, good) + "0f32 89c3 89d5" + _wrmsr(number, bad)
    )  # rdmsr; mov ebx,eax; mov ebp,edx
    assert _run(guest, 13, WITH_CODE) == (0, 17 + 6 + 15)
    assert (guest.vcpu.regs.rbp, guest.vcpu.regs.rbx) == (good >> 32, good & 0xFFFFFFFF)
    assert not [item for item in guest.exits.seen if item[0] == "wrmsr"]


@pytest.mark.parametrize("value", [0x1900, 0x901 | 1 << 32, 0x801])
def test_wrmsr_of_efer_that_faults(value: int) -> None:
    """SVME, an unknown bit, LME changed while paging is on."""
    guest = HvmGuest()
    guest.long_mode(_wrmsr(0xC0000080, value))
    assert _run(guest, 13, WITH_CODE) == (0, 15)


def test_wrmsr_of_efer_switches_nx() -> None:
    """NXE off makes the bit reserved: the next access by an entry that has it is #PF with RSVD. LMA stays whatever is written."""
    guest = HvmGuest()
    guest.long_mode(
        _wrmsr(0xC0000080, 0x101) + "0f32 89c5 488b042500301e00"
    )  # rdmsr; mov ebp,eax; mov rax,[0x1e3000]
    entry = 0x10000 + 0x3000 + 8 * 0x1E3
    guest.memory[entry + 7] = 0x80
    assert _run(guest, 14, WITH_CODE) == (9, 17 + 4)
    assert guest.vcpu.regs.rbp == 0x501


WITHOUT_OSFXSR = "0f20e0 25fffdffff 0f22e0"  # mov rax,cr4; and eax,~0x200; mov cr4,rax
GENERAL = [
    ("shlx r8d,r8d,edx", "41b801000000 ba05000000 c44269f7c0 4489c0", 32),
    ("movbe ax,[rsp]", "b834120000 50 660f38f00424", 0x3412),
    ("crc32 eax,bx", "31c0 bb01000000 66f20f38f1c3", None),
]


@pytest.mark.parametrize(("name", "code", "result"), GENERAL, ids=[row[0] for row in GENERAL])
def test_instructions_on_general_registers_need_no_osfxsr(name: str, code: str, result: int | None) -> None:
    """A kernel's decompressor runs SHLX before it sets CR4.OSFXSR; also again after a write of CR4."""
    for times in (1, 2):
        guest = HvmGuest()
        guest.long_mode(f"{WITHOUT_OSFXSR} {code}" * times + "e6f4ebfe")
        guest.handler(6, "b8ef0c0000 e6f4ebfe")
        assert guest.run() is StopReason.REQUESTED
        value = guest.vcpu.regs.rax & 0xFFFF
        assert value == result if result is not None else value not in (0, 0xCEF)
        assert not guest.vcpu.regs.cr4 & CR4_OSFXSR


def test_sse_without_osfxsr_stays_undefined() -> None:
    """ADDPS, and ADDPD, which has the prefix 66."""
    for code in ("0f58c1", "660f58c1"):
        guest = HvmGuest()
        guest.long_mode(f"{WITHOUT_OSFXSR} {code} e6f4ebfe")
        guest.handler(6, "b8ef0c0000 e6f4ebfe")
        assert guest.run() is StopReason.REQUESTED
        assert guest.vcpu.regs.rax == 0xCEF
