"""Guest memory by virtual address: rights, accessed and dirty bits, page borders, and walks that are remembered only
as long as they are true."""

from __future__ import annotations

import pytest

from bus.abi import xen
from bus.addresses import DomId, Mfn
from domains.pv.api import GuestFault
from domains.pv.mm.walk import MAX_COPY, address_ok
from tests.unit.pvmm.pvmm_support import BASE, KERNEL, KERNEL_RO, KERNEL_RW, TABLE, Guest, P

X, Y = BASE + 20, BASE + 21


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.mark.parametrize(
    ("va", "okay"),
    [
        (0, True),
        (0x0000_7FFF_FFFF_FFFF, True),
        (0x0000_8000_0000_0000, False),
        (0xFFFF_7FFF_FFFF_FFFF, False),
        (0xFFFF_8000_0000_0000, False),
        (0xFFFF_87FF_FFFF_FFFF, False),
        (0xFFFF_8800_0000_0000, True),
        ((1 << 64) - 1, True),
        (1 << 64, False),
        (-1, False),
    ],
)
def test_address_ok(va: int, okay: bool) -> None:
    assert address_ok(va) == okay


def test_copies_cross_pages_and_respect_rights(guest: Guest) -> None:
    va = guest.va(X) + 4090
    guest.mmu.write_virtual(va, b"0123456789")
    assert guest.mmu.read_virtual(va, 10) == b"0123456789"
    assert bytes(guest.frames.octets[(20 << 12) + 4090 : (21 << 12) + 4]) == b"0123456789"
    assert guest.read_only(Y) == 0
    with pytest.raises(GuestFault) as caught:
        guest.mmu.write_virtual(va, b"abcdefghij")
    assert (caught.value.va, caught.value.write, caught.value.present) == (guest.va(Y), True, True)
    assert guest.mmu.read_virtual(va, 10) == b"abcdef6789"
    assert guest.update((guest.pte(Y), 0)) == 0
    with pytest.raises(GuestFault):
        guest.mmu.read_virtual(va, 10)
    for length in (MAX_COPY + 1, 1 << 40):
        with pytest.raises(GuestFault):
            guest.mmu.read_virtual(va, length)
    assert guest.mmu.read_virtual(va, 0) == b""


@pytest.mark.parametrize("va", [0xFFFF_8000_0000_0000, 0xFFFF_8200_0000_0000, 0x1000, 1 << 48, (1 << 64) - 8])
def test_nothing_there_or_xens(guest: Guest, va: int) -> None:
    with pytest.raises(GuestFault):
        guest.mmu.read_virtual(va, 8)
    with pytest.raises(GuestFault):
        guest.mmu.write_virtual(va, b"x")


def test_accessed_and_dirty(guest: Guest) -> None:
    assert guest.update((guest.pte(X), X << 12 | P | 2)) == 0
    guest.mmu.read_virtual(guest.va(X), 1)
    assert guest.load(guest.l1, 20) & 0x60 == 0x20
    guest.mmu.write_virtual(guest.va(X), b"x")
    assert guest.load(guest.l1, 20) & 0x60 == 0x60


def test_walks_are_forgotten_when_a_table_changes(guest: Guest) -> None:
    """The same address through another L1 table, and through none."""
    other, slot = BASE + 30, guest.l2 << 12 | (KERNEL >> 21 & 511) + 1 << 3
    va = KERNEL + (1 << 21)
    for table, page in ((X, Y), (other, BASE + 31)):
        guest.store(table, 0, page << 12 | KERNEL_RO)
        assert guest.read_only(table) == 0
    assert guest.update((slot, X << 12 | TABLE)) == 0
    assert guest.mmu.translate(va) == Y << 12
    assert guest.update((slot, other << 12 | TABLE)) == 0
    assert guest.mmu.translate(va) == BASE + 31 << 12
    assert guest.update((slot, 0)) == 0
    with pytest.raises(GuestFault):
        guest.mmu.translate(va)
    # Write permission of an upper entry counts.
    assert guest.writable(Y) == 0
    assert guest.update((X << 12, Y << 12 | KERNEL_RW), (slot, X << 12 | P)) == 0
    with pytest.raises(GuestFault):
        guest.mmu.write_virtual(va, b"x")
    assert guest.update((slot, X << 12 | TABLE)) == 0
    guest.mmu.write_virtual(va, b"x")
    guest.clean()


def test_walks_are_forgotten_when_a_root_goes(guest: Guest) -> None:
    """The frame of a root that went becomes the root of another address space."""
    l4, l3 = BASE + 30, BASE + 31
    kernel_slot = KERNEL >> 39 & 511
    guest.store(l4, kernel_slot, guest.load(guest.l4, kernel_slot))
    for mfn in (l4, l3):
        assert guest.read_only(mfn) == 0
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, l4) == 0
    assert guest.mmu.translate(KERNEL, user=True) == BASE << 12
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, 0) == 0
    guest.store(l4, kernel_slot, l3 << 12 | TABLE)
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, l4) == 0
    with pytest.raises(GuestFault):
        guest.mmu.translate(KERNEL, user=True)
    guest.clean()


def test_no_user_root(guest: Guest) -> None:
    with pytest.raises(GuestFault):
        guest.mmu.read_virtual(KERNEL, 1, user=True)


def test_a_frame_that_is_not_here_any_more(guest: Guest) -> None:
    """A translation to a granted frame that was taken away faults instead of reading anything else."""
    guest.frames.add_foreign(Mfn(7), DomId(1), memoryview(bytearray(4096)), writable=True)
    assert guest.mmu.create_grant_mapping(guest.va(X), 7, 2) == 0
    guest.mmu.write_virtual(guest.va(X), b"x")
    guest.frames.remove_foreign(Mfn(7))
    with pytest.raises(GuestFault):
        guest.mmu.read_virtual(guest.va(X), 1)
    with pytest.raises(GuestFault):
        guest.mmu.write_virtual(guest.va(X), b"x")
