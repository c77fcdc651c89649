"""An observer in a process of a machine: it counts the events that a plan names and, when one is due, waits until its fault is carried out.

All processes share one page file (the `Board`): the plan, counters that outlive a process, and who runs. Each counter is written by
one process at a time (the one that sees the event). The controller (toolstack.faults) carries out what needs another's rights.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from simulation.live.plan import Fault

SIZE: Final = 1 << 18
PLAN_AT: Final = 64
PLAN_MAX: Final = 1 << 16
COUNTERS_AT: Final = 1 << 17
"""Two 32-bit words a fault: how often its event was seen, and what became of it (0: nothing yet, STRUCK, MISSED)."""
STRUCK: Final = 1
MISSED: Final = 2
"""The controller did not answer in time: the process went on, and the fault does not count as carried out."""
TABLE_AT: Final = 3 << 16
TABLE_MAX: Final = 1 << 15
MAX_FAULTS: Final = 256
ANSWER_S: Final = 5.0
HELLO: Final = 0xFFFFFFFF
"""In the place of a fault's number: the hypervisor's observer says who it is."""
GONE: Final = -1
TIMED: Final = 1 << 31
"""With a fault's number: its time has come, and the observer is to carry it out, or has done so."""
_GENERATION, _LENGTH, _FAIL, _LOSSES, _TABLE = 0, 1, 2, 3, 4


