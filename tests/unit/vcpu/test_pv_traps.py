"""Each trap of a PV guest reaches its hook with the RIP, error code and CR2 that `PvTraps` promises."""

from __future__ import annotations

import pytest

from bus.addresses import MachineAddr
from domains.vcpu.api import StopReason, Trap
from domains.vcpu.testing import BASE, CODE, PvGuest

PF, GP = 14, 13
FAULTS = [
    # name, code, trap, offset of RIP from CODE
    ("cli", "fa", Trap(GP, 0, False), 0),
    ("hlt", "f4", Trap(GP, 0, False), 0),
    ("wrmsr", "0f30", Trap(GP, 0, False), 0),
    ("rdmsr", "0f32", Trap(GP, 0, False), 0),
    ("mov rax, cr0", "0f20c0", Trap(GP, 0, False), 0),
    ("mov cr3, rax", "0f22d8", Trap(GP, 0, False), 0),
    ("lgdt [rsp]", "0f011424", Trap(GP, 0, False), 0),
    ("invlpg [rsp]", "0f013c24", Trap(GP, 0, False), 0),
    ("swapgs", "0f01f8", Trap(GP, 0, False), 0),
    ("nop; iretq with a null CS", "9048cf", Trap(GP, 0, False), 1),
    ("int 0x80", "cd80", Trap(0x80, 0, True), 2),
    ("int 0x0e is not #PF", "cd0e", Trap(PF, 0, True), 2),
    ("int 0x82 (Xen's old hypercall)", "90cd82", Trap(0x82, 0, True), 3),
    ("int3", "cc", Trap(3, 0, True), 1),
    ("xor ecx, ecx; div ecx", "31c9f7f1", Trap(0, 0, False), 2),
    ("mov eax, 0x18; mov ds, eax without a GDT", "b8180000008ed8", Trap(GP, 0x18, False), 5),
]


@pytest.mark.parametrize(("name", "code", "trap", "at"), FAULTS, ids=[row[0] for row in FAULTS])
def test_trap(name: str, code: str, trap: Trap, at: int) -> None:
    """Faults point at the instruction, software interrupts behind it, and the two are told apart."""
    guest = PvGuest(bytes.fromhex(code))
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("trap", trap, CODE + at)]


PAGE_FAULTS = [
    # name, code, page-table entry of 0x30000 (None: untouched), error code, CR2, RIP offset
    ("read, not present", "488b042500000300", 0, 4, 0x30000, 0),
    ("write, not present", "48890425080003 00".replace(" ", ""), 0, 6, 0x30008, 0),
    ("write, read-only", "4889042508000300", BASE | 0x30005, 7, 0x30008, 0),
    ("read, supervisor", "488b042510000300", BASE | 0x30003, 5, 0x30010, 0),
    ("fetch, not present", "b800000300ffe0", 0, 0x14, 0x30000, None),
    ("fetch, no-execute", "b800000300ffe0", BASE | 0x30007 | 1 << 63, 0x15, 0x30000, None),
    ("read, reserved bit", "488b042500000300", BASE | 0x30007 | 1 << 51, 0xD, 0x30000, 0),
]


@pytest.mark.parametrize(
    ("name", "code", "entry", "error", "cr2", "at"), PAGE_FAULTS, ids=[row[0] for row in PAGE_FAULTS]
)
def test_page_fault(name: str, code: str, entry: int, error: int, cr2: int, at: int | None) -> None:
    """#PF: P, W/R, U/S, RSVD and I/D bits, CR2, and RIP (at the target for a fetch)."""
    guest = PvGuest(bytes.fromhex(code))
    guest.set_entry(0x30000, entry)
    guest.vcpu.flush_tlb()
    assert guest.run() is StopReason.REQUESTED
    rip = 0x30000 if at is None else CODE + at
    assert guest.traps.seen == [("trap", Trap(PF, error, False), rip)]
    assert guest.vcpu.regs.cr2 == cr2


def test_non_canonical_address_is_gp() -> None:
    """mov rax, 0x800000000000; mov rax, [rax]: #GP, not #PF."""
    guest = PvGuest(bytes.fromhex("48b80000000000800000" + "488b00"))
    guest.run()
    assert guest.traps.seen == [("trap", Trap(GP, 0, False), CODE + 10)]


