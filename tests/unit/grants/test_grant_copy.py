"""Grant copies: who may, what is in bounds, sub-page and transitive entries, and frames that are on the move."""

from __future__ import annotations

import struct

import pytest

from bus.abi.grant_table import (
    GTF_permit_access,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    gnttab_copy,
    gnttab_copy_ptr,
    gnttab_set_version,
)
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId
from tests.unit.grants.grants_world import HOST, World

SOURCE, DEST = 1, 2


def copy(w: World, caller: int, *ops: gnttab_copy) -> list[int]:
    answers: list[gnttab_copy] = []
    w.grants.copy(w.now, DomId(caller), list(ops), answers.extend)
    w.pump()
    return [a.status for a in answers]


def op(source: tuple[int, int, int], dest: tuple[int, int, int], length: int, flags: int) -> gnttab_copy:
    """(u, domid, offset) twice."""
    return gnttab_copy(gnttab_copy_ptr(*source), gnttab_copy_ptr(*dest), length, flags, 99)


def v2(w: World, domain: int, ref: int, raw: bytes) -> None:
    table = w.table(domain)
    w.memory.write(table.shared[ref // 256], ref % 256 * 16, raw)


def version_2(w: World, domain: int) -> None:
    if not w.table(domain).shared:
        w.setup(domain)
    w.grants.ops.set_version(DomId(domain), gnttab_set_version(2))


def test_copy_from_and_to_a_grant() -> None:
    """Between the caller's own frame and a granted one, both ways, and from one grant to another."""
    w = World("pv", "pv")
    mine, other = w.doms[DomId(1)].ram[0], w.grant(2, 8, 1, 3)
    w.memory.write(other, 100, b"abcdef")
    assert copy(w, 1, op((8, 2, 100), (mine, DOMID_SELF, 0), 6, SOURCE)) == [0]
    assert w.memory.read(mine, 0, 6) == b"abcdef"
    assert copy(w, 1, op((mine, DOMID_SELF, 1), (8, 2, 4000), 3, DEST)) == [0]
    assert w.memory.read(other, 4000, 3) == b"bcd"
    assert (DomId(2), other) in w.written
    w.grant(2, 9, 1, 4)
    assert copy(w, 1, op((8, 2, 100), (9, 2, 0), 6, SOURCE | DEST)) == [0]
    assert copy(w, 1, op((8, 2, 100), (9, 2, 0), 0, SOURCE | DEST)) == [0]
    w.clean()


def test_refusals_move_nothing() -> None:
    """Every bad operation has Xen's status, and the good one behind it is carried out."""
    w = World("pv", "pv", "pv")
    mine, theirs = w.doms[DomId(1)].ram[0], w.grant(2, 8, 1, 3, readonly=True)
    w.grant(2, 9, 3, 4)
    w.memory.write(theirs, 0, b"x" * 4096)
    good = op((8, 2, 0), (mine, DOMID_SELF, 0), 4, SOURCE)
    cases = [
        (op((8, 2, 0), (mine, DOMID_SELF, 4093), 4, SOURCE), -10),
        (op((8, 2, 4095), (mine, DOMID_SELF, 0), 2, SOURCE), -10),
        (op((8, 2, 0xFFFF), (mine, DOMID_SELF, 0), 0xFFFF, SOURCE), -10),
        (op((mine, DOMID_SELF, 0), (8, 2, 0), 4, DEST), -1),  # read-only
        (op((9, 2, 0), (mine, DOMID_SELF, 0), 4, SOURCE), -1),  # granted to another
        (op((600, 2, 0), (mine, DOMID_SELF, 0), 4, SOURCE), -3),
        (op((8, 99, 0), (mine, DOMID_SELF, 0), 4, SOURCE), -2),
        (op((theirs, 2, 0), (mine, DOMID_SELF, 0), 4, 0), -8),  # another's frame by number
        (op((theirs, DOMID_SELF, 0), (mine, DOMID_SELF, 0), 4, 0), -9),
        (op((8, 2, 0), (theirs, DOMID_SELF, 0), 4, SOURCE), -9),
    ]
    for bad, status in cases:
        assert copy(w, 1, bad) == [status], bad
    assert w.memory.read(mine, 0, 8) == bytes(8)
    assert copy(w, 1, cases[0][0], good) == [-10, 0]
    w.clean()


def test_copies_by_a_translated_domain_use_its_own_frame_numbers() -> None:
    """gmfn is a gfn there; one that is not its own RAM is a bad page."""
    w = World("hvm", "hvm")
    w.grant(2, 8, 1, 3)
    w.memory.write(w.doms[DomId(2)].ram[3], 0, b"gfn3")
    assert copy(w, 1, op((8, 2, 0), (5, DOMID_SELF, 0), 4, SOURCE)) == [0]
    assert w.memory.read(w.doms[DomId(1)].ram[5], 0, 4) == b"gfn3"
    assert copy(w, 1, op((8, 2, 0), (500, DOMID_SELF, 0), 4, SOURCE)) == [-9]


def test_a_sub_page_entry_gives_its_bytes_only_and_no_mapping() -> None:
    """[page_off, page_off + length) may be copied, one byte more may not; a map is refused."""
    w = World("pv", "pv")
    version_2(w, 2)
    mine, other = w.doms[DomId(1)].ram[0], w.doms[DomId(2)].ram[3]
    w.memory.write(other, 0, bytes(range(256)))
    v2(w, 2, 8, struct.pack("<HHHHQ", GTF_permit_access | GTF_sub_page, 1, 16, 32, other))
    assert copy(w, 1, op((8, 2, 16), (mine, DOMID_SELF, 0), 32, SOURCE)) == [0]
    assert w.memory.read(mine, 0, 32) == bytes(range(16, 48))
    assert copy(w, 1, op((8, 2, 15), (mine, DOMID_SELF, 0), 4, SOURCE)) == [-1]
    assert copy(w, 1, op((8, 2, 16), (mine, DOMID_SELF, 0), 33, SOURCE)) == [-1]
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    w.clean()


def test_transitive_entries_reach_one_step_far() -> None:
    """2 passes on to 1 what 3 granted to 2; a second step, itself, a map, and more rights than given are refused."""
    w = World("pv", "pv", "pv")
    for domain in (2, 3):
        version_2(w, domain)
    mine, far = w.doms[DomId(1)].ram[0], w.doms[DomId(3)].ram[5]
    w.memory.write(far, 0, b"far away")
    v2(w, 3, 20, struct.pack("<HHIQ", GTF_permit_access | GTF_readonly, 2, 0, far))
    v2(w, 2, 8, struct.pack("<HHHHII", GTF_transitive, 1, 3, 0, 20, 0))
    assert copy(w, 1, op((8, 2, 0), (mine, DOMID_SELF, 0), 8, SOURCE)) == [0]
    assert w.memory.read(mine, 0, 8) == b"far away"
    assert copy(w, 1, op((mine, DOMID_SELF, 0), (8, 2, 0), 8, DEST)) == [-1]
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    v2(w, 3, 20, struct.pack("<HHHHII", GTF_transitive, 2, 1, 0, 8, 0))
    assert copy(w, 1, op((8, 2, 0), (mine, DOMID_SELF, 0), 8, SOURCE)) == [-1]
    v2(w, 2, 8, struct.pack("<HHHHII", GTF_transitive, 1, 2, 0, 8, 0))
    assert copy(w, 1, op((8, 2, 0), (mine, DOMID_SELF, 0), 8, SOURCE)) == [-1]
    v2(w, 2, 8, struct.pack("<HHHHII", GTF_transitive, 1, 88, 0, 8, 0))
    assert copy(w, 1, op((8, 2, 0), (mine, DOMID_SELF, 0), 8, SOURCE)) == [-1]


@pytest.mark.parametrize("home", [False, True])
def test_a_copy_waits_for_a_frame_on_the_move(home: bool) -> None:
    """Into a window or back: the copy is carried out where the content then is, and is not lost."""
    w = World("pv", "pv")
    mine, mfn = w.doms[DomId(1)].ram[0], w.grant(2, 8, 1, 3)
    w.memory.write(mine, 0, b"copied")
    answers: list[gnttab_copy] = []
    batch = [op((mine, DOMID_SELF, 0), (8, 2, 0), 6, DEST)]
    if home:
        (mapped,) = w.map(1, (2, 8, HOST, 0x1000))
        w.start_unmap(1, (mapped.handle, 0x1000, 0))
        w.step(DomId(1))
    else:
        w.start_map(1, (2, 8, HOST, 0x1000))
    w.grants.copy(0, DomId(1), batch, answers.extend)
    assert answers == []
    w.pump()
    assert answers[0].status == 0
    assert w.process(2).page(mfn)[:6] == b"copied"
    assert w.grants.check() == []


def test_a_copy_on_a_frame_of_a_silent_granter_is_refused() -> None:
    """It does not wait for a granter that missed its deadline."""
    w = World("pv", "pv")
    mine = w.doms[DomId(1)].ram[0]
    w.grant(2, 8, 1, 3)
    w.start_map(1, (2, 8, HOST, 0x1000))
    answers: list[gnttab_copy] = []
    w.grants.copy(0, DomId(1), [op((mine, DOMID_SELF, 0), (8, 2, 0), 6, DEST)], answers.extend)
    w.wait(1.1, 2)
    assert answers[0].status == -1
    assert copy(w, 1)[:] == []


def test_dma_waits_for_a_frame_on_the_move() -> None:
    """when_still runs at once for a frame at rest, later for one on its way, and says so if it never arrives."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    ran: list[bool] = []
    w.grants.when_still(0, {mfn}, DomId(1), ran.append)
    assert ran == [True]
    w.start_map(1, (2, 8, HOST, 0x1000))
    assert w.grants.moving(mfn)
    w.grants.when_still(0, {mfn}, DomId(1), lambda ok: ran.append(ok and not w.grants.moving(mfn)))
    assert ran == [True]
    w.pump()
    assert ran == [True, True]
    w.grant(2, 9, 1, 4)
    w.start_map(1, (2, 9, HOST, 0x1000))
    w.grants.when_still(0, {w.doms[DomId(2)].ram[4]}, DomId(1), ran.append)
    w.wait(1.1, 2)
    assert ran == [True, True, False]
