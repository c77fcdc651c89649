"""Containers and the processes in them, as the machine's warden keeps them. No I/O: what happened goes in, actions come out.

A container takes one process at a time, of one role. A process that no container can take at present waits for one, within a bound.
An agent is believed about its own container alone: what it says of other processes, twice, or out of order is a `Lie`, and costs it
its link. A process counts as ended when the kernel says so (its pidfd), not when a link breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from bus.messages.warden import MAX_AGENTS

PLACE_S: Final = 45.0
"""How long a process waits for a container: one is restarted by its engine meanwhile."""
BEGIN_S: Final = 30.0
"""How long an agent may take to hand over a `Begin`."""
LOST_S: Final = 1.0
"""How long a process of which there is no pidfd is given to die with its container."""
_SPEC: Final = re.compile(r"([a-z0-9-]{1,32}):(\d{1,10}):(\d{1,10}):([a-z0-9]{1,16})(?:=([a-z]{1,16}))?")
SAY_S: Final = 5.0
"""How long an agent may take to say how its process ended, of which the kernel says that it did."""
KILLED: Final = -9


class Lie(Exception):
    """An agent said what cannot be true."""


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """A container that belongs to the machine."""

    name: str
    uid: int
    """Of its agent."""
    gid: int
    """What its processes may reach belongs to this group."""
    role: str
    kind: str
    """Only domains of this kind; '' for any."""

    @classmethod
    def parse(cls, text: str) -> AgentSpec:
        """From NAME:UID:GID:ROLE[=KIND]. ValueError."""
        found = _SPEC.fullmatch(text)
        if found is None:
            raise ValueError(f"agent {text!r}: expected NAME:UID:GID:ROLE or NAME:UID:GID:ROLE=KIND")
        name, uid, gid, role, kind = found.groups()
        return cls(name, int(uid), int(gid), role, kind or "")


class State(Enum):
    """Of a process."""

    QUEUED = "waits for a container"
    GIVEN = "given to an agent"
    RUNNING = "runs"
    LOST = "its agent is gone"


@dataclass(slots=True)
class Process:
    """One that the hypervisor asked for."""

    id: int
    role: str
    kind: str
    domain: int
    state: State
    deadline: float | None
    agent: Agent | None = None
    pid: int = 0
    watched: bool = False
    """There is a pidfd."""


@dataclass(slots=True)
class Agent:
    """A container."""

    spec: AgentSpec
    connected: bool = False
    enrolled: int = 0
    begun: int = 0
    process: Process | None = None


@dataclass(frozen=True, slots=True)
class Give:
    """Hand this process over to this agent."""

    id: int
    agent: str


@dataclass(frozen=True, slots=True)
class Over:
    """The process is gone: tell the hypervisor."""

    id: int
    status: int
    text: str


@dataclass(frozen=True, slots=True)
class Pass:
    """Pass a signal on to an agent."""

    id: int
    agent: str
    what: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Break the link to an agent."""

    agent: str
    why: str


Action = Give | Over | Pass | Drop


