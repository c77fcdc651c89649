"""PVH guests that nobody here wrote, on a machine of processes: Debian's Linux and GRUB."""

from __future__ import annotations

import subprocess
import sys

import pytest

from toolstack.guestfetch import INIT_LINE, FetchError, Guest, fetch

COMMAND = [sys.executable, "-m", "toolstack.cli", "run"]
TIMEOUT_S = 60


def guest(name: str) -> Guest:
    """A guest's files; skipped where they can neither be found nor fetched."""
    try:
        return fetch(name)
    except FetchError as error:
        pytest.skip(f"guest {name}: {error}")


def run(*arguments: str, timeout_s: int = TIMEOUT_S) -> tuple[int, str, str]:
    """(status, console, errors) of `domicile run --type pvh`."""
    done = subprocess.run(
        [*COMMAND, *arguments, "--type", "pvh", "--timeout", str(timeout_s)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_s + 30,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def test_grub_reaches_its_prompt_takes_commands_and_halts() -> None:
    image = str(guest("grub").pvh_kernel)
    script = (
        "--expect",
        "grub>",
        "--send",
        r"echo sum-of-$grub_cpu\r",
        "--expect",
        "sum-of-i386",
        "--send",
        r"halt\r",
    )
    status, console, errors = run(image, *script)
    assert status == 0, errors
    assert "GNU GRUB" in console


@pytest.mark.parametrize(
    ("vcpus", "paging"), [pytest.param(1, "--hap", marks=pytest.mark.long), (2, "--hap"), (2, "--no-hap")]
)
def test_debian_reaches_init_with_hvc0(vcpus: int, paging: str) -> None:
    """With two-level paging, and with shadow page tables."""
    debian = guest("debian")
    status, console, errors = run(
        str(debian.pvh_kernel),
        *(
            "--ramdisk",
            str(debian.ramdisk),
            "--cmdline",
            "console=hvc0",
            "--memory",
            "256",
            "--vcpus",
            str(vcpus),
            paging,
        ),
        *(
            "--expect",
            INIT_LINE,
            "--send",
            r"nproc; cat /sys/hypervisor/type; echo en''d\r",
            "--until",
            "end",
        ),
    )
    assert status == 0, errors
    assert "Xen HVM callback vector for event delivery is enabled" in console
    assert "clocksource xen" in console
    lines = [line.strip() for line in console.splitlines()]
    assert str(vcpus) in lines[-6:]


def test_a_pv_only_kernel_is_refused_in_one_line() -> None:
    pv = str(guest("grub").kernel)
    status, _, errors = run(pv)
    assert status in (1, 2)
    assert "PHYS32_ENTRY" in errors
    assert len(errors.strip().splitlines()) == 1
