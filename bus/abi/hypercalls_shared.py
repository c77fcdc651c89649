"""The table's part on memory, grants, events and scheduling: what one domain does with another or with the
machine."""

from __future__ import annotations

from typing import Any, Final

from bus.abi import errno, event_channel, grant_table, memory, sched, xen
from bus.abi.hypercalls_cpu import FAULT, local, refused
from bus.abi.hypercalls_model import (
    BLOCK_ARG,
    DOMID_ARG,
    ArrayArg,
    Command,
    Direction,
    Error,
    Form,
    Guests,
    Hypercall,
    Privilege,
    State,
    Where,
)
from bus.abi.layout import Layout

MAX_EXTENTS: Final = 4096
"""Most extents, frames or entries of one array in one message; the domain's process splits longer lists."""
MAX_PAIRS: Final = 3072
"""The same where two arrays travel in one message."""
MAX_E820: Final = 128

NO_DOMAIN: Final = Error(errno.XEN_ESRCH, "no such domain")
NOT_ALLOWED: Final = Error(errno.XEN_EPERM, "the target is another domain and the caller has no right to it")


def remote(number: int, name: str, argument: Layout[Any] | None, *errors: Error, **more: Any) -> Command:
    """A command that the hypervisor serves; its wire form is one structure unless `form` says otherwise."""
    more.setdefault("form", Form.STRUCT if argument is not None else Form.NONE)
    if argument is not None and FAULT not in errors:
        errors = (*errors, FAULT)
    return Command(number=number, name=name, where=Where.HYPERVISOR, argument=argument, errors=errors, **more)


def frames(handle: str, count: str, direction: Direction, limit: int = MAX_EXTENTS) -> ArrayArg:
    """An array of frame numbers (64 bits each)."""
    return ArrayArg(handle, 8, count, direction, limit)


# ------------------------------------------------------------------------------------------------ memory_op

_RESERVATION: Final = (frames("extent_start", "nr_extents", Direction.BOTH),)
_RESERVATION_NOTE: Final = (
    "Returns the number of extents done, which is less than asked for where one fails. On the wire the array goes "
    "both ways"
)


def _reservation(number: int, name: str, note: str) -> Command:
    return remote(
        number,
        name,
        memory.XEN_MEMORY_RESERVATION,
        NO_DOMAIN,
        arrays=_RESERVATION,
        privilege=Privilege.TARGET,
        note=f"{note}. {_RESERVATION_NOTE}. A guest gets no errno, but 0 for what is refused as a whole: an argument that"
        " cannot be read, another domain, an order over 9",
    )


