"""Code that runs into a page from which nothing can be fetched: all in front of the edge has run, and the fault is at the edge."""

from __future__ import annotations

import struct

import pytest

from domains.vcpu.api import StopReason, Trap
from domains.vcpu.hvm_testing import TABLES, HvmGuest
from domains.vcpu.testing import BASE, CODE, PvGuest

EDGE = CODE + 0x1000
INC = bytes.fromhex("48ffc0")  # inc rax


def into_the_edge(tail: bytes, rounds: int = 1) -> PvGuest:
    """INC RAX and `tail` end at EDGE, whose page is not there; RAX is 0."""
    guest = PvGuest()
    guest.write(EDGE - len(tail) - 3 * 20, INC * 20 + tail)
    guest.set_entry(EDGE, 0)
    guest.vcpu.regs.rax = 0
    guest.restart(EDGE - len(tail) - 3 * 20)
    return guest


@pytest.mark.parametrize("tail", ["", "90", "66906690", "48894310"])
def test_a_pv_guest_s_fetch_faults_at_the_edge(tail: str) -> None:
    guest = into_the_edge(bytes.fromhex(tail))
    guest.vcpu.regs.rbx = 0x30000
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("trap", Trap(14, 20, False), EDGE)]
    assert (guest.vcpu.regs.cr2, guest.vcpu.regs.rax) == (EDGE, 20)


def test_an_instruction_across_the_edge_is_where_the_fault_is() -> None:
    guest = into_the_edge(b"\x48")
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("trap", Trap(14, 20, False), EDGE - 1)]
    assert (guest.vcpu.regs.cr2, guest.vcpu.regs.rax) == (EDGE, 20)


def test_the_page_comes_and_goes() -> None:
    """Each time again, also where one instruction alone is in front of the edge."""
    guest = into_the_edge(b"")
    guest.write(EDGE, b"\x0f\x0b")
    for round_ in range(3):
        for start in (EDGE - 3, EDGE - 9):
            guest.traps.seen.clear()
            guest.set_entry(EDGE, 0)
            guest.restart(start)
            assert guest.run() is StopReason.REQUESTED
            assert guest.traps.seen == [("trap", Trap(14, 20, False), EDGE)], round_
            guest.traps.seen.clear()
            guest.set_entry(EDGE, BASE + EDGE | 7)
            guest.vcpu.flush_tlb()
            assert guest.run() is StopReason.REQUESTED
            assert guest.traps.seen == [("invalid", None, EDGE)]


def test_a_read_of_the_next_page_is_no_fetch() -> None:
    guest = into_the_edge(bytes.fromhex("488b03") + INC)  # mov rax, [rbx]
    guest.set_entry(EDGE, BASE + EDGE | 7)
    guest.write(EDGE, b"\x0f\x0b")
    guest.vcpu.regs.rbx = EDGE + 0x1000
    guest.set_entry(EDGE + 0x1000, 0)
    guest.vcpu.flush_tlb()
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("trap", Trap(14, 4, False), EDGE - 6)]


@pytest.mark.usefixtures("paging")
@pytest.mark.parametrize("nx", [False, True])
def test_an_hvm_guest_s_fetch_faults_at_the_edge(nx: bool) -> None:
    guest = HvmGuest()
    edge = 0x51000
    # NX off: mov ecx, 0xc0000080; rdmsr; btr eax, 11; wrmsr. Then xor eax, eax; mov edi, edge - 60; jmp rdi
    off = "" if nx else "b9800000c0 0f32 0fbaf00b 0f30"
    guest.long_mode(off + "31c0 bf" + struct.pack("<I", edge - 60).hex() + "ffe7")
    guest.write(edge - 60, INC * 20)
    guest.write(TABLES + 0x3000 + 8 * (edge >> 12), bytes(8))
    guest.handler(14, "59 5a 0f20d3 e6f4ebfe")  # pop rcx; pop rdx; mov rbx, cr2
    assert guest.run() is StopReason.REQUESTED
    regs = guest.vcpu.regs
    assert (regs.rax & 0xFFFFFFFF, regs.rcx & 0xFFFFFFFF, regs.rdx, regs.rbx) == (
        20,
        16 if nx else 0,
        edge,
        edge,
    )


@pytest.mark.usefixtures("paging")
def test_behind_the_last_canonical_address() -> None:
    """#GP there, as XSA-170's test has it."""
    guest = HvmGuest()
    last = (1 << 47) - 60
    guest.long_mode("31c0 48bf" + struct.pack("<Q", last).hex() + "ffe7")
    page = 0x50000
    guest.write(page + 0x1000 - 60, INC * 20)
    # The last entry of each level, in tables of its own.
    tables = (0x58000, 0x59000, 0x5A000)
    guest.write(TABLES + 8 * 255, struct.pack("<Q", tables[0] | 7))
    guest.write(tables[0] + 8 * 511, struct.pack("<Q", tables[1] | 7))
    guest.write(tables[1] + 8 * 511, struct.pack("<Q", tables[2] | 7))
    guest.write(tables[2] + 8 * 511, struct.pack("<Q", page | 7))
    guest.handler(13, "59 5a e6f4ebfe")  # pop rcx; pop rdx
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rax & 0xFFFFFFFF, guest.vcpu.regs.rcx, guest.vcpu.regs.rdx) == (20, 0, 1 << 47)
