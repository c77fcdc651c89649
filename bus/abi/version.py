"""HYPERVISOR_xen_version: which Xen this is (version.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, u32, u64

XENVER_version: Final = 0
XENVER_extraversion: Final = 1
XENVER_compile_info: Final = 2
XENVER_capabilities: Final = 3
XENVER_changeset: Final = 4
XENVER_platform_parameters: Final = 5
XENVER_get_features: Final = 6
XENVER_pagesize: Final = 7
XENVER_guest_handle: Final = 8
XENVER_commandline: Final = 9
XENVER_build_id: Final = 10


class xen_compile_info(NamedTuple):
    compiler: Annotated[bytes, Bytes(64)]
    compile_by: Annotated[bytes, Bytes(16)]
    compile_domain: Annotated[bytes, Bytes(32)]
    compile_date: Annotated[bytes, Bytes(32)]


XEN_COMPILE_INFO: Final = Layout(xen_compile_info)


class xen_platform_parameters(NamedTuple):
    virt_start: u64


XEN_PLATFORM_PARAMETERS: Final = Layout(xen_platform_parameters)


class xen_feature_info(NamedTuple):
    submap_idx: u32
    submap: u32


XEN_FEATURE_INFO: Final = Layout(xen_feature_info)


XEN_EXTRAVERSION_LEN: Final = 16
XEN_CAPABILITIES_INFO_LEN: Final = 1024
XEN_CHANGESET_INFO_LEN: Final = 64
XEN_COMMANDLINE_LEN: Final = 1024

XEN_MAJOR: Final = 4
XEN_MINOR: Final = 17
XEN_VERSION: Final = XEN_MAJOR << 16 | XEN_MINOR
"""What XENVER_version returns: the interface that this package describes is that of Xen 4.17."""

XEN_EXTRAVERSION: Final = b".0-domicile"
XEN_CAPABILITIES: Final = b"xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 "
"""The kinds of guest that this Xen runs, each with a space behind it, as Xen has it."""

NOT_IN_HEADER: Final = (
    "XEN_COMMANDLINE_LEN",
    "XEN_MAJOR",
    "XEN_MINOR",
    "XEN_VERSION",
    "XEN_EXTRAVERSION",
    "XEN_CAPABILITIES",
)
