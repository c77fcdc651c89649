"""Shadow page tables against two-level paging: the same guest programs, which change their page tables at random and use them, see the same
values and the same page faults, and leave the same memory; in each paging mode.

A program is a list of commands for a small interpreter in the guest: write a word, read a word, INVLPG, reload CR3. Page faults are
noted (error code, CR2) and their instruction is left out. All that is written to tables is followed by a flush, without which
either may still see what was.
"""

from __future__ import annotations

import random
import struct

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import TABLES, HvmGuest
from tests.unit.vcpu.hvm_programs import protected_mode
from tests.unit.vcpu.shadow_guest import ShadowGuest

WRITE, READ, INVLPG, FLUSH, END = range(5)
COMMANDS, LOG = 0x100000, 0x180000
ROOT = 0x20000
"""The tables under test: ROOT the upper one, then the lower ones, a page each."""
DATA = 0x40000
DATA_PAGES = 24
FIRST = DATA >> 12
"""Index of the first entry in use: a large page has the data at the same place."""
AREA = 0x40000000
"""Linear addresses that the tables under test are for."""
# loop: rax, rbx, rcx = [r15]; r15 += 24; 1: [r14] = [rbx], r14 += 8; 2: invlpg [rbx]; 3: reload CR3; 4: out 0xf4; else [rbx] = rcx
LOOP64 = (
    "498b07498b5f08498b4f104983c71883f801741483f802741b83f803741b83f804741e48890bebd8488b134989164983c608ebcc"
    "0f013bebc70f20da0f22daebbfe6f4ebfc"
)
# pop rdx; [r14] = rdx; [r14+8] = cr2; r14 += 16; [rsp] = rbp; iretq
FAULT64 = "5a4989160f20d2498956084983c61048892c2448cf"
# The same with esi, edi and words of four bytes.
LOOP32 = (
    "8b068b5e048b4e0883c60c83f801741383f802741783f803741783f804741a890bebdd8b13891783c704ebd4"
    "0f013bebcf0f20da0f22daebc7e6f4ebfc"
)
FAULT32 = "5a89170f20d289570483c708892c24cf"
Command = tuple[int, int, int]


def run64(guest: HvmGuest, commands: list[Command], *, wp: bool) -> None:
    """In long mode; AREA is the second entry of the third level."""
    begin = (
        "" if wp else "0f20c0 25fffffeff 0f22c0"  # mov rax,cr0; and eax,~WP; mov cr0,rax
    )
    init = f"49bf{COMMANDS.to_bytes(8, 'little').hex()} 49be{LOG.to_bytes(8, 'little').hex()}"
    guest.long_mode(begin + init + "488d2d00000000" + LOOP64)  # lea rbp, [rip]
    guest.handler(14, FAULT64)
    guest.write(COMMANDS, b"".join(struct.pack("<QQQ", *(v & (1 << 64) - 1 for v in c)) for c in commands))
    assert guest.run(10_000_000) is StopReason.REQUESTED


def run32(guest: HvmGuest, commands: list[Command], *, pae: bool, wp: bool) -> None:
    """In protected mode with paging."""
    cr4, cr0 = (0x30 if pae else 0x10), 0x80000011 | (0x10000 if wp else 0)

    def mov(value: int) -> str:
        return "b8" + value.to_bytes(4, "little").hex()

    efer = "b9800000c0 0f32 0d00080000 0f30" if pae else ""  # NXE
    begin = f"{efer} {mov(cr4)} 0f22e0 {mov(TABLES)} 0f22d8 {mov(cr0)} 0f22c0"
    init = (
        f"be{COMMANDS.to_bytes(4, 'little').hex()} bf{LOG.to_bytes(4, 'little').hex()} e800000000 5d 83c504"
    )
    protected_mode(guest, begin + init + LOOP32)  # call +0; pop ebp; add ebp, 4
    guest.handler(14, FAULT32)
    guest.write(COMMANDS, b"".join(struct.pack("<III", *(v & 0xFFFFFFFF for v in c)) for c in commands))
    assert guest.run(10_000_000) is StopReason.REQUESTED


