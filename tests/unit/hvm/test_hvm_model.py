"""A guest and its device model: accesses, string instructions, DMA, interrupts, frame buffers; servers that come and go; contexts."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bus import ioreq_area as area
from bus.abi.hvm import save
from bus.abi.hvm.save import hvm_hw_cpu
from bus.ioreq_area import Note
from domains.hvm.context import first_cpu
from tests.unit.hvm.hvm_rig import CODE, DATA, mov
from tests.unit.hvm.model_rig import HLT, MMIO, PORT, Pair, in8, out8

pytestmark = pytest.mark.usefixtures("paging")


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
