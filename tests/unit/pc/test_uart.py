"""drivers/pc/uart: what Linux's 8250 driver and SeaBIOS do with it."""

from __future__ import annotations

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.uart import BACKLOG, Uart
from tests.unit.pc.pc_rig import Wire

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(0x3F8, 0x400)


class Serial:
    """The port behind its ports."""

    def __init__(self) -> None:
        self.irq = Wire()
        self.sent = bytearray()
        self.uart = Uart(self.irq, self.sent.append)
        self.ports = PortSpace()
        self.uart.attach(self.ports)

    def out(self, port: int, value: int) -> None:
        self.ports.write(port, 1, value)

    def get(self, port: int) -> int:
        return self.ports.read(port, 1)


@pytest.fixture
def serial() -> Serial:
    return Serial()


def test_linux_recognizes_a_16550a(serial: Serial) -> None:
    """autoconfig: IER holds 4 bits, loopback shows modem lines, FIFO bits read back, the scratch register stays."""
    serial.out(IER, 0)
    assert serial.get(IER) & 0xF == 0
    serial.out(IER, 0xF)
    assert serial.get(IER) == 0xF
    serial.out(IER, 0)
    serial.out(MCR, 0x10 | 0x0A)
    assert serial.get(MSR) & 0xF0 == 0x90
    serial.out(MCR, 8)
    serial.out(0x3FA, 1)
    assert serial.get(IIR) >> 6 == 3
    serial.out(SCR, 0x5A)
    assert serial.get(SCR) == 0x5A
    serial.out(0x3FA, 0)
    assert serial.get(IIR) >> 6 == 0


def test_the_divisor_hides_behind_dlab(serial: Serial) -> None:
    serial.out(LCR, 0x83)
    serial.out(RBR, 1)
    serial.out(IER, 0)
    assert (serial.get(RBR), serial.get(IER), serial.uart.baud) == (1, 0, 115200)
    serial.out(RBR, 12)
    serial.out(IER, 1)
    assert serial.uart.baud == 115200 // 268
    serial.out(LCR, 3)
    serial.out(RBR, 0x41)
    assert serial.sent == b"A"
    assert serial.get(LSR) == 0x60


def test_transmitter_interrupts(serial: Serial) -> None:
    """Enabling it gives one at once (Linux tests for that); reading IIR or writing ends it."""
    serial.out(MCR, 8)
    serial.out(IER, 2)
    assert serial.irq.level
    assert serial.get(IIR) == 2
    assert not serial.irq.level
    assert serial.get(IIR) == 1
    serial.out(RBR, 0x42)
    assert serial.irq.level
    assert serial.irq.rises == 2
    serial.out(RBR, 0x43)
    assert serial.irq.rises == 3, "each is an edge of its own"
    serial.out(IER, 0)
    assert not serial.irq.level


def test_out2_gates_the_line(serial: Serial) -> None:
    serial.out(IER, 3)
    serial.uart.receive(b"x")
    assert not serial.irq.level
    serial.out(MCR, 8)
    assert serial.irq.level
    serial.out(MCR, 0x18)
    assert not serial.irq.level


def test_without_fifo_bytes_come_one_by_one(serial: Serial) -> None:
    serial.out(MCR, 8)
    serial.out(IER, 1)
    assert serial.uart.receive(b"abc") == 3
    got = bytearray()
    while serial.get(LSR) & 1:
        assert serial.get(IIR) == 4
        got.append(serial.get(RBR))
    assert got == b"abc"
    assert not serial.irq.level
    assert serial.get(RBR) == 0


def test_fifo_trigger_and_timeout(serial: Serial) -> None:
    serial.out(0x3FA, 0x87)  # 8 bytes
    serial.out(MCR, 8)
    serial.out(IER, 1)
    serial.uart.receive(b"1234567")
    assert serial.get(IIR) == 0xCC
    serial.uart.receive(b"8" + b"x" * 40)
    assert serial.get(IIR) == 0xC4
    got = bytes(serial.get(RBR) for _ in range(48))
    assert got == b"12345678" + b"x" * 40
    assert serial.get(LSR) == 0x60
    assert serial.get(IIR) == 0xC1


def test_the_backlog_is_bounded(serial: Serial) -> None:
    assert serial.uart.receive(bytes(BACKLOG + 100)) == BACKLOG
    assert serial.uart.room == 1, "one byte is in the receiver"
    serial.get(RBR)
    assert serial.uart.receive(b"ab") == 2
    assert serial.uart.receive(b"c") == 0


def test_clearing_the_fifo(serial: Serial) -> None:
    serial.out(0x3FA, 1)
    serial.uart.receive(b"abc")
    serial.out(0x3FA, 3)
    assert not serial.get(LSR) & 1
    serial.uart.receive(b"d")
    assert serial.get(RBR) == 0x64


def test_loopback_gives_back_and_overruns(serial: Serial) -> None:
    serial.out(MCR, 0x1B)
    serial.out(RBR, 0x55)
    assert serial.sent == b""
    assert serial.get(LSR) & 1
    serial.out(RBR, 0x66)
    assert serial.get(LSR) & 2
    assert not serial.get(LSR) & 2
    assert serial.get(RBR) == 0x55
    serial.uart.receive(b"z")
    assert not serial.get(LSR) & 1, "the line is cut off in loopback"
    serial.out(MCR, 0x0B)
    assert serial.get(RBR) == 0x7A


def test_modem_lines_and_their_changes(serial: Serial) -> None:
    assert serial.get(MSR) == 0xB0
    serial.out(IER, 8)
    serial.out(MCR, 0x10 | 4)  # loop, OUT1: ring, and CTS, DSR, DCD drop
    assert serial.get(MSR) == 0x40 | 0xB
    assert serial.get(MSR) == 0x40
    serial.out(MCR, 8)
    assert serial.irq.level
    assert serial.get(IIR) == 0
    assert serial.get(MSR) == 0xB0 | 0xF
    assert not serial.irq.level


def test_a_break_is_a_line_status_interrupt(serial: Serial) -> None:
    serial.out(0x3FA, 1)
    serial.out(MCR, 8)
    serial.out(IER, 5)
    serial.uart.receive(b"a")
    serial.uart.receive_break()
    serial.uart.receive(b"h")
    assert serial.get(LSR) & 0x90 == 0x80
    assert serial.get(RBR) == 0x61
    assert serial.get(IIR) & 0xF == 6
    assert serial.get(LSR) & 0x19 == 0x19
    assert (serial.get(RBR), serial.get(RBR)) == (0, 0x68)
    assert serial.get(LSR) == 0x60


def test_a_wide_access_is_taken_as_bytes(serial: Serial) -> None:
    serial.ports.write(SCR, 1, 7)
    assert serial.ports.read(0x3FC, 4) == 0x07B0_6000


def test_reset_keeps_the_backlog(serial: Serial) -> None:
    serial.out(MCR, 8)
    serial.out(IER, 1)
    serial.uart.receive(b"ab")
    serial.uart.reset()
    assert not serial.irq.level
    assert serial.get(RBR) == 0x62
