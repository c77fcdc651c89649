"""Xen's own hvmloader in the place of what the toolstack does for it: its tables, SeaBIOS as its module, GRUB from the disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import bootable_disk
from tests.integration.hvm.test_pvh_boot import COMMAND, guest


@pytest.mark.long
def test_hvmloader_starts_seabios_which_starts_grub(tmp_path: Path) -> None:
    hvmloader = guest("shim").kernel.parent / "hvmloader"
    disk = bootable_disk(tmp_path / "disk.img")
    done = subprocess.run(
        [
            *(*COMMAND, "--type", "hvm", "--firmware", str(hvmloader), "--serial", "--memory", "128"),
            *("--disk", f"{disk},raw,hda,w", "--boot", "c", "--until", "grub>", "--timeout", "200"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=260,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert b"SeaBIOS" in done.stdout
