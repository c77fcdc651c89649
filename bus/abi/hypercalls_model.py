"""What an entry of the table of hypercalls says, as types, and the wire form that follows from it.

Wire form (docs/decisions/0001): the argument structure's bytes as the guest wrote them, then the arrays
that its guest handles point to, in the order of `Command.arrays`, each exactly as long as its count says.
The handles themselves are meaningless to the receiver. The reply has the updated structure and the arrays
that are written. A command of form LIST takes as many structures as fit the data, and the reply has the
same number of them.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from bus.abi.hvm.dm_op import xen_dm_op
from bus.abi.layout import Layout, LayoutError, u16, u32, u64

MAX_WIRE: Final = 60 * 1024
"""Most bytes of one request or reply (`bus.messages.envelope.MAX_DATA`). A domain's process splits longer
lists."""


MAX_FRAMES: Final = 1024
"""Most frames that one memory_op of an unprivileged domain works on, as Xen's continuations bound it: the hypervisor serves others in
between. A domain's process divides what is more."""


class Guests(enum.Flag):
    """Kinds of guest that have the hypercall; for the others the number is not there (-ENOSYS)."""

    PV = enum.auto()
    HVM = enum.auto()
    PVH = enum.auto()
    ALL = PV | HVM | PVH
    TRANSLATED = HVM | PVH


class Privilege(enum.Enum):
    """Who may call. Everybody else gets -EPERM, unless the entry says otherwise."""

    ANY = "any domain"
    TARGET = "any domain for itself; for another, the control domain"
    DEVICE_MODEL = "the control domain, or the device model of the target (XEN_DOMCTL_set_target)"
    CONTROL = "the control domain"
    HARDWARE = "the control domain, or a domain that owns the device"
    PIRQ = "any PV domain; another that owns a device"


class Where(enum.Enum):
    """Which process serves it (docs/architecture.md, section 3)."""

    LOCAL = "domain process"
    HYPERVISOR = "hypervisor"


class State(enum.Enum):
    """How much of it works."""

    SERVED = "served"
    PARTLY = "partly"
    REFUSED = "refused"


class Form(enum.Enum):
    """What crosses the bus."""

    NONE = "nothing"
    STRUCT = "the structure, then its arrays"
    LIST = "structures, one after another"


class Direction(enum.Flag):
    """Whether an array travels in the request, in the reply, or in both."""

    IN = enum.auto()
    OUT = enum.auto()
    BOTH = IN | OUT


class WireError(ValueError):
    """Data does not have the form that the table gives. A dispatcher answers -EINVAL."""


class Error(NamedTuple):
    """One errno that the call can return, and when."""

    errno: int
    """A positive XEN_E* of bus.abi.errno; the call returns it negated."""
    cause: str


@dataclass(frozen=True, slots=True)
class ArrayArg:
    """An array to which a guest handle in the argument structure points."""

    handle: str
    """Path of the handle in the structure: "frame_list", "in_.extent_start". For a command with a payload,
    in that."""
    element: Layout[Any] | int
    """What it holds: a structure, or so many bytes."""
    count: str | int
    """Path of the number of elements, or the number."""
    direction: Direction
    limit: int
    """Most elements in one message."""
    reply_count: str = ""
    """Path of their number in the reply, where the call changes it; else `count` of the request's
    structure."""

    bits: bool = False
    """The count is of bits; the elements are the bytes that hold them, the lowest bit first."""
    optional: bool = False
    """The array is absent where the handle is null (the guest asks for a size only)."""
    room: bool = False
    """The count is how much room there is, however much: more than `limit` goes on the wire as `limit`."""

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.element if isinstance(self.element, int) else self.element.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sub-command; a hypercall without any has a single one, number 0."""

    number: int
    name: str
    where: Where
    argument: Layout[Any] | None = None
    form: Form = Form.NONE
    payload: Layout[Any] | None = None
    """For domctl, sysctl, platform_op: the member of `argument.u` that belongs to this command."""
    payload_field: str = "u"
    arrays: tuple[ArrayArg, ...] = ()
    guests: Guests = Guests.ALL
    privilege: Privilege = Privilege.ANY
    state: State = State.SERVED
    refusal: int = 0
    """For REFUSED: the errno. A privilege, where there is one, is checked before."""
    errors: tuple[Error, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypercall:
    """One of the 64 numbers."""

    number: int
    name: str
    """As in xen.h, without the prefix `__HYPERVISOR_`."""
    arguments: tuple[str, ...] = ()
    """In RDI, RSI, RDX, R10, R8 (PV) or the same (HVM, PVH in 64-bit mode)."""
    commands: tuple[Command, ...] = ()
    command_argument: int = -1
    """Index in `arguments` of the sub-command's number; -1 for none; -2: a field `cmd` of the structure."""
    unknown: int = 0
    """Errno for a sub-command that is not in `commands`."""
    note: str = ""

    def command(self, number: int) -> Command | None:
        """The sub-command with that number, or None. A walk: use `hypercalls.lookup` where speed counts."""
        return next((c for c in self.commands if c.number == number), None)


