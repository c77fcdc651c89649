"""A machine for the tests of grants: real frame table and outbox, byte-array memory, and domain processes that do what
the orders say on views of their own, so that a frame moved wrongly is seen as lost or foreign bytes."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from bus.abi.grant_table import (
    GRANT_ENTRY_V1,
    GNTMAP_host_map,
    GNTMAP_readonly,
    gnttab_map_grant_ref,
    gnttab_setup_table,
    gnttab_unmap_grant_ref,
    grant_entry_v1,
)
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.effects import Log, Order
from hypervisor.core.frames import FrameTable
from hypervisor.core.grant_state import Table
from hypervisor.core.grants import GrantTables
from hypervisor.core.outbox import Outbox

GNTTAB_HOST = GNTMAP_host_map
MASK = 0x18


class Memory:
    """Machine memory: a page a frame in the extent, windows beside."""

    def __init__(self) -> None:
        self.extent: dict[int, bytearray] = {}
        self.windows: dict[int, list[bytearray]] = {}
        self.placed: dict[int, tuple[int, int]] = {}

    def page(self, mfn: int) -> bytearray:
        if mfn in self.placed:
            window, index = self.placed[mfn]
            return self.windows[window][index]
        return self.extent.setdefault(mfn, bytearray(4096))

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= 4096
        return bytes(self.page(mfn)[offset : offset + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= 4096
        self.page(mfn)[offset : offset + len(data)] = data

    def copy(self, source: Mfn, source_offset: int, target: Mfn, target_offset: int, length: int) -> None:
        self.write(target, target_offset, self.read(source, source_offset, length))

    def clear(self, mfn: Mfn, count: int = 1) -> None:
        for frame in range(mfn, mfn + count):
            assert frame not in self.placed, "a frame was freed while in a window"
            self.extent.pop(frame, None)

    def create_extent(self, base: Mfn, frames: int) -> None:
        pass

    def drop_extent(self, base: Mfn) -> None:
        pass

    def create_window(self, window: int, frames: int) -> None:
        assert window not in self.windows
        assert frames > 0
        self.windows[window] = [bytearray(4096) for _ in range(frames)]

    def place(self, mfn: Mfn, window: int, index: int) -> None:
        assert mfn not in self.placed
        assert (window, index) not in self.placed.values()
        self.windows[window][index]  # it must exist
        self.placed[mfn] = (window, index)

    def restore(self, mfn: Mfn) -> None:
        del self.placed[mfn]

    def drop_window(self, window: int) -> None:
        assert all(number != window for number, _ in self.placed.values())
        del self.windows[window]


class Process:
    """A domain's process: it knows its own extent, the windows that came with orders, and nothing else."""

    def __init__(self, world: World, domain: DomId) -> None:
        self.world = world
        self.domain = domain
        self.queue: deque[Order] = deque()
        self.views: dict[int, tuple[int, int]] = {}
        """Own frames mapped from a window."""
        self.attached: dict[int, dict[int, tuple[int, int, bool]]] = {}
        """By frame and handle: (window, index, writable)."""
        self.descriptors: dict[int, bool] = {}
        """Windows ever received: the highest access."""
        self.page_tables: set[int] = set()
        self.windows: dict[int, list[bytearray]] = {}
        self.seen: list[Order] = []

    def page(self, mfn: int) -> bytearray:
        """The own frame as the guest sees it."""
        if mfn in self.views:
            window, index = self.views[mfn]
            return self.windows[window][index]
        return self.world.memory.extent.setdefault(mfn, bytearray(4096))

    def foreign(self, mfn: int) -> bytearray:
        """A frame granted by another, as the guest sees it; KeyError if it is not attached."""
        window, index, _ = next(iter(self.attached[mfn].values()))
        return self.windows[window][index] if window else self.page(mfn)

    def carry_out(self, order: Order) -> list[int]:
        self.seen.append(order)
        for number, writable in order.windows:
            self.windows[number] = self.world.memory.windows.get(number, [bytearray(4096)] * 512)
            self.descriptors[number] = self.descriptors.get(number, False) or writable
        body: dict[str, Any] = order.body
        results: list[int] = getattr(self, order.kind)(body)
        return results

    def grant_map(self, body: dict[str, Any]) -> list[int]:
        results = []
        for mfn, offset, expect, word_mfn, word_offset, bits, frame in body["checks"]:
            now = bytearray(self.page(mfn)[offset : offset + len(expect)])
            want = bytearray(expect)
            now[0] &= ~MASK
            want[0] &= ~MASK
            if now != want or (bits & 0x10 and frame in self.page_tables):
                results.append(-1)
                continue
            (word,) = struct.unpack_from("<H", self.page(word_mfn), word_offset)
            struct.pack_into("<H", self.page(word_mfn), word_offset, word | bits)
            results.append(0)
        for frame, window, index in body["moves"]:
            self.windows[window][index][:] = self.page(frame)
            self.views[frame] = (window, index)
            results.append(0)
        return results

    def grant_unmap(self, body: dict[str, Any]) -> list[int]:
        for frame, window, index in body["moves"]:
            if self.views.get(frame) == (window, index):
                content = bytes(self.page(frame))
                del self.views[frame]
                self.page(frame)[:] = content
        for mfn, offset, bits, _ in body["clears"]:
            (word,) = struct.unpack_from("<H", self.page(mfn), offset)
            struct.pack_into("<H", self.page(mfn), offset, word & ~bits)
        return [0] * (len(body["moves"]) + len(body["clears"]))

    def grant_attach(self, body: dict[str, Any]) -> list[int]:
        for handle, mfn, window, index, writable, _host, _flags, _granter in body["items"]:
            self.attached.setdefault(mfn, {})[handle] = (window, index, writable)
        return [0] * len(body["items"])

    def grant_detach(self, body: dict[str, Any]) -> list[int]:
        for handle, mfn, _host, _new, _flags in body["items"]:
            del self.attached[mfn][handle]
            if not self.attached[mfn]:
                del self.attached[mfn]
        return [0] * len(body["items"])


