"""What this process needs of its Unicorn, tried once at start (about 15 ms): refuse to run rather than run
wrong.

`insides.offsets` has proved where things are; this proves that the work-arounds still work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domains.vcpu.api import StopReason, Trap
from domains.vcpu.hvm_testing import HvmGuest
from domains.vcpu.insides import UnknownUnicorn, described
from domains.vcpu.testing import BASE, CODE, PRESENT_USER_RW, PvGuest

COUNTERS: Final = 0x30000


def _exact_slices() -> bool:
    # l: lock inc qword [rbx]; inc rdx; dec rcx; jnz l
    guest = PvGuest(bytes.fromhex("f048ff03 48ffc2 48ffc9 75f4"))
    regs = guest.vcpu.regs
    regs.rbx, regs.rcx = COUNTERS, 1 << 40
    reasons = [guest.vcpu.run(3) for _ in range(20)]
    return set(reasons) == {StopReason.SLICE} and guest.words[COUNTERS // 8] == regs.rdx == 60


def _page_faults() -> bool:
    guest = PvGuest(bytes.fromhex("4889042508000300"))  # mov [0x30008], rax
    guest.set_entry(COUNTERS, 0)
    guest.vcpu.flush_tlb()
    for _ in range(3):
        guest.run()
    expected = ("trap", Trap(14, 6, False), CODE)
    return guest.traps.seen == [expected] * 3 and guest.vcpu.regs.cr2 == COUNTERS + 8


def _code_is_never_stale() -> bool:
    # mov [rdi], al; call rsi; ret into a page that another virtual address has as well
    guest = PvGuest(bytes.fromhex("8807 ffd6 0f05"))
    guest.set_entry(COUNTERS, BASE + COUNTERS + 0x1000 | PRESENT_USER_RW)
    guest.vcpu.flush_tlb()
    guest.write(COUNTERS + 0x1000, bytes.fromhex("bb00000000c3"))  # mov ebx, 0; ret
    regs, seen = guest.vcpu.regs, []
    for value in (1, 2, 3):
        regs.rip, regs.rax, regs.rdi, regs.rsi = CODE, value, COUNTERS + 1, COUNTERS + 0x1000
        guest.run()
        seen.append(regs.rbx)
    return seen == [1, 2, 3]


def _software_interrupts_and_syscalls() -> bool:
    guest = PvGuest(bytes.fromhex("cd0e 480f05 0f0b"))
    for _ in range(3):
        guest.run()
    return guest.traps.seen == [
        ("trap", Trap(14, 0, True), CODE + 2),
        ("syscall", None, CODE + 5),
        ("invalid", None, CODE + 5),
    ]


def _privileged_and_ports() -> bool:
    guest = PvGuest(bytes.fromhex("48ffc3 e480"))  # inc rbx; in al, 0x80
    guest.traps.port_in = lambda port, size: guest.vcpu.raise_fault(13)
    guest.run()
    return guest.traps.seen == [("trap", Trap(13, 0, False), CODE + 3)] and guest.vcpu.regs.rbx == 1


def _clock() -> bool:
    guest = PvGuest(bytes.fromhex("0f31 48c1e220 4809d0 0f05"))
    before = guest.vcpu.guest_tsc()
    guest.run()
    return before < guest.vcpu.regs.rax < guest.vcpu.guest_tsc()


def _delivery_by_idt() -> bool:
    guest = HvmGuest()
    guest.long_mode("fb 90 cc 488b042500003000")  # sti; nop; int3; mov rax,[0x300000]
    guest.handler(0x20, "ffc5 48cf")  # inc ebp; iretq
    guest.handler(3, "ffc3 48cf")  # inc ebx; iretq
    guest.handler(14, "58 f4")  # pop rax; hlt
    guest.vcpu.regs.rbx = guest.vcpu.regs.rbp = 0
    guest.vcpu.inject_interrupt(0x20)
    regs = guest.vcpu.regs
    return guest.run() is StopReason.HALT and (regs.rbx, regs.rbp, regs.rax) == (1, 1, 0)


def _triple_fault() -> bool:
    guest = HvmGuest()
    guest.long_mode("0f0b")
    guest.vcpu.regs.idtr_limit = 0
    guest.write(guest.body, "0f011c2500400000 0f0b")  # lidt [0x4000] (zeros); ud2
    return guest.run() is StopReason.TRIPLE_FAULT


CHECKS: Final[tuple[tuple[str, Callable[[], bool]], ...]] = (
    ("slices end exactly and no instruction runs twice", _exact_slices),
    ("page faults: error code, CR2, RIP, again and again", _page_faults),
    ("code overwritten by another virtual address is run as it is now", _code_is_never_stale),
    ("INT n is not a fault; SYSCALL's RIP; #UD", _software_interrupts_and_syscalls),
    ("a port hook can give #GP instead", _privileged_and_ports),
    ("RDTSC is the hypervisor's clock", _clock),
    ("HVM: exceptions and interrupts by the guest's IDT", _delivery_by_idt),
    ("HVM: a triple fault is seen", _triple_fault),
)


def check(*, hvm: bool = True) -> None:
    """Try everything; UnknownUnicorn names what fails and the version found. `hvm=False` leaves the HVM half
    out."""
    failed = [what for what, test in CHECKS if (hvm or not what.startswith("HVM")) and not test()]
    if failed:
        raise UnknownUnicorn(f"{described()} does not behave as it must: {'; '.join(failed)}")
