"""From records to a timeline that opens in Perfetto: the Trace Event Format in JSON (ui.perfetto.dev, chrome://tracing).

Processes are those of the machine. A domain has a thread for each vCPU, with what it ran and its hypercalls inside; the driver
domain one for each disk; the hypervisor one for each physical CPU (leases), and for hypercalls, events, grants and the IOMMU; a device one for
each queue. A request of a frontend is a span of the driver domain, and a flow: from the notification by the frontend through DomIO's driver, the
device's command and the IOMMU back to the answer and the event that tells it.

Times are microseconds since the watching began, with fractions. Slices of one thread nest: what happens at one moment is a slice
of one nanosecond, so that flows have something to hold on to. Memory is bounded: events are written as they come.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any, Final

from bus.abi import xen
from bus.trace import NOBODY, Kind, Purpose, Record
from toolstack.trace.names import FAULTS, OPERATIONS, STATUSES, device_name, disk_name, hypercall_name
from toolstack.trace.session import DEVICE, HYPERVISOR, Entry, Peer

MAX_EVENTS: Final = 5_000_000
"""Of one file: about a gigabyte. More are counted, not written."""
MAX_OPEN: Final = 8192
"""Requests under way that are kept in mind."""
MAX_COMMANDS: Final = 256
"""Of one request; a device's command has at least a page of it."""
MOMENT_US: Final = 0.001
FLOW_WINDOW_NS: Final = 1_000_000_000
"""A notification longer ago than this did not bring the request."""
XEN_PID: Final = 1
XEN_CALLS, XEN_EVENTS, XEN_GRANTS, XEN_IOMMU, XEN_CPUS = 1, 2, 3, 4, 10
MEDIA_TID: Final = 1000
DISK_TID: Final = 2000
MEDIA: Final = ("read", "write", "write zeroes", "discard", "flush", "compare")
OPCODES: Final = {0: "FLUSH", 1: "WRITE", 2: "READ", 5: "COMPARE", 8: "WRITE ZEROES", 9: "DATASET MANAGEMENT"}


@dataclass(slots=True)
class _Request:
    flow: int
    pid: int
    tid: int
    name: str
    port: tuple[int, int] | None = None
    commands: list[tuple[int, int, int]] = field(default_factory=list)
    last: int = 0
    where: tuple[int, int] = (0, 0)
    """Time and thread of the flow's last step."""


