"""Scatter gather lists: the bytes that move for every shape, and the status of what no list may be."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.hw.nvme import sgl, spec
from drivers.hw.nvme.spec import IoOpcode, Status
from tests.unit.nvme.nvme_host import DATA, PAGE, Host

LISTS = 0x90000
"""Where descriptors are put."""
Descriptor = tuple[int, int, int]
"""(address, length, identifier)."""


@pytest.fixture
def host() -> Host:
    made = Host()
    made.enable()
    made.io_queue()
    return made


def word(length: int, kind: int) -> int:
    """The second word of a descriptor."""
    return length | kind << 56


def put(host: Host, at: int, descriptors: list[Descriptor]) -> int:
    """Into memory; bytes."""
    raw = b"".join(struct.pack("<QQ", address, word(length, kind)) for address, length, kind in descriptors)
    host.memory[at : at + len(raw)] = raw
    return len(raw)


def status(host: Host, opcode: int, address: int, second: int, blocks: int = 16, lba: int = 0) -> int:
    """Of a command whose data pointer is that descriptor."""
    where = {"nsid": 1, "cdw10": lba, "cdw12": blocks - 1, "flags": spec.FLAG_SGL}
    return host.status(1, opcode, **where, prp1=address, prp2=second)


def test_data_in_a_row_needs_no_list(host: Host) -> None:
    """One descriptor in the command, at any address; two DMA batches a command, whatever its size."""
    data = bytes(range(256)) * 1024
    host.memory[DATA + 3 : DATA + 3 + len(data)] = data
    assert status(host, IoOpcode.WRITE, DATA + 3, word(1 << 18, sgl.DATA_BLOCK), 512) == Status.SUCCESS
    target = DATA + 0x100001
    before = host.batches
    assert status(host, IoOpcode.READ, target, word(1 << 18, sgl.DATA_BLOCK), 512) == Status.SUCCESS
    assert host.batches - before == 2
    assert host.memory[target : target + (1 << 18)] == data
    assert host.memory[target - 1] == host.memory[target + (1 << 18)] == 0
    identify = DATA
    host.admin(spec.AdminOpcode.IDENTIFY, prp1=identify, cdw10=spec.Cns.CONTROLLER)
    page = spec.IDENTIFY_CONTROLLER.unpack(bytes(host.memory[identify : identify + PAGE]))
    assert page.sgls == spec.SGLS_ANY


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=300),
    cuts=st.lists(st.integers(1, 299), max_size=4),
    seed=st.integers(0, 255),
)
def test_lists_of_any_shape_move_exactly_the_bytes(sizes: list[int], cuts: list[int], seed: int) -> None:
    """Segments of any length (longer than a page among them), data blocks of any length, none among them, in any place."""
    host = Host()
    host.enable()
    host.io_queue()
    sizes = sizes[: next((n for n in range(len(sizes), 0, -1) if sum(sizes[:n]) <= 1 << 18), 1)]
    total = max(512, -(-sum(sizes) // 512) * 512)
    sizes.append(total - sum(sizes))
    blocks: list[Descriptor] = []
    at = DATA
    for size in sizes:
        blocks.append((at, size, sgl.DATA_BLOCK))
        at += size + 7
    bounds = [0, *sorted({cut for cut in cuts if cut < len(blocks)}), len(blocks)]
    segments = [blocks[start:end] for start, end in pairwise(bounds)]
    place, following = LISTS, (0, 0)
    for number, segment in reversed([*enumerate(segments)]):
        last = number == len(segments) - 1
        descriptors = list(segment)
        if not last:
            kind = sgl.LAST_SEGMENT if number == len(segments) - 2 else sgl.SEGMENT
            descriptors.append((*following, kind))
        following = (place, put(host, place, descriptors))
        place += following[1] + 16
    kind = sgl.LAST_SEGMENT if len(segments) == 1 else sgl.SEGMENT
    data = bytes((seed + n * 11 + (n >> 8)) & 0xFF for n in range(total))
    done = 0
    for address, size, _ in blocks:
        host.memory[address : address + size] = data[done : done + size]
        done += size
    assert status(host, IoOpcode.WRITE, following[0], word(following[1], kind), total // 512) == 0
    held = bytearray(total)
    host.media[1].read(0, memoryview(held))
    assert held == data
    host.memory[DATA : at + 7] = b"\xee" * (at + 7 - DATA)
    assert status(host, IoOpcode.READ, following[0], word(following[1], kind), total // 512) == 0
    done = 0
    for address, size, _ in blocks:
        assert host.memory[address : address + size] == data[done : done + size]
        assert host.memory[address + size : address + size + 7] == b"\xee" * 7
        done += size


BLOCK, SEGMENT, LAST = sgl.DATA_BLOCK, sgl.SEGMENT, sgl.LAST_SEGMENT


@pytest.mark.parametrize(
    ("own", "segment", "expected"),
    [
        ((DATA, 8191, BLOCK), [], Status.SGL_DATA_LENGTH),
        ((DATA, 8193, BLOCK), [], Status.SGL_DATA_LENGTH),
        ((DATA, 8192, 0x10), [], Status.SGL_TYPE),  # bit bucket
        ((DATA, 8192, 0x40), [], Status.SGL_TYPE),  # keyed
        ((DATA, 8192, 0x01), [], Status.SGL_TYPE),  # an offset
        ((LISTS, 0, LAST), [], Status.SGL_SEGMENT),
        ((LISTS, 17, LAST), [], Status.SGL_SEGMENT),
        ((LISTS, 16 * 641, LAST), [], Status.SGL_COUNT),
        ((LISTS, 0xFFFF_FFF0, LAST), [], Status.SGL_COUNT),
        ((LISTS, 32, LAST), [(DATA, 4096, BLOCK), (DATA, 4095, BLOCK)], Status.SGL_DATA_LENGTH),
        ((LISTS, 32, LAST), [(DATA, 4096, BLOCK), (DATA, 4097, BLOCK)], Status.SGL_DATA_LENGTH),
        ((LISTS, 32, LAST), [(DATA, 4096, BLOCK), (LISTS, 16, LAST)], Status.SGL_COUNT),
        ((LISTS, 32, SEGMENT), [(LISTS, 16, LAST), (DATA, 8192, BLOCK)], Status.SGL_COUNT),
        ((LISTS, 16, SEGMENT), [(DATA, 8192, BLOCK)], Status.SGL_SEGMENT),
        ((LISTS, 32, LAST), [(DATA, 4096, BLOCK), (DATA, 4096, 0x50)], Status.SGL_TYPE),
        ((LISTS, 16, SEGMENT), [(LISTS, 16, SEGMENT)], Status.SGL_COUNT),  # a circle
        ((LISTS, 16, SEGMENT), [(LISTS, 8, LAST)], Status.SGL_SEGMENT),
    ],
)
def test_what_is_no_list_moves_nothing(
    host: Host, own: Descriptor, segment: list[Descriptor], expected: int
) -> None:
    """Each has the specification's status; no byte of the data moves, and the next command works."""
    put(host, LISTS, segment)
    host.memory[DATA : DATA + 8192] = b"\xaa" * 8192
    assert status(host, IoOpcode.WRITE, own[0], word(own[1], own[2])) == expected
    held = bytearray(8192)
    host.media[1].read(0, memoryview(held))
    assert held == bytes(8192)
    assert status(host, IoOpcode.READ, own[0], word(own[1], own[2])) == expected
    assert host.memory[DATA : DATA + 8192] == b"\xaa" * 8192
    assert status(host, IoOpcode.WRITE, DATA, word(8192, BLOCK)) == Status.SUCCESS


