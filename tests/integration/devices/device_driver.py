"""A plain NVMe driver for the device process of `device_host`."""

from __future__ import annotations

from drivers.hw.nvme import spec
from drivers.hw.nvme.spec import AdminOpcode, Command, Completion
from drivers.hw.pci import COMMAND, COMMAND_MASTER, COMMAND_MEMORY, MSIX_ENABLE
from tests.integration.devices.device_host import BDF, DOMAIN, DeviceHost

ASQ, ACQ, SQ, CQ, LIST, DATA = 0x1000, 0x2000, 0x4000, 0x8000, 0x10000, 0x100000
MSIX_CAP = 0x84
SIZE = 64


class Driver:
    """Admin queue and one I/O pair."""

    def __init__(self, host: DeviceHost) -> None:
        self.host = host
        self.tails = {0: 0, 1: 0}
        self.heads = {0: (0, 1), 1: (0, 1)}
        self.bases = {0: (ASQ, ACQ), 1: (SQ, CQ)}
        self.cid = 0

    def set_up(self) -> None:
        """From PCI to an I/O queue pair of 64 entries, with interrupts as PIRQ 70 (admin) and 71."""
        host = self.host
        for base in (ASQ, ACQ, SQ, CQ):
            host.memory[base : base + 4096] = bytes(4096)
        host.access(-1, COMMAND, 2, COMMAND_MEMORY | COMMAND_MASTER)
        host.access(-1, MSIX_CAP + 2, 2, MSIX_ENABLE)
        for vector, pirq in ((0, 70), (1, 71)):
            host.iommu.msi_mapped(BDF, vector, DOMAIN, pirq)
        host.access(0, spec.REG_CC, 4, 0)
        host.until(lambda: not host.access(0, spec.REG_CSTS, 4))
        host.access(0, spec.REG_AQA, 4, SIZE - 1 << 16 | SIZE - 1)
        host.access(0, spec.REG_ASQ, 8, ASQ)
        host.access(0, spec.REG_ACQ, 8, ACQ)
        host.access(0, spec.REG_CC, 4, 4 << spec.CC_IOCQES_SHIFT | 6 << spec.CC_IOSQES_SHIFT | spec.CC_EN)
        host.until(lambda: host.access(0, spec.REG_CSTS, 4) == spec.CSTS_RDY)
        for opcode, base, flags in ((AdminOpcode.CREATE_CQ, CQ, 3), (AdminOpcode.CREATE_SQ, SQ, 1)):
            done = self.run(
                0, [self.command(opcode, prp1=base, cdw10=SIZE - 1 << 16 | 1, cdw11=1 << 16 | flags)]
            )
            assert spec.status_of(done[0].status) == 0

    def command(self, opcode: int, **fields: int) -> Command:
        """With an id of its own."""
        self.cid = (self.cid + 1) & 0xFFFF
        return spec.COMMAND.zero()._replace(opcode=opcode, cid=self.cid, **fields)

    def submit(self, qid: int, commands: list[Command]) -> None:
        """Put them into the queue and ring once: by the doorbell page if there is one."""
        base = self.bases[qid][0]
        for command in commands:
            place = base + 64 * self.tails[qid]
            self.host.memory[place : place + 64] = spec.COMMAND.pack(command)
            self.tails[qid] = (self.tails[qid] + 1) % SIZE
        self.doorbell(spec.sq_doorbell(qid), self.tails[qid])

    def doorbell(self, offset: int, value: int) -> None:
        """Write one."""
        host = self.host
        if host.page is not None and host.bell is not None:
            at = offset - spec.DOORBELL_OFFSET
            host.page[at : at + 4] = value.to_bytes(4, "little")
            host.bell.ring()
        else:
            host.access(0, offset, 4, value)

    def reap(self, qid: int) -> list[Completion]:
        """New completions; the head doorbell is stored."""
        base = self.bases[qid][1]
        head, phase = self.heads[qid]
        found = []
        while self.host.memory[base + 16 * head + 14] & 1 == phase:
            found.append(spec.COMPLETION.unpack(self.host.memory, base + 16 * head))
            head += 1
            if head == SIZE:
                head, phase = 0, phase ^ 1
        self.heads[qid] = (head, phase)
        if found:
            self.doorbell(spec.cq_doorbell(qid), head)
        return found

    def run(self, qid: int, commands: list[Command]) -> list[Completion]:
        """Submit and wait for all."""
        self.submit(qid, commands)
        found: list[Completion] = []

        def all_there() -> bool:
            found.extend(self.reap(qid))
            return len(found) == len(commands)

        self.host.until(all_there)
        return found

    def prps(self, address: int, length: int, slot: int = 0) -> dict[str, int]:
        """PRP1 and PRP2 of a page-aligned buffer; lists are kept in page `slot`."""
        pages = list(range(address, address + length, 4096))
        if len(pages) <= 2:
            return {"prp1": pages[0], "prp2": pages[-1] if len(pages) == 2 else 0}
        place = LIST + 4096 * slot
        self.host.memory[place : place + 8 * (len(pages) - 1)] = b"".join(
            page.to_bytes(8, "little") for page in pages[1:]
        )
        return {"prp1": pages[0], "prp2": place}
