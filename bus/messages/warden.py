"""The links of the warden, which starts, stops and ends processes: to the hypervisor, to Dom0, to the wardens of containers (agents),
and to operators."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bus.messages.domain import I64, U32, U64
from bus.messages.envelope import MAX_DESCRIPTORS, Message, registry

Name = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.:-]+$")]
Stroke = Literal["stop", "cont", "kill", "usr1"]
MAX_AGENTS = 64
"""Containers of one machine."""


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
    kind: Annotated[str, Field(max_length=16, pattern=r"^[a-z]*$")] = ""
    """What kind of domain it serves ('pv', 'hvm', 'native'; 'driver': a driver domain that is a guest program; '': a device): by it
    the warden chooses among containers."""


class Signal(Message):
    """Stop, continue or kill a process. 'usr1' (SIGUSR1) means something to the demo's device alone; others end by it."""

    KIND: ClassVar[str] = "signal"
    id: U64
    what: Stroke


class Started(Message):
    """A process of that id runs, with this process id (in the pid namespace where it runs) and user id.

    `fds` names the descriptors that come along: 'listener' (the endpoint's), and 'stat', 'schedstat': the process's files of that
    name in proc(5), by which its CPU time and state are read where its process id means nothing (`bus.process_view`)."""

    KIND: ClassVar[str] = "started"
    id: U64
    pid: U32
    uid: U32
    fds: Annotated[list[Name], Field(max_length=3)] = []


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


class Enrol(Message):
    """First message of an agent, the warden of one container. Who it is follows from the socket that it came on and the uid that the
    kernel recorded for the connection, not from this."""

    KIND: ClassVar[str] = "enrol"
    pid: U32


class Running(Message):
    """From an agent: the process that a `Spawn` asked for has its `Begin`. Comes with three descriptors: a pidfd, and the process's
    files 'stat' and 'schedstat' in proc(5)."""

    KIND: ClassVar[str] = "running"
    id: U64
    pid: U32


class Leave(Message):
    """To an agent: end, and with it the container. The engine's restart policy brings it back."""

    KIND: ClassVar[str] = "leave"


class AskStatus(Message):
    """From an operator: which containers are there, and what runs in them?"""

    KIND: ClassVar[str] = "ask_status"
    token: U64


class AgentStatus(Message):
    """One container, as the warden knows it."""

    KIND: ClassVar[str] = "agent_status"
    name: Name
    uid: U32
    connected: bool
    enrolled: U64
    """How often its agent has enrolled: one more than the container was restarted."""
    role: Annotated[str, Field(max_length=64)] = ""
    """Of the process in it; empty: none."""
    domain: U32 = 0
    pid: U32 = 0
    """In the container's own pid namespace."""
    begun: U64 = 0
    """How many processes have begun in it."""


class Status(Message):
    """The answer to `AskStatus`."""

    KIND: ClassVar[str] = "status"
    token: U64
    agents: Annotated[list[AgentStatus], Field(max_length=MAX_AGENTS)]


class Strike(Message):
    """From an operator: do that to the process in the container of that name; 'leave': end the container itself."""

    KIND: ClassVar[str] = "strike"
    token: U64
    agent: Name
    what: Stroke | Literal["leave"]


class Struck(Message):
    """The answer to `Strike`: an empty `error`, or why nothing was done."""

    KIND: ClassVar[str] = "struck"
    token: U64
    error: Annotated[str, Field(max_length=200)] = ""


TO_WARDEN = registry(Spawn, Signal, Halt)
FROM_WARDEN = registry(Started, Ended)
TO_PROCESS = registry(Begin)
FROM_DOM0 = registry(Deposit)
TO_DOM0 = registry(Deposited)
FROM_AGENT = registry(Enrol, Running, Ended)
TO_AGENT = registry(Spawn, Signal, Leave)
FROM_OPERATOR = registry(AskStatus, Strike)
TO_OPERATOR = registry(Status, Struck)
