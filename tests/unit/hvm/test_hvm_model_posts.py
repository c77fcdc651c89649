"""Writes that are posted to the device model: no exits, in order with accesses, never forgotten."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from bus import ioreq_area as area
from bus.abi.hvm.ioreq import IOREQ_TYPE_PIO
from bus.ioreq_area import Access
from domains.dm import guest as guest_module
from drivers.pc.bus import Range
from tests.unit.hvm.hvm_rig import DATA, mov
from tests.unit.hvm.model_rig import HLT, PORT, Pair, in8, out8

pytestmark = pytest.mark.usefixtures("paging")
COUNT = """
import sys
from bus import ioreq_area as area
counter = area.IoreqArea(int(sys.argv[1]))
for value in range(1 << 40):
    counter.set_word(area.POSTED, value)
"""


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

    pair.guest._take_posts = late
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