_MEMORY: Final = (
    _reservation(
        memory.XENMEM_increase_reservation, "XENMEM_increase_reservation", "new frames, not in the p2m"
    ),
    _reservation(memory.XENMEM_decrease_reservation, "XENMEM_decrease_reservation", "give frames back"),
    _reservation(memory.XENMEM_populate_physmap, "XENMEM_populate_physmap", "new frames at the named gfns"),
    remote(
        memory.XENMEM_maximum_ram_page,
        "XENMEM_maximum_ram_page",
        None,
        note="returns the highest machine frame number",
    ),
    *(
        remote(number, name, DOMID_ARG, NO_DOMAIN, privilege=Privilege.TARGET, note=note)
        for number, name, note in (
            (memory.XENMEM_current_reservation, "XENMEM_current_reservation", "returns pages owned"),
            (memory.XENMEM_maximum_reservation, "XENMEM_maximum_reservation", "returns pages allowed"),
            (memory.XENMEM_maximum_gpfn, "XENMEM_maximum_gpfn", "returns the highest gfn in use"),
        )
    ),
    local(
        memory.XENMEM_machphys_mfn_list,
        "XENMEM_machphys_mfn_list",
        FAULT,
        argument=memory.XEN_MACHPHYS_MFN_LIST,
        guests=Guests.PV,
        note="frames of the machine-to-physical table that the domain's process shows its guest",
    ),
    refused(
        memory.XENMEM_machphys_compat_mfn_list,
        "XENMEM_machphys_compat_mfn_list",
        errno.XEN_EOPNOTSUPP,
        "no 32-bit PV guests",
        guests=Guests.PV,
    ),
    remote(
        memory.XENMEM_add_to_physmap,
        "XENMEM_add_to_physmap",
        memory.XEN_ADD_TO_PHYSMAP,
        NO_DOMAIN,
        NOT_ALLOWED,
        Error(
            errno.XEN_E2BIG, "a gmfn_range of more than 1024 frames (the control domain has no such limit)"
        ),
        Error(errno.XEN_EINVAL, "index beyond what the space has"),
        Error(errno.XEN_ENOSYS, "unknown space"),
        Error(errno.XEN_EACCES, "the domain is not auto-translated"),
        privilege=Privilege.TARGET,
        state=State.PARTLY,
        note="shared_info, grant_table (with the bit for status frames), gmfn, gmfn_range; gmfn_foreign by batch",
    ),
    remote(
        memory.XENMEM_add_to_physmap_batch,
        "XENMEM_add_to_physmap_batch",
        memory.XEN_ADD_TO_PHYSMAP_BATCH,
        NO_DOMAIN,
        NOT_ALLOWED,
        Error(errno.XEN_ENOSYS, "space gmfn_range"),
        arrays=(
            frames("idxs", "size", Direction.IN, MAX_PAIRS),
            frames("gpfns", "size", Direction.IN, MAX_PAIRS),
            ArrayArg("errs", 4, "size", Direction.OUT, MAX_PAIRS),
        ),
        privilege=Privilege.TARGET,
        note="each element's own errno is in errs",
    ),
    remote(
        memory.XENMEM_remove_from_physmap,
        "XENMEM_remove_from_physmap",
        memory.XEN_REMOVE_FROM_PHYSMAP,
        NO_DOMAIN,
        NOT_ALLOWED,
        Error(errno.XEN_ENOENT, "nothing is mapped at this gfn"),
        privilege=Privilege.TARGET,
    ),
    remote(
        memory.XENMEM_memory_map,
        "XENMEM_memory_map",
        memory.XEN_MEMORY_MAP,
        Error(errno.XEN_ENOSYS, "the toolstack gave the domain no map"),
        Error(errno.XEN_EINVAL, "HVM: the buffer is shorter than the map"),
        arrays=(ArrayArg("buffer", 20, "nr_entries", Direction.OUT, MAX_E820, optional=True, room=True),),
        note="e820 entries of 20 bytes: u64 address, u64 size, u32 type. nr_entries says how many there are",
    ),
    remote(
        memory.XENMEM_machine_memory_map,
        "XENMEM_machine_memory_map",
        memory.XEN_MEMORY_MAP,
        Error(errno.XEN_EINVAL, "no room for an entry"),
        arrays=(ArrayArg("buffer", 20, "nr_entries", Direction.OUT, MAX_E820, room=True),),
        guests=Guests.PV,
        privilege=Privilege.CONTROL,
    ),
    remote(
        memory.XENMEM_set_memory_map,
        "XENMEM_set_memory_map",
        memory.XEN_FOREIGN_MEMORY_MAP,
        NO_DOMAIN,
        Error(errno.XEN_EINVAL, "over 128 entries"),
        arrays=(ArrayArg("map.buffer", 20, "map.nr_entries", Direction.IN, MAX_E820),),
        privilege=Privilege.CONTROL,
    ),
    remote(
        memory.XENMEM_exchange,
        "XENMEM_exchange",
        memory.XEN_MEMORY_EXCHANGE,
        NO_DOMAIN,
        Error(errno.XEN_EINVAL, "the two sides have not the same amount of memory, or domains differ"),
        Error(errno.XEN_EPERM, "an order over 9 without a device"),
        Error(
            errno.XEN_ENOMEM,
            "no contiguous frames, or more than 1024 at once (the control domain has no such limit)",
        ),
        Error(errno.XEN_EOPNOTSUPP, "an auto-translated domain"),
        arrays=(
            frames("in_.extent_start", "in_.nr_extents", Direction.IN, MAX_PAIRS),
            frames("out.extent_start", "out.nr_extents", Direction.BOTH, MAX_PAIRS),
        ),
        guests=Guests.PV,
        privilege=Privilege.TARGET,
    ),
    local(
        memory.XENMEM_machphys_mapping,
        "XENMEM_machphys_mapping",
        FAULT,
        argument=memory.XEN_MACHPHYS_MAPPING,
        guests=Guests.PV,
    ),
    *(
        refused(number, name, refusal, note, privilege=privilege)
        for number, name, refusal, note, privilege in (
            (
                memory.XENMEM_set_pod_target,
                "XENMEM_set_pod_target",
                errno.XEN_EINVAL,
                "no populate-on-demand",
                Privilege.CONTROL,
            ),
            (
                memory.XENMEM_get_pod_target,
                "XENMEM_get_pod_target",
                errno.XEN_EINVAL,
                "no populate-on-demand",
                Privilege.CONTROL,
            ),
            (
                memory.XENMEM_paging_op,
                "XENMEM_paging_op",
                errno.XEN_ENOSYS,
                "built without memory paging",
                Privilege.ANY,
            ),
            (
                memory.XENMEM_access_op,
                "XENMEM_access_op",
                errno.XEN_ENODEV,
                "no memory-access monitor",
                Privilege.DEVICE_MODEL,
            ),
            (
                memory.XENMEM_sharing_op,
                "XENMEM_sharing_op",
                errno.XEN_ENOSYS,
                "built without memory sharing",
                Privilege.ANY,
            ),
            (
                memory.XENMEM_get_vnumainfo,
                "XENMEM_get_vnumainfo",
                errno.XEN_EOPNOTSUPP,
                "no virtual NUMA",
                Privilege.TARGET,
            ),
        )
    ),
    local(
        memory.XENMEM_get_sharing_freed_pages, "XENMEM_get_sharing_freed_pages", note="0: no page is shared"
    ),
    local(
        memory.XENMEM_get_sharing_shared_pages, "XENMEM_get_sharing_shared_pages", note="0: no page is shared"
    ),
    local(
        memory.XENMEM_reserved_device_memory_map,
        "XENMEM_reserved_device_memory_map",
        FAULT,
        argument=memory.XEN_RESERVED_DEVICE_MEMORY_MAP,
        note="no device has reserved memory: 0, and nr_entries becomes 0",
    ),
    remote(
        memory.XENMEM_claim_pages,
        "XENMEM_claim_pages",
        memory.XEN_MEMORY_RESERVATION,
        Error(
            errno.XEN_EINVAL,
            "no such domain; an order, flags, or a list of extents; or fewer pages than the domain has",
        ),
        Error(errno.XEN_ENOMEM, "not so many free frames"),
        privilege=Privilege.CONTROL,
    ),
    remote(
        memory.XENMEM_acquire_resource,
        "XENMEM_acquire_resource",
        memory.XEN_MEM_ACQUIRE_RESOURCE,
        NO_DOMAIN,
        Error(errno.XEN_EINVAL, "a pad field set, or frames that the resource does not have"),
        Error(errno.XEN_EOPNOTSUPP, "unknown resource"),
        arrays=(ArrayArg("frame_list", 8, "nr_frames", Direction.OUT, MAX_EXTENTS, optional=True),),
        privilege=Privilege.DEVICE_MODEL,
        state=State.PARTLY,
        note="grant_table (shared and status frames); a null handle asks for the number of frames",
    ),
)

