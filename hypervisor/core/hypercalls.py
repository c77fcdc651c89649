"""The dispatcher: one call in, one reply out, now or later.

What a call is, its wire form, and who may make it, is said by the table (`bus.abi.hypercalls`); the
dispatcher checks that, takes the data apart, and hands it to the subsystem that registered for the number
and command. A handler returns a result, or None if it answers later (`Call.answer`); it refuses by
XenError. Data of the wrong form is EINVAL. Any other exception is a bug, and propagates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from errno import EAGAIN, EINVAL, ENOSYS, EPERM, ESRCH
from typing import Any, Final, NamedTuple

from bus.abi.hypercalls import HYPERCALLS
from bus.abi.hypercalls_model import (
    Command,
    Form,
    Guests,
    Hypercall,
    Message,
    Privilege,
    State,
    Where,
    WireError,
    check_counts,
    decode,
    encode,
)
from bus.addresses import DomId
from hypervisor.core.domains import Domain, DomainTable, Dying, Kind
from hypervisor.core.effects import Reply
from hypervisor.core.errors import XenError
from hypervisor.core.outbox import Outbox

MAX_WAITING: Final = 256
"""Calls of one domain that may wait for others. Its process makes one at a time for each vCPU; one that does not wait for its answers
gets EAGAIN, for what waits is kept."""

_DEVICES: Final = frozenset((Privilege.HARDWARE, Privilege.PIRQ))


class Result(NamedTuple):
    """Xen's return value and the reply's data in its wire form."""

    rc: int
    data: bytes = b""


@dataclass(slots=True)
class Call:
    """One hypercall, from the domain whose link it came by."""

    now: int
    domain: Domain
    vcpu: int
    token: int
    nr: int
    command: Command
    message: Message
    _send: Callable[[Reply], None] = field(repr=False)
    answered: bool = False
    life: int = 0
    """Of the domain, when the call was made."""
    waits: bool = False
    """Its reply comes later."""
    settled: Callable[[Call], None] = lambda call: None
    """Told when a call that waits is answered."""

    @property
    def item(self) -> Any:
        """The argument structure (of a command of form STRUCT)."""
        return self.message.items[0]

    @property
    def payload(self) -> Any:
        """The member of the structure's union that belongs to the command."""
        return self.message.payload

    def array(self, handle: str) -> bytes:
        """The bytes of an array of the request."""
        return self.message.arrays[handle]

    def reply(
        self,
        rc: int,
        item: Any = None,
        *,
        payload: Any = None,
        arrays: Mapping[str, bytes] | None = None,
        items: Sequence[Any] | None = None,
    ) -> Result:
        """The result with the updated structure(s), payload and OUT arrays; what is not given is as it
        came."""
        if self.command.form is Form.NONE:
            return Result(rc)
        if items is None:
            if self.command.form is Form.LIST:
                items = self.message.items
            else:
                item = self.item if item is None else item
                if payload is not None and self.command.payload is not None:
                    packed = self.command.payload.pack(payload)
                    item = _replace(item, self.command.payload_field.split("."), packed)
                items = (item,)
        return Result(rc, encode(self.command, items, arrays, reply=True))

    def answer(self, result: Result) -> None:
        """Send the reply. Exactly once a call. Nobody gets it if the process that called is gone: tokens are a process's own,
        and its successor may wait for the answer to another call with the same one."""
        if self.answered:
            raise AssertionError(f"{self.command.name} answered twice")
        self.answered = True
        if self.waits:
            self.settled(self)
        if self.domain.process_alive and self.domain.life == self.life:
            self._send(Reply(self.domain.domid, self.token, result.rc, result.data))


def _replace(item: Any, path: list[str], packed: bytes) -> Any:
    """The structure with the union at `path` holding these bytes, filled up with zeros."""
    inner = getattr(item, path[0])
    value = _replace(inner, path[1:], packed) if len(path) > 1 else packed.ljust(len(inner), b"\0")
    return item._replace(**{path[0]: value})


Handler = Callable[[Call], Result | None]
_GUESTS = {Kind.PV: Guests.PV, Kind.HVM: Guests.HVM | Guests.PVH, Kind.NATIVE: Guests.PVH}


def _callers(commands: Mapping[tuple[int, int], Command]) -> dict[tuple[int, int], frozenset[Kind]]:
    """The kinds of domains that may call each. Looked up for each call: an operation on flags takes longer than all other checks together."""
    return {
        key: frozenset(kind for kind, guests in _GUESTS.items() if command.guests & guests)
        for key, command in commands.items()
    }


_COMMANDS: Final = {(h.number, c.number): c for h in HYPERCALLS.values() for c in h.commands}
_CALLERS: Final = _callers(_COMMANDS)


