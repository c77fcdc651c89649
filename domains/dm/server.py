"""The ioreq server of a device model: made by hypercall, with a range for each range of its devices."""

from __future__ import annotations

from typing import Any, Final

from bus.abi.hvm import dm_op
from bus.abi.hypercalls_model import DM_OP_ARG, dm_op_arg
from bus.abi.layout import Layout
from bus.abi.xen import HYPERVISOR_dm_op
from domains.native.domain import HypercallError, NativeDomain
from drivers.pc.bus import BusError, Changed, MmioSpace, PortSpace, Range


class IoreqServer:
    """dm_op by name, as libxendevicemodel has them, for one guest. HypercallError."""

    def __init__(self, host: NativeDomain, guest: int) -> None:
        self._host: Final = host
        self._guest: Final = guest
        self.id = -1

    def _call(self, op: int, layout: Layout[Any], value: Any) -> Any:
        member = layout.pack(value)
        size = dm_op.XEN_DM_OP.field_size("u")
        request = DM_OP_ARG.pack(dm_op_arg(self._guest, dm_op.xen_dm_op(op, 0, member.ljust(size, b"\0"))))
        reply = self._host.call(HYPERVISOR_dm_op, op, request, f"dm_op {op} of domain {self._guest}")
        return layout.unpack(DM_OP_ARG.unpack(reply).op.u)

    def create(self) -> None:
        """Its memory and doorbells come in an order `ioreq_area`."""
        layout = dm_op.XEN_DM_OP_CREATE_IOREQ_SERVER
        self.id = self._call(dm_op.XEN_DMOP_create_ioreq_server, layout, layout.zero()).id

    def enable(self) -> None:
        """From now on accesses come."""
        layout = dm_op.XEN_DM_OP_SET_IOREQ_SERVER_STATE
        self._call(
            dm_op.XEN_DMOP_set_ioreq_server_state, layout, layout.zero()._replace(id=self.id, enabled=1)
        )

    def _range(self, op: int, kind: int, wanted: Range) -> None:
        layout = dm_op.XEN_DM_OP_IOREQ_SERVER_RANGE
        value = dm_op.xen_dm_op_ioreq_server_range(self.id, 0, kind, wanted.start, wanted.end - 1)
        self._call(op, layout, value)

    def port_range(self, wanted: Range, added: bool) -> None:
        """A range of ports came or went."""
        self._change(dm_op.XEN_DMOP_IO_RANGE_PORT, wanted, added)

    def memory_range(self, wanted: Range, added: bool) -> None:
        """A range of memory came or went."""
        self._change(dm_op.XEN_DMOP_IO_RANGE_MEMORY, wanted, added)

    def _change(self, kind: int, wanted: Range, added: bool) -> None:
        op = (
            dm_op.XEN_DMOP_map_io_range_to_ioreq_server
            if added
            else dm_op.XEN_DMOP_unmap_io_range_from_ioreq_server
        )
        self._range(op, kind, wanted)

    def shutdown(self, reason: int) -> None:
        """XEN_DMOP_remote_shutdown: the guest is reset, or powered off."""
        layout = dm_op.XEN_DM_OP_REMOTE_SHUTDOWN
        self._call(dm_op.XEN_DMOP_remote_shutdown, layout, dm_op.xen_dm_op_remote_shutdown(reason))

    def vcpus(self) -> int:
        """How many the guest has at most."""
        layout = dm_op.XEN_DM_OP_NR_VCPUS
        count: int = self._call(dm_op.XEN_DMOP_nr_vcpus, layout, layout.zero()).vcpus
        return count


class Spaces:
    """The ports and addresses of a device model's devices; what changes in them is told to `server` once there is one. A range that
    cannot be (something beside the guest's vCPUs is there: its interrupt controllers, its timers) is a BusError, as one that is taken here."""

    def __init__(self) -> None:
        self.server: IoreqServer | None = None
        self.ports: Final = PortSpace(self._port)
        self.mmio: Final = MmioSpace(self._memory)

    def _port(self, which: Range, added: bool) -> None:
        if self.server is not None:
            self._tell(self.server.port_range, which, added)

    def _memory(self, which: Range, added: bool) -> None:
        if self.server is not None:
            self._tell(self.server.memory_range, which, added)

    @staticmethod
    def _tell(tell: Changed, which: Range, added: bool) -> None:
        try:
            tell(which, added)
        except HypercallError as error:
            if not added:
                raise
            raise BusError(f"{which.name} at {which.start:#x} cannot be there: {error}") from None

    def announce(self, server: IoreqServer) -> None:
        """Tell of all ranges so far, and from now on of changes."""
        for wanted in self.ports.ranges:
            server.port_range(wanted, True)
        for wanted in self.mmio.ranges:
            server.memory_range(wanted, True)
        self.server = server
