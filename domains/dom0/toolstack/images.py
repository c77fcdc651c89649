"""From a kernel file to a domain's memory and first vCPU state (64-bit PV)."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from bus.abi.arch_x86 import (
    VCPU_GUEST_CONTEXT,
    VGCF_I387_VALID,
    VGCF_IN_KERNEL,
    VGCF_online,
    vcpu_guest_context,
    vcpu_guest_context_fpu_ctxt,
)
from bus.abi.grant_table import (
    GNTTAB_RESERVED_CONSOLE,
    GNTTAB_RESERVED_XENSTORE,
    GRANT_ENTRY_V1,
    GTF_permit_access,
    grant_entry_v1,
)
from bus.abi.xen import SIF_INITDOMAIN, SIF_PRIVILEGED
from bus.addresses import PAGE_SHIFT, DomId, Mfn, Port
from domains.dom0.builder.kernel import Kernel
from domains.dom0.builder.pv import PvBuildRequest, PvBuilt, build_pv

MAX_IMAGE = 1 << 30
"""Largest kernel or ramdisk file, in bytes."""


class ForeignMemory:
    """The memory of a domain that Dom0 builds, mapped for as long as that takes."""

    def __init__(self, fd: int, base: int, frames: int) -> None:
        """`fd` stays the caller's."""
        self.base = base
        self._mapping = mmap.mmap(fd, frames << PAGE_SHIFT)
        self.view = memoryview(self._mapping)

    def write_mfn(self, mfn: int, offset: int, data: bytes) -> None:
        """Store bytes in a machine frame (and those that follow)."""
        start = ((mfn - self.base) << PAGE_SHIFT) + offset
        self.view[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap."""
        self.view.release()
        self._mapping.close()


class _Target:
    """`GuestMemory` of the builder: frames are contiguous, so bytes go where they belong in one piece."""

    def __init__(self, memory: ForeignMemory, first: int) -> None:
        self._memory = memory
        self._offset = (first - memory.base) << PAGE_SHIFT

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        start = self._offset + (pfn << PAGE_SHIFT) + offset
        self._memory.view[start : start + len(data)] = data


def read_file(fd: int, what: str) -> bytes:
    """The whole file behind a descriptor. ValueError if it is too large or unreadable."""
    size = os.fstat(fd).st_size
    if size > MAX_IMAGE:
        raise ValueError(f"{what}: {size} bytes, at most {MAX_IMAGE}")
    data = bytearray(size)
    view, position = memoryview(data), 0
    while position < size:
        count = os.preadv(fd, [view[position:]], position)
        if not count:
            raise ValueError(f"{what}: ends after {position} of {size} bytes")
        position += count
    view.release()
    return bytes(data)


@dataclass(frozen=True, slots=True)
class BuiltDomain:
    """What became of the image."""

    context: vcpu_guest_context
    console_mfn: int
    xenstore_mfn: int
    supported: frozenset[str]


def build_pv_domain(
    memory: ForeignMemory,
    kernel: Kernel,
    ramdisk: bytes,
    cmdline: str,
    mfns: range,
    shared_info: Mfn,
    xenstore_port: Port,
    console_port: Port,
    grant_frame: int | None,
    dom0: DomId,
) -> BuiltDomain:
    """Write everything that the guest finds when it starts. `grant_frame`: of its grant table; None: that is filled, and in use. BuildError."""
    request = PvBuildRequest(
        kernel=kernel,
        p2m=mfns,
        shared_info=shared_info,
        xenstore_port=xenstore_port,
        console_port=console_port,
        ramdisk=ramdisk,
        cmdline=cmdline.encode(),
        flags=0,
    )
    assert not request.flags & (SIF_PRIVILEGED | SIF_INITDOMAIN)
    built = build_pv(request, _Target(memory, mfns.start))
    console, xenstore = mfns[built.console], mfns[built.xenstore]
    reserved = ((GNTTAB_RESERVED_CONSOLE, console), (GNTTAB_RESERVED_XENSTORE, xenstore))
    for ref, mfn in reserved if grant_frame is not None else ():
        entry = GRANT_ENTRY_V1.pack(grant_entry_v1(GTF_permit_access, dom0, mfn))
        assert grant_frame is not None
        memory.write_mfn(grant_frame, ref * GRANT_ENTRY_V1.size, entry)
    return BuiltDomain(first_context(built), console, xenstore, built.supported)


def first_context(built: PvBuilt) -> vcpu_guest_context:
    """vCPU 0's state as libxenguest hands it to XEN_DOMCTL_setvcpucontext."""
    empty = VCPU_GUEST_CONTEXT.unpack(bytes(VCPU_GUEST_CONTEXT.size))
    start = built.context
    regs = empty.user_regs._replace(
        rip=start.rip, rsp=start.rsp, rsi=start.rsi, rflags=start.rflags, cs=start.cs, ss=start.ss
    )
    controls = list(empty.ctrlreg)
    controls[3] = start.cr3 << PAGE_SHIFT
    fpu = bytearray(512)
    fpu[0:2] = (0x37F).to_bytes(2, "little")
    fpu[24:28] = (0x1F80).to_bytes(4, "little")
    return empty._replace(
        fpu_ctxt=vcpu_guest_context_fpu_ctxt(bytes(fpu)),
        flags=VGCF_I387_VALID | VGCF_IN_KERNEL | VGCF_online,
        user_regs=regs,
        ctrlreg=tuple(controls),
        kernel_ss=start.ss,
        kernel_sp=start.rsp,
    )
