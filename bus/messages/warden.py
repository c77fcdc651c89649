"""The link between the hypervisor (or the toolstack) and the warden, which starts, stops and ends processes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bus.messages.domain import I64, U32, U64
from bus.messages.envelope import MAX_DESCRIPTORS, Message, registry

Name = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.:-]+$")]


class Spawn(Message):
    """Start a process. `id` names it from now on; its descriptors travel with this message, in the order of `fds`.

    `endpoint`: a file name in the machine's bus directory; the warden makes a listening socket there that this process's uid alone
    can reach, and sends it back with `Started`."""

    KIND: ClassVar[str] = "spawn"
    id: U64
    role: Name
    name: Name
    domain: U32
    fds: Annotated[list[Name], Field(max_length=MAX_DESCRIPTORS)]
    settings: Annotated[dict[str, Any], Field(max_length=64)] = {}
    endpoint: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_-]*$")] = ""


class Signal(Message):
    """Stop, continue or kill a process."""

    KIND: ClassVar[str] = "signal"
    id: U64
    what: Literal["stop", "cont", "kill"]


class Started(Message):
    """A process of that id runs, with this process id and user id."""

    KIND: ClassVar[str] = "started"
    id: U64
    pid: U32
    uid: U32


class Ended(Message):
    """A process ended: its exit status, or minus the signal that killed it."""

    KIND: ClassVar[str] = "ended"
    id: U64
    status: I64
    text: Annotated[str, Field(max_length=4000)] = ""


class Begin(Message):
    """First packet that a started process reads: what it is. Descriptors as in `Spawn`."""

    KIND: ClassVar[str] = "begin"
    role: Name
    name: Name
    domain: U32
    fds: Annotated[list[Name], Field(max_length=MAX_DESCRIPTORS)]
    settings: Annotated[dict[str, Any], Field(max_length=64)] = {}


class Deposit(Message):
    """From Dom0: descriptors (a disk's files) that the device process of that name will be given when it is started, each time.
    A second deposit of the name replaces the first. Answered by `Deposited`."""

    KIND: ClassVar[str] = "deposit"
    name: Name
    fds: Annotated[list[Name], Field(max_length=MAX_DESCRIPTORS)]
    settings: Annotated[dict[str, Any], Field(max_length=64)] = {}


class Deposited(Message):
    """The deposit was taken."""

    KIND: ClassVar[str] = "deposited"
    name: Name


class Halt(Message):
    """Machine goes down: the warden ends everything it started and then itself."""

    KIND: ClassVar[str] = "halt"
    reason: Annotated[str, Field(max_length=400)] = ""


TO_WARDEN = registry(Spawn, Signal, Halt)
FROM_WARDEN = registry(Started, Ended)
TO_PROCESS = registry(Begin)
FROM_DOM0 = registry(Deposit)
TO_DOM0 = registry(Deposited)
