"""Grant mappings, granted frames, and frames that come and go."""

from __future__ import annotations

import pytest

from bus.abi import xen
from bus.abi.errno import XEN_EBUSY, XEN_EINVAL
from bus.abi.grant_table import (
    GNTMAP_application_map,
    GNTMAP_contains_pte,
    GNTMAP_host_map,
    GNTMAP_readonly,
    GNTST_general_error,
    GNTST_okay,
)
from bus.addresses import DomId, Mfn
from domains.pv.mm.bits import GUEST_KERNEL, USER
from tests.unit.pvmm.pvmm_support import BASE, KERNEL_RO, KERNEL_RW, Guest

X, Y = BASE + 20, BASE + 21
THEIRS = Mfn(0x99)


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    guest.frames.add_foreign(THEIRS, DomId(1), memoryview(bytearray(b"hello".ljust(4096))), writable=True)
    return guest


def test_map_by_address_and_unmap(guest: Guest) -> None:
    va = guest.va(X)
    assert guest.mmu.create_grant_mapping(va, THEIRS, GNTMAP_host_map) == GNTST_okay
    assert guest.load(guest.l1, 20) == THEIRS << 12 | 0x67 | GUEST_KERNEL
    assert guest.mmu.pages.is_free(20)  # what was mapped there before lost its reference
    assert guest.mmu.read_virtual(va, 5) == b"hello"
    guest.mmu.write_virtual(va, b"J")
    assert guest.mmu.read_virtual(va, 5) == b"Jello"
    assert guest.mmu.foreign_mappings(THEIRS) == 1
    guest.clean()
    assert guest.mmu.replace_grant_mapping(va, X, 0, GNTMAP_host_map) == GNTST_general_error
    flushes = guest.host.flushes
    assert guest.mmu.replace_grant_mapping(va, THEIRS, 0, GNTMAP_host_map) == GNTST_okay
    assert guest.host.flushes == flushes + 1
    assert guest.mmu.foreign_mappings(THEIRS) == 0
    assert guest.mmu.replace_grant_mapping(va, THEIRS, 0, GNTMAP_host_map) == GNTST_general_error
    guest.clean()


def test_map_by_entry(guest: Guest) -> None:
    flags = GNTMAP_host_map | GNTMAP_contains_pte | GNTMAP_readonly | GNTMAP_application_map | 3 << 16
    assert guest.mmu.create_grant_mapping(guest.pte(X), THEIRS, flags) == GNTST_okay
    entry = guest.load(guest.l1, 20)
    assert entry & 7 == 1 | USER
    assert entry >> 9 & 7 == 3
    for bad in (guest.pte(X) + 4, X << 12, guest.l2 << 12, BASE - 1 << 12):
        assert guest.mmu.create_grant_mapping(bad, THEIRS, flags) == GNTST_general_error
    guest.clean()
    assert guest.mmu.replace_grant_mapping(guest.pte(X), THEIRS, 0, flags) == GNTST_okay
    guest.clean()


def test_only_a_live_grant_and_its_rights(guest: Guest) -> None:
    assert guest.mmu.create_grant_mapping(guest.va(X), 0x98, GNTMAP_host_map) == GNTST_general_error
    guest.frames.add_foreign(Mfn(0x98), DomId(1), memoryview(bytearray(4096)), writable=False)
    assert guest.mmu.create_grant_mapping(guest.va(X), 0x98, GNTMAP_host_map) == GNTST_general_error
    rights = GNTMAP_host_map | GNTMAP_readonly
    assert guest.mmu.create_grant_mapping(guest.va(X), 0x98, rights) == GNTST_okay
    # Neither a second mapping nor more rights by mmu_update.
    assert guest.update((guest.pte(X), 0x98 << 12 | KERNEL_RW)) == -XEN_EBUSY
    assert guest.update((guest.pte(Y), THEIRS << 12 | KERNEL_RO)) == -XEN_EBUSY
    assert guest.mmu.create_grant_mapping(0x1000, THEIRS, GNTMAP_host_map) == GNTST_general_error
    guest.clean()
    assert guest.update((guest.pte(X), 0)) == 0  # implicit unmap
    assert guest.mmu.foreign_mappings(0x98) == 0
    guest.clean()


