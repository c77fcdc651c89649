"""A domain's process in an attacker's hands (a program, started in place of `domains.domu`): it has the domain's own credentials
and descriptors, and does what the plan says.

The plan is a file (DOMICILE_HOSTILE_PLAN) that the test writes: JSON, {"attack": name, "stage": number}. The attack that it names
when the process begins is this process's; without a name the guest runs as usual. What is seen is told on standard output, which is the process's log: `HOSTILE {json}` a line.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bus import privileges
from bus.addresses import Mfn
from bus.credentials import ClientCredentials
from bus.link import DomainLink, HypervisorGone
from bus.messages.domain import Hello, Hypercall, HypercallReply, Order
from bus.messages.envelope import Message, decode, encode, registry
from bus.packets import close_all
from bus.process import Start, begin
from domains.domu.pv_process import PvProcess
from domains.granting import Granting
from domains.hostmem import HostMemory

Answer = tuple[int, bytes]
STAGE_S = 30.0


class Hostile:
    """What an attack has: the link, the memory, the descriptors. Orders are obeyed unless `on` says otherwise."""

    def __init__(self, start: Start, plan: int) -> None:
        import socket  # loaded already

        self.start = start
        self.domid = start.domain
        self._plan = plan
        fd = start.fds["keys"]
        keys = decode(os.pread(fd, os.fstat(fd).st_size, 0), registry(ClientCredentials))
        assert isinstance(keys, ClientCredentials)
        self.keys = keys
        self.descriptors = socket.socket(fileno=start.fds["descriptors"])
        self.orders: list[str] = []
        """What was ordered so far."""
        self.on: dict[str, Callable[[Order, list[int]], Answer | None]] = {}
        """Instead of obeying an order: the answer, or None for none."""
        self.kept: dict[int, int] = {}
        """Descriptors of windows that were attached, by window."""
        self.extent_fd = -1
        self.extent: dict[str, Any] = {}
        self.memory: HostMemory | None = None
        self.replies: dict[int, tuple[int, bytes]] = {}
        self.link: DomainLink

    def connect(self) -> None:
        """The ordinary link and the ordinary hello."""
        self.link = DomainLink(self.keys, self.descriptors)
        self.link.on_message = self.take
        self.link.send(Hello(pid=os.getpid(), role="domu"))

    def say(self, what: str, **more: Any) -> None:
        """Tell the test."""
        print("HOSTILE " + json.dumps({"domid": self.domid, "what": what, **more}), flush=True)

    # ------------------------------------------------------------------ orders

    def take(self, message: Message) -> None:
        """Orders, replies to calls that were only sent."""
        if isinstance(message, HypercallReply):
            self.replies[message.token] = (message.rc, message.data)
        if not isinstance(message, Order):
            return
        self.orders.append(message.what)
        fds = self.link.descriptors_of(message)
        special = self.on.get(message.what) or self.on.get("*")
        answer = special(message, fds) if special is not None else self.obey(message, fds)
        if answer is not None:
            self.link.answer(message, *answer)

    def obey(self, order: Order, fds: list[int]) -> Answer:
        """As an honest process does, more or less."""
        body = order.body
        if order.what == "extent":
            self.extent, self.extent_fd = body, os.dup(fds[0])
            self.memory = HostMemory(fds[0], Mfn(body["base"]), body["frames"])
        elif order.what in ("grant_map", "grant_unmap"):
            assert self.memory is not None
            granting = Granting(self.memory)
            if order.what == "grant_map":
                return 0, granting.grant_map(body, fds)
            return 0, granting.grant_unmap(body)
        elif order.what == "grant_attach":
            self.kept.update(zip(body.get("windows", ()), fds, strict=True))
            return 0, bytes(2 * len(body["items"]))
        elif order.what == "grant_detach":
            return 0, bytes(2 * len(body["items"]))
        else:
            close_all(fds)
        return 0, b""

    def serve(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Take messages for so long, or until something holds; whether it does."""
        deadline = time.monotonic() + seconds
        while True:
            self.link.dispatch()
            if until():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.link._socket.poll(max(1, min(20, int(left * 1000))))

    def idle(self) -> None:
        """Obey until killed."""
        while True:
            self.serve(60.0)

    def started(self) -> None:
        """Wait until the domain is built and runs."""
        if not self.serve(STAGE_S, lambda: "start" in self.orders):
            raise HypervisorGone("never started")

    def stage(self) -> int:
        """The number in the plan."""
        return int(read_plan(self._plan)["stage"])

    def wait_stage(self, number: int) -> None:
        """Until the test says so."""
        if not self.serve(STAGE_S, lambda: self.stage() >= number):
            raise HypervisorGone(f"stage {number} never came")

    # ------------------------------------------------------------------ calls

    def call(self, nr: int, cmd: int, data: bytes = b"") -> tuple[int, bytes]:
        """A hypercall."""
        return self.link.call(nr, cmd, data)

    def send_call(self, token: int, nr: int, cmd: int, data: bytes) -> None:
        """A hypercall, without waiting."""
        self.link.send(Hypercall(token=token, vcpu=0, nr=nr, cmd=cmd, data=data))

    def send_raw(self, raw: bytes) -> None:
        """Any bytes as a message."""
        self.link._socket.send(raw)

    def send(self, message: Message) -> None:
        """Any message, whatever model it is of."""
        self.send_raw(encode(message))


def outcome(act: Callable[[], object]) -> str:
    """The name of the errno, or 'allowed'."""
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    except ValueError:
        return "EINVAL"
    return "allowed"


def read_plan(fd: int) -> dict[str, Any]:
    """The plan as it is now."""
    plan: dict[str, Any] = json.loads(os.pread(fd, 4096, 0))
    return plan


def main() -> None:
    """Entry point of the process."""
    from tests.support.attacks import (
        ATTACKS,
    )  # before privileges, and with them the way to this code, are given up

    plan = os.open(os.environ["DOMICILE_HOSTILE_PLAN"], os.O_RDONLY)
    sys.setswitchinterval(1e-4)
    start = begin(privileges.Limits(open_files=4096, processes=32))
    name = read_plan(plan)["attack"]
    try:
        if name is None:
            PvProcess(start).run()
        else:
            ATTACKS[name](Hostile(start, plan))
    except HypervisorGone as gone:
        sys.exit(f"domu: {gone}")


if __name__ == "__main__":
    main()
