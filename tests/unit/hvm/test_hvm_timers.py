"""The timers of a PC's board: who has interrupts 0 and 8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from domains.hvm.board import Board

MS = 1_000_000
ENABLE, LEGACY = 1, 2


class Machine:
    """A board whose time stands where the test puts it; `lines` are changes of the interrupt controllers' inputs."""

    def __init__(self) -> None:
        self.ns = 1000
        state = SimpleNamespace(wake=lambda: None)
        wired = SimpleNamespace(changed=False, states=[state], message=lambda *a, **k: True)
        self.board = Board(
            lambda: self.ns,
            lambda: 1_700_000_000 * 10**9,
            cast(Any, wired),
            lambda text: None,
            lambda: None,
            lambda on: None,
            lambda: None,
        )
        self.lines: list[tuple[int, bool]] = []
        self.board.fabric._pic = lambda number, level: self.lines.append((number, level))  # type: ignore[misc]  # a probe
        self.hpet = self.board.hpet

    def run(self, ns: int) -> list[tuple[int, bool]]:
        """What happens in that time."""
        self.lines.clear()
        end = self.ns + ns
        while (at := self.board.next_deadline()) is not None and at <= end:
            self.ns = max(self.ns, at)
            self.board.expire(self.ns)
        self.ns = end
        return list(self.lines)


def test_the_hpet_takes_interrupts_0_and_8_from_pit_and_rtc_and_gives_them_back() -> None:
    """IA-PC HPET 1.0a, 2.3.5: with legacy replacement the 8254 and the RTC cause none; each tick is one interrupt and not two."""
    machine = Machine()
    ports, hpet = machine.board.ports, machine.hpet
    ports.write(0x43, 1, 0x34)  # as a BIOS leaves it, but at 100 Hz
    for byte in (11932 & 0xFF, 11932 >> 8):
        ports.write(0x40, 1, byte)
    ports.write(0x70, 1, 0x0B)
    ports.write(0x71, 1, 0x42)  # periodic, 1,024 Hz, never acknowledged
    assert machine.run(25 * MS).count((0, True)) == 2
    assert machine.board.fabric._isa & 0x100, "the RTC's interrupt is up"
    hpet.write(0x100, 4, 4 | 8 | 0x40 | 0x100)
    hpet.write(0x108, 4, 62_500)
    hpet.write(0x108, 4, 62_500)
    machine.lines.clear()
    hpet.write(0x10, 4, ENABLE | LEGACY)
    assert machine.lines == [(8, False)]
    assert machine.run(100 * MS).count((0, True)) == 100
    assert (8, True) not in machine.lines
    hpet.write(0x10, 4, 0)
    assert machine.lines[-1] == (8, True), "it waits still"
    assert machine.run(100 * MS).count((0, True)) == 10
