"""What the fuzzers do with bytes: a function a target. It raises if anything goes wrong: an exception that is not the documented one,
a broken invariant, a loop without end (libFuzzer's own timeout)."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgpack

from bus.abi import domctl, platform, sysctl
from bus.abi import grant_table as gt
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.hypercalls_model import Form
from bus.abi.io import xs_wire as xs
from bus.abi.xen import (
    HYPERVISOR_domctl,
    HYPERVISOR_grant_table_op,
    HYPERVISOR_platform_op,
    HYPERVISOR_sysctl,
)
from bus.messages.device import FROM_ANY_DOMAIN, FROM_DEVICE, TO_DEVICE
from bus.messages.domain import TO_DOMAIN
from bus.messages.envelope import BadMessage, decode, encode
from bus.zmtp import ProtocolError, ServerConnection
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.kernel import load_kernel
from domains.dom0.xenstore import dump
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.quota import Quota
from drivers.block.backend import Backend
from drivers.block.frontend import DiskError, Features, Frontend
from drivers.block.ledger import Ledger, LedgerError
from drivers.block.requests import Disk
from drivers.block.wire import X86_32, X86_64
from drivers.xenbus import wire
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.ring import ServerRing
from tests.fuzz.core_machine import WholeCore, ready
from tests.fuzz.net_targets import net_back, net_front
from tests.fuzz.parts import Bytes
from tests.unit.block.block_machine import FakeDisk, Grants, Trouble
from toolstack.errors import InputError
from toolstack.xlcfg.grammar import parse
from toolstack.xlcfg.model import understand

MESSAGES = (FROM_ANY_DOMAIN, FROM_DEVICE, TO_DOMAIN, TO_DEVICE)
COMMANDS = [(call.number, command) for call in HYPERCALLS.values() for command in call.commands]
VERSIONS = {
    HYPERVISOR_domctl: domctl.XEN_DOMCTL_INTERFACE_VERSION, HYPERVISOR_sysctl: sysctl.XEN_SYSCTL_INTERFACE_VERSION,
    HYPERVISOR_platform_op: platform.XENPF_INTERFACE_VERSION,
}  # fmt: skip


def _value(source: Bytes) -> object:
    """Anything that msgpack can say, small."""
    what = source.number()
    if what < 90:
        return source.number((1, 1, 2, 4, 8)[what % 5])
    if what < 110:
        return -source.number(1 + what % 4)
    if what < 150:
        return source.take(source.number() % 80)
    if what < 170:
        return source.take(what % 8).decode("latin1")
    if what < 190:
        return [_value(source) for _ in range(what % 5)] if source.left else []
    return (None, True, False, {}, {"a": 1}, 1.5)[what % 6]


def _made(source: Bytes) -> bytes:
    """An envelope of a kind that there is, with its fields, of which some are right."""
    kinds = MESSAGES[source.number() % len(MESSAGES)]
    names = sorted(kinds)
    model = kinds[names[source.number() % len(names)]]
    fields: dict[str, object] = {}
    for name in model.model_fields:
        skip = source.number()
        if skip < 240:
            fields[name] = _value(source)
        elif skip < 250:
            fields[name] = 1
    packed: bytes = msgpack.packb([1, model.KIND, fields])
    return packed


def messages(data: bytes) -> None:
    """A message as it comes from a link, of each side (bytes as they are, or shaped by the table of kinds); what validates is what is
    encoded again. What a domain may send goes to a core; and the bytes on the socket before that go to the ZMTP server."""
    if data[:1] == b"\xff":
        data = _made(Bytes(data[1:]))
    for kinds in MESSAGES:
        try:
            message = decode(data, kinds)
        except BadMessage:
            continue
        assert decode(encode(message), kinds) == message
        if kinds is FROM_ANY_DOMAIN:
            core = ready().new()
            core.take(2, message)
            core.check()
    connection = ServerConnection(b"\1" * 32, b"\2" * 32, 1 << 16)
    source = Bytes(data)
    try:
        while source.left:
            connection.receive(source.take(1 + source.number() % 100))
    except ProtocolError:
        pass
    assert not connection.ready


def hypercalls(data: bytes) -> None:
    """A row of calls by the domains, shaped by the table as far as the bytes go, with answers of processes that may be nonsense."""
    core = ready().new()
    run_calls(Bytes(data), core)


def run_calls(source: Bytes, core: WholeCore) -> None:
    """The same on a given core."""
    token = 10
    while source.left and token < 40:
        token += 1
        choice = source.number()
        if choice >= 250:
            core.advance((0.1, 2.0, 40.0)[choice % 3])
            continue
        if choice >= 244:
            kind = ("grant_map", "grant_unmap", "grant_attach", "grant_detach", "pause", "stop")[choice - 244]
            core.answer[kind] = (-(source.number() % 40), source.take(source.number() % 8))
            continue
        caller, vcpu = choice % 3, (0, 0, 0, 1)[choice >> 6]
        nr, command = COMMANDS[source.number(2) % len(COMMANDS)]
        size = command.argument.size if command.argument is not None else 0
        raw = bytearray(source.take(size))
        if nr in VERSIONS and size >= 8:
            raw[0:8] = command.number.to_bytes(4, "little") + VERSIONS[nr].to_bytes(4, "little")
        items = 1 + source.number() % 3 if command.form is Form.LIST else 1
        more = source.take(source.number()) if command.arrays else b""
        if caller == 0 and (HYPERCALLS[nr].name, command.number) in (("sched_op", 2), ("kexec_op", 0)):
            continue  # Dom0 ends the machine: it may
        core.call(caller, token, nr, command.number, bytes(raw) * items + more, vcpu)
    core.advance(70.0)
    core.check()


def ring_back(data: bytes) -> None:
    """A frontend that writes what it likes into its ring, its indexes and its indirect pages."""
    source = Bytes(data)
    abi = (X86_64, X86_32)[source.number() & 1]
    persistent = bool(source.number() & 1)
    grants = Grants()
    store = FakeDisk(1000, grants, random.Random(source.number()))
    ring = PagedRing([memoryview(bytearray(4096))], abi.slot)
    ring.init()
    ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, ring.size))))
    back = Backend(Disk(1000, discard=True), store, grants, ledger, abi=abi, persistent=persistent)
    back.connect([ring], [lambda: None], b"")
    pages = grants.allocate(4)
    refs = grants.grant(pages, False)
    produced = 0
    for _ in range(40):
        if not source.left:
            break
        what = source.number()
        if what < 160:
            raw = bytearray(source.take(abi.slot))
            # Operations and grant references that mean something, now and then.
            raw[0] %= 8
            if what & 1:
                raw[abi.slot // 8 : abi.slot // 8 + 1] = bytes([refs[what % 4] & 0xFF])
            ring.write_slot(produced, bytes(raw))
            produced += 1
            ring.push_requests(produced)
        elif what < 180:
            ring.req_prod = source.number(4)
        elif what < 200:
            page = pages[what % 4].data
            at = source.number(2) % 4000
            piece = source.take(16)
            page[at : at + len(piece)] = piece
        elif what < 230:
            back.poll()
        elif (result := store.step()) is not None:
            back.complete([result])
        assert len(back._active) <= ring.size
    back.poll()
    while True:
        try:
            result = store.step()
        except Trouble as trouble:
            raise AssertionError(f"the device was sent astray: {trouble}") from trouble
        if result is None:
            break
        back.complete([result])
    back.close()
    assert back.drained
    assert not grants.mapped


def ring_front(data: bytes) -> None:
    """A back end that writes what it likes into a frontend's ring."""
    source = Bytes(data)
    ring = PagedRing([memoryview(bytearray(4096))], 112)
    ring.init()
    grants = Grants()
    front = Frontend(grants)
    front.connect([ring], [lambda: None], Features(1000, flush=True))
    answered: list[int] = []
    asked = 0
    for _ in range(60):
        if not source.left:
            break
        what = source.number()
        try:
            if what < 60 and front.error is None:
                front.read(what, 1 + what % 16, lambda status, data: answered.append(status))
                asked += 1
            elif what < 90 and front.error is None:
                front.write(what, bytes(512), lambda status, data: answered.append(status))
                asked += 1
            elif what < 200:
                at = source.number()
                ring.write_slot(at, source.take(16))
                if what & 1:
                    ring.rsp_prod = at + 1
            elif what < 220:
                ring.rsp_prod = source.number(4)
            else:
                front.poll()
        except DiskError:
            continue
    front.poll()
    assert len(answered) <= asked
    front.disconnect()
    assert len(answered) <= asked


