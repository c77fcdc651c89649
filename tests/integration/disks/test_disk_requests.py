"""What a back end does with good and bad requests, asked by a front end of the project's own (guests/blkfront), of both kinds of DomIO."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from guests.build import build
from tests.integration.disks.victims import victim
from tests.support.chaos import chaos_machine
from tests.support.machines import RunningMachine, running_machine
from toolstack.domio import KINDS
from toolstack.faults import What

pytestmark = pytest.mark.timeout(240)
SECTORS = 32768


def frontend(machine: RunningMachine, image: Path, cmdline: str = "") -> None:
    """Start the front end with that disk."""
    program = build("blkfront")
    kernel, disk = os.open(program, os.O_RDONLY), os.open(image, os.O_RDWR)
    try:
        config = {
            "name": "front",
            "memory_mb": 32,
            "uuid": os.urandom(16),
            "kernel": 0,
            "kernel_path": str(program),
            "cmdline": cmdline,
            "disks": [{"vdev": "xvda", "format": "raw", "readonly": False, "file": 1}],
        }
        machine.client.request("create", {"config": config, "attach": True}, [kernel, disk])
    finally:
        os.close(kernel)
        os.close(disk)


def all_passed(machine: RunningMachine, timeout: float) -> None:
    """It powered off, and each of its lines is `ok`."""
    reason = machine.wait_end("front", timeout)
    lines = machine.text["front"].replace("\r", "").splitlines()
    assert not [line for line in lines if line.startswith(("not ok", "Bail out"))], "\n".join(lines)
    assert reason == "poweroff", machine.ended["front"]
    passed = sum(bool(re.match(r"ok \d+ ", line)) for line in lines)
    assert f"1..{passed}" in lines, "\n".join(lines[-5:])


@pytest.mark.parametrize("domio", KINDS)
def test_every_request_is_answered_as_it_should_be(tmp_path: Path, domio: str) -> None:
    """Reads, writes, flushes, barriers, discards, indirect and persistent ones, full rings; segments, sectors and grants that are wrong."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(struct.pack("<Q", number).ljust(512, b"s") for number in range(SECTORS)))
    with running_machine(domio=domio) as machine:
        frontend(machine, image)
        all_passed(machine, 180.0)
        machine.check()
    content = image.read_bytes()
    expected = {8192 + piece: 0x10 + piece // 5 for piece in range(55)} | {8192 + 100: 0x42, 8192 + 108: 0x42}
    assert {sector: content[sector * 512 + 17] for sector in expected} == expected
    untouched = [struct.unpack_from("<Q", content, number * 512)[0] for number in range(8192)]
    assert untouched == list(range(8192))


def endure(tmp_path: Path, domio: str, deaths: Sequence[str], rounds: int) -> None:
    """Kill the process of each role in turn, at random moments, while the ring is full."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    seed = int(os.environ.get("DOMICILE_SEED", str(random.randrange(1 << 30))))
    print(f"DOMICILE_SEED={seed}")
    chance = random.Random(seed)
    with running_machine(domio=domio) as machine:
        frontend(machine, image, f"endure={'pn'[seed & 1]}{rounds}")
        machine.expect("front", "round 3:", 60.0)
        for role in deaths:
            until = time.monotonic() + chance.uniform(0.0, 0.3)
            while time.monotonic() < until:
                machine.poll(0.01)
            os.kill(victim(machine, role), signal.SIGKILL)
            while machine.poll(0):
                pass
            machine.forget("front")  # rounds of before
            for _ in range(2):
                machine.expect("front", r"round \d+:", 45.0)
        all_passed(machine, 180.0)
        machine.check()


@pytest.mark.parametrize("domio", KINDS)
def test_requests_in_flight_survive(tmp_path: Path, domio: str) -> None:
    """DomIO and the device are killed with the ring full: each request is answered once, without error, and what was written is read."""
    endure(tmp_path, domio, ("domio", "nvme", "domio"), 400)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("domio", KINDS)
def test_requests_in_flight_survive_many_deaths(tmp_path: Path, domio: str) -> None:
    """The same, forty times."""
    endure(tmp_path, domio, ("domio", "nvme") * 20, 1000)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_storm_of_kills_is_served(tmp_path: Path) -> None:
    """Sixty, each as soon as there is a process, which may not have said hello yet: DomIO comes back, and every request is answered."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    with running_machine() as machine:
        frontend(machine, image, "endure=n200")
        machine.expect("front", "round 3:", 60.0)
        pid = 0
        for _ in range(60):
            pid = victim(machine, "domio", pid)
            os.kill(pid, signal.SIGKILL)
        all_passed(machine, 180.0)
        machine.check()


@pytest.mark.parametrize("domio", KINDS)
def test_a_power_loss_of_the_disk_is_told_once(tmp_path: Path, domio: str) -> None:
    """A write was answered and not flushed, and the device lost power: the next flush and the next write fail, once each."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    with chaos_machine(domio=domio) as machine:
        frontend(machine, image, "power")
        machine.expect("front", "# now", 60.0)
        cut = machine.faults.add(What.POWER_CUT, target="nvme", at_ms=0, keep="lost")
        machine.faults.wait(cut, machine.poll)
        domid = machine.domains()["front"]["domid"]
        command = [sys.executable, "-m", "toolstack.cli", "-M", machine.machine.runtime.root.name]
        command += ["xenstore-write", f"/local/domain/{domid}/data/go", "1"]
        subprocess.run(command, check=True, timeout=60)
        all_passed(machine, 120.0)
        machine.check()


def run_code(tmp_path: Path, domio: str, rounds: int, timeout: float) -> None:
    """The front end reads code into pages that held other code, and runs it: its grants mapped for each request, and persistent."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    with running_machine(domio=domio) as machine:
        for grants in "dp":
            frontend(machine, image, f"code={grants}{rounds}")
            all_passed(machine, timeout)
            assert f"{rounds} reads of code" in machine.text["front"]
            machine.text["front"] = ""
            machine.ended.clear()
        machine.check()


@pytest.mark.parametrize("domio", KINDS)
def test_code_that_is_read_runs_as_read(tmp_path: Path, domio: str) -> None:
    """By whole pages, single sectors into the middle of a page, and indirect requests."""
    run_code(tmp_path, domio, 150, 90.0)


@pytest.mark.long
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("domio", KINDS)
def test_code_that_is_read_runs_as_read_ten_thousand_times(tmp_path: Path, domio: str) -> None:
    """The same, often."""
    run_code(tmp_path, domio, 10_000, 600.0)
