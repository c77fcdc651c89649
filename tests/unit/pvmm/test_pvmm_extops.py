"""mmuext_op: every command, its errno, and what it does to counts, roots and the TLB."""

from __future__ import annotations

import struct

import pytest

from bus.abi import xen
from bus.abi.errno import XEN_EACCES, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EOPNOTSUPP, XEN_EPERM, XEN_ESRCH
from bus.addresses import DomId
from domains.pv.api import Continuation
from domains.pv.mm import Mmu
from domains.pv.mm.extops import BATCH
from tests.unit.pvmm.pvmm_support import BASE, KERNEL, KERNEL_RO, TABLE, Guest

X, Y, Z = BASE + 20, BASE + 21, BASE + 22


@pytest.fixture
def guest() -> Guest:
    return Guest()


def new_root(guest: Guest, mfn: int) -> None:
    """An L4 that shares the kernel's half, ready to be validated."""
    guest.store(mfn, KERNEL >> 39 & 511, guest.load(guest.l4, KERNEL >> 39 & 511))
    assert guest.read_only(mfn) == 0


def test_pin_rules(guest: Guest) -> None:
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == -XEN_EINVAL  # mapped writable
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, BASE - 1) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, X) == -XEN_EINVAL
    assert guest.read_only(X) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == -XEN_EINVAL  # twice
    assert guest.ext(xen.MMUEXT_PIN_L2_TABLE, X) == -XEN_EINVAL  # as something else
    guest.clean()
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, X) == 0
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, X) == -XEN_EINVAL
    assert guest.mmu.pages.typed[20] == 0
    guest.clean()


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_garbage_is_refused_whole(guest: Guest, level: int) -> None:
    """A table whose last entry is bad is refused, and everything that was counted before it is given back."""
    assert guest.read_only(X) == 0
    assert guest.read_only(Y) == 0
    before = list(guest.mmu.pages.typed), list(guest.mmu.pages.plain)
    for slot in range(250):
        guest.store(X, slot, Y << 12 | 0x25)
    guest.store(X, 511, BASE - 1 << 12 | TABLE)
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE + level - 1, X) < 0
    assert (guest.mmu.pages.typed, guest.mmu.pages.plain) == before
    guest.clean()


def test_baseptr_moves_references(guest: Guest) -> None:
    new_root(guest, X)
    assert guest.ext(xen.MMUEXT_NEW_BASEPTR, Y) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_NEW_BASEPTR, X) == 0
    assert guest.host.kernel == X
    assert guest.load(X, 256) == guest.xenmap.slots[0]
    assert guest.load(X, 260) == guest.xenmap.slots[4]
    guest.clean()
    loads = guest.host.loads
    assert guest.ext(xen.MMUEXT_NEW_BASEPTR, X) == 0
    assert guest.host.loads == loads + 1
    # Linux unpins the builder's table then: it is no table any more, but what it shared lives on.
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, guest.l4) == 0
    assert guest.mmu.pages.ptype[0] == 0
    guest.clean()
    assert guest.mmu.read_virtual(KERNEL, 8)


def test_user_baseptr(guest: Guest) -> None:
    assert guest.read_only(X) == 0
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, X) == 0
    assert guest.host.user == X
    assert guest.load(X, 256) == 0  # the M2P only shows in kernel roots
    guest.clean()
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, X) == 0
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, 0) == 0
    assert guest.host.user is None
    assert guest.mmu.pages.typed[20] == 0
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, Y) == -XEN_EINVAL
    guest.clean()


def test_strict_m2p(guest: Guest) -> None:
    guest.mmu.m2p_strict = True
    assert guest.read_only(X) == 0
    assert guest.ext(xen.MMUEXT_PIN_L4_TABLE, X) == 0
    assert guest.load(X, 256) == guest.xenmap.slots[0]
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, X) == 0
    assert guest.load(X, 256) == 0
    guest.clean()


@pytest.mark.parametrize(
    "command",
    [xen.MMUEXT_TLB_FLUSH_LOCAL, xen.MMUEXT_TLB_FLUSH_ALL, xen.MMUEXT_INVLPG_LOCAL, xen.MMUEXT_INVLPG_ALL],
)
def test_flushes(guest: Guest, command: int) -> None:
    assert guest.ext(command, KERNEL) == 0
    assert guest.host.flushes == 1


@pytest.mark.parametrize("command", [xen.MMUEXT_TLB_FLUSH_MULTI, xen.MMUEXT_INVLPG_MULTI])
def test_flush_by_mask(guest: Guest, command: int) -> None:
    mask = guest.va(Z)
    guest.mmu.write_virtual(mask, b"\2")
    assert guest.ext(command, KERNEL, mask) == 0
    assert guest.host.flushes == 0
    guest.mmu.write_virtual(mask, b"\1")
    assert guest.ext(command, KERNEL, mask) == 0
    assert guest.host.flushes == 1
    assert guest.ext(command, KERNEL, 0x5000) == -XEN_EINVAL


def test_one_flush_for_a_batch(guest: Guest) -> None:
    ops = struct.pack("<QQQ", xen.MMUEXT_INVLPG_LOCAL, KERNEL, 0) * 50
    guest.mmu.write_virtual(guest.scratch, ops)
    assert guest.mmu.mmuext_op(guest.scratch, 50, 0, xen.DOMID_SELF) == 0
    assert guest.host.flushes == 1


