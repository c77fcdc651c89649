"""Mapping and unmapping of grants: statuses, where frames live, and what each side sees of them."""

from __future__ import annotations

import struct

from bus.abi.grant_table import GNTMAP_device_map
from bus.addresses import DomId
from tests.unit.grants.grants_world import HOST, RO, World


def test_a_mapped_frame_is_shared_and_an_unmapped_one_is_private_again() -> None:
    """Content survives both moves; while mapped both sides see each other's writes; afterwards neither does."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    granter, mapper = w.process(2), w.process(1)
    granter.page(mfn)[:5] = b"hello"
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert (answer.status, answer.dev_bus_addr) == (0, mfn << 12)
    assert mapper.foreign(mfn)[:5] == b"hello"
    mapper.foreign(mfn)[:5] = b"there"
    assert granter.page(mfn)[:5] == b"there"
    assert w.memory.read(mfn, 0, 5) == b"there"
    assert w.flags(2, 8) == 0x18
    kept = mapper.windows[next(iter(mapper.descriptors))][0]
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    assert w.flags(2, 8) == 0
    assert granter.page(mfn)[:5] == b"there"
    granter.page(mfn)[:5] = b"later"
    assert kept[:5] != b"later"
    kept[:5] = b"never"
    assert granter.page(mfn)[:5] == w.memory.read(mfn, 0, 5) == b"later"
    w.clean()


def test_read_only_grants_pass_read_only_descriptors() -> None:
    """A read-only mapping never gets write access, and sets GTF_reading only."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3, readonly=True)
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    (answer,) = w.map(1, (2, 8, RO, 0x1000))
    assert answer.status == 0
    assert w.flags(2, 8) == 0x08
    assert set(w.process(1).descriptors.values()) == {False}
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    w.clean()


def test_refusals_are_xens() -> None:
    """Each cause has Xen's status, and none leaves a trace."""
    w = World("pv", "pv", "pv", maptrack=2)
    mfn = w.grant(2, 8, 1, 3)
    w.grant(2, 9, 3, 3)
    ring = w.process(2).page(w.table(2).shared[0])
    struct.pack_into("<HHI", ring, 10 * 8, 1, 1, w.doms[DomId(3)].ram[0])  # another domain's frame
    struct.pack_into("<HHI", ring, 11 * 8, 1, 1, 0xFFFFFF)  # no frame at all
    struct.pack_into("<HHI", ring, 12 * 8, 2, 1, mfn)  # not GTF_permit_access
    struct.pack_into("<HHI", ring, 13 * 8, 1, 1, w.table(2).shared[0])  # a Xen-heap frame
    cases = {
        (2, 8, 0): -3,
        (77, 8, HOST): -2,
        (0x7FF0, 8, HOST): -2,
        (2, 512, HOST): -3,
        (2, 9, HOST): -1,
        (2, 10, HOST): -9,
        (2, 11, HOST): -9,
        (2, 12, HOST): -1,
        (2, 13, HOST): -9,
    }
    for (dom, ref, flags), status in cases.items():
        assert w.map(1, (dom, ref, flags, 0x1000))[0].status == status, (dom, ref, flags)
    assert w.unmap(1, (0, 0x1000, 0)) == [-4]
    answers = w.map(1, (2, 8, HOST | GNTMAP_device_map, 0x1000), (2, 8, HOST, 0x2000), (2, 8, HOST, 0x3000))
    assert [a.status for a in answers] == [0, 0, -7]
    assert w.unmap(1, (answers[0].handle, 0x1000, 0x5000)) == [-1], "not the device mapping's address"
    assert w.unmap(1, (answers[0].handle, 0, answers[0].dev_bus_addr)) == [0]
    handles = [a.handle for a in answers[:2]]
    # Of a mapping for the CPU alone Xen does not look at the device address.
    assert w.unmap(1, (handles[0], 0x1000, 0), (handles[1], 0x2000, 0x5000)) == [0, 0]
    assert w.unmap(1, (handles[0], 0x1000, 0)) == [-4]
    w.clean()


