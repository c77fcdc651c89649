"""Builds a PVH domain: memory by guest frame number, ACPI tables, start info, HVM parameters, grants of the special pages, and
the first vCPU state (HVM context).

A new domain's frames are taken from the start of its range in the order in which they are populated, and its builder has that
range's memfd: the frame of a gfn is known by counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import xen
from bus.abi.domctl import (
    XEN_DOMCTL,
    XEN_DOMCTL_HVMCONTEXT,
    XEN_DOMCTL_INTERFACE_VERSION,
    XEN_DOMCTL_sethvmcontext,
    xen_domctl,
    xen_domctl_hvmcontext,
)
from bus.abi.hvm import hvm_op, params, save
from bus.abi.hvm.start_info import XEN_HVM_MEMMAP_TYPE_ACPI
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, DomId, Port
from domains.dom0.builder.kernel import Kernel
from domains.dom0.builder.pvh import (
    CR0_START,
    MapEntry,
    Module,
    PvhBuildRequest,
    build_pvh,
    check_pvh,
    ram_ranges,
    special_pages,
)
from domains.dom0.toolstack import acpi
from domains.dom0.toolstack.images import ForeignMemory
from domains.dom0.xc import ControlInterface
from domains.native.domain import NativeDomain

CODE32, DATA32, TSS32 = 0xC9B, 0xC93, 0x8B
"""Segment attributes of the entry state (hvm/save.h, *_arbytes)."""
FLAT: Final = 0xFFFFFFFF
MAXMEM_SLACK_KIB: Final = 1024
"""LIBXL_MAXMEM_CONSTANT: a guest finds room for 256 frames more than it has."""
LARGE: Final = 512
"""Frames of the largest extent that is populated at once: a range that is aligned so is used without gaps."""


def acpi_pages(vcpus: int) -> range:
    """Guest frames of the ACPI tables."""
    first = acpi.ADDRESS >> PAGE_SHIFT
    size = len(acpi.build_acpi(vcpus, vcpus, pci=True))
    return range(first, first + -(-size // PAGE_SIZE))


def extra_pages(vcpus: int) -> int:
    """Frames that a domain needs besides its RAM."""
    return len(special_pages()) + len(acpi_pages(vcpus))


def slack_kib(vcpus: int, *, pv: bool) -> int:
    """What a domain may own beyond what its file says, KiB: libxl's constant, room for the special pages in it."""
    return MAXMEM_SLACK_KIB if pv else max(MAXMEM_SLACK_KIB, extra_pages(vcpus) << PAGE_SHIFT - 10)


class GuestFrames:
    """`GuestMemory` of the builder: gfns in the order in which they were populated."""

    def __init__(self, memory: ForeignMemory, runs: list[tuple[int, int]]) -> None:
        """`runs`: (first gfn, frames), as populated."""
        self._memory: Final = memory
        self._runs: list[tuple[int, int, int]] = []
        offset = 0
        for first, count in runs:
            self._runs.append((first, count, offset))
            offset += count

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        """Bytes at a guest frame, and the frames behind it. ValueError where there is no memory."""
        position, left = (pfn << PAGE_SHIFT) + offset, memoryview(data)
        for first, count, place in self._runs:
            if first <= position >> PAGE_SHIFT < first + count:
                start = position - (first << PAGE_SHIFT)
                if start + len(left) > count << PAGE_SHIFT:
                    break
                start += place << PAGE_SHIFT
                self._memory.view[start : start + len(left)] = left
                return
        raise ValueError(f"nothing is at guest frame {pfn:#x}")


@dataclass(frozen=True, slots=True)
class BuiltPvh:
    """What became of the image."""

    console_gfn: int
    xenstore_gfn: int


