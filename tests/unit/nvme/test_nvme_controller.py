"""Life cycle, admin commands, queues, interrupts: as the specification has them, and with drivers that break the rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.hw.nvme import spec
from drivers.hw.nvme.spec import AdminOpcode, Cns, Feature, IoOpcode, Status
from drivers.hw.pci import COMMAND, COMMAND_MEMORY, MSIX_ENABLE, MSIX_FUNCTION_MASK
from tests.unit.nvme.nvme_host import ACQ, ASQ, DATA, MSIX_CAP, PAGE, Host

ENABLE = 4 << spec.CC_IOCQES_SHIFT | 6 << spec.CC_IOSQES_SHIFT | spec.CC_EN


@pytest.fixture
def host() -> Host:
    made = Host()
    made.enable()
    return made


def test_reset_values_and_enable() -> None:
    """CAP, VS and CSTS before and after CC.EN; doorbells of an earlier life are zeroed."""
    host = Host()
    assert host.read(spec.REG_VS) == 0xFFFF_FFFF  # memory decoding is off
    host.page[:8] = b"\xff" * 8
    host.enable()
    assert host.read(spec.REG_VS) == spec.VERSION_1_4
    cap = host.read(spec.REG_CAP, 8)
    assert cap & spec.CAP_MQES_MASK == 1023
    assert cap & spec.CAP_CQR
    assert cap & spec.CAP_CSS_NVM
    assert host.read(spec.REG_CSTS) == spec.CSTS_RDY
    assert bytes(host.page[:8]) == bytes(8)
    host.write(spec.REG_CC, 0)
    assert host.read(spec.REG_CSTS) == 0


@pytest.mark.parametrize(
    "cc", [ENABLE | 1 << spec.CC_MPS_SHIFT, ENABLE | 6 << spec.CC_CSS_SHIFT, ENABLE | 1 << 11]
)
def test_enabled_with_values_it_does_not_have(cc: int) -> None:
    """Fatal status, not ready; a reset makes it well again."""
    host = Host()
    host.config(COMMAND, 2, COMMAND_MEMORY)
    host.write(spec.REG_AQA, 0xF000F)
    host.write(spec.REG_CC, cc)
    assert host.read(spec.REG_CSTS) == spec.CSTS_CFS
    host.write(spec.REG_CC, 0)
    host.enable()
    assert host.read(spec.REG_CSTS) == spec.CSTS_RDY


def test_admin_queue_memory_that_cannot_be_reached_is_fatal() -> None:
    """Submission queue not readable, completion queue not writable: CSTS.CFS, until a reset."""
    for hole in (ASQ, ACQ):
        host = Host()
        host.enable()
        host.holes = {hole >> 12}
        host.put(0, host.command(AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA))
        host.ring(0)
        assert host.read(spec.REG_CSTS) & spec.CSTS_CFS
        host.holes = set()
        host.write(spec.REG_CC, 0)
        host.memory[ACQ : ACQ + PAGE] = bytes(PAGE)
        host.enable()
        assert host.status(0, AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA) == 0


def test_reset_waits_for_what_is_under_way(host: Host) -> None:
    """CSTS.RDY stays while DMA of the old life may still land; then nothing of it is answered."""
    host.io_queue()
    host.hold = True
    host.put(1, host.command(IoOpcode.READ, nsid=1, prp1=DATA))
    host.ring(1)
    host.write(spec.REG_CC, 0)
    assert host.read(spec.REG_CSTS) == spec.CSTS_RDY
    host.hold = False
    host.run()
    assert host.read(spec.REG_CSTS) == 0
    assert not host.model.controller.busy
    assert host.reap(1) == []


def test_doorbells_of_before_a_reset_do_not_ring_the_new_queues(host: Host) -> None:
    """The page is looked at between the enabling and its clearing: the old tail fetches nothing."""
    words = host.page.cast("I")
    for number in range(3):
        host.put(0, host.command(AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA))
        words[0] = number + 1
        host.model.doorbells(host.now, 0, words)
        host.run()
        assert len(host.reap(0)) == 1
    host.write(spec.REG_CC, 0)
    host.memory[ACQ : ACQ + PAGE] = bytes(PAGE)
    host.memory[ASQ : ASQ + PAGE] = bytes(PAGE)
    before = host.batches
    host.model.access(host.now, 0, spec.REG_CC, 4, ENABLE)
    host.model.doorbells(host.now, 0, words)
    host.run()
    assert words[0] == 0
    host.model.doorbells(host.now, 0, words)
    host.run()
    assert host.batches == before
    host.tails, host.heads = {0: 0}, {0: (0, 1)}
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA) == 0


def test_shutdown_flushes_and_reports() -> None:
    """CC.SHN: after the commands are done and the media flushed, SHST is 'complete', and no command is fetched."""
    host = Host()
    host.enable()
    host.io_queue()
    host.write(spec.REG_CC, ENABLE | spec.SHN_NORMAL << spec.CC_SHN_SHIFT)
    assert host.read(spec.REG_CSTS) >> spec.CSTS_SHST_SHIFT & 3 == spec.SHST_COMPLETE
    host.put(1, host.command(IoOpcode.READ, nsid=1, prp1=DATA))
    host.ring(1)
    assert host.reap(1) == []
    host.write(spec.REG_CC, 0)
    assert host.read(spec.REG_CSTS) == 0


def test_no_dma_and_no_interrupt_without_bus_master() -> None:
    """Requests wait until the bus master bit is set."""
    host = Host()
    host.enable()
    host.config(COMMAND, 2, COMMAND_MEMORY)
    before = host.batches
    host.put(0, host.command(AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA))
    host.ring(0)
    assert host.batches == before
    host.config(COMMAND, 2, COMMAND_MEMORY | 4)
    assert len(host.reap(0)) == 1


def test_identify(host: Host) -> None:
    """Controller, namespace, lists, descriptors; unknown namespaces and selectors are refused."""
    page = {"prp1": DATA}
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=Cns.CONTROLLER, **page) == 0
    controller = spec.IDENTIFY_CONTROLLER.unpack(host.memory, DATA)
    assert (controller.sqes, controller.cqes, controller.nn, controller.sgls) == (0x66, 0x44, 1, 1)
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=Cns.NAMESPACE, nsid=1, **page) == 0
    namespace = spec.IDENTIFY_NAMESPACE.unpack(host.memory, DATA)
    assert (namespace.nsze, spec.block_shift(namespace)) == (2048, 9)
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=Cns.ACTIVE_NAMESPACES, nsid=0, **page) == 0
    assert host.memory[DATA : DATA + 8] == (1).to_bytes(8, "little")
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=Cns.NAMESPACE_DESCRIPTORS, nsid=1, **page) == 0
    assert host.memory[DATA + 4 : DATA + 20] == namespace.nguid
    bad = [(Cns.NAMESPACE, 2), (Cns.NAMESPACE, spec.NSID_ALL), (Cns.NAMESPACE_DESCRIPTORS, 2)]
    for cns, nsid in bad:
        assert host.status(0, AdminOpcode.IDENTIFY, cdw10=cns, nsid=nsid, **page) == Status.INVALID_NAMESPACE
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=0x77, **page) == Status.INVALID_FIELD


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0000, "cdw11": 3}, Status.INVALID_QID),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0011, "cdw11": 3}, Status.INVALID_QID),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0001, "cdw11": 3}, Status.INVALID_QID),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0x00002, "cdw11": 3}, Status.INVALID_QUEUE_SIZE),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0x4000002, "cdw11": 3}, Status.INVALID_QUEUE_SIZE),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0002, "cdw11": 17 << 16 | 3}, Status.INVALID_VECTOR),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0002, "cdw11": 2}, Status.INVALID_FIELD),
        (AdminOpcode.CREATE_CQ, {"cdw10": 0xF0002, "cdw11": 3, "prp1": 0x30010}, Status.INVALID_PRP_OFFSET),
        (AdminOpcode.CREATE_SQ, {"cdw10": 0xF0002, "cdw11": 2 << 16 | 1}, Status.CQ_INVALID),
        (AdminOpcode.CREATE_SQ, {"cdw10": 0xF0002, "cdw11": 1}, Status.INVALID_QID),
        (AdminOpcode.CREATE_SQ, {"cdw10": 0xF0001, "cdw11": 1 << 16 | 1}, Status.INVALID_QID),
        (AdminOpcode.CREATE_SQ, {"cdw10": 0x00002, "cdw11": 1 << 16 | 1}, Status.INVALID_QUEUE_SIZE),
        (AdminOpcode.DELETE_SQ, {"cdw10": 0}, Status.INVALID_QID),
        (AdminOpcode.DELETE_SQ, {"cdw10": 7}, Status.INVALID_QID),
        (AdminOpcode.DELETE_CQ, {"cdw10": 0}, Status.INVALID_QID),
        (AdminOpcode.DELETE_CQ, {"cdw10": 1}, Status.INVALID_QUEUE_DELETION),
        (AdminOpcode.SET_FEATURES, {"cdw10": Feature.NUMBER_OF_QUEUES}, Status.COMMAND_SEQUENCE),
        (AdminOpcode.SET_FEATURES, {"cdw10": 1 << 31 | 6}, Status.FEATURE_NOT_SAVEABLE),
        (AdminOpcode.SET_FEATURES, {"cdw10": 0x0F}, Status.INVALID_FIELD),
        (AdminOpcode.GET_FEATURES, {"cdw10": 0x0F}, Status.INVALID_FIELD),
        (AdminOpcode.GET_FEATURES, {"cdw10": Feature.INTERRUPT_VECTOR, "cdw11": 17}, Status.INVALID_FIELD),
        (AdminOpcode.GET_LOG_PAGE, {"cdw10": 0x7F0080}, Status.INVALID_LOG_PAGE),
        (AdminOpcode.GET_LOG_PAGE, {"cdw10": 0xFFFF0002, "cdw11": 0xFFFF}, Status.INVALID_FIELD),
        (AdminOpcode.GET_LOG_PAGE, {"cdw10": 0x7F0002, "cdw12": 516}, Status.INVALID_FIELD),
        (AdminOpcode.KEEP_ALIVE, {}, Status.INVALID_OPCODE),
        (AdminOpcode.FORMAT_NVM, {}, Status.INVALID_OPCODE),
        (AdminOpcode.FIRMWARE_COMMIT, {}, Status.INVALID_OPCODE),
        (AdminOpcode.DOORBELL_BUFFER, {}, Status.INVALID_OPCODE),
        (0xC0, {}, Status.INVALID_OPCODE),
    ],
)
def test_admin_commands_refused(host: Host, opcode: int, fields: dict[str, int], status: int) -> None:
    """Each has its status, and the queue goes on."""
    host.io_queue(size=16)
    assert host.status(0, opcode, **{"prp1": DATA, **fields}) == status
    assert host.status(0, AdminOpcode.GET_FEATURES, cdw10=Feature.VOLATILE_WRITE_CACHE) == 0


def test_features(host: Host) -> None:
    """Values come back; number of queues as given; defaults return with a reset."""
    done = host.admin(AdminOpcode.SET_FEATURES, cdw10=Feature.NUMBER_OF_QUEUES, cdw11=0x3F003F)
    assert done.dw0 == 0xF000F
    for feature, value in ((Feature.INTERRUPT_COALESCING, 0x0A05), (Feature.VOLATILE_WRITE_CACHE, 0)):
        assert host.status(0, AdminOpcode.SET_FEATURES, cdw10=feature, cdw11=value) == 0
        assert host.admin(AdminOpcode.GET_FEATURES, cdw10=feature).dw0 == value
    host.write(spec.REG_CC, 0)
    host.memory[ACQ : ACQ + PAGE] = bytes(PAGE)
    host.enable()
    assert host.admin(AdminOpcode.GET_FEATURES, cdw10=Feature.VOLATILE_WRITE_CACHE).dw0 == 1


def test_logs_count_what_happened(host: Host) -> None:
    """An error entry names queue, command and LBA; SMART counts commands."""
    host.io_queue()
    bad = host.do(1, IoOpcode.READ, nsid=1, prp1=DATA, cdw10=5000)
    assert bad.status & spec.STATUS_MORE
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
    assert host.status(0, AdminOpcode.GET_LOG_PAGE, cdw10=15 << 16 | 1, prp1=DATA) == 0
    entry = spec.ERROR_ENTRY.unpack(host.memory, DATA)
    assert (entry.sqid, entry.cid, entry.lba, entry.nsid) == (1, bad.cid, 5000, 1)
    assert spec.status_of(entry.status) == Status.LBA_OUT_OF_RANGE
    assert host.status(0, AdminOpcode.GET_LOG_PAGE, cdw10=127 << 16 | 2, prp1=DATA) == 0
    smart = spec.SMART_LOG.unpack(host.memory, DATA)
    assert int.from_bytes(smart.read_commands, "little") == 1
    assert int.from_bytes(smart.error_entries, "little") == 1


def test_asynchronous_events(host: Host) -> None:
    """A wrong doorbell is told once, again only after the log was read; a fifth request is refused; abort answers a parked one."""
    requests = [host.command(AdminOpcode.ASYNC_EVENT) for _ in range(5)]
    for request in requests:
        host.put(0, request)
    host.ring(0)
    (fifth,) = host.reap(0)
    assert (fifth.cid, spec.status_of(fifth.status)) == (requests[4].cid, Status.ASYNC_EVENT_LIMIT)
    host.write(spec.sq_doorbell(9), 1)
    (told,) = host.reap(0)
    assert told.dw0 == spec.EVENT_ERROR | spec.ERROR_BAD_DOORBELL_REGISTER << 8 | 1 << 16
    host.write(spec.sq_doorbell(0), 999)
    assert host.reap(0) == []
    assert host.status(0, AdminOpcode.GET_LOG_PAGE, cdw10=15 << 16 | 1, prp1=DATA) == 0
    host.write(spec.sq_doorbell(0), 999)
    assert host.reap(0)[0].dw0 >> 8 & 0xFF == spec.ERROR_BAD_DOORBELL_VALUE
    abort = host.command(AdminOpcode.ABORT, cdw10=requests[2].cid << 16)
    host.put(0, abort)
    host.ring(0)
    done = {entry.cid: entry for entry in host.reap(0)}
    assert spec.status_of(done[requests[2].cid].status) == Status.ABORT_REQUESTED
    assert done[abort.cid].dw0 == 0


def test_full_completion_queue_holds_commands_back(host: Host) -> None:
    """With 7 slots and a driver that does not take entries, 7 of 20 commands are answered and none is overwritten; each head doorbell
    lets as many more go, over several wraps."""
    host.io_queue(size=8)
    sent = 0
    seen: list[int] = []
    expected: list[int] = []
    while len(seen) < 60:
        while (host.tails[1] + 1) % 8 != host.model.controller.sqs[1].head and sent < 60:
            command = host.command(IoOpcode.READ, nsid=1, prp1=DATA)
            expected.append(command.cid)
            host.put(1, command)
            host.ring(1)
            sent += 1
        found = host.reap(1)
        assert 0 < len(found) <= 7
        seen += [entry.cid for entry in found]
    assert seen == expected


def test_deleting_a_queue_answers_its_commands_first(host: Host) -> None:
    """DELETE_SQ completes after the queue's commands; the doorbell is then one of no queue."""
    host.io_queue()
    host.hold = True
    command = host.command(IoOpcode.READ, nsid=1, prp1=DATA)
    host.put(1, command)
    host.ring(1)
    host.put(0, host.command(AdminOpcode.DELETE_SQ, cdw10=1))
    host.ring(0)
    host.hold = False
    host.run()
    assert [entry.cid for entry in host.reap(1)] == [command.cid]
    assert [spec.status_of(entry.status) for entry in host.reap(0)] == [0]
    assert host.status(0, AdminOpcode.DELETE_CQ, cdw10=1) == 0
    host.io_queue()
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0


