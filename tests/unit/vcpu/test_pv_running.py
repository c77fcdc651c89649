"""Stops are exact, bells are not lost, memory and code changes take effect, contexts switch, the clock is
one."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from itertools import pairwise

import pytest

from bus.addresses import MachineAddr
from domains.vcpu.api import StopReason, Trap, VcpuError
from domains.vcpu.testing import BASE, CODE, PvGuest

# l: lock inc qword [rbx]; inc rdx; add qword [rbx+8], 1; dec rcx; jnz l; syscall
COUNT = bytes.fromhex("f048ff03 48ffc2 4883430801 48ffc9 75ef 0f05")
COUNTERS = 0x30000


def counting(iterations: int) -> PvGuest:
    """A guest that counts in memory and in a register."""
    guest = PvGuest(COUNT)
    guest.vcpu.regs.rbx, guest.vcpu.regs.rcx, guest.vcpu.regs.rdx = COUNTERS, iterations, 0
    return guest


def counters(guest: PvGuest) -> tuple[int, int, int]:
    """The three counters."""
    return guest.words[COUNTERS // 8], guest.words[COUNTERS // 8 + 1], guest.vcpu.regs.rdx


def test_no_instruction_runs_twice_or_never_under_bells() -> None:
    """Thousands of asynchronous bells: memory counters, LOCK INC and register agree to the unit."""
    total = 6_000_000
    guest = counting(total)
    vcpu = guest.vcpu
    ready, done = threading.Event(), threading.Event()

    def ringer() -> None:
        while not done.is_set():
            ready.wait(0.1)
            ready.clear()
            vcpu.ring()

    thread = threading.Thread(target=ringer)
    thread.start()
    bells = 0
    try:
        while True:
            vcpu.clear_bell()
            ready.set()
            reason = vcpu.run(1 << 40)
            if reason is not StopReason.BELL:
                break
            bells += 1
            before = counters(guest)
            assert before[0] == before[1] == before[2]
    finally:
        done.set()
        thread.join()
    assert reason is StopReason.REQUESTED
    assert guest.traps.seen[0][0] == "syscall"
    assert counters(guest) == (total,) * 3
    assert bells > 100


@pytest.mark.parametrize("blocks", [1, 2, 7, 1000])
def test_slices_are_exact(blocks: int) -> None:
    """A slice of n blocks runs n blocks: each is one iteration of the loop, and always goes forward."""
    guest = counting(1 << 40)
    seen = []
    for _ in range(50):
        assert guest.vcpu.run(blocks) is StopReason.SLICE
        seen.append(counters(guest))
    assert all(a == b == c for a, b, c in seen)
    assert {later[0] - sooner[0] for sooner, later in pairwise(seen)} == {blocks}


def test_bell_before_run_is_not_lost_and_clear_forgets_it() -> None:
    """ring, then run: comes back at once, nothing executed; clear_bell, then run: goes on."""
    guest = counting(10)
    guest.vcpu.ring()
    assert guest.vcpu.run(1000) is StopReason.BELL
    assert counters(guest)[0] == 0
    guest.vcpu.clear_bell()
    assert guest.vcpu.run(1000) is StopReason.REQUESTED
    assert counters(guest)[0] == 10


def test_bell_from_another_thread_stops_an_endless_loop() -> None:
    """jmp $ is left within the time that a thread needs to be scheduled."""
    guest = PvGuest(bytes.fromhex("ebfe"))
    timer = threading.Timer(0.02, guest.vcpu.ring)
    timer.start()
    begin = time.perf_counter()
    assert guest.vcpu.run(1 << 50) is StopReason.BELL
    assert time.perf_counter() - begin < 5
    timer.join()
    assert guest.vcpu.regs.rip == CODE


def test_run_refuses_nonsense() -> None:
    """Slices below one block, and a run inside a hook."""
    guest = PvGuest(bytes.fromhex("0f05"))
    with pytest.raises(VcpuError, match="slice"):
        guest.vcpu.run(0)

    def nested() -> None:
        guest.vcpu.run(10)

    guest.traps.syscall = nested
    with pytest.raises(VcpuError, match="inside a hook"):
        guest.run()


def test_changed_code_runs_after_drop_code() -> None:
    """mov eax, 1 becomes mov eax, 2 behind the vCPU's back; virtual, physical and host addresses differ."""
    guest = PvGuest(bytes.fromhex("b8010000000f05"))
    guest.run()
    assert guest.vcpu.regs.rax == 1
    for value in (2, 3):
        guest.write(CODE + 1, bytes([value]))
        guest.vcpu.drop_code(MachineAddr(BASE + CODE), 4096)
        guest.restart()
        guest.run()
        assert guest.vcpu.regs.rax == value