def ledger(data: bytes) -> None:
    """A ledger that a dead process left, of any bytes: recovered, or refused."""
    memory = bytearray(Ledger.bytes_needed(1, 32))
    book = Ledger(memoryview(memory))
    book.begin(1, 32, b"blob")
    source = Bytes(data)
    while source.left:
        at = source.number(2) % (len(memory) - 8)
        piece = source.take(1 + source.number() % 8)
        memory[at : at + len(piece)] = piece
    ring = PagedRing([memoryview(bytearray(4096))], 112)
    ring.init()
    try:
        again = Ledger(memoryview(memory))
        if again.reopen() is not None:
            for queue in again.queues:
                found = queue.recover(ring)
                assert len(found.redo) + len(found.answers) <= 32
    except LedgerError:
        pass


def xenstore(data: bytes) -> None:
    """Two guests and a privileged client that send any bytes, come and go; and a guest that rewrites its ring's indexes."""
    core = Core(Quota(nodes=12, watches=4, transactions=2, memory=20_000, outstanding=5, output=500))
    for conn in (0, 10):
        core.connect(ConnId(conn), 0)
    for domid in (1, 2):
        core.introduce(domid, ConnId(domid))
    core.receive(ConnId(10), wire.encode(xs.XS_WRITE, 0, 0, b"/local/domain/1\0"))
    core.receive(ConnId(10), wire.encode(xs.XS_SET_PERMS, 0, 0, b"/local/domain/1\0b1\0"))
    page = memoryview(bytearray(4096))
    ring = ServerRing(page)
    ring.connect()
    source, now = Bytes(data), 1
    for turn in range(60):
        if not source.left:
            break
        what = source.number()
        conn = ConnId((0, 1, 2, 10)[what & 3])
        if what < 180:
            kind, tx, length = source.number() % (xs.XS_TYPE_COUNT + 2), source.number() & 3, source.number()
            packet = wire.encode(kind, 7, tx, source.take(length))
            if core.input_room(conn) >= len(packet):
                core.receive(conn, packet)
        elif what < 200:
            raw = source.take(source.number() % 40)
            if core.input_room(conn) >= len(raw):
                core.receive(conn, raw)
        elif what < 210:
            core = dump.load(dump.dump(core))
        elif what < 220:
            now += 10**10
            core.tick(now)
            core.run()
        elif what < 230:
            for one in list(core.connections):
                core.output_taken(one, len(core.peek_output(one)))
            core.run()
        elif what < 240:
            page[2048 : 2048 + 32] = source.take(32)
            got = ring.read(source.number(2))
            assert len(got.data) <= 1024
            ring.write(source.take(source.number()))
        else:
            domid = 1 + (what & 1)
            if what % 3 == 0:
                core.domain_died(domid)
            elif what % 3 == 1:
                core.domain_shutdown(domid)
            else:
                core.introduce(domid, ConnId(domid))
        if turn % 8 == 7:
            assert core.store.check() == []
    assert core.store.check() == []
    for domid in (1, 2):
        core.domain_died(domid)
    assert {domid for domid, count in core.store.usage.nodes.items() if count and domid in (1, 2)} == set()


