"""The warden of one container: its first process, with the domain's (or device's) process as its child.

    python -m toolstack.warden.agent domicile-agent MACHINE NAME ROLE [--warden-uid UID] [--child-uid UID] [--shared-uid]

It starts, stops and ends that child on the order of the machine's warden, and tells it how it ended. It looks at nothing that the
child does. The child cannot harm it: the kernel gives the first process of a pid namespace no signal from within that it has no
handler for, and it is not dumpable. When the link to the warden breaks, the child is ended, and the agent tries to enrol anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import selectors
import signal
import socket
import sys
from typing import Final

from bus import privileges
from bus.messages.envelope import BadMessage, Message
from bus.messages.warden import TO_AGENT, Ended, Enrol, Leave, Running, Signal, Spawn
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, peer_credentials
from bus.process_view import open_files
from toolstack.warden import children
from toolstack.warden.beat import Beat
from toolstack.warden.children import Child
from toolstack.warden.output import Output
from toolstack.warden.runtime import RuntimeDirectory

RETRY_S: Final = 0.2
MAX_EARLY_ENDS: Final = 5
"""So many children in a row that end before they begin, and the agent ends too: something is wrong with its container."""
EXIT_LEAVE: Final = 137
"""As of a container whose first process was killed."""


class Gone(Exception):
    """The link to the machine's warden is over."""


