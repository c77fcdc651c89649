"""From records to requests: steps are joined whatever a device claims, faults are told, memory is bounded."""

from __future__ import annotations

from bus.trace import NOBODY, Kind, Purpose, Record
from toolstack.trace.dma import (
    MAX_ALL_PARTS,
    MAX_PARTS,
    MAX_REQUESTS,
    Request,
    RequestJoiner,
    Transfer,
    loose_text,
    request_text,
)
from toolstack.trace.names import device_name, disk_name, hypercall_name
from toolstack.trace.session import DEVICE, HYPERVISOR, Entry, Peer

DOMIO, NVME, XEN = Peer(2, "domio", ""), Peer(DEVICE | 8, "nvme", "disk1"), Peer(HYPERVISOR, "hypervisor", "")
IOVA = 0x2_0000_0000


class Story:
    """Records one microsecond apart."""

    def __init__(self) -> None:
        self.now = 0
        self.entries: list[Entry] = []

    def note(self, peer: Peer, kind: Kind, track: int, subject: int, *values: int) -> None:
        self.now += 1000
        padded = (*values, *[0] * (6 - len(values)))
        self.entries.append(Entry(peer, Record(self.now, kind, track, subject, padded)))

    def taken(self, index: int = 7) -> None:
        self.note(DOMIO, Kind.TAKEN, 0, 5, 51712, index, 0x11, 0, 2048, 16)
        self.note(DOMIO, Kind.COMMAND, 0, 5, 51712, index, 40, 8, 0)
        self.note(DOMIO, Kind.SEGMENT, 0, 5, 51712, index, 0, 31, IOVA, 4096)
        self.note(DOMIO, Kind.SEGMENT, 0, 5, 51712, index, 1, 32, IOVA + 0x1000, 4096)

    def submitted(self) -> None:
        self.note(DOMIO, Kind.SUBMIT, 1, 8, 3, 40, 2, 2048, 16, 0)
        self.note(DOMIO, Kind.PRP, 1, 8, 3, 0, IOVA, 4096)
        self.note(DOMIO, Kind.PRP, 1, 8, 3, 1, IOVA + 0x1000, 4096)

    def moved(self, *, command: int = 3, fault: int = 0, iova: int = IOVA) -> None:
        self.note(NVME, Kind.REQUEST, 1, 0, 99, 5, iova, 8192, command, Purpose.DATA)
        if fault:
            self.note(XEN, Kind.DMA, 2, 8, 99, 5, iova, 8192, 0, fault << 16 | NOBODY)
        else:
            self.note(XEN, Kind.DMA, 2, 8, 99, 5, iova, 4096, 0xABC000, 5)
            self.note(XEN, Kind.DMA, 2, 8, 99, 5, iova + 0x1000, 4096, 0xDEF000, 5)

    def answered(self, status: int = 0, index: int = 7) -> None:
        self.note(DOMIO, Kind.COMPLETED, 1, 8, 3, 0)
        self.note(DOMIO, Kind.ANSWERED, 0, 5, 51712, index, status)

    def found(self) -> list[Request | Transfer]:
        return list(RequestJoiner().feed(self.entries))


def test_a_request_is_joined_and_told() -> None:
    story = Story()
    story.taken()
    story.submitted()
    story.moved()
    story.answered()
    (request,) = story.found()
    assert isinstance(request, Request)
    assert [command.prps for command in request.commands] == [[(IOVA, 4096), (IOVA + 0x1000, 4096)]]
    (transfer,) = request.transfers
    assert (transfer.length, transfer.write) == (8192, True)
    assert transfer.pieces == [(IOVA, 4096, 0xABC000, 5), (IOVA + 0x1000, 4096, 0xDEF000, 5)]
    text = request_text(request, {5: "web"})
    assert (
        "d5 web xvda ring 0 request 7 (id 0x11): READ 16 sectors at 2048; answered OKAY after 11 us" in text
    )
    assert "  1 driver    0000:00:01.0 queue 1 command 3: PRP pseudophysical 0x200000000, 4096 bytes" in text
    assert "  2 device    0000:00:01.0 asks for 8192 bytes to memory, I/O virtual 0x200000000" in text
    assert "  3 IOMMU     0x200001000 -> machine 0xdef000, 4096 bytes of d5 web" in text


def test_a_device_that_claims_another_command_is_not_believed() -> None:
    """The address is in the PRPs of command 3 alone; it says command 9."""
    story = Story()
    story.taken()
    story.submitted()
    story.moved(command=9)
    story.answered()
    (request,) = story.found()
    assert isinstance(request, Request)
    assert len(request.transfers) == 1


def test_a_fault_is_told_with_its_request_or_by_itself() -> None:
    story = Story()
    story.taken()
    story.submitted()
    story.moved(fault=5)
    story.answered(status=0xFFFF)
    (request,) = story.found()
    assert isinstance(request, Request)
    assert "FAULT: no right to write there; no byte moved" in request_text(request, {})
    assert "answered ERROR" in request_text(request, {})
    story = Story()
    story.taken()
    story.submitted()
    story.moved(fault=5, iova=0x1234000)
    (alone,) = story.found()
    assert isinstance(alone, Transfer)
    assert "I/O virtual 0x1234000" in loose_text(alone, {})


