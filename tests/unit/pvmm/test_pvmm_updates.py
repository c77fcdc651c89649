"""mmu_update and update_va_mapping: each rule with the errno that Xen gives, and nothing changed when it refuses."""

from __future__ import annotations

import struct

import pytest

from bus.abi import xen
from bus.abi.errno import XEN_EBUSY, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EPERM, XEN_ESRCH
from domains.pv.api import Continuation, GuestFault
from domains.pv.mm.bits import GLOBAL, GUEST_KERNEL, NX, PCD, PSE, USER
from domains.pv.mm.updates import BATCH, PREEMPTED
from tests.unit.pvmm.pvmm_support import BASE, KERNEL, KERNEL_RO, KERNEL_RW, MAX_MFN, TABLE, Guest, P

X, Y = BASE + 20, BASE + 21


@pytest.fixture
def guest() -> Guest:
    return Guest()


def refused(guest: Guest, error: int, ptr: int, value: int, domid: int = xen.DOMID_SELF) -> None:
    """The update fails with this errno, changes no word and no count."""
    before, at = bytes(guest.memory), (ptr >> 3) - (BASE << 9)
    assert guest.update((ptr, value), domid=domid) == -error
    if 0 <= at < len(guest.words):
        old = int.from_bytes(before[at << 3 : (at << 3) + 8], "little")
        assert guest.words[at] | 0x60 == old | 0x60
    guest.clean()


def test_kernel_entries_get_user_bit_and_xens_mark(guest: Guest) -> None:
    entry = guest.load(guest.l1, 20)
    assert entry & (USER | GUEST_KERNEL) == USER | GUEST_KERNEL
    assert guest.update((guest.pte(X), Y << 12 | P | USER)) == 0
    assert guest.load(guest.l1, 20) == Y << 12 | P | USER | GLOBAL
    assert guest.load(guest.l4, KERNEL >> 39 & 511) & USER
    guest.clean()


def test_map_and_unmap_count(guest: Guest) -> None:
    pages = guest.mmu.pages
    assert guest.update((guest.pte(X), 0)) == 0
    assert pages.is_free(20)
    assert guest.update((guest.pte(X), Y << 12 | KERNEL_RW)) == 0
    assert pages.typed[21] == 2
    assert guest.update((guest.pte(X), Y << 12 | KERNEL_RO)) == 0
    assert (pages.typed[21], pages.plain[21]) == (1, 1)
    guest.clean()


@pytest.mark.parametrize("flag", [PSE, PCD, 1 << 3])
def test_cache_attributes_need_hardware(guest: Guest, flag: int) -> None:
    refused(guest, XEN_EINVAL, guest.pte(X), X << 12 | KERNEL_RW | flag)
    driver = Guest(hardware=True)
    assert driver.update((driver.pte(X), X << 12 | KERNEL_RW | flag)) == 0
    driver.clean()


@pytest.mark.parametrize(
    ("mfn", "error"),
    [
        (BASE - 1, XEN_EBUSY),  # somebody else's
        (BASE + 64 + 1, XEN_EBUSY),  # the domain's range, but a heap frame that is not shared
        (MAX_MFN, XEN_EBUSY),
        (MAX_MFN + 1, XEN_EPERM),  # I/O memory
        (0x0F00_0000, XEN_EPERM),  # Xen's private frames
        ((1 << 40) - 1, XEN_EINVAL),  # INVALID_MFN
    ],
)
@pytest.mark.parametrize("flags", [KERNEL_RO, KERNEL_RW])
def test_frames_that_are_not_the_domains(guest: Guest, mfn: int, error: int, flags: int) -> None:
    refused(guest, error, guest.pte(X), mfn << 12 | flags)


def test_shared_heap_frame_may_be_mapped_but_be_no_table(guest: Guest) -> None:
    heap = BASE + 64
    assert guest.update((guest.pte(X), heap << 12 | KERNEL_RW)) == 0
    guest.clean()
    assert guest.update((guest.pte(X), 0)) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, heap) == -XEN_EINVAL


