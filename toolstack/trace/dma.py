"""From records to requests (`domicile trace --dma`): each request of a frontend with the three steps of its data.

1. The driver of the driver domain gives its device pseudophysical addresses (the PRPs of an NVMe command).
2. The device asks for DMA with them: to the IOMMU they are I/O virtual addresses.
3. The IOMMU gives the machine address, or a fault.

Steps 2 and 3 are the hypervisor's records: what a device says that it asked (`Kind.REQUEST`) serves only to tell which of its
commands the DMA is for. Everything is bounded: what is never answered is forgotten in time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from bus.trace import NOBODY, Kind, Purpose, Record
from toolstack.trace.names import FAULTS, OPERATIONS, STATUSES, device_name, disk_name
from toolstack.trace.session import Entry

MAX_REQUESTS: Final = 4096
"""Requests under way that are kept in mind, and commands, and DMA batches; the oldest go."""
MAX_LOOSE: Final = 4096
MAX_PARTS: Final = 2048
"""Segments, commands, PRPs, transfers and pieces of one request that are kept: twice what the largest indirect request has."""
MAX_LONE_PARTS: Final = 64
"""PRPs of a command, pieces of a transfer, that belong to no request."""
MAX_ALL_PARTS: Final = 1 << 19
"""Parts of all requests under way; beyond that the oldest requests are forgotten."""


@dataclass(slots=True)
class Transfer:
    """A DMA request of a device: step 2, and step 3 in its pieces."""

    device: int
    time: int
    iova: int
    length: int = 0
    write: bool = False
    purpose: int = Purpose.DATA
    pieces: list[tuple[int, int, int, int | None]] = field(default_factory=list)
    """(I/O virtual address, length, machine address, the frame's owner)."""
    fault: int = 0
    key: tuple[int, int, int] = (0, 0, 0)
    """(device, token, item): under which the IOMMU tells of it."""
    request: Request | None = None

    def goes_on(self, iova: int) -> bool:
        """What the IOMMU tells of that address is the next piece of this transfer, and not of one that has its token again."""
        return not self.fault and iova == self.iova + self.length

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "time_ns": self.time,
            "device": device_name(self.device),
            "iova": self.iova,
            "length": self.length,
            "direction": "to memory" if self.write else "from memory",
            "purpose": Purpose(self.purpose).name.lower() if self.purpose <= max(Purpose) else "unknown",
            "fault": FAULTS.get(self.fault, f"reason {self.fault:#x}") if self.fault else None,
            "machine": [
                {"iova": iova, "length": length, "address": address, "owner": owner}
                for iova, length, address, owner in self.pieces
            ],
        }


@dataclass(slots=True)
class Command:
    """A command of an NVMe controller: step 1."""

    device: int
    queue: int
    number: int
    time: int
    opcode: int
    block: int
    blocks: int
    list_page: int
    prps: list[tuple[int, int]] = field(default_factory=list)
    """(pseudophysical address, length)."""
    status: int | None = None

    def names(self, address: int) -> bool:
        """The address is in one of its PRPs, or in its list."""
        if self.list_page and self.list_page <= address < self.list_page + 4096:
            return True
        return any(start <= address < start + length for start, length in self.prps)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "time_ns": self.time,
            "device": device_name(self.device),
            "queue": self.queue,
            "command": self.number,
            "opcode": self.opcode,
            "prps": [{"address": address, "length": length} for address, length in self.prps],
            "list": self.list_page or None,
            "status": self.status,
        }


@dataclass(slots=True)
class Request:
    """A request of a frontend, from its ring to its answer."""

    domain: int
    disk: int
    ring: int
    index: int
    time: int
    id: int = 0
    operation: int = 0
    sector: int = 0
    sectors: int = 0
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """(grant reference, I/O virtual address, length)."""
    commands: list[Command] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    token: tuple[int, int] | None = None
    status: int | None = None
    answered: int = 0
    parts: int = 0
    left_out: int = 0
    """Parts beyond MAX_PARTS."""

    def plain(self, name: str) -> dict[str, Any]:
        """For JSON."""
        return {
            "domain": self.domain,
            "name": name,
            "disk": disk_name(self.disk),
            "ring": self.ring,
            "index": self.index,
            "slot_time_ns": self.time,
            "answered_ns": self.answered or None,
            "id": self.id,
            "operation": OPERATIONS.get(self.operation, str(self.operation)),
            "sector": self.sector,
            "sectors": self.sectors,
            "status": STATUSES.get(self.status, str(self.status)) if self.status is not None else None,
            "segments": [
                {"gref": ref, "iova": iova, "length": length} for ref, iova, length in self.segments
            ],
            "commands": [command.plain() for command in self.commands],
            "dma": [transfer.plain() for transfer in self.transfers],
            "left_out": self.left_out,
        }


