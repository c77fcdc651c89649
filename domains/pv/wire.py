"""Hypercalls that the hypervisor serves: from guest memory to the wire form and back (docs/decisions/0001), driven by the
table of hypercalls.

Argument structures and arrays are copied out of guest memory once; results go back to the same places, with the guest's own
handles left in the structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from bus.abi.errno import XEN_EINVAL, XEN_EIO
from bus.abi.hypercalls_model import MAX_WIRE, Command, Direction, Form, WireError, decode
from bus.abi.layout import LayoutError
from domains.pv.cpu import Cpu
from domains.pv.upstream import Upstream

MAX_LIST: Final = 1 << 20
"""Most structures in one list hypercall: beyond that -EINVAL (Xen has no bound, but no guest has so many)."""


def value_at(item: Any, path: str | int) -> int:
    """The field at a dotted path, or a number that is given already."""
    if isinstance(path, int):
        return path
    for name in path.split("."):
        item = getattr(item, name)
    return int(item)


def with_field(item: Any, path: str, value: int) -> Any:
    """The structure with the field at a dotted path replaced."""
    first, _, rest = path.partition(".")
    if rest:
        return item._replace(**{first: with_field(getattr(item, first), rest, value)})
    return item._replace(**{first: value})


class Remote:
    """Makes hypercalls for the current vCPU."""

    __slots__ = ("_cpu", "_upstream")

    def __init__(self, cpu: Cpu, upstream: Upstream) -> None:
        self._cpu = cpu
        self._upstream = upstream

    def raw(self, nr: int, cmd: int, data: bytes = b"") -> tuple[int, bytes]:
        """Data that is in wire form already."""
        return self._upstream.hypercall(self._cpu.current.id, nr, cmd, data)

    def call(self, nr: int, command: Command, arg: int, *, cmd: int | None = None) -> int:
        """A command without argument or with one structure at guest address `arg`. GuestFault, errno of the hypervisor."""
        rc, _ = self.call_structure(nr, command, arg, cmd=cmd)
        return rc

    def call_structure(
        self, nr: int, command: Command, arg: int, *, cmd: int | None = None
    ) -> tuple[int, Any]:
        """As `call`; also returns the updated structure (None if the call failed without any)."""
        number = command.number if cmd is None else cmd
        if command.form is Form.NONE or command.argument is None:
            return self.raw(nr, number)[0], None
        memory = self._cpu.mmu
        layout = command.argument
        item = layout.unpack(memory.read_virtual(arg, layout.size))
        return self.call_item(nr, command, item, arg, cmd=number)

    def call_item(
        self,
        nr: int,
        command: Command,
        item: Any,
        arg: int,
        *,
        cmd: int,
        filled: Callable[[Any], bool] = lambda updated: True,
    ) -> tuple[int, Any]:
        """Call with a structure that was read already; results are written to guest address `arg` and, if `filled` says of the
        updated structure that they hold anything, to the arrays that it names. Returns (Xen's value, the structure as updated,
        or None)."""
        layout = command.argument
        assert layout is not None
        for array in command.arrays:
            if array.room and isinstance(array.count, str) and command.payload is None:
                item = with_field(item, array.count, min(value_at(item, array.count), array.limit))
        try:
            root = self._root(command, item)
            data = layout.pack(item) + self._arrays_in(command, root)
        except (LayoutError, WireError):
            return -XEN_EINVAL, None
        if len(data) > MAX_WIRE:
            return -XEN_EINVAL, None
        rc, reply = self.raw(nr, cmd, data)
        if not reply:
            return rc, None
        try:
            message = decode(command, reply, reply=True)
        except (LayoutError, WireError):
            return -XEN_EIO, None  # the hypervisor broke the wire form: nothing of it reaches the guest
        arrays = message.arrays if filled(message.items[0]) else {}
        updated = self._write_back(command, item, root, message.items[0], arrays, arg)
        return rc, updated

    @staticmethod
    def _root(command: Command, item: Any) -> Any:
        """What the paths of arrays start from."""
        if command.payload is None:
            return item
        return command.payload.unpack(getattr(item, command.payload_field))

    def _arrays_in(self, command: Command, root: Any) -> bytes:
        parts = []
        for array in command.arrays:
            if array.optional and not value_at(root, array.handle):
                continue
            count = value_at(root, array.count)
            if count > array.limit:
                raise WireError(f"{command.name}: {count} elements of {array.handle}")
            if Direction.IN in array.direction and count:
                parts.append(self._cpu.mmu.read_virtual(value_at(root, array.handle), count * array.size))
        return b"".join(parts)

    def _write_back(
        self, command: Command, item: Any, root: Any, updated: Any, arrays: Mapping[str, bytes], arg: int
    ) -> Any:
        memory = self._cpu.mmu
        for array in command.arrays:
            content = arrays.get(array.handle)
            if content and Direction.OUT in array.direction:
                length = min(len(content), value_at(root, array.count) * array.size)
                memory.write_virtual(value_at(root, array.handle), content[:length])
        # The guest's own handles stay in the structure.
        new_root = self._root(command, updated)
        for array in command.arrays:
            new_root = with_field(new_root, array.handle, value_at(root, array.handle))
        if command.payload is not None:
            raw: bytes = getattr(updated, command.payload_field)
            packed = command.payload.pack(new_root)
            updated = updated._replace(**{command.payload_field: packed + raw[len(packed) :]})
        else:
            updated = new_root
        assert command.argument is not None
        memory.write_virtual(arg, command.argument.pack(updated))
        return updated

    def call_list(self, nr: int, command: Command, arg: int, count: int) -> int:
        """A list of `count` structures at guest address `arg`, in as many messages as it takes. Each structure is written back
        updated. Stops at the first message that fails as a whole."""
        if count > MAX_LIST:
            return -XEN_EINVAL
        assert command.argument is not None
        size = command.argument.size
        memory = self._cpu.mmu
        per_message = MAX_WIRE // size
        for start in range(0, count, per_message):
            number = min(per_message, count - start)
            data = memory.read_virtual(arg + start * size, number * size)
            rc, reply = self.raw(nr, command.number, data)
            if reply:
                if len(reply) != len(data):
                    return -XEN_EIO
                memory.write_virtual(arg + start * size, reply)
            if rc < 0:
                return rc
        return 0
