"""HYPERVISOR_physdev_op and console_io, and every hypercall of the table that has no handler of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bus.abi import physdev
from bus.abi.domctl import XEN_DOMCTL_INTERFACE_VERSION
from bus.abi.errno import XEN_E2BIG, XEN_EACCES, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EPERM
from bus.abi.hvm.dm_op import XEN_DM_OP, XEN_DM_OP_BUF, XEN_DMOP_nr_vcpus
from bus.abi.hvm.hvm_op import XEN_HVM_XENTRACE, HVMOP_guest_request_vm_event, HVMOP_xentrace
from bus.abi.hypercalls_model import (
    CONSOLE_IO_ARG,
    DM_OP_ARG,
    Command,
    Form,
    Guests,
    Hypercall,
    Privilege,
    State,
    Where,
    console_io_arg,
    dm_op_arg,
)
from bus.abi.platform import XENPF_INTERFACE_VERSION
from bus.abi.sysctl import XEN_SYSCTL_INTERFACE_VERSION
from bus.abi.xen import (
    CONSOLEIO_read,
    CONSOLEIO_write,
    HYPERVISOR_console_io,
    HYPERVISOR_dm_op,
    HYPERVISOR_domctl,
    HYPERVISOR_hvm_op,
    HYPERVISOR_physdev_op,
    HYPERVISOR_physdev_op_compat,
    HYPERVISOR_platform_op,
    HYPERVISOR_sysctl,
)
from domains.pv.api import GuestFault
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.debugreg import hypervisor_range
from domains.pv.hardware import Hardware
from domains.pv.wire import Remote

CONSOLE_CHUNK: Final = 4096
MAX_CONSOLE: Final = 1 << 31
MAX_PORTS: Final = 65536
MAX_DM_BUFFERS: Final = 2
TRC_SUBCLS_SHIFT: Final = 12
"""trace.h: events of guests have no more bits."""
DM_OP_HEAD: Final = 8
"""Bytes of `op` and `pad`, before the command's own structure."""
CMD_IN_STRUCTURE: Final = -2
INTERFACE_VERSIONS: Final = {
    HYPERVISOR_sysctl: XEN_SYSCTL_INTERFACE_VERSION,
    HYPERVISOR_domctl: XEN_DOMCTL_INTERFACE_VERSION,
    HYPERVISOR_platform_op: XENPF_INTERFACE_VERSION,
}
"""Checked before anything else, the command and the privilege included: so a guest finds out the version."""


