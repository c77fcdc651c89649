"""The machine's warden where each process is in a container of its own: it starts none, and has their agents do it.

    python -m toolstack.warden.central domicile-warden MACHINE --agent NAME:UID:GID:ROLE[=KIND] ... [--operators GID] [--owner FD]
        [--settings JSON] [--scratch DIR]

It needs no privilege. An agent connects to `agents/NAME` in the machine's directory, a socket that the group GID alone reaches; the
uid that the kernel recorded for the connection must be UID. Descriptors pass both ways over that link.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bus import privileges
from bus.abi.xen import DOMID_FIRST_RESERVED
from bus.messages.envelope import BadMessage, Message
from bus.messages.warden import (
    FROM_AGENT,
    FROM_OPERATOR,
    AgentStatus,
    AskStatus,
    Ended,
    Enrol,
    Leave,
    Running,
    Signal,
    Spawn,
    Started,
    Status,
    Strike,
    Struck,
)
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, peer_credentials
from bus.process_view import is_proc_file
from toolstack.warden.beat import Beat
from toolstack.warden.roster import Action, AgentSpec, Give, Lie, Over, Pass, Roster, State
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.warden import BURST, HYPERVISOR_ID, Warden

ENROL_S: Final = 5.0
"""How long a connection may take to say who it is."""
AGAIN_S: Final = 0.5
"""An agent may connect again after so long: one that comes and goes without end costs little."""
MAX_OPERATORS: Final = 16
END_S: Final = 5.0


@dataclass(slots=True)
class _Seat:
    """A container's place: its listening socket, and the link of its agent."""

    spec: AgentSpec
    listener: socket.socket
    link: PacketLink | None = None
    enrolled: bool = False
    deadline: float | None = None
    """For its `Enrol`."""
    closed_until: float = 0.0


@dataclass(slots=True)
class _Wanted:
    """A process's order and what belongs to it."""

    order: Spawn
    fds: list[int]
    pidfd: int | None = None


