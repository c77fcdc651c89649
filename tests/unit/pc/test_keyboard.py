"""drivers/pc/i8042, ps2, keys: what SeaBIOS and Linux say to the controller, scan codes of both sets, the mouse, names of keys."""

from __future__ import annotations

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.i8042 import I8042
from drivers.pc.keys import SCAN1, key_of_keysym, keys_of_character, parse_combination, scan_codes
from drivers.pc.system import A20
from tests.unit.pc.pc_rig import Wire


class Keys:
    """The controller behind its ports."""

    def __init__(self) -> None:
        self.irq1, self.irq12 = Wire(), Wire()
        self.resets = 0
        self.a20 = A20(lambda on: None)
        self.controller = I8042(self.irq1, self.irq12, self.a20, self.reset)
        self.ports = PortSpace()
        self.controller.attach(self.ports)

    def reset(self) -> None:
        self.resets += 1

    def command(self, value: int, *data: int) -> None:
        self.ports.write(0x64, 1, value)
        for byte in data:
            self.ports.write(0x60, 1, byte)

    def keyboard(self, *data: int) -> None:
        for byte in data:
            self.ports.write(0x60, 1, byte)

    def mouse(self, *data: int) -> None:
        for byte in data:
            self.command(0xD4, byte)

    def read(self) -> list[int]:
        out = []
        while self.ports.read(0x64, 1) & 1:
            out.append(self.ports.read(0x60, 1))
            assert len(out) < 1000
        return out


@pytest.fixture
def keys() -> Keys:
    return Keys()


def test_seabios_sets_up_the_keyboard(keys: Keys) -> None:
    """ps2_keyboard_setup: flush, self test, test interface, reset, scanning off, set 2, translation and interrupt on."""
    keys.command(0xAA)
    assert keys.read() == [0x55]
    keys.command(0xAB)
    assert keys.read() == [0]
    keys.command(0xAE)
    keys.keyboard(0xFF)
    assert keys.read() == [0xFA, 0xAA]
    keys.keyboard(0xF5)
    assert keys.read() == [0xFA]
    keys.controller.key("a", True)
    assert keys.read() == []
    keys.keyboard(0xF0, 2)
    assert keys.read() == [0xFA, 0xFA]
    keys.command(0x60, 0x61)
    keys.keyboard(0xF4)
    assert keys.irq1.level
    assert keys.read() == [0xFA]
    for pressed in (True, False):
        keys.controller.key("a", pressed)
    assert keys.read() == [0x1E, 0x9E]
    assert keys.irq1.rises == 3, "an edge for each byte"


def test_translation_is_the_hardwares(keys: Keys) -> None:
    """Every key, through set 2 and the controller, arrives as its code of set 1."""
    for name in SCAN1:
        for pressed in (True, False):
            keys.controller.key(name, pressed)
            assert bytes(keys.read()) == scan_codes(name, pressed, 1), name
    for name in ("pause", "print"):
        for pressed in (True, False):
            keys.controller.key(name, pressed)
            assert bytes(keys.read()) == scan_codes(name, pressed, 1), name


def test_without_translation_it_is_set_2(keys: Keys) -> None:
    keys.command(0x60, 0x01)
    for name, want in (
        ("a", [0x1C]),
        ("esc", [0x76]),
        ("f7", [0x83]),
        ("right", [0xE0, 0x74]),
        ("ret", [0x5A]),
        ("kp_0", [0x70]),
    ):
        keys.controller.key(name, True)
        assert keys.read() == want
        keys.controller.key(name, False)
        assert keys.read() == [*want[:-1], 0xF0, want[-1]]


def test_set_1_without_translation(keys: Keys) -> None:
    keys.command(0x60, 0x01)
    keys.keyboard(0xF0, 1, 0xF0, 0)
    assert keys.read() == [0xFA, 0xFA, 0xFA, 0xFA, 1]
    keys.controller.key("up", False)
    assert keys.read() == [0xE0, 0xC8]
    keys.keyboard(0xF0, 3)
    assert keys.read() == [0xFA, 0xFE]


def test_linux_identifies_and_sets_leds(keys: Keys) -> None:
    """atkbd_probe and i8042's checks; AB 83 is AB 41 behind translation."""
    keys.keyboard(0xF2)
    assert keys.read() == [0xFA, 0xAB, 0x41]
    keys.command(0x60, 0x05)
    keys.keyboard(0xF2)
    assert keys.read() == [0xFA, 0xAB, 0x83]
    keys.keyboard(0xED, 5, 0xF3, 0x20, 0xEE)
    assert keys.read() == [0xFA, 0xFA, 0xFA, 0xFA, 0xEE]
    assert keys.controller.keyboard.leds == 5
    keys.keyboard(0x01)
    assert keys.read() == [0xFE]


