"""XEN_DOMCTL_getdomaininfo: a domain as the toolstack sees it."""

from __future__ import annotations

from bus.abi import domctl as abi
from bus.abi.arch_x86 import xen_arch_domainconfig
from hypervisor.core.domains import Domain, Dying, Kind
from hypervisor.core.frames import FrameTable

INVALID_MAX_VCPU_ID = 0xFFFFFFFF
INVALID_GFN = (1 << 64) - 1


class DomainInfo:
    """Reads the records of domains and frames."""

    def __init__(self, frames: FrameTable) -> None:
        self._frames = frames

    def _shared_info(self, domain: Domain) -> int:
        if domain.shared_info is None:
            return INVALID_GFN
        if domain.p2m is None:
            return domain.shared_info
        gfn = domain.p2m.gfn_of(domain.shared_info)
        return INVALID_GFN if gfn is None else gfn

    def describe(self, domain: Domain) -> abi.xen_domctl_getdomaininfo:
        """The structure; a shutdown code only of a domain that has shut down."""
        online = [vcpu for vcpu in domain.vcpus if vcpu.online]
        flags = 0
        for flag, holds in (
            (abi.XEN_DOMINF_dying, domain.dying is Dying.DEAD),
            (abi.XEN_DOMINF_hvm_guest, domain.kind is not Kind.PV),
            (abi.XEN_DOMINF_shutdown, domain.shut_down),
            (abi.XEN_DOMINF_paused, domain.controller_pause > 0),
            (abi.XEN_DOMINF_blocked, all(vcpu.blocked for vcpu in online)),
            (abi.XEN_DOMINF_running, any(vcpu.running for vcpu in online)),
            (abi.XEN_DOMINF_xs_domain, bool(domain.spec.flags & abi.XEN_DOMCTL_CDF_xs_domain)),
            (abi.XEN_DOMINF_hap, bool(domain.spec.flags & abi.XEN_DOMCTL_CDF_hap)),
        ):
            flags |= flag if holds else 0
        if domain.shut_down and domain.shutdown_code is not None:
            flags |= domain.shutdown_code << abi.XEN_DOMINF_shutdownshift
        return abi.xen_domctl_getdomaininfo(
            domain=domain.domid,
            pad1=0,
            flags=flags,
            tot_pages=self._frames.ram_pages(domain.domid),
            max_pages=domain.max_pages,
            outstanding_pages=self._frames.claimed(domain.domid),
            shr_pages=0,
            paged_pages=0,
            shared_info_frame=self._shared_info(domain),
            cpu_time=sum(vcpu.cpu_time for vcpu in domain.vcpus),
            nr_online_vcpus=len(online),
            max_vcpu_id=len(domain.vcpus) - 1 if domain.vcpus else INVALID_MAX_VCPU_ID,
            ssidref=domain.spec.ssidref,
            handle=domain.handle,
            cpupool=0,
            gpaddr_bits=48,
            pad2=bytes(7),
            arch_config=xen_arch_domainconfig(domain.spec.emulation_flags, domain.spec.misc_flags),
        )
