"""A command's data: its buffer in the staging memory, its PRPs or SGL, and the way between both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bus.trace import Purpose
from drivers.hw.nvme import prp, sgl, spec
from drivers.hw.nvme.dma import Unit, merge
from drivers.hw.nvme.queues import Task
from drivers.hw.nvme.spec import Status
from drivers.hw.nvme.staging import PAGE, StagingFull

if TYPE_CHECKING:
    from drivers.hw.nvme.controller import Controller

Step = prp.ListStep | sgl.SegmentStep


class Transfers:
    """Of one controller. Commands without a buffer wait in order."""

    def __init__(self, controller: Controller) -> None:
        self._c = controller
        self._waiting: deque[Task] = deque()

    def reset(self) -> None:
        """Nobody waits."""
        self._waiting.clear()

    def with_prps(self, task: Task, then: Callable[[Task], None]) -> None:
        """Get a buffer for `task.length` bytes and the task's `segments` from its PRPs, or its SGL; then go on."""
        command = task.command
        begin = sgl.begin if command.flags & spec.FLAG_PSDT_MASK else prp.begin
        step: Step | None
        try:
            task.segments, step = begin(command.prp1, command.prp2, task.length)
        except prp.PrpError as error:
            self._c.complete(task, error.status)
            return
        if step is None and not self._waiting:  # nearly always
            try:
                task.position = self._c.staging.allocate(task.length)
            except StagingFull:
                pass
            else:
                then(task)
                return
        task.prp_done = then
        task.start = partial(self._read_list, step=step)
        self._waiting.append(task)
        if len(self._waiting) == 1:
            self.go_on()

    def go_on(self) -> None:
        """Buffers may be free again. First come, first served: a large command is not overtaken for ever by small ones."""
        while self._waiting:
            task = self._waiting[0]
            try:
                task.position = self._c.staging.allocate(task.length)
            except StagingFull:
                return
            self._waiting.popleft()
            assert task.start is not None
            task.start(task)

    def stop_waiting(self, task: Task) -> bool:
        """Abort a command that has no buffer yet."""
        try:
            self._waiting.remove(task)
        except ValueError:
            return False
        return True

    def _read_list(self, task: Task, step: Step | None) -> None:
        """Lists are read into the command's own buffer: the data comes later."""
        if step is None:
            assert task.prp_done is not None
            task.prp_done(task)
            return
        size = step.entries * prp.ENTRY if isinstance(step, prp.ListStep) else step.descriptors * sgl.SIZE
        item = (step.address, size, False, task.position)
        ok, bad = partial(self._list_read, task, step), partial(self._no_data, task)
        self._c.dma.add([Unit([item], ok, bad, (Purpose.LIST, task.sq.qid, task.command.cid))])

    def _list_read(self, task: Task, step: Step) -> None:
        data = self._c.memory[task.position : task.position + PAGE]
        further: Step | None
        try:
            if isinstance(step, prp.ListStep):
                runs, further = prp.go_on(step, data)
            else:
                runs, further = sgl.go_on(step, data)
        except prp.PrpError as error:
            self._c.complete(task, error.status)
            return
        task.segments += runs
        self._read_list(task, further)

    def _no_data(self, task: Task) -> None:
        self._c.complete(task, Status.DATA_TRANSFER_ERROR)

    def fetch_data(self, task: Task, then: Callable[[Task], None]) -> None:
        """Have the data from the driver's memory in the buffer; then go on."""
        items = merge(task.segments, False, task.position)
        ok, bad = partial(then, task), partial(self._no_data, task)
        self._c.dma.add([Unit(items, ok, bad, (Purpose.DATA, task.sq.qid, task.command.cid))])

    def buffer(self, task: Task) -> memoryview:
        """The task's data."""
        return self._c.memory[task.position : task.position + task.length]

    def send(self, task: Task, data: bytes) -> None:
        """Answer an admin command with data."""

        def put(task: Task) -> None:
            self._c.memory[task.position : task.position + len(data)] = data
            self._c.complete(task, Status.SUCCESS)

        task.length, task.to_memory = len(data), True
        self.with_prps(task, put)
