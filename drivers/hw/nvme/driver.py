"""An NVMe 1.4 driver without I/O: a `drivers.block.ports.Storage` on one namespace.

Time is told (`poll`, nanoseconds), interrupts are calls. Data pages are the caller's: what it enters in the I/O page
tables (granted frames) goes into PRPs as it is, and no payload is copied here.

Loss. When a command times out, the controller shows a fault or vanishes, the driver forgets everything that is under
way (`on_lost`), resets the controller and sets it up again (`on_ready`). It repeats nothing by itself: whoever
submitted decides (`Backend.storage_reset`). What is submitted while it is not ready is forgotten likewise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from enum import Enum
from typing import Final, Protocol

from bus.abi.io.ring import full_barrier
from bus.trace import Kind, Trace, off
from drivers.block.ports import Command
from drivers.hw.nvme import spec
from drivers.hw.nvme.driver_io import Namespace, entries, errno_of
from drivers.hw.nvme.driver_queue import (
    MAX_PRP_PAGES,
    PAGE,
    DmaMemory,
    Entry,
    Finished,
    QueueFault,
    QueuePair,
)

SECOND: Final = 1_000_000_000
MAX_BYTES: Final = 1 << 62
"""No namespace that is offered as a disk is larger: sector counts stay within what rings and ledgers can say."""
ADMIN_DEPTH: Final = 16
ALL_ONES: Final = 0xFFFFFFFF
PCI_COMMAND: Final = 0x04
PCI_MEMORY_AND_MASTER: Final = 0x6
PCI_STATUS: Final = 0x06
PCI_CAPABILITIES: Final = 0x34
PCI_CAP_MSIX: Final = 0x11
MSIX_ENABLE: Final = 1 << 15


class DevicePort(Protocol):
    """The device as its owner reaches it. Reads of a device that does not answer give all ones."""

    def config_read(self, offset: int, size: int) -> int: ...

    def config_write(self, offset: int, size: int, value: int) -> None: ...

    def read(self, offset: int, size: int) -> int:
        """Of BAR 0."""

    def write(self, offset: int, size: int, value: int) -> None: ...

    def doorbells(self, values: Sequence[tuple[int, int]], *, wake: bool = True) -> None:
        """Store each (offset in BAR 0, 32-bit value), in order, then tell the device once. With `wake` False the device may see
        them when it next looks: before it takes a command for which it is told later."""


class State(Enum):
    """Of the driver."""

    OFF = "off"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    """It could not be set up; `start` tries again."""
    SHUTTING = "shutting down"


class StartError(Exception):
    """Why the controller could not be set up."""


class _Whole:
    """A command of the caller's: perhaps several NVMe commands."""

    __slots__ = ("left", "status", "token")

    def __init__(self, token: int, left: int) -> None:
        self.token = token
        self.left = left
        self.status = 0


Steps = Generator[Entry | None, Finished, None]
"""Setting up: yields an admin command (its completion is sent in), or None to look again later."""


