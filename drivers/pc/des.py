"""DES, for VNC authentication alone: one block is encrypted (FIPS 46-3; RFC 6143, 7.2.2). It protects nothing by today's measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

BLOCK: Final = 8
# Bits are counted from 1 at the most significant end, as the standard has them.
_INITIAL: Final = tuple(start - 8 * row for start in (58, 60, 62, 64, 57, 59, 61, 63) for row in range(8))
_FINAL: Final = tuple(1 + _INITIAL.index(bit) for bit in range(1, 65))
_EXPAND: Final = tuple((4 * row + column - 1) % 32 + 1 for row in range(8) for column in range(6))
_SPREAD: Final = (
    *(16, 7, 20, 21, 29, 12, 28, 17, 1, 15, 23, 26, 5, 18, 31, 10),
    *(2, 8, 24, 14, 32, 27, 3, 9, 19, 13, 30, 6, 22, 11, 4, 25),
)
_CHOICE_1: Final = (
    *(57, 49, 41, 33, 25, 17, 9, 1, 58, 50, 42, 34, 26, 18, 10, 2, 59, 51, 43, 35, 27, 19, 11, 3, 60, 52, 44, 36),
    *(63, 55, 47, 39, 31, 23, 15, 7, 62, 54, 46, 38, 30, 22, 14, 6, 61, 53, 45, 37, 29, 21, 13, 5, 28, 20, 12, 4),
)  # fmt: skip
_CHOICE_2: Final = (
    *(14, 17, 11, 24, 1, 5, 3, 28, 15, 6, 21, 10, 23, 19, 12, 4, 26, 8, 16, 7, 27, 20, 13, 2),
    *(41, 52, 31, 37, 47, 55, 30, 40, 51, 45, 33, 48, 44, 49, 39, 56, 34, 53, 46, 42, 50, 36, 29, 32),
)
_SHIFTS: Final = (1, 1, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 1)
_BOXES: Final = tuple(
    bytes.fromhex("".join(f"0{digit}" for digit in rows.replace(" ", "")))
    for rows in (
        "e4d12fb83a6c5907 0f74e2d1a6cb9538 41e8d62bfc973a50 fc8249175b3ea06d",
        "f18e6b34972dc05a 3d47f28ec01a69b5 0e7ba4d158c6932f d8a13f42b67c05e9",
        "a09e63f51dc7b428 d709346a285ecbf1 d6498f30b12c5ae7 1ad069874fe3b52c",
        "7de3069a1285bc4f d8b56f03472c1ae9 a690cb7df13e5284 3f06a1d8945bc72e",
        "2c417ab6853fd0e9 eb2c47d150fa3986 421bad78f9c5630e b8c71e2d6f09a453",
        "c1af92680d34e75b af427c9561de0b38 9ef528c3704a1db6 432c95fabe17608d",
        "4b2ef08d3c975a61 d0b7491ae35c2f86 14bdc37eaf680592 6bd814a7950fe23c",
        "d2846fb1a93e50c7 1fd8a374c56b0e92 7b419ce206adf358 21e74a8dfc90356b",
    )
)


def _pick(value: int, width: int, table: Sequence[int]) -> int:
    out = 0
    for bit in table:
        out = out << 1 | value >> width - bit & 1
    return out


def _round(half: int, key: int) -> int:
    mixed = _pick(half, 32, _EXPAND) ^ key
    out = 0
    for number, box in enumerate(_BOXES):
        six = mixed >> 42 - 6 * number & 0x3F
        row = six >> 4 & 2 | six & 1
        out = out << 4 | box[16 * row + (six >> 1 & 0xF)]
    return _pick(out, 32, _SPREAD)


def encrypt_block(key: bytes, block: bytes) -> bytes:
    """Eight bytes with a key of eight, whose lowest bits do not count. ValueError for other sizes."""
    if len(key) != BLOCK or len(block) != BLOCK:
        raise ValueError("key and block have eight bytes each")
    chosen = _pick(int.from_bytes(key, "big"), 64, _CHOICE_1)
    c, d = chosen >> 28, chosen & 0xFFFFFFF
    start = _pick(int.from_bytes(block, "big"), 64, _INITIAL)
    left, right = start >> 32, start & 0xFFFFFFFF
    for shift in _SHIFTS:
        c = (c << shift | c >> 28 - shift) & 0xFFFFFFF
        d = (d << shift | d >> 28 - shift) & 0xFFFFFFF
        left, right = right, left ^ _round(right, _pick(c << 28 | d, 56, _CHOICE_2))
    return _pick(right << 32 | left, 64, _FINAL).to_bytes(BLOCK, "big")


def vnc_response(password: bytes, challenge: bytes) -> bytes:
    """What a client answers: the challenge, encrypted by the password's first eight bytes, each with its bits turned round."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password[:BLOCK].ljust(BLOCK, b"\0"))
    return b"".join(encrypt_block(key, challenge[at : at + BLOCK]) for at in range(0, len(challenge), BLOCK))