class Board:
    """The shared file. One writer of each part: plan: controller; counters: whoever sees the event; table: hypervisor."""

    def __init__(self, directory: str) -> None:
        with open(Path(directory) / "board", "r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self.words = memoryview(self._map).cast("I")

    @staticmethod
    def create(directory: str) -> None:
        """An empty one."""
        with open(Path(directory) / "board", "wb") as file:
            file.truncate(SIZE)

    @property
    def generation(self) -> int:
        """Changes with the plan."""
        return self.words[_GENERATION]

    def write_plan(self, faults: list[Fault]) -> None:
        """ValueError if there are too many."""
        text = json.dumps([fault.model_dump(mode="json") for fault in faults]).encode()
        if len(faults) > MAX_FAULTS or len(text) > PLAN_MAX:
            raise ValueError(f"{len(faults)} faults, {len(text)} bytes: too many")
        self._map[PLAN_AT : PLAN_AT + len(text)] = text
        self.words[_LENGTH] = len(text)
        self.words[_GENERATION] += 1

    def read_plan(self) -> list[Fault]:
        """What the controller wrote; empty while it writes."""
        raw = self._map[PLAN_AT : PLAN_AT + self.words[_LENGTH]]
        try:
            return [Fault.model_validate(one) for one in json.loads(raw or b"[]")]
        except ValueError:
            return []

    def seen(self, fault: int, n: int) -> bool:
        """The event of a fault happened: is it due now?"""
        at = COUNTERS_AT // 4 + 2 * fault
        self.words[at] += 1
        if self.words[at] != n or self.words[at + 1]:
            return False
        self.words[at + 1] = STRUCK
        return True

    def counts(self, fault: int) -> tuple[int, bool]:
        """(events seen, struck)"""
        at = COUNTERS_AT // 4 + 2 * fault
        return self.words[at], self.words[at + 1] == STRUCK

    def miss(self, fault: int) -> None:
        """It was due, and nobody carried it out in time."""
        self.words[COUNTERS_AT // 4 + 2 * fault + 1] = MISSED

    def missed(self, fault: int) -> bool:
        """See MISSED."""
        return self.words[COUNTERS_AT // 4 + 2 * fault + 1] == MISSED

    def mark(self, fault: int) -> None:
        """It struck, by time."""
        self.words[COUNTERS_AT // 4 + 2 * fault + 1] = STRUCK

    @property
    def fail(self) -> int:
        """So many media requests are to fail."""
        return self.words[_FAIL]

    @fail.setter
    def fail(self, count: int) -> None:
        self.words[_FAIL] = count

    @property
    def losses(self) -> int:
        """Power cuts so far."""
        return self.words[_LOSSES]

    @losses.setter
    def losses(self, count: int) -> None:
        self.words[_LOSSES] = count

    def write_table(self, table: dict[str, list[Any]]) -> None:
        """{process: [role, pid]}: who runs."""
        raw = json.dumps(table).encode()[:TABLE_MAX]
        self._map[TABLE_AT : TABLE_AT + len(raw)] = raw
        self.words[_TABLE] = len(raw)

    def read_table(self) -> dict[str, list[Any]]:
        """The same; empty while it is written."""
        try:
            table: dict[str, list[Any]] = json.loads(
                self._map[TABLE_AT : TABLE_AT + self.words[_TABLE]] or b"{}"
            )
        except ValueError:
            return {}
        return table

    def close(self) -> None:
        """Unmap."""
        self.words.release()
        self._map.close()


class Edge:
    """Of one process. Made before it gives up its privileges."""

    def __init__(self, role: str) -> None:
        directory = os.environ["DOMICILE_FAULTS"]
        self.role: Final = role
        self.board: Final = Board(directory)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(str(Path(directory) / "control"))
        self._generation = -1
        self._by_event: dict[str, list[tuple[int, Fault]]] = {}
        self._patterns: list[tuple[re.Pattern[str], int, Fault]] = []
        self._gone = False
        self.timed: list[int] = []
        """Faults whose time has come, which this process is to carry out (`obey`)."""
        if role == "hypervisor":
            self._socket.send(struct.pack("<II", HELLO, os.getpid()))

    def fileno(self) -> int:
        """Readable when the controller has something to say."""
        return self._socket.fileno()

    def obey(self, act: Callable[[list[Fault]], None]) -> bool:
        """Carry out, by `act`, what is in `timed` and what the controller has said since, and tell it. False: it is gone."""
        here = True
        while (packet := self._packet()) is not None:
            here = packet != GONE
            if packet & TIMED and here:
                self.timed.append(packet & ~TIMED)
        due, self.timed = self.timed, []
        plan = self.board.read_plan() if due else []
        for index in due:
            if index < len(plan):
                act([plan[index]])
                with contextlib.suppress(OSError):
                    self._socket.send(struct.pack("<II", index | TIMED, os.getpid()))
        return here

    def _packet(self) -> int | None:
        """A number that came, if one did; GONE once, and then nothing, if nobody is there any more."""
        if self._gone:
            return None
        try:
            raw = self._socket.recv(16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            raw = b""
        self._gone = not raw
        return int.from_bytes(raw[:4], "little") if raw else GONE

    def _refresh(self) -> None:
        generation = self.board.generation
        if generation == self._generation:
            return
        self._generation = generation
        self._by_event, self._patterns = {}, []
        for index, fault in enumerate(self.board.read_plan()):
            if fault.event.startswith("console:"):
                with contextlib.suppress(re.error):
                    self._patterns.append((re.compile(fault.event[8:]), index, fault))
            elif fault.event:
                self._by_event.setdefault(fault.event, []).append((index, fault))

    def happen(self, event: str) -> list[Fault]:
        """An event. The faults that strike now: carried out, or the caller's to carry out."""
        self._refresh()
        found = self._by_event.get(event)
        return self._strike([pair for pair in found if self.board.seen(pair[0], pair[1].n)]) if found else []

    def line(self, text: str) -> list[Fault]:
        """A console line."""
        self._refresh()
        hits = [(index, fault) for pattern, index, fault in self._patterns if pattern.search(text)]
        return self._strike([pair for pair in hits if self.board.seen(pair[0], pair[1].n)])

    def _strike(self, due: list[tuple[int, Fault]]) -> list[Fault]:
        done = []
        for index, fault in due:
            try:
                self._socket.send(struct.pack("<II", index, os.getpid()))
                answered = self._answered(index)
            except OSError:
                answered = False  # the controller is gone: the plan with it
            if answered:
                done.append(fault)
            else:
                self.board.miss(index)
        return done

    def _answered(self, index: int) -> bool:
        """Whether the fault was carried out within ANSWER_S. An answer to an earlier one that came too late is none. OSError."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + ANSWER_S
        while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            packet = self._socket.recv(16)
            if not packet:
                return False
            if packet == struct.pack("<I", index):
                return True
            if len(packet) == 4 and (number := struct.unpack("<I", packet)[0]) & TIMED:
                self.timed.append(number & ~TIMED)
        return False
