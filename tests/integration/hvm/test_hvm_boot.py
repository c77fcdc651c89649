"""Full HVM guests on a machine of processes: SeaBIOS, GRUB from a disk, resets, and a device model that dies."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import SEABIOS, bootable_disk, need
from toolstack.cli.script import Plain

pytestmark = pytest.mark.timeout(2 * 150 + 60)
COMMAND = [sys.executable, "-m", "toolstack.cli", "run", "--type", "hvm"]
TIMEOUT_S = 150
"""An idle machine needs a tenth of it."""


def run(*arguments: str) -> tuple[int, str, str]:
    """(status, console without moves of the cursor, errors) of `domicile run --type hvm`."""
    done = subprocess.run(
        [*COMMAND, *arguments, "--timeout", str(TIMEOUT_S)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S + 30,
        check=False,
    )
    return done.returncode, Plain().feed(done.stdout).decode(), done.stderr.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def grub(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bootable_disk(tmp_path_factory.mktemp("grub") / "disk.img"))


def test_seabios_without_a_disk_says_so_on_the_serial_line() -> None:
    need(SEABIOS)
    status, console, errors = run("--until", "No bootable device")
    assert status == 0, errors
    assert "SeaBIOS" in console


def test_an_elf_program_in_the_place_of_the_firmware(tmp_path: Path) -> None:
    """`firmware_override=`: it starts in 32-bit protected mode with EBX at the start info, and runs with all of the PC's devices;
    what it finds out it writes to the debug port. HLT with interrupts off is the end."""
    good = "b0" + "47" + "e6e9"  # mov al,'G'; out 0xe9,al
    code = bytes.fromhex(
        "813b78c56e33 7510"  # cmp dword [ebx], magic; jne bad
        "0f20c0 83e011 83f811 7506"  # mov eax,cr0; and eax,0x11; cmp eax,0x11; jne bad
        f"{good} faf4"  # cli; hlt
        "0f0b"  # bad: ud2, and no IDT: a triple fault
    )
    image = tmp_path / "program"
    image.write_bytes(_elf32(code))
    status, console, errors = run("--firmware", str(image), "--memory", "32", "--no-reboot", "--json")
    assert status == 0, errors
    record = json.loads(console.splitlines()[-1])
    assert record["reason"] == "poweroff", record


def _elf32(code: bytes) -> bytes:
    """An ELF32 executable of this code at 1 MiB, its entry."""
    at = 1 << 20
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, at, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return header + struct.pack("<8I", 1, 84, at, at, len(code), len(code), 7, 1) + code


def test_grub_on_a_disk_reaches_its_prompt_on_the_serial_line(grub: str) -> None:
    status, _, errors = run(
        *("--disk", f"{grub},raw,hda,w", "--boot", "c"),
        *("--expect", "grub> ", "--send", r"echo sum''-of-it\r", "--until", "sum-of-it"),
    )
    assert status == 0, errors


def test_grub_reboots_the_machine_and_comes_back(grub: str) -> None:
    """GRUB's reboot goes through SeaBIOS to a reset of the machine: the domain is made anew, its serial line goes on."""
    status, console, errors = run(
        *("--disk", f"{grub},raw,hda,w", "--json"),
        *("--expect", "grub> ", "--send", r"reboot\r", "--expect", "GRUB.*\n(.*\n)*.*grub> ", "--send", "x"),
        *("--until", "x"),
    )
    assert status == 0, errors
    record = json.loads(console.splitlines()[-1])
    assert record["reboots"] == 1


def test_a_killed_device_model_crashes_its_guest_alone(grub: str, tmp_path: Path) -> None:
    """The run ends with a reason that names it."""
    process = subprocess.Popen(
        [*COMMAND, "--disk", f"{grub},raw,hda,w", "--timeout", str(TIMEOUT_S)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    seen, plain = b"", Plain()
    while b"grub> " not in seen:
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk, process.communicate()[1]
        seen += plain.feed(chunk)
    os.kill(_device_model(process.pid), signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert b"device model is gone" in errors
    assert b"signal 9" in errors


def _device_model(ancestor: int) -> int:
    """The process id of the device model below a `domicile run`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    for pid in parents:
        line = Path(f"/proc/{pid}/cmdline")
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"domicile-dm" not in words:
            continue
        above = pid
        while above in parents:
            if above == ancestor:
                return pid
            above = parents[above]
    raise AssertionError("no device model is running")


def test_a_kernel_with_type_hvm_is_refused_in_one_line(grub: str) -> None:
    status, _, errors = run(grub)
    assert status == 2
    assert "an ELF kernel starts with type pvh" in errors
    assert len(errors.strip().splitlines()) == 1