# ------------------------------------------------------------------------------------------------ grant_table_op

_STATUS: Final = "each entry's outcome is its `status` (GNTST_*)"


def _grants(number: int, name: str, argument: Layout[Any], note: str = _STATUS, **more: Any) -> Command:
    errors = (Error(errno.XEN_EINVAL, "`count` is negative, or not 1 where the command takes one"),)
    more.setdefault("form", Form.LIST)
    return remote(number, name, argument, *errors, note=note, **more)


_GRANTS: Final = (
    _grants(
        grant_table.GNTTABOP_map_grant_ref,
        "GNTTABOP_map_grant_ref",
        grant_table.GNTTAB_MAP_GRANT_REF,
        _STATUS
        + "; the reply waits until the granter's process has moved the frames; the caller's process enters "
        "the mapping in page tables or p2m by itself; GNTST_eagain where the granter's process was slow too often: later",
    ),
    _grants(
        grant_table.GNTTABOP_unmap_grant_ref,
        "GNTTABOP_unmap_grant_ref",
        grant_table.GNTTAB_UNMAP_GRANT_REF,
        _STATUS + "; the caller's process takes the mapping away before it asks",
    ),
    _grants(
        grant_table.GNTTABOP_setup_table,
        "GNTTABOP_setup_table",
        grant_table.GNTTAB_SETUP_TABLE,
        "one structure; nr_frames frame numbers follow in the reply",
        form=Form.STRUCT,
        arrays=(frames("frame_list", "nr_frames", Direction.OUT),),
        privilege=Privilege.TARGET,
    ),
    refused(
        grant_table.GNTTABOP_dump_table,
        "GNTTABOP_dump_table",
        errno.XEN_ENOSYS,
        "a debugging aid that Xen no longer has",
    ),
    _grants(
        grant_table.GNTTABOP_transfer,
        "GNTTABOP_transfer",
        grant_table.GNTTAB_TRANSFER,
        "every entry gets GNTST_general_error: no domain accepts transfers",
        state=State.PARTLY,
    ),
    _grants(grant_table.GNTTABOP_copy, "GNTTABOP_copy", grant_table.GNTTAB_COPY),
    _grants(
        grant_table.GNTTABOP_query_size,
        "GNTTABOP_query_size",
        grant_table.GNTTAB_QUERY_SIZE,
        privilege=Privilege.TARGET,
    ),
    _grants(
        grant_table.GNTTABOP_unmap_and_replace,
        "GNTTABOP_unmap_and_replace",
        grant_table.GNTTAB_UNMAP_AND_REPLACE,
        _STATUS + "; for an auto-translated guest: GNTST_general_error",
    ),
    _grants(
        grant_table.GNTTABOP_set_version,
        "GNTTABOP_set_version",
        grant_table.GNTTAB_SET_VERSION,
        "-EINVAL for other than 1 or 2, -EBUSY while grants are mapped; the reply has the version in force",
        form=Form.STRUCT,
    ),
    _grants(
        grant_table.GNTTABOP_get_status_frames,
        "GNTTABOP_get_status_frames",
        grant_table.GNTTAB_GET_STATUS_FRAMES,
        "one structure; nr_frames frame numbers follow in the reply; version 2 only",
        form=Form.STRUCT,
        arrays=(frames("frame_list", "nr_frames", Direction.OUT),),
        privilege=Privilege.TARGET,
    ),
    _grants(
        grant_table.GNTTABOP_get_version,
        "GNTTABOP_get_version",
        grant_table.GNTTAB_GET_VERSION,
        "one structure; -ESRCH, -EPERM as return value",
        form=Form.STRUCT,
        privilege=Privilege.TARGET,
    ),
    _grants(
        grant_table.GNTTABOP_swap_grant_ref,
        "GNTTABOP_swap_grant_ref",
        grant_table.GNTTAB_SWAP_GRANT_REF,
    ),
    _grants(
        grant_table.GNTTABOP_cache_flush,
        "GNTTABOP_cache_flush",
        grant_table.GNTTAB_CACHE_FLUSH,
        "memory is coherent: checks the arguments, has no effect",
        state=State.PARTLY,
    ),
)

