"""A guest's process and a device model, joined by the ioreq area as on a machine: the one in this thread, the other in another."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hvm_rig import CODE, DATA, Rig, mov

from bus import ioreq_area as area
from bus.abi.hvm import dm_op, save
from bus.abi.hvm.ioreq import IOREQ_TYPE_PIO
from bus.abi.hvm.save import hvm_hw_cpu
from bus.ioreq_area import Access, Note
from domains.dm import guest as guest_module
from domains.dm.guest import Guest, GuestGone
from domains.hvm import model as model_module
from domains.hvm.context import first_cpu
from domains.hvm.model import Model
from drivers.pc.bus import GuestMemoryError, MmioSpace, PortSpace, Range

PORT, MMIO = 0x1F0, 0xE0000000
pytestmark = pytest.mark.usefixtures("paging")
HLT = "f4"


def out8(port: int, value: int) -> str:
    """mov dx, port; mov al, value; out dx, al."""
    return f"66ba{struct.pack('<H', port).hex()}b0{value:02x}ee"


def in8(port: int) -> str:
    """mov dx, port; in al, dx."""
    return f"66ba{struct.pack('<H', port).hex()}ec"


class Pair:
    """`device` is called on the device model's thread with (offset, size, value or None)."""

    def __init__(self, code: str, device: Callable[[int, int, int | None], int], **more: Any) -> None:
        self.rig = Rig(code, board=True, **more)
        memory = area.create()
        guest, model = area.bells()
        self.held = False
        self.idle = 0
        domain = self.rig.domain
        self.model: Model = domain.join_model(
            0, [os.dup(memory), *(os.dup(bell.fd) for bell in guest)], self._idle
        )
        self.ports, self.mmio = PortSpace(), MmioSpace()

        def read(offset: int, size: int) -> int:
            return device(offset, size, None)

        def write(offset: int, size: int, value: int) -> None:
            device(offset, size, value)

        self.ports.add(Range("test", PORT, 8, read, write, 4))
        self.mmio.add(Range("test", MMIO, 0x1000, read, write, 8))
        self.guest = Guest([memory, *(os.dup(bell.fd) for bell in model)], self.ports, self.mmio, 1)
        for bell in (*guest, *model):
            bell.close()
        for kind, first, last in ((0, PORT, PORT + 7), (1, MMIO, MMIO + 0xFFF)):
            assert domain.model_changed({"id": 0, "add": [kind, first, last]})
        assert domain.model_changed({"id": 0, "enabled": True})
        self.stop = False
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.serving = True

    def _idle(self) -> None:
        self.idle += 1

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self.guest.request.fd, select.POLLIN)
        while not self.stop:
            if poller.poll(20):
                while self.guest.serve():
                    pass

    def run(self, slices: int = 50) -> Rig:
        if self.serving:
            self.thread.start()
        self.rig.run(slices)
        return self.rig

    def close(self) -> None:
        self.stop = True
        if self.serving:
            self.thread.join(5)
        self.guest.close()
        self.rig.domain.retire_model("the test is over")
        self.rig.domain.run_slice()


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*arguments: Any, **more: Any) -> Pair:
        made.append(Pair(*arguments, **more))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def test_ports_and_memory_go_to_the_device_model_and_back(pairs: Callable[..., Pair]) -> None:
    seen: list[tuple[int, int, int | None]] = []

    def device(offset: int, size: int, value: int | None) -> int:
        seen.append((offset, size, value))
        return 0x11223344_55667788 & (1 << 8 * size) - 1

    code = (
        out8(PORT + 1, 0x42)
        + in8(PORT + 2)
        + "8804255000" + "0200"  # mov [0x20050], al
        + f"48be{struct.pack('<Q', MMIO + 8).hex()}"  # mov rsi, MMIO + 8
        + "488b06 48890425" + struct.pack("<I", DATA).hex()  # mov rax, [rsi]; mov [DATA], rax
        + "66c7065500" + HLT  # mov word [rsi], 0x55
    )  # fmt: skip
    rig = pairs(code.replace(" ", ""), device).run()
    # The vCPU takes 8 bytes of a device as two times four.
    assert seen == [(1, 1, 0x42), (2, 1, None), (8, 4, None), (12, 4, None), (8, 2, 0x55)]
    assert rig.buffer[DATA + 0x50] == 0x88
    assert rig.buffer[DATA : DATA + 8] == struct.pack("<Q", 0x55667788_55667788)


