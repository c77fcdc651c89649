"""Admin commands (NVMe 1.4, section 5)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from drivers.hw.nvme import pages, spec
from drivers.hw.nvme.features import FeatureError
from drivers.hw.nvme.queues import CompletionQueue, SubmissionQueue, Task
from drivers.hw.nvme.spec import AdminOpcode, Cns, Feature, LogPage, Status

if TYPE_CHECKING:
    from drivers.hw.nvme.controller import Controller

PAGE = 4096


class AdminCommands:
    """Carries out commands of the admin queue, and keeps the logs and asynchronous events."""

    def __init__(self, controller: Controller) -> None:
        self._c = controller
        self._events: deque[Task] = deque()
        self._pending: dict[int, int] = {}
        self._masked: set[int] = set()
        self.errors: deque[bytes] = deque(maxlen=pages.ERROR_LOG_ENTRIES)
        self._table = {
            int(AdminOpcode.DELETE_SQ): self._delete_sq,
            int(AdminOpcode.CREATE_SQ): self._create_sq,
            int(AdminOpcode.DELETE_CQ): self._delete_cq,
            int(AdminOpcode.CREATE_CQ): self._create_cq,
            int(AdminOpcode.GET_LOG_PAGE): self._get_log,
            int(AdminOpcode.IDENTIFY): self._identify,
            int(AdminOpcode.ABORT): self._abort,
            int(AdminOpcode.SET_FEATURES): self._set_features,
            int(AdminOpcode.GET_FEATURES): self._get_features,
            int(AdminOpcode.ASYNC_EVENT): self._async_event,
        }

    def reset(self) -> None:
        """Controller reset: parked events are gone with their queue; the error log stays."""
        self._events.clear()
        self._pending.clear()
        self._masked.clear()

    def start(self, task: Task) -> None:
        """Begin; sooner or later the controller's `complete` is called."""
        handler = self._table.get(task.command.opcode)
        if handler is None:
            self._c.complete(task, Status.INVALID_OPCODE)
        else:
            handler(task)

    # -- queues (5.3 to 5.6) --------------------------------------------------------------------------------------

    def _create_cq(self, task: Task) -> None:
        c, cmd = self._c, task.command
        qid, size, vector = cmd.cdw10 & 0xFFFF, (cmd.cdw10 >> 16) + 1, cmd.cdw11 >> 16
        if not 1 <= qid <= c.identity.queues or qid in c.cqs:
            c.complete(task, Status.INVALID_QID)
        elif not 2 <= size <= c.identity.max_queue or c.cc >> spec.CC_IOCQES_SHIFT & 0xF != spec.CQE_SHIFT:
            c.complete(task, Status.INVALID_QUEUE_SIZE)
        elif vector >= c.identity.vectors:
            c.complete(task, Status.INVALID_VECTOR)
        elif not cmd.cdw11 & spec.QUEUE_PC:
            c.complete(task, Status.INVALID_FIELD)
        elif cmd.prp1 & PAGE - 1:
            c.complete(task, Status.INVALID_PRP_OFFSET)
        else:
            c.cqs[qid] = CompletionQueue(qid, cmd.prp1, size, vector, bool(cmd.cdw11 & spec.CQ_IEN))
            c.clear_doorbell(spec.cq_doorbell(qid))
            c.complete(task, Status.SUCCESS)

    def _create_sq(self, task: Task) -> None:
        c, cmd = self._c, task.command
        qid, size, cqid = cmd.cdw10 & 0xFFFF, (cmd.cdw10 >> 16) + 1, cmd.cdw11 >> 16
        if not 1 <= qid <= c.identity.queues or qid in c.sqs:
            c.complete(task, Status.INVALID_QID)
        elif not 2 <= size <= c.identity.max_queue or c.cc >> spec.CC_IOSQES_SHIFT & 0xF != spec.SQE_SHIFT:
            c.complete(task, Status.INVALID_QUEUE_SIZE)
        elif not 1 <= cqid <= c.identity.queues:
            c.complete(task, Status.INVALID_QID)
        elif cqid not in c.cqs:
            c.complete(task, Status.CQ_INVALID)
        elif not cmd.cdw11 & spec.QUEUE_PC:
            c.complete(task, Status.INVALID_FIELD)
        elif cmd.prp1 & PAGE - 1:
            c.complete(task, Status.INVALID_PRP_OFFSET)
        else:
            cq = c.cqs[cqid]
            cq.users += 1
            c.sqs[qid] = SubmissionQueue(qid, cmd.prp1, size, cq)
            c.clear_doorbell(spec.sq_doorbell(qid))
            c.complete(task, Status.SUCCESS)

    def _delete_sq(self, task: Task) -> None:
        """Entries that were not fetched are dropped; commands under way are answered first."""
        sq = self._c.sqs.get(task.command.cdw10 & 0xFFFF)
        if sq is None or sq.qid == 0 or sq.deleter is not None:
            self._c.complete(task, Status.INVALID_QID)
            return
        sq.deleter = task
        self._c.queue_quiet(sq)

    def finish_delete(self, sq: SubmissionQueue) -> None:
        """Nothing of it is under way any more."""
        assert sq.deleter is not None
        del self._c.sqs[sq.qid]
        sq.cq.users -= 1
        self._c.complete(sq.deleter, Status.SUCCESS)

    def _delete_cq(self, task: Task) -> None:
        qid = task.command.cdw10 & 0xFFFF
        cq = self._c.cqs.get(qid)
        if cq is None or qid == 0:
            self._c.complete(task, Status.INVALID_QID)
        elif cq.users:
            self._c.complete(task, Status.INVALID_QUEUE_DELETION)
        else:
            del self._c.cqs[qid]
            self._c.complete(task, Status.SUCCESS)

    # -- identify and logs ----------------------------------------------------------------------------------------

    def _identify(self, task: Task) -> None:
        identity, nsid = self._c.identity, task.command.nsid
        cns = task.command.cdw10 & 0xFF
        space = identity.namespaces.get(nsid)
        if cns == Cns.CONTROLLER:
            self._c.transfers.send(task, pages.controller(identity))
        elif cns == Cns.ACTIVE_NAMESPACES:
            if nsid >= 0xFFFF_FFFE:
                self._c.complete(task, Status.INVALID_NAMESPACE)
            else:
                self._c.transfers.send(task, pages.active_list(identity, nsid))
        elif cns == Cns.NAMESPACE:
            highest = max(identity.namespaces, default=1)
            if space is not None:
                used = self._c.used_blocks.get(nsid, space.blocks)
                self._c.transfers.send(task, pages.namespace(identity, space, used))
            elif nsid == spec.NSID_ALL or not 1 <= nsid <= highest:
                self._c.complete(task, Status.INVALID_NAMESPACE)
            else:  # an inactive namespace: zeroes
                self._c.transfers.send(task, bytes(spec.IDENTIFY_SIZE))
        elif cns == Cns.NAMESPACE_DESCRIPTORS:
            if space is None:
                self._c.complete(task, Status.INVALID_NAMESPACE)
            else:
                self._c.transfers.send(task, pages.descriptors(identity, nsid))
        else:
            self._c.complete(task, Status.INVALID_FIELD)

    def _get_log(self, task: Task) -> None:
        cmd = task.command
        length = 4 * ((cmd.cdw10 >> 16 | (cmd.cdw11 & 0xFFFF) << 16) + 1)
        offset = cmd.cdw12 | cmd.cdw13 << 32
        if cmd.nsid not in (0, spec.NSID_ALL) and cmd.cdw10 & 0xFF == LogPage.SMART:
            self._c.complete(task, Status.INVALID_FIELD)  # SMART is of the controller (LPA bit 0 clear)
            return
        log = self._log(cmd.cdw10 & 0xFF)
        if log is None:
            self._c.complete(task, Status.INVALID_LOG_PAGE)
        elif length > self._c.max_transfer or offset & 3 or offset > len(log):
            self._c.complete(task, Status.INVALID_FIELD)
        else:
            if not cmd.cdw10 & 1 << 15:  # not: retain asynchronous event
                self._read_event(cmd.cdw10 & 0xFF)
            self._c.transfers.send(task, log[offset : offset + length].ljust(length, b"\0"))

    def _log(self, lid: int) -> bytes | None:
        if lid == LogPage.ERROR:
            size = pages.ERROR_LOG_ENTRIES * spec.ERROR_ENTRY.size
            return b"".join(reversed(self.errors)).ljust(size, b"\0")
        if lid == LogPage.SMART:
            return pages.smart(self._c.counters, self._c.now, self._c.features.too_hot)
        if lid == LogPage.FIRMWARE_SLOT:
            return pages.firmware()
        return None

    def record_error(self, task: Task, status_field: int) -> None:
        """A command failed: an entry of the error log."""
        self._c.counters.errors += 1
        entry = spec.ERROR_ENTRY.zero()._replace(
            error_count=self._c.counters.errors,
            sqid=task.sq.qid,
            cid=task.command.cid,
            status=status_field,
            location=task.error_location,
            lba=task.lba if task.sq.qid else 0,
            nsid=task.command.nsid,
        )
        self.errors.append(spec.ERROR_ENTRY.pack(entry))

    # -- features -------------------------------------------------------------------------------------------------

    def _set_features(self, task: Task) -> None:
        cmd = task.command
        fid = cmd.cdw10 & 0xFF
        try:
            io_queues = len(self._c.sqs) > 1 or len(self._c.cqs) > 1
            task.dw0 = self._c.features.set(fid, bool(cmd.cdw10 >> 31), cmd.cdw11, io_queues)
        except FeatureError as error:
            self._c.complete(task, error.status)
            return
        if fid == Feature.VOLATILE_WRITE_CACHE and not self._c.features.write_cache:
            self._c.flush_all(task)  # what the cache holds is written before it is off
            return
        if fid in (Feature.TEMPERATURE_THRESHOLD, Feature.ASYNC_EVENT) and self._c.features.too_hot:
            self.event(spec.EVENT_SMART, spec.SMART_TEMPERATURE)
        self._c.complete(task, Status.SUCCESS)

    def _get_features(self, task: Task) -> None:
        cmd = task.command
        try:
            task.dw0 = self._c.features.get(cmd.cdw10 & 0xFF, cmd.cdw10 >> 8 & 7, cmd.cdw11)
        except FeatureError as error:
            self._c.complete(task, error.status)
            return
        self._c.complete(task, Status.SUCCESS)

    # -- abort and asynchronous events (5.1, 5.2) -----------------------------------------------------------------

    def _abort(self, task: Task) -> None:
        """Only what waits can be aborted: asynchronous event requests, and commands without a buffer yet."""
        sq = self._c.sqs.get(task.command.cdw10 & 0xFFFF)
        victim = sq.active.get(task.command.cdw10 >> 16) if sq is not None else None
        task.dw0 = 1
        if victim is not None and victim in self._events:
            if self._c.unpark(victim):
                self._events.remove(victim)
                self._c.complete(victim, Status.ABORT_REQUESTED)
                task.dw0 = 0
        elif victim is not None and self._c.transfers.stop_waiting(victim):
            self._c.complete(victim, Status.ABORT_REQUESTED)
            task.dw0 = 0
        self._c.complete(task, Status.SUCCESS)

    def _async_event(self, task: Task) -> None:
        if len(self._events) >= pages.ASYNC_LIMIT:
            self._c.complete(task, Status.ASYNC_EVENT_LIMIT)
            return
        self._events.append(task)
        self._c.park(task)
        self.deliver()

    def event(self, kind: int, information: int) -> None:
        """Something happened. At most one event of a kind waits."""
        if kind == spec.EVENT_SMART and not self._c.features.async_events & 1 << information:
            return
        if kind not in self._masked:
            self._pending.setdefault(kind, information)
            self.deliver()

    def deliver(self) -> None:
        """Answer parked requests with what waits, while there is room in the admin completion queue."""
        for kind in sorted(self._pending):
            if not self._events or not self._c.unpark(self._events[0]):
                return
            task = self._events.popleft()
            information = self._pending.pop(kind)
            self._masked.add(kind)
            page = LogPage.SMART if kind == spec.EVENT_SMART else LogPage.ERROR
            task.dw0 = kind | information << 8 | page << 16
            self._c.complete(task, Status.SUCCESS)

    def _read_event(self, lid: int) -> None:
        """The log page of an event was read: events of that kind may come again."""
        if lid == LogPage.ERROR:
            self._masked.discard(spec.EVENT_ERROR)
        elif lid == LogPage.SMART:
            self._masked.discard(spec.EVENT_SMART)
            if self._c.features.too_hot:
                self.event(spec.EVENT_SMART, spec.SMART_TEMPERATURE)