class NvmeDriver:
    """One controller and one of its namespaces."""

    def __init__(
        self,
        port: DevicePort,
        memory: DmaMemory,
        *,
        on_complete: Callable[[list[tuple[int, bool]]], None],
        on_ready: Callable[[], None],
        on_lost: Callable[[str], None],
        queues: int = 1,
        depth: int = 128,
        vectors: int = 1,
        nsid: int = 1,
        timeout: int = 30 * SECOND,
        on_full: Callable[[int], None] = lambda count: None,
        trace: Trace | None = None,
        unit: int = 0,
    ) -> None:
        """`on_complete` gets (token, successful), `on_full` how many commands have to wait for room in the queues. Queue pair q interrupts by vector q % vectors. `timeout`: nanoseconds
        that a command may take. `unit`: the device's number in trace records. ValueError for counts that make no sense."""
        if not 1 <= queues <= 64 or not 2 <= depth <= 4096 or not 1 <= vectors <= 2048:
            raise ValueError(f"{queues} queues of {depth}, {vectors} vectors")
        self.port: Final = port
        self.memory: Final = memory
        self._on_complete: Final = on_complete
        self._on_ready: Final = on_ready
        self._on_lost: Final = on_lost
        self._wanted: Final = (queues, depth)
        self._vectors: Final = vectors
        self._nsid: Final = nsid
        self._timeout: Final = timeout
        self._on_full: Final = on_full
        self._trace: Final = trace or off()
        self._unit: Final = unit
        self.state = State.OFF
        self.reason = ""
        self.now = 0
        self.namespace: Namespace | None = None
        self.last_errno = 0
        """Of the last command that failed."""
        self.resets = 0
        self.unsafe_shutdowns = 0
        """How often the device lost power without being told (SMART), when it was last set up. More than before means that writes
        which no flush covered may be gone."""
        self._admin: QueuePair | None = None
        self._queues: list[QueuePair] = []
        self._flying: dict[tuple[int, int], tuple[_Whole, int]] = {}
        self._pending: deque[tuple[_Whole, Entry]] = deque()
        self._refused: list[tuple[int, bool]] = []
        self._steps: Steps | None = None
        self._admin_sent = -1
        self._deadline = 0
        self._stride = 4
        self._turn = 0

    # ------------------------------------------------------------------ Storage

    @property
    def sectors(self) -> int:
        """Capacity in units of 512 bytes; 0 before it is known."""
        return self.namespace.blocks << (self.namespace.shift - 9) if self.namespace else 0

    @property
    def block_size(self) -> int:
        """Bytes of a logical block."""
        return 1 << self.namespace.shift if self.namespace else 512

    def submit(self, commands: Sequence[Command]) -> None:
        """See `Storage`. A command that cannot be carried out is answered at the next `poll` or interrupt (the shell
        calls `poll` once after each round)."""
        if self.state is not State.READY or self.namespace is None:
            return
        waiting = len(self._pending)
        for command in commands:
            made = entries(command, self.namespace)
            if isinstance(made, int):
                self.last_errno = made
                self._refused.append((command.token, False))
            elif not made:
                self._refused.append((command.token, True))  # a flush where there is no volatile cache
            else:
                whole = _Whole(command.token, len(made))
                for entry in made:
                    self._pending.append((whole, entry))
        fresh = len(self._pending) - waiting
        self._push()
        if self._pending and fresh:
            self._on_full(min(len(self._pending), fresh))

    @property
    def wants_poll(self) -> bool:
        """There are answers that no interrupt will announce."""
        return bool(self._refused)

    def _push(self) -> None:
        pending = self._pending
        rung: dict[int, int] = {}
        full = 0
        queues = self._queues
        while pending and full < len(queues):
            queue = queues[self._turn % len(queues)]
            self._turn += 1
            if not queue.room:
                full += 1
                continue
            full = 0
            while pending and queue.room:  # a batch to one queue: one doorbell
                whole, entry = pending.popleft()
                cid = queue.put(entry)
                self._flying[queue.qid, cid] = (whole, self.now)
                if self._trace.on[0]:
                    self._note(queue, cid, whole, entry)
            rung[queue.qid] = queue.tail
        if rung:
            full_barrier()
            self.port.doorbells([(self._doorbell(qid, 0), tail) for qid, tail in rung.items()])

    def _note(self, queue: QueuePair, cid: int, whole: _Whole, entry: Entry) -> None:
        """Step 1: the pseudophysical addresses that the controller is given."""
        trace, unit, pages = self._trace, self._unit, entry.pages
        if entry.run:  # an SGL descriptor names them all
            pages = range(pages[0], pages[0] + entry.run, PAGE)
        block = entry.cdw10 | entry.cdw11 << 32
        blocks = (entry.cdw12 & 0xFFFF) + 1 if pages else 0
        where = queue.list_of(cid) if len(entry.pages) > 2 or entry.ranges else 0
        trace.add(Kind.SUBMIT, queue.qid, unit, cid, whole.token, entry.opcode, block, blocks, where)
        left = blocks * self.block_size
        for number, address in enumerate(pages):
            length = min(left, PAGE - address % PAGE)
            trace.add(Kind.PRP, queue.qid, unit, cid, number, address, length)
            left -= length

    def _doorbell(self, qid: int, which: int) -> int:
        return spec.DOORBELL_OFFSET + (2 * qid + which) * self._stride

    # ------------------------------------------------------------------ interrupts and time

    def interrupt(self, vector: int) -> None:
        """The device raised that vector."""
        self._look([queue for queue in self._all() if queue.qid % self._vectors == vector])

    def _all(self) -> list[QueuePair]:
        return [self._admin, *self._queues] if self._admin is not None else self._queues

    def poll(self, now: int) -> None:
        """Look at everything: completions whose interrupt was lost, timeouts, the steps of setting up. To be called at
        least every 100 ms, and every few milliseconds while `state` is STARTING or SHUTTING."""
        self.now = now
        self._look(self._all())
        if self.state in (State.STARTING, State.SHUTTING):
            self._continue()
        elif self.state is State.READY and self._flying:
            _, since = next(iter(self._flying.values()))  # the oldest: dictionaries keep their order
            if now - since > self._timeout:
                self.lose(f"no completion within {self._timeout / SECOND:g} s")

    def _look(self, queues: Sequence[QueuePair]) -> None:
        results, self._refused = self._refused, []
        heads: list[tuple[int, int]] = []
        admin: list[Finished] = []
        wake = False
        try:
            for queue in queues:
                if self._admin_sent < 0 if queue.qid == 0 else self.state is not State.READY:
                    continue  # queues of before a reset
                found = queue.take()
                if not found:
                    continue
                heads.append((self._doorbell(queue.qid, 1), queue.head))
                if queue.qid == 0:
                    wake = True
                    admin += found
                    continue
                for cid, status, _ in found:
                    whole, _ = self._flying.pop((queue.qid, cid))
                    if self._trace.on[0]:
                        self._trace.add(Kind.COMPLETED, queue.qid, self._unit, cid, status)
                    whole.left -= 1
                    whole.status = whole.status or status
                    if not whole.left:
                        if whole.status:
                            self.last_errno = errno_of(whole.status)
                        results.append((whole.token, not whole.status))
        except QueueFault as fault:
            self.lose(str(fault))
            heads, admin = [], []
        if heads:
            # An I/O completion queue has room for all that can be under way: the device waits for none of these.
            self.port.doorbells(heads, wake=wake)
        self._push()
        if results:
            self._on_complete(results)
        for finished in admin:
            if finished.cid == self._admin_sent:
                self._admin_sent = -1
                self._advance(finished)

    # ------------------------------------------------------------------ setting up

    def start(self, now: int) -> None:
        """Reset the controller and set it up; `on_ready` follows, or `on_lost` and state FAILED."""
        self.now = now
        self._forget()
        self.state, self.reason = State.STARTING, ""
        self._steps = self._setting_up()
        self._advance(None)

    def lose(self, reason: str) -> None:
        """What is under way is lost (also to be called when the device process is known to have died): reset."""
        if self.state is State.OFF:
            return
        self.reason = reason
        self.resets += 1
        self._forget()
        self.state = State.FAILED
        self._on_lost(reason)
        if self.state is State.FAILED:
            self.start(self.now)

    def _forget(self) -> None:
        self._flying.clear()
        self._pending.clear()
        self._refused = []
        self._steps = None
        self._admin_sent = -1

    def _advance(self, finished: Finished | None) -> None:
        steps = self._steps
        if steps is None:
            return
        try:
            wanted = steps.send(finished) if finished is not None else next(steps)
        except StopIteration:
            if (
                self._steps is steps
            ):  # else `on_ready` waited for something, and meanwhile it was lost and is set up once more
                self._steps = None
            return
        except (StartError, QueueFault, MemoryError) as error:
            if self._steps is not steps:
                return
            self._steps = None
            self.state, self.reason = State.FAILED, str(error) or type(error).__name__
            self._on_lost(self.reason)
            return
        if wanted is not None:
            assert self._admin is not None
            self._admin_sent = self._admin.put(wanted)
            self._deadline = self.now + self._timeout
            full_barrier()
            self.port.doorbells([(self._doorbell(0, 0), self._admin.tail)])

    def _continue(self) -> None:
        if self._admin_sent < 0:
            self._advance(None)
        elif self.now > self._deadline:
            self._steps, self._admin_sent = None, -1
            self.state, self.reason = State.FAILED, "an admin command got no answer"
            self._on_lost(self.reason)

    def _wait(self, limit: int, mask: int, value: int, what: str) -> Steps:
        deadline = self.now + limit
        while True:
            status = self.port.read(spec.REG_CSTS, 4)
            if status != ALL_ONES:
                if status & mask == value:
                    return
                if value and status & spec.CSTS_CFS:
                    raise StartError("the controller reports a fatal status")
            if self.now > deadline:
                gone = " (the device does not answer)" if status == ALL_ONES else ""
                raise StartError(f"{what}: not within {limit / SECOND:g} s{gone}")
            yield None

    def enable_pci(self) -> None:
        """Memory space, bus mastering and MSI-X. StartError if the device is absent, or no NVMe controller."""
        if self.port.config_read(0, 4) == ALL_ONES:
            raise StartError("there is no such device")
        if self.port.config_read(0x08, 4) >> 8 != spec.PCI_CLASS:
            raise StartError("it is no NVMe controller")
        command = self.port.config_read(PCI_COMMAND, 2)
        self.port.config_write(PCI_COMMAND, 2, command | PCI_MEMORY_AND_MASTER)
        at = self.port.config_read(PCI_CAPABILITIES, 1) & 0xFC
        for _ in range(48):  # a list in 192 bytes has no more; a hostile one may be a circle
            if at < 0x40:
                break
            head = self.port.config_read(
                at, 4
            )  # id, next, and what the capability has there: each read is a message
            if head & 0xFF == PCI_CAP_MSIX:
                self.port.config_write(at + 2, 2, head >> 16 | MSIX_ENABLE)
                return
            at = head >> 8 & 0xFC
        raise StartError("it has no MSI-X")

    def _setting_up(self) -> Steps:
        port = self.port
        deadline = self.now + 10 * SECOND
        while port.config_read(0, 4) == ALL_ONES:  # its process is being started again
            if self.now > deadline:
                raise StartError("the device does not answer")
            yield None
        self.enable_pci()
        capabilities = port.read(spec.REG_CAP, 8)
        if capabilities & ALL_ONES == ALL_ONES:
            raise StartError("its registers do not answer")
        if not capabilities & spec.CAP_CSS_NVM or capabilities >> spec.CAP_MPSMIN_SHIFT & 0xF:
            raise StartError("the controller wants another command set or page size")
        limit = max(1, capabilities >> spec.CAP_TO_SHIFT & 0xFF) * SECOND // 2
        self._stride = 4 << (capabilities >> spec.CAP_DSTRD_SHIFT & 0xF)
        port.write(spec.REG_CC, 4, 0)
        yield from self._wait(limit, spec.CSTS_RDY, 0, "reset")
        for queue in self._all():  # only now: the device may have used them until it was reset
            queue.release()
        self._queues = []
        self._admin = None
        depth = min(self._wanted[1], (capabilities & spec.CAP_MQES_MASK) + 1)
        if depth < 2:
            raise StartError("its queues have one entry")
        admin = self._admin = QueuePair(self.memory, 0, min(ADMIN_DEPTH, depth), lists=False)
        port.write(spec.REG_AQA, 4, (admin.depth - 1) << 16 | (admin.depth - 1))
        port.write(spec.REG_ASQ, 8, admin.sq.iova)
        port.write(spec.REG_ACQ, 8, admin.cq.iova)
        entry_sizes = spec.SQE_SHIFT << spec.CC_IOSQES_SHIFT | spec.CQE_SHIFT << spec.CC_IOCQES_SHIFT
        port.write(spec.REG_CC, 4, entry_sizes | spec.CC_EN)
        yield from self._wait(limit, spec.CSTS_RDY, spec.CSTS_RDY, "enable")
        yield from self._identify()
        yield from self._health()
        yield from self._make_queues(depth)
        self.state, self.reason = State.READY, ""
        self._on_ready()

    def _ask(self, entry: Entry, what: str) -> Generator[Entry | None, Finished, int]:
        finished = yield entry
        if finished.status:
            raise StartError(f"{what}: status {finished.status:#05x}")
        return finished.result

    def _identify(self) -> Steps:
        page = self.memory.allocate(1)
        try:
            get = spec.AdminOpcode.IDENTIFY
            yield from self._ask(Entry(get, 0, [page.iova], spec.Cns.CONTROLLER), "identify controller")
            controller = spec.IDENTIFY_CONTROLLER.unpack(bytes(page.view))
            page.view[:] = bytes(len(page.view))
            yield from self._ask(
                Entry(get, self._nsid, [page.iova], spec.Cns.NAMESPACE), f"identify namespace {self._nsid}"
            )
            space = spec.IDENTIFY_NAMESPACE.unpack(bytes(page.view))
        finally:
            self.memory.free(page)
        shift = spec.block_shift(space)
        if not 0 < space.nsze < MAX_BYTES >> 12 or not 9 <= shift <= 12:
            raise StartError(f"namespace {self._nsid}: {space.nsze} blocks of 2^{shift} bytes")
        self.namespace = Namespace(
            self._nsid,
            space.nsze,
            shift,
            bool(space.nsattr & 1),
            min(1 << controller.mdts if 0 < controller.mdts < 16 else MAX_PRP_PAGES, MAX_PRP_PAGES),
            bool(controller.oncs & spec.ONCS_DSM),
            bool(controller.oncs & spec.ONCS_WRITE_ZEROES),
            bool(controller.vwc & spec.VWC_PRESENT),
            controller.sgls & 3 in (1, 2),
        )

    def _health(self) -> Steps:
        """SMART, which every controller has: only the count of power losses is of interest."""
        page = self.memory.allocate(1)
        try:
            dwords = spec.SMART_LOG.size // 4 - 1
            entry = Entry(
                spec.AdminOpcode.GET_LOG_PAGE,
                spec.NSID_ALL,
                [page.iova],
                spec.LogPage.SMART | 1 << 15 | dwords << 16,
            )
            yield from self._ask(entry, "SMART log")
            log = spec.SMART_LOG.unpack(bytes(page.view[: spec.SMART_LOG.size]))
            self.unsafe_shutdowns = int.from_bytes(log.unsafe_shutdowns, "little") & 0xFFFF_FFFF
        finally:
            self.memory.free(page)

    def _make_queues(self, depth: int) -> Steps:
        wanted = self._wanted[0]
        set_features = spec.AdminOpcode.SET_FEATURES
        both = (wanted - 1) << 16 | (wanted - 1)
        granted = yield from self._ask(
            Entry(set_features, 0, (), spec.Feature.NUMBER_OF_QUEUES, both), "number of queues"
        )
        count = min(wanted, (granted & 0xFFFF) + 1, (granted >> 16) + 1)
        for qid in range(1, count + 1):
            queue = QueuePair(self.memory, qid, depth)
            self._queues.append(queue)
            size = (depth - 1) << 16 | qid
            vector = qid % self._vectors << 16
            yield from self._ask(
                Entry(
                    spec.AdminOpcode.CREATE_CQ,
                    0,
                    [queue.cq.iova],
                    size,
                    vector | spec.CQ_IEN | spec.QUEUE_PC,
                ),
                f"completion queue {qid}",
            )
            yield from self._ask(
                Entry(spec.AdminOpcode.CREATE_SQ, 0, [queue.sq.iova], size, qid << 16 | spec.QUEUE_PC),
                f"submission queue {qid}",
            )

    # ------------------------------------------------------------------ going down

    def shutdown(self, now: int) -> None:
        """Shutdown notification (CC.SHN): state OFF follows. Nothing should be under way."""
        self.now = now
        if self.state is not State.READY:
            self.state = State.OFF
            return
        self._forget()
        self.state = State.SHUTTING
        self._steps = self._shutting_down()
        self._advance(None)

    def _shutting_down(self) -> Steps:
        control = self.port.read(spec.REG_CC, 4)
        self.port.write(spec.REG_CC, 4, control & ~spec.CC_SHN_MASK | spec.SHN_NORMAL << spec.CC_SHN_SHIFT)
        yield from self._wait(
            5 * SECOND, spec.CSTS_SHST_MASK, spec.SHST_COMPLETE << spec.CSTS_SHST_SHIFT, "shutdown"
        )
        self.port.write(spec.REG_CC, 4, 0)
        yield from self._wait(5 * SECOND, spec.CSTS_RDY, 0, "reset")
        for queue in self._all():
            queue.release()
        self._queues, self._admin = [], None
        self.state = State.OFF