def test_ports_of_nobody_read_as_ones_without_the_device_model(pairs: Callable[..., Pair]) -> None:
    seen: list[int] = []
    pair = pairs(in8(0x300) + HLT, lambda offset, size, value: seen.append(offset) or 0)
    rig = pair.run()
    assert rig.regs.rax & 0xFF == 0xFF
    assert not seen
    assert pair.model.accesses == 0


@pytest.mark.parametrize("count", [2, 256, 1000])
@pytest.mark.parametrize("start", [DATA, DATA + 0xFF0])
def test_rep_insw_is_a_few_exits_and_leaves_memory_and_registers_as_step_by_step(
    pairs: Callable[..., Pair], count: int, start: int
) -> None:
    state = [0]

    def device(offset: int, size: int, value: int | None) -> int:
        state[0] += 1
        return state[0] & 0xFFFF

    code = f"66ba{struct.pack('<H', PORT).hex()}" + mov("edi", start) + mov("ecx", count) + "f3666d" + HLT
    pair = pairs(code, device)
    rig = pair.run()
    words = struct.unpack_from(f"<{count}H", rig.buffer, start)
    assert words == tuple(range(1, count + 1))
    assert (rig.regs.rdi, rig.regs.rcx) == (start + 2 * count, 0)
    assert pair.model.accesses <= 2 + count // 1024 + 1
    assert rig.domain.crash_text is None


def test_rep_outsw_takes_its_words_from_memory(pairs: Callable[..., Pair]) -> None:
    seen: list[int | None] = []
    code = (
        f"66ba{struct.pack('<H', PORT).hex()}" + mov("esi", DATA + 0xF00) + mov("ecx", 256) + "f3666f" + HLT
    )
    pair = pairs(code, lambda offset, size, value: seen.append(value) or 0)
    for index in range(256):
        struct.pack_into("<H", pair.rig.buffer, DATA + 0xF00 + 2 * index, index * 3)
    rig = pair.run()
    assert seen == [index * 3 for index in range(256)]
    assert (rig.regs.rsi, rig.regs.rcx) == (DATA + 0xF00 + 512, 0)
    assert pair.model.accesses == 2, "one for each page"


def test_dma_reaches_the_guests_memory_and_drops_its_translations(pairs: Callable[..., Pair]) -> None:
    """Code that was run is replaced by DMA before the access returns: the new code runs."""
    target = 0x30000
    pair_box: list[Pair] = []

    def device(offset: int, size: int, value: int | None) -> int:
        guest = pair_box[0].guest
        assert guest.read(DATA, 4) == b"abcd"
        guest.write(target, bytes.fromhex("b802000000c3"))  # mov eax, 2; ret
        return 0

    call = f"48c7c3{struct.pack('<I', target).hex()}ffd3"  # mov rbx, target; call rbx
    store = "890425" + struct.pack("<I", DATA + 16).hex()
    code = call + out8(PORT, 1) + call + store + HLT
    pair = pairs(code, device)
    pair_box.append(pair)
    pair.rig.write(target, "b801000000c3")
    pair.rig.write(DATA, b"abcd")
    rig = pair.run()
    assert rig.word(DATA + 16) == 2


def test_an_interrupt_that_the_device_raises_is_taken_after_its_dma(pairs: Callable[..., Pair]) -> None:
    box: list[Pair] = []

    def device(offset: int, size: int, value: int | None) -> int:
        box[0].guest.write(DATA, b"\x07")
        box[0].guest.isa_irq(4, True)
        return 0

    handler = "8a0425" + struct.pack("<I", DATA).hex() + "880425" + struct.pack("<I", DATA + 8).hex() + HLT
    code = (
        out8(0x20, 0x11) + out8(0x21, 0x20) + out8(0x21, 4) + out8(0x21, 1) + out8(0x21, 0xEF)
        + "fb" + out8(PORT, 1) + "ebfe"
    )  # fmt: skip
    pair = pairs(code, device)
    box.append(pair)
    pair.rig.write(0x70000, handler)
    pair.rig.gate(0x24, 0x70000)
    rig = pair.run(5)
    assert rig.buffer[DATA + 8] == 7


