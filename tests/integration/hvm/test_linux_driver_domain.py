"""A driver domain that nobody here wrote: Debian's Linux as a PVH guest with an NVMe controller of its own and its own xen-blkback serves
the disk of Debian's Linux as a PV guest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.disks.disk_images import make_ext4
from tests.support.machines import running_machine
from toolstack.errors import MachineError
from toolstack.guestfetch import INIT_LINE, debian, fetch
from toolstack.xlcfg.devices import parse_disk

BOOT_S = 90.0
PHYSICAL_DEVICE = rb"""#!/bin/busybox sh
# physical-device BACKEND DEVICE: the last thing that xl devd's hotplug script does for a back end. XS_WRITE is 11.
value=$(stat -c %t:%T $2)
path="$1/physical-device"
length=$((${#path} + 1 + ${#value}))
exec 3<>/dev/xen/xenbus
printf "\\013\\000\\000\\000\\001\\000\\000\\000\\000\\000\\000\\000\\$(printf %03o $length)\\000\\000\\000$path\\000$value" >&3
dd bs=4096 count=1 <&3 2>/dev/null | tail -c 3
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_debians_block_back_end_serves_debians_block_front_end(tmp_path: Path) -> None:
    """The back end maps the front end's grants, and its nvme driver has the device do DMA right there; sums agree after a new mount, and
    nothing was refused. When the driver domain is destroyed the front end's grants are its own again."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "hello.txt").write_text("hello-through-blkback\n")
    image = make_ext4(tmp_path / "disk.img", 16, content)
    driver = debian(modules=("nvme", "xen-blkback"), extra={"bin/physical-device": PHYSICAL_DEVICE})
    assert driver.pvh_kernel is not None
    user = debian(modules=("xen-blkfront", "crc32c_generic", "ext4"))
    with running_machine() as machine:
        with image.open("r+b") as file:
            arguments = {"kind": "nvme", "config": {"format": "raw", "target": str(image)}}
            bdf = machine.client.request("device-plug", arguments, [file.fileno()])
        back = machine.create(
            "driver", driver.pvh_kernel, ramdisk=driver.ramdisk, memory_mb=192, cmdline="console=hvc0 quiet", type="pvh", pci=[bdf]
        )  # fmt: skip
        front = machine.create(
            "user", user.kernel, ramdisk=user.ramdisk, memory_mb=128, cmdline="console=hvc0 quiet"
        )
        for name in ("driver", "user"):
            machine.expect(name, INIT_LINE, BOOT_S)
            machine.expect(name, "# ", BOOT_S)
        disk = parse_disk("format=raw,vdev=xvdb,access=rw,backend=driver,target=/dev/nvme0n1", "test")
        number = machine.client.request("block-attach", {"domain": "user", "disk": disk})
        machine.type("driver", f"physical-device backend/vbd/{front}/{number} /dev/nvme0n1\n")
        machine.expect("driver", r"\nOK", BOOT_S)
        for command, answer in (
            ("while [ ! -b /dev/xvdb ]; do sleep 0.1; done; mount -t ext4 /dev/xvdb /mnt && cat /mnt/hello.txt", "\nhello-through-blkback"),
            ("dd if=/dev/urandom of=/mnt/new bs=64k count=32 conv=fsync 2>/dev/null; md5sum </mnt/new; umount /mnt; echo un$((6*7))", "un42"),
            ("mount -t ext4 /dev/xvdb /mnt; md5sum </mnt/new; umount /mnt; echo un$((7*7))", "un49"),
        ):  # fmt: skip
            machine.type("user", command + "\n")
            machine.expect("user", answer, BOOT_S)
        sums = re.findall(r"\n([0-9a-f]{32})  -", machine.text["user"])
        assert len(sums) == 2
        assert sums[0] == sums[1]
        (row,) = machine.client.request("block-list", {"domain": "user"})
        assert (row["backend_id"], row["state"]) == (back, 4)
        (device,) = machine.client.request("iommu", {"bdf": bdf})["devices"]
        assert device["domain"] == back
        assert device["bytes_read"] > 32 * 65536
        assert not device["faults"]
        machine.check()
        machine.client.request("destroy", {"domain": "driver"})
        machine.type("user", "echo still-$((3*5))\n")
        machine.expect("user", "still-15", 30.0)
        machine.check()
        machine.client.request("destroy", {"domain": "user"})
        machine.settled()


def test_a_backend_that_cannot_be_is_named() -> None:
    """No such domain; Dom0, which serves no disks; the guest itself."""
    with running_machine() as machine:
        machine.create("g", fetch("grub").kernel)
        for name, why in (
            ("nobody", "there is no domain 'nobody'"),
            ("0", "cannot serve it"),
            ("g", "cannot serve it"),
        ):
            disk = parse_disk(f"format=raw,vdev=xvdb,access=rw,backend={name},target=/dev/sda", "test")
            with pytest.raises(MachineError, match=f"disk xvdb: .*{why}"):
                machine.client.request("block-attach", {"domain": "g", "disk": disk})
        assert machine.client.request("block-list", {"domain": "g"}) == []
