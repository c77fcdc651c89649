"""Blocks of user ids: apart from each other, also where machines do not see each other's locks; and where there are none to give."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from toolstack.warden import uids
from toolstack.warden.uids import BLOCK, BLOCKS, FIRST, KILLERS, UidBlock, unavailable

WHOLE_MAP = "         0          0 4294967295\n"
ALL_CAPABILITIES = "CapInh:\t0\nCapPrm:\t1ff\nCapEff:\t000001ffffffffff\n"


def test_machines_that_see_each_other_have_blocks_of_their_own(tmp_path: Path) -> None:
    blocks = [UidBlock(tmp_path / "locks") for _ in range(20)]
    first = [block.take() for block in blocks]
    assert len(set(first)) == 20
    assert all(FIRST <= uid < FIRST + BLOCK * BLOCKS and (uid - FIRST) % BLOCK == 0 for uid in first)
    for block in blocks:
        block.close()
    assert list((tmp_path / "locks").iterdir()) == []


def test_machines_that_do_not_see_each_other_hardly_ever_meet(tmp_path: Path) -> None:
    """As in containers, with a directory of locks each: the first free one would be the same for all."""
    blocks = [UidBlock(tmp_path / str(number)) for number in range(10)]
    assert len({block.take() for block in blocks}) > 5
    for block in blocks:
        block.close()


def test_a_lock_whose_holder_died_is_taken_again_and_a_held_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uids, "BLOCKS", 2)
    for number in range(2):
        (tmp_path / f"block-{number}").touch()
    one, two = UidBlock(tmp_path), UidBlock(tmp_path)
    assert one.take() != two.take()
    with pytest.raises(RuntimeError, match="no free block"):
        UidBlock(tmp_path)
    one.close()
    UidBlock(tmp_path).close()
    two.close()


def test_a_lock_file_that_goes_while_it_is_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder freed the block between the open and the lock: the next to come would make a new file and lock that."""
    monkeypatch.setattr(uids, "BLOCKS", 1)
    path = tmp_path / "block-0"
    gone: list[int] = []
    flock = fcntl.flock

    def freed_first(fd: int, how: int) -> None:
        if not gone:
            gone.append(fd)
            path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", freed_first)
    block = UidBlock(tmp_path)
    assert path.exists()
    block.close()


def test_a_uid_comes_again_only_when_all_were_used(tmp_path: Path) -> None:
    block = UidBlock(tmp_path)
    first = block.take()
    block.give_back(first)
    assert [block.take() for _ in range(BLOCK - 1)] == [first + number for number in range(1, BLOCK)]
    assert block.take() == first
    with pytest.raises(RuntimeError, match="4096 processes already"):
        block.take()
    block.close()


@pytest.mark.parametrize(
    ("uid", "uid_map", "status", "said"),
    [
        (0, WHOLE_MAP, ALL_CAPABILITIES, ""),
        (1000, WHOLE_MAP, ALL_CAPABILITIES, "not root"),
        (0, "0 1000 1\n1 100000 65536\n", ALL_CAPABILITIES, "no user ids 1600000000 to "),
        (0, f"0 0 {FIRST + KILLERS + BLOCK * BLOCKS - 1}\n", ALL_CAPABILITIES, "no user ids"),
        (0, f"0 0 {FIRST + KILLERS + BLOCK * BLOCKS}\n", ALL_CAPABILITIES, ""),
        (0, WHOLE_MAP, "Name:\tx\nCapEff:\t00000000000000a0\n", "root without CAP_SETGID"),
        (
            0,
            WHOLE_MAP,
            "Name:\tx\nCapEff:\t0000000000000000\n",
            "root without CAP_KILL, CAP_SETGID, CAP_SETUID",
        ),
    ],
)
def test_where_there_are_no_uids_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, uid_map: str, status: str, said: str
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    (tmp_path / "uid_map").write_text(uid_map)
    (tmp_path / "status").write_text(status)
    found = unavailable(tmp_path)
    assert said in found if said else found == ""


def test_all_uids_are_uids() -> None:
    """Below what the kernel takes for "no such uid", and within 31 bits, which some file systems and tools keep to."""
    assert FIRST + KILLERS + BLOCK * BLOCKS < 1 << 31
