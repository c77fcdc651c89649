"""The DMA lane: what a device says there is checked, and neither side can make the hypervisor wait."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from bus.dma_lane import DeviceEnd, HypervisorEnd, LaneClosed, pack, unpack
from bus.messages.device import MAX_DMA_ITEMS, MAX_DMA_LENGTH, MAX_DMA_VECTORS, DmaRequest
from bus.messages.envelope import BadMessage

Lane = tuple[HypervisorEnd, DeviceEnd]
BATCH = DmaRequest(7, 3, [(0x1000, 4096, True, 0), (1 << 63, 1, False, 0xFFFF_FFFF)], [0, 0xFFFF])


@pytest.fixture
def lane() -> Iterator[Lane]:
    """Both ends."""
    ours, theirs = HypervisorEnd.pair()
    device = DeviceEnd(theirs.detach())
    yield ours, device
    ours.close()
    device.close()


def test_batches_come_as_they_were_sent_and_answers_go_together(lane: Lane) -> None:
    """In order; nothing waiting is nothing."""
    ours, device = lane
    assert list(ours.receive()) == []
    largest = DmaRequest(
        1, 1, [(n, MAX_DMA_LENGTH, False, n) for n in range(MAX_DMA_ITEMS)], [1] * MAX_DMA_VECTORS
    )
    for batch in (BATCH, DmaRequest(8, 3, [], []), largest):
        device.send(pack(*batch), 1.0)
    assert list(ours.receive()) == [BATCH, DmaRequest(8, 3, [], []), largest]
    for token in range(1000):
        ours.answer(token, -1 if token else 0xFFFE)
    assert list(device.receive()) == []
    ours.flush()
    assert list(device.receive()) == [(0, 0xFFFE), *((token, -1) for token in range(1, 1000))]


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        pack(*BATCH)[:-1],
        pack(*BATCH) + b"\0",
        pack(1, 1, [(0, 1, True, 0)] * (MAX_DMA_ITEMS + 1), []),
        pack(1, 1, [], [0] * (MAX_DMA_VECTORS + 1)),
        pack(1, 1, [(0, 0, True, 0)], []),
        pack(1, 1, [(0, MAX_DMA_LENGTH + 1, False, 0)], []),
        struct.pack("<QQHHI", 1, 1, 0, 0, 1),
        bytes(64 << 10),
    ],
)
def test_what_makes_no_sense_is_told_and_the_rest_goes_on(lane: Lane, raw: bytes) -> None:
    """A bad packet costs itself."""
    ours, device = lane
    device.send(raw, 1.0)
    device.send(pack(*BATCH), 1.0)
    bad, good = ours.receive()
    assert isinstance(bad, BadMessage)
    assert good == BATCH


def test_bytes_of_all_kinds() -> None:
    """A batch within its limits, or BadMessage: nothing else."""
    chance = random.Random(4)
    for _ in range(20_000):
        raw = bytearray(pack(*BATCH))
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            batch = unpack(bytes(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.2 else raw))
        except BadMessage:
            continue
        assert all(1 <= length <= MAX_DMA_LENGTH for _, length, _, _ in batch.items)


def test_a_device_that_reads_no_answers_is_lost_and_nobody_waits(lane: Lane) -> None:
    """It may be as far behind as the kernel's buffer is large."""
    ours, _ = lane

    def flood() -> None:
        for token in range(100_000):
            ours.answer(token, -1)
            ours.flush()

    with pytest.raises(LaneClosed):
        flood()


def test_a_device_waits_for_room_so_long_and_no_longer(lane: Lane) -> None:
    """A hypervisor that takes nothing is given up."""
    ours, device = lane

    def flood() -> None:
        for _ in range(100_000):
            device.send(pack(*BATCH), 0.05)

    with pytest.raises(LaneClosed):
        flood()
    assert len(list(ours.receive())) > 10


def test_an_end_that_is_closed_or_says_nothing_in_a_packet(lane: Lane) -> None:
    """Both read as closed."""
    ours, device = lane
    ours.close()
    with pytest.raises(LaneClosed):
        list(device.receive())
    with pytest.raises(LaneClosed):
        device.send(b"x", 1.0)
    again, theirs = HypervisorEnd.pair()
    theirs.send(b"")
    with pytest.raises(LaneClosed):
        list(again.receive())
    again.close()
    theirs.close()


def test_descriptors_that_come_along_are_not_received(lane: Lane) -> None:
    """A device cannot fill the hypervisor's table of descriptors."""
    ours, device = lane
    before = len(os.listdir("/proc/self/fd"))
    with open("/dev/null", "rb") as null:
        for _ in range(20):
            socket.send_fds(device._socket, [pack(*BATCH)], [null.fileno()] * 10)
        assert list(ours.receive()) == [BATCH] * 20
    assert len(os.listdir("/proc/self/fd")) == before
