"""Classes of Xen security advisories, each with a test of the product: here, or (as `NAMED`) where it has long been.

`docs/faults.md` has the table; a test below compares it with this file, and that every test that it names exists."""

from __future__ import annotations

import ast
import random
import re
import socket
from pathlib import Path

import pytest

from bus.abi import event_channel as ec
from bus.abi.grant_table import GNTMAP_device_map
from bus.abi.io.xs_wire import XENSTORE_DOMAIN_INTERFACE, XENSTORE_RING_SIZE
from bus.abi.xen import DOMID_SELF, HYPERVISOR_event_channel_op
from bus.addresses import PAGE_SIZE, DomId, Mfn
from bus.credentials import make
from drivers.block.backend import Backend
from drivers.block.ledger import Ledger
from drivers.block.requests import Disk
from drivers.block.wire import X86_64, pack_indirect, pack_request
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.ring import ServerRing
from hypervisor.core.iommu import DmaFault, Iommu, Segment
from hypervisor.core.pool import XenPool
from hypervisor.shell.peers import Peer, _Raised
from tests.unit.block.block_machine import FakeDisk, Grants
from tests.unit.grants.grants_world import HOST, World
from tests.unit.hvcore.hvcore_machine import Machine

ROOT = Path(__file__).parents[2]


class _Once:
    """Memory that a malicious other end rewrites as soon as it was read: each byte is what it is the first time, and then garbage."""

    def __init__(self, ring: PagedRing) -> None:
        self.ring = ring
        self.reads = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = self.ring.read_slots

        def read_slots(index: int, count: int) -> bytes:
            data = plain(index, count)
            self.reads += 1
            for at in range(count):
                self.ring.write_slot(index + at, b"\xff" * self.ring.entry_size)
            return data

        monkeypatch.setattr(self.ring, "read_slots", read_slots)


def test_a_request_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """XSA-155: backends that fetched a request twice checked one and carried out another. Every slot is garbage from its first read on,
    and so is the page of an indirect request: what is carried out is what was checked."""
    grants, ring = Grants(), PagedRing([memoryview(bytearray(PAGE_SIZE))], X86_64.slot)
    ring.init()
    ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, ring.size))))
    store = FakeDisk(1000, grants, random.Random(0))
    back = Backend(Disk(1000), store, grants, ledger, abi=X86_64)
    back.connect([ring], [lambda: None], b"")
    once = _Once(ring)
    once.watch(monkeypatch)
    refs = grants.grant(grants.allocate(4), False)
    ring.write_slot(0, pack_request(X86_64, 1, 1, 8, [(refs[0], 0, 7)]))
    ring.write_slot(1, pack_request(X86_64, 0, 2, 16, [(refs[1], 0, 3)]))
    ring.push_requests(2)
    back.poll()
    assert once.reads == 1
    assert [(command.sector, command.sectors) for command in store.queue] == [(8, 8), (16, 4)]
    assert back.error is None
    # The segments of an indirect request are copied with the request, and never looked at in the guest's page again.
    read = grants.read_frames
    monkeypatch.setattr(
        grants, "read_frames", lambda items: pytest.fail("read again") if store.queue[2:] else read(items)
    )
    ring.write_slot(2, pack_indirect(X86_64, 1, 3, 24, 1, [refs[2]]))
    ring.push_requests(3)
    back.poll()
    assert once.reads == 2


def test_indexes_of_a_xenstore_ring_are_fetched_once() -> None:
    """XSA-155 (its class) on xenstored's ring: the producer index is copied, checked, and the copy used. The index jumps between two
    reads of the word; no more bytes than the ring has are taken."""
    page = memoryview(bytearray(PAGE_SIZE))
    ring = ServerRing(page)
    word = XENSTORE_DOMAIN_INTERFACE.offset("req_prod") // 4

    class Jumping:
        """The words of the page, whose req_prod is another each time."""

        def __init__(self, words: memoryview) -> None:
            self.words, self.values = words, iter([8, 0xFFFF_0000, 4096, 12])

        def __getitem__(self, at: int) -> int:
            return next(self.values) if at == word else self.words[at]

        def __setitem__(self, at: int, value: int) -> None:
            self.words[at] = value

    vars(ring)["_words"] = Jumping(page.cast("I"))
    got = ring.read()
    assert (len(got.data), got.error) == (8, 0)
    assert len(ring.read().data) <= XENSTORE_RING_SIZE


def test_two_unmaps_of_one_handle_at_once() -> None:
    """XSA-218: unmaps of one mapping that raced were counted twice. The second is asked while the first waits for the granter: it finds
    no handle, the reference is dropped once, and the frame comes home once."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    first = w.start_unmap(1, (answer.handle, 0x1000, 0))
    w.pump(2)  # the granter stands still
    second = w.start_unmap(1, (answer.handle, 0x1000, 0))
    w.pump(2)
    assert not first
    w.pump()
    assert sorted(one.status for one in [*first, *second]) == [-4, 0]  # GNTST_bad_handle
    w.clean()


def test_in_use_bits_outlive_every_way_to_the_frame() -> None:
    """XSA-230 (CVE-2017-12855): GTF_reading and GTF_writing were cleared while the frame could still be reached. One of two mappings
    goes: the bits stay; the last goes, and while the granter has not brought the frame home they are set still."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    one, two = w.map(1, (2, 8, HOST, 0x1000), (2, 8, HOST, 0x2000))
    assert w.unmap(1, (one.handle, 0x1000, 0)) == [0]
    assert w.flags(2, 8) == 0x18
    answers = w.start_unmap(1, (two.handle, 0x2000, 0))
    w.pump(2)
    assert w.flags(2, 8) == 0x18
    assert not answers
    w.pump()
    assert (w.flags(2, 8), answers[0].status) == (0, 0)
    w.clean()


