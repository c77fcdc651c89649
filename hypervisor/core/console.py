"""The hypervisor's console: a ring of bytes that `domicile dmesg` reads (XEN_SYSCTL_readconsole).

An unprivileged domain's output is collected into lines, each prefixed with "(dN) ", and limited in rate,
so that no domain can push others' lines out of the ring at will.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.abi.xen import VIRQ_CON_RING, CONSOLEIO_read, CONSOLEIO_write, HYPERVISOR_console_io
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.outbox import Outbox

LINE_LIMIT = 1024
"""Longest line that is collected before it is passed on."""


LINE_COST = 16
"""What a line costs of a domain's rate beside its bytes: it gets a prefix, and an entry in the log."""


def _affordable(data: bytes, tokens: int) -> tuple[bytes, int]:
    """As much of `data` as there are tokens for, and what that costs."""
    end = cost = 0
    while end < len(data):
        stop = data.find(b"\n", end) + 1
        part = (stop or len(data)) - end
        price = part + (LINE_COST if stop else 0)
        if cost + price > tokens:
            room = max(
                0, min(tokens - cost, part - bool(stop))
            )  # of the line that is too much, what it has before its end
            return data[: end + room], cost + room
        end, cost = end + part, cost + price
    return data, cost


class ConsoleRing:
    """A byte ring addressed by a 32-bit index that only grows (and wraps), as readconsole's `index` field
    is."""

    def __init__(self, size: int) -> None:
        self._data = bytearray()
        self._size = size
        self._start = 0

    @property
    def end(self) -> int:
        """Index behind the last byte."""
        return self._start + len(self._data)

    def append(self, data: bytes) -> None:
        """Add bytes; the oldest beyond the ring's size are gone."""
        self._data += data
        excess = len(self._data) - self._size
        if excess > 0:
            del self._data[:excess]
            self._start += excess

    def read(self, index: int | None, count: int) -> tuple[bytes, int]:
        """Up to `count` bytes from `index` (None: the oldest; what is too old or in the future is clipped
        to what is there), and the index behind them. Indexes are modulo 2^32."""
        start = self._start
        if index is not None:
            ahead = (index - self._start) & 0xFFFFFFFF
            if ahead <= len(self._data):
                start = self._start + ahead
        data = bytes(self._data[start - self._start : start - self._start + count])
        return data, (start + len(data)) & 0xFFFFFFFF

    def clear(self) -> None:
        """Forget what is there."""
        self._start += len(self._data)
        self._data.clear()


@dataclass(slots=True)
class _Line:
    pending: bytearray = field(default_factory=bytearray)
    tokens: int = 0
    filled_at: int = 0
    dropped: int = 0


class Console(DomainHooks):
    """HYPERVISOR_console_io, and the hypervisor's own lines."""

    def __init__(
        self, events: EventChannels, outbox: Outbox, config: MachineConfig, dispatcher: Dispatcher
    ) -> None:
        self.ring = ConsoleRing(config.console_ring_bytes)
        self._events = events
        self._outbox = outbox
        self._config = config
        self._lines: dict[DomId, _Line] = {}
        dispatcher.register(HYPERVISOR_console_io, CONSOLEIO_write, self._write_call)
        dispatcher.register(HYPERVISOR_console_io, CONSOLEIO_read, self._read_call)

    def log(self, text: str) -> None:
        """A line of the hypervisor's own ("(XEN) " in front)."""
        self.ring.append(f"(XEN) {text}\n".encode())
        self._events.send_global_virq(VIRQ_CON_RING)

    def write(self, now: int, domain: Domain, data: bytes) -> None:
        """Bytes from a domain. Beyond its rate they are dropped, and the loss is told."""
        line = self._lines.setdefault(domain.domid, _Line(tokens=self._config.console_burst, filled_at=now))
        if not domain.privileged:
            refill = (now - line.filled_at) * self._config.console_rate // 1_000_000_000
            if refill > 0:
                line.tokens = min(self._config.console_burst, line.tokens + refill)
                line.filled_at = now
            kept, cost = _affordable(data, line.tokens)
            line.tokens -= cost
            line.dropped += len(data) - len(kept)
            data = kept
            if line.dropped and data:
                self._emit_line(domain.domid, b"[%d bytes dropped: written too fast]" % line.dropped)
                line.dropped = 0
        for byte in data:
            if byte == 0x0A or len(line.pending) >= LINE_LIMIT:
                self._emit_line(domain.domid, bytes(line.pending))
                line.pending.clear()
            if byte != 0x0A and (byte >= 0x20 or byte == 0x09):
                line.pending.append(byte)

    def _emit_line(self, domid: DomId, text: bytes) -> None:
        self.ring.append(b"(d%d) " % domid + text + b"\n")
        self._outbox.log("guest", text.decode("utf-8", "replace"), domid)
        self._events.send_global_virq(VIRQ_CON_RING)

    def _write_call(self, call: Call) -> Result:
        self.write(call.now, call.domain, call.array("buffer"))
        return call.reply(0)

    def _read_call(self, call: Call) -> Result:
        """The emergency console has no input of its own here: nothing to read, as on a Xen without a
        serial line.
        """
        return call.reply(0, call.item._replace(length=0))

    def dying(self, now: int, domain: Domain) -> None:
        line = self._lines.pop(domain.domid, None)
        if line is not None and line.pending:
            self._emit_line(domain.domid, bytes(line.pending))
