"""The control domain's calls by name, as Xen's own libxenctrl has them (xc_domain_create and so on).

Each raises `HypercallError` with Xen's errno.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from struct import Struct
from typing import Any, Final

from bus.abi import domctl as dc
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import sched, sysctl, xen
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, vcpu_guest_context, xen_arch_domainconfig
from bus.abi.hvm import hvm_op
from bus.abi.layout import Layout
from bus.addresses import DomId, Mfn, VcpuId
from bus.messages.device import Plug
from domains.native.domain import HypercallError, NativeDomain

POPULATE_BATCH: Final = 512
"""Extents of one populate_physmap call."""
ORDER_2M: Final = 9
CONSOLE_CHUNK: Final = 16384
AFFINITY_BITS: Final = 64
"""Physical CPUs that a machine may have."""
E820: Final = Struct("<QQI")
E820_RAM: Final = 1
MAX_EVENT_CHANNELS: Final = 1023
"""The highest port of a guest: xl's default for max_event_channels."""
CONSOLE_MAX: Final = 1 << 20
"""Bytes after which the log is not read on: guests may write to it as fast as it is read."""
XEN_SCHEDULER_CREDIT2: Final = 6
"""sched_id of xen_domctl_scheduler_op (domctl.h)."""


class ControlInterface:
    """Hypercalls that only the control domain may make."""

    def __init__(self, host: NativeDomain) -> None:
        self._host = host

    # ------------------------------------------------------------------ domctl

    def _domctl(
        self, cmd: int, domid: int, layout: Layout[Any] | None = None, payload: Any = None, tail: bytes = b""
    ) -> bytes:
        """The reply's bytes: the structure, then arrays."""
        body = layout.pack(payload) if layout is not None else b""
        request = dc.XEN_DOMCTL.pack(
            dc.xen_domctl(cmd, dc.XEN_DOMCTL_INTERFACE_VERSION, domid, (0, 0, 0), body.ljust(128, b"\0"))
        )
        return self._host.call(xen.HYPERVISOR_domctl, cmd, request + tail, f"domctl {cmd} of domain {domid}")

    def create_domain(
        self,
        *,
        uuid: bytes,
        max_vcpus: int,
        flags: int = 0,
        max_grant_frames: int = -1,
        emulation_flags: int = 0,
        ssidref: int = 0,
        domid: int = 0,
    ) -> DomId:
        """XEN_DOMCTL_createdomain with this domid, or one of the hypervisor's choice. `ssidref` says which program its process runs: 0 a
        guest, 1 the native DomIO, 2 a device model, 3 NetIO (hypervisor.core.domains.ROLES)."""
        payload = dc.xen_domctl_createdomain(
            ssidref=ssidref,
            handle=uuid,
            flags=flags,
            iommu_opts=0,
            max_vcpus=max_vcpus,
            max_evtchn_port=0xFFFFFFFF if ssidref else MAX_EVENT_CHANNELS,
            max_grant_frames=max_grant_frames,
            max_maptrack_frames=-1,
            grant_opts=2,
            vmtrace_size=0,
            cpupool_id=0,
            arch=xen_arch_domainconfig(emulation_flags, 0),
        )
        reply = self._domctl(dc.XEN_DOMCTL_createdomain, domid, dc.XEN_DOMCTL_CREATEDOMAIN, payload)
        return DomId(dc.XEN_DOMCTL.unpack(reply).domain)

    def max_vcpus(self, domid: DomId, count: int) -> None:
        """XEN_DOMCTL_max_vcpus."""
        self._domctl(dc.XEN_DOMCTL_max_vcpus, domid, dc.XEN_DOMCTL_MAX_VCPUS, dc.xen_domctl_max_vcpus(count))

    def max_mem(self, domid: DomId, kib: int) -> None:
        """XEN_DOMCTL_max_mem: the most memory the domain may own, in KiB."""
        self._domctl(dc.XEN_DOMCTL_max_mem, domid, dc.XEN_DOMCTL_MAX_MEM, dc.xen_domctl_max_mem(kib))

    def set_time_offset(self, domid: DomId, seconds: int) -> None:
        """XEN_DOMCTL_settimeoffset: of the domain's time of day."""
        payload = dc.xen_domctl_settimeoffset(seconds)
        self._domctl(dc.XEN_DOMCTL_settimeoffset, domid, dc.XEN_DOMCTL_SETTIMEOFFSET, payload)

    def trigger(self, domid: DomId, trigger: int, vcpu: int) -> None:
        """XEN_DOMCTL_sendtrigger: one of XEN_DOMCTL_SENDTRIGGER_*."""
        payload = dc.xen_domctl_sendtrigger(trigger, vcpu)
        self._domctl(dc.XEN_DOMCTL_sendtrigger, domid, dc.XEN_DOMCTL_SENDTRIGGER, payload)

    def set_vcpu_context(self, domid: DomId, vcpu: VcpuId, context: vcpu_guest_context) -> None:
        """XEN_DOMCTL_setvcpucontext of a 64-bit PV vCPU."""
        self._domctl(
            dc.XEN_DOMCTL_setvcpucontext,
            domid,
            dc.XEN_DOMCTL_VCPUCONTEXT,
            dc.xen_domctl_vcpucontext(vcpu, 0),
            VCPU_GUEST_CONTEXT.pack(context),
        )

    def vcpu_context(self, domid: DomId, vcpu: int) -> vcpu_guest_context:
        """XEN_DOMCTL_getvcpucontext. HypercallError: ENODATA, it was never started; EINVAL, there is no such vCPU; EAGAIN, the domain's
        process does not answer."""
        payload = dc.xen_domctl_vcpucontext(vcpu, 0)
        reply = self._domctl(dc.XEN_DOMCTL_getvcpucontext, domid, dc.XEN_DOMCTL_VCPUCONTEXT, payload)
        return VCPU_GUEST_CONTEXT.unpack(reply, dc.XEN_DOMCTL.size)

    def pause(self, domid: DomId) -> None:
        """XEN_DOMCTL_pausedomain: returns when its vCPUs do not run."""
        self._domctl(dc.XEN_DOMCTL_pausedomain, domid)

    def unpause(self, domid: DomId) -> None:
        """XEN_DOMCTL_unpausedomain."""
        self._domctl(dc.XEN_DOMCTL_unpausedomain, domid)

    def resume(self, domid: DomId) -> None:
        """XEN_DOMCTL_resumedomain."""
        self._domctl(dc.XEN_DOMCTL_resumedomain, domid)

    def destroy(self, domid: DomId) -> None:
        """XEN_DOMCTL_destroydomain: everything that it owns is given back."""
        self._domctl(dc.XEN_DOMCTL_destroydomain, domid)

    def vcpu_info(self, domid: DomId, vcpu: int) -> dc.xen_domctl_getvcpuinfo:
        """XEN_DOMCTL_getvcpuinfo."""
        payload = dc.xen_domctl_getvcpuinfo(vcpu, 0, 0, 0, 0, 0)
        reply = self._domctl(dc.XEN_DOMCTL_getvcpuinfo, domid, dc.XEN_DOMCTL_GETVCPUINFO, payload)
        return dc.XEN_DOMCTL_GETVCPUINFO.unpack(dc.XEN_DOMCTL.unpack(reply).u)

    def domain_info(self, domid: DomId) -> dc.xen_domctl_getdomaininfo | None:
        """XEN_DOMCTL_getdomaininfo of this very domain; None if there is none."""
        try:
            reply = self._domctl(dc.XEN_DOMCTL_getdomaininfo, domid)
        except HypercallError:
            return None
        info = dc.XEN_DOMCTL_GETDOMAININFO.unpack(dc.XEN_DOMCTL.unpack(reply).u)
        return info if info.domain == domid else None

    def scheduler(self, domid: DomId, weight: int | None = None, cap: int | None = None) -> tuple[int, int]:
        """XEN_DOMCTL_scheduler_op for credit2: set what is given; (weight, cap) as they are then."""
        layout, params = dc.XEN_DOMCTL_SCHEDULER_OP, dc.XEN_DOMCTL_SCHED_CREDIT2

        def op(cmd: int, value: dc.xen_domctl_sched_credit2) -> dc.xen_domctl_sched_credit2:
            size = layout.field_size("u")
            payload = dc.xen_domctl_scheduler_op(
                XEN_SCHEDULER_CREDIT2, cmd, params.pack(value).ljust(size, b"\0")
            )
            reply = self._domctl(dc.XEN_DOMCTL_scheduler_op, domid, layout, payload)
            return params.unpack(layout.unpack(dc.XEN_DOMCTL.unpack(reply).u).u)

        now = op(dc.XEN_DOMCTL_SCHEDOP_getinfo, dc.xen_domctl_sched_credit2(0, 0))
        if weight is not None or cap is not None:
            new = dc.xen_domctl_sched_credit2(
                now.weight if weight is None else weight, now.cap if cap is None else cap
            )
            op(dc.XEN_DOMCTL_SCHEDOP_putinfo, new)
            now = op(dc.XEN_DOMCTL_SCHEDOP_getinfo, new)
        return now.weight, now.cap

    def affinity(
        self, domid: DomId, vcpu: int, hard: set[int] | None = None, soft: set[int] | None = None
    ) -> tuple[set[int], set[int]]:
        """XEN_DOMCTL_setvcpuaffinity of what is given, else _getvcpuaffinity: the (hard, soft) sets of CPUs in force.
        HypercallError(EINVAL): none of them is a CPU of this machine."""
        layout = dc.XEN_DOMCTL_VCPUAFFINITY
        setting = hard is not None or soft is not None
        flags = 0
        for wanted, flag in ((hard, dc.XEN_VCPUAFFINITY_HARD), (soft, dc.XEN_VCPUAFFINITY_SOFT)):
            if not setting or wanted is not None:
                flags |= flag
        maps = [
            dc.xenctl_bitmap(1, AFFINITY_BITS) if flags & flag else dc.xenctl_bitmap(0, 0)
            for flag in (dc.XEN_VCPUAFFINITY_HARD, dc.XEN_VCPUAFFINITY_SOFT)
        ]
        tail = b""
        if setting:
            tail = b"".join(_bitmap(wanted) for wanted in (hard, soft) if wanted is not None)
        cmd = dc.XEN_DOMCTL_setvcpuaffinity if setting else dc.XEN_DOMCTL_getvcpuaffinity
        reply = self._domctl(cmd, domid, layout, dc.xen_domctl_vcpuaffinity(vcpu, flags, *maps), tail)
        if setting:
            return self.affinity(domid, vcpu)
        rest, size = reply[dc.XEN_DOMCTL.size :], AFFINITY_BITS // 8
        return _cpus_of(rest[:size]), _cpus_of(rest[size : 2 * size])

    # ------------------------------------------------------------------ sysctl

    def _sysctl(self, cmd: int, layout: Layout[Any], payload: Any) -> bytes:
        size = sysctl.XEN_SYSCTL.field_size("u")
        request = sysctl.XEN_SYSCTL.pack(
            sysctl.xen_sysctl(
                cmd, sysctl.XEN_SYSCTL_INTERFACE_VERSION, layout.pack(payload).ljust(size, b"\0")
            )
        )
        return self._host.call(xen.HYPERVISOR_sysctl, cmd, request, f"sysctl {cmd}")

    def domain_list(self, limit: int = 256) -> list[dc.xen_domctl_getdomaininfo]:
        """XEN_SYSCTL_getdomaininfolist."""
        out: list[dc.xen_domctl_getdomaininfo] = []
        layout, item = sysctl.XEN_SYSCTL_GETDOMAININFOLIST, dc.XEN_DOMCTL_GETDOMAININFO
        first = 0
        while len(out) < limit:
            payload = sysctl.xen_sysctl_getdomaininfolist(first, min(64, limit - len(out)), 0, 0)
            reply = self._sysctl(sysctl.XEN_SYSCTL_getdomaininfolist, layout, payload)
            count = layout.unpack(sysctl.XEN_SYSCTL.unpack(reply).u).num_domains
            base = sysctl.XEN_SYSCTL.size
            out.extend(item.unpack(reply, base + index * item.size) for index in range(count))
            if count < 64:
                break
            first = out[-1].domain + 1
        return out

    def read_console(self, *, clear: bool = False) -> bytes:
        """XEN_SYSCTL_readconsole: the hypervisor's log ring."""
        out, index = b"", 0
        layout = sysctl.XEN_SYSCTL_READCONSOLE
        while True:
            payload = sysctl.xen_sysctl_readconsole(int(clear), 1, 0, 0, index, 0, CONSOLE_CHUNK)
            reply = self._sysctl(sysctl.XEN_SYSCTL_readconsole, layout, payload)
            answer = layout.unpack(sysctl.XEN_SYSCTL.unpack(reply).u)
            out += reply[sysctl.XEN_SYSCTL.size :][: answer.count_]
            if answer.count_ < CONSOLE_CHUNK or len(out) >= CONSOLE_MAX:
                return out
            index = answer.index_

    def debug_keys(self, keys: str) -> None:
        """XEN_SYSCTL_debug_keys: what they print is in the log then."""
        size = sysctl.XEN_SYSCTL.field_size("u")
        payload = sysctl.XEN_SYSCTL_DEBUG_KEYS.pack(sysctl.xen_sysctl_debug_keys(0, len(keys)))
        request = sysctl.XEN_SYSCTL.pack(
            sysctl.xen_sysctl(
                sysctl.XEN_SYSCTL_debug_keys, sysctl.XEN_SYSCTL_INTERFACE_VERSION, payload.ljust(size, b"\0")
            )
        )
        request += keys.encode("latin-1")
        self._host.call(xen.HYPERVISOR_sysctl, sysctl.XEN_SYSCTL_debug_keys, request, "debug_keys")

    def physinfo(self) -> sysctl.xen_sysctl_physinfo:
        """XEN_SYSCTL_physinfo."""
        layout = sysctl.XEN_SYSCTL_PHYSINFO
        size = sysctl.XEN_SYSCTL.field_size("u")
        request = sysctl.XEN_SYSCTL.pack(
            sysctl.xen_sysctl(sysctl.XEN_SYSCTL_physinfo, sysctl.XEN_SYSCTL_INTERFACE_VERSION, bytes(size))
        )
        reply = self._host.call(xen.HYPERVISOR_sysctl, sysctl.XEN_SYSCTL_physinfo, request, "physinfo")
        return layout.unpack(sysctl.XEN_SYSCTL.unpack(reply).u)

    # ------------------------------------------------------------------ others

    def set_memory_map(self, domid: DomId, entries: Sequence[tuple[int, int, int]]) -> None:
        """XENMEM_set_memory_map: what the domain gets from XENMEM_memory_map, as (address, bytes, E820 type)."""
        layout = mem.XEN_FOREIGN_MEMORY_MAP
        request = layout.pack(mem.xen_foreign_memory_map(domid, mem.xen_memory_map(len(entries), 1)))
        request += b"".join(E820.pack(*entry) for entry in entries)
        what = f"memory map of domain {domid}"
        self._host.call(xen.HYPERVISOR_memory_op, mem.XENMEM_set_memory_map, request, what)

    def populate(self, domid: DomId, frames: Sequence[int]) -> list[Mfn]:
        """XENMEM_populate_physmap of single frames at these guest frame numbers; their MFNs (PV) or gfns.

        Runs of whole 2 MiB are populated at once. HypercallError(ENOMEM) if memory is short."""
        out: list[Mfn] = []
        position = 0
        while position < len(frames):
            run = _run_length(frames, position)
            order = ORDER_2M if run >= 512 and frames[position] % 512 == 0 else 0
            unit = 1 << order
            count = min(POPULATE_BATCH, run // unit) if order else min(POPULATE_BATCH, run)
            starts = [frames[position] + index * unit for index in range(count)]
            request = mem.XEN_MEMORY_RESERVATION.pack(mem.xen_memory_reservation(0, count, order, 0, domid))
            request += struct.pack(f"<{count}Q", *starts)
            rc, reply = self._host.hypercall(xen.HYPERVISOR_memory_op, mem.XENMEM_populate_physmap, request)
            if rc != count:
                raise HypercallError(12 if rc >= 0 else -rc, f"populate_physmap of domain {domid}")
            base = mem.XEN_MEMORY_RESERVATION.size
            for mfn in struct.unpack_from(f"<{count}Q", reply, base):
                out += map(Mfn, range(mfn, mfn + unit))
            position += count * unit
        return out

    def set_hvm_param(self, domid: DomId, index: int, value: int) -> None:
        """HVMOP_set_param."""
        request = hvm_op.XEN_HVM_PARAM.pack(hvm_op.xen_hvm_param(domid, 0, index, value))
        self._host.call(xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_set_param, request, f"HVM parameter {index}")

    def grant_table_mfns(self, domid: DomId, count: int = 1) -> list[Mfn]:
        """XENMEM_acquire_resource: the first frames of a domain's grant table, for its builder."""
        layout = mem.XEN_MEM_ACQUIRE_RESOURCE
        request = layout.pack(
            layout.zero()._replace(
                domid=domid, type=mem.XENMEM_resource_grant_table, nr_frames=count, frame_list=1
            )
        )
        reply = self._host.call(
            xen.HYPERVISOR_memory_op, mem.XENMEM_acquire_resource, request, "acquire_resource"
        )
        tail = reply[layout.size :]
        return [Mfn(int.from_bytes(tail[8 * i : 8 * i + 8], "little")) for i in range(count)]

    def set_target(self, domid: DomId, target: DomId) -> None:
        """XEN_DOMCTL_set_target: a device model gets rights over its guest."""
        self._domctl(
            dc.XEN_DOMCTL_set_target, domid, dc.XEN_DOMCTL_SET_TARGET, dc.xen_domctl_set_target(target)
        )

    def assign_device(self, domid: DomId, bdf: int) -> None:
        """XEN_DOMCTL_assign_device: the device's DMA goes through the domain's I/O page tables from now on."""
        address = dc.XEN_DOMCTL_ASSIGN_DEVICE_PCI.pack(dc.xen_domctl_assign_device_pci(bdf))
        size = dc.XEN_DOMCTL_ASSIGN_DEVICE.field_size("u")
        payload = dc.xen_domctl_assign_device(0, 0, address.ljust(size, b"\0"))
        self._domctl(dc.XEN_DOMCTL_assign_device, domid, dc.XEN_DOMCTL_ASSIGN_DEVICE, payload)

    def plug(self, bdf: int, role: str, name: str, *, present: bool = True) -> None:
        """Plug a device in, or pull it out (bus.messages.device.Plug: below Xen's interface, as hardware is)."""
        link = self._host.link
        token = link.next_token()
        rc, _ = link.exchange(Plug(token=token, bdf=bdf, role=role, name=name, present=present), token)
        if rc < 0:
            raise HypercallError(-rc, f"device {bdf:#x}")

    def grant_table_frame(self, domid: DomId) -> int:
        """Frame number of the first grant table frame of a domain (GNTTABOP_setup_table)."""
        request = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(domid, 1, 0, 0))
        reply = self._host.call(
            xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, request, "setup_table"
        )
        status = gt.GNTTAB_SETUP_TABLE.unpack(reply).status
        if status != gt.GNTST_okay:
            raise HypercallError(12, f"setup_table of domain {domid}: grant status {status}")
        size = gt.GNTTAB_SETUP_TABLE.size
        return int.from_bytes(reply[size : size + 8], "little")

    def remote_shutdown(self, domid: DomId, reason: int) -> None:
        """SCHEDOP_remote_shutdown."""
        request = sched.SCHED_REMOTE_SHUTDOWN.pack(sched.sched_remote_shutdown(domid, reason))
        self._host.call(xen.HYPERVISOR_sched_op, sched.SCHEDOP_remote_shutdown, request, "remote_shutdown")


def _bitmap(cpus: set[int]) -> bytes:
    return sum(1 << cpu for cpu in cpus if cpu < AFFINITY_BITS).to_bytes(AFFINITY_BITS // 8, "little")


def _cpus_of(bitmap: bytes) -> set[int]:
    bits = int.from_bytes(bitmap, "little")
    return {cpu for cpu in range(AFFINITY_BITS) if bits >> cpu & 1}


def _run_length(frames: Sequence[int], position: int) -> int:
    """How many consecutive numbers start there."""
    if isinstance(frames, range) and frames.step == 1:
        return len(frames) - position
    first, count = frames[position], 1
    while position + count < len(frames) and frames[position + count] == first + count:
        count += 1
    return count
