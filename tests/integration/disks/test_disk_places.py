"""Disks that come and go for as long as the machine lives: a place that became free is another disk's, and serves it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.machines import running_machine
from toolstack.guestfetch import fetch
from toolstack.xlcfg.devices import parse_disk

ROUNDS = 40
INIT_WAIT = 2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_more_disks_in_a_machines_life_than_there_are_places(tmp_path: Path) -> None:
    """DomIO has 31 places. The last disk is offered (InitWait) as the first is."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 20))
    with running_machine() as machine:
        machine.create("g", fetch("grub").kernel, memory_mb=64)
        machine.expect("g", "grub> ", 60.0)  # a starting GRUB would connect to the first one
        disk = parse_disk(f"{image},raw,xvdb,r", "test")
        for number in range(ROUNDS):
            with image.open("rb") as file:
                machine.client.request("block-attach", {"domain": "g", "disk": disk}, [file.fileno()])
            if number in (0, ROUNDS - 1):
                deadline = time.monotonic() + 60.0
                while machine.client.request("block-list", {"domain": "g"})[0]["state"] != INIT_WAIT:
                    assert time.monotonic() < deadline, f"disk {number + 1} is not offered"
                    machine.poll(0.1)
            machine.client.request("block-detach", {"domain": "g", "vdev": "xvdb", "force": True})
        machine.check()