class Dispatcher:
    """Handlers by (number, command number), in front of them the table's checks."""

    def __init__(self, table: Mapping[int, Hypercall], domains: DomainTable, outbox: Outbox) -> None:
        self._table = table
        self._domains = domains
        self._outbox = outbox
        own = table is not HYPERCALLS
        self._commands = (
            {(h.number, c.number): c for h in table.values() for c in h.commands} if own else _COMMANDS
        )
        self._callers = _callers(self._commands) if own else _CALLERS
        self._handlers: dict[tuple[int, int], Handler] = {}
        self._waiting: dict[DomId, int] = {}
        """Calls of each domain that are not answered yet."""
        self.counts: dict[DomId, dict[int, int]] = {}
        """Calls by domain and hypercall number."""
        self.prechecks: dict[int, Callable[[Call], None]] = {}
        """By hypercall number: what is checked before the caller's privilege (the interface version)."""
        self.has_device: Callable[[Domain], bool] = lambda domain: False
        """Does the domain own a device (Privilege.HARDWARE)? Set by whoever knows."""
        self.before_reply: Callable[[], None] = lambda: None
        """Called before each reply to a call: what the call changed is told first."""

    def register(self, nr: int, cmd: int, handler: Handler) -> None:
        """Serve a command. AssertionError if somebody does already, or the table does not know it."""
        if (nr, cmd) in self._handlers:
            raise AssertionError(f"hypercall {nr} command {cmd} is served already")
        if (nr, cmd) not in self._commands:
            raise AssertionError(f"hypercall {nr} command {cmd} is not in the table")
        self._handlers[nr, cmd] = handler

    def registered(self) -> set[tuple[int, int]]:
        """(number, command) of all that is served."""
        return set(self._handlers)

    def unserved(self) -> list[str]:
        """Commands that the table promises to be served by the hypervisor, and nobody registered for."""
        return [
            f"{self._table[nr].name}/{command.name}"
            for (nr, cmd), command in self._commands.items()
            if command.where is Where.HYPERVISOR
            and command.state is not State.REFUSED
            and (nr, cmd) not in self._handlers
        ]

    def call(self, now: int, domid: DomId, vcpu: int, token: int, nr: int, cmd: int, data: bytes) -> None:
        """Take one call. The reply comes as an effect. ESRCH for a domain that is being destroyed."""
        domain = self._domains.get(domid)
        if domain is None or domain.dying is not Dying.ALIVE:
            self._outbox.emit(Reply(domid, token, -ESRCH))
            return
        if not domain.process_alive:  # it was still under way when the process ended
            return
        if self._waiting.get(domid, 0) >= MAX_WAITING:
            self._outbox.emit(Reply(domid, token, -EAGAIN))
            return
        call: Call | None = None
        try:
            call, handler = self._admit(now, domain, vcpu, token, nr, cmd, data)
            result = handler(call)
        except XenError as error:
            result = Result(-error.errno, error.data)
        if result is None:
            if call is not None and not call.answered:
                call.waits = True
                self._waiting[domid] = self._waiting.get(domid, 0) + 1
            return
        if call is not None:
            call.answer(result)
        else:
            self._reply(Reply(domid, token, result.rc, result.data))

    def _reply(self, reply: Reply) -> None:
        self.before_reply()
        self._outbox.emit(reply)

    def _admit(
        self, now: int, domain: Domain, vcpu: int, token: int, nr: int, cmd: int, data: bytes
    ) -> tuple[Call, Handler]:
        """The table's checks, in Xen's order: does it exist for this kind of guest, may the caller, is it
        served.
        """
        hypercall = self._table.get(nr)
        if hypercall is None:
            raise XenError(ENOSYS)
        counts = self.counts.setdefault(domain.domid, {})
        counts[nr] = counts.get(nr, 0) + 1
        command = self._commands.get((nr, cmd))
        if command is None:
            raise XenError(hypercall.unknown or ENOSYS)
        if domain.kind not in self._callers[nr, cmd] or (vcpu and domain.vcpu(vcpu) is None):
            raise XenError(ENOSYS)
        served = command.state is not State.REFUSED
        try:
            message = decode(command, data) if served or nr in self.prechecks else Message((), None, {})
            if served and command.form is Form.STRUCT and message.items:
                check_counts(
                    command, message.items[0]
                )  # no handler makes an array that no message could carry
        except WireError as error:
            raise XenError(EINVAL, str(error)) from None
        call = Call(
            now,
            domain,
            vcpu,
            token,
            nr,
            command,
            message,
            self._reply,
            life=domain.life,
            settled=self._settled,
        )
        precheck = self.prechecks.get(nr)
        if precheck is not None:
            precheck(call)
        if command.privilege is Privilege.CONTROL and not domain.privileged:
            raise XenError(EPERM)
        if command.privilege in _DEVICES and not domain.privileged and not self.has_device(domain):
            if domain.kind is not Kind.PV:
                raise XenError(ENOSYS)
            if command.privilege is Privilege.HARDWARE:
                raise XenError(EPERM)
        if not served:
            raise XenError(command.refusal)
        handler = self._handlers.get((nr, cmd))
        if handler is None:  # not built into this machine (the scheduler, the IOMMU, ioreq servers)
            raise XenError(ENOSYS)
        return call, handler

    def _settled(self, call: Call) -> None:
        left = self._waiting.get(call.domain.domid, 1) - 1
        if left > 0:
            self._waiting[call.domain.domid] = left
        else:
            self._waiting.pop(call.domain.domid, None)

    def forget(self, domid: DomId) -> None:
        """Drop a removed domain's counters."""
        self.counts.pop(domid, None)
        self._waiting.pop(domid, None)