@pytest.mark.parametrize(
    "code", ["0f05", "480f05", "f30f05"], ids=["syscall", "rex.w syscall", "rep syscall"]
)
def test_syscall_rip_is_behind_whatever_the_prefixes(code: str) -> None:
    """RIP in the hook is behind the instruction; what the hook writes is where the guest goes on."""
    guest = PvGuest(bytes.fromhex(code))
    guest.write(0x12345, bytes.fromhex("cd21"))  # int 0x21
    seen: list[int] = []

    def hook() -> None:
        seen.append(guest.vcpu.regs.rip)
        guest.vcpu.regs.rip = 0x12345

    guest.traps.syscall = hook
    guest.run()
    assert seen == [CODE + len(code) // 2]
    assert guest.traps.seen == [("trap", Trap(0x21, 0, True), 0x12347)]


def test_sysenter_reaches_its_hook() -> None:
    """SYSENTER: RIP behind it."""
    guest = PvGuest(bytes.fromhex("0f34"))
    guest.run()
    assert guest.traps.seen == [("sysenter", None, CODE + 2)]


@pytest.mark.parametrize(
    "code", ["0f0b", "0f01c1", "0f01d9", "0f01ca", "c5fc28c1", "0f01c8"],
    ids=["ud2", "vmcall", "vmmcall", "clac", "avx", "monitor"],
)  # fmt: skip
def test_invalid_opcodes(code: str) -> None:
    """#UD with RIP at the instruction, again and again, and RIP written by the hook is used."""
    guest = PvGuest(bytes.fromhex("90" + code))
    for _ in range(3):
        assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("invalid", None, CODE + 1)] * 3
    guest.vcpu.regs.rip = CODE + 1 + len(code) // 2
    guest.write(CODE + 1 + len(code) // 2, bytes.fromhex("cd21"))
    guest.vcpu.drop_code(BASE + CODE, 16)  # type: ignore[arg-type]  # a plain number is clearer here
    guest.run()
    assert guest.traps.seen[-1][1] == Trap(0x21, 0, True)


def test_old_exception_is_forgotten() -> None:
    """A thousand #PF in a row all arrive as #PF (Unicorn alone makes the second one #DF)."""
    guest = PvGuest(bytes.fromhex("488b0425000003 00ebf6".replace(" ", "")))  # l: mov rax, [0x30000]; jmp l
    guest.set_entry(0x30000, 0)
    guest.vcpu.flush_tlb()
    vectors: list[int] = []

    def hook(trap: Trap) -> None:
        vectors.append(trap.vector)
        if len(vectors) == 1000:
            guest.vcpu.request_stop()
        guest.vcpu.regs.rip = CODE + 8

    guest.traps.trap = hook
    assert guest.run() is StopReason.REQUESTED
    assert vectors == [PF] * 1000


def test_trap_hook_decides_where_the_guest_goes_on() -> None:
    """RIP written in a hook of INT n is exact."""
    guest = PvGuest(bytes.fromhex("cd80"))
    guest.write(0x15000, bytes.fromhex("0f05"))

    def hook(trap: Trap) -> None:
        guest.vcpu.regs.rip = 0x15000

    guest.traps.trap = hook
    guest.run()
    assert guest.traps.seen == [("syscall", None, 0x15002)]


@pytest.mark.parametrize("how", ["in", "out", "cpuid", "syscall"])
def test_raise_fault_instead_of_an_instruction(how: str) -> None:
    """raise_fault: the instruction has no effect, the next thing the hypervisor sees is the trap with RIP
    at it."""
    code = {"in": "e580", "out": "e780", "cpuid": "0fa2", "syscall": "0f05"}[how]
    # inc rbx; <instruction>; inc rbx
    guest = PvGuest(bytes.fromhex("48ffc3" + code + "48ffc3"))
    guest.vcpu.regs.rax = 0x5555

    def fault(*arguments: int) -> int:
        guest.vcpu.raise_fault(GP, 0x18)

    guest.traps.port_in = fault
    guest.traps.port_out = fault  # type: ignore[assignment]  # never returns
    guest.traps.cpuid = fault  # type: ignore[assignment]
    guest.traps.syscall = fault  # type: ignore[assignment]
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen == [("trap", Trap(GP, 0x18, False), CODE + 3)]
    assert (guest.vcpu.regs.rbx, guest.vcpu.regs.rax) == (1, 0x5555)


def test_ports_and_cpuid_values() -> None:
    """Sizes, port numbers and values of IN and OUT; CPUID gets leaf and subleaf and writes four registers."""
    # mov dx,0x3f8; out dx,al; out dx,ax; out dx,eax; in al,dx; mov r8,rax; in eax,dx; mov r9,rax;
    # mov eax,7; mov ecx,1; cpuid; int 0x21
    guest = PvGuest(bytes.fromhex("66baf803 ee 66ef ef ec 4989c0 ed 4989c1 b807000000 b901000000 0fa2 cd21"))
    outs: list[tuple[int, int, int]] = []
    guest.traps.port_out = lambda port, size, value: outs.append((port, size, value))
    guest.traps.port_in = lambda port, size: 0xAABBCCDD
    guest.traps.cpuid = lambda leaf, subleaf: (leaf * 16 + subleaf, 1 << 31, 3, (1 << 32) - 1)
    guest.vcpu.regs.rax = 0x1_2345_6789
    guest.run()
    regs = guest.vcpu.regs
    assert outs == [(0x3F8, 1, 0x89), (0x3F8, 2, 0x6789), (0x3F8, 4, 0x23456789)]
    assert regs.r8 == 0x1_2345_67DD
    assert regs.r9 == 0xAABBCCDD
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0x71, 1 << 31, 3, 0xFFFFFFFF)