class OtherCalls:
    """See the module. `control`: the domain is the control domain."""

    translated = False
    """The guest is an HVM or PVH one."""

    def __init__(
        self,
        cpu: Cpu,
        remote: Remote,
        table: Mapping[int, Hypercall],
        *,
        control: bool,
        hardware: Hardware | None = None,
    ) -> None:
        self._hardware = hardware
        self._cpu = cpu
        self._remote = remote
        self._table = table
        self._control = control

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {
            HYPERVISOR_console_io: self.console_io,
            HYPERVISOR_physdev_op: self.physdev_op,
            HYPERVISOR_physdev_op_compat: self.physdev_op_compat,
            HYPERVISOR_dm_op: self.dm_op,
        }

    def generic(self, number: int) -> Handler:
        """A handler for a hypercall that does nothing in this process."""

        def handler(a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
            return self._generic(number, a1, a2, a3)

        return handler

    def _generic(self, number: int, a1: int, a2: int, a3: int) -> int:
        entry = self._table.get(number)
        if entry is None or not entry.commands:
            return -XEN_ENOSYS
        argument = a1
        if entry.command_argument == CMD_IN_STRUCTURE:
            cmd = int.from_bytes(self._cpu.mmu.read_virtual(a1, 4), "little")
        elif entry.command_argument >= 0:
            cmd, argument = a1 & LOW32, a2
        else:
            cmd = 0
        command = entry.command(cmd)
        if command is None:
            if entry.command_argument == CMD_IN_STRUCTURE:
                version = int.from_bytes(self._cpu.mmu.read_virtual(a1 + 4, 4), "little")
                if version != INTERFACE_VERSIONS.get(number, version):
                    return -XEN_EACCES
                if not self._control:
                    return -XEN_EPERM
            return -(entry.unknown or XEN_ENOSYS)
        if number == HYPERVISOR_hvm_op and cmd == HVMOP_xentrace:
            return self._trace(argument)
        if number == HYPERVISOR_hvm_op and cmd == HVMOP_guest_request_vm_event:
            return -XEN_EINVAL if argument else 0  # the request is made, and no monitor listens
        if number == HYPERVISOR_hvm_op and not self.translated and Guests.PV not in command.guests:
            return -XEN_EINVAL  # the command is there, but the caller is not of the kind
        refusal = self._refusal(command)
        if refusal:
            return refusal
        if command.form is Form.LIST:
            return self._remote.call_list(number, command, argument, a3 & LOW32)
        return self._remote.call(number, command, argument)

    def _trace(self, argument: int) -> int:
        """HVMOP_xentrace: there is no buffer of a trace to put it into."""
        layout = XEN_HVM_XENTRACE
        record = layout.unpack(self._cpu.mmu.read_virtual(argument, layout.size))
        wrong = record.extra_bytes > len(record.extra) or record.event >= 1 << TRC_SUBCLS_SHIFT
        return -XEN_EINVAL if wrong else 0

    def _refusal(self, command: Command) -> int:
        """What this process can say by itself."""
        if Guests.PV not in command.guests:
            return -XEN_ENOSYS
        if command.where is Where.HYPERVISOR:
            return 0  # it checks privilege and state
        if command.privilege is Privilege.CONTROL and not self._control:
            return -XEN_EPERM
        if command.state is State.REFUSED:
            return -command.refusal
        return -XEN_ENOSYS

    def console_io(self, cmd: int, count: int, buffer: int, a4: int, a5: int) -> Result:
        """CONSOLEIO_write, CONSOLEIO_read; -EINVAL for a count over 2 GiB, -ENOSYS for an unknown command."""
        cmd &= LOW32
        count &= LOW32
        if cmd not in (CONSOLEIO_write, CONSOLEIO_read):
            return -XEN_ENOSYS
        if count >= MAX_CONSOLE:
            return -XEN_EINVAL
        memory = self._cpu.mmu
        if cmd == CONSOLEIO_read:
            count = min(count, CONSOLE_CHUNK)
            rc, reply = self._remote.raw(
                HYPERVISOR_console_io, cmd, CONSOLE_IO_ARG.pack(console_io_arg(count))
            )
            if rc > 0:
                memory.write_virtual(buffer, reply[CONSOLE_IO_ARG.size :][: min(rc, count)])
            return rc
        for start in range(0, count, CONSOLE_CHUNK):
            length = min(CONSOLE_CHUNK, count - start)
            data = CONSOLE_IO_ARG.pack(console_io_arg(length)) + memory.read_virtual(buffer + start, length)
            rc, _ = self._remote.raw(HYPERVISOR_console_io, cmd, data)
            if rc < 0:
                return rc
        return 0

    def dm_op(self, domid: int, count: int, buffers: int, a4: int, a5: int) -> Result:
        """For a guest's device model and the control domain; no command that is served has a second buffer. That the domain is not
        there, or not the caller's to serve, is said before anything is (-EFAULT) of the buffers' content."""
        domid &= 0xFFFF
        count &= LOW32
        if count > MAX_DM_BUFFERS:
            return -XEN_E2BIG
        memory = self._cpu.mmu
        given = memory.read_virtual(buffers, count * XEN_DM_OP_BUF.size) if count else b""
        table = self._table[HYPERVISOR_dm_op]
        try:
            where, room = XEN_DM_OP_BUF.unpack(given[: XEN_DM_OP_BUF.size]) if count else (0, 0)
            if room < DM_OP_HEAD:
                raise GuestFault(where)
            cmd = int.from_bytes(memory.read_virtual(where, DM_OP_HEAD)[:4], "little")
            command = table.command(cmd)
            size = DM_OP_HEAD + (
                command.payload.size if command is not None and command.payload is not None else 0
            )
            if room < size:
                raise GuestFault(where)
            op = memory.read_virtual(where, size)
        except GuestFault:
            command, failed = None, -XEN_EFAULT
        else:
            failed = -(table.unknown or XEN_ENOSYS)
        if command is None:
            request = DM_OP_ARG.pack(dm_op_arg(domid, XEN_DM_OP.zero()._replace(op=XEN_DMOP_nr_vcpus)))
            rc, _ = self._remote.raw(HYPERVISOR_dm_op, XEN_DMOP_nr_vcpus, request)
            return min(rc, 0) or failed
        request = DM_OP_ARG.pack(dm_op_arg(domid, XEN_DM_OP.unpack(op.ljust(XEN_DM_OP.size, b"\0"))))
        rc, reply = self._remote.raw(HYPERVISOR_dm_op, cmd, request)
        if rc >= 0 and reply:
            memory.write_virtual(where, XEN_DM_OP.pack(DM_OP_ARG.unpack(reply).op)[:size])
        return rc

    def physdev_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """set_iopl and set_iobitmap concern the vCPU alone."""
        cmd &= LOW32
        if self.translated:
            return self._generic(HYPERVISOR_physdev_op, cmd, arg, a3)
        memory = self._cpu.mmu
        s = self._cpu.current
        if cmd == physdev.PHYSDEVOP_set_iopl:
            iopl = physdev.PHYSDEV_SET_IOPL.unpack(
                memory.read_virtual(arg, physdev.PHYSDEV_SET_IOPL.size)
            ).iopl
            if iopl > 3:
                return -XEN_EINVAL
            s.iopl = iopl << 12
            return 0
        if cmd == physdev.PHYSDEVOP_set_iobitmap:
            layout = physdev.PHYSDEV_SET_IOBITMAP
            request = layout.unpack(memory.read_virtual(arg, layout.size))
            last = request.bitmap + request.nr_ports // 8
            if request.nr_ports > MAX_PORTS or hypervisor_range(request.bitmap) or hypervisor_range(last):
                return -XEN_EINVAL
            s.iobmp = request.bitmap
            s.iobmp_limit = request.nr_ports
            return 0
        if cmd == physdev.PHYSDEVOP_IRQ_UNMASK_NOTIFY:
            return 0  # obsolete: there is nothing to tell
        entry = self._table[HYPERVISOR_physdev_op].command(cmd)
        if entry is not None and entry.argument is not None:
            memory.read_virtual(arg, entry.argument.size)  # -EFAULT before the privilege
        rc = self._generic(HYPERVISOR_physdev_op, cmd, arg, a3)
        if rc == 0 and cmd == physdev.PHYSDEVOP_map_pirq and self._hardware is not None:
            item = physdev.PHYSDEV_MAP_PIRQ.unpack(memory.read_virtual(arg, physdev.PHYSDEV_MAP_PIRQ.size))
            if item.type == physdev.MAP_PIRQ_TYPE_MSI:
                self._hardware.vector_mapped((item.bus & 0xFF) << 8 | item.devfn & 0xFF)
        return rc

    def physdev_op_compat(self, op: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """The call as it was before Xen 3.2: the command is the first word of the structure, the rest follows at byte 8."""
        cmd = int.from_bytes(self._cpu.mmu.read_virtual(op, 4), "little")
        return self.physdev_op(cmd, op + 8, a3, a4, a5)
