"""The steps of the demo. Each one looks at what really happened and fails if that is not what it promises."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from toolstack.demo.guest import CMDLINE, DISK_MB, GREETING, Files, get_files
from toolstack.demo.machine import DemoMachine, Process
from toolstack.demo.rogue import MARK
from toolstack.demo.show import Show
from toolstack.demo.telling import MORE_WRITES, STEP_S, Record, StepFailed, Telling

BOOT_S: Final = 120.0


class Story(Telling):
    """One run of the demo."""

    def __init__(self, show: Show) -> None:
        super().__init__(show)
        self._machine: DemoMachine

    def run(self) -> Record:
        """All steps, until one fails."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="domicile-demo-")))
            try:
                files = self._step("get guests and make a disk", lambda: self._files(directory))
                self._step("the machine comes up", lambda: self._up(stack))
                self._step("GRUB for Xen boots and reads the disk", lambda: self._grub(files))
                self._step("Debian's Linux boots and writes to its disk", lambda: self._debian(files))
                self._step("DomIO is killed; the guest goes on", lambda: self._kill("domio", "DomIO"))
                self._step(
                    "the NVMe process is killed; the guest goes on",
                    lambda: self._kill("nvme", "the NVMe process"),
                )
                self._step("a DMA attack is stopped at the IOMMU", self._attack)
                self._step("the guest ends, and every process with it", self._end)
                self._step("the host finds every acknowledged write", lambda: self._look(files.disk))
            except StepFailed:
                pass
        self.record.facts["seconds"] = round(self.show.elapsed(), 3)
        return self.record

    def _tell_processes(self) -> None:
        for one in self._machine.processes():
            waits = "  (waits for the next guest)" if one.waits else ""
            self.show.line(f"    {one.role:<12} process {one.pid:<8} uid {one.uid}{waits}", "dim")

    # ------------------------------------------------------------------ steps

    def _files(self, directory: Path) -> tuple[Files, str]:
        self.show.line("Guests: Debian's GRUB for Xen and Debian's Linux, from Debian's packages", "head")
        with self.show.waiting("fetching and unpacking"):
            files = get_files(directory)
        text = f"Linux {files.debian.version}, GRUB, {DISK_MB} MB of ext4"
        self.show.line(f"    {text}")
        return files, text

    def _up(self, stack: ExitStack) -> tuple[None, str]:
        self.show.line("A machine: a warden, a hypervisor and Dom0, ordinary processes", "head")
        with self.show.waiting("starting"):
            self._machine = stack.enter_context(DemoMachine())
        self.client = self._machine.client
        processes = self._machine.processes()
        self.record.facts["processes_before"] = [one.record() for one in processes]
        self._tell_processes()
        roles = {one.role for one in processes}
        if not {"warden", "hypervisor", "dom0"} <= roles:
            raise StepFailed(f"only these processes are there: {', '.join(sorted(roles))}")
        at_work = [one for one in processes if not one.waits]
        own = len({one.uid for one in at_work}) == len(at_work)
        if not own:
            self.show.line(
                "    not started as root: all have one uid; the kernel keeps them apart less strictly"
            )
        self.record.facts["own_uids"] = own
        return None, f"{len(processes)} processes, " + ("each with its own uid" if own else "one uid")

    def _grub(self, files: Files) -> tuple[None, str]:
        self.show.line("GRUB for Xen, an unmodified guest; DomIO, the driver domain, serves its disk", "head")
        self._create("grub", kernel=str(files.grub.kernel), memory_mb=64, disks=[_disk(files)])
        grub = self._guests["grub"]
        self._wait("GRUB boots", lambda: "grub>" in grub.plain(), STEP_S, "grub")
        version = " ".join(re.findall(r"GNU GRUB +version (\S+)", grub.plain())[:1])
        self.show.line(f"    | GRUB {version}: its prompt is there")
        name, text = GREETING
        self._type("grub", f"cat (xen/xvda)/{name}\r")
        self._wait("GRUB reads a file", lambda: text in grub.plain(), STEP_S, "grub")
        self.show.line(f"    | cat (xen/xvda)/{name}: {text}", "good")
        self._type("grub", "halt\r")
        deadline = time.monotonic() + STEP_S
        while grub.ended is None and time.monotonic() < deadline:
            self._poll(0.1)
        if grub.ended != "poweroff":
            raise StepFailed(f"`halt` did not end it: {grub.ended}")
        return None, f"GRUB {version} read a file of its disk, and halted"

    def _debian(self, files: Files) -> tuple[None, str]:
        self.show.line("Debian's Linux, unmodified, on an emulated CPU; it mounts the same disk", "head")
        self._create(
            "debian",
            kernel=str(files.debian.kernel), ramdisk=str(files.debian.ramdisk), memory_mb=128,
            cmdline=f"{files.debian.cmdline} {CMDLINE}", disks=[_disk(files)],
        )  # fmt: skip
        debian = self._guests["debian"]
        self._wait("Linux boots", lambda: "MOUNTED" in debian.text, BOOT_S)
        self.show.line(
            "    | MOUNTED: it found /dev/xvda behind DomIO, an NVMe controller and an IOMMU", "good"
        )
        self._wait("it writes and calls fsync", lambda: len(debian.acknowledged) >= MORE_WRITES, STEP_S)
        self._tell_processes()
        self.show.line(
            f"    {len(debian.acknowledged)} files written, fsync came back, checksums noted", "good"
        )
        return None, f"{len(debian.acknowledged)} writes acknowledged"

    def _kill(self, role: str, title: str) -> tuple[None, str]:
        old = self._process(role)
        self.show.line(
            f"SIGKILL to {title} (process {old.pid}, uid {old.uid}) while the guest writes", "head"
        )
        os.kill(old.pid, signal.SIGKILL)
        count, first = self._goes_on(f"{title} is dead")
        new = self._process(role)
        if new.pid == old.pid:
            raise StepFailed(f"process {old.pid} is there as before: nothing was killed")
        blow = {
            "role": role, "pid": old.pid, "uid": old.uid, "new_pid": new.pid, "new_uid": new.uid,
            "seconds_to_next_write": round(first, 3), "writes_after": count,
        }  # fmt: skip
        self.record.facts["blows"].append(blow)
        self.show.line(f"    process {new.pid}, uid {new.uid} took its place", "dim")
        self.show.line(f"    the guest goes on: {count} more writes, the first after {first:.1f} s", "good")
        return None, f"{old.pid} -> {new.pid}, next write after {first:.1f} s"

    def _process(self, role: str) -> Process:
        process = self._machine.process(role)
        if process is None:
            raise StepFailed(f"there is no process of {role}")
        return process

    def _attack(self) -> tuple[None, str]:
        device = self._process("nvme")
        self.show.line(
            f"The NVMe controller (process {device.pid}) turns: DMA all over the machine's memory", "head"
        )
        os.kill(device.pid, signal.SIGUSR1)
        self._wait("it attacks", lambda: MARK in self._machine.said("nvme"), STEP_S)
        text = next(line for line in self._machine.said("nvme").splitlines() if line.startswith(MARK))
        said: dict[str, Any] = json.loads(text.removeprefix(MARK))
        refused = sum(said["refused"].values())
        self.record.facts["dma"] = {
            "asked": said["asked"], "allowed": said["allowed"], "refused": refused, "reasons": said["refused"],
        }  # fmt: skip
        problems = self._machine.client.request("check")["problems"]
        self.record.facts["invariants"] = problems
        for reason, count in sorted(said["refused"].items()):
            self.show.line(f"    {count} x {reason}", "dim")
        if said["allowed"] or refused != said["asked"]:
            raise StepFailed(f"{said['allowed']} of {said['asked']} requests were allowed")
        if problems:
            raise StepFailed(f"the hypervisor's own check: {problems[0]}")
        count, _ = self._goes_on("the attack is over")
        self.show.line(
            f"    {refused} of {said['asked']} requests refused; its driver still works: {count} more writes",
            "good",
        )
        return None, f"{refused} of {said['asked']} requests refused"

    def _end(self) -> tuple[None, str]:
        debian, facts = self._guests["debian"], self.record.facts
        self.show.line("The guest is asked to stop", "head")
        self._type("debian", "enough\n")
        deadline = time.monotonic() + STEP_S
        with self.show.waiting("it unmounts and powers off") as waiting:
            while debian.ended is None and time.monotonic() < deadline:
                self._poll(0.1)
                waiting.tick(debian.lines[-1][:50] if debian.lines else "")
        facts["processes_after"] = [one.record() for one in self._machine.processes()]
        errors = re.search(r"IO-ERRORS (\d+)", debian.text)
        facts["guest"] = {"end": debian.ended, "io_errors": int(errors[1]) if errors else None}
        pids = {one.pid for one in self._machine.processes()}
        if debian.ended != "poweroff" or "UNMOUNTED" not in debian.text:
            raise StepFailed(f"it did not end in order: {debian.ended}\n{debian.tail()}")
        if errors is None or int(errors[1]) or "FAILED" in debian.text:
            raise StepFailed(f"the guest saw errors\n{debian.tail()}")
        self._machine.close()
        left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        if left:
            raise StepFailed(f"processes are left: {left}")
        self.show.line("    it saw no I/O error, unmounted, powered off; all processes are gone", "good")
        return None, f"power-off, no I/O error seen, {len(pids)} processes gone"


def _disk(files: Files) -> dict[str, Any]:
    return {"vdev": "xvda", "format": "raw", "readonly": False, "target": str(files.disk)}
