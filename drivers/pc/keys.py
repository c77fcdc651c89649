"""Keys of a PC keyboard: their names, scan codes of sets 1 and 2, what types a text on a US layout, X keysyms.

Names are those of QEMU's `sendkey` (QKeyCode), which users of virtual machines know. Combinations are joined by `-`: `ctrl-alt-delete`.
Set 1 is given here; set 2 follows by the translation that the 8042 makes, which is a fixed table of the hardware.
Sources: IBM PS/2 Hardware Interface Technical Reference (keyboard); X11, keysymdef.h.
"""

from __future__ import annotations

from typing import Final

EXTENDED: Final = 0xE0
PAUSE: Final = "pause"
PRINT: Final = "print"
MAX_KEYS: Final = 8
"""Of one combination."""

_ROWS: Final = (
    (0x01, "esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace tab"),
    (0x10, "q w e r t y u i o p bracket_left bracket_right ret ctrl"),
    (0x1E, "a s d f g h j k l semicolon apostrophe grave_accent shift"),
    (0x2B, "backslash z x c v b n m comma dot slash shift_r asterisk alt spc caps_lock"),
    (0x3B, "f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 num_lock scroll_lock"),
    (0x47, "kp_7 kp_8 kp_9 kp_subtract kp_4 kp_5 kp_6 kp_add kp_1 kp_2 kp_3 kp_0 kp_decimal"),
)
_EXTENDED: Final = {
    0x1C: "kp_enter", 0x1D: "ctrl_r", 0x35: "kp_divide", 0x38: "alt_r", 0x47: "home", 0x48: "up", 0x49: "pgup", 0x4B: "left",
    0x4D: "right", 0x4F: "end", 0x50: "down", 0x51: "pgdn", 0x52: "insert", 0x53: "delete", 0x5B: "meta_l", 0x5C: "meta_r",
    0x5D: "compose", 0x5E: "power", 0x5F: "sleep", 0x63: "wake",
}  # fmt: skip
SCAN1: Final[dict[str, int]] = {
    **{name: start + index for start, names in _ROWS for index, name in enumerate(names.split())},
    "less": 0x56,
    "f11": 0x57,
    "f12": 0x58,
    **{name: EXTENDED << 8 | code for code, name in _EXTENDED.items()},
}
"""Make code in set 1 by name; 0xE0xx for extended ones. `pause` and `print` have sequences of their own."""
ALIASES: Final = {
    "enter": "ret", "return": "ret", "space": "spc", "escape": "esc", "del": "delete", "ins": "insert", "control": "ctrl",
    "pageup": "pgup", "pagedown": "pgdn", "windows": "meta_l", "menu": "compose", "sysrq": PRINT, "kp_multiply": "asterisk",
    "bksp": "backspace", "102nd": "less",
}  # fmt: skip

_TO_SET1: Final = bytes.fromhex(
    "ff43413f3d3b3c586444424 03e0f2959".replace(" ", "")
    + "65382a701d10025a66712c1f1e11035b"
    + "672e2d20120504 5c68392f211413065d".replace(" ", "")
    + "69313023221507 5e6a7232241608095f".replace(" ", "")
    + "6b33251718 0b0a606c34352627190c61".replace(" ", "")
    + "6d7328741a0d626e3a361c1b752b6376"
    + "55567778797a0e7b7c4f7d4b477e7f6f"
    + "52535 04c4d480145574e514a37494654".replace(" ", "")
)
TRANSLATION: Final = bytes([*_TO_SET1, 0x80, 0x81, 0x82, 0x41, 0x54, *range(0x85, 0x100)])
"""What the 8042 makes of a byte of set 2."""
_TO_SET2: Final = {
    code: index for index, code in reversed(list(enumerate(_TO_SET1))) if index not in (0x02, 0x7F)
} | {0x41: 0x83, 0x54: 0x84}


def key_name(name: str) -> str:
    """The key that is called so, or by an alias. KeyError: there is none."""
    lower = name.strip().lower()
    lower = ALIASES.get(lower, lower)
    if lower not in SCAN1 and lower not in (PAUSE, PRINT):
        raise KeyError(name)
    return lower