def test_linux_finds_the_aux_port_by_loopback(keys: Keys) -> None:
    """i8042_check_aux: D3 comes back as the mouse's; A7, A9, A8 and the command byte's bits."""
    keys.command(0x60, 0x46)
    keys.command(0xD3, 0x5A)
    assert keys.ports.read(0x64, 1) & 0x21 == 0x21
    assert keys.irq12.level
    assert not keys.irq1.level
    assert keys.read() == [0x5A]
    assert not keys.irq12.level
    keys.command(0xA9)
    assert keys.read() == [0]
    keys.command(0xA7)
    keys.command(0x20)
    assert keys.read()[0] & 0x20
    keys.command(0xA8)
    keys.command(0x20)
    assert not keys.read()[0] & 0x20
    keys.command(0xD2, 0x77)
    assert keys.ports.read(0x64, 1) & 0x21 == 1


def test_a_disabled_keyboard_keeps_its_bytes(keys: Keys) -> None:
    keys.command(0xAD)
    keys.controller.key("b", True)
    assert keys.read() == []
    keys.command(0xAE)
    assert keys.read() == [0x30]


def test_the_buffer_is_bounded(keys: Keys) -> None:
    for _ in range(1000):
        keys.controller.key("left", True)
    got = keys.read()
    assert len(got) < 300
    assert got.count(0xFF) == 1, "overrun, once"
    assert keys.controller.drained
    assert keys.ports.read(0x60, 1) == got[-1], "an empty buffer gives the last byte"


def test_status_tells_what_was_written_last(keys: Keys) -> None:
    keys.command(0x60)
    assert keys.ports.read(0x64, 1) & 8
    keys.keyboard(0x47)
    assert not keys.ports.read(0x64, 1) & 8
    assert keys.ports.read(0x64, 1) & 0x14 == 0x14


def test_a20_and_reset(keys: Keys) -> None:
    keys.command(0xD1, 0xDD)
    assert not keys.a20.on
    keys.command(0xD0)
    assert keys.read()[0] & 3 == 1
    keys.command(0xDF)
    assert keys.a20.on
    keys.command(0xDD)
    assert not keys.a20.on
    keys.command(0xFF)
    assert keys.resets == 0
    keys.command(0xFE)
    keys.command(0xD1, 0xDE)
    assert keys.resets == 2


def test_the_mouse(keys: Keys) -> None:
    """psmouse: reset, identify; IntelliMouse's knock; enable; movements in packets."""
    keys.mouse(0xFF)
    assert keys.read() == [0xFA, 0xAA, 0]
    keys.mouse(0xF2)
    assert keys.read() == [0xFA, 0]
    keys.controller.move_mouse(1, 1)
    assert keys.read() == []
    keys.mouse(0xF4)
    keys.read()
    keys.controller.move_mouse(4, -2, buttons=1)
    assert keys.read() == [0x29, 5, 0xFF], "what it moved before counts"
    keys.controller.move_mouse(-300, 0)
    assert keys.read() == [0x19, 1, 0, 0x19, 0xD3, 0]
    keys.mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2)
    assert keys.read() == [0xFA] * 7 + [3]
    keys.controller.move_mouse(0, 0, wheel=1)
    assert keys.read() == [9, 0, 0, 0xFF]
    keys.mouse(0xE9)
    assert keys.read() == [0xFA, 0x21, 2, 80]
    keys.mouse(0xE8, 3, 0xE7, 0xF0, 0xEB)
    assert keys.read() == [0xFA] * 5 + [9, 0, 0, 0]
    keys.mouse(0xBB)
    assert keys.read() == [0xFE]
    for _ in range(1000):
        keys.mouse(0xEA)
    keys.read()


def test_a_mouse_that_does_not_report_counts_to_its_ends(keys: Keys) -> None:
    """However far it is moved meanwhile, one packet with the largest movement is what the host gets."""
    keys.mouse(0xFF)
    keys.read()
    for _ in range(1000):
        keys.controller.move_mouse(1000, -1000)
    keys.mouse(0xF4)
    assert keys.read() == [0xFA]
    keys.controller.move_mouse(0, 0, buttons=1)
    assert keys.read() == [0x29, 255, 1]


def test_names() -> None:
    assert parse_combination("Ctrl-Alt-Delete") == ["ctrl", "alt", "delete"]
    assert parse_combination("enter") == ["ret"]
    assert parse_combination("-") == ["minus"]
    with pytest.raises(ValueError, match="'nokey' in 'ctrl-nokey' is no key"):
        parse_combination("ctrl-nokey")
    with pytest.raises(ValueError, match="more than 8"):
        parse_combination("-".join("abcdefghi"))
    assert SCAN1["delete"] == 0xE053
    assert (SCAN1["f10"], SCAN1["kp_7"], SCAN1["spc"], SCAN1["backslash"]) == (0x44, 0x47, 0x39, 0x2B)
    assert len(set(SCAN1.values())) == len(SCAN1)


def test_text_and_keysyms() -> None:
    for code in range(0x20, 0x7F):
        keys = keys_of_character(chr(code))
        assert key_of_keysym(code) == keys[-1]
        assert keys[-1] in SCAN1
    assert keys_of_character("A") == ["shift", "a"]
    assert keys_of_character("?") == ["shift", "slash"]
    assert keys_of_character("_") == ["shift", "minus"]
    assert key_of_keysym(0xFF0D) == "ret"
    assert key_of_keysym(0xFFC9) == "f12"
    assert key_of_keysym(0x12345) is None
    with pytest.raises(ValueError, match="no key"):
        keys_of_character("é")
