"""HYPERVISOR_grant_table_op, and the grant tables' part in the lives of domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EINVAL
from struct import pack
from typing import Any

from bus.abi import grant_table as gt
from bus.abi.memory import XENMEM_resource_grant_table_id_shared, XENMEM_resource_grant_table_id_status
from bus.abi.xen import DOMID_SELF, HYPERVISOR_grant_table_op
from bus.addresses import DomId, Mfn
from bus.trace import NOBODY, Kind, Trace, off
from hypervisor.core.domains import Domain
from hypervisor.core.effects import Order
from hypervisor.core.errors import XenError
from hypervisor.core.grants import DEFAULT_GRANT_FRAMES, DEFAULT_MAPTRACK, MAPTRACK_PER_FRAME, GrantTables
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.outbox import Outbox

WINDOWS_PER_ORDER = 48
"""Windows whose descriptors travel with one order (bus.messages.envelope.MAX_DESCRIPTORS is 64)."""
Waiting = Callable[[int, DomId, list[Any], Callable[[list[Any]], None]], None]
Simple = Callable[[DomId, Any], Any]


class GrantCalls(DomainHooks):
    """Registers every GNTTABOP; keeps a table for each domain from its creation to its removal."""

    def __init__(
        self, grants: GrantTables, dispatcher: Dispatcher, outbox: Outbox, trace: Trace | None = None
    ) -> None:
        self._grants = grants
        self._outbox = outbox
        self._trace = trace or off()
        ops = grants.ops
        waiting: tuple[tuple[int, Waiting], ...] = (
            (gt.GNTTABOP_map_grant_ref, grants.map),
            (gt.GNTTABOP_unmap_grant_ref, grants.unmap),
            (gt.GNTTABOP_unmap_and_replace, grants.unmap_and_replace),
            (gt.GNTTABOP_copy, grants.copy),
        )
        for cmd, operation in waiting:
            dispatcher.register(HYPERVISOR_grant_table_op, cmd, self._later(operation))
        simple: tuple[tuple[int, Simple], ...] = (
            (gt.GNTTABOP_query_size, ops.query_size),
            (gt.GNTTABOP_get_version, ops.get_version),
            (gt.GNTTABOP_set_version, ops.set_version),
            (gt.GNTTABOP_swap_grant_ref, ops.swap_grant_ref),
            (gt.GNTTABOP_transfer, lambda caller, op: ops.transfer(op)),
            (gt.GNTTABOP_cache_flush, self._cache_flush),
            (gt.GNTTABOP_dump_table, self._dump),
        )
        for cmd, call in simple:
            dispatcher.register(HYPERVISOR_grant_table_op, cmd, self._each(call))
        dispatcher.register(HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, self._frames(ops.setup_table))
        dispatcher.register(
            HYPERVISOR_grant_table_op, gt.GNTTABOP_get_status_frames, self._frames(ops.get_status_frames)
        )

    def _later(self, operation: Waiting) -> Callable[[Call], None]:
        def handler(call: Call) -> None:
            def done(items: list[Any]) -> None:
                if self._trace.on[0]:
                    self._note(call, items)
                call.answer(call.reply(0, items=items))

            operation(call.now, call.domain.domid, list(call.message.items), done)

        return handler

    def _note(self, call: Call, items: list[Any]) -> None:
        """For the trace: each mapping that came or went."""
        cmd, caller = call.command.number, call.domain.domid
        for asked, item in zip(call.message.items, items, strict=False):
            if cmd == gt.GNTTABOP_map_grant_ref:
                values = (asked.ref, item.handle, item.dev_bus_addr or asked.host_addr)
                self._trace.add(Kind.GRANT, asked.dom, caller, cmd, *values, item.status)
            elif cmd == gt.GNTTABOP_unmap_grant_ref:
                address = asked.dev_bus_addr or asked.host_addr
                self._trace.add(Kind.GRANT, NOBODY, caller, cmd, 0, asked.handle, address, item.status)

    def _each(self, operation: Simple) -> Callable[[Call], Result]:
        def handler(call: Call) -> Result:
            items: Sequence[Any] = [operation(call.domain.domid, item) for item in call.message.items]
            return call.reply(0, items=items)

        return handler

    def _frames(self, operation: Callable[[DomId, Any], tuple[Any, list[int]]]) -> Callable[[Call], Result]:
        def handler(call: Call) -> Result:
            item, frames = operation(call.domain.domid, call.item)
            name = call.command.arrays[0].handle
            if item.status != gt.GNTST_okay:
                frames = [
                    0
                ] * call.item.nr_frames  # the wire form has the array all the same; nobody copies it out
            return call.reply(0, item, arrays={name: pack(f"<{len(frames)}Q", *frames)})

        return handler

    def _cache_flush(self, caller: DomId, op: gt.gnttab_cache_flush) -> gt.gnttab_cache_flush:
        self._grants.ops.cache_flush(caller, op)
        return op

    def _dump(self, caller: DomId, op: gt.gnttab_dump_table) -> gt.gnttab_dump_table:
        domain = caller if op.dom == DOMID_SELF else DomId(op.dom)
        return op._replace(
            status=gt.GNTST_okay if self._grants.table(domain) is not None else gt.GNTST_bad_domain
        )

    # -- frames of the tables -------------------------------------------------------------------------------------

    def physmap_frame(self, domain: Domain, index: int) -> Mfn:
        """XENMAPSPACE_grant_table of an auto-translated domain."""
        return self._grants.ops.map_space_frame(domain.domid, index)

    def resource(self, domain: Domain, number: int, first: int, count: int) -> list[int]:
        """XENMEM_resource_grant_table: shared (0) or status (1) frames, for the domain's builder. EINVAL, ENOMEM."""
        if number not in (XENMEM_resource_grant_table_id_shared, XENMEM_resource_grant_table_id_status):
            raise XenError(EINVAL)
        status = number == XENMEM_resource_grant_table_id_status
        if count == 0:
            table = self._grants.table(domain.domid)
            return [table.max_grant_frames if table is not None else 0]
        return [
            int(mfn)
            for mfn in self._grants.ops.resource_frames(domain.domid, status=status, first=first, count=count)
        ]

    # -- lives of domains -----------------------------------------------------------------------------------------

    def created(self, now: int, domain: Domain) -> None:
        spec = domain.spec
        self._grants.create(
            domain.domid,
            DEFAULT_GRANT_FRAMES if spec.max_grant_frames < 0 else spec.max_grant_frames,
            DEFAULT_MAPTRACK
            if spec.max_maptrack_frames < 0
            else spec.max_maptrack_frames * MAPTRACK_PER_FRAME,
            spec.max_grant_version or 2,
        )

    def restarted(self, now: int, domain: Domain) -> None:
        """What the old process had mapped is unmapped; order `own_windows`: where the new one finds its granted frames."""
        self._grants.release_mappings(now, domain.domid)
        found = self._grants.own_windows(domain.domid)
        for start in range(0, len(found), WINDOWS_PER_ORDER):
            part = found[start : start + WINDOWS_PER_ORDER]
            numbers = sorted({own.window for own in part})
            body: dict[str, object] = {"frames": [[int(own.mfn), own.window, own.index] for own in part]}
            self._outbox.emit(
                Order(domain.domid, 0, "own_windows", body, tuple((number, True) for number in numbers), 0)
            )

    def gone(self, now: int, domain: Domain) -> None:
        self._grants.release_mappings(now, domain.domid)

    def soft_reset(self, now: int, domain: Domain) -> None:
        self._grants.reset(now, domain.domid)

    def removed(self, now: int, domain: Domain) -> None:
        self._grants.remove(domain.domid)