class CentralWarden(Warden):
    """Processes run where agents are."""

    def __init__(
        self,
        runtime: RuntimeDirectory,
        listeners: dict[str, socket.socket],
        specs: Sequence[AgentSpec],
        *,
        operators: int | None,
        scratch: str,
    ) -> None:
        """`operators`: the gid of those who may use the machine. `scratch`: a directory that Dom0's process may write. ValueError."""
        super().__init__(runtime, listeners)
        self.roster = Roster.of(specs)
        self._operators_gid = operators
        self._scratch = scratch
        self._wanted: dict[int, _Wanted] = {}
        self._seats: dict[str, _Seat] = {}
        self._operators: dict[int, PacketLink] = {}
        self._beat = Beat()
        directory = runtime.root / "agents"
        directory.mkdir(mode=0o711)
        directory.chmod(0o711)
        for spec in specs:
            listener = _listening(directory / spec.name, spec.gid)
            seat = self._seats[spec.name] = _Seat(spec, listener)
            self._register(listener, lambda seat=seat: self._accept(seat))  # type: ignore[misc]
        self._operators_listener = _listening(runtime.root / "warden", operators)
        self._register(self._operators_listener, self._accept_operator)
        if operators is not None:
            for path in (runtime.control, runtime.xenstore):
                _share(path, operators)

    # ------------------------------------------------------------------ what the base asks for

    def _spawn(self, order: Spawn, descriptors: Sequence[int]) -> None:
        wanted = _Wanted(order, [os.dup(fd) for fd in descriptors])
        try:
            actions = self.roster.spawn(time.monotonic(), order.id, order.role, order.kind, order.domain)
        except Lie as lie:
            close_all(wanted.fds)
            raise BadMessage(str(lie)) from None
        self._wanted[order.id] = wanted
        if not actions:
            _say(f"{order.role} waits for its container")
        self._carry_out(actions)

    def _signal(self, order: Signal) -> None:
        self._carry_out(self.roster.signal(time.monotonic(), order.id, order.what))

    def _admit(self, path: Path, owner: int) -> None:
        _share(path, owner)

    def _dom0_directories(self) -> dict[str, str]:
        return {"consoles": f"{self._scratch}/console", "state": f"{self._scratch}/state"}

    def _idle(self) -> float:
        now = time.monotonic()
        for seat in self._seats.values():
            if seat.deadline is not None and now > seat.deadline:
                self._drop(seat, "did not say who it is")
            if seat.closed_until and now >= seat.closed_until:
                seat.closed_until = 0.0
                self._register(seat.listener, lambda seat=seat: self._accept(seat))  # type: ignore[misc]
        self._carry_out(self.roster.tick(now))
        up = {p.role for p in self.roster.processes.values() if p.state is State.RUNNING}
        self._beat({"hypervisor", "dom0"} <= up)
        return 0.25 if any(seat.closed_until for seat in self._seats.values()) else 1.0

    def _end_all(self) -> None:
        """Agents end what runs in their containers when their link goes; the kernel tells when it is gone."""
        for seat in self._seats.values():
            seat.listener.close()
            if seat.link is not None:
                seat.link.close()
        poller = select.poll()
        left = {wanted.pidfd for wanted in self._wanted.values() if wanted.pidfd is not None}
        for fd in left:
            poller.register(fd, select.POLLIN)
        deadline = time.monotonic() + END_S
        while left and (remaining := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(remaining * 1000):
                poller.unregister(fd)
                left.discard(fd)
        for wanted in self._wanted.values():
            close_all([*wanted.fds, *([wanted.pidfd] if wanted.pidfd is not None else [])])
        for link in self._operators.values():
            link.close()
        self._operators_listener.close()

    # ------------------------------------------------------------------ agents

    def _accept(self, seat: _Seat) -> None:
        """A connection to a container's socket. The uid is the kernel's word."""
        if seat.link is not None:
            self._hear(seat)  # perhaps the old one is gone, and that was not seen yet
        with contextlib.suppress(OSError):
            sock, _ = seat.listener.accept()
            _, uid, _ = peer_credentials(sock)
            if uid != seat.spec.uid or seat.link is not None:
                sock.close()
                self._close_for_a_while(seat)
                why = f"uid {uid}" if uid != seat.spec.uid else "a second agent while the first lives"
                _say(f"container {seat.spec.name}: refused: {why}")
                return
            seat.link, seat.enrolled = PacketLink(sock, FROM_AGENT), False
            seat.deadline = time.monotonic() + ENROL_S
            self._register(seat.link, lambda: self._hear(seat))

    def _close_for_a_while(self, seat: _Seat) -> None:
        if not seat.closed_until:
            seat.closed_until = time.monotonic() + AGAIN_S
            self._selector.unregister(seat.listener)

    def _hear(self, seat: _Seat) -> None:
        """What an agent says, a bounded number of messages."""
        for _ in range(BURST):
            link = seat.link
            if link is None:
                return
            try:
                packet = link.receive()
            except LinkClosed:
                self._drop(seat, "")
                return
            except BadMessage as error:
                self._drop(seat, f"said what is no message: {error}")
                return
            if packet is None:
                return
            message, fds = packet
            try:
                self._believe(seat, message, fds)
            except Lie as lie:
                self._drop(seat, f"lied: {lie}")
            finally:
                close_all(fds)

    def _believe(self, seat: _Seat, message: Message, fds: list[int]) -> None:
        name, now = seat.spec.name, time.monotonic()
        if isinstance(message, Enrol):
            actions = self.roster.enrolled(now, name)
            seat.enrolled, seat.deadline = True, None
            again = self.roster.agents[name].enrolled
            _say(
                f"container {name} is there (uid {seat.spec.uid})"
                + (f", for the {again}. time" if again > 1 else "")
            )
            self._carry_out(actions)
            return
        if not seat.enrolled:
            raise Lie(f"{message.KIND} before it enrolled")
        if isinstance(message, Running):
            self._running(seat, message, fds)
        elif isinstance(message, Ended):
            wanted = self._wanted.get(message.id)
            dead = wanted is None or wanted.pidfd is None or _is_dead(wanted.pidfd)
            self._carry_out(self.roster.ended(now, name, message.id, message.status, message.text, dead=dead))

    def _running(self, seat: _Seat, message: Running, fds: list[int]) -> None:
        """A process began: the hypervisor gets its listening socket and what shows the process."""
        if len(fds) != 3 or not is_pidfd(fds[0]) or not all(is_proc_file(fd) for fd in fds[1:]):
            raise Lie("a process without a pidfd and its files in /proc")
        process = self.roster.running(seat.spec.name, message.id, message.pid, watched=True)
        wanted = self._wanted[message.id]
        wanted.pidfd = os.dup(fds[0])
        self._register(wanted.pidfd, lambda: self._dead(message.id))
        close_all(wanted.fds)
        wanted.fds = []
        what = f"domain {process.domain}" if process.domain < DOMID_FIRST_RESERVED else process.role
        _say(f"{what} begins in container {seat.spec.name}")
        if message.id == HYPERVISOR_ID:
            return
        order = wanted.order
        listener = self.listen(order.endpoint, seat.spec.gid) if order.endpoint else None
        names = ["stat", "schedstat"] + (["listener"] if listener is not None else [])
        started = Started(id=message.id, pid=message.pid, uid=seat.spec.uid, fds=names)
        self._tell(started, fds[1:] + ([listener.fileno()] if listener is not None else []))
        if listener is not None:
            listener.close()

    def _dead(self, number: int) -> None:
        """A pidfd is readable."""
        wanted = self._wanted.get(number)
        if wanted is None or wanted.pidfd is None or not _is_dead(wanted.pidfd):
            return  # another handler saw to it in the same round
        self._selector.unregister(wanted.pidfd)  # readable for good
        process = self.roster.processes.get(number)
        if process is not None and process.agent is not None:
            self._hear(self._seats[process.agent.spec.name])  # perhaps it has said how it ended
        self._carry_out(self.roster.dead(time.monotonic(), number))

    def _drop(self, seat: _Seat, why: str) -> None:
        """The link to an agent is over."""
        if seat.link is None:
            return
        _say(f"container {seat.spec.name}: {why or 'it is gone'}")
        self._selector.unregister(seat.link)
        seat.link.close()
        seat.link, seat.deadline = None, None
        self._close_for_a_while(seat)
        if seat.enrolled:
            seat.enrolled = False
            process = self.roster.agents[seat.spec.name].process
            self._carry_out(self.roster.lost(time.monotonic(), seat.spec.name))
            wanted = self._wanted.get(process.id) if process is not None else None
            if wanted is not None and wanted.pidfd is not None and _is_dead(wanted.pidfd):
                assert process is not None
                self._carry_out(self.roster.dead(time.monotonic(), process.id))

    # ------------------------------------------------------------------ actions

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Give):
                self._give(action)
            elif isinstance(action, Over):
                self._over(action)
            elif isinstance(action, Pass):
                self._send(self._seats[action.agent], Signal(id=action.id, what=action.what))  # type: ignore[arg-type]
            else:
                self._drop(self._seats[action.agent], action.why)

    def _give(self, give: Give) -> None:
        wanted = self._wanted[give.id]
        full, fds, own = self.complete(wanted.order, wanted.fds)
        try:
            self._send(self._seats[give.agent], full.model_copy(update={"endpoint": ""}), fds)
        except BadMessage as error:  # what Dom0 or the hypervisor gave for it is too much: it never begins
            self._carry_out(
                self.roster.ended(time.monotonic(), give.agent, give.id, 1, str(error), dead=True)
            )
        finally:
            close_all(own)

    def _send(self, seat: _Seat, message: Message, fds: Sequence[int] = ()) -> None:
        if seat.link is None:
            return
        try:
            seat.link.send(message, fds)
        except LinkFull:
            self._drop(seat, "does not listen")
        except LinkClosed:
            self._drop(seat, "")

    def _over(self, over: Over) -> None:
        wanted = self._wanted.pop(over.id)
        close_all(wanted.fds)
        if wanted.pidfd is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(wanted.pidfd)
            os.close(wanted.pidfd)
        how = f"signal {-over.status}" if over.status < 0 else f"status {over.status}"
        why = f": {over.text.splitlines()[-1][:200]}" if over.text else ""
        _say(f"a process of {wanted.order.role} ended with {how}{why}")
        if over.id == HYPERVISOR_ID:
            self.ending = f"the hypervisor ended with {how}" + (f": {over.text}" if over.text else "")
        else:
            self._tell(Ended(id=over.id, status=over.status, text=over.text))

    # ------------------------------------------------------------------ operators

    def _accept_operator(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._operators_listener.accept()
            if len(self._operators) >= MAX_OPERATORS:
                sock.close()
                return
            link = PacketLink(sock, FROM_OPERATOR, descriptors=False)
            self._operators[sock.fileno()] = link
            self._register(link, lambda: self._serve_operator(link))

    def _serve_operator(self, link: PacketLink) -> None:
        try:
            packet = link.receive()
            if packet is None:
                return
            message, _ = packet
            if isinstance(message, AskStatus):
                link.send(Status(token=message.token, agents=self.status()))
            elif isinstance(message, Strike):
                link.send(Struck(token=message.token, error=self.strike(message.agent, message.what)))
        except (LinkClosed, LinkFull, BadMessage):
            self._selector.unregister(link)
            del self._operators[link.fileno()]
            link.close()

    def status(self) -> list[AgentStatus]:
        """All containers."""
        rows = []
        for name, agent in self.roster.agents.items():
            process = (
                agent.process if agent.process is not None and agent.process.state is State.RUNNING else None
            )
            row: dict[str, Any] = {"name": name, "uid": agent.spec.uid, "connected": agent.connected}
            row |= {"enrolled": agent.enrolled, "begun": agent.begun}
            if process is not None:
                row |= {"role": process.role, "domain": process.domain, "pid": process.pid}
            rows.append(AgentStatus(**row))
        return rows

    def strike(self, name: str, what: str) -> str:
        """An operator's blow at what runs in a container; why not, or ''."""
        seat = self._seats.get(name)
        if seat is None:
            return f"no container {name!r}: there are {', '.join(self._seats)}"
        if seat.link is None or not seat.enrolled:
            return f"{name}: its agent is not there"
        if what == "leave":
            _say(f"an operator has container {name} end")
            self._send(seat, Leave())
            return ""
        process = self.roster.agents[name].process
        if process is None:
            return f"{name}: nothing runs in it"
        _say(f"an operator sends {what.upper()} to the process in container {name}")
        self._carry_out(self.roster.signal(time.monotonic(), process.id, what))
        return ""


def is_pidfd(fd: int) -> bool:
    """The descriptor is a pidfd (its fdinfo has a line `Pid:`, proc(5))."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            return any(line.startswith(b"Pid:") for line in file.read(4096).splitlines())
    except OSError:
        return False


def _is_dead(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _share(path: Path, gid: int) -> None:
    """Let a group reach a socket. OSError if this process is neither root nor in the group."""
    if gid != os.getegid():
        os.chown(path, -1, gid)
        path.chmod(0o660)


def _listening(path: Path, gid: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o600)
    if gid is not None:
        _share(path, gid)
    listener.listen(4)
    listener.setblocking(False)
    return listener


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Entry point of the process: 0 after SIGTERM or an orderly end, 1 if the machine went down by itself, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="domicile-warden")
    parser.add_argument("role")
    parser.add_argument("machine")
    parser.add_argument("--agent", action="append", default=[], type=AgentSpec.parse)
    parser.add_argument("--operators", type=int)
    parser.add_argument("--owner", type=int)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--scratch", default="/tmp")
    options = parser.parse_args()
    runtime = RuntimeDirectory(options.machine)
    runtime.create(shared=True)
    runtime.pid.write_text(str(os.getpid()), encoding="ascii")
    listeners = {}
    for label, path, kind in (
        ("control", runtime.control, socket.SOCK_SEQPACKET),
        ("xenstored", runtime.xenstore, socket.SOCK_STREAM),
    ):
        listener = listeners[label] = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    privileges.drop(None, keep_capabilities=True)
    status = 0
    try:
        warden = CentralWarden(
            runtime, listeners, options.agent, operators=options.operators, scratch=options.scratch
        )

        def terminate(_number: int, _frame: object) -> None:
            warden.ending = "terminated"
            raise InterruptedError

        signal.signal(signal.SIGTERM, terminate)
        if options.owner is not None:
            warden.watch(options.owner)
        warden.start_hypervisor({**options.settings, "bus": str(runtime.bus)})
        reason = warden.run()
        _say(f"the machine is down: {reason}")
        status = 0 if reason in ("halt", "poweroff", "the owner went away") else 1
    except InterruptedError:
        pass
    except ValueError as error:
        print(f"warden: {error}", file=sys.stderr, flush=True)
        status = 2
    finally:
        runtime.remove()
    return status


if __name__ == "__main__":
    sys.exit(main())
