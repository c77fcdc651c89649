"""Descriptor tables: what may be installed, how it is fixed up, and that the pages stay safe."""

from __future__ import annotations

import struct

import pytest

from bus.abi import xen
from bus.abi.errno import XEN_EBUSY, XEN_EFAULT, XEN_EINVAL
from bus.addresses import VcpuId
from domains.pv.mm.segments import check_descriptor
from tests.unit.pvmm.pvmm_support import BASE, KERNEL_RO, KERNEL_RW, Guest

X, Y = BASE + 20, BASE + 21
CODE64 = 0x00AF_9B00_0000_FFFF
DATA = 0x00CF_9300_0000_FFFF


def gate(selector: int, dpl: int = 0, reserved: int = 0) -> int:
    """A present 64-bit call gate."""
    return 1 << 47 | dpl << 45 | 0xC << 40 | reserved << 32 | selector << 16 | 0x1234


@pytest.mark.parametrize(
    ("given", "installed"),
    [
        (0, 0),
        (0x0000_8200_0000_0000 & ~(1 << 47), 0x0000_0200_0000_0000),  # not present: anything
        (CODE64, CODE64 | 3 << 45),
        (DATA, DATA | 3 << 45),
        (DATA | 3 << 45, DATA | 3 << 45),
        (1 << 47, 1 << 47 | 3 << 45),  # type 0: upper half of a call gate
        (0x0000_8900_0000_0067, None),  # TSS
        (0x0000_8200_0000_0000, None),  # LDT
        (0x0000_8E00_0000_0000, None),  # interrupt gate
        (0x0000_8F00_0000_0000, None),  # trap gate
        (0x0000_8500_0000_0000, None),  # task gate
        (gate(0x10, 3), gate(0x13)),
        (gate(0xE033), gate(0xE033)),
        (gate(0xE023), None),  # another of Xen's segments
        (gate(0xE008), None),
        (gate(0xE00C), gate(0xE00F)),  # in the LDT
        (gate(0x10, 3, reserved=1), None),
    ],
)
def test_check_descriptor(given: int, installed: int | None) -> None:
    assert check_descriptor(given) == installed


@pytest.fixture
def guest() -> Guest:
    return Guest()


def gdt(guest: Guest, frames: list[int], entries: int) -> int:
    guest.mmu.write_virtual(guest.scratch, struct.pack(f"<{len(frames)}Q", *frames))
    return guest.mmu.set_gdt(guest.scratch, entries)


def test_set_gdt_maps_checked_pages_and_holds_them(guest: Guest) -> None:
    guest.store(X, 2, CODE64)
    assert gdt(guest, [X], 3) == -XEN_EINVAL  # mapped writable
    assert guest.read_only(X) == 0
    assert gdt(guest, [X], 3) == 0
    assert guest.load(X, 2) == CODE64 | 3 << 45
    assert guest.xenmap.area_pages(VcpuId(0))[0] == X
    assert guest.mmu.gdt_entries(VcpuId(0)) == 3
    assert guest.host.tables_changed == [0]
    assert guest.writable(X) == -XEN_EBUSY
    guest.clean()
    assert gdt(guest, [], 0) == 0
    assert guest.xenmap.area_pages(VcpuId(0))[0] != X
    assert guest.writable(X) == 0
    guest.clean()


def test_set_gdt_rules(guest: Guest) -> None:
    assert gdt(guest, [X] * 15, 7169) == -XEN_EINVAL
    assert guest.mmu.set_gdt(0x7000, 10) == -XEN_EFAULT
    assert gdt(guest, [BASE - 1], 10) == -XEN_EINVAL
    assert guest.read_only(X) == 0
    assert guest.read_only(Y) == 0
    guest.store(Y, 5, 0x0000_8900_0000_0067)
    assert gdt(guest, [X, Y], 600) == -XEN_EINVAL
    assert guest.mmu.pages.typed[20] == 0  # the first page was given back
    assert gdt(guest, [X, Y], 512) == 0  # one page is enough for 512
    guest.clean()


def test_xens_descriptors_are_in_every_gdt(guest: Guest) -> None:
    page = guest.xenmap.area_pages(VcpuId(1))[14]
    assert page is not None
    first = (page - guest.xenmap.private.base) << 9
    assert guest.xenmap.private.words[first + (0xE033 >> 3) - 7168] == 0x00AF_FB00_0000_FFFF


def test_update_descriptor(guest: Guest) -> None:
    at = X << 12 | 8
    assert guest.mmu.update_descriptor(at, DATA) == 0  # an ordinary page
    assert guest.load(X, 1) == DATA | 3 << 45
    assert guest.read_only(X) == 0
    assert gdt(guest, [X], 512) == 0
    assert guest.mmu.update_descriptor(at, CODE64) == 0
    assert guest.load(X, 1) == CODE64 | 3 << 45
    assert guest.mmu.update_descriptor(at + 4, CODE64) == -XEN_EINVAL
    assert guest.mmu.update_descriptor(at, 0x0000_8900_0000_0067) == -XEN_EINVAL
    assert guest.mmu.update_descriptor(guest.l1 << 12, DATA) == -XEN_EINVAL
    assert guest.mmu.update_descriptor(BASE - 1 << 12, DATA) == -XEN_EINVAL
    assert guest.load(X, 1) == CODE64 | 3 << 45
    guest.clean()


def test_ldt_pages_come_on_first_use_and_go_with_their_mapping(guest: Guest) -> None:
    va, area = guest.va(X), guest.mmu.ldt_base(VcpuId(0))
    guest.store(X, 1, DATA)
    assert guest.ext(xen.MMUEXT_SET_LDT, va + 8, 2) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_SET_LDT, 0xFFFF_8000_0000_0000, 2) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_SET_LDT, va, 8193) == -XEN_EINVAL
    assert guest.ext(xen.MMUEXT_SET_LDT, va, 2) == 0
    assert guest.mmu.ldt_entries(VcpuId(0)) == 2
    assert guest.mmu.ldt_fault(area + 8, VcpuId(0)) == va + 8  # mapped writable: no LDT page
    assert guest.read_only(X) == 0
    assert guest.mmu.ldt_fault(area + 8, VcpuId(0)) is True
    assert guest.load(X, 1) == DATA | 3 << 45
    assert guest.writable(X) == -XEN_EBUSY
    assert guest.mmu.ldt_fault(area + 16, VcpuId(0)) == va + 16  # beyond the limit
    assert guest.mmu.ldt_fault(area - 8, VcpuId(0)) is False
    guest.clean()
    assert guest.update((guest.pte(X), 0)) == 0  # the mapping goes: so does the LDT page
    assert guest.xenmap.area_pages(VcpuId(0))[16] is None
    assert guest.mmu.ldt_fault(area, VcpuId(0)) == va
    guest.clean()
    assert guest.update((guest.pte(X), X << 12 | KERNEL_RO)) == 0
    assert guest.mmu.ldt_fault(area, VcpuId(0)) is True
    guest.mmu.destroy_vcpu(VcpuId(0))
    assert guest.update((guest.pte(X), X << 12 | KERNEL_RW)) == 0
    guest.clean()
