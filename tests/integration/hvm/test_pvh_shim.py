"""Xen's own shim as a PVH guest, and PV guests inside it: Debian's xen-utils, GRUB for Xen of 64 and of 32 bits, Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hvm.test_pvh_boot import guest, run
from toolstack.guestfetch import INIT_LINE


@pytest.fixture
def shim() -> Path:
    return guest("shim").kernel


@pytest.mark.parametrize(
    ("image", "word"), [("grub-x86_64-xen.bin", "x86_64"), ("grub-i386-xen.bin", "i386")]
)
def test_grub_runs_in_xens_shim(shim: Path, image: str, word: str) -> None:
    """Xen 4.17 boots to its PV guest, whose console and halt come through; a 32-bit PV guest can start so, and only so."""
    grub = guest("grub").kernel.parent / image
    script = (
        "--expect",
        "grub> ",
        "--send",
        r"echo sum-of-$grub_cpu\r",
        "--expect",
        f"sum-of-{word}",
        "--send",
        r"halt\r",
    )
    status, console, errors = run(str(grub), "--pvshim", "--memory", "64", *script)
    assert status == 0, errors
    assert "(XEN) Xen version 4.17" in console


@pytest.mark.long
@pytest.mark.parametrize("vcpus", [1, 2])
def test_debian_reaches_init_in_xens_shim(shim: Path, vcpus: int) -> None:
    debian = guest("debian")
    status, console, errors = run(
        *(
            str(debian.kernel),
            "--pvshim",
            "--ramdisk",
            str(debian.ramdisk),
            "--cmdline",
            "console=hvc0 quiet",
        ),
        *("--memory", "320", "--vcpus", str(vcpus), "--until", INIT_LINE),
        timeout_s=240,
    )
    assert status == 0, errors
    assert "(XEN) Xen version 4.17" in console
