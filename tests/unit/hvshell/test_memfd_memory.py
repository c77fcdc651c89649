"""Machine memory in memfds: what is cleared is zero for everybody who has it mapped, wherever the frame lives."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from bus.addresses import PAGE_SIZE, Mfn
from hypervisor.shell.memory import MemfdMemory

BASE = Mfn(0x100)
ONES = b"\xff" * PAGE_SIZE
ZEROS = bytes(PAGE_SIZE)


@pytest.fixture
def memory() -> Iterator[MemfdMemory]:
    """Two extents of 8 frames, all ones, next to each other."""
    memory = MemfdMemory()
    memory.create_extent(BASE, 8)
    memory.create_extent(Mfn(BASE + 8), 8)
    for mfn in range(BASE, BASE + 16):
        memory.write(Mfn(mfn), 0, ONES)
    yield memory
    memory.drop_extent(BASE)
    memory.drop_extent(Mfn(BASE + 8))


def frames(memory: MemfdMemory) -> list[bytes]:
    return [memory.read(Mfn(mfn), 0, PAGE_SIZE) for mfn in range(BASE, BASE + 16)]


def blocks_of(memory: MemfdMemory) -> int:
    """512-byte blocks that the first extent really has."""
    return os.fstat(memory._extents[BASE].fd).st_blocks


def test_a_run_is_cleared_and_nothing_else(memory: MemfdMemory) -> None:
    """And its memory goes back to the host."""
    before = blocks_of(memory)
    memory.clear(Mfn(BASE + 2), 3)
    assert before - blocks_of(memory) == 3 * PAGE_SIZE // 512  # before a look at them makes pages again
    assert frames(memory) == [ONES] * 2 + [ZEROS] * 3 + [ONES] * 11


def test_a_run_over_two_extents_is_cleared(memory: MemfdMemory) -> None:
    """Frames of two domains' ranges in one call."""
    memory.clear(Mfn(BASE + 6), 4)
    assert frames(memory) == [ONES] * 6 + [ZEROS] * 4 + [ONES] * 6


def test_who_has_the_extent_mapped_sees_zeros_too(memory: MemfdMemory) -> None:
    """Through a descriptor and a mapping that a domain's process keeps."""
    fd = os.dup(memory._extents[BASE].fd)
    with mmap.mmap(fd, 8 * PAGE_SIZE) as kept:
        memory.clear(BASE, 8)
        assert kept[:] == bytes(8 * PAGE_SIZE)
    os.close(fd)


@pytest.mark.parametrize("count", [1, 4])
def test_a_frame_that_lives_in_a_window_is_cleared_at_both_places(memory: MemfdMemory, count: int) -> None:
    """There, and where it comes back to: what was left behind at its first place is not seen again."""
    memory.create_window(1, 1)
    moved = Mfn(BASE + 1)
    memory.place(moved, 1, 0)
    memory.write(moved, 0, b"secret")
    memory.clear(moved, count)
    assert memory.read(moved, 0, PAGE_SIZE) == ZEROS
    memory.restore(moved)
    memory.drop_window(1)
    assert frames(memory) == [ONES] + [ZEROS] * count + [ONES] * (15 - count)


def test_memory_that_is_not_there_is_an_error(memory: MemfdMemory) -> None:
    """Before anything of the run is touched beyond it."""
    with pytest.raises(KeyError, match="0x110"):
        memory.clear(Mfn(BASE + 16))


@pytest.mark.parametrize("placed", ["none", "all in a row", "all backwards", "one", "two windows"])
def test_a_run_is_where_its_frames_are(memory: MemfdMemory, placed: str) -> None:
    """Every run of bytes, over extents and windows, is named in as many parts as it lies in, and these are its bytes."""
    memory.create_window(1, 16)
    memory.create_window(2, 16)
    places = {
        "none": {},
        "all in a row": {n: (1, n) for n in range(16)},
        "all backwards": {n: (1, 15 - n) for n in range(16)},
        "one": {5: (1, 5)},
        "two windows": {n: (1 + n // 4 % 2, n) for n in range(16)},
    }[placed]
    for frame, (window, index) in places.items():
        memory.place(Mfn(BASE + frame), window, index)
    whole = bytes(n * 31 + (n >> 12) & 0xFF for n in range(16 * PAGE_SIZE))
    for frame in range(16):
        memory.write(Mfn(BASE + frame), 0, whole[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE])
    for start, length in (
        (0, 65536),
        (1, 65534),
        (4095, 2),
        (20000, 30000),
        (32767, 2),
        (8192, 4096),
        (0, 1),
    ):
        mfn, offset = Mfn(BASE + start // PAGE_SIZE), start % PAGE_SIZE
        parts = memory.places(mfn, offset, length)
        assert (
            b"".join(bytes(view[at : at + size]) for view, at, size in parts) == whole[start : start + length]
        )
        if (start, length) == (0, 65536):
            fewest = {"none": 2, "all in a row": 1, "all backwards": 16, "one": 4, "two windows": 4}
            assert len(parts) == fewest[placed]
    with pytest.raises(KeyError):
        memory.places(Mfn(BASE + 14), 0, 3 * PAGE_SIZE)
    with pytest.raises(KeyError):
        memory.place(BASE, 1, 16)
    for frame in places:
        memory.restore(Mfn(BASE + frame))
    memory.drop_window(1)
    memory.drop_window(2)
