"""Full HVM guests beside others on one machine: keys, pictures, everything given back; a device model that is killed or stopped."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers.pc.keys import keys_of_character
from tests.integration.hvm.pc_disks import bootable_disk
from tests.support.machines import RunningMachine, running_machine
from toolstack.cli.images import Images, make_config
from toolstack.cli.script import Plain
from toolstack.xlcfg.devices import parse_disk

WAIT_S = 90.0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return bootable_disk(tmp_path / "disk.img")


def create(machine: RunningMachine, name: str, disk: Path) -> int:
    """An HVM guest that boots the disk."""
    fields = {
        "name": name,
        "type": "hvm",
        "memory_mb": 32,
        "uuid": uuid.uuid4().bytes,
        "disks": [parse_disk(f"{disk},raw,hda,r", "disk")],
        "boot": "c",
    }
    with Images() as images:
        config = make_config(fields, images).model_dump()
        return int(machine.client.request("create", {"config": config, "attach": True}, images.descriptors))


def gone(machine: RunningMachine) -> None:
    """Nothing but Dom0 and DomIO is left; the hypervisor's records hold."""
    deadline = time.monotonic() + WAIT_S
    while set(machine.domains()) - {"Domain-0", "DomIO"}:
        assert time.monotonic() < deadline, machine.domains()
        machine.poll(0.1)
    machine.check()
    assert not machine.processes("dm")
    assert not machine.processes("domu")


def plain(machine: RunningMachine, name: str) -> str:
    """Its console without moves of the cursor."""
    return Plain().feed(machine.text[name].encode("latin1")).decode("latin1")


def wait(machine: RunningMachine, name: str, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + WAIT_S
    while plain(machine, name).count(text) < times:
        assert time.monotonic() < deadline, plain(machine, name)[-1000:]
        assert name not in machine.ended, machine.ended[name]
        machine.poll(0.2)


def test_keys_reach_the_guest_and_its_screen_can_be_seen(disk: Path) -> None:
    with running_machine() as machine:
        create(machine, "pc", disk)
        wait(machine, "pc", "grub> ")
        keys = ["-".join(keys_of_character(character)) for character in "echo Up_1"]
        for start in range(0, len(keys), 4):  # a BIOS keeps 15 keys, and each has a press and a release
            machine.client.request("send-key", {"domain": "pc", "keys": keys[start : start + 4]})
            wait(machine, "pc", "grub> " + "echo Up_1"[: start + 4])
        machine.client.request("send-key", {"domain": "pc", "keys": ["ret"]})
        wait(machine, "pc", "Up_1", 2)
        result, files = machine.client.request_files("screenshot", {"domain": "pc"})
        try:
            pixels = os.pread(files[0], 1 << 24, 0)
        finally:
            for fd in files:
                os.close(fd)
        assert (result["width"], result["height"]) == (720, 400)
        assert len(pixels) == 720 * 400 * 3
        lit = sum(1 for at in range(0, len(pixels), 3) if pixels[at])
        assert 3000 < lit < 60000, "letters on black"
        with pytest.raises(Exception, match="is no key"):
            machine.client.request("send-key", {"domain": "pc", "keys": ["nosuchkey"]})
        machine.client.request("destroy", {"domain": "pc"})
        gone(machine)


@pytest.fixture
def two(disk: Path) -> Iterator[RunningMachine]:
    with running_machine() as machine:
        create(machine, "one", disk)
        create(machine, "two", disk)
        for name in ("one", "two"):
            wait(machine, name, "grub> ")
        yield machine


def model_of(machine: RunningMachine, name: str) -> int:
    """The process id of its device model."""
    return machine.process_of(machine.domains()[f"{name}-dm"]["domid"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_device_model_that_is_killed_or_stopped_takes_its_guest_along_and_no_other(
    two: RunningMachine, how: signal.Signals
) -> None:
    """Within a bound, and with a reason; the neighbour answers as before."""
    began = time.monotonic()
    os.kill(model_of(two, "one"), how)
    assert two.wait_end("one", 60.0) == "crash"
    assert time.monotonic() - began < 40
    wanted = "device model is gone" if how is signal.SIGKILL else "the device model does not answer"
    assert wanted in two.ended["one"][1]
    two.type("two", "echo still\r")
    wait(two, "two", "still", 2)
    two.client.request("destroy", {"domain": "two"})
    gone(two)