def test_no_writable_mapping_of_a_table(guest: Guest) -> None:
    refused(guest, XEN_EBUSY, guest.pte(X), guest.l1 << 12 | KERNEL_RW)
    refused(guest, XEN_EBUSY, guest.pte(guest.l4), guest.l4 << 12 | KERNEL_RW)
    assert guest.update((guest.pte(X), guest.l1 << 12 | KERNEL_RO)) == 0
    guest.clean()


def test_a_writable_page_becomes_no_table(guest: Guest) -> None:
    l2_slot = guest.l2 << 12 | 8
    refused(guest, XEN_EINVAL, l2_slot, X << 12 | TABLE)
    assert guest.read_only(X) == 0
    assert guest.update((l2_slot, X << 12 | TABLE)) == 0
    assert guest.writable(X) == -XEN_EBUSY
    guest.clean()
    assert guest.update((l2_slot, 0)) == 0
    assert guest.writable(X) == 0
    guest.clean()


def test_flag_only_change_keeps_counts_and_other_changes_do_not_slip_through(guest: Guest) -> None:
    typed = list(guest.mmu.pages.typed)
    assert guest.update((guest.pte(X), X << 12 | KERNEL_RW | NX | 7 << 9)) == 0
    assert guest.mmu.pages.typed == typed
    assert guest.load(guest.l1, 20) & NX
    # XSA-148: a large page at L2 must be refused also when nothing else changes.
    refused(guest, XEN_EINVAL, guest.l2 << 12 | (KERNEL >> 21 & 511) << 3, guest.l1 << 12 | TABLE | PSE)


def test_upper_levels_check_type_and_flags(guest: Guest) -> None:
    assert guest.read_only(X) == 0
    refused(guest, XEN_EINVAL, guest.l3 << 12 | 8, X << 12 | TABLE | GLOBAL)
    refused(guest, XEN_EINVAL, guest.l3 << 12 | 8, guest.l1 << 12 | TABLE)
    refused(guest, XEN_EINVAL, guest.l3 << 12 | 8, BASE - 5 << 12 | TABLE)
    assert guest.update((guest.l3 << 12 | 8, X << 12 | P)) == 0
    assert guest.load(guest.l3, 1) == X << 12 | P | USER
    guest.clean()


@pytest.mark.parametrize("slot", [256, 260, 271])
def test_xens_slots_are_xens(guest: Guest, slot: int) -> None:
    refused(guest, XEN_EINVAL, guest.l4 << 12 | slot << 3, 0)
    refused(guest, XEN_EINVAL, guest.l4 << 12 | slot << 3, guest.l3 << 12 | TABLE)
    assert guest.load(guest.l4, 256) == guest.xenmap.slots[0]


def test_linear_table_only_read_only_and_of_itself(guest: Guest) -> None:
    slot = guest.l4 << 12 | 300 << 3
    refused(guest, XEN_EINVAL, slot, guest.l4 << 12 | TABLE)
    assert guest.update((slot, guest.l4 << 12 | P)) == 0
    guest.clean()
    itself = 0xFFFF_0000_0000_0000 | 300 << 39 | 300 << 30 | 300 << 21 | 300 << 12
    assert guest.mmu.read_virtual(itself + 300 * 8, 8) == guest.load(guest.l4, 300).to_bytes(8, "little")
    with pytest.raises(GuestFault):
        guest.mmu.write_virtual(itself, b"x")
    assert guest.mmu.update_va_mapping(itself, 0, 0) == -XEN_EINVAL  # no L1 table there
    assert guest.update((slot, 0)) == 0
    guest.clean()


def test_preserve_accessed_and_dirty(guest: Guest) -> None:
    at = guest.pte(X)
    assert guest.update((at | xen.MMU_PT_UPDATE_PRESERVE_AD, X << 12 | P | 2)) == 0
    assert guest.load(guest.l1, 20) & 0x60 == 0x60
    assert guest.update((at | xen.MMU_PT_UPDATE_NO_TRANSLATE, X << 12 | P | 2)) == 0
    assert guest.load(guest.l1, 20) & 0x60 == 0
    assert guest.update((at | xen.MMU_PT_UPDATE_PRESERVE_AD, Y << 12 | P)) == 0
    guest.clean()


