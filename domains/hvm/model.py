"""A guest's process and its device model: accesses go there by the ioreq area, and its notes are carried out.

The device model is not trusted further than this guest goes: each note is copied, checked, and done to this domain's memory and
interrupt lines, or refused. An access that is not answered in time crashes the domain with a reason; while it waits, the process
serves its other duties (`idle`), so that no other domain waits for this one.
"""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from bus import ioreq_area as area
from bus.abi.hvm import dm_op
from bus.abi.hvm.ioreq import IOREQ_TYPE_COPY, IOREQ_TYPE_PIO
from bus.addresses import PAGE_SHIFT, PAGE_SIZE
from bus.doorbell import Doorbell
from bus.ioreq_area import Access, Note
from domains.hvm.board import Board
from domains.hvm.cpu import HvmCpu
from domains.vcpu.walk import NotMapped
from drivers.pc.bus import ONES, BusError, Range

ANSWER_S: Final = 10.0
"""How long an access may take."""
SPINS: Final = 300
"""Looks at the answer before this process sleeps: some 40 us."""
QUICK_S: Final = 0.002
"""So long only the answer is waited for; then this process's other duties as well."""
STEP_S: Final = 0.05
M32: Final = 0xFFFFFFFF
POSTED_MEMORY: Final = range(0xA0000, 0xC0000)
"""Writes there are posted, as Xen's buffered ioreqs: the VGA window, in modes in which it is no plain memory."""
POSTED_PORTS: Final = frozenset((0x3C0, 0x3C6, 0x3C7, 0x3C8, 0x3C9, 0x3D4, 0x3D5, 0x3F8))
"""Attribute controller, DAC, CRT controller, the serial line's data: nothing that a guest does next depends on their effect having
come. (A VGA register that decides how memory is addressed is not among them.)"""