class Timeline:
    """Writes one file."""

    def __init__(self, out: IO[str], began: int, names: dict[int, str]) -> None:
        """`began`: CLOCK_MONOTONIC ns of time 0. `names` of domains may grow meanwhile."""
        self._out = out
        self._began = began
        self._names = names
        self._first = True
        self.events = 0
        self.left_out = 0
        self._latest = began
        self._flows = itertools.count(1)
        self._pids: dict[int, str] = {}
        self._tids: dict[tuple[int, int], str] = {}
        self._requests: OrderedDict[tuple[int, int, int, int], _Request] = OrderedDict()
        self._by_token: OrderedDict[tuple[int, int], _Request] = OrderedDict()
        self._commands: OrderedDict[tuple[int, int, int], _Request] = OrderedDict()
        self._spans: OrderedDict[tuple[int, int, int], str] = OrderedDict()
        self._claims: OrderedDict[tuple[int, int, int], tuple[int, int, int]] = OrderedDict()
        self._ports: OrderedDict[tuple[int, int, int], tuple[int, int]] = OrderedDict()
        self._sent: OrderedDict[tuple[int, int], tuple[int, int, int]] = OrderedDict()
        self._waiting = 0
        """Requests in `_answers`."""
        self._answers: OrderedDict[tuple[int, int], list[_Request]] = OrderedDict()
        self._leases: dict[int, tuple[int, int]] = {}
        out.write('{"displayTimeUnit":"ns","traceEvents":[\n')

    @staticmethod
    def _keep(table: OrderedDict[Any, Any], key: Any, value: Any) -> tuple[Any, Any] | None:
        """Put in; the key and value that fell out for it: writers choose the keys, and may choose new ones without end."""
        table[key] = value
        table.move_to_end(key)
        return table.popitem(last=False) if len(table) > MAX_OPEN else None

    # ------------------------------------------------------------------ events of the format

    def _us(self, time: int) -> float:
        return (time - self._began) / 1000

    def _write(self, event: dict[str, Any]) -> None:
        if self.events >= MAX_EVENTS and event["ph"] != "M":
            self.left_out += 1
            return
        self.events += 1
        self._out.write(("" if self._first else ",\n") + json.dumps(event, separators=(",", ":")))
        self._first = False

    def _slice(self, pid: int, tid: int, time: int, name: str, us: float = MOMENT_US, **args: Any) -> None:
        event = {"ph": "X", "pid": pid, "tid": tid, "ts": self._us(time), "dur": us, "name": name}
        self._write({**event, "args": args} if args else event)

    def _span(
        self, phase: str, pid: int, category: str, ident: int | str, time: int, name: str, **args: Any
    ) -> None:
        """The beginning (b) or end (e) of what may overlap with others."""
        event = {"ph": phase, "pid": pid, "tid": 0, "cat": category, "id": str(ident), "ts": self._us(time)}
        self._write({**event, "name": name, "args": args})

    def _flow(self, phase: str, request: _Request, pid: int, tid: int, time: int) -> None:
        """A step (s start, t through, f end) of a request's flow, in the slice that is there at that time."""
        event = {"ph": phase, "pid": pid, "tid": tid, "ts": self._us(time), "id": request.flow}
        self._write({**event, "cat": "request", "name": request.name, "bp": "e"})
        request.last, request.where = time, (pid, tid)

    def _name(self, pid: int, name: str, tid: int | None = None, thread: str = "", order: int = 0) -> None:
        if self._pids.get(pid) != name:
            self._pids[pid] = name
            self._meta("process_name", pid, 0, {"name": name})
            self._meta("process_sort_index", pid, 0, {"sort_index": pid})
        if tid is None or (len(self._tids) >= MAX_OPEN and (pid, tid) not in self._tids):
            return  # more threads than a machine has: without names
        if self._tids.get((pid, tid)) != thread:
            self._tids[pid, tid] = thread
            self._meta("thread_name", pid, tid, {"name": thread})
            self._meta("thread_sort_index", pid, tid, {"sort_index": tid})

    def _meta(self, name: str, pid: int, tid: int, args: dict[str, Any]) -> None:
        self._write({"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": name, "args": args})

    # ------------------------------------------------------------------ who is who

    def _domain(self, domain: int) -> str:
        return f"d{domain} {self._names.get(domain, '')}".strip()

    @staticmethod
    def _domain_pid(domain: int) -> int:
        return 10 + domain

    @staticmethod
    def _device_pid(bdf: int) -> int:
        return 100_000 + bdf

    def _thread(self, peer: Peer, tid: int, thread: str) -> tuple[int, int]:
        """pid and tid of a writer's thread, named."""
        if peer.number == HYPERVISOR:
            pid, name = XEN_PID, "hypervisor"
        elif peer.bdf is not None:
            pid, name = self._device_pid(peer.bdf), f"NVMe {device_name(peer.bdf)} ({peer.name})"
        else:
            pid, name = self._domain_pid(peer.number), self._domain(peer.number)
        self._name(pid, name, tid, thread)
        return pid, tid

    def _xen(self, tid: int, thread: str) -> tuple[int, int]:
        self._name(XEN_PID, "hypervisor", tid, thread)
        return XEN_PID, tid

    # ------------------------------------------------------------------ records in

    def feed(self, entries: Iterable[Entry]) -> None:
        """Records in order of time."""
        for peer, record in entries:
            self._latest = record.time
            if peer.number == HYPERVISOR:
                self._of_hypervisor(peer, record)
            elif peer.number & DEVICE:
                self._of_device(peer, record)
            else:
                self._of_domain(peer, record)

    def close(self) -> None:
        """End what is open, and the file."""
        for key in list(self._answers):
            self._received(key, None, 0)
        for cpu in list(self._leases):
            self._end_lease(cpu, max(self._latest, self._leases[cpu][1]))
        for request in self._requests.values():
            self._end(request, self._latest, "open")
        for bdf, queue, command in list(self._spans):
            self._end_command(bdf, queue, command, self._latest)
        self._out.write("\n]}\n")

    # -- the hypervisor

    def _of_hypervisor(self, peer: Peer, record: Record) -> None:
        time, kind, track, subject, values = record
        if kind == Kind.HYPERCALL:
            pid, tid = self._xen(XEN_CALLS, "hypercalls")
            number, command, spent = values[:3]
            name = hypercall_name(number, command)
            self._slice(
                pid, tid, time, name, max(spent / 1000, MOMENT_US), domain=self._domain(subject), vcpu=track
            )
        elif kind == Kind.EVENT:
            pid, tid = self._xen(XEN_EVENTS, "event channels")
            self._slice(pid, tid, time, f"d{subject} port {values[0]}", vcpu=track)
        elif kind == Kind.GRANT:
            self._grant(record)
        elif kind == Kind.INTERRUPT:
            pid, tid = self._xen(XEN_IOMMU, "IOMMU")
            name = f"interrupt {values[0]} of {device_name(subject)}"
            self._slice(pid, tid, time, name, domain=self._domain(values[1]), pirq=values[2])
        elif kind == Kind.LEASE:
            self._lease(record)
        elif kind == Kind.DMA:
            self._dma(record)

    def _grant(self, record: Record) -> None:
        pid, tid = self._xen(XEN_GRANTS, "grants")
        operation, ref, handle, address, status = record.values[:5]
        signed = status - (1 << 64) if status >> 63 else status
        args: dict[str, Any] = {"handle": handle, "address": hex(address), "status": signed}
        if record.track != NOBODY:
            name = f"map d{record.track} ref {ref:#x}" if operation == 0 else f"operation {operation}"
        else:
            name = "unmap"
        self._slice(pid, tid, record.time, name, mapper=self._domain(record.subject), **args)

    def _lease(self, record: Record) -> None:
        """A CPU's lease goes from domain to domain; each is a slice when it ends."""
        cpu, time, domain = record.track, record.time, record.subject
        holder = self._leases.get(cpu)
        granted = bool(record.values[0])
        if holder is not None and (not granted or holder[0] != domain):
            self._end_lease(cpu, time)
        if granted and cpu not in self._leases:
            self._leases[cpu] = (domain, time)

    def _end_lease(self, cpu: int, time: int) -> None:
        domain, since = self._leases.pop(cpu)
        pid, tid = self._xen(XEN_CPUS + cpu, f"CPU {cpu} leases")
        self._slice(pid, tid, since, self._domain(domain), max((time - since) / 1000, MOMENT_US))

    def _dma(self, record: Record) -> None:
        pid, tid = self._xen(XEN_IOMMU, "IOMMU")
        token, place, iova, length, machine, verdict = record.values
        device = record.subject
        if verdict >> 16:
            name = f"FAULT {FAULTS.get(verdict >> 16, hex(verdict >> 16))}"
            self._slice(
                pid, tid, record.time, name, device=device_name(device), iova=hex(iova), length=length
            )
            return
        direction = "to memory" if place & 1 else "from memory"
        claim = self._claims.get((device, token, place))
        purpose = Purpose(claim[2]).name.lower() if claim is not None and claim[2] <= max(Purpose) else "?"
        owner = None if verdict == NOBODY else self._domain(verdict)
        args: dict[str, Any] = {
            "device": device_name(device),
            "iova": hex(iova),
            "machine": hex(machine),
            "frame_of": owner,
        }
        self._slice(pid, tid, record.time, f"{length} bytes {direction}", purpose=purpose, **args)
        if claim is not None and claim[2] == Purpose.DATA:
            request = self._commands.get((device, claim[0], claim[1]))
            if request is not None:
                self._flow("t", request, pid, tid, record.time)

    # -- a device

    def _of_device(self, peer: Peer, record: Record) -> None:
        time, kind, track, _, values = record
        bdf = peer.bdf or 0
        if kind == Kind.REQUEST:
            token, place, _, _, command, purpose = values
            self._keep(self._claims, (bdf, token, place), (track, command, purpose))
        elif kind == Kind.FETCHED:
            pid, tid = self._thread(peer, track, f"queue {track}" if track else "admin queue")
            command, opcode, prp1, prp2, block, blocks = values
            name = OPCODES.get(opcode, f"opcode {opcode:#x}") if track else f"admin {opcode:#x}"
            args: dict[str, Any] = {
                "command": command,
                "prp1": hex(prp1),
                "prp2": hex(prp2),
                "block": block,
                "blocks": blocks,
            }
            self._slice(pid, tid, time, f"fetched {name}", **args)
            self._end_command(bdf, track, command, time)
            if len(self._spans) >= MAX_OPEN:
                self._end_command(*next(iter(self._spans)), time)
            self._spans[bdf, track, command] = name
            self._span("b", pid, "command", f"{bdf:x}.{track}.{command}", time, name, **args)
            request = self._commands.get((bdf, track, command))
            if request is not None:
                self._flow("t", request, pid, tid, time)
        elif kind == Kind.POSTED:
            pid, tid = self._thread(peer, track, f"queue {track}" if track else "admin queue")
            self._slice(pid, tid, time, "posted", command=values[0], status=values[1])
            self._end_command(bdf, track, values[0], time)
        elif kind == Kind.MEDIUM:
            pid, tid = self._thread(peer, MEDIA_TID + track, f"medium {track}")
            operation, offset, length, spent = values[:4]
            name = MEDIA[operation] if operation < len(MEDIA) else str(operation)
            self._slice(pid, tid, time, name, max(spent / 1000, MOMENT_US), offset=offset, length=length)

    def _end_command(self, bdf: int, queue: int, command: int, time: int) -> None:
        known = self._spans.pop((bdf, queue, command), None)
        if known is not None:
            self._span("e", self._device_pid(bdf), "command", f"{bdf:x}.{queue}.{command}", time, known)

    # -- a domain

    def _of_domain(self, peer: Peer, record: Record) -> None:
        time, kind, track, _, values = record
        if kind in (Kind.RUN, Kind.CALL, Kind.SEND, Kind.RECEIVE):
            thread = f"vCPU {track}" if peer.role == "domu" else "program"
            pid, tid = self._thread(peer, 1 + track, thread)
            if kind == Kind.RUN:
                self._slice(pid, tid, time, "run", max(values[0] / 1000, MOMENT_US))
            elif kind == Kind.CALL:
                number, argument, spent, result = values[:4]
                native = peer.role != "domu"
                name = hypercall_name(number, argument if native or number in _COMMANDS else None)
                signed = result - (1 << 64) if result >> 63 else result
                args: dict[str, Any] = {"argument": hex(argument), "result": signed}
                self._slice(pid, tid, time, name, max(spent / 1000, MOMENT_US), **args)
            elif kind == Kind.SEND:
                self._slice(pid, tid, time, f"notify port {values[0]}")
                self._keep(self._sent, (peer.number, values[0]), (time, pid, tid))
            else:
                self._slice(pid, tid, time, f"event port {values[0]}")
                self._received((peer.number, values[0]), (pid, tid), time)
        else:
            self._of_backend(peer, record)

    def _of_backend(self, peer: Peer, record: Record) -> None:
        time, kind, track, subject, values = record
        if kind == Kind.KICKED:
            disk, remote = values[:2]
            self._keep(self._ports, (subject, disk, track), (subject, remote))
        elif kind == Kind.TAKEN:
            self._taken(peer, record)
        elif kind == Kind.COMMAND:
            disk, index, token, device = values[:4]
            request = self._requests.get((subject, disk, track, index))
            if request is not None:
                self._keep(self._by_token, (device, token), request)
        elif kind == Kind.SUBMIT:
            request = self._by_token.get((subject, values[1])) if track else None
            if request is not None:
                self._keep(self._commands, (subject, track, values[0]), request)
                if len(request.commands) < MAX_COMMANDS:
                    request.commands.append((subject, track, values[0]))
                self._slice(
                    request.pid, request.tid, time, f"submit {request.name}", command=values[0], queue=track
                )
                self._flow("t", request, request.pid, request.tid, time)
        elif kind == Kind.ANSWERED:
            self._answered(record)

    def _taken(self, peer: Peer, record: Record) -> None:
        disk, index, ident, operation, sector, sectors = record.values
        domain, ring, time = record.subject, record.track, record.time
        label = f"{disk_name(disk)} of {self._domain(domain)} ring {ring}"
        pid, tid = self._thread(
            peer, DISK_TID + (domain & 0xFFF) * 64 + (disk >> 4 & 15) * 4 + ring % 4, label
        )
        name = f"{OPERATIONS.get(operation, operation)} {sectors} at {sector}"
        request = _Request(next(self._flows), pid, tid, name)
        self._slice(pid, tid, time, f"taken {name}", id=ident, index=index)
        self._span("b", pid, "request", request.flow, time, name, disk=label, index=index)
        request.port = self._ports.get((domain, disk, ring))
        sent = self._sent.get(request.port) if request.port is not None else None
        if sent is not None and 0 <= time - sent[0] < FLOW_WINDOW_NS:
            self._flow("s", request, sent[1], sent[2], sent[0])
            self._flow("t", request, pid, tid, time)
        else:  # it was found without a notification
            self._flow("s", request, pid, tid, time)
        old = self._requests.pop((domain, disk, ring, index), None)
        if old is None and len(self._requests) >= MAX_OPEN:
            old = self._requests.popitem(last=False)[1]
        if old is not None:
            self._end(old, time, "not seen")
        self._requests[domain, disk, ring, index] = request

    def _end(self, request: _Request, time: int, status: str) -> None:
        """Its answer is not seen."""
        self._span("e", request.pid, "request", request.flow, time, request.name, status=status)
        self._flow("f", request, *request.where, request.last)

    def _answered(self, record: Record) -> None:
        disk, index, status = record.values[:3]
        request = self._requests.pop((record.subject, disk, record.track, index), None)
        if request is None:
            return
        told = STATUSES.get(status, str(status))
        self._slice(request.pid, request.tid, record.time, f"answer {request.name}", status=told)
        self._span("e", request.pid, "request", request.flow, record.time, request.name, status=told)
        for key in request.commands:
            if self._commands.get(key) is request:
                del self._commands[key]
        self._flow("t", request, request.pid, request.tid, record.time)
        if request.port is None:
            self._flow("f", request, request.pid, request.tid, record.time)
            return
        self._answers.setdefault(request.port, []).append(request)
        self._waiting += 1
        if self._waiting > MAX_OPEN:
            self._received(next(iter(self._answers)), None, 0)

    def _received(self, port: tuple[int, int], where: tuple[int, int] | None, time: int) -> None:
        """The frontend is told: flows of what was answered end there (or, with nobody told, where they were)."""
        told = self._answers.pop(port, [])
        self._waiting -= len(told)
        for request in told:
            if where is not None:
                self._flow("f", request, *where, time)
            else:
                self._flow("f", request, *request.where, request.last)


_COMMANDS: Final = frozenset(
    {
        xen.HYPERVISOR_memory_op,
        xen.HYPERVISOR_xen_version,
        xen.HYPERVISOR_console_io,
        xen.HYPERVISOR_grant_table_op,
        xen.HYPERVISOR_vcpu_op,
        xen.HYPERVISOR_sched_op,
        xen.HYPERVISOR_event_channel_op,
        xen.HYPERVISOR_physdev_op,
        xen.HYPERVISOR_hvm_op,
    }
)
"""Hypercalls whose first argument is a command."""