def test_the_frame_buffer_is_memory_of_both(pairs: Callable[..., Pair]) -> None:
    box: list[Pair] = []

    def device(offset: int, size: int, value: int | None) -> int:
        box[0].guest.map_vram(0xF0000000, 0x100000, 0x1000)
        return 0

    code = (
        out8(PORT, 1)
        + f"48bf{struct.pack('<Q', 0xF0000000).hex()}"
        + "c70778563412" + HLT  # mov dword [rdi], 0x12345678
    )  # fmt: skip
    pair = pairs(code, device)
    box.append(pair)
    pair.run()
    assert bytes(pair.guest.vram[0x1000:0x1004]) == struct.pack("<I", 0x12345678)


# --- a device model that is silent, gone or hostile


def test_a_silent_device_model_crashes_its_guest_within_the_bound(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "ANSWER_S", 0.3)
    pair = pairs(in8(PORT) + HLT, lambda offset, size, value: 0)
    pair.serving = False
    began = time.monotonic()
    rig = pair.run()
    assert time.monotonic() - began < 5
    assert rig.domain.crash_text is not None
    assert "the device model does not answer" in rig.domain.crash_text
    assert "read of port 0x1f0" in rig.domain.crash_text
    assert pair.idle > 2, "meanwhile the process serves its other duties"


