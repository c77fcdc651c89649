"""Debian's Linux as a paravirtual guest: up to a shell, a load of processes, reboot, power-off, shutdown by xenstore, panic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import INIT_LINE, Guest, debian

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BOOT_S = 120.0
POWEROFF = {"sbin/poweroff": b"#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"}
"""The kernel runs it when control/shutdown says so."""


def boot(machine: RunningMachine, guest: Guest, name: str, **more: Any) -> None:
    """Up to the prompt of its shell."""
    cmdline = f"{guest.cmdline} quiet"
    machine.create(name, guest.kernel, ramdisk=guest.ramdisk, memory_mb=128, cmdline=cmdline, **more)
    machine.expect(name, INIT_LINE, BOOT_S)
    machine.expect(name, "# ", BOOT_S)


def answer(machine: RunningMachine, name: str, command: str, pattern: str) -> None:
    """Type a command and wait for what it prints."""
    machine.type(name, f"{command}\n")
    machine.expect(name, pattern, BOOT_S)
    machine.expect(name, "# ", BOOT_S)


def test_debian_boots_works_reboots_and_shuts_down() -> None:
    """With 2 vCPUs: /proc/cpuinfo shows both, forks and pipes work, `reboot` builds it again, control/shutdown has it
    run `poweroff`, which ends the domain for that reason."""
    guest = debian(extra=POWEROFF)
    with running_machine() as machine:
        boot(machine, guest, "debian", vcpus=2)
        answer(machine, "debian", "grep -c ^processor /proc/cpuinfo", r"\n2\r?\n")
        answer(machine, "debian", "cat /sys/hypervisor/type", r"\nxen\r?\n")
        load = "i=0; while [ $i -lt 40 ]; do echo $i | cat >/dev/null; i=$((i+1)); done; echo done-$i"
        answer(machine, "debian", load, r"\ndone-40\r?\n")
        assert os.listdir(Path(machine.machine.runtime.consoles)), "no log of the console"
        machine.type("debian", "reboot -f\n")
        machine.wait_restart("debian", 1, BOOT_S)
        machine.expect("debian", INIT_LINE, BOOT_S)
        machine.expect("debian", "# ", BOOT_S)
        machine.client.request("shutdown", {"domain": "debian"})
        assert machine.wait_end("debian", BOOT_S) == "poweroff"
        machine.settled()


def test_a_panic_is_a_crash_with_its_reason() -> None:
    """The kernel's last words are on the console, the registers in the details, and the reason is crash."""
    with running_machine() as machine:
        boot(machine, debian(), "debian")
        machine.type("debian", "echo c > /proc/sysrq-trigger\n")
        assert machine.wait_end("debian", BOOT_S) == "crash"
        assert "Kernel panic - not syncing: sysrq triggered crash" in machine.text["debian"]
        details = machine.ended["debian"][1]
        assert "RIP:" in details
        assert "rsp:" in details
        machine.settled()