def test_command_id_in_use(host: Host) -> None:
    """The second of two commands of one id at the same time is refused."""
    host.io_queue()
    command = host.command(IoOpcode.READ, nsid=1, prp1=DATA)
    host.put(1, command)
    host.put(1, command)
    host.ring(1)
    statuses = sorted(spec.status_of(entry.status) for entry in host.reap(1))
    assert statuses == [Status.SUCCESS, Status.CID_CONFLICT]


def test_masks_make_vectors_pending(host: Host) -> None:
    """A masked vector (its own mask, or the function's) is raised when the mask goes, and not twice; with MSI-X off none is."""
    host.io_queue()
    for masked, unmasked in (
        (lambda: host.write(0x2000 + 16 + 12, 1), lambda: host.write(0x2000 + 16 + 12, 0)),
        (
            lambda: host.config(MSIX_CAP + 2, 2, MSIX_ENABLE | MSIX_FUNCTION_MASK),
            lambda: host.config(MSIX_CAP + 2, 2, MSIX_ENABLE),
        ),
    ):
        masked()
        host.raised = []
        assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
        assert host.raised == []
        assert host.read(0x3000, 8) == 2
        unmasked()
        assert host.raised == [1]
        assert host.read(0x3000, 8) == 0
    host.config(MSIX_CAP + 2, 2, 0)
    host.raised = []
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
    assert host.raised == []