@pytest.mark.parametrize("kind", ["syscall", "trap", "in", "out", "cpuid"])
def test_exceptions_of_hooks_come_out_of_run(kind: str) -> None:
    """An exception in any hook is raised by run. The instruction has not happened: it runs again
    afterwards."""
    code = {"syscall": "0f05", "trap": "cd80", "in": "e480", "out": "e680", "cpuid": "0fa2"}[kind]
    guest = PvGuest(bytes.fromhex(code + "cd21"))

    def fail(*arguments: int) -> int:
        raise ZeroDivisionError("from a hook")

    traps = guest.traps
    traps.syscall = traps.trap = traps.port_out = fail  # type: ignore[assignment]  # never returns
    traps.port_in = fail
    traps.cpuid = fail  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError, match="from a hook"):
        guest.run()
    assert guest.vcpu.regs.rip == CODE + (2 if kind == "trap" else 0)
    done: list[str] = []

    def note(name: str) -> int:
        done.append(name)
        return 0

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return note("cpuid"), 0, 0, 0

    traps.syscall = lambda: (note("syscall"), None)[1]
    traps.port_in = lambda port, size: note("in")
    traps.port_out = lambda port, size, value: (note("out"), None)[1]
    traps.cpuid = cpuid
    traps.trap = None
    assert guest.run() is StopReason.REQUESTED
    assert done == ([] if kind == "trap" else [kind])
    assert guest.traps.seen == [("trap", Trap(0x21, 0, True), CODE + 4)]


def test_memory_that_is_taken_away_inside_a_hook_leaves_no_exception_behind() -> None:
    """Unicorn walks the guest's tables when a region goes. The page fault that it meets there is nobody's: the guest's own next one
    is no double fault, and CR2 is as it was."""
    guest = PvGuest(bytes.fromhex("0f05 0f05 488b042500000070"))  # syscall; syscall; mov rax, [0x70000000]
    first = BASE + (1 << 19)
    pages = iter((first, first + 0x1000))
    guest.traps.syscall = lambda: guest.vcpu.unmap(MachineAddr(next(pages)), 0x1000)
    guest.vcpu.regs.cr2 = 0x1234
    seen: list[int] = []

    def at_fault(trap: Trap) -> None:
        seen.append(trap.vector)
        guest.vcpu.request_stop()

    guest.traps.trap = at_fault
    guest.vcpu.map(MachineAddr(0x50000000), guest.host, 0x1000)
    guest.vcpu.unmap(MachineAddr(0x50000000), 0x1000)  # between runs as well
    assert guest.vcpu.regs.cr2 == 0x1234
    guest.run()
    assert seen == [14]
    assert guest.vcpu.regs.cr2 == 0x70000000