def parse_combination(text: str) -> list[str]:
    """`ctrl-alt-f2` -> its keys, to be pressed in this order. ValueError names what is not a key."""
    names = text.split("-") if text != "-" else ["minus"]
    if len(names) > MAX_KEYS:
        raise ValueError(f"{text!r}: more than {MAX_KEYS} keys")
    keys = []
    for name in names:
        try:
            keys.append(key_name(name))
        except KeyError:
            raise ValueError(
                f"{name!r} in {text!r} is no key; keys are: {' '.join(sorted(SCAN1))} {PAUSE} {PRINT}"
            ) from None
    return keys


def scan_codes(key: str, pressed: bool, scan_set: int) -> bytes:
    """What the keyboard sends. Set 1 or 2. KeyError."""
    if key == PAUSE:
        if not pressed:
            return b""
        return bytes.fromhex("e11d45e19dc5" if scan_set == 1 else "e11477e1f014f077")
    if key == PRINT:
        if scan_set == 1:
            return bytes.fromhex("e02ae037" if pressed else "e0b7e0aa")
        return bytes.fromhex("e012e07c" if pressed else "e0f07ce0f012")
    code = SCAN1[key]
    prefix = bytes([EXTENDED]) if code >> 8 else b""
    if scan_set == 1:
        return prefix + bytes([code & 0x7F | (0 if pressed else 0x80)])
    return prefix + (b"" if pressed else b"\xf0") + bytes([_TO_SET2[code & 0x7F]])


_PLAIN: Final = dict(
    zip("-=[];'`\\,./ \n\t\b\x1b", ["minus", "equal", "bracket_left", "bracket_right", "semicolon", "apostrophe", "grave_accent", "backslash", "comma", "dot", "slash", "spc", "ret", "tab", "backspace", "esc"], strict=True)
)  # fmt: skip
_SHIFTED: Final = dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True))


def keys_of_character(character: str) -> list[str]:
    """What types it on a US layout. ValueError: nothing does."""
    if character.isascii() and character.isalnum():
        return ["shift", character.lower()] if character.isupper() else [character]
    if character in _PLAIN:
        return [_PLAIN[character]]
    if character in _SHIFTED:
        return ["shift", *keys_of_character(_SHIFTED[character])]
    raise ValueError(f"no key of a US layout types {character!r}")


_KEYSYMS: Final = {
    0xFF08: "backspace", 0xFF09: "tab", 0xFE20: "tab", 0xFF0D: "ret", 0xFF13: PAUSE, 0xFF14: "scroll_lock", 0xFF15: PRINT,
    0xFF61: PRINT, 0xFF1B: "esc", 0xFFFF: "delete", 0xFF50: "home", 0xFF51: "left", 0xFF52: "up", 0xFF53: "right", 0xFF54: "down",
    0xFF55: "pgup", 0xFF56: "pgdn", 0xFF57: "end", 0xFF63: "insert", 0xFF67: "compose", 0xFF7F: "num_lock", 0xFF8D: "kp_enter",
    0xFFAA: "asterisk", 0xFFAB: "kp_add", 0xFFAD: "kp_subtract", 0xFFAE: "kp_decimal", 0xFFAF: "kp_divide", 0xFF95: "kp_7",
    0xFF97: "kp_8", 0xFF9A: "kp_9", 0xFF96: "kp_4", 0xFF9D: "kp_5", 0xFF98: "kp_6", 0xFF9C: "kp_1", 0xFF99: "kp_2", 0xFF9B: "kp_3",
    0xFF9E: "kp_0", 0xFF9F: "kp_decimal", 0xFFE1: "shift", 0xFFE2: "shift_r", 0xFFE3: "ctrl", 0xFFE4: "ctrl_r", 0xFFE5: "caps_lock",
    0xFFE7: "meta_l", 0xFFE8: "meta_r", 0xFFE9: "alt", 0xFFEA: "alt_r", 0xFFEB: "meta_l", 0xFFEC: "meta_r", 0xFE03: "alt_r",
    **{0xFFB0 + digit: f"kp_{digit}" for digit in range(10)},
    **{0xFFBD + number: f"f{number}" for number in range(1, 13)},
}  # fmt: skip


def key_of_keysym(keysym: int) -> str | None:
    """The key of an X keysym on a US layout; None: there is none. Shift is not in it: a client sends that as a key of its own."""
    if 0x20 <= keysym < 0x7F:
        return keys_of_character(chr(keysym))[-1]
    return _KEYSYMS.get(keysym)
