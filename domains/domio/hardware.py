"""DomIO's side of its hardware: the device's registers, its own memory for queues, and granted frames for DMA."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, DomId, GrantRef
from domains.native.domain import MAX_GRANT_BATCH, GrantError, GrantMapping, NativeDomain
from drivers.hw.nvme.driver_queue import Buffer

CONFIG: Final = -1
BAR0: Final = 0
COMMAND: Final = 4
CAPABILITIES: Final = 0x34
CAP_MSIX: Final = 0x11
MSI_ADDRESS: Final = 0xFEE00010
"""Remappable format of the interrupt address (VT-d, 5.1.2.2): the handle is in bits 19:5. Here a device's handles are the numbers
of its MSI-X entries: which of them means what is in the hypervisor's remapping table."""
FIRST_DMA_GFN: Final = 1 << 21
"""Guest frames from here on are where granted frames are entered in the I/O page tables."""


MAX_KEPT_PAGES: Final = 128
"""Pages of indirect descriptors of one frontend that stay mapped: more than its rings have slots. What is beyond is copied."""


class DmaPages:
    """Pages of DomIO's own memory, in rows; a guest frame's I/O virtual address is gfn << 12."""

    def __init__(self, host: NativeDomain, gfns: range) -> None:
        """`gfns`: the frames it may give out."""
        self._host = host
        self._free = list(gfns)

    def allocate(self, pages: int) -> Buffer:
        """Zeroed pages in a row. MemoryError if there are none."""
        for start in range(len(self._free) - pages + 1):
            first = self._free[start]
            if self._free[start + pages - 1] == first + pages - 1:
                view = self._host.pages(first, pages)
                del self._free[start : start + pages]
                view[:] = bytes(pages * PAGE_SIZE)
                return Buffer(view, first << PAGE_SHIFT)
        raise MemoryError(f"no {pages} pages in a row are left for the device")

    def free(self, buffer: Buffer) -> None:
        """The device does not use it any more."""
        first = buffer.iova >> PAGE_SHIFT
        self._free = sorted([*self._free, *range(first, first + len(buffer.view) // PAGE_SIZE)])


class NvmePort:
    """One controller's registers. `drivers.hw.nvme.driver.DevicePort`."""

    def __init__(self, host: NativeDomain, bdf: int) -> None:
        self._host = host
        self.bdf = bdf

    def config_read(self, offset: int, size: int) -> int:
        """Configuration space."""
        return self._host.device_read(self.bdf, CONFIG, offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Configuration space."""
        self._host.device_write(self.bdf, CONFIG, offset, size, value)

    def read(self, offset: int, size: int) -> int:
        """BAR 0."""
        return self._host.device_read(self.bdf, BAR0, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """BAR 0."""
        self._host.device_write(self.bdf, BAR0, offset, size, value)

    def doorbells(self, values: Sequence[tuple[int, int]], *, wake: bool = True) -> None:
        """Store each, then tell the device once, if `wake`."""
        self._host.ring_doorbells(self.bdf, BAR0, values, wake=wake)

    def unmask(self, vectors: int) -> bool:
        """Program the MSI-X table: entry n raises handle n. False if the device is not there, or has no MSI-X."""
        if self.config_read(0, 4) == 0xFFFFFFFF:
            return False
        self.config_write(COMMAND, 2, self.config_read(COMMAND, 2) | 2)
        at = self.config_read(CAPABILITIES, 1) & 0xFC
        for _ in range(48):
            if at < 0x40:
                return False
            head = self.config_read(at, 2)
            if head & 0xFF == CAP_MSIX:
                break
            at = head >> 8 & 0xFC
        table = self.config_read(at + 4, 4)
        if table & 7 > 5 or (table & ~7) + 16 * vectors > 1 << 32:
            return False  # no device of ours: it names a register where none can be
        for entry in range(vectors):
            base = (table & ~7) + 16 * entry
            self._host.device_write(self.bdf, table & 7, base, 8, MSI_ADDRESS | entry << 5)
            self._host.device_write(self.bdf, table & 7, base + 8, 8, 0)  # data 0, not masked
        return True


class FrontendFrames:
    """Granted frames of one frontend as the device reaches them. `drivers.block.ports.GrantMapper`."""

    def __init__(
        self, host: NativeDomain, domid: DomId, bounce_gfn: int, *, persistent: bool = False
    ) -> None:
        """`bounce_gfn`: an own page for copies of indirect descriptors. `persistent`: the frontend's grants stay, and pages of
        descriptors may stay mapped."""
        self._host = host
        self._domid = domid
        self._bounce = bounce_gfn
        self._keeps = MAX_KEPT_PAGES if persistent else 0
        self._handles: dict[int, int] = {}
        self._kept: dict[int, GrantMapping] = {}

    def map_frames(self, items: Sequence[tuple[int, bool]]) -> list[int]:
        """See GrantMapper: GNTTABOP_map_grant_ref with GNTMAP_device_map, in batches."""
        out: list[int] = []
        layout = gt.GNTTAB_MAP_GRANT_REF
        for start in range(0, len(items), MAX_GRANT_BATCH):
            batch = items[start : start + MAX_GRANT_BATCH]
            gfns = [self._host.take_dma_gfn() for _ in batch]
            request = b"".join(
                layout.pack(
                    gt.gnttab_map_grant_ref(
                        gfn << PAGE_SHIFT,
                        gt.GNTMAP_device_map | (0 if writable else gt.GNTMAP_readonly),
                        ref,
                        self._domid,
                        0,
                        0,
                        0,
                    )
                )
                for (ref, writable), gfn in zip(batch, gfns, strict=True)
            )
            reply = self._host.call(
                xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, request, "map_grant_ref"
            )
            for index, gfn in enumerate(gfns):
                answer = layout.unpack(reply, index * layout.size)
                if answer.status != gt.GNTST_okay:
                    self._host.give_dma_gfn(gfn)
                    out.append(answer.status)
                    continue
                self._handles[answer.dev_bus_addr] = answer.handle
                out.append(answer.dev_bus_addr)
        return out

    def unmap_frames(self, iovas: Sequence[int]) -> None:
        """See GrantMapper."""
        layout = gt.GNTTAB_UNMAP_GRANT_REF
        for start in range(0, len(iovas), MAX_GRANT_BATCH):
            batch = iovas[start : start + MAX_GRANT_BATCH]
            request = b"".join(
                layout.pack(gt.gnttab_unmap_grant_ref(0, iova, self._handles.pop(iova), 0)) for iova in batch
            )
            self._host.call(
                xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, request, "unmap_grant_ref"
            )
            for iova in batch:
                self._host.give_dma_gfn(iova >> PAGE_SHIFT)

    def unmap_all(self) -> None:
        """Everything that is still mapped."""
        self.unmap_frames(list(self._handles))
        kept, self._kept = self._kept, {}
        for mapping in kept.values():
            self._host.unmap_grants(mapping)

    def read_frames(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        """See GrantMapper: from pages that stay mapped, if the frontend's grants stay; else GNTTABOP_copy into a page of our own, as many
        at a time as have room there."""
        for ref, _ in items:
            if ref not in self._kept and len(self._kept) < self._keeps:
                with contextlib.suppress(GrantError):  # the copy says why
                    self._kept[ref] = self._host.map_grants(self._domid, [GrantRef(ref)], writable=False)
        kept = [self._kept.get(ref) for ref, _ in items]
        copies = iter(self._copies([item for item, found in zip(items, kept, strict=True) if found is None]))
        return [
            next(copies) if found is None else bytes(found.pages[0][:length])
            for (_, length), found in zip(items, kept, strict=True)
        ]

    def _copies(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        out: list[bytes | int] = []
        start = 0
        while start < len(items):
            stop, room = start, PAGE_SIZE
            while stop < len(items) and items[stop][1] <= room and stop - start < MAX_GRANT_BATCH:
                room -= items[stop][1]
                stop += 1
            out += self._copy(items[start:stop])
            start = stop
        return out

    def _copy(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        """One hypercall; together they fit a page."""
        layout, request, at = gt.GNTTAB_COPY, b"", 0
        for ref, length in items:
            item = layout.zero()._replace(
                source=gt.gnttab_copy_ptr(ref, self._domid, 0),
                dest=gt.gnttab_copy_ptr(self._bounce, xen.DOMID_SELF, at),
                len=length,
                flags=gt.GNTCOPY_source_gref,
            )
            request += layout.pack(item)
            at += length
        reply = self._host.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_copy, request, "grant copy")
        page = self._host.page(self._bounce)
        out: list[bytes | int] = []
        at = 0
        for index, (_, length) in enumerate(items):
            status = layout.unpack(reply, index * layout.size).status
            out.append(bytes(page[at : at + length]) if status == gt.GNTST_okay else status)
            at += length
        return out