def test_single_pages_are_flushed_where_the_vcpu_can(guest: Guest) -> None:
    flushed: list[int] = []
    mmu = Mmu(guest.frames, guest.xenmap, guest.host, DomId(5), flush_page=flushed.append)
    assert mmu.adopt_initial_tables(guest.l4) == 0
    guest.mmu = mmu
    assert guest.ext(xen.MMUEXT_INVLPG_LOCAL, KERNEL) == 0
    assert mmu.update_va_mapping(guest.va(X), 0, xen.UVMF_INVLPG) == 0
    assert (flushed, guest.host.flushes) == ([KERNEL, guest.va(X)], 0)
    assert guest.ext(xen.MMUEXT_TLB_FLUSH_LOCAL) == 0
    assert (len(flushed), guest.host.flushes) == (2, 1)
    # A stale writable translation of another page survives a single-page flush: the new table forces a whole one.
    assert guest.read_only(Y) == 0
    assert guest.ext(xen.MMUEXT_INVLPG_ALL, KERNEL) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, Y) == 0
    assert (len(flushed), guest.host.flushes) == (3, 2)


def test_cache_flush_needs_hardware(guest: Guest) -> None:
    for command, errno in ((xen.MMUEXT_FLUSH_CACHE, XEN_EACCES), (xen.MMUEXT_FLUSH_CACHE_GLOBAL, XEN_EINVAL)):
        assert guest.ext(command) == -errno
        assert Guest(hardware=True).ext(command) == 0


def test_clear_and_copy(guest: Guest) -> None:
    guest.mmu.write_virtual(guest.va(X), b"abc")
    assert guest.ext(xen.MMUEXT_COPY_PAGE, Y, X) == 0
    assert guest.mmu.read_virtual(guest.va(Y), 3) == b"abc"
    assert guest.ext(xen.MMUEXT_CLEAR_PAGE, X) == 0
    assert guest.mmu.read_virtual(guest.va(X), 3) == bytes(3)
    assert guest.host.dropped == [Y, X]
    assert guest.ext(xen.MMUEXT_CLEAR_PAGE, guest.l1) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_COPY_PAGE, guest.l1, X) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_COPY_PAGE, X, BASE - 1) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_CLEAR_PAGE, BASE + 65) == -XEN_EINVAL
    guest.clean()


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (xen.MMUEXT_MARK_SUPER, XEN_EOPNOTSUPP),
        (xen.MMUEXT_UNMARK_SUPER, XEN_EOPNOTSUPP),
        (14, XEN_ENOSYS),
        (21, XEN_ENOSYS),
        (0xFFFF_FFFF, XEN_ENOSYS),
    ],
)
def test_what_there_is_not(guest: Guest, command: int, error: int) -> None:
    assert guest.ext(command) == -error


def test_domains_and_counts(guest: Guest) -> None:
    assert guest.ext(xen.MMUEXT_TLB_FLUSH_LOCAL, domid=6) == -XEN_EPERM
    assert guest.ext(xen.MMUEXT_TLB_FLUSH_LOCAL, domid=5) == -XEN_ESRCH
    assert guest.ext(xen.MMUEXT_TLB_FLUSH_LOCAL, domid=xen.DOMID_IO) == -XEN_EINVAL
    assert guest.mmu.mmuext_op(0x7000, 1, guest.scratch, xen.DOMID_SELF) == -XEN_EFAULT
    assert guest.mmu.mmuext_op(0, 1 << 31, 0, 3) == 3  # the end of a preempted call
    bad = struct.pack("<QQQ", xen.MMUEXT_TLB_FLUSH_LOCAL, 0, 0) + struct.pack("<QQQ", 99, 0, 0)
    guest.mmu.write_virtual(guest.scratch, bad)
    assert guest.mmu.mmuext_op(guest.scratch, 2, guest.scratch + 100, xen.DOMID_SELF) == -XEN_ENOSYS
    assert guest.mmu.read_virtual(guest.scratch + 100, 4) == b"\1\0\0\0"


def test_preemption() -> None:
    guest = Guest(ram=128)
    at = KERNEL + (64 << 12)
    guest.mmu.write_virtual(at, struct.pack("<QQQ", xen.MMUEXT_INVLPG_LOCAL, 0, 0) * (BATCH + 2))
    rest = guest.mmu.mmuext_op(at, BATCH + 2, guest.scratch, xen.DOMID_SELF)
    assert isinstance(rest, Continuation)
    assert guest.mmu.mmuext_op(*rest.args) == 0
    assert int.from_bytes(guest.mmu.read_virtual(guest.scratch, 4), "little") == BATCH + 2


def test_bad_initial_tables_are_refused() -> None:
    guest = Guest(adopt=False)
    guest.store(guest.l1, 1, guest.l3 << 12 | 3)
    assert guest.mmu.adopt_initial_tables(guest.l4) < 0
    guest.clean()
    assert guest.mmu.adopt_initial_tables(BASE - 1) == -XEN_EINVAL
    guest.store(guest.l1, 1, guest.l3 << 12 | KERNEL_RO)
    assert guest.mmu.adopt_initial_tables(guest.l4) == 0
    assert guest.mmu.pages.pinned[0]
    assert guest.mmu.pages.typed[0] == 2
    guest.clean()
    guest.mmu.drop_root(guest.l4)
    with pytest.raises(ValueError, match="no root"):
        guest.mmu.drop_root(guest.l4)
