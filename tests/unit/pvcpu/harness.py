"""A PV domain in one process: real vCPU, real memory management, and a fake hypervisor that is good enough for GRUB for Xen and
for Linux: event channels, grant table frames, memory map, a console and a xenstore that answer over their rings.

Run as a program: `python tests/unit/pvcpu/harness.py KERNEL [--ramdisk F] [--cmdline S] [--mem MB] [--timeout S] [--until TEXT]
[--wait TEXT --input TEXT] [--vcpus N]`.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import xen
from bus.abi.errno import XEN_EINVAL, XEN_ENOENT, XEN_ENOSYS
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.sched import SCHEDOP_shutdown
from bus.addresses import DomId, Mfn, Port, VcpuId
from domains.dom0.builder.kernel import load_kernel
from domains.dom0.builder.pv import PvBuildRequest, build_pv
from domains.pv.domain import DomainConfig, PvDomain
from domains.pv.frames import DomainFrames
from domains.pv.time import count_nanoseconds
from domains.pv.xenmap import XenMap
from domains.vcpu.api import PvTraps
from domains.vcpu.unicorn_vcpu import UnicornVcpu

PAGE = 4096
HEAP = 64
BASE = 0x1000
DOMAIN = DomId(1)
XENSTORE_PORT = 1
CONSOLE_PORT = 2
NANOSECOND = 1_000_000_000


class Ring:
    """The domain's memory with little helpers."""

    def __init__(self, octets: memoryview, offset: int) -> None:
        self.octets, self.offset = octets, offset

    def word(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self.octets, self.offset + at)[0]
        return value

    def set_word(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.octets, self.offset + at, value & 0xFFFFFFFF)