def test_a_device_that_starts_anew_uses_its_tokens_again() -> None:
    """As after a kill of the NVMe process: the same token and item, and for the same address. The later request has its steps 2 and 3."""
    for claims in (True, False):
        story = Story()
        for index in (7, 8):
            story.taken(index)
            story.submitted()
            story.moved()
            story.answered(index=index)
        story.entries = [e for e in story.entries if claims or e.record.kind != Kind.REQUEST]
        first, second = story.found()
        assert isinstance(first, Request)
        assert isinstance(second, Request)
        assert [len(each.transfers) for each in (first, second)] == [1, 1]
        assert [each.transfers[0].length for each in (first, second)] == [8192, 8192]


def test_a_request_that_is_redone_by_a_device_that_starts_anew_has_both_tries() -> None:
    """Killed between the DMA and the completion: the driver submits the same command again, the device asks again."""
    story = Story()
    story.taken()
    story.submitted()
    story.moved()
    story.submitted()
    story.moved()
    story.answered()
    (request,) = story.found()
    assert isinstance(request, Request)
    assert [transfer.length for transfer in request.transfers] == [8192, 8192]


def test_one_request_is_bounded() -> None:
    """Segments, commands, PRPs, transfers and pieces without end: what is left out is counted and told."""
    joiner = RequestJoiner()
    story = Story()
    story.taken()
    story.submitted()
    for turn in range(1500):
        story.note(DOMIO, Kind.SEGMENT, 0, 5, 51712, 7, 1, 32, IOVA, 4096)
        story.note(DOMIO, Kind.PRP, 1, 8, 3, 1, IOVA + 0x1000, 4096)
        story.note(XEN, Kind.DMA, 2, 8, turn, 5, IOVA, 4096, 0xABC000, 5)
        story.note(XEN, Kind.DMA, 2, 8, turn, 5, IOVA + 4096, 4096, 0xABC000, 5)
    assert list(joiner.feed(story.entries)) == []
    (request,) = joiner._requests.values()
    pieces = sum(len(transfer.pieces) for transfer in request.transfers)
    prps = sum(len(command.prps) for command in request.commands)
    kept = len(request.segments) + len(request.commands) + prps + len(request.transfers) + pieces
    assert kept == request.parts == joiner._parts == MAX_PARTS
    story.entries.clear()
    story.answered()
    (done,) = joiner.feed(story.entries)
    assert isinstance(done, Request)
    assert "more records of it were left out" in request_text(done, {})
    assert joiner._parts == 0
    assert all(transfer.request is None for transfer in joiner._transfers.values())
    assert not joiner._owners


def test_all_requests_together_are_bounded() -> None:
    """Each just below its own bound."""
    joiner = RequestJoiner()
    each = MAX_PARTS - 10
    for index in range(MAX_ALL_PARTS // each + 3):
        story = Story()
        story.taken(index)
        for _ in range(each):
            story.note(DOMIO, Kind.SEGMENT, 0, 5, 51712, index, 1, 32, IOVA, 4096)
        assert list(joiner.feed(story.entries)) == []
        assert joiner._parts <= MAX_ALL_PARTS
    assert joiner.forgotten
    assert joiner._parts == sum(request.parts for request in joiner._requests.values())


def test_commands_and_transfers_of_no_request_are_bounded_too() -> None:
    joiner = RequestJoiner()
    story = Story()
    story.note(DOMIO, Kind.SUBMIT, 1, 8, 3, 40, 2, 2048, 16, 0)
    for turn in range(1000):
        story.note(DOMIO, Kind.PRP, 1, 8, 3, turn, IOVA, 4096)
        story.note(XEN, Kind.DMA, 2, 8, 99, 5, 4096 * turn, 4096, 0xABC000, 5)
    assert list(joiner.feed(story.entries)) == []
    assert len(joiner._commands[8, 1, 3].prps) < 100
    assert len(joiner._transfers[8, 99, 5].pieces) < 100


def test_what_is_never_answered_is_forgotten_in_time() -> None:
    joiner = RequestJoiner()
    story = Story()
    for index in range(MAX_REQUESTS + 50):
        story.taken(index)
    assert list(joiner.feed(story.entries)) == []
    assert joiner.forgotten == 50
    assert len(joiner._requests) == MAX_REQUESTS


def test_records_of_nobody_are_no_trouble() -> None:
    """Answers, segments and DMA whose beginnings were not seen; numbers of no kind."""
    story = Story()
    story.answered()
    story.note(DOMIO, Kind.SEGMENT, 0, 5, 51712, 7, 0, 31, IOVA, 4096)
    story.note(DOMIO, Kind.PRP, 1, 8, 3, 0, IOVA, 4096)
    story.moved()
    story.entries.append(Entry(DOMIO, Record(1, 999, 0, 0, (0,) * 6)))
    assert story.found() == []


def test_names() -> None:
    assert [disk_name(number) for number in (51712, 51729, 2048, 768, 5696, 1 << 28 | 27 << 8 | 1, 7)] == [
        "xvda", "xvdb1", "sda", "hda", "hdd", "xvdab1", "7",
    ]  # fmt: skip
    assert device_name(0x1_0208) == "0001:02:01.0"
    assert hypercall_name(20, 0) == "GNTTABOP_map_grant_ref"
    assert hypercall_name(64) == "hypercall 64"