class RequestJoiner:
    """Records in, requests out, when they are answered. Faults of DMA that is no request's come out by themselves."""

    def __init__(self) -> None:
        self._requests: OrderedDict[tuple[int, int, int, int], Request] = OrderedDict()
        self._by_token: OrderedDict[tuple[int, int], Request] = OrderedDict()
        self._commands: OrderedDict[tuple[int, int, int], Command] = OrderedDict()
        self._owners: dict[int, Request] = {}
        self._transfers: OrderedDict[tuple[int, int, int], Transfer] = OrderedDict()
        self._claims: OrderedDict[tuple[int, int, int], tuple[int, int, int]] = OrderedDict()
        self._out: deque[Request | Transfer] = deque(maxlen=MAX_LOOSE)
        self._parts = 0
        self.forgotten = 0
        """Requests whose answer was not seen."""

    def feed(self, entries: Iterable[Entry]) -> Iterator[Request | Transfer]:
        """What is complete after these records (in order of time)."""
        for peer, record in entries:
            kind = record.kind
            if peer.role == "hypervisor":
                if kind == Kind.DMA:
                    self._dma(record)
            elif peer.bdf is not None:
                if kind == Kind.REQUEST:
                    token, place, _iova, _length, command, purpose = record.values
                    key = (peer.bdf, token, place)
                    self._keep(self._claims, key, (record.track, command, purpose))
                    self._transfers.pop(key, None)  # a device that starts anew counts its tokens anew
            elif kind == Kind.TAKEN:
                self._taken(record)
            elif kind == Kind.COMMAND:
                self._command(record)
            elif kind == Kind.SEGMENT:
                self._segment(record)
            elif kind == Kind.SUBMIT:
                self._submit(record)
            elif kind == Kind.PRP:
                self._prp(record)
            elif kind == Kind.COMPLETED:
                self._completed(record)
            elif kind == Kind.ANSWERED:
                self._answered(record)
            while self._out:
                yield self._out.popleft()

    @staticmethod
    def _keep(table: OrderedDict[Any, Any], key: Any, value: Any) -> Any:
        """Put in; what fell out for it."""
        table[key] = value
        table.move_to_end(key)
        return table.popitem(last=False)[1] if len(table) > MAX_REQUESTS else None

    def _room(self, request: Request) -> bool:
        """For one more part of it."""
        if request.parts >= MAX_PARTS:
            request.left_out += 1
            return False
        request.parts += 1
        self._parts += 1
        while self._parts > MAX_ALL_PARTS and self._requests:
            self._forget(self._requests.popitem(last=False)[1])
            self.forgotten += 1
        return True

    def _forget(self, request: Request) -> None:
        """It is not among those under way any more: neither is what belongs to it, and nothing is added."""
        self._parts -= request.parts
        request.parts = MAX_PARTS
        if request.token is not None and self._by_token.get(request.token) is request:
            del self._by_token[request.token]
        for command in request.commands:
            self._owners.pop(id(command), None)
        for transfer in request.transfers:
            if self._transfers.get(transfer.key) is transfer:
                del self._transfers[transfer.key]

    # ------------------------------------------------------------------ the frontend's request

    def _taken(self, record: Record) -> None:
        disk, index, ident, operation, sector, sectors = record.values
        key = (record.subject, disk, record.track, index)
        request = Request(*key, record.time, ident, operation, sector, sectors)
        before = self._requests.pop(key, None)
        old = self._keep(self._requests, key, request)
        for gone in (before, old):
            if gone is not None:
                self._forget(gone)
                self.forgotten += 1

    def _of(self, record: Record) -> Request | None:
        disk, index = record.values[:2]
        return self._requests.get((record.subject, disk, record.track, index))

    def _command(self, record: Record) -> None:
        request = self._of(record)
        if request is not None:
            token, device = record.values[2], record.values[3]
            request.token = (device, token)
            self._keep(self._by_token, request.token, request)

    def _segment(self, record: Record) -> None:
        request = self._of(record)
        if request is not None:
            number, ref, iova, length = record.values[2:6]
            if number == 0:
                self._parts -= len(request.segments)
                request.parts -= len(request.segments)
                request.segments.clear()  # it goes to storage anew
            if self._room(request):
                request.segments.append((ref, iova, length))

    def _answered(self, record: Record) -> None:
        disk, index = record.values[:2]
        request = self._requests.pop((record.subject, disk, record.track, index), None)
        if request is None:
            return
        request.status, request.answered = record.values[2], record.time
        self._forget(request)
        self._out.append(request)

    # ------------------------------------------------------------------ the driver's command

    def _submit(self, record: Record) -> None:
        number, token, opcode, block, blocks, list_page = record.values
        request = self._by_token.get((record.subject, token))
        command = Command(record.subject, record.track, number, record.time, opcode, block, blocks, list_page)
        old = self._keep(self._commands, (record.subject, record.track, number), command)
        if old is not None:
            self._owners.pop(id(old), None)
        if request is not None and record.track != 0 and self._room(request):
            request.commands.append(command)
            self._owners[id(command)] = request

    def _prp(self, record: Record) -> None:
        number, _, address, length = record.values[:4]
        command = self._commands.get((record.subject, record.track, number))
        if command is None:
            return
        request = self._owners.get(id(command))
        if self._room(request) if request is not None else len(command.prps) < MAX_LONE_PARTS:
            command.prps.append((address, length))

    def _completed(self, record: Record) -> None:
        command = self._commands.pop((record.subject, record.track, record.values[0]), None)
        if command is not None:
            command.status = record.values[1]

    # ------------------------------------------------------------------ the device's DMA

    def _dma(self, record: Record) -> None:
        token, place, iova, length, machine, verdict = record.values
        device = record.subject
        key = (device, token, place)
        transfer = self._transfers.get(key)
        if transfer is None or not transfer.goes_on(iova):
            transfer = Transfer(device, record.time, iova, 0, bool(place & 1), key=key)
            self._keep(self._transfers, key, transfer)
            self._assign(transfer, self._claims.get(key))
        owner = None if verdict & 0xFFFF == NOBODY else verdict & 0xFFFF
        transfer.fault = verdict >> 16
        transfer.length += length
        if not transfer.fault:
            request = transfer.request
            if self._room(request) if request is not None else len(transfer.pieces) < MAX_LONE_PARTS:
                transfer.pieces.append((iova, length, machine, owner))
        elif self._request_of(transfer, self._claims.get(key)) is None:
            self._out.append(transfer)

    def _request_of(self, transfer: Transfer, claim: tuple[int, int, int] | None) -> Request | None:
        """Whose data it is: of the command that the device names, if that has such an address; else of one that has."""
        if claim is not None:
            queue, number, _ = claim
            command = self._commands.get((transfer.device, queue, number))
            if command is not None and command.names(transfer.iova):
                return self._owners.get(id(command))
        for command in reversed(self._commands.values()):
            if command.device == transfer.device and command.names(transfer.iova):
                return self._owners.get(id(command))
        return None

    def _assign(self, transfer: Transfer, claim: tuple[int, int, int] | None) -> None:
        transfer.purpose = claim[2] if claim is not None else Purpose.DATA
        if transfer.purpose in (Purpose.SUBMISSION, Purpose.COMPLETION):
            return  # the driver's queues: of many requests
        request = self._request_of(transfer, claim)
        if request is not None and self._room(request):
            request.transfers.append(transfer)
            transfer.request = request


