"""A device's doorbell registers as the domain that owns it has them: memory and a doorbell, no message."""

from __future__ import annotations

import mmap
import os

from bus import sealed
from bus.doorbell import Doorbell


class DeviceBell:
    """A doorbell range of a device's BAR: a page shared with the device, and a doorbell of this process."""

    def __init__(self, page: int, bell: int, bar: int, offset: int, length: int) -> None:
        """Takes over both descriptors. ValueError if the page is not a sealed memfd of that length."""
        self._bar, self._offset, self._length = bar, offset, length
        self._bell = Doorbell(bell)
        try:
            sealed.check(page, length)
            self._mapping = mmap.mmap(page, length)
            self._words = memoryview(self._mapping).cast("I")
        finally:
            os.close(page)

    def holds(self, bar: int, offset: int, size: int) -> bool:
        """The register is a doorbell of this range."""
        return bar == self._bar and self._offset <= offset and offset + size <= self._offset + self._length

    def put(self, offset: int, size: int, value: int) -> None:
        """Write the register; 32 bits that are aligned in one store."""
        start = offset - self._offset
        if size == 4 and start % 4 == 0:
            self._words[start >> 2] = value
        else:
            self._mapping[start : start + size] = value.to_bytes(size, "little")

    def ring(self) -> None:
        """Tell the device to look."""
        self._bell.ring()

    def store(self, offset: int, size: int, value: int) -> None:
        """Write the register and ring."""
        self.put(offset, size, value)
        self.ring()

    def close(self) -> None:
        """Unmap and close."""
        self._words.release()
        self._mapping.close()
        self._bell.close()
