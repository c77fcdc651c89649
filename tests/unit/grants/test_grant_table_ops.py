"""Size, versions, frames, swaps: what Xen answers, and what stays in the table."""

from __future__ import annotations

import errno
import struct

import pytest

from bus.abi.grant_table import (
    gnttab_cache_flush,
    gnttab_get_status_frames,
    gnttab_get_version,
    gnttab_query_size,
    gnttab_set_version,
    gnttab_setup_table,
    gnttab_swap_grant_ref,
    gnttab_transfer,
)
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId
from hypervisor.core.errors import XenError
from tests.unit.grants.grants_world import HOST, World

ONE, TWO = DomId(1), DomId(2)


def refused(call: object, *args: object) -> int:
    with pytest.raises(XenError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errno


def test_setup_grows_up_to_the_limit_and_is_idempotent() -> None:
    """Frames are zeroed, of the domain's Xen heap, and the same at each call; a status says what is too much."""
    w = World("pv", "pv")
    ops = w.grants.ops
    first = w.setup(2, 2)
    assert w.setup(2, 3)[:2] == first
    assert all(w.frames.owner(m) == TWO and not w.frames.is_ram_of(m, TWO) for m in first)
    assert ops.setup_table(TWO, gnttab_setup_table(DOMID_SELF, 65, 0, 0))[0].status == -1
    assert ops.query_size(TWO, gnttab_query_size(DOMID_SELF, 0, 0, 9))[1:] == (3, 64, 0)
    assert ops.setup_table(TWO, gnttab_setup_table(1, 1, 0, 0))[0].status == -8
    assert ops.setup_table(ONE, gnttab_setup_table(2, 1, 0, 0))[1] == first[:1]
    assert ops.query_size(TWO, gnttab_query_size(9, 0, 0, 9)).status == -2
    assert ops.query_size(TWO, gnttab_query_size(0x7FF1, 0, 0, 9)).status == -2


def test_the_map_space_grows_the_table() -> None:
    """XENMAPSPACE_grant_table and the acquired resource give the frames that setup_table lists."""
    w = World("hvm")
    ops = w.grants.ops
    third = ops.map_space_frame(ONE, 2)
    assert w.setup(1, 3)[2] == third
    assert refused(ops.map_space_frame, ONE, 64) == errno.EINVAL
    assert refused(ops.map_space_frame, ONE, 0x8000_0000) == errno.EINVAL
    ops.set_version(ONE, gnttab_set_version(2))
    assert ops.map_space_frame(ONE, 0x8000_0000) == w.table(ONE).status[0]
    assert ops.resource_frames(ONE, status=False, first=0, count=3)[2] == third


def test_versions() -> None:
    """A change wipes the table but for the first eight entries, which keep their meaning and bits both ways."""
    w = World("pv", "pv")
    ops = w.grants.ops
    w.grant(2, 1, 1, 3)
    w.grant(2, 9, 1, 4)
    (answer,) = w.map(1, (2, 1, HOST, 0x1000))
    assert ops.set_version(TWO, gnttab_set_version(2)).version == 2
    table = w.table(TWO)
    mfn = w.doms[TWO].ram[3]
    assert w.memory.read(table.shared[0], 16, 16) == struct.pack("<HHIQ", 1, 1, 0, mfn)
    assert w.memory.read(table.status[0], 2, 2) == b"\x18\0"
    assert w.memory.read(table.shared[0], 9 * 8, 8) == bytes(8)
    assert ops.get_version(TWO, gnttab_get_version(DOMID_SELF, 0, 0)).version == 2
    assert ops.get_status_frames(TWO, gnttab_get_status_frames(1, DOMID_SELF, 9, 0))[1] == [table.status[0]]
    assert ops.get_status_frames(TWO, gnttab_get_status_frames(2, DOMID_SELF, 9, 0))[0].status == -1
    assert ops.set_version(TWO, gnttab_set_version(1)).version == 1
    assert w.memory.read(table.shared[0], 8, 8) == struct.pack("<HHI", 1 | 0x18, 1, mfn)
    w.unmap(1, (answer.handle, 0x1000, 0))
    assert w.flags(2, 1) == 0
    w.clean()


def test_version_changes_are_refused_as_on_xen() -> None:
    """Unknown versions, entries in use, entries that version 1 cannot say, a domain limited to version 1."""
    w = World("pv", "pv")
    ops = w.grants.ops
    w.grant(2, 9, 1, 4)
    assert refused(ops.set_version, TWO, gnttab_set_version(3)) == errno.EINVAL
    assert refused(ops.set_version, TWO, gnttab_set_version(0)) == errno.EINVAL
    (answer,) = w.map(1, (2, 9, HOST, 0x1000))
    assert refused(ops.set_version, TWO, gnttab_set_version(2)) == errno.EBUSY
    w.unmap(1, (answer.handle, 0x1000, 0))
    ops.set_version(TWO, gnttab_set_version(2))
    w.memory.write(w.table(TWO).shared[0], 0, struct.pack("<HHIQ", 1, 1, 0, 1 << 40))
    assert refused(ops.set_version, TWO, gnttab_set_version(1)) == errno.ERANGE
    w.table(ONE).max_version = 1
    assert refused(ops.set_version, ONE, gnttab_set_version(2)) == errno.ENOSYS
    assert refused(ops.get_version, TWO, gnttab_get_version(1, 0, 0)) == errno.EPERM
    assert refused(ops.get_version, TWO, gnttab_get_version(50, 0, 0)) == errno.ESRCH


def test_version_2_grants_are_mapped_with_their_bits_in_the_status_word() -> None:
    """The header stays as the guest wrote it."""
    w = World("pv", "pv")
    w.setup(2)
    w.grants.ops.set_version(TWO, gnttab_set_version(2))
    table, mfn = w.table(TWO), w.doms[TWO].ram[3]
    raw = struct.pack("<HHIQ", 1, 1, 0, mfn)
    w.memory.write(table.shared[0], 200 * 16, raw)
    (answer,) = w.map(1, (2, 200, HOST, 0x1000))
    assert answer.status == 0
    assert w.memory.read(table.shared[0], 200 * 16, 16) == raw
    assert w.memory.read(table.status[0], 400, 2) == b"\x18\0"
    w.unmap(1, (answer.handle, 0x1000, 0))
    assert w.memory.read(table.status[0], 400, 2) == b"\0\0"
    w.clean()


def test_swap() -> None:
    """Entries change places unless one is in use."""
    w = World("pv", "pv")
    ops = w.grants.ops
    w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert ops.swap_grant_ref(TWO, gnttab_swap_grant_ref(8, 9, 9)).status == -12
    w.unmap(1, (answer.handle, 0x1000, 0))
    assert ops.swap_grant_ref(TWO, gnttab_swap_grant_ref(8, 9, 9)).status == 0
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    (answer,) = w.map(1, (2, 9, HOST, 0x1000))
    assert answer.status == 0
    assert ops.swap_grant_ref(TWO, gnttab_swap_grant_ref(8, 512, 9)).status == -3
    assert ops.swap_grant_ref(TWO, gnttab_swap_grant_ref(9, 9, 9)).status == 0
    w.unmap(1, (answer.handle, 0x1000, 0))
    w.clean()


def test_reserved_entries_are_seeded_by_the_builder() -> None:
    """Console and xenstore pages are granted before the domain runs."""
    w = World("hvm", "hvm")
    w.grants.ops.seed(TWO, 1, ONE, 6)
    (answer,) = w.map(1, (2, 1, HOST, 0x100000))
    assert answer.status == 0
    assert refused(w.grants.ops.seed, TWO, 1, ONE, 6) == errno.EBUSY
    assert refused(w.grants.ops.seed, TWO, 8, ONE, 6) == errno.EINVAL
    w.unmap(1, (answer.handle, 0x100000, 0))
    w.clean()


def test_transfer_is_refused_and_the_page_kept() -> None:
    """GNTST_bad_page is the refusal after which the page is still the caller's."""
    w = World("pv")
    assert w.grants.ops.transfer(gnttab_transfer(w.doms[ONE].ram[0], 1, 8, 0)).status == -9


def test_cache_flush_checks_what_xen_checks() -> None:
    """Own and mapped frames may be cleaned; nothing else."""
    w = World("pv", "pv")
    flush, own, other = w.grants.ops.cache_flush, w.doms[ONE].ram[0] << 12, w.grant(2, 8, 1, 3) << 12
    flush(ONE, gnttab_cache_flush(own, 0, 64, 1))
    flush(ONE, gnttab_cache_flush(other, 0, 0, 1))
    assert refused(flush, ONE, gnttab_cache_flush(own, 4095, 2, 1)) == errno.EINVAL
    assert refused(flush, ONE, gnttab_cache_flush(own, 0, 2, 1 << 31)) == errno.EINVAL
    assert refused(flush, ONE, gnttab_cache_flush(other, 0, 64, 1)) == errno.EINVAL
    assert refused(flush, ONE, gnttab_cache_flush(own, 0, 64, 2)) == errno.EOPNOTSUPP
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    flush(ONE, gnttab_cache_flush(other, 0, 64, 3))
    w.unmap(1, (answer.handle, 0x1000, 0))


def test_too_long_a_batch_is_refused() -> None:
    """A cap on every count."""
    w = World("pv", "pv")
    assert refused(w.start_map, 1, *[(2, 8, HOST, 0)] * 513) == errno.E2BIG
