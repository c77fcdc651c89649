"""A machine some of whose guests' processes are in an attacker's hands, with an honest neighbour."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import toolstack.machine
from tests.support.machines import Expected, RunningMachine, running_machine
from toolstack.client import MachineError
from toolstack.guestfetch import fetch

WARDEN = Path(__file__).with_name("hostile_warden.py")
MEMORY_BOUND_KIB = 64 << 10
"""What the hypervisor may grow by, whatever its domains do."""
SAID_S = 15.0
"""How long an attack may take; the longest goes on for some three seconds."""
ANSWER_S = 5.0
"""How soon everybody else must be answered while an attack goes on."""


class HostileMachine(RunningMachine):
    """Guest `neighbour` (domain 1) is GRUB; further ones are what `attack` makes of them."""

    plan: Path
    base: dict[str, Any]
    _asked: int
    _domids: dict[str, int]

    def write_plan(self, **plan: Any) -> None:
        """Padded to one size: a reader sees the one or the other."""
        with self.plan.open("r+b") as file:
            file.write(json.dumps({"attack": None, "stage": 0, **plan}).encode().ljust(4096))

    def attack(self, name: str, guest: str = "", **more: Any) -> str:
        """Create a guest whose process does that; its name. MachineError if the creation fails."""
        self.write_plan(attack=name, **more)
        guest = guest or name
        try:
            self.create(guest, fetch("grub").kernel, memory_mb=64)
        finally:
            self.write_plan(**more)
        return guest

    def said(self, guest: str, what: str, count: int = 1, timeout: float = SAID_S) -> list[dict[str, Any]]:
        """What a hostile process told, as soon as it told it so many times. Expected."""
        domid = self._domids[guest]
        deadline = time.monotonic() + timeout
        while True:
            found = [one for one in self.everything_said() if one["domid"] == domid and one["what"] == what]
            if len(found) >= count:
                return found
            if time.monotonic() > deadline:
                raise Expected(
                    f"{guest}: no word {what!r}; it said {self.everything_said()[-5:]}\n{self.logs()}"
                )
            self.poll(0.02)

    def said_or_ended(self, guest: str, what: str, timeout: float = SAID_S) -> None:
        """It told it, or was ended before it could. Expected."""
        deadline = time.monotonic() + timeout
        while guest not in self.ended and time.monotonic() < deadline:
            with contextlib.suppress(Expected):
                self.said(guest, what, timeout=0.2)
                return
        assert guest in self.ended, f"{guest}: no word {what!r}, and it did not end\n{self.logs()}"

    def create(self, name: str, kernel: Path | str, **more: Any) -> int:
        """As always; remembers the number."""
        domid = super().create(name, kernel, **more)
        self._domids[name] = domid
        return domid

    def everything_said(self) -> list[dict[str, Any]]:
        """By all hostile processes so far."""
        return [
            json.loads(line.removeprefix("HOSTILE "))
            for path in sorted(self.machine.runtime.logs.glob("domu-*.log"))
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("HOSTILE ") and line.endswith("}")
        ]

    def logs(self) -> str:
        """The ends of the processes' logs."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace") for path in self.machine.runtime.logs.iterdir()
        ]
        return "\n---\n".join(text[-1500:] for text in texts)

    def neighbour_answers(self, timeout: float = ANSWER_S) -> None:
        """The honest guest does what is typed, in time.

        Little is typed: GRUB 2.06 does not mask its index into the console's input ring, and after 1,024 bytes it reads its own
        output behind that (on real Xen too)."""
        if not self._asked:
            self.type("neighbour", "z=yes\n")
        self._asked += 1
        assert self._asked < 85, "the neighbour cannot be asked any more: start a new one"
        self.type("neighbour", f"echo {self._asked}$z\n")
        self.expect("neighbour", f"{self._asked}yes", timeout)

    def all_answer(self, timeout: float = ANSWER_S) -> None:
        """The neighbour, the toolstack and the hypervisor, each in time; and the invariants hold."""
        self.neighbour_answers(timeout)
        begun = time.monotonic()
        counters = self.check()
        self.domains()
        assert time.monotonic() - begun < timeout
        grown = counters["resident_kib"] - self.base["resident_kib"]
        assert grown < MEMORY_BOUND_KIB, f"the hypervisor grew by {grown} KiB"

    def aftermath(self, *guests: str) -> None:
        """Destroy what is left of the hostile guests; nothing of them remains, and the rest is as it was."""
        for guest in guests:
            if guest in self.domains():
                begun = time.monotonic()
                with contextlib.suppress(MachineError):  # it ended meanwhile
                    self.client.request("destroy", {"domain": guest})
                assert time.monotonic() - begun < ANSWER_S
            self.wait_end(guest)
        deadline = time.monotonic() + 10.0
        while True:
            counters = self.check()
            if (
                set(counters["domains"]) == {"0", "1"}
                and not counters["grant_jobs"]
                and self._as_before(counters)
            ):
                break
            assert time.monotonic() < deadline, f"before: {self.base}\nafter: {counters}\n{self.logs()}"
            self.poll(0.02)
        self.all_answer()

    def _as_before(self, counters: dict[str, Any]) -> bool:
        machine = ("free_pages", "windows", "grant_references", "descriptors")
        domain = ("frames", "ports", "mappings", "pid")
        return all(counters[what] == self.base[what] for what in machine) and all(
            counters["domains"][number][what] == self.base["domains"][number][what]
            for number in ("0", "1")
            for what in domain
        )


@contextmanager
def hostile_machine(plan: Path, **more: Any) -> Iterator[HostileMachine]:
    """With its neighbour at its prompt. `plan`: a file of this test's; `more`: for the machine."""
    with pytest.MonkeyPatch.context() as patch:

        def popen(command: list[str], **more: Any) -> Any:
            at = command.index("-m")
            return subprocess.Popen([*command[:at], str(WARDEN), *command[at + 2 :]], **more)

        names = {"Popen": popen, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
        patch.setattr(toolstack.machine, "subprocess", types.SimpleNamespace(**names))
        patch.setenv("DOMICILE_HOSTILE_PLAN", str(plan))
        plan.write_bytes(json.dumps({"attack": None, "stage": 0}).encode().ljust(4096))
        os.chmod(plan, 0o644)
        with running_machine(**more) as running:
            machine = HostileMachine(running.machine)
            machine.plan = plan
            machine._asked = 0
            machine._domids = {}
            machine.create("neighbour", fetch("grub").kernel, memory_mb=64)
            machine.expect("neighbour", "grub> ")
            machine.base = machine.check()
            yield machine