@dataclass
class Dom:
    """What the fake domain table knows."""

    translated: bool = False
    by_p2m: bool = False
    dying: bool = False
    process: Process | None = None
    p2m: dict[int, tuple[int, str]] = field(default_factory=dict)
    ram: list[Mfn] = field(default_factory=list)


class Dma:
    """I/O page tables as a dictionary."""

    def __init__(self) -> None:
        self.tables: dict[int, dict[int, tuple[Mfn, bool]]] = {}

    def has_context(self, domain: DomId) -> bool:
        return domain in self.tables

    def lookup(self, domain: DomId, page: int) -> tuple[Mfn, bool] | None:
        return self.tables[domain].get(page)

    def map_page(self, domain: DomId, page: int, mfn: Mfn, writable: bool) -> bool:
        self.tables[domain][page] = (mfn, writable)
        return True

    def unmap_page(self, domain: DomId, page: int) -> None:
        del self.tables[domain][page]


class World:
    """Domains 1..n with RAM, a grant table of `table_frames` frames, and processes that answer when told to."""

    def __init__(self, *kinds: str, ram: int = 16, maptrack: int = 4096) -> None:
        self.memory = Memory()
        self.frames = FrameTable(self.memory, MachineConfig())
        self.outbox = Outbox(1024)
        self.dma = self.make_dma()
        self.doms: dict[DomId, Dom] = {}
        self.crashed: dict[DomId, str] = {}
        self.written: list[tuple[DomId, Mfn]] = []
        self.now = 0
        self.orders: list[Order] = []
        self.logged: list[Log] = []
        self.grants = GrantTables(self.frames, self, self.memory, self.outbox, self.dma)
        for number, kind in enumerate(kinds, 1):
            domain = DomId(number)
            dom = self.doms[domain] = Dom(
                translated=kind != "pv", by_p2m=kind == "hvm", process=Process(self, domain)
            )
            self.frames.create_extent(domain, ram)
            for index in range(ram):
                mfn = self.frames.allocate_ram(domain, 0)
                dom.ram.append(mfn)
                dom.p2m[index] = (mfn, "ram")
            self.grants.create(domain, max_maptrack=maptrack)

    def make_dma(self) -> Any:
        """The I/O page tables that the grants enter."""
        return Dma()

    # the protocol GrantDomains
    def exists(self, domain: DomId) -> bool:
        return domain in self.doms

    def is_dying(self, domain: DomId) -> bool:
        return domain not in self.doms or self.doms[domain].dying

    def has_process(self, domain: DomId) -> bool:
        return domain in self.doms and self.doms[domain].process is not None

    def is_translated(self, domain: DomId) -> bool:
        return self.doms[domain].translated

    def dma_by_p2m(self, domain: DomId) -> bool:
        return self.doms[domain].by_p2m

    def controls(self, caller: DomId, target: DomId) -> bool:
        return caller == target or caller == 1

    def translate(self, domain: DomId, gfn: int) -> Mfn | None:
        if not self.doms[domain].translated:
            return Mfn(gfn)
        entry = self.doms[domain].p2m.get(gfn)
        return Mfn(entry[0]) if entry else None

    def gfn_of(self, domain: DomId, mfn: Mfn) -> int:
        return int(mfn)

    def enter_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn, writable: bool) -> bool:
        if gfn in self.doms[domain].p2m:
            return False
        self.doms[domain].p2m[gfn] = (mfn, "rw" if writable else "ro")
        return True

    def remove_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn) -> bool:
        if self.doms[domain].p2m.get(gfn, (None,))[0] != mfn:
            return False
        del self.doms[domain].p2m[gfn]
        return True

    def frame_written(self, domain: DomId, mfn: Mfn) -> None:
        self.written.append((domain, mfn))

    def crash(self, domain: DomId, reason: str) -> None:
        self.crashed[domain] = reason
        self.doms[domain].dying = True
        self.end_process(domain)
        self.grants.release_mappings(self.now, domain)

    # the shell
    def end_process(self, domain: DomId) -> None:
        self.pull()
        self.doms[domain].process = None
        self.outbox.domain_gone(self.now, domain)

    def destroy(self, domain: DomId) -> None:
        self.doms[domain].dying = True
        self.grants.release_mappings(self.now, domain)
        if self.doms[domain].process is not None:
            self.end_process(domain)
        self.pump()
        self.frames.release_domain(domain)

    def pull(self) -> None:
        for effect in self.outbox.take():
            if isinstance(effect, Log):
                self.logged.append(effect)
            if isinstance(effect, Order):
                self.orders.append(effect)
                process = self.doms[effect.domain].process
                if process is not None:
                    process.queue.append(effect)

    def step(self, domain: DomId) -> bool:
        """The domain's process carries out one order. False if it has none."""
        self.pull()
        process = self.doms[domain].process
        if process is None or not process.queue:
            return False
        order = process.queue.popleft()
        results = process.carry_out(order)
        data = struct.pack(f"<{len(results)}h", *results)
        self.outbox.done(self.now, domain, order.order_id, 0, data)
        return True

    def pump(self, *frozen: int) -> None:
        """Everybody but the frozen carries out all orders."""
        while any(self.step(d) for d in list(self.doms) if d not in frozen):
            pass

    def wait(self, seconds: float, *frozen: int) -> None:
        self.now += int(seconds * 1e9)
        self.outbox.tick(self.now)
        self.pump(*frozen)

    # the guests
    def process(self, domain: int) -> Process:
        """Of a domain that has one."""
        process = self.doms[DomId(domain)].process
        assert process is not None
        return process

    def table(self, domain: int) -> Table:
        """Of a domain that has one."""
        table = self.grants.table(DomId(domain))
        assert table is not None
        return table

    def setup(self, domain: int, frames: int = 1) -> list[int]:
        op = gnttab_setup_table(DOMID_SELF, frames, 0, 0)
        op, numbers = self.grants.ops.setup_table(DomId(domain), op)
        assert op.status == 0
        return numbers

    def grant(self, domain: int, ref: int, to: int, index: int, *, readonly: bool = False) -> Mfn:
        """Version 1 entry `ref` for the domain's RAM frame number `index`, by the guest itself."""
        dom = self.doms[DomId(domain)]
        if not (self.table(domain).shared):
            self.setup(domain)
        mfn = dom.ram[index]
        frame = index if dom.translated else mfn
        raw = GRANT_ENTRY_V1.pack(grant_entry_v1(1 | (4 if readonly else 0), to, frame))
        table = self.table(domain)
        self.process(domain).page(table.shared[ref // 512])[ref % 512 * 8 : ref % 512 * 8 + 8] = raw
        return mfn

    def flags(self, domain: int, ref: int) -> int:
        """GTF_reading|GTF_writing of a version 1 entry as its guest sees it."""
        page = self.process(domain).page(self.table(domain).shared[ref // 512])
        word: int = struct.unpack_from("<H", page, ref % 512 * 8)[0]
        return word & MASK

    def start_map(self, mapper: int, *ops: tuple[int, int, int, int]) -> list[gnttab_map_grant_ref]:
        """(granter, ref, flags, host_addr) each. The list returned gets the answer when there is one."""
        answers: list[gnttab_map_grant_ref] = []
        batch = [gnttab_map_grant_ref(addr, flags, ref, dom, 99, 0, 0) for dom, ref, flags, addr in ops]
        self.grants.map(self.now, DomId(mapper), batch, answers.extend)
        return answers

    def map(self, mapper: int, *ops: tuple[int, int, int, int]) -> list[gnttab_map_grant_ref]:
        answers = self.start_map(mapper, *ops)
        self.pump()
        assert len(answers) == len(ops)
        return answers

    def start_unmap(self, mapper: int, *ops: tuple[int, int, int]) -> list[gnttab_unmap_grant_ref]:
        """(handle, host_addr, dev_bus_addr) each."""
        answers: list[gnttab_unmap_grant_ref] = []
        batch = [gnttab_unmap_grant_ref(addr, dev, handle, 99) for handle, addr, dev in ops]
        self.grants.unmap(self.now, DomId(mapper), batch, answers.extend)
        return answers

    def unmap(self, mapper: int, *ops: tuple[int, int, int]) -> list[int]:
        answers = self.start_unmap(mapper, *ops)
        self.pump()
        assert len(answers) == len(ops)
        return [a.status for a in answers]

    def clean(self) -> None:
        """Nothing is left: no mapping, no window, no reference, no job, no invariant broken."""
        assert self.grants.check() == []
        assert self.grants.busy == 0
        assert self.grants.window_count == 0
        assert not self.memory.windows
        assert list(self.grants.references()) == []
        for dom in self.doms.values():
            assert all(self.frames.references(mfn) == 0 for mfn in dom.ram)


HOST, RO = GNTMAP_host_map, GNTMAP_host_map | GNTMAP_readonly