class Model:
    """One ioreq server, as the guest's process sees it."""

    def __init__(
        self,
        number: int,
        fds: list[int],
        board: Board,
        cpu: HvmCpu,
        idle: Callable[[], None],
        held: Callable[[], bool],
    ) -> None:
        """Takes over the descriptors of an order `ioreq_area`. `held`: the guest must not go on now (it is paused)."""
        self.number: Final = number
        self._area: Final = area.map_area(fds[0])
        self._request, self._response, self.note, self._done = (Doorbell(fd) for fd in fds[1:5])
        self._board: Final = board
        self._cpu: Final = cpu
        self._idle: Final = idle
        self._held: Final = held
        self._consumed = self._area.word(area.CONSUMED)
        self._ranges: dict[tuple[int, int, int], Range] = {}
        self._enabled = False
        self._gone = ""
        self._busy = False
        self._quick: Final = select.epoll()
        for bell in (self._response, self.note):
            self._quick.register(bell.fd, select.EPOLLIN)
        self._vram: Final = _address(self._area.octets) + area.VRAM
        self._posted = self._area.word(area.POSTED)
        self.accesses = 0
        self.waited_ns = 0
        """So long the guest stood still for them."""
        self.posts = 0
        self.refused = 0
        """Notes that made no sense, or aimed at what is not this guest's memory."""

    # --- what the hypervisor says of it

    def change(self, body: Mapping[str, Any]) -> bool:
        """An order `ioreq_server`. False: a range that overlaps another server's, or a device of the board."""
        if "enabled" in body:
            self._enabled = bool(body["enabled"])
        elif "add" in body:
            return self._add(tuple(body["add"]))
        elif "remove" in body:
            found = self._ranges.pop(tuple(body["remove"]), None)
            if found is not None:
                self._space(body["remove"][0]).remove(found)
        return True

    def _space(self, kind: int) -> Any:
        return self._board.ports if kind == dm_op.XEN_DMOP_IO_RANGE_PORT else self._board.mmio

    def _add(self, new: tuple[int, int, int]) -> bool:
        kind, first, last = new
        if kind == dm_op.XEN_DMOP_IO_RANGE_PCI:
            return True  # configuration space goes there by its ports
        ioreq = IOREQ_TYPE_PIO if kind == dm_op.XEN_DMOP_IO_RANGE_PORT else IOREQ_TYPE_COPY

        def read(offset: int, size: int) -> int:
            return self.access(Access(first + offset, 0, 1, size, ioreq, True, False))

        posted = POSTED_MEMORY if kind == dm_op.XEN_DMOP_IO_RANGE_MEMORY else POSTED_PORTS

        def write(offset: int, size: int, value: int) -> None:
            address = first + offset
            access = Access(address, value, 1, size, ioreq, False, False)
            if address not in posted or size > 4 or not self._post(access):
                self.access(access)

        ports = kind == dm_op.XEN_DMOP_IO_RANGE_PORT
        # An access that begins anywhere goes whole: the device model's own ranges say how it is taken apart.
        wanted = Range(
            f"ioreq server {self.number}",
            first,
            last + 1 - first,
            read,
            write,
            4 if ports else 8,
            aligned=not ports,
        )
        try:
            self._space(kind).add(wanted)
        except BusError:
            return False
        self._ranges[new] = wanted
        return True

    def owns_port(self, port: int) -> bool:
        """The port is in one of its ranges."""
        return any(
            kind == dm_op.XEN_DMOP_IO_RANGE_PORT and first <= port <= last
            for kind, first, last in self._ranges
        )

    def give_up(self, why: str) -> None:
        """There will be no answers any more."""
        self._gone = self._gone or why

    def retire(self, why: str) -> None:
        """It is no more: give up, and leave its ranges to who comes next. `close` is for later, when no access is under way."""
        self.give_up(why)
        for (kind, _, _), each in self._ranges.items():
            self._space(kind).remove(each)
        self._ranges.clear()

    # --- accesses

    def access(self, access: Access) -> int:
        """Have the device model do it; ones if it does not."""
        return self._exchange(access, None)

    def _post(self, access: Access) -> bool:
        """A write that needs no answer. False: it must be made as an access (the ring is full, or nobody is there)."""
        if not self._enabled or self._gone:
            return False
        waiting = self._posted - self._area.word(area.TAKEN) & M32
        if waiting >= area.POST_RING:
            return False
        before = self._posted
        self._area.put_post(before, access)
        self._posted = before + 1 & M32
        self._area.set_word(area.POSTED, self._posted)
        area.fence()
        if self._area.word(area.TAKEN) == before:
            self._request.ring()  # it had taken all that was there, and may not look again
        self.posts += 1
        return True

    def string_in(self, port: int, size: int, count: int) -> bytes:
        """The values of so many IN from a port, at least one."""
        vcpu = self._cpu.current.id
        done = self._exchange(Access(port, 0, count, size, IOREQ_TYPE_PIO, True, True), None)
        if not 0 < done <= count:
            return b"\xff" * size
        return bytes(self._area.block(vcpu)[: done * size])

    def string_out(self, port: int, size: int, data: bytes) -> None:
        """So many OUT to a port."""
        self._exchange(Access(port, 0, len(data) // size, size, IOREQ_TYPE_PIO, False, True), data)

    def _exchange(self, access: Access, data: bytes | None) -> int:
        if not self._enabled or self._gone or self._busy:
            return ONES[8]
        vcpu = self._cpu.current.id
        if data is not None:
            self._area.block(vcpu)[: len(data)] = data
        self.accesses += 1
        self._busy = True
        began = time.monotonic_ns()
        try:
            self._area.put_access(vcpu, access)
            self._request.ring()
            value = self._wait(vcpu, access)
        finally:
            self._busy = False
            self.waited_ns += time.monotonic_ns() - began
        return ONES[8] if value is None else value

    def _wait(self, vcpu: int, access: Access) -> int | None:
        """Until the answer has come and the guest may go on; None: it will not come. For some microseconds by looking: to be woken up
        takes longer on a host that is idle."""
        answered = self._area.answered
        for _ in range(SPINS):
            if answered(vcpu):
                value = self._area.take_answer(vcpu)
                self._look()
                if value is not None and not self._held():
                    return value
                break
        else:
            value = None
        began = time.monotonic()
        deadline, quick = began + ANSWER_S, True
        while True:
            ready = self._quick.poll(QUICK_S if quick else STEP_S)
            if ready:
                self._response.take()
                self.note.take()
            if value is None:
                value = self._area.take_answer(vcpu)
            if ready or value is not None:
                self._look()  # what was noted before the answer
            held = self._held()
            if value is not None and not held:
                return value
            if self._gone or self._cpu.crash_reason is not None:
                return None
            now = time.monotonic()
            if quick and now - began < QUICK_S:
                continue
            self._request.ring()
            quick = False
            if held:
                deadline = now + ANSWER_S
            elif now > deadline:
                self._silent(access)
                return None
            self._idle()

    def _silent(self, access: Access) -> None:
        what = "port" if access.kind == IOREQ_TYPE_PIO else "memory"
        how = "read" if access.read else "write"
        self.give_up("its device model is silent")
        self._cpu.crash(
            f"the device model does not answer for {ANSWER_S:.0f} s: {how} of {what} {access.address:#x}"
        )

    # --- notes

    def carry_out(self) -> None:
        """The doorbell says that there are notes: do them."""
        self.note.take()
        self._look()

    def _look(self) -> None:
        """Do what the ring of notes says, in order; at most a ring full."""
        produced = self._area.word(area.PRODUCED)
        waiting = produced - self._consumed & M32
        if not waiting:
            return
        if waiting > area.RING:
            self.give_up("its device model is broken")
            self._cpu.crash("the device model's ring of notes makes no sense")
            return
        for _ in range(waiting):
            note = self._area.get_note(self._consumed)
            done = self._one(note)
            if not done:
                self.refused += 1
            self._area.set_status(self._consumed, area.CARRIED_OUT if done else area.REFUSED)
            self._consumed = self._consumed + 1 & M32
        self._area.set_word(area.CONSUMED, self._consumed)
        self._done.ring()

    def _one(self, note: Note) -> bool:
        kind = note.kind
        if kind == area.ISA_IRQ:
            return self._board.isa_line(note.a, bool(note.b))
        elif kind == area.PCI_INTX:
            return self._board.pci_line(note.a >> 2, note.a & 3, bool(note.b))
        elif kind == area.LINK:
            return self._board.set_link(note.a, note.b)
        elif kind == area.A20:
            return self._board.a20_by_keyboard(bool(note.a))
        elif kind == area.MSI:
            return self._board.msi(note.address, note.a)
        elif kind in (area.READ, area.WRITE):
            return self._transfer(note)
        elif kind in (area.MAP, area.UNMAP):
            return self._show(note)
        return False

    def _transfer(self, note: Note) -> bool:
        """DMA. Written pages lose their translations here, before a later note can tell of the end."""
        if not 0 < note.length <= area.STAGING_SIZE or note.place + note.length > area.STAGING_SIZE:
            return False
        start = area.STAGING + note.place
        octets = self._area.octets[start : start + note.length]
        memory = self._cpu.hvm.memory
        try:
            if note.kind == area.READ:
                octets[:] = memory.read_physical(note.address, note.length)
            else:
                memory.write_physical(note.address, bytes(octets))
        except NotMapped:
            return False
        return True

    def _show(self, note: Note) -> bool:
        """The frame buffer appears in the guest's memory, or goes."""
        pages = note.length >> PAGE_SHIFT
        if (note.address | note.length | note.place) & PAGE_SIZE - 1 or not 0 < note.length <= area.VRAM_SIZE:
            return False
        physmap = self._cpu.physmap
        if note.kind == area.UNMAP:
            return physmap.unmap_device_memory(note.address >> PAGE_SHIFT, pages)
        if note.place + note.length > area.VRAM_SIZE:
            return False
        return physmap.map_device_memory(note.address >> PAGE_SHIFT, self._vram + note.place, pages)

    def close(self) -> None:
        """Close and unmap, once it is retired: the vCPU does not run, and does not reach for the frame buffer any more."""
        self._cpu.physmap.forget_device_memory(self._vram, area.VRAM_SIZE)
        self._quick.close()
        self._area.close()
        for bell in (self._request, self._response, self.note, self._done):
            bell.close()


def _address(octets: memoryview) -> int:
    """Host address of a mapping."""
    return ctypes.addressof(ctypes.c_char.from_buffer(octets))