def test_both_halves_of_a_mapping_are_counted() -> None:
    """XSA-224: a mapping for CPU and devices whose CPU half alone was unmapped lost its count. The device half holds the frame, the
    entry's bits and the I/O page until it goes as well."""
    w = World("pvh", "pv")
    w.dma.tables[1] = {}
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST | GNTMAP_device_map, 0x40000))
    assert answer.status == 0
    assert w.unmap(1, (answer.handle, 0x40000, 0)) == [0]
    assert w.flags(2, 8) == 0x18
    assert w.dma.tables[1] == {0x40: (mfn, True)}
    assert list(w.grants.references()) == [mfn]
    assert w.unmap(1, (answer.handle, 0, answer.dev_bus_addr)) == [0]
    assert (w.flags(2, 8), w.dma.tables[1]) == (0, {})
    w.clean()


@pytest.mark.parametrize("port", [0, 5, 1024, 4095, 0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF])
@pytest.mark.parametrize(
    ("cmd", "layout"),
    [
        (ec.EVTCHNOP_send, "EVTCHN_SEND"), (ec.EVTCHNOP_close, "EVTCHN_CLOSE"), (ec.EVTCHNOP_unmask, "EVTCHN_UNMASK"),
        (ec.EVTCHNOP_bind_vcpu, "EVTCHN_BIND_VCPU"),
        (ec.EVTCHNOP_bind_interdomain, "EVTCHN_BIND_INTERDOMAIN"), (ec.EVTCHNOP_set_priority, "EVTCHN_SET_PRIORITY"),
    ],
)  # fmt: skip
def test_no_port_is_believed(cmd: int, layout: str, port: int) -> None:
    """XSA-221 (its class): port numbers that nobody checked. Every operation refuses a port that is not there with an errno, and the
    domain's channels are as before."""
    machine = Machine()
    domid = machine.create()
    item = getattr(ec, layout).zero()
    fields = {name: port for name in ("port", "remote_port") if name in item._fields}
    if "remote_dom" in item._fields:
        fields["remote_dom"] = domid
    if "dom" in item._fields:
        fields["dom"] = DOMID_SELF
    token = machine.raw(
        domid, HYPERVISOR_event_channel_op, cmd, getattr(ec, layout).pack(item._replace(**fields))
    )
    assert machine.replies[token].rc < 0
    assert not machine.core.events.ports_of(DomId(domid)).channels


def test_a_storm_of_events_costs_a_slow_domain_nothing() -> None:
    """XSA-391: backends that send events without end. To a process that does not read, all of them are one message that waits, not one
    each (which would fill its backlog and end it, the victim)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server, _ = make("ipc:///nowhere")
    peer = Peer(DomId(1), server, ours)
    try:
        for _ in range(100_000):
            peer.raised([(7, 0), (9, 0)])
        assert len(peer._backlog) == 1
        first = peer._backlog[0]
        assert isinstance(first, _Raised)
        assert list(first.events) == [(7, 0), (9, 0)]
        for port in range(10_000):
            peer.raised([(port, 0)])
        assert len(peer._backlog) <= 4
    finally:
        peer.close()
        theirs.close()


def test_dma_after_an_unmap_faults_though_it_was_cached() -> None:
    """XSA-346 (IOMMU TLB flushes put off too long) and XSA-386 (devices that are not deassigned): what was translated a moment
    ago is not reachable when the unmap, or the deassignment, has returned."""
    machine = Machine()
    memory = machine.memory
    iommu = Iommu(memory, XenPool(memory, Mfn(1 << 30), 64))
    iommu.add_device(8)  # type: ignore[arg-type]  # Bdf is int
    iommu.create_context(DomId(1))
    epoch = iommu.assign(8, DomId(1))  # type: ignore[arg-type]
    iommu.map_page(DomId(1), 5, Mfn(77), True)
    assert iommu.translate(0, 8, epoch, [Segment(5 << 12, 16, True)])[0][0].mfn == 77  # type: ignore[arg-type]
    iommu.unmap_page(DomId(1), 5)
    with pytest.raises(DmaFault):
        iommu.translate(0, 8, epoch, [Segment(5 << 12, 16, True)])  # type: ignore[arg-type]
    iommu.map_page(DomId(1), 5, Mfn(77), True)
    iommu.deassign(8)  # type: ignore[arg-type]
    with pytest.raises(DmaFault):
        iommu.translate(0, 8, epoch, [Segment(5 << 12, 16, True)])  # type: ignore[arg-type]


NAMED = re.compile(r"`(tests/[a-z_/]+\.py)::(test_\w+)`")


def test_the_table_in_the_docs_names_tests_that_exist() -> None:
    """Each row of docs/faults.md has an advisory and at least one test; each test of this file is in it."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| XSA-")]
    assert len(rows) >= 12
    named: set[tuple[str, str]] = set()
    for row in rows:
        found = NAMED.findall(row)
        assert found, row
        named.update(found)
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{path} has no {name}"
    mine = {
        node.name
        for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and "XSA-" in (ast.get_docstring(node) or "")
    }
    assert mine <= {name for path, name in named if path == "tests/fault/test_advisories.py"}
