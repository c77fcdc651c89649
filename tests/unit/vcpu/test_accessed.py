"""The accessed bit of a page is set by an access that may be, and by no other; the error code of the fault tells why it may not."""

from __future__ import annotations

import struct

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import TABLES, HvmGuest

pytestmark = pytest.mark.usefixtures("paging")

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
SMALL = 0x50000
MIDDLE, LARGEST = 0x40000000, 0x80000000
TABLE = 0x58000
"""For the page of 2 MiB."""
# mov eax, [ADDRESS]; mov [ADDRESS], eax; call ADDRESS: through RDI
READ, WRITE, FETCH = "8b07", "8907", "ffd7"
STOP = "e6f4ebfe"


def place(level: int) -> tuple[int, int, int]:
    """(linear address, where its last entry is, bits that make it one)."""
    if level == 1:
        return SMALL, TABLES + 0x3000 + 8 * (SMALL >> 12), SMALL
    if level == 2:
        return MIDDLE + SMALL, TABLE, LARGE
    return LARGEST + SMALL, TABLES + 0x1010, LARGE


def guest_with(level: int, rights: int, code: str) -> tuple[HvmGuest, int, int]:
    linear, entry, bits = place(level)
    guest = HvmGuest()
    # NX on: mov ecx, 0xc0000080; rdmsr; bts eax, 11; wrmsr. Then the address, and the access.
    guest.long_mode(
        "b9800000c0 0f32 0fbae80b 0f30 bf" + struct.pack("<I", linear).hex() + code + STOP,
    )
    guest.handler(14, "58 0f20d3 e6f4ebfe")  # pop rax; mov rbx, cr2
    guest.write(TABLES + 0x1008, struct.pack("<Q", TABLE | 7))
    guest.write(entry, struct.pack("<Q", bits | rights))
    guest.write(SMALL, "c3")
    return guest, linear, entry


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    ("rights", "access", "error"),
    [
        (PRESENT, WRITE, 3),
        (PRESENT | USER, WRITE, 3),
        (PRESENT | NX, FETCH, 17),
        (PRESENT | WRITABLE | NX, FETCH, 17),
    ],
)
def test_a_denied_access_leaves_it(level: int, rights: int, access: str, error: int) -> None:
    guest, linear, entry = guest_with(level, rights, access)
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rax & 0xFFFFFFFF, guest.vcpu.regs.rbx) == (error, linear)
    assert guest.qword(entry) & (ACCESSED | DIRTY) == 0


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    ("rights", "access", "bits"),
    [
        (PRESENT, READ, ACCESSED),
        (PRESENT | WRITABLE, WRITE, ACCESSED | DIRTY),
        (PRESENT, FETCH, ACCESSED),
    ],
)
def test_an_allowed_one_sets_it(level: int, rights: int, access: str, bits: int) -> None:
    guest, _, entry = guest_with(level, rights, access)
    guest.vcpu.regs.rbx = 0
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx == 0
    assert guest.qword(entry) & (ACCESSED | DIRTY) == bits


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_read_after_a_denied_write_sets_it(level: int) -> None:
    guest, _, entry = guest_with(level, PRESENT, WRITE + READ)
    # add qword [rsp + 8], 2: behind the write; pop the error code; iretq
    guest.handler(14, "4883442408024883c40848cf")
    assert guest.run() is StopReason.REQUESTED
    assert guest.qword(entry) & (ACCESSED | DIRTY) == ACCESSED


def test_a_user_s_access_to_a_page_of_the_kernel_s() -> None:
    linear, entry, bits = place(1)
    guest = HvmGuest()
    # push 0x23; push STACK; push 2; push 0x2b; push user code; iretq ... there: mov edi, address; mov eax, [rdi]
    guest.long_mode("6a23 6800600000 6a02 6a2b 6800500000 48cf")
    guest.write(0x5000, "bf" + struct.pack("<I", linear).hex() + READ)
    guest.handler(14, "58 0f20d3 e6f4ebfe")
    guest.write(entry, struct.pack("<Q", bits | PRESENT | WRITABLE))
    assert guest.run() is StopReason.REQUESTED
    assert (guest.vcpu.regs.rax & 0xFFFFFFFF, guest.vcpu.regs.rbx) == (5, linear)
    assert guest.qword(entry) & ACCESSED == 0