def test_a_batch_of_one_granter_is_one_window_and_one_order() -> None:
    """A batch costs two orders, whatever its size; rights divide it into two windows."""
    w = World("pv", "pv")
    for index in range(8):
        w.grant(2, 8 + index, 1, index, readonly=index >= 5)
    ops = [(2, 8 + i, RO if i >= 5 else HOST, 0x1000 * (i + 1)) for i in range(8)]
    answers = w.map(1, *ops)
    assert [a.status for a in answers] == [0] * 8
    assert [o.kind for o in w.orders] == ["grant_map", "grant_attach"]
    assert sorted(w.orders[1].windows) == [(1, True), (2, False)]
    assert w.grants.window_count == 2
    w.unmap(1, *[(a.handle, 0x1000 * (i + 1), 0) for i, a in enumerate(answers)])
    assert [o.kind for o in w.orders[2:]] == ["grant_detach", "grant_unmap"]
    w.clean()


def test_several_mappings_share_a_frame_until_the_last_goes() -> None:
    """The second map of a frame moves nothing; only the last unmap brings it home and clears the flags."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 3)
    first, second = w.map(1, (2, 8, HOST, 0x1000)), w.map(1, (2, 9, HOST, 0x2000))
    assert [o.kind for o in w.orders].count("grant_map") == 2  # the second only sets flags
    assert w.orders[2].body["moves"] == []
    w.unmap(1, (first[0].handle, 0x1000, 0))
    assert mfn in w.memory.placed
    # The mapper may have kept its descriptor: entry 8 is in use until the frame leaves the window.
    assert w.flags(2, 8) == 0x18
    w.unmap(1, (second[0].handle, 0x2000, 0))
    assert (w.flags(2, 8), w.flags(2, 9)) == (0, 0)
    w.clean()


def test_a_second_grantee_gets_a_window_of_its_own_frame_only() -> None:
    """A frame alone in its window can be shared with another domain; one among others is refused to it."""
    w = World("pv", "pv", "pv")
    w.grant(2, 8, 1, 3)
    w.grant(2, 9, 3, 3)
    w.grant(2, 10, 1, 4)
    w.grant(2, 11, 1, 5)
    w.grant(2, 12, 3, 4)
    one = w.map(1, (2, 8, HOST, 0x1000))
    two = w.map(3, (2, 9, RO, 0x1000))
    assert (one[0].status, two[0].status) == (0, 0)
    batch = w.map(1, (2, 10, HOST, 0x2000), (2, 11, HOST, 0x3000))
    assert w.map(3, (2, 12, HOST, 0x4000))[0].status == -1
    assert w.process(3).descriptors == {1: False}
    assert w.unmap(3, (two[0].handle, 0x1000, 0)) == [0]
    assert w.flags(2, 9) == 0x08  # domain 3 may still read by its descriptor
    assert w.unmap(1, (one[0].handle, 0x1000, 0)) == [0]
    assert w.flags(2, 9) == 0
    w.unmap(1, (batch[0].handle, 0x2000, 0), (batch[1].handle, 0x3000, 0))
    w.clean()


def test_the_same_entry_twice_in_a_batch_of_both_rights() -> None:
    """Two operations on one frame share its window; the wider rights decide which."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    answers = w.map(1, (2, 8, RO, 0x1000), (2, 8, HOST, 0x2000))
    assert [a.status for a in answers] == [0, 0]
    assert w.grants.window_count == 1
    assert w.unmap(1, (answers[1].handle, 0x2000, 0), (answers[1].handle, 0x2000, 0)) == [0, -4]
    assert w.flags(2, 8) == 0x18
    assert w.unmap(1, (answers[0].handle, 0x1000, 0)) == [0]
    w.clean()


def test_a_domain_may_map_its_own_grant() -> None:
    """Nothing moves, but the entry is in use."""
    w = World("pv")
    mfn = w.grant(1, 8, 1, 3)
    (answer,) = w.map(1, (1, 8, HOST, 0x1000))
    assert answer.status == 0
    assert w.grants.window_count == 0
    w.process(1).foreign(mfn)[:2] = b"me"
    assert w.process(1).page(mfn)[:2] == b"me"
    assert w.flags(1, 8) == 0x18
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    assert w.flags(1, 8) == 0
    w.clean()


