"""An NVMe 1.4 controller without I/O: registers, life cycle, queues, completions.

Calls in: `access` (configuration space and BAR 0), `doorbells`, `dma_done`, `media_done`, `tick`. Effects out: `take_media`, `take_clears`,
`take_batches` in that order after each call. All that a driver can do wrong ends in a status code, an asynchronous event or, where
queue memory cannot be reached, in CSTS.CFS; commands under way and memory are bounded by MAX_TASKS and the staging memory.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from bus.trace import Kind, Purpose, Trace, off
from drivers.hw.msix import MsixTable
from drivers.hw.nvme import pages, spec
from drivers.hw.nvme.admin import AdminCommands
from drivers.hw.nvme.dma import MAX_BATCHES, MAX_ITEMS, DmaBatch, DmaEngine, Item, Unit, merge
from drivers.hw.nvme.features import Features
from drivers.hw.nvme.interrupts import Interrupts
from drivers.hw.nvme.io import IoCommands, MediaOp, MediaRequest, MediaResult
from drivers.hw.nvme.pages import Counters, Identity
from drivers.hw.nvme.queues import CompletionQueue, SubmissionQueue, Task, note_fetched
from drivers.hw.nvme.spec import Status
from drivers.hw.nvme.staging import PAGE, Staging, StagingFull
from drivers.hw.nvme.transfers import Transfers
from drivers.hw.pci import BarSpec, ConfigSpace, MsixSpec

MAX_TASKS: Final = 2048
"""Commands under way at once."""
FETCH_BURST: Final = 64
"""Submission entries read at once from one queue: a page of staging memory."""
ENTRIES_PER_PAGE: Final = PAGE // spec.CQE_SIZE
ONES: Final = (1 << 64) - 1
ALL: Final = 1 << 62
"""Bytes: more than there are."""
NO_COMMAND: Final = 0xFFFF
"""An identifier that no command has (NVMe 1.4, 5.21.1.12): in trace records."""


class Controller:
    """One controller in one epoch: a new assignment begins with a new object."""

    def __init__(
        self,
        identity: Identity,
        staging: memoryview,
        counters: Counters | None = None,
        trace: Trace | None = None,
    ) -> None:
        """`staging`: the memory shared with the hypervisor. ValueError if it is too small for the largest transfer."""
        self.identity: Final = identity
        self.max_transfer: Final = PAGE << identity.mdts
        self.counters: Final = counters or Counters()
        self.features: Final = Features(identity)
        self.config: Final = ConfigSpace(
            vendor=pages.VENDOR,
            device=pages.DEVICE,
            class_code=spec.PCI_CLASS,
            bars={spec.BAR: BarSpec(spec.BAR_SIZE)},
            msix=MsixSpec(identity.vectors, spec.BAR, spec.MSIX_TABLE_OFFSET, spec.MSIX_PBA_OFFSET),
            on_reset=self._function_reset,
        )
        self.msix: Final = MsixTable(identity.vectors)
        self.used_blocks: dict[int, int] = {}
        self.now = 0
        self.cc = self.csts = 0
        self.fatal_reason = ""
        self._aqa = self._asq = self._acq = self._intms = 0
        self.sqs: dict[int, SubmissionQueue] = {}
        self.cqs: dict[int, CompletionQueue] = {}
        self._interrupts = Interrupts(self.config, self.msix, self.features)
        self._trace: Final = trace or off()
        self.dma = DmaEngine(self._trace)
        self.transfers = Transfers(self)
        self.memory = staging
        self._resetting = False
        self._shutting = False
        self._media: dict[int, Callable[[MediaResult], None] | None] = {}
        self._media_tokens = itertools.count(1)
        self._requests: list[MediaRequest] = []
        self._clears: list[tuple[int, int]] = []
        self._admin = AdminCommands(self)
        self._io = IoCommands(self)
        self._fresh()

    def _fresh(self) -> None:
        """No command, no buffer."""
        self.staging = Staging(self.memory, self.max_transfer)
        self._entry_pages = [self.staging.allocate(PAGE) for _ in range(MAX_BATCHES)]
        self.tasks = 0
        self._completing: deque[Task] = deque()
        self._turn = 0

    # -- registers ------------------------------------------------------------------------------------------------

    def access(self, now: int, space: int, offset: int, size: int, value: int | None) -> int:
        """Read (`value` None) or write; the value read. `space`: -1 configuration, 0 the registers; others are not there."""
        self.now = now
        ones = ONES >> 64 - 8 * size
        if space == -1:
            if value is None:
                return self.config.read(offset, size)
            self.config.write(offset, size, value)
            self._unmasked()
            return 0
        if space != spec.BAR or offset < 0 or offset + size > spec.BAR_SIZE:
            return ones
        if offset >= spec.MSIX_TABLE_OFFSET:
            return self._msix_access(offset, size, value)
        if not self.config.memory_enabled:
            return ones
        if offset >= spec.DOORBELL_OFFSET:
            if value is not None and size == 4 and not offset & 3:
                self._ring(offset - spec.DOORBELL_OFFSET >> 2, value)
            return 0
        if value is None:
            low = self._read(offset & ~3) | self._read((offset & ~3) + 4) << 32
            return low >> 8 * (offset & 3) & ones
        if size >= 4 and not offset & 3:
            self._write(offset, value & 0xFFFF_FFFF)
            if size == 8:
                self._write(offset + 4, value >> 32)
        return 0

    def _msix_access(self, offset: int, size: int, value: int | None) -> int:
        pending = offset >= spec.MSIX_PBA_OFFSET
        if value is None:
            if pending:
                return self.msix.read_pending(offset - spec.MSIX_PBA_OFFSET, size)
            return self.msix.read(offset - spec.MSIX_TABLE_OFFSET, size)
        if not pending:
            self.msix.write(offset - spec.MSIX_TABLE_OFFSET, size, value)
            self._unmasked()
        return 0

    @property
    def _cap(self) -> int:
        return (self.identity.max_queue - 1) | spec.CAP_CQR | 20 << spec.CAP_TO_SHIFT | spec.CAP_CSS_NVM

    def _read(self, offset: int) -> int:
        low = 0xFFFF_FFFF
        values = {
            spec.REG_CAP: self._cap & low,
            spec.REG_CAP + 4: self._cap >> 32,
            spec.REG_VS: spec.VERSION_1_4,
            spec.REG_INTMS: self._intms,
            spec.REG_INTMC: self._intms,
            spec.REG_CC: self.cc,
            spec.REG_CSTS: self.csts,
            spec.REG_AQA: self._aqa,
            spec.REG_ASQ: self._asq & low,
            spec.REG_ASQ + 4: self._asq >> 32,
            spec.REG_ACQ: self._acq & low,
            spec.REG_ACQ + 4: self._acq >> 32,
        }
        return values.get(offset, 0)

    def _write(self, offset: int, value: int) -> None:
        if offset == spec.REG_INTMS:
            self._intms |= value  # without effect: interrupts are MSI-X only (section 3.1.3)
        elif offset == spec.REG_INTMC:
            self._intms &= ~value
        elif offset == spec.REG_CC:
            self._write_cc(value & 0x00FF_FFF1)
        elif offset == spec.REG_AQA:
            self._aqa = value & 0x0FFF_0FFF
        elif offset == spec.REG_ASQ:
            self._asq = self._asq & ~0xFFFF_FFFF | value & ~0xFFF
        elif offset == spec.REG_ASQ + 4:
            self._asq = self._asq & 0xFFFF_FFFF | value << 32
        elif offset == spec.REG_ACQ:
            self._acq = self._acq & ~0xFFFF_FFFF | value & ~0xFFF
        elif offset == spec.REG_ACQ + 4:
            self._acq = self._acq & 0xFFFF_FFFF | value << 32

    # -- life cycle (sections 3.1.5, 7.3, 7.6) ---------------------------------------------------------------------

    def _write_cc(self, value: int) -> None:
        before, self.cc = self.cc, value
        if before & spec.CC_EN and not value & spec.CC_EN:
            self._reset()
        elif value & spec.CC_EN and not before & spec.CC_EN and not self._resetting:
            self._enable()
        if value & spec.CC_SHN_MASK and not before & spec.CC_SHN_MASK:
            self.csts = self.csts & ~spec.CSTS_SHST_MASK | spec.SHST_OCCURRING << spec.CSTS_SHST_SHIFT
            self._shutting = True
        elif before & spec.CC_SHN_MASK and not value & spec.CC_SHN_MASK and not (before | value) & spec.CC_EN:
            # Shut down while it was disabled, and that taken back: there is no reset that would say so.
            self.csts &= ~spec.CSTS_SHST_MASK
            self._shutting = False

    def _enable(self) -> None:
        cc = self.cc
        sq_size, cq_size = (self._aqa & 0xFFF) + 1, (self._aqa >> 16 & 0xFFF) + 1
        unsupported = (
            cc >> spec.CC_MPS_SHIFT & 0xF or cc >> spec.CC_CSS_SHIFT & 7 or cc >> spec.CC_AMS_SHIFT & 7
        )
        if unsupported or sq_size < 2 or cq_size < 2:
            self._fatal("enabled with values that the controller does not have")
            return
        self.cqs[0] = CompletionQueue(0, self._acq, cq_size, 0, True)
        self.sqs[0] = SubmissionQueue(0, self._asq, sq_size, self.cqs[0])
        self.cqs[0].users = 1
        self._clears.append((0, spec.DOORBELL_LENGTH))
        self.csts |= spec.CSTS_RDY

    def _reset(self) -> None:
        """CC.EN was cleared: RDY follows when nothing of the old life is under way."""
        self.sqs.clear()
        self.cqs.clear()
        self._completing.clear()
        self.transfers.reset()
        self._interrupts.reset()
        untaken = {request.token for request in self._requests}
        self._media = dict.fromkeys(token for token in self._media if token not in untaken)
        self._requests.clear()
        self.dma.reset()
        self._admin.reset()
        self.features.reset()
        self._shutting = False
        self._resetting = True
        self._quiet()

    def _quiet(self) -> None:
        if self._resetting and not self.dma.flying and not self._media:
            self._resetting = False
            self.csts = 0
            self.fatal_reason = ""
            self._fresh()
            if self.cc & spec.CC_EN:
                self._enable()

    def _function_reset(self) -> None:
        """Function-level reset by configuration space; `config` is reset already."""
        self.msix.reset()
        self.cc = self._aqa = self._asq = self._acq = self._intms = 0
        self._reset()

    def _fatal(self, why: str) -> None:
        """Controller fatal status: nothing goes on until a reset."""
        self.csts |= spec.CSTS_CFS
        self.fatal_reason = why
        self.dma.reset()

    @property
    def _works(self) -> bool:
        return self.csts & (spec.CSTS_RDY | spec.CSTS_CFS) == spec.CSTS_RDY and not self._resetting

    def _go_on_shutting(self) -> None:
        """Shutdown: when the commands are done, the caches are written."""
        if (self.tasks or self._completing) and not self.csts & spec.CSTS_CFS:
            return
        self._shutting = False
        left = sorted(self.identity.namespaces)

        def next_one(result: MediaResult) -> None:
            if left:
                token = next(self._media_tokens)
                self._media[token] = next_one
                self._requests.append(MediaRequest(token, MediaOp.FLUSH, left.pop(0)))
            elif self.cc & spec.CC_SHN_MASK:
                self.csts = self.csts & ~spec.CSTS_SHST_MASK | spec.SHST_COMPLETE << spec.CSTS_SHST_SHIFT

        next_one(MediaResult.OK)

    # -- doorbells ------------------------------------------------------------------------------------------------

    def doorbells(self, now: int, words: memoryview) -> None:
        """Look at the doorbell page (32-bit words): a value that changed is a write to that doorbell."""
        self.now = now
        if not self._works:
            return
        queues: list[tuple[CompletionQueue | SubmissionQueue, int]] = []
        queues += [(cq, 2 * cq.qid + 1) for cq in self.cqs.values()]
        queues += [(sq, 2 * sq.qid) for sq in self.sqs.values()]
        for queue, index in queues:
            value = words[index]
            if value != queue.seen and not self._stale(index):
                queue.seen = value
                self._ring(index, value)

    def _stale(self, index: int) -> bool:
        """The word is of a queue that is gone: its clearing is asked for (`take_clears`) and not done. The driver cannot have
        rung for the new queue, because it does not know yet that there is one."""
        return any(start <= 4 * index < start + length for start, length in self._clears)

    def _ring(self, index: int, value: int) -> None:
        if not self._works:
            return
        value &= 0xFFFF
        qid = index >> 1
        if index & 1:
            cq = self.cqs.get(qid)
            if cq is not None:
                if not cq.consumed(value):
                    self._admin.event(spec.EVENT_ERROR, spec.ERROR_BAD_DOORBELL_VALUE)
                elif qid == 0:
                    self._admin.deliver()
                return
        else:
            sq = self.sqs.get(qid)
            if sq is not None:
                if value >= sq.size:
                    self._admin.event(spec.EVENT_ERROR, spec.ERROR_BAD_DOORBELL_VALUE)
                else:
                    sq.tail = value
                return
        self._admin.event(spec.EVENT_ERROR, spec.ERROR_BAD_DOORBELL_REGISTER)

    def clear_doorbell(self, offset: int) -> None:
        """A queue was created: its doorbell begins at 0 (offset in the BAR)."""
        self._clears.append((offset - spec.DOORBELL_OFFSET, 4))

    def take_clears(self) -> list[tuple[int, int]]:
        """Effect: (offset, length) to zero in the doorbell page, before any answer goes out."""
        clears, self._clears = self._clears, []
        return clears

    # -- fetching and starting commands ---------------------------------------------------------------------------

    def _fetch(self) -> None:
        queues = list(self.sqs.values())
        self._turn += 1
        for step in range(len(queues)):
            sq = queues[(self._turn + step) % len(queues)]
            count = min(sq.waiting, sq.cq.room, FETCH_BURST, MAX_TASKS - self.tasks)
            if count <= 0 or sq.fetching or sq.deleter is not None:
                continue
            try:
                position = self.staging.allocate(PAGE)
            except StagingFull:
                return
            straight = min(count, sq.size - sq.head)
            size = spec.SQE_SIZE
            items: list[Item] = [(sq.base + size * sq.head, size * straight, False, position)]
            if count > straight:
                items.append((sq.base, size * (count - straight), False, position + size * straight))
            sq.fetching = True
            sq.cq.reserved += count
            sq.count += count
            self.tasks += count
            bad = partial(self._fatal, f"submission queue {sq.qid} cannot be read")
            tag = (Purpose.SUBMISSION, sq.qid, NO_COMMAND)
            self.dma.add([Unit(items, partial(self._fetched, sq, position, count), bad, tag)])

    def _fetched(self, sq: SubmissionQueue, position: int, count: int) -> None:
        size = spec.SQE_SIZE
        unpack = spec.COMMAND.unpack
        commands = [unpack(self.memory, position + size * i) for i in range(count)]
        self.staging.release(position)
        sq.fetching = False
        sq.head = (sq.head + count) % sq.size
        start = self._io.start if sq.qid else self._admin.start
        for command in commands:
            if self._trace.on[0]:
                note_fetched(self._trace, sq.qid, command)
            task = Task(sq, command)
            if command.cid in sq.active:
                self.complete(task, Status.CID_CONFLICT)
                continue
            sq.active[command.cid] = task
            task.registered = True
            # Fused commands are not supported, nor SGLs of admin commands; the rest of the byte is reserved.
            if command.flags and (command.flags != spec.FLAG_SGL or not sq.qid):
                task.error_location = 1
                self.complete(task, Status.INVALID_FIELD)
            else:
                start(task)

    # -- media ----------------------------------------------------------------------------------------------------

    def media(
        self,
        task: Task,
        then: Callable[[Task, MediaResult], None],
        op: MediaOp,
        *,
        nsid: int | None = None,
        offset: int = 0,
        length: int = 0,
        position: int = 0,
        durable: bool = False,
        deallocate: bool = False,
    ) -> None:
        """Ask the medium; `then` gets the result."""
        token = next(self._media_tokens)
        target = task.command.nsid if nsid is None else nsid
        self._media[token] = partial(then, task)
        self._requests.append(MediaRequest(token, op, target, offset, length, position, durable, deallocate))

    def flush_all(self, task: Task) -> None:
        """Flush every namespace, then answer the task."""
        left = sorted(self.identity.namespaces)

        def next_one(task: Task, result: MediaResult) -> None:
            if result is not MediaResult.OK:
                self.complete(task, Status.INTERNAL_ERROR)
            elif left:
                self.media(task, next_one, MediaOp.FLUSH, nsid=left.pop(0))
            else:
                self.complete(task, Status.SUCCESS)

        next_one(task, MediaResult.OK)

    def take_media(self, count: int = MAX_TASKS, size: int = ALL) -> list[MediaRequest]:
        """Effect: what the media have to do: so many requests, or bytes, at the most, but one at least. What is left is forgotten by a
        reset."""
        if self._shutting and not self._resetting:
            self._go_on_shutting()
        requests = self._requests
        stop = 0
        for request in requests[:count]:
            stop += 1
            size -= request.length
            if size <= 0:
                break
        taken, self._requests = requests[:stop], requests[stop:]
        return taken

    @property
    def media_left(self) -> bool:
        """There are requests to take."""
        return bool(self._requests)

    def media_done(self, now: int, token: int, result: MediaResult) -> None:
        """A medium's answer. Unknown tokens are dropped."""
        self.now = now
        then = self._media.pop(token, None)
        if then is not None:
            then(result)
        self._quiet()

    # -- completing -----------------------------------------------------------------------------------------------

    def complete(self, task: Task, status: Status) -> None:
        """Answer the command; its data goes to memory first if it was successful."""
        task.status = status
        self._completing.append(task)

    def park(self, task: Task) -> None:
        """The command will wait without bound: it gives its completion slot back."""
        task.sq.cq.reserved -= 1
        self.tasks -= 1

    def unpark(self, task: Task) -> bool:
        """It goes on, if there is a slot."""
        if task.sq.cq.room < 1:
            return False
        task.sq.cq.reserved += 1
        self.tasks += 1
        return True

    def queue_quiet(self, sq: SubmissionQueue) -> None:
        """If a queue that is being deleted has nothing under way, finish that."""
        if sq.deleter is not None and not sq.count and not sq.fetching:
            self._admin.finish_delete(sq)

    def _status_field(self, task: Task, phase: int) -> int:
        if task.status == Status.SUCCESS:
            return phase
        field = task.status << 1 | phase | spec.STATUS_MORE
        if task.status not in spec.MAY_RETRY:
            field |= spec.STATUS_DNR
        self._admin.record_error(task, field)
        return field

    def _build(self) -> None:
        """Completions: data, then entries, then vectors, in as few batches as there can be."""
        while self._completing and self._entry_pages and self.dma.room:
            page = self._entry_pages.pop()
            room = MAX_ITEMS - 2 * len(self.cqs)
            units: list[Unit] = []
            by_queue: dict[int, list[Task]] = {}
            count = 0
            while self._completing and count < ENTRIES_PER_PAGE:
                task = self._completing[0]
                if task.to_memory and task.status == Status.SUCCESS:
                    items = merge(task.segments, True, task.position)
                    room -= len(items)
                    if room < 0:
                        break
                    tag = (Purpose.DATA, task.sq.qid, task.command.cid)
                    units.append(Unit(items, _nothing, partial(self._data_failed, task), tag))
                self._completing.popleft()
                by_queue.setdefault(task.sq.cq.qid, []).append(task)
                count += 1
            vectors: list[int] = []
            position = page
            for qid, tasks in by_queue.items():
                cq = self.cqs[qid]
                items = self._entries(cq, tasks, position)
                position += spec.CQE_SIZE * len(tasks)
                bad = partial(self._fatal, f"completion queue {qid} cannot be written")
                tag = (Purpose.COMPLETION, tasks[0].sq.qid, tasks[0].command.cid)
                units.append(Unit(items, partial(self._posted, cq, tasks), bad, tag))
                if cq.enabled and self._interrupts.at_once(cq.vector):
                    vectors += self._interrupts.raise_vector(cq.vector)
            last = units[-1]
            units[-1] = Unit(last.items, partial(self._page_free, last.ok, page), last.bad, last.tag)
            self.dma.add(units, vectors)

    def _entries(self, cq: CompletionQueue, tasks: list[Task], position: int) -> list[Item]:
        """Write completion entries to the staging memory; the items that carry them to the queue."""
        runs: list[tuple[int, int]] = []
        start = position
        for task in tasks:
            address, phase = cq.take_slot()
            cq.reserved -= 1
            task.slot = position
            sq = task.sq
            field = self._status_field(task, phase)
            _PACK_CQE(self.memory, position, task.dw0, 0, sq.head, sq.qid, task.command.cid, field)
            runs.append((address, spec.CQE_SIZE))
            position += spec.CQE_SIZE
        return merge(runs, True, start)

    def _data_failed(self, task: Task) -> None:
        """The data of a read could not be written: its completion entry, which is still here, says so."""
        task.status = Status.DATA_TRANSFER_ERROR
        place = task.slot + spec.COMPLETION.offset("status")
        field = self._status_field(task, self.memory[place] & spec.STATUS_PHASE)
        struct.pack_into("<H", self.memory, place, field)

    def _page_free(self, ok: Callable[[], None], page: int) -> None:
        self._entry_pages.append(page)
        ok()

    def _posted(self, cq: CompletionQueue, tasks: list[Task]) -> None:
        """Entries are in the driver's memory: the commands are over."""
        for task in tasks:
            sq = task.sq
            if self._trace.on[0]:
                self._trace.add(Kind.POSTED, sq.qid, 0, task.command.cid, task.status)
            if task.position >= 0:
                self.staging.release(task.position)
            if task.registered:
                del sq.active[task.command.cid]
            sq.count -= 1
            self.tasks -= 1
            if sq.deleter is not None:
                self.queue_quiet(sq)
        if cq.enabled:
            self.dma.add([], self._interrupts.posted(self.now, cq.vector, len(tasks)))
        self.transfers.go_on()

    # -- time and interrupts --------------------------------------------------------------------------------------

    def _unmasked(self) -> None:
        for vector in self._interrupts.unmasked():
            self.dma.add([], [vector])

    def tick(self, now: int) -> None:
        """Time has passed: interrupts that were gathered long enough."""
        self.now = now
        self.dma.add([], self._interrupts.due(now))

    def next_deadline(self) -> int | None:
        """When `tick` has something to do."""
        return self._interrupts.deadline()

    # -- DMA ------------------------------------------------------------------------------------------------------

    def take_batches(self) -> list[DmaBatch]:
        """Effect: DMA to carry out. Call it when the media have nothing to do, or did a good part of it."""
        if self._works:
            self._build()
            if self.dma.room and not self._shutting and not self.csts & spec.CSTS_SHST_MASK:
                self._fetch()
        if not self.config.bus_master or self.csts & spec.CSTS_CFS or self._resetting:
            return []
        return self.dma.take()

    def release(self) -> None:
        """The end: no view of the staging memory is held any more, and no call may follow."""
        self._reset()
        self.memory = self.staging.view = memoryview(b"")

    @property
    def busy(self) -> bool:
        """There is DMA or media I/O under way."""
        return bool(self.dma.flying or self._media)

    def dma_done(self, now: int, token: int, fault: int) -> None:
        """The hypervisor's answer to a batch: `fault` -1, the index of the item that faulted, or FFFFh (a vector)."""
        self.now = now
        self.dma.done(token, fault)
        self._quiet()


_PACK_CQE: Final = struct.Struct("<IIHHHH").pack_into


def _nothing() -> None:
    """Nothing follows."""