# ------------------------------------------------------------------------------------------------ event_channel_op

_BAD_PORT: Final = Error(errno.XEN_EINVAL, "no such port, or not in a state for it")
_FULL: Final = Error(errno.XEN_ENOSPC, "no free port")
_NO_SUCH_VCPU: Final = Error(errno.XEN_ENOENT, "no such vCPU")


def _event(number: int, name: str, argument: Layout[Any], *errors: Error, **more: Any) -> Command:
    return remote(number, f"EVTCHNOP_{name}", argument, *errors, **more)


_EVENTS: Final = (
    _event(
        event_channel.EVTCHNOP_bind_interdomain,
        "bind_interdomain",
        event_channel.EVTCHN_BIND_INTERDOMAIN,
        NO_DOMAIN,
        _FULL,
        Error(errno.XEN_EINVAL, "the remote port is not unbound, or not meant for the caller"),
    ),
    _event(
        event_channel.EVTCHNOP_bind_virq,
        "bind_virq",
        event_channel.EVTCHN_BIND_VIRQ,
        Error(errno.XEN_EINVAL, "no such VIRQ, or a global one on another vCPU than 0"),
        _NO_SUCH_VCPU,
        Error(errno.XEN_EEXIST, "the VIRQ is bound already"),
        _FULL,
        note="any domain may bind a global VIRQ; only the domain that handles it (XEN_DOMCTL_set_virq_handler, else "
        "the control domain) gets it",
    ),
    _event(
        event_channel.EVTCHNOP_bind_pirq,
        "bind_pirq",
        event_channel.EVTCHN_BIND_PIRQ,
        Error(errno.XEN_EINVAL, "no such interrupt"),
        Error(errno.XEN_EPERM, "not an interrupt that the domain was given"),
        Error(errno.XEN_EEXIST, "bound already"),
        _FULL,
        privilege=Privilege.HARDWARE,
    ),
    _event(event_channel.EVTCHNOP_close, "close", event_channel.EVTCHN_CLOSE, _BAD_PORT),
    _event(
        event_channel.EVTCHNOP_send,
        "send",
        event_channel.EVTCHN_SEND,
        _BAD_PORT,
        note="over the bus only where no doorbell joins the two ends",
    ),
    _event(
        event_channel.EVTCHNOP_status,
        "status",
        event_channel.EVTCHN_STATUS,
        NO_DOMAIN,
        NOT_ALLOWED,
        Error(errno.XEN_EINVAL, "port out of range"),
        privilege=Privilege.TARGET,
        note="a closed port is not an error: EVTCHNSTAT_closed",
    ),
    _event(
        event_channel.EVTCHNOP_alloc_unbound,
        "alloc_unbound",
        event_channel.EVTCHN_ALLOC_UNBOUND,
        NO_DOMAIN,
        NOT_ALLOWED,
        _FULL,
        privilege=Privilege.TARGET,
    ),
    _event(event_channel.EVTCHNOP_bind_ipi, "bind_ipi", event_channel.EVTCHN_BIND_IPI, _NO_SUCH_VCPU, _FULL),
    _event(
        event_channel.EVTCHNOP_bind_vcpu,
        "bind_vcpu",
        event_channel.EVTCHN_BIND_VCPU,
        _NO_SUCH_VCPU,
        Error(errno.XEN_EINVAL, "no such port, an IPI, or a VIRQ that belongs to one vCPU"),
    ),
    local(
        event_channel.EVTCHNOP_unmask,
        "EVTCHNOP_unmask",
        _BAD_PORT,
        FAULT,
        argument=event_channel.EVTCHN_UNMASK,
        note="the masked and pending bits are words of the domain's own memory",
    ),
    _event(
        event_channel.EVTCHNOP_reset,
        "reset",
        event_channel.EVTCHN_RESET,
        NO_DOMAIN,
        NOT_ALLOWED,
        privilege=Privilege.TARGET,
    ),
    _event(
        event_channel.EVTCHNOP_init_control,
        "init_control",
        event_channel.EVTCHN_INIT_CONTROL,
        Error(errno.XEN_EINVAL, "an offset that is not 8-byte aligned or crosses the page, or a bad frame"),
        _NO_SUCH_VCPU,
        note="after success the domain's process maps the control block and writes FIFO words itself",
    ),
    _event(
        event_channel.EVTCHNOP_expand_array,
        "expand_array",
        event_channel.EVTCHN_EXPAND_ARRAY,
        Error(errno.XEN_EOPNOTSUPP, "no FIFO format"),
        Error(errno.XEN_ENOSPC, "the array is full"),
        Error(errno.XEN_EINVAL, "bad frame"),
    ),
    _event(
        event_channel.EVTCHNOP_set_priority,
        "set_priority",
        event_channel.EVTCHN_SET_PRIORITY,
        Error(errno.XEN_ENOSYS, "no FIFO format"),
        Error(errno.XEN_EACCES, "a port that is not in use"),
        Error(errno.XEN_EINVAL, "no such port, or a priority over 15"),
    ),
)

