"""The device model's side of the ioreq area: takes accesses, answers them, drives interrupt lines, reaches the guest's memory.

Writes to memory and interrupts are posted: they are notes in the order in which they happened, which the guest's process carries out
before it sees the answer to the access that caused them. Reads wait for the guest's process.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

from bus import ioreq_area as area
from bus.abi.hvm.ioreq import IOREQ_TYPE_COPY, IOREQ_TYPE_PIO
from bus.doorbell import Doorbell
from bus.ioreq_area import Access, Note
from drivers.pc.bus import ONES, GuestMemoryError, MmioSpace, PortSpace

SPINS: Final = 60
"""Looks at what comes next before this process sleeps: some 50 us."""
NEXT_S: Final = 0.0005
BURST_S: Final = 0.005
"""So long at most without a look at the other links and at timers."""
WAIT_S: Final = 20.0
"""How long a note may wait for the guest's process: a machine that is paused by a debugger for longer loses its device model."""
PAGE: Final = 4096


class GuestGone(ConnectionError):
    """The guest's process does not answer any more."""


class Guest:
    """The guest, as its devices see it. Implements `drivers.pc.bus.GuestMemory`."""

    def __init__(self, fds: list[int], ports: PortSpace, mmio: MmioSpace, vcpus: int) -> None:
        """Takes over the descriptors of an order `ioreq_area`."""
        self._area: Final = area.map_area(fds[0])
        self.request, self._response, self._note, self._done = (Doorbell(fd) for fd in fds[1:5])
        self._ports: Final = ports
        self._mmio: Final = mmio
        self.vcpus: Final = min(vcpus, area.MAX_VCPUS)
        self._more: Final = select.epoll()
        self._more.register(self.request.fd, select.EPOLLIN)
        self._produced = self._area.word(area.PRODUCED)
        self._carried_out = self._produced
        self._place = 0
        self._told = self._produced
        self._taken = self._area.word(area.TAKEN)
        self.posts = 0
        self._serving = False
        self.alive: Callable[[], None] = lambda: None
        """Called while waiting for the guest's process, now and then: raises if there is no use in it."""
        self.vram: Final = self._area.octets[area.VRAM : area.VRAM + area.VRAM_SIZE]
        self.accesses = 0

    # --- accesses

    def serve(self) -> bool:
        """Answer every access that is ready, and those that follow at once: in a loop of the guest's the next one comes within
        microseconds, and the event loop around this costs more than the access. True: there is more, of which no ring will tell."""
        self.request.take()
        self._answer()
        end = time.monotonic() + BURST_S
        while self._comes():
            if time.monotonic() > end:
                return True
            self._answer()
        return False

    def _comes(self) -> bool:
        """Something is there within the time in which a guest's loop asks again: first by looking, since to be woken up takes longer."""
        area_ = self._area
        for _ in range(max(1, SPINS // self.vcpus)):
            if area_.word(area.POSTED) != self._taken or any(map(area_.ready, range(self.vcpus))):
                return True
        if not self._more.poll(NEXT_S):
            return False
        self.request.take()
        return True

    def _take_posts(self) -> None:
        """Carry out the writes that wait, at most a ring full."""
        posted = self._area.word(area.POSTED)
        waiting = posted - self._taken & 0xFFFFFFFF
        if not waiting:
            return
        if waiting > area.POST_RING:
            raise GuestGone("the index of the ring of posted writes makes no sense")
        self._serving = True
        try:
            for _ in range(waiting):
                access = self._area.get_post(self._taken)
                self._taken = self._taken + 1 & 0xFFFFFFFF
                if access.size in (1, 2, 4):
                    self._access(0, access)
        finally:
            self._serving = False
        self.posts += waiting
        self._area.set_word(area.TAKEN, self._taken)
        area.fence()  # what was posted meanwhile is seen by the next look at POSTED, or its writer sees this and rings
        if self._produced != self._told:
            self._told = self._produced
            self._note.ring()  # what came of them: nobody waits for an answer

    def _answer(self) -> None:
        self._take_posts()
        for vcpu in range(self.vcpus):
            if self._area.ready(vcpu):
                self._take_posts()  # those that came after the first look, and before the access
                access = self._area.take_access(vcpu)
                self.accesses += 1
                self._serving = True
                try:
                    value = self._access(vcpu, access)
                finally:
                    self._serving = False
                self._area.answer(vcpu, value)
                self._response.ring()

    def _access(self, vcpu: int, access: Access) -> int:
        """A request of a guest's process that makes no sense reads as ones."""
        size = access.size
        if access.kind not in (IOREQ_TYPE_PIO, IOREQ_TYPE_COPY) or size not in ONES:
            return ONES[8]
        space: PortSpace | MmioSpace = self._ports if access.kind == IOREQ_TYPE_PIO else self._mmio
        if access.kind == IOREQ_TYPE_PIO and (size > 4 or access.address >= 0x10000):
            return ONES[8]
        if access.block:
            return self._block(vcpu, access)
        if access.read:
            return space.read(access.address, size)
        space.write(access.address, size, access.data & ONES[size])
        return 0

    def _block(self, vcpu: int, access: Access) -> int:
        """Accesses of a string instruction, all to one port. The result: how many were made."""
        size, octets = access.size, self._area.block(vcpu)
        count = min(access.steps, len(octets) // size)
        if not count or access.kind != IOREQ_TYPE_PIO:
            return 0
        if access.read:
            data = self._ports.read_string(access.address, size, count)
            octets[: len(data)] = data
        else:
            self._ports.write_string(access.address, size, bytes(octets[: count * size]))
        return count

    # --- notes

    def _put(self, note: Note, *, wait: bool = False) -> int:
        """Add a note; `wait` until it was carried out. Its status. GuestGone."""
        index = self._produced
        if index - self._carried_out >= area.RING - 1:
            self._catch_up(index - area.RING // 2)
        self._area.put_note(index, note)
        self._produced = index + 1
        self._area.set_word(area.PRODUCED, index + 1)
        if wait:
            self._catch_up(index + 1)
            return self._area.status(index)
        if not self._serving:
            self._note.ring()
        return area.PENDING

    def _catch_up(self, until: int) -> None:
        """Wait until the guest's process has carried out the notes below that index. GuestGone."""
        deadline = time.monotonic() + WAIT_S
        poller = select.poll()
        poller.register(self._done.fd, select.POLLIN)
        while True:
            behind = self._produced - self._area.word(area.CONSUMED) & 0xFFFFFFFF
            if behind > area.RING:
                raise GuestGone("the index of the ring of notes makes no sense")
            self._carried_out = self._produced - behind
            if self._carried_out >= until:
                return
            self._note.ring()
            if not poller.poll(100):
                self.alive()
                if time.monotonic() > deadline:
                    raise GuestGone("the guest's process does not look at the ring of notes")
            self._done.take()

    def isa_irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line."""
        self._put(Note(area.ISA_IRQ, line, int(level)))

    def pci_intx(self, device: int, pin: int, level: bool) -> None:
        """Drive an interrupt pin of a PCI device."""
        self._put(Note(area.PCI_INTX, device << 2 | pin, int(level)))

    def set_link(self, link: int, line: int) -> None:
        """Route a PCI link to an ISA interrupt; 0: to none."""
        self._put(Note(area.LINK, link, line))

    def a20(self, level: bool) -> None:
        """Address line 20, as the keyboard controller has it."""
        self._put(Note(area.A20, int(level)))

    def msi(self, address: int, data: int) -> None:
        """Send an interrupt message."""
        self._put(Note(area.MSI, data, 0, address))

    def map_vram(self, address: int, length: int, place: int) -> None:
        """Show a part of the frame buffer at a guest-physical address; whole pages."""
        self._put(Note(area.MAP, 0, 0, address, length, place))

    def unmap_vram(self, address: int, length: int) -> None:
        """Nothing is there any more."""
        self._put(Note(area.UNMAP, 0, 0, address, length))

    # --- memory

    @staticmethod
    def _check(gpa: int, length: int) -> None:
        """Guests program any address: beyond those of 64 bits no note can say it."""
        if gpa + length > 1 << 64:
            raise GuestMemoryError(f"{length} bytes at {gpa:#x}")

    def _room(self, length: int) -> int:
        """A place in the staging area that no note under way uses."""
        if self._place + length > area.STAGING_SIZE:
            self._catch_up(self._produced)
            self._place = 0
        place = self._place
        self._place += length + 63 & ~63
        return place

    def read(self, gpa: int, length: int) -> bytes:
        """See GuestMemory."""
        self._check(gpa, length)
        out = bytearray()
        while length > 0:
            step = min(length, area.STAGING_SIZE // 2)
            place = self._room(step)
            status = self._put(Note(area.READ, 0, 0, gpa, step, place), wait=True)
            if status != area.CARRIED_OUT:
                raise GuestMemoryError(f"{step} bytes at {gpa:#x}")
            start = area.STAGING + place
            out += self._area.octets[start : start + step]
            gpa, length = gpa + step, length - step
        return bytes(out)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """See GuestMemory; an address that is not the guest's memory drops the bytes, which is seen in the log alone."""
        view = memoryview(data).cast("B")
        self._check(gpa, len(view))
        for start in range(0, len(view), area.STAGING_SIZE // 2):
            part = view[start : start + area.STAGING_SIZE // 2]
            place = self._room(len(part))
            at = area.STAGING + place
            self._area.octets[at : at + len(part)] = part
            self._put(Note(area.WRITE, 0, 0, gpa + start, len(part), place))

    def close(self) -> None:
        """Unmap and close."""
        self.vram.release()
        self._area.close()
        self._more.close()
        for bell in (self.request, self._response, self._note, self._done):
            bell.close()
