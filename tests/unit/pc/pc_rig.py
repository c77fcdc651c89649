"""A clock that stands where the test puts it, a line that keeps what it was told, memory, and time that goes on to deadlines."""

from __future__ import annotations

from drivers.pc.bus import GuestMemoryError, Timed, earliest

MS = 1_000_000
SECOND = 1_000_000_000


class Time:
    """Guest time."""

    def __init__(self, ns: int = 0) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns

    def run(self, until: int, *devices: Timed, most: int = 10_000) -> int:
        """To `until`, every deadline on its time; the number of them."""
        done = 0
        while (at := earliest(devices)) is not None and at <= until:
            assert at >= self.ns or done == 0, "a deadline in the past"
            self.ns = max(self.ns, at)
            for device in devices:
                device.expire(self.ns)
            done += 1
            assert done <= most
        self.ns = max(self.ns, until)
        return done


class Wire:
    """A line's level, and how often it rose."""

    def __init__(self) -> None:
        self.level = False
        self.rises = 0

    def __call__(self, level: bool) -> None:
        if level and not self.level:
            self.rises += 1
        self.level = level


class Ram:
    """Guest memory from 0; outside it raises."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.data = bytearray(size)

    def read(self, gpa: int, length: int) -> bytes:
        if gpa < 0 or gpa + length > len(self.data):
            raise GuestMemoryError(f"{gpa:#x}")
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        if gpa < 0 or gpa + len(data) > len(self.data):
            raise GuestMemoryError(f"{gpa:#x}")
        self.data[gpa : gpa + len(data)] = data
