"""HYPERVISOR_grant_table_op: grant entries of both versions, operations, status codes (grant_table.h).

Version 1 entries are 8 bytes, version 2 entries 16; GTF_* are their flags. GNTST_* are negative or zero, and
are returned in an operation's `status`, one an operation, not as the hypercall's return value.
"""

from typing import Final, NamedTuple

from bus.abi.layout import Layout, handle, i16, u16, u32, u64

GNTTAB_NR_RESERVED_ENTRIES: Final = 8
GNTTAB_RESERVED_CONSOLE: Final = 0
GNTTAB_RESERVED_XENSTORE: Final = 1

GTF_invalid: Final = 0
GTF_permit_access: Final = 1 << 0
GTF_accept_transfer: Final = 2
GTF_transitive: Final = 3
GTF_type_mask: Final = 3
GTF_readonly: Final = 4
GTF_reading: Final = 8
GTF_writing: Final = 16
GTF_PWT: Final = 32
GTF_PCD: Final = 64
GTF_PAT: Final = 128
GTF_sub_page: Final = 256
GTF_transfer_committed: Final = 4
GTF_transfer_completed: Final = 8

GNTTABOP_map_grant_ref: Final = 0
GNTTABOP_unmap_grant_ref: Final = 1
GNTTABOP_setup_table: Final = 2
GNTTABOP_dump_table: Final = 3
GNTTABOP_transfer: Final = 4
GNTTABOP_copy: Final = 5
GNTTABOP_query_size: Final = 6
GNTTABOP_unmap_and_replace: Final = 7
GNTTABOP_set_version: Final = 8
GNTTABOP_get_status_frames: Final = 9
GNTTABOP_get_version: Final = 10
GNTTABOP_swap_grant_ref: Final = 11
GNTTABOP_cache_flush: Final = 12

GNTCOPY_source_gref: Final = 1
GNTCOPY_dest_gref: Final = 2

GNTTAB_CACHE_CLEAN: Final = 1 << 0
GNTTAB_CACHE_INVAL: Final = 1 << 1
GNTTAB_CACHE_SOURCE_GREF: Final = 1 << 31

GNTMAP_device_map: Final = 1
GNTMAP_host_map: Final = 2
GNTMAP_readonly: Final = 4
GNTMAP_application_map: Final = 8
GNTMAP_contains_pte: Final = 16

_GNTMAP_guest_avail0: Final = 16

GNTMAP_guest_avail_mask: Final = 0xFFFF0000

GNTST_okay: Final = 0
GNTST_general_error: Final = -1
GNTST_bad_domain: Final = -2
GNTST_bad_gntref: Final = -3
GNTST_bad_handle: Final = -4
GNTST_bad_virt_addr: Final = -5
GNTST_bad_dev_addr: Final = -6
GNTST_no_device_space: Final = -7
GNTST_permission_denied: Final = -8
GNTST_bad_page: Final = -9
GNTST_bad_copy_arg: Final = -10
GNTST_address_too_big: Final = -11
GNTST_eagain: Final = -12
GNTST_no_space: Final = -13


class grant_entry_v1(NamedTuple):
    """Written by the granter; Xen sets GTF_reading and GTF_writing in `flags` while the frame is mapped.
    frame: gfn."""

    flags: u16
    domid: u16
    frame: u32


GRANT_ENTRY_V1: Final = Layout(grant_entry_v1)


class grant_entry_header(NamedTuple):
    """Common first part of the version 2 entries."""

    flags: u16
    domid: u16


GRANT_ENTRY_HEADER: Final = Layout(grant_entry_header)


class grant_entry_v2_full_page(NamedTuple):
    hdr: grant_entry_header
    pad0: u32
    frame: u64


GRANT_ENTRY_V2_FULL_PAGE: Final = Layout(
    grant_entry_v2_full_page, c="__typeof__(((union grant_entry_v2 *)0)->full_page)"
)


class grant_entry_v2_sub_page(NamedTuple):
    hdr: grant_entry_header
    page_off: u16
    length: u16
    frame: u64