def test_drop_code_inside_a_hook() -> None:
    """The hypervisor patches the code after a SYSCALL from within its hook."""
    guest = PvGuest(bytes.fromhex("b801000000 0f05 b803000000 cd21".replace(" ", "")))
    guest.run()
    guest.vcpu.run(10)
    assert guest.vcpu.regs.rax == 3
    guest.restart()

    def hook() -> None:
        guest.write(CODE + 8, b"\x09")
        guest.vcpu.drop_code(MachineAddr(BASE + CODE), 4096)

    guest.traps.syscall = hook
    guest.run()
    assert guest.vcpu.regs.rax == 9


def test_self_modifying_guest() -> None:
    """The guest overwrites an instruction it ran before; no help needed."""
    # l: mov eax,1; mov byte [rip-5],2 (the immediate); dec ecx; jnz l; syscall
    guest = PvGuest(bytes.fromhex("b801000000 c605f5ffffff02 ffc9 75f0 0f05".replace(" ", "")))
    guest.vcpu.regs.rcx = 2
    guest.run()
    assert guest.vcpu.regs.rax == 2


def test_unmapped_physical_memory_is_a_bad_access() -> None:
    """A page-table entry that leads nowhere stops the vCPU with address, size and direction; RIP at the
    access."""
    for code, write, size in (("488b042510000300", False, 8), ("88042510000300", True, 1)):
        guest = PvGuest(bytes.fromhex("90" + code))
        guest.set_entry(0x30000, 0x7_0000_0007)
        guest.vcpu.flush_tlb()
        assert guest.run() is StopReason.BAD_ACCESS
        assert guest.vcpu.bad_access == (0x7_0000_0010, size, write)
        assert guest.vcpu.regs.rip == CODE + 1


