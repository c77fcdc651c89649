"""The story of a machine in containers (compose.yaml): what an operator sees who cannot look into any of them.

    python -m toolstack.demo.containers [--json FILE] [--container-death]

It asks Dom0's toolstack for guests, the machine's warden for blows, and the hypervisor (through Dom0) for what its IOMMU refused.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bus.messages.warden import AgentStatus
from toolstack.client import ControlClient
from toolstack.demo.guest import CMDLINE, ROOT_MB, RootedFiles, get_rooted
from toolstack.demo.rogue import targets
from toolstack.demo.show import Show
from toolstack.demo.telling import MORE_WRITES, STEP_S, Record, StepFailed, Telling
from toolstack.domio import check_kind, open_program, use_program
from toolstack.errors import MachineError
from toolstack.machine import runtime_directory
from toolstack.warden.operator import Operator
from toolstack.xlcfg.devices import parse_vif

UP_S: Final = 120.0
BOOT_S: Final = 240.0
BACK_S: Final = 60.0
"""For a container to be back: its engine waits longer from time to time."""
NEEDED: Final = ("hypervisor", "dom0", "nvme", "netio", "domu-pv", "domu-pvh")
"""Containers without which there is no story, beside the one that DomIO is in; compose.yaml has more in its profiles."""
MORE_ANSWERS: Final = 3
"""How many further answers of one guest to the other count as going on."""
ANSWER: Final = re.compile(r"bytes from [0-9.]+: seq=(\d+) ")
VIF: Final = "bridge=xenbr0"
IMAGES: Final = Path(os.environ.get("DOMICILE_IMAGES", "/images"))


@contextmanager
def turn(show: Show) -> Iterator[Path]:
    """One teller at a time: the story, then the fault plan. A directory for its disks, gone afterwards."""
    with open(IMAGES / ".turn", "w", encoding="ascii") as file:
        with show.waiting("waiting for its turn"):
            deadline = time.monotonic() + 900.0
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise MachineError("another teller has the machine for 15 minutes already") from None
                    select.select([], [], [], 0.2)  # flock(2) itself has no bound
        with tempfile.TemporaryDirectory(prefix="story-", dir=IMAGES) as directory:
            yield Path(directory)


class ContainerTelling(Telling):
    """What the story and the fault plan have in common."""

    operator: Operator

    def __init__(self, show: Show) -> None:
        super().__init__(show)
        self.runtime = runtime_directory(os.environ.get("DOMICILE_MACHINE", "default"))
        kind = check_kind(os.environ.get("DOMICILE_DOMIO_KIND", "native"), "DOMICILE_DOMIO_KIND")
        self.domio = "domio-guest" if kind == "guest" else "domio"
        """The container of the driver domain."""

    # ------------------------------------------------------------------ steps

    def _up(self) -> tuple[None, str]:
        """Find the machine."""
        self.show.line("A machine in containers: who is there?", "head")
        deadline = time.monotonic() + UP_S
        with self.show.waiting("waiting for Dom0") as waiting:
            while True:
                try:
                    self.client = ControlClient(self.runtime.control)
                    self.client.request("follow")
                    self.operator = Operator(self.runtime.root / "warden")
                    break
                except MachineError as error:
                    if time.monotonic() > deadline:
                        raise StepFailed(f"no machine within {UP_S:.0f} s: {error}") from None
                    waiting.tick()
                    select.select([], [], [], 0.2)  # there is nothing to wait on before
        agents = self._everybody()
        self.record.facts["containers"] = [row.model_dump() for row in agents.values()]
        for row in agents.values():
            doing = f"runs {row.role}" if row.role else "waits for its process to be wanted"
            self.show.line(f"    {row.name:<12} uid {row.uid}  {doing}", "dim")
        if len({row.uid for row in agents.values()}) != len(agents):
            raise StepFailed("two containers have one uid")
        if self.domio == "domio-guest" and not agents[self.domio].role:  # of an earlier story, it is there
            program, path = open_program()
            try:
                use_program(self.client, program, path)
            finally:
                os.close(program)
            self.show.line("    DomIO will be a guest program on an emulated CPU, in container domio-guest")
        text = f"{len(agents)} containers, each with a uid of its own"
        return None, text

    def _everybody(self) -> dict[str, AgentStatus]:
        """All containers that are there, once those that are needed have enrolled."""
        agents: dict[str, AgentStatus] = {}

        def there() -> bool:
            nonlocal agents
            agents = self.operator.agents()
            return all(name in agents and agents[name].connected for name in (*NEEDED, self.domio))

        self._wait("containers come up", there, BACK_S, "")
        return {name: row for name, row in agents.items() if row.connected}

    def _boot(self, files: RootedFiles) -> tuple[None, str]:
        self.show.line(
            "Guest 'debian' (PV): Debian's Linux, unmodified; its root is an ext4 file system on its disk",
            "head",
        )
        disk = {"vdev": "xvda", "format": "raw", "readonly": False, "target": str(files.disk)}
        self._create(
            "debian", kernel=str(files.rooted.kernel), ramdisk=str(files.rooted.ramdisk), memory_mb=128,
            cmdline=f"{files.rooted.cmdline} {CMDLINE}", disks=[disk], vifs=[parse_vif(VIF, "vif")],
        )  # fmt: skip
        debian = self._guests["debian"]
        self._wait(
            "Linux boots",
            lambda: "ROOT " in debian.text and "\n" in debian.text.partition("ROOT ")[2],
            BOOT_S,
        )
        root = debian.text.partition("ROOT ")[2].splitlines()[0].strip()
        self.show.line(f"    | {root}", "good")
        if not root.startswith("/dev/"):
            raise StepFailed(f"its root is not on the disk: {root}")
        self._wait("it writes and calls fsync", lambda: len(debian.acknowledged) >= MORE_WRITES, STEP_S)
        self.show.line(
            f"    {len(debian.acknowledged)} files written, fsync came back, checksums noted", "good"
        )
        self._where("debian")
        return None, f"root on ext4 behind DomIO, {len(debian.acknowledged)} writes acknowledged"

    def _where(self, guest: str) -> None:
        number = next(row["domid"] for row in self.client.request("list") if row["name"] == guest)
        for row in self.operator.agents().values():
            if row.role == "domu" and row.domain == number:
                self.show.line(f"    it is domain {number}, in container {row.name}, uid {row.uid}", "dim")

    def _blow(self, agent: str, what: str, title: str) -> tuple[None, str]:
        """Strike; the guest writes on, and a new process does the work."""
        old = self._strike(agent, what, title)
        count, first = self._goes_on("the blow has fallen")
        self._replaced(agent, what, old, seconds_to_next_write=round(first, 3), writes_after=count)
        self.show.line(f"    the guest goes on: {count} more writes, the first after {first:.1f} s", "good")
        return None, f"next write after {first:.1f} s"

    def _strike(self, agent: str, what: str, title: str) -> AgentStatus:
        """How the container was before."""
        old = self.operator.agents()[agent]
        self.show.line(title, "head")
        self.operator.strike(agent, what)
        return old

    def _replaced(self, agent: str, what: str, old: AgentStatus, **facts: float) -> None:
        """A new process is in that container."""

        def replaced() -> bool:
            new = self.operator.agents()[agent]
            back = new.enrolled > old.enrolled if what == "leave" else True
            return back and new.begun > old.begun and bool(new.role)

        self._wait("another process takes its place", replaced, BACK_S)
        new = self.operator.agents()[agent]
        blow = {
            "container": agent, "what": what, "begun": [old.begun, new.begun], "enrolled": [old.enrolled, new.enrolled],
            **facts,
        }  # fmt: skip
        self.record.facts["blows"].append(blow)
        place = "a new container and process" if what == "leave" else "a new process"
        self.show.line(f"    {place} took its place: number {new.begun} in {agent}", "dim")

    def _end(self) -> tuple[None, str]:
        debian = self._guests["debian"]
        self.show.line("The guest is asked to stop", "head")
        self._type("debian", "enough\n")
        deadline = time.monotonic() + STEP_S
        with self.show.waiting("it makes its root read-only and powers off") as waiting:
            while debian.ended is None and time.monotonic() < deadline:
                self._poll(0.1)
                waiting.tick(debian.lines[-1][:50] if debian.lines else "")
        errors = next((line.split()[1] for line in debian.lines if line.startswith("IO-ERRORS ")), None)
        self.record.facts["guest"] = {
            "end": debian.ended,
            "io_errors": None if errors is None else int(errors),
        }
        if debian.ended != "poweroff" or "UNMOUNTED" not in debian.text:
            raise StepFailed(f"it did not end in order: {debian.ended}\n{debian.tail()}")
        if errors != "0" or "FAILED" in debian.text:
            raise StepFailed(f"the guest saw errors\n{debian.tail()}")
        self.show.line("    it saw no I/O error and powered off", "good")
        return None, "power-off, no I/O error seen"

    def _check(self) -> None:
        problems = self.client.request("check")["problems"]
        self.record.facts["invariants"] = problems
        if problems:
            raise StepFailed(f"the hypervisor's own check: {problems[0]}")

    def finish(self) -> None:
        """Guests that are left go."""
        with suppress(MachineError, AttributeError):
            for row in self.client.request("list"):
                if row["name"] in self._guests:
                    self.client.request("destroy", {"domain": row["name"]})


class ContainerStory(ContainerTelling):
    """The story."""

    def __init__(self, show: Show, *, container_death: bool) -> None:
        """`container_death`: DomIO's container ends too; its engine must start it again."""
        super().__init__(show)
        self._container_death = container_death

    def run(self) -> Record:
        """All steps, until one fails."""
        with turn(self.show) as directory:
            try:
                self._step("the machine is up", self._up)
                files = self._step("get guests and make a disk", lambda: self._files(directory))
                self._step("a PV guest boots from its disk", lambda: self._boot(files))
                self._step("a PVH guest boots beside it", lambda: self._beside(files))
                self._step("the two reach each other through NetIO", self._answers)
                self._step(
                    "DomIO is killed; the guest goes on",
                    lambda: self._blow(
                        self.domio, "kill", "SIGKILL to DomIO, the driver domain, while the guest writes"
                    ),
                )
                self._step(
                    "DomIO is frozen; the guest goes on",
                    lambda: self._blow(self.domio, "stop", "SIGSTOP to DomIO: it stands, and does not work"),
                )
                if self._container_death:
                    self._step(
                        "DomIO's container ends; the guest goes on",
                        lambda: self._blow(
                            self.domio, "leave", "DomIO's whole container ends; the engine starts it again"
                        ),
                    )
                self._step(
                    "the NVMe process is killed; the guest goes on",
                    lambda: self._blow("nvme", "kill", "SIGKILL to the NVMe controller's process"),
                )
                self._step("NetIO is killed; the guests reach each other again", self._net_blow)
                self._step("a DMA attack is stopped at the IOMMU", self._attack)
                self._step("the PVH guest ran on all the time", self._unharmed)
                self._step("the guest ends in order", self._end)
                self._step("the host finds every acknowledged write", lambda: self._look(files.disk))
            except StepFailed:
                pass
            finally:
                self.finish()
        self.record.facts["seconds"] = round(self.show.elapsed(), 3)
        return self.record

    def _files(self, directory: Path) -> tuple[RootedFiles, str]:
        with self.show.waiting("making the disk"):
            files = get_rooted(directory)
        text = f"Linux {files.rooted.version}, {ROOT_MB} MB of ext4 with its root"
        self.show.line(f"    {text}")
        return files, text

    def _beside(self, files: RootedFiles) -> tuple[None, str]:
        self.show.line(
            "Guest 'beside' (PVH): Debian's Linux again, without a disk: it is to run on through all that follows",
            "head",
        )
        self._create(
            "beside", type="pvh", kernel=str(files.ticker.kernel), ramdisk=str(files.ticker.ramdisk), memory_mb=128,
            cmdline=f"{files.ticker.cmdline} {CMDLINE}", vifs=[parse_vif(VIF, "vif")],
        )  # fmt: skip
        self._wait("Linux boots", lambda: "TICK 0" in self._guests["beside"].text, BOOT_S, "beside")
        self._where("beside")
        return None, "it prints a line a second"

    def _answers(self) -> tuple[None, str]:
        """'beside' pings 'debian', a second after the other, for as long as it runs."""
        self.show.line("The two are on one bridge of NetIO, the driver domain of the network", "head")
        self._more_answers("beside pings debian")
        line = [line for line in self._guests["beside"].lines if ANSWER.search(line)][-1]
        self.show.line(f"    | {line}", "good")
        return None, line

    def _more_answers(self, what: str) -> float:
        """Wait for answers to what is asked from now on; seconds to the first."""
        beside = self._guests["beside"]
        asked, begin, first = max(_answered(beside.text), default=-1), time.monotonic(), 0.0

        def more() -> bool:
            nonlocal first
            # The question after the last answered one may have been on its way: it does not count.
            new = [number for number in _answered(beside.text) if number > asked + 1]
            if new and not first:
                first = time.monotonic() - begin
            return len(new) >= MORE_ANSWERS

        self._wait(what, more, STEP_S, "beside")
        return first

    def _net_blow(self) -> tuple[None, str]:
        old = self._strike("netio", "kill", "SIGKILL to NetIO while one guest pings the other")
        first = self._more_answers("the blow has fallen; the guests reach each other again")
        self._replaced("netio", "kill", old, seconds_to_next_answer=round(first, 3))
        self.show.line(f"    the other guest answers again, the first time after {first:.1f} s", "good")
        return None, f"next answer after {first:.1f} s"

    def _unharmed(self) -> tuple[None, str]:
        beside = self._guests["beside"]
        before = _ticks(beside.text)
        self._wait("it ticks on", lambda: len(_ticks(beside.text)) > len(before) + 1, STEP_S, "beside")
        ticks = _ticks(beside.text)
        if ticks != list(range(len(ticks))) or beside.ended is not None:
            raise StepFailed(f"its lines are not in order, or it ended: {beside.ended}\n{beside.tail()}")
        self.client.request("destroy", {"domain": "beside"})
        text = f"{len(ticks)} lines, a second apart by its own clock, none missing"
        self.show.line(f"    {text}", "good")
        return None, text

    def _attack(self) -> tuple[None, str]:
        asked = len(targets())
        self.show.line(
            "The NVMe controller turns: DMA all over the machine's memory, and into the interrupt range",
            "head",
        )
        before: int = self.client.request("iommu", {})["faults_total"]
        self.operator.strike("nvme", "usr1")

        def refused() -> int:
            total: int = self.client.request("iommu", {})["faults_total"]
            return total - before

        self._wait("it attacks", lambda: refused() >= asked, STEP_S)
        count, _ = self._goes_on("the attack is over")
        view = self.client.request("iommu", {})
        reasons = {reason: n for device in view["devices"] for reason, n in device["faults"].items()}
        self.record.facts["dma"] = {"asked": asked, "refused": refused(), "reasons": reasons}
        for reason, number in sorted(reasons.items()):
            self.show.line(f"    {number} x {reason}", "dim")
        if refused() != asked:
            raise StepFailed(f"{asked} requests were made, and the IOMMU refused {refused()}")
        self._check()
        self.show.line(
            f"    {asked} of {asked} requests refused by the hypervisor's count; its driver still works: {count} more writes",
            "good",
        )
        return None, f"{asked} of {asked} requests refused"