def test_an_entry_that_changed_meanwhile_is_not_mapped() -> None:
    """What was read is compared again by the granter's process, which alone writes the entry."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 4)
    answers = w.start_map(1, (2, 8, HOST, 0x1000), (2, 9, HOST, 0x2000))
    w.grant(2, 8, 1, 5)
    w.pump()
    assert [a.status for a in answers] == [-1, 0]
    assert (w.flags(2, 8), w.flags(2, 9)) == (0, 0x18)
    assert w.unmap(1, (answers[1].handle, 0x2000, 0)) == [0]
    w.clean()


def test_a_page_table_is_not_granted_for_writing() -> None:
    """The granter's process knows its page types and refuses; reading is no harm."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    w.process(2).page_tables.add(mfn)
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    (answer,) = w.map(1, (2, 8, RO, 0x1000))
    assert answer.status == 0
    w.unmap(1, (answer.handle, 0x1000, 0))
    w.clean()


def test_a_device_mapping_moves_nothing_and_enters_the_io_tables() -> None:
    """DomIO's way: a guest frame of its choice, its address in dev_bus_addr, gone from the tables at the unmap."""
    w = World("native", "pv")
    w.dma.tables[1] = {}
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, GNTMAP_device_map, 0x77000))
    assert (answer.status, answer.dev_bus_addr) == (0, 0x77000)
    assert w.dma.tables[1] == {0x77: (mfn, True)}
    assert w.grants.window_count == 0
    assert w.flags(2, 8) == 0x18
    assert [o.kind for o in w.orders] == ["grant_map"]
    assert w.map(1, (2, 8, GNTMAP_device_map, 0x77000))[0].status == -1  # that place is taken
    assert w.unmap(1, (answer.handle, 0, 0x78000)) == [-1]
    unmap = w.start_unmap(1, (answer.handle, 0, 0x77000))
    assert w.dma.tables[1] == {}  # at once, before the granter has heard of it
    w.pump()
    assert unmap[0].status == 0
    w.clean()


def test_halves_of_a_mapping_go_one_by_one() -> None:
    """A mapping for CPU and device is given back in two unmaps; the handle lives until the second."""
    w = World("native", "pv")
    w.dma.tables[1] = {}
    w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, GNTMAP_device_map | HOST, 0x77000))
    assert answer.status == 0
    assert w.doms[DomId(1)].p2m[0x77][1] == "rw"
    assert w.unmap(1, (answer.handle, 0x77000, 0)) == [0]
    assert 0x77 not in w.doms[DomId(1)].p2m
    assert w.grants.window_count == 0
    assert w.flags(2, 8) == 0x18
    assert w.unmap(1, (answer.handle, 0, 0x77000)) == [0]
    assert w.unmap(1, (answer.handle, 0, 0x77000)) == [-4]
    w.clean()


def test_a_pv_driver_domain_gets_io_entries_for_every_mapping() -> None:
    """One to one by machine frame, writable if any mapping is."""
    w = World("pv", "pv")
    w.dma.tables[1] = {}
    mfn = w.grant(2, 8, 1, 3)
    (ro,) = w.map(1, (2, 8, RO, 0x1000))
    assert w.dma.tables[1] == {mfn: (mfn, False)}
    (rw,) = w.map(1, (2, 8, HOST, 0x2000))
    assert w.dma.tables[1] == {mfn: (mfn, True)}
    w.unmap(1, (rw.handle, 0x2000, 0))
    assert w.dma.tables[1] == {mfn: (mfn, False)}
    w.unmap(1, (ro.handle, 0x1000, 0))
    assert w.dma.tables[1] == {}
    w.clean()


def test_an_attach_that_fails_is_undone() -> None:
    """A mapper that cannot write its page-table entry gets its status; the frame goes home."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    w.process(1).grant_attach = lambda body: [-5]
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -5
    assert w.flags(2, 8) == 0
    w.clean()


def test_a_detach_that_fails_keeps_the_mapping() -> None:
    """As Xen: the page-table entry shows another frame, so the mapping stays."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    process = w.process(1)
    process.grant_detach = lambda body: [-1]
    assert w.unmap(1, (answer.handle, 0x9000, 0)) == [-1]
    assert w.grants.check() == []
    del process.grant_detach
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    w.clean()