def test_coalescing(host: Host) -> None:
    """Four entries, or 1 ms, an interrupt; a vector that is excepted is raised at once."""
    assert (
        host.status(0, AdminOpcode.SET_FEATURES, cdw10=Feature.INTERRUPT_COALESCING, cdw11=10 << 8 | 3) == 0
    )
    host.io_queue()
    host.raised = []
    for count in range(1, 9):
        assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
        assert host.raised == [1] * (count // 4)
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
    deadline = host.model.next_deadline()
    assert deadline == host.now + 1_000_000
    host.now = deadline
    host.model.tick(host.now)
    host.run()
    assert host.raised == [1, 1, 1]
    exception = {"cdw10": Feature.INTERRUPT_VECTOR, "cdw11": 1 << 16 | 1}
    assert host.status(0, AdminOpcode.SET_FEATURES, **exception) == 0
    host.raised = []
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0
    assert host.raised == [1]


def test_a_refused_vector_does_not_take_others_with_it(host: Host) -> None:
    """Two queues complete in one message and the first one's vector is refused: the second one's comes."""
    host.io_queue(1, vector=1)
    host.io_queue(2, vector=2)
    host.refused_vectors = {1}
    host.raised = []
    for qid in (1, 2):
        host.put(qid, host.command(IoOpcode.READ, nsid=1, prp1=DATA))
        host.model.access(host.now, 0, spec.sq_doorbell(qid), 4, 1)
    host.run()
    assert len(host.reap(1)) == len(host.reap(2)) == 1
    assert 2 in host.raised


def test_doorbell_page(host: Host) -> None:
    """Values stored in the page count like writes; a value that cannot be is reported once and changes nothing."""
    host.io_queue()
    host.put(1, host.command(IoOpcode.READ, nsid=1, prp1=DATA))
    words = host.page.cast("I")
    words[2] = host.tails[1]
    host.model.doorbells(host.now, 0, words)
    host.run()
    assert len(host.reap(1, ring=False)) == 1
    words[3] = 1
    words[2] = 0xFFFF_FFFF
    host.model.doorbells(host.now, 0, words)
    host.run()
    controller = host.model.controller
    assert controller.cqs[1].head == 1
    assert controller.sqs[1].tail == 1


def test_function_level_reset(host: Host) -> None:
    """By the PCI Express capability: registers, configuration space and queues are as after power on."""
    host.io_queue()
    host.config(0x48 + 8, 2, 1 << 15)
    assert host.config(COMMAND, 2) == 0
    host.config(COMMAND, 2, COMMAND_MEMORY)
    assert host.read(spec.REG_CC) == host.read(spec.REG_CSTS) == host.read(spec.REG_AQA) == 0


def test_a_shutdown_while_disabled_is_taken_back(host: Host) -> None:
    """CC.SHN without CC.EN, then neither: the controller can be enabled and serves."""
    host.write(spec.REG_CC, 0)
    host.run()
    host.write(spec.REG_CC, 1 << 14)
    host.run()
    assert host.read(spec.REG_CSTS) & spec.CSTS_SHST_MASK
    host.write(spec.REG_CC, 0)
    host.run()
    assert host.read(spec.REG_CSTS) == 0
    host.memory[ACQ : ACQ + PAGE] = bytes(PAGE)
    host.enable()
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA) == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_driver_is_answered(data: st.DataObject) -> None:
    """Random register writes, doorbells, queue entries, holes in memory and resets: no exception, bounded buffers; and after a reset
    by the book the controller serves."""
    host = Host()
    host.enable()
    host.io_queue(size=8)
    words = st.integers(0, 0xFFFF_FFFF)
    offsets = st.sampled_from(
        [*range(0, 0x60, 4), *range(0x1000, 0x1040, 4), *range(0x2000, 0x2040, 4), 0x3000]
    )
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.integers(0, 5))
        if kind == 0:
            size = data.draw(st.sampled_from([1, 2, 4, 8]))
            host.write(data.draw(offsets), data.draw(st.integers(0, (1 << 8 * size) - 1)), size)
        elif kind == 1:
            host.read(data.draw(st.integers(0, 0x4000)), data.draw(st.sampled_from([1, 2, 4, 8])))
        elif kind == 2:
            qid = data.draw(st.integers(0, 1))
            command = spec.COMMAND.zero()._replace(
                opcode=data.draw(st.sampled_from([0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 255])),
                cid=data.draw(st.integers(0, 3)),
                nsid=data.draw(st.sampled_from([0, 1, 2, 0xFFFFFFFF])),
                prp1=data.draw(st.sampled_from([0, DATA, DATA + 4, 0x41000, 1 << 63, (1 << 64) - 8])),
                prp2=data.draw(st.sampled_from([0, 0x90000, 0x90FF8, 0x41000, (1 << 64) - 4096])),
                cdw10=data.draw(words),
                cdw11=data.draw(words),
                cdw12=data.draw(words),
            )
            host.put(qid, command)
            host.write(spec.sq_doorbell(qid), data.draw(st.integers(0, 9)))
        elif kind == 3:
            host.holes = {data.draw(st.sampled_from([ASQ, ACQ, 0x50000, 0x58000, DATA, 0x90000])) >> 12}
        elif kind == 4:
            host.write(spec.REG_CC, data.draw(st.sampled_from([0, ENABLE, ENABLE | 1 << 14])))
        else:
            host.config(data.draw(st.integers(0, 0xFF)), 4, data.draw(words))
        assert host.model.controller.tasks <= 2048
    host.holes = set()
    host.config(0x44, 2, 0)
    host.config(COMMAND, 2, COMMAND_MEMORY | 4)
    host.run()
    host.write(spec.REG_CC, 0)
    host.run()
    assert host.read(spec.REG_CSTS) == 0
    host.memory[ACQ : ACQ + PAGE] = bytes(PAGE)
    host.enable()
    assert host.status(0, AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA) == 0
    assert host.model.controller.staging.in_use == 16