@pytest.mark.parametrize("command", [4, 5, 6, 7])
def test_unknown_commands(guest: Guest, command: int) -> None:
    assert guest.update((guest.pte(X) | command, 0)) == -XEN_ENOSYS


def test_pointer_to_no_table(guest: Guest) -> None:
    assert guest.update((BASE - 1 << 12, 0)) == -XEN_EINVAL
    assert guest.update((X << 12 | 16, 0xABCD)) == 0  # an ordinary page: plainly written
    assert guest.load(X, 2) == 0xABCD
    assert guest.read_only(Y) == 0
    assert guest.mmu.install_gdt(guest.host.vcpu, [Y], 10) == 0
    assert guest.update((Y << 12, 0)) == -XEN_EINVAL  # a descriptor table


def test_io_memory_of_the_domain_s_own_devices(guest: Guest) -> None:
    """It may be mapped, for oneself and for DOMID_IO, also by a table that becomes one; any other frame may not; counts come out."""
    guest.mmu.pages.io_frames.update((0xF0000, 0xF0001))
    at, va = guest.pte(X), guest.va(X)
    for domid in (xen.DOMID_SELF, xen.DOMID_IO):
        assert guest.update((at, 0xF0000 << 12 | KERNEL_RW), domid=domid) == 0
        assert guest.mmu.foreign_mappings(0xF0000) == 1
        guest.clean()
        assert guest.update((at, 0xF0001 << 12 | KERNEL_RW), domid=domid) == 0
        assert guest.mmu.foreign_mappings(0xF0000) == 0
        refused(guest, XEN_EPERM if MAX_MFN < 0xF0002 else XEN_EBUSY, at, 0xF0002 << 12 | KERNEL_RW, domid)
        assert guest.update((at, 0), domid=domid) == 0
    assert guest.mmu.update_va_mapping(va, 0xF0000 << 12 | KERNEL_RW, 0) == 0
    assert guest.mmu.update_va_mapping(va, 0, 0) == 0
    assert guest.mmu.foreign_mappings(0xF0000) == 0
    guest.clean()


def test_other_domains(guest: Guest) -> None:
    at, value = guest.pte(X), X << 12 | KERNEL_RO
    refused(guest, XEN_ESRCH, at, value, 5)  # oneself by number
    refused(guest, XEN_EPERM, at, value, 6)
    refused(guest, XEN_EPERM, at, value, xen.DOMID_XEN)
    refused(guest, XEN_ESRCH, at, value, xen.DOMID_INVALID)
    refused(guest, XEN_EPERM, at, value, 7 << 16 | xen.DOMID_SELF)
    refused(guest, XEN_EBUSY, at, Y << 12 | KERNEL_RO, xen.DOMID_IO)
    refused(guest, XEN_EPERM, at, MAX_MFN + 5 << 12 | KERNEL_RO, xen.DOMID_IO)
    assert guest.update((at, 0), domid=xen.DOMID_IO) == 0
    assert guest.update((at, value), domid=(xen.DOMID_SELF + 1) << 16 | xen.DOMID_SELF) == 0
    guest.clean()


def test_batch_stops_at_the_first_error_and_says_how_far_it_came(guest: Guest) -> None:
    pairs = [(guest.pte(X), 0), (guest.pte(Y), 0), (guest.pte(X), BASE - 1 << 12 | KERNEL_RO), (0, 0)]
    guest.mmu.write_virtual(guest.scratch, b"".join(struct.pack("<QQ", *p) for p in pairs))
    assert guest.mmu.mmu_update(guest.scratch, 4, guest.scratch + 256, xen.DOMID_SELF) == -XEN_EBUSY
    assert guest.mmu.read_virtual(guest.scratch + 256, 4) == b"\2\0\0\0"
    guest.clean()