def _ticks(text: str) -> list[int]:
    words = [line.split() for line in text.splitlines()]
    return [int(line[1]) for line in words if len(line) == 2 and line[0] == "TICK" and line[1].isdigit()]


def _answered(text: str) -> list[int]:
    """Numbers of the questions that were answered."""
    return [int(found[1]) for found in ANSWER.finditer(text)]


def tell(show: Show, record: Record, json_file: str = "") -> int:
    """Summary, record; the exit status."""
    show.plain()
    show.plain("Summary")
    show.table([(step.name, step.ok, step.seconds, step.detail) for step in record.steps])
    good, total = sum(step.ok is True for step in record.steps), len(record.steps)
    verdict = "all well" if record.ok else "FAILED"
    show.plain(
        f"  {show.paint(verdict, 'good' if record.ok else 'bad')}: {good} of {total} steps, {show.elapsed():.1f} s"
    )
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(record.as_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"--json {json_file}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if record.ok else 1


def main() -> int:
    """The exit status: 0 all well, 1 a step failed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="story", description="The story of a machine in containers.")
    parser.add_argument("--json", metavar="FILE", default="", help="write there what happened")
    parser.add_argument("--container-death", action="store_true", help="DomIO's container ends too")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _frame: sys.exit(128 + signum))
    show = Show()
    try:
        death = options.container_death or os.environ.get("DOMICILE_CONTAINER_DEATH", "no") == "yes"
        record = ContainerStory(show, container_death=death).run()
    except MachineError as error:
        print(f"story: {error}", file=sys.stderr)
        return 1
    return tell(show, record, options.json)


if __name__ == "__main__":
    sys.exit(main())