def build_pvh_domain(
    host: NativeDomain,
    xc: ControlInterface,
    domid: DomId,
    kernel: Kernel,
    modules: tuple[Module, ...],
    cmdline: str,
    pages: int,
    vcpus: tuple[int, int],
    xenstore_port: Port,
    console_port: Port,
    *,
    pci: bool = False,
) -> BuiltPvh:
    """Everything up to a domain that can be unpaused. `vcpus`: (most, at the start). `pci`: it has devices. BuildError, ValueError, HypercallError."""
    check_pvh(kernel)
    tables = acpi.build_acpi(*vcpus, pci=pci)
    table_pages = acpi_pages(vcpus[0])
    runs = [*((int(g), c) for g, c in ram_ranges(pages)), (table_pages.start, len(table_pages))]
    runs.append((int(special_pages()[0]), len(special_pages())))
    for first, count in runs:
        xc.populate(domid, range(first, first + count))
    fd, extent = host.foreign_extents[domid]
    if extent["base"] % LARGE:
        raise ValueError(f"its memory begins at frame {extent['base']:#x}: not at a multiple of 2 MiB")
    request = PvhBuildRequest(
        kernel=kernel,
        pages=pages,
        modules=modules,
        cmdline=cmdline.encode(),
        rsdp=acpi.ADDRESS,
        reserved=(MapEntry(acpi.ADDRESS, len(table_pages) << PAGE_SHIFT, XEN_HVM_MEMMAP_TYPE_ACPI),),
    )
    memory = ForeignMemory(fd, extent["base"], extent["frames"])
    try:
        frames = GuestFrames(memory, runs)
        built = build_pvh(request, frames)
        frames.write(table_pages.start, 0, tables)
        for gfn, content in built.special_writes:
            frames.write(gfn, 0, content)
        # The same map as in the start info.
        xc.set_memory_map(domid, [(entry.address, entry.size, entry.kind) for entry in built.memory_map])
        console = built.hvm_params[params.HVM_PARAM_CONSOLE_PFN]
        store = built.hvm_params[params.HVM_PARAM_STORE_PFN]
        grants = grant_frame(host, domid)
        for ref, ring in ((gt.GNTTAB_RESERVED_CONSOLE, console), (gt.GNTTAB_RESERVED_XENSTORE, store)):
            entry = gt.GRANT_ENTRY_V1.pack(gt.grant_entry_v1(gt.GTF_permit_access, DomId(0), ring))
            memory.write_mfn(grants, ref * gt.GRANT_ENTRY_V1.size, entry)
    finally:
        memory.close()
    values = dict(built.hvm_params)
    values[params.HVM_PARAM_STORE_EVTCHN] = xenstore_port
    values[params.HVM_PARAM_CONSOLE_EVTCHN] = console_port
    for index, value in values.items():
        _set_param(host, domid, index, value)
    set_context(host, domid, first_context(built.entry, built.ebx))
    return BuiltPvh(console, store)


def grant_frame(host: NativeDomain, domid: DomId) -> int:
    """Machine frame of the first page of the domain's grant table."""
    layout = mem.XEN_MEM_ACQUIRE_RESOURCE
    request = layout.pack(
        mem.xen_mem_acquire_resource(
            domid, mem.XENMEM_resource_grant_table, mem.XENMEM_resource_grant_table_id_shared, 1, 0, 0, 1
        )
    )
    reply = host.call(
        xen.HYPERVISOR_memory_op, mem.XENMEM_acquire_resource, request, f"grant table of domain {domid}"
    )
    return int.from_bytes(reply[layout.size : layout.size + 8], "little")


def _set_param(host: NativeDomain, domid: DomId, index: int, value: int) -> None:
    request = hvm_op.XEN_HVM_PARAM.pack(hvm_op.xen_hvm_param(domid, 0, index, value))
    host.call(
        xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_set_param, request, f"HVM parameter {index} of domain {domid}"
    )


def _record(kind: str, body: bytes) -> bytes:
    descriptor = save.hvm_save_descriptor(save.TYPECODES[kind], 0, len(body))
    return save.HVM_SAVE_DESCRIPTOR.pack(descriptor) + body


def first_context(entry: int, ebx: int) -> bytes:
    """HVM context of vCPU 0 at the PVH entry (arch-x86/hvm/start_info.h): flat 32-bit protected mode, EBX at the start info."""
    cpu = save.HVM_HW_CPU.zero()._replace(
        cr0=CR0_START,
        rip=entry,
        rbx=ebx,
        rflags=2,
        dr6=0xFFFF0FF0,
        dr7=0x400,
        cs_limit=FLAT, cs_arbytes=CODE32,
        ds_limit=FLAT, ds_arbytes=DATA32,
        es_limit=FLAT, es_arbytes=DATA32,
        fs_limit=FLAT, fs_arbytes=DATA32,
        gs_limit=FLAT, gs_arbytes=DATA32,
        ss_limit=FLAT, ss_arbytes=DATA32,
        tr_limit=0x67, tr_arbytes=TSS32,
    )  # fmt: skip
    return hvm_context(cpu)


def hvm_context(cpu: save.hvm_hw_cpu) -> bytes:
    """An HVM context with the state of vCPU 0."""
    header = save.hvm_save_header(save.HVM_FILE_MAGIC, save.HVM_FILE_VERSION, 0, 0, 0)
    return (
        _record("HEADER", save.HVM_SAVE_HEADER.pack(header))
        + _record("CPU", save.HVM_HW_CPU.pack(cpu))
        + _record("END", b"")
    )


def set_context(host: NativeDomain, domid: DomId, context: bytes) -> None:
    """XEN_DOMCTL_sethvmcontext. HypercallError."""
    payload = XEN_DOMCTL_HVMCONTEXT.pack(xen_domctl_hvmcontext(len(context), 1))
    request = XEN_DOMCTL.pack(
        xen_domctl(
            XEN_DOMCTL_sethvmcontext,
            XEN_DOMCTL_INTERFACE_VERSION,
            domid,
            (0, 0, 0),
            payload.ljust(128, b"\0"),
        )
    )
    host.call(
        xen.HYPERVISOR_domctl, XEN_DOMCTL_sethvmcontext, request + context, f"HVM context of domain {domid}"
    )
