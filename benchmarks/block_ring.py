"""What the block back end costs: python -m benchmarks.block_ring [REQUESTS]

* raw ring: two processes, one shared page, doorbells (eventfd), 32 requests of 112 bytes under way, each read and answered
  and nothing else: the figure that issue 4 measures the whole path by.
* back end core: the same ring in one process, 4 KiB reads, with storage and grants that do nothing: the back end's own
  processor time a request, ledger and all. Its part of a request and the frontend's are given separately.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus.abi.io.ring import distance, full_barrier
from drivers.block.backend import Backend
from drivers.block.frontend import Features, Frontend
from drivers.block.ledger import Ledger
from drivers.block.ports import Command
from drivers.block.requests import Disk
from drivers.block.wire import RESPONSE, pack_request
from drivers.block.wire import X86_64 as ABI
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import Page

DEPTH = 32


def raw_ring(requests: int) -> float:
    """Requests a second."""
    memory = mmap.mmap(-1, 4096)
    to_back, to_front = os.eventfd(0), os.eventfd(0)
    ring = PagedRing([memoryview(memory)], ABI.slot)
    ring.init()
    child = os.fork()
    if child == 0:
        try:
            _raw_back(PagedRing([memoryview(memory)], ABI.slot), to_back, to_front, requests)
        finally:
            os._exit(0)
    raw = pack_request(ABI, 0, 1, 0, [(8, 0, 7)])
    prod = cons = 0
    start = time.perf_counter()
    while cons < requests:
        while prod < requests and prod - cons < DEPTH:
            ring.write_slot(prod, raw)
            prod += 1
        if ring.push_requests(prod):
            os.eventfd_write(to_back, 1)
        left = distance(ring.rsp_prod, cons)
        if not left and not ring.ask_for_responses(cons):
            os.eventfd_read(to_front)
        for _ in range(left):
            RESPONSE.unpack_from(ring.read_slots(cons, 1))
            cons += 1
    taken = time.perf_counter() - start
    os.waitpid(child, 0)
    return requests / taken


def _raw_back(ring: PagedRing, mine: int, other: int, requests: int) -> None:
    cons = 0
    while cons < requests:
        left, old = distance(ring.req_prod, cons), cons
        if not left and not ring.ask_for_requests(cons, full_barrier):
            os.eventfd_read(mine)
        if not left:
            continue
        for _ in range(left):
            _, _, _, ident, _ = ABI.head.unpack_from(ring.read_slots(cons, 1))
            ring.write_slot(cons, RESPONSE.pack(ident, 0, 0))
            cons += 1
        if ring.push_responses(cons, old):
            os.eventfd_write(other, 1)


@dataclass
class Nothing:
    """Storage and grants that cost nothing."""

    sectors: int = 1 << 20
    block_size: int = 512
    unsafe_shutdowns: int = 0

    def __post_init__(self) -> None:
        self.tokens: list[tuple[int, bool]] = []
        self.next = 8

    def submit(self, commands: Sequence[Command]) -> None:
        self.tokens += [(command.token, True) for command in commands]

    def map_frames(self, items: Sequence[tuple[int, bool]]) -> list[int]:
        return [ref << 12 for ref, _ in items]

    def unmap_frames(self, iovas: Sequence[int]) -> None:
        pass

    def read_frames(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        return [-3 for _ in items]

    def allocate(self, count: int) -> list[Page]:
        return [Page(0, memoryview(bytearray(4096))) for _ in range(count)]

    def free(self, pages: Sequence[Page]) -> None:
        pass

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        self.next += len(pages)
        return list(range(self.next - len(pages), self.next))

    def end(self, refs: Sequence[int]) -> list[bool]:
        return [True for _ in refs]


def core(requests: int, *, persistent: bool, batch: int) -> tuple[float, float]:
    """Microseconds a request: (back end, frontend). `batch`: completions that storage gives at a time."""
    nothing = Nothing()
    page = [memoryview(bytearray(4096))]
    ring, other = PagedRing(page, ABI.slot), PagedRing(page, ABI.slot)
    ring.init()
    ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, ring.size))))
    back = Backend(Disk(1 << 20), nothing, nothing, ledger, persistent=persistent)
    quiet: list[Callable[[], None]] = [lambda: None]
    back.connect([other], quiet, b"")
    front = Frontend(nothing)
    front.connect([ring], quiet, Features(1 << 20, persistent=persistent))
    done = 0

    def finished(status: int, data: bytes) -> None:
        nonlocal done
        done += 1

    mine = theirs = 0.0
    clock = time.process_time
    while done < requests:
        start = clock()
        for _ in range(DEPTH):
            front.read(8, 8, finished)
        middle = clock()
        back.poll()
        while nothing.tokens:
            tokens, nothing.tokens = nothing.tokens[:batch], nothing.tokens[batch:]
            back.complete(tokens)
        end = clock()
        front.poll()
        mine += end - middle
        theirs += middle - start + clock() - end
    return mine / done * 1e6, theirs / done * 1e6


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    raw = raw_ring(requests)
    print(f"raw ring, two processes, depth {DEPTH}: {raw:,.0f} requests/s ({1e6 / raw:.1f} us each)")
    for persistent in (True, False):
        for batch in (DEPTH, 8, 1):
            back, front = core(requests // 4, persistent=persistent, batch=batch)
            kind = "persistent" if persistent else "one-time"
            print(
                f"{kind} grants, {batch} completions at a time: back end {back:.1f} us, frontend {front:.1f} us a request; "
                f"the back end alone allows {1e6 / back / raw:.0%} of the raw ring"
            )


if __name__ == "__main__":
    main()