# ---------------------------------------------------------------------- as text


def request_text(request: Request, names: dict[int, str]) -> str:
    """A request for people."""

    def who(domain: int | None) -> str:
        return f"d{domain} {names.get(domain, '')}".strip() if domain is not None else "Xen's own"

    operation = OPERATIONS.get(request.operation, f"operation {request.operation}")
    extent = f" {request.sectors} sectors at {request.sector}" if request.sectors else ""
    status = STATUSES.get(request.status or 0, str(request.status))
    spent = (request.answered - request.time) / 1000
    lines = [
        f"{who(request.domain)} {disk_name(request.disk)} ring {request.ring} request {request.index} "
        f"(id {request.id:#x}): {operation}{extent}; answered {status} after {spent:.0f} us"
    ]
    lines += [
        f"    grant     reference {ref:#x}, {length} bytes, mapped for the device at {iova:#x}"
        for ref, iova, length in request.segments
    ]
    for command in request.commands:
        where = f"{device_name(command.device)} queue {command.queue} command {command.number}"
        if not command.prps:
            lines.append(f"  1 driver    {where}: no data")
        lines += [
            f"  1 driver    {where}: PRP pseudophysical {address:#x}, {length} bytes"
            for address, length in command.prps
        ]
        if len(command.prps) > 2:
            lines.append(f"  1 driver    {where}: PRP list at {command.list_page:#x}")
    for transfer in request.transfers:
        lines += transfer_lines(transfer, who)
    if request.left_out:
        lines.append(f"    {request.left_out} more records of it were left out")
    return "\n".join(lines)


def loose_text(transfer: Transfer, names: dict[int, str]) -> str:
    """A fault that belongs to no request."""

    def who(domain: int | None) -> str:
        return f"d{domain} {names.get(domain, '')}".strip() if domain is not None else "Xen's own"

    return "\n".join(["DMA that is of no request:", *transfer_lines(transfer, who)])


def transfer_lines(transfer: Transfer, who: Any) -> list[str]:
    """Steps 2 and 3."""
    direction = "to memory" if transfer.write else "from memory"
    what = " (PRP list)" if transfer.purpose == Purpose.LIST else ""
    lines = [
        f"  2 device    {device_name(transfer.device)} asks for {transfer.length} bytes {direction}, "
        f"I/O virtual {transfer.iova:#x}{what}"
    ]
    if transfer.fault:
        why = FAULTS.get(transfer.fault, f"reason {transfer.fault:#x}")
        lines.append(f"  3 IOMMU     FAULT: {why}; no byte moved")
    lines += [
        f"  3 IOMMU     {iova:#x} -> machine {address:#x}, {length} bytes of {who(owner)}"
        for iova, length, address, owner in transfer.pieces
    ]
    return lines