class Agent:
    """One container."""

    def __init__(self, path: str, role: str, *, warden_uid: int, child_uid: int | None) -> None:
        """`path`: this container's socket of the machine's warden, whose uid is to be `warden_uid`. `child_uid`: see children.start."""
        self._path = path
        self._role = role
        self._warden_uid = warden_uid
        self._child_uid = child_uid
        self._first = os.getpid() == 1
        self._selector = selectors.DefaultSelector()
        self._link: PacketLink | None = None
        self._child: Child | None = None
        self._output: Output | None = None
        self._early = 0
        self._beat = Beat()
        self._waits = False

    def run(self) -> int:
        """Serve until told to leave, or until children end again and again before they begin: the exit status."""
        try:
            while self._early < MAX_EARLY_ENDS:
                if self._child is None:
                    self._start()
                if self._link is None:
                    self._connect()
                for key, _ in self._selector.select(RETRY_S if self._link is None else 1.0):
                    if key.data is not None and key.fd in self._selector.get_map():
                        key.data()
                self._reap_strangers()
                self._beat(self._link is not None and self._child is not None)
            self._say(f"{self._role} ends before it begins, again and again")
            return 1
        except SystemExit as leaving:
            return int(leaving.code or 0)
        finally:
            self._end_child()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, flush=True)

    # ------------------------------------------------------------------ the child

    def _start(self) -> None:
        """A process that loads its code and waits for its `Begin`."""
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            child = children.start(self._role, os.devnull, self._child_uid, output=write)
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._child = child
        output = self._output = Output(read, self._say)

        def pump() -> None:
            if not output.pump():
                self._selector.unregister(output)

        self._selector.register(output, selectors.EVENT_READ, pump)
        self._selector.register(child.pidfd, selectors.EVENT_READ, self._ended)

    def _ended(self) -> None:
        child = self._child
        assert child is not None
        number = child.id
        status, text = self._clear()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if number is None:
            self._early += 1
            self._say(f"{self._role} {how} before it began")
            return
        self._early = 0
        self._say(
            f"{self._role} (process {child.process.pid}) was {how}" if status < 0 else f"{self._role} {how}"
        )
        # What one says before SIGKILL is not why it ended.
        self._send(Ended(id=number, status=status, text="" if status == -signal.SIGKILL else text[-3900:]))

    def _clear(self) -> tuple[int, str]:
        """The child is gone: nothing that it started is left either. Its status and last words."""
        child, output = self._child, self._output
        assert child is not None
        assert output is not None
        self._selector.unregister(child.pidfd)
        self._sweep(child)
        status, _ = child.reap()
        with contextlib.suppress(KeyError):
            self._selector.unregister(output)
        output.close()
        self._child = self._output = None
        return status, output.tail()

    def _sweep(self, child: Child) -> None:
        """End whatever the child started: all other processes of this pid namespace; where it is not ours alone, its session's."""
        with contextlib.suppress(OSError):
            if self._first:
                os.kill(-1, signal.SIGKILL)
            else:
                os.killpg(child.process.pid, signal.SIGKILL)

    def _reap_strangers(self) -> None:
        """The first process of a pid namespace inherits what its children leave."""
        if not self._first:
            return
        own = self._child.process.pid if self._child is not None else 0
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid == own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)

    def _end_child(self) -> None:
        """SIGKILL, within a bound."""
        child = self._child
        if child is None:
            return
        child.signal("kill")
        if select.select([child.pidfd], [], [], children.KILL_WAIT_S)[0]:
            self._clear()

    # ------------------------------------------------------------------ the machine's warden

    def _connect(self) -> None:
        """Enrol; nothing if the warden is not there at present."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(1.0)
            sock.connect(self._path)
            _, uid, _ = peer_credentials(sock)
            if uid != self._warden_uid:
                raise OSError(f"uid {uid} listens there, not the warden's {self._warden_uid}")
            self._link = PacketLink(sock, TO_AGENT)
            self._link.send(Enrol(pid=os.getpid()))
        except (OSError, LinkFull) as error:
            self._link = None
            sock.close()
            if not self._waits:
                missing = isinstance(error, FileNotFoundError | ConnectionRefusedError)
                self._say("waits for the machine's warden" + ("" if missing else f": {error}"))
                self._waits = True
            return
        self._waits = False
        self._say(
            f"enrolled with the machine's warden; a process of {self._role} will wait until it is wanted"
        )
        self._selector.register(self._link, selectors.EVENT_READ, self._hear)

    def _hear(self) -> None:
        for _ in range(16):
            assert self._link is not None
            try:
                packet = self._link.receive()
                if packet is None:
                    return
                message, fds = packet
                try:
                    self._obey(message, fds)
                finally:
                    close_all(fds)
            except (LinkClosed, BadMessage, Gone) as error:
                self._lose(str(error))
                return

    def _lose(self, why: str) -> None:
        """Without the warden there is no machine: the child goes with the link."""
        assert self._link is not None
        self._selector.unregister(self._link)
        self._link.close()
        self._link = None
        self._say(f"the link to the machine's warden is over ({why})")
        if self._child is not None and self._child.id is not None:
            self._end_child()

    def _obey(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Spawn):
            self._spawn(message, fds)
        elif isinstance(message, Signal):
            child = self._child
            if child is not None and child.id == message.id:
                child.signal(message.what)
        elif isinstance(message, Leave):
            self._say("told to end this container")
            raise SystemExit(EXIT_LEAVE)

    def _spawn(self, order: Spawn, fds: list[int]) -> None:
        if self._child is None:
            self._start()
        child = self._child
        assert child is not None
        if order.role != self._role or child.id is not None:
            raise Gone(
                f"asked for a {order.role} while {'one runs' if child.id is not None else f'this is for a {self._role}'}"
            )
        try:
            files = open_files(child.process.pid)
        except OSError:
            raise Gone(f"the {self._role} that was to begin has ended") from None
        try:
            child.begin(order, order.settings, fds)
            self._say(
                f"{self._role} begins (process {child.process.pid}, uid {self._child_uid or os.getuid()})"
            )
            self._send(Running(id=order.id, pid=child.process.pid), [child.pidfd, *files])
        finally:
            close_all(files)

    def _send(self, message: Message, fds: list[int] | None = None) -> None:
        if self._link is None:
            return
        try:
            self._link.send(message, fds or [])
        except (LinkClosed, LinkFull) as error:
            self._lose(str(error))


def main() -> int:
    """Entry point of the process: 0 after SIGTERM, 137 when told to leave, 1 if nothing can be started, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="domicile-agent")
    parser.add_argument("process")
    parser.add_argument("machine")
    parser.add_argument("name")
    parser.add_argument("role", choices=sorted(children.MODULES))
    parser.add_argument("--warden-uid", type=int, default=os.getuid())
    parser.add_argument("--child-uid", type=int, help="as root: what the child becomes")
    parser.add_argument("--shared-uid", action="store_true", help="others run under this uid too")
    parser.add_argument("--with-parent", action="store_true", help="end when the starter ends")
    options = parser.parse_args()
    child_uid = options.child_uid
    if child_uid is None and not options.shared_uid:
        child_uid = os.getuid()
    privileges.drop(
        None, death_signal=signal.SIGKILL if options.with_parent else None, keep_capabilities=True
    )

    def terminate(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path = RuntimeDirectory(options.machine).root / "agents" / options.name
    return Agent(str(path), options.role, warden_uid=options.warden_uid, child_uid=child_uid).run()


if __name__ == "__main__":
    sys.exit(main())
