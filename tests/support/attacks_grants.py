"""A granter and a grantee that keeps what it mapped: what each of them finds. Run by `tests.support.attacks`."""

from __future__ import annotations

import fcntl
import mmap
import os
from functools import partial

from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import PAGE_SIZE, Mfn
from tests.support.hostile import Hostile, outcome

GRANTED_REF = 100
"""The entry with which the granter grants its frame."""


def granter(h: Hostile) -> None:
    """Grants a frame to the next domain, writes secrets into it as the test tells it, and says what it finds there."""
    h.connect()
    h.started()
    assert h.memory is not None
    data = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(xen.DOMID_SELF, 1, 0, 0))
    _, reply = h.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, data)
    table = Mfn(int.from_bytes(reply[gt.GNTTAB_SETUP_TABLE.size :][:8], "little"))
    frame_ = Mfn(h.extent["base"] + 777)
    for ref, flags in (
        (GRANTED_REF, gt.GTF_permit_access),
        (GRANTED_REF + 1, gt.GTF_permit_access | gt.GTF_readonly),
    ):
        mfn = frame_ + (ref - GRANTED_REF)
        entry = gt.GRANT_ENTRY_V1.pack(gt.grant_entry_v1(flags, h.domid + 1, mfn))
        h.memory.page(table)[8 * ref : 8 * ref + 8] = entry
        h.memory.page(Mfn(mfn))[:16] = b"first secret    "
    h.say("granted")
    h.wait_stage(2)  # unmapped by the grantee
    flags_at_once = h.memory.page(table)[8 * GRANTED_REF]
    words = [h.memory.page(table)[8 * ref : 8 * ref + 1] for ref in (GRANTED_REF, GRANTED_REF + 1)]
    in_use = gt.GTF_reading | gt.GTF_writing
    h.serve(3.0, lambda: not any(word[0] & in_use for word in words))
    h.say("cleared", at_once=flags_at_once, orders=h.orders[-6:])
    for mfn in (frame_, frame_ + 1):
        h.memory.page(Mfn(mfn))[:16] = b"second secret   "
    flags_now = [
        bytes(h.memory.page(table)[8 * ref : 8 * ref + 2]).hex() for ref in (GRANTED_REF, GRANTED_REF + 1)
    ]
    h.say("written", flags=flags_now)
    h.wait_stage(4)  # the grantee wrote to what it kept
    found = [bytes(h.memory.page(Mfn(mfn))[:16]).decode("latin1") for mfn in (frame_, frame_ + 1)]
    h.say("found", frames=found)
    h.idle()


def grantee(h: Hostile) -> None:
    """Maps both frames of the domain before it, unmaps them, and keeps descriptors and mappings for good."""
    h.connect()
    h.started()
    maps = [
        gt.gnttab_map_grant_ref(PAGE_SIZE, gt.GNTMAP_host_map, GRANTED_REF, h.domid - 1, 0, 0, 0),
        gt.gnttab_map_grant_ref(
            PAGE_SIZE, gt.GNTMAP_host_map | gt.GNTMAP_readonly, GRANTED_REF + 1, h.domid - 1, 0, 0, 0
        ),
        gt.gnttab_map_grant_ref(PAGE_SIZE, gt.GNTMAP_host_map, GRANTED_REF + 1, h.domid - 1, 0, 0, 0),
    ]
    layout = gt.GNTTAB_MAP_GRANT_REF
    handles, statuses = [], []
    for each in maps:
        _, reply = h.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, layout.pack(each))
        answer = layout.unpack(reply)
        statuses.append(answer.status)
        handles.append(answer.handle)
    views, readable = [], []
    reopened: dict[str, str] = {}
    for window, fd in sorted(h.kept.items()):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        writable = flags & os.O_ACCMODE == os.O_RDWR
        if not writable:
            reopened[f"write through {window}"] = outcome(partial(os.pwrite, fd, b"evil", 0))
            reopened[f"map {window} writable"] = outcome(partial(mmap.mmap, fd, PAGE_SIZE))
            reopened[f"open {window} again"] = outcome(partial(os.open, f"/proc/self/fd/{fd}", os.O_RDWR))
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        size = os.fstat(fd).st_size
        view = mmap.mmap(fd, size, access=access)
        views.append((fd, view, writable, size))
        readable += [view[at : at + 16].decode("latin1") for at in range(0, size, PAGE_SIZE)]
    h.say("mapped", statuses=statuses, seen=readable, reopened=reopened)
    h.wait_stage(1)
    done = []
    for handle, status in zip(handles, statuses, strict=True):
        if status == gt.GNTST_okay:
            data = gt.GNTTAB_UNMAP_GRANT_REF.pack(gt.gnttab_unmap_grant_ref(PAGE_SIZE, 0, handle, 0))
            _, reply = h.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, data)
            done.append(gt.GNTTAB_UNMAP_GRANT_REF.unpack(reply).status)
    h.say("unmapped", statuses=done)
    h.wait_stage(3)  # the granter wrote again
    seen = []
    for fd, view, writable, size in views:
        seen += [view[at : at + 16].decode("latin1") for at in range(0, size, PAGE_SIZE)]
        seen += [os.pread(fd, 16, at).decode("latin1") for at in range(0, size, PAGE_SIZE)]
        if writable:
            for at in range(0, size, PAGE_SIZE):
                view[at : at + 16] = b"written by evil "
                os.pwrite(fd, b"written by evil ", at)
    h.say("kept", seen=seen)
    h.idle()
