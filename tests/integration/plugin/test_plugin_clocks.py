"""The time of day of a guest: its own offset, jumps of the machine's clock; and links that are narrow."""

from __future__ import annotations

import time

import pytest

from guests.build import build
from toolstack.faults import Faults, What
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.plugin import DomainFactory

pytestmark = pytest.mark.timeout(120)


def test_rtc_timeoffset_moves_a_guests_time_of_day(domain: DomainFactory) -> None:
    for offset in (0, 86_400 * 400, -3_600):
        guest = domain(build("wallclock"), time_offset=offset)
        match = guest.console.expect(r"the time of day is (\d+)", 30.0)
        assert abs(int(match.group(1)) - time.time() - offset) < 10
        guest.wait_end(30.0)


def test_a_guest_sees_the_clock_jump(machine: GuestMachine, domain: DomainFactory, faults: Faults) -> None:
    """At a line of its console by an hour, then, by time, a minute back: a guest that comes later starts with the machine's clock."""
    forward = faults.add(
        What.CLOCK_JUMP, target="hypervisor", event="hypercall:schedop_shutdown", by_ms=3_600_000
    )
    domain(build("hello")).wait_end(30.0)
    assert faults.hit(forward)
    guest = domain(build("wallclock"), cmdline="watch")
    match = guest.console.expect(r"the time of day is (\d+)", 30.0)
    assert abs(int(match.group(1)) - time.time() - 3600) < 10
    guest.console.expect("watching", 30.0)
    back = faults.add(What.CLOCK_JUMP, target="hypervisor", at_ms=0, by_ms=-60_000)
    faults.wait(back, machine.poll)
    guest.console.expect(r"it moved by -60 seconds", 30.0)
    guest.wait_end(30.0)


def test_a_narrow_link_is_slow_and_loses_nothing(machine: GuestMachine, faults: Faults) -> None:
    """2,000 bytes a second between Dom0 and the hypervisor, for a second: what Dom0 asks takes a tenth of one each."""
    narrow = faults.add(What.BANDWIDTH, target="dom0", at_ms=0, bytes_per_s=2000, for_ms=1000)
    faults.wait(narrow, machine.poll)
    begun = time.monotonic()
    assert [row["name"] for row in machine.request("list")] == ["Domain-0"]
    assert time.monotonic() - begun > 0.05
