"""What fuzzers' targets share."""

from __future__ import annotations


class Bytes:
    """Takes an input apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """So many bytes, zeroes at the end."""
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece.ljust(count, b"\0")

    def number(self, size: int = 1) -> int:
        """Little-endian."""
        return int.from_bytes(self.take(size), "little")

    @property
    def left(self) -> bool:
        """There is more."""
        return self.at < len(self.data)