class FakeUpstream:
    """The hypervisor, xenstored and consoled in one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ports: dict[int, str] = {XENSTORE_PORT: "xenstore", CONSOLE_PORT: "console"}
        self.port_vcpu: dict[int, int] = {}
        self.console = bytearray()
        self.log: list[str] = []
        self.shutdown: int | None = None
        self.calls: dict[tuple[int, int], int] = {}
        self.store: dict[str, str] = {
            "domid": "1", "name": "probe", "vm": "/vm/1", "device": "", "control": "", "memory": "",
            "memory/target": str(machine.pages * 4), "console": "", "console/type": "xenconsoled",
            "console/limit": "1048576", "device/suspend": "", "control/shutdown": "",
            "control/platform-feature-multiprocessor-suspend": "1",
            **{f"cpu/{n}/availability": "online" for n in range(machine.vcpus)}, "cpu": "",
        }  # fmt: skip
        self._store_input = bytearray()
        self._grant_frames = 0

    # --- Upstream

    def hypercall(self, vcpu: int, nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        self.calls[(nr, cmd)] = self.calls.get((nr, cmd), 0) + 1
        if nr == xen.HYPERVISOR_event_channel_op:
            return self._events(cmd, data)
        if nr == xen.HYPERVISOR_memory_op:
            return self._memory(cmd, data)
        if nr == xen.HYPERVISOR_grant_table_op:
            return self._grants(cmd, data)
        if nr == xen.HYPERVISOR_sched_op and cmd == SCHEDOP_shutdown:
            self.shutdown = struct.unpack("<I", data)[0]
            return 0, b""
        if nr == xen.HYPERVISOR_vcpu_op:
            return 0, b""
        if nr == xen.HYPERVISOR_console_io:
            self.console += data[4:]
            return 0, b""
        return -XEN_ENOSYS, b""

    def send_event(self, port: Port) -> int:
        kind = self.ports.get(port)
        if kind is None:
            return -XEN_EINVAL
        if kind == "xenstore":
            self.machine.service_xenstore(self)
        elif kind == "console":
            self.machine.drain_console(self)
        return 0

    def console_line(self, text: str) -> None:
        self.log.append(text)

    # --- what the hypervisor does

    def _new(self, kind: str, vcpu: int = 0) -> int:
        port = max(self.ports) + 1
        self.ports[port] = kind
        self.port_vcpu[port] = vcpu
        return port

    def _events(self, cmd: int, data: bytes) -> tuple[int, bytes]:
        if cmd == ec.EVTCHNOP_bind_virq:
            virq = ec.EVTCHN_BIND_VIRQ.unpack(data)
            if virq.vcpu >= self.machine.vcpus:
                return -XEN_ENOENT, b""
            return 0, ec.EVTCHN_BIND_VIRQ.pack(virq._replace(port=self._new("virq", virq.vcpu)))
        if cmd == ec.EVTCHNOP_bind_ipi:
            ipi = ec.EVTCHN_BIND_IPI.unpack(data)
            return 0, ec.EVTCHN_BIND_IPI.pack(ipi._replace(port=self._new("ipi", ipi.vcpu)))
        if cmd == ec.EVTCHNOP_alloc_unbound:
            unbound = ec.EVTCHN_ALLOC_UNBOUND.unpack(data)
            return 0, ec.EVTCHN_ALLOC_UNBOUND.pack(unbound._replace(port=self._new("unbound")))
        if cmd == ec.EVTCHNOP_status:
            status = ec.EVTCHN_STATUS.unpack(data)
            kind = {"virq": 4, "ipi": 5, "unbound": 1, None: 0}.get(self.ports.get(status.port), 2)
            return 0, ec.EVTCHN_STATUS.pack(status._replace(status=kind))
        if cmd == ec.EVTCHNOP_close:
            port = ec.EVTCHN_CLOSE.unpack(data).port
            return (0, data) if self.ports.pop(port, None) else (-XEN_EINVAL, b"")
        if cmd == ec.EVTCHNOP_bind_vcpu:
            bound = ec.EVTCHN_BIND_VCPU.unpack(data)
            self.port_vcpu[bound.port] = bound.vcpu
            return 0, data
        if cmd == ec.EVTCHNOP_init_control and self.machine.fifo:
            control = ec.EVTCHN_INIT_CONTROL.unpack(data)
            return 0, ec.EVTCHN_INIT_CONTROL.pack(control._replace(link_bits=17))
        if cmd in (ec.EVTCHNOP_expand_array, ec.EVTCHNOP_set_priority) and self.machine.fifo:
            return 0, data
        return -XEN_ENOSYS, b""

    def _memory(self, cmd: int, data: bytes) -> tuple[int, bytes]:
        pages = self.machine.pages
        if cmd in (mem.XENMEM_current_reservation, mem.XENMEM_maximum_reservation, mem.XENMEM_maximum_gpfn):
            return pages, b""
        if cmd == mem.XENMEM_maximum_ram_page:
            return BASE + pages + HEAP, b""
        if cmd == mem.XENMEM_memory_map:
            item = mem.XEN_MEMORY_MAP.unpack(data)
            return 0, mem.XEN_MEMORY_MAP.pack(item._replace(nr_entries=1)) + struct.pack(
                "<QQI", 0, pages * PAGE, 1
            )
        if cmd == mem.XENMEM_decrease_reservation:
            return mem.XEN_MEMORY_RESERVATION.unpack(data).nr_extents, data
        return -XEN_ENOSYS, b""

    def _grants(self, cmd: int, data: bytes) -> tuple[int, bytes]:
        machine = self.machine
        if cmd == gt.GNTTABOP_query_size:
            item = gt.GNTTAB_QUERY_SIZE.unpack(data)
            return 0, gt.GNTTAB_QUERY_SIZE.pack(
                item._replace(nr_frames=max(self._grant_frames, 1), max_nr_frames=32, status=0)
            )
        if cmd == gt.GNTTABOP_set_version:
            wanted = gt.GNTTAB_SET_VERSION.unpack(data)
            return (0, data) if wanted.version == 1 else (-XEN_EINVAL, b"")
        if cmd == gt.GNTTABOP_get_version:
            return 0, gt.GNTTAB_GET_VERSION.pack(gt.GNTTAB_GET_VERSION.unpack(data)._replace(version=1))
        if cmd == gt.GNTTABOP_setup_table:
            setup = gt.GNTTAB_SETUP_TABLE.unpack(data)
            self._grant_frames = max(self._grant_frames, setup.nr_frames)
            frames = [machine.heap + 1 + i for i in range(setup.nr_frames)]
            return 0, gt.GNTTAB_SETUP_TABLE.pack(setup._replace(status=0)) + struct.pack(
                f"<{len(frames)}Q", *frames
            )
        return -XEN_ENOSYS, b""


class Machine:
    """Memory, domain and fake upstream of one PV guest."""

    def __init__(
        self, mem_mb: int = 64, vcpus: int = 1, *, fifo: bool = False, clock: Callable[[], int] | None = None
    ) -> None:
        self.pages = mem_mb * 256
        self.vcpus = vcpus
        self.fifo = fifo
        count = self.pages + HEAP
        self.memory = mmap.mmap(-1, count * PAGE)
        self.heap = BASE + self.pages
        self.frames = DomainFrames(
            memoryview(self.memory),
            BASE,
            self.pages,
            populated=range(BASE, BASE + self.pages),
            shared=[self.heap],
        )
        self.xenmap = XenMap(BASE, count, BASE + count - 1, vcpus)
        self.upstream = FakeUpstream(self)
        self.console_ring: Ring | None = None
        self.store_ring: Ring | None = None
        self.input = bytearray()
        self._clock = clock
        self.domain = PvDomain(
            DomainConfig(DOMAIN, Mfn(self.heap), BASE + count - 1, vcpus),
            self.frames,
            self.xenmap,
            self._make_vcpu,
            self.upstream,
            HYPERCALLS,
            wall=time.time_ns,
            clock=clock,
        )

    def _make_vcpu(self, traps: PvTraps) -> UnicornVcpu:
        vcpu = UnicornVcpu(traps)
        for base, memory in ((BASE, self.memory), (self.xenmap.private.base, self.xenmap.private.memory)):
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            vcpu.map(base << 12, address, len(memory))  # type: ignore[arg-type]  # a plain int is a machine address here
        if self._clock is None:
            count_nanoseconds(vcpu, time.monotonic_ns, NANOSECOND)
        return vcpu

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        """The builder's way into memory."""
        at = pfn * PAGE + offset
        self.frames.octets[at : at + len(data)] = data

    def load(self, kernel: bytes, cmdline: bytes = b"", ramdisk: bytes = b"") -> None:
        """Build the guest and start vCPU 0."""
        built = build_pv(
            PvBuildRequest(
                load_kernel(kernel),
                range(BASE, BASE + self.pages),
                Mfn(self.heap),
                Port(XENSTORE_PORT),
                Port(CONSOLE_PORT),
                ramdisk,
                cmdline,
            ),
            self,
        )
        self.console_ring = Ring(self.frames.octets, built.console * PAGE)
        self.store_ring = Ring(self.frames.octets, built.xenstore * PAGE)
        self.domain.mmu.set_m2p(BASE, range(self.pages))
        for port in (XENSTORE_PORT, CONSOLE_PORT):
            self.domain.events.bind(port, 0)
        context = built.context
        rc = self.domain.start_flat(context.rip, context.rsp, context.rsi, context.cr3)
        if rc:
            raise RuntimeError(f"start: {rc}")
        self.domain.unpause()

    # --- consoled and xenstored

    def raise_event(self, port: int) -> None:
        self.domain.deliver(Port(port), VcpuId(self.upstream.port_vcpu.get(port, 0)))

    def drain_console(self, upstream: FakeUpstream) -> None:
        ring = self.console_ring
        assert ring is not None
        cons, prod = ring.word(3080), ring.word(3084)
        if cons == prod:
            return
        while cons != prod:
            byte = self.frames.octets[ring.offset + 1024 + (cons & 2047)]
            upstream.console.append(byte)
            cons = cons + 1 & 0xFFFFFFFF
        ring.set_word(3080, cons)
        self.raise_event(CONSOLE_PORT)

    def feed_console(self) -> None:
        ring = self.console_ring
        if not self.input or ring is None:
            return
        cons, prod = ring.word(3072), ring.word(3076)
        sent = False
        while self.input and (prod - cons & 0xFFFFFFFF) < 1024:
            self.frames.octets[ring.offset + (prod & 1023)] = self.input.pop(0)
            prod = prod + 1 & 0xFFFFFFFF
            sent = True
        ring.set_word(3076, prod)
        if sent:
            self.raise_event(CONSOLE_PORT)

    def service_xenstore(self, upstream: FakeUpstream) -> None:
        ring = self.store_ring
        assert ring is not None
        cons, prod = ring.word(2048), ring.word(2052)
        moved = cons != prod
        pending = upstream._store_input
        while cons != prod:
            pending.append(self.frames.octets[ring.offset + (cons & 1023)])
            cons = cons + 1 & 0xFFFFFFFF
        ring.set_word(2048, cons)
        while len(pending) >= 16:
            kind, request, transaction, length = struct.unpack_from("<IIII", pending)
            if len(pending) < 16 + length:
                break
            body = bytes(pending[16 : 16 + length])
            del pending[: 16 + length]
            self._answer(ring, upstream.store, kind, request, transaction, body)
        if moved:
            self.raise_event(XENSTORE_PORT)

    def _answer(
        self, ring: Ring, store: dict[str, str], kind: int, request: int, transaction: int, body: bytes
    ) -> None:
        path = body.split(b"\0")[0].decode("latin1")
        name = path.removeprefix("/local/domain/1/")
        extra: list[tuple[int, int, int, bytes]] = []
        reply: bytes | None = b"OK\0"
        if kind == 2:
            reply = store[name].encode() if name in store else None
        elif kind == 1:
            prefix = name.rstrip("/") + "/"
            children = sorted({key[len(prefix) :].split("/")[0] for key in store if key.startswith(prefix)})
            known = children or name in store
            reply = b"".join(child.encode() + b"\0" for child in children) if known else None
        elif kind == 11:
            store[name] = body.split(b"\0", 1)[1].decode("latin1")
        elif kind == 12:
            store.setdefault(name, "")
        elif kind == 13:
            store.pop(name, None)
        elif kind == 4:
            token = body.split(b"\0")[1]
            extra.append((15, 0, 0, path.encode() + b"\0" + token + b"\0"))
        elif kind == 6:
            reply = b"7\0"
        elif kind == 3:
            reply = b"n1\0"
        elif kind == 10:
            reply = b"/local/domain/" + path.encode() + b"\0"
        elif kind not in (5, 7, 14, 21):
            reply = None
        if reply is None:
            kind, reply = 16, b"ENOENT\0"
        for entry in [(kind, request, transaction, reply), *extra]:
            message = struct.pack("<IIII", *entry[:3], len(entry[3])) + entry[3]
            prod = ring.word(2060)
            for i, byte in enumerate(message):
                self.frames.octets[ring.offset + 1024 + (prod + i & 1023)] = byte
            ring.set_word(2060, prod + len(message))

    # --- running

    def run(
        self, *, seconds: float, until: bytes = b"", wait: bytes = b"", text: bytes = b"", echo: bool = False
    ) -> str:
        """Run until `until` is on the console, the domain ends, or the time is over. `text` is typed once `wait` was seen."""
        end = time.monotonic() + seconds
        shown = 0
        console = self.upstream.console
        domain = self.domain
        while time.monotonic() < end:
            step = domain.run_slice()
            if echo and len(console) > shown:
                sys.stdout.write(console[shown:].decode("latin1"))
                sys.stdout.flush()
                shown = len(console)
            if domain.finished:
                return "finished"
            if text and wait in console:
                self.input += text
                text = b""
            if self.input:
                self.feed_console()
            if until and until in console and not text:
                return "until"
            if not step.runnable and not any(state.runnable for state in domain.states):
                now = domain.time.now()
                pause = 0.002 if step.deadline is None else min(max((step.deadline - now) / 1e9, 0), 0.01)
                time.sleep(pause)
        return "timeout"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel")
    parser.add_argument("--ramdisk")
    parser.add_argument("--cmdline", default="")
    parser.add_argument("--mem", type=int, default=64)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=20)
    parser.add_argument("--until", default="")
    parser.add_argument("--wait", default="")
    parser.add_argument("--input", default="")
    parser.add_argument("--fifo", action="store_true")
    args = parser.parse_args()
    machine = Machine(args.mem, args.vcpus, fifo=args.fifo)
    ramdisk = Path(args.ramdisk).read_bytes() if args.ramdisk else b""
    began = time.monotonic()
    machine.load(Path(args.kernel).read_bytes(), args.cmdline.encode(), ramdisk)
    loaded = time.monotonic()
    text = args.input.encode().decode("unicode_escape").encode()
    how = machine.run(
        seconds=args.timeout, until=args.until.encode(), wait=args.wait.encode(), text=text, echo=True
    )
    print(
        f"\n[{how}; build {loaded - began:.2f} s, run {time.monotonic() - loaded:.2f} s; shutdown {machine.upstream.shutdown}]"
    )
    if machine.domain.crash_text:
        print(machine.domain.crash_text)
    elif how == "timeout":
        from domains.pv.dump import register_dump

        print(register_dump(machine.domain.cpu))
    names = {number: entry.name for number, entry in HYPERCALLS.items()}
    counts = machine.domain.calls.counts
    print("hypercalls", {names.get(n, n): c for n, c in enumerate(counts) if c})
    print("upstream", {(names.get(n, n), c): k for (n, c), k in machine.upstream.calls.items()})
    print("traps", {n: c for n, c in enumerate(machine.domain.traps.exceptions) if c})


if __name__ == "__main__":
    main()