def test_two_domains_that_map_each_other_do_not_deadlock() -> None:
    """Both calls are under way at once, in both directions, and both end."""
    w = World("pv", "pv")
    w.grant(1, 8, 2, 3)
    w.grant(2, 8, 1, 3)
    left, right = w.start_map(1, (2, 8, HOST, 0x1000)), w.start_map(2, (1, 8, HOST, 0x1000))
    w.pump()
    assert (left[0].status, right[0].status) == (0, 0)
    gone = w.start_unmap(1, (left[0].handle, 0x1000, 0)), w.start_unmap(2, (right[0].handle, 0x1000, 0))
    w.pump()
    assert [a[0].status for a in gone] == [0, 0]
    w.clean()


def test_a_map_waits_for_the_unmap_before_it() -> None:
    """A frame on its way home can be mapped again as soon as it is there, with what was written in between."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    w.process(1).foreign(mfn)[:3] = b"one"
    unmap, again = w.start_unmap(1, (answer.handle, 0x1000, 0)), w.start_map(1, (2, 8, HOST, 0x2000))
    w.pump()
    assert (unmap[0].status, again[0].status) == (0, 0)
    assert w.process(1).foreign(mfn)[:3] == b"one"
    w.unmap(1, (again[0].handle, 0x2000, 0))
    w.clean()


def test_many_windows_travel_in_several_orders() -> None:
    """Each map of a single frame made a window; one batch that wants them all stays below a message's descriptors."""
    w = World("pv", "pv", "pv", ram=80)
    answers = []
    for index in range(70):
        w.grant(2, 8 + index, 1, index)
        w.grant(2, 100 + index, 3, index)
        answers += w.map(1, (2, 8 + index, HOST, 0x1000))
    before = len(w.orders)
    others = w.map(3, *[(2, 100 + index, RO, 0x1000 * (index + 1)) for index in range(70)])
    assert [a.status for a in others] == [0] * 70
    attach = [o for o in w.orders[before:] if o.kind == "grant_attach"]
    assert [len(o.windows) for o in attach] == [60, 10]
    w.unmap(3, *[(a.handle, 0x1000 * (index + 1), 0) for index, a in enumerate(others)])
    w.unmap(1, *[(a.handle, 0x1000, 0) for a in answers])
    w.clean()


def test_a_frame_whose_grant_was_withdrawn_is_never_seen() -> None:
    """It was copied into the batch's window before its entry was found changed: it leaves it, with its bytes, before the
    mapper gets the descriptor."""
    w = World("pv", "pv")
    granter, mapper = w.process(2), w.process(1)
    secret = w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 4)
    granter.page(secret)[:6] = b"secret"
    answers = w.start_map(1, (2, 8, HOST, 0x1000), (2, 9, HOST, 0x2000))
    w.grant(2, 8, 3, 3)
    w.pump()
    assert [a.status for a in answers] == [-1, 0]
    assert [o.kind for o in w.orders] == ["grant_map", "grant_unmap", "grant_attach"]
    assert all(bytes(page[:6]) != b"secret" for window in mapper.windows.values() for page in window)
    assert granter.page(secret)[:6] == b"secret"
    w.unmap(1, (answers[1].handle, 0x2000, 0))
    w.clean()


def test_write_access_is_given_only_where_writing_was_granted() -> None:
    """Of one frame a read-only mapping comes about and a writable one does not: either the descriptor is read-only, or
    the frame is in nobody's writable window."""
    w = World("native", "pv")
    w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 3)
    answers = w.map(1, (2, 9, RO, 0x70000), (2, 8, HOST, 0x70000))  # one place for both
    assert [a.status for a in answers] == [0, -1]
    assert w.process(1).descriptors == {1: False}
    w.unmap(1, (answers[0].handle, 0x70000, 0))
    w.clean()
    pending = w.start_map(1, (2, 9, RO, 0x71000), (2, 8, HOST, 0x72000), (2, 10, HOST, 0x73000))
    w.pump()
    assert [a.status for a in pending] == [0, 0, -1]
    w.unmap(1, (pending[0].handle, 0x71000, 0), (pending[1].handle, 0x72000, 0))
    w.grant(2, 10, 1, 4)
    pending = w.start_map(1, (2, 9, RO, 0x71000), (2, 8, HOST, 0x72000), (2, 10, HOST, 0x73000))
    w.grant(2, 8, 1, 5)  # withdrawn before the granter's process has looked
    w.pump()
    assert [a.status for a in pending] == [-1, -1, 0]
    assert w.flags(2, 9) == 0
    w.unmap(1, (pending[2].handle, 0x73000, 0))
    w.clean()
