"""drivers/pc/system: A20 from two sides, resets, logs."""

from __future__ import annotations

from drivers.pc.bus import PortSpace
from drivers.pc.system import A20, DebugPort, Port92, PostCode, ResetControl


def test_a20_is_on_while_one_side_wants_it() -> None:
    told: list[bool] = []
    a20 = A20(told.append)
    assert a20.on
    a20.keyboard(False)
    a20.port92(True)
    a20.keyboard(True)
    a20.port92(False)
    assert told == [False, True]
    a20.keyboard(False)
    a20.reset()
    assert told == [False, True, False, True]


def test_port_92() -> None:
    told: list[bool] = []
    resets: list[int] = []
    a20, ports = A20(told.append), PortSpace()
    port92 = Port92(a20, lambda: resets.append(1))
    port92.attach(ports)
    a20.keyboard(False)
    ports.write(0x92, 1, ports.read(0x92, 1) | 2)
    assert ports.read(0x92, 1) == 2
    assert a20.on
    assert not resets
    ports.write(0x92, 1, 3)
    ports.write(0x92, 1, 3)
    assert resets == [1], "on the rising edge"
    port92.reset()
    assert not a20.on


def test_reset_control() -> None:
    hard: list[bool] = []
    control = ResetControl(hard.append)
    for value in (2, 6, 6, 0, 4):
        control.write(value)
    assert hard == [True, False]
    assert control.value == 4
    control.reset()
    assert control.value == 0


def test_logs_and_post_codes() -> None:
    ports, out, post = PortSpace(), bytearray(), PostCode()
    DebugPort(0x402, out.append).attach(ports)
    DebugPort(0xE9, out.append).attach(ports)
    post.attach(ports)
    assert ports.read(0x402, 1) == ports.read(0xE9, 1) == 0xE9
    for byte in b"hi":
        ports.write(0x402, 1, byte)
    ports.write(0xE9, 1, 0x21)
    assert out == b"hi!"
    ports.write(0x80, 1, 0x55)
    assert ports.read(0x80, 1) == post.value == 0x55
