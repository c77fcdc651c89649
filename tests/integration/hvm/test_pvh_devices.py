"""Devices that PVH guests own: an unmodified kernel's own nvme driver behind the IOMMU, and a device in an attacker's hands."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

import tests.support.hostile_machine as support
from tests.integration.disks.disk_images import make_ext4
from tests.support.hostile_machine import HostileMachine, hostile_machine
from tests.support.machines import RunningMachine, running_machine
from toolstack.errors import MachineError
from toolstack.guestfetch import INIT_LINE, debian, fetch

BOOT_S = 90.0
BDF = 0x0100
GRUB_MB = 64


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MB of ext4 with a file."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "hello.txt").write_text("hello-from-nvme\n")
    return make_ext4(tmp_path / "disk.img", 16, content)


def plug(machine: RunningMachine | HostileMachine, image: Path, **more: Any) -> int:
    with image.open("r+b") as file:
        arguments = {"kind": "nvme", "config": {"format": "raw", "target": str(image)}, **more}
        return int(machine.client.request("device-plug", arguments, [file.fileno()]))


def owner(machine: RunningMachine, bdf: int) -> int | None:
    (row,) = [row for row in machine.client.request("pci-list") if row["bdf"] == bdf]
    found: int | None = row["domid"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_debians_own_nvme_driver_mounts_and_writes(image: Path) -> None:
    """It finds the controller on the PCI bus, gets its interrupts by MSI-X, reads and writes an ext4 file system through the IOMMU; what
    it wrote is in the image."""
    guest = debian(modules=("nvme", "crc32c_generic", "ext4"))
    assert guest.pvh_kernel is not None
    with running_machine() as machine:
        bdf = plug(machine, image)
        assert bdf == BDF
        machine.create(
            "g", guest.pvh_kernel, ramdisk=guest.ramdisk, memory_mb=256, cmdline="console=hvc0", type="pvh", pci=[bdf]
        )  # fmt: skip
        machine.expect("g", INIT_LINE, BOOT_S)
        for command, answer in (
            ("grep -c nvme0q /proc/interrupts", r"\n2\r?\n"),
            ("mount -t ext4 /dev/nvme0n1 /mnt && cat /mnt/hello.txt", "\nhello-from-nvme"),
            ("dd if=/dev/urandom of=/mnt/new bs=64k count=32 conv=fsync 2>/dev/null; umount /mnt; echo un$((6*7))", "un42"),
            ("mount -t ext4 /dev/nvme0n1 /mnt && md5sum </mnt/new; umount /mnt; echo un$((7*7))", "un49"),
        ):  # fmt: skip
            machine.type("g", command + "\n")
            machine.expect("g", answer, BOOT_S)
        (row,) = machine.client.request("iommu", {"bdf": bdf})["devices"]
        assert row["domain"] == owner(machine, bdf) == machine.domains()["g"]["domid"]
        assert row["bytes_read"] > 32 * 65536  # from memory: what was written to the disk
        assert row["interrupts"] > 20
        assert not row["faults"]
        machine.type("g", "poweroff -f\n")
        assert machine.wait_end("g", BOOT_S) == "poweroff"
        assert owner(machine, bdf) is None
        machine.check()
    assert b"hello-from-nvme" in image.read_bytes()


def test_a_device_is_one_guests_and_comes_back(image: Path) -> None:
    """Who may have it, what is refused, and that a destroyed guest leaves it free."""
    kernel = fetch("grub").kernel
    pvh = kernel.with_name("grub-i386-xen_pvh.bin")
    with running_machine() as machine:
        bdf = plug(machine, image, bdf=0x0018)
        assert bdf == 0x0018
        with pytest.raises(MachineError, match=r"0000:00:03\.0: there is one at that address"):
            plug(machine, image, bdf=0x0018)
        with pytest.raises(MachineError, match="only PVH and HVM guests can be given a device"):
            machine.create("pv", kernel, pci=[bdf])
        with pytest.raises(MachineError, match=r"0000:05:00\.0: there is none"):
            machine.create("none", pvh, type="pvh", memory_mb=GRUB_MB, pci=[0x0500])
        machine.create("one", pvh, type="pvh", memory_mb=GRUB_MB, pci=[bdf])
        machine.expect("one", "grub> ", 40.0)
        with pytest.raises(MachineError, match=r"domain [0-9]+ has it"):
            machine.create("two", pvh, type="pvh", memory_mb=GRUB_MB, pci=[bdf])
        with pytest.raises(MachineError, match=r"domain [0-9]+ has it"):
            machine.client.request("device-unplug", {"bdf": bdf})
        machine.client.request("destroy", {"domain": "one"})
        machine.create("two", pvh, type="pvh", memory_mb=GRUB_MB, pci=[bdf])
        machine.expect("two", "grub> ", 40.0)
        assert owner(machine, bdf) == machine.domains()["two"]["domid"]
        machine.client.request("destroy", {"domain": "two"})
        machine.client.request("device-unplug", {"bdf": bdf})
        assert machine.client.request("pci-list") == []
        machine.check()


def test_dma_outside_the_owners_memory_moves_nothing(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's device aims at every part of machine memory, and beyond: it reaches what its owner has, and nothing else."""
    plan = tmp_path / "plan"
    monkeypatch.setattr(support, "WARDEN", Path(support.__file__).with_name("hostile_disk_warden.py"))
    monkeypatch.setenv("DOMICILE_HOSTILE_ROLE", "nvme")
    for directory in (tmp_path, *tmp_path.parents[:2]):  # the device's uid opens the plan
        directory.chmod(directory.stat().st_mode | 0o011)
    pvh = fetch("grub").kernel.with_name("grub-i386-xen_pvh.bin")
    with hostile_machine(plan) as machine:
        bdf = plug(machine, image)
        config = {
            "name": "owner", "memory_mb": GRUB_MB, "uuid": os.urandom(16), "kernel": 0, "kernel_path": str(pvh), "type": "pvh",
            "pci": [bdf],
        }  # fmt: skip
        with pvh.open("rb") as file:
            machine.client.request("create", {"config": config, "attach": True}, [file.fileno()])
        machine.expect("owner", "grub> ", 60.0)

        def attempt(
            serial: int, dma: list[tuple[int, int, bool]]
        ) -> tuple[list[tuple[int, str]], dict[str, Any]]:
            text = json.dumps({"serial": serial, "device": "hw1", "dma": dma}).encode()
            with plan.open("r+b") as file:
                file.write(text.ljust(1 << 17))
            deadline = time.monotonic() + 15.0
            pattern = re.compile(rf'^HOSTILE (\{{"serial": {serial},.*\}})$', re.MULTILINE)
            while True:
                said = [
                    found.group(1)
                    for path in machine.machine.runtime.logs.glob("nvme-*.log")
                    if (found := pattern.search(path.read_text(encoding="utf-8", errors="replace")))
                ]
                if said:
                    break
                assert time.monotonic() < deadline
                machine.poll(0.02)
            (row,) = machine.client.request("iommu", {"bdf": bdf})["devices"]
            told = json.loads(said[0])
            row["ways"] = 2 if told["lane"] else 1  # by which each was asked
            return [tuple(result) for result in told["results"]], row

        _, before = attempt(1, [])
        # GRUB puts the shared info and its grant table right behind its RAM: they are its own too.
        beyond = [
            *range((GRUB_MB << 20) + (8 << 20), 4 << 30, 8 << 20),
            *range(1 << 36, (1 << 36) + (1 << 20), 0x10000),
        ]
        holes = {
            0xFC000000 >> 23,
            0xFEFF8000 >> 23,
        }  # the guest's own ACPI tables and special pages are not far
        outside = [address for address in beyond if address >> 23 not in holes]
        results, after = attempt(2, [(address, 64, write) for address in outside for write in (False, True)])
        assert {reason for _, reason in results} <= {"NO_READ_PERMISSION", "NO_WRITE_PERMISSION"}
        assert len(results) == 2 * len(outside)
        assert all(after[name] == before[name] for name in ("requests", "bytes_read", "bytes_written"))
        assert sum(after["faults"].values()) - sum(before["faults"].values()) == after["ways"] * len(results)
        results, inside = attempt(3, [((GRUB_MB << 20) - 4096, 64, False)])
        assert results == [(-1, "")], "the check can fail: its owner's memory it does reach"
        assert inside["bytes_read"] == after["bytes_read"] + 64 * inside["ways"]
        machine.type("owner", "echo still-$grub_cpu\n")
        machine.expect("owner", "still-i386", 20.0)
        machine.neighbour_answers()
        machine.check()
