"""The NVM command set (NVMe 1.4, section 6): what a read, write, flush ... does, step by step."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

from drivers.hw.nvme import spec
from drivers.hw.nvme.pages import Namespace
from drivers.hw.nvme.queues import Task
from drivers.hw.nvme.spec import IoOpcode, Status

if TYPE_CHECKING:
    from drivers.hw.nvme.controller import Controller


class MediaOp(enum.Enum):
    """What a medium is asked."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    FLUSH = "flush"
    COMPARE = "compare"


class MediaRequest(NamedTuple):
    """Effect: do this and call `Controller.media_done` with the token. Bytes; `position` is in the staging memory. `flag`: durable
    (WRITE, ZERO); `deallocate` (ZERO). COMPARE reads and compares with the staging memory."""

    token: int
    op: MediaOp
    nsid: int
    offset: int = 0
    length: int = 0
    position: int = 0
    durable: bool = False
    deallocate: bool = False


class MediaResult(enum.Enum):
    """How it went."""

    OK = "ok"
    FAILED = "failed"
    FULL = "full"
    MISCOMPARE = "miscompare"


MAX_BATCH_DISCARDS: Final = spec.DSM_MAX_RANGES


class IoCommands:
    """Carries out commands of I/O queues."""

    def __init__(self, controller: Controller) -> None:
        self._c = controller
        self._table = {
            int(IoOpcode.FLUSH): self._flush,
            int(IoOpcode.READ): self._read,
            int(IoOpcode.WRITE): self._write,
            int(IoOpcode.COMPARE): self._compare,
            int(IoOpcode.WRITE_ZEROES): self._write_zeroes,
            int(IoOpcode.DATASET_MANAGEMENT): self._dsm,
        }

    def start(self, task: Task) -> None:
        """Begin; sooner or later the controller's `complete` is called."""
        handler = self._table.get(task.command.opcode)
        if handler is None:
            self._c.complete(task, Status.INVALID_OPCODE)
        else:
            handler(task)

    def _space(self, task: Task) -> Namespace | None:
        space = self._c.identity.namespaces.get(task.command.nsid)
        if space is None:
            self._c.complete(task, Status.INVALID_NAMESPACE)
        return space

    def _range(self, task: Task, space: Namespace) -> int:
        """Bytes that LBA and NLB name; 0 if the command was answered: they are out of range."""
        blocks = (task.command.cdw12 & 0xFFFF) + 1
        if task.lba + blocks > space.blocks:
            self._c.complete(task, Status.LBA_OUT_OF_RANGE)
            return 0
        return blocks << space.shift

    def _transfer(self, task: Task) -> Namespace | None:
        """What read, write and compare have in common; None: it was answered."""
        space = self._space(task)
        if space is None:
            return None
        if (((task.command.cdw12 & 0xFFFF) + 1) << space.shift) > self._c.max_transfer:
            self._c.complete(task, Status.INVALID_FIELD)
            return None
        task.length = self._range(task, space)
        return space if task.length else None

    def _read(self, task: Task) -> None:
        space = self._transfer(task)
        if space is not None:
            task.to_memory = True
            self._c.transfers.with_prps(task, self._read_media)

    def _read_media(self, task: Task) -> None:
        shift = self._c.identity.namespaces[task.command.nsid].shift
        self._c.media(
            task,
            self._read_done,
            MediaOp.READ,
            offset=task.lba << shift,
            length=task.length,
            position=task.position,
        )

    def _read_done(self, task: Task, result: MediaResult) -> None:
        if result is MediaResult.OK:
            self._c.counters.reads += 1
            self._c.counters.sectors_read += task.length >> 9
            self._c.complete(task, Status.SUCCESS)
        else:
            self._c.counters.media_errors += 1
            self._c.complete(task, Status.UNRECOVERED_READ)

    def _writable(self, task: Task, space: Namespace) -> bool:
        if space.read_only:
            self._c.complete(task, Status.NAMESPACE_WRITE_PROTECTED)
        return not space.read_only

    def _durable(self, task: Task) -> bool:
        return bool(task.command.cdw12 & spec.IO_FUA) or not self._c.features.write_cache

    def _write(self, task: Task) -> None:
        space = self._transfer(task)
        if space is not None and self._writable(task, space):
            self._c.transfers.with_prps(
                task, lambda task: self._c.transfers.fetch_data(task, self._write_media)
            )

    def _write_media(self, task: Task) -> None:
        shift = self._c.identity.namespaces[task.command.nsid].shift
        self._c.media(
            task,
            self._written,
            MediaOp.WRITE,
            offset=task.lba << shift,
            length=task.length,
            position=task.position,
            durable=self._durable(task),
        )

    def _written(self, task: Task, result: MediaResult) -> None:
        if result is MediaResult.OK:
            self._c.counters.writes += 1
            self._c.counters.sectors_written += task.length >> 9
        self._changed(task, result)

    def _changed(self, task: Task, result: MediaResult) -> None:
        if result is MediaResult.OK:
            self._c.complete(task, Status.SUCCESS)
            return
        self._c.counters.media_errors += 1
        self._c.complete(task, Status.CAPACITY_EXCEEDED if result is MediaResult.FULL else Status.WRITE_FAULT)

    def _compare(self, task: Task) -> None:
        if self._transfer(task) is not None:
            self._c.transfers.with_prps(
                task, lambda task: self._c.transfers.fetch_data(task, self._compare_media)
            )

    def _compare_media(self, task: Task) -> None:
        shift = self._c.identity.namespaces[task.command.nsid].shift
        self._c.media(
            task,
            self._compared,
            MediaOp.COMPARE,
            offset=task.lba << shift,
            length=task.length,
            position=task.position,
        )

    def _compared(self, task: Task, result: MediaResult) -> None:
        if result is MediaResult.MISCOMPARE:
            self._c.complete(task, Status.COMPARE_FAILURE)
        else:
            self._read_done(task, result)

    def _write_zeroes(self, task: Task) -> None:
        space = self._space(task)
        if space is None or not self._writable(task, space):
            return
        length = self._range(task, space)
        if length:
            self._c.media(
                task,
                self._changed,
                MediaOp.ZERO,
                offset=task.lba << space.shift,
                length=length,
                durable=self._durable(task),
                deallocate=bool(task.command.cdw12 & spec.IO_DEAC),
            )

    def _flush(self, task: Task) -> None:
        """FLUSH of one namespace or, with NSID FFFFFFFFh, of all."""
        if task.command.nsid == spec.NSID_ALL:
            left = sorted(self._c.identity.namespaces)
        elif self._space(task) is None:
            return
        else:
            left = [task.command.nsid]

        def next_one(task: Task, result: MediaResult) -> None:
            if result is not MediaResult.OK or not left:
                self._changed(task, result)
            else:
                self._c.media(task, next_one, MediaOp.FLUSH, nsid=left.pop(0))

        next_one(task, MediaResult.OK)

    def _dsm(self, task: Task) -> None:
        space = self._space(task)
        if space is None:
            return
        task.length = ((task.command.cdw10 & 0xFF) + 1) * spec.DSM_RANGE.size
        if task.command.cdw11 & spec.DSM_DEALLOCATE and not self._writable(task, space):
            return
        self._c.transfers.with_prps(task, lambda task: self._c.transfers.fetch_data(task, self._ranges))

    def _ranges(self, task: Task) -> None:
        """All ranges are checked before the first is deallocated."""
        space = self._c.identity.namespaces[task.command.nsid]
        count = task.length // spec.DSM_RANGE.size
        ranges = spec.DSM_RANGE.unpack_array(self._c.transfers.buffer(task), count)
        if any(item.lba + item.blocks > space.blocks for item in ranges):
            self._c.complete(task, Status.LBA_OUT_OF_RANGE)
            return
        left = [item for item in ranges if item.blocks] if task.command.cdw11 & spec.DSM_DEALLOCATE else []

        def next_one(task: Task, result: MediaResult) -> None:
            if result is not MediaResult.OK or not left:
                self._changed(task, result)
                return
            item = left.pop(0)
            self._c.media(
                task,
                next_one,
                MediaOp.DISCARD,
                offset=item.lba << space.shift,
                length=item.blocks << space.shift,
            )

        next_one(task, MediaResult.OK)
