"""A guest that writes to disks on command, on a machine with a fault plan: what the chaos tests strike."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.machines import Expected, RunningMachine
from toolstack.faults import Fault, FaultyMachine
from toolstack.guestfetch import debian

SIZE = 256 << 10
"""Bytes that each cell writes."""
WORKER = b"""echo WORKER
while read cmd dev tag; do
 case $cmd in put|raw|flush) i=0; while [ ! -b /dev/$dev ] && [ $i -lt 600 ]; do sleep 0.05; i=$((i+1)); done ;; esac
 case $cmd in
 put)
  dd if=/dev/urandom of=/tmp/d bs=64k count=4 2>/dev/null; s=$(md5sum < /tmp/d)
  if dd if=/tmp/d of=/dev/$dev bs=64k oflag=direct conv=fsync,notrunc 2>/dev/null; then echo "ACK $tag ${s%% *}"; else echo "FAIL $tag"; fi ;;
 raw) if dd if=/dev/urandom of=/dev/$dev bs=64k count=4 oflag=direct conv=notrunc 2>/dev/null; then echo "ACK $tag"; else echo "FAIL $tag"; fi ;;
 flush) if dd if=/dev/null of=/dev/$dev conv=fsync,notrunc 2>/dev/null; then echo "ACK $tag"; else echo "FAIL $tag"; fi ;;
 say) echo "SAID $tag" ;;
 off) poweroff -f ;;
 esac
done
"""


def record(**line: object) -> None:
    """Keep the result of a cell."""
    target = os.environ.get("DOMICILE_CHAOS_RECORD")
    if target:
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ChaosMachine(RunningMachine):
    """With `faults`."""

    def __init__(self, machine: FaultyMachine) -> None:
        super().__init__(machine)
        self.faults = machine.faults
        self._serial = 0

    def boot(self, name: str = "worker", **more: Any) -> int:
        """Debian with the worker at its console; its domid."""
        guest = debian(modules=("xen-blkfront",), extra={"etc/rc.guest": WORKER})
        cmdline = f"{guest.cmdline} quiet"
        return self.create(name, guest.kernel, ramdisk=guest.ramdisk, memory_mb=128, cmdline=cmdline, **more)

    def attach(self, name: str, vdev: str, image: Path) -> None:
        """A disk comes."""
        file = os.open(image, os.O_RDWR)
        try:
            disk = {"vdev": vdev, "format": "raw", "readonly": False}
            self.client.request("block-attach", {"domain": name, "disk": disk}, [file])
        finally:
            os.close(file)

    def tag(self) -> str:
        """A word that was not said before."""
        self._serial += 1
        return f"t{self._serial}t"

    def put(self, name: str, vdev: str, what: str = "put") -> str:
        """Have it write and flush (`raw`: write, `flush`: flush); the tag under which it will tell."""
        tag = self.tag()
        self.type(name, f"{what} {vdev} {tag}\n")
        return tag

    def does(self, name: str, vdev: str, what: str, timeout: float = 60.0) -> bool:
        """The same, and whether it went well."""
        tag = self.put(name, vdev, what)
        return self.expect(name, rf"(ACK|FAIL) {tag}", timeout).group(1) == "ACK"

    def says(self, name: str, timeout: float) -> float:
        """It answers on its console; how long that took."""
        tag, begun = self.tag(), time.monotonic()
        self.type(name, f"say x {tag}\n")
        self.expect(name, f"SAID {tag}", timeout)
        return time.monotonic() - begun

    def logs(self) -> str:
        """The ends of the processes' logs."""
        texts = [
            f"{path.name}: {path.read_text(errors='replace')[-1200:]}"
            for path in sorted(self.machine.runtime.logs.iterdir())
        ]
        return "\n---\n".join(text for text in texts if len(text) > 30)


def blank(path: Path, megabytes: int = 4) -> Path:
    """An empty disk."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    return path


def written(path: Path) -> str:
    """Checksum of what a `put` wrote."""
    with path.open("rb") as file:
        return hashlib.md5(file.read(SIZE), usedforsecurity=False).hexdigest()


@contextmanager
def chaos_machine(**more: Any) -> Iterator[ChaosMachine]:
    """A machine with a fault plan; its logs come with a failure."""
    with FaultyMachine(**more) as machine:
        running = ChaosMachine(machine)
        try:
            yield running
        except (Expected, AssertionError) as error:
            error.add_note(running.logs())
            raise


def disk_cycle(
    machine: ChaosMachine, name: str, vdev: str, image: Path, fault: Fault, bound_s: float
) -> tuple[float, str]:
    """A disk comes, is written to, and goes, while the fault strikes: (the longest step's seconds, what came of the write).
    AssertionError if anything takes longer than the bound, the fault does not strike, or an acknowledged write is not there."""
    steps: list[float] = []

    def step(begun: float) -> None:
        steps.append(time.monotonic() - begun)
        assert steps[-1] < bound_s, f"{fault.what} of {fault.target} at {fault.event}: {steps[-1]:.1f} s"

    begun = time.monotonic()
    machine.attach(name, vdev, image)
    tag = machine.put(name, vdev)
    found = machine.expect(name, rf"(ACK|FAIL) {tag} ?([0-9a-f]*)", bound_s)
    acknowledged = found.group(2) if found.group(1) == "ACK" else None
    # Before anything else may fail: a lost write is never hidden behind a bound that was missed.
    assert acknowledged in (None, written(image)), "an acknowledged write is not on the disk"
    step(begun)
    begun = time.monotonic()
    deadline = begun + bound_s
    while (
        True
    ):  # the toolstack waits ten seconds for a back end; one that restarts meanwhile gets another chance
        try:
            machine.client.request("block-detach", {"domain": name, "vdev": vdev})
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
    step(begun)
    assert machine.faults.hit(fault), (
        f"{fault.event}: seen {machine.faults.counted(fault)} times, never struck"
    )
    assert machine.faults.wait(fault).pids, f"{fault.event}: there was no process {fault.target}"
    assert acknowledged in (None, written(image)), "an acknowledged write is not on the disk any more"
    machine.says(name, bound_s)
    machine.check()
    return max(steps), found.group(1)


def table(lines: list[str]) -> str:
    """Markdown of a record: a row for each kind of process, signal and outcome, with the worst time of each place."""
    rows: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for line in lines:
        one = json.loads(line)
        places = rows.setdefault((one["target"], one["what"], one["outcome"]), {})
        places.setdefault(one["place"], []).append(one["seconds"])
    text = ["| struck | with | at (longest step, seconds) | outcome |", "| --- | --- | --- | --- |"]
    for (target, what, outcome), places in sorted(rows.items()):
        cells = ", ".join(
            f"{place} ({max(seconds):.1f}{f' of {len(seconds)}' if len(seconds) > 1 else ''})"
            for place, seconds in sorted(places.items())
        )
        text.append(f"| {target} | {what} | {cells} | {outcome} |")
    return "\n".join(text)


if __name__ == "__main__":
    import sys

    print(table(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))
