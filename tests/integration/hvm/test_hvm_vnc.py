"""`vnc=1`: a real client library (vncdotool) sees the screen of a full HVM guest, types on its keyboard, and sees the screen change its size."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from drivers.pc.keys import keys_of_character
from tests.integration.hvm.pc_disks import bootable_disk
from tests.support.machines import RunningMachine, running_machine
from toolstack.cli.images import Images, make_config
from toolstack.cli.script import Plain
from toolstack.xlcfg.devices import parse_disk
from toolstack.xlcfg.vnc import parse_vnc

WAIT_S = 90.0
VNCDO = Path(sys.executable).with_name("vncdo")


def vncdo(where: str, *commands: str, password: str = "geheim") -> subprocess.CompletedProcess[str]:
    """One connection of the client's."""
    return subprocess.run(
        [VNCDO, "-s", where, "-p", password, "-t", "30", *commands],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def plain(machine: RunningMachine) -> str:
    return Plain().feed(machine.text["pc"].encode("latin1")).decode("latin1")


def wait(machine: RunningMachine, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + WAIT_S
    while plain(machine).count(text) < times:
        assert time.monotonic() < deadline, plain(machine)[-1000:]
        assert "pc" not in machine.ended, machine.ended["pc"]
        machine.poll(0.2)


def size(png: Path) -> tuple[int, int]:
    image = pytest.importorskip("PIL.Image")
    with image.open(png) as shot:
        return tuple(shot.size)


def test_a_client_sees_types_and_follows_the_size(tmp_path: Path) -> None:
    pytest.importorskip("vncdotool")
    wanted = parse_vnc({"vncpasswd": "geheim"}, {"vnc": 1, "vncdisplay": 40})
    assert wanted is not None
    fields = {
        "name": "pc",
        "type": "hvm",
        "memory_mb": 32,
        "uuid": uuid.uuid4().bytes,
        "disks": [parse_disk(f"{bootable_disk(tmp_path / 'disk.img')},raw,hda,r", "disk")],
        "boot": "c",
        **wanted.domain_fields(),
    }
    with running_machine() as machine:
        with Images() as images:
            config = make_config(fields, images).model_dump()
            domid = machine.client.request("create", {"config": config, "attach": True}, images.descriptors)
        found = machine.client.request("vnc", {"domain": "pc"})
        assert found["address"] == "127.0.0.1"
        assert found["port"] >= 5940
        assert "geheim" not in str(machine.domains()["pc"])
        for name, value in (("vnc-port", str(found["port"])), ("vnc-listen", "127.0.0.1")):
            done = subprocess.run(
                ["xenstore-read", f"/local/domain/{domid}/console/{name}"],
                env={**os.environ, "XENSTORED_PATH": str(machine.machine.runtime.xenstore)},
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
            assert done.stdout.strip() == value
        where = f"127.0.0.1::{found['port']}"
        wait(machine, "grub> ")
        # vncdotool types one key after the other; a BIOS keeps fifteen.
        for start in range(0, len("echo up-1"), 4):
            part = "echo up-1"[start : start + 4]
            words = [
                word
                for character in part
                for word in ("key", {" ": "space"}.get(character, character))
                if keys_of_character(character)
            ]
            done = vncdo(where, *words)
            assert done.returncode == 0, done.stderr
            wait(machine, "grub> " + "echo up-1"[: start + 4])
        shot = tmp_path / "text.png"
        done = vncdo(where, "key", "enter", "pause", "1", "capture", str(shot))
        assert done.returncode == 0, done.stderr
        wait(machine, "up-1", 2)
        assert size(shot) == (720, 400)
        refused = vncdo(where, "key", "a", password="falsch")
        assert refused.returncode != 0
        hostile = socket.create_connection(("127.0.0.1", found["port"]), timeout=10)
        hostile.sendall(b"RFB 003.008\n\2" + b"\xff" * 4096)
        machine.type("pc", "echo still\r")
        wait(machine, "still", 2)
        hostile.close()
        machine.client.request("destroy", {"domain": "pc"})