def test_a_refused_address_costs_its_own_command(host: Host) -> None:
    """Of the list, or of the data."""
    host.holes = {LISTS >> 12}
    assert status(host, IoOpcode.READ, LISTS, word(16, LAST)) == Status.DATA_TRANSFER_ERROR
    host.holes = {(DATA >> 12) + 1}
    assert status(host, IoOpcode.READ, DATA, word(8192, BLOCK)) == Status.DATA_TRANSFER_ERROR
    assert status(host, IoOpcode.WRITE, DATA, word(8192, BLOCK)) == Status.DATA_TRANSFER_ERROR
    host.holes = set()
    assert status(host, IoOpcode.READ, DATA, word(8192, BLOCK)) == Status.SUCCESS


def test_where_there_are_none(host: Host) -> None:
    """Admin commands have PRPs; a list for metadata, of which there is none, is not offered."""
    done = host.admin(
        spec.AdminOpcode.IDENTIFY,
        flags=spec.FLAG_SGL,
        prp1=DATA,
        prp2=word(4096, BLOCK),
        cdw10=spec.Cns.CONTROLLER,
    )
    assert spec.status_of(done.status) == Status.INVALID_FIELD
    for flags in (0x80, 0xC0, spec.FLAG_SGL | 1, spec.FLAG_SGL | 4):
        where = {"nsid": 1, "cdw12": 7, "prp1": DATA, "prp2": word(4096, BLOCK)}
        assert host.status(1, IoOpcode.READ, flags=flags, **where) == Status.INVALID_FIELD