def test_read_only_mapping_is_a_bad_access_not_a_crash() -> None:
    """A guest write to physical memory that is mapped read-only; after protect(writable) it goes through."""
    guest = PvGuest(bytes.fromhex("48890425100003000f05"))
    guest.vcpu.regs.rax = 0x77
    guest.vcpu.protect(MachineAddr(BASE + 0x30000), 0x1000, writable=False)
    assert guest.run() is StopReason.BAD_ACCESS
    assert guest.vcpu.bad_access == (BASE + 0x30010, 8, True)
    assert guest.words[0x30010 // 8] == 0
    guest.vcpu.protect(MachineAddr(BASE + 0x30000), 0x1000, writable=True)
    guest.restart()
    assert guest.run() is StopReason.REQUESTED
    assert guest.words[0x30010 // 8] == 0x77


def test_map_replaces_a_page_in_the_middle_even_in_a_hook() -> None:
    """One page of a region is replaced by other memory inside a hook, the neighbours stay; unmap takes it
    away."""
    # mov rax,[0x30000]; mov rbx,[0x31000]; mov rcx,[0x32000]; syscall; jmp back
    guest = PvGuest(
        bytes.fromhex("488b042500000300 488b1c2500100300 488b0c2500200300 0f05 ebe4".replace(" ", ""))
    )
    for number in range(3):
        guest.words[0x30000 // 8 + 512 * number] = number + 1
    other = mmap.mmap(-1, 4096)
    other[0] = 99
    address = ctypes.addressof(ctypes.c_char.from_buffer(other))
    seen = []

    def hook() -> None:
        regs = guest.vcpu.regs
        seen.append((regs.rax, regs.rbx, regs.rcx))
        if len(seen) == 1:
            guest.vcpu.map(MachineAddr(BASE + 0x31000), address, 4096)
        elif len(seen) == 2:
            guest.vcpu.unmap(MachineAddr(BASE + 0x31000), 4096)

    guest.traps.syscall = hook
    assert guest.run() is StopReason.BAD_ACCESS
    assert seen == [(1, 2, 3), (1, 99, 3)]
    assert guest.vcpu.bad_access == (BASE + 0x31000, 8, False)


def test_map_refuses_nonsense() -> None:
    """Parts of pages, no memory, and protecting what is not mapped."""
    guest = PvGuest()
    for address, host, size in (
        (1, guest.host, 4096),
        (0, guest.host + 1, 4096),
        (0, guest.host, 100),
        (0, 0, 4096),
    ):
        with pytest.raises(VcpuError):
            guest.vcpu.map(MachineAddr(address), host, size)
    with pytest.raises(VcpuError):
        guest.vcpu.protect(MachineAddr(BASE - 4096), 8192, writable=False)


def test_stale_translations_go_with_flush_page() -> None:
    """A changed page-table entry is seen after flush_page of that page, and after flush_tlb."""
    guest = PvGuest(bytes.fromhex("488b0425000003000f05"))
    guest.words[0x30000 // 8], guest.words[0x31000 // 8], guest.words[0x32000 // 8] = 1, 2, 3
    guest.run()
    assert guest.vcpu.regs.rax == 1
    guest.set_entry(0x30000, BASE + 0x31007)
    guest.vcpu.flush_page(0x30000)
    guest.vcpu.regs.rip = CODE
    guest.run()
    assert guest.vcpu.regs.rax == 2
    guest.set_entry(0x30000, BASE + 0x32007)
    guest.vcpu.flush_tlb()
    guest.vcpu.regs.rip = CODE
    guest.run()
    assert guest.vcpu.regs.rax == 3


def test_two_contexts_take_turns() -> None:
    """Two vCPUs in one object, each with its own registers, page tables and x87/SSE state."""
    guest = counting(1 << 40)
    vcpu = guest.vcpu
    vcpu.regs.rbx = COUNTERS
    image = bytearray(vcpu.save_extended())
    image[160:176] = b"A" * 16
    vcpu.load_extended(bytes(image))
    first = vcpu.save_context()
    vcpu.regs.rbx = COUNTERS + 64
    image[160:176] = b"B" * 16
    vcpu.load_extended(bytes(image))
    second = vcpu.save_context()
    for _ in range(100):
        vcpu.load_context(first)
        assert vcpu.run(3) is StopReason.SLICE
        first = vcpu.save_context()
        assert vcpu.save_extended()[160:176] == b"A" * 16
        vcpu.load_context(second)
        assert vcpu.run(5) is StopReason.SLICE
        second = vcpu.save_context()
        assert vcpu.save_extended()[160:176] == b"B" * 16
    assert guest.words[COUNTERS // 8] == guest.words[COUNTERS // 8 + 1] == 300
    assert guest.words[COUNTERS // 8 + 8] == guest.words[COUNTERS // 8 + 9] == 500
    with pytest.raises(VcpuError):
        vcpu.load_context(first[:-1])


def test_extended_state_is_what_fxsave_stores() -> None:
    """save_extended equals the guest's own FXSAVE64, and load_extended of it gives the same image again."""
    # fninit; fldpi; fld1; fldl2e; movq xmm0,rax; movq xmm15,rbx; fxsave64 [0x30000]; syscall
    code = "dbe3 d9eb d9e8 d9ea 66480f6ec0 664c0f6efb 480fae042500000300 0f05".replace(" ", "")
    guest = PvGuest(bytes.fromhex(code))
    guest.vcpu.regs.rax, guest.vcpu.regs.rbx = 0x1122334455667788, 0x99AABBCCDDEEFF00
    guest.run()
    stored = bytes(guest.memory[0x30000 : 0x30000 + 512])
    image = guest.vcpu.save_extended()
    for low, high in ((0, 6), (24, 28), (32, 160), (160, 416)):  # control words, MXCSR, ST, XMM
        assert image[low:high] == stored[low:high], (low, high)
    other = PvGuest(bytes.fromhex("480fae0425000003000f05"))
    other.vcpu.load_extended(image)
    other.run()
    again = bytes(other.memory[0x30000 : 0x30000 + 512])
    for low, high in ((0, 6), (24, 28), (32, 160), (160, 416)):
        assert again[low:high] == stored[low:high], (low, high)


def test_guest_tsc_is_the_hypervisors() -> None:
    """RDTSC in the guest lies between two readings of guest_tsc around it: plain, scaled and shifted."""
    guest = PvGuest(bytes.fromhex("0f31 48c1e220 4809d0 0f05".replace(" ", "")))
    vcpu = guest.vcpu
    for offset, multiplier in (
        (0, 1 << 32),
        (123456789, 1 << 31),
        (-(1 << 40), 3 << 32),
        (1 << 63, 0x1_2345_6789),
    ):
        vcpu.set_tsc(offset=offset, multiplier=multiplier)
        vcpu.regs.rip = CODE
        before = vcpu.guest_tsc()
        guest.run()
        after = vcpu.guest_tsc()
        assert (vcpu.regs.rax - before) % (1 << 64) <= (after - before) % (1 << 64) < 1 << 40
        host = vcpu.host_tsc()
        assert (
            abs((host * multiplier >> 32) + offset - vcpu.guest_tsc()) % (1 << 64) < 1 << 40
            or offset >= 1 << 63
        )


def test_rdtscp_gives_aux_and_trap_goes_to_the_hook() -> None:
    """RDTSCP sets ECX to TSC_AUX; with trap_tsc both instructions ask on_rdtsc."""
    guest = PvGuest(bytes.fromhex("0f01f90f05"))
    guest.vcpu.regs.tsc_aux = 7
    guest.run()
    assert guest.vcpu.regs.rcx == 7
    guest.vcpu.trap_tsc(True)
    guest.restart()
    guest.run()
    regs = guest.vcpu.regs
    assert (regs.rdx, regs.rax, regs.rcx) == (0x11223344, 0x55667788, 7)


def test_load_segment_switches_to_compatibility_mode() -> None:
    """CS with L=0, D=1: 32-bit code (inc eax is 40h there) runs at CPL3 and traps as such."""
    guest = PvGuest(bytes.fromhex("40cd21"))
    guest.vcpu.load_segment("cs", 0xE023, 0, 0xFFFFFFFF, 0xC0FB)
    guest.run()
    assert guest.vcpu.regs.rax == 1
    assert guest.traps.seen == [("trap", Trap(0x21, 0, True), CODE + 3)]
    assert guest.vcpu.regs.cpl == 3
    guest.vcpu.load_segment("cs", 0xE033, 0, 0xFFFFFFFF, 0xA0FB)
    guest.restart()
    guest.run()  # in 64-bit mode 40h is a REX prefix, ignored before INT
    assert guest.vcpu.regs.rax == 1


def test_guests_own_segment_loads_use_its_gdt() -> None:
    """mov ds, ax at CPL3 finds the descriptor by gdtr_base; the flag of a bad selector is #GP
    (test_pv_traps)."""
    guest = PvGuest(bytes.fromhex("b80b0000008ed80f05"))
    guest.words[0x30008 // 8] = 0x00CFF3000000FFFF
    guest.vcpu.regs.gdtr_base, guest.vcpu.regs.gdtr_limit = 0x30000, 15
    guest.run()
    assert guest.traps.seen[0][0] == "syscall"
    assert guest.vcpu.regs.ds == 0xB


def test_fetch_from_unmapped_physical_memory() -> None:
    """A jump to a page whose frame does not exist."""
    guest = PvGuest(bytes.fromhex("90b800000300ffe0"))  # nop; mov eax, 0x30000; jmp rax
    guest.set_entry(0x30000, 0x7_0000_0007)
    guest.vcpu.flush_tlb()
    assert guest.run() is StopReason.BAD_ACCESS
    assert guest.vcpu.bad_access is not None
    assert guest.vcpu.bad_access.address >> 12 == 0x7_0000_0000 >> 12
    assert guest.vcpu.regs.rip == 0x30000
    guest.set_entry(0x30000, BASE + 0x30007)
    guest.write(0x30000, bytes.fromhex("0f05"))
    guest.vcpu.flush_tlb()
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("syscall", None, 0x30002)]