class Program:
    """Commands at random for one mode."""

    def __init__(self, mode: str, seed: int) -> None:
        self.dice = random.Random(seed)
        self.mode = mode
        self.width = 4 if mode == "32-bit" else 8
        self.commands: list[Command] = []
        self.large = 22 if mode == "32-bit" else 21

    def store(self, address: int, value: int) -> None:
        """Write an entry: two words where a word is half of it."""
        if self.mode == "pae":
            self.commands.append((WRITE, address, value & 0xFFFFFFFF))
            self.commands.append((WRITE, address + 4, value >> 32))
        else:
            self.commands.append((WRITE, address, value))

    def entry(self, target: int) -> int:
        """An entry for a page, with rights at random."""
        dice = self.dice
        value = (
            target
            | (dice.random() < 0.9)
            | dice.choice((0, 2, 2, 2))
            | dice.choice((0, 4))
            | dice.choice((0, 0x20, 0x60))
        )
        if self.width == 8:
            value |= dice.choice((0, 0, 1)) << 63
            if dice.random() < 0.03:
                value |= 1 << dice.choice((45, 53))  # reserved; bit 53 with PAE only
        return value

    def touch(self) -> None:
        """Use the area."""
        dice = self.dice
        address = (
            AREA
            + (dice.randrange(3) << self.large)
            + (FIRST + dice.randrange(10) << 12)
            + 8 * dice.randrange(400)
        )
        if dice.random() < 0.5:
            self.commands.append((READ, address, 0))
        else:
            self.commands.append(
                (WRITE, address, dice.randrange(1 << 31) & ~1)
            )  # where it is a table: not present
            self.commands.append((FLUSH, 0, 0))

    def change(self) -> None:
        """Change a table, and flush."""
        dice = self.dice
        upper, lower = ROOT, [ROOT + 0x1000, ROOT + 0x2000]
        if dice.random() < 0.25:
            index = dice.randrange(3)
            if dice.random() < 0.25:
                value = self.entry(0) | 0x80  # a large page: all of the memory
                value &= ~(1 << 45 | 1 << 53)
            else:
                value = self.entry(dice.choice(lower))
                if self.width == 8 and self.mode == "long" and dice.random() < 0.9:
                    value |= 1
            self.store(self.upper(upper, index), value)
            self.commands.append((FLUSH, 0, 0))
            return
        table, index = dice.choice(lower), FIRST + dice.randrange(10)
        pages = [DATA + (n << 12) for n in range(DATA_PAGES)] + [ROOT, ROOT + 0x1000, ROOT + 0x2000]
        self.store(table + self.width * index, self.entry(dice.choice(pages)))
        if dice.random() < 0.3:
            self.commands.append((FLUSH, 0, 0))
        else:
            for which in range(3):
                self.commands.append((INVLPG, AREA + (which << self.large) + (index << 12), 0))

    def upper(self, table: int, index: int) -> int:
        """Where the entry is that names a lower table."""
        if self.mode == "32-bit":
            return TABLES + 4 * ((AREA >> 22) + index)
        return table + 8 * index

    def make(self, steps: int) -> list[Command]:
        """All of it."""
        for number in range(steps):
            if number % 3 == 0:
                self.change()
            else:
                self.touch()
        self.commands.append((END, 0, 0))
        return self.commands


def tables(guest: HvmGuest, mode: str) -> None:
    """Identity for the memory, and the tables under test for AREA."""
    rng = random.Random(7)
    for page in range(DATA_PAGES):
        guest.memory[DATA + (page << 12) : DATA + (page + 1 << 12)] = rng.randbytes(4096)
    if mode == "long":
        return  # made by long_mode; AREA's entry by the caller
    if mode == "pae":
        guest.write(TABLES, struct.pack("<4Q", TABLES + 0x1000 | 1, ROOT | 1, 0, 0))
        guest.write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2000 | 7))
        guest.write(TABLES + 0x2000, b"".join(struct.pack("<Q", n << 12 | 7) for n in range(512)))
    else:
        guest.write(TABLES, struct.pack("<I", TABLES + 0x1000 | 7))
        guest.write(TABLES + 0x1000, b"".join(struct.pack("<I", n << 12 | 7) for n in range(512)))