def test_requests_that_run_into_an_unmapped_page(guest: Guest) -> None:
    """What can be read is carried out; then -EFAULT."""
    page = guest.va(BASE + 30)
    assert guest.update((guest.pte(BASE + 31), 0)) == 0
    start = page + 4096 - 40
    guest.mmu.write_virtual(start, struct.pack("<QQQQQ", guest.pte(X), 0, guest.pte(Y), 0, guest.pte(X)))
    assert guest.mmu.mmu_update(start, 3, guest.scratch, xen.DOMID_SELF) == -XEN_EFAULT
    assert guest.mmu.read_virtual(guest.scratch, 4) == b"\2\0\0\0"
    assert guest.load(guest.l1, 21) == 0
    assert guest.mmu.mmu_update(xen_area := 0xFFFF_8000_0000_0000, 1, 0, xen.DOMID_SELF) == -XEN_EFAULT
    assert guest.mmu.mmu_update(xen_area, 0, 0, xen.DOMID_SELF) == -XEN_EFAULT


def test_long_batch_is_preempted_and_goes_on() -> None:
    """More than BATCH requests: a continuation whose second part ends with the full count in *pdone."""
    guest = Guest(ram=512)
    total = BATCH + 3
    at = KERNEL + (100 << 12)
    for n in range(total):
        guest.mmu.write_virtual(at + n * 16, struct.pack("<QQ", guest.pte(X), X << 12 | KERNEL_RO))
    first = guest.mmu.mmu_update(at, total, guest.scratch, xen.DOMID_SELF)
    assert isinstance(first, Continuation)
    assert first.args == (at + BATCH * 16, 3 | PREEMPTED, guest.scratch, xen.DOMID_SELF)
    assert guest.mmu.mmu_update(*first.args) == 0
    assert int.from_bytes(guest.mmu.read_virtual(guest.scratch, 4), "little") == total
    guest.clean()


def test_machphys(guest: Guest) -> None:
    assert guest.update((X << 12 | xen.MMU_MACHPHYS_UPDATE, 77)) == 0
    assert guest.mmu.get_m2p(X) == 77
    assert guest.update((BASE - 1 << 12 | xen.MMU_MACHPHYS_UPDATE, 1)) == -XEN_EINVAL
    assert guest.mmu.get_m2p(BASE - 1) == (1 << 64) - 1


def test_update_va_mapping(guest: Guest) -> None:
    va = guest.va(X)
    assert guest.mmu.update_va_mapping(va, Y << 12 | KERNEL_RW, 0) == 0
    assert guest.host.flushes == 0
    assert guest.mmu.update_va_mapping(va, 0, xen.UVMF_INVLPG) == 0
    assert guest.host.flushes == 1
    assert guest.mmu.update_va_mapping(va, 0, xen.UVMF_TLB_FLUSH | xen.UVMF_ALL) == 0
    assert guest.host.flushes == 2
    guest.mmu.write_virtual(guest.scratch, b"\2")  # a mask without vCPU 0
    assert guest.mmu.update_va_mapping(va, 0, xen.UVMF_TLB_FLUSH | guest.scratch) == 0
    assert guest.host.flushes == 2
    assert guest.mmu.update_va_mapping(va, 0, xen.UVMF_TLB_FLUSH | 0x1000) == -XEN_EINVAL
    assert guest.mmu.update_va_mapping(0x1000, 0, 0) == -XEN_EINVAL
    assert guest.mmu.update_va_mapping(0xFFFF_8000_0000_0000, 0, 0) == -XEN_EINVAL
    assert guest.mmu.update_va_mapping(va, BASE - 1 << 12 | P, xen.UVMF_INVLPG) == -XEN_EBUSY
    assert guest.mmu.update_va_mapping_otherdomain(va, 0, 0, 9) == -XEN_EPERM
    assert guest.mmu.update_va_mapping_otherdomain(va, 0, 0, 5) == -XEN_ESRCH
    assert guest.mmu.update_va_mapping_otherdomain(va, 0, 0, xen.DOMID_IO) == -XEN_EPERM
    assert guest.mmu.update_va_mapping_otherdomain(va, 0, 0, xen.DOMID_SELF) == 0
    guest.clean()


def test_a_frame_becomes_a_table_only_after_a_flush(guest: Guest) -> None:
    """A writable translation may still be cached when its entry is gone: the flush comes with the new type."""
    assert guest.read_only(X) == 0
    assert guest.host.flushes == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == 0
    assert guest.host.flushes == 1
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, X) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == 0
    assert guest.host.flushes == 1
