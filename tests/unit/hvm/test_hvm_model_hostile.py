"""A device model that is silent, gone or hostile: its guest may suffer, nobody else does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bus import ioreq_area as area
from bus.abi.hvm import dm_op
from bus.ioreq_area import Note
from domains.dm.guest import GuestGone
from domains.hvm import model as model_module
from drivers.pc.bus import GuestMemoryError
from tests.unit.hvm.model_rig import HLT, PORT, Pair, in8

pytestmark = pytest.mark.usefixtures("paging")


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


def test_dma_beyond_all_addresses_is_told_to_the_device(pairs: Callable[..., Pair]) -> None:
    pair = pairs(HLT, lambda offset, size, value: 0)
    pair.serving = False
    for address in ((1 << 64) - 1, (1 << 64) - area.STAGING_SIZE):
        with pytest.raises(GuestMemoryError):
            pair.guest.write(address, bytes(2 * area.STAGING_SIZE))
        with pytest.raises(GuestMemoryError):
            pair.guest.read(address, 2 * area.STAGING_SIZE)


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
