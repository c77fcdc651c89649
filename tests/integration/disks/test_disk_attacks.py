"""A device, or DomIO, in an attacker's hands: nothing moves, every try is counted, and honest guests go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tests.support.hostile_machine as support
from tests.integration.disks.disk_images import make_ext4
from tests.support.hostile_machine import HostileMachine, hostile_machine
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(180)
DOMIO_BYTES = 32 << 20
GUEST_BYTES = 64 << 20
"""Memory of a DomIO that is a guest program (domains.dom0.toolstack.driver_guest.PAGES)."""
GRANTS = 1 << 33
"""I/O virtual addresses of granted frames begin here (domains.domio.hardware.FIRST_DMA_GFN)."""
BEYOND = "ADDRESS_BEYOND_WIDTH"
DENIED = {"NO_READ_PERMISSION", "NO_WRITE_PERMISSION"}


class DiskAttack:
    """A machine with two guests with disks; `disk1` is the hostile device's."""

    def __init__(self, machine: HostileMachine, plan: Path, image: Path) -> None:
        self.machine = machine
        self.plan = plan
        self.image = image
        self.serial = 0

    def guest(self, name: str) -> None:
        """GRUB with a disk, which it can read."""
        kernel = fetch("grub").kernel
        with kernel.open("rb") as file, self.image.open("rb") as disk:
            config = {
                "name": name,
                "memory_mb": 64,
                "uuid": os.urandom(16),
                "kernel": 0,
                "kernel_path": str(kernel),
                "disks": [{"vdev": "xvda", "format": "raw", "readonly": True, "file": 1}],
            }
            self.machine.client.request(
                "create", {"config": config, "attach": True}, [file.fileno(), disk.fileno()]
            )
        self.machine.expect(name, "grub> ", 60.0)

    def reads(self, name: str) -> None:
        """It reads a file of its disk."""
        self.machine.type(name, "cat (xen/xvda)/hello.txt\n")
        self.machine.expect(name, "hello-from-disk", 30.0)

    def statistics(self) -> tuple[int, int, int, int]:
        """Of the hostile device: DMA items carried out, bytes read and written, and faults."""
        view = self.machine.client.request("iommu", {"bdf": 8})
        (row,) = view["devices"]
        return row["requests"], row["bytes_read"], row["bytes_written"], view["faults_total"]

    def attempt(self, **plan: Any) -> list[tuple[int, str]]:
        """One round; nothing of it may have moved and each try is counted. What the device was answered."""
        before = self.statistics()
        self.serial += 1
        text = json.dumps({"serial": self.serial, "device": "disk1", **plan}).encode()
        scratch = self.plan
        with scratch.open("r+b") as file:
            file.write(text.ljust(1 << 17))
        deadline = time.monotonic() + 15.0
        while not (found := [said for said in self.said("nvme") if said["serial"] == self.serial]):
            assert time.monotonic() < deadline, self.words()
            self.machine.poll(0.02)
        results = [tuple(result) for result in found[0]["results"]]
        after = self.statistics()
        assert after[:3] == before[:3], f"something moved: {before} {after} {plan}"
        tries = len(results) * (2 if found[0]["lane"] else 1)
        assert after[3] - before[3] == tries, "a try is not in the fault log"
        assert all(fault >= 0 for fault, _ in results), results
        return results

    def words(self) -> str:
        """The hypervisor's log, for a failure."""
        (path,) = self.machine.machine.runtime.logs.glob("hypervisor-*.log")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line[:200] for line in lines if "register access" not in line)[-3000:]

    def said(self, role: str) -> list[dict[str, Any]]:
        """What hostile processes of a role told."""
        return [
            json.loads(line.removeprefix("HOSTILE "))
            for path in sorted(self.machine.machine.runtime.logs.glob(f"{role}-*.log"))
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("HOSTILE ") and line.endswith("}")
        ]


