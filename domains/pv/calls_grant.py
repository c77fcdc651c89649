"""HYPERVISOR_grant_table_op: the hypervisor keeps the grants; this process enters and takes away the mappings in page tables
(grant_table.h).

A mapping is entered after the hypervisor granted it, and taken away before the hypervisor is asked to end it, so that the
guest never has a mapping without a live grant behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from bus.abi import grant_table as gt
from bus.abi.errno import XEN_EINVAL, XEN_EIO, XEN_ENOSYS
from bus.abi.hypercalls_model import MAX_WIRE, Command, Form, State
from bus.abi.xen import DOMID_SELF, HYPERVISOR_grant_table_op
from bus.addresses import PAGE_SHIFT, DomId, Mfn
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.wire import MAX_LIST, Remote

_MAP: Final = gt.GNTTAB_MAP_GRANT_REF
_UNMAP: Final = gt.GNTTAB_UNMAP_GRANT_REF
_REPLACE: Final = gt.GNTTAB_UNMAP_AND_REPLACE
_COPY: Final = gt.GNTTAB_COPY


class _Mapping(NamedTuple):
    address: int
    mfn: Mfn
    flags: int


class GrantCalls:
    """See the module."""

    def __init__(
        self, cpu: Cpu, remote: Remote, commands: Callable[[int, int], Command | None], domain: DomId
    ) -> None:
        self._cpu = cpu
        self._remote = remote
        self._commands = commands
        self._domain = domain
        self._mappings: dict[int, _Mapping] = {}
        self._status: set[int] = set()
        """Frames of status words (version 2) that the guest may map."""

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {HYPERVISOR_grant_table_op: self.grant_table_op}

    def grant_table_op(self, cmd: int, uop: int, count: int, a4: int, a5: int) -> Result:
        """-EINVAL for a negative count; -ENOSYS for an unknown command."""
        cmd &= LOW32
        count &= LOW32
        if count >> 31 or count > MAX_LIST:
            return -XEN_EINVAL
        command = self._commands(HYPERVISOR_grant_table_op, cmd)
        if command is None:
            return -XEN_ENOSYS
        if command.state is State.REFUSED:
            return -command.refusal
        if cmd == gt.GNTTABOP_map_grant_ref:
            return self._each_message(command, uop, count, _MAP, self._map)
        if cmd == gt.GNTTABOP_unmap_grant_ref:
            return self._each_message(command, uop, count, _UNMAP, self._unmap)
        if cmd == gt.GNTTABOP_unmap_and_replace:
            return self._each_message(command, uop, count, _REPLACE, self._unmap)
        if cmd == gt.GNTTABOP_copy:
            return self._each_message(command, uop, count, _COPY, self._copy)
        if cmd == gt.GNTTABOP_query_size and count != 1:
            return -XEN_EINVAL
        if command.form is Form.LIST:
            return self._remote.call_list(HYPERVISOR_grant_table_op, command, uop, count)
        if cmd in (gt.GNTTABOP_setup_table, gt.GNTTABOP_get_status_frames):
            return self._table_frames(command, uop, count)
        if cmd == gt.GNTTABOP_set_version and self._status:
            return self._set_version(command, uop)
        return self._remote.call(HYPERVISOR_grant_table_op, command, uop)

    def _each_message(
        self, command: Command, uop: int, count: int, layout: Any, work: Callable[[Command, list[Any]], Any]
    ) -> int:
        """Cut the list into messages; `work` returns (rc, updated entries)."""
        memory = self._cpu.mmu
        per_message = MAX_WIRE // layout.size
        for start in range(0, count, per_message):
            number = min(per_message, count - start)
            place = uop + start * layout.size
            items = layout.unpack_array(memory.read_virtual(place, number * layout.size), number)
            rc, items = work(command, items)
            if rc < 0:
                return int(rc)
            memory.write_virtual(place, b"".join(layout.pack(item) for item in items))
        return 0

    def _ask(self, command: Command, items: list[Any]) -> tuple[int, list[Any]]:
        layout = command.argument
        assert layout is not None
        data = b"".join(layout.pack(item) for item in items)
        rc, reply = self._remote.raw(HYPERVISOR_grant_table_op, command.number, data)
        if rc < 0:
            return rc, items
        if len(reply) != len(data):
            return -XEN_EIO, items
        return rc, layout.unpack_array(reply, len(items))

    # --- map

    def _map(self, command: Command, items: list[Any]) -> tuple[int, list[Any]]:
        rc, replies = self._ask(command, items)
        if rc < 0:
            return rc, items
        out = []
        for item, reply in zip(items, replies, strict=True):
            if reply.status == gt.GNTST_okay and item.flags & gt.GNTMAP_host_map:
                reply = self._enter(item, reply)
            out.append(reply)
        return 0, out

    def _enter(self, item: Any, reply: Any) -> Any:
        mfn = Mfn(reply.dev_bus_addr >> PAGE_SHIFT)
        status = self._cpu.mmu.create_grant_mapping(item.host_addr, mfn, item.flags)
        if status == gt.GNTST_okay:
            self._mappings[reply.handle] = _Mapping(item.host_addr, mfn, item.flags)
            return reply
        self._give_back(reply.handle, item.host_addr)
        return reply._replace(status=status)

    def _give_back(self, handle: int, host_addr: int) -> None:
        """A mapping that could not be entered: the hypervisor ends it again."""
        data = _UNMAP.pack(gt.gnttab_unmap_grant_ref(host_addr, 0, handle, 0))
        self._remote.raw(HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, data)

    # --- unmap

    def _unmap(self, command: Command, items: list[Any]) -> tuple[int, list[Any]]:
        replacing = command.number == gt.GNTTABOP_unmap_and_replace
        out: list[Any] = list(items)
        asked: list[int] = []
        for index, item in enumerate(items):
            status = self._take_away(item, item.new_addr if replacing else 0)
            if status == gt.GNTST_okay:
                asked.append(index)
            else:
                out[index] = item._replace(status=status)
        if asked:
            rc, replies = self._ask(command, [items[index] for index in asked])
            if rc < 0:
                return rc, items
            for index, reply in zip(asked, replies, strict=True):
                out[index] = reply
        return 0, out

    def _take_away(self, item: Any, new_address: int) -> int:
        """A handle that is not known here is left to the hypervisor, which answers GNTST_bad_handle."""
        mapping = self._mappings.get(item.handle)
        if mapping is None or not item.host_addr:
            return gt.GNTST_okay
        if item.host_addr != mapping.address:
            return gt.GNTST_general_error  # what is mapped there is not the grant
        status = self._cpu.mmu.replace_grant_mapping(mapping.address, mapping.mfn, new_address, mapping.flags)
        if status == gt.GNTST_okay:
            del self._mappings[item.handle]
            self._cpu.drop_code(mapping.mfn)
        return status

    # --- copy and tables

    def _copy(self, command: Command, items: list[Any]) -> tuple[int, list[Any]]:
        """Frames of the guest's own that are page tables or descriptor tables are no destination: GNTST_general_error."""
        own = {
            index: Mfn(item.dest.u)
            for index, item in enumerate(items)
            if not item.flags & gt.GNTCOPY_dest_gref and item.dest.domid in (DOMID_SELF, self._domain)
        }
        memory = self._cpu.mmu
        typed = {index for index, mfn in own.items() if memory.is_table(mfn)}
        asked = [item for index, item in enumerate(items) if index not in typed]
        rc, replies = self._ask(command, asked) if asked else (0, [])
        if rc < 0:
            return rc, items
        for index, mfn in own.items():
            if index not in typed:
                self._cpu.drop_code(mfn)
        answers = iter(replies)
        return rc, [
            item._replace(status=gt.GNTST_general_error) if index in typed else next(answers)
            for index, item in enumerate(items)
        ]

    def _table_frames(self, command: Command, uop: int, count: int) -> int:
        """The frames of the grant table (or of its status words) become frames that the guest may map."""
        if count != 1:
            return -XEN_EINVAL
        assert command.argument is not None
        memory = self._cpu.mmu
        item = command.argument.unpack(memory.read_virtual(uop, command.argument.size))
        rc, updated = self._remote.call_item(
            HYPERVISOR_grant_table_op,
            command,
            item,
            uop,
            cmd=command.number,
            # A list that was refused as too long is not written: it may be longer than the guest's own.
            filled=lambda answer: answer.status == gt.GNTST_okay,
        )
        if (
            rc >= 0
            and updated is not None
            and updated.status == gt.GNTST_okay
            and item.dom in (DOMID_SELF, self._domain)
        ):
            frames = memory.read_virtual(updated.frame_list, 8 * item.nr_frames) if item.nr_frames else b""
            for start in range(0, len(frames), 8):
                mfn = int.from_bytes(frames[start : start + 8], "little")
                memory.share_frame(mfn, True)
                if command.number == gt.GNTTABOP_get_status_frames:
                    self._status.add(mfn)
        return rc

    def _set_version(self, command: Command, uop: int) -> int:
        """Back to version 1 the frames of the status words go: -EBUSY while the guest maps one (XSA-255)."""
        memory = self._cpu.mmu
        layout = gt.GNTTAB_SET_VERSION
        version = layout.unpack(memory.read_virtual(uop, layout.size)).version
        gone: list[int] = []
        rc = 0
        if version == 1:
            for mfn in sorted(self._status):
                rc = memory.share_frame(mfn, False)
                if rc:
                    break
                gone.append(mfn)
        if not rc:
            rc = self._remote.call(HYPERVISOR_grant_table_op, command, uop)
        if rc < 0:
            for mfn in gone:
                memory.share_frame(mfn, True)
        elif version == 1:
            self._status.clear()
        return rc