def play(guest: HvmGuest, mode: str, commands: list[Command], *, wp: bool) -> tuple[bytes, bytes]:
    """(log, memory without the accessed bits of tables)."""
    tables(guest, mode)
    if mode == "long":
        # AREA's entry of the third level is the program's first command: long_mode makes the tables.
        run64(guest, [(WRITE, TABLES + 0x1008, ROOT | 7), (FLUSH, 0, 0), *commands], wp=wp)
    else:
        run32(guest, commands, pae=mode == "pae", wp=wp)
    memory = bytearray(guest.memory[:])
    width = 4 if mode == "32-bit" else 8
    for start, size in ((TABLES, 0x4000), (ROOT, 0x3000)):
        for at in range(start, start + size, width):
            memory[at] &= ~0x20  # set by accesses that are denied, too, or not: docs/hvm.md
    used = bytes(memory[LOG : LOG + 0x40000])
    return used, bytes(memory)


def compare(mode: str, seed: int, *, wp: bool) -> None:
    commands = Program(mode, seed).make(1500)
    expected, memory = play(HvmGuest(), mode, commands, wp=wp)
    guest = ShadowGuest()
    log, changed = play(guest, mode, commands, wp=wp)
    assert any(expected)
    if log != expected:
        at = next(n for n in range(0, len(log), 8) if log[n : n + 8] != expected[n : n + 8])
        near = slice(max(0, at - 32), at + 32)
        raise AssertionError(
            f"word {at // 8} of the log: {log[near].hex(' ', 8)}, not {expected[near].hex(' ', 8)}"
        )
    assert changed == memory
    assert guest.shadow.counts["misses"] > 300
    assert guest.shadow.counts["unsyncs"] > 30


MODES = ["long", "pae", "32-bit"]