@contextmanager
def attacked(tmp_path: Path, role: str, **more: Any) -> Iterator[DiskAttack]:
    """With the role's processes hostile; `more` is for the machine."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "hello.txt").write_text("hello-from-disk\n")
    image = make_ext4(tmp_path / "disk.img", 16, content)
    plan = tmp_path / "plan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "WARDEN", Path(support.__file__).with_name("hostile_disk_warden.py"))
        patch.setenv("DOMICILE_HOSTILE_ROLE", role)
        for directory in (tmp_path, *tmp_path.parents[:2]):  # the device's uid opens the plan
            directory.chmod(directory.stat().st_mode | 0o011)
        with hostile_machine(plan, **more) as machine:
            yield DiskAttack(machine, plan, image)


def test_dma_of_a_compromised_device(tmp_path: Path) -> None:
    """Frames of Dom0, the hypervisor and guests, stale grants, stale epochs, ranges that wrap or leave what is mapped, interrupts:
    all refused, by reason; the guests read their disks before, between and after, and after the victim's destruction too."""
    with attacked(tmp_path, "nvme") as attack:
        attack.guest("victim")
        attack.guest("honest")
        attack.reads("victim")
        # Machine memory by machine addresses: all 4 GiB of it above DomIO's own range, and the hypervisor's frames (from 1 << 36).
        sweep = [*range(DOMIO_BYTES, 4 << 30, 4 << 20), *range(1 << 36, (1 << 36) + (1 << 20), 0x4000)]
        for write in (False, True):
            results = attack.attempt(dma=[(address, 64, write) for address in sweep])
            assert {reason for _, reason in results} <= DENIED
        # Granted frames that were mapped for the victim's reads a moment ago.
        results = attack.attempt(dma=[(GRANTS + (page << 12), 64, True) for page in range(256)])
        assert {reason for _, reason in results} == {"NO_WRITE_PERMISSION"}
        last = DOMIO_BYTES - 4096
        results = attack.attempt(
            dma=[
                ((1 << 64) - 4096, 8192, True),
                ((1 << 48) - 4096, 8192, False),
                (last + 4000, 200, True),
                (last, 1 << 20, False),
                (0xFEE00000, 4, True),
            ]
        )
        reasons = [
            BEYOND,
            BEYOND,
            "NO_WRITE_PERMISSION",
            "NO_READ_PERMISSION",
            "INTERRUPT_COMPATIBILITY_BLOCKED",
        ]
        assert [reason for _, reason in results] == reasons
        for epoch in (-1, 1, 1000):
            results = attack.attempt(dma=[(0x1000, 64, True), (0x1000, 64, False)], epoch=epoch)
            assert results == [(0xFFFE, "CONTEXT_NOT_PRESENT")] * 2
        results = attack.attempt(dma=[(0x1000, 4096, True)], position=(16 << 20) - 100)
        assert results == [(0, "MALFORMED")]
        results = attack.attempt(vectors=[2, 3, 16, 63, 0xFFFF])
        assert results == [(0xFFFF, "INTERRUPT_NOT_PRESENT")] * 5
        attack.reads("honest")
        attack.reads("victim")
        attack.machine.client.request("destroy", {"domain": "honest"})
        results = attack.attempt(dma=[(GRANTS + (page << 12), 64, True) for page in range(64)])
        assert {reason for _, reason in results} == {"NO_WRITE_PERMISSION"}
        attack.reads("victim")
        with pytest.raises(
            AssertionError, match="something moved"
        ):  # the check can fail: DomIO's own page is its device's to read
            attack.attempt(dma=[(0x1000, 64, False)], position=(16 << 20) - 64)
        attack.machine.neighbour_answers()
        attack.machine.check()


@pytest.mark.long
def test_dma_of_a_compromised_device_of_a_guest_program(tmp_path: Path) -> None:
    """The same where DomIO is a PV guest, whose I/O page tables hold machine frames at their own numbers: its own, and no others but those
    that it has mapped by grants."""
    with attacked(tmp_path, "nvme", domio="guest") as attack:
        attack.guest("victim")
        attack.guest("honest")
        attack.reads("victim")
        request = attack.machine.client.request

        def mapped(address: int) -> bool:
            return request("iommu", {"domain": "DomIO", "iova": address})["walk"]["mfn"] is not None

        first = next(address for address in range(16 << 20, 4 << 30, 2 << 20) if mapped(address))
        end = first + GUEST_BYTES
        assert mapped(end - 4096)
        assert not mapped(end)
        sweep = [address for address in range(0, 4 << 30, 4 << 20) if not first <= address < end]
        sweep += range(1 << 36, (1 << 36) + (1 << 20), 0x4000)
        for write in (False, True):
            results = attack.attempt(dma=[(address, 64, write) for address in sweep])
            assert {reason for _, reason in results} <= DENIED
        results = attack.attempt(
            dma=[((1 << 64) - 4096, 8192, True), (end - 96, 200, True), (end - 4096, 1 << 20, False)]
        )
        assert [reason for _, reason in results] == [BEYOND, "NO_WRITE_PERMISSION", "NO_READ_PERMISSION"]
        results = attack.attempt(dma=[(first, 64, True)], epoch=1)
        assert results == [(0xFFFE, "CONTEXT_NOT_PRESENT")]
        results = attack.attempt(vectors=[1, 2, 63, 0xFFFF])
        assert results == [(0xFFFF, "INTERRUPT_NOT_PRESENT")] * 4
        attack.reads("honest")
        request("destroy", {"domain": "honest"})
        results = attack.attempt(dma=[(address, 64, True) for address in sweep])
        assert {reason for _, reason in results} <= DENIED
        attack.reads("victim")
        with pytest.raises(
            AssertionError, match="something moved"
        ):  # the check can fail: that page is its own
            attack.attempt(dma=[(first, 64, False)], position=(16 << 20) - 64)
        attack.machine.neighbour_answers()
        attack.machine.check()


def test_hypercalls_of_a_compromised_domio(tmp_path: Path) -> None:
    """With its own credentials it gets at no domain, device, port, or grant that it was not given; then it serves."""
    with attacked(tmp_path, "domio") as attack:
        attack.guest("honest")
        attack.reads("honest")
        (tried,) = attack.said("domio")
        print(tried)
        refused = {
            name: tried[name]
            for name in tried
            if name not in ("another's device", "grants of domain 0", "grants of domain 1")
        }
        assert all(value < 0 for value in refused.values()), tried
        assert tried["another's device"] == 0xFFFFFFFF
        assert tried["grants of domain 0"] == tried["grants of domain 1"] == 0
        attack.machine.neighbour_answers()
        attack.machine.check()
