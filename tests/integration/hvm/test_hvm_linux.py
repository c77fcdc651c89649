"""Debian's stock kernel, started by GRUB from a PC's disk: with the emulated IDE disk, and with xen-blkfront on the same one after unplug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import GRUB, LINUX_MODULES, SEABIOS, bootable_disk, need
from toolstack.cli.script import Plain
from toolstack.guestfetch import FetchError, debian

pytestmark = [pytest.mark.long, pytest.mark.timeout(700)]
TIMEOUT_S = 600
NVME = b"hello from the guest's own controller\n"
MODULES = ("nvme", "ata_piix", "sd_mod", "xen-blkfront", "ext4", "crc32c_generic")
SCRIPT = b"""#!/bin/busybox sh
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    for disk in /dev/xvda1 /dev/sda1; do
        [ -b $disk ] && break 2
    done
    sleep 1
done
mount -o sync $disk /mnt && echo "the disk is $disk: $(cat /mnt/hello)"
echo "written by the guest on $disk" >/mnt/answer
umount /mnt
if [ -b /dev/nvme0n1 ]; then
    echo "nvme: $(head -n 1 /dev/nvme0n1), vectors $(grep -c nvme0q /proc/interrupts)"
    echo "written by its own driver" | dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync,fsync 2>/dev/null
fi
echo "hypervisor: $(cat /sys/hypervisor/type); clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
grep -E 'timer|ttyS0|ata_piix|acpi|xen-' /proc/interrupts
poweroff -f
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Kernel, ramdisk and GRUB's commands on an ext2 partition; the command line is the test's."""
    need(GRUB, SEABIOS)
    return tmp_path / "disk.img"


def boot(disk: Path, cmdline: str, *more: str) -> tuple[int, str, str]:
    """Make the disk and run the machine until the guest powers off."""
    try:
        guest = debian(modules=MODULES, extra={"etc/rc.guest": SCRIPT})
    except FetchError as error:
        pytest.skip(f"Debian's kernel: {error}")
    assert guest.ramdisk is not None
    commands = f"linux /boot/vmlinuz console=ttyS0 {cmdline}\ninitrd /boot/initrd\nboot\n"
    files = {
        "boot/vmlinuz": guest.kernel.read_bytes(),
        "boot/initrd": guest.ramdisk.read_bytes(),
        "boot/grub/grub.cfg": commands.encode(),
        "hello": b"a file that was there before\n",
    }
    bootable_disk(disk, LINUX_MODULES, files)
    command = [sys.executable, "-m", "toolstack.cli", "run", "--type", "hvm", "--memory", "256"]
    done = subprocess.run(
        [*command, "--disk", f"{disk},raw,hda,w", *more, "--timeout", str(TIMEOUT_S)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S + 60,
        check=False,
    )
    return done.returncode, Plain().feed(done.stdout).decode("utf-8", "replace"), done.stderr.decode()


def read_back(disk: Path, name: str) -> str:
    """A file of the partition, as e2fsprogs read it from the image afterwards."""
    image = f"{disk}?offset={2048 * 512}"
    done = subprocess.run(
        ["/sbin/debugfs", "-R", f"cat {name}", image], capture_output=True, timeout=60, check=True
    )
    return done.stdout.decode()


def test_debian_from_an_emulated_ide_disk(disk: Path) -> None:
    """The disk stays emulated: ata_piix drives it, with DMA, and its interrupts come through the I/O APIC. Power-off by ACPI."""
    status, console, errors = boot(disk, "xen_emul_unplug=never")
    assert status == 0, f"{errors}\n{console[-3000:]}"
    assert "the disk is /dev/sda1: a file that was there before" in console
    assert "IO-APIC" in console
    assert "ata_piix" in console
    assert read_back(disk, "/answer") == "written by the guest on /dev/sda1\n"


def test_a_device_of_the_guests_own_beside_the_emulated_ones(disk: Path, tmp_path: Path) -> None:
    """Debian's own nvme driver finds it on the emulated PCI bus, reads and writes through the IOMMU, by MSI-X."""
    image = tmp_path / "nvme.img"
    image.write_bytes(NVME + bytes((16 << 20) - len(NVME)))
    status, console, errors = boot(disk, "", "--nvme", f"{image},raw,w")
    assert status == 0, f"{errors}\n{console[-3000:]}"
    assert f"nvme: {NVME.decode().strip()}, vectors 2" in console
    assert "the disk is /dev/xvda1" in console
    assert image.read_bytes()[4096:4121] == b"written by its own driver"


def test_debian_with_xen_blkfront_after_unplug(disk: Path) -> None:
    """The same disk: the device model closes the image when the guest unplugs it, and the back end in DomIO has it then."""
    status, console, errors = boot(disk, "")
    assert status == 0, f"{errors}\n{console[-3000:]}"
    assert "the disk is /dev/xvda1: a file that was there before" in console
    assert "hypervisor: xen; clock: xen" in console
    assert read_back(disk, "/answer") == "written by the guest on /dev/xvda1\n"


def test_debian_started_directly() -> None:
    """Its bzImage as it is, by the option ROM: it unpacks itself, finds the ramdisk, and powers off by ACPI."""
    need(SEABIOS)
    try:
        guest = debian(
            modules=MODULES,
            extra={"etc/rc.guest": b"#!/bin/busybox sh\necho started: $(cat /proc/cmdline)\npoweroff -f\n"},
        )
    except FetchError as error:
        pytest.skip(f"Debian's kernel: {error}")
    command = [
        sys.executable,
        "-m",
        "toolstack.cli",
        "run",
        "--type",
        "hvm",
        "--memory",
        "256",
        str(guest.kernel),
    ]
    done = subprocess.run(
        [
            *command,
            "--ramdisk",
            str(guest.ramdisk),
            "--cmdline",
            "console=ttyS0 of-its-own",
            "--timeout",
            str(TIMEOUT_S),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S + 60,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr.decode()}\n{done.stdout.decode('latin1')[-3000:]}"
    assert b"started: console=ttyS0 of-its-own" in done.stdout