def one_line(error: Exception) -> None:
    """What a person is told is one line."""
    if "\n" in str(error):
        raise AssertionError(f"an error of several lines: {error}")


def elf(data: bytes) -> None:
    """A kernel file."""
    if len(data) > 4 and data[0] & 1:
        data = b"\x7fELF\2\1\1" + data[7:]
        if len(data) > 20 and data[9] & 1:
            data = data[:16] + b"\2\0\x3e\0" + data[20:]
    try:
        kernel = load_kernel(data, limit=1 << 20)
    except BuildError as error:
        one_line(error)
        return
    assert sum(len(segment.data) for segment in kernel.elf.segments) <= 1 << 20


def xlcfg(data: bytes) -> None:
    """A guest's configuration: understood, or refused in one line with its place."""
    text = data.decode("utf-8", "replace")
    try:
        understand(parse(text, "f.cfg"), "f.cfg")
    except InputError as error:
        one_line(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "messages": messages, "hypercalls": hypercalls, "ring-back": ring_back, "ring-front": ring_front, "ledger": ledger,
    "net-back": net_back, "net-front": net_front,
    "xenstore": xenstore, "elf": elf, "xlcfg": xlcfg,
}  # fmt: skip
INSTRUMENTED: dict[str, tuple[str, ...]] = {
    "messages": ("bus",), "hypercalls": ("hypervisor.core", "bus.abi"), "ring-back": ("drivers.block",), "ring-front": ("drivers.block",),
    "net-back": ("drivers.net",), "net-front": ("drivers.net",),
    "ledger": ("drivers.block",), "xenstore": ("domains.dom0.xenstore", "drivers.xenbus"), "elf": ("domains.dom0.builder", "elftools.elf"),
    "xlcfg": ("toolstack.xlcfg",),
}  # fmt: skip
"""Packages whose coverage guides it: ours, and what reads a file's fields; not the engines below (elftools.construct, lark), which cost
four fifths of the time and whose branches say little of the input."""