@dataclass(slots=True)
class Roster:
    """All containers and processes of a machine."""

    agents: dict[str, Agent] = field(default_factory=dict)
    processes: dict[int, Process] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: Iterable[AgentSpec]) -> Roster:
        """ValueError: a name twice, too many, or one role that nobody has."""
        agents: dict[str, Agent] = {}
        for spec in specs:
            if spec.name in agents:
                raise ValueError(f"agent {spec.name!r} is named twice")
            agents[spec.name] = Agent(spec)
        if len(agents) > MAX_AGENTS:
            raise ValueError(f"{len(agents)} agents, over the limit of {MAX_AGENTS}")
        for role in ("hypervisor", "dom0"):
            if role not in {agent.spec.role for agent in agents.values()}:
                raise ValueError(f"no agent has the role {role}")
        return cls(agents)

    # ------------------------------------------------------------------ the hypervisor

    def spawn(self, now: float, number: int, role: str, kind: str, domain: int) -> list[Action]:
        """A process is wanted. Lie: its number is in use."""
        if number in self.processes:
            raise Lie(f"process id {number} is in use")
        process = Process(number, role, kind, domain, State.QUEUED, now + PLACE_S)
        self.processes[number] = process
        if not any(_fits(agent.spec, process) for agent in self.agents.values()):
            return self._over(
                now, process, 1, f"no container of this machine takes a process of role {role} {kind}".strip()
            )
        return self._place(now)

    def signal(self, now: float, number: int, what: str) -> list[Action]:
        """A process is to get a signal."""
        process = self.processes.get(number)
        if process is None or process.state is State.LOST:
            return []
        if process.state is State.QUEUED:
            return (
                self._over(now, process, KILLED, "ended before a container took it") if what == "kill" else []
            )
        assert process.agent is not None
        return [Pass(number, process.agent.spec.name, what)]

    # ------------------------------------------------------------------ agents

    def enrolled(self, now: float, name: str) -> list[Action]:
        """An agent is there, with nothing running in its container."""
        agent = self.agents[name]
        if agent.connected:
            raise Lie("enrolled twice")
        agent.connected = True
        agent.enrolled += 1
        return self._place(now)

    def running(self, name: str, number: int, pid: int, *, watched: bool) -> Process:
        """The process has its `Begin`. Lie."""
        process = self._own(name, number)
        if process.state is not State.GIVEN:
            raise Lie(f"process {number} began twice")
        process.state, process.deadline = State.RUNNING, None
        process.pid, process.watched = pid, watched
        return process

    def ended(
        self, now: float, name: str, number: int, status: int, text: str, *, dead: bool
    ) -> list[Action]:
        """An agent says that its process ended; `dead`: the kernel says so too, or there is nothing to ask it by. Lie."""
        process = self._own(name, number)
        if not dead:
            raise Lie(f"process {number} is said to have ended, and lives")
        return self._over(now, process, status, text)

    def lost(self, now: float, name: str) -> list[Action]:
        """The link to an agent broke: its container ended, or is about to end what runs in it."""
        agent = self.agents[name]
        agent.connected = False
        process = agent.process
        if process is not None and process.state in (State.GIVEN, State.RUNNING):
            process.state = State.LOST
            # One that the kernel tells of is waited for: what is frozen with its container is not dead.
            process.deadline = None if process.watched else now + LOST_S
        return []

    def dead(self, now: float, number: int) -> list[Action]:
        """The kernel says that a process ended. While its agent is there, the agent says how."""
        process = self.processes.get(number)
        if process is not None and process.state is State.LOST:
            return self._over(now, process, KILLED, "its container ended")
        if process is not None and process.state is State.RUNNING:
            process.deadline = now + SAY_S
        return []

    def _own(self, name: str, number: int) -> Process:
        process = self.processes.get(number)
        if process is None or process.agent is not self.agents[name]:
            raise Lie(f"process {number} is not in this container")
        return process

    # ------------------------------------------------------------------ time

    def next_deadline(self) -> float | None:
        """When `tick` is due."""
        return min((p.deadline for p in self.processes.values() if p.deadline is not None), default=None)

    def tick(self, now: float) -> list[Action]:
        """What took too long."""
        actions: list[Action] = []
        for process in list(self.processes.values()):
            if process.deadline is None or now < process.deadline:
                continue
            process.deadline = None
            if process.state is State.QUEUED:
                text = f"no container for role {process.role} was free within {PLACE_S:.0f} s"
                actions += self._over(now, process, 1, text)
            elif process.state is State.GIVEN:
                assert process.agent is not None
                actions.append(Drop(process.agent.spec.name, f"did not begin process {process.id}"))
            elif process.state is State.RUNNING:
                assert process.agent is not None
                actions.append(Drop(process.agent.spec.name, f"did not say how process {process.id} ended"))
            else:
                actions += self._over(now, process, KILLED, "its container ended before it began")
        return actions

    # ------------------------------------------------------------------

    def _over(self, now: float, process: Process, status: int, text: str) -> list[Action]:
        del self.processes[process.id]
        if process.agent is not None:
            process.agent.process = None
        return [Over(process.id, status, text), *self._place(now)]

    def _place(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for process in self.processes.values():
            if process.state is not State.QUEUED:
                continue
            free = [
                agent
                for agent in self.agents.values()
                if agent.connected and agent.process is None and _fits(agent.spec, process)
            ]
            if free:
                # One that is made for this kind before one that takes any.
                agent = max(free, key=lambda agent: agent.spec.kind == process.kind)
                agent.process, process.agent = process, agent
                agent.begun += 1
                process.state, process.deadline = State.GIVEN, now + BEGIN_S
                actions.append(Give(process.id, agent.spec.name))
        return actions


def _fits(spec: AgentSpec, process: Process) -> bool:
    return spec.role == process.role and spec.kind in ("", process.kind)
