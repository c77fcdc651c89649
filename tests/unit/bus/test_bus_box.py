"""The box is PyNaCl's, byte for byte, whatever its length; nothing else opens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings as nacl

from bus.box import MAC, NONCE, Box

PUBLIC, SECRET = nacl.crypto_box_keypair()
KEY = nacl.crypto_box_beforenm(PUBLIC, SECRET)
LONGEST = 300


@given(st.binary(max_size=2 * LONGEST), st.binary(min_size=NONCE, max_size=NONCE))
def test_it_seals_and_opens_as_pynacl_does(plain: bytes, nonce: bytes) -> None:
    """Also what is longer than the buffer that is kept; longer boxes than were agreed on are not opened."""
    box = Box(KEY, LONGEST)
    sealed = box.seal(plain, nonce)
    assert sealed == nacl.crypto_box_easy_afternm(plain, nonce, KEY)
    assert box.open(sealed, nonce) == (plain if len(sealed) <= LONGEST else None)


@given(st.binary(max_size=100), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_does_not_open(plain: bytes, at: int, change: int) -> None:
    """Nor does what is too short to be a box, or another nonce."""
    box, nonce = Box(KEY, LONGEST), bytes(NONCE)
    sealed = bytearray(box.seal(plain, nonce))
    assert box.open(bytes(sealed), b"\1" + nonce[1:]) is None
    sealed[at % len(sealed)] ^= change
    assert box.open(bytes(sealed), nonce) is None
    assert box.open(bytes(sealed[: MAC - 1]), nonce) is None
    assert box.open(b"", nonce) is None


def test_keys_and_nonces_have_their_lengths() -> None:
    """The library itself reads as many bytes as it wants, whatever is there."""
    with pytest.raises(ValueError, match="32 bytes"):
        Box(KEY[:31], LONGEST)
    with pytest.raises(ValueError, match="24 bytes"):
        Box(KEY, LONGEST).seal(b"x", bytes(23))
    assert Box(KEY, LONGEST).open(bytes(40), bytes(23)) is None