class domid_arg(NamedTuple):
    """Wire form of a call whose argument is a bare domain id."""

    domid: u16


class vcpu_arg(NamedTuple):
    """Wire form of a vCPU operation on another vCPU of the domain."""

    vcpuid: u32


class console_io_arg(NamedTuple):
    """Wire form of console_io: the number of bytes, which then follow (write) or come in the reply (read)."""

    length: u32


class dm_op_arg(NamedTuple):
    """Wire form of dm_op: the target, then the first buffer. A second buffer's content is an array."""

    domid: u16
    op: xen_dm_op


class block_arg(NamedTuple):
    """Wire form of SCHEDOP_block: when the vCPU wants to be woken for its own timer."""

    deadline: u64
    """System time in nanoseconds; 0 for never."""


DOMID_ARG: Final = Layout(domid_arg)
VCPU_ARG: Final = Layout(vcpu_arg)
CONSOLE_IO_ARG: Final = Layout(console_io_arg)
DM_OP_ARG: Final = Layout(dm_op_arg)
BLOCK_ARG: Final = Layout(block_arg)


class Message(NamedTuple):
    """A request or reply taken apart."""

    items: tuple[Any, ...]
    """The structures: one for STRUCT, any number for LIST, none for NONE."""
    payload: Any
    """The member of `items[0].u` for commands that have a payload, else None."""
    arrays: Mapping[str, bytes]
    """Bytes of each array, by the path of its handle."""


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _root(command: Command, item: Any) -> Any:
    """What the paths of the arrays start from."""
    if command.payload is None:
        return item
    return command.payload.unpack(_at(item, command.payload_field))


def _lengths(command: Command, root: Any, reply: bool) -> list[tuple[str, int]]:
    out = []
    for array in command.arrays:
        if (Direction.OUT if reply else Direction.IN) not in array.direction:
            continue
        if array.optional and not _at(root, array.handle):
            continue
        path = (reply and array.reply_count) or array.count
        count = path if isinstance(path, int) else int(_at(root, path))
        if count > array.limit:
            raise WireError(
                f"{command.name}: {count} elements of {array.handle}, at most {array.limit} a message"
            )
        out.append((array.handle, (count + 7) // 8 if array.bits else count * array.size))
    return out


def check_counts(command: Command, item: Any) -> None:
    """WireError if an array of the request or of its reply is longer than a message may hold."""
    if not command.arrays:
        return
    root = _root(command, item)
    for reply in (False, True):
        _lengths(command, root, reply)


def decode(command: Command, data: bytes, *, reply: bool = False) -> Message:
    """Take a request's (or reply's) data apart. WireError if its length is not what its counts say."""
    if len(data) > MAX_WIRE:
        raise WireError(f"{command.name}: {len(data)} bytes, at most {MAX_WIRE}")
    if command.form is Form.NONE or command.argument is None:
        if data:
            raise WireError(f"{command.name} has no data, {len(data)} bytes given")
        return Message((), None, {})
    size = command.argument.size
    if command.form is Form.LIST:
        if len(data) % size:
            raise WireError(f"{command.name}: {len(data)} bytes are not a number of structures of {size}")
        return Message(tuple(command.argument.unpack_array(data, len(data) // size)), None, {})
    try:
        item = command.argument.unpack(data)
    except LayoutError as error:
        raise WireError(f"{command.name}: {error}") from None
    root = _root(command, item)
    arrays: dict[str, bytes] = {}
    position = size
    for handle, length in _lengths(command, root, reply):
        arrays[handle] = data[position : position + length]
        position += length
    if position != len(data):
        raise WireError(f"{command.name}: {position} bytes expected, {len(data)} given")
    return Message((item,), root if command.payload is not None else None, arrays)


def encode(
    command: Command, items: Sequence[Any], arrays: Mapping[str, bytes] | None = None, *, reply: bool = False
) -> bytes:
    """Put a request (or reply) together. WireError if an array has not the length that its count says,
    LayoutError if a value does not fit its field."""
    if command.form is Form.NONE or command.argument is None:
        if items:
            raise WireError(f"{command.name} has no data")
        return b""
    if command.form is Form.STRUCT and not command.arrays and len(items) == 1 and not arrays:
        return command.argument.pack(items[0])  # most of them; no structure is as long as a message may be
    parts = [command.argument.pack(item) for item in items]
    if command.form is Form.STRUCT:
        if len(parts) != 1:
            raise WireError(f"{command.name}: one structure, {len(parts)} given")
        given = dict(arrays or {})
        for handle, length in _lengths(command, _root(command, items[0]), reply):
            content = given.pop(handle, b"")
            if len(content) != length:
                raise WireError(f"{command.name}: {handle} has {len(content)} bytes, {length} expected")
            parts.append(content)
        if given:
            raise WireError(f"{command.name} has no array {', '.join(given)} here")
    data = b"".join(parts)
    if len(data) > MAX_WIRE:
        raise WireError(f"{command.name}: {len(data)} bytes, at most {MAX_WIRE}")
    return data
