"""The invariant checker: all counts, recomputed from the tables themselves."""

from __future__ import annotations

from collections.abc import Iterable

from domains.pv.api import FRAME_NONE, FRAME_RAM, FRAME_XEN
from domains.pv.mm.bits import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    PFN_MASK,
    T_L1,
    T_L4,
    T_NONE,
    T_SEGDESC,
    T_UNOWNED,
    T_WRITABLE,
    TYPE_NAMES,
)
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.segments import check_descriptor
from domains.pv.xenmap import FIRST_XEN_SLOT, LAST_XEN_SLOT

MAX_LINES = 100
_AD = ACCESSED | DIRTY


def check_pages(
    pages: PageTypes,
    roots: Iterable[int],
    descriptor_frames: Iterable[int],
    holds: Iterable[tuple[int, bool]] = (),
) -> list[str]:
    """Compare every type, count and table with what the tables say.

    `roots`: frame indexes of the L4 tables that vCPUs hold, one for each reference; `descriptor_frames` the
    same for GDT and LDT pages; `holds`: (frame index, writable) of own frames that are granted and mapped.
    Each difference is one line; at most MAX_LINES of them.
    """
    lines: list[str] = []
    typed = [0] * pages.count
    plain = [0] * pages.count
    foreign: dict[int, int] = {}
    for index in roots:
        typed[index] += 1
        if pages.ptype[index] != T_L4:
            lines.append(f"root {pages.mfn(index):#x} is {TYPE_NAMES[pages.ptype[index]]}")
    for index in descriptor_frames:
        typed[index] += 1
        if pages.ptype[index] != T_SEGDESC:
            lines.append(f"descriptor page {pages.mfn(index):#x} is {TYPE_NAMES[pages.ptype[index]]}")
    for index, writable in holds:
        (typed if writable else plain)[index] += 1
        if writable and pages.ptype[index] != T_WRITABLE:
            lines.append(f"granted {pages.mfn(index):#x} is {TYPE_NAMES[pages.ptype[index]]}")
    for index in range(pages.count):
        kind = pages.ptype[index]
        if pages.frames.ownership[index] == FRAME_XEN:
            typed[index] += 1
        if pages.pinned[index]:
            typed[index] += 1
            if not T_L1 <= kind <= T_L4:
                lines.append(f"pinned {pages.mfn(index):#x} is {TYPE_NAMES[kind]}")
        if T_L1 <= kind <= T_L4:
            _count_table(pages, index, kind, typed, plain, foreign, lines)
        elif kind == T_SEGDESC:
            first = index << 9
            lines.extend(
                f"descriptor {slot} of {pages.mfn(index):#x}"
                for slot, value in enumerate(pages.words[first : first + 512].tolist())
                if value and check_descriptor(value) is None
            )
    for index in range(pages.count):
        _compare(pages, index, typed[index], plain[index], lines)
    if foreign != pages.foreign_maps:
        lines.append(f"foreign mappings: tables {foreign}, counted {pages.foreign_maps}")
    return lines[:MAX_LINES]


def _count_table(
    pages: PageTypes,
    index: int,
    kind: int,
    typed: list[int],
    plain: list[int],
    foreign: dict[int, int],
    lines: list[str],
) -> None:
    """Add what the entries of one table refer to."""
    first = index << 9
    for slot, entry in enumerate(pages.words[first : first + 512].tolist()):
        where = f"{TYPE_NAMES[kind]} {pages.mfn(index):#x}[{slot}] = {entry:#x}"
        if kind == T_L4 and FIRST_XEN_SLOT <= slot <= LAST_XEN_SLOT:
            # The processor may have set the accessed bit; the M2P is hidden in some tables.
            xen_value = pages.xen_slots[slot - FIRST_XEN_SLOT]
            if entry | _AD != xen_value | _AD and not (slot == FIRST_XEN_SLOT and entry == 0):
                lines.append(f"{where}: not Xen's")
            continue
        if not entry & 1:
            continue
        mfn = (entry & ADDRESS_MASK) >> 12 & PFN_MASK
        target = mfn - pages.base
        if not 0 <= target < pages.count:
            grant = pages.frames.foreign(pages.mfn(target))
            if kind != T_L1 or (mfn not in pages.foreign_maps and grant is None):
                lines.append(f"{where}: a frame out of reach")
            elif grant is not None and entry & 2 and not grant[1]:
                lines.append(f"{where}: writable mapping of a read-only grant")
            foreign[mfn] = foreign.get(mfn, 0) + 1
        elif pages.ptype[target] == T_UNOWNED:
            lines.append(f"{where}: a frame that is not owned")
        elif kind == T_L1:
            if entry & 2:
                typed[target] += 1
                if pages.ptype[target] != T_WRITABLE:
                    lines.append(f"{where}: writable mapping of {TYPE_NAMES[pages.ptype[target]]}")
            else:
                plain[target] += 1
        elif target == index:
            if entry & 2:
                lines.append(f"{where}: writable linear mapping")
        else:
            typed[target] += 1
            if pages.ptype[target] != kind - 1:
                lines.append(f"{where}: refers to {TYPE_NAMES[pages.ptype[target]]}")


def _compare(pages: PageTypes, index: int, typed: int, plain: int, lines: list[str]) -> None:
    """One frame's counters, type and owner."""
    mfn, kind = pages.mfn(index), pages.ptype[index]
    if typed != pages.typed[index]:
        lines.append(f"{mfn:#x} ({TYPE_NAMES[kind]}): {pages.typed[index]} typed, tables say {typed}")
    if plain != pages.plain[index]:
        lines.append(f"{mfn:#x} ({TYPE_NAMES[kind]}): {pages.plain[index]} plain, tables say {plain}")
    if (kind in (T_NONE, T_UNOWNED)) != (pages.typed[index] == 0):
        lines.append(f"{mfn:#x}: {TYPE_NAMES[kind]} with {pages.typed[index]} typed references")
    state = pages.frames.ownership[index]
    if (state == FRAME_NONE) != (kind == T_UNOWNED):
        lines.append(f"{mfn:#x}: {TYPE_NAMES[kind]}, but ownership {state}")
    if state != FRAME_RAM and pages.pinned[index]:
        lines.append(f"{mfn:#x}: pinned, but not RAM")
