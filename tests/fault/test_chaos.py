"""Chaos on real processes: each signal, at each XenbusState, to each kind of process; the guest is an unmodified Debian.

A cell passes if the fault struck, everybody was answered within the bound, and what was acknowledged is on the disk (test_chaos_ends.py
has those after which a guest, or the machine, is over). DOMICILE_CHAOS_RECORD=FILE keeps a line for each cell."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos import ChaosMachine, blank, chaos_machine, disk_cycle, record, written
from toolstack.faults import What

SIGNALS = (What.KILL, What.FREEZE, What.SEGFAULT)
PLACES = [("front", state) for state in (1, 3, 4, 6)] + [("back", state) for state in (1, 2, 4, 5, 6)]
"""States that each end passes through: Linux's front end skips InitWait, and Closing when its disk is taken away; a back end skips
Initialised; nobody reconfigures (7, 8)."""
QUICK = {
    ("domio", What.KILL, "front", 3), ("domio", What.SEGFAULT, "back", 4), ("domio", What.KILL, "back", 5),
    ("nvme", What.KILL, "back", 2), ("nvme", What.SEGFAULT, "front", 4), ("domio", What.KILL, "front", 6),
    ("nvme", What.FREEZE, "back", 1), ("domio", What.FREEZE, "front", 4),
}  # fmt: skip
BOUND_S = 20.0
"""A stopped process that never goes on is ended after a second, also one that has not said hello yet; the rest is a busy host."""


@pytest.fixture(scope="module")
def worker(shared_machines: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosMachine]:
    """One machine and guest for all cells that it survives."""
    with chaos_machine() as machine:
        machine.boot()
        machine.expect("worker", "WORKER", 120.0)
        # One disk stays: DomIO is there from the first cell on, and serves another disk whenever it is struck.
        machine.attach("worker", "xvdz", blank(tmp_path_factory.mktemp("disks") / "other.img"))
        machine.expect("worker", f"ACK {machine.put('worker', 'xvdz')}", 60.0)
        yield machine


CELLS = [
    pytest.param(
        target, what, end, state, id=f"{target}-{what}-{end}{state}",
        marks=[] if (target, what, end, state) in QUICK else [pytest.mark.long],
    )
    for target in ("domio", "nvme") for what in SIGNALS for end, state in PLACES
]  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("target", "what", "end", "state"), CELLS)
def test_a_disk_survives(
    worker: ChaosMachine, tmp_path: Path, target: str, what: What, end: str, state: int
) -> None:
    """A disk is attached, written to and detached while DomIO or the device is struck: all goes on."""
    vdev = f"xvd{'bcdefghijklm'[PLACES.index((end, state))]}"
    image = blank(tmp_path / "disk.img")
    fault = worker.faults.add(what, target=target, event=f"xenbus:{end}:{state}", for_ms=0)
    seconds, came = disk_cycle(worker, "worker", vdev, image, fault, BOUND_S)
    record(target=target, what=what, place=f"{end} {state}", outcome=came, seconds=round(seconds, 2))
    assert came == "ACK", "the guest saw an I/O error"


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("end", "state"), [("front", 3), ("back", 4), ("back", 5)])
@pytest.mark.parametrize("target", ["hypervisor", "dom0", "domu"])
def test_what_stands_still_for_a_while_goes_on(
    worker: ChaosMachine, tmp_path: Path, target: str, end: str, state: int
) -> None:
    """Half a second of SIGSTOP for those whom nobody replaces: later, and nothing lost. (A guest that owes a grant for a second is
    crashed: docs/limits.md.)"""
    vdev = f"xvd{'nopq'[(end, state) == ('front', 3)]}"
    image = blank(tmp_path / "disk.img")
    fault = worker.faults.add(What.FREEZE, target=target, event=f"xenbus:{end}:{state}", for_ms=500)
    seconds, came = disk_cycle(worker, "worker", vdev, image, fault, BOUND_S)
    record(
        target=target, what="freeze 0.5 s", place=f"{end} {state}", outcome=came, seconds=round(seconds, 2)
    )
    assert came == "ACK"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "target"),
    [
        (What.FREEZE, "dom0"),
        pytest.param(What.FREEZE, "hypervisor", marks=pytest.mark.long),
        pytest.param(What.FREEZE, "domu", marks=pytest.mark.long),
        pytest.param(What.KILL, "domio", marks=pytest.mark.long),
        pytest.param(What.SEGFAULT, "nvme", marks=pytest.mark.long),
    ],
)
def test_a_console_loses_nothing(worker: ChaosMachine, tmp_path: Path, what: What, target: str) -> None:
    """The console has no XenbusState: the strike is at a line of output. Every line before and after arrives, once and in order."""
    image = blank(tmp_path / "disk.img")
    if target in ("domio", "nvme"):
        worker.attach("worker", "xvdr", image)
        worker.expect("worker", f"ACK {worker.put('worker', 'xvdr')}", 30.0)
    first = worker.tag()
    fault = worker.faults.add(what, target=target, event=f"console:SAID {first}", for_ms=500)
    tags = [first, *(worker.tag() for _ in range(8))]
    mark = len(worker.text["worker"])
    begun = time.monotonic()
    for tag in tags:
        worker.type("worker", f"say x {tag}\n")
    assert worker.faults.wait(fault, worker.poll).pids, f"there was no process {target}"
    worker.expect("worker", f"SAID {tags[-1]}", 30.0)
    seconds = time.monotonic() - begun
    # The tty may echo what is typed next between a line and its end.
    assert re.findall(r"SAID (t\d+t)", worker.text["worker"][mark:]) == tags
    if target in ("domio", "nvme"):
        tag = worker.put("worker", "xvdr")
        checksum = worker.expect("worker", rf"ACK {tag} ([0-9a-f]+)", 30.0).group(1)
        worker.client.request("block-detach", {"domain": "worker", "vdev": "xvdr"})
        assert written(image) == checksum
    record(target=target, what=what, place="console line", outcome="all lines", seconds=round(seconds, 2))
