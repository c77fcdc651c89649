"""A host for the controller: flat memory behind an identity-mapped IOMMU with holes, media, interrupts, and a plain driver."""

from __future__ import annotations

import os
import tempfile
from collections import deque

from domains.devices.nvme.model import NvmeModel, kind, namespaces
from drivers.hw.nvme import spec
from drivers.hw.nvme.dma import DmaBatch
from drivers.hw.nvme.media import Media, RawMedia
from drivers.hw.nvme.pages import Identity
from drivers.hw.nvme.spec import Command, Completion
from drivers.hw.pci import COMMAND, COMMAND_MASTER, COMMAND_MEMORY, MSIX_ENABLE

MEMORY = 8 << 20
STAGING = 4 << 20
PAGE = 4096
ASQ, ACQ, DATA = 0x10000, 0x20000, 0x100000
MSIX_CAP = 0x84


def raw_file(size: int) -> RawMedia:
    """A raw medium of zeroes that nobody else has."""
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return RawMedia(os.dup(file.fileno()))


class Host:
    """Memory, time, and a driver that follows the specification."""

    def __init__(self, media: dict[int, Media] | None = None, **identity: int) -> None:
        self.media: dict[int, Media] = {1: raw_file(1 << 20)} if media is None else media
        self.identity = Identity(serial="T0", namespaces=namespaces(self.media, {}), **identity)  # type: ignore[arg-type]  # numbers only, in the tests
        self.staging = memoryview(bytearray(STAGING))
        self.kind = kind(self.identity, self.media)
        model = self.kind.make(self.staging)
        assert isinstance(model, NvmeModel)
        self.model = model
        self.memory = bytearray(MEMORY)
        self.holes: set[int] = set()
        """Pages that the IOMMU refuses."""
        self.now = 1
        self.raised: list[int] = []
        self.refused_vectors: set[int] = set()
        self.page = memoryview(bytearray(PAGE))
        self.held: deque[DmaBatch] = deque()
        self.hold = False
        self.batches = 0
        self.tails = {0: 0}
        self.heads = {0: (0, 1)}
        self.sizes = {0: 16}
        self.queues = {0: (ASQ, ACQ)}
        self.next_cid = 0

    # -- the hypervisor's part ------------------------------------------------------------------------------------

    def allowed(self, address: int, length: int) -> bool:
        """The IOMMU lets it through."""
        if address + length > MEMORY:
            return False
        return not any(page in self.holes for page in range(address >> 12, (address + length - 1 >> 12) + 1))

    def carry_out(self, batch: DmaBatch) -> None:
        """As docs/decisions/0004-devices.md says."""
        self.batches += 1
        fault = -1
        for index, (address, length, write, position) in enumerate(batch.items):
            assert 0 <= position <= position + length <= STAGING
            if not self.allowed(address, length):
                fault = index
                break
            if write:
                self.memory[address : address + length] = self.staging[position : position + length]
            else:
                self.staging[position : position + length] = self.memory[address : address + length]
        else:
            for vector in batch.vectors:
                if vector in self.refused_vectors:
                    fault = 0xFFFF
                    break
                self.raised.append(vector)
        self.model.dma_done(self.now, batch.token, fault)

    def run(self, limit: int = 10000) -> None:
        """Until the device has nothing to do (or holds its breath because batches are held)."""
        for _ in range(limit):
            clears, batches = self.model.step(self.now)
            for _bar, offset, length in clears:
                self.page[offset : offset + length] = bytes(length)
            assert len(batches) <= 16
            for batch in batches:
                assert isinstance(batch, DmaBatch)
                assert len(batch.items) <= 1024
                self.held.append(batch)
            if self.hold or not self.held:
                if not batches and not self.model.unfinished:
                    return
                continue
            self.carry_out(self.held.popleft())
        raise AssertionError("the controller does not come to rest")

    # -- the driver's part ----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int = 4) -> int:
        """A register."""
        value = self.model.access(self.now, 0, offset, size, None)
        self.run()
        return value

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """A register."""
        self.model.access(self.now, 0, offset, size, value)
        self.run()

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        """Configuration space."""
        got = self.model.access(self.now, -1, offset, size, value)
        self.run()
        return got

    def enable(self, size: int = 16, *, msix: bool = True) -> None:
        """PCI, admin queues, CC.EN."""
        self.config(COMMAND, 2, COMMAND_MEMORY | COMMAND_MASTER)
        if msix:
            self.config(MSIX_CAP + 2, 2, MSIX_ENABLE)
        self.sizes[0] = size
        self.write(spec.REG_AQA, size - 1 << 16 | size - 1)
        self.write(spec.REG_ASQ, ASQ, 8)
        self.write(spec.REG_ACQ, ACQ, 8)
        self.write(spec.REG_CC, 4 << spec.CC_IOCQES_SHIFT | 6 << spec.CC_IOSQES_SHIFT | spec.CC_EN)
        self.tails, self.heads = {0: 0}, {0: (0, 1)}

    def io_queue(self, qid: int = 1, size: int = 64, vector: int = 1, cqid: int | None = None) -> None:
        """Create a pair."""
        cq, sq = 0x40000 + qid * 0x10000, 0x48000 + qid * 0x10000
        cqid = qid if cqid is None else cqid
        if cqid == qid:
            done = self.admin(
                spec.AdminOpcode.CREATE_CQ, prp1=cq, cdw10=size - 1 << 16 | qid, cdw11=vector << 16 | 3
            )
            assert spec.status_of(done.status) == 0
        done = self.admin(
            spec.AdminOpcode.CREATE_SQ, prp1=sq, cdw10=size - 1 << 16 | qid, cdw11=cqid << 16 | 1
        )
        assert spec.status_of(done.status) == 0
        self.queues[qid] = (sq, cq)
        self.sizes[qid], self.tails[qid], self.heads[qid] = size, 0, (0, 1)

    def put(self, qid: int, command: Command) -> None:
        """Into the submission queue, without ringing."""
        base = self.queues[qid][0]
        tail = self.tails[qid]
        place = base + 64 * tail
        self.memory[place : place + 64] = spec.COMMAND.pack(command)
        self.tails[qid] = (tail + 1) % self.sizes[qid]

    def ring(self, qid: int) -> None:
        """The tail doorbell, and what follows."""
        self.write(spec.sq_doorbell(qid), self.tails[qid])

    def reap(self, qid: int, *, ring: bool = True) -> list[Completion]:
        """New completions."""
        base = self.queues[qid][1]
        head, phase = self.heads[qid]
        found = []
        while True:
            entry = spec.COMPLETION.unpack(self.memory, base + 16 * head)
            if entry.status & 1 != phase:
                break
            found.append(entry)
            head += 1
            if head == self.sizes[qid]:
                head, phase = 0, phase ^ 1
        self.heads[qid] = (head, phase)
        if found and ring:
            self.write(spec.cq_doorbell(qid), head)
        return found

    def command(self, opcode: int, **fields: int) -> Command:
        """With an id of its own."""
        self.next_cid = (self.next_cid + 1) & 0xFFFF
        return spec.COMMAND.zero()._replace(opcode=opcode, cid=self.next_cid, **fields)

    def do(self, qid: int, opcode: int, **fields: int) -> Completion:
        """One command, to its end."""
        command = self.command(opcode, **fields)
        self.put(qid, command)
        self.ring(qid)
        found = self.reap(qid)
        assert [entry.cid for entry in found] == [command.cid], found
        return found[0]

    def admin(self, opcode: int, **fields: int) -> Completion:
        """One admin command."""
        return self.do(0, opcode, **fields)

    def status(self, qid: int, opcode: int, **fields: int) -> int:
        """The status of one command."""
        return spec.status_of(self.do(qid, opcode, **fields).status)

    def prps(self, address: int, length: int, list_at: int = 0x90000) -> dict[str, int]:
        """PRP1 and PRP2 of a buffer; a list is put at `list_at`."""
        first = min(length, PAGE - address % PAGE)
        rest = list(range(address + first, address + length, PAGE))
        if not rest:
            return {"prp1": address}
        if len(rest) == 1:
            return {"prp1": address, "prp2": rest[0]}
        at = list_at
        while rest:
            fit = (PAGE - at % PAGE) // 8
            part, rest = (rest, []) if len(rest) <= fit else (rest[: fit - 1], rest[fit - 1 :])
            following = (at & ~(PAGE - 1)) + PAGE
            entries = [*part, following] if rest else part
            for index, entry in enumerate(entries):
                self.memory[at + 8 * index : at + 8 * index + 8] = entry.to_bytes(8, "little")
            at = following
        return {"prp1": address, "prp2": list_at}