# ------------------------------------------------------------------------------------------------ sched_op

_SCHED: Final = (
    remote(sched.SCHEDOP_yield, "SCHEDOP_yield", None),
    remote(
        sched.SCHEDOP_block,
        "SCHEDOP_block",
        BLOCK_ARG,
        note="enables upcalls and returns at once if one is pending (in the domain's process); the wire form carries "
        "the vCPU's next timer. The reply comes when the vCPU runs again",
    ),
    remote(
        sched.SCHEDOP_shutdown,
        "SCHEDOP_shutdown",
        sched.SCHED_SHUTDOWN,
        note="all vCPUs stop; the low 8 bits of the reason count, and an earlier shutdown_code stays",
    ),
    remote(
        sched.SCHEDOP_poll,
        "SCHEDOP_poll",
        sched.SCHED_POLL,
        Error(errno.XEN_EINVAL, "over 128 ports, or a port that does not exist"),
        arrays=(ArrayArg("ports", 4, "nr_ports", Direction.IN, 128),),
        note="the domain's process looks at the pending bits first; timeout in ns of system time, 0 for none",
    ),
    remote(
        sched.SCHEDOP_remote_shutdown,
        "SCHEDOP_remote_shutdown",
        sched.SCHED_REMOTE_SHUTDOWN,
        NO_DOMAIN,
        privilege=Privilege.DEVICE_MODEL,
    ),
    remote(
        sched.SCHEDOP_shutdown_code,
        "SCHEDOP_shutdown_code",
        sched.SCHED_SHUTDOWN,
        note="kept for the shutdown that follows; only the first one counts",
    ),
    remote(
        sched.SCHEDOP_watchdog,
        "SCHEDOP_watchdog",
        sched.SCHED_WATCHDOG,
        Error(errno.XEN_EINVAL, "no such timer, or it is not running"),
        Error(errno.XEN_ENOSPC, "both timers are in use"),
        note="id 0 starts one and returns its id (1 or 2); timeout in seconds, 0 stops it",
    ),
    refused(
        sched.SCHEDOP_pin_override,
        "SCHEDOP_pin_override",
        errno.XEN_EPERM,
        "only for the hardware domain, and no vCPU runs on a real CPU of its own",
    ),
)

SHARED_HYPERCALLS: Final = (
    Hypercall(
        number=xen.HYPERVISOR_memory_op,
        name="memory_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        commands=_MEMORY,
        unknown=errno.XEN_ENOSYS,
        note="the low six bits of cmd are the command, the rest is where to go on (extents done)",
    ),
    Hypercall(
        number=xen.HYPERVISOR_grant_table_op,
        name="grant_table_op",
        arguments=("cmd", "uop", "count"),
        command_argument=0,
        commands=_GRANTS,
        unknown=errno.XEN_ENOSYS,
    ),
    Hypercall(
        number=xen.HYPERVISOR_event_channel_op,
        name="event_channel_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        commands=_EVENTS,
        unknown=errno.XEN_ENOSYS,
    ),
    Hypercall(
        number=xen.HYPERVISOR_sched_op,
        name="sched_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        commands=_SCHED,
        unknown=errno.XEN_ENOSYS,
    ),
)
