"""The timers of a PC's board: who has interrupts 0 and 8."""

from __future__ import annotations

from itertools import permutations
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


def test_an_input_is_high_while_a_timer_or_a_pin_or_a_callback_pulls_it() -> None:
    """Input 20 of the I/O APIC: comparators 0 and 2 in level mode, INTA of device 1, and HVM_PARAM_CALLBACK_IRQ, in any order."""
    machine = Machine()
    board, hpet = machine.board, machine.hpet

    def high() -> bool:
        return bool(board.ioapic._levels >> 20 & 1)

    hpet.write(0x10, 4, ENABLE)
    for timer in (0, 2):
        hpet.write(0x100 + 0x20 * timer, 4, 2 | 4 | 0x100 | 20 << 9)
        hpet.write(0x108 + 0x20 * timer, 4, 1000 + hpet.read(0xF0, 4))
    sources = {
        "timer 0": lambda: hpet.write(0x20, 4, 1),
        "timer 2": lambda: hpet.write(0x20, 4, 4),
        "pin": lambda: board.pci_line(1, 0, False),
        "callback": lambda: board.gsi_line(20, False),
    }
    for order in permutations(sources):
        for timer in (0, 2):
            hpet.write(0x108 + 0x20 * timer, 4, 1000 + hpet.read(0xF0, 4))
        machine.run(MS)
        board.pci_line(1, 0, True)
        board.gsi_line(20, True)
        assert hpet.read(0x20, 4) == 5
        for number, name in enumerate(order, 1):
            assert high()
            sources[name]()
            assert high() == (number < len(order)), order
    board.pci_line(1, 0, True)
    hpet.write(0x100, 4, 4 | 0x100 | 20 << 9)  # edges
    hpet.write(0x108, 4, 1000 + hpet.read(0xF0, 4))
    machine.run(MS)
    assert high(), "an edge does not take the pin's level away"