GRANT_ENTRY_V2_SUB_PAGE: Final = Layout(
    grant_entry_v2_sub_page, c="__typeof__(((union grant_entry_v2 *)0)->sub_page)"
)


class grant_entry_v2_transitive(NamedTuple):
    hdr: grant_entry_header
    trans_domid: u16
    pad0: u16
    gref: u32


GRANT_ENTRY_V2_TRANSITIVE: Final = Layout(
    grant_entry_v2_transitive, c="__typeof__(((union grant_entry_v2 *)0)->transitive)"
)


class gnttab_map_grant_ref(NamedTuple):
    """In: host_addr (address, or machine address of a PTE with GNTMAP_contains_pte), flags GNTMAP_*, ref,
    dom. Out: status, handle, dev_bus_addr."""

    host_addr: u64
    flags: u32
    ref: u32
    dom: u16
    status: i16
    handle: u32
    dev_bus_addr: u64


GNTTAB_MAP_GRANT_REF: Final = Layout(gnttab_map_grant_ref)


class gnttab_unmap_grant_ref(NamedTuple):
    """In: host_addr, dev_bus_addr (0: ignore), handle. Out: status."""

    host_addr: u64
    dev_bus_addr: u64
    handle: u32
    status: i16


GNTTAB_UNMAP_GRANT_REF: Final = Layout(gnttab_unmap_grant_ref)


class gnttab_setup_table(NamedTuple):
    """In: dom, nr_frames, frame_list (of nr_frames frame numbers that Xen fills in). Out: status."""

    dom: u16
    nr_frames: u32
    status: i16
    frame_list: handle


GNTTAB_SETUP_TABLE: Final = Layout(gnttab_setup_table)


class gnttab_dump_table(NamedTuple):
    dom: u16
    status: i16


GNTTAB_DUMP_TABLE: Final = Layout(gnttab_dump_table)


class gnttab_transfer(NamedTuple):
    mfn: u64
    domid: u16
    ref: u32
    status: i16


GNTTAB_TRANSFER: Final = Layout(gnttab_transfer)


class gnttab_copy_ptr(NamedTuple):
    """`u` is a grant reference with GNTCOPY_*_gref, else a gfn. offset in bytes in the page."""

    u: u64
    domid: u16
    offset: u16


GNTTAB_COPY_PTR: Final = Layout(gnttab_copy_ptr)


class gnttab_copy(NamedTuple):
    """Copies `len` bytes within one page each. Out: status."""

    source: gnttab_copy_ptr
    dest: gnttab_copy_ptr
    len: u16
    flags: u16
    status: i16


GNTTAB_COPY: Final = Layout(gnttab_copy)


class gnttab_query_size(NamedTuple):
    """Out: nr_frames, max_nr_frames, status."""

    dom: u16
    nr_frames: u32
    max_nr_frames: u32
    status: i16


GNTTAB_QUERY_SIZE: Final = Layout(gnttab_query_size)


class gnttab_unmap_and_replace(NamedTuple):
    host_addr: u64
    new_addr: u64
    handle: u32
    status: i16


GNTTAB_UNMAP_AND_REPLACE: Final = Layout(gnttab_unmap_and_replace)


class gnttab_set_version(NamedTuple):
    version: u32


GNTTAB_SET_VERSION: Final = Layout(gnttab_set_version)


class gnttab_get_status_frames(NamedTuple):
    """As gnttab_setup_table, for the status array of version 2."""

    nr_frames: u32
    dom: u16
    status: i16
    frame_list: handle


GNTTAB_GET_STATUS_FRAMES: Final = Layout(gnttab_get_status_frames)


class gnttab_get_version(NamedTuple):
    dom: u16
    pad: u16
    version: u32


GNTTAB_GET_VERSION: Final = Layout(gnttab_get_version)


class gnttab_swap_grant_ref(NamedTuple):
    ref_a: u32
    ref_b: u32
    status: i16


GNTTAB_SWAP_GRANT_REF: Final = Layout(gnttab_swap_grant_ref)


class gnttab_cache_flush(NamedTuple):
    a: u64
    offset: u16
    length: u16
    op: u32


GNTTAB_CACHE_FLUSH: Final = Layout(gnttab_cache_flush)
