"""HYPERVISOR_xen_version: which Xen this is, and its features for a 64-bit PV guest (version.h, features.h)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bus.abi import features, version
from bus.abi.arch_x86_64 import HYPERVISOR_VIRT_START
from bus.abi.errno import XEN_EINVAL, XEN_ENODATA, XEN_ENOSYS, XEN_EPERM
from bus.abi.xen import HYPERVISOR_xen_version, VMASST_TYPE_pae_extended_cr3
from bus.addresses import PAGE_SIZE
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu

DENIED: Final = b"<denied>"
"""What Xen shows an unprivileged domain of its command line."""
PV_FEATURES: Final = (
    1 << features.XENFEAT_mmu_pt_update_preserve_ad
    | 1 << features.XENFEAT_highmem_assist
    | 1 << features.XENFEAT_gnttab_map_avail_bits
    | 1 << features.XENFEAT_memory_op_vnode_supported
    | 1 << features.XENFEAT_direct_mapped
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What of it belongs to the machine or to the domain."""

    handle: bytes = bytes(16)
    """xen_domain_handle_t: the domain's UUID."""
    control: bool = False
    """The control domain: it may see the command line."""
    commandline: bytes = b""
    changeset: bytes = b"unavailable"
    compiler: bytes = b"Python"
    compile_by: bytes = b"domicile"
    compile_domain: bytes = b""
    compile_date: bytes = b""


class VersionCalls:
    """See the module."""

    def __init__(self, cpu: Cpu, identity: Identity) -> None:
        self._cpu = cpu
        self._identity = identity

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_xen_version: self.xen_version}

    def feature_word(self, index: int) -> int | None:
        """The 32-bit submap, or None if there is no such."""
        if index >= features.XENFEAT_NR_SUBMAPS:
            return None
        word = PV_FEATURES
        if self._cpu.assists >> VMASST_TYPE_pae_extended_cr3 & 1:
            word |= 1 << features.XENFEAT_pae_pgdir_above_4gb
        return word

    def xen_version(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for an unknown command; -EFAULT where the buffer cannot be written."""
        cmd &= LOW32
        if cmd == version.XENVER_version:
            return version.XEN_VERSION
        if cmd == version.XENVER_pagesize:
            return -XEN_EINVAL if arg else PAGE_SIZE
        if cmd == version.XENVER_get_features:
            return self._features(arg)
        if cmd == version.XENVER_build_id:
            return -XEN_ENODATA if self._identity.control else -XEN_EPERM
        content = self._content(cmd)
        if content is None:
            return -XEN_ENOSYS
        self._cpu.mmu.write_virtual(arg, content)
        return 0

    def _features(self, arg: int) -> int:
        layout = version.XEN_FEATURE_INFO
        request = layout.unpack(self._cpu.mmu.read_virtual(arg, layout.size))
        word = self.feature_word(request.submap_idx)
        if word is None:
            return -XEN_EINVAL
        self._cpu.mmu.write_virtual(arg, layout.pack(request._replace(submap=word)))
        return 0

    def _content(self, cmd: int) -> bytes | None:
        identity = self._identity
        if cmd == version.XENVER_extraversion:
            return _string(version.XEN_EXTRAVERSION, version.XEN_EXTRAVERSION_LEN)
        if cmd == version.XENVER_capabilities:
            return _string(version.XEN_CAPABILITIES, version.XEN_CAPABILITIES_INFO_LEN)
        if cmd == version.XENVER_changeset:
            return _string(identity.changeset, version.XEN_CHANGESET_INFO_LEN)
        if cmd == version.XENVER_platform_parameters:
            return version.XEN_PLATFORM_PARAMETERS.pack(
                version.xen_platform_parameters(HYPERVISOR_VIRT_START)
            )
        if cmd == version.XENVER_guest_handle:
            return identity.handle
        if cmd == version.XENVER_commandline:
            if not identity.control:
                return DENIED + b"\0"
            return _string(identity.commandline, version.XEN_COMMANDLINE_LEN)
        if cmd == version.XENVER_compile_info:
            return version.XEN_COMPILE_INFO.pack(
                version.xen_compile_info(
                    _string(identity.compiler, 64),
                    _string(identity.compile_by, 16),
                    _string(identity.compile_domain, 32),
                    _string(identity.compile_date, 32),
                )
            )
        return None


def _string(text: bytes, length: int) -> bytes:
    """Cut and padded with at least one NUL."""
    return text[: length - 1].ljust(length, b"\0")
