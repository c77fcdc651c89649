"""GRUB for Xen reads its menu from a disk, and starts Debian's kernel and initramfs from there: as PV guest and as PVH guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.hvm.test_pvh_boot import COMMAND, guest
from toolstack.guestfetch import INIT_LINE
from toolstack.plugin.disks import make_disk

BOUND_S = 400
MENU = b"""set timeout=0
menuentry "Debian" {
  linux /boot/vmlinuz console=hvc0 quiet
  initrd /boot/initrd
}
"""


@pytest.mark.long
@pytest.mark.timeout(BOUND_S + 100)
@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_grub_starts_debian_from_a_disk(tmp_path: Path, kind: str) -> None:
    """Up to the init of that kernel, and its power-off."""
    grub, linux = guest("grub"), guest("debian")
    assert linux.ramdisk is not None
    files = {
        "boot/grub/grub.cfg": MENU,
        "boot/vmlinuz": linux.kernel.read_bytes(),
        "boot/initrd": linux.ramdisk.read_bytes(),
    }
    disk = make_disk(tmp_path / "boot.img", 48, files)
    image = grub.kernel if kind == "pv" else grub.pvh_kernel
    done = subprocess.run(
        [
            *COMMAND,
            *(
                str(image),
                "--type",
                kind,
                "--memory",
                "256",
                "--disk",
                f"{disk},raw,xvda,w",
                "--timeout",
                str(BOUND_S),
            ),
            *(
                "--no-reboot",
                "--expect",
                INIT_LINE,
                "--send",
                "",
                "--expect",
                "# ",
                "--send",
                r"poweroff -f\n",
            ),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=BOUND_S + 30,
        check=False,
    )
    console = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert "GNU GRUB" in console or "Welcome to GRUB" in console
    assert INIT_LINE in console