def test_unmap_and_replace_moves_the_entry(guest: Guest) -> None:
    assert guest.mmu.create_grant_mapping(guest.va(X), THEIRS, GNTMAP_host_map) == GNTST_okay
    moved = guest.load(guest.l1, 21)
    for new, flags in ((guest.va(X), 2), (0x5000, 2), (guest.va(Y), GNTMAP_contains_pte)):
        assert guest.mmu.replace_grant_mapping(guest.va(X), THEIRS, new, flags) == GNTST_general_error
    assert guest.mmu.replace_grant_mapping(guest.va(X), THEIRS, guest.va(Y), 2) == GNTST_okay
    assert guest.load(guest.l1, 20) == moved
    assert guest.load(guest.l1, 21) == 0
    guest.clean()


def test_grant_to_oneself_follows_page_types(guest: Guest) -> None:
    assert guest.mmu.create_grant_mapping(guest.va(X), guest.l1, GNTMAP_host_map) == GNTST_general_error
    assert guest.mmu.create_grant_mapping(guest.va(X), Y, GNTMAP_host_map) == GNTST_okay
    assert guest.mmu.pages.typed[21] == 2
    guest.clean()


def test_granted_frames_keep_their_type(guest: Guest) -> None:
    assert not guest.mmu.can_grant_writable(guest.l1)
    assert guest.mmu.can_grant_writable(X)
    assert guest.mmu.hold_for_grant(guest.l1, True) == -XEN_EBUSY
    assert guest.mmu.hold_for_grant(BASE - 1, True) == -XEN_EINVAL
    assert guest.mmu.hold_for_grant(guest.l1, False) == 0
    assert guest.mmu.hold_for_grant(X, True) == 0
    assert guest.update((guest.pte(X), 0)) == 0
    guest.clean()
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == -XEN_EINVAL  # still writable elsewhere
    assert guest.mmu.release_frames([X]) == 0
    guest.mmu.release_from_grant(X, True)
    with pytest.raises(ValueError, match="not held"):
        guest.mmu.release_from_grant(X, True)
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == 0
    guest.clean()


def test_frames_are_given_up_only_when_nothing_refers_to_them(guest: Guest) -> None:
    assert guest.mmu.release_frames([X]) == 0  # mapped
    assert guest.update((guest.pte(X), 0), (guest.pte(Y), 0)) == 0
    guest.mmu.set_m2p(X, [20])
    assert guest.mmu.release_frames([X, Y, BASE + 22, BASE + 23]) == 2
    assert guest.host.dropped == [X, Y]
    assert guest.mmu.get_m2p(X) == (1 << 64) - 1
    assert guest.mmu.release_frames([X]) == 0
    assert guest.update((guest.pte(X), X << 12 | KERNEL_RO)) == -XEN_EBUSY
    assert guest.frames.page(Mfn(X)) is None
    guest.clean()
    guest.mmu.populate_frames([X, X])
    assert guest.update((guest.pte(X), X << 12 | KERNEL_RW)) == 0
    guest.clean()
    with pytest.raises(ValueError, match="RAM range"):
        guest.mmu.populate_frames([BASE + guest.ram])


def test_heap_frames_are_shared_and_taken_back(guest: Guest) -> None:
    heap = BASE + guest.ram + 1
    assert guest.update((guest.pte(X), heap << 12 | KERNEL_RW)) == -XEN_EBUSY
    assert guest.mmu.share_frame(heap, True) == 0
    assert guest.mmu.share_frame(heap, True) == 0
    assert guest.update((guest.pte(X), heap << 12 | KERNEL_RW)) == 0
    assert guest.mmu.share_frame(heap, False) == -XEN_EBUSY
    guest.clean()
    assert guest.update((guest.pte(X), 0)) == 0
    assert guest.mmu.share_frame(heap, False) == 0
    assert guest.mmu.share_frame(X, True) == -XEN_EINVAL
    assert guest.mmu.release_frames([heap]) == 0
    guest.clean()
