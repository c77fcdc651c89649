"""What the disk may hold: the oracle of the guest's reads, and of the medium after the last power cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SECTOR: Final = 512
Value = bytes


class DiskModel:
    """For each sector: values that a read may give (`current`), and values that the medium may hold after a power cut (`stable`)."""

    def __init__(self, sectors: int) -> None:
        zero = bytes(SECTOR)
        self.current: list[set[Value]] = [{zero} for _ in range(sectors)]
        self.stable: list[set[Value]] = [{zero} for _ in range(sectors)]
        self.busy: set[int] = set()
        """Sectors that a request under way writes or reads."""
        self._flushes: dict[int, dict[int, set[Value]]] = {}
        self._serial = 0
        self._cut: dict[int, set[Value]] = {}
        """Sectors with a request under way at a power cut: a write may have been done, and lost, before it is answered."""
        self._dirty: set[int] = set()
        self.cuts = 0
        """Power cuts: so many flushes may fail."""
        self._failed: set[int] = set()
        """Sectors whose last write was answered with an error: what is there is not known, and may change with a power cut."""
        self._unconfessed: set[int] = set()
        """Sectors with an answered write that a power cut undid, of which no failed flush has told yet."""

    def write(self, sector: int, data: bytes) -> None:
        """A write is asked for."""
        for at in range(0, len(data), SECTOR):
            number, piece = sector + at // SECTOR, data[at : at + SECTOR]
            self.stable[number].add(piece)
            self._dirty.add(number)
            for snapshot in self._flushes.values():
                snapshot.setdefault(number, set(self.current[number])).add(piece)

    def written(self, sector: int, data: bytes, fine: bool) -> None:
        """It was answered."""
        for at in range(0, len(data), SECTOR):
            number, piece = sector + at // SECTOR, data[at : at + SECTOR]
            self._unconfessed.discard(number)
            lost = self._cut.pop(number, set())
            if fine:
                self._failed.discard(number)
            else:
                self._failed.add(number)
            self.current[number] = {piece} | lost if fine else self.current[number] | lost | {piece}

    def read(self, sector: int, data: bytes) -> str | None:
        """A read was answered: what is wrong with it."""
        for at in range(0, len(data), SECTOR):
            number, piece = sector + at // SECTOR, data[at : at + SECTOR]
            if piece not in self.current[number]:
                return f"a read of sector {number} gave {piece[:8].hex()}, not {self._names(self.current[number])}"
            if number in self._cut:  # it may have been read before the cut, and lost in it
                del self._cut[number]
            else:
                self.current[number] = {piece}
        return None

    @staticmethod
    def _names(values: set[Value]) -> str:
        return " or ".join(sorted(value[:8].hex() for value in values))

    def flush(self) -> int:
        """A flush is asked for: its number."""
        self._serial += 1
        snapshot = {number: set(self.current[number]) for number in self._dirty}
        for number in self._dirty & self.busy:  # a write under way: old or new
            snapshot[number] |= self.stable[number]
        self._flushes[self._serial] = snapshot
        return self._serial

    def flushed(self, number: int, fine: bool) -> str | None:
        """It was answered: what is wrong with that."""
        snapshot = self._flushes.pop(number)
        if not fine:
            self._unconfessed.clear()
        elif told := self._unconfessed.intersection(snapshot):
            return f"a flush was answered well, and sector {min(told)} was lost in the power cut before it"
        if fine:
            for sector, values in snapshot.items():
                self.stable[sector] = (self.stable[sector] & values) or values
        return None

    def power_cut(self, lost: Sequence[int]) -> None:
        """What was not flushed may be as before; `lost` is."""
        self.cuts += 1
        self._unconfessed.update(set(lost) - self.busy - self._failed)
        for number in self._dirty:
            self.current[number] = self.current[number] | self.stable[number]
        for number in self.busy:
            self._cut[number] = set(self.stable[number])
        for snapshot in self._flushes.values():
            for number in snapshot:
                snapshot[number] |= self.stable[number]

    def check_medium(self, stable: bytearray) -> list[str]:
        """After a power cut: everything that a flush covered is there."""
        wrong = []
        for number in sorted(self._dirty):
            piece = bytes(stable[number * SECTOR : (number + 1) * SECTOR])
            if piece not in self.stable[number]:
                wrong.append(f"sector {number} lost what a flush had covered")
        return wrong