@pytest.mark.parametrize("wp", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_random_changes_of_tables_look_the_same(mode: str, wp: bool, seed: int) -> None:
    compare(mode, seed, wp=wp)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_many_random_changes_of_tables_look_the_same(mode: str) -> None:
    for seed in range(2, 60):
        compare(mode, seed, wp=bool(seed & 1))


class SmallPool(ShadowGuest):
    """Memory for tables runs out all the time."""

    pool_pages = 15


@pytest.mark.parametrize("mode", ["long", "pae", "32-bit"])
def test_tables_run_out(mode: str) -> None:
    commands = Program(mode, 3).make(1500)
    expected = play(HvmGuest(), mode, commands, wp=True)
    guest = SmallPool()
    assert play(guest, mode, commands, wp=True) == expected
    assert guest.shadow.counts["drops"] > 1
    assert guest.shadow.tables <= 15


def one(guest: HvmGuest, commands: list[Command]) -> None:
    run64(guest, [(WRITE, TABLES + 0x1008, ROOT | 7), (FLUSH, 0, 0), *commands, (END, 0, 0)], wp=True)


def test_accessed_and_dirty_are_set_as_a_processor_does() -> None:
    """By a read: accessed in each level; by a write: dirty in the last. Cleared bits come again after a flush."""
    guest = ShadowGuest()
    lower, page = ROOT + 0x1000, AREA + 0x1000
    make = [(WRITE, ROOT, lower | 7), (WRITE, lower + 8, DATA | 3)]
    one(guest, [*make, (READ, page, 0)])
    assert guest.qword(TABLES + 0x1008) & 0x60 == 0x20
    assert guest.qword(ROOT) & 0x60 == 0x20
    assert guest.qword(lower + 8) & 0x60 == 0x20
    guest = ShadowGuest()
    one(guest, [*make, (READ, page, 0), (WRITE, page, 4)])
    assert guest.qword(lower + 8) & 0x60 == 0x60
    assert guest.qword(ROOT) & 0x60 == 0x20
    for flush in ((INVLPG, page, 0), (FLUSH, 0, 0)):
        guest = ShadowGuest()
        one(guest, [*make, (WRITE, page, 4), (WRITE, lower + 8, DATA | 3), flush, (READ, page, 0)])
        assert guest.qword(lower + 8) & 0x60 == 0x20, "it was clear, and was read"
        assert guest.qword(DATA) == 4


def test_a_table_that_becomes_data_is_left_alone() -> None:
    """The first writes to it are noticed; once nothing in it is used any more, there is no write protection to pay for."""
    guest = ShadowGuest()
    lower = ROOT + 0x1000
    make = [(WRITE, ROOT, lower | 7), (WRITE, lower + 8, DATA | 3), (READ, AREA + 0x1000, 0)]
    gone = [(WRITE, ROOT, 0), (FLUSH, 0, 0)]
    use = [(WRITE, lower + 8 * n, 2 * n) for n in range(500)]
    one(guest, [*make, *gone, *use, (FLUSH, 0, 0), *use])
    assert not guest.shadow.protected(lower >> 12)
    assert guest.shadow.counts["unsyncs"] < 6
    guest = ShadowGuest()
    one(guest, [*make, *use, (FLUSH, 0, 0), *use, (FLUSH, 0, 0)])
    assert guest.shadow.counts["unsyncs"] < 6


def test_tables_that_others_write_are_followed() -> None:
    """DMA, a hypercall or a grant copy into a page that is a table of the guest's."""
    guest = ShadowGuest()
    lower = ROOT + 0x1000
    guest.memory[DATA : DATA + 8] = b"first..."
    guest.memory[DATA + 0x1000 : DATA + 0x1008] = b"second.."

    def written() -> None:
        guest.vcpu.memory.write_physical(lower + 8, struct.pack("<Q", DATA + 0x1000 | 3))

    guest.exits.on_out_hooks[0xF4] = written
    one(guest, [(WRITE, ROOT, lower | 7), (WRITE, lower + 8, DATA | 3), (READ, AREA + 0x1000, 0)])
    guest.write(COMMANDS, struct.pack("<9Q", FLUSH, 0, 0, READ, AREA + 0x1000, 0, END, 0, 0))
    guest.vcpu.regs.set_gpr(15, COMMANDS)
    guest.vcpu.regs.rip = guest.vcpu.regs.rbp
    assert guest.run() is StopReason.REQUESTED
    assert guest.memory[LOG : LOG + 16] == b"first...second.."


def test_memory_that_moves_or_goes() -> None:
    """The p2m changes under tables of ours: another frame, none (then it is the devices')."""
    guest = ShadowGuest()
    lower = ROOT + 0x1000
    guest.memory[DATA : DATA + 8] = b"first..."
    guest.memory[DATA + 0x1000 : DATA + 0x1008] = b"second.."
    one(
        guest,
        [(WRITE, ROOT, lower | 7), (WRITE, lower + 8, DATA | 3), (READ, AREA + 0x1000, 0), (READ, DATA, 0)],
    )
    frame = guest.physmap.base + (DATA >> 12)

    def again() -> None:
        guest.write(COMMANDS, struct.pack("<9Q", READ, AREA + 0x1000, 0, READ, DATA, 0, END, 0, 0))
        guest.vcpu.regs.set_gpr(15, COMMANDS)
        guest.vcpu.regs.rip = guest.vcpu.regs.rbp

    guest.physmap.changed(DATA >> 12, frame + 1, 1, 1)
    again()
    assert guest.run() is StopReason.REQUESTED
    assert guest.memory[LOG : LOG + 32] == b"first...first...second..second.."
    guest.physmap.changed(DATA >> 12, 0, 1, 0)
    again()
    assert guest.run() is StopReason.BAD_ACCESS
    assert guest.vcpu.bad_access is not None
    assert guest.vcpu.bad_access.address == DATA
    assert guest.physmap.touch(DATA >> 12)
    assert guest.run() is StopReason.REQUESTED
    assert [item for item in guest.exits.seen if item[0] == "read"] == [
        ("read", DATA, 4),
        ("read", DATA + 4, 4),
    ] * 2
