"""Guest-virtual addresses: page walks, and copies from and to guest memory as hypercalls make them."""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86_64 import HYPERVISOR_VIRT_END
from bus.addresses import PAGE_MASK, PAGE_SIZE, MachineAddr, Mfn
from domains.pv.api import GuestFault, PagingHost
from domains.pv.mm.bits import ACCESSED, ADDRESS_MASK, DIRTY, PFN_MASK
from domains.pv.mm.pages import PageTypes

MAX_WALKS: Final = 4096
"""Page walks (2 MiB each) that are remembered."""
MAX_COPY: Final = 1 << 24
"""Bytes of one copy: beyond any structure of the guest interface."""


def address_ok(va: int) -> bool:
    """A canonical address outside Xen's part (__addr_ok)."""
    return 0 <= va < 0x0000_8000_0000_0000 or HYPERVISOR_VIRT_END <= va <= 0xFFFF_FFFF_FFFF_FFFF


class GuestMemory:
    """Access by virtual address through the roots of the current vCPU."""

    def __init__(self, pages: PageTypes, host: PagingHost) -> None:
        self._pages = pages
        self._host = host
        self._words = pages.words
        self._octets = pages.octets
        self._first_byte = pages.base << 12
        self._size = pages.count << 12
        self._word_offset = pages.base << 9

        self._walks = pages.walks
        self._current_roots = host.current_roots

    def root(self, user: bool = False) -> Mfn | None:
        """Page-table root of the current vCPU's kernel (or user) mode."""
        kernel, user_root = self._host.current_roots()
        return user_root if user else kernel

    def l1_entry(self, va: int, root: int | None) -> tuple[int, int]:
        """(index of the word that is the L1 entry, AND of the upper entries' bits). GuestFault if the tables
        above do not lead to one, or `va` is not the guest's."""
        if root is None:
            raise GuestFault(va)
        # Bits 0..42 hold the VA's part that names an L1 table; a root's MFN has fewer than 28 bits.
        key = root << 43 | va >> 21
        found = self._walks.get(key)
        if found is None:
            found = self._walk(va, root)
            if len(self._walks) >= MAX_WALKS:
                self._walks.clear()
            self._walks[key] = found
        return found[0] + (va >> 12 & 511), found[1]

    def _walk(self, va: int, root: int) -> tuple[int, int]:
        """(index of the first word of the L1 table, AND of the upper entries' bits). GuestFault."""
        if not address_ok(va):
            raise GuestFault(va)
        words = self._words
        offset = self._word_offset
        try:
            e4 = words[(root << 9) - offset + (va >> 39 & 511)]
            if not e4 & 1:
                raise GuestFault(va)
            e3 = words[((e4 & ADDRESS_MASK) >> 3) - offset + (va >> 30 & 511)]
            if not e3 & 1:
                raise GuestFault(va)
            e2 = words[((e3 & ADDRESS_MASK) >> 3) - offset + (va >> 21 & 511)]
            if not e2 & 1:
                raise GuestFault(va)
        except IndexError:
            # Only a linear page table of the guest's leads here, through one of Xen's own entries.
            raise GuestFault(va) from None
        at = ((e2 & ADDRESS_MASK) >> 3) - offset
        if not 0 <= at < len(words):
            raise GuestFault(va)
        return at, e4 & e3 & e2

    def translate(self, va: int, *, write: bool = False, user: bool = False) -> MachineAddr:
        """Machine address of a byte; sets accessed (and dirty) as the processor would. GuestFault."""
        at, upper = self.l1_entry(va, self.root(user))
        entry = self._words[at]
        if not entry & 1:
            raise GuestFault(va, write=write)
        if write:
            if not entry & upper & 2:
                raise GuestFault(va, write=True, present=True)
            if entry & DIRTY == 0 or entry & ACCESSED == 0:
                self._words[at] = entry | ACCESSED | DIRTY
        elif not entry & ACCESSED:
            self._words[at] = entry | ACCESSED
        return MachineAddr(entry & ADDRESS_MASK | va & PAGE_MASK)

    def read(self, va: int, length: int, *, user: bool = False) -> bytes:
        """Copy from guest memory. GuestFault."""
        start = va & 4095
        if start + length <= 4096:
            root = self._current_roots()[1 if user else 0]
            if root is not None:
                # `translate`, in line: each hypercall's arguments come through here.
                found = self._walks.get(root << 43 | va >> 21)
                if found is not None:
                    entry = self._words[found[0] + (va >> 12 & 511)]
                    at = (entry & 0xF_FFFF_FFFF_F000) - self._first_byte + start
                    if entry & 0x21 == 0x21 and 0 <= at < self._size:
                        return bytes(self._octets[at : at + length])
            at = self.translate(va, user=user) - self._first_byte
            if 0 <= at < self._size:
                return bytes(self._octets[at : at + length])
        elif length > MAX_COPY:
            raise GuestFault(va)
        parts = []
        while length > 0:
            chunk = min(length, PAGE_SIZE - (va & PAGE_MASK))
            view = self._page(self.translate(va, user=user), va)
            start = va & PAGE_MASK
            parts.append(bytes(view[start : start + chunk]))
            va += chunk
            length -= chunk
        return b"".join(parts)

    def write(self, va: int, data: bytes | bytearray | memoryview, *, user: bool = False) -> None:
        """Copy to guest memory. GuestFault; what lies below the page that faults is written then, as on
        Xen."""
        start = va & PAGE_MASK
        length = len(data)
        if start + length <= PAGE_SIZE:
            at = self.translate(va, write=True, user=user) - self._first_byte
            if 0 <= at < self._size:
                self._octets[at : at + length] = data
                return
        elif length > MAX_COPY:
            raise GuestFault(va, write=True)
        done = 0
        while done < length:
            chunk = min(length - done, PAGE_SIZE - (va & PAGE_MASK))
            view = self._page(self.translate(va, write=True, user=user), va)
            start = va & PAGE_MASK
            if view.readonly:
                raise GuestFault(va, write=True, present=True)
            view[start : start + chunk] = data[done : done + chunk]
            va += chunk
            done += chunk

    def _page(self, machine: int, va: int) -> memoryview:
        """The page behind a translation: own, or granted. One that a revoked grant left behind faults."""
        page = self._pages.frames.page(Mfn(machine >> 12 & PFN_MASK))
        if page is None:
            raise GuestFault(va)
        return page