def test_notes_that_make_no_sense_are_refused_and_harm_nothing(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    model, guest = pair.model, pair.guest
    before = bytes(pair.rig.buffer)
    top = len(pair.rig.buffer)
    bad = [
        Note(area.ISA_IRQ, 16, 1),
        Note(area.ISA_IRQ, 2, 1),
        Note(area.PCI_INTX, 128, 1),
        Note(area.LINK, 4, 5),
        Note(area.LINK, 0, 16),
        Note(area.MSI, 0x30, 0, 0x1000),
        Note(area.WRITE, 0, 0, top, 4096, 0),
        Note(area.WRITE, 0, 0, 0xFEE00000, 4096, 0),
        Note(area.WRITE, 0, 0, 1 << 60, 4096, 0),
        Note(area.WRITE, 0, 0, 0, 0, 0),
        Note(area.WRITE, 0, 0, 0, area.STAGING_SIZE + 1, 0),
        Note(area.WRITE, 0, 0, 0, 4096, area.STAGING_SIZE - 1),
        Note(area.MAP, 0, 0, 0, 4096, 0),
        Note(area.MAP, 0, 0, 0xFEE00000, 4096, 0),
        Note(area.MAP, 0, 0, 0xF0000800, 4096, 0),
        Note(area.MAP, 0, 0, 0xF0000000, 4096, area.VRAM_SIZE),
        Note(area.MAP, 0, 0, 1 << 60, 4096, 0),
        Note(area.UNMAP, 0, 0, 0xF0000000, 4096, 0),
        Note(99),
        Note(0),
    ]
    for note in bad:
        guest._put(note)
    model.carry_out()
    assert model.refused == len(bad)
    assert bytes(pair.rig.buffer) == before
    assert pair.rig.domain.cpu.crash_reason is None


def test_dma_reads_of_nowhere_are_told_to_the_device(pairs: Callable[..., Pair]) -> None:
    errors: list[str] = []
    box: list[Pair] = []

    def device(offset: int, size: int, value: int | None) -> int:
        with pytest.raises(GuestMemoryError):
            box[0].guest.read(0xD0000000, 16)
        errors.append("refused")
        return 0

    pair = pairs(in8(PORT) + HLT, device)
    box.append(pair)
    pair.run()
    assert errors == ["refused"]


def test_a_ring_index_that_makes_no_sense_crashes_the_guest_only(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    pair.guest._area.set_word(area.PRODUCED, 5000)
    pair.model.carry_out()
    assert pair.rig.domain.cpu.crash_reason == "the device model's ring of notes makes no sense"


def test_ranges_that_overlap_the_board_are_refused(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    domain = pair.rig.domain
    port = dm_op.XEN_DMOP_IO_RANGE_PORT
    assert not domain.model_changed({"id": 0, "add": [port, 0x20, 0x20]})
    assert not domain.model_changed({"id": 0, "add": [port, PORT, PORT]})
    assert not domain.model_changed({"id": 1, "add": [port, 0x900, 0x900]})
    assert domain.model_changed({"id": 0, "remove": [port, PORT, PORT + 7]})
    assert domain.model_changed({"id": 0, "add": [port, PORT, PORT]})


def cpu_records(context: bytes) -> list[hvm_hw_cpu]:
    """The CPU records of an HVM context, but for the time."""
    found, at = [], 0
    while at < len(context):
        descriptor = save.HVM_SAVE_DESCRIPTOR.unpack(context, at)
        at += save.HVM_SAVE_DESCRIPTOR.size
        if descriptor.typecode == save.TYPECODES["CPU"]:
            found.append(save.HVM_HW_CPU.unpack(context, at)._replace(tsc=0))
        at += descriptor.length
    return found


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("domicile-ioreq")


def test_servers_that_are_replaced_or_destroyed_leave_nothing(pairs: Callable[..., Pair]) -> None:
    """Memory, descriptors, ranges and frame buffers of a hundred servers, each replaced by the next or destroyed first."""
    pair = pairs("ebfe", lambda offset, size, value: 0)
    pair.serving = False
    domain, physmap = pair.rig.domain, pair.rig.physmap
    vram = 0xF0000000 >> 12

    def another(number: int, *, destroyed: bool) -> None:
        memory = area.create()
        guest, model = area.bells()
        if destroyed:
            assert domain.model_changed({"id": number, "gone": True})
            assert domain.model is None
        fresh = domain.join_model(
            number + 1, [os.dup(memory), *(os.dup(bell.fd) for bell in guest)], pair._idle
        )
        for bell in (*guest, *model):
            bell.close()
        assert domain.model_changed({"id": number + 1, "add": [0, PORT, PORT + 7]})
        os.close(memory)
        assert fresh._show(Note(area.MAP, 0, 0, 0xF0000000 + number * 0x1000, 0x4000, 0)), (
            "over the last one's"
        )
        pair.rig.run(1)

    another(0, destroyed=False)
    before, maps = len(os.listdir("/proc/self/fd")), mappings()
    for number in range(1, 101):
        another(number, destroyed=bool(number & 1))
    assert (len(os.listdir("/proc/self/fd")), mappings()) == (before, maps)
    assert list(physmap._device_memory) == [range(vram + 100, vram + 104)]
    assert domain.model_changed({"id": 101, "gone": True})
    pair.rig.run(1)
    assert (len(os.listdir("/proc/self/fd")), mappings()) == (before - 6, maps - 1)
    assert not physmap._device_memory


def test_a_server_that_is_replaced_during_an_access_ends_it_first(pairs: Callable[..., Pair]) -> None:
    """The order comes while the access waits; the guest reads ones and goes on, and then the memory goes."""
    pair = pairs(in8(PORT) + HLT, lambda offset, size, value: 0)
    pair.serving = False
    old = pair.model

    def idle() -> None:
        if pair.rig.domain.model is old:
            assert pair.rig.domain.model_changed({"id": 0, "gone": True})
            assert old._area.word(area.PRODUCED) == 0, "still there"

    old._idle = idle  # type: ignore[misc]
    rig = pair.run()
    assert rig.regs.rax & 0xFF == 0xFF
    assert rig.domain.crash_text is None
    assert rig.domain.model is None
    rig.domain.run_slice()
    with pytest.raises(ValueError, match="released"):
        old._area.word(area.PRODUCED)


@pytest.mark.parametrize("waiting", ["not started", "started by SIPI", "started", "has run"])
def test_a_context_that_is_asked_for_during_an_access_disturbs_nobody(
    pairs: Callable[..., Pair], waiting: str
) -> None:
    """XEN_DOMCTL_gethvmcontext while vCPU 0 waits for the device model, and vCPU 1 for its turn, or to be started."""
    seen: list[list[hvm_hw_cpu]] = []
    asked = threading.Event()

    def device(offset: int, size: int, value: int | None) -> int:
        assert asked.wait(20.0)
        return 0x5A

    code = mov("ebx", 0x1234) + in8(PORT) + mov("ecx", 0x77) + "ebfe"
    pair = pairs(code, device, vcpus=2)
    domain = pair.rig.domain
    one = domain.states[1]
    other = first_cpu(domain.context())._replace(rip=0x30000, rbx=0x4321, dr1=0x5000, tsc=0)
    pair.rig.write(0x30000, mov("ebx", 0x4321) + "ebfe")
    if waiting != "not started":
        domain._started(one)
    if waiting == "started by SIPI":
        one.sipi, one.online = 0x30, False
    elif waiting != "not started":
        one.first = other
    if waiting == "started":
        one.online = False
    elif waiting == "has run":
        domain.states[0].online = False
        pair.rig.run(3)
        domain.states[0].online = True
        one.online = False

    def idle() -> None:
        cpus = cpu_records(domain.context())
        seen.append(cpus)
        assert cpu_records(domain.context()) == cpus
        asked.set()

    pair.model._idle = idle  # type: ignore[misc]
    rig = pair.run(5)
    assert domain.crash_text is None
    assert (rig.regs.rbx, rig.regs.rax & 0xFF, rig.regs.rcx) == (0x1234, 0x5A, 0x77)
    zero, *rest = seen[0]
    assert (zero.rbx, zero.rip) == (0x1234, CODE + len(bytes.fromhex(mov("ebx", 0x1234) + in8(PORT))) - 1)
    if waiting == "not started":
        assert rest == []
        return
    (first,) = rest
    if waiting == "started by SIPI":
        assert (first.cs_sel, first.cs_base, first.rip, first.cr0 & 1) == (0x3000, 0x30000, 0, 0)
        return
    assert (first.rbx, first.rip) == (0x4321, 0x30005 if waiting == "has run" else 0x30000)
    assert (first.cr3, first.cs_sel, first.msr_efer) == (zero.cr3, zero.cs_sel, zero.msr_efer)
    if waiting == "has run":
        assert not one.runnable
        one.online = True
        domain.states[0].online = False
        rig.run(3)
        assert (rig.regs.rbx, rig.regs.rip) == (0x4321, 0x30005), "it goes on where it was"


def test_memory_of_the_guests_own_where_a_frame_buffer_was(pairs: Callable[..., Pair]) -> None:
    """It was put there later, and stays when the frame buffer goes."""
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    physmap, space = pair.rig.physmap, pair.rig.domain.vcpu.memory.space
    gfn = 0xF0000
    assert pair.model._show(Note(area.MAP, 0, 0, gfn << 12, 0x4000, 0))
    mfn = physmap.mfn(5)
    assert mfn is not None
    physmap.changed(gfn + 1, mfn, 1, 1)
    assert pair.model._show(Note(area.UNMAP, 0, 0, gfn << 12, 0x4000, 0))
    wanted = physmap.host + (mfn - physmap.base << 12)
    assert [space.host_address(gfn + page << 12) for page in range(4)] == [None, wanted, None, None]


def test_a_request_that_makes_no_sense_reads_as_ones(pairs: Callable[..., Pair]) -> None:
    """The other way round: the device model does not believe its guest's process."""
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    for access in (
        area.Access(1 << 40, 0, 1, 1, 0, True, False),
        area.Access(0x1F0, 0, 1, 3, 0, True, False),
        area.Access(0x1F0, 0, 1, 8, 0, True, False),
        area.Access(0x1F0, 0, 1, 1, 7, True, False),
    ):
        pair.guest._area.put_access(0, access)
        pair.guest.serve()
        assert pair.guest._area.take_answer(0) == (1 << 64) - 1
    pair.guest._area.put_access(0, area.Access(0x1F0, 0, 0xFFFFFFFF, 4, 0, True, True))
    pair.guest.serve()
    assert pair.guest._area.take_answer(0) == area.BLOCK_SIZE // 4, "no more than the block holds"


def test_posted_writes_are_no_exits_and_come_before_the_next_access(pairs: Callable[..., Pair]) -> None:
    """A thousand writes to the serial line's data port, then a read of another port: all are there before it, in order."""
    seen: list[tuple[int, int | None]] = []
    code = (
        mov("ecx", 1000) + "66baf803" + "88c8 ee e2fb".replace(" ", "") + in8(PORT) + HLT
    )  # 1: mov al, cl; out dx, al; loop 1b
    pair = pairs(code, lambda offset, size, value: seen.append((-1, None)) or 0)
    pair.ports.add(
        Range("line", 0x3F8, 1, lambda o, s: 0, lambda offset, size, value: seen.append((0x3F8, value)))
    )
    assert pair.rig.domain.model_changed({"id": 0, "add": [0, 0x3F8, 0x3F8]})
    pair.run()
    assert seen == [*((0x3F8, (1000 - index) & 0xFF) for index in range(1000)), (-1, None)]
    assert pair.model.accesses == 1
    assert pair.model.posts == 1000


def test_a_write_that_is_posted_just_before_an_access_comes_before_it(pairs: Callable[..., Pair]) -> None:
    """Both come between the device model's look at the ring and its look at the vCPU's slot."""
    seen: list[int | None] = []
    pair = pairs(HLT, lambda offset, size, value: seen.append(value) or 0)
    pair.serving = False
    area_, look = pair.guest._area, pair.guest._take_posts

    def late() -> None:
        look()
        if not seen and not area_.word(area.POSTED):
            area_.put_post(0, Access(PORT, 7, 1, 1, IOREQ_TYPE_PIO, False, False))
            area_.set_word(area.POSTED, 1)
            area_.put_access(0, Access(PORT, 0, 1, 1, IOREQ_TYPE_PIO, True, False))

    pair.guest._take_posts = late  # type: ignore[method-assign]
    pair.guest._answer()
    assert seen == [7, None]


def test_a_write_that_is_posted_while_others_are_carried_out_is_not_forgotten(
    pairs: Callable[..., Pair],
) -> None:
    """Nobody rings for it: when the device model's turn is over meanwhile, it has to come back by itself."""
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    area_, seen = pair.guest._area, []

    def take(offset: int, size: int, value: int) -> None:
        seen.append(value)
        if value < 5:
            area_.put_post(value, area.Access(0x3F8, value + 1, 1, 1, 0, False, False))
            area_.set_word(area.POSTED, value + 1)
            time.sleep(2 * guest_module.BURST_S)

    pair.ports.add(Range("line", 0x3F8, 1, lambda o, s: 0, take))
    area_.put_post(0, area.Access(0x3F8, 1, 1, 1, 0, False, False))
    area_.set_word(area.POSTED, 1)
    pair.model._request.ring()
    poller = select.poll()
    poller.register(pair.guest.request.fd, select.POLLIN)
    again = False
    while again or poller.poll(0):
        again = pair.guest.serve()
    assert seen == [1, 2, 3, 4, 5]


def test_a_write_is_told_of_when_the_device_model_has_just_taken_the_others(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the last one between this process's look at its index and the new write's being there."""
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    model, area_ = pair.model, pair.model._area
    access = area.Access(0x3F8, 1, 1, 1, 0, False, False)
    assert model._post(access)
    pair.guest.request.take()
    put = area_.put_post

    def put_late(index: int, access: area.Access) -> None:
        area_.set_word(area.TAKEN, index)
        put(index, access)

    monkeypatch.setattr(area_, "put_post", put_late)
    assert model._post(access)
    poller = select.poll()
    poller.register(pair.guest.request.fd, select.POLLIN)
    assert poller.poll(0)


def test_an_interrupt_that_was_taken_is_settled_before_a_string_instruction_brings_another(
    pairs: Callable[..., Pair],
) -> None:
    """The handler of line 4 begins with REP INSW, during which line 1 goes up: it is line 4 that is in service."""
    box: list[Pair] = []

    def device(offset: int, size: int, value: int | None) -> int:
        if offset:
            box[0].guest.isa_irq(4, True)
        else:
            box[0].guest.isa_irq(1, True)
        return 0

    handler = f"66ba{struct.pack('<H', PORT).hex()}" + mov("edi", DATA) + mov("ecx", 4) + "f3666d" + HLT
    code = (
        out8(0x20, 0x11) + out8(0x21, 0x20) + out8(0x21, 4) + out8(0x21, 1) + out8(0x21, 0xED)
        + "fb" + out8(PORT + 1, 1) + "ebfe"
    )  # fmt: skip
    pair = pairs(code, device)
    box.append(pair)
    pair.rig.write(0x70000, handler)
    pair.rig.gate(0x24, 0x70000)
    rig = pair.run(5)
    board = rig.domain.board
    assert board is not None
    assert board.pic._master.isr == 1 << 4
    assert board.pic.pending_vector() == 0x21, "and the other one waits"


def test_dma_beyond_all_addresses_is_told_to_the_device(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    for address in ((1 << 64) - 1, (1 << 64) - area.STAGING_SIZE):
        with pytest.raises(GuestMemoryError):
            pair.guest.write(address, bytes(2 * area.STAGING_SIZE))
        with pytest.raises(GuestMemoryError):
            pair.guest.read(address, 2 * area.STAGING_SIZE)


def test_a_full_ring_of_posts_waits_for_the_device_model(pairs: Callable[..., Pair]) -> None:
    seen: list[int] = []
    all_there = threading.Event()
    count = area.POST_RING + 500

    def take(offset: int, size: int, value: int) -> None:
        seen.append(value)
        if len(seen) == count:
            all_there.set()

    code = mov("ecx", count) + "66baf803" + "88c8eee2fb" + HLT
    pair = pairs(code, lambda offset, size, value: 0)
    pair.ports.add(Range("line", 0x3F8, 1, lambda o, s: 0, take))
    assert pair.rig.domain.model_changed({"id": 0, "add": [0, 0x3F8, 0x3F8]})
    pair.run(200)
    assert all_there.wait(5), "the device model's thread takes the last ones"
    assert seen == [(count - index) & 0xFF for index in range(count)]


def test_posts_that_make_no_sense_end_the_device_model_not_the_machine(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    for index, access in enumerate(
        (
            area.Access(0x1F0, 1, 1, 3, 0, False, False),
            area.Access(1 << 60, 1, 1, 4, 0, False, False),
            area.Access(0x1F0, 1, 1, 4, 9, False, False),
        )
    ):
        pair.guest._area.put_post(index, access)
    pair.guest._area.set_word(area.POSTED, 3)
    pair.guest.serve()
    assert pair.guest.posts == 3
    pair.guest._area.set_word(area.POSTED, 1 << 31)
    with pytest.raises(GuestGone):
        pair.guest.serve()


COUNT = """
import sys
from bus import ioreq_area as area
counter = area.IoreqArea(int(sys.argv[1]))
for value in range(1 << 40):
    counter.set_word(area.POSTED, value)
"""


def test_indexes_are_never_seen_in_halves() -> None:
    """Another process counts up without pause; what is read here never goes back."""
    fd = area.create()
    child = subprocess.Popen([sys.executable, "-c", COUNT, str(fd)], pass_fds=[fd])
    try:
        reader = area.IoreqArea(fd)
        last = backwards = 0
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline and last < 3_000_000:
            value = reader.word(area.POSTED)
            backwards += value < last
            last = value
        reader.close()
        assert last > 1000, "the other one counts"
        assert not backwards
    finally:
        child.kill()
        child.wait(10)
        os.close(fd)
