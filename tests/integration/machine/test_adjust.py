"""What is changed of a running guest, with Debian's kernel as the guest that obeys: balloon, vCPU hotplug, SysRq, NMI, another name."""

from __future__ import annotations

import re
import time

import pytest

from tests.integration.machine.test_machine_debian import BOOT_S, answer, boot
from tests.support.machines import RunningMachine, running_machine
from toolstack.client import MachineError
from toolstack.guestfetch import debian

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BOUND_S = 60.0


def memory_of(machine: RunningMachine, name: str) -> int:
    """MiB that the hypervisor says the domain owns."""
    rows = machine.client.request("list")
    return next(int(row["mem_mb"]) for row in rows if row["name"] == name)


def wait_memory(machine: RunningMachine, name: str, low: int, high: int) -> None:
    """Until the guest's memory is within these bounds (MiB)."""
    deadline = time.monotonic() + BOUND_S
    while not low <= (now := memory_of(machine, name)) <= high:
        assert time.monotonic() < deadline, f"{name} has {now} MiB, not {low} to {high}"
        machine.poll(0.1)


def refused(machine: RunningMachine, verb: str, words: str, **args: object) -> None:
    """The verb fails, and says so in these words."""
    with pytest.raises(MachineError, match=words):
        machine.client.request(verb, {"domain": "debian", **args})


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_a_running_linux_is_adjusted(kind: str) -> None:
    """The balloon goes down and up again, a vCPU goes and comes, keys and NMIs reach the kernel, the name changes in both places; what
    cannot be is refused with its bounds."""
    with running_machine() as machine:
        boot(machine, debian(), "debian", vcpus=2, type=kind)
        machine.client.request("mem-set", {"domain": "debian", "kib": 112 << 10})
        wait_memory(machine, "debian", 110, 113)
        machine.client.request("mem-set", {"domain": "debian", "kib": 128 << 10})
        wait_memory(machine, "debian", 127, 129)
        refused(machine, "mem-set", "131072 KiB that it was created for", kib=129 << 10)
        refused(machine, "mem-max", "its target of 131072 KiB", kib=64 << 10)

        machine.client.request("vcpu-set", {"domain": "debian", "count": 1})
        wait_answer(machine, "cat /sys/devices/system/cpu/online", r"\n0\r?\n")
        machine.client.request("vcpu-set", {"domain": "debian", "count": 2})
        # The kernel makes it present alone: bringing it up is udev's, which this guest does not have.
        wait_answer(machine, "ls /sys/devices/system/cpu", r"cpu1\s")
        answer(machine, "debian", "echo 1 > /sys/devices/system/cpu/cpu1/online; echo up", r"\nup\r?\n")
        wait_answer(machine, "cat /sys/devices/system/cpu/online", r"\n0-1\r?\n")
        refused(machine, "vcpu-set", "from 1 to the 2", count=3)

        answer(machine, "debian", "dmesg -n 7; echo told", r"\ntold\r?\n")
        machine.client.request("sysrq", {"domain": "debian", "key": "h"})
        machine.expect("debian", r"sysrq: HELP", BOUND_S)
        refused(machine, "sysrq", "one character", key="hh")
        machine.client.request("trigger", {"domain": "debian", "what": "nmi", "vcpu": 1})
        machine.expect("debian", r"NMI\b.* for (unknown )?reason \w+ on CPU 1", BOUND_S)
        refused(machine, "trigger", "it has no vCPU 2", what="nmi", vcpu=2)
        refused(machine, "trigger", "power is not built", what="power")

        machine.client.request("rename", {"domain": "debian", "name": "other"})
        assert machine.client.request("domname", {"domain": "other"}) == "other"
        refused(machine, "domid", "does not exist")
        machine.client.request("destroy", {"domain": "other"})
        machine.settled()


def wait_answer(machine: RunningMachine, command: str, pattern: str) -> None:
    """Ask until the answer is this: the guest's kernel takes its time."""
    deadline = time.monotonic() + BOUND_S
    while True:
        before = len(machine.text["debian"])
        machine.type("debian", f"{command}\n")
        machine.expect("debian", "# ", BOOT_S)
        if re.search(pattern, machine.text["debian"][before:]):
            return
        assert time.monotonic() < deadline, machine.text["debian"][before:]


def test_what_debug_keys_print_is_in_the_log() -> None:
    """Key h lists the others, each of which prints what it names; none or too many are refused."""
    with running_machine() as machine:
        machine.client.request("debug-keys", {"keys": "hegq"})
        log = machine.client.request("dmesg").decode()
        for line in (
            r"key 'e' => dump event channels",
            r"Event channel information for domain 0:\n.* +\d+: s=\d n=0",
        ):
            assert re.search(line, log), log
        assert re.search(
            r"General information for domain 0: native, .* tot_pages=0 .*\n.*VCPU0: online", log
        ), log
        assert "dumping grant tables" in log
        for keys in ("", "h" * 65):
            with pytest.raises(MachineError, match="1 to 64 ASCII"):
                machine.client.request("debug-keys", {"keys": keys})
