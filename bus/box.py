"""Sealing and opening of messages with a shared key (NaCl's crypto_box, libsodium's `crypto_box_easy_afternm`), into a buffer that is kept.

PyNaCl's own functions check types and allocate a buffer for each message, which takes twice as long as the cipher itself for messages as
short as hypercalls (`benchmarks/calls.py`; 8.2 us for both ways before, 3.4 now). So this calls the library that PyNaCl carries
directly; lengths are checked here.
"""

from __future__ import annotations

from typing import Any, Final

from nacl import _sodium  # a compiled module: the functions that nacl.bindings calls
from nacl import bindings as nacl

MAC: Final = 16
NONCE: Final = 24
KEY: Final = 32
_lib: Any = _sodium.lib
_ffi: Any = _sodium.ffi


class Box:
    """One shared key. Not for several threads at a time."""

    def __init__(self, key: bytes, longest: int) -> None:
        """`key`: 32 bytes, of `crypto_box_beforenm`; `longest`: bytes of the longest box that is opened. ValueError."""
        if len(key) != KEY:
            raise ValueError(f"a shared key has {KEY} bytes, not {len(key)}")
        self._key = key
        self._longest = longest
        self._memory = _ffi.new("unsigned char[]", longest + MAC)
        self._bytes = _ffi.buffer(self._memory)

    def seal(self, plain: bytes, nonce: bytes) -> bytes:
        """The box: 16 bytes longer. ValueError: a nonce that is not of 24 bytes."""
        size = len(plain)
        if len(nonce) != NONCE:
            raise ValueError(f"a nonce has {NONCE} bytes, not {len(nonce)}")
        if size > self._longest:
            return nacl.crypto_box_easy_afternm(plain, nonce, self._key)
        if _lib.crypto_box_easy_afternm(self._memory, plain, size, nonce, self._key) != 0:
            raise ValueError("libsodium seals nothing")
        sealed: bytes = self._bytes[: size + MAC]
        return sealed

    def open(self, sealed: bytes, nonce: bytes) -> bytes | None:
        """What is in the box; None if it was not made with this key and nonce."""
        size = len(sealed)
        if not MAC <= size <= self._longest or len(nonce) != NONCE:
            return None
        if _lib.crypto_box_open_easy_afternm(self._memory, sealed, size, nonce, self._key) != 0:
            return None
        plain: bytes = self._bytes[: size - MAC]
        return plain
