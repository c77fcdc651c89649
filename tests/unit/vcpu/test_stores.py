"""Stores are fast where no code is, and code is never stale, by whatever virtual address it is overwritten or run."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.insides import TRANSLATIONS_BYTES
from domains.vcpu.testing import BASE, CODE, PRESENT_USER_RW, STACK, PvGuest

STUB = CODE
"""mov [rdi], al; syscall"""
TARGET = 0x40000
"""Page that holds code; its neighbour holds the end of an instruction that crosses."""
SPARE = range(0x100, 0x200)
"""Virtual pages (numbers) whose page-table entries tests change: they share TLB slots with those 256 below."""
CROSSING = TARGET + 0xFFD
"""mov eax, imm32 with the last two bytes of the immediate in the next page; syscall behind it."""


def guest_with_code() -> PvGuest:
    """2 MiB; `mov eax, imm32; syscall` at the start of TARGET and across its end."""
    guest = PvGuest(bytes.fromhex("88070f05"), size=1 << 21)
    guest.write(TARGET, bytes.fromhex("b8000000000f05"))
    guest.write(CROSSING, bytes.fromhex("b8000000000f05"))
    return guest


def run_at(guest: PvGuest, rip: int) -> None:
    """Without a TLB flush, to the next SYSCALL."""
    guest.vcpu.regs.rip = rip
    assert guest.run() is StopReason.REQUESTED


def store(guest: PvGuest, address: int, value: int) -> None:
    """The guest stores a byte."""
    regs = guest.vcpu.regs
    regs.rdi, regs.rax = address, value
    run_at(guest, STUB)


@pytest.mark.parametrize("seed", range(6))
def test_code_is_never_stale_under_any_alias(seed: int) -> None:
    """Two thousand random stores into code and runs of it by nine virtual addresses each, never a TLB flush by hand; other pages come
    between, so that entries move to the victim TLB and back."""
    rng = random.Random(seed)
    guest = guest_with_code()
    aliases = [TARGET, *(page << 12 for page in rng.sample(SPARE, 8))]
    second = [address + 4096 for address in (TARGET,)]
    for address in aliases[1:]:
        guest.set_entry(address, BASE + TARGET | PRESENT_USER_RW)
    for page in rng.sample([page for page in SPARE if page << 12 not in aliases], 4):
        guest.set_entry(page << 12, BASE + TARGET + 4096 | PRESENT_USER_RW)
        second.append(page << 12)
    guest.vcpu.flush_tlb()
    first = crossing_low = crossing_high = 0
    for _ in range(2000):
        action, value = rng.randrange(6), rng.randrange(256)
        if action == 0:
            store(guest, rng.choice(aliases) + 1, value)
            first = value
        elif action == 1:
            store(guest, rng.choice(aliases) + 0xFFE, value)
            crossing_low = value
        elif action == 2:
            store(guest, rng.choice(second), value)
            crossing_high = value
        elif action == 3:
            run_at(guest, rng.choice(aliases))
            assert guest.vcpu.regs.rax == first
        elif action == 4:
            run_at(guest, CROSSING)
            assert guest.vcpu.regs.rax == crossing_low | crossing_high << 16
        else:
            store(guest, rng.choice([0x60000, 0x41000 + 0x800, TARGET ^ 0x100000, 0x1F0000]) + 0x40, value)


def test_store_before_and_after_the_translation() -> None:
    """An alias that the TLB has as free of code, because it was written before there was any: the next write by it still drops the
    code that came meanwhile."""
    guest = guest_with_code()
    alias = SPARE[7] << 12
    guest.set_entry(alias, BASE + TARGET | PRESENT_USER_RW)
    guest.vcpu.flush_tlb()
    for value in range(1, 50):
        store(guest, alias + 1, value)
        run_at(guest, TARGET)
        assert guest.vcpu.regs.rax == value


def loop_seconds(code: str, iterations: int) -> float:
    """The best of three runs."""
    best = 60.0
    for _ in range(3):
        guest = PvGuest(bytes.fromhex(code))
        guest.vcpu.regs.rbx, guest.vcpu.regs.rcx = 0x30000, iterations
        start = time.perf_counter()
        assert guest.vcpu.run(1 << 40) is StopReason.REQUESTED
        best = min(best, time.perf_counter() - start)
        assert guest.words[0x30000 // 8] == (0 if code.startswith("4889d0") else guest.vcpu.regs.rdx)
    return best


def test_stores_without_code_leave_the_slow_path() -> None:
    """A loop with a store costs no more than thrice one without. In the stock library: fifty times (docs/vcpu.md)."""
    # l: mov [rbx], rdx (or mov rax, rdx); inc rdx; dec rcx; jnz l; mov [rbx], rdx; syscall
    plain = loop_seconds("4889d0 48ffc2 48ffc9 75f5 0f05", 3_000_000)
    storing = loop_seconds("488913 48ffc2 48ffc9 75f5 488913 0f05", 3_000_000)
    assert storing < 3 * plain + 0.01


def test_stack_in_a_page_with_code_is_exact() -> None:
    """PUSH into the page that runs: every store drops code there, none is lost."""
    # at STACK - 0x800: push rcx; dec rcx; jnz; syscall, with the stack just below in the same page
    body = STACK - 0x800
    guest = PvGuest()
    guest.write(body, bytes.fromhex("51 48ffc9 75fa 0f05"))
    regs = guest.vcpu.regs
    regs.rcx, regs.rsp = 100, body - 8
    run_at(guest, body)
    assert list(guest.words[(body - 8 - 800) // 8 : (body - 8) // 8]) == list(range(1, 101))


def test_more_code_than_there_is_room_for() -> None:
    """Translations that fill their room several times over: each instruction runs once, and memory for them stays bounded."""
    count = 600_000
    guest = PvGuest(size=3 << 20)
    first = 0x50000
    guest.write(first, bytes.fromhex("48ffc0 488903") * (count // 2) + bytes.fromhex("0f05"))
    regs = guest.vcpu.regs
    before = resident_bytes()
    for turn in (1, 2, 3):
        regs.rax, regs.rbx = 0, 0x30000
        run_at(guest, first)
        assert regs.rax == guest.words[0x30000 // 8] == count // 2, turn
    assert resident_bytes() - before < 1.5 * TRANSLATIONS_BYTES


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


UNKNOWN = """
from domains.vcpu import insides, stores
code = insides.Library.code
for wanted, named in {names!r}:
    insides.Library.code = lambda self, name, size: bytes(size) if name == wanted else code(self, name, size)
    try:
        stores.make_stores_fast.__wrapped__(8)
    except insides.UnknownUnicorn as error:
        assert named in str(error), (wanted, error)
    else:
        raise SystemExit(f"{{wanted}} was not looked at")
"""
"""In a process of its own: in this one the library is changed already."""


def test_an_unknown_library_is_refused() -> None:
    """Each piece of code that is relied upon is compared, and named, before anything is changed."""
    names = [
        ("helper_le_stq_mmu_x86_64", "notdirty_write"),
        ("tb_invalidate_phys_page_fast_x86_64", "tb_invalidate_phys_page_fast"),
        ("tlb_protect_code_x86_64", "tlb_protect_code"),
        ("cpu_physical_memory_test_and_clear_dirty_x86_64", "the dirty bitmap"),
        ("tlb_reset_dirty_x86_64", "tlb_reset_dirty"),
        ("tlb_set_dirty_x86_64", "tlb_set_dirty"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN.format(names=names)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