def seeds(name: str) -> list[bytes]:
    """Inputs that begin a corpus: real ones."""
    if name == "messages":
        from bus.messages.device import DeviceAccess
        from bus.messages.domain import Hello, Hypercall, OrderDone

        made = [
            Hello(pid=1, role="domu"), OrderDone(order=1, rc=0, data=b"\0\0"),
            Hypercall(token=1, vcpu=0, nr=HYPERVISOR_grant_table_op, cmd=gt.GNTTABOP_map_grant_ref, data=bytes(32)),
            DeviceAccess(token=1, bdf=8, space=0, offset=0, size=4, write=False, value=0),
        ]  # fmt: skip
        return [encode(one) for one in made] + [
            b"\xff" + bytes([0, kind, 0, 90, 0, 1, 0, 120, 8]) for kind in range(10)
        ]
    if name == "hypercalls":
        rows = []
        for index, (_, command) in enumerate(COMMANDS):
            size = command.argument.size if command.argument is not None else 0
            rows.append(bytes([index % 3]) + index.to_bytes(2, "little") + bytes(size) + b"\0\0")
        return rows
    if name == "xenstore":
        return [b"\x01\x0b\0\x12/local/domain/1/a\0", b"\x03\x04\0\x04/a\0t"]
    if name == "xlcfg":
        return [b'name="g"\nkernel="/k"\nmemory=64\ndisk=["/d,raw,xvda,w"]\nvcpus=2\n', b"a=[1,'b',[2]]\n"]
    if name == "elf":
        head = (
            b"\x7fELF\2\1\1"
            + bytes(9)
            + b"\2\0\x3e\0\1\0\0\0"
            + bytes(8)
            + (64).to_bytes(8, "little")
            + bytes(12)
        )
        return [
            (head + b"\x40\0\x38\0\1\0\x40\0\0\0\0\0").ljust(64, b"\0") + b"\1\0\0\0\5\0\0\0" + bytes(48),
            b"MZ" + bytes(600),
        ]
    return [bytes(64), bytes(range(200))]


__all__ = ["INSTRUMENTED", "TARGETS", "Bytes", "seeds"]
